"""Any text becomes a dataset: a file, a folder of files, .jsonl or a .json list of records.

    $ python prepare/text.py --input=notes.txt --name=notes
    $ python prepare/text.py --input=stories.jsonl --text_key=story --name=stories --tokenizer=bpe --vocab_size=8192
    $ python prepare/text.py --input=~/letters --name=letters --tokenizer=tiktoken:gpt2
    $ python prepare/text.py --input=book.txt --name=book --tokenizer=runs/other/step_001000/tokenizer.json

A plain text file is one document, or several separated by the literal <|endoftext|>; in a folder each file is one.
Several documents are each closed by <|endoftext|> and go whole to train or val; a single one is cut, its tail is val.
The text is read several times and never held in memory: other scripts call prepare() with a function that returns an
iterator of documents, each a string or, if it is large, an iterable of strings.
"""
import hashlib
import itertools
import re
import shutil
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prepare.documents import read_documents
from prepare.make_tokenizer import check_bpe, tiktoken_tokenizer, train_bpe
from thimble import configurator, data, hub
from thimble.files import UserError, warn
from thimble.ngrams import Counter, WordGrams, baselines, overlap
from thimble.tokenizer import byte_tokenizer, char_tokenizer

MB = 1 << 20
SAMPLE_SIZE = 32 * MB  # text to train BPE on, spread over the train split; the trainer's memory grows with it
PIECE = 1 << 16  # characters that are tokenized at a time
CHANGED = "the input changed while it was read: run this again"


@dataclass(frozen=True)
class Config:
    input: str = ""                 # text file, folder, .jsonl or .json list
    name: str = ""                  # the dataset becomes data/NAME
    tokenizer: str = "bpe"          # bpe | byte | char | tiktoken:NAME | path of a tokenizer.json
    vocab_size: int = 4096          # of bpe, at most
    pretokenizer: str = "gpt2"      # how bpe splits text into words: gpt2 | smollm | llama3
    val_fraction: float = 0.1       # share of the text that is held out
    text_key: str = "text"          # the key of the text in .jsonl and .json records
    data_dir: str = str(data.DATA_DIR)  # where datasets live
    seed: int = 1337                # which documents are held out
    dedup: bool = False             # leave out documents that are exact copies of others


# ---- from documents to a dataset
def prepare(documents, name, source, tokenizer="bpe", vocab_size=4096, pretokenizer="gpt2", val_fraction=0.1, seed=1337,
            data_dir=data.DATA_DIR, next_command=None, dedup=False):
    """Write data_dir/name from `documents`, a function that returns an iterator of documents; returns the folder.

    source says where the text is from, for meta.json; next_command is what to type next. UserError for wrong options.
    """
    folder, tok = check_flags(name, data_dir, tokenizer, vocab_size, val_fraction, pretokenizer)
    options = {"tokenizer": tokenizer, "val_fraction": val_fraction, "seed": seed, "dedup": dedup}
    if tokenizer == "bpe":
        options |= {"vocab_size": vocab_size, "pretokenizer": pretokenizer}

    # three passes over the documents: which are held out, what is in them, and their tokens
    plan = Plan(progress(documents, "reading"), val_fraction, seed, tokenizer == "char", dedup)
    plan.print_warnings()
    floors, shared, sample = count(plan, progress(documents, "counting"), want_sample=tokenizer == "bpe")
    if tokenizer == "char":
        tok = char_tokenizer(plan.chars)
    elif tokenizer == "bpe":
        tok = train_bpe(sample, vocab_size, pretokenizer)
        if tok.vocab_size < vocab_size:
            warn(f"the text is enough for only {tok.vocab_size:,} of the {vocab_size:,} ids asked for")
    del sample  # up to 32 MB, twice that as Python strings
    with data.Writer(folder, tok, source, options, floors) as out:
        check_space(folder, plan, tok, out.dtype.itemsize)
        tokenize(plan, progress(documents, "tokenizing"), tok, out)
        # the passes must have read the same text, or documents are on the wrong side
        if sum(out.meta["bytes"].values()) != plan.total:
            raise UserError(CHANGED)
        out.meta |= {"duplicates": plan.n_duplicates, "overlap_13gram": shared}
    report(folder, next_command)
    return folder


