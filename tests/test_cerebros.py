"""cerebros.py: the wiring keeps its promises for any seed, and the model computes what the wiring says."""
import json
import math
import random
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import cerebros
import optim
import train
from cerebros import Config, Model, draw_wiring
from thimble import checkpoint, configurator

pytestmark = pytest.mark.usefixtures("lean")

SMALL = {"n_layer": 2, "n_embd": 8, "min_neurons": 4, "max_neurons": 9, "vocab_size": 30, "block_size": 24, "window": 6}


def any_config(seed):
    rng = random.Random(seed)
    return Config(n_layer=rng.randint(1, 10), min_units=1, max_units=rng.randint(1, 6), window=rng.randint(1, 40),
                  wiring_seed=seed, affinity_first=rng.choice([0.01, 0.5, 17.85]),
                  affinity=rng.choice([0.01, 1, 21.49]), recency=rng.choice([0, 1, 3]),
                  p_lateral=rng.choice([0, 0.249, 1]), lateral_tries=rng.randint(1, 32), affinity_decay=rng.random())


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_every_unit_is_reached_from_the_window_and_reaches_the_output(first):
    for seed in range(first, first + 50):
        config = any_config(seed)
        levels = draw_wiring(config)
        assert len(levels) == config.n_layer + 1 and len(levels[-1]) == 1
        reads = {(k, i): [*((0, p) for p in unit["places"]), *map(tuple, unit["units"])]
                 for k, level in enumerate(levels, 1) for i, unit in enumerate(level)}
        for (k, i), sources in reads.items():
            assert len(sources) == len(set(sources)) and all(s < (k, i) for s in sources)  # in order: no circles
            assert any(j < k for j, _ in sources)
        places = {(0, p) for p in range(config.window)}
        reached, useful = set(places), {(config.n_layer + 1, 0)}
        for name in sorted(reads):
            if reached & set(reads[name]):
                reached.add(name)
        for name in sorted(reads, reverse=True):
            if name in useful:
                useful |= set(reads[name])
        assert reached - places == set(reads) == useful - places
        assert draw_wiring(config) == levels               # the seed says all


def test_two_units_a_level_can_be_connected_sideways():
    """The original's loop left the first unit out, so that two beside each other never were."""
    links = [draw_wiring(Config(min_units=2, max_units=2, n_layer=1, p_lateral=0.25, lateral_decay=0.8,
                                wiring_seed=seed))[0][1]["units"] for seed in range(2000)]
    assert abs(sum(link == [[1, 0]] for link in links) / 2000 - 0.25 * 0.8) < 0.03


def test_lateral_links_follow_tries_and_the_longest_row():
    kind = {"min_units": 6, "max_units": 6, "n_layer": 1}
    none, every = (draw_wiring(Config(**kind, p_lateral=p, lateral_decay=1.0))[0] for p in (0.0, 1.0))
    assert all(unit["units"] == [] for unit in none)
    assert [unit["units"] for unit in every] == [[[1, v] for v in range(u)] for u in range(6)]
    two = draw_wiring(Config(**kind, p_lateral=1.0, lateral_decay=1.0, max_lateral=2))[0]
    assert [len(unit["units"]) for unit in two] == [0, 1, 2, 2, 2, 2]
    several = [draw_wiring(Config(min_units=2, max_units=2, n_layer=1, p_lateral=0.1, lateral_decay=1.0,
                                  lateral_tries=5, wiring_seed=s))[0][1]["units"] for s in range(1000)]
    assert abs(sum(map(bool, several)) / 1000 - (1 - 0.9 ** 5)) < 0.05


def test_vertical_links_are_as_many_as_the_affinities_say():
    """With replacement: d draws of n hit n (1 - (1 - 1/n)^d) different ones, on average."""
    kind = {"n_layer": 2, "min_units": 40, "max_units": 40, "p_lateral": 0.0, "window": 40, "recency": 0.0}
    counts = {"first": [], "near": [], "far": []}
    for seed in range(20):
        first, second, _ = draw_wiring(Config(**kind, affinity_first=0.5, affinity=2.0, affinity_decay=0.5,
                                              wiring_seed=seed))
        counts["first"] += [len(unit["places"]) for unit in first]
        counts["near"] += [len(unit["units"]) for unit in second]
        counts["far"] += [len(unit["places"]) for unit in second]
    for name, draws in (("first", 20), ("near", 40), ("far", 20)):
        expected = 40 * (1 - (1 - 1 / 40) ** draws)
        assert expected - 0.3 < sum(counts[name]) / len(counts[name]) < expected + 1, name  # repair adds a few


