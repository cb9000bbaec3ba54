"""Conflict and curvature: exact for quadratic losses, exact restoration, windows of a run, snapshots, shares of Adam's step."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from carerl_kernels.monitor import DriftMonitor
from carerl_kernels.monitor.budget import StepBudget
from carerl_kernels.monitor.split import KeptWeights, split_along, split_since
from carerl_kernels.monitor.windows import Windows
from carerl_kernels.subspace.shards import local
from guard_helpers import make_model
from helpers import same_bits
from places import EXAMPLES
from processes import start, wait

PLACES = ["memory", "file"]


def kept(model, place, tmp_path, name="kept"):
    return KeptWeights(model, None if place == "memory" else tmp_path / f"{name}.safetensors").take()


class Quadratic:
    """Losses c + g.x + x'Hx/2 per domain over the flattened parameters of a model, in float64."""

    def __init__(self, model, names=("math", "chat"), cubic=0.0):
        self.model = model
        draw = torch.Generator().manual_seed(3)
        size = sum(p.numel() for p in model.parameters())
        self.g = {n: torch.randn(size, generator=draw, dtype=torch.float64) for n in names}
        roots = {n: torch.randn(size, size, generator=draw, dtype=torch.float64) / size for n in names}
        self.H = {n: root @ root.T for n, root in roots.items()}
        self.cubic = cubic

    @property
    def x(self):
        return torch.cat([p.detach().double().flatten() for p in self.model.parameters()])

    def __call__(self):
        x = self.x
        return {n: float(2 + self.g[n] @ x + x @ self.H[n] @ x / 2 + self.cubic * (x**3).sum()) for n in self.g}

    def gradient(self, name, x):
        return self.g[name] + self.H[name] @ x


def move(model, scale, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype), alpha=scale)


@pytest.mark.parametrize("place", PLACES)
def test_a_quadratic_loss_is_split_exactly(tmp_path, place):
    """odd = g.Delta, even = Delta'H Delta / 2, and both together are all that happened."""
    model = make_model(0, torch.float64)
    losses = Quadratic(model)
    start, x0, at_start = kept(model, place, tmp_path, "start"), losses.x, losses()
    move(model, 0.1, 1)
    now, x1 = kept(model, place, tmp_path, "now"), losses.x
    found = split_since(start, now, losses, at_start)
    delta = x1 - x0
    assert found.norm == pytest.approx(float(delta.norm()), rel=1e-12)
    for name in losses.g:
        assert found.odd[name] == pytest.approx(float(losses.gradient(name, x0) @ delta), rel=1e-9)
        assert found.even[name] == pytest.approx(float(delta @ losses.H[name] @ delta) / 2, rel=1e-9)
        assert found.odd[name] + found.even[name] == pytest.approx(losses()[name] - at_start[name], rel=1e-9)
    assert torch.equal(losses.x, x1)


@pytest.mark.parametrize("place", PLACES)
def test_a_direction_is_split_at_the_length_asked_for(tmp_path, place):
    model = make_model(0, torch.float64)
    losses = Quadratic(model)
    here, x = losses(), losses.x
    draw = torch.Generator().manual_seed(5)
    offset = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in model.parameters()]
    found = split_along(kept(model, place, tmp_path), offset, 0.3, losses, here)
    flat = torch.cat([o.flatten() for o in offset])
    delta = 0.3 * flat / flat.norm()
    for name in losses.g:
        assert found.odd[name] == pytest.approx(float(losses.gradient(name, x) @ delta), rel=1e-8)
        assert found.even[name] == pytest.approx(float(delta @ losses.H[name] @ delta) / 2, rel=1e-6)
    assert found.norm == 0.3 and torch.equal(losses.x, x)


