"""Any text becomes a dataset: a file, a folder of files, .jsonl or a .json list of records.

    $ python prepare/text.py --input=notes.txt --name=notes
    $ python prepare/text.py --input=stories.jsonl --text_key=story --name=stories --tokenizer=bpe --vocab_size=8192
    $ python prepare/text.py --input=~/letters --name=letters --tokenizer=tiktoken:gpt2
    $ python prepare/text.py --input=book.txt --name=book --tokenizer=runs/other/step_001000/tokenizer.json

A plain text file is one document, or several divided by the literal <|endoftext|>; in a folder each file is one.
Several documents are each closed by <|endoftext|> and go whole to train or val; a single one is cut, its tail is val.
The text is read several times and never held in memory: other scripts call prepare() with a function that gives an
iterator of documents, each a string or, if it is large, an iterable of strings.
"""

import hashlib
import itertools
import json
import re
import shutil
import sys
from array import array
from codecs import getincrementaldecoder
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from prepare.make_tokenizer import check_bpe, tiktoken_tokenizer, train_bpe
from thimble import configurator, data, load
from thimble.files import UserError
from thimble.ngrams import NGrams, baselines
from thimble.tokenizer import EOT, byte_tokenizer, char_tokenizer

MB = 1 << 20
SAMPLE_BYTES = 32 * MB  # the BPE trainer sees at most so much, spread over the train split: its memory grows with words
PIECE = 1 << 16  # characters that the tokenizer gets at a time
GRAM = 13  # words; the length that GPT-3's authors took for overlap between training and test sets
MAX_GRAMS = 4_000_000  # hashes kept per split; of more, a fixed share
CHANGED = "the input changed while it was read: run this again"


@dataclass(frozen=True)
class Config:
    input: str = ""  # text file, folder, .jsonl or .json list
    name: str = ""  # the dataset becomes data/NAME
    tokenizer: str = "bpe"  # bpe | byte | char | tiktoken:NAME | path of a tokenizer.json
    vocab_size: int = 4096  # for bpe: at most so many ids
    pretokenizer: str = "gpt2"  # for bpe, what a word is: gpt2 | smollm | llama3
    val_fraction: float = 0.1  # share of the text that is held out
    text_key: str = "text"  # the key of the text in .jsonl and .json records
    data_dir: str = str(ROOT / "data")  # where datasets live
    seed: int = 1337  # which documents are held out


# ----------------------------------------------------------------------------------------------------------------------
# reading


def read_documents(path, text_key="text"):
    """A function that gives an iterator of the documents under `path`, and the number of unusable files left out."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"--input: there is no {path}")
    if path.is_file():
        fault = find_fault(path)
        if fault:
            raise UserError(f"{path} {fault}")
        return lambda: documents_in(path, text_key), 0
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    faults = {file: find_fault(file) for file in files}
    for file, fault in itertools.islice(((file, fault) for file, fault in faults.items() if fault), 10):
        warn(f"left out: {file} {fault}")
    good, n_bad = [file for file in files if not faults[file]], sum(map(bool, faults.values()))
    if n_bad:
        warn(f"{n_bad} of {len(files)} files left out")
    if not good:
        raise UserError(f"{path} holds no usable text file ({len(files)} files looked at)")
    return lambda: itertools.chain.from_iterable(documents_in(file, text_key) for file in good), n_bad


def find_fault(file):
    """Why `file` cannot be used as text, or None."""
    blank = True
    try:
        for i, block in enumerate(read_blocks(file)):
            blank = blank and block.isspace()
            if i == 0 and re.match(r"\s*<(!doctype\s+html|html)\b", block, re.IGNORECASE):
                return "is a web page (HTML): save its text, not the page"
            if i == 0 and re.fullmatch(ERROR_BODY, block, re.IGNORECASE):
                return f"holds only {block.strip()[:60]!r}, what a server sends for a missing page: download it again"
    except UserError as error:
        return str(error).removeprefix(f"{file} ")
    return "is empty" if blank else None


ERROR_BODY = (
    r"\s*(error:?\s*)?([45]\d\d\b[:\s-]*)?(not found|forbidden|access denied|unauthorized|bad request|bad gateway|gone|"
    r"internal server error|service unavailable|gateway time-?out|too many requests|rate limit exceeded)[.!]?\s*"
)


def read_blocks(file):
    """The file's text in blocks of up to 1 MB; UserError with the offset of the first byte that is not text."""
    decoder, offset, begun = getincrementaldecoder("utf-8")(), 0, False
    with open(file, "rb") as f:
        while True:
            block = f.read(MB)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                raise UserError(f"{file} is no UTF-8 text: byte {at:,} is 0x{error.object[error.start]:02x}") from None
            if b"\0" in block:
                raise UserError(f"{file} is a binary file: byte {offset + block.index(0):,} is 0")
            if text and not begun:
                text, begun = text.removeprefix("\ufeff"), True
            offset += len(block)
            if text:
                yield text
            if not block:
                return


