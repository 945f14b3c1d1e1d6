# Everything sets itself up from a bare clone: Python 3.10+, make and a package index are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

PEERS := .venv-peers
RESULTS := bench-results

.PHONY: setup demo test check slow clean peers bench bench-kernels bench-parity bench-scaling

setup: $(VENV)/.ready

# torch goes first and alone: its CPU build satisfies the range that other packages ask for.
$(VENV)/.ready: pyproject.toml constraints.txt $(wildcard src/lorikeet/kernels/native/*)
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

# Tables on stdout, everything in $(RESULTS). Options: make bench BENCH="--rounds 5 --threads 1"
bench: setup peers
	$(BIN)/python -m benchmarks run --out $(RESULTS)/speed.json $(BENCH)
	$(BIN)/python -m benchmarks run --memory --out $(RESULTS)/memory.json $(BENCH)

bench-kernels: setup
	$(BIN)/python -m benchmarks.kernels

bench-parity: setup
	$(BIN)/python -m benchmarks parity --out $(RESULTS)/parity.json $(BENCH)

bench-scaling: setup
	$(BIN)/python -m benchmarks scaling --out $(RESULTS)/scaling.json $(BENCH)

peers: $(PEERS)/.ready

$(PEERS)/.ready: benchmarks/peers.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --prefer-binary torch
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers.txt
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(RESULTS) lorikeet-demo
