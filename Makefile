# Targets for people and for CI alike. Needs make and Python 3.11 or later; everything else goes into $(VENV).

PYTHON ?= python3
VENV ?= .venv
FLOOR_VENV ?= .venv-floor
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FLOOR_STAMP := $(FLOOR_VENV)/.installed
PIP_FLAGS := -qq --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test quality style test-matrix support soak bench-decode bench-fidelity tables build clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## Create .venv with quantcache and its development tools

# $(call install,DIRECTORY,CONSTRAINTS). torch goes first: later steps then keep that build, whichever one the package
# index offers for this machine. Building without isolation spares a second download of setuptools, which torch brings.
define install
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and \
	  "quantcache needs Python 3.11 or later, but $(PYTHON) is %d.%d; name another: make PYTHON=python3.12 ..." % v)'
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || { rm -rf $(1); \
	  echo "$(PYTHON) cannot create a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@echo "Installing into $(1) under $(2); the first time takes minutes ..."
	@$(1)/bin/python -m pip install $(PIP_FLAGS) -c $(2) torch setuptools
	@$(1)/bin/python -m pip install $(PIP_FLAGS) -c $(2) --no-build-isolation -e '.[dev,triton]'
	@touch $@
endef

# The CPU kernels are compiled by the installation: it is repeated when their source changes.
NATIVE := setup.py $(wildcard kernels/quantcache_kernels/cpu/src/*)

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	$(call install,$(VENV),constraints.txt)

$(FLOOR_STAMP): pyproject.toml constraints-floor.txt $(NATIVE)
	$(call install,$(FLOOR_VENV),constraints-floor.txt)

demo: $(STAMP) ## Set up, then compress the cache of the bundled model and show what it costs
	@$(BIN)/quantcache demo $(ARGS)

test: quality ## Set up, then lint, format check, types and the tests (what CI runs)
	$(BIN)/python -m pytest $(ARGS)

quality: $(STAMP) ## Check lint, format and types; change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(STAMP) ## Repair lint and format where that can be done automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-matrix: $(FLOOR_STAMP) ## Run the tests against the oldest supported transformers (.venv-floor)
	$(FLOOR_VENV)/bin/python -m pytest $(ARGS)

support: $(STAMP) ## Run the tests behind docs/support.md and write it from their outcomes
	$(BIN)/python -m pytest -m support --support-table docs/support.md $(ARGS)

soak: $(STAMP) ## Long forms of the property, fuzz and long-haul tests, recorded (an hour); options in ARGS="..."
	$(BIN)/python benchmarks/soak.py $(ARGS)

bench-decode: $(STAMP) ## Time decoding; options in ARGS="..."
	$(BIN)/python benchmarks/decode_latency.py $(ARGS)

bench-fidelity: $(STAMP) ## Measure every method on the bundled model (minutes); options in ARGS="..."
	$(BIN)/python benchmarks/fidelity.py $(ARGS)

tables: $(STAMP) ## Rewrite the README's tables from the newest records
	$(BIN)/python benchmarks/tables.py

build: $(STAMP) ## Build the wheel into dist/
	@rm -rf build
	@$(BIN)/python -m pip wheel $(PIP_FLAGS) --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

clean: ## Remove build output and tool caches
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find quantcache kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the virtual environments as well
	rm -rf $(VENV) $(FLOOR_VENV)
