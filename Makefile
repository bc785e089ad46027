VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# One process per core, of one thread each; JOBS=0 runs the tests in this process. A file stays in one process, which
# trains once what its tests share, and files start in the order of tests/conftest.py.
JOBS ?= logical
PYTEST = python -m pytest --numprocesses $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# The environments of test-matrix, .venv-NAME, and the options of uv that make them of the newest of everything. uv
# downloads a Python that is not there.
MATRIX = floors gpu-image newest
NEWEST ?= 3.14
PYTHON_floors = 3.10
OPTIONS_floors = --resolution lowest-direct
PYTHON_gpu-image = 3.12
OPTIONS_gpu-image = 'torch==2.11.*' 'transformers==5.17.*' 'huggingface_hub==1.33.*'
PYTHON_newest = $(NEWEST)

.PHONY: help install train test test-slow test-all test-exhaustive test-matrix $(MATRIX:%=test-%) check check-package cards

help:
	@echo "make train            install everything and train on the digits that come with scikit-learn"
	@echo "make test             install everything and run the tests: every behaviour, in minutes"
	@echo "make test-slow        the slow tests alone: more combinations of what make test covers"
	@echo "make test-all         both"
	@echo "make test-exhaustive  what takes longer: every timm model"
	@echo "make test-floors      make test with Python 3.10 and the lowest versions that pyproject.toml allows"
	@echo "make test-matrix      make test with these, with a GPU image of a while ago, and with the newest of everything"
	@echo "make check            lint and formatting"
	@echo "make check-package    whether the wheel installs, and the extras on the oldest and the newest Python"
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
	$(BIN)/$(PYTEST)

test-slow: install
	$(BIN)/$(PYTEST) -m slow

test-all: install
	$(BIN)/$(PYTEST) -m "not exhaustive"

test-exhaustive: install
	$(BIN)/$(PYTEST) -m exhaustive

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'uv>=0.8'

.venv-%/.installed: pyproject.toml | $(BIN)/uv
	$(BIN)/uv venv --quiet --clear --python $(PYTHON_$*) .venv-$*
	$(BIN)/uv pip install --quiet --python .venv-$* --editable ".[dev]" $(OPTIONS_$*)
	touch $@

$(MATRIX:%=test-%): test-%: .venv-%/.installed
	.venv-$*/bin/$(PYTEST)

test-matrix: $(MATRIX:%=test-%)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-package: install | $(BIN)/uv
	$(BIN)/python .ci/check_package.py

cards: install
	$(BIN)/python model_cards/generate.py $(if $(CIFAR10),--cifar10 "$(CIFAR10)")
