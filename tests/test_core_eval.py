"""
CORE against a naive reference: one prompt at a time, float64, written from the definition of the metric.

Set NANOCHAT_TEST_DATA to a folder that holds a real `eval_bundle` to run the last test on it.
"""
import csv
import http.server
import json
import math
import os
import random
import threading
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from dev import bench_eval
from nanochat import core_eval
from nanochat.common import UserError, claim_base_dir
from nanochat.core_eval import (batch_sequences_lm, batch_sequences_mc, batch_sequences_schema, evaluate_example,
                                evaluate_model, evaluate_task, find_common_length, forward_model, render_prompts_lm,
                                render_prompts_mc, render_prompts_schema, stack_sequences)
from nanochat.gpt import GPT, GPTConfig

BOS = 0


class CharTokenizer:
    """One id per character; `merges` are pairs of characters that become one id. bos = 0."""
    def __init__(self, merges=()):
        self.merges = {pair: 200 + i for i, pair in enumerate(merges)}

    def get_bos_token_id(self):
        return BOS

    def encode_one(self, text):
        ids, i = [], 0
        while i < len(text):
            pair = text[i:i + 2]
            ids.append(self.merges.get(pair) or 1 + ord(text[i]) % 199)
            i += 2 if pair in self.merges else 1
        return ids

    def __call__(self, texts, prepend):
        return [[prepend] + self.encode_one(text) for text in texts]


class TinyModel(torch.nn.Module):
    """Logits from the mean of the embeddings so far and of the last one: causal, quick, sensitive to every token."""
    def __init__(self, seed=0, vocab_size=256, max_seq_len=None):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.table = torch.randn(vocab_size, 16, generator=rng, dtype=torch.float64)
        self.head = torch.randn(16, vocab_size, generator=rng, dtype=torch.float64)
        self.max_seq_len, self.shapes = max_seq_len, []

    def forward(self, ids):
        self.shapes.append(tuple(ids.shape))
        assert self.max_seq_len is None or ids.size(1) <= self.max_seq_len
        x = self.table[ids]
        steps = torch.arange(1, ids.size(1) + 1, dtype=torch.float64)[:, None]
        return torch.tanh(x.cumsum(1) / steps.sqrt() + 0.5 * x) @ self.head


# ---- the reference ----

def reference(idx, model, tokenizer, data, meta):
    """Right or wrong, straight from the definition."""
    d, kind, item = meta["continuation_delimiter"], meta["task_type"], data[idx]
    others = [i for i in range(len(data)) if i != idx]
    shots = [data[i] for i in random.Random(1234 + idx).sample(others, meta["num_fewshot"])]
    if kind == "multiple_choice":
        head = "".join(f"{s['query']}{d}{s['choices'][s['gold']]}\n\n" for s in shots)
        prompts = [f"{head}{item['query']}{d}{choice}" for choice in item["choices"]]
    elif kind == "schema":
        head = "".join(f"{s['context_options'][s['gold']]}{d}{s['continuation']}\n\n" for s in shots)
        prompts = [f"{head}{option}{d}{item['continuation']}" for option in item["context_options"]]
    else:
        head = "".join(f"{s['context'].strip()}{d}{s['continuation']}\n\n" for s in shots)
        without = f"{head}{item['context'].strip()}{d}"
        prompts = [without.strip(), without + item["continuation"]]
    tokens = tokenizer(prompts, prepend=BOS)
    if kind == "language_modeling":
        start = len(os.path.commonprefix(tokens))
        losses, predictions = run_alone(model, tokens[1])
        start = max(1, min(start, len(tokens[1]) - 1))
        return all(predictions[p - 1] == tokens[1][p] for p in range(start, len(tokens[1])))
    means = []
    for sequence in tokens:
        if kind == "multiple_choice":
            start = min(len(os.path.commonprefix(tokens)), min(map(len, tokens)) - 1)
        else:
            start = len(sequence) - len(os.path.commonprefix([t[::-1] for t in tokens]))
            start = start if start < len(sequence) else len(sequence) - 1
        losses, _ = run_alone(model, sequence)
        span = [losses[p - 1] for p in range(max(1, start), len(sequence))]
        means.append(sum(span) / len(span))
    return means.index(min(means)) == item["gold"]


