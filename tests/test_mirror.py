"""dev/mirror.py on a small folder: what it writes, what it refuses, and that a second run changes nothing."""
import json

import pytest

from dev import mirror
from nanochat.common import UserError, claim_base_dir, load_hub_dataset
from nanochat.core_eval import _read_bundle
from nanochat.dataset import HUB_DATASETS
from tasks import spellingbee
from tasks.arc import ARC
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk


def talk(*contents, **extra):
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents)], **extra}


ARC_ROW = {"answerKey": "2", "id": "q", "question": "Which is hot?",
           "choices": {"label": ["1", "2"], "text": ["ice", "fire"]}}
MMLU_ROW = {"answer": 3, "choices": ["1", "2", "3", "4"], "subject": "anatomy", "question": "How many?", "extra": None}
FILES = {
    "gsm8k/train.jsonl": [{"question": "Five and five?", "answer": "It is <<5+5=10>>10.\n#### 10"}] * 3,
    "arc/ARC-Easy/test.jsonl": [ARC_ROW],
    "mmlu/test.jsonl": [MMLU_ROW, MMLU_ROW],
    "mmlu/auxiliary_train.jsonl": [MMLU_ROW],
    "humaneval/HumanEval.jsonl": [dict.fromkeys(mirror.HUMANEVAL, "x")],
    "chat/train.jsonl": [talk("Hi", "Hello", source="a"), talk("Hi", source="a"),
                         talk("Good\u2028day", "Hello", source="b")],
    "chat/identity_conversations.jsonl": [talk("Who are you?", "A model.")["messages"]],
    "eval_bundle/eval_data/a/t.jsonl": [{"context": "one two", "continuation": "three"}] * 2,
}
BUNDLE = {
    "core.yaml": "icl_tasks: [{label: t, dataset_uri: a/t.jsonl, num_fewshot: [0], icl_task_type: language_modeling}]",
    "eval_meta_data.csv": "Eval Task,Random baseline\nt,0\n"}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder with some of the files; the base directory is beside it."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spellingbee._read_words.cache_clear()
    for name, rows in FILES.items():
        write(tmp_path / "source" / name, "".join(json.dumps(row) + "\n" for row in rows))
    for name, text in BUNDLE.items():
        write(tmp_path / "source/eval_bundle" / name, text)
    write(tmp_path / "source/words/words_alpha.txt", "".join(f"word{i}\r\n" for i in range(50)))
    return tmp_path / "source"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def run(source):
    mirror.main(["--from", str(source)])


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_the_tasks_read_what_was_mirrored(source, capsys):
    run(source)
    assert len(GSM8K("main", "train")) == 3
    easy = ARC("ARC-Easy", "test")[0]
    assert easy["letters"] == ["1", "2"] and easy["messages"][1]["content"] == "2"
    for task in (MMLU("all", "test"), MMLU("auxiliary_train", "train")):
        assert task[0]["messages"][1]["content"] == "D" and task[0]["subject"] == "anatomy"
    contents = {conversation["messages"][0]["content"] for conversation in SmolTalk("train")}
    assert contents == {"Hi", "Good\u2028day"}, "the one of a single message is left out"
    assert len(CustomJSON(source.parent / "base/identity_conversations.jsonl")) == 1
    assert all(word.isalnum() for word in spellingbee.words_of_split("train"))
    [(meta, data, _)] = _read_bundle(source.parent / "base/eval_bundle")
    assert meta["label"] == "t" and len(data) == 2
    lines = capsys.readouterr().out.splitlines()
    for line in ("openai/gsm8k main train: 3 rows", "cais/mmlu all test: 2 rows", "words_alpha.txt: 50 lines",
                 "eval_bundle: 1 tasks in 1 files", "absent: gsm8k/test.jsonl", "absent: arc/ARC-Easy/train.jsonl",
                 "HuggingFaceTB/smol-smoltalk default train: 2 rows, NOT SmolTalk but a stand-in of other sources "
                 "(1 malformed left out)"):
        assert line in lines


