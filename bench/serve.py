"""Load on serve.py: what a crowd of clients gets, tokens a second by clients, leavers, and slow connections.

    python bench/serve.py                                          # a dense model of 19 M parameters, made here
    python bench/serve.py --checkpoint=runs/tiny_cpu --what=speed,leave

The server is a process of its own, the clients share this one: on two cores they take part of what they measure.
"""
import asyncio
import dataclasses
import http.client
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model
from thimble import checkpoint, configurator, files
from thimble.tokenizer import byte_tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    checkpoint: str = ""            # what to serve; empty: random weights, 8 layers of 448, byte tokens
    what: tuple[str, ...] = ("same", "speed", "crowd", "leave", "slow")  # which of the measurements
    clients: int = 100              # of the crowd
    requests: int = 2000            # of all of them together
    tokens: int = 64                # of each answer when speed is measured


def random_model(folder):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = model.Config(n_layer=8, n_head=7, n_embd=448, vocab_size=tokenizer.vocab_size, block_size=512)
    m = model.Model(config)
    with torch.no_grad():
        for p in m.parameters():
            p += 0.02 * torch.randn_like(p)                # so that greedy answers differ
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    meta = {"arch": "model", "model_config": dataclasses.asdict(config)}
    checkpoint.save(folder / "run", 1, m.state_dict(), None, meta, folder / "tokenizer.json", best=True)
    print(f"dense, {sum(p.numel() for p in m.parameters()) / 1e6:.1f} M parameters")
    return str(folder / "run")


def start(path):
    process = subprocess.Popen([sys.executable, str(ROOT / "serve.py"), f"--checkpoint={path}", "--port=0", "--log=no"],
                               stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    found = re.search(r"127\.0\.0\.1:(\d+)", line)
    if not found:
        raise SystemExit(line + process.stderr.read())
    return process, int(found[1])


async def ask(port, body):
    """-> (status, text, seconds to the first text, seconds, whether it was whole), over a connection of its own."""
    begun, first, raw = time.perf_counter(), None, b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = json.dumps(body).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                 b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(sent) + sent)
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split()[1])
    while part := await reader.read(65536):
        if first is None and b'"text"' in part:
            first = time.perf_counter() - begun
        raw += part
    writer.close()
    text, whole = "", True
    if status == 200 and body.get("stream"):
        events = re.findall(rb"data: (.*)\n\n", re.sub(rb"\r\n[0-9a-f]+\r\n|^[0-9a-f]+\r\n", b"", raw))
        whole = bool(events) and events[-1] == b"[DONE]"
        text = "".join(c["text"] for e in events[:-1] for c in json.loads(e)["choices"])
    elif status == 200:
        answer = json.loads(raw)
        text, whole = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"] is not None
    return status, text, first, time.perf_counter() - begun, whole


def memory(pid):
    """MB that a process has; nan where there is no /proc."""
    path = Path(f"/proc/{pid}/status")
    return int(re.search(r"VmRSS:\s+(\d+)", path.read_text())[1]) // 1024 if path.exists() else float("nan")


async def many(port, bodies, clients):
    """`clients` at a time -> the answers, in the order of the bodies."""
    answers, left = [None] * len(bodies), iter(enumerate(bodies))

    async def client():
        for i, body in left:
            answers[i] = await ask(port, body)
            if answers[i][0] == 429:
                await asyncio.sleep(1)                     # as its Retry-After says
    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def quantile(values, q):
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


def counts(port):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {k: float(v) for k, v in re.findall(r"^(thimble_[^ ]+) (\S+)$", text, re.M)}


async def same(port, cfg):
    """The official client, 200 prompts, completions and chats: streamed is not streamed."""
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        name, equal, usage = (await client.models.list()).data[0].id, 0, 0
        for i in range(200):
            how = {"model": name, "max_tokens": 8, "seed": i, "temperature": i % 4 / 3}
            text = "ab né 🎉 cd "[i % 7:] * (1 + i % 5)
            if i % 2:
                create, how["messages"] = client.chat.completions.create, [{"role": "user", "content": text}]
            else:
                create, how["prompt"] = client.completions.create, text
            whole = await create(**how)
            parts = [part async for part in await create(stream=True, stream_options={"include_usage": True}, **how)]
            got = "".join((c.delta.content or "") if i % 2 else c.text for part in parts for c in part.choices)
            choice = whole.choices[0]
            equal += got == (choice.message.content if i % 2 else choice.text)
            usage += parts[-1].usage == whole.usage
    print(f"200 prompts by openai {openai.__version__}: {equal} streamed as not streamed, usage equal in {usage}",
          flush=True)