def run_alone(model, tokens):
    """Losses in nats and argmax predictions of one sequence, cropped from the left where the model has a limit."""
    limit = getattr(model, "max_seq_len", None) or len(tokens)
    missing = max(0, len(tokens) - limit)
    logits = model(torch.tensor([tokens[missing:]]))[0].double()
    logp = logits - logits.exp().sum(-1, keepdim=True).log()
    losses = [-logp[p, token].item() for p, token in enumerate(tokens[missing + 1:])]
    return [math.nan] * missing + losses, [None] * missing + logits.argmax(-1).tolist()

# ---- data ----

def make_data(kind, n=40, seed=0):
    rng = random.Random(seed)
    def words(low, high):
        return " ".join("".join(rng.choices("abcde", k=rng.randint(1, 4))) for _ in range(rng.randint(low, high)))
    items = []
    for _ in range(n):
        options = [words(1, 5) for _ in range(rng.randint(2, 5))]
        gold = rng.randrange(len(options))
        items.append({"multiple_choice": {"query": words(1, 12), "choices": options, "gold": gold},
                      "schema": {"context_options": options, "continuation": words(1, 4), "gold": gold},
                      "language_modeling": {"context": f" {words(1, 12)} ", "continuation": rng.choice("abc ")}}[kind])
    return items


def make_meta(kind, num_fewshot=0, delimiter=" ", label="a-task"):
    return {"task_type": kind, "num_fewshot": num_fewshot, "continuation_delimiter": delimiter, "label": label}


KINDS = ["multiple_choice", "schema", "language_modeling"]

# ---- prompts and spans ----

MC = {"query": "2+2=", "choices": ["3", "4"], "gold": 1}
SCHEMA = {"context_options": ["Ann fell as Ann", "Ann fell as Bob"], "continuation": "ran. ", "gold": 0}
LM = {"context": " one two\n", "continuation": " three "}


@pytest.mark.parametrize("render, item, shot, expected", [
    (render_prompts_mc, MC, {"query": "{{q}}", "choices": [" x ", "y"], "gold": 0},
     ["{{q}}:  x \n\n2+2=: 3", "{{q}}:  x \n\n2+2=: 4"]),
    (render_prompts_schema, SCHEMA, {"context_options": ["A", "B"], "continuation": "c", "gold": 1},
     ["B: c\n\nAnn fell as Ann: ran. ", "B: c\n\nAnn fell as Bob: ran. "]),
    (render_prompts_lm, LM, {"context": "\t<a> ", "continuation": "b\n"},
     ["<a>: b\n\n\none two:", "<a>: b\n\n\none two:  three "]),
])
def test_prompts(render, item, shot, expected):
    assert render(item, ": ", [shot]) == expected
    assert render(item, ": ") == [prompt.split("\n\n")[-1].lstrip("\n") for prompt in expected]


def test_common_length():
    a, b, c = [1, 2, 3, 4], [1, 2, 5, 4], [1, 2]
    assert find_common_length([a, b], "left") == 2 and find_common_length([a, b], "right") == 1
    assert find_common_length([a, c], "left") == 2 and find_common_length([a, c], "right") == 0
    assert find_common_length([a, a], "right") == 4


def test_spans():
    tokenizer = CharTokenizer()
    assert batch_sequences_mc(tokenizer, ["ab cd", "ab xyz"])[1:] == ([4, 4], [6, 7])
    assert batch_sequences_schema(tokenizer, ["ab so", "abc so"])[1:] == ([3, 4], [6, 7]) # they share " so"
    tokens, starts, ends = batch_sequences_lm(tokenizer, ["ab", "ab cd"])
    assert (len(tokens), starts, ends) == (1, [3], [6])


def test_spans_are_never_empty_and_never_score_the_first_token():
    tokenizer = CharTokenizer()
    assert batch_sequences_mc(tokenizer, ["ab", "abc", "abd"])[1:] == ([2, 2, 2], [3, 4, 4]) # "ab" begins all of them
    assert batch_sequences_mc(tokenizer, ["ab", "ab"])[1] == [2, 2]
    assert batch_sequences_schema(tokenizer, ["ab", "cd"])[1] == [2, 2]          # no common suffix: the last token
    assert batch_sequences_schema(tokenizer, ["ab", "ab"])[1] == [1, 1]          # all is suffix, bos included
    assert batch_sequences_lm(tokenizer, ["ab", "ab"])[1] == [2]                 # an empty continuation
    merging = CharTokenizer(merges=["bc"])
    assert batch_sequences_lm(merging, ["ab", "abcd"])[1:] == ([2], [4])         # "bc" is one token over the border


