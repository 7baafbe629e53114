"""The published study: its pages say what its stored cells say."""

import json

from hbpo_jax.studies import cell, outcome, plan, writeup


def test_the_page_and_its_numbers_are_those_of_the_cells(repo_root):
  found = outcome.read(repo_root / "docs/miniature")
  assert (repo_root / "docs/miniature.md").read_text() == writeup.to_markdown(found, "miniature")
  assert json.loads((repo_root / "docs/miniature.json").read_text()) == json.loads(
      json.dumps(writeup.to_json(found.cells)))


def test_the_table_of_the_readme_is_the_study_s(repo_root):
  page = (repo_root / "docs/miniature.md").read_text().splitlines()
  readme = (repo_root / "README.md").read_text()
  rows = [line for line in readme.splitlines() if line.startswith(("| warm_start |", "| classic |", "| cosine |",
                                                                   "| paper |", "| released |", "| hbpo |"))]
  assert len(rows) == 6 and all(row in page for row in rows)


def test_every_cell_is_there_and_made_as_the_study_says(repo_root):
  study, root = plan.load("miniature/study"), repo_root / "docs/miniature"
  for one in plan.cells(study):
    assert cell.path_of(root, one.name).is_file(), one.name
    cell.check(study, one, root)
