# make demo: evaluate the bundled zoo. make test: the tests. Both make .venv first, once, from pinned versions.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
PARALLEL := --numprocesses auto --maxprocesses 8

.PHONY: demo test lint types coverage clean

demo: $(VENV)/installed
	$(RUN)/saezoo eval tiny-res all --offline --csv demo.csv

test: $(VENV)/installed
	$(RUN)/python -m pytest $(PARALLEL)

lint: $(VENV)/installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(VENV)/installed
	$(RUN)/mypy

coverage: $(VENV)/installed
	$(RUN)/python -m pytest $(PARALLEL) --cov

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --constraint constraints.txt torch
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo.csv
