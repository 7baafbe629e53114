"""The report's page in a real browser: filters, phones, speed of a large page, and texts that try to be code."""

import pytest

from hbpo_jax import report
from hbpo_jax.reporting import sample_view
from tests.reporting import hostile, runs_fixture
from tests.system import browser


@pytest.fixture(scope="module")
def tab():
  """An open tab; skips where no browser is installed."""
  if browser.find() is None:
    pytest.skip(f"needs one of {', '.join(browser.NAMES)} on the PATH to open the report in")
  with browser.page() as page:
    yield page


@pytest.fixture(scope="module")
def html(tmp_path_factory):
  """A report on two evaluations, whose models wrote the hostile texts first."""
  root = tmp_path_factory.mktemp("report")
  for name, seed in (("base", 0), ("trained", 1)):
    runs_fixture.make_evaluation(
        root / name, skill=0.55, seed=seed, texts=hostile.TEXTS, problem_texts=hostile.TEXTS[:3], k=1)
  runs_fixture.make_training_run(root / "run", steps=30)
  report.main([*(str(root / name) for name in ("base", "trained", "run")), f"--out={root / 'out'}", "--title=clean",
               "--samples=300"])
  return root / "out" / "index.html"


def opened(tab, html, width=1280, height=1600):
  """The page, freshly loaded; forgets what was noted before."""
  tab.requests.clear()
  tab.complaints.clear()
  tab.open(browser.file_url(html), width, height)
  return tab


def select(tab, name: str, value: str) -> None:
  tab.evaluate(f"(() => {{ const f = document.getElementById({name!r}); f.value = {value!r};"
               "f.dispatchEvent(new Event('change')); })()")


def search(tab, text: str) -> None:
  tab.evaluate(f"(async () => {{ const f = document.getElementById('search'); f.value = {text!r};"
               "f.dispatchEvent(new Event('input')); await new Promise((r) => setTimeout(r, 400)); })()")


def heads(tab) -> list[str]:
  return tab.evaluate("[...document.querySelectorAll('.case h3')].map((e) => e.textContent)")


def count(tab) -> str:
  return tab.evaluate("document.getElementById('count').textContent")


def test_it_opens_without_a_complaint_and_asks_for_nothing(tab, html):
  opened(tab, html)
  assert tab.complaints == []
  assert {url for url in tab.requests if not url.startswith("data:")} == {browser.file_url(html)}
  assert tab.evaluate("document.title") == "clean"
  assert tab.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 500 && i.alt)")
  assert len(heads(tab)) == 20 and count(tab) == "280 of 280 fit; 20 shown."


def test_filters(tab, html):
  opened(tab, html)
  select(tab, "benchmark", "GSM8K")
  assert all(head.startswith("GSM8K, ") for head in heads(tab)) and count(tab).startswith("120 of 280 fit")
  assert not any("level" in head for head in heads(tab))
  select(tab, "mode", "512")
  assert all(head.startswith("GSM8K, 512 ") for head in heads(tab)) and count(tab).startswith("40 of 280 fit")
  for name in ("benchmark", "mode"):
    select(tab, name, "")
  for change in ("fixed", "broken", "same"):
    select(tab, "change", change)
    assert heads(tab) and all(f" · {change}" in head for head in heads(tab))
  select(tab, "change", "fixed")
  verdicts = tab.evaluate("[...document.querySelectorAll('.case')].map((c) =>"
                          "[...c.querySelectorAll('.facts span')].map((s) => s.className))")
  assert all(pair == ["wrong", "right"] for pair in verdicts)
  select(tab, "change", "")
  select(tab, "level", "3")
  assert heads(tab) and all("level 3" in head for head in heads(tab))
  select(tab, "level", "")
  assert count(tab).startswith("280 of 280 fit")


def test_text_search(tab, html):
  opened(tab, html)
  search(tab, "WHAT IS 39 + 4?")
  assert len(heads(tab)) == 7 and all(head.rstrip().endswith("/39") for head in heads(tab))
  search(tab, "no such text anywhere")
  assert heads(tab) == [] and count(tab) == "No response fits these filters."
  search(tab, "")
  assert count(tab).startswith("280 of 280 fit")


def test_more_and_fold(tab, html):
  opened(tab, html)
  tab.evaluate("document.getElementById('more').click()")
  assert len(heads(tab)) == 40 and count(tab) == "280 of 280 fit; 40 shown."
  lengths = tab.evaluate("""(() => {
    const button = document.querySelector('.case button'), body = button.previousElementSibling;
    const found = [body.textContent.length];
    for (let i = 0; i < 2; i++) { button.click(); found.push(body.textContent.length); }
    return found; })()""")
  assert lengths[0] == lengths[2] < 800 < lengths[1]


