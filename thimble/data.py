"""Datasets on disk, and batches as a pure function of (seed, step).

    >>> dataset = data.load("data/shakespeare_char")                    # checked: sizes, hashes, ids
    >>> x, y = data.batch(dataset.train, step=0, batch_size=12, block_size=64, seed=1337)
    >>> dataset.tokenizer().decode(x[0])

A dataset is a folder that any of the scripts in prepare/ writes:

    train.bin, val.bin              flat little-endian uint16, or uint32 when the vocabulary exceeds 65,535
    train.mask.bin, val.mask.bin    optional, uint8: 1 where a token counts in the loss
    tokenizer.json                  a Hugging Face `tokenizers` file, whatever the kind of tokenizer
    meta.json                       everything else; written last. With a row_length, each row is an example of its own
"""

import errno
import functools
import glob
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thimble.configurator import hint
from thimble.files import UserError, remove, replace_folder
from thimble.tokenizer import load_tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "val")
MB = 1 << 20
FULL_HASH_LIMIT = 64 * MB  # beyond this, loading hashes only the first and the last MB of a file, to stay instant
# every key of meta.json and the type of its value; a dict stands for {split: int}
META_KEYS = {
    "format_version": int, "dtype": str, "vocab_size": int, "tokens": dict, "bytes": dict, "documents": dict,
    "source": str, "tokenizer": str, "baselines": dict, "options": dict, "files": dict,
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# loading


@dataclass(frozen=True)
class Dataset:
    path: Path
    meta: dict
    vocab_size: int
    train: np.ndarray  # (n,) read-only memmap of token ids
    val: np.ndarray
    train_mask: np.ndarray | None
    val_mask: np.ndarray | None

    @property
    def val_bytes(self):
        """Bytes of UTF-8 text that the val tokens stand for (an end-of-text token stands for none)."""
        return self.meta["bytes"]["val"]

    @property
    def row_length(self):
        """Tokens of a row, where each row is an example of its own and batches must not cut across; 0: running text."""
        return self.meta.get("row_length", 0)

    def bytes_per_token(self, split):
        """Of UTF-8 text, per token that counts in the loss (an end-of-text token stands for no byte)."""
        mask = getattr(self, f"{split}_mask")
        n = self.meta["tokens"][split] if mask is None else np.count_nonzero(mask)
        return self.meta["bytes"][split] / n

    def tokenizer(self):
        tokenizer = load_tokenizer(self.path)
        if tokenizer.vocab_size != self.vocab_size:
            raise UserError(
                f"{self.path / 'tokenizer.json'} has {tokenizer.vocab_size} ids, meta.json says vocab_size "
                f"{self.vocab_size}: run the prepare script again"
            )
        return tokenizer


def load(path):
    """Open the dataset folder `path` after checking it; raises UserError naming the file, the fault and the remedy.

    A file up to 64 MB is hashed whole and all its ids are compared with the vocabulary; of a larger one, the size and
    the first and last MB are checked.
    """
    path = Path(path)
    if not path.is_dir():
        there = sorted(file.parent.name for file in path.parent.glob("[!.]*/train.bin"))
        raise UserError(
            f"there is no dataset {path}: make it with a script in prepare/, e.g. prepare/text.py"
            f"{hint(path.name, there)}"
        )
    meta = _read_meta(path / "meta.json")
    dtype, vocab_size, arrays = np.dtype(meta["dtype"]).newbyteorder("<"), meta["vocab_size"], {}
    for name, entry in meta["files"].items():
        file = path / name
        if not file.is_file():
            raise _damaged(file, "is missing")
        size = file.stat().st_size
        if size != entry["size"]:
            raise _damaged(file, f"has {size:,} bytes, meta.json says {entry['size']:,}")
        if not name.endswith(".bin"):
            if hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
                raise _damaged(file, "does not match its sha256 in meta.json")
            continue
        split, is_mask = name.split(".")[0], ".mask." in name
        itemsize = 1 if is_mask else dtype.itemsize
        if size != meta["tokens"][split] * itemsize:
            raise _damaged(
                file, f"has {size:,} bytes, but {meta['tokens'][split]:,} tokens of {itemsize} bytes are expected"
            )
        array = np.memmap(file, np.uint8 if is_mask else dtype, mode="r")
        key = "sha256" if size <= FULL_HASH_LIMIT else "sha256_ends"
        if _hash_ends(array) != entry.get(key):
            raise _damaged(file, f"does not match its {key} in meta.json")
        # the hash says the file is as written; that its ids fit the vocabulary depends on meta.json, which has no hash
        part = array if size <= FULL_HASH_LIMIT else np.concatenate([array[:MB], array[-MB:]])
        top, limit = int(part.max()), 2 if is_mask else vocab_size
        if top >= limit:
            raise _damaged(file, f"holds the value {top:,}, which must be below {limit:,}")
        arrays[split, is_mask] = array
        if is_mask and not array[1:].any():  # the first token is never a target
            raise UserError(f"{file} lets no token count: prepare it again with a 1 where the loss is to be taken")
    masks = arrays.get(("train", True)), arrays.get(("val", True))
    return Dataset(path, meta, vocab_size, arrays["train", False], arrays["val", False], *masks)


def _damaged(file, fault):
    return UserError(f"{file} {fault}: run the prepare script that made it again")


def _read_meta(file):
    def reject(constant):
        raise ValueError(f"{constant} is no number")

    try:
        meta = json.loads(file.read_bytes().decode(), parse_constant=reject)
    except FileNotFoundError:
        raise _damaged(file, "is missing") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"is not valid JSON ({str(error)[:100]})") from None
    if not isinstance(meta, dict):
        raise _damaged(file, "holds no JSON object")
    if meta.get("format_version") != FORMAT_VERSION:
        fault = f"has format_version {meta.get('format_version')!r}, this version of data.py reads {FORMAT_VERSION}"
        raise _damaged(file, fault)
    for key, kind in META_KEYS.items():
        if type(meta.get(key)) is not kind:  # not isinstance: True is an int to Python
            raise _damaged(file, f"needs a key {key!r} of type {kind.__name__}, has {meta.get(key)!r:.60}")
    for key in ("tokens", "bytes", "documents"):
        for split in SPLITS:
            value = meta[key].get(split)
            if type(value) is not int or value < (key == "tokens"):
                raise _damaged(file, f"needs a number in {key}.{split}, has {value!r:.60}")
    if not all(type(value) in (int, float) for value in meta["baselines"].values()):
        raise _damaged(file, f"needs numbers in baselines, has {meta['baselines']!r:.60}")
    if type(meta.get("row_length", 0)) is not int or meta.get("row_length", 0) < 0:
        raise _damaged(file, f"has row_length {meta['row_length']!r:.60}")
    if meta["dtype"] not in ("uint16", "uint32"):
        raise _damaged(file, f"has dtype {meta['dtype']!r:.60}, which must be uint16 or uint32")
    if not 0 < meta["vocab_size"] <= 2**32:
        raise _damaged(file, f"has vocab_size {meta['vocab_size']}")
    allowed = {"train.bin", "val.bin", "tokenizer.json", "train.mask.bin", "val.mask.bin"}
    required = {"train.bin", "val.bin", "tokenizer.json"}
    if not required <= set(meta["files"]) <= allowed:
        raise _damaged(file, f"lists the files {sorted(meta['files'])!r:.200}, not the files of a dataset")
    for name, entry in meta["files"].items():
        if not isinstance(entry, dict) or type(entry.get("size")) is not int or type(entry.get("sha256")) is not str:
            raise _damaged(file, f"needs size and sha256 of {name}, has {entry!r:.60}")
    return meta


