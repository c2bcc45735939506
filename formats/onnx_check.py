"""Hold an ONNX file of onnx_graph.py against the torch model that it was made of, in onnxruntime.

    onnx_graph.export(model, "model.onnx")
    print(onnx_check.check(model, "model.onnx"))
    run = onnx_check.session("model.onnx")                         # or use it: a prompt, then token by token
    logits, cache = onnx_check.step(run, [[1, 2, 3]], onnx_check.empty_cache(run, 1))
"""
import dataclasses
import math
from pathlib import Path

import numpy as np
import torch

from formats.onnx import QUANTS, copied, quantise4, quantise8
from thimble.files import UserError


def session(path):
    try:
        import onnxruntime
    except ImportError:
        raise UserError("to run an ONNX file install onnxruntime: pip install onnxruntime==1.31.1") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library has a class for each fault
        raise UserError(f"{path}: onnxruntime does not load it: {str(error).splitlines()[0]:.200}") from None


def empty_cache(run, batch_size):
    """Before the first token: no keys, no values, states of 0."""
    return {value.name: np.zeros([batch_size if d == "batch_size" else 0 if isinstance(d, str) else d
                                  for d in value.shape], np.float32)
            for value in run.get_inputs() if value.name.startswith("past")}


def step(run, ids, cache, mask=None):
    """ids (B, T), cache from `empty_cache` or the last step, mask (B, P + T) or None -> (logits (B, T, V), cache)."""
    ids = np.asarray(ids, np.int64)
    names = [value.name for value in run.get_outputs()]
    known = {value.name for value in run.get_inputs()}
    keys = next((array for name, array in cache.items() if name.endswith(".key")), None)
    if mask is None:
        mask = np.ones((len(ids), keys.shape[2] + ids.shape[1]), np.int64)
    feed = {"input_ids": ids, "attention_mask": mask,
            "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1]:]}
    logits, *states = run.run(names, {k: v for k, v in feed.items() if k in known} | cache)
    return logits, {name.replace("present_", "past_").replace("present.", "past_key_values."): state
                    for name, state in zip(names[1:], states, strict=True)}


def round8(x):
    """x (..., K) rounded to 8 bits a row, as `absmax` does it."""
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * scale).round() / scale


def twin(model, quant):
    """The torch model whose weights and activations are rounded as this form of the graph rounds them."""
    model = copied(model)
    if quant not in ("int8", "int4"):
        return model

    def dequantise8(weight):
        codes, scales = quantise8(weight.numpy())
        return torch.from_numpy((codes.astype(np.float32) - 128) * scales[:, None])

    if hasattr(model, "embedding"):
        model.embed.weight.copy_(model.embedding())
        model.embedding = lambda: model.embed.weight
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.copy_(dequantise8(module.weight))
        elif isinstance(module, torch.nn.Linear) and name.endswith("dt_proj"):
            pass                                           # small, and an error in it adds up over time
        elif isinstance(module, torch.nn.Linear) and (quant == "int8" or name == "head"):
            module.weight.copy_(dequantise8(module.weight))
            module.register_forward_pre_hook(lambda _, inputs: (round8(inputs[0]),))
        elif isinstance(module, torch.nn.Linear):
            codes, scales = quantise4(module.weight.numpy())
            scales = np.repeat(scales, 32, 1)[:, :codes.shape[1]]
            module.weight.copy_(torch.from_numpy((codes.astype(np.float32) - 8) * scales))
    logits = model.unembed
    model.unembed = lambda x: logits(round8(x))            # the head's input, also where the head is the embedding
    return model


@torch.no_grad()
def greedy(model, ids, n):
    """ids (B, T) -> (B, T + n)."""
    cache, new = model.init_cache(len(ids), ids.size(1) + n), ids
    for _ in range(n):
        logits, cache = model.step(new, cache)
        new = logits.argmax(-1, keepdim=True)
        ids = torch.cat((ids, new), 1)
    return ids


