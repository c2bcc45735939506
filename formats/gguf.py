"""GGUF files: what llama.cpp, Ollama, LM Studio and others read, written from a model; a Llama's, read.

The container is the gguf package's; names, shapes and the tokenizer are ours. Nothing that a file claims is believed
until it has been checked against the file's size.
"""
import functools
import itertools
import json
import os
from pathlib import Path

import numpy as np
import torch

from formats import names
from formats.weights import plain, ternary_parts, weights, with_weights
from thimble.files import UserError, need, short
from thimble.tokenizer import (
    PRETOKENIZERS,
    Tokenizer,
    byte_alphabet,
    byte_level,
    byte_tokenizer,
    guard,
    pre_tokenizer_of,
)

PRETOKENIZER_OF = {"gpt-2": "gpt2", "smollm": "smollm", "llama-bpe": "llama3"}  # llama.cpp's name: ours
NO_MERGE = "ÿ ÿ"  # bytes FF FF, which no text holds: llama.cpp wants at least one merge
END_KEYS = ("eos", "eot", "eom")  # llama.cpp ends a text at each; without the first, at id 11
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # types of tokens


# ---- out
def write(path, model, stock, tokenizer, quant, name):
    """Write a GGUF file -> (the model whose logits it must give, {tensor name: float32 array} as stored).

    stock: the architecture that the model is ("llama", "bitnet", "jamba"); name: what programs show. UserError where
    llama.cpp does not compute what this model does.
    """
    gguf = need("gguf", "--format=gguf")
    config = model.config
    if quant.startswith("tq") and stock != "bitnet":
        raise UserError(f"--quant={quant} holds -1, 0, 1 and a scale for each matrix: use --quant=q8_0 or q4_0 here")
    if getattr(config, "act", "silu") != "silu":
        raise UserError(f"llama.cpp computes SiLU in every BitNet, this model has act={config.act}: use --format=hf, "
                        "or train with --act=silu")
    if stock == "jamba" and config.expand != 2:
        raise UserError(f"llama.cpp reads Jamba with expand=2 only, this model has {config.expand}: use --format=hf")
    writer = gguf.GGUFWriter(path, stock)
    kind = "ALL_F32" if quant == "f32" else f"MOSTLY_{quant.upper()}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_name(name)
    # the package has a method for each key, which puts the architecture's name in front
    for key, value in sizes(model, stock).items():
        getattr(writer, f"add_{key}")(value)
    if hasattr(config, "act"):  # llama.cpp ignores it so far
        writer.add_string(f"{stock}.hidden_activation", config.act)
    add_tokenizer(gguf, writer, tokenizer, config.vocab_size)
    twin = plain(model)  # llama.cpp does not round the activations of float weights
    stored, values = add_tensors(gguf, writer, model, twin, stock, quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return with_weights(twin, lambda name, _: values[name]), stored


def sizes(model, stock):
    """The shape of the model, as {the part after "add_" of the method of GGUFWriter: value}."""
    config = model.config
    found = {"vocab_size": config.vocab_size, "context_length": config.block_size, "embedding_length": config.n_embd,
             "block_count": config.n_layer, "feed_forward_length": names.n_hidden(model),
             "head_count": config.n_head, "head_count_kv": names.n_kv_head(config),
             "layer_norm_rms_eps": config.norm_eps}
    if stock == "jamba":
        # for each layer, and 0 says that it is Mamba
        found["head_count_kv"] = [getattr(block.mixer, "n_kv_head", 0) for block in model.blocks]
        found |= {"ssm_conv_kernel": config.d_conv, "ssm_inner_size": config.expand * config.n_embd,
                  "ssm_state_size": names.d_state(config), "ssm_time_step_rank": names.dt_rank(config)}
    else:
        found |= {"rope_dimension_count": config.n_embd // config.n_head, "rope_freq_base": config.rope_theta}
    return found


def tensor_type(gguf, name, tensor, quant, is_ternary):
    """The type in which a tensor is stored: the one asked for, a wider one where its rows do not fill whole blocks."""
    kind = gguf.GGMLQuantizationType[quant.upper()]
    block = gguf.GGML_QUANT_SIZES[kind][0]  # numbers that share a scale
    if tensor.dim() < 2 or name.endswith(("A_log", "conv1d.weight")):
        return gguf.GGMLQuantizationType.F32  # small, and llama.cpp wants them so
    if tensor.size(1) % block or (quant.startswith("tq") and not is_ternary):
        return gguf.GGMLQuantizationType.F16
    return kind


def add_tensors(gguf, writer, model, twin, stock, quant):
    """Add the weights -> ({name there: float32 array} as stored, {our name: what the stored tensor stands for})."""
    parts = ternary_parts(model)
    rotated = {}  # llama.cpp's Llama turns other pairs than we do
    if stock == "llama":
        rotated = {"q_proj": model.config.n_head, "k_proj": names.n_kv_head(model.config)}
    stored = {}
    values = {}
    for name, tensor in weights(twin).items():
        there = names.rename(name, names.OURS, names.LLAMA_CPP, stock)
        w, scale = parts.get(name.removesuffix(".weight"), (tensor, None))
        kind = tensor_type(gguf, name, w, quant, scale is not None)
        heads = rotated.get(name.split(".")[-2])
        if heads:
            w = names.permute(w, heads)
        elif name.endswith("A_log"):
            w = -w.exp()  # llama.cpp stores A itself
        elif w.dim() == 3:
            w = w.flatten(1)  # a convolution's (E, 1, k)
        # of a ternary matrix -1, 0 and 1 are stored, which every type holds exactly, and the scale beside it
        raw = gguf.quantize(w.contiguous().numpy(), kind)
        writer.add_tensor(there, raw, raw_dtype=kind)
        stored[there] = gguf.dequantize(raw, kind).astype(np.float32)
        value = torch.from_numpy(stored[there])
        if heads:
            value = names.permute(value, heads, back=True)
        elif name.endswith(("A_log", "conv1d.weight")):
            value = tensor  # in float32 always, but of another form there
        if scale is not None:
            factor = there.replace(".weight", ".scale")
            stored[factor] = scale.reshape(1).numpy()
            writer.add_tensor(factor, stored[factor])
            value = value * scale
        values[name] = value
    return stored, values


def add_tokenizer(gguf, writer, tokenizer, vocab_size):
    """The tokenizer as llama.cpp's `gpt2` model: byte-level BPE of which byte and char vocabularies are special cases.

    A character of several bytes is one token, made by merging its bytes; the steps in between need no tokens.
    """
    hf = json.loads(tokenizer.to_json())
    alphabet = byte_alphabet()
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]  # rows that a model may have beyond its tokenizer
    types = [UNUSED] * vocab_size
    merges = []
    for token, i in hf["model"]["vocab"].items():
        if tokenizer.kind == "char":
            chars = [alphabet[byte] for byte in token.encode()]
            token = "".join(chars)
            for n in range(1, len(chars)):
                merges.append(token[:n] + " " + token[n])
        tokens[i] = token
        types[i] = NORMAL
    for token in hf["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if tokenizer.kind not in ("byte", "char"):
        for merge in hf["model"]["merges"]:
            # tokenizer.json may hold either form: "a b" or ["a", "b"]
            merges.append(merge if isinstance(merge, str) else " ".join(merge))
    merges = list(dict.fromkeys(merges))  # characters share merges of their bytes
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pretokenizer_name(tokenizer, hf))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges or [NO_MERGE])
    record = tokenizer.record
    writer.add_bos_token_id(record.bos)
    # there is one key for each; llama.cpp knows the usual names besides
    for key, i in zip(END_KEYS, record.ends, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", i)
    if record.pad is not None:
        writer.add_pad_token_id(record.pad)
    if record.unk is not None:
        writer.add_unk_token_id(record.unk)
    writer.add_add_bos_token(record.adds_bos)
    writer.add_add_space_prefix(False)
    if record.template:
        writer.add_chat_template(record.template)


def pretokenizer_name(tokenizer, hf):
    """llama.cpp's name of the rule that splits text before BPE; UserError where it has none."""
    if tokenizer.kind in ("byte", "char"):
        return "gpt-2"
    # llama.cpp's `gpt2` model neither normalises text nor falls back to bytes
    plain_bpe = hf["model"]["type"] == "BPE" and not hf["normalizer"] and not hf["model"].get("byte_fallback")
    for name, preset in PRETOKENIZER_OF.items():
        preset_rule = json.loads(pre_tokenizer_of(preset).__getstate__())
        if plain_bpe and same_split(hf["pre_tokenizer"], preset_rule):
            return name
    raise UserError(f"{tokenizer.name}: llama.cpp has no name for how this tokenizer splits text before BPE: use "
                    f"--format=hf, or train with a tokenizer made with --pretokenizer={'|'.join(PRETOKENIZERS)}")


def same_split(one, other):
    """Whether two pre-tokenizers of tokenizer.json split alike; trim_offsets does not change ids."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() - {"trim_offsets"}
        if keys != other.keys() - {"trim_offsets"}:
            return False
        return all(same_split(one[key], other[key]) for key in keys)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_split, one, other))
    return one == other


# ---- in
KEYS = {"vocab_size": "llama.vocab_size", "n_layer": "llama.block_count", "n_head": "llama.attention.head_count",
        "n_kv_head": "llama.attention.head_count_kv", "n_embd": "llama.embedding_length",
        "n_hidden": "llama.feed_forward_length", "block_size": "llama.context_length",
        "norm_eps": "llama.attention.layer_norm_rms_epsilon"}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")  # of tensors
MAX_STRINGS = 2**20  # in one list; Llama 3 has 280,000 merges


@functools.lru_cache(maxsize=1)  # weights and tokenizer are asked for one after the other
def open_file(path, _):
    """-> (reader, metadata) of the file at `path`, the second argument tells one version of it from the next."""
    import gguf

    class Reader(gguf.GGUFReader):
        """The package's own believes any length that a file claims, and makes an object of every number."""

        # how the package reads every number; past the end numpy would silently return fewer
        def _get(self, offset, dtype, count=1, override_order=None):
            if offset + np.dtype(dtype).itemsize * int(count) > self.data.size:
                raise ValueError("it ends too early")
            if count == 0:
                return np.empty(0, dtype)
            return np.frombuffer(self.data, dtype, int(count), offset)

        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind = self._get(orig_offs, np.uint32)
            n = self._get(orig_offs + 4, np.uint64)
            if kind[0] == gguf.GGUFValueType.STRING and n[0] <= MAX_STRINGS:
                return super()._get_field_parts(orig_offs, raw_type)
            dtype = self.gguf_scalar_to_np.get(gguf.GGUFValueType(kind[0]))
            if dtype is None:
                raise ValueError("a list is too long, or holds lists")
            part = self._get(orig_offs + 12, dtype, n[0])  # as one array, behind its type (4 bytes) and length (8)
            types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind[0])]
            return 12 + part.nbytes, [kind, n, part], [2], types

    try:
        reader = Reader(path)
        places = sorted((int(tensor.data_offset), int(tensor.n_bytes)) for tensor in reader.tensors)
        for (start, size), (next_start, _) in itertools.pairwise(places):
            # a small file could claim the same bytes for thousands of tensors
            if start + size > next_start:
                raise ValueError("its tensors overlap")
        values = {name: field.contents() for name, field in reader.fields.items()}
        return reader, values
    except Exception as error:  # of many kinds
        raise UserError(f"{path} is not a sound GGUF file ({short(error, 100)}): download it again") from None


