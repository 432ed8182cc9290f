# Two commands matter: `make demo` and `make test`.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
DEMO := runs/demo
CONFIG := configs/demo.yaml

.PHONY: help setup demo serve test cross lint format proto lock wheel clean

help:
	@echo "make demo   import MovieLens-100K, train, export, serve and rank real users"
	@echo "make serve  the same, and leave the server up"
	@echo "make test   run the tests;  make lint: ruff and mypy"
	@echo "make cross  fetch the CUDA plugin, so that the tests compile for a GPU too"

# The first interpreter that is 3.12 or newer: on PATH, then among those that pyenv keeps.
$(VENV)/installed: pyproject.toml requirements.lock
	@set -e; \
	for p in python3.12 python3.13 "$$(pyenv root 2>/dev/null)"/versions/3.1[2-9]*/bin/python3; do \
	  if "$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then found="$$p"; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "FLAME-JAX needs Python 3.12 or newer: install python3.12 with its venv module" >&2; exit 1; fi; \
	echo "using $$("$$found" -c 'import sys; print(sys.executable, sys.version.split()[0])')"; \
	rm -rf $(VENV); "$$found" -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

setup: $(VENV)/installed

$(DEMO)/recbole: $(VENV)/installed requirements-demo.lock
	@mkdir -p $(DEMO)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-demo.lock
	@touch $@

# Marker files: a folder's own time says nothing of its content.
$(DEMO)/store.done: | $(DEMO)/recbole
	rm -rf $(DEMO)/store
	$(PY) -m flame_jax.data import ml-100k --store $(DEMO)/store
	@touch $@

$(DEMO)/checkpoint.done: $(DEMO)/store.done $(CONFIG)
	$(PY) -m flame_jax.train --config $(CONFIG)
	@touch $@

$(DEMO)/artifact.done: $(DEMO)/checkpoint.done $(VENV)/installed
	$(PY) -m flame_jax.export build --config $(CONFIG)
	@touch $@

demo: $(DEMO)/artifact.done
	$(PY) -m flame_jax.demo --config $(CONFIG)

serve: $(DEMO)/artifact.done
	$(PY) -m flame_jax.demo --config $(CONFIG) --keep

test: $(VENV)/installed
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile

# The CUDA plugin without the CUDA libraries, in a folder of its own: in the virtual environment, every program that
# runs on the CPU would look for them. Tests that compile for a GPU use it where it is.
.cross/installed: $(VENV)/installed requirements-cross.lock
	rm -rf .cross
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-cross.lock \
	  --target .cross
	@touch $@

cross: .cross/installed

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

proto: $(VENV)/installed
	$(PY) -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. flame_jax/server/proto/*.proto

lock: $(VENV)/installed
	$(PY) -m pip install --quiet uv
	$(PY) -m uv pip compile pyproject.toml --extra dev --universal --python-version 3.12 --generate-hashes \
	  --no-header --no-annotate -o requirements.lock

wheel: $(VENV)/installed
	rm -rf build dist
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation -w dist .

clean:
	rm -rf $(VENV) .cross build dist *.egg-info $(DEMO) .*_cache .hypothesis