def check_flags(name, data_dir, tokenizer, vocab_size, val_fraction, pretokenizer="gpt2"):
    """(folder to write, Tokenizer, None if it is made from the text); UserError for a flag that prepare cannot use.

    Scripts that read or download for long call it first, so that a mistake shows at once.
    """
    folder = data.new_folder(data_dir, name)
    if not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction={val_fraction} must lie between 0 and 1")
    if tokenizer == "bpe":
        check_bpe(vocab_size, pretokenizer)
    if tokenizer in ("bpe", "char"):
        return folder, None
    return folder, find_tokenizer(tokenizer)


def find_tokenizer(name):
    """The Tokenizer that --tokenizer names, of those that exist before the text is read."""
    if name == "byte":
        return byte_tokenizer()
    if name.startswith("tiktoken:"):
        return tiktoken_tokenizer(name.removeprefix("tiktoken:"))
    path = Path(name).expanduser()
    if not path.exists() and not hub.is_name(name):
        raise UserError(f"--tokenizer={name} is not bpe, byte, char or tiktoken:NAME, and there is no such file")
    from thimble import load  # imports torch, which takes seconds

    return load.read_tokenizer(path if path.exists() else name)


def count(plan, documents, want_sample):
    """(bits per byte of n-grams, share of val's 13-grams that are in train too, list of strings to train BPE on)."""
    counters = {split: Counter(plan.total) for split in data.SPLITS}
    share = min(1.0, SAMPLE_SIZE / plan.total)
    sample = []
    n_train = n_sampled = 0  # characters
    for split, pieces, _ in plan.parts(documents):
        if want_sample:
            pieces = recut(pieces)
        for piece in pieces:
            counters[split].add(piece.encode())
            if want_sample and split == "train":
                n_train += len(piece)
                # a piece whenever the sample is behind its share: spread evenly, and no random numbers
                if n_sampled < n_train * share:
                    sample.append(piece)
                    n_sampled += len(piece)
        counters[split].add(WordGrams.END)
    for counter in counters.values():
        counter.flush(final=True)
    train, val = counters["train"], counters["val"]
    return baselines(train.ngrams, val.ngrams), overlap(train.words, val.words), sample


def check_space(folder, plan, tok, itemsize):
    """UserError if the dataset will not fit on the disk, by the tokens that the beginning of the text has."""
    tokens_per_byte = len(tok.encode(plan.head)) / len(plan.head.encode())
    need = int(1.2 * plan.total * tokens_per_byte * itemsize)  # 20 % to be safe: the rest may have more
    free = shutil.disk_usage(folder.absolute().parent).free
    if need > free:
        raise UserError(f"{folder} needs about {need / MB:,.0f} MB, {free / MB:,.0f} MB are free: make room or choose "
                        "another --data_dir")


def tokenize(plan, documents, tok, out):
    """Append the documents to the Writer `out`, about a MB at a time: the tokenizers library uses all cores."""
    uncut = tok.kind in ("byte", "char")  # any pieces will do
    cuts_are_safe = not uncut and cuttable(tok, plan.head)
    batch = []  # (split, text, documents that end here, whether <|endoftext|> follows)
    size = 0  # characters in it
    for split, pieces, closed in plan.parts(documents):
        if cuts_are_safe:
            pieces = recut(pieces)
        elif not uncut:
            pieces = ["".join(pieces)]
        for piece, is_last in with_last(pieces):
            batch.append((split, piece, int(is_last), closed and is_last))
            size += len(piece)
            if size >= MB:
                append_batch(batch, tok, out)
                batch = []
                size = 0
    if batch:
        append_batch(batch, tok, out)


def append_batch(batch, tok, out):
    # a tokenizer that lowercases or drops characters would train a model on another text than the user's
    probe = batch[0][1][:4096]
    if tok.decode(tok.encode(probe), skip_special=False) != probe:
        raise UserError(f"the tokenizer {tok.name} changes the text that it encodes: choose another")
    encoded = tok.encode_batch([text for _, text, _, _ in batch])
    for (split, text, n_documents, closed), ids in zip(batch, encoded, strict=True):
        if closed:
            ids = np.append(ids, np.uint32(tok.eot))
        out.append(split, ids, len(text.encode()), n_documents)


def with_last(pieces):
    """(piece, whether it is the last); empty pieces are skipped, but there is always a last one."""
    held = ""
    for piece in pieces:
        if held:
            yield held, False
        held = piece
    yield held, True


