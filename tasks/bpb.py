"""Bits per byte: the loss over a whole text, each token once, with its error.

A loss in nats per token cannot be compared between tokenizers; divided by ln 2 and by the bytes that a token stands for
it becomes bits per byte, which can.
"""
import contextlib

import torch
import torch.nn.functional as F

from thimble import data


@torch.no_grad()
def window_nats(model, tokens, block_size, mask=None, autocast=None):
    """-log p of every token but the first, each once, in windows of block_size -> (sums, counts), float64 (windows,).

    A target whose mask is 0 does not count.
    """
    device = next(model.parameters()).device
    # up to 8,192 tokens at a time, fewer where their float32 logits would take more than 64 MB
    n_tokens = min(8192, 2**24 // model.config.vocab_size)
    batch_size = max(1, n_tokens // block_size)
    sums = []
    counts = []
    for x, y in data.eval_windows(tokens, block_size, batch_size, mask):
        x = torch.from_numpy(x).to(device)
        y = torch.from_numpy(y).to(device)
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
