"""An OpenAI-compatible server for anything that sample.py reads, and a page to try it on.

    python serve.py                                                # the newest run, on http://127.0.0.1:8000
    python serve.py --checkpoint=runs/sft_tiny --port=9000
    THIMBLE_API_KEY=secret python serve.py --host=0.0.0.0          # beyond this machine only with a key
    curl 127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "To be", "max_tokens": 20}'

One process. A thread owns the model and moves all running requests one token on at a time, each in a row of one cache;
they join and leave between two tokens. The event loop does the rest. It needs a few more packages than training does:
pip install -r requirements-serve.txt.
"""
import asyncio
import base64
import collections
import contextlib
import functools
import hashlib
import hmac
import ipaddress
import itertools
import json
import math
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from thimble import chat, configurator
from thimble.files import UserError
from thimble.generate import StopTexts, filter_logits
from thimble.load import load
from thimble.tokenizer import ByteStream

try:
    import h11
    import uvicorn
    from pydantic import BaseModel, Field, ValidationError
    from pydantic_core import from_json
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as e:
    raise SystemExit(f"error: serve.py needs more packages ({e}): pip install -r requirements-serve.txt") from None

CHUNK = 256                                                # tokens of a prompt between two tokens of the others
PAGE = Path(__file__).resolve().parent / "web" / "serve.html"


@dataclass(frozen=True)
class Config:
    # what
    checkpoint: str = ""            # run, checkpoint or Hugging Face folder, GGUF file; empty: the newest run
    which: Literal["best", "latest"] = "best"  # checkpoint of the run
    name: str = ""                  # of the model in the API; empty: the folder's
    template: Literal[("auto", *chat.TEMPLATES)] = "auto"  # of a conversation; auto: as the model was taught
    device: str = "cpu"             # cpu, cuda, mps, ...
    # where
    host: str = "127.0.0.1"         # address to listen on; others than this machine's own need an API key
    port: int = 8000                # 0: any free one
    api_key: str = ""               # wanted in "Authorization: Bearer ..."; empty: environment variable THIMBLE_API_KEY
    # limits
    max_batch: int = 16             # texts written at the same time
    max_queue: int = 64             # texts that wait; beyond them: 429
    max_tokens: int = 0             # longest answer; 0: what the context holds
    max_body: int = 1_000_000       # bytes of a request
    client_seconds: float = 10.0    # for a client to send its headers, as long for the body, and to read what is sent
    request_seconds: float = 120.0  # for an answer, waiting included
    drain_seconds: float = 8.0      # on SIGTERM: for running answers to finish
    log: bool = True                # a line for each request, without its text

    def __post_init__(self):
        for name in ("max_batch", "max_queue", "max_body", "client_seconds", "request_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.port < 65536 or self.max_tokens < 0 or self.drain_seconds < 0:
            raise ValueError(f"port={self.port} must be in [0, 65535], max_tokens={self.max_tokens} and "
                             f"drain_seconds={self.drain_seconds} not negative")


def reply(body, status=200, headers=None):
    return Response(json.dumps(body), status, headers, "application/json")   # ASCII only


def event(body):
    return f"data: {json.dumps(body)}\n\n".encode()


def shared(a, b):
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def view(part, a, b):
    """Rows a to b of a cache."""
    if isinstance(part, torch.Tensor):
        return part[a:b] if part.dim() else part
    return {k: view(v, a, b) for k, v in part.items()} if isinstance(part, dict) else [view(v, a, b) for v in part]


def leaves(part):
    """The tensors of a cache, but for its position."""
    if isinstance(part, torch.Tensor):
        return [part]
    parts = [v for k, v in part.items() if k != "pos"] if isinstance(part, dict) else part
    return [leaf for v in parts for leaf in leaves(v)]


def is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_page():
    """The page, and a policy under which nothing but its own script and style works."""
    page = PAGE.read_text(encoding="utf-8")
    kinds = []
    for tag in ("script", "style"):
        inline = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        kinds.append(f"{tag}-src 'sha256-{digest}'")
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return page, f"default-src 'none'; {'; '.join(kinds)}; {rest}"


async def disconnected(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


class ApiError(Exception):
    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(message)
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error"}
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message[:300], "type": kind.get(status, "invalid_request_error"),
                               "param": param, "code": code}}

    def response(self):
        return reply(self.body, self.status, self.headers)


async def respond(request, e):
    """The response for an exception."""
    if isinstance(e, HTTPException):
        e = ApiError(e.status_code, e.detail, headers=e.headers)
    elif isinstance(e, UserError):
        e = ApiError(400, str(e))
    return (e if isinstance(e, ApiError) else ApiError(500, "the server failed; its log says why")).response()


