"""Continuous batching: many texts at once, each in a row of one cache; they join and leave between two tokens.

The rows of the cache always stand in this order:

    index    0 ... n_running - 1      n_running             ... max_batch - 1
    state    running                | filling             | free
             one token a turn,      | one row at most,    | keep the ids they held: a prompt that
             all in one step        | reads its prompt    | begins with them does not read them again

The running rows come first so that one `Model.step` on a view of the cache serves them all. Rows keep the order by
being swapped across a border. Four of them run, P is filling, and B finishes:

    A  B  C  D | P | x  y
    A  D  C  b | P | x  y       B was swapped with the last running row and is free now: b
    A  D  C | P | b  x  y       the filling row moves up

The event loop calls `start`, `submit` and `cancel`; all else happens in the engine's own thread, which owns the model.
It reports to each sequence's queue: (index, text, entries, finish), where finish is None, "stop", "length" or "error".
"""
import bisect
import collections
import contextlib
import math
import re
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from thimble.files import UserError, short
from thimble.generate import StopTexts, draw

# Prompt tokens read between two tokens of the running rows: more finish a prompt sooner, but hold the others up longer.
PROMPT_CHUNK = 256
# Upper ends of the buckets of a Histogram: from a token of a tiny model on a GPU to an answer that waited its turn.
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Entry(NamedTuple):
    """What is reported of one token where log-probabilities are wanted."""

    token: int
    offset: int                     # where its characters begin in the text, echo included
    logprob: float | None           # None for the first token of a prompt, which nothing precedes
    top: list | None                # (token, logprob) of the most likely ones, best first


@dataclass(eq=False)  # by identity: two clients may ask for the same
class Sequence:
    """A text to write: its prompt, how to continue it, and where to report."""

    prompt: list                    # ids, at least one
    max_new_tokens: int             # 0 only with echo
    stream: object                  # a Tokenizer's stream(), which turns ids into text one by one
    # how a token is chosen
    seed: int = 0
    sampling: dict = field(default_factory=dict)  # keywords of generate.filter_logits
    bias: dict = field(default_factory=dict)  # {id: what is added to its logit}
    presence_penalty: float = 0.0   # taken off the logit of each token written so far
    frequency_penalty: float = 0.0  # the same, times how often it was written
    stops: tuple = ()               # the text ends before the first of these
    # what is reported
    echo: str | None = None         # the prompt as text, to be reported before what is written; None: not wanted
    top: int | None = None          # how many alternatives an Entry lists; None: no entries
    queue: object = None            # an asyncio.Queue
    index: int = 0                  # of this text among those of its request

    def __post_init__(self):
        self.out = []  # ids written so far, the stop id included
        self.length = 0  # characters of the text so far, held ones included
        self.last = None  # when the last token was written
        self.cancelled = False
        self.created = time.monotonic()
        self.held = StopTexts(self.stops)
        self.generator = torch.Generator().manual_seed(self.seed)
        # argmax will do where nothing changes the order of the logits
        cold = self.sampling.get("temperature", 1) == 0 and self.sampling.get("repetition_penalty", 1) == 1
        self.greedy = cold and not (self.bias or self.presence_penalty or self.frequency_penalty)

    def draw_next(self, logits):
        """logits (V,), on the CPU -> the next id."""
        logits = logits.clone()
        if self.bias:
            logits[list(self.bias)] += torch.tensor(list(self.bias.values()))
        if self.out and (self.presence_penalty or self.frequency_penalty):
            # as OpenAI's API defines them: on what was written, not on the prompt
            tokens, times = torch.tensor(self.out).unique(return_counts=True)
            logits[tokens] -= self.presence_penalty + self.frequency_penalty * times
        return draw(logits, self.generator, self.prompt + self.out, **self.sampling)


class Row:
    """A row of the cache."""

    def __init__(self):
        self.ids = []  # what it holds; ids[k] is at position k
        self.sequence = None  # what it is running or filling for; None: free
        self.used = 0  # when it became free


