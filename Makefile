# PriorZero's commands. `make` lists them. The first use installs packages into .venv.

SHELL := /bin/bash
PYTHON := .venv/bin/python
# Further arguments of the program or of pytest: make quick-test ARGS="--env_id zork1.z5", make test ARGS="-k replay".
ARGS ?=

# Without cached bytecode, importing torch and LightZero takes about 15 seconds longer.
unexport PYTHONDONTWRITEBYTECODE

# Tests must not use a model hub. All models that they load come from installed packages.
PYTEST := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 $(PYTHON) -m pytest

.DEFAULT_GOAL := help
.PHONY: help quick-test test unit learn-check bench lint format lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

quick-test:  ## train both models on a CPU until a small game is won (about 3 minutes)
	@scripts/set_up.sh cpu
	@echo "quick-test: training both models on the CPU (about 3 minutes)"
	@$(PYTHON) -m priorzero.entry --quick_test $(ARGS)

test:  ## run all tests
	@scripts/set_up.sh test
	@echo "test: running all tests (some minutes)"
	@$(PYTEST) --durations=10 $(ARGS)

unit:  ## run the fast tests
	@scripts/set_up.sh test
	@$(PYTEST) -m "not slow and not vllm" $(ARGS)

learn-check:  ## check that search, prior, SFT and RFT each improve the agent (less than 5 minutes)
	@scripts/set_up.sh test
	@$(PYTEST) -m learn tests/test_learning.py --durations=0 $(ARGS)

# One after the other, since they need an idle machine. All are run, even if the results of one differ.
bench:  ## measure the figures of docs/performance.md (up to 30 minutes); fails if results differ
	@scripts/set_up.sh test
	@failed=0; for bench in "env --quick" search world_model llm prior loop; do set -- $$bench; \
		echo "== bench_$$bench"; $(PYTHON) scripts/bench_$$1.py "$${@:2}"; status=$$?; \
		case $$status in 0) ;; 2) echo "skipped (see above)" ;; *) failed=1 ;; esac; \
	done; echo "bench: the results are in bench_results/"; exit $$failed

lint:  ## run ruff on all files and mypy on priorzero/
	@scripts/set_up.sh test
	@echo "lint: running ruff, then mypy (about a minute without its cache)"
	@.venv/bin/ruff check .
	@.venv/bin/mypy

format:  ## format the code and apply the automatic fixes of ruff
	@scripts/set_up.sh test
	@.venv/bin/ruff check --fix-only --quiet .
	@.venv/bin/ruff format .

lock:  ## write requirements/ from pyproject.toml (ARGS=--upgrade for the newest versions)
	@scripts/set_up.sh uv
	@UV=$(CURDIR)/.venv/bin/uv $(PYTHON) scripts/lock_requirements.py $(ARGS)

clean:  ## remove caches and build folders (keeps .venv and the runs)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist ./*.egg-info
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
