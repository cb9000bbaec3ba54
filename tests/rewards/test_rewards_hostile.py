"""Programs that attack the sandbox, its supervisor, or the programs beside them; and honest ones that must not pay for it.

Each runs with namespaces and with limits only, as this user and, where this is root, as a user without rights.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from carerl_kernels.grpo import Example
from carerl_kernels.rewards.verifiers import CodeTests, Sandbox, SandboxError, SandboxLimits, _launch, _seccomp
from carerl_kernels.rewards.verifiers import sandbox as module
from carerl_kernels.rewards.verifiers.sandbox import _TURNS

LIMITS = SandboxLimits(wall=20, cpu=2, memory=128 << 20)
PYTHON = "/usr/bin/python3"
NOBODY = 54321 + os.getpid() % 10_000  # of this test process alone: programs kill whatever is their user's


def make(isolation, limits=LIMITS):
    for python in (None, PYTHON):
        try:
            return Sandbox(limits, isolation=isolation, allow_unisolated=True, python=python)
        except SandboxError as error:
            problem = str(error)
    pytest.skip(problem)


def as_another_user(folder, isolation, text):
    """(status, stdout) of a program that a user without rights runs, with the inside of the sandbox that is in this folder."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = {"error": "it died"}
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.environ["TMPDIR"] = "/tmp"
            _launch._HERE = folder
            module.why_not_isolated.cache_clear()
            module._protections.cache_clear()
            try:
                sandbox = Sandbox(LIMITS, isolation=isolation, allow_unisolated=True, python=PYTHON)
            except SandboxError as error:
                said = {"skip": str(error)}
            else:
                got = sandbox.run(text)
                said = {"value": (got.status, got.stdout)}
        except BaseException as error:
            said = {"error": repr(error)}
        finally:
            os.write(write, json.dumps(said).encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        said = json.loads(file.read())
    os.waitpid(child, 0)
    if "skip" in said:
        pytest.skip(said["skip"])
    assert "value" in said, said
    return said["value"]


@pytest.fixture(scope="module")
def readable():
    """A copy of the inside of the sandbox that every user can read; pytest's own folders are closed again whenever it starts."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("_sandbox_child", "_landlock", "_seccomp", "_usage"):
            shutil.copy(_launch._HERE / f"{name}.py", folder)
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(params=["namespaces", "none", "namespaces, another user", "none, another user"])
def run(request, readable):
    """Runs a program: f(text) -> (status, stdout)."""
    isolation, _, other = request.param.partition(", ")
    if not other:
        sandbox = make(isolation)
        return lambda text: (lambda got: (got.status, got.stdout))(sandbox.run(text))
    skip_unless_root()
    return lambda text: tuple(as_another_user(readable, isolation, text))


def skip_unless_root():
    if os.geteuid() != 0 or not Path(PYTHON).exists():
        pytest.skip("not root: the other cases run as a user without rights already")


TRY = """
import ctypes, os, resource, socket
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
NUMBERS = %r
def call(name, *args):
    if libc.syscall(NUMBERS[name], *args) < 0: raise OSError(ctypes.get_errno(), name)
def clone(flags):
    pid = libc.syscall(NUMBERS["clone"], ctypes.c_ulong(flags | 17), None, None, None, None)
    if pid == 0: os._exit(0)
    if pid < 0: raise OSError
ATTEMPTS = {
    "unshare users": lambda: call("unshare", 0x10000000),
    "unshare files": lambda: call("unshare", 0x00020000),
    "clone users": lambda: clone(0x10000000),
    "clone network": lambda: clone(0x40000000),
    "mount": lambda: call("mount", b"none", b"/tmp", b"tmpfs", 0, None),
    "shared memory": lambda: call("shmget", 0, 1 << 20, 0o1600),
    "memfd": lambda: call("memfd_create", b"x", 0),
    "message queue": lambda: call("msgget", 0, 0o1600),
    "search keys": lambda: call("keyctl", 10, -3, b"user", b"trainer-secret", 0),
    "leave a key": lambda: call("add_key", b"user", b"note", b"x", 1, -3),
    "trace": lambda: call("ptrace", 16, os.getppid(), 0, 0),
    "read memory": lambda: call("process_vm_readv", os.getppid(), None, 0, None, 0, 0),
    "io_uring": lambda: call("io_uring_setup", 1, None),
    "bpf": lambda: call("bpf", 0, None, 0),
    "limits of 1": lambda: resource.prlimit(1, resource.RLIMIT_NOFILE, (1, 1)),
    "limits of the parent": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1)),
    "network": lambda: socket.create_connection(("127.0.0.1", %d), 1),
    "secrets": lambda: open("/etc/shadow"),
    "users": lambda: open("/etc/passwd"),
    "the trainer": lambda: open("/proc/%d/environ"),
    "a file of the host's": lambda: open("/var/tmp/carerl-hostile", "w"),
}
for name, attempt in ATTEMPTS.items():
    try: attempt()
    except OSError: continue
    print("succeeded:", name)
