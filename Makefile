# PriorZero: everyday commands. `make` alone lists them. Packages go into .venv, made on first use.

SHELL := /bin/bash
PYTHON := .venv/bin/python
# Passed on to the program or to pytest: make quick-test ARGS="--env_id zork1.z5", make test ARGS="-k buffer".
ARGS ?=

# Without cached bytecode every process that imports torch and LightZero starts some 15 seconds later.
unexport PYTHONDONTWRITEBYTECODE

# No test may reach for a model hub: everything that the tests load comes from installed packages.
PYTEST := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 $(PYTHON) -m pytest

.DEFAULT_GOAL := help
.PHONY: help quick-test test unit learn-check bench lint format lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

quick-test:  ## set up the small set and run the whole loop once, on a CPU (up to 10 minutes)
	@scripts/set_up.sh cpu
	@echo "quick-test: running the whole loop on the CPU (up to 10 minutes)"
	@$(PYTHON) -m priorzero.entry --quick_test $(ARGS)

test:  ## set up everything and run the whole test suite
	@scripts/set_up.sh test
	@echo "test: running the whole test suite (some minutes)"
	@$(PYTEST) $(ARGS)

unit:  ## run the fast tests only
	@scripts/set_up.sh test
	@$(PYTEST) -m "not slow and not vllm" $(ARGS)

learn-check:  ## see that search, prior, SFT and RFT each do what makes the agent better (below 5 minutes)
	@scripts/set_up.sh test
	@$(PYTEST) -m learn tests/test_learning.py --durations=0 $(ARGS)

# In turn, on an otherwise idle machine; all of them, also after one has found results that differ.
bench:  ## measure what docs/performance.md states (up to 20 minutes); fails if results differ
	@scripts/set_up.sh test
	@failed=0; for name in env search learner prior loop; do \
		echo "== bench_$$name"; $(PYTHON) scripts/bench_$$name.py; status=$$?; \
		case $$status in 0) ;; 2) echo "left out: see above" ;; *) failed=1 ;; esac; \
	done; echo "bench: results in bench_results/"; exit $$failed

lint:  ## ruff over everything, mypy over priorzero/
	@scripts/set_up.sh test
	@echo "lint: ruff, then mypy (about a minute without its cache)"
	@.venv/bin/ruff check .
	@.venv/bin/mypy

format:  ## format the code and fix what ruff can fix
	@scripts/set_up.sh test
	@.venv/bin/ruff check --fix-only --quiet .
	@.venv/bin/ruff format .

lock:  ## rewrite requirements/ from pyproject.toml (ARGS=--upgrade for the newest versions)
	@scripts/set_up.sh uv
	@UV=$(CURDIR)/.venv/bin/uv $(PYTHON) scripts/lock_requirements.py $(ARGS)

clean:  ## remove caches and build folders (keeps .venv and the data of runs)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist ./*.egg-info
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
