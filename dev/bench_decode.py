"""
How near decoding comes to what the machine can do, and to another library.

    python -m dev.bench_decode                              depth 6, V 32,768, batches of 1, 16 and 32, about 2 minutes
    python -m dev.bench_decode --vocab-size 4096 --depth 4

The roofline of a step: weights and keys cross the memory bus once, at the speed of a plain read of 512 MB, and every
weight takes two operations a row, at the speed of this dtype's matrix products with 1,024 rows; the slower of the two
bounds the step. "products" is what the matrix products of a step alone take here. Then one stream against `generate` of
the transformers library with a model of the same shape. Each figure is the median of alternating turns. The last line
is JSON; its `ratio` is the smallest share of the roofline.
"""
import argparse
import json
import os
import statistics
import time

import torch
import torch.nn.functional as F

from nanochat.common import DTYPES, compute_init, get_compute_dtype
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig, Linear

PROMPT_TOKENS = 64


class Ids:
    """Stands for a tokenizer: special ids beyond the vocabulary, so that nothing ends an answer."""

    def encode_special(self, text):
        return -1

    def get_bos_token_id(self):
        return -1


def seconds(function, turns=1):
    started = time.perf_counter()
    for _ in range(turns):
        function()
    return (time.perf_counter() - started) / turns


def make_model(args, dtype):
    """A random model of this shape in `dtype`; head dimension 64, full windows."""
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=1024, vocab_size=args.vocab_size, n_layer=args.depth, n_head=args.depth,
                       n_kv_head=args.depth, n_embd=64 * args.depth, window_pattern="L")
    model = GPT(config)
    model.init_weights()
    model = model.to(dtype).eval()
    model.compute_dtype = dtype
    model.pack_weights()
    return model


def machine(dtype):
    """(bytes per second of a plain read, operations per second of matrix products), the best of a few turns each."""
    memory = torch.ones(1 << 27)
    read = min(seconds(memory.sum) for _ in range(5))
    x, weight = torch.ones(1024, 1024, dtype=dtype), torch.ones(4096, 1024, dtype=dtype)
    multiply = min(seconds(lambda: F.linear(x, weight)) for _ in range(10))
    return memory.nbytes / read, 2 * weight.numel() * x.size(0) / multiply


def step_seconds(engine, num_rows, num_tokens):
    """Median seconds of one step, prompt left out."""
    prompt = list(range(1, 1 + PROMPT_TOKENS))
    times = []
    for _ in engine.generate(prompt, num_rows, max_tokens=num_tokens, temperature=0):
        times.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(times, times[1:]))


def products_seconds(model, num_rows):
    """Seconds of the matrix products of one step and nothing else."""
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    inputs = [torch.ones(num_rows, linear.in_features, dtype=linear.weight.dtype) for linear in linears]
    return seconds(lambda: [linear(x) for linear, x in zip(linears, inputs)], turns=20)


def transformers_seconds(args, dtype, num_tokens):
    """A function that runs `generate` of transformers' model of the same shape and returns seconds per token."""
    from transformers import NanoChatConfig, NanoChatForCausalLM
    model = NanoChatForCausalLM(NanoChatConfig(
        vocab_size=args.vocab_size, hidden_size=64 * args.depth, intermediate_size=256 * args.depth,
        num_hidden_layers=args.depth, num_attention_heads=args.depth, num_key_value_heads=args.depth,
        max_position_embeddings=1024)).to(dtype).eval()
    ids = torch.arange(1, 1 + PROMPT_TOKENS)[None]
    def run(num):
        return seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num,
                                              min_new_tokens=num, do_sample=False, pad_token_id=0))
    return lambda: (run(num_tokens) - run(1)) / (num_tokens - 1) # the prompt is left out here too


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--depth", type=int, default=6, help="layers; the width is 64 times as much")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 32], help="rows that decode together")
    parser.add_argument("--num-tokens", type=int, default=128, help="of each row")
    parser.add_argument("--turns", type=int, default=5, help="repetitions of every measurement")
    parser.add_argument("--dtype", default="", choices=["", *DTYPES], help="empty = bf16 where hardware has it")
    args = parser.parse_args(argv)
    compute = compute_init("cpu")
    dtype = get_compute_dtype(compute.device, args.dtype)
    model = make_model(args, dtype)
    engine, other = Engine(model, Ids()), transformers_seconds(args, dtype, args.num_tokens)
    sizes = model.num_scaling_params()
    weights = sizes["lm_head"] + sizes["transformer_matrices"]
    keys = 2 * args.depth * 64 * args.depth * (PROMPT_TOKENS + args.num_tokens / 2) # of one row, on average
    taken, products = {rows: [] for rows in args.batches}, {rows: [] for rows in args.batches}
    theirs, ours, machines = [], [], []
    for _ in range(args.turns):
        machines.append(machine(dtype))
        for rows in args.batches:
            taken[rows].append(step_seconds(engine, rows, args.num_tokens))
            products[rows].append(products_seconds(model, rows))
        ours.append(step_seconds(engine, 1, args.num_tokens))
        theirs.append(other())
    bandwidth, speed = (statistics.median(values) for values in zip(*machines))
    size = torch.finfo(dtype).bits // 8
    print(f"depth {args.depth}, V {args.vocab_size:,}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} "
          f"threads, load {os.getloadavg()[0]:.1f}; memory {bandwidth / 1e9:.1f} GB/s, "
          f"matrices {speed / 1e9:.0f} GFLOP/s")
    print(f"{'rows':>5} {'ms a step':>10} {'tokens/s':>10} {'products ms':>12} {'roofline ms':>12} {'share':>6}")
    shares = {}
    for rows in args.batches:
        step = statistics.median(taken[rows])
        bound = max(size * (weights + rows * keys) / bandwidth, 2 * weights * rows / speed)
        shares[rows] = bound / step
        alone = statistics.median(products[rows])
        print(f"{rows:5} {1e3 * step:10.2f} {rows / step:10.0f} {1e3 * alone:12.2f} {1e3 * bound:12.2f} "
              f"{shares[rows]:6.2f}")
    stream = statistics.median(theirs) / statistics.median(ours)
    print(f"one stream: {1 / statistics.median(ours):.0f} tokens/s, transformers {1 / statistics.median(theirs):.0f}: "
          f"{stream:.2f} times")
    print(json.dumps({"ratio": round(min(shares.values()), 3), "shares": {k: round(v, 3) for k, v in shares.items()},
                      "against_transformers": round(stream, 3), "bandwidth": round(bandwidth), "flops": round(speed)}))


if __name__ == "__main__":
    main()
