"""lm-evaluation-harness on a checkpoint: a task that needs no network, and a stub where the package is missing."""
import importlib
import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from types import ModuleType, SimpleNamespace

import pytest
import tokenizers
import torch
from conftest import ROOT

import model
from evaluate import Config
from tasks.speaker import Floor, Speaker
from thimble import checkpoint
from thimble.files import UserError
from thimble.tokenizer import byte_tokenizer

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason="needs pip install lm_eval")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    m = model.Model(model.Config(n_layer=1, n_head=2, n_embd=16, vocab_size=257, block_size=32))
    with torch.no_grad():
        for p in m.parameters():
            p += 0.3 * torch.randn_like(p)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_json())
    checkpoint.save(folder, 0, m.state_dict(), None, {"arch": "model", "model_config": asdict(m.config)},
                    folder / "tokenizer.json", best=True)
    return folder


@pytest.fixture(scope="module")
def speaker(run_folder):
    return Speaker(run_folder, Config())


@pytest.fixture
def suite():
    return importlib.import_module("tasks.lm_eval")


@pytest.fixture
def stubbed(monkeypatch):
    """tasks.lm_eval on a harness that knows one task, "pets", and only asks for the log p of one continuation."""
    def simple_evaluate(adapter, tasks, task_manager, limit):
        (logp, is_greedy), = adapter._loglikelihood_tokens([(None, adapter.tok_encode("A pet:"),
                                                             adapter.tok_encode(" cat"))])
        return {"results": {"pets": {"alias": "pets", "sample_len": 1, "logp,none": logp, "logp_stderr,none": "N/A",
                                     "acc,none": 1.0 * is_greedy, "acc_stderr,none": 0.25, "acc,strict": math.nan,
                                     "perplexity,loose": 7.5}},
                "groups": {"animals": {"acc,none": 0.5}}, "n-samples": {"pets": {"original": 9, "effective": 1}}}

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks")}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.api.model"].TemplateLM = object
    modules["lm_eval.tasks"].TaskManager = lambda include_path: SimpleNamespace(all_tasks=["pets"])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop("tasks.lm_eval", None)
    yield importlib.import_module("tasks.lm_eval")
    del sys.modules["tasks.lm_eval"]


def test_results_of_a_stub(stubbed, speaker):
    found = stubbed.run(speaker, Config(suite="lm_eval", tasks=("pets",)))
    prompt, said = b"A pet:", b" cat"
    with torch.no_grad():
        logp = speaker.model(torch.tensor([[*prompt, *said]]))[0][0].log_softmax(-1)
    expected = sum(logp[len(prompt) - 1 + i, byte].item() for i, byte in enumerate(said))
    assert found["pets logp"] == (pytest.approx(expected), 0.0, 1)
    assert found["pets acc"][1:] == (0.25, 1) and found["pets perplexity (loose)"] == (7.5, 0.0, 1)
    assert found["animals acc"] == (0.5, 0.0, 0) and "pets acc (strict)" not in found
    assert stubbed.run(Floor("empty", lambda prompt, n: ""), Config(suite="lm_eval", tasks=("pets",))) == {}
    with pytest.raises(UserError, match="--tasks=plants"):
        stubbed.run(speaker, Config(suite="lm_eval", tasks=("plants",)))


def test_a_stub_is_asked_behind_bos(stubbed, tmp_path):
    """Where the model knows texts with bos in front, each context begins with it, once; a text without one, too."""
    words = byte_tokenizer()
    hf = words.hf
    hf.add_special_tokens(["<s>"])
    hf.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 257)])
    (tmp_path / "tokenizer.json").write_text(hf.to_str())
    torch.manual_seed(1)
    m = model.Model(model.Config(n_layer=1, n_head=2, n_embd=16, vocab_size=258, block_size=32))
    with torch.no_grad():
        for p in m.parameters():
            p += 0.3 * torch.randn_like(p)
    checkpoint.save(tmp_path, 0, m.state_dict(), None, {"arch": "model", "model_config": asdict(m.config)},
                    tmp_path / "tokenizer.json", best=True)
    adapter = stubbed.Adapter.__new__(stubbed.Adapter)
    adapter.speaker = Speaker(tmp_path, Config())
    assert adapter.prefix_token_id == 257 and adapter.tok_encode("ab") == [97, 98]
    said = [97, 98]
    for context in ([120, 121], [257, 120, 121], [257], []):
        (logp, _), = adapter._loglikelihood_tokens([(None, list(context), said)])
        ids = [257, *(i for i in context if i != 257), *said]
        with torch.no_grad():
            table = m(torch.tensor([ids[:-1]]))[0][0].log_softmax(-1)
        assert logp == pytest.approx(sum(table[-2 + i, said[i]].item() for i in range(2)), rel=1e-5)


