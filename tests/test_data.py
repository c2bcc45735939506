"""data.py: batches are a pure function of (seed, step), damaged datasets are refused with a reason."""
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from fate import Fate
from tokenizers import Tokenizer as HF
from tokenizers import models

import model
import train
from tasks import bpb
from thimble import configurator, data
from thimble.files import UserError
from thimble.tokenizer import Tokenizer, byte_tokenizer

FLOORS = {"uniform": 8.0, "unigram": 4.5, "bigram": 3.25, "trigram": 2.5}


def write(path, tokenizer, train, val, train_mask=None, val_mask=None):
    with data.Writer(path, tokenizer, source="test", baselines=FLOORS) as out:
        out.append("train", train, len(train), 1, train_mask)
        out.append("val", val, len(val), 1, val_mask)
    return path


# ---- batches
@pytest.mark.parametrize("n, block, size", [(1000, 7, 5), (1001, 8, 16), (64, 9, 4), (10, 9, 3), (17, 9, 40)])
def test_each_window_once_an_epoch(n, block, size):
    tokens = np.arange(n, dtype=np.uint16)
    n_windows = max(1, (n - block) // block)
    steps = math.ceil(5 * n_windows / size)
    rows = [row for step in range(steps) for row in zip(*data.batch(tokens, step, size, block, seed=1), strict=True)]
    offsets = set()
    for epoch in range(5):
        mine = rows[epoch * n_windows : (epoch + 1) * n_windows]
        for x, y in mine:
            assert x.dtype == y.dtype == np.int64 and len(x) == len(y) == block
            assert np.array_equal(x, np.arange(x[0], x[0] + block)) and np.array_equal(y, x + 1)
        starts = sorted(int(x[0]) for x, _ in mine)
        assert starts == list(range(starts[0], starts[0] + n_windows * block, block))  # side by side, each once
        assert starts[0] < block
        offsets.add(starts[0])
    assert len(offsets) > 1 or n == block + 1


def test_batches_are_pure():
    tokens = np.random.default_rng(0).integers(0, 1000, 5000).astype(np.uint16)
    straight = [data.batch(tokens, step, 12, 16, seed=7) for step in range(60)]
    data._epoch.cache_clear()
    for step in (59, 31, 0, 58):  # as after a resume: no step before it was asked for
        for ours, theirs in zip(data.batch(tokens, step, 12, 16, seed=7), straight[step], strict=True):
            assert np.array_equal(ours, theirs)
    for array in data.batch(tokens, 5, 12, 16, seed=7):
        array += 1  # callers may write into a batch
    assert np.array_equal(data.batch(tokens, 5, 12, 16, seed=7)[0], straight[5][0])
    assert not np.array_equal(data.batch(tokens, 0, 12, 16, seed=8)[0], straight[0][0])
    assert data.batch(tokens, 0, 12, 16, seed=-3)[0].shape == (12, 16)
    # a larger batch is the same row of windows, so a changed batch size keeps the order
    double = data.batch(tokens, 3, 24, 16, seed=7)[0]
    assert np.array_equal(double, np.concatenate([straight[6][0], straight[7][0]]))


def test_epochs_are_uniform():
    first = Counter(int(data.batch_indices(1000, 0, 1, 10, seed)[0]) // 100 for seed in range(2000))
    assert min(first.values()) > 130 and len(first) == 10


def test_mask_goes_with_its_tokens():
    tokens = np.arange(500, dtype=np.uint16)
    mask = (tokens % 3 == 0).astype(np.uint8)
    x, y = data.batch(tokens, 2, 8, 20, seed=1, mask=mask)
    assert np.array_equal(y, np.where((x + 1) % 3 == 0, x + 1, -1))
    counted = np.concatenate([y.ravel() for _, y in data.eval_windows(tokens, 20, 8, mask)])
    assert sorted(counted[counted >= 0]) == [i for i in range(1, 500) if i % 3 == 0]


def test_split_shorter_than_a_window():
    with pytest.raises(UserError, match="64 tokens.* 65"):
        data.batch(np.zeros(64, np.uint16), 0, 4, 64, seed=0)
    assert data.batch(np.zeros(65, np.uint16), 0, 4, 64, seed=0)[0].shape == (4, 64)
    with pytest.raises(UserError, match="at least 2"):
        next(data.eval_windows(np.zeros(1, np.uint16), 8, 2))


@pytest.mark.parametrize("n", [2, 3, 8, 9, 10, 64, 65, 66, 129, 1000, 1023])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_eval_windows_predict_each_token_once(n, size):
    tokens = np.arange(n, dtype=np.uint32) + 7
    targets = []
    for x, y in data.eval_windows(tokens, 8, size):
        assert x.dtype == y.dtype == np.int64 and x.shape == y.shape and x.shape[0] <= size and x.shape[1] == 8
        assert x.min() >= 0
        assert np.array_equal(x[y >= 0] + 1, y[y >= 0])
        targets += y[y >= 0].tolist()
    assert targets == tokens[1:].tolist()


# ---- datasets on disk
def test_written_is_loaded(tmp_path):
    tokenizer = byte_tokenizer()
    train, val = np.arange(1000) % 256, np.arange(100) % 256
    path = write(tmp_path / "ds", tokenizer, train, val, train_mask=np.arange(1000) % 2, val_mask=np.ones(100))
    dataset = data.load(path)
    assert dataset.train.dtype == np.dtype("<u2") and np.array_equal(dataset.train, train)
    assert np.array_equal(dataset.val, val) and np.array_equal(dataset.train_mask, np.arange(1000) % 2)
    assert dataset.vocab_size == dataset.tokenizer().vocab_size == 257 and dataset.meta["bytes"]["val"] == 100
    assert (path / "train.bin").stat().st_size == 2000
    with pytest.raises(ValueError):
        dataset.train[0] = 1
    assert sorted(item.name for item in tmp_path.iterdir()) == ["ds"]
    write(path, tokenizer, val, train)  # replaced as a whole: the masks are gone
    assert data.load(path).train_mask is None and len(data.load(path).train) == 100
    assert sorted(item.name for item in tmp_path.iterdir()) == ["ds"]


def test_large_vocabulary_takes_uint32(tmp_path):
    def tokenizer(n):
        return Tokenizer(HF(models.WordLevel({f"w{i}": i for i in range(n - 1)}, unk_token="w0")))

    big, ids = tokenizer(128_260), np.array([0, 65_535, 65_536, 70_000, 128_259])
    dataset = data.load(write(tmp_path / "big", big, ids, ids))
    assert dataset.train.dtype == np.dtype("<u4") and dataset.train.tolist() == ids.tolist()
    assert data.Writer(tmp_path / "x", tokenizer(65_535), "").dtype.itemsize == 2
    assert data.Writer(tmp_path / "x", tokenizer(65_536), "").dtype.itemsize == 4


@pytest.mark.score("A16")
@pytest.mark.parametrize("bad", [257, 70_000, -1, 2**16])
def test_ids_never_wrap(tmp_path, bad):
    with pytest.raises(UserError, match="outside the vocabulary"):
        write(tmp_path / "ds", byte_tokenizer(), np.array([1, bad]), np.array([1, 2]))
    assert list(tmp_path.iterdir()) == []  # and nothing is left behind


@pytest.mark.parametrize("n_train, n_val, says", [(2, 0, "val split would have 0 token"), (2, 1, "val split would have"
                                                  " 1 token"), (1, 2, "train split would have 1 token")])
def test_a_split_too_short_to_train_on_is_not_written(tmp_path, n_train, n_val, says):
    with pytest.raises(UserError, match=f"too short.*{says}.s. and needs at least 2"):
        write(tmp_path / "ds", byte_tokenizer(), np.arange(n_train), np.arange(n_val))
    assert list(tmp_path.iterdir()) == []


def test_what_load_would_refuse_is_not_written(tmp_path):
    with pytest.raises(UserError, match="baselines.trigram"):
        with data.Writer(tmp_path / "ds", byte_tokenizer(), "test", baselines={"uniform": 8.0, "unigram": 4.0,
                                                                               "bigram": 4.0}) as out:
            out.append("train", [1, 2], 2)
            out.append("val", [1, 2], 2)
    assert list(tmp_path.iterdir()) == []


# ---- what is replaced
def tree(folder):
    """{path: content} of all that is in a folder, hidden or not; links as where they point to."""
    found = {}
    for item in sorted(folder.rglob("*")):
        is_plain = item.is_file() and not item.is_symlink()
        found[str(item.relative_to(folder))] = item.read_bytes() if is_plain else os.path.realpath(item)
    return found


@pytest.mark.parametrize("files, says", [
    (["a.txt", "b.txt"], "it holds a.txt, b.txt"), ([], "lacks a meta.json"), (["meta.json"], "lacks a meta.json or"),
    (["train.bin", "val.bin"], "lacks a meta.json"), (["meta.json", "tokenizer.json"], "lacks a meta.json or any .bin"),
    (["meta.json", "train.bin", "val.bin", "tokenizer.json", "notes.md"], "it holds notes.md"),
    (["meta.json", "train.bin", ".git/config"], "it holds .git"), (["meta.json", "train.bin/mine"], "holds train.bin"),
])
def test_only_a_dataset_is_replaced(tmp_path, files, says):
    (tmp_path / "ds").mkdir()
    for name in files:
        (tmp_path / "ds" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "ds" / name).write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "ds")
    (tmp_path / "file").write_text("precious")
    before = tree(tmp_path)
    for name, reason in (("ds", says), ("link", says), ("file", "it holds file")):
        with pytest.raises(UserError, match=f"{name} is not a dataset .(it )?{reason}"):
            write(tmp_path / name, byte_tokenizer(), np.array([1, 2]), np.array([3, 4]))
        with pytest.raises(UserError, match="is not a dataset"):
            data.new_folder(tmp_path, name)
    assert tree(tmp_path) == before


def test_what_appears_while_a_dataset_is_written_stays(tmp_path):
    with pytest.raises(UserError, match="it holds a.txt"):
        with data.Writer(tmp_path / "ds", byte_tokenizer(), "test", baselines=FLOORS) as out:
            out.append("train", [1, 2], 2)
            out.append("val", [1, 2], 2)
            (tmp_path / "ds").mkdir()
            (tmp_path / "ds" / "a.txt").write_text("precious")
    assert tree(tmp_path) == {"ds": str(tmp_path / "ds"), "ds/a.txt": b"precious"}


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json", "meta.json"])
def test_a_damaged_dataset_is_replaced_as_its_message_says(tmp_path, name):
    folder = write(tmp_path / "ds", byte_tokenizer(), np.arange(50), np.arange(50))
    cut(folder / name, 5)
    with pytest.raises(UserError, match="run the prepare script that made it again"):
        data.load(folder)
    write(folder, byte_tokenizer(), np.arange(50), np.arange(50))
    data.load(folder)


@pytest.mark.parametrize("name", ["../victim", "/tmp/victim", ".", "..", "", "a/b", "a\\b", ".hidden", "a\nb", "~",
                                  "x" * 300])
def test_a_name_is_a_plain_name(tmp_path, name):
    with pytest.raises(UserError, match="plain name"):
        data.new_folder(tmp_path, name)
    assert data.new_folder(tmp_path, "élan_2.b+c-d") == tmp_path / "élan_2.b+c-d"


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    fate = Fate(monkeypatch)
    write(tmp_path / "ds", byte_tokenizer(), np.arange(50), np.arange(50), train_mask=np.ones(50))
    temporary = tmp_path / f".ds.tmp-{os.getpid()}"
    renamed = fate.calls.index(("rename", f"{temporary} {tmp_path / 'ds'}"))
    synced = [what for name, what in fate.calls[:renamed] if name == "fsync"]
    names = ["train.bin", "train.mask.bin", "val.bin", "tokenizer.json", "tokenizer_config.json",
             "generation_config.json", "meta.json"]
    assert sorted(synced) == sorted([str(temporary), *(str(temporary / name) for name in names)])
    assert synced[-2:] == [str(temporary / "meta.json"), str(temporary)]
    assert fate.calls[renamed + 1] == ("fsync", str(tmp_path))


def test_full_disk(tmp_path, monkeypatch):
    write(tmp_path / "ds", byte_tokenizer(), np.array([1, 2]), np.array([3, 4]))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.os, "fsync", full)
    with pytest.raises(UserError, match="disk is full.*ds"):
        write(tmp_path / "ds", byte_tokenizer(), np.array([4, 5]), np.array([6, 7]))
    assert [item.name for item in tmp_path.iterdir()] == ["ds"]
    assert data.load(tmp_path / "ds").train.tolist() == [1, 2]


