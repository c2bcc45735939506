"""One frozen dataclass is the schema, the defaults and the manual of a script; Python files and flags override it.

    @dataclass(frozen=True)
    class Config:
        # optimizer                              an own-line comment starts a section of --help
        lr: float = 1e-3                       # the trailing comment is the help text
        arch: str = "model"                    # model file: model | ternary | your_fork
        model: object = configurator.sub("arch")

        def __post_init__(self):
            configurator.resolve(self)         # only if there is a sub(): makes a bare Config() complete
            configurator.check(self, positive=("lr",))

    if __name__ == "__main__":
        configurator.run(main, Config)

    $ python train.py config/owt.py config/small.py --lr=1e-3 --max-steps 500 --compile
    $ python train.py --arch=ternary --help
    >>> cfg = configurator.load(train.Config, "config/small.py", lr=3e-4, n_layer=4)

Precedence: defaults < files, left to right < flags, left to right, wherever the flags stand. A config file only imports
and assigns; imported names and names with a leading underscore are private to it, every other name must be a key.
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
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from thimble.files import UserError

HERE = Path(__file__).resolve().parent.parent  # where the model files are
BOOLS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
# the order in which the members of a union are tried: str accepts any text, so it comes last
KINDS = (NoneType, Literal, int, float, bool, tuple, str)

# Names from nanoGPT and nanochat, and the key of the same meaning here.
# Only consulted for a name that is not a key, and only where the target is one.
RENAMED = {
    "max_iters": "max_steps",
    "num_iterations": "max_steps",
    "learning_rate": "lr",
    "eval_interval": "eval_every",
    "log_interval": "log_every",
    "warmup_iters": "warmup_steps",
    "start": "prompt",
}
# Names without a key of the same meaning -> (a key, the hint). The hint is shown by scripts that have the key, since it
# makes no sense in others; with "" it is shown by all.
INSTEAD = {
    "gradient_accumulation_steps": (
        "micro_batch_size",
        "batch_size is what the optimizer sees; micro_batch_size is how many of its sequences are computed at a time"),
    "beta1": ("betas", "betas=0.9,0.95 sets both"),
    "beta2": ("betas", "betas=0.9,0.95 sets both"),
    "decay_lr": ("schedule", "schedule=constant keeps the learning rate, every other schedule lowers it"),
    "lr_decay_iters": ("max_steps", "the schedule always ends at max_steps"),
    "always_save_checkpoint": ("keep_last", "every evaluation saves a checkpoint; keep_last=0 keeps all of them"),
    "eval_iters": ("", "not needed: the whole validation split is always used"),
    "eval_only": ("", "evaluate.py evaluates a checkpoint"),
    "wandb_log": ("tracker", "tracker=wandb turns it on"),
    "wandb_project": ("tracker", "the project is always called thimble"),
    "wandb_run_name": ("tracker", "the tracker's run is named after the run folder, out_dir"),
    "bias": ("", "model.py has no biases"),
    "backend": ("", "not needed: a run uses one device, without torch.distributed"),
}


class Command(NamedTuple):
    """What was typed."""
    line: str  # the whole command line, quoted for a shell
    files: list  # the paths of the config files on it
    typed: dict  # {key: value} of its flags
    given: dict  # {key: value} of its files and flags


class Setting(NamedTuple):
    """One assignment to a key."""
    key: str
    value: object
    origin: str  # "--", "config/x.py:12: " or "", for error messages
    text: bool  # whether it was typed on the command line, so that the value is a text to convert


# ---- for dataclasses
def sub(field_name):
    """A field for the `Config` of the module that the field `field_name` names; needs `resolve` in __post_init__."""
    return field(default=None, metadata={"sub": field_name})


def resolve(cfg):
    """For __post_init__: fill the sub() field of `cfg` with its module's defaults, or check that the two fit together.

    Raises UserError if there is no such module, or if the field holds another module's Config.
    """
    # the fields as if they had been set one by one: a bare Config(arch="ternary") chooses its module as a flag does
    settings = [Setting(f.name, getattr(cfg, f.name), "", False) for f in fields(cfg)]
    name, part = _part(type(cfg), settings)
    value = getattr(cfg, name)
    if value is None:
        # the standard idiom for a frozen dataclass: __post_init__ still runs, so the instance is not shared yet
        object.__setattr__(cfg, name, part())
    elif not isinstance(value, part):
        raise UserError(f"{name} is a Config of {_file(type(value))}, but the chosen module is {_file(part)}")


def check(cfg, positive=(), fractions=()):
    """For __post_init__: the plain ranges of all numbers of `cfg` and of its sub config. Raises ValueError.

    No number may be negative. Those of the fields named in `positive` must be above 0, those named in `fractions` at
    most 1. The numbers of a tuple are checked one by one; None, strings and bools have no range. Other limits, and
    relations between fields, are for the Config itself to check.
    """
    for f, value in _walk(cfg):
        _check_range(f.name, value, f.name in positive, f.name in fractions)


def _check_range(name, value, positive=False, fraction=False):
    values = value if isinstance(value, tuple) else (value,)
    for number in values:
        if isinstance(number, bool) or not isinstance(number, (int, float)):  # isinstance(True, int) is true
            continue
        if not number >= 0:  # also true of NaN
            raise ValueError(f"{name}={value} must not be negative")
        if positive and number == 0:
            least = "at least 1" if isinstance(number, int) else "above 0"
            raise ValueError(f"{name}={value} must be {least}")
        if fraction and number > 1:
            raise ValueError(f"{name}={value} is a fraction: it must be in [0, 1]")


# ---- to a Config and back
def load(Config, /, *files, **overrides):
    """A `Config` from defaults < files < overrides, all type-checked. Raises UserError."""
    settings = _from_files(map(os.fspath, files), _read)
    settings += [Setting(key, value, "", False) for key, value in overrides.items()]
    return _build(Config, settings)


def from_flat(Config, values):
    """The inverse of `flat`. Raises UserError."""
    return load(Config, **values)


def parse(Config, argv):
    """(a `Config`, its Command) from `[config/x.py ...] [--key=value | --key value | --flag ...]`. Raises UserError."""
    read = functools.cache(_read)  # reading a config file executes it: only once
    # A bool flag takes no value from the next argument, so what an argument means depends on the types of the keys.
    # Those of the model file are known only once it is chosen: the first pass finds the choice.
    paths, flags = _split(argv, _types(Config))
    _, part = _part(Config, _from_files(paths, read) + flags)
    paths, flags = _split(argv, _types(Config, part))
    settings = _from_files(paths, read) + flags
    cfg = _build(Config, settings)
    values = flat(cfg)  # converted, unlike those of the Settings
    typed = {s.key: values[s.key] for s in flags}
    given = {s.key: values[s.key] for s in settings}
    return cfg, Command(shlex.join([sys.argv[0], *argv]), paths, typed, given)


def flat(cfg):
    """{key: value} of `cfg` and of its sub config on one level, ready for JSON (tuples are lists)."""
    values = {}
    for f, value in _walk(cfg):
        values[f.name] = list(value) if isinstance(value, tuple) else value
    return values


def changed(cfg):
    """The part of `flat(cfg)` that differs from the defaults (those of the chosen module, for its keys)."""
    values = flat(cfg)
    # compared as they are, not as in `flat`: a tuple never equals a list
    return {f.name: values[f.name] for f, value in _walk(cfg) if value != _default(f)}


def convert(cfg, key, text):
    """`text` as the type that `key` has in `cfg` or its sub config, as on a command line. Raises UserError."""
    part = None
    for f in fields(cfg):
        if "sub" in f.metadata:
            part = type(getattr(cfg, f.name))
    return _value(Setting(key, text, "", True), _types(type(cfg), part)[key])


def hint(name, names):
    """The end of an error message: the one of `names` that was probably meant, or else all of them."""
    listed = f" - there is {', '.join(names)}" if names else ""
    return _guess(name, names) or listed


# ---- the command line
def run(main, Config, with_command=False):
    """Call `main(cfg)` for the command line; a user's mistake ends in one line on stderr and exit code 1.

    With with_command it is `main(cfg, command)`, for scripts that must know what was typed.
    """
    try:
        argv = sys.argv[1:]
        rest = [arg for arg in argv if arg not in ("--help", "-h")]
        if rest != argv:
            print(help_text(Config, rest))
        else:
            cfg, command = parse(Config, argv)
            if with_command:
                main(cfg, command)
            else:
                main(cfg)
        sys.stdout.flush()  # here, where a closed pipe or a full disk is still reported
        return
    except KeyboardInterrupt:
        code = 130  # what a shell reports for SIGINT
    except BrokenPipeError:  # whatever reads our output (head, less) has ended
        code = 1
    except (UserError, OSError) as e:
        print("error:", UserError(_reason(e)), file=sys.stderr)  # a UserError also of an OSError: it has one line
        code = 1
    try:
        sys.stdout.flush()
    except OSError:
        # the interpreter flushes again at exit, and would print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _reason(error):
    """The text of a UserError or an OSError, without the latter's errno."""
    reason = getattr(error, "strerror", None) or error
    filename = getattr(error, "filename", None)
    return reason if filename is None else f"{filename}: {reason}"


