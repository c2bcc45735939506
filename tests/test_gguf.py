"""GGUF files: tokenizers beside llama.cpp's, what comes in, and what must not."""
import importlib
import random
import struct

import numpy as np
import pytest
import torch
from cases import SHAPE, TEXT, refused, send, tokenizer

from formats import gguf as gguf_format
from formats import names
from formats.check import LlamaCpp
from thimble import checkpoint, load
from thimble.files import UserError


# ---- tokenizers
def strings(kind):
    """1,000 hard strings: words, digits, spaces, line ends, marks, scripts, emoji, control characters, in any mix."""
    rng = random.Random(1)
    parts = ["don't", "I'LL", "the", " the", "  ", "\n", "\r\n", "\t", "1", "12", "12345", "½", "٣", "é", "e\u0301",
             "ñ", "日本", "中文。", "한국", "🎉", "👩‍👩‍👧", "न\u0940", "ไทย", "עב", "\u00a0", "\u2028", "\u3000",
             "\x00", "\x7f", "_", "!!", "...", "==", "(", ")", "/", "\\", "#", "<|", "|>", "<|endoftext|>",
             "ª", "ⅷ", "ß", "İ", "Ǆ", "\u200d", "\ufeff", "x" * 40, " " * 20, "ÿÿ", "\U0001f1e9\U0001f1ea", "\ue000"]
    known = set(TEXT)
    made = []
    while len(made) < 1000:
        text = "".join(rng.choice(parts) if rng.random() < 0.7 else chr(rng.choice([rng.randrange(32, 127),
                       rng.randrange(160, 0x2fff), rng.randrange(0x3000, 0xd7ff), rng.randrange(0x1f000, 0x1ffff)]))
                       for _ in range(rng.randint(1, 12)))
        text = "".join(rng.choices(sorted(known), k=20)) if kind == "char" else text
        made.append(text)
    return made


@pytest.mark.parametrize("kind,pretokenizer", [("bpe", "gpt2"), ("bpe", "smollm"), ("bpe", "llama3"), ("byte", ""),
                                               ("char", "")])
def test_1000_hard_strings_are_the_same_ids_in_llama_cpp(tmp_path, kind, pretokenizer):
    pytest.importorskip("xllamacpp", reason="pip install -r requirements-test.txt")
    words = tokenizer(kind, pretokenizer)
    module = importlib.import_module("model")
    model = module.Model(module.Config(**SHAPE | {"n_layer": 1, "vocab_size": words.vocab_size})).eval()
    path = tmp_path / "m.gguf"
    send(model, words, path, "gguf", check=False)
    reader = LlamaCpp(path)
    try:
        hard = strings(kind)
        want = words.encode_batch(hard)
        there = [reader.encode(text) for text in hard]
        wrong = [(text, a, b) for text, a, b in zip(hard, want, there, strict=True) if list(a) != b]
        assert not wrong, (len(wrong), wrong[0])
        assert [reader.decode(ids) for ids in there[:100]] == hard[:100]
        again = load.read_tokenizer(path)  # and what we read of that file is the tokenizer it was
        assert [list(ids) for ids in again.encode_batch(hard)] == there and again.eot == words.eot
    finally:
        reader.close()


def test_a_file_bears_the_name_of_its_run(tmp_path):
    pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
    module = importlib.import_module("model")
    model = module.Model(module.Config(**SHAPE, vocab_size=257)).eval()
    send(model, tokenizer("byte"), tmp_path / "m.gguf", "gguf", check=False)
    assert gguf_format.parts(tmp_path / "m.gguf")[0]["general.name"] == "model"


@pytest.mark.parametrize("quant", ["q4_0", "q4_1", "q5_0", "q5_1"])
def test_embedding_and_head_keep_8_bits(tmp_path, quant):
    pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
    module = importlib.import_module("model")
    model = module.Model(module.Config(**SHAPE, vocab_size=257)).eval()
    send(model, tokenizer("byte"), tmp_path / "m.gguf", "gguf", quant, check=False)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf_format.parts(tmp_path / "m.gguf")[2].tensors}
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert {types[f"blk.1.{name}.weight"] for name in ("attn_q", "attn_output", "ffn_down")} == {quant.upper()}


