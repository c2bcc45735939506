"""Runs Python that nobody has read: generated programs, and functions against tests that they cannot reach.

    python sandbox.py                       # says which layers this machine gives
    python sandbox.py program.py            # runs a file and prints what it printed

    >>> sandbox.run("print('hello')").output
    >>> sandbox.grade(prompt, completion, test, entry_point)        # (passed, reason)

A worker is two processes. The keeper sets the layers up, waits, and ends everything that is left. Below it, the program
runs in a process group and a PID namespace of its own, as nobody, with limits on time, memory, files and processes, no
network, an empty environment, and a file system that holds Python, the system's libraries and an empty /tmp of 16 MB.
Landlock holds the files, the network and the signals once more, seccomp what of the kernel none of these holds. Where a
layer is missing, it refuses unless told to `waive` that layer; outside Linux there is none of this, and it refuses.

Tests run in a second worker. Only calls and values of plain built-in types pass between the two, as JSON lines, so what
a program does to its own process (exit, builtins, frames, ==) cannot turn a wrong answer into a right one.
"""
import ctypes
import dataclasses
import json
import os
import platform
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

LAYERS = ("user", "namespaces", "network", "files", "landlock", "seccomp", "limits")
OUTPUT_LIMIT = 1 << 16                                     # bytes of output that are looked at
MESSAGE_LIMIT = 1 << 20                                    # bytes of one call or answer
PATIENCE = 60                                              # seconds that a worker may take to start, and to end
NOBODY = 65534


class SandboxError(ValueError):
    """The machine does not give a layer that was not waived."""


@dataclasses.dataclass(frozen=True)
class Limits:
    seconds: float = 60.0                                  # wall clock; long, or a busy machine would change scores
    cpu: int = 5                                           # seconds of each process
    memory: int = 512 << 20                                # bytes of address space of each process
    processes: int = 8                                     # with threads
    file: int = 1 << 20                                    # bytes of each file, and of the output
    files: int = 64                                        # open at a time


@dataclasses.dataclass(frozen=True)
class Result:
    ok: bool                                               # it came to its end without an exception
    output: str                                            # of stdout and stderr together
    error: str                                             # the exception, or how it ended; empty if ok
    seconds: float


# ---- the side that is trusted

