"""Datasets on disk, and batches as a pure function of (seed, step).

    >>> dataset = data.load("data/shakespeare_char")                    # checked: sizes, hashes, ids
    >>> x, y = data.batch(dataset.train, step=0, batch_size=12, block_size=64, seed=1337)
    >>> dataset.tokenizer().decode(x[0])

A dataset is a folder that any of the scripts in prepare/ writes:

    train.bin, val.bin              flat little-endian uint16, or uint32 when the vocabulary exceeds 65,535
    train.mask.bin, val.mask.bin    optional, uint8: 1 where a token counts in the loss
    tokenizer.json                  a Hugging Face `tokenizers` file, whatever the kind of tokenizer
    tokenizer_config.json, ...      how a model of it is spoken to: see thimble/chat.py
    meta.json                       everything else; written last. With a row_length, each row is a separate example
"""
import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thimble import chat
from thimble.configurator import hint
from thimble.files import UserError, remove, replace_folder, write_synced
from thimble.tokenizer import load_tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "val")
DATA_DIR = Path(__file__).resolve().parent.parent / "data"  # where datasets live, unless told otherwise
MB = 1 << 20
FULL_HASH_LIMIT = 64 * MB  # of a larger file, loading hashes only the first and the last MB, to stay instant

MIN_TOKENS = 2  # of a split: one to predict from and one to predict

# what meta.json must hold, and the type of each value
META_TYPES = {"format_version": int, "dtype": str, "vocab_size": int, "source": str, "tokenizer": str, "files": dict,
              "tokens": dict, "bytes": dict, "documents": dict, "baselines": dict, "options": dict}
LEAST = {"tokens": MIN_TOKENS, "bytes": 1, "documents": 0}  # of each split
BASELINES = ("uniform", "unigram", "bigram", "trigram")
REQUIRED_FILES = {"train.bin", "val.bin", "tokenizer.json"}
MASK_FILES = {"train.mask.bin", "val.mask.bin"}
OPTIONAL_FILES = MASK_FILES | set(chat.FILES)
ALL_FILES = REQUIRED_FILES | OPTIONAL_FILES | {"meta.json"}  # a folder that holds others is not only a dataset


# ---- loading
@dataclass(frozen=True)
class Dataset:
    path: Path                      # the folder
    meta: dict                      # what its meta.json says
    vocab_size: int                 # of the tokenizer, the end-of-text token included
    train: np.ndarray               # (n,) token ids, a read-only memmap
    val: np.ndarray                 # (n,) likewise
    train_mask: np.ndarray | None   # (n,) uint8; None: every token counts in the loss
    val_mask: np.ndarray | None     # (n,) likewise

    @property
    def row_length(self):
        """Tokens in a row, where each row is a separate example that no batch may cut across; 0: running text."""
        return self.meta.get("row_length", 0)

    def bytes_per_token(self, split):
        """Bytes of UTF-8 text per token that counts in the loss (an end-of-text token stands for no byte)."""
        mask = getattr(self, f"{split}_mask")
        n = self.meta["tokens"][split] if mask is None else np.count_nonzero(mask)
        return self.meta["bytes"][split] / n

    def tokenizer(self):
        """The Tokenizer that the ids were made with."""
        return load_tokenizer(self.path)


def folder_of(name):
    """The folder `name` if there is one, else data/NAME in the project."""
    folder = Path(name)
    return folder if folder.is_dir() else DATA_DIR / name


def name_of(folder):
    """What --dataset needs to find the folder: its name if it lies in DATA_DIR, else its path."""
    return folder.name if folder.absolute().parent == DATA_DIR else str(folder)