def help_text(Config, argv=()):
    """The script's docstring, then `--key=default  comment` for every key, read from the source of the Configs."""
    try:
        # only to find out which module is chosen: --help must also work after half a command
        paths, flags = _split(argv, _types(Config))
        settings = _from_files(paths, _read) + flags
    except UserError:
        settings = []
    _, part = _part(Config, settings)
    lines = [inspect.cleandoc(sys.modules[Config.__module__].__doc__ or _file(Config))]
    for cls in (Config, part):
        if cls is None:
            continue
        lines += ["", f"{_file(cls)}:"]
        notes = _notes(cls)
        types = _types(cls)
        for f in fields(cls):
            sections, comment = notes.get(f.name, ([], ""))  # without the source there are no comments
            lines += [f"  # {section}" for section in sections]
            if "sub" not in f.metadata:
                lines.append(_help_line(f, types[f.name], comment))
    return "\n".join(lines)


def _help_line(f, kind, comment):
    """The line `  --key=default   option | option; comment`."""
    default = _default(f)
    if isinstance(default, tuple):
        text = ",".join(map(str, default))
    elif default is None or isinstance(default, bool):
        text = str(default).lower()
    else:
        text = str(default).replace("\n", "\\n")  # one line for each key
    options = []
    for member in _members(kind):
        if get_origin(member) is Literal:
            options += map(str, get_args(member))
    if len(options) > 1:  # a single one, like "auto" beside bool, is for the comment to explain
        listed = " | ".join(options)
        comment = f"{listed}; {comment}" if comment else listed
    return f"  {f'--{f.name}={text}':<32} {comment}".rstrip()


