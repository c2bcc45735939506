"""Compare what was written with the model, in the program it is for: transformers, llama.cpp or onnxruntime.

    artefact = Artefact(path, "gguf", "q8_0", twin, stored)
    print(check(artefact, model, tokenizer, meta))
    run = OnnxRuntime("model.onnx")                                # or use a graph: a prompt, then token by token
    logits, cache = run.step([[1, 2, 3]], run.empty_cache(1))

A format's writer returns what this needs: the twin, a torch model whose weights are rounded as the artefact stores
them, and the tensors that the file must hold. What rounding costs is measured on text, not on random ids: of those a
model knows nothing, so its likeliest token there is decided by next to nothing.
"""
import importlib.util
import json
import math
import unicodedata
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from formats import gguf, hf
from formats.weights import is_ternary
from thimble import chat, checkpoint, data
from thimble.files import UserError, need, short, warn
from thimble.generate import greedy
from thimble.tokenizer import AWKWARD, load_tokenizer

# The largest difference of log p that passes, in units of the spread (standard deviation) of the logits.
# Float32 sums in another order differ by 1e-6 to 1e-5.
EXACT = 1e-4
# Where both sides round activations to 8 bits, a last bit tips a rounding now and then, which moves an activation by
# 1/127 of the largest. Of 50 prompts of tiny models most agree to 1e-5, the worst ever differed by 0.07.
TIPPED = 0.1
# Where only the program rounds activations, to 16 or 8 bits: the largest KL divergence of its predictions from the
# twin's, in nats a token. A single log p tells little there, for that of a token that hardly ever comes moves the most
# (by 1.7 in SmolLM2, harmlessly). Rounding costs tiny models .0001 to .002 and SmolLM2, with 30 layers, .003.
ROUNDED = 0.01
N_TEXT = 512  # tokens of text on which both are measured
N_FEW = 8  # greedy texts that a second program writes too
PROMPT = 8  # tokens of a prompt
TALK = ("Hello, world!", "Naïve café: 1 + 1 = 2", "Why?\n\n  Say more.")  # of a user, the model and the user
PASSAGE = Path(__file__).with_name("passage.txt")  # the first chapter of Ruth, World English Bible: public domain


class Artefact(NamedTuple):
    path: Path
    form: str  # "hf", "gguf", "onnx" or, of a fork, "traced"
    quant: str
    twin: torch.nn.Module  # gives the logits that it must give
    stored: dict  # {tensor name: tensor or array} that must be in it


@torch.no_grad()
def check(artefact, model, tokenizer, meta, n_prompts=50, n_tokens=64):
    """-> figures, none where the program is not installed; UserError if the artefact is not what it must be.

    Every tensor is compared with what was meant to be stored, predictions and greedy texts with the twin's, the
    tokenizer with ours. Two greedy texts may part at a near tie, where the twin's logits of the two tokens are closer
    than twice the largest difference of log p that such tokens show: then either may come out ahead.

    runtime: the program. delta: largest difference of log p to the twin's
    kl: mean divergence of its predictions from the model's, nats a token; kept: share of places where the likeliest
    token is still the model's; bits, bits_there: the text in bits per byte, for the model and there
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
    stop = list(tokenizer.record.ends)
    # short prompts that leave room for the texts, also in a context of a few tokens
    size = model.config.block_size
    length = max(1, min(PROMPT, size // 4))
    n_tokens = max(1, min(n_tokens, size - length - 1))
    prompts = random_prompts(tokenizer, n_prompts, length)
    rows = text_rows(tokenizer, meta, min(size - 1, N_TEXT))[:n_prompts]  # the token after the last must fit, too
    try:
        there = consumer.logprobs(rows)
        delta, tolerance = compare_logprobs(artefact, rows, there)
        same, tied = compare_texts(consumer, twin, prompts, n_tokens, stop, tolerance)
        if consumer.has_tokenizer:
            compare_tokenizer(consumer, tokenizer, [tokenizer.decode(prompt) for prompt in prompts.tolist()])
            compare_conversation(consumer, tokenizer)
        if artefact.form == "onnx" and GenAI.reads(artefact.path):
            compare_texts(GenAI(artefact.path), twin, prompts[:N_FEW], n_tokens, stop, tolerance)
    finally:
        consumer.close()
    ours = model(rows)[0].log_softmax(-1)
    n_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in rows.tolist())
    kept = (ours.argmax(-1) == there.nan_to_num(-math.inf).argmax(-1)).double().mean().item()
    return {"runtime": consumer.name, "delta": delta, "kl": divergence(ours, there), "kept": kept,
            "bits": bits_per_byte(ours, rows, n_bytes), "bits_there": bits_per_byte(there, rows, n_bytes),
            "same": same, "tied": tied, "prompts": n_prompts, "tokens": n_tokens}


# ---- what is compared
def text_rows(tokenizer, meta, length):
    """(rows, length) ids, N_TEXT at most: of the run's validation text if it is on this machine, else of a passage."""
    ids = validation_ids(tokenizer, meta)
    if len(ids) < length:
        text = PASSAGE.read_text(encoding="utf-8").replace("\n", " ")
        if tokenizer.kind == "char":  # it refuses characters that it does not know
            known = {tokenizer.decode([i]) for i in plain_ids(tokenizer)}
            text = "".join(char for char in text if char in known)
        ids = tokenizer.encode(text)
    if len(ids) < length:  # characters of which the passage has few or none
        return random_prompts(tokenizer, N_TEXT // length, length)
    n_rows = min(len(ids), N_TEXT) // length
    return torch.tensor(ids[:n_rows * length]).view(n_rows, length)


def validation_ids(tokenizer, meta):
    """The first ids of the validation split that the model was trained beside; [] if it is not on this machine."""
    name = meta.get("dataset", {}).get("path", "")
    if not name or not data.folder_of(name).is_dir():
        return []
    try:
        dataset = data.load(data.folder_of(name))
        theirs = dataset.tokenizer()
    except UserError:
        return []
    if theirs.to_json() != tokenizer.to_json():
        return []
    if not dataset.row_length or dataset.val_mask is None:
        return dataset.val[:N_TEXT].tolist()
    ids = []
    for start in range(0, len(dataset.val) - 1, dataset.row_length):
        answers = np.flatnonzero(dataset.val_mask[start:start + dataset.row_length])
        # behind the last answer there is only padding, which would count as text of no bytes
        ids += dataset.val[start:start + answers.max(initial=-1) + 1].tolist()
        if len(ids) >= N_TEXT:
            break
    return ids[:N_TEXT]


def plain_ids(tokenizer):
    """All ids but those of special tokens."""
    return sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.specials.values()))


