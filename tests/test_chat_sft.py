"""Supervised finetuning on a tiny model: what a step computes, that it stops and resumes, and what it refuses."""
import json
import os
import signal
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import chat_training
from nanochat.checkpoint_manager import checkpoint_dir, complete_steps, load_checkpoint
from nanochat.common import Compute, UserError, claim_base_dir, hub_mirror_dir, read_json
from nanochat.gpt import Block
from nanochat.training import accumulate
from scripts import chat_sft
from tests.chat_world import CPU, Chat, fill_base_dir, metrics_of, save_tiny_model, tiny_model, tiny_tokenizer

QUIET = ["--compile", "off", "--device-type", "cpu", "--eval-every", "-1", "--eval-metrics-every", "-1"]


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def tiny_run(tokenizer, *flags, dtype=torch.float32, compute=CPU):
    """A run of its own folder on `Chat`, with a model of any dtype."""
    args = chat_sft.build_parser().parse_args([*QUIET, "--source", "base", "--target-examples-per-step", "8",
                                               "--init-lr-frac", "0.2", "--overwrite", *flags])
    save_tiny_model(tokenizer)
    run = chat_training.Run(args, compute, "sft", chat_sft.SOURCES, (), ("val_loss",), train_loss=None)
    run.model = tiny_model(tokenizer, dtype)
    run.optimizer = chat_training.build_optimizer(run.model, args)
    return run


def rows_of(run):
    return run.conversation_steps(Chat(), conversations_per_step=run.args.target_examples_per_step)


def train(run):
    return chat_sft.train(run, Chat(), Chat(), {}, chat_sft.count_steps(run.args, len(Chat())))

# -----------------------------------------------------------------------------
# What a step computes

def naive_mean_loss(run, inputs, targets):
    """Every conversation of the rows alone, full logits, log softmax, the mean over the targets that count."""
    losses = []
    for row, row_targets in zip(inputs, targets):
        borders = [*(row == run.bos_id).nonzero()[:, 0].tolist(), len(row)]
        for start, end in zip(borders, borders[1:]):
            log_probs = torch.log_softmax(run.model(row[None, start:end])[0], dim=-1)
            losses += [-log_probs[t, token] for t, token in enumerate(row_targets[start:end].tolist()) if token != -1]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("learn_all", [False, True])
@pytest.mark.parametrize("seq_len", [50, 64, 150]) # the model's window is 64
def test_a_packed_step_is_the_sum_over_conversations_alone(tokenizer, learn_all, seq_len):
    run = tiny_run(tokenizer, "--device-batch-size", "3", "--max-seq-len", str(seq_len), dtype=torch.float64)
    rows, state = next(run.conversation_steps(Chat(), conversations_per_step=24, learn_all=learn_all))
    assert state["counters"]["split"] == state["counters"]["dropped"] == 0 and len(rows[0]) < 24
    expected, count = 0.0, 0
    for ids, mask in map(tokenizer.render_conversation, Chat()):
        log_probs = torch.log_softmax(run.model(torch.tensor([ids[:-1]]))[0], dim=-1)
        for t, token in enumerate(ids[1:]):
            if learn_all or mask[t + 1]:
                expected, count = expected - log_probs[t, token], count + 1
    gradients = torch.autograd.grad(expected / count, list(run.model.parameters()))
    loss = accumulate(run.model, run.micro_batches(rows), count, CPU, run.bos_id)
    assert (rows[1] != -1).sum() == count and loss == pytest.approx(expected.item() / count, rel=1e-9)
    for p, grad in zip(run.model.parameters(), gradients, strict=True):
        assert (p.grad - grad).norm() <= 1e-9 * grad.norm()


