"""An OpenAI-compatible server for anything that sample.py reads, and a page to try it on.

    python serve.py                                                # the newest run, on http://127.0.0.1:8000
    python serve.py --checkpoint=runs/sft_tiny --port=9000
    THIMBLE_API_KEY=secret python serve.py --host=0.0.0.0          # beyond this machine only with a key
    curl 127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "To be", "max_tokens": 20}'

One process. A thread owns the model and moves all running requests one token on at a time, each in a row of one cache;
they join and leave between two tokens. The event loop does the rest. It needs two more packages than training does:
pip install starlette uvicorn.
"""
import asyncio
import base64
import collections
import hashlib
import hmac
import ipaddress
import itertools
import json
import math
import os
import re
import secrets
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import chat
import configurator
import data
import sample
from configurator import UserError

try:
    import h11
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as e:
    raise SystemExit(f"error: serve.py needs a package ({e}): pip install starlette uvicorn") from None

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
    hosts: tuple[str, ...] = ()     # more names by which this server is called (the Host header)
    origins: tuple[str, ...] = ()   # other web pages that may ask, such as https://example.org
    # limits
    max_batch: int = 16             # texts written at the same time
    max_queue: int = 64             # texts that wait; beyond them: 429
    max_tokens: int = 0             # longest answer; 0: what the context holds
    max_body: int = 1_000_000       # bytes of a request
    header_seconds: float = 10.0    # for a client to send its headers, or the next request
    body_seconds: float = 10.0      # for a client to send its body
    request_seconds: float = 120.0  # for an answer, waiting included
    drain_seconds: float = 8.0      # on SIGTERM: for running answers to finish
    log: bool = True                # a line for each request, without its text

    def __post_init__(self):
        for name in ("max_batch", "max_queue", "max_body", "header_seconds", "body_seconds", "request_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.port < 65536 or self.max_tokens < 0 or self.drain_seconds < 0:
            raise ValueError(f"port={self.port} must be in [0, 65535], max_tokens={self.max_tokens} and "
                             f"drain_seconds={self.drain_seconds} not negative")


class ApiError(Exception):
    def __init__(self, status, message, param=None, code=None, **headers):
        super().__init__(message)
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error",
                503: "server_error"}.get(status, "invalid_request_error")
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self):
        return reply(self.body, self.status, self.headers)


def reply(body, status=200, headers=None):
    # ASCII only: half of a surrogate pair in a message of ours can then do no harm
    return Response(json.dumps(body), status, headers, "application/json")


# ---- the model's side

class Sequence:
    """One text to be written: a prompt, how to go on, and where the events go."""

    def __init__(self, engine, prompt, queue, index, max_tokens, seed, stop, top, echo, bias, penalties, sampling):
        self.prompt, self.queue, self.index = prompt, queue, index
        self.room, self.stop, self.top, self.echo = max_tokens, stop, top, echo
        self.bias, self.penalties, self.sampling = bias, penalties, sampling
        self.plain = not bias and not any(penalties) and sampling["repetition_penalty"] == 1
        self.generator = torch.Generator().manual_seed(seed)
        self.out, self.cancelled, self.born = [], False, time.monotonic()
        self.text, self.stream, self.length = Text(stop), engine.tokenizer.stream(), 0


