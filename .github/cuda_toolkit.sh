# nvcc in a manylinux_2_28 image, for wheels with CUDA kernels. Nothing of it goes into the wheel but the static runtime.
set -eu
[ "${CARERL_CUDA:-OFF}" = ON ] || exit 0
dnf install -y dnf-plugins-core
dnf config-manager --add-repo "https://developer.download.nvidia.com/compute/cuda/repos/$CUDA_REPOSITORY/cuda-rhel8.repo"
dnf install -y cuda-minimal-build-13-0
