# Two commands on a fresh machine: `make demo` and `make test`. Everything they need they install themselves.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TESTS ?= tests

# The first interpreter of a tested version, else any that is new enough.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)

export MLFLOW_DISABLE_TELEMETRY := true
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help venv ffmpeg demo test test-slow check format clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(STAMP) ## create .venv and install everything that constraints.txt pins

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, found $$($(PYTHON) --version 2>&1): install one, then: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		package="python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"; \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -y -q "$$package"; \
		else echo "Python's venv module is missing. Type: sudo apt-get install $$package" >&2; exit 2; fi; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

ffmpeg: ## find ffmpeg, or install it where apt allows
	@if command -v ffmpeg >/dev/null && command -v ffprobe >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -y -q --no-install-recommends ffmpeg; \
	else echo "ffmpeg is missing. Type: sudo apt-get install ffmpeg   (macOS: brew install ffmpeg), then the same make command again." >&2; exit 2; fi

demo: ffmpeg $(STAMP) ## the whole story in runs/demo: clips, dataset, four trained stages, samples, sweep
	$(PY) -m workflows.cli demo

test: ffmpeg $(STAMP) ## the test suite, about four minutes on two cores
	$(PY) -m pytest -q -n 2 --dist loadfile $(TESTS)

test-slow: ffmpeg $(STAMP) ## the tests marked slow or cluster
	$(PY) -m pytest -q -m "slow or cluster" $(TESTS)

check: $(STAMP) ## ruff format and lint, pyright, import-linter
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports

format: $(STAMP) ## rewrite the code in the house format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove .venv and caches; runs/ stays, it is yours
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