def load(path):
    """Open the dataset folder `path` after checking it; UserError names the file, the fault and the remedy.

    Files of up to 64 MB are hashed whole and every id is compared with the vocabulary; of a larger file, the size and
    the first and last MB are checked, and the ids between them as they are read.
    """
    path = Path(path)
    if not path.is_dir():
        # a name with a dot in front is somebody's temporary folder
        others = sorted(file.parent.name for file in path.parent.glob("[!.]*/train.bin"))
        raise UserError(f"there is no dataset {path}: make it with a script in prepare/, e.g. prepare/text.py"
                        f"{hint(path.name, others)}")
    meta = _read_meta(path / "meta.json")
    arrays = {}
    for name, entry in meta["files"].items():
        # the size first: it costs nothing and gives the clearer message where a copy broke off
        file = path / name
        if not file.is_file():
            raise _damaged(file, "is missing")
        size = file.stat().st_size
        if size != entry["size"]:
            raise _damaged(file, f"has {size:,} bytes, meta.json says {entry['size']:,}")
        if name == "tokenizer.json":
            _check_tokenizer(file, entry, meta["vocab_size"])
        elif name in chat.FILES:
            _check_sha256(file, entry)
        elif name in MASK_FILES:
            arrays[name] = _open_mask(file, meta, entry)
        else:
            dtype = np.dtype(meta["dtype"]).newbyteorder("<")  # on any machine
            arrays[name] = _open_array(file, meta, entry, dtype, limit=meta["vocab_size"])
    return Dataset(path, meta, meta["vocab_size"], arrays["train.bin"], arrays["val.bin"],
                   arrays.get("train.mask.bin"), arrays.get("val.mask.bin"))


def _check_sha256(file, entry):
    """The bytes of a file; UserError if it is not as it was written."""
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise _damaged(file, "does not match its sha256 in meta.json")
    return content


def _check_tokenizer(file, entry, vocab_size):
    """UserError unless tokenizer.json is as it was written and has `vocab_size` ids, which size a model's embedding."""
    content = _check_sha256(file, entry)
    # read as plain JSON: importing the tokenizers library takes longer than all the rest of loading
    try:
        parsed = json.loads(content)
        vocab = parsed["model"]["vocab"]
        ids = [token["id"] for token in parsed["added_tokens"]]
        # a unigram model has a list, whose places are the ids; the others {token: id}
        ids += vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        n_ids = max(ids) + 1
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _damaged(file, "is not a tokenizer.json") from None
    if n_ids != vocab_size:
        raise _damaged(file, f"has {n_ids:,} ids, meta.json says vocab_size {vocab_size:,}")


def _open_array(file, meta, entry, dtype, limit):
    """A memmap of `file` (size checked already), one value below `limit` for each token of its split."""
    split = file.name.split(".")[0]  # of train.bin or train.mask.bin
    n_tokens = meta["tokens"][split]
    if entry["size"] != n_tokens * dtype.itemsize:
        raise _damaged(file, f"has {entry['size']:,} bytes, but {n_tokens:,} tokens of {dtype.itemsize} bytes are "
                             "expected")
    array = np.memmap(file, dtype, mode="r")
    whole = entry["size"] <= FULL_HASH_LIMIT
    key = "sha256" if whole else "sha256_ends"
    if _hash_ends(array) != entry.get(key):
        raise _damaged(file, f"does not match its {key} in meta.json")
    # the hash shows that the file is as it was written; but vocab_size is in meta.json, which has no hash
    part = array if whole else np.concatenate([array[:MB], array[-MB:]])
    top = int(part.max())
    if top >= limit:
        raise _damaged(file, f"holds the value {top:,}, which must be below {limit:,}")
    return array


def _open_mask(file, meta, entry):
    mask = _open_array(file, meta, entry, np.dtype(np.uint8), limit=2)
    if not mask[1:].any():  # the first token is never a target
        raise UserError(f"{file} masks out every token: prepare it again with a 1 where the loss is to be taken")
    return mask


def _hash_ends(array):
    """sha256 of a whole array of up to 64 MB; of a larger one, of its first and last MB."""
    view = array.view(np.uint8)  # bytes, whatever the dtype
    if view.size <= FULL_HASH_LIMIT:
        return hashlib.sha256(view).hexdigest()
    return hashlib.sha256(view[:MB].tobytes() + view[-MB:].tobytes()).hexdigest()


