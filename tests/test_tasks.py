"""Tasks on tiny data: mirrors of hub data sets written with pyarrow, words given by hand."""
import itertools
import json
import random
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError, claim_base_dir, hub_mirror_dir
from tasks import spellingbee
from tasks.arc import ARC
from tasks.common import (Task, TaskMixture, TaskSequence, extract_answer, is_right_answer, multiple_choice, render_mc,
                          split_tool_calls)
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.registry import REWARDED
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import TEMPLATES, SimpleSpelling, SpellingBee, draw_question, plain_text, words_of_split

WORDS = [a + b + c for a, b, c in itertools.product("bcdf", "aeiou", "lmnr")] # 80 words of three letters


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spellingbee._read_words.cache_clear()
    return tmp_path


@pytest.fixture
def mirror(base_dir):
    """Write rows (dicts) as the local mirror of a hub data set."""
    def write(name, subset, split, rows):
        folder = base_dir / hub_mirror_dir(name, subset, split)
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "part-0.parquet")
    return write


class Numbers(Task):
    """Conversation i is the number i."""
    def __init__(self, size, **slice_kwargs):
        super().__init__(**slice_kwargs)
        self.size = size

    def num_examples(self):
        return self.size

    def get_example(self, index):
        assert 0 <= index < self.size, "a task asks for existing rows only"
        return index

# -----------------------------------------------------------------------------
# Slices, sequences, mixtures

@given(size=st.integers(0, 30), start=st.integers(0, 40), extra=st.none() | st.integers(0, 40), step=st.integers(1, 9))
def test_a_slice_is_that_of_a_list(size, start, extra, step):
    stop = None if extra is None else start + extra
    task, expected = Numbers(size, start=start, stop=stop, step=step), list(range(size))[start:stop:step]
    assert len(task) == len(expected)
    assert list(task) == expected
    for outside in (-1, len(expected), len(expected) + 7):
        with pytest.raises(IndexError, match=f"Numbers has {len(expected)} conversations, got index {outside}"):
            task[outside]


@pytest.mark.parametrize("kwargs", [{"start": -1}, {"step": 0}, {"start": 3, "stop": 2}])
def test_a_wrong_slice_says_what_must_be(kwargs):
    with pytest.raises(ValueError, match="start >= 0, stop None or >= start, and step >= 1"):
        Numbers(5, **kwargs)


def test_any_integer_type_is_an_index():
    import numpy as np
    assert Numbers(5)[np.int32(3)] == 3
    with pytest.raises(TypeError):
        Numbers(5)["3"]


def test_a_sequence_concatenates_in_order_and_skips_empty_parts():
    task = TaskSequence([Numbers(2), Numbers(0), Numbers(5, start=3)])
    assert list(task) == [0, 1, 3, 4]
    assert list(TaskSequence([Numbers(2), Numbers(3)], start=1, stop=4)) == [1, 0, 1]


def test_a_mixture_is_the_shuffle_of_all_pairs_with_seed_42():
    parts = [Numbers(7), Numbers(3, start=1), Numbers(7)]
    pairs = [(which, local) for which, part in enumerate(parts) for local in range(len(part))]
    random.Random(42).shuffle(pairs)
    mixture = TaskMixture(parts)
    assert list(mixture) == [parts[which][local] for which, local in pairs]
    assert list(TaskMixture(parts, start=2, step=3)) == list(mixture)[2::3]
    assert mixture.order.nbytes == 8 * len(pairs)


def test_another_epoch_is_another_order_of_the_same_rows():
    first, second = TaskMixture([Numbers(50)]), TaskMixture([Numbers(50)], epoch=1)
    assert list(first) != list(second)
    assert sorted(first) == sorted(second) == list(range(50))


def test_sizes_are_printed_and_an_empty_mixture_is_refused(capsys):
    TaskMixture([Numbers(1200), Numbers(0)]).print_sizes()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["Numbers", "1,200"], ["Numbers", "0", "(empty!)"], ["total", "1,200"]]
    for tasks in ([], [Numbers(0)]):
        with pytest.raises(ValueError, match="at least one conversation"):
            TaskMixture(tasks)

# -----------------------------------------------------------------------------
# Multiple choice

