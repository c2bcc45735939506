"""Runs Python that nobody has read: generated programs, and functions against tests that they cannot reach.

    python tasks/sandbox.py                 # says which layers this machine has
    python tasks/sandbox.py program.py      # runs a file and prints what it printed

    >>> sandbox.run("print('hello')").output
    >>> sandbox.grade(prompt, completion, test, entry_point)        # (passed, reason)

A worker is two processes. The keeper sets the layers up, waits, and ends everything that is left. Below it, the program
runs in a process group and a PID namespace of its own, as nobody, with limits on time, memory, files and processes, no
network, an empty environment, and a file system that holds Python, the system's libraries and an empty /tmp of 16 MB.
Landlock guards files, network and signals a second time; seccomp refuses what the other layers leave open. Where a
layer is missing, the sandbox refuses to run unless that layer is waived; outside Linux there are no layers, and it
refuses.

Tests run in a second worker. Only calls and values of plain built-in types pass between the two, as JSON lines, so what
a program does to its own process (exit, builtins, frames, ==) cannot turn a wrong answer into a right one.

tasks/worker.py is what runs inside; this file is the side that is trusted.
"""
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tasks.worker import BLOCK, ERROR_LIMIT, decode, encode

LAYERS = ("user", "namespaces", "network", "files", "landlock", "seccomp", "limits")
OUTPUT_LIMIT = 1 << 16  # bytes of output that are read
# of one call's value, where it becomes a value of ours. It bounds the time, too: dict keys and set elements that are
# made to collide take quadratic time, 2.6 s for the 24,000 that fit a message, 0.1 s at most for what fits here
VALUE_LIMIT = 1 << 16
MESSAGE_LIMIT = 1 << 20  # bytes of one call or answer
PATIENCE = 60  # seconds that a worker may take to start, and to end


class SandboxError(ValueError):
    """The machine lacks a layer that was not waived."""


@dataclasses.dataclass(frozen=True)
class Limits:
    seconds: float = 60.0                                  # wall clock; long, or a busy machine would change scores
    cpu: int = 5                                           # seconds of each process
    memory: int = 1 << 30                                  # bytes of all processes together
    processes: int = 8                                     # with threads
    file: int = 1 << 20                                    # bytes of each file, and of the output
    files: int = 64                                        # open at a time


@dataclasses.dataclass(frozen=True)
class Result:
    ok: bool                                               # the program ended without an exception
    output: str                                            # of stdout and stderr together
    error: str                                             # the exception, or how the program ended; empty if ok
    seconds: float


