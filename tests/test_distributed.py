"""Training by torchrun in real processes: any number of ranks computes the same, is resumed as another, and may die."""
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from dev.tinyworld import generate
from nanochat.checkpoint_manager import checkpoint_dir, complete_steps, last_sound_step, load_checkpoint
from scripts import tok_train
from tests.chat_world import metrics_of

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TINY = ["--device-type=cpu", "--compile=off"]
# 12 rows, conversations or questions a step: for 1, 2, 3 and 4 ranks. 4 lanes: also for 3. Low rates: Adam turns the
# rounding of gradients that are nearly zero into steps of their size.
STAGES = {
    "base": [*TINY, "--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=64", "--device-batch-size={rows}",
             "--total-batch-size=768", "--lanes=4", "--save-every=10", "--eval-every=20", "--eval-tokens=640",
             "--core-metric-every=20", "--core-metric-max-per-task=2", "--sample-every=-1",
             "--matrix-lr=5.5e-4", "--embedding-lr=8.2e-3", "--unembedding-lr=1.1e-4", "--scalar-lr=0.0137"],
    "mid": [*TINY, "--max-seq-len=192", "--total-batch-size=2304", "--device-batch-size={rows}", "--eval-every=10",
            "--eval-tokens=640"],
    "sft": [*TINY, "--source=base", "--target-examples-per-step=12", "--device-batch-size=2", "--max-seq-len=192",
            "--save-every=10", "--eval-every=10", "--eval-steps=1", "--init-lr-frac=0.2", "--eval-metrics-every=20",
            "--eval-metrics-max-problems=6"],
    "rl": ["--device-type=cpu", "--num-samples=4", "--examples-per-step=12", "--eval-examples=5", "--eval-samples=2",
           "--eval-every=10", "--max-new-tokens=6", "--init-lr-frac=0.3"]}
EVALUATIONS = {
    "base_loss": ["--device-type=cpu", "--split-tokens=640", "--device-batch-size=3"],
    "chat_eval": ["--device-type=cpu", "--source=rl", "--task-name=ARC-Easy|GSM8K", "--max-problems=11",
                  "--num-samples=2", "--temperature=1", "--max-new-tokens=6"]}