def random_prompts(tokenizer, n, length):
    """(n, length) ids, none of them special."""
    # llama.cpp treats special ids in a prompt in its own ways
    known = torch.tensor(plain_ids(tokenizer))
    generator = torch.Generator().manual_seed(0)
    return known[torch.randint(len(known), (n, length), generator=generator)]


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
        # a tensor may claim another shape than its bytes fill, or a type that does not exist
        return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    except Exception as error:  # protobuf's own, and several kinds of to_array
        raise UserError(f"{path} is not a sound ONNX file ({short(error, 100)})") from None


def tolerance_of(artefact, spread):
    """The largest difference of log p, or None where the program rounds what the twin does not: see ROUNDED."""
    if artefact.form == "gguf" and artefact.quant != "f32" or artefact.quant in ("int8", "int4"):
        return None
    if any(is_ternary(module) for module in artefact.twin.modules()):
        return TIPPED * spread
    return EXACT * max(1, spread)


def compare_logprobs(artefact, rows, there):
    """-> (the largest difference of log p, the tolerance for a logit); UserError if the program is not the twin.

    rows (R, T), there (R, T, V): log p as the program gave it, NaN where it named no figure.
    """
    logits = artefact.twin(rows)[0]
    ours = logits.log_softmax(-1)
    if there.isnan().all(-1).any():
        raise UserError("check failed: logits differ: some are not numbers there")
    delta = (ours - there).abs().nan_to_num(0).max().item()  # of the tokens that have a figure
    kl = divergence(ours, there)
    if not kl <= ROUNDED:  # also where ours are not numbers
        raise UserError(f"check failed: logits differ by {kl:.2g} nats a token, more than {ROUNDED}; if the program "
                        "rounds activations, and some of this model's are far larger than the rest, use more bits")
    tolerance = tolerance_of(artefact, logits.std(-1).mean().item())
    if tolerance is None:
        # of the tokens that may come out ahead: at least a tenth as likely as the likeliest
        near = ours > ours.amax(-1, keepdim=True) - math.log(10)
        return delta, (ours - there)[near].abs().nan_to_num(0).max().item()
    if delta > tolerance:
        raise UserError(f"check failed: logits differ by up to {delta:.2g}, more than {tolerance:.2g}")
    return delta, tolerance


def divergence(ours, there):
    """Mean KL divergence of `there` from `ours`, both (R, T, V) log p, in nats a token.

    The tokens for which `there` is NaN count together as one, which can only lower it.
    """
    nats = 0.0
    for p, q in zip(ours, there, strict=True):  # row by row: float64 takes room
        known = ~q.isnan()
        p = p.double()
        q = q.double().nan_to_num(0)
        nats += torch.where(known, p.exp() * (p - q), 0).sum().item()
        rest = 1 - torch.where(known, p.exp(), 0).sum(-1)
        rest_there = 1 - torch.where(known, q.exp(), 0).sum(-1)
        rest, rest_there = rest.clamp(min=1e-9), rest_there.clamp(min=1e-9)
        nats += (rest * (rest / rest_there).log()).sum().item()
    return nats / ours[..., 0].numel()