class Worker:
    """A sandboxed process; `start` goes to its first lines. SandboxError if a layer outside `waive` is missing.

    Between `receive` and `send` lie JSON lines. `deny` are layers to treat as missing, for tests.
    """

    def __init__(self, start, limits=None, waive=(), deny=()):
        self.limits = limits or Limits()
        if sys.platform != "linux":
            raise SandboxError("the sandbox needs Linux: use a Linux machine, or a virtual one")
        self.end, self.buffer = time.monotonic() + PATIENCE, b""
        self.output = tempfile.TemporaryFile()             # its size has a limit, a pipe would have to be drained
        # not -I, which would make the hash of strings, and so the order of sets, differ from run to run
        self.process = subprocess.Popen(
            [os.path.realpath(sys.executable), "-s", "-S", "-P", "-B", "-X", "utf8", os.path.abspath(__file__),
             "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.output, cwd="/", bufsize=0,
            env={"PYTHONHASHSEED": "0"}, start_new_session=True)
        try:
            self.send({**start, "limits": dataclasses.asdict(self.limits), "deny": list(deny)})
            hello = json.loads(self.receive() or b'{"missing": {"worker": "it did not start"}}')
            self.missing = hello["missing"]
            if lacking := [f"{layer} ({why})" for layer, why in self.missing.items() if layer not in waive]:
                raise SandboxError(f"this machine does not give the sandbox its {', '.join(lacking)}: use another "
                                   f"machine, or waive {','.join(self.missing)} if you trust what is run")
            self.end = time.monotonic() + self.limits.seconds                  # the program begins
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def left(self):
        return self.end - time.monotonic()

    def send(self, message):
        """A dict, or a line as it was received. Never waits longer than the worker has to live."""
        line = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
        fd = self.process.stdin.fileno()
        os.set_blocking(fd, False)
        try:
            while line and select.select([], [fd], [], max(0, self.left()))[1]:
                line = line[os.write(fd, line):]
        except BrokenPipeError:                            # it has ended; receive will say so
            pass

    def receive(self):
        """The next line, or None when the process has ended, ran out of time, or talks too much."""
        fd = self.process.stdout.fileno()
        while b"\n" not in self.buffer:
            if len(self.buffer) > MESSAGE_LIMIT or not select.select([fd], [], [], max(0, self.left()))[0]:
                return None
            if not (block := os.read(fd, 1 << 16)):
                return None
            self.buffer += block
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line + b"\n"

    def close(self):
        """End all its processes and wait until the last is gone. Safe to call twice."""
        self.process.stdin.close()                         # the keeper notices, kills, and ends last
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:                  # the keeper itself is stuck
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()
        self.output.close()

    def printed(self):
        self.output.seek(0)
        return self.output.read(OUTPUT_LIMIT).decode("utf-8", "replace")

    def how_it_ended(self):
        return "out of time" if self.left() <= 0 else "the process ended early"


def run(code, limits=None, waive=(), deny=()):
    """Run a program -> Result."""
    with Worker({"code": code, "name": "__main__"}, limits, waive, deny) as worker:
        answer = worker.receive()
        seconds = worker.limits.seconds - worker.left()
        error = _error(answer, worker)
        return Result(not error, worker.printed(), error, seconds)


def call(code, name, *arguments, limits=None, waive=()):
    """name(*arguments) as `code` defines it -> (value, ""), or (None, what went wrong)."""
    with Worker({"code": code, "name": "candidate"}, limits, waive) as worker:
        error = _error(worker.receive(), worker)
        if error:
            return None, error
        worker.send({"call": name, "arguments": encode(list(arguments))})
        line = worker.receive()
        try:
            return decode(json.loads(line or b"null")["value"]), ""
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return None, _error(line, worker) or "it garbled its answer"


def grade(prompt, completion, test, entry_point, limits=None, waive=()):
    """Does prompt + completion pass HumanEval's check()? -> (passed, reason).

    `test` and `prompt` run in a worker of their own, which only hears what the candidate answers to a call.
    """
    with (Worker({"code": prompt + completion, "name": "candidate"}, limits, waive) as candidate,
          Worker({"code": prompt, "test": test, "entry_point": entry_point}, limits, waive) as tests):
        if error := _error(candidate.receive(), candidate):
            return False, error
        while line := tests.receive():
            message = json.loads(line)                     # by our own code, in a process that runs only the tests
            if "verdict" in message:
                return message["verdict"] == "passed", message["verdict"]
            candidate.send(line)
            if not (answer := candidate.receive()):
                return False, candidate.how_it_ended()
            tests.send(answer)
        return False, tests.how_it_ended()


def _error(line, worker):
    """What a first answer complains of; the process that wrote it is not to be trusted with any shape."""
    if not line:
        return worker.how_it_ended()
    try:
        return str(json.loads(line).get("error", ""))[:500]
    except (ValueError, AttributeError, RecursionError):
        return "it garbled its answer"


def active(waive=LAYERS, deny=()):
    """(layers that work here, {missing layer: why})."""
    with Worker({"code": "", "name": "probe"}, waive=waive, deny=deny) as worker:
        return [layer for layer in LAYERS if layer not in worker.missing], worker.missing


# ---- plain values as JSON

def encode(value):
    """Exact built-in types only: a subclass could bring its own ==."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is list:
        return [encode(v) for v in value]
    if kind is float:
        return {"float": value.hex()}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(v) for v in value]}
    if kind is dict:
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    raise TypeError(f"a value of type {kind.__name__} cannot be passed on")


def decode(value):
    """The inverse of encode. ValueError, TypeError, KeyError, OverflowError or RecursionError on anything else."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    (kind, inner), = value.items()
    if kind == "float":
        return float.fromhex(inner)
    if kind == "complex":
        return complex(*map(float.fromhex, inner))
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "dict":
        return {decode(k): decode(v) for k, v in inner}
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(decode, inner))


# ---- the keeper: sets up the layers, waits, cleans up

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
PR_SET_SECCOMP = 22
PIVOT_ROOT, CAPSET = {"x86_64": (155, 126), "aarch64": (41, 91)}.get(platform.machine(), (None, None))
# AUDIT_ARCH, clone, socket, and shmget, semget, msgget, ptrace, add_key, request_key, keyctl, unshare,
# perf_event_open, process_vm_readv, process_vm_writev, bpf, userfaultfd, io_uring_setup: memory that counts against no
# limit, the keys of whoever started us, and what most attacks on a kernel begin with
CALLS = {"x86_64": (0xC000003E, 56, 41, (29, 64, 68, 101, 248, 249, 250, 272, 298, 310, 311, 321, 323, 425)),
         "aarch64": (0xC00000B7, 220, 198, (194, 190, 186, 117, 217, 218, 219, 97, 241, 270, 271, 280, 282, 425))}


