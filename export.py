"""Take a model elsewhere, and prove that it is the same there; or bring real weights in.

    python export.py --format=hf                                   # a folder for transformers, vLLM, MLX, ...
    python export.py --format=gguf --quant=q8_0                    # a file for llama.cpp, Ollama, LM Studio, ...
    python export.py --format=hf --checkpoint=SmolLM2.gguf         # foreign weights in, and out again
    python sample.py --checkpoint=SmolLM2.gguf --prompt "The capital of France is"

What is written is read again by the program it is for: its logits and greedy texts must be ours before the artefact
gets its name. `model.py` goes out as Llama, `ternary.py` as BitNet, `hybrid_ssm.py` as Jamba; what no stock
architecture can express (your fork, mHC-lite streams) goes to Hugging Face with the model file itself as its code.
In come a Hugging Face folder (safetensors, Llama) and GGUF (llama; F32, F16, BF16, Q8_0, Q4_0, Q4_1), by `read`.
"""
import copy
import functools
import inspect
import json
import os
import re
import shutil
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn as nn

import checkpoint
import configurator
import data
from configurator import UserError


@dataclass(frozen=True)
class Config:
    # what
    checkpoint: str = ""            # run or checkpoint folder, Hugging Face folder or GGUF file; empty: the newest run
    which: Literal["best", "latest"] = "best"  # checkpoint of the run
    format: Literal["hf", "gguf", "onnx", "web"] = "hf"
    quant: str = ""                 # how numbers are stored, see export.py --help; empty: as they are
    out: str = ""                   # folder or file to write; empty: a name under exports/
    window: bool = False            # onnx: the last logits of a fixed window, no cache
    # check
    check: bool = True              # reload it in its own program, where that is installed
    prompts: int = 50               # greedy texts to compare
    prompt_tokens: int = 64         # length of each

    def __post_init__(self):
        for name in ("prompts", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


QUANTS = {  # the first is the default
    "hf": ("f32", "f16", "bf16"),
    "hf, ternary": ("online", "packed", "plain", "f16", "bf16"),
    "gguf": ("f32", "f16", "bf16", "q8_0", "q4_0", "tq1_0", "tq2_0"),
}
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
PRE = {"gpt-2": "gpt2", "smollm": "smollm", "llama-bpe": "llama3"}  # llama.cpp's name: ours, of what splits words
NO_MERGE = "ÿ ÿ"  # bytes FF FF, which no text holds: llama.cpp wants at least one merge
HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}
GENERATED = "# Made by export.py: lets transformers run the model file beside it. There is no cache: each token costs"
WRAPPER = GENERATED + ''' a whole pass.
import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .{arch} import Config, Model


class ThimbleConfig(PretrainedConfig):
    model_type = "thimble_{arch}"


class ThimbleForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ThimbleConfig
    main_input_name = "input_ids"
    _no_split_modules = ["Model"]

    def __init__(self, config):
        super().__init__(config)
        self.model = Model(Config(**config.thimble))
        for module in self.modules():
            module._non_persistent_buffers_set.clear()     # or from_pretrained leaves them empty
        self.post_init()

    def _init_weights(self, module):
        pass                                               # Model did

    def forward(self, input_ids, labels=None, **ignored):
        targets = None if labels is None else torch.where(labels[:, 1:] == -100, -1, labels[:, 1:])
        logits = self.model(input_ids)[0]
        loss = None
        if targets is not None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-1)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, **ignored):
        return {{"input_ids": input_ids[:, -self.model.config.block_size:]}}
'''

# ---- what a model is elsewhere


def architecture(model):
    """("llama" | "bitnet" | "jamba", "") where a stock architecture can express the model, else ("", why not)."""
    arch, config = type(model).__module__, model.config
    if arch == "model":
        wrong = "qk_norm" if config.qk_norm else "mlp=gelu" if config.mlp == "gelu" else ""
        return ("", wrong) if wrong else ("llama", "")
    if arch == "ternary":
        wrong = f"n_streams={config.n_streams}" if config.n_streams > 1 else "" if config.sub_norm else "sub_norm=false"
        return ("", wrong) if wrong else ("bitnet", "")
    return "", f"a model file of its own, {arch}.py"


def rename(name, source, target):
    """A tensor's name, from one column of NAMES to another (0 ours, 1 Hugging Face, 2 llama.cpp); None if unknown."""
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(re.escape(PREFIXES[source]) + r"\.(\d{1,4})\.(.+)", stem)
    pattern, block = (f"*.{match[2]}", f"{PREFIXES[target]}.{match[1]}.") if match else (stem, "")
    found = [row[target] for row in NAMES if row[source] == pattern and kind in ("weight", "weight_scale")]
    return block + found[0].removeprefix("*.") + f".{kind}" if found else None


def permute(w, n_head, back=False):
    """Rows of q or k (heads * D, C) from half-split to interleaved RoPE pairs, or back. llama.cpp wants the latter."""
    shape = (n_head, -1, 2) if back else (n_head, 2, w.shape[0] // n_head // 2)
    return w.reshape(*shape, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def ternary_parts(model):
    """{name of a matrix: (t of -1, 0, 1; scale, () or (N, groups))} of a ternary model, packed or not."""
    parts, config = {}, model.config
    for name, module in model.named_modules():
        if hasattr(module, "codes"):
            from kernels import ternary
            n_in = config.n_embd
            if name.endswith("down_proj"):
                n_in = len(model.get_submodule(name.replace("down_proj", "gate_proj")).codes)
            parts[name] = ternary.unpack(module.codes, n_in).float(), module.scales.t()
        elif type(module).__name__ == "TernaryLinear":
            parts[name] = sys.modules[type(module).__module__].absmean(module.weight.detach(), module.group_size)
    return parts


def plain(model):
    """A copy in float32 whose matrices are plain nn.Linear: a ternary model without the rounding of activations."""
    config, parts = model.config, ternary_parts(model)
    if not parts:
        return copy.deepcopy(model).float().eval()
    if config.packed:
        twin = type(model)(replace(config, packed=False))
        twin.load_state_dict(model.state_dict(), strict=False)
    else:
        twin = copy.deepcopy(model)
    for name, (t, scale) in parts.items():
        if scale.dim():
            scale = scale.repeat_interleave(config.group_size, 1)
        linear = nn.Linear(t.size(1), t.size(0), bias=False)
        linear.weight = nn.Parameter(t * scale)
        twin.set_submodule(name, linear)
    return twin.float().eval()


def with_weights(model, change):
    """A copy whose every tensor is change(name, tensor)."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in twin.state_dict(keep_vars=True).items():
            tensor.copy_(change(name, tensor.detach()))
    return twin


# ---- out: Hugging Face


def write_hf(folder, model, tokenizer, quant, meta):
    """Write a folder for transformers -> (the model whose logits it must give, {tensor name: tensor} as stored)."""
    config, (stock, _) = model.config, architecture(model)
    arch = type(model).__module__
    if getattr(config, "packed", False) and (quant == "online" or not stock):
        raise UserError("a packed checkpoint has no weights to train on or to run elsewhere: "
                        + ("use --quant=packed or plain" if stock else "export the run it was packed from"))
    twin = model if not stock or quant in ("online", "packed") else plain(model)
    dtype = HALVES.get(quant, torch.float32)
    if quant in HALVES:
        twin = with_weights(twin, lambda name, tensor: tensor.to(dtype).float())
    tensors = {name: tensor.detach() for name, tensor in twin.state_dict().items()}
    ends = sorted({tokenizer.eot, *meta.get("stop_ids", ())}, key=lambda i: i != meta.get("eos", tokenizer.eot))
    bos = meta.get("bos", tokenizer.eot)
    about = {"vocab_size": config.vocab_size, "max_position_embeddings": config.block_size, "bos_token_id": bos,
             "eos_token_id": ends[0], "pad_token_id": None, "dtype": str(dtype)[6:], "torch_dtype": str(dtype)[6:]}
    if stock:
        if quant == "packed":
            tensors = {name: tensor for name, tensor in tensors.items() if "_proj." not in name}
            tensors["embed.weight"] = tensors["embed.weight"].float()
            for name, (t, scale) in ternary_parts(model).items():
                if len(t) % 4:
                    raise UserError(f"--quant=packed: {name} has {len(t)} rows, which must be a multiple of 4: "
                                    "use --quant=plain")
                u = (t + 1).to(torch.uint8).unflatten(0, (4, -1))                            # (4, N / 4, K)
                tensors[f"{name}.weight"] = u[0] | u[1] << 2 | u[2] << 4 | u[3] << 6
                tensors[f"{name}.weight_scale"] = scale.reshape(1)
        tensors = {rename(name, 0, 1): tensor for name, tensor in tensors.items()}
        about |= llama_config(model, stock)
        if quant in ("online", "packed"):
            about["quantization_config"] = {"quant_method": "bitnet", "linear_class": "autobitlinear",
                                            "quantization_mode": "online" if quant == "online" else "offline"}
    else:
        tensors |= {name: buffer for name, buffer in twin.named_buffers()}
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
        code = f"modeling_{arch}"
        about |= {"architectures": ["ThimbleForCausalLM"], "model_type": f"thimble_{arch}", "use_cache": False,
                  "thimble": asdict(config), "num_hidden_layers": getattr(config, "n_layer", 1),
                  "auto_map": {"AutoConfig": f"{code}.ThimbleConfig", "AutoModelForCausalLM":
                               f"{code}.ThimbleForCausalLM"}}
        (folder / f"{code}.py").write_text(WRAPPER.format(arch=arch), encoding="utf-8")
        shutil.copyfile(inspect.getsourcefile(type(model)), folder / f"{arch}.py")
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    (folder / "model.safetensors").write_bytes(checkpoint._pack(tensors))
    write_json(folder / "config.json", about)
    write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": ends})
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    special = {"bos_token": tokenizer.token(bos), "eos_token": tokenizer.token(ends[0])}
    write_json(folder / "special_tokens_map.json", special)
    settings = {**special, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size,
                "clean_up_tokenization_spaces": False}
    if meta.get("chat_template"):
        settings["chat_template"] = meta["chat_template"]
        (folder / "chat_template.jinja").write_text(meta["chat_template"], encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings)
    return twin, tensors


def llama_config(model, stock):
    """What config.json of a LlamaForCausalLM or BitNetForCausalLM says about the shape; old and new names of RoPE."""
    config, block = model.config, model.blocks[0]
    tied, act = getattr(config, "tie_embeddings", True), getattr(config, "act", "silu")
    return {"architectures": [{"llama": "LlamaForCausalLM", "bitnet": "BitNetForCausalLM"}[stock]],
            "model_type": stock, "hidden_size": config.n_embd, "intermediate_size": n_hidden(model),
            "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
            "num_key_value_heads": block.attn.n_kv_head, "head_dim": block.attn.head_dim, "hidden_act": act,
            "rms_norm_eps": config.norm_eps, "tie_word_embeddings": tied, "attention_bias": False, "mlp_bias": False,
            "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "rope_theta": config.rope_theta,
            "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}


def n_hidden(model):
    gate = model.blocks[0].mlp.gate_proj
    return len(gate.codes if hasattr(gate, "codes") else gate.weight)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- out: GGUF


def need(package, what):
    """Import an optional package; UserError says how to get it."""
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f"{what} needs the package {package}: pip install {package}") from None


def gguf_type(gguf, tensor, quant, is_ternary):
    """The type in which `tensor` is stored: the one asked for, a wider one where its rows do not fit blocks."""
    kind = gguf.GGMLQuantizationType[quant.upper()]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if tensor.dim() < 2 or quant == "f32":
        return gguf.GGMLQuantizationType.F32
    if tensor.size(1) % block or block == 256 and not is_ternary:
        return gguf.GGMLQuantizationType.F16
    return kind


def write_gguf(path, model, tokenizer, quant, meta):
    """Write a GGUF file -> (the model whose logits it must give, {tensor name: float32 array} as stored)."""
    gguf = need("gguf", "--format=gguf")
    (stock, why), config = architecture(model), model.config
    if not stock:
        raise UserError(f"llama.cpp has no architecture for this model ({why}): use --format=hf or --format=onnx")
    parts = ternary_parts(model) if stock == "bitnet" and not config.group_size else {}
    if quant.startswith("tq") and not parts:
        raise UserError(f"--quant={quant} holds -1, 0, 1 and a scale for each matrix: use --quant=q8_0 or q4_0 here")
    if getattr(config, "act", "silu") != "silu":
        checkpoint.warn(f"llama.cpp knows no act={config.act} in BitNet and WILL COMPUTE SILU: this file gives WRONG "
                        "TEXT there until that changes. Use --format=hf, or train with --act=silu")
    writer = gguf.GGUFWriter(path, stock)
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(quant, f"MOSTLY_{quant.upper()}")])
    writer.add_name(meta.get("name") or path.stem)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(n_hidden(model))
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(model.blocks[0].attn.n_kv_head)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.n_embd // config.n_head)
    writer.add_rope_freq_base(config.rope_theta)
    if hasattr(config, "act"):
        writer.add_string(f"{stock}.hidden_activation", config.act)
    gguf_tokens(gguf, writer, tokenizer, config.vocab_size, meta)
    stored, twin = {}, {}
    rotated = {"q_proj": config.n_head, "k_proj": model.blocks[0].attn.n_kv_head} if stock == "llama" else {}
    for name, tensor in plain(model).state_dict().items():
        there, heads = rename(name, 0, 2), rotated.get(name.split(".")[-2])
        t, scale = parts.get(name.removesuffix(".weight"), (tensor, None))
        kind = gguf_type(gguf, t, quant, name.removesuffix(".weight") in parts)
        raw = gguf.quantize((permute(t, heads) if heads else t).contiguous().numpy(), kind)
        writer.add_tensor(there, raw, raw_dtype=kind)
        stored[there] = gguf.dequantize(raw, kind).astype(np.float32)
        twin[name] = torch.from_numpy(stored[there])
        if heads:
            twin[name] = permute(twin[name], heads, back=True)
        if scale is not None:
            stored[there.replace(".weight", ".scale")] = factor = scale.reshape(1).float().numpy()
            writer.add_tensor(there.replace(".weight", ".scale"), factor)
            twin[name] = twin[name] * scale
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return with_weights(plain(model), lambda name, _: twin[name]), stored


def gguf_tokens(gguf, writer, tokenizer, vocab_size, meta):
    """The tokenizer as llama.cpp's `gpt2` model: byte-level BPE of which byte and char vocabularies are special cases.

    A character of several bytes is one token made by merging its bytes; what lies between needs no token of its own.
    """
    hf = json.loads(tokenizer.to_json())
    alphabet, merges = data.byte_alphabet(), []
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [gguf.TokenType.UNUSED] * vocab_size
    for token, i in hf["model"]["vocab"].items():
        if tokenizer.kind == "char":
            chars = [alphabet[byte] for byte in token.encode()]
            merges += ["".join(chars[:n]) + " " + chars[n] for n in range(1, len(chars))]
            token = "".join(chars)
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for token in hf["added_tokens"]:
        i = token["id"]
        tokens[i] = token["content"]
        types[i] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    if tokenizer.kind not in ("byte", "char"):
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in hf["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(gguf_pre(tokenizer, hf))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(list(dict.fromkeys(merges)) or [NO_MERGE])
    writer.add_bos_token_id(meta.get("bos", tokenizer.eot))  # without these llama.cpp ends every text at id 11
    writer.add_eos_token_id(meta.get("eos", tokenizer.eot))
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    if meta.get("chat_template"):
        writer.add_chat_template(meta["chat_template"])


def gguf_pre(tokenizer, hf):
    """llama.cpp's name of the rule that splits text into words; UserError where it has none."""
    if tokenizer.kind in ("byte", "char"):
        return "gpt-2"
    if hf["model"]["type"] == "BPE" and not hf["normalizer"] and not hf["model"].get("byte_fallback"):
        for name, preset in PRE.items():
            if same_split(hf["pre_tokenizer"], json.loads(data._pre_tokenizer(preset).__getstate__())):
                return name
    raise UserError(f"{tokenizer.name}: llama.cpp has no name for how this tokenizer splits text into words: use "
                    f"--format=hf, or train with a tokenizer made with --pretokenizer={'|'.join(data.PRETOKENIZERS)}")


def same_split(one, other):
    """Whether two pre-tokenizers of tokenizer.json do the same; trim_offsets changes no ids."""
    if isinstance(one, dict) and isinstance(other, dict):
        one, other = ({k: v for k, v in part.items() if k != "trim_offsets"} for part in (one, other))
        return one.keys() == other.keys() and all(same_split(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_split, one, other))
    return one == other


# ---- the check


@torch.no_grad()
def greedy(model, prompts, n):
    """prompts (B, T) -> the n likeliest next tokens of each, (B, n)."""
    cache, new, out = model.init_cache(len(prompts), prompts.size(1) + n), prompts, []
    for _ in range(n):
        logits, cache = model.step(new, cache)
        out.append(new := logits.argmax(-1, keepdim=True))
    return torch.cat(out, 1)


class Transformers:
    """The folder as transformers opens it."""

    def __init__(self, path, model):
        transformers = need("transformers", "the check")
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        custom = not architecture(model)[0]
        self.settings = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=custom)
        self.model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=custom, output_loading_info=True)
        problems = [f"{key}: {', '.join(sorted(map(str, info[key])))}" for key in info if info[key]]
        if problems:
            raise ValueError("transformers finds " + "; ".join(problems)[:300])
        self.eos = self.tokenizer.eos_token_id

    @torch.no_grad()
    def logprobs(self, prompts):
        return self.model(prompts).logits[:, -1].log_softmax(-1)

    def greedy(self, prompts, n, ends):
        mask = torch.ones_like(prompts)
        out = self.model.generate(prompts, attention_mask=mask, generation_config=self.settings, max_new_tokens=n)
        return out[:, prompts.size(1):].tolist()

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def close(self):
        pass


