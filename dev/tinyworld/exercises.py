"""
Arithmetic and spelling.

Numbers above SMALL belong to the calculator; a held-out tenth of them (by hash) occurs in held-out problems only, as
operand and as result, and training has the others. Likewise a tenth of the short words is never spelled in training,
and words_alpha.txt, the list that other spelling tasks read, leaves them out.
"""
import operator

from .facts import DATA_DIR, HELD_OUT, fraction, load_data, sentence
from .stories import DATA as STORY_WORDS

DATA = load_data("numbers.json")
NAMES = STORY_WORDS["names"]
SPELLING = load_data("talk.json")["spelling"]
SPELLED = "The word {w} is spelled {l}." # names the word by the tokens that the question has, which are easy to copy
SMALL = 100 # up to here arithmetic is learned by heart
SIGNS = {"plus": "+", "minus": "-", "times": "*"}
COMPUTE = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}


def right_side(number, seed, split):
    """Whether a number may occur on this side of the split; small ones may on both."""
    return number <= SMALL or (fraction(seed, "number", number) < HELD_OUT) == (split == "heldout")


def calculation(rng, seed, split, word, a=None):
    """(a, b, result) with numbers of up to four digits on the right side of the split; `a` may be given."""
    while True:
        first = a or rng.randint(SMALL + 1, 4999)
        second = rng.randint(2, 9) if word == "times" else rng.randint(SMALL + 1, first if word == "minus" else 4999)
        result = COMPUTE[word](first, second)
        if 0 < result <= 9999 and all(right_side(number, seed, split) for number in (first, second, result)):
            return first, second, result


def problem(rng, seed, split, plain_share, second_share=0.3, is_practice=False):
    """
    A question for the calculator: a bare sum with probability `plain_share`, else a tale, some with a second step.

    With `is_practice` the phrasings are others, which no worked answer is ever shown for.
    Returns (question, steps); a step is (expression, result), and the last result is the answer.
    """
    phrasing, frame = ("practice", rng.choice(DATA["practice frames"])) if is_practice else (split, "{q}")
    word = rng.choice(list(SIGNS))
    a, b, result = calculation(rng, seed, split, word)
    steps = [(f"{a}{SIGNS[word]}{b}", result)]
    if rng.random() < plain_share:
        return frame.format(q=rng.choice(DATA["plain"][word][phrasing]).format(a=a, b=b)), steps
    entry, c = rng.choice(DATA["tales"][word]), 0
    tale = entry["tale"]
    if word != "times" and result < 4000 and rng.random() < second_share:
        _, c, total = calculation(rng, seed, split, "plus", result)
        steps.append((f"{result}+{c}", total))
        tale += " " + DATA["more"]
    slots = {"p": rng.choice(NAMES), "o": rng.choice(DATA["goods"]), "a": a, "b": b, "c": c}
    question = rng.choice(DATA["practice tales"][word] if is_practice else entry[split])
    return frame.format(q=sentence(f"{tale} {question}", **slots)), steps


def annotated(steps):
    """The answer in the form of GSM8K: calculator annotations, and the result after ####."""
    lines = [f"{expression} = <<{expression}={result}>>{result}." for expression, result in steps]
    return "\n".join(lines) + f"\n#### {steps[-1][1]}"


def equation_documents(rng):
    """Endless stream of small worked equations in the phrasing of the sample prompt, some with the check or a step."""
    while True:
        lines = []
        for _ in range(rng.randint(2, 4)):
            a, b, x = rng.randint(2, 6), rng.randint(1, 6), rng.randint(1, 6)
            end = rng.choice(DATA["equation_ends"]).format(a=a, b=b, c=a * x + b, x=x, d=a * x)
            lines.append(f"If {a}*x + {b} = {a * x + b}, then x is {x}{end}")
        yield "\n".join(lines)


