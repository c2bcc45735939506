"""Files are complete or not there, whatever happens and whenever: errors, kills, interrupts, full disks, links."""
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from fate import Fate, Killed

from thimble import files
from thimble.files import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- errors and warnings
def test_a_users_mistake_is_one_line(capsys):
    assert str(UserError("a:\n   b\n\n c ")) == "a:; b; c"
    assert str(UserError()) == ""
    assert isinstance(UserError("x"), ValueError)
    files.warn("x is y")
    assert capsys.readouterr().err == "warning: x is y\n"


def test_short_is_one_line_and_never_empty():
    assert files.short(ValueError("a\n  b")) == "a b"
    assert files.short(ValueError("x" * 900)) == "x" * 500
    assert files.short(ValueError("abc"), 2) == "ab"
    assert files.short(KeyError()) == "KeyError"


def test_need_says_how_to_install():
    assert files.need("json", "this").loads("1") == 1
    with pytest.raises(UserError, match="the plot needs the package no_such_thing: pip install no_such_thing"):
        files.need("no_such_thing", "the plot")


# ---- one file
def test_write_atomic_takes_text_and_bytes(tmp_path):
    files.write_atomic(tmp_path / "a.json", "é\n")
    assert (tmp_path / "a.json").read_bytes() == "é\n".encode()
    files.write_atomic(str(tmp_path / "a.json"), b"\0\xff")
    assert (tmp_path / "a.json").read_bytes() == b"\0\xff"
    assert names(tmp_path) == ["a.json"]


def test_the_temporary_is_hidden_in_the_same_folder_and_keeps_the_suffix(tmp_path):
    with files.replacing(tmp_path / "loss.png") as temporary:
        assert temporary == tmp_path / f".loss.tmp-{os.getpid()}.png"
        temporary.write_bytes(b"1")
    with files.replacing(tmp_path / "latest") as temporary:
        assert temporary == tmp_path / f".latest.tmp-{os.getpid()}"
        temporary.write_bytes(b"2")
    assert names(tmp_path) == ["latest", "loss.png"]


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("strike, lasting", [
    (Killed, True), (errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, False), (errno.ENOSPC, True),
    (errno.EACCES, True),
])
def test_one_file_is_old_or_new_whatever_fails(tmp_path, exists, strike, lasting):
    old, new = "old" * 9, "new" * 1000
    fates = 0
    while True:
        folder = tmp_path / str(fates)
        folder.mkdir()
        if exists:
            (folder / "a.json").write_text(old)
        with pytest.MonkeyPatch.context() as patch:
            fate = Fate(patch, fates, strike, lasting)
            try:
                files.write_atomic(folder / "a.json", new)
                done = True
            except (Killed, OSError):
                assert fate.struck
                done = False
        if not fate.struck:
            break
        fates += 1
        found = (folder / "a.json").read_text() if (folder / "a.json").exists() else None
        assert found == new if done else found in (old if exists else None, new)
        if strike != Killed and not lasting:
            assert set(names(folder)) <= {"a.json"}
        # whatever was left does not stand in the way of the next one
        files.write_atomic(folder / "a.json", "later")
        assert (folder / "a.json").read_text() == "later" and names(folder) == ["a.json"]
    assert fates >= 6                                      # unlink, open, write, fsync, replace, fsync of the folder


def test_an_error_or_an_interrupt_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), files.replacing(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise error
        assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]
    with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "a"):
        pass                                               # nothing was written: the old one must not vanish
    assert (tmp_path / "a").read_text() == "old"


