# make demo: the main job on real data.  make test: lint, types, tests.  Both set .venv up first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2

.PHONY: demo test lint types unit clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

demo: $(VENV)/.installed
	mkdir -p demo
	$(BIN)/heedful compare --preset quick --report demo/report.html --json demo/results.json

test: lint types unit

lint: $(VENV)/.installed
	$(BIN)/ruff check src tests scripts
	$(BIN)/ruff format --check src tests scripts

types: $(VENV)/.installed
	$(BIN)/mypy

unit: $(VENV)/.installed
	$(BIN)/pytest -n $(JOBS) --dist worksteal
	HEEDFUL_TYPECHECK=0 $(BIN)/pytest -n $(JOBS) --dist worksteal -m "door or compiled"

clean:
	rm -rf $(VENV)
