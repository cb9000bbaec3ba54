"""One safetensors file per domain: directions, spectrum, orientation, and the fingerprint of the model they belong to."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._ops import block_of
from .layout import Kind, Layout, RowKind
from .saving import Part, check_sums, save_parts

if TYPE_CHECKING:
    from .matrices import MatrixLayout

    AnyLayout = Layout | MatrixLayout

FORMAT = "carerl-basis"
HOW = "record one with `carerl basis record`, or with guard.protect or guard.stage and path="
FORMAT_VERSION = 2
SCALE_BLOCK = 128  # elements of int8 and float8 directions that share one scale


class BasisError(ValueError):
    """A basis that cannot be used here: another model, another format, a damaged file."""


@dataclass(frozen=True)
class BasisInfo:
    """What is known about a basis beside its numbers; stored as JSON in the file's metadata.

    Attributes:
        kind, k: of the basis; k is its number of directions per coefficient row, or the rank of factored bases.
        architecture: class name of the model, for messages.
        names, shapes: The names and shapes of the parameters, in order.
        start_hash, end_hash: of the parameter values when the stage began and ended.
        steps: gradients streamed in.
        skipped: gradients refused because they were not finite.
        gradient_capture: share of the stage's gradient energy that the directions hold, 0..1; None where gradients were not
            looked at (block bases come from the parameter change alone).
        displacement_capture: share of the stage's squared parameter change that they hold, 0..1; None where no stage was
            recorded: the directions are of inputs that a finished model was shown.
    """

    domain: str
    kind: Kind
    k: int
    architecture: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    start_hash: str = ""
    end_hash: str = ""
    steps: int = 0
    skipped: int = 0
    gradient_capture: float | None = None
    displacement_capture: float | None = None

    @property
    def shape_of(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return dict(zip(self.names, self.shapes, strict=True))

    @classmethod
    def of(cls, layout: AnyLayout, domain: str, **known: Any) -> BasisInfo:
        """What is known about a basis over a layout; see the attributes."""
        return cls(domain=domain, kind=layout.kind, k=layout.k, names=layout.names, shapes=layout.shapes, **known)


class StoredBasis(ABC):
    """The recorded directions of one domain, in one file: :class:`DomainBasis` (rows) or `FactoredBasis` (factors).

    A class says which kinds it stores: `class DomainBasis(StoredBasis, kinds=get_args(RowKind))`.
    """

    info: BasisInfo
    layout: Any
    _stored: ClassVar[dict[str, type[StoredBasis]]] = {}

    def __init_subclass__(cls, kinds: Sequence[Kind] = ()) -> None:
        StoredBasis._stored.update(dict.fromkeys(kinds, cls))

    @classmethod
    def load(cls, path: Path | str, layout: Any = None) -> Any:
        """Reads a file written by :meth:`save`: the class that fits what is in it.

        Args:
            layout: of sharded parameters: only what belongs to this process is read.

        Raises:
            FileNotFoundError: there is no such file.
            BasisError: not a basis file, a newer format version, or damaged.
        """
        path = Path(path)
        if layout is not None and not layout.shards.sharded:
            layout = None
        with _opened(path) as (file, info):
            basis = cls._stored[info.kind]._read(path, info, file, layout)
            if layout is None:  # a part of a file cannot be checked by itself
                whole = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if wrong := check_sums(file.metadata() or {}, whole):
                    raise BasisError(
                        f"{path}: damaged basis file: {', '.join(wrong)} changed since it was written; record or copy it again"
                    )
        if not isinstance(basis, cls):
            raise BasisError(f"{path}: expected a {cls.__name__}, found a {info.kind} basis ({type(basis).__name__})")
        return basis

    def save(self, path: Path | str) -> None:
        """Writes the file atomically. The part of a sharded basis: every process calls it, one writes.

        Raises:
            OSError: the directory or the disk refuses; nothing is left half-written.
        """
        metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "info": json.dumps(asdict(self.info))}
        save_parts(path, self._parts(), metadata, None if self.layout is None else self.layout.shards)

    @classmethod
    @abstractmethod
    def _read(cls, path: Path, info: BasisInfo, file: Any, layout: Any) -> StoredBasis: ...

    @abstractmethod
    def _parts(self) -> dict[str, Part]:
        """What to write, or the part of it that is here."""

    def _empty(self, path: Path) -> BasisError:
        return BasisError(
            f"{path}: the basis of domain {self.info.domain!r} has no directions, all of them are zero: it would protect "
            "nothing; record the domain again"
        )

    @abstractmethod
    def quantized(self) -> StoredBasis:
        """The same directions in fewer bytes."""

    def check_model(self, layout: AnyLayout, architecture: str) -> None:
        """Refuses a model whose parameters have other names or shapes.

        Raises:
            BasisError: names the first difference.
        """
        here, there = dict(zip(layout.names, layout.shapes, strict=True)), self.info.shape_of
        for name in [*there, *here]:
            if here.get(name) != there.get(name):
                raise BasisError(
                    f"basis of domain {self.info.domain!r} belongs to another model ({self.info.architecture}, here "
                    f"{architecture}): expected parameter {name} {_shape(there.get(name))}, found {_shape(here.get(name))}; "
                    "record the stage on this architecture with the same parameters trainable"
                )
        if (self.info.kind, self.info.names) != (layout.kind, layout.names):
            raise BasisError(
                f"basis of domain {self.info.domain!r}: expected a {layout.kind} basis over the parameters in this order, "
                f"found a {self.info.kind} basis; construct the guard with basis={self.info.kind!r}, k={self.info.k}"
            )


@dataclass(frozen=True)
class DomainBasis(StoredBasis, kinds=get_args(RowKind)):
    """Rows over all parameters, oriented so that `u . (theta_start - theta_end) >= 0` (gradient convention).

    Attributes:
        directions: `[k, N]`, rows orthonormal per coefficient row (float32, bfloat16 or float16; with scales int8 or
            float8_e4m3fn).
        singular_values: `[T, k]` float64, of the stage's gradients.
        displacement: h `[T, k]` float64, at least zero: how far the stage moved along each direction.
        scales: `[k, ceil(N/block)]` of int8 or float8_e4m3fn directions, else None.
        layout: The layout of sharded parameters, when the directions are this process's part only; else None.
    """

    info: BasisInfo
    directions: Tensor
    singular_values: Tensor
    displacement: Tensor
    scales: Tensor | None = None
    layout: Layout | None = None

    def quantized(self, dtype: torch.dtype = torch.int8) -> DomainBasis:
        """The same basis with block-scaled directions, a quarter of fp32's memory.

        Args:
            dtype: int8 (relative error .0065) or float8_e4m3fn (.026).
        """
        if self.directions.dtype == dtype:
            return self
        rows = self.dequantized().directions.unsqueeze(0)
        codes, scales = torch.ops.carerl.quantize_bases(rows, SCALE_BLOCK, dtype)
        return replace(self, directions=codes[0], scales=scales[0])

    def dequantized(self) -> DomainBasis:
        """The same basis with float32 directions where they were quantised."""
        if self.scales is None:
            return self
        directions = _dequantized(self.directions, self.scales, self.directions.shape[-1])
        return replace(self, directions=directions, scales=None)

    def part_of(self, layout: Layout) -> DomainBasis:
        """This process's part under a sharded layout; itself where it is that already, or nothing is sharded."""
        if self.layout is not None or not layout.shards.sharded:
            return self
        whole = self.dequantized().directions
        part = _part(layout, whole.shape[0], lambda columns: whole[:, columns])
        return replace(self, directions=part, scales=None, layout=layout)

    def _parts(self) -> dict[str, Part]:
        basis = self if self.layout is None else self.dequantized()  # blocks of codes straddle the parts
        parts = {"singular_values": Part.whole(basis.singular_values), "displacement": Part.whole(basis.displacement)}
        if basis.scales is not None:
            parts["scales"] = Part.whole(basis.scales)
        if self.layout is None:
            parts["directions"] = Part.whole(basis.directions)
        else:
            pieces = [(basis.directions[:, here], there) for here, there in self.layout.file_columns]
            shape = (basis.directions.shape[0], self.layout.file_size)
            parts["directions"] = Part(shape, basis.directions.dtype, 1, pieces)
        return parts

    @classmethod
    def _read(cls, path: Path, info: BasisInfo, file: Any, layout: Layout | None) -> DomainBasis:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "directions"}  # noqa: SIM118
        stored, scales = file.get_slice("directions"), tensors.pop("scales", None)
        shape = stored.get_shape()
        if len(shape) != 2:
            raise BasisError(f"{path}: expected {info.k} directions, found shape {list(shape)}")
        columns = shape[-1]
        if layout is None or columns != layout.file_size:
            basis = cls(info, file.get_tensor("directions"), scales=scales, **tensors)
        else:

            def read(at: slice) -> Tensor:
                part = stored[:, at.start : at.stop]
                return part if scales is None else _dequantized(part, scales, columns, at.start)

            basis = cls(info, _part(layout, shape[0], read), layout=layout, **tensors)
        basis._check_numbers(path)
        return basis

    def _check_numbers(self, path: Path) -> None:
        rows = self.directions.shape[0] if self.directions.dim() == 2 else -1
        if rows != self.info.k or self.singular_values.shape[1:] != (rows,):
            raise BasisError(f"{path}: expected {self.info.k} directions, found shape {list(self.directions.shape)}")
        stored = {"directions": self.directions, "scales": self.scales}
        for what, t in {**stored, "displacement": self.displacement, "singular_values": self.singular_values}.items():
            if t is not None and t.is_floating_point() and not all(bool(row.float().isfinite().all()) for row in t):
                raise BasisError(f"{path}: damaged basis file: {what} is not finite")
        if self.layout is None and not any(bool(row.float().any()) for row in self.directions):
            raise self._empty(path)

    def check_model(self, layout: Any, architecture: str) -> None:
        super().check_model(layout, architecture)
        if self.displacement.shape != (layout.T, self.info.k) and self.info.k == layout.k:
            raise BasisError(
                f"basis of domain {self.info.domain!r}: expected displacements [{layout.T}, {layout.k}], found "
                f"{list(self.displacement.shape)}; the file is damaged, record or copy it again"
            )
        size = layout.size if self.layout is not None else layout.file_size
        if self.directions.shape[1] != size:
            raise BasisError(
                f"basis of domain {self.info.domain!r}: expected a {layout.kind} basis with N = {size}, found "
                f"N = {self.directions.shape[1]}; the file is damaged, record or copy it again"
            )


