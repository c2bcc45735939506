"""Hugging Face folders: what transformers, vLLM, MLX and others read, written from a model; a Llama's, read.

A stock architecture is exported under its name. Any other model is exported with its own model file as code, which
transformers runs with trust_remote_code=True. Nothing that a file claims is believed until it has been checked
against the file's size, and pickles are never read.
"""
import inspect
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import safetensors
import torch

from formats import families, names, relatives
from formats.weights import is_ternary, plain, ternary_parts, weights, with_weights
from thimble import chat, checkpoint, configurator
from thimble.files import UserError, read_json, short

HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}
WRAPPER = '''# Made by export.py: lets transformers run the model file beside it.
# There is no cache: each token costs a full pass over the text so far.
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
        with torch.device("cpu"):                          # not "meta", on which some models cannot be built
            self.model = Model(Config(**config.thimble))
        for module in self.modules():
            module._non_persistent_buffers_set.clear()     # from_pretrained would leave these buffers empty
        self.post_init()

    def _init_weights(self, module):
        pass                                               # Model has initialised itself

    def forward(self, input_ids, labels=None, **ignored):
        logits = self.model(input_ids)[0]
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **ignored):
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("this model does not support padding: pass one prompt, or prompts of equal length")
        return {{"input_ids": input_ids[:, -self.model.config.block_size:]}}
'''


# ---- out
def write(folder, model, stock, tokenizer, quant):
    """Write a folder for transformers -> (the model whose logits it must give, {tensor name: tensor} as stored).

    stock: the architecture that the model is (a key of names.CLASSES), or "" to send its own code along.
    """
    if getattr(model.config, "packed", False) and (quant == "online" or not stock):
        remedy = "use --quant=packed or plain" if stock else "export the run it was packed from"
        raise UserError(f"a packed checkpoint has no weights to train on or to run elsewhere: {remedy}")
    twin = model
    if stock and quant not in ("online", "packed") and any(map(is_ternary, model.modules())):
        twin = plain(model)
    dtype = HALVES.get(quant, torch.float32)
    if quant in HALVES:  # what a program makes of halves in float32
        twin = with_weights(twin, lambda name, tensor: tensor.to(dtype).float())
    record = tokenizer.record
    about = {"vocab_size": model.config.vocab_size, "max_position_embeddings": model.config.block_size,
             "pad_token_id": record.pad, "bos_token_id": record.bos, "eos_token_id": record.ends[0],
             # the new name and the old one
             "dtype": str(dtype).removeprefix("torch."), "torch_dtype": str(dtype).removeprefix("torch.")}
    if stock:
        tensors = weights(twin)
        if quant == "packed":
            tensors = pack_bitnet(model, tensors)
        tensors = names.to_hugging_face(tensors, stock)
        about |= names.hf_config(model, stock)
        if quant in ("online", "packed"):
            # autobitlinear multiplies by weight_scale; the other class, bitlinear, would divide by it
            about["quantization_config"] = {"quant_method": "bitnet", "linear_class": "autobitlinear",
                                            "quantization_mode": "online" if quant == "online" else "offline"}
    else:
        # buffers that are not saved, too: from_pretrained leaves what it does not find uninitialised
        tensors = dict(twin.state_dict()) | dict(twin.named_buffers())
        tensors = {f"model.{name}": tensor.detach() for name, tensor in tensors.items()}
        about |= write_code(folder, model)
        if unsaved_buffers(model):
            about["thimble_buffers"] = unsaved_buffers(model)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.to(dtype)
    checkpoint.write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", about)
    write_side_files(folder, model, tokenizer)
    return twin, tensors


