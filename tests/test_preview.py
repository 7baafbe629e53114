"""The preview command: what it prints and writes, where lengths come from, and its figures."""

import json

import jax
import numpy as np
import pytest

from hbpo_jax import config, flags, preview
from hbpo_jax.data.record import Problem
from hbpo_jax.evaluation import store
from hbpo_jax.reporting import curves
from tests.reporting.test_curves import CAPPED, PAPER, RELEASED, changed


def run(tmp_path, *arguments):
  flags.run(preview.main, name="preview", description="", argv=[f"--workdir={tmp_path}", *arguments])


def test_the_command_prints_and_writes(tmp_path, capsys):
  run(tmp_path, "--config=deepscaler_1p5b", "--config.model.path=/nowhere")
  out = capsys.readouterr().out
  for words in ("From 866 tokens on, budget 1,024", "warning: below_wrong: From 3,602", "warning: only_down",
                "-3.92  -3.70  -2.83  -2.22", "preview.md"):
    assert words in out, words
  folder = tmp_path / "preview"
  assert sorted(p.name for p in folder.iterdir()) == [
      "advantages.png", "preview.json", "preview.md", "reward_curves.png"]
  written = json.loads((folder / "preview.json").read_text())
  assert [b["below_wrong_from"] for b in written["shape"]["budgets"]] == [3602, 3673, 3815, 3885]
  assert [w["kind"] for w in written["warnings"]] == ["below_wrong", "only_down", "flat"]
  page = (folder / "preview.md").read_text()
  for warning in written["warnings"]:
    assert warning["text"] in page
  assert "](reward_curves.png)" in page and "](advantages.png)" in page and "| 512 | 4,096 |" in page
  for name in ("reward_curves.png", "advantages.png"):
    data = (folder / name).read_bytes()
    width, height = (int.from_bytes(data[at:at + 4], "big") for at in (16, 20))
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and 600 <= width <= 3000 and 300 <= height <= 2000


