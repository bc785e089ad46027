VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: help install train test test-slow check cards

help:
	@echo "make train      install everything and train on the digits that come with scikit-learn"
	@echo "make test       install everything and run the tests"
	@echo "make test-slow  also those that take minutes"
	@echo "make check      lint and formatting"
	@echo "make cards      train the checkpoint of model_cards/digits; with CIFAR10=cifar10, or a local folder, all"

install: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

train: install
	$(BIN)/accelerate launch examples/train_cifar.py --dataset digits --preset smoke \
		--output_dir runs/digits --resume_from_checkpoint last

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m "not gpu"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

cards: install
	$(BIN)/python model_cards/generate.py $(if $(CIFAR10),--cifar10 "$(CIFAR10)")
