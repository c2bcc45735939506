"""Files and folders read as documents, in pieces that fit into memory; files that are not text are named."""
import itertools
import json
import re
from codecs import getincrementaldecoder
from operator import itemgetter
from pathlib import Path

from thimble.files import UserError, warn
from thimble.tokenizer import EOT

MB = 1 << 20
HEAD = 1 << 14  # characters of a text that are searched for what a web page begins with
TAG = r"\ufeff|<!--.*?-->|<[^>]*>"  # or a comment, or the byte order mark
LEADING_TAGS = re.compile(rf"(?:\s|{TAG})*+", re.DOTALL)
PAGE_TAG = re.compile(r"<(!doctype\s+html|html|head|body)\b", re.IGNORECASE)
# all that some files hold: the answer of a server that did not have the file
ERROR_BODY = (r"\s*(error:?\s*)?([45]\d\d\b[:\s-]*)?(not found|forbidden|access denied|unauthorized|bad request|"
              r"bad gateway|gone|internal server error|service unavailable|gateway time-?out|too many requests|"
              r"rate limit exceeded)[.!]?\s*")


# ---- which files
def read_documents(path, text_key="text"):
    """A function that returns an iterator of the documents under `path`, each a string or an iterable of strings.

    Files in a folder that are not text are left out with a warning; a single one is a UserError.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"--input: there is no file or folder {path}")
    if path.is_file():
        fault = find_fault(path)
        if fault:
            raise UserError(f"{path} {fault}")
        return lambda: documents_in(path, text_key)

    # every file is read here once, so that a bad one is known before hours of work and not in the middle of it
    files = files_below(path)
    good = []
    bad = []
    for file in files:
        fault = find_fault(file)
        if fault:
            bad.append(f"{file} {fault}")
        else:
            good.append(file)
    for line in bad[:10]:  # the first say what kind of thing went wrong
        warn(f"left out: {line}")
    if bad:
        warn(f"{len(bad)} of {len(files)} files left out")
    if not good:
        raise UserError(f"{path} holds no usable text file ({len(files)} files looked at)")
    return lambda: itertools.chain.from_iterable(documents_in(file, text_key) for file in good)


def files_below(folder):
    """Every file in the folder and the folders in it, in order of their names, without hidden ones (.git)."""
    files = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden:
            files.append(file)
    return files


def find_fault(file):
    """Why `file` cannot be used as text, or None. Reads all of it."""
    blank = True
    try:
        for i, block in enumerate(read_blocks(file)):
            blank = blank and block.isspace()
            if i > 0:
                continue
            fault = page_fault(block)
            if fault:
                return fault
    except UserError as error:
        return str(error).removeprefix(f"{file} ")  # callers name the file themselves
    return "is empty" if blank else None


def page_fault(text):
    """Why a text is that of a failed download, the usual way to text that is not the text wanted; None if it is not."""
    # README files begin with tags too, but not with those of a whole page
    tags = LEADING_TAGS.match(text[:HEAD])[0]
    if PAGE_TAG.search(re.sub("<!--.*?-->", "", tags, flags=re.DOTALL)):
        return "is a web page (HTML): save its text, not the page"
    if len(text) > 500:  # longer than any such answer
        return None
    words = re.sub(TAG, " ", text, flags=re.DOTALL)
    if re.fullmatch(ERROR_BODY, words, re.IGNORECASE):
        return f"holds only {text.strip()[:60]!r}, what a server sends for a missing page: download it again"
    return None


# ---- what is in them
def documents_in(file, text_key):
    """Yield the documents in one file, each a string or, from plain text, an iterator of strings."""
    if file.suffix == ".jsonl":
        for record, where in read_jsonl(file):
            yield text_of(record, text_key, where)
    elif file.suffix == ".json":
        for record, where in read_json(file):
            yield text_of(record, text_key, where)
    else:
        # groupby hands out pieces as they are read, so a document of any size passes through
        for _, pieces in itertools.groupby(numbered(read_blocks(file)), key=itemgetter(0)):
            yield (piece for _, piece in pieces)


def read_jsonl(file):
    """Yield (record, where it stands, for error messages) of each line."""
    with open(file, encoding="utf-8-sig") as lines:  # -sig: without the mark that some editors begin files with
        for number, line in enumerate(lines, 1):
            if line.strip():  # an empty line is common at the end
                where = f"{file}, line {number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where} is not valid JSON: {str(error)[:100]}") from None
                yield record, where


def read_json(file):
    """Yield the same of a file that is one list of records."""
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # a RecursionError: brackets nested thousands deep
        raise UserError(f"{file} is not valid JSON: {str(error)[:100]}") from None
    if not isinstance(records, list):
        raise UserError(f"{file} must hold a list of records, holds one {type(records).__name__}")
    for number, record in enumerate(records, 1):
        yield record, f"{file}, record {number}"


def text_of(record, key, where):
    """The text of a record: what is under the key, or the record itself if it is a string."""
    text = record.get(key) if isinstance(record, dict) else record
    if not isinstance(text, str):
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where} has no text under the key {key!r} (it has: {keys:.100}): choose it with --text_key")
    fault = page_fault(text)
    if fault:
        raise UserError(f"{where} {fault}, or remove the record")
    return re.sub("[\ud800-\udfff]", "\ufffd", text)  # JSON can hold half of a surrogate pair, UTF-8 cannot


def read_blocks(file):
    """Yield the file's text in blocks of up to 1 MB; UserError with the offset of the first byte that is not text."""
    decoder = getincrementaldecoder("utf-8")()  # keeps the bytes of a character that a block ends in
    offset = 0  # of the block in the file
    at_start = True
    with open(file, "rb") as f:
        while True:
            block = f.read(MB)
            n_kept = len(decoder.getstate()[0])  # bytes that the last block left in the decoder
            try:
                # the empty block at the end is decoded too: a character may be unfinished
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - n_kept + error.start
                byte = error.object[error.start]
                raise UserError(f"{file} is not UTF-8 text: byte {at:,} is 0x{byte:02x}") from None
            if b"\0" in block:
                raise UserError(f"{file} is a binary file: byte {offset + block.index(0):,} is 0")
            offset += len(block)
            if text and at_start:
                text = text.removeprefix("\ufeff")  # the byte order mark
                at_start = False
            if text:
                yield text
            if not block:
                return


def numbered(blocks):
    """(number of the document, piece of it) of text in which documents are separated by <|endoftext|>."""
    number = 0
    held = ""
    for block in blocks:
        *ended, held = (held + block).split(EOT)
        for text in ended:
            yield number, text
            number += 1
        n = max(0, len(held) - len(EOT) + 1)  # the rest may be the beginning of a separator
        yield number, held[:n]
        held = held[n:]
    yield number, held
