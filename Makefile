# Everything happens in .venv, which `make install` sets up; every other target begins with it.

PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check
PYTHON_CHECK := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help install demo test support-table pairs-table lint check clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1 - /p' Makefile

install: .venv/.installed  ## set up .venv, unless it is up to date

.venv/.installed: pyproject.toml constraints.txt
	@# A name on the PATH may be a shim that starts nothing: the first that really runs is taken.
	@.venv/bin/python -c "" 2>/dev/null || { \
	  for python in python3.12 python3.13 python3.11 python3; do \
	    $$python -c "$(PYTHON_CHECK)" 2>/dev/null && exec $$python -m venv --clear .venv; \
	  done; \
	  echo "stepwell needs Python 3.11 or newer with its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; \
	  exit 1; }
	@echo "Installing stepwell and PyTorch into .venv: some minutes, some gigabytes."
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

demo: install  ## the whole path on 1,797 real scans, on a CPU
	.venv/bin/python -m stepwell demo

test: install  ## the fast tests
	.venv/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

support-table: install  ## docs/supported.md; resumes where it stopped
	.venv/bin/python benchmarks/support.py --jobs 2
	.venv/bin/python benchmarks/support_channels.py --jobs 2
	.venv/bin/python benchmarks/support_masks.py

pairs-table: install  ## docs/pairs.md; some minutes
	.venv/bin/python benchmarks/pairs.py

lint: install  ## linter, formatter, type checker, floors
	.venv/bin/ruff check src tests benchmarks examples
	.venv/bin/ruff format --check src tests benchmarks examples
	.venv/bin/pyright
	.venv/bin/lint-imports

check: lint test  ## everything that a change must pass

clean:  ## remove .venv, builds and caches; runs/ stays
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
