"""Triton twins of the GPU kernels, one file per op; installed as ``carerl_kernels.triton_kernels``.

Empty in this version: on GPUs the reference backend serves every op. A module that is added here registers its kernels in a
function ``register() -> tuple[str, ...]`` of this package, which returns the names of the ops it serves.
"""
