"""
The tasks on the published benchmarks themselves: every row, brought in by dev/mirror.py.

NANOCHAT_TEST_DATA names a folder with the benchmarks' files (see dev/mirror.py); without it all of this is skipped.
"""
import itertools
import math
import os
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from dev import mirror
from nanochat.common import get_base_dir, load_hub_dataset
from nanochat.core_eval import TASK_TYPES, _read_bundle, get_eval_bundle
from nanochat.execution import use_calculator
from nanochat.tokenizer import RustBPETokenizer
from tasks import spellingbee
from tasks.arc import ARC
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import LETTERS, MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee, words_of_split

pytestmark = [pytest.mark.slow, pytest.mark.skipif("NANOCHAT_TEST_DATA" not in os.environ,
                                                   reason="NANOCHAT_TEST_DATA names no folder of real data")]

TASKS = { # rows, and how to make the task
    "gsm8k-train": (7473, lambda: GSM8K("main", "train")), "gsm8k-test": (1319, lambda: GSM8K("main", "test")),
    "arc-easy-validation": (570, lambda: ARC("ARC-Easy", "validation")),
    "arc-easy-test": (2376, lambda: ARC("ARC-Easy", "test")),
    "arc-challenge-validation": (299, lambda: ARC("ARC-Challenge", "validation")),
    "arc-challenge-test": (1172, lambda: ARC("ARC-Challenge", "test")),
    "mmlu-dev": (285, lambda: MMLU("all", "dev")), "mmlu-validation": (1531, lambda: MMLU("all", "validation")),
    "mmlu-test": (14042, lambda: MMLU("all", "test")),
    "chat-train": (17622, lambda: SmolTalk("train")), "chat-test": (927, lambda: SmolTalk("test")),
    "identity": (1000, lambda: CustomJSON(os.path.join(get_base_dir(), "identity_conversations.jsonl"))),
    "spelling": (256, lambda: SpellingBee(256, "test")),
}
CORE = { # items of each task of the bundle
    "hellaswag_zeroshot": 10042, "jeopardy": 2117, "bigbench_qa_wikidata": 20321, "arc_easy": 2376,
    "arc_challenge": 1172, "copa": 100, "commonsense_qa": 1221, "piqa": 1838, "openbook_qa": 500,
    "lambada_openai": 5153, "hellaswag": 10042, "winograd": 273, "winogrande": 1267, "bigbench_dyck_languages": 1000,
    "agi_eval_lsat_ar": 230, "bigbench_cs_algorithms": 1320, "bigbench_operators": 210,
    "bigbench_repeat_copy_logic": 32, "squad": 10570, "coqa": 7983, "boolq": 3270,
    "bigbench_language_identification": 10000,
}


