"""The report's page, Markdown and LaTeX: what they show and leave out, and that no text gets out of its place."""

import base64
import dataclasses
import hashlib
import html.parser
import json
import re

import pytest

from hbpo_jax.reporting import blocks, comparison, page, plots, runs, sample_view, training_sections
from hbpo_jax.reporting.blocks import Sheet
from tests.reporting import hostile, runs_fixture


class Outline(html.parser.HTMLParser):
  """Tags with their attributes, and the text of script and style elements."""

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[tuple[str, dict]] = []
    self.inline: list[tuple[str, str]] = []
    self._inside = None
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag in ("script", "style"):
      self._inside = tag if dict(attrs).get("type") is None else "data"
      self.inline.append((self._inside, ""))

  def handle_endtag(self, tag):
    if tag in ("script", "style"):
      self._inside = None

  def handle_data(self, data):
    if self._inside:
      self.inline[-1] = (self._inside, self.inline[-1][1] + data)

  def all(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """A training run and two evaluations, read."""
  root = tmp_path_factory.mktemp("runs")
  runs_fixture.make_training_run(root / "run")
  for name, skill, tokens in (("base", 0.5, 2400.0), ("trained", 0.7, 1200.0)):
    runs_fixture.make_evaluation(root / name, skill=skill, tokens=tokens, settings={"model.path": name})
  return runs.read_all([str(root / name) for name in ("run", "base", "trained")])


@pytest.fixture(scope="module")
def report(both):
  return page.make(both, "A title")


def test_every_section_with_data_is_there(report):
  assert [s.key for s in (*report.sections, *report.closing)] == [
      "results", "benchmarks", "front", "difficulty", "patterns", "training", "budgets", "rewards", "waste", "alarms",
      "settings", "made"]
  assert report.missing == () and report.samples is not None
  outline = Outline(page.to_html(report))
  anchors = {a["id"] for _, a in outline.tags if "id" in a}
  targets = [a["href"][1:] for a in outline.all("a")]
  assert len(targets) == 13 and set(targets) <= anchors
  assert sum(tag == "h1" for tag, _ in outline.tags) == 1 and sum(tag == "h2" for tag, _ in outline.tags) == 14
  assert outline.all("html") == [{"lang": "en"}]


def test_nothing_is_asked_from_elsewhere(report):
  text = page.to_html(report)
  outline = Outline(text)
  for tag, attributes in outline.tags:
    for name, value in attributes.items():
      assert not name.startswith("on") and name not in ("style", "srcset", "action"), (tag, name)
      if name in ("src", "href"):
        assert value.startswith(("#", "data:")), (tag, value)
  for kind, body in outline.inline:
    assert "url(" not in body and "@import" not in body and (kind == "data" or "http" not in body)
  images = outline.all("img")
  assert len(images) == len(report.pictures)
  for picture, attributes in zip(report.pictures, images):
    assert base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,")) == picture.data
    assert len(attributes["alt"]) > 20 and attributes["width"] == str(picture.width)


def test_the_policy_allows_the_inline_parts_and_nothing_else(report):
  outline = Outline(page.to_html(report))
  policy = next(m["content"] for m in outline.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
  directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
  assert directives["default-src"] == "'none'" and directives["img-src"] == "data:"
  for kind in ("script", "style"):
    bodies = [body for name, body in outline.inline if name == kind]
    assert len(bodies) == 1
    assert directives[f"{kind}-src"] == "'sha256-" + base64.b64encode(
        hashlib.sha256(bodies[0].encode()).digest()).decode() + "'"
  assert "innerHTML" not in page.to_html(report) and "document.write" not in page.to_html(report)


def test_hostile_texts_stay_texts(tmp_path):
  names = {"bad": hostile.TEXTS[1]}
  for name, seed in (("a", 0), ("b", 1)):
    runs_fixture.make_evaluation(tmp_path / name, benchmarks=names, texts=hostile.TEXTS, seed=seed, k=1,
                                 problem_texts=hostile.TEXTS[:6])
  found = runs.read_all([f"</title></script><script>alert(1)</script>={tmp_path / 'a'}", str(tmp_path / "b")])
  report = page.make(found, hostile.TEXTS[0] + hostile.TEXTS[4])
  text = page.to_html(report)
  text.encode("utf-8")  # No lone surrogate is left.
  plain = Outline(page.to_html(page.make(found[1:], "t")))
  outline = Outline(text)
  assert {tag for tag, _ in outline.tags} == {tag for tag, _ in plain.tags}
  assert len(outline.all("script")) == 2 and len(outline.inline) == 3 and "\x00" not in text and "\u202e" not in text
  data = json.loads(next(body for kind, body in outline.inline if kind == "data"))
  assert not set("<>&\u2028\u2029") & set(report.samples.to_json()) and report.samples.to_json().isascii()
  shown = {r["text"] for e in data["entries"] for r in e["responses"] if r}
  assert hostile.TEXTS[0] in shown and hostile.TEXTS[3] in shown and hostile.TEXTS[7] in shown
  assert any("\\u202egnp" in t and "\\x00nul" in t and "\\ud800" in t and "\\u2028line" in t for t in shown)
  assert max(map(len, shown)) < 21_000 and any("[... 180,000 characters are not on this page ...]" in t for t in shown)


def test_hostile_names_stay_texts_in_markdown_and_latex(tmp_path):
  bad = hostile.TEXTS[hostile.FIRST_NEW:]
  for name, seed in (("a", 0), ("b", 1)):
    runs_fixture.make_evaluation(
        tmp_path / name, benchmarks={"x": bad[9]}, seed=seed, n_problems=4, k=1, modes=("natural",),
        settings={"model.path": bad[10], "x": bad[8]})
  found = [runs.read(tmp_path / "a", f"{bad[0]} {bad[8]}"), runs.read(tmp_path / "b", f"{bad[9]} {bad[10]}")]
  report = page.make(found, "; ".join(bad))
  text = page.to_markdown(report)
  assert not [c for c in text if c != "\n" and not c.isprintable()]
  assert "<" not in text and not re.search(r"(?<!\\)(?:\\\\)*`", text)
  links = re.findall(r"(?<!\\)(?:\\\\)*\[[^\]]*\]\(([^)]*)\)", text)
  assert links and all(re.fullmatch(r"plots/\w+\.png", link) for link in links)
  rows = [line for line in text.splitlines() if line.startswith("|")]
  assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|",
      row)) for row in rows if "a \\| b" in row or "---" in row} <= set(range(2, 30))
  assert not [line for line in text.splitlines() if line.startswith(("# head", "```", "|---|"))]
  latex = page.to_latex(report)
  commands = set(re.findall(r"\\([a-zA-Z]+)", latex))
  assert commands <= {
      "begin", "end", "centering", "caption", "toprule", "midrule", "bottomrule", "textbackslash", "textasciitilde",
      "textasciicircum",
      "textless", "textgreater", "textbar", "textasciigrave", "pm", "usepackage", "resizebox"}, commands