def test_the_wording_of_multiple_choice_is_exact():
    expected = ("Multiple Choice question: What is red?\n- grass=A\n- blood=B\n- the sky=C\n\n"
                "Respond only with the letter of the correct answer.")
    assert render_mc("What is red?", ["A", "B", "C"], ["grass", "blood", "the sky"]) == expected
    conversation = multiple_choice("What is red?", "ABC", ["grass", "blood", "the sky"], "B", subject="colours")
    assert conversation == {"messages": [{"role": "user", "content": expected}, {"role": "assistant", "content": "B"}],
                            "letters": ["A", "B", "C"], "subject": "colours"}


def arc_row(labels, answer):
    return {"id": "q1", "question": "Which is hot?", "choices": {"text": [f"thing {i}" for i in range(len(labels))],
                                                               "label": labels}, "answerKey": answer}


def test_arc_keeps_labels_as_data_or_turns_them_into_letters(mirror):
    mirror("allenai/ai2_arc", "ARC-Easy", "validation", [arc_row(["1", "2", "3"], "2")])
    conversation = ARC("ARC-Easy", "validation")[0]
    assert conversation["letters"] == ["1", "2", "3"]
    assert conversation == multiple_choice("Which is hot?", "123", ["thing 0", "thing 1", "thing 2"], "2")
    task = ARC("ARC-Easy", "validation", letters_only=True)
    assert task[0]["letters"] == ["A", "B", "C"] and task[0]["messages"][1]["content"] == "B"
    assert task.evaluate(task[0], "B") and not task.evaluate(task[0], "A") and not task.evaluate(task[0], "thing 1")


def test_arc_names_a_row_whose_answer_is_no_option(mirror):
    mirror("allenai/ai2_arc", "ARC-Challenge", "test", [arc_row(["A", "B"], "E")])
    with pytest.raises(ValueError, match="ARC-Challenge test, row 0.*one of .'A', 'B'., got 'E'"):
        ARC("ARC-Challenge", "test")[0]


@pytest.mark.parametrize("make, words", [
    (lambda: ARC("ARC-Hard", "test"), "subset must be one of ARC-Easy, ARC-Challenge, got 'ARC-Hard'"),
    (lambda: ARC("ARC-Easy", "dev"), "split must be one of train, validation, test"),
    (lambda: MMLU("all", "train"), "MMLU's all must be one of validation, dev, test"),
    (lambda: MMLU("auxiliary_train", "test"), "MMLU's auxiliary_train must be one of train"),
    (lambda: GSM8K("main", "validation"), "must be one of train, test"),
    (lambda: SmolTalk("validation"), "must be one of train, test"),
    (lambda: SpellingBee(split="val", words=WORDS), "must be one of train, test"),
])
def test_unknown_splits_are_refused_with_the_list(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_mmlu_rows_and_the_wrapped_ones_of_auxiliary_train(mirror):
    row = {"question": "2+2?", "subject": "elementary_mathematics", "choices": ["3", "4", "5", "6"], "answer": 1}
    mirror("cais/mmlu", "all", "validation", [row])
    mirror("cais/mmlu", "auxiliary_train", "train", [{"train": row}])
    for task in (MMLU("all", "validation"), MMLU("auxiliary_train", "train")):
        assert task[0] == multiple_choice("2+2?", "ABCD", row["choices"], "B", subject="elementary_mathematics")
        assert task.evaluate(task[0], "B") and not task.evaluate(task[0], "b")
    assert len(set(MMLU.subjects)) == 57


def test_mmlu_refuses_a_row_without_four_options(mirror):
    mirror("cais/mmlu", "all", "dev", [{"question": "?", "subject": "law", "choices": ["a", "b"], "answer": 1}])
    with pytest.raises(ValueError, match="MMLU all dev, row 0: must have 4 options"):
        MMLU("all", "dev")[0]

# -----------------------------------------------------------------------------
# Hub data: order, and what happens without it

def test_rows_are_shuffled_with_seed_42_before_slicing(mirror):
    import numpy as np
    answer = {"role": "assistant", "content": "yes"}
    rows = [{"messages": [{"role": "user", "content": str(i)}, answer]} for i in range(20)]
    mirror("HuggingFaceTB/smol-smoltalk", None, "train", rows)
    order = np.random.default_rng(42).permutation(20) # what `datasets` documents
    got = [conversation["messages"][0]["content"] for conversation in SmolTalk("train", start=5, stop=9)]
    assert got == [str(i) for i in order[5:9]]


def test_no_mirror_in_a_synthetic_base_dir_is_told_and_nothing_is_fetched():
    claim_base_dir("tinyworld", synthetic=True)
    with pytest.raises(UserError, match="synthetic data set tinyworld"):
        SmolTalk("train")
    with pytest.raises(UserError, match="words_alpha.txt is not fetched"):
        SpellingBee()


@pytest.mark.parametrize("messages, words", [
    ([("user", "a")], "must have at least a user and an assistant message, got 1"),
    ([("system", "s"), ("user", "a")], "got 1"),
    ([], "got 0"),
    ([("assistant", "a"), ("user", "b")], "must alternate from user, got 'assistant' in place of 'user'"),
    ([("user", "a"), ("system", "b")], "got 'system' in place of 'assistant'"),
    ([("user", "a"), ("assistant", None)], "content of every message must be text"),
])
def test_malformed_conversations_name_their_place(messages, words, mirror, tmp_path):
    messages = [{"role": role, "content": content} for role, content in messages]
    path = tmp_path / "own.jsonl"
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(messages)}\n")
    with pytest.raises(ValueError, match=r"own\.jsonl, line 3: .*" + words):
        CustomJSON(path)
    if messages:
        mirror("HuggingFaceTB/smol-smoltalk", None, "test", [{"messages": messages}])
        with pytest.raises(ValueError, match="SmolTalk test, row 0: .*" + words):
            SmolTalk("test")[0]

