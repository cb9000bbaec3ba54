"""What every process of the distributed tests runs.

Each scenario trains the same small model on the same data, split over the processes, and writes what came out. World size 1 means
no process group at all: the plain single process that the others have to equal.
"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from carerl_kernels import CapabilityGuard
from carerl_kernels.guard.input_stack import CHUNK
from carerl_kernels.monitor import DriftMonitor
from carerl_kernels.subspace.shards import local
from guard_helpers import make_model

K, R, BATCH = 4, 2, 16
CHUNK["cpu"] = 160  # coefficients of a small model are decided on in several chunks, too


class Run:
    """One process of a scenario."""

    def __init__(self, rank: int, world: int, folder: Path):
        self.rank, self.world, self.folder = rank, world, folder
        self.single = world == 1

    def shard(self, model, **options):
        if not self.single:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (self.world,))
            fully_shard(model[2], mesh=mesh, **options)
            fully_shard(model, mesh=mesh, **options)
        return model

    def batch(self, step: int, parts: int = 1):
        """This process's share of a step's data, in micro-batches."""
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 13, generator=generator)
        target = torch.randn(13, 3, generator=torch.Generator().manual_seed(99 + step // 100))
        share = slice(self.rank * BATCH // self.world, (self.rank + 1) * BATCH // self.world)
        return list(zip(x[share].chunk(parts), (x @ target)[share].chunk(parts), strict=True))

    def inputs(self, guard, steps):
        """What a stage of input directions is shown: this process's share of these steps' data."""
        return {"inputs": [(self.batch(step)[0][0],) for step in steps]} if guard.layout.kind == "input" else {}

    def train(self, model, optimizer, steps, parts=1, clip=None, lr_model=None):
        for step in steps:
            optimizer.zero_grad()
            for x, y in self.batch(step, parts):
                ((model(x) - y).square().mean() / parts).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()

    def whole(self, tensors):
        return [t.full_tensor() if hasattr(t, "full_tensor") else t.detach().clone() for t in tensors]

    def save(self, name, **results):
        torch.save(results, self.folder / f"{name}-{self.world}-{self.rank}.pt")


def stages(run: Run, model, guard, name, parts=1, clip=None):
    """Records math, then trains chat against it; one optimizer throughout."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    guard.attach(optimizer)
    path = run.folder / f"{name}-{run.world}.safetensors"
    with guard.stage("math", path=path, **run.inputs(guard, range(8))):
        run.train(model, optimizer, range(8), parts, clip)
    recording = guard.report()["communication"]
    with guard.domain("chat"):
        run.train(model, optimizer, range(100, 108), parts, clip)
    report = guard.report()
    run.save(
        name,
        parameters=run.whole(guard.parameters),
        displacement=report["domains"]["math"]["net_displacement"],
        energy=report["domains"]["math"]["energy"],
        communication=report["communication"],
        recording=recording,
        T=guard.layout.T,
        report=json.dumps(report),
    )


def fsdp(run: Run, kind: str, rule: str) -> None:
    model = run.shard(make_model())
    size = {"k": K} if kind in ("flat", "per_matrix") else {"r": R}
    guard = CapabilityGuard(model, rule, basis=kind, track_energy=True, **size)
    stages(run, model, guard, f"fsdp_{kind}", parts=2, clip=1.0)


def ddp(run: Run, kind: str, compiled: bool = False) -> None:
    model = make_model()
    if not run.single:
        inside, around = (torch.compile, torch.compile) if compiled else (lambda m, **_: m,) * 2  # any nesting
        model = inside(model, backend="eager")
        model = around(torch.nn.parallel.DistributedDataParallel(model), backend="eager")
    guard = CapabilityGuard(model, "remove", basis=kind, **({"k": K} if kind == "per_matrix" else {"r": R}))
    stages(run, model, guard, f"ddp_compiled_{kind}" if compiled else f"ddp_{kind}")
    if kind != "input":
        return
    with guard.stage("heard"):  # what the wrapped model is called with: all of it is in the sample
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        guard.detach()
        guard.attach(optimizer)
        run.train(model, optimizer, range(4))
    sums = {name: float(v.square().sum()) for name, v in guard.basis("heard").values.items()}
    run.save("heard_compiled" if compiled else "heard", sums=sums)


