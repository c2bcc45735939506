"""What the suites share: problems read from a file, and the mean of their scores with its error."""
import gzip
import json
import math
import zlib
from pathlib import Path

import numpy as np

from thimble.files import UserError


def mean(scores):
    """Scores that vary independently -> (mean, its standard error, how many there are)."""
    scores = np.asarray(scores, float)
    # std() divides by n, which the n - 1 makes up for; a single score has an error of 0
    error = scores.std() / math.sqrt(max(1, len(scores) - 1))
    return float(scores.mean()), float(error), len(scores)


def share(solved):
    """Of each problem whether it is solved, or which part (0 to 1) -> (mean, error, how many there are).

    The error is the distance from the mean to the farther end of Wilson's interval (1927) with z = 1, about 68 %. Near
    1/2 it is the standard error; at 0 and 1, where that would be 0, it is 1 / (n + 1). Parts vary less than
    yes and no do, so for them it is on the safe side.
    """
    solved = np.asarray(solved, float)
    n = len(solved)
    p = float(solved.mean())
    center = (p + 1 / (2 * n)) / (1 + 1 / n)  # the formula, with z = 1
    half_width = math.sqrt(p * (1 - p) / n + 1 / (4 * n * n)) / (1 + 1 / n)
    return p, half_width + abs(center - p), n


def read(path, flag, limit, keys):
    """The first `limit` records (0: all) of a .jsonl or .jsonl.gz file, each with texts under the keys.

    UserError that names the flag if there is no such file, or the file and the record if it is damaged.
    """
    if not path:
        raise UserError(f"{flag} is not set: name the file with the problems")
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag}={path}: there is no such file")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            # whole, before `limit`: damage further down is reported too
            records = [json.loads(line) for line in file if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSONL ({str(e)[:80]}): download it again") from None
    if not records:
        raise UserError(f"{path} is empty: download it again")
    if limit:
        records = records[:limit]
    for number, record in enumerate(records, 1):
        is_whole = isinstance(record, dict) and all(isinstance(record.get(key), str) for key in keys)
        if not is_whole:
            raise UserError(f"{path}, record {number} needs texts under {', '.join(keys)}: download it again")
    return records
