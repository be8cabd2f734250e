# make demo: evaluate the bundled zoo. make test: the tests. Both make .venv first, once, from pinned versions.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test lint types coverage clean

demo: $(VENV)/installed
	$(RUN)/saezoo eval tiny-res all --offline --csv demo.csv

test: $(VENV)/installed
	$(RUN)/python -m pytest

lint: $(VENV)/installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(VENV)/installed
	$(RUN)/mypy

coverage: $(VENV)/installed
	$(RUN)/coverage run -m pytest
	$(RUN)/coverage report

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --constraint constraints.txt torch
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo.csv
