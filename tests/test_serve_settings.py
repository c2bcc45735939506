"""Each setting of the server and each field of a request has an effect that a client sees, or a reason why not."""
import contextlib
import dataclasses
import socket
import threading
from types import SimpleNamespace

import pydantic
import pytest
import torch
from test_engine import TOKENIZER, tiny
from test_serve import Script, ask, events, running, until

import serve
from thimble import chat, checkpoint
from thimble.files import UserError


# ---- settings
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose best and latest checkpoints differ."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tokenizer.json").write_text(TOKENIZER.to_json())
    model = tiny()
    meta = {"arch": "model", "model_config": dataclasses.asdict(model.config)}
    for step in (1, 2):
        checkpoint.save(folder / "first", step, model.state_dict(), None, meta, folder / "tokenizer.json",
                        best=step == 1)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
    checkpoint.save(folder / "second", 1, model.state_dict(), None, meta, folder / "tokenizer.json", best=True)
    return folder / "first"


def on_disk(path, **body):
    """An observation of a server of a run: what `path` answers."""
    def observe(run, **settings):
        cfg = serve.Config(**{"checkpoint": str(run), "port": 0, "log": False} | settings)
        try:
            ours = serve.build(cfg)
        except UserError as e:
            return str(e)
        with running(None, ours) as (port, _):
            status, answer, _ = ask(port, path, body or None)
        assert status == 200
        return {key: answer[key] for key in answer.keys() - {"id", "created"}}
    return observe


def address(run, **settings):
    with serve.listen(serve.Config(**{"port": 0} | settings)) as s:
        host, port = s.getsockname()
        return host, "port" in settings and port


def status(path, body=None, seconds=0.0, n_tokens=3, **headers):
    """An observation of a server of a script: the status of one request."""
    def observe(run, **settings):
        with running(Script("a" * n_tokens, seconds), **settings) as (port, _):
            return ask(port, path, body, **headers)[0]
    return observe


def n_tokens(run, **settings):
    with running(Script("a" * 50), **settings) as (port, _):
        return ask(port, "/v1/completions", {"prompt": "x", "max_tokens": 20})[1]["usage"]["completion_tokens"]


def most_rows(run, **settings):
    with running(Script("a" * 50, 0.002), **settings) as (port, ours):
        ask(port, "/v1/completions", {"prompt": "x", "n": 8, "max_tokens": 30})
        steps = ours.engine.counts["steps"]
    return "together" if steps < 60 else "one by one"


def idle_connection(run, **settings):
    with running(Script("a"), **settings) as (port, _), socket.create_connection(("127.0.0.1", port), 2) as s:
        try:
            return s.recv(1)
        except TimeoutError:
            return "still open"


def n_drained(run, **settings):
    """How long a text becomes that is being written when SIGTERM arrives."""
    texts = []
    with contextlib.ExitStack() as stack:
        port, ours = stack.enter_context(running(Script("a" * 500, 0.002), **settings))
        body = {"prompt": "x", "max_tokens": 500, "stream": True}
        thread = threading.Thread(target=lambda: texts.append(ask(port, "/v1/completions", body)[1]))
        thread.start()
        assert until(lambda: ours.engine.n_running)
        stack.close()  # which is running()'s SIGTERM
        thread.join()
    text = "".join(part["choices"][0]["text"] for part in events(texts[0]))
    return "whole" if len(text) == 500 else "cut"


def logged(run, capfd, **settings):
    with running(Script("a"), **{"log": True} | settings) as (port, _):
        ask(port, "/health")
    return "/health" in capfd.readouterr().err


POSTED = {"prompt": "x", "max_tokens": 20}
SETTINGS = {  # key -> (another value than the default, what must change by it)
    "checkpoint": (lambda run: str(run.parent / "second"), on_disk("/v1/completions", **POSTED, temperature=0)),
    "which": ("latest", on_disk("/v1/completions", **POSTED, temperature=0)),
    "name": ("other", on_disk("/v1/models")),
    "template": ("alpaca", on_disk("/v1/chat/completions", messages=[{"role": "user", "content": "a"}], max_tokens=1)),
    "device": ("cuda:99", on_disk("/v1/models")),
    "host": ("127.0.0.2", address),
    "port": (lambda run: free_port(), address),
    "api_key": ("k", status("/v1/models")),
    "allow_origin": (("https://a.example",), status("/v1/models", Origin="https://a.example")),
    "max_batch": (1, most_rows),
    "max_queue": (2, status("/v1/completions", {"prompt": "x", "n": 3})),
    "max_tokens": (3, n_tokens),
    "max_body": (10, status("/v1/completions", {"prompt": "x"})),
    "client_seconds": (0.2, idle_connection),
    "request_seconds": (0.2, status("/v1/completions", {"prompt": "x", "max_tokens": 99}, 0.01, 99)),
    "drain_seconds": (0.1, n_drained),
    "log": (False, logged),
}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def test_every_setting_is_here():
    assert SETTINGS.keys() == serve.Config.__dataclass_fields__.keys()


