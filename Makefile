PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup quickstart test quality style

setup: $(VENV)/.ready-test

$(VENV)/.ready-recipes: EXTRAS = recipes
$(VENV)/.ready-test: EXTRAS = recipes,test
$(VENV)/.ready-recipes $(VENV)/.ready-test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

quickstart: $(VENV)/.ready-recipes
	$(BIN)/python recipes/text_classification.py
	$(BIN)/python recipes/classify.py outputs/text_classification

test: setup quality
	$(BIN)/python -m pytest -n logical

quality: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
