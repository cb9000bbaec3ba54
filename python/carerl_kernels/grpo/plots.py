"""Pictures of a run. matplotlib is imported on the first call only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import require


def new_figure(**options: Any) -> Any:
    """A matplotlib figure that needs no display; without pyplot, so no global state and no backend switch."""
    require("matplotlib", "a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def plot_accuracy(path: Path, lines: Sequence[Mapping[str, Any]], boundaries: Sequence[tuple[int, str]]) -> None:
    """Accuracy per domain over steps, from lines of metrics; stages marked by `boundaries`, their last steps and names."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.get("eval", {}).items():
            points.setdefault(name, []).append((line["step"], value))
    figure = new_figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, series in points.items():
        axes.plot(*zip(*series, strict=True), marker=".", label=name)
    _mark_stages(axes, boundaries)
    axes.set(xlabel="step", ylabel="accuracy")
    if points:
        axes.legend(loc="center left", frameon=False)
    figure.savefig(path, dpi=130)


def plot_training(path: Path, lines: Sequence[Mapping[str, Any]], boundaries: Sequence[tuple[int, str]]) -> None:
    """Reward, entropy, gradient norm and KL over steps."""
    steps = [line for line in lines if "reward" in line]
    figure = new_figure(figsize=(9.0, 5.0), layout="constrained")
    for i, (key, label) in enumerate(
        [("reward", "mean reward"), ("entropy", "entropy (nats/token)"), ("grad_norm", "gradient norm"), ("kl", "KL")]
    ):
        axes = figure.add_subplot(2, 2, i + 1)
        axes.plot([s["step"] for s in steps], [float("nan") if s[key] is None else s[key] for s in steps], linewidth=1)
        _mark_stages(axes, boundaries)
        axes.set(xlabel="step", ylabel=label)
    figure.savefig(path, dpi=130)


def _mark_stages(axes: Any, boundaries: Sequence[tuple[int, str]]) -> None:
    start = 0
    for end, name in boundaries:
        axes.axvline(end, color="0.8", linewidth=0.8, zorder=0)
        axes.text((start + end) / 2, 1.01, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
        start = end
