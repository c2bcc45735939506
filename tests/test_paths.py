"""Paths that lead elsewhere, in what is read and where something is written; permissions; kills during an export."""
import os
import shutil
import signal
import time
from dataclasses import replace

import damage
import pytest
import torch
from cases import built, send
from test_data import meta as edited_meta
from tries import tries

import train
from formats import check
from prepare import text
from thimble import checkpoint, configurator, files, load
from thimble.files import UserError

SECRET = b"what nobody but its owner may read or change"


# ---- read
def elsewhere(name):
    """A file of the checkpoint is a link to one that is outside of it, with the same content."""
    def damage_(path, outside):
        os.replace(path / name, outside / name)
        os.symlink(outside / name, path / name)
    return damage_


def pointer(target):
    """`latest` names a checkpoint that is not in this run."""
    def damage_(path, outside):
        shutil.copytree(path, outside / "step_000009")
        shutil.rmtree(path)
        (path.parent / "latest").write_text(target(outside) if callable(target) else target)
    return damage_


READ = {
    "checkpoint: a file in the folder above": ("run", lambda path, _: damage.file_name("../secret")(path)),
    "checkpoint: an absolute file": ("run", lambda path, outside: damage.file_name(str(outside / "secret"))(path)),
    "checkpoint: a name with NUL": ("run", lambda path, _: damage.file_name("tokenizer.json\0x")(path)),
    "checkpoint: linked weights": ("run", elsewhere("model.safetensors")),
    "checkpoint: linked moments": ("run", elsewhere("optimizer.safetensors")),
    "checkpoint: a linked meta.json": ("run", elsewhere("meta.json")),
    "run: latest in another folder": ("latest", pointer("../outside/step_000009")),
    "run: latest is absolute": ("latest", pointer(lambda outside: str(outside / "step_000009"))),
    "dataset: a file in the folder above": ("data", lambda path, _: edited_meta(**{"files__../secret": {}})(path)),
    "Hugging Face: an index with ..": ("hf", lambda path, _: damage.test_hf.index("../model.safetensors")(path)),
    "Hugging Face: an absolute index": ("hf", lambda path, outside: damage.test_hf.index(
        str(outside / "model.safetensors"))(path)),
    **{f"ONNX: {name}": ("onnx", lambda path, _, case=case: case(path)) for name, case in damage.onnx_cases().items()
       if name not in ("empty", "a page", "noise", "a missing file")},
}
USE = damage.USE | {"latest": lambda path: checkpoint.load_run(path.parent)}
MAKE = damage.MAKE | {"latest": damage.make_run}


@pytest.mark.score("B5")
@pytest.mark.parametrize("name", READ)
def test_no_path_leads_out_when_reading(tmp_path, name):
    kind, attack = READ[name]
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(SECRET)
    (tmp_path / "in").mkdir()
    path = MAKE[kind](tmp_path / "in")
    USE[kind](path)
    attack(path, tmp_path / "outside")
    with pytest.raises(UserError) as error:
        USE[kind](path)
    assert SECRET.decode() not in str(error.value) and "\n" not in str(error.value)


# ---- write
@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(SECRET)
    yield folder
    assert (folder / "secret").read_bytes() == SECRET and [path.name for path in folder.iterdir()] == ["secret"]


def save_over(name, target="secret"):
    """A run in which `name` is a link to something outside; the next checkpoint is saved there."""
    def attack(tmp_path, outside, toy):
        run = damage.make_run(tmp_path).parent
        files.remove(run / name)
        os.symlink(outside / target, run / name)
        tensors = {"w": torch.ones(2)}
        for step in (1, 2, 3, 4):
            checkpoint.save(run, step, tensors, None, {}, best=True, keep_last=1)
        assert checkpoint.load(run).meta["step"] == 4
    return attack


def resume_over(name):
    """A run from elsewhere in which `name` is a link; it is resumed, and either refuses or replaces the link."""
    def attack(tmp_path, outside, toy):
        cfg = configurator.load(train.Config, dataset=str(toy), out_dir=str(tmp_path / "run"), n_layer=1, n_head=1,
                                n_embd=16, block_size=16, batch_size=2, max_steps=2, device="cpu", dtype="float32")
        train.train(cfg)
        files.remove(tmp_path / "run" / name)
        os.symlink(outside / "secret", tmp_path / "run" / name)
        try:
            train.train(replace(cfg, resume=True, max_steps=3))
        except UserError as error:
            assert name in str(error)
    return attack


def refused(function):
    def attack(tmp_path, outside, toy):
        with pytest.raises(UserError):
            function(tmp_path, outside)
    return attack


def export_over_a_link(tmp_path, outside):
    os.symlink(outside, tmp_path / "out")
    send(*built("tied"), tmp_path / "out", "hf", check=False)


