"""Every model file in every format: does its own program load it, and does it compute the same?

    python bench/formats.py                                         # minutes; small models with random weights
    python bench/formats.py --only=jamba,bitnet --prompts=10
    python bench/formats.py --recipes=true --prompts=8              # the shapes of config/ instead, without rounding

max |dlog p| is against torch with the weights as stored, "cost" the KL divergence from the checkpoint's own weights in
nats a token, both on the text of formats/passage.txt. The weights are far from those of a fresh model, so that logits
spread by 1 and more, and greedy texts tell models apart.
"""
import contextlib
import importlib
import io
import runpy
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import export
from formats.names import QUANTS
from formats.reference import stock_architecture
from formats.weights import is_ternary
from prepare.make_tokenizer import train_bpe
from thimble import configurator, files, load
from thimble.tokenizer import byte_tokenizer, char_tokenizer

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 128}
MODELS = {  # name: model file, its settings, tokenizer
    "llama": ("model", {"n_kv_head": 2}, "bpe"),
    "llama tied, bytes": ("model", {"tie_embeddings": True}, "byte"),
    "llama, characters": ("model", {}, "char"),
    "qwen3": ("model", {"n_kv_head": 2, "qk_norm": True}, "bpe"),
    "arcee": ("model", {"mlp": "gelu"}, "bpe"),
    "gelu, qk_norm": ("model", {"mlp": "gelu", "qk_norm": True}, "char"),
    "bitnet": ("ternary", {"n_embd": 256, "n_hidden": 512, "n_kv_head": 2}, "bpe"),
    "bitnet packed": ("ternary", {"n_embd": 256, "n_hidden": 512, "n_kv_head": 2, "packed": True}, "bpe"),
    "ternary groups": ("ternary", {"group_size": 32, "n_hidden": 128}, "bpe"),
    "ternary streams": ("ternary", {"n_streams": 2}, "bpe"),
    "jamba": ("hybrid_ssm", {"ssm": "mamba1", "n_layer": 3, "attn_layer_period": 3, "n_kv_head": 2}, "bpe"),
    "granite": ("hybrid_ssm", {"n_layer": 3, "attn_layer_period": 3}, "bpe"),
    "granite, qk_norm": ("hybrid_ssm", {"n_layer": 3, "attn_layer_period": 3, "qk_norm": True}, "bpe"),
}
FORMS = [("hf", "f32"), ("hf", "bf16"), ("hf", "online"), ("hf", "packed"), ("hf", "plain"), ("gguf", "f32"),
         ("gguf", "f16"), ("gguf", "bf16"), ("gguf", "q8_0"), ("gguf", "q5_1"), ("gguf", "q5_0"), ("gguf", "q4_1"),
         ("gguf", "q4_0"), ("gguf", "tq1_0"), ("gguf", "tq2_0"), ("onnx", "fp32"), ("onnx", "int8"), ("onnx", "int4"),
         ("onnx", "q2"), ("window", "fp32")]
CONFIG = Path(__file__).resolve().parent.parent / "config"


@dataclass(frozen=True)
class Config:
    recipes: bool = False           # the shapes of the recipes in config/, with weights and activations as they are
    only: tuple[str, ...] = ()      # models whose names begin with one of these; empty: all
    format: str = ""                # hf, gguf, onnx or window; empty: all
    prompts: int = 50               # greedy texts to compare
    prompt_tokens: int = 64         # length of each

    def __post_init__(self):
        configurator.check(self, positive=("prompts", "prompt_tokens"))


