"""
Letters in words: spell a word (SimpleSpelling), count a letter in it (SpellingBee).

A model that sees tokens does not see letters. SpellingBee teaches it to spell the word first, to count along, and to
check the count with Python; SimpleSpelling drills the hard part alone. The words of train and test are disjoint, told
apart by a hash, so scores are lower than with test words that occur in training.

    python -m tasks.spellingbee       prints ten examples
"""
import functools
import random
import zlib

from nanochat.common import WORD_LIST_URL, download_file_with_lock, run_main
from tasks.common import Task, is_right_answer, one_of

# Where the seeds of a split's examples start; "practice" is for reinforcement learning: training words, asked anew
FIRST_SEED = {"train": 0, "practice": 5_000_000, "test": 10_000_000}
TEST_WORDS_OF_100 = 10  # share of the words kept for testing
ALPHABET = "abcdefghijklmnopqrstuvwxyz"

# The user's phrasings. Their number and their order enter the seeded draws: adding one changes every example.
TEMPLATES = (
    # English: how many (12)
    "How many {letter} are in {word}",
    "How many {letter} are there in {word}",
    "How many {letter} are in the word {word}",
    "How many {letter} does {word} have",
    "How many {letter} does the word {word} contain",
    "How many times does {letter} occur in {word}",
    "How many times do you see {letter} in {word}",
    "How many of the letters in {word} are {letter}",
    "How many {letter}s are in {word}",
    "How many {letter}s does {word} have in it",
    "How many {letter}'s are in {word}",
    "How many {letter}'s can you find in the word {word}",
    # English: count, number, frequency (3)
    "What is the count of {letter} in {word}",
    "What is the number of {letter} in the word {word}",
    "What is the frequency of {letter} in {word}",
    # English: imperatives (9)
    "Count the {letter} in {word}",
    "Count how often {letter} occurs in {word}",
    "Count every {letter} in the word {word}",
    "Tell me how many {letter} are in {word}",
    "Tell me the number of {letter} in {word}",
    "Give me the count of {letter} in {word}",
    "Find out how many {letter} {word} has",
    "Work out how many times {letter} is in {word}",
    "Look at {word} and count the letter {letter}",
    # English: a request (1), noun phrases (2)
    "Can you count the letter {letter} in {word}",
    "The number of {letter} in {word}",
    "Count of the letter {letter} in {word}",
    # English: the word first (3)
    "In {word}, how many {letter} are there",
    "In the word {word}, how often does {letter} occur",
    "{word}: how many {letter}",
    # Spanish (4)
    "¿Cuántas letras {letter} tiene {word}?",
    "¿Cuántas veces está la {letter} en {word}?",
    "¿Cuántas {letter} hay en la palabra {word}",
    "Cuenta las letras {letter} de {word}",
    # Chinese, simplified (4)
    "{word}里有几个{letter}",
    "单词{word}中有多少个字母{letter}",
    "请数一数{word}里的{letter}",
    "字母{letter}在{word}中出现了几次",
    # Korean (4)
    "{word}에는 {letter}가 몇 개 있나요",
    "단어 {word}에서 {letter}는 몇 번 나오나요",
    "{word} 안의 {letter} 개수를 세어 주세요",
    "{word}에 들어 있는 글자 {letter}의 수는",
    # French (3)
    "Combien de {letter} y a-t-il dans {word}",
    "Combien de fois trouve-t-on la lettre {letter} dans {word}",
    "Compte les {letter} du mot {word}",
    # German (3)
    "Wie viele {letter} stecken in {word}",
    "Wie oft kommt der Buchstabe {letter} in {word} vor",
    "Zähle die {letter} im Wort {word}",
    # Japanese (3)
    "{word}に{letter}はいくつありますか",
    "単語{word}の中に{letter}は何回出てきますか",
    "{word}の{letter}を数えてください",
)


