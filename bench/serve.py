"""Load on serve.py: many clients at once, tokens per second, clients that disconnect, and slow connections.

    python bench/serve.py                                          # a dense model of 19 M parameters, made here
    python bench/serve.py --checkpoint=runs/tiny_cpu --what=speed,leave
    python bench/serve.py --what=overload,soak --minutes=30        # the long ones

The server is a process of its own, all clients share this one: on two cores they slow down what they measure.
"""
import asyncio
import http.client
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model
from thimble import checkpoint, configurator, files
from thimble.tokenizer import byte_tokenizer


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""            # what to serve; empty: random weights, 8 layers of width 448, byte tokens
    # measurements, separated by commas
    what: tuple[Literal["same", "speed", "crowd", "leave", "slow", "overload", "soak"], ...] = (
        "same", "speed", "crowd", "leave", "slow")
    clients: int = 100              # simultaneous clients in crowd
    requests: int = 2000            # requests in crowd, of all clients together
    tokens: int = 64                # tokens of each answer in speed and overload
    seconds: float = 60.0           # length of overload
    minutes: float = 5.0            # length of soak

    def __post_init__(self):
        configurator.check(self, positive=("clients", "requests", "tokens", "seconds", "minutes"))


# ---- the server
def random_model(folder):
    """Save a run with random weights in the folder -> its path."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = model.Config(n_layer=8, n_head=7, n_embd=448, vocab_size=tokenizer.vocab_size, block_size=512)
    m = model.Model(config)
    with torch.no_grad():
        for p in m.parameters():
            p += 0.02 * torch.randn_like(p)  # so that greedy answers differ
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    meta = {"arch": "model", "model_config": asdict(config)}
    checkpoint.save(folder / "run", 1, m.state_dict(), None, meta, folder / "tokenizer.json", best=True)
    print(f"dense, {sum(p.numel() for p in m.parameters()) / 1e6:.1f} M parameters")
    return str(folder / "run")


def start(path):
    """-> (process, port). Where the server does not start, what it says is the end of this script, too."""
    command = [sys.executable, str(ROOT / "serve.py"), f"--checkpoint={path}", "--port=0", "--log=no"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    found = re.search(r"127\.0\.0\.1:(\d+)", line)
    if not found:
        raise SystemExit((line + process.stderr.read()).strip())
    return process, int(found[1])


def memory(pid):
    """Resident memory of a process in MB; nan where there is no /proc."""
    path = Path(f"/proc/{pid}/status")
    if not path.exists():
        return float("nan")
    return int(re.search(r"VmRSS:\s+(\d+)", path.read_text())[1]) // 1024


def open_files(pid):
    """How many files and connections a process has open; nan where there is no /proc."""
    path = Path(f"/proc/{pid}/fd")
    return len(os.listdir(path)) if path.exists() else float("nan")


def counts(port):
    """The server's own counters and gauges, {name: value}."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {name: float(value) for name, value in re.findall(r"^(thimble_[^ ]+) (\S+)$", text, re.M)}


# ---- the clients
async def ask(port, body):
    """-> (status, text, seconds to the first text, seconds, whether it was complete), over a connection of its own."""
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = json.dumps(body).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                 b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(sent) + sent)
    first = None
    raw = b""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        while part := await reader.read(65536):
            if first is None and b'"text"' in part:
                first = time.perf_counter() - begun
            raw += part
    finally:
        writer.close()
    status = int(head.split()[1])
    text = ""
    whole = True
    if status == 200 and body.get("stream"):
        unchunked = re.sub(rb"\r\n[0-9a-f]+\r\n|^[0-9a-f]+\r\n", b"", raw)  # without HTTP's sizes of chunks
        events = re.findall(rb"data: (.*)\n\n", unchunked)
        whole = bool(events) and events[-1] == b"[DONE]"
        for event in events[:-1]:
            text += "".join(choice["text"] for choice in json.loads(event)["choices"])
    elif status == 200:
        choice = json.loads(raw)["choices"][0]
        text = choice["text"]
        whole = choice["finish_reason"] is not None
    return status, text, first, time.perf_counter() - begun, whole


