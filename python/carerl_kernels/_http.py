"""JSON over HTTP: bounded concurrency, a limit on every attempt as a whole, retries that back off and obey Retry-After."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import math
import random
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
TRANSIENT = frozenset({408, 409, 425, 429})  # besides 5xx


class TryAgainError(Exception):
    """A failure that may pass; `wait` is what the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class RetryingClient:
    """Posts JSON to one server.

    Args:
        url: What paths are relative to.
        key: Bearer token, or None.
        max_in_flight: Requests under way at once.
        timeout: Seconds for one attempt, from sending to the last byte.
        attempts: Tries of one request in all.
        backoff: Seconds before the first retry; doubles each time, up to `max_backoff`, each wait drawn between half and the
            whole. A Retry-After header counts instead, up to ten times `max_backoff`.
        max_backoff: Seconds.
        log: Gets a line (INFO) for every retry.

    Attributes:
        retries: So far.

    Raises:
        ModuleNotFoundError: httpx is missing.
        ValueError: A number out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None,
        max_in_flight: int,
        timeout: float,
        attempts: int,
        backoff: float,
        max_backoff: float,
        log: logging.Logger,
    ) -> None:
        import httpx

        if max_in_flight < 1 or attempts < 1 or timeout <= 0:
            raise ValueError(
                f"{url}: expected max_in_flight >= 1, attempts >= 1 and timeout > 0, "
                f"found {max_in_flight}, {attempts}, {timeout}"
            )
        self._httpx = httpx
        self.url, self.key, self.log = url.rstrip("/"), key, log
        self.max_in_flight, self.timeout, self.attempts = max_in_flight, timeout, attempts
        self.backoff, self.max_backoff = backoff, max_backoff
        self.retries = 0
        # clients and semaphores belong to the event loop they were first used in
        self._by_loop: weakref.WeakKeyDictionary[Any, tuple[Any, asyncio.Semaphore]] = weakref.WeakKeyDictionary()

    async def call(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What `attempt()` returns, tried again as long as it raises TryAgainError.

        Raises:
            TryAgainError: The last attempt failed too.
        """
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

    async def post(self, path: str, body: Mapping[str, Any], timeout: float | None = None) -> Any:
        """One response, whatever its status; part of an attempt.

        Raises:
            TryAgainError: None came.
        """
        client, _ = self._here()
        timeout = timeout or self.timeout
        try:
            async with asyncio.timeout(timeout):
                return await client.post(f"{self.url}{path}", json=body)
        except TimeoutError:
            raise TryAgainError(f"no answer within {timeout:g} s") from None
        except self._httpx.TransportError as error:
            raise TryAgainError(f"{type(error).__name__} {error}".strip()) from error

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
            headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
            # one limit for the whole attempt (above) instead of httpx's four for its parts: a server that sends a byte now
            # and then would never hit those
            client = self._httpx.AsyncClient(limits=limits, timeout=None, headers=headers)
            self._by_loop[loop] = (client, asyncio.Semaphore(self.max_in_flight))
        return self._by_loop[loop]

    def _wait(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, 10 * self.max_backoff)
        return min(self.max_backoff, self.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


def raise_if_transient(response: Any) -> None:
    """Overload and server errors may pass.

    Raises:
        TryAgainError: The status is one of theirs.
    """
    status = response.status_code
    if status in TRANSIENT or status >= 500:
        raise TryAgainError(f"status {status}", retry_after(response.headers.get("retry-after")))


def retry_after(value: str | None) -> float | None:
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


def short(text: str) -> str:
    """A server's words, quoted, not all of them."""
    return repr(text if len(text) <= 200 else text[:200] + "...")
