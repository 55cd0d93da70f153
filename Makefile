PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup quickstart quickstart-generate test test-newest test-oldest quality style

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

RESTAURANTS = recipes/data/restaurants
quickstart-generate: setup
	$(BIN)/python recipes/causal_lm.py --train_file $(RESTAURANTS)/train.jsonl \
		--validation_file $(RESTAURANTS)/validation.jsonl --test_file $(RESTAURANTS)/test.jsonl \
		--num_train_epochs 2 --output_dir outputs/restaurants
	$(BIN)/python recipes/generate.py outputs/restaurants \
		"name: The Red Fox, food: Thai, area: harbour, price: low, rating: 4/5, children: yes" \
		"name: The Old Oak, food: French, area: old town, price: high" --export outputs/restaurants_served

test: setup quality
	$(BIN)/python -m pytest -n logical

# In environments of their own: what the registry has today, and the lower bounds of pyproject.toml. TORCH chooses the
# torch of both, as in `make test-oldest TORCH=torch==2.13.0` on a machine without a GPU: 2.11 was built for CUDA only.
test-newest: TORCH ?= torch
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager $(TORCH) --editable ".[recipes,test]"
	.venv-newest/bin/python -m pytest -n logical

test-oldest: TORCH ?= torch==2.11.0
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt $(TORCH) --editable ".[recipes,test]"
	.venv-oldest/bin/python -m pytest -n logical

quality: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