def parts(path):
    """-> (metadata, {tensor name: function that returns it as float32}, the reader) of a GGUF file."""
    gguf = need("gguf", f"reading {path}")
    stat = os.stat(path)
    reader, values = open_file(Path(path), (stat.st_mtime_ns, stat.st_size))
    arrays = {t.name: functools.partial(gguf.dequantize, t.data, t.tensor_type) for t in reader.tensors}
    return dict(values), arrays, reader


def read(path):
    """The Checkpoint (arch "model") of a GGUF file of architecture llama. UserError for any other file."""
    path = Path(path)
    if path.suffix != ".gguf":
        raise UserError(f"{path} is not a checkpoint folder, Hugging Face folder or .gguf file; pickles (.bin, .pt, "
                        ".pth) can run code and are never read: convert it to safetensors")
    values, arrays, reader = parts(path)
    check_readable(path, values, reader)
    # older files leave it to the list of tokens
    values.setdefault("llama.vocab_size", len(values.get("tokenizer.ggml.tokens", ())))
    theta = values.get("llama.rope.freq_base", 10000.0)
    config = names.shape(path, values, KEYS, theta, values.get("llama.rope.dimension_count"))
    config["tie_embeddings"] = "output.weight" not in arrays
    tensors = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(np.array(array(), np.float32))  # a copy: the file is mapped, and read-only
        for stem, heads in (("attn_q.", config["n_head"]), ("attn_k.", config["n_kv_head"])):
            # of another shape it is refused later, with a better message
            if stem in name and tensor.dim() == 2 and tensor.size(0) % (2 * heads) == 0:
                tensor = names.permute(tensor, heads, back=True)
        tensors[names.rename(name, names.LLAMA_CPP, names.OURS)] = tensor.contiguous()
    return names.as_checkpoint(path, config, tensors)


