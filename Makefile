# `make test` and `make train` set everything up on first use; see setup.sh.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.fastafd-setup

.PHONY: setup train test test-all lint docs bundle clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.sh
	@PYTHON="$(PYTHON)" bash setup.sh
	@touch $@

# make train ARGS="--arch wrn34_10"; without ARGS: the data set that ships with the dependencies, on any machine
train: $(STAMP)
	$(BIN)/python -m fastafd.train $(or $(ARGS),--recipe digits)

# Two processes of one thread each: threads of several processes would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# The tests to run after every change. make test ARGS="tests/test_models.py -k merge" runs some of them, in one process.
test: $(STAMP)
	$(PYTEST) $(or $(ARGS),-n 2 -m "not slow")

# All of them, as CI does: also the slow ones, and the kernels under Triton's interpreter, which needs its own processes.
test-all: $(STAMP)
	$(PYTEST) -n 2 --durations=10
	TRITON_INTERPRET=1 $(PYTEST) -n 2 --durations=10 tests/test_kernel_numerics.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: open site/index.html, or run $(BIN)/mkdocs serve"

# make bundle PYTHON=3.12: wheels for a machine without internet that has that Python; .venv is made with python3 as ever
BUNDLE_FOR := $(filter-out python3,$(PYTHON))
bundle: override PYTHON := python3
bundle: $(STAMP)
	$(BIN)/python bundle.py $(BUNDLE_FOR)

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fastafd kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
