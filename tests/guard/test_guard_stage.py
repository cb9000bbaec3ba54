"""Recording, storing and loading a stage; what is refused; what survives faults."""

from __future__ import annotations

import json
import resource
import signal

import numpy as np
import pytest
import torch
from carerl_kernels import BasisError, CapabilityGuard, DomainBasis, StreamingPCA
from carerl_kernels.subspace import Layout, StageRecorder
from guard_helpers import Walk, blocks, dense, flat, make_history, make_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

K = 4


def train(model, guard, steps=60, seed=0, lr=0.05, gradients=None):
    """A regression stage; keeps every gradient when a list is given."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    guard.attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(13, 3, generator=generator)
    for _ in range(steps):
        x = torch.randn(8, 13, generator=generator)
        optimizer.zero_grad()
        (model(x) - x @ target).square().mean().backward()
        if gradients is not None:
            gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    guard.detach()


@pytest.mark.parametrize("kind", ["flat", "per_matrix"])
def test_recorded_stage_against_batch_svd(kind, tmp_path):
    model = make_model()
    guard = CapabilityGuard(model, basis=kind, k=K)
    start = [p.detach().clone() for p in model.parameters()]
    gradients = []
    with guard.stage("math", path=tmp_path / "math.safetensors"):
        train(model, guard, gradients=gradients)
    basis = DomainBasis.load(tmp_path / "math.safetensors")
    assert guard.history == ["math"] and basis.info.steps == 60
    delta = flat([a - b.detach() for a, b in zip(start, model.parameters(), strict=True)], model, kind, K)
    rows = dense(basis.directions, model, kind, K)
    captured = best = total = 0.0
    for t, (U, moved) in enumerate(zip(rows, delta, strict=True)):
        G = np.stack([flat(g, model, kind, K)[t] for g in gradients])
        np.testing.assert_allclose(U @ U.T, np.eye(K), atol=1e-5)
        np.testing.assert_allclose(basis.displacement[t], U @ moved, rtol=1e-4, atol=1e-6)
        assert (U @ moved >= -1e-6).all()  # gradient convention: the stage moved against its directions
        captured += np.square(G @ U.T).sum()
        best += np.square(np.linalg.svd(G, compute_uv=False)[:K]).sum()
        total += np.square(G).sum()
    assert captured >= 0.98 * best
    assert basis.info.gradient_capture == pytest.approx(captured / total, rel=0.02)
    explained = sum(np.square(U @ d).sum() for U, d in zip(rows, delta, strict=True))
    assert basis.info.displacement_capture == pytest.approx(
        explained / sum(np.square(d).sum() for d in delta), rel=1e-4
    )


def test_small_tensors_share_one_basis():
    model = make_model()
    layout = Layout.of(model.named_parameters(), "per_matrix", K)
    assert layout.T == len(blocks(model, "per_matrix", K)) == 3  # two matrices of 8k elements or more, one pool
    assert [call.per_tensor for call in layout.calls] == [True, False]


def test_stream_recovers_low_rank_data_exactly():
    torch.manual_seed(0)
    layout = Layout.of([("a", torch.zeros(40, 9)), ("b", torch.zeros(17))], "flat", 5)
    truth = torch.linalg.qr(torch.randn(377, 5))[0].T * torch.tensor([1.0, 0.5, 0.1, 0.05, 0.01]).unsqueeze(1)
    pca = StreamingPCA(layout, 5)
    for _ in range(80):
        g = torch.randn(5) @ truth
        pca.update([g[:360].view(40, 9).clone(), g[360:].clone()])
    rows, _ = pca.directions()
    found = torch.cat([rows[:, :360], rows[:, 384 : 384 + 17]], dim=1).double()
    residual = truth.double() - truth.double() @ found.T @ found
    assert float(residual.norm(dim=1).max()) < 1e-5
    assert float(pca.discarded.sum() / pca.energy.sum()) < 1e-6  # the cut on nearly dependent gradients
    kept = pca.singular_values.square().sum() + pca.discarded.sum()
    assert float(kept / pca.energy.sum()) == pytest.approx(1, abs=5e-6)  # rows are float32


def test_non_finite_gradients_leave_everything_as_it_was():
    model = make_model()
    guard = CapabilityGuard(model, "remove", k=K)
    for basis in make_history(model, "per_matrix", K, 0.5):
        guard.add(basis)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with guard.stage("code") as recorder:
        guard.attach(optimizer)
        for bad in (None, float("nan"), float("inf")):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            if bad is not None:
                list(model.parameters())[2].grad[0, 0] = bad
                params = [p.detach().clone() for p in model.parameters()]
                moments = {k: v["exp_avg"].clone() for k, v in optimizer.state_dict()["state"].items()}
                rows, state = recorder.pca.rows.clone(), guard.state_dict()
            optimizer.step()
        for p, before in zip(model.parameters(), params, strict=True):
            assert torch.equal(p, before)
        for key, before in moments.items():
            assert torch.equal(optimizer.state_dict()["state"][key]["exp_avg"], before)
        assert torch.equal(recorder.pca.rows, rows)
        assert torch.equal(guard.state_dict()["correction"]["anchor"], state["correction"]["anchor"])
    assert guard.report()["dropped_steps"] == 2


class Counted(TorchDispatchMode):
    """How often gradients were read in search of what is not finite."""

    reads = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.reads += op is torch.ops.carerl.all_finite.default
        return op(*args, **(kwargs or {}))


def test_a_known_norm_spares_one_step_the_reading_of_its_gradients():
    model = make_model()
    guard = CapabilityGuard(model, "remove", basis="input", r=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.attach(optimizer)

    def reads(scale, told):
        for p in model.parameters():
            p.grad = torch.full_like(p, scale)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        if told:
            guard.gradient_norm(norm)
        with Counted() as counted:
            optimizer.step()
        return counted.reads

    assert reads(1.0, told=True) == 0
    assert reads(1.0, told=False) == 1
    assert reads(float("nan"), told=True) == 1 and guard.report()["dropped_steps"] == 1
    assert (
        reads(1e30, told=True) == 1 and guard.report()["dropped_steps"] == 1
    )  # the norm overflows, the gradients do not
    guard.gradient_norm(1.0)
    guard.detach()
    guard.attach(optimizer)
    assert reads(float("inf"), told=False) == 1 and guard.report()["dropped_steps"] == 2


def test_a_recorder_fed_nan_by_hand_skips_and_counts():
    model = make_model()
    params = list(model.parameters())
    recorder = StageRecorder("math", Layout.of(model.named_parameters(), "flat", K), params)
    recorder.update([torch.randn_like(p) for p in params])
    before = recorder.pca.rows.clone()
    recorder.update([torch.full_like(p, torch.nan) for p in params])
    assert torch.equal(recorder.pca.rows, before)
    assert int(recorder.pca.skipped) == 1 and int(recorder.pca.seen) == 1


def test_guard_from_files_acts_like_the_guard_that_recorded(tmp_path):
    model = make_model()
    guard = CapabilityGuard(model, "remove", k=K)
    for number, name in enumerate(("math", "chat")):
        with guard.stage(name, path=tmp_path / f"{name}.safetensors"):
            train(model, guard, seed=number)
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    loaded = CapabilityGuard.load(
        tmp_path / "math.safetensors", tmp_path / "chat.safetensors", model=twin, rule="remove"
    )
    assert loaded.history == ["math", "chat"]
    train(model, guard, seed=7, steps=10)
    train(twin, loaded, seed=7, steps=10)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_acting_on_quantised_directions_still_protects(dtype):
    walk = Walk("remove", basis_dtype=dtype, overlap=0.0)
    rows, start = [o.A for o in walk.oracles], walk.blocks_of(walk.params)
    optimizer = torch.optim.SGD(walk.params, lr=0.05)
    walk.guard.attach(optimizer)
    for step in range(40):
        walk.backward(step)
        optimizer.step()
    now = walk.blocks_of(walk.params)
    along = sum(np.square(A @ (a - b)).sum() for A, a, b in zip(rows, start, now, strict=True)) ** 0.5
    moved = sum(np.square(a - b).sum() for a, b in zip(start, now, strict=True)) ** 0.5
    assert along < 0.05 * moved  # relative error of the directions: bf16 .0017, int8 .0065, fp8 .026


@pytest.mark.parametrize(("dtype", "error"), [(torch.int8, 0.01), (torch.float8_e4m3fn, 0.04)], ids=str)
def test_quantised_file_round_trip(tmp_path, dtype, error):
    model = make_model()
    basis = make_history(model, "flat", K, 0.0, names=("math",))[0]
    basis.quantized(dtype=dtype).save(tmp_path / "math.safetensors")
    loaded = DomainBasis.load(tmp_path / "math.safetensors")
    assert loaded.directions.dtype == dtype
    found = (loaded.dequantized().directions - basis.directions).norm() / basis.directions.norm()
    assert 0 < float(found) < error
    CapabilityGuard(model, basis="flat", k=K).add(loaded)


def test_a_path_that_cannot_be_written_is_refused_before_the_stage(tmp_path):
    (tmp_path / "file").touch()
    model = make_model()
    guard = CapabilityGuard(model, k=K)
    refused = pytest.raises(OSError, match=r"math\.safetensors: expected a folder that can be written into")
    with refused, guard.stage("math", path=tmp_path / "file" / "math.safetensors"):
        pytest.fail("the stage began")
    with guard.stage("math", path=tmp_path / "new" / "math.safetensors"):  # nothing is left of the first try
        train(model, guard, seed=0)
    assert guard.history == ["math"]


def test_wrong_sort_of_file_is_refused(tmp_path):
    model = make_model()
    with pytest.raises(FileNotFoundError, match="record one with `carerl basis record`"):
        DomainBasis.load(tmp_path / "absent.safetensors")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(BasisError, match=r"expected a carerl-basis file, found .* 'no format mark'; record one"):
        DomainBasis.load(tmp_path / "other.safetensors")
    path = tmp_path / "math.safetensors"
    make_history(model, "flat", K, 0.0, names=("math",))[0].save(path)
    raw = path.read_bytes()
    (tmp_path / "short.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BasisError, match="damaged or truncated"):
        DomainBasis.load(tmp_path / "short.safetensors")
    tensors = load_file(path)
    meta = {"format": "carerl-basis", "version": "999", "info": "{}"}
    save_file(tensors, tmp_path / "future.safetensors", meta)
    with pytest.raises(BasisError, match="version <= 2, found 999"):
        DomainBasis.load(tmp_path / "future.safetensors")
    save_file(
        tensors, tmp_path / "tampered.safetensors", {**meta, "version": "1", "info": json.dumps({"domain": "math"})}
    )
    with pytest.raises(BasisError, match="damaged"):
        DomainBasis.load(tmp_path / "tampered.safetensors")


def test_another_model_is_refused():
    basis = make_history(make_model(), "flat", K, 0.0, names=("math",))[0]
    wider = torch.nn.Sequential(torch.nn.Linear(14, 11), torch.nn.Tanh(), torch.nn.Linear(11, 7))
    with pytest.raises(BasisError, match=r"another model .*expected parameter 0.weight \[11, 13\], found \[11, 14\]"):
        CapabilityGuard(wider, basis="flat", k=K).add(basis)
    with pytest.raises(BasisError, match="construct the guard with basis='flat', k=4"):
        CapabilityGuard(make_model(), basis="per_matrix", k=K).add(basis)


def test_unchained_checkpoints_warn_and_chained_ones_do_not(tmp_path, recwarn):
    model = make_model()
    guard = CapabilityGuard(model, k=K)
    paths = []
    for number, name in enumerate(("math", "chat")):
        paths.append(tmp_path / f"{name}.safetensors")
        with guard.stage(name, path=paths[-1]):
            train(model, guard, seed=number, steps=8)
    CapabilityGuard.load(*paths, model=model)
    assert not [w for w in recwarn if "ends at weights" in str(w.message)]
    with torch.no_grad():
        model[0].weight += 1
    with pytest.warns(UserWarning, match="'chat' ends at weights that are neither"):
        CapabilityGuard.load(*paths, model=model)


def test_full_disk_keeps_the_old_file_and_leaves_nothing_half_written(tmp_path):
    """A file-size limit makes the write fail half-way, as a full disk does."""
    path = tmp_path / "math.safetensors"
    model = make_model()
    make_history(model, "flat", K, 0.0, names=("math",), seed=1)[0].save(path)
    old = path.read_bytes()
    basis = make_history(model, "flat", K, 0.0, names=("math",), seed=2)[0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match=r"could not write .*math.safetensors.*unchanged; free space"):
            basis.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["math.safetensors"]


def test_stage_that_fails_leaves_no_history(tmp_path):
    model = make_model()
    guard = CapabilityGuard(model, k=K)
    with pytest.raises(KeyboardInterrupt), guard.stage("math", path=tmp_path / "math.safetensors"):  # noqa: PT012
        train(model, guard, steps=3)
        raise KeyboardInterrupt
    assert guard.history == [] and not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="'math': expected at least one finite gradient"), guard.stage("math"):
        pass
    with pytest.raises(RuntimeError, match="stages do not nest"), guard.stage("math"), guard.stage("chat"):
        pass


def test_arguments_out_of_range_are_named():
    model = make_model()
    for options, message in (
        ({"rule": "magic"}, "rule: expected one of instant, integrated"),
        ({"basis": "cube"}, "basis kind: expected one of flat, per_matrix, block, input, found 'cube'"),
        ({"k": 0}, "k: expected at least one direction"),
        ({"every": 0}, "every: expected at least 1, found 0"),
        ({"rule": "bounded", "apply_to": "grad"}, "expected apply_to='update'"),
        ({"max_grad_norm": 1.0}, "max_grad_norm belongs to apply_to='grad'"),
        ({"probe_every": 0}, "probe_every: expected at least 1"),
        ({"energy": 0.0}, "energy: expected 0 < energy <= 1"),
        ({"room": 0.0}, "room: expected 0 < room <= 1, found 0.0"),
        ({"room": 1.5}, "room: expected 0 < room <= 1, found 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            CapabilityGuard(model, **options)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, found torch\.float64"):
        CapabilityGuard(make_model(dtype=torch.float64))
    for p in (frozen := make_model()).parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        CapabilityGuard(frozen)
    with pytest.raises(TypeError, match=r"expected options among rule, basis.*found 'combine'"):
        CapabilityGuard(model, combine="sum")
    with pytest.raises(ValueError, match=r"basis_dtype: expected one of .*found torch\.float64"):
        CapabilityGuard(model, basis_dtype=torch.float64)
    for options in ({"aligned": -1.0}, {"bound": {"math": (0.1, float("nan"))}}, {"conflict": "0"}):
        with pytest.raises(ValueError, match=r"expected a finite number of at least 0"):
            CapabilityGuard(model, **options)
    guard = CapabilityGuard(model, k=K, aligned={"math": 1.0})
    with pytest.raises(ValueError, match="aligned: expected a number for domain 'chat'"), guard.stage("chat"):
        pass


def test_misuse_is_named():
    model = make_model()
    guard = CapabilityGuard(model, k=K, domains=["math", "chat"])
    with pytest.raises(ValueError, match="domain: expected one of math, chat, found 'mth'"), guard.domain("mth"):
        pass
    with pytest.raises(KeyError, match="expected a domain with history"), guard.probe("math"):
        pass
    with pytest.raises(ValueError, match="holds none of them"):
        guard.attach(torch.optim.SGD(make_model().parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, found int"):
        guard.attach(3)

    class BF16_Optimizer(torch.optim.SGD):
        pass

    with pytest.raises(TypeError, match="keeps the weights elsewhere"):
        guard.attach(BF16_Optimizer(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.attach(optimizer)
    with pytest.raises(RuntimeError, match="attached already"):
        guard.attach(optimizer)
    guard.add(make_history(model, "per_matrix", K, 0.0)[0])
    with pytest.raises(RuntimeError, match="expected a gradient, found none"), guard.probe("math"):
        pass


def test_probe_puts_training_gradients_back():
    model = make_model()
    guard = CapabilityGuard(model, "probed", k=K)
    guard.add(make_history(model, "per_matrix", K, 0.0)[0])
    model(torch.randn(4, 13)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    assert guard.probes_due()
    with guard.probe("math"):
        (100 * model(torch.randn(4, 13)).square().sum()).backward()
    assert not guard.probes_due()
    for p, g in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, g)


def test_report_measures_energies_like_snapshots_do():
    walk = Walk("remove", overlap=0.0, track_energy=True)
    optimizer = torch.optim.SGD(walk.params, lr=0.05)
    walk.guard.attach(optimizer)
    plain = make_model()
    aligned = conflicting = total = 0.0
    for step in range(6):
        old = walk.blocks_of(walk.params)
        walk.backward(step)
        plain.load_state_dict(walk.model.state_dict())
        other = torch.optim.SGD(plain.parameters(), lr=0.05)
        for p, q in zip(walk.params, plain.parameters(), strict=True):
            q.grad = p.grad.clone()
        other.step()
        optimizer.step()
        for oracle, a, b in zip(walk.oracles, old, walk.blocks_of(list(plain.parameters())), strict=True):
            c = oracle.A[: walk.k] @ (a - b)
            aligned += np.square(c[c > 0]).sum()
            conflicting += np.square(c[c < 0]).sum()
            total += np.square(a - b).sum()
    report = walk.guard.report()
    energy = report["domains"]["math"]["energy"]
    assert energy["aligned"] == pytest.approx(aligned / total, rel=1e-3)
    assert energy["conflicting"] == pytest.approx(conflicting / total, rel=1e-3)
    assert energy["orthogonal"] == pytest.approx(1 - (aligned + conflicting) / total, rel=1e-3)
    assert 0 < report["touched_share"] < 1
    assert report["domains"]["math"]["net_displacement"] < 1e-3
    json.dumps(report)


def test_domains_without_history_are_open_windows():
    model = make_model()
    guard = CapabilityGuard(model, k=K, domains=["math", "chat"])
    assert guard.report()["open_windows"] == ["math", "chat"]
    guard.add(make_history(model, "per_matrix", K, 0.0, names=("math",))[0])
    assert guard.report()["open_windows"] == ["chat"]


@pytest.mark.parametrize("rule", ["integrated", "bounded", "remove"])
@pytest.mark.parametrize("load_first", [True, False])
def test_interrupted_stage_resumes_exactly(rule, load_first, tmp_path):
    def fresh():
        model = make_model()
        guard = CapabilityGuard(model, rule, k=K)
        for basis in make_history(model, "per_matrix", K, 0.5):
            guard.add(basis)
        return model, guard, torch.optim.AdamW(model.parameters(), lr=0.01)

    def steps(model, optimizer, span):
        for step in span:
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(8, 13)).square().mean().backward()
            optimizer.step()

    whole, guard, optimizer = fresh()
    with guard.stage("code", path=tmp_path / "whole.safetensors"):
        guard.attach(optimizer)
        steps(whole, optimizer, range(20))

    model, guard, optimizer = fresh()
    with pytest.raises(KeyboardInterrupt), guard.stage("code"):  # noqa: PT012 (an interruption is what is tested)
        guard.attach(optimizer)
        steps(model, optimizer, range(11))
        saved = [model.state_dict(), optimizer.state_dict(), guard.state_dict()]
        torch.save(saved, tmp_path / "checkpoint.pt")
        raise KeyboardInterrupt

    saved = torch.load(tmp_path / "checkpoint.pt")
    model, guard, optimizer = fresh()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    if load_first:
        guard.load_state_dict(saved[2])
    with guard.stage("code", path=tmp_path / "resumed.safetensors"):
        guard.attach(optimizer)
        if not load_first:
            guard.load_state_dict(saved[2])
        steps(model, optimizer, range(11, 20))
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    a, b = (DomainBasis.load(tmp_path / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert torch.equal(a.directions, b.directions) and a.info == b.info
    with pytest.raises(ValueError, match="guard state: expected history"):
        CapabilityGuard(make_model(), rule, k=K).load_state_dict(saved[2])


def test_closures_are_refused():
    """The finiteness check would see the gradients of the step before."""
    model = make_model()
    guard = CapabilityGuard(model, k=K)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.attach(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="found a closure"):
        optimizer.step(lambda: torch.tensor(torch.nan))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_grad_mode_records_raw_gradients():
    """Otherwise the second stage's basis would lack every direction it shares with the first."""
    rows = {}
    for apply_to in ("update", "grad"):
        model = make_model()
        guard = CapabilityGuard(model, "remove", basis="flat", k=K, apply_to=apply_to)
        for name in ("math", "chat"):
            with guard.stage(name):
                train(model, guard, steps=12, seed=3, lr=1e-6)  # so small that both see the same gradients
        rows[apply_to] = [guard.basis(name).directions for name in ("math", "chat")]
    for first, second in rows.values():
        assert float((first @ second.T).abs().amax()) > 0.9


