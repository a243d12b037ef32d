"""
What does saving cost a training run?

    python -m dev.bench_checkpoint                       depth 4, a save every 50 steps: about a minute
    python -m dev.bench_checkpoint --depth 6 --every 20

The step is the real one (model, loss, optimizer) on random tokens. A save costs what the five steps from its beginning
take, less five times the median of the ten after them: so near each other, the machine's moods do not count. Printed
for saves in the background and for such as are waited for, with the size of what is written. The last line is JSON; its
"ratio" is the time of a step with background saves over that without.
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


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("--depth", type=int, default=4, help="layers; the width is 64 times as much")
    add("--vocab-size", type=int, default=8192)
    add("--seq-len", type=int, default=256)
    add("--batch-size", type=int, default=8, help="rows a step")
    add("--every", type=int, default=50, help="steps between saves")
    add("--saves", type=int, default=5, help="of each kind, which are measured")
    args = parser.parse_args(argv)
    model, optimizer = build(args)
    batch = tuple(torch.randint(args.vocab_size, (2, args.batch_size, args.seq_len)))
    print(compile_model(model, "auto", args.batch_size))
    folder = tempfile.mkdtemp()
    saver = Saver(folder, CPU, keep_last=1)

    def step():
        accumulate(model, [batch], batch[1].numel(), CPU)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def save(wait):
        saver.save(saver.saved_step or 0, model, optimizer, {"model_config": asdict(model.config)}, None)
        if wait:
            saver.finish()

    for _ in range(3):
        step()
    costs, usual = {"background": [], "waiting": []}, []
    for _ in range(args.saves):
        for kind, taken in costs.items():
            begin = seconds(lambda: save(kind == "waiting"))
            times = [seconds(step) for _ in range(15)]
            saver.finish()
            usual.append(statistics.median(times[5:]))
            taken.append(begin + sum(times[:5]) - 5 * usual[-1])
    shutil.rmtree(folder)
    state = [*model.state_dict().values(), *(value for one in optimizer.state_dict()["state"].values()
                                             for value in one.values() if torch.is_tensor(value))]
    size = sum(tensor.numel() * tensor.element_size() for tensor in state) / 2**20
    usual = statistics.median(usual)
    ratios = {kind: 1 + statistics.median(taken) / (args.every * usual) for kind, taken in costs.items()}
    print(f"a step takes {1e3 * usual:.0f} ms; a save every {args.every} steps")
    for kind, taken in costs.items():
        print(f"  {kind:10} {1e3 * statistics.median(taken):6.0f} ms, {100 * (ratios[kind] - 1):5.2f} % of the steps")
    print(f"a save writes {size:.0f} MiB, of which one copy is held in memory meanwhile")
    print(json.dumps({"ratio": round(ratios["background"], 4), "waiting": round(ratios["waiting"], 4),
                      "step_seconds": usual, "MiB": size, "every": args.every, "depth": args.depth}))


if __name__ == "__main__":
    run_main(main)
