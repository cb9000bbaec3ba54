"""Programs that try to get out, and what the host looks like afterwards.

Every test runs with whatever isolation this machine has, and again with limits only; what limits alone cannot stop is tested with
isolation only, and skipped with the reason where there is none.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from pathlib import Path

import pytest
from carerl_kernels.rewards.verifiers import Sandbox, SandboxError, SandboxLimits, _launch, why_not_isolated
from carerl_kernels.rewards.verifiers import sandbox as module

# On a busy machine an interpreter takes seconds to start: only what never ends gets little time.
SMALL = SandboxLimits(wall=30, cpu=1, memory=128 << 20, processes=6, disk=1 << 20, output=10_000)


def make(isolation, limits=SMALL, **settings):
    # a directory that is not there, but in the command line of all that runs in this sandbox: other tests have sandboxes too
    settings.setdefault("packages", [f"/carerl-{uuid.uuid4().hex}"])
    for python in (None, "/usr/bin/python3"):
        try:
            return Sandbox(limits, isolation=isolation, allow_unisolated=True, python=python, **settings)
        except SandboxError as error:
            problem = str(error)
    pytest.skip(problem)


@pytest.fixture(params=["namespaces", "none"])
def sandbox(request):
    return make(request.param)


@pytest.fixture(params=["namespaces", "none"])
def impatient(request):
    return make(request.param, SMALL.model_copy(update={"wall": 1.5}))


@pytest.fixture
def isolated():
    return make("namespaces")


def gone(sandbox):
    """Whether no process of a sandbox is left, a moment later at most."""
    mark = sandbox.packages[0].encode()
    for _ in range(100):
        left = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                left += [path] if mark in path.read_bytes() else []
        if not left:
            return True
        time.sleep(0.02)
    return False


# ------------------------------------------------------------------------------------------------------ what it is for


def test_an_ordinary_program(sandbox):
    got = sandbox.run("import sys, math\nprint(input()[::-1], math.pi)\nprint('x', file=sys.stderr)", "olleh\n")
    assert (got.status, got.code, got.stdout, got.stderr) == ("ok", 0, "hello 3.141592653589793\n", "x\n")


def test_how_it_failed(sandbox):
    assert (sandbox.run("raise ValueError('no')").status, sandbox.run("import sys; sys.exit(3)").code) == ("error", 3)
    assert "ValueError: no" in sandbox.run("raise ValueError('no')").stderr
    got = sandbox.run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert got.status == "killed" and got.code == -11
    assert sandbox.run("def f(:").status == "error"
    ours = sandbox.run("import os; os._exit(120)")  # the code with which the inside ends where no program runs
    assert (ours.status, ours.code) == ("error", 120)


def test_text_of_every_kind_comes_through(sandbox):
    text = "ä€\U0001f600\x00\u2028"
    assert sandbox.run("import sys; print(ascii(sys.stdin.read()), end='')", text).stdout == ascii(text)
    assert sandbox.run(f"print({text!r}, end='')").stdout == text
    assert sandbox.run("print(open('data.txt').read(), end='')", files={"data.txt": "given"}).stdout == "given"
    long = "abc\n" * 100_000
    assert sandbox.run("import sys; print(len(sys.stdin.read()))", long).stdout == "400000\n"
    assert sandbox.run("print(1)", long).status == "ok"  # nobody reads it


def test_packages_can_be_lent(tmp_path_factory, isolated):
    folder = tmp_path_factory.mktemp("lent")
    folder.chmod(0o755)  # programs run as somebody else
    (folder / "helpful.py").write_text("value = 42")
    (folder / "secret.txt").write_text("x")
    with_it = make("namespaces", packages=[folder])
    assert with_it.run("import helpful; print(helpful.value)").stdout == "42\n"
    assert with_it.run(f"open({str(folder / 'new')!r}, 'w')").status == "error"
    assert isolated.run("import helpful").status == "error"


# --------------------------------------------------------------------------------------------------------- what it stops


def test_infinite_loop(sandbox):
    started = time.monotonic()
    got = sandbox.run("marker_loop = 1\nwhile True: pass")
    assert got.status in ("cpu", "timeout") and got.code in (None, -24, -9) and time.monotonic() - started < 25


def test_sleeping_for_ever(impatient):
    assert impatient.run("import time; time.sleep(1000)").status == "timeout"


def test_ignoring_signals(sandbox):
    program = """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
"""
    assert sandbox.run(program).status in ("cpu", "timeout", "killed")


def test_fork_bomb(impatient):
    """It reaches its limit of processes and no further; afterwards none is left."""
    before = len(list(Path("/proc").glob("[0-9]*")))
    most = [0]
    stop = threading.Event()

    def watch():
        while not stop.wait(0.01):
            most[0] = max(most[0], len(list(Path("/proc").glob("[0-9]*"))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    try:
        got = impatient.run(bomb)
    finally:
        stop.set()
        watcher.join()
    assert got.status in ("timeout", "cpu", "killed")
    assert most[0] - before < 200  # other tests and people have processes too; an unlimited bomb has thousands
    assert gone(impatient)


def test_the_check_for_left_overs_sees_a_program_that_runs(sandbox):
    thread = threading.Thread(target=sandbox.run, args=("import time; time.sleep(1)",))
    thread.start()
    seen = False
    while thread.is_alive() and not seen:
        mark = sandbox.packages[0].encode()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                seen |= mark in path.read_bytes()
    thread.join()
    assert seen and gone(sandbox)


def test_counting_processes(sandbox):
    program = """