async def many(port, bodies, clients):
    """Ask for all bodies, `clients` at a time -> the answers, in the same order."""
    answers = [None] * len(bodies)
    left = iter(enumerate(bodies))  # shared: each client takes the next one

    async def client():
        for i, body in left:
            answers[i] = await ask(port, body)
            if answers[i][0] == 429:
                await asyncio.sleep(1)  # as its Retry-After says

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def quantile(values, q):
    if not values:
        return float("nan")
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


# ---- the measurements
# each by the port of the server, the Config and the number of the server's process
async def same(port, cfg, pid):
    """200 prompts by the official client, completions and chats: is a streamed answer the same as a whole one?"""
    import openai
    equal = 0
    equal_usage = 0
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        name = (await client.models.list()).data[0].id
        for i in range(200):
            chat = i % 2 == 1
            how = {"model": name, "max_tokens": 8, "seed": i, "temperature": i % 4 / 3}
            text = "ab né 🎉 cd "[i % 7:] * (1 + i % 5)
            if chat:
                create = client.chat.completions.create
                how["messages"] = [{"role": "user", "content": text}]
            else:
                create = client.completions.create
                how["prompt"] = text
            whole = await create(**how)
            choice = whole.choices[0]
            parts = [part async for part in await create(stream=True, stream_options={"include_usage": True}, **how)]
            streamed = ""
            for part in parts:
                for new in part.choices:
                    streamed += (new.delta.content or "") if chat else new.text
            equal += streamed == (choice.message.content if chat else choice.text)
            equal_usage += parts[-1].usage == whole.usage
    print(f"200 prompts by openai {openai.__version__}: {equal} streamed as not streamed, usage equal in {equal_usage}",
          flush=True)


async def speed(port, cfg, pid):
    """Tokens per second of all clients together, and how long each waits for its first one."""
    alone = None
    for clients in (1, 4, 16, 1, 4, 16):  # twice, since the first round warms up
        bodies = []
        for i in range(4 * clients):
            # the number comes first, so that no prompt begins like another and all of them are read
            bodies.append({"prompt": f"{i} A little prompt to go on from", "max_tokens": cfg.tokens, "temperature": 0,
                           "stream": True})
        before = counts(port)
        begun = time.perf_counter()
        answers = await many(port, bodies, clients)
        seconds = time.perf_counter() - begun
        written = counts(port)["thimble_generated_tokens_total"] - before["thimble_generated_tokens_total"]
        rate = written / seconds
        alone = alone or rate
        first = [answer[2] for answer in answers if answer[2]]
        print(f"{clients:>3} clients: {rate:>7,.0f} tokens/s, {rate / alone:.2f} x; first token p50 "
              f"{1000 * quantile(first, 0.5):.0f} ms, p99 {1000 * quantile(first, 0.99):.0f} ms", flush=True)


async def crowd(port, cfg, pid):
    """Does every request have one outcome, is every greedy answer the one given alone, do both sides count the same?"""
    kinds = []
    for i in range(50):
        kinds.append({"prompt": f"{i} of a crowd, each with a text of its own " * (1 + i % 3), "max_tokens": 4 + i % 13,
                      "temperature": 0})
    alone = [(await ask(port, body))[1] for body in kinds]
    bodies = [kinds[i % 50] | {"stream": i % 2 == 1} for i in range(cfg.requests)]
    before = counts(port)
    begun = time.perf_counter()
    answers = await many(port, bodies, cfg.clients)
    seconds = time.perf_counter() - begun
    after = counts(port)
    counted = {}
    for status in (200, 429):
        name = f'thimble_requests_total{{path="/v1/completions",status="{status}"}}'
        counted[status] = int(after.get(name, 0) - before.get(name, 0))
    done = [answer for answer in answers if answer[0] == 200]
    n_whole = sum(answer[4] for answer in done)
    n_as_alone = sum(answer[1] == alone[i % 50] for i, answer in enumerate(answers) if answer[0] == 200)
    refused = [answer[3] for answer in answers if answer[0] == 429]  # seconds until they were
    print(f"{cfg.clients} clients, {cfg.requests} requests in {seconds:.1f} s: {len(done)} complete "
          f"({n_whole} whole, {n_as_alone} as alone), {len(refused)} times 429, "
          f"{len(answers) - len(done) - len(refused)} others; the server counts {counted[200]} and {counted[429]}; "
          f"429 after p50 {1000 * quantile(refused, 0.5):.0f} ms, p99 {1000 * quantile(refused, 0.99):.0f} ms",
          flush=True)