def test_the_gradient_is_that_of_the_mean_over_supervised_tokens(tokenizer):
    run = tiny_run(tokenizer, "--device-batch-size", "2", dtype=torch.float64)
    (inputs, targets), _ = next(rows_of(run))
    assert len(inputs) > 2, "several micro-batches, the last one smaller"
    expected_loss = naive_mean_loss(run, inputs, targets)
    expected = torch.autograd.grad(expected_loss, list(run.model.parameters()))
    loss = accumulate(run.model, run.micro_batches((inputs, targets)), int((targets != -1).sum()), CPU, run.bos_id)
    assert loss == pytest.approx(expected_loss.item(), rel=1e-12)
    for p, grad in zip(run.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12)


def test_only_what_the_assistant_says_is_supervised(tokenizer):
    run = tiny_run(tokenizer, "--target-examples-per-step", "1")
    (inputs, targets), _ = next(rows_of(run))
    learned = tokenizer.decode(targets[targets != -1].tolist())
    assert learned in {"the " * n + "<|assistant_end|>" for n in (1, 2, 3, 4)}


def train_three_steps(tokenizer, device_batch_size):
    run = tiny_run(tokenizer, "--num-iterations", "3", "--device-batch-size", str(device_batch_size),
                   "--max-seq-len", "40", dtype=torch.float64)
    train(run)
    return run


def test_the_micro_batch_size_does_not_change_the_weights(tokenizer):
    one, *others = (train_three_steps(tokenizer, size) for size in (1, 2, 6))
    start = dict(tiny_model(tokenizer, torch.float64).named_parameters())
    assert any((p - start[name]).abs().max() > 1e-3 for name, p in one.model.named_parameters()), "it did learn"
    for other in others:
        for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_rows_filled_up_for_a_compiled_model_change_nothing(tokenizer):
    run = tiny_run(tokenizer, "--device-batch-size", "4", "--max-seq-len", "40", dtype=torch.float64)
    rows, _ = next(rows_of(run))
    assert len(rows[0]) % 4, "there is something to fill up"
    eager = chat_sft.validation_loss(run, Chat())
    run.model.block_fn = lambda *args: Block.forward(*args) # stands for a compiled block
    shapes = {x.shape for x, _ in run.micro_batches(rows)}
    assert shapes == {(4, 40)}
    assert chat_sft.validation_loss(run, Chat()) == pytest.approx(eager, rel=1e-12)


class OneOfTwo(Compute):
    """A rank of two without a process group: sums are those of the numbers given beforehand."""
    def all_reduce(self, *values, op="sum"):
        return list(values)


def test_two_ranks_together_take_the_step_of_one(tokenizer):
    alone = tiny_run(tokenizer, dtype=torch.float64)
    rows, state = next(rows_of(alone))
    num_targets = int((rows[1] != -1).sum())
    loss = accumulate(alone.model, alone.micro_batches(rows), num_targets, CPU, alone.bos_id)
    grads, losses = [torch.zeros_like(p) for p in alone.model.parameters()], 0.0
    for rank in (0, 1):
        run = tiny_run(tokenizer, dtype=torch.float64, compute=OneOfTwo(False, rank, rank, 2, torch.device("cpu")))
        own, own_state = next(rows_of(run))
        assert own_state == state, "the state is the same on all ranks"
        losses += accumulate(run.model, run.micro_batches(own), num_targets, run.compute, run.bos_id)
        for grad, p in zip(grads, run.model.parameters(), strict=True):
            grad += p.grad / 2 # the optimizer takes the mean
    assert losses == pytest.approx(loss, rel=1e-12)
    for p, grad in zip(alone.model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12)


def test_the_validation_loss_is_per_token_over_at_most_one_pass(tokenizer):
    run = tiny_run(tokenizer, "--eval-steps", "1000", "--target-examples-per-step", "7", dtype=torch.float64)
    total, count = 0.0, 0
    for ids, mask in map(tokenizer.render_conversation, Chat()): # 24 of them: the last step has 3
        log_probs = torch.log_softmax(run.model(torch.tensor([ids[:-1]]))[0], dim=-1)
        total -= sum(log_probs[t, token].item() for t, token in enumerate(ids[1:]) if mask[t + 1])
        count += sum(mask)
    assert chat_sft.validation_loss(run, Chat()) == pytest.approx(total / count, rel=1e-12)

