"""What the guard costs on a real training step: GRPO on SmolLM2-135M, LoRA and full parameters; docs/performance.md says how.

Where the guard corrects every 8th step, as by default, eight steps are timed together. What it does once, when
it is attached and at its first step, is told apart.
"""

from __future__ import annotations

import importlib.util
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..grpo import Domain, Example, GRPOConfig
from ..grpo.learner import Learner
from ..guard import CapabilityGuard
from ..subspace.matrices import MatrixLayout
from ..subspace.random_basis import random_basis
from ..tasks.smollm2 import load_smollm2
from .cost import short
from .measure import Spread
from .probe import peak_memory
from .show import Printer, percent

PROMPTS = (
    "Add the numbers 7, 12 and 5 and explain every step of the calculation.",
    "How many letters r are there in the word strawberry? Count them one by one.",
    "All cats are animals. Tom is a cat. What follows, and why?",
    "Write two sentences about the sea in winter.",
)
NEW_TOKENS = 48


@dataclass(frozen=True)
class Setting:
    """What is trained, and what the guard does meanwhile."""

    trains: str  # "lora" (rank 16 on every linear layer) or "full"
    k: int  # directions per domain of flat bases, rank of block and input bases
    domains: int = 0  # with a basis, whose directions act; 0 to record only
    dtype: torch.dtype = torch.float32  # of the acting flat bases (factors are fp32)
    record_every: int = 0  # record every n-th step (flat: k + 4 fp32 rows); 0: act only
    basis: Literal["flat", "block", "input"] = "flat"
    every: int = 1  # steps between corrections, 8 by default in a guard

    def __str__(self) -> str:
        if self.record_every:
            every = "every step" if self.record_every == 1 else f"every {self.record_every}th step"
            what = f"k={self.k}" if self.basis == "flat" else f"{self.basis} r={self.k}"
            return f"{self.trains}: record {what}, {every}"
        size = f"k={self.k} {short(self.dtype)}" if self.basis == "flat" else f"{self.basis} r={self.k}"
        return f"{self.trains}: act, {self.domains} domains, {size}" + (
            "" if self.every == 1 else f", every {self.every}th step"
        )

    @property
    def period(self) -> int:
        """Steps after which the guard's work repeats."""
        return max(self.record_every, self.every)

    @property
    def bytes_per_parameter(self) -> int:
        """Of the rows; factors are left out of the estimate, they are a few per cent of the parameters."""
        if self.basis != "flat":
            return 0
        return (self.k + 4) * 4 if self.record_every else self.domains * self.k * self.dtype.itemsize


SETTINGS = (
    Setting("lora", 64, 2, torch.float32),
    Setting("lora", 64, 2, torch.bfloat16),
    Setting("lora", 64, record_every=1),
    Setting("lora", 64, record_every=4),
    Setting("full", 8, 3, torch.int8),
    Setting("full", 16, 1, basis="block"),
    Setting("full", 16, 3, basis="block"),
    Setting("full", 8, record_every=1),
    Setting("full", 32, 1, basis="input"),
    Setting("full", 32, 3, basis="input"),
    Setting("full", 32, 3, basis="input", every=8),
    Setting("full", 32, record_every=1, basis="input"),
    Setting("lora", 32, 2, basis="input"),
    Setting("lora", 32, 2, basis="input", every=8),
)


def settings_named(parts: Sequence[str]) -> list[Setting]:
    """Settings whose names contain one of these, of which every one has to be in some; all where there are none."""
    for part in parts:
        if not any(part in str(setting) for setting in SETTINGS):
            names = "; ".join(map(str, SETTINGS))
            raise ValueError(f"setting: expected a part of one of these names ({names}), found {part!r}")
    return [setting for setting in SETTINGS if not parts or any(part in str(setting) for part in parts)]


@dataclass(frozen=True)
class GuardResult:
    """One setting."""

    setting: str
    N: int  # guarded parameters
    bases_bytes: int  # memory of acting or recording rows
    plain_seconds: Spread  # steps without the guard
    guarded_seconds: Spread  # and with it
    guard_seconds: Spread  # of them spent in the guard
    share: Spread  # per cent of the step, per step
    # of attaching the guard and of its first step, in which it searches optimizers for copies of weights
    once_seconds: Spread
    peak_without: int | None  # bytes resident at most in a step
    peak_with: int | None  # the same with the bases


