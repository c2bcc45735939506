"""Export a model to other programs, and prove that it is the same there.

    python export.py --format=hf                                   # a folder for transformers, vLLM, MLX, ...
    python export.py --format=gguf --quant=q8_0                    # a folder for Ollama; its file: llama.cpp, LM Studio
    python export.py --format=onnx --quant=int4                    # a folder for onnxruntime-genai, transformers.js
    python export.py --format=web                                  # a page that runs the model in a browser

What is written is read back by the program it is for, and kept only if its logits and greedy texts are ours. A model
is exported as a stock architecture (Llama, Qwen3, Arcee, BitNet, Jamba, GraniteMoeHybrid) if it computes what that
computes, which is tested before anything is written: the model files do in most settings, and so may your fork. What no
stock architecture can express (a custom activation, mHC-lite streams) is exported to Hugging Face with the model file
itself as its code, and to ONNX as torch traces it, if need be. --checkpoint may also be a Hugging
Face folder or a GGUF file.
"""
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from formats import gguf, hf, ollama
from formats.check import Artefact, check
from formats.names import QUANTS
from formats.reference import stock_architecture
from thimble import configurator, files
from thimble.files import UserError
from thimble.load import load


@dataclass(frozen=True)
class Config:
    # what
    checkpoint: str = ""            # run, checkpoint, Hugging Face folder or name, or GGUF file; empty: the newest run
    which: Literal["best", "latest"] = "best"  # checkpoint of the run
    format: Literal["hf", "gguf", "onnx", "web"] = "hf"
    quant: str = ""                 # how numbers are stored (an invalid value lists the valid ones); empty: as they are
    out: str = ""                   # folder to write (FILE.gguf or FILE.onnx: that alone); empty: under exports/
    window: bool = False            # onnx: (batch, block) int32 ids to the last one's logits, without a cache
    # check
    check: bool = True              # reload it in its own program, where that is installed
    prompts: int = 50               # greedy texts to compare
    prompt_tokens: int = 64         # length of each

    def __post_init__(self):
        configurator.check(self, positive=("prompts", "prompt_tokens"))


# KL divergence from the checkpoint, in nats a token of text, beyond which a warning is printed: where the checkpoint is
# right about a text, perplexity is then up by a tenth. SmolLM2 keeps 96 % of its most likely tokens at .004, 88 % at
# .04 and 68 % at .4, where it no longer knows the capital of France.
TOO_COARSE = 0.1


def export(loaded, cfg):
    """Write the model of a thimble.load.Loaded; the artefact gets its name only once the check has passed -> figures.

    They are those of formats/check.py, if it was checked, and "bytes", the size of all files.
    """
    begun = time.perf_counter()
    if cfg.window and cfg.format != "onnx":
        raise UserError(f"--window is a form of ONNX: use --format=onnx, not {cfg.format}")
    out = Path(cfg.out or f"exports/{default_name(loaded, cfg)}")
    if os.path.lexists(out):
        raise UserError(f"{out} already exists: remove it, or name another with --out")
    stock, why_not = "", ""
    if cfg.format in ("hf", "gguf"):  # an ONNX graph is compared with the model itself
        stock, why_not = stock_architecture(loaded.model)
    quant, as_is = choose_quant(cfg, stock, getattr(loaded.model.config, "packed", False))
    if cfg.format == "hf" and not stock:
        print(f"no stock architecture ({why_not}): the model file goes along, for trust_remote_code=True")
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(out) as temporary:
        twin, stored = write(temporary, loaded, cfg, quant, stock, why_not)
        written = [file for file in [temporary, *temporary.rglob("*")] if file.is_file()]
        found = {"bytes": sum(file.stat().st_size for file in written)}
        if cfg.check:
            form = "onnx" if cfg.format == "web" else cfg.format
            if (temporary / "onnx" / "step.onnx").is_file():
                form = "traced"
            # a GGUF file's own program reads nothing else of its folder
            path = next(temporary.glob("*.gguf"), temporary)
            artefact = Artefact(path, form, quant, twin, stored)
            found |= check(artefact, loaded.model, loaded.tokenizer, loaded.meta, cfg.prompts, cfg.prompt_tokens)
    report(found, quant, as_is)
    print(f"{out}: {found['bytes']:,} bytes, {quant}, {time.perf_counter() - begun:.0f} s")
    return found