def test_columns_are_those_of_the_hub_in_its_order(source):
    run(source)
    features = load_hub_dataset("allenai/ai2_arc", "ARC-Easy", "test").features
    assert list(features) == ["id", "question", "choices", "answerKey"]
    assert list(features["choices"]) == ["text", "label"]
    assert list(load_hub_dataset("cais/mmlu", "all", "test").features) == ["question", "subject", "choices", "answer"]
    assert list(load_hub_dataset("cais/mmlu", "auxiliary_train", "train").features) == ["train"]
    assert list(load_hub_dataset("openai/openai_humaneval", None, "test").features) == list(mirror.HUMANEVAL)


def test_all_that_the_stages_read_from_the_hub_has_its_file():
    known = {(dataset, subset, split) for _, dataset, subset, splits, _ in mirror.SPLITS for split in splits}
    assert {(name, subset or "default", split) for name, subset, splits in HUB_DATASETS for split in splits} <= known


def test_a_second_run_changes_nothing(source):
    run(source)
    before = snapshot(source.parent / "base")
    run(source)
    assert len(before) == 11 and snapshot(source.parent / "base") == before


@pytest.mark.parametrize("name, line, words", [
    ("gsm8k/train.jsonl", '{"question": "?"}', "line 4: answer must be of type str, got None"),
    ("gsm8k/train.jsonl", '{"question": "?", "answer": "ten"}', "line 4: answer must end in '#### <number>'"),
    ("gsm8k/train.jsonl", '{"question"', "line 4: Expecting ':' delimiter"),
    ("gsm8k/train.jsonl", '{"question": "\\ud800", "answer": "#### 1"}', "line 4: .*surrogates not allowed"),
    ("arc/ARC-Easy/test.jsonl", json.dumps(ARC_ROW | {"answerKey": "C"}), "line 2: every choice must have a label"),
    ("mmlu/test.jsonl", json.dumps(MMLU_ROW | {"answer": 4}), "line 3: there must be 4 choices and an answer"),
    ("mmlu/test.jsonl", json.dumps(MMLU_ROW | {"answer": "D"}), "line 3: answer must be of type int, got 'D'"),
    ("chat/train.jsonl", '["Hi", "Hello"]', "line 4: the row must be of type dict"),
    ("chat/identity_conversations.jsonl", '["Hi"]', "line 2: a conversation must be an array of messages"),
    ("eval_bundle/eval_data/a/t.jsonl", "{", "line 3: Expecting property name"),
    ("words/words_alpha.txt", b"caf\xe9s", "line 51: .*invalid continuation byte"),
])
def test_a_bad_row_is_told_with_its_place_and_nothing_is_written(source, name, line, words):
    with open(source / name, "ab") as file:
        file.write(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(ValueError, match=words) as error:
        run(source)
    assert name.rpartition("/")[2] in str(error.value) and not snapshot(source.parent / "base")


def test_a_bundle_that_is_not_whole_is_refused(source):
    (source / "eval_bundle/core.yaml").write_text(BUNDLE["core.yaml"].replace("a/t.jsonl", "b.jsonl"))
    with pytest.raises(UserError, match="evaluation bundle .* is damaged .*b.jsonl"):
        run(source)


@pytest.mark.parametrize("name", ["identity_conversations.jsonl", "hub/openai/gsm8k/main/train/other.parquet"])
def test_what_the_user_has_is_never_replaced_or_added_to(source, name):
    write(source.parent / "base" / name, "mine")
    with pytest.raises(UserError, match=f"{name} is not what .* would be: move it away"):
        run(source)
    assert [content for _, content in snapshot(source.parent / "base").values()] == [b"mine"]


def test_a_synthetic_base_directory_is_refused_and_any_real_one_taken(source, monkeypatch):
    claim_base_dir("my-text", synthetic=False)
    run(source)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(source.parent / "small"))
    claim_base_dir("tinyworld", synthetic=True)
    with pytest.raises(UserError, match="synthetic data set tinyworld.*never mix: choose another --base-dir"):
        run(source)
    mirror.main(["--from", str(source), "--base-dir", str(source.parent / "third")])
    assert len(GSM8K("main", "train")) == 3 and (source.parent / "third/words_alpha.txt").exists()


def test_nothing_to_take_is_an_error(source, tmp_path):
    with pytest.raises(UserError, match="has none of these files"):
        run(tmp_path / "elsewhere")
