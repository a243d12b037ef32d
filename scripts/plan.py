"""
What a training run will cost and give, before it is paid for: size, time, memory, data, quality and the commands.

    python -m scripts.plan --depth 20 --gpu h100 --count 8          from the dial of base_train
    python -m scripts.plan --dollars 100 --ratio 20                 the deepest model for the money; or --hours, --core
    python -m scripts.plan --depth 4 --here --seq-len 512           on this machine; a CPU is measured for a minute
    python -m scripts.plan --check                                  published runs, each forecast from all the others

GPU times follow from the FLOPs and from the share of the peak that published runs reached (nanochat/forecast.py).
Reads nothing and writes nothing.
"""
import argparse
import contextlib
import json
import math

import torch

from nanochat import forecast
from nanochat.common import DTYPES, get_compute_dtype, get_peak_flops, run_main
from nanochat.dataset import CROPPED, MAX_SHARD
from nanochat.forecast import GPUS, Machine
from nanochat.gpt import config_of_depth, count_params, flops_per_token, memory_forecast
from nanochat.report import HOURLY_RATES
from nanochat.tokenizer import MIN_VOCAB_SIZE
from nanochat.training import batch_for_horizon, nearest_multiple

CHARS_PER_TOKEN, CHARS_PER_SHARD = 4.8, 250e6 # see runs/speedrun.sh
DEPTHS = range(2, 65)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("--depth", type=int, help="number of layers; or one of the next three:")
    add("--dollars", type=float, help="the deepest model for this money, all stages included")
    add("--hours", type=float, help="the deepest model for this time, all stages included")
    add("--core", type=float, help="the smallest model whose forecast reaches this CORE")
    add("--check", action="store_true", help="forecast published runs from all the others, and say how far off it is")
    add("--gpu", default="h100", help=f"one of {', '.join(GPUS)}; or any name with --peak-flops and --bandwidth")
    add("--count", type=int, default=8, help="GPUs of a node")
    add("--nodes", type=int, default=1, help="nodes")
    add("--here", action="store_true", help="this machine instead: its GPUs, or its CPU after a minute of measuring")
    add("--peak-flops", type=float, help="bf16 FLOP/s of a GPU")
    add("--bandwidth", type=float, help="GB/s that a GPU sends to others of its node")
    add("--gpu-memory", type=float, help="GiB of a GPU; default for one that is not known: 79")
    add("--price", type=float, help="dollars per GPU and hour")
    add("--dtype", default="", choices=["", *DTYPES], help="activation dtype; empty = bfloat16 if the hardware has it")
    add("--ratio", type=float, default=10.5, help="tokens per scaling parameter, as base_train counts them")
    add("--vocab-size", type=int, default=32768, help="tokens of the tokenizer")
    add("--seq-len", type=int, default=2048, help="context length in tokens")
    add("--head-dim", type=int, default=128, help="width of an attention head")
    add("--window-pattern", default="SSSL", help="attention windows, as in base_train")
    add("--device-batch-size", type=int, help="rows per device and forward pass; default: the most that fit, up to 32")
    add("--total-batch-size", type=int, help="tokens per optimizer step; default: by the length of the run")
    add("--json", action="store_true", help="one JSON object instead of text")
    return parser


def check_args(args):
    """All that is wrong with the flags, as sentences."""
    goals = [name for name in ("depth", "dollars", "hours", "core") if getattr(args, name) is not None]
    problems = [f"give one of --depth, --dollars, --hours and --core, got {len(goals)}"] * (len(goals) > 1)
    problems += [f"--{name.replace('_', '-')} must be a positive number, got {value}" for name, value in
                 vars(args).items() if type(value) in (int, float) and not 0 < value < math.inf]
    if args.vocab_size < MIN_VOCAB_SIZE:
        problems.append(f"--vocab-size must be at least {MIN_VOCAB_SIZE}, got {args.vocab_size}")
    if not args.here and args.gpu.lower() not in GPUS and not (args.peak_flops and args.bandwidth):
        problems.append(f"--gpu must be one of {', '.join(GPUS)}, got {args.gpu!r}; for another give --peak-flops and "
                        "--bandwidth")
    if args.dollars and args.here and not args.price and not torch.cuda.is_available():
        problems.append("--dollars on this CPU needs --price, in dollars per hour")
    return problems

# -----------------------------------------------------------------------------
# The machine

