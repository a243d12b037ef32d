"""
Kill -9 a small training run again and again, resume it each time, and compare its end with that of a calm run.

    python -m dev.torture                                  50 kills of each stage, on tinyworld
    python -m dev.torture --kills 5 --stages base sft

A stage saves after every step. A kill comes at random: while a process starts, between two steps, or as soon as a save
has begun to write. In the end the stage must have the calm run's weights and losses, bit for bit; else exit code 1.
"""
import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nanochat.checkpoint_manager import STAGE_DIRS, STAGE_SCRIPTS, complete_steps, last_sound_step, load_checkpoint
from nanochat.common import UserError, run_main

MODEL = ["--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=128", "--device-batch-size=4",
         "--total-batch-size=512", "--core-metric-every=-1", "--sample-every=-1"]
QUICK = {
    "base": [*MODEL, "--compile=off", "--eval-every=-1"],
    "mid": ["--compile=off", "--eval-every=-1", "--max-seq-len=256", "--device-batch-size=4", "--total-batch-size=1024",
            "--eval-tokens=1024"],
    "sft": ["--compile=off", "--eval-every=-1", "--eval-metrics-every=-1", "--target-examples-per-step=4"],
    "rl": ["--eval-every=-1", "--examples-per-step=2", "--num-samples=4", "--max-new-tokens=8"],
}
SOURCES = {"mid": "base", "sft": "mid", "rl": "sft"}


def run(*command, **options):
    return subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, **options)


def succeed(process):
    output = process.communicate()[0]
    if process.returncode:
        raise UserError(f"{' '.join(process.args[2:])} failed:\n{output}")


def train(stage, tag, steps):
    flags = [f"--source={SOURCES[stage]}"] if stage in SOURCES else []
    return run(f"scripts.{STAGE_SCRIPTS[stage]}", *QUICK[stage], *flags, f"--model-tag={tag}", "--device-type=cpu",
               f"--num-iterations={steps}", "--save-every=1", "--keep-last=3", "--resume")


def wait_until(condition, process, pause=0.001):
    """Wait for a condition or the end of the process."""
    while process.poll() is None and not condition():
        time.sleep(pause)


def kill_at_random(process, folder, rng):
    """Returns the kind of moment, or None when the process had ended before."""
    kind, began = rng.choice(["start", "step", "save"]), time.time()
    if kind == "start":
        delay = rng.uniform(0, 6)
        wait_until(lambda: time.time() - began > delay, process)
    else:
        known = complete_steps(folder)
        wait_until(lambda: complete_steps(folder) != known, process) # some progress
        if kind == "step":
            time.sleep(rng.uniform(0, 0.3))
        else:
            wait_until(lambda: any(name.endswith(".tmp") for name in os.listdir(folder)), process, 0)
            time.sleep(rng.uniform(0, 0.004))
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGKILL)
    process.communicate() # and close the pipe
    return kind


def losses(folder):
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def torture(base, stage, num_kills, steps, rng):
    """Number of kills by moment, and of those that left a half-written file; UserError when the ends differ."""
    calm, storm = (str(base / STAGE_DIRS[stage] / tag) for tag in ("calm", "storm"))
    succeed(train(stage, "calm", steps))
    kills, torn = dict.fromkeys(("start", "step", "save"), 0), 0
    os.makedirs(storm)
    while sum(kills.values()) < num_kills:
        kind = kill_at_random(process := train(stage, "storm", steps), storm, rng)
        if kind is None:
            succeed(process) # or tell what went wrong
            break
        kills[kind] += 1
        torn += any(name.endswith(".tmp") for name in os.listdir(storm))
        reached = (complete_steps(storm) or [0])[-1]
        print(f"{stage}: kill {sum(kills.values())} of {num_kills}, at a {kind}, after step {reached}", flush=True)
    succeed(train(stage, "storm", steps))
    ends = [load_checkpoint(folder, last_sound_step(folder), "cpu")[0] for folder in (calm, storm)]
    different = [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])]
    if different or losses(calm) != losses(storm) or last_sound_step(storm) != steps:
        raise UserError(f"{stage}: after {sum(kills.values())} kills the run ended otherwise than the calm one: "
                        f"{', '.join(different) or 'the losses differ'}")
    return kills, torn


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="for each stage")
    parser.add_argument("--steps", type=int, default=-1, help="of each stage; -1 = 40 a kill")
    parser.add_argument("--stages", nargs="+", default=["base", "mid", "sft", "rl"], choices=list(QUICK),
                        help="what to torture; the stages before run undisturbed for two steps")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    steps, rng = args.steps if args.steps > 0 else 40 * args.kills, random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        os.environ["NANOCHAT_BASE_DIR"] = folder
        succeed(run("dev.tinyworld.generate", "--facts", "60", "--documents", "400"))
        succeed(run("scripts.tok_train", "--vocab-size", "400"))
        last = max(map(list(QUICK).index, args.stages))
        for stage in itertools.islice(QUICK, last + 1):
            if stage in args.stages:
                kills, torn = torture(base, stage, args.kills, steps, rng)
                print(f"{stage}: the same weights and losses as undisturbed after {steps} steps; kills by moment: "
                      f"{kills}, {torn} of them left a half-written file")
            else:
                succeed(train(stage, "calm", 2))
                shutil.copytree(base / STAGE_DIRS[stage] / "calm", base / STAGE_DIRS[stage] / "storm")


if __name__ == "__main__":
    run_main(main)
