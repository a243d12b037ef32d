"""
The evaluations of chat models by name: the only list of them.
"""
import os
from functools import partial
from typing import Callable, NamedTuple

from nanochat.common import dataset_label, get_base_dir, hub_mirror_dir
from tasks.arc import ARC
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.spellingbee import SpellingBee
from tasks.tinyworld import TinyWorld


class Eval(NamedTuple):
    """
    make      make(start=..., stop=..., step=...) -> Task, on the split that scores are reported on
    chance    accuracy of guessing. ARC counts as 0.25 though a few of its questions have 3 or 5 options
    is_local  () -> is the data in the base directory already?
    """
    make: Callable
    chance: float
    is_local: Callable


def _has_mirror(name, subset, split):
    return os.path.isdir(hub_mirror_dir(name, subset, split))


def _has_words():
    return os.path.exists(os.path.join(get_base_dir(), "words_alpha.txt"))


_has_tinyworld = partial(_has_mirror, "nanochat/tinyworld", None, "test")

EVALS = {
    "ARC-Easy": Eval(partial(ARC, "ARC-Easy", "test"), 0.25,
                     partial(_has_mirror, "allenai/ai2_arc", "ARC-Easy", "test")),
    "ARC-Challenge": Eval(partial(ARC, "ARC-Challenge", "test"), 0.25,
                          partial(_has_mirror, "allenai/ai2_arc", "ARC-Challenge", "test")),
    "MMLU": Eval(partial(MMLU, "all", "test"), 0.25, partial(_has_mirror, "cais/mmlu", "all", "test")),
    "GSM8K": Eval(partial(GSM8K, "main", "test"), 0.0, partial(_has_mirror, "openai/gsm8k", "main", "test")),
    "HumanEval": Eval(HumanEval, 0.0, partial(_has_mirror, "openai/openai_humaneval", None, "test")),
    "SpellingBee": Eval(partial(SpellingBee, size=256, split="test"), 0.0, _has_words),
    "TinyWorld": Eval(partial(TinyWorld, mode="free"), 0.0, _has_tinyworld),
    "TinyWorld-Choice": Eval(partial(TinyWorld, mode="choice"), 0.25, _has_tinyworld),
}


def available_evals():
    """
    Names of the evaluations that this base directory can run, in the order of EVALS.

    With synthetic data those whose files are there, since nothing is fetched into such a folder; else all published
    ones, which are fetched on first use, and tinyworld's where they are local.
    """
    fetches = not dataset_label()
    return [name for name, entry in EVALS.items()
            if entry.is_local() or (fetches and not name.startswith("TinyWorld"))]


# What reinforcement learning can be about: name -> make(start=..., stop=...), of training splits, with rewards
REWARDED = {
    "GSM8K": partial(GSM8K, "main", "train"),
    "SpellingBee": partial(SpellingBee, size=8000, split="practice"),
    "TinyWorld-Arithmetic": partial(TinyWorld, split="practice"),
}
