"""Scores of chat models: counting, batching that changes nothing, ranks that share the work, intervals."""
import math
import random

import pytest
import torch

from nanochat import task_eval
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.task_eval import Score, evaluate_categorical, evaluate_generative, wilson_interval

V, BOS = 263, 256


class ByteTokenizer:
    SPECIAL = ["<|bos|>", "<|assistant_start|>", "<|assistant_end|>", "<|python_start|>", "<|python_end|>",
               "<|output_start|>", "<|output_end|>"]

    def encode_special(self, text):
        return BOS + self.SPECIAL.index(text)

    def get_bos_token_id(self):
        return BOS

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return "".join(chr(i) if i < BOS else self.SPECIAL[i - BOS] for i in ids)

    def render_for_completion(self, conversation, max_tokens=2048):
        return [BOS, *self.encode(conversation["messages"][0]["content"]), BOS + 1]


class ListTask:
    """Conversations from a list; an answer is right when it equals the reference."""
    def __init__(self, conversations):
        self.conversations = conversations

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, index):
        return self.conversations[index]

    def evaluate(self, conversation, completion):
        return completion == conversation["messages"][-1]["content"]


def conversation(question, answer, **extra):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **extra}


class Oracle:
    """An engine whose k-th sample for a prompt is the k-th of the answers it was given for that question."""
    def __init__(self, answers):
        self.answers, self.calls, self.model = answers, [], self

    def get_device(self):
        return "cpu"

    def generate_many(self, prompts, num_samples, **settings):
        self.calls.append((prompts, settings))
        questions = [bytes(prompt[1:-1]).decode() for prompt in prompts]
        chosen = [self.answers[question][:num_samples] for question in questions]
        return [[(list(answer.encode()), None) for answer in answers] for answers in chosen]


GENERATIVE = ListTask([
    conversation("a", "1", domain="letters"), conversation("bb", "2", domain="pairs"),
    conversation("c", "3", domain="letters"), conversation("dd", "4"), conversation("e", "5", subject="vowels")])
ANSWERS = {"a": ["1", "x"], "bb": ["x", "2"], "c": ["x", "x"], "dd": ["4", "4"], "e": ["x", "5"]}


@pytest.mark.parametrize("num_samples, expected", [
    (1, Score(2, 5, {"letters": (1, 2), "pairs": (0, 1), "vowels": (0, 1)}, 0.4)),
    (2, Score(4, 5, {"letters": (1, 2), "pairs": (1, 1), "vowels": (1, 1)}, 0.5))]) # any right sample solves a problem
def test_generative_counts(num_samples, expected):
    score = evaluate_generative(GENERATIVE, ByteTokenizer(), Oracle(ANSWERS), num_samples=num_samples)
    assert score == expected and score.accuracy == expected.passed / 5


def test_generative_settings_reach_the_engine_and_every_problem_has_its_own_seed():
    engine = Oracle(ANSWERS)
    score = evaluate_generative(GENERATIVE, ByteTokenizer(), engine, max_new_tokens=7, temperature=0.5, top_k=3,
                                max_problems=4, batch_size=1, seed=10)
    assert score.total == 4
    (prompts, settings), = engine.calls
    assert prompts[1] == [BOS, 98, 98, BOS + 1]
    assert settings == {"max_tokens": 7, "temperature": 0.5, "top_k": 3, "seed": [10, 11, 12, 13], "batch_size": 1}


def random_gpt():
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=24, vocab_size=V, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="SL")
    model = GPT(config, pad_vocab_size_to=1)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return model.double()


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_generative_answers_do_not_depend_on_the_batch(batch_size):
    tokenizer, model = ByteTokenizer(), random_gpt()
    engine = Engine(model, tokenizer)
    rng = random.Random(0)
    questions = ["".join(rng.choices("abc", k=rng.randrange(30))) for _ in range(13)]
    settings = {"temperature": 1.0, "top_k": 5}

    def answer(i):
        prompt = tokenizer.render_for_completion(conversation(questions[i], ""))
        (ids,), _ = engine.generate_batch(prompt, max_tokens=6, seed=42 + i, **settings)
        return tokenizer.decode(ids[len(prompt):])

    task = ListTask([conversation(questions[i], answer(i) if i % 2 else "no such answer") for i in range(13)])
    score = evaluate_generative(task, tokenizer, engine, max_new_tokens=6, batch_size=batch_size, **settings)
    too_long = sum(len(question) + 2 > 24 for question in questions)
    assert score == Score(6, 13, {}, pytest.approx(6 / 13), too_long) and too_long > 1


