"""Checkpoints: atomic to write, verified to read, pruned with care. No pickle anywhere.

    runs/NAME/step_000500/   model.safetensors, optimizer.safetensors, tokenizer.json, meta.json (with their sha256),
                             and tokenizer_config.json, ...: how the model is spoken to, see thimble/chat.py
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
import re
import shutil
import stat
import sys
from pathlib import Path

import safetensors.torch
import torch

from thimble import chat
from thimble.configurator import from_flat
from thimble.files import UserError, remove, replace_folder, short, warn, write_atomic, write_synced

FORMAT_VERSION = 1
HERE = Path(__file__).resolve().parent.parent  # where the model files are
# six digits, or more without a leading zero; .trash- marks a folder that is about to be deleted
STEP = re.compile(r"(\.trash-)?step_([0-9]{6}|[1-9][0-9]{6,17})")
# what a process that was killed leaves behind: of a save, and of the files of a run that are replaced as a whole
JUNK = re.compile(r"\.step_[0-9]+\.tmp|\.trash-step_[0-9]+|\.(latest|best|config|metrics|loss)\.tmp[-.a-z0-9]*")
TABLE_LIMIT = 2**32  # bytes of a model's buffers (position tables and such); a config that asks for more is broken
LARGE = 2**27  # numbers of a model (512 MB) from which on its parameters are not made first and filled then


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    path: Path  # the folder
    meta: dict  # of meta.json: step, arch, model_config, files, and what the writer added
    model: dict[str, torch.Tensor]  # weights and buffers, by the names of state_dict()
    optimizer: dict[str, torch.Tensor] | None  # moments and random states; None unless asked for


# ---- writing
def save(run_dir, step, model_tensors, optimizer_tensors, meta, tokenizer=None, keep_last=3, best=False):
    """Write run_dir/step_NNNNNN, point `latest` (and `best`) at it, prune, and return its path.

    `meta` is plain JSON without NaN, `tokenizer` the path of a tokenizer.json to copy, with the chat.FILES beside it.
    The newest `keep_last` whole checkpoints stay (0: all), and always the best and the latest. UserError if it cannot
    be written; the checkpoints that were there before then still load.
    """
    run_dir = Path(run_dir)
    folder = run_dir / f"step_{step:06d}"
    files = _contents(step, model_tensors, optimizer_tensors, meta, tokenizer)
    needed = sum(len(data) for data in files.values()) * 11 // 10  # a tenth for the blocks that stay half empty
    for attempt in range(2):
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            _make_room(run_dir, needed, keep_last)
            _write_folder(folder, files)
            # best first: a kill between the two must not leave the new best one to be pruned as an old latest one
            if best:
                write_atomic(run_dir / "best", folder.name)
            write_atomic(run_dir / "latest", folder.name)
            break
        except OSError as error:
            if attempt == 0 and error.errno in (errno.EIO, errno.EINTR):
                continue  # one transient error must not end a long run
            reason = f"{error.strerror or error}; check the folder and its permissions"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = f"disk full: {needed:,} bytes needed, {_free(run_dir):,} free; delete something"
            raise UserError(f"cannot save {folder}: {reason}, or choose another folder") from error
    try:
        _prune(run_dir, keep_last)
    except (OSError, UserError) as error:
        # the new checkpoint is safe, and training need not stop because there are too many old ones
        warn(f"old checkpoints are kept: {error}")
    return folder


def _contents(step, model_tensors, optimizer_tensors, meta, tokenizer):
    """{file name: bytes} of a checkpoint folder."""
    files = {"model.safetensors": pack_tensors(model_tensors)}
    if optimizer_tensors is not None:
        files["optimizer.safetensors"] = pack_tensors(optimizer_tensors)
    if tokenizer is not None:
        files["tokenizer.json"] = Path(tokenizer).read_bytes()
        for name in chat.FILES:
            beside = Path(tokenizer).with_name(name)
            if beside.is_file():
                files[name] = beside.read_bytes()
    manifest = {}
    for name, data in files.items():
        manifest[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    meta = {**meta, "format_version": FORMAT_VERSION, "step": step, "files": manifest}
    # hash it as a reader will see it: lists for tuples, text for keys
    meta = json.loads(json.dumps(meta, allow_nan=False))
    files["meta.json"] = json.dumps({**meta, "sha256": _meta_sha256(meta)}, indent=1).encode()
    return files


def pack_tensors(tensors):
    """{name: tensor} -> the bytes of a safetensors file."""
    return safetensors.torch.save(dense(tensors), {"format": "pt"})


def write_tensors(path, tensors):
    """Write {name: tensor} as a safetensors file, one tensor after the other: its bytes are never in memory at once."""
    try:
        path.touch()
        mode = path.stat().st_mode  # of any new file (the umask): the library's is for its owner alone
        safetensors.torch.save_file(dense(tensors), path, {"format": "pt"})
        path.chmod(mode)
    except (safetensors.SafetensorError, OSError) as error:  # such as a full disk
        raise UserError(f"{path} cannot be written: {short(error)}") from None


def dense(tensors):
    """{name: tensor} as safetensors takes them: on the CPU, without gaps, each in memory of its own."""
    found = {}
    taken = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        memory = tensor.untyped_storage()
        # copied only where it must be: a large model is there once as it is
        if memory.data_ptr() in taken or memory.nbytes() != tensor.nbytes or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        taken.add(memory.data_ptr())
        found[name] = tensor
    return found


def _meta_sha256(meta):
    return hashlib.sha256(json.dumps(meta, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _make_room(run_dir, needed, keep_last):
    """Prune before the save, instead of after it, if the disk is too full. OSError if that is not enough."""
    if _free(run_dir) >= needed:
        return
    # the new checkpoint will be one of the keep_last, so one less may stay now; but never none
    _prune(run_dir, keep_last - 1 if keep_last > 1 else keep_last)
    if _free(run_dir) < needed:
        raise OSError(errno.ENOSPC, "disk full")


def _free(run_dir):
    """Free bytes on the disk of a folder that may not exist yet."""
    folder = run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


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
    # there is a final one if this step was reached before, and the run was resumed from further back
    replace_folder(temporary, final, trash=final.with_name(f".trash-{final.name}"))


def _prune(run_dir, keep_last):
    history = _history(run_dir, _pointer(run_dir, "latest"))
    whole = [path for path in history if not path.name.startswith(".") and _is_whole(path)]
    if not whole:
        return  # even the trash may hold the last copy
    keep = {path.name for path in whole[-keep_last:]}
    keep |= {_pointer(run_dir, "latest"), _pointer(run_dir, "best")}
    for path in whole:
        if path.name in keep or path.is_symlink():
            continue
        # renamed first, so that a folder that is half deleted never has a good name
        trash = path.with_name(f".trash-{path.name}")
        remove(trash)
        os.rename(path, trash)
    remove_junk(run_dir)


def remove_junk(run_dir):
    """Delete what killed processes have left in a run, of which a whole checkpoint must have been read."""
    for path in Path(run_dir).iterdir():
        if JUNK.fullmatch(path.name):
            remove(path)


def point_best(run_dir, step):
    """Point `best` at the checkpoint of that step -> True; remove the pointer where there is none -> False."""
    run_dir = Path(run_dir)
    folder = run_dir / f"step_{step:06d}"
    if not _is_whole(folder):
        remove(run_dir / "best")
        return False
    write_atomic(run_dir / "best", folder.name)
    return True


# ---- finding
def holds_run(run_dir):
    """Whether a folder holds a checkpoint or a pointer to one, in whatever state."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        return False
    return any(path.name == "latest" or STEP.fullmatch(path.name) for path in run_dir.iterdir())


