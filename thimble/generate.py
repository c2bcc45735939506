"""Decoding: which token comes next, for everything that writes text with a model.

    ids = tokenizer.encode("To be")
    new = list(generate(model, ids, 100, stop_ids={tokenizer.eot}, temperature=0.8, top_p=0.95))
    print(tokenizer.decode(new))

In the shapes, B is rows (texts side by side), T tokens, V the vocabulary.
"""
import torch


# ---- one token
def filter_logits(logits, seen=(), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """logits (V,) -> (V,), whose softmax is the distribution to draw from: -inf for tokens that are ruled out.

    In this order: repetition penalty (once per distinct token of `seen`; Keskar et al. 2019, CTRL, sec. 4.1, with
    negative logits multiplied), temperature, top-k, top-p (the token that crosses p stays; Holtzman et al. 2020),
    min-p (Nguyen et al. 2024). temperature 0 keeps only the most likely token.
    """
    logits = logits.clone()  # the caller's stay as they are
    if repetition_penalty != 1 and len(seen):
        ids = torch.as_tensor(seen, device=logits.device).unique()
        old = logits[ids]
        # dividing a negative logit would make its token more likely
        logits[ids] = torch.where(old > 0, old / repetition_penalty, old * repetition_penalty)
    if temperature == 0:
        certain = torch.full_like(logits, -torch.inf)
        return certain.index_fill_(0, logits.argmax(), 0.0)
    # shifted so that the largest is 0: no temperature, however small, makes it infinite
    logits = (logits - logits.max()) / max(temperature, 1e-30)
    if 0 < top_k < len(logits):
        keep = logits.topk(top_k).indices  # exactly k, even if logits are equal
        kept = torch.full_like(logits, -torch.inf)
        logits = kept.index_copy_(0, keep, logits[keep])
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True, stable=True)
        before = probs.cumsum(-1) - probs  # the probability of all that are more likely
        logits[order[before >= top_p]] = -torch.inf
    if min_p > 0:
        probs = logits.softmax(-1)
        logits[probs < min_p * probs.max()] = -torch.inf
    return logits


def draw(logits, generator=None, seen=(), **sampling):
    """logits (V,) -> an id, drawn from the distribution that `filter_logits` makes of them.

    `generator` is a CPU generator, whatever device the logits are on, so that a seed writes the same text on each.
    """
    probs = filter_logits(logits, seen, **sampling).softmax(-1)
    return torch.multinomial(probs.cpu(), 1, generator=generator).item()


