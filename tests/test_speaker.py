"""A speaker's ranks and texts worked out by hand, and floors that know nothing."""
import itertools

import pytest
import torch

from evaluate import Config
from tasks.speaker import Floor, Speaker
from thimble import chat, generate


def test_rank_by_hand(runs):
    speaker = Speaker(runs / "bpe", Config())
    for prompt, target in (("the big cat sat", " on"), ("the", " red"), ("", "the")):
        n, whole = len(speaker.tokenizer.encode(prompt)), speaker.tokenizer.encode(prompt + target)
        logits = speaker.model(torch.tensor([whole[:n] or [speaker.tokenizer.eot]]))[0][0, -1]
        order = logits.argsort(descending=True).tolist()
        assert speaker.rank(prompt, target) == 1 + order.index(whole[n])


def test_questions_are_asked_as_they_were_taught(runs, monkeypatch):
    asked = []
    monkeypatch.setattr(Speaker, "write", lambda self, ids, *a: asked.append(ids) or [""])
    for template in chat.TEMPLATES:
        speaker = Speaker(runs / "bpe", Config(template=template, system="Be kind."))
        assert speaker.answer("Who?", 9) == ""
        talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"},
                {"role": "assistant", "content": "me"}]
        ids, counts = chat.encode(speaker.tokenizer, talk, template)
        assert ids[:counts.index(1)] == asked.pop()


def test_stop_texts(runs, monkeypatch):
    speaker = Speaker(runs / "byte", Config())
    said = itertools.cycle([*"    pass\n\ndef x(): ä".encode(), speaker.tokenizer.eot])
    monkeypatch.setattr(generate, "filter_logits", lambda logits, seen, **how: torch.full_like(
        logits, -torch.inf).index_fill_(0, torch.tensor(next(said)), 0.0))
    assert speaker.complete("p", 99) == "    pass\n\ndef x(): ä"
    assert speaker.complete("p", 99, ("\ndef ", "\nclass ")) == "    pass\n"


def cut(text, stops):
    return text[:min([len(text), *(text.find(s) for s in stops if s in text)])]


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_completions_side_by_side_are_those_drawn_alone(runs, name):
    speaker = Speaker(runs / name, Config(temperature=1.5))
    together = speaker.completions("the big cat", 40, ("o",), range(6))
    assert together == [speaker.completions("the big cat", 40, ("o",), (i,))[0] for i in range(6)]
    assert len(set(together)) > 3 and len({len(text) for text in together}) > 1
    assert speaker.completions("the big cat", 40) == [speaker.complete("the big cat", 40)]
    ids, text = speaker.tokenizer.encode("the big cat"), ""
    stream = speaker.tokenizer.stream()
    for token in generate.generate(speaker.model, ids, 40, torch.Generator().manual_seed(3), speaker.stop_ids,
                                   speaker.tokenizer.vocab_size, temperature=1.5):
        text += stream.step(token)
    assert cut(text + stream.flush(), ("o",)) == together[3]


def test_floors_say_what_they_are_called(floors):
    by_name = {floor.name: floor for floor in floors}
    assert by_name["empty"].answer("q?", 9) == "" and by_name["echo"].answer("q?", 9) == "q?"
    assert by_name["n-gram"].complete("the ", 3).startswith("old") or len(by_name["n-gram"].complete("the ", 3)) == 12
    assert isinstance(by_name["n-gram"], Floor)
