"""Cloze: the rank that a model gives the right next word of twenty well-known phrases. The phrases are ours.

Only the first token of the word is ranked, which is easier for a small vocabulary: compare models of one tokenizer.
"""
import numpy as np

from tasks.problems import mean, share
from tasks.speaker import Speaker

# (prompt, the word that follows)
PHRASES = [
    ("The capital of France is", " Paris"), ("The opposite of hot is", " cold"), ("Romeo and", " Juliet"),
    ("To be, or not to", " be"), ("One, two, three,", " four"), ("The sun rises in the", " east"),
    ("Once upon a", " time"), ("The color of grass is", " green"), ("Two plus two equals", " four"),
    ("Monday, Tuesday,", " Wednesday"), ("Water freezes and becomes", " ice"), ("A baby dog is a", " puppy"),
    ("Thank you very", " much"), ("The king and the", " queen"), ("Ladies and", " gentlemen"),
    ("He opened the door and walked into the", " room"), ("January, February,", " March"),
    ("She sat down on the", " chair"), ("Good morning, my", " lord"), ("The cat chased the", " mouse"),
]


def run(speaker, cfg):
    if not isinstance(speaker, Speaker):  # the other floors have no probabilities
        return {}
    ranks = np.array([speaker.rank(prompt, word) for prompt, word in PHRASES])
    return {"rank 1": share(ranks == 1), "top 5": share(ranks <= 5), "mean 1/rank": mean(1 / ranks)}
