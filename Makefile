# Every target sets up what it needs in .venv; only Python (3.11 to 3.13) and make are assumed.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test test-all check format docs clean help

help:
	@echo "make run            train the demo through flwr run (ARGS='rounds=4 layout.overlap=1' to change it)"
	@echo "make test           the test suite"
	@echo "make test-all       the test suite with the slow tests"
	@echo "make check          ruff, mypy"
	@echo "make docs           the site, into docs/_build/html"
	@echo "make format         apply ruff's formatting and fixes"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else f"Python 3.11 to 3.13 is needed, {v.major}.{v.minor} found: make PYTHON=/path/to/python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep -E '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

run: $(READY)
	$(BIN)/fomoe run engine=flower $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -m "not slow and not gpu" $(ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf docs/_build $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
