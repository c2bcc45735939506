"""What goes out, read by the programs it is for; what comes in, and what must not."""
import dataclasses
import functools
import importlib
import json
import random
import resource
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import export
from formats import foreign
from prepare.make_tokenizer import train_bpe
from thimble import checkpoint, data, files, load
from thimble.files import UserError
from thimble.generate import generate
from thimble.load import deployed
from thimble.tokenizer import byte_tokenizer, char_tokenizer

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48}
CASES = {
    "llama": ("model", {"n_kv_head": 2}, "bpe"),
    "tied": ("model", {"tie_embeddings": True, "rope_theta": 500.0, "norm_eps": 1e-6}, "byte"),
    "chars": ("model", {}, "char"),
    "gelu": ("model", {"mlp": "gelu", "qk_norm": True}, "char"),
    "bitnet": ("ternary", {"n_kv_head": 2, "n_hidden": 64}, "bpe"),
    "wide": ("ternary", {"n_embd": 256, "n_hidden": 256, "n_layer": 1}, "byte"),
    "relu2": ("ternary", {"act": "relu2"}, "byte"),
    "groups": ("ternary", {"group_size": 16, "n_hidden": 64}, "byte"),
    "streams": ("ternary", {"n_streams": 2}, "byte"),
    "jamba": ("hybrid_ssm", {"ssm": "mamba1", "n_layer": 3, "attn_layer_period": 3, "n_kv_head": 2}, "bpe"),
    "mamba2": ("hybrid_ssm", {"attn_layer_period": 2, "ssm_head_dim": 16}, "byte"),
}
TEXT = "The quick brown fox, 1234 times: naïve café — ¿ñ? 日本語 🎉\n\tif x == 3.14:\n        return 'don\\'t'\n" * 3


@functools.cache
def tokenizer(kind, pretokenizer="gpt2"):
    if kind == "bpe":
        return train_bpe([TEXT + Path(data.__file__).read_text(encoding="utf-8")], 500, pretokenizer)
    return byte_tokenizer() if kind == "byte" else char_tokenizer(TEXT)


@functools.cache
def built(case, packed=False):
    """(model, tokenizer), the weights far from the initial ones, where every part matters."""
    arch, settings, kind = CASES[case]
    module = importlib.import_module(arch)
    torch.manual_seed(0)
    model = module.Model(module.Config(**SHAPE | settings, vocab_size=tokenizer(kind).vocab_size))
    with torch.no_grad():
        for p in model.parameters():
            p += (0.2 if p.dim() < 2 else 0.15) * torch.randn_like(p)
    return (deployed(model) if packed else model).eval(), tokenizer(kind)


def out(case, path, form, quant="", packed=False, **extra):
    for package in {"hf": ("transformers",), "gguf": ("gguf", "xllamacpp"), "onnx": ("onnxruntime",)}[form]:
        pytest.importorskip(package, reason="pip install -r requirements-test.txt")
    if quant in ("online", "packed"):
        pytest.importorskip("accelerate", reason="pip install -r requirements-test.txt")
    model, words = built(case, packed)
    return export.export(model, words, path, form, quant, **{"prompts": 6, "prompt_tokens": 12} | extra)


EXACT = [("llama", "hf", "f32"), ("tied", "hf", "f32"), ("gelu", "hf", "f32"), ("groups", "hf", "f32"),
         ("streams", "hf", "f32"), ("jamba", "hf", "f32"), ("mamba2", "hf", "f32"), ("bitnet", "hf", "plain"),
         ("llama", "gguf", "f32"), ("tied", "gguf", "f32"), ("chars", "gguf", "f32"), ("bitnet", "gguf", "f32"),
         ("jamba", "gguf", "f32"), ("llama", "onnx", "fp32"), ("jamba", "onnx", "fp32"), ("mamba2", "onnx", "fp32")]
ROUNDED = [("llama", "hf", "bf16"), ("llama", "gguf", "f16"), ("llama", "gguf", "bf16"), ("llama", "gguf", "q8_0"),
           ("llama", "gguf", "q4_0"), ("jamba", "gguf", "q8_0"), ("wide", "gguf", "tq1_0"), ("wide", "gguf", "tq2_0"),
           ("bitnet", "onnx", "q2"), ("llama", "onnx", "int8"), ("jamba", "onnx", "int4")]


