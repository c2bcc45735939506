"""
One frozen dataclass is the schema, the defaults and the manual of a script; Python files and flags override it.

    @dataclass(frozen=True)
    class Config:
        # optimizer                              an own-line comment starts a section of --help
        lr: float = 1e-3                       # the trailing comment is the help text
        arch: str = "model"                    # model file: model | ternary | your_fork
        model: object = configurator.sub("arch")

        def __post_init__(self):
            configurator.resolve(self)         # only where there is a sub(): makes a bare Config() complete

    if __name__ == "__main__":
        configurator.run(main, Config)

    $ python train.py config/owt.py config/small.py --lr=1e-3 --max-steps 500 --compile
    $ python train.py --arch=ternary --help
    >>> cfg = configurator.load(train.Config, "config/small.py", lr=3e-4, n_layer=4)

Defaults < files, left to right < flags, left to right, wherever the flags stand. A config file only imports and
assigns; imported names and names with a leading underscore are private to it, every other name must be a key.
Types: int, float, bool, str, None, Literal, tuple[X, ...] and unions of these.
"""

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import io
import math
import numbers
import os
import re
import runpy
import shlex
import sys
import textwrap
import tokenize
import traceback
from collections import namedtuple
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from thimble.files import UserError

HERE = Path(__file__).resolve().parent.parent             # where the model files are
BOOLS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
# the order in which the members of a union are tried: str takes any text, so it is last
KINDS = (NoneType, Literal, int, float, bool, tuple, str)

# what people who come from nanoGPT and nanochat type; an entry counts only where its target is a key
RENAMED = {
    "max_iters": "max_steps", "num_iterations": "max_steps", "lr_decay_iters": "max_steps", "learning_rate": "lr",
    "eval_interval": "eval_every", "log_interval": "log_every", "warmup_iters": "warmup_steps", "beta1": "betas",
    "beta2": "betas", "gradient_accumulation_steps": "accum_steps", "always_save_checkpoint": "save_every",
    "wandb_log": "tracker", "start": "prompt",
}  # fmt: skip
ABSENT = {"eval_iters": "not needed: the whole validation split is always used", "bias": "there are no biases here"}

# What was typed: the command line, the config files on it, {key: value} of its flags, and the same of flags and files
Command = namedtuple("Command", "line files typed given")
# one assignment: origin is "--", "config/x.py:12: " or ""; text is true for what was typed on the command line
Setting = namedtuple("Setting", "key value origin text")


def sub(field_name):
    """A field for the `Config` of the module that the field `field_name` names; needs `resolve` in __post_init__."""
    return field(default=None, metadata={"sub": field_name})


def resolve(cfg):
    """Fill the sub() field of a freshly made `cfg` with its module's defaults, or check that the two fit together."""
    name, part = _part(type(cfg), [Setting(f.name, getattr(cfg, f.name), "", False) for f in fields(cfg)])
    value = getattr(cfg, name)
    if value is None:
        object.__setattr__(cfg, name, part())  # the dataclass is frozen, but not yet in anyone's hands
    elif not isinstance(value, part):
        raise UserError(f"{name} is a Config of {_file(type(value))}, but the chosen module is {_file(part)}")


def check(cfg, positive=(), fractions=()):
    """For __post_init__: no number of `cfg` is negative, those named in `positive` are above 0, fractions at most 1."""
    for f, value in _walk(cfg):
        numbers_in = value if isinstance(value, tuple) else (value,)
        for number in numbers_in:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if number < 0:
                raise ValueError(f"{f.name}={value} must not be negative")
            if f.name in positive and number == 0:
                raise ValueError(f"{f.name}={value} must be {'at least 1' if isinstance(number, int) else 'above 0'}")
            if f.name in fractions and number > 1:
                raise ValueError(f"{f.name}={value} is a fraction: it must be in [0, 1]")


def load(Config, /, *files, **overrides):
    """A `Config` from defaults < files < overrides, all type-checked. Raises UserError."""
    settings = [setting for path in files for setting in _read(os.fspath(path))]
    return _build(Config, settings + [Setting(key, value, "", False) for key, value in overrides.items()])


def from_flat(Config, values):
    """The inverse of `flat`. Raises UserError."""
    return load(Config, **values)


def parse(Config, argv):
    """(a `Config`, its Command) from `[config/x.py ...] [--key=value | --key value | --flag ...]`. Raises UserError."""
    read = functools.cache(_read)
    # twice: which keys are bool, and so take no next argument, is known only once the module is
    _, part = _part(Config, _settings(argv, _types(Config), read))
    files = []

    def read_and_note(path):
        files.append(path)
        return read(path)

    settings = _settings(argv, _types(Config, part), read_and_note)
    cfg = _build(Config, settings)
    values = flat(cfg)
    typed = {s.key: values[s.key] for s in settings if s.text}
    given = {s.key: values[s.key] for s in settings}
    return cfg, Command(shlex.join(sys.argv), files, typed, given)