def _notes(cls):
    """{field: (own-line comments above it, comment beside it)} from the source of `cls` and of what it extends."""
    if cls is object:
        return {}
    notes = _notes(cls.__base__)
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # defined in an interpreter: there is no source to read
        return notes
    comments = _comments(source)
    end = 0  # line on which the statement before ends
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            sections = []
            for line in range(end + 1, node.lineno):
                column, alone, text = comments.get(line, (0, False, ""))
                if alone and column == node.col_offset:  # one further to the right continues a trailing comment
                    sections.append(text)
            beside = [comments[line][2] for line in range(node.lineno, node.end_lineno + 1) if line in comments]
            notes[node.target.id] = (sections, " ".join(beside))
        end = node.end_lineno
    return notes


def _comments(source):
    """{line: (column, whether it is alone on its line, text)} of the comments in a piece of Python."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            alone = token.line.lstrip().startswith("#")
            comments[line] = (column, alone, token.string.lstrip("#").strip())
    return comments


def _split(argv, types):
    """argv -> (paths of config files, Settings of flags). types: {key: annotation} of the keys that are known.

    A key outside of `types` takes the next argument if that looks like a value.
    """
    paths = []
    flags = []
    switch = ""  # the argument before, if it is a flag that took no value
    argv = list(argv)
    while argv:
        arg = argv.pop(0)
        if not arg.startswith("--"):
            if not arg.endswith(".py"):
                advice = f"; a value for {switch} is written {switch}={arg}" if switch else ""
                raise UserError(f"{arg!r}: expected a config file (config/NAME.py) or --key=value{advice}")
            paths.append(arg)
            switch = ""
            continue
        key, equals, value = arg[2:].partition("=")
        key = key.replace("-", "_")  # --max-steps is --max_steps
        switch = ""
        if not equals:
            value_follows = bool(argv) and not argv[0].startswith("--")
            if key in types:
                is_switch = bool in _members(types[key])
            else:
                # perhaps a key of the model file, whose type is not known yet; few values end in .py
                is_switch = not value_follows or argv[0].endswith(".py")
            if is_switch:
                value = "true"
                switch = arg
            elif value_follows:
                value = argv.pop(0)
            else:
                raise UserError(f"{arg} needs a value: {arg}=VALUE")
        flags.append(Setting(key, value, "--", True))
    return paths, flags


# ---- config files
def _from_files(paths, read):
    """The Settings of several files, in their order. read: `_read` or a cached one."""
    settings = []
    for path in paths:
        settings += read(path)
    return settings


def _read(path):
    """The Settings of one config file. Raises UserError."""
    if not os.path.isfile(path):
        names = [other.name for other in Path(path).parent.glob("*.py")]
        raise UserError(f"there is no config file {path}{_guess(os.path.basename(path), names)}")
    try:
        source = Path(path).read_text(encoding="utf-8-sig")  # Notepad puts a byte order mark first
        tree = ast.parse(source, path)
    except (SyntaxError, ValueError) as e:  # ValueError: not UTF-8, or null bytes
        line = getattr(e, "lineno", None) or 1
        raise UserError(f"{path}:{line}: {getattr(e, 'msg', e)}") from None
    lines = {}  # key -> line of its last assignment
    for statement in tree.body:
        names = _assigned(statement)
        if names is None:  # a recipe is a list of settings: with loops and functions it would be a program
            text = source.splitlines()[statement.lineno - 1].strip()
            raise UserError(f"{path}:{statement.lineno}: {text!r}: a config file may only import and assign keys")
        lines |= dict.fromkeys(names, statement.lineno)
    values = _execute(path)
    settings = []
    for key, line in lines.items():
        # a `:=` inside of a lambda assigns no global; a module under another name is still an import
        if key in values and not isinstance(values[key], ModuleType):
            settings.append(Setting(key, values[key], f"{path}:{line}: ", False))
    return settings


def _assigned(statement):
    """The public names that a statement of a config file assigns; None if the statement is not allowed there."""
    match statement:
        case ast.Assign():
            targets = statement.targets
        case ast.AugAssign() | ast.AnnAssign(value=ast.expr()):
            targets = [statement.target]
        case ast.ImportFrom(names=[ast.alias(name="*")]):  # hides what it may overwrite
            return None
        case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):  # an Expr of a constant: the docstring
            targets = []
        case _:
            return None
    parts = []
    for target in targets:
        parts += ast.walk(target)
    # `a = 1`, `a, (b, *c) = ...`; not `x.y = 1` or `x[0] = 1`, which change something that the file did not make
    allowed = (ast.Name, ast.Tuple, ast.List, ast.Starred, ast.expr_context)
    if not all(isinstance(part, allowed) for part in parts):
        return None
    # and the `n` of a `(n := 4)` anywhere in the value, which is a global of the file too
    parts += [node.target for node in ast.walk(statement) if isinstance(node, ast.NamedExpr)]
    return [part.id for part in parts if isinstance(part, ast.Name) and not part.id.startswith("_")]


def _execute(path):
    """{name: value} after a config file has run."""
    try:
        return runpy.run_path(path)
    except (Exception, SystemExit) as e:  # whatever the file does wrong is a mistake of its author, not ours
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = lines[-1] if lines else 1
        raise UserError(f"{path}:{line}: {type(e).__name__}: {e}") from None


# ---- from Settings to a Config
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
            theirs = {key: values.pop(key) for key in _types(part) if key in values}
            values[name] = _construct(part, theirs)
        return _construct(Config, values)
    except ValueError as e:  # from a check in _construct, or from a __post_init__
        raise UserError(e) from None


def _construct(cls, values):
    """cls(**values). Raises ValueError."""
    # A model file imports nothing of ours, so it cannot call `check`. That none of its numbers is negative is checked
    # here, before the relations between its fields, which its __post_init__ checks.
    if _is_model_file(sys.modules[cls.__module__]):
        for key, value in values.items():
            _check_range(key, value)
    return cls(**values)


def _part(Config, settings):
    """(name of the sub() field, the Config class that `settings` choose for it), or (None, None)."""
    by_name = {f.name: f for f in fields(Config)}
    for f in fields(Config):
        if "sub" in f.metadata:
            key = f.metadata["sub"]
            choice = Setting(key, _default(by_name[key]), "", False)
            for s in settings:
                if s.key == key:
                    choice = s  # the last one wins
            module = _module(_value(choice, str), _shown(choice))
            return f.name, module.Config
    return None, None


def _module(name, shown):
    """The model file `name`, imported. An error in it keeps its traceback; UserError if it is not one."""
    # find_spec raises on an empty name, and imports the parents of a dotted one
    exists = name in sys.modules or (name.isidentifier() and importlib.util.find_spec(name))
    reason = f"there is no {name}.py"
    if exists:
        module = importlib.import_module(name)
        if _is_model_file(module):
            return module
        reason = f"{name}.py defines no Config and Model"
    names = []
    for path in sorted(HERE.glob("*.py")):  # read and not imported, as another file's error would hide this one
        text = path.read_text(encoding="utf-8", errors="replace")
        if set(re.findall(r"^class (Config|Model)\b", text, re.M)) == {"Config", "Model"}:
            names.append(path.stem)
    raise UserError(f"{shown}: {reason}{hint(name, names)}")


def _is_model_file(module):
    return hasattr(module, "Config") and hasattr(module, "Model")


@functools.cache
def _types(cls, part=None):
    """{key: annotation} of a Config class and of its sub config. A TypeError is the mistake of the class's author."""
    hints = get_type_hints(cls)
    # `max_steps = 3` without a type is a class attribute, not a field: an easy slip in a fork
    for base in cls.__mro__[:-1]:
        for name, value in vars(base).items():
            is_method = hasattr(value, "__get__") or isinstance(value, type)  # or a property, or a class in the class
            if not name.startswith("_") and name not in hints and not is_method:
                raise TypeError(f"{_file(cls)}: Config.{name} = {value!r} has no annotation, so it is not a key")
    types = {f.name: hints[f.name] for f in fields(cls) if "sub" not in f.metadata}
    for name, kind in types.items():
        if not all(_is_supported(member) for member in _members(kind)):
            raise TypeError(f"{_file(cls)}: Config.{name}: {kind} is not a type that a command line can hold")
    theirs = _types(part) if part else {}
    for f in fields(cls):
        if f.name in theirs:
            raise UserError(f"{_file(cls)} and {_file(part)} both have a key named {f.name!r}: rename one of them")
    return types | theirs


