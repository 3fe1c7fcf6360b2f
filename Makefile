# `make demo` and `make test` need Python 3.10 or newer, make and git; they make the virtual environment themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
TEST_ARGS ?=

.PHONY: demo test test-slow lint clean

# Remade when the requirements change.
$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(VENV)/.installed  ## trains a small VLM with and without feedback, evaluates both: out/demo/report.md
	$(BIN)/deem demo --out out/demo $(DEMO_ARGS)

test: $(VENV)/.installed  ## the tests that every change must pass
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow and not gpu" $(TEST_ARGS)

test-slow: $(VENV)/.installed  ## the slow ones: real language model, two processes, lmms-eval end to end
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slow and not gpu" $(TEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf out dist build .pytest_cache .ruff_cache
