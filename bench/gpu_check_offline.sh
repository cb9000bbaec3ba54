#!/bin/sh
# Is this package right and fast on the GPU of this machine? Builds, tests and times it with the Python that is there, beside
# its own torch (2.10 or later), triton and nvcc, and fetches nothing:
#
#     sh bench/gpu_check_offline.sh            PYTHON=... for another than python3
#
# Installs into build/gpu-check and writes gpu-check.json (exit codes: see carerl_kernels.bench.gpu_check). Needs
# scikit-build-core, pybind11, cmake, ninja, the package's dependencies, pytest and hypothesis there; takes some five minutes on
# eight cores where pytest-xdist shares the tests out among them.
set -eu
cd "$(dirname "$0")/.." >/dev/null
python=${PYTHON:-python3}
target=build/gpu-check

fail() {
  echo "gpu-check-offline: $1" >&2
  exit 2
}
capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') ||
  fail "expected a Python with torch and a GPU that it sees, found none: $python (PYTHON=... names another)"
# Before the build takes minutes: what it, the package and the tests import. xdist is not needed, but shares the tests out.
missing=$("$python" -c 'import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' \
  scikit_build_core pybind11 numpy safetensors typer rich pydantic jinja2 pytest hypothesis)
[ -z "$missing" ] || fail "expected $python to have what the build and the tests need, found none of: $missing"
for tool in cmake ninja nvcc; do  # cmake and ninja may be packages of the Python
  command -v "$tool" >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/$tool" ] ||
    "$python" -c "import $tool" 2>/dev/null || fail "expected $tool on PATH (nvcc: or in CUDA_HOME/bin), found none"
done

rm -rf "$target/site"
CARERL_CUDA=ON CARERL_CUDA_ARCHITECTURES=$capability SKBUILD_BUILD_DIR=$target/cmake \
  "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$target/site" .
PYTHONPATH=$PWD/$target/site
export PYTHONPATH
# An editable installation of the package comes before PYTHONPATH: what is tested has to be what was built.
found=$("$python" -c 'import carerl_kernels; print(carerl_kernels.__file__)')
case $found in
  "$PWD/$target/site/"*) ;;
  *) fail "expected to import what was built in $target/site, found $found; uninstall that, or name another PYTHON" ;;
esac
exec "$python" -m carerl_kernels.bench.gpu_check --tests tests --json gpu-check.json