def tokenizers():
    """{kind: tokenizer}, trained on this repository's own text."""
    sources = sorted(Path(export.__file__).parent.glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    text += "héllo — ¿ 🎉 日本語 naïve 1234567"
    return {"bpe": train_bpe([text], 600, "gpt2"), "byte": byte_tokenizer(), "char": char_tokenizer(text)}


def recipes():
    """What MODELS is, of the recipes: their whole shape but for the vocabulary, and for a large one's size."""
    found = {}
    for path in sorted(CONFIG.glob("*.py")):
        said = runpy.run_path(path)
        if "/" in said.get("init_from", ""):  # the shape of another recipe, with a context of its own
            said = runpy.run_path(CONFIG / f"{Path(said['init_from']).name}.py")
        arch = said.get("arch", "model")
        fields = importlib.import_module(arch).Config.__dataclass_fields__
        settings = {key: value for key, value in said.items() if key in fields}
        if settings.get("vocab_size") == 49152:
            settings |= {"n_layer": 4, "n_embd": 192, "n_hidden": 512, "block_size": 512}
        settings.pop("vocab_size", None)
        kind = said["dataset"].rpartition("_")[2]
        found[path.stem] = arch, settings, kind if kind in ("byte", "char") else "bpe"
    return found


def build(arch, settings, vocab_size):
    """A model with weights that spread its logits by about 1."""
    module = importlib.import_module(arch)
    settings = dict(settings)
    packed = settings.pop("packed", False)
    torch.manual_seed(0)
    fields = module.Config.__dataclass_fields__
    shape = {key: value for key, value in SHAPE.items() if key in fields}
    model = module.Model(module.Config(**shape | settings, vocab_size=vocab_size))
    with torch.no_grad():
        for p in model.parameters():
            size = 0.2 if p.dim() < 2 else 0.1
            p += size * torch.randn_like(p)
    if packed:
        model = load.deployed(model)
    return model.eval()


def forms_of(model, stock, cfg):
    """Those of FORMS that make sense for a model, as (form, quant)."""
    ternary = any(is_ternary(module) for module in model.modules())
    packed = getattr(model.config, "packed", False)
    found = []
    for form, quant in FORMS:
        allowed = QUANTS["onnx"] if form == "window" else QUANTS[form]
        if form == "hf" and stock == "bitnet":
            allowed = QUANTS["hf, ternary"]
        if cfg.format not in ("", form) or quant not in allowed or (quant == "online" and packed):
            continue
        if quant in ("tq1_0", "tq2_0", "q2") and not ternary:
            continue
        if cfg.recipes and quant not in ("f32", "plain", "fp32"):
            continue
        if form == "gguf" and not stock and quant != "f32":
            continue  # one row says why there is none
        found.append((form, quant))
    return found


def row(loaded, form, quant, folder, cfg):
    """The cells of a row: what the check found, or why there is nothing to check."""
    suffix = {"gguf": ".gguf", "window": ".onnx"}.get(form, "")
    out = Path(folder, f"model{suffix}")
    window = form == "window"
    settings = export.Config(format="onnx" if window else form, quant=quant, window=window, out=str(out),
                             prompts=cfg.prompts, prompt_tokens=cfg.prompt_tokens)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = export.export(loaded, settings)
    except files.UserError as error:
        return [str(error), "", "", ""]
    texts = f"{found['same']} of {found['prompts']}"
    if found["tied"]:
        texts += f", {found['tied']} part at a near tie"
    return [f"{found['delta']:.1e}", f"{found['kl']:.1e}", texts, f"{found['bytes']:,}"]


def main(cfg):
    made = tokenizers()
    print("| model | format | max abs dlog p | cost | greedy texts | bytes |\n|---|---|---|---|---|---|")
    for name, (arch, settings, kind) in (recipes() if cfg.recipes else MODELS).items():
        if cfg.only and not name.startswith(cfg.only):
            continue
        tokenizer = made[kind]
        model = build(arch, settings, tokenizer.vocab_size)
        stop_ids = {tokenizer.eot}
        loaded = load.Loaded(Path(name), name, {}, model, tokenizer, "elite", stop_ids, stop_ids)
        for form, quant in forms_of(model, stock_architecture(model)[0], cfg):
            with tempfile.TemporaryDirectory() as folder:
                cells = row(loaded, form, quant, folder, cfg)
            print("|", " | ".join([name, f"{form} {quant}", *cells]), "|", flush=True)


if __name__ == "__main__":
    configurator.run(main, Config)