def test_halving_a_displacement_halves_the_odd_and_quarters_the_even_part():
    model = make_model(1, torch.float64)
    losses = Quadratic(model)
    here = losses()
    offset = [torch.ones_like(p) for p in model.parameters()]
    one, half = (split_along(KeptWeights(model).take(), offset, length, losses, here) for length in (0.4, 0.2))
    for name in losses.g:
        assert one.odd[name] == pytest.approx(2 * half.odd[name], rel=1e-8)
        assert one.even[name] == pytest.approx(4 * half.even[name], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", PLACES)
def test_weights_come_back_bit_for_bit(tmp_path, place, dtype):
    """Whatever their numbers are, also when a loss fails on the way."""
    model = make_model(2, dtype)
    with torch.no_grad():
        first = next(model.parameters()).view(-1)
        first[:4] = torch.tensor([-0.0, 1e-40, math.inf, math.nan]).to(dtype)
    start = kept(model, place, tmp_path, "start")
    move(model, 0.5, 1)
    before = [p.detach().clone() for p in model.parameters()]
    losses = lambda: {"a": float(next(model.parameters()).detach().double().nan_to_num(0, 0, 0).sum())}  # noqa: E731
    split_since(start, kept(model, place, tmp_path, "now"), losses, losses())
    assert all(same_bits(p.detach(), b) for p, b in zip(model.parameters(), before, strict=True))

    calls = iter([{"a": 1.0}])
    with pytest.raises(StopIteration):
        split_since(start, kept(model, place, tmp_path, "now"), lambda: next(calls), {"a": 0.0})
    assert all(same_bits(p.detach(), b) for p, b in zip(model.parameters(), before, strict=True))


def test_of_a_lora_model_the_adapter_alone_is_kept(tmp_path):
    model = make_model(0)
    for p in list(model.parameters())[2:]:
        p.requires_grad_(False)
    path = tmp_path / "kept.safetensors"
    KeptWeights(model, path).take()
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"0.weight", "0.bias"}


# --------------------------------------------------------------------------------------------------------------- windows


def test_windows_name_who_acted_and_add_up_to_the_run(tmp_path):
    """Evaluations at every second step, windows of two; what the windows say adds up to what happened to the loss."""
    model = make_model(0, torch.float64)
    losses = Quadratic(model)
    monitor = DriftMonitor(["math", "chat"], model=model, split_every=2, snapshots=tmp_path)
    scores = {"math": [0.5, 0.6], "chat": [0.5, 0.4]}
    begin = losses()
    monitor.step(0, scores=scores, losses=losses)
    found = []
    for step in range(1, 9):
        move(model, 0.05, step)
        record = monitor.step(
            step,
            scores=scores if step % 2 == 0 else None,
            losses=losses,
            acting="math" if step < 7 else "chat",
        )
        if "split" in record:
            found.append((step, record["split"]))
    assert [(step, s["since"], s["acting"]) for step, s in found] == [(4, 0, "math"), (8, 4, "math, chat")]
    for name in ("math", "chat"):
        total = sum(s["odd"][name] + s["even"][name] for _, s in found)
        assert total == pytest.approx(losses()[name] - begin[name], rel=1e-9)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000008.safetensors"]


@pytest.mark.parametrize("saved_at", [2, 3, 4, 5])
def test_a_resumed_run_says_the_same(tmp_path, saved_at):
    def run(folder, model, monitor, steps, states=None):
        losses, out = Quadratic(model), []
        for step in steps:
            if step:
                move(model, 0.05, step)
            scores = {"math": [0.5, 0.6], "chat": [0.1, 0.4]} if step % 2 == 0 else None
            out.append(monitor.step(step, scores=scores, losses=losses, acting="math").get("split"))
            if states is not None:
                states[step] = json.loads(json.dumps(monitor.state_dict())), copy.deepcopy(model.state_dict())
        return out

    def made(model):
        return DriftMonitor(["math", "chat"], model=model, split_every=2, snapshots=tmp_path)

    model, states = make_model(0, torch.float64), {}
    whole = run(tmp_path, model, made(model), range(6), states)  # killed after step 5
    state, weights = states[saved_at]
    again = make_model(0, torch.float64)
    again.load_state_dict(weights)
    monitor = made(again)
    monitor.load_state_dict(state)
    rest = run(tmp_path, again, monitor, range(saved_at + 1, 10))
    other = make_model(0, torch.float64)
    expected = run(tmp_path, other, DriftMonitor(["math", "chat"], model=other, split_every=2), range(10))
    assert rest == expected[saved_at + 1 :] and whole == expected[:6]
    assert any(rest)


