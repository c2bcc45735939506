"""The server as its clients see it: the official openai client, raw sockets, and the model itself as the reference."""
import asyncio
import http.client
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import openai
import pytest
import torch
from conftest import ROOT
from test_engine import KINDS, TOKENIZER, prompts, tiny
from tries import busy, tries

import serve
from thimble import chat, checkpoint
from thimble.files import UserError
from thimble.generate import generate
from thimble.load import Loaded


class Script:
    """A model that writes a given text, whatever it is asked; its cache has nothing but a position."""

    def __init__(self, text, seconds=0.0):
        self.config = SimpleNamespace(block_size=10_000)
        self.ids, self.seconds = [*text.encode(), TOKENIZER.eot], seconds

    def parameters(self):
        return iter([torch.zeros(1)])

    def init_cache(self, batch_size, max_len):
        return {"pos": torch.zeros((), dtype=torch.long)}

    def step(self, idx, cache):
        time.sleep(self.seconds)
        logits = torch.full((len(idx), TOKENIZER.vocab_size), -9.0)
        for row, pos in enumerate(cache["pos"].expand(len(idx)).tolist()):
            logits[row, self.ids[(pos + idx.size(1) - 1) % len(self.ids)]] = 9  # every prompt here has one token
        return logits, cache


def loaded(model, name="tiny"):
    stop_ids = {TOKENIZER.eot}
    return Loaded(Path(name), name, {}, model, TOKENIZER, "elite", stop_ids, stop_ids)


@contextmanager
def running(model, ours=None, **settings):
    """A server in a thread, of a model or one that is there -> (port, Server)."""
    if ours is None:
        ours = serve.Server(serve.Config(**{"port": 0, "log": False} | settings), loaded(model))
    theirs = serve.Uvicorn(ours.cfg, ours)
    ours.connections = theirs.server_state.connections
    thread = threading.Thread(target=theirs.run)
    thread.start()
    while not theirs.started:
        time.sleep(0.005)
    try:
        yield theirs.servers[0].sockets[0].getsockname()[1], ours
    finally:
        theirs.handle_exit(signal.SIGTERM, None)
        thread.join()


@pytest.fixture(scope="module")
def served():
    model = tiny()
    with running(model) as (port, ours), client(port) as api:
        yield SimpleNamespace(model=model, port=port, server=ours, engine=ours.engine, api=api)


def client(port, key="none"):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)


def ask(port, path, body=None, method=None, **headers):
    """-> (status, parsed or raw body, headers)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    if body is not None and not isinstance(body, (bytes, str)):
        body = json.dumps(body)
    headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    is_json = response.headers.get("content-type", "").startswith("application/json")
    return response.status, json.loads(raw) if is_json else raw.decode(), response.headers


def raw(port, *parts, wait=0.0):
    """Send bytes as they are -> all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as s:
        for part in parts:
            s.sendall(part)
            time.sleep(wait)
        out = b""
        while part := s.recv(65536):
            out += part
    return out


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


# ---- what is written
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_writes_what_each_would_alone(kind):
    model = tiny(kind)
    alone = [list(generate(model, ids, 1 + 5 * k % 40, None, (TOKENIZER.eot,), TOKENIZER.vocab_size,
                           temperature=0)) for k, ids in enumerate(prompts(20))]
    with running(model, max_batch=6) as (port, ours):
        def one(k):
            return ask(port, "/v1/completions", {"prompt": prompts(20)[k], "max_tokens": 1 + 5 * k % 40,
                                                 "temperature": 0, "stream": k % 2 == 1})
        with ThreadPoolExecutor(10) as pool:  # more clients than rows, which join and leave
            answers = list(pool.map(one, range(20)))
        assert not ours.engine.n_running and not ours.engine.filling and not ours.engine.waiting
        assert ours.engine.counts["steps"] < sum(map(len, alone)), "nothing was batched"
    for k, (status, body, _) in enumerate(answers):
        text = body["choices"][0]["text"] if k % 2 == 0 else "".join(
            choice["text"] for part in events(body) for choice in part["choices"])
        assert status == 200 and text == TOKENIZER.decode(alone[k])


def events(text):
    parts = text.split("\n\n")
    assert parts[-1] == "" and parts[-2] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


@pytest.mark.score("D8")
def test_streamed_is_not_streamed(served, count, score):
    cases = enumerate(prompts(count(20, 150)))
    tries(score, {case[0]: case for case in cases}, lambda case: completion_streams_as_it_is(served, *case))


def completion_streams_as_it_is(served, k, ids):
    how = {"model": "tiny", "max_tokens": 12, "seed": k, "temperature": k % 3 / 2, "logprobs": k % 2 or None}
    whole = served.api.completions.create(prompt=TOKENIZER.decode(ids), **how)
    parts = list(served.api.completions.create(prompt=TOKENIZER.decode(ids), stream=True, **how,
                                               stream_options={"include_usage": True}))
    choices = [part.choices[0] for part in parts if part.choices]
    assert "".join(c.text for c in choices) == whole.choices[0].text
    assert [c.finish_reason for c in choices][-1] == whole.choices[0].finish_reason
    assert parts[-1].usage == whole.usage and whole.usage.prompt_tokens == len(ids)
    assert not parts[-1].choices and all(part.usage is None for part in parts[:-1])
    if k % 2:
        streamed = [p for c in choices for p in c.logprobs.token_logprobs]
        assert streamed == pytest.approx(whole.choices[0].logprobs.token_logprobs, abs=1e-5)
        assert len(whole.choices[0].logprobs.tokens) == whole.usage.completion_tokens