def choice_task(n=30, seed=0):
    rng = random.Random(seed)
    conversations = []
    for i in range(n):
        letters = list("ABCDE")[:rng.randint(3, 5)] if i % 5 else list("1234")
        question = "".join(rng.choices("xyz ", k=rng.randrange(40)))
        conversations.append(conversation(question, rng.choice(letters), letters=letters, subject=f"subject {i % 3}"))
    return ListTask(conversations)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_categorical_equals_one_prompt_at_a_time(batch_size):
    task, tokenizer, model = choice_task(), ByteTokenizer(), random_gpt()
    groups = {f"subject {k}": [0, 10] for k in range(3)}
    for item in task.conversations:
        logits = model(torch.tensor([tokenizer.render_for_completion(item)]))[0, -1].tolist()
        chosen = max(item["letters"], key=lambda letter: logits[ord(letter)])
        groups[item["subject"]][0] += chosen == item["messages"][-1]["content"]
    score = evaluate_categorical(task, tokenizer, model, batch_size=batch_size)
    assert score.groups == {name: tuple(counts) for name, counts in groups.items()}
    assert score.too_long == sum(len(item["messages"][0]["content"]) + 2 > 24 for item in task.conversations) > 5
    assert (score.passed, score.total) == (sum(passed for passed, _ in groups.values()), 30) and 0 < score.passed < 30


def test_categorical_forwards_hold_no_more_than_the_batch_size():
    model, shapes = random_gpt(), []
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    evaluate_categorical(choice_task(), ByteTokenizer(), model, batch_size=8)
    rows, widths = zip(*shapes, strict=True)
    assert rows == (8, 8, 8, 6) and list(widths) == sorted(widths) # like goes with like


def test_a_letter_must_be_one_token():
    task = ListTask([conversation("q", "AB", letters=["AB", "C"])])
    with pytest.raises(ValueError, match="letter 'AB' must be one token, got 2"):
        evaluate_categorical(task, ByteTokenizer(), random_gpt())


@pytest.mark.parametrize("task, max_problems, message", [
    (GENERATIVE, 0, "max_problems must be at least 1, got 0"), (ListTask([]), None, "ListTask has no problems")])
def test_nothing_to_evaluate(task, max_problems, message):
    with pytest.raises(ValueError, match=message):
        evaluate_generative(task, ByteTokenizer(), Oracle({}), max_problems=max_problems)


def test_ranks_share_the_problems_and_all_get_the_totals(monkeypatch):
    """Two ranks one after the other: the first pass records what each would send, the second adds it up."""
    alone = evaluate_generative(GENERATIVE, ByteTokenizer(), Oracle(ANSWERS))
    monkeypatch.setattr(task_eval, "is_ddp_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    sent = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: sent.append(tensor.clone()))
        engine = Oracle(ANSWERS)
        evaluate_generative(GENERATIVE, ByteTokenizer(), engine, seed=0)
        assert engine.calls[0][1]["seed"] == list(range(rank, 5, 2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.copy_(sent[0] + sent[1]))
    assert evaluate_generative(GENERATIVE, ByteTokenizer(), Oracle(ANSWERS)) == alone


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, capsys):
    evaluate_generative(GENERATIVE, ByteTokenizer(), Oracle(ANSWERS), label="quick")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(task_eval, "SECONDS_BETWEEN_LINES", 0)
    evaluate_generative(GENERATIVE, ByteTokenizer(), Oracle(ANSWERS), label="slow")
    assert capsys.readouterr().out == "slow: 5/5 problems, 40.0% right so far\n"


@pytest.mark.parametrize("passed, total, low, high", [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634),
    (81, 263, 0.2553, 0.3662)]) # the last one: Newcombe 1998, table I
def test_wilson_interval(passed, total, low, high):
    assert wilson_interval(passed, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_solves_its_equation():
    """The bounds are the rates p from which the observed one is z standard errors away."""
    for passed, total in [(3, 40), (299, 300), (1, 2)]:
        for p in wilson_interval(passed, total):
            assert abs(passed / total - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / total))