class Text:
    """Holds back what may be the beginning of a stop text, and ends before one."""

    def __init__(self, stops):
        self.stops, self.held, self.done = stops, "", False

    def __call__(self, text, last=False):
        """More text -> what of it may be shown."""
        self.held += text
        found = [i for i in map(self.held.find, self.stops) if i >= 0]
        if found:
            self.done, shown, self.held = True, self.held[:min(found)], ""
            return shown
        keep = 0 if last else max((n for s in self.stops for n in range(1, len(s)) if self.held.endswith(s[:n])),
                                  default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown


class Row:
    """A row of the cache: the ids that it holds, who uses it, and when it was last used."""

    def __init__(self):
        self.ids, self.sequence, self.used = [], None, 0


def shared(a, b):
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Engine:
    """Owns the model, in a thread. Of the rows of its cache the first n are running, the next may be filling with a
    prompt, the others are free and remember what they held: a conversation goes on from there.
    """

    def __init__(self, model, tokenizer, stop_ids, max_batch):
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, stop_ids
        self.size, self.device = model.config.block_size, next(model.parameters()).device
        self.max_batch, self.waiting, self.more = max_batch, collections.deque(), threading.Condition()
        self.counts = collections.Counter()
        self.first = []                                    # seconds to the first token, since the last look
        self.stop_at, self.failed, self.loop = math.inf, False, None
        self.reset()

    def reset(self):
        self.cache = self.model.init_cache(self.max_batch, self.size)
        # keys and values can be cut at any token, a state can only be continued
        self.cuttable = all(set(layer) == {"k", "v"} for layer in self.cache.get("layers", [{}]))
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
        with self.more:
            for sequence in sequences:
                sequence.cancelled = True
            self.more.notify()

    def run(self, loop):
        self.loop = loop
        threading.Thread(target=self._run, daemon=True, name="engine").start()

    # in the thread

    @torch.no_grad()
    def _run(self):
        while True:
            with self.more:
                self.more.wait_for(lambda: self.waiting or self.n or self.filling)
            self.events = []
            try:
                self.turn()
            except Exception:                              # of the model; whoever is in the cache has to begin anew
                traceback.print_exc()
                self.counts["failures"] += 1
                running = [row.sequence for row in self.rows if row.sequence]
                self.events += [(s, "", None, "error") for s in running]
                self.reset()
            if self.events:
                self.loop.call_soon_threadsafe(self.deliver, self.events)

    def deliver(self, events):
        for sequence, *event in events:
            sequence.queue.put_nowait((sequence.index, *event))

    def turn(self):
        """Let go who has left, take in who waits, some of a prompt, one token for all who run."""
        if time.monotonic() > self.stop_at:
            with self.more:
                leaving, self.waiting = list(self.waiting), collections.deque()
            leaving += [row.sequence for row in self.rows if row.sequence]
            for sequence in leaving:
                self.events.append((sequence, sequence.text("", last=True), None, "length"))
                sequence.cancelled = True
        for i in reversed(range(self.n)):
            if self.rows[i].sequence.cancelled:
                self.leave(i)
        if self.filling and self.filling.sequence.cancelled:
            self.filling.sequence = self.filling = None
        budget = CHUNK
        while budget > 0 and (self.filling or self.admit()):
            budget -= self.fill(budget)
        if self.n:
            self.decode()

    def admit(self):
        """Give the next who waits a row, as much of the prompt as any row holds already in it."""
        while True:
            with self.more:
                if not self.waiting or self.n == self.max_batch:
                    return False
                sequence = self.waiting.popleft()
            if sequence.cancelled:
                continue
            if not (sequence.echo and self.prompt_logprobs(sequence)):
                break
        known = [shared(row.ids, sequence.prompt[:-1]) for row in self.rows]
        if not self.cuttable:
            known = [k if k == len(row.ids) and i >= self.n else 0
                     for i, (k, row) in enumerate(zip(known, self.rows, strict=True))]
        best = max(range(len(known)), key=known.__getitem__)
        # its own row, if nothing else of worth is lost by that; a copy of it in the row that was used longest ago
        if best < self.n or known[best] < len(self.rows[best].ids) // 2 or not known[best]:
            to = min(range(self.n, self.max_batch), key=lambda i: self.rows[i].used)
            if to != best:
                if self.cuttable and known[best]:
                    for layer in self.cache["layers"]:
                        for part in layer.values():
                            part[to, :, :known[best]] = part[best, :, :known[best]]
                elif not self.cuttable:
                    known[best] = 0
        else:
            to = best
        if not self.cuttable and not known[best]:
            for part in leaves(self.cache):
                part[to].zero_()
        row = self.filling = self.rows[to]
        row.ids, row.sequence = sequence.prompt[:known[best]], sequence
        self.counts["reused"] += known[best]
        self.swap(to, self.n)
        return True

    def fill(self, budget):
        """Take in more of the prompt -> how many tokens. Its end gives the first token."""
        row, start = self.filling, len(self.filling.ids)
        new = row.sequence.prompt[start:start + budget]
        logits = self.step([new], [start], self.n)
        row.ids = row.ids + new
        if len(row.ids) == len(row.sequence.prompt):
            self.filling = None
            self.n += 1
            self.first.append(time.monotonic() - row.sequence.born)
            self.counts["prompt_tokens"] += len(row.ids)
            self.sample(logits, [self.n - 1])
        return len(new)

    def decode(self):
        rows = self.rows[:self.n]
        logits = self.step([[row.sequence.out[-1]] for row in rows], [len(row.ids) for row in rows], 0)
        for row in rows:
            row.ids.append(row.sequence.out[-1])
        self.counts["steps"] += 1
        self.sample(logits, range(self.n))

    def step(self, idx, pos, at):
        """Model.step of the rows at, at + 1, ...: as many ids for each, and how many each has seen -> logits."""
        rows = view(self.cache, at, at + len(idx))
        rows["pos"] = torch.tensor(pos[0] if len(pos) == 1 else pos)
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

    def sample(self, logits, at):
        """Draw a token for each of the rows `at`, logits (len(at), V); who has finished leaves."""
        sequences, vocab_size = [self.rows[i].sequence for i in at], self.tokenizer.vocab_size
        greedy = logits[:, :vocab_size].argmax(-1).tolist()
        logp = logits.log_softmax(-1) if any(s.top is not None for s in sequences) else logits
        ended = []
        for i, (where, sequence) in enumerate(zip(at, sequences, strict=True)):
            token = greedy[i]
            if sequence.sampling["temperature"] or not sequence.plain:
                token = self.draw(sequence, logits[i, :vocab_size].cpu())
            if self.take(sequence, token, logp[i]):
                ended.append(where)
        for i in reversed(ended):
            self.leave(i)

    def draw(self, sequence, logits):
        if not sequence.plain:
            logits = logits.clone()
            for token, bias in sequence.bias.items():
                logits[token] += bias
            presence, frequency = sequence.penalties
            if (presence or frequency) and sequence.out:
                tokens, times = torch.tensor(sequence.out).unique(return_counts=True)
                logits[tokens] -= presence + frequency * times
        logits = sample.filter_logits(logits, sequence.prompt + sequence.out, **sequence.sampling)
        return torch.multinomial(logits.softmax(-1), 1, generator=sequence.generator).item()

    def take(self, sequence, token, logp):
        """Write down a token -> whether it was the last."""
        sequence.out.append(token)
        self.counts["generated_tokens"] += 1
        finish = "stop" if token in self.stop_ids else None
        new = "" if finish else sequence.stream.step(token)
        entry = None if sequence.top is None else self.entry(sequence, token, new, logp)
        shown = sequence.text(new)
        if sequence.text.done:
            finish = "stop"
        elif finish or len(sequence.out) >= sequence.room:
            finish = finish or "length"
            shown += sequence.text(sequence.stream.flush(), last=True)
        self.events.append((sequence, shown, entry, finish))
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
        """Report the prompt's tokens -> whether that was all that was asked."""
        entries, stream = [], self.tokenizer.stream(skip_special=False)
        logp = None
        if sequence.top is not None:
            logits = self.model(torch.tensor([sequence.prompt], device=self.device))[0][0]   # (T, V)
            logp = logits.log_softmax(-1).cpu()
            for i, token in enumerate(sequence.prompt):
                entries.append(self.entry(sequence, token, stream.step(token), logp[i - 1] if i else None))
        done = not sequence.room
        self.events.append((sequence, sequence.echo, entries, "length" if done else None))
        sequence.length = len(sequence.echo)
        if logp is not None and sequence.room == 1:        # as lm-eval asks: no cache needed
            token = logits[-1, :self.tokenizer.vocab_size].argmax().item()
            if sequence.sampling["temperature"] or not sequence.plain:
                token = self.draw(sequence, logits[-1, :self.tokenizer.vocab_size].cpu())
            done = self.take(sequence, token, logp[-1])
        if done:
            self.counts["prompt_tokens"] += len(sequence.prompt)
            self.first.append(time.monotonic() - sequence.born)
        return done


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


# ---- what may be asked: JSON Schema, for the check and for /openapi.json alike

def number(low, high, kind="number"):
    return {"type": kind, "minimum": low, "maximum": high}


INT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
STRING = {"type": "string"}
COMMON = {
    "model": {"type": "string", "maxLength": 1000}, "n": number(1, 16, "integer"), "max_tokens": INT,
    "temperature": number(0, 2), "top_p": number(0, 1), "top_k": number(-1, 2**31 - 1, "integer"),
    "min_p": number(0, 1), "repetition_penalty": number(0.01, 100), "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2), "seed": number(-2**63, 2**63 - 1, "integer"), "stream": {"type": "boolean"},
    "stop": {"anyOf": [{"type": "string", "maxLength": 256},
                       {"type": "array", "items": {"type": "string", "maxLength": 256}, "maxItems": 8}]},
    "logit_bias": {"type": "object", "additionalProperties": number(-100, 100), "maxProperties": 1000},
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}},
                       "additionalProperties": False},
    "user": {"type": "string", "maxLength": 1000},
}
IDS = {"type": "array", "items": INT, "minItems": 1}
TEXT_PART = {"type": "object", "properties": {"type": {"enum": ["text"]}, "text": STRING},
             "required": ["type", "text"], "additionalProperties": False}
