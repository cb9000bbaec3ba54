"""The ops as citizens of torch: `opcheck` on every overload, `torch.compile` without graph breaks, dispatch."""

from __future__ import annotations

import pytest
import torch
from carerl_kernels import _ops
from helpers import BACKENDS, GPU_BACKENDS, dispatched, same_bits
from test_ops_errors import good, to_device, with_int8

DEVICES = [
    pytest.param(device, marks=[pytest.mark.gpu] if device in GPU_BACKENDS else [])
    for device in dict.fromkeys(b.device for b in BACKENDS if b.missing() is None)
]
on_devices = pytest.mark.parametrize("device", DEVICES)
COMPILERS = ["aot_eager", "inductor"]


def counting(compiler: str):
    """A compiler that counts the graphs it is given. Torch's own takes seconds to import, which collection shall not."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    return CompileCounterWithBackend(compiler)


def low_precision(args: dict) -> dict:
    grads = args["grads"]
    args["grads"] = [g.bfloat16() for g in grads] if isinstance(grads, list) else grads.bfloat16()
    args["bases"] = args["bases"].bfloat16()
    return args


def variants():
    for overload in _ops.SCHEMAS:
        yield pytest.param(overload, dict, id=overload)
    for overload in ("project", "edit_.list", "dacsp_"):
        yield pytest.param(overload, with_int8, id=f"{overload}-int8")
    for overload in ("rotate_", "edit_rotate_.list"):
        yield pytest.param(overload, low_precision, id=f"{overload}-bf16")
    for overload in ("project", "dacsp_"):
        yield pytest.param(overload, lambda a: {**a, "grads": a["grads"][0]}, id=f"{overload}-1d")
    yield pytest.param(
        "pca_update_.list",
        lambda a: {**a, "singular_values": torch.ones(2, 3), "per_tensor": True},
        id="pca_update_.list-per_tensor",
    )
    yield pytest.param(
        "dacsp_.list",
        lambda a: {**a, "root": torch.eye(6).repeat(2, 1, 1), "per_tensor": True},
        id="dacsp_.list-per_tensor",
    )


@on_devices
@pytest.mark.parametrize(("overload", "change"), list(variants()))
def test_opcheck(device, overload, change):
    """Schema (aliasing and mutation as declared), fake kernel (shapes, strides, dtypes), autograd and, with the arguments that
    the others are made of, AOT dispatch, which is the same for all."""
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if change is dict:
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(dispatched(overload), (), to_device(change(good(overload)), device), test_utils=checks)


def test_every_op_is_declared_and_has_a_kernel():
    for overload in _ops.SCHEMAS:
        assert dispatched(overload)._schema.name == f"carerl::{overload.split('.')[0]}"
        key = "CompositeExplicitAutograd"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"carerl::{overload}", key), overload


def loop(grads, bases, root):
    """Look, edit, look again: calls must see what earlier ones wrote. No other op, so inductor generates no C++."""
    seen = []
    for _ in range(3):
        seen.append(torch.ops.carerl.project(grads, bases))
        seen.extend(torch.ops.carerl.dacsp_(grads, bases, 1.25, 0.5, 0.1, root))
    return seen


def list_loop(grads, bases, root):
    seen = []
    for _ in range(3):
        seen.append(torch.ops.carerl.project.list(grads, bases, [0, 128], None, torch.float64, True))
        seen.extend(torch.ops.carerl.dacsp_.list(grads, bases, [0, 128], 1.25, 0.5, 0.1, root))
    return seen


@on_devices
@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_confinement_mutates_what_eager_mutates(device, backend):
    args = to_device(good("input_confine_"), device)
    eager, copies = args["matrices"], [m.clone() for m in args["matrices"]]

    def body(matrices):
        seen = []
        for _ in range(2):
            seen.append(torch.ops.carerl.input_project(matrices, args["directions"]))
            seen.append(torch.ops.carerl.input_confine_(matrices, args["directions"], args["anchor"], args["lower"]))
            seen.append(torch.ops.carerl.input_dacsp_(matrices, args["directions"], 1.5, 0.5, 0.1))
        return seen

    counter = counting(backend)
    found, expected = torch.compile(body, backend=counter, fullgraph=True)(copies), body(eager)
    assert counter.frame_count == 1
    assert all(same_bits(a, b) for a, b in zip([*found, *copies], [*expected, *eager], strict=True))
    assert not torch.equal(found[0], found[3])


@on_devices
@pytest.mark.parametrize("backend", COMPILERS)
@pytest.mark.parametrize("body", [loop, list_loop])
def test_compiled_loops_are_one_graph_and_mutate_what_eager_mutates(device, backend, body):
    args = to_device(good("dacsp_.list" if body is list_loop else "dacsp_"), device)
    bases, root = args["bases"], torch.eye(6, device=device)
    eager = args["grads"]
    start = [g.clone() for g in eager] if body is list_loop else eager.clone()
    copies = [g.clone() for g in eager] if body is list_loop else eager.clone()

    counter = counting(backend)
    compiled = torch.compile(body, backend=counter, fullgraph=True)
    found, expected = compiled(copies, bases, root), body(eager, bases, root)

    assert counter.frame_count == 1, "the loop was compiled, in one piece"
    calls = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("carerl.project" in call for call in calls) == sum("carerl.dacsp_" in call for call in calls) == 3
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], found[3]), "the second look sees the first edit"
    lists = (copies, eager, start) if body is list_loop else ([copies], [eager], [start])
    for mine, reference, original in zip(*lists, strict=True):
        assert same_bits(mine, reference)
        assert not torch.equal(mine, original)

    compiled(copies, bases, root)
    assert counter.frame_count == 1, "a second call compiles nothing"


@on_devices
def test_fake_tensors_carry_shapes_without_data(device):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        grads, bases = torch.empty(5, 1000, device=device), torch.empty(3, 8, 1000, device=device)
        assert torch.ops.carerl.project(grads, bases).shape == (5, 3, 8)
        assert torch.ops.carerl.gram(bases, grads).shape == (29, 29)
        matrices, directions = [torch.empty(7, 9, device=device)] * 2, torch.empty(2, 4, 7, device=device)
        assert torch.ops.carerl.input_project(matrices, directions, True).shape == (2, 9, 4)
        codes, scales = torch.ops.carerl.quantize_bases(bases)
        assert codes.dtype == torch.int8
        assert scales.shape == (3, 8, 8)


@on_devices
def test_no_autograd_graph_is_built(device):
    """Gradients of parameters that require grad are plain data: the ops neither record nor complain."""
    parameter = torch.nn.Parameter(torch.randn(300, device=device))
    bases = torch.randn(2, 3, 300, device=device)
    with torch.no_grad():
        torch.ops.carerl.dacsp_(parameter, bases, 1.0, 0.0, 0.0)
    assert not torch.ops.carerl.project(parameter.detach(), bases).requires_grad
