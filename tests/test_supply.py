"""What is installed is what was pinned: the lock files, the imports, the network."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {"requirements.txt": "requirements.lock", "requirements-test.txt": "requirements-test.lock"}


def pins(name):
    """{package: version} of a requirements file, with the files that it includes."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("-r "):
            found |= pins(line[3:])
        elif line and not line.startswith("#"):
            package, version = line.split("==")
            found[package.split("[")[0]] = version
    return found


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
    for package, version in pins(name).items():
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
