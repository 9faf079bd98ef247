# Needs Python 3.11 or newer and make; everything else is installed into $(VENV) by the first target that wants it.
#
#   make demo      from a spec to a verified operator, with a report
#   make test      everything that continuous integration checks

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-docs demo test lint format generate check-generated check-schema pytest nightly compile-all compile-matrix compile-versions docs clean distclean

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SPECS := $(wildcard specs/*.yaml)
PYTEST_ARGS ?= -n 2 --dist worksteal -q
# The oldest Triton supported and the newest there is; the tests run on the one in between.
NEWEST_TRITON := $(VENV)/triton-3.9.0
TRITONS := $(VENV)/triton-3.6.0 $(NEWEST_TRITON)
ARCHITECTURES := sm_80,sm_90,sm_100,sm_103,sm_120,gfx942,gfx950

help: ## Show what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

$(STAMP): pyproject.toml constraints-cpu.txt tools/setup.sh
	@tools/setup.sh $(VENV)

install: $(STAMP) ## Create the virtual environment and install nsa_gen into it

demo: $(STAMP) ## Generate, verify and compile llama3_8b's operator; report in build/demo/report.md
	@$(BIN)/nsa-gen demo

test: lint check-schema check-generated pytest compile-versions ## Run what continuous integration runs; make nightly runs the rest

lint: $(STAMP) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Format the code, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: $(STAMP) ## Write generated/ and the JSON Schema again
	$(BIN)/python -m nsa_gen.spec.schema
	$(BIN)/nsa-gen generate $(SPECS)

check-generated: $(STAMP) ## Check that generated/ is what the generator writes
	$(BIN)/nsa-gen generate $(SPECS) --check

check-schema: $(STAMP) ## Check that the JSON Schema is what the models say
	$(BIN)/python -m nsa_gen.spec.schema --check

pytest: $(STAMP) ## Run the tests alone (PYTEST_ARGS="-k window")
	$(BIN)/python -m pytest $(PYTEST_ARGS)

nightly: $(STAMP) ## Run the tests that a run of all leaves out (tests/nightly.py), compile-matrix and compile-all
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m nightly
	$(MAKE) compile-matrix compile-all

compile-all: $(STAMP) $(NEWEST_TRITON) ## Compile every shipped spec for every kind of architecture with the newest Triton
	$(BIN)/nsa-gen compile $(SPECS) --triton $(NEWEST_TRITON) --calls batched --target $(ARCHITECTURES)

$(TRITONS): $(VENV)/triton-%: | $(STAMP)
	rm -rf $@.part && $(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==$* && mv $@.part $@

compile-versions: $(STAMP) $(TRITONS) ## Compile with the oldest and the newest Triton, for a GPU of each vendor
	for folder in $(TRITONS); do \
	    $(BIN)/nsa-gen compile tiny --triton $$folder --calls batched --target gfx942 && \
	    $(BIN)/nsa-gen compile llama3_8b --triton $$folder --calls packed --target sm_90 || exit 1; done
	PYTHONPATH=$(firstword $(TRITONS)) $(BIN)/python -m tests.rendering.lower_kernels

compile-matrix: $(STAMP) $(TRITONS) ## Compile with the oldest and the newest Triton, for more GPUs
	for folder in $(TRITONS); do \
	    $(BIN)/nsa-gen compile tiny --triton $$folder --calls batched --target sm_80,sm_90,sm_100,sm_120 && \
	    $(BIN)/nsa-gen compile llama3_8b --triton $$folder --calls packed --target sm_100,gfx942 || exit 1; done

$(VENV)/.docs: pyproject.toml | $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]' && touch $@

install-docs: $(VENV)/.docs ## Install what builds the documentation's site, of which make test then checks it too

docs: $(VENV)/.docs ## Build the documentation's site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean: ## Remove built files and caches; keep the virtual environment
	rm -rf build dist .hypothesis .pytest_cache .ruff_cache
	find nsa_gen tests generated tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## Remove the virtual environment too
	rm -rf $(VENV)
