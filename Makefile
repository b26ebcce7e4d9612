# Every target sets itself up: virtual environment, pinned constraints, install. Plain pip is enough.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test lint slow bench reproduce docs clean

help:
	@echo "make demo       prune three shipped models, reload them, write one report (under 3 minutes)"
	@echo "make test       the fast tests"
	@echo "make lint       style, types, import direction"
	@echo "make slow       slow tests: retrains a zoo model, every reproduction"
	@echo "make reproduce  every method's small-scale check with three seeds"
	@echo "make bench      the benchmarks, each printing ratios from one run"
	@echo "make docs       docs/methods.md from the catalogue"

# torch comes first and alone, so that no other requirement can pull another build of it
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[dev]"
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py demo-out

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/build.py --check

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow --timeout 1800

reproduce: $(VENV)/.installed
	@for name in $$($(BIN)/secateur methods --json | $(BIN)/python -c "import json,sys; print(*(m['name'] for m in json.load(sys.stdin)))"); do \
		$(BIN)/secateur reproduce $$name --seeds 3 || exit 1; done

bench: $(VENV)/.dev
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

docs: $(VENV)/.installed
	$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) demo-out