@pytest.mark.parametrize("case,form,quant", EXACT)
def test_its_own_program_says_the_same(tmp_path, case, form, quant):
    found = out(case, tmp_path / f"model.{form}", form, quant)
    assert found["delta"] <= 1e-4 and found["same"] == 6
    assert [path.name for path in tmp_path.iterdir()] == [f"model.{form}"]


@pytest.mark.parametrize("case,form,quant", ROUNDED)
def test_rounded_weights_are_the_rounded_weights(tmp_path, case, form, quant):
    found = out(case, tmp_path / f"model.{form}", form, quant)
    assert found["same"] + found.get("tied", 0) >= 5 and np.isfinite(found["loss"])


def test_a_form_that_rounds_too_much_is_warned_about(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="pip install -r requirements-test.txt")
    model, words = built("llama")

    def outlier(name, w):
        """The same function, with one channel after each norm so large that 8 bits leave nothing of the others."""
        factor = 1000.0 if "norm" in name else 1 / 1000 if w.size(-1) == 32 and not name.startswith("embed") else 1.0
        return w * torch.where(torch.arange(w.size(-1)) == 3, factor, 1.0) if "o_proj" not in name else w

    coarse = export.with_weights(model, outlier)
    with torch.no_grad():
        assert (coarse(torch.arange(20)[None])[0] - model(torch.arange(20)[None])[0]).abs().max() < 1e-3
    for fine, m in ((True, model), (False, coarse)):
        found = export.export(m, words, tmp_path / str(fine), "onnx", "int8", prompts=6, prompt_tokens=12)
        assert (found["kept"] > 0.75) == fine and (tmp_path / str(fine)).is_dir()
        assert ("too coarse" not in (said := capsys.readouterr().err)) == fine, said


@pytest.mark.slow  # transformers compiles these: they need a C++ compiler, and half a minute
@pytest.mark.parametrize("quant,packed", [("online", False), ("packed", False), ("packed", True)])
def test_bitnet_of_transformers(tmp_path, quant, packed):
    found = out("bitnet", tmp_path / "model", "hf", quant, packed)
    assert found["delta"] < 0.05 and found["same"] + found["tied"] == 6


def test_relu2_is_warned_about_and_fails_in_llama_cpp(tmp_path, capsys):
    with pytest.raises(UserError, match="check failed"):
        out("relu2", tmp_path / "m.gguf", "gguf")
    assert "WRONG TEXT" in capsys.readouterr().err and not list(tmp_path.iterdir())


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
    export.export(model, words, path, "gguf", checked=False)
    reader = export.LlamaCpp(path, model)
    try:
        hard = strings(kind)
        want = words.encode_batch(hard)
        there = [reader.encode(text) for text in hard]
        wrong = [(text, a, b) for text, a, b in zip(hard, want, there, strict=True) if list(a) != b]
        assert not wrong, (len(wrong), wrong[0])
        assert [reader.decode(ids) for ids in there[:100]] == hard[:100]
        again = load.read_tokenizer(path)                  # and what we read of that file is the tokenizer it was
        assert [list(ids) for ids in again.encode_batch(hard)] == there and again.eot == words.eot
    finally:
        reader.close()


# ---- the check sees sabotage


def edit_tensors(change):
    def damage(path):
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return damage


def edit_json(name, **values):
    def damage(path):
        about = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(about | values))
    return damage


def patch(old, new):
    """Replace bytes of the metadata of a GGUF file by as many others."""
    def damage(path):
        content = path.read_bytes()
        assert content.count(old) >= 1 and len(old) == len(new)
        path.write_bytes(content.replace(old, new, 1))
    return damage


def key(name, kind, value):
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I" + kind[1], int(kind[0]), value)


def swap(tensors, one, other):
    tensors[one], tensors[other] = tensors[other], tensors[one]


def transpose(tensors, name):
    tensors[name] = tensors[name].T.contiguous()


