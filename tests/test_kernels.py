"""kernels/: every path against integers in numpy, against each other to the last bit; and without a compiler."""
import os
import sys
import tempfile

import numpy as np
import pytest
import torch
from conftest import forked

from bench import ternary as bench
from kernels import ternary as kernel

LIB = kernel.library()
HERE = [name for name, isa in kernel.ISAS.items() if LIB and (isa in (0, LIB.isa) or (name, LIB.isa) == ("avx2", 2))]
SHAPES = [(1, 1), (1, 256), (3, 255), (4, 257), (7, 512), (130, 300), (256, 768), (5, 1000)]


def case(n, k, group_size=0, m=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=generator)
    scales = torch.rand((k // group_size, n) if group_size else (), generator=generator) + 0.01
    return torch.randn(m, k, generator=generator), t, scales


def by_hand(x, t, scales, group_size):
    """The definition, with int64 sums and float64 scales."""
    x, t, scales = x.numpy(), t.numpy().astype(np.int64), scales.double().numpy()
    top = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    q = np.round(x * (np.float32(1) / top * np.float32(127))).astype(np.int64)
    if not group_size:
        return (q @ t.T) * scales * top / 127
    parts = [(q[:, i:i + group_size] @ t[:, i:i + group_size].T) * scales[i // group_size]
             for i in range(0, x.shape[1], group_size)]
    return sum(parts) * top / 127


@pytest.fixture(params=HERE)
def isa(request, monkeypatch):
    monkeypatch.setattr(LIB, "isa", kernel.ISAS[request.param])


@pytest.mark.parametrize("n, k", SHAPES)
def test_pack_and_unpack(n, k):
    t = case(n, k)[1]
    codes = kernel.pack(t)
    assert codes.dtype == torch.uint8 and codes.shape == (n, -(-k // 256) * 64)
    assert torch.equal(kernel.unpack(codes, k), t)
    for j in range(min(k, 64)):                            # the layout that ternary.cpp states
        assert [codes[0, j] >> 2 * plane & 3 for plane in range(4) if j + 64 * plane < k] == [
            t[0, j + 64 * plane] + 1 for plane in range(4) if j + 64 * plane < k]


@pytest.mark.parametrize("value", [2, -2, 0.5, float("nan")])
def test_only_ternary_values_pack(value):
    with pytest.raises(ValueError, match="-1, 0 and 1"):
        kernel.pack(torch.full((2, 4), value))


@pytest.mark.parametrize("m", [1, 2, 33])
@pytest.mark.parametrize("n, k, group_size", [*[(n, k, 0) for n, k in SHAPES], (7, 512, 128), (9, 1024, 256),
                                              (130, 384, 128), (4, 384, 384)])
def test_every_path_gives_the_same_bits(isa, n, k, group_size, m):
    x, t, scales = case(n, k, group_size, m)
    codes = kernel.pack(t)
    y = kernel.linear(x, codes, scales, group_size)
    assert y.shape == (m, n)
    assert torch.equal(y, kernel.linear_torch(x, codes, scales, group_size))
    np.testing.assert_allclose(y.numpy(), by_hand(x, t, scales, group_size), rtol=2e-6, atol=1e-6 * k**0.5)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(isa, threads):
    x, t, scales = case(1030, 2048, m=3)                   # large enough for a second thread
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    y = kernel.linear(x, kernel.pack(t), scales)
    torch.set_num_threads(before)
    assert torch.equal(y, kernel.linear_torch(x, kernel.pack(t), scales))


def test_extremes(isa):
    """All at the largest: where 8 or 16 bits would overflow. Nothing, a spike, the tiniest numbers, huge ones."""
    for k in (256, 11008):
        ones = kernel.pack(torch.ones(5, k, dtype=torch.int8))
        for sign in (1.0, -1.0):
            y = kernel.linear(torch.full((1, k), 3.0 * sign), ones, torch.tensor(2.0))
            assert torch.allclose(y, torch.full((1, 5), 6.0 * k * sign), rtol=1e-6)
        minus = kernel.pack(-torch.ones(5, k, dtype=torch.int8))
        assert torch.allclose(kernel.linear(torch.full((1, k), 3.0), minus, torch.tensor(2.0)), torch.tensor(-6.0 * k))
    x, t, scales = case(6, 300, m=4)
    codes = kernel.pack(t)
    for rows in (torch.zeros(4, 300), x * 1e-30, x * 1e30, torch.nn.functional.one_hot(torch.arange(4), 300) * 1e4):
        rows = rows.float()
        y = kernel.linear(rows, codes, scales)
        assert torch.equal(y, kernel.linear_torch(rows, codes, scales)) and y.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(isa, bad):
    x, t, scales = case(6, 300, m=3)
    x[1, 17] = bad
    y = kernel.linear(x, kernel.pack(t), scales)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    assert torch.equal(y[[0, 2]], kernel.linear_torch(x, kernel.pack(t), scales)[[0, 2]])


def test_other_dtypes_shapes_and_layouts():
    x, t, scales = case(6, 512, m=8)
    codes = kernel.pack(t)
    y = kernel.linear(x, codes, scales)
    assert torch.equal(kernel.linear(x.view(2, 4, 512), codes, scales), y.view(2, 4, 6))
    assert torch.equal(kernel.linear(x.T.contiguous().T, codes, scales), y)
    assert kernel.linear(x[:0], codes, scales).shape == (0, 6)
    assert (kernel.linear(x.double(), codes, scales) - y).abs().max() < 1e-5


@pytest.mark.parametrize("k, columns, scales, group_size", [(512, 256, (), 0), (256, 512, (), 0), (256, 256, (6,), 0),
                                                            (256, 256, (2, 5), 128), (300, 300, (2, 6), 128)])
def test_what_does_not_fit_is_named(k, columns, scales, group_size):
    codes = kernel.pack(torch.zeros(6, columns, dtype=torch.int8))
    with pytest.raises(ValueError, match=f", {k}\\) does not fit"):
        kernel.linear(torch.ones(1, k), codes, torch.ones(scales), group_size)


@pytest.mark.parametrize("bad, says", [({"rounds": 0}, "rounds=0 must be at least 1"),
                                       ({"seconds": 0.0}, "seconds=0.0 must be above 0"),
                                       ({"threads": (1, 0)}, "must be at least 1"), ({"threads": ()}, "at least one")])
def test_the_bench_refuses_to_measure_nothing(bad, says):
    with pytest.raises(ValueError, match=says):
        bench.Config(**bad)


# ---- the compiler

def start(**env):
    """Begin to print whether there is a kernel, and a sum of what it or its twin computes."""
    def program():
        os.environ.update(env)
        kernel.library.cache_clear()  # all that the fork knows of a library
        kernel.note.cache_clear()
        torch.manual_seed(0)
        codes = kernel.pack(torch.randint(-1, 2, (8, 512)))
        for _ in range(2):
            y = kernel.linear(torch.randn(3, 512), codes, torch.tensor(0.5))
        print(bool(kernel.library()), y.double().sum().item())
    return forked(program)


def finish(wait):
    code, out, err = wait()
    assert code == 0, err
    return out.split(), err


@pytest.mark.skipif(not LIB, reason="no C++ compiler here")
def test_compiled_once_and_mended(tmp_path):
    quick = tmp_path / "quick"  # the optimizer takes half of the time, and no bit depends on it
    quick.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    quick.chmod(0o755)
    env = {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(quick)}
    twice = [start(**env) for _ in range(2)]               # at the same time
    (with_kernel, value), err = finish(twice[0])
    assert with_kernel == "True" and not err and finish(twice[1]) == ([with_kernel, value], "")
    (library,) = tmp_path.rglob("*.so")
    made = library.stat().st_mtime_ns
    assert finish(start(**env))[0] == ["True", value] and library.stat().st_mtime_ns == made
    library.write_bytes(library.read_bytes()[:5000])       # a crash in the middle of a copy, say
    assert finish(start(**env))[0] == ["True", value]
    without = start(XDG_CACHE_HOME=str(tmp_path / "other"), PATH="", CXX="")
    (with_kernel, same), err = finish(without)
    assert (with_kernel, same) == ("False", value)         # the twin: the same bits
    assert len(err.splitlines()) == 1 and "install g++" in err


def test_where_the_library_is_kept(tmp_path, monkeypatch):
    """A user without a home, as in containers, has the temporary folder; but no other user's folder there is used."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(kernel, "compile_to", lambda path, compiler: path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("CXX", sys.executable)
    folder = tmp_path / f"thimble-{os.getuid()}"
    assert kernel.build().parent == folder
    other = folder.stat().st_uid + 1
    folder.rename(tmp_path / f"thimble-{other}")
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(PermissionError, match="another user"):
        kernel.build()


@pytest.mark.skipif(not LIB, reason="no C++ compiler here")
def test_a_compiler_that_fails_is_one_line(tmp_path):
    for name in ("c++", "g++", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho out of ideas >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    out, err = finish(start(XDG_CACHE_HOME=str(tmp_path / "cache"), PATH=f"{tmp_path}:/bin", CXX=""))
    assert out[0] == "False" and len(err.splitlines()) == 1 and "out of ideas" in err
