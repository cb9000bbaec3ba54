"""Files, TCP and signals kept from a program by Landlock, which needs no privileges; standard library only."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446  # the same numbers on every architecture
_EXECUTE, _READ_FILE, _READ_DIR = 1, 4, 8
_FILE_ONLY = 1 | 2 | 4 | (1 << 14) | (1 << 15)  # what a rule on a file, not a directory, may contain


def version(libc: ctypes.CDLL) -> int:
    """Of Landlock in this kernel; 0 without it."""
    return max(0, libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1))


def restrict(libc: ctypes.CDLL, readable: Iterable[str], writable: Iterable[str]) -> None:
    """This process and all it will start can open nothing but what is named, files and directories, to read and execute or
    to change them too; needs no_new_privs."""
    known = version(libc)
    files = (1 << (13 if known < 2 else 14 if known < 3 else 15 if known < 5 else 16)) - 1
    network = 3 if known >= 4 else 0  # bind and connect by TCP
    scoped = 3 if known >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("QQQ", files, network, scoped)[: 8 if known < 4 else 16 if known < 6 else 24]
    rules = libc.syscall(_CREATE, ctypes.c_char_p(attributes), ctypes.c_size_t(len(attributes)), 0)
    if rules < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    try:
        for paths, access in ((readable, _EXECUTE | _READ_FILE | _READ_DIR), (writable, files)):
            for path in paths:
                if not os.path.exists(path):
                    continue
                allowed = access & files if os.path.isdir(path) else access & files & _FILE_ONLY
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
                try:
                    rule = struct.pack("=Qi", allowed, place)
                    if libc.syscall(_ADD_RULE, rules, 1, ctypes.c_char_p(rule), 0) != 0:
                        raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
                finally:
                    os.close(place)
        if libc.syscall(_RESTRICT, rules, 0) != 0:
            raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    finally:
        os.close(rules)