def test_the_headline_compares_what_both_answered(both, report):
  assert report.headline.startswith("Tokens per response fell by ") and "accuracy went from" in report.headline
  change = comparison.compare(both[1].main[0], both[2].main[0])
  assert change.mode == "natural" and change.n_problems == 80 and set(change.titles) == {"MATH500", "GSM8K"}
  averages = [r.main[0].results["average"]["natural"] for r in both[1:]]
  assert change.tokens == pytest.approx([a["tokens"]["value"] for a in averages])
  assert change.accuracy == pytest.approx([a["accuracy"]["value"] for a in averages])
  assert change.tokens_change["low"] < change.tokens_change["value"] < change.tokens_change["high"] < 0
  assert comparison.compare(both[0].main[0], both[1].main[0]) is None
  assert [(a.name, b.name) for a, b in comparison.pairs(both)] == [("run: before", "run: after"), ("base", "trained")]


def test_evaluations_that_share_a_benchmark_share_a_table(tmp_path):
  sets = {"a": {"x": "X"}, "b": {"y": "Y"}, "c": {"x": "X", "y": "Y"}, "d": {"z": "Z"}}
  for i, (name, benchmarks) in enumerate(sets.items()):
    modes = ("natural", str(100 + i))
    runs_fixture.make_evaluation(tmp_path / name, benchmarks=benchmarks, n_problems=4, modes=modes, k=1)
  found = runs.read_all([str(tmp_path / name) for name in "abcd"])
  section = next(s for s in page.make(found, "t").sections if s.key == "results")
  assert [b.text for b in section.blocks if b.kind == "heading"] == ["X, Y", "Z"]
  tables = [[row[:2] for row in b.table.rows] for b in section.blocks if b.kind == "sheet"]
  assert tables[0] == [("a", "natural"), ("b", "natural"), ("c", "natural"), ("a", "100"), ("b", "101"), ("c", "102")]
  assert tables[1] == [("a", "100"), ("b", "101"), ("c", "102")]  # Of fixed budgets.
  assert tables[2] == [("d", "natural"), ("d", "103")]


