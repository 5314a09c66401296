# make test: set up once, then lint, types and the fast tests.   make demo: set up once, then the whole recipe in minutes.
# Options: SEED=1 (demo seed), PYTHON=python3.12, TORCH_INDEX=https://download.pytorch.org/whl/cpu (or /whl/cu128 ...).
SHELL := /bin/bash
PYTHON ?= python3
SEED ?= 0
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
# The stamp's name carries a checksum of both files: a changed pin sets up again, a touched file does not.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
DEMO_DIR := runs/demo$(if $(filter-out 0,$(SEED)),-$(SEED))
# Two pytest workers with a thread pool each would fight for the cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup demo test test-all lint format
help:
	@grep -E '^# ' Makefile | cut -c 3-

setup: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "== set-up (once): creating $(VENV) and installing the pinned dependencies"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@rm -f $(VENV)/.installed-* && touch $@

demo: $(STAMP)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  rlhf/pipeline.py --config configs/demo.yaml --seed $(SEED) --output_dir $(DEMO_DIR)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m 'not slow'

test-all: lint
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[quantized]'
	$(TEST_ENV) $(BIN)/python -m pytest -n 2