import os, time
n = 0
try:
    while True:
        if os.fork() == 0: time.sleep(60)
        n += 1
except OSError: print(n)
"""
    assert 1 <= int(sandbox.run(program).stdout) <= SMALL.processes


def test_memory_hog(sandbox):
    got = sandbox.run("x = []\nwhile True: x.append(bytearray(1 << 20))")
    assert got.status in ("error", "killed") and ("MemoryError" in got.stderr or got.code == -9)
    got = sandbox.run("x = []\nwhile True: x.append(bytearray(1 << 20)); print(len(x), flush=True)")
    assert int(got.stdout.split()[-1]) < 128


def test_output_flood(sandbox):
    for stream in ("stdout", "stderr"):
        started = time.monotonic()
        got = sandbox.run(f"import sys\nwhile True: sys.{stream}.write('x' * 1000)")
        assert got.status == "output" and len(getattr(got, stream)) == SMALL.output and time.monotonic() - started < 25
    assert gone(sandbox)


def test_filling_the_disk(sandbox):
    got = sandbox.run("f = open('big', 'wb')\nwhile True: f.write(b'x' * 65536); f.flush()")
    assert got.status in ("error", "killed") and ("OSError" in got.stderr or got.code == -25)


def test_a_process_that_outlives_its_parent(sandbox):
    program = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(1000)
    os._exit(0)
print('bye')
"""
    started = time.monotonic()
    got = sandbox.run(program)
    assert (got.status, got.stdout) == ("ok", "bye\n") and time.monotonic() - started < 25
    assert gone(sandbox)


