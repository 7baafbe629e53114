"""Reads the notebooks and runs them without a browser."""

import os
import pathlib
import signal

import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "colab").glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
  """A notebook of colab/."""
  return nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)


def with_parameters(notebook: nbformat.NotebookNode, **values) -> nbformat.NotebookNode:
  """The notebook with other parameters; each must be one that its cell tagged `parameters` sets."""
  cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
  known = {line.partition(" = ")[0] for line in cell.source.splitlines()}
  assert set(values) <= known, set(values) - known
  cell.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
  return notebook


def environment(folder: pathlib.Path, **more: str) -> dict[str, str]:
  """Of a kernel on one CPU device, whose jobs are known in `folder` only."""
  return os.environ | {
      "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "PYTHONPATH": str(ROOT),
      "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)} | more


class Kernel:
  """Runs a notebook's cells one by one; a context manager."""

  def __init__(self, notebook: nbformat.NotebookNode, folder: pathlib.Path, env: dict[str, str]):
    import nbclient
    self.notebook = notebook
    self._client = nbclient.NotebookClient(
        notebook, timeout=2400, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    self._setup = self._client.setup_kernel(env=env)

  def __enter__(self) -> "Kernel":
    self._setup.__enter__()
    return self

  def __exit__(self, *exc) -> None:
    self._setup.__exit__(*exc)

  def run(self, *ids: str) -> None:
    """Runs the code cells of these ids, or all of them in order."""
    for i, cell in enumerate(self.notebook.cells):
      if cell.cell_type == "code" and (not ids or cell.id in ids):
        self._client.execute_cell(cell, i)

  def interrupt(self) -> None:
    """What the stop button does: SIGINT to the kernel and to all in its process group."""
    group = os.getpgid(self._client.km.provisioner.pid)
    assert group != os.getpgid(0)
    os.killpg(group, signal.SIGINT)

  def shown(self, cell_id: str) -> str:
    """All that a cell has shown, as text and HTML."""
    cell = next(c for c in self.notebook.cells if c.id == cell_id)
    return "".join(
        out["text"] if out.output_type == "stream" else out.get("data", {}).get("text/html", "")
        for out in cell.outputs)