MESSAGE = {"type": "object", "required": ["role", "content"], "additionalProperties": False, "properties": {
    "role": {"enum": ["system", "developer", "user", "assistant"]}, "name": STRING,
    "content": {"anyOf": [STRING, {"type": "array", "items": TEXT_PART}]}}}


def schema(required, **properties):
    return {"type": "object", "properties": properties, "required": [required], "additionalProperties": False}


SCHEMAS = {
    "/v1/completions": schema("prompt", **COMMON, echo={"type": "boolean"}, logprobs=number(0, 20, "integer"),
                              best_of=number(1, 16, "integer"), suffix={"type": "string", "maxLength": 0},
                              prompt={"anyOf": [STRING, IDS, {"type": "array", "items": STRING, "minItems": 1},
                                                {"type": "array", "items": IDS, "minItems": 1}]}),
    "/v1/chat/completions": schema("messages", **COMMON, max_completion_tokens=INT, logprobs={"type": "boolean"},
                                   top_logprobs=number(0, 20, "integer"),
                                   messages={"type": "array", "items": MESSAGE, "minItems": 1, "maxItems": 1000},
                                   response_format={"type": "object", "properties": {"type": {"enum": ["text"]}},
                                                    "required": ["type"], "additionalProperties": False}),
    "/tokenize": schema("prompt", prompt=STRING, model=STRING, add_special_tokens={"type": "boolean"}),
    "/detokenize": schema("tokens", tokens={"type": "array", "items": INT}, model=STRING),
}
KINDS = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict}


