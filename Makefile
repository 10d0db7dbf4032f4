PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup check test bench docs catalogue site

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)$$/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

setup: ## create .venv with all development dependencies
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	if [ -d .git ]; then $(BIN)/pre-commit install; fi

check: ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

test: ## only the tests
	$(BIN)/python -m pytest

bench: ## run the core benchmark
	$(BIN)/python benchmarks/core.py

docs: ## regenerate docs/cli.md and docs/recipe.md
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_recipe.py

catalogue: ## add new messages to the Chinese catalogue, and compile it
	$(BIN)/python docs/generate_catalogue.py

site: ## build the documentation as a site in build/site
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict
