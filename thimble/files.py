"""Files that are either complete or not there, and errors that fit on one line.

    with files.replacing("runs/tiny/loss.png") as temporary:  # renamed once it is complete
        figure.savefig(temporary)
    files.write_atomic("runs/tiny/config.json", text)
    with files.locked("runs/tiny/lock"):                      # one process at a time
        train()
"""
import contextlib
import importlib
import json
import os
import shutil
import socket
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(ValueError):
    """A user's mistake. Its text is one line that names the thing, the reason and the remedy."""

    def __init__(self, text=""):
        lines = [line.strip() for line in str(text).splitlines()]
        super().__init__("; ".join(line for line in lines if line))


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def short(error, limit=500):
    """The message of a library's exception on one line of at most `limit` characters."""
    message = " ".join(str(error).split())
    return message[:limit] or type(error).__name__


def need(package, what):
    """Import an optional package. UserError with the command that installs it if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{what} needs the package {package}: pip install {package}") from None


def read_json(path, default=None):
    """The object in a JSON file; `default`, if there is one, where the file is missing. UserError if it is damaged."""
    path = Path(path)
    if default is not None and not path.is_file():
        return default
    try:
        if path.stat().st_size > 2**26:
            raise ValueError("it is over 64 MB")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read ({short(error, 100)}): download it again") from None
    return value


# ---- locking
@contextlib.contextmanager
def locked(path):
    """Hold the lock file `path` for the `with` block. UserError with the host and pid of the process that holds it, or
    if the path is a link.

    The kernel releases the lock however the process ends, so that of a dead process never has to be cleared: only the
    file stays. On NFS the server keeps it for all hosts, unless the mount has nolock or local_lock: then each host sees
    only its own processes. Without fcntl (Windows) there is no lock.
    """
    if fcntl is None:
        yield
        return
    if os.path.islink(path):  # a run from elsewhere could have it point to any file, which would lose its content
        raise UserError(f"{path} is a link, which a lock file never is: delete it")
    with open(path, "a+") as file:  # "a": opening must not erase what the holder wrote
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{Path(path).parent} is in use by {file.read().strip() or 'another process'}: wait until "
                            "it ends, stop it, or choose another folder") from None
        except OSError as error:  # a file system that has no locks
            warn(f"no lock on {path} ({short(error)}): start no second process in this folder")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


# ---- writing
def write_synced(path, data):
    """Write bytes and return once they are on disk. For files inside a folder that has a temporary name itself."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path, data):
    """Replace a file by `data` (text or bytes): at any moment a reader sees all of the old file or all of the new."""
    if isinstance(data, str):
        data = data.encode()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path):
    """A temporary path in the folder of `path`, to write a file to; it is renamed to `path` unless an error is raised.

    A folder may be written, too, where there is none yet. If `path` is a link, the link is replaced and what it
    points to stays as it is. The new file has the permissions of any new file (the umask), not those of the old one.
    """
    path = Path(path)
    # in the same folder, since a rename is atomic only within a file system;
    # the suffix stays last, since libraries choose a format by it
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    remove(temporary)  # left behind by a killed process with the same number
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        remove(temporary)  # only there if something went wrong


def replace_folder(temporary, final, trash):
    """Rename the folder `temporary`, whose files are synced, to `final`; what was there before becomes `trash`.

    A folder with files in it cannot be replaced in one step, so a kill between the two renames leaves no `final`, but
    the old one, complete, as `trash`: the caller has to look for it there, and to remove it otherwise. On an error the
    old one gets its name back and `temporary` is deleted.
    """
    moving = False
    try:
        sync_folder(temporary)
        if os.path.lexists(final):
            remove(trash)
            moving = True
            os.rename(final, trash)
        os.rename(temporary, final)
    except BaseException:
        # an interrupt can arrive right after a rename, so ask the disk how far we came
        if moving and not os.path.lexists(final):
            with contextlib.suppress(OSError):
                os.rename(trash, final)
        remove(temporary)
        raise
    sync_folder(final.parent)  # without it the rename is atomic but not durable


def sync(path):
    """Flush a file, or a folder with everything below it, to the disk."""
    if not path.is_dir():
        mode = "rb+" if os.name == "nt" else "rb"  # Windows syncs only what is open for writing
        with open(path, mode) as file:
            os.fsync(file.fileno())
        return
    for inside in path.iterdir():
        sync(inside)
    sync_folder(path)


def sync_folder(path):
    """Flush the names in a folder to the disk, which makes a rename in it durable."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path):
    """Delete a file, a folder or a link (never what it points to), as far as the system permits. Raises nothing."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        os.unlink(path)
