VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# One process per core, of one thread each; JOBS=0 runs the tests in this process. A file stays in one process, which
# trains once what its tests share, and files start in the order of tests/conftest.py.
JOBS ?= logical
PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help install train test test-slow test-all test-exhaustive check cards

help:
	@echo "make train            install everything and train on the digits that come with scikit-learn"
	@echo "make test             install everything and run the tests: every behaviour, in minutes"
	@echo "make test-slow        the slow tests alone: more combinations of what make test covers"
	@echo "make test-all         both"
	@echo "make test-exhaustive  what takes longer: every timm model"
	@echo "make check            lint and formatting"
	@echo "make cards            train the checkpoint of model_cards/digits; with CIFAR10=cifar10, or a local folder, all"

install: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

train: install
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		examples/train_cifar.py --dataset digits --preset smoke \
		--output_dir runs/digits --resume_from_checkpoint last

test: install
	$(PYTEST)

test-slow: install
	$(PYTEST) -m slow

test-all: install
	$(PYTEST) -m "not exhaustive"

test-exhaustive: install
	$(PYTEST) -m exhaustive

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

cards: install
	$(BIN)/python model_cards/generate.py $(if $(CIFAR10),--cifar10 "$(CIFAR10)")
