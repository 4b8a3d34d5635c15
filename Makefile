# Two commands need nothing but Python 3.11+ with pip: `make demo` and `make test`. Both make .venv on first use.

PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
  BIN := $(VENV)/Scripts
else
  BIN := $(VENV)/bin
endif
READY := $(VENV)/.ready

.PHONY: demo test lint figures clean

# Train the dilated causal network on names, show its loss beside the post's, invent twenty names.
demo: $(READY)
	@rm -rf runs/demo
	$(BIN)/convwave train --out runs/demo
	$(BIN)/convwave sample runs/demo -n 20
	@echo "The loss curve is a picture: runs/demo/loss.png"

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every figure of the README, into benchmarks/results/ and the README (half an hour; needs the post's names.txt).
figures: $(READY)
	$(BIN)/python -m benchmarks.figures all
	$(BIN)/python -m benchmarks.speedrun
	$(BIN)/python -m benchmarks.speedrun --track open
	$(BIN)/python -m benchmarks.speedrun --profile
	$(BIN)/python -m benchmarks.equality
	$(BIN)/convwave verify --out benchmarks/results
	rm -rf runs/reproduce
	$(BIN)/convwave reproduce
	mkdir -p benchmarks/results/reproduce
	cp runs/reproduce/reproduce.json runs/reproduce/reproduce.png benchmarks/results/reproduce/
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis runs

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "convwave needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)
