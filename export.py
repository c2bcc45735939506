"""Take a model elsewhere, and prove that it is the same there.

    python export.py --format=hf                                   # a folder for transformers, vLLM, MLX, ...
    python export.py --format=gguf --quant=q8_0                    # a file for llama.cpp, Ollama, LM Studio, ...
    python export.py --format=onnx --quant=int4                    # a folder for onnxruntime-genai, transformers.js
    python export.py --format=web                                  # a page that runs the model in a browser

What is written is read again by the program it is for: its logits and greedy texts must be ours before the artefact
gets its name. `model.py` goes out as Llama, `ternary.py` as BitNet, `hybrid_ssm.py` as Jamba; what no stock
architecture can express (your fork, mHC-lite streams) goes to Hugging Face with the model file itself as its code.
--checkpoint may also be a Hugging Face folder or a GGUF file (foreign.py).
"""
import copy
import inspect
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

from formats.foreign import PRE, gguf_parts, need, permute, rename
from thimble import checkpoint, configurator, files
from thimble.files import UserError
from thimble.load import load
from thimble.tokenizer import AWKWARD, PRETOKENIZERS, byte_alphabet, load_tokenizer, pre_tokenizer_of


@dataclass(frozen=True)
class Config:
    # what
    checkpoint: str = ""            # run or checkpoint folder, Hugging Face folder or GGUF file; empty: the newest run
    which: Literal["best", "latest"] = "best"  # checkpoint of the run
    format: Literal["hf", "gguf", "onnx", "web"] = "hf"
    quant: str = ""                 # how numbers are stored (a wrong one is told the right ones); empty: as they are
    out: str = ""                   # folder or file to write (onnx: FILE.onnx is that alone); empty: under exports/
    window: bool = False            # onnx: (batch, block) int32 ids to the last one's logits, no cache
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
    "onnx": ("fp32", "int8", "int4", "q2"),
    "web": ("fp32", "int8", "int4", "q2"),
}
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
        with torch.device("cpu"):                          # not "meta", where some models cannot be built
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

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **ignored):
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("this model knows no padding: generate for one prompt, or for prompts of equal length")
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
        wrong = f"n_streams={config.n_streams}" if config.n_streams > 1 else \
            f"group_size={config.group_size}" if config.group_size else "" if config.sub_norm else "sub_norm=false"
        return ("", wrong) if wrong else ("bitnet", "")
    if arch == "hybrid_ssm":
        wrong = f"ssm={config.ssm}" if config.ssm != "mamba1" else "rope" if config.rope else "qk_norm"
        return ("", wrong) if wrong != "qk_norm" or config.qk_norm else ("jamba", "")
    return "", f"a model file of its own, {arch}.py"


