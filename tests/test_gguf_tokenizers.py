"""Tokenizers that GGUF files from elsewhere carry: SentencePiece, and the splitting of Llama 3, Qwen2 and Nemo."""
import json
import random

import pytest
import tokenizers
from test_families_gguf import SHAPE, tensors_of
from test_gguf import strings

from formats import gguf as gguf_format
from formats.check import LlamaCpp
from prepare.make_tokenizer import train_bpe
from thimble import load
from thimble.tokenizer import Tokenizer, byte_alphabet, byte_level, pre_tokenizer_of

gguf = pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
TEXT = 20 * ("The quick brown fox, 1234 times: naïve café — ¿ñ? 日本語 don't I'LL\n\tif x == 3.14:\n"
             "        return 'the'\n")


def sentencepiece(n_tokens=600):
    """(tokens, types, scores) of a vocabulary like that of Llama 2: <unk>, <s>, </s>, 256 bytes, pieces by rank."""
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=n_tokens - 259, show_progress=False)
    with open(gguf_format.__file__, encoding="utf-8") as file:
        hf.train_from_iterator([TEXT, file.read()], trainer)
    pieces = sorted(hf.get_vocab(), key=hf.token_to_id)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    # merges in the order in which the trainer found them; single characters last, as SentencePiece has them
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    return tokens, types, scores


def write(path, tokens, types, **keys):
    """A GGUF file with this vocabulary and a model of that size."""
    about = SHAPE | {"vocab_size": len(tokens), "block_count": 1}
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in about.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"llama.{key}", value)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = [i for i, kind in enumerate(types) if kind == 3]  # <s>, </s>; <|endoftext|>, ...
    writer.add_bos_token_id(special[0])
    writer.add_eos_token_id(special[1])
    writer.add_add_bos_token(False)
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    for name, array in tensors_of(about, len(tokens)).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(path, texts):
    """Ids of ours and of llama.cpp for each text, where they differ; the text that ours make of theirs."""
    pytest.importorskip("xllamacpp", reason="pip install -r requirements-test.txt")
    ours = load.read_tokenizer(path)
    there = LlamaCpp(path)
    try:
        wrong = [(text, ours.encode(text), there.encode(text)) for text in texts]
        wrong = [case for case in wrong if case[1] != case[2]]
        assert not wrong, (len(wrong), wrong[0])
        assert [ours.decode(ours.encode(text)) for text in texts[:100]] == texts[:100]
    finally:
        there.close()
    return ours


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gives_the_ids_of_llama_cpp(tmp_path, prefix, count):
    tokens, types, scores = sentencepiece()
    write(tmp_path / "m.gguf", tokens, types, tokenizer_model="llama", tokenizer_pre="default", token_scores=scores,
          add_space_prefix=prefix)
    ours = compare(tmp_path / "m.gguf", strings("bpe")[:count(300, 1000)])
    assert ours.eot == 2 and ours.specials == {"<unk>": 0, "<s>": 1, "</s>": 2}


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "smollm"])
def test_byte_level_bpe_gives_the_ids_of_llama_cpp(tmp_path, pre, count):
    hf = byte_level({}, [], pre_tokenizer_of(gguf_format.PRETOKENIZER_OF[pre]))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False,
                                             initial_alphabet=byte_alphabet())
    hf.train_from_iterator([TEXT], trainer)
    tokens = sorted(hf.get_vocab(), key=hf.get_vocab().get)
    # as Qwen3 has them: special ones and plain ones that are found in a text, in turn
    more = ["<|im_start|>", "<|im_end|>", "<tool_call>", "<|x|>", "<think>"]
    types = [3] + [1] * (len(tokens) - 1) + [3, 3, 4, 3, 4]
    merges = [" ".join(merge) for merge in tokenizer_merges(hf)]
    write(tmp_path / "m.gguf", tokens + more, types, tokenizer_model="gpt2", tokenizer_pre=pre, token_merges=merges)
    texts = strings("bpe")[:count(300, 1000)] + ["a <think>b</think>", "<|im_start|>"]
    ours = compare(tmp_path / "m.gguf", texts)
    assert ours.token(len(tokens) + 4) == "<think>" and "<think>" not in ours.specials


def tokenizer_merges(hf):
    return json.loads(hf.to_str())["model"]["merges"]


def test_unused_ids_between_special_tokens(tmp_path):
    hf = train_bpe([TEXT], 500, "gpt2").hf
    tokens = sorted(hf.get_vocab(), key=hf.get_vocab().get)
    tokens += ["[PAD1]", "<|im_end|>"]
    types = [3] + [1] * (len(tokens) - 3) + [5, 3]
    merges = [" ".join(merge) for merge in tokenizer_merges(hf)]
    write(tmp_path / "m.gguf", tokens, types, tokenizer_model="gpt2", tokenizer_pre="gpt-2", token_merges=merges)
    ours = compare(tmp_path / "m.gguf", strings("bpe")[:50])
    assert ours.special("<|im_end|>") == len(tokens) - 1


def test_sentencepiece_leaves_as_sentencepiece(tmp_path):
    """Out through add_tokenizer and in again: the ids stay."""
    tokens, types, scores = sentencepiece()
    write(tmp_path / "m.gguf", tokens, types, tokenizer_model="llama", tokenizer_pre="default", token_scores=scores)
    before = load.read_tokenizer(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "again.gguf", "llama")
    gguf_format.add_tokenizer(gguf, writer, before, len(tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    after = load.read_tokenizer(tmp_path / "again.gguf")
    assert isinstance(after, Tokenizer) and after.specials == before.specials
    texts = [*strings("bpe")[:200], "".join(random.Random(0).choices(TEXT, k=300))]
    assert [after.encode(text) for text in texts] == [before.encode(text) for text in texts]
