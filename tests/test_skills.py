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

# wordings of right answers, beside the one above
MORE_RIGHT = {
    "geography": ("Paris", "Paris, France", "The capital is Paris, not Lyon.", "France's capital? Paris!", "PARIS"),
    "literature": ("Shakespeare", "It is Shakespeare's.", "W. Shakespeare", "Shakespeare, not Marlowe",
                   "By SHAKESPEARE."),
    "history": ("1945", "World War II ended in 1945.", "In 1945, not in 1944", "September 2, 1945",
                "1939-1945: it ended in 1945"),
    "science": ("Au", "Gold is Au.", "AU", "Au (from aurum)", "It's Au, not Ag."),
    "astronomy": ("8", "Eight.", "8, not 9", "Eight planets orbit the Sun.", "There are 8: four rocky, four large."),
    "addition": ("15", "15. (7 and 8)", "Fifteen", "15 is the sum of 7 and 8", "7 and 8 make 15.", "15, not 16",
                 "7+8=15", "The sum of 7 and 8 is fifteen."),
    "multiplication": ("60", "60 = 15 * 4", "Sixty.", "15 times 4 is 60", "60 (15 x 4)", "15 * 4 = 40 + 20 = 60"),
    "word problem": ("6", "Six apples.", "6 (3 + 5 - 2)", "3 + 5 = 8, and 8 - 2 = 6.",
                     "He has 6 left, since 3 + 5 - 2 = 6", "3+5-2=6", "8\u22122=6"),
    "speed": ("40", "40 miles per hour", "40 mph, since 60 / 1.5 = 40", "Forty mph", "40.0", "40 miles in 1 hour"),
    "algebra": ("7", "x = 7", "x is seven", "7, because 7 + 3 = 10", "x = 10 - 3 = 7", "x=7, not 13",
                "x = 10\u22123 = 7"),
    "count": ("Deep blue sea", "Cold, white, quiet", "Big, strong, proud.", "*Vast and deep*", "It is cold."),
    "format": ("HELLO.", '"HELLO"', "The word is HELLO", "hello -> HELLO", "The word hello in capitals: HELLO"),
    "sequence": ("1,2,3,4,5", "1 2 3 4 5", "1\n2\n3\n4\n5", "1-2-3-4-5", "one, two, three, four, five",
                 "1. 2. 3. 4. 5.", "From 1 to 5: 1, 2, 3, 4, 5", "1, 2, 3, 4, and 5."),
    "yes or no": ("Yes", "yes", "YES!", "**Yes**", " Yes.\n"),
    "fill in": ("mat", "The cat sat on the sofa.", "Rug", "on the floor", "the windowsill, not the mat"),
    "comparison": ("Elephant", "Elephants are bigger than mice.", "The elephant, not the mouse",
                   "It isn't the mouse but"
                   " the elephant.", "An elephant!"),
    "logic": ("Yes", "Yes, penguins lay eggs.", "yes!", "Yes, no doubt.", "Yes. Every bird does."),
    "common sense": ("Yes, you will stay dry with it.", "Yes: it keeps the rain off you.",
                     "Yes, no one likes to get wet.",
                     "Yes, since rain makes you wet.", "Yes. The umbrella protects you from rain."),
    "pattern": ("10", "Ten", "2,4,6,8,10", "2, 4, 6, 8, 10", "10, since 8 + 2 = 10", "10: each is 2 more", "10, not 9",
                "8 + 2 is ten."),
    "time": ("Thursday", "thursday", "Thursday, not Wednesday", "In three days it is Thursday.", "It'll be THURSDAY."),
    "print": ("print('Hello World')", "```\nprint('Hello, World')\n```", "Use `print('Hello World!')`.",
              "```python3\nprint('hello world')\n```", "Sure:\n```py\nprint('Hello World')"),
    "concept": ("It holds a value.", "A named place in memory.", "Something that stores data.",
                "A container with a name.", "A name for a value."),
    "function": ("def f(x, y): return x + y", "```python\ndef add(a, b):\n    return a + b\n```",
                 "```python3\ndef add(a, b):\n    c = a + b\n    return c\n```", "def s(*n):\n    return sum(n)",
                 "Here:\n```\ndef add(a: int, b: int) -> int:\n    return a + b\n```"),
    "antonym": ("cold", "Cold.", "The opposite of hot is cold.", "It is cold, not warm.", "hot / cold"),
    "plural": ("mice", "Mice.", "mice, not mouses", "It is not mouses but mice.", "One mouse, two mice."),
    "translation": ("Hola", "hola", '"Hola"', "It is hola.", "Hola, amigo"),
    "correction": ("Yesterday, I went to the store.", "Yesterday I went to a store", '"I went to the store yesterday."',
                   "Correct: I went to the store yesterday.", "I went yesterday to the store."),
    "gravity": ("A force that attracts objects", "Gravity pulls masses together.",
                "The force, 9.8 N per kg, on a mass.",
                "It is how masses attract each other!", "It pulls objects to the earth"),
    "photosynthesis": ("Plants make sugar from sunlight.", "Light becomes energy.", "Plants make food with sunlight.",
                       "It turns sunlight into glucose.", "How leaves use the sun to make food."),
    "sky": ("Scattering", "Blue light scatters most.", "Rayleigh scattering.", "Because light is scattered.",
            "The air scatters blue."),
    "haiku": ("wires hum in the dark\nthe machine begins to dream\nmorning light returns",
              "Silent metal mind\nlearning from a billion words\nstill it does not know",
              "a small robot walks\nslowly through the falling snow\nits lamp is burning",
              "old code in the night\nwaiting for someone to read\nthe last line of it",
              "\nzeros and ones fall\nlike rain on a quiet lake\nripples of meaning\n"),
    "name": ("Robbie", "Robo Max", "R2-D2", "Sparky!", "Mr. Bolt"),
    "grammar": ("Adjective", "adj.", "It's an adjective.", "Not a noun: an adjective.", "Happy is an adjective"),
    "sentiment": ("positive", "Positive!", "It is positive, not negative.", "Not negative, but positive.",
                  "The review is positive."),
    "knowledge": ("fruit", "Fruit.", "A fruit, not a vegetable", "It is not a vegetable but a fruit.",
                  "Tomatoes are fruits."),
}
MORE_WRONG = {
    "geography": ("", "London", "Not Paris", "It isn't Paris but Lyon.", "Parisian"),
    "literature": ("Marlowe", "Not Shakespeare", "Shake spear", "Romeo", "It was Bacon rather than Shakespeare."),
    "history": ("1944", "19450", "In 1946, not in 1945", "never", "45"),
    "science": ("Ag", "Gold", "Not Au", "aurum", "G"),
    "astronomy": ("9", "I know of 9, not 8", "nine", "18", "88"),
    "addition": ("16", "78", "7 + 8", "16, not 15", "15 or 16", "16 or 15", "fourteen", "1,5", "\u221215", "-15"),
    "multiplication": ("19", "15 * 4", "64", "sixty-five", "60 or 65", "600", "not 60"),
    "word problem": ("8", "10", "3 + 5 = 8", "sixteen", "6 or 7", "6, no, 7"),
    "speed": ("90", "60 / 1.5", "60 miles", "4", "forty-five", "40 or 45"),
    "algebra": ("13", "x + 3 = 10", "3", "x = -7", "x = \u22127", "seventeen", "not 7"),
    "count": ("", "Blue", "It is very deep", "one two three four", "The ocean"),
    "format": ("hello", "Hello", "H E L L O", "HELO", "HELLO hello", ""),
    "sequence": ("1,2,3,4", "5 4 3 2 1", "12345", "1 to 5", "1,2,3,4,5,6", "one, two, three, four, five, six",
                 "1, 3, 5"),
    "yes or no": ("No", "Yes, yes", "Yes, no", "Yes, it is.", ""),
    "fill in": ("The cat sat on the", "dog", "sat", "", "not the mat"),
    "comparison": ("Mouse", "Mice are bigger than elephants.", "The mouse is.", "Not the elephant", "Both"),
    "logic": ("No", "No, yes", "Yes and no.", "Yes, no.", "Maybe", ""),
    "common sense": ("No, you should not do that.", "Yes, it is.", "Yes", "Yes or no, it is up to you.", "It rains."),
    "pattern": ("9", "2, 4, 6, 8", "12", "10 or 12", "2,4,6,8,12", "11, not 10", "1,0"),
    "time": ("Monday", "Wednesday", "Not Thursday", "Friday, not Thursday", "three"),
    "print": ("print('Hello')", "Hello World", "", "print(Hello World)", "print('Hello World') + 1"),
    "concept": ("A variable.", "It varies.", "", "x", "A number"),
    "function": ("def f(a, b): return a - b", "a + b", "", "def f(a, b): print(a + b)", "def f(a): return a + a"),
    "antonym": ("hot", "warm", "Not cold", "colder", ""),
    "plural": ("mouses", "mouses, not mice", "mouse", "The plural isn't mice.", "mouse's"),
    "translation": ("Hello", "Bonjour", "Not hola", "Hol a", ""),
    "correction": ("Me went to the store", "I go store yesterday", "I goed to the store.", "Hi went to the store",
                   "I went"),
    "gravity": ("A force.", "It falls.", "", "It is a force. It attracts. It pulls.", "Newton"),
    "photosynthesis": ("Plants grow.", "It is green.", "", "Sunlight.", "Energy."),
    "sky": ("It reflects the sea.", "It is blue.", "", "Because of the sun.", "Water"),
    "haiku": ("", "one\ntwo\nthree", "a\nb\nc\nd", "artificial intelligence is very interesting\nso\nit is",
              "the cat sat on the mat and looked at the dog for hours"),
    "name": ("", "I would name it Sparky", "A good name is Max", "...", "One two three four"),
    "grammar": ("noun", "Noun or adjective", "A noun, not an adjective", "Not an adjective", "verb"),
    "sentiment": ("negative", "Negative, not positive", "Not positive", "neutral", ""),
    "knowledge": ("vegetable", "A vegetable, not a fruit", "Not a fruit", "berry", "Vegetables are fruits."),
}