def test_a_share_of_a_unit_is_a_unit():
    """30 % of a window of 5 places are 2 draws, and a level of the middle draws one at least."""
    config = cerebros.Config(window=5, affinity_first=0.3, affinity=0.01, affinity_decay=1.0)

    class Count:
        def choices(self, among, weights, k):
            drawn.append(k)
            return []

    for k, expected in ((1, [2]), (2, [1, 1])):
        drawn = []
        cerebros.draw_below(config, Count(), [5, 4, 3, 2], k)
        assert drawn == expected


def test_only_the_output_draws_more_of_the_level_below():
    """Draws by hand, of levels of 5 places, 4, 3 and 2 units; the last level draws 2 n more of those right below."""
    draws = []

    class Count:
        def choices(self, population, weights=None, k=1):
            draws.append(k)
            return random.Random(0).choices(population, weights, k=k)

    config = Config(window=5, affinity_first=0.5, affinity=1.0, affinity_decay=0.5)
    for k, expected in ((1, [3]), (2, [2, 2]), (3, [1, 1, 2 + 2 * 3])):
        draws.clear()
        cerebros.draw_below(config, Count(), [5, 4, 3, 2], k)
        assert draws == expected


def test_recent_places_are_drawn_more_often():
    """At one draw a unit, and a recency of 2, place of age a is read in a share of 1 / a^2 over the sum of all."""
    kind = {"n_layer": 1, "min_units": 200, "max_units": 200, "p_lateral": 0.0, "window": 5, "affinity_first": 0.2}
    for recency in (0, 2):
        units = [u for s in range(20) for u in draw_wiring(Config(**kind, recency=recency, wiring_seed=s))[0]]
        chances = [age ** -recency for age in range(5, 0, -1)]
        for p, chance in enumerate(chances):
            assert abs(sum(u["places"] == [p] for u in units) / 4000 - chance / sum(chances)) < 0.03