def check_readable(path, values, reader):
    """UserError unless the file holds a plain Llama in number formats that we know."""
    arch = values.get("general.architecture")
    if arch != "llama":
        raise UserError(f"{path} is of architecture {str(arch)[:40]!r}: only llama can be read")
    for key in ("llama.rope.scaling.type", "llama.expert_count"):
        if values.get(key) not in (None, 0, "none"):
            raise UserError(f"{path} has {key}={str(values[key])[:40]}, which model.py does not support")
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in TYPES:
            raise UserError(f"{path}: tensor {tensor.name} is {tensor.tensor_type.name}, which cannot be read: only "
                            + ", ".join(TYPES))
        if names.rename(tensor.name, names.LLAMA_CPP, names.OURS) is None:
            raise UserError(f"{path}: tensor {tensor.name} is not one of a plain Llama")


def read_tokenizer(path):
    """The Tokenizer that a GGUF file carries."""
    values = parts(path)[0]
    model = values.get("tokenizer.ggml.model")
    pre = values.get("tokenizer.ggml.pre")
    tokens = values.get("tokenizer.ggml.tokens")
    types = values.get("tokenizer.ggml.token_type")
    merges = values.get("tokenizer.ggml.merges")
    if model != "gpt2" or pre not in PRETOKENIZER_OF:
        raise UserError(f"{path}: its tokenizer ({str(model)[:20]}, {str(pre)[:20]}) cannot be read: only byte-level "
                        f"BPE (gpt2) with {', '.join(PRETOKENIZER_OF)}; use the Hugging Face folder of this model")
    sound = all(isinstance(part, list) for part in (tokens, types, merges))
    if not sound or len(tokens) != len(types) or len(set(tokens)) < len(tokens):
        raise UserError(f"{path}: its tokenizer is damaged: download it again")
    build = functools.partial(build_tokenizer, tokens, types, merges, pre, read_record(values), name=str(path))
    return guard(f"{path}: its tokenizer is damaged", build)


