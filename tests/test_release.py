"""What is released: the wheel and the source archive, the lock, the image, and the workflows that make them."""

import json
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile

from packaging import requirements
import pytest
import yaml

import hbpo_jax
from hbpo_jax import flags

UV_VERSION = "0.13.9"
# All that an image and a wheel need.
SOURCES = {"pyproject.toml", "uv.lock", "README.md", "LICENSE", "hbpo_jax", "configs"}


@pytest.fixture(scope="module")
def project(repo_root):
  return tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]


def targets(repo_root) -> set[str]:
  """Those of the Makefile."""
  return set(re.findall(r"^([a-z-]+):", (repo_root / "Makefile").read_text(), flags=re.MULTILINE))


def test_the_version_stands_in_one_place(repo_root, project):
  assert "version" in project["dynamic"] and "version" not in project
  assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+|\.dev\d+)?", hbpo_jax.__version__)
  text = (repo_root / "hbpo_jax" / "__init__.py").read_text()
  assert text.count(f'__version__ = "{hbpo_jax.__version__}"\n') == 1


# The lock.

def test_the_lock_goes_with_the_project(repo_root, project):
  """What `uv lock --check` finds, but without a network: `make lock` renews it."""
  lock = tomllib.loads((repo_root / "uv.lock").read_text())
  own = next(p for p in lock["package"] if p["name"] == "hbpo-jax")
  assert own["source"] == {"editable": "."} and lock["requires-python"] == project["requires-python"]

  def normal(name, extras, specifier, extra):
    plain = lambda text: text.lower().replace("_", "-")
    return plain(name), tuple(sorted(map(plain, extras))), str(specifier), extra

  declared = {
      normal(r.name, r.extras, r.specifier, extra)
      for extra, texts in {"": project["dependencies"], **project["optional-dependencies"]}.items()
      for r in map(requirements.Requirement, texts)}
  locked = {
      normal(row["name"], row.get("extras", ()), requirements.SpecifierSet(row.get("specifier", "")),
             "".join(re.findall(r"extra == '(.*?)'", row.get("marker", ""))))
      for row in own["metadata"]["requires-dist"]}
  assert locked == declared


def test_the_lock_names_the_package_index_only_and_every_hash(repo_root):
  text = (repo_root / "uv.lock").read_text()
  assert set(re.findall(r"https?://([^/\"]+)", text)) == {"pypi.org", "files.pythonhosted.org"}
  for package in tomllib.loads(text)["package"]:
    if package["name"] == "hbpo-jax":
      continue
    assert package["source"] == {"registry": "https://pypi.org/simple"}, package["name"]
    files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
    assert files and all(re.fullmatch(r"sha256:[0-9a-f]{64}", f["hash"]) for f in files), package["name"]


def test_everything_that_uses_uv_uses_the_same(repo_root):
  for file, found in {
      "tpu/worker.sh": r"^UV_VERSION=(\S+)", "Dockerfile": r"ghcr\.io/astral-sh/uv:(\S+)",
      ".github/workflows/ci.yml": r"\buv==(\S+)"}.items():
    assert re.findall(found, (repo_root / file).read_text(), flags=re.MULTILINE) == [UV_VERSION], file


@pytest.mark.parametrize("file", ["tpu/worker.sh", "Dockerfile"])
def test_what_is_installed_from_the_lock_is_in_it(repo_root, project, file):
  lines = [line for line in (repo_root / file).read_text().splitlines() if "uv sync" in line]
  assert lines and all("--locked" in line for line in lines)
  extras = {e for line in lines for e in re.findall(r"--extra=([a-z-]+)", line)}
  if file == "Dockerfile":
    extras |= {"tpu", "cuda"}  # of EXTRA
  assert {"tpu", "wandb", "gin"} <= extras <= set(project["optional-dependencies"])


# The image.