def bits_per_byte(logprobs, rows, n_bytes):
    """logprobs (R, T, V) after each of the tokens rows (R, T) -> bits per byte of all tokens but each row's first."""
    nats = -logprobs[:, :-1].gather(2, rows[:, 1:, None])
    return nats.double().sum().item() / n_bytes / math.log(2)


def compare_texts(consumer, twin, prompts, n_tokens, stop, tolerance):
    """-> how many greedy texts are the twin's, and how many part from it at a near tie; UserError if any other does."""
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
    wrong = len(prompts) - same - tied
    if wrong:
        raise UserError(f"check failed: {wrong} of {len(prompts)} greedy texts of {consumer.name} differ")
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
        if type(tokenizer.hf.normalizer).__name__ == "NFC":  # which llama.cpp leaves out
            text = unicodedata.normalize("NFC", text)
        if not text or any(token in text for token in tokenizer.specials):
            continue  # elsewhere "<|endoftext|>" in a text is the token
        ours, theirs = tokenizer.encode(text), consumer.encode(text)
        if ours != theirs:
            raise UserError(f"check failed: {text[:40]!r} is {ours[:8]} here, {theirs[:8]} there")
        if consumer.decode(ours) != tokenizer.decode(ours):
            raise UserError(f"check failed: ids {ours[:8]} are {consumer.decode(ours)[:40]!r} there")


def compare_conversation(consumer, tokenizer):
    """UserError unless texts begin and end there as here, and a conversation has the same ids."""
    stop = list(tokenizer.record.ends)
    # the name of the token, which a chat loop compares, and all ids
    if consumer.end != tokenizer.token(stop[0]) or consumer.ends(stop) != stop:
        raise UserError(f"check failed: texts end with {consumer.end!r} there, ids {consumer.ends(stop)}")
    said = TALK
    if tokenizer.kind == "char":
        said = ["".join(char for char in text if tokenizer.hf.token_to_id(char) is not None) for text in TALK]
    ours = tokenizer.encode_prompt(said[0])
    theirs = consumer.encode_prompt(said[0])
    if ours != theirs:
        raise UserError(f"check failed: a text begins with the ids {ours[:4]} here, {theirs[:4]} there")
    if not tokenizer.record.template:
        return
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]
    try:
        ours = chat.prompt(tokenizer, messages, chat.OWN)
    except UserError as error:  # of a foreign model: it leaves as it came
        warn(f"{str(error).rpartition(':')[0]}: no conversation was compared")
        return
    theirs = consumer.conversation(messages)
    if theirs == [tokenizer.record.bos, *ours]:
        warn(f"{consumer.name} puts bos in front of a conversation, which the model's template does not")
    elif ours != theirs:
        raise UserError(f"check failed: a conversation is {tokenizer.decode(ours, skip_special=False)!r:.80} here, "
                        f"{tokenizer.decode(theirs, skip_special=False)!r:.80} there")


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

    @torch.no_grad()
    def logprobs(self, rows):
        """rows (R, T) -> log p of the token after each, (R, T, V)."""
        return self.model(rows).logits.log_softmax(-1)

    def greedy(self, prompts, n):
        """prompts (B, T) -> the n most likely next ids of each, as lists."""
        mask = torch.ones_like(prompts)
        out = self.model.generate(prompts, attention_mask=mask, generation_config=self.settings, max_new_tokens=n)
        return out[:, prompts.size(1):].tolist()

    def ends(self, _):
        return self.model.generation_config.eos_token_id

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def encode_prompt(self, text):
        return self.tokenizer(text).input_ids

    def conversation(self, messages):
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def close(self):
        pass


