# The only ways in. Each target installs what it needs into .venv and nothing elsewhere.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test check bench docs soak clean

demo: $(VENV)/.demo
	$(BIN)/seqpar launch examples/hybrid_lm/job.yaml

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell seqpar tests examples benchmarks docs README.md CHANGELOG.md CONTRIBUTING.md

bench: $(VENV)/.dev
	$(BIN)/seqpar bench

docs: $(VENV)/.dev
	$(BIN)/python -m pytest tests/test_docs.py

# 30 seeded faults an engine; the short version is part of `make test`.
soak: $(VENV)/.dev
	$(BIN)/python -m tests.launch.soak --engine local --faults 30 --seed 0
	$(BIN)/python -m tests.launch.soak --engine ray --faults 30 --seed 0

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "seqpar needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first: with it in place under its pin, nothing else can pull another build.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[plot]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo
