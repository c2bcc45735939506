"""Weights made elsewhere: a Hugging Face folder (safetensors, Llama) or a GGUF file of architecture llama.

    python sample.py --checkpoint=SmolLM2.gguf --prompt "The capital of France is"
    python train.py config/finetune.py --init_from=SmolLM2/
    python export.py --format=hf --checkpoint=SmolLM2.gguf         # in, and out again

`checkpoint.load` and `load_tokenizer` come here for such paths. Nothing a file claims is believed before it is
held against the file's size, and pickles are never read. The tables of names serve export.py, too.
"""
import functools
import itertools
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import safetensors
import torch

from thimble import checkpoint, configurator, files
from thimble.files import UserError
from thimble.tokenizer import (
    Tokenizer,
    byte_alphabet,
    byte_level,
    byte_tokenizer,
    guard,
    pre_tokenizer_of,
)

PREFIXES = ("blocks", "model.layers", "blk")
NAMES = [  # ours, Hugging Face's Llama and BitNet, llama.cpp's
    ("embed", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("head", "lm_head", "output"),
    ("*.attn_norm", "*.input_layernorm", "*.attn_norm"),
    ("*.attn.q_proj", "*.self_attn.q_proj", "*.attn_q"),
    ("*.attn.k_proj", "*.self_attn.k_proj", "*.attn_k"),
    ("*.attn.v_proj", "*.self_attn.v_proj", "*.attn_v"),
    ("*.attn.sub_norm", "*.self_attn.attn_sub_norm", "*.attn_sub_norm"),
    ("*.attn.o_proj", "*.self_attn.o_proj", "*.attn_output"),
    ("*.mlp_norm", "*.post_attention_layernorm", "*.ffn_norm"),
    ("*.mlp.gate_proj", "*.mlp.gate_proj", "*.ffn_gate"),
    ("*.mlp.up_proj", "*.mlp.up_proj", "*.ffn_up"),
    ("*.mlp.sub_norm", "*.mlp.ffn_sub_norm", "*.ffn_sub_norm"),
    ("*.mlp.down_proj", "*.mlp.down_proj", "*.ffn_down"),
]
JAMBA = [*NAMES[:1], ("norm", "model.final_layernorm", "output_norm"), NAMES[2],
         ("*.mixer_norm", "*.input_layernorm", "*.attn_norm"), ("*.mlp_norm", "*.pre_ff_layernorm", "*.ffn_norm")]
JAMBA += [(f"*.mixer.{x}_proj", f"*.self_attn.{x}_proj", f"*.attn_{'output' if x == 'o' else x}") for x in "qkvo"]
JAMBA += [(f"*.mlp.{x}_proj", f"*.feed_forward.{x}_proj", f"*.ffn_{x}") for x in ("gate", "up", "down")]
JAMBA += [(f"*.mixer.{x}_norm", f"*.mamba.{x}_layernorm", f"*.ssm_{x}_norm") for x in ("dt", "b", "c")]
JAMBA += [(f"*.mixer.{x}", f"*.mamba.{x}", f"*.ssm_{y}") for x, y in (
    ("in_proj", "in"), ("conv1d", "conv1d"), ("x_proj", "x"), ("dt_proj", "dt"), ("A_log", "a"), ("D", "d"),
    ("out_proj", "out"))]
PRE = {"gpt-2": "gpt2", "smollm": "smollm", "llama-bpe": "llama3"}  # llama.cpp's name: ours, of what splits words
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")  # of tensors in a GGUF file
MAX_STRINGS = 2**20  # in one list of a GGUF file; Llama 3 has 280,000 merges

# ---- names


def rename(name, source, target, stock="llama"):
    """A tensor's name, from one column of the table to another (0 ours, 1 Hugging Face, 2 llama.cpp), or None."""
    table = JAMBA if stock == "jamba" else NAMES
    stem, dot, kind = name.rpartition(".")
    if kind not in ("weight", "bias", "weight_scale"):
        stem, dot, kind = name, "", ""
    match = re.fullmatch(re.escape(PREFIXES[source]) + r"\.(\d{1,4})\.(.+)", stem)
    pattern, block = (f"*.{match[2]}", f"{PREFIXES[target]}.{match[1]}.") if match else (stem, "")
    found = [row[target] for row in table if row[source] == pattern]
    return block + found[0].removeprefix("*.") + dot + kind if found else None


def permute(w, n_head, back=False):
    """Rows of q or k (heads * D, C) from half-split to interleaved RoPE pairs, or back. llama.cpp wants the latter."""
    shape = (n_head, -1, 2) if back else (n_head, 2, w.shape[0] // n_head // 2)
    return w.reshape(*shape, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def need(package, what):
    """Import an optional package; UserError says how to get it."""
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f"{what} needs the package {package}: pip install {package}") from None


# ---- reading


def read(path):
    """A Checkpoint (arch "model", its config, tensors) of a Hugging Face folder or a GGUF file. UserError otherwise."""
    path = Path(path)
    if path.is_dir():
        config, tensors, meta = read_hf(path)
    elif path.suffix == ".gguf":
        config, tensors, meta = read_gguf(path)
    else:
        raise UserError(f"{path} is no checkpoint folder, Hugging Face folder or .gguf file; pickles (.bin, .pt, .pth) "
                        "can run code and are never read: convert it to safetensors")
    try:
        import model
        config = configurator.from_flat(model.Config, config)
    except ValueError as error:
        raise UserError(f"{path}: model.py cannot be what it describes ({error})") from None
    meta = {"arch": "model", "model_config": asdict(config), "step": 0, "name": path.stem} | meta
    return checkpoint.Checkpoint(path, meta, tensors, None)


def read_hf(folder):
    """-> (settings of model.Config, {our name: float32 tensor}, meta) of a folder with a LlamaForCausalLM."""
    about, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json", {})
    rope = about.get("rope_parameters") or about.get("rope_scaling") or {}
    expected = {"model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False, None),
                "mlp_bias": (False, None), "quantization_config": (None,)}
    for key, values in expected.items():
        if about.get(key) not in values:
            raise UserError(f"{folder}/config.json has {key}={str(about.get(key))[:80]}, which cannot be read: "
                            f"only Llama with {key}={values[0]}")
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{folder}/config.json has scaled RoPE ({str(rope)[:80]}), which model.py does not know")
    theta = rope.get("rope_theta", about.get("rope_theta", 10000.0))
    config = shape(folder / "config.json", about, "vocab_size", "num_hidden_layers", "num_attention_heads",
                   "num_key_value_heads", "hidden_size", "intermediate_size", "max_position_embeddings",
                   "rms_norm_eps", theta, about.get("head_dim"))
    config["tie_embeddings"] = about.get("tie_word_embeddings") is True
    tensors = {}
    for file in safetensors_files(folder):
        for name, tensor in read_safetensors(file):
            ours = rename(name, 1, 0)
            if ours == "head.weight" and config["tie_embeddings"] or name.endswith("rotary_emb.inv_freq"):
                continue
            if ours is None or ours in tensors:
                raise UserError(f"{file}: tensor {name} is {'stored twice' if ours else 'not one of a plain Llama'}")
            tensors[ours] = tensor
    ends = generation.get("eos_token_id", about.get("eos_token_id"))
    ends = [i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int and 0 <= i < config["vocab_size"]]
    bos = about.get("bos_token_id")
    meta = {"stop_ids": ends} | ({"eos": ends[0]} if ends else {}) | ({"bos": bos} if type(bos) is int else {})
    template = folder / "chat_template.jinja"
    if template.is_file():
        meta["chat_template"] = template.read_text(encoding="utf-8")
    elif template := read_json(folder / "tokenizer_config.json", {}).get("chat_template"):
        meta["chat_template"] = str(template)
    return config, tensors, meta


def shape(where, about, vocab, layers, heads, kv_heads, width, hidden, context, eps, theta, head_dim):
    """Settings of model.Config from keys of a foreign description; UserError if one is missing or is no number."""
    def number(key, value, kind=int, most=2**20):
        if type(value) not in (int, kind) or not 0 < value < most:
            raise UserError(f"{where}: {key} is {str(value)[:40]!r}, not a number in its range")
        return value

    n_head = number(heads, about.get(heads))
    config = {"n_layer": number(layers, about.get(layers), most=1000), "n_head": n_head,
              "n_kv_head": number(kv_heads, about.get(kv_heads) or n_head), "n_embd": number(width, about.get(width)),
              "n_hidden": number(hidden, about.get(hidden)), "vocab_size": number(vocab, about.get(vocab), most=2**24),
              "block_size": number(context, about.get(context), most=2**28),
              "rope_theta": float(number("the base of RoPE", theta, float, 2**60)),
              "norm_eps": float(f"{number(eps, about.get(eps), float):.7g}")}  # a float32 in GGUF: 9.99999974e-06
    if head_dim not in (None, config["n_embd"] // n_head):
        raise UserError(f"{where}: heads of {str(head_dim)[:40]} are not {width} / {heads}, which model.py needs")
    return config


def safetensors_files(folder):
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
            raise UserError(f"{folder} has no model.safetensors" + (f"; {pickles[0]} is a pickle, which can run code "
                            "and is never read: convert it to safetensors" if pickles else ""))
        return [folder / "model.safetensors"]
    names = read_json(index).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,150}\.safetensors", name):
            raise UserError(f"{index} names the file {name[:80]!r}, which is not a plain name")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing, but {index.name} names it: download it")
    if not names:
        raise UserError(f"{index} names no files")
    return [folder / name for name in names]


def read_safetensors(file):
    """Yield (name, float32 tensor) of a safetensors file, which is checked against its size before anything is read."""
    try:
        with open(file, "rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header = raw.read(size) if size < min(10**8, file.stat().st_size) else b""
        names = json.loads(header, object_pairs_hook=lambda pairs: [key for key, _ in pairs])
        if len(set(names)) < len(names):
            raise ValueError("a tensor is named twice")
        with safetensors.safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                tensor = tensors.get_tensor(name)
                if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                    raise ValueError(f"tensor {name} is {tensor.dtype}, which is none of float32, float16, bfloat16")
                yield name, tensor.float()
    except Exception as error:  # the library's errors share no base class
        raise UserError(f"{file} is not a valid safetensors file ({files.short(error)[:200]}): "
                        "download it again") from None


def read_json(path, default=None):
    if default is not None and not path.is_file():
        return default
    try:
        if path.stat().st_size > 2**26:
            raise ValueError("it is over 64 MB")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read ({files.short(error)[:100]}): download it again") from None
    return value


@functools.lru_cache(maxsize=1)  # weights and tokenizer are asked for one after the other
def open_gguf(path, _):
    import gguf

    class Reader(gguf.GGUFReader):
        """The package's own believes any length that a file claims, and makes an object of every number."""

        def _get(self, offset, dtype, count=1, override_order=None):
            if offset + np.dtype(dtype).itemsize * int(count) > self.data.size:
                raise ValueError("it ends too early")
            return np.frombuffer(self.data, dtype, int(count), offset) if count else np.empty(0, dtype)

        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, n = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            if kind[0] == gguf.GGUFValueType.STRING and n[0] <= MAX_STRINGS:
                return super()._get_field_parts(orig_offs, raw_type)
            dtype = self.gguf_scalar_to_np.get(gguf.GGUFValueType(kind[0]))
            if dtype is None:
                raise ValueError("a list is too long, or holds lists")
            part = self._get(orig_offs + 12, dtype, n[0])
            return 12 + part.nbytes, [kind, n, part], [2], [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind[0])]

    try:
        reader = Reader(path)
        places = sorted((int(tensor.data_offset), int(tensor.n_bytes)) for tensor in reader.tensors)
        if any(one + size > other for (one, size), (other, _) in itertools.pairwise(places)):
            raise ValueError("its tensors overlap")
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # of many kinds
        reason = files.short(error)[:100]
        raise UserError(f"{path} is not a sound GGUF file ({reason}): download it again") from None


def gguf_parts(path):
    """-> (metadata, {tensor name: function that gives it as float32}, its reader) of a GGUF file."""
    gguf, stat = need("gguf", f"reading {path}"), os.stat(path)
    reader, values = open_gguf(Path(path), (stat.st_mtime_ns, stat.st_size))
    arrays = {t.name: functools.partial(gguf.dequantize, t.data, t.tensor_type) for t in reader.tensors}
    return dict(values), arrays, reader


def read_gguf(path):
    """-> (settings of model.Config, {our name: float32 tensor}, meta) of a GGUF file of architecture llama."""
    values, arrays, reader = gguf_parts(path)
    if values.get("general.architecture") != "llama":
        raise UserError(f"{path} is of architecture {str(values.get('general.architecture'))[:40]!r}: only llama can "
                        "be read")
    for key in ("llama.rope.scaling.type", "llama.expert_count"):
        if values.get(key) not in (None, 0, "none"):
            raise UserError(f"{path} has {key}={str(values[key])[:40]}, which model.py does not know")
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in KINDS:
            raise UserError(f"{path}: tensor {tensor.name} is {tensor.tensor_type.name}, which cannot be read: only "
                            + ", ".join(KINDS))
        if rename(tensor.name, 2, 0) is None:
            raise UserError(f"{path}: tensor {tensor.name} is not one of a plain Llama")
    values.setdefault("llama.vocab_size", len(values.get("tokenizer.ggml.tokens", ())))
    config = shape(path, values, "llama.vocab_size", "llama.block_count", "llama.attention.head_count",
                   "llama.attention.head_count_kv", "llama.embedding_length", "llama.feed_forward_length",
                   "llama.context_length", "llama.attention.layer_norm_rms_epsilon",
                   values.get("llama.rope.freq_base", 10000.0), values.get("llama.rope.dimension_count"))
    config["tie_embeddings"] = "output.weight" not in arrays
    tensors = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(np.array(array(), np.float32))
        for stem, heads in (("attn_q.", config["n_head"]), ("attn_k.", config["n_kv_head"])):
            if stem in name and tensor.dim() == 2 and tensor.size(0) % (2 * heads) == 0:
                tensor = permute(tensor, heads, back=True)
        tensors[rename(name, 2, 0)] = tensor.contiguous()
    eos, bos = values.get("tokenizer.ggml.eos_token_id"), values.get("tokenizer.ggml.bos_token_id")
    meta = {key: i for key, i in (("eos", eos), ("bos", bos)) if type(i) is int and 0 <= i < config["vocab_size"]}
    if "eos" in meta:
        meta["stop_ids"] = [eos]
    if isinstance(values.get("tokenizer.chat_template"), str):
        meta["chat_template"] = values["tokenizer.chat_template"]
    return config, tensors, meta


def read_tokenizer(path):
    """The Tokenizer that a GGUF file carries."""
    values = gguf_parts(path)[0]
    model, pre = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    tokens, types, merges = (values.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
    if model != "gpt2" or pre not in PRE:
        raise UserError(f"{path}: its tokenizer ({str(model)[:20]}, {str(pre)[:20]}) cannot be read: only byte-level "
                        f"BPE (gpt2) with {', '.join(PRE)}; use the Hugging Face folder of this model")
    lists = [tokens, types, merges]
    if not all(isinstance(part, list) for part in lists) or len(tokens) != len(types) or len(set(tokens)) < len(tokens):
        raise UserError(f"{path}: its tokenizer is damaged: download it again")
    normal = {token: i for i, token in enumerate(tokens) if types[i] in (1, 6)}
    last = max(normal.values(), default=0)  # a special token before the last normal one is part of the vocabulary
    inside = {token: i for i, token in enumerate(tokens[:last]) if types[i] in (3, 4)}
    byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
    pairs = [tuple(merge.partition(" ")[::2]) for merge in merges]
    pairs = [pair for pair in pairs if all(part in normal for part in (*pair, "".join(pair)))]

    def build():
        import tokenizers
        if not pairs and len(normal) != 256:  # characters, each made of its bytes
            chars = {bytes(byte_of[char] for char in token).decode(): i for token, i in normal.items()}
            hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=chars | inside, merges=[]))
            hf.decoder = tokenizers.decoders.Fuse()
        else:
            split = pre_tokenizer_of(PRE[pre]) if pairs else byte_tokenizer().hf.pre_tokenizer
            hf = byte_level(normal | inside, pairs, split, ignore_merges=pre == "llama-bpe")
        for kind, add in ((4, hf.add_tokens), (3, hf.add_special_tokens)):
            wanted = [(i, token) for i, token in enumerate(tokens) if types[i] == kind]
            for i, token in wanted:
                if hf.token_to_id(token) is None and hf.get_vocab_size() != i:
                    raise ValueError(f"token {token!r} has id {i}, out of order")
                add([token])
        return Tokenizer(hf, name=str(path))

    return guard(f"{path}: its tokenizer is damaged", build)