def read_record(values):
    """What the file says of how the model is spoken to, for thimble/chat.py."""
    # llama.cpp's default where the file does not say it
    adds_bos = values.get("tokenizer.ggml.add_bos_token", values.get("tokenizer.ggml.pre") == "llama-bpe")
    said = {"ends": [values.get(f"tokenizer.ggml.{key}_token_id") for key in END_KEYS], "adds_bos": adds_bos,
            "template": values.get("tokenizer.chat_template")}
    for role, key in (("bos", "bos"), ("pad", "padding"), ("unk", "unknown")):
        said[role] = [values.get(f"tokenizer.ggml.{key}_token_id")]
    return said


def build_tokenizer(tokens, types, merges, pre, said, name):
    import tokenizers
    normal = {token: i for i, token in enumerate(tokens) if types[i] in (NORMAL, BYTE)}
    # a special token before the last normal one is part of the vocabulary; behind it, it is added by its order
    last = max(normal.values(), default=0)
    inside = {token: i for i, token in enumerate(tokens[:last]) if types[i] in (CONTROL, USER_DEFINED)}
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        # merges that build a character of several bytes, and NO_MERGE, have halves that are not tokens
        if left in normal and right in normal and left + right in normal:
            pairs.append((left, right))
    if not pairs and len(normal) != 256:  # characters, each made of its bytes
        byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
        chars = {}
        for token, i in normal.items():
            encoded = bytes(byte_of[char] for char in token)
            chars[encoded.decode()] = i
        hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=chars | inside, merges=[]))
        hf.decoder = tokenizers.decoders.Fuse()
    else:
        if pairs:
            split = pre_tokenizer_of(PRETOKENIZER_OF[pre])
        else:
            split = byte_tokenizer().hf.pre_tokenizer
        hf = byte_level(normal | inside, pairs, split, ignore_merges=pre == "llama-bpe")
    add = {USER_DEFINED: hf.add_tokens, CONTROL: hf.add_special_tokens}
    for i, token in enumerate(tokens):
        if types[i] not in add:
            continue
        if hf.token_to_id(token) is None and hf.get_vocab_size() != i:
            raise ValueError(f"token {token!r} has id {i}, out of order")
        add[types[i]]([token])
    return Tokenizer(hf, name, said)
