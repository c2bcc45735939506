"""thimble/wiring.py and bench/wiring.py: a picture of what the seed draws, or of a checkpoint's wiring."""
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import ROOT

import cerebros
import model
from thimble import checkpoint, wiring
from thimble.files import UserError

SMALL = {"n_layer": 2, "n_embd": 8, "min_neurons": 4, "max_neurons": 9, "vocab_size": 30, "block_size": 24, "window": 6}


def command(*flags):
    return subprocess.run([sys.executable, ROOT / "bench/wiring.py", *flags], capture_output=True, text=True)


def save(folder, arch, module, **keys):
    made = module.Model(module.Config(**keys))
    checkpoint.save(folder, 1, made.state_dict(), None, {"arch": arch, "model_config": asdict(made.config)})
    return made


def test_it_draws_what_a_seed_wires(tmp_path):
    flags = "--n_layer=2", f"--picture={tmp_path}/w.png"
    done = command(*flags)
    assert done.returncode == 0 and (tmp_path / "w.png").read_bytes()[:4] == b"\x89PNG"
    assert "wiring_seed=0" in done.stdout
    for mistake in (f"--checkpoint={tmp_path}/none", f"--picture={tmp_path}/w.foo"):
        done = command(*flags, mistake)
        assert done.returncode == 1 and done.stderr.startswith("error:") and done.stderr.count("\n") == 1


def test_it_draws_what_a_checkpoint_holds(tmp_path):
    found = save(tmp_path / "run", "cerebros", cerebros, **SMALL, wiring_seed=7)
    units = [unit for level in json.loads(found.config.wiring) for unit in level]
    links = sum(len(unit["places"]) + len(unit["units"]) for unit in units)
    done = command(f"--checkpoint={tmp_path}/run", f"--picture={tmp_path}/w.png")
    assert done.returncode == 0, done.stderr
    assert f"{len(units)} units, {links} connections, wiring_seed=7" in done.stdout
    assert (tmp_path / "w.png").read_bytes()[:4] == b"\x89PNG"
    save(tmp_path / "dense", "model", model, n_layer=1, n_head=2, n_embd=8, vocab_size=30)
    done = command(f"--checkpoint={tmp_path}/dense", f"--picture={tmp_path}/w.png")
    *_, error = done.stderr.splitlines()                   # before it a warning: the run has no best
    assert done.returncode == 1 and error.startswith("error:") and "has no wiring" in error


def test_a_picture_is_whole_or_not_there(tmp_path):
    with pytest.raises(UserError, match="w.foo"):
        wiring.draw(cerebros.Config(**SMALL), tmp_path / "w.foo")
    assert list(tmp_path.iterdir()) == []
