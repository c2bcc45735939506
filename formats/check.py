"""Compare what was written with the model, in the program it is for: transformers, llama.cpp or onnxruntime.

    artefact = Artefact(path, "gguf", "q8_0", twin, stored)
    print(check(artefact, model, tokenizer, meta))
    run = OnnxRuntime("model.onnx")                                # or use a graph: a prompt, then token by token
    logits, cache = run.step([[1, 2, 3]], run.empty_cache(1))

A format's writer returns what this needs: the twin, a torch model whose weights are rounded as the artefact stores
them, and the tensors that the file must hold.
"""
import json
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from formats import gguf, hf
from formats.rounding import rounds_activations
from thimble import checkpoint
from thimble.files import UserError, need, short, warn
from thimble.generate import greedy
from thimble.tokenizer import AWKWARD, load_tokenizer

# The largest difference of log p that passes, in units of the spread (standard deviation) of the logits.
# Float32 sums in another order differ by 1e-6 to 1e-5.
EXACT = 1e-4
# Where both sides round activations to 8 bits, a last bit tips a rounding now and then, which moves an activation by
# 1/127 of the largest. Of 50 prompts of tiny models most agree to 1e-5, the worst ever differed by 0.07.
TIPPED = 0.1
# llama.cpp rounds what meets halves to halves, what meets 8 or fewer bits to 8 bits, and the twin does not.
LLAMA_CPP = {"f16": 0.01, "bf16": 0.05, "q8_0": 0.25, "q4_0": 0.25, "tq1_0": 0.3, "tq2_0": 0.3}
N_FEW = 8  # prompts whose log p is compared in full
PROMPT = 8  # tokens of a prompt


class Artefact(NamedTuple):
    path: Path
    form: str  # "hf", "gguf", "onnx" or, of a fork, "traced"
    quant: str
    twin: torch.nn.Module  # gives the logits that it must give
    stored: dict  # {tensor name: tensor or array} that must be in it


@torch.no_grad()
def check(artefact, model, tokenizer, meta, n_prompts=50, n_tokens=64):
    """-> figures, none where the program is not installed; UserError if the artefact is not what it must be.

    Every tensor is compared with what was meant to be stored, log p and greedy texts with the twin's, the tokenizer
    with ours. Two greedy texts may part at a near tie, where the twin's logits of the two tokens are closer than twice
    the tolerance: then either may come out ahead.

    runtime: the program. delta: largest difference of log p to the twin's
    loss: largest difference between a logit of the twin and of the model, which is what the rounding of weights costs
    kept: share of places where the most likely token of the twin is still the model's
    same, tied: greedy texts, of `prompts` with `tokens` tokens each, that equal the twin's, and that part at a near tie
    """
    read_back(artefact)
    try:
        consumer = CONSUMERS[artefact.form](artefact.path)
    except MissingPackage as error:
        warn(f"not checked: {error}")
        return {}
    except Exception as error:  # whatever a foreign loader raises
        raise UserError(f"check failed: it does not load ({short(error, 300)})") from None
    twin = artefact.twin
    stop = hf.ends(tokenizer, meta)[1]
    # short prompts that leave room for the texts, also in a context of a few tokens
    size = model.config.block_size
    length = max(1, min(PROMPT, size // 4))
    n_tokens = max(1, min(n_tokens, size - length - 1))
    prompts = random_prompts(tokenizer, n_prompts, length)
    few = prompts[:N_FEW]
    try:
        delta, tolerance = compare_logprobs(consumer, artefact, few)
        same, tied = compare_texts(consumer, twin, prompts, n_tokens, stop, tolerance)
        if same + tied < n_prompts:
            raise UserError(f"check failed: {n_prompts - same - tied} of {n_prompts} greedy texts differ")
        if consumer.has_tokenizer:
            compare_tokenizer(consumer, tokenizer, [tokenizer.decode(prompt) for prompt in prompts.tolist()])
            # the name of the token, which a chat loop compares, and the ids, where the program lists them
            if consumer.end != tokenizer.token(stop[0]) or consumer.stop not in (None, stop):
                raise UserError(f"check failed: texts end with {consumer.end!r} there, ids {consumer.stop or ''}")
    finally:
        consumer.close()
    ours = model(few)[0]
    theirs = twin(few)[0]
    kept = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    return {"runtime": consumer.name, "delta": delta, "loss": (ours - theirs).abs().max().item(), "kept": kept,
            "same": same, "tied": tied, "prompts": n_prompts, "tokens": n_tokens}


def random_prompts(tokenizer, n, length):
    """(n, length) ids, none of them special."""
    # llama.cpp treats special ids in a prompt in its own ways
    known = sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.specials.values()))
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(known)[torch.randint(len(known), (n, length), generator=generator)]