def of(low, high, tokens=-0.5, accuracy=0.0):
  interval = lambda value: {"value": value, "low": low, "high": high}
  return comparison.sentence(comparison.Change(
      None, None, "natural", ("x",), 5, (200.0, 100.0), (0.5, 0.5 + accuracy), interval(tokens), interval(accuracy)))


def test_sentences():
  assert of(-0.6, -0.4, accuracy=-0.5) == (
      "Tokens per response fell by 50.0 % [40.0, 60.0], from 200.0 to 100.0; accuracy went from 50.0 % to 0.0 % "
      "(-50.0 points [-60.0, -40.0]).")
  assert of(0.4, 0.6, tokens=0.5, accuracy=0.5).startswith("Tokens per response rose by 50.0 % [40.0, 60.0], from")
  assert of(-0.6, 0.1) == (
      "Tokens per response went from 200.0 to 100.0 (-50.0 % [-60.0, +10.0]: no clear change); accuracy went from "
      "50.0 % to 50.0 % (+0.0 points [-60.0, +10.0]: no clear change).")
  assert of(None, None).startswith("Tokens per response went from 200.0 to 100.0 (-50.0 %); accuracy went from")


def test_a_problem_that_reads_otherwise_is_not_compared(tmp_path):
  for name in ("a", "b"):
    runs_fixture.make_evaluation(tmp_path / name, benchmarks={"x": "X"}, n_problems=4, k=1, modes=("natural",))
  file = tmp_path / "b" / "problems" / "x.jsonl"
  file.write_text(file.read_text().replace("What is 0 + 0?", "What is zero?"))
  found = runs.read_all([str(tmp_path / "a"), str(tmp_path / "b")])
  assert comparison.compare(found[0].main[0], found[1].main[0]).n_problems == 3
  samples = sample_view.collect(found)
  assert [e["id"] for e in samples.entries] == ["x/1", "x/2", "x/3"]


def test_a_metrics_log_alone(tmp_path):
  root = runs_fixture.make_training_run(tmp_path / "r", evaluate=False)
  (root / "samples.jsonl").unlink()
  report = page.make([runs.read(root, "r", alone=True)], "t")
  assert [s.key for s in report.sections] == ["training", "budgets", "rewards", "waste", "alarms"]
  assert dict(report.missing)["Results"] == "no run has an evaluation" and "Sample responses" in dict(report.missing)
  assert report.headline.startswith("There is nothing to compare")
  budgets = next(s for s in report.sections if s.key == "budgets").blocks[0]
  assert budgets.caption.startswith("Approximate.")
  outline = Outline(page.to_html(report))
  assert not outline.all("script") and "missing" in {a.get("id") for a in outline.all("section")}
  for title, why in report.missing:
    assert f"* {title}: {why}" in page.to_markdown(report)


def test_samples_of_training_stand_in_for_an_evaluation(tmp_path):
  root = runs_fixture.make_training_run(tmp_path / "r", evaluate=False)
  samples = sample_view.collect([runs.read(root, "r")])
  assert samples.columns == ("training",) and len(samples.entries) == 24
  assert samples.entries[1]["mode"] == "budget 1024" and samples.entries[1]["change"] == ["right"]


def test_alarms_are_found_again_from_the_log(report):
  sheet = next(s for s in report.sections if s.key == "alarms").blocks[0]
  assert ("run", "timeouts") in {row[:2] for row in sheet.table.rows}
  row = next(row for row in sheet.table.rows if row[1] == "timeouts")
  assert 20 <= int(row[2]) < 35 <= int(row[3]) and "timed out" in row[4]


def test_evaluations_stand_beside_the_curves_at_their_step(both):
  found = training_sections.evaluations_by_step(both[0])
  assert list(found) == [0, 21, 30, 41, 60]
  average = both[0].main[1].results["average"]["natural"]
  assert found[60] == (average["accuracy"]["value"], average["tokens"]["value"])


