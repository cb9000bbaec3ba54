"""Protocol-aware generative rewards: a language model writes how answers to a prompt are judged, then judges by it.

`Scorer` is the whole; `ProtocolBuilder` and `Judge` are its two halves; `Endpoint` and `LocalModel` run the model.
"""

from ..._loop import run_sync
from .agreement import JudgeNoise, judge_noise, rank_agreement
from .backend import Backend, BackendError, BackendRefusedError, Meter, Reply, Request, Token
from .builder import ProtocolBuilder
from .cache import Cache
from .endpoint import Endpoint
from .judge import Finding, Judge, Verdict
from .local import LocalModel
from .protocol import Criterion, Limits, Protocol, protocol_schema, verdict_schema
from .scorer import Item, Score, Scorer
from .signs import signs, without_signs
from .untrusted import Controls, quoted, repetition

__all__ = [
    "Backend",
    "BackendError",
    "BackendRefusedError",
    "Cache",
    "Controls",
    "Criterion",
    "Endpoint",
    "Finding",
    "Item",
    "Judge",
    "JudgeNoise",
    "Limits",
    "LocalModel",
    "Meter",
    "Protocol",
    "ProtocolBuilder",
    "Reply",
    "Request",
    "Score",
    "Scorer",
    "Token",
    "Verdict",
    "judge_noise",
    "protocol_schema",
    "quoted",
    "rank_agreement",
    "repetition",
    "run_sync",
    "signs",
    "verdict_schema",
    "without_signs",
]