# ---- what may be asked, for the check and for /openapi.json alike; null is as if a field were not there

class Strict(BaseModel, extra="forbid", strict=True, allow_inf_nan=False):
    pass


class Body(Strict):
    model: str = Field("", max_length=1000)


class StreamOptions(Strict):
    include_usage: bool | None = False


Id = Annotated[int, Field(ge=0, lt=2**31)]
Some = Field(min_length=1, fail_fast=True)                 # else a body of 1 MB can have a million errors
Ids = Annotated[list[Id], Some]
Stop = Annotated[str, Field(max_length=256)]


class Generation(Body):
    n: int = Field(1, ge=1, le=16)
    max_tokens: Id | None = None
    temperature: float = Field(1, ge=0, le=2)
    top_p: float = Field(1, ge=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)
    min_p: float = Field(0, ge=0, le=1)
    repetition_penalty: float = Field(1, ge=0.01, le=100)
    presence_penalty: float = Field(0, ge=-2, le=2)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = Field(
        {}, max_length=1000, fail_fast=True)
    seed: int | None = Field(None, ge=-2**63, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = Field("", max_length=1000)

    @functools.cached_property
    def sampling(self):
        return {"temperature": self.temperature, "top_k": max(0, self.top_k), "top_p": max(1e-9, self.top_p),
                "min_p": self.min_p, "repetition_penalty": self.repetition_penalty}

    @functools.cached_property
    def bias(self):
        return {int(token): bias for token, bias in self.logit_bias.items()}

    @property
    def greedy(self):                                      # and nothing that changes logits
        return not (self.temperature or self.bias or self.presence_penalty or self.frequency_penalty
                    or self.repetition_penalty != 1)


class Completion(Generation):
    prompt: str | Ids | Annotated[list[str], Some] | Annotated[list[Ids], Some]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Some]
    name: str | None = None


class ChatCompletion(Generation):
    messages: list[Message] = Field(min_length=1, max_length=1000, fail_fast=True)
    max_completion_tokens: Id | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


class Tokenize(Body):
    prompt: str
    add_special_tokens: bool = True


class Detokenize(Body):
    tokens: list[Id] = Field(fail_fast=True)


BODIES = {"/v1/completions": Completion, "/v1/chat/completions": ChatCompletion, "/tokenize": Tokenize,
          "/detokenize": Detokenize}


