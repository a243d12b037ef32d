"""Reinforcement learning on a tiny model: every term of the objective by hand, that it learns, stops and resumes."""
import functools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from nanochat import chat_training
from nanochat.checkpoint_manager import checkpoint_dir, complete_steps, load_checkpoint
from nanochat.common import read_json
from nanochat.engine import Engine, sample_next_token
from nanochat.gpt import token_losses
from scripts import chat_rl
from tasks.registry import REWARDED
from tests.chat_world import CPU, Chat, fill_base_dir, metrics_of, save_tiny_model, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setitem(REWARDED, "GSM8K", Vowels)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


class Vowels(Chat):
    """Rewards an answer that has an "e" in it: a random model finds some, and can learn to say more."""

    def evaluate(self, conversation, completion):
        return "e" in completion


def tiny_run(tokenizer, *flags, dtype=torch.float32):
    args = chat_rl.build_parser().parse_args(["--device-type", "cpu", "--max-new-tokens", "6", "--num-samples", "5",
                                              "--examples-per-step", "4", "--eval-examples", "4", "--eval-every", "-1",
                                              "--overwrite", *flags])
    save_tiny_model(tokenizer, "sft")
    run = chat_training.Run(args, CPU, "rl", chat_rl.SOURCES, chat_rl.FIXED, ("pass@1",), first_metrics={}, reward=None)
    run.model = tiny_model(tokenizer, dtype)
    run.optimizer = chat_training.build_optimizer(run.model, args)
    run.model.losses_fn = functools.partial(chat_rl.policy_losses, temperature=args.temperature, top_k=args.top_k)
    return run


GROUPS = [ # ids and masks as the engine gives them: forced tool output has mask 0
    chat_rl.Group([1, 2, 3], [([4, 5, 6], [1, 1, 1]), ([7, 8], [1, 1]), ([9, 10, 11, 12], [1, 0, 0, 1])],
                  [1.0, 0.0, 0.0]),
    chat_rl.Group([3, 1], [([20], [1]), ([21, 22], [1, 1]), ([23], [1])], [1.0, 1.0, 1.0]),
    chat_rl.Group([5], [([30, 31], [1, 1]), ([32], [1]), ([33, 34, 35], [1, 1, 1])], [0.0, 1.0, 1.0])]


def naive_loss(model, groups, temperature, top_k):
    """The definition, one sequence at a time, with full logits."""
    loss = 0.0
    for prompt, samples, rewards in groups:
        num_tokens = sum(sum(masks) for _, masks in samples)
        for (ids, masks), reward in zip(samples, rewards):
            logits = model(torch.tensor([prompt + ids]))[0] / temperature
            for place, (token, mask) in enumerate(zip(ids, masks)):
                row = logits[len(prompt) + place - 1]
                kept = set(row.topk(top_k).indices.tolist()) | {token} if top_k else set(range(len(row)))
                log_p = row[token] - torch.logsumexp(row[sorted(kept)], 0)
                advantage = reward - sum(rewards) / len(rewards)
                loss = loss - mask * advantage * log_p / (num_tokens * len(groups))
    return loss


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 0), (1.3, 5)])
def test_the_gradient_is_that_of_the_definition_for_any_pass_size(tokenizer, temperature, top_k):
    gradients = []
    for size in (1, 2, 4, 100):
        run = tiny_run(tokenizer, "--device-batch-size", str(size), "--temperature", str(temperature), "--top-k",
                       str(top_k), dtype=torch.float64)
        if not gradients:
            expected = naive_loss(run.model, GROUPS, temperature, top_k)
            gradients.append(torch.autograd.grad(expected, list(run.model.parameters())))
        loss, surprise, num_tokens = chat_rl.add_gradient(run, GROUPS)
        assert loss == pytest.approx(expected.item(), rel=1e-6) and surprise > 0
        assert num_tokens == 7 + 6, "the even group teaches nothing"
        for p, grad in zip(run.model.parameters(), gradients[0], strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-7, atol=1e-11)


def test_advantages_and_normaliser_by_hand():
    weights = [weight for _, _, weight in chat_rl.weighted_sequences(GROUPS)]
    first, last = [2 / 3, -1 / 3, -1 / 3], [-2 / 3, 1 / 3, 1 / 3] # 7 and 6 sampled tokens, 3 questions
    assert weights == pytest.approx([a / 21 for a in first] + [a / 18 for a in last])
    ids, targets, _ = chat_rl.weighted_sequences(GROUPS)[2]
    assert ids == [1, 2, 3, 9, 10, 11] and targets == [-1, -1, 9, -1, -1, 12]


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.5, 3), (2.0, 4)])
def test_the_losses_are_of_the_distribution_that_is_sampled_from(temperature, top_k):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 8), torch.randn(12, 8)
    probs = torch.exp(-chat_rl.policy_losses(x.expand(12, 8), weight, torch.arange(12), temperature, top_k))
    logits = 15 * torch.tanh(x @ weight.T / 15)
    drawn = Counter(sample_next_token(logits.expand(20_000, 12), torch.Generator().manual_seed(1), temperature,
                                      top_k).flatten().tolist())
    likeliest = logits[0].topk(top_k or 12).indices.tolist()
    assert set(drawn) <= set(likeliest)
    assert sum(probs[i] for i in likeliest) == pytest.approx(1.0, rel=1e-5)
    for i in likeliest:
        assert abs(drawn[i] / 20_000 - probs[i]) < 5 * math.sqrt(probs[i] / 20_000) + 1e-4
    if not top_k and temperature == 1:
        torch.testing.assert_close(-torch.log(probs), token_losses(x.expand(12, 8), weight, torch.arange(12)))


