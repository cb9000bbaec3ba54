"""What a judge needs of a language model, whoever runs it: one request in, one reply out, and what it cost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from ..._errors import PlainError
from ..log import LOGGER
from .cache import Cache, cache_key

T = TypeVar("T")


class BackendError(PlainError):
    """No usable reply, after all retries: this one item cannot be judged."""


class BackendRefusedError(BackendError):
    """The backend will refuse every request (wrong key, unknown model): going on makes no sense."""


@dataclass(frozen=True)
class Token:
    """A generated token and what might have stood in its place.

    Attributes:
        text: Its bytes; the texts of a reply's tokens joined are the reply's text.
        alternatives: Log-probability per alternative text, itself included. Normalised over the model's vocabulary.
    """

    text: bytes
    alternatives: Mapping[bytes, float]


@dataclass(frozen=True)
class Request:
    """One chat completion.

    Attributes:
        messages: {"role", "content"}.
        schema, name: JSON schema that the reply shall satisfy, and its name.
        max_tokens: Limit of the reply.
        temperature: 0 takes the likeliest token.
        choices: Texts whose probabilities matter wherever one of them is generated: the digits of a scale.
    """

    messages: tuple[Mapping[str, str], ...]
    schema: Mapping[str, Any]
    name: str
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        complete: False when it was cut at max_tokens.
        tokens: The tokens, with alternatives; empty when the backend gives none.
    """

    text: str
    complete: bool = True
    tokens: tuple[Token, ...] = ()


class Backend(Protocol):
    """A language model. `Endpoint` and `LocalModel` are two."""

    @property
    def model(self) -> str:
        """Names the model in cache keys and traces."""

    @property
    def meter(self) -> Meter:
        """What was used so far."""

    async def complete(self, request: Request) -> Reply:
        """One reply.

        Raises:
            BackendError: None, after retries.
            BackendRefusedError: None, and there will never be one.
        """


@dataclass
class Meter:
    """Counts of calls, tokens and money; the sum over everything a backend did.

    Args:
        price: Per million prompt and completion tokens, in any currency.
    """

    price: tuple[float, float] = (0.0, 0.0)
    calls: int = field(default=0, init=False)
    retries: int = field(default=0, init=False)
    failures: int = field(default=0, init=False)
    cached: int = field(default=0, init=False)
    prompt_tokens: int = field(default=0, init=False)
    completion_tokens: int = field(default=0, init=False)

    @property
    def cost(self) -> float:
        """Of all tokens, at `price`."""
        return (self.prompt_tokens * self.price[0] + self.completion_tokens * self.price[1]) / 1e6

    def paid(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count one answered call; the log (level DEBUG) gets a line."""
        self.calls += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        LOGGER.debug("judge call %d: %d prompt and %d completion tokens", self.calls, prompt_tokens, completion_tokens)

    def __str__(self) -> str:
        text = f"{self.calls} calls, {self.prompt_tokens} + {self.completion_tokens} tokens"
        if any(self.price):
            text += f", cost {self.cost:.4g}"
        for name in ("cached", "retries", "failures"):
            if getattr(self, name):
                text += f", {getattr(self, name)} {name}"
        return text


async def kept(cache: Cache, backend: Backend, kind: str, make: Callable[[], Awaitable[Any]], **decides: Any) -> Any:
    """What `make` gives as JSON, made once for the model and everything else that decides it; the meter counts what was there."""
    value, known = await cache.get_or_make(cache_key(kind, model=backend.model, **decides), make)
    backend.meter.cached += known
    return value


async def first_valid(
    backend: Backend, request: Request, attempts: int, read: Callable[[Reply], T], *, repeat: int = 0
) -> T:
    """What `read` makes of the first valid reply. The first request of all takes the likeliest tokens, later ones sample.

    Args:
        request: What is asked; `max_tokens` is doubled when a reply was cut off.
        attempts: Replies to ask for.
        read: Raises a ValueError for a reply that is not valid.
        repeat: Different numbers are independent replies.

    Raises:
        BackendError: No valid reply came back.
    """
    max_tokens, problem = request.max_tokens, ""
    for attempt in range(attempts):
        reply = await backend.complete(
            replace(
                request,
                max_tokens=max_tokens,
                temperature=0.0 if attempt == 0 and repeat == 0 else 0.7,
                seed=repeat * attempts + attempt,
            )
        )
        if not reply.complete:
            problem = f"cut off at {max_tokens} tokens"
            max_tokens *= 2
            continue
        try:
            return read(reply)
        except ValueError as error:
            problem = str(error)
            LOGGER.info("%s attempt %d: %s", request.name, attempt + 1, problem)
    backend.meter.failures += 1
    raise BackendError(f"no valid {request.name} in {attempts} replies of {backend.model}; the last: {problem}")
