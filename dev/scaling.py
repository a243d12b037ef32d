"""
What the ranks send each other in a step, and what that leaves of the speed of 1 to 64 nodes of 8 GPUs.

    python -m dev.scaling                                          d12 to d32 at 524,288 tokens a step
    python -m dev.scaling --total-batch-size 2097152 --inter-node 25 --depths 26 32

The bytes follow from the optimizer's own plan (optim.share_out) over the real shapes; tests/test_scaling.py finds the
same in real runs. The times are a model that no GPU has confirmed: its assumptions are printed with the table. The last
line is JSON; its `ratio` is the worst of the first table's.
"""
import argparse
import contextlib
import io
import json
import math
from collections import Counter

import torch

from nanochat.gpt import GPT
from nanochat.optim import share_out
from scripts import base_train

GPUS = 8 # of a node
ASSUMPTIONS = """Assumed: the total batch stays, so more nodes mean fewer rows per GPU, at the same {mfu:.0%} of
{peak:.0f} TFLOP/s. A collective runs in rings over all GPUs at once, one collective at a time: {intra:g} GB/s per GPU
inside a node, {inter:g} GB/s per GPU between nodes, each GPU with its own link, and {latency:g} us for each doubling of
the ranks. {overlap:.0%} of that hides behind computation. Muon takes as long as on the rank that owns most of it.
Token and value tables are bf16, as on CUDA. Left out: AdamW (bound by memory, shrinks with the ranks), reading
data, evaluation, saving, stragglers."""


def build(depth, vocab_size, tables=torch.bfloat16):
    """(model, optimizer) of this depth as base_train makes them, without memory; tables in bf16 as on CUDA."""
    args = base_train.build_parser().parse_args([f"--depth={depth}"])
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
        model = GPT(base_train.build_config(args, vocab_size))
        for table in [model.transformer.wte, *model.value_embeds.values()]:
            table.to(tables)
        return model, model.setup_optimizer()


def collectives(units, world_size):
    """Yield (name, bytes of the whole tensor, root or None) of everything that a step of the optimizer sends."""
    for unit in units if world_size > 1 else []:
        size = sum(p.numel() * p.element_size() for p in unit.params)
        if unit.even is None:
            yield "all_reduce", size, None
            continue
        row = size // unit.num_rows
        if unit.even:
            yield "reduce_scatter", row * unit.even * world_size, None
            yield "all_gather", row * unit.even * world_size, None
        for owner in unit.owners:
            yield "reduce", row, owner
            yield "broadcast", row, owner


def bytes_moved(name, size, world_size):
    """
    Bytes that a rank sends for a collective over a tensor of `size` bytes, by the algorithms that send fewest (Thakur
    et al. 2005, https://doi.org/10.1177/1094342005051521). For reduce and broadcast the mean: one rank sends nothing.
    """
    return (2 if name == "all_reduce" else 1) * size * (world_size - 1) / world_size


def traffic(param_groups, world_size):
    """Counter of the bytes that a rank sends in a step, by collective."""
    moved = Counter()
    for name, size, _ in collectives(share_out(param_groups, world_size), world_size):
        moved[name] += bytes_moved(name, size, world_size)
    return moved


def optimal_bytes(param_groups, world_size):
    """Bytes that a rank sends in a reduce-scatter plus an all-gather of all parameters."""
    size = sum(p.numel() * p.element_size() for group in param_groups for p in group["params"])
    return 2 * size * (world_size - 1) / world_size


def muon_flops(param_groups, world_size):
    """FLOPs of the orthogonalisations on the rank that has most of them."""
    load = [0] * world_size
    for unit in share_out(param_groups, world_size):
        group = param_groups[unit.group_idx]
        if group["kind"] == "muon":
            short, long = sorted(unit.params[0].shape)
            cost = group["ns_steps"] * (4 * short**2 * long + 2 * short**3) # two products with the matrix, one without
            for rank in range(world_size):
                load[rank] += cost * sum(map(len, unit.own(unit.params, rank)))
    return max(load)


def step_seconds(model, param_groups, num_nodes, args):
    """(computation, communication that it does not hide) of a step, in seconds."""
    world_size = GPUS * num_nodes
    flops = model.estimate_flops() * args.total_batch_size / world_size + muon_flops(param_groups, world_size)
    seconds = 0
    for name, size, _ in collectives(share_out(param_groups, world_size), world_size):
        inside = bytes_moved(name, size, world_size) / (args.intra_node * 1e9)
        between = bytes_moved(name, size, num_nodes) / (GPUS * args.inter_node * 1e9) # the links of a node share it
        seconds += max(inside, between) + args.latency * 1e-6 * math.log2(world_size)
    return flops / (args.peak_flops * args.mfu), seconds * (1 - args.overlap)


