"""Small models, hand-made histories, and a walk through a guarded run beside its dense oracle."""

from __future__ import annotations

import numpy as np
import torch
from carerl_kernels import CapabilityGuard, DomainBasis
from carerl_kernels.subspace.store import BasisInfo
from guard_oracle import Rule


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Odd shapes; the biases and the last matrix are smaller than 8k for k = 4, so that per-matrix bases pool them."""
    torch.manual_seed(seed)
    layers = torch.nn.Linear(13, 11), torch.nn.Tanh(), torch.nn.Linear(11, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)
    return torch.nn.Sequential(*layers).to(dtype)


def blocks(model: torch.nn.Module, kind: str, k: int) -> list[list[int]]:
    """Which parameters share a coefficient row, in the order of the rows: large ones each, then all small ones together."""
    sizes = [p.numel() for p in model.parameters()]
    if kind == "flat":
        return [list(range(len(sizes)))]
    large = [[i] for i, n in enumerate(sizes) if n >= 8 * k]
    small = [i for i, n in enumerate(sizes) if n < 8 * k]
    return large + ([small] if small else [])


def offsets(model: torch.nn.Module) -> tuple[list[int], int]:
    out, end = [], 0
    for p in model.parameters():
        out.append(end)
        end += (p.numel() + 127) // 128 * 128
    return out, end


def pack(model: torch.nn.Module, parts: list[np.ndarray], kind: str, k: int) -> torch.Tensor:
    """Rows `[k, N]` from dense rows per coefficient row `[k, n_t]`."""
    at, size = offsets(model)
    rows = torch.zeros(k, size)
    params = list(model.parameters())
    for part, block in zip(parts, blocks(model, kind, k), strict=True):
        start = 0
        for i in block:
            n = params[i].numel()
            rows[:, at[i] : at[i] + n] = torch.from_numpy(part[:, start : start + n]).float()
            start += n
    return rows


def dense(rows: torch.Tensor, model: torch.nn.Module, kind: str, k: int) -> list[np.ndarray]:
    """The inverse of :func:`pack`, float64."""
    at, _ = offsets(model)
    params = list(model.parameters())
    return [
        np.concatenate([rows[:, at[i] : at[i] + params[i].numel()].double().numpy() for i in block], axis=1)
        for block in blocks(model, kind, k)
    ]


def flat(tensors: list[torch.Tensor], model: torch.nn.Module, kind: str, k: int) -> list[np.ndarray]:
    return [
        np.concatenate([tensors[i].detach().double().numpy().ravel() for i in block])
        for block in blocks(model, kind, k)
    ]


def make_history(model, kind: str, k: int, overlap: float, names=("math", "chat"), seed: int = 0) -> list[DomainBasis]:
    """Domains with orthonormal rows each; every domain's rows have this overlap with the first domain's."""
    rng = np.random.default_rng(seed)
    params = list(model.parameters())
    sizes = [sum(params[i].numel() for i in block) for block in blocks(model, kind, k)]
    first = [np.linalg.qr(rng.standard_normal((n, k)))[0].T for n in sizes]
    out = []
    for number, name in enumerate(names):
        parts = []
        for base, n in zip(first, sizes, strict=True):
            fresh = rng.standard_normal((n, k))
            fresh -= base.T @ (base @ fresh)
            fresh = np.linalg.qr(fresh)[0].T
            parts.append(base if number == 0 else overlap * base + np.sqrt(1 - overlap**2) * fresh)
        info = BasisInfo(
            domain=name,
            kind=kind,
            k=k,
            architecture="Sequential",
            names=tuple(n for n, _ in model.named_parameters()),
            shapes=tuple(tuple(p.shape) for p in params),
            start_hash="",
            end_hash="",
            steps=1,
            skipped=0,
            gradient_capture=1.0,
            displacement_capture=1.0,
        )
        displacement = torch.from_numpy(0.02 + 0.05 * rng.random((len(sizes), k)))
        out.append(DomainBasis(info, pack(model, parts, kind, k), torch.ones(len(sizes), k).double(), displacement))
    return out


class Walk:
    """A guard over a hand-made history, and a dense oracle per coefficient row with the same numbers."""

    def __init__(self, rule, *, kind="per_matrix", k=4, overlap=0.5, dtype=torch.float32, every=1, **options):
        self.model, self.kind, self.k = make_model(dtype=dtype), kind, k
        history = make_history(self.model, kind, k, overlap)
        self.guard = CapabilityGuard(self.model, rule, basis=kind, k=k, every=every, **options)
        for basis in history:
            self.guard.add(basis)
        oracle_options = {name: options[name] for name in ("aligned", "conflict") if name in options}
        self.oracles = []
        rows = [dense(b.directions, self.model, kind, k) for b in history]
        for t in range(len(blocks(self.model, kind, k))):
            h = np.concatenate([b.displacement[t].numpy() for b in history])
            A = np.concatenate([r[t] for r in rows])
            self.oracles.append(Rule(rule, A, h, **oracle_options))
        self.params = list(self.model.parameters())

    def active(self, own: str | None) -> np.ndarray:
        names = self.guard.history
        return np.repeat([name != own for name in names], self.k)

    def blocks_of(self, tensors: list[torch.Tensor]) -> list[np.ndarray]:
        return flat(tensors, self.model, self.kind, self.k)

    def backward(self, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        dtype = self.params[0].dtype
        x = torch.randn(16, 13, generator=generator).to(dtype)
        y = torch.randn(16, 3, generator=generator).to(dtype)
        self.model.zero_grad()
        (scale * (self.model(x) - y).square().mean()).backward()
