# make demo: the whole pipeline on generated images.  make check: format, lint, types, fast tests.
# make docs: the documentation as a site in site/, with broken links as errors.
# make test: every test but the exhaustive ones.  make test-all: those too (attacks, kills and mutants by the thousand).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO ?= demo-workspace
# Two tests at a time, one thread each: small networks gain nothing from more.
IN_PAIRS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo docs test test-all test-exhaustive check lint format clean

demo: $(VENV)/all.installed
	$(BIN)/edge-ilseg demo $(DEMO) --replace

docs: $(VENV)/docs.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: $(VENV)/dev.installed
	$(IN_PAIRS) -m "not exhaustive"

test-all: test test-exhaustive

test-exhaustive: $(VENV)/dev.installed
	$(IN_PAIRS) -m exhaustive

check: lint
	$(BIN)/python -m pytest -q -m "not slow and not exhaustive"

lint: $(VENV)/dev.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/dev.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/%.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[$*]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