def _damaged(file, fault):
    return UserError(f"{file} {fault}: run the prepare script that made it again")


# ---- meta.json
def _read_meta(file):
    def reject(constant):  # NaN and Infinity, which Python would read although they are not JSON
        raise ValueError(f"{constant} is not a number")

    try:
        meta = json.loads(file.read_bytes().decode(), parse_constant=reject)
    except FileNotFoundError:
        raise UserError(f"{file} is missing, so the folder is not a dataset: move it away and run the prepare script "
                        "that made it again") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"is not valid JSON ({str(error)[:100]})") from None
    fault = _fault_of(meta)
    if fault:
        raise _damaged(file, fault)
    return meta


def _fault_of(meta):
    """What is wrong with the content of a meta.json, or None. After this, no key of it needs a check."""
    if not isinstance(meta, dict):
        return "does not hold a JSON object"
    if meta.get("format_version") != FORMAT_VERSION:
        return f"has format_version {meta.get('format_version')!r:.60}, this version of data.py reads {FORMAT_VERSION}"
    # whoever copies or edits a meta.json by hand gets a line about it, not a KeyError somewhere in training
    for key, kind in META_TYPES.items():
        if type(meta.get(key)) is not kind:  # not isinstance: True is an int to Python
            return f"needs a key {key!r} of type {kind.__name__}, has {meta.get(key)!r:.60}"
    if meta["dtype"] not in ("uint16", "uint32"):
        return f"has dtype {meta['dtype']!r:.60}, which must be uint16 or uint32"
    if not 0 < meta["vocab_size"] <= 2**32:
        return f"has vocab_size {meta['vocab_size']!r:.60}, which must be from 1 to 2^32"
    for key, least in LEAST.items():
        for split in SPLITS:
            value = meta[key].get(split)
            # 2^63: larger ones overflow once they are divided
            if type(value) is not int or not least <= value < 2**63:
                return f"needs a number of at least {least} in {key}.{split}, has {value!r:.60}"
    for name in (*BASELINES, *meta["baselines"]):
        value = meta["baselines"].get(name)
        if not _is_number(value, most=100):
            return f"needs bits per byte from 0 to 100 in baselines.{name:.60}, has {value!r:.60}"
    overlap = meta.get("overlap_13gram")
    if overlap is not None and not _is_number(overlap, most=1):
        return f"has overlap_13gram {overlap!r:.60}, which must be a share from 0 to 1 or null"
    # exact names, so that no entry can point out of the folder
    if not REQUIRED_FILES <= set(meta["files"]) <= REQUIRED_FILES | OPTIONAL_FILES:
        return f"lists the files {sorted(meta['files'])!r:.200}, which are not those of a dataset"
    for name, entry in meta["files"].items():
        size = entry.get("size") if isinstance(entry, dict) else None
        if type(size) is not int or not 0 <= size < 2**63 or type(entry.get("sha256")) is not str:
            return f"needs size and sha256 of {name}, has {entry!r:.60}"
    return _fault_of_rows(meta)


def _fault_of_rows(meta):
    """What is wrong with the keys that only a dataset of conversations has, or None."""
    row_length = meta.get("row_length", 0)
    if type(row_length) is not int or row_length < 0:
        return f"has row_length {row_length!r:.60}, which must be a whole number"
    if not row_length and "template" not in meta:  # running text
        return None
    templates = (*chat.TEMPLATES, chat.OWN)
    if not row_length or meta.get("template") not in templates:
        return (f"has row_length {row_length!r:.60} and template {meta.get('template')!r:.60}: rows of conversations "
                f"need both, the template one of {', '.join(templates)}")
    for split in SPLITS:
        n_tokens = meta["tokens"][split] - 1  # one stands behind the last row
        if n_tokens % row_length:
            return f"has row_length {row_length!r:.60}, which does not divide the {n_tokens:,} tokens of {split}"
    return None


def _is_number(value, most):
    """Whether it is a number from 0 to `most`; NaN is not, and neither is true."""
    return type(value) in (int, float) and 0 <= value <= most


