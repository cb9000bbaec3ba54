"""Who competes in a case: our op, the textbook, the sharp and the compiled PyTorch, for PCA scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from . import sharp, textbook
from .cases import ALIGNED, CONFLICT, THRESHOLD, Inputs
from .cost import short
from .expect import Expectation, WrongResult

OURS = "carerl"
NOT_RUN = "not run in this preset"


@dataclass
class Variant:
    """One way of computing a case."""

    call: Callable[[], dict[str, Any]]  # computes on the inputs as they are; outputs are as in :class:`Expectation`
    reset: Callable[[], None] = lambda: None  # puts back what `call` changed beyond the inputs (untimed)
    exact: bool = False  # see :meth:`Expectation.check`
    note: str = ""  # said beside the result
    expectation: Expectation | None = None  # another one than the case's, where the inputs differ


def ours(x: Inputs) -> Callable[[], dict[str, Any]]:
    """The op itself."""
    ops, rule = torch.ops.carerl, (ALIGNED, CONFLICT, THRESHOLD)
    call: Callable[[], Any] = {
        "project": lambda: ops.project(x.grads, x.bases, x.scales),
        "project.list": lambda: ops.project.list(x.tensors, x.bases, x.offsets, x.scales),
        "gram": lambda: ops.gram(x.bases, x.grads, x.scales),
        "edit_": lambda: ops.edit_(x.grads, x.bases, x.mix, x.scale, x.scales),
        "rotate_": lambda: ops.rotate_(x.bases[0], x.grads, x.q),
        "edit_rotate_": lambda: ops.edit_rotate_(x.grads, x.bases, x.mix, x.scale, 0, x.q),
        "dacsp_": lambda: ops.dacsp_(x.grads, x.bases, *rule, None, x.scales)[0],
        "dacsp_.list": lambda: ops.dacsp_.list(x.tensors, x.bases, x.offsets, *rule, None, x.scales)[0],
        "input_project": lambda: ops.input_project([x.grads], x.bases)[0],
        "input_confine_": lambda: ops.input_confine_([x.grads], x.bases, x.anchor[None], x.bound[None], x.bound[None]),
        "input_dacsp_": lambda: ops.input_dacsp_([x.grads], x.bases, *rule),
        "pca_update_": lambda: ops.pca_update_(x.bases[0], x.singular_values, x.grads),
    }[x.case.op]
    return lambda: x.outputs(call())


def textbook_call(x: Inputs, compiled: bool = False) -> Callable[[], dict[str, Any]]:
    """The textbook version, with the flattening that list forms need; `compiled`: through torch.compile."""
    ways: dict[str, tuple[Callable[..., textbook.Outputs], tuple[Any, ...]]] = {
        "project": (textbook.project, (x.bases, x.scales)),
        "gram": (textbook.gram, (x.bases,)),
        "edit_": (textbook.edit, (x.bases, x.mix, x.scale, x.scales)),
        "rotate_": (textbook.rotate, (x.bases[0], x.q)),
        "edit_rotate_": (textbook.edit_rotate, (x.bases, x.mix, x.scale, x.q)),
        "dacsp_": (textbook.dacsp, (x.bases, ALIGNED, CONFLICT, x.scales)),
        "input_project": (textbook.project, (x.bases,)),
        "input_confine_": (textbook.confine, (x.bases[0], x.anchor, x.bound, x.bound)),
        "input_dacsp_": (textbook.dacsp, (x.bases, ALIGNED, CONFLICT)),
        "pca_update_": (textbook.pca_update, (x.bases[0], x.singular_values)),
    }
    function, arguments = ways[x.case.packet]
    if compiled:
        function = torch.compile(function, dynamic=False)

    def call() -> dict[str, Any]:
        found: dict[str, Any] = function(x.flat(x.tensors) if x.tensors else x.grads, *arguments)
        if x.tensors and "grads" in found:
            for tensor, offset in zip(x.tensors, x.offsets, strict=True):
                tensor.copy_(found["grads"][0, offset : offset + tensor.numel()])
            found["grads"] = x.tensors
        return found

    return call


def _listed(x: Inputs, expectation: Expectation) -> Variant | str:
    """The textbook version, unless it is too inaccurate to be compared with (an SVD in fp32 of millions of columns is)."""
    call = textbook_call(x)
    try:
        x.reset()
        expectation.check("textbook", call(), exact=False)
    except WrongResult as error:
        return f"left out: {error}"
    return Variant(call)


def sharpest(x: Inputs, expectation: Expectation) -> Variant | str:
    """The fastest correct one of the candidates (those that round coefficients on the way may be wrong); else a sentence."""
    times, reasons = {}, []
    ways = sharp.candidates(x)
    for name, call in ways.items():
        try:
            times[name] = sharp.seconds(x, call, partial(expectation.check, name, exact=False))
        except (WrongResult, RuntimeError) as error:
            reasons.append(f"{name}: {line_of(error)}")
    if not times:
        return "; ".join(reasons)
    fastest = min(times, key=times.__getitem__)
    return Variant(ways[fastest], note=fastest)


def compiled(make: Callable[[], Callable[[], dict[str, Any]]], reset: Callable[[], None], checks: Any) -> Variant | str:
    """What `make` gives through torch.compile, compiled here; a sentence when that fails."""
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call = make()
            for _ in range(2):
                reset()
                checks.check("compiled", call(), exact=False)
        return Variant(call)
    except Exception as error:  # anything: compilers fail in many ways, and none of them shall end the run
        return f"failed: {line_of(error)}"


def variants(x: Inputs, expectation: Expectation, compiling: bool = True) -> tuple[dict[str, Variant], dict[str, str]]:
    """Competitors of a case, ours first, and why the others are missing."""
    found: dict[str, Variant] = {OURS: Variant(ours(x), exact=True)}
    missing: dict[str, str] = {}
    others: dict[str, Variant | str] = {"textbook": _listed(x, expectation), "sharp": sharpest(x, expectation)}
    if x.case.op != "pca_update_" and not x.tensors:  # nothing to fuse around an SVD; a list is flattened outside
        make = partial(textbook_call, x, compiled=True)
        others["compiled"] = compiled(make, x.reset, expectation) if compiling else NOT_RUN
    for name, variant in others.items():
        if isinstance(variant, str):
            missing[name] = variant
        else:
            found[name] = variant
    if x.case.basis == torch.int8 and not x.tensors:
        found[f"{OURS} {short(x.case.grad)} bases"] = float_twin(x)
    return found, missing


def float_twin(x: Inputs) -> Variant:
    """Our own op on bases in the dtype of the gradients: what int8 saves."""
    twin = Inputs(replace(x.case, basis=x.case.grad))
    return Variant(ours(twin), twin.reset, exact=True, expectation=Expectation(twin))


def line_of(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
