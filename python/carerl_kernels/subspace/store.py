"""One safetensors file per domain: directions, spectrum, orientation, and the fingerprint of the model they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._files import write_atomically
from .._ops import block_of
from .layout import Kind, Layout

FORMAT = "carerl-basis"
FORMAT_VERSION = 1


class BasisError(ValueError):
    """A basis that cannot be used here: another model, another format, a damaged file."""


@dataclass(frozen=True)
class BasisInfo:
    """What is known about a basis beside its numbers; stored as JSON in the file's metadata.

    Attributes:
        domain: name of the domain.
        kind, k: flat or per-matrix, directions per coefficient row.
        architecture: class name of the model, for messages.
        names, shapes: of the parameters, in order.
        start_hash, end_hash: of the parameter values when the stage began and ended.
        steps: gradients streamed in; skipped: gradients refused because they were not finite.
        gradient_capture: share of the stage's gradient energy that the directions hold, 0..1.
        displacement_capture: share of the stage's squared parameter change that they hold, 0..1.
    """

    domain: str
    kind: Kind
    k: int
    architecture: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    start_hash: str
    end_hash: str
    steps: int
    skipped: int
    gradient_capture: float
    displacement_capture: float


@dataclass(frozen=True)
class DomainBasis:
    """The recorded directions of one domain, oriented so that ``u . (theta_start - theta_end) >= 0`` (gradient convention).

    Attributes:
        info: see :class:`BasisInfo`.
        directions: ``[k, N]``, rows orthonormal per coefficient row (float32, bfloat16 or float16; with scales int8 or
            float8_e4m3fn).
        singular_values: ``[T, k]`` float64, of the stage's gradients.
        displacement: h ``[T, k]`` float64, at least zero: how far the stage moved along each direction.
        scales: ``[k, ceil(N/block)]`` of int8 or float8_e4m3fn directions, else None.
    """

    info: BasisInfo
    directions: Tensor
    singular_values: Tensor
    displacement: Tensor
    scales: Tensor | None = None

    def quantized(self, block: int = 128, dtype: torch.dtype = torch.int8) -> DomainBasis:
        """The same basis with block-scaled directions, a quarter of fp32's memory.

        Args:
            block: elements per scale, a power of two of at least 32.
            dtype: int8 (relative error .0065) or float8_e4m3fn (.026).
        """
        if self.directions.dtype == dtype:
            return self
        basis = self.dequantized()
        codes, scales = torch.ops.carerl.quantize_bases(basis.directions.unsqueeze(0), block, dtype)
        return DomainBasis(self.info, codes[0], self.singular_values, self.displacement, scales[0])

    def dequantized(self) -> DomainBasis:
        """The same basis with float32 directions where they were quantised."""
        if self.scales is None:
            return self
        block = block_of("dequantized", self.directions.shape[-1], self.scales.shape[-1])
        directions = self.directions.float()
        whole = directions.shape[-1] // block
        directions[:, : whole * block].unflatten(1, (whole, block)).mul_(self.scales[:, :whole, None])
        directions[:, whole * block :] *= self.scales[:, whole:]
        return DomainBasis(self.info, directions, self.singular_values, self.displacement)

    def save(self, path: Path | str) -> None:
        """Writes the file atomically.

        Raises:
            OSError: the directory or the disk refuses; nothing is left half-written.
        """
        tensors = {
            "directions": self.directions,
            "singular_values": self.singular_values,
            "displacement": self.displacement,
        }
        if self.scales is not None:
            tensors["scales"] = self.scales
        metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "info": json.dumps(asdict(self.info))}
        stored = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        write_atomically(path, lambda temporary: save_file(stored, temporary, metadata))

    @classmethod
    def load(cls, path: Path | str) -> DomainBasis:
        """Reads a file written by :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            BasisError: not a basis file, a newer format version, or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"basis file {path} does not exist; record one with guard.stage(name, path=...)")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise BasisError(
                        f"{path}: expected a {FORMAT} file, found {metadata.get('format', 'no format mark')}"
                    )
                if int(metadata["version"]) > FORMAT_VERSION:
                    raise BasisError(
                        f"{path}: expected format version <= {FORMAT_VERSION}, found {metadata['version']}; "
                        "upgrade carerl-kernels"
                    )
                raw = json.loads(metadata["info"])
                raw["names"], raw["shapes"] = tuple(raw["names"]), tuple(tuple(s) for s in raw["shapes"])
                info = BasisInfo(**{f.name: raw[f.name] for f in fields(BasisInfo)})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            basis = cls(info, **tensors)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, BasisError):
                raise
            raise BasisError(f"{path}: damaged or truncated basis file ({error}); record or copy it again") from error
        basis._check_numbers(path)
        return basis

    def _check_numbers(self, path: Path) -> None:
        rows = self.directions.shape[0] if self.directions.dim() == 2 else -1
        if rows != self.info.k or self.singular_values.shape[1:] != (rows,):
            raise BasisError(f"{path}: expected {self.info.k} directions, found shape {list(self.directions.shape)}")
        if not (self.displacement.isfinite().all() and self.singular_values.isfinite().all()):
            raise BasisError(f"{path}: damaged basis file: displacement or singular values are not finite")

    def check_model(self, layout: Layout, architecture: str) -> None:
        """Refuses a model whose parameters have other names or shapes.

        Raises:
            BasisError: names the first difference.
        """
        here, there = (
            dict(zip(layout.names, layout.shapes, strict=True)),
            dict(zip(self.info.names, self.info.shapes, strict=True)),
        )
        for name in [*there, *here]:
            if here.get(name) != there.get(name):
                raise BasisError(
                    f"basis of domain {self.info.domain!r} belongs to another model ({self.info.architecture}, here "
                    f"{architecture}): expected parameter {name} {_shape(there.get(name))}, found {_shape(here.get(name))}; "
                    "record the stage on this architecture with the same parameters trainable"
                )
        if (
            self.displacement.shape != (layout.T, self.info.k)
            and self.info.kind == layout.kind
            and self.info.k == layout.k
        ):
            raise BasisError(
                f"basis of domain {self.info.domain!r}: expected displacements [{layout.T}, {layout.k}], found "
                f"{list(self.displacement.shape)}; the file is damaged, record or copy it again"
            )
        if (self.info.kind, self.directions.shape[1], self.info.names) != (layout.kind, layout.size, layout.names):
            raise BasisError(
                f"basis of domain {self.info.domain!r}: expected a {layout.kind} basis with N = {layout.size} over the "
                f"parameters in this order, found a {self.info.kind} basis with N = {self.directions.shape[1]}; "
                f"construct the guard with basis={self.info.kind!r}, k={self.info.k}"
            )


def _shape(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def hash_parameters(tensors: Iterable[Tensor]) -> str:
    """Hash of parameter values, to chain checkpoints: this stage's start is an earlier stage's end."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