# -----------------------------------------------------------------------------
# The loop

def test_exactly_n_updates_with_a_linearly_falling_rate(tokenizer):
    run = tiny_run(tokenizer, "--num-iterations", "4", "--eval-every", "2")
    metrics = train(run)
    lines = metrics_of(run.folder)
    assert [line["train/lrm"] for line in lines if "train/lrm" in line] == [1.0, 0.75, 0.5, 0.25]
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 2, 4]
    assert complete_steps(run.folder) == [4]
    meta = read_json(os.path.join(run.folder, "meta_000004.json"))
    assert meta["val_loss"] == metrics["val_loss"] and meta["model_config"]["window_pattern"] == "SL"
    assert meta["user_config"]["num_iterations"] == 4
    assert meta["dataloader_state_dict"]["counters"]["conversations"] == 32


def test_the_loss_falls(tokenizer):
    run = tiny_run(tokenizer, "--num-iterations", "25", "--init-lr-frac", "0.5")
    train(run)
    losses = [line["train/loss"] for line in metrics_of(run.folder)]
    assert losses[-1] < 0.5 * losses[0]


def test_one_pass_is_whole_steps_and_too_few_conversations_are_told():
    def count_steps(*flags):
        return chat_sft.count_steps(chat_sft.build_parser().parse_args(flags), 24)
    assert count_steps("--num-epochs", "2", "--target-examples-per-step", "7") == 6
    with pytest.raises(ValueError, match="--target-examples-per-step must be at most 24, .* got 25"):
        count_steps("--target-examples-per-step", "25")


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change(tokenizer):
    run = tiny_run(tokenizer, "--num-iterations", "2")
    run.model.lm_head.weight.data[0, 0] = float("nan")
    before = run.model.transformer.wte.weight.clone()
    with pytest.raises(UserError, match="the loss became nan in step 0"):
        train(run)
    assert torch.equal(before, run.model.transformer.wte.weight) and complete_steps(run.folder) == []


def test_weights_that_are_not_finite_are_not_saved(tokenizer, monkeypatch):
    def overflowing(model, *args):
        loss = accumulate(model, *args)
        model.lm_head.weight.grad[0, 0] = float("inf")
        return loss
    monkeypatch.setattr(chat_training, "accumulate", overflowing)
    run = tiny_run(tokenizer, "--num-iterations", "1")
    with pytest.raises(UserError, match="the weights of lm_head.weight are not finite after 1 steps"):
        train(run)
    assert complete_steps(run.folder) == []


def test_an_evaluation_that_fails_costs_nothing(tokenizer, monkeypatch, capsys):
    def fail(run, task):
        raise OSError("disk gone")
    monkeypatch.setattr(chat_sft, "validation_loss", fail)
    run = tiny_run(tokenizer, "--num-iterations", "1", "--eval-every", "1")
    assert train(run) == {}
    assert complete_steps(run.folder) == [1] and "Validation failed and is left out" in capsys.readouterr().out

# -----------------------------------------------------------------------------
# The whole script on a base directory of its own

@pytest.fixture
def filled(base_dir, tokenizer):
    fill_base_dir(base_dir, tokenizer)
    return base_dir


def sft(*flags):
    """Run the script as a user would, from the base model, on short rows."""
    chat_sft.main([*QUIET, "--source", "base", "--num-iterations", "4", "--max-seq-len", "256", "--init-lr-frac", "0.2",
                   "--target-examples-per-step", "8", *flags])
    return checkpoint_dir("sft", "own")


