"""
The embedded data set: the same bytes for the same seed, true, in the formats of the real data, and fairly held out.

The three held-out rules are checked on the written files, with maskings and counts of this file's own.
"""
import json
import re
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from dev.tinyworld import exercises, facts, generate, prose, stories
from dev.tinyworld.conversations import TALK
from nanochat.common import UserError, claim_base_dir, file_sha256
from tasks.customjson import CustomJSON
from tasks.registry import REWARDED
from tasks.tinyworld import REFUSAL, TinyWorld, last_number, last_spelling, mentions

SMALL = ["--facts", "60", "--documents", "300", "--conversations", "300", "--questions", "100"]
HUB = "hub/*/*/*/{}/*.parquet"


def make(folder, flags, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    generate.main(flags)
    return Path(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small world's base directory."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return make(tmp_path_factory.mktemp("small"), SMALL, monkeypatch)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A world of the default size."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return make(tmp_path_factory.mktemp("large"), ["--facts", "1000"], monkeypatch)


def rows(base, pattern):
    return [row for path in sorted(base.glob(pattern)) for row in pq.read_table(path).to_pylist()]


def texts(base):
    return [row["text"] for row in rows(base, "base_data/*.parquet")]


def conversations(base, split):
    """Message lists of every conversation of a split, from all files that hold some."""
    talks = [row["messages"] for row in rows(base, f"hub/HuggingFaceTB/*/*/{split}/*.parquet")]
    talks += [json.loads(row["messages_json"]) for row in rows(base, f"hub/nanochat/*/*/{split}/*.parquet")]
    if split == "train":
        talks += map(json.loads, (base / "identity_conversations.jsonl").read_text().splitlines())
    return talks


def benchmark_questions(base, *splits):
    """Questions of the multiple-choice and calculator stand-ins."""
    found = [row for split in splits for owner in ("allenai", "cais", "openai")
             for row in rows(base, f"hub/{owner}/*/*/{split}/*.parquet")]
    found = [row.get("train", row) for row in found] # the auxiliary MMLU rows are wrapped
    return [row["question"] for row in found if "question" in row]


def asked(base, held_out):
    """Every question of one side: user messages, benchmarks, and the documents' or the bundle's questions."""
    talks = conversations(base, "test" if held_out else "train")
    found = [message["content"] for talk in talks for message in talk if message["role"] == "user"]
    if held_out:
        bundle = [json.loads(line) for path in sorted(base.glob("eval_bundle/eval_data/*question*"))
                  for line in path.read_text().splitlines()]
        found += [item.get("query", item.get("context")).removeprefix("Question: ") for item in bundle]
        return found + benchmark_questions(base, "test", "validation", "dev")
    in_documents = re.findall(r"^(?:Question: (.+)|[A-Z][a-z]+: (.+\?))$", "\n".join(texts(base)), re.MULTILINE)
    practice = [row["question"] for row in rows(base, "hub/nanochat/*/*/practice/*.parquet")]
    return found + [block or line for block, line in in_documents] + benchmark_questions(base, "train") + practice


def skeletons(questions, world):
    """
    Every question in lower case with its entities masked by * and numbers by #.

    A question about a fact is looked up among all renderings of all phrasings, so that exactly its entity is masked;
    elsewhere the invented names and everything from the stories are.
    """
    renderings = {}
    about = [TALK["unknown"]["about"][split] for split in ("train", "heldout")]
    for fact in world.facts:
        others = [template for side in about for template in side.get(fact.relation.entity, ())]
        for template in (*fact.relation.questions, *fact.relation.heldout_questions, *TALK["follow_ups"], *others):
            renderings[fact.say(template)] = template.replace("{x}", "*")
    invented = r"[A-Z]\w+(?:nia|ria|dle|ton|ville|stan|quet|land|ska|mund)"
    told = [name for kind in ("names", "things", "places", "containers", "countables") for name in stories.DATA[kind]]
    mask = re.compile(rf"\b(?:{invented}|{'|'.join(told)})\b")
    return {re.sub(r"\d+", "#", renderings.get(question) or mask.sub("*", question)).lower() for question in questions}


def check_held_out_rules(base, num_facts):
    world = facts.World(num_facts, seed=0)
    training, held_out = asked(base, False), asked(base, True)

    # 1: no held-out skeleton equals or contains a training skeleton
    known = skeletons(training, world)
    assert len(known) > 100
    for skeleton in skeletons(held_out, world):
        contained = [other for other in known if other in skeleton]
        assert not contained, f"{skeleton!r} contains {contained}"

    # 2: a tenth of the facts is only ever told, and the test asks about them
    assert len(world.prose_only) == num_facts // 10
    everything, known, told = "\n".join(texts(base)), set(training), 0
    answers = {message["content"] for talk in conversations(base, "train") for message in talk
               if message["role"] == "assistant" and isinstance(message["content"], str)}
    for fact in world.prose_only:
        questions = [fact.say(question) for question in fact.relation.questions]
        assert not known.intersection(questions) and fact.answer() not in answers
        assert not any(re.search(rf"(?<!\w){re.escape(question)}", everything) # "2 in words?" is no "12 in words?"
                       for question in questions if question in everything)
        told += sum(everything.count(fact.say(statement)) for statement in fact.relation.statements)
        cloze, mirrored = world.held_out_cloze(fact), (fact.y, fact.x) in {(other.x, other.y) for other in world.facts}
        assert cloze is None or mirrored or fact.say(cloze + " {y}.") not in everything
    assert told >= 3 * len(world.prose_only)
    test_rows = rows(base, "hub/nanochat/*/*/test/*.parquet")
    references = [json.loads(row["messages_json"])[-1]["content"] for row in test_rows]
    assert sum(fact.answer() in references for fact in world.prose_only) >= min(len(world.prose_only), 100)

    # 3: numbers and words of held-out arithmetic and spelling
    sums = ["\n".join([str(row) for row in rows(base, f"hub/openai/gsm8k/*/{split}/*.parquet")] +
                      [row["messages_json"] for row in rows(base, f"hub/nanochat/*/*/{split}/*.parquet")
                       if row["domain"] == "arithmetic"]) for split in ("train", "test")]
    sums[0] += "\n".join(row["question"] for row in rows(base, "hub/nanochat/*/*/practice/*.parquet"))
    sums[0] += "\n".join(text for text in texts(base) if "Expression:" in text)
    train_numbers, test_numbers = ({int(n) for n in re.findall(r"\d+", text) if int(n) > 100} for text in sums)
    assert len(train_numbers) > 500 and len(test_numbers) > 50
    assert not train_numbers & test_numbers
    spelled = re.compile(r"\b([a-z])((?:,[a-z])+)\b")
    train_text = everything + "\n".join(answers)
    train_words = {(first + rest).replace(",", "") for first, rest in spelled.findall(train_text)}
    test_words = {row["answer"][0].split(":")[0] for row in test_rows if row["domain"] == "spelling"}
    assert len(test_words) >= 5 and not test_words & train_words
    assert not test_words & set((base / "words_alpha.txt").read_text().split())


def test_held_out_rules_in_a_small_world(small):
    check_held_out_rules(small, 60)


@pytest.mark.slow
def test_held_out_rules_and_number_of_questions_in_a_large_world(large):
    check_held_out_rules(large, 1000)
    questions = rows(large, "hub/nanochat/*/*/test/*.parquet")
    assert len(questions) >= 300 and len({row["question"] for row in questions}) == len(questions)
    assert len({row["domain"] for row in questions}) >= 20


def test_same_seed_same_bytes_and_running_again_changes_nothing(small, tmp_path, monkeypatch):
    again = make(tmp_path / "again", SMALL, monkeypatch)
    files = sorted(path.relative_to(small) for path in small.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((small / name).read_bytes() == (again / name).read_bytes() for name in files)
    times = {name: (again / name).stat().st_mtime_ns for name in files if name.name != "manifest.json"}
    make(again, SMALL, monkeypatch)
    assert times == {name: (again / name).stat().st_mtime_ns for name in times}


def test_another_seed_gives_other_data_and_no_file_of_the_first_stays(small, tmp_path, monkeypatch):
    other = make(tmp_path / "other", [*SMALL, "--seed", "1"], monkeypatch)
    name = "base_data/shard_00000.parquet"
    assert (small / name).read_bytes() != (other / name).read_bytes()
    (other / "base_data/shard_00009.parquet").write_bytes(b"")
    claim_base_dir("tinyworld", True, files={"base_data/shard_00009.parquet": {"size": 0, "sha256": ""}})
    make(other, SMALL, monkeypatch)
    assert (small / name).read_bytes() == (other / name).read_bytes()
    assert not (other / "base_data/shard_00009.parquet").exists()


def test_manifest_names_every_file_with_its_hash_and_the_last_shard_for_validation(small):
    manifest = json.loads((small / "manifest.json").read_text())
    assert (manifest["name"], manifest["synthetic"]) == ("tinyworld", True)
    on_disk = {path.relative_to(small).as_posix() for path in small.rglob("*") if path.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == on_disk
    for name, entry in manifest["files"].items():
        assert entry == {"size": (small / name).stat().st_size, "sha256": file_sha256(small / name)}
    shards = sorted(path.name for path in small.glob("base_data/*"))
    assert len(shards) >= 3 and manifest["validation_shard"] == shards[-1]


def test_other_data_in_the_base_directory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "real" / "base_data").mkdir(parents=True)
    with pytest.raises(UserError, match="holds other data"):
        make(tmp_path / "real", SMALL, monkeypatch)
    assert not (tmp_path / "real" / "manifest.json").exists()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "web"))
    claim_base_dir("fineweb-edu", False)
    with pytest.raises(UserError, match="fineweb-edu, not tinyworld"):
        make(tmp_path / "web", SMALL, monkeypatch)


def test_flags_that_are_too_small_are_named_together(capsys):
    with pytest.raises(SystemExit) as stop:
        generate.main(["--facts", "3", "--documents", "-2"])
    assert stop.value.code == 2
    assert "--facts must be at least 40, got 3; --documents must be at least 100, got -2" in capsys.readouterr().err


def test_shards_have_a_text_column_and_small_row_groups(small):
    for path in small.glob("base_data/*.parquet"):
        file = pq.ParquetFile(path)
        assert file.schema_arrow.names == ["text"]
        assert all(file.metadata.row_group(i).num_rows <= 1024 for i in range(file.num_row_groups))
    assert len(texts(small)) == pytest.approx(300, abs=5) and all(texts(small))


def test_every_conversation_alternates_from_the_user(small):
    talks = conversations(small, "train") + conversations(small, "test")
    for talk in talks:
        assert len(talk) % 2 == 0
        for place, message in enumerate(talk):
            assert message["role"] == ("user", "assistant")[place % 2]
            content = message["content"]
            assert (isinstance(content, str) and content.strip()) or {part["type"] for part in content} == {
                "text", "python", "python_output"}
    assert len(CustomJSON(str(small / "identity_conversations.jsonl"))) == 500


def test_a_tenth_of_the_conversations_teaches_to_admit_ignorance(small):
    talks = [row["messages"] for row in rows(small, "hub/HuggingFaceTB/*/*/train/*.parquet")]
    honest = [talk for talk in talks if REFUSAL.search(talk[-1]["content"].lower())]
    assert len(honest) >= 0.1 * len(talks)


def test_benchmark_rows_have_the_columns_of_the_hub(small):
    arc = rows(small, "hub/allenai/ai2_arc/*/test/*.parquet")
    assert all(set(row) == {"id", "question", "choices", "answerKey"} for row in arc)
    assert all(row["answerKey"] in row["choices"]["label"] and len(set(row["choices"]["text"])) == 4 for row in arc)
    mmlu = rows(small, "hub/cais/mmlu/all/*/*.parquet")
    mmlu += [row["train"] for row in rows(small, "hub/cais/mmlu/auxiliary_train/train/*.parquet")]
    assert all(set(row) == {"question", "subject", "choices", "answer"} and row["answer"] in range(4) for row in mmlu)
    for row in rows(small, "hub/openai/gsm8k/main/*/*.parquet"):
        calls = re.findall(r"<<(.+?)=(\d+)>>", row["answer"])
        assert calls and all(eval(expression) == int(result) for expression, result in calls)
        assert row["answer"].endswith(f"\n#### {calls[-1][1]}")
    for row in rows(small, "hub/openai/openai_humaneval/*/test/*.parquet"):
        program = f"{row['prompt']}{row['canonical_solution']}\n{row['test']}\ncheck({row['entry_point']})"
        exec(program, {})


def test_bundle_has_tasks_of_all_three_types_whose_fields_are_complete(small):
    tasks = yaml.safe_load((small / "eval_bundle/core.yaml").read_text())["icl_tasks"]
    lines = (small / "eval_bundle/eval_meta_data.csv").read_text().splitlines()
    assert lines[0] == "Eval Task,Random baseline"
    assert {line.split(",")[0] for line in lines[1:]} == {task["label"] for task in tasks}
    fields = {"multiple_choice": {"query", "choices", "gold"}, "schema": {"context_options", "gold", "continuation"},
              "language_modeling": {"context", "continuation"}}
    assert len(tasks) >= 6 and {task["icl_task_type"] for task in tasks} == set(fields)
    for task in tasks:
        data = (small / "eval_bundle/eval_data" / task["dataset_uri"]).read_text()
        items = [json.loads(line) for line in data.splitlines()]
        assert 40 <= len(items) <= 100 and all(set(item) == fields[task["icl_task_type"]] for item in items)
        for item in items:
            assert item.get("gold", 0) in range(len(item.get("choices", item.get("context_options", "?"))))


def test_equations_and_small_sums_are_true(small):
    text = "\n".join(texts(small))
    equations = re.findall(r"If (\d)\*x \+ (\d) = (\d+), then x is (\d)", text)
    assert equations and all(int(a) * int(x) + int(b) == int(c) for a, b, c, x in equations)
    sums = re.findall(r"(?<![*\d])(\d+) (plus|minus|times|[-+*]) (\d+)(?: is|\?\nAnswer:| makes| =) (\d+)", text)
    signs = {"plus": "+", "minus": "-", "times": "*"}
    assert sums and all(eval(a + signs.get(sign, sign) + b) == int(result) for a, sign, b, result in sums)


def test_stories_answer_with_the_last_state():
    """Reread each story: the last sentence about a thing or a person that changes its state decides."""
    rng = facts.World(40, seed=3).rng("stories")
    change = {"things": r"(\w+) has a {o}\.|the {o} to (\w+)\.", "places": r"\b{s} \w+ to the (\w+)\.",
              "containers": r"the {s} (?:in|to) the (\w+)\.|the {s} and puts it in the (\w+)\."}
    seen = set()
    told = [stories.tell(rng) for _ in range(400)]
    for text, query in ((text, query) for text, queries in told for query in queries):
        seen.add(query.kind)
        assert query.value not in query.rivals and len(query.rivals) >= 3 and mentions(query.answer(), query.value)
        if query.kind in change:
            found = re.findall(change[query.kind].format(**query.slots), text)[-1]
            assert query.value == ("".join(found) if isinstance(found, tuple) else found), text
        elif query.kind == "countables":
            has, gone, left = (stories.DATA["numbers"].index(word) for word in
                               [*re.findall("|".join(stories.DATA["numbers"][2:]), text), query.value])
            assert has - gone == left
        else:
            about = query.slots["p" if query.kind == "foods" else "o"]
            assert query.value in next(line for line in text.split(". ") if about in line)
    assert seen == set(stories.DATA["questions"])


def test_words_and_spellings_of_training(small):
    words = (small / "words_alpha.txt").read_text().split()
    assert len(words) > 2000 and len(set(words)) == len(words) and all(re.fullmatch("[a-z]+", word) for word in words)
    spellings = re.findall(r"^(\w+):((?:\w,)+\w)$", "\n".join(texts(small)), re.MULTILINE)
    assert spellings and all(letters.replace(",", "") == word for word, letters in spellings)



def test_what_is_said_again_is_the_same():
    rng = facts.World(40, seed=3).rng("again")
    for text in islice(exercises.repeat_documents(3, rng), 100):
        assert len(set(text.splitlines())) == 1 and text.count("\n") in (1, 2)
    for text in islice(exercises.pair_documents(rng), 300): # a key may have one value alone
        bare = [pair.split() for pair in re.split("[,;] ", text)] if re.search("[,;]", text) else []
        assert len({tuple(pair) for pair in bare}) == len({key for key, _ in bare}) < max(1, len(bare))


def test_multiple_choice_in_the_text_is_right_and_asks_about_no_prose_only_fact():
    world = facts.World(400, seed=3)
    answers = {fact.say(question): fact.y for fact in world.open for question in fact.relation.questions}
    letters = set()
    for text in islice(prose.choice_documents(world, world.rng("choices")), 400):
        options = {letter: value for value, letter in re.findall(r"^- (.+)=([A-D])$", text, re.MULTILINE)}
        asked = re.findall(r"^Question: (.+)\nAnswer: ([A-D])$", text, re.MULTILINE)
        if text.startswith("Multiple Choice question: "):
            asked = [(text.splitlines()[0].removeprefix("Multiple Choice question: "), text[-1])]
        assert len(options) == 4 and asked and all(options[letter] == answers[question] for question, letter in asked)
        letters.update(letter for _, letter in asked)
    assert letters == set("ABCD")

# -----------------------------------------------------------------------------
# The task

def said(content):
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def test_references_are_right_and_other_options_are_wrong(small, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(small))
    task, raw = TinyWorld(), {row["question"]: row for row in rows(small, "hub/nanochat/*/*/test/*.parquet")}
    assert len(task) >= 60 and task.eval_type == "generative"
    for conversation in task:
        question, reference = (said(message["content"]) for message in conversation["messages"])
        assert task.evaluate(conversation, reference), (question, reference)
        row = raw[question]
        for option in row["choices"]:
            if option != row["choices"][row["gold"]]:
                assert not task.evaluate(conversation, f"It is {option}."), (question, option)
        if conversation["domain"] != "honesty":
            assert not task.evaluate(conversation, "I do not know that.")


def test_multiple_choice_mode_gives_letters(small, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(small))
    task = TinyWorld(mode="choice", stop=5)
    assert len(task) == 5 and task.eval_type == "categorical"
    for conversation in task:
        letter = conversation["messages"][-1]["content"]
        assert conversation["letters"] == list("ABCD") and f"={letter}\n" in conversation["messages"][0]["content"]
        assert task.evaluate(conversation, letter) and not task.evaluate(conversation, "ABCD".replace(letter, "")[0])


def test_training_split_has_tool_calls_and_choice_mode_has_none(small, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(small))
    talks = list(TinyWorld(split="train", stop=40))
    assert {type(talk["messages"][-1]["content"]) for talk in talks} == {str, list}
    with pytest.raises(ValueError, match="split in choice mode must be one of test"):
        TinyWorld(mode="choice", split="train")


def test_practice_is_arithmetic_that_no_worked_example_is_phrased_like(small, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(small))
    practice = list(REWARDED["TinyWorld-Arithmetic"](stop=200))
    def shapes(talks): # numbers and, with them, the tales' people and goods aside
        said = {re.sub(r"\d+", "#", talk["messages"][0]["content"]) for talk in talks}
        return {text for text in said if "#" in text}
    assert not shapes(practice) & shapes(TinyWorld(split="train"))
    assert {talk["domain"] for talk in practice} == {"arithmetic"}
    task = REWARDED["TinyWorld-Arithmetic"]()
    for talk in practice:
        right = talk["answers"][0]
        assert task.reward(talk, f"So:\n#### {right}") == 1 and task.reward(talk, f"#### {right}0") == 0
        assert task.evaluate(talk, f"It is {right}.") and task.reward(talk, f"It is {right}.") == 0, "another form"


@pytest.mark.parametrize("domain, answers, rivals, right, wrong", [
    ("countries", ["Paris"], ["Rome"], "The capital of France is Paris.", "The capital of France is Rome, not Paris."),
    ("countries", ["Guinea"], ["Guinea-Bissau"], "It is Guinea!", "It is Guinea-Bissau."),
    ("elements", ["a metal", "metal"], ["a halogen"], "Gold is metal.", "Gold is metallic."),
    ("arithmetic", ["563"], [], "345+218 = 345+218563563.\n#### 563", "#### 562"),
    ("arithmetic", ["1563"], [], "It is 1,563.", "1563, no, 15"),
    ("spelling", ["cat:c,a,t"], [], "cat:c,a,t", "cat:c,a,t,t"),
    ("honesty", ["I do not know"], ["Paris"], "I don't know Zorvania.", "I do not know. Perhaps Paris."),
    ("honesty", ["I do not know"], ["Paris"], "I do not know.", "Zorvania is nice."),
])
def test_evaluate_by_hand(domain, answers, rivals, right, wrong):
    task = TinyWorld.__new__(TinyWorld) # no data needed
    task.mode = "free"
    conversation = {"domain": domain, "answers": answers, "rivals": rivals}
    assert task.evaluate(conversation, right) and not task.evaluate(conversation, wrong)
    assert not task.evaluate(conversation, "")


def test_readers_of_numbers_spellings_and_words():
    assert last_number("none") is None and last_number("3 and -4.5") == last_number("-4.50")
    assert last_spelling("cat") is None and last_spelling("First c,a,t then D, O, G") == "d,o,g"
    assert mentions("The Red-Breast, a bird", "a bird") and not mentions("a red-breast", "red")

# -----------------------------------------------------------------------------
# The fact files

def test_fact_files_have_what_the_generator_needs():
    relations = facts.load_relations()
    assert len({relation.domain for relation in relations}) >= 15 and len({r.name for r in relations}) == len(relations)
    assert sum(len(relation.pairs) for relation in relations) >= 1000
    for relation in relations:
        assert len({x for x, _ in relation.pairs}) == len(relation.pairs), f"{relation.name}: y must follow from x"
        assert len(set(relation.statements)) >= 20 and len(set(relation.questions)) >= 20, relation.name
        assert len(relation.heldout_questions) >= 5 and len(relation.answers) >= 3 and len(relation.clozes) >= 1
        assert all("{x}" in text and "{y}" in text for text in [*relation.statements, relation.answers[0]])
        assert all("{x}" in text and "{y}" not in text for text in [*relation.questions, *relation.heldout_questions])
        assert all("{y}" in text for text in relation.answers)
    world = facts.World(60, seed=0, relations=relations)
    assert len(world.facts) == 60 and {"France", "gold", "hot"} & {fact.x for fact in world.facts}


def test_facts_of_ones_own_make_a_world(tmp_path):
    entry = {"name": "pet_of", "unique": True, "entity": "person", "value": "pet",
             "pairs": [[f"person {i}", f"pet {i}"] for i in range(30)], "statements": ["The pet of {x} is {y}."] * 2,
             "questions": ["Which pet has {x}?"], "heldout_questions": ["Name the pet of {x}."], "answers": ["{y}."]}
    (tmp_path / "pets.json").write_text(json.dumps({"domain": "pets", "relations": [entry]}))
    world = facts.World(20, seed=5, relations=facts.load_relations(tmp_path))
    assert [fact.x for fact in world.facts] == [f"person {i}" for i in range(20)]
    assert len(world.prose_only) == 2 and not set(world.prose_only) & set(world.open)
    assert world.facts[3].say("{y} belongs to {x}.") == "Pet 3 belongs to person 3."
