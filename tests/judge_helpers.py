"""The scripted judge of the examples, for the tests."""

from __future__ import annotations

import sys
from pathlib import Path

from carerl_kernels.rewards.pa_grm import Endpoint, Scorer

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from scripted_judge import ScriptedJudge  # noqa: E402

PROMPT = "Explain why the sky appears blue during the day and red at sunset."
GOOD = (
    "The sky appears blue during the day because air scatters short wavelengths more. At sunset the path is longer, "
    "therefore red light remains."
)
THIN = "The sky is blue."


def scorer(server: ScriptedJudge, *, endpoint: dict | None = None, **settings) -> Scorer:
    """A scorer that does not wait long between its tries."""
    return Scorer(Endpoint(server.url, "scripted", **({"backoff": 0.01, "timeout": 20} | (endpoint or {}))), **settings)


__all__ = ["EXAMPLES", "GOOD", "PROMPT", "THIN", "Endpoint", "Scorer", "ScriptedJudge", "scorer"]