def test_a_lost_snapshot_is_told_and_a_window_begins_anew(tmp_path, caplog):
    model = make_model(0, torch.float64)
    losses = Quadratic(model)
    windows = Windows(model, 1, tmp_path)
    windows.look(0, losses)
    state = windows.state_dict()
    next(tmp_path.iterdir()).unlink()
    for other, told in ((Windows(model, 1, tmp_path), "is gone"), (Windows(model, 1), "in memory")):
        caplog.clear()
        other.load_state_dict(state)
        assert told in caplog.text
        assert other.look(1, losses) is None
        move(model, 0.1, 1)
        assert other.look(2, losses)["since"] == 1


def test_a_state_from_before_the_first_window_has_lost_nothing(tmp_path, caplog):
    model = make_model()
    state = Windows(model, 1, tmp_path / "snapshots").state_dict()
    Windows(model, 1, tmp_path / "snapshots").load_state_dict(json.loads(json.dumps(state)))
    assert not caplog.records


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="split_every needs model="):
        DriftMonitor(["a"], split_every=1)
    monitor = DriftMonitor(["a"], model=make_model(), split_every=1)
    with pytest.raises(ValueError, match="needs losses="):
        monitor.step(0, scores={"a": [1.0]})


# ---------------------------------------------------------------------------------------------------------------- budget


def gradients(model, seed, scale):
    draw = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(p.shape, generator=draw) for p in model.parameters()]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_shares_of_the_step_are_those_of_dense_arithmetic(kind):
    model = make_model(0)
    optimizer = kind(model.parameters(), lr=1e-2)
    parts = {"loud": gradients(model, 1, 10.0), "still": gradients(model, 2, 0.5)}
    budget = StepBudget(model)
    for _ in range(3):
        for p, a, b in zip(model.parameters(), *parts.values(), strict=True):
            p.grad = a + b
        inside = [p.grad.clone() for p in model.parameters()]
        for name, part in parts.items():
            with budget.around_part(name, optimizer):
                for p, g in zip(model.parameters(), part, strict=True):
                    p.grad = g.clone()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), inside, strict=True))
        optimizer.step()
        found = budget.measure()
    flat = {n: torch.cat([g.double().flatten() for g in part]) for n, part in parts.items()}
    expected = {"gradient": flat}
    if kind is torch.optim.AdamW:
        second = torch.cat([optimizer.state[p]["exp_avg_sq"].double().flatten() for p in model.parameters()])
        expected["step"] = {n: g / ((second / (1 - 0.999**3)).sqrt() + 1e-8) for n, g in flat.items()}
    assert found.keys() == expected.keys()
    for key, vectors in expected.items():
        total = sum(float(v.square().sum()) for v in vectors.values())
        for name, vector in vectors.items():
            assert found[key][name] == pytest.approx(float(vector.square().sum()) / total, rel=1e-5)
    last = list(expected.values())[-1]["loud"]
    assert torch.allclose(torch.cat([d.flatten() for d in budget.directions["loud"]]).double(), -last, rtol=1e-4)


