"""Triton twins of the GPU kernels, one file per op; installed as `carerl_kernels.triton_kernels`.

They serve GPUs where the native CUDA library is not installed, and AMD (ROCm builds of torch use the CUDA dispatch key).
Meaning, checks and error messages are those of `_ops.py`; `pca_update_` is the composite of the reference over
`gram` and `rotate_`. Importing this package does not import triton; :func:`register` and :func:`kernels` do.

How they work: an op is one launch per pass, whether over a batch or over a list of hundreds of tensors (`_plan.py`: a
table of chunks on the device). Sums are taken in two deterministic stages, without atomics: every program writes fp64
partial sums, a second kernel adds them in a fixed order. Block sizes follow from dtypes and shapes (`_blocks.py`): no
autotuning, hence the same bits in every run. Nothing waits for the device.
"""

from collections.abc import Callable


def kernels() -> dict[str, Callable]:
    """Kernel of every op overload served, named as in `_ops.SCHEMAS`. Imports triton.

    Releases before 3.5 do not compile products in fp64: the reference serves `gram` beside them.
    """
    import triton

    from . import dacsp, edit, edit_rotate, gram, input, project, quantize_bases, rotate, token_logprobs

    served: dict[str, Callable] = {}
    for module in (project, gram, edit, rotate, edit_rotate, dacsp, input, quantize_bases, token_logprobs):
        served |= module.KERNELS
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
        served = {name: kernel for name, kernel in served.items() if name not in gram.KERNELS}
    return served


def register() -> tuple[str, ...]:
    """Registers for GPU tensors what no native kernel serves, and returns the names of these overloads."""
    from .. import _load, _ops

    gaps = {name: kernel for name, kernel in kernels().items() if not _load.has_kernel(name, "CUDA")}
    for name, kernel in gaps.items():
        _ops._LIB.impl(name, kernel, "CUDA")
    return tuple(gaps)
