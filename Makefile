# make demo, make test: each does all of its set-up, once. PYTHON names the interpreter; IGLA_BUILD_CUDA, IGLA_MARCH: setup.py.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup demo test lint bench gpu-check wheelhouse clean

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
EXTRAS ?= dev,hf,data,ray
READY := .venv/.ready
PIP := .venv/bin/python -m pip -qq --disable-pip-version-check
CONSTRAIN := export PIP_CONSTRAINT="$${PIP_CONSTRAINT:-} $$PWD/.venv/constraints.txt"
# Asked only where the configured index has no CPU build.
CPU_INDEX := https://download.pytorch.org/whl/cpu
export PYTHONUNBUFFERED := 1

setup: $(READY)

# A torch with CUDA that is already there is kept: the environment sees it, and the constraint nails its version.
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
	@$(CONSTRAIN); $(PIP) install torch 2>/dev/null || $(PIP) install --extra-index-url $(CPU_INDEX) torch
	@$(CONSTRAIN); $(PIP) install numpy "setuptools>=77" wheel ninja "pybind11>=2.13"
	@echo "[2/3] csrc/ is built, igla-mega[$(EXTRAS)] installed"
	@$(CONSTRAIN); $(PIP) install --no-build-isolation -e ".[$(EXTRAS)]"
	@echo "[3/3] kernels: $$(.venv/bin/python -c 'from igla_mega import ops; print(ops.why_no_kernels or ops.kernels())')"
	@touch $@

demo: $(READY)
	@.venv/bin/python tools/demo.py

test: $(READY)
	@.venv/bin/python -m pytest -q -m "not slow and not gpu"
	@.venv/bin/python -m pytest -q -m "slow and not gpu"

lint: $(READY)
	@echo "ruff, mypy, shellcheck, hadolint"
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/mypy --no-error-summary
	@.venv/bin/shellcheck .ci/run examples/*.sh examples/slurm/*.sbatch
	@.venv/bin/hadolint docker/Dockerfile

bench: $(READY)
	@for program in tools/bench/[a-z]*.py; do echo "== $$program"; .venv/bin/python "$$program"; done

# Parts by themselves: make gpu-check PARTS="build tests"
gpu-check: $(READY)
	@.venv/bin/python tools/gpu_check.py $(PARTS)

# For a machine without a network: there, PIP_NO_INDEX=1 PIP_FIND_LINKS=$$PWD/wheelhouse make setup. Torch is left out.
WHEELHOUSE_PYTHON ?= 3.12
WHEELHOUSE_PLATFORM ?= x86_64
wheelhouse: $(READY)
	@echo "wheels of every dependency for Python $(WHEELHOUSE_PYTHON) into wheelhouse/"
	@$(PIP) freeze --all --exclude-editable | grep -v '^\(torch\|pip\)==' > .venv/wheelhouse.txt
	@$(PIP) download --no-deps --only-binary=:all: --dest wheelhouse --python-version $(WHEELHOUSE_PYTHON) \
	  $(foreach glibc,2_34 2_28 2_27 2_24 2_17 2_5 2014,--platform $(if $(filter 2014,$(glibc)),manylinux2014,manylinux_$(glibc))_$(WHEELHOUSE_PLATFORM)) \
	  --requirement .venv/wheelhouse.txt

clean:
	@rm -rf .venv build dist wheelhouse igla_mega/*.so *.egg-info .mypy_cache .pytest_cache .ruff_cache
