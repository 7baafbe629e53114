"""A report in its three forms: one HTML file, Markdown, and LaTeX tables."""

import base64
from collections.abc import Sequence
import dataclasses
import hashlib
import importlib.resources

import jinja2

from hbpo_jax.reporting import comparison, paper_tables, sections, training_sections
from hbpo_jax.reporting.blocks import Block, Facts, Heading, Picture, Section, Sheet
from hbpo_jax.reporting.runs import Run
from hbpo_jax.reporting.sample_view import MOST, Samples, collect, visible
from hbpo_jax.reporting.text import markdown

_TEMPLATE = "report.html.jinja"
_SAMPLES = "Sample responses"


@dataclasses.dataclass(frozen=True)
class Report:
  """What all forms of a report show.

  headline: a sentence.  basis: what it rests on, or empty.  missing: (section, why it is not shown).
  """
  title: str
  headline: str
  basis: str
  names: tuple[str, ...]
  sections: tuple[Section, ...]
  closing: tuple[Section, ...]
  missing: tuple[tuple[str, str], ...]
  samples: Samples | None

  @property
  def pictures(self) -> list[Picture]:
    """All figures, in order."""
    return [b for section in (*self.sections, *self.closing) for b in section.blocks if isinstance(b, Picture)]


def make(runs: Sequence[Run], title: str, most_samples: int = MOST) -> Report:
  """The report on runs: their numbers, figures and chosen responses.

  Raises:
    ValueError: when most_samples is below 1, or two figures would have one name.
  """
  samples = collect(runs, most_samples)
  main = [*sections.of_evaluations(runs), *training_sections.of_training(runs)]
  closing = training_sections.of_settings(runs)
  missing = [part for part in (*main, *closing) if not isinstance(part, Section)]
  if samples is None:
    missing.insert(-1, (_SAMPLES, "no evaluation has responses, and no run logged any"))
  headline, basis = _headline(runs)
  return _with_distinct_pictures(Report(
      visible(title), headline, basis, tuple(run.name for run in runs),
      tuple(s for s in main if isinstance(s, Section)), tuple(s for s in closing if isinstance(s, Section)),
      tuple(missing), samples))


def to_html(report: Report) -> str:
  """One file that asks for nothing else: images as data, style and script by their hashes, all text escaped."""
  template = _environment().get_template(_TEMPLATE)
  inline = {name: "".join(template.blocks[name](template.new_context())) for name in ("style", "script")}
  policy = ("default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
            + "; ".join(f"{name}-src '{_sha256(text)}'" for name, text in inline.items()))
  toc = [(s.key, s.title) for s in report.sections]
  toc += [("samples", _SAMPLES)] if report.samples else []
  toc += [(s.key, s.title) for s in report.closing]
  toc += [("missing", "Not shown")] if report.missing else []
  return template.render(
      report=report, toc=toc, policy=policy,
      # Strict JSON without '<', '>' and '&', so that it may stand unescaped in its script element.
      samples_json=report.samples.to_json() if report.samples else "")


def to_markdown(report: Report) -> str:
  """The same without responses; figures are linked as plots/NAME.png."""
  lines = [f"# {_markdown_line(report.title)}\n", f"**{_markdown_line(report.headline)}**\n"]
  lines += [f"{_markdown_line(report.basis)}\n"] if report.basis else []
  for section in (*report.sections, *report.closing):
    lines.append(f"## {section.title}\n")
    lines += map(_markdown, section.blocks)
  if report.missing:
    lines.append("## Not shown\n")
    lines.append("\n".join(f"* {title}: {_markdown_line(why)}" for title, why in report.missing) + "\n")
  return "\n".join(lines)


def to_latex(report: Report) -> str:
  """Every table of the evaluations for LaTeX with the package booktabs, one after the other."""
  shown = [b for section in report.sections for b in section.blocks if isinstance(b, Sheet)]
  head = "% Needs \\usepackage{booktabs}; wide tables also need \\resizebox or a landscape page.\n"
  if not shown:
    return head + "% No run has an evaluation, so there is no table.\n"
  return "\n".join([head, *(paper_tables.to_latex(sheet.table, _caption(sheet)) for sheet in shown)])


def _headline(runs: Sequence[Run]) -> tuple[str, str]:
  pairs = comparison.pairs(runs)
  for before, after in pairs:
    if (change := comparison.compare(before, after)) is not None:
      return comparison.sentence(change), comparison.basis(change)
  if pairs:
    return "The evaluations have no problem and mode in common, so nothing can be compared.", ""
  return "There is nothing to compare: it takes an evaluation before and one after training, or two evaluations.", ""


def _with_distinct_pictures(report: Report) -> Report:
  """The same with file names that differ even where the runs' names are alike once made fit for a file."""
  taken: set[str] = set()

  def renamed(block: Block) -> Block:
    if not isinstance(block, Picture):
      return block
    name = next(n for n in (block.name, *(f"{block.name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    taken.add(name)
    return dataclasses.replace(block, name=name)

  of = lambda parts: tuple(dataclasses.replace(s, blocks=[renamed(b) for b in s.blocks]) for s in parts)
  return dataclasses.replace(report, sections=of(report.sections), closing=of(report.closing))


def _environment() -> jinja2.Environment:
  def load(name: str) -> str:
    return importlib.resources.files("hbpo_jax.reporting").joinpath(name).read_text(encoding="utf-8")

  environment = jinja2.Environment(
      loader=jinja2.FunctionLoader(load), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
      lstrip_blocks=True)
  environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
  environment.filters["visible"] = lambda text: visible(str(text))
  return environment


def _sha256(text: str) -> str:
  return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _markdown(block: Block) -> str:
  if isinstance(block, Picture):
    alt = _markdown_line(block.alt.replace("[", "(").replace("]", ")"))
    return f"![{alt}](plots/{block.name}.png)\n\n{_markdown_line(block.caption)}\n"
  if isinstance(block, Sheet):
    caption = f"\n{_markdown_line(block.caption)}\n" if block.caption else ""
    return f"**{_markdown_line(block.table.title)}**\n\n{_one_line_each(block)}{caption}"
  if isinstance(block, Facts):
    return "\n".join(f"* {_markdown_line(item)}" for item in block.items) + "\n"
  if isinstance(block, Heading):
    return f"### {_markdown_line(block.text)}\n"
  return f"{_markdown_line(block.text)}\n"


def _one_line_each(sheet: Sheet) -> str:
  """The table as Markdown; a line break in a cell would end its row."""
  table = dataclasses.replace(sheet.table, rows=tuple(tuple(map(_line, row)) for row in sheet.table.rows))
  return table.to_markdown()


def _line(text: str) -> str:
  return " ".join(visible(text).split())


def _markdown_line(text: str) -> str:
  return markdown(_line(text))


def _caption(sheet: Sheet) -> str:
  return f"{sheet.table.title}. {sheet.caption}".strip()
