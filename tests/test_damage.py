"""Damaged files: whatever is read is refused in one line, or it is whole. The files are made by damage.py."""
import json
import os
import subprocess
import sys
from collections import Counter

import damage
import onnx
import pytest
from conftest import ROOT

from thimble.files import UserError

SLOWEST = 1.0  # seconds of the CPU that a load may take


def run(*arguments):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, ROOT / "tests" / "damage.py", *map(str, arguments)], capture_output=True,
                          text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.score("B1")
def test_every_damaged_file_ends_in_one_clear_line(tmp_path, count, score):
    """Each in a process of its own with 2 GB and 5 s. A mutation may pass where it left a file that can be used."""
    n = count(0, 100)  # mutations of each file
    if not n:
        pytest.skip("a process for each of 2,000 files: run with --full; other tests load the known ones in this one")
    loads = run("files", tmp_path, 7, n)
    wrong = []
    for load in loads:
        may_pass = not load["case"].startswith("known: ") or load["case"].startswith("known: harmless")
        held = load["outcome"] == "refused" or load["outcome"] == "accepted" and may_pass
        if not held or load["seconds"] > SLOWEST:
            wrong.append(load)
    passed = sum(load["outcome"] == "accepted" for load in loads)
    known = sum(load["case"].startswith("known: ") for load in loads)
    seconds = max(load["seconds"] for load in loads)
    score(len(loads) - len(wrong), len(loads), f"{known} known cases and {len(loads) - known} mutations; {passed} "
          f"harmless ones pass; slowest load {seconds:.2f} s of CPU time")
    assert not wrong, (len(wrong), wrong[:5])


@pytest.mark.score("B2")
@pytest.mark.parametrize("loader", damage.LOADERS)
def test_no_mutation_escapes(tmp_path, loader, count, score):
    n = count(60, 20_000)
    if n > 1000:  # in a process of its own, which may crash
        (found,) = run("mutate", loader, tmp_path / "x", 3, n)
    else:
        found = damage.mutate(loader, tmp_path / "x", 3, n)
    outcomes = Counter(found["outcomes"])
    held = outcomes["refused"] + outcomes["accepted"]
    score(held, n, f"{loader}: {outcomes['refused']} refused, {outcomes['accepted']} usable; slowest "
          f"{found['slowest']:.2f} s")
    assert held == n, found["escapes"]
    assert outcomes["refused"] > n / 4


@pytest.mark.parametrize("name, field, value", [
    ("blocks.0.mlp_norm.weight", "dims", [24]),
    ("blocks.0.mlp_norm.weight", "dims", [2**60]),
    ("blocks.0.mlp_norm.weight", "dims", [-1, 7]),
    ("blocks.1.attn.q_proj", "raw_data", b""),
    ("blocks.1.attn.q_proj", "raw_data", bytes(1023)),
    ("constant_13", "data_type", 6),  # numbers of half the size
    ("constant_13", "data_type", 0),
    ("constant_13", "data_type", 99),
])
def test_a_tensor_that_does_not_fit_its_bytes_is_refused(tmp_path, name, field, value):
    path = damage.make_onnx(tmp_path)
    proto = onnx.load(path)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    if field == "dims":
        tensor.dims[:] = value
    else:
        setattr(tensor, field, value)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="is not a sound ONNX file"):
        damage.use_onnx(path)
