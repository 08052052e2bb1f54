# A thin face over the `dbscale` command.  `make help` lists the targets; every one sets up what it needs.
GRID    ?= configs/grids/demo.yaml
CLUSTER ?= local
STORE   ?= out
DATA    ?= data
PYTHON  ?= python3
ARGS    ?=
FAULTS  ?= 20
TORCH   ?= cuda13

# Handed on in the environment as typed: neither make nor a shell reads `$`, quotes or spaces in them.
$(foreach name,GRID CLUSTER STORE DATA,$(eval override $(name) := $$(value $(name))))
export GRID CLUSTER STORE DATA

VENV  := .venv
STAMP := $(VENV)/.installed
RUN   := $(VENV)/bin/dbscale
WHERE := --grid "$$GRID" --store "$$STORE" --data "$$DATA"
BUILD := constraints/$(TORCH).txt
export PIP_CONSTRAINT := $(CURDIR)/$(BUILD)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup check fix docs test test-slow test-slurm test-gpu chaos shards plan grid hunt status cancel reduce report export clean \
        bench bench-accuracy bench-data bench-dense bench-train bench-cells bench-kernels bench-laws bench-verdicts bench-hunt bench-pages bench-launch bench-gpu replicate mutants

help: ## List the targets
	@echo "make TARGET [GRID=$$GRID] [CLUSTER=$$CLUSTER] [STORE=$$STORE] [DATA=$$DATA]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install exact versions (TORCH=cpu or cuda12 for another torch than CUDA 13's)
$(BUILD):
	@echo "TORCH=$(TORCH): there is no $@; known: cpu, cuda12, cuda13" >&2; exit 1
