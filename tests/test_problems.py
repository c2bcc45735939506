"""Files of problems that are not what they should be."""
import gzip

import pytest

from evaluate import Config
from tasks import gsm8k, humaneval
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
