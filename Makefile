# make demo [TASK=mask|keypoint|faster]   train and evaluate with ZENITH on generated images
# make test                               the whole test suite
# make lint                               ruff and mypy, for whoever changes the code
# make test-oldest                        the test suite with the oldest version of every requirement
# make package-check [PACKAGE_PYTHON=…]    build wheel and sdist, install the wheel by itself, try it
# make docs                               the documentation as a site, in build/site
# make clean                              the environments and everything generated
# Each takes PYTHON=python3.13, say: that Python, in an environment of its own (.venv-3.13).

PYTHON ?= python3
PACKAGE_PYTHON ?= $(PYTHON)
# A Python that was asked for has an environment of its own: one that is there may be another's.
ifeq ($(origin PYTHON),file)
VENV ?= .venv
else
VENV ?= .venv-$(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
endif
TASK ?= mask
# The tests of one file stay together, as they share what is slow to make, and keep the order in which
# tests/conftest.py puts the files.
PYTEST_FLAGS ?= -n auto --dist loadfile --no-loadscope-reorder
PACKAGE_VENV ?= build/package-venv
OUTPUT ?= output/$(TASK)_rcnn_zenith_adamw

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPMENT := $(VENV)/.development
SET := $(if $(filter keypoint,$(TASK)),figures,shapes)
KIND := $(if $(filter keypoint,$(TASK)),keypoints,instances)

# Container images often forbid bytecode, and each process then compiles all that it imports: 16 s, not 5.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-oldest lint package-check docs clean

demo: $(INSTALLED)
	$(BIN)/python datasets/make_shapes.py --task $(KIND) --output datasets/$(SET)
	$(BIN)/python tools/train_net.py --engine torchvision \
	    --config-file configs/quickstart/$(TASK)_rcnn_zenith_adamw.yaml OUTPUT_DIR $(OUTPUT)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

# Another environment, as other versions of Python have other oldest versions.
test-oldest:
	$(MAKE) test VENV=.venv-oldest PIP_FLAGS="--constraint tests/oldest-requirements.txt"

lint: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

package-check: $(DEVELOPMENT)
	rm -rf dist build/lib
	$(BIN)/python -m build --no-isolation --outdir dist .
	tests/package_check.sh "$(PACKAGE_PYTHON)" $(PACKAGE_VENV) dist/*.whl

docs: $(INSTALLED)
	$(BIN)/properdocs build --strict

PIP := --quiet --disable-pip-version-check --no-compile $(PIP_FLAGS)

# --no-compile: compiling takes most of a minute, and most of the modules are never imported.
$(INSTALLED): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP) -e ".[test]"
	touch $@

$(DEVELOPMENT): $(INSTALLED)
	$(BIN)/python -m pip install $(PIP) -e ".[test,dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-* build dist output datasets/shapes datasets/figures