def test_stack_sequences():
    stacked = stack_sequences([[1, 2, 3], [4]], 9)
    assert stacked.tolist() == [[1, 2, 3], [4, 9, 9]] and stacked.dtype == torch.int64


def test_forward_model():
    model, ids = TinyModel(), torch.randint(0, 256, (3, 7), generator=torch.Generator().manual_seed(0))
    losses, predictions = forward_model(model, ids)
    assert losses.shape == predictions.shape == (3, 7) and losses[:, -1].isnan().all()
    for row in range(3):
        expected, argmax = run_alone(model, ids[row].tolist())
        assert losses[row, :-1].tolist() == pytest.approx(expected, rel=1e-5) and predictions[row].tolist() == argmax


def test_few_shot_examples_are_those_of_the_published_metric():
    assert core_eval._fewshot_indices(3, 20, 5) == [5, 13, 10, 8, 4]
    for n, idx, k in [(20, 0, 19), (300, 299, 10), (4, 2, 1)]:
        population = [i for i in range(n) if i != idx]
        assert core_eval._fewshot_indices(idx, n, k) == random.Random(1234 + idx).sample(population, k)

# ---- scores ----

@pytest.mark.parametrize("num_fewshot, delimiter", [(0, " "), (3, "\nAnswer: ")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 150, 100_000])
def test_batched_scores_equal_the_reference(monkeypatch, kind, num_fewshot, delimiter, budget):
    monkeypatch.setattr(core_eval, "TOKENS_PER_FORWARD", budget)
    monkeypatch.setattr(core_eval, "ITEMS_AT_ONCE", 16)
    model, tokenizer = TinyModel(), CharTokenizer(merges=["ab", " c"])
    data, meta = make_data(kind), make_meta(kind, num_fewshot, delimiter)
    expected = [reference(i, model, tokenizer, data, meta) for i in range(len(data))]
    assert 0 < sum(expected) < len(expected) or kind == "language_modeling"
    model.shapes.clear()
    assert evaluate_task(model, tokenizer, data, "cpu", meta) == pytest.approx(sum(expected) / len(expected))
    assert all(rows * width <= max(budget, width) for rows, width in model.shapes)
    assert [evaluate_example(i, model, tokenizer, data, "cpu", meta) for i in range(len(data))] == expected


@pytest.mark.parametrize("continuation, right",
                         [("d", True), ("def", True), ("e", False), ("dff", False), ("dee", False)])
def test_language_modeling_is_right_when_greedy_decoding_says_it(continuation, right):
    def alphabet(ids): # the likeliest next character is the next one of the alphabet
        return torch.nn.functional.one_hot((ids + 1) % 256, 256).float()
    data = [{"context": "abc", "continuation": continuation}]
    meta = make_meta("language_modeling", delimiter="")
    assert evaluate_example(0, alphabet, CharTokenizer(), data, "cpu", meta) is right


def real_model(dtype=torch.float64):
    torch.manual_seed(1)
    config = GPTConfig(sequence_len=32, vocab_size=256, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="S")
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return model.to(dtype)


