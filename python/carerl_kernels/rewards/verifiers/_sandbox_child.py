"""The inside of the sandbox: run with `python -I -S`; it and what it imports use the standard library only.

Reads a job from standard input (8 digits of length, then JSON), builds the isolation, runs the program in it with limits,
kills everything the program left behind, and writes to the file descriptor `status`: a line once the program runs, then how
it ended. What follows the job on standard input belongs to the program. Until the program runs, what goes wrong is the
sandbox's failure; afterwards it is the program's, whatever it does to us.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time

import _landlock
import _seccomp
from _usage import Usage, tasks_of

TYPE_CHECKING = False  # `typing` itself would take a good part of the time that a program takes to start
if TYPE_CHECKING:
    from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE, MS_RELATIME, MNT_DETACH = 16384, 1 << 18, 1 << 21, 2
KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

PROGRESS = 3  # descriptor on which a program says that it begins its next part

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = [None if a is None else a.encode() for a in (source, target, kind)]
    check(libc.mount(*arguments, ctypes.c_ulong(flags), None if data is None else data.encode()), f"mount {target}")


def bind(source: str, target: str, flags: int) -> None:
    """`source` visible at `target`, read-only; a file system's own restrictions stay."""
    mount(source, target, None, MS_BIND | MS_REC)
    own = os.statvfs(source).f_flag
    kept = own & (MS_NOEXEC | 1024 | 2048) | (MS_RELATIME if own & 4096 else 0)
    mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | flags | kept)


def enter_namespaces() -> None:
    """No other process, network, user or shared memory in sight."""
    flags = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        check(libc.unshare(flags), "unshare")
    else:
        check(libc.unshare(flags | CLONE_NEWUSER), "unshare (user namespaces may be switched off on this machine)")
        for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    for name in ("shmmax", "shmall"):  # System V shared memory is outside of every memory limit
        with contextlib.suppress(OSError), open(f"/proc/sys/kernel/{name}", "w") as file:
            file.write("0")


def private_proc() -> int | None:
    """A descriptor of a /proc that shows our processes and is mounted nowhere; None where that may not be."""
    with contextlib.suppress(OSError):
        mount("proc", "/sys", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY)
        try:
            return os.open("/sys", os.O_RDONLY | os.O_DIRECTORY)
        finally:
            libc.umount2(b"/sys", MNT_DETACH)
    return None


def enter_root(readable: list[str], size: int) -> None:
    """A root directory with the interpreter, three devices, and an empty /tmp; the old one is gone."""
    root = "/sys"  # exists everywhere, and nobody needs it in here
    mount("tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    os.umask(0o022)
    os.mkdir(f"{root}/tmp")  # before the rest: packages may lie under /tmp
    mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"size={size},nr_inodes=1024,mode=1777")
    for path in (*readable, *DEVICES):
        if not os.path.exists(path):
            continue
        target = root + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(target, os.O_CREAT | os.O_EXCL))
        bind(path, target, 0 if path in DEVICES else MS_NODEV)
    for name in ("bin", "lib", "lib64"):  # Debian and others link these into /usr
        if os.path.islink(f"/{name}") and not os.path.lexists(f"{root}/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
    os.chdir(root)
    check(libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/tmp")
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)


def become_program(job: dict[str, Any], status: int, progress: int | None) -> None:
    """Limits, no privileges, no environment; then the interpreter."""
    os.setsid()
    if progress is not None:
        os.dup2(progress, PROGRESS)
        os.set_inheritable(PROGRESS, True)
    if os.uname().machine in KEYCTL:
        libc.syscall(KEYCTL[os.uname().machine], 1, None)  # a session keyring of its own instead of the trainer's
    limits = dict(job["limits"])
    processes = limits.pop("NPROC")
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value + (name == "CPU")))
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
    elif not job["isolated"]:
        processes += tasks_of(os.getuid())  # the limit is one of the user, who has others
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    if job["uid"] is not None:
        os.setresuid(job["uid"], job["uid"], job["uid"])
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # another user than before: only now
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    isolated = job["isolated"]
    if not isolated and _landlock.version(libc):
        _landlock.restrict(libc, [*job["readable"], *DEVICES[1:]], [os.getcwd(), DEVICES[0]])
    if _seccomp.supported():
        alone = isolated or job["uid"] is not None
        with contextlib.suppress(OSError):  # kernels without it; `Sandbox.protections` says so
            _seccomp.install(_seccomp.program(os.getpid(), signals=alone, network=isolated), libc.prctl)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.write(status, b"started\n")  # by us: from here on the program may kill whoever else could say so
    os.close(status)
    os.execve(job["python"], [job["python"], "-S", "-s", "-B", "-c", job["start"]], environment())


def environment() -> dict[str, str]:
    """Of programs. Libraries that start a thread per core would meet the limit of processes."""
    threads = ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB_MAXIMUM", "BLIS")
    return {
        "HOME": os.getcwd(),
        "LANG": "C.UTF-8",
        "PATH": "/usr/bin:/bin",
        "PYTHONHASHSEED": "0",
        **{f"{name}_NUM_THREADS": "1" for name in threads},
    }