class Histogram:
    """How often something took how long."""

    def __init__(self):
        self.counts = [0] * (len(SECONDS) + 1)  # by bucket; the last one has no upper end
        self.sum = 0.0  # seconds

    def add(self, seconds):
        self.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds


def free_memory(device):
    """Bytes that can still be allocated on a device; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = math.inf
    meminfo = Path("/proc/meminfo")  # Linux
    if device.type == "cpu" and meminfo.exists():
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())[1])
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container: a number, or "max"
    if device.type == "cpu" and limit.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()))
    return free


# ---- a cache is nested dicts and lists of tensors, (B, ...) each, and its position
def view(part, a, b):
    """Rows a to b of a cache, sharing its memory."""
    if isinstance(part, torch.Tensor):
        return part[a:b] if part.dim() else part
    if isinstance(part, dict):
        return {name: view(value, a, b) for name, value in part.items()}
    return [view(value, a, b) for value in part]


def leaves(part):
    """All tensors of a cache except the position, in a fixed order."""
    if isinstance(part, torch.Tensor):
        return [part]
    parts = part
    if isinstance(part, dict):
        parts = [value for name, value in part.items() if name != "pos"]
    return [leaf for value in parts for leaf in leaves(value)]


def is_cuttable(cache, size):
    """Whether a cache can be cut after any token: keys and values of the whole context, (B, K, S, D), can. A state or
    a sliding window can only be continued.
    """
    for layer in cache.get("layers", [{}]):
        if set(layer) != {"k", "v"} or layer["k"].shape[2:3] != (size,):
            return False
    return True


def common_prefix(a, b):
    """How many items two lists have in common at their beginning."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