def system(function, *arguments):
    """A call into the C library, OSError where it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if (result := getattr(libc, function)(*arguments)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def mount(source, target, kind, flags, options=None):
    system("mount", *(None if text is None else os.fsencode(text) for text in (source, target, kind)), flags,
           options and options.encode())


def python_folders():
    """What Python needs: where it is installed, and the system's libraries; those that exist, none inside another."""
    paths = {sys.base_prefix, sys.base_exec_prefix, "/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    paths = sorted(path for path in paths if os.path.isdir(path))
    return [path for path in paths if not any(path.startswith(other.rstrip("/") + "/") for other in paths)]


def hide_files():
    """A new root: a tmpfs with Python and libraries bound into it, read-only, /dev/null and an empty /tmp as cwd."""
    system("unshare", CLONE_NEWNS)                         # here: pivot_root would also move the keeper
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = "/tmp"                                          # a place that exists everywhere; only this process sees it
    folders = {path: os.open(path, os.O_PATH) for path in python_folders()}
    devices = {path: os.open(path, os.O_PATH) for path in ("/dev/null", "/dev/urandom")}
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path, fd in {**folders, **devices}.items():        # through descriptors: /tmp may be on the way to them
        os.makedirs(root + (path if path in folders else os.path.dirname(path)), exist_ok=True)
        if path in devices:
            os.close(os.open(root + path, os.O_CREAT, 0o666))
        mount(f"/proc/self/fd/{fd}", root + path, None, MS_BIND)
        if path in folders:
            mount(None, root + path, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
        os.close(fd)
    os.mkdir(root + "/tmp")
    mount("tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,nr_inodes=1k,mode=1777")
    mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(root)
    system("syscall", PIVOT_ROOT, b".", b".")              # the old root now lies over the new one
    system("umount2", b".", 2)                             # MNT_DETACH
    os.chdir("/tmp")


def set_limits(resource, limits):
    for name, value in (("AS", limits["memory"]), ("CPU", limits["cpu"]), ("FSIZE", limits["file"]), ("CORE", 0),
                        ("NOFILE", limits["files"]), ("NPROC", limits["processes"])):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def landlock(workdir):
    """Read below Python's folders, write below `workdir` and to /dev/null; no TCP; no signals or sockets to outside.

    Kernel documentation, userspace-api/landlock.rst: ABI 1 files, 2 refer, 3 truncate, 4 TCP, 5 ioctl, 6 scopes.
    """
    abi = system("syscall", 444, None, 0, 1)
    if abi < 6:
        raise OSError(f"the kernel has version {abi}, 6 is needed")
    everything, read = (1 << 16) - 1, 1 | 4 | 8            # execute, read files, read folders
    ruleset = system("syscall", 444, struct.pack("QQQ", everything, 3, 3), 24, 0)
    allowed = [(path, read) for path in python_folders()] + [("/dev/urandom", 4), ("/dev/null", 2 | 4)]
    for path, rights in [*allowed, (workdir, everything & ~(1 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11))]:
        fd = os.open(path, os.O_PATH)                      # below workdir: all but execute and special files
        system("syscall", 445, ruleset, 1, struct.pack("=Qi", rights, fd), 0)
        os.close(fd)
    system("syscall", 446, ruleset, 0)
    os.close(ruleset)


def seccomp():
    """EPERM for CALLS, a user namespace, and sockets beside Unix's and IP's: AF_VSOCK, say, talks to the hypervisor.

    seccomp(2). clone3 hides its flags from the filter, so it does not exist (ENOSYS) and the C library takes clone.
    """
    arch, clone, socket, denied = CALLS.get(platform.machine(), (None,) * 4)
    if arch is None:
        raise OSError(f"its numbers of system calls on {platform.machine()} are not known here")
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    rules = [(load, 0, 0, 4), (equal, 1, 0, arch), (end, 0, 0, 1 << 31), (load, 0, 0, 0),
             (equal, 0, 1, 435), (end, 0, 0, 5 << 16 | 38), (at_least, len(denied) + 9, 0, 1 << 30)]   # x32
    rules += [(equal, len(denied) + 8 - i, 0, number) for i, number in enumerate(denied)]
    rules += [(equal, 0, 2, clone), (load, 0, 0, 16), (any_bit, 6, 5, CLONE_NEWUSER),                  # 16: argument 0
              (equal, 0, 4, socket), (load, 0, 0, 16), (equal, 2, 0, 1), (equal, 1, 0, 2), (equal, 0, 1, 10),
              (end, 0, 0, 0x7FFF0000), (end, 0, 0, 5 << 16 | 1)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    system("prctl", PR_SET_SECCOMP, 2, struct.pack("HP", len(rules), ctypes.addressof(code)), 0, 0)


def keeper():
    """Layers, then the program in a child, then the end of everything it started."""
    import resource  # not on Windows; and not once the files are out of reach

    requests, replies = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    start = json.loads(read_line(requests))
    missing, deny = {}, start["deny"]

    def layer(name, function, *arguments):
        try:
            if name in deny:
                raise OSError("denied")
            function(*arguments)
        except (OSError, AttributeError, TypeError) as e:  # AttributeError, TypeError: not a Linux, not this machine
            missing.setdefault(name, e.strerror if isinstance(e, OSError) and e.strerror else str(e))

    root = os.geteuid() == 0
    uid, gid = os.geteuid(), os.getegid()
    layer("limits", system, "prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans come to the keeper, to be killed
    layer("limits", system, "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)

    def map_self():
        system("unshare", CLONE_NEWUSER)
        for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{file}", "w") as f:
                f.write(text)

    if not root:                                           # what root may do, others may in a user namespace
        layer("user", map_self)
    layer("namespaces", system, "unshare", CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS)
    layer("network", system, "unshare", CLONE_NEWNET)
    workdir = tempfile.mkdtemp()                           # to work in where the program cannot have a root of its own
    child = os.fork()
    if child == 0:
        os.setsid()
        layer("files", hide_files)
        if "files" in missing:
            os.chmod(workdir, 0o1777)
            os.chdir(workdir)
        if root:
            layer("user", drop_root)
        layer("limits", set_limits, resource, start["limits"])
        layer("landlock", landlock, workdir if "files" in missing else "/tmp")
        layer("user", system, "syscall", CAPSET, struct.pack("=II", 0x20080522, 0), bytes(24))
        layer("limits", system, "prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
        layer("limits", system, "prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        layer("seccomp", seccomp)
        os.environ.clear()
        os.write(replies, json.dumps({"missing": missing}).encode() + b"\n")
        try:
            tests(start, requests, replies) if "test" in start else serve(start, requests, replies)
        finally:
            os._exit(0)
    os.close(replies)
    poll = select.poll()
    poll.register(requests, 0)                             # only its hang-up: the trusted side has closed, or died
    poll.register(os.pidfd_open(child), select.POLLIN)     # or the program has ended
    poll.poll()
    kill_all(child)
    shutil.rmtree(workdir, ignore_errors=True)
    os._exit(0)


def drop_root():
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    system("unshare", CLONE_NEWUSER)                       # so that the count of processes is this program's alone


def kill_all(child):
    """The first process of a PID namespace takes all others with it; without one, whoever is orphaned comes to us."""
    os.kill(child, signal.SIGKILL)
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as f:
                for pid in f.read().split():
                    os.kill(int(pid), signal.SIGKILL)
            os.waitpid(-1, 0)
        except ProcessLookupError:
            continue
        except ChildProcessError:
            return


# ---- inside

def read_line(fd):
    """A line, byte for byte through a descriptor: a buffer of Python's could take what is meant for the child."""
    line = b""
    while not line.endswith(b"\n"):
        if not (block := os.read(fd, 1 << 16)):
            os._exit(0)
        line += block
    return line


def serve(start, requests, replies):
    """Run the program, then answer calls of what it defines."""
    def reply(message):
        os.write(replies, json.dumps(message).encode() + b"\n")

    import io
    sys.stdin, sys.stdout = io.StringIO(), open(1, "w", closefd=False)
    sys.stderr = sys.stdout
    namespace = {"__name__": start["name"]}
    try:
        try:
            exec(compile(start["code"], "program.py", "exec"), namespace)
        except SystemExit as e:
            if e.code or start["name"] != "__main__":
                raise
        sys.stdout.flush()
        reply({"ready": True})
    except BaseException as e:
        sys.stdout.flush()
        reply({"error": f"{type(e).__name__}: {e}"[:500]})
    while start["name"] != "__main__":
        message = json.loads(read_line(requests))
        try:
            reply({"value": encode(namespace[message["call"]](*decode(message["arguments"])))})
        except BaseException as e:
            reply({"error": f"{type(e).__name__}: {e}"[:500]})


def tests(start, requests, replies):
    """HumanEval's check() with a candidate that lives elsewhere."""
    def candidate(*arguments):
        call = {"call": start["entry_point"], "arguments": encode(list(arguments))}
        os.write(replies, json.dumps(call).encode() + b"\n")
        answer = json.loads(read_line(requests))
        if "value" not in answer:
            raise RuntimeError(str(answer.get("error"))[:500])
        return decode(answer["value"])

    namespace = {"__name__": "tests"}
    try:
        exec(start["code"], namespace)                     # the prompt: tests use helpers that it defines
        exec(start["test"], namespace)
        namespace[start["entry_point"]] = candidate        # some tests call it by its name
        namespace["check"](candidate)
        verdict = "passed"
    except BaseException as e:
        verdict = f"failed: {type(e).__name__}: {e}"[:500]
    os.write(replies, json.dumps({"verdict": verdict}).encode() + b"\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        keeper()
    try:
        works, lacks = active()
        print("layers:", ", ".join(works), *(f"\nmissing: {layer} ({why})" for layer, why in lacks.items()))
        for program in sys.argv[1:]:
            with open(program, encoding="utf-8") as f:
                outcome = run(f.read())
            print(outcome.output + (f"error: {outcome.error}" if outcome.error else ""))
            sys.exit(not outcome.ok)
    except (OSError, SandboxError) as e:
        sys.exit(f"error: {e}")
