# make demo   sets up, makes the sample and runs the main job on it
# make test   sets up and passes the tests; make test-slow those that start Ray, kill and restart
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cksum < pyproject.toml | cut -d' ' -f1)
WORKSPACE ?= ./workspace

export RAY_AUTH_MODE ?= disabled
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO ?= 0

.PHONY: setup demo test test-fast test-slow lint format clean

setup: $(READY)

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[test,lint]"
	rm -f $(VENV)/.ready-*
	touch $@

demo: setup
	$(BIN)/python rayjobs/demo.py workspace=$(WORKSPACE)

test: setup
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: setup
	$(BIN)/python -m pytest -m "slow or gpu" tests/extraction/test_chaos.py
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow or gpu" --ignore tests/extraction/test_chaos.py

test-fast: setup
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not thorough"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