def print_bytes(args):
    """The first table, in fp32; returns the worst ratio."""
    names = ("reduce_scatter", "all_gather", "reduce", "broadcast", "all_reduce")
    print("MB (1e6 bytes) that a rank sends in a step, all in fp32; ratio: to one reduce-scatter and one all-gather")
    print(f"{'model':>5} {'ranks':>5} " + " ".join(f"{name:>14}" for name in names) + f" {'ratio':>8}")
    worst = 0
    for depth in args.depths:
        groups = build(depth, args.vocab_size, torch.float32)[1].param_groups
        for world_size in args.ranks:
            moved = traffic(groups, world_size)
            ratio = sum(moved.values()) / optimal_bytes(groups, world_size)
            worst = max(worst, ratio)
            columns = " ".join(f"{moved[name] / 1e6:14.2f}" for name in names)
            print(f"{f'd{depth}':>5} {world_size:5} {columns} {ratio:8.4f}")
    return worst


def print_times(args):
    """The second table; returns {depth: {nodes: efficiency}}."""
    print(f"\n{'model':>5} {'nodes':>5} {'rows':>5} {'compute ms':>11} {'waiting ms':>11} {'step ms':>9} "
          f"{'efficiency':>10}")
    efficiency = {}
    for depth in args.depths:
        model, optimizer = build(depth, args.vocab_size)
        alone = sum(step_seconds(model, optimizer.param_groups, 1, args))
        for num_nodes in args.nodes:
            rows = args.total_batch_size // (model.config.sequence_len * GPUS * num_nodes)
            if rows == 0:
                print(f"{f'd{depth}':>5} {num_nodes:5} {'none':>5}   fewer rows in a step than GPUs")
                continue
            compute, waiting = step_seconds(model, optimizer.param_groups, num_nodes, args)
            share = alone / num_nodes / (compute + waiting)
            efficiency.setdefault(f"d{depth}", {})[num_nodes] = round(share, 3)
            print(f"{f'd{depth}':>5} {num_nodes:5} {rows:5} {1e3 * compute:11.1f} {1e3 * waiting:11.1f} "
                  f"{1e3 * (compute + waiting):9.1f} {share:10.3f}")
    return efficiency


def build_parser():
    parser = argparse.ArgumentParser(prog="dev.scaling", description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("--depths", type=int, nargs="+", default=[12, 16, 20, 26, 32], help="models, by number of layers")
    add("--vocab-size", type=int, default=32768)
    add("--ranks", type=int, nargs="+", default=[2, 3, 8, 64, 512], help="numbers of ranks of the table of bytes")
    add("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="numbers of nodes of the table of times")
    add("--total-batch-size", type=int, default=524288, help="tokens per step, all ranks together")
    add("--intra-node", type=float, default=300, help="GB/s that a GPU sends inside a node (H100: NVLink, 450 at best)")
    add("--inter-node", type=float, default=40, help="GB/s that a GPU sends to other nodes (400 Gbit/s: 50 at best)")
    add("--latency", type=float, default=20, help="microseconds of a collective for each doubling of the ranks")
    add("--peak-flops", type=float, default=989e12, help="FLOP/s of a GPU")
    add("--mfu", type=float, default=0.5, help="share of them that computation reaches")
    add("--overlap", type=float, default=0.0, help="share of the communication that hides behind computation, 0 to 1")
    return parser


def check_args(args):
    """All that is wrong with the flags, as sentences."""
    problems = [f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}"
                for name in ("total_batch_size", "intra_node", "inter_node", "peak_flops", "mfu")
                if not getattr(args, name) > 0]
    problems += [f"--{name} must be at least {least}, got {min(getattr(args, name))}"
                 for name, least in (("depths", 1), ("ranks", 2), ("nodes", 1)) if min(getattr(args, name)) < least]
    return problems + [f"--overlap must be between 0 and 1, got {args.overlap}"] * (not 0 <= args.overlap <= 1)


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    worst = print_bytes(args)
    efficiency = print_times(args)
    print(ASSUMPTIONS.format(mfu=args.mfu, peak=args.peak_flops / 1e12, intra=args.intra_node, inter=args.inter_node,
                             latency=args.latency, overlap=args.overlap))
    print(json.dumps({"ratio": round(worst, 4), "efficiency": efficiency}))


if __name__ == "__main__":
    main()