@pytest.mark.skipif(bool(LACKS), reason=f"this machine lacks the layers {LACKS}")
@pytest.mark.parametrize("category", RIGHT)
def test_wordings(category):
    """At least five right answers and five wrong ones of each kind, in the words that models use."""
    rule = next(skill[2] for skill in skills.SKILLS if skill[1] == category)
    assert len(MORE_RIGHT[category]) >= 5 and len(MORE_WRONG[category]) >= 5
    assert [text for text in MORE_RIGHT[category] if not rule(text)] == []
    assert [text for text in MORE_WRONG[category] if rule(text)] == []


def test_numbers():
    for text, found in (("1,2,3", [1, 2, 3]), ("1,002.5 and 1,000,000", [1002.5, 1e6]), (".5", [0.5]), ("$-.5", [-0.5]),
                        ("\u22123", [-3]), ("10-3=7", [10, 3, 7]), ("x=-7", [-7]), ("12,3456", [12, 3456]),
                         ("15.", [15]),
                        ("1.25", [1.25]), ("none", [])):
        assert skills.numbers(text) == found, text


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


def test_syllables_by_hand():
    for text, n in (("cat", 1), ("robot", 2), ("dream", 1), ("machine", 2), ("little", 2), ("free", 1),
                    ("the", 1), ("hmm", 1), ("syllable", 3), ("silent metal mind", 5), ("a", 1), ("", 0)):
        assert skills.syllables(text) == n, text


@pytest.mark.parametrize("lines, right", [((5, 7, 5), True), ((4, 8, 6), True), ((3, 7, 5), False), ((5, 9, 5), False),
                                          ((5, 7, 3), False), ((5, 7), False), ((5, 7, 5, 5), False)])
def test_a_haiku_has_its_syllables_in_its_lines(lines, right):
    assert skills.haiku("\n\n".join(" ".join(["cat"] * n) for n in lines)) == right
