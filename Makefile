# Every target installs what it needs: a machine needs only Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo serve reproduce test test-optimised long lint types accuracy bench clean

demo: $(VENV)/.demo
	$(BIN)/python -m models.demo $(ARGS)

# LeNet5 on digits over worker processes of this machine, until Ctrl-C: http://127.0.0.1:8000/
serve: $(VENV)/.demo,models,serve
	$(BIN)/python -m jaxcode.serving --model models.networks:digits --factory --input-shape 28,28,1 \
	  --num-data 6 --num-workers 9 $(ARGS)

# The paper's experiments, in some forty minutes, or with ARGS=--quick in four.
reproduce: $(VENV)/.demo,models
	$(BIN)/python -m models.reproduce all $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

# `make test` runs at the lowest optimisation level of jaxlib 0.10, which compiles faster; with newer ones at the default
# level. These tests are about accuracy, and run at the default level, as users' programs do.
test-optimised: $(VENV)/.test
	JAXCODE_TEST_OPTIMISED=1 $(BIN)/python -m pytest -n auto --dist loadfile tests/codes tests/interpolants $(ARGS)
	$(BIN)/python -m tests.benchmarks.accuracy

# Tests that `make test` leaves out because they take long: recorded figures with many trials, five hundred requests
# while workers are killed.
long: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m long $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

# The error of each spline against its oracle.
accuracy: $(VENV)/.test
	$(BIN)/python -m tests.benchmarks.accuracy $(ARGS)

# Time and memory, each figure with the bound that it must meet.
bench: $(VENV)/.test
	$(BIN)/python -m tests.benchmarks.speed $(ARGS)

clean:
	rm -rf $(VENV) build dist out

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "jaxcode needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Installs a set of extras, which the target names, and leaves a stamp so that it is not installed twice.
$(VENV)/.%: $(VENV)/bin/python pyproject.toml
	@echo "Installing jaxcode[$*] into $(VENV) ..."
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@
