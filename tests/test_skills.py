"""The rules of the skills: right answers pass, wrong ones do not, and the floors score close to zero."""
import sys

import pytest

from evaluate import Config
from tasks import sandbox, skills

LACKS = sandbox.active()[1] if sys.platform == "linux" else {"everything": "this is no Linux"}
WAIVE = tuple(LACKS) if sys.platform == "linux" else ()

RIGHT = {
    "geography": "It is Paris.", "literature": "William Shakespeare wrote it.", "history": "It ended in 1945.",
    "science": "The symbol is Au.", "astronomy": "There are eight planets.", "addition": "7 + 8 = 15.",
    "multiplication": "15 * 4 = 60\n\nThat is 15 times 4.",
    "word problem": "3 + 5 - 2 = 6 apples", "speed": "60 / 1.5 = 40 mph", "algebra": "x = 7",
    "count": "Vast, deep, blue.", "format": "HELLO", "sequence": "1, 2, 3, 4, 5", "yes or no": "Yes.",
    "fill in": "The cat sat on the mat.", "comparison": "An elephant is bigger than a mouse.",
    "logic": "Yes, it does.", "common sense": "Yes, because it keeps you dry.", "pattern": "8 + 2 = 10",
    "time": "It is Thursday.", "print": "```python\nprint('Hello, World!')\n```",
    "concept": "A variable stores a value under a name.", "function": "def plus(a, b):\n    return a + b",
    "antonym": "Cold", "plural": "The plural is mice.", "translation": "¡Hola!",
    "correction": "I went to the store yesterday.", "gravity": "Gravity is the force that pulls masses together.",
    "photosynthesis": "Plants turn sunlight into energy.", "sky": "Air scatters blue light more.",
    "haiku": "Cold silicon dreams\nthe patterns learn to whisper\na new kind of mind", "name": "Sparky",
    "grammar": "An adjective, not a noun.", "sentiment": "Positive", "knowledge": "It is a fruit.",
}
WRONG = {"addition": "15 or 16", "count": "Big.", "format": "Hello HELLO hello", "sequence": "1 2 3 4 5 6",
         "yes or no": "Yes it is", "comparison": "The mouse, not the elephant", "logic": "No, yes.",
         "common sense": "Yes.", "print": "print('Hello'", "function": "def f(a, b):\n    return a * b",
         "gravity": "It is a force. It pulls mass.", "haiku": "one line", "name": "I would call it Sparky the robot",
         "grammar": "A noun, hardly an adjective", "sentiment": "negative", "science": "Gold is awesome"}


@pytest.mark.skipif(bool(LACKS), reason=f"this machine lacks the layers {LACKS}")
def test_every_skill_knows_right_from_wrong():
    assert len(skills.SKILLS) == len(RIGHT) == 35 and all(len(s[4]) == 3 for s in skills.SKILLS)
    for _, category, rule, _, _ in skills.SKILLS:
        assert rule(RIGHT[category]), category
        if category in WRONG:
            assert not rule(WRONG[category]), category


def test_floors_of_the_skills_are_low(floors):
    for floor in floors:
        value, error, n = skills.run(floor, Config(waive=WAIVE))["all 35"]
        assert value <= 0.05 and n == 35, floor.name
