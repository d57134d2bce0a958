PYTHON ?= python3
VENV := .venv
# One thread for each of the test processes: two that each take all cores would wait for each other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
BIN := $(VENV)/bin
ARGS ?=
STUDY ?= methods
CPU ?=
TORCH_INDEX ?=
CONSTRAINTS ?=

# Words with = that are none of this file's variables are overrides: make train sampler=cps
VARIABLES := PYTHON VENV BIN PYTEST ARGS STUDY CPU TORCH_INDEX CONSTRAINTS
space := $(subst ,, )
# make writes them with \ before \ and a space, and $ twice; a space must not divide a word here.
WORDS := $(subst $$$$,$$,$(subst \$(space),<space>,$(subst \\,<backslash>,$(MAKEOVERRIDES))))
WORDS := $(filter-out $(VARIABLES:=%),$(WORDS))
# As one word each for the shell.
QUOTED := $(foreach word,$(subst ','\'',$(WORDS)),'$(word)')
OVERRIDES := $(subst <backslash>,\,$(subst <space>,$(space),$(QUOTED)))
# Their values are for Hydra: as variables of the environment, make would expand a $ in them.
unexport $(foreach word,$(WORDS),$(firstword $(subst =,$(space),$(word))))
# The main job, unless a word chooses a method or a model, or which run to go on with: then the words say it all.
CHOOSING := experiment sampler steps trained scouting loss penalty advantage model resume
MAIN := $(if $(filter $(addsuffix =%,$(CHOOSING)),$(subst +,,$(WORDS) $(ARGS))),,experiment=diffusion_nft_fast)
PIP = $(BIN)/pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.DEFAULT_GOAL := help

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  %-16s %s\n", $$1, $$2}'

# The stamps follow pyproject.toml, so a changed dependency is installed by the next target.
$(VENV)/.installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "FlowRL needs Python 3.11 to 3.13, not %d.%d: make PYTHON=python3.12 ..." % v)'
	@test -z '$(CPU)' -o -n '$(TORCH_INDEX)' || { echo 'CPU=1 needs TORCH_INDEX=URL, the index of CPU builds that the start page of PyTorch shows'; exit 1; }
	@echo 'Installing into $(VENV): $(if $(CPU),without CUDA,about 6 GB, several minutes)'
	$(PYTHON) -m venv $(VENV)
	$(if $(CPU),$(PIP) --index-url $(TORCH_INDEX) torch torchvision)
	$(PIP) --editable .
	@$(BIN)/python -c 'import torchvision' || { echo 'torch and torchvision do not match: remove $(VENV) and install both in one go'; exit 1; }
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py | $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

setup: $(VENV)/.dev ## Install into .venv, with development tools; CPU=1 TORCH_INDEX=URL without CUDA, CONSTRAINTS=constraints.txt as CI has it

train: $(VENV)/.installed ## Run the main job, the fastest recipe on the embedded model; or what you say: make train sampler=cps loss=dppo; a sweep: ARGS=-m seed=0,1
	$(BIN)/python train.py$(if $(MAIN), $(MAIN))$(if $(ARGS), $(ARGS))$(if $(OVERRIDES), $(OVERRIDES))

test: setup ## Run the tests (15 to 35 minutes on two cores)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: setup ## Run all tests, the slow ones too
	$(PYTEST) $(ARGS)

lint: setup ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: setup ## Write constraints.txt: the versions that are installed here
	$(BIN)/python scripts/constraints.py > constraints.txt.new
	mv constraints.txt.new constraints.txt

benchmark: setup ## Time an iteration against its bare parts
	$(BIN)/python scripts/benchmark.py $(ARGS)

mutation: setup ## Break the numerics in known ways and report what no test notices
	$(BIN)/python scripts/mutation.py $(ARGS)

reproduce: setup ## Run a study from nothing, below outputs/reproduce/<commit>: make reproduce STUDY=methods
	$(BIN)/python scripts/study.py reproduce $(STUDY)

reproduce-quick: setup ## A reduced version of all studies, below outputs/quick/<commit> (half an hour on two cores)
	$(BIN)/python scripts/study.py reproduce --quick

docs: setup ## Build the documentation into docs/_build/html, and docs/metrics.md from the glossary
	$(BIN)/python scripts/metrics_page.py
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d docs/_build/doctrees -b html . docs/_build/html

clean: ## Remove caches and the virtual environment, not the outputs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

.PHONY: help setup train test test-all lint format constraints benchmark mutation reproduce reproduce-quick docs clean
