"""lm-evaluation-harness on a checkpoint, with a task that needs no network."""
import json
import math
from dataclasses import asdict

import pytest
import torch

import evaluate
import model
from thimble import checkpoint
from thimble.tokenizer import byte_tokenizer

pytest.importorskip("lm_eval", reason="needs pip install lm_eval")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    m = model.Model(model.Config(n_layer=1, n_head=2, n_embd=16, vocab_size=257, block_size=32))
    with torch.no_grad():
        for p in m.parameters():
            p += 0.3 * torch.randn_like(p)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_json())
    checkpoint.save(folder, 0, m.state_dict(), None, {"arch": "model", "model_config": asdict(m.config)},
                    folder / "tokenizer.json", best=True)
    return evaluate.Speaker(folder, evaluate.Config())


def test_a_task_gives_what_the_model_says(speaker, tmp_path, monkeypatch):
    """Choices of an offline task: its accuracy is that of the sums of log p, worked out here token by token."""
    import harness

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    questions = [{"q": q, "choices": ["cat", "dog", "hen house"], "answer": i % 3} for i, q in enumerate(
        ["A pet:", "It barks:", "Where eggs are:", "It purrs, and sleeps all day long on a mat:", "x", "y"])]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "pets.yaml").write_text(
        f"task: pets\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path}/q.jsonl}}\n"
        f"  cache_dir: {tmp_path}/cache\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n")
    result = harness.simple_evaluate(harness.Harness(speaker), tasks=["pets"], bootstrap_iters=0,
                                     task_manager=harness.TaskManager(include_path=str(tmp_path)))
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
    assert result["results"]["pets"]["acc,none"] == pytest.approx(right / len(questions))


def test_rolling_and_greedy(speaker):
    from lm_eval.api.instance import Instance

    import harness

    lm, text = harness.Harness(speaker), "To be, or not to be, that is the question here."
    rolling, = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert -rolling / len(text) / math.log(2) == pytest.approx(
        speaker.text_nats(text)[0].sum() / len(text) / math.log(2))
    written, = lm.generate_until([Instance("generate_until", {}, ("To be", {"until": ["\n"], "max_gen_toks": 5}), 0)])
    assert written == speaker.complete("To be", 5, ("\n",))
    if written:
        (_, greedy), = lm._loglikelihood_tokens([(None, lm.tok_encode("To be"), lm.tok_encode(written)[:1])])
        assert greedy
