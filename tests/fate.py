"""A disk that fails, or a process that dies, at a chosen one of the calls that change the disk."""
import builtins
import os
import signal

from thimble import files


class Killed(BaseException):
    pass


class Fate:
    """Counts the calls that change the disk; at number `at`, `strike` happens instead (from then on if `lasting`).

    `strike` is Killed, an error number, or a signal that the process sends itself. A write counts once, in the middle:
    half of the data is in the file by then.
    """

    def __init__(self, monkeypatch, at=None, strike=Killed, lasting=True):
        self.at = at
        self.strike = strike
        self.lasting = lasting
        self.calls = []
        self.struck = False
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))
        monkeypatch.setattr(files, "open", self.open, raising=False)

    def wrap(self, name, call):
        def wrapped(*args, **options):
            what = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else " ".join(str(a) for a in args)
            self.count(name, what)
            return call(*args, **options)

        return wrapped

    def count(self, name, what):
        self.calls.append((name, what))
        now = len(self.calls) - 1
        if self.at is not None and (now == self.at or (self.lasting and now > self.at)):
            self.struck = True
            if self.strike is Killed:
                raise Killed
            if isinstance(self.strike, signal.Signals):
                os.kill(os.getpid(), self.strike)
                return
            raise OSError(self.strike, os.strerror(self.strike))

    def open(self, path, mode="r"):
        if "w" not in mode:
            return builtins.open(path, mode)
        self.count("open", path)
        file, fate = builtins.open(path, mode, buffering=0), self

        class Half:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                file.write(data[: len(data) // 2])
                fate.count("write", path)
                file.write(data[len(data) // 2 :])

            def __getattr__(self, name):
                return getattr(file, name)

        return Half()
