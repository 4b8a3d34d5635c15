# Two commands need nothing but Python 3.11+ with pip: `make demo` and `make test`. Both make .venv on first use.

PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
  BIN := $(VENV)/Scripts
else
  BIN := $(VENV)/bin
endif
READY := $(VENV)/.ready

.PHONY: demo test ptx fuzz lint sanitize figures studies bench gpu clean

# Train the dilated causal network on names, show its loss beside the post's, invent twenty names.
demo: $(READY)
	@rm -rf runs/demo
	$(BIN)/convwave train --out runs/demo
	$(BIN)/convwave sample runs/demo -n 20
	@test ! -f runs/demo/loss.png || echo "The loss curve is a picture: runs/demo/loss.png"

test: $(READY)
	$(BIN)/python -m pytest

# Kernel tests as compiled for sm_80 and sm_90, executed without a GPU, then faults planted in the compiled code
# (not timed as a whole; compiled kernels are kept in .ptx_cache). Into benchmarks/results/ptx.json.
ptx: $(READY)
	$(BIN)/python -m tests.ptx

# 10,000 damaged checkpoints, 4,000 texts and 1,000 command lines: each is used or refused in one line (two minutes).
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz

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
	$(BIN)/convwave verify --out benchmarks/results
	rm -rf runs/reproduce
	$(BIN)/convwave reproduce
	mkdir -p benchmarks/results/reproduce
	cp runs/reproduce/reproduce.json runs/reproduce/reproduce.png benchmarks/results/reproduce/
	$(BIN)/python -m benchmarks.report

# Every study of `convwave bench` on this CPU, into benchmarks/results/cpu/, the report and the README (half an hour).
# Cut short, it goes on where it stopped: what is done waits in runs/studies/.
studies: $(READY)
	$(BIN)/convwave bench all --resume --out runs/studies
	mkdir -p benchmarks/results/cpu
	mv runs/studies/* benchmarks/results/cpu/
	$(BIN)/convwave bench --report

# pytest-benchmark over benchmarks/bench_pieces.py: each piece checks its result before it is timed.
bench: $(READY)
	$(BIN)/python -m pytest benchmarks/bench_pieces.py -o addopts= -o python_files='bench_*.py' -o python_functions='bench_*' \
	  --benchmark-only --benchmark-sort=name --benchmark-columns=median,iqr,min,max,rounds

# The kernels under NVIDIA's memory and race checkers (CUDA toolkit, a GPU; the system's Python as for `make gpu`).
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --target-processes all
sanitize:
	@command -v compute-sanitizer > /dev/null || { echo "make sanitize: compute-sanitizer is not on the PATH (it comes with the CUDA toolkit)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make sanitize: needs a CUDA device, there is none")'
	$(SANITIZE) --tool memcheck $(PYTHON) -m pytest tests/test_kernels.py tests/test_score_names.py -q -k "not random_graphs"
	$(SANITIZE) --tool racecheck $(PYTHON) -m pytest tests/test_kernels.py tests/test_score_names.py -q -k "real_names or widths or numbers_of_rows"

# GPU tests and all studies with the system's Python, which has torch and triton; nine minutes, results in $$OUT.
gpu:
	PYTHON=$(PYTHON) benchmarks/gpu.sh

clean:
	rm -rf $(VENV) .ptx_cache build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis runs

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "convwave needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)