def test_rolling_and_greedy_of_a_stub(stubbed, speaker):
    adapter, text = stubbed.Adapter.__new__(stubbed.Adapter), "To be, or not to be, that is the question here."
    adapter.speaker, adapter.max_new_tokens = speaker, 9
    rolling, = adapter.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert -rolling == pytest.approx(float(speaker.text_nats(text)[0].sum()))
    requests = [SimpleNamespace(args=("To be", options)) for options in (
        {"until": ["\n"], "max_gen_toks": 5}, {"until": "\n"}, {})]
    assert adapter.generate_until(requests) == [speaker.complete("To be", 5, ("\n",)),
                                                speaker.complete("To be", 9, ("\n",)), speaker.complete("To be", 9)]


def test_what_stands_before_a_text_without_context(stubbed, speaker):
    """The ids that the harness asks for, and bos in front of each context where the tokenizer adds it."""
    adapter = stubbed.Adapter.__new__(stubbed.Adapter)
    words = byte_tokenizer()
    adapter.speaker = SimpleNamespace(tokenizer=words, model=speaker.model)
    assert adapter.eot_token_id == adapter.prefix_token_id == words.eot == 256
    words.record = replace(words.record, adds_bos=True, bos=7)
    assert (adapter.eot_token_id, adapter.prefix_token_id) == (256, 7)
    asked = [([65, 66], [67, 68]), ([7, 65, 66], [67, 68]), ([], [67])]
    for context, said in asked:
        ids = [7, *context] if context[:1] != [7] else context
        with torch.no_grad():
            logp = speaker.model(torch.tensor([ids + said]))[0][0].log_softmax(-1)
        total = sum(logp[len(ids) - 1 + i, token].item() for i, token in enumerate(said))
        best = [int(logp[len(ids) - 1 + i].argmax()) == token for i, token in enumerate(said)]
        (found, greedy), = adapter._loglikelihood_tokens([(None, context, said)])
        assert found == pytest.approx(total, rel=1e-5) and greedy == all(best)


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_a_missing_package_is_named(run_folder):
    out = subprocess.run([sys.executable, ROOT / "evaluate.py", f"--checkpoint={run_folder}", "--suite=lm_eval",
                          "--tasks=pets"], capture_output=True, text=True)
    assert out.returncode == 1 and "pip install lm_eval" in out.stderr and len(out.stderr.splitlines()) == 1


@needs_lm_eval
def test_a_task_gives_what_the_model_says(suite, speaker, tmp_path, monkeypatch):
    """Choices of an offline task: its accuracy is that of the sums of log p, worked out here token by token."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    questions = [{"q": q, "choices": ["cat", "dog", "hen house"], "answer": i % 3} for i, q in enumerate(
        ["A pet:", "It barks:", "Where eggs are:", "It purrs, and sleeps all day long on a mat:", "x", "y"])]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "pets.yaml").write_text(
        f"task: pets\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path}/q.jsonl}}\n"
        f"  cache_dir: {tmp_path}/cache\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n")
    found = suite.run(speaker, Config(suite="lm_eval", tasks=("pets",), include=str(tmp_path)))
    right = 0
    for record in questions:
        sums = []
        for choice in record["choices"]:
            asked, said = record["q"].encode(), b" " + choice.encode()
            ids = torch.tensor([[*asked, *said][-33:]])
            with torch.no_grad():
                logp = speaker.model(ids[:, :-1])[0][0].log_softmax(-1)
            sums.append(sum(logp[-k, ids[0, -k]].item() for k in range(1, len(said) + 1)))
        right += sums.index(max(sums)) == record["answer"]
    assert found["pets acc"][0] == pytest.approx(right / len(questions)) and found["pets acc"][2] == len(questions)


@needs_lm_eval
def test_rolling_and_greedy(suite, speaker):
    from lm_eval.api.instance import Instance

    lm, text = suite.Adapter(speaker), "To be, or not to be, that is the question here."
    rolling, = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert -rolling / len(text) / math.log(2) == pytest.approx(
        speaker.text_nats(text)[0].sum() / len(text) / math.log(2))
    written, = lm.generate_until([Instance("generate_until", {}, ("To be", {"until": ["\n"], "max_gen_toks": 5}), 0)])
    assert written == speaker.complete("To be", 5, ("\n",))
    if written:
        (_, greedy), = lm._loglikelihood_tokens([(None, lm.tok_encode("To be"), lm.tok_encode(written)[:1])])
        assert greedy