print("tried", len(ATTEMPTS))
"""


@pytest.mark.skipif(not _seccomp.supported(), reason="no filter of system calls for this architecture")
def test_what_a_program_may_not_do(run):
    """With namespaces and without: denied by the filter of system calls, Landlock, or the user it runs as."""
    import socket

    which = list(_seccomp.ARCHITECTURES).index(os.uname().machine)
    numbers = {name: pair[which] for name, pair in {**_seccomp.DENIED, "clone": _seccomp.CLONE}.items()}
    with socket.create_server(("127.0.0.1", 0)) as server:
        status, out = run(TRY % (numbers, server.getsockname()[1], os.getpid()))
    assert (status, out.splitlines()[-1].startswith("tried")) == ("ok", True), out
    assert "succeeded" not in out, out


ORDINARY = """
import multiprocessing, os, pickle, signal, subprocess, threading
from dataclasses import dataclass
thread = threading.Thread(target=print, args=("thread",)); thread.start(); thread.join()
child = os.fork()
if child == 0: os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
signal.signal(signal.SIGALRM, lambda *a: print("alarm")); signal.setitimer(signal.ITIMER_REAL, .01); signal.pause()
open("a", "w").write("x"); print(open("a").read(), open("/dev/null").read() == "")
print(len(os.urandom(8)), len(open("/dev/urandom", "rb").read(4)))
@dataclass
class P: x: int
print(pickle.loads(pickle.dumps(P(3))).x, hash("a") == %d)
exit()
"""


def test_ordinary_programs_run(run):
    status, hashed = run("print(hash('a'))")
    status, out = run(ORDINARY % int(hashed))
    assert (status, out) == ("ok", "thread\n7\nalarm\nx True\n8 4\n3 True\n")


@pytest.mark.parametrize(
    "attack",
    [
        "os.kill(1, 2)", "os.kill(os.getppid(), 2)", "os.kill(os.getppid(), 9)", "os.kill(os.getppid(), 15)", "os.kill(-1, 9)",
        "os.kill(os.getppid(), 19)", "os.kill(1, 15)", "resource.prlimit(1, resource.RLIMIT_AS, (1 << 20, 1 << 20))",
        "os.close(0), os.close(1), os.close(2), os.closerange(3, 100)", "[os.write(d, b'{}') for d in range(3, 20) if ok(d)]",
    ],
)  # fmt: skip
def test_whatever_a_program_does_to_its_supervisor_is_its_own_failure(run, attack):
    """It ends as a failed program; never as a failure of the sandbox, which would take the bad mark away."""
    program = "import os, resource, sys\ndef ok(d):\n    try: return os.fstat(d)\n    except OSError: return None\n"
    status, _ = run(f"{program}try: {attack}\nexcept OSError: pass\nos._exit(3)")
    assert status in ("error", "killed", "timeout")


OLD_AND_BUSY = """

def let_go_of_output(quickly=let_go_of_output):
    time.sleep(1)
    quickly()

_seccomp.supported = _landlock.version = lambda *_: 0
"""


def test_a_program_that_kills_its_supervisor_at_once_has_failed(readable):
    """Before that has come to look after it, on a busy machine; no kernel filters its system calls, and it has the same user."""
    skip_unless_root()
    child = readable / "_sandbox_child.py"
    text = child.read_text()
    child.write_text(text + OLD_AND_BUSY)
    try:
        status, _ = as_another_user(readable, "none", "import os; os.kill(os.getppid(), 9)")
    finally:
        child.write_text(text)
    assert status in ("error", "killed", "timeout")


def test_memory_of_no_process_is_not_to_be_had(run):
    """Several processes have the memory of that many, and nothing beside."""
    program = """
import mmap
held = []
try:
    while True: held.append(mmap.mmap(-1, 8 << 20)); held[-1].write(b"x" * (8 << 20))