def test_the_rotation_is_one():
    """It keeps lengths, and a product of two turned vectors depends on the distance of their places only."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 8).double()
    freqs = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    at = [cerebros.rotate_pairs(v, torch.arange(9)[:, None] * freqs) for v in (a, b)]
    assert torch.allclose(at[0].norm(dim=-1), a.norm().expand(9))
    products = at[0] @ at[1].T
    assert all(torch.allclose(products.diagonal(d), products[0, d].expand(9 - d), atol=1e-6) for d in range(9))
    turned = torch.view_as_complex(a.view(4, 2)) * torch.polar(torch.ones(4).double(), 3 * freqs.double())
    assert torch.allclose(at[0][3], torch.view_as_real(turned).flatten(), atol=1e-6)


def naive(model, ids):
    """Logits after `ids` from the definition: one window, each embedding turned, each unit on its own, float64."""
    c, state = model.config, {k: v.double() for k, v in model.state_dict().items()}

    def norm(x, name):
        return x / (x.square().mean() + c.norm_eps).sqrt() * state[f"{name}.weight"]

    window = [torch.zeros(c.n_embd).double()] * (c.window - len(ids))
    window += [norm(state["embed.weight"][i], "embed_norm") for i in ids[-c.window:]]
    for p, x in enumerate(window):
        turned = x.clone()
        for i in range(c.n_embd // 2):
            angle = p * c.rope_theta ** (-2 * i / c.n_embd)
            turned[2 * i] = x[2 * i] * math.cos(angle) - x[2 * i + 1] * math.sin(angle)
            turned[2 * i + 1] = x[2 * i + 1] * math.cos(angle) + x[2 * i] * math.sin(angle)
        window[p] = turned
    outputs, n = {}, 0
    for k, level in enumerate(json.loads(c.wiring), 1):
        for i, unit in enumerate(level):
            z = state[f"units.{n}.bias"]
            if unit["places"]:
                z = z + state[f"units.{n}.window"] @ torch.cat([window[p] for p in unit["places"]])
            if unit["units"]:
                merged = norm(torch.cat([outputs[tuple(u)] for u in unit["units"]]), f"units.{n}.norm")
                z = z + state[f"units.{n}.proj.weight"] @ merged
            outputs[k, i], n = z / (1 + (-z).exp()), n + 1
    return state["head.weight"] @ norm(z, "norm")


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_the_model_computes_what_the_wiring_says(seed):
    torch.manual_seed(seed)
    model = Model(Config(**SMALL, wiring_seed=seed, p_lateral=0.7, n_rank=5))
    for p in model.parameters():
        p += 0.3 * torch.randn_like(p)
    idx = torch.randint(30, (1, 15))
    logits, _ = model(idx)
    for t in range(15):
        assert (logits[0, t] - naive(model, idx[0, :t + 1].tolist())).abs().max() < 1e-4


@torch.no_grad()
def test_only_the_window_counts():
    model = Model(Config(**SMALL)).eval()
    idx = torch.randint(30, (2, 20))
    assert (model(idx)[0][:, -1] - model(idx[:, -6:])[0][:, -1]).abs().max() < 1e-6
    far = idx.clone()
    far[:, :14] = (far[:, :14] + 1) % 30                   # all but the last six
    assert torch.equal(model(idx)[0][:, -1], model(far)[0][:, -1])


def test_the_wiring_is_in_the_checkpoint_and_comes_back(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = configurator.load(train.Config, dataset=str(toy), arch="cerebros", out_dir="run", max_steps=4, eval_every=2,
                            device="cpu", dtype="float32", batch_size=4, **{k: v for k, v in SMALL.items()
                                                                         if k != "vocab_size"}, wiring_seed=7)
    record = train.train(cfg)
    saved = checkpoint.load("run")
    drawn = draw_wiring(replace(cfg.model, vocab_size=257))
    assert json.loads(saved.meta["model_config"]["wiring"]) == drawn
    monkeypatch.setattr(cerebros, "draw_wiring", None)     # another Python may draw differently: nothing is drawn anew
    model = checkpoint.load_model(saved)
    autocast = torch.autocast("cpu", enabled=False)
    assert train.evaluate(model, train.open_dataset(cfg), autocast)["val_loss"] == \
        record["val_loss"]
    stored = json.loads(Path("run/config.json").read_text())
    again = train.train(configurator.load(train.Config, **stored | {"resume": True, "max_steps": 6}))
    assert again["step"] == 6


def test_phase_two_keeps_the_wiring_and_slides_on(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop = {"dataset": str(toy), "arch": "cerebros", "max_steps": 2, "eval_every": 1, "device": "cpu", "batch_size": 4,
            "dtype": "float32"}
    shape = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    train.train(configurator.load(train.Config, **loop, **shape, wiring_seed=3, out_dir="one"))
    train.train(configurator.load(train.Config, **loop, init_from="one", block_size=48, out_dir="two"))
    first, second = (checkpoint.load(run).meta["model_config"] for run in ("one", "two"))
    assert first["wiring"] == second["wiring"] and second["block_size"] == 48
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--checkpoint=two", "--prompt=the cat",
                           "--max_new_tokens=80", "--temperature=0"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("the cat") and "80 tokens" in done.stderr


@pytest.mark.parametrize("change, word", [
    ({"window": 30}, "window=30"), ({"min_units": 5}, "min_units=5"), ({"n_embd": 7}, "n_embd=7"),
    ({"p_lateral": 1.5}, "p_lateral=1.5"), ({"affinity": 0.0}, "affinity=0.0"), ({"wiring": "[["}, "wiring="),
    ({"wiring": '[[{"neurons":4,"places":[6],"units":[]}]]'}, "wiring="), ({"wiring": "[]"}, "wiring="),
    ({"wiring": '[[{"neurons":8,"places":[],"units":[[1,0]]}]]'}, "wiring="), ({"wiring": "7"}, "wiring="),
    ({"wiring": '[[{"neurons":8,"places":[],"units":[]}]]'}, "wiring="),
    ({"wiring": '[[{"neurons":9,"places":[1],"units":[]}]]'}, "8 neurons"),
    ({"wiring": '[[{"neurons":8,"places":[1.0],"units":[]}]]'}, "whole numbers"),
    ({"wiring": '[[{"neurons":8.0,"places":[1],"units":[]}]]'}, "whole numbers"),
    ({"wiring": '[[{"neurons":8,"places":[true],"units":[]}]]'}, "whole numbers"),
    ({"wiring": '[[{"neurons":8,"places":[1],"units":[],"more":1}]]'}, "whole numbers"),
    ({"wiring": "[" * 100_000}, "wiring="), ({"affinity_first": 1e300}, "affinity_first=1e"),
    ({"tie_embeddings": True, "n_rank": 4}, "n_rank=4")])
def test_impossible_shapes_are_refused_by_name(change, word):
    with pytest.raises(ValueError, match=word):
        Config(**SMALL | change)


def test_128k_tokens_need_no_one_hot_rows():
    """The loss takes ids; the largest tensor of a step is the logits."""
    model = Model(Config(**SMALL | {"vocab_size": 128_260, "n_rank": 16}))
    idx = torch.randint(128_260, (1, 8))
    loss = model(idx, idx)[1]
    loss.backward()
    assert abs(loss.item() - math.log(128_260)) < 0.1
    assert sum(p.numel() for p in model.parameters()) < 128_260 * (8 + 16) + 20_000


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_of_128260_tokens_trains(tied):
    """Labels are ids: one-hot rows of that many tokens would not fit any memory."""
    torch.manual_seed(0)
    model = Model(Config(vocab_size=128_260, n_embd=12, n_rank=0 if tied else 16, tie_embeddings=tied))
    optimizer, losses = optim.Optimizer(model, "muon", 0.02, "adamw", 0.01), []
    idx = torch.randint(128_260, (2, 33))
    for _ in range(3):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step(1.0)
        model.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(128_260)) < 0.1 and losses[2] < losses[1] < losses[0]


def test_the_benchmark_compares_equal_sizes():
    from bench import cerebros as bench
    found = replace(Config(vocab_size=50, n_embd=16, n_layer=2), wiring_seed=4)
    found = Model(found).config
    other = replace(found, wiring="", recency=0.0, n_layer=4)
    for levels in (bench.chain(found, 40), bench.chain(found, 8), draw_wiring(other)):
        twin = bench.sized(found, levels, bench.size(found))
        assert abs(bench.size(twin) / bench.size(found) - 1) < 0.01
        assert [[u["places"] for u in level] for level in json.loads(twin.wiring)] == \
            [[u["places"] for u in level] for level in levels]
    first, *more = bench.chain(found, 8)
    assert first[0]["places"] == [*range(32, 40)] and [len(level) for level in more] == [1, 1]


def test_the_benchmark_counts_ngrams_as_a_table_would():
    from bench import cerebros as bench
    rng = random.Random(0)
    train_ids, val = [rng.randrange(5) for _ in range(60)], [rng.randrange(6) for _ in range(40)]

    def p(context, word):
        """Witten-Bell: (count + kinds * p of the shorter context) / (total + kinds)."""
        n = len(context)
        # shorter n-grams are the tails of trigrams: the first two tokens are never what follows
        after = [train_ids[i] for i in range(2, len(train_ids)) if train_ids[i - n:i] == context]
        lower = p(context[1:], word) if n else 1 / 6
        kinds = len(set(after))
        return (after.count(word) + kinds * lower) / (len(after) + kinds) if after else lower

    got = bench.ngrams(types.SimpleNamespace(train=train_ids, val=val, vocab_size=6))
    for n, nats in enumerate(got.values()):
        want = [-math.log(p(val[i - n:i], val[i])) for i in range(2, len(val))]
        assert abs(nats - sum(want) / len(want)) < 1e-9