def newest_run(root="runs"):
    """The run folder below `root` that was saved to last."""
    pointers = [path for path in Path(root).glob("*/latest") if path.is_file()]
    if not pointers:
        raise UserError(f"no run in {root}: train one first with python train.py")
    newest = max(pointers, key=lambda path: (path.stat().st_mtime_ns, path))
    return newest.parent


def _pointer(run_dir, which):
    """The folder name in run_dir/latest or run_dir/best; None if the file is missing or empty."""
    path = run_dir / which
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path} is not a plain file with the name of a checkpoint; move it away")
    name = _read(path).decode("utf-8", "replace").rstrip("\r\n")
    if not name:
        return None
    if name.startswith(".") or not STEP.fullmatch(name):
        raise UserError(f"{path} holds {name[:100]!r}, which is not the name of a checkpoint; delete this file")
    return name


def _usable_pointer(run_dir, which, quiet):
    """_pointer(), but None with a warning where that raises: a broken pointer says nothing about the checkpoints."""
    try:
        return _pointer(run_dir, which)
    except UserError as error:
        if not quiet:
            warn(f"{error}; trying the newest checkpoint now")
        return None


def _history(run_dir, latest):
    """Checkpoint folders of a run, whole or not, oldest first.

    A step above `latest` is from before a rollback: the run was then resumed from further back, so it counts as older.
    Oldest of all is the trash: a kill while a folder is replaced can leave the only copy there.
    """
    last_step = math.inf if latest is None else int(latest.removeprefix("step_"))
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir}: check the name, or train one with python train.py")
    found = []
    for path in run_dir.iterdir():
        match = STEP.fullmatch(path.name)
        if match and path.is_dir():
            in_trash = match[1] is not None
            step = int(match[2])
            found.append((not in_trash, step <= last_step, step, path))
    return [path for *_, path in sorted(found)]