def report(folder, next_command=None):
    """Print what is in a dataset, and what to type next."""
    dataset = data.load(folder)
    meta = dataset.meta
    print(f"{folder}: tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} ids, from {meta['source']}")
    for split in data.SPLITS:
        n_tokens = meta["tokens"][split]
        n_bytes = meta["bytes"][split]
        print(f"  {split:5} {n_tokens:12,} tokens {n_bytes:14,} bytes {n_bytes / n_tokens:6.2f} bytes a token, "
              f"{meta['documents'][split]:,} document(s)")
    figures = ", ".join(f"{name} {value:.3f}" for name, value in meta["baselines"].items())
    print(f"  bits per byte of val to beat: {figures}")
    shared = meta["overlap_13gram"]
    if shared is not None:
        print(f"  {shared:.2%} of the 13-grams of words in val are in train too")
        if shared > 0.01:
            warn("val shares whole passages with train: its loss will look better than it is")
    print(f"  train.bin begins: {dataset.tokenizer().decode(dataset.train[:60], skip_special=False)!r}")
    if next_command:
        command = next_command.replace(f"--dataset={folder.name}", f"--dataset={data.name_of(folder)}")
        print(f"next: {command}")


def dataset_name(corpus, tokenizer, vocab_size):
    """The default name: shakespeare_char, bible_bpe4096, python_tiktoken_gpt2."""
    kind = Path(tokenizer).stem.replace(":", "_")
    return f"{corpus}_bpe{vocab_size}" if kind == "bpe" else f"{corpus}_{kind}"


# ---- which part is held out
class Plan:
    """Which documents, or which tail of the text, are held out; made in a first pass over all documents."""

    def __init__(self, documents, val_fraction, seed, want_chars, dedup=False):
        self.chars = set()  # with want_chars, every character of the text
        self.head = ""  # the beginning of the text
        # a hash decides for each document, so that neither memory nor the order of files plays a role
        salt = (seed % 2**64).to_bytes(8, "little")
        hashes, n_bytes, n_chars = array("Q"), array("Q"), array("Q")  # 8 bytes each, of millions of documents
        for document in documents():
            digest = hashlib.blake2b(digest_size=8, salt=salt)
            size, length = self._read(document, digest, want_chars)
            hashes.append(int.from_bytes(digest.digest(), "little"))
            n_bytes.append(size)
            n_chars.append(length)
        self.n_bytes = np.array(n_bytes, np.int64)  # of each document; 0: it is left out, as blank ones are
        self.n_chars = np.array(n_chars, np.int64)
        is_kept = self.n_bytes > 0
        self.n_documents = int(is_kept.sum())

        # copies of a document have one hash, and go where the others go
        hashes, first, which = np.unique(np.array(hashes, np.uint64), return_index=True, return_inverse=True)
        self.n_duplicates = self.n_documents - int(is_kept[first].sum())
        self.dedup = dedup
        if dedup:
            is_copy = np.ones(len(is_kept), bool)
            is_copy[first] = False
            self.n_bytes[is_copy] = 0
            self.n_chars[is_copy] = 0
        self.total = int(self.n_bytes.sum())
        if not self.total:
            raise UserError("the input has no text in it")
        chosen = choose(np.bincount(which, self.n_bytes), self.total * val_fraction)
        self.is_val = None if chosen is None else chosen[which]  # (n,) bool; None: the text is cut
        self.cut = int(self.n_chars.sum() * (1 - val_fraction))  # at this character

    def _read(self, document, digest, want_chars):
        """(bytes, characters) of a document, both 0 if it is blank."""
        n_bytes = n_chars = 0
        blank = True
        for piece in pieces_of(document):
            if len(self.head) < MB // 4:
                self.head += piece[:MB // 4]
            if want_chars:
                self.chars.update(piece)
            blank = blank and (not piece or piece.isspace())
            encoded = piece.encode()
            digest.update(encoded)
            n_bytes += len(encoded)
            n_chars += len(piece)
        return (0, 0) if blank else (n_bytes, n_chars)

    def print_warnings(self):
        if self.n_duplicates:
            copies = f"{self.n_duplicates:,} of {self.n_documents:,} documents are copies of others"
            if self.dedup:
                print(f"{copies}: left out")
            else:
                warn(f"{copies}: prepare/text.py --dedup leaves them out")
        if self.is_val is None and self.n_documents > 1:
            warn("the documents cannot be divided into train and val by --val_fraction: the tail of the text is val")

    def parts(self, documents):
        """Yield (split, iterable of strings, whether <|endoftext|> follows); each is to be read before the next."""
        start = 0  # of the document, in characters
        n = 0  # documents read
        several = self.n_documents > 1
        for document in documents():
            n += 1
            if n > len(self.n_bytes):  # more than in the first pass
                break
            if not self.n_bytes[n - 1]:
                continue
            pieces = pieces_of(document)
            stop = start + int(self.n_chars[n - 1])
            if self.is_val is not None:
                yield "val" if self.is_val[n - 1] else "train", pieces, several
            elif stop <= self.cut:
                yield "train", pieces, several
            elif start >= self.cut:
                yield "val", pieces, several
            else:  # the cut is in this document: what take leaves of a piece begins val
                rest = []
                yield "train", take(pieces, self.cut - start, rest), False
                yield "val", itertools.chain(rest, pieces), several
            start = stop
        if n != len(self.n_bytes):
            raise UserError(CHANGED)


def choose(weights, target):
    """Which distinct documents, in the order of their hashes, make up about `target` bytes: (n,) bool.

    None if that cannot be met within a factor of 2, or only by taking all.
    """
    chosen = np.zeros(len(weights), bool)
    total = 0
    for i in np.flatnonzero(weights):
        with_it = total + weights[i]
        if with_it - target < target - total:  # nearer to the target with it than without
            chosen[i] = True
            total = with_it
        if total >= target:
            break
    if not target / 2 <= total <= target * 2 or chosen[weights > 0].all():
        return None
    return chosen


# ---- pieces of a document
def pieces_of(document):
    return iter([document] if isinstance(document, str) else document)


def take(pieces, n, rest):
    """Yield the first `n` characters of `pieces`; what is left of the last piece goes into the list `rest`."""
    for piece in pieces:
        if len(piece) >= n:
            rest.append(piece[n:])
            yield piece[:n]
            return
        n -= len(piece)
        yield piece


# Before a space that follows a non-space, and after a lone newline, a token ends under every pre-tokenizer here,
# whatever comes next (except "/", which o200k_base joins to the newline).
SAFE_CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\s/])")