def parse(body, kind):
    """bytes -> a BODIES; ApiError 400 unless it is one."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as e:
        raise ApiError(400, f"the body is not JSON: {e}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    if unknown := [key[:50] for key in value if key not in kind.model_fields]:
        raise ApiError(400, f"unknown: {', '.join(unknown[:5])}", unknown[0], "unknown_field")
    try:
        return kind.model_validate({key: part for key, part in value.items() if part is not None})
    except ValidationError as e:
        errors = e.errors(include_url=False, include_input=False, include_context=False)
        where = str(errors[0]["loc"][0])[:100]
        why = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in errors)
        raise ApiError(400, why, where) from None


# ---- the model's side, all in a thread of its own

class Sequence:
    """One text to be written: a prompt, how to go on, at most `room` tokens, and the queue for what comes of it."""

    def __init__(self, asked, prompt, echo, room, top, seed, stream, queue, index):
        self.asked, self.prompt, self.echo, self.room, self.top = asked, prompt, echo, room, top
        self.stream, self.queue, self.index = stream, queue, index
        self.held = StopTexts([asked.stop] if isinstance(asked.stop, str) else asked.stop)
        self.generator = torch.Generator().manual_seed(seed)
        self.out, self.length, self.cancelled, self.born = [], 0, False, time.monotonic()


class Row:
    """A row of the cache: the ids that it holds, who uses it, and when it was last used."""

    def __init__(self):
        self.ids, self.sequence, self.used = [], None, 0


class Engine:
    """Owns the model, in a thread. Of the rows of its cache the first n are running, the next may be filling with a
    prompt, the others are free and remember what they held: a conversation goes on from there.
    """

    def __init__(self, model, tokenizer, stop_ids, max_batch):
        self.model, self.tokenizer, self.stop_ids, self.max_batch = model, tokenizer, stop_ids, max_batch
        self.size, self.device = model.config.block_size, next(model.parameters()).device
        self.waiting, self.more, self.counts = collections.deque(), threading.Condition(), collections.Counter()
        self.stop_at, self.events, self.entering = math.inf, [], None
        try:
            self.reset()
            with torch.no_grad():
                self.step([[0]] * max_batch, [0] * max_batch, 0)
        except Exception as e:                             # no memory for it, or a model file that steps no such rows
            raise UserError(f"--max_batch={max_batch} rows of {self.size:,} tokens do not work: "
                            f"{str(e).partition(chr(10))[0]}; --max_batch=1 asks the least") from None

    def reset(self):
        self.cache = None                                  # before there is another: it may fill half the memory
        self.cache = self.model.init_cache(self.max_batch, self.size)
        # all keys and values, (B, K, S, D), can be cut at any token; a state or a window can only be continued
        self.cuttable = all(set(layer) == {"k", "v"} and layer["k"].shape[2:3] == (self.size,)
                            for layer in self.cache.get("layers", [{}]))
        self.rows, self.n, self.filling = [Row() for _ in range(self.max_batch)], 0, None

    # called by the event loop

    def submit(self, sequences, limit):
        """Queue them all, or none: False if more than `limit` would wait."""
        with self.more:
            free = self.max_batch - self.n - (self.filling is not None)
            if len(self.waiting) + len(sequences) > limit + free:
                return False
            self.waiting.extend(sequences)
            self.more.notify()
        return True

    def cancel(self, sequences):
        """Their client has left or has its answer: who waits no longer does, who runs leaves before the next token."""
        with self.more:
            for sequence in sequences:
                sequence.cancelled = True
            self.waiting = collections.deque(s for s in self.waiting if not s.cancelled)

    def run(self, loop):
        threading.Thread(target=self._run, args=(loop,), daemon=True, name="engine").start()

    # in the thread

    @torch.no_grad()
    def _run(self, loop):
        while True:
            with self.more:
                self.more.wait_for(lambda: self.waiting or self.n or self.filling)
            try:
                self.turn()
            except Exception:                              # of the model; whoever is in the cache has to begin anew
                traceback.print_exc()
                self.counts["failures"] += 1
                running = {self.entering, *(row.sequence for row in self.rows)} - {None}
                self.events += [(s, "", [], "error") for s in running]
                self.reset()
            events, self.events, self.entering = self.events, [], None
            if events:
                with contextlib.suppress(RuntimeError):    # the loop is closed: nobody is left to be told
                    loop.call_soon_threadsafe(self.deliver, events)

    def deliver(self, events):
        for sequence, *rest in events:
            sequence.queue.put_nowait((sequence.index, *rest))

    def turn(self):
        """Let go who has left, take in who waits, some of a prompt, one token for all who run."""
        if time.monotonic() > self.stop_at:
            with self.more:
                leaving, self.waiting = list(self.waiting), collections.deque()
            for sequence in leaving + [row.sequence for row in self.rows if row.sequence]:
                self.events.append((sequence, sequence.held("", last=True), [], "length"))
                sequence.cancelled = True
        for i in reversed(range(self.n)):
            if self.rows[i].sequence.cancelled:
                self.leave(i)
        if self.filling and self.filling.sequence.cancelled:
            self.filling.sequence = self.filling = None
        budget = CHUNK
        while budget > 0:
            if self.filling:
                budget -= self.fill(budget)
            elif sequence := self.next():
                budget -= self.admit(sequence)
            else:
                break
        if self.n:
            self.decode()

    def next(self):
        with self.more:
            self.entering = self.waiting.popleft() if self.waiting and self.n < self.max_batch else None
        return self.entering

    def admit(self, sequence):
        """Give it a row -> how many tokens went through the model for that."""
        if sequence.echo is not None and self.prompt_logprobs(sequence):
            return len(sequence.prompt)
        known = [shared(row.ids, sequence.prompt[:-1]) for row in self.rows]
        if not self.cuttable:
            known = [k if k == len(row.ids) and i >= self.n else 0
                     for i, (k, row) in enumerate(zip(known, self.rows, strict=True))]
        best = to = max(range(self.max_batch), key=known.__getitem__)
        n = known[best]
        # The row that knows most of the prompt, unless it is running or much else in it would be lost: then a copy of
        # it in the row that was used longest ago.
        if not n or best < self.n or 2 * n < len(self.rows[best].ids):
            to = min(range(self.n, self.max_batch), key=lambda i: self.rows[i].used)
            for part in leaves(self.cache):
                if not self.cuttable:                      # and n is 0
                    part[to].zero_()
                elif to != best:
                    part[to, :, :n] = part[best, :, :n]
        row = self.filling = self.rows[to]
        row.ids, row.sequence = sequence.prompt[:n], sequence
        self.counts["prompt_tokens_reused"] += n
        self.swap(to, self.n)
        return 0

    def fill(self, budget):
        """Take in more of the prompt -> how many tokens. Its end gives the first token."""
        row, start = self.filling, len(self.filling.ids)
        new = row.sequence.prompt[start:start + budget]
        logits = self.step([new], [start], self.n)
        row.ids = row.ids + new
        if len(row.ids) == len(row.sequence.prompt):
            self.filling = None
            self.n += 1
            self.begun(row.sequence)
            if self.sample(logits, [row.sequence]):
                self.leave(self.n - 1)
        return len(new)

    def begun(self, sequence):
        self.counts["prompt_tokens"] += len(sequence.prompt)
        self.counts["firsts"] += 1
        self.counts["first_seconds"] += time.monotonic() - sequence.born

    def decode(self):
        rows = self.rows[:self.n]
        logits = self.step([[row.sequence.out[-1]] for row in rows], [len(row.ids) for row in rows], 0)
        for row in rows:
            row.ids.append(row.sequence.out[-1])
        self.counts["steps"] += 1
        for i in reversed(self.sample(logits, [row.sequence for row in rows])):
            self.leave(i)

    def step(self, idx, pos, at):
        """Model.step of the rows at, at + 1, ...: as many ids for each, and how many each has seen -> logits."""
        rows = view(self.cache, at, at + len(idx))
        rows["pos"] = torch.tensor(pos[0]) if len(pos) == 1 else torch.tensor(pos, device=self.device)
        logits, new = self.model.step(torch.tensor(idx, device=self.device), rows)
        for old, part in zip(leaves(rows), leaves(new), strict=True):
            if part is not old:                            # a model file may return other tensors than it was given
                old.copy_(part)
        return logits

    def swap(self, i, j):
        if i == j:
            return
        n = max(len(self.rows[i].ids), len(self.rows[j].ids))
        for part in leaves(self.cache):
            part = part[:, :, :n] if self.cuttable else part
            part[[i, j]] = part[[j, i]]
        self.rows[i], self.rows[j] = self.rows[j], self.rows[i]

    def leave(self, i):
        row = self.rows[i]
        row.sequence, row.used = None, time.monotonic()
        self.n -= 1
        self.swap(i, self.n)
        if self.filling:
            self.swap(self.n, self.n + 1)

    def sample(self, logits, sequences):
        """Draw a token for each, logits (sequences, V) -> the indices of those that have finished."""
        vocab_size, ended = self.tokenizer.vocab_size, []
        greedy = logits[:, :vocab_size].argmax(-1).tolist()
        logp = logits.log_softmax(-1) if any(s.top is not None for s in sequences) else logits
        for i, sequence in enumerate(sequences):
            token = greedy[i] if sequence.asked.greedy else self.draw(sequence, logits[i, :vocab_size].cpu())
            if self.take(sequence, token, logp[i]):
                ended.append(i)
        return ended

    def draw(self, sequence, logits):
        asked, logits = sequence.asked, logits.clone()
        if asked.bias:
            logits[list(asked.bias)] += torch.tensor(list(asked.bias.values()))
        if sequence.out and (asked.presence_penalty or asked.frequency_penalty):
            tokens, times = torch.tensor(sequence.out).unique(return_counts=True)
            logits[tokens] -= asked.presence_penalty + asked.frequency_penalty * times
        logits = filter_logits(logits, sequence.prompt + sequence.out, **asked.sampling)
        return torch.multinomial(logits.softmax(-1), 1, generator=sequence.generator).item()

    def take(self, sequence, token, logp):
        """Write down a token -> whether it was the last."""
        sequence.out.append(token)
        self.counts["generated_tokens"] += 1
        finish = "stop" if token in self.stop_ids else None
        new = "" if finish else sequence.stream.step(token)
        entries = [] if sequence.top is None else [self.entry(sequence, token, new, logp)]
        shown = sequence.held(new)
        if sequence.held.done:
            finish = "stop"
        elif finish or len(sequence.out) >= sequence.room:
            finish = finish or "length"
            shown += sequence.held(sequence.stream.flush(), last=True)
        self.events.append((sequence, shown, entries, finish))
        return bool(finish)

    def entry(self, sequence, token, new, logp):
        """What the API says of a token, of which the text `new` came: (id, offset in the text, log p, [(id, log p)] of
        the likeliest). The offset is that of its own characters: what came may begin with one that never got whole.
        """
        sequence.length += len(new)
        own = len(self.tokenizer.decode([token], skip_special=False)) if new else 0
        offset = sequence.length - min(own, len(new))
        if logp is None:                                   # the first of a prompt: nothing comes before it
            return token, offset, None, None
        top = logp[:self.tokenizer.vocab_size].topk(min(sequence.top, self.tokenizer.vocab_size))
        return (token, offset, logp[token].item(),
                list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))

    def prompt_logprobs(self, sequence):
        """Report the prompt's tokens, by one pass without a cache -> whether no more was asked than one token."""
        entries, stream, prompt = [], self.tokenizer.stream(skip_special=False), sequence.prompt
        if sequence.top is not None:
            logits = self.model(torch.tensor([prompt], device=self.device))[0][0]            # (T, V), large
            entries = [self.entry(sequence, token, stream.step(token), logits[i - 1].log_softmax(-1) if i else None)
                       for i, token in enumerate(prompt)]
        sequence.length, done = len(sequence.echo), not sequence.room
        self.events.append((sequence, sequence.echo, entries, "length" if done else None))
        if sequence.top is not None and sequence.room == 1:  # as lm-eval asks
            done = self.sample(logits[-1:], [sequence])
        if done:
            self.begun(sequence)
        return bool(done)