def test_the_end_of_a_turn_is_sampled_text_and_a_cut_off_answer_has_none(tokenizer):
    run = tiny_run(tokenizer)
    terminal = Engine(run.model, tokenizer).terminal
    said = Counter(i for ids, _ in chat_rl.roll_out(run, Vowels(), [0], 40, "x")[0].samples for i in ids)
    head = run.model.lm_head.weight.data
    head[terminal[0]] = head[said.most_common(1)[0][0]] # ends often enough
    groups = chat_rl.roll_out(run, Vowels(), [0, 3], num_samples=40, seed="x")
    ended = [(ids, masks) for group in groups for ids, masks in group.samples if ids[-1] in terminal]
    cut = [(ids, masks) for group in groups for ids, masks in group.samples if ids[-1] not in terminal]
    assert ended and cut and all(masks[-1] == 1 for _, masks in ended) and all(len(ids) == 6 for ids, _ in cut)
    for group in groups:
        for (ids, _), reward in zip(group.samples, group.rewards):
            assert reward == float("e" in tokenizer.decode([i for i in ids if i not in terminal]))
    statistics = chat_rl.statistics_of(run, groups, 0.0, 6.0, 3)
    assert statistics["truncated"] == pytest.approx(len(cut) / 80) and statistics["entropy"] == 2.0
    assert statistics["long_prompts"] == 0
    run.model.config.sequence_len = min(len(group.prompt) for group in groups) # which one of two different ones exceeds
    assert chat_rl.statistics_of(run, groups, 0.0, 6.0, 3)["long_prompts"] == 0.5
    assert statistics["length"] == sum(len(ids) for group in groups for ids, _ in group.samples) / 80


def test_samples_depend_on_the_question_and_the_seed_alone(tokenizer):
    run = tiny_run(tokenizer)
    (alone,), (_, beside) = (chat_rl.roll_out(run, Vowels(), indices, 3, "s") for indices in ([5], [2, 5]))
    assert alone == beside
    assert chat_rl.roll_out(run, Vowels(), [5], 3, "t")[0].samples != alone.samples


def test_every_epoch_asks_each_question_once_in_another_order():
    args = chat_rl.build_parser().parse_args(["--examples-per-step", "4"])
    epochs = [[i for step in range(3 * epoch, 3 * epoch + 3) for rank in (0, 1)
               for i in chat_rl.questions_of(args, step, 13, rank, 2)] for epoch in (0, 1)]
    assert all(len(set(epoch)) == 12 and max(epoch) < 13 for epoch in epochs) and epochs[0] != epochs[1]