WRITER = """
import resource, sys
from thimble import files
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
files.write_atomic(sys.argv[1], b"new" * 100_000)
"""


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    """A real error in the middle of a write, by the limit of a file's size: it arrives after a part was written."""
    (tmp_path / "a").write_text("old")
    done = subprocess.run([sys.executable, "-c", WRITER, tmp_path / "a"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and f"[Errno {errno.EFBIG}]" in done.stderr
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_a_reader_never_sees_half_a_file_while_the_writer_is_killed(tmp_path):
    path = tmp_path / "a"
    files.write_atomic(path, b"\0" * 300_000)
    for _ in range(10):
        child = os.fork()
        if child == 0:
            while True:
                for value in range(256):
                    files.write_atomic(path, bytes([value]) * 300_000)
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            data = path.read_bytes()
            assert len(data) == 300_000 and len(set(data)) == 1
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        data = path.read_bytes()
        assert len(data) == 300_000 and len(set(data)) == 1


def test_permissions_are_those_of_a_new_file(tmp_path):
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try:
            files.write_atomic(tmp_path / "a", "x")
        finally:
            os.umask(before)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_link_is_replaced_and_never_written_through(tmp_path):
    (tmp_path / "target").write_text("kept")
    (tmp_path / "a").symlink_to(tmp_path / "target")
    files.write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and not (tmp_path / "a").is_symlink()
    # a link in the way of the temporary is not followed either
    (tmp_path / f".a.tmp-{os.getpid()}").symlink_to(tmp_path / "target")
    files.write_atomic(tmp_path / "a", "newer")
    assert (tmp_path / "target").read_text() == "kept" and names(tmp_path) == ["a", "target"]
    # a folder reached by a link is that folder
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    files.write_atomic(tmp_path / "link/a", "inside")
    assert (tmp_path / "folder/a").read_text() == "inside" and (tmp_path / "link").is_symlink()


def test_places_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        files.write_atomic(tmp_path / "nowhere/a", "x")
    assert "nowhere" in caught.value.filename
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        files.write_atomic(tmp_path / "folder", "a file cannot take the place of a folder")
    assert names(tmp_path) == ["folder"]


# ---- folders
def test_a_folder_may_be_written_where_there_is_none(tmp_path):
    with files.replacing(tmp_path / "export") as temporary:
        (temporary / "inside").mkdir(parents=True)
        (temporary / "inside/a").write_text("x")
        (temporary / "inside/a").chmod(0o444)
    assert (tmp_path / "export/inside/a").read_text() == "x" and names(tmp_path) == ["export"]
    with pytest.raises(OSError), files.replacing(tmp_path / "export") as temporary:
        temporary.mkdir()
    assert (tmp_path / "export/inside/a").read_text() == "x" and names(tmp_path) == ["export"]


def test_sync_flushes_every_file_and_folder_and_the_files_first(tmp_path, monkeypatch):
    (tmp_path / "x/y").mkdir(parents=True)
    for name in ("a", "x/b", "x/y/c"):
        (tmp_path / name).write_text(name)
    fate = Fate(monkeypatch)
    files.sync(tmp_path)
    flushed = [what for _, what in fate.calls]
    everything = [tmp_path, *tmp_path.rglob("*")]
    assert sorted(flushed) == sorted(str(path) for path in everything)
    for path in everything[1:]:
        assert flushed.index(str(path)) < flushed.index(str(path.parent))


def make(folder, text):
    folder.mkdir()
    for name in ("a", "b"):
        files.write_synced(folder / name, text.encode())


def whole(folder, text):
    if not folder.is_dir() or names(folder) != ["a", "b"]:
        return False
    return all((folder / name).read_text() == text for name in ("a", "b"))


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("strike, lasting", [
    (Killed, True), (errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, False), (errno.EACCES, True),
])
def test_one_folder_is_old_or_new_whatever_fails(tmp_path, exists, strike, lasting):
    fates = 0
    while True:
        here = tmp_path / str(fates)
        here.mkdir()
        final, temporary, trash = here / "final", here / "temporary", here / "trash"
        make(temporary, "new")
        if exists:
            make(final, "old")
            make(trash, "older")
        with pytest.MonkeyPatch.context() as patch:
            fate = Fate(patch, fates, strike, lasting)
            try:
                files.replace_folder(temporary, final, trash)
                done = True
            except (Killed, OSError):
                assert fate.struck
                done = False
        if not fate.struck:
            break
        fates += 1
        if done:
            assert whole(final, "new")
        elif not lasting:
            # the name has the old one again, unless only the last flush failed
            assert whole(final, "new") or whole(final, "old") == exists == final.exists()
            assert not temporary.exists()
        elif exists:
            # a kill between the renames leaves no `final`: then the old one is in the trash
            assert whole(final, "old") or whole(trash, "old") and (whole(final, "new") or not final.exists())
        else:
            assert whole(final, "new") or not final.exists()
    assert fates >= (6 if exists else 3)


@pytest.mark.parametrize("after", ["final", "temporary"])
def test_an_interrupt_right_after_a_rename_loses_nothing(tmp_path, monkeypatch, after):
    final, temporary, trash = tmp_path / "final", tmp_path / "temporary", tmp_path / "trash"
    make(final, "old")
    make(temporary, "new")
    rename = os.rename

    def interrupted(source, target):
        rename(source, target)
        if source == tmp_path / after:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.replace_folder(temporary, final, trash)
    if after == "final":
        assert whole(final, "old") and names(tmp_path) == ["final"]
    else:
        assert whole(final, "new") and whole(trash, "old") and names(tmp_path) == ["final", "trash"]


def test_a_file_or_a_link_in_the_place_of_a_folder_moves_to_the_trash(tmp_path):
    final, temporary, trash = tmp_path / "final", tmp_path / "temporary", tmp_path / "trash"
    final.write_text("a file")
    make(temporary, "new")
    files.replace_folder(temporary, final, trash)
    assert whole(final, "new") and trash.read_text() == "a file"
    make(tmp_path / "target", "kept")
    files.remove(final)
    final.symlink_to("target")
    make(temporary, "newer")
    files.replace_folder(temporary, final, trash)
    assert whole(final, "newer") and not final.is_symlink() and trash.is_symlink()
    files.remove(trash)
    assert whole(tmp_path / "target", "kept") and names(tmp_path) == ["final", "target"]


# ---- removing
def test_remove_takes_anything_and_raises_nothing(tmp_path, monkeypatch):
    make(tmp_path / "target", "kept")
    (tmp_path / "file").write_text("x")
    make(tmp_path / "folder", "x")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "folder", "link", "dangling", "missing", "missing/below"):
        files.remove(tmp_path / name)
    assert names(tmp_path) == ["target"] and whole(tmp_path / "target", "kept")

    def denied(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    for name in ("unlink", "rmdir"):
        monkeypatch.setattr(os, name, denied)
    files.remove(tmp_path / "target/a")
    files.remove(tmp_path / "target")
    assert whole(tmp_path / "target", "kept")


# ---- locks
HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from thimble import files
with files.locked(sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(ROOT), str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(files.UserError, match=f"in use by process {holder.pid} on {socket.gethostname()}: "):
        with files.locked(lock):
            pass
    holder.kill()
    holder.communicate()  # closes the pipe, too
    assert str(holder.pid) in lock.read_text()  # the file stays, the lock does not
    with files.locked(lock):
        assert lock.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