def _is_supported(kind):
    if get_origin(kind) is tuple:
        return get_args(kind)[1:] == (...,)
    # a bare `tuple` does not say of what
    return kind is not tuple and (get_origin(kind) or kind) in KINDS


# ---- values
def _value(s, kind):
    try:
        return _convert(s.value, kind, s.text)
    except ValueError as e:
        raise UserError(f"{_shown(s)}: {e}") from None


def _convert(value, kind, text):
    """`value` as `kind`, or a ValueError that says what was expected. text: whether it was typed on a command line."""
    members = _members(kind)
    if len(members) == 1:
        return _convert_one(value, kind, text)
    # "none" is None before it is a str, and 1 an int before it is a float
    for member in sorted(members, key=lambda member: KINDS.index(get_origin(member) or member)):
        try:
            return _convert_one(value, member, text)
        except ValueError:
            continue
    raise ValueError(f"expected {' or '.join(map(_name, members))}")


def _convert_one(value, kind, text):
    """`_convert` for anything but a union."""
    if get_origin(kind) is Literal:
        return _option(value, get_args(kind), text)
    if get_origin(kind) is tuple:
        if text:
            value = value.split(",") if value else []
        if isinstance(value, (tuple, list)):
            return tuple(_convert(item, get_args(kind)[0], text) for item in value)
    elif kind is NoneType:
        if value is None or (text and value.lower() == "none"):
            return None
    elif kind is bool:
        if text:
            value = BOOLS.get(value.lower())
        if isinstance(value, bool):
            return value
    elif kind is str:
        if isinstance(value, (str, os.PathLike)):
            return os.fspath(value)
    elif text or (isinstance(value, numbers.Real) and not isinstance(value, bool)):
        return _number(value, kind)
    raise ValueError(f"expected {_name(kind)}")