def documents_in(file, text_key):
    """Iterator of the documents in one file."""
    if file.suffix == ".jsonl":
        return (text_of(record, text_key, where) for record, where in read_jsonl(file))
    if file.suffix == ".json":
        try:
            records = json.loads(file.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not valid JSON: {str(error)[:100]}") from None
        if not isinstance(records, list):
            raise UserError(f"{file} must hold a list of records, holds one {type(records).__name__}")
        return (text_of(record, text_key, f"{file}, record {i}") for i, record in enumerate(records, 1))
    return (map(itemgetter(1), group) for _, group in itertools.groupby(numbered(read_blocks(file)), itemgetter(0)))


def numbered(blocks):
    """(number of the document, piece of it) for text in which documents are divided by <|endoftext|>."""
    number, held = 0, ""
    for block in blocks:
        *ended, held = (held + block).split(EOT)
        for text in ended:
            yield number, text
            number += 1
        n = max(0, len(held) - len(EOT) + 1)  # the rest may be the first part of a divider
        yield number, held[:n]
        held = held[n:]
    yield number, held


def read_jsonl(file):
    with open(file, encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                where = f"{file}, line {number}"
                try:
                    yield json.loads(line), where
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where} is not valid JSON: {str(error)[:100]}") from None


def text_of(record, key, where):
    text = record.get(key) if isinstance(record, dict) else record
    if not isinstance(text, str):
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where} has no text under the key {key!r} (it has: {keys:.100}): give --text_key")
    return re.sub("[\ud800-\udfff]", "\ufffd", text)  # JSON can tell halves of a surrogate pair, UTF-8 cannot


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# counting


def powers(base, n):
    factors = np.full(n, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)


