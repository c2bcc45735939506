"""Runs the tests of docs/reliability.md at their full counts, row by row, and writes that page.

    python bench/reliability.py                        # all 49 rows
    python bench/reliability.py --rows=A1,B            # some: a row or a whole group; the others keep their results
    python -m pytest --full -m "" --score=A1           # one row, with pytest's own output

A row is what the tests marked @pytest.mark.score(row) do: the suite runs them with a small count, `--full` with that
of the page. What was measured is kept in a JSON file beside the page, each row with its date, machine and commit.
"""
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from thimble import configurator, files, runlog

GROUPS = {"A": "Training", "B": "Files", "C": "Sandbox", "D": "Server", "E": "Numbers", "F": "Supply chain"}

# row: (what is tested, what has to hold)
ROWS = {
    "A1": ("a run killed 100 times, 30 of them inside a save, with dropout and two micro-batches",
           "every run ends with the weights, moments, random state and log of one that was never killed"),
    "A2": ("a process that dies at each call of a save that changes the disk",
           "the run resumes, at most one save behind"),
    "A3": ("order of the calls in ten saves of a run",
           "files are flushed before their folder is renamed, that before its parent is flushed, pointers last"),
    "A4": ("resuming with each of 32 combinations of optimizer, precision, dropout, micro-batches, threads",
           "the same bits"),
    "A5": ("resuming at each of 20 steps, among them three ends of an epoch", "the same windows in the same order"),
    "A6": ("SIGTERM, SIGINT, SIGHUP and SIGUSR1, once and twice, also inside a save",
           "a whole checkpoint, exit code 128 + signal, not more than a step late"),
    "A7": ("NaN and Inf in loss, gradient, weight, moment and evaluation",
           "no such update is made; no such state becomes latest or best"),
    "A8": ("poisoned batches at three places of a run of 400 steps",
           "it goes back and passes over them, ends within 1 % of a clean run, and repeats to the bit"),
    "A9": ("a disk that is full, at each of 8 places of a save; another one that is; one passing error",
           "the last checkpoint loads, the message gives the bytes, one retry"),
    "A10": ("a folder that may not be written, a file or a link in its place, a name that is taken",
            "one clear line and a failing exit code"),
    "A11": ("the newest checkpoint damaged in 52 ways",
            "each is noticed and the one before is used; if all are damaged, an error"),
    "A12": ("10,000 random histories of saves, evaluations, NaN, crashes and resumptions",
            "the best is never deleted, one whole checkpoint always there, no half one counted"),
    "A13": ("200 random schedules, each with one to five resumptions",
            "each step's rate is that of the formula, and the last step is max_steps"),
    "A14": ("resuming with another config, dataset, vocabulary, number of threads or version of torch, 10 cases",
            "an error, or a warning that names the difference"),
    "A15": ("the same run five times, with other hash seeds of Python", "the same bits"),
    "A16": ("a script of prepare/ killed 20 times; ids that do not fit; web pages for text; val text inside train",
            "no half dataset loads; everything is reported"),
    "A17": ("a search whose workers are killed ten times", "no finished trial is lost, each broken one is run again"),
    "B1": ("1,000 or more broken files, 42 kinds and their mutations, each loaded by a process of 2 GB and 5 s",
           "one error that names file and reason; no signal, hang or traceback; nothing accepted"),
    "B2": ("20,000 random mutations for each loader", "no other kind of error"),
    "B3": ("what a load executes: audit hooks, and a search of the code for pickle", "nothing"),
    "B4": ("12 sabotaged exports", "all are refused"),
    "B5": ("12 attacks by paths, on reading and on writing", "all are refused"),
    "B6": ("umask, links, saving over the source, a kill during an export", "permissions follow the umask, data stays"),
    "C1": ("30 hostile programs in the sandbox", "none gets out"),
    "C2": ("10 ways to cheat on each of the 164 problems of HumanEval", "none of 1,640 passes"),
    "C3": ("the reference solutions, three times idle and three times beside a busy process; empty answers",
           "984 of 984 pass, 0 of 164 empty ones"),
    "C4": ("bombs: processes, threads, memory, time, output, disk, recursion",
           "over within the limit and a second, at most 32 MB here, no process left"),
    "C5": ("the same programs as root and as another user", "the same results"),
    "C6": ("a kernel without namespaces or Landlock", "it refuses, and names what is missing"),
    "C7": ("cost of the sandbox", "at most 25 ms more than bare Python; 164 problems in 15 s on two workers"),
    "D1": ("100 clients with 2,000 requests", "each is answered in full or with 429 at once, none is cut"),
    "D2": ("twice the load that the server can carry, for 60 s",
           "at least 90 % of its capacity goes on; first tokens come within the bound of the queue"),
    "D3": ("100 clients that hang up", "the place is free within 0.5 s"),
    "D4": ("400 slow or idle connections", "others are served, the slow ones closed within 12 s"),
    "D5": ("80 hostile requests", "80 errors of the client in JSON, no error of the server, at most 50 MB more"),
    "D6": ("each route without, with a wrong and with the right key; Host, Origin, 20 payloads in pages and logs",
           "nothing leaks"),
    "D7": ("SIGTERM under 8 streams, 20 times; SIGKILL and a restart", "a clean end within 10 s, the port free again"),
    "D8": ("the official client: 200 prompts streamed and not", "the same text; usage, errors, end as documented"),
    "D9": ("1,000 identical requests at temperature 0 among others", "one answer; memory and files do not grow"),
    "E1": ("each operation and the whole model against a float64 reference, 500 random shapes",
           "at most twice the error of plain PyTorch; where one model exceeds it, in the mean of 40 beside it"),
    "E2": ("numerical gradients of each operation of ours and of 50 weights of the model", "equal in float64"),
    "E3": ("losses written down earlier, of 100 steps here and 10 anywhere", "the same bits here, 1e-5 anywhere"),
    "E4": ("causality, order of the batch, cache, first loss, learning one batch by heart", "as they must be"),
    "E5": ("Hugging Face, ONNX and GGUF against the model: 3 configs, 50 prompts of 64 greedy tokens",
           "logits within 1e-4, the same tokens"),
    "E6": ("sampler and pass@k against brute force", "equal"),
    "E7": ("10,000 random Unicode strings through each tokenizer and back", "the same strings"),
    "F1": ("a clean installation from wheels by their hashes; known vulnerabilities", "it works, none is known"),
    "F2": ("the suite without a network", "it passes"),
    "F3": ("what train.py and serve.py import", "at most three packages, no web framework, no .pth file with code"),
}