def test_the_same_settings_give_the_same_files(tmp_path):
  preview.write(CAPPED, tmp_path / "a")
  findings = preview.write(CAPPED, tmp_path / "b")
  assert findings == curves.check(CAPPED)
  for path in (tmp_path / "a").iterdir():
    assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_bad_settings_are_refused_and_devices_are_not_counted(tmp_path, capsys):
  with pytest.raises(SystemExit):
    run(tmp_path, "--config=deepscaler_1p5b", "--config.rollout.budgets=512,256")
  assert "rollout.budgets" in capsys.readouterr().err and not (tmp_path / "preview").exists()
  # A mesh of a pod, on whatever there is here.
  pod = ("--config.mesh.data=8", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
  assert jax.device_count() != 32
  run(tmp_path, "--config=deepscaler_1p5b", *pod)
  run(tmp_path, "--config=deepscaler_1p5b", "--config.mesh.data=16")
  assert (tmp_path / "preview" / "preview.md").exists()


def lines_of(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_lengths_of_a_run(tmp_path, capsys):
  caps = ("--config=deepscaler_1p5b", "--config.rollout.caps=1024,2048,3072,4096")
  run(tmp_path, *caps)
  assert "not known" in capsys.readouterr().out
  rows = [{"step": s, "mean_tokens": 2000.0, "tokens_std": 500.0, "budget_512/tokens_mean": 1024.0,
           "budget_512/tokens_std": 400.0} for s in range(20)]
  rows[3] |= {"mean_tokens": None, "budget_512/tokens_std": None}
  late = [{"step": s, "mean_tokens": 10.0, "tokens_std": 1.0, "budget_512/tokens_mean": 10.0,
           "budget_512/tokens_std": 1.0} for s in range(20, 60)]
  lines_of(tmp_path / "metrics.jsonl", rows + late)
  lengths = preview.measured_lengths(tmp_path, (512, 1024))
  assert set(lengths.tokens) == {None, 512} and "first 20 rows" in lengths.source
  assert lengths.tokens[512].mean() == pytest.approx(1024, rel=0.01)  # The start of the run, not its end.
  assert lengths.tokens[None].std() == pytest.approx(500, rel=0.02)
  run(tmp_path, *caps)
  out = capsys.readouterr().out
  assert "not known" not in out and "log-normal), 43 % / 41 % / 3.1 % are longer" in out


def test_a_directory_without_lengths(tmp_path):
  assert preview.measured_lengths(tmp_path / "none", (512,)) is None
  lines_of(tmp_path / "metrics.jsonl", [{"step": 0, "loss": 1.0}])  # As a warm start logs it.
  assert preview.measured_lengths(tmp_path, (512,)) is None
  (tmp_path / "metrics.jsonl").write_text("nonsense\n")
  with pytest.raises(ValueError, match="metrics"):
    preview.measured_lengths(tmp_path, (512,))


def test_lengths_of_an_evaluation(tmp_path):
  problems = tuple(Problem(id=str(i), problem="p", answer="1", source="s") for i in range(4))
  row = lambda i, mode, n: {
      "id": str(i), "mode": mode, "sample": 0, "answer": "1", "level": None, "response": "", "n_gen": n, "n_think": n,
      "truncated": False, "score": 1.0, "reason": "correct", "given": "1"}
  with store.Store(
      tmp_path, [store.Benchmark("b", "B", problems)], modes=["natural", "512", "efficiency"], n_samples=1,
      model={"path": "m", "fingerprint": "f"}, settings={}) as out:
    out.append("b", [row(i, "natural", 1000 * (4 - i)) for i in range(4)])
    out.append("b", [row(i, "512", 100 * (i + 1)) for i in range(4)])
    out.append("b", [row(i, "efficiency", 7) for i in range(4)])
  lengths = preview.measured_lengths(tmp_path, (512, 1024))
  assert {k: list(v) for k, v in lengths.tokens.items()} == {
      None: [1000, 2000, 3000, 4000], 512: [100, 200, 300, 400]}
  assert "8 responses" in lengths.source
  assert (lengths.share_beyond(512, 200), lengths.share_beyond(1024, 1000)) == (0.5, 0.75)


def test_the_reward_figure_marks_switches_crossings_and_caps():
  shape = curves.check(CAPPED).shape
  ax = preview.reward_figure(CAPPED, shape).axes[0]
  assert [int(line.get_xdata()[0]) for line in ax.lines if line.get_linestyle() == ":" and line.get_color() != "k"
          and line.get_xdata()[0] == line.get_xdata()[-1]] == [513, 1537, 2477]
  assert [t.get_text() for t in ax.texts if t.get_rotation()] == ["513", "1,537", "2,477"]
  crosses = [(int(x.get_xdata()[0]), float(x.get_ydata()[0])) for x in ax.lines if x.get_marker() == "x"]
  assert [n for n, _ in crosses] == [3602, 3673, 3815, 3885] and all(-0.01 < y < 0 for _, y in crosses)
  labels = [t.get_text() for t in ax.figure.legends[0].get_texts()]
  assert labels == ["512, cap 512, × from 3,602", "1,024, cap 1,536, × from 3,673", "2,048, cap 3,072, × from 3,815",
                    "2,560, × from 3,885"]
  solid = [line for line in ax.lines if line.get_label() in ("512", "1,024", "2,048", "2,560")]
  assert [int(np.sum(~np.isnan(line.get_ydata()))) for line in solid] == [512, 1536, 3072, 4096]
  dotted = [line for line in ax.lines if line.get_linestyle() == ":" and len(line.get_xdata()) > 2]
  assert [(line.get_xdata()[0], line.get_xdata()[-1]) for line in dotted] == [(512, 4096), (1536, 4096), (3072, 4096)]
  released = preview.reward_figure(RELEASED, curves.check(RELEASED).shape).axes[0]
  assert "unfinished answer" in [t.get_text() for t in released.texts]
  assert "unfinished answer" not in [t.get_text() for t in ax.texts]


@pytest.mark.parametrize("budgets, caps", [
    ((1536,), ()), ((512, 1024, 2048, 2560), (512, 1536, 3072, 4095)), (tuple(range(200, 3400, 200)), ()),
    ((256, 512, 1024, 1280, 1792, 2048, 2560, 2816), tuple(range(2816, 3616, 100)))])
def test_nothing_is_clipped(budgets, caps):
  cfg = changed(PAPER, rollout={"budgets": budgets, "caps": caps, "rollouts_per_query": 4 * len(budgets)})
  shape = curves.check(cfg).shape
  for fig in (preview.reward_figure(cfg, shape), preview.advantages_figure(cfg, shape)):
    fig.canvas.draw()
    page = fig.bbox
    texts = [t for ax in fig.axes for t in [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label]]
    for box in [legend.get_window_extent() for legend in fig.legends] + [
        t.get_window_extent() for t in texts if t.get_text()]:
      assert page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1 and page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1


def test_the_advantages_figure_draws_the_groups():
  shape = curves.check(RELEASED).shape
  fig = preview.advantages_figure(RELEASED, shape)
  assert [ax.get_title() for ax in fig.axes] == [
      "All wrong", "All right, each as long as its budget", "Half right: the right ones", "Half right: the wrong ones"]
  for ax, group in zip(fig.axes, shape.groups):
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    np.testing.assert_allclose(heights, [[2 * v for v in group.intra], group.inter], rtol=1e-6)
    (total,) = [line for line in ax.lines if line.get_label() == "total"]
    np.testing.assert_allclose(total.get_ydata(), group.total)
    np.testing.assert_allclose(np.sum(heights, axis=0), group.total, rtol=1e-5, atol=1e-5)


def test_every_setting_in_a_remedy_exists():
  """`field.name=value` in a warning can be typed as it stands."""
  import re
  table = config.field_table()
  for cfg in (PAPER, CAPPED, RELEASED):
    for warning in curves.check(cfg).warnings:
      names = re.findall(r"\b((?:rollout|reward|advantage|loss|prompt)\.[a-z_]+)", warning.text)
      assert names and set(names) <= set(table)


def test_a_form_without_a_curve_says_why(tmp_path, capsys):
  run(tmp_path, "--config=deepscaler_1p5b", "--config.reward.form=hmpo", "--config.advantage.intra_coef=0")
  why = "there is no reward curve to draw: with reward.form=hmpo"
  assert why in capsys.readouterr().out.replace("\n", " ")
  assert sorted(p.name for p in (tmp_path / "preview").iterdir()) == ["preview.json", "preview.md"]
  assert why in (tmp_path / "preview" / "preview.md").read_text()
  assert json.loads((tmp_path / "preview" / "preview.json").read_text())["shape"] is None
