"""Rule "probed": when to probe, whether probes can be trusted, and the few prompts they need."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import write_json
from .._json import nested_tuples

NOISY = 0.6
"""Agreement of two successive probes (share of coefficient weight whose sign stayed; a coin gives .5) below which signs are not
used."""
STEADY = 0.9
"""Agreement from which probes may come half as often."""
SLOWEST, FASTEST = 8, 4
"""The interval stays between `probe_every / FASTEST` and `probe_every * SLOWEST` steps."""


class Probes:
    """Schedule and trust of the probes of a guard.

    A round is all probes between two optimizer steps: micro-batches of one domain add up. Two successive rounds of a domain
    agree or not; steady signs are asked for less often, changing ones more often. Where they change as a coin does although the
    interval is as short as it gets, or no probe came for twice the interval, the domain's directions fall back to "bounded".

    Args:
        every: steps between rounds, to begin with.
        adaptive: whether the interval moves, and noisy domains fall back.
    """

    def __init__(self, every: int, adaptive: bool = False):
        self.every, self.adaptive = every, adaptive
        self.rounds = 0
        self.seconds = 0.0  # backward passes included, unlike those of the guard's report
        self.restart()

    def restart(self) -> None:
        """A new stage: nothing is known."""
        self.interval = self.every
        self.agreement: dict[str, float] = {}  # of the last two rounds, per domain
        self.sums: dict[str, Tensor] = {}  # of the round under way
        self._age: dict[str, int] = {}  # steps since the domain's last round
        self._noisy: set[str] = set()

    def add(self, name: str, coefficients: Tensor) -> None:
        """Takes in one micro-batch's coefficients `[T, width]`."""
        self.sums[name] = coefficients if name not in self.sums else self.sums[name] + coefficients

    def due(self, names: Sequence[str]) -> bool:
        """Whether any domain wants a round before the next step."""
        return any(name not in self.sums and self._age.get(name, self.interval) >= self.interval for name in names)

    def settle(self, name: str, before: Tensor, stack: Any) -> Tensor:
        """Ends a domain's round, given the signs of the one before (zero: none); gives the new ones. Synchronises once."""
        total = self.sums.pop(name)
        self._age[name] = 0
        self.rounds += 1
        weight = total.abs()
        same = torch.where(total.sign() == before, weight, 0.0)
        known = torch.where(before != 0, weight, 0.0)
        agreed, compared = (float(v) for v in stack.column_sums(torch.stack([same, known])).sum(-1))
        if compared == 0:
            return total.sign()
        self.agreement[name] = agreed / compared
        if not self.adaptive:
            return total.sign()
        least = min(self.agreement.values())
        fastest = max(1, self.every // FASTEST)
        self._noisy.discard(name)
        if least >= STEADY:
            self.interval = min(2 * self.interval, self.every * SLOWEST)
        elif least < (NOISY + STEADY) / 2:
            if self.interval <= fastest and self.agreement[name] < NOISY:
                self._noisy.add(name)
            self.interval = max(self.interval // 2, fastest)
        return total.sign()

    def step(self) -> None:
        """An optimizer step was taken."""
        for name in self._age:
            self._age[name] += 1

    def distrusted(self, names: Sequence[str]) -> dict[str, str]:
        """Domains that act by "bounded" instead, and why."""
        out = {}
        for name in names:
            age = self._age.get(name)
            if age is None:
                out[name] = "never probed"
            elif age > 2 * self.interval:
                out[name] = f"stale: {age} steps since its last probe, {self.interval} wanted"
            elif name in self._noisy:
                out[name] = f"noisy: successive probes agree on {self.agreement[name]:.0%} of their weight"
        return out

    def report(self, names: Sequence[str]) -> dict[str, Any]:
        """Interval, rounds, seconds (backward passes included), agreement, and who falls back to "bounded" and why."""
        return {
            "interval": self.interval,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "agreement": dict(self.agreement),
            "fallback": self.distrusted(names),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "interval": self.interval,
            "rounds": self.rounds,
            "agreement": dict(self.agreement),
            "age": dict(self._age),
            "noisy": sorted(self._noisy),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.interval, self.rounds = state["interval"], state["rounds"]
        self.agreement, self._age = dict(state["agreement"]), dict(state["age"])
        self._noisy = set(state["noisy"])


class PromptStore:
    """A few prompts with right answers per domain: all that rule "probed" needs of earlier data, or a run's own right answers.

    Args:
        size: kept per domain; of more that are offered a uniform sample stays (reservoir sampling).
    """

    def __init__(self, size: int = 32, seed: int = 0):
        if size < 1:
            raise ValueError(f"size: expected at least 1 prompt per domain, found {size}")
        self.size = size
        self._rng = random.Random(seed)
        self._kept: dict[str, list[Any]] = {}
        self._offered: dict[str, int] = {}

    def add(self, domain: str, item: Any) -> None:
        """Offers one item: anything that JSON can hold, such as a prompt and its answer."""
        kept = self._kept.setdefault(domain, [])
        self._offered[domain] = self._offered.get(domain, 0) + 1
        if len(kept) < self.size:
            kept.append(item)
        elif (at := self._rng.randrange(self._offered[domain])) < self.size:
            kept[at] = item

    def __getitem__(self, domain: str) -> list[Any]:
        return list(self._kept.get(domain, []))

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def counts(self) -> dict[str, int]:
        """How many items of every domain are kept."""
        return {domain: len(items) for domain, items in self._kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """All of it, the random state of the sample too: plain lists and numbers."""
        kept = {domain: list(items) for domain, items in self._kept.items()}
        return {"offered": dict(self._offered), "kept": kept, "random": self._rng.getstate()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        self._offered = dict(state["offered"])
        self._kept = {domain: list(items) for domain, items in state["kept"].items()}
        self._rng.setstate(nested_tuples(state["random"]))

    def save(self, path: Path | str) -> None:
        """Writes a JSON file atomically."""
        write_json(path, {"size": self.size, "offered": self._offered, "kept": self._kept}, indent=None)

    @classmethod
    def load(cls, path: Path | str, seed: int = 0) -> PromptStore:
        """Reads :meth:`save`'s file.

        Raises:
            ValueError: not such a file.
        """
        try:
            content = json.loads(Path(path).read_text())
            store = cls(content["size"], seed)
            store._kept = {str(d): list(items) for d, items in content["kept"].items()}
            store._offered = {str(d): int(n) for d, n in content["offered"].items()}
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: expected a prompt store written by PromptStore.save ({error})") from error
        return store