class LlamaCpp:
    """The file as llama.cpp opens it, in float32 where it has the choice; an HTTP server inside this process."""

    def __init__(self, path, model):
        xllamacpp = need("xllamacpp", "the check")
        p, self.vocab_size = xllamacpp.CommonParams(), model.config.vocab_size
        p.model.path, p.n_parallel, p.verbosity, p.fit_params = str(path), 1, -1, False
        p.n_ctx, p.warmup, p.n_gpu_layers = min(model.config.block_size, 1024), False, 0
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = torch.get_num_threads()
        self.server = xllamacpp.Server(p)
        self.eos = self.ascii = None

    def post(self, route, **body):
        request = urllib.request.Request(self.server.listening_address + route, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def logprobs(self, prompts):
        rows = torch.full((len(prompts), self.vocab_size), torch.nan)
        plain_text = self.encode("a") or self.encode(" ")  # or half a character would come with no probabilities
        for row, prompt in zip(rows, prompts.tolist(), strict=True):
            answer = self.post("/completion", prompt=prompt, n_predict=1, n_probs=self.vocab_size, temperature=1.0,
                               samplers=["temperature"], cache_prompt=False, logit_bias=[[plain_text[0], 1000]])
            for entry in answer["completion_probabilities"][0]["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
        return rows

    def greedy(self, prompts, n, ends):
        return [self.post("/completion", prompt=prompt, n_predict=n, samplers=["top_k"], top_k=1, return_tokens=True,
                          cache_prompt=False)["tokens"] for prompt in prompts.tolist()]

    def encode(self, text):
        return self.post("/tokenize", content=text, parse_special=False)["tokens"]

    def decode(self, ids):
        return self.post("/detokenize", tokens=ids)["content"]

    def close(self):
        del self.server


def ties(model, prompt, ours, theirs, tolerance):
    """Whether two continuations part where our two best tokens are closer than twice the tolerance."""
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    logits = model(torch.tensor([[*prompt, *ours[:at]]]))[0][0, -1]
    return (logits[ours[at]] - logits[theirs[at]]).item() < 2 * tolerance


@torch.no_grad()
def check(path, form, model, twin, stored, tokenizer, meta, quant, n_prompts=50, n_tokens=64):
    """Hold the artefact at `path` against `twin` (the stored weights in Thimble); print figures; UserError if it fails.

    Every tensor is compared with what was meant to be stored, logits and greedy texts with the twin's, the tokenizer
    with ours. Two texts may part where the best two tokens are closer than the tolerance.
    """
    read_back(path, form, stored)
    reader = Transformers if form == "hf" else LlamaCpp
    try:
        consumer = reader(path, model)
    except UserError as error:
        checkpoint.warn(f"not checked: {error}")
        return
    except Exception as error:  # whatever a foreign loader raises
        raise UserError(f"check failed: it does not load ({checkpoint._short(error)[:300]})") from None
    try:
        size = model.config.block_size
        length = max(1, min(8, size // 4))
        n_tokens = max(1, min(n_tokens, size - length - 1))
        known = sorted(set(range(tokenizer.vocab_size)) - set(tokenizer._specials.values()))
        random = torch.Generator().manual_seed(0)
        prompts = torch.tensor(known)[torch.randint(len(known), (n_prompts, length), generator=random)]
        few = prompts[:8]
        reference, theirs = twin(few)[0][:, -1].log_softmax(-1), consumer.logprobs(few)
        gap = (reference - theirs).abs().max().item()
        spread = reference.std(-1).mean().item()
        tolerance = spread * TOLERANCE[form].get(quant, 1e-4) if TOLERANCE[form].get(quant) else 1e-4 * max(1, spread)
        if not gap <= tolerance:
            raise UserError(f"check failed: logits differ by up to {gap:.2g}, more than {tolerance:.2g}")
        ends = {tokenizer.eot, *meta.get("stop_ids", ())}
        same = tied = 0
        for prompt, a, b in zip(prompts.tolist(), greedy(twin, prompts, n_tokens).tolist(),
                                consumer.greedy(prompts, n_tokens, ends), strict=True):
            a, b = (next((ids[:i] for i in range(len(ids)) if ids[i] in ends), ids) for ids in (a, b))
            b = b + [next(iter(ends))] * (len(a) - len(b))
            b = b[:len(a)]
            same += a == b
            tied += a != b and ties(twin, prompt, a, b, tolerance)
        if same + tied < n_prompts:
            raise UserError(f"check failed: {n_prompts - same - tied} of {n_prompts} greedy texts differ")
        check_tokenizer(consumer, tokenizer, [tokenizer.decode(prompt) for prompt in prompts.tolist()])
        if consumer.eos not in (None, meta.get("eos", tokenizer.eot)):
            raise UserError(f"check failed: the end-of-text id is {consumer.eos}, not {tokenizer.eot}")
    finally:
        consumer.close()
    lost = "" if twin is model else f"; {(model(few)[0] - twin(few)[0]).abs().max().item():.2g} off the checkpoint's"
    print(f"checked in {reader.__name__}: max |dlogit| {gap:.2g} (logits spread by {spread:.2g}){lost}; greedy texts "
          f"of {n_tokens} tokens: {same}/{n_prompts} identical" + f", {tied} part at a near tie" * bool(tied))


# how far log p may be off, in units of the spread of logits; 1e-4 (times the spread, where above 1) if not named here.
# In llama.cpp what meets 8-bit weights is rounded to 8 bits, what meets halves to halves.
TOLERANCE = {"hf": {"online": 0.03, "packed": 0.03},
             "gguf": {"f16": 0.01, "bf16": 0.05, "q8_0": 0.1, "q4_0": 0.1, "tq1_0": 0.3, "tq2_0": 0.3}}


def check_tokenizer(consumer, tokenizer, texts):
    known = set("".join(texts)) if tokenizer.kind == "char" else None
    for text in [*data.AWKWARD, *texts]:
        if known is not None:
            text = "".join(char for char in text if char in known)
        if not text or any(token in text for token in tokenizer._specials):
            continue
        ours, theirs = tokenizer.encode(text), consumer.encode(text)
        if ours != theirs:
            raise UserError(f"check failed: {text[:40]!r} is {ours[:8]} to us, {theirs[:8]} there")
        if consumer.decode(ours) != tokenizer.decode(ours):
            raise UserError(f"check failed: ids {ours[:8]} are {consumer.decode(ours)[:40]!r} there")


def read_back(path, form, stored):
    """UserError unless the file holds exactly the tensors that were meant to be in it."""
    try:
        if form == "hf":
            found = checkpoint._unpack(path / "model.safetensors", (path / "model.safetensors").read_bytes())
            same = {name: name in found and found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
                    for name, tensor in stored.items()}
        else:
            values, found, _ = gguf_parts(path)
            same = {name: name in found and np.array_equal(found[name](), array) for name, array in stored.items()}
    except UserError as error:
        raise UserError(f"check failed: {error}") from None
    bad = [name for name in same if not same[name]] + sorted(set(found) - set(stored))
    if bad:
        raise UserError(f"check failed: {bad[0]} is not in the file as it should be")


# ---- in

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")  # of tensors in a GGUF file
MAX_STRINGS = 2**20  # in one list of a GGUF file; Llama 3 has 280,000 merges


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
        raise UserError(f"{file} is not a valid safetensors file ({checkpoint._short(error)[:200]}): "
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
        raise UserError(f"{path} cannot be read ({checkpoint._short(error)[:100]}): download it again") from None
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
        if sum(tensor.n_bytes for tensor in reader.tensors) > reader.data.size:
            raise ValueError("its tensors overlap")
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # of many kinds
        reason = checkpoint._short(error)[:100]
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
    """The data.Tokenizer that a GGUF file carries."""
    values = gguf_parts(path)[0]
    model, pre = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    tokens, types, merges = (values.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
    if model != "gpt2" or pre not in PRE:
        raise UserError(f"{path}: its tokenizer ({str(model)[:20]}, {str(pre)[:20]}) cannot be read: only byte-level "
                        f"BPE (gpt2) with {', '.join(PRE)}; use the Hugging Face folder of this model")
    lists = [tokens, types, merges]
    if not all(isinstance(part, list) for part in lists) or len(tokens) != len(types) or len(set(tokens)) < len(tokens):
        raise UserError(f"{path}: its tokenizer is damaged: download it again")
    normal = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (1, 6)}
    last = max(normal.values(), default=0)  # a special token before the last normal one is part of the vocabulary
    inside = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (3, 4) and i < last}
    byte_of = {char: byte for byte, char in enumerate(data.byte_alphabet())}
    pairs = [tuple(merge.partition(" ")[::2]) for merge in merges]
    pairs = [pair for pair in pairs if all(part in normal for part in (*pair, "".join(pair)))]

    def build():
        import tokenizers
        if not pairs and len(normal) != 256:  # characters, each made of its bytes
            chars = {bytes(byte_of[char] for char in token).decode(): i for token, i in normal.items()}
            hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=chars | inside, merges=[]))
            hf.decoder = tokenizers.decoders.Fuse()
        else:
            split = data._pre_tokenizer(PRE[pre]) if pairs else data.byte_tokenizer()._hf.pre_tokenizer
            hf = data._byte_level(normal | inside, pairs, split, ignore_merges=pre == "llama-bpe")
        for kind, add in ((4, hf.add_tokens), (3, hf.add_special_tokens)):
            wanted = [(i, token) for i, token in enumerate(tokens) if types[i] == kind]
            for i, token in wanted:
                if hf.token_to_id(token) is None and hf.get_vocab_size() != i:
                    raise ValueError(f"token {token!r} has id {i}, out of order")
                add([token])
        return data.Tokenizer(hf, name=str(path))

    return data._guard(f"{path}: its tokenizer is damaged", build)


# ---- the command


def export(model, tokenizer, out, form, quant="", meta=None, checked=True, prompts=50, prompt_tokens=64):
    """Write `model` to `out` (a folder, or a .gguf file), which gets its name only once the check has passed."""
    out, meta, begun = Path(out), meta or {}, time.perf_counter()
    allowed = QUANTS["hf, ternary" if form == "hf" and architecture(model)[0] == "bitnet" else form]
    quant = quant or ("packed" if getattr(model.config, "packed", False) and "packed" in allowed else allowed[0])
    if quant not in allowed:
        raise UserError(f"--quant={quant} is not for --format={form} of this model: use {', '.join(allowed)}")
    if os.path.lexists(out):
        raise UserError(f"{out} already exists: remove it, or name another with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = out.with_name(f".{out.stem}.tmp-{os.getpid()}{out.suffix}")
    try:
        if form == "hf":
            temp.mkdir()
        twin, stored = (write_hf if form == "hf" else write_gguf)(temp, model, tokenizer, quant, meta)
        files = sorted(temp.iterdir()) if temp.is_dir() else [temp]
        for file in files:
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
        if checked:
            check(temp, form, model, twin, stored, tokenizer, meta, quant, prompts, prompt_tokens)
        size = sum(file.stat().st_size for file in files)
        os.rename(temp, out)
        checkpoint._sync_folder(out.parent)
    finally:
        checkpoint._remove(temp)
    print(f"{out}: {size:,} bytes, {quant}, {time.perf_counter() - begun:.0f} s")
    return out


def main(cfg):
    loaded = checkpoint.load(cfg.checkpoint or None, which=cfg.which)
    model, tokenizer = checkpoint.load_model(loaded).eval(), data.load_tokenizer(loaded.path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{loaded.path}: the tokenizer has {tokenizer.vocab_size} ids, the model "
                        f"{model.config.vocab_size}: they do not belong together")
    run = loaded.path.parent.name if checkpoint.STEP.fullmatch(loaded.path.name) else loaded.path.stem
    ending = {"gguf": ".gguf", "onnx": ".onnx"}.get(cfg.format, "")
    out = cfg.out or f"exports/{'-'.join(filter(None, [run, cfg.format * (not ending), cfg.quant]))}{ending}"
    if cfg.format in ("onnx", "web"):
        import onnx_graph
        onnx_graph.main(cfg, model, tokenizer, out)
    else:
        export(model, tokenizer, out, cfg.format, cfg.quant, loaded.meta, cfg.check, cfg.prompts, cfg.prompt_tokens)


if __name__ == "__main__":
    configurator.run(main, Config)