@pytest.mark.parametrize("min_shared, budget, dtype, tolerance", [
    (1, 1, torch.float64, 1e-9), (32, 500, torch.float64, 1e-9), (10**6, 1, torch.float64, 1e-9),
    (32, 500, torch.float32, 1e-5),
])
@pytest.mark.parametrize("kind", KINDS)
def test_the_real_model_with_shared_prefixes_and_beyond_its_context(monkeypatch, kind, min_shared, budget, dtype,
                                                                    tolerance):
    monkeypatch.setattr(core_eval, "TOKENS_PER_FORWARD", budget)
    monkeypatch.setattr(core_eval, "MIN_SHARED_TOKENS", min_shared)
    model, tokenizer, data, meta = real_model(dtype), CharTokenizer(), make_data(kind, n=12), make_meta(kind, 4)
    items = [core_eval._prepare(i, model, tokenizer, data, meta) for i in range(len(data))]
    tokens_run, logits_at = [], model.logits_at
    monkeypatch.setattr(model, "logits_at", lambda ids, *args: tokens_run.append(ids.numel()) or logits_at(ids, *args))
    scores = core_eval._run_items(items, model, tokenizer, "cpu")
    for sequence in {sequence for item in items for sequence in item}:
        losses, argmax = run_alone(model, list(sequence.tokens))
        span = slice(sequence.start - 1, sequence.end - 1)
        assert scores[sequence][0] == pytest.approx(sum(losses[span]) / len(losses[span]), rel=tolerance)
        assert scores[sequence][1] == (argmax[span] == list(sequence.tokens[sequence.start:sequence.end]))
    if budget == 1 and kind != "language_modeling": # one item at a time: few tokens are padding
        whole = sum(len(sequence.tokens) for item in items for sequence in set(item))
        assert sum(tokens_run) < 0.7 * whole if min_shared == 1 else sum(tokens_run) == whole
    expected = [reference(i, model, tokenizer, data, meta) for i in range(len(data))]
    assert evaluate_task(model, tokenizer, data, "cpu", meta) == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_long_prompts_keep_their_end(kind):
    model, data, meta = TinyModel(max_seq_len=48), make_data(kind), make_meta(kind, num_fewshot=5)
    expected = [reference(i, model, CharTokenizer(), data, meta) for i in range(len(data))]
    assert evaluate_task(model, CharTokenizer(), data, "cpu", meta) == pytest.approx(sum(expected) / len(expected))


def test_a_span_that_fills_the_window_loses_its_first_token_and_a_longer_one_is_refused():
    data = [{"query": "q", "choices": ["abcdefg", "b"], "gold": 0}]
    meta = make_meta("multiple_choice", delimiter="")
    assert core_eval._prepare(0, TinyModel(max_seq_len=7), CharTokenizer(), data, meta)[0].start == 1
    with pytest.raises(ValueError, match="item 0: 7 scored tokens do not fit into 6 positions"):
        evaluate_task(TinyModel(max_seq_len=6), CharTokenizer(), data, "cpu", meta)


def test_ties_go_to_the_first_and_nan_never_wins():
    data = [{"query": "q", "choices": ["x", "x", "xx"], "gold": gold} for gold in range(3)]
    meta = make_meta("multiple_choice")
    equal = TinyModel()
    equal.head.zero_()
    assert [evaluate_example(i, equal, CharTokenizer(), data, "cpu", meta) for i in range(3)] == [True, False, False]

    class NanAfterA(TinyModel):
        def forward(self, ids):
            return torch.where((ids == 1 + ord("a")).cumsum(1).bool()[..., None], math.nan, super().forward(ids))
    data = [{"query": "q", "choices": ["abab", "b"], "gold": gold} for gold in range(2)]
    assert [evaluate_example(i, NanAfterA(), CharTokenizer(), data, "cpu", meta) for i in range(2)] == [False, True]


def test_max_examples_cuts_what_is_scored_but_not_the_examples_shown():
    model, data, meta = TinyModel(), make_data("multiple_choice"), make_meta("multiple_choice", num_fewshot=10)
    expected = [reference(i, model, CharTokenizer(), data, meta) for i in range(3)]
    assert evaluate_task(model, CharTokenizer(), data, "cpu", meta, max_examples=3) == pytest.approx(sum(expected) / 3)


def test_merged_borders_are_reported(capsys):
    data = [{"context": "ab", "continuation": "cd"}, {"context": "ab", "continuation": "dd"}]
    meta = make_meta("language_modeling", delimiter="")
    evaluate_task(TinyModel(), CharTokenizer(merges=["bc"]), data, "cpu", meta)
    assert "a-task: in 50.0% of the items" in capsys.readouterr().out