@torch.no_grad()
def check(model, path, prompts=None, n_new=64):
    """Hold the file at `path`, made of `model`, against torch -> a dict of figures; UserError if it is not the model.

    prompts: lists of ids; by default 50 random ones. Each is continued by n_new greedy tokens (fewer where block_size
    ends) with onnxruntime's cache, one token at a time, and read again as a whole; so is the vocabulary
    (of a large one a part), in any order.

    delta, rms: of logit - logit of torch, the largest and the root mean square, where both round numbers alike
    floor: the rms that torch itself has against torch in float64. Where activations are rounded to 8 bits, as in every
        ternary model, a last bit tips a rounding now and then, so that no two libraries agree to the last digit; there
        the input of the first block is changed by 2e-6 of itself, too. The file may have a delta of 1e-4 or an rms
        of 2 floors
    loss: the largest logit - logit of the unrounded model, what int8 and int4 cost
    kept: share of places where the likeliest token is still that of the unrounded model
    same: greedy texts equal to those of torch that rounds alike, of `prompts`
    bytes, parameters: size of the file, numbers in the model
    """
    path, run, config = Path(path), session(path), model.config
    meta = run.get_modelmeta().custom_metadata_map
    quant = meta.get("quant")
    if quant not in QUANTS or meta.get("arch") != type(model).__module__:
        raise UserError(f"{path} is not an export of a {type(model).__module__}: make it with export.py --format=onnx")
    generator = torch.Generator().manual_seed(0)
    if prompts is None:
        lengths = [max(1, min(n, config.block_size // 2)) for n in (1, 4, 9, 16, 33) for _ in range(10)]
        prompts = [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    groups = {}
    for prompt in prompts:
        groups.setdefault(len(prompt), []).append(prompt)
    model = copied(model)
    rounded, wide = twin(model, quant), twin(model, quant).double()
    if quant in ("int8", "int4") or meta["arch"] == "ternary":
        noise = 1 + 2e-6 * torch.randn(config.n_embd, generator=generator).double()
        wide.blocks[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] * noise, *inputs[1:]))
    window = "attention_mask" not in {value.name for value in run.get_inputs()}
    errors, floors, losses, kept, same = [], [], [], [], 0

    def compare(ids, logits, start=0):
        want, exact, plain = (m(ids)[0][:, start:].numpy() for m in (rounded, wide, model))
        errors.append(logits - want)
        floors.append(want - exact)
        losses.append(logits - plain)
        kept.append((logits.argmax(-1) == plain.argmax(-1)).ravel())

    for length, group in groups.items():
        teacher = model if getattr(config, "packed", False) else rounded  # packed: decodes in a kernel of its own
        ids = greedy(teacher, torch.tensor(group), max(1, min(n_new, config.block_size - length)))
        known, logits, cache = ids[:, :-1], [], None if window else empty_cache(run, len(ids))
        for t in range(length, known.size(1) + 1):
            if window:
                logits.append(run.run(None, {"input_ids": known[:, :t].int().numpy()})[0])
            else:
                out, cache = step(run, known[:, 0 if t == length else t - 1:t], cache)
                logits.append(out[:, -1])
        logits = np.stack(logits, 1)
        # the argmax after each prefix of torch's text is torch's next token: so a free run would write that text
        same += int((logits.argmax(-1) == ids[:, length:].numpy()).all(1).sum())
        compare(known, logits, length - 1)
        if not window:
            compare(known, step(run, known, empty_cache(run, len(ids)))[0])
    if not window:
        width = min(config.block_size, 64)
        rows = min(64, max(8, -(-config.vocab_size // width)), max(1, 2**25 // config.vocab_size // width))  # memory
        order = torch.cat([torch.randperm(config.vocab_size, generator=generator)
                           for _ in range(-(-rows * width // config.vocab_size))])[:rows * width].view(rows, width)
        compare(order, step(run, order, empty_cache(run, rows))[0])

    def rms(parts):
        return math.sqrt(np.mean([np.mean(np.square(part, dtype=np.float64)) for part in parts]))

    whole = type(model)(dataclasses.replace(config, packed=False)) if getattr(config, "packed", False) else model
    found = {"quant": quant, "delta": float(max(np.abs(part).max() for part in errors)), "rms": rms(errors),
             "floor": rms(floors), "loss": float(max(np.abs(part).max() for part in losses)),
             "kept": float(np.concatenate(kept).mean()), "same": same,
             "prompts": len(prompts), "bytes": path.stat().st_size,
             "parameters": sum(p.numel() for p in whole.parameters())}
    if not (found["delta"] <= 1e-4 or found["rms"] <= 2 * found["floor"]):  # also where it is NaN
        raise UserError(f"{path} is not the model: its logits are off by {found['rms']:.2g} (rms; rounding explains "
                        f"{found['floor']:.2g}), {same} of {len(prompts)} greedy texts are equal; delete it")
    if found["bytes"] > 4.04 * found["parameters"] + 2**14 * (config.n_layer + 4):
        raise UserError(f"{path} has {found['bytes']:,} bytes for {found['parameters']:,} parameters: something is in "
                        "it twice; delete it")
    return found