def test_pass_at_k_counts_the_first_k(tokenizer, monkeypatch):
    run = tiny_run(tokenizer, "--eval-samples", "3")
    rewards = [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    monkeypatch.setattr(chat_rl, "roll_out", lambda run, task, indices, *rest: [
        chat_rl.Group([1], [], rewards[i]) for i in indices])
    assert chat_rl.pass_at_k(run, range(4)) == {"pass@1": 0.25, "pass@2": 0.5, "pass@3": 0.75}

# -----------------------------------------------------------------------------
# The whole script

def rl(*flags):
    chat_rl.main(["--device-type", "cpu", "--max-new-tokens", "6", "--num-samples", "5", "--examples-per-step", "4",
                  "--eval-examples", "4", "--eval-samples", "2", "--num-iterations", "4", "--device-batch-size", "3",
                  "--init-lr-frac", "0.3", *flags])
    return checkpoint_dir("rl", "own")


def test_the_reward_rises_and_is_reported(tokenizer, base_dir, capsys):
    save_tiny_model(tokenizer, "sft")
    folder = rl("--num-iterations", "15", "--eval-every", "15", "--init-lr-frac", "2")
    lines = [line for line in metrics_of(folder) if "train/reward" in line]
    rewards = [line["train/reward"] for line in lines]
    assert len(rewards) == 15 and sum(rewards[-3:]) > sum(rewards[:3]) + 0.6
    assert {"train/pass@1", "train/pass@5", "train/no_variance", "train/entropy", "train/length",
            "train/truncated"} <= set(lines[0])
    meta = read_json(os.path.join(folder, "meta_000015.json"))
    assert meta["pass@2"] >= meta["pass@1"] > 0 and meta["lineage"]["parent"]["source"] == "sft"
    page = (base_dir / "report" / "chat-rl.md").read_text()
    assert "pass@1 before" in page and "Prompts longer than the context %: 0.0000" in page
    assert complete_steps(folder) == [15] and "questions for evaluation" in capsys.readouterr().out


def test_resuming_equals_never_stopping_bit_for_bit(tokenizer):
    save_tiny_model(tokenizer, "sft")
    folder = rl("--save-every", "2", "--eval-every", "2")
    weights, lines = load_checkpoint(folder, 4, "cpu")[0], metrics_of(folder)
    for name in ("model_000004.pt", "meta_000004.json"):
        os.unlink(os.path.join(folder, name))
    rl("--save-every", "2", "--eval-every", "2", "--resume")
    for name, tensor in load_checkpoint(folder, 4, "cpu")[0].items():
        assert torch.equal(tensor, weights[name]), name
    def without_times(lines):
        return sorted(json.dumps({k: v for k, v in line.items() if k != "train/dt"}) for line in lines)
    assert without_times(metrics_of(folder)) == without_times(lines)


def test_without_any_difference_in_reward_the_weights_stay(tokenizer, monkeypatch):
    save_tiny_model(tokenizer, "sft")
    monkeypatch.setattr(Vowels, "evaluate", lambda *args: True)
    folder = rl("--eval-every", "-1")
    assert torch.equal(load_checkpoint(folder, 4, "cpu")[0]["lm_head.weight"], tiny_model(tokenizer).lm_head.weight)


@pytest.mark.parametrize("flags, words", [
    (["--num-samples", "0"], "--num-samples must be at least 1, got 0"),
    (["--num-samples", "1"], "--num-samples must be at least 2, got 1: the baseline is the mean"),
    (["--temperature", "0"], "--temperature must be above 0, got 0.0"),
    (["--task", "Chess"], "invalid choice: 'Chess' (choose from"),
])
def test_usage_errors(flags, words, capsys):
    with pytest.raises(SystemExit) as left:
        rl(*flags)
    assert left.value.code == 2 and words in capsys.readouterr().err


def test_too_few_questions_are_told(tokenizer):
    save_tiny_model(tokenizer, "sft")
    with pytest.raises(ValueError, match="GSM8K has 1 questions to train on besides the --eval-examples 23"):
        rl("--eval-examples", "23")


DRIVER = """
from scripts import chat_rl, chat_sft, mid_train
from tasks.registry import REWARDED
from tests.test_chat_rl import Vowels
import sys
REWARDED["GSM8K"] = Vowels
mid_train.NUM_VALIDATION = 1
{"mid": mid_train, "sft": chat_sft, "rl": chat_rl}[sys.argv[1]].main(sys.argv[2:])
"""
FLAGS = {
    "mid": ["--max-seq-len=256", "--total-batch-size=1024", "--device-batch-size=2", "--eval-every=1", "--compile=off"],
    "sft": ["--source=base", "--target-examples-per-step=8", "--device-batch-size=2", "--eval-every=1",
            "--eval-steps=1", "--max-seq-len=256", "--init-lr-frac=0.2", "--eval-metrics-every=-1", "--compile=off"],
    "rl": ["--num-samples=5", "--examples-per-step=4", "--eval-examples=4", "--eval-samples=2", "--eval-every=1",
           "--max-new-tokens=6", "--init-lr-frac=0.3"]}


@pytest.mark.slow
@pytest.mark.parametrize("stage", FLAGS)
def test_two_ranks_take_the_steps_of_one(tmp_path, tokenizer, stage):
    """Real processes and gloo: the same batch, samples, loss and evaluation, and the same weights but for rounding."""
    fill_base_dir(tmp_path, tokenizer)
    save_tiny_model(tokenizer, "sft", "trained")
    (tmp_path / "driver.py").write_text(DRIVER)
    results = []
    for num_ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}",
                   str(tmp_path / "driver.py"), stage, "--device-type=cpu", "--dtype=float32", "--num-iterations=1",
                   "--overwrite", *FLAGS[stage]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr[-3000:]
        folder = checkpoint_dir(stage, "trained" if stage == "rl" else "own")
        lines = [{k: v for k, v in line.items() if k != "train/dt"} for line in metrics_of(folder) if line["step"] == 0]
        results.append((lines, load_checkpoint(folder, 1, "cpu")[0]))
    (lines, weights), (other_lines, other_weights) = results
    assert len(lines) == 2, "an evaluation and an update"
    for line, other in zip(lines, other_lines, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, other_weights[name], atol=5e-3, rtol=0)
