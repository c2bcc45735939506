"""The server under load: crowds, overload, clients that leave or dawdle, signals, and a long mixture of requests.

Most of it runs at its full counts only with --full, since a server that is pressed for seconds is seconds of the suite.
"""
import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
from conftest import ROOT
from test_engine import TOKENIZER, prompts, tiny
from test_serve import Script, ask, post, resident, running, until
from tries import busy, tries

from bench import serve as bench
from thimble import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on disk of a tiny model, for a server in a process of its own."""
    folder = tmp_path_factory.mktemp("served")
    model = tiny(block_size=4096)
    (folder / "tokenizer.json").write_text(TOKENIZER.to_json())
    meta = {"arch": "model", "model_config": asdict(model.config)}
    checkpoint.save(folder / "run", 1, model.state_dict(), None, meta, folder / "tokenizer.json", best=True)
    return folder / "run"


@contextlib.contextmanager
def process(run, *flags):
    """serve.py in a process -> (the process, port)."""
    command = [sys.executable, "serve.py", f"--checkpoint={run}", "--log=no", *flags]
    started = subprocess.Popen([*command, *(() if any("--port" in flag for flag in flags) else ("--port=0",))],
                               cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        line = started.stderr.readline()
        yield started, int(re.search(r"127\.0\.0\.1:(\d+)", line)[1])
    finally:
        started.kill()
        started.communicate()


@contextlib.contextmanager
def serving(run, full, **settings):
    """-> port, of a server in a process of its own under --full, else in a thread of this one."""
    if full:
        with process(run, *(f"--{key}={value}" for key, value in settings.items())) as (_, port):
            yield port
    else:
        with running(tiny(block_size=4096), **settings) as (port, _):
            yield port


async def outcomes(port, bodies, clients):
    """Ask for all bodies, `clients` at a time -> for each the answer of bench.ask, or the exception."""
    found = [None] * len(bodies)
    left = iter(enumerate(bodies))

    async def client():
        for i, body in left:
            try:
                found[i] = await bench.ask(port, body)
            except Exception as error:
                found[i] = error
            else:
                if found[i][0] == 429:
                    await asyncio.sleep(0.2)

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


def ending(answer):
    """What came of a request: "complete", "refused", or what must not be."""
    if isinstance(answer, Exception):
        return repr(answer)
    status, _, _, _, whole = answer
    if status == 429:
        return "refused"
    return "complete" if status == 200 and whole else f"{status}, whole: {whole}"


# ---- crowds
@pytest.mark.score("D1")
def test_every_request_of_a_crowd_has_one_outcome(run, count, score):
    """Complete, or 429 in less than 100 ms (under --full); both sides count the same, and texts are those of one."""
    n = count(60, 2000)
    clients = count(30, 100)
    kinds = []
    for i, ids in enumerate(prompts(20)):
        kinds.append({"prompt": ids, "max_tokens": 4 + i % 13, "temperature": 0})
    with serving(run, count(False, True), max_queue=count(8, 64)) as port:
        alone = [ask(port, "/v1/completions", body)[1]["choices"][0]["text"] for body in kinds]
        bodies = [kinds[i % 20] | {"stream": i % 2 == 1} for i in range(n)]
        before = requests_of(port)
        answers = asyncio.run(outcomes(port, bodies, clients))
        after = requests_of(port)
    ends = [ending(answer) for answer in answers]
    done = [i for i, end in enumerate(ends) if end == "complete"]
    refused = [answers[i][3] for i, end in enumerate(ends) if end == "refused"]
    wrong = [i for i in done if answers[i][1] != alone[i % 20]]
    late = [seconds for seconds in refused if seconds > count(5.0, 0.1)]
    score(len(done) + len(refused) - len(wrong) - len(late), n, f"{clients} clients: {len(done)} complete, "
          f"{len(refused)} times 429 after p50 {1000 * bench.quantile(refused, 0.5):.0f} ms, at most "
          f"{1000 * max(refused, default=0):.0f} ms; {busy()}")
    assert len(done) + len(refused) == n, [end for end in ends if end not in ("complete", "refused")][:3]
    assert not wrong
    counted = {status: after.get(status, 0) - before.get(status, 0) for status in (200, 429)}
    assert counted == {200: len(done), 429: len(refused)} and done
    assert not late, max(late)


def requests_of(port):
    """{status: how many completions had it}, as the server counts."""
    text = ask(port, "/metrics")[1]
    found = re.findall(r'^thimble_requests_total{path="/v1/completions",status="(\d+)"} (\d+)$', text, re.M)
    return {int(status): int(n) for status, n in found}


@pytest.mark.score("D2")
def test_overload_takes_nothing_from_what_it_can_do(tmp_path, count, score):
    """Requests at twice the capacity, sent on time whatever became of those before."""
    seconds = count(0, 60)
    if not seconds:
        pytest.skip("takes minutes: run with --full")
    with process(bench.random_model(tmp_path)) as (_, port):
        found = asyncio.run(bench.overload(port, bench.Config(seconds=seconds, tokens=32), None))
    bound = (64 + 2 * 16) / found["capacity"]  # the queue, and two batches: the one that runs and its own
    share = found["goodput"] / found["capacity"]
    score(found["told"], found["requests"], f"capacity {found['capacity']:.1f}/s, goodput {share:.0%} of it; first "
          f"token p99 {found['first_p99']:.1f} s, bound {bound:.1f} s; {busy()}")
    assert found["told"] == found["requests"]
    assert share >= 0.9 and found["first_p99"] <= bound


# ---- clients that leave
STEP = 0.05  # seconds of a token, or of a part of a prompt


def leave(port, engine, i):
    """Ask, wait, disconnect: half stream; a third while the prompt is read -> (seconds until free, extra tokens)."""
    prompt = "x" if i % 3 else "x" * 3000
    with post(port, prompt=prompt, max_tokens=5000, stream=i % 2 == 0):
        assert until(lambda: engine.filling if i % 3 == 0 else engine.n_running)
        time.sleep(STEP * (i % 4))
        written = engine.counts["generated_tokens"]
        begun = time.perf_counter()
    assert until(lambda: not (engine.n_running or engine.filling or engine.waiting), 10)
    return time.perf_counter() - begun, engine.counts["generated_tokens"] - written


@pytest.mark.score("D3")
def test_a_disconnect_costs_two_tokens_at_most(count, score):
    """Within 0.5 s the row is free (under --full). Each token of this model takes 50 ms."""
    n = count(6, 100)
    found = []
    with running(Script("a" * 9000, STEP), max_batch=4) as (port, ours):
        tries(lambda *_: None, {i: i for i in range(n)}, lambda i: found.append(leave(port, ours.engine, i)))
    held = [seconds <= count(5.0, 0.5) and extra <= count(20, 2) for seconds, extra in found]
    most, extra = (max(values) for values in zip(*found, strict=True))
    score(sum(held), n, f"free after {1000 * most:.0f} ms at most, {extra} more tokens at most; {busy()}")
    assert sum(held) == n


@pytest.mark.score("D4")
def test_slow_connections_are_closed_and_nobody_waits_for_them(run, count, score):
    """Those that send nothing, half of a header, half of a body, or a byte a second."""
    n = count(24, 400)
    limit = count(0.5, 10.0)
    sent = [b"", b"GET /health HTTP/1.1\r\nHost: local", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{", b"GET /"]

    async def drive(port):
        lives = []
        waits = []
        begun = time.perf_counter()

        async def one(i):
            await bench.dawdle(port, sent[i % 4], trickle=i % 4 == 3)
            lives.append(time.perf_counter() - begun)

        tasks = [asyncio.create_task(one(i)) for i in range(n)]
        while not all(task.done() for task in tasks) and time.perf_counter() - begun < 60:
            waits.append(await health(port))
            await asyncio.sleep(0.02)
        return lives, waits

    with serving(run, count(False, True), client_seconds=limit) as port:
        lives, waits = asyncio.run(drive(port))
    in_time = sum(life <= limit + count(5.0, 2.0) for life in lives)
    p99 = bench.quantile(waits, 0.99)
    score(in_time, n, f"closed after {max(lives):.1f} s at most; /health of others p99 {1000 * p99:.0f} ms; "
          f"{busy()}")
    assert in_time == n and p99 <= count(5.0, 0.2)


async def health(port):
    """Seconds of one GET /health."""
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    assert b" 200 " in answer
    return time.perf_counter() - begun


# ---- the end of a server
def stream(port, n_tokens):
    """A connection on which a long stream has begun -> its response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": "x", "max_tokens": n_tokens, "stream": True, "logit_bias": {"256": -100}}
    headers = {"Content-Type": "application/json", "Connection": "close"}  # so that the response owns the socket
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.readline().startswith(b"data: {")
    return response