def choose_quant(cfg, stock, packed):
    """-> (how numbers are stored, the choice that rounds no weight); UserError lists the valid ones."""
    allowed = QUANTS["hf, ternary" if cfg.format == "hf" and stock == "bitnet" else cfg.format]
    quant = cfg.quant or allowed[0]
    if not cfg.quant and packed and "packed" in allowed:  # there are no other weights
        quant = "packed"
    if quant not in allowed:
        raise UserError(f"--quant={quant} is not for --format={cfg.format} of this model: use {', '.join(allowed)}")
    return quant, allowed[0]


def default_name(loaded, cfg):
    """NAME-hf, NAME-onnx-int4, NAME-gguf-q8_0, NAME-window.onnx, ..."""
    parts = [loaded.name]
    ending = ""
    if cfg.window:
        parts.append("window")
        ending = ".onnx"
    else:
        parts.append(cfg.format)
    if cfg.quant:
        parts.append(cfg.quant)
    return "-".join(parts) + ending


def write(path, loaded, cfg, quant, stock, why_not):
    """Write the artefact -> (the torch model whose logits it must give, {tensor name: tensor} as stored)."""
    model, tokenizer = loaded.model, loaded.tokenizer
    if cfg.format == "gguf":
        if not stock:
            raise UserError(f"llama.cpp has no architecture for this model ({why_not}): use --format=hf, where the "
                            "model file goes along")
        file = path
        if path.suffix != ".gguf":
            path.mkdir()
            file = path / f"{loaded.name}.gguf"
            text = ollama.modelfile(file.name, tokenizer, model.config.block_size)
            (path / "Modelfile").write_text(text, encoding="utf-8")
        return gguf.write(file, model, stock, tokenizer, quant, loaded.name)
    if cfg.format == "hf":
        path.mkdir()
        return hf.write(path, model, stock, tokenizer, quant)
    from formats import onnx as onnx_format  # takes half a second
    if cfg.format == "onnx" and (cfg.window or path.suffix == ".onnx"):
        return onnx_format.write(path, model, quant, cfg.window)
    path.mkdir()
    from formats import traced, web
    if cfg.format == "web":
        return web.write_page(path, model, tokenizer, quant)
    try:
        return web.write(path, model, tokenizer, quant)
    except onnx_format.NoForm as error:
        if quant != "fp32":
            raise
        print(f"{str(error).rpartition(':')[0]}: its own step is traced instead")
    hf.write_side_files(path, model, tokenizer)
    return traced.write(path, model)


def report(found, quant, as_is):
    """Print what the check found."""
    if "delta" not in found:
        return
    texts = f"{found['same']}/{found['prompts']} identical"
    if found["tied"]:
        texts += f", {found['tied']} part at a near tie"
    print(f"checked in {found['runtime']}: max |dlog p| {found['delta']:.2g} to the weights as stored; text costs "
          f"{found['bits_there']:.4f} bits per byte, the checkpoint's {found['bits']:.4f} (KL {found['kl']:.2g} nats a "
          f"token), {found['kept']:.1%} of the most likely tokens kept; greedy texts of {found['tokens']} tokens: "
          f"{texts}")
    if found["kl"] > TOO_COARSE:
        files.warn(f"the file is sound, but --quant={quant} is too coarse for this model: it would write other texts; "
                   f"--quant={as_is} keeps the weights as they are")


def main(cfg):
    loaded = load(cfg.checkpoint, cfg.which, deploy=False)
    export(loaded, cfg)
    out = cfg.out or f"exports/{default_name(loaded, cfg)}"
    if cfg.format == "web":
        print(f"python -m http.server --directory {out}   # then open http://localhost:8000")
    elif Path(out, "Modelfile").is_file():
        print(f"ollama create {loaded.name} -f {out}/Modelfile")


if __name__ == "__main__":
    configurator.run(main, Config)