# ---- the comparisons
def read_back(artefact):
    """UserError unless the file holds exactly the tensors that were meant to be in it."""
    path = artefact.path
    stored = artefact.stored
    try:
        if artefact.form == "hf":
            file = path / "model.safetensors"
            found = checkpoint.unpack_tensors(file, file.read_bytes())
        elif artefact.form == "gguf":
            found = gguf.parts(path)[1]
        else:
            found = onnx_weights(path)
    except (UserError, OSError) as error:
        raise UserError(f"check failed: {error}") from None
    wrong = [name for name in stored if name not in found or not equal(found[name], stored[name])]
    wrong += sorted(set(found) - set(stored))  # extra tensors
    if wrong:
        raise UserError(f"check failed: {wrong[0]} is not in the file as it should be")


def equal(found, stored):
    """Whether two tensors or two arrays are the same; a function stands for the array that it returns."""
    if callable(found):  # of a GGUF file, where all arrays at once would take up to eight times its size
        found = found()
    if found.dtype != stored.dtype:
        return False
    if isinstance(found, torch.Tensor):
        return torch.equal(found, stored)
    return np.array_equal(found, stored)


def onnx_weights(path):
    """{name: array} of the graph in a file or in a folder."""
    import onnx
    try:
        proto = onnx.load(onnx_file(path))
    except Exception as error:  # protobuf's own
        raise UserError(f"{path} is not an ONNX file ({short(error, 100)})") from None
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def compare_logprobs(consumer, artefact, prompts):
    """-> (the largest difference of log p after the prompts, the tolerance for a logit); UserError beyond that."""
    # log p, not logits: llama.cpp gives nothing else, and it is what sampling sees
    ours = artefact.twin(prompts)[0][:, -1].log_softmax(-1)  # (B, V)
    delta = (ours - consumer.logprobs(prompts)).abs().max().item()
    spread = ours.std(-1).mean().item()
    tolerance = EXACT * max(1, spread)
    if artefact.form == "gguf" and artefact.quant in LLAMA_CPP:
        tolerance = LLAMA_CPP[artefact.quant] * spread
    elif rounds_activations(artefact.twin, artefact.quant):
        tolerance = TIPPED * spread
    if not delta <= tolerance:  # also where it is NaN
        raise UserError(f"check failed: logits differ by up to {delta:.2g}, more than {tolerance:.2g}")
    return delta, tolerance


def compare_texts(consumer, twin, prompts, n_tokens, stop, tolerance):
    """-> how many greedy texts are the twin's, and how many part from it at a near tie."""
    same = tied = 0
    texts = zip(prompts.tolist(), greedy(twin, prompts, n_tokens).tolist(), consumer.greedy(prompts, n_tokens),
                strict=True)
    for prompt, ours, theirs in texts:
        ends = [i for i, token in enumerate(ours) if token in stop]
        n = ends[0] if ends else n_tokens  # where ours ends, theirs does
        ours = ours[:n]
        theirs = [*theirs, *[stop[0]] * n][:n]
        if ours == theirs:
            same += 1
        elif is_near_tie(twin, prompt, ours, theirs, tolerance):
            tied += 1
    return same, tied


def is_near_tie(model, prompt, ours, theirs, tolerance):
    """Whether two continuations part where the logits of their tokens are closer than twice the tolerance."""
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    logits = model(torch.tensor([[*prompt, *ours[:at]]]))[0][0, -1]
    return (logits[ours[at]] - logits[theirs[at]]).item() < 2 * tolerance


def compare_tokenizer(consumer, tokenizer, texts):
    """UserError unless awkward strings and `texts` have the same ids there, and the ids the same text."""
    known = set("".join(texts))
    for text in [*AWKWARD, *texts]:
        if tokenizer.kind == "char":  # it refuses characters that it does not know
            text = "".join(char for char in text if char in known)
        if not text or any(token in text for token in tokenizer.specials):
            continue  # elsewhere "<|endoftext|>" in a text is the token
        ours, theirs = tokenizer.encode(text), consumer.encode(text)
        if ours != theirs:
            raise UserError(f"check failed: {text[:40]!r} is {ours[:8]} here, {theirs[:8]} there")
        if consumer.decode(ours) != tokenizer.decode(ours):
            raise UserError(f"check failed: ids {ours[:8]} are {consumer.decode(ours)[:40]!r} there")