@pytest.fixture(scope="module", autouse=True)
def mirrored(tmp_path_factory):
    """A base directory with all that dev.mirror makes of the folder; the network is not asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("real")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        spellingbee._read_words.cache_clear()
        mirror.main(["--from", os.environ["NANOCHAT_TEST_DATA"]])
        yield


@pytest.fixture(scope="module")
def tokenizer():
    rows = load_hub_dataset("openai/gsm8k", "main", "train").select(range(500))
    texts = [f"{row['question']} {row['answer']}" for row in rows]
    return RustBPETokenizer.train_from_iterator(texts, 2000)


def expected_text(messages):
    """[(text, is it trained on)] of a rendered conversation, written from the definition of the format."""
    pieces = [("<|bos|>", False)]
    for message in messages:
        role, content = message["role"], message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        pieces.append((f"<|{role}_start|>", False))
        for part in parts:
            tag = {"text": None, "python": "python", "python_output": "output"}[part["type"]]
            text = f"<|{tag}_start|>{part['text']}<|{tag}_end|>" if tag else part["text"]
            pieces.append((text, role == "assistant" and tag != "output"))
        pieces.append((f"<|{role}_end|>", role == "assistant"))
    return pieces


@pytest.mark.parametrize("name", TASKS)
def test_every_conversation_is_rendered_to_the_byte(name, tokenizer):
    size, make = TASKS[name]
    task = make()
    assert len(task) == size
    for conversation in task:
        ids, mask = tokenizer.render_conversation(conversation, max_tokens=None)
        pieces = expected_text(conversation["messages"])
        assert tokenizer.decode(ids) == "".join(text for text, _ in pieces)
        trained = tokenizer.decode(list(itertools.compress(ids, mask)))
        assert trained == "".join(text for text, is_trained in pieces if is_trained)
        prompt = tokenizer.render_for_completion(conversation, max_tokens=1 << 20)
        start = tokenizer.encode_special("<|assistant_start|>")
        last = len(ids) - 1 - ids[::-1].index(start)
        assert prompt == ids[:last + 1], "what is asked is the beginning of what is trained on"


def test_humaneval_has_its_rows():
    assert len(load_hub_dataset("openai/openai_humaneval", None, "test")) == 164


@pytest.mark.parametrize("split, num_annotations", [("train", 23716), ("test", 4282)])
def test_gsm8k_references_are_right_and_so_is_every_calculator_call(split, num_annotations, tokenizer):
    """No annotation of either split is wrong. One gives 3/4 as the result of 3/4, hence Fraction."""
    task, strict, results = GSM8K("main", split), GSM8K("main", split, strict=True), Counter()
    for conversation in task:
        ids, _ = tokenizer.render_conversation(conversation, max_tokens=None)
        answer = tokenizer.decode(ids).partition("<|assistant_start|>")[2]
        assert task.reward(conversation, answer) == 1.0 and strict.evaluate(conversation, answer)
        assert not task.evaluate(conversation, answer.replace("#### ", "#### 1"))
        for call, output in itertools.pairwise(conversation["messages"][1]["content"]):
            if call["type"] == "python":
                value, annotated = use_calculator(call["text"]), Fraction(output["text"].replace(",", ""))
                is_right = value is not None and math.isclose(value, annotated, rel_tol=1e-9, abs_tol=1e-9)
                results["right" if is_right else f"{call['text']} is {value}, not {output['text']}"] += 1
    assert results == {"right": num_annotations}


@pytest.mark.parametrize("subset, split, odd", [
    ("ARC-Easy", "validation", {"1234": 21, "ABC": 1, "ABCDE": 2}), ("ARC-Easy", "test", {"ABC": 7, "ABCDE": 4}),
    ("ARC-Challenge", "validation", {"1234": 4, "ABC": 3, "ABCDE": 1}),
    ("ARC-Challenge", "test", {"ABC": 4, "ABCDE": 3})])
def test_the_answer_of_arc_is_one_of_the_labels(subset, split, odd):
    labels = Counter()
    for as_is, lettered in zip(ARC(subset, split), ARC(subset, split, letters_only=True)):
        labels["".join(as_is["letters"])] += 1
        for conversation in (as_is, lettered):
            question, answer = (message["content"] for message in conversation["messages"])
            assert answer in conversation["letters"]
            assert all(f"={letter}\n" in question for letter in conversation["letters"])
        golds = [conversation["messages"][1]["content"] for conversation in (as_is, lettered)]
        assert as_is["letters"].index(golds[0]) == "ABCDE".index(golds[1])
    assert labels.pop("ABCD") > 290 and labels == odd


@pytest.mark.parametrize("split", ["dev", "validation", "test"])
def test_mmlu_has_its_57_subjects(split):
    data = load_hub_dataset("cais/mmlu", "all", split)
    assert sorted(set(data["subject"])) == sorted(MMLU.subjects) and len(MMLU.subjects) == 57
    wanted = Counter()
    for row in data:
        options = "".join(f"- {choice}={letter}\n" for choice, letter in zip(row["choices"], LETTERS))
        wanted[f"Multiple Choice question: {row['question']}\n{options}\nRespond only with the letter of the correct "
               f"answer.{LETTERS[row['answer']]}{row['subject']}"] += 1
    found = Counter("".join(message["content"] for message in conversation["messages"]) + conversation["subject"]
                    for conversation in MMLU("all", split))
    assert found == wanted


def test_spelling_on_the_real_words():
    raw = Path(get_base_dir(), "words_alpha.txt").read_bytes()
    assert raw.count(b"\r\n") == raw.count(b"\n") == 370_098, "the list has the line ends of Windows, the last none"
    train, test = words_of_split("train"), words_of_split("test")
    assert not set(train) & set(test) and len(train) + len(test) == 370_099
    assert all(word.isalpha() and word.isascii() and word.islower() for word in train + test)
    assert 0.095 < len(test) / 370_099 < 0.105
    spelled = [{c["messages"][1]["content"].partition(":")[0] for c in SimpleSpelling(5000, split)}
               for split in ("train", "test")]
    assert spelled[0] <= set(train) and spelled[1] <= set(test)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_spelling_call_is_answered_and_scores(split):
    for conversation in SpellingBee(5000, split):
        parts = conversation["messages"][1]["content"]
        assert [part["text"] for part in parts if part["type"] == "python_output"] == [
            str(use_calculator(part["text"])) for part in parts if part["type"] == "python"]
        assert SpellingBee.evaluate(None, conversation, parts[-1]["text"])


def test_core_has_its_22_tasks_and_every_item_its_fields():
    bundle = {meta["label"]: (meta, data, baseline) for meta, data, baseline in _read_bundle(get_eval_bundle())}
    assert {label: len(data) for label, (_, data, _) in bundle.items()} == CORE
    for meta, data, baseline in bundle.values():
        render, _ = TASK_TYPES[meta["task_type"]]
        assert 0 <= baseline < 1
        for item in data:
            prompts = render(item, meta["continuation_delimiter"], data[:1])
            assert len(prompts) == len(item.get("choices") or item.get("context_options") or ("without", "with"))