def weights(model):
    """{name: tensor}, with the embedding of a ternary model as it ships: rounded to float16."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if hasattr(model, "embedding"):
        tensors["embed.weight"] = model.embedding().detach().float()
    return tensors


def ternary_parts(model):
    """{name of a matrix: (t of -1, 0, 1; its scale, ())} of a ternary model without groups, packed or not."""
    from formats.onnx import ternary_weight
    parts = {}
    for name, module in model.named_modules():
        if hasattr(module, "group_size"):
            n_in = n_hidden(model) if name.endswith("down_proj") else model.config.n_embd
            parts[name] = [torch.from_numpy(np.array(part, np.float32)) for part in ternary_weight(module, n_in)]
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
    tensors = weights(twin)
    bos, stop = ends(tokenizer, meta)
    about = {"vocab_size": config.vocab_size, "max_position_embeddings": config.block_size, "pad_token_id": None,
             "bos_token_id": bos, "eos_token_id": stop[0], "dtype": str(dtype)[6:], "torch_dtype": str(dtype)[6:]}
    if stock:
        if quant == "packed":
            tensors = {name: tensor for name, tensor in tensors.items() if "_proj." not in name}
            for name, (t, scale) in ternary_parts(model).items():
                if len(t) % 4:
                    raise UserError(f"--quant=packed: {name} has {len(t)} rows, which must be a multiple of 4: "
                                    "use --quant=plain")
                u = (t + 1).to(torch.uint8).unflatten(0, (4, -1))                            # (4, N / 4, K)
                tensors[f"{name}.weight"] = u[0] | u[1] << 2 | u[2] << 4 | u[3] << 6
                tensors[f"{name}.weight_scale"] = scale.reshape(1)
        tensors = {rename(name, 0, 1, stock): tensor for name, tensor in tensors.items()}
        about |= hf_config(model, stock)
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
    (folder / "model.safetensors").write_bytes(checkpoint.pack_tensors(tensors))
    write_json(folder / "config.json", about)
    side_files(folder, model, tokenizer, meta)
    return twin, tensors


def hf_config(model, stock):
    """What config.json of a stock architecture says about the shape; old and new names of RoPE."""
    config = model.config
    about = {"architectures": [{"llama": "LlamaForCausalLM", "bitnet": "BitNetForCausalLM",
                                "jamba": "JambaForCausalLM"}[stock]],
             "model_type": stock, "hidden_size": config.n_embd, "intermediate_size": n_hidden(model),
             "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
             "num_key_value_heads": n_kv_head(config), "hidden_act": getattr(config, "act", "silu"),
             "rms_norm_eps": config.norm_eps, "tie_word_embeddings": getattr(config, "tie_embeddings", True),
             "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
    if stock == "jamba":
        return about | {"attn_layer_period": config.attn_layer_period, "attn_layer_offset": config.attn_layer_offset,
                        "num_experts": 1, "num_experts_per_tok": 1, "expert_layer_period": 1, "expert_layer_offset": 0,
                        "output_router_logits": False, "mamba_expand": config.expand, "mamba_d_conv": config.d_conv,
                        "mamba_d_state": config.d_state or 16, "mamba_conv_bias": True, "mamba_proj_bias": False,
                        "mamba_dt_rank": config.dt_rank or -(-config.n_embd // 16)}
    return about | {"head_dim": config.n_embd // config.n_head, "attention_bias": False, "mlp_bias": False,
                    "rope_theta": config.rope_theta, "rope_scaling": None,
                    "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}


def n_kv_head(config):
    return config.n_kv_head or config.n_head


def n_hidden(model):
    up = model.blocks[0].mlp.up_proj
    return len(up.codes if hasattr(up, "codes") else up.weight)


def ends(tokenizer, meta):
    """-> (the id a text begins with, [ids that end it, the main one first])."""
    eos = meta.get("eos", tokenizer.eot)
    return meta.get("bos", tokenizer.eot), [eos, *sorted({tokenizer.eot, *meta.get("stop_ids", ())} - {eos})]


def side_files(folder, model, tokenizer, meta):
    """generation_config.json and the tokenizer's files, which transformers, its JavaScript and others read."""
    bos, stop = ends(tokenizer, meta)
    write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": stop})
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    special = {"bos_token": tokenizer.token(bos), "eos_token": tokenizer.token(stop[0])}
    write_json(folder / "special_tokens_map.json", special)
    settings = {**special, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "model_max_length": model.config.block_size}
    if meta.get("chat_template"):
        settings["chat_template"] = meta["chat_template"]
        (folder / "chat_template.jinja").write_text(meta["chat_template"], encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- out: GGUF


def gguf_type(gguf, name, tensor, quant, is_ternary):
    """The type in which `tensor` is stored: the one asked for, a wider one where its rows do not fit blocks."""
    kind = gguf.GGMLQuantizationType[quant.upper()]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if tensor.dim() < 2 or name.endswith(("A_log", "conv1d.weight")):
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
    parts = ternary_parts(model) if stock == "bitnet" else {}
    if quant.startswith("tq") and not parts:
        raise UserError(f"--quant={quant} holds -1, 0, 1 and a scale for each matrix: use --quant=q8_0 or q4_0 here")
    if getattr(config, "act", "silu") != "silu":
        files.warn(f"llama.cpp knows no act={config.act} in BitNet and WILL COMPUTE SILU: this file gives WRONG "
                        "TEXT there, so its check fails (--check=false writes it). Use --format=hf, or train with "
                        "--act=silu")
    if stock == "jamba" and config.expand != 2:
        raise UserError(f"llama.cpp reads Jamba with expand=2 only, this model has {config.expand}: use --format=hf")
    writer = gguf.GGUFWriter(path, stock)
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(quant, f"MOSTLY_{quant.upper()}")])
    writer.add_name(meta.get("name") or path.stem)
    sizes = {"vocab_size": config.vocab_size, "context_length": config.block_size, "embedding_length": config.n_embd,
             "block_count": config.n_layer, "feed_forward_length": n_hidden(model), "head_count": config.n_head,
             "head_count_kv": n_kv_head(config), "layer_norm_rms_eps": config.norm_eps}
    if stock == "jamba":
        sizes |= {"head_count_kv": [getattr(block.mixer, "n_kv_head", 0) for block in model.blocks],  # 0: Mamba
                  "ssm_conv_kernel": config.d_conv, "ssm_inner_size": config.expand * config.n_embd,
                  "ssm_state_size": config.d_state or 16,
                  "ssm_time_step_rank": config.dt_rank or -(-config.n_embd // 16)}
    else:
        sizes |= {"rope_dimension_count": config.n_embd // config.n_head, "rope_freq_base": config.rope_theta}
    for key, value in sizes.items():
        getattr(writer, f"add_{key}")(value)
    if hasattr(config, "act"):
        writer.add_string(f"{stock}.hidden_activation", config.act)
    gguf_tokens(gguf, writer, tokenizer, config.vocab_size, meta)
    stored, twin = {}, {}
    rotated = {"q_proj": config.n_head, "k_proj": n_kv_head(config)} if stock == "llama" else {}
    for name, tensor in weights(plain(model)).items():
        there, heads = rename(name, 0, 2, stock), rotated.get(name.split(".")[-2])
        t, scale = parts.get(name.removesuffix(".weight"), (tensor, None))
        kind = gguf_type(gguf, name, t, quant, scale is not None)
        w = permute(t, heads) if heads else -t.exp() if name.endswith("A_log") else t
        w = w.flatten(1) if w.dim() == 3 else w            # a convolution's (E, 1, k)
        raw = gguf.quantize(w.contiguous().numpy(), kind)
        writer.add_tensor(there, raw, raw_dtype=kind)
        stored[there] = gguf.dequantize(raw, kind).astype(np.float32)
        twin[name] = torch.from_numpy(stored[there])
        if heads:
            twin[name] = permute(twin[name], heads, back=True)
        elif name.endswith(("A_log", "conv1d.weight")):
            twin[name] = tensor
        if scale is not None:
            stored[there.replace(".weight", ".scale")] = factor = scale.reshape(1).numpy()
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
    alphabet, merges = byte_alphabet(), []
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
            if same_split(hf["pre_tokenizer"], json.loads(pre_tokenizer_of(preset).__getstate__())):
                return name
    raise UserError(f"{tokenizer.name}: llama.cpp has no name for how this tokenizer splits text into words: use "
                    f"--format=hf, or train with a tokenizer made with --pretokenizer={'|'.join(PRETOKENIZERS)}")


def same_split(one, other):
    """Whether two pre-tokenizers of tokenizer.json do the same; trim_offsets changes no ids."""
    if isinstance(one, dict) and isinstance(other, dict):
        one, other = ({k: v for k, v in part.items() if k != "trim_offsets"} for part in (one, other))
        return one.keys() == other.keys() and all(same_split(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_split, one, other))
    return one == other


# ---- out: ONNX and the page

SUFFIX = {"fp32": "", "int8": "_quantized", "int4": "_q4", "q2": "_q2"}  # transformers.js asks for these names
PACKAGES = {  # of npm, and what of each the page needs: with WebGPU, without it, the tokenizer
    "onnxruntime-web@1.30.0": ["ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs",
                               "ort-wasm-simd-threaded.asyncify.wasm", "ort.wasm.min.mjs",
                               "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"],
    "@huggingface/tokenizers@0.2.0": ["tokenizers.min.mjs"],
}


def write_onnx(folder, model, tokenizer, quant, meta):
    """Write a folder as transformers.js and onnxruntime-genai read it.

    config.json names an architecture that transformers.js knows and that has the same cache; the graph is what
    computes. onnxruntime-genai knows no such cache as a hybrid's.
    """
    from formats import onnx as onnx_graph
    config, file = model.config, f"onnx/model{SUFFIX[quant]}.onnx"
    onnx_graph.export(model, folder / file, quant)
    bos, stop = ends(tokenizer, meta)
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.n_embd, "num_hidden_layers": config.n_layer,
             "num_attention_heads": config.n_head, "num_key_value_heads": n_kv_head(config)}
    head_dim, ids = config.n_embd // config.n_head, {"bos_token_id": bos, "eos_token_id": stop}
    shim = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "original_model_type": type(model).__module__,
            "head_dim": head_dim, "intermediate_size": n_hidden(model), "max_position_embeddings": config.block_size,
            "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "hidden_act": "silu",
            "tie_word_embeddings": False} | sizes | ids
    shim["transformers.js_config"] = {"dtype": {"int8": "q8", "int4": "q4"}.get(quant, quant)}
    if hasattr(model.blocks[0], "mixer"):
        kinds = ["attention" if hasattr(block.mixer, "q_proj") else "mamba" for block in model.blocks]
        shim |= {"model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"],
                 "layers_block_type": kinds}
    else:
        names = "input_ids", "attention_mask", "position_ids"
        decoder = {"filename": file, "session_options": {"provider_options": []}, "head_size": head_dim,
                   "inputs": {name: name for name in names}
                   | {f"past_{s}_names": f"past_key_values.%d.{s}" for s in ("key", "value")},
                   "outputs": {"logits": "logits"}
                   | {f"present_{s}_names": f"present.%d.{s}" for s in ("key", "value")}}
        decoder |= {key: sizes[key] for key in list(sizes)[1:]}
        write_json(folder / "genai_config.json", {
            "model": {"type": "llama", "context_length": config.block_size, "vocab_size": config.vocab_size,
                      "pad_token_id": stop[0], "decoder": decoder} | ids,
            "search": {"max_length": config.block_size, "past_present_share_buffer": False, "do_sample": False,
                       "num_beams": 1, "top_k": 1, "top_p": 1.0, "temperature": 1.0}})
    write_json(folder / "config.json", shim)
    side_files(folder, model, tokenizer, meta)


