# Every target makes its own .venv the first time. PYTHON names the interpreter to make it with.
ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := .venv/Scripts
else
PYTHON ?= python3
BIN := .venv/bin
endif

.PHONY: families exactness help demo test test-fast lint format types contracts check bench fuzz clean

help: ## what can be made here
	@$(PYTHON) scripts/make_help.py

demo: ## a real model over three processes on this machine
	@$(PYTHON) scripts/bootstrap.py demo
	@$(BIN)/farflung demo

test: ## every test
	@$(PYTHON) scripts/bootstrap.py demo dev
	@$(BIN)/python -m pytest

test-fast: ## the tests that need neither real weights nor many processes
	@$(PYTHON) scripts/bootstrap.py demo dev
	@$(BIN)/python -m pytest -m "not slow"

lint: ## ruff: rules and format
	@$(PYTHON) scripts/bootstrap.py demo dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: ## ruff: mend what it can
	@$(PYTHON) scripts/bootstrap.py demo dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: ## mypy --strict
	@$(PYTHON) scripts/bootstrap.py demo dev
	@$(BIN)/mypy

contracts: ## import-linter: floors of the house
	@$(PYTHON) scripts/bootstrap.py demo dev
	@$(BIN)/lint-imports

check: test lint types contracts ## all of the above, as CI runs it

bench: ## the speed figures of this machine (minutes)
	@$(PYTHON) scripts/bootstrap.py demo dev
	@$(BIN)/python -m bench

SECONDS ?= 60
fuzz: ## search for bytes that break the decoders, SECONDS=60 each (Linux)
	@$(PYTHON) scripts/bootstrap.py demo dev fuzz
	@$(BIN)/python -m fuzz frames --seconds $(SECONDS)
	@$(BIN)/python -m fuzz records --seconds $(SECONDS)

families: ## tries every model type of transformers, tiny and split in three, and writes docs/families.md (minutes)
	@$(PYTHON) scripts/bootstrap.py demo dev
	@$(BIN)/python scripts/families.py --out docs/families.md

exactness: ## real weights of the built-in list, as far as they are here, split in three against plain transformers (minutes)
	@$(PYTHON) scripts/bootstrap.py demo dev
	@$(BIN)/python -m bench.real_models

clean: ## remove .venv and caches
	@$(PYTHON) -c "import shutil; [shutil.rmtree(d, ignore_errors=True) for d in ('.venv', '.mypy_cache', '.ruff_cache', '.pytest_cache', '.hypothesis')]"