@pytest.mark.parametrize("model, words", [
    (TinyModel(max_seq_len=12), "a-task: in 2 of 3 items a prompt exceeds the model's context of 12 tokens, its begin"),
    (real_model(), "a-task: in 1 of 3 items a prompt exceeds the model's context of 32 tokens, it is run whole"),
    (TinyModel(), None),
])
def test_prompts_that_are_too_long_are_reported(capsys, model, words):
    data = [{"query": "q" * length, "choices": ["a", "bb"], "gold": 0} for length in (8, 9, 30)] # + bos, blank, choice
    evaluate_task(model, CharTokenizer(), data, "cpu", make_meta("multiple_choice"))
    printed = capsys.readouterr().out
    assert words in printed if words else not printed

# ---- bad data ----

@pytest.mark.parametrize("kind, change, message", [
    ("multiple_choice", {"query": None}, "CORE task a-task, item 1.*the field 'query' is missing"),
    ("multiple_choice", {"gold": 9}, "item 1.*gold must be an index into . choices, got 9"),
    ("schema", {"continuation": None}, "item 1.*'continuation' is missing, there are only 'context_options', 'gold'"),
    ("language_modeling", {"context": None}, "item 1.*'context' is missing"),
    ("multiple_choice", {"query": 5}, "CORE task a-task, item 1: .*int"),
])
def test_broken_items_are_named(kind, change, message):
    data = make_data(kind, n=5)
    data[1] = {key: value for key, value in {**data[1], **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        evaluate_task(TinyModel(), CharTokenizer(), data, "cpu", make_meta(kind))


@pytest.mark.parametrize("meta, message", [
    (make_meta("multiple_choice", num_fewshot=5), "5 few-shot examples are asked for, there are only 4 other"),
    (make_meta("essay"), "task_type must be one of multiple_choice, schema, language_modeling, got 'essay'"),
])
def test_impossible_tasks_are_refused(meta, message):
    with pytest.raises(ValueError, match=message):
        evaluate_task(TinyModel(), CharTokenizer(), make_data("multiple_choice", n=5), "cpu", meta)

# ---- the bundle ----

def write_bundle(folder):
    """A bundle with one task of each kind; returns {label: data as in the file}."""
    (folder / "eval_data").mkdir(parents=True)
    tasks, data = [], {}
    for kind in KINDS:
        data[kind] = make_data(kind, n=15, seed=7)
        (folder / "eval_data" / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, data[kind])) + "\n")
        tasks.append({"label": kind, "dataset_uri": f"{kind}.jsonl", "num_fewshot": [2], "icl_task_type": kind,
                      "has_categories": True})
    tasks[0]["continuation_delimiter"] = "\nAnswer: "
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": tasks}))
    with open(folder / "eval_meta_data.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Eval Task", "Task Category", "Random baseline"])
        writer.writerows([*zip(KINDS, "xyz", [30, 50, 0], strict=True), ["other", "", 1]])
    return data


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("max_per_task", [-1, 4])
def test_the_metric_is_the_mean_of_centred_accuracies(base_dir, capsys, max_per_task):
    files, model, tokenizer = write_bundle(base_dir / "eval_bundle"), TinyModel(), CharTokenizer()
    out = evaluate_model(model, tokenizer, "cpu", max_per_task)
    centered = []
    for kind, baseline in zip(KINDS, [0.3, 0.5, 0.0], strict=True):
        data = list(files[kind])
        random.Random(1337).shuffle(data)
        meta = make_meta(kind, 2, "\nAnswer: " if kind == "multiple_choice" else " ")
        right = [reference(i, model, tokenizer, data, meta) for i in range(15 if max_per_task < 0 else max_per_task)]
        assert out["results"][kind] == pytest.approx(sum(right) / len(right))
        centered.append((sum(right) / len(right) - baseline) / (1 - baseline))
        assert out["centered_results"][kind] == pytest.approx(centered[-1])
    assert out["core_metric"] == pytest.approx(sum(centered) / 3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{kind} (2-shot, {kind})" for kind in KINDS]


def test_the_benchmark_compares_both_sides(tmp_path, capsys):
    write_bundle(tmp_path)
    flags = "--vocab-size 300 --depth 1 --seq-len 64 --examples 2 --prompts 3 --new-tokens 4".split()
    bench_eval.main(["--bundle", str(tmp_path), *flags])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ratio"] > 0 and set(result["ratios"]) == {*KINDS, "sampling"}
    assert result["different_predictions"] == result["different_samples"] == 0
    assert result["largest_loss_difference"] < 1e-4


def test_scores_on_synthetic_data_are_marked(base_dir, capsys):
    claim_base_dir("tinyworld", synthetic=True)
    write_bundle(base_dir / "eval_bundle")
    evaluate_model(TinyModel(), CharTokenizer(), "cpu", 1)
    assert all(" (tinyworld) (2-shot" in line for line in capsys.readouterr().out.splitlines())


def test_a_synthetic_base_directory_never_downloads(base_dir):
    claim_base_dir("tinyworld", synthetic=True)
    with pytest.raises(UserError, match="generate the data set tinyworld again"):
        evaluate_model(TinyModel(), CharTokenizer(), "cpu")


@pytest.fixture
def bundle_server(tmp_path_factory, monkeypatch):
    """Serves eval_bundle.zip on the loopback interface; yields the path of the served file and the list of requests."""
    folder, requests = tmp_path_factory.mktemp("server"), []
    write_bundle(folder / "eval_bundle")
    with zipfile.ZipFile(folder / "eval_bundle.zip", "w") as archive:
        for path in sorted((folder / "eval_bundle").rglob("*")):
            archive.write(path, path.relative_to(folder))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(core_eval, "BUNDLE_URL", f"http://127.0.0.1:{server.server_port}/eval_bundle.zip")
        yield folder / "eval_bundle.zip", requests
        server.shutdown()
        thread.join()


def test_the_bundle_is_fetched_once_and_unpacked_again_when_lost(base_dir, bundle_server):
    _, requests = bundle_server
    for _ in range(2):
        folder = Path(core_eval.get_eval_bundle())
        assert sorted(path.name for path in folder.iterdir()) == ["core.yaml", "eval_data", "eval_meta_data.csv"]
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    assert Path(core_eval.get_eval_bundle(), "core.yaml").exists() and len(requests) == 1
    assert {path.name for path in base_dir.iterdir()} <= {"eval_bundle", "eval_bundle.zip", "eval_bundle.lock",
                                                         "eval_bundle.zip.lock"}


def test_a_broken_bundle_is_not_kept(base_dir, bundle_server):
    zip_path, _ = bundle_server
    whole = zip_path.read_bytes()
    zip_path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="no complete evaluation bundle"):
        core_eval.get_eval_bundle()
    assert not (base_dir / "eval_bundle").exists() and not (base_dir / "eval_bundle.zip").exists()
    zip_path.write_bytes(whole)
    assert Path(core_eval.get_eval_bundle(), "core.yaml").exists()