def write_web(folder, model, tokenizer, quant, meta):
    """What `write_onnx` writes, web/index.html, and in lib/ what npm installs: the page asks no other server."""
    if shutil.which("npm") is None:
        raise UserError("--format=web takes the files of onnxruntime-web from npm, which is not here: install Node.js")
    (folder / "lib").mkdir()
    with tempfile.TemporaryDirectory() as work:
        done = subprocess.run(["npm", "install", "--prefix", work, "--ignore-scripts", "--no-audit", "--no-fund",
                               *PACKAGES], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line.lower()), "no reason given")
            raise UserError(f"npm could not install {' and '.join(PACKAGES)}: {reason:.200}")
        for package, files in PACKAGES.items():
            for name in files:
                shutil.copyfile(Path(work, "node_modules", package.rpartition("@")[0], "dist", name),
                                folder / "lib" / name)
    write_onnx(folder, model, tokenizer, quant, meta)
    shutil.copyfile(Path(__file__).parent / "web" / "index.html", folder / "index.html")


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
        self.end, self.stop = self.tokenizer.eos_token, self.model.generation_config.eos_token_id

    @torch.no_grad()
    def logprobs(self, prompts):
        return self.model(prompts).logits[:, -1].log_softmax(-1)

    def greedy(self, prompts, n):
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
        self.end, self.stop = self.ask("/props")["eos_token"], None

    def ask(self, route, **body):
        request = urllib.request.Request(self.server.listening_address + route,
                                         json.dumps(body).encode() if body else None)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def logprobs(self, prompts):
        rows = torch.full((len(prompts), self.vocab_size), torch.nan)
        plain_text = self.encode("a") or self.encode(" ")  # or half a character would come with no probabilities
        for row, prompt in zip(rows, prompts.tolist(), strict=True):
            answer = self.ask("/completion", prompt=prompt, n_predict=1, n_probs=self.vocab_size, temperature=1.0,
                               samplers=["temperature"], cache_prompt=False, logit_bias=[[plain_text[0], 1000]])
            for entry in answer["completion_probabilities"][0]["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
        return rows

    def greedy(self, prompts, n):
        return [self.ask("/completion", prompt=prompt, n_predict=n, samplers=["top_k"], top_k=1, return_tokens=True,
                          cache_prompt=False)["tokens"] for prompt in prompts.tolist()]

    def encode(self, text):
        return self.ask("/tokenize", content=text, parse_special=False)["tokens"]

    def decode(self, ids):
        return self.ask("/detokenize", tokens=ids)["content"]

    def close(self):
        del self.server


def ties(model, prompt, ours, theirs, tolerance):
    """Whether two continuations part where our two best tokens are closer than twice the tolerance."""
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    logits = model(torch.tensor([[*prompt, *ours[:at]]]))[0][0, -1]
    return (logits[ours[at]] - logits[theirs[at]]).item() < 2 * tolerance


# How far log p may be off, in units of the spread of logits; 1e-4 (times the spread, where above 1) if not named here.
# In llama.cpp what meets 8-bit weights is rounded to 8 bits, what meets halves to halves.
TOLERANCE = {("hf", "online"): 0.03, ("hf", "packed"): 0.03, ("gguf", "f16"): 0.01, ("gguf", "bf16"): 0.05,
             ("gguf", "q8_0"): 0.25, ("gguf", "q4_0"): 0.25, ("gguf", "tq1_0"): 0.3, ("gguf", "tq2_0"): 0.3}


@torch.no_grad()
def check(path, form, quant, model, twin, stored, tokenizer, meta, n_prompts=50, n_tokens=64):
    """Hold the artefact at `path` against `twin` (the stored weights in Thimble) -> figures; UserError if it fails.

    Every tensor is compared with what was meant to be stored, log p and greedy texts with the twin's, the tokenizer
    with ours. Two texts may part where the best two tokens are closer than the tolerance.
    """
    read_back(path, form, stored)
    try:
        consumer = (Transformers if form == "hf" else LlamaCpp)(path, model)
    except UserError as error:
        files.warn(f"not checked: {error}")
        return {}
    except Exception as error:  # whatever a foreign loader raises
        raise UserError(f"check failed: it does not load ({files.short(error)[:300]})") from None
    try:
        size, stop = model.config.block_size, ends(tokenizer, meta)[1]
        length = max(1, min(8, size // 4))
        known = sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.specials.values()))
        random = torch.Generator().manual_seed(0)
        prompts = torch.tensor(known)[torch.randint(len(known), (n_prompts, length), generator=random)]
        few = prompts[:8]
        reference = twin(few)[0][:, -1].log_softmax(-1)                                      # (8, V)
        gap = (reference - consumer.logprobs(few)).abs().max().item()
        spread = reference.std(-1).mean().item()
        tolerance = spread * TOLERANCE[form, quant] if (form, quant) in TOLERANCE else 1e-4 * max(1, spread)
        if not gap <= tolerance:                           # also where it is NaN
            raise UserError(f"check failed: logits differ by up to {gap:.2g}, more than {tolerance:.2g}")
        n_tokens = max(1, min(n_tokens, size - length - 1))
        texts = greedy(twin, prompts, n_tokens).tolist(), consumer.greedy(prompts, n_tokens)
        same = tied = 0
        for prompt, ours, theirs in zip(prompts.tolist(), *texts, strict=True):
            n = next((i for i, token in enumerate(ours) if token in stop), n_tokens)  # where ours ends, theirs does
            theirs = [*theirs, *[stop[0]] * n][:n]
            same += ours[:n] == theirs
            tied += ours[:n] != theirs and ties(twin, prompt, ours[:n], theirs, tolerance)
        if same + tied < n_prompts:
            raise UserError(f"check failed: {n_prompts - same - tied} of {n_prompts} greedy texts differ")
        check_tokenizer(consumer, tokenizer, [tokenizer.decode(prompt) for prompt in prompts.tolist()])
        if consumer.end != tokenizer.token(stop[0]) or consumer.stop not in (None, stop):
            raise UserError(f"check failed: texts end with {consumer.end!r} there, ids {consumer.stop or ''}")
    finally:
        consumer.close()
    ours, theirs = model(few)[0], twin(few)[0]
    return {"runtime": type(consumer).__name__, "delta": gap, "same": same, "tied": tied, "prompts": n_prompts,
            "tokens": n_tokens, "loss": (ours - theirs).abs().max().item(),
            "kept": (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()}


def check_onnx(path, model, tokenizer, n_prompts, n_tokens):
    """Hold the ONNX file at `path`, or in that folder, against the model by onnx_check.py; UserError if it fails."""
    try:
        need("onnxruntime", "the check")
    except UserError as error:
        files.warn(f"not checked: {error}")
        return {}
    from formats import onnx_check
    random, size = torch.Generator().manual_seed(0), model.config.block_size
    lengths = [max(1, min(1 + i * 8 // n_prompts * 4, size // 2)) for i in range(n_prompts)]
    prompts = [torch.randint(model.config.vocab_size, (length,), generator=random).tolist() for length in lengths]
    if path.is_dir():
        settings = path / "tokenizer.json"
        if not settings.is_file() or load_tokenizer(settings).to_json() != tokenizer.to_json():
            raise UserError("check failed: tokenizer.json is missing or another")
        path = next(path.glob("onnx/*.onnx"))
    found = onnx_check.check(model, path, prompts, n_tokens)
    return found | {"runtime": "onnxruntime", "tokens": min(n_tokens, size - max(lengths))}


def check_tokenizer(consumer, tokenizer, texts):
    known = set("".join(texts)) if tokenizer.kind == "char" else None
    for text in [*AWKWARD, *texts]:
        if known is not None:
            text = "".join(char for char in text if char in known)
        if not text or any(token in text for token in tokenizer.specials):
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
            found = checkpoint.unpack_tensors(path / "model.safetensors", (path / "model.safetensors").read_bytes())
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


# ---- the command


def export(model, tokenizer, out, form, quant="", meta=None, window=False, checked=True, prompts=50, prompt_tokens=64):
    """Write `model` to `out` (a folder, a .gguf or .onnx file), which gets its name only once the check has passed.

    -> {"bytes": size of all files} and, where checked, "delta", largest logit - ours with the stored weights, "loss",
    the same with the checkpoint's weights, "kept", how often the likeliest token is still theirs, "same" greedy texts
    of `prompts` ("tied": those that part at a near tie).
    """
    out, meta, begun = Path(out), meta or {}, time.perf_counter()
    allowed = QUANTS["hf, ternary" if form == "hf" and architecture(model)[0] == "bitnet" else form]
    quant = quant or ("packed" if getattr(model.config, "packed", False) and "packed" in allowed else allowed[0])
    if quant not in allowed:
        raise UserError(f"--quant={quant} is not for --format={form} of this model: use {', '.join(allowed)}")
    if window and form != "onnx":
        raise UserError(f"--window is a form of ONNX: use --format=onnx, not {form}")
    if os.path.lexists(out):
        raise UserError(f"{out} already exists: remove it, or name another with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = out.with_name(f".{out.stem}.tmp-{os.getpid()}{out.suffix}")
    twin = stored = None
    try:
        if form == "gguf":
            twin, stored = write_gguf(temp, model, tokenizer, quant, meta)
        elif form == "onnx" and (window or out.suffix == ".onnx"):
            from formats import onnx as onnx_graph
            onnx_graph.export(model, temp, quant, window)
        else:
            temp.mkdir()
            if form == "hf":
                twin, stored = write_hf(temp, model, tokenizer, quant, meta)
            else:
                (write_web if form == "web" else write_onnx)(temp, model, tokenizer, quant, meta)
        files.sync(temp)
        found = {"bytes": sum(file.stat().st_size for file in [temp, *temp.rglob("*")] if file.is_file())}
        if checked and twin is None:
            found = check_onnx(temp, model, tokenizer, prompts, prompt_tokens) | found
        elif checked:
            found |= check(temp, form, quant, model, twin, stored, tokenizer, meta, prompts, prompt_tokens)
        os.rename(temp, out)
        files.sync_folder(out.parent)
    finally:
        files.remove(temp)
    if "delta" in found:
        print(f"checked in {found['runtime']}: max |dlogit| {found['delta']:.2g}, {found['loss']:.2g} off the "
              f"checkpoint's, {found['kept']:.1%} of the likeliest tokens kept; greedy texts of {found['tokens']} "
              f"tokens: {found['same']}/{prompts} identical"
              + (f", {found['tied']} part at a near tie" if found.get("tied") else ""))
        if found["kept"] < 0.75:
            files.warn(f"the file is sound, but --quant={quant} is too coarse for this model: it would say other "
                            f"things; --quant={allowed[0]} loses nothing")
    print(f"{out}: {found['bytes']:,} bytes, {quant}, {time.perf_counter() - begun:.0f} s")
    return found


def main(cfg):
    loaded = load(cfg.checkpoint, cfg.which, deploy=False)
    ending = ".gguf" if cfg.format == "gguf" else ".onnx" if cfg.window else ""
    name = "-".join(filter(None, [loaded.name, "window" if cfg.window else cfg.format * (not ending), cfg.quant]))
    out = cfg.out or f"exports/{name}{ending}"
    export(loaded.model, loaded.tokenizer, out, cfg.format, cfg.quant, loaded.meta, cfg.window, cfg.check, cfg.prompts,
           cfg.prompt_tokens)
    if cfg.format == "web":
        print(f"python -m http.server --directory {out}   # then open http://localhost:8000")


if __name__ == "__main__":
    configurator.run(main, Config)