def _part(layout: Layout, k: int, read: Callable[[slice], Tensor]) -> Tensor:
    """The local rows `[k, N]` of a layout, from columns of whole rows."""
    out = torch.zeros(k, layout.size)
    for here, there in layout.file_columns:
        if there.stop > there.start:
            columns = read(there)
            if out.dtype != columns.dtype:
                out = out.to(columns.dtype)  # the first columns tell
            out[:, here] = columns
    return out


def _dequantized(codes: Tensor, scales: Tensor, columns: int, start: int = 0) -> Tensor:
    """float32 columns from block-scaled ones that begin at `start` of rows with this many columns."""
    block = block_of("dequantized", columns, scales.shape[-1])
    out, places = codes.float(), torch.arange(start, start + codes.shape[-1], device=codes.device)
    for part, at in zip(out.split(1 << 20, dim=1), places.split(1 << 20), strict=True):
        part *= scales[:, at // block]
    return out


def read_info(path: Path | str) -> BasisInfo:
    """What is known about the basis in a file, without reading its numbers. Raises as :meth:`StoredBasis.load`."""
    with _opened(Path(path)) as (_, info):
        return info


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, BasisInfo]]:
    """A basis file, and what is known about it; errors inside are the file's."""
    if not path.is_file():
        raise FileNotFoundError(f"basis file {path} does not exist; {HOW}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file, _read_info(path, file.metadata() or {})
    except BasisError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BasisError(f"{path}: damaged or truncated basis file ({error}); record or copy it again") from error


def _read_info(path: Path, metadata: Mapping[str, str]) -> BasisInfo:
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "no format mark")
        raise BasisError(f"{path}: expected a {FORMAT} file, found a safetensors file of format {found!r}; {HOW}")
    if int(metadata["version"]) > FORMAT_VERSION:
        raise BasisError(
            f"{path}: expected format version <= {FORMAT_VERSION}, found {metadata['version']}; upgrade carerl-kernels"
        )
    raw = json.loads(metadata["info"])
    raw["names"], raw["shapes"] = tuple(raw["names"]), tuple(tuple(s) for s in raw["shapes"])
    return BasisInfo(**{f.name: raw[f.name] for f in fields(BasisInfo)})


def _shape(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else str(list(shape))
