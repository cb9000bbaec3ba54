"""Who competes in a case: our op, the textbook, the sharp and the compiled PyTorch, for PCA scikit-learn."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import sharp, textbook
from .cases import ALIGNED, CONFLICT, THRESHOLD, Inputs, short
from .expect import Expectation, WrongResult

OURS = "carerl"


@dataclass
class Variant:
    """One way of computing a case.

    Attributes:
        call: computes on the inputs as they are, and returns outputs for :class:`Expectation`.
        reset: puts back what `call` changed beyond the inputs (untimed).
        exact: see :meth:`Expectation.check`.
        note: said beside the result.
        expectation: another one than the case's, where the inputs differ.
    """

    call: Callable[[], dict[str, Any]]
    reset: Callable[[], None] = lambda: None
    exact: bool = False
    note: str = ""
    expectation: Expectation | None = None


def ours(x: Inputs) -> Callable[[], dict[str, Any]]:
    """The op itself."""
    ops, first = torch.ops.carerl, (x.tensors if x.tensors else x.grads)

    def project():
        return {"coeffs": ops.project(x.grads, x.bases, x.scales)}

    def project_list():
        return {"coeffs": ops.project.list(first, x.bases, x.offsets, x.scales)}

    def gram():
        return {"gram": ops.gram(x.bases, x.grads, x.scales)}

    def edit():
        ops.edit_(x.grads, x.bases, x.mix, x.scale, x.scales)
        return {"grads": x.grads}

    def rotate():
        ops.rotate_(x.bases[0], x.grads, x.q)
        return {"rows": x.bases[0]}

    def edit_rotate():
        ops.edit_rotate_(x.grads, x.bases, x.mix, x.scale, 0, x.q)
        return {"grads": x.grads, "rows": x.bases[0]}

    def dacsp():
        return {
            "coeffs": ops.dacsp_(x.grads, x.bases, ALIGNED, CONFLICT, THRESHOLD, None, x.scales)[0],
            "grads": x.grads,
        }

    def dacsp_list():
        c, _ = ops.dacsp_.list(first, x.bases, x.offsets, ALIGNED, CONFLICT, THRESHOLD, None, x.scales)
        return {"coeffs": c, "grads": first}

    def input_project():
        return {"coeffs": ops.input_project([x.grads], x.bases)[0]}

    def input_confine():
        ops.input_confine_([x.grads], x.bases, x.anchor[None], x.bound[None], x.bound[None])
        return {"grads": x.grads}

    def input_dacsp():
        ops.input_dacsp_([x.grads], x.bases, ALIGNED, CONFLICT, THRESHOLD)
        return {"grads": x.grads}

    def pca():
        ops.pca_update_(x.bases[0], x.singular_values, x.grads)
        return {"rows": x.bases[0], "singular_values": x.singular_values}

    return {
        "project": project,
        "project.list": project_list,
        "gram": gram,
        "edit_": edit,
        "rotate_": rotate,
        "edit_rotate_": edit_rotate,
        "dacsp_": dacsp,
        "dacsp_.list": dacsp_list,
        "input_project": input_project,
        "input_confine_": input_confine,
        "input_dacsp_": input_dacsp,
        "pca_update_": pca,
    }[x.case.op]


def textbook_call(x: Inputs, compiled: bool = False) -> Callable[[], dict[str, Any]]:
    """The textbook version, with the flattening that list forms need; `compiled`: through torch.compile."""

    def made(function: Callable) -> Callable:
        return torch.compile(function, dynamic=False) if compiled else function

    op = x.case.op
    project, edit, dacsp = made(textbook.project), made(textbook.edit), made(textbook.dacsp)
    gram, rotate, edit_rotate = made(textbook.gram), made(textbook.rotate), made(textbook.edit_rotate)

    def dacsp_list():
        c, edited = dacsp(x.flat(x.tensors), x.bases, ALIGNED, CONFLICT, x.scales)
        for tensor, offset in zip(x.tensors, x.offsets, strict=True):
            tensor.copy_(edited[0, offset : offset + tensor.numel()])
        return {"coeffs": c, "grads": x.tensors}

    calls: dict[str, Callable[[], dict[str, Any]]] = {
        "project": lambda: {"coeffs": project(x.grads, x.bases, x.scales)},
        "project.list": lambda: {"coeffs": project(x.flat(x.tensors), x.bases, x.scales)},
        "gram": lambda: {"gram": gram(x.grads, x.bases)},
        "edit_": lambda: {"grads": edit(x.grads, x.bases, x.mix, x.scale, x.scales)},
        "rotate_": lambda: {"rows": rotate(x.grads, x.bases[0], x.q)},
        "edit_rotate_": lambda: dict(
            zip(("grads", "rows"), edit_rotate(x.grads, x.bases, x.mix, x.scale, x.q), strict=True)
        ),
        "dacsp_": lambda: dict(
            zip(("coeffs", "grads"), dacsp(x.grads, x.bases, ALIGNED, CONFLICT, x.scales), strict=True)
        ),
        "dacsp_.list": dacsp_list,
        "input_project": lambda: {"coeffs": project(x.grads, x.bases)},
        "input_confine_": lambda: {"grads": textbook.confine(x.grads, x.bases[0], x.anchor, x.bound, x.bound)},
        "input_dacsp_": lambda: {"grads": dacsp(x.grads, x.bases, ALIGNED, CONFLICT)[1]},
        "pca_update_": lambda: dict(
            zip(("rows", "singular_values"), textbook.pca_update(x.grads, x.bases[0], x.singular_values), strict=True)
        ),
    }
    return calls[op]


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
            best = float("inf")
            for _ in range(3):
                x.reset()
                started = time.perf_counter()
                outputs = call()
                best = min(best, time.perf_counter() - started)
                expectation.check(name, outputs, exact=False)
            times[name] = best
        except (WrongResult, RuntimeError) as error:
            reasons.append(f"{name}: {line_of(error)}")
    if not times:
        return "; ".join(reasons)
    fastest = min(times, key=times.__getitem__)
    return Variant(ways[fastest], note=fastest)


def compiled(x: Inputs, expectation: Expectation) -> Variant | str:
    """torch.compile of the textbook version, compiled here; a sentence when that fails."""
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call = textbook_call(x, compiled=True)
            for _ in range(2):
                x.reset()
                expectation.check("compiled", call(), exact=False)
        return Variant(call)
    except Exception as error:  # anything: compilers fail in many ways, and none of them shall end the run
        return f"failed: {line_of(error)}"


def variants(x: Inputs, expectation: Expectation, compiling: bool = True) -> tuple[dict[str, Variant], dict[str, str]]:
    """Competitors of a case, ours first, and why the others are missing."""
    found: dict[str, Variant] = {OURS: Variant(ours(x), exact=True)}
    missing: dict[str, str] = {}
    others: dict[str, Variant | str] = {"textbook": _listed(x, expectation), "sharp": sharpest(x, expectation)}
    if x.case.op != "pca_update_" and not x.tensors:  # nothing to fuse around an SVD; a list is flattened outside
        others["compiled"] = compiled(x, expectation) if compiling else "not run in this preset"
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