def _hash_ends(array):
    """sha256 of a whole array of up to 64 MB, else of its first and last MB."""
    view = array.view(np.uint8)
    if view.size <= FULL_HASH_LIMIT:
        return hashlib.sha256(view).hexdigest()
    return hashlib.sha256(view[:MB].tobytes() + view[-MB:].tobytes()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# batches


@functools.lru_cache(maxsize=4)
def _epoch(seed, epoch, n_windows, stride, slack):
    rng = np.random.default_rng((seed % 2**64, epoch))
    offset = rng.integers(slack)
    return rng.permutation(n_windows) * stride + offset


def batch_indices(n_tokens, step, batch_size, block_size, seed, rows=False):
    """Where the windows of batch `step` start: (batch_size,) int64, a pure function of the arguments.

    A window is block_size + 1 tokens: the inputs and, one further, the targets. An epoch is a random order of the
    windows that stand block_size apart (so that each token is a target once), all shifted by one random offset. Batches
    run on across the end of an epoch; its short rest at either end of the split gets its turn under another offset.
    With `rows` there is no offset: each window is one of the split's rows of block_size.
    """
    if n_tokens < block_size + 1:
        raise UserError(
            f"the split has {n_tokens:,} tokens, a window needs block_size + 1 = {block_size + 1:,}: use a smaller "
            "block_size or more text"
        )
    n_windows = max(1, (n_tokens - block_size) // block_size)  # as many as fit under every offset
    slack = min(block_size, n_tokens - n_windows * block_size)
    if rows:
        n_windows, slack = (n_tokens - 1) // block_size, 1
    starts, done = [], 0
    while done < batch_size:
        epoch, at = divmod(step * batch_size + done, n_windows)
        starts.append(_epoch(seed, epoch, n_windows, block_size, slack)[at : at + batch_size - done])
        done += len(starts[-1])
    return starts[0] if len(starts) == 1 else np.concatenate(starts)


def batch(tokens, step, batch_size, block_size, seed, mask=None, row_length=0):
    """Batch `step`: (x, y), int64 (batch_size, block_size); y is x one further, -1 where `mask` is 0.

    Rows of a fixed length end in padding: what all of a batch have of it is cut off, down to a multiple of 32.
    """
    if row_length and row_length != block_size:
        raise UserError(f"the dataset has rows of {row_length} tokens: train with --block_size={row_length}")
    starts = batch_indices(len(tokens), step, batch_size, block_size, seed, rows=row_length > 0)
    at = starts[:, None] + np.arange(block_size + 1)
    window = np.asarray(tokens)[at].astype(np.int64)
    x, y = window[:, :-1].copy(), window[:, 1:].copy()
    if mask is not None:
        y[np.asarray(mask)[at[:, 1:]] == 0] = -1
    if row_length:
        used = np.flatnonzero((y >= 0).any(0)).max(initial=0) + 1
        x, y = x[:, : -(-used // 32) * 32], y[:, : -(-used // 32) * 32]
    return x, y


def eval_windows(tokens, block_size, batch_size, mask=None):
    """Yield (x, y) over the whole split, int64 (<= batch_size, block_size): each token but the first is a target once.

    The last window is filled up with target -1.
    """
    tokens, n_targets = np.asarray(tokens), len(tokens) - 1
    if n_targets < 1:
        raise UserError(f"the split has {len(tokens)} tokens, at least 2 are needed to predict one")
    span = batch_size * block_size
    for start in range(0, n_targets, span):
        n = min(span, n_targets - start)
        rows = -(-n // block_size)
        x, y = np.zeros((2, rows * block_size), np.int64)
        x[:n], y[:n] = tokens[start : start + n], tokens[start + 1 : start + n + 1]
        y[n:] = -1
        if mask is not None:
            y[:n][np.asarray(mask)[start + 1 : start + n + 1] == 0] = -1
        yield x.reshape(rows, block_size), y.reshape(rows, block_size)


# ----------------------------------------------------------------------------------------------------------------------
# writing


class Writer:
    """Writes a dataset into a temporary folder beside `path` and, if all went well, renames it into place.

        with data.Writer("data/mine", tokenizer, source="...") as out:
            out.append("train", ids, n_bytes=len(text.encode()), documents=1)
            out.append("val", ...)
            out.meta["baselines"] = {...}

    Whenever the process dies, a dataset that was there before still is, and no half dataset looks like one.
    """

    def __init__(self, path, tokenizer, source, options=None, baselines=None):
        self.path, self.tokenizer = Path(path).absolute(), tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_535 else "<u4")
        self.meta = {
            "format_version": FORMAT_VERSION, "dtype": self.dtype.name, "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.kind, "source": source,
            "tokens": dict.fromkeys(SPLITS, 0), "bytes": dict.fromkeys(SPLITS, 0),
            "documents": dict.fromkeys(SPLITS, 0), "baselines": baselines or {}, "options": options or {},
        }  # fmt: skip

    def __enter__(self):
        _remove_stale(self.path)
        self.tmp = self.path.parent / f".{self.path.name}.tmp-{os.getpid()}"
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tmp.mkdir(parents=True)
        self.files, self.hashes = {}, {}
        return self

    def append(self, split, ids, n_bytes, documents=0, mask=None):
        """Append ids (any integers) that stand for `n_bytes` bytes of text, and their mask (0 or 1) if there is one."""
        ids = np.asarray(ids)
        if ids.size and not (0 <= int(ids.min()) and int(ids.max()) < self.tokenizer.vocab_size):
            bad = int(ids.min()) if ids.min() < 0 else int(ids.max())  # a cast would wrap it, silently
            raise UserError(f"token id {bad:,} is outside the vocabulary of {self.tokenizer.vocab_size:,} ids")
        self._write(f"{split}.bin", ids.astype(self.dtype))
        if mask is not None:
            if len(mask) != len(ids):
                raise UserError(f"a mask of {len(mask):,} for {len(ids):,} tokens")
            self._write(f"{split}.mask.bin", np.asarray(mask, bool).astype(np.uint8))
        self.meta["tokens"][split] += len(ids)
        self.meta["bytes"][split] += n_bytes
        self.meta["documents"][split] += documents

    def _write(self, name, array):
        if name not in self.files:
            self.files[name], self.hashes[name] = open(self.tmp / name, "wb"), hashlib.sha256()
        block = array.tobytes()
        self.files[name].write(block)
        self.hashes[name].update(block)

    def __exit__(self, kind, error, _):
        try:
            if kind is None:
                self._finish()
        except OSError as full:
            error = full
            raise self._explain(full) from None
        finally:
            for file in self.files.values():
                try:
                    file.close()
                except OSError:  # the disk is full; that has been said
                    pass
            shutil.rmtree(self.tmp, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._explain(error) from None

    def _explain(self, error):
        if error.errno != errno.ENOSPC:
            return error
        return UserError(f"the disk is full: {self.path} was not written; make room or give another --data_dir")

    def _finish(self):
        for split in SPLITS:
            if not self.meta["tokens"][split]:
                raise UserError(f"{self.path}: the {split} split would be empty")
        self._write("tokenizer.json", np.frombuffer(self.tokenizer.to_json().encode(), np.uint8))
        entries = self.meta["files"] = {}
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
            entries[name] = {"size": size, "sha256": self.hashes[name].hexdigest()}
            if name.endswith(".bin") and size > FULL_HASH_LIMIT:
                entries[name]["sha256_ends"] = _hash_ends(np.memmap(self.tmp / name, np.uint8, mode="r"))
        with open(self.tmp / "meta.json", "w", encoding="utf-8") as file:
            json.dump(self.meta, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        old = self.path.parent / f".{self.path.name}.old-{os.getpid()}"
        replace_folder(self.tmp, self.path, trash=old)
        remove(old)


def _remove_stale(path):
    """Clean up after processes that died while they wrote `path`."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*-*"):
        kind, _, pid = folder.name.removeprefix(f".{path.name}.").partition("-")
        if kind not in ("tmp", "old") or not pid.isdigit() or _alive(int(pid)):
            continue
        if kind == "old" and not path.exists():
            folder.rename(path)  # it died between the two renames
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid):
    if os.name != "posix":
        return True  # there, signal 0 would interrupt the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