def test_leftovers_of_dead_processes_are_cleaned(tmp_path):
    dead, alive = 2**22 + 1, data.os.getppid()
    for name in (f".ds.tmp-{dead}", f".ds.old-{dead}", f".ds.tmp-{alive}", f".other.tmp-{dead}"):
        (tmp_path / name).mkdir()
    path = write(tmp_path / "ds", byte_tokenizer(), np.array([1, 2]), np.array([3, 4]))
    assert sorted(item.name for item in tmp_path.iterdir()) == [f".ds.tmp-{alive}", f".other.tmp-{dead}", "ds"]
    # in a container every process may have the same number
    (tmp_path / f".ds.tmp-{os.getpid()}").mkdir()
    write(path, byte_tokenizer(), np.array([1, 2]), np.array([3, 4]))
    path.rename(tmp_path / f".ds.old-{os.getpid()}")
    data._remove_stale(path)
    assert data.load(path).train.tolist() == [1, 2]
    # whatever holds other files is not ours, whatever its name
    (tmp_path / f".ds.old-{dead}").mkdir()
    (tmp_path / f".ds.old-{dead}" / "letter.txt").write_text("precious")
    data._remove_stale(path)
    (tmp_path / f".ds.old-{dead}" / "letter.txt").unlink()
    data._remove_stale(path)
    assert sorted(item.name for item in tmp_path.iterdir()) == [f".ds.tmp-{alive}", f".other.tmp-{dead}", "ds"]
    path.rename(tmp_path / f".ds.old-{dead}")  # killed between the two renames of a replacement
    data._remove_stale(path)
    assert data.load(path).train.tolist() == [1, 2]


