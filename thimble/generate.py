"""Decoding: which token comes next, for everyone who writes text with a model."""
import torch


def filter_logits(logits, seen=(), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """logits: (V,) -> (V,) whose softmax is the distribution to draw from; -inf for tokens that are out.

    In this order: repetition penalty (once per distinct token of `seen`; Keskar et al. 2019, CTRL, sec. 4.1, with
    negative logits multiplied), temperature, top-k, top-p (the token that crosses p stays; Holtzman et al. 2020),
    min-p (Nguyen et al. 2024). temperature 0 leaves the likeliest token alone.
    """
    logits = logits.clone()
    if repetition_penalty != 1 and len(seen):
        ids = torch.as_tensor(seen, device=logits.device).unique()
        penalised = logits[ids]
        logits[ids] = torch.where(penalised > 0, penalised / repetition_penalty, penalised * repetition_penalty)
    if temperature == 0:
        return torch.full_like(logits, -torch.inf).index_fill_(0, logits.argmax(), 0.0)
    logits = (logits - logits.max()) / max(temperature, 1e-30)  # the largest is 0, and so never infinite
    if 0 < top_k < len(logits):
        keep = logits.topk(top_k).indices                  # exactly k, also where logits are equal
        logits = torch.full_like(logits, -torch.inf).index_copy_(0, keep, logits[keep])
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True, stable=True)
        logits[order[probs.cumsum(-1) - probs >= top_p]] = -torch.inf
    if min_p > 0:
        probs = logits.softmax(-1)
        logits[probs < min_p * probs.max()] = -torch.inf
    return logits


def draw(logits, generator=None, seen=(), **sampling):
    """logits (V,) -> an id drawn from what `filter_logits` leaves of them; a CPU generator makes it repeatable."""
    probs = filter_logits(logits, seen, **sampling).softmax(-1)
    return torch.multinomial(probs.cpu(), 1, generator=generator).item()