def _is_whole(path):
    """Whether every file of a checkpoint has the size that its meta.json says. Its contents are not read."""
    try:
        entries = _read_meta(path)["files"]
        return all(_size(path / name) == entry["size"] for name, entry in entries.items())
    except UserError:
        return False


# ---- reading
def load(path=None, which="latest", optimizer=False):
    """Read a checkpoint folder, the `which` of a run folder, or that of the newest run. UserError if it is damaged.

    Every file read is checked against the sha256 in meta.json; the optimizer's is read only if asked for. What other
    programs wrote (a Hugging Face folder, a GGUF file) is read by load.py.
    """
    path = newest_run() if path is None else Path(path)
    if not path.is_dir():
        raise UserError(f"no checkpoint or run folder {path}: check the name, or train one with python train.py")
    # a checkpoint by its name, so that the error says what it lacks; or a renamed copy of one
    if STEP.fullmatch(path.name) or os.path.lexists(path / "meta.json"):
        return _load_folder(path, optimizer)
    return load_run(path, which, optimizer)


def load_run(run_dir, which="latest", optimizer=False, before=math.inf, quiet=False):
    """The `which` ("latest" or "best") checkpoint of a run; where it is damaged the newest other one that verifies.

    One with NaN or Inf in a tensor counts as damaged. A warning names each that is, unless `quiet`: for a caller that
    reads the run a second time. UserError if none verifies. Steps from `before` on are the last ones to be tried.
    """
    run_dir = Path(run_dir)
    if which not in ("latest", "best"):
        raise UserError(f"unknown checkpoint {which!r}: use latest or best")
    newest_first = _history(run_dir, _usable_pointer(run_dir, "latest", quiet))[::-1]
    newest_first.sort(key=lambda path: int(STEP.fullmatch(path.name)[2]) >= before)
    if which == "best":
        # the best one first; the others stay behind it, newest first, in case it is damaged
        best = _usable_pointer(run_dir, "best", quiet)
        newest_first.sort(key=lambda path: path.name != best)
        if newest_first and newest_first[0].name != best:
            warn(f"{run_dir} has no best checkpoint; using the latest")
    rejected = []
    for path in newest_first:
        try:
            found = _load_folder(path, optimizer)
            _check_finite(path, found.model)
            _check_finite(path, found.optimizer or {})
            return found
        except UserError as error:
            if not quiet:
                warn(f"{error}; trying another one now")
            rejected.append(str(error))
    if rejected:
        raise UserError(f"no checkpoint in {run_dir} can be used: {' | '.join(rejected)}")
    raise UserError(f"no checkpoint in {run_dir}: train one with python train.py")


def _load_folder(path, optimizer):
    meta = _read_meta(path)
    if optimizer and "optimizer.safetensors" not in meta["files"]:
        raise UserError(f"{path} holds no optimizer state (a packed model is made to run): start a new run from its "
                        f"weights with --init_from={path}")
    tensors = {}
    for name, entry in meta["files"].items():
        size = _size(path / name)
        if size != entry["size"]:
            raise _damage(path / name, f"has {size:,} bytes, should have {entry['size']:,}")
        if name == "optimizer.safetensors" and not optimizer:
            continue  # the larger part of the bytes, which only resuming needs
        data = _read(path / name)
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise _damage(path / name, "is damaged (its sha256 is not the one in meta.json)")
        if name.endswith(".safetensors"):
            tensors[name] = unpack_tensors(path / name, data)
    return Checkpoint(path, meta, tensors["model.safetensors"], tensors.get("optimizer.safetensors"))