STEPS = 20


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A small tinyworld and its tokenizer, for all tests of this file."""
    base = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        generate.main(["--base-dir", str(base), "--facts", "60", "--documents", "2000"])
        tok_train.main(["--vocab-size", "400"])
    return base


@pytest.fixture(autouse=True)
def environment(base_dir, monkeypatch):
    for name, value in (("NANOCHAT_BASE_DIR", base_dir), ("PYTHONPATH", ROOT), ("OMP_NUM_THREADS", 1)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(ROOT)


def plan(tag, names, *flags):
    """The argument of float64_stages for these stages under one tag."""
    training = [f"--num-iterations={STEPS}", *flags]
    return json.dumps([[name, f"--model-tag={tag}", *(STAGES[name] + training if name in STAGES else EVALUATIONS[name])]
                       for name in names])


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def launch(num_ranks, stages):
    """Run float64_stages on so many ranks, "2x2": on two nodes of two; returns what it printed."""
    if num_ranks == 1:
        return run(sys.executable, "tests/float64_stages.py", stages)
    if num_ranks != "2x2":
        return run(*TORCHRUN, "--standalone", f"--nproc-per-node={num_ranks}", "tests/float64_stages.py", stages)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}",
               "--rdzv-id=test", "--local-addr=127.0.0.1", "tests/float64_stages.py", stages]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as other:
        out = run(*command)
        return out + other.communicate(timeout=60)[0] # rank 0 may be on either


def train(num_ranks, *names):
    """The stages on so many ranks, those that no test has run yet; returns their tag."""
    tag = f"ranks{num_ranks}"
    missing = [name for name in names if not os.path.isdir(checkpoint_dir(name, tag))]
    if missing:
        launch(num_ranks, plan(tag, missing))
    return tag


def assert_same_run(stage, one, other):
    """The final weights, and every number that was logged but times, agree to 1e-6; the data seen exactly."""
    logs = []
    for tag in (one, other):
        lines = [line | line.pop("centered_results", {}) for line in metrics_of(checkpoint_dir(stage, tag))]
        logs.append([{key: math.nan if value is None else value for key, value in line.items()
                      if not key.endswith(("/dt", "_sec", "_time"))} for line in lines]) # None: nothing to log
    assert len(logs[0]) == len(logs[1]) > STEPS, "evaluations, too"
    for line, other_line in zip(*logs):
        assert line == pytest.approx(other_line, abs=1e-6, rel=1e-6, nan_ok=True)
    (weights, _, meta), (other_weights, _, other_meta) = (
        load_checkpoint(checkpoint_dir(stage, tag), STEPS, "cpu") for tag in (one, other))
    assert meta["dataloader_state_dict"] == other_meta["dataloader_state_dict"]
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, other_weights[name], atol=1e-6, rtol=0, msg=lambda text: f"{name}: {text}")

# -----------------------------------------------------------------------------
# Any number of ranks is one

def test_two_ranks_train_as_one():
    for stage in ("base", "sft"):
        assert_same_run(stage, train(1, "base", "sft"), train(2, "base", "sft"))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3, 4, "2x2"])
def test_every_stage_is_the_same_on_any_number_of_ranks(num_ranks):
    for stage in STAGES:
        assert_same_run(stage, train(1, *STAGES), train(num_ranks, *STAGES))


@pytest.mark.slow
def test_evaluations_are_split_over_ranks_without_a_trace():
    tag, found = train(1, *STAGES), []
    for num_ranks in (1, 2, 3):
        out = launch(num_ranks, plan(tag, EVALUATIONS))
        found.append(re.findall(r"^(?:train|val) bpb.*|^.*(?:accuracy|pass@2): \d.*", out, re.MULTILINE))
    assert found[0] == found[1] == found[2] and len(found[0]) == 4
    assert "pass@2: 0.00 %" not in found[0][-1], "something was solved, so that this could have failed"


@pytest.mark.slow
@pytest.mark.parametrize("stage, before, after", [("base", 2, 1), ("base", 2, 4), ("base", 2, 3), ("sft", 1, 2)])
def test_a_run_is_resumed_on_another_number_of_ranks(stage, before, after):
    """From the middle: the same global batches, and at the end the weights of one that was never stopped."""
    source, tag = train(before, "base", "sft"), f"{stage}-from{before}-to{after}"
    shutil.copytree(checkpoint_dir(stage, source), checkpoint_dir(stage, tag))
    for path in Path(checkpoint_dir(stage, tag)).glob(f"*_{STEPS:06d}*"):
        path.unlink()
    launch(after, plan(tag, [stage], "--resume"))
    assert_same_run(stage, train(1, "base", "sft"), tag)

# -----------------------------------------------------------------------------
# What may happen to a rank

FLAGS = ["--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=64", "--device-batch-size=2",
         "--total-batch-size=768", "--num-iterations=100000", "--eval-every=-1", "--core-metric-every=-1",
         "--sample-every=-1", *TINY]


def ranks_of(launcher):
    """The processes of a torchrun, by rank."""
    ranks = [child for child in psutil.Process(launcher.pid).children() if "scripts.base_train" in child.cmdline()]
    return sorted(ranks, key=lambda rank: int(rank.environ()["RANK"]))


def disturb(tag, num_ranks, act, timeout_s=120):
    """Train until there is a checkpoint, then act(launcher); returns (seconds until the end, exit code, output)."""
    command = [*TORCHRUN, "--standalone", f"--nproc-per-node={num_ranks}", "-m", "scripts.base_train", "--", *FLAGS,
               f"--model-tag={tag}", "--save-every=5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        ranks, out = [], ""
        try:
            for line in launcher.stdout:
                out += line
                ranks = ranks or ranks_of(launcher)
                if line.startswith("step 00007"):
                    break
            start = time.monotonic()
            act(launcher)
            out += launcher.communicate(timeout=timeout_s)[0]
        finally:
            for process in (*ranks, launcher):
                if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                    process.kill()
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    return time.monotonic() - start, launcher.returncode, out


def signal_rank(number, rank):
    return lambda launcher: ranks_of(launcher)[rank].send_signal(number)


def assert_ended_in_order(tag, code, out):
    assert code != 0 and out.count("error: ") == 1 and "--resume, which goes on from the last checkpoint" in out
    assert last_sound_step(checkpoint_dir("base", tag)) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_rank_ends_the_others_with_one_message(rank):
    seconds, code, out = disturb(f"killed{rank}", 3, signal_rank(signal.SIGKILL, rank))
    assert_ended_in_order(f"killed{rank}", code, out)
    assert seconds < 60 and "has died or no longer answers" in out


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_when_the_time_is_up(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DIST_TIMEOUT", "8")
    seconds, code, out = disturb("stopped", 2, signal_rank(signal.SIGSTOP, 1))
    assert_ended_in_order("stopped", code, out)
    assert seconds < 90 and "Timed out" in out # 8 s, then 30 s in which torchrun hopes that the rank heeds its SIGTERM


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_once_and_ends_all_ranks():
    seconds, code, out = disturb("terminated", 2, lambda launcher: launcher.terminate())
    saved = [int(step) for step in re.findall(r"Saved step (\d+)", out)]
    assert code != 0 and seconds < 60 and out.count("SIGTERM: finishing this step, then saving") == 1
    assert complete_steps(checkpoint_dir("base", "terminated")) == saved and saved[-1] > 5, "each of them once"
    assert "error: " not in out


def test_a_time_limit_that_is_no_number_is_refused(monkeypatch):
    from nanochat.common import UserError, dist_timeout
    for text in ("0", "-1", "soon"):
        monkeypatch.setenv("NANOCHAT_DIST_TIMEOUT", text)
        with pytest.raises(UserError, match=f"NANOCHAT_DIST_TIMEOUT must be a whole number .* got '{text}'"):
            dist_timeout()
    monkeypatch.setenv("NANOCHAT_DIST_TIMEOUT", "90")
    assert dist_timeout().total_seconds() == 90
