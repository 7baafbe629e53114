"""Settings of every test: the CPU backend with eight simulated devices, and where the shared data lie."""

import os

# JAX reads both at import, so they come first. A caller who sets them means it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pathlib
import shutil
import sys
import tempfile

import pytest

from tests import hub_server

# Tests and the commands they start compile many equal programs; one cache for this run, shared by its workers.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
_OWN_CACHE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="hbpo_jax_tests_xla_")
if _OWN_CACHE:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _OWN_CACHE

REPO_ROOT = pathlib.Path(__file__).resolve().parents[1]


def pytest_unconfigure(config):
  if _OWN_CACHE:  # Set in the process that started the others.
    shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Compiled programs go with their module: those of all modules together take gigabytes."""
  yield
  if "jax" in sys.modules:
    sys.modules["jax"].clear_caches()


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """An empty hub at 127.0.0.1, which is the hub for this process and those that it starts, with an empty cache."""
  from huggingface_hub import constants

  for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy",
               "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
    monkeypatch.delenv(name, raising=False)
  cache = tmp_path / "hub_cache"
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  monkeypatch.setenv("HF_HUB_CACHE", str(cache))
  monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # Large files go by plain HTTP.
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
  with hub_server.serve() as server:
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    yield server


@pytest.fixture(scope="session")
def repo_root() -> pathlib.Path:
  """The checkout that holds these tests."""
  return REPO_ROOT


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
  """The folder of golden cases and data sets beside the checkout (or at $HBPO_SHARED); skips where there is none."""
  path = pathlib.Path(os.environ.get("HBPO_SHARED", REPO_ROOT.parent / "shared"))
  if not path.is_dir():
    pytest.skip(f"needs the golden cases and data sets in {path} (set HBPO_SHARED to move it)")
  return path