async def speed(port, cfg):
    alone = None
    for clients in (1, 4, 16, 1, 4, 16):
        bodies = [{"prompt": f"{i} A little prompt to go on from", "max_tokens": cfg.tokens, "temperature": 0,
                   "stream": True} for i in range(4 * clients)]
        before, begun = counts(port), time.perf_counter()
        answers = await many(port, bodies, clients)
        seconds = time.perf_counter() - begun
        written = counts(port)["thimble_generated_tokens_total"] - before["thimble_generated_tokens_total"]
        rate, first = written / seconds, [a[2] for a in answers if a[2]]
        alone = alone or rate
        print(f"{clients:>3} clients: {rate:>7,.0f} tokens/s, {rate / alone:.2f} x; first token p50 "
              f"{1000 * quantile(first, 0.5):.0f} ms, p99 {1000 * quantile(first, 0.99):.0f} ms", flush=True)


async def crowd(port, cfg):
    """Every request has one outcome; greedy answers are those given alone; both sides count the same."""
    kinds = [{"prompt": f"{i} of a crowd, each with a text of its own " * (1 + i % 3), "max_tokens": 4 + i % 13,
              "temperature": 0} for i in range(50)]
    alone = [(await ask(port, body))[1] for body in kinds]
    before, begun = counts(port), time.perf_counter()
    answers = await many(port, [kinds[i % 50] | {"stream": i % 2 == 1} for i in range(cfg.requests)], cfg.clients)
    seconds, after = time.perf_counter() - begun, counts(port)
    done = [a for a in answers if a[0] == 200]
    full = [a for a in answers if a[0] == 429]
    same = sum(a[1] == alone[i % 50] for i, a in enumerate(answers) if a[0] == 200)
    names = {s: f'thimble_requests_total{{path="/v1/completions",status="{s}"}}' for s in (200, 429)}
    there = {s: int(after.get(name, 0) - before.get(name, 0)) for s, name in names.items()}
    print(f"{cfg.clients} clients, {cfg.requests} requests in {seconds:.1f} s: {len(done)} complete "
          f"({sum(a[4] for a in done)} whole, {same} as alone), {len(full)} times 429, "
          f"{len(answers) - len(done) - len(full)} others; the server counts {there[200]} and {there[429]}; "
          f"429 after p50 {1000 * quantile([a[3] for a in full], 0.5):.0f} ms, "
          f"p99 {1000 * quantile([a[3] for a in full], 0.99):.0f} ms", flush=True)


async def leave(port, cfg):
    """100 clients that leave in the middle, half of them streaming."""
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


async def slow(port, cfg):
    """400 connections that send nothing, half a header or half a body, beside others' /health."""
    sent = [b"", b"GET /health HTTP/1.1\r\nHost: local", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{", b"GET /"]
    begun, lives = time.perf_counter(), []

    async def one(i):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent[i % 4])
        try:
            while not reader.at_eof():
                if i % 4 == 3:
                    writer.write(b"x")                     # a byte now and then
                try:
                    await asyncio.wait_for(reader.read(1000), 1)
                except TimeoutError:
                    continue
        except ConnectionError:
            pass
        lives.append(time.perf_counter() - begun)
        writer.close()

    tasks, waits = [asyncio.create_task(one(i)) for i in range(400)], []
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


def main(cfg):
    known = Config().what
    if bad := set(cfg.what) - set(known):
        raise files.UserError(f"--what={','.join(sorted(bad))} is none of {', '.join(known)}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    with tempfile.TemporaryDirectory() as folder:
        process, port = start(cfg.checkpoint or random_model(Path(folder)))
        try:
            for name in cfg.what:
                before = memory(process.pid)
                asyncio.run(globals()[name](port, cfg))
                print(f"  {name}: the server went from {before} to {memory(process.pid)} MB", flush=True)
        finally:
            process.terminate()
            code = process.wait()
            process.stderr.close()
    print(f"SIGTERM: exit code {code}; torch threads {os.environ.get('OMP_NUM_THREADS', 'all')}")


if __name__ == "__main__":
    configurator.run(main, Config)