@pytest.mark.score("D8")
def test_chat_streamed_is_not_streamed(served, count, score):
    seeds = range(count(8, 50))
    tries(score, {seed: seed for seed in seeds}, lambda seed: chat_streams_as_it_is(served, seed))
    prompt = chat.prompt(TOKENIZER, [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}], "elite")
    assert chat_streams_as_it_is(served, 0).prompt_tokens == len(prompt)


def chat_streams_as_it_is(served, seed):
    """-> the usage that the answer reports."""
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    how = {"model": "tiny", "messages": messages, "max_completion_tokens": 9, "seed": seed, "logprobs": True,
           "top_logprobs": 2}
    whole = served.api.chat.completions.create(**how)
    parts = list(served.api.chat.completions.create(stream=True, stream_options={"include_usage": True}, **how))
    assert parts[0].choices[0].delta.role == "assistant" and whole.choices[0].message.role == "assistant"
    deltas = [part.choices[0] for part in parts if part.choices]
    assert "".join(c.delta.content or "" for c in deltas) == whole.choices[0].message.content
    entries = [entry for c in deltas if c.logprobs for entry in c.logprobs.content]
    expected = whole.choices[0].logprobs.content
    assert [e.token for e in entries] == [e.token for e in expected]
    assert len(entries) == whole.usage.completion_tokens
    assert [e.logprob for e in entries] == pytest.approx([e.logprob for e in expected], abs=1e-5)
    assert all(len(e.top_logprobs) == 2 for e in entries)
    assert parts[-1].usage == whole.usage and deltas[-1].finish_reason == whole.choices[0].finish_reason
    return whole.usage


# ---- the official clients
HARMLESS = {"completions": {"best_of": 1, "suffix": "", "user": "me"},
            "chat": {"tools": [], "tool_choice": "none", "parallel_tool_calls": False, "modalities": ["text"],
                     "response_format": {"type": "text"}, "store": False, "service_tier": "auto",
                     "metadata": {"a": "b"}, "prompt_cache_key": "a", "safety_identifier": "b", "user": "me"}}
UNSUPPORTED = {"completions": {"best_of": 2, "suffix": "x"},
               "chat": {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required",
                        "response_format": {"type": "json_object"}, "store": True, "service_tier": "flex",
                        "modalities": ["text", "audio"], "functions": [], "prediction": {"type": "content"},
                        "reasoning_effort": "high", "audio": {"voice": "a"}, "web_search_options": {}}}


def creating(api, path):
    """-> (a client's function that asks, what it needs)."""
    if path == "chat":
        return api.chat.completions.create, {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "seed": 1}
    return api.completions.create, {"model": "tiny", "prompt": "a", "seed": 1}


def told(answer):
    return answer.choices[0].model_dump()


@pytest.mark.parametrize("path", ["completions", "chat"])
def test_what_a_client_sends_without_wanting_anything_changes_nothing(served, path):
    create, needed = creating(served.api, path)
    expected = told(create(**needed))
    own = {"extra_headers", "extra_query", "extra_body", "timeout", "stream"}  # not sent, or of another type
    nulls = dict.fromkeys(inspect.signature(create).parameters.keys() - own - needed.keys())
    assert len(nulls) > 10 and told(create(**needed, **nulls)) == expected
    assert told(create(**needed, extra_body={"new_in_the_next_version": None})) == expected
    for key, value in HARMLESS[path].items():
        assert told(create(**needed, **{key: value})) == expected
    assert told(create(**needed, **HARMLESS[path])) == expected


@pytest.mark.parametrize("path, key", [(path, key) for path in UNSUPPORTED for key in UNSUPPORTED[path]])
def test_what_would_change_the_answer_and_is_not_supported_is_refused(served, path, key):
    create, needed = creating(served.api, path)
    with pytest.raises(openai.BadRequestError, match=f"{key}[:.]|unknown fields: {key}") as e:
        create(**needed, **{key: UNSUPPORTED[path][key]})
    assert e.value.param == key


@pytest.mark.parametrize("back", [
    lambda message: message, lambda message: message.model_dump(), lambda message: message.to_dict(),
    lambda message: message.model_dump() | {"annotations": []},  # as OpenAI's own models answer
    lambda message: {"role": message.role, "content": [{"type": "text", "text": message.content}]}])
def test_a_conversation_of_the_clients_own_messages(served, back):
    messages = [{"role": "user", "content": "a"}]
    for turn in range(3):
        how = {"model": "tiny", "max_tokens": 3, "seed": turn}
        answer = served.api.chat.completions.create(messages=messages, **how)
        plain = [{"role": m["role"] if isinstance(m, dict) else m.role, "content": text}
                 for m, text in zip(messages, texts_of(messages), strict=True)]
        assert told(served.api.chat.completions.create(messages=plain, **how)) == told(answer)
        messages += [back(answer.choices[0].message), {"role": "user", "content": "b"}]


def texts_of(messages):
    contents = [m["content"] if isinstance(m, dict) else m.content for m in messages]
    return [content if isinstance(content, str) else content[0]["text"] for content in contents]


