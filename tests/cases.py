"""Models to export, one for each architecture and what sets it apart, with tokenizers of every kind."""
import functools
import importlib
import json
import resource
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch

import export
from formats import check
from formats.gguf import QWEN2_PATTERN
from prepare.make_tokenizer import train_bpe
from thimble import checkpoint, data, load
from thimble.files import UserError
from thimble.load import deployed
from thimble.tokenizer import (
    EOT,
    Tokenizer,
    byte_alphabet,
    byte_level,
    byte_tokenizer,
    char_tokenizer,
    pre_tokenizer_of,
)

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48}
CASES = {
    "llama": ("model", {"n_kv_head": 2}, "bpe"),
    "tied": ("model", {"tie_embeddings": True, "rope_theta": 500.0, "norm_eps": 1e-6}, "byte"),
    "chars": ("model", {}, "char"),
    "qwen3": ("model", {"n_kv_head": 2, "qk_norm": True}, "char"),
    "mistral": ("llama", {"window": 7, "n_kv_head": 2}, "byte"),
    "nemo": ("llama", {"head_dim": 12, "n_kv_head": 2}, "bpe"),
    "llama3": ("llama", {"head_dim": 16, "rope_type": "llama3", "rope_factor": 8.0, "rope_context": 50,
                         "rope_theta": 100.0, "tie_embeddings": True}, "byte"),
    "yarn": ("llama", {"rope_type": "yarn", "rope_factor": 4.0, "rope_context": 40, "rope_high": 32.0,
                       "rope_gain": 1.138629436111989, "rope_theta": 50.0}, "byte"),
    "linear": ("llama", {"rope_type": "linear", "rope_factor": 4.0}, "byte"),
    "qwen2": ("llama", {"qkv_bias": True, "n_kv_head": 2, "tie_embeddings": True}, "qwen2"),
    "qwen2 window": ("llama", {"qkv_bias": True, "window": 7, "window_from": 1}, "qwen2"),
    "qwen3 wide": ("llama", {"qk_norm": True, "head_dim": 16, "n_kv_head": 2}, "byte"),
    "odd": ("llama", {"qkv_bias": True, "qk_norm": True, "window": 7}, "byte"),
    "arcee": ("model", {"mlp": "gelu", "n_kv_head": 2}, "bpe"),
    "gelu": ("model", {"mlp": "gelu", "qk_norm": True}, "char"),
    "bitnet": ("ternary", {"n_kv_head": 2, "n_hidden": 64}, "bpe"),
    "wide": ("ternary", {"n_embd": 256, "n_hidden": 256, "n_layer": 1}, "byte"),
    "relu2": ("ternary", {"act": "relu2"}, "byte"),
    "groups": ("ternary", {"group_size": 16, "n_hidden": 64}, "byte"),
    "streams": ("ternary", {"n_streams": 2}, "byte"),
    "jamba": ("hybrid_ssm", {"ssm": "mamba1", "n_layer": 3, "attn_layer_period": 3, "n_kv_head": 2}, "bpe"),
    "granite": ("hybrid_ssm", {"attn_layer_period": 2, "ssm_head_dim": 16, "n_kv_head": 2}, "byte"),
    "granite, rope": ("hybrid_ssm", {"attn_layer_period": 2, "ssm_head_dim": 16, "rope": True, "d_state": 8,
                                     "tie_embeddings": True}, "bpe"),
    "mamba2": ("hybrid_ssm", {"attn_layer_period": 2, "ssm_head_dim": 16, "qk_norm": True}, "byte"),
}
TEXT = "The quick brown fox, 1234 times: naïve café — ¿ñ? 日本語 🎉\n\tif x == 3.14:\n        return 'don\\'t'\n" * 3


@functools.cache
def tokenizer(kind, pretokenizer="gpt2"):
    if kind == "bpe":
        return train_bpe([TEXT + Path(data.__file__).read_text(encoding="utf-8")], 500, pretokenizer)
    if kind == "qwen2":
        return qwen2_tokenizer()
    return byte_tokenizer() if kind == "byte" else char_tokenizer(TEXT)


@functools.cache
def qwen2_tokenizer():
    """Byte-level BPE that splits and normalises as Qwen2 does: transformers takes that for granted."""
    hf = byte_level({}, [], pre_tokenizer_of(QWEN2_PATTERN))
    hf.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=[EOT], show_progress=False,
                                             initial_alphabet=byte_alphabet())
    hf.train_from_iterator([TEXT], trainer)
    return Tokenizer(hf)


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


def loaded(model, words, name="model", **meta):
    """A model and its tokenizer as thimble.load gives them."""
    return load.Loaded(Path(name), name, meta, model, words, "elite", {words.eot}, {words.eot})


def send(model, words, path, form, quant="", meta=None, **settings):
    """export.export of a model with its tokenizer."""
    cfg = export.Config(format=form, quant=quant, out=str(path), **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "N_TEXT", 100)  # two rows of a case: llama.cpp takes 5 ms for each of the tokens
        return export.export(loaded(model, words, **meta or {}), cfg)


def out(case, path, form, quant="", packed=False, **settings):
    """Export one of CASES, where the packages that its check needs are installed."""
    for package in {"hf": ("transformers",), "gguf": ("gguf", "xllamacpp"), "onnx": ("onnxruntime",)}[form]:
        pytest.importorskip(package, reason="pip install -r requirements-test.txt")
    if quant in ("online", "packed"):
        pytest.importorskip("accelerate", reason="pip install -r requirements-test.txt")
    model, words = built(case, packed)
    return send(model, words, path, form, quant, **{"prompts": 6, "prompt_tokens": 12} | settings)


def edit_tensors(change):
    """A function that changes the tensors of a Hugging Face folder in place."""
    def damage(path):
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return damage


def edit_json(name, **values):
    """A function that changes values of a JSON file in a folder."""
    def damage(path):
        about = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(about | values))
    return damage


def refused(path):
    """Load all there is; one line of error and no memory worth naming."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        checkpoint.load_model(load.read(path))
        load.read_tokenizer(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and len(message) < 600, message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