def non_finite(tensors):
    """The name of the first of {name: tensor} that holds NaN or Inf; None if none does."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return None


def _check_finite(path, tensors):
    name = non_finite(tensors)
    if name is not None:
        raise UserError(f"{path}: tensor {name} holds NaN or Inf; go back to an earlier checkpoint")


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
    _size(path)  # which refuses a pipe: reading it would never end
    try:
        return path.read_bytes()
    except OSError as error:
        raise _damage(path, f"cannot be read ({error.strerror})") from error


def _read_meta(folder):
    """meta.json of a checkpoint folder, without its own hash. UserError unless all that we rely on is in order."""
    path = folder / "meta.json"
    data = _read(path)
    try:
        meta = json.loads(data)
        _check_meta(meta)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damage(path, f"is not a valid description of a checkpoint ({short(error)})") from error
    return meta


def _check_meta(meta):
    claimed = meta.pop("sha256", None)
    actual = _meta_sha256(meta)  # which also refuses NaN
    if claimed not in (None, actual):
        raise ValueError("it was changed; if by you, remove its last line, sha256")
    version = meta.get("format_version")
    step = meta.get("step")
    files = meta.get("files")
    # type() is int: True is an int to isinstance
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"format_version is {version!r}, not {FORMAT_VERSION}: is it from a newer Thimble?")
    if type(step) is not int or step < 0:
        raise ValueError("step is wrong")
    if not isinstance(files, dict) or "model.safetensors" not in files:
        raise ValueError("files is wrong")
    for name, entry in files.items():
        # a name with a slash or dots could lead out of the folder
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
            raise ValueError(f"file {name!r} is not a plain name")
        if type(entry.get("size")) is not int or type(entry.get("sha256")) is not str:
            raise ValueError(f"file {name!r} lacks its size or sha256")


def unpack_tensors(path, data):
    """The bytes of a safetensors file -> {name: tensor}. `path` is for the UserError if they are not one."""
    try:
        tensors = safetensors.torch.load(data)
        # a tensor that is named twice: the library takes the last one without a word
        header_size = int.from_bytes(data[:8], "little")
        names = json.loads(data[8 : 8 + header_size], object_pairs_hook=lambda pairs: [key for key, _ in pairs])
        if len(set(names)) < len(names):
            raise ValueError("a tensor is named twice")
    except Exception as error:  # the library's errors share no base class
        raise _damage(path, f"is not a valid safetensors file ({short(error)})") from error
    return tensors


# ---- rebuilding the model
def load_model(checkpoint):
    """meta["arch"].Model of meta["model_config"], with its weights. UserError if they do not fit or are not finite.

    A LARGE model takes the tensors of the checkpoint over, so that they are in memory once.
    """
    path = checkpoint.path
    tensors = checkpoint.model
    arch = checkpoint.meta.get("arch")
    flat = checkpoint.meta.get("model_config")
    if not isinstance(flat, dict):
        raise _damage(path / "meta.json", "has no model_config")
    module = model_file(path, arch)
    try:
        config = from_flat(module.Config, flat)
        # a dry run without memory for configs with large numbers; not for all, since it takes a second of imports
        if any(type(value) is int and value > 2**16 for value in flat.values()):
            with contextlib.suppress(NotImplementedError), torch.device("meta"):  # some cannot be built there
                _check_fit(_build(module, config, tensors, math.inf), tensors)
        # generous, since tied weights are registered more often than they are stored
        size = sum(tensor.numel() for tensor in tensors.values())
        limit = 2 * size + 2**26
        model = None
        if size >= LARGE:
            with contextlib.suppress(Exception):  # of a model file whose __init__ reads its own weights
                model = _build(module, config, tensors, limit, hollow=True)
        if model is None or any(buffer.is_meta for buffer in model.buffers()):  # computed from weights
            model = _build(module, config, tensors, limit)
        _check_fit(model, tensors)
    except Exception as error:  # whatever a model file raises on a config that is not its own
        raise UserError(f"{path} does not fit {arch}.py: {short(error)}; use the {arch}.py that trained it") from error
    _check_finite(path, tensors)
    _fill(model, tensors)
    return model


def model_file(path, arch):
    """The module `arch` that a checkpoint at `path` names, imported: only a file beside train.py.

    Importing is executing, and the name comes from a file that may be from anywhere: so no installed package, and
    nothing else that Python's path happens to hold.
    """
    if type(arch) is not str or not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", arch) or arch in sys.stdlib_module_names:
        raise _damage(path / "meta.json", f"has arch {arch!r:.100}, which is not the name of a model file")
    spec = importlib.util.find_spec(arch)
    if spec is None or spec.origin is None or Path(spec.origin).parent.resolve() != HERE:
        raise UserError(f"{path} needs {arch}.py, which is not here; put that model file beside train.py")
    module = importlib.import_module(arch)
    if not (hasattr(module, "Model") and hasattr(module, "Config")):
        raise UserError(f"{path} has arch {arch!r}, but {arch}.py has no Model and Config; use the one that trained it")
    return module


def _build(module, config, tensors, limit, hollow=False):
    """module.Model(config), stopped as soon as its parameters hold more than `limit` numbers.

    A config of a few bytes can ask for terabytes. A parameter is registered before its values are drawn, while its
    memory is reserved but not in use yet, so stopping there costs nothing. For the same reason a `hollow` model costs
    nothing: its parameters go to torch's meta device as they are registered. Its buffers, which no file may hold, are
    real.
    """
    sizes = []  # numbers in each parameter so far

    def check(_, name, parameter):
        sizes.append(0 if parameter is None else parameter.numel())
        # also by their count, since a billion tiny layers would take forever
        if len(sizes) > 4 * len(tensors) + 64 or sum(sizes) > limit:
            raise ValueError("the config asks for more than the file holds")
        if hollow and parameter is not None and not parameter.is_meta:  # it is registered again where it is tied
            return torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        return None

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(check)
    try:
        return module.Model(config)
    finally:
        hook.remove()


@torch.no_grad()
def _fill(model, tensors):
    """Copy `tensors` into a model, or put them into the parameters of a hollow one."""
    for name, own in model.state_dict(keep_vars=True).items():
        if name not in tensors:  # tied, and stored under its other name
            continue
        tensor = tensors[name]
        if not own.is_meta:
            own.copy_(tensor)
            continue
        tensor = tensor.to(own.dtype)
        if tensor.data_ptr() % 64:  # as torch aligns its own: some kernels add in another order elsewhere
            tensor = tensor.clone()
        # the same object, which other modules may hold as well, gets the tensor's memory
        torch.utils.swap_tensors(own, torch.nn.Parameter(tensor, own.requires_grad))


def _check_fit(model, tensors):
    """ValueError unless `tensors` are all that the model stores, in its shapes."""
    expected = model.state_dict(keep_vars=True)
    # tied weights are one tensor with two names, and stored under one of them
    held = {id(tensor) for name, tensor in expected.items() if name in tensors}
    problems = []
    for name, tensor in expected.items():
        if name not in tensors and id(tensor) not in held:
            problems.append(f"{name} is missing")
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"{name} is unknown")
        elif tensor.shape != expected[name].shape:
            problems.append(f"{name} is {list(tensor.shape)}, should be {list(expected[name].shape)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError("tensor " + ", ".join(problems[:3]) + more)
    if sum(tensor.numel() * tensor.element_size() for tensor in model.buffers()) > TABLE_LIMIT:
        raise ValueError(f"its tables take over {TABLE_LIMIT:,} bytes")


# ---- random states
def random_state():
    """State of torch's random generators (CPU and each CUDA device) as {"random.NAME": uint8 tensor}."""
    tensors = {"random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for device, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random.cuda.{device}"] = state
    return tensors


def set_random_state(tensors, path="the checkpoint"):
    """Go back to a random_state() that was read at `path`. Other keys are ignored; UserError if one is missing or has
    the wrong length.

    Older checkpoints also hold the states of Python's and numpy's generators, from which training draws nothing.
    """
    for name in ["random.torch", *(name for name in tensors if name.startswith("random.cuda."))]:
        try:
            if name == "random.torch":
                torch.set_rng_state(tensors[name])
                continue
            device = int(name.removeprefix("random.cuda."))
            if device < torch.cuda.device_count():
                torch.cuda.set_rng_state(tensors[name], device)
            else:
                warn(f"{name} was saved, but this machine has no such device: the run continues, but not bit for bit")
        except Exception as error:  # each generator raises its own
            raise UserError(f"{path}: {name} is missing or damaged ({short(error)}); use another one") from error
