"""What a person types, and what comes of it: values, precedence, messages, --help, exit codes."""

import importlib
import json
import shlex
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import pytest

from thimble import configurator
from thimble.files import UserError

ROOT = Path(configurator.__file__).parent.parent


@dataclass(frozen=True)
class Config:
    # run
    out_dir: str = "runs/#1"  # a folder; '#' in a string is not a comment
    max_steps: int = 100  # length of the run, in steps
                            # a trailing comment continued here is not a section
    level: Literal[1, 2] = 1
    compile: bool | Literal["auto"] = "auto"  # torch.compile
    resume: bool = False  # continue from the latest checkpoint
    arch: str = "toy_a"  # model file
    model: object = configurator.sub("arch")
    # optimizer
    lr: float = 1e-3  # peak
    grad_clip: float | None = 1.0  # none: no clipping
    schedule: Literal["cosine", "wsd"] = "cosine"  # shape
    prompts: tuple[str, ...] = ("a", "b")  # drawn at each evaluation
    sizes: tuple[
        int, ...
    ] = ()  # on several lines
    seed: int | None = None
    prompt: str = "\n"  # begins the sample

    def __post_init__(self):
        # not a section
        configurator.resolve(self)
        if self.max_steps < 0:
            raise ValueError(f"max_steps={self.max_steps} must not be negative")


TOY_A = '''
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    # shape
    n_layer: int = 2  # blocks
    n_head: int = 2  # heads
    tie: bool = True  # embedding and head are one

    def __post_init__(self):
        if self.n_layer % self.n_head:
            raise ValueError(f"n_layer={self.n_layer} must be a multiple of n_head={self.n_head}")

class Model:
    pass
'''
TOY_B = TOY_A.replace("n_head: int = 2  # heads", """n_head: int = 1
    d_state: int = 16  # state of the scan
    scan: bool = False""")


