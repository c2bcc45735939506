"""thimble/wiring.py and bench/wiring.py: a picture of what the seed draws, or of a checkpoint's wiring."""
import json
import math
import types
from dataclasses import asdict

import pytest
from conftest import command

import cerebros
import model
from thimble import checkpoint, wiring
from thimble.files import UserError

SMALL = {"n_layer": 2, "n_embd": 8, "min_neurons": 4, "max_neurons": 9, "vocab_size": 30, "block_size": 24, "window": 6}


def draw(*flags):
    return command("bench/wiring.py", *flags)


def save(folder, arch, module, **keys):
    made = module.Model(module.Config(**keys))
    checkpoint.save(folder, 1, made.state_dict(), None, {"arch": arch, "model_config": asdict(made.config)})
    return made


def test_it_draws_what_a_seed_wires(tmp_path):
    flags = "--n_layer=2", f"--picture={tmp_path}/w.png"
    done = draw(*flags)
    assert done.returncode == 0 and (tmp_path / "w.png").read_bytes()[:4] == b"\x89PNG"
    assert "wiring_seed=0" in done.stdout
    for mistake in (f"--checkpoint={tmp_path}/none", f"--picture={tmp_path}/w.foo"):
        done = draw(*flags, mistake)
        assert done.returncode == 1 and done.stderr.startswith("error:") and done.stderr.count("\n") == 1


def test_it_draws_what_a_checkpoint_holds(tmp_path):
    found = save(tmp_path / "run", "cerebros", cerebros, **SMALL, wiring_seed=7)
    units = [unit for level in json.loads(found.config.wiring) for unit in level]
    links = sum(len(unit["places"]) + len(unit["units"]) for unit in units)
    done = draw(f"--checkpoint={tmp_path}/run", f"--picture={tmp_path}/w.png")
    assert done.returncode == 0, done.stderr
    assert f"{len(units)} units, {links} connections, wiring_seed=7" in done.stdout
    assert (tmp_path / "w.png").read_bytes()[:4] == b"\x89PNG"
    save(tmp_path / "dense", "model", model, n_layer=1, n_head=2, n_embd=8, vocab_size=30)
    done = draw(f"--checkpoint={tmp_path}/dense", f"--picture={tmp_path}/w.png")
    *_, error = done.stderr.splitlines()                   # before it a warning: the run has no best
    assert done.returncode == 1 and error.startswith("error:") and "has no wiring" in error


def test_a_picture_is_whole_or_not_there(tmp_path):
    with pytest.raises(UserError, match="w.foo"):
        wiring.draw(cerebros.Config(**SMALL), tmp_path / "w.foo")
    assert list(tmp_path.iterdir()) == []


LEVELS = [[{"places": [0, 2], "units": [], "neurons": 4}, {"places": [2], "units": [[1, 0]], "neurons": 6}],
          [{"places": [], "units": [[1, 0], [1, 1]], "neurons": 8}]]


def test_positions_by_hand():
    """A window of 3: the newest at .98, the others by the logarithm of their age; level 1 is shifted to the left."""
    at = wiring.positions(LEVELS, 3)
    assert at == {(0, 0): (pytest.approx(0.98 - 0.96 * math.log(3) / math.log(4)), 0), (0, 1): (pytest.approx(0.5), 0),
                  (0, 2): (0.98, 0), (1, 0): (pytest.approx(0.175), 1), (1, 1): (pytest.approx(0.675), 1),
                  (2, 0): (0.5, 2)}


def test_every_connection_is_a_line_and_what_is_not_read_is_gray(tmp_path, monkeypatch):
    lines, windows = [], []
    window = wiring.draw_window
    monkeypatch.setattr(wiring, "levels_of", lambda config: LEVELS)
    monkeypatch.setattr(wiring, "draw_line", lambda axes, source, target, color, **style: lines.append(
        (source, target, color)))
    monkeypatch.setattr(wiring, "draw_window", lambda *args: windows.append(args[1:3]) or window(*args))
    wiring.draw(types.SimpleNamespace(window=3), tmp_path / "w.png")
    at = wiring.positions(LEVELS, 3)
    assert lines == [(at[0, 0], at[1, 0], wiring.ORANGE), (at[0, 2], at[1, 0], wiring.ORANGE),
                     (at[0, 2], at[1, 1], wiring.ORANGE), (at[1, 0], at[1, 1], wiring.RED),
                     (at[1, 0], at[2, 0], wiring.GRAY), (at[1, 1], at[2, 0], wiring.GRAY)]
    assert windows == [(3, {0, 2})]