# -----------------------------------------------------------------------------
# CustomJSON

def test_custom_json_reads_system_messages_and_skips_blank_lines(tmp_path):
    second = [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "b"}]
    first = [{"role": "system", "content": "s"}, *second]
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(first, ensure_ascii=False) + "\n   \n" + json.dumps(second), encoding="utf-8")
    assert list(CustomJSON(path)) == [{"messages": first}, {"messages": second}]
    assert list(CustomJSON(path, start=1)) == [{"messages": second}]


def test_custom_json_warns_of_an_unanswered_question(tmp_path, caplog):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps([{"role": role, "content": "x"} for role in ("user", "assistant", "user")]))
    assert len(CustomJSON(path)) == 1
    assert "own.jsonl, line 1: the last message is not from the assistant" in caplog.text


@pytest.mark.parametrize("line, words", [
    ("{oops", "line 1: not valid JSON"), ('{"a": 1}', "line 1: a conversation must be an array of messages"),
    ('["hello", "you"]', "line 1: a conversation must be an array of messages"),
    (b'\n["caf\xe9"]', "own.jsonl, line 2: not valid JSON .*utf-8"),
])
def test_custom_json_names_a_broken_line(line, words, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(ValueError, match=words):
        CustomJSON(path)


def test_a_missing_file_is_an_error_unless_allowed(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="none.jsonl does not exist: put conversations there"):
        CustomJSON(tmp_path / "none.jsonl")
    assert len(CustomJSON(tmp_path / "none.jsonl", allow_missing=True)) == 0
    assert "going on without" in caplog.text

# -----------------------------------------------------------------------------
# GSM8K and final answers

ANSWER = "She sells 3*4 = <<3*4=12>>12 eggs.\n<<12+1=13>>13 in all.\n#### 13"


def test_annotations_become_tool_calls():
    """Three texts, two calls; the text after a call begins with the result again, as in the source."""
    assert split_tool_calls(ANSWER) == [
        {"type": "text", "text": "She sells 3*4 = "},
        {"type": "python", "text": "3*4"}, {"type": "python_output", "text": "12"},
        {"type": "text", "text": "12 eggs.\n"},
        {"type": "python", "text": "12+1"}, {"type": "python_output", "text": "13"},
        {"type": "text", "text": "13 in all.\n#### 13"}]


def test_the_last_equals_sign_splits_and_empty_texts_are_dropped():
    assert split_tool_calls("<<x=1=2>><<5>>") == [
        {"type": "python", "text": "x=1"}, {"type": "python_output", "text": "2"},
        {"type": "python", "text": "5"}, {"type": "python_output", "text": ""}]


@given(st.lists(st.text("ab1 \n", min_size=1) | st.tuples(st.text("1+=", min_size=1), st.text("23"))))
def test_parts_join_to_the_text_they_came_from(pieces):
    text = "".join(piece if isinstance(piece, str) else f"<<{piece[0]}={piece[1]}>>" for piece in pieces)
    assert plain_text(split_tool_calls(text)) == text


@pytest.mark.parametrize("text, answer", [
    ("so\n#### 1,234", "1234"), ("#### -5", "-5"), ("#### 10.", "10."), ("#### 0.5 or #### 7", "0.5"),
    ("#### $10", None), ("####10", None), ("none", None),
    ("<|python_start|>#### 1<|python_end|><|output_start|>#### 2<|output_end|>#### 3", "3"),
    ("<|python_start|>#### 1", None),
])
def test_extraction(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("completion, right, strictly", [
    ("#### 10", True, True), ("#### 10.", True, False), ("#### 10.0", True, False), ("#### 1.0.0", False, False),
    ("#### ..", False, False), ("#### 11", False, False), ("I do not know", False, False), ("#### -10", False, False),
])
def test_answers_compare_as_numbers_or_strictly_as_strings(completion, right, strictly):
    conversation = {"messages": [{"role": "user", "content": "?"},
                                 {"role": "assistant", "content": [{"type": "text", "text": "#### 10"}]}]}
    assert is_right_answer(conversation, completion) is right
    assert is_right_answer(conversation, completion, strict=True) is strictly


def test_gsm8k_conversations_scores_and_rewards(mirror):
    mirror("openai/gsm8k", "main", "train", [{"question": "How many?", "answer": ANSWER}])
    task = GSM8K("main", "train")
    assert task[0] == {"messages": [{"role": "user", "content": "How many?"},
                                    {"role": "assistant", "content": split_tool_calls(ANSWER)}]}
    strict = GSM8K("main", "train", strict=True)
    assert task.evaluate(task[0], "#### 13.0") and not strict.evaluate(task[0], "#### 13.0")
    assert task.reward(task[0], "#### 13") == 1.0 and task.reward(task[0], "#### 14") == 0.0


def test_gsm8k_refuses_rows_without_an_answer_when_it_loads(mirror):
    mirror("openai/gsm8k", "socratic", "test", [{"question": "?", "answer": "it depends"}])
    with pytest.raises(ValueError, match="GSM8K socratic test, row 0: must end in '#### <number>', got 'it depends'"):
        GSM8K("socratic", "test")

# -----------------------------------------------------------------------------
# Spelling

def test_a_spelling_example_by_hand():
    """
    The draws of Random(0) from the train words, done by hand in the documented order, and the answer written out for
    the word and letter that come out.
    """
    train = [word for word in WORDS if zlib.crc32(word.encode()) % 100 >= 10]
    rng = random.Random(0)
    word = rng.choice(train)
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    template = rng.choice(TEMPLATES)
    template = template.lower() if rng.random() < 0.3 else template
    quotes = [rng.choice(["", "'", '"']), rng.choice(["", "'", '"'])]
    question = template.replace("{letter}", quotes[0] + letter + quotes[0])
    question = question.replace("{word}", quotes[1] + word + quotes[1])
    question += "?" if rng.random() < 0.5 and not template.endswith("?") else ""
    user, assistant = SpellingBee(size=1, words=WORDS)[0]["messages"]
    assert user == {"role": "user", "content": question}
    assert question == """how many "o" are in the word 'dol'?""", "and so it was when this test was written"
    assert [part["type"] for part in assistant["content"]] == ["text", "text", "python", "python_output", "text"]
    assert assistant["content"] == spellingbee.worked_answer(word, letter)


def test_the_worked_answer_is_exact():
    assert plain_text(spellingbee.worked_answer("eel", "e")) == (
        "We are asked to find the number 'e' in the word 'eel'. Let me try a manual approach first.\n\n"
        "First spell the word out:\neel:e,e,l\n\n"
        "Then count the occurrences of 'e':\n1:e hit! count=1\n2:e hit! count=2\n3:l\n\nThis gives us 2.\n\n"
        "Let me double check this using Python:\n\n<<'eel'.count('e')=2>>\n\nPython gives us 2.\n\n"
        "My final answer is:\n\n#### 2")


def test_the_tool_call_is_one_that_the_calculator_answers():
    from nanochat.execution import use_calculator
    for conversation in SpellingBee(size=20, words=WORDS):
        call, output = conversation["messages"][1]["content"][2:4]
        assert str(use_calculator(call["text"])) == output["text"]


def test_spelling_examples_are_the_same_every_time_and_differ_by_split():
    for kind in (SpellingBee, SimpleSpelling):
        train, again, test = kind(30, "train", WORDS), kind(30, "train", WORDS), kind(30, "test", WORDS)
        assert list(train) == list(again) != list(test)
        assert train[7] == kind(1000, "train", WORDS, start=7)[0], "an example depends on its row alone"


def test_train_and_test_words_are_disjoint_and_complete():
    train, test = words_of_split("train", WORDS), words_of_split("test", WORDS)
    assert set(train) | set(test) == set(WORDS) and not set(train) & set(test) and test
    asked = {c["messages"][1]["content"].partition(":")[0] for c in SimpleSpelling(200, "test", WORDS)}
    assert asked <= set(test)
    with pytest.raises(ValueError, match="no word belongs to the test split, got a list of 1"):
        words_of_split("test", train[:1])


def test_reinforcement_learning_asks_about_training_words_what_no_stage_before_it_asked(base_dir):
    words = ["".join(letters) for letters in itertools.product("bcdfgh", "aeiou", "lmnrst", "aeiou")]
    (base_dir / "words_alpha.txt").write_text("\n".join(words))
    practice = REWARDED["SpellingBee"](stop=300)
    asked = {conversation["messages"][0]["content"] for conversation in practice}
    trained, tested = ({conversation["messages"][0]["content"] for conversation in SpellingBee(size, split)}
                       for size, split in ((2000, "train"), (256, "test")))
    assert len(asked) > 295 and not asked & trained and not asked & tested
    spelled = {conversation["messages"][1]["content"][2]["text"].split("'")[1] for conversation in practice}
    assert spelled <= set(words_of_split("train", words)) and len(spelled) > 200


def test_templates_are_51_each_with_both_slots_and_no_double_question_marks():
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 51
    assert all(template.count("{letter}") == template.count("{word}") == 1 for template in TEMPLATES)
    questions = {draw_question(random.Random(seed), "cat", "t") for seed in range(2000)}
    assert not any("??" in question for question in questions)
    assert any(question.islower() for question in questions) and any("'cat'" in question for question in questions)


def test_simple_spelling_is_right_only_when_exact():
    task = SimpleSpelling(5, words=WORDS)
    user, assistant = task[0]["messages"]
    word = user["content"].removeprefix("Spell the word: ")
    assert assistant["content"] == f"{word}:{','.join(word)}"
    assert task.evaluate(task[0], assistant["content"]) and not task.evaluate(task[0], word)


def test_the_word_list_of_the_base_dir_is_used_without_its_blank_lines(base_dir):
    (base_dir / "words_alpha.txt").write_text("\r\n".join(["", *WORDS, " "]))
    assert words_of_split("train") == words_of_split("train", WORDS)


def test_the_module_prints_ten_examples(base_dir, capsys):
    (base_dir / "words_alpha.txt").write_text("\n".join(WORDS))
    spellingbee.main()
    assert capsys.readouterr().out.count(".count('") == 10

# -----------------------------------------------------------------------------
# The registry

def test_every_evaluation_has_a_constructor_and_its_chance(mirror):
    from tasks.registry import EVALS
    assert list(EVALS) == ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "TinyWorld",
                           "TinyWorld-Choice"]
    assert [entry.chance for entry in EVALS.values()] == [0.25, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0, 0.25]
    mirror("openai/gsm8k", "main", "test", [{"question": str(i), "answer": "#### 1"} for i in range(5)])
    assert len(EVALS["GSM8K"].make(stop=3)) == 3


def test_available_evaluations_are_the_local_ones_of_synthetic_data(mirror, base_dir):
    from tasks.registry import available_evals
    assert available_evals() == ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee"]
    claim_base_dir("tinyworld", synthetic=True)
    assert available_evals() == []
    mirror("nanochat/tinyworld", None, "test", [{"a": 1}])
    mirror("cais/mmlu", "all", "test", [{"a": 1}])
    (base_dir / "words_alpha.txt").write_text("\n".join(WORDS))
    assert available_evals() == ["MMLU", "SpellingBee", "TinyWorld", "TinyWorld-Choice"]