@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_changes_what_a_client_sees(key, run, capfd):
    value, observe = SETTINGS[key]
    value = value(run) if callable(value) else value
    more = {"capfd": capfd} if key == "log" else {}
    assert value != serve.Config.__dataclass_fields__[key].default
    assert observe(run, **more, **{key: value}) != observe(run, **more)


# ---- fields of a request
FIELDS = {"n": 2, "max_tokens": 3, "temperature": 0, "top_p": 0.01, "top_k": 1, "min_p": 1, "repetition_penalty": 100,
          "presence_penalty": 2, "frequency_penalty": 2, "logit_bias": {"120": 100}, "seed": 2, "stop": ["a", "e", "i"],
          "stream": True, "stream_options": {"include_usage": True}, "model": "other"}
COMPLETION = FIELDS | {"prompt": "x", "echo": True, "logprobs": 2}
CHAT = FIELDS | {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 3, "logprobs": True,
                 "top_logprobs": 2}
# only values that change nothing are accepted: test_what_would_change_the_answer_and_is_not_supported_is_refused
WITHOUT_EFFECT = {"user", "best_of", "suffix", "tools", "tool_choice", "parallel_tool_calls", "response_format",
                  "modalities", "store", "service_tier", "metadata", "prompt_cache_key", "safety_identifier"}
NEEDED = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}, "stop": {"logit_bias": {"97": 100}}}


@pytest.fixture(scope="module")
def served():
    with running(tiny()) as (port, ours):
        yield SimpleNamespace(port=port, server=ours)


@pytest.mark.parametrize("path, base, fields", [
    ("/v1/completions", {"prompt": "abc"}, COMPLETION),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "abc"}]}, CHAT)])
def test_a_field_changes_the_answer(path, base, fields, served):
    assert fields.keys() | WITHOUT_EFFECT >= serve.BODIES[path].model_fields.keys() >= fields.keys()

    def answer(**body):
        told = ask(served.port, path, base | {"seed": 1, "max_tokens": 60, "temperature": 0.9} | body)[1]
        if isinstance(told, dict):
            return {key: told[key] for key in told.keys() - {"id", "created"}}
        return [{key: part[key] for key in part.keys() - {"id", "created"}} for part in events(told)]

    for key, value in fields.items():
        needed = NEEDED.get(key, {})
        assert answer(**needed) == answer(**needed), f"{key}: without it, the answer is not always the same"
        assert answer(**needed, **{key: value}) != answer(**needed), f"{key} has no effect"


# ---- usage
@pytest.mark.parametrize("stream", [False, True])
def test_usage_by_hand(stream):
    def usage(path="completions", **body):
        body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        told = ask(port, f"/v1/{path}", body)[1]
        found = events(told)[-1]["usage"] if stream else told["usage"]
        assert found["total_tokens"] == found["prompt_tokens"] + found["completion_tokens"]
        return found["prompt_tokens"], found["completion_tokens"]

    with running(Script("a" * 99)) as (port, _):
        assert usage(prompt="x", max_tokens=4) == (1, 4)
        assert usage(prompt="x", max_tokens=4, n=3) == (1, 12)  # the prompt counts once
        assert usage(prompt=["x", "y"], max_tokens=4) == (2, 8)
        assert usage(prompt=["x", "y"], max_tokens=4, n=3) == (2, 24)
        assert usage(prompt=[[120], [121], [122]], max_tokens=1, n=2) == (3, 6)
        assert usage(prompt="x", max_tokens=0, echo=True) == (1, 0)
        assert usage(prompt="x", max_tokens=2, echo=True) == (1, 2)  # what is echoed is not written
        assert usage(prompt="xyz", max_tokens=0, echo=True, n=2) == (3, 0)
    with running(Script("ab")) as (port, _):
        assert usage(prompt="x", max_tokens=9) == (1, 3)  # the end of the text is a token, too
        assert usage(prompt="x", max_tokens=9, n=2) == (1, 6)
        assert usage(prompt="x", max_tokens=9, stop="b") == (1, 2)  # so is what a stop text cuts off
    messages = [{"role": "user", "content": "x"}]
    with running(tiny(block_size=200)) as (port, _):
        prompt = chat.prompt(TOKENIZER, messages, "elite")
        bias = {str(TOKENIZER.eot): -100}
        counted = usage("chat/completions", messages=messages, max_tokens=5, n=3, logit_bias=bias)
        assert counted[0] == len(prompt) and counted[1] <= 15


def test_an_id_equal_to_the_vocabulary_is_refused():
    server = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=5))
    for ids in ([], [0, 4], {4: 1.0}):
        serve.Server.check_ids(server, ids, "prompt")
    for ids in ([5], [0, 5, 1], {5: 1.0}):
        with pytest.raises(serve.ApiError, match="prompt: token id 5 is outside the vocabulary of 5 tokens"):
            serve.Server.check_ids(server, ids, "prompt")