def check(value, schema, name=""):
    """ApiError 400 unless value fits this much of JSON Schema."""
    def wrong(why):
        raise ApiError(400, f"{name or 'the body'} {why}"[:300], name.partition("[")[0].partition(".")[0] or None)

    if "anyOf" in schema:
        errors = []
        for option in schema["anyOf"]:
            try:
                return check(value, option, name)
            except ApiError as e:
                errors.append(str(e))
        wrong("fits none of its forms: " + "; ".join(dict.fromkeys(errors)))
    if "enum" in schema and not (isinstance(value, str) and value in schema["enum"]):
        wrong(f"must be one of {', '.join(schema['enum'])}")
    if "type" not in schema:
        return
    if not isinstance(value, KINDS[schema["type"]]) or isinstance(value, bool) != (schema["type"] == "boolean"):
        wrong(f"must be of type {schema['type']}")
    if isinstance(value, (int, float)) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        wrong(f"must be from {schema['minimum']} to {schema['maximum']}")
    if isinstance(value, str) and len(value) > schema.get("maxLength", math.inf):
        wrong(f"must have at most {schema['maxLength']} characters")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            wrong(f"must have from {schema.get('minItems', 0)} to {schema.get('maxItems', 'any number of')} items")
        for i, item in enumerate(value):
            check(item, schema["items"], f"{name}[{i}]")
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema["additionalProperties"]
        if len(value) > schema.get("maxProperties", math.inf):
            wrong(f"must have at most {schema['maxProperties']} entries")
        if missing := [key for key in schema.get("required", ()) if value.get(key) is None]:
            raise ApiError(400, f"{', '.join(missing)} is missing"[:300], missing[0])
        for key, item in value.items():
            full = f"{name}.{key}" if name else key
            if key not in known and not rest:
                raise ApiError(400, f"unknown field {full!r}"[:300], full[:100], "unknown_field")
            if item is not None:                           # null: as if it were not there
                check(item, known.get(key, rest), full)


def parse(body):
    def constant(name):
        raise ValueError(f"{name} is no JSON")
    try:
        value = json.loads(body, parse_constant=constant)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body is not JSON: {str(e)[:200]}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


