"""Checkpoints: atomic to write, verified to read, pruned with care. No pickle anywhere.

    runs/NAME/step_000500/   model.safetensors, optimizer.safetensors, tokenizer.json, meta.json (with their sha256)
    runs/NAME/latest, best   text files that hold the name of one such folder

    path = checkpoint.save("runs/tiny", 500, model.state_dict(), optimizer_tensors, meta)
    model = checkpoint.load_model(checkpoint.load("runs/tiny"))

A folder appears under its final name only when every byte of it is on disk: it is written under a hidden name, synced,
renamed. Killing the process at any moment leaves the previous checkpoint or the new one, never half of one.
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import stat
import sys
from pathlib import Path

import safetensors.torch
import torch

from thimble.configurator import from_flat
from thimble.files import UserError, remove, replace_folder, short, warn, write_atomic, write_synced

FORMAT_VERSION = 1
STEP = re.compile(r"(\.trash-)?step_([0-9]{6}|[1-9][0-9]{6,17})")
JUNK = re.compile(r"\.step_[0-9]+\.tmp|\.trash-step_[0-9]+|\.(latest|best)\.tmp(-[0-9]+)?")
TABLE_LIMIT = 2**32  # bytes of a model's buffers (position tables and such); a config that asks for more is broken


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    path: Path
    meta: dict
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor] | None  # moments and random states; None unless asked for


# ---- writing

def save(run_dir, step, model_tensors, optimizer_tensors, meta, tokenizer=None, keep_last=3, best=False):
    """Write run_dir/step_NNNNNN, point `latest` (and `best`) at it, prune, and return its path.

    `meta` is plain JSON without NaN, `tokenizer` the path of a tokenizer.json to copy. The newest `keep_last` whole
    checkpoints stay (0: all), and always the best and the latest. UserError if it cannot be written; the checkpoints
    that were there before then still load.
    """
    run_dir, name = Path(run_dir), f"step_{step:06d}"
    files = {"model.safetensors": pack_tensors(model_tensors)}
    if optimizer_tensors is not None:
        files["optimizer.safetensors"] = pack_tensors(optimizer_tensors)
    if tokenizer is not None:
        files["tokenizer.json"] = Path(tokenizer).read_bytes()
    manifest = {key: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for key, data in files.items()}
    meta = {**meta, "format_version": FORMAT_VERSION, "step": step, "files": manifest}
    meta = json.loads(json.dumps(meta, allow_nan=False))  # as a reader will see it: lists for tuples, text for keys
    files["meta.json"] = json.dumps({**meta, "sha256": _meta_sha256(meta)}, indent=1).encode()
    needed = sum(map(len, files.values())) * 11 // 10
    for attempt in range(2):  # one transient error must not end a long run
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            if _free(run_dir) < needed:
                _prune(run_dir, keep_last - 1 if keep_last > 1 else keep_last)  # what would go after this save
                if _free(run_dir) < needed:
                    raise OSError(errno.ENOSPC, "disk full")
            _write_folder(run_dir / name, files)
            for which in ["best"] * best + ["latest"]:  # best first: a kill in between must not orphan the best one
                write_atomic(run_dir / which, name)
            break
        except OSError as error:
            if attempt == 0 and error.errno in (errno.EIO, errno.EINTR):
                continue
            reason = f"{error.strerror or error}; check the folder and its permissions"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = f"disk full: {needed:,} bytes needed, {_free(run_dir):,} free; delete something"
            raise UserError(f"cannot save {run_dir / name}: {reason}, or choose another folder") from error
    try:
        _prune(run_dir, keep_last)
    except (OSError, UserError) as error:  # the new checkpoint is safe: too many old ones are no reason to stop
        warn(f"old checkpoints are kept: {error}")
    return run_dir / name


def pack_tensors(tensors):
    # a copy of each: safetensors refuses tensors that share memory or have gaps
    dense = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    return safetensors.torch.save(dense, {"format": "pt"})


def _meta_sha256(meta):
    return hashlib.sha256(json.dumps(meta, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _free(run_dir):
    return shutil.disk_usage(next(path for path in [run_dir, *run_dir.absolute().parents] if path.exists())).free


def _write_folder(final, files):
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        remove(temporary)
        temporary.mkdir()
        for name, data in files.items():
            write_synced(temporary / name, data)
    except BaseException:
        remove(temporary)
        raise
    # there may be one: this step was reached before, and the run resumed from further back
    replace_folder(temporary, final, trash=final.with_name(f".trash-{final.name}"))


def _prune(run_dir, keep_last):
    whole = [path for path in _history(run_dir) if not path.name.startswith(".") and _is_whole(path)]
    if not whole:
        return  # then even the trash may hold the last copy
    keep = {path.name for path in whole[-keep_last:]} | {_pointer(run_dir, "latest"), _pointer(run_dir, "best")}
    for path in whole:
        if path.name not in keep and not path.is_symlink():
            trash = path.with_name(f".trash-{path.name}")
            remove(trash)
            os.rename(path, trash)  # first, so that half a folder never bears a good name
    for path in run_dir.iterdir():
        if JUNK.fullmatch(path.name):
            remove(path)


# ---- finding

def _pointer(run_dir, which):
    """The folder name in run_dir/latest or run_dir/best; None if the file is missing or empty."""
    path = Path(run_dir) / which
    if which not in ("latest", "best"):
        raise UserError(f"unknown checkpoint {which!r}: say latest or best")
    if not os.path.lexists(path):
        return None
    name = _read(path).decode("utf-8", "replace").rstrip("\r\n")
    if name and (name.startswith(".") or not STEP.fullmatch(name)):
        raise UserError(f"{path} holds {name[:100]!r}, not the name of a checkpoint; delete this file")
    return name or None


def _history(run_dir):
    """Checkpoint folders of a run, whole or not, oldest first.

    A step above `latest` belongs to an earlier life of the run, which then resumed from further back: it counts as
    older. Oldest of all is the trash: a kill while a folder is replaced can leave the only copy there.
    """
    latest = STEP.fullmatch(_pointer(run_dir, "latest") or "")
    latest = int(latest[2]) if latest else math.inf
    if not Path(run_dir).is_dir():
        raise UserError(f"no run folder {run_dir}: check the name, or train one with python train.py")
    found = [(STEP.fullmatch(path.name), path) for path in Path(run_dir).iterdir() if path.is_dir()]
    found = [(not match[1], int(match[2]) <= latest, int(match[2]), path) for match, path in found if match]
    return [path for *_, path in sorted(found)]


def _is_whole(path):
    try:
        return all(_size(path / name) == entry["size"] for name, entry in _read_meta(path)["files"].items())
    except UserError:
        return False


def find(run_dir, which="latest"):
    """The folder that `latest` or `best` names; without a usable pointer the newest whole checkpoint."""
    name, whole = _pointer(run_dir, which), [path for path in _history(run_dir) if _is_whole(path)]
    if not whole:
        raise UserError(f"no checkpoint in {run_dir}: train one with python train.py")
    named = [path for path in whole if path.name == name]
    if which == "best" and not named:
        warn(f"{run_dir} has no best checkpoint; using the latest")
    return (named or whole)[-1]


def newest_run(root="runs"):
    """The run folder below `root` that was saved to last."""
    pointers = [path for path in Path(root).glob("*/latest") if path.is_file()]
    if not pointers:
        raise UserError(f"no run in {root}: train one first with python train.py")
    return max(pointers, key=lambda path: (path.stat().st_mtime_ns, path)).parent


# ---- reading

def load(path=None, which="latest", optimizer=False):
    """Read a checkpoint folder, the `which` of a run folder, or that of the newest run. UserError if it is damaged.

    Every file read is held against the sha256 in meta.json; the optimizer's is read only if asked for. What other
    programs wrote (a Hugging Face folder, a GGUF file) is read by load.py.
    """
    path = newest_run() if path is None else Path(path)
    if not path.is_dir():
        raise UserError(f"no checkpoint or run folder {path}: check the name, or train one with python train.py")
    if not (STEP.fullmatch(path.name) or os.path.lexists(path / "meta.json")):
        return load_run(path, which, optimizer)
    meta = _read_meta(path)
    files, data = meta["files"], {}
    if optimizer and "optimizer.safetensors" not in files:
        raise _damage(path / "optimizer.safetensors", "is not part of this checkpoint, so it cannot be resumed")
    for name, entry in files.items():
        if (size := _size(path / name)) != entry["size"]:
            raise _damage(path / name, f"has {size:,} bytes, should have {entry['size']:,}")
        if optimizer or name != "optimizer.safetensors":
            data[name] = _read(path / name)
            if hashlib.sha256(data[name]).hexdigest() != entry["sha256"]:
                raise _damage(path / name, "is damaged (its sha256 is not the one in meta.json)")
    tensors = {name: unpack_tensors(path / name, data[name]) for name in data if name.endswith(".safetensors")}
    return Checkpoint(path, meta, tensors["model.safetensors"], tensors.get("optimizer.safetensors"))


def load_run(run_dir, which="latest", optimizer=False):
    """Load the best, or the newest checkpoint that verifies, with one warning line for each that does not."""
    name, paths, rejected = _pointer(run_dir, which), _history(run_dir)[::-1], []
    if which == "best":
        paths.sort(key=lambda path: path.name != name)
        if paths and paths[0].name != name:
            warn(f"{run_dir} has no best checkpoint; using the latest")
    for path in paths:
        try:
            return load(path, optimizer=optimizer)
        except UserError as error:
            warn(f"{error}; trying another one now")
            rejected.append(str(error))
    if rejected:
        raise UserError(f"every checkpoint in {run_dir} is bad: {' | '.join(rejected)}")
    raise UserError(f"no checkpoint in {run_dir}: train one with python train.py")


def _damage(path, what):
    return UserError(f"{path} {what}; copy it again, or delete the folder {path.parent.name} to use another checkpoint")


def _size(path):
    """Size of a plain file in bytes; UserError for anything else (a link, a pipe, nothing)."""
    try:
        status = os.lstat(path)
    except OSError as error:
        raise _damage(path, f"cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise _damage(path, "is not a plain file")
    return status.st_size


def _read(path):
    _size(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _damage(path, f"cannot be read ({error.strerror})") from error


def _read_meta(folder):
    path = folder / "meta.json"
    data = _read(path)
    try:
        meta = json.loads(data)
        claimed, actual = meta.pop("sha256", None), _meta_sha256(meta)  # which also refuses NaN
        if claimed not in (None, actual):
            raise ValueError("it was changed; if by you, remove its last line, sha256")
        version, step, files = meta.get("format_version"), meta.get("step"), meta.get("files")
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(f"format_version is {version!r}, not {FORMAT_VERSION}: is it from a newer Thimble?")
        if type(step) is not int or step < 0 or not isinstance(files, dict) or "model.safetensors" not in files:
            raise ValueError("step or files is wrong")
        for name, entry in files.items():
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
                raise ValueError(f"file {name!r} is not a plain name")
            if type(entry.get("size")) is not int or type(entry.get("sha256")) is not str:
                raise ValueError(f"file {name!r} lacks its size or sha256")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damage(path, f"is not a valid description of a checkpoint ({short(error)})") from error
    return meta


def unpack_tensors(path, data):
    try:
        tensors = safetensors.torch.load(data)
        header = data[8 : 8 + int.from_bytes(data[:8], "little")]
        names = json.loads(header, object_pairs_hook=lambda pairs: [key for key, _ in pairs])
        if len(set(names)) < len(names):
            raise ValueError("a tensor is named twice")  # which the library accepts
    except Exception as error:  # the library's errors share no base class
        raise _damage(path, f"is not a valid safetensors file ({short(error)})") from error
    return tensors


# ---- rebuilding the model

def load_model(checkpoint):
    """meta["arch"].Model of meta["model_config"], with its weights. UserError if they do not fit or are not finite."""
    path, tensors = checkpoint.path, checkpoint.model
    arch, flat = checkpoint.meta.get("arch"), checkpoint.meta.get("model_config")
    if not isinstance(flat, dict):
        raise _damage(path / "meta.json", "has no model_config")
    if type(arch) is not str or not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", arch) or arch in sys.stdlib_module_names:
        raise _damage(path / "meta.json", f"has arch {arch!r}, which is not the name of a model file")
    if importlib.util.find_spec(arch) is None:
        raise UserError(f"{path} needs {arch}.py, which is not here; put that model file beside train.py")
    module = importlib.import_module(arch)
    if not (hasattr(module, "Model") and hasattr(module, "Config")):
        raise UserError(f"{path} has arch {arch!r}, but {arch}.py has no Model and Config; use the one that trained it")
    try:
        config = from_flat(module.Config, flat)
        if any(type(value) is int and value > 2**16 for value in flat.values()):  # a dry run; costs 1 s of imports
            with contextlib.suppress(NotImplementedError), torch.device("meta"):  # some cannot be built there
                _check_fit(_build(module, config, tensors, math.inf), tensors)
        model = _build(module, config, tensors, 2 * sum(tensor.numel() for tensor in tensors.values()) + 2**26)
        _check_fit(model, tensors)
    except Exception as error:  # whatever a model file raises on a config that is not its own
        raise UserError(f"{path} does not fit {arch}.py: {short(error)}; use the {arch}.py that trained it") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{path}: tensor {name} holds NaN or Inf; go back to an earlier checkpoint")
    model.load_state_dict(tensors, strict=False)
    return model


def _build(module, config, tensors, limit):
    """module.Model(config), stopped where it outgrows the file: before its values are drawn, so nothing fills up."""
    sizes = []

    def check(_, name, parameter):
        sizes.append(0 if parameter is None else parameter.numel())
        if len(sizes) > 4 * len(tensors) + 64 or sum(sizes) > limit:
            raise ValueError("the config asks for more than the file holds")

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(check)
    try:
        return module.Model(config)
    finally:
        hook.remove()


def _check_fit(model, tensors):
    want = model.state_dict(keep_vars=True)
    held = {id(tensor) for name, tensor in want.items() if name in tensors}  # tied weights are stored under one name
    problems = [f"{name} is missing" for name, tensor in want.items() if name not in tensors and id(tensor) not in held]
    for name, tensor in tensors.items():
        if name not in want:
            problems.append(f"{name} is unknown")
        elif tensor.shape != want[name].shape:
            problems.append(f"{name} is {list(tensor.shape)}, should be {list(want[name].shape)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError("tensor " + ", ".join(problems[:3]) + more)
    if sum(tensor.numel() * tensor.element_size() for tensor in model.buffers()) > TABLE_LIMIT:
        raise ValueError(f"its tables take over {TABLE_LIMIT:,} bytes")


# ---- random states

def random_state():
    """State of every random generator (Python, numpy if imported, torch, each CUDA device) as uint8 tensors."""
    states = {"random.python": random.getstate()}
    if "numpy" in sys.modules:
        kind, words, *rest = sys.modules["numpy"].random.get_state()
        states["random.numpy"] = (kind, words.tolist(), *rest)
    tensors = {k: torch.tensor(list(json.dumps(v).encode()), dtype=torch.uint8) for k, v in states.items()}
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def set_random_state(tensors):
    """Go back to a random_state(). Other keys are ignored; UserError if one is missing or has the wrong length."""
    for name in sorted({"random.python", "random.torch"} | {key for key in tensors if key.startswith("random.")}):
        try:
            if name == "random.python":
                version, words, gauss = json.loads(bytes(tensors[name].tolist()))
                random.setstate((version, tuple(words), gauss))
            elif name == "random.numpy":
                importlib.import_module("numpy").random.set_state(tuple(json.loads(bytes(tensors[name].tolist()))))
            elif name == "random.torch":
                torch.set_rng_state(tensors[name])
            elif (device := int(name.removeprefix("random.cuda."))) < torch.cuda.device_count():
                torch.cuda.set_rng_state(tensors[name], device)
            else:
                warn(f"{name} was saved, but this machine has no such device: the run goes on, not bit for bit")
        except Exception as error:  # each generator has its own
            raise UserError(f"{name} is missing or damaged ({short(error)}); use another checkpoint") from error
