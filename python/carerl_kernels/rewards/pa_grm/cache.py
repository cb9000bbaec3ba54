"""What a judge was paid for, kept on disk: protocols and verdicts survive the process and are made once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any


class Cache:
    """JSON values by key in one SQLite file; several processes may share it.

    Whoever asks for a key that is being made waits for it instead of making it again (within one process and event loop;
    two processes may both make the same value, the first one stored wins).

    Args:
        path: File, created with its directories; None keeps everything in memory.

    Raises:
        OSError: The file cannot be opened or is no such cache.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._lock = threading.Lock()
        # by event loop and key, with a mark for each who waits
        self._making: dict[tuple[int, str], tuple[asyncio.Future[Any], list[None]]] = {}
        self._pid = 0
        self._database = self._open()

    def _open(self) -> sqlite3.Connection:
        self._pid = os.getpid()
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(
                ":memory:" if self.path is None else self.path,
                timeout=60,
                isolation_level=None,
                check_same_thread=False,
            )
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            database.execute("CREATE TABLE IF NOT EXISTS judged (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise OSError(
                f"could not open the judge's cache {self.path}: {error}; choose another file or delete this one"
            ) from error
        return database

    def _execute(self, statement: str, values: tuple[str, ...]) -> list[tuple[str]]:
        with self._lock:
            if self._pid != os.getpid() and self.path is not None:
                self._database = self._open()  # SQLite connections do not survive a fork
            try:
                return self._database.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                raise OSError(f"the judge's cache {self.path} failed: {error}; is the disk full?") from error

    def get(self, key: str) -> Any | None:
        """The value of a key, or None."""
        rows = self._execute("SELECT value FROM judged WHERE key = ?", (key,))
        return json.loads(rows[0][0]) if rows else None

    def put(self, key: str, value: Any) -> None:
        """Keeps a value, unless the key has one."""
        self._execute("INSERT OR IGNORE INTO judged VALUES (?, ?)", (key, json.dumps(value)))

    async def get_or_make(self, key: str, make: Callable[[], Awaitable[Any]]) -> tuple[Any, bool]:
        """The value of a key, made and kept if there is none, and whether it was there.

        An exception of `make` reaches everybody who waits, and nothing is kept. When nobody waits any more, making stops.
        """
        value = self.get(key)
        if value is not None:
            return value, True
        place = (id(asyncio.get_running_loop()), key)
        known = place in self._making

        async def work() -> Any:
            try:
                made = await make()
                self.put(key, made)
                return made
            finally:
                self._making.pop(place, None)

        if not known:
            self._making[place] = (asyncio.ensure_future(work()), [])
        making, waiting = self._making[place]
        waiting.append(None)
        try:
            return await asyncio.shield(making), known  # one waiter's cancellation shall not take it from the others
        except asyncio.CancelledError:
            if len(waiting) == 1:
                making.cancel()
                self._making.pop(place, None)
            raise
        finally:
            waiting.pop()
            if making.done() and not making.cancelled():
                making.exception()  # seen, also where all who waited had gone

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._database.close()

    def __len__(self) -> int:
        return int(self._execute("SELECT count(*) FROM judged", ())[0][0])


def cache_key(kind: str, **parts: Any) -> str:
    """A key for everything that decides a value."""
    text = json.dumps([kind, parts], sort_keys=True, ensure_ascii=True, default=str)
    return f"{kind}:{hashlib.sha256(text.encode()).hexdigest()}"