# ---- in
def test_q4_1_is_read(tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
    path, kind = tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q4_1
    w = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    name = "blk.0.ffn_up.weight"
    path.write_bytes(gguf_file(values={name: w}, tensors=lambda key, w: (
        (3, gguf.quantize(w, kind).tobytes()) if key == name else (0, w.tobytes()))))
    got = load.read(path).model["blocks.0.mlp.up_proj.weight"].numpy()
    assert np.abs(got - gguf.dequantize(gguf.quantize(w, kind), kind)).max() == 0 and np.abs(got - w).max() < 0.3


LLAMA_CPP = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


@pytest.fixture(scope="module")
def theirs():
    """A Llama of transformers, far from fresh."""
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, rope_theta=500.0, rms_norm_eps=1e-6))
    with torch.no_grad():
        for p in model.parameters():
            p += (0.2 if p.dim() < 2 else 0.15) * torch.randn_like(p)
    return model.eval()


def write_theirs(path, model, quant):
    """Their Llama by the package's own writer, with the names and the order of rows that llama.cpp's converter uses."""
    gguf = pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
    kind = gguf.GGMLQuantizationType[quant]
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(65 + i) for i in range(63)] + ["<|endoftext|>"])
    writer.add_token_types([1] * 63 + [3])
    writer.add_token_merges(["\u00ff \u00ff"])
    writer.add_eos_token_id(63)
    kept = {}
    for name, w in model.state_dict().items():
        w = w.numpy()
        if name.startswith("model.layers."):
            _, _, layer, stem = name.removesuffix(".weight").split(".", 3)
            there = f"blk.{layer}.{LLAMA_CPP[stem]}.weight"
        else:
            there = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                     "lm_head.weight": "output.weight"}[name]
        if "q_proj" in name or "k_proj" in name:  # pairs side by side instead of half a head apart
            n_head = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            w = w.reshape(n_head, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        raw = gguf.quantize(w, kind) if w.ndim == 2 else w
        writer.add_tensor(there, raw, raw_dtype=kind if w.ndim == 2 else None)
        kept[there] = gguf.dequantize(raw, kind) if w.ndim == 2 else w
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


@torch.no_grad()
@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_llama_that_the_package_wrote(tmp_path, theirs, quant):
    kept = write_theirs(tmp_path / "m.gguf", theirs, quant)
    model = checkpoint.load_model(load.read(tmp_path / "m.gguf")).eval()
    ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))
    ours = model(ids)[0]
    if quant == "F32":
        assert (ours - theirs(ids).logits).abs().max() <= 1e-4
    # rounding is the only difference: a head's rows, a scale or a name too much would move logits by their spread
    off = (ours - theirs(ids).logits).std() / theirs(ids).logits.std()
    assert off <= {"F32": 1e-5, "F16": 0.003, "BF16": 0.02, "Q8_0": 0.03, "Q4_0": 0.5, "Q4_1": 0.5}[quant]
    assert (model.blocks[1].mlp.down_proj.weight.numpy() == kept["blk.1.ffn_down.weight"]).all()


def test_llama_cpp_reads_the_file_that_the_package_wrote_alike(tmp_path, theirs):
    """So that the file is what llama.cpp means, and not only what this test thinks."""
    pytest.importorskip("xllamacpp", reason="pip install -r requirements-test.txt")
    write_theirs(tmp_path / "m.gguf", theirs, "F32")
    prompts = torch.randint(63, (2, 12), generator=torch.Generator().manual_seed(0))
    reader = LlamaCpp(tmp_path / "m.gguf")
    try:
        there = reader.logprobs(prompts)
        reader.LISTED = 5
        few = reader.logprobs(prompts)
    finally:
        reader.close()
    known = ~few.isnan()
    assert (few[known] - there[known]).abs().max() <= 1e-4 and set(known.sum(-1).flatten().tolist()) <= {5, 6}
    drawn = few[:, :-1].gather(2, prompts[:, 1:, None])  # the text's next token is always among them
    assert not drawn.isnan().any()
    with torch.no_grad():
        assert (theirs(prompts).logits.log_softmax(-1) - there).abs().max() <= 1e-4


