"""Means and their errors by hand, and files of problems that are not what they should be."""
import gzip
import math

import pytest

from evaluate import Config
from tasks import gsm8k, humaneval
from tasks.problems import mean, share
from thimble.files import UserError


@pytest.mark.parametrize("content", [b"404: Not Found", b"", b'{"question": "1+1?"}', b"[1]", b"\xff", b"[" * 9999])
@pytest.mark.parametrize("suite", [gsm8k, humaneval])
def test_damaged_problems_are_named(suite, content, floors, tmp_path):
    flag = suite.__name__.removeprefix("tasks.")
    for file, body in (("x.jsonl", content), ("x.jsonl.gz", gzip.compress(content)), ("y.jsonl.gz", b"x" + content),
                       ("z.jsonl.gz", gzip.compress(content)[:-9])):
        (tmp_path / file).write_bytes(body)
        with pytest.raises(UserError, match=file):
            suite.run(floors[0], Config(**{flag: str(tmp_path / file)}))


def test_mean_by_hand():
    """1 to 4: squares of differences 5 in all, so the variance is 5/3 and that of the mean 5/12."""
    assert mean([1, 2, 3, 4]) == (2.5, pytest.approx(math.sqrt(5 / 12)), 4)
    assert mean([1, 2, 3, 4] * 25)[1] == pytest.approx(math.sqrt(1.25 / 99))             # falls as 1 / sqrt(n)
    assert mean([0.5]) == (0.5, 0.0, 1)


def test_share_by_hand():
    """Wilson's interval (1927), z = 1: (p + 1/2n +- sqrt(p(1-p)/n + 1/4n^2)) / (1 + 1/n)."""
    assert share([False] * 19) == (0.0, pytest.approx(1 / 20), 19)
    assert share([True] * 4) == (1.0, pytest.approx(1 / 5), 4)
    # 2 of 8: center (1/4 + 1/16) / (9/8) = 5/18, half width sqrt(3/128 + 1/256) / (9/8) = sqrt(7)/18
    assert share([True] * 2 + [False] * 6) == (0.25, pytest.approx((5 + math.sqrt(7)) / 18 - 1 / 4), 8)
    assert share([True] * 6 + [False] * 2)[1] == pytest.approx(share([True] * 2 + [False] * 6)[1])
    half = share([True, False] * 200)                      # where the standard error is good, it is that
    assert half[1] == pytest.approx(math.sqrt(0.25 / 400), rel=0.01)
    assert share([1 / 3, 2 / 3, 0.0])[0] == pytest.approx(1 / 3)