def _option(value, options, text):
    """The option of a Literal that `value` stands for."""
    for option in options:
        if text and str(option) == value:
            return option
        if not text and type(option) is type(value) and option == value:  # True is not 1 here
            return option
    names = [str(option) for option in options]
    raise ValueError(f"not one of {', '.join(names)}{_guess(str(value), names)}")


def _number(value, kind):
    """A number or a text as an int or a float; 1e4 and 4.0 are ints too."""
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"expected {kind.__name__}") from None
    if kind is float:
        if not math.isfinite(number):
            raise ValueError("expected a finite float")
        return number
    if not number.is_integer():
        raise ValueError("expected int")
    if re.fullmatch(r"[+-]?[\d_]+", str(value)):
        return int(value)  # exact, where a float has only 53 bits
    return int(number)


def _members(kind):
    """The members of a union; of any other type, itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)  # UnionType is X | Y


def _name(kind):
    """How an error message names a type."""
    if get_origin(kind) is tuple:
        items = " or ".join(map(_name, _members(get_args(kind)[0])))
        return f"tuple of {items}"
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return "None" if kind is NoneType else kind.__name__


# ---- error messages
def _unknown(s, types, Config, part):
    """The UserError for a Setting whose key is not in `types`."""
    # an origin that ends in a space is a line of a file, which has spaces around the "="
    shown = _shown(s, " = " if s.origin.endswith(" ") else "=")
    renamed = {name: target for name, target in RENAMED.items() if target in types}
    if s.key in renamed:
        return UserError(f"{shown}: {s.key} is called {renamed[s.key]} here")
    if s.key in INSTEAD:
        needed, advice = INSTEAD[s.key]
        if not needed or needed in types:
            return UserError(f"{shown}: {advice}")
    for f in fields(Config):
        if f.name == s.key:  # the sub() field itself: all others are in `types`
            return UserError(f"{shown}: not a key; {f.metadata['sub']!r} chooses it")
    files = _file(Config) if part is None else f"{_file(Config)} and {_file(part)}"
    close = difflib.get_close_matches(s.key, [*types, *renamed], 1)  # learning_rat is close to an old name of lr
    advice = f" - did you mean {renamed.get(close[0], close[0])!r}?" if close else ""
    return UserError(f"{shown}: no such key in {files}{advice}")


def _shown(s, equals="="):
    """A Setting as it was written; a long value is cut."""
    value = str(s.value) if s.text else repr(s.value)
    if len(value) >= 80:
        value = value[:77] + "..."
    return f"{s.origin}{s.key}{equals}{value}"


def _guess(name, names):
    close = difflib.get_close_matches(name, names, 1)
    return f" - did you mean {close[0]!r}?" if close else ""


def _file(cls):
    """The name of the file that defines a class."""
    return Path(getattr(sys.modules[cls.__module__], "__file__", None) or cls.__module__).name


# ---- fields
def _default(f):
    return f.default_factory() if f.default is MISSING else f.default


def _walk(cfg):
    """Yield (field, value) of `cfg` and of its sub config."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if "sub" not in f.metadata:
            yield f, value
        elif value is not None:
            yield from _walk(value)
