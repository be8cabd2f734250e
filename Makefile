# make demo: evaluate the bundled zoo. make demo-site: its features, as pages. make test: the tests. All make .venv first, once, from pinned versions.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
PARALLEL := --numprocesses auto --maxprocesses 8

.PHONY: demo demo-site test lint types coverage clean

demo: $(VENV)/installed
	$(RUN)/saezoo eval tiny-res all --offline --csv demo.csv

demo-site: $(VENV)/installed
	$(RUN)/saezoo dashboard tiny-res all --offline --evaluate --out dashboards/tiny-res
	$(RUN)/python -m webbrowser "file://$(CURDIR)/dashboards/tiny-res/index.html"

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
	rm -rf $(VENV) demo.csv dashboards
