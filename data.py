"""Datasets on disk, tokenizers, and batches as a pure function of (seed, step).

    >>> dataset = data.load("data/shakespeare_char")                    # checked: sizes, hashes, ids
    >>> x, y = data.batch(dataset.train, step=0, batch_size=12, block_size=64, seed=1337)
    >>> dataset.tokenizer().decode(x[0])

A dataset is a folder that any of the scripts in prepare/ writes:

    train.bin, val.bin              flat little-endian uint16, or uint32 when the vocabulary exceeds 65,535
    train.mask.bin, val.mask.bin    optional, uint8: 1 where a token counts in the loss
    tokenizer.json                  a Hugging Face `tokenizers` file, whatever the kind of tokenizer
    meta.json                       everything else; written last. With a row_length, each row is an example of its own
"""

import codecs
import errno
import functools
import glob
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import UserError, hint

FORMAT_VERSION = 1
EOT = "<|endoftext|>"
# what other people's tokenizers call the end of a text, the likeliest first
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "[EOS]")
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
# tokenizers


@functools.cache
def byte_alphabet():
    """The 256 printable characters that stand for the bytes in a byte-level vocabulary (GPT-2's encoder.py)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [table[byte] for byte in range(256)]


def _guard(what, function, *args, **kwargs):
    """Call into the tokenizers library, whose Rust panics arrive as a BaseException."""
    try:
        return function(*args, **kwargs)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{what}: {reason:.200}") from None


class Tokenizer:
    """A tokenizers.Tokenizer with a certain end-of-text id, no silent losses and one-line errors.

    kind is "byte", "char", "bpe" or the lower-case name of another model of the tokenizers library.
    """

    def __init__(self, hf, name="tokenizer"):
        hf.no_truncation()
        hf.no_padding()
        vocab = hf.get_vocab(with_added_tokens=True)
        eot = next((token for token in EOT_NAMES if token in vocab), EOT)
        hf.add_special_tokens([eot])  # a new last id, or the id that it has
        vocab = hf.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        if len(set(vocab.values())) < len(vocab) or self.vocab_size > 2 * len(vocab):
            raise UserError(
                f"{name}: {len(vocab):,} tokens have {len(set(vocab.values())):,} different ids up to "
                f"{self.vocab_size - 1:,}; the ids must be 0 to N - 1"
            )
        self.eot = vocab[eot]
        self.name = name
        self._specials = {token.content: i for i, token in hf.get_added_tokens_decoder().items() if token.special}
        self._hf = hf
        self._json = hf.to_str()
        hf.encode_special_tokens = True  # whatever a user types is text
        model, decoder = type(hf.model).__name__, type(hf.decoder).__name__
        plain = {token: i for token, i in vocab.items() if token not in self._specials}
        self._table = None  # from byte or code point to id
        self.kind = model.lower()
        if model == "BPE" and hf.normalizer is None and all(len(token) == 1 for token in plain):
            if decoder == "ByteLevel" and set(plain) == set(byte_alphabet()) and not _adds_prefix(hf):
                self.kind = "byte"
                self._table = np.array([plain[token] for token in byte_alphabet()], np.uint32)
            elif decoder == "Fuse" and hf.pre_tokenizer is None and plain:
                self.kind = "char"
                self._table = np.full(0x110000, 2**32 - 1, np.uint32)
                self._table[[ord(token) for token in plain]] = list(plain.values())
        self._by_bytes = decoder == "ByteLevel" or self.kind == "char"

    def to_json(self):
        return self._json

    def encode(self, text, allow_special=False):
        """Ids of `text`; nothing is added. "<|endoftext|>" and the like are text unless `allow_special`."""
        if not allow_special:
            return self.encode_batch([text])[0].tolist()
        if self._table is None:
            return self._guarded([text], lambda: self._with_specials.encode(text, add_special_tokens=False).ids)
        parts = re.split("(" + "|".join(map(re.escape, self._specials)) + ")", text)
        return [
            i for part in parts for i in ([self._specials[part]] if part in self._specials else self.encode(part))
        ]

    def encode_batch(self, texts):
        """Ids of each text as uint32 arrays; byte and char tokenizers take a shortcut through a table."""
        if self._table is None:
            encodings = self._guarded(texts, lambda: self._hf.encode_batch_fast(texts, add_special_tokens=False))
            return [np.array(encoding.ids, np.uint32) for encoding in encodings]
        codec, unit = ("utf-8", np.uint8) if self.kind == "byte" else ("utf-32-le", np.dtype("<u4"))
        arrays = self._guarded(texts, lambda: [np.frombuffer(text.encode(codec), unit) for text in texts])
        arrays = [self._table[array] for array in arrays]
        for text, array in zip(texts, arrays, strict=True):
            self._check_known(text, array)
        return arrays

    def encode_offsets(self, text):
        """Ids of `text`, and for each the (start, end) of the characters that it stands for."""
        if self.kind == "char":
            self.encode(text)  # says which character it does not know
        encoding = self._guarded([text], lambda: self._hf.encode(text, add_special_tokens=False))
        return encoding.ids, encoding.offsets

    def special(self, name):
        """Id of a special token such as "<|im_end|>", or None."""
        return self._specials.get(name)

    def decode(self, ids, skip_special=True):
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        ids = np.asarray(ids, np.int64).tolist()
        for i in ids:
            self._check_id(i)
        return _guard(self.name, self._hf.decode, ids, skip_special_tokens=skip_special)

    def token(self, token_id):
        """The name of an id, as tokenizer.json has it."""
        return self._hf.id_to_token(token_id)

    def stream(self, skip_special=True):
        return (ByteStream if self._by_bytes else TextStream)(self, skip_special)

    @functools.cached_property
    def pieces(self):
        """The bytes that each id stands for, where the tokenizer is byte-level or char."""
        byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
        pieces = [b""] * self.vocab_size
        for token, i in self._hf.get_vocab(with_added_tokens=True).items():
            if self.kind == "char" or token in self._specials or not set(token) <= byte_of.keys():
                pieces[i] = token.encode()
            else:
                pieces[i] = bytes(byte_of[char] for char in token)
        return pieces

    @functools.cached_property
    def _with_specials(self):
        return _library().Tokenizer.from_str(self._json)

    def _guarded(self, texts, call):
        try:
            return _guard(self.name, call)
        except UserError:
            if any(re.search("[\ud800-\udfff]", text) for text in texts):
                message = f"{self.name}: the text holds half of a surrogate pair, which is no character"
                raise UserError(message) from None
            raise

    def _check_known(self, text, ids):
        unknown = np.flatnonzero(ids == 2**32 - 1)
        if unknown.size:
            chars = list(dict.fromkeys(text[i] for i in unknown[:1000]))[:5]
            raise UserError(
                f"the character tokenizer does not know {', '.join(map(repr, chars))}: leave such characters out, or "
                "prepare the data with --tokenizer=byte or --tokenizer=bpe"
            )

    def _check_id(self, i):
        if not 0 <= i < self.vocab_size:
            raise UserError(f"token id {i} is outside the vocabulary of {self.vocab_size:,} ids")


class ByteStream:
    """Text of ids that come one by one, each character as soon as all its bytes are there."""

    def __init__(self, tokenizer, skip_special=True):
        self.tokenizer, self.pieces = tokenizer, tokenizer.pieces
        self.silent = set(tokenizer._specials.values()) if skip_special else ()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id):
        self.tokenizer._check_id(token_id)
        return "" if token_id in self.silent else self.decoder.decode(self.pieces[token_id])

    def flush(self):
        return self.decoder.decode(b"", final=True)


class TextStream:
    """The same for tokenizers that are not byte-level: what a longer text has that a shorter one had not."""

    def __init__(self, tokenizer, skip_special=True):
        self.decode = functools.partial(tokenizer.decode, skip_special=skip_special)
        self.ids, self.start, self.done = [], 0, 0  # ids from start on are decoded, those before done have been given

    def step(self, token_id):
        self.ids.append(token_id)
        text = self._new()
        if not text or text.endswith("\ufffd"):
            return ""
        self.start, self.done = self.done, len(self.ids)
        return text

    def flush(self):
        return self._new()

    def _new(self):
        return self.decode(self.ids[self.start :])[len(self.decode(self.ids[self.start : self.done])) :]


def _library():
    import tokenizers  # 30 ms, which a trainer need not wait for

    return tokenizers


def _adds_prefix(hf):
    pre = hf.pre_tokenizer
    return type(pre).__name__ != "ByteLevel" or pre.add_prefix_space or pre.use_regex


def load_tokenizer(path):
    """Tokenizer of a tokenizer.json, of the folder (dataset, checkpoint) that holds one, or of a GGUF file.

    Where it has no end-of-text token by any usual name, "<|endoftext|>" is added as a new last id.
    """
    file = Path(path)
    if file.suffix == ".gguf":
        import foreign  # which imports this file

        return foreign.read_tokenizer(file)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"there is no tokenizer {file}")
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError:
        raise UserError(f"{file} is no UTF-8 text, so no tokenizer.json") from None
    what = f"{file} is no tokenizer that the tokenizers library can read"
    return _guard(what, lambda: Tokenizer(_library().Tokenizer.from_str(text), name=str(file)))


# what splits text into words before BPE; llama.cpp knows each of them (gpt-2, smollm, llama-bpe)
PRETOKENIZERS = ("gpt2", "smollm", "llama3")
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(vocab, merges, pre_tokenizer, **options):
    from tokenizers import Tokenizer as HF
    from tokenizers import decoders, models

    hf = HF(models.BPE(vocab=vocab, merges=merges, **options))
    hf.pre_tokenizer = pre_tokenizer
    hf.decoder = decoders.ByteLevel()
    return hf


def _pre_tokenizer(preset):
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as pre

    if preset == "gpt2":
        return pre.ByteLevel(add_prefix_space=False)
    if preset == "smollm":
        return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    if preset == "llama3":
        preset = LLAMA3_PATTERN
    split = pre.Split(Regex(preset), "isolated")
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_tokenizer():
    """257 ids: the value of the byte, then end of text."""
    from tokenizers import pre_tokenizers as pre

    vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
    return Tokenizer(_byte_level(vocab, [], pre.ByteLevel(add_prefix_space=False, use_regex=False)))


def char_tokenizer(chars):
    """The characters in sorted order, then end of text."""
    from tokenizers import Tokenizer as HF
    from tokenizers import decoders, models

    hf = HF(models.BPE(vocab={char: i for i, char in enumerate(sorted(set(chars)))}, merges=[]))
    hf.decoder = decoders.Fuse()
    return Tokenizer(hf)


def train_bpe(texts, vocab_size, pretokenizer="gpt2"):
    """Byte-level BPE of at most `vocab_size` ids, end of text included, trained on an iterable of strings."""
    from tokenizers import trainers

    check_bpe(vocab_size, pretokenizer)
    hf = _byte_level({}, [], _pre_tokenizer(pretokenizer))
    alphabet = byte_alphabet()  # all of it, so that any text can be told
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    _guard("training the tokenizer", hf.train_from_iterator, texts, trainer=trainer)
    return Tokenizer(hf)


def check_bpe(vocab_size, pretokenizer):
    if pretokenizer not in PRETOKENIZERS:
        raise UserError(f"pretokenizer must be one of {', '.join(PRETOKENIZERS)}, not {pretokenizer!r}")
    if vocab_size < 257:
        raise UserError(f"vocab_size {vocab_size} is too small: 256 bytes and {EOT} need 257")


def tiktoken_tokenizer(name):
    """OpenAI's encoding `name` (gpt2, cl100k_base, ...) with the same ids, as a tokenizers.Tokenizer."""
    try:
        import tiktoken
    except ImportError:
        raise UserError(f"--tokenizer=tiktoken:{name} needs the package tiktoken: pip install tiktoken") from None
    if name not in tiktoken.list_encoding_names():
        names = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"tiktoken knows no encoding {name!r}; it has {names}")
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # requests, its many errors, or ValueError where the hash of the file is wrong
        raise UserError(
            f"tiktoken could not fetch {name} ({type(error).__name__}). Without a network, let the environment "
            "variable TIKTOKEN_CACHE_DIR name a folder that holds its files from a machine that has one"
        ) from None
    return from_tiktoken(encoding)


