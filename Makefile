# What people type. Everything runs in .venv, which is made on first use and renewed when its inputs change.
PYTHON ?= python3
BIN := .venv/bin
PACKAGE := .venv/.installed
STAMP := .venv/.installed-dev

OLDEST := .venv-oldest
OLDEST_TRANSFORMERS := $(shell sed -nE 's/^ *"transformers>=([0-9.]+),.*/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help train test gpu oldest quality style commit build clean

help: ## Show these lines
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

# Without extras: transformers imports those that are installed in every process, torchao with warnings.
$(PACKAGE): pyproject.toml constraints.txt
	@echo "installing into .venv (once; some minutes on a fresh machine)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(INSTALL) --editable .
	@touch $@

# setuptools builds the package in the packaging test, and the one that comes with Python 3.11 is too old for it.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into .venv what tests and checks need (once; some minutes on a fresh machine)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(INSTALL) setuptools --editable '.[dev]'
	@touch $@ $(PACKAGE)

train: $(PACKAGE) ## Train a small language model here: the tiny example, on every accelerator or two CPU ranks
	$(BIN)/python examples/train.py configs/text/tiny.yaml

# Many tests use one core or wait for ranks, so two workers keep two cores busy. One worker runs all tests of a file, which
# share models and forks.
TEST_WORKERS ?= 2
test: $(STAMP) ## Run all tests
	$(BIN)/python -m pytest --quiet --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# With the build of torch for GPUs that PYTHON has; pytest needs no plugin. Ranks are forked before CUDA is initialised, which the
# other files do when they run, so tests/gpu is first.
GPU_TESTS ?= tests/gpu tests/models/test_multimodal_cuda.py tests/ops/test_cross_entropy.py tests/ops/experts/test_experts.py
GPU_TESTS_ON ?= cuda
gpu: ## Run the tests that need GPUs on all GPUs of this host, and write docs/gpu_runs.md
	@status=0; GPU_TESTS_ON=$(GPU_TESTS_ON) $(PYTHON) -m pytest -o addopts= -o timeout=900 --quiet -rs \
		--continue-on-collection-errors -o junit_family=xunit1 --junitxml=output/gpu.xml $(GPU_TESTS) || status=$$?; $(PYTHON) -m tests.gpu.page output/gpu.xml && exit $$status

# The versions of constraints.txt, except those that an older transformers decides.
$(OLDEST)/.installed: pyproject.toml constraints.txt
	@echo "installing transformers $(OLDEST_TRANSFORMERS) into $(OLDEST) (once; some minutes on a fresh machine)"
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@grep -vE '^(transformers|huggingface_hub)==' constraints.txt > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check --constraint $(OLDEST)/constraints.txt \
		setuptools 'transformers==$(OLDEST_TRANSFORMERS).*' --editable '.[dev]'
	@touch $@

oldest: $(OLDEST)/.installed ## Run parity, experts and the contracts of private names on the oldest supported transformers
	$(OLDEST)/bin/python -m pytest --quiet tests/parity tests/moe tests/compat tests/models/transformers_api

quality: $(STAMP) ## Check style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

style: $(STAMP) ## Apply automatic fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

commit: $(STAMP) ## Run the checks that run before a commit, on all files
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files

build: $(STAMP) ## Build the source distribution and the wheel into dist/
	$(BIN)/python -m build

clean: ## Remove what the other targets made
	rm -rf .venv $(OLDEST) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
