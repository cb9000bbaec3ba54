"""Bad input: a RuntimeError that names the op, what was expected and what was found, and nothing written."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from carerl_kernels import _ops
from helpers import bits, naming

N, D, K, B = 300, 2, 3, 2  # N of two whole segments and a part


def good(overload: str) -> dict[str, Any]:
    """Valid arguments by name for every overload."""
    torch.manual_seed(0)
    is_list = ".list" in overload
    sizes = (128, 44)
    rows, groups = D * K, 1 if is_list else B
    args: dict[str, Any] = {
        "grads": [torch.randn(size) for size in sizes] if is_list else torch.randn(B, N),
        "bases": torch.randn(D, K, N),
        "scales": None,
        "mix": torch.randn(groups, rows),
        "scale": torch.ones(groups),
        "q": torch.randn(K, K + groups),
        "domain": 1,
        "aligned": 1.5,
        "conflict": 0.5,
        "threshold": 0.0,
        "root": None,
        "singular_values": torch.ones(K),
        "decay": 1.0,
        "seed": 0,
        "block": 128,
        "dtype": torch.int8,
        "rewards": torch.randn(6),
        "group_ids": torch.tensor([0, 0, 0, 4, 4, 4]),
        "domain_ids": None,
        "mode": "group",
        "eps": 1e-6,
        "out_dtype": torch.float32,
        "logits": torch.randn(5, 37),
        "ids": torch.randint(37, (5,)),
        "temperature": 0.7,
        **{name: torch.randn(5) for name in ("grad_logp", "grad_entropy", "logp", "entropy")},
        "matrices": [torch.randn(7, 5) for _ in range(3)],
        "left": torch.randn(3, 7, 4),
        "right": torch.randn(3, 5, 4),
        "domains": 2,
        "directions": torch.randn(3, 4, 5),
        "anchor": torch.randn(3, 7, 4),
        "lower": torch.rand(3, 7, 4),
        "upper": None,
        "packed": torch.randn(3, 15),
        "x": torch.randn(2, 3, 5, dtype=torch.float64),
        "tensors": [torch.randn(7), torch.randn(2, 3).bfloat16()],
    }
    if is_list:
        args |= {"offsets": [0, 128], "per_tensor": False}
    if overload == "input_dacsp_.tensor":
        rows = 4
    if overload == "input_project":
        args |= {"directions": torch.randn(3, 4, 7), "left": True}
    elif overload.startswith("input_"):
        args["left"] = False
    if overload.endswith("tensor"):
        args |= {name: torch.full((rows,), float(args[name])) for name in ("aligned", "conflict", "threshold")}
    if overload == "block_edit_":
        args["mix"] = torch.randn(3, 2, 2, 2)
    if overload.startswith(("rotate_", "pca_update_")):
        args["bases"] = args["bases"][0]
    schema = getattr(torch.ops.carerl, overload.split(".")[0])
    names = [a.name for a in getattr(schema, ([*overload.split("."), "default"])[1])._schema.arguments]
    return {name: args[name] for name in names}


def with_int8(args: dict) -> dict:
    args["bases"] = torch.zeros(args["bases"].shape, dtype=torch.int8)
    args["scales"] = torch.ones(*args["bases"].shape[:-1], 3)
    return args


def put(**changes: Any) -> Callable[[dict], dict]:
    """Replaces arguments; a callable makes the new value from the old one."""

    def change(args: dict) -> dict:
        return {**args, **{name: v(args[name]) if callable(v) else v for name, v in changes.items()}}

    return change


def then(first: Callable[[dict], dict], **changes: Any) -> Callable[[dict], dict]:
    return lambda args: put(**changes)(first(args))


DENSE = ("project", "gram", "edit_", "rotate_", "edit_rotate_", "dacsp_", "dacsp_.tensor", "pca_update_")
LISTS = ("project.list", "gram.list", "edit_.list", "rotate_.list", "edit_rotate_.list", "dacsp_.list",
         "dacsp_.list_tensor", "pca_update_.list")  # fmt: skip
INT8 = ("project", "gram", "edit_", "dacsp_", "project.list", "gram.list", "edit_.list", "dacsp_.list")
ROTATING = ("rotate_", "edit_rotate_", "pca_update_", "rotate_.list", "edit_rotate_.list", "pca_update_.list")
EDITING = ("edit_", "edit_rotate_", "edit_.list", "edit_rotate_.list")
PCA = ("pca_update_", "pca_update_.list")
WITH_Q = ("rotate_", "edit_rotate_", "rotate_.list", "edit_rotate_.list")
SCALAR_RULE, TENSOR_RULE = ("dacsp_", "dacsp_.list"), ("dacsp_.tensor", "dacsp_.list_tensor")
QUANTIZE = ("quantize_bases",)
BLOCKS = ("block_project", "block_edit_")
INPUTS = ("input_project", "input_confine_", "input_dacsp_", "input_dacsp_.tensor")
MATRICES = (*BLOCKS, *INPUTS)
STACKED = tuple(n for n in (*DENSE, *LISTS) if not n.startswith(("rotate_", "pca_update_", "gram")))

# what is wrong: (overloads, change to the arguments, what the message says)
MISTAKES: dict[str, tuple[tuple[str, ...], Callable[[dict], dict], str]] = {
    "grads_3d": (DENSE, put(grads=lambda g: g.unsqueeze(0)), r"grads.*dimensions.*1, 2, 300"),
    "grads_scalar": (DENSE, put(grads=torch.tensor(1.0)), r"grads.*dimensions"),
    "grads_longer": (DENSE, put(grads=torch.randn(B, N + 1)), r"N = 300.*301"),
    "grads_shorter": (DENSE, put(grads=torch.randn(N - 1)), r"N = 300.*299"),
    "grads_int": (DENSE, put(grads=lambda g: g.int()), r"grads.*float32, bfloat16, float16.*int32"),
    "grads_double": (DENSE, put(grads=lambda g: g.double()), r"grads.*float32, bfloat16, float16.*float64"),
    "grads_column_major": (DENSE, put(grads=lambda g: g.t().contiguous().t()), r"grads.*contiguous.*strides"),
    "grads_every_second": (DENSE, put(grads=torch.randn(B, 2 * N)[:, ::2]), r"grads.*contiguous.*strides"),
    "grads_on_meta": (DENSE, put(grads=lambda g: g.to("meta")), r"grads on cpu.*meta"),
    "bases_on_meta": (DENSE, put(bases=lambda u: u.to("meta")), r"on meta.*cpu"),
    "bases_1d": ((*DENSE, *LISTS, *QUANTIZE), put(bases=lambda u: u.flatten()), r"bases.*dimensions"),
    "bases_2d": ((*STACKED, *QUANTIZE), put(bases=lambda u: u[0]), r"bases.*dimensions.*3, 300"),
    "bases_of_all_domains": (("rotate_", "pca_update_"), put(bases=lambda u: u[None]), r"bases.*dimensions.*1, 3, 300"),
    "bases_double": ((*DENSE, *LISTS, *QUANTIZE), put(bases=lambda u: u.double()), r"bases of dtype.*float64"),
    "bases_uint8": ((*DENSE, *LISTS), put(bases=lambda u: u.byte()), r"bases of dtype.*uint8"),
    "bases_strided": ((*DENSE, *LISTS), put(bases=lambda u: torch.cat([u, u], -1)[..., :N]), r"contiguous.*strides"),
    "bases_transposed": ((*DENSE, *LISTS, *QUANTIZE), put(bases=lambda u: u.mT.contiguous().mT), r"strides"),
    "int8_without_scales": (INT8, then(with_int8, scales=None), r"scales with int8 bases.*None"),
    "scales_without_int8": (INT8, put(scales=torch.ones(D, K, 3)), r"no scales with torch.float32"),
    "scales_half": (INT8, then(with_int8, scales=lambda s: s.half()), r"float32 scales.*float16"),
    "scales_2d": (INT8, then(with_int8, scales=lambda s: s[0]), r"scales \[2, 3, .*\(3, 3\)"),
    "scales_wrong_blocks": (INT8, then(with_int8, scales=torch.ones(D, K, 4)), r"power of two.*4"),
    "scales_strided": (INT8, then(with_int8, scales=torch.ones(D, 3, K).mT), r"contiguous float32 scales"),
    "scales_on_meta": (INT8, then(with_int8, scales=lambda s: s.to("meta")), r"scales on cpu.*meta"),
    "fp8_without_scales": (
        INT8,
        then(with_int8, bases=lambda u: u.to(torch.float8_e4m3fn), scales=None),
        r"scales with float8_e4m3fn bases.*None",
    ),
    "fp8_rotated": (ROTATING, put(bases=lambda u: u.to(torch.float8_e4m3fn)), r"found float8_e4m3fn.*never rotated"),
    "int8_rotated": (ROTATING, put(bases=lambda u: u.to(torch.int8)), r"float16, found int8.*never rotated"),
    "out_dtype": (("project", "project.list"), put(out_dtype=torch.float16), r"out_dtype float32 or float64.*float16"),
    "mix_transposed": (EDITING, put(mix=lambda m: torch.zeros(m.shape[1] + 1, m.shape[0])), r"mix \[\d, 6\].*float32"),
    "mix_1d": (EDITING, put(mix=lambda m: m[0]), r"mix \[\d, 6\].*\[6\]"),
    "mix_double": (EDITING, put(mix=lambda m: m.double()), r"mix.*float32.*float64"),
    "mix_strided": (("edit_", "edit_rotate_"), put(mix=torch.ones(6, B).t()), r"contiguous mix.*strides"),
    "mix_on_meta": (EDITING, put(mix=lambda m: m.to("meta")), r"mix on cpu.*meta"),
    "scale_float": (EDITING, put(scale=lambda s: s[0]), r"scale \[\d\].*\[\]"),
    "scale_too_long": (EDITING, put(scale=torch.ones(3)), r"scale \[\d\].*\[3\]"),
    "scale_half": (EDITING, put(scale=lambda s: s.half()), r"scale.*float32.*float16"),
    "q_transposed": (WITH_Q, put(q=lambda q: q.t().contiguous()), r"float32 q \[<= 3, \d\]"),
    "q_of_k_columns": (WITH_Q, put(q=lambda q: q[:, :K].contiguous()), r"float32 q \[<= 3, \d\].*\[3, 3\]"),
    "q_of_more_rows": (WITH_Q, put(q=lambda q: torch.cat([q, q])), r"float32 q \[<= 3, \d\].*\[6, \d\]"),
    "q_per_tensor": (WITH_Q, put(q=lambda q: q.repeat(2, 1, 1)), r"float32 q \[<= 3, \d\].*\[2, 3, \d\]"),
    "q_double": (WITH_Q, put(q=lambda q: q.double()), r"float32 q.*float64"),
    "q_strided": (WITH_Q, put(q=lambda q: q.t().contiguous().t()), r"contiguous q.*strides"),
    "q_on_meta": (WITH_Q, put(q=lambda q: q.to("meta")), r"q on cpu.*meta"),
    "domain_too_high": (("edit_rotate_", "edit_rotate_.list"), put(domain=D), r"domain in 0..1.*2"),
    "domain_negative": (("edit_rotate_", "edit_rotate_.list"), put(domain=-1), r"domain in 0..1.*-1"),
    "aligned_nan": (SCALAR_RULE, put(aligned=float("nan")), r"finite aligned.*nan"),
    "conflict_infinite": (SCALAR_RULE, put(conflict=-float("inf")), r"finite conflict.*-inf"),
    "threshold_nan": (SCALAR_RULE, put(threshold=float("nan")), r"threshold.*nan"),
    "threshold_negative": (SCALAR_RULE, put(threshold=-0.5), r"threshold.*-0.5"),
    "aligned_short": (TENSOR_RULE, put(aligned=torch.ones(K)), r"aligned \[6\].*\[3\]"),
    "conflict_2d": (TENSOR_RULE, put(conflict=torch.ones(D, K)), r"conflict \[6\].*\[2, 3\]"),
    "threshold_double": (TENSOR_RULE, put(threshold=torch.ones(6).double()), r"threshold.*float32.*float64"),
    "root_one_domain": ((*SCALAR_RULE, *TENSOR_RULE), put(root=torch.eye(K)), r"root \[6, 6\].*\[3, 3\]"),
    "root_half": ((*SCALAR_RULE, *TENSOR_RULE), put(root=torch.eye(6).half()), r"root.*float32 or float64.*float16"),
    "root_strided": ((*SCALAR_RULE, *TENSOR_RULE), put(root=torch.ones(6, 12)[:, ::2]), r"contiguous root.*strides"),
    "decay_above_one": (PCA, put(decay=1.01), r"decay in 0..1.*1.01"),
    "decay_negative": (PCA, put(decay=-0.1), r"decay in 0..1.*-0.1"),
    "decay_nan": (PCA, put(decay=float("nan")), r"decay in 0..1.*nan"),
    "values_short": (PCA, put(singular_values=torch.ones(2)), r"singular_values \[3\].*\[2\]"),
    "values_half": (PCA, put(singular_values=torch.ones(3).half()), r"singular_values.*float32 or float64.*float16"),
    "no_tensors": (LISTS, put(grads=[], offsets=[]), r"at least one tensor.*empty"),
    "fewer_offsets": (LISTS, put(offsets=[0]), r"2 offsets.*1"),
    "more_offsets": (LISTS, put(offsets=[0, 128, 256]), r"2 offsets.*3"),
    "offset_misaligned": (LISTS, put(offsets=[0, 130]), r"multiples of 128.*130 at index 1"),
    "offset_negative": (LISTS, put(offsets=[-128, 128]), r"offsets.*-128 at index 0"),
    "segments_overlap": (LISTS, put(grads=[torch.randn(129), torch.randn(44)]), r"overlap.*128 at index 1.*129"),
    "segments_descend": (LISTS, put(offsets=[128, 0]), r"ascending.*0 at index 1"),
    "segment_too_long": (LISTS, put(offsets=[128, 256], grads=[torch.randn(128), torch.randn(45)]), r"N = 300.*301"),
    "mixed_dtypes": (LISTS, put(grads=lambda g: [g[0], g[1].bfloat16()]), r"one dtype.*bfloat16 at index 1"),
    "list_of_ints": (LISTS, put(grads=lambda g: [t.int() for t in g]), r"dtype.*int32 at index 0"),
    "list_of_doubles": (LISTS, put(grads=lambda g: [t.double() for t in g]), r"dtype.*float64 at index 0"),
    "list_strided": (LISTS, put(grads=lambda g: [g[0], torch.randn(11, 4).t()]), r"contiguous.*at index 1"),
    "list_partly_on_meta": (LISTS, put(grads=lambda g: [g[0], g[1].to("meta")]), r"grads\[1\] on cpu.*meta"),
    "block_too_small": (QUANTIZE, put(block=16), r"power of two of at least 32.*16"),
    "block_not_a_power": (QUANTIZE, put(block=96), r"power of two of at least 32.*96"),
    "block_negative": (QUANTIZE, put(block=-128), r"power of two of at least 32.*-128"),
    "quantised_to_bf16": (QUANTIZE, put(dtype=torch.bfloat16), r"dtype int8 or float8_e4m3fn.*bfloat16"),
    "no_matrices": (MATRICES, put(matrices=[]), r"at least one tensor in matrices.*empty"),
    "matrices_3d": (MATRICES, put(matrices=lambda w: [t[None] for t in w]), r"matrices with 2 dimensions.*1, 7, 5"),
    "matrix_of_another_shape": (MATRICES, put(matrices=lambda w: [*w[:2], w[2].t().contiguous()]),
                                r"matrices \[7, 5\] like the first.*\[5, 7\] at index 2"),
    "matrix_strided": (MATRICES, put(matrices=lambda w: [*w[:2], torch.randn(5, 7).t()]), r"contiguous matrices.*index 2"),
    "matrices_of_two_dtypes": (MATRICES, put(matrices=lambda w: [*w[:2], w[2].half()]), r"one dtype.*float16 at index 2"),
    "matrices_double": (MATRICES, put(matrices=lambda w: [t.double() for t in w]), r"one dtype.*float64 at index 0"),
    "matrix_on_meta": (MATRICES, put(matrices=lambda w: [*w[:2], w[2].to("meta")]), r"matrices\[2\] on cpu.*meta"),
    "directions_of_fewer": (INPUTS, put(directions=lambda v: v[:2]), r"directions \[3, 4, [57]\].*\[2, 4, [57]\]"),
    "directions_2d": (INPUTS, put(directions=lambda v: v[0]), r"directions \[3, 0, [57]\].*\[4, [57]\]"),
    "directions_of_outputs": (INPUTS, put(left=lambda side: not side), r"directions \[3, 4, [57]\].*\[3, 4, [57]\]"),
    "directions_strided": (INPUTS, put(directions=lambda v: v.mT.contiguous().mT), r"contiguous directions.*strides"),
    "directions_half": (INPUTS, put(directions=lambda v: v.half()), r"directions.*float32 or bfloat16.*float16"),
    "anchor_of_inputs": (("input_confine_",), put(anchor=torch.zeros(3, 5, 4)), r"anchor \[3, 7, 4\].*\[3, 5, 4\]"),
    "anchor_double": (("input_confine_",), put(anchor=lambda a: a.double()), r"anchor.*float32, found float64"),
    "lower_of_directions": (("input_confine_",), put(lower=torch.zeros(4)), r"lower \[3, 7, 4\].*\[4\]"),
    "upper_strided": (("input_confine_",), put(upper=torch.zeros(3, 4, 7).mT), r"contiguous upper.*strides"),
    "upper_on_meta": (("input_confine_",), put(upper=torch.zeros(3, 7, 4, device="meta")), r"upper on cpu.*meta"),
    "input_aligned_nan": (("input_dacsp_",), put(aligned=float("nan")), r"finite aligned.*nan"),
    "input_threshold_negative": (("input_dacsp_",), put(threshold=-0.5), r"threshold of at least 0.*-0.5"),
    "input_conflict_short": (("input_dacsp_.tensor",), put(conflict=torch.ones(3)), r"conflict \[4\].*\[3\]"),
    "left_of_fewer": (BLOCKS, put(left=lambda u: u[:2]), r"left \[3, 7, 4\].*\[2, 7, 4\]"),
    "left_2d": (BLOCKS, put(left=lambda u: u[0]), r"left \[3, 7, 0\].*\[7, 4\]"),
    "left_strided": (BLOCKS, put(left=lambda u: u.mT.contiguous().mT), r"contiguous left.*strides"),
    "right_for_left": (BLOCKS, put(right=lambda v: torch.randn(3, 7, 4)), r"right \[3, 5, 4\].*\[3, 7, 4\]"),
    "right_low": (BLOCKS, put(right=lambda v: v.bfloat16()), r"right.*float32.*bfloat16"),
    "domains_that_do_not_divide": (("block_project",), put(domains=3), r"domains that divide the 4 columns.*3"),
    "no_domains": (("block_project",), put(domains=0), r"domains that divide the 4 columns.*0"),
    "mix_of_rows": (("block_edit_",), put(mix=torch.randn(3, 8)), r"mix \[3, 1, 4, 4\].*\[3, 8\]"),
    "mix_of_three_domains": (("block_edit_",), put(mix=torch.randn(3, 3, 2, 2)), r"mix \[G, D, r, r\] with D r = 4"),
    "packed_square": (("packed_times",), put(packed=torch.randn(3, 5, 5)), r"packed \[3, 15\].*\[3, 5, 5\]"),
    "packed_double": (("packed_times",), put(packed=lambda p: p.double()), r"packed.*float32.*float64"),
    "x_float": (("packed_times",), put(x=lambda x: x.float()), r"float64 x \[B, G, A\].*float32"),
    "x_strided": (("packed_times",), put(x=lambda x: x.mT.contiguous().mT), r"contiguous float64 x"),
    "numbers_int": (("all_finite",), put(tensors=lambda t: [t[0], t[0].int()]), r"dtype.*int32 at index 1"),
    "numbers_strided": (("all_finite",), put(tensors=[torch.randn(4, 4).t()]), r"contiguous tensors.*index 0"),
    "numbers_on_meta": (("all_finite",), put(tensors=lambda t: [t[0], t[1].to("meta")]), r"tensors\[1\] on cpu.*meta"),
    "int8_quantised_again": (QUANTIZE, put(bases=lambda u: u.to(torch.int8)), r"bases of dtype.*int8"),
}  # fmt: skip
PER_TENSOR_MISTAKES = {
    "mix_of_one": ("edit_.list", put(mix=torch.ones(1, 6), scale=torch.ones(2)), r"mix \[2, 6\].*\[1, 6\]"),
    "scale_of_one": ("edit_.list", put(mix=torch.ones(2, 6), scale=torch.ones(1)), r"scale \[2\].*\[1\]"),
    "q_of_one": ("rotate_.list", put(q=torch.ones(K, K + 1)), r"q \[2, <= 3, 4\].*\[3, 4\]"),
    "root_of_one": ("dacsp_.list", put(root=torch.eye(6)), r"root \[2, 6, 6\].*\[6, 6\]"),
    "values_of_one": ("pca_update_.list", put(singular_values=torch.ones(3)), r"singular_values \[2, 3\].*\[3\]"),
}


def refuse(op, overload: str, args: dict, message: str) -> None:
    tensors = [t for a in args.values() for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
    before = [None if t.is_meta else bits(t).clone() for t in tensors]
    with naming(overload):
        with pytest.raises(RuntimeError) as error:
            op(overload, **args)
        text = str(error.value)
        assert re.search(rf"carerl::{overload.split('.')[0]}: expected .*, found ", text, re.DOTALL), text
        assert re.search(message, text, re.DOTALL), text
        assert all(b is None or torch.equal(b, bits(t)) for b, t in zip(before, tensors, strict=True))


def to_device(args: dict, device: str) -> dict:
    def move(value):
        if isinstance(value, list):
            return [move(v) for v in value]
        return value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value

    return {name: move(value) for name, value in args.items()}


@pytest.mark.parametrize("first", sorted({overloads[0] for overloads, _, _ in MISTAKES.values()}))
def test_mistakes_are_named(op, first):
    """Those that are made with this overload, with all others with which they can be made."""
    for mistake, (overloads, change, message) in MISTAKES.items():
        for overload in overloads if overloads[0] == first else ():
            with naming(mistake):
                refuse(op, overload, to_device(change(good(overload)), op.device), message.replace("cpu", op.device))


def test_mistakes_per_tensor_are_named(op):
    for mistake, (overload, change, message) in PER_TENSOR_MISTAKES.items():
        with naming(mistake):
            refuse(op, overload, to_device({**change(good(overload)), "per_tensor": True}, op.device), message)


def test_what_the_mistakes_start_from_is_accepted(op):
    for overload in _ops.SCHEMAS:
        with naming(overload):
            op(overload, **to_device(good(overload), op.device))


@pytest.mark.parametrize("overload", ["edit_", "edit_rotate_", "dacsp_", "dacsp_.tensor"])
@pytest.mark.parametrize("rows", ["expanded", "windows"])
def test_rows_that_share_memory_are_refused_where_they_are_written(op, overload, rows):
    """Every alias would be edited in turn."""
    args = to_device(good(overload), op.device)
    buffer = torch.randn(2 * N, device=op.device)
    args["grads"] = buffer[:N].expand(B, N) if rows == "expanded" else buffer.unfold(0, N, 100)[:B]
    refuse(op, overload, args, r"grads.*overlap.*strides")


def test_every_backend_takes_the_names_of_the_schema(op):
    for overload in _ops.SCHEMAS:
        kernel = op.kernel(overload)
        if inspect.isfunction(kernel):
            assert list(inspect.signature(kernel).parameters) == list(good(overload)), overload
