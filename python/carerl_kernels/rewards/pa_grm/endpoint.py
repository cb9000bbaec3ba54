"""A judge behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, or a paid service."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..._http import RetryingClient, TryAgainError, raise_if_transient, short
from ..log import LOGGER
from .backend import BackendError, BackendRefusedError, Meter, Reply, Request, Token

_REFUSED = {401, 403, 404, 405}


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
        key = os.environ.get("CARERL_JUDGE_API_KEY") if api_key is None else api_key
        try:
            self._client = RetryingClient(
                url,
                key=key,
                max_in_flight=max_in_flight,
                timeout=timeout,
                attempts=attempts,
                backoff=backoff,
                max_backoff=max_backoff,
                log=LOGGER,
            )
        except ModuleNotFoundError as error:
            raise ImportError("a judge endpoint needs httpx: pip install 'carerl-kernels[judge]'") from error
        self.url = self._client.url
        self._model = model
        self._meter = Meter(price)
        self._guided = True
        self._top_logprobs = top_logprobs

    @property
    def model(self) -> str:
        return self._model

    @property
    def meter(self) -> Meter:
        return self._meter

    async def complete(self, request: Request) -> Reply:
        """One reply. See `Backend.complete`."""
        try:
            return await self._client.call(lambda: self._attempt(request))
        except TryAgainError as error:
            self._meter.failures += 1
            raise BackendError(f"{self.url}: {error}, {self._client.attempts} times") from error
        finally:
            self._meter.retries = self._client.retries

    async def aclose(self) -> None:
        """Closes the connections of the running event loop."""
        await self._client.aclose()

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

    async def _attempt(self, request: Request) -> Reply:
        guided, top_logprobs = self._guided, self._top_logprobs if request.choices else 0
        while True:
            response = await self._client.post("/chat/completions", self._body(request, guided, top_logprobs))
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

    def _reply(self, response: Any) -> Reply:
        status = response.status_code
        if status in _REFUSED:
            raise BackendRefusedError(
                f"{self.url} refuses model {self._model!r}: status {status}, {short(response.text)}; "
                f"check url, model and api_key"
            )
        raise_if_transient(response)
        if status != 200:
            self._meter.failures += 1
            raise BackendError(f"{self.url}: status {status}, {short(response.text)}")
        try:
            data = response.json()
            choice = data["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise TypeError("no text")
            tokens = _tokens(choice.get("logprobs"))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise TryAgainError(f"no chat completion in {short(response.text)}") from error
        usage = data.get("usage") or {}
        self._meter.paid(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        return Reply(text, complete=choice.get("finish_reason") != "length", tokens=tokens)


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
