"""
What a task is, a sliced sequence of conversations, and the rules that several tasks share.

    rows of a data set  ->  Task[i]  ->  {"messages": [...], ...}      (rendered to ids by the tokenizer, never here)
"""
import bisect
import itertools
import operator
import random
import re
from decimal import Decimal, InvalidOperation

import numpy as np

from nanochat.common import hub_mirror_dir, load_hub_dataset, print0


class Task:
    """
    A slice [start:stop:step] of a data set of conversations; `task[i]` makes one, and `for` goes through all.
    Subclasses give num_examples() (of the whole data set), get_example(physical row index) -> conversation, and for
    scoring evaluate(conversation, completion) -> bool with `eval_type` "generative" (sample an answer) or
    "categorical" (choose among the conversation's "letters").
    """

    def __init__(self, start=0, stop=None, step=1):
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise ValueError("a task's slice needs start >= 0, stop None or >= start, and step >= 1, "
                             f"got start={start}, stop={stop}, step={step}")
        self.start, self.stop, self.step = start, stop, step

    @property
    def name(self): # in listings and errors
        return type(self).__name__

    def reward(self, conversation, completion):
        """The score of a rollout in reinforcement learning: 1.0 when right, else 0.0."""
        return float(self.evaluate(conversation, completion))

    def _rows(self):
        total = self.num_examples()
        return range(self.start, total if self.stop is None else min(self.stop, total), self.step)

    def __len__(self):
        return len(self._rows())

    def __getitem__(self, index):
        index, rows = operator.index(index), self._rows()
        if not 0 <= index < len(rows): # also what ends a `for` loop
            raise IndexError(f"{self.name} has {len(rows)} conversations, got index {index}")
        return self.get_example(rows[index])


class TaskSequence(Task):
    """Tasks one after the other, for curricula. The slice applies to the concatenation."""

    def __init__(self, tasks, **slice_kwargs):
        super().__init__(**slice_kwargs)
        self.tasks = list(tasks)
        self.ends = list(itertools.accumulate(len(task) for task in self.tasks))
        if not self.num_examples():
            raise ValueError(f"a {self.name} needs at least one conversation, got {len(self.tasks)} tasks without any")

    def num_examples(self):
        return self.ends[-1] if self.ends else 0

    def get_example(self, index):
        which = bisect.bisect_right(self.ends, index)
        return self.tasks[which][index - (self.ends[which - 1] if which else 0)]

    def print_sizes(self):
        """One line per component on rank 0, so that an empty or a short one is seen before training."""
        for task in self.tasks:
            print0(f"  {task.name:<32s} {len(task):>9,}" + ("" if len(task) else "  (empty!)"))
        print0(f"  {'total':<32s} {self.num_examples():>9,}")


class TaskMixture(TaskSequence):
    """All conversations of all tasks in one shuffle, Random(42 + epoch). A task listed twice counts twice."""

    def __init__(self, tasks, epoch=0, **slice_kwargs):
        super().__init__(tasks, **slice_kwargs)
        self.order = np.arange(self.num_examples()) # 8 bytes a row; a list of pairs would be 20 times that
        random.Random(42 + epoch).shuffle(self.order)

    def get_example(self, index):
        return super().get_example(int(self.order[index]))


def one_of(what, value, allowed):
    """Return `value` when it is among `allowed`, else raise ValueError naming them."""
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def load_rows(name, subset, split, *columns):
    """The rows of one split of a hub data set, shuffled with seed 42 so that any slice is a fair sample."""
    data = load_hub_dataset(name, subset, split)
    found = {path.rpartition(".")[2] for path in data.features.flatten()} # fields of structs among them
    if missing := [column for column in columns if column not in found]:
        raise ValueError(f"{name} ({subset or 'default'}, {split}) lacks the columns {', '.join(missing)}: put its own "
                         f"parquet files in {hub_mirror_dir(name, subset, split)}")
    return data.shuffle(seed=42)


def check_messages(messages, where):
    """Raise ValueError unless `messages` is an optional system message and then at least two, alternating from user."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: a conversation must be an array of messages (objects with role and content)")
    turns = messages[1:] if messages and messages[0].get("role") == "system" else messages
    if len(turns) < 2:
        raise ValueError(f"{where}: must have at least a user and an assistant message, got {len(turns)} message(s)")
    for turn, role in zip(turns, itertools.cycle(("user", "assistant")), strict=False): # endless roles
        if turn.get("role") != role:
            raise ValueError(f"{where}: roles must alternate from user, got {turn.get('role')!r} in place of {role!r}")
    if not all(isinstance(message.get("content"), str) for message in messages):
        raise ValueError(f"{where}: the content of every message must be text")

# -----------------------------------------------------------------------------
# Multiple choice

def render_mc(question, letters, choices):
    """The user's message of a multiple-choice question."""
    # The letter stands AFTER its option: small models bind the two better that way. There is no space before it:
    # " A" and "A" are different tokens, and prompt and answer (the bare letter) must share the token.
    options = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{options}\nRespond only with the letter of the correct answer."


def multiple_choice(question, letters, choices, answer, **extra):
    """A whole multiple-choice conversation: question, bare answer letter, and `letters` beside the messages."""
    prompt = render_mc(question, letters, choices)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "letters": list(letters), **extra}

# -----------------------------------------------------------------------------
# Calculator annotations and final answers

FINAL_ANSWER = re.compile(r"#### (-?[0-9.,]+)") # strict like GSM8K's own evaluation: "#### $10" and "####10" are none
TOOL_BLOCK = re.compile(r"<\|(python|output)_start\|>.*?(?:<\|\1_end\|>|\Z)", re.DOTALL)


def split_tool_calls(text):
    """Cut text at calculator annotations <<expression=result>> into message parts: text, python, python_output."""
    parts = []
    for position, piece in enumerate(re.split(r"<<([^>]+)>>", text)): # text, annotation, text, annotation, ...
        if position % 2:
            call = re.fullmatch(r"(.*)=(.*)", piece, re.DOTALL) or (piece, piece, "") # greedy: the last "="
            parts += [{"type": "python", "text": call[1]}, {"type": "python_output", "text": call[2]}]
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def extract_answer(text):
    """The number after the first "#### " outside tool blocks, as written but without commas; None without one."""
    match = FINAL_ANSWER.search(TOOL_BLOCK.sub("", text))
    return match[1].replace(",", "") if match else None


def is_right_answer(conversation, completion, strict=False):
    """
    Does `completion` give the final answer of the conversation's last part? No answer is wrong. Compared as numbers,
    less a final full stop ("10." and "10.0" are 10); `strict` compares strings, as GSM8K's own evaluation does.
    """
    expected, given = extract_answer(conversation["messages"][-1]["content"][-1]["text"]), extract_answer(completion)
    if given is None or strict:
        return given is not None and given == expected
    try:
        return Decimal(given.removesuffix(".")) == Decimal(expected.removesuffix("."))
    except InvalidOperation: # "1.2.3" or "."
        return False
