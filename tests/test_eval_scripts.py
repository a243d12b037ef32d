"""base_loss, base_eval, chat_eval and chat_cli on a tiny untrained model in a synthetic base directory."""
import csv
import io
import json
import os
import shutil
import signal
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
from nanochat.common import UserError, claim_base_dir, hub_mirror_dir, read_json
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.task_eval import Score
from nanochat.tokenizer import RustBPETokenizer
from nanochat.training import SAMPLE_PROMPTS
from scripts import base_eval, base_loss, chat_cli, chat_eval

TEXT = "the cat sat on the mat, the größe of 12*3 is 36 and the dog ate the hat; Multiple Choice question: A B C D. "


def write_rows(folder, rows):
    os.makedirs(folder, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), os.path.join(folder, "0000.parquet"))


def write_world(base):
    """Every kind of data that the scripts read, in small."""
    claim_base_dir("tinyworld", synthetic=True, validation_shard="shard_00001.parquet")
    os.makedirs(base / "base_data")
    for shard in range(2):
        texts = [TEXT * (1 + (i + shard) % 5) for i in range(40)]
        pq.write_table(pa.table({"text": texts}), base / "base_data" / f"shard_0000{shard}.parquet", row_group_size=10)
    (base / "eval_bundle" / "eval_data").mkdir(parents=True)
    items = [{"query": f"the {'cat dog'.split()[i % 2]}", "choices": ["sat", "ate"], "gold": i % 2} for i in range(10)]
    (base / "eval_bundle" / "eval_data" / "pets.jsonl").write_text("\n".join(map(json.dumps, items)))
    (base / "eval_bundle" / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": [
        {"label": "pets", "dataset_uri": "pets.jsonl", "num_fewshot": [2], "icl_task_type": "multiple_choice"}]}))
    (base / "eval_bundle" / "eval_meta_data.csv").write_text("Eval Task,Random baseline\npets,50\n")
    write_rows(hub_mirror_dir("nanochat/tinyworld", None, "test"), [{
        "question": "the cat?", "choices": ["mat", "hat", "dog", "sat"], "gold": i % 4,
        "domain": "animals" if i % 3 else "rooms",
        "messages_json": json.dumps([{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "mat"}]),
        "answer": ["mat"], "rivals": ["hat"]} for i in range(9)])
    write_rows(hub_mirror_dir("allenai/ai2_arc", "ARC-Easy", "test"), [{
        "question": f"the mat {i}", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[i % 3]} for i in range(6)])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base directory with data, a tokenizer and a model in the stages base and sft; tests must not write into it."""
    base = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        write_world(base)
        tokenizer = RustBPETokenizer.train_from_iterator([TEXT * 20], 320)
        tokenizer.save(str(base / "tokenizer"))
        torch.manual_seed(0)
        model = GPT(GPTConfig(sequence_len=48, vocab_size=tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2,
                              n_embd=32, window_pattern="SL"))
        model.init_weights()
        for stage in ("base", "sft"):
            save_checkpoint(checkpoint_dir(stage, "d2"), 7, model.state_dict(), None,
                            {"step": 7, "val_bpb": None, "model_config": asdict(model.config)}, tokenizer=tokenizer)
    return base


@pytest.fixture
def base_dir(world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def section(base, slug):
    """All dicts of a report section joined."""
    data = read_json(base / "report" / f"{slug}.json")["data"]
    return {key: value for part in data for key, value in part.items()}

# ---- base_loss and base_eval ----

def test_base_loss(base_dir, capsys):
    base_loss.main(["--device-type", "cpu", "--dtype", "float32", "--device-batch-size", "2", "--split-tokens", "200"])
    facts, out = section(base_dir, "base-model-loss"), capsys.readouterr().out
    assert 1 < facts["train bpb"] < 8 and 1 < facts["val bpb"] < 8 and facts["model"] == "base_model d2 (step 7)"
    assert out.count("train bpb:") == 1 and "(the first 192 tokens of the split)" in out # 2 batches of 2 x 48
    assert all(facts[f"sample {i}"].startswith(prompt) for i, prompt in enumerate(SAMPLE_PROMPTS))
    assert all(isinstance(facts[f"unconditioned sample {i}"], str) for i in range(8))


def test_base_loss_uses_at_least_one_row(base_dir, capsys):
    base_loss.main(["--device-type", "cpu", "--device-batch-size", "3", "--split-tokens", "1"])
    assert "the first 48 tokens" in capsys.readouterr().out


def test_base_eval(base_dir, capsys):
    base_eval.main(["--device-type", "cpu", "--step", "7", "--max-per-task", "4"])
    out = capsys.readouterr().out
    with open(base_dir / "base_eval" / "base_model_d2_000007.csv", newline="") as file:
        rows = list(csv.reader(file))
    accuracy = float(rows[1][1])
    assert rows[0] == ["Task", "Accuracy", "Centered"] and accuracy in (0, 0.25, 0.5, 0.75, 1)
    assert rows[1:] == [["pets", f"{accuracy:.6f}", f"{2 * accuracy - 1:.6f}"], ["CORE", "", f"{2 * accuracy - 1:.6f}"]]
    assert "pets (tinyworld) (2-shot" in out and "CORE on tinyworld, not the published tasks" in out
    facts = section(base_dir, "base-model-evaluation")
    assert facts["CORE metric"] == facts["pets"] == pytest.approx(2 * accuracy - 1) and facts["Examples per task"] == 4

# ---- chat_eval ----

CHAT_EVAL = ["-i", "sft", "--device-type", "cpu", "-m", "4"]


def test_chat_eval_takes_all_that_is_there_and_marks_it(base_dir, capsys):
    chat_eval.main(CHAT_EVAL)
    out = capsys.readouterr().out
    for name in ("ARC-Easy", "TinyWorld", "TinyWorld-Choice"):
        assert f"{name} (tinyworld) accuracy: " in out
    assert "    animals" in out and "    rooms" in out and "No ChatCORE: it needs all of ARC-Easy" in out
    results = read_json(base_dir / "chat_eval" / "sft_d2_000007.json")
    assert results["dataset"] == "tinyworld" and set(results["tasks"]) == {"ARC-Easy", "TinyWorld", "TinyWorld-Choice"}
    world = results["tasks"]["TinyWorld-Choice"]
    assert world["total"] == 9
    assert {name: group["total"] for name, group in world["groups"].items()} == {"animals": 6, "rooms": 3}
    assert world["interval_95"][0] < world["accuracy"] < world["interval_95"][1]
    facts = section(base_dir, "chat-evaluation-sft")
    assert facts["ARC-Easy"] == results["tasks"]["ARC-Easy"]["accuracy"] and "TinyWorld: rooms" in facts
    too_long = results["tasks"]["TinyWorld-Choice"]["too_long"] # context: 48 tokens
    assert too_long == facts["TinyWorld-Choice prompts longer than the context"] == 9
    assert "TinyWorld-Choice: 9 of 9 prompts exceed the model's context of 48 tokens, they are run whole" in out
    assert "ChatCORE metric" not in facts


def test_chat_eval_of_chosen_tasks_labels_pass_at_n(base_dir, capsys):
    chat_eval.main(CHAT_EVAL + ["-a", "TinyWorld|ARC-Easy", "-n", "3", "-t", "1.0", "-x", "2"])
    out = capsys.readouterr().out
    assert "TinyWorld (tinyworld) pass@3: 0.00 % (0/2, 95 % interval 0.00-65.76); pass@1: 0.00 %" in out
    assert "ARC-Easy (tinyworld) accuracy: " in out and "TinyWorld-Choice" not in out


def test_chat_eval_says_what_the_sandbox_cannot_enforce(base_dir, capsys, monkeypatch):
    write_rows(hub_mirror_dir("openai/openai_humaneval", None, "test"), [{
        "prompt": f"def f{i}(x):\n", "canonical_solution": "    return x\n", "entry_point": f"f{i}",
        "test": f"def check(candidate):\n    assert candidate({i}) == {i}\n"} for i in range(2)])
    monkeypatch.setattr(chat_eval, "sandbox_gaps", lambda: ["files: open"])
    chat_eval.main(CHAT_EVAL + ["-a", "HumanEval|ARC-Easy"])
    out = capsys.readouterr().out
    assert out.count("HumanEval's sandbox is not complete: files: open") == 1
    assert "HumanEval (tinyworld) accuracy: 0.00 % (0/2" in out
    chat_eval.main(CHAT_EVAL + ["-a", "ARC-Easy"])
    assert "sandbox" not in capsys.readouterr().out


def test_chat_eval_of_a_named_task_without_data_is_an_error(base_dir):
    with pytest.raises(UserError, match="synthetic data set tinyworld"):
        chat_eval.main(CHAT_EVAL + ["-a", "MMLU"])


def test_run_chat_eval(base_dir):
    model, tokenizer, _ = chat_eval.load_model("sft", "cpu", "eval")
    accuracy = chat_eval.run_chat_eval("ARC-Easy", model, tokenizer, chat_eval.Engine(model, tokenizer), batch_size=4)
    assert accuracy in [i / 6 for i in range(7)]


def test_chatcore_needs_its_six_tasks(monkeypatch, capsys):
    chance = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25, "GSM8K": 0.0, "HumanEval": 0.0, "SpellingBee": 0.0}
    monkeypatch.setattr(chat_eval, "EVALS", {name: SimpleNamespace(chance=value) for name, value in chance.items()})
    passed = zip(chance, [55, 40, 25, 10, 0, 100], strict=True)
    scores = {name: Score(count, 100, {}, count / 100) for name, count in passed}
    metrics = chat_eval.summarize(scores)
    assert metrics["ChatCORE metric"] == pytest.approx((0.4 + 0.2 + 0.0 + 0.1 + 0.0 + 1.0) / 6)
    assert metrics["ChatCORE without SpellingBee"] == pytest.approx((0.4 + 0.2 + 0.0 + 0.1 + 0.0) / 5)
    assert "SpellingBee): 0.2833" in capsys.readouterr().out
    del scores["MMLU"]
    assert set(chat_eval.summarize(scores)) == set(scores)

# ---- usage errors ----

@pytest.mark.parametrize("script, flags, message", [
    (base_loss, ["--split-tokens", "0", "--device-batch-size", "0"], "--device-batch-size must be at least 1, got 0"),
    (base_eval, ["--max-per-task", "0"], "--max-per-task must be at least 1, or -1 for all, got 0"),
    (chat_eval, ["-i", "sft", "-a", "GSM8K|Sudoku", "-x", "0"], "--max-problems must be at least 1, got 0; --task"),
    (chat_eval, ["-i", "sft", "-a", "Sudoku"], "got Sudoku"),
    (chat_eval, ["-i", "sft", "-t", "-1"], "--temperature must be at least 0, got -1.0"),
    (chat_eval, ["-i", "sft", "-t", "nan"], "--temperature must be at least 0, got nan"),
    (chat_eval, ["-i", "sft", "-n", "4"], "--num-samples 4 needs a --temperature above 0: greedy"),
    (chat_eval, ["-i", "pretrained"], "invalid choice: 'pretrained'"),
    (chat_cli, ["--max-tokens", "0", "-t", "-0.5"], "--max-tokens must be at least 1, got 0; --temperature"),
])
def test_usage_errors_come_before_any_work(script, flags, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        script.main(flags)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err

# ---- chat_cli ----

@pytest.fixture(scope="module")
def tokenizer(world):
    return RustBPETokenizer.from_directory(str(world / "tokenizer"))


class ScriptedModel:
    """Says the given ids, one list per answer, then assistant_end. The string "stop" in a list is a Ctrl-C."""
    def __init__(self, tokenizer, answers, sequence_len):
        self.config = SimpleNamespace(n_head=1, n_kv_head=1, n_embd=4, n_layer=1, sequence_len=sequence_len)
        self.tokenizer, self.answers, self.prompts, self.said = tokenizer, list(answers), [], []

    def get_device(self):
        return "cpu"

    def forward(self, ids, kv_cache=None):
        kv_cache.advance(ids.size(1))
        row = ids[0].tolist()
        if self.tokenizer.encode_special("<|assistant_start|>") in row[-1:]:
            self.said = self.answers.pop(0)
        token = self.said[0] if self.said else self.tokenizer.encode_special("<|assistant_end|>")
        self.said = self.said[1:]
        if token == "stop":
            os.kill(os.getpid(), signal.SIGINT)
            token = 0
        return 9 * torch.nn.functional.one_hot(torch.full(ids.shape, token), self.tokenizer.get_vocab_size()).float()


def make_chat(tokenizer, *answers, flags=(), sequence_len=48):
    """A chat, and the requests that it makes, as they are handed to the engine."""
    engine = Engine(ScriptedModel(tokenizer, answers, sequence_len), tokenizer)
    flags = ["--max-tokens", "16", "-t", "0", *flags]
    chat = chat_cli.Chat(engine, chat_cli.build_parser().parse_args(flags))
    requests, submit = [], chat.batch.submit
    chat.batch.submit = lambda request: (requests.append(request), submit(request))
    return chat, requests


def ids_of(tokenizer, *parts):
    """Specials by their name in angle brackets, everything else as text."""
    return [i for part in parts for i in
            ([tokenizer.encode_special(f"<|{part[1:-1]}|>")] if part[0] == "<" else tokenizer.encode(part))]


CALL = ["I say ", "<python_start>", "12*3", "<python_end>"]


@pytest.mark.parametrize("parts, shown, kept", [
    (["the größe"], "the größe", ["the größe"]),
    ([*CALL, "RESULT", " ok"], "I say [12*3 = 36] ok", [*CALL, "<output_start>", "36", "<output_end>", " ok"]),
    (["<python_start>", "<python_end>", "no"], "[]no", ["<python_start>", "<python_end>", "no"]),
    (["<python_start>", "cut", "<bos>"], "[cut]", ["<python_start>", "cut", "<python_end>"]),
    (["a", "<user_start>", "b", "<user_end>"], "a", ["a"]), # it must not speak for the user
])
def test_streamed_text_is_legible_and_kept_well_formed(tokenizer, capsys, parts, shown, kept):
    forced = ids_of(tokenizer, "<output_start>", "36", "<output_end>") # in their place the model's own do not count
    said = [i for part in parts for i in (forced if part == "RESULT" else ids_of(tokenizer, part))]
    chat, _ = make_chat(tokenizer, said, flags=["--max-tokens", "30"], sequence_len=99)
    chat.answer("hat")
    assert capsys.readouterr().out == f"Assistant: {shown}\n"
    assert chat.turns[1] == ids_of(tokenizer, "<assistant_start>", *kept, "<assistant_end>")


def test_characters_cut_at_the_end_are_shown_as_such(tokenizer, capsys):
    make_chat(tokenizer, list("hé".encode())[:-1])[0].answer("hat")
    assert capsys.readouterr().out == "Assistant: h�\n"


@pytest.mark.parametrize("ending", ["<assistant_end>", "<bos>", None, "stop"])
def test_however_an_answer_ends_the_next_prompt_is_well_formed(tokenizer, capsys, ending):
    said = ids_of(tokenizer, "the cat sat")
    end = [] if ending is None else [ending] if ending == "stop" else ids_of(tokenizer, ending)
    chat, requests = make_chat(tokenizer, said + end + ids_of(tokenizer, "never"), [], sequence_len=99)
    if ending is None:
        chat.args.max_tokens = len(said) # cut off by the limit
    before = signal.getsignal(signal.SIGINT)
    chat.answer("hat" * 9)
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().out.replace("\0", "") == "Assistant: the cat sat\n"
    chat.answer("dog")
    turn = ["<user_start>", "hat" * 9, "<user_end>", "<assistant_start>", "the cat sat"]
    turn_ids = ids_of(tokenizer, *turn) + [0] * (ending == "stop") + ids_of(tokenizer, "<assistant_end>")
    opening = ["<user_start>", "dog", "<user_end>", "<assistant_start>"]
    assert requests[1].prompt == ids_of(tokenizer, "<bos>") + turn_ids + ids_of(tokenizer, *opening)
    assert requests[1].cached_tokens >= len(requests[0].prompt) + len(said) - 1 # read and said before: not read again
    assert requests[0].rng.initial_seed() != requests[1].rng.initial_seed()


def test_oldest_turns_are_dropped_and_it_says_so(tokenizer, capsys):
    chat, requests = make_chat(tokenizer, *[ids_of(tokenizer, "the")] * 12)
    for _ in range(12):
        chat.answer("cat")
    assert max(len(request.prompt) for request in requests) <= 48 - 16
    assert all(request.prompt[:2] == ids_of(tokenizer, "<bos>", "<user_start>") for request in requests)
    assert "(forgetting the oldest 1 turn(s): the context of 48 tokens is full)" in capsys.readouterr().out
    turns = list(chat.turns)
    with pytest.raises(UserError, match="this message has 64 tokens, but the context of the model holds 48"):
        chat.answer("q" * 60)
    assert chat.turns == turns


def test_an_answer_that_breaks_is_told_and_forgotten(tokenizer, capsys):
    chat, _ = make_chat(tokenizer, ids_of(tokenizer, "sat"), ids_of(tokenizer, "the"))
    forward = chat.batch.model.forward
    chat.batch.model.forward = lambda ids, kv_cache: forward(ids, kv_cache) * (1 if ids.size(1) > 1 else float("nan"))
    with pytest.raises(UserError, match="the logits are not finite"):
        chat.answer("cat")
    assert capsys.readouterr().out.startswith("Assistant: s") and chat.turns == []
    chat.batch.model.forward = forward
    chat.answer("cat")
    assert capsys.readouterr().out == "Assistant: the\n" and len(chat.turns) == 2


def test_an_answer_never_leaves_the_context(tokenizer):
    chat, requests = make_chat(tokenizer, ids_of(tokenizer, "the") * 200, flags=["--max-tokens", "1000"])
    chat.answer("cat")
    assert len(requests[0].prompt) + len(requests[0].tokens) - 1 == 48 and requests[0].finish_reason == "length"


def type_in(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.mark.parametrize("last", ["quit", "EXIT", None])
def test_commands(tokenizer, monkeypatch, capsys, last):
    chat, requests = make_chat(tokenizer, *[ids_of(tokenizer, "sat")] * 3)
    type_in(monkeypatch, "cat", "", "q" * 60, "Clear", "dog", *([last] if last else []))
    chat_cli.talk(chat)
    out = capsys.readouterr().out
    assert "User: cat\nAssistant: sat\n" in out and "(a new conversation)" in out and out.endswith("Goodbye!\n")
    assert "(this message has" in out # the session goes on
    assert requests[1].prompt == ids_of(tokenizer, "<bos>", "<user_start>", "dog", "<user_end>", "<assistant_start>")


@pytest.mark.parametrize("prompt", ["the cat", "clear", "quit"])
def test_one_prompt_gives_one_answer_and_is_no_command(base_dir, capsys, prompt):
    outs = []
    for _ in range(2):
        chat_cli.main(["-p", prompt, "--seed", "3", "--max-tokens", "8", "-t", "1", "--device-type", "cpu"])
        outs.append(capsys.readouterr().out)
    assert "Assistant: " in outs[0] and "User" not in outs[0] and "<|" not in outs[0]
    assert outs[0] == outs[1] # with a seed
