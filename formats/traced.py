"""A fork's own step and forward as ONNX graphs, traced by torch.export, where formats/onnx.py lacks its layers.

    traced.write("out", model)                                     # out/onnx/step.onnx, and forward.onnx if it can be

step.onnx maps input_ids int64 (1, 1) and the cache, past_key_values.NAME for each tensor of init_cache(1, block_size),
to logits float32 (1, V) and the next cache, present.NAME. It begins with zeros; past_key_values.pos, int64 (1,), counts
the tokens so far. forward.onnx maps input_ids (1, T) to logits (1, T, V), for any T up to block_size.

Legend: B batch, T tokens, V vocabulary.
"""
import contextlib
import copy
import io
import logging
import warnings

import numpy as np
import torch

from formats.check import EXACT, TIPPED, TracedOnnx
from formats.weights import is_ternary
from thimble import files
from thimble.files import UserError, need, short

EXAMPLE = 8  # tokens of the text with which forward is traced
N_STEPS = 8  # tokens over which step is compared with forward


# ---- the cache, whose tensors are a graph's inputs and outputs
def flat(cache, prefix=""):
    """{"layers.0.k": tensor} of a cache, which is made of dicts and lists."""
    found = {}
    for key, value in cache.items() if isinstance(cache, dict) else enumerate(cache):
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value
        else:
            found |= flat(value, f"{prefix}{key}.")
    return found


def refilled(cache, tensors):
    """The same dicts and lists with the next of `tensors`, an iterator, in place of each tensor."""
    if isinstance(cache, torch.Tensor):
        return next(tensors)
    if isinstance(cache, dict):
        return {key: refilled(value, tensors) for key, value in cache.items()}
    return [refilled(value, tensors) for value in cache]


class Step(torch.nn.Module):
    def __init__(self, model, cache):
        super().__init__()
        self.model = model
        self.cache = cache

    def forward(self, idx, *tensors):
        logits, cache = self.model.step(idx, refilled(self.cache, iter(tensors)))
        return logits, *flat(cache).values()


class Forward(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx):
        return self.model(idx)[0]


# ---- tracing
@contextlib.contextmanager
def full_cache(max_len):
    """Have int(position) be the last one that fits.

    A step reads the number to cut its cache to what it holds. A graph cannot: it keeps the whole cache, of which the
    step masks what each row has not seen, as with rows of different lengths.
    """
    before = torch.Tensor.__int__
    torch.Tensor.__int__ = lambda self: max_len - 1
    try:
        yield
    finally:
        torch.Tensor.__int__ = before


def trace(module, inputs, dynamic, input_names, output_names):
    """-> onnx.ModelProto."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names packages that nobody needs here
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
        graph = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=input_names,
                                  output_names=output_names)
    return graph.model_proto


def trace_step(model):
    max_len = model.config.block_size
    cache = model.init_cache(1, max_len)
    cache["pos"] = torch.tensor([max_len - 1])  # (1,): as a row among others, which have positions of their own
    tensors = flat(cache)
    ids = torch.zeros(1, 1, dtype=torch.long)
    names = ["input_ids", *(f"past_key_values.{name}" for name in tensors)]
    outputs = ["logits", *(f"present.{name}" for name in tensors)]
    with full_cache(max_len):
        return trace(Step(model, cache), (ids, *tensors.values()), None, names, outputs)


def trace_forward(model):
    T = min(EXAMPLE, model.config.block_size)
    ids = torch.zeros(1, T, dtype=torch.long)
    # AUTO: any length if the code does not depend on it, as a loop over tokens would
    return trace(Forward(model), (ids,), ({1: torch.export.Dim.AUTO},), ["input_ids"], ["logits"])


# ---- compared with the model
def gap(model, ids, theirs):
    """The largest difference to the model's own logits for ids (1, T), in units of their spread."""
    ours = model(ids)[0]
    return ((ours - torch.from_numpy(theirs)).abs().max() / ours.std()).item()


def step_gap(model, run):
    ids = torch.randint(model.config.vocab_size, (1, min(N_STEPS, model.config.block_size)))
    cache = run.empty_cache(1)
    rows = []
    for token in ids[0].tolist():
        logits, cache = run.step([[token]], cache)
        rows.append(logits)
    return gap(model, ids, np.stack(rows, 1))


def forward_gap(model, session):
    """The largest over several lengths; infinite where one does not run."""
    size = model.config.block_size
    gaps = []
    for length in sorted({1, 2, EXAMPLE + 1, size // 2 + 1, size}):
        ids = torch.randint(model.config.vocab_size, (1, min(length, size)))
        try:
            theirs, = session.run(None, {"input_ids": ids.numpy()})
        except Exception:  # onnxruntime has a class for each fault
            return float("inf")
        gaps.append(gap(model, ids, theirs))
    return max(gaps)


@torch.no_grad()
def write(folder, model):
    """Write folder/onnx/step.onnx and, if it holds for every length, forward.onnx -> (the model, {weight: array}).

    UserError if the step cannot be traced, or if its graph gives other logits than the model.
    """
    need("onnxscript", "an ONNX graph of a model file's own code")
    onnxruntime = need("onnxruntime", "an ONNX graph of a model file's own code")
    import onnx
    arch = type(model).__module__
    remedy = "export it with --format=hf, or teach formats/onnx.py its layers"
    model = copy.deepcopy(model).float().eval().requires_grad_(False)
    limit = TIPPED if any(is_ternary(module) for module in model.modules()) else EXACT
    (folder / "onnx").mkdir()
    path = folder / "onnx" / "step.onnx"
    try:
        proto = trace_step(model)
        files.write_atomic(path, proto.SerializeToString())
        same = step_gap(model, TracedOnnx(path)) <= limit
    except Exception as error:  # a fork may do what cannot be traced
        raise UserError(f"{arch}.py cannot be traced ({short(error, 100)}): {remedy}") from None
    if not same:
        raise UserError(f"{arch}.py computes something other than its traced step: {remedy}")
    try:
        whole = trace_forward(model).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a length that does not run is not worth a word
        session = onnxruntime.InferenceSession(whole, options, providers=["CPUExecutionProvider"])
        if forward_gap(model, session) <= limit:
            files.write_atomic(folder / "onnx" / "forward.onnx", whole)
        else:
            print("no forward.onnx: what it computes depends on the length that it was traced with; step.onnx serves")
    except Exception as error:
        print(f"no forward.onnx: it cannot be traced ({short(error, 100)}); step.onnx serves")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    return model, stored
