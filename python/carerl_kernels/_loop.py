"""Asynchronous work from ordinary code: one event loop in a thread of its own, for the life of the process."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_owner = 0


def run_sync(work: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result. Works inside a running loop too (notebooks, trainers), which it blocks meanwhile.

    One loop serves all callers, so connections stay open between calls.

    Raises:
        RuntimeError: Called from asynchronous work that itself runs in this loop, which would wait for itself for ever.
    """
    global _loop, _owner
    with _lock:
        if _loop is None or _owner != os.getpid():  # threads do not survive a fork
            _loop, _owner = asyncio.new_event_loop(), os.getpid()
            threading.Thread(target=_loop.run_forever, name="carerl-rewards", daemon=True).start()
        loop = _loop
    if asyncio._get_running_loop() is loop:
        work.close()
        raise RuntimeError("run_sync was called from work that runs in its own loop; await the coroutine instead")
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