def recut(pieces, size=PIECE):
    """The same text in pieces of about `size` characters, cut only where a cut cannot change the tokens."""
    held = ""  # not yielded yet
    for piece in pieces:
        held += piece
        start = 0  # of the next piece in it
        while len(held) - start > size:
            match = SAFE_CUT.search(held, start + size)
            if not match:
                break
            yield held[start:match.start()]
            start = match.start()
        held = held[start:]
    if held:
        yield held


def cuttable(tok, text):
    """Whether this tokenizer, wherever it is from, gives the same tokens with our cuts as without, on this text."""
    pieces = list(recut([text], 1000))
    return np.array_equal(tok.encode(text), np.concatenate(tok.encode_batch(pieces)))


def progress(documents, what):
    """`documents` with a progress bar, which shows only in a terminal and only if it takes more than 2 seconds."""
    def counted(pieces, bar):
        for piece in pieces:
            bar.update(len(piece))
            yield piece

    def with_bar():
        from tqdm import tqdm

        # disable=None: only in a terminal
        with tqdm(desc=what, unit="B", unit_scale=True, delay=2, disable=None, leave=False) as bar:
            for document in documents():
                if isinstance(document, str):
                    bar.update(len(document))
                    yield document
                else:
                    yield counted(document, bar)

    return with_bar


def main(cfg):
    if not cfg.input or not cfg.name:
        raise UserError("--input=FILE_OR_FOLDER and --name=NAME are both needed")
    check_flags(cfg.name, cfg.data_dir, cfg.tokenizer, cfg.vocab_size, cfg.val_fraction, cfg.pretokenizer)
    # a tokenizer.json that exists already is usually that of a model to start from
    recipe = "finetune_own_text" if Path(cfg.tokenizer).expanduser().exists() else "tiny_cpu"
    prepare(read_documents(cfg.input, cfg.text_key), cfg.name, Path(cfg.input).name, cfg.tokenizer, cfg.vocab_size,
            cfg.pretokenizer, cfg.val_fraction, cfg.seed, cfg.data_dir,
            f"python train.py config/{recipe}.py --dataset={cfg.name}", cfg.dedup)


if __name__ == "__main__":
    configurator.run(main, Config)