class Decoder:
    """Rows of ids and the model's cache, a window that slides: when the context is full, its later half starts anew."""

    def __init__(self, model, idx, max_new_tokens):
        self.model, self.idx = model, idx                                                    # idx: (B, T)
        self.size = min(model.config.block_size, idx.size(1) + max_new_tokens)
        self.cache, self.filled = None, 0

    def __call__(self, new=None):
        """Take more ids, (B, T) -> logits (B, V) of the next token. The first call takes none."""
        if new is not None:
            self.idx = torch.cat((self.idx, new), 1)
        if self.cache is None or self.filled + new.size(1) > self.size:
            new = self.idx[:, -(self.size if self.cache is None else max(1, self.size // 2)):]
            self.cache, self.filled = self.model.init_cache(len(new), self.size), 0
        logits, self.cache = self.model.step(new, self.cache)
        self.filled += new.size(1)
        return logits

    def select(self, rows):
        """Go on with these rows, in this order; a row may be taken more than once."""
        def pick(part):
            if isinstance(part, torch.Tensor):
                return part.index_select(0, rows) if part.dim() else part
            return {k: pick(v) for k, v in part.items()} if isinstance(part, dict) else [pick(v) for v in part]
        self.idx, self.cache = self.idx[rows], pick(self.cache)


@torch.no_grad()
def generate(model, ids, max_new_tokens, generator=None, stop_ids=(), vocab_size=None, **sampling):
    """Yield up to max_new_tokens ids after `ids` (at least one; only the last block_size of them are seen).

    `sampling` goes to `filter_logits`; a CPU `generator` makes the draws repeatable. Ends before an id of stop_ids.
    vocab_size is the tokenizer's, where the model has more rows than that.
    """
    device, new = next(model.parameters()).device, None
    decoder = Decoder(model, torch.tensor([ids], device=device), max_new_tokens)
    for _ in range(max_new_tokens):
        token = draw(decoder(new)[0, :vocab_size], generator, decoder.idx[0], **sampling)
        if token in stop_ids:
            return
        yield token
        new = torch.tensor([[token]], device=device)


@torch.no_grad()
def greedy(model, idx, max_new_tokens):
    """idx (B, T), prompts of equal length -> the likeliest next ids of each, (B, max_new_tokens)."""
    decoder = Decoder(model, idx, max_new_tokens)
    new = None
    for _ in range(max_new_tokens):
        new = decoder(new).argmax(-1, keepdim=True)        # (B, 1)
    return torch.cat((decoder.idx, new), 1)[:, idx.size(1):]


@torch.no_grad()
def write_texts(model, tokenizer, ids, max_new_tokens, stop_ids=(), stops=(), seeds=(None,), temperature=0.8):
    """A text after the prompt `ids` for each seed, side by side: greedy where it is None, else drawn.

    Each ends before an id of stop_ids and before the first of the texts `stops`.
    """
    device = next(model.parameters()).device
    generators = [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]
    streams = [tokenizer.stream() for _ in seeds]
    texts = [""] * len(seeds)
    rows = list(range(len(seeds)))                         # which text each row of the decoder writes
    decoder = Decoder(model, torch.tensor([ids], device=device), max_new_tokens)
    logits = decoder().expand(len(rows), -1)
    decoder.select(torch.zeros(len(rows), dtype=torch.long, device=device))  # the prompt is read once for all
    for _ in range(max_new_tokens):
        new = []
        kept = []
        for row, i in enumerate(rows):
            heat = 0.0 if generators[i] is None else temperature
            token = draw(logits[row, :tokenizer.vocab_size], generators[i], temperature=heat)
            if token in stop_ids:
                continue
            texts[i] += streams[i].step(token)
            if not any(stop in texts[i] for stop in stops):
                kept.append(row)
                new.append(token)
        if not kept:
            break
        if len(kept) < len(rows):
            rows = [rows[row] for row in kept]
            decoder.select(torch.tensor(kept, device=device))
        logits = decoder(torch.tensor(new, device=device)[:, None])
    texts = [text + stream.flush() for text, stream in zip(texts, streams, strict=True)]
    return [StopTexts(stops)(text, last=True) for text in texts]


@torch.no_grad()
def beam_search(model, ids, max_new_tokens, beam, length_penalty=1.0, stop_ids=(), vocab_size=None):
    """The best of `beam` hypotheses by sum log p / length ** length_penalty -> (list of ids, that score).

    A hypothesis is finished by an id of stop_ids, which counts in its score and is not returned. The search ends when
    no open hypothesis can still win, or at max_new_tokens. beam=1 is greedy decoding.
    """
    device = next(model.parameters()).device
    decoder, new = Decoder(model, torch.tensor([ids], device=device), max_new_tokens), None
    scores, open_, finished = torch.zeros(1, 1, dtype=torch.double), [[]], []
    for length in range(1, max_new_tokens + 1):
        logp = decoder(new)[:, :vocab_size].log_softmax(-1).double().cpu() + scores        # (beams, V), summed
        best = logp.flatten().topk(min(2 * beam, logp.numel()))
        rows, tokens = best.indices // logp.size(1), best.indices % logp.size(1)
        kept = []
        for rank, (score, row, token) in enumerate(zip(best.values.tolist(), rows.tolist(), tokens.tolist(),
                                                       strict=True)):
            if token in stop_ids:
                if rank < beam:
                    finished.append((score / length ** length_penalty, open_[row]))
            elif len(kept) < beam:
                kept.append((score, row, token))
        if not kept:
            break
        open_ = [open_[row] + [token] for _, row, token in kept]
        scores = torch.tensor([[score] for score, _, _ in kept], dtype=torch.double)
        # log p only falls, so this is the most that an open hypothesis can still reach
        reach = max(scores.max().item() / n ** length_penalty for n in (length, max_new_tokens))
        if length == max_new_tokens:
            finished += [(score / length ** length_penalty, text)
                         for (score, _, _), text in zip(kept, open_, strict=True)]
        elif finished and max(score for score, _ in finished) >= reach:
            break
        decoder.select(torch.tensor([row for _, row, _ in kept], device=device))
        new = torch.tensor([[token] for _, _, token in kept], device=device)
    score, text = max(finished, key=lambda hypothesis: hypothesis[0])
    return text, score


class StopTexts:
    """Holds back what may be the beginning of a stop text, and ends before one."""

    def __init__(self, stops):
        self.stops, self.held, self.done = [s for s in stops if s], "", False

    def __call__(self, text, last=False):
        """More text -> as much as may be shown."""
        self.held += text
        found = [i for i in map(self.held.find, self.stops) if i >= 0]
        if found:
            self.held, self.done = self.held[:min(found)], True
        keep = 0
        if not (self.done or last):                        # the longest end that could still become a stop text
            keep = max((n for s in self.stops for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown
