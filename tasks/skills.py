"""Skills: 35 kinds of questions, three of each, every answer judged by a rule.

The kinds are those of Elite-112M's test (35 prompts, judged by eye); the rules and the paraphrases are ours. The rules
are such that an empty answer, or the question repeated as the answer, scores close to zero: where a question names two
things, the wrong one comes first.
"""
import ast
import re

import numpy as np

from tasks import sandbox
from tasks.problems import share

SHORT, LONG = 32, 150  # tokens of an answer, at most


# ---- rules: answer -> whether it is right
def words(text):
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


# with its sign, unless that is a minus between two operands; "1,002" is one number, "1,2,3" are three
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\d.])\.\d+)")


def numbers(text):
    """Every number in the text, as a float. A comma belongs to a number only ahead of exactly three digits."""
    found = NUMBER.findall(text.replace("\u2212", "-"))  # the minus sign of typesetting
    return [float(number.replace(",", "")) for number in found]


# "not mice", "isn't the elephant", "rather than in London"
DENIAL = r"\b(?:not|never|isn['’]t|aren['’]t|instead of|rather than)\s+"
DENIED = re.compile(DENIAL + r"(?:(?:an?|the|in|really)\s+)*[^\s,;:!?]+", re.IGNORECASE)


def asserted(text):
    """The text without what it says is not so."""
    return DENIED.sub(" ", text)


def has(*options):
    """One of the options occurs, as a whole word or its possessive."""
    def rule(text):
        named = [re.sub(r"['’]s$", "", word) for word in words(asserted(text))]
        return any(option in named for option in options)

    return rule


def last_number(n, name, given):
    """n, or its name in words, is the last number of the answer or of its first paragraph: some explain themselves
    afterwards. Or it is the only number but those that the question gives, and the steps on the way.
    """
    def rule(text):
        text = re.sub(rf"\b{name}\b(?!-)", str(n), asserted(text), flags=re.IGNORECASE)
        if re.search(rf"\b{n} or\b|\bor {n}\b", text):
            return False  # "15 or 16" is a guess
        first_paragraph = text.strip().partition("\n\n")[0]
        if n in (*numbers(text)[-1:], *numbers(first_paragraph)[-1:]):
            return True
        return set(numbers(text)) - set(given) == {n}

    return rule


def first(right, *wrong):
    """A word that begins with `right` comes before any that begins with one of `wrong`."""
    def rule(text):
        named = [word for word in words(asserted(text)) if word.startswith((right, *wrong))]
        return bool(named) and named[0].startswith(right)

    return rule


def counts_to_five(text):
    """1 to 5, as digits or as words, and no other number; "from 1 to 5" may come first."""
    if numbers(text):
        return numbers(text) in ([1, 2, 3, 4, 5], [1, 5, 1, 2, 3, 4, 5])
    names = ["one", "two", "three", "four", "five"]
    return [word for word in words(text) if word in (*names, "zero", "six", "seven", "eight", "nine", "ten")] == names


def in_capitals(text):
    """The answer may repeat the word as it was, but ends with it in capitals."""
    return re.findall("hello", text, re.IGNORECASE)[-1:] == ["HELLO"]


def corrected(text):
    return " i went " in f" {' '.join(words(text))} " and "store" in words(text)


def topics(least, *stems):
    """At least `least` of the stems (beginnings of words) occur."""
    def rule(text):
        found = [stem for stem in stems if any(word.startswith(stem) for word in words(text))]
        return len(found) >= least

    return rule


def says_yes(least=1):
    """The answer begins with yes, takes it back by no word of it, and has at least `least` words."""
    def rule(text):
        takes_it_back = re.match(r"\W*yes\W+(?:(?:and|or|but)\s+)?no\b(?! (?:doubt|one))", text, re.IGNORECASE)
        return words(text)[:1] == ["yes"] and len(words(text)) >= least and not takes_it_back

    return rule


def both(*rules):
    return lambda text: all(rule(text) for rule in rules)


def one_sentence(text):
    return len(re.findall(r"[.!?](?:\s|$)", text.strip())) <= 1


def syllables(line):
    """Groups of vowels, without a silent e at the end: right for most English words."""
    total = 0
    for word in words(line):
        groups = len(re.findall(r"[aeiouy]+", word))
        ends_in_silent_e = word.endswith("e") and not word.endswith(("le", "ee"))
        total += max(1, groups - ends_in_silent_e)
    return total


def haiku(text):
    """Three lines of 5, 7 and 5 syllables; each may be one off, since the count is a guess."""
    lines = [line for line in text.strip().splitlines() if words(line)]
    if len(lines) != 3:
        return False
    return all(abs(syllables(line) - n) <= 1 for line, n in zip(lines, (5, 7, 5), strict=True))