def test_hostile_texts_do_nothing_and_are_shown(tab, html):
  opened(tab, html)
  tab.evaluate("(() => { while (!document.getElementById('more').hidden) document.getElementById('more').click();"
               "document.querySelectorAll('.case button').forEach((b) => b.click()); })()")
  assert tab.evaluate("document.title") == "clean"
  assert tab.complaints == [] and len([url for url in tab.requests if not url.startswith("data:")]) == 1
  assert tab.evaluate("document.querySelectorAll('#samples :is(script, img, svg, a, meta, base, iframe)').length") == 0
  shown = tab.evaluate("[...document.querySelectorAll('#samples pre')].map((e) => e.textContent)")
  for text in (hostile.TEXTS[0], hostile.TEXTS[1], hostile.TEXTS[2], hostile.TEXTS[3], hostile.TEXTS[7]):
    assert text in shown
  assert {sample_view.visible(text) for text in hostile.TEXTS[hostile.FIRST_NEW:]} <= set(shown)
  problems = tab.evaluate("[...document.querySelectorAll('#samples .problem')].map((e) => e.textContent)")
  assert set(hostile.TEXTS[:3]) <= set(problems) and any(text.startswith("<img src=x") for text in shown)
  assert any("\\u202egnp.exe\\u202c" in text and "\\x00nul" in text and "\\ud800" in text for text in shown)
  assert any(len(text) > 20_000 and "180,000 characters are not on this page" in text for text in shown)
  assert tab.evaluate("document.querySelectorAll('a[href^=javascript], [onerror], [onload]').length") == 0


def test_hostile_names_do_nothing(tab, tmp_path):
  bad = "; ".join(hostile.TEXTS[hostile.FIRST_NEW:])
  for name, seed in (("a", 0), ("b", 1)):
    runs_fixture.make_evaluation(
        tmp_path / name, benchmarks={"x": bad}, seed=seed, n_problems=4, k=1, modes=("natural",),
        problem_texts=("__proto__",), settings={"model.path": bad, f"data.{bad}": bad})
    for path in (tmp_path / name / "responses" / "x.jsonl", tmp_path / name / "problems" / "x.jsonl"):
      path.write_text(path.read_text().replace('"x/1"', '"__proto__"').replace('"x/2"', '"<svg onload=alert(1)>"'))
  name = bad.replace("=", ":")  # NAME=PATH ends the name there.
  report.main([f"{name}={tmp_path / 'a'}", str(tmp_path / "b"), f"--out={tmp_path / 'out'}", f"--title=clean {bad}"])
  opened(tab, tmp_path / "out" / "index.html")
  assert tab.evaluate("document.title").startswith("clean") and "owned'" in tab.evaluate("document.title")
  assert tab.complaints == [] and len([url for url in tab.requests if not url.startswith("data:")]) == 1
  assert len(heads(tab)) == 4
  made = "iframe, svg, math, form[action], a:not([href^='#'])"
  assert tab.evaluate(f'document.querySelectorAll("{made}").length') == 0


def test_a_script_that_got_in_would_not_run(tab, html):
  opened(tab, html)
  tab.evaluate("(() => { const s = document.createElement('script'); s.textContent = \"document.title='owned'\";"
               "document.body.append(s); })()")
  assert tab.evaluate("document.title") == "clean"
  tab.evaluate("new Promise((done) => { const i = new Image(); i.onload = i.onerror = done;"
               "i.src = 'file:///nowhere.png'; document.body.append(i); })")
  assert any("Content Security Policy" in text for text in tab.complaints)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_never_scrolls_sideways(tab, html, width):
  opened(tab, html, width, 844)
  tab.evaluate("(() => { while (!document.getElementById('more').hidden) document.getElementById('more').click();"
               "document.querySelectorAll('.case button').forEach((b) => b.click()); })()")
  assert tab.evaluate("window.innerWidth") == width
  assert tab.evaluate("document.documentElement.scrollWidth") <= width
  outside = tab.evaluate("""[...document.querySelectorAll('body *')]
    .filter((e) => !e.closest('.scroll') && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map((e) => e.outerHTML.slice(0, 80))""")
  assert outside == []
  wide = tab.evaluate("[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth).length")
  assert wide > 0


def test_a_page_of_two_thousand_responses(tab, tmp_path):
  for name, seed in (("a", 0), ("b", 1)):
    runs_fixture.make_evaluation(tmp_path / name, benchmarks={"x": "X"}, modes=("natural",), n_problems=1000, k=1,
                                 seed=seed)
  report.main([str(tmp_path / "a"), str(tmp_path / "b"), f"--out={tmp_path / 'out'}", "--samples=1000"])
  opened(tab, tmp_path / "out" / "index.html")
  assert count(tab) == "1,000 of 1,000 fit; 20 shown." and tab.complaints == []
  assert tab.evaluate("document.querySelectorAll('*').length") < 2500  # What is not looked at is not laid out.
  search(tab, "x/999")
  assert len(heads(tab)) == 1