def mix(x):
    """Murmur3's finaliser: every bit of the result hangs on every bit of x."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    return x ^ (x >> np.uint64(33))


class WordGrams:
    """The different 13-grams of words in a stream of text, as 64-bit hashes; of very many, a fixed random share."""

    PRIME = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64
    END = b" \0 "  # a word of its own that stands between documents; grams across it do not count

    def __init__(self, n_bytes):
        share = min(1.0, MAX_GRAMS / (n_bytes / 5 + 1))
        self.limit = np.uint64(min(share * 2**64, 2**64 - 2048))
        self.seen, self.fresh = np.zeros(0, np.uint64), []
        self.carry = b""
        self.up = self.down = np.zeros(0, np.uint64)

    def add(self, block, final=False):
        block = self.carry + block
        text = np.frombuffer(block, np.uint8)
        is_word = (text > 32) | (text == 0)
        edges = np.flatnonzero(np.diff(is_word, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        if len(starts) < GRAM:
            self.carry = block
            return
        if len(self.up) <= len(text):
            self.up = powers(self.PRIME, 2 * len(text))
            self.down = powers(pow(self.PRIME, -1, 1 << 64), 2 * len(text))
        sums = np.zeros(len(text) + 1, np.uint64)
        np.cumsum((text.astype(np.uint64) + np.uint64(1)) * self.up[: len(text)], out=sums[1:])
        words = mix((sums[ends] - sums[starts]) * self.down[starts])
        crossed = np.concatenate([[0], np.cumsum(text[starts] == 0)])
        grams = np.zeros(len(words) - GRAM + 1, np.uint64)
        for k in range(GRAM):
            grams = grams * np.uint64(self.PRIME) + words[k : k + len(grams)]
        grams = mix(grams)
        keep = (crossed[GRAM:] == crossed[:-GRAM]) & (grams <= self.limit)
        if not final:
            keep[-1] = False  # the last word may go on in the next block
        self.carry = block[starts[-GRAM] :]
        self.fresh.append(np.unique(grams[keep]))
        if sum(map(len, self.fresh)) > MAX_GRAMS // 4:
            self.merge()

    def merge(self):
        self.seen, self.fresh = np.unique(np.concatenate([self.seen, *self.fresh])), []
        return self.seen


class Counter:
    """Both counts for one split, in blocks, so that many short documents cost no more than a long one."""

    def __init__(self, n_bytes):
        self.ngrams, self.words = NGrams(), WordGrams(n_bytes)
        self.parts, self.size = [], 0

    def add(self, part):
        self.parts.append(part)
        self.size += len(part)
        if self.size >= MB:
            self.flush()

    def flush(self, final=False):
        block = b"".join(self.parts)
        self.parts, self.size = [], 0
        self.words.add(block, final)
        self.ngrams.add(np.frombuffer(block.replace(WordGrams.END, b""), np.uint8))


# ----------------------------------------------------------------------------------------------------------------------
# splitting


def pieces_of(document):
    return iter([document] if isinstance(document, str) else document)


class Plan:
    """Which documents, or which tail of the text, are held out; made in a first pass over all documents."""

    def __init__(self, documents, val_fraction, seed, want_chars):
        hashes, sizes, lengths, self.chars, self.head = array("Q"), array("Q"), array("Q"), set(), ""
        salt = (seed % 2**64).to_bytes(8, "little")
        for document in documents():
            content, size, length, blank = hashlib.blake2b(digest_size=8, salt=salt), 0, 0, True
            for piece in pieces_of(document):
                if len(self.head) < MB // 4:
                    self.head += piece[: MB // 4]
                if want_chars:
                    self.chars.update(piece)
                blank = blank and (not piece or piece.isspace())
                length += len(piece)
                piece = piece.encode()
                size += len(piece)
                content.update(piece)
            hashes.append(int.from_bytes(content.digest(), "little"))
            sizes.append(0 if blank else size)
            lengths.append(0 if blank else length)
        self.sizes, self.lengths = np.array(sizes, np.int64), np.array(lengths, np.int64)
        self.total = int(self.sizes.sum())
        kept = self.sizes > 0
        self.n_documents = int(kept.sum())
        if not self.total:
            raise UserError("the input has no text in it")
        unique, first, which = np.unique(np.array(hashes, np.uint64), return_index=True, return_inverse=True)
        self.n_duplicates = self.n_documents - int(kept[first].sum())
        self.is_val, self.cut = None, int(self.lengths.sum() * (1 - val_fraction))
        weights = np.bincount(which, self.sizes)
        chosen = choose(weights, self.total * val_fraction)
        if chosen is not None:
            self.is_val = chosen[which]

    def parts(self, documents):
        """Yield (split, iterable of strings, whether <|endoftext|> follows); each is to be read before the next."""
        start = n = 0
        for i, document in enumerate(documents()):
            n += 1
            if i >= len(self.sizes):
                break
            if not self.sizes[i]:
                continue
            pieces, stop = pieces_of(document), start + int(self.lengths[i])
            several = self.n_documents > 1
            if self.is_val is not None:
                yield "val" if self.is_val[i] else "train", pieces, several
            elif stop <= self.cut:
                yield "train", pieces, several
            elif start >= self.cut:
                yield "val", pieces, several
            else:
                rest = []
                yield "train", take(pieces, self.cut - start, rest), False
                yield "val", itertools.chain(rest, pieces), several
            start = stop
        if n != len(self.sizes):
            raise UserError(CHANGED)


def choose(weights, target):
    """Which distinct documents, in the order of their hashes, make up about `target` bytes; None if none do."""
    chosen, total = np.zeros(len(weights), bool), 0
    for i in np.flatnonzero(weights):
        if total + weights[i] - target < target - total:  # nearer with it than without
            chosen[i] = True
            total += weights[i]
        if total >= target:
            break
    return chosen if target / 2 <= total <= target * 2 and not chosen[weights > 0].all() else None


def take(pieces, n, rest):
    """The first `n` characters of `pieces`; what is left of the last piece goes into the list `rest`."""
    for piece in pieces:
        if len(piece) >= n:
            rest.append(piece[n:])
            yield piece[:n]
            return
        n -= len(piece)
        yield piece


# Before a space that follows a non-space, and after a lone newline, a token ends under every pre-tokenizer here,
# whatever comes next (but for "/", which o200k_base joins to the newline).
SAFE_CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\s/])")


def recut(pieces, size=PIECE):
    """The same text in pieces of about `size` characters, cut only where a cut cannot change the tokens."""
    held = ""
    for piece in pieces:
        held += piece
        at = 0
        while len(held) - at > size:
            match = SAFE_CUT.search(held, at + size)
            if not match:
                break
            yield held[at : match.start()]
            at = match.start()
        held = held[at:]
    if held:
        yield held


# ----------------------------------------------------------------------------------------------------------------------
# the whole


def prepare(
    documents, name, source, tokenizer="bpe", vocab_size=4096, pretokenizer="gpt2", val_fraction=0.1, seed=1337,
    data_dir=ROOT / "data", next_command=None,
):  # fmt: skip
    """Write data_dir/name from `documents`, a function that gives an iterator of documents; returns its folder.

    source says where the text is from, for meta.json; next_command is what a person may type next.
    """
    if not re.fullmatch(r"[\w][\w.+-]*", name):
        raise UserError(f"--name={name!r} must be a plain name of letters, digits, '_', '-', '.'")
    if not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction={val_fraction} must lie between 0 and 1")
    folder = Path(data_dir).expanduser() / name
    tok = None
    if tokenizer == "byte":  # what needs no text is made first, so that a mistake shows at once
        tok = byte_tokenizer()
    elif tokenizer == "bpe":
        check_bpe(vocab_size, pretokenizer)
    elif tokenizer.startswith("tiktoken:"):
        tok = tiktoken_tokenizer(tokenizer.removeprefix("tiktoken:"))
    elif tokenizer != "char":
        if not Path(tokenizer).expanduser().exists():
            raise UserError(f"--tokenizer={tokenizer} is none of bpe, byte, char, tiktoken:NAME nor a tokenizer.json")
        tok = load.read_tokenizer(Path(tokenizer).expanduser())

    plan = Plan(progress(documents, "reading"), val_fraction, seed, tokenizer == "char")
    if plan.n_duplicates:
        warn(f"{plan.n_duplicates:,} of {plan.n_documents:,} documents are copies of others")
    if plan.is_val is None and plan.n_documents > 1:
        warn("the documents do not divide into train and val by the fraction asked for: the tail of the text is val")

    counters = {split: Counter(plan.total) for split in data.SPLITS}
    sample, n_train, n_sampled = [], 0, 0
    share = min(1.0, SAMPLE_BYTES / plan.total)
    for split, pieces, _ in plan.parts(progress(documents, "counting")):
        counter = counters[split]
        for piece in recut(pieces) if tokenizer == "bpe" else pieces:
            counter.add(piece.encode())
            if tokenizer == "bpe" and split == "train":
                n_train += len(piece)
                if n_sampled < n_train * share:
                    sample.append(piece)
                    n_sampled += len(piece)
        counter.add(WordGrams.END)
    for counter in counters.values():
        counter.flush(final=True)
    base = baselines(counters["train"].ngrams, counters["val"].ngrams)
    val_grams = counters["val"].words.merge()
    overlap = float(np.isin(val_grams, counters["train"].words.merge()).mean()) if len(val_grams) else None
    del counters

    if tokenizer == "char":
        tok = char_tokenizer(plan.chars)
    elif tokenizer == "bpe":
        tok = train_bpe(sample, vocab_size, pretokenizer)
        if tok.vocab_size < vocab_size:
            warn(f"the text yields only {tok.vocab_size:,} of the {vocab_size:,} ids asked for")
    del sample
    options = {"tokenizer": tokenizer, "val_fraction": val_fraction, "seed": seed}
    if tokenizer == "bpe":
        options |= {"vocab_size": vocab_size, "pretokenizer": pretokenizer}
    with data.Writer(folder, tok, source, options, base) as out:
        check_space(folder, plan, tok, out.dtype.itemsize)
        tokenize(plan, progress(documents, "tokenizing"), tok, out)
        if sum(out.meta["bytes"].values()) != plan.total:
            raise UserError(CHANGED)
        out.meta |= {"duplicates": plan.n_duplicates, "overlap_13gram": overlap}
    report(folder, next_command)
    return folder


def tokenize(plan, documents, tok, out):
    eot = np.array([tok.eot], np.uint32)
    whole = tok.kind in ("byte", "char")
    recuts = not whole and cuttable(tok, plan.head)
    batch, size = [], 0  # (split, text, documents that end here, whether <|endoftext|> follows)

    def flush():
        probe = batch[0][1][:4096]
        if tok.decode(tok.encode(probe), skip_special=False) != probe:
            raise UserError(f"the tokenizer {tok.name} does not give back the text it was given: choose another")
        for (split, text, n, closed), ids in zip(batch, tok.encode_batch([item[1] for item in batch]), strict=True):
            out.append(split, np.concatenate([ids, eot]) if closed else ids, len(text.encode()), n)

    for split, pieces, closed in plan.parts(documents):
        last = ""
        for piece in pieces if whole else recut(pieces) if recuts else ["".join(pieces)]:
            if last:
                batch.append((split, last, 0, False))
                size += len(last)
            last = piece
            if size >= MB:
                flush()
                batch, size = [], 0
        batch.append((split, last, 1, closed))
        size += len(last)
    flush()


def cuttable(tok, text):
    """Whether this tokenizer, of whatever origin, is indifferent to our cuts."""
    pieces = list(recut([text], 1000))
    return np.array_equal(tok.encode(text), np.concatenate(tok.encode_batch(pieces)))


def check_space(folder, plan, tok, itemsize):
    need = int(1.2 * plan.total * len(tok.encode(plan.head)) / len(plan.head.encode()) * itemsize)
    free = shutil.disk_usage(folder.absolute().parent).free
    if need > free:
        room = f"needs about {need / MB:,.0f} MB, {free / MB:,.0f} MB are free"
        raise UserError(f"{folder} {room}: make room or give another --data_dir")


def progress(documents, what):
    """`documents` with a progress bar that shows only in a terminal, and only if it takes a while."""

    def wrapped():
        from tqdm import tqdm

        with tqdm(desc=what, unit="B", unit_scale=True, delay=2, disable=None, leave=False) as bar:
            for document in documents():
                if isinstance(document, str):
                    bar.update(len(document))
                    yield document
                else:
                    yield (bar.update(len(piece)) or piece for piece in document)

    return wrapped


def report(folder, next_command=None):
    dataset = data.load(folder)
    meta, tok = dataset.meta, dataset.tokenizer()
    print(f"{folder}: tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} ids, from {meta['source']}")
    for split in data.SPLITS:
        n, size = meta["tokens"][split], meta["bytes"][split]
        print(
            f"  {split:5} {n:12,} tokens {size:14,} bytes {size / n:6.2f} bytes a token, "
            f"{meta['documents'][split]:,} document(s)"
        )
    figures = ", ".join(f"{name} {value:.3f}" for name, value in meta["baselines"].items())
    print(f"  bits per byte of val to beat: {figures}")
    overlap = meta["overlap_13gram"]
    if overlap is not None:
        print(f"  {overlap:.2%} of the 13-grams of words in val are in train too")
    if overlap and overlap > 0.01:
        warn("val shares whole passages with train: its loss will look better than it is")
    print(f"  train.bin begins: {tok.decode(dataset.train[:60], skip_special=False)!r}")
    if next_command:
        print(f"next: {next_command}")


def main(cfg):
    if not cfg.input or not cfg.name:
        raise UserError("give --input=FILE_OR_FOLDER and --name=NAME")
    documents, _ = read_documents(cfg.input, cfg.text_key)
    # a tokenizer that was there before may belong to a model to start from
    recipe = "finetune_own_text" if Path(cfg.tokenizer).expanduser().exists() else "tiny_cpu"
    prepare(
        documents, cfg.name, str(Path(cfg.input).name), cfg.tokenizer, cfg.vocab_size, cfg.pretokenizer,
        cfg.val_fraction, cfg.seed, cfg.data_dir,
        f"python train.py config/{recipe}.py --dataset={cfg.name}",
    )  # fmt: skip


if __name__ == "__main__":
    configurator.run(main, Config)