@functools.lru_cache(maxsize=2)
def _read_words(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        words = tuple(word for word in map(str.strip, file) if word)
    if bad := [word for word in words if "\ufffd" in word]:
        raise ValueError(f"{path} holds {bad[0]!r}, which is not UTF-8: delete it, then fetch or generate it again")
    return words


def words_of_split(split, words=None):
    """
    The words of "train" or "test", in the order of the list. A word's CRC-32 decides, on every machine alike.

    words  None: <base>/words_alpha.txt, downloaded once when absent. Else any sequence of words
    Raises ValueError when no word belongs to the split.
    """
    one_of("the split of a spelling task", split, ("train", "test"))
    if words is None:
        words = _read_words(download_file_with_lock(WORD_LIST_URL, "words_alpha.txt"))
    chosen = [word for word in words if (zlib.crc32(word.encode()) % 100 < TEST_WORDS_OF_100) == (split == "test")]
    if not chosen:
        raise ValueError(f"no word belongs to the {split} split, got a list of {len(words)}: give more words")
    return chosen


class _SpellingTask(Task):
    """
    `size` examples made on demand, each from a seed of its own.

    split  "train", "practice" or "test": other seeds, and for "test" other words
    words  a sequence of words to use instead of the list in the base directory
    """
    eval_type = "generative"

    def __init__(self, size=1000, split="train", words=None, **slice_kwargs):
        super().__init__(**slice_kwargs)
        self.size, self.split = size, split
        self.words = words_of_split("train" if split == "practice" else split, words)

    @property
    def name(self):
        return f"{type(self).__name__} {self.split}"

    def num_examples(self):
        return self.size

    def rng(self, index):
        """The generator that example `index` is drawn from."""
        return random.Random(index + FIRST_SEED[self.split])


class SimpleSpelling(_SpellingTask):
    """ "Spell the word: cat" -> "cat:c,a,t" """

    def __init__(self, size=1000, split="train", words=None, **slice_kwargs):
        super().__init__(size, split, words, **slice_kwargs)
        random.Random(42).shuffle(self.words) # so that the same seed does not pick SpellingBee's word

    def get_example(self, index):
        word = self.rng(index).choice(self.words)
        return {"messages": [{"role": "user", "content": f"Spell the word: {word}"},
                             {"role": "assistant", "content": spell(word)}]}

    def evaluate(self, conversation, completion):
        return completion == conversation["messages"][-1]["content"]


class SpellingBee(_SpellingTask):
    """How often is this letter in this word? Solved by spelling and counting, then checked with Python."""

    def get_example(self, index):
        rng = self.rng(index)
        word = rng.choice(self.words)
        letter = rng.choice(word if rng.random() < 0.9 else ALPHABET)
        return {"messages": [{"role": "user", "content": draw_question(rng, word, letter)},
                             {"role": "assistant", "content": worked_answer(word, letter)}]}

    def evaluate(self, conversation, completion):
        return is_right_answer(conversation, completion)


def spell(word):
    """ "cat" -> "cat:c,a,t" """
    return f"{word}:{','.join(word)}"


def draw_question(rng, word, letter):
    """One phrasing of the question. The order of the five draws is part of the data: keep it."""
    template = rng.choice(TEMPLATES)
    if rng.random() < 0.3:
        template = template.lower()
    letter_quote = rng.choice(["", "'", '"'])
    word_quote = rng.choice(["", "'", '"'])
    question = template.format(letter=f"{letter_quote}{letter}{letter_quote}", word=f"{word_quote}{word}{word_quote}")
    wants_mark = rng.random() < 0.5 # drawn in any case
    return question + "?" if wants_mark and not question.endswith("?") else question


def worked_answer(word, letter):
    """The assistant's message: spelling and counting, a check announced, the call, its result, the final answer."""
    count, lines = 0, []
    for position, character in enumerate(word, start=1):
        line = f"{position}:{character}" # no space: " a" and "a" are different tokens, and the spelling above has "a"
        if character == letter:
            count += 1
            line += f" hit! count={count}"
        lines.append(line)
    manual = (f"We are asked to find the number '{letter}' in the word '{word}'. "
              f"Let me try a manual approach first.\n\nFirst spell the word out:\n{spell(word)}\n\n"
              f"Then count the occurrences of '{letter}':\n" + "\n".join(lines) + f"\n\nThis gives us {count}.")
    return [
        {"type": "text", "text": manual},
        {"type": "text", "text": "\n\nLet me double check this using Python:\n\n"},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n\nPython gives us {count}.\n\nMy final answer is:\n\n#### {count}"},
    ]


def plain_text(parts):
    """A message of parts as one text, tool calls written as <<expression=result>>."""
    shape = {"text": "{}", "python": "<<{}=", "python_output": "{}>>"}
    return "".join(shape[part["type"]].format(part["text"]) for part in parts)


def main():
    for conversation in SpellingBee(size=10):
        question, answer = conversation["messages"]
        print("-" * 80, question["content"], plain_text(answer["content"]), sep="\n")


if __name__ == "__main__":
    run_main(main)
