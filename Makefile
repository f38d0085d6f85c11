# Everything a person types, and the very commands that CI runs. `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Each of hundreds of processes that the tests start would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo demo-ui test test-all test-slow test-ui check dist format bench soak fuzz docs constraints clean

help:  ## list the commands
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

install: $(STAMP)  ## make .venv with everything in it (the other commands do it when needed)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3 ...")'
	@echo "Installing into .venv (a minute or two, once) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt hatchling editables
	@# Most of 10,000 modules are never imported; the others are compiled when they are.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt --no-build-isolation -e '.[dev,aws]'
	@touch $@

demo: $(STAMP)  ## pictures from the emulator into a local S3, through a real flow; they end in ./demo-output
	@$(BIN)/prefect-eachlabs demo

demo-ui: $(STAMP)  ## the Prefect UI with a worker, a picture, a batch of ten and forms, until Ctrl-C
	@$(BIN)/prefect-eachlabs demo --ui

test: $(STAMP)  ## the tests, but for the slow ones
	$(BIN)/python -m pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder

# Five processes: they wait more than they work. Which tests keep together, and what begins first: tests/conftest.py.
SLOW := $(BIN)/python -m pytest -m slow --dist loadfile --no-loadscope-reorder

test-all: $(STAMP)  ## the slow tests: processes killed, browser, workers, PostgreSQL, the tutorial walked
	$(SLOW) -n 5

test-slow: $(STAMP)  ## the slow tests but for the Prefect UI's
	$(SLOW) -n 4 --ignore=tests/ui

test-ui: $(STAMP)  ## the slow tests of the Prefect UI and workers, on PostgreSQL and in a browser
	$(SLOW) -n 2 tests/ui

check: $(STAMP)  ## lint, format, types, who imports whom, and the workflows
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
	then $(BIN)/zizmor --offline --pedantic --strict-collection --no-progress --quiet .github; \
	else echo "The workflows are not checked: zizmor wants Python 3.11."; fi

dist: $(STAMP)  ## wheel and sdist, into dist/; the wheel tried in an empty environment
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python tools/try_wheel.py --python $(PYTHON) dist/*.whl

format: $(STAMP)  ## fix what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## measure, side by side with simpler ways
	$(BIN)/python benchmarks/run.py

soak: $(STAMP)  ## ten minutes of batches with everything failing, and then the books; writes docs/soak.md
	$(BIN)/python benchmarks/soak.py --output docs/soak.md

fuzz: $(STAMP)  ## ten minutes of hostile answers, pictures, records and tables, fresh each time; writes docs/fuzzing.md
	$(BIN)/python tools/fuzz.py --minutes 10 --output docs/fuzzing.md

# The variable silences a notice about the future of mkdocs, which is no warning about these pages.
docs: $(STAMP)  ## the documentation site, into site/ (open site/index.html); any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

constraints:  ## resolve constraints.txt anew (needs Python 3.10 to 3.13)
	$(PYTHON) tools/make_constraints.py

clean:  ## remove what the commands made
	rm -rf .venv build dist demo-output site .hypothesis .mypy_cache .pytest_cache .ruff_cache
