# One command each; `make test` turns a fresh clone into a tested one.

PYTHON ?= python3
VENV := .venv
VENV44 := .venv-optuna44
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# torch is what Optuna's GPSampler needs, and nothing else here; TORCH=0 does without.
TORCH ?= 1
WORKERS ?= 2

.PHONY: demo test check bench docs proto clean servers venvs

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: venvs servers
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.installed
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

proto: $(VENV)/.installed
	.ci/proto $(BIN)/python

venvs: $(VENV)/.installed $(VENV)/.torch-tried $(VENV44)/.installed

servers:
	.ci/servers

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[all,dev]'
	touch $@

$(VENV)/.torch-tried: $(VENV)/.installed
	test $(TORCH) = 0 || $(BIN)/python $(PIP_INSTALL) -c constraints.txt torch \
		|| echo 'torch could not be installed: the tests of GPSampler will be skipped'
	touch $@

# The oldest Optuna that is supported, for the fleets of tests/compat.
$(VENV44)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV44)
	$(VENV44)/bin/python $(PIP_INSTALL) -c constraints.txt 'optuna==4.4.0' -e '.[grpc,postgres,mysql,redis]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV44) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