def test_samples_are_chosen_by_their_place_changed_verdicts_first(both):
  all_of_them = sample_view.collect(both[1:], 1000)
  assert len(all_of_them.entries) == 2 * 40 * 3 and all_of_them.columns == ("base", "trained")
  changed = [e["id"] + e["mode"] for e in all_of_them.entries if e["change"] != ["same"]]
  some = sample_view.collect(both[1:], len(changed) + 10)
  kept = [e["id"] + e["mode"] for e in some.entries]
  assert len(kept) == len(changed) + 10 and set(changed) <= set(kept)
  order = [e["id"] + e["mode"] for e in all_of_them.entries]
  assert kept == sorted(kept, key=order.index)
  assert some.note == (
      f"{len(kept)} of 240 pairs of problem and mode are here: {len(changed)} of the {len(changed)} with a changed "
      f"verdict, and 10 of the {240 - len(changed)} others, evenly spaced.")
  few = sample_view.collect(both[1:], 3)
  assert len(few.entries) == 3 and all(e["change"] != ["same"] for e in few.entries)
  assert all_of_them.note == "All 240 pairs of problem and mode are here."
  with pytest.raises(ValueError, match="--samples=0"):
    sample_view.collect(both, 0)


def test_changes_of_a_verdict(both):
  for entry in sample_view.collect(both[1:]).entries:
    before, after = (r["right"] for r in entry["responses"])
    assert entry["change"] == ["same" if before == after else "fixed" if after else "broken"]
    assert [r["verdict"] == "correct" for r in entry["responses"]] == [before, after]
  alone = sample_view.collect(both[1:2]).entries
  assert {tuple(e["change"]) for e in alone} == {("right",), ("wrong",)}


def test_visible_text():
  assert sample_view.visible("a\tb\nc ü 漢 😀") == "a\tb\nc ü 漢 😀"
  assert sample_view.visible("a\x00\nb\u202ec\ud800") == "a\\x00\nb\\u202ec\\ud800"


def test_markdown(report):
  text = page.to_markdown(report)
  assert text.startswith("# A title\n\n**Tokens per response fell by")
  assert [line for line in text.splitlines() if line.startswith("## ")] == [
      f"## {s.title}" for s in (*report.sections, *report.closing)]
  for picture in report.pictures:
    assert f"](plots/{picture.name}.png)" in text
  assert "| base | natural |" in text


def test_markdown_keeps_a_cell_in_its_row(both):
  sheet = Sheet(dataclasses.replace(
      page.make(both[1:2], "t").sections[0].blocks[0].table, rows=(("a|b\nc", "d"),), columns=("x", "y"), title="t"))
  assert "| a\\|b c | d |" in page._markdown(sheet)


def test_latex(report):
  text = page.to_latex(report)
  tables = sum(isinstance(b, Sheet) for s in report.sections for b in s.blocks)
  assert text.count("\\begin{tabular}") == text.count("\\end{table}") == tables > 5
  assert "\\usepackage{booktabs}" in text.splitlines()[0] and not re.search(r"(?<!\\)[#&%] ?of", text)


def test_runs_whose_names_make_one_file_name_get_two(report):
  drawn = [blocks.picture(f"training_{name}", plots.grid(1, 1, (2, 2))[0], "alt", "") for name in ("x/y", "x:y", "x_y")]
  twice = dataclasses.replace(report, sections=(blocks.Section("a", "A", drawn),), closing=())
  assert [p.name for p in page._with_distinct_pictures(twice).pictures] == [
      "training_x_y", "training_x_y_2", "training_x_y_3"]
  assert all(re.fullmatch(r"[A-Za-z0-9_-]+", p.name) for p in report.pictures)


def test_a_run_of_a_method_without_a_reward_curve_says_so(tmp_path):
  runs_fixture.make_training_run(
      tmp_path / "run", changes={"reward.form": "hmpo", "advantage.intra_coef": 0.0})
  found = page.make(runs.read_all([str(tmp_path / "run")]), "A title")
  [section] = [s for s in found.sections if s.key == "rewards"]
  assert "there is no reward curve to draw" in str(section.blocks)


def test_a_run_from_before_the_younger_settings_still_has_its_reward_curves(tmp_path):
  runs_fixture.make_training_run(tmp_path / "run")
  info = json.loads((tmp_path / "run" / "run.json").read_text())
  for name in ("reward.floor", "reward.bonus", "reward.curve", "reward.limits", "advantage.form",
               "advantage.intra_gate", "prompt.openings"):
    section, field = name.split(".")
    del info["config"][section][field]
  (tmp_path / "run" / "run.json").write_text(json.dumps(info))
  found = page.make(runs.read_all([str(tmp_path / "run")]), "A title")
  assert "rewards" in [s.key for s in found.sections]
