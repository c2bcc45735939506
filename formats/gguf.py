"""GGUF files: what llama.cpp, Ollama, LM Studio and others read, written from a model; a Llama's, read.

The container is the gguf package's; names, shapes and the tokenizer are ours. Nothing that a file claims is believed
until it has been checked against the file's size.
"""
import functools
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import torch

from formats import families, names, relatives
from formats.weights import plain, ternary_parts, weights, with_weights
from thimble.files import UserError, need, short, warn
from thimble.tokenizer import (
    PRETOKENIZERS,
    Tokenizer,
    byte_alphabet,
    byte_level,
    byte_tokenizer,
    guard,
    pre_tokenizer_of,
)

# of Qwen2 and later, and of Mistral Nemo and later, as llama.cpp has them: to the second, capitals are A to Z only
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN_PATTERN = (r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
                  r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*|\p{N}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# llama.cpp's name: ours, or a pattern
PRETOKENIZER_OF = {"gpt-2": "gpt2", "smollm": "smollm", "llama-bpe": "llama3", "llama3": "llama3", "llama-v3": "llama3",
                   "qwen2": QWEN2_PATTERN, "tekken": TEKKEN_PATTERN}
WHOLE_TOKENS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word that is a token is that token, unmerged
ARCHITECTURES = {"granitemoehybrid": "granitehybrid"}  # llama.cpp's names, where they are others
HYBRIDS = ("jamba", "granitemoehybrid")
NO_MERGE = "ÿ ÿ"  # bytes FF FF, which no text holds: llama.cpp wants at least one merge
END_KEYS = ("eos", "eot", "eom")  # llama.cpp ends a text at each; without the first, at id 11
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
TYPES = {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}


# ---- out
def write(path, model, stock, tokenizer, quant, name):
    """Write a GGUF file -> (the model whose logits it must give, {tensor name: float32 array} as stored).

    stock: the architecture that the model is (a key of names.CLASSES); name: what programs show. UserError where
    llama.cpp does not compute what this model does.
    """
    gguf = need("gguf", "--format=gguf")
    config = model.config
    if quant.startswith("tq") and stock != "bitnet":
        raise UserError(f"--quant={quant} holds -1, 0, 1 and a scale for each matrix: use --quant=q8_0 or q4_0 here")
    if stock == "bitnet" and config.act != "silu":
        raise UserError(f"llama.cpp computes SiLU in every BitNet, this model has act={config.act}: use --format=hf, "
                        "or train with --act=silu")
    act = names.activation(config)
    if stock == "arcee" and act != "relu2":
        raise UserError(f"llama.cpp computes ReLU^2 in every MLP without a gate, this model has {act}: "
                        "use --format=hf, or train with --mlp=swiglu")
    if stock in HYBRIDS and config.expand != 2:
        raise UserError(f"llama.cpp reads hybrids with expand=2 only, this model has {config.expand}: use --format=hf")
    check_attention(config, stock)
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(stock, stock))
    kind = "ALL_F32" if quant == "f32" else f"MOSTLY_{quant.upper()}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_name(name)
    # the package has a method for each key, which puts the architecture's name in front
    for key, value in sizes(gguf, model, stock).items():
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


def check_attention(config, stock):
    """UserError where llama.cpp computes no such attention in this architecture."""
    if getattr(config, "window", 0):
        raise UserError(f"llama.cpp has no sliding window in {stock}, this model has window={config.window}: use "
                        "--format=hf")
    kind = getattr(config, "rope_type", "default")
    if kind == "llama3" and stock != "llama":
        raise UserError(f"llama.cpp stretches RoPE as Llama 3.1 does in llama only, not in {stock}: use --format=hf")
    if kind != "yarn":
        return
    gain = families.yarn_gain(config.rope_factor)
    if (config.rope_low, config.rope_high) != (1, 32) or abs(config.rope_gain - gain) > 1e-6:
        raise UserError(f"llama.cpp computes YaRN with rope_low=1, rope_high=32 and, at this rope_factor, rope_gain="
                        f"{gain:.4f} only: use --format=hf")