LAYER, UP, NORM = "model.layers.1.", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
SABOTAGE = {
    "a dropped tensor": ("llama", "hf", edit_tensors(lambda t: t.pop(LAYER + "mlp.up_proj.weight"))),
    "a transposed matrix": ("llama", "hf", edit_tensors(lambda t: transpose(t, LAYER + "self_attn.q_proj.weight"))),
    "another dtype": ("llama", "hf", edit_tensors(lambda t: t.update({NORM: t[NORM].half()}))),
    "swapped matrices": ("llama", "hf", edit_tensors(lambda t: swap(t, LAYER + "mlp.up_proj.weight", LAYER +
                                                                    "mlp.gate_proj.weight"))),
    "no tokenizer": ("llama", "hf", lambda path: (path / "tokenizer.json").unlink()),
    "another RoPE": ("llama", "hf", edit_json("config.json", rope_theta=9e3,
                                              rope_parameters={"rope_type": "default", "rope_theta": 9e3})),
    "another end of text": ("llama", "hf", edit_json("special_tokens_map.json", eos_token="a")),
    "texts that end elsewhere": ("llama", "hf", edit_json("generation_config.json", eos_token_id=[5])),
    "another model's code": ("gelu", "hf", lambda path: (path / "model.py").write_text(
        (path / "model.py").read_text().replace("F.gelu(", "F.relu("))),
    "cut short": ("llama", "gguf", lambda path: path.write_bytes(path.read_bytes()[:-4])),
    "a flipped bit": ("llama", "gguf", lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\x00\x40")),
    "RoPE of another base": ("llama", "gguf", patch(key("llama.rope.freq_base", "6f", 10000.0),
                                                    key("llama.rope.freq_base", "6f", 9000.0))),
    "another word splitter": ("llama", "gguf", patch(b"\x05\0\0\0\0\0\0\0gpt-2", b"\x05\0\0\0\0\0\0\0olmo1")),
    "a file that ends texts elsewhere": ("llama", "gguf", patch(key("tokenizer.ggml.eos_token_id", "4I", 0),
                                                                key("tokenizer.ggml.eos_token_id", "4I", 5))),
    "a swapped scale": ("bitnet", "gguf", lambda path: swap_scales(path)),
    "another vocabulary": ("llama", "onnx", lambda path: (path / "tokenizer.json").write_text(
        tokenizer("byte").to_json())),
    "another graph": ("llama", "onnx", lambda path: shutil.copyfile(other_graph(path), path / "onnx" / "model.onnx")),
}


def swap_scales(path):
    found = {tensor.name: tensor.data for tensor in foreign.gguf_parts(path)[2].tensors}
    content = path.read_bytes()
    one, other = (found[f"blk.{i}.attn_q.scale"].tobytes() for i in (0, 1))
    assert one != other and content.count(one) == content.count(other) == 1
    path.write_bytes(content.replace(one, b"XXXX").replace(other, one).replace(b"XXXX", other))


def other_graph(path):
    from formats import onnx as onnx_graph
    model = built("llama")[0]
    onnx_graph.export(export.with_weights(model, lambda name, w: w * 1.01 if "blocks.1.mlp.up" in name else w),
                      path / "other.onnx")
    return path / "other.onnx"


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_check_sees(tmp_path, monkeypatch, name):
    case, form, damage = SABOTAGE[name]

    def sabotaged(function):
        def check(path, *args, **kwargs):
            damage(path)
            return function(path, *args, **kwargs)
        return check
    monkeypatch.setattr(export, "check", sabotaged(export.check))
    monkeypatch.setattr(export, "check_onnx", sabotaged(export.check_onnx))
    with pytest.raises(UserError) as error:
        out(case, tmp_path / f"m.{form}".removesuffix(".onnx"), form)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


BUGS = {  # of the exporter itself: what is in the file is what was meant, but it is wrong
    "not permuted": ("llama", "gguf", "permute", lambda w, *_, **__: w),
    "up for gate": ("llama", "gguf", "NAMES", [tuple(x.replace("ffn_up", "?").replace("ffn_gate", "ffn_up").replace(
        "?", "ffn_gate") for x in row) for row in foreign.NAMES]),
    "two norms swapped": ("jamba", "hf", "JAMBA", [tuple(x.replace("input_layer", "?").replace(
        "pre_ff_layer", "input_layer").replace("?", "pre_ff_layer") for x in row) for row in foreign.JAMBA]),
}


@pytest.mark.parametrize("name", BUGS)
def test_the_check_sees_a_bug_of_the_exporter(tmp_path, monkeypatch, name):
    case, form, attribute, value = BUGS[name]
    monkeypatch.setattr(export if attribute == "permute" else foreign, attribute, value)
    with pytest.raises(UserError, match="check failed"):
        out(case, tmp_path / f"m.{form}", form)
    assert not list(tmp_path.iterdir())


# ---- in


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "tied", "chars"])
@pytest.mark.parametrize("form,quant", [("hf", "f32"), ("hf", "bf16"), ("gguf", "f32"), ("gguf", "f16"),
                                        ("gguf", "bf16"), ("gguf", "q8_0"), ("gguf", "q4_0")])
