# Every target does its own set-up in .venv; nothing is installed outside it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve test check bench gpu clean

serve: .venv/.installed
	$(BIN)/bitwatt serve $(ARGS)

test: .venv/.installed-dev
	$(BIN)/pytest $(ARGS)

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.installed
	$(BIN)/python -m bitwatt.bench $(ARGS)

# Uses the machine's own Python: the packages of a GPU image, and no venv.
gpu:
	PYTHONPATH=server:kernels:clients/python $(PYTHON) -m bitwatt.bench.gpu $(ARGS)

clean:
	rm -rf .venv build

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else \
		"bitwatt needs Python 3.11 to 3.13; set PYTHON=, this one is " + sys.version)'
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

# One install, not one upon the other: each builds the native kernels.
.venv/.installed-dev: pyproject.toml .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch .venv/.installed $@
