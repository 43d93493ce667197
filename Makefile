# Two commands on a fresh machine: `make demo` builds the embedded model, `make test` runs the suite.
# `make coverage` also reports the branches that no test takes, and is a quarter slower.
# `make generated` rewrites golden files and generated pages.
# `make docs` builds the documentation in site/ and checks its links.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

TESTS := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest \
	-n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test coverage generated check format docs clean

demo: $(VENV)/.installed
	$(BIN)/factory build demo --drop 0.3

test: $(VENV)/.installed-test
	$(TESTS)

coverage: $(VENV)/.installed-test
	$(TESTS) --cov=factory --cov-report=term --cov-fail-under=90

generated: $(VENV)/.installed-test
	UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/cli/test_help.py tests/cli/test_build_file.py tests/report/test_card.py
	$(BIN)/python scripts/write_docs.py

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	$(BIN)/python scripts/write_docs.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # --quiet would hide warnings from --strict

ifdef HASHES  # every file but torch's is checked against hashes.txt
$(VENV)/.installed $(VENV)/.installed-test &: pyproject.toml constraints.txt hashes.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) --require-hashes --no-deps -r hashes.txt
	$(PIP) --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	touch $(VENV)/.installed $(VENV)/.installed-test
else
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -c constraints.txt -e '.[test]'
	touch $@
endif

$(VENV)/.installed-docs: $(VENV)/.installed  # never checked against hashes.txt
	$(PIP) -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) builds dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