def from_tiktoken(encoding):
    """The same for a tiktoken.Encoding; raises UserError if the two do not agree on a list of awkward strings."""
    ranks, specials = encoding._mergeable_ranks, encoding._special_tokens
    alphabet = byte_alphabet()

    def printable(token):
        return "".join(alphabet[byte] for byte in token)

    vocab = {printable(token): rank for token, rank in ranks.items()} | specials
    taken = set(vocab.values())
    vocab |= {f"<|unused_{i}|>": i for i in range(max(taken)) if i not in taken}  # cl100k_base has gaps
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        # all merges of lower rank leave the two halves whose merge this token is; a token that they do not lead to
        # is only ever found whole, which ignore_merges does
        halves = _merge(ranks, token)
        if len(halves) == 2:
            merges.append((printable(halves[0]), printable(halves[1])))
    # The regex engine reads {1,3}+ as "once or more of {1,3}"; there possessiveness makes no difference.
    pattern = re.sub(r"(\{\d+,\d*\})\+", r"\1", encoding._pat_str)
    preset = "gpt2" if encoding.name in ("gpt2", "r50k_base", "p50k_base") else pattern
    hf = _byte_level(vocab, merges, _pre_tokenizer(preset), ignore_merges=True)
    hf.add_special_tokens(sorted(specials, key=specials.get))
    tokenizer = Tokenizer(hf, name=encoding.name)
    for text in AWKWARD:
        if tokenizer.encode(text) != encoding.encode(text, disallowed_special=()):
            raise UserError(f"tiktoken's {encoding.name} has no exact twin: they differ on {text!r}")
    return tokenizer


