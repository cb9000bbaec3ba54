"""Two small checkpoints, input bases made by hand or from prompts, and the confined change from a dense float64 oracle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from carerl_kernels import CapabilityGuard
from carerl_kernels.subspace import FactoredBasis
from carerl_kernels.subspace.store import BasisInfo
from factored_helpers import columns
from safetensors.torch import load_file, save_file

SHAPES = {
    "a.weight": (7, 13),
    "b.weight": (19, 13),
    "embed.weight": (23, 5),
    "free.weight": (4, 4),
    "norm.weight": (13,),
}
SIDES = {"a.weight": "right", "b.weight": "right", "embed.weight": "left"}
RCOND = 1e-4


def checkpoints(seed: int = 0, size: float = 0.05, dtype: torch.dtype = torch.float32):
    """Start and end, by tensor name."""
    rng = np.random.default_rng(seed)
    start = {name: torch.from_numpy(rng.standard_normal(shape)).to(dtype) for name, shape in SHAPES.items()}
    end = {n: (t.double() + size * torch.from_numpy(rng.standard_normal(t.shape))).to(dtype) for n, t in start.items()}
    return start, end


def bases(
    r: int = 3, overlap: float = 0.5, domains=("math", "chat"), seed: int = 0, moved: float = 0.05
) -> list[FactoredBasis]:
    """Domains whose directions overlap with the first one's; some of them hold more of their inputs than others."""
    rng = np.random.default_rng(seed)
    first: dict[str, np.ndarray] = {}
    out = []
    for domain in domains:
        left, right, values, moves = {}, {}, {}, {}
        for name, side in SIDES.items():
            m, n = SHAPES[name]
            factor = columns(rng, m if side == "left" else n, r, first.get(name), overlap)
            first.setdefault(name, factor)
            (left if side == "left" else right)[name] = torch.from_numpy(factor).float()
            values[name] = torch.from_numpy(np.sort(rng.uniform(0.5, 2.0, r))[::-1].copy())
            moves[name] = moved * torch.from_numpy(rng.standard_normal((n if side == "left" else m, r)))
        info = BasisInfo(domain, "input", r, "Toy", tuple(SHAPES), tuple(SHAPES.values()), "", "", 1, 0, 0.9, 0.5)
        out.append(FactoredBasis(info, left, right, values, moves))
    return out


def frame(name: str, given: list[FactoredBasis], room: float):
    """Orthonormal directions `[size, K]`, and how far rows may go along them against bound 1 `[across, K]`."""
    side, shares, factors, moved = SIDES[name], [], [], []
    for basis in given:
        squares = basis.values[name].double().numpy() ** 2
        shares.append(squares / squares.sum())
        factors.append((basis.left if side == "left" else basis.right)[name].double().numpy())
        moved.append(basis.moved[name].double().numpy())
    share, V, h = np.concatenate(shares), np.concatenate(factors, 1), np.concatenate(moved, 1)
    most = max(1, int(room * V.shape[0] + 1e-9))
    kept = np.argsort(-share, kind="stable")[:most]
    V, h = V[:, kept], np.abs(h[:, kept])
    S = V.T @ V
    value, vector = np.linalg.eigh(S)
    inverse = np.where(value > RCOND * value.max(), 1 / np.sqrt(np.maximum(value, 1e-300)), 0.0)
    R = (vector * inverse) @ vector.T
    return V @ R, h * np.sqrt(np.maximum(np.diag(R @ S @ R), 0.0))


def dense(start, end, given: list[FactoredBasis], bound: float, room: float) -> dict[str, np.ndarray]:
    """What confinement gives, in float64."""
    out = {}
    for name in start:
        before, after = start[name].double().numpy(), end[name].double().numpy()
        out[name] = after
        if name in SIDES and given:
            U, reach = frame(name, given, room)
            turned = SIDES[name] == "left"
            change = (before - after).T if turned else before - after
            D = change @ U
            X = (D - np.clip(D, -bound * reach, bound * reach)) @ U.T
            out[name] = after + (X.T if turned else X)
    return out


def save(folder: Path, tensors, shards: int = 1, **others: str) -> Path:
    """A directory as transformers saves it, with some other files."""
    folder.mkdir(parents=True)
    names = list(tensors)
    if shards == 1:
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    else:
        where = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {n: tensors[n].contiguous() for n in names[i::shards]}
            save_file(part, folder / file, {"format": "pt"})
            where.update(dict.fromkeys(part, file))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for name, text in others.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def observed(model, batches, domain: str, r: int, energy: float = 1.0) -> FactoredBasis:
    """What these batches feed into the model's matrices now."""
    return CapabilityGuard(model, r=r, energy=energy).protect(domain, batches, progress=False)