def test_nothing_of_ours_is_in_its_environment(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    program = """
import json
import os
print(dict(os.environ))
print(os.listdir('.'))
print(sum(os.fstat(n) is not None for n in range(30) if not failing(os.fstat, n)))
"""
    program = "def failing(f, n):\n    try: f(n)\n    except OSError: return True\n" + program
    environment, files, descriptors = sandbox.run(program).stdout.splitlines()
    assert "hunter2" not in environment and files == "['main.py']"
    assert int(descriptors) == 3  # the standard streams


def test_it_is_not_root(sandbox):
    got = sandbox.run(
        "import os; print(os.getuid(), os.geteuid(), os.getgroups())\ntry: os.setuid(0); print('root')\nexcept OSError: pass"
    )
    assert not got.stdout.startswith("0 ") and "root" not in got.stdout


def test_secrets_on_disk_are_not_there(isolated, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("hunter2")
    secret.chmod(0o644)
    files = [str(secret), "/etc/passwd", "/etc/shadow", "/proc/1/environ", "/proc/self/environ", __file__]
    folders = [p for p in ("/home", "/var", "/run", "/etc", "/srv") if not isolated.python.startswith(p)]
    program = f"import os\nfor path in {files + folders!r}:\n    if os.path.exists(path): print(path)"
    assert isolated.run(program).stdout == ""
    climb = (
        "import os\nd = os.open('/', os.O_RDONLY)\nfor _ in range(20): os.chdir('..')\nprint(sorted(os.listdir('.')))"
    )
    assert "'etc'" not in isolated.run(climb).stdout and "'tmp'" in isolated.run(climb).stdout


def test_files_outside_cannot_be_written(isolated, tmp_path):
    target = tmp_path / "target.txt"
    target.write_text("before")
    tmp_path.chmod(0o777)
    target.chmod(0o666)
    places = [str(target), "/new", "/usr/new", "/dev/new", os.__file__]
    program = f"for p in {places!r}:\n  try: open(p, 'w').write('after'); print(p)\n  except OSError: pass"
    assert isolated.run(program).stdout == ""
    assert target.read_text() == "before"
    assert (
        isolated.run(
            "import os; open('x', 'w').write('#!/bin/true'); os.chmod('x', 0o755); os.execv('/tmp/x', ['x'])"
        ).status
        == "error"
    )


def test_the_network_is_out_of_reach(isolated):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0carerl-sandbox-test")
        local.listen()
        port = server.getsockname()[1]
        program = (
            f"import socket\nfor kind, place in ((socket.AF_INET, ('127.0.0.1', {port})), (socket.AF_INET, ('192.0.2.1', 80)), "
            "(socket.AF_UNIX, chr(0) + 'carerl-sandbox-test')):\n"
            "  try: socket.socket(kind).connect(place); print('connected')\n  except OSError: print('refused')"
        )
        assert isolated.run(program).stdout == "refused\n" * 3
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


def test_other_processes_are_out_of_sight(isolated):
    program = f"""
import json
import os
print(os.getpid())
for pid in (1, {os.getpid()}, -1):
    try: os.kill(pid, 0 if pid == 1 else 9); print('killed', pid)
    except OSError: pass
"""
    got = isolated.run(program)
    assert got.stdout.startswith("2\n") and f"killed {os.getpid()}" not in got.stdout


def test_many_at_once_do_not_disturb_each_other(sandbox):
    results = {}

    def one(i):
        results[i] = sandbox.run(
            f"import os, time\nif {i} % 2:\n  for _ in range(2): os.fork()\ntime.sleep(.1)\nprint({i})"
        )

    threads = [threading.Thread(target=one, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(results[i].status == "ok" and set(results[i].stdout.split()) == {str(i)} for i in range(6))


# ----------------------------------------------------------------------------------------------------- where there is none


def test_without_isolation_it_refuses(monkeypatch):
    monkeypatch.setattr(module, "why_not_isolated", lambda python: "not on this machine")
    with pytest.raises(SandboxError, match=r"cannot be isolated here: not on this machine; .*allow_unisolated=True"):
        Sandbox()
    with pytest.raises(SandboxError, match="namespaces cannot be had here: not on this machine"):
        Sandbox(isolation="namespaces", allow_unisolated=True)
    assert make(None).isolation == "none"  # says what is in force


def test_switching_isolation_off_takes_two_words():
    with pytest.raises(SandboxError, match="isolation is switched off"):
        Sandbox(isolation="none")


def test_as_root_without_isolation_programs_do_not_run_as_root(monkeypatch):
    monkeypatch.setattr(module, "_everybody_can_run", lambda python: False)
    monkeypatch.setattr(module.os, "geteuid", lambda: 0)
    with pytest.raises(SandboxError, match="they shall not run as root"):
        Sandbox(isolation="none", allow_unisolated=True)


def test_a_kernel_that_refuses_is_a_reason(monkeypatch):
    monkeypatch.setattr(module, "_run", lambda *a: (_ for _ in ()).throw(SandboxError("PermissionError: unshare")))
    why_not_isolated.cache_clear()
    try:
        assert why_not_isolated(os.sys.executable) == "PermissionError: unshare"
    finally:
        why_not_isolated.cache_clear()


def test_an_interpreter_that_does_not_run_is_named():
    with pytest.raises(SandboxError, match="the interpreter /bin/false does not run"):
        Sandbox(isolation="none", allow_unisolated=True, python="/bin/false").run("")


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: every test above uses user namespaces already")
def test_user_namespaces_isolate_where_there_is_no_root(tmp_path):
    """The inside of the sandbox run by a user without rights, who has to make a user namespace first."""
    python = "/usr/bin/python3"
    if not Path(python).exists() or not module._everybody_can_run(python):
        pytest.skip(f"no {python} for everybody")
    program = """
import json
import os
print(os.getuid(), os.path.exists('/etc/passwd'), os.path.exists('/proc/1'))
try: os.mkdir('/new')
except OSError: print('read-only')
n = 0
try:
    while True:
        if os.fork() == 0: __import__('time').sleep(60)
        n += 1
except OSError: print(n < 8)
"""
    executable, *library = _launch.interpreter(python)
    limits = {"CPU": 2, "AS": 1 << 29, "NPROC": 8, "FSIZE": 1 << 20, "NOFILE": 32, "CORE": 0}
    job = {"isolated": True, "python": executable, "readable": [executable, *library], "directory": None}
    job |= {"files": {"main.py": program}, "uid": None, "wall": 30, "disk": 1 << 20, "memory": 1 << 29}
    job |= {
        "limits": limits,
        "start": f"{_launch._PROGRAM}\nstart([])\n",
        "cpu": 5,
        "budget": 60,
        "patience": 90,
        "parts": 0,
    }
    text = json.dumps(job).encode()
    for name in ("_sandbox_child", "_landlock", "_seccomp", "_usage"):  # they may lie where that user cannot read
        (tmp_path / f"{name}.py").write_text((_launch._HERE / f"{name}.py").read_text())
    for place in (tmp_path, *tmp_path.parents[:-2]):
        place.chmod(0o755)
    source = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import _sandbox_child; _sandbox_child.main()"
    read, write = os.pipe()
    with os.fdopen(read) as status:
        child = subprocess.Popen(
            [python, "-I", "-S", "-c", source, str(write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(write,),
            env={},
            user=54321,
            group=54321,
            extra_groups=[],
        )
        os.close(write)
        out, _ = child.communicate(b"%08d" % len(text) + text)
        begun, _, ended = status.read().rpartition("\n")
    if not begun:
        pytest.skip(f"users may not make namespaces here: {ended}")
    assert json.loads(ended)["code"] == 0 and out.decode() == "1000 False False\nread-only\nTrue\n"