def _merge(ranks, token):
    """Parts of `token` after all BPE merges of a rank below its own."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, limit) for left, right in zip(parts, parts[1:], strict=False)]
        best = min(pairs)
        if best >= limit:
            break
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


AWKWARD = (
    "", " ", "  ", "\n", " \n\n  \n x", "\r\n\r\n", "a\tb", "Hello, world!", "1234567 3.14159", "\x00\x01\x7f", "ÿþ",
    "don't DON'T we'll I'M they'd'VE", "naïve café ½ ² ٣", "日本語のテキスト、中文。", "🎉🎉👩‍👩‍👧‍👦 é", "ªº ⅷ ①",
    "if x:\n        return x\n\n\n    # done ", "aaaaaaaaaaaaaaaaaaaaaaaa", "https://example.org/a_b?c=d&e=%20f",
    "<|endoftext|> <|im_start|>", "\u00a0\u2028\u3000x", "(((((----=====>>>>>", "x" * 300, "ab " * 100,
    "!!!\n/path\n//\n", "देवनागरी ไทย עברית العربية",
)  # fmt: skip

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
        _sync_folder(self.tmp)
        old = self.path.parent / f".{self.path.name}.old-{os.getpid()}"
        if self.path.exists():
            self.path.rename(old)  # a folder that is not empty cannot be replaced in one go
        self.tmp.rename(self.path)
        _sync_folder(self.path.parent)
        shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder):
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


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