def test_the_clients_own_stream_helper(served):
    messages = [{"role": "user", "content": "a"}]
    with served.api.chat.completions.stream(model="tiny", messages=messages, max_tokens=5, seed=1) as stream:
        streamed = stream.get_final_completion().choices[0].message
    whole = served.api.chat.completions.create(model="tiny", messages=messages, max_tokens=5, seed=1).choices[0].message
    assert streamed.content == whole.content and streamed.refusal is whole.refusal is None
    messages += [streamed, {"role": "user", "content": "b"}]
    assert served.api.chat.completions.create(model="tiny", messages=messages, max_tokens=2).choices


NODE = """
import OpenAI from "openai";
const api = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = (await api.models.retrieve("tiny")).id;
const messages = [{ role: "user", content: "a" }];
for (let seed = 0; seed < 3; seed++) {
  const how = { model, messages, seed, max_tokens: 3, store: false, tools: null, response_format: { type: "text" } };
  const whole = (await api.chat.completions.create(how)).choices[0].message;
  let text = "";
  for await (const part of await api.chat.completions.create({ ...how, stream: true }))
    text += part.choices[0]?.delta?.content ?? "";
  const helped = await api.chat.completions.stream(how).finalMessage();
  if (text !== whole.content || helped.content !== whole.content) throw new Error("streamed differs");
  messages.push(seed % 2 ? helped : whole, { role: "user", content: "b" });
}
const error = await api.completions.create({ model: "other", prompt: "a" }).catch(e => e);
if (!(error instanceof OpenAI.NotFoundError) || error.code !== "model_not_found") throw error;
console.log("ok", messages.length);
"""


