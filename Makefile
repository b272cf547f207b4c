# make demo [TASK=mask|keypoint|faster]   train and evaluate with ZENITH on generated images
# make test                               lint, types and the whole test suite
# make lint                               ruff and mypy alone
# make clean                              the environment and everything generated

PYTHON ?= python3
VENV ?= .venv
TASK ?= mask
# The tests of one file stay together, as they share what is slow to make, and keep the order in which
# tests/conftest.py puts the files.
PYTEST_FLAGS ?= -n auto --dist loadfile --no-loadscope-reorder
OUTPUT ?= output/$(TASK)_rcnn_zenith_adamw

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SET := $(if $(filter keypoint,$(TASK)),figures,shapes)
KIND := $(if $(filter keypoint,$(TASK)),keypoints,instances)

# Container images often forbid bytecode, and each process then compiles all that it imports: 16 s, not 5.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/python datasets/make_shapes.py --task $(KIND) --output datasets/$(SET)
	$(BIN)/python tools/train_net.py --engine torchvision \
	    --config-file configs/quickstart/$(TASK)_rcnn_zenith_adamw.yaml OUTPUT_DIR $(OUTPUT)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

# --no-compile: compiling takes most of a minute, and most of the modules are never imported.
$(INSTALLED): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) output datasets/shapes datasets/figures