def observed(run: Run) -> None:
    """A look at batches of which processes have different numbers; an embedding and a wide layer, whose inputs are sketched."""
    from carerl_kernels.subspace import MatrixLayout, observe
    from carerl_kernels.subspace.moments import EXACT

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(29, 12), torch.nn.Linear(12, EXACT + 3), torch.nn.Linear(EXACT + 3, 5)
    )
    if not run.single:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (run.world,))
        fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
    named = list(model.named_parameters())
    layout = MatrixLayout.of(named, "input", 3, None, {"0.weight": "left", "1.weight": "right", "2.weight": "right"})
    batches = [torch.randint(0, 29, (3, 7), generator=torch.Generator().manual_seed(i)) for i in range(9)]
    share = batches if run.single else [b for i, b in enumerate(batches) if min(i, run.world - 1) == run.rank]
    moments = observe(model, share, layout)
    basis = moments.basis(layout, "a", energy=1.0, architecture="x", parameters=[local(p) for _, p in named])
    path = run.folder / f"observed-{run.world}.safetensors"
    basis.save(path)
    run.save("observed", values=dict(basis.values), batches=moments.batches)


def lists(run: Run) -> None:
    """Hand-made shards of flattened parameters, uneven and some empty; gradients cut by hand."""
    model = make_model()
    named = [(name, p) for name, p in model.named_parameters()]

    def cut(t):
        flat = t.detach().reshape(-1)
        edges = [0] + [min(flat.numel(), 20 * (i + 1) ** 2) for i in range(run.world - 1)] + [flat.numel()]
        return flat[edges[run.rank] : edges[run.rank + 1]].clone()

    parts = [(name, torch.nn.Parameter(cut(p))) for name, p in named]
    group = None if run.single else dist.group.WORLD
    guard = CapabilityGuard(parts, "remove", basis="flat", k=K, process_group=group)
    optimizer = torch.optim.SGD([p for _, p in parts], lr=0.01)
    guard.attach(optimizer)

    def train(steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for (_, p), (_, whole) in zip(parts, named, strict=True):
                p.grad = cut(torch.randn(whole.shape, generator=generator))
            optimizer.step()

    with guard.stage("math", path=run.folder / f"lists-{run.world}.safetensors"):
        train(range(8))
    with guard.domain("chat"):
        train(range(100, 108))
    run.save("lists", parts=[p.detach() for _, p in parts], communication=guard.report()["communication"])


def probed(run: Run, kind: str) -> None:
    """Probes on the earlier domain's own data between the steps of another."""
    model = run.shard(make_model())
    size = {"k": K} if kind == "per_matrix" else {"r": R}
    guard = CapabilityGuard(model, "probed", basis=kind, probe_every=2, probe_adaptive=True, **size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    guard.attach(optimizer)
    with guard.stage("math", **run.inputs(guard, range(8))):
        run.train(model, optimizer, range(8))
    for step in range(100, 108):
        if guard.probes_due():
            for x, y in run.batch(20, parts=2):
                with guard.probe("math"):
                    ((model(x) - y).square().mean() / 2).backward()
        with guard.domain("chat"):
            run.train(model, optimizer, [step])
    run.save(f"probed_{kind}", parameters=run.whole(guard.parameters), probes=guard.report()["probes"])


def gradient_mode(run: Run) -> None:
    model = run.shard(make_model())
    guard = CapabilityGuard(model, "remove", basis="per_matrix", k=K, apply_to="grad", max_grad_norm=0.3)
    stages(run, model, guard, "gradient_mode")


def mixed_precision(run: Run) -> None:
    options = {}
    if not run.single:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = run.shard(make_model(), **options)
    guard = CapabilityGuard(model, "remove", basis="flat", k=K)
    stages(run, model, guard, "mixed_precision")


def load_elsewhere(run: Run) -> None:
    """Files of the single process act the same on shards."""
    for kind in ("flat", "per_matrix", "block", "input"):
        model = run.shard(make_model())
        guard = CapabilityGuard.load(run.folder / f"fsdp_{kind}-1.safetensors", model=model, rule="remove")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        guard.attach(optimizer)
        run.train(model, optimizer, range(100, 106))
        run.save(f"load_{kind}", parameters=run.whole(guard.parameters))
        guard.basis("math").save(run.folder / f"again_{kind}-{run.world}.safetensors")
    model = run.shard(make_model())  # int8 files are cut between their blocks
    guard = CapabilityGuard(model, "remove", basis="flat", k=K, basis_dtype=torch.int8)
    guard.add(run.folder / "int8.safetensors")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard.attach(optimizer)
    run.train(model, optimizer, range(100, 106))
    run.save("load_int8", parameters=run.whole(guard.parameters))


def non_finite(run: Run) -> None:
    """One process meets a NaN: all drop the step."""
    model = run.shard(make_model())
    guard = CapabilityGuard(model, "remove", basis="flat", k=K)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    guard.attach(optimizer)
    with guard.stage("math"):
        run.train(model, optimizer, range(3))
        before = [local(p).clone() for p in guard.parameters]
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if run.rank == run.world - 1:
            part = next(local(p.grad) for p in guard.parameters if local(p.grad).numel())
            part.view(-1)[0] = torch.nan
        optimizer.step()
    same = all(torch.equal(local(p), b) for p, b in zip(guard.parameters, before, strict=True))
    run.save("non_finite", same=same, dropped=guard.report()["dropped_steps"])


def full_disk(run: Run) -> None:
    """The process that writes cannot: all of them hear of it, and the old file stays."""
    import resource
    import signal

    model = run.shard(make_model())
    guard = CapabilityGuard(model, "remove", basis="per_matrix", k=K)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    guard.attach(optimizer)
    path = run.folder / f"disk-{run.world}.safetensors"
    with guard.stage("math", path=path):
        run.train(model, optimizer, range(3))
    if run.world > 1:
        dist.barrier()
    old, message = path.read_bytes(), None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        guard.basis("math").save(path)
    except OSError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if run.world > 1:
        dist.barrier()
    run.save("full_disk", message=message, intact=path.read_bytes() == old)


def checkpoint(run: Run) -> None:
    """Interrupts a stage, keeps it with torch.distributed.checkpoint, and goes on from what any world size kept."""
    import torch.distributed.checkpoint as dcp

    def fresh():
        model = run.shard(make_model())
        guard = CapabilityGuard(model, "integrated", basis="per_matrix", k=K)
        guard.add(run.folder / "fsdp_per_matrix-1.safetensors")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        guard.attach(optimizer)
        return model, guard, optimizer

    model, guard, optimizer = fresh()
    try:
        with guard.stage("chat"):
            run.train(model, optimizer, range(100, 104))
            state = {"model": model.state_dict(), "guard": guard.state_dict()}
            dcp.save(state, checkpoint_id=run.folder / f"checkpoint-{run.world}", no_dist=run.single)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    source = run.folder / f"checkpoint-{1 if run.world > 1 else run.world}"
    model, guard, optimizer = fresh()
    with guard.stage("chat", path=run.folder / f"resumed-{run.world}.safetensors"):
        state = {"model": model.state_dict(), "guard": guard.state_dict()}
        dcp.load(state, checkpoint_id=source, no_dist=run.single)
        model.load_state_dict(state["model"])
        guard.load_state_dict(state["guard"])
        run.train(model, optimizer, range(104, 108))
    run.save("checkpoint", parameters=run.whole(guard.parameters))


def dying(run: Run) -> None:
    """The second process is killed in the middle of the second stage."""
    import os
    import signal

    model = run.shard(make_model())
    guard = CapabilityGuard(model, "remove", basis="flat", k=K)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    guard.attach(optimizer)
    for name in ("math", "chat"):
        with guard.stage(name, path=run.folder / f"dying-{name}.safetensors"):
            run.train(model, optimizer, range(3))
            if name == "chat" and run.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            run.train(model, optimizer, range(3, 6))
        print(f"{name} recorded", flush=True)


def monitor_gradients(run):
    """Cosines of two domains' gradients, kept while training goes on with their sum."""
    model = run.shard(make_model())
    monitor = DriftMonitor(["a", "b"], model=model, gradients_every=1)
    (x, y), (x2, y2) = run.batch(0)[0], run.batch(1)[0]
    with monitor.gradients("a"):
        (model(x) - y).square().mean().backward()
    with monitor.gradients("b"):
        (model(x2) + y2).square().mean().backward()
    found = monitor.step(1)["gradients"]
    summed = run.whole(p.grad for p in model.parameters())
    run.save("monitor_gradients", cosine=found["cosine"]["a"]["b"], norm=found["norm"], parameters=summed)


SCENARIOS = {
    "fsdp_flat": lambda run: fsdp(run, "flat", "integrated"),
    "fsdp_per_matrix": lambda run: fsdp(run, "per_matrix", "bounded"),
    "fsdp_block": lambda run: fsdp(run, "block", "bounded"),
    "fsdp_input": lambda run: fsdp(run, "input", "remove"),
    "ddp_per_matrix": lambda run: ddp(run, "per_matrix"),
    "ddp_input": lambda run: ddp(run, "input"),
    "ddp_compiled_input": lambda run: ddp(run, "input", compiled=True),
    "observed": observed,
    "lists": lists,
    "probed_per_matrix": lambda run: probed(run, "per_matrix"),
    "probed_input": lambda run: probed(run, "input"),
    "gradient_mode": gradient_mode,
    "mixed_precision": mixed_precision,
    "load_elsewhere": load_elsewhere,
    "non_finite": non_finite,
    "full_disk": full_disk,
    "checkpoint": checkpoint,
    "monitor_gradients": monitor_gradients,
}


def main(names: list[str], rank: int, world: int, folder: Path) -> None:
    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous-{world}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=180),
        )
    run = Run(rank, world, folder)
    for name in names:
        {**SCENARIOS, "dying": dying}[name](run)
        if world > 1:
            dist.barrier()
    if world > 1:
        dist.destroy_process_group()