def test_coefficient_rows_do_not_depend_on_dtype():
    """A basis recorded in mixed precision fits the same model in float32: h stays with its matrix."""
    model = torch.nn.ParameterDict(
        {"a": torch.zeros(40, 3), "b": torch.zeros(50, 3, dtype=torch.bfloat16), "c": torch.zeros(5)}
    )
    mixed = Layout.of(model.named_parameters(), "per_matrix", K)
    plain = Layout.of(model.float().named_parameters(), "per_matrix", K)
    assert (mixed.T, mixed.offsets) == (plain.T, plain.offsets)
    rows = [{index: row for index, row, _ in layout.places()} for layout in (mixed, plain)]
    assert rows[0] == rows[1] == {0: 0, 1: 1, 2: 2}


def test_parameters_without_gradient_stay_out_of_the_step():
    """A zero gradient in place of none would let momentum and weight decay move a layer that took no part."""
    model = make_model()
    guard = CapabilityGuard(model, "remove", basis="flat", k=K, apply_to="grad")
    guard.add(make_history(model, "flat", K, 0.0)[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.9)
    guard.attach(optimizer)
    unused = model[4].weight
    before = unused.detach().clone()
    for p in model.parameters():
        p.grad = None if p is unused else torch.randn_like(p)
    optimizer.step()
    assert unused.grad is None
    assert torch.equal(unused, before)


def test_rebase_after_loading_weights():
    """Weights changed by hand are not the next step's doing."""
    moved = {}
    for rebase in (True, False):
        model = make_model()
        guard = CapabilityGuard(model, "remove", k=K, every=1)
        guard.add(make_history(model, "per_matrix", K, 0.0)[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        guard.attach(optimizer)
        model.load_state_dict(make_model(seed=5).state_dict())
        if rebase:
            guard.rebase()
        loaded = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moved[rebase] = max(
            float((p.detach() - q).abs().max()) for p, q in zip(model.parameters(), loaded, strict=True)
        )
    assert moved[True] == 0.0 < moved[False]


def test_wrapped_optimizers_and_empty_parameters():
    model = make_model()
    model.register_parameter("empty", torch.nn.Parameter(torch.zeros(0, 4)))
    guard = CapabilityGuard(model, "remove", k=K)

    class Wrapped(torch.optim.Optimizer):
        """Like accelerate's: an Optimizer by class that never called its constructor."""

        def __init__(self, inner):
            self.optimizer = inner

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.attach(Wrapped(optimizer))
    with guard.stage("math"):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert guard.history == ["math"]
    assert guard.report()["dropped_steps"] == 0


def test_a_basis_can_be_saved_again(tmp_path):
    model = make_model()
    guard = CapabilityGuard(model, k=K)
    with guard.stage("math", path=tmp_path / "first.safetensors"):
        train(model, guard, steps=6)
    guard.basis("math").save(tmp_path / "again.safetensors")
    a, b = (DomainBasis.load(tmp_path / f"{name}.safetensors") for name in ("first", "again"))
    assert a.info == b.info
    assert torch.equal(a.directions, b.directions)
    with pytest.raises(KeyError, match=r"basis: expected a domain with history \(math\), found 'chat'"):
        guard.basis("chat")
