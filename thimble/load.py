"""Whatever a path is, a model that can be used: a run, a checkpoint, a Hugging Face folder or name, a GGUF file.

    loaded = load("runs/tiny_cpu")
    loaded.model, loaded.tokenizer, loaded.template, loaded.stop_ids
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from thimble import chat, checkpoint, hub
from thimble.files import UserError, read_json, short, warn
from thimble.tokenizer import Tokenizer, load_tokenizer

# what other programs keep weights in; all but the first are pickles, which are refused by name
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}
# Largest difference of two logits, over the largest logit, between the two forms of a model. Sums of integers are exact
# in any order, so ternary.py has none at all.
SAME = 1e-5


@dataclass(frozen=True)
class Loaded:
    path: Path
    name: str  # of the run or the file
    meta: dict  # of the checkpoint
    model: torch.nn.Module  # on its device, in eval mode
    tokenizer: Tokenizer
    template: str  # how a conversation is written: the name of one of chat.TEMPLATES, or chat.OWN
    stop_ids: set  # ids that end a text: those of the tokenizer's record
    answer_ids: set  # ids that end an answer: those, and the end of a message


def load(path=None, which="best", device="cpu", template="auto", deploy=None):
    """The Loaded of any path that `read` knows: model and tokenizer, checked to fit together. UserError otherwise.

    `template` is one of chat.TEMPLATES, or "auto" for the one that the model was trained with. `deploy`: whether to
    convert the model into the form in which it ships; None: only on a CPU.
    """
    found = read(path, which)
    model = checkpoint.load_model(found)
    if deploy is None:
        deploy = device == "cpu"  # only there is the packed form the faster one
    if deploy:
        model = deployed(model)
    try:
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device={device} does not work here: {reason}; try cpu") from None
    tokenizer = read_tokenizer(found.path)
    # fewer ids than rows are fine: a vocabulary is often padded for speed
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{found.path}: its tokenizer has {tokenizer.vocab_size} ids, but its model only "
                        f"{model.config.vocab_size}: they do not belong together; copy both again from one place")
    if template == "auto":
        template = chat.template_of(tokenizer)
    stop_ids = set(tokenizer.record.ends)
    answer_ids = stop_ids | chat.answer_ends(tokenizer, template)
    name = name_of(found.path)
    if "hub" in found.meta:  # whose folder is called by a hash
        name = found.meta["hub"].partition("@")[0].rpartition("/")[2].removesuffix(".gguf")
    return Loaded(found.path, name, found.meta, model, tokenizer, template, stop_ids, answer_ids)


def read(path=None, which="latest"):
    """The Checkpoint at `path`: a run (its `which`), a checkpoint folder, a Hugging Face folder or name, a GGUF file.

    An empty path is the newest run. UserError if it is none of these, or damaged.
    """
    if path and hub.is_name(path):
        path, name = hub.fetch(path)
        found = read(path, which)
        found.meta["hub"] = name  # with its revision
        return found
    path = gguf_inside(Path(path)) if path else checkpoint.newest_run()
    suffixes = {file.suffix for file in path.glob("*")}
    # a run has a config.json, too, but no weights beside it; a checkpoint has weights, but no config.json
    if path.is_file() or (suffixes & WEIGHTS and (path / "config.json").is_file()):
        from formats import gguf, hf
        return hf.read(path) if path.is_dir() else gguf.read(path)
    if (path / "val.bin").is_file():  # else its meta.json would be taken for that of a damaged checkpoint
        raise UserError(f"{path} is a dataset, not a model: train one on it with python train.py --dataset={path}")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise UserError(f"{path} is an adapter (PEFT), not a whole model: merge it into its model first, with peft's "
                        "merge_and_unload(), and save that")
    if (path / "onnx").is_dir():  # else it would be taken for a run without a checkpoint
        raise UserError(f"{path} is an ONNX export, which cannot be read back: name the run that it was made from")
    if path.is_dir() and not checkpoint.holds_run(path) and not (path / "meta.json").is_file():
        what_is_missing(path, bool(suffixes & WEIGHTS))
    return checkpoint.load(path, which)


def what_is_missing(folder, has_weights):
    """UserError if `folder` is half of a Hugging Face folder."""
    about = folder / "config.json"
    if has_weights and not checkpoint.STEP.fullmatch(folder.name):
        raise UserError(f"{folder} has weights, but no config.json to say of which architecture: copy that file from "
                        "where they are from")
    if about.is_file() and "model_type" in read_json(about):  # which the config.json of a run lacks
        raise UserError(f"{folder} has a config.json, but no model.safetensors or shards of one: download it again")


def read_tokenizer(path):
    """The Tokenizer of a tokenizer.json, of the folder (dataset, checkpoint) that holds one, or of a GGUF file.

    Also of a name on the Hugging Face Hub.
    """
    if hub.is_name(path):
        path, _ = hub.fetch(path)
    path = gguf_inside(Path(path))
    if path.is_file() and path.suffix != ".json":
        from formats import gguf
        if gguf.is_gguf(path):
            return gguf.read_tokenizer(path)
    return load_tokenizer(path)


def gguf_inside(path):
    """The GGUF file of a folder that export.py has written for Ollama; any other path as it is."""
    found = list(path.glob("*.gguf"))
    return found[0] if len(found) == 1 and (path / "Modelfile").is_file() else path


@torch.no_grad()
def deployed(model):
    """The model in the form in which it ships and runs fastest, if its file defines one; any other as it is.

    A fork may have changed one form and not the other. So the shipped form speaks for a model only after its forward
    gave the same logits; where it does not, a line says so, and the model stays what was trained.
    """
    if not hasattr(model, "deploy_state") or model.config.packed:
        return model
    model.eval()
    n_tokens = min(model.config.block_size, 64)
    ids = torch.randint(model.config.vocab_size, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    try:
        # built on a real device: a fork may compute buffers that no state holds
        twin = type(model)(replace(model.config, packed=True)).eval()
        twin.load_state_dict(model.deploy_state())
        logits = model(ids)[0]
        off = ((twin(ids)[0] - logits).abs().max() / logits.abs().max().clamp(min=1e-30)).item()
        if off <= SAME:
            return twin
        why = f"their logits differ by {off:.0e} of the largest"
    except Exception as error:  # whatever a fork has added to one form only
        why = short(error, 150)
    warn(f"the packed form of {type(model).__module__}.py is not the model that was trained ({why}): it runs unpacked, "
         "slower")
    return model


def name_of(path):
    """The name of the run for a checkpoint; that of the file or folder itself, without .gguf, for anything else."""
    if checkpoint.STEP.fullmatch(path.name):
        return path.parent.name
    return path.name.removesuffix(".gguf")
