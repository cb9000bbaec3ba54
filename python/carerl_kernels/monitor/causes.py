"""Known causes why a domain falls in a mixture or a sequence, and what in a run's metrics speaks for each.

A rule takes a run's record and what is lost in it, and gives a cause where the figures show it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..grpo.balance import DOMINATES
from .report.pooled import damages
from .report.record import RunRecord

LOST = 0.02  # of the score range: smaller differences are not looked into
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Figure:
    """One piece of evidence: a sentence with its figures, and the step that it is of."""

    text: str
    step: int


@dataclass(frozen=True)
class Cause:
    """A cause: its strength is how strongly the figures speak for it, from 0 to 1; who suffers, and what to try first."""

    name: str
    strength: float
    domains: list[str]
    remedy: str
    evidence: list[Figure]


@dataclass(frozen=True)
class Loss:
    """A domain that fell, or that never rose.

    Attributes:
        best, at: highest score, and its step.
        score, step: score furthest below the best before it, and its step; of a domain that never rose the last one.
        end: score of the last evaluation.
        stalled: it never rose, though it was trained.
        error: standard error of the difference where a monitor recorded it, else 0.
    """

    domain: str
    best: float
    at: int
    score: float
    step: int
    end: float
    stalled: bool = False
    error: float = 0.0


class Hit(NamedTuple):
    """A loss that a cause fits, and how much; and what is said of the cause where this is the worst of its losses."""

    loss: Loss
    weight: float
    strength: float
    remedy: str
    told: str
    step: int


def _during(points: Points, loss: Loss) -> Points:
    """What was recorded while the domain fell; of one that never rose, in the whole run."""
    return [(x, y) for x, y in points if loss.stalled or loss.at < x <= loss.step]


def _mean(points: Points) -> float:
    return statistics.fmean(y for _, y in points)


def step_budget(record: RunRecord, lost: Sequence[Loss]) -> Iterator[Cause]:
    """One domain has most of every mixed step, and another one falls."""
    found: dict[str, list[Hit]] = {}
    for loss in lost:
        shares = {n: _during(record.series("step_share", n), loss) for n in record.domains}
        shares = {n: points for n, points in shares.items() if len(points) >= 5}
        if len(shares) < 2:
            continue
        loudest = max(shares, key=lambda n: _mean(shares[n]))
        domination = _mean(shares[loudest]) * len(shares)
        if loudest == loss.domain or domination < DOMINATES:
            continue
        share, highest = _mean(shares[loudest]), max(shares[loudest], key=lambda p: p[1])[0]
        batch = _during(record.series("batch_share", loudest), loss)
        prompts = _mean(batch) if batch else 0.0
        scaled = share > 1.25 * prompts
        remedy = (
            "give every domain's rewards one scale: advantages='domain' or 'group' (TRL: scale_rewards='group'), or "
            "balance='gradient'"
            if scaled
            else "halve the learning rate, equal shares of prompts, or balance='controller'"
        )
        count = len([n for n in record.domains if record.series("step_share", n)])
        strength = min(1.0, 0.6 + 0.4 * (domination - DOMINATES) / max(count - DOMINATES, 0.5))
        told = (
            f"{loudest} had {share:.0%} of the step budget meanwhile, with {prompts:.0%} of the completions "
            f"(domination {domination:.2f}), most at step {highest}"
        )
        found.setdefault(loudest, []).append(Hit(loss, domination, strength, remedy, told, highest))
    for hits in found.values():
        yield from _cause("step budget", record, hits)


def curvature_or_conflict(record: RunRecord, lost: Sequence[Loss]) -> Iterator[Cause]:
    """The split of the losses while a domain fell, where it was recorded."""
    fell = [loss for loss in lost if not loss.stalled]
    windows = {loss: [d for d in damages(record, after=loss.at, until=loss.step) if d.total > 0] for loss in fell}
    for name, part, other, remedy in (
        (
            "curvature",
            "even",
            "odd",
            "halve the learning rate, or guard each domain of the batch (editor: guard, input directions): both shorten what "
            "others' steps do to it; PCGrad and other surgery have nothing to repair here",
        ),
        (
            "conflict",
            "odd",
            "even",
            "guard each domain of the batch (editor: guard), or PCGrad; rehearse the domain's own answers",
        ),
    ):
        hits = []
        for loss, found in windows.items():
            of = [d for d in found if d.domain == loss.domain and getattr(d, part) > max(getattr(d, other), 0.01)]
            if not of:
                continue
            worst = max(of, key=lambda d: d.total)
            ratio = getattr(worst, part) / (abs(worst.odd) + abs(worst.even))
            told = (
                f"steps of {worst.acting} raised its loss by {worst.total:.3g} nats a token a window: odd "
                f"{worst.odd:+.3g}, even {worst.even:+.3g} (mean of {worst.windows}, the last until step {worst.last})"
            )
            hits.append(Hit(loss, worst.total, 0.45 + 0.35 * ratio, remedy, told, worst.last))
        yield from _cause(name, record, hits)


def judge_noise(record: RunRecord, lost: Sequence[Loss]) -> Iterator[Cause]:
    """Rewards differ within groups more than right and wrong answers could: something else is rewarded, too.

    Of n completions that are right with probability p all agree with probability p^n + (1 - p)^n at least, and the variance of
    rewards 0 and 1 within prompts is p (1 - p) at most (both with equality where all prompts are alike).
    """
    size = ((record.config or {}).get("config") or {}).get("group_size")
    for name in record.domains:
        scores, rewards = record.series("eval", name), record.series("rewards", name)
        if not (scores and len(rewards) >= 10) or record.span != 1:
            continue
        begin = rewards[-1][0] // 2  # the later half, in which most is known
        late = {key: [(x, y) for x, y in record.series(key, name) if x > begin] for key in ("agreed", "rewards")}
        late["variance"] = [(x, y) for x, y in record.series("reward_variance", name) if x > begin]
        if not all(late.values()):
            continue
        p = _mean([(x, y) for x, y in scores if x > begin] or scores[-1:])
        evidence, last = [], late["agreed"][-1][0]
        expected, seen = p**size + (1 - p) ** size if isinstance(size, int) else 0.0, _mean(late["agreed"])
        if expected >= 0.15 and seen < expected / 3:
            evidence.append(
                f"{name}: {seen:.0%} of the prompts agree from step {begin + 1} on; right and wrong alone would make "
                f"{expected:.0%} of them agree at its accuracy of {p:.2f} with {size} completions"
            )
        most, variance = p * (1 - p), _mean(late["variance"])
        if abs(_mean(late["rewards"]) - p) < 0.15 and variance > 1.4 * most + 0.02:  # on the scale of the score
            evidence.append(
                f"{name}: reward variance within prompts {variance:.3g} from step {begin + 1} on; right and wrong alone "
                f"have {most:.3g} at most at its accuracy of {p:.2f}"
            )
        if evidence:
            shares = [(x, y) for x, y in record.series("step_share", name) if x > begin]
            yield Cause(
                "judge's noise",
                min(0.9, 0.4 + 0.5 * (_mean(shares) if shares else 1.0)),
                [loss.domain for loss in lost],
                f"make {name}'s rewards say less by chance: several judgements or a rank per group, a verifier where there is "
                "one, larger groups; meanwhile a smaller share or weight of it, and half the learning rate",
                [Figure(told, last) for told in evidence],
            )


def dead_groups(record: RunRecord, lost: Sequence[Loss]) -> Iterator[Cause]:
    """Most prompts of a domain teach nothing."""
    hits = []
    for loss in lost:
        points = _during(record.series("agreed", loss.domain), loss)
        if len(points) < 5 or (share := _mean(points)) < 0.7:
            continue
        reward, step = record.series("rewards", loss.domain), points[-1][0]
        low = bool(reward) and reward[-1][1] < 0.5
        kind = "easier prompts, or a graded reward" if low else "harder prompts"
        remedy = f"balance='shares' (fresh prompts for groups that agree), {kind}, or larger groups"
        told = f"{share:.0%} of {loss.domain}'s prompts earn the same whatever is written, until step {step}"
        hits.append(Hit(loss, share, 0.35 + 0.5 * share, remedy, told, step))
    yield from _cause("dead groups", record, hits)


def learning_rate(record: RunRecord, lost: Sequence[Loss]) -> Iterator[Cause]:
    """Everything falls at once, what is trained as well; or steps that clipping and finiteness had to stop."""
    fell = [loss for loss in lost if not loss.stalled]
    trained = [n for n in record.domains if record.series("batch_share", n)]
    evidence, strength = [], 0.0
    own = [loss for loss in fell if loss.domain in trained and _trained_meanwhile(record, loss)]
    if own and len(own) == len(trained) and len(fell) == len([n for n in record.domains if record.series("eval", n)]):
        worst = max(own, key=lambda loss: loss.best - loss.score)
        evidence += [
            _fall(record, worst),
            Figure(f"all of {', '.join(loss.domain for loss in own)} fell while trained", worst.step),
        ]
        strength = 0.85
    norms = record.series("grad_norm")
    if len(norms) >= 12:
        quarter = len(norms) // 4
        early, late = (statistics.median(y for _, y in part) for part in (norms[:quarter], norms[-quarter:]))
        if early > 0 and late > 4 * early:
            evidence.append(Figure(f"the gradient's norm rose from {early:.3g} to {late:.3g}", norms[-1][0]))
            strength = max(strength, 0.7) + 0.05
    clipped = record.series("clip_fraction")
    if clipped and _mean(clipped) > 0.2:
        evidence.append(Figure(f"{_mean(clipped):.0%} of the ratios were clipped", max(clipped, key=lambda p: p[1])[0]))
        strength = max(strength, 0.65) + 0.05
    skipped = [(x, y) for x, y in record.series("skipped") if y > 0]
    if skipped:
        evidence.append(Figure(f"{len(skipped)} steps were skipped for gradients that are not finite", skipped[0][0]))
        strength = max(strength, 0.8) + 0.05
    if evidence and fell:
        rates = record.series("lr")
        now = f" (it was {max(y for _, y in rates):.2g})" if rates else ""
        remedy = f"halve the learning rate{now}, more warm-up steps, max_grad_norm"
        yield Cause("learning rate", min(strength, 1.0), [loss.domain for loss in fell], remedy, evidence)


def overfit(record: RunRecord, lost: Sequence[Loss]) -> Iterator[Cause]:
    """The reward on training prompts rises while held-out scores of the same domain fall: nobody else's steps are to blame."""
    hits = []
    remedy = "more and other prompts, fewer steps, a KL term (kl_beta); no guard helps against a domain's own steps"
    for loss in lost:
        points = _during(record.series("rewards", loss.domain), loss)
        if len(points) < 8:
            continue
        third = len(points) // 3
        before, after = _mean(points[:third]), _mean(points[-third:])
        if after - before >= LOST * (record.span or 1.0):
            told = f"its reward in training rose from {before:.3g} to {after:.3g} meanwhile"
            hits.append(Hit(loss, after - before, 0.9, remedy, told, points[-1][0]))
    yield from _cause("overfit", record, hits)