def sizes(gguf, model, stock):
    """The shape of the model, as {the part after "add_" of the method of GGUFWriter: value}."""
    config = model.config
    found = {"vocab_size": config.vocab_size, "context_length": config.block_size, "embedding_length": config.n_embd,
             "block_count": config.n_layer, "feed_forward_length": names.n_hidden(model),
             "head_count": config.n_head, "head_count_kv": names.n_kv_head(config),
             "layer_norm_rms_eps": config.norm_eps}
    if stock in HYBRIDS:
        # for each layer, and 0 says that it is Mamba
        found["head_count_kv"] = [getattr(block.mixer, "n_kv_head", 0) for block in model.blocks]
        found |= {"ssm_conv_kernel": config.d_conv, "ssm_inner_size": config.expand * config.n_embd}
    if stock == "jamba":
        found |= {"ssm_state_size": names.d_state(config), "ssm_time_step_rank": names.dt_rank(config)}
    elif stock == "granitemoehybrid":
        mixer = model.blocks[names.is_attention(model).index(False)].mixer
        found |= {"ssm_state_size": mixer.n_state, "ssm_time_step_rank": mixer.n_head, "ssm_group_count": 1,
                  "rope_scaling_finetuned": config.rope}  # whether there is RoPE at all: Granite's use of this key
    if getattr(config, "rope", True):
        found |= {"rope_dimension_count": names.head_dim(config), "rope_freq_base": config.rope_theta}
    if names.head_dim(config) != config.n_embd // config.n_head:
        found |= {"key_length": names.head_dim(config), "value_length": names.head_dim(config)}
    kind = getattr(config, "rope_type", "default")
    if kind in ("linear", "yarn"):
        found |= {"rope_scaling_type": gguf.RopeScalingType(kind), "rope_scaling_factor": config.rope_factor}
    if kind == "yarn":
        found["rope_scaling_orig_ctx_len"] = config.rope_context
    return found


def tensor_type(gguf, name, tensor, quant, is_ternary):
    """The type in which a tensor is stored: the one asked for, a wider one where its rows do not fill whole blocks."""
    kind = gguf.GGMLQuantizationType[quant.upper()]
    block = gguf.GGML_QUANT_SIZES[kind][0]  # numbers that share a scale
    if tensor.dim() < 2 or name.endswith(("A_log", "conv1d.weight")):
        return gguf.GGMLQuantizationType.F32  # small, and llama.cpp wants them so
    if tensor.size(1) % block or (quant.startswith("tq") and not is_ternary):
        return gguf.GGMLQuantizationType.F16
    if name in ("embed.weight", "head.weight") and quant.startswith(("q4", "q5")):
        return gguf.GGMLQuantizationType.Q8_0  # at 4 bits these would cost more than they save
    return kind


def add_tensors(gguf, writer, model, twin, stock, quant):
    """Add the weights -> ({name there: float32 array} as stored, {our name: what the stored tensor stands for})."""
    parts = ternary_parts(model)
    rotated = {}  # llama.cpp turns other pairs than we do in these
    if stock in ("llama", "arcee", "granitemoehybrid") and getattr(model.config, "rope", True):
        rotated = {"q_proj": model.config.n_head, "k_proj": names.n_kv_head(model.config)}
    stored = {}
    values = {}
    if getattr(model.config, "rope_type", "default") == "llama3":  # there a tensor, here five settings
        stored["rope_freqs.weight"] = families.factors_of_llama3(model.config)
        writer.add_tensor("rope_freqs.weight", stored["rope_freqs.weight"])
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
        if stock == "granitemoehybrid" and name.endswith(("A_log", "mixer.D")):
            w = w[:, None]
        # of a ternary matrix -1, 0 and 1 are stored, which every type holds exactly, and the scale beside it
        raw = gguf.quantize(w.contiguous().numpy(), kind)
        writer.add_tensor(there, raw, raw_dtype=kind)
        stored[there] = gguf.dequantize(raw, kind).astype(np.float32)
        value = torch.from_numpy(stored[there])
        if heads:
            value = names.permute(value, heads, back=True)
        elif name.endswith(("A_log", "mixer.D", "conv1d.weight")):
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
    prefix = sentencepiece_prefix(hf)
    if prefix is None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pretokenizer_name(tokenizer, hf))
        writer.add_token_merges(merges or [NO_MERGE])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(sentencepiece_scores(tokens, types, merges))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
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
    writer.add_add_space_prefix(bool(prefix))
    if record.template:
        writer.add_chat_template(record.template)


def sentencepiece_prefix(hf):
    """Whether SentencePiece's BPE puts a space in front of a text; None where a tokenizer.json holds another kind."""
    if not hf["model"].get("byte_fallback") or hf["pre_tokenizer"]:
        return None
    for prefix in (True, False):
        if json.loads(sentencepiece_steps(prefix)[0].__getstate__()) == hf["normalizer"]:
            return prefix
    return None


def sentencepiece_scores(tokens, types, merges):
    """The score of each token: the earlier a merge makes it, the higher. Marks what is not ordinary in `types`, too."""
    scores = [0.0] * len(tokens)
    ids = {token: i for i, token in enumerate(tokens)}
    for rank, merge in enumerate(merges):
        i = ids[merge.replace(" ", "")]
        if scores[i] == 0:
            scores[i] = -1.0 - rank
    for i, token in enumerate(tokens):
        if types[i] == NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = BYTE
        elif types[i] == CONTROL and token == "<unk>":
            types[i] = UNKNOWN
    return scores


def sentencepiece_steps(prefix):
    """The normalizer and the decoder of the tokenizers library; prefix: whether a text gets a space in front."""
    import tokenizers
    normalizers = tokenizers.normalizers
    decoders = tokenizers.decoders
    there = [normalizers.Replace(" ", "\u2581")]
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        there.insert(0, normalizers.Prepend("\u2581"))
        back.append(decoders.Strip(" ", 1, 0))
    return normalizers.Sequence(there), decoders.Sequence(back)


def pretokenizer_name(tokenizer, hf):
    """llama.cpp's name of the rule that splits text before BPE; UserError where it has none."""
    if tokenizer.kind in ("byte", "char"):
        return "gpt-2"
    # llama.cpp's `gpt2` model neither normalises text nor falls back to bytes
    plain_bpe = hf["model"]["type"] == "BPE" and not hf["model"].get("byte_fallback")
    for name, preset in PRETOKENIZER_OF.items():
        preset_rule = json.loads(pre_tokenizer_of(preset).__getstate__())
        if not plain_bpe or not same_split(hf["pre_tokenizer"], preset_rule):
            continue
        if hf["normalizer"] == {"type": "NFC"} and name == "qwen2":  # as in all GGUF files of Qwen
            warn("llama.cpp does not compose characters as this tokenizer does (NFC): there, e and an accent stay two")
            return name
        if not hf["normalizer"]:
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


def is_gguf(path):
    """Whether the file at `path` begins like a GGUF file, whatever its name is: Ollama's have none."""
    with open(path, "rb") as file:
        start = file.read(8)
    if start[:7] == b"GGUF\0\0\0":  # the version, 4 bytes, begins with zeros
        raise UserError(f"{path} is a big-endian GGUF file: convert it with gguf-convert-endian, which comes with the "
                        "gguf package")
    return start[:4] == b"GGUF"


def read(path):
    """The Checkpoint of a GGUF file with a model of the Llama family. UserError for any other file."""
    path = Path(path)
    if not is_gguf(path):
        raise UserError(f"{path} is not a checkpoint folder, Hugging Face folder or GGUF file; pickles (.bin, .pt, "
                        ".pth) can run code and are never read: convert it to safetensors")
    values, arrays, reader = parts(path)
    arch = values.get("general.architecture")
    known = (*families.ARCHITECTURES, *relatives.GGUF_NAMES)
    if arch not in known:
        families.refuse(path, "general.architecture", arch, f": only {', '.join(known)}")
    source = families if arch in families.ARCHITECTURES else relatives
    family, config = source.from_gguf(path, values, arrays)
    arrays.pop("rope_freqs.weight", None)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    tensors = {name: read_array(path, name, kinds[name], array) for name, array in arrays.items()}
    try:
        tensors = relatives.rename_gguf(family, tensors)
    except KeyError as error:
        raise UserError(f"{path}: tensor {error.args[0]} is not one of {arch}") from None
    if "embed.weight" not in tensors:
        raise UserError(f"{path} lacks token_embd.weight: download it again")
    if source is relatives:
        relatives.settle_gguf(path, values, family, config, tensors)
    elif family == "llama":  # llama.cpp turns other pairs than we do
        for name, tensor in tensors.items():
            heads = {"q_proj": config["n_head"], "k_proj": config["n_kv_head"]}.get(name.split(".")[-2])
            # of another shape it is refused later, with a better message
            if heads and tensor.size(0) % (2 * heads) == 0:
                tensors[name] = names.permute(tensor, heads, back=True).contiguous()
    return families.as_checkpoint(path, config, tensors, relatives.ARCHS.get(family))


def read_array(path, name, kind, array):
    """The float32 tensor of a function that `parts` gives."""
    try:
        return torch.tensor(array(), dtype=torch.float32)  # a copy: the file is mapped, and read-only
    except NotImplementedError:  # the package's
        raise UserError(f"{path}: tensor {name} is {kind}, which cannot be read: use another file of this "
                        "model") from None