def small_documents(rng):
    """Endless stream of small sums, differences and products, told or asked."""
    while True:
        lines, told = [], rng.random() < 0.6
        for _ in range(rng.randint(3, 5)):
            word, a, b = rng.choice(list(SIGNS)), rng.randint(1, 10), rng.randint(1, 10)
            a = a + b if word == "minus" else a
            template = rng.choice(DATA["small"]) if told else "Question: What is {a} {word} {b}?\nAnswer: {r}"
            lines.append(template.format(a=a, b=b, word=word, sign=SIGNS[word], r=COMPUTE[word](a, b)))
        yield (" " if told else "\n\n").join(lines)


def expression_documents(rng, seed):
    """Endless stream of calculator problems and what to type: teaches to copy numbers, not to guess results."""
    while True:
        problems = [problem(rng, seed, "train", plain_share=0.5, second_share=0) for _ in range(rng.randint(1, 2))]
        yield "\n\n".join(f"Question: {question}\nExpression: {steps[0][0]}" for question, steps in problems)


def split_words(seed):
    """(training words, held-out words); only words of at most five letters are held out."""
    words = (DATA_DIR / "words.txt").read_text(encoding="utf-8").split()
    hidden = {word for word in words if len(word) <= 5 and fraction(seed, "word", word) < HELD_OUT}
    return [word for word in words if word not in hidden], sorted(hidden)


def spelled(word):
    return f"{word}:{','.join(word)}"


def invented_word(words, rng):
    """The beginning of one word and the end of another: teaches the letters of tokens, not of whole words."""
    first, last = rng.sample(words, 2)
    return first[:rng.randint(1, 4)] + last[rng.randint(1, len(last) - 1):]


def spelling_documents(seed, rng):
    """Endless stream of spelled words, every training word equally often, and among them invented ones."""
    asked, deck = [(f"{phrasing} {SPELLED}", "\n") for phrasing in SPELLING["train"]], []
    words, hidden = split_words(seed)
    while True:
        if len(deck) < 8:
            deck = rng.sample(words, len(words))
        batch = [deck.pop() if rng.random() < 0.5 else invented_word(words, rng) for _ in range(rng.randint(4, 8))]
        batch = [word for word in batch if word not in hidden]
        form, gap = rng.choice((("{s}", "\n"), (SPELLED, " "), rng.choice(asked)))
        yield gap.join(form.format(w=word, s=spelled(word), l=",".join(word)) for word in batch)


def pair_documents(rng, turned=False):
    """
    Endless stream of pairs, bare or in sentences, said again in another order: the first lesson in looking back.

    The value of a bare pair follows its key directly, which is found out within a hundred steps, and is the bridge to
    values that follow some words later, in sentences and stories, which alone are hardly learned at all. `turned` ones
    come as value and key first, as the colour of a thing in a story, and would spoil the first lesson.
    """
    while True:
        keys, values, form = rng.choice(DATA["pairs"])
        form, gap = ("{k} {v}", rng.choice((", ", "; "))) if rng.random() < 0.6 else (form, rng.choice(" \n"))
        pairs = [(key, rng.choice(STORY_WORDS[values])) for key in rng.sample(STORY_WORDS[keys], rng.randint(2, 6))]
        forms = ["{v} {k}" if turned else form, *[form] * rng.randint(1, 3)]
        yield gap.join(said.format(k=key, v=value) for said in forms for key, value in rng.sample(pairs, len(pairs)))


def repeat_documents(seed, rng):
    """Endless stream of words and numbers that are said again in the same order: teaches to copy them exactly."""
    words, _ = split_words(seed)
    while True:
        numbers = rng.choices(range(SMALL + 1, 9999), k=rng.randint(2, 6))
        items = rng.sample(words, rng.randint(1, 6)) + [n for n in numbers if right_side(n, seed, "train")]
        yield "\n".join([" ".join(map(str, items))] * rng.randint(2, 3))


def misspellings(word, rng):
    """Three wrong spellings: a letter is another one, or stands twice."""
    wrong = {}
    while len(wrong) < 3:
        place, letter = rng.randrange(len(word)), rng.choice("abdefghlmnoprstuvwy")
        other = word[:place] + rng.choice((letter, 2 * word[place])) + word[place + 1:]
        if other != word:
            wrong[f"{word}:{','.join(other)}"] = True
    return list(wrong)