except (OSError, MemoryError): print(8 * len(held))
"""
    status, out = run(program)
    assert status == "ok" and int(out) <= 128


@pytest.mark.skipif(os.geteuid() != 0 or not _seccomp.supported(), reason="needs root, to have a session keyring")
def test_the_trainers_keys_are_out_of_sight():
    """Also where nothing filters system calls: a program has a session keyring of its own."""
    add, keyctl = _seccomp.DENIED["add_key"][0], _seccomp.DENIED["keyctl"][0]
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        os.uname().machine != "x86_64"
        or libc.syscall(add, b"user", b"trainer-secret", b"ticket", ctypes.c_size_t(6), -3) < 0
    ):
        pytest.skip("no keyring here")
    child = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"print(libc.syscall({keyctl}, 10, -3, b'user', b'trainer-secret', 0) < 0, ctypes.get_errno())"
    )
    assert make("namespaces").run(child).stdout.startswith("True")


# ---------------------------------------------------------------------------------------------------------- the filter


def decision(filter_, number, argument=0, machine="x86_64"):
    """What a kernel does with a system call: a classic BPF machine with the instructions in use."""
    data = {0: number, 4: _seccomp.ARCHITECTURES.get(machine, 0x40000003), 16: argument & 0xFFFFFFFF}
    at, register = 0, 0
    while True:
        code, yes, no, value = filter_[at]
        at += 1
        if code == 0x06:
            return {0x7FFF0000: "allow", 0x80000000: "kill"}.get(value, f"errno {value & 0xFFFF}")
        if code == 0x20:
            register = data[value]
        else:
            taken = {0x15: register == value, 0x35: register >= value, 0x45: bool(register & value)}[code]
            at += yes if taken else no


@pytest.mark.parametrize("machine", _seccomp.ARCHITECTURES)
@pytest.mark.parametrize("alone", [True, False])
def test_the_filter_of_system_calls(machine, alone):
    which = list(_seccomp.ARCHITECTURES).index(machine)
    filter_ = _seccomp.program(77, signals=alone, network=alone, machine=machine)
    denied = {pair[which] for pair in _seccomp.DENIED.values()} - {None}
    special = {
        pair[which]
        for pair in (_seccomp.CLONE, _seccomp.CLONE3, _seccomp.PRLIMIT, _seccomp.SOCKET, *_seccomp.SIGNALS.values())
    }
    assert len(filter_) < 4096 and not denied & special
    for number in range(600):
        got = decision(filter_, number, machine=machine)
        if number in denied:
            assert got == "errno 1"
        elif number not in special:
            assert got == "allow"
    clone, prlimit, kill, connect = (
        p[which] for p in (_seccomp.CLONE, _seccomp.PRLIMIT, _seccomp.SIGNALS["kill"], _seccomp.SOCKET)
    )
    for flag in (1 << bit for bit in range(32)):
        namespaces = flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
        assert decision(filter_, clone, flag, machine) == ("errno 1" if namespaces else "allow")
    assert decision(filter_, _seccomp.CLONE3[which], machine=machine) == "errno 38"
    assert [decision(filter_, prlimit, pid, machine) for pid in (0, 77, 1)] == ["allow", "allow", "errno 1"]
    others = "allow" if alone else "errno 1"
    assert [decision(filter_, kill, pid, machine) for pid in (0, 77, 1, -1)] == ["allow", "allow", others, others]
    assert decision(filter_, connect, 2, machine) == others
    assert (
        decision(filter_, 1, machine="i386") == "kill" and decision(filter_, 0x40000001, machine=machine) == "errno 38"
    )


def test_protections_are_named(caplog):
    assert all(make("namespaces").protections[name] for name in ("namespaces", "files", "network", "memory"))
    plain = make("none")
    assert not plain.protections["namespaces"] and plain.protections["memory"]
    module._warn_of_missing.cache_clear()
    plain.run(""), plain.run("")
    assert caplog.text.count("without protection of namespaces") == 1 and "allow user namespaces" in caplog.text


def test_users_of_programs_are_nobodys(monkeypatch):
    drawn = [_launch._draw_uid() for _ in range(20)]
    try:
        assert len(set(drawn)) == 20 and all(any(uid in r for r in _launch._RANGES) for uid in drawn)
        monkeypatch.setattr(_launch, "_RANGES", (range(61_184, 61_187),))
        monkeypatch.setattr(_launch, "_has_name", lambda uid: uid == 61_184)
        drawn.append(_launch._draw_uid())
        drawn.append(_launch._draw_uid())
        assert set(drawn[-2:]) == {61_185, 61_186}
        with pytest.raises(SandboxError, match="no user number is free"):
            _launch._draw_uid()
    finally:
        _launch._UIDS.difference_update(drawn)


# ---------------------------------------------------------------------------------------------------------------- time


def test_time_counts_over_the_whole_tree():
    program = "import os\nfor _ in range(3): os.fork()\nwhile True: pass"
    got = make("namespaces").run(program)
    assert got.status == "cpu" and 1.5 < got.used < 8


def test_sleep_is_the_programs_own_time():
    started = time.monotonic()
    assert (
        make("namespaces", LIMITS.model_copy(update={"wall": 1.0})).run("import time; time.sleep(60)").status
        == "timeout"
    )
    assert time.monotonic() - started < 30


def test_a_program_that_the_machine_starves_runs_again_alone(monkeypatch):
    """And is not judged if that is not enough."""
    calls = []

    def starved(*args):
        calls.append(_TURNS._alone)
        return None if len(calls) < 2 else module.Outcome("ok", 0, "", "", 0.0)

    sandbox = make("namespaces")
    sandbox.run("")  # what the machine allows is found out at the first run, by programs of its own
    monkeypatch.setattr(module, "_run", starved)
    assert sandbox.run("").status == "ok" and calls == [0, 1]
    monkeypatch.setattr(module, "_run", lambda *args: None)
    example = Example("?", info={"tests": [{"stdin": "", "stdout": ""}]})
    assert CodeTests(sandbox)(example, "print(1)") is None


def test_tests_of_a_completion_have_a_budget():
    limits = LIMITS.model_copy(update={"cpu": 1})
    tests = [{"stdin": "", "stdout": "1"}] * 8
    example = Example("?", info={"tests": tests})
    started = time.process_time(), os.times().children_user
    assert CodeTests(make("namespaces", limits))(example, "while True: pass") == 0  # the first failure ends it
    assert os.times().children_user - started[1] < 4
    before = os.times().children_user
    assert CodeTests(make("namespaces", limits), partial=True, budget=2.5)(example, "while True: pass") == 0
    assert os.times().children_user - before < 8
    calls = [{"call": "f", "args": [i], "expected": i} for i in range(2)]
    program = "def f(x):\n    while x % 2: pass\n    return x"
    assert CodeTests(make("namespaces", limits), partial=True)(Example("?", info={"tests": calls}), program) == 0.5


# ------------------------------------------------------------------------------------------------------------- memory

FORKS = "import os, sys, time\nfor _ in range({}):\n    if os.fork() == 0: break\n"
JOIN = "\ntry:\n    while True: os.wait()\nexcept OSError: pass"
THREAD = """
import _thread, ctypes
def fill():
    held = b"x" * (60 << 20)
    time.sleep(9)
