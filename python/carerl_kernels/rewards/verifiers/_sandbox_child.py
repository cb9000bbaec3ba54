"""The inside of the sandbox: run by file name with `python -I -S`, uses the standard library only, imports nothing of ours.

Reads a job from standard input (8 digits of length, then JSON), builds the isolation, runs the program in it with limits,
kills everything the program left behind, and writes how it ended to the file descriptor `status`. What follows the job on
standard input belongs to the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MS_RELATIME, MNT_DETACH = 1 << 21, 2
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

libc = ctypes.CDLL(None, use_errno=True)
STOP: list[int] = []  # signals that ask us to end


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


def enter_root(readable: list[str], size: int) -> None:
    """A root directory with the interpreter, three devices, and an empty /tmp; the old one is gone."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
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


def become_program(job: dict, status: int) -> None:
    """Limits, no privileges, no environment; then the interpreter."""
    os.close(status)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    limits = job["limits"]
    for name, value in limits.items():
        if name != "NPROC":
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value + (name == "CPU")))
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        resource.setrlimit(resource.RLIMIT_NPROC, (limits["NPROC"], limits["NPROC"]))
        os.setresuid(job["uid"], job["uid"], job["uid"])
    else:
        resource.setrlimit(resource.RLIMIT_NPROC, (limits["NPROC"], limits["NPROC"]))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    start = (
        f"import sys, runpy; sys.path[:0] = {job['path']!r}; sys.argv = ['main.py']; "
        f"runpy.run_path('main.py', run_name='__main__')"
    )
    environment = {"HOME": os.getcwd(), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin"}
    os.execve(job["python"], [job["python"], "-I", "-S", "-B", "-c", start], environment)


def let_go_of_output() -> None:
    """Standard output and error belong to the program alone: whoever reads them sees its end, and we never block on them."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)


def supervise(job: dict, status: int) -> dict:
    """Runs the program and everything it starts to the end, or to the deadline."""
    for name, text in job["files"].items():
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
    program = os.fork()
    if program == 0:
        try:
            become_program(job, status)
        except BaseException as error:
            os.write(2, f"sandbox: {error}\n".encode())
        os._exit(120)
    let_go_of_output()
    deadline = time.monotonic() + job["wall"]
    while True:
        pid, code = os.waitpid(-1, os.WNOHANG)
        if pid == program:
            return {"signal": os.WTERMSIG(code)} if os.WIFSIGNALED(code) else {"code": os.WEXITSTATUS(code)}
        if pid == 0:
            if STOP or time.monotonic() > deadline:
                return {"timeout": True}
            time.sleep(0.002)


def kill_descendants(uid: int | None) -> None:
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
        children = []
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = [int(pid) for pid in file.read().split()]
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
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
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        if job["isolated"]:
            enter_namespaces()
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a new user namespace has cleared it
            first = os.fork()  # the first process of the new namespace: when it ends, the kernel kills all others
            if first != 0:
                let_go_of_output()
                os.waitpid(first, 0)
                return
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            enter_root(job["readable"], job["disk"])
            ended = supervise(job, status)
        else:
            libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            signal.signal(signal.SIGTERM, lambda number, frame: STOP.append(number))
            os.chdir(job["directory"])
            try:
                ended = supervise(job, status)
            finally:
                kill_descendants(job["uid"])
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
