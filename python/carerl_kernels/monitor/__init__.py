"""Drift monitor and report: does one domain fall while others are trained, how sure is that, and who pulls where."""

from ..grpo.rollout import reward_statistics
from .controller import Controller
from .domain import Alert
from .monitor import DriftMonitor
from .sequential import DropTest, smallest_drop
from .sinks import JsonLines, Sink, TensorBoard, Trackio, WandB

__all__ = [
    "Alert",
    "Controller",
    "DriftMonitor",
    "DropTest",
    "JsonLines",
    "Sink",
    "TensorBoard",
    "Trackio",
    "WandB",
    "reward_statistics",
    "smallest_drop",
]
