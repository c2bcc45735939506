"""An OpenAI-compatible server for anything that sample.py reads, and a page to try it on.

    python serve.py                                                # the newest run, on http://127.0.0.1:8000
    python serve.py --checkpoint=runs/sft_tiny --port=9000
    THIMBLE_API_KEY=secret python serve.py --host=0.0.0.0          # other machines may connect only with a key
    curl 127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "To be", "max_tokens": 20}'

One process, two threads: thimble/engine.py batches all requests and owns the model; the event loop here speaks HTTP.
It needs a few more packages than training does: pip install -r requirements-serve.txt.
"""
import asyncio
import base64
import collections
import hashlib
import json
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from thimble import chat, configurator
from thimble.engine import SECONDS, Engine, Sequence
from thimble.files import UserError
from thimble.load import load
from thimble.tokenizer import ByteStream

try:
    from pydantic import AfterValidator, BaseModel, Field, ValidationError
    from pydantic_core import from_json
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response
    from starlette.routing import Route

    from thimble.http import ApiError, Guard, Uvicorn, is_loopback, listen, reply, respond
except ImportError as e:
    raise SystemExit(f"error: serve.py needs more packages ({e}): pip install -r requirements-serve.txt") from None

PAGE = Path(__file__).resolve().parent / "web" / "serve.html"


@dataclass(frozen=True)
class Config:
    # model
    checkpoint: str = ""            # run, checkpoint, Hugging Face folder or name, or GGUF file; empty: the newest run
    which: Literal["best", "latest"] = "best"  # checkpoint of the run
    name: str = ""                  # model name in the API; empty: the name of the run or file
    template: Literal[("auto", *chat.TEMPLATES)] = "auto"  # chat template; auto: the one used in training
    device: str = "cpu"             # cpu, cuda, mps, ...
    # network
    host: str = "127.0.0.1"         # address to listen on; one that other machines can reach needs an API key
    port: int = 8000                # 0: any free port
    api_key: str = ""               # required as a bearer token; empty: environment variable THIMBLE_API_KEY
    allow_origin: tuple[str, ...] = ()  # origins, separated by commas, whose web pages may use the API: https://a.example
    # limits
    max_batch: int = 16             # texts generated at the same time
    max_queue: int = 64             # texts waiting for their turn; further requests get status 429
    max_tokens: int = 0             # longest answer; 0: up to the end of the context
    max_body: int = 1_000_000       # largest request body in bytes
    client_seconds: float = 10.0    # for a client to send its headers, the same for the body, and to read what is sent
    request_seconds: float = 120.0  # for an answer, including the wait for its turn
    drain_seconds: float = 8.0      # for running answers to finish after SIGTERM
    log: bool = True                # one line per request, without its text

    def __post_init__(self):
        configurator.check(self, ("max_batch", "max_queue", "max_body", "client_seconds", "request_seconds"))
        if self.port > 65535:
            raise ValueError(f"port={self.port} must be in [0, 65535]")
        for origin in self.allow_origin:
            if not re.fullmatch(r"https?://[^/\s*]+", origin):
                raise ValueError(f"allow_origin={origin} must be scheme and host, like https://app.example:8080")


def event(body):
    """One server-sent event."""
    return f"data: {json.dumps(body)}\n\n".encode()


# ---- request bodies
# They check what comes in and are the schema of /openapi.json, of which a docstring here would become a part.
# A field that is null counts as absent. Fields of OpenAI's API that we lack are accepted with the values that change
# nothing, since clients send these as well. fail_fast, because a body of 1 MB can hold a million errors.
class Strict(BaseModel, extra="forbid", strict=True, allow_inf_nan=False):  # strict: "1" and true are not 1
    pass


class Body(Strict):
    model: str = Field("", max_length=1000)  # must be empty or the server's, see Server.read


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


