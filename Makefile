# Everything lives in .venv and .tools below this folder; nothing is installed elsewhere.
SHELL := /bin/sh
PYTHON ?= python3
PY := .venv/bin/python
PIP := .venv/bin/pip --disable-pip-version-check --quiet
OPA := .tools/opa
REDIS := .tools/redis-server

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-kubernetes image sbom check check-history check-kills reliability soak fmt proto policies docs chart lock bench bench-parts bench-budget bench-scale bench-smoke fuzz audit mutants clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

demo: .venv/demo ## Watch the main job and the attacks on it (no Go, no service needed)
	@.venv/bin/pdp demo

# A file's tests share what they start, so they stay together.
WORKERS ?= --numprocesses=auto --maxprocesses=4 --dist=loadscope
test: .venv/dev $(OPA) .tools/regal .tools/opa-cases .tools/jose $(REDIS) ## Set up what the tests need and run them
	@.venv/bin/pytest -m "not slow and not kubernetes" $(WORKERS) --cov --cov-report=term

test-slow: .venv/dev $(OPA) .tools/opa-cases .tools/crane .tools/toxiproxy-server $(REDIS) ## The suites that take longer: kill loops, long property tests
	@.venv/bin/pytest -m "slow and not alone" $(WORKERS)
	@.venv/bin/pytest -m alone

KUBERNETES := .tools/helm .tools/kubectl .tools/kube-apiserver .tools/etcd .tools/podmonitors.yaml
test-kubernetes: .venv/dev $(OPA) $(KUBERNETES) image ## Image and chart at a real API server (which takes minutes to build, once); as root
	@.venv/bin/pytest -m kubernetes

image: .venv/dev $(OPA) .tools/crane ## Build the image without a container engine, into dist/image
	$(PY) scripts/build_image.py

sbom: image ## Say what is in the image, as CycloneDX, in dist/sbom.cdx.json
	$(PY) scripts/build_sbom.py

SECONDS ?= 600
SEED ?= 1
check-history: .venv/dev $(OPA) .tools/toxiproxy-server $(REDIS) ## Break every store of budgets for SECONDS=600, from SEED=1, and check what came of it
	@$(PY) -m tests.faults.rounds --seconds $(SECONDS) --seed $(SEED)

MINUTES ?= 30
reliability: .venv/dev $(OPA) .tools/toxiproxy-server $(REDIS) ## Break whatever a decision needs in every way, and write docs/reliability.md anew (2 minutes); as root
	$(PY) -m tests.faults.matrix

soak: .venv/dev $(OPA) ## Load a sidecar for MINUTES=30, and see whether what it holds grows: dist/soak.json
	@mkdir -p dist
	@$(PY) -m tests.faults.soak --minutes $(MINUTES) --seed $(SEED) --out dist/soak.json

KILLS ?= 100
check-kills: .venv/dev $(OPA) $(REDIS) ## Kill a sidecar KILLS=100 times under load, from SEED=1, and check what it knows
	@$(PY) -m tests.faults.kills --kills $(KILLS) --seed $(SEED)

fuzz: .venv/dev $(OPA) ## Fuzz each target of tests/fuzz/targets for SECONDS=600
	@$(PY) -m tests.fuzz.run --seconds $(SECONDS)

check: .venv/dev $(OPA) .tools/regal ## Lint, types, and that everything generated is current
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/buf lint
	.venv/bin/buf format --diff --exit-code
	$(PY) scripts/generate_api.py --check
	$(OPA) fmt --fail --list policies
	$(OPA) check --strict --schema pdp/policy/schemas --bundle policies
	.tools/regal lint policies
	$(OPA) test --bundle policies
	$(PY) scripts/build_policies.py --check
	$(PY) scripts/generate_chart_schema.py --check
	.venv/bin/zizmor --offline --quiet --no-progress .github/workflows

GROUP ?=
mutants: .venv/dev $(OPA) ## Change what decides, bit by bit, and see whether the tests notice: GROUP=permit, or all (an hour)
	@$(PY) scripts/mutants.py $(GROUP)

audit: .venv/dev ## Look up what is pinned in the database of known weaknesses, which needs the network
	@$(PY) scripts/audit_dependencies.py

