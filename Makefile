# make demo: set up and show. make test: set up and check. Everything lives in .venv; remove it to start over.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types clean

demo: $(VENV)/.runtime
	$(BIN)/tangentlab demo

test: lint types
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.development
	$(BIN)/mypy

$(VENV)/.runtime: pyproject.toml constraints-cpu.txt install.py
	$(PYTHON) install.py $(VENV)
	touch $@

$(VENV)/.development: pyproject.toml constraints-cpu.txt install.py
	$(PYTHON) install.py $(VENV) --dev
	touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV)