# ---- batches
def batch(tokens, step, batch_size, block_size, seed, mask=None, row_length=0, vocab_size=None):
    """Batch `step`: (x, y), int64 (batch_size, block_size); y is x shifted by one, -1 where `mask` is 0.

    UserError if an id is not below `vocab_size`.
    Rows of a fixed length end in padding: the part of it that all rows of a batch share is cut off, which leaves a
    multiple of 32 tokens.
    """
    if row_length and row_length != block_size:
        raise UserError(f"the dataset has rows of {row_length} tokens: train with --block_size={row_length}")
    starts = batch_indices(len(tokens), step, batch_size, block_size, seed, rows=row_length > 0)
    at = starts[:, None] + np.arange(block_size + 1)  # (batch_size, block_size + 1)
    windows = np.asarray(tokens)[at].astype(np.int64)  # the only read from the disk
    _check_ids(tokens, windows, at, vocab_size)
    x = windows[:, :-1].copy()  # copies: callers may write into them
    y = windows[:, 1:].copy()
    if mask is not None:
        y[np.asarray(mask)[at[:, 1:]] == 0] = -1
    if row_length:
        used = np.flatnonzero((y >= 0).any(0)).max(initial=0) + 1  # up to the last target of any row
        width = -(-used // 32) * 32  # rounded up, so that there are few different shapes
        x, y = x[:, :width], y[:, :width]
    return x, y


def _check_ids(tokens, ids, at, vocab_size):
    """UserError if any of the `ids`, which stand `at` these places in `tokens`, is not below vocab_size (None: any)."""
    if vocab_size is None or ids.max() < vocab_size:
        return
    # reached in files above 64 MB, of which load looks at both ends alone
    worst = ids.argmax()
    file = getattr(tokens, "filename", "the split")  # a memmap knows its file
    raise _damaged(file, f"holds the id {ids.flat[worst]:,} at token {at.flat[worst]:,}, the vocabulary has "
                         f"{vocab_size:,} ids")


def batch_indices(n_tokens, step, batch_size, block_size, seed, rows=False):
    """Where the windows of batch `step` start: (batch_size,) int64, a pure function of the arguments.

    A window is block_size + 1 tokens: the inputs and, shifted by one, the targets. An epoch is a random order of
    windows that lie block_size apart, so that each token is a target once, all shifted by one random offset. A batch
    may run across the end of an epoch. The tokens left over at either end of the split are reached in other epochs,
    whose offset is another. With `rows` there is no offset: each window is one of the split's rows of block_size.
    """
    if n_tokens < block_size + 1:
        raise UserError(f"the split has {n_tokens:,} tokens, a window needs block_size + 1 = {block_size + 1:,}: use a "
                        "smaller block_size or more text")
    if rows:
        n_windows = (n_tokens - 1) // block_size  # one token stands behind the last row, as its last target
        n_offsets = 1
    else:
        n_windows = max(1, (n_tokens - block_size) // block_size)  # as many as fit under every offset
        n_offsets = min(block_size, n_tokens - n_windows * block_size)
    starts = []
    done = 0
    while done < batch_size:
        # windows are numbered through all epochs, so no state is needed to resume at any step
        epoch, first = divmod(step * batch_size + done, n_windows)
        order = _epoch(seed, epoch, n_windows, block_size, n_offsets)
        starts.append(order[first:first + batch_size - done])
        done += len(starts[-1])
    return np.concatenate(starts)


@functools.lru_cache(maxsize=4)
def _epoch(seed, epoch, n_windows, stride, n_offsets):
    """The starts of one epoch's windows in the order in which they are read. Cached: every batch asks for it."""
    rng = np.random.default_rng((seed % 2**64, epoch))  # numpy takes no negative seeds
    offset = rng.integers(n_offsets)
    return rng.permutation(n_windows) * stride + offset


def eval_windows(tokens, block_size, batch_size, mask=None, vocab_size=None):
    """Yield (x, y) over the whole split, int64 (<= batch_size, block_size): each token but the first is a target once.

    The last window is filled up with targets of -1. UserError if an id is not below `vocab_size`.
    """
    n_targets = len(tokens) - 1
    if n_targets < 1:
        raise UserError(f"the split has {len(tokens)} tokens, at least 2 are needed to predict one")
    span = batch_size * block_size
    for start in range(0, n_targets, span):
        n = min(span, n_targets - start)
        n_rows = -(-n // block_size)  # rounded up
        x = np.zeros(n_rows * block_size, np.int64)
        y = np.full(n_rows * block_size, -1, np.int64)
        span_ids = np.asarray(tokens[start:start + n + 1])
        _check_ids(tokens, span_ids, np.arange(start, start + n + 1), vocab_size)
        x[:n] = span_ids[:-1]
        y[:n] = span_ids[1:]
        if mask is not None:
            y[:n][np.asarray(mask)[start + 1:start + n + 1] == 0] = -1
        yield x.reshape(n_rows, block_size), y.reshape(n_rows, block_size)


# ---- writing
def new_folder(data_dir, name):
    """Where a prepare script is to write the dataset `name`. UserError, before any work, if it could not."""
    if not re.fullmatch(r"\w[\w.+-]{0,99}", name):
        raise UserError(f"--name={name!r:.120} must be a plain name of at most 100 letters, digits, '_', '-', '.'")
    folder = Path(data_dir).expanduser() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(folder.parent, os.W_OK):
        raise UserError(f"{folder.parent} cannot be written to: choose another --data_dir")
    _check_replaceable(folder)
    return folder


def _check_replaceable(path):
    """UserError if what stands at `path` is anything but a dataset, whole or damaged: replacing it would delete it."""
    if not os.path.lexists(path) or _is_dataset(path):
        return
    foreign = _foreign(path)
    reason = f"it holds {', '.join(foreign[:3])}" if foreign else "it lacks a meta.json or any .bin file"
    raise UserError(f"{path} is not a dataset ({reason}), so it is not replaced: move it away or choose another --name")


def _is_dataset(path):
    """Whether it is a folder of a dataset's files and of nothing else; some may be missing or damaged."""
    return not _foreign(path) and (path / "meta.json").exists() and any(path.glob("*.bin"))


def _foreign(path):
    """The names in a folder that are not those of a dataset's files; of anything but a folder, its own name."""
    if not path.is_dir():
        return [path.name]
    return sorted(item.name for item in path.iterdir() if item.name not in ALL_FILES or not item.is_file())


class Writer:
    """Writes a dataset into a temporary folder beside `path` and, if all went well, renames it into place.

        with data.Writer("data/mine", tokenizer, source="...") as out:
            out.append("train", ids, n_bytes=len(text.encode()), documents=1)
            out.append("val", ...)
            out.meta["baselines"] = {...}

    Whenever the process dies, an earlier dataset is still whole, and an unfinished one is never taken for a dataset.
    Only a dataset is ever replaced: UserError if anything else stands at `path`.
    """

    def __init__(self, path, tokenizer, source, options=None, baselines=None):
        self.path = Path(path).absolute()
        self.tokenizer = tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_535 else "<u4")
        self.meta = {"format_version": FORMAT_VERSION, "dtype": self.dtype.name, "vocab_size": tokenizer.vocab_size,
                     "tokenizer": tokenizer.kind, "source": source, "tokens": dict.fromkeys(SPLITS, 0),
                     "bytes": dict.fromkeys(SPLITS, 0), "documents": dict.fromkeys(SPLITS, 0),
                     "baselines": baselines or {}, "options": options or {}}

    def __enter__(self):
        _remove_stale(self.path)
        _check_replaceable(self.path)
        self.temporary = self.path.parent / f".{self.path.name}.tmp-{os.getpid()}"
        self.temporary.mkdir(parents=True)
        self.files = {}  # name -> open file
        self.hashes = {}  # name -> sha256 of what was written so far
        return self

    def append(self, split, ids, n_bytes, documents=0, mask=None):
        """Append ids (any integers) that stand for `n_bytes` bytes of text, and their mask (0 or 1) if there is one."""
        ids = np.asarray(ids)
        if ids.size:
            # a cast to uint16 would wrap such ids silently
            for i in (int(ids.min()), int(ids.max())):
                if not 0 <= i < self.tokenizer.vocab_size:
                    raise UserError(f"token id {i:,} is outside the vocabulary of {self.tokenizer.vocab_size:,} ids")
        self._write(f"{split}.bin", ids.astype(self.dtype))
        if mask is not None:
            if len(mask) != len(ids):
                raise UserError(f"a mask of {len(mask):,} values does not fit {len(ids):,} tokens")
            self._write(f"{split}.mask.bin", np.asarray(mask, bool).astype(np.uint8))
        self.meta["tokens"][split] += len(ids)
        self.meta["bytes"][split] += n_bytes
        self.meta["documents"][split] += documents

    def _write(self, name, array):
        if name not in self.files:
            self.files[name] = open(self.temporary / name, "wb")
            self.hashes[name] = hashlib.sha256()
        block = array.tobytes()
        self.files[name].write(block)
        self.hashes[name].update(block)

    def __exit__(self, kind, error, _):
        try:
            if kind is None:
                self._finish()
        except OSError as e:
            error = e
            raise self._explain(e) from None
        finally:
            for file in self.files.values():
                with contextlib.suppress(OSError):  # of a full disk, which is reported already
                    file.close()
            remove(self.temporary)
        if isinstance(error, OSError):
            raise self._explain(error) from None

    def _explain(self, error):
        if error.errno != errno.ENOSPC:
            return error
        return UserError(f"the disk is full: {self.path} was not written; make room or choose another --data_dir")

    def _finish(self):
        for split in SPLITS:
            n_tokens = self.meta["tokens"][split]
            if n_tokens < MIN_TOKENS:
                raise UserError(f"{self.path}: the text is too short, its {split} split would have {n_tokens} token(s) "
                                f"and needs at least {MIN_TOKENS}: use more text")
        texts = {"tokenizer.json": self.tokenizer.to_json()} | chat.files(self.tokenizer)
        for name, text in texts.items():
            # as bytes through _write, which hashes them like the others
            self._write(name, np.frombuffer(text.encode(), np.uint8))
        entries = {}
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
            entries[name] = {"size": size, "sha256": self.hashes[name].hexdigest()}
            if name.endswith(".bin") and size > FULL_HASH_LIMIT:
                entries[name]["sha256_ends"] = _hash_ends(np.memmap(self.temporary / name, np.uint8, mode="r"))
        # last: a folder without meta.json is not a dataset
        self.meta["files"] = entries
        fault = _fault_of(self.meta)
        if fault:  # of the script: load would refuse what it wrote
            raise UserError(f"{self.path}: its meta.json {fault}")
        text = json.dumps(self.meta, indent=1, ensure_ascii=False, allow_nan=False)
        write_synced(self.temporary / "meta.json", text.encode())
        _check_replaceable(self.path)  # again: it may have changed since
        old = self.path.parent / f".{self.path.name}.old-{os.getpid()}"
        replace_folder(self.temporary, self.path, trash=old)
        remove(old)


def _remove_stale(path):
    """Clean up after processes that died while they wrote `path`."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*-*"):
        kind, _, pid = folder.name.removeprefix(f".{path.name}.").partition("-")
        if kind not in ("tmp", "old") or not pid.isdigit() or _foreign(folder):
            continue
        # in a container the process before had the same number as this one
        if int(pid) != os.getpid() and _alive(int(pid)):
            continue
        if kind == "old" and not path.exists() and _is_dataset(folder):
            folder.rename(path)  # it died between the two renames of replace_folder
        else:
            remove(folder)


def _alive(pid):
    if os.name != "posix":
        return True  # on Windows, signal 0 would interrupt the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True
