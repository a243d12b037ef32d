"""
TinyWorld: held-out questions about the embedded data set (made by dev/tinyworld), and its training conversations.

Domains: the domains of the facts, arithmetic (with calculator calls), spelling, story (following who has what) and
honesty (saying that one does not know). A row says what counts as an answer and which rivals would make it wrong.
"""
import json
import re
from decimal import Decimal

from tasks.common import Task, is_right_answer, load_rows, multiple_choice, one_of

REFUSAL = re.compile(r"\bi (do not|don't|cannot|can't) know\b|\bi have no information\b")


def mentions(text, phrase):
    """Whether the words of `phrase` occur in `text` side by side; case and punctuation do not matter, hyphens do."""
    words = [" ".join(re.findall(r"[\w-]+", part.lower())) for part in (text, phrase)]
    return f" {words[1]} " in f" {words[0]} "


def last_number(text):
    """The last number in a text, or None."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def last_spelling(text):
    """The letters of the last comma-separated spelling in a text, e.g. "c,a,t", or None."""
    spellings = re.findall(r"(?<![\w,])[a-z](?:, ?[a-z])+(?![\w,])", text.lower())
    return spellings[-1].replace(" ", "") if spellings else None


class TinyWorld(Task):
    """
    mode    "free": an answer is generated and judged by its text; "choice": the letter of one of four options
    split   "test" (held out) or, in free mode, "train" (tool calls and spelling, the rest of the training
            conversations being in the SmolTalk stand-in) and "practice" (arithmetic for reinforcement learning, in
            phrasings that have no worked examples)
    """

    def __init__(self, mode="free", split="test", **slice_kwargs):
        super().__init__(**slice_kwargs)
        self.mode = one_of("TinyWorld's mode", mode, ("free", "choice"))
        allowed = ("test", "train", "practice") if mode == "free" else ("test",)
        self.split = one_of(f"TinyWorld's split in {mode} mode", split, allowed)
        columns = ("messages_json",) if mode == "free" else ("question", "choices", "gold")
        self.data = load_rows("nanochat/tinyworld", None, split, "domain", *columns)

    @property
    def name(self):
        return f"TinyWorld {self.mode} {self.split}"

    @property
    def eval_type(self):
        return "generative" if self.mode == "free" else "categorical"

    def num_examples(self):
        return len(self.data)

    def get_example(self, index):
        row = self.data[index]
        if self.mode == "choice":
            return multiple_choice(row["question"], "ABCD", row["choices"], "ABCD"[row["gold"]], domain=row["domain"],
                                   answers=["ABCD"[row["gold"]]])
        return {"messages": json.loads(row["messages_json"]), "domain": row["domain"], "answers": row.get("answer", []),
                "rivals": row.get("rivals", [])}

    def evaluate(self, conversation, completion):
        """
        Is the completion right?

        A number or a spelling must be the last one of the text; a refusal must refuse; everything else must contain
        an accepted answer. None may contain a rival.
        """
        answers, domain = conversation["answers"], conversation["domain"]
        if self.mode == "choice":
            return completion == answers[0]
        if domain == "arithmetic":
            return last_number(completion) == Decimal(answers[0])
        if domain == "spelling":
            return last_spelling(completion) == last_spelling(answers[0])
        if any(mentions(completion, rival) for rival in conversation["rivals"]):
            return False
        if domain == "honesty":
            return bool(REFUSAL.search(completion.lower()))
        return any(mentions(completion, answer) for answer in answers)

    def reward(self, conversation, completion):
        """As `evaluate`, but of arithmetic the final answer must have the taught form, lest that be unlearned."""
        judge = is_right_answer if conversation["domain"] == "arithmetic" else self.evaluate
        return float(judge(conversation, completion))