def let_go_of_output() -> None:
    """Standard output and error belong to the program alone: whoever reads them sees its end, and we never block on them."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)


def supervise(job: dict[str, Any], status: int, usage: Usage) -> dict[str, Any]:
    """Runs the program and everything it starts to the end, or to a limit.

    Returns:
        "code" or "signal", or "stopped": the limit ("cpu", "wall", "memory", "asked"); "cpu": seconds of the whole tree; "clock":
        seconds that the program was not kept waiting for a processor; "starved": whether the machine, not the program,
        used the time up.

    Raises:
        RuntimeError: The program could not be started.
    """
    for name, text in job["files"].items():
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
    failed_read, failed_write = os.pipe()  # closed by exec
    progress_read, progress_write = os.pipe()
    program = os.fork()
    if program == 0:
        try:
            os.close(progress_read)
            become_program(job, status, progress_write if job["parts"] else None)
        except BaseException as error:
            os.write(failed_write, f"{type(error).__name__}: {error}".encode())
        os._exit(120)
    os.close(failed_write)
    os.close(progress_write)
    problem = b"".join(iter(lambda: os.read(failed_read, 4096), b""))
    os.close(failed_read)
    if problem:
        os.waitpid(program, 0)
        raise RuntimeError(problem.decode(errors="replace"))
    let_go_of_output()
    try:
        return watch(job, program, status, progress_read, usage)
    except BaseException as error:
        return {"signal": signal.SIGKILL, "cpu": 0.0, "clock": 0.0, "why": f"{type(error).__name__}: {error}"}


def _orphaned(status: int) -> bool:
    """Whether nobody reads `status` any more."""
    poll = select.poll()
    poll.register(status, 0)
    return bool(poll.poll(0))


def watch(job: dict[str, Any], program: int, status: int, progress: int, usage: Usage) -> dict[str, Any]:
    """Waits for the program's end; keeps its clocks, which start anew with every part (`PROGRESS`), and looks at its memory."""
    # A program may share our user: in a namespace nothing but its end is listened to.
    ends = {signal.SIGCHLD} if job["isolated"] else {signal.SIGCHLD, signal.SIGTERM}
    os.set_blocking(progress, False)
    began = time.monotonic()
    parts, used, clock, next_look = job["parts"], 0.0, 0.0, 0.0
    part_used, part_clock, part_began = 0.0, 0.0, began
    filled = False

    def ended(how: dict[str, Any]) -> dict[str, Any]:
        return how | {"cpu": used, "clock": clock}

    while True:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, code = os.waitpid(-1, os.WNOHANG)
                if pid == program:
                    used = usage.cpu(0)
                    clock = max(clock, used)
                    return ended(
                        {"signal": os.WTERMSIG(code)} if os.WIFSIGNALED(code) else {"code": os.WEXITSTATUS(code)}
                    )
                if pid == 0:
                    break
        asked = signal.sigtimedwait(ends, 0.05 if job["wall"] else 1.0)
        if asked is not None and asked.si_signo == signal.SIGTERM:
            return ended({"stopped": "asked"})
        now = time.monotonic()
        if job["wall"] is None and _orphaned(status):
            return ended({"stopped": "asked"})
        if job["wall"] is None or now < next_look:  # watched by who started it; or children that end all the time
            continue
        next_look = now + 0.04
        used, waited = usage.cpu(program), usage.waited(program)
        clock = now - began - (waited or 0.0)  # stands still while the program waits for a processor
        if parts:
            with contextlib.suppress(BlockingIOError):
                begun = len(os.read(progress, min(parts, 65536)))
                parts -= begun
                if begun:
                    part_used, part_clock, part_began = used, clock, now
        full, filled = filled, usage.memory(job["memory"]) > job["memory"]
        if full and filled:  # twice: a process that is being started counts twice for a moment
            return ended({"stopped": "memory"})
        if used - part_used > job["cpu"] or used > job["budget"]:
            return ended({"stopped": "cpu"})
        if clock - part_clock > job["wall"] or clock > job["budget"]:
            idle = used - part_used < 0.5 * min(job["cpu"], job["wall"])
            return ended({"stopped": "wall", "starved": waited is None and idle})
        if now - part_began > job["patience"]:
            return ended({"stopped": "wall", "starved": True})


def kill_descendants(uid: int | None, usage: Usage) -> None:
    """Without a process namespace: everything below us, including what has left its session."""
    for _ in range(2000):
        if uid is not None:  # all of them at once: a fork bomb outruns one kill after the other
            killer = os.fork()
            if killer == 0:
                with contextlib.suppress(OSError):
                    os.setresuid(uid, uid, uid)
                    os.kill(-1, signal.SIGKILL)
                os._exit(0)
            os.waitpid(killer, 0)
        children = usage.children("self")
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        if not children:
            return
        time.sleep(0.002)


def main() -> None:
    status = int(sys.argv[1])
    length = int(read_exactly(8))
    job = json.loads(read_exactly(length))
    if job["wall"] is not None:  # else the thread that started us may end long before us; `_orphaned` looks instead
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # nothing a program sends reaches us
    try:
        if job["isolated"]:
            enter_namespaces()
            if job["wall"] is not None:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a new user namespace has cleared it
            first = os.fork()  # the first process of the new namespace: when it ends, the kernel kills all others
            if first != 0:
                let_go_of_output()
                os.waitpid(first, 0)
                return
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            mount(None, "/", None, MS_REC | MS_PRIVATE)
            proc = private_proc()
            enter_root(job["readable"], job["disk"])
            ended = supervise(job, status, Usage(proc))
        else:
            libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            os.chdir(job["directory"])
            usage = Usage(None)
            try:
                ended = supervise(job, status, usage)
            finally:
                kill_descendants(job["uid"], usage)
    except BaseException as error:
        ended = {"sandbox": f"{type(error).__name__}: {error}"}
    os.write(status, json.dumps(ended).encode())
    os._exit(0)


def read_exactly(n: int) -> bytes:
    data = b""
    while len(data) < n:
        part = os.read(0, n - len(data))
        if not part:
            raise EOFError("the job was cut short")
        data += part
    return data


if __name__ == "__main__":
    main()