HEAD = """# Reliability

{tried} of {all} tests were tried, {holds} of them hold{exceptions}. `python bench/reliability.py` runs them and writes
this page; the suite runs the same tests with smaller counts.

Loss of power is not tested: SIGKILL never loses what is in the kernel's page cache. That a checkpoint is on the disk
rests on the order of the calls alone (A3). Equal bits are meant for one version of torch, one number of threads and one
kind of CPU. No GPU was used.

Measured:"""


@dataclass(frozen=True)
class Config:
    rows: tuple[str, ...] = ()      # rows or groups (A1,B); empty: all
    out: str = "docs/reliability.md"  # the page; what was measured goes to a JSON file of that name
    limit: float = 1800.0           # seconds a row may take

    def __post_init__(self):
        configurator.check(self, positive=("limit",))
        for name in self.rows:
            if name not in ROWS and name not in GROUPS:
                raise ValueError(f"rows={name}: there are the rows {', '.join(ROWS)} and the groups A to F")


# ---- running a row
def run_row(row, limit):
    """Run the tests of one row -> its result, as it goes into the JSON file."""
    # not all files: importing them takes longer than most rows
    paths = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if f'score("{row}")' in path.read_text()]
    if not paths:
        return result("not tried")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *paths, "-q", "--full", "-m", "", f"--score={row}",
                   f"--junitxml={report}", "-o", "junit_family=xunit1"]  # the format that holds properties
        # a session of its own, so that the limit also ends what the tests have started
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   start_new_session=True)
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return result("does not hold", figures=f"not done after {limit:g} s")
        if not report.exists():
            return result("does not hold", figures=f"pytest: {files.short(output[-300:])}")
        return judge(ElementTree.parse(report).iter("testcase"))