# ---- the programs
class MissingPackage(UserError):
    pass


def optional(package):
    try:
        return need(package, "the check")
    except UserError as error:
        raise MissingPackage(error) from None


class Transformers:
    """A folder as transformers opens it."""
    name = "transformers"
    has_tokenizer = True

    def __init__(self, path):
        transformers = optional("transformers")
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        # a folder that we wrote a moment ago: the code in it is the model file that runs here already
        own_code = "auto_map" in hf.read_json(Path(path) / "config.json")
        self.settings = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=own_code)
        self.model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=own_code, output_loading_info=True)
        # missing, unexpected or mismatched tensors, which transformers only warns about
        problems = [f"{key}: {', '.join(sorted(map(str, info[key])))}" for key in info if info[key]]
        if problems:
            raise ValueError("transformers finds " + "; ".join(problems)[:300])
        self.end = self.tokenizer.eos_token
        self.stop = self.model.generation_config.eos_token_id

    @torch.no_grad()
    def logprobs(self, prompts):
        """prompts (B, T) -> log p of the next token, (B, V)."""
        return self.model(prompts).logits[:, -1].log_softmax(-1)

    def greedy(self, prompts, n):
        """prompts (B, T) -> the n most likely next ids of each, as lists."""
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
    """A file as llama.cpp opens it, in float32 where there is a choice; an HTTP server inside this process."""
    name = "llama.cpp"
    has_tokenizer = True

    def __init__(self, path):
        xllamacpp = optional("xllamacpp")
        values = gguf.parts(path)[0]
        arch = values["general.architecture"]
        self.vocab_size = len(values["tokenizer.ggml.tokens"])
        p = xllamacpp.CommonParams()
        p.model.path = str(path)
        p.n_parallel = 1
        p.n_ctx = min(values[f"{arch}.context_length"], 1024)
        p.n_gpu_layers = 0
        p.fit_params = False  # it would change n_ctx to fit the memory
        p.warmup = False
        p.verbosity = -1
        # float32 keys and values, and attention that keeps them so
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = torch.get_num_threads()
        self.server = xllamacpp.Server(p)
        self.end = self.ask("/props")["eos_token"]
        self.stop = None  # one id, which `end` names

    def ask(self, route, **body):
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.server.listening_address + route, data)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def logprobs(self, prompts):
        """prompts (B, T) -> log p of the next token, (B, V)."""
        rows = torch.full((len(prompts), self.vocab_size), torch.nan)
        # the bias makes this token the one that is drawn: one that is half a character would come without
        # probabilities. Those that are returned are from before the bias
        plain_text = self.encode("a") or self.encode(" ")
        for row, prompt in zip(rows, prompts.tolist(), strict=True):
            answer = self.ask("/completion", prompt=prompt, n_predict=1, n_probs=self.vocab_size, temperature=1.0,
                              samplers=["temperature"], cache_prompt=False, logit_bias=[[plain_text[0], 1000]])
            for entry in answer["completion_probabilities"][0]["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
        return rows

    def greedy(self, prompts, n):
        """prompts (B, T) -> the n most likely next ids of each, as lists; shorter where a text ends."""
        texts = []
        for prompt in prompts.tolist():
            answer = self.ask("/completion", prompt=prompt, n_predict=n, samplers=["top_k"], top_k=1,
                              return_tokens=True, cache_prompt=False)
            texts.append(answer["tokens"])
        return texts

    def encode(self, text):
        return self.ask("/tokenize", content=text, parse_special=False)["tokens"]

    def decode(self, ids):
        return self.ask("/detokenize", tokens=ids)["content"]

    def close(self):
        del self.server


class OnnxRuntime:
    """A graph of onnx.py as onnxruntime runs it, alone or in its folder beside the tokenizer."""
    name = "onnxruntime"

    def __init__(self, path):
        path = Path(path)
        onnxruntime = optional("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(onnx_file(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library has a class for each fault
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: onnxruntime does not load it: {reason:.200}") from None
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.is_window = "attention_mask" not in self.inputs
        self.has_tokenizer = path.is_dir()
        if self.has_tokenizer:
            self.tokenizer = load_tokenizer(path)
            self.end = hf.read_json(path / "tokenizer_config.json")["eos_token"]
            self.stop = hf.read_json(path / "generation_config.json")["eos_token_id"]

    def empty_cache(self, batch_size):
        """Before the first token: no keys, no values, states of 0."""
        cache = {}
        for name, value in self.inputs.items():
            if name.startswith("past"):
                kind = np.int64 if value.type == "tensor(int64)" else np.float32
                cache[name] = np.zeros(empty_shape(value.shape, batch_size), kind)
        return cache

    def step(self, ids, cache, mask=None):
        """ids (B, T), cache of `empty_cache` or the last step, mask (B, P + T) or None -> (logits (B, T, V), cache)."""
        ids = np.asarray(ids, np.int64)
        if mask is None:  # no padding: all of the past, which keys show, and these
            past = next((array.shape[2] for name, array in cache.items() if name.endswith(".key")), 0)
            mask = np.ones((len(ids), past + ids.shape[1]), np.int64)
        # padding does not count: the first token of a padded row stands at 0
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1]:]
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feed = {name: value for name, value in feed.items() if name in self.inputs}
        names = [value.name for value in self.session.get_outputs()]
        logits, *states = self.session.run(names, feed | cache)
        cache = {}
        for name, state in zip(names[1:], states, strict=True):
            cache[name.replace("present_", "past_").replace("present.", "past_key_values.")] = state
        return logits, cache

    def last_logits(self, ids):
        """ids (B, T) -> (B, V), of the window form."""
        return self.session.run(None, {"input_ids": np.asarray(ids, np.int32)})[0]

    def logprobs(self, prompts):
        """prompts (B, T) -> log p of the next token, (B, V)."""
        if self.is_window:
            logits = self.last_logits(prompts)
        else:
            logits = self.step(prompts, self.empty_cache(len(prompts)))[0][:, -1]
        return torch.from_numpy(logits).log_softmax(-1)

    def greedy(self, prompts, n):
        """prompts (B, T) -> the n most likely next ids of each, as lists."""
        ids = new = prompts.numpy()
        cache = self.empty_cache(len(ids))
        for _ in range(n):
            if self.is_window:
                logits = self.last_logits(ids)
            else:
                logits, cache = self.step(new, cache)
                logits = logits[:, -1]
            new = logits.argmax(-1)[:, None]
            ids = np.concatenate((ids, new), 1)
        return ids[:, prompts.size(1):].tolist()

    def encode(self, text):
        return self.tokenizer.encode(text)

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def close(self):
        pass


