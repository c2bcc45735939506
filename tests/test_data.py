"""data.py: tokenizers lose nothing, batches are a pure function of (seed, step), damaged datasets are refused."""

import hashlib
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from prepare.make_tokenizer import from_tiktoken, tiktoken_tokenizer, train_bpe
from thimble import data
from thimble.files import UserError
from thimble.tokenizer import AWKWARD, EOT, PRETOKENIZERS, byte_tokenizer, char_tokenizer, load_tokenizer

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
SPANS = [(32, 127), (32, 127), (9, 14), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x5D0, 0x700), (0x900, 0xA00)]
SPANS += [(0x2000, 0x2070), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A0), (0x1F300, 0x1FAFF), (0, 0xD800)]
SPANS += [(0xE000, 0x110000)]


def random_texts(n, seed=0):
    rng = random.Random(seed)
    for _ in range(n):
        span = rng.sample(SPANS, rng.randint(1, 3))
        yield "".join(chr(rng.randrange(*rng.choice(span))) for _ in range(rng.randint(0, 40)))


def write(path, tokenizer, train, val, train_mask=None, val_mask=None):
    with data.Writer(path, tokenizer, source="test") as out:
        out.append("train", train, len(train), 1, train_mask)
        out.append("val", val, len(val), 1, val_mask)
    return path


@pytest.fixture(scope="module")
def corpus():
    rng = random.Random(1)
    syllables = ["wa", "ter", "Fi", "re", "sto", "ne", "ÿé", "日本", "s", "ing", " 123", "4", "!\n", "'s"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(1000)]
    return " ".join(rng.choice(words) for _ in range(5000))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """tiktoken's gpt2 without a network: it looks for a file named by the sha1 of the address."""
    if not (SHARED / "gpt2_vocab.bpe").exists():
        pytest.skip("needs ../shared/data/gpt2_vocab.bpe and gpt2_encoder.json")
    pytest.importorskip("tiktoken")
    cache, address = tmp_path_factory.mktemp("tiktoken"), "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    encoder = json.dumps(json.loads((SHARED / "gpt2_encoder.json").read_text(encoding="utf-8"))).encode()
    for name, content in (("vocab.bpe", (SHARED / "gpt2_vocab.bpe").read_bytes()), ("encoder.json", encoder)):
        (cache / hashlib.sha1((address + name).encode()).hexdigest()).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        yield tiktoken_tokenizer("gpt2")


@pytest.fixture(scope="module")
def tokenizers(corpus):
    everything = {char for text in random_texts(4000) for char in text} | set(EOT)
    made = {preset: train_bpe([corpus], 400, preset) for preset in PRETOKENIZERS}
    return made | {"byte": byte_tokenizer(), "char": char_tokenizer(everything)}


# tokenizers


@pytest.mark.parametrize("name", ["byte", "char", *PRETOKENIZERS])
def test_round_trip_and_stream(tokenizers, name, tmp_path):
    first = tokenizers[name]
    (tmp_path / "tokenizer.json").write_text(first.to_json(), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)  # what was written is what is read
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eot) == (first.kind, first.vocab_size, first.eot)
    hf = tokenizer.hf  # the library itself, which other programs use on the same file
    texts = list(random_texts(4000))
    encoded = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, encoded, strict=True):
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        assert "".join(map(stream.step, ids.tolist())) + stream.flush() == text
    for text in texts[::20]:
        assert tokenizer.encode(text) == hf.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, allow_special=True) == tokenizer.encode(text)


@pytest.mark.parametrize("name", ["byte", "char", *PRETOKENIZERS])
def test_end_of_text_is_text_unless_allowed(tokenizers, name):
    tokenizer = tokenizers[name]
    plain = tokenizer.encode(EOT)
    assert tokenizer.eot not in plain and tokenizer.decode(plain) == EOT
    a = tokenizer.encode("a")
    assert tokenizer.encode(f"a{EOT}a", allow_special=True) == [*a, tokenizer.eot, *a]
    assert tokenizer.decode([tokenizer.eot]) == ""
    assert tokenizer.decode([tokenizer.eot], skip_special=False) == EOT
    assert max(tokenizer.encode("".join(random_texts(500))) + [tokenizer.eot]) < tokenizer.vocab_size


def test_layout_of_byte_and_char_vocabularies():
    byte = byte_tokenizer()
    assert (byte.kind, byte.vocab_size, byte.eot) == ("byte", 257, 256)
    assert byte.encode("é🎉\n") == list("é🎉\n".encode())
    char = char_tokenizer("hello")
    assert (char.kind, char.vocab_size, char.eot) == ("char", 5, 4)
    assert char.encode("hello") == [1, 0, 2, 2, 3]