def guard_overhead(
    printer: Printer,
    settings: Sequence[Setting] = SETTINGS,
    rounds: int = 3,
    load: Callable[[], tuple[nn.Module, Any]] = load_smollm2,
    new_tokens: int = NEW_TOKENS,
    prompts: Sequence[str] = PROMPTS,
) -> list[GuardResult]:
    """Measures every setting that this machine has the packages and the memory for.

    Args:
        settings: LoRA ones first, they leave the model as it was.
        rounds: of one period of guarded steps after a plain one.

    Raises:
        RuntimeError: the packages of SmolLM2-135M are missing; names them.
    """
    import psutil

    model, tokenizer = load()
    results = []
    for setting in settings:
        lora = setting.trains == "lora"
        if lora and importlib.util.find_spec("peft") is None:
            printer.line(f"{setting}: needs peft, which is not installed: pip install peft")
            continue
        # roughly: adapters have a few per cent of the parameters
        n = sum(p.numel() for p in model.parameters()) // (25 if lora else 1)
        size = n * setting.bytes_per_parameter
        if 1.5 * size + (4 << 30) >= psutil.virtual_memory().available:
            printer.line(f"{setting}: left out, its rows alone take {size / 2**30:.1f} GiB")
            continue
        printer.progress(str(setting))
        with _trained(model, lora) as trained:
            results.append(_measure(setting, trained, tokenizer, rounds, new_tokens, prompts))
        last = results[-1]
        printer.line(
            f"{setting}: step {last.plain_seconds.median:.2f} s, guard {last.guard_seconds.median * 1e3:.0f} ms, "
            + percent(last.share, " % of the step", 2)
            + f"; once {last.once_seconds.median:.2f} s"
        )
    printer.guard(results)
    return results


@contextmanager
def _trained(model: nn.Module, lora: bool) -> Iterator[nn.Module]:
    """The model with what is trained switched on: adapters, taken off again afterwards, or everything."""
    if not lora:
        yield model.requires_grad_(True)
        return
    from peft import LoraConfig, get_peft_model

    wrapped: Any = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    try:
        yield wrapped
    finally:
        wrapped.unload()


class _Enough(Exception):
    """Leaves a stage without making history of it."""


def _measure(
    setting: Setting, model: nn.Module, tokenizer: Any, rounds: int, new_tokens: int, prompts: Sequence[str]
) -> GuardResult:
    domain = Domain(
        "new",
        lambda rng, n: [Example(prompt) for prompt in rng.sample(prompts, n)],
        lambda example, text: float(zlib.crc32(text.encode()) % 2),  # as good as a verifier to the clock
    )
    config = GRPOConfig(prompts_per_step=2, group_size=4, max_new_tokens=new_tokens, progress=False)
    learner = Learner(model, tokenizer, {"new": domain}, config, None)
    optimizer = torch.optim.AdamW(learner.parameters, lr=1e-6, weight_decay=0.0)

    def step() -> float:
        started = time.perf_counter()
        with torch.enable_grad():
            learner.step(optimizer, {"new": 2}, "new")
        return time.perf_counter() - started

    step()  # moments of the optimizer, thread pools
    without = peak_memory(step)
    guard = CapabilityGuard(
        model,
        "remove",
        basis=setting.basis,
        k=setting.k if setting.basis == "flat" else None,
        r=setting.k if setting.basis != "flat" else None,
        basis_dtype=setting.dtype,
        record_every=max(setting.record_every, 1),
        every=setting.every,
    )
    for d in range(setting.domains):
        guard.add(random_basis(guard.layout, d, f"earlier {d}", guard.architecture, setting.dtype))

    plain, guarded, inside, once = [], [], [], []
    peak_with = None
    period = setting.period

    def one_round() -> None:
        plain.append(step())
        before, started = sum(guard.seconds.values()), time.perf_counter()
        guard.attach(optimizer)
        attached = time.perf_counter() - started
        learner.guard = guard
        step()
        once.append(attached + sum(guard.seconds.values()) - before)
        before = sum(guard.seconds.values())
        guarded.append(sum(step() for _ in range(period)) / period)
        inside.append((sum(guard.seconds.values()) - before) / period)
        learner.guard = None
        guard.detach()

    def all_rounds() -> None:
        nonlocal peak_with
        seen = peak_memory(one_round)
        peak_with = None if seen is None else seen[1]
        for times in (plain, guarded, inside, once):
            times.clear()  # the first round was the warm-up
        for _ in range(rounds):
            one_round()

    if setting.record_every:
        with suppress(_Enough), guard.stage("new"):
            all_rounds()
            raise _Enough
    else:
        all_rounds()
    return GuardResult(
        setting=str(setting),
        N=guard.layout.parameters,
        bases_bytes=_bases_bytes(guard, setting),
        plain_seconds=Spread.of(plain),
        guarded_seconds=Spread.of(guarded),
        guard_seconds=Spread.of(inside),
        share=Spread.of([100 * a / b for a, b in zip(inside, guarded, strict=True)]),
        once_seconds=Spread.of(once),
        peak_without=None if without is None else without[1],
        peak_with=peak_with,
    )


def _bases_bytes(guard: CapabilityGuard, setting: Setting) -> int:
    """Memory of acting or recording directions."""
    if isinstance(guard.layout, MatrixLayout):
        parts = [part for name in guard.history for part in (guard.basis(name).left, guard.basis(name).right)]
        return sum(factor.numel() * factor.element_size() for part in parts for factor in part.values())
    return guard.layout.size * setting.bytes_per_parameter
