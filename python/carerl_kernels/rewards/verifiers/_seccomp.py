"""The filter of system calls of a sandboxed program, as classic BPF; standard library only, runs inside the sandbox too.

Denied is what ordinary programs do not need and what reaches beyond the limits: namespaces and mounts, memory that no limit
counts, keyrings, other processes' memory, and interfaces of the kernel known for their holes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# (x86_64, aarch64); None where the architecture has no such call
DENIED: dict[str, tuple[int | None, int | None]] = {
    # namespaces and mounts: a nested namespace has limits of its own
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "fanotify_init": (300, 262), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    # memory and queues outside of every process
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # keyrings, other processes
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "kcmp": (312, 272),
    # the kernel itself
    "perf_event_open": (298, 241), "bpf": (321, 280), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
    "lookup_dcookie": (212, 18), "vhangup": (153, 58),
}  # fmt: skip
CLONE, CLONE3, PRLIMIT, SOCKET = (56, 220), (435, 435), (302, 261), (41, 198)
SIGNALS = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
           "rt_tgsigqueueinfo": (297, 240)}  # fmt: skip
CLONE_NEW = 0x7E020000  # every flag that makes a namespace

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _FIRST, _FIRST_HIGH = 0, 4, 16, 20  # offsets in struct seccomp_data; little-endian

Instruction = tuple[int, int, int, int]


def supported() -> bool:
    """Whether there is a filter for this machine's architecture."""
    return os.uname().machine in ARCHITECTURES


def program(pid: int, *, signals: bool, network: bool, machine: str | None = None) -> list[Instruction]:
    """The filter.

    Args:
        pid: The process id of the program.
        signals: Whether it may send signals to others: where it shares its user with somebody, only to itself.
        network: Whether it may open sockets: only where it has a network of its own.
        machine: Architecture; by default this one's.
    """
    which = list(ARCHITECTURES).index(machine or os.uname().machine)
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, list(ARCHITECTURES.values())[which]),
        (_RETURN, 0, 0, _KILL),  # 32-bit calls on a 64-bit kernel have other numbers
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, 0x40000000),  # x32: the same calls by other numbers
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
    ]

    def when(number: int | None, then: list[Instruction]) -> None:
        if number is not None:
            code.extend([(_EQUAL, 0, len(then), number), *then])

    deny: Instruction = (_RETURN, 0, 0, _ERROR | errno.EPERM)
    allow: Instruction = (_RETURN, 0, 0, _ALLOW)
    for numbers in DENIED.values():
        when(numbers[which], [deny])
    # clone3 has its flags in memory, which a filter cannot see: libraries then take clone
    when(CLONE3[which], [(_RETURN, 0, 0, _ERROR | errno.ENOSYS)])
    when(CLONE[which], [(_LOAD, 0, 0, _FIRST), (_ANY_BIT, 0, 1, CLONE_NEW), deny, allow])
    own: list[Instruction] = [(_LOAD, 0, 0, _FIRST), (_EQUAL, 2, 0, 0), (_EQUAL, 1, 0, pid), deny, allow]
    when(PRLIMIT[which], own)
    if not signals:
        for numbers in SIGNALS.values():
            when(numbers[which], own)
    if not network:
        when(SOCKET[which], [deny])
    return [*code, allow]


def install(filter_: list[Instruction], prctl: Callable[..., int]) -> None:
    """Puts the filter on this process and all it will start; needs no_new_privs."""
    data = b"".join(struct.pack("HBBI", *instruction) for instruction in filter_)
    buffer = ctypes.create_string_buffer(data, len(data))
    fprog = struct.pack("HxxxxxxP", len(filter_), ctypes.addressof(buffer))
    if prctl(22, 2, ctypes.c_char_p(fprog), 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp")