_thread.start_new_thread(fill, ())
time.sleep(.1)
ctypes.CDLL(None).syscall({})  # the first thread ends, the process does not
"""
EXIT = {"x86_64": 60, "aarch64": 93}


def test_memory_counts_over_the_whole_tree(run):
    """Every process is within its own limit, all together are not."""
    assert run(FORKS.format(5) + "held = b'x' * (40 << 20)\ntime.sleep(9)")[0] == "memory"


@pytest.mark.parametrize("isolation", ["namespaces", "none"])
def test_memory_counts_where_the_first_thread_has_ended(isolation):
    program = FORKS.format(2) + THREAD.format(EXIT[os.uname().machine])
    assert make(isolation).run(program).status == "memory"


@pytest.mark.parametrize(
    "program",
    [
        "held = b'x' * (60 << 20)\n" + FORKS.format(5) + "time.sleep(.5)\nprint(1)" + JOIN,
        FORKS.format(5) + "held = b'x' * (5 << 20)\ntime.sleep(.5)\nprint(1)" + JOIN,
        "import subprocess, sys\nheld = b'x' * (80 << 20)\n"
        "for _ in range(6): print(subprocess.run([sys.executable, '-S', '-c', '']).returncode + 1)",
    ],
    ids=["shared", "small", "started from a large one"],
)
def test_what_processes_share_counts_once(run, program):
    assert tuple(run(program)) == ("ok", "1\n" * 6)


HOSTILE = (
    "import os\nfor _ in range(7):\n    if os.fork() == 0: break\nwhile True: pass",
    "while True: pass",
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "x = []\nwhile True: x.append(bytearray(1 << 20))",
    FORKS.format(6) + "held = b'x' * (100 << 20)\ntime.sleep(60)",
    "import sys\nwhile True: sys.stdout.write('x' * 10000)",
    "9 ** 9 ** 9 ** 9",
)
HONEST = "import time\nwhile time.process_time() < 0.5: pass\nprint(1)"


@pytest.mark.slow
def test_honest_slow_programs_beside_hostile_ones_keep_their_reward():
    """Half of the processor time an honest program may take, in threads as `carerl score` runs them."""
    sandbox = make("namespaces", SandboxLimits(wall=3, cpu=1, memory=256 << 20))
    judge = CodeTests(sandbox)
    example = Example("?", info={"tests": [{"stdin": "", "stdout": "1"}]})
    each = len(HOSTILE)
    work = [(program, 0.0) for program in HOSTILE] + [(HONEST, 1.0)] * each
    work = [work[i * 5 % len(work)] for i in range(len(work))]  # mixed
    with ThreadPoolExecutor(6) as pool:  # fewer than there are programs of either kind
        rewards = list(pool.map(lambda one: judge(example, one[0]), work))
    got = Counter((right, reward) for (_, right), reward in zip(work, rewards, strict=True))
    assert got == {(0.0, 0.0): each, (1.0, 1.0): each}
