"""Tokenizers lose nothing, stream whole characters, equal their twins, and refuse damage in one line."""
import hashlib
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HF
from tokenizers import decoders, models, pre_tokenizers

from prepare.make_tokenizer import from_tiktoken, tiktoken_tokenizer, train_bpe
from thimble.files import UserError
from thimble.tokenizer import AWKWARD, EOT, PRETOKENIZERS, Tokenizer, byte_tokenizer, char_tokenizer, load_tokenizer

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
SPANS = [(32, 127), (32, 127), (9, 14), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x5D0, 0x700), (0x900, 0xA00)]
SPANS += [(0x2000, 0x2070), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A0), (0x1F300, 0x1FAFF), (0, 0xD800)]
SPANS += [(0xE000, 0x110000)]


def random_texts(n, seed=0):
    rng = random.Random(seed)
    for _ in range(n):
        span = rng.sample(SPANS, rng.randint(1, 3))
        yield "".join(chr(rng.randrange(*rng.choice(span))) for _ in range(rng.randint(0, 40)))


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
    everything = {char for text in random_texts(10_000) for char in text} | set(EOT)
    made = {preset: train_bpe([corpus], 400, preset) for preset in PRETOKENIZERS}
    return made | {"byte": byte_tokenizer(), "char": char_tokenizer(everything)}


@pytest.mark.score("E7")
@pytest.mark.parametrize("name", ["byte", "char", *PRETOKENIZERS])
def test_round_trip_and_stream(tokenizers, name, tmp_path, count, score):
    first = tokenizers[name]
    (tmp_path / "tokenizer.json").write_text(first.to_json(), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)  # what was written is what is read
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eot) == (first.kind, first.vocab_size, first.eot)
    hf = tokenizer.hf  # the library itself, which other programs use on the same file
    texts = list(random_texts(count(4000, 10_000)))
    encoded = tokenizer.encode_batch(texts)
    held = 0
    for text, ids in zip(texts, encoded, strict=True):
        stream = tokenizer.stream()
        streamed = "".join(map(stream.step, ids.tolist())) + stream.flush()
        held += tokenizer.decode(ids) == text == streamed
    score(held, len(texts), f"{name}: decoded at once, and token by token")
    assert held == len(texts)
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
    for _ in range(300):  # bytes that are not UTF-8: the same U+FFFD as when decoded at once
        ids = [rng.choice([rng.randrange(256), 0xE2, 0x82, 0xF0, 65]) for _ in range(12)]
        stream = tokenizers["byte"].stream()
        assert "".join(map(stream.step, ids)) + stream.flush() == tokenizers["byte"].decode(ids)


def test_stream_of_other_tokenizers(tmp_path):
    tokens = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁a", "b"]
    vocab = {token: i for i, token in enumerate(tokens)}
    hf = HF(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
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


@pytest.mark.score("E7")
def test_a_trained_bpe_does_not_split_its_words_into_letters(tokenizers, corpus, score):
    """Fertility: of 400 tokens, made for this text, one must stand for more than two bytes on average."""
    rates = {name: len(corpus.encode()) / len(tokenizers[name].encode(corpus)) for name in PRETOKENIZERS}
    held = sum(rate > 2 for rate in rates.values())
    score(held, len(rates), ", ".join(f"{name}: {rate:.1f} bytes a token" for name, rate in rates.items()))
    assert held == len(rates), rates


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
    with pytest.raises(UserError, match="has no encoding 'gpt99'.*gpt2"):
        tiktoken_tokenizer("gpt99")


def test_foreign_tokenizer_gets_an_end_of_text(tmp_path):
    def load(tokens, specials=()):
        hf = HF(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
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
    }


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
