"""Bits per byte: the loss over a whole validation split or text file, each token once, with its standard error.

A loss in nats per token cannot be compared between tokenizers; divided by ln 2 and by the bytes that a token stands for
it becomes bits per byte, which can. train.py measures its validation loss with the same two functions.
"""
import contextlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from thimble import data, files
from thimble.files import UserError


@torch.no_grad()
def window_nats(model, tokens, block_size, mask=None, autocast=None):
    """-log p of every token but the first, each once, in windows of block_size -> (sums, counts), float64 (windows,).

    Targets whose mask is 0 are ignored.
    """
    device = next(model.parameters()).device
    # up to 8,192 tokens at a time, fewer where their float32 logits would take more than 64 MB
    n_tokens = min(8192, 2**24 // model.config.vocab_size)
    batch_size = max(1, n_tokens // block_size)
    sums = []
    counts = []
    for x, y in data.eval_windows(tokens, block_size, batch_size, mask, model.config.vocab_size):
        x = torch.from_numpy(x).to(device)
        y = torch.from_numpy(y).to(device)                                          # (B, T), -1 where ignored
        with autocast or contextlib.nullcontext():
            logits, _ = model(x)  # (rows, block_size, V)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none")
        sums.append(losses.view_as(y).double().sum(1))
        counts.append((y >= 0).sum(1).double())
    return torch.cat(sums), torch.cat(counts)


def mean_loss(sums, counts):
    """(sums, counts) of windows -> (nats per token, standard error).

    The error takes the windows as independent draws, which tokens that follow each other are not.
    """
    n = counts.sum()
    loss = sums.sum() / n
    error = (sums - loss * counts).square().sum().sqrt() / n
    return float(loss), float(error)


# ---- the suite
def dataset_of(speaker, cfg):
    """The prepared dataset of --dataset, else the one that the run was trained on; None if that is not here."""
    name = cfg.dataset or speaker.loaded.meta.get("dataset", {}).get("path", "")
    if not name:
        return None
    folder = data.folder_of(name)
    if not folder.is_dir():  # the run may have come from another machine
        folder = data.folder_of(Path(name).name)
    if not folder.is_dir() and not cfg.dataset:
        return None
    return data.load(folder)


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--text={path} is not UTF-8 text: convert it first") from None


def own_dataset(speaker, cfg):
    """The dataset to measure, which must have been prepared with the speaker's tokenizer. UserError otherwise."""
    dataset = dataset_of(speaker, cfg)
    if dataset is None:
        raise UserError(f"the dataset of {speaker.path} is not on this machine: name one with --dataset=NAME, or a "
                        "text with --text=FILE")
    if dataset.tokenizer().to_json() != speaker.tokenizer.to_json():
        raise UserError(f"{dataset.path} was prepared with another tokenizer than that of {speaker.path}: use "
                        "--text=FILE, which each model reads with its own tokenizer")
    return dataset


def run(speaker, cfg):
    """Loss, perplexity and bits per byte of cfg.text, else of the whole validation split of the dataset."""
    baselines = {}
    overlap = None
    if cfg.text:
        text = read_text(cfg.text)
        sums, counts = speaker.text_nats(text)
        n_bytes = len(text.encode())
    else:
        dataset = own_dataset(speaker, cfg)
        sums, counts = speaker.nats(dataset.val, dataset.val_mask, dataset.row_length)
        n_bytes = counts.sum().item() * dataset.bytes_per_token("val")
        baselines = dataset.meta["baselines"]
        overlap = dataset.meta.get("overlap_13gram")

    n = int(counts.sum())
    loss, error = mean_loss(sums, counts)
    bits = n / n_bytes / math.log(2)  # nats per token -> bits per byte
    perplexity = math.exp(min(loss, 700))  # above 709 a float64 overflows
    found = {
        "bits per byte": (loss * bits, error * bits, n),
        "loss": (loss, error, n),
        "perplexity": (perplexity, perplexity * error, n),
        # all tokens of the vocabulary equally likely: ln V nats each. The "uniform" of a dataset's own baselines is
        # something else, all 256 bytes equally likely, always 8 bits per byte; it is left out below
        "uniform bits per byte": (math.log(speaker.tokenizer.vocab_size) * bits, 0.0, n),
    }
    for name, value in baselines.items():
        if name != "uniform":
            found[f"{name} bits per byte"] = (value, 0.0, n)
    if overlap is not None:
        found["val 13-grams seen in train"] = (overlap, 0.0, n)
        if overlap > 0.01:
            files.warn(f"{overlap:.0%} of the 13-grams of words in val also occur in train: this loss looks better "
                       "than it is")
    return found
