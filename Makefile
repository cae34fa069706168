# Each target makes its environment first, and only installs when what it depends on has changed.
# Another interpreter: make demo PYTHON=python3.12. Options for pytest: make test PYTEST_ARGS="-k grid".
PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
NATIVE := $(wildcard CMakeLists.txt src/trimtab/kernels/native/* src/trimtab/kernels/*/*.cpp src/trimtab/kernels/*/*.h)
INSTALL_INPUTS := pyproject.toml constraints.txt $(NATIVE)

# torch is named first in each install, with its pin, so that nothing else chooses another build of it.
TORCH := torch==2.13.0

# One thread per process: several busy OpenMP programs on few cores slow each other down several-fold.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow check bench claims results readme docs peers clean

help:
	@echo "make demo       install, then compress and measure the shipped model (offline)"
	@echo "make test       all tests that take seconds"
	@echo "make test-slow  the tests that take minutes"
	@echo "make check      formatting, lint, types, import floors, repository hygiene"
	@echo "make bench      measure the kernels; writes benchmarks/results/"
	@echo "make claims     test what the papers say; writes benchmarks/results/"
	@echo "make results    evaluate the shipped models and compare all methods on ref; writes benchmarks/results/"
	@echo "make readme     redraw the results tables of README.md and docs/ from the committed results"
	@echo "make docs       build the documentation into site/"
	@echo "make peers      tests against other libraries, in an environment of their own"
	@echo "make clean      remove everything that these targets made, environments included"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INSTALL_INPUTS) | $(BIN)/python
	@echo "installing trimtab into $(VENV) (a few minutes the first time)"
	$(PIP) install -c constraints.txt $(TORCH) -e .
	@touch $@

$(VENV)/.installed-dev: $(INSTALL_INPUTS) | $(BIN)/python
	@echo "installing trimtab and its development tools into $(VENV) (a few minutes the first time)"
	$(PIP) install -c constraints.txt $(TORCH) -e ".[dev]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(INSTALL_INPUTS) | $(VENV)/.installed
	$(PIP) install -c constraints.txt $(TORCH) -e ".[docs]"
	@touch $@

$(VENV)-peers/.installed: $(INSTALL_INPUTS) constraints-peers.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip --disable-pip-version-check --quiet install -c constraints-peers.txt $(TORCH) -e ".[peers,test]"
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/trimtab demo --force

test: $(VENV)/.installed-dev
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(JOBS) $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(JOBS) -m "slow and not peers and not gpu" --timeout 3600 $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(ONE_THREAD) $(BIN)/python -m pytest -q tests/repo

bench: $(VENV)/.installed
	@$(BIN)/python -m trimtab.kernels.bench --out benchmarks/results

claims: $(VENV)/.installed
	@$(BIN)/python scripts/record_results.py claims

results: $(VENV)/.installed
	@$(BIN)/python scripts/record_results.py evaluate
	@$(BIN)/python scripts/record_results.py compare

readme: $(VENV)/.installed
	@$(BIN)/python scripts/results_tables.py

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Warnings of other libraries are not ours to mend.
peers: $(VENV)-peers/.installed
	@$(ONE_THREAD) $(VENV)-peers/bin/python -m pytest -q -W default -m "peers and not gpu" --timeout 3600 $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(VENV)-peers build dist site out trimtab-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