async def leave(port, cfg, pid):
    """100 clients that disconnect in the middle of an answer, half of them streaming: how soon is their row free?"""
    times = []
    for i in range(100):
        body = json.dumps({"prompt": "x" * (1 + 4 * (i % 50)), "max_tokens": 200, "stream": i % 2 == 1}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await asyncio.sleep(0.02 + 0.001 * i)
        writer.transport.abort()
        begun = time.perf_counter()
        while counts(port)["thimble_requests_running"]:
            await asyncio.sleep(0.002)
        times.append(time.perf_counter() - begun)
    print(f"100 clients left: row free after p50 {1000 * quantile(times, 0.5):.0f} ms, most {1000 * max(times):.0f} ms",
          flush=True)


async def dawdle(port, sent, trickle):
    """A connection that sends no complete request, or one more byte each second: returns when the server closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    try:
        while not reader.at_eof():
            if trickle:
                writer.write(b"x")
            try:
                await asyncio.wait_for(reader.read(1000), 1)
            except TimeoutError:
                continue
    except ConnectionError:
        pass
    writer.close()


async def slow(port, cfg, pid):
    """400 connections that send nothing, half a header or half a body: when are they closed, and does /health wait?"""
    sent = [b"", b"GET /health HTTP/1.1\r\nHost: local", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{", b"GET /"]
    begun = time.perf_counter()
    lives = []

    async def one(i):
        await dawdle(port, sent[i % 4], trickle=i % 4 == 3)
        lives.append(time.perf_counter() - begun)

    tasks = [asyncio.create_task(one(i)) for i in range(400)]
    waits = []
    while not all(task.done() for task in tasks) and time.perf_counter() - begun < 40:
        sent_at = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await reader.read()
        writer.close()
        waits.append(time.perf_counter() - sent_at)
        await asyncio.sleep(0.02)
    print(f"400 slow connections: {len(lives)} closed, the last after {max(lives):.1f} s; /health meanwhile p50 "
          f"{1000 * quantile(waits, 0.5):.1f} ms, p99 {1000 * quantile(waits, 0.99):.1f} ms", flush=True)


async def overload(port, cfg, pid):
    """Requests at twice the rate that the server can answer, sent on time whatever became of those before (an open
    loop): does it still do all it can, and how soon does it refuse the rest?

    -> figures: requests a second that it can and that it did answer, how many were broken, seconds to first tokens.
    """
    def body(i):
        return {"prompt": f"{i} A little prompt to go on from", "max_tokens": cfg.tokens, "temperature": 0,
                "logit_bias": {"256": -100}, "stream": True}  # 256: the end of the text, so that all are equally long

    await many(port, [body(i) for i in range(32)], 32)  # warms up
    begun = time.perf_counter()
    await many(port, [body(i) for i in range(96)], 32)
    capacity = 96 / (time.perf_counter() - begun)  # answers per second
    tasks = []
    begun = time.perf_counter()
    while (now := time.perf_counter() - begun) < cfg.seconds:
        while len(tasks) < 2 * capacity * now:
            tasks.append(asyncio.create_task(ask(port, body(len(tasks)))))
        await asyncio.sleep(0.005)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    seconds = time.perf_counter() - begun
    broken = [answer for answer in answers if isinstance(answer, Exception)]
    told = [answer for answer in answers if not isinstance(answer, Exception)]
    done = [answer for answer in told if answer[0] == 200 and answer[4]]
    refused = [answer for answer in told if answer[0] == 429]
    first = [answer[2] for answer in done]
    waits = [answer[3] for answer in refused]
    print(f"{len(tasks)} requests at twice the capacity of {capacity:.1f}/s: {len(done)} whole "
          f"({len(done) / seconds:.1f}/s), {len(refused)} times 429, {len(told) - len(done) - len(refused)} others, "
          f"{len(broken)} broken; first token p50 {quantile(first, 0.5):.2f} s, p99 {quantile(first, 0.99):.2f} s; "
          f"429 after p50 {1000 * quantile(waits, 0.5):.0f} ms, p99 {1000 * quantile(waits, 0.99):.0f} ms", flush=True)
    return {"capacity": capacity, "goodput": len(done) / seconds, "requests": len(tasks),
            "told": len(done) + len(refused), "first_p99": quantile(first, 0.99)}


async def soak(port, cfg, pid):
    """A long mixture of requests: whole and streamed ones, wrong ones, clients that leave. Does anything grow?"""
    end = time.perf_counter() + 60 * cfg.minutes
    outcomes = Counter()

    async def client(number):
        i = number
        while time.perf_counter() < end:
            i += 16  # the number of clients, so that no two send the same prompt
            body = {"prompt": f"{i} of a mixture " * (1 + i % 9), "max_tokens": 1 + i % 60, "stream": i % 2 == 0,
                    "n": 1 + i % 3, "seed": i, "logprobs": None if i % 5 else 2}
            if i % 7 == 0:
                body["temperature"] = -1
            asking = asyncio.create_task(ask(port, body))
            if i % 11 == 0:
                await asyncio.sleep(0.05)
                asking.cancel()
            try:
                outcomes[(await asking)[0]] += 1
            except asyncio.CancelledError:
                outcomes["left"] += 1
            except Exception as e:
                outcomes[type(e).__name__] += 1

    async def report():
        begun = time.perf_counter()
        while True:
            await asyncio.sleep(min(60, 15 * cfg.minutes))
            found = counts(port)
            print(f"  {(time.perf_counter() - begun) / 60:.1f} min: {found['thimble_generated_tokens_total']:,.0f} "
                  f"tokens, {memory(pid)} MB, {open_files(pid)} open files", flush=True)

    reporting = asyncio.create_task(report())
    await asyncio.gather(*(client(number) for number in range(16)))
    reporting.cancel()
    await asyncio.sleep(1)
    found = counts(port)
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items(), key=str))
    print(f"{cfg.minutes:g} minutes by 16 clients: {told}; afterwards {found['thimble_requests_running']:.0f} running, "
          f"{found['thimble_requests_waiting']:.0f} waiting, {found['thimble_failures_total']:.0f} failures",
          flush=True)


MEASUREMENTS = {"same": same, "speed": speed, "crowd": crowd, "leave": leave, "slow": slow, "overload": overload,
                "soak": soak}


def main(cfg):
    if "same" in cfg.what:
        files.need("openai", "--what=same")  # asked here, before a model is made and served
    # every connection is an open file, and the usual soft limit is 1,024
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(4096, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        process, port = start(cfg.checkpoint or random_model(Path(folder)))
        try:
            for name in cfg.what:
                before = memory(process.pid)
                asyncio.run(MEASUREMENTS[name](port, cfg, process.pid))
                print(f"  {name}: the server went from {before} to {memory(process.pid)} MB", flush=True)
        finally:
            process.terminate()
            code = process.wait()
            process.stderr.close()
    print(f"SIGTERM: exit code {code}; torch threads {os.environ.get('OMP_NUM_THREADS', 'all')}")


if __name__ == "__main__":
    configurator.run(main, Config)
