"""A judge behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, or a paid service."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Unpack

from ..._http import Answer, HttpLimits, RetryingClient, TryAgainError, raise_if_transient
from ..._json import as_logprob
from ..log import LOGGER
from .backend import BackendError, BackendRefusedError, Meter, Reply, Request, Token

_REFUSED = {401, 402, 404, 405}  # whatever is asked
_SECRET = 6  # characters
_FORBIDDEN = 16  # answers 403 before any good one: then it is the key, not what one item says
# What a server can do without, in the order in which it is left out where the server does not say what it minds.
# For each: how a refusal names it, and what is said once it is left out.
_OPTIONAL = {
    "logprobs": (r"log_?prob", "gives no token probabilities; scores are the digits as written"),
    "response_format": (
        r"response_format|json_?schema|guided|grammar|structured",
        "does not guide decoding by a schema; replies are validated only",
    ),
    "temperature": (r"temperature", "wants no temperature; it samples by its own"),
    "seed": (r"\bseed\b", "wants no seed; replies cannot be repeated"),
    "max_tokens": (r"max_completion_tokens|max_tokens", "wants max_completion_tokens in place of max_tokens"),
}
# Refusals of this one item, whatever else is asked for with it.
_OF_THE_ITEM = re.compile(
    r"context|too long|too large|too many|maximum.{0,20}length|content.?(?:filter|policy|management)|safety|moderation|flagged",
    re.IGNORECASE,
)


class Endpoint:
    """Chat completions over HTTP with bounded concurrency, time limits, and retries with backoff.

    JSON-schema guided decoding and top log-probabilities are asked for, and given up if the server answers that it does not
    know them: replies are validated in any case. The same goes for temperature and seed, and for the name of the limit on
    tokens. What is given up is said once (WARNING). Every answer is checked: what it lacks or makes up is no reply, or one
    without probabilities. The key is in no message, and in no reply that quotes it.

    Args:
        url: Up to and including `/v1`.
        model: The model's name on the server.
        api_key: The key, by default the environment's CARERL_JUDGE_API_KEY, if any.
        top_logprobs: Alternatives per token to ask for; 0: none.
        price: Per million prompt and completion tokens.
        limits: Of `RetryingClient`, which says what they mean: max_in_flight, timeout (seconds for one attempt), attempts,
            backoff, max_backoff.

    Raises:
        ImportError: httpx is missing; says what to install.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        top_logprobs: int = 20,
        price: tuple[float, float] = (0.0, 0.0),
        **limits: Unpack[HttpLimits],
    ) -> None:
        key = os.environ.get("CARERL_JUDGE_API_KEY") if api_key is None else api_key
        self._client = RetryingClient(url, key=key, log=LOGGER, **limits)
        self.url = self._client.url
        self.model, self.meter = model, Meter(price)
        self._top_logprobs = top_logprobs
        self._without: set[str] = set() if top_logprobs else {"logprobs"}
        self._forbidden: int | None = 0  # answers 403 so far; None once there was a good one
        self._said: set[str] = set()

    async def complete(self, request: Request) -> Reply:
        """One reply. See `Backend.complete`."""
        try:
            return await self._client.call(lambda: self._attempt(request))
        except TryAgainError as error:
            self.meter.failures += 1
            raise BackendError(f"{self.url}: {error}, {self._client.attempts} times") from error
        finally:
            self.meter.retries = self._client.retries

    async def aclose(self) -> None:
        """Closes the connections of the running event loop."""
        await self._client.aclose()

    def _body(self, request: Request, without: set[str]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "messages": [dict(m) for m in request.messages]}
        body["max_completion_tokens" if "max_tokens" in without else "max_tokens"] = request.max_tokens
        if "temperature" not in without:
            body["temperature"] = request.temperature
        if "seed" not in without:
            body["seed"] = request.seed
        if "response_format" not in without:
            schema = {"name": request.name, "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if "logprobs" not in without:
            body |= {"logprobs": True, "top_logprobs": self._top_logprobs}
        return body

    async def _attempt(self, request: Request) -> Reply:
        without = set(self._without) | (set() if request.choices else {"logprobs"})
        while True:
            answer = await self._client.post("/chat/completions", self._body(request, without))
            if answer.status not in (400, 403, 422):
                break
            words = _complaint(answer)
            if _OF_THE_ITEM.search(words):
                break
            named = [f for f in _OPTIONAL if f not in without and re.search(_OPTIONAL[f][0], words, re.IGNORECASE)]
            open_ = [f for f in ("logprobs", "response_format") if f not in without] if answer.status != 403 else []
            if not (named or open_):
                break
            without.update(named or open_[:1])
        reply = self._reply(answer)
        # It worked without: the server does not know them. (When it fails without too, it was about something else.)
        for feature in sorted(without - self._without - (set() if request.choices else {"logprobs"})):
            self._say(feature, _OPTIONAL[feature][1])
            self._without.add(feature)
        return reply

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            LOGGER.warning("judge %s %s", self.url, text)

    def _reply(self, answer: Answer) -> Reply:
        """The reply in an answer."""
        status, words = answer.status, self._client.short(answer.text)
        if status == 403 and self._forbidden is not None and not _OF_THE_ITEM.search(_complaint(answer)):
            self._forbidden += 1
        if status in _REFUSED or (status == 403 and (self._forbidden or 0) >= _FORBIDDEN):
            raise BackendRefusedError(
                f"{self.url} refuses model {self.model!r}: status {status}, {words}; check url, model and api_key"
            )
        raise_if_transient(answer)
        if status != 200:
            self.meter.failures += 1
            raise BackendError(f"{self.url}: status {status}, {words}")
        try:
            data = answer.json()
            choice = data["choices"][0]
            text, ended = choice["message"].get("content"), choice.get("finish_reason")
            refusal = choice["message"].get("refusal")
            if not (text is None or isinstance(text, str)):
                raise TypeError("no text")
            tokens = self._tokens(choice.get("logprobs"))
            usage = data.get("usage")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            why = self._client.redact(f"{type(error).__name__}: {error}"[:200])
            raise TryAgainError(f"no chat completion in {words} ({why})") from None
        self._forbidden = None
        self._paid(usage)
        if refusal or ended == "content_filter":
            self.meter.failures += 1
            raise BackendError(f"{self.url}: the model refuses to answer ({self._client.short(str(refusal or ended))})")
        text = (text or "").encode(errors="replace").decode()  # half a surrogate pair can be neither stored nor sent on
        if len(self._client.key or "") >= _SECRET:  # a server may quote the key; a shorter one is a word like any other
            text = self._client.redact(text)
        return Reply(text, complete=ended != "length", tokens=tokens)

    def _paid(self, usage: Any) -> None:
        """Counts a call; a usage that is none counts no tokens."""
        told = usage if isinstance(usage, Mapping) else {}
        counts = [told.get(f"{kind}_tokens") for kind in ("prompt", "completion")]
        good = [n if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**40 else None for n in counts]
        if None in good:
            self._say("usage", "does not say how many tokens it used; tokens and cost are counted too low")
        self.meter.paid(good[0] or 0, good[1] or 0)

    def _tokens(self, logprobs: Any) -> tuple[Token, ...]:
        """Tokens with alternatives from a chat completion's `logprobs`; none where any is no log-probability."""
        out = []
        for entry in (logprobs or {}).get("content") or []:
            alternatives: dict[bytes, float] = {}
            for other in (entry, *(entry.get("top_logprobs") or [])):
                if other["logprob"] is None:  # minus infinity, where JSON has no word for it
                    continue
                value = as_logprob(other["logprob"])
                if value is None:
                    self._say("logprobs wrong", "gives log-probabilities above 0; such replies count by their digits")
                    return ()
                alternatives[_bytes(other)] = value
            out.append(Token(_bytes(entry), alternatives))
        return tuple(out)


def _bytes(entry: Mapping[str, Any]) -> bytes:
    raw = entry.get("bytes")
    return bytes(raw) if raw and isinstance(raw, list) else str(entry["token"]).encode()


def _complaint(answer: Answer) -> str:
    """What a server minds about a request: the field it names, else its message. Never all it says, which may quote the
    request and with it the response that is judged."""
    try:
        data = answer.json()
        detail = data.get("detail")
        if isinstance(detail, list):  # FastAPI
            return " ".join(str(d.get("loc")) + str(d.get("msg"))[:100] for d in detail)[:1000]
        error = data.get("error", data)
        if isinstance(error, Mapping):
            named, code = error.get("param"), error.get("code")
            return f"{named or ''} {code or ''} {str(error.get('message') or '')[:300]}"
        return str(error)[:300]
    except (ValueError, AttributeError):
        return answer.text[:300]