class LlamaCpp:
    """A file as llama.cpp opens it, in float32 where there is a choice; an HTTP server inside this process."""
    name = "llama.cpp"
    has_tokenizer = True
    LISTED = 1000  # tokens of which it is asked for log p; all of a large vocabulary would be megabytes for each token

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

    def ask(self, route, **body):
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.server.listening_address + route, data)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:  # such as a chat template that it cannot read
            reason = short(error.read().decode(errors="replace"), 200)
            raise UserError(f"check failed: {self.name} refuses {route}: {reason}") from None

    def logprobs(self, rows):
        """rows (R, T) -> log p of the token after each, (R, T, V): of the likeliest LISTED and of the row's next.

        NaN for all others.
        """
        found = torch.full((*rows.shape, self.vocab_size), torch.nan)
        plain_text = self.encode("a") or self.encode(" ")
        for row, out in zip(rows.tolist(), found, strict=True):
            for i in range(len(row)):
                # A bias makes the row's next token the one that is drawn, whose log p is always returned. One that is
                # half a character would come without; then it is another. What is returned is from before the bias
                for drawn in [*row[i + 1:i + 2], *plain_text[:1]]:
                    answer = self.ask("/completion", prompt=row[:i + 1], n_predict=1, temperature=1.0,
                                      n_probs=min(self.vocab_size, self.LISTED), samplers=["temperature"],
                                      logit_bias=[[drawn, 1000]])
                    if answer.get("completion_probabilities"):
                        break
                token = answer["completion_probabilities"][0]
                for entry in [token, *token["top_logprobs"]]:
                    out[i, entry["id"]] = entry["logprob"]
        return found

    def greedy(self, prompts, n):
        """prompts (B, T) -> the n most likely next ids of each, as lists; shorter where a text ends."""
        texts = []
        for prompt in prompts.tolist():
            answer = self.ask("/completion", prompt=prompt, n_predict=n, samplers=["top_k"], top_k=1,
                              return_tokens=True, cache_prompt=False)
            texts.append(answer["tokens"])
        return texts

    def ends(self, ids):
        """Those of `ids` at which it stops; it does not list them."""
        found = []
        for i in ids:
            answer = self.ask("/completion", prompt=[i], n_predict=2, samplers=["top_k"], top_k=1, cache_prompt=False,
                              logit_bias=[[i, 1000]])
            if answer["stop_type"] == "eos":
                found.append(i)
        return found

    def encode(self, text):
        return self.ask("/tokenize", content=text, parse_special=False)["tokens"]

    def encode_prompt(self, text):
        return self.ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]

    def conversation(self, messages):
        # it takes bos away from the text, and puts it back
        text = self.ask("/apply-template", messages=messages)["prompt"]
        return self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

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

    def logprobs(self, rows):
        """rows (R, T) -> log p of the token after each, (R, T, V)."""
        if self.is_window:
            logits = np.stack([self.last_logits(rows[:, :n + 1]) for n in range(rows.size(1))], 1)
        else:
            logits = self.step(rows, self.empty_cache(len(rows)))[0]
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

    # It has no tokenizer of its own: what the files say is read back.
    def ends(self, _):
        return list(self.tokenizer.record.ends)

    def encode(self, text):
        return self.tokenizer.encode(text)

    def encode_prompt(self, text):
        return self.tokenizer.encode_prompt(text)

    def conversation(self, messages):
        return chat.prompt(self.tokenizer, messages, chat.OWN)

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def close(self):
        pass


class GenAI:
    """The folder of a graph as onnxruntime-genai opens it: texts alone, no log p."""
    name = "onnxruntime-genai"

    @staticmethod
    def reads(path):
        """Whether it is installed, and the folder is for it."""
        installed = importlib.util.find_spec("onnxruntime_genai") is not None
        return installed and (Path(path) / "genai_config.json").is_file()

    def __init__(self, path):
        self.genai = importlib.import_module("onnxruntime_genai")
        try:
            self.model = self.genai.Model(str(path))
        except Exception as error:  # the library has a class for each fault
            raise UserError(f"check failed: {self.name} does not load it ({short(error, 200)})") from None

    def greedy(self, prompts, n):
        """prompts (B, T) -> the n most likely next ids of each, as lists; shorter where a text ends."""
        texts = []
        for prompt in prompts.tolist():
            settings = self.genai.GeneratorParams(self.model)
            settings.set_search_options(max_length=len(prompt) + n)
            generator = self.genai.Generator(self.model, settings)
            generator.append_tokens([prompt])
            while not generator.is_done():
                generator.generate_next_token()
            texts.append(list(generator.get_sequence(0))[len(prompt):])
        return texts


class TracedOnnx(OnnxRuntime):
    """The step of traced.py: a text at a time, and a token at a time."""

    def read(self, ids, cache):
        """ids, a list, after what the cache holds -> (logits (V,) of the last, cache)."""
        for token in ids:
            logits, cache = self.step([[token]], cache)
        return logits[0], cache

    def logprobs(self, rows):
        """rows (R, T) -> log p of the token after each, (R, T, V)."""
        found = []
        for row in rows.tolist():
            cache = self.empty_cache(1)
            for token in row:
                logits, cache = self.step([[token]], cache)
                found.append(torch.from_numpy(logits))
        return torch.cat(found).view(*rows.shape, -1).log_softmax(-1)

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