def test_a_mixed_run_tells_shares_and_splits_and_is_the_same_training(tmp_path):
    """Step-budget shares and a row per domain of a mixed stage; weights are bitwise those of a run without a monitor."""
    pytest.importorskip("transformers")
    from carerl_kernels.grpo import Stage
    from trainer_helpers import metrics, small_domains, trainer

    stages = [Stage(("code", "chat"), 4), Stage("math", 2)]
    names = [d.name for d in small_domains()]
    torch.set_num_threads(1)
    plain = trainer(tmp_path / "plain")
    plain.run(stages)
    watched = trainer(tmp_path / "watched")
    watched.monitor = watched._learner.monitor = DriftMonitor(
        names, model=watched.model, split_every=1, gradients_every=3, snapshots=tmp_path / "snapshots"
    )
    watched.run(stages)
    for p, q in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(p, q)
    lines = metrics(tmp_path / "watched")
    for line in lines:
        assert ("step_share" in line) == (line["step"] in (1, 2, 3, 4)) == ("domination" in line)
        told = line.get("monitor", {})
        assert ("budget" in told) == (
            line["step"] in (2, 3, 4)
        )  # the third for its gradients, the others for their splits
        assert ("split" in told) == ("eval" in line and line["step"] > 0)
    for line in (lines[2], lines[4]):
        split, budget = line["monitor"]["split"], line["monitor"]["budget"]
        assert split["acting"] == "code+chat" and set(split["odd"]) == {"code", "chat", "math"}
        assert set(split["by"]) == {"code", "chat"} == set(budget["step"])
        assert sum(budget["step"].values()) == pytest.approx(1) == sum(budget["gradient"].values())
        squares = sum(part["norm"] ** 2 for part in split["by"].values())
        assert math.sqrt(squares) == pytest.approx(split["norm"])
    assert lines[6]["monitor"]["split"]["acting"] == "math" and "by" not in lines[6]["monitor"]["split"]


# ------------------------------------------------------------------------------------------------------------- processes


def two_ranks(rank: int, world: int, folder: Path) -> None:
    """On sharded parameters: what a single process finds, and weights bit for bit."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    model = make_model(0)
    if world > 1:
        fully_shard(model)
    parameters = list(model.parameters())
    x = torch.randn(6, 13, generator=torch.Generator().manual_seed(1))
    windows = {
        "memory": Windows(model, 1),
        "file": Windows(model, 1, folder / f"snapshots-{world}"),
    }

    def losses():
        with torch.no_grad():
            return {"a": float(model(x).square().mean()), "b": float(model(x).tanh().mean())}

    optimizer, found = torch.optim.Adam(model.parameters(), lr=0.01), {}
    for step in range(3):
        for name, window in windows.items():
            before = [local(p).detach().clone() for p in parameters]
            offsets = [torch.ones_like(b) for b in before]
            found[name] = window.look(step, losses, {"d": offsets}, {"d": 0.25}) or {}
            after = [local(p).detach() for p in parameters]
            assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        (folder / f"found-{world}.json").write_text(json.dumps(found))
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path):
    for world in (1, 2):
        logs = [tmp_path / f"log-{world}-{rank}" for rank in range(world)]
        call = "test_monitor_split.two_ranks"
        codes = wait([start(call, rank, world, tmp_path, log=log) for rank, log in enumerate(logs)], timeout=200)
        assert codes == [0] * world, "\n".join(log.read_text()[-3000:] for log in logs)
    one, two = (json.loads((tmp_path / f"found-{world}.json").read_text()) for world in (1, 2))
    for name in ("memory", "file"):
        assert two[name]["norm"] == pytest.approx(one[name]["norm"], rel=1e-5)
        for part in ("odd", "even"):
            assert two[name][part] == pytest.approx(one[name][part], abs=1e-6)
            assert two[name]["by"]["d"][part] == pytest.approx(one[name]["by"]["d"][part], abs=1e-6)
    assert one["memory"] == one["file"]


# --------------------------------------------------------------------------------------------------------------- example


def test_the_example_prints_its_table(capsys, monkeypatch):
    """Shortened: every row, with a displacement and without a number that is none."""
    pytest.importorskip("transformers")
    from trainer_helpers import small_model

    path = EXAMPLES / "odd_even.py"
    spec = importlib.util.spec_from_file_location("odd_even", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for name, value in {"FIRST": 2, "RECORDED": 2, "STEPS": 2, "PROMPTS": 4}.items():
        monkeypatch.setattr(example, name, value)
    monkeypatch.setattr(example, "tiny_model", small_model)
    monkeypatch.setattr(sys, "argv", ["odd_even.py", "--seeds", "1"])
    example.main()
    out = capsys.readouterr().out
    assert "nan" not in out and all(f"| {row} | 0." in out for row in example.ROWS)
