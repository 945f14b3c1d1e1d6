# Everything sets itself up from a bare clone: Python 3.10+, make and a package index are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test check slow clean

setup: $(VENV)/.ready

# torch goes first and alone: its CPU build satisfies the range that other packages ask for.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --prefer-binary torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: setup
	$(BIN)/lorikeet demo

test: check
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

slow: setup
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) lorikeet-demo