def test_out_and_in_again(tmp_path, case, form, quant):
    pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
    path = tmp_path / f"model.{form}"
    out(case, path, form, quant, checked=False, meta={"stop_ids": [3], "eos": 3, "chat_template": "{{ messages }}"})
    loaded, (model, words) = load.read(path), built(case)
    back, again = checkpoint.load_model(loaded).eval(), load.read_tokenizer(path)
    ids = torch.randint(words.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    gap = (back(ids)[0] - model(ids)[0]).abs().max().item()
    assert gap <= {"f32": 1e-6, "f16": 0.02, "bf16": 0.2, "q8_0": 0.5, "q4_0": 6.0}[quant]
    assert back.config == dataclasses.replace(model.config, n_hidden=96, n_kv_head=model.config.n_kv_head or 4)
    assert loaded.meta["stop_ids"] == ([3] if form == "gguf" else [3, words.eot])
    assert loaded.meta["chat_template"] == "{{ messages }}"
    text = "The café 1234" if case != "chars" else "The café"
    assert again.encode(text) == words.encode(text) and again.decode(again.encode(text)) == text
    assert list(generate(back, ids[0, :5].tolist(), 5, temperature=0))


def test_q4_1_is_read(tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
    path, kind = tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q4_1
    w = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    name = "blk.0.ffn_up.weight"
    path.write_bytes(gguf_file(values={name: w}, tensors=lambda key, w: (
        (3, gguf.quantize(w, kind).tobytes()) if key == name else (0, w.tobytes()))))
    got = load.read(path).model["blocks.0.mlp.up_proj.weight"].numpy()
    assert np.abs(got - gguf.dequantize(gguf.quantize(w, kind), kind)).max() == 0 and np.abs(got - w).max() < 0.3


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
    "no merges": gguf_file(drop=["tokenizer.ggml.merges"]),
    "an unknown splitter": gguf_file({"tokenizer.ggml.pre": "deepseek-v3"}),
    "SentencePiece": gguf_file({"tokenizer.ggml.model": "llama"}),
}


def header(change):
    """Rewrite the header of model.safetensors: change(dict) -> dict, text or (text, claimed length)."""
    def damage(path):
        content = (path / "model.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        new = change(json.loads(content[8:8 + size]))
        new, claimed = new if isinstance(new, tuple) else (new, None)
        new = (new if isinstance(new, str) else json.dumps(new)).encode()
        new += b" " * (-len(new) % 8)
        (path / "model.safetensors").write_bytes((claimed or len(new)).to_bytes(8, "little") + new + content[8 + size:])
    return damage


def entry(name, **values):
    return header(lambda about: about | {name: about[name] | values})


def rename_entry(old, new):
    return header(lambda about: {new if key == old else key: value for key, value in about.items()})


def index(*files):
    def damage(path):
        names = dict(enumerate(files))
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return damage


def write(name, content):
    return lambda path: (path / name).write_bytes(content)


def pickled(path):
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")


BAD_HF = {
    "no JSON": write("config.json", b"{"), "a list": write("config.json", b"[]"),
    "not UTF-8": write("config.json", b"\xff\xfe"),
    "deep nesting": write("config.json", b'{"a":' + b"[" * 10**5), "a number of 5000 digits": write(
        "config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}"),
    "a negative width": edit_json("config.json", hidden_size=-32),
    "a width of 10^12": edit_json("config.json", hidden_size=10**12),
    "a width of NaN": edit_json("config.json", hidden_size=float("nan")),
    "layers as text": edit_json("config.json", num_hidden_layers="2"),
    "heads that do not fit": edit_json("config.json", num_attention_heads=5),
    "a context of 10^18": edit_json("config.json", max_position_embeddings=10**18),
    "another model": edit_json("config.json", model_type="gpt2"),
    "scaled RoPE": edit_json("config.json", rope_parameters={"rope_type": "llama3"}),
    "RoPE as a list": edit_json("config.json", rope_parameters=[1]),
    "quantised": edit_json("config.json", quantization_config={"quant_method": "gptq"}),
    "biases": edit_json("config.json", attention_bias=True),
    "empty weights": write("model.safetensors", b""),
    "random weights": write("model.safetensors", bytes(range(256)) * 9),
    "a header of 2^63 bytes": header(lambda about: (json.dumps(about), 2**63)),
    "a header of 2^40 bytes": header(lambda about: (json.dumps(about), 2**40)),
    "a header that is no JSON": header(lambda about: "{" * 99), "a header that is a list": header(lambda about: []),
    "offsets past the end": entry(UP, data_offsets=[0, 2**40]), "offsets backwards": entry(UP, data_offsets=[64, 0]),
    "a shape of 2^62": entry(UP, shape=[2**31, 2**31]), "a negative shape": entry(UP, shape=[-96, -32]),
    "another shape": entry(UP, shape=[32, 96]), "numbers of another kind": entry(NORM, dtype="I32"),
    "an unknown kind": entry(NORM, dtype="F7"), "an unknown tensor": rename_entry(NORM, "model.layers.0.bias"),
    "a name twice": header(lambda about: json.dumps(about)[:-1] + f', "{NORM}": {json.dumps(about[NORM])}}}'),
    "not a number": edit_tensors(lambda t: t[NORM].fill_(float("nan"))),
    "a path up": index("../model.safetensors"), "an absolute path": index("/etc/passwd"),
    "a missing shard": index("b.safetensors"), "a shard twice": index("model.safetensors", "model-2.safetensors"),
    "an index of nothing": index(),
    "an index of lists": write("model.safetensors.index.json", b'{"weight_map": [1]}'),
    "a pickle": pickled, "no tokenizer": lambda path: (path / "tokenizer.json").unlink(),
    "a broken tokenizer": write("tokenizer.json", b'{"model": {}}'),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    export.export(*built("tied"), path, "hf", checked=False)
    return path


def refused(path):
    """Load all there is; one line of error and no memory worth naming."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        checkpoint.load_model(load.read(path))
        load.read_tokenizer(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and len(message) < 600, message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000                # kB


def test_the_good_ones_are_good(tmp_path, folder):
    pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
    (tmp_path / "m.gguf").write_bytes(GOOD_GGUF)
    for path in (tmp_path / "m.gguf", folder):
        checkpoint.load_model(load.read(path))
        load.read_tokenizer(path)


@pytest.mark.parametrize("name", BAD_GGUF)
def test_a_bad_gguf_file_is_refused(tmp_path, name):
    pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
    (tmp_path / "m.gguf").write_bytes(BAD_GGUF[name])
    refused(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", BAD_HF)
def test_a_bad_folder_is_refused(tmp_path, folder, name):
    shutil.copytree(folder, tmp_path / "m")
    if name == "a shard twice":
        shutil.copyfile(folder / "model.safetensors", tmp_path / "m" / "model-2.safetensors")
    BAD_HF[name](tmp_path / "m")
    refused(tmp_path / "m")


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


# ---- the command


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, words = built("tied")
    (tmp_path / "t.json").write_text(words.to_json())
    meta = {"arch": "model", "model_config": dataclasses.asdict(model.config)}
    checkpoint.save(tmp_path / "runs" / "mine", 5, model.state_dict(), None, meta, tmp_path / "t.json", best=True)
    export.main(export.Config(format="hf", check=False))
    assert sorted(path.name for path in (tmp_path / "exports" / "mine-hf").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json"]
    for wrong, words in (({"format": "hf"}, "already exists"), ({"quant": "q9", "out": "x"}, "use f32, f16, bf16"),
                         ({"window": True, "out": "x"}, "--window is a form of ONNX"),
                         ({"format": "gguf", "quant": "tq2_0"}, "use --quant=q8_0")):
        with pytest.raises(files.UserError, match=words):
            export.main(export.Config(**wrong))
    assert not (tmp_path / "x").exists()
    export.main(export.Config(checkpoint="exports/mine-hf", format="onnx", window=True, check=False))
    assert (tmp_path / "exports" / "mine-hf-window.onnx").is_file()