# ---- what must not come in
SIZES = {"token_embd": (8, 32), "output_norm": (32,), "output": (8, 32), "blk.0.attn_norm": (32,),
         "blk.0.attn_q": (32, 32), "blk.0.attn_k": (32, 32), "blk.0.attn_v": (32, 32), "blk.0.attn_output": (32, 32),
         "blk.0.ffn_norm": (32,),
         "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
META = {"general.architecture": "llama", "llama.block_count": 1, "llama.attention.head_count": 4,
        "llama.embedding_length": 32, "llama.feed_forward_length": 64, "llama.context_length": 64,
        "llama.vocab_size": 8, "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": [*"abcdef", "ab", "<|endoftext|>"],
        "tokenizer.ggml.token_type": [1] * 7 + [3], "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 7}


def text(value):
    value = value.encode()
    return struct.pack("<Q", len(value)) + value


def gguf_value(value):
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    parts = b"".join(text(x) if isinstance(x, str) else struct.pack("<I", x) for x in value)
    return struct.pack("<IIQ", 9, 8 if isinstance(value[0], str) else 4, len(value)) + parts


def gguf_file(meta=(), drop=(), tensors=None, values=(), sizes=(), n_tensors=None, n_meta=None, magic=b"GGUF",
              version=3, offset=None, n_dims=None):
    """A small GGUF file, byte by byte, with the lies that are asked for."""
    meta = {k: v for k, v in (META | dict(meta)).items() if k not in drop}
    rng, infos, blob = np.random.default_rng(0), b"", b""
    shapes = {f"{k}.weight": v for k, v in SIZES.items() if f"{k}.weight" not in drop}
    for name, shape in shapes.items():
        w = dict(values).get(name, rng.normal(0, 0.1, shape).astype(np.float32))
        kind, raw = (tensors or (lambda _, w: (0, w.tobytes())))(name, w)
        dims = dict(sizes).get(name, shape)[::-1]
        infos += text(name) + struct.pack(f"<I{len(dims)}QIQ", n_dims or len(dims), *dims, kind,
                                          len(blob) if offset is None else offset)
        blob += raw + b"\0" * (-len(raw) % 32)
    head = magic + struct.pack("<IQQ", version, len(shapes) if n_tensors is None else n_tensors,
                               len(meta) if n_meta is None else n_meta)
    head += b"".join(text(k) + gguf_value(v) for k, v in meta.items()) + infos
    return head + b"\0" * (-len(head) % 32) + blob


def array(kind, n, content=b""):
    return struct.pack("<IIQ", 9, kind, n) + content


GOOD_GGUF = gguf_file()
BAD_GGUF = {
    "empty": b"", "four bytes": b"GGUF", "another magic": gguf_file(magic=b"GGML"), "version 99": gguf_file(version=99),
    "cut in the header": GOOD_GGUF[:200], "cut in the names": GOOD_GGUF[:900], "cut in the data": GOOD_GGUF[:-100],
    "2^60 tensors": gguf_file(n_tensors=2**60), "2^60 keys": gguf_file(n_meta=2**60),
    "a string of 2^63": gguf_file({"general.name": struct.pack("<IQ", 8, 2**63 - 1)}),
    "a list of 2^40 numbers": gguf_file({"general.x": array(4, 2**40)}),
    "a list of 2^40 strings": gguf_file({"tokenizer.ggml.tokens": array(8, 2**40)}),
    "lists in lists": gguf_file({"general.x": array(9, 2**30, array(9, 2**30))}),
    "a type that is none": gguf_file({"general.x": struct.pack("<II", 77, 0)}),
    "a huge matrix": gguf_file(sizes={"blk.0.attn_q.weight": (2**31, 2**31)}),
    "a product over 2^64": gguf_file(sizes={"blk.0.attn_q.weight": (2**33, 2**33)}),
    "a billion dimensions": gguf_file(n_dims=10**9),
    "another shape": gguf_file(sizes={"blk.0.attn_q.weight": (16, 64)}),
    "overlapping tensors": gguf_file(offset=0), "far away tensors": gguf_file(offset=2**50),
    "an unknown number format": gguf_file(tensors=lambda _, w: (99, w.tobytes())),
    "a format not read": gguf_file(tensors=lambda _, w: (16, w.tobytes())),
    "another architecture": gguf_file({"general.architecture": "qwen2"}),
    "no architecture": gguf_file(drop=["general.architecture"]),
    "experts": gguf_file({"llama.expert_count": 8}),
    "scaled RoPE": gguf_file({"llama.rope.scaling.type": "yarn"}),
    "a billion layers": gguf_file({"llama.block_count": 10**9}),
    "layers that are not there": gguf_file({"llama.block_count": 900}),
    "no heads": gguf_file({"llama.attention.head_count": 0}),
    "heads that do not fit": gguf_file({"llama.attention.head_count": 5}),
    "a width as text": gguf_file({"llama.embedding_length": "32"}),
    "a vocabulary of 4 billion": gguf_file({"llama.vocab_size": 2**32 - 1}),
    "a missing tensor": gguf_file(drop=["blk.0.ffn_up.weight"]),
    "not a number": gguf_file(values={"blk.0.ffn_up.weight": np.full((64, 32), np.nan, np.float32)}),
    "a token twice": gguf_file({"tokenizer.ggml.tokens": [*"abcdeeg", "<|endoftext|>"]}),
    "types for other tokens": gguf_file({"tokenizer.ggml.token_type": [1]}),
    "a type of token that does not exist": gguf_file({"tokenizer.ggml.token_type": [1] * 6 + [155, 3]}),
    "an unused token that a merge makes": gguf_file({"tokenizer.ggml.token_type": [1] * 6 + [5, 3]}),
    "a special token that a merge makes": gguf_file({"tokenizer.ggml.token_type": [1] * 6 + [3, 3]}),
    "a merge of an unknown token": gguf_file({"tokenizer.ggml.merges": ["q b"]}),
    "a merge without a space": gguf_file({"tokenizer.ggml.merges": ["a_b"]}),
    "no merges": gguf_file(drop=["tokenizer.ggml.merges"]),
    "an unknown splitter": gguf_file({"tokenizer.ggml.pre": "deepseek-v3"}),
    "SentencePiece": gguf_file({"tokenizer.ggml.model": "llama"}),
}


def test_the_good_one_is_good(tmp_path):
    pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
    path = tmp_path / "m.gguf"
    path.write_bytes(GOOD_GGUF)
    checkpoint.load_model(load.read(path))
    load.read_tokenizer(path)


@pytest.mark.parametrize("name", BAD_GGUF)
def test_a_bad_gguf_file_is_refused(tmp_path, name):
    pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
    (tmp_path / "m.gguf").write_bytes(BAD_GGUF[name])
    refused(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "notes.txt"])
def test_other_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refused(tmp_path / name)


def test_damaged_bytes_never_crash(tmp_path):
    pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
    rng, path = random.Random(0), tmp_path / "m.gguf"
    for _ in range(150):
        content = bytearray(GOOD_GGUF)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(1500)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        path.write_bytes(content)
        try:
            checkpoint.load_model(load.read(path))
            load.read_tokenizer(path)
        except UserError as error:
            assert "\n" not in str(error)


def test_pairs_of_rope_by_hand():
    """Two heads of 4 rows: the pairs (0, 2), (1, 3) of each head side by side, and back."""
    w = np.arange(8)[:, None] * np.ones((1, 3), int)
    there = names.permute(w, 2)
    assert there.shape == (8, 3) and there[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7] == there[:, 2].tolist()
    assert (names.permute(there, 2, back=True) == w).all()
    assert names.permute(w, 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