def from_argv(Config, argv):
    """The `Config` that `parse` makes of a command line. Raises UserError."""
    return parse(Config, argv)[0]


def flat(cfg):
    """{key: value} of `cfg` and of its sub config on one level, ready for JSON (tuples are lists)."""
    return {f.name: list(value) if isinstance(value, tuple) else value for f, value in _walk(cfg)}


def changed(cfg):
    """The part of `flat(cfg)` that differs from the defaults (those of the chosen module, for its keys)."""
    return {f.name: flat(cfg)[f.name] for f, value in _walk(cfg) if value != _default(f)}


def convert(cfg, key, text):
    """`text` as the type that `key` has in `cfg` or its sub config, as on a command line. Raises UserError."""
    part = next((getattr(cfg, f.name) for f in fields(cfg) if "sub" in f.metadata), None)
    return _value(Setting(key, text, "", True), _types(type(cfg), type(part) if part is not None else None)[key])


def hint(name, names):
    """For the end of an error: the one of `names` that was meant, or else all of them."""
    return _guess(name, names) or (f" - there is {', '.join(names)}" if names else "")


def run(main, Config, with_command=False):
    """`main(cfg)` for the command line; a user's mistake ends in one line on stderr and exit code 1.

    With with_command it is `main(cfg, command)`, for scripts that must know what was typed.
    """
    try:
        argv = sys.argv[1:]
        if "--help" in argv or "-h" in argv:
            print(help_text(Config, [arg for arg in argv if arg not in ("--help", "-h")]))
        else:
            cfg, command = parse(Config, argv)
            if with_command:
                main(cfg, command)
            else:
                main(cfg)
        return sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output (head, less) has left
        code = 1
    except (UserError, OSError) as e:
        reason = getattr(e, "strerror", None) or e
        named = getattr(e, "filename", None) is not None
        print("error:", UserError(f"{e.filename}: {reason}" if named else reason), file=sys.stderr)
        code = 1
    try:
        sys.stdout.flush()
    except OSError:  # or the interpreter flushes again at exit, and prints a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def help_text(Config, argv=()):
    """The script's docstring, then `--key=default  comment` for every key, read from the source of the Configs."""
    try:
        settings = _settings(argv, _types(Config), _read)
    except UserError:  # who asks for help may have typed half a command
        settings = []
    _, part = _part(Config, settings)
    lines = [inspect.cleandoc(sys.modules[Config.__module__].__doc__ or _file(Config))]
    for cls in filter(None, (Config, part)):
        notes, types = _notes(cls), _types(cls)
        lines += ["", f"{_file(cls)}:"]
        for f in fields(cls):
            sections, comment = notes.get(f.name, ([], ""))
            lines += [f"  # {section}" for section in sections]
            if "sub" not in f.metadata:
                default = _default(f)
                text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
                text = text.lower() if default is None or isinstance(default, bool) else text.replace("\n", "\\n")
                options = [str(o) for k in _members(types[f.name]) if get_origin(k) is Literal for o in get_args(k)]
                comment = "; ".join(filter(None, [" | ".join(options) if len(options) > 1 else "", comment]))
                lines.append(f"  {f'--{f.name}={text}':<32} {comment}".rstrip())
    return "\n".join(lines)


def _notes(cls):
    """{field: (own-line comments above it, comment beside it)} from the source of `cls` and of what it extends."""
    if cls is object:
        return {}
    inherited = _notes(cls.__base__)
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # defined in an interpreter: there is no source to read
        return inherited
    comments = {}  # line -> (column, is alone on its line, text)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = token.line.lstrip().startswith("#")
            comments[token.start[0]] = (token.start[1], alone, token.string.lstrip("#").strip())
    notes, end = inherited, 0
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = [comments[n] for n in range(end + 1, node.lineno) if n in comments]
            beside = [comments[n][2] for n in range(node.lineno, node.end_lineno + 1) if n in comments]
            sections = [text for column, alone, text in above if alone and column == node.col_offset]
            notes[node.target.id] = (sections, " ".join(beside))
        end = node.end_lineno
    return notes


