"""Hand-made factored histories beside dense oracles, one per coefficient matrix, for block and input bases."""

from __future__ import annotations

import numpy as np
import torch
from carerl_kernels import CapabilityGuard
from carerl_kernels.subspace import FactoredBasis, MatrixLayout
from carerl_kernels.subspace.store import BasisInfo
from guard_oracle import Rule


def columns(rng: np.random.Generator, rows: int, r: int, base: np.ndarray | None, overlap: float) -> np.ndarray:
    """Orthonormal columns (as many as fit, the rest zero) with this overlap with each column of `base`."""
    width = min(rows, r)
    fresh = np.linalg.qr(rng.standard_normal((rows, width)))[0]
    if base is not None:
        if rows >= 2 * width:
            fresh = rng.standard_normal((rows, width))
            fresh -= base[:, :width] @ (base[:, :width].T @ fresh)
            fresh = np.linalg.qr(fresh)[0]
            fresh = overlap * base[:, :width] + np.sqrt(1 - overlap**2) * fresh
        elif overlap == 1:
            fresh = base[:, :width]
    out = np.zeros((rows, r))
    out[:, :width] = fresh
    return out


def make_factored(model, kind: str, r: int, overlap: float, names=("math", "chat"), seed: int = 0, sides=None):
    """Domains whose factors overlap with the first domain's; moved by random amounts of either sign."""
    rng = np.random.default_rng(seed)
    layout = MatrixLayout.of(model.named_parameters(), kind, r, None, sides)
    first: dict[str, tuple] = {}
    out = []
    for number, domain in enumerate(names):
        left, right, values, moved = {}, {}, {}, {}
        for group in layout.groups:
            for _, name, _ in layout.matrices(group):
                base = first.get(name, (None, None)) if number else (None, None)
                U, V = columns(rng, group.whole, r, base[0], overlap), columns(rng, group.n, r, base[1], overlap)
                first.setdefault(name, (U, V))
                if group.side != "right":
                    left[name] = torch.from_numpy(U).float()
                if group.side != "left":
                    right[name] = torch.from_numpy(V).float()
                values[name] = torch.ones(r, dtype=torch.float64)
                rows = {"both": r, "right": group.whole, "left": group.n}[group.side]
                moved[name] = torch.from_numpy(rng.standard_normal((rows, r)) * 0.05)
        info = BasisInfo(
            domain=domain,
            kind=kind,
            k=r,
            architecture=type(model).__name__,
            names=layout.names,
            shapes=layout.shapes,
            start_hash="",
            end_hash="",
            steps=1,
            skipped=0,
            gradient_capture=None,
            displacement_capture=1.0,
        )
        out.append(FactoredBasis(info, left, right, values, moved))
    return layout, out


class DenseMatrix:
    """All directions of one weight matrix as dense rows, domain after domain, and the rule's oracle over them."""

    def __init__(self, rule: str, layout, group, name: str, bases, **options):
        rows, moved = [], []
        for basis in bases:
            U = basis.left[name].double().numpy() if name in basis.left else None
            V = basis.right[name].double().numpy() if name in basis.right else None
            own = basis.moved[name].numpy()
            if U is not None and V is not None:
                for i in range(layout.k):
                    for j in range(layout.k):
                        rows.append(np.outer(U[:, i], V[:, j]).ravel())
                        moved.append(own[i, j])
            else:
                size = group.whole if V is not None else group.n
                for a in range(size):
                    e = np.eye(size)[a]
                    for j in range(layout.k):
                        rows.append((np.outer(e, V[:, j]) if V is not None else np.outer(U[:, j], e)).ravel())
                        moved.append(own[a, j])
        sign, A = np.where(np.array(moved) < 0, -1.0, 1.0), np.array(rows)
        self.A = A * sign[:, None]
        self.per_domain = len(rows) // len(bases)
        present = (np.square(A).sum(1) > 0.5).astype(float)
        self.rule = Rule(rule, self.A, np.abs(moved) * present, **options)


class FactoredWalk:
    """A guard over a factored history, and dense oracles of every matrix."""

    def __init__(self, model, rule, kind, *, r=3, overlap=0.5, names=("math", "chat"), every=1, **options):
        sides = options.pop("sides", None)
        options.setdefault("room", 1.0)  # the matrices are small: all directions act
        self.model, self.names = model, names
        self.layout, bases = make_factored(model, kind, r, overlap, names, sides=sides)
        self.guard = CapabilityGuard(model, rule, basis=kind, r=r, every=every, **options)
        for basis in bases:
            self.guard.add(basis)
        kept = {n: options[n] for n in ("aligned", "conflict") if n in options}
        self.oracles = {}  # by index of the parameter
        for group in self.layout.groups:
            for position, name, _ in self.layout.matrices(group):
                self.oracles[group.indices[position]] = DenseMatrix(rule, self.layout, group, name, bases, **kept)
        self.params = list(model.parameters())

    def expect(self, index: int, raw: np.ndarray, own: str | None) -> np.ndarray:
        """What the step `raw` (gradient convention) of a parameter should become."""
        oracle = self.oracles.get(index)
        if oracle is None:
            return raw
        active = np.repeat([name != own for name in self.names], oracle.per_domain)
        return oracle.rule.step(raw.ravel(), active).reshape(raw.shape)