# ---- the trusted side
class Worker:
    """A sandboxed process. `start` is the first message to it: the code to run, and how.

    The two exchange JSON lines, by `send` and `receive`. `deny` are layers to treat as missing, for tests. SandboxError
    if a layer is missing and not in `waive`.
    """

    def __init__(self, start, limits=None, waive=(), deny=()):
        if sys.platform != "linux":
            raise SandboxError("the sandbox needs Linux: use a Linux machine, or a virtual one")
        self.limits = limits or Limits()
        self.end = time.monotonic() + PATIENCE  # of the worker's life
        self.buffer = b""  # received, but not yet returned
        self.output = tempfile.TemporaryFile()  # its size has a limit; a pipe would have to be drained
        # The worker writes through a description of its own: the flags of one that is shared, such as O_DIRECT, would
        # be ours as well, and our reading would fail.
        out = os.open(f"/proc/self/fd/{self.output.fileno()}", os.O_WRONLY | os.O_APPEND)
        # Not -I: it ignores PYTHONHASHSEED, so that the hash of strings and the order of sets would differ between runs
        flags = ["-s", "-S", "-P", "-B", "-X", "utf8"]
        # imported, not executed as a file, which Python would compile anew each time; then only the standard library
        # is left on sys.path
        begin = "import sys; sys.path.append(sys.argv[1]); import worker; sys.path.pop(); worker.keeper()"
        try:
            self.process = subprocess.Popen(
                [os.path.realpath(sys.executable), *flags, "-c", begin, os.path.dirname(os.path.abspath(__file__))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, bufsize=0,
                cwd="/", env={"PYTHONHASHSEED": "0"}, start_new_session=True)
        finally:
            os.close(out)
        try:
            self.send({**start, "limits": dataclasses.asdict(self.limits), "deny": list(deny)})
            hello = self.receive()
            if not hello:
                raise SandboxError(f"the sandbox did not start: {self.printed().strip()[-ERROR_LIMIT:]}")
            hello = json.loads(hello)
            self.missing = hello["missing"]  # {layer: why}
            self.memory = hello["memory"]  # how much it may have, and who sees to it
            lacking = [f"{layer} ({why})" for layer, why in self.missing.items() if layer not in waive]
            if lacking:
                raise SandboxError(f"this machine lacks layers of the sandbox: {', '.join(lacking)}: use another "
                                   f"machine, or waive {','.join(self.missing)} if you trust what is run")
            self.end = time.monotonic() + self.limits.seconds  # the program begins
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def left(self):
        """Seconds that the worker may still live."""
        return self.end - time.monotonic()

    def send(self, message):
        """Send a dict, or a line as it was received. Never waits longer than the worker has to live."""
        line = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
        fd = self.process.stdin.fileno()
        os.set_blocking(fd, False)
        try:
            while line:
                _, writable, _ = select.select([], [fd], [], max(0, self.left()))
                if not writable:  # out of time; receive will say so
                    return
                line = line[os.write(fd, line):]
        except BrokenPipeError:  # the worker has ended; receive will say so
            pass

    def receive(self):
        """The next line, or None when the process has ended, ran out of time, or sends too much."""
        fd = self.process.stdout.fileno()
        while b"\n" not in self.buffer:
            if len(self.buffer) > MESSAGE_LIMIT:
                return None
            readable, _, _ = select.select([fd], [], [], max(0, self.left()))
            if not readable:
                return None
            block = os.read(fd, BLOCK)
            if not block:
                return None
            self.buffer += block
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line + b"\n"

    def close(self):
        """End all its processes and wait until the last is gone. Safe to call twice."""
        self.process.stdin.close()  # the keeper notices, kills, and ends last
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:  # the keeper itself is stuck
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()
        self.output.close()

    def printed(self):
        """The beginning of its output."""
        self.output.seek(0)
        return self.output.read(OUTPUT_LIMIT).decode("utf-8", "replace")

    def how_it_ended(self):
        return "out of time" if self.left() <= 0 else "the process ended early"

    def complaint(self, line):
        """The error in a first answer, "" if there is none. Who wrote the line cannot be trusted with any shape."""
        if not line:
            return self.how_it_ended()
        if len(line) > VALUE_LIMIT:
            return "the answer is too long"
        try:
            return str(json.loads(line).get("error", ""))[:ERROR_LIMIT]
        except (ValueError, AttributeError, RecursionError):
            return "the answer is garbled"


def run(code, limits=None, waive=(), deny=()):
    """Run a program -> Result."""
    with Worker({"code": code, "name": "__main__"}, limits, waive, deny) as worker:
        line = worker.receive()
        seconds = worker.limits.seconds - worker.left()
        error = worker.complaint(line)
        return Result(not error, worker.printed(), error, seconds)


def call(code, name, *arguments, limits=None, waive=()):
    """name(*arguments) as `code` defines it -> (value, ""), or (None, what went wrong)."""
    with Worker({"code": code, "name": "candidate"}, limits, waive) as worker:
        error = worker.complaint(worker.receive())
        if error:
            return None, error
        worker.send({"call": name, "arguments": encode(list(arguments))})
        line = worker.receive()
        if line and len(line) > VALUE_LIMIT:
            return None, worker.complaint(line)
        try:
            return decode(json.loads(line or b"null")["value"]), ""
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return None, worker.complaint(line) or "the answer is garbled"


def grade(prompt, completion, test, entry_point, limits=None, waive=()):
    """Does prompt + completion pass HumanEval's check()? -> (passed, reason).

    `test` and `prompt` run in a worker of their own, which sees no more of the candidate than its answers to calls.
    """
    with (Worker({"code": prompt + completion, "name": "candidate"}, limits, waive) as candidate,
          Worker({"code": prompt, "test": test, "entry_point": entry_point}, limits, waive) as tests):
        error = candidate.complaint(candidate.receive())
        if error:
            return False, error
        while True:
            line = tests.receive()
            if not line:
                return False, tests.how_it_ended()
            try:
                message = json.loads(line)  # by our own code, in a process that runs only the tests
            except (ValueError, RecursionError):  # but the values in it may be the candidate's: too deep
                return False, "the answer is garbled"
            if "verdict" in message:
                return message["verdict"] == "passed", message["verdict"]
            candidate.send(line)
            answer = candidate.receive()
            if not answer:
                return False, candidate.how_it_ended()
            tests.send(answer)


def active(waive=LAYERS, deny=()):
    """(layers that work here, {missing layer: why})."""
    with Worker({"code": "", "name": "probe"}, waive=waive, deny=deny) as worker:
        return [layer for layer in LAYERS if layer not in worker.missing], worker.missing


# ---- the command
def main(arguments):
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip())
        return
    if len(arguments) > 1 or arguments and arguments[0].startswith("-"):
        sys.exit(f"error: {' '.join(arguments)}: give one program to run, or none; see --help")
    try:
        with Worker({"code": "", "name": "probe"}, waive=LAYERS) as worker:
            print("layers:", ", ".join(layer for layer in LAYERS if layer not in worker.missing))
            for layer, why in worker.missing.items():
                print(f"missing: {layer} ({why})")
            print("memory:", worker.memory)
        for program in arguments:  # one or none
            with open(program, encoding="utf-8") as f:
                result = run(f.read())
            print(result.output, end="")
            if result.error:
                sys.exit(f"error: {result.error}")
    except (OSError, SandboxError, UnicodeDecodeError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main(sys.argv[1:])