def result(verdict, held=0, tried=0, figures=""):
    return {"verdict": verdict, "held": held, "tried": tried, "figures": figures}


def judge(cases):
    """The result of a row from its <testcase> elements. A test that reports no counts itself counts as one try."""
    held = 0
    tried = 0
    failed = False
    figures = []
    skipped = []
    for case in cases:
        skip = case.find("skipped")
        if skip is not None and skip.get("type") == "pytest.skip":
            skipped.append(skip.get("message"))
            continue
        broken = any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))  # a skip left here is xfail
        failed = failed or broken
        properties = {p.get("name"): p.get("value") for p in case.iter("property")}
        held += int(properties.get("held", 0 if broken else 1))
        tried += int(properties.get("tried", 1))
        figures.append(properties.get("figures", ""))
        if broken:
            figures.append(f"failed: {case.get('name')}")
    figures += [f"skipped: {reason}" for reason in dict.fromkeys(skipped)]
    figures = "; ".join(text for text in figures if text)
    if tried == 0 and not failed:
        return result("not tried", figures=figures)
    holds = held == tried and not failed
    return result("holds" if holds else "does not hold", held, tried, figures)


def here():
    """What the results depend on: date, commit, machine, versions."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    release = platform.release().partition("-")[0]  # without the distribution's own suffix
    return {"date": str(datetime.date.today()), "commit": runlog.git_commit(),
            "machine": f"{os.cpu_count()} cores of {cpu}, {platform.system()} {release}",
            "versions": f"Python {platform.python_version()}, torch {version('torch')}"}


# ---- the page
def page(results):
    """The text of docs/reliability.md from {row: result}."""
    holding = [row for row in ROWS if results[row]["verdict"] == "holds"]
    failing = [row for row in ROWS if results[row]["verdict"] == "does not hold"]
    exceptions = f" (not {', '.join(failing)})" if failing else ""
    places = {}  # {where and when: its rows}
    for row, entry in results.items():
        if entry["verdict"] != "not tried":
            place = f"{entry['date']}, commit {entry['commit']}, {entry['machine']}, {entry['versions']}"
            places.setdefault(place, []).append(row)
    lines = [HEAD.format(all=len(ROWS), tried=len(holding) + len(failing), holds=len(holding), exceptions=exceptions)]
    lines += [""] + [f"- {', '.join(rows)}: {place}" for place, rows in places.items()]
    for group, title in GROUPS.items():
        lines += ["", f"## {title}", "", "| | what is tested | what has to hold | held / tried | seconds | verdict |",
                  "|---|---|---|---|---|---|"]
        for row, (what, criterion) in ROWS.items():
            if row[0] != group:
                continue
            entry = results[row]
            count = ""
            seconds = ""
            if entry["verdict"] != "not tried":
                count = f"{entry['held']:,} / {entry['tried']:,}"
                seconds = f"{entry['seconds']:.0f}"
            verdict = f"**{entry['verdict']}**" if entry["verdict"] == "does not hold" else entry["verdict"]
            if entry["figures"]:
                verdict += ": " + entry["figures"].replace("|", "/").replace("\n", " ")
            lines.append(f"| {row} | {what} | {criterion} | {count} | {seconds} | {verdict} |")
    return "\n".join(lines) + "\n"


def main(cfg):
    out = ROOT / cfg.out
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = out.with_suffix(".json")
    results = {row: result("not tried") | {"seconds": 0} for row in ROWS}
    if kept.exists():
        results |= json.loads(kept.read_text())
    place = here()
    for row in ROWS:
        if cfg.rows and row not in cfg.rows and row[0] not in cfg.rows:
            continue
        start = time.perf_counter()
        results[row] = run_row(row, cfg.limit) | {"seconds": round(time.perf_counter() - start, 1)} | place
        entry = results[row]
        print(f"{row:<4} {entry['held']:>6,} / {entry['tried']:<6,} {entry['seconds']:7.1f} s  {entry['verdict']}  "
              f"{entry['figures']}", flush=True)
        # after each row: a long run that is stopped keeps what it has measured
        files.write_atomic(kept, json.dumps(results, indent=1) + "\n")
        files.write_atomic(out, page(results))


if __name__ == "__main__":
    configurator.run(main, Config)
