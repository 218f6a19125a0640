# Every target does its own set-up in .venv; nothing is installed outside it.
PYTHON ?= python3
BIN := .venv/bin

# The editable install maps each module to its file and holds the compiled kernels: it is made again
# when a module comes, goes or moves, and when a C++ source changes.
INSTALLED_FROM := pyproject.toml .venv/.modules kernels/bitwatt_kernels/cpu/CMakeLists.txt \
	$(wildcard kernels/bitwatt_kernels/cpu/csrc/*)

.PHONY: serve test check fmt bench gpu wheel clean always

serve: .venv/.installed
	$(BIN)/bitwatt serve $(ARGS)

# As many workers as tests/conftest.py says, in its order, a module a worker. ARGS="-n 0" runs the tests
# in one process. They start hundreds of Python processes: each would compile every source again where
# the environment forbids to write the bytecode.
test: .venv/.installed-dev
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/pytest -n logical --maxprocesses 8 --dist loadscope --no-loadscope-reorder $(ARGS)

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed
	$(BIN)/python -m bitwatt.bench $(ARGS)

# Uses the machine's own Python: the packages of a GPU image, and no venv.
gpu:
	PYTHONPATH=server:kernels:clients/python $(PYTHON) -m bitwatt.bench.gpu $(ARGS)

# The native kernels are compiled in; the embedded pair's twin stays in the repository.
wheel: .venv/.installed-dev
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl

clean:
	rm -rf .venv build dist

# What Python brings of pip takes half as long again to install the rest.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else \
		"bitwatt needs Python 3.11 to 3.13; set PYTHON=, this one is " + sys.version)'
	$(PYTHON) -m venv .venv
	$@ -m pip install --quiet --disable-pip-version-check --upgrade pip

# Touched only when the list differs from the one of the last install.
.venv/.modules: .venv/bin/python always
	@find server kernels clients/python -name '*.py' | sort >$@.now
	@if cmp -s $@.now $@; then rm $@.now; else mv $@.now $@; fi

.venv/.installed: $(INSTALLED_FROM) .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

# Every install compiles the native kernels. This one holds the plain one, so it counts for both.
.venv/.installed-dev: $(INSTALLED_FROM) .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch .venv/.installed $@