# ---- the network's side

class Server:
    def __init__(self, cfg, model, tokenizer, loaded):
        self.cfg, self.tokenizer, self.created = cfg, tokenizer, int(time.time())
        path = loaded.path
        self.name = cfg.name or (path.parent.name if path.name.startswith("step_") else path.stem)
        self.template = chat.template_of(loaded.meta, tokenizer) if cfg.template == "auto" else cfg.template
        stop_ids = sample.stop_ids(loaded, tokenizer) | {chat.end_id(tokenizer, self.template)}
        self.engine = Engine(model, tokenizer, stop_ids, cfg.max_batch)
        self.key = (cfg.api_key or os.environ.get("THIMBLE_API_KEY", "")).encode()
        self.by_bytes = isinstance(tokenizer.stream(), data.ByteStream)
        self.requests, self.first = collections.Counter(), [0, 0.0]
        self.page, self.policy = read_page()
        bound = cfg.host.strip("[]")
        if not self.key and not is_loopback(bound):
            raise UserError(f"--host={cfg.host} is open to other machines: set an API key (THIMBLE_API_KEY)")
        self.hosts = {"localhost", "127.0.0.1", "::1", bound.lower(), *(h.lower() for h in cfg.hosts)}
        if bound in ("0.0.0.0", "::"):                     # any name may lead here, and the key guards it
            self.hosts = None
        routes = [Route("/", self.index), Route("/health", self.health), Route("/v1/models", self.models),
                  Route("/metrics", self.metrics), Route("/tokenizer_info", self.tokenizer_info),
                  Route("/openapi.json", self.openapi)]
        posts = {"/v1/completions": self.completions, "/v1/chat/completions": self.chat_completions,
                 "/tokenize": self.tokenize, "/detokenize": self.detokenize}
        routes += [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()]
        self.paths = {route.path for route in routes}
        cors = Middleware(CORSMiddleware, allow_origins=cfg.origins, allow_methods=["GET", "POST"],
                          allow_headers=["Authorization", "Content-Type"])
        self.app = Starlette(routes=routes, middleware=[*([cors] if cfg.origins else []), Middleware(Guard, self)],
                             exception_handlers={HTTPException: self.http_error, ApiError: self.api_error,
                                                 UserError: self.user_error, Exception: self.failure})

    # errors

    async def api_error(self, request, e):
        return e.response()

    async def user_error(self, request, e):
        return ApiError(400, str(e)).response()

    async def http_error(self, request, e):
        return ApiError(e.status_code, e.detail, **(e.headers or {})).response()

    async def failure(self, request, e):
        return ApiError(500, "the server failed; its log says why").response()

    # small routes

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
        self.first = [self.first[0] + len(e.first), self.first[1] + sum(e.first)]
        e.first = []
        for name, kind, value in (
                ("requests_running", "gauge", e.n), ("requests_waiting", "gauge", len(e.waiting)),
                ("prompt_tokens_total", "counter", e.counts["prompt_tokens"]),
                ("prompt_tokens_reused_total", "counter", e.counts["reused"]),
                ("generated_tokens_total", "counter", e.counts["generated_tokens"]),
                ("steps_total", "counter", e.counts["steps"]), ("failures_total", "counter", e.counts["failures"])):
            lines += [f"# TYPE thimble_{name} {kind}", f"thimble_{name} {value}"]
        lines += ["# TYPE thimble_first_token_seconds summary", f"thimble_first_token_seconds_count {self.first[0]}",
                  f"thimble_first_token_seconds_sum {self.first[1]:.6f}", "# TYPE thimble_requests_total counter"]
        lines += [f'thimble_requests_total{{path="{path}",status="{status}"}} {count}'
                  for (path, status), count in sorted(self.requests.items())]
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def tokenizer_info(self, request):
        return reply({"name": self.tokenizer.name, "kind": self.tokenizer.kind, "vocab_size": self.tokenizer.vocab_size,
                      "eos_token": self.token(self.tokenizer.eot), "eos_token_id": self.tokenizer.eot,
                      "bos_token": None, "pad_token": None, "chat_template": None, "template": self.template})

    async def tokenize(self, request):
        body = await self.read(request)
        ids = await self.encode(body["prompt"])
        return reply({"count": len(ids), "max_model_len": self.engine.size, "tokens": ids})

    async def detokenize(self, request):
        body = await self.read(request)
        self.known(body["tokens"], "tokens")
        return reply({"prompt": self.tokenizer.decode(body["tokens"], skip_special=False)})

    async def openapi(self, request):
        error = {"description": "an error", "content": {"application/json": {"schema": {
            "type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}}}}
        errors = {str(status): error for status in (400, 401, 403, 408, 413, 415, 429)}
        paths = {path: {"post": {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                                 "responses": {"200": {"description": "ok"}, **errors}}}
                 for path, schema in SCHEMAS.items()}
        paths |= {path: {"get": {"responses": {"200": {"description": "ok"}, **errors}}}
                  for path in sorted(self.paths - set(SCHEMAS))}
        keyed = {"components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
                 "security": [{"key": []}]}
        return reply({"openapi": "3.1.0", "info": {"title": "Thimble", "version": "1"}, "paths": paths}
                     | (keyed if self.key else {}))

    # reading

    async def read(self, request):
        """The checked body of a request, nulls left out."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "Content-Type must be application/json")
        body = bytearray()
        try:
            async with asyncio.timeout(self.cfg.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > self.cfg.max_body:
                        raise ApiError(413, f"the body has more than {self.cfg.max_body:,} bytes", Connection="close")
        except ClientDisconnect:                           # nobody is left to read this
            raise ApiError(400, "the client left") from None
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {self.cfg.body_seconds:g} s", Connection="close") from None
        body = parse(body)
        check(body, SCHEMAS[request.url.path])
        if body.get("model") not in (None, self.name):
            raise ApiError(404, f"the model {body['model'][:100]!r} does not exist, this is {self.name!r}", "model",
                           "model_not_found")
        return {key: value for key, value in body.items() if value is not None}

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

    # the two routes that generate

    async def completions(self, request):
        body = await self.read(request)
        if body.get("best_of", body.get("n", 1)) != body.get("n", 1):
            raise ApiError(400, "best_of must be n: all that is written is returned", "best_of")
        prompts = body["prompt"]
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        all_ids = []
        for prompt in prompts:
            if isinstance(prompt, str):
                all_ids.append(await self.encode(prompt) or [self.tokenizer.eot])
            else:
                self.known(prompt, "prompt")
                all_ids.append(prompt)
        echoes = [None] * len(prompts)
        if body.get("echo"):
            echoes = [prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, skip_special=False)
                      for prompt in prompts]
        return self.answer(body, all_ids, echoes, body.get("max_tokens", 16), body.get("logprobs"), Completion(self))

    async def chat_completions(self, request):
        body, messages = await self.read(request), []
        for message in body["messages"]:
            content = message["content"]
            if not isinstance(content, str):
                content = "".join(part["text"] for part in content)
            messages.append({"role": message["role"].replace("developer", "system"), "content": content})
        if body.get("top_logprobs") and not body.get("logprobs"):
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        ids = (await asyncio.to_thread(chat.encode, self.tokenizer, messages, self.template, True))[0]
        top = body.get("top_logprobs", 0) if body.get("logprobs") else None
        room = body.get("max_completion_tokens", body.get("max_tokens", self.engine.size))
        return self.answer(body, [ids], [None], room, top, ChatCompletion(self))

    def answer(self, body, prompts, echoes, max_tokens, top, shape):
        """-> an ASGI application that gives the answer, its texts queued."""
        cfg, size, n = self.cfg, self.engine.size, body.get("n", 1)
        if "stream_options" in body and not body.get("stream"):
            raise ApiError(400, "stream_options needs stream: true", "stream_options")
        if (longest := max(map(len, prompts))) > size:
            raise ApiError(400, f"the prompt has {longest} tokens, the context of this model {size}",
                           "prompt" if "prompt" in body else "messages", "context_length_exceeded")
        if len(prompts) * n > cfg.max_queue:
            raise ApiError(400, f"{len(prompts)} prompts x n={n} are more than {cfg.max_queue} texts", "n")
        if max_tokens < 1 and not body.get("echo"):
            raise ApiError(400, "max_tokens must be at least 1; 0 needs echo", "max_tokens")
        bias = {}
        for key, value in body.get("logit_bias", {}).items():
            if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= self.tokenizer.vocab_size:
                raise ApiError(400, f"logit_bias: {key[:50]!r} is no token id", "logit_bias")
            bias[int(key)] = value or 0
        stop = body.get("stop", [])
        stop = [s for s in ([stop] if isinstance(stop, str) else stop) if s]
        sampling = {"temperature": body.get("temperature", 1.0), "top_k": max(0, body.get("top_k", 0)),
                    "top_p": max(1e-9, body.get("top_p", 1.0)), "min_p": body.get("min_p", 0.0),
                    "repetition_penalty": body.get("repetition_penalty", 1.0)}
        penalties = body.get("presence_penalty", 0), body.get("frequency_penalty", 0)
        queue, sequences = asyncio.Queue(), []
        for (ids, echo), j in itertools.product(zip(prompts, echoes, strict=True), range(n)):
            room = min(max_tokens, cfg.max_tokens or size, size - len(ids) + 1)
            seed = (body["seed"] + j) % 2**63 if "seed" in body else secrets.randbits(63)
            sequences.append(Sequence(self.engine, ids, queue, len(sequences), room, seed, stop, top, echo, bias,
                                      penalties, sampling))
        shape.begin(body, sequences, sum(map(len, prompts)))
        if not self.engine.submit(sequences, cfg.max_queue):
            raise ApiError(429, f"{cfg.max_queue} texts are waiting already: try again in a second",
                           code="queue_full", **{"Retry-After": "1"})
        return Answer(self, queue, sequences, shape)


class Answer:
    """Sends what comes out of the queue, at once or as events, until all is there or the client has left."""

    def __init__(self, server, queue, sequences, shape):
        self.server, self.queue, self.sequences, self.shape = server, queue, sequences, shape

    async def __call__(self, scope, receive, send):
        work = asyncio.create_task(self.stream(send) if self.shape.streamed else self.whole(scope, receive, send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait((work, gone), timeout=self.server.cfg.request_seconds,
                               return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            elif not gone.done():
                error = ApiError(408, f"no answer within {self.server.cfg.request_seconds:g} s", code="timeout")
                work.cancel()
                if not self.shape.streamed:
                    await error.response()(scope, receive, send)
                else:
                    async with asyncio.timeout(1):         # a client that does not read is not waited for
                        await send({"type": "http.response.body", "body": event(error.body)})
            else:
                scope["gone"] = True
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
            yield index, text, [] if entries is None else entries if isinstance(entries, list) else [entries], finish

    async def whole(self, scope, receive, send):
        try:
            async for index, text, entries, finish in self.events():
                self.shape.add(index, text, entries, finish)
            response = reply(self.shape.whole())
        except ApiError as e:
            response = e.response()
        await response(scope, receive, send)

    async def stream(self, send):
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]})
        out = [event(part) for part in self.shape.head()]
        try:
            async for index, text, entries, finish in self.events():
                out += [event(part) for part in self.shape.parts(index, text, entries, finish)]
                if self.queue.empty():                     # else what is there goes out together
                    await send({"type": "http.response.body", "body": b"".join(out), "more_body": True})
                    out = []
            out += [event(part) for part in self.shape.tail()] + [b"data: [DONE]\n\n"]
        except ApiError as e:
            out.append(event(e.body))
        await send({"type": "http.response.body", "body": b"".join(out)})


def event(body):
    return f"data: {json.dumps(body)}\n\n".encode()


async def disconnected(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


class Completion:
    """The shape of /v1/completions, whole and in parts."""

    kind, part_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, server):
        self.server = server

    def begin(self, body, sequences, prompt_tokens):
        self.streamed, self.sequences, self.prompt_tokens = body.get("stream", False), sequences, prompt_tokens
        self.with_usage = body.get("stream_options", {}).get("include_usage")
        self.common = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()),
                       "model": self.server.name, "object": self.part_kind if self.streamed else self.kind}
        self.texts, self.entries = [""] * len(sequences), [[] for _ in sequences]
        self.finish = [None] * len(sequences)

    def add(self, index, text, entries, finish):
        self.texts[index] += text
        self.entries[index] += entries
        self.finish[index] = finish

    def usage(self):
        written = sum(len(s.out) for s in self.sequences)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": written,
                "total_tokens": self.prompt_tokens + written}

    def whole(self):
        return self.common | {"usage": self.usage(), "choices": [
            self.choice(i, self.texts[i], self.entries[i], self.finish[i]) for i in range(len(self.texts))]}

    def part(self, choices, **more):
        return self.common | {"choices": choices} | ({"usage": None} if self.with_usage else {}) | more

    def head(self):
        return []

    def parts(self, index, text, entries, finish):
        return [self.part([self.choice(index, text, entries, finish)])] if text or entries or finish else []

    def tail(self):
        return [self.part([], usage=self.usage())] if self.with_usage else []

    def choice(self, index, text, entries, finish):
        token, logprobs = self.server.token, None
        if self.sequences[index].top is not None:
            logprobs = {"tokens": [token(i) for i, *_ in entries], "text_offset": [offset for _, offset, *_ in entries],
                        "token_logprobs": [p for _, _, p, _ in entries],
                        "top_logprobs": [None if top is None else {token(i): p for i, p in [*top, (chosen, logp)]}
                                         for chosen, _, logp, top in entries]}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


class ChatCompletion(Completion):
    kind, part_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

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
        finally:
            path = scope["path"] if scope["path"] in self.server.paths else "other"
            self.server.requests[path, status] += 1
            if self.server.cfg.log:                        # in ASCII and quotes: no path can forge a line
                left = ", client left" if scope.get("gone") else ""
                print(f"{time.strftime('%H:%M:%S')} {(scope.get('client') or ['-'])[0]} {scope['method']:.10} "
                      f"{json.dumps(scope['path'][:100])} {status} {1000 * (time.monotonic() - begun):.0f} ms{left}",
                      file=sys.stderr, flush=True)

    def refuse(self, scope):
        headers = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, value)
        server, host = self.server, headers.get(b"host", b"").decode("latin-1").lower()
        if server.hosts is not None and host_name(host) not in server.hosts:    # DNS rebinding comes by another name
            return ApiError(403, "this server is not called so: add the name to --hosts", code="host")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host and origin not in server.cfg.origins:
            return ApiError(403, "a web page of another origin may not ask: see --origins", code="origin")
        if server.key and scope["path"] not in ("/", "/health"):
            given = headers.get(b"authorization", b"").partition(b" ")
            if given[0].lower() != b"bearer" or not hmac.compare_digest(given[2].strip(), server.key):
                return ApiError(401, "no or a wrong API key in the Authorization header", code="invalid_api_key",
                                **{"WWW-Authenticate": "Bearer"})
        return None


def host_name(host):
    """The Host header without its port."""
    return re.sub(r":\d{1,5}$", "", host).strip("[]")


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
    rest = "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return page, f"default-src 'none'; {'; '.join(kinds)}; {rest}"


class Protocol(H11Protocol):
    """uvicorn's, with the deadline that it lacks: a connection that brings no whole request headers is closed."""

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
            self.transport.close()

    def send_400_response(self, msg):
        body = json.dumps(ApiError(400, msg).body).encode()
        for part in (h11.Response(status_code=400, reason=b"Bad Request", headers=[
                (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
                (b"connection", b"close")]), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part))
        self.transport.close()


class Uvicorn(uvicorn.Server):
    """Ends with exit code 0 on SIGTERM, after the answers that run."""

    def __init__(self, config, server):
        super().__init__(config)
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
        self.force_exit = self.should_exit                 # the second time at once
        self.should_exit = True
        self.ours.engine.stop_at = time.monotonic() + self.ours.cfg.drain_seconds


def settings(cfg, app):
    """uvicorn's."""
    protocol = type("Protocol", (Protocol,), {"seconds": cfg.header_seconds})
    return uvicorn.Config(app, cfg.host.strip("[]"), cfg.port, loop="asyncio", http=protocol, ws="none", lifespan="off",
                          log_level="error", access_log=False, proxy_headers=False, server_header=False, backlog=1024,
                          h11_max_incomplete_event_size=16384, timeout_keep_alive=max(1, int(cfg.header_seconds)),
                          timeout_graceful_shutdown=int(cfg.drain_seconds) + 2)


def main(cfg):
    model, tokenizer, loaded = sample.load(cfg.checkpoint, cfg.which, cfg.device)
    server = Server(cfg, model, tokenizer, loaded)
    Uvicorn(settings(cfg, server.app), server).run()


if __name__ == "__main__":
    configurator.run(main, Config)
