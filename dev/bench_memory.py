"""
Peak memory of a training step against the plain reference.

    python -m dev.bench_memory                      depth 6, V 32,768, 32 rows of 512 tokens: about 3 minutes
    python -m dev.bench_memory --device-batch-size 4

Each of the two takes --steps whole steps in a process of its own, with a compiler cache of its own, which is empty; in
turns, --turns times. Memory is the largest resident set of the process, in MiB, torch itself (about 250) included. The
last line is JSON: `ratio` is our peak over the reference's.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from nanochat.common import run_main


def measure(args):
    """In the process itself: take the steps and print what they took."""
    import psutil

    from dev.bench_train import CPU, make_ours, make_reference, shapes_of
    from nanochat.training import peak_memory_mib
    width, batch = shapes_of(args)
    step = make_ours(args, width, batch)[0] if args.only == "ours" else make_reference(args, width, batch)
    seconds = []
    for _ in range(args.steps):
        step()
        seconds.append(time.time() - psutil.Process().create_time())
    print(json.dumps({"first_step": seconds[0], "MiB": peak_memory_mib(CPU)}))


def run_alone(who, argv):
    """What `measure` prints, of a process that has compiled nothing yet."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run([sys.executable, "-m", "dev.bench_memory", *argv, "--only", who], check=True, text=True,
                              stdout=subprocess.PIPE, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache})
    return json.loads(done.stdout.splitlines()[-1])


def compare(key, steps, turns, doc, argv=None):
    """A whole benchmark: measure both as the flags say, print both, and last the ratio of their `key` as JSON."""
    from dev.bench_train import add_shape_flags
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=doc.strip().split("\n")[0])
    add_shape_flags(parser, depth=6, vocab_size=32768, batch_size=32, device_batch_size=32)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--turns", type=int, default=turns)
    parser.add_argument("--only", choices=["ours", "reference"], help="measure this process and no other")
    args = parser.parse_args(argv)
    if args.only:
        measure(args)
        return
    found = {"ours": [], "reference": []}
    for _ in range(args.turns):
        for who, figures in found.items():
            figures.append(run_alone(who, [f"--steps={steps}", *argv]))
    medians = {who: {name: statistics.median(one[name] for one in figures) for name in figures[0]}
               for who, figures in found.items()}
    for who, median in medians.items():
        print(f"{who:10} peak {median['MiB']:8,.0f} MiB, first step after {median['first_step']:6.1f} s")
    print(json.dumps({"ratio": round(medians["ours"][key] / medians["reference"][key], 3), **medians,
                      "depth": args.depth, "batch_size": args.batch_size, "device_batch_size": args.device_batch_size}))


if __name__ == "__main__":
    run_main(lambda: compare("MiB", 2, 1, __doc__))
