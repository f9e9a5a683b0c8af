# `make help` lists the targets. Each sets up .venv first, by what it needs; a second run finds it ready.
# ARGS goes to the command behind a target:  make demo ARGS="--tokens 50000"   make test ARGS="-k ledger"

# Tests wait as much as they compute, for time-outs above all: twice as many processes as there are cores.
WORKERS ?= 4

VENV ?= .venv
export VENV
# Hundreds of interpreters are started by the tests: what one has compiled is there for the next.
unexport PYTHONDONTWRITEBYTECODE
BIN := $(VENV)/bin
ARGS ?=
REPORTS ?=
.DEFAULT_GOAL := help

.PHONY: help
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: ## move a real embedding that is larger than the pool, and verify every byte
	@scripts/setup demo
	$(BIN)/tensorferry demo $(ARGS)

# The console script, not `python -m pytest`: that would put the repository's root on the path, where the rooms
# could be imported under bare names.
.PHONY: test
test: ## run every test
	@scripts/setup engines
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup $(ARGS)

.PHONY: check
check: lint types imports test ## lint, types, imports and test

.PHONY: lint
lint: ## ruff: rules and format
	@scripts/setup dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: ## mypy --strict on the whole package
	@scripts/setup dev
	$(BIN)/mypy

.PHONY: imports
imports: ## which room may import which
	@scripts/setup dev
	$(BIN)/lint-imports --no-logo

.PHONY: build
build: ## build sdist and wheel into dist/, then install and try the wheel in a clean environment
	@scripts/setup dev
	scripts/check-package dist

.PHONY: explore
explore: ## explore the protocol's states exhaustively
	@scripts/setup dev
	$(BIN)/python -m tensorferry.conformance.explore --all $(ARGS)

.PHONY: simulate
simulate: ## a million seeds and more of the simulated world (ARGS="--seeds N --profile chaos")
	@scripts/setup dev
	$(BIN)/python -m tensorferry.conformance.protocol.simulate --seeds 100000 $(ARGS)

.PHONY: mutants
mutants: ## the machines with one mechanism taken out: the search and the simulation have to find out
	@scripts/setup dev
	$(BIN)/python -m tensorferry.conformance.protocol.matrix $(ARGS)

.PHONY: broken
broken: ## every rule of a transport against every broken transport (an hour of one core)
	@scripts/setup dev
	TENSORFERRY_BROKEN=all $(BIN)/pytest tests/conformance/test_broken.py $(ARGS)

.PHONY: fuzz
fuzz: ## ten minutes of frames and messages that nobody should send (ARGS="--seconds N --seed N")
	@scripts/setup dev
	$(BIN)/python -m tensorferry.conformance.protocol.fuzz --seconds 600 $(ARGS)

.PHONY: transcripts
transcripts: ## record the golden transcripts anew
	@scripts/setup dev
	$(BIN)/python -m tensorferry.conformance.protocol.transcripts --write

# A transport that fails has a report as well, and one that cannot run here has none: both can be seen in the page.
.PHONY: conformance-matrix
conformance-matrix: ## every transport through the suite, one after the other, into docs/conformance-matrix.md
	@scripts/setup engines
	@for pair in memory:Copying shm:Copying tcp:Tcp mooncake:Mooncake nixl:Nixl; do \
		name=$${pair%:*}; \
		PYTHONPATH=tests/conformance $(BIN)/tensorferry conformance run $$name --tier verify \
			--hooks own_hooks:$${pair#*:} --report build/conformance/$$name $(ARGS) \
			|| echo "$$name: exit status $$?"; \
	done
	$(BIN)/python scripts/write_conformance_matrix.py $(REPORTS) build/conformance/*/

.PHONY: conformance-rdma
conformance-rdma: ## the conformance suite's transport rules on mooncake over RDMA verbs, in a throw-away VM
	@scripts/setup engines
	scripts/conformance-rdma $(ARGS)

.PHONY: cuda
cuda: ## the tests that need a GPU, on a machine that has one (docs/cuda.md; TORCH_INDEX=... for a CUDA build of torch)
	@scripts/setup dev
	FERRY_NEEDS_GPU=1 $(BIN)/pytest -p no:xdist tests/gpu $(ARGS)

.PHONY: engines
engines: ## add the optional engines (Mooncake, NIXL) and the system libraries that they need
	@scripts/setup engines

.PHONY: rdma
rdma: ## check mooncake and nixl on real RDMA verbs, in a VM that has them (docs/rdma.md; Debian 12, root, 125 MB once)
	@scripts/setup engines
	@scripts/check-rdma $(ARGS)

# Not a part of `check`: whether SGLang has moved on says nothing about a change here.
.PHONY: sglang-signatures
sglang-signatures: ## is the newest SGLang's interface still what the adapter has? (downloads 39 MB; SGLANG="sglang==...")
	@scripts/setup dev
	rm -rf build/sglang
	$(BIN)/pip install -q --no-deps --target build/sglang "$(or $(SGLANG),sglang)"
	$(BIN)/python tests/plugins/sglang_drift.py build/sglang

.PHONY: clean
clean: ## remove the environment and everything that was built
	rm -rf .venv .venv.lock build dist src/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
