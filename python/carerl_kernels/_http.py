"""JSON over HTTP: bounded concurrency, limits on time and size of every answer, retries that back off and obey Retry-After."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import math
import random
import re
import time
import urllib.parse
import weakref
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, TypedDict, TypeVar

from ._errors import require
from ._json import parse_json

T = TypeVar("T")
TRANSIENT = frozenset({408, 409, 425, 429})  # besides 5xx
MAX_BODY = 64 * 2**20  # bytes of one answer, unpacked: 32,000 tokens with 20 alternatives each take half of it


class TryAgainError(Exception):
    """A failure that may pass; `wait` is what the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes  # unpacked

    @property
    def text(self) -> str:
        """The body as UTF-8, whatever the server says of it: JSON is nothing else."""
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        """The body's value; see `parse_json`."""
        return parse_json(self.body)


class HttpLimits(TypedDict, total=False):
    """The numbers that `RetryingClient` can be given."""

    max_in_flight: int
    timeout: float
    attempts: int
    backoff: float
    max_backoff: float


@dataclass(eq=False)
class RetryingClient:
    """Posts JSON to one server.

    The key, and a password in the URL, are in no message of this client; whoever quotes what the server said passes it
    through `redact` or `short`.

    Args:
        url: What paths are relative to: http or https. A user and password in it are sent as such.
        key: Bearer token, or None. White space around it, as files leave it, is taken off.
        log: Gets a line (INFO) for every retry.
        max_in_flight: Requests under way at once.
        timeout: Seconds for one attempt, from sending to the last byte.
        attempts: Tries of one request in all.
        backoff: Seconds before the first retry; doubles each time, up to `max_backoff`, each wait drawn between half and the
            whole. A Retry-After header counts instead, up to ten times `max_backoff`.
        max_backoff: Seconds.

    Attributes:
        url: The address as it was given, for messages: without its password.
        retries: So far.

    Raises:
        ImportError: httpx is missing; says what to install.
        ValueError: A number out of range, no URL, or a key that no header can carry.
    """

    url: str
    _: KW_ONLY
    key: str | None = field(repr=False)
    log: logging.Logger
    max_in_flight: int = 64
    timeout: float = 120.0
    attempts: int = 6
    backoff: float = 0.5
    max_backoff: float = 30.0

    def __post_init__(self) -> None:
        require("httpx", "an endpoint", "carerl-kernels[judge]")
        import httpx

        self._httpx = httpx
        self._base, self._login, self.url = _split_url(self.url)
        self.key, self.retries = _checked_key(self.key), 0
        if self.max_in_flight < 1 or self.attempts < 1 or not self.timeout > 0:
            raise ValueError(
                f"{self.url}: expected max_in_flight >= 1, attempts >= 1 and timeout > 0, "
                f"found {self.max_in_flight}, {self.attempts}, {self.timeout}"
            )
        secrets = filter(None, [self.key, *(self._login or ())[1:]])
        forms = {form for s in secrets for form in (s, json.dumps(s)[1:-1], urllib.parse.quote(s, safe=""))}
        self._secrets = sorted(forms, key=len, reverse=True)
        # clients and semaphores belong to the event loop they were first used in
        self._by_loop: weakref.WeakKeyDictionary[Any, tuple[Any, asyncio.Semaphore]] = weakref.WeakKeyDictionary()

    async def call(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What `attempt()` returns, tried again as long as it raises TryAgainError; the last one's comes through."""
        _, semaphore = self._here()
        for number in range(1, self.attempts + 1):
            try:
                async with semaphore:
                    return await attempt()
            except TryAgainError as error:
                if number == self.attempts:
                    raise
                wait = self._wait(number, error.wait)
                self.retries += 1
                self.log.info("%s: %s; again in %.2f s", self.url, error, wait)
                await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def post(self, path: str, body: Mapping[str, Any]) -> Answer:
        """One answer, whatever its status; part of an attempt.

        Raises:
            TryAgainError: None came, or one that cannot be read.
        """
        client, _ = self._here()
        data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode(errors="replace")
        try:
            async with (
                asyncio.timeout(self.timeout),
                client.stream("POST", f"{self._base}{path}", content=data) as response,
            ):
                encoding = response.headers.get("content-encoding", "")
                return Answer(response.status_code, response.headers, await _body(response.aiter_raw(), encoding))
        except TimeoutError:
            raise TryAgainError(f"no answer within {self.timeout:g} s") from None
        except (self._httpx.HTTPError, self._httpx.StreamError, self._httpx.InvalidURL) as error:
            raise TryAgainError(self.redact(f"{type(error).__name__} {error}".strip())) from None

    def redact(self, text: str) -> str:
        """`text` without the key and the password, however a server quotes them."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def short(self, text: str) -> str:
        """A server's words, quoted, not all of them and no secret among them."""
        text = self.redact(text)
        return repr(text if len(text) <= 200 else text[:200] + "...")

    def at_root(self, *, timeout: float) -> RetryingClient:
        """A client of the same server for what is not under /v1, one request at a time."""
        root = replace(self, url=self._base.removesuffix("/v1"), max_in_flight=1, timeout=timeout)
        root._login, root._secrets = self._login, self._secrets
        return root

    async def aclose(self) -> None:
        """Closes the connections of the running event loop."""
        client, _ = self._by_loop.pop(asyncio.get_running_loop(), (None, None))
        if client is not None:
            await client.aclose()

    def _here(self) -> tuple[Any, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        if loop not in self._by_loop:
            limits = self._httpx.Limits(
                max_connections=self.max_in_flight, max_keepalive_connections=self.max_in_flight
            )
            headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "gzip"}
            if self.key:
                headers["Authorization"] = f"Bearer {self.key}"
            # one limit for the whole attempt (above) instead of httpx's four for its parts: a server that sends a byte now
            # and then would never hit those
            client = self._httpx.AsyncClient(limits=limits, timeout=None, headers=headers, auth=self._login)
            self._by_loop[loop] = (client, asyncio.Semaphore(self.max_in_flight))
        return self._by_loop[loop]

    def _wait(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, 10 * self.max_backoff)
        return min(self.max_backoff, self.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


async def _body(chunks: AsyncIterator[bytes], encoding: str) -> bytes:
    """The bytes of an answer, unpacked no further than `MAX_BODY` (httpx would unpack a chunk whatever comes out).
    TryAgainError: more than that, a packing that was not asked for, or one that is damaged."""
    encoding = encoding.strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise TryAgainError(f"expected an answer plain or packed by gzip, found Content-Encoding {encoding[:40]!r}")
    unpack = zlib.decompressobj(16 + zlib.MAX_WBITS) if "gzip" in encoding else None
    parts, size = [], 0
    async for chunk in chunks:
        if unpack is not None:
            try:
                chunk = unpack.decompress(chunk, MAX_BODY + 1 - size)
            except zlib.error as error:
                raise TryAgainError(f"an answer that is no gzip, as it says it is ({error})") from None
        size += len(chunk)
        if size > MAX_BODY:
            raise TryAgainError(f"an answer of more than {MAX_BODY >> 20} MiB")
        parts.append(chunk)
    return b"".join(parts)


def _split_url(url: str) -> tuple[str, tuple[str, str] | None, str]:
    """What is asked, the login in it, and what may be printed."""
    try:
        parts = urllib.parse.urlsplit(url.strip())
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        known = False
    if not known or re.search(r"[\s\x00-\x1f\x7f]", url.strip()):
        raise ValueError(f"url: expected http://HOST:PORT/v1 or https, found {re.sub('//[^/]*@', '//***@', url)!r}")
    login = None
    if "@" in parts.netloc:
        login = (urllib.parse.unquote(parts.username or ""), urllib.parse.unquote(parts.password or ""))
        parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    plain = urllib.parse.urlunsplit(parts).rstrip("/")
    return plain, login, plain


def _checked_key(key: str | None) -> str | None:
    """A key as a header can carry it, None for an empty one; an error says where it cannot, not what it is."""
    key = (key or "").strip()
    wrong = next((i for i, c in enumerate(key) if not "!" <= c <= "~"), None)
    if wrong is not None:
        raise ValueError(
            f"api_key: expected printable ASCII without blanks, found another character at place {wrong + 1} of {len(key)}; "
            "was more than the key copied?"
        )
    return key or None


def raise_if_transient(answer: Answer) -> None:
    """A TryAgainError for overload and server errors, which may pass."""
    if answer.status in TRANSIENT or answer.status >= 500:
        raise TryAgainError(f"status {answer.status}", retry_after(answer.headers.get("retry-after")))


def retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date; None when there is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, OSError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