# ---- limits
A, B = serve.Completion, serve.ChatCompletion
HELLO = {"role": "user", "content": "x"}
# (body, field, values that are allowed, values that are refused)
LIMITS = [
    (A, "prompt", [[0], [2**31 - 1], [[5]], "", ["x"]], [[2**31], [-1], [], [[]], ["x", 5], 5]),
    (A, "max_tokens", [0, 2**31 - 1], [-1, 2**31, 1.0, "1", True]), (B, "max_completion_tokens", [0, 9], [-1, 2**31]),
    (A, "n", [1, 16], [0, 17]), (A, "temperature", [0, 2.0], [-0.01, 2.01, float("nan")]),
    (A, "top_p", [0, 1], [-0.01, 1.01]), (A, "min_p", [0, 1], [-0.01, 1.01]),
    (A, "top_k", [-1, 0, 2**31 - 1], [-2, 2**31]), (A, "repetition_penalty", [0.01, 100], [0.009, 100.1]),
    (A, "presence_penalty", [-2, 2], [-2.1, 2.1]), (A, "frequency_penalty", [-2, 2], [-2.1, 2.1]),
    (A, "seed", [-2**63, 2**63 - 1], [-2**63 - 1, 2**63]), (A, "logprobs", [0, 20], [-1, 21]),
    (A, "logit_bias", [{}, {"0": -100, "999999999": 100}, {str(i): 0 for i in range(1000)}],
     [{"1234567890": 0}, {"": 0}, {"x": 0}, {"-1": 0}, {"0": 100.1}, {"0": -100.1}, {str(i): 0 for i in range(1001)}]),
    (A, "stop", ["", "x" * 256, ["x"] * 8, []], ["x" * 257, ["x"] * 9, ["x" * 257], 5]),
    (A, "best_of", [1], [0, 2]), (A, "suffix", [""], ["x"]), (A, "model", ["x" * 1000], ["x" * 1001]),
    (A, "user", ["x" * 1000], ["x" * 1001]), (A, "stream_options", [{"include_usage": True}], [{"x": 1}, []]),
    (B, "top_logprobs", [0, 20], [-1, 21]), (B, "logprobs", [True], [1]),
    (B, "messages", [[HELLO], [HELLO] * 1000], [[], [HELLO] * 1001, [{"role": "tool", "content": "x"}]]),
    (B, "metadata", [{str(i): "x" for i in range(16)}], [{str(i): "x" for i in range(17)}, {"a": 1}]),
    (B, "prompt_cache_key", ["x" * 1000], ["x" * 1001]), (B, "safety_identifier", ["x" * 1000], ["x" * 1001]),
    (B, "tools", [[]], [[{}]]), (B, "tool_choice", ["none", "auto"], ["required"]), (B, "store", [False], [True]),
    (B, "modalities", [["text"]], [["audio"], []]), (B, "service_tier", ["auto", "default"], ["flex"]),
    (serve.Detokenize, "tokens", [[], [0, 2**31 - 1]], [[-1], [2**31], ["1"]])]
NEEDED_BY = {A: {"prompt": "x"}, B: {"messages": [HELLO]}, serve.Detokenize: {"tokens": []}}


@pytest.mark.parametrize("body,field,allowed,refused", LIMITS, ids=lambda value: value if type(value) is str else "")
def test_limits_of_the_fields_by_hand(body, field, allowed, refused):
    for value in allowed:
        assert getattr(body.model_validate(NEEDED_BY[body] | {field: value}), field) is not None
    for value in refused:
        with pytest.raises(pydantic.ValidationError, match=field):
            body.model_validate(NEEDED_BY[body] | {field: value})


def test_what_a_request_leaves_out():
    """The defaults of OpenAI's API, by hand, and vLLM's where it has none."""
    expected = {"model": "", "n": 1, "max_tokens": None, "temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0,
                "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "seed": None,
                "stop": [], "stream": False, "stream_options": None, "user": ""}
    found = A(prompt="x").model_dump()
    assert found == expected | {"prompt": "x", "echo": False, "logprobs": None, "best_of": 1, "suffix": ""}
    found = B(messages=[HELLO]).model_dump()
    found.pop("messages")
    assert found == expected | {
        "max_completion_tokens": None, "logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": "none",
        "parallel_tool_calls": True, "response_format": None, "modalities": ["text"], "store": False,
        "service_tier": "auto", "metadata": {}, "prompt_cache_key": "", "safety_identifier": ""}
    assert serve.StreamOptions().model_dump() == {"include_usage": False, "include_obfuscation": False}
    assert serve.Tokenize(prompt="x").model_dump() == {"model": "", "prompt": "x", "add_special_tokens": True}