NotEmpty = Field(min_length=1, fail_fast=True)
Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], NotEmpty]
Stop = Annotated[str, Field(max_length=256)]
BiasId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]  # keys of JSON are strings
Bias = Annotated[float, Field(ge=-100, le=100)]
Metadata = Annotated[dict[str, str], Field(max_length=16, fail_fast=True)]  # as in OpenAI's API


def none_of_them(values):
    if values:
        raise ValueError("not supported by this server")
    return values


Nothing = Annotated[list, AfterValidator(none_of_them)]


class Generation(Body):
    n: int = Field(1, ge=1, le=16)
    max_tokens: Id | None = None
    temperature: float = Field(1, ge=0, le=2)
    top_p: float = Field(1, ge=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)  # 0 and, as in vLLM, -1: off
    min_p: float = Field(0, ge=0, le=1)
    repetition_penalty: float = Field(1, ge=0.01, le=100)
    presence_penalty: float = Field(0, ge=-2, le=2)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: dict[BiasId, Bias] = Field({}, max_length=1000, fail_fast=True)
    seed: int | None = Field(None, ge=-2**63, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = Field("", max_length=1000)  # accepted and ignored

    @property
    def stops(self):
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def bias(self):
        return {int(token): bias for token, bias in self.logit_bias.items()}

    @property
    def sampling(self):
        """Keywords of generate.filter_logits."""
        return {"temperature": self.temperature, "top_k": max(0, self.top_k), "min_p": self.min_p,
                "top_p": max(1e-9, self.top_p),  # 0 would leave no token at all
                "repetition_penalty": self.repetition_penalty}


class Completion(Generation):
    prompt: str | Ids | Annotated[list[str], NotEmpty] | Annotated[list[Ids], NotEmpty]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: Literal[1] = 1
    suffix: Literal[""] = ""


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], NotEmpty]
    name: str | None = None  # accepted and ignored
    annotations: Nothing = []  # the answers of OpenAI's own models have it


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatCompletion(Generation):
    messages: list[Message] = Field(min_length=1, max_length=1000, fail_fast=True)
    max_completion_tokens: Id | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    # accepted with the values that change nothing
    tools: Nothing = []
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], NotEmpty] = ["text"]
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    # accepted and ignored
    metadata: Metadata = {}
    prompt_cache_key: str = Field("", max_length=1000)
    safety_identifier: str = Field("", max_length=1000)


class Tokenize(Body):
    prompt: str
    add_special_tokens: bool = True  # bos, where the model was trained with it in front of every text


class Detokenize(Body):
    tokens: list[Id] = Field(fail_fast=True)


BODIES = {"/v1/completions": Completion, "/v1/chat/completions": ChatCompletion, "/tokenize": Tokenize,
          "/detokenize": Detokenize}


def without_nulls(value):
    """Parsed JSON without the fields that are null, at any depth."""
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return value


def describe(errors):
    """pydantic's errors as one line, each with the place in the body that it is about."""
    reasons = {}  # place, a tuple of keys and indices -> what is wrong there
    for error in errors:
        # where a field may have one of several types, pydantic tries each and names it in the path: list[str]
        place = tuple(key for key in error["loc"] if not re.search(r"\[|^(constrained-)?str$", str(key)))
        known = reasons.setdefault(place, [])
        if error["msg"] not in known:
            known.append(error["msg"])
    messages = []
    for place, known in reasons.items():
        # the type whose check came further is the one that was meant
        further = any(len(other) > len(place) and other[:len(place)] == place for other in reasons)
        if not further:
            messages.append(f"{'.'.join(map(str, place))}: {' or '.join(known)}")
    return "; ".join(messages)


