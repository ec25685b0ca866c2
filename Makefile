# make demo | test | test-all | bench | lint: each makes .venv on first use. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all bench lint clean
.DELETE_ON_ERROR:

# tests start Python many times, and pip compiled nothing: the bytecode of the libraries is kept when they are first imported
export PYTHONDONTWRITEBYTECODE =

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: needs Python 3.10 or newer, $$($(PYTHON) --version) found; try 'make PYTHON=python3.12'"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/installed
	$(BIN)/python -m detr.demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# what takes too long for every change: long sweeps, every kernel for every target, and many random calls
test-all: test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m long
	TRITON_INTERPRET=0 $(BIN)/python -m benchmarks.compile_table
	$(BIN)/python -m tests.fuzz --backend torch --calls 10000
	$(BIN)/python -m tests.fuzz --backend triton --calls 1500

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis
