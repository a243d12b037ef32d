"""
What a training run will take and give: hours, bits per byte, CORE, fitted on runs that others published.

    depth, tokens, GPUs  ->  training_seconds(...), forecast_bpb(...), forecast_core(...)

All runs are nanochat's on 8 H100, T 2,048: records of its leaderboard, its log of January 2026, pull requests. bpb and
CORE compare on one data set alone, here FineWeb-Edu, so runs on ClimbMix serve for times. `leave_one_out` says how far
off each run is when it is forecast from all the others. A CPU is measured (`calibrate`).

Against published runs that are no part of the fits: the hosted d34 took about 100 hours (forecast 89), the $300 d26
about 12 (12.6). Quality is that of models since 27 January 2026, with value embeddings. Those before scored less: the
$100 tier CORE 0.2219, where its size and data give 0.255.
"""
import contextlib
import functools
import io
import math
import statistics
import sys
import time
from typing import NamedTuple

import numpy as np
import torch

from nanochat.common import Compute, get_peak_flops
from nanochat.gpt import GPT, count_params, flops_per_token, memory_forecast
from nanochat.training import accumulate, compile_model, peak_memory_mib

H100S = 8 * 989e12 # FLOP/s of bf16, which also the share of fp8 runs is counted in


class Run(NamedTuple):
    """A published run. fp8 runs and those with shorter windows have FLOPs of their own; None where not published."""
    name: str
    width: int
    fp8: bool
    flops: float            # per token
    tokens: float           # in 1e9
    hours: float
    params: float           # scaling parameters, in 1e9
    bpb: float | None = None # on FineWeb-Edu, like CORE
    core: float | None = None


RUNS = [
    Run("record 1: d24 bf16, ratio 12", 1536, False, 4.945e9, 8.757, 3.04, 0.7298, 0.74833, 0.2585),
    Run("record 2: d26 fp8, ratio 8.5", 1664, True, 6.19e9, 7.807, 2.91, 0.9184, 0.74504, 0.2578),
    Run("record 3: d26 fp8, ratio 8.25", 1664, True, 6.19e9, 7.577, 2.76, 0.9184, 0.74645, 0.2602),
    Run("#516: d26 fp8, ratio 7.25", 1664, True, 6.19e9, 6.658, 8976 / 3600, 0.9184, 0.7504, 0.2678), # of two
    Run("record 4: d24 fp8, ratio 9.5", 1536, True, 4.945e9, 6.933, 2.02, 0.7298),
    Run("record 5: d24 fp8, ratio 8.7", 1536, True, 4.860e9, 6.349, 1.80, 0.7298), # S = 768
    Run("record 6: d24 fp8, ratio 8", 1536, True, 4.775e9, 5.838, 1.65, 0.7298), # S = 512, like the next
    Run("#830: d22 fp8, ratio 9.4, V 49,152", 1408, True, 3.90e9, 5.570, 81.8 / 60, 0.5926),
    Run("$1000 tier: d32 bf16, no value tables", 2048, False, 1.20796e10, 37.58, 31.3, 1.745),
    Run("d26 bf16, a measured speed", 1664, False, 6.19e9, 1.0, 1e9 / 630e3 / 3600, 0.9184),
]
SHARES = [(768, 0.41), (1152, 0.46)] # width and share of peak in bf16 of d12 and d18, whose hours are not published
# (scaling parameters, tokens, bpb), in 1e9: best of each budget of the scaling laws of 27 January 2026
OPTIMA = [(0.1107, 1.242, 0.8972), (0.1678, 1.785, 0.8616), (0.2507, 2.642, 0.8293), (0.3818, 3.807, 0.7999)]
D12_CORE = (0.1101, 1.156, 0.133) # #563: d12 at the default ratio: parameters, tokens, CORE
CORE_NOISE = 0.0052 # standard deviation of identical runs
READING = 1.5e-6 # seconds of a CPU for a token of the data: reading, tokenizing, packing
WASTE = {"cpu": 0.1, "cuda": 0.1} # what allocators take besides; cpu: compiled steps at depths 2 to 6; cuda: a guess
COMPILER_MIB = 230 # what compiling adds to a process on a CPU; some 100 less when it finds all in its cache
DATA_MIB = 50 # what base_train holds on a CPU besides what `calibrate` sees: pyarrow, tokenizer, documents

# Memory in GiB that a process gets, GB/s that a GPU sends to another of its node: NVLink, half of the sum in its data
# sheet, else PCIe. Peaks stand in common.get_peak_flops, prices in report.HOURLY_RATES.
GPUS = {"b200": (178, 900), "h200": (139, 450), "h100": (79, 450), "a100": (79, 300), "a100-40gb": (39, 300),
        "l40s": (44, 32), "a40": (44, 32), "l4": (22, 32), "5090": (31, 64), "4090": (23.5, 32), "3090": (23.5, 32)}
BETWEEN_NODES = 40e9 # bytes a second of a GPU to other nodes: 400 Gbit/s for each, 50 at best
# Seconds of all that comes after pretraining, times the FLOP/s, over the FLOPs of a token: the $100 tier took 3.85 h in
# all, of which 2.8 h are the forecast for 11.2e9 tokens of 3.49e9 FLOPs.
OTHER_STAGES = 1.05 * 3600 * H100S / 3.49e9

# -----------------------------------------------------------------------------
# Hours

class Machine(NamedTuple):
    """Where a plan is to run; memory, peak and link of one GPU."""
    name: str
    is_cpu: bool
    ranks: int          # GPUs of all nodes
    nodes: int
    memory: float       # bytes
    peak: float         # FLOP/s in the dtype
    link: float         # bytes a second, to others of its node
    price: float        # dollars an hour, of all
    dtype_bytes: int
    speed: dict = {}    # of a CPU: what `calibrate` found


def fit_share(runs=RUNS, shares=SHARES):
    """
    (a, b, gain): the share of peak FLOP/s reached at width C is 1 / (a + b / C), `gain` times that in fp8.

    The form: products grow with C^2 per token, all else with C.
    """
    measured = [(run, 1e9 * run.tokens * run.flops / (3600 * run.hours * H100S)) for run in runs]
    bf16 = [*shares, *((run.width, share) for run, share in measured if not run.fp8)]
    a, b = np.linalg.lstsq(np.array([[1, 1 / width] for width, _ in bf16]), np.array([1 / share for _, share in bf16]),
                           rcond=None)[0]
    return a, b, statistics.median(share * (a + b / run.width) for run, share in measured if run.fp8)


def share_of_peak(width, fit=None):
    """Share of the peak bf16 FLOP/s that a GPU reaches at this width in bf16."""
    a, b, _ = fit or fit_share()
    return float(1 / (a + b / width))


def training_seconds(config, tokens, peak_flops, fit=None):
    """Seconds of training on `tokens`, evaluations and all else apart; peak_flops in bf16, of all GPUs together."""
    flops = flops_per_token(config, count_params(config))
    return tokens * flops / (share_of_peak(config.n_embd, fit) * peak_flops)


def step_seconds(config, tokens, machine):
    """Seconds of an optimizer step; what a GPU waits for slower links than those of the published runs comes on top."""
    if machine.is_cpu:
        token, step = work_of(config)
        per_token = READING + np.dot(token, machine.speed["token"])
        return float(tokens * per_token + np.dot(step, machine.speed["step"]))
    sent = 2 * memory_forecast(config, 1)["weights"] # gradients out and weights back
    inside, per_node = sent * (1 - 1 / machine.ranks) / machine.link, machine.ranks // machine.nodes
    between = sent * (1 - 1 / machine.nodes) / (BETWEEN_NODES * per_node)
    waiting = max(0.0, max(inside, between) - sent * 7 / 8 / (1e9 * GPUS["h100"][1]))
    return training_seconds(config, tokens, machine.peak * machine.ranks) + waiting

# -----------------------------------------------------------------------------
# A CPU, which nobody has published

def calibrate(make_config, max_rows, dtype, depths=(2, 6), budget=40):
    """
    Take a few real steps of two small models on this CPU, in less than a minute.

    make_config  the GPTConfig of a depth
    max_rows     of a micro-batch; fewer where 2,048 tokens are enough
    Returns {"token", "step": seconds per unit of `work_of`, "process": MiB besides the model, "seconds": that it took}.
    After `budget` seconds the second model is left out, and times are then proportional to FLOPs.
    """
    start, works, tokens_times, step_times, process = time.time(), [], [], [], []
    for depth in depths:
        config = make_config(depth)
        rows = min(max_rows, max(1, 2048 // config.sequence_len))
        ids = torch.randint(config.vocab_size, (rows, config.sequence_len))
        with contextlib.redirect_stdout(io.StringIO()):
            model = GPT(config)
            model.init_weights()
            model.compute_dtype = dtype
            optimizer = model.setup_optimizer()
            compile_model(model, "auto", rows)
        compute = Compute(False, 0, 0, 1, torch.device("cpu"))
        micro = [timed(lambda: accumulate(model, [(ids, ids)], ids.numel(), compute)) for _ in range(5)]
        steps = [timed(optimizer.step) for _ in range(4)]
        works.append(work_of(config))
        tokens_times.append(statistics.median(micro[1:]) / ids.numel())
        step_times.append(statistics.median(steps[1:]))
        modelled = memory_forecast(config, rows, "cpu", dtype.itemsize)["peak"] / 2**20
        process.append(peak_memory_mib(compute) - (1 + WASTE["cpu"]) * modelled)
        print(f"measured depth {depth}: {time.time() - start:.0f} s so far", file=sys.stderr, flush=True)
        if time.time() - start > budget:
            break
    return {"token": rates([work[0] for work in works], tokens_times), "process": statistics.mean(process) + DATA_MIB,
            "step": rates([work[1] for work in works], step_times), "seconds": time.time() - start}


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def work_of(config):
    """((FLOPs, numbers passed over) of a token, the same of an optimizer's step): what CPU times are made of."""
    sizes, C, L = count_params(config), config.n_embd, config.n_layer
    return ((flops_per_token(config, sizes), 6 * config.vocab_size + 60 * C * L),
            (300 * C**3 * L, sizes["total"])) # Muon: 5 iterations over 12 C^2 weights, see dev/scaling.py


def rates(works, times):
    """Seconds per unit of both kinds of work that explain the two times; of the first kind alone where they do not."""
    found = np.linalg.solve(np.array(works, float), times) if len(times) == 2 else np.array([-1.0])
    return found.tolist() if min(found) >= 0 else [times[-1] / works[-1][0], 0.0]

# -----------------------------------------------------------------------------
# Quality

def fit_bpb(points, exponent=0.2):
    """
    Coefficients of E + A N^-0.2 + B D^-0.2: bpb by scaling parameters N and tokens D, points (N, D, bpb) in 1e9.

    The law of Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556, section 3.3) with one exponent for both, as the
    published optima scale alike (C^0.54, C^0.49). 0.2 fits best of 0.1 to 1.
    """
    rows = np.array([[1, n**-exponent, d**-exponent] for n, d, _ in points])
    return np.linalg.lstsq(rows, np.array([bpb for _, _, bpb in points]), rcond=None)[0]


def bpb_points():
    return OPTIMA + [(run.params, run.tokens, run.bpb) for run in RUNS if run.bpb]


def forecast_bpb(num_params, tokens, points=None, exponent=0.2):
    """Validation bpb on FineWeb-Edu from scaling parameters and tokens (numbers, not 1e9)."""
    e, a, b = fit_bpb(points or bpb_points(), exponent)
    return float(e + a * (num_params / 1e9)**-exponent + b * (tokens / 1e9)**-exponent)


def core_points():
    runs = [(run.params, run.tokens, run.core) for run in RUNS if run.core]
    return [(forecast_bpb(1e9 * n, 1e9 * d), core) for n, d, core in [*runs, D12_CORE]]


def forecast_core(bpb, points=None):
    """CORE of a model with this bpb on FineWeb-Edu: a straight line."""
    bpbs, cores = zip(*(points or core_points()))
    slope, start = np.polyfit(bpbs, cores, 1)
    return float(start + slope * bpb)


def is_in_range(num_params, tokens):
    """Is this near the published runs, within a factor of 3 of the smallest and largest of each? Else not believed."""
    sizes, amounts, _ = zip(*bpb_points())
    return all(min(known) / 3 <= value / 1e9 <= 3 * max(known)
               for value, known in ((num_params, sizes), (tokens, amounts)))

# -----------------------------------------------------------------------------
# How good it is

@functools.cache
def leave_one_out():
    """{"hours" | "bpb" | "core": [(name, outcome, forecast from all the others)]} of the published runs."""
    found = {"hours": [], "bpb": [], "core": []}
    for i, run in enumerate(RUNS):
        a, b, gain = fit_share(RUNS[:i] + RUNS[i + 1:])
        share = (gain if run.fp8 else 1) / (a + b / run.width)
        found["hours"].append((run.name, run.hours, float(1e9 * run.tokens * run.flops / (share * H100S) / 3600)))
    points = bpb_points()
    for i, (num, tokens, bpb) in enumerate(points):
        found["bpb"].append((f"{num:.4g}B parameters, {tokens:.4g}B tokens", bpb,
                             forecast_bpb(1e9 * num, 1e9 * tokens, points[:i] + points[i + 1:])))
    points = core_points()
    for i, (bpb, core) in enumerate(points[:-1]): # the last one is alone on its side: all the slope there is
        found["core"].append((f"bpb {bpb:.4f}", core, forecast_core(bpb, points[:i] + points[i + 1:])))
    return found


def spread(key):
    """Root mean square of the leave-one-out errors of bpb or CORE; of CORE at least the noise of identical runs."""
    errors = [forecast - outcome for _, outcome, forecast in leave_one_out()[key]]
    return max(math.sqrt(statistics.fmean(error**2 for error in errors)), CORE_NOISE if key == "core" else 0)


def quality(num_params, tokens):
    """
    {"bpb", "core", "bpb_spread", "core_spread"}, or {"bpb": None, "core": None} where the published runs are too far.

    The spread is that of leaving one out, or what an exponent of 0.3 would change: it grows with the distance.
    """
    if not is_in_range(num_params, tokens):
        return {"bpb": None, "core": None}
    bpb = forecast_bpb(num_params, tokens)
    around = max(spread("bpb"), abs(forecast_bpb(num_params, tokens, exponent=0.3) - bpb))
    core = forecast_core(bpb)
    return {"bpb": bpb, "core": core, "bpb_spread": around,
            "core_spread": spread("core") + abs(forecast_core(bpb + around) - core)}


def hours_error():
    """Median relative error of the hours of published runs, each forecast from the others."""
    return statistics.median(abs(forecast / outcome - 1) for _, outcome, forecast in leave_one_out()["hours"])


def forecast_of_run(config, tokens, device_name, world_size):
    """
    What base_train's report sets beside the outcome, as a dict; only what can be said of such a run.

    device_name  of the GPU, None on other devices
    """
    sizes = count_params(config)
    num_params = sizes["transformer_matrices"] + sizes["lm_head"]
    peak = get_peak_flops(device_name) if device_name else 0
    found = {}
    if 0 < peak < math.inf:
        found["Forecast of the training time"] = f"{training_seconds(config, tokens, peak * world_size) / 60:.2f}m"
    guess = quality(num_params, tokens)
    if guess["bpb"] is not None:
        found |= {"Forecast of validation bpb on FineWeb-Edu": guess["bpb"], "Forecast of CORE": guess["core"]}
    return found