def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def meta(**changes):
    def edit(folder):
        content = json.loads((folder / "meta.json").read_text())
        for key, value in changes.items():
            *outer, last = key.split("__")
            place = content
            for name in outer:
                place = place[name]
            if value is None:
                del place[last]
            else:
                place[last] = value
        (folder / "meta.json").write_text(json.dumps(content))

    return edit


DAMAGE = {
    "no meta": ("move it away", lambda d: (d / "meta.json").unlink()),
    "empty meta": ("meta.json", lambda d: cut(d / "meta.json", 0)),
    "half meta": ("meta.json", lambda d: cut(d / "meta.json", 300)),
    "meta is a list": ("meta.json", lambda d: (d / "meta.json").write_text("[]")),
    "meta is deep": ("meta.json", lambda d: (d / "meta.json").write_text("[" * 100_000)),
    "meta is no text": ("meta.json", lambda d: (d / "meta.json").write_bytes(b"\xff\xfe")),
    "missing page": ("meta.json", lambda d: (d / "meta.json").write_text("404: Not Found")),
    "NaN": ("meta.json", meta(baselines__uniform=float("nan"))),
    "text for a baseline": ("baselines", meta(baselines__uniform="8")),
    "a baseline missing": ("baselines.trigram", meta(baselines__trigram=None)),
    "bytes zero": ("bytes.val", meta(bytes__val=0)),
    "vocab_size huge": ("tokenizer.json has 257 ids, meta.json says vocab_size 4,294,967,296", meta(vocab_size=2**32)),
    "vocab_size one too many": ("tokenizer.json has 257 ids", meta(vocab_size=258)),
    "future version": ("format_version 2", meta(format_version=2)),
    "no vocab_size": ("vocab_size", meta(vocab_size=None)),
    "vocab_size is text": ("vocab_size", meta(vocab_size="257")),
    "vocab_size is true": ("vocab_size", meta(vocab_size=True)),
    "vocab_size negative": ("vocab_size", meta(vocab_size=-1)),
    "vocab_size too small for the ids": ("train.bin holds the value 255", meta(vocab_size=200)),
    "dtype unknown": ("dtype", meta(dtype="float64")),
    "dtype uint32 for uint16": ("train.bin has 2,000 bytes", meta(dtype="uint32")),
    "dtype and tokens wrong": ("which must be below", meta(dtype="uint32", tokens={"train": 500, "val": 50})),
    "tokens missing": ("tokens.val", meta(tokens={"train": 1000})),
    "tokens zero": ("tokens.val", meta(tokens__val=0)),
    "a file elsewhere": ("lists the files", meta(**{"files__../x.bin": {}})),
    "a file not listed": ("lists the files", meta(**{"files__val.bin": None})),
    "no hash": ("sha256 of val.bin", meta(**{"files__val.bin__sha256": None})),
    "train.bin missing": ("train.bin is missing", lambda d: (d / "train.bin").unlink()),
    "val.bin is a folder": ("val.bin is missing", lambda d: ((d / "val.bin").unlink(), (d / "val.bin").mkdir())),
    "val.bin empty": ("val.bin has 0 bytes", lambda d: cut(d / "val.bin", 0)),
    "val.bin odd": ("val.bin has 101 bytes", lambda d: cut(d / "val.bin", 101)),
    "train.bin short": ("train.bin has 1,998 bytes", lambda d: cut(d / "train.bin", 1998)),
    "train.bin long": ("train.bin has 2,002", lambda d: (d / "train.bin").write_bytes(bytes(2002))),
    "a flipped bit": ("train.bin does not match its sha256", lambda d: flip(d / "train.bin", 1001)),
    "a flipped bit in the mask": ("train.mask.bin does not match", lambda d: flip(d / "train.mask.bin", 3)),
    "tokenizer changed": ("tokenizer.json does not match", lambda d: flip(d / "tokenizer.json", 20)),
    "tokenizer missing": ("tokenizer.json is missing", lambda d: (d / "tokenizer.json").unlink()),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_dataset_is_refused_with_a_reason(tmp_path, case):
    reason, damage = DAMAGE[case]
    folder = write(
        tmp_path / "ds", byte_tokenizer(), np.arange(1000) % 256, np.arange(100), train_mask=np.arange(1000) % 2
    )
    data.load(folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        data.load(folder)
    message = str(caught.value)
    assert reason in message and str(folder) in message and "again" in message and "\n" not in message


MISSING = "missing"
ODD = (MISSING, None, "x", "", True, [], {}, -1, 0, 1, 0.5, 1e6, 10**30, 10**400, 2**63 - 1, "NaN", "Infinity", "1e999")


def places(content, outer=()):
    """The paths of all keys in nested dictionaries."""
    for key, value in content.items():
        yield (*outer, key)
        if isinstance(value, dict):
            yield from places(value, (*outer, key))


def edited(content, path, value):
    """meta.json with one value replaced. The words that are no JSON strings stand for what Python would read as one."""
    content = json.loads(json.dumps(content))
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is MISSING:
        del place[path[-1]]
        return json.dumps(content)
    place[path[-1]] = "EDITED"
    bare = value if value in ("NaN", "Infinity", "1e999") else json.dumps(value)
    return json.dumps(content).replace('"EDITED"', bare)


def use(dataset):
    """What training, its plot and its evaluation take from a dataset."""
    block_size = dataset.row_length or 8
    for split in data.SPLITS:
        tokens, mask = getattr(dataset, split), getattr(dataset, f"{split}_mask")
        data.batch(tokens, 0, 4, block_size, 1, mask, dataset.row_length, dataset.vocab_size)
        assert list(data.eval_windows(tokens, block_size, 2, mask, dataset.vocab_size))
        assert 0 < 1 / dataset.bytes_per_token(split) < math.inf
    for name in ("uniform", "unigram", "bigram", "trigram"):
        assert 0 <= dataset.meta["baselines"][name] <= 100 and f"{dataset.meta['baselines'][name]:.3f}"
    assert dataset.tokenizer().vocab_size == dataset.vocab_size
    assert 0 <= (dataset.meta.get("overlap_13gram") or 0.0) <= 1


@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_any_edit_of_any_key_is_refused_or_harmless(tmp_path, kind):
    mask = np.arange(97) % 2
    folder = write(tmp_path / "ds", byte_tokenizer(), np.arange(97), np.arange(97), mask, mask)
    content = json.loads((folder / "meta.json").read_text())
    content |= {"overlap_13gram": 0.0, "duplicates": 0}
    if kind == "conversations":
        content |= {"row_length": 32, "template": "elite"}
    (folder / "meta.json").write_text(json.dumps(content))
    use(data.load(folder))
    n_refused = 0
    for path in places(content):
        for value in ODD:
            (folder / "meta.json").write_text(edited(content, path, value))
            try:
                dataset = data.load(folder)
            except UserError as error:
                assert str(folder) in str(error) and "again" in str(error) and len(str(error)) < 500, (path, value)
                n_refused += 1
                continue
            try:
                use(dataset)
            except Exception as error:
                raise AssertionError(f"{path} = {value!r:.40} loads, then {error!r}") from error
    assert n_refused > 500


def edit_middle(folder, name, value, at):
    """Change a token and, where its file is hashed whole, the hash."""
    tokens = np.memmap(folder / name, "<u2", mode="r+")
    tokens[at] = value
    tokens.flush()
    content = json.loads((folder / "meta.json").read_text())
    content["files"][name]["sha256"] = data._hash_ends(tokens)
    (folder / "meta.json").write_text(json.dumps(content))


@pytest.mark.score("A16")
def test_an_id_equal_to_the_vocabulary_is_refused(tmp_path):
    folder = write(tmp_path / "ds", byte_tokenizer(), np.arange(100), np.arange(100))
    edit_middle(folder, "val.bin", 256, 50)
    data.load(folder)
    edit_middle(folder, "val.bin", 257, 50)
    with pytest.raises(UserError, match="val.bin holds the value 257, which must be below 257"):
        data.load(folder)
    tokens = np.array([5, 257, 7, 8, 9])
    for read in (lambda size: data.batch(tokens, 0, 1, 4, seed=0, vocab_size=size),
                 lambda size: list(data.eval_windows(tokens, 2, 1, vocab_size=size))):
        read(258)
        with pytest.raises(UserError, match="holds the id 257 at token 1, the vocabulary has 257 ids"):
            read(257)


def test_an_id_beyond_the_vocabulary_inside_a_large_file_is_named(tmp_path, monkeypatch):
    """Of a large file loading sees both ends alone; training and evaluation name the id when they reach it."""
    monkeypatch.setattr(data, "MB", 1000)
    monkeypatch.setattr(data, "FULL_HASH_LIMIT", 2000)
    folder = write(tmp_path / "ds", byte_tokenizer(), np.arange(10_000) % 256, np.arange(10_000) % 256)
    for name in ("train.bin", "val.bin"):
        edit_middle(folder, name, 60_000, 5000)
        dataset = data.load(folder)
        cfg = configurator.load(train.Config, dataset=str(folder), out_dir=str(tmp_path / "run"), batch_size=640,
                                max_steps=1, block_size=16, n_layer=1, n_embd=16, n_head=2, device="cpu",
                                dtype="float32")
        says = f"{name} holds the id 60,000 at token 5,000, the vocabulary has 257 ids: run the prepare script"
        if name == "train.bin":
            with pytest.raises(UserError, match=says):
                train.next_batch(cfg, dataset, 0, "cpu")
        else:
            m = model.Model(model.Config(n_layer=1, n_embd=16, n_head=2, vocab_size=257, block_size=16))
            with pytest.raises(UserError, match=says):
                bpb.window_nats(m, dataset.val, 16)
    with pytest.raises(UserError, match="holds the id 60,000"):
        train.train(cfg)


def test_training_reads_in_the_order_of_its_seed(tmp_path):
    folder = write(tmp_path / "ds", byte_tokenizer(), np.arange(2000) % 256, np.arange(100))
    dataset = data.load(folder)

    def first(seed):
        cfg = configurator.load(train.Config, dataset=str(folder), batch_size=8, block_size=16, seed=seed)
        return train.next_batch(cfg, dataset, 0, "cpu")[0].tolist()

    assert first(1) == first(1) and len({str(first(seed)) for seed in range(6)}) == 6


def test_random_damage_never_loads(tmp_path):
    """Any cut and any flipped bit in a binary file is found; in meta.json, found or harmless."""
    rng = random.Random(5)
    folder = write(tmp_path / "ds", byte_tokenizer(), np.arange(1000) % 256, np.arange(100))
    for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
        whole = (folder / name).read_bytes()
        for _ in range(60):
            at, bad = rng.randrange(len(whole)), bytearray(whole)
            bad[at] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(bad if rng.random() < 0.5 else whole[:at])
            try:
                dataset = data.load(folder)
            except UserError:
                continue
            assert name == "meta.json"
            assert int(dataset.train.max()) < dataset.vocab_size and len(dataset.train) == 1000
        (folder / name).write_bytes(whole)
    data.load(folder)


def test_files_beyond_the_hash_limit_are_checked_at_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FULL_HASH_LIMIT", 1 << 20)
    folder = write(tmp_path / "ds", byte_tokenizer(), np.arange(2_000_000) % 256, np.arange(100))
    data.load(folder)
    flip(folder / "train.bin", 100)
    with pytest.raises(UserError, match="sha256_ends"):
        data.load(folder)
    flip(folder / "train.bin", 100)
    flip(folder / "train.bin", 3_999_999)
    with pytest.raises(UserError, match="sha256_ends"):
        data.load(folder)


def test_no_dataset(tmp_path):
    with pytest.raises(UserError, match="there is no dataset .*nothing.*prepare"):
        data.load(tmp_path / "nothing")
    for name in ("plays", "poems"):
        write(tmp_path / name, byte_tokenizer(), np.arange(100), np.arange(100))
    with pytest.raises(UserError, match="did you mean 'plays'"):
        data.load(tmp_path / "play")
    with pytest.raises(UserError, match="there is plays, poems$"):
        data.load(tmp_path / "nothing")


@pytest.mark.parametrize("split", data.SPLITS)
def test_a_mask_that_hides_every_token_is_refused(tmp_path, split):
    mask = np.zeros(300)
    mask[0] = 1  # the first token is never predicted
    write(tmp_path / "ds", byte_tokenizer(), np.arange(300) % 256, np.arange(300) % 256, **{f"{split}_mask": mask})
    with pytest.raises(UserError, match=f"{split}.mask.bin masks out every token"):
        data.load(tmp_path / "ds")
    mask[150] = 1
    write(tmp_path / "ds", byte_tokenizer(), np.arange(300) % 256, np.arange(300) % 256, **{f"{split}_mask": mask})
    data.load(tmp_path / "ds")


def test_loading_needs_no_tokenizers_library(tmp_path):
    folder = write(tmp_path / "ds", byte_tokenizer(), np.arange(100), np.arange(100))
    code = f"import sys; from thimble import data; data.load({str(folder)!r}); "
    code += "assert not {'tokenizers', 'torch'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_what_is_synced_is_all_that_was_written(tmp_path, monkeypatch):
    """A sync of a file whose end is still in a buffer keeps half of it."""
    synced = {}  # name -> size of the file when it was synced
    sync = os.fsync

    def record(descriptor):
        synced[os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))] = os.fstat(descriptor).st_size
        sync(descriptor)
    monkeypatch.setattr(os, "fsync", record)
    folder = write(tmp_path / "ds", byte_tokenizer(), np.arange(50), np.arange(50), train_mask=np.ones(50))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert len(sizes) == 7 and {name: synced[name] for name in sizes} == sizes