# ---- many tokens
class Decoder:
    """The texts so far and the model's cache. The window slides: once it is full, its later half is read afresh.

    Sliding by one token would mean reading the whole window for each: a cached key holds its position and all that
    its token could see. By halves the cost is about two reads of a token.
    """

    def __init__(self, model, idx, max_new_tokens):
        """idx (B, T): prompts of equal length, of which the model sees the last block_size tokens."""
        self.model = model
        self.idx = idx  # (B, T), and what came after it
        self.size = min(model.config.block_size, idx.size(1) + max_new_tokens)  # of the window
        self.cache = None
        self.filled = 0  # tokens in the cache

    def __call__(self, new=None):
        """Read the next ids of each row, (B, T) -> logits (B, V) of the token after them. The first call takes none."""
        if new is not None:
            self.idx = torch.cat((self.idx, new), 1)
        if self.cache is None:
            new = self._restart(self.size)
        elif self.filled + new.size(1) > self.size:
            new = self._restart(max(1, self.size // 2))
        logits, self.cache = self.model.step(new, self.cache)
        self.filled += new.size(1)
        return logits

    def _restart(self, n_tokens):
        """Empty the cache and return the last ids, (B, n_tokens) or fewer, to read into it."""
        new = self.idx[:, -n_tokens:]
        self.cache = self.model.init_cache(len(new), self.size)
        self.filled = 0
        return new

    def select(self, rows):
        """Continue with these rows (a tensor of indices) in this order; a row may be taken more than once."""
        def pick(part):
            if isinstance(part, dict):
                return {name: pick(value) for name, value in part.items()}
            if isinstance(part, (list, tuple)):
                return [pick(value) for value in part]
            if not part.dim():  # a position that all rows share
                return part
            return part.index_select(0, rows)

        self.idx = self.idx[rows]
        self.cache = pick(self.cache)


@torch.no_grad()
def generate(model, ids, max_new_tokens, generator=None, stop_ids=(), vocab_size=None, **sampling):
    """Yield up to max_new_tokens ids that continue the list `ids` (at least one; the last block_size are seen).

    `sampling` is passed to `filter_logits`; a CPU `generator` makes the draws repeatable. Ends before an id of
    stop_ids. vocab_size is the tokenizer's, if the model has more rows than that.
    """
    device = next(model.parameters()).device
    decoder = Decoder(model, torch.tensor([ids], device=device), max_new_tokens)
    new = None
    for _ in range(max_new_tokens):
        logits = decoder(new)[0, :vocab_size]
        # the whole text counts as seen, also what is before the window
        token = draw(logits, generator, decoder.idx[0], **sampling)
        if token in stop_ids:
            return
        yield token
        new = torch.tensor([[token]], device=device)


@torch.no_grad()
def greedy(model, idx, max_new_tokens):
    """idx (B, T), prompts of equal length -> the most likely next ids of each, (B, max_new_tokens)."""
    decoder = Decoder(model, idx, max_new_tokens)
    new = None
    for _ in range(max_new_tokens):
        new = decoder(new).argmax(-1, keepdim=True)  # (B, 1)
    written = torch.cat((decoder.idx, new), 1)  # the decoder has not read the last ones
    return written[:, idx.size(1):]


@torch.no_grad()
def write_texts(model, tokenizer, ids, max_new_tokens, stop_ids=(), stops=(), seeds=(None,), temperature=0.8):
    """A list with a text for each seed that continues the prompt `ids`: greedy for None, else drawn.

    Each ends before an id of stop_ids and before the first of the texts `stops`. They are written side by side.
    """
    device = next(model.parameters()).device
    generators = []  # one for each text, so that none depends on which others are written beside it
    for seed in seeds:
        generator = None
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
        generators.append(generator)
    streams = [tokenizer.stream() for _ in seeds]  # each holds back the bytes of an unfinished character
    texts = [""] * len(seeds)
    rows = list(range(len(seeds)))  # which text each row of the decoder writes
    decoder = Decoder(model, torch.tensor([ids], device=device), max_new_tokens)
    # the prompt is read once for all
    logits = decoder().expand(len(rows), -1)  # (B, V)
    decoder.select(torch.zeros(len(rows), dtype=torch.long, device=device))
    for _ in range(max_new_tokens):
        kept = []  # rows that continue, and their next token
        new = []
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
        # drop the texts that have ended
        if len(kept) < len(rows):
            rows = [rows[row] for row in kept]
            decoder.select(torch.tensor(kept, device=device))
        logits = decoder(torch.tensor(new, device=device)[:, None])
    for i, stream in enumerate(streams):
        texts[i] += stream.flush()
    return [StopTexts(stops)(text, last=True) for text in texts]


@torch.no_grad()
def beam_search(model, ids, max_new_tokens, beam, length_penalty=1.0, stop_ids=(), vocab_size=None):
    """The best continuation of `ids` by log p / length ** length_penalty, with `beam` hypotheses open at a time.

    Returns (list of new ids, that score). An id of stop_ids finishes a hypothesis; it counts in the score and is not
    returned. The search ends once no open hypothesis can still win, or at max_new_tokens. beam=1 is greedy decoding.
    """
    device = next(model.parameters()).device
    decoder = Decoder(model, torch.tensor([ids], device=device), max_new_tokens)
    new = None
    texts = [[]]  # new ids of the open hypotheses, one for each row of the decoder
    scores = torch.zeros(1, 1, dtype=torch.double)  # (rows, 1), log p of each
    finished = []  # (log p / length ** length_penalty, new ids)
    for length in range(1, max_new_tokens + 1):
        logp = decoder(new)[:, :vocab_size].log_softmax(-1)
        # double: long sums are to differ by their tokens, not by rounding
        totals = logp.double().cpu() + scores  # (rows, V), log p of every hypothesis one token longer
        # twice as many as stay open, since some of them may be finished
        best = totals.flatten().topk(min(2 * beam, totals.numel()))
        kept = []  # (log p, row that it extends, token)
        ranked = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        for rank, (score, index) in enumerate(ranked):
            row, token = divmod(index, totals.size(1))  # flatten() put the rows one after the other
            if token not in stop_ids:
                kept.append((score, row, token))
            elif rank < beam:  # it finishes only where it would have stayed open
                finished.append((score / length ** length_penalty, texts[row]))
        kept = kept[:beam]
        if not kept:
            break
        texts = [texts[row] + [token] for _, row, token in kept]
        if length == max_new_tokens:
            for (score, _, _), text in zip(kept, texts, strict=True):
                finished.append((score / length ** length_penalty, text))
            break
        # log p only falls, so this is the most that an open hypothesis can still reach
        best_open = kept[0][0]
        reach = max(best_open / n ** length_penalty for n in (length, max_new_tokens))
        if finished and max(score for score, _ in finished) >= reach:
            break
        log_ps, rows, tokens = zip(*kept, strict=True)
        scores = torch.tensor(log_ps, dtype=torch.double)[:, None]
        decoder.select(torch.tensor(rows, device=device))
        new = torch.tensor(tokens, device=device)[:, None]  # (rows, 1)
    score, text = max(finished, key=lambda hypothesis: hypothesis[0])
    return text, score


# ---- where a text ends
class StopTexts:
    """Shows a text as it comes, up to the first of the texts `stops`; `done` is true once one has come.

    An end that may be the beginning of a stop text is held back until more text says whether it is.
    """

    def __init__(self, stops):
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.done = False

    def __call__(self, text, last=False):
        """More text -> as much of it, and of what was held back, as may be shown. `last`: no more will come."""
        self.held += text
        found = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if found:
            self.held = self.held[:min(found)]
            self.done = True
        cut = len(self.held)
        if not self.done and not last:
            cut -= self._beginning()
        shown = self.held[:cut]
        self.held = self.held[cut:]
        return shown

    def _beginning(self):
        """Length of the longest end of the text that a stop text begins with."""
        longest = 0
        for stop in self.stops:
            for n in range(longest + 1, len(stop)):
                if self.held.endswith(stop[:n]):
                    longest = n
        return longest