def test_the_script_saves_under_its_sources_tag_with_full_lineage(filled, tokenizer, capsys):
    folder = sft("--eval-every", "4", "--eval-steps", "1",
                 "--eval-metrics-every", "4", "--eval-metrics-max-problems", "3")
    meta = read_json(os.path.join(folder, "meta_000004.json"))
    assert meta["lineage"]["parent"]["model_tag"] == "own" and meta["lineage"]["parent"]["step"] == 7
    assert meta["lineage"]["parent"]["source"] == "base" and meta["lineage"]["tokenizer"] == tokenizer.fingerprint()
    assert meta["model_config"]["sequence_len"] == 64 and meta["max_seq_len"] == 256
    assert 0 < meta["val_loss"] < 10 and 0 <= meta["mmlu_acc"] <= 1 and 0 <= meta["arc_easy_acc"] <= 1
    assert sorted(os.listdir(folder)) == [".lock", "meta_000004.json", "metrics.jsonl", "model_000004.pt", "tokenizer"]
    out = capsys.readouterr().out
    assert "SimpleSpelling train" in out and "Saved step 4" in out and "Conversations split: 0" in out


def test_resuming_equals_never_stopping_bit_for_bit(filled):
    folder = sft("--save-every", "2", "--eval-every", "2", "--eval-steps", "1")
    meta = read_json(os.path.join(folder, "meta_000002.json"))
    assert meta["val_loss"] > 0 and meta["mmlu_acc"] is None, "as far as it was evaluated"
    assert meta["lineage"]["compile"] == "off" and meta["lineage"]["dtype"] in ("float32", "bfloat16")
    weights = load_checkpoint(folder, 4, "cpu")[0]
    losses = [line["train/loss"] for line in metrics_of(folder) if "train/loss" in line]
    for name in ("model_000004.pt", "meta_000004.json"):
        os.unlink(os.path.join(folder, name))
    sft("--save-every", "2", "--resume")
    for name, tensor in load_checkpoint(folder, 4, "cpu")[0].items():
        assert torch.equal(tensor, weights[name]), name
    assert [line["train/loss"] for line in metrics_of(folder) if "train/loss" in line] == losses and len(losses) == 4


def test_sigterm_saves_and_the_run_goes_on_from_there(filled, monkeypatch):
    folder = sft()
    weights = load_checkpoint(folder, 4, "cpu")[0]
    real, calls = chat_training.accumulate, []

    def killed_in_the_second_step(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(chat_training, "accumulate", killed_in_the_second_step)
    with pytest.raises(SystemExit) as left:
        sft("--overwrite")
    assert left.value.code == 128 + signal.SIGTERM and complete_steps(folder) == [2]
    sft("--resume")
    assert len(calls) == 4
    for name, tensor in load_checkpoint(folder, 4, "cpu")[0].items():
        assert torch.equal(tensor, weights[name]), name


def test_resume_refuses_other_mathematics_and_a_second_run_asks_what_to_do(filled, capsys):
    sft("--num-iterations", "1")
    with pytest.raises(ValueError, match="--matrix-lr was 0.02, is 0.5"):
        sft("--resume", "--num-iterations", "1", "--matrix-lr", "0.5")
    with pytest.raises(ValueError, match="--num-iterations was 1, is 2"): # the last step has no optimizer state
        sft("--resume", "--num-iterations", "2", "--allow-change")
    identity = filled / "identity_conversations.jsonl"
    as_it_was = identity.read_text()
    identity.write_text(as_it_was.replace("say", "tell me"))
    with pytest.raises(ValueError, match="--identity-hash was '[0-9a-f]{12}', is '[0-9a-f]{12}': give the saved"):
        sft("--resume", "--num-iterations", "1")
    identity.write_text(as_it_was)
    with pytest.raises(UserError, match="holds checkpoints up to step 1: pass --resume to go on, --overwrite"):
        sft()
    capsys.readouterr()
    sft("--num-iterations", "1", "--resume")
    assert "Nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("eval_every", ["-1", "1"])
def test_a_run_that_ended_without_its_report_writes_it_when_resumed(filled, eval_every, capsys):
    flags = ["--num-iterations", "1", "--eval-every", eval_every, "--eval-steps", "1"]
    sft(*flags)
    path = filled / "report" / "chat-sft.md"
    before = path.read_text().splitlines()[2:] # below the time stamp
    assert any("Validation loss: not evaluated" in line for line in before) == (eval_every == "-1")
    path.unlink()
    path.with_suffix(".json").unlink()
    sft(*flags, "--resume")
    assert [line for line in path.read_text().splitlines()[2:] if "resume" not in line] == [
        line for line in before if "resume" not in line]


def test_resume_refuses_a_source_that_was_trained_anew(filled, tokenizer):
    flags = ["--num-iterations", "1"]
    folder = sft(*flags)
    save_tiny_model(tokenizer, change=1.0)
    with pytest.raises(UserError, match="from step 7 in .*own, which was trained on or anew since .*--overwrite"):
        sft(*flags, "--resume")
    sft(*flags, "--overwrite")
    sft(*flags, "--resume")
    assert complete_steps(folder) == [1]


def test_overwriting_deletes_nothing_before_all_is_right(filled, monkeypatch):
    folder = sft("--save-every", "1")
    lines = metrics_of(folder)
    with pytest.raises(ValueError, match="--target-examples-per-step must be at most"):
        sft("--overwrite", "--target-examples-per-step", "100000", "--num-iterations", "-1")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--run needs the package wandb"):
        sft("--overwrite", "--run", "x")
    assert complete_steps(folder) == [1, 2, 3, 4] and metrics_of(folder) == lines


def test_a_missing_source_names_what_there_is(base_dir, filled):
    with pytest.raises(UserError, match=r"no complete mid checkpoint in .*: pass --source base \(newest: own\)"):
        chat_sft.main(QUIET)


def test_without_any_source_the_first_stage_is_named():
    with pytest.raises(UserError, match="run `python -m scripts.base_train` first"):
        chat_sft.main(QUIET)


def test_identity_must_be_there_or_allowed_to_be_missing(filled):
    (filled / "identity_conversations.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="identity_conversations.jsonl .*--allow-missing-identity"):
        sft()
    assert complete_steps(sft("--num-iterations", "1", "--allow-missing-identity")) == [1]


def test_a_synthetic_base_dir_adds_the_rows_of_tinyworld(filled):
    args = chat_sft.build_parser().parse_args([])
    real = len(chat_sft.build_mixture(args))
    claim_base_dir("tinyworld", synthetic=True)
    folder = hub_mirror_dir("nanochat/tinyworld", None, "train")
    os.makedirs(folder)
    row = {"domain": "arithmetic", "messages_json": json.dumps(Chat()[0]["messages"])}
    pq.write_table(pa.Table.from_pylist([row] * 5), os.path.join(folder, "0.parquet"))
    assert len(chat_sft.build_mixture(args)) == real + 5


def test_accuracies_are_watched_on_validation_splits_where_present(filled, capsys):
    claim_base_dir("tinyworld", synthetic=True)
    args = chat_sft.build_parser().parse_args(["--eval-metrics-max-problems", "2"])
    tasks = chat_sft.build_metric_tasks(args)
    assert {name: (task.split, len(task)) for name, task in tasks.items()} == {
        "mmlu_acc": ("validation", 2), "arc_easy_acc": ("validation", 2)}
    os.rename(hub_mirror_dir("cais/mmlu", "all", "validation"), filled / "elsewhere")
    assert list(chat_sft.build_metric_tasks(args)) == ["arc_easy_acc"]
    assert "mmlu_acc is left out" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--device-batch-size", "0"], "--device-batch-size must be at least 1, got 0"),
    (["--num-iterations", "0", "--eval-steps", "0"], "--eval-steps must be at least 1, got 0; --num-iterations must"),
    (["--resume", "--overwrite"], "exclude each other"),
    (["--source", "sft"], "invalid choice: 'sft'"),
])
def test_usage_errors_come_all_at_once(flags, words, capsys):
    with pytest.raises(SystemExit) as left:
        chat_sft.main(flags)
    assert left.value.code == 2 and words in capsys.readouterr().err
