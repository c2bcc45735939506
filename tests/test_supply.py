"""Where code that is not ours comes in: what is installed, what the commands import, what runs at every start."""
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT

# In a child: import the commands, and print what the files of this project import for each from outside of it.
CHILD = """
import builtins, json, os, sys
root = os.getcwd() + os.sep
own = {name.removesuffix(".py") for name in os.listdir(root)}
found = set()
real = builtins.__import__

def watched(name, globals=None, locals=None, fromlist=(), level=0):
    if str((globals or {}).get("__file__", "")).startswith(root) and level == 0:
        found.add(name.partition(".")[0])
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = watched
for command in sys.argv[1:]:  # each with what those before it have imported
    real(command)
    print(json.dumps(sorted(found - own - set(sys.stdlib_module_names))))
"""
LOCKS = {"requirements.txt": "requirements.lock", "requirements-test.txt": "requirements-test.lock"}
KNOWN_PTH = {"distutils-precedence.pth", "_virtualenv.pth"}  # of setuptools and of virtualenv


@pytest.fixture(scope="module")
def imports():
    """{command: packages}; the server's with those of train.py."""
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    commands = ["train", "serve"]
    done = subprocess.run([sys.executable, "-c", CHILD, *commands], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    return dict(zip(commands, map(json.loads, done.stdout.splitlines()), strict=True))


def pinned(file):
    """{package: version} of a requirements file and of those that it includes."""
    found = {}
    for line in (ROOT / file).read_text().splitlines():
        if line.startswith("-r "):
            found |= pinned(line.removeprefix("-r ").strip())
        match = re.match(r"([A-Za-z0-9_.-]+)(?:\[.*\])?==([0-9.]+)", line)
        if match:
            found[match[1].lower()] = match[2]
    return found


@pytest.mark.score("F3")
def test_training_imports_three_packages(imports, score):
    found = imports["train"]
    score(1 if len(found) <= 3 else 0, 1, f"train.py: {', '.join(found)}")
    assert set(found) <= pinned("requirements.txt").keys() and len(found) <= 3, found


@pytest.mark.score("F3")
def test_the_server_imports_pinned_packages_only(imports, score):
    found = imports["serve"]
    names = {"pydantic_core": "pydantic", "h11": "uvicorn"}  # which pin these themselves, or are made of them
    held = [name for name in found if names.get(name, name) in pinned("requirements-serve.txt")]
    score(len(held), len(found), f"serve.py: {', '.join(found)}")
    assert held == found and "starlette" in found


@pytest.mark.score("F3")
def test_no_package_runs_code_at_every_start(score):
    """A .pth file with an import in it runs whenever Python starts: so stole LiteLLM 1.82.7 what it could find."""
    folders = {*site.getsitepackages(), sysconfig.get_paths()["purelib"]}
    files = [file for folder in folders for file in Path(folder).glob("*.pth")]
    bad = [str(file) for file in files if file.name not in KNOWN_PTH and runs_code(file.read_text())]
    bad += [name for name in ("sitecustomize", "usercustomize") if name in sys.modules]
    score(len(files) - len(bad), len(files), f".pth files: {', '.join(file.name for file in files) or 'none'}")
    assert not bad, bad


def runs_code(text):
    return any(re.match(r"import[ \t]", line) for line in text.splitlines())


def test_the_check_notices_code():
    assert runs_code("/usr/lib/x\nimport os; os.system('x')\n") and not runs_code("/usr/lib/x\n# import\n")


# ---- the lock files, the network
def locked(name):
    """{package: [(version, number of hashes), ...]} of a lock file; two versions stand for two Pythons."""
    found = {}
    text = re.sub(r"^ *#.*$", "", (ROOT / name).read_text(), flags=re.M)
    for entry in re.split(r"\n(?=[a-z])", text.strip()):
        package, version = re.match(r"([a-z0-9.-]+)(?:\[\w+\])?==(\S+)", entry).groups()
        found.setdefault(package, []).append((version, len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry))))
    return found


def number(pattern, text):
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("name, lock", LOCKS.items())
def test_lock_holds_every_pin_with_hashes(name, lock):
    found = locked(lock)
    assert "torch" not in found
    for package, version in pinned(name).items():
        if package != "torch":
            assert [v for v, _ in found[package]] == [version], f"{name} says {package}=={version}: write {lock} again"
    assert all(hashes for versions in found.values() for _, hashes in versions)
    assert "://" not in (ROOT / lock).read_text()  # whose mirror it is written on is nobody's business


def test_locks_agree():
    core = locked("requirements.lock")
    tests = locked("requirements-test.lock")
    assert all(tests[package] == versions for package, versions in core.items())


@pytest.mark.score("F1")
def test_clean_install_with_hashes(tmp_path, count, score):
    """The README's two installs in fresh environments, then pip-audit over what they pinned."""
    if not count(0, 1):
        pytest.skip("takes minutes: runs with --full")
    installed = 0
    for name, lock in LOCKS.items():
        pip = [tmp_path / lock / "bin" / "python", "-m", "pip"]
        subprocess.run([sys.executable, "-m", "venv", tmp_path / lock], check=True)
        subprocess.run([*pip, "install", "-q", "--only-binary=:all:", "--no-deps", "-r", ROOT / lock], check=True)
        subprocess.run([*pip, "install", "-q", "-r", ROOT / name], check=True)
        installed += subprocess.run([*pip, "check"]).returncode == 0
    subprocess.run([*pip, "install", "-q", "pip-audit"], check=True)
    command = [pip[0], "-m", "pip_audit", "--disable-pip", "-r", ROOT / lock]
    audit = subprocess.run(command, capture_output=True, text=True)
    packages = len(locked(lock))
    audited = packages - len(re.findall("could not be audited", audit.stdout))
    found = number(r"Found (\d+) known vulnerabilit", audit.stderr)
    score(installed, len(LOCKS), f"pip-audit reached {audited} of {packages} packages, {found} known vulnerabilities")
    assert installed == len(LOCKS)
    assert found == 0, audit.stdout


@pytest.mark.score("F2")
def test_suite_without_a_network(count, score):
    """The quick suite in a network namespace that holds nothing but the loopback."""
    if not count(0, 1):
        pytest.skip("takes as long as the suite: runs with --full")
    if not shutil.which("ip") or subprocess.run(["unshare", "-rn", "true"]).returncode:
        pytest.skip("needs unshare and ip")
    inside = f"ip link set lo up && exec {sys.executable} -m pytest -q --deselect tests/test_supply.py"
    ran = subprocess.run(["unshare", "-rn", "sh", "-c", inside], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    summary = ran.stdout.strip().splitlines()[-1]
    passed = number(r"(\d+) passed", summary)
    failed = number(r"(\d+) failed", summary) + number(r"(\d+) error", summary)
    score(passed, passed + failed, summary.strip("= "))
    assert ran.returncode == 0, ran.stdout[-3000:]
