# Everything lives in .venv beside this file; `make demo` and `make test` set it up themselves.
PYTHON ?= python3
BIN := .venv/bin
UV := $(shell command -v uv 2>/dev/null)

.PHONY: demo test test-slow test-pods test-parity lint format types audit bench clean

demo: .venv/core
	$(BIN)/podwright demo

# Two workers on two cores: more threads of OpenBLAS would only wait for each other.
test: .venv/test
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not parity and not gpu"

test-slow: .venv/test
	$(BIN)/python -m pytest -m "slow and not parity and not gpu"

# One pod config a day, compiled for its TPUs.
test-pods: .venv/tpu
	$(BIN)/python -m pytest tests/test_pods_aot.py -m "not slow"

test-parity: .venv/parity
	$(BIN)/python -m pytest -m parity

lint: .venv/test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: .venv/test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: .venv/test
	$(BIN)/mypy

# Known vulnerabilities, where the index answers, and what is installed by version and licence.
audit: .venv/test
	$(INSTALL) pip-audit pip-licenses
	-$(BIN)/pip-audit --local --skip-editable --progress-spinner off
	$(BIN)/pip-licenses

bench: .venv/parity
	$(BIN)/python -m benchmarks.first_minute
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.loss
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.checkpoint

clean:
	rm -rf .venv

# One stamp file an extra: the environment is rebuilt when pyproject.toml changes.
.venv/pyvenv.cfg:
ifdef UV
	uv venv --quiet --python $(PYTHON) --seed .venv
else
	$(PYTHON) -m venv .venv
endif

INSTALL = $(if $(UV),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check)

.venv/core: pyproject.toml .venv/pyvenv.cfg
	$(INSTALL) -e .
	@touch $@

.venv/test: pyproject.toml .venv/pyvenv.cfg
	$(INSTALL) -e '.[test]'
	@touch $@ .venv/core

.venv/tpu: pyproject.toml .venv/pyvenv.cfg
	$(INSTALL) -e '.[test,tpu]'
	@touch $@ .venv/test .venv/core

.venv/parity: pyproject.toml .venv/pyvenv.cfg
	$(INSTALL) -e '.[test,parity,eval]'
	@touch $@ .venv/test .venv/core