class Engine:
    """Owns the model and its cache. UserError if the model cannot decode max_batch rows."""

    def __init__(self, model, tokenizer, stop_ids, max_batch, prompt_chunk=PROMPT_CHUNK):
        self.model = model
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.max_batch = max_batch
        self.prompt_chunk = prompt_chunk
        self.size = model.config.block_size  # tokens that a row holds
        self.device = next(model.parameters()).device
        # for /metrics
        self.counts = collections.Counter()
        self.first_token = Histogram()  # from the request to its first token
        self.inter_token = Histogram()  # from one token of a text to its next
        self.waiting = collections.deque()  # sequences without a row; only under `changed`
        self.changed = threading.Condition()
        self.entering = None  # the sequence that last left `waiting`, until its turn is over
        self.events = []  # (sequence, text, entries, finish) of this turn
        self.stop_at = math.inf  # by time.monotonic(): when all that is unfinished ends
        try:  # one step of a full batch, before anybody relies on it
            self.check_memory()
            self.reset()
            with torch.no_grad():
                self.step([[0]] * max_batch, [0] * max_batch, 0)
        except UserError:
            raise
        except Exception as e:  # out of memory, or the model file does not support rows at different positions
            raise UserError(f"--max_batch={max_batch}: the model cannot decode {max_batch} rows of {self.size:,} "
                            f"tokens: {short(e, 200)}; --max_batch=1 needs the least") from None

    def check_memory(self):
        """UserError if the rows need more memory than is free: on a CPU the system would kill us without a word."""
        row = self.model.init_cache(1, self.size)
        self.cuttable = is_cuttable(row, self.size)
        need = sum(leaf.numel() * leaf.element_size() for leaf in leaves(row))
        if not self.cuttable:
            need *= 2  # a step returns new states beside the old ones
        need += 2 * 4 * self.tokenizer.vocab_size  # float32 logits and their log_softmax
        free = free_memory(self.device)
        if self.max_batch * need > free:
            raise UserError(f"--max_batch={self.max_batch}: {self.max_batch:,} rows of {self.size:,} tokens need "
                            f"{self.max_batch * need / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB of memory are free; use "
                            f"--max_batch={max(1, int(0.8 * free / need))} or less")

    def reset(self):
        """An empty cache; whatever was in the old one is lost."""
        self.cache = None  # freed before the next one is made: it may fill half of the memory
        self.cache = self.model.init_cache(self.max_batch, self.size)
        self.rows = [Row() for _ in range(self.max_batch)]
        self.n_running = 0
        self.filling = None  # the Row, which is rows[n_running]

    # ---- called by the event loop
    def start(self, loop):
        """Start the thread; it reports by callbacks in this event loop."""
        # a daemon, so that a process can end in the middle of a step
        threading.Thread(target=self.run, args=(loop,), daemon=True, name="engine").start()

    def submit(self, sequences, limit):
        """Queue all of them, or none and return False if more than `limit` would be waiting."""
        with self.changed:
            # rows that will be filled at once do not count as waiting
            free = self.max_batch - self.n_running - (self.filling is not None)
            if len(self.waiting) + len(sequences) > limit + free:
                return False
            self.waiting.extend(sequences)
            self.changed.notify()
        return True

    def cancel(self, sequences):
        """Nobody reads them any more: the waiting ones go now, the others before the next token."""
        with self.changed:
            for sequence in sequences:
                sequence.cancelled = True
            self.waiting = collections.deque(s for s in self.waiting if not s.cancelled)

    # ---- in the engine's thread
    @torch.no_grad()
    def run(self, loop):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.n_running or self.filling)
            try:
                self.turn()
            except Exception:  # raised by the model, which may have left the cache half written
                traceback.print_exc()
                self.counts["failures"] += 1
                self.fail()
            events = self.events
            self.events = []
            self.entering = None
            if events:
                with contextlib.suppress(RuntimeError):  # the loop is closed: the server has shut down
                    loop.call_soon_threadsafe(self.deliver, events)

    def deliver(self, events):
        """Runs in the event loop, since its queues are not thread-safe."""
        for sequence, text, entries, finish in events:
            sequence.queue.put_nowait((sequence.index, text, entries, finish))

    def fail(self):
        """Report an error to every sequence that the cache holds, and begin with an empty one."""
        lost = {self.entering, *(row.sequence for row in self.rows)} - {None}
        for sequence in lost:
            self.events.append((sequence, "", [], "error"))
        self.reset()

    def turn(self):
        """Drop cancelled sequences, read up to prompt_chunk tokens of prompts, write one token for each running row."""
        if time.monotonic() > self.stop_at:
            self.finish_all()
        self.drop_cancelled()
        budget = self.prompt_chunk
        while budget > 0:
            if self.filling:
                budget -= self.fill(budget)
                continue
            sequence = self.next_waiting()
            if sequence is None:
                break
            budget -= self.admit(sequence)
        # always one step after the prompts' share, so that long prompts cannot stop the running rows
        if self.n_running:
            self.decode()

    def finish_all(self):
        """The server shuts down: report each text as ended at the length it has."""
        with self.changed:
            unfinished = list(self.waiting)
            self.waiting = collections.deque()
        unfinished += [row.sequence for row in self.rows if row.sequence]
        for sequence in unfinished:
            self.events.append((sequence, sequence.held("", last=True), [], "length"))
            sequence.cancelled = True

    def drop_cancelled(self):
        for i in reversed(range(self.n_running)):  # from the end, since `leave` moves the rows behind i
            if self.rows[i].sequence.cancelled:
                self.leave(i)
        if self.filling and self.filling.sequence.cancelled:
            # it is at the border already, and what it has read of its prompt stays useful
            self.filling.sequence = None
            self.filling = None

    def next_waiting(self):
        """The next sequence to get a row; None if none is waiting or no row is free."""
        with self.changed:
            self.entering = None
            if self.waiting and self.n_running < self.max_batch:
                self.entering = self.waiting.popleft()
        return self.entering

    # ---- prompts
    def admit(self, sequence):
        """Give a sequence its row, or all it needs without one -> how many tokens went through the model for that."""
        if sequence.echo is not None and self.report_prompt(sequence):
            return len(sequence.prompt)
        i, n = self.prepare_row(sequence.prompt)
        row = self.rows[i]
        row.ids = sequence.prompt[:n]
        row.sequence = sequence
        self.counts["prompt_tokens_reused"] += n
        self.swap(i, self.n_running)
        self.filling = row
        return 0

    def prepare_row(self, prompt):
        """(index of a free row, how many ids of the prompt are in it already)."""
        # never the last id: its logits are needed, so it has to go through the model
        known = [self.reusable(i, prompt[:-1]) for i in range(self.max_batch)]
        best = max(range(self.max_batch), key=known.__getitem__)
        n = known[best]
        free = best >= self.n_running
        if n and free and 2 * n >= len(self.rows[best].ids):
            return best, n
        # The best row is running, or it holds much else, which may be wanted again. So it stays as it is, and the row
        # that has been free for the longest time gets a copy of what fits.
        oldest = min(range(self.n_running, self.max_batch), key=lambda i: self.rows[i].used)
        for part in leaves(self.cache):
            if not self.cuttable:  # then n is 0, and a state has to begin at zero
                part[oldest].zero_()
            elif oldest != best:
                part[oldest, :, :n] = part[best, :, :n]
        return oldest, n

    def reusable(self, i, prompt):
        """How many ids of the prompt's beginning row i can save it."""
        row = self.rows[i]
        n = common_prefix(row.ids, prompt)
        if self.cuttable:
            return n
        free = i >= self.n_running
        whole = n == len(row.ids)
        return n if free and whole else 0

    def fill(self, budget):
        """Read at most `budget` more ids of the prompt -> how many. The last one gives the first token."""
        row = self.filling
        sequence = row.sequence
        start = len(row.ids)
        new = sequence.prompt[start:start + budget]
        logits = self.step([new], [start], self.n_running)
        row.ids = row.ids + new
        if len(row.ids) == len(sequence.prompt):
            self.filling = None
            self.n_running += 1
            self.counts["prompt_tokens"] += len(sequence.prompt)
            if self.choose(logits, [sequence]):
                self.leave(self.n_running - 1)
        return len(new)

    def report_prompt(self, sequence):
        """Report the echo, by one pass without a cache -> whether the sequence is finished with that."""
        entries = []
        if sequence.top is not None:
            logits = self.model(torch.tensor([sequence.prompt], device=self.device))[0][0]  # (T, V)
            stream = self.tokenizer.stream(skip_special=False)
            for i, token in enumerate(sequence.prompt):
                logprobs = logits[i - 1].log_softmax(-1) if i else None
                new = stream.step(token)
                if i == 0 and not sequence.echo.startswith(new):  # bos, which is in the prompt but not in its text
                    new = ""
                entries.append(self.entry(sequence, token, new, logprobs))
        sequence.length = len(sequence.echo)
        finished = sequence.max_new_tokens == 0
        self.events.append((sequence, sequence.echo, entries, "length" if finished else None))
        if sequence.top is not None and sequence.max_new_tokens == 1:
            # what lm-eval asks for: the logits are here, so it needs no row
            self.choose(logits[-1:], [sequence])
            finished = True
        if finished:
            self.counts["prompt_tokens"] += len(sequence.prompt)
        return finished

    # ---- tokens
    def decode(self):
        """One more token for each running row."""
        rows = self.rows[:self.n_running]
        last = [row.sequence.out[-1] for row in rows]
        logits = self.step([[token] for token in last], [len(row.ids) for row in rows], 0)
        for row, token in zip(rows, last, strict=True):
            row.ids.append(token)
        self.counts["steps"] += 1
        finished = self.choose(logits, [row.sequence for row in rows])
        for i in reversed(finished):  # from the end, since `leave` moves the rows behind i
            self.leave(i)

    def step(self, idx, pos, first):
        """Model.step of the rows first, first + 1, ...: idx (B, T) ids, pos (B,) ids seen -> logits (B, V).

        T > 1 only with B = 1.
        """
        rows = view(self.cache, first, first + len(idx))
        # rows at different positions have a pos of shape (B,), see `step` in the model files
        if len(pos) == 1:
            rows["pos"] = torch.tensor(pos[0])  # a scalar stays on the CPU
        else:
            rows["pos"] = torch.tensor(pos, device=self.device)
        logits, stepped = self.model.step(torch.tensor(idx, device=self.device), rows)
        for old, new in zip(leaves(rows), leaves(stepped), strict=True):
            if new is not old:  # a model file may return other tensors than those it was given
                old.copy_(new)
        return logits

    def choose(self, logits, sequences):
        """Choose and record the next token of each, logits (B, V) -> indices of the sequences that have finished."""
        vocab_size = self.tokenizer.vocab_size  # a model may have rows beyond it
        greedy = logits[:, :vocab_size].argmax(-1).tolist()  # for all at once: one transfer from the device
        logprobs = [None] * len(sequences)
        if any(sequence.top is not None for sequence in sequences):
            logprobs = logits.log_softmax(-1)
        finished = []
        for i, sequence in enumerate(sequences):
            # drawn on the CPU with a generator of its own: the batch around it must not change a text
            token = greedy[i] if sequence.greedy else sequence.draw_next(logits[i, :vocab_size].cpu())
            if self.record(sequence, token, logprobs[i]):
                finished.append(i)
        return finished

    def record(self, sequence, token, logprobs):
        """Add a token to its sequence and report it -> whether it was the last."""
        sequence.out.append(token)
        self.counts["generated_tokens"] += 1
        now = time.monotonic()
        if sequence.last is None:
            self.first_token.add(now - sequence.created)
        else:
            self.inter_token.add(now - sequence.last)
        sequence.last = now
        stopped = token in self.stop_ids
        new = "" if stopped else sequence.stream.step(token)
        entries = []
        if sequence.top is not None:
            entries.append(self.entry(sequence, token, new, logprobs))
        shown = sequence.held(new)
        finish = None
        if sequence.held.done:
            finish = "stop"
        elif stopped or len(sequence.out) >= sequence.max_new_tokens:
            finish = "stop" if stopped else "length"
            shown += sequence.held(sequence.stream.flush(), last=True)
        self.events.append((sequence, shown, entries, finish))
        return finish is not None

    def entry(self, sequence, token, new, logprobs):
        """The Entry of a token that added the text `new`; logprobs (V,) or None for the first of a prompt."""
        sequence.length += len(new)
        # `new` may begin with a broken character of earlier tokens: only the end of it belongs to this token
        own = len(self.tokenizer.decode([token], skip_special=False)) if new else 0
        offset = sequence.length - min(own, len(new))
        if logprobs is None:
            return Entry(token, offset, None, None)
        vocab_size = self.tokenizer.vocab_size
        best = logprobs[:vocab_size].topk(min(sequence.top, vocab_size))
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Entry(token, offset, logprobs[token].item(), top)

    # ---- the order of the rows, as drawn above
    def leave(self, i):
        """Running row i becomes free; it keeps its ids."""
        row = self.rows[i]
        row.sequence = None
        row.used = time.monotonic()
        self.n_running -= 1
        self.swap(i, self.n_running)
        if self.filling:  # it was at n_running + 1, behind the row that is free now
            self.swap(self.n_running, self.n_running + 1)

    def swap(self, i, j):
        """Exchange two rows, in the cache as well."""
        if i == j:
            return
        n = max(len(self.rows[i].ids), len(self.rows[j].ids))
        for part in leaves(self.cache):
            if self.cuttable:
                part = part[:, :, :n]  # nothing beyond it is in use
            part[[i, j]] = part[[j, i]]  # indexing by a list copies, so this is safe
        self.rows[i], self.rows[j] = self.rows[j], self.rows[i]