def test_training_refuses_an_id_equal_to_the_vocabulary(tmp_path, monkeypatch):
    """In the middle of a large file, where loading does not look; one below it is fine."""
    monkeypatch.setattr(data, "MB", 1000)
    monkeypatch.setattr(data, "FULL_HASH_LIMIT", 2000)
    for name in ("train.bin", "val.bin"):
        folder = write(tmp_path / name, byte_tokenizer(), np.arange(5000) % 256, np.arange(5000) % 256)
        cfg = configurator.load(train.Config, dataset=str(folder), batch_size=310, max_steps=1, block_size=16,
                                n_layer=1, n_embd=16, n_head=2, device="cpu", dtype="float32", eval_every=1)
        edit_middle(folder, name, 256, 2500)
        assert train.train(replace(cfg, out_dir=str(tmp_path / f"good {name}")))["step"] == 1
        edit_middle(folder, name, 257, 2500)
        with pytest.raises(UserError, match=f"{name} holds the id 257 at token 2,500, the vocabulary has 257 ids"):
            train.train(replace(cfg, out_dir=str(tmp_path / f"bad {name}")))


def test_the_folder_of_datasets_is_made_where_it_is_missing(tmp_path):
    for _ in range(2):
        assert data.new_folder(tmp_path / "a" / "b", "name") == tmp_path / "a" / "b" / "name"
        assert (tmp_path / "a" / "b").is_dir() and not (tmp_path / "a" / "b" / "name").exists()