def parse(body, kind):
    """bytes -> an instance of `kind`, a class of BODIES; ApiError 400 if they are not one."""
    # unlike json.loads it refuses lone surrogates, and deep nesting without a RecursionError
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as e:
        raise ApiError(400, f"the body is not valid JSON: {e}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    given = without_nulls(value)
    # refused here and not by pydantic, to have a code of their own
    unknown = [key[:50] for key in given if key not in kind.model_fields]
    if unknown:
        raise ApiError(400, f"unknown fields: {', '.join(unknown[:5])}", unknown[0], "unknown_field")
    try:
        return kind.model_validate(given)
    except ValidationError as e:
        errors = e.errors(include_url=False, include_input=False, include_context=False)[:20]
    raise ApiError(400, describe(errors), str(errors[0]["loc"][0])[:100])


def schema(body):
    """(JSON schema of a class of BODIES, the schemas that it refers to); any optional field may be null."""
    out = body.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = out.pop("$defs", {})
    required = out.get("required", ())
    for name, part in out["properties"].items():
        if name not in required:
            out["properties"][name] = {"anyOf": [part, {"type": "null"}]}
    return out, parts


# ---- routes
def read_page():
    """(the page, a Content-Security-Policy that allows its own script and style and nothing else)."""
    page = PAGE.read_text(encoding="utf-8")
    rules = ["default-src 'none'"]
    for tag in ("script", "style"):
        # hashed instead of 'unsafe-inline': a script that gets into the page by some mistake does not run
        inline = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        rules.append(f"{tag}-src 'sha256-{digest}'")
    rules += ["connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    return page, "; ".join(rules)


def histogram_lines(name, histogram):
    """An engine.Histogram in Prometheus' text format, in which a bucket contains all below it."""
    lines = [f"# TYPE thimble_{name} histogram"]
    total = 0
    for end, count in zip((*SECONDS, "+Inf"), histogram.counts, strict=True):
        total += count
        lines.append(f'thimble_{name}_bucket{{le="{end}"}} {total}')
    return [*lines, f"thimble_{name}_sum {histogram.sum:.6f}", f"thimble_{name}_count {total}"]


class Server:
    """The routes, as an ASGI application `app`. UserError where other machines could connect without a key."""

    def __init__(self, cfg, loaded):
        self.cfg = cfg
        self.tokenizer = loaded.tokenizer
        self.template = loaded.template
        self.name = cfg.name or loaded.name
        self.created = int(time.time())
        self.requests = collections.Counter()  # (path, status) -> how many, for /metrics
        self.engine = Engine(loaded.model, loaded.tokenizer, loaded.answer_ids, cfg.max_batch)
        # the pieces of a byte-level tokenizer are bytes, perhaps half of a character; those of others are text
        self.by_bytes = isinstance(self.tokenizer.stream(), ByteStream)
        self.page, self.policy = read_page()
        key = cfg.api_key or os.environ.get("THIMBLE_API_KEY", "")
        self.key = key.strip().encode()  # a header cannot carry the line end of a file that the key was read from
        if key and not re.fullmatch(r"[^\x00-\x1f\x7f]+", key.strip()):
            raise UserError("the API key is blank or has a control character in it, which no client can send")
        self.origins = {origin.lower() for origin in cfg.allow_origin}
        self.local = is_loopback(cfg.host.strip("[]"))
        if not self.key and not self.local:
            raise UserError(f"--host={cfg.host} can be reached by other machines: set an API key (THIMBLE_API_KEY)")
        gets = {"/": self.index, "/health": self.health, "/v1/models": self.models, "/v1/models/{id:path}": self.model,
                "/metrics": self.metrics, "/tokenizer_info": self.tokenizer_info, "/openapi.json": self.openapi}
        posts = {"/v1/completions": self.completions, "/v1/chat/completions": self.chat_completions,
                 "/tokenize": self.tokenize, "/detokenize": self.detokenize}
        self.paths = {*gets, *posts}
        routes = [Route(path, endpoint) for path, endpoint in gets.items()]
        routes += [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()]
        # Starlette's own handlers answer in plain text
        handlers = dict.fromkeys((HTTPException, ApiError, UserError, Exception), respond)
        middleware = [Middleware(Guard, self)]
        if self.origins:
            # before the Guard, since a browser asks without the key, and reads an error only with these headers
            cors = Middleware(CORSMiddleware, self.origins, ["GET", "POST"], ["*"], expose_headers=["Retry-After"])
            middleware.insert(0, cors)
        self.app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)

    async def index(self, request):
        headers = {"Content-Security-Policy": self.policy, "X-Content-Type-Options": "nosniff",
                   "Referrer-Policy": "no-referrer"}
        return Response(self.page, media_type="text/html", headers=headers)

    async def health(self, request):
        return reply({"status": "ok"})

    async def models(self, request):
        return reply({"object": "list", "data": [self.about()]})

    async def model(self, request):
        self.check_model(request.path_params["id"])
        return reply(self.about())

    def about(self):
        """The model as /v1/models describes it."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "thimble",
                "max_model_len": self.engine.size}

    def check_model(self, name):
        if name != self.name:
            message = f"the model {name[:100]!r} does not exist; this server has {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    async def metrics(self, request):
        """Prometheus' text format."""
        # read without a lock while the engine counts on: two numbers may be a token apart
        engine = self.engine
        counts = engine.counts
        lines = []
        for name, value in (("requests_running", engine.n_running), ("requests_waiting", len(engine.waiting))):
            lines += [f"# TYPE thimble_{name} gauge", f"thimble_{name} {value}"]
        for name in ("prompt_tokens", "prompt_tokens_reused", "generated_tokens", "steps", "failures"):
            lines += [f"# TYPE thimble_{name}_total counter", f"thimble_{name}_total {counts[name]}"]
        lines += histogram_lines("first_token_seconds", engine.first_token)
        lines += histogram_lines("inter_token_seconds", engine.inter_token)
        lines.append("# TYPE thimble_requests_total counter")
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'thimble_requests_total{{path="{path}",status="{status}"}} {count}')
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    # The next three have the names and keys of vLLM's API: lm-eval counts tokens with them.

    async def tokenizer_info(self, request):
        tokenizer = self.tokenizer
        return reply({"name": tokenizer.name, "kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size,
                      "eos_token": self.token(tokenizer.eot), "eos_token_id": tokenizer.eot,
                      "template": self.template})

    async def tokenize(self, request):
        asked = await self.read(request)
        eot = self.tokenizer.eot
        if asked.prompt == self.token(eot):  # alone, it is the special token, not text: so lm-eval asks for its id
            ids = [eot]
        else:
            ids = await self.encode(asked.prompt, self.tokenizer.encode)
            if asked.add_special_tokens and self.tokenizer.record.adds_bos:
                ids = [self.tokenizer.record.bos, *ids]
        return reply({"count": len(ids), "max_model_len": self.engine.size, "tokens": ids})

    async def detokenize(self, request):
        tokens = (await self.read(request)).tokens
        self.check_ids(tokens, "tokens")
        return reply({"prompt": self.tokenizer.decode(tokens, skip_special=False)})

    async def openapi(self, request):
        schemas = {"Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}}
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        error = {"description": "an error", "content": content}
        responses = {"200": {"description": "ok"}}
        for status in (400, 401, 403, 404, 408, 413, 415, 429, 500):
            responses[str(status)] = error
        paths = {}
        for path in sorted(self.paths - set(BODIES)):
            paths[path] = {"get": {"responses": responses}}
        one = paths.pop("/v1/models/{id:path}")
        parameter = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        paths["/v1/models/{id}"] = one | {"parameters": [parameter]}
        for path, body in BODIES.items():
            own, parts = schema(body)
            schemas |= parts
            request_body = {"required": True, "content": {"application/json": {"schema": own}}}
            paths[path] = {"post": {"requestBody": request_body, "responses": responses}}
        components = {"schemas": schemas}
        security = []
        if self.key:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            security = [{"key": []}]
        return reply({"openapi": "3.1.0", "info": {"title": "Thimble", "version": "1"}, "paths": paths,
                      "components": components, "security": security})

    async def read(self, request):
        """The checked body of a request: an instance of its class in BODIES."""
        # a web page can send other types across origins without asking first; JSON it cannot
        kind = request.headers.get("content-type", "").partition(";")[0]
        if kind.strip().lower() != "application/json":
            raise ApiError(415, "Content-Type must be application/json")
        limit = self.cfg.max_body
        too_large = ApiError(413, f"the body is larger than {limit:,} bytes", unread=True)
        if int(request.headers.get("content-length", 0)) > limit:  # h11 has checked that it is a number
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.cfg.client_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise too_large
        except ClientDisconnect:  # nobody reads this, but it ends the request quietly
            raise ApiError(400, "the client disconnected") from None
        except TimeoutError:
            message = f"the body did not arrive within {self.cfg.client_seconds:g} s"
            raise ApiError(408, message, unread=True) from None
        asked = parse(bytes(body), BODIES[request.url.path])
        if asked.model:
            self.check_model(asked.model)
        return asked

    async def encode(self, text, encode):
        """What one of the tokenizer's two ways to encode makes of a text."""
        if len(text) > 10_000:  # takes so long that the event loop should not wait for it
            return await asyncio.to_thread(encode, text)
        return encode(text)

    def check_ids(self, ids, param):
        vocab_size = self.tokenizer.vocab_size
        for i in ids:
            if i >= vocab_size:
                raise ApiError(400, f"{param}: token id {i} is outside the vocabulary of {vocab_size} tokens", param)

    def token(self, i):
        """A token as the API shows it: as text, or by its bytes if they are not a whole character."""
        raw = self.raw(i)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def raw(self, i):
        """The bytes of a token."""
        if self.by_bytes:
            return self.tokenizer.pieces[i]
        return self.tokenizer.decode([i], skip_special=False).encode()

    async def completions(self, request):
        asked = await self.read(request)
        prompts = asked.prompt
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        most = self.cfg.max_queue
        if len(prompts) * asked.n > most:
            raise ApiError(400, f"{len(prompts)} prompts x n={asked.n} exceed the limit of {most} texts", "n")
        inputs = []
        for prompt in prompts:
            if isinstance(prompt, str):
                text = prompt
                ids = await self.encode(text, self.tokenizer.encode_prompt)
            else:
                self.check_ids(prompt, "prompt")
                text = self.tokenizer.decode(prompt, skip_special=False)
                ids = prompt
            inputs.append((ids, text if asked.echo else None))
        max_tokens = 16 if asked.max_tokens is None else asked.max_tokens  # 16 is OpenAI's default
        return self.answer(asked, inputs, max_tokens, asked.logprobs, Answer)

    async def chat_completions(self, request):
        asked = await self.read(request)
        messages = []
        for message in asked.messages:
            content = message.content
            if not isinstance(content, str):
                content = "".join(part.text for part in content)
            role = "system" if message.role == "developer" else message.role  # OpenAI's newer name for it
            messages.append({"role": role, "content": content})
        if asked.top_logprobs and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        # in a thread, as a conversation can be long
        ids = await asyncio.to_thread(chat.prompt, self.tokenizer, messages, self.template)
        limits = [limit for limit in (asked.max_completion_tokens, asked.max_tokens) if limit is not None]
        max_tokens = min(limits, default=self.engine.size)
        top = asked.top_logprobs if asked.logprobs else None
        return self.answer(asked, [(ids, None)], max_tokens, top, ChatAnswer)

    def answer(self, asked, inputs, max_tokens, top, kind):
        """Queue n texts for each input, (ids, echo or None) -> the Answer, of class `kind`, that will send them."""
        size = self.engine.size
        if asked.stream_options and not asked.stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options")
        longest = max(len(ids) for ids, _ in inputs)
        if longest > size:
            message = f"the prompt has {longest} tokens, but the context of this model holds {size}"
            param = "prompt" if kind is Answer else "messages"
            raise ApiError(400, message, param, "context_length_exceeded")
        if max_tokens < 1 and inputs[0][1] is None:
            raise ApiError(400, "max_tokens must be at least 1; 0 is allowed only with echo", "max_tokens")
        bias = asked.bias
        self.check_ids(bias, "logit_bias")
        queue = asyncio.Queue()  # one for all texts of a request
        sequences = []
        for ids, echo in inputs:
            # the last token written needs no place in the context: nothing is read after it
            room = min(max_tokens, self.cfg.max_tokens or size, size - len(ids) + 1)
            for j in range(asked.n):
                # a seed of its own for each of the n texts
                seed = secrets.randbits(63) if asked.seed is None else (asked.seed + j) % 2**63
                sequences.append(Sequence(
                    ids, room, self.tokenizer.stream(), seed, asked.sampling, bias, asked.presence_penalty,
                    asked.frequency_penalty, asked.stops, echo=echo, top=top, queue=queue, index=len(sequences)))
        if not self.engine.submit(sequences, self.cfg.max_queue):
            message = f"the queue is full ({self.cfg.max_queue} texts): try again in a second"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        n_prompt_tokens = sum(len(ids) for ids, _ in inputs)
        return kind(self, asked, queue, sequences, n_prompt_tokens)


# ---- answers
async def disconnected(receive):
    """Returns once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Answer:
    """An ASGI application that sends what the engine puts into the queue, in the shape of /v1/completions: as a whole
    or as events, until every text has ended or the client has gone.
    """

    prefix = "cmpl-"
    kind = "text_completion"
    part_kind = "text_completion"  # of an event

    def __init__(self, server, asked, queue, sequences, n_prompt_tokens):
        self.server = server
        self.asked = asked
        self.queue = queue
        self.sequences = sequences
        self.n_prompt_tokens = n_prompt_tokens
        self.with_usage = asked.stream_options and asked.stream_options.include_usage
        # the same in all events of an answer
        self.common = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()), "model": server.name,
                       "object": self.part_kind if asked.stream else self.kind}

    async def __call__(self, scope, receive, send):
        # whichever comes first: the end of the answer, the client's leaving, the deadline
        if self.asked.stream:
            scope["filler"] = b": \n\n"  # a comment, which may be written between two events, see Protocol.probe
        work = asyncio.create_task(self.stream(send) if self.asked.stream else self.whole())
        gone = asyncio.create_task(disconnected(receive))
        seconds = self.server.cfg.request_seconds
        try:
            await asyncio.wait((work, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            response = None  # stream() has sent its own
            if work.done():
                response = work.result()
            elif gone.done():
                scope["gone"] = True  # for the log
            else:
                error = ApiError(408, f"the answer took longer than {seconds:g} s", code="timeout")
                work.cancel()
                if self.asked.stream:  # its status 200 has been sent
                    await send({"type": "http.response.body", "body": event(error.body)})
                else:
                    response = error.response()
            if response:
                await response(scope, receive, send)
        finally:
            self.server.engine.cancel(self.sequences)
            work.cancel()
            gone.cancel()

    async def reports(self):
        """(index, text, entries, finish or None) from the engine, until every text has finished."""
        left = len(self.sequences)
        while left:
            index, text, entries, finish = await self.queue.get()
            if finish == "error":
                raise ApiError(500, "the model failed; see the server's log")
            if finish:
                left -= 1
            yield index, text, entries, finish

    async def whole(self):
        """-> the response with all texts."""
        texts = [""] * len(self.sequences)
        entries = [[] for _ in self.sequences]
        finishes = [None] * len(self.sequences)
        try:
            async for index, text, new_entries, finish in self.reports():
                texts[index] += text
                entries[index] += new_entries
                finishes[index] = finish
        except ApiError as e:
            return e.response()
        choices = []
        for index in range(len(self.sequences)):
            choices.append(self.choice(index, texts[index], entries[index], finishes[index]))
        return reply(self.common | {"usage": self.usage(), "choices": choices})

    async def stream(self, send):
        """Send the texts as server-sent events. Since status 200 is out already, an error is an event, too."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        out = self.head()
        try:
            async for index, text, entries, finish in self.reports():
                if text or entries or finish:  # not for a token that is held back
                    out += self.parts(index, text, entries, finish)
                if self.queue.empty():  # what is there already goes out in one write
                    body = b"".join(map(event, out))
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    out = []
            if self.with_usage:
                out.append(self.part([], usage=self.usage()))
            last = b"data: [DONE]\n\n"
        except ApiError as e:
            last = event(e.body)
        await send({"type": "http.response.body", "body": b"".join(map(event, out)) + last})

    def usage(self):
        n_written = sum(len(sequence.out) for sequence in self.sequences)
        return {"prompt_tokens": self.n_prompt_tokens, "completion_tokens": n_written,
                "total_tokens": self.n_prompt_tokens + n_written}

    def part(self, choices, **more):
        """The body of an event."""
        out = self.common | {"choices": choices}
        if self.with_usage:
            out["usage"] = None  # in all events but the last, as OpenAI does it
        return out | more

    def head(self):
        """Bodies of the events before the first text."""
        return []

    def parts(self, index, text, entries, finish):
        """Bodies of the events for one report of the engine."""
        return [self.part([self.choice(index, text, entries, finish)])]

    def choice(self, index, text, entries, finish):
        """One of the `choices` of a body, with the text of a whole answer or of one event."""
        return {"index": index, "text": text, "logprobs": self.logprobs(index, entries), "finish_reason": finish}

    def logprobs(self, index, entries):
        if self.sequences[index].top is None:
            return None
        token = self.server.token
        top_logprobs = []
        for entry in entries:
            if entry.top is None:
                top_logprobs.append(None)
            else:  # the chosen token is always among them, even if it is none of the most likely
                pairs = [*entry.top, (entry.token, entry.logprob)]
                top_logprobs.append({token(i): logprob for i, logprob in pairs})
        return {"tokens": [token(entry.token) for entry in entries],
                "text_offset": [entry.offset for entry in entries],
                "token_logprobs": [entry.logprob for entry in entries],
                "top_logprobs": top_logprobs}


class ChatAnswer(Answer):
    """The same in the shape of /v1/chat/completions."""

    prefix = "chatcmpl-"
    kind = "chat.completion"
    part_kind = "chat.completion.chunk"

    def head(self):
        # OpenAI names the role once, in an event of its own
        first = {"role": "assistant", "content": ""}
        return [self.part([self.delta(index, first) for index in range(len(self.sequences))])]

    def parts(self, index, text, entries, finish):
        out = []
        if text or entries:
            out.append(self.part([self.delta(index, {"content": text}, entries)]))
        if finish:  # also in an event of its own, behind the last text
            out.append(self.part([self.delta(index, {}, (), finish)]))
        return out

    def delta(self, index, delta, entries=(), finish=None):
        """One of the `choices` of an event."""
        return {"index": index, "delta": delta, "logprobs": self.logprobs(index, entries), "finish_reason": finish}

    def choice(self, index, text, entries, finish):
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self.logprobs(index, entries), "finish_reason": finish}

    def logprobs(self, index, entries):
        if self.sequences[index].top is None:
            return None
        content = []
        for entry in entries:
            top = [self.item(i, logprob) for i, logprob in entry.top]
            content.append(self.item(entry.token, entry.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def item(self, i, logprob):
        return {"token": self.server.token(i), "bytes": list(self.server.raw(i)), "logprob": logprob}


def build(cfg):
    """The Server of a Config. UserError if its model cannot be served."""
    return Server(cfg, load(cfg.checkpoint, cfg.which, cfg.device, cfg.template))


def main(cfg):
    Uvicorn(cfg, build(cfg)).run([listen(cfg)])


if __name__ == "__main__":
    configurator.run(main, Config)