@pytest.mark.slow
def test_the_client_for_node(served, tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    installed = subprocess.run(["npm", "install", "--silent", "openai"], cwd=tmp_path, timeout=120)
    if installed.returncode:
        pytest.skip("npm cannot install openai here")
    (tmp_path / "talk.mjs").write_text(NODE)
    command = ["node", "talk.mjs", f"http://127.0.0.1:{served.port}/v1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "ok 7\n", done.stderr


@torch.no_grad()
def test_logprobs_are_those_of_a_forward_pass(served):
    """As lm-eval asks: echo, one more token, ids as the prompt; and with more tokens, which go through the cache."""
    for n, ids in zip((0, 1, 1, 8), prompts(4), strict=True):
        answer = served.api.completions.create(model="tiny", prompt=ids, max_tokens=n, echo=True, logprobs=3,
                                               temperature=0).choices[0]
        given, text = answer.logprobs, answer.text
        written = list(generate(served.model, ids, n, None, (), TOKENIZER.vocab_size, temperature=0))
        logp = served.model(torch.tensor([ids + written]))[0][0].log_softmax(-1)
        assert given.token_logprobs[0] is None and given.top_logprobs[0] is None
        assert len(given.tokens) == len(ids) + n
        for i, token in enumerate((ids + written)[1:], 1):
            assert abs(given.token_logprobs[i] - logp[i - 1, token].item()) < 1e-4
            top = logp[i - 1].topk(3)
            best = sorted(given.top_logprobs[i].values(), reverse=True)[:3]
            assert torch.allclose(torch.tensor(best), top.values, atol=1e-4)
        for token, offset in zip(given.tokens, given.text_offset, strict=True):
            assert token.startswith("bytes:") or text[offset:].startswith(token)


def test_chats_continue_from_what_a_row_holds():
    for kind in ("dense", "hybrid"):
        model, ids = tiny(kind), prompts(1)[0] * 30
        with running(model, max_batch=2) as (port, ours):
            for _ in range(3):
                answer = ask(port, "/v1/completions", {"prompt": ids, "max_tokens": 5, "temperature": 0,
                                                       "logprobs": 0})[1]["choices"][0]
                new = list(generate(model, ids, 5, None, (), TOKENIZER.vocab_size, temperature=0))
                assert answer["text"] == TOKENIZER.decode(new)
                logp = model(torch.tensor([ids + new]))[0][0].log_softmax(-1)[len(ids) - 1:]
                expected = [logp[i, token].item() for i, token in enumerate(new)]
                assert answer["logprobs"]["token_logprobs"][:len(new)] == pytest.approx(expected, abs=1e-4)
                ids = ids + new + prompts(3)[2]
            assert ours.engine.counts["prompt_tokens_reused"] > 60


def test_n_and_seed(served):
    how = {"model": "tiny", "prompt": ["abc", "de"], "n": 3, "seed": 5, "max_tokens": 10, "temperature": 1.5}
    first, again = (served.api.completions.create(**how) for _ in range(2))
    texts = [c.text for c in sorted(first.choices, key=lambda c: c.index)]
    assert texts == [c.text for c in sorted(again.choices, key=lambda c: c.index)]
    assert len(texts) == 6 and len(set(texts)) > 3
    alone = served.api.completions.create(**how | {"prompt": "de", "n": 1, "seed": 6}).choices[0].text
    assert alone == texts[4]  # whatever else is in the batch


def test_sampling_settings(served):
    def text(**how):
        body = {"prompt": "abc", "max_tokens": 12, "temperature": 0, **how}
        return ask(served.port, "/v1/completions", body)[1]["choices"][0]["text"]

    assert text(logit_bias={"120": 100}) == "x" * 12
    assert text(temperature=2, top_k=1, seed=1) == text() == text(temperature=2, top_p=0, seed=1)
    assert text(temperature=2, seed=1) != text()
    assert text(max_tokens=1000, stop=None, logit_bias={"120": 100}) == "x" * (96 - 3 + 1)  # the context's end


def test_penalties_and_bias_by_hand():
    with running(Script("a" * 99)) as (port, _):  # log-odds of a: 9, all others: -9
        def text(**how):
            body = {"prompt": "x", "max_tokens": 8, "temperature": 0, "logit_bias": {"98": 17}, **how}  # b: 8
            return ask(port, "/v1/completions", body)[1]["choices"][0]["text"]

        assert text() == "aaaaaaaa" and text(frequency_penalty=2) == "abababab"
        assert text(presence_penalty=2) == "abaaaaaa"
        assert text(logit_bias={"98": 19}) == "bbbbbbbb"


# ---- text
@pytest.mark.score("D8")
@pytest.mark.parametrize("stream", [False, True])
def test_characters_and_stop_texts_across_tokens(stream):
    with running(Script("a🎉b né STOPPED")) as (port, _):
        def text(**how):
            body = {"prompt": "x", "max_tokens": 100, "stream": stream, **how}
            answer = ask(port, "/v1/completions", body)[1]
            parts = [part["choices"][0] for part in events(answer)] if stream else answer["choices"]
            assert not any("\ufffd" in part["text"] for part in parts[:-1])
            return "".join(part["text"] for part in parts), parts[-1]["finish_reason"]

        assert text() == ("a🎉b né STOPPED", "stop")  # by the end-of-text token
        assert text(max_tokens=3) == ("a\ufffd", "length")  # half of a character
        assert text(stop="STOP") == ("a🎉b né ", "stop")
        assert text(stop=["nothing", "né S", "STOP"]) == ("a🎉b ", "stop")
        assert text(stop="🎉") == ("a", "stop")
        assert text(stop="STOPPED!") == ("a🎉b né STOPPED", "stop")
        assert text(stop="") == ("a🎉b né STOPPED", "stop")
        assert text(stop="STOP", max_tokens=14) == ("a🎉b né STO", "length")  # held back, then shown


# ---- limits
HOSTILE = [
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt":' * 5000, b'{"prompt": NaN}',
    b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "max_tokens": 1e999}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "\\ud800"}', b'{"prompt": "a", "stop": "\\ud800"}',
    b'{"prompt": "a", "\\ud800": 1}', b'{"prompt": "a", "model": "\\udfff"}',
    {}, {"prompt": None}, {"prompt": 5}, {"prompt": True}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [None]},
    {"prompt": [1, "a"]}, {"prompt": [True]}, {"prompt": [1.5]}, {"prompt": [-1]}, {"prompt": [10**30]},
    {"prompt": [257]}, {"prompt": [[1], ["a"]]}, {"prompt": {"a": 1}}, {"prompt": "a" * 97}, {"prompt": [97] * 97},
    {"prompt": ["a"] * 65}, {"prompt": [["a"]]}, {"prompt": "a", "nix": 1}, {"prompt": "a", "n_discard": -1},
    {"prompt": "a", "tools": []}, {"prompt": "a", "chat_template_kwargs": {"a": 1}}, {"prompt": "a", "suffix": "b"},
    {"prompt": "a", "n": 10**6}, {"prompt": "a", "n": 0}, {"prompt": "a", "n": -1}, {"prompt": "a", "n": "1"},
    {"prompt": "a", "n": True}, {"prompt": "a", "n": 1.5}, {"prompt": ["a"] * 30, "n": 16},
    {"prompt": "a", "best_of": 5},
    {"prompt": "a", "max_tokens": -1}, {"prompt": "a", "max_tokens": 0}, {"prompt": "a", "max_tokens": 2**40},
    {"prompt": "a", "max_tokens": "9"}, {"prompt": "a", "temperature": -1}, {"prompt": "a", "temperature": 99},
    {"prompt": "a", "temperature": "hot"}, {"prompt": "a", "top_p": -0.1}, {"prompt": "a", "top_p": 2},
    {"prompt": "a", "top_k": -2}, {"prompt": "a", "min_p": 2}, {"prompt": "a", "repetition_penalty": 0},
    {"prompt": "a", "presence_penalty": 3}, {"prompt": "a", "frequency_penalty": -3}, {"prompt": "a", "seed": 2**70},
    {"prompt": "a", "seed": 1.5}, {"prompt": "a", "logprobs": 21}, {"prompt": "a", "logprobs": True},
    {"prompt": "a", "logit_bias": {"x": 1}}, {"prompt": "a", "logit_bias": {"257": 1}},
    {"prompt": "a", "logit_bias": []},
    {"prompt": "a", "logit_bias": {"-1": 1}}, {"prompt": "a", "logit_bias": {"1": 1e9}},
    {"prompt": "a", "logit_bias": {"²": 1}}, {"prompt": "a", "stop": 5}, {"prompt": "a", "stop": ["a"] * 9},
    {"prompt": "a", "stop": "a" * 257}, {"prompt": "a", "stop": [1]}, {"prompt": "a", "stream": "yes"},
    {"prompt": "a", "stream_options": {"include_usage": True}}, {"prompt": "a", "stream": True, "stream_options": 5},
    {"prompt": "a", "stream": True, "stream_options": {"x": 1}}, {"prompt": "a", "echo": 1},
    {"prompt": "a", "model": "b"},
    {"prompt": "a", "user": {}}, {"prompt": "a", "model": 5},
]
HOSTILE_CHAT = [
    {}, {"messages": []}, {"messages": "hi"}, {"messages": [5]}, {"messages": [{}]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": "tool", "content": "a"}]}, {"messages": [{"role": ["user"], "content": "a"}]},
    {"messages": [{"role": "user", "content": None}]}, {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
    {"messages": [{"role": "user", "content": "a", "tool_calls": []}]},
    {"messages": [{"role": "user", "content": "a"}] * 1001},
    {"messages": [{"role": "user", "content": "a" * 100}]}, {"messages": [{"role": "user", "content": "\ud800"}]},
    {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3},
    {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": -1},
    {"messages": [{"role": "user", "content": "a"}], "logprobs": 3},
    {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema"}},
    {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 0},
]


REQUESTS = [("/v1/completions", b) for b in HOSTILE] + [("/v1/chat/completions", b) for b in HOSTILE_CHAT]
REQUESTS += [("/tokenize", {}), ("/tokenize", {"prompt": "\ud800"}), ("/detokenize", {"tokens": [999]}),
             ("/detokenize", {"tokens": "a"}), ("/detokenize", {"tokens": [-1]})]


@pytest.mark.parametrize("path, body", REQUESTS, ids=lambda b: str(b)[:40])
def test_a_hostile_request_gets_a_clear_error(served, path, body):
    status, answer, _ = ask(served.port, path, body)
    other_model = isinstance(body, dict) and body.get("model") == "b"
    assert status == (404 if other_model else 400)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["message"]


def hostile_http(port):
    """Bytes that are not the HTTP of any honest client."""
    host = f"Host: 127.0.0.1:{port}\r\n".encode()
    post = b"POST /v1/completions HTTP/1.1\r\n" + host + b"Content-Type: application/json\r\n"
    return [b"\r\n\r\nx\x00y\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" * 20 + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + host + host + b"\r\n", b"GET / HTTP/1.1\r\n" + host + b"a: " + b"b" * 70_000,
            b"GET / HTTP/1.1\r\n" + host + b"a: b\r\n" * 20_000, b"GET /" + b"a" * 70_000,
            post + b"Content-Length: -5\r\n\r\n", post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
            post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
            post + b"Content-Length: 3\r\nTransfer-Encoding: gzip\r\n\r\nabc"]


def test_hostile_http(served):
    for sent in hostile_http(served.port):
        try:
            answer = raw(served.port, sent)
        except ConnectionError:  # closed while we were still sending
            continue
        assert re.match(rb"HTTP/1.1 (4\d\d|501) ", answer) and b'{"error"' in answer, (sent[:80], answer[:80])
    assert ask(served.port, "/v1/completions", b'{"prompt": "a"}', Content_Type="text/plain")[0] == 415
    assert ask(served.port, "/v1/completions", b" " * 1_000_001)[0] == 413
    assert ask(served.port, "/nix")[1]["error"]["type"] == "invalid_request_error"
    assert ask(served.port, "/v1/completions")[0] == 405 and ask(served.port, "/%2e%2e/etc/passwd")[0] == 404
    assert ask(served.port, "/health")[1] == {"status": "ok"}


def resident(pid="self"):
    """Memory of a process in bytes."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


@pytest.mark.score("D5")
def test_hostile_requests_are_refused_at_once_and_leave_nothing(served, count, score):
    """400 to 499 in JSON within 100 ms each (under --full), and no memory that is not given back."""
    requests = [lambda b=b, path=path: ask(served.port, path, b)[:2] for path, b in REQUESTS]
    requests += [lambda b=b: (int(raw(served.port, b)[9:12]), None) for b in hostile_http(served.port)[7:]]
    for how in ({"Content_Type": "text/plain"}, {"Host": "evil.example"}, {"Origin": "http://evil.example"},
                {"X": "b" * 17_000}):
        requests.append(lambda how=how: ask(served.port, "/v1/completions", b'{"prompt": "a"}', **how)[:2])
    most_seconds = count(5.0, 0.1)
    for request in requests:  # what the first round allocates is kept for the next
        request()
    before = resident()
    bad = []
    slowest = 0.0
    for i, request in enumerate(requests):
        begun = time.perf_counter()
        status, answer = request()
        seconds = time.perf_counter() - begun
        slowest = max(slowest, seconds)
        if status not in (*range(400, 500), 501) or seconds > most_seconds or answer and "error" not in answer:
            bad.append((i, status, seconds))
    grown = (resident() - before) / 1e6
    score(len(requests) - len(bad), len(requests), f"slowest {1000 * slowest:.0f} ms; {grown:+.1f} MB; "
          f"{busy()}")
    assert not bad and len(requests) > 80 and grown < 50
    assert ask(served.port, "/health")[0] == 200


@pytest.mark.score("D8")
def test_errors_are_typed(served):
    with pytest.raises(openai.BadRequestError, match="context") as e:
        served.api.completions.create(model="tiny", prompt="a" * 97)
    assert e.value.code == "context_length_exceeded" and e.value.param == "prompt"
    for call in (lambda: served.api.completions.create(model="other", prompt="a"),
                 lambda: served.api.models.retrieve("other")):
        with pytest.raises(openai.NotFoundError, match="this server has 'tiny'") as e:
            call()
        assert e.value.code == "model_not_found"


@pytest.mark.parametrize("path, body, message", [
    ("completions", {"prompt": 5}, "prompt: Input should be a valid string or Input should be a valid list"),
    ("completions", {"prompt": ["a", 5]}, "prompt.1: Input should be a valid string"),
    ("completions", {"prompt": "a", "stop": ["a", 5]}, "stop.1: Input should be a valid string"),
    ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias.x: String should match pattern"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
     "messages.0.content.0.type: Input should be 'text'")])
def test_errors_name_the_place_in_the_body(served, path, body, message):
    status, answer, _ = ask(served.port, f"/v1/{path}", body)
    assert status == 400 and message in answer["error"]["message"]
    assert "[" not in answer["error"]["message"].replace("[0-9]", "") and answer["error"]["param"] in body


@pytest.mark.score("D6")
def test_only_the_health_and_the_page_need_no_key(monkeypatch, score):
    monkeypatch.setenv("THIMBLE_API_KEY", "schlüssel")
    with running(tiny()) as (port, ours):
        def attempt(case):
            path, given = case
            headers = {} if given is None else {"Authorization": given.encode()}
            status = ask(port, path, **headers)[0]
            if path in ("/health", "/"):
                assert status == 200
            elif given == "Bearer schlüssel":
                assert status in (200, 405)
            else:
                assert status == 401

        paths = [path.replace("{id:path}", "tiny") for path in ours.paths]
        keys = (None, "Bearer", "Bearer wrong", "Basic schlüssel", "Bearer schlüssel")
        cases = [(path, given) for path in paths for given in keys]
        tries(score, dict(enumerate(cases)), attempt, f"{len(paths)} routes")
        with client(port, "nix") as api, pytest.raises(openai.AuthenticationError):
            api.models.list()
    with pytest.raises(UserError, match="API key"):
        monkeypatch.delenv("THIMBLE_API_KEY")
        serve.Server(serve.Config(host="0.0.0.0"), loaded(tiny()))


@pytest.mark.parametrize("given", ["secret", "secret ", " secret\t", "secret\n", "two words", "schlüssel "])
def test_a_key_is_compared_without_the_spaces_around_it(given, monkeypatch):
    for settings, variable in (({"api_key": given}, ""), ({}, given)):
        monkeypatch.setenv("THIMBLE_API_KEY", variable)
        with running(tiny(), **settings) as (port, _):
            def status(sent):
                return ask(port, "/v1/models", Authorization=f"Bearer {sent}".encode())[0]
            assert status(given.strip()) == status(given.strip() + " ") == 200
            assert status("") == status(given.strip()[:-1]) == 401


@pytest.mark.parametrize("given", [" ", "\n", "a\nb", "a\x7fb"])
def test_a_key_that_nobody_can_send_is_refused(given):
    with pytest.raises(UserError, match="API key is blank or has a control character"):
        serve.Server(serve.Config(api_key=given), loaded(tiny()))


def test_browser_apps_of_an_allowed_origin():
    app = "https://app.example"
    asking = {"Origin": app, "Access-Control-Request-Method": "POST",
              "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
    with running(tiny(), allow_origin=(app, "http://localhost:3000"), api_key="k") as (port, _):
        status, _, headers = ask(port, "/v1/completions", method="OPTIONS", **asking)
        assert status == 200 and headers["access-control-allow-origin"] == app
        assert "POST" in headers["access-control-allow-methods"]
        assert {"authorization", "x-stainless-os"} <= set(re.split(", *", headers["access-control-allow-headers"]))
        for key, expected in (("k", 200), ("wrong", 401)):  # a page can read errors, too
            status, _, headers = ask(port, "/v1/models", Origin=app, Authorization=f"Bearer {key}")
            assert status == expected and headers["access-control-allow-origin"] == app and "rigin" in headers["vary"]
        for other in ("https://evil.example", "http://app.example", "https://app.example.evil", "null"):
            status, _, headers = ask(port, "/v1/models", Origin=other, Authorization="Bearer k")
            assert status == 403 and "access-control-allow-origin" not in headers
            headers = ask(port, "/v1/models", method="OPTIONS", **asking | {"Origin": other})[2]
            assert "access-control-allow-origin" not in headers
    with running(tiny()) as (port, _):  # nobody by default
        status, _, headers = ask(port, "/v1/completions", method="OPTIONS", **asking)
        assert status == 403 and "access-control-allow-origin" not in headers
    for wrong in ("*", "app.example", "https://app.example/", "https://*.example"):
        with pytest.raises(ValueError, match="must be scheme and host"):
            serve.Config(allow_origin=(wrong,))


def test_histograms_of_the_times_to_tokens():
    with running(Script("a" * 99, 0.012), max_batch=4) as (port, _):
        for n_texts, n_tokens in ((2, 5), (1, 1), (1, 3)):
            ask(port, "/v1/completions", {"prompt": "x", "max_tokens": n_tokens, "n": n_texts})
        ask(port, "/v1/completions", {"prompt": "x", "max_tokens": 0, "echo": True})  # no token at all
        text = ask(port, "/metrics")[1]
    for name, count, least in (("first_token", 4, 0.012), ("inter_token", 2 * 4 + 2, 0.012)):
        assert f"# TYPE thimble_{name}_seconds histogram\n" in text
        buckets = re.findall(rf'^thimble_{name}_seconds_bucket{{le="(.+)"}} (\d+)$', text, re.M)
        ends = [float(end) for end, _ in buckets]
        counts = [int(n) for _, n in buckets]
        assert ends == sorted(ends) and ends[-1] == float("inf") and counts == sorted(counts)
        assert counts[-1] == count == int(re.search(rf"thimble_{name}_seconds_count (\d+)", text)[1])
        assert counts[ends.index(0.01)] == 0  # each step takes 12 ms
        assert float(re.search(rf"thimble_{name}_seconds_sum (\S+)", text)[1]) >= count * least


@pytest.mark.score("D6")
def test_other_names_and_other_pages_are_refused(served, score):
    here = f"127.0.0.1:{served.port}"
    cases = [({"Host": host}, 200) for host in (here, "localhost", "[::1]:80")]
    cases += [({"Host": host}, 403) for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost.evil")]
    cases += [({"Origin": f"http://{here}"}, 200)]
    cases += [({"Origin": origin}, 403) for origin in ("http://evil.example", "null", f"http://{here}.evil", "file://")]

    def attempt(case):
        headers, wanted = case
        assert ask(served.port, "/v1/models", **headers)[0] == wanted
        if wanted == 403:  # a page of another origin may send a plain form without asking first
            assert ask(served.port, "/v1/completions", b'{"prompt": "a"}', **headers)[0] == wanted

    tries(score, dict(enumerate(cases)), attempt)
    assert ask(served.port, "/v1/completions", b'{"prompt": "a"}', Content_Type="text/plain")[0] == 415
    assert "access-control-allow-origin" not in ask(served.port, "/v1/models", Origin=f"http://{here}")[2]


def test_a_full_queue_refuses_at_once():
    with running(Script("a" * 5000, 0.002), max_batch=2, max_queue=3) as (port, ours):
        body = {"prompt": "x", "max_tokens": 100}
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda _: ask(port, "/v1/completions", body), range(20)))
        full = [a for a in answers if a[0] == 429]
        assert len(full) >= 5 and all(a[2]["Retry-After"] == "1" for a in full)
        done = [a for a in answers if a[0] == 200]
        assert len(done) + len(full) == 20 and all(a[1]["choices"][0]["text"] == "a" * 100 for a in done)
        assert f'path="/v1/completions",status="429"}} {len(full)}' in ask(port, "/metrics")[1]


def post(port, **body):
    """A connection on which a completion has been asked for."""
    body, s = json.dumps(body).encode(), socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.settimeout(20)
    s.connect(("127.0.0.1", port))
    s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
              b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return s


def test_a_client_that_leaves_frees_its_place_in_the_queue():
    with running(Script("a" * 9000, 0.002), max_batch=1, max_queue=2) as (port, ours):
        with post(port, prompt="x", max_tokens=9000):
            assert until(lambda: ours.engine.n_running == 1)
            with post(port, prompt="x"), post(port, prompt="x"):
                assert until(lambda: len(ours.engine.waiting) == 2)
                assert ask(port, "/v1/completions", {"prompt": "x"})[0] == 429
            assert until(lambda: not ours.engine.waiting, 0.5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_does_not_read_is_cut_off(stream, capfd):
    with running(Script("a" * 9000), client_seconds=0.5, max_batch=4) as (port, ours):
        with post(port, prompt="x", max_tokens=3000, n=4, logprobs=20, stream=stream):  # some 6 MB
            assert until(lambda: ours.connections) and until(lambda: not ours.connections, 120)
            assert until(lambda: not ours.engine.n_running)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(stream):
    with running(Script("a" * 9000, 0.001), max_batch=4) as (port, ours):
        with post(port, prompt="x", max_tokens=9000, stream=stream, n=3):
            assert until(lambda: ours.engine.n_running == 3)
        assert until(lambda: ours.engine.n_running == 0, 0.5)
        assert ours.engine.counts["generated_tokens"] < 3000


def test_a_model_that_cannot_step_rows_of_different_lengths_is_refused_at_once():
    model = tiny()
    step = model.step
    model.step = lambda idx, cache: step(idx, cache | {"pos": torch.tensor(int(cache["pos"]))})
    with pytest.raises(UserError, match="--max_batch=1 needs the least"):
        serve.Server(serve.Config(), loaded(model))
    assert serve.Server(serve.Config(max_batch=1), loaded(model, "Some-1.5B")).name == "Some-1.5B"


def test_slow_clients_are_closed():
    with running(tiny(), client_seconds=0.4) as (port, _):
        begun = time.monotonic()
        assert raw(port) == raw(port, b"GET /health HTTP/1.1\r\nHost: local") == b""
        assert raw(port, *[b"GET /"] + [b"x"] * 3, wait=0.15) == b""
        assert b" 200 " in raw(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")  # idle after an answer
        late = raw(port, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                   b"Content-Length: 50\r\n\r\n{")
        assert late.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - begun < 10


def test_an_answer_has_a_deadline():
    with running(Script("a" * 9000, 0.002), request_seconds=0.3) as (port, ours):
        body = {"prompt": "x", "max_tokens": 9000}
        assert ask(port, "/v1/completions", body)[0] == 408
        text = ask(port, "/v1/completions", body | {"stream": True})[1]
        assert json.loads(text.strip().rpartition("data: ")[2])["error"]["code"] == "timeout"
        assert until(lambda: ours.engine.n_running == 0)


def test_a_failure_of_the_model_is_reported_and_over(capfd):
    script = Script("abc")
    with running(script) as (port, ours):
        script.ids, ids = [10**6], script.ids  # an index out of range
        assert ask(port, "/v1/completions", {"prompt": "x"})[0] == 500
        script.ids = ids
        assert ask(port, "/v1/completions", {"prompt": "x"})[1]["choices"][0]["text"] == "abc"
        assert "thimble_failures_total 1" in ask(port, "/metrics")[1]
    assert "IndexError" in capfd.readouterr().err


FORGED = ["/x\n12:00:00 forged\x1b[31m", "/\r\n12:00:00 forged", "/\x1b]0;title\x07", "/\x1b[2J",
          "/\u202egnp.exe", "/\u2028forged", "/\x85forged", "/\x00", "/%0aforged", '/" 200 0 ms', "/\\n",
          "/" + "a" * 9000]


@pytest.mark.score("D6")
@pytest.mark.parametrize("path", FORGED, ids=lambda path: repr(path)[:30])
def test_the_log_has_no_prompt_and_cannot_be_forged(capfd, path):
    cfg = serve.Config(port=0)
    ours = serve.Server(cfg, loaded(tiny()))

    async def drive():
        ours.engine.start(asyncio.get_running_loop())
        scope = {"type": "http", "method": "POST", "path": path, "headers": [
            (b"host", b"localhost")], "query_string": b"", "client": ("1.2.3.4", 5)}
        async def send(message):
            pass
        async def receive():
            return {"type": "http.request", "body": b'{"prompt": "secret"}', "more_body": False}
        await ours.app(scope, receive, send)
    asyncio.run(drive())
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "secret" not in lines[0] and " 404 " in lines[0]
    assert re.fullmatch(r'[ -~]+', lines[0]) and len(lines[0]) < 700


SCRIPTS = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</script><script>alert(1)//",
           "javascript:alert(1)", "{{7*7}}", "<svg/onload=alert(1)>", "&lt;script&gt;", "'\"><b>"]


@pytest.mark.score("D6")
@pytest.mark.parametrize("text", SCRIPTS)
def test_no_script_comes_back_as_one(served, text):
    """Whatever is sent comes back as JSON only, and the page puts text in as text, under a policy without 'unsafe'."""
    for path, body in (("/v1/completions", {"prompt": "a", "model": text}), ("/v1/completions", {text: 1}),
                       ("/detokenize", {"tokens": TOKENIZER.encode(text)}), ("/v1/models/" + quote(text), None)):
        headers = ask(served.port, path, body)[2]
        assert headers["content-type"] == "application/json"
    page, policy = served.server.page, served.server.policy
    assert "unsafe" not in policy and "default-src 'none'" in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", page)


def test_small_routes(served):
    assert served.api.models.list().data[0].id == "tiny"
    assert served.api.models.retrieve("tiny") == served.api.models.list().data[0]
    with running(tiny(), name="org/tiny") as (port, _), client(port) as api:
        assert api.models.retrieve("org/tiny").id == "org/tiny"
    tokens = ask(served.port, "/tokenize", {"prompt": "né🎉<|endoftext|>"})[1]["tokens"]
    assert ask(served.port, "/detokenize", {"tokens": tokens})[1] == {"prompt": "né🎉<|endoftext|>"}
    eos = ask(served.port, "/tokenizer_info")[1]["eos_token"]
    assert ask(served.port, "/tokenize", {"prompt": eos})[1]["tokens"] == [TOKENIZER.eot]  # so lm-eval asks for its id
    spec = ask(served.port, "/openapi.json")[1]
    assert set(spec["paths"]) == {path.replace(":path", "") for path in served.server.paths}
    assert spec["openapi"] == "3.1.0"
    status, page, headers = ask(served.port, "/")
    assert status == 200 and "innerHTML" not in page and "default-src 'none'" in headers["content-security-policy"]
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:,)|url\(|@import|https?://""", page)


@pytest.mark.parametrize("seconds, signals", [("0.3", 1), ("60", 2)])
def test_sigterm_ends_streams_cleanly(tmp_path, seconds, signals):
    """After the seconds that it may take; at once when it comes a second time."""
    model = tiny(block_size=4096)
    meta = {"arch": "model", "model_config": {k: getattr(model.config, k) for k in model.config.__dataclass_fields__}}
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.to_json())
    checkpoint.save(tmp_path / "run", 1, model.state_dict(), None, meta, tmp_path / "tokenizer.json", best=True)
    process = subprocess.Popen(
        [sys.executable, "serve.py", f"--checkpoint={tmp_path / 'run'}", "--port=0", f"--drain_seconds={seconds}"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    port = int(re.search(r"127\.0\.0\.1:(\d+)", process.stderr.readline())[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    body = {"prompt": "x", "max_tokens": 4000, "stream": True, "logit_bias": {"256": -100}}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.readline().startswith(b"data: {")
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    rest = response.read().decode()
    connection.close()
    assert rest.endswith("data: [DONE]\n\n") and '"finish_reason": "length"' in rest
    _, err = process.communicate(timeout=10)
    assert process.returncode == 0 and "Traceback" not in err


def test_a_request_may_have_as_many_texts_as_wait():
    with running(Script("aa", 0), max_batch=2, max_queue=3) as (port, _):
        for n, status in ((3, 200), (4, 400)):
            assert ask(port, "/v1/completions", {"prompt": ["a"] * n, "max_tokens": 1})[0] == status
