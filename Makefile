# Everything a fresh checkout needs. `make help` lists the targets.
#   PYTHON          interpreter for the virtual environment, 3.11 or newer
#   TORCH_INDEX     extra package index that has PyTorch's CPU builds; empty: the one pip is configured for
#   KVEVICT_MODELS  folder for the models; empty: .cache/models
#   PYTEST_ARGS     further arguments for pytest in `make test`, `make test-more` and `make test-release`
#   MATRIX_ARGS     arguments for `make matrix`, such as `--only Qwen3`
#   BENCH_ARGS      arguments for the benchmarks in `make bench`

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV_PYTHON := .venv/bin/python
# a file's tests stay together, since they share an engine; those that start servers have the machine to themselves,
# and share one of them
PYTEST := $(VENV_PYTHON) -m pytest
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
IN_PROCESS := $(addprefix tests/e2e/test_,gemma3.py inspect.py smollm2.py)
SERVER_TESTS := $(filter-out $(IN_PROCESS),$(sort $(wildcard tests/e2e/test_*.py))) tests/benchmarks/test_small_servers.py tests/benchmarks/test_soak.py
V2_TESTS := tests/engine $(addprefix --ignore=tests/engine/test_,rows.py upstream.py)
# engine tests run on the oldest vLLM with model runner V1 and on the newest with V2, a few of them on the other two pairs
# each vLLM caches what it knows of models in a folder of its own: in one, they would replace each other's
NEWEST := PYTHONPATH=$(CURDIR)/.cache/vllm-0.33$(addprefix :,$(PYTHONPATH)) KVEVICT_VLLM=0.33.0+cpu \
	VLLM_CACHE_ROOT=$(CURDIR)/.cache/vllm-0.33-cache
V2 := VLLM_USE_V2_MODEL_RUNNER=1
# what `make test` leaves to `make test-more`, and both to `make test-release`: CONTRIBUTING.md has the list
NOT_ON_V1 := more or not_on_v1 or for_release
MORE_ON_V2 := more or more_on_v2
# of engines on V1, which is going away, `make test` runs these, and `make test-release` the others
GUARDS_V1 := smoke or on_v1
SMOKE := smoke and not ($(MORE_ON_V2))
export TORCH_INDEX KVEVICT_MODELS

.DEFAULT_GOAL := help
.PHONY: demo test test-more test-release lint bench build clean help setup model models newest

demo: model ## serve a real model with eviction and ask it about a long text
	$(VENV_PYTHON) -m tools.demo

test: lint models newest ## lint, types and the tests that guard every change
	$(PYTEST) -m "not ($(NOT_ON_V1))" $(SERVER_TESTS) $(PYTEST_ARGS)
	$(PYTEST) -m "not ($(NOT_ON_V1))" $(PARALLEL) --ignore=tests/engine $(addprefix --ignore=,$(SERVER_TESTS)) $(PYTEST_ARGS)
	$(PYTEST) -m "($(GUARDS_V1)) and not ($(NOT_ON_V1))" $(PARALLEL) tests/engine $(PYTEST_ARGS)
	$(NEWEST) $(V2) $(PYTEST) -m "not ($(MORE_ON_V2))" $(PARALLEL) $(V2_TESTS) $(PYTEST_ARGS)
	$(NEWEST) $(V2) $(PYTEST) tests/e2e/test_data_parallel.py $(PYTEST_ARGS)
	$(V2) $(PYTEST) -m "$(SMOKE)" $(PARALLEL) $(V2_TESTS) $(PYTEST_ARGS)
	$(NEWEST) $(PYTEST) -m "$(SMOKE)" $(PARALLEL) $(V2_TESTS) $(PYTEST_ARGS)

test-more: models newest ## the tests that `make test` leaves out; those of engines on the newest vLLM with V2 only
	$(PYTEST) -m more $(SERVER_TESTS) $(PYTEST_ARGS)
	$(PYTEST) -m more $(PARALLEL) --ignore=tests/engine $(addprefix --ignore=,$(SERVER_TESTS)) $(PYTEST_ARGS)
	$(NEWEST) $(V2) $(PYTEST) -m "$(MORE_ON_V2)" $(PARALLEL) $(V2_TESTS) $(PYTEST_ARGS)

test-release: models ## what neither of these runs: scripts around the plugin, engines on V1; part of `make release`
	$(PYTEST) -m "not ($(GUARDS_V1) or $(NOT_ON_V1))" $(PARALLEL) tests/engine $(PYTEST_ARGS)
	$(PYTEST) -m for_release $(SERVER_TESTS) $(PYTEST_ARGS)
	$(PYTEST) -m for_release $(PARALLEL) $(addprefix --ignore=,$(SERVER_TESTS)) $(PYTEST_ARGS)

lint: setup ## ruff and mypy
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

bench: model ## every script of benchmarks/, one after the other, and the report on them
	set -e; for script in $$(find benchmarks -name 'bench_*.py' | sort); do \
		echo "== $$script"; $(VENV_PYTHON) -m $$(echo $${script%.py} | tr / .) $(BENCH_ARGS); done
	$(VENV_PYTHON) -m benchmarks.kernels.gpu_figures
	$(VENV_PYTHON) -m benchmarks.kernels.gpu_rates
	$(VENV_PYTHON) -m benchmarks.report

build: setup ## sdist and wheel in dist/
	$(VENV_PYTHON) -m tools.release build

.PHONY: release
release: clean models ## sdist and wheel, looked at as docs/releasing.md says: all but the upload
	$(VENV_PYTHON) -m tools.release release
	KVEVICT_DIST=$(CURDIR)/dist $(PYTEST) -m more tests/test_packaging.py $(PYTEST_ARGS)
	$(MAKE) test-release
	sha256sum dist/*

.PHONY: matrix
matrix: setup ## every family of models that has no row in tools/matrix/matrix.csv, one after the other
	$(VENV_PYTHON) -m tools.matrix $(MATRIX_ARGS)
	$(VENV_PYTHON) -m tools.matrix.table --write docs/compatibility.md

.PHONY: docs
docs: setup ## the pages of docs/ as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict --quiet

.PHONY: gpu-pack
gpu-pack: setup ## what a machine with a Hopper GPU and no network needs to run an engine, see docs/gpu.md
	$(VENV_PYTHON) -m tools.gpu pack

clean: ## remove what the targets made, except .venv, the kernels it uses and the models
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST) | sort

setup: ## .venv with all that the other targets need
	@$(PYTHON) tools/setup_venv.py

model: setup ## the model of demo and bench, converted from a package
	@$(VENV_PYTHON) -m tools.build_model SmolLM2-135M-Instruct

models: setup ## every model of the tests
	@$(VENV_PYTHON) -m tools.build_model

newest: setup ## the Python of vLLM 0.33 over the installed extensions, for the tests
	@$(VENV_PYTHON) tools/newest_vllm.py
