# The face of the project: `make demo` and `make test` do everything on a fresh Debian machine.
# PYTHON is Debian's own, so that the test cluster's users can run it too.
PYTHON ?= /usr/bin/python3
VENV ?= $(shell packaging/venv-path)
CLUSTER_DIR ?= /var/tmp/prompttuner-cluster
PYTEST_ARGS ?=

BIN := $(VENV)/bin
SOURCES := $(shell find slurm_plugin broker bank tuner job_templates site_configs examples/small_world -type f \
	-not -name '*.pyc' 2>/dev/null) pyproject.toml
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE = 1

.PHONY: demo test lint cluster cluster-down bench dev clean

demo: $(VENV)/.installed  ## real prompt tuning on warm workers of this machine
	$(BIN)/ptctl demo

test: $(VENV)/.installed lint  ## everything that CI runs, the real Slurm cluster included
	-$(PYTHON) tests/cluster install
	$(BIN)/pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

cluster:  ## an ephemeral real Slurm cluster, and how to use it
	$(PYTHON) tests/cluster up --dir $(CLUSTER_DIR)

cluster-down:
	$(PYTHON) tests/cluster down --dir $(CLUSTER_DIR)

bench: $(VENV)/.installed  ## the benchmarks, as tables
	for name in warm_start submit cli packing cold_start; do $(BIN)/python benchmarks/$$name.py || exit 1; done

dev: $(VENV)/.installed  ## the checkout itself instead of a copy of it
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .

clean: cluster-down
	rm -rf $(VENV) build *.egg-info

# The environment, what the project needs, the project itself: each with its mark.
$(VENV)/.made:
	packaging/debian-packages python3-venv
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.deps: $(VENV)/.made pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt pip setuptools wheel
	umask 022 && $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation '.[dev]'
	touch $@

$(VENV)/.installed: $(VENV)/.deps $(SOURCES)
	umask 022 && $(BIN)/pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	touch $@