class TracedOnnx(OnnxRuntime):
    """The step of traced.py: a text at a time, and a token at a time."""

    def read(self, ids, cache):
        """ids, a list, after what the cache holds -> (logits (V,) of the last, cache)."""
        for token in ids:
            logits, cache = self.step([[token]], cache)
        return logits[0], cache

    def logprobs(self, prompts):
        """prompts (B, T) -> log p of the next token, (B, V)."""
        rows = []
        for prompt in prompts.tolist():
            logits, _ = self.read(prompt, self.empty_cache(1))
            rows.append(torch.from_numpy(logits))
        return torch.stack(rows).log_softmax(-1)

    def greedy(self, prompts, n):
        """prompts (B, T) -> the n most likely next ids of each, as lists."""
        texts = []
        for prompt in prompts.tolist():
            logits, cache = self.read(prompt, self.empty_cache(1))
            text = [int(logits.argmax())]
            while len(text) < n:
                logits, cache = self.read(text[-1:], cache)
                text.append(int(logits.argmax()))
            texts.append(text)
        return texts


def empty_shape(sizes, batch_size):
    """The shape that an input of the cache has before the first token; `sizes` are numbers and names."""
    shape = []
    for size in sizes:
        if size == "batch_size":
            shape.append(batch_size)
        else:  # another name is a length of the past
            shape.append(0 if isinstance(size, str) else size)
    return shape


def onnx_file(path):
    """The graph at `path`: the file itself, or the one that a folder of web.py holds."""
    return str(max(path.glob("onnx/*.onnx")) if path.is_dir() else path)  # step.onnx, if there is forward.onnx too


CONSUMERS = {"hf": Transformers, "gguf": LlamaCpp, "onnx": OnnxRuntime, "traced": TracedOnnx}
