"""Files that are whole or not there, and the one line in which a user's mistake ends.

    with files.replacing("runs/tiny/loss.png") as temporary:    # renamed once it is complete
        figure.savefig(temporary)
    files.write_atomic("runs/tiny/config.json", text)
"""
import contextlib
import importlib
import os
import shutil
import sys
from pathlib import Path


class UserError(ValueError):
    """A user's mistake. Its text is one line that names the thing, the reason and the way out."""

    def __init__(self, text=""):
        super().__init__("; ".join(line.strip() for line in str(text).splitlines() if line.strip()))


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def short(error, limit=500):
    """What a library's exception says, in one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def need(package, what):
    """The optional package, imported; UserError with how to install it where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{what} needs the package {package}: pip install {package}") from None


# ---- writing

def write_synced(path, data):
    """Write bytes that are on disk when this returns. For files inside a folder that is still temporary."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path, data):
    """Write text or bytes under a temporary name, sync, rename: a reader sees the old file or the new one."""
    if isinstance(data, str):
        data = data.encode()
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path`, to write a file or a folder to, which is renamed to `path` if all went well."""
    path = Path(path)
    # the suffix stays last: libraries choose a format by it
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        remove(temporary)                                  # gone already, unless something went wrong


def replace_folder(temporary, final, trash):
    """Rename a complete folder to `final`, by way of `trash` if there is one: a kill leaves one or the other whole."""
    moved = False
    try:
        sync_folder(temporary)
        if os.path.lexists(final):                         # a folder that is not empty cannot be replaced in one go
            remove(trash)
            os.rename(final, trash)
            moved = True
        os.rename(temporary, final)
    except BaseException:
        if moved:
            os.rename(trash, final)
        remove(temporary)
        raise
    sync_folder(final.parent)                              # without it the rename is atomic but not durable


def sync(path):
    """Flush a file, or every file below a folder, to the disk."""
    inside = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    for name in inside:
        with open(name, "rb+") as file:
            os.fsync(file.fileno())


def sync_folder(path):
    if os.name == "nt":                                    # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path):
    """Delete a file, a folder or a link (never what it points to), as far as the system lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