@pytest.mark.score("D7")
def test_signals_under_eight_streams_end_cleanly_and_the_port_is_free(run, count, score):
    """SIGTERM: all eight end with [DONE], exit code 0 within 10 s. SIGKILL every fifth time: the next one starts."""
    n = count(0, 20)
    if not n:
        pytest.skip("starts a server for each try: run with --full; test_serve.py has one SIGTERM")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    seconds = []

    def attempt(i):
        with process(run, f"--port={port}", "--drain_seconds=3") as (server, found):
            assert found == port
            streams = [stream(port, 4000) for _ in range(8)]
            begun = time.perf_counter()
            if i % 5 == 4:
                server.kill()
                assert server.wait() == -signal.SIGKILL
                return
            server.terminate()
            rests = [response.read().decode() for response in streams]
            _, err = server.communicate(timeout=30)
            seconds.append(time.perf_counter() - begun)
            assert server.returncode == 0 and "Traceback" not in err
            assert all(rest.endswith("data: [DONE]\n\n") and '"finish_reason"' in rest for rest in rests)
            assert seconds[-1] <= 10

    figures = {}
    tries(lambda *found: figures.update(found=found[:2]), {i: i for i in range(n)}, attempt)
    score(*figures["found"], f"the same port each time; SIGTERM took {max(seconds):.1f} s at most; "
          f"{busy()}")