def dockerfile(repo_root) -> list[tuple[str, str]]:
  """(instruction, rest) of each line, continued lines joined."""
  text = re.sub(r"\\\n\s*", "", (repo_root / "Dockerfile").read_text())
  return [tuple(line.split(" ", 1)) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_copies_what_it_is_built_from(repo_root):
  copied = {source for word, rest in dockerfile(repo_root) if word == "COPY" and not rest.startswith("--from=")
            for source in rest.split()[:-1]}
  assert copied == SOURCES and all((repo_root / source).exists() for source in copied)
  ignore = [line for line in (repo_root / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
  assert ignore[0] == "*" and {line[1:] for line in ignore if line[0] == "!"} == SOURCES


def test_the_image_runs_hbpo_as_a_user(repo_root):
  lines = dockerfile(repo_root)
  last = lines[max(i for i, (word, _) in enumerate(lines) if word == "FROM"):]
  assert ("USER", "hbpo") in last and ("ENTRYPOINT", '["hbpo"]') in last
  stages = {rest.split()[-1] for word, rest in lines if word == "FROM" and " AS " in rest}
  assert {m for _, rest in lines for m in re.findall(r"--from=(\S+)", rest)} == stages


@pytest.mark.parametrize("extra, code", [("tpu", 0), ("cuda", 0), ("cpu", 0), ("gpu", 2)])
def test_the_extra_of_the_image(repo_root, tmp_path, extra, code):
  """The line itself, with a uv that says what it was asked."""
  (tmp_path / "uv").write_text('#!/bin/sh\necho "$*"\n')
  (tmp_path / "uv").chmod(0o755)
  line, = (rest for word, rest in dockerfile(repo_root) if word == "RUN" and "uv sync" in rest)
  done = subprocess.run(["sh", "-c", line], env={"PATH": f"{tmp_path}:/usr/bin:/bin", "EXTRA": extra},
                        capture_output=True, text=True, timeout=60)
  assert done.returncode == code, done.stderr
  asked = re.findall(r"--extra=(\S+)", done.stdout)
  assert asked == {"cpu": ["gin", "wandb"], "gpu": []}.get(extra, ["gin", "wandb", extra])


# The workflows.

def steps(repo_root, workflow) -> dict[str, list[str]]:
  """The commands of each job of a workflow."""
  content = yaml.safe_load((repo_root / ".github" / "workflows" / f"{workflow}.yml").read_text())
  return {name: [s["run"] for s in job["steps"] if "run" in s] for name, job in content["jobs"].items()}


def test_continuous_integration_runs_what_ci_runs(repo_root):
  jobs = steps(repo_root, "ci")
  assert jobs["test"] == [".ci/run"] and os.access(repo_root / ".ci" / "run", os.X_OK)
  assert jobs["test-all"] == ["make test-all"] and "make wheel" in jobs["wheel"] and jobs["docs"] == ["make docs"]
  content = yaml.safe_load((repo_root / ".github" / "workflows" / "ci.yml").read_text())
  assert content["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
  assert "schedule" in content[True]  # YAML reads the key `on` as true.


@pytest.mark.parametrize("workflow", ["ci", "release", "docs"])
def test_workflows_use_targets_that_exist(repo_root, workflow):
  for commands in steps(repo_root, workflow).values():
    for command in commands:
      assert set(re.findall(r"\bmake ([a-z-]+)", command)) <= targets(repo_root)


def test_make_has_what_it_lists(repo_root):
  text = (repo_root / "Makefile").read_text()
  phony = set(re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)[1].split())
  assert phony == targets(repo_root) and {"docs", "wheel", "lock", "test-all", "quickstart", "miniature"} <= phony


def test_only_a_tag_of_the_version_is_released(repo_root, tmp_path):
  command = next(c for c in steps(repo_root, "release")["build"] if "GITHUB_REF_NAME" in c)
  for tag, code in ((f"v{hbpo_jax.__version__}", 0), ("v9.9.9", 1), (hbpo_jax.__version__, 1)):
    done = subprocess.run(["bash", "-e", "-c", command], cwd=repo_root, env={"PATH": os.environ["PATH"],
                          "GITHUB_REF_NAME": tag}, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, (tag, done.stderr)


def test_publishing_needs_no_token(repo_root):
  jobs = yaml.safe_load((repo_root / ".github" / "workflows" / "release.yml").read_text())["jobs"]
  assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["needs"] == "build"
  assert "password" not in str(jobs) and "secrets" not in str(jobs)


# The archives.

@pytest.fixture(scope="module")
def built(repo_root, tmp_path_factory):
  """(wheel, source archive) of this tree, built by hatchling in an environment of its own."""
  folder = tmp_path_factory.mktemp("built")
  subprocess.run([sys.executable, "-m", "venv", folder / "tools"], check=True, timeout=300)
  python = folder / "tools" / "bin" / "python"
  subprocess.run([python, "-m", "pip", "install", "--quiet", "hatchling>=1.27"], check=True, timeout=600)
  subprocess.run([python, "-m", "hatchling", "build", "-d", folder / "dist"], cwd=repo_root, check=True, timeout=600)
  wheel, = (folder / "dist").glob("*.whl")
  archive, = (folder / "dist").glob("*.tar.gz")
  # The archive alone gives the same wheel.
  with tarfile.open(archive) as tar:
    tar.extractall(folder / "source", filter="data")
  source, = (folder / "source").iterdir()
  subprocess.run(
      [python, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "again"], cwd=source, check=True, timeout=600)
  again, = (folder / "again").glob("*.whl")
  assert contents(again) == contents(wheel)
  return wheel, archive


def contents(wheel: pathlib.Path) -> dict[str, bytes]:
  with zipfile.ZipFile(wheel) as archive:
    return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built, repo_root):
  wheel, _ = built
  files = set(contents(wheel))
  info = f"hbpo_jax-{hbpo_jax.__version__}.dist-info/"
  tracked = subprocess.run(["git", "ls-files", "hbpo_jax", "configs"], cwd=repo_root, capture_output=True, text=True,
                           check=True, timeout=60).stdout.split()
  package = {f"hbpo_jax/{f}" if f.startswith("configs/") else f for f in tracked}
  assert files - package == {info + name for name in (
      "METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
  assert package <= files
  assert {"hbpo_jax/py.typed", "hbpo_jax/configs/quickstart.py", "hbpo_jax/reporting/report.html.jinja"} <= files
  assert {pathlib.PurePath(f).suffix for f in files if f.startswith("hbpo_jax/")} == {".py", ".typed", ".jinja"}


@pytest.mark.slow
def test_the_source_archive_is_complete(built, repo_root):
  _, archive = built
  with tarfile.open(archive) as tar:
    files = {m.name.partition("/")[2] for m in tar.getmembers()}
  tracked = subprocess.run(["git", "ls-files"], cwd=repo_root, capture_output=True, text=True, check=True,
                           timeout=60).stdout.splitlines()
  assert set(tracked) <= files
  assert not any(part in f for f in files for part in ("__pycache__", ".venv", "runs/"))


@pytest.mark.slow
def test_the_wheel_trains_from_an_empty_directory(built, repo_root, tmp_path):
  """In an environment whose other packages are those of these tests; the package itself comes from the wheel."""
  wheel, _ = built
  subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=300)
  python, hbpo = tmp_path / "venv" / "bin" / "python", tmp_path / "venv" / "bin" / "hbpo"
  subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, timeout=300)
  # Only a folder on the path: an editable install there, which is a .pth file of its own, is not read.
  site, = (tmp_path / "venv" / "lib").glob("python*/site-packages")
  (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
  empty = tmp_path / "empty"
  empty.mkdir()
  environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")} | {"JAX_PLATFORMS": "cpu"}

  def call(*argv):
    done = subprocess.run(argv, cwd=empty, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout

  where = call(python, "-c", "import hbpo_jax; print(hbpo_jax.__file__)").strip()
  assert pathlib.Path(where).is_relative_to(site)
  names = call(python, "-c", "from hbpo_jax import flags; print(','.join(flags.config_names()))").strip()
  assert names.split(",") == flags.config_names()
  assert call(hbpo, "--version") == f"hbpo_jax {hbpo_jax.__version__}\n"
  assert "_hbpo" in call(hbpo, "completion", "bash")
  assert "see runs/smoke/summary.md" in call(hbpo, "train", "--config=smoke", "--workdir=runs/smoke")
  assert json.loads((empty / "runs" / "smoke" / "summary.json").read_text())["steps"] == 3
  call(hbpo, "report", "runs/smoke", "--out=runs/smoke/report")
  assert (empty / "runs" / "smoke" / "report" / "index.html").is_file()
