"""
What scripts.plan says of this CPU, against what base_train then takes: seconds of a step and memory of the process.

    python -m dev.bench_plan                 depths 2, 4 and 6, T 512, 8 rows, windows L: some minutes on 2 cores

Needs a base directory with shards and a tokenizer, whose vocabulary counts (runs/runcpu.sh makes one). Each
depth is a process of base_train of its own, without evaluations, whose checkpoint is deleted. The last line is JSON:
`time` and `memory` are the largest relative errors, `seconds` what the calibration took.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys

from nanochat.checkpoint_manager import checkpoint_dir
from nanochat.common import run_main
from nanochat.tokenizer import get_tokenizer

TAG = "bench-plan"


def outcome(depth, shape, steps):
    """(seconds of a step, MiB) of a run of base_train."""
    folder = checkpoint_dir("base", TAG)
    shutil.rmtree(folder, ignore_errors=True)
    off = ["--eval-every=-1", "--core-metric-every=-1", "--sample-every=-1", f"--model-tag={TAG}"]
    done = subprocess.run([sys.executable, "-m", "scripts.base_train", f"--depth={depth}", f"--num-iterations={steps}",
                           *off, *shape], check=True, text=True, stdout=subprocess.PIPE)
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        seconds = [line["train/dt"] for line in map(json.loads, file) if "train/dt" in line]
    shutil.rmtree(folder, ignore_errors=True)
    return statistics.median(seconds[2:]), float(re.search(r"Peak memory usage: ([\d.]+) MiB", done.stdout)[1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("--depths", type=int, nargs="+", default=[2, 4, 6])
    add("--seq-len", type=int, default=512)
    add("--device-batch-size", type=int, default=8)
    add("--total-batch-size", type=int, default=8192, help="tokens")
    add("--steps", type=int, default=8, help="of each run; the first two do not count")
    args = parser.parse_args(argv)
    shared = ["--window-pattern=L", f"--device-batch-size={args.device_batch_size}",
              f"--total-batch-size={args.total_batch_size}"]
    plan = [sys.executable, "-m", "scripts.plan", "--here", "--json", *shared, f"--seq-len={args.seq_len}",
            f"--vocab-size={get_tokenizer().get_vocab_size()}"]
    worst, took = {"time": 0.0, "memory": 0.0}, []
    print(f"{'depth':>5} {'step s':>9} {'forecast':>9} {'MiB':>8} {'forecast':>9}")
    for depth in args.depths:
        found = json.loads(subprocess.run([*plan, f"--depth={depth}"], check=True, text=True,
                                          stdout=subprocess.PIPE).stdout)
        took.append(found["calibration_seconds"])
        guess = found["seconds_per_step"], found["memory"]["peak"] / 2**20
        seen = outcome(depth, [*shared, f"--max-seq-len={args.seq_len}"], args.steps)
        print(f"{depth:5} {seen[0]:9.3f} {guess[0]:9.3f} {seen[1]:8.0f} {guess[1]:9.0f}", flush=True)
        for name, real, forecast in zip(worst, seen, guess):
            worst[name] = max(worst[name], abs(forecast / real - 1))
    print(json.dumps({**{name: round(error, 3) for name, error in worst.items()}, "seconds": round(max(took), 1)}))


if __name__ == "__main__":
    run_main(main)
