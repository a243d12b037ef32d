"""Midtraining on a tiny model: what is learned, exact counts, progress, resume, dry run."""
import os

import pytest
import torch

from nanochat.chat_training import Run
from nanochat.checkpoint_manager import checkpoint_dir, complete_steps, load_checkpoint
from nanochat.common import read_json
from scripts import mid_train
from tests.chat_world import CPU, Chat, fill_base_dir, metrics_of, tiny_tokenizer

TOKENS = ["--max-seq-len", "256", "--total-batch-size", "1024", "--device-batch-size", "2"] # 4 rows a step


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def filled(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(mid_train, "NUM_VALIDATION", 1) # of four rows
    fill_base_dir(tmp_path, tokenizer)
    return tmp_path


def mid(*flags):
    mid_train.main(["--compile", "off", "--device-type", "cpu", "--eval-every", "-1", "--init-lr-frac", "0.2", *TOKENS,
                    *flags])
    return checkpoint_dir("mid", "own")


def test_one_pass_takes_every_conversation_and_the_rate_falls_to_nothing(filled, capsys):
    folder = mid("--total-batch-size", "512")
    last = complete_steps(folder)[-1]
    meta = read_json(os.path.join(folder, f"meta_{last:06d}.json"))
    num_rows = len(mid_train.build_mixture(mid_train.build_parser().parse_args([])))
    counters = meta["dataloader_state_dict"]["counters"]
    assert num_rows == 24 + 6 + 3 + 2 + round(200_000 * 24 / 460_000) + round(80_000 * 24 / 460_000)
    assert counters["conversations"] >= num_rows > counters["conversations"] - 60, "the last step runs on over the end"
    lines = metrics_of(folder)
    rates = [line["train/lrm"] for line in lines if "train/lrm" in line]
    assert len(rates) == last > 3 and rates[0] == 1 and 0 < rates[-1] < 1 and sorted(rates, reverse=True) == rates
    assert [line["step"] for line in lines if "val/bpb" in line] == [last], "without --eval-every only at the end"
    assert meta["val_bpb"] > 0 and meta["model_config"]["window_pattern"] == "SL"
    assert meta["model_config"]["sequence_len"] == 64 and meta["max_seq_len"] == 256
    assert meta["lineage"]["parent"]["source"] == "base"
    assert "Minimum validation bpb" in (filled / "report" / "midtraining.md").read_text()
    assert "SimpleSpelling train" in capsys.readouterr().out


@pytest.mark.parametrize("num_iterations", [1, 5])
def test_exactly_n_updates(filled, num_iterations):
    folder = mid("--num-iterations", str(num_iterations))
    assert complete_steps(folder) == [num_iterations]
    rates = [line["train/lrm"] for line in metrics_of(folder) if "train/lrm" in line]
    assert rates == [pytest.approx(min(1, (1 - step / num_iterations) / 0.2)) for step in range(num_iterations)]


def test_resuming_equals_never_stopping_bit_for_bit(filled):
    folder = mid("--num-iterations", "4", "--save-every", "2")
    weights = load_checkpoint(folder, 4, "cpu")[0]
    losses = [line["train/loss"] for line in metrics_of(folder) if "train/loss" in line]
    for name in ("model_000004.pt", "meta_000004.json"):
        os.unlink(os.path.join(folder, name))
    mid("--num-iterations", "4", "--save-every", "2", "--resume")
    for name, tensor in load_checkpoint(folder, 4, "cpu")[0].items():
        assert torch.equal(tensor, weights[name]), name
    assert [line["train/loss"] for line in metrics_of(folder) if "train/loss" in line] == losses and len(losses) == 4


def test_every_token_of_a_conversation_is_learned_and_the_batch_is_whole(filled, tokenizer):
    args = mid_train.build_parser().parse_args(["--device-type", "cpu", *TOKENS])
    run = Run(args, CPU, "mid", mid_train.SOURCES, (), ("val_bpb",), loss_meter={}, min_val_bpb=None)
    (inputs, targets), state = next(run.conversation_steps(Chat(), rows_per_step=1, learn_all=True))
    assert inputs.shape == (1, 256)
    length = state["counters"]["tokens"] # of whole conversations, the first one's bos among them
    expected = torch.where(inputs[0, 1:length] == run.bos_id, -1, inputs[0, 1:length]) # where the next one begins
    assert torch.equal(targets[0, :length - 1], expected) and (targets[0, length - 1:] == -1).all()
    text = tokenizer.decode(inputs[0, :length].tolist())
    assert text.count("<|user_start|>") == state["counters"]["conversations"] == text.count("<|assistant_end|>") > 3


def test_a_failed_validation_is_said_in_the_report_and_made_up_for_when_resumed(filled, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(mid_train, "validation_bpb", lambda *args: 1 / 0)
        folder = mid("--num-iterations", "2")
    page = filled / "report" / "midtraining.md"
    assert "Minimum validation bpb: not evaluated" in page.read_text()
    assert read_json(os.path.join(folder, "meta_000002.json"))["val_bpb"] is None
    (filled / "report" / "midtraining.json").unlink() # as if killed before it was written
    mid("--num-iterations", "2", "--resume")
    val_bpb = read_json(os.path.join(folder, "meta_000002.json"))["val_bpb"]
    assert val_bpb > 0 and f"Minimum validation bpb: {val_bpb:.4f}" in page.read_text()


def test_a_dry_run_writes_nothing(filled):
    before = sorted(path for path in filled.rglob("*") if "report" not in str(path))
    folder = mid("--num-iterations", "2", "--dry-run")
    assert not os.path.exists(folder) and not (filled / "report" / "midtraining.md").exists()
    assert sorted(path for path in filled.rglob("*") if "report" not in str(path)) == before


def test_the_identity_file_counts_twice_and_must_be_there(filled):
    lines = (filled / "identity_conversations.jsonl").read_text()
    args = mid_train.build_parser().parse_args([])
    before = len(mid_train.build_mixture(args))
    (filled / "identity_conversations.jsonl").write_text(lines * 3)
    assert len(mid_train.build_mixture(args)) == before + 4
    (filled / "identity_conversations.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="--allow-missing-identity"):
        mid()


@pytest.mark.parametrize("flags, words", [
    (["--eval-tokens", "0"], "--eval-tokens must be at least 1, got 0"),
    (["--num-iterations", "0"], "--num-iterations must be at least 1, or -1, got 0"),
])
def test_usage_errors(flags, words, capsys):
    with pytest.raises(SystemExit) as left:
        mid(*flags)
    assert left.value.code == 2 and words in capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_told_with_the_nearest(filled):
    with pytest.raises(ValueError, match="--total-batch-size must be a multiple of 512 tokens .* nearest: 1,024"):
        mid("--total-batch-size", "1000")
