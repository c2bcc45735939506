"""Checkpoints survive kills, full disks and damage: what was whole before stays whole, what is broken is named.

SIGKILL never loses the page cache, so durability against power loss rests on test_order_of_calls alone.
"""
import contextlib
import ctypes
import errno
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fate import Fate, Killed

from thimble import checkpoint
from thimble.files import UserError


def state(step):
    return {"w": torch.full((100, 30), float(step)), "b": torch.arange(7) + step}


def put(run, step, **options):
    return checkpoint.save(run, step, state(step), {"m": torch.full((50,), float(step))}, {"note": "x"}, **options)


def check(loaded):
    """A loaded checkpoint is of one piece: every tensor is the one of its step."""
    step = loaded.meta["step"]
    assert loaded.model.keys() == {"w", "b"}
    assert all(torch.equal(loaded.model[key], value) for key, value in state(step).items())
    return step


def steps(run):
    return sorted(int(path.name[5:]) for path in Path(run).glob("step_*"))


def hidden(run):
    return [path.name for path in Path(run).iterdir() if path.name.startswith(".")]


def forge(folder, name, data):
    """Replace a file and make the manifest agree, as one who means harm would."""
    (folder / name).write_bytes(data)
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    del meta["sha256"]
    (folder / "meta.json").write_text(json.dumps(meta))


def edit(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    meta |= changes
    del meta["sha256"]
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if v != "DELETE"}))


