"""Any checkpoint under the tasks of EleutherAI's lm-evaluation-harness: pip install lm_eval

    python harness.py --tasks=lambada_openai,arc_easy
    python harness.py --tasks=my_task --include=my_tasks --checkpoint=runs/tiny_cpu --limit=100

Its tasks fetch their data from the network, unless a task file of your own under --include names a local one.
"""
from dataclasses import dataclass

import numpy as np
import torch

import evaluate
from thimble import configurator
from thimble.files import UserError

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError as e:
    raise SystemExit(f"error: harness.py needs a package ({e}): pip install lm_eval") from None


@dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = ()     # names of tasks, divided by commas
    include: str = ""               # folder with task files of your own
    checkpoint: str = ""            # run or checkpoint folder; empty: the newest run
    limit: int = 0                  # questions of each task; 0: all
    max_new_tokens: int = 256       # length of an answer where the task names none
    device: str = "cpu"             # cpu, cuda, mps, ...

    def __post_init__(self):
        if not self.tasks or self.limit < 0 or self.max_new_tokens < 1:
            raise ValueError(f"give --tasks=NAME,... (have {self.tasks}), limit={self.limit} must not be negative, "
                             f"max_new_tokens={self.max_new_tokens} at least 1")


class Harness(TemplateLM):
    def __init__(self, speaker, max_new_tokens=256):
        super().__init__()
        self.speaker, self.max_new_tokens = speaker, max_new_tokens

    @property
    def eot_token_id(self):
        return self.speaker.tokenizer.eot

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.speaker.tokenizer.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, **_):
        """[(sum of log p of the continuation, whether greedy decoding would write it)]; the end is kept if too long."""
        model, out = self.speaker.model, []
        for _, context, continuation in requests:
            ids = (context + continuation)[-model.config.block_size - 1:]
            n = min(len(continuation), len(ids) - 1)
            logp = model(torch.tensor([ids[:-1]], device=self.speaker.cfg.device))[0][0, -n:].log_softmax(-1)  # (n, V)
            targets = torch.tensor(ids[-n:], device=logp.device)
            total = logp.gather(1, targets[:, None]).double().sum().item()
            out.append((total, bool((logp.argmax(-1) == targets).all())))
        return out

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [-float(np.sum(self.speaker.text_nats(request.args[0])[0])) for request in requests]

    def generate_until(self, requests, disable_tqdm=False):
        answers = []
        for prompt, options in (request.args for request in requests):
            until = options.get("until") or ()
            answers.append(self.speaker.complete(prompt, options.get("max_gen_toks", self.max_new_tokens),
                                                 (until,) if isinstance(until, str) else tuple(until)))
        return answers                                     # greedy, whatever temperature a task asks for


def main(cfg):
    tasks = TaskManager(include_path=cfg.include or None)
    if unknown := [name for name in cfg.tasks if name not in tasks.all_tasks]:
        raise UserError(f"no task {', '.join(unknown)}: see lm-eval ls tasks, or name the folder of your own --include")
    speaker = evaluate.Speaker(cfg.checkpoint, evaluate.Config(device=cfg.device))
    print(make_table(simple_evaluate(Harness(speaker, cfg.max_new_tokens), tasks=list(cfg.tasks), task_manager=tasks,
                                     limit=cfg.limit or None)))


if __name__ == "__main__":
    configurator.run(main, Config)
