# Everything here needs Python 3.11 to 3.13, pip, make and git, and nothing else. The environment is made in .venv and
# used again; it is brought up to date when pyproject.toml or constraints.txt change.

WORKDIR ?= runs/tiny
FLAGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
INPUTS := pyproject.toml constraints.txt
# The first of these that is 3.11 to 3.13; `make PYTHON=python3.12 ...` names another.
CANDIDATES := python3 python3.13 python3.12 python3.11 python
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "variables: PYTHON=python3.12 (for the environment), WORKDIR=DIR and FLAGS='--config.seed=1' (of demo and test)"

demo: $(VENV)/.installed ## set up, then train the embedded default into WORKDIR (runs/tiny); goes on where it stopped
	$(RUN) -m ril_jax.train --config=configs/tiny.py --workdir=$(WORKDIR) $(FLAGS)

test: lint ## set up, then check format, lint, types and run all tests
	$(RUN) -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(FLAGS)

lint: $(VENV)/.installed-dev ## set up, then check format, lint and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

clean: ## delete the environment and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: $(INPUTS) | $(RUN)
	@echo "installing ril_jax into $(VENV): a few minutes the first time"
	$(RUN) -m pip install --quiet --editable . --constraint constraints.txt
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(RUN)
	@echo "installing ril_jax and its development tools into $(VENV): a few minutes the first time"
	$(RUN) -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@ $(VENV)/.installed

$(RUN):
	@test -n "$(PYTHON)" || { echo "error: none of $(CANDIDATES) is Python 3.11 to 3.13; install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "error: $(PYTHON) is not Python 3.11 to 3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
