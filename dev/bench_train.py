"""
Training speed against the plain reference, and against what the machine's matrix products reach.

    python -m dev.bench_train                                  depth 4, V 8,192, T 512: about 3 minutes
    python -m dev.bench_train --depth 6 --vocab-size 32768

Both take whole steps (loss, gradients, optimizer) of equal shapes on random tokens, in turns: A B A B ... The FLOP/s of
a step count 6 per matrix weight and token and attention's share (GPT.estimate_flops), the same for both; "products" are
those of plain matmuls of the model's own shapes, forward and two backward, in the dtype of the activations, weighted by
the time that each of them takes. The last line is JSON; its `ratio` is our tokens per second over the reference's.
"""
import argparse
import json
import os
import statistics
import time

import torch

from dev import baseline
from nanochat.common import Compute, get_compute_dtype
from nanochat.gpt import GPT, GPTConfig, Linear
from nanochat.training import accumulate, compile_model

CPU = Compute(False, 0, 0, 1, torch.device("cpu"))


def add_shape_flags(parser, **defaults):
    add = parser.add_argument
    add("--depth", type=int, default=4, help="layers; the width is 64 times as much, rounded up to whole heads")
    add("--head-dim", type=int, default=128)
    add("--vocab-size", type=int, default=8192)
    add("--seq-len", type=int, default=512)
    add("--window-pattern", default="L")
    add("--batch-size", type=int, default=16, help="rows of a step")
    add("--device-batch-size", type=int, default=16, help="rows of our micro-batches; the reference has but one")
    add("--dtype", default="", help="of our activations; empty = bf16 where the hardware has it")
    parser.set_defaults(**defaults)


def shapes_of(args):
    """(width, a batch of random ids and targets)."""
    ids = torch.randint(args.vocab_size, (args.batch_size, args.seq_len + 1))
    width = -(-args.depth * 64 // args.head_dim) * args.head_dim
    return width, (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def make_ours(args, width, batch):
    """(step function, model): a step as base_train takes it, with micro-batches of --device-batch-size rows."""
    torch.manual_seed(42)
    heads = width // args.head_dim
    model = GPT(GPTConfig(args.seq_len, args.vocab_size, args.depth, heads, heads, width, args.window_pattern))
    model.init_weights()
    model.compute_dtype = get_compute_dtype("cpu", args.dtype)
    optimizer = model.setup_optimizer()
    micro_batches = list(zip(*(part.split(args.device_batch_size) for part in batch)))
    print(compile_model(model, "auto", len(micro_batches[0][0])))

    def step():
        accumulate(model, micro_batches, batch[1].numel(), CPU)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, model


def make_reference(args, width, batch):
    torch.manual_seed(42)
    model = baseline.Model(args.vocab_size, args.depth, width // args.head_dim, width, args.seq_len,
                           args.window_pattern)
    optimizer, compiled = baseline.Optimizer(model, width), torch.compile(model, dynamic=False)

    def step():
        compiled(*batch).backward()
        optimizer.step()
    return step


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def products_flops(model, args):
    """FLOP/s of the matrix products of one micro-batch and nothing else: y = x w', dx = dy w, dw = dy' x of each."""
    tokens, dtype = args.device_batch_size * args.seq_len, model.compute_dtype
    flops = taken = 0
    for linear in (module for module in model.modules() if isinstance(module, Linear)):
        weight = torch.randn(linear.weight.shape).to(dtype)
        rows = min(tokens, 512) if linear is model.lm_head else tokens # as the loss takes them
        x, dy = torch.randn(rows, weight.size(1)).to(dtype), torch.randn(rows, weight.size(0)).to(dtype)
        once = statistics.median(seconds(lambda: (x @ weight.T, dy @ weight, dy.T @ x)) for _ in range(3))
        flops += 6 * weight.numel() * tokens
        taken += once * tokens / rows
    return flops / taken


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add_shape_flags(parser)
    parser.add_argument("--steps", type=int, default=8, help="steps of each that count")
    args = parser.parse_args(argv)
    width, batch = shapes_of(args)
    ours, model = make_ours(args, width, batch)
    reference = make_reference(args, width, batch)
    for _ in range(2): # compilation, first touch of the memory
        ours(), reference()
    times, products = {"ours": [], "reference": []}, []
    for _ in range(args.steps):
        times["ours"].append(seconds(ours))
        times["reference"].append(seconds(reference))
        products.append(products_flops(model, args))
    medians, tokens = {name: statistics.median(values) for name, values in times.items()}, batch[0].numel()
    reach = statistics.median(products)
    print(f"depth {args.depth}, width {width}, V {args.vocab_size:,}, {args.batch_size} x {args.seq_len} tokens, "
          f"{model.compute_dtype}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    achieved = {name: model.estimate_flops() * tokens / value for name, value in medians.items()}
    for name, value in medians.items():
        print(f"{name:10} {1e3 * value:9.1f} ms {tokens / value:9,.0f} tokens/s {achieved[name] / 1e9:8.1f} GFLOP/s "
              f"{achieved[name] / reach:6.2f} of the products alone")
    print(f"products   {reach / 1e9:42.1f} GFLOP/s")
    print(json.dumps({"ratio": round(medians["reference"] / medians["ours"], 3), "tokens_per_second":
                      {name: round(tokens / value) for name, value in medians.items()},
                      "share_of_products": round(achieved["ours"] / reach, 3), "products": round(reach),
                      **{name: vars(args)[name] for name in ("depth", "vocab_size", "seq_len", "batch_size")}}))


if __name__ == "__main__":
    main()