def dataset(path):
    text.prepare(lambda: iter(["a text " * 99]), path.name, "a test", data_dir=path.parent)


def dataset_over_a_link(tmp_path, outside, toy):
    os.symlink(outside, tmp_path / "ds")
    try:
        dataset(tmp_path / "ds")
    except UserError:
        return
    assert not (tmp_path / "ds").is_symlink()


WRITE = {
    "checkpoint: latest is a link": save_over("latest"), "checkpoint: best is a link": save_over("best"),
    "checkpoint: a step is a link": save_over("step_000002", "."),
    "checkpoint: the temporary folder is a link": save_over(".step_000002.tmp", "."),
    "checkpoint: the trash is a link": save_over(".trash-step_000001", "."),
    "checkpoint: the temporary pointer is a link": save_over(f".latest.tmp-{os.getpid()}"),
    "run: the lock is a link": resume_over("lock"), "run: metrics.jsonl is a link": resume_over("metrics.jsonl"),
    "run: config.json is a link": resume_over("config.json"), "run: loss.png is a link": resume_over("loss.png"),
    "export: the folder is a link": refused(export_over_a_link),
    "dataset: the folder is a link": dataset_over_a_link,
    "dataset: a name with ..": refused(lambda tmp_path, outside: text.prepare(
        lambda: iter(["a text " * 99]), "../outside", "a test", data_dir=outside)),
    "dataset: an absolute name": refused(lambda tmp_path, outside: text.prepare(
        lambda: iter(["a text " * 99]), str(outside), "a test", data_dir=tmp_path)),
}


@pytest.mark.score("B5")
@pytest.mark.parametrize("name", WRITE)
def test_no_path_leads_out_when_writing(tmp_path, toy, outside, name):
    WRITE[name](tmp_path, outside, toy)
    assert (outside / "secret").read_bytes() == SECRET and [path.name for path in outside.iterdir()] == ["secret"]


# ---- permissions and kills
def make_export(form):
    def make(path):
        send(*built("tied"), path.with_suffix(f".{form}"), form, check=False)
        return path.with_suffix(f".{form}")
    return make


def make_onnx(path):
    send(*built("tied"), path.with_suffix(".onnx"), "onnx", check=False)
    return path.with_suffix(".onnx")


def make_checkpoint(path):
    path.mkdir(exist_ok=True)
    return damage.make_run(path)


def make_dataset(path):
    dataset(path)
    return path


WRITERS = {"checkpoint": make_checkpoint, "dataset": make_dataset, "hf": make_export("hf"), "gguf": make_export("gguf"),
           "onnx": make_onnx}


@pytest.mark.score("B6")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_is_written_has_the_permissions_of_the_umask(tmp_path, umask, score):
    def attempt(make):
        path = make(tmp_path / make.__name__ / str(umask))
        for place in (path, *path.rglob("*")):
            wanted = (0o777 if place.is_dir() else 0o666) & ~umask
            assert place.stat().st_mode & 0o777 == wanted, place

    before = os.umask(umask)
    try:
        for make in WRITERS.values():
            (tmp_path / make.__name__).mkdir(exist_ok=True)
        tries(score, WRITERS, attempt, f"umask {umask:03o}")
    finally:
        os.umask(before)


@pytest.mark.score("B6")
def test_saving_over_its_own_source_keeps_the_data(tmp_path):
    """Through the loaded tensors, which may still be a view of the file (safetensors issue 762)."""
    path = damage.make_run(tmp_path)
    found = checkpoint.load(path, optimizer=True)
    before = {name: tensor.clone() for name, tensor in found.model.items()}
    checkpoint.save(path.parent, 1, found.model, found.optimizer, found.meta, path / "tokenizer.json")
    again = checkpoint.load(path)
    assert all(torch.equal(again.model[name], tensor) for name, tensor in before.items())


@pytest.mark.score("B6")
@pytest.mark.parametrize("form", ["hf", "gguf", "onnx"])
def test_a_killed_export_is_whole_or_not_there(tmp_path, form, count, score):
    model, words = built("tied")
    ending = tmp_path / f"m.{form}"
    begun = time.monotonic()
    WRITERS[form](tmp_path / "whole")
    seconds = time.monotonic() - begun
    n = count(4, 40)
    held = 0
    left = 0
    for i in range(n):
        pid = os.fork()
        if pid == 0:
            send(model, words, ending, form, check=False)
            os._exit(0)
        time.sleep(seconds * i / n)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if ending.exists():
            whole(ending, form)
            left += 1
        held += 1
        files.remove(ending)
    WRITERS[form](tmp_path / "m")  # over whatever the dead have left beside it
    score(held, n, f"{form}: {left} were complete by then")


def whole(path, form):
    if form == "onnx":
        check.onnx_weights(path)
        return
    checkpoint.load_model(load.read(path))
    load.read_tokenizer(path)