def unprotected_stage(record: RunRecord, lost: Sequence[Loss]) -> Iterator[Cause]:
    """A domain falls in a stage that does not train it."""
    hits = []
    remedy = (
        "more of it: r, energy and room of the guard, rehearsal of its answers, half the learning rate"
        if (record.config or {}).get("guarded")
        else "guard it: record its stage or guard.protect(name, prompts) before; or train both in one batch"
    )
    for loss in lost:
        stages = [s for s in record.spans if s.last > loss.at and s.first <= loss.step]
        if not loss.stalled and stages and not _trained_meanwhile(record, loss):
            told = f"stage {stages[-1].name} does not train {loss.domain}"
            hits.append(Hit(loss, loss.best - loss.score, 0.5, remedy, told, loss.step))
    yield from _cause("unprotected stage", record, hits)


RULES: tuple[Callable[[RunRecord, Sequence[Loss]], Iterator[Cause]], ...] = (
    step_budget,
    curvature_or_conflict,
    judge_noise,
    dead_groups,
    learning_rate,
    overfit,
    unprotected_stage,
)


def _trained_meanwhile(record: RunRecord, loss: Loss) -> bool:
    return bool(_during(record.series("batch_share", loss.domain), loss))


def _cause(name: str, record: RunRecord, hits: Sequence[Hit]) -> Iterator[Cause]:
    """A cause of all that it fits, with the figures of the worst; none where it fits nothing."""
    if hits:
        worst = max(hits, key=lambda hit: hit.weight)
        evidence = [_fall(record, worst.loss), Figure(worst.told, worst.step)]
        yield Cause(name, worst.strength, [hit.loss.domain for hit in hits], worst.remedy, evidence)


def _fall(record: RunRecord, loss: Loss) -> Figure:
    if loss.stalled:
        return Figure(f"{loss.domain} never rose: {loss.score:.3f} at step {loss.step}", loss.step)
    less = record.difference(loss.best - loss.score)
    return Figure(
        f"{loss.domain} fell from {loss.best:.3f} (step {loss.at}) to {loss.score:.3f} (step {loss.step}), by {less}",
        loss.step,
    )
