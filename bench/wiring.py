"""A picture of a wiring of cerebros.py.

    python bench/wiring.py --wiring_seed=3                                  # what this seed draws, as wiring.png
    python bench/wiring.py --checkpoint=runs/search_cerebros/best --picture=best.png    # what a search has found
"""
import sys
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cerebros
from thimble import checkpoint, configurator, load, wiring
from thimble.files import UserError


@dataclass(frozen=True)
class Config(cerebros.Config):
    # drawing
    checkpoint: str = ""            # run or checkpoint folder whose wiring to draw; empty: what the other keys draw
    picture: str = "wiring.png"     # file to write


def main(cfg):
    config = cerebros.Config(**{f.name: getattr(cfg, f.name) for f in fields(cerebros.Config)})
    if cfg.checkpoint:
        found = load.read(cfg.checkpoint, which="best")
        config = checkpoint.load_model(found).config
        if not hasattr(config, "wiring"):
            raise UserError(f"--checkpoint={cfg.checkpoint} is a {found.meta['arch']}, which has no wiring: name a "
                            "run of cerebros")
    wiring.draw(config, cfg.picture)
    units = [unit for level in wiring.levels_of(config) for unit in level]
    links = sum(len(unit["places"]) + len(unit["units"]) for unit in units)
    print(f"{cfg.picture}: {len(units)} units, {links} connections, wiring_seed={config.wiring_seed}")


if __name__ == "__main__":
    configurator.run(main, Config)