def _settings(argv, types, read):
    """argv -> Settings, files first. A key outside `types` takes the next argument if that looks like a value."""
    files, flags, argv, bare = [], [], list(argv), ""
    while argv:
        arg = argv.pop(0)
        if not arg.startswith("--"):
            if not arg.endswith(".py"):
                hint = f"; a value for {bare} is written {bare}={arg}" if bare else ""
                raise UserError(f"{arg!r}: expected a config file (config/NAME.py) or --key=value{hint}")
            files += read(arg)
            bare = ""
            continue
        key, equals, value = arg[2:].partition("=")
        key, bare = key.replace("-", "_"), ""
        if not equals:
            has_next = bool(argv) and not argv[0].startswith("--")
            if bool in _members(types.get(key)) or key not in types and (not has_next or argv[0].endswith(".py")):
                value, bare = "true", arg
            elif has_next:
                value = argv.pop(0)
            else:
                raise UserError(f"{arg} needs a value: {arg}=VALUE")
        flags.append(Setting(key, value, "--", True))
    return files + flags


def _read(path):
    """The Settings of one config file."""
    if not os.path.isfile(path):
        names = [p.name for p in Path(path).parent.glob("*.py")]
        raise UserError(f"there is no config file {path}{_guess(os.path.basename(path), names)}")
    try:
        source = Path(path).read_text(encoding="utf-8-sig")
        tree = ast.parse(source, path)
    except (SyntaxError, ValueError) as e:  # ValueError: not UTF-8, or null bytes
        raise UserError(f"{path}:{getattr(e, 'lineno', None) or 1}: {getattr(e, 'msg', e)}") from None
    lines = {}  # key -> line of its last assignment
    for node in tree.body:
        match node:
            case ast.Assign():
                targets = node.targets
            case ast.AugAssign() | ast.AnnAssign(value=ast.expr()):
                targets = [node.target]
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()) if ast.unparse(node)[-1] != "*":
                targets = []
            case _:
                targets = [node]
        targets = [n for target in targets for n in ast.walk(target)]
        if not all(isinstance(n, (ast.Name, ast.Tuple, ast.List, ast.Starred, ast.expr_context)) for n in targets):
            statement = source.splitlines()[node.lineno - 1].strip()
            raise UserError(f"{path}:{node.lineno}: {statement!r}: a config file may only import and assign keys")
        targets += [n.target for n in ast.walk(node) if isinstance(n, ast.NamedExpr)]
        lines |= {n.id: node.lineno for n in targets if isinstance(n, ast.Name) and not n.id.startswith("_")}
    try:
        values = runpy.run_path(path)
    except (Exception, SystemExit) as e:  # whatever the file does wrong is a mistake of its author, not ours
        here = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        raise UserError(f"{path}:{here[-1] if here else 1}: {type(e).__name__}: {e}") from None
    lines = {key: n for key, n in lines.items() if key in values and not isinstance(values[key], ModuleType)}
    return [Setting(key, values[key], f"{path}:{n}: ", False) for key, n in lines.items()]


def _build(Config, settings):
    """A `Config` with its sub config; later Settings win."""
    name, part = _part(Config, settings)
    types = _types(Config, part)
    values = {}
    for s in settings:
        if s.key not in types:
            raise _unknown(s, types, Config, part)
        values[s.key] = _value(s, types[s.key])
    try:
        if part is not None:
            theirs = {key: values.pop(key) for key in list(values) if key in _types(part)}
            values[name] = part(**theirs)
        return Config(**values)
    except ValueError as e:  # from __post_init__; model files raise plain ValueErrors, to import nothing of ours
        raise UserError(e) from None


def _part(Config, settings):
    """(name of the sub() field, the Config class that `settings` choose for it), or (None, None)."""
    for f in fields(Config):
        if "sub" in f.metadata:
            key = f.metadata["sub"]
            default = next(_default(g) for g in fields(Config) if g.name == key)
            choice = [Setting(key, default, "", False), *(s for s in settings if s.key == key)][-1]
            return f.name, _module(_value(choice, str), _shown(choice)).Config
    return None, None


def _module(name, shown):
    there = name in sys.modules or name.isidentifier() and importlib.util.find_spec(name)
    module = importlib.import_module(name) if there else None
    if not (hasattr(module, "Config") and hasattr(module, "Model")):
        texts = {p.stem: p.read_text(encoding="utf-8", errors="replace") for p in sorted(HERE.glob("*.py"))}
        names = [n for n, text in texts.items() if len(set(re.findall(r"^class (Config|Model)\b", text, re.M))) == 2]
        reason = f"{name}.py defines no Config and Model" if there else f"there is no {name}.py"
        raise UserError(f"{shown}: {reason}{hint(name, names)}")
    return module


