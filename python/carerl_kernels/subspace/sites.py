"""Which side of a weight its inputs meet: a first guess from the modules alone, before the weights have been watched at work."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from .matrices import Side

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP, checkpointing


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers inside the model add to it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def guess_sides(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> dict[str, Side]:
    """From which side each weight matrix is multiplied, by parameter name.

    Right-sided are linear layers `[m, n]` (LoRA's adapters and the projections of `MultiheadAttention` are some) and
    whatever is not known; left-sided are transformers' `Conv1D`, whose weight is transposed, and embeddings, whose inputs are
    tokens. A weight that an embedding shares with another layer counts as that layer's. Three-dimensional weights are stacks of
    matrices (fused experts), right-sided unless their module says `is_transposed`. Convolutions have no side.

    Args:
        named: the parameters to guess for, under the names that the answer has.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for own in module._parameters.values():
            if own is not None:
                owners.setdefault(id(own), []).append(module)
    sides: dict[str, Side] = {}
    for name, parameter in named:
        modules = owners.get(id(parameter), [])
        if parameter.dim() in (2, 3) and not any(isinstance(m, nn.modules.conv._ConvNd) for m in modules):
            guesses = [_side(module, parameter) for module in modules]
            sides[name] = "left" if guesses and all(side == "left" for side in guesses) else "right"
    return sides


def _side(module: nn.Module, parameter: Tensor) -> Side:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or type(module).__name__ == "Conv1D":
        return "left"
    return "left" if parameter.dim() == 3 and getattr(module, "is_transposed", False) else "right"
