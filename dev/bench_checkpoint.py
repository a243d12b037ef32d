"""
What does saving cost a training run? Steps with a save among them against steps without, alternating.

    python -m dev.bench_checkpoint                       depth 6, a save every 50 steps, 3 times
    python -m dev.bench_checkpoint --depth 4 --every 20 --saves 5

The step is the real one (model, loss, optimizer) on random tokens. Printed: milliseconds a step without a save, with
one in the background, and with one that is waited for; how much is written, and how much memory the copy takes. The
last line is JSON; its "ratio" is the time of a step with background saves over that without.
"""
import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict

import torch

from nanochat.checkpoint_manager import Saver
from nanochat.common import Compute, get_compute_dtype, run_main
from nanochat.gpt import GPT, GPTConfig
from nanochat.training import accumulate, compile_model

CPU = Compute(False, 0, 0, 1, torch.device("cpu"))


def build(args):
    width = 64 * args.depth
    torch.manual_seed(0)
    model = GPT(GPTConfig(args.seq_len, args.vocab_size, args.depth, args.depth, args.depth, width, "L"))
    model.init_weights()
    model.compute_dtype = get_compute_dtype("cpu")
    return model, model.setup_optimizer()


def steps(model, optimizer, batch, num_steps, before=None):
    """Seconds of `num_steps` training steps, with `before()` ahead of the first."""
    start = time.perf_counter()
    if before is not None:
        before()
    for _ in range(num_steps):
        accumulate(model, [batch], batch[1].numel(), CPU)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("--depth", type=int, default=6, help="layers; the width is 64 times as much")
    add("--vocab-size", type=int, default=8192)
    add("--seq-len", type=int, default=256)
    add("--batch-size", type=int, default=8, help="rows a step")
    add("--every", type=int, default=50, help="steps between saves")
    add("--saves", type=int, default=3, help="rounds, each of 3 x --every steps")
    args = parser.parse_args(argv)
    model, optimizer = build(args)
    ids = torch.randint(args.vocab_size, (2, args.batch_size, args.seq_len))
    print(compile_model(model, "auto", lambda: model(*ids).backward()))
    steps(model, optimizer, tuple(ids), 3)
    folder = tempfile.mkdtemp()
    saver = Saver(folder, CPU, keep_last=1)

    def save(wait):
        saver.save(saver.saved_step or 0, model, optimizer, {"model_config": asdict(model.config)}, None)
        if wait:
            saver.finish()

    times = {"none": [], "background": [], "waiting": []}
    for _ in range(args.saves):
        for kind, before in (("none", None), ("background", lambda: save(False)), ("waiting", lambda: save(True))):
            times[kind].append(1000 * steps(model, optimizer, tuple(ids), args.every, before) / args.every)
            saver.finish()
    state = [*model.state_dict().values(), *(value for one in optimizer.state_dict()["state"].values()
                                             for value in one.values() if torch.is_tensor(value))]
    size = sum(tensor.numel() * tensor.element_size() for tensor in state) / 2**20
    shutil.rmtree(folder)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    for kind, value in medians.items():
        print(f"{kind:12s} {value:9.2f} ms a step {100 * (value / medians['none'] - 1):+7.2f} %")
    print(f"a save writes {size:.0f} MiB, of which one copy is held in memory meanwhile")
    print(json.dumps({"ratio": medians["background"] / medians["none"], "waiting": medians["waiting"] / medians["none"],
                      "ms": medians, "MiB": size, "every": args.every, "depth": args.depth}))


if __name__ == "__main__":
    run_main(main)