@functools.cache
def _types(cls, part=None):
    """{key: annotation} of a Config class and of its sub config. A TypeError is the mistake of who wrote the class."""
    hints = get_type_hints(cls)
    for base in cls.__mro__[:-1]:
        for name, value in vars(base).items():
            if not (name.startswith("_") or name in hints or hasattr(value, "__get__") or isinstance(value, type)):
                raise TypeError(f"{_file(cls)}: Config.{name} = {value!r} has no annotation, so it is not a key")
    theirs = _types(part) if part else {}
    for f in fields(cls):
        if f.name in theirs:
            raise UserError(f"{_file(cls)} and {_file(part)} both have a key named {f.name!r}: rename one of them")
    types = {f.name: hints[f.name] for f in fields(cls) if "sub" not in f.metadata}
    for name, kind in types.items():
        for k in _members(kind):
            if (get_origin(k) or k) not in KINDS or k is tuple or get_origin(k) is tuple and get_args(k)[1:] != (...,):
                raise TypeError(f"{_file(cls)}: Config.{name}: {kind} is not a type that a command line can hold")
    return types | theirs


def _value(s, kind):
    try:
        return _convert(s.value, kind, s.text)
    except ValueError as e:
        raise UserError(f"{_shown(s)}: {e}") from None


def _convert(value, kind, text):
    """`value` as `kind`, or a ValueError that says what was expected; `text`: it was typed on the command line."""
    members = _members(kind)
    for member in sorted(members, key=lambda member: KINDS.index(get_origin(member) or member)):
        try:
            return _convert_one(value, member, text)
        except ValueError:
            if len(members) == 1:
                raise
    raise ValueError(f"expected {' or '.join(map(_name, members))}")


def _convert_one(value, kind, text):
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        for option in args:
            if str(option) == value if text else type(option) is type(value) and option == value:
                return option
        options = [str(option) for option in args]
        raise ValueError(f"not one of {', '.join(options)}{_guess(str(value), options)}")
    if origin is tuple and (text or isinstance(value, (tuple, list))):
        items = (value.split(",") if value else []) if text else value
        return tuple(_convert(item, args[0], text) for item in items)
    if kind is NoneType and (value is None or text and value.lower() == "none"):
        return None
    if kind is bool and (isinstance(value, bool) or text and value.lower() in BOOLS):
        return BOOLS[str(value).lower()]
    if kind is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if kind in (int, float) and (text or isinstance(value, numbers.Real) and not isinstance(value, bool)):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = None
        if kind is int and number is not None and number.is_integer():  # 1e4 is an int; and large ones stay exact
            return int(value if re.fullmatch(r"[+-]?[\d_]+", str(value)) else number)
        if kind is float and number is not None:
            if math.isfinite(number):
                return number
            raise ValueError("expected a finite float")
    raise ValueError(f"expected {_name(kind)}")


def _members(kind):
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _name(kind):
    if get_origin(kind) is tuple:
        return "tuple of " + " or ".join(map(_name, _members(get_args(kind)[0])))
    return " or ".join(map(repr, get_args(kind))) if get_args(kind) else "None" if kind is NoneType else kind.__name__


def _unknown(s, types, Config, part):
    shown = _shown(s, " = " if s.origin.endswith(" ") else "=")
    names = {name: target for name, target in RENAMED.items() if target in types}
    if s.key in names:
        return UserError(f"{shown}: {s.key} is called {names[s.key]} here")
    if s.key in ABSENT:
        return UserError(f"{shown}: {ABSENT[s.key]}")
    for f in fields(Config):
        if f.name == s.key:
            return UserError(f"{shown}: not a key; {f.metadata['sub']!r} chooses it")
    files = " and ".join(_file(cls) for cls in (Config, part) if cls)
    guess = difflib.get_close_matches(s.key, [*types, *names], 1)
    hint = f" - did you mean {names.get(guess[0], guess[0])!r}?" if guess else ""
    return UserError(f"{shown}: no such key in {files}{hint}")


def _shown(s, equals="="):
    value = str(s.value) if s.text else repr(s.value)
    return f"{s.origin}{s.key}{equals}{value if len(value) < 80 else value[:77] + '...'}"


def _guess(name, names):
    guess = difflib.get_close_matches(name, names, 1)
    return f" - did you mean {guess[0]!r}?" if guess else ""


def _file(cls):
    return Path(getattr(sys.modules[cls.__module__], "__file__", None) or cls.__module__).name


def _default(f):
    return f.default_factory() if f.default is MISSING else f.default


def _walk(cfg):
    """(field, value) of `cfg` and of its sub config."""
    for f in fields(cfg):
        if "sub" not in f.metadata:
            yield f, getattr(cfg, f.name)
        elif getattr(cfg, f.name) is not None:
            yield from _walk(getattr(cfg, f.name))