@pytest.mark.parametrize("name, content", [
    ("core.yaml", "icl_tasks: ["), ("core.yaml", "tasks: []"), ("core.yaml", None),
    ("eval_meta_data.csv", "Eval Task,Random baseline\nother,25\n"), ("eval_data/schema.jsonl", '{"gold'),
])
def test_a_damaged_bundle_is_one_sentence(base_dir, name, content):
    write_bundle(base_dir / "eval_bundle")
    path = base_dir / "eval_bundle" / name
    path.write_text(content) if content else path.unlink()
    with pytest.raises(UserError, match="evaluation bundle .*eval_bundle is damaged .*: delete it"):
        evaluate_model(TinyModel(), CharTokenizer(), "cpu", 1)


@pytest.mark.skipif("NANOCHAT_TEST_DATA" not in os.environ, reason="NANOCHAT_TEST_DATA names no folder of real data")
def test_the_real_bundle(base_dir):
    (base_dir / "eval_bundle").symlink_to(Path(os.environ["NANOCHAT_TEST_DATA"], "eval_bundle"))
    model, tokenizer = TinyModel(), CharTokenizer(merges=[" t", "he", "in", "e "])
    out = evaluate_model(model, tokenizer, "cpu", max_per_task=5)
    assert len(out["results"]) == 22 and out["core_metric"] == pytest.approx(sum(out["centered_results"].values()) / 22)
    for meta, data, _ in core_eval._read_bundle(base_dir / "eval_bundle"):
        right = [reference(i, model, tokenizer, data, meta) for i in range(5)]
        assert out["results"][meta["label"]] == pytest.approx(sum(right) / 5), meta["label"]
