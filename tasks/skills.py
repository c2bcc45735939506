"""35 small skills, three questions each, every answer judged by a rule: the suite `skills` of evaluate.py.

The categories are those of Elite-112M's test (35 prompts, judged by eye); the rules and the paraphrases are ours. The
rules are such that no answer, and the question given back as the answer, earn next to nothing: where a question names
two things, the wrong one comes first.
"""
import ast
import re

from tasks import sandbox

SHORT, LONG = 32, 150                                      # tokens of an answer, at most


def words(text):
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def numbers(text):
    return [float(n.replace(",", "")) for n in re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)]


def has(*options):
    """One of the options is there, as a word."""
    return lambda text: any(option in words(text) for option in options)


def last_number(n):
    """Of the answer, or of its first paragraph: some explain themselves afterwards."""
    return lambda text: [n] in (numbers(text)[-1:], numbers(text.strip().partition("\n\n")[0])[-1:])


def first(right, wrong):
    """`right` is named before `wrong` is."""
    return lambda text: [w for w in words(text) if w in (right, wrong)][:1] == [right]


def topics(least, *options):
    """At least so many of the options (beginnings of words) occur."""
    return lambda text: sum(any(w.startswith(o) for w in words(text)) for o in options) >= least


def says_yes(least=1):
    return lambda text: words(text)[:1] == ["yes"] and len(words(text)) >= least


def both(*rules):
    return lambda text: all(rule(text) for rule in rules)


def one_sentence(text):
    return len(re.findall(r"[.!?](?:\s|$)", text.strip())) <= 1


def syllables(line):
    """Groups of vowels, without a silent e at the end: right for most English words."""
    return sum(max(1, len(re.findall(r"[aeiouy]+", w)) - (w.endswith("e") and not w.endswith(("le", "ee"))))
               for w in words(line))


def haiku(text):
    lines = [line for line in text.strip().splitlines() if words(line)]
    return len(lines) == 3 and all(abs(syllables(line) - n) <= 1 for line, n in zip(lines, (5, 7, 5), strict=True))


def code_in(text):
    """The first fenced block, or all of it."""
    block = re.search(r"```[a-zA-Z]*\n(.*?)(```|$)", text, re.DOTALL)
    return block[1] if block else text


def prints_hello(text, **kwargs):
    result = sandbox.run(code_in(text), **kwargs)
    return result.ok and words(result.output) == ["hello", "world"]


def adds(text, **kwargs):
    try:
        functions = [n for n in ast.parse(code_in(text)).body if isinstance(n, ast.FunctionDef)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(functions) and sandbox.call(code_in(text), functions[0].name, 2, 3, **kwargs)[0] == 5


CODE = (prints_hello, adds)                                # rules that run the answer
PLACES = ("mat", "rug", "carpet", "sofa", "couch", "floor", "bed", "chair", "roof", "table", "wall", "windowsill",
          "fence", "lap", "porch", "bench", "pillow", "shelf", "stairs", "step", "ground", "grass", "cushion", "box")

# (group, category, rule, tokens, questions)
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
    ("math", "addition", last_number(15), SHORT, (
        "What is 7 + 8?", "Add 7 and 8.", "Calculate the sum of 7 and 8.")),
    ("math", "multiplication", last_number(60), SHORT, (
        "What is 15 * 4?", "Multiply 15 by 4.", "How much is 15 times 4?")),
    ("math", "word problem", last_number(6), LONG, (
        "Tom has 3 apples. He gets 5 more and gives away 2. How many apples does he have?",
        "Anna had 3 pens, bought 5 pens and lost 2. How many pens does she have now?",
        "There are 3 birds on a tree. 5 more come, then 2 fly away. How many birds are left?")),
    ("math", "speed", last_number(40), LONG, (
        "A train travels 60 miles in 1.5 hours. What is its speed in miles per hour?",
        "A car drives 60 miles in 1.5 hours. How fast does it go, in miles per hour?",
        "If you ride 60 miles in 1.5 hours, how many miles do you ride per hour?")),
    ("math", "algebra", last_number(7), LONG, (
        "Solve for x: x + 3 = 10", "If x + 3 = 10, what is x?", "Find the x for which x + 3 equals 10.")),
    ("instruction", "count", lambda text: len(words(text)) == 3, SHORT, (
        "Describe the ocean in exactly three words.", "Answer in exactly 3 words: what is winter like?",
        "Use exactly three words to describe a lion.")),
    ("instruction", "format", lambda text: "HELLO" in text and "hello" not in text, SHORT, (
        "Write the word hello in capital letters.", "Turn this word into upper case: hello",
        "Write hello with capital letters only.")),
    ("instruction", "sequence", lambda text: numbers(text) == [1, 2, 3, 4, 5], SHORT, (
        "Count from 1 to 5.", "List the numbers from 1 to 5.", "Write the numbers 1 to 5 in order.")),
    ("instruction", "yes or no", lambda text: words(text) == ["yes"], SHORT, (
        "Answer only yes or no: Is the sky blue?", "Is the sky blue? Reply with one word, yes or no.",
        "Yes or no, in one word: is the sky blue on a clear day?")),
    ("instruction", "fill in", has(*PLACES), SHORT, (
        "Fill in the blank: The cat sat on the ___.", "Complete the sentence: The cat sat on the",
        "Which word is missing? The cat sat on the ____.")),
    ("reasoning", "comparison", first("elephant", "mouse"), SHORT, (
        "Which is bigger, a mouse or an elephant?", "What is larger: a mouse or an elephant?",
        "Of a mouse and an elephant, name the bigger animal.")),
    ("reasoning", "logic", says_yes(), SHORT, (
        "All birds lay eggs. A penguin is a bird. Does a penguin lay eggs?",
        "Penguins are birds, and all birds lay eggs. Do penguins lay eggs?",
        "If every bird lays eggs and a penguin is a bird, does a penguin lay eggs?")),
    ("reasoning", "common sense", says_yes(6), LONG, (
        "Should you take an umbrella when it rains? Say why.", "It rains. Is it wise to take an umbrella, and why?",
        "Is an umbrella useful in the rain? Give a reason.")),
    ("reasoning", "pattern", last_number(10), SHORT, (
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
    ("language", "correction", lambda text: "i went" in " ".join(words(text)) and "store" in words(text), SHORT, (
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
    ("classification", "grammar", first("adjective", "noun"), SHORT, (
        "Is the word happy a noun or an adjective?", "Noun or adjective: happy?",
        "What part of speech is happy, noun or adjective?")),
    ("classification", "sentiment", first("positive", "negative"), SHORT, (
        "Is this review negative or positive? I love this movie!", "Negative or positive: I love this movie!",
        "Classify as negative or positive: I love this movie!")),
    ("classification", "knowledge", first("fruit", "vegetable"), SHORT, (
        "Botanically, is a tomato a vegetable or a fruit?", "Vegetable or fruit: what is a tomato to a botanist?",
        "To a scientist, is the tomato a vegetable or a fruit?")),
]
