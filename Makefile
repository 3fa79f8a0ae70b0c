# Two commands on a fresh machine with nothing but Python and pip: `make demo` and `make test`.
# PIP_ARGS reaches pip, for example: make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# (on Linux, PyPI's PyTorch brings several GB of CUDA; that index has the CPU build).

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
# On two cores: a third of the tests' time they wait for servers, so that a third worker has what to compute with.
PYTEST_WORKERS ?= 3
# In the order that tests/conftest.py gives them: the longest first.
IN_PARALLEL := -n $(PYTEST_WORKERS) --dist loadgroup --no-loadscope-reorder

ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif

INSTALLED := .venv/.installed

.PHONY: setup demo test quick coverage lint format types links bench apt clean

setup: $(INSTALLED)

# Torch first and alone: its build is found where pip looks for plain versions, and everything else accepts it.
# Not quietly: some minutes without a sign of life look like a fault.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing PyTorch and some 200 packages into .venv: three minutes, and the time of the downloads."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt torch
	$(BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip check
	touch $@

demo: setup
	$(BIN)/slmops demo

test: setup
	$(BIN)/python -m pytest $(IN_PARALLEL) $(PYTEST_ARGS)

# All but whole journeys and what needs a real runtime, server or training: two minutes.
quick: setup
	$(BIN)/python -m pytest -m "not journey and not runtime" $(IN_PARALLEL) $(PYTEST_ARGS)

# `make test` with every line counted, which takes longer.
coverage: setup
	$(BIN)/python -m pytest $(IN_PARALLEL) --cov --cov-report=term $(PYTEST_ARGS)

lint: links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=build/package $(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: links
	$(BIN)/mypy

# mypy and import-linter do not follow the finder of an editable install: they read the package as a folder of links.
links: setup
	mkdir -p build/package/slmops
	ln -sfn ../../../deployments ../../../flows ../../../infra ../../../tasks build/package/slmops/
	cd build/package/slmops && ln -sf ../../../deployments/slmops/*.py .

# What tests/benchmarks measures, on an otherwise idle machine; needs 6 GB of memory and 20 GB of disk. First what is
# promised, beside llama.cpp, which is built once into the user's cache where there is a C++ compiler (ten minutes).
BENCH_ARGS ?=
bench: setup
	$(BIN)/python -m tests.benchmarks.targets --json build/bench.json $(BENCH_ARGS)
	$(BIN)/python -m tests.benchmarks.measurement_method
	$(BIN)/python -m tests.benchmarks.build_resources
	$(BIN)/python -m tests.benchmarks.transfer
	$(BIN)/python -m tests.benchmarks.serving

# System packages that a few tests use; without them those tests skip and say so.
apt:
	apt-get update -qq
	apt-get install -qq --yes strace chromium chromium-driver postgresql redis-server

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