def test_stream_holds_back_parts_of_a_character(tokenizers):
    stream = tokenizers["byte"].stream()
    assert [stream.step(byte) for byte in "é🎉x".encode()] == ["", "é", "", "", "", "🎉", "x"]
    assert [stream.step(byte) for byte in (0xF0, 0x9F)] == ["", ""]
    assert stream.flush() == "\ufffd"
    rng = random.Random(3)
    for _ in range(300):  # bytes that are no UTF-8: the same U+FFFD as when decoded at once
        ids = [rng.choice([rng.randrange(256), 0xE2, 0x82, 0xF0, 65]) for _ in range(12)]
        stream = tokenizers["byte"].stream()
        assert "".join(map(stream.step, ids)) + stream.flush() == tokenizers["byte"].decode(ids)


def test_stream_of_other_tokenizers(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁a", "b"]
    vocab = {token: i for i, token in enumerate(tokens)}
    hf = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    hf.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = Tokenizer(hf)
    assert tokenizer.eot == 1
    ids = [vocab["▁a"], vocab["b"], *(vocab[f"<0x{b:02X}>"] for b in "🎉é".encode()), vocab["▁a"]]
    stream = tokenizer.stream()
    steps = [stream.step(i) for i in ids]
    assert steps[:6] == ["a", "b", "", "", "", "🎉"]
    assert "".join(steps) + stream.flush() == tokenizer.decode(ids) == "ab🎉é a"


def test_unknown_characters_and_bad_ids_are_named():
    char = char_tokenizer("abc")
    for allow in (False, True):
        with pytest.raises(UserError, match="does not know 'x', 'é'"):
            char.encode("abxécx", allow_special=allow)
    for tokenizer in (char, byte_tokenizer()):
        for bad in (-1, tokenizer.vocab_size, 2**40):
            with pytest.raises(UserError, match="outside the vocabulary"):
                tokenizer.decode([0, bad])
            with pytest.raises(UserError, match="outside the vocabulary"):
                tokenizer.stream().step(bad)
        with pytest.raises(UserError, match="surrogate"):
            tokenizer.encode("a\ud800")


def test_bpe_training_is_deterministic_and_lossless_from_any_text(corpus):
    one, two = train_bpe([corpus], 500), train_bpe([corpus], 500)
    assert one.to_json() == two.to_json() and one.vocab_size == 500
    assert len(one.encode(corpus)) < len(corpus) / 3
    assert train_bpe(["a"], 300).encode("zé") and train_bpe(["a"], 300).vocab_size == 257
    for size, preset in ((256, "gpt2"), (300, "gpt5")):
        with pytest.raises(UserError):
            train_bpe([corpus], size, preset)


def test_presets_split_words_as_they_should(tokenizers):
    def words(name, text):
        return ["".join(word) for word, _ in tokenizers[name].hf.pre_tokenizer.pre_tokenize_str(text)]

    assert words("gpt2", "I'm 1234\n\nx") == ["I", "'m", "Ġ1234", "Ċ", "Ċ", "x"]
    assert words("smollm", "a 1234") == ["a", "Ġ", "1", "2", "3", "4"]
    assert words("llama3", "I'M 1234!\n\nx") == ["I", "'M", "Ġ", "123", "4", "!ĊĊ", "x"]


def test_gpt2_from_tiktoken_is_gpt2(gpt2):
    tiktoken = pytest.importorskip("tiktoken")
    assert (gpt2.kind, gpt2.vocab_size, gpt2.eot) == ("bpe", 50257, 50256)
    merges = json.loads(gpt2.to_json())["model"]["merges"]
    published = (SHARED / "gpt2_vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    assert [" ".join(pair) if isinstance(pair, list) else pair for pair in merges] == published
    theirs = tiktoken.get_encoding("gpt2")
    for text in [*random_texts(2000), *AWKWARD]:
        assert gpt2.encode(text) == theirs.encode(text, disallowed_special=())
        assert gpt2.decode(gpt2.encode(text)) == text


@pytest.mark.parametrize("pattern", ["cl100k", "o200k"])
def test_twin_of_newer_tiktoken_patterns_and_gaps(gpt2, pattern):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken_ext import openai_public

    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in "th,the, the,in,ing,12,123,!\n,\n\n,  ,    ,aa,aaa,//".split(","):
        ranks[word.encode()] = len(ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: ranks)
        published = getattr(openai_public, f"{pattern}_base")()
    specials = {EOT: 300, "<|im_start|>": 310}
    encoding = tiktoken.Encoding("small", pat_str=published["pat_str"], mergeable_ranks=ranks, special_tokens=specials)
    twin = from_tiktoken(encoding)
    assert (twin.vocab_size, twin.eot) == (311, 300)
    texts = [*random_texts(1500), "the 1234567 thing!\n\n//aaa aaaa    in'LL The\r\n\r\n THEing", "aaaaaaa" * 9]
    for text in texts:
        assert twin.encode(text) == encoding.encode(text, disallowed_special=())
    text = f"the{EOT}in<|im_start|>"
    assert twin.encode(text, allow_special=True) == encoding.encode(text, allowed_special="all")


def test_tiktoken_without_a_network(tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        tiktoken_tokenizer("cl100k_base")
    with pytest.raises(UserError, match="knows no encoding 'gpt99'.*gpt2"):
        tiktoken_tokenizer("gpt99")


def test_foreign_tokenizer_gets_an_end_of_text(tmp_path):
    from tokenizers import Tokenizer, models

    def load(tokens, specials=()):
        hf = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
        hf.add_special_tokens(list(specials))
        hf.save(str(tmp_path / "tokenizer.json"))
        return load_tokenizer(tmp_path / "tokenizer.json")

    assert (load("abc").eot, load("abc").vocab_size) == (3, 4)
    assert (load([*"abc", "</s>"], ["</s>"]).eot, load([*"abc", "</s>"]).vocab_size) == (3, 4)
    assert load(["<|im_end|>", *"abc", EOT]).eot == 4


def damaged_tokenizers():
    good = json.loads(byte_tokenizer().to_json())

    def edit(**changes):
        return json.dumps(good | changes)

    model = good["model"]
    return {
        "empty": "", "object": "{}", "missing page": "404: Not Found", "list": "[1]", "deep": "[" * 100_000,
        "truncated": byte_tokenizer().to_json()[:-200], "not UTF-8": b"\xff\xfe{",
        "merge of nothing": edit(model=model | {"merges": [["a", "bbbb"]]}),
        "id 4e9": edit(model=model | {"vocab": model["vocab"] | {"x1": 4_000_000_000}}),
        "same id twice": edit(model=model | {"vocab": model["vocab"] | {"x1": 3}}),
        "id beyond 32 bits": edit(model=model | {"vocab": model["vocab"] | {"x1": 2**33}}),
        "no chunks": edit(pre_tokenizer={"type": "FixedLength", "length": 0}),
    }  # fmt: skip


@pytest.mark.parametrize("case", damaged_tokenizers())
def test_damaged_tokenizer_ends_in_one_line(tmp_path, case):
    content = damaged_tokenizers()[case]
    (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path).encode("some text")  # a Rust panic comes only when it is used
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(UserError, match="there is no tokenizer"):
        load_tokenizer(tmp_path)


# batches


@pytest.mark.parametrize("n, block, size", [(1000, 7, 5), (1001, 8, 16), (64, 9, 4), (10, 9, 3), (17, 9, 40)])
def test_each_window_once_an_epoch(n, block, size):
    tokens = np.arange(n, dtype=np.uint16)
    n_windows = max(1, (n - block) // block)
    steps = math.ceil(5 * n_windows / size)
    rows = [row for step in range(steps) for row in zip(*data.batch(tokens, step, size, block, seed=1), strict=True)]
    offsets = set()
    for epoch in range(5):
        mine = rows[epoch * n_windows : (epoch + 1) * n_windows]
        for x, y in mine:
            assert x.dtype == y.dtype == np.int64 and len(x) == len(y) == block
            assert np.array_equal(x, np.arange(x[0], x[0] + block)) and np.array_equal(y, x + 1)
        starts = sorted(int(x[0]) for x, _ in mine)
        assert starts == list(range(starts[0], starts[0] + n_windows * block, block))  # side by side, each once
        assert starts[0] < block
        offsets.add(starts[0])
    assert len(offsets) > 1 or n == block + 1


def test_batches_are_pure():
    tokens = np.random.default_rng(0).integers(0, 1000, 5000).astype(np.uint16)
    straight = [data.batch(tokens, step, 12, 16, seed=7) for step in range(60)]
    data._epoch.cache_clear()
    for step in (59, 31, 0, 58):  # as after a resume: no step before it was asked for
        for ours, theirs in zip(data.batch(tokens, step, 12, 16, seed=7), straight[step], strict=True):
            assert np.array_equal(ours, theirs)
    for array in data.batch(tokens, 5, 12, 16, seed=7):
        array += 1  # a caller may write into his batch
    assert np.array_equal(data.batch(tokens, 5, 12, 16, seed=7)[0], straight[5][0])
    assert not np.array_equal(data.batch(tokens, 0, 12, 16, seed=8)[0], straight[0][0])
    assert data.batch(tokens, 0, 12, 16, seed=-3)[0].shape == (12, 16)
    # a larger batch is the same row of windows, so a changed batch size keeps the order
    double = data.batch(tokens, 3, 24, 16, seed=7)[0]
    assert np.array_equal(double, np.concatenate([straight[6][0], straight[7][0]]))


def test_epochs_are_uniform():
    first = Counter(int(data.batch_indices(1000, 0, 1, 10, seed)[0]) // 100 for seed in range(2000))
    assert min(first.values()) > 130 and len(first) == 10


def test_mask_goes_with_its_tokens():
    tokens = np.arange(500, dtype=np.uint16)
    mask = (tokens % 3 == 0).astype(np.uint8)
    x, y = data.batch(tokens, 2, 8, 20, seed=1, mask=mask)
    assert np.array_equal(y, np.where((x + 1) % 3 == 0, x + 1, -1))
    counted = np.concatenate([y.ravel() for _, y in data.eval_windows(tokens, 20, 8, mask)])
    assert sorted(counted[counted >= 0]) == [i for i in range(1, 500) if i % 3 == 0]


def test_split_shorter_than_a_window():
    with pytest.raises(UserError, match="64 tokens.* 65"):
        data.batch(np.zeros(64, np.uint16), 0, 4, 64, seed=0)
    assert data.batch(np.zeros(65, np.uint16), 0, 4, 64, seed=0)[0].shape == (4, 64)
    with pytest.raises(UserError, match="at least 2"):
        next(data.eval_windows(np.zeros(1, np.uint16), 8, 2))


@pytest.mark.parametrize("n", [2, 3, 8, 9, 10, 64, 65, 66, 129, 1000, 1023])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_eval_windows_predict_each_token_once(n, size):
    tokens = np.arange(n, dtype=np.uint32) + 7
    targets = []
    for x, y in data.eval_windows(tokens, 8, size):
        assert x.dtype == y.dtype == np.int64 and x.shape == y.shape and x.shape[0] <= size and x.shape[1] == 8
        assert x.min() >= 0
        assert np.array_equal(x[y >= 0] + 1, y[y >= 0])
        targets += y[y >= 0].tolist()
    assert targets == tokens[1:].tolist()


# datasets on disk


def test_written_is_loaded(tmp_path):
    tokenizer = byte_tokenizer()
    train, val = np.arange(1000) % 256, np.arange(100) % 256
    path = write(tmp_path / "ds", tokenizer, train, val, train_mask=np.arange(1000) % 2, val_mask=np.ones(100))
    dataset = data.load(path)
    assert dataset.train.dtype == np.dtype("<u2") and np.array_equal(dataset.train, train)
    assert np.array_equal(dataset.val, val) and np.array_equal(dataset.train_mask, np.arange(1000) % 2)
    assert dataset.vocab_size == dataset.tokenizer().vocab_size == 257 and dataset.val_bytes == 100
    assert (path / "train.bin").stat().st_size == 2000
    with pytest.raises(ValueError):
        dataset.train[0] = 1
    assert sorted(item.name for item in tmp_path.iterdir()) == ["ds"]
    write(path, tokenizer, val, train)  # replaced as a whole: the masks are gone
    assert data.load(path).train_mask is None and len(data.load(path).train) == 100
    assert sorted(item.name for item in tmp_path.iterdir()) == ["ds"]


def test_large_vocabulary_takes_uint32(tmp_path):
    from tokenizers import Tokenizer, models

    def tokenizer(n):
        return Tokenizer(Tokenizer(models.WordLevel({f"w{i}": i for i in range(n - 1)}, unk_token="w0")))

    big, ids = tokenizer(128_260), np.array([0, 65_535, 65_536, 70_000, 128_259])
    dataset = data.load(write(tmp_path / "big", big, ids, ids))
    assert dataset.train.dtype == np.dtype("<u4") and dataset.train.tolist() == ids.tolist()
    assert data.Writer(tmp_path / "x", tokenizer(65_535), "").dtype.itemsize == 2
    assert data.Writer(tmp_path / "x", tokenizer(65_536), "").dtype.itemsize == 4


@pytest.mark.parametrize("bad", [257, 70_000, -1, 2**16])
def test_ids_never_wrap(tmp_path, bad):
    with pytest.raises(UserError, match="outside the vocabulary"):
        write(tmp_path / "ds", byte_tokenizer(), np.array([1, bad]), np.array([1, 2]))
    assert list(tmp_path.iterdir()) == []  # and nothing is left behind


def test_empty_split_is_not_written(tmp_path):
    with pytest.raises(UserError, match="val split would be empty"):
        write(tmp_path / "ds", byte_tokenizer(), np.array([1, 2]), np.array([], int))
    assert list(tmp_path.iterdir()) == []


def test_full_disk(tmp_path, monkeypatch):
    write(tmp_path / "ds", byte_tokenizer(), np.array([1, 2]), np.array([3]))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.os, "fsync", full)
    with pytest.raises(UserError, match="disk is full.*ds"):
        write(tmp_path / "ds", byte_tokenizer(), np.array([4, 5]), np.array([6]))
    assert [item.name for item in tmp_path.iterdir()] == ["ds"]
    assert data.load(tmp_path / "ds").train.tolist() == [1, 2]


def test_leftovers_of_dead_processes_are_cleaned(tmp_path):
    dead, alive = 2**22 + 1, data.os.getppid()
    for name in (f".ds.tmp-{dead}", f".ds.old-{dead}", f".ds.tmp-{alive}", f".other.tmp-{dead}"):
        (tmp_path / name).mkdir()
    path = write(tmp_path / "ds", byte_tokenizer(), np.array([1, 2]), np.array([3]))
    assert sorted(item.name for item in tmp_path.iterdir()) == [f".ds.tmp-{alive}", f".other.tmp-{dead}", "ds"]
    path.rename(tmp_path / f".ds.old-{dead}")  # killed between the two renames of a replacement
    data._remove_stale(path)
    assert data.load(path).train.tolist() == [1, 2]


def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def meta(**changes):
    def edit(folder):
        content = json.loads((folder / "meta.json").read_text())
        for key, value in changes.items():
            *outer, last = key.split("__")
            place = content
            for name in outer:
                place = place[name]
            if value is None:
                del place[last]
            else:
                place[last] = value
        (folder / "meta.json").write_text(json.dumps(content))

    return edit


DAMAGE = {
    "no meta": ("meta.json", lambda d: (d / "meta.json").unlink()),
    "empty meta": ("meta.json", lambda d: cut(d / "meta.json", 0)),
    "half meta": ("meta.json", lambda d: cut(d / "meta.json", 300)),
    "meta is a list": ("meta.json", lambda d: (d / "meta.json").write_text("[]")),
    "meta is deep": ("meta.json", lambda d: (d / "meta.json").write_text("[" * 100_000)),
    "meta is no text": ("meta.json", lambda d: (d / "meta.json").write_bytes(b"\xff\xfe")),
    "missing page": ("meta.json", lambda d: (d / "meta.json").write_text("404: Not Found")),
    "NaN": ("meta.json", meta(baselines__uniform=float("nan"))),
    "text for a baseline": ("baselines", meta(baselines__uniform="8")),
    "future version": ("format_version 2", meta(format_version=2)),
    "no vocab_size": ("vocab_size", meta(vocab_size=None)),
    "vocab_size is text": ("vocab_size", meta(vocab_size="257")),
    "vocab_size is true": ("vocab_size", meta(vocab_size=True)),
    "vocab_size negative": ("vocab_size", meta(vocab_size=-1)),
    "vocab_size too small for the ids": ("train.bin holds the value 255", meta(vocab_size=200)),
    "dtype unknown": ("dtype", meta(dtype="float64")),
    "dtype uint32 for uint16": ("train.bin has 2,000 bytes", meta(dtype="uint32")),
    "dtype and tokens wrong": ("which must be below", meta(dtype="uint32", tokens={"train": 500, "val": 50})),
    "tokens missing": ("tokens.val", meta(tokens={"train": 1000})),
    "tokens zero": ("tokens.val", meta(tokens__val=0)),
    "a file elsewhere": ("lists the files", meta(**{"files__../x.bin": {}})),
    "a file not listed": ("lists the files", meta(**{"files__val.bin": None})),
    "no hash": ("sha256 of val.bin", meta(**{"files__val.bin__sha256": None})),
    "train.bin missing": ("train.bin is missing", lambda d: (d / "train.bin").unlink()),
    "val.bin is a folder": ("val.bin is missing", lambda d: ((d / "val.bin").unlink(), (d / "val.bin").mkdir())),
    "val.bin empty": ("val.bin has 0 bytes", lambda d: cut(d / "val.bin", 0)),
    "val.bin odd": ("val.bin has 101 bytes", lambda d: cut(d / "val.bin", 101)),
    "train.bin short": ("train.bin has 1,998 bytes", lambda d: cut(d / "train.bin", 1998)),
    "train.bin long": ("train.bin has 2,002", lambda d: (d / "train.bin").write_bytes(bytes(2002))),
    "a flipped bit": ("train.bin does not match its sha256", lambda d: flip(d / "train.bin", 1001)),
    "a flipped bit in the mask": ("train.mask.bin does not match", lambda d: flip(d / "train.mask.bin", 3)),
    "tokenizer changed": ("tokenizer.json does not match", lambda d: flip(d / "tokenizer.json", 20)),
    "tokenizer missing": ("tokenizer.json is missing", lambda d: (d / "tokenizer.json").unlink()),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_dataset_is_refused_with_a_reason(tmp_path, case):
    reason, damage = DAMAGE[case]
    folder = write(
        tmp_path / "ds", byte_tokenizer(), np.arange(1000) % 256, np.arange(100), train_mask=np.arange(1000) % 2
    )
    data.load(folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        data.load(folder)
    message = str(caught.value)
    assert reason in message and str(folder) in message and "again" in message and "\n" not in message


def test_random_damage_never_loads(tmp_path):
    """Any cut and any flipped bit in a binary file is found; in meta.json, found or harmless."""
    rng = random.Random(5)
    folder = write(tmp_path / "ds", byte_tokenizer(), np.arange(1000) % 256, np.arange(100))
    for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
        whole = (folder / name).read_bytes()
        for _ in range(60):
            at, bad = rng.randrange(len(whole)), bytearray(whole)
            bad[at] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(bad if rng.random() < 0.5 else whole[:at])
            try:
                dataset = data.load(folder)
            except UserError:
                continue
            assert name == "meta.json"
            assert int(dataset.train.max()) < dataset.vocab_size and len(dataset.train) == 1000
        (folder / name).write_bytes(whole)
    data.load(folder)


def test_files_beyond_the_hash_limit_are_checked_at_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FULL_HASH_LIMIT", 1 << 20)
    folder = write(tmp_path / "ds", byte_tokenizer(), np.arange(2_000_000) % 256, np.arange(100))
    data.load(folder)
    flip(folder / "train.bin", 100)
    with pytest.raises(UserError, match="sha256_ends"):
        data.load(folder)
    flip(folder / "train.bin", 100)
    flip(folder / "train.bin", 3_999_999)
    with pytest.raises(UserError, match="sha256_ends"):
        data.load(folder)


def test_no_dataset(tmp_path):
    with pytest.raises(UserError, match="there is no dataset .*nothing.*prepare"):
        data.load(tmp_path / "nothing")
    for name in ("plays", "poems"):
        write(tmp_path / name, byte_tokenizer(), np.arange(100), np.arange(100))
    with pytest.raises(UserError, match="did you mean 'plays'"):
        data.load(tmp_path / "play")
    with pytest.raises(UserError, match="there is plays, poems$"):
        data.load(tmp_path / "nothing")


@pytest.mark.parametrize("split", data.SPLITS)
def test_a_mask_that_lets_nothing_count_is_refused(tmp_path, split):
    mask = np.zeros(300)
    mask[0] = 1  # the first token is never predicted
    write(tmp_path / "ds", byte_tokenizer(), np.arange(300) % 256, np.arange(300) % 256, **{f"{split}_mask": mask})
    with pytest.raises(UserError, match=f"{split}.mask.bin lets no token count"):
        data.load(tmp_path / "ds")
    mask[150] = 1
    write(tmp_path / "ds", byte_tokenizer(), np.arange(300) % 256, np.arange(300) % 256, **{f"{split}_mask": mask})
    data.load(tmp_path / "ds")


def test_loading_needs_no_tokenizers_library(tmp_path):
    import subprocess
    import sys

    folder = write(tmp_path / "ds", byte_tokenizer(), np.arange(100), np.arange(100))
    code = f"import sys, data; data.load({str(folder)!r}); assert not {{'tokenizers', 'torch'}} & set(sys.modules)"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
