# Everything lives in .venv/, made on first use by whichever target needs it, and brought up to date when the constraints change.
# Once made, nothing here needs the network.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench docs clean

help:            ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */make \1\t/' | expand -t 14

setup: $(READY)  ## make .venv with everything in it

# torch comes first and alone, by the exact pin of the constraints: whichever build of that the index has (for a CPU alone, or
# gigabytes with CUDA: both will do), no other is fetched beside it.
$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $@

demo: $(READY)   ## the article on real MNIST: two schools, one classifier (ARGS="--help" for its options)
	$(BIN)/housecall demo $(ARGS)

test: check      ## check, then all tests (ARGS="--slow" for those that take minutes)
	$(BIN)/python -m pytest -n 2 $(ARGS)

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)  ## the table of figures, docs/figures.md (about 5 minutes on a quiet machine)
	$(BIN)/python bench/figures.py $(ARGS)

docs: $(READY)   ## the site, in site/
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet
	@echo site/index.html

clean:           ## remove what was made, but not your runs and data
	rm -rf .venv site build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