fmt: .venv/dev $(OPA) ## Format Python, proto and Rego
	.venv/bin/ruff check --fix --quiet . || true
	.venv/bin/ruff format --quiet .
	.venv/bin/buf format --write
	$(OPA) fmt --write policies

proto: .venv/dev ## Generate pdp/api from proto/
	$(PY) scripts/generate_api.py

policies: .venv/dev $(OPA) ## Build policies/bundle.tar.gz from policies/
	$(PY) scripts/build_policies.py

docs: .venv/dev $(OPA) .tools/opa-cases ## Generate the reference pages in docs/
	$(PY) scripts/generate_docs.py
	$(PY) -m scripts.generate_permit_vectors
	$(PY) -m tests.conformance.report

chart: .venv/dev ## Generate the schema of the chart's values
	$(PY) scripts/generate_chart_schema.py

lock: .venv/dev ## Pin every dependency with its hashes
	scripts/lock.sh

bench: .venv/dev $(OPA) $(REDIS) .tools/cerbos .tools/peers ## Measure beside the peers, and write docs/benchmarks.md anew (half an hour, on a quiet machine)
	@mkdir -p dist
	$(PY) -m bench.peers --out docs/benchmarks/peers.json
	$(PY) bench/bench_footprint.py --output json >dist/footprint.json
	$(PY) bench/bench_reload.py 60 --output json >dist/reload.json
	$(PY) -m bench.workload --output json >dist/workload.json
	$(PY) -m bench.growth --output json >dist/growth.json
	mv dist/footprint.json dist/reload.json dist/workload.json dist/growth.json docs/benchmarks/
	$(PY) -m bench.peers.page

bench-parts: .venv/dev $(OPA) ## Measure single parts: imports, ledger, rooms, wire, permits, policy, a neighbour's flood
	$(PY) bench/bench_import.py
	$(PY) bench/bench_ledger.py
	$(PY) bench/bench_inside.py
	$(PY) bench/bench_wire.py
	$(PY) bench/bench_stream.py
	$(PY) bench/bench_reusable.py
	$(PY) bench/bench_policy.py
	$(PY) bench/bench_matrix.py
	$(PY) bench/bench_neighbours.py

bench-smoke: .venv/dev ## Fail where a decision's cost is more than a fifth above the recorded one (half a minute, when nothing else runs)
	$(PY) -m bench.smoke

bench-budget: .venv/dev $(REDIS) ## Measure every store of budgets, and what check-then-record lets through
	$(PY) bench/bench_budget.py

bench-scale: .venv/dev $(REDIS) ## Measure 50 sidecars and 500 stubs, and write docs/scale.md anew (6 minutes)
	$(PY) -m bench.scale --out docs/scale.json
	$(PY) -m bench.scale.page

clean: ## Remove what was built; keep .venv and .tools
	rm -rf dist htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .fuzz
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The environment: .venv/demo holds what the demo needs, .venv/dev all.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo: requirements/demo.txt pyproject.toml | .venv/bin/python
	$(PIP) install --require-hashes -r requirements/demo.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

.venv/dev: requirements/dev.txt pyproject.toml | .venv/bin/python
	$(PIP) install --require-hashes -r requirements/dev.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@ .venv/demo

# Servers that come as packages, for tests and benchmarks.
$(REDIS) .tools/etcd: scripts/install_package.py | .venv/bin/python
	$(PY) scripts/install_package.py $(notdir $@)
	@touch -h $@

# An implementation of JOSE that is not ours, for the tests of permits; and a peer.
.tools/jose .tools/cerbos: scripts/install_npm.py | .venv/dev
	$(PY) scripts/install_npm.py $(notdir $@)
	@touch $@

# The peers' clients and libraries, apart from ours.
.tools/peers: requirements/peers.txt | .venv/bin/python
	$(PYTHON) -m venv $@
	$@/bin/pip --disable-pip-version-check --quiet install --require-hashes -r $< || { rm -rf $@; exit 1; }
	@touch $@

# OPA, Regal and the other commands written in Go are built from their Go modules once (minutes), unless they are on PATH.
.tools/%: scripts/install_tool.py | .venv/bin/python
	$(PY) scripts/install_tool.py $*
	@touch -h $@  # it may be a link to a command of the system
