"""dev/contamination.py against questions and shards made by hand, where every shared run of words is known."""
import json

import pytest

from dev import contamination, mirror
from nanochat.common import UserError, claim_base_dir
from nanochat.dataset import write_shard

LETTERS = [f"w{i}" for i in range(40)] # forty different words


def text(start, stop):
    return " ".join(LETTERS[start:stop])


# Which runs the documents have: w0..w12 (exactly one run), w14..w25 (twelve words, no run), w26..w39 by halves
TRAIN = [
    [f"Before that: {text(0, 13).upper().replace(' ', ', ')}! After it.", text(14, 26)],
    [text(26, 33), text(33, 40)]] # a run that goes over the border of two documents is none
VALIDATION = [text(0, 40)]
GSM8K = [
    text(0, 13),                              # shared, though case and punctuation differ
    f"An apple and {text(0, 13)} again?",     # shared, in the middle
    text(0, 12) + " other",                   # twelve words are shared, not thirteen
    text(14, 27), text(26, 40),               # in the validation shard alone
    text(0, 12)]                              # too short
ARC = [text(0, 13), "Short?"]


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    base = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for i, documents in enumerate([*TRAIN, VALIDATION]):
        write_shard(base / f"base_data/shard_{i:05d}.parquet", documents)
    rows = {"gsm8k/test.jsonl": [{"question": question, "answer": "#### 1"} for question in GSM8K],
            "arc/ARC-Easy/test.jsonl": [
                {"id": "q", "question": question, "answerKey": "A", "choices": {"text": [text(13, 40)], "label": ["A"]}}
                for question in ARC]}
    for name, items in rows.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(map(json.dumps, items)))
    mirror.main(["--from", str(tmp_path / "source")])
    return base


def claim(synthetic=False):
    claim_base_dir("tinyworld" if synthetic else "own-data", synthetic, "shard_00002.parquet",
                   {f"base_data/shard_{i:05d}.parquet": {"size": 0, "sha256": ""} for i in range(3)})


def table(capsys):
    """{evaluation: its cells} of the printed table."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])}


def test_questions_that_share_thirteen_words_are_counted(base_dir, capsys):
    claim()
    contamination.main(["--tasks", "GSM8K|ARC-Easy"])
    assert table(capsys) == {"GSM8K": ["6", "1", "2", "40.00 %"], "ARC-Easy": ["2", "1", "1", "100.00 %"]}
    section = (base_dir / "report/contamination.md").read_text()
    assert "- documents read: 4" in section and "| GSM8K " in section


def test_all_evaluations_that_can_be_had_and_marked_on_synthetic_data(base_dir, capsys):
    claim(synthetic=True)
    contamination.main([])
    assert list(table(capsys)) == ["ARC-Easy (tinyworld)", "GSM8K (tinyworld)"]


def test_only_so_many_documents(base_dir, capsys):
    claim()
    contamination.main(["--tasks", "GSM8K", "--max-documents", "1"])
    assert "1 documents read" in capsys.readouterr().out
    write_shard(base_dir / "base_data/shard_00000.parquet", TRAIN[0][::-1])
    contamination.main(["--tasks", "GSM8K", "--max-documents", "1"])
    assert table(capsys)["GSM8K"][2:] == ["0", "0.00 %"], "the document with the run is the second one now"


def test_without_any_long_question_there_is_no_share():
    rows = contamination.render_rows({"X": [["a"] * 12]}, set())
    assert [cell.strip() for cell in rows[-1].split("|")[1:-1]] == ["X", "1", "1", "0", "-"]


@pytest.mark.parametrize("flags, words", [(["--tasks", "GSM8K|Nothing"], "got Nothing"),
                                          (["--max-documents", "0"], "--max-documents must be at least 1, or -1")])
def test_wrong_flags_are_told(flags, words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        contamination.main(flags)
    assert exit_info.value.code == 2 and words in capsys.readouterr().err


def test_an_evaluation_that_was_named_must_be_there(base_dir):
    claim(synthetic=True)
    with pytest.raises(UserError, match="synthetic data set tinyworld, so cais/mmlu"):
        contamination.main(["--tasks", "MMLU"])