def pack_bitnet(model, tensors):
    """`tensors` with each ternary matrix (N, K) as BitNet of transformers stores it: uint8 (N / 4, K), and a scale.

    Row r of it holds the rows r, r + N / 4, r + N / 2 and r + 3 N / 4 of the matrix, 2 bits each, low bits first.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if "_proj." not in name}
    for name, (t, scale) in ternary_parts(model).items():
        if len(t) % 4:
            raise UserError(f"--quant=packed: {name} has {len(t)} rows, which must be a multiple of 4: "
                            "use --quant=plain")
        u = (t + 1).to(torch.uint8).unflatten(0, (4, -1))  # (4, N / 4, K)
        tensors[f"{name}.weight"] = u[0] | u[1] << 2 | u[2] << 4 | u[3] << 6
        tensors[f"{name}.weight_scale"] = scale.reshape(1)
    return tensors


def write_code(folder, model):
    """Put the model file and its wrapper into the folder -> what config.json says about them."""
    arch = type(model).__module__
    code = f"modeling_{arch}"
    (folder / f"{code}.py").write_text(WRAPPER.format(arch=arch), encoding="utf-8")
    shutil.copyfile(inspect.getsourcefile(type(model)), folder / f"{arch}.py")
    return {"architectures": ["ThimbleForCausalLM"], "model_type": f"thimble_{arch}", "use_cache": False,
            "thimble": asdict(model.config), "num_hidden_layers": getattr(model.config, "n_layer", 1),
            "auto_map": {"AutoConfig": f"{code}.ThimbleConfig", "AutoModelForCausalLM": f"{code}.ThimbleForCausalLM"}}


def unsaved_buffers(model):
    """Names of the buffers that the model computes itself: in the folder they are stored all the same."""
    return sorted(dict(model.named_buffers()).keys() - model.state_dict().keys())


def write_side_files(folder, model, tokenizer):
    """The tokenizer's files and generation_config.json, as transformers, transformers.js and others read them."""
    files = chat.files(tokenizer, model_max_length=model.config.block_size) | {"tokenizer.json": tokenizer.to_json()}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_json(folder / "special_tokens_map.json", chat.special_tokens(tokenizer, tokenizer.record))


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- in
def read(folder):
    """The Checkpoint of a folder with safetensors: an architecture in families.py or relatives.py, or our own code.

    UserError for any other.
    """
    folder = Path(folder)
    path = folder / "config.json"
    about = read_json(path)
    family = about.get("model_type")
    if isinstance(about.get("thimble"), dict):
        return read_own(folder, about)
    if type(family) is not str or family not in (*families.FAMILY, *relatives.ARCHS):
        families.refuse(path, "model_type", family, f": only {', '.join((*families.FAMILY, *relatives.ARCHS))}")
    source = families if family in families.FAMILY else relatives
    family, config = source.from_hf(path, about)
    packed = family == "bitnet" and relatives.mode_of(path, about) == "offline"
    tensors = {}
    for file in safetensors_files(folder):
        for name, tensor in read_safetensors(file, packed):
            if name.endswith("rotary_emb.inv_freq"):  # which older files hold, though it can be computed
                continue
            ours = names.rename(name, names.HUGGING_FACE, names.OURS, family)
            if ours is None or ours in tensors:
                raise UserError(f"{file}: tensor {name} is {'stored twice' if ours else f'not one of {family}'}")
            tensors[ours] = tensor
    missing = {"embed.weight", "norm.weight"} - tensors.keys()
    if missing:
        raise UserError(f"{folder} lacks {', '.join(sorted(missing))}: download it again")
    drop_tied_copy(folder, config.get("tie_embeddings", True), tensors)
    if source is relatives:
        relatives.settle_hf(path, about, family, config, tensors)
    return families.as_checkpoint(folder, config, tensors, relatives.ARCHS.get(family))


def read_own(folder, about):
    """The Checkpoint of a folder that holds a model file of its own, which must be the one here: no code is run."""
    arch = str(about.get("model_type")).removeprefix("thimble_")
    module = checkpoint.model_file(folder, arch)
    theirs = folder / f"{arch}.py"
    if not theirs.is_file() or theirs.read_bytes() != Path(module.__file__).read_bytes():
        raise UserError(f"{folder} was written with another {arch}.py: put that one beside train.py")
    buffers = about.get("thimble_buffers") or ()
    tensors = {}
    for file in safetensors_files(folder):
        for name, tensor in read_safetensors(file, packed=True):
            name = name.removeprefix("model.")
            if name not in buffers:
                tensors[name] = tensor
    try:
        config = configurator.from_flat(module.Config, about["thimble"])
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} does not fit {arch}.py: {error}") from None
    meta = {"arch": arch, "model_config": asdict(config), "step": 0, "name": folder.stem}
    return checkpoint.Checkpoint(folder, meta, tensors, None)


def drop_tied_copy(path, tied, tensors):
    """Drop a head that is stored although it is the embedding; UserError if it is not."""
    if not tied or "head.weight" not in tensors:
        return
    if not torch.equal(tensors.pop("head.weight"), tensors["embed.weight"]):
        raise UserError(f"{path} stores a head other than the embedding, although its config.json says "
                        "tie_word_embeddings=true: which of the two counts is not clear")


def safetensors_files(folder):
    """Paths of the files that hold the weights: model.safetensors, or those that its index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.is_file():
        if whole.is_file():
            return [whole]
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        hint = ""
        if pickles:
            hint = f"; {pickles[0]} is a pickle, which can run code and is never read: convert it to safetensors"
        raise UserError(f"{folder} has no model.safetensors{hint}")
    places = read_json(index).get("weight_map")
    shards = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    for name in shards:
        # no path: an index must not name a file outside of its folder
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,150}\.safetensors", name):
            raise UserError(f"{index} names the file {name[:80]!r}, which is not a plain name")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing, but {index.name} names it: download it")
    if not shards:
        raise UserError(f"{index} names no files")
    return [folder / name for name in shards]


def read_safetensors(file, packed=False):
    """Yield (name, float32 tensor) of a safetensors file, which is checked against its size before anything is read.

    packed: whether bytes may be in it, which stay as they are.
    """
    try:
        with open(file, "rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            # the length of the header is the first thing that a damaged file gets wrong
            header = raw.read(size) if size < min(10**8, file.stat().st_size) else b""
        listed = json.loads(header, object_pairs_hook=lambda pairs: [key for key, _ in pairs])
        if len(set(listed)) < len(listed):
            raise ValueError("a tensor is named twice")  # which the library accepts
        with safetensors.safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is not a dict)
                tensor = tensors.get_tensor(name)
                if packed and tensor.dtype == torch.uint8:
                    yield name, tensor
                    continue
                if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                    kind = str(tensor.dtype).removeprefix("torch.")
                    raise UserError(f"{file}: tensor {name} is {kind}, which cannot be read: convert it to float32, "
                                    "float16 or bfloat16")
                yield name, tensor.to(torch.float32, copy=True)  # the file is mapped: it may change, or be deleted
    except UserError:
        raise
    except Exception as error:  # the library's errors share no base class
        raise UserError(f"{file} is not a valid safetensors file ({short(error, 200)}): download it again") from None
