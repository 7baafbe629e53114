# Everything starts from a Python of at least 3.11; each target makes .venv and installs what it needs.
#
#   PYTHON=python3.12    interpreter for .venv (default: the first of python3, python3.11 ... that is new enough)
#   TORCH=torch          requirement for PyTorch, which only the tests use, as a reference
#   TORCH_INDEX=URL      index to take it from; without one, Linux gets a build with CUDA, of several GB:
#                        make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   WORKERS=2            processes that run the tests (default: the machine's cores, at most 4)
#   UV=uv                uv (https://docs.astral.sh/uv), which only the lock needs

TORCH ?= torch==2.13.0
TORCH_INDEX ?=
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
RUNS ?= runs

new_enough = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	if command -v $$p >/dev/null 2>&1 && $$p -c '$(new_enough)' 2>/dev/null; then echo $$p; break; fi; done)

VENV := .venv
BIN := $(VENV)/bin
UV ?= uv
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart miniature test test-all lint docs wheel lock check-lock bench clean

help:  ## This list.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 \t\2/p' Makefile | expand -t 22

$(BIN)/python:
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(new_enough)' || { \
	  echo "error: hbpo_jax needs Python 3.11 or newer; install one and run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

$(VENV)/.runtime: pyproject.toml | $(BIN)/python
	@echo "installing hbpo_jax into $(VENV) ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.runtime
	@echo "installing the test and development tools into $(VENV) ..."
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) --editable '.[test,dev,gin]'
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.runtime
	@echo "installing the documentation's tools into $(VENV) ..."
	$(PIP) --editable '.[docs]'
	@touch $@

setup: $(VENV)/.test  ## Create .venv with the package, the test and the development tools.

quickstart: $(VENV)/.runtime  ## Warm start, HBPO, the before/after table and a report, on a CPU (RUNS/quickstart).
	JAX_PLATFORMS=cpu $(BIN)/hbpo train --config=quickstart --workdir=$(RUNS)/quickstart
	JAX_PLATFORMS=cpu $(BIN)/hbpo report $(RUNS)/quickstart --out=$(RUNS)/quickstart/report

miniature: $(VENV)/.runtime  ## The study of the claims (ARGS=--quick: half an hour) and its write-up (RUNS/miniature/report).
	JAX_PLATFORMS=cpu $(BIN)/hbpo study --workdir=$(RUNS)/miniature $(ARGS)
	JAX_PLATFORMS=cpu $(BIN)/hbpo report $(RUNS)/miniature --out=$(RUNS)/miniature/report

test: $(VENV)/.test  ## The tests, without the slow ones.
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

test-all: $(VENV)/.test  ## All tests.
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "slow or not slow" $(ARGS)

lint: $(VENV)/.test  ## ruff and pyright.
	$(BIN)/ruff check .
	$(BIN)/pyright hbpo_jax

docs: $(VENV)/.docs  ## The documentation, into build/site.
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

wheel: $(BIN)/python  ## The wheel and the source archive, into dist.
	$(PIP) 'build>=1.2' 'twine>=6'
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

lock:  ## Renew uv.lock, which pins what Cloud TPU workers and the image install (UPGRADE=1: with newer versions).
	$(UV) lock $(if $(UPGRADE),--upgrade) --default-index https://pypi.org/simple

check-lock:  ## Whether uv.lock goes with pyproject.toml.
	$(UV) lock --check --default-index https://pypi.org/simple

bench: $(VENV)/.test  ## Every script in benchmarks/ (ARGS=--quick: minutes); JSON lines on stdout.
	@found=0; for script in benchmarks/*.py; do \
	  test -e $$script || continue; found=1; echo "$$script"; $(BIN)/python $$script $(ARGS) || exit 1; \
	done; test $$found = 1

clean:  ## Remove .venv and caches; runs stay.
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
	find hbpo_jax tests configs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
