"""Pretraining as a user runs it: on real files, interrupted, resumed, and with mistakes."""
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from dev import bench_quality
from nanochat import dataset
from nanochat.checkpoint_manager import complete_steps, hold
from nanochat.common import Compute, UserError
from scripts import base_train

TINY = ("--device-type=cpu --compile=off --depth=2 --aspect-ratio=16 --head-dim=16 --max-seq-len=32 "
        "--device-batch-size=4 --total-batch-size=256 --eval-tokens=256 --core-metric-every=-1 "
        "--sample-every=-1").split()
ONE_RANK = Compute(False, 0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base directory with a small tinyworld and its tokenizer, for all tests of this file."""
    base = str(tmp_path_factory.mktemp("world"))
    environment = {**os.environ, "NANOCHAT_BASE_DIR": base}
    for command in (["dev.tinyworld.generate", "--base-dir", base, "--facts", "60", "--documents", "400"],
                    ["scripts.tok_train", "--vocab-size", "400"]):
        subprocess.run([sys.executable, "-m", *command], check=True, env=environment, capture_output=True)
    return base


@pytest.fixture
def base_dir(world, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", world)
    return world


def train(*flags):
    base_train.main([*TINY, *flags])


def folder(base, tag):
    return os.path.join(base, "base_checkpoints", tag)


def weights(base, tag, step):
    return torch.load(os.path.join(folder(base, tag), f"model_{step:06d}.pt"), weights_only=True)


def meta(base, tag, step):
    with open(os.path.join(folder(base, tag), f"meta_{step:06d}.json")) as file:
        return json.load(file)


def losses(base, tag):
    with open(os.path.join(folder(base, tag), "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def dtype_here():
    return str(base_train.get_compute_dtype("cpu")).removeprefix("torch.")


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_a_run_writes_what_the_later_stages_need(base_dir, capsys):
    train("--model-tag=whole", "--num-iterations=30", "--eval-every=10", "--core-metric-every=30",
          "--core-metric-max-per-task=4", "--sample-every=30", "--save-every=20")
    out = capsys.readouterr().out
    assert meta(base_dir, "whole", 20)["val_bpb"] > (saved := meta(base_dir, "whole", 30))["val_bpb"]
    assert (saved["lineage"]["compile"], saved["lineage"]["dtype"]) == ("off", dtype_here())
    assert saved["step"] == 30 and saved["user_config"]["depth"] == 2
    assert saved["model_config"]["window_pattern"] == "SSSL"
    assert saved["val_bpb"] == pytest.approx(saved["loop_state"]["min_val_bpb"] or saved["val_bpb"], rel=0.5)
    assert saved["dataloader_state_dict"].keys() >= {"pq_idx", "rg_idx", "epoch"}
    history = losses(base_dir, "whole")
    assert list(history) == list(range(30)) and history[0] == pytest.approx(5.99, abs=0.02) # ln 400
    assert history[29] < history[0] - 0.5
    assert "Step 00030 | Validation bpb" in out and "Step 00030 | CORE metric (tinyworld): " in out
    section = os.path.join(base_dir, "report", "base-model-training.json")
    with open(section) as file:
        text = file.read()
    assert "CORE metric estimate (tinyworld, at most 4 examples per task)" in text
    assert "Forecast of peak memory per rank, MiB" in text, "beside the outcome"
    assert "The capital of France is" in out and "tinyworld (synthetic" in out
    assert "Tokens : Scaling params ratio" in out
    assert "Attention: scaled_dot_product_attention, windows in blocks" in out


def test_resume_equals_an_uninterrupted_run_bit_for_bit(base_dir):
    flags = ["--num-iterations=8", "--eval-every=3", "--device-batch-size=2"]
    train("--model-tag=straight", *flags)
    train("--model-tag=cut", *flags, "--save-every=3")
    for step in (6, 8): # as if the run had died after step 3
        for name in os.listdir(folder(base_dir, "cut")):
            if f"_{step:06d}" in name:
                os.remove(os.path.join(folder(base_dir, "cut"), name))
    train("--model-tag=cut", *flags, "--resume")
    assert_same(weights(base_dir, "straight", 8), weights(base_dir, "cut", 8))
    assert losses(base_dir, "straight") == losses(base_dir, "cut")
    assert meta(base_dir, "straight", 8)["val_bpb"] == meta(base_dir, "cut", 8)["val_bpb"]
    assert meta(base_dir, "straight", 8)["dataloader_state_dict"] == meta(base_dir, "cut", 8)["dataloader_state_dict"]


def test_other_mathematics_only_where_it_is_allowed_and_another_shape_never(base_dir, capsys):
    flags = ["--model-tag=change", "--num-iterations=4", "--eval-every=-1", "--resume"]
    train(*flags[:1], "--num-iterations=2", "--eval-every=-1")
    with pytest.raises(ValueError, match="--num-iterations was 2, is 4; --matrix-lr was 0.02, is 0.5: .*allow-change"):
        train(*flags, "--matrix-lr=0.5")
    with pytest.raises(ValueError, match="--depth was 2, is 3: give the saved values, or start another run"):
        train(*flags, "--depth=3", "--allow-change")
    with pytest.raises(ValueError, match="is at step 2 already, beyond the 1 steps of this run"):
        train(*flags, "--num-iterations=1", "--allow-change")
    capsys.readouterr()
    train(*flags, "--matrix-lr=0.5", "--allow-change")
    assert "Warning: going on with other mathematics (--allow-change): --num-iterations" in capsys.readouterr().out
    assert complete_steps(folder(base_dir, "change")) == [2, 4]


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_not_the_run(base_dir, monkeypatch, capsys):
    save, failed = torch.save, []

    def full_once(data, file):
        if "000002" in file.name and not failed:
            failed.append(file.name)
            raise OSError(28, "No space left on device")
        save(data, file)

    monkeypatch.setattr(torch, "save", full_once)
    train("--model-tag=full", "--num-iterations=5", "--save-every=1", "--keep-last=3", "--eval-every=-1")
    assert failed and complete_steps(folder(base_dir, "full")) == [3, 4, 5]
    assert "Warning: could not save step 2" in capsys.readouterr().out


def test_a_second_run_on_a_tag_is_refused(base_dir):
    with hold(folder(base_dir, "busy"), ONE_RANK), pytest.raises(UserError, match="another run is at work in"):
        train("--model-tag=busy", "--num-iterations=1")
    train("--model-tag=busy", "--num-iterations=1", "--eval-every=-1")


def test_going_back_deletes_exactly_the_later_steps_and_only_if_told_to(base_dir, capsys):
    flags = ["--model-tag=back", "--num-iterations=4", "--save-every=1"]
    train(*flags, "--eval-every=-1")
    kept, end = (weights(base_dir, "back", step) for step in (2, 4))
    with pytest.raises(RuntimeError, match="up to step 4: pass --overwrite as well to delete those after step 2"):
        train(*flags, "--resume-from-step=2")
    with pytest.raises(ValueError, match="--matrix-lr was"):
        train(*flags, "--resume-from-step=2", "--overwrite", "--matrix-lr=0.5")
    assert complete_steps(folder(base_dir, "back")) == [1, 2, 3, 4], "nothing is deleted before all is right"
    capsys.readouterr()
    train("--model-tag=back", "--num-iterations=4", "--resume-from-step=2", "--overwrite", "--eval-every=2",
          f"--dtype={'float32' if dtype_here() == 'bfloat16' else 'bfloat16'}")
    assert complete_steps(folder(base_dir, "back")) == [1, 2, 4] and "Warning: dtype was" in capsys.readouterr().out
    assert_same(kept, weights(base_dir, "back", 2))
    assert meta(base_dir, "back", 2)["val_bpb"] > 0 and meta(base_dir, "back", 1)["val_bpb"] is None
    assert any(not torch.equal(tensor, end[name]) for name, tensor in weights(base_dir, "back", 4).items())


def test_resume_of_nothing_starts_and_of_a_complete_run_does_nothing(base_dir, capsys):
    train("--model-tag=again", "--num-iterations=2", "--resume")
    before = os.stat(os.path.join(folder(base_dir, "again"), "model_000002.pt")).st_mtime_ns
    train("--model-tag=again", "--num-iterations=2", "--resume")
    assert "Nothing to do" in capsys.readouterr().out
    assert os.stat(os.path.join(folder(base_dir, "again"), "model_000002.pt")).st_mtime_ns == before
    section = os.path.join(base_dir, "report", "base-model-training.json")
    os.unlink(section) # as if killed just before it was written
    train("--model-tag=again", "--num-iterations=2", "--resume")
    assert "Nothing to do" not in capsys.readouterr().out and os.path.exists(section)
    assert os.stat(os.path.join(folder(base_dir, "again"), "model_000002.pt")).st_mtime_ns == before


def test_an_earlier_run_is_not_overwritten_unasked_and_other_mathematics_are_refused(base_dir):
    train("--model-tag=mine", "--num-iterations=2")
    with pytest.raises(RuntimeError, match="pass --resume to go on, --overwrite to delete them"):
        train("--model-tag=mine", "--num-iterations=2")
    with pytest.raises(ValueError, match="--num-iterations was 2, is 3; --matrix-lr was 0.02, is 0.5"):
        train("--model-tag=mine", "--num-iterations=3", "--matrix-lr=0.5", "--resume")
    train("--model-tag=mine", "--num-iterations=1", "--overwrite")
    assert complete_steps(folder(base_dir, "mine")) == [1] # not 2, which a later stage would take for this run's last


def test_a_failing_evaluation_does_not_cost_the_run(base_dir, monkeypatch, capsys):
    def broken(*args):
        raise OSError("the bundle is gone")
    monkeypatch.setattr(base_train, "evaluate_model", broken)
    train("--model-tag=evalfails", "--num-iterations=2", "--core-metric-every=1")
    assert "CORE failed and is left out: OSError: the bundle is gone" in capsys.readouterr().out
    assert meta(base_dir, "evalfails", 2)["val_bpb"] > 0


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(base_dir, monkeypatch):
    real, calls = base_train.accumulate, []
    def poisoned(*args):
        calls.append(1)
        return float("nan") if len(calls) == 4 else real(*args)
    monkeypatch.setattr(base_train, "accumulate", poisoned)
    with pytest.raises(RuntimeError, match="the loss became nan in step 3"):
        train("--model-tag=nan", "--num-iterations=8", "--save-every=2")
    assert complete_steps(folder(base_dir, "nan")) == [2]


def test_weights_that_are_not_finite_are_not_saved(base_dir, monkeypatch):
    real, calls = base_train.accumulate, []
    def overflowing(model, *args):
        loss = real(model, *args)
        calls.append(1)
        if len(calls) == 4: # the last step before a save, so that no loss tells
            model.lm_head.weight.grad[0, 0] = float("inf")
        return loss
    monkeypatch.setattr(base_train, "accumulate", overflowing)
    with pytest.raises(RuntimeError, match="lm_head.weight are not finite after 4 steps, which is not saved"):
        train("--model-tag=inf", "--num-iterations=8", "--save-every=2")
    assert complete_steps(folder(base_dir, "inf")) == [2]


def test_wandb_gets_the_totals(base_dir, monkeypatch):
    lines = []
    class Recorder(base_train.init_wandb("dummy", None, "", {}).__class__):
        def log(self, line):
            lines.append(line)
    monkeypatch.setattr(base_train, "init_wandb", lambda *args: Recorder())
    train("--model-tag=wandb", "--num-iterations=1")
    assert [line["step"] for line in lines if "train/loss" in line] == [0] and len(lines) == 3
    assert all({"total_training_flops", "total_training_time"} <= line.keys() for line in lines)


def test_weights_do_not_depend_on_the_device_batch_size(base_dir, monkeypatch):
    """In float64, rotary tables and Newton-Schulz included, a step is the same however it is cut."""
    def in_float64(config, compute, dtype):
        with torch.device("meta"):
            model = base_train.GPT(config)
        model.rotary_dtype = torch.float64
        model.to_empty(device="cpu")
        model.init_weights()
        model.compute_dtype = torch.float64
        return model.double()
    monkeypatch.setattr(base_train, "build_model", in_float64)
    for size in (1, 4, 8):
        train(f"--model-tag=micro{size}", "--num-iterations=20", f"--device-batch-size={size}", "--eval-every=-1",
              "--matrix-lr=4e-4", "--embedding-lr=7e-3", "--unembedding-lr=9e-5", "--scalar-lr=0.01")
    one = weights(base_dir, "micro1", 20)
    for size in (4, 8):
        for name, tensor in weights(base_dir, f"micro{size}", 20).items():
            torch.testing.assert_close(tensor, one[name], atol=1e-6, rtol=0)


def test_an_automatic_batch_is_settled_before_it_is_saved(base_dir, capsys):
    flags = "--model-tag=settled --total-batch-size=auto --num-iterations=3 --save-every=2 --eval-every=-1".split()
    train(*flags)
    tokens = meta(base_dir, "settled", 2)["user_config"]["total_batch_size"]
    assert tokens % (4 * 32) == 0 and f"Total batch size: {tokens:,} tokens (auto" in capsys.readouterr().out
    for moved in ([], ["--device-batch-size=1"]): # where it would be rounded otherwise
        train(*flags, "--resume-from-step=2", "--overwrite", *moved)
        assert meta(base_dir, "settled", 3)["user_config"]["total_batch_size"] == tokens
    with pytest.raises(ValueError, match=f"--total-batch-size was {tokens}, is {2 * tokens}"):
        train(*flags, f"--total-batch-size={2 * tokens}", "--resume-from-step=2", "--overwrite")


@pytest.mark.slow
def test_the_memory_of_a_process_is_forecast_within_a_tenth(base_dir, tmp_path):
    flags = ("--model-tag=memory --num-iterations=2 --eval-every=-1 --compile=auto --depth=4 --aspect-ratio=64 "
             "--head-dim=128 --max-seq-len=512 --device-batch-size=8 --total-batch-size=4096").split()
    cold = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} # from a cache, compiling takes less memory
    done = subprocess.run([sys.executable, "-m", "scripts.base_train", *TINY, *flags], check=True, text=True,
                          capture_output=True, env=cold)
    forecast, peak = (float(re.search(f"{name}: ([\\d,.]+)", done.stdout)[1].replace(",", ""))
                      for name in ("Forecast of peak memory per rank, MiB", "Peak memory usage"))
    assert forecast == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore") # torch's compiler warns about torch's own ways
def test_time_to_quality_is_measured(base_dir, capsys):
    bench_quality.main("--depth=1 --seq-len=32 --minutes=0.1 --batches 16 --runs 0.5 --eval-tokens=1024".split())
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(0 < bpb < 8 for bpb in found["bpb"]) and len(found["bpb"]) == 2 # it may have taken a step or two
    assert min(found["steps"]) >= 1 and min(found["seconds"]) > 0


def test_an_automatic_micro_batch_keeps_the_step(base_dir, capsys):
    train("--model-tag=auto", "--num-iterations=1", "--device-batch-size=auto", "--recompute", "--eval-every=-1")
    out = capsys.readouterr().out
    assert "Device batch size: 8 rows (auto: forecast" in out and "accumulation steps: 1" in out
    assert "Activations are made again in the backward pass (--recompute)" in out
    assert meta(base_dir, "auto", 1)["device_batch_size"] == 8


def preflight(*flags):
    with pytest.raises(SystemExit) as ended:
        train("--num-iterations=3", "--preflight", *flags)
    return ended.value.code


def test_preflight_checks_all_and_leaves_nothing(base_dir, capsys):
    before = sorted(os.walk(base_dir))
    assert preflight() == 0 and sorted(os.walk(base_dir)) == before
    out = capsys.readouterr().out
    lines = [line.split(":")[0] for line in out.splitlines() if line.startswith(("ok ", "FAILED "))]
    assert lines == [f"ok     {name}" for name in ("data", "collectives", "disk", "back end", "steps", "saving")]
    assert "training shards, about" in out and "tokens/s" in out and "Preflight: all is ready" in out


def test_preflight_names_what_fails(base_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: argparse.Namespace(free=1))
    monkeypatch.setattr(torch, "save", lambda data, file: file.write(b"lost"))
    assert preflight() == 1
    out = capsys.readouterr().out
    assert "FAILED disk: rank 0: UserError: 1 checkpoints need" in out and "FAILED saving: rank 0: " in out
    assert "Preflight: disk, saving FAILED" in out
    monkeypatch.undo()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert preflight() == 1 and "tok_train" in capsys.readouterr().out
    assert preflight("--preflight=machine") == 0 and os.listdir(tmp_path) == []


def test_preflight_asks_for_the_shards_that_are_missing(base_dir, monkeypatch, capsys):
    monkeypatch.setitem(dataset.DATASETS, "tinyworld", ("", 1822))
    assert preflight("--num-iterations=100000") == 1
    assert re.search(r"FAILED data: .* training shards, .*: run `python -m nanochat.dataset --dataset tinyworld -n \d",
                     capsys.readouterr().out)


@pytest.mark.parametrize("flags, words", [
    (["--total-batch-size=100"], "must be a multiple of 128 tokens"),
    (["--depth=0"], "--depth must be at least 1"),
    (["--window-pattern=XY"], "letters S and L"),
    (["--head-dim=15"], "must be even"),
    (["--num-iterations=-1", "--target-param-data-ratio=0"], "one of --num-iterations"),
    (["--resume", "--overwrite"], "exclude each other")])
def test_usage_errors_exit_with_2_and_a_sentence(base_dir, flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        train(*flags)
    assert error.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_saves_and_the_resumed_run_ends_with_the_same_weights(base_dir):
    flags = [*TINY, "--num-iterations=60", "--eval-every=-1"]
    train("--num-iterations=60", "--eval-every=-1", "--model-tag=undisturbed")
    command = [sys.executable, "-u", "-m", "scripts.base_train", *flags, "--model-tag=killed", "--resume"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 00010"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM and "Saved step" in rest
    (step,) = complete_steps(folder(base_dir, "killed"))
    assert 10 <= step < 60
    subprocess.run(command, check=True, capture_output=True)
    assert_same(weights(base_dir, "undisturbed", 60), weights(base_dir, "killed", 60))


@pytest.mark.slow
def test_errors_of_files_exit_with_1_and_one_line(tmp_path):
    def run(base, *flags):
        started = time.time()
        result = subprocess.run([sys.executable, "-m", "scripts.base_train", *TINY, "--num-iterations=1", *flags],
                                env={**os.environ, "NANOCHAT_BASE_DIR": str(base)}, capture_output=True, text=True)
        assert result.returncode == 1 and "Traceback" not in result.stderr and time.time() - started < 60
        return result.stderr.strip().splitlines()[-1]
    assert "tok_train" in run(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    assert "set NANOCHAT_BASE_DIR" in run(tmp_path / "file" / "below")
