# `make demo` and `make test` need Python 3.11 or newer, make and git; they make the virtual environment themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
TEST_ARGS ?=
# The callback with the lowest versions that it takes, and without the packages of the extras.
FLOORS := .venv-floors
FLOOR_TESTS := $(addprefix tests/feedback/test_,callback.py frameworks.py)

# Of `make fuzz`, for each reader.
MINUTES ?= 10

# All that the tests need, at the newest releases of the day.
NEWEST := .venv-newest

.PHONY: demo test test-slow test-floors test-newest fuzz lint docs clean

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

fuzz: $(VENV)/.installed  ## spoiled files for each reader for MINUTES, and many examples of each property
	HF_HUB_OFFLINE=1 HYPOTHESIS_PROFILE=many $(BIN)/python -m pytest tests/fuzz/test_properties.py $(TEST_ARGS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz $$((60 * $(MINUTES)))

$(FLOORS)/.installed: pyproject.toml tests/floors.txt
	@test -x $(FLOORS)/bin/python || $(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet --upgrade pip
	$(FLOORS)/bin/python -m pip install --quiet --editable . pytest hypothesis tensorboard --constraint tests/floors.txt
	@touch $@

# Deselected: SFTTrainer needs TRL, which needs `datasets`; and the Trainer of transformers 5.6 does not divide a
# smoothed loss by the micro-batches, with and without the callback.
test-floors: $(FLOORS)/.installed  ## the callback's tests at the lowest versions of its requirements
	HF_HUB_OFFLINE=1 $(FLOORS)/bin/python -m pytest -m "not slow and not gpu" $(FLOOR_TESTS) \
	    -k "not sft_trainer and not label_smoothing" $(TEST_ARGS)

test-newest:  ## the tests at the newest releases of all requirements, asked for anew each time
	@test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[test]"
	HF_HUB_OFFLINE=1 $(NEWEST)/bin/python -m pytest -m "not slow and not gpu" $(TEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.installed  ## the documentation site, built strictly: out/site/index.html
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf out dist build .pytest_cache .ruff_cache