# ---- the network's side

class Server:
    def __init__(self, cfg, loaded):
        self.cfg, self.tokenizer, self.created = cfg, loaded.tokenizer, int(time.time())
        tokenizer = loaded.tokenizer
        self.name, self.template = cfg.name or loaded.name, loaded.template
        self.engine = Engine(loaded.model, tokenizer, loaded.answer_ids, cfg.max_batch)
        self.key = (cfg.api_key or os.environ.get("THIMBLE_API_KEY", "")).encode()
        self.by_bytes = isinstance(tokenizer.stream(), ByteStream)
        self.requests = collections.Counter()
        self.page, self.policy = read_page()
        self.local = is_loopback(cfg.host.strip("[]"))
        if not self.key and not self.local:
            raise UserError(f"--host={cfg.host} is open to other machines: set an API key (THIMBLE_API_KEY)")
        gets = {"/": self.index, "/health": self.health, "/v1/models": self.models, "/metrics": self.metrics,
                "/tokenizer_info": self.tokenizer_info, "/openapi.json": self.openapi}
        posts = {"/v1/completions": self.completions, "/v1/chat/completions": self.chat_completions,
                 "/tokenize": self.tokenize, "/detokenize": self.detokenize}
        self.paths = {*gets, *posts}
        self.app = Starlette(
            routes=[Route(path, endpoint) for path, endpoint in gets.items()] +
                   [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()],
            middleware=[Middleware(Guard, self)],
            exception_handlers=dict.fromkeys((HTTPException, ApiError, UserError, Exception), respond))

    async def index(self, request):
        return Response(self.page, media_type="text/html", headers={
            "Content-Security-Policy": self.policy, "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer"})

    async def health(self, request):
        return reply({"status": "ok"})

    async def models(self, request):
        return reply({"object": "list", "data": [
            {"id": self.name, "object": "model", "created": self.created, "owned_by": "thimble",
             "max_model_len": self.engine.size}]})

    async def metrics(self, request):
        e, lines = self.engine, []
        for name, value in (("requests_running", e.n), ("requests_waiting", len(e.waiting))):
            lines += [f"# TYPE thimble_{name} gauge", f"thimble_{name} {value}"]
        for name in ("prompt_tokens", "prompt_tokens_reused", "generated_tokens", "steps", "failures"):
            lines += [f"# TYPE thimble_{name}_total counter", f"thimble_{name}_total {e.counts[name]}"]
        lines += ["# TYPE thimble_first_token_seconds summary",
                  f"thimble_first_token_seconds_count {e.counts['firsts']}",
                  f"thimble_first_token_seconds_sum {e.counts['first_seconds']:.6f}",
                  "# TYPE thimble_requests_total counter"]
        lines += [f'thimble_requests_total{{path="{path}",status="{status}"}} {count}'
                  for (path, status), count in sorted(self.requests.items())]
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def tokenizer_info(self, request):
        return reply({"name": self.tokenizer.name, "kind": self.tokenizer.kind, "vocab_size": self.tokenizer.vocab_size,
                      "eos_token": self.token(self.tokenizer.eot), "eos_token_id": self.tokenizer.eot,
                      "template": self.template})

    async def tokenize(self, request):
        text, eot = (await self.read(request)).prompt, self.tokenizer.eot
        ids = [eot] if text == self.token(eot) else await self.encode(text)                  # alone: so lm-eval asks
        return reply({"count": len(ids), "max_model_len": self.engine.size, "tokens": ids})

    async def detokenize(self, request):
        tokens = (await self.read(request)).tokens
        self.known(tokens, "tokens")
        return reply({"prompt": self.tokenizer.decode(tokens, skip_special=False)})

    async def openapi(self, request):
        parts = {"Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}}
        error = {"description": "an error",
                 "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
        responses = {"200": {"description": "ok"}, **{str(status): error for status in (
            400, 401, 403, 404, 408, 413, 415, 429, 500)}}
        paths = {path: {"get": {"responses": responses}} for path in self.paths - set(BODIES)}
        for path, body in BODIES.items():
            schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
            parts |= schema.pop("$defs", {})
            for name in schema["properties"].keys() - set(schema.get("required", ())):
                schema["properties"][name] = {"anyOf": [schema["properties"][name], {"type": "null"}]}
            content = {"application/json": {"schema": schema}}
            paths[path] = {"post": {"requestBody": {"required": True, "content": content}, "responses": responses}}
        keyed = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if self.key else {}
        return reply({"openapi": "3.1.0", "info": {"title": "Thimble", "version": "1"}, "paths": paths,
                      "components": {"schemas": parts, **keyed}, "security": [{"key": []}] if self.key else []})

    async def read(self, request):
        """The checked body of a request."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "Content-Type must be application/json")
        body = bytearray()
        try:
            async with asyncio.timeout(self.cfg.client_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > self.cfg.max_body:
                        raise ApiError(413, f"the body has more than {self.cfg.max_body:,} bytes",
                                       headers={"Connection": "close"})
        except ClientDisconnect:                           # nobody is left to read this
            raise ApiError(400, "the client left") from None
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {self.cfg.client_seconds:g} s",
                           headers={"Connection": "close"}) from None
        asked = parse(bytes(body), BODIES[request.url.path])
        if asked.model not in ("", self.name):
            raise ApiError(404, f"the model {asked.model[:100]!r} does not exist, this is {self.name!r}", "model",
                           "model_not_found")
        return asked

    async def encode(self, text):
        if len(text) > 10_000:                             # so long that others would wait
            return await asyncio.to_thread(self.tokenizer.encode, text)
        return self.tokenizer.encode(text)

    def known(self, ids, param):
        if bad := next((i for i in ids if i >= self.tokenizer.vocab_size), None):
            raise ApiError(400, f"token id {bad} is outside the vocabulary of {self.tokenizer.vocab_size} ids", param)

    def token(self, i):
        """A token as the API shows it; one that is no text by itself by its bytes."""
        raw = self.raw(i)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def raw(self, i):
        return self.tokenizer.pieces[i] if self.by_bytes else self.tokenizer.decode([i], skip_special=False).encode()

    async def completions(self, request):
        asked = await self.read(request)
        prompts, echoes = asked.prompt, []
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        if len(prompts) * asked.n > (most := self.cfg.max_queue):
            raise ApiError(400, f"{len(prompts)} prompts x n={asked.n} are more than {most} texts", "n")
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                self.known(prompt, "prompt")
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, skip_special=False)
            echoes.append(text if asked.echo else None)
            prompts[i] = prompt if isinstance(prompt, list) else await self.encode(prompt) or [self.tokenizer.eot]
        room = 16 if asked.max_tokens is None else asked.max_tokens
        return self.answer(asked, prompts, echoes, room, asked.logprobs, Answer)

    async def chat_completions(self, request):
        asked, messages = await self.read(request), []
        for message in asked.messages:
            content = message.content
            if not isinstance(content, str):
                content = "".join(part.text for part in content)
            messages.append({"role": message.role.replace("developer", "system"), "content": content})
        if asked.top_logprobs and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        ids, _ = await asyncio.to_thread(chat.encode, self.tokenizer, messages, self.template, True)
        rooms = [room for room in (asked.max_completion_tokens, asked.max_tokens) if room is not None]
        return self.answer(asked, [ids], [None], min(rooms, default=self.engine.size),
                           asked.top_logprobs if asked.logprobs else None, ChatAnswer)

    def answer(self, asked, prompts, echoes, room, top, kind):
        """Queue the texts -> what sends them, once they are written."""
        cfg, size, vocab_size = self.cfg, self.engine.size, self.tokenizer.vocab_size
        if asked.stream_options and not asked.stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options")
        if (longest := max(map(len, prompts))) > size:
            raise ApiError(400, f"the prompt has {longest} tokens, the context of this model {size}",
                           "prompt" if kind is Answer else "messages", "context_length_exceeded")
        if room < 1 and echoes[0] is None:
            raise ApiError(400, "max_tokens must be at least 1; 0 needs echo", "max_tokens")
        if bad := next((token for token in asked.bias if token >= vocab_size), None):
            raise ApiError(400, f"logit_bias: {bad} is outside the vocabulary of {vocab_size} ids", "logit_bias")
        queue, sequences = asyncio.Queue(), []
        for (ids, echo), j in itertools.product(zip(prompts, echoes, strict=True), range(asked.n)):
            seed = secrets.randbits(63) if asked.seed is None else (asked.seed + j) % 2**63
            sequences.append(Sequence(asked, ids, echo, min(room, cfg.max_tokens or size, size - len(ids) + 1), top,
                                      seed, self.tokenizer.stream(), queue, len(sequences)))
        if not self.engine.submit(sequences, cfg.max_queue):
            raise ApiError(429, f"{cfg.max_queue} texts are waiting already: try again in a second",
                           code="queue_full", headers={"Retry-After": "1"})
        return kind(self, asked, queue, sequences, sum(map(len, prompts)))


class Answer:
    """Sends what comes out of the queue, in the shape of /v1/completions: at once or as events, until all is there or
    the client has left. An ASGI application.
    """

    prefix, kind, part_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, server, asked, queue, sequences, prompt_tokens):
        self.server, self.asked, self.queue, self.sequences = server, asked, queue, sequences
        self.prompt_tokens = prompt_tokens
        self.with_usage = asked.stream_options and asked.stream_options.include_usage
        self.common = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()), "model": server.name,
                       "object": self.part_kind if asked.stream else self.kind}

    async def __call__(self, scope, receive, send):
        work = asyncio.create_task(self.stream(send) if self.asked.stream else self.whole())
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait((work, gone), timeout=self.server.cfg.request_seconds,
                               return_when=asyncio.FIRST_COMPLETED)
            response = None
            if work.done():
                response = work.result()
            elif gone.done():
                scope["gone"] = True
            else:
                error = ApiError(408, f"no answer within {self.server.cfg.request_seconds:g} s", code="timeout")
                work.cancel()
                if self.asked.stream:
                    await send({"type": "http.response.body", "body": event(error.body)})
                else:
                    response = error.response()
            if response:
                await response(scope, receive, send)
        finally:
            self.server.engine.cancel(self.sequences)
            for task in (work, gone):
                task.cancel()

    async def events(self):
        """(index, text, entries, finish or None), until every text has finished."""
        left = len(self.sequences)
        while left:
            index, text, entries, finish = await self.queue.get()
            if finish == "error":
                raise ApiError(500, "the model failed; the server's log says why")
            left -= finish is not None
            yield index, text, entries, finish

    async def whole(self):
        texts = [["", [], None] for _ in self.sequences]
        try:
            async for index, text, entries, finish in self.events():
                texts[index] = [texts[index][0] + text, texts[index][1] + entries, finish]
        except ApiError as e:
            return e.response()
        return reply(self.common | {"usage": self.usage(), "choices": [
            self.choice(i, *text) for i, text in enumerate(texts)]})

    async def stream(self, send):
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]})
        out = self.head()
        try:
            async for index, text, entries, finish in self.events():
                if text or entries or finish:
                    out += self.parts(index, text, entries, finish)
                if self.queue.empty():                     # else what is there goes out together
                    await send({"type": "http.response.body", "body": b"".join(map(event, out)), "more_body": True})
                    out = []
            out += [self.part([], usage=self.usage())] if self.with_usage else []
            last = b"data: [DONE]\n\n"
        except ApiError as e:
            last = event(e.body)
        await send({"type": "http.response.body", "body": b"".join(map(event, out)) + last})

    def usage(self):
        written = sum(len(s.out) for s in self.sequences)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": written,
                "total_tokens": self.prompt_tokens + written}

    def part(self, choices, **more):
        return self.common | {"choices": choices} | ({"usage": None} if self.with_usage else {}) | more

    def head(self):
        return []

    def parts(self, index, text, entries, finish):
        return [self.part([self.choice(index, text, entries, finish)])]

    def choice(self, index, text, entries, finish):
        token, logprobs = self.server.token, None
        if self.sequences[index].top is not None:
            logprobs = {"tokens": [token(i) for i, *_ in entries], "text_offset": [offset for _, offset, *_ in entries],
                        "token_logprobs": [p for _, _, p, _ in entries],
                        "top_logprobs": [None if top is None else {token(i): p for i, p in [*top, (chosen, logp)]}
                                         for chosen, _, logp, top in entries]}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


class ChatAnswer(Answer):
    prefix, kind, part_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def head(self):
        return [self.part([self.delta(i, {"role": "assistant", "content": ""}) for i in range(len(self.sequences))])]

    def delta(self, index, delta, entries=(), finish=None):
        return {"index": index, "delta": delta, "logprobs": self.logprobs(index, entries), "finish_reason": finish}

    def parts(self, index, text, entries, finish):
        out = [self.part([self.delta(index, {"content": text}, entries)])] if text or entries else []
        return out + ([self.part([self.delta(index, {}, (), finish)])] if finish else [])

    def choice(self, index, text, entries, finish):
        return {"index": index, "message": {"role": "assistant", "content": text},
                "logprobs": self.logprobs(index, entries), "finish_reason": finish}

    def logprobs(self, index, entries):
        def item(i, p):
            return {"token": self.server.token(i), "bytes": list(self.server.raw(i)), "logprob": p}
        if self.sequences[index].top is None:
            return None
        return {"content": [item(i, p) | {"top_logprobs": [item(*pair) for pair in top]} for i, _, p, top in entries],
                "refusal": None}


class Guard:
    """Around all routes: who may ask, one line in the log and one count for each request."""

    def __init__(self, app, server):
        self.app, self.server = app, server

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.monotonic(), 499              # nginx's number for a client that left

        async def watch(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if error := self.refuse(scope):
                await error.response()(scope, receive, watch)
            else:
                await self.app(scope, receive, watch)
        except Exception:
            status = 500                                   # what Starlette answers around this
            raise
        finally:
            path = scope["path"] if scope["path"] in self.server.paths else "other"
            self.server.requests[path, status] += 1
            if self.server.cfg.log:                        # in ASCII and quotes: no path can forge a line
                left = ", client left" if scope.get("gone") else ""
                print(f"{time.strftime('%H:%M:%S')} {(scope.get('client') or ['-'])[0]} {scope['method']:.10} "
                      f"{json.dumps(scope['path'][:100])} {status} {1000 * (time.monotonic() - begun):.0f} ms{left}",
                      file=sys.stderr, flush=True)

    def refuse(self, scope):
        headers = {name: value for name, value in reversed(scope["headers"])}                # the first of each counts
        server, host = self.server, headers.get(b"host", b"").decode("latin-1").lower()
        if server.local and not is_loopback(re.sub(r":\d{1,5}$", "", host).strip("[]")):     # as in DNS rebinding
            return ApiError(403, "this server answers only to names of this machine", code="host")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host:
            return ApiError(403, "a web page of another origin may not ask", code="origin")
        if server.key and scope["path"] not in ("/", "/health"):
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), server.key):
                return ApiError(401, "no or a wrong API key in the Authorization header", code="invalid_api_key",
                                headers={"WWW-Authenticate": "Bearer"})
        return None


class Protocol(H11Protocol):
    """uvicorn's, with the deadlines that it lacks, for a client that brings no whole headers or does not read."""

    seconds = 10.0

    def connection_made(self, transport):
        super().connection_made(transport)
        self.deadline = self.loop.call_later(self.seconds, self.too_late)

    def connection_lost(self, exc):
        self.deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self):
        super().on_response_complete()
        self.deadline.cancel()
        self.deadline = self.loop.call_later(self.seconds, self.too_late)

    def too_late(self):
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()                         # close() would wait for what is not read yet

    def pause_writing(self):
        super().pause_writing()
        self.stuck = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        self.stuck.cancel()

    def send_400_response(self, msg):
        body = json.dumps(ApiError(400, msg).body).encode()
        for part in (h11.Response(status_code=400, reason=b"Bad Request", headers=[
                (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
                (b"connection", b"close")]), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part))
        self.transport.close()


class Uvicorn(uvicorn.Server):
    """Ends with exit code 0 on SIGTERM, after the answers that run."""

    def __init__(self, cfg, server):
        protocol = type("Protocol", (Protocol,), {"seconds": cfg.client_seconds})
        super().__init__(uvicorn.Config(
            server.app, cfg.host.strip("[]"), cfg.port, loop="asyncio", http=protocol, ws="none", lifespan="off",
            log_level="error", access_log=False, proxy_headers=False, server_header=False, backlog=1024,
            h11_max_incomplete_event_size=16384, timeout_graceful_shutdown=int(cfg.drain_seconds) + 2))
        self.ours = server

    async def startup(self, sockets=None):
        self.ours.engine.run(asyncio.get_running_loop())
        await super().startup(sockets)
        if not self.should_exit:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"{self.ours.name} on http://{shown}:{port}" + (" (with an API key)" if self.ours.key else ""),
                  file=sys.stderr, flush=True)

    def handle_exit(self, sig, frame):
        seconds = 0 if self.should_exit else self.ours.cfg.drain_seconds                     # the second time at once
        self.should_exit, self.ours.engine.stop_at = True, time.monotonic() + seconds


def listen(cfg):
    host = cfg.host.strip("[]")
    try:
        return socket.create_server((host, cfg.port), backlog=1024,
                                    family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as e:
        why = e.strerror.partition(" (")[0]
        raise UserError(f"--host={cfg.host} --port={cfg.port}: {why}; --port=0 takes any free port") from None


def main(cfg):
    loaded = load(cfg.checkpoint, cfg.which, cfg.device, cfg.template)
    Uvicorn(cfg, Server(cfg, loaded)).run([listen(cfg)])


if __name__ == "__main__":
    configurator.run(main, Config)
