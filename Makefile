# Everything runs in .venv, which is made again when pyproject.toml or constraints.txt change.
#
# pip's own configuration decides where torch comes from. On Linux the default is a CUDA build of
# some gigabytes; on a machine without an NVIDIA GPU take the CPU build instead, with the index
# that PyTorch's installation page names for it (used for torch only):
#
#   make TORCH_INDEX=<url> demo
#
# PYTHON: the interpreter that makes .venv. ARGS: more arguments for unit, demo and bench.
# JOBS: how many tests run at a time; some wait, for processes that they started, so it is one more than two cores.

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
CASES ?= 5000
JOBS ?= 3
# tests start a hundred processes: none compiles the library again
unexport PYTHONDONTWRITEBYTECODE
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help .venv demo resume storms vit aero gallery test lint types unit quick format docs strict apart whole nightly fuzz campaigns operators matrix bench decode tiled gpu endurance extras typed release clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/.demo ## Run the demonstration
	$(BIN)/python examples/demo.py $(ARGS)

resume: .venv/.stamp ## Kill a rank of a run and see it resume with the same losses
	rm -rf out/resume
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 --max-restarts 3 \
		examples/resume.py --kill-at 7 $(ARGS)

storms: .venv/.stamp ## Storm-scale diffusion: train, sample, compare, draw
	$(BIN)/python examples/storm_diffusion.py $(ARGS)

vit: .venv/.stamp ## How a ViT scales: latency, memory, ring attention
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore examples/vit_scaling.py $(ARGS)

aero: .venv/.stamp ## Transolvers on irregular points, sharded and on one device
	OMP_NUM_THREADS=1 $(BIN)/python examples/vehicle_aero.py $(ARGS)

gallery: .venv/.stamp ## Seven families of models, sharded and on one device
	OMP_NUM_THREADS=1 $(BIN)/python examples/gallery.py $(ARGS)

test: lint ## The gate: lint, then types and docs beside unit, which leaves the cores time
	$(MAKE) --no-print-directory -j 2 unit types docs

lint: .venv/.stamp ## Style, formatting, spelling and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports --no-logo

types: .venv/.stamp ## mypy
	$(BIN)/mypy

unit: .venv/.stamp ## The tests; ARGS="-k conv" picks some
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

whole: .venv/.stamp ## Every case of every rule on every layout of the hard list, more samples of operators and plans
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal --whole tests/test_cases.py tests/test_operators.py tests/test_plan.py $(ARGS)

nightly: whole strict apart fuzz ## What the gate has no time for; matrix, too, where its models are installed

quick: .venv/.stamp ## The tests that take no processes and no time, of each case some layouts
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal -m "not slow and not gloo" $(ARGS)

format: .venv/.stamp ## Format and fix what can be fixed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: .venv/.stamp ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

strict: .venv/.stamp ## The tests with the strict transport: what NCCL would do to careless code
	SHARDTENSOR_TRANSPORT=strict OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

apart: .venv/.stamp ## The tests with backward on a thread of its own, as that of a GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal --backward-apart $(ARGS)

fuzz: .venv/.stamp ## Random programs and campaigns of cases; CASES=20000 tries more
	OMP_NUM_THREADS=1 CASES=$(CASES) $(BIN)/pytest -n $(JOBS) --dist worksteal tests/test_programs.py tests/test_campaigns.py $(ARGS)

campaigns: .venv/.stamp ## docs/campaigns.md, from CASES cases of each campaign
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -W ignore -m campaigns --docs $(CASES) > ../docs/campaigns.md

operators: .venv/.stamp ## docs/operators.md, from PyTorch's operator database
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/test_operators.py --docs > docs/operators.md

matrix: .venv/.zoo ## Third-party models, unmodified, with every tool: docs/zoo.md; ARGS="--tools runs tv."
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/matrix.py $(ARGS)
	$(BIN)/python -W ignore benchmarks/matrix.py --docs docs/zoo.md

bench: .venv/.stamp ## What a call costs over the plain one
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/dispatch.py $(ARGS)

decode: .venv/.zoo ## Large images and videos decoded, sharded, in parts and by blended tiles; WHAT=memory
	cd benchmarks && OMP_NUM_THREADS=1 ../$(BIN)/python -W ignore decode.py $(or $(WHAT),exact) $(ARGS)

tiled: .venv/.stamp ## Memory and time of models in parts on one device; ARGS=--large
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/tiled.py $(ARGS)

gpu: .venv/.stamp ## Everything that needs a GPU, in at most 8 minutes: out/gpu/gpu.md
	$(BIN)/python -W ignore benchmarks/gpu.py $(ARGS)

endurance: .venv/.stamp ## A thousand steps, random kills, a hundred starts; ARGS=--help
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/endurance.py $(ARGS)

extras: .venv/.stamp ## Each extra alone, from the wheel in an environment of its own
	OMP_NUM_THREADS=1 $(BIN)/python release/extras.py --pip="$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))" $(ARGS)

typed: .venv/.stamp ## The types of the public API, by pyright
	$(BIN)/python release/typed.py $(ARGS)

release: .venv/.stamp ## Wheel and sdist of a tag, looked through and tried: make release TAG=v0.2.0
	OMP_NUM_THREADS=1 $(BIN)/python release/package.py --pip="$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))" $(TAG) $(ARGS)

clean: ## Remove what the tools leave behind; .venv stays
	rm -rf dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +

.venv: .venv/.stamp

.venv/.torch: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	touch $@

# the demonstration needs a quarter of the packages that tests do
.venv/.demo: .venv/.torch
	$(PIP) install -c constraints.txt -e '.[demo]'
	touch $@

.venv/.stamp: .venv/.torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch .venv/.demo $@

.venv/.zoo: .venv/.stamp
	$(PIP) install -c constraints.txt -e '.[zoo]'
	touch $@