def refused(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- round trip
def test_round_trip_bits(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "plain": torch.randn(4, 5),
        "bf16": torch.randn(9).bfloat16(),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(4, 5).t(),
        "slice": torch.randn(10)[::3],
        "nan": torch.tensor([float("nan"), -0.0]),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "bool": torch.tensor([True, False]),
        "grad": torch.nn.Parameter(torch.ones(2)),
    }
    tensors["tied"] = tensors["plain"]
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    meta = {"loss": 0.1 + 0.2, "nested": {"é": [1, None, "\n"]}, "betas": (0.9, 0.95)}
    path = checkpoint.save(tmp_path / "a/run", 7, tensors, tensors, meta, tokenizer=tokenizer, best=True)
    assert path == tmp_path / "a/run/step_000007"
    assert sorted(os.listdir(path)) == ["meta.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"]
    loaded = checkpoint.load(path, optimizer=True)
    for found in (loaded.model, loaded.optimizer):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            ours, theirs = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
            assert torch.equal(ours, theirs)
    assert loaded.meta["loss"] == 0.1 + 0.2 and loaded.meta["nested"] == {"é": [1, None, "\n"]}
    assert loaded.meta["betas"] == [0.9, 0.95] and loaded.meta["step"] == 7 and loaded.meta["format_version"] == 1
    assert (tmp_path / "a/run/latest").read_text() == (tmp_path / "a/run/best").read_text() == "step_000007"
    from safetensors import safe_open

    with safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_sampling_does_not_read_the_moments(tmp_path):
    path = put(tmp_path, 1)
    size = (path / "optimizer.safetensors").stat().st_size
    (path / "optimizer.safetensors").write_bytes(bytes(size))
    assert checkpoint.load(path).optimizer is None
    assert "optimizer.safetensors" in refused(checkpoint.load, path, optimizer=True)
    path = checkpoint.save(tmp_path, 2, state(2), None, {})
    assert check(checkpoint.load(path)) == 2
    assert "--init_from" in refused(checkpoint.load, path, optimizer=True)


def test_nan_in_meta_is_never_written(tmp_path):
    with pytest.raises(ValueError):
        checkpoint.save(tmp_path, 1, state(1), None, {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_save_over_its_own_source(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    path = put(tmp_path / "run", 3, tokenizer=tmp_path / "t.json")
    loaded = checkpoint.load(path, optimizer=True)
    checkpoint.save(tmp_path / "run", 3, loaded.model, loaded.optimizer, {}, tokenizer=path / "tokenizer.json")
    assert check(checkpoint.load(path)) == 3 and (path / "tokenizer.json").read_text() == "{}"
    assert not hidden(tmp_path / "run")


def test_load_takes_a_folder_a_run_or_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "train" in refused(checkpoint.load)
    put("runs/a", 1, best=True)
    put("runs/a", 2)
    put("runs/b", 9)
    os.utime("runs/b/latest", (1, 1))
    assert checkpoint.newest_run() == Path("runs/a")
    assert check(checkpoint.load()) == 2 and check(checkpoint.load(which="best")) == 1
    assert check(checkpoint.load("runs/b")) == 9 and check(checkpoint.load("runs/a/step_000001")) == 1
    assert "runs/c" in refused(checkpoint.load, "runs/c")
    assert "step_000005" in refused(checkpoint.load, "runs/a/step_000005")
    assert "'newest'" in refused(checkpoint.load, "runs/a", "newest")
    os.makedirs("runs/empty")
    assert "python train.py" in refused(checkpoint.load, "runs/empty")
    assert "python train.py" in refused(checkpoint.load_run, "runs/empty")
    assert "'newest'" in refused(checkpoint.load_run, "runs/a", "newest")
    os.symlink(tmp_path / "runs/a/step_000001", "elsewhere")
    assert check(checkpoint.load("elsewhere")) == 1


def test_umask(tmp_path):
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try:
            path = put(tmp_path / oct(umask), 1, best=True)
        finally:
            os.umask(before)
        for file in [*path.iterdir(), path.parent / "latest", path.parent / "best"]:
            assert file.stat().st_mode & 0o777 == 0o666 & ~umask
        assert path.stat().st_mode & 0o777 == 0o777 & ~umask


# ---- dying
def test_sigkill_at_random_times(tmp_path):
    clock, run = random.Random(0), tmp_path / "run"
    newest = 0
    for _ in range(15):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            step = newest
            while True:
                step += 1
                put(run, step, keep_last=2, best=step % 5 == 0)
        until = time.monotonic() + 30
        while not ((run / "latest").exists() and int((run / "latest").read_text()[5:]) > newest):
            assert time.monotonic() < until
            time.sleep(0.001)
        time.sleep(clock.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        named = int((run / "latest").read_text()[5:])
        assert named > newest
        newest = check(checkpoint.load_run(run, optimizer=True))
        assert newest == named
        if (run / "best").exists():
            best = checkpoint.load_run(run, "best")
            assert check(best) % 5 == 0 and best.path.name == (run / "best").read_text()
    put(run, newest + 1)
    assert not hidden(run)


def three(run):
    for step in (1, 2, 3):
        put(run, step, keep_last=2, best=step == 1)
    return 3, lambda run: put(run, 4, keep_last=2, best=True)


def again(run):  # the only checkpoint is written once more
    put(run, 1, keep_last=1, best=True)
    return 1, lambda run: put(run, 1, keep_last=1, best=True)


def earlier_life(run):
    for step in (1, 2, 3):
        put(run, step, best=step == 3)
    (run / "latest").write_text("step_000001")
    return 1, lambda run: put(run, 2, keep_last=1)


def first(run):
    return None, lambda run: put(run, 1)


@pytest.mark.parametrize("scene", [three, again, earlier_life, first])
@pytest.mark.parametrize("strike,lasting", [
    pytest.param(Killed, True, marks=pytest.mark.score("A2")),
    pytest.param(errno.EIO, False, marks=pytest.mark.score("A9")), (errno.EIO, True),
    pytest.param(errno.ENOSPC, False, marks=pytest.mark.score("A9")),
    pytest.param(errno.ENOSPC, True, marks=pytest.mark.score("A9")), (errno.EACCES, True),
])
def test_die_at_every_system_call(tmp_path, capsys, score, scene, strike, lasting):
    fates = 0
    built = tmp_path / "built"
    before, save = scene(built)
    while True:
        run = tmp_path / str(fates)
        if built.exists():
            shutil.copytree(built, run)  # to build it anew, with its syncs, takes longer than the rest
        with pytest.MonkeyPatch.context() as patch:
            fate = Fate(patch, fates, strike, lasting)
            try:
                after = int(save(run).name[5:])
            except (Killed, UserError) as error:
                assert fate.struck and "\n" not in str(error)
                after = None
                if strike == errno.ENOSPC:
                    assert re.search(r"disk full: [\d,]+ bytes needed, [\d,]+ free", str(error))
        if not fate.struck:
            break
        fates += 1
        if strike != Killed and not lasting:
            assert not list(run.glob(".step*"))  # no temporary folder is left where it could be removed
        if (strike, lasting) == (errno.EIO, False):
            assert after is not None, "one transient error must not stop a run"
        if before or after:
            step = check(checkpoint.load_run(run, optimizer=True))
            assert step == after if after else step in (before, int((run / "latest").read_text()[5:]))
            for which in ("latest", "best"):
                if (run / which).exists():
                    check(checkpoint.load_run(run, which))
                    if not lasting:  # else the end may fall between the two renames of `again`
                        assert (run / (run / which).read_text()).is_dir()
        if strike == Killed:
            scene_best = (run / "best").exists() and (run / "best").read_text()
            put(run, 9)
            assert check(checkpoint.load_run(run)) == 9 and not hidden(run)
            assert not scene_best or scene is again or (run / scene_best).is_dir()
        shutil.rmtree(run, ignore_errors=True)
    score(fates, fates)
    assert fates > 20
    capsys.readouterr()


@pytest.mark.score("A3")
def test_order_of_calls(tmp_path, count, score):
    n = count(2, 10)
    put(tmp_path, 0)
    for step in range(1, n + 1):
        with pytest.MonkeyPatch.context() as patch:
            fate = Fate(patch)
            put(tmp_path, step, best=True, keep_last=1)
        calls = [call for call in fate.calls if call[0] in ("fsync", "rename", "replace")]
        temp, final = str(tmp_path / f".step_{step:06d}.tmp"), str(tmp_path / f"step_{step:06d}")
        files = [("fsync", f"{temp}/{name}") for name in ("model.safetensors", "optimizer.safetensors", "meta.json")]
        pointers = []
        for which in ("best", "latest"):
            pointer, pointer_temp = tmp_path / which, tmp_path / f".{which}.tmp-{os.getpid()}"
            pointers += [("fsync", str(pointer_temp)), ("replace", f"{pointer_temp} {pointer}")]
            pointers += [("fsync", str(tmp_path))]
        expected = files + [("fsync", temp), ("rename", f"{temp} {final}"), ("fsync", str(tmp_path))] + pointers
        assert calls[: len(expected)] == expected
        old = f"step_{step - 1:06d}"
        assert calls[len(expected) :] == [("rename", f"{tmp_path}/{old} {tmp_path}/.trash-{old}")]
    score(n, n)


# ---- damage
def flip(path, at):
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def to_link(path):
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def to_folder(path):
    path.unlink()
    path.mkdir()


def to_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "flip first": lambda path: flip(path, 0),
    "flip middle": lambda path: flip(path, 0.5),
    "flip last": lambda path: flip(path, 1),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one more": lambda path: path.write_bytes(path.read_bytes() + b"\1"),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "404": lambda path: path.write_bytes(b"404: Not Found"),
    "deleted": Path.unlink,
    "folder": to_folder,
    "link": to_link,
    "pipe": to_pipe,
}


@pytest.mark.score("A11")
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "meta.json", "tokenizer.json"])
def test_damage_is_named_and_the_previous_one_used(tmp_path, capsys, score, name):
    (tmp_path / "t.json").write_text('{"a": 1}')
    for way, damage in DAMAGE.items():
        run = tmp_path / way
        put(run, 1, tokenizer=tmp_path / "t.json")
        newest = put(run, 2, tokenizer=tmp_path / "t.json", best=True)
        damage(newest / name)
        message = refused(checkpoint.load, newest, optimizer=True)
        assert str(newest / name) in message and "; " in message
        for which in ("latest", "best"):
            assert check(checkpoint.load_run(run, which, optimizer=True)) == 1, way
        warnings = capsys.readouterr().err.splitlines()
        assert all(line.startswith("warning: ") for line in warnings) and str(newest / name) in warnings[0]
        damage(run / "step_000001" / name)
        message = refused(checkpoint.load_run, run, optimizer=True)
        assert "no checkpoint in" in message and "step_000001" in message and "step_000002" in message
        capsys.readouterr()
    score(len(DAMAGE), len(DAMAGE))


def test_every_bit_of_meta_counts(tmp_path):
    path = put(tmp_path, 1, tokenizer=None)
    good, original = (path / "meta.json").read_bytes(), checkpoint.load(path).meta
    for bit in random.Random(1).sample(range(len(good) * 8), 400):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        (path / "meta.json").write_bytes(bad)
        try:
            meta = checkpoint.load(path).meta
        except UserError:
            continue
        assert {k: v for k, v in meta.items() if k in original} == original  # only the name of the hash itself was hit


META = [
    "", "{", "[]", "null", "3", '"x"', '{"a": NaN}', '{"a": -Infinity}', "[" * 100_000,
    b"\xff\xfe", "9" * 10_000, '{"files": {}}', '{"a": 1e999}',
]
MANIFEST = [
    {"format_version": 2}, {"format_version": "1"}, {"format_version": True}, {"format_version": "DELETE"},
    {"format_version": 0}, {"step": "DELETE"}, {"step": "6"}, {"step": -1}, {"step": 1e308}, {"step": True},
    {"files": "DELETE"}, {"files": []},
    {"files": {}}, {"files": {"model.safetensors": 3}}, {"files": {"model.safetensors": {"size": "1", "sha256": "0"}}},
    {"files": {"model.safetensors": {"size": 1}}},
]
NAMES = ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\nb", "C:\\x", "x" * 300]


def test_meta_of_every_wrong_kind(tmp_path):
    path = put(tmp_path, 1)
    for text in META:
        (path / "meta.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        assert "meta.json" in refused(checkpoint.load, path)
    for change in MANIFEST:
        edit(put(tmp_path, 1), **change)
        assert "meta.json" in refused(checkpoint.load, path), change
    edit(put(tmp_path, 1), format_version=2)
    assert "newer" in refused(checkpoint.load, path)
    for name in NAMES:
        path = put(tmp_path, 1)
        files = checkpoint.load(path).meta["files"]
        edit(path, files={**files, name: {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}})
        assert repr(name) in refused(checkpoint.load, path)


def test_pointers_are_plain_names(tmp_path, capsys):
    run = tmp_path / "run"
    put(run, 1)
    put(run, 2, best=True)
    put(tmp_path / "other", 5)
    for which in ("latest", "best"):
        absolute = str(tmp_path / "other/step_000005")
        for text in ("../other/step_000005", absolute, "step_000001\0", "..", ".trash-step_000001"):
            (run / which).write_text(text)
            assert check(checkpoint.load_run(run, which)) == 2  # the newest
            assert f"warning: {run / which} holds" in capsys.readouterr().err
        (run / which).unlink()
        (run / which).symlink_to(run / "step_000001")
        assert check(checkpoint.load_run(run, which)) == 2
        err = capsys.readouterr().err
        assert "not a plain file" in err and "delete" not in err and "move it away" in err
        (run / which).unlink()
        (run / which).mkdir()
        assert check(checkpoint.load_run(run, which)) == 2
        assert "not a plain file" in capsys.readouterr().err
        (run / which).rmdir()
        for text in (None, "", "step_000009", "step_000009\n"):
            if text is not None:
                (run / which).write_text(text)
            loaded = checkpoint.load_run(run, which)  # missing, torn or dangling: the highest
            assert loaded.path == run / "step_000002" and check(loaded) == 2
        (run / which).write_text("step_000001\n")
        assert checkpoint.load_run(run, which).path == run / "step_000001"
        if which == "latest":
            (run / which).write_text("step_000002")
    put(run, 3, keep_last=1)
    assert steps(run) == [1, 3]
    (run / "best").write_text("nonsense")  # what the best one is, is unknown: delete nothing
    capsys.readouterr()
    put(run, 4, keep_last=1)
    assert steps(run) == [1, 3, 4] and "best" in capsys.readouterr().err


def craft(header, body=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


MALFORMED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "header of 2^63": craft({}, length=2**63),
    "header past the end": craft({"w": entry([1], 0, 4)}, bytes(4), length=1000),
    "header over the limit": craft({}, length=100_000_001),
    "not UTF-8": craft(b'{"\xff\xfe": 1}'),
    "not JSON": craft(b"{w: 1}"),
    "a list": craft(b"[]"),
    "deep": craft(b"[" * 100_000),
    "deep and closed": craft(b'{"w":' * 50_000 + b"1" + b"}" * 50_000),
    "a name twice": craft(b'{"w":%b,"w":%b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), bytes(4)),
    "two names twice": craft(
        b'{"w":%b,"w":%b}' % (json.dumps(entry([1], 0, 4)).encode(), json.dumps(entry([1], 4, 8)).encode()), bytes(8)
    ),
    "overlap": craft({"w": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "hole": craft({"w": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "past the end": craft({"w": entry([4], 0, 16)}, bytes(8)),
    "begin after end": craft({"w": entry([1], 4, 0)}, bytes(4)),
    "negative offset": craft({"w": entry([1], -4, 0)}, bytes(4)),
    "negative dimension": craft({"w": entry([-1], 0, 4)}, bytes(4)),
    "wrong shape": craft({"w": entry([3], 0, 4)}, bytes(4)),
    "wrong size for the dtype": craft({"w": entry([1], 0, 4, "F64")}, bytes(4)),
    "unknown dtype": craft({"w": entry([1], 0, 4, "F33")}, bytes(4)),
    "dtype that torch may lack": craft({"w": entry([2], 0, 1, "F4")}, bytes(1)),
    "overflow": craft({"w": entry([2**33, 2**33], 0, 4)}, bytes(4)),
    "huge": craft({"w": entry([2**40], 0, 2**42)}, bytes(4)),
    "metadata of numbers": craft({"__metadata__": {"a": 1}, "w": entry([1], 0, 4)}, bytes(4)),
    "truncated": craft({"w": entry([4], 0, 16)}, bytes(15)),
    "pickle": pickle.dumps({"w": [1.0, 2.0]}),
}


def test_malformed_safetensors_with_a_true_manifest(tmp_path):
    cases = dict(MALFORMED)
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("data.pkl", b"x")
    cases["ZIP"] = (tmp_path / "z").read_bytes()
    cases["ZIP behind"] = craft({"w": entry([1], 0, 4)}, bytes(4)) + cases["ZIP"]
    for name in ("model.safetensors", "optimizer.safetensors"):
        for what, data in cases.items():
            path = put(tmp_path / "run", 1)
            forge(path, name, data)
            start = time.perf_counter()
            message = refused(checkpoint.load, path, optimizer=True)
            assert name in message and len(message) < 1000, what
            assert time.perf_counter() - start < 60, what  # no hang


def test_random_mutations_with_a_true_manifest(tmp_path):
    path = put(tmp_path, 1)
    good, dice = (path / "model.safetensors").read_bytes(), random.Random(2)
    header = 8 + int.from_bytes(good[:8], "little")
    refusals = 0
    for _ in range(400):
        bad = bytearray(good[: dice.randrange(len(good))] if dice.random() < 0.3 else good)
        for _ in range(dice.randrange(1, 4)):
            if bad:
                bad[dice.randrange(min(header, len(bad)))] ^= 1 << dice.randrange(8)
        forge(put(tmp_path, 1), "model.safetensors", bytes(bad))
        try:
            checkpoint.load(path)  # a flip inside a tensor's name leaves a valid file; load_model refuses that one
        except UserError as error:
            assert "model.safetensors" in str(error)
            refusals += 1
    assert refusals > 200


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_checkpoint_that_is_not_finite_is_passed_over(tmp_path, capsys, bad):
    put(tmp_path, 1)
    checkpoint.save(tmp_path, 2, state(2), {"m": torch.tensor([bad])}, {})
    checkpoint.save(tmp_path, 3, state(3) | {"w": torch.tensor([bad])}, {"m": torch.zeros(1)}, {})
    assert check(checkpoint.load_run(tmp_path, optimizer=True)) == 1
    err = capsys.readouterr().err
    assert "step_000003: tensor w holds NaN or Inf" in err and "step_000002: tensor m holds NaN or Inf" in err
    assert check(checkpoint.load_run(tmp_path)) == 2       # without the moments, of which sampling needs none
    assert check(checkpoint.load_run(tmp_path, optimizer=True, before=2)) == 1
    assert check(checkpoint.load_run(tmp_path, before=1, quiet=True)) == 2  # nothing is before it: the newest
    assert "moment" not in capsys.readouterr().err


# ---- retention and disk
class History:
    """A run with a random life: it saves, crashes, is damaged, goes back. What has to hold is asserted on the way."""

    def __init__(self, run, seed):
        self.run = run
        self.dice = random.Random(seed)
        self.keep = self.dice.choice([0, 1, 2, 3, 5])
        self.step = 0
        self.best = None  # its step
        self.whole = []  # steps up to this one whose folders are whole

    def live(self, n_events):
        for _ in range(n_events):
            event = self.dice.random()
            if event < 0.1 and self.whole:
                self.lose_the_newest()
            elif event < 0.2 and self.whole:
                self.go_back()
            elif event < 0.3 and self.run.exists():
                for name in (".step_000999.tmp", ".trash-step_000998", "step_999999"):  # litter of killed saves
                    (self.run / name).mkdir(exist_ok=True)
            elif event < 0.45:
                self.crash()
            elif event < 0.5:
                self.step += 1  # its evaluation is NaN: the loop does not save
            else:
                self.save()

    def put(self, is_best):
        best = self.step if is_best else self.best
        checkpoint.save(self.run, self.step, state(self.step), {"m": torch.zeros(1)}, {"best": best},
                        keep_last=self.keep, best=is_best)
        self.best = best

    def save(self):
        self.step += 1
        before = self.whole
        self.put(is_best=self.dice.random() < 0.3)
        self.look()
        assert self.step in self.whole and not hidden(self.run)
        everything = [step for step in steps(self.run) if checkpoint._is_whole(self.run / f"step_{step:06d}")]
        assert self.keep == 0 or len(everything) <= self.keep + 1
        # not fewer than asked for; one that a killed save has left whole counts, too
        assert len(self.whole) >= min(self.keep or 99, len(before) + 1), "pruned too much"
        loaded = checkpoint.load_run(self.run)
        assert check(loaded) == self.step and loaded.path.name == f"step_{self.step:06d}"

    def crash(self):
        """Inside a save."""
        before = self.step
        best = self.best
        self.step += 1
        with pytest.MonkeyPatch.context() as patch:
            fate = Fate(patch, self.dice.randrange(30))
            try:
                self.put(is_best=self.dice.random() < 0.3)
            except Killed:
                assert fate.struck
                self.best = best
        if self.whole or not fate.struck:
            self.resume()
            assert self.step in (before, before + 1) or before not in self.whole
        else:
            self.step = 0  # the first save of all: a resume may find it or nothing
            shutil.rmtree(self.run, ignore_errors=True)

    def lose_the_newest(self):
        lost = self.whole.pop()
        (self.run / f"step_{lost:06d}" / "model.safetensors").unlink()
        if self.best == lost:
            self.best = None
        if self.whole:
            self.resume()
            assert self.step == self.whole[-1]
        else:
            shutil.rmtree(self.run)
            self.step = 0

    def go_back(self):
        """A user continues from an earlier checkpoint."""
        step = self.dice.choice(self.whole)
        if step != self.whole[-1]:
            self.best = None  # of that time, and may be pruned
        (self.run / "latest").write_text(f"step_{step:06d}")
        self.resume()
        assert self.step == step

    def resume(self):
        """As train.py does it: newest whole checkpoint, and `best` is what that one knew to be the best."""
        loaded = checkpoint.load_run(self.run, optimizer=True)
        self.step = check(loaded)
        known = loaded.meta["best"]
        found = known is not None and checkpoint.point_best(self.run, known)
        assert found or known is None or known != self.best, "the best one is lost"
        self.best = known if found else None
        if not found:
            (self.run / "best").unlink(missing_ok=True)
        self.look()

    def look(self):
        folders = [step for step in steps(self.run) if step <= self.step]
        self.whole = [step for step in folders if checkpoint._is_whole(self.run / f"step_{step:06d}")]
        if self.best is not None:
            assert self.best in self.whole and (self.run / "best").read_text() == f"step_{self.best:06d}"
            assert check(checkpoint.load_run(self.run, "best")) == self.best


@pytest.mark.score("A12")
def test_retention_under_random_histories(capsys, count, score):
    n = count(30, 10_000)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a disk takes most of the time, and no power is lost
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        for seed in range(n):
            run = Path(folder, str(seed))
            History(run, seed).live(12)
            shutil.rmtree(run, ignore_errors=True)
    capsys.readouterr()
    score(n, n, "12 events each")


def test_what_a_killed_run_was_writing_is_cleaned_up(tmp_path):
    for name in (".config.tmp-7.json", ".metrics.tmp-7.jsonl", ".loss.tmp-7.png", ".best.tmp-7", ".notes.tmp-7.txt"):
        (tmp_path / name).write_text("half")
    put(tmp_path, 1)
    assert hidden(tmp_path) == [".notes.tmp-7.txt"]  # which is not ours


def test_best_is_kept_for_ever(tmp_path):
    put(tmp_path, 1, best=True, keep_last=2)
    for step in range(2, 8):
        put(tmp_path, step, keep_last=2)
    assert steps(tmp_path) == [1, 6, 7]
    put(tmp_path, 8, best=True, keep_last=2)
    assert steps(tmp_path) == [7, 8]
    put(tmp_path, 9, keep_last=0)
    assert steps(tmp_path) == [7, 8, 9]


def test_nothing_is_deleted_through_a_link(tmp_path):
    put(tmp_path / "other", 1)
    run = tmp_path / "run"
    put(run, 3)
    (run / "step_000001").symlink_to(tmp_path / "other/step_000001")
    (run / ".trash-step_000002").symlink_to(tmp_path / "other")
    assert check(checkpoint.load(run / "step_000001")) == 1
    put(run, 4, keep_last=1)
    assert steps(run) == [1, 4]  # whoever put the link there wants it
    put(run, 1, keep_last=1)  # takes the place of the link
    assert check(checkpoint.load(tmp_path / "other/step_000001")) == 1
    assert not (run / "step_000001").is_symlink() and not hidden(run)


@pytest.mark.score("A9")
def test_a_full_disk(tmp_path, monkeypatch):
    run = tmp_path / "run"
    for step in range(1, 5):
        put(run, step, keep_last=0, best=step == 1)
    asked = []
    room = [10]

    def usage(path):
        asked.append(Path(path))
        return shutil._ntuple_diskusage(0, 0, room[0] if len(steps(run)) > 3 else 10**9)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)
    put(run, 5, keep_last=3)  # needs the older ones out of the way first
    assert steps(run) == [1, 3, 4, 5]
    message = refused(put, run, 6, keep_last=0)
    assert re.search(r"step_000006: disk full: [\d,]+ bytes needed, 10 free", message)
    assert set(asked) == {run} and steps(run) == [1, 3, 4, 5] and not hidden(run)  # the output's own volume was asked
    assert check(checkpoint.load_run(run)) == 5


NEW_USER_AND_MOUNTS = 0x10000000 | 0x00020000  # CLONE_NEWUSER, CLONE_NEWNS


def fill(path, room):
    """Write a file that leaves about `room` bytes of its disk."""
    with open(path, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(0, file.tell() - room))


def full_disks(disk):
    """In a process of its own: mount a disk of 4 MB and save on it when it is full -> how many of 8 saves are right."""
    libc = ctypes.CDLL(None)
    user = os.getuid()
    group = os.getgid()
    if libc.unshare(NEW_USER_AND_MOUNTS):
        return 77
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text)
    if libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, b"size=4m"):
        return 77
    held = 0
    run = disk / "run"
    large = {"big": torch.zeros(100_000)}  # 400 KB, and the moments as much
    make_room = checkpoint._make_room
    for step, room in enumerate((0, 0, 1, 8192, 300_000, 420_000, 700_000, 801_000)):
        checkpoint._make_room = make_room
        put(run, step)
        if step:
            checkpoint._make_room = lambda *_: None  # as if another process had taken the room after it was measured
        fill(disk / "filler", room)
        try:
            checkpoint.save(run, 99, state(99) | large, large, {})
            message = ""
        except UserError as error:
            message = str(error)
        good = re.search(r"step_000099: disk full: [\d,]+ bytes needed, [\d,]+ free", message)
        held += bool(good) and check(checkpoint.load_run(run, optimizer=True)) == step and not list(run.glob(".step*"))
        (disk / "filler").unlink()
    return held


@pytest.mark.score("A9")
def test_a_disk_that_is_full_in_the_middle_of_a_save(tmp_path, score):
    disk = tmp_path / "disk"
    disk.mkdir()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            torch.set_num_threads(1)
            code = full_disks(disk)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    held = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if held == 77:
        pytest.skip("needs a kernel that lets a user mount a disk of his own")
    score(held, 8, "8 of them on a full tmpfs")
    assert held == 8


def test_unwritable_places(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(put, tmp_path / "file", 1)
    run = tmp_path / "run"
    put(run, 1)
    (run / "step_000002").write_text("a file in the way")
    put(run, 2)
    assert check(checkpoint.load_run(run)) == 2 and not hidden(run)

    def denied(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "mkdir", denied)
    assert "Permission denied" in refused(put, run, 3)
    assert check(checkpoint.load_run(run)) == 2


# ---- load_model
ARCH = """
import dataclasses, torch

@dataclasses.dataclass(frozen=True)
class Config:
    n_layer: int = 2
    n_embd: int = 8
    vocab_size: int = 11
    block_size: int = 16
    theta: float = 10.0
    bias: bool = False
    name: str | None = None
    wiring: tuple[int, ...] = ()

    def __post_init__(self):
        if self.n_embd % 2:
            raise ValueError(f"n_embd={self.n_embd} must be even")

class Model(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(config.n_embd, config.n_embd) for _ in range(config.n_layer))
        self.head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight
        table = torch.arange(config.block_size)[:, None] * config.theta ** -torch.linspace(0, 1, config.n_embd)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, idx):
        x = self.embed(idx) + self.table[: idx.shape[1]]
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)
"""


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """(module, model, save): a small model file, a model of it, and how to save it with changes."""
    import importlib
    import sys

    (tmp_path / "tiny_arch.py").write_text(ARCH)
    (tmp_path / "not_a_model.py").write_text("x = 1")
    (tmp_path / "eager_arch.py").write_text(ARCH.replace('table = ', 'torch.arange(3).tolist()\n        table = '))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(checkpoint, "HERE", tmp_path)
    importlib.invalidate_caches()
    for name in ("tiny_arch", "not_a_model", "eager_arch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("tiny_arch")
    torch.manual_seed(0)
    model = module.Model(module.Config(theta=3.0, wiring=(1, 2)))

    def save(arch="tiny_arch", tensors=None, **changes):
        config = {"n_layer": 2, "n_embd": 8, "vocab_size": 11, "theta": 3.0, "wiring": [1, 2]} | changes
        state = {k: v for k, v in model.state_dict().items() if k != "head.weight"} | (tensors or {})
        state = {k: v for k, v in state.items() if v is not None}
        meta = {"arch": arch, "model_config": config}
        return checkpoint.load(checkpoint.save(tmp_path / "run", 1, state, None, meta))

    yield module, model, save
    for name in ("tiny_arch", "not_a_model", "eager_arch"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("arch", ["tiny_arch", "eager_arch"])
def test_load_model_rebuilds_it(trained, arch):
    module, model, save = trained
    loaded = checkpoint.load_model(save(arch))
    assert loaded.config.wiring == (1, 2) and loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded.table, model.table)  # not in the file, so it must be computed, on a real device
    idx = torch.arange(10)[None]
    assert torch.equal(loaded(idx), model(idx))
    assert all(p.requires_grad for p in loaded.parameters())
    checkpoint.load_model(save(arch, theta=3, name=None))
    checkpoint.load_model(save(arch, name="x"))


BAD_CONFIG = [
    ("n_layer", "6"), ("n_layer", -1), ("n_layer", 1e308), ("n_layer", 2**63), ("n_layer", True), ("n_layer", None),
    ("n_layer", 3), ("n_layer", 1), ("n_layer", 10**9), ("n_layer", [2]), ("n_embd", 7), ("n_embd", 10),
    ("n_embd", 10**9), ("n_embd", 2**62), ("n_embd", -8), ("n_embd", 0), ("vocab_size", 12), ("vocab_size", 2**40),
    ("vocab_size", 60_000), ("n_embd", 50_000),
    ("vocab_size", 2**63), ("vocab_size", -1), ("block_size", 10**12), ("block_size", -1), ("theta", "1"), ("bias", 1),
    ("name", 3), ("wiring", 3), ("wiring", {}), ("wiring", "ab"), ("unknown", 1),
]


@pytest.mark.parametrize("arch", ["tiny_arch", "eager_arch"])
@pytest.mark.parametrize("key,value", BAD_CONFIG)
def test_load_model_refuses_a_bad_config(trained, arch, key, value):
    if arch == "eager_arch" and (key, value) == ("block_size", 10**12):
        value = -2  # tables of a model that cannot live on the meta device are not measured first
    start = time.perf_counter()
    message = refused(checkpoint.load_model, trained[2](arch, **{key: value}))
    assert "run/step_000001" in message and time.perf_counter() - start < 60  # no hang, no terabytes


def test_load_model_refuses_tensors_that_do_not_fit(trained):
    *_, save = trained
    message = refused(checkpoint.load_model, save(tensors={"layers.1.bias": None}))
    assert "layers.1.bias is missing" in message
    message = refused(checkpoint.load_model, save(tensors={f"extra{i}": torch.zeros(1) for i in range(9)}))
    assert re.search("extra[0-9] is unknown", message) and "6 more" in message
    message = refused(checkpoint.load_model, save(tensors={"layers.0.weight": torch.zeros(8, 9)}))
    assert "layers.0.weight" in message and "[8, 9]" in message and "[8, 8]" in message
    assert "embed.weight" in refused(checkpoint.load_model, save(tensors={"embed.weight": None}))
    for bad in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.zeros(8, 8, dtype=dtype)
            weight[3, 3] = bad
            message = refused(checkpoint.load_model, save(tensors={"layers.0.weight": weight}))
            assert "layers.0.weight" in message and "NaN" in message


def test_load_model_refuses_a_bad_arch(trained):
    *_, save = trained
    for arch in (None, 3, "", "../model", "a.b", "__main__", "os", "antigravity", "/tmp/x", ["model"], "not_a_model"):
        assert repr(arch) in refused(checkpoint.load_model, save(arch))
    assert "nowhere_to_be_found.py" in refused(checkpoint.load_model, save("nowhere_to_be_found"))
    for config in (None, 3, [], "x"):
        path = save().path
        edit(path, model_config=config)
        assert "model_config" in refused(checkpoint.load_model, checkpoint.load(path))


# ---- random states
def drawn():
    return torch.randn(40).tolist() + torch.rand(20).tolist()


def as_json(state):
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def test_random_state_is_exact(tmp_path):
    torch.manual_seed(3)
    torch.randn(3)  # leaves a half-used pair behind
    path = checkpoint.save(tmp_path, 1, state(1), {"exp_avg.w": torch.zeros(2), **checkpoint.random_state()}, {})
    expected = drawn()
    drawn()
    saved = checkpoint.load(path, optimizer=True).optimizer
    assert saved.keys() == {"exp_avg.w", "random.torch"} and saved["random.torch"].dtype == torch.uint8
    checkpoint.set_random_state(saved)
    assert drawn() == expected


def test_older_checkpoints_with_the_states_of_python_and_numpy_load(tmp_path):
    kind, words, *rest = np.random.get_state()
    older = {"random.python": as_json(random.getstate()), "random.numpy": as_json((kind, words.tolist(), *rest))}
    path = checkpoint.save(tmp_path, 1, state(1), {**older, **checkpoint.random_state()}, {})
    expected = drawn()
    saved = checkpoint.load(path, optimizer=True).optimizer
    assert older.keys() < saved.keys()
    random.seed(1)
    np.random.seed(2)
    ahead = random.getstate(), np.random.get_state()[1].tolist()
    checkpoint.set_random_state(saved)
    assert drawn() == expected
    assert (random.getstate(), np.random.get_state()[1].tolist()) == ahead  # ignored, damaged or not
    checkpoint.set_random_state(saved | dict.fromkeys(older, torch.zeros(5)))


def test_random_state_of_the_wrong_kind():
    good = checkpoint.random_state()
    zeros = torch.zeros(5, dtype=torch.uint8)
    state = good["random.torch"]
    for bad in (state[:-3], state[:0], zeros, zeros.float(), torch.tensor(1)):
        assert "random.torch" in refused(checkpoint.set_random_state, good | {"random.torch": bad})
    assert "random.torch" in refused(checkpoint.set_random_state, {"random.python": zeros})
    assert "random.cuda.x" in refused(checkpoint.set_random_state, good | {"random.cuda.x": state})
    checkpoint.set_random_state(good)


def test_the_state_of_a_missing_device_is_one_warning(capsys):
    good = checkpoint.random_state()
    checkpoint.set_random_state(good | {"random.cuda.99": good["random.torch"]})
    assert capsys.readouterr().err.startswith("warning: random.cuda.99 was saved")


def test_best_points_at_a_whole_checkpoint_or_nowhere(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2):
        put(run, step)
    assert checkpoint.point_best(run, 1) and (run / "best").read_text() == "step_000001"
    assert not checkpoint.point_best(run, 3) and not (run / "best").exists()
