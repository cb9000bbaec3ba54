"""A judge behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, or a paid service."""

from __future__ import annotations

import asyncio
import email.utils
import math
import os
import random
import time
import weakref
from collections.abc import Mapping
from typing import Any

from ..log import LOGGER
from .backend import BackendError, BackendRefusedError, Meter, Reply, Request, Token

_REFUSED = {401, 403, 404, 405}


class _TryAgainError(Exception):
    """A failure that may pass; `wait` is what the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Endpoint:
    """Chat completions over HTTP with bounded concurrency, time limits, and retries with backoff.

    JSON-schema guided decoding and top log-probabilities are asked for, and given up one after the other if the server
    answers that it does not know them: replies are validated in any case.

    Args:
        url: Up to and including `/v1`.
        model: As the server names it.
        api_key: By default the environment's CARERL_JUDGE_API_KEY, if any.
        max_in_flight: Requests under way at once.
        timeout: Seconds for one attempt, from sending to the last byte.
        attempts: Tries of one request in all.
        backoff: Seconds before the first retry; doubles each time, up to `max_backoff`, each wait drawn between half
            and the whole. A Retry-After header counts instead, up to ten times `max_backoff`.
        max_backoff: Seconds.
        top_logprobs: Alternatives per token to ask for; 0: none.
        price: Per million prompt and completion tokens.

    Raises:
        ImportError: httpx is missing; says what to install.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        max_in_flight: int = 64,
        timeout: float = 120.0,
        attempts: int = 6,
        backoff: float = 0.5,
        max_backoff: float = 30.0,
        top_logprobs: int = 20,
        price: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError("a judge endpoint needs httpx: pip install 'carerl-kernels[judge]'") from error
        if max_in_flight < 1 or attempts < 1 or timeout <= 0:
            raise ValueError(
                f"Endpoint: expected max_in_flight >= 1, attempts >= 1 and timeout > 0, "
                f"found {max_in_flight}, {attempts}, {timeout}"
            )
        self._httpx = httpx
        self.url = url.rstrip("/")
        self.max_in_flight, self.timeout, self.attempts = max_in_flight, timeout, attempts
        self.backoff, self.max_backoff = backoff, max_backoff
        self._model = model
        self._key = os.environ.get("CARERL_JUDGE_API_KEY") if api_key is None else api_key
        self._meter = Meter(price)
        self._guided = True
        self._top_logprobs = top_logprobs
        # clients and semaphores belong to the event loop they were first used in
        self._by_loop: weakref.WeakKeyDictionary[Any, tuple[Any, asyncio.Semaphore]] = weakref.WeakKeyDictionary()

    @property
    def model(self) -> str:
        return self._model

    @property
    def meter(self) -> Meter:
        return self._meter

    async def complete(self, request: Request) -> Reply:
        """One reply. See `Backend.complete`."""
        client, semaphore = self._here()
        for attempt in range(1, self.attempts + 1):
            try:
                async with semaphore:
                    return await self._attempt(client, request)
            except _TryAgainError as error:
                if attempt == self.attempts:
                    self._meter.failures += 1
                    raise BackendError(f"{self.url}: {error}, {attempt} times") from error
                wait = self._wait(attempt, error.wait)
                self._meter.retries += 1
                LOGGER.info("judge %s: %s; again in %.2f s", self.url, error, wait)
                await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    def _here(self) -> tuple[Any, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        if loop not in self._by_loop:
            limits = self._httpx.Limits(
                max_connections=self.max_in_flight, max_keepalive_connections=self.max_in_flight
            )
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            # one limit for the whole attempt (below) instead of httpx's four for its parts: a server that sends a byte now
            # and then would never hit those
            client = self._httpx.AsyncClient(limits=limits, timeout=None, headers=headers)
            self._by_loop[loop] = (client, asyncio.Semaphore(self.max_in_flight))
        return self._by_loop[loop]

    async def aclose(self) -> None:
        """Closes the connections of the running event loop."""
        client, _ = self._by_loop.pop(asyncio.get_running_loop(), (None, None))
        if client is not None:
            await client.aclose()

    def _wait(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, 10 * self.max_backoff)
        return min(self.max_backoff, self.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)

    def _body(self, request: Request, guided: bool, top_logprobs: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [dict(m) for m in request.messages],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        if guided:
            schema = {"name": request.name, "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if top_logprobs:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        return body

    async def _attempt(self, client: Any, request: Request) -> Reply:
        guided, top_logprobs = self._guided, self._top_logprobs if request.choices else 0
        while True:
            response = await self._post(client, self._body(request, guided, top_logprobs))
            if response.status_code not in (400, 422) or not (guided or top_logprobs):
                break
            if top_logprobs and (not guided or "logprob" in response.text.lower()):
                top_logprobs = 0
            else:
                guided = False
        reply = self._reply(response)
        # It worked without: the server does not know the feature. (When it fails without too, it was about something else.)
        if self._guided and not guided:
            LOGGER.warning("judge %s does not guide decoding by a schema; replies are validated only", self.url)
            self._guided = False
        if self._top_logprobs and request.choices and not top_logprobs:
            LOGGER.warning("judge %s gives no token probabilities; scores are the digits as written", self.url)
            self._top_logprobs = 0
        return reply

    async def _post(self, client: Any, body: Mapping[str, Any]) -> Any:
        try:
            async with asyncio.timeout(self.timeout):
                return await client.post(f"{self.url}/chat/completions", json=body)
        except TimeoutError:
            raise _TryAgainError(f"no answer within {self.timeout:g} s") from None
        except self._httpx.TransportError as error:
            raise _TryAgainError(f"{type(error).__name__} {error}".strip()) from error

    def _reply(self, response: Any) -> Reply:
        status = response.status_code
        if status in _REFUSED:
            raise BackendRefusedError(
                f"{self.url} refuses model {self._model!r}: status {status}, {_short(response.text)}; "
                f"check url, model and api_key"
            )
        if status in (408, 409, 425, 429) or status >= 500:
            raise _TryAgainError(f"status {status}", _retry_after(response.headers.get("retry-after")))
        if status != 200:
            self._meter.failures += 1
            raise BackendError(f"{self.url}: status {status}, {_short(response.text)}")
        try:
            data = response.json()
            choice = data["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise TypeError("no text")
            tokens = _tokens(choice.get("logprobs"))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _TryAgainError(f"no chat completion in {_short(response.text)}") from error
        usage = data.get("usage") or {}
        self._meter.paid(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        return Reply(text, complete=choice.get("finish_reason") != "length", tokens=tokens)


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date; None when there is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _tokens(logprobs: Any) -> tuple[Token, ...]:
    """Tokens with alternatives from a chat completion's `logprobs`."""
    out = []
    for entry in (logprobs or {}).get("content") or []:
        alternatives = {_bytes(entry): float(entry["logprob"])}
        for other in entry.get("top_logprobs") or []:
            alternatives[_bytes(other)] = float(other["logprob"])
        out.append(Token(_bytes(entry), alternatives))
    return tuple(out)


def _bytes(entry: Mapping[str, Any]) -> bytes:
    raw = entry.get("bytes")
    return bytes(raw) if raw else str(entry["token"]).encode()