def read_tokenizer(path):
    """The Tokenizer that a GGUF file carries."""
    values = parts(path)[0]
    model = values.get("tokenizer.ggml.model")
    pre = values.get("tokenizer.ggml.pre")
    tokens = values.get("tokenizer.ggml.tokens")
    types = values.get("tokenizer.ggml.token_type")
    if model == "llama":  # SentencePiece, where scores stand for merges
        ranks = values.get("tokenizer.ggml.scores")
        options = {"prefix": values.get("tokenizer.ggml.add_space_prefix", True)}
        make = build_sentencepiece
    elif model == "gpt2" and pre in PRETOKENIZER_OF:
        ranks = values.get("tokenizer.ggml.merges")
        options = {"pre": pre}
        make = build_tokenizer
    else:
        raise UserError(f"{path}: its tokenizer ({str(model)[:20]}, {str(pre)[:20]}) cannot be read: only "
                        f"SentencePiece (llama) and byte-level BPE (gpt2) with {', '.join(PRETOKENIZER_OF)}; use the "
                        "Hugging Face folder of this model")
    lists = all(isinstance(part, list) for part in (tokens, types, ranks))
    # a token of a type that does not exist would be left out, and with it what its merges make
    if not lists or len(tokens) != len(types) or len(set(tokens)) < len(tokens) or not TYPES.issuperset(types):
        raise UserError(f"{path}: its tokenizer is damaged: download it again")
    build = functools.partial(make, tokens, types, ranks, **options, said=read_record(values), name=str(path))
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


def build_sentencepiece(tokens, types, scores, prefix, said, name):
    """SentencePiece's BPE: of two neighbours that make a token, those with the highest score are merged first.

    A space is "\u2581"; a character that is not a token becomes its bytes. prefix: whether a text gets a space first.
    """
    import tokenizers
    vocab = {token: i for i, token in enumerate(tokens)}
    ordinary = {token for token, i in vocab.items() if types[i] in (NORMAL, USER_DEFINED)}
    merges = []
    for token in ordinary:
        for n in range(1, len(token)):
            left = token[:n]
            right = token[n:]
            if left in ordinary and right in ordinary:
                merges.append((-scores[vocab[token]], vocab[left], vocab[right]))
    merges = [(tokens[left], tokens[right]) for _, left, right in sorted(merges)]
    unknown = next((token for token, i in vocab.items() if types[i] == UNKNOWN), None)
    bpe = tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    hf = tokenizers.Tokenizer(bpe)
    hf.normalizer, hf.decoder = sentencepiece_steps(prefix)
    add_special(hf, tokens, types)
    return Tokenizer(hf, name, said)


def add_special(hf, tokens, types):
    """Mark the tokens that are not ordinary, in the order of their ids; ValueError where a new one gets another id."""
    for i, token in enumerate(tokens):
        if types[i] not in (UNKNOWN, CONTROL, USER_DEFINED):
            continue
        if hf.token_to_id(token) is None and hf.get_vocab_size() != i:
            raise ValueError(f"token {token!r} has id {i}, out of order")
        add = hf.add_tokens if types[i] == USER_DEFINED else hf.add_special_tokens
        add([token])


def build_tokenizer(tokens, types, merges, pre, said, name):
    import tokenizers
    normal = {token: i for i, token in enumerate(tokens) if types[i] in (NORMAL, BYTE)}
    # a special token before the last normal one is part of the vocabulary; behind it, it is added by its order
    last = max(normal.values(), default=0)
    special = {token: i for i, token in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)}
    behind = [i for i in special.values() if i > last]
    if behind != list(range(last + 1, last + 1 + len(behind))):
        last = len(tokens)  # unused ids between them: no order would give them theirs
    inside = {token: i for token, i in special.items() if i <= last}
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        # merges that build a character of several bytes, and NO_MERGE, have halves that are not tokens
        if left in normal and right in normal and left + right in normal:
            pairs.append((left, right))
    if not pairs and len(normal) != 256:  # characters, each made of its bytes
        # the bytes of a character are not tokens: a merge of a token is left over from BPE, and what it made is lost
        for merge in merges:
            if not normal.keys().isdisjoint(merge.split(" ")):
                raise ValueError(f"the merge {merge!r} does not make a token")
        byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
        chars = {}
        for token, i in normal.items():
            char = bytes(byte_of[char] for char in token).decode()
            if len(char) != 1:
                raise ValueError(f"no merge makes the token {token!r}")
            chars[char] = i
        hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=chars | inside, merges=[]))
        hf.decoder = tokenizers.decoders.Fuse()
    else:
        if pairs:
            split = pre_tokenizer_of(PRETOKENIZER_OF[pre])
        else:
            split = byte_tokenizer().hf.pre_tokenizer
        hf = byte_level(normal | inside, pairs, split, ignore_merges=pre in WHOLE_TOKENS_FIRST)
    add_special(hf, tokens, types)
    return Tokenizer(hf, name, said)
