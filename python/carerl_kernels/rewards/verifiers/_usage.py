"""Processor time and memory of a tree of processes; standard library only."""

from __future__ import annotations

import contextlib
import os
import resource
import time

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Usage:
    """What everything below this process has used since now.

    Args:
        proc: Directory descriptor of a /proc that shows this process (1) and those below it only; None: the tree is read
            from the machine's own /proc, if there is one.
    """

    def __init__(self, proc: int | None) -> None:
        self._proc = proc
        self._before = self._reaped()

    def cpu(self, main: int) -> float:
        """Seconds of processor time of all processes; of those that have ended, the ones that somebody waited for. `main`
        is the process number of the program, 0 when it has ended."""
        total = self._reaped() - self._before
        pids = self._pids()
        if not pids and main:  # no /proc: the main program's clock alone
            with contextlib.suppress(OSError):
                total += time.clock_gettime((~main << 3) | 2)  # CPUCLOCK_SCHED of a process
        return total + sum(self._seconds(pid) for pid in pids)

    def _seconds(self, pid: str) -> float:
        """Seconds of processor time of one process, and of the children that it has waited for."""
        fields = self._read(f"{pid}/stat").rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / _TICKS if len(fields) > 14 else 0.0

    def of_tree(self, pid: str) -> float:
        """Seconds of processor time of a process and all below it, from the machine's /proc."""
        return sum(self._seconds(one) for one in (pid, *self._below(pid)))

    def memory(self, limit: int) -> int:
        """Bytes resident in all processes; where that is more than `limit`, what several share is counted once.

        0 where there is no /proc. A process that is just being started may count twice, for as long as it shares its parent's
        memory.
        """
        pids = self._pids()
        resident = sum(self._resident(pid) for pid in pids)
        if resident <= limit:
            return resident
        return sum(self._proportional(pid) or self._resident(pid) for pid in pids)

    def _resident(self, pid: str) -> int:
        """Bytes of one process; of its other threads' where the first has ended, which then shows nothing."""
        fields = self._read(f"{pid}/statm").split()
        if fields[1:2] == ["0"]:
            threads = (self._read(f"{pid}/task/{thread}/statm").split() for thread in self._names(f"{pid}/task"))
            fields = max(threads, key=lambda f: int(f[1]) if len(f) > 1 else 0, default=[])
        return int(fields[1]) * _PAGE if len(fields) > 1 else 0

    def _proportional(self, pid: str) -> int:
        """Bytes of one process, of what it shares with n others an n-th; 0 where the kernel does not say."""
        line = next((line for line in self._read(f"{pid}/smaps_rollup").split("\n") if line.startswith("Pss:")), "")
        return int(line.split()[1]) << 10 if line else 0

    def waited(self, main: int) -> float | None:
        """Seconds for which the main program could have run and had no processor; None where the kernel does not say."""
        fields = self._read(f"{main}/schedstat").split()
        return int(fields[1]) / 1e9 if len(fields) > 1 else None

    @staticmethod
    def _reaped() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def _open(self, name: str, flags: int) -> int:
        return os.open(name if self._proc is not None else f"/proc/{name}", flags, dir_fd=self._proc)

    def _read(self, name: str) -> str:
        with contextlib.suppress(OSError), open(name, "rb", buffering=0, opener=self._open) as file:
            return file.read(4096).decode(errors="replace")
        return ""

    def _names(self, place: str) -> list[str]:
        """The names in a directory of /proc that are numbers: its processes, or threads."""
        with contextlib.suppress(OSError):
            directory = self._open(place, os.O_RDONLY | os.O_DIRECTORY)
            try:
                return [name for name in os.listdir(directory) if name.isdigit()]
            finally:
                os.close(directory)
        return []

    def _pids(self) -> list[str]:
        return self._below("self") if self._proc is None else [name for name in self._names(".") if name != "1"]

    def _below(self, pid: str) -> list[str]:
        found: list[str] = []
        waiting = self.children(pid)
        while waiting and len(found) < 4096:
            found.append(waiting.pop())
            waiting += self.children(found[-1])
        return found

    def children(self, pid: str) -> list[str]:
        """Process numbers of a process's children, from the machine's /proc."""
        return [
            child
            for thread in self._names(f"{pid}/task")
            for child in self._read(f"{pid}/task/{thread}/children").split()
        ]


def tasks_of(uid: int) -> int:
    """Processes and threads that a user has."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == uid:
                    count += len(os.listdir(f"/proc/{name}/task"))
    return count
