# Every target sets itself up: virtual environment, pinned constraints, install. Plain pip is enough.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help networks demo test lint slow bench reproduce docs coverage clean

help:
	@echo "make demo       prune three shipped models, reload them, write one report (under 3 minutes)"
	@echo "make test       the fast tests"
	@echo "make lint       style, types, import direction"
	@echo "make slow       slow tests: retrains a zoo model, every reproduction"
	@echo "make reproduce  every method's small-scale check with three seeds"
	@echo "make bench      the benchmarks, each printing ratios from one run"
	@echo "make docs       docs/methods.md from the catalogue"
	@echo "make coverage   docs/coverage.md: every network of the tests pruned, cut and compared (minutes)"
	@echo "make networks   torchvision and timm for the tests, in a folder of their own"

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

# Beside the environment, not in it: PyPI's torchvision is built for another PyTorch and would not import by itself.
# tests/networks/network_tools.py says how it is used; tests of its networks are skipped where the folder is absent.
NETWORKS = torchvision==0.28.0 timm==1.0.31

$(VENV)/networks/.installed: Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/networks $(NETWORKS)
	@touch $@

networks: $(VENV)/networks/.installed

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py demo-out

test: $(VENV)/.dev $(VENV)/networks/.installed
	$(BIN)/python -m pytest -m "not slow" -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/build.py --check

slow: $(VENV)/.dev $(VENV)/networks/.installed
	$(BIN)/python -m pytest -m slow --timeout 1800

reproduce: $(VENV)/.installed
	@for name in $$($(BIN)/secateur methods --json | $(BIN)/python -c "import json,sys; print(*(m['name'] for m in json.load(sys.stdin)))"); do \
		$(BIN)/secateur reproduce $$name --seeds 3 || exit 1; done

bench: $(VENV)/.dev
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

docs: $(VENV)/.installed
	$(BIN)/python docs/build.py

coverage: $(VENV)/.dev $(VENV)/networks/.installed
	$(BIN)/python docs/build_coverage.py

clean:
	rm -rf $(VENV) demo-out
