"""lm_eval: any task of EleutherAI's lm-evaluation-harness, named by --tasks. Needs pip install lm_eval.

Its tasks download their data, unless a task file of your own in the folder --include names a local one. `evaluate.py`
imports this file only for --suite=lm_eval.
"""
import math
import numbers

import torch

from tasks.speaker import Speaker
from thimble.files import UserError

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError as e:
    raise UserError(f"--suite=lm_eval needs a package ({e}): pip install lm_eval") from None


class Adapter(TemplateLM):
    """A Speaker as the harness wants it. Everything is greedy, whatever temperature a task asks for."""

    def __init__(self, speaker, max_new_tokens=256):
        super().__init__()
        self.speaker = speaker
        self.max_new_tokens = max_new_tokens  # for tasks that set no limit

    @property
    def eot_token_id(self):
        return self.speaker.tokenizer.eot

    @property
    def prefix_token_id(self):
        """Stands before a continuation that has no context."""
        return self.speaker.tokenizer.encode_prompt("")[0]

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.speaker.tokenizer.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, **_):
        """[(log p of the continuation, whether greedy decoding would write it)]; too long a context loses its start."""
        model = self.speaker.model
        device = next(model.parameters()).device
        record = self.speaker.tokenizer.record
        found = []
        for _, context, continuation in requests:
            if record.adds_bos and context[:1] != [record.bos]:
                context = [record.bos, *context]
            # one more id than fits: the last one is only a target
            ids = (context + continuation)[-model.config.block_size - 1:]
            n = min(len(continuation), len(ids) - 1)  # the first id of all has nothing to be predicted from
            logits, _ = model(torch.tensor([ids[:-1]], device=device))
            logp = logits[0, -n:].log_softmax(-1)          # (n, V)
            targets = torch.tensor(ids[-n:], device=device)
            total = logp.gather(1, targets[:, None]).double().sum().item()
            is_greedy = bool((logp.argmax(-1) == targets).all())
            found.append((total, is_greedy))
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        totals = []
        for request in requests:
            sums, _ = self.speaker.text_nats(request.args[0])
            totals.append(-float(sums.sum()))  # nats are -log p
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        answers = []
        for request in requests:
            prompt, options = request.args
            stops = options.get("until") or ()
            if isinstance(stops, str):
                stops = (stops,)
            max_new_tokens = options.get("max_gen_toks", self.max_new_tokens)
            answers.append(self.speaker.complete(prompt, max_new_tokens, tuple(stops)))
        return answers


def run(speaker, cfg):
    """The metrics of each task, as the harness computes them, under "TASK METRIC"."""
    if not isinstance(speaker, Speaker):  # the other floors have no probabilities
        return {}
    tasks = TaskManager(include_path=cfg.include or None)
    unknown = [name for name in cfg.tasks if name not in tasks.all_tasks]
    if unknown:
        raise UserError(f"--tasks={','.join(unknown)}: lm_eval has no such task: `lm_eval ls tasks` lists them, and "
                        "--include names the folder of your own")
    adapter = Adapter(speaker, cfg.max_new_tokens)
    results = simple_evaluate(adapter, tasks=list(cfg.tasks), task_manager=tasks, limit=cfg.limit or None)
    return metrics(results)


def metrics(results):
    """The harness's results -> {"TASK METRIC": (value, standard error, n)}, for its tasks and groups of tasks.

    It keeps them as {task: {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ..., ...}}; what follows the comma is the
    filter that the answers went through. An error that it does not work out ("N/A") is 0 here.
    """
    found = {}
    for task, entries in {**results["results"], **results.get("groups", {})}.items():
        n = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in entries.items():
            metric, comma, answer_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not is_number(value):
                continue
            name = f"{task} {metric}"
            if answer_filter != "none":
                name += f" ({answer_filter})"
            error = entries.get(f"{metric}_stderr,{answer_filter}")
            found[name] = (float(value), float(error) if is_number(error) else 0.0, n)
    return found


def is_number(value):
    return isinstance(value, numbers.Real) and math.isfinite(value)
