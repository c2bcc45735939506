"""Below the API: how a request is delimited, refused and given up, by raw sockets."""
import json
import re
import socket
import time
import types

import pytest
from test_engine import tiny
from test_serve import Script, ask, post, raw, running, until

from thimble import http

JSON = b"Host: localhost\r\nContent-Type: application/json\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\n" + JSON
BODY = b'{"prompt": "x", "max_tokens": 1}'
SMUGGLED = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


# ---- where a request ends
@pytest.mark.parametrize("sent", [
    POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    b"POST /tokenize HTTP/1.0\r\n" + JSON + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n\tContent-Length: 9\r\n\r\n",
    b"GET /health HTTP/1.1\nHost: localhost\n\n", b"GET /health HTTP/1.1\r\nHost: localhost\nX: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\n"])
def test_what_a_proxy_may_delimit_differently_is_refused_and_closes(sent, capfd):
    with running(tiny()) as (port, _):
        answer = raw(port, sent + SMUGGLED)
        assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1
        assert b"connection: close" in answer.lower() and b'"invalid_request_error"' in answer
        # the second of two requests is held to the same rules
        first = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        answer = raw(port, first + sent + SMUGGLED)
        assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"400"]
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_not_ambiguous_still_passes():
    with running(tiny()) as (port, _):
        chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
        answer = raw(port, POST + chunked + SMUGGLED)  # here it is a request of its own
        assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"200"]
        assert b"HTTP/1.1 431 " in raw(port, b"GET / HTTP/1.1\r\nHost: localhost\r\na: " + b"b" * 17_000)


def test_a_body_that_is_too_large_is_refused_by_its_declared_length():
    with running(tiny(), client_seconds=5) as (port, _):
        begun = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), timeout=20) as s:
            s.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 1000001\r\n\r\n")
            answer = s.recv(65536)
            assert answer.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answer
            assert time.monotonic() - begun < 2, "it waited for the body"
        # a client that sends all of it before it reads gets the answer, too, and no reset
        assert ask(port, "/v1/completions", b" " * 9_000_000)[0] == 413


def test_bytes_that_are_not_http_behind_a_response_that_has_begun(capfd):
    """A response cannot be taken back: the connection is closed."""
    with running(Script("a" * 9000, 0.001), api_key="k") as (port, ours):
        chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n"
        answer = raw(port, chunked + b"1\r\n{\r\n", b"zz\r\n\r\n", wait=0.1)
        assert answer.startswith(b"HTTP/1.1 401 ") and answer.count(b"HTTP/1.1 ") == 1
        body = b'{"prompt": "x", "max_tokens": 9000, "stream": true}'
        headers = b"Authorization: Bearer k\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        raw(port, POST + headers + body, b"more", wait=0.1)
        assert until(lambda: not ours.engine.n_running, 2)
    assert "Traceback" not in capfd.readouterr().err


# ---- the end of a connection while an answer runs
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [b"", SMUGGLED])
def test_a_client_that_closes_frees_its_row_and_its_place(more, stream):
    with running(Script("a" * 9000, 0.001), max_batch=1) as (port, ours):
        with post(port, prompt="x", max_tokens=9000, stream=stream) as running_one:
            assert until(lambda: ours.engine.n_running == 1)
            with post(port, prompt="x", max_tokens=9000, stream=stream) as waiting_one:
                assert until(lambda: ours.engine.waiting)
                for s in (waiting_one, running_one):
                    s.sendall(more)
                    time.sleep(0.05)
                    s.sendall(more)
                if stream:
                    waiting_one.recv(65536)  # with unread bytes a close would be a reset, which is easy to see
            assert until(lambda: not ours.engine.waiting, 1)
        assert until(lambda: not ours.engine.n_running, 1)
        assert ours.engine.counts["generated_tokens"] < 3000


def test_a_client_that_sends_without_end_while_it_is_answered_is_cut_off():
    with running(Script("a" * 9000, 0.001)) as (port, ours):
        with post(port, prompt="x", max_tokens=9000) as s:
            with pytest.raises(ConnectionError):
                for _ in range(1000):
                    s.sendall(b"GET /" + b"x" * 10_000)
                    time.sleep(0.001)
            assert until(lambda: not ours.engine.n_running, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_only_its_sending_side_gets_its_answer(stream):
    with running(Script("a" * 9000, 0.002), max_batch=1) as (port, ours):
        with post(port, prompt="x", max_tokens=200), post(port, prompt="x", max_tokens=100, stream=stream) as s:
            assert until(lambda: ours.engine.waiting)
            s.sendall(SMUGGLED)
            s.shutdown(socket.SHUT_WR)
            answer = b""
            while part := s.recv(65536):
                answer += part
    interim, _, rest = answer.rpartition(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert interim.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"") == b""
    assert re.findall(rb"HTTP/1.1 (\d+)", rest) == [b"200", b"200"]
    text = re.findall(rb'"text": "(a+)"', rest)
    assert b"".join(text) == b"a" * 100
    assert b"[DONE]" in rest if stream else json.loads(re.search(rb"\r\n\r\n({.*})HTTP", rest, re.S)[1])


# ---- what the settings make of uvicorn
def test_settings_of_the_server_by_hand(monkeypatch):
    """Two seconds more to drain than the engine takes; a second signal leaves it none."""
    engine = types.SimpleNamespace(stop_at=None)
    cfg = types.SimpleNamespace(host="[::1]", port=81, client_seconds=7.5, drain_seconds=5.5)
    server = http.Uvicorn(cfg, types.SimpleNamespace(app=None, engine=engine, cfg=cfg))
    made = server.config
    assert (made.host, made.port, made.timeout_graceful_shutdown) == ("::1", 81, 7)
    assert made.http.seconds == 7.5
    monkeypatch.setattr(http.time, "monotonic", lambda: 1000.0)
    for stop_at in (1005.5, 1000.0):
        server.handle_exit(15, None)
        assert engine.stop_at == stop_at and server.should_exit


class Connection:
    """What Connection.probe sees of its connection: a transport, a loop and the cycle of the request."""
    def __init__(self, filler):
        self.written = []
        self.later = []
        self.closing = False
        self.answering = True
        self.transport = types.SimpleNamespace(is_closing=lambda: self.closing, write=self.written.append)
        self.loop = types.SimpleNamespace(call_later=lambda *args: self.later.append(args))
        self.flow = types.SimpleNamespace(write_paused=False)
        self.conn = types.SimpleNamespace(send=lambda part: type(part).__name__)
        self.cycle = types.SimpleNamespace(response_started=filler is not None, scope=filler or {})
        self.probe = None

    def is_answering(self):
        return self.answering


def test_probes_come_at_twice_the_distance_until_the_answer_is_complete():
    for filler, sent in ((None, "InformationalResponse"), ({"filler": b":"}, "Data"), ({"no": 1}, None)):
        at = Connection(filler)
        http.Protocol.probe(at, 0.02)
        assert at.later == [(0.02, None, 0.04)] and at.written == [sent] * (sent is not None)
        http.Protocol.probe(at, at.later[-1][2])
        assert at.later[-1] == (0.04, None, 0.08) and len(at.written) == 2 * (sent is not None)
        at.flow.write_paused = True  # a client that reads slowly gets nothing more, but is asked again
        http.Protocol.probe(at, 0.08)
        assert at.later[-1][0] == 0.08 and len(at.written) == 2 * (sent is not None)
        for name, value in (("closing", True), ("answering", False)):
            at = Connection(filler)
            setattr(at, name, value)
            http.Protocol.probe(at, 0.02)
            assert not at.later and not at.written