# ---- while it generates
@pytest.mark.score("D8")
def test_health_does_not_wait_for_the_model(run, count, score):
    n = count(20, 300)
    with serving(run, count(False, True)) as port:
        streams = [stream(port, 3000) for _ in range(8)]

        async def drive():
            return [await health(port) for _ in range(n)]

        waits = asyncio.run(drive())
        for response in streams:
            response.close()
    p99 = bench.quantile(waits, 0.99)
    held = sum(wait <= count(5.0, 0.05) for wait in waits)
    p50 = bench.quantile(waits, 0.5)
    score(held, n, f"/health during 8 streams: p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms; {busy()}")
    assert p99 <= count(5.0, 0.05)


@pytest.mark.score("D9")
def test_a_request_at_temperature_0_has_one_answer_whatever_surrounds_it(run, count, score):
    n = count(40, 1000)
    same = {"prompt": prompts(9)[8], "max_tokens": 24, "temperature": 0}
    bodies = []
    for i, ids in enumerate(prompts(n)):
        bodies += [same | {"stream": i % 2 == 0}, {"prompt": ids, "max_tokens": 1 + i % 30, "seed": i, "n": 1 + i % 2}]
    with serving(run, count(False, True)) as port:
        answers = asyncio.run(outcomes(port, bodies, 24))
    texts = [answer[1] for answer in answers[::2] if ending(answer) == "complete"]
    most = max((texts.count(text) for text in set(texts)), default=0)
    score(most, n, f"{len(set(texts))} distinct answers")
    assert len(texts) == n and len(set(texts)) == 1


@pytest.mark.score("D9")
def test_nothing_grows_in_a_long_mixture(run, count, score):
    """Memory by less than 1 MB in 10 minutes, once it has warmed up; files not at all."""
    minutes = count(0, 10)
    if not minutes:
        pytest.skip("takes minutes: run with --full")
    found = []
    with process(run) as (server, port):
        async def sample():
            while True:
                await asyncio.sleep(10)
                found.append((time.perf_counter(), resident(server.pid), bench.open_files(server.pid)))

        async def drive():
            sampling = asyncio.create_task(sample())
            await bench.soak(port, bench.Config(minutes=minutes), server.pid)
            sampling.cancel()

        asyncio.run(drive())
        time.sleep(1)
        files_after = bench.open_files(server.pid)
        failures = bench.counts(port)["thimble_failures_total"]
    later = found[len(found) // 3:]  # a third of the time to warm up
    seconds = [second - later[0][0] for second, *_ in later]
    sizes = [size / 1e6 for _, size, _ in later]
    slope = 600 * covariance(seconds, sizes) / covariance(seconds, seconds)  # MB in 10 minutes
    held = [slope < 1, files_after <= found[0][2], failures == 0]
    score(sum(held), len(held), f"{minutes} min of mixed requests: {slope:+.2f} MB in 10 min, {files_after} open files "
          f"afterwards, {failures:.0f} failures")
    assert all(held)


def covariance(a, b):
    mean_a = sum(a) / len(a)
    mean_b = sum(b) / len(b)
    return sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
