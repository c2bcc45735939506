"""Whatever a path is, a model to speak to: a run, a checkpoint, a Hugging Face folder or a GGUF file.

    loaded = load("runs/tiny_cpu")
    loaded.model, loaded.tokenizer, loaded.template, loaded.stop_ids
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from thimble import chat, checkpoint
from thimble.files import UserError
from thimble.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Loaded:
    path: Path
    name: str                       # of the run or the file
    meta: dict                      # of the checkpoint
    model: torch.nn.Module          # on its device, in eval mode
    tokenizer: Tokenizer
    template: str                   # how a conversation is written
    stop_ids: set                   # ids that end a text: end of text, and what an imported model brings along
    answer_ids: set                 # ids that end an answer: those, and the end of a message


def read(path=None, which="latest"):
    """The Checkpoint at `path`, whatever it is; that of the newest run where path is empty. UserError if unreadable."""
    path = Path(path) if path else checkpoint.newest_run()
    weights = {".safetensors", ".bin", ".pt", ".pth"} & {file.suffix for file in path.glob("*")}
    if path.is_file() or weights and (path / "config.json").is_file():
        from formats import gguf, hf
        return hf.read(path) if path.is_dir() else gguf.read(path)
    return checkpoint.load(path, which)


def read_tokenizer(path):
    """The Tokenizer of a tokenizer.json, of the folder (dataset, checkpoint) that holds one, or of a GGUF file."""
    if Path(path).suffix == ".gguf":
        from formats import gguf
        return gguf.read_tokenizer(Path(path))
    return load_tokenizer(path)


def deployed(model):
    """The model in the form in which it ships and runs fastest, for model files that know one; any other as it is."""
    if not hasattr(model, "deploy_state") or model.config.packed:
        return model
    twin = type(model)(replace(model.config, packed=True))
    twin.load_state_dict(model.deploy_state())
    return twin.eval()


def load(path=None, which="best", device="cpu", template="auto", deploy=None):
    """A Loaded: model and tokenizer, checked to fit together. UserError otherwise.

    deploy: whether the model takes the form in which it ships; None: on a CPU.
    """
    found = read(path, which)
    model = checkpoint.load_model(found)
    if device == "cpu" if deploy is None else deploy:
        model = deployed(model)
    try:
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device={device} does not work here: {str(e).splitlines()[0]}; try cpu") from None
    tokenizer = read_tokenizer(found.path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{found.path}: the tokenizer has {tokenizer.vocab_size} ids, the model "
                        f"{model.config.vocab_size}: they do not belong together")
    if template == "auto":
        template = chat.template_of(found.meta, tokenizer)
    stop_ids = {tokenizer.eot, *found.meta.get("stop_ids", ())}
    answer_ids = stop_ids | {chat.end_id(tokenizer, template)}
    return Loaded(found.path, name_of(found.path), found.meta, model, tokenizer, template, stop_ids, answer_ids)


def name_of(path):
    """Of a run for its checkpoints; of a file or another folder its own, without the ending."""
    if checkpoint.STEP.fullmatch(path.name):
        return path.parent.name
    return path.name.removesuffix(".gguf")
