"""Where code that is not ours comes in: what the commands import, and what runs at every start of Python."""
import json
import os
import re
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