def find_machine(args):
    """The Machine that the flags name, or this one."""
    name, count, nodes = args.gpu.lower(), args.count, args.nodes
    if args.here and not torch.cuda.is_available():
        import psutil
        dtype = get_compute_dtype("cpu", args.dtype)
        speed = forecast.calibrate(lambda depth: build_config(depth, args), args.device_batch_size or 32, dtype)
        return Machine("this CPU", True, 1, 1, psutil.virtual_memory().total, 0, 0, args.price or 0.0, dtype.itemsize,
                       speed)
    memory, link = GPUS.get(name, (79, 32))
    if args.here:
        properties = torch.cuda.get_device_properties(0)
        name, count, memory = properties.name.lower(), torch.cuda.device_count(), properties.total_memory / 2**30
        link = next((pair[1] for key, pair in GPUS.items() if key in name), 32)
    peak = args.peak_flops or get_peak_flops(name.removesuffix("-40gb"))
    if not peak < math.inf:
        raise ValueError(f"the peak FLOP/s of {name} are unknown: give --peak-flops")
    dtype_bytes = 4 if args.dtype == "float32" else 2
    price = args.price or next(rate for key, rate in HOURLY_RATES.items() if key in name)
    name, memory = f"{nodes} x {count} {name}", (args.gpu_memory or memory) * 2**30
    return Machine(name, False, count * nodes, nodes, memory, peak / (dtype_bytes // 2),
                   1e9 * (args.bandwidth or link), price * count * nodes, dtype_bytes)

# -----------------------------------------------------------------------------
# The plan

def build_config(depth, args):
    return config_of_depth(depth, args.vocab_size, args.seq_len, head_dim=args.head_dim,
                           window_pattern=args.window_pattern)


def memory_of(config, rows, machine):
    """memory_forecast with the process: what must fit into a GPU, or what a CPU process takes."""
    device = "cpu" if machine.is_cpu else "cuda"
    parts = memory_forecast(config, rows, device, machine.dtype_bytes, machine.ranks)
    peak = parts.pop("peak")
    process = machine.speed.get("process", 1024) * 2**20 + forecast.WASTE[device] * peak
    return {**parts, "process and allocator": process, "peak": peak + process}


def batch_of(config, num_tokens, machine, args):
    """(rows of a micro-batch, tokens of a step): as many rows as fit; the tokens are a multiple of all ranks' rows."""
    row, wanted = config.sequence_len * machine.ranks, args.total_batch_size or batch_for_horizon(num_tokens)
    for rows in [args.device_batch_size] if args.device_batch_size else (32, 16, 8, 4, 2, 1):
        need = memory_of(config, rows, machine)["peak"]
        if need <= machine.memory and (rows * row <= wanted or rows == 1 or args.device_batch_size):
            return rows, nearest_multiple(wanted, rows * row)
    raise ValueError(f"depth {config.n_layer} with {rows} rows of {config.sequence_len:,} tokens needs "
                     f"{need / 2**30:.1f} GiB, and {machine.name} has {machine.memory / 2**30:.1f}: choose a smaller "
                     "--depth, --device-batch-size or --seq-len, or a GPU with more memory")


def make_plan(depth, machine, args):
    """Everything about a run of this depth, as a dict; ValueError when it cannot be."""
    config = build_config(depth, args)
    sizes = count_params(config)
    flops, scaling = flops_per_token(config, sizes), sizes["transformer_matrices"] + sizes["lm_head"]
    rows, total_batch = batch_of(config, int(args.ratio * scaling), machine, args)
    steps = int(args.ratio * scaling) // total_batch
    if steps < 1:
        raise ValueError(f"--ratio {args.ratio:g} is less than one step of {total_batch:,} tokens at depth {depth}: "
                         "raise --ratio, or lower --total-batch-size")
    tokens, memory = steps * total_batch, memory_of(config, rows, machine)
    shards = math.ceil(tokens * CHARS_PER_TOKEN / CHARS_PER_SHARD / (1 - CROPPED))
    training = steps * forecast.step_seconds(config, total_batch, machine) / 3600
    others = 0 if machine.is_cpu else forecast.OTHER_STAGES * flops / (machine.peak * machine.ranks) / 3600
    found = {"machine": machine.name, "depth": depth, "width": config.n_embd, "parameters": sizes,
             "flops_per_token": flops, "flops": flops * tokens, "tokens": tokens, "ratio": tokens / scaling,
             "steps": steps, "total_batch_size": total_batch, "device_batch_size": rows,
             "accumulation": total_batch // (rows * args.seq_len * machine.ranks),
             "shards": min(shards, MAX_SHARD), "epochs": max(1.0, shards / MAX_SHARD),
             "disk_gb": (min(shards, MAX_SHARD) + 1) * 0.1 + 1 + (4 * memory["weights"] + machine.ranks *
                                                                   memory["optimizer state"]) / 1e9,
             "seconds_per_step": 3600 * training / steps, "training_hours": training, "hours": training + others,
             "dollars": (training + others) * machine.price, "memory": {k: int(v) for k, v in memory.items()},
             **forecast.quality(scaling, tokens), "calibration_seconds": machine.speed.get("seconds")}
    return found | {"commands": commands(found, machine, args)}


def commands(found, machine, args):
    """What to type, in order, as a list of shell lines."""
    per_node = machine.ranks // machine.nodes
    start = "python -m" if machine.ranks == 1 else f"torchrun --standalone --nproc_per_node={per_node} -m"
    if machine.nodes > 1:
        start = (f"torchrun --nnodes={machine.nodes} --node-rank=$NODE_RANK --master-addr=$MASTER_ADDR "
                 f"--nproc-per-node={per_node} -m")
    shape = {"depth": (found["depth"], 20), "target-param-data-ratio": (args.ratio, 10.5), "dtype": (args.dtype, ""),
             "max-seq-len": (args.seq_len, 2048), "head-dim": (args.head_dim, 128),
             "window-pattern": (args.window_pattern, "SSSL"), "device-batch-size": (found["device_batch_size"], 32),
             "total-batch-size": (found["total_batch_size"], None)} # and the defaults of base_train
    flags = " ".join(f"--{name}={value}" for name, (value, default) in shape.items() if value != default)
    separator, tag = "" if machine.ranks == 1 else "-- ", f"--model-tag=d{found['depth']}"
    stages = (("base_train", flags), ("base_loss", tag), ("base_eval", tag))
    return ["python -m nanochat.report reset", f"python -m nanochat.dataset -n {found['shards']} --prepare",
            f"python -m scripts.tok_train --vocab-size={args.vocab_size}",
            *(f"{start} scripts.{name} {separator}{given}".rstrip(" -") for name, given in stages),
            "python -m nanochat.report generate"]


def find_plan(machine, args):
    """The plan for --depth, or the one that --dollars, --hours or --core ask for; ValueError when there is none."""
    goal = next((name for name in ("dollars", "hours", "core") if getattr(args, name) is not None), None)
    if goal is None:
        return make_plan(args.depth or 20, machine, args)
    plans, limit, _ = [], getattr(args, goal), build_config(2, args) # flags of shape that cannot be are told now
    for depth in DEPTHS:
        with contextlib.suppress(ValueError): # too short for a step, or too large for the memory
            plans.append(make_plan(depth, machine, args))
    plans = plans if goal != "core" else [plan for plan in plans if plan["core"] is not None]
    enough = [plan for plan in plans if (plan[goal] >= limit if goal == "core" else plan[goal] <= limit)]
    if enough:
        return enough[0 if goal == "core" else -1]
    if not plans:
        raise ValueError(f"--{goal}: no model that fits into {machine.name} can be forecast, try --depth to see why")
    end = max(plans, key=lambda plan: plan["core"]) if goal == "core" else plans[0]
    raise ValueError(f"--{goal} {limit:g} is out of reach: " + (
        f"the most that can be forecast here is {end['core']:.3f}, with" if goal == "core" else "the cheapest has") +
        f" depth {end['depth']}, {end['hours']:.2g} hours and {end['dollars']:.2g} dollars")

# -----------------------------------------------------------------------------
# What is printed

def show(plan):
    print(f"Depth {plan['depth']}, width {plan['width']}, on {plan['machine']}\n\nParameters")
    for name, size in plan["parameters"].items():
        print(f"  {name:30} {size:17,}")
    print(f"Training\n  FLOPs per token {plan['flops_per_token']:.3e}, in all {plan['flops']:.3e}\n"
          f"  {plan['tokens']:,} tokens ({plan['ratio']:.2f} per scaling parameter) in {plan['steps']:,} steps of "
          f"{plan['total_batch_size']:,}: {plan['accumulation']} x {plan['device_batch_size']} rows per rank\n"
          f"  {plan['seconds_per_step']:.3g} s a step, {plan['training_hours']:.3g} hours; with tokenizer, evaluation "
          f"and chat stages about {plan['hours']:.3g} hours, ${plan['dollars']:,.2f}")
    print(f"Data\n  {plan['shards']:,} shards ({plan['epochs']:.1f} epochs), {plan['disk_gb']:.0f} GB of disk")
    print("Memory of a rank, GiB")
    for name, size in plan["memory"].items():
        print(f"  {name:30} {size / 2**30:17.2f}")
    print("Quality of the published recipe, on FineWeb-Edu\n  " + (
        f"bpb {plan['bpb']:.4f} +- {plan['bpb_spread']:.4f}, CORE {plan['core']:.3f} +- {plan['core_spread']:.3f}"
        if plan["bpb"] is not None else "too far from the published runs to be forecast"))
    print("Commands", *plan["commands"], sep="\n  ")


def show_check(as_json):
    """Each published run against its forecast from all the others."""
    if as_json:
        print(json.dumps({"hours_error": forecast.hours_error(), "runs": forecast.leave_one_out()}))
        return
    for key, rows in forecast.leave_one_out().items():
        print(f"{key:42} {'outcome':>9} {'forecast':>9} {'error':>7}")
        for name, outcome, guess in rows:
            print(f"  {name:40} {outcome:9.4f} {guess:9.4f} {guess / outcome - 1:+7.1%}")
    print(f"Median error of the hours: {forecast.hours_error():.1%}")


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    if args.check:
        return show_check(args.json)
    try:
        plan = find_plan(find_machine(args), args)
    except ValueError as error: # all of them are about the flags
        parser.error(str(error))
    if args.json:
        print(json.dumps(plan))
    else:
        show(plan)


if __name__ == "__main__":
    run_main(main, writes=False)