# ---- rules that run the answer
def code_in(text):
    """The first fenced block, else what stands between single backticks, else the whole text."""
    block = re.search(r"```[^\n]*\n(.*?)(?:```|$)", text, re.DOTALL) or re.search(r"`([^`\n]+)`", text)
    return block[1] if block else text


def prints_hello(text, waive=()):
    result = sandbox.run(code_in(text), waive=waive)
    return result.ok and words(result.output) == ["hello", "world"]


def adds(text, waive=()):
    """The first function in the answer, whatever its name, adds its two arguments."""
    code = code_in(text)
    try:
        functions = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if not functions:
        return False
    value, _ = sandbox.call(code, functions[0].name, 2, 3, waive=waive)
    return value == 5


RUNS_CODE = (prints_hello, adds)  # these take `waive` too


# ---- questions
# where a cat may sit; the sentence has no single right end
PLACES = ("mat", "rug", "carpet", "sofa", "couch", "floor", "bed", "chair", "roof", "table", "wall", "windowsill",
          "fence", "lap", "porch", "bench", "pillow", "shelf", "stairs", "step", "ground", "grass", "cushion", "box")

# (group, category, rule, longest answer in tokens, three ways to ask)
SKILLS = [
    ("factual", "geography", has("paris"), SHORT, (
        "What is the capital of France?", "Which city is the capital of France?", "Name the French capital.")),
    ("factual", "literature", has("shakespeare"), SHORT, (
        "Who wrote Romeo and Juliet?", "Who is the author of Romeo and Juliet?",
        "Name the writer of the play Romeo and Juliet.")),
    ("factual", "history", has("1945"), SHORT, (
        "In what year did World War II end?", "When did the Second World War end?",
        "What year saw the end of World War II?")),
    ("factual", "science", has("au"), SHORT, (
        "What is the chemical symbol for gold?", "Which letters stand for gold in the periodic table?",
        "Give the symbol of the element gold.")),
    ("factual", "astronomy", has("8", "eight"), SHORT, (
        "How many planets are in our solar system?", "How many planets orbit the Sun?",
        "What is the number of planets in the solar system?")),
    ("math", "addition", last_number(15, "fifteen", (7, 8)), SHORT, (
        "What is 7 + 8?", "Add 7 and 8.", "Calculate the sum of 7 and 8.")),
    ("math", "multiplication", last_number(60, "sixty", (15, 4)), SHORT, (
        "What is 15 * 4?", "Multiply 15 by 4.", "How much is 15 times 4?")),
    ("math", "word problem", last_number(6, "six", (3, 5, 2, 8)), LONG, (
        "Tom has 3 apples. He gets 5 more and gives away 2. How many apples does he have?",
        "Anna had 3 pens, bought 5 pens and lost 2. How many pens does she have now?",
        "There are 3 birds on a tree. 5 more come, then 2 fly away. How many birds are left?")),
    ("math", "speed", last_number(40, "forty", (60, 1.5, 1)), LONG, (
        "A train travels 60 miles in 1.5 hours. What is its speed in miles per hour?",
        "A car drives 60 miles in 1.5 hours. How fast does it go, in miles per hour?",
        "If you ride 60 miles in 1.5 hours, how many miles do you ride per hour?")),
    ("math", "algebra", last_number(7, "seven", (3, 10)), LONG, (
        "Solve for x: x + 3 = 10", "If x + 3 = 10, what is x?", "Find the x for which x + 3 equals 10.")),
    ("instruction", "count", lambda text: len(words(text)) == 3, SHORT, (
        "Describe the ocean in exactly three words.", "Answer in exactly 3 words: what is winter like?",
        "Use exactly three words to describe a lion.")),
    ("instruction", "format", in_capitals, SHORT, (
        "Write the word hello in capital letters.", "Turn this word into upper case: hello",
        "Write hello with capital letters only.")),
    ("instruction", "sequence", counts_to_five, SHORT, (
        "Count from 1 to 5.", "List the numbers from 1 to 5.", "Write the numbers 1 to 5 in order.")),
    ("instruction", "yes or no", lambda text: words(text) == ["yes"], SHORT, (
        "Answer only yes or no: Is the sky blue?", "Is the sky blue? Reply with one word, yes or no.",
        "Yes or no, in one word: is the sky blue on a clear day?")),
    ("instruction", "fill in", has(*PLACES), SHORT, (
        "Fill in the blank: The cat sat on the ___.", "Complete the sentence: The cat sat on the",
        "Which word is missing? The cat sat on the ____.")),
    ("reasoning", "comparison", first("elephant", "mouse", "mice"), SHORT, (
        "Which is bigger, a mouse or an elephant?", "What is larger: a mouse or an elephant?",
        "Of a mouse and an elephant, name the bigger animal.")),
    ("reasoning", "logic", says_yes(), SHORT, (
        "All birds lay eggs. A penguin is a bird. Does a penguin lay eggs?",
        "Penguins are birds, and all birds lay eggs. Do penguins lay eggs?",
        "If every bird lays eggs and a penguin is a bird, does a penguin lay eggs?")),
    ("reasoning", "common sense", says_yes(6), LONG, (
        "Should you take an umbrella when it rains? Say why.", "It rains. Is it wise to take an umbrella, and why?",
        "Is an umbrella useful in the rain? Give a reason.")),
    ("reasoning", "pattern", last_number(10, "ten", (2, 4, 6, 8)), SHORT, (
        "What comes next: 2, 4, 6, 8, ?", "Continue with the next number: 2, 4, 6, 8",
        "Which number follows in this series? 2, 4, 6, 8, ...")),
    ("reasoning", "time", has("thursday"), SHORT, (
        "If today is Monday, what day is it in three days?", "Today is Monday. Which day comes three days later?",
        "What day of the week is three days after Monday?")),
    ("code", "print", prints_hello, LONG, (
        "Write Python code that prints Hello World.", "Write a one-line Python program that prints Hello World.",
        "How do you print Hello World in Python? Give only the code.")),
    ("code", "concept", topics(2, "stor", "value", "name", "data", "memory", "contain", "hold"), LONG, (
        "What is a variable in programming?", "Explain what a variable is in a program.",
        "In Python, what is a variable?")),
    ("code", "function", adds, LONG, (
        "Write a Python function that adds two numbers.", "Write a function add(a, b) in Python that returns the sum.",
        "In Python, define a function that returns the sum of its two arguments.")),
    ("language", "antonym", has("cold"), SHORT, (
        "What is the opposite of hot?", "Give the antonym of hot.", "Name the opposite of the word hot.")),
    ("language", "plural", has("mice"), SHORT, (
        "What is the plural of mouse?", "Write the plural form of mouse.", "One mouse, two ...? Give the plural.")),
    ("language", "translation", has("hola"), SHORT, (
        "How do you say hello in Spanish?", "Translate hello into Spanish.", "What is the Spanish word for hello?")),
    ("language", "correction", corrected, SHORT, (
        "Correct this sentence: Me go store yesterday", "Fix the grammar: Me go store yesterday",
        "Write this in correct English: Me go store yesterday")),
    ("explanation", "gravity", both(one_sentence, topics(2, "force", "attract", "mass", "pull", "object", "earth")),
     LONG, ("Explain gravity in one sentence.", "In one sentence, what is gravity?", "Put gravity in one sentence.")),
    ("explanation", "photosynthesis", both(topics(1, "light", "sun"), topics(1, "energy", "sugar", "glucose", "food")),
     LONG, ("What is photosynthesis?", "Explain photosynthesis briefly.", "How does photosynthesis work?")),
    ("explanation", "sky", topics(1, "scatter"), LONG, (
        "Why is the sky blue?", "Explain why the sky looks blue.", "What makes the sky blue?")),
    ("creative", "haiku", haiku, LONG, (
        "Write a haiku about artificial intelligence.", "Write a haiku about computers.",
        "Compose a haiku about robots.")),
    ("creative", "name", lambda text: 1 <= len(words(text)) <= 3, SHORT, (
        "Suggest a name for a robot. Answer with the name only.", "Give only a name for a friendly robot.",
        "Invent one name for a robot and write nothing else.")),
    ("classification", "grammar", first("adj", "noun"), SHORT, (
        "Is the word happy a noun or an adjective?", "Noun or adjective: happy?",
        "What part of speech is happy, noun or adjective?")),
    ("classification", "sentiment", first("positive", "negative"), SHORT, (
        "Is this review negative or positive? I love this movie!", "Negative or positive: I love this movie!",
        "Classify as negative or positive: I love this movie!")),
    ("classification", "knowledge", first("fruit", "veg"), SHORT, (
        "Botanically, is a tomato a vegetable or a fruit?", "Vegetable or fruit: what is a tomato to a botanist?",
        "To a scientist, is the tomato a vegetable or a fruit?")),
]


def run(speaker, cfg):
    """The share of right answers: of all kinds, of each group of kinds, and of each kind.

    The error counts kinds, not questions: three paraphrases succeed or fail together. That of a kind is left out.
    """
    kinds = {}
    by_group = {}
    for group, category, rule, max_new_tokens, questions in SKILLS:
        right = []
        for question in questions:
            answer = speaker.answer(question, max_new_tokens)
            if rule in RUNS_CODE:
                right.append(bool(rule(answer, waive=cfg.waive)))
            else:
                right.append(bool(rule(answer)))
        solved = float(np.mean(right))
        kinds[f"{group}: {category}"] = (solved, 0.0, len(right))
        by_group.setdefault(group, []).append(solved)
    everything = [solved for kind in by_group.values() for solved in kind]
    groups = {group: share(solved) for group, solved in by_group.items()}
    return {"all 35": share(everything)} | groups | kinds
