# Targets for people and for CI alike. Needs make and Python 3.11 or later; everything else goes into $(VENV).

PYTHON ?= python3
VENV ?= .venv
FLOOR_VENV ?= .venv-floor
LM_EVAL_VENV ?= .venv-lm-eval
ARGS ?=
# Which tests `make test` runs, as pytest's -m has it; CI runs all of them: make test MARKS=
MARKS ?= not slow and not triton
# Test processes, one for each core; each uses one thread (tests/conftest.py).
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
USER_STAMP := $(VENV)/.installed-for-use
FLOOR_STAMP := $(FLOOR_VENV)/.installed
LM_EVAL_STAMP := $(LM_EVAL_VENV)/.installed
PIP_FLAGS := -qq --disable-pip-version-check --no-input
# Python compiles what is imported when it is first imported, and keeps it: all of torch and transformers takes a minute.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-triton quality lint style test-matrix test-lm-eval support soak asan bench-cpu bench-gpu \
  bench-gpu-quick compile-gpu bench-decode bench-prefixes bench-fidelity bench-real bench-ablations bench-findings \
  bench-absorb bench-suites second-model tables tables-check build clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## Create .venv with quantcache and its development tools

EVERYTHING := .[dev,triton,serve]

# $(call install,DIRECTORY,CONSTRAINTS[,WHAT]). torch goes first: later steps then keep that build, whichever one the package
# index offers for this machine. Building without isolation spares a second download of setuptools, which torch brings.
define install
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and \
	  "quantcache needs Python 3.11 or later, but $(PYTHON) is %d.%d; name another: make PYTHON=python3.12 ..." % v)'
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || { rm -rf $(1); \
	  echo "$(PYTHON) cannot create a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@echo "Installing into $(1) under $(2); the first time takes minutes ..."
	@$(1)/bin/python -m pip install $(PIP_FLAGS) --no-compile -c $(2) torch setuptools
	@$(1)/bin/python -m pip install $(PIP_FLAGS) --no-compile -c $(2) --no-build-isolation -e '$(or $(3),$(EVERYTHING))'
	@$(1)/bin/python -c 'import quantcache; [getattr(quantcache, name) for name in quantcache.__all__]'
	@touch $@
endef

# As machines with a GPU have it, where there is one.
FLOOR_PYTHON ?= $(shell python3.12 -c '' >/dev/null 2>&1 && echo python3.12 || echo $(PYTHON))
# A torch other than the oldest, where the package index has that one only with gigabytes of CUDA libraries.
FLOOR_TORCH ?=

# The CPU kernels are compiled by the installation: it is repeated when their source changes.
NATIVE := setup.py $(wildcard kernels/quantcache_kernels/cpu/src/*)

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	$(call install,$(VENV),constraints.txt)

# What users get: the demo needs no more, and a stranger should not wait for tools.
$(USER_STAMP): pyproject.toml constraints.txt $(NATIVE)
	$(call install,$(VENV),constraints.txt,.)

$(FLOOR_STAMP): PYTHON := $(FLOOR_PYTHON)
$(FLOOR_STAMP): pyproject.toml constraints-floor.txt $(NATIVE)
	@mkdir -p $(FLOOR_VENV)
	@sed '$(if $(FLOOR_TORCH),s/^torch==.*/torch==$(FLOOR_TORCH)/)' constraints-floor.txt > $(FLOOR_VENV)/constraints.txt
	$(call install,$(FLOOR_VENV),$(FLOOR_VENV)/constraints.txt)

# lm-eval comes with some forty packages that nothing else needs, and one of them with a python-dateutil below 3.
$(LM_EVAL_STAMP): pyproject.toml constraints.txt $(NATIVE)
	@mkdir -p $(LM_EVAL_VENV)
	@sed '/^python-dateutil==/d' constraints.txt > $(LM_EVAL_VENV)/constraints.txt
	$(call install,$(LM_EVAL_VENV),$(LM_EVAL_VENV)/constraints.txt)
	@$(LM_EVAL_VENV)/bin/python -m pip install $(PIP_FLAGS) --no-compile -c $(LM_EVAL_VENV)/constraints.txt \
	  --no-build-isolation -e '.[lm-eval]'

demo: $(firstword $(wildcard $(STAMP)) $(USER_STAMP)) ## Set up, then compress the cache of the bundled model and show what it costs
	@$(BIN)/quantcache demo $(ARGS)

# Types are checked while the tests run: mypy takes more than a minute of one core.
test: lint ## Set up, then lint, format check, types and the tests (minutes); MARKS= also those that take long, as in CI
	$(BIN)/mypy & $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "$(MARKS)" $(ARGS); tests=$$?; \
	  wait $$! || { echo "mypy's errors stand above" >&2; exit 1; }; exit $$tests

test-triton: $(STAMP) ## Triton's kernels under the interpreter, and compiled for GPUs (5 minutes)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m triton $(ARGS)

quality: lint ## Check lint, format and types; change nothing
	$(BIN)/mypy

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(STAMP) ## Repair lint and format where that can be done automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-matrix: $(FLOOR_STAMP) ## Run the tests on the oldest supported versions (.venv-floor); FLOOR_TORCH=2.13.0 for another torch
	$(FLOOR_VENV)/bin/python -m pytest -n $(JOBS) $(ARGS)

test-lm-eval: $(LM_EVAL_STAMP) ## Run the tests of the model type for lm-eval where it is installed (.venv-lm-eval)
	$(LM_EVAL_VENV)/bin/python -m pytest tests/integration/test_lm_eval.py $(ARGS)

# The kernels' tests, then random legal calls from several threads, on a library with AddressSanitizer and
# UndefinedBehaviorSanitizer. Python itself has neither: the run-time library is loaded first, and what Python leaves
# allocated at its end is not looked for.
SANITIZE_SECONDS ?= 180
SANITIZED = QUANTCACHE_CPU_LIBRARY=$$(echo $(CURDIR)/build/asan/quantcache_kernels/cpu/_native*.so) \
  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 $(BIN)/python
asan: $(STAMP) ## Run tests of CPU and emulated CUDA kernels and random calls (SANITIZE_SECONDS=180, recorded) with sanitizers
	@rm -rf build/asan && mkdir -p build/asan
	QUANTCACHE_SANITIZE=address,undefined $(BIN)/python setup.py -q build_ext --force \
	  --build-lib build/asan --build-temp build/asan/objects
	QUANTCACHE_SANITIZE=address,undefined $(SANITIZED) -m pytest -q tests/kernels -k "not triton" $(ARGS)
	OMP_NUM_THREADS=2 $(SANITIZED) benchmarks/sanitize.py --seconds $(SANITIZE_SECONDS)

bench-cpu: $(STAMP) ## Time the CPU kernels beside the dense cache (15 minutes); options in ARGS="..."
	$(BIN)/python benchmarks/cpu_decode.py $(ARGS)

# A lent GPU machine may have torch but no network and no git: these run on what is there, uninstalled.
bench-gpu: ## Check and time the kernels on a GPU, with any PYTHON that has torch (5 minutes); options in ARGS="..."
	PYTHONPATH=.:kernels $(PYTHON) benchmarks/gpu_decode.py $(ARGS)

bench-gpu-quick: ## The same in 2.5 minutes: parity and three times; ARGS="--tiny --quick" proves it without a GPU
	PYTHONPATH=.:kernels $(PYTHON) benchmarks/gpu_decode.py --quick $(ARGS)

compile-gpu: $(STAMP) ## Compile every Triton kernel of the tests and of real models' geometries; needs no GPU (half an hour)
	PYTHONPATH=.:kernels:benchmarks $(BIN)/python -m tests.kernels.compiling --target 80 90 120 --jobs $(JOBS) $(ARGS)

support: $(STAMP) ## Run the tests behind docs/support.md and write it from their outcomes
	$(BIN)/python -m pytest -m support tests --support-table docs/support.md $(ARGS)

soak: $(STAMP) ## Long forms of the property, fuzz and long-haul tests, recorded (a quarter of an hour); options in ARGS="..."
	$(BIN)/python benchmarks/soak.py $(ARGS)

bench-decode: $(STAMP) ## Time decoding; options in ARGS="..."
	$(BIN)/python benchmarks/decode_latency.py $(ARGS)

bench-prefixes: $(STAMP) ## Measure conversations that take turns, with SmolLM2 (hours); options in ARGS="..."
	$(BIN)/python benchmarks/prefixes.py $(ARGS)

bench-fidelity: $(STAMP) ## Measure every method on the bundled model (an hour); options in ARGS="..."
	$(BIN)/python benchmarks/fidelity.py $(ARGS)

# Six runs, as many at a time as there are cores, each with one thread: models as small as these gain little from a second.
# Each writes a record; tables take every part from the newest that holds it.
REAL_RUNS := gemma3 8192 residuals others recommended predictions
REAL_METHODS := dense,spectral-2,spectral-2.5,spectral-3,fp8,quanto-2,quanto-4,spectral-4,kivi-2,kivi-3,kivi-4,quarot-2,$\
quarot-3,quarot-4,turboquant-mse-2,turboquant-mse-3,turboquant-mse-4,hqq-4,oscar-2,oscar-3,oscar-4,int4-token-head,q4_0,$\
q8_0,kvarn-k4v2-64,kvarn-k4v4-64,kvarn-k3v3-64,kvarn-k2v2-64
REAL_CHOICE := dense,spectral-1,spectral-1.5,spectral-2,spectral-2.5,spectral-3,spectral-4,fp8,quanto-4,kivi-2,kivi-4,$\
quarot-3,turboquant-mse-3,oscar-3,kvarn-k4v2-64
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PREDICTIONS = $(ONE_THREAD) $(BIN)/python benchmarks/predictions.py
REAL = $(ONE_THREAD) $(BIN)/python benchmarks/fidelity.py --text wikitext2_test.txt --context 1024 \
  --weights --methods $(REAL_METHODS) --choice $(REAL_CHOICE)
SMOLLM2 = $(REAL) --model smollm2-135m --calibration calibrations/smollm2-135m --windows 4 --residuals 64 0 256 \
  --contexts 4096 8192

bench-real: $(STAMP) ## The same on two trained models of quantcache[real] (2.5 hours); options in ARGS="..."
	@$(MAKE) --no-print-directory -k -j $(JOBS) $(REAL_RUNS:%=bench-real-%)

.PHONY: bench-real-qwen $(REAL_RUNS:%=bench-real-%)
bench-real-gemma3: $(STAMP)
	$(REAL) --model gemma3-270m --calibration-tokens 16384 --windows 2 --contexts 4096 $(ARGS)

QWEN_METHODS := dense,spectral-2,spectral-2.5,spectral-3,spectral-4,fp8,quanto-4,hqq-4,kivi-2,kivi-3,kivi-4,quarot-3,$\
turboquant-mse-3,oscar-3,q4_0,q8_0,int4-token-head,kvarn-k3v3-64

# Not among bench-real's: it is ten times as large, takes 12 GB of memory and gains from every thread.
bench-real-qwen: ONE_THREAD :=
bench-real-qwen: $(STAMP) ## Some of the same on Qwen2.5-Coder-1.5B of quantcache[qwen] (an hour); options in ARGS="..."
	$(REAL) --model qwen2.5-coder-1.5b --calibration calibrations/qwen2.5-coder-1.5b --windows 2 \
	  --methods $(QWEN_METHODS) --parts residual_64 residual_0 $(ARGS)

# As many tokens as sixteen windows of the others have are two of these.
bench-real-8192: $(STAMP)
	$(SMOLLM2) --windows 16 --parts context_8192 $(ARGS)

bench-real-residuals: $(STAMP)
	$(SMOLLM2) --parts residual_64 residual_0 $(ARGS)

bench-real-others: $(STAMP)
	$(SMOLLM2) --parts residual_256 context_4096 wikipedia $(ARGS)

bench-real-recommended: $(STAMP)
	$(SMOLLM2) --parts recommended $(ARGS)

bench-real-predictions: $(STAMP)
	$(PREDICTIONS) --model smollm2-135m $(ARGS)
	$(PREDICTIONS) --model gemma3-270m --calibration-tokens 16384 --windows 2 $(ARGS)

bench-ablations: $(STAMP) ## Measure every choice of the codec (about an hour); options in ARGS="..."
	$(BIN)/python benchmarks/ablations.py $(ARGS)

second-model: $(STAMP) ## Make a small Qwen3 of wiki11m, the second model of the ablations (minutes)
	$(BIN)/python benchmarks/second_model.py $(ARGS)

bench-findings: $(STAMP) ## Measure published findings again (minutes); options in ARGS="..."
	$(BIN)/python benchmarks/findings.py $(ARGS)

bench-suites: $(STAMP) ## Measure long texts, tasks, routing, transfer, memory and speed; options in ARGS="..."
	$(BIN)/python benchmarks/suites.py $(ARGS)

bench-absorb: $(STAMP) ## Measure absorbed checkpoints on the bundled model (minutes); options in ARGS="..."
	$(BIN)/python benchmarks/absorb.py $(ARGS)

tables: $(STAMP) ## Rewrite tables and figures from the newest records
	$(BIN)/python benchmarks/tables.py

tables-check: $(STAMP) ## Fail if a table or figure differs from the newest records
	$(BIN)/python benchmarks/tables.py --check

build: $(STAMP) ## Build the wheel into dist/
	@rm -rf build
	@$(BIN)/python -m pip wheel $(PIP_FLAGS) --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

clean: ## Remove build output and tool caches
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find quantcache kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the virtual environments as well
	rm -rf $(VENV) $(FLOOR_VENV) $(LM_EVAL_VENV)
