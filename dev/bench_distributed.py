"""
What sharing out the optimizer saves, and what several processes cost on one CPU machine.

    python -m dev.bench_distributed                 depth 6, 16,384 tokens a step; minutes on two free cores
    python -m dev.bench_distributed --turns 9 --dtype float32

First the bytes of optimizer state that each of 1, 2 and 4 gloo processes holds. Then tokens/s of the whole training
step (accumulate, optimizer) by one process with two threads and by two processes with one thread each, in alternating
turns, of which the medians are taken. The last line is JSON; its `ratio` is that of the two processes to the one.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist

from nanochat.common import DTYPES, Compute, get_compute_dtype
from nanochat.gpt import GPT, GPTConfig
from nanochat.training import accumulate

SEQ_LEN = 512


def make_run(args, rank, world_size):
    """(a function that takes a training step on this rank's share of `num_rows` rows, the optimizer)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(SEQ_LEN, args.vocab_size, args.depth, args.depth, args.depth, 64 * args.depth, "L"))
    model.init_weights()
    model.compute_dtype = get_compute_dtype("cpu", args.dtype)
    optimizer, compute = model.setup_optimizer(), Compute(world_size > 1, rank, rank, world_size, torch.device("cpu"))
    ids = torch.randint(args.vocab_size, (args.total_batch_size // SEQ_LEN, SEQ_LEN + 1))

    def step(num_rows):
        micro_batches = ids[rank:num_rows:world_size].split(args.device_batch_size)
        accumulate(model, ((rows[:, :-1], rows[:, 1:]) for rows in micro_batches), num_rows * SEQ_LEN, compute)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, optimizer


def work(args, rank, world_size, num_threads, folder, pipe):
    """One rank. Tells its bytes of state; then the seconds of as many steps as it is told, until it is told 0."""
    torch.set_num_threads(num_threads)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{world_size}", rank=rank, world_size=world_size)
    with contextlib.redirect_stdout(None):
        step, optimizer = make_run(args, rank, world_size)
    step(world_size) # a row each: makes the state and the connections
    pipe.send(sum(value.nbytes for state in optimizer.state.values() for value in state.values()
                  if torch.is_tensor(value)))
    while num_steps := pipe.recv():
        started = time.perf_counter()
        for _ in range(num_steps):
            step(args.total_batch_size // SEQ_LEN)
        pipe.send(time.perf_counter() - started)
    if world_size > 1:
        dist.destroy_process_group()


def start(args, world_size, num_threads, folder):
    """Start `world_size` processes; returns (bytes of state of each rank, a pipe to each)."""
    context, pipes = multiprocessing.get_context("spawn"), []
    for rank in range(world_size):
        pipe, theirs = context.Pipe()
        context.Process(target=work, args=(args, rank, world_size, num_threads, folder, theirs), daemon=True).start()
        theirs.close() # so that a process that dies is noticed
        pipes.append(pipe)
    return [pipe.recv() for pipe in pipes], pipes


def ask(pipes, num_steps):
    """Seconds that the slowest rank takes for that many steps; 0 steps end them."""
    for pipe in pipes:
        pipe.send(num_steps)
    return max(pipe.recv() for pipe in pipes) if num_steps else 0


def build_parser():
    parser = argparse.ArgumentParser(prog="dev.bench_distributed", description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("--depth", type=int, default=6, help="layers; the width is 64 times as much")
    add("--vocab-size", type=int, default=32768)
    add("--total-batch-size", type=int, default=16384, help=f"tokens per step, a multiple of {2 * SEQ_LEN}")
    add("--device-batch-size", type=int, default=8, help=f"rows of {SEQ_LEN} tokens per process and forward pass")
    add("--steps", type=int, default=1, help="of each turn")
    add("--turns", type=int, default=5, help="turns of each side, after one that does not count")
    add("--dtype", default="", choices=["", *DTYPES], help="empty = bf16 where the hardware has it")
    return parser


def check_args(args):
    """All that is wrong with the flags, as sentences."""
    problems = [f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
                for name in ("depth", "vocab_size", "total_batch_size", "device_batch_size", "steps", "turns")
                if getattr(args, name) < 1]
    return problems + [f"--total-batch-size must be a multiple of {2 * SEQ_LEN}, got {args.total_batch_size}"] * (
        args.total_batch_size % (2 * SEQ_LEN) != 0)


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    print(f"depth {args.depth}, V {args.vocab_size:,}, {args.total_batch_size:,} tokens a step, "
          f"{str(get_compute_dtype('cpu', args.dtype)).removeprefix('torch.')}, load {os.getloadavg()[0]:.1f}")
    print(f"{'processes':>9} {'threads':>7} {'MB of optimizer state, by rank':>34} {'largest x N / whole':>20}")
    pipes, state = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for world_size, num_threads in ((4, 1), (1, 2), (2, 1)):
            state[world_size], pipes[world_size] = start(args, world_size, num_threads, folder)
            if world_size == 4: # only looked at
                ask(pipes[4], 0)
        for n in (1, 2, 4):
            print(f"{n:9} {2 if n == 1 else 1:7} {', '.join(f'{size / 1e6:.1f}' for size in state[n]):>34} "
                  f"{max(state[n]) * n / state[1][0]:20.3f}")
        turns = []
        for side in [1, 2] * (args.turns + 1): # the first of each warms up
            turns.append(ask(pipes[side], args.steps if len(turns) > 1 else 1))
        ask(pipes[1] + pipes[2], 0)
    speeds = {n: [args.steps * args.total_batch_size / seconds for seconds in turns[n + 1::2]] for n in (1, 2)}
    for n, kind in ((1, "1 process, 2 threads"), (2, "2 processes, 1 thread")):
        print(f"{kind:>22}: {statistics.median(speeds[n]):8.0f} tokens/s, "
              f"{min(speeds[n]):.0f} to {max(speeds[n]):.0f}")
    ratio = statistics.median(speeds[2]) / statistics.median(speeds[1])
    print(json.dumps({"ratio": round(ratio, 3), "state_bytes": state, "tokens_per_second": speeds}))


if __name__ == "__main__":
    main()
