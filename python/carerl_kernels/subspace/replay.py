"""The recorder of input bases: when a stage ends its model is shown what the stage was about (see :mod:`.observe`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batches import Reservoir
from .factored import FactoredBasis
from .matrices import MatrixLayout
from .observe import observe, same_random_numbers
from .recorder import Recorder

SEQUENCES = 64
"""Sequences of a stage that are kept and shown at its end, over all processes."""


class ReplayRecorder(Recorder):
    """Shows batches to the model at the end of a stage, and measures how far the stage moved along their directions.

    Without `inputs` a sample of what the model was called with is kept: told by the trainer (:meth:`see`), or heard at the
    call of the model itself, with gradients enabled; calls of steps that were dropped, skipped or another domain's are not kept.

    Args:
        layout: see :class:`Recorder`. Unless `fixed`, :meth:`finish` corrects its sides by what it sees.
        model: what the training calls, wrappers included.
        inputs: batches to show, as :func:`observe` takes them; a collection, for it may be gone through several times.
        group, unseen, shown: see :func:`observe`, which gets them; `shown` are `run`, `tokenizer` and `positions`.
        fixed: the layout has history, and must stay as it is.
    """

    layout: MatrixLayout

    def __init__(
        self,
        domain: str,
        layout: MatrixLayout,
        parameters: Sequence[Tensor],
        model: nn.Module,
        *,
        energy: float = 0.9,
        inputs: Iterable[Any] | None = None,
        group: Any = None,
        unseen: Literal["error", "free"] = "free",
        architecture: str = "",
        fixed: bool = False,
        **shown: Any,
    ):
        super().__init__(domain, layout, parameters, architecture)
        self.model, self.energy, self.fixed = model, energy, fixed
        self.inputs = list(inputs) if isinstance(inputs, Iterator) else inputs
        self._options: dict[str, Any] = {"group": group, "unseen": unseen, **shown}
        group = group if group is not None else layout.shards.group
        rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        self._sample = Reservoir(-(-SEQUENCES // world), rank)
        self._told = False  # the trainer says what the model was called with
        self._paused = 0
        self._backward: list[bool] = []  # of the calls that wait, whether their gradients came
        self._ear: _Ear | None = None

    # ------------------------------------------------------------------------------------------------ what it listens to

    def begin(self) -> None:
        """Listens to calls of the model, unless there are inputs to show."""
        if self.inputs is None:
            self._ear = _Ear(self, self.model)

    def end(self) -> None:
        if self._ear is not None:
            self._ear.remove()
            self._ear = None
        self._forget()
        super().end()

    def see(self, batch: Any) -> None:
        """A trainer says what the step that comes is made of; from then on calls of the model are not listened to.

        Args:
            batch: what the model is called with. Of `input_ids` and `attention_mask` `[B, T]` alone padding is not kept.
        """
        if self._paused or self.inputs is not None:
            return
        if not self._told:
            self._forget()
            self._told = True
        if isinstance(batch, Mapping) and set(batch) == {"input_ids", "attention_mask"}:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                self._sample.offer({"input_ids": ids[mask.bool()].unsqueeze(0)})
        else:
            self._sample.offer(batch)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls inside are not the stage's: probes, evaluations, gradients that are only looked at."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def _hear(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """A call of the model; gives its number among those that wait."""
        if self._told or self._paused or not torch.is_grad_enabled():
            return None
        if any(self._backward) and all(p.grad is None for p in self.model.parameters()):
            self._forget()  # their gradients came and went without a step: it was skipped
        self._sample.offer((args, kwargs))
        self._backward.append(False)
        return len(self._backward) - 1

    def _forget(self) -> None:
        self._sample.drop()
        self._backward = []

    # ------------------------------------------------------------------------------------------------ the stage's steps

    def update(self, grads: Sequence[Tensor]) -> None:
        """A step of this domain is taken: what it was made of counts.

        Raises:
            RuntimeError: at the first step, if no call of the model was noticed.
        """
        if self.inputs is None and not self.steps and not self._sample.offered:
            raise RuntimeError(
                f"stage {self.domain!r}: expected calls of the model with gradients before its first step, found none: it is not "
                "called through the object that the guard was built from. Pass the stage's prompts as guard.stage(name, "
                "inputs=batches), tell the recorder with recorder.see(batch), or build the guard from what is called"
            )
        self._sample.accept()
        self._backward = []
        self.steps += 1

    def discard(self) -> None:
        self._forget()

    @torch.no_grad()
    def finish(self, parameters: Sequence[Tensor]) -> FactoredBasis:
        """Shows the inputs to the model as it is now. Raises as :func:`observe`, too."""
        self.check_steps(self.steps)
        batches = self.inputs if self.inputs is not None else list(self._sample.batches())
        with self.paused():
            moments = observe(self.model, batches, self.layout, **self._options)
        if not self.fixed:
            self.layout = moments.layout(self.layout, parameters)
        stage: dict[str, Any] = {"architecture": self.architecture, "start": self.start, "steps": self.steps}
        return moments.basis(self.layout, self.domain, energy=self.energy, parameters=parameters, **stage)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Recorder`. With several processes the sample is the first one's."""
        return {**super().state_dict(), "sample": self._sample.state(), "told": self._told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._told = state["told"]
        self._sample.load(state["sample"])


class _Ear:
    """Hears the calls of one module, in the place where `Module.__call__` looks for a compiled call.

    No forward hook: compiled code does not notice new ones, and copies of the model would bring theirs along. Copies of this
    (deepcopy, pickle) are nothing.
    """

    def __init__(self, recorder: ReplayRecorder, module: nn.Module):
        self.recorder, self.module = recorder, module
        self.before = vars(module).get("_compiled_call_impl")
        vars(module)["_compiled_call_impl"] = self
        # Not as a decorator: that would import dynamo, and what it brings, with this module.
        with same_random_numbers():
            self._aside = torch.compiler.disable(self._heard, recursive=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._aside(*args, **kwargs)

    def _heard(self, *args: Any, **kwargs: Any) -> Any:
        number = self.recorder._hear(args, kwargs)
        out = (self.before or self.module._call_impl)(*args, **kwargs)
        if number is not None:
            waiting = self.recorder._backward
            for tensor in pytree.tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: waiting.__setitem__(number, True))
                    break
        return out

    def remove(self) -> None:
        """Puts back what was there."""
        if self.before is None:
            vars(self.module).pop("_compiled_call_impl", None)
        else:
            vars(self.module)["_compiled_call_impl"] = self.before

    def __reduce__(self) -> Any:
        return type(None), ()  # what is left of an ear in a copy of its model