$(STAMP): pyproject.toml constraints/shared.txt $(BUILD)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dbscale needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.11" >&2; exit 1; }
	@[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	@echo "Downloading the versions of $(BUILD) and what dbscale[dev] needs into $(VENV), once, from the package index:"
	@echo "7 GB on disk with a torch for CUDA, of which torch and its CUDA libraries are 5; 3 GB with TORCH=cpu ..."
	@$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@

check: $(STAMP) ## Format, lint, types and the layer test, in under a minute
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/basedpyright --warnings
	@$(VENV)/bin/python -m pytest -q tests/test_architecture.py

fix: $(STAMP) ## Reformat and mend what the linter can
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

test: $(STAMP) ## Run the tests (ARGS="-k name" to choose)
	@$(VENV)/bin/python -m pytest -q -n 2 -m "not slow and not bench and not slurm" $(ARGS)

test-slow: $(STAMP) ## Run the long tests as well
	@$(VENV)/bin/python -m pytest -q -n 2 -m "not bench and not slurm" $(ARGS)

test-slurm: $(STAMP) ## Run the tests on a SLURM sandbox (root; tests/slurm/sandbox.sh install)
	@DBSCALE_REQUIRE_SLURM=1 DBSCALE_CHAOS_SEED="$(or $(SEED),1)" \
	  $(VENV)/bin/python -m pytest -q -n 2 -m "slurm and not slow" tests/slurm $(ARGS)

test-gpu: $(STAMP) ## Run the kernels' and the training's tests on this machine's GPU (stops where none is visible)
	@$(VENV)/bin/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("test-gpu: no CUDA device is visible")'
	@$(VENV)/bin/python -m pytest -q -n 4 -m gpu tests $(ARGS)
	@$(VENV)/bin/python -m pytest -q -n 4 -m "not gpu" tests/kernels $(ARGS)

chaos: $(STAMP) ## Run a grid on a SLURM sandbox through FAULTS=20 faults at random (SEED=n repeats a run)
	@DBSCALE_REQUIRE_SLURM=1 DBSCALE_CHAOS_FAULTS="$(FAULTS)" $(if $(SEED),DBSCALE_CHAOS_SEED="$(SEED)") \
	  $(VENV)/bin/python -m pytest -q -s tests/slurm/test_chaos.py -m "slurm and slow" $(ARGS)

shards: $(STAMP) ## Pack the grid's datasets into tar shards
	@$(RUN) shards pack --grid "$$GRID" --data "$$DATA" $(ARGS)

plan: $(STAMP) ## Show what is new, done, running and failed, and what it will cost
	@$(RUN) plan $(WHERE) --cluster "$$CLUSTER" $(ARGS)

grid: $(STAMP) ## Run the grid, fit the laws, write the report; type it again to resume
	@$(RUN) submit $(WHERE) --cluster "$$CLUSTER" $(ARGS)

hunt: $(STAMP) ## Look for the boundary in waves, each run where it removes most doubt; type it again to resume
	@$(RUN) hunt $(WHERE) --cluster "$$CLUSTER" $(ARGS)

status: $(STAMP) ## How far it is, what failed and why
	@$(RUN) status $(WHERE) $(ARGS)

cancel: $(STAMP) ## Stop this grid's jobs, and only those
	@$(RUN) cancel $(WHERE) --cluster "$$CLUSTER" $(ARGS)

reduce: $(STAMP) ## Collect the rows and fit the laws
	@$(RUN) reduce $(WHERE) $(ARGS)

report: $(STAMP) ## Write report.html
	@$(RUN) report $(WHERE) $(ARGS)

bench: bench-data bench-dense bench-train bench-kernels bench-laws bench-verdicts bench-launch ## All benchmarks

bench-accuracy: ## CIFAR-10 by our loop and by timm's (ARGS="--cifar cifar-10-batches-bin")
bench-data: ## Loader and decoding beside their peers
bench-dense: ## Segmentation and its loader beside classification
bench-train: ## The loop beside a hand-written one
bench-cells: ## Many small cells on one GPU, alone and side by side (needs one)
bench-kernels: ## Distillation losses beside eager and torch.compile
bench-laws: ## Fits of public tables, with time per fit
bench-verdicts: ## Verdicts of simulated studies with real noise (ARGS="rows.parquet --worlds 600")
bench-hunt: ## Hunts in simulated worlds beside fixed grids (ARGS="--worlds 600 --cache hunts.jsonl")
bench-pages: ## The same through whole pages, with the demo's noise (hours; type it again to go on)
bench-launch: ## Planning, submitting and reducing large grids
bench-accuracy bench-data bench-dense bench-train bench-cells bench-kernels bench-laws bench-verdicts bench-hunt bench-pages bench-launch: $(STAMP)
	@$(VENV)/bin/python tests/bench/$(subst -,_,$@).py $(ARGS)

bench-gpu: $(STAMP) ## The benchmarks that need a GPU, one after another
	@$(VENV)/bin/python tests/bench/bench_kernels.py
	@$(VENV)/bin/python tests/bench/bench_cells.py
	@for model in deit_h2 deit_h8; do for tier in raw jpeg256; do \
	  $(VENV)/bin/python tests/bench/bench_train.py --model $$model --tier $$tier --steps 60 --rounds 3 --steps-only || exit; \
	done; done

replicate: $(STAMP) ## Run the grid ten times with other seeds and compare the verdicts (hours; type it again to resume)
	@$(VENV)/bin/python tests/bench/bench_replicate.py --grid "$$GRID" --store "$$STORE" --data "$$DATA" $(ARGS)

docs: $(STAMP) ## Make the documentation as pages: docs/_build/html/index.html
	@$(VENV)/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build/html $(ARGS)
	@echo docs/_build/html/index.html

mutants: $(STAMP) ## Plant faults in a wing and say which its fast tests let pass (WING=dbscale/laws ARGS="--count 250")
	@$(VENV)/bin/python tests/bench/mutants.py $(or $(WING),dbscale/laws) $(ARGS)

export: $(STAMP) ## Draw the report's figures as SVG and PDF
	@$(RUN) export $(WHERE) $(ARGS)

clean: ## Remove caches; results (STORE), DATA and .venv stay
	@rm -rf build dist docs/_build .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
