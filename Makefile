# Every target sets up .venv first, once. PYTHON names the interpreter; for IGLA_BUILD_CUDA and IGLA_MARCH see setup.py.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup demo chaos test test-quick durations lint docs fuzz audit pins bench gpu-check wheelhouse clean

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
EXTRAS ?= dev,hf,data,ray
READY := .venv/.ready
PIP := .venv/bin/python -m pip -qq --disable-pip-version-check
# Of the 25,000 modules that are installed few are imported; those are compiled when they are.
INSTALL := $(PIP) install --no-compile
BUILD_NEEDS := torch numpy "setuptools>=77" wheel ninja "pybind11>=2.13"
CONSTRAIN := export PIP_CONSTRAINT="$${PIP_CONSTRAINT:-} $$PWD/.venv/constraints.txt"
# Used only if the configured index has no CPU build.
CPU_INDEX := https://download.pytorch.org/whl/cpu
export PYTHONUNBUFFERED := 1
BEGUN := $(shell date +%s)
# A wheelhouse is used only with the Python version that it was filled for and a CUDA torch; pip then uses no index.
ifneq ($(wildcard wheelhouse/python),)
ifeq ($(shell $(PYTHON) -c 'import sys, torch; print(*sys.version_info[:2], sep=".") if torch.version.cuda else None' 2>/dev/null),$(shell cat wheelhouse/python))
export PIP_NO_INDEX := 1
export PIP_FIND_LINKS := $(CURDIR)/wheelhouse
endif
endif

setup: $(READY)

# An installed torch with CUDA is kept: the environment includes the system's packages, and a constraint pins its version.
$(READY): pyproject.toml setup.py constraints-cpu.txt $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "igla_mega needs Python 3.11 or newer; name one with make PYTHON=/path/to/python3"; exit 1; }
	@if version=$$($(PYTHON) -c 'import torch; assert torch.version.cuda; print(torch.__version__)' 2>/dev/null); then \
	  echo "[1/3] .venv that keeps the CUDA torch $$version of $(PYTHON)"; \
	  $(PYTHON) -m venv --system-site-packages .venv; \
	  echo "torch==$$version" > .venv/constraints.txt; \
	else \
	  echo "[1/3] .venv with the CPU build of torch"; \
	  $(PYTHON) -m venv .venv; \
	  cp constraints-cpu.txt .venv/constraints.txt; \
	fi
	@$(CONSTRAIN); $(INSTALL) $(BUILD_NEEDS) 2>/dev/null || $(INSTALL) --extra-index-url $(CPU_INDEX) $(BUILD_NEEDS)
	@echo "[2/3] csrc/ is built, igla-mega[$(EXTRAS)] installed"
	@$(CONSTRAIN); $(INSTALL) --no-build-isolation -e ".[$(EXTRAS)]"
	@echo "[3/3] kernels: $$(.venv/bin/python -c 'from igla_mega import ops; print(ops.why_no_kernels or ops.kernels())')"
	@touch $@

demo: $(READY)
	@.venv/bin/python tools/demo.py

# A hundred kills of real runs, about 15 minutes on two cores. Example: make chaos KILLS=20 SEED=7
KILLS ?= 100
SEED ?= 0
chaos: $(READY)
	@.venv/bin/python tools/chaos.py --kills $(KILLS) --seed $(SEED)

# One worker more than the cores of a small machine: tests of whole runs wait for their processes. A file stays on one
# worker (module fixtures are whole runs), and tests/conftest.py has put the longest files first.
TEST_WORKERS ?= 3
PYTEST := .venv/bin/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations=20
test: $(READY)
	@$(PYTEST) -m "not gpu"

# What to run before a commit: every test below half a second, and one of each kind of parity.
test-quick: $(READY)
	@$(PYTEST) -m "quick and not gpu"

# Measures tests/durations.json, on which the order and `quick` rest.
durations: $(READY)
	@$(PYTEST) -m "not gpu" --record-durations

lint: $(READY)
	@echo "ruff, mypy, plain words, shellcheck, hadolint"
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/mypy --no-error-summary
	@.venv/bin/python tools/words.py
	@.venv/bin/shellcheck .ci/run examples/*.sh examples/slurm/*.sbatch
	@.venv/bin/hadolint docker/Dockerfile
	@$(MAKE) --no-print-directory docs

# Writes build/docs/index.html; a broken link is an error.
docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict

# FUZZ_SECONDS: total time. atheris (guided by coverage) is used if it installs.
FUZZ_SECONDS ?= 600
fuzz: $(READY)
	@$(PIP) install atheris 2>/dev/null || echo "atheris does not install here: hypothesis alone"
	@.venv/bin/python tools/fuzz.py $(FUZZ_SECONDS)

# Known vulnerabilities of the installed packages; needs PyPI, and fails where it is not reachable. See docs/dependencies.md.
audit: $(READY)
	@$(PIP) install pip-audit
	@$(PIP) freeze --exclude-editable | sed 's/+cpu$$//' > .venv/audit.txt
	@.venv/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement .venv/audit.txt

# Write the versions that .ci/run installs: those in .venv, for its Python version.
pins: $(READY)
	@version=$$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	{ echo "# Written by make pins: what .ci/run installs on this Python; torch is in constraints-cpu.txt."; \
	  $(PIP) freeze --all --exclude-editable | grep -v '^\(torch\|pip\)==' | sed -E "s/^([^=]+)/\L\1/; s/^([^=]*)_/\1-/; s/^([^=]*)_/\1-/; s/$$/; python_version == \"$$version\"/"; \
	} > constraints-ci.txt

bench: $(READY)
	@for program in tools/bench/[a-z]*.py; do echo "== $$program"; .venv/bin/python "$$program"; done

# Single parts: make gpu-check PARTS="build tests". The set-up by `make` counts towards the nine minutes.
gpu-check: EXTRAS = gpu-check
gpu-check: $(READY)
	@.venv/bin/python tools/gpu_check.py --begun $(BEGUN) $(PARTS)

# For a machine without a network: copy the folder there, and `make gpu-check` installs from it. Torch is left out, and so
# are the packages in HAVE (a `pip freeze` of that machine).
WHEELHOUSE_PYTHON ?= 3.12
WHEELHOUSE_PLATFORM ?= x86_64
wheelhouse: $(READY)
	@.venv/bin/python tools/wheelhouse.py --python $(WHEELHOUSE_PYTHON) --platform $(WHEELHOUSE_PLATFORM) $(if $(HAVE),--have $(HAVE))

clean:
	@rm -rf .venv build dist wheelhouse igla_mega/*.so *.egg-info .mypy_cache .pytest_cache .ruff_cache