@pytest.fixture(autouse=True)
def toys(tmp_path, monkeypatch):
    """An empty working folder with two model files, as a fork would have them."""
    (tmp_path / "toy_a.py").write_text(TOY_A)
    (tmp_path / "toy_b.py").write_text(TOY_B)
    (tmp_path / "toy_clash.py").write_text(TOY_A.replace("tie:", "lr:"))
    (tmp_path / "toy_helper.py").write_text("class Config: pass\n")
    (tmp_path / "toy_broken.py").write_text("import no_such_library\n\nclass Config: pass\n\nclass Model: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(configurator, "HERE", tmp_path)
    for name in ("toy_a", "toy_b", "toy_clash", "toy_helper", "toy_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def argv(*args):
    return configurator.parse(Config, args)[0]


def write(text, name="x.py"):
    Path(name).write_text(text)
    return name


def mistake(call, *args, **kwargs):
    with pytest.raises(UserError) as info:
        call(*args, **kwargs)
    text = str(info.value)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize("flag, key, value", [
    ("--max_steps=5", "max_steps", 5), ("--max-steps=5", "max_steps", 5), ("--max_steps=1e4", "max_steps", 10_000),
    ("--max_steps=1_000", "max_steps", 1000), ("--max_steps=12345678901234567890", "max_steps", 12345678901234567890),
    ("--max_steps=5.0", "max_steps", 5), ("--lr=3", "lr", 3.0), ("--lr=1e-4", "lr", 1e-4), ("--lr=-.5", "lr", -0.5),
    ("--grad_clip=none", "grad_clip", None), ("--grad_clip=None", "grad_clip", None),
    ("--grad_clip=2", "grad_clip", 2.0),
    ("--resume", "resume", True), ("--resume=TRUE", "resume", True), ("--resume=1", "resume", True),
    ("--resume=yes", "resume", True), ("--resume=On", "resume", True), ("--resume=false", "resume", False),
    ("--resume=0", "resume", False), ("--resume=no", "resume", False), ("--resume=OFF", "resume", False),
    ("--compile", "compile", True), ("--compile=auto", "compile", "auto"), ("--compile=0", "compile", False),
    ("--schedule=wsd", "schedule", "wsd"), ("--out_dir=2024", "out_dir", "2024"), ("--out_dir=a=b", "out_dir", "a=b"),
    ("--out_dir=", "out_dir", ""), ("--out_dir=none", "out_dir", "none"),
    ("--prompts=x,y z,", "prompts", ("x", "y z", "")),
    ("--prompts=x", "prompts", ("x",)), ("--prompts=", "prompts", ()), ("--sizes=1,2e1", "sizes", (1, 20)),
    ("--level=2", "level", 2), ("--seed=7", "seed", 7), ("--seed=none", "seed", None),
])
def test_values(flag, key, value):
    got = getattr(argv(flag), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("args, text", [
    (["--max_steps=4.5"], "--max_steps=4.5: expected int"),
    (["--n_layer=4.5"], "--n_layer=4.5: expected int"),
    (["--max_steps=1e-1"], "--max_steps=1e-1: expected int"),
    (["--max_steps=true"], "--max_steps=true: expected int"),
    (["--max_steps="], "--max_steps=: expected int"),
    (["--max_steps=inf"], "--max_steps=inf: expected int"),
    (["--max-steps=x"], "--max_steps=x: expected int"),
    (["--compile=maybe"], "--compile=maybe: expected bool or 'auto'"),
    (["--resume=2"], "--resume=2: expected bool"),
    (["--lr=abc"], "--lr=abc: expected float"),
    (["--lr=nan"], "--lr=nan: expected a finite float"),
    (["--lr=-inf"], "--lr=-inf: expected a finite float"),
    (["--lr=1e999"], "--lr=1e999: expected a finite float"),
    (["--grad_clip=nan"], "--grad_clip=nan: expected float or None"),
    (["--sizes=1,x"], "--sizes=1,x: expected int"),
    (["--schedule=wds"], "--schedule=wds: not one of cosine, wsd - did you mean 'wsd'?"),
    (["--max_stpes=3"], "--max_stpes=3: no such key in test_configurator.py and toy_a.py - did you mean 'max_steps'?"),
    (["--n_layr=3"], "did you mean 'n_layer'?"),
    (["--d_state=3"], "--d_state=3: no such key in test_configurator.py and toy_a.py"),
    (["--zzz"], "--zzz=true: no such key"),
    (["--"], "--=true: no such key"),
    (["--max_steps"], "--max_steps needs a value"),
    (["--max_steps", "--resume"], "--max_steps needs a value"),
    (["--n_layer"], "--n_layer needs a value"),
    (["tiny"], "'tiny': expected a config file (config/NAME.py) or --key=value"),
    (["-x"], "'-x': expected a config file"),
    (["--compile", "auto"], "a value for --compile is written --compile=auto"),
    (["--tie", "no"], "a value for --tie is written --tie=no"),
    (["--arch=toy_bb"], "--arch=toy_bb: there is no toy_bb.py - did you mean 'toy_b'?"),
    (["--arch=../x"], "there is no ../x.py"),
    (["--arch=toy_helper"], "toy_helper.py defines no Config and Model"),
    (["--arch=json"], "json.py defines no Config and Model"),
    (["--arch="], "there is no .py"),
    (["--arch=toy_clash"], "test_configurator.py and toy_clash.py both have a key named 'lr'"),
    (["--model=toy_b"], "--model=toy_b: not a key; 'arch' chooses it"),
    (["--max_steps=-1"], "max_steps=-1 must not be negative"),
    (["--n_layer=3"], "n_layer=3 must be a multiple of n_head=2"),
    (["--max_iters=3"], "--max_iters=3: max_iters is called max_steps here"),
    (["--learning_rate=3"], "learning_rate is called lr here"),
    (["--learning_rat=3"], "did you mean 'lr'?"),
    (["--eval_iters=3"], "not needed: the whole validation split is always used"),
    (["--bias"], "--bias=true: model.py has no biases"),
    (["--start=3"], "start is called prompt here"),
    (["--beta1=3"], "--beta1=3: no such key"),
    (["--wandb_log"], "--wandb_log=true: no such key"),  # this Config has no tracker
    (["--out_dir=a\nb", "--lr=a\nb"], "--lr=a; b: expected float"),
])
def test_mistakes(args, text):
    assert text in mistake(argv, *args)


def test_a_flag_takes_the_next_argument():
    cfg = argv("--lr", "-1", "--max-steps", "7", "--resume", "--out_dir", "-x", "--n-layer", "4", "--seed", "-3")
    assert (cfg.lr, cfg.max_steps, cfg.resume, cfg.out_dir, cfg.model.n_layer, cfg.seed) == (-1, 7, True, "-x", 4, -3)


def test_order_is_defaults_files_flags_wherever_the_flag_stands():
    a, b = write("lr = 0.1\nmax_steps = 1", "a.py"), write("lr = 0.2", "b.py")
    for args in ([a, b, "--lr=0.3"], ["--lr=0.3", a, b], [a, "--lr=9", "--lr=0.3", b], ["--tie", a, "--lr", "0.3", b]):
        assert (argv(*args).lr, argv(*args).max_steps) == (0.3, 1)
    assert argv(a, b).lr == 0.2 and argv(b, a).lr == 0.1 and argv().lr == 1e-3
    assert configurator.load(Config, a, b).lr == 0.2
    assert configurator.load(Config, Path(a), lr=5).lr == 5.0


def test_arch_is_chosen_before_its_keys_are_read():
    a, b = write("arch = 'toy_a'", "a.py"), write("d_state = 8\narch = 'toy_b'", "b.py")
    assert argv("--d_state=4", "--arch=toy_b").model.d_state == 4
    assert argv("--d_state", "4", "--arch", "toy_b").model.d_state == 4
    assert argv("--tie", b).model.d_state == 8  # --tie is bool: the file is not its value
    assert argv("--scan", b).model.scan and argv("--scan", "--arch=toy_b", a).arch == "toy_b"
    assert argv(a, b).arch == "toy_b"
    assert "b.py:1: d_state = 8: no such key in test_configurator.py and toy_a.py" in mistake(argv, b, a)
    assert "no such key" in mistake(argv, b, "--arch=toy_a")
    assert "a.py:1: arch='toy_c': there is no toy_c.py" in mistake(argv, write("arch = 'toy_c'", "a.py"))
    assert "there is toy_a, toy_b, toy_broken, toy_clash" in mistake(argv, "--arch=qwertz")


def test_a_broken_model_file_shows_its_own_error():
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        argv("--arch=toy_broken")


def test_bare_config_is_complete_and_frozen():
    import toy_a
    import toy_b

    assert Config() == configurator.load(Config) == argv() and Config().model == toy_a.Config()
    assert Config(max_steps=3, model=toy_a.Config(n_layer=4)) == argv("--n_layer=4", "--max_steps=3")
    assert replace(Config(), lr=2.0).lr == 2.0
    with pytest.raises(FrozenInstanceError):
        Config().lr = 1
    assert "model is a Config of toy_b.py, but the chosen module is toy_a.py" in mistake(Config, model=toy_b.Config())
    assert "arch='toy_c'" in mistake(Config, arch="toy_c")


def test_config_file_is_plain_python():
    path = write('''
"""A recipe."""
import math
from os import path as lr
_tokens = 16 * 64
n_layer = n_head = 4
max_steps, (sizes, *_) = 1_000_000 // _tokens, ([1, 2], 5)
lr: float = math.sqrt(4)
lr *= 2
module = math
prompts = ["x", "y"]
grad_clip = None
schedule = "wsd" if lr > 1 else "cosine"
''')
    cfg = argv(path)
    assert (cfg.model.n_layer, cfg.model.n_head, cfg.max_steps, cfg.sizes, cfg.lr) == (4, 4, 976, (1, 2), 4.0)
    assert (cfg.prompts, cfg.grad_clip, cfg.schedule) == (("x", "y"), None, "wsd")
    spy = "lr = 5\r\nfrom pathlib import Path\r\n_n = Path('count').write_text(str(Path('count').exists()))\r\n"
    Path(path).write_bytes(b"\xef\xbb\xbf" + spy.encode())  # saved by Notepad
    assert argv(path).lr == 5 and Path("count").read_text() == "False"  # and run only once
    assert argv(write("from math import pi as lr")).lr == 1e-3  # imported names are private


@pytest.mark.parametrize("text, message", [
    ("learning_rat = 0.001", "x.py:1: learning_rat = 0.001: no such key in test_configurator.py and toy_a.py - did"),
    ("\n\nmax_iters = 5", "x.py:3: max_iters = 5: max_iters is called max_steps here"),
    ("lr = 1\n\nlr='abc'", "x.py:3: lr='abc': expected float"),
    ("lr = '1'", "lr='1': expected float"),
    ("n_layer = True", "x.py:1: n_layer=True: expected int"),
    ("lr = True", "lr=True: expected float"),
    ("lr = float('nan')", "lr=nan: expected a finite float"),
    ("lr = 10 ** 400", "expected float"),
    ("resume = 1", "resume=1: expected bool"),
    ("resume = 'true'", "resume='true': expected bool"),
    ("max_steps = 2.5", "max_steps=2.5: expected int"),
    ("grad_clip = 'none'", "grad_clip='none': expected float or None"),
    ("out_dir = 5", "out_dir=5: expected str"),
    ("prompts = 'a'", "prompts='a': expected tuple of str"),
    ("prompts = ['a', 1]", "expected str"),
    ("level = True", "level=True: not one of 1, 2"),
    ("schedule = 1", "schedule=1: not one of cosine, wsd"),
    ("lr = 1\ndef f():\n  pass", "x.py:2: 'def f():': a config file may only import and assign"),
    ("class A:\n  lr = 1", "x.py:1: 'class A:'"),
    ("for lr in range(3):\n  pass", "x.py:1: 'for lr in range(3):'"),
    ("if True:\n  lr = 1", "'if True:'"),
    ("print('hello')", "x.py:1: \"print('hello')\""),
    ("_d = {}\n_d['lr'] = 1", "x.py:2:"),
    ("import os\nos.lr = 1", "x.py:2: 'os.lr = 1'"),
    ("lr = 1\ndel lr", "x.py:2: 'del lr'"),
    ("lr: float", "x.py:1: 'lr: float'"),
    ("from math import *", "x.py:1: 'from math import *'"),
    ("lr = (n_hed := 4)", "n_hed = 4: no such key"),
    ("lr = lambda: 1", "expected float"),
    ("lr = (1", "x.py:1: '(' was never closed"),
    ("lr = 1\nmax_steps = 1 // 0", "x.py:2: ZeroDivisionError"),
    ("\nimport no_such_library", "x.py:2: ModuleNotFoundError: No module named 'no_such_library'"),
    ("lr = int('''\n''')", "x.py:1: ValueError"),
    ("lr = 1\0", "x.py:1: "),
    ("raise SystemExit(3)", "x.py:1: 'raise SystemExit(3)'"),
    ("import sys\nlr = sys.exit(3)", "x.py:2: SystemExit: 3"),
    ("n_layer = 3", "n_layer=3 must be a multiple of n_head=2"),
])
def test_mistakes_in_files(text, message):
    assert message in mistake(argv, write(text))


def test_missing_and_unreadable_files():
    Path("config").mkdir()
    write("lr = 1", "config/small.py")
    assert mistake(argv, "config/smal.py") == "there is no config file config/smal.py - did you mean 'small.py'?"
    assert mistake(argv, "nowhere/smal.py") == "there is no config file nowhere/smal.py"
    assert mistake(configurator.load, Config, "config") == "there is no config file config"
    Path("x.py").write_bytes(b"lr = 1  # \xff\xfe")
    assert mistake(argv, "x.py").startswith("x.py:")


@pytest.mark.parametrize("override, text", [
    ({"lr": "1"}, "lr='1': expected float"), ({"max_steps": True}, "max_steps=True: expected int"),
    ({"n_layer": 2.5}, "n_layer=2.5: expected int"), ({"lrr": 1}, "lrr=1: no such key"),
    ({"prompts": "a"}, "expected tuple of str"), ({"n_layer": 3}, "must be a multiple"),
    ({"lr": None}, "lr=None: expected float"),
])
def test_overrides_are_checked(override, text):
    assert text in mistake(configurator.load, Config, **override)


def test_overrides_may_be_numpy_numbers_and_paths(tmp_path):
    np = pytest.importorskip("numpy")
    cfg = configurator.load(Config, lr=np.float32(0.5), max_steps=np.int64(3), n_layer=4.0, out_dir=tmp_path)
    assert (cfg.lr, cfg.max_steps, cfg.model.n_layer, cfg.out_dir) == (0.5, 3, 4, str(tmp_path))
    json.dumps(configurator.flat(cfg))


@pytest.mark.parametrize("args", [
    [], ["--arch=toy_b", "--d_state=4"], ["--prompts=x,y", "--sizes=1,2", "--grad_clip=none", "--seed=3"],
    ["--prompts=", "--compile", "--no_such"][:2], ["--out_dir=ä ö", "--schedule=wsd", "--lr=0.1", "--tie=no"],
])
def test_flat_survives_json(args):
    cfg = argv(*args)
    values = json.loads(json.dumps(configurator.flat(cfg)))
    assert values == configurator.flat(cfg) and "model" not in values and "n_layer" in values
    assert configurator.from_flat(Config, values) == cfg
    assert configurator.from_flat(Config, configurator.changed(cfg)) == cfg
    assert configurator.changed(cfg).keys() == {arg[2:].partition("=")[0] for arg in args}
    assert "did you mean 'n_layer'?" in mistake(configurator.from_flat, Config, {"n_layers": 3})


def test_flat_of_a_model_config_alone():
    import toy_a

    values = configurator.flat(toy_a.Config(n_layer=4))
    assert values == {"n_layer": 4, "n_head": 2, "tie": True}
    assert configurator.from_flat(toy_a.Config, values) == toy_a.Config(n_layer=4)


def test_help_shows_every_key_with_its_comment():
    text = configurator.help_text(Config)
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == __doc__.strip()
    for line in [
        "# run", "# optimizer", "toy_a.py:", "# shape", "--seed=none", "--tie=true", "--n_head=2",
        "--out_dir=runs/#1", "--prompts=a,b", "--sizes=", "--compile=auto", "--resume=false", "--grad_clip=1.0",
        "--prompt=\\n",
    ]:
        assert any(got == line or got.startswith(line + " ") for got in lines), line
    for comment in ("a folder; '#' in a string is not a comment", "on several lines", "embedding and head are one"):
        assert sum(line.endswith(comment) for line in lines) == 1
    for key in configurator.flat(Config()):
        assert sum(line.startswith(f"--{key}=") for line in lines) == 1
    assert "not a section" not in text and "--model" not in text
    assert lines.index("# run") < lines.index("# optimizer") < lines.index("toy_a.py:") < lines.index("# shape")


def test_help_honours_arch_and_half_a_command():
    assert "--d_state=16" in configurator.help_text(Config, ["--arch=toy_b"])
    assert "--d_state=16" in configurator.help_text(Config, [write("arch = 'toy_b'")])
    assert "--max_steps=100" in configurator.help_text(Config, ["--max_steps"])
    assert "did you mean" in mistake(configurator.help_text, Config, ["--arch=toy_bb"])


def test_mistakes_of_the_author_are_type_errors():
    @dataclass(frozen=True)
    class Forgot:
        lr: float = 1.0
        max_steps = 3

    @dataclass(frozen=True)
    class Odd:
        table: dict = field(default_factory=dict)

    with pytest.raises(TypeError, match="max_steps = 3 has no annotation"):
        configurator.load(Forgot)
    with pytest.raises(TypeError, match="Odd|table"):
        configurator.load(Odd)


@pytest.mark.parametrize("changes, message", [
    ({}, None),
    ({"n": 1, "rate": 0.5, "share": 1.0, "sizes": (0, 3), "name": "-1", "flag": False, "limit": None}, None),
    ({"share": 0.0, "limit": 0}, None),
    ({"n": -1}, "n=-1 must not be negative"),
    ({"n": 0}, "n=0 must be at least 1"),
    ({"rate": 0.0}, "rate=0.0 must be above 0"),
    ({"rate": -1e-9}, "rate=-1e-09 must not be negative"),
    ({"rate": float("nan")}, "rate=nan must not be negative"),
    ({"share": 1.5}, "share=1.5 is a fraction: it must be in [0, 1]"),
    ({"share": -0.5}, "share=-0.5 must not be negative"),
    ({"limit": -2}, "limit=-2 must not be negative"),
    ({"sizes": (3, -1)}, "sizes=(3, -1) must not be negative"),
])
def test_check_refuses_numbers_out_of_range(changes, message):
    @dataclass(frozen=True)
    class Ranged:
        n: int = 2
        rate: float = 0.1
        share: float = 0.5
        sizes: tuple[int, ...] = ()
        limit: int | None = None
        flag: bool = True
        name: str = ""

        def __post_init__(self):
            configurator.check(self, positive=("n", "rate"), fractions=("share",))

    if message is None:
        Ranged(**changes)
    else:
        with pytest.raises(ValueError) as info:
            Ranged(**changes)
        assert str(info.value) == message


def test_check_covers_the_sub_config():
    import toy_a

    @dataclass(frozen=True)
    class Ranged(Config):
        def __post_init__(self):
            super().__post_init__()
            configurator.check(self)

    with pytest.raises(ValueError, match="n_layer=-2 must not be negative"):
        Ranged(model=toy_a.Config(n_layer=-2))


def test_a_model_files_numbers_are_never_negative():
    import toy_a

    message = "n_layer=-2 must not be negative"            # and not that it is no multiple of n_head
    assert mistake(argv, "--n_layer=-2") == message
    assert mistake(argv, write("n_layer = -2")) == message
    assert mistake(configurator.load, Config, n_layer=-2) == message
    assert mistake(configurator.from_flat, toy_a.Config, {"n_layer": -2}) == message  # as for a checkpoint


NANOGPT = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log
wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout
bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend
device dtype compile""".split()


def test_every_setting_of_nanogpt_is_a_key_or_gets_a_hint():
    import sample
    import train

    of_sample = ("start", "num_samples", "max_new_tokens", "temperature", "top_k", "seed")
    for script, names in ((train, NANOGPT), (sample, of_sample)):
        for name in names:
            if name not in configurator.flat(script.Config()):
                assert "no such key" not in mistake(configurator.parse, script.Config, [f"--{name}=1"])
    text = mistake(configurator.parse, train.Config, ["--gradient_accumulation_steps=8"])
    assert "=8: batch_size is what the optimizer sees; micro_batch_size is how many of its sequences" in text


def test_every_hint_names_a_key_that_exists():
    import sample
    import train

    keys = {*configurator.flat(sample.Config())}
    for arch in ("model", "ternary", "hybrid_ssm", "cerebros"):
        keys |= {*configurator.flat(train.Config(arch=arch))}
    targets = {*configurator.RENAMED.values(), *(key for key, _ in configurator.INSTEAD.values() if key)}
    assert targets <= keys
    assert not keys & {*configurator.RENAMED, *configurator.INSTEAD}
    for _, advice in configurator.INSTEAD.values():
        assert {word.partition("=")[0] for word in advice.split() if "=" in word} <= keys


SCRIPT = '''
"""Toy: shows what becomes of mistakes.

    python toy.py --what=fine
"""
import errno
import sys
from dataclasses import dataclass

from thimble import configurator, files


@dataclass(frozen=True)
class Config:
    what: str = "fine"  # what goes wrong

def main(cfg):
    if cfg.what == "fine":
        print("done")
    if cfg.what == "user":
        raise files.UserError("data/x is damaged\\nprepare it again")
    if cfg.what == "missing":
        open("no/such/file")
    if cfg.what == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if cfg.what == "interrupt":
        raise KeyboardInterrupt
    if cfg.what == "bug":
        raise ValueError("a bug")
    if cfg.what == "flood":
        for i in range(100_000):
            print(i)

if __name__ == "__main__":
    configurator.run(main, Config)
'''


@pytest.mark.parametrize("args, code, out, err", [
    ([], 0, "done\n", ""),
    (["--what=user"], 1, "", "error: data/x is damaged; prepare it again\n"),
    (["--what=missing"], 1, "", "error: no/such/file: No such file or directory\n"),
    (["--what=full"], 1, "", "error: No space left on device\n"),
    (["--what=interrupt"], 130, "", ""),
    (["--wat=x"], 1, "", "error: --wat=x: no such key in toy.py - did you mean 'what'?\n"),
    (["-h"], 0, "what goes wrong", ""),
    (["--help", "--what=bug"], 0, "python toy.py --what=fine", ""),
])
def test_exit_codes(toys, args, code, out, err):
    done = toy(toys, *args)
    assert (done.returncode, done.stderr) == (code, err)
    assert out in done.stdout if out else not done.stdout


def test_what_was_typed_is_handed_over():
    write("arch = 'toy_b'", "base.py")
    args = ["--prompt", "x.py", "base.py", "--scan", "--out-dir=y.py", "--d_state", "4", "--lr=1"]
    cfg, command = configurator.parse(Config, args)
    assert cfg == argv(*args)
    assert command.files == ["base.py"]
    assert command.typed == {"prompt": "x.py", "scan": True, "out_dir": "y.py", "d_state": 4, "lr": 1.0}
    assert command.given == command.typed | {"arch": "toy_b"}
    assert shlex.split(command.line)[1:] == args


def test_what_was_given_counts_also_where_it_is_the_default():
    assert configurator.parse(Config, ["--n_layer=2", "--lr=1"])[1].given == {"n_layer": 2, "lr": 1.0}
    assert configurator.parse(Config, [])[1].given == {}


def test_a_bug_keeps_its_traceback(toys):
    done = toy(toys, "--what=bug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ValueError: a bug" in done.stderr


def test_a_reader_that_leaves_and_a_full_disk_are_quiet(toys):
    write(SCRIPT, "toy.py")
    command = [sys.executable, "toy.py", "--what=flood"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run(command[:2], stdout=full, stderr=subprocess.PIPE, text=True, env=environment())
        assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def environment():
    return {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}


def toy(folder, *args):
    write(SCRIPT, "toy.py")
    command = [sys.executable, "toy.py", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())


# what each command refuses besides negative numbers: keys that must not be 0, keys that must not be above 1
REFUSED = {
    "train": ("batch_size max_steps eval_every log_every restart_steps lr rest_lr", "min_lr decay_frac restart_decay"),
    "sample": ("num_samples max_new_tokens top_p repetition_penalty", "top_p min_p"),
    "evaluate": ("n max_new_tokens", ""),
    "export": ("prompts prompt_tokens", ""),
    "search": ("n_trials n_evals", ""),
    "serve": ("max_batch max_queue max_body client_seconds request_seconds", ""),
}


@pytest.mark.parametrize("command", REFUSED)
def test_numbers_out_of_their_range_are_refused_by_name(command):
    Config = importlib.import_module(command).Config
    types = {f.name: f.type for f in fields(Config)}
    positive, fractions = (keys.split() for keys in REFUSED[command])
    for names, number in ((positive, 0), (fractions, 2)):
        for name in names:
            value = float(number) if types[name] is float else number
            with pytest.raises(ValueError, match=f"{name}={value}"):
                Config(**{name: value})
    for name in fractions:  # both ends are allowed but where 0 is not
        Config(**{name: 1.0})
        if name not in positive:
            Config(**{name: 0.0})


@dataclass(frozen=True)
class Listed:
    compile: bool | Literal["auto"] = "auto"  # a single choice is for the comment
    which: Literal["best", "latest"] = "best"  # of a run
    betas: tuple[float, ...] = (0.9, 0.5)
    name: str | None = None

    # above
    text: str = "a\nb"  # beside


def test_help_by_hand():
    assert configurator.help_text(Listed).splitlines()[-6:] == [
        "  --compile=auto                   a single choice is for the comment",
        "  --which=best                     best | latest; of a run",
        "  --betas=0.9,0.5",
        "  --name=none",
        "  # above",
        "  --text=a\\nb                      beside"]


@dataclass(frozen=True)
class Sectioned:
    # first
    one: int = 1
    two: int = 2
    # second, of
    # two lines
    three: tuple[int, ...] = (
        3,  # which continues
        4,
    )  # and ends
    four: int = 4


def test_sections_and_comments_stand_once_where_they_belong():
    assert configurator.help_text(Sectioned).splitlines()[-7:] == [
        "  # first",
        "  --one=1",
        "  --two=2",
        "  # second, of",
        "  # two lines",
        "  --three=3,4                      which continues and ends",
        "  --four=4"]
