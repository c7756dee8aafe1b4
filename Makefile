# Two commands do everything: `make train` and `make test`. Each creates .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
ARGS ?=
# In a folder of its own: where torchao is found, transformers imports it at every start.
TORCHAO := $(VENV)/torchao

.PHONY: train test lint ext bench clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3,10) <= sys.version_info[:2] <= (3,13) else "autotool_fast needs Python 3.10-3.13; run make PYTHON=/path/to/python3")'
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "torch>=2.11,<2.14"
	$(PY) -m pip install --quiet -e ".[test,bench]"
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(TORCHAO) "torchao>=0.18,<0.19"
	touch $@

train: $(VENV)/.installed
	$(PY) -m autotool_fast.train $(ARGS)

test: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m pytest $(ARGS)
	$(if $(ARGS),,PYTHONPATH=$(TORCHAO) $(PY) -m pytest tests/test_lowbit.py)

lint: $(VENV)/.installed
	$(PY) -m ruff check . $(ARGS)

ext: $(VENV)/.installed
	$(PY) csrc/build.py $(ARGS)

bench: $(VENV)/.installed
	$(PY) -m benchmarks.run_all

clean:
	rm -rf $(VENV) build dist *.egg-info
