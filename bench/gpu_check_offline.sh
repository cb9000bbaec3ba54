#!/bin/sh
# Is this package right and fast on the GPU of this machine? Builds, tests and times it with the Python that is there, beside
# its own torch (2.10 or later), triton and nvcc, and fetches nothing:
#
#     sh bench/gpu_check_offline.sh            PYTHON=... for another than python3
#
# Installs into build/gpu-check and writes gpu-check.json (exit codes: see carerl_kernels.bench.gpu_check). Needs
# scikit-build-core, pybind11, cmake, ninja, pytest and hypothesis there; takes some five minutes on eight cores.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
target=build/gpu-check

capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') ||
  { echo "expected a Python with torch and a GPU that it sees, found none: $python" >&2; exit 2; }
rm -rf "$target/site"
CARERL_CUDA=ON CARERL_CUDA_ARCHITECTURES=$capability SKBUILD_BUILD_DIR=$target/cmake \
  "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$target/site" .
PYTHONPATH=$target/site exec "$python" -m carerl_kernels.bench.gpu_check --tests tests --json gpu-check.json
