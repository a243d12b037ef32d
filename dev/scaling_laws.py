"""
A table of finished base runs, and the scaling laws in it.

    python -m dev.scaling_laws TAG... --out results.csv     a row per run; miniseries.sh and scaling_laws.sh call this

Every figure of a row comes from the meta file and metrics.jsonl of its run. dev/scaling_analysis.ipynb reads the table:
for each budget of FLOPs it finds the model size of least validation bpb ("IsoFLOP", Hoffmann et al. 2022,
https://arxiv.org/abs/2203.15556, approach 2), and fits power laws to these optima. What it does not know: how good a
fit to few runs is. It says only when there was none.
"""
import argparse
import csv
import math
import os
import sys

import numpy as np

from nanochat.checkpoint_manager import checkpoint_dir, find_last_step
from nanochat.common import UserError, atomic_write, read_json, run_main
from nanochat.gpt import GPTConfig, count_params, flops_per_token
from nanochat.report import read_curves
from nanochat.training import training_horizon

PARAMS = ("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars", "total")
COUNTED = { # ways to count parameters: columns of the table
    "scaling": ("params_transformer", "params_lm_head"), # without embeddings, as Kaplan et al. 2020 do
    "all": ("params_total",), "matrices": ("params_transformer",)}

# -----------------------------------------------------------------------------
# From runs to the table

def measure(tag):
    """The row of a finished base run; UserError when it is not finished, or has no finite val_bpb at its end."""
    folder = checkpoint_dir("base", tag)
    step = find_last_step(folder)
    meta = read_json(os.path.join(folder, f"meta_{step:06d}.json"), model_config=dict, user_config=dict)
    args, config = argparse.Namespace(**meta["user_config"]), GPTConfig(**meta["model_config"])
    sizes = count_params(config)
    scaling = sizes["transformer_matrices"] + sizes["lm_head"]
    num_steps = training_horizon(args, flops_per_token(config, sizes), scaling)
    curves = read_curves(os.path.join(folder, "metrics.jsonl"))
    end = {key: dict(zip(*curve)).get(step, "") for key, curve in curves.items()}
    if step != num_steps or not math.isfinite(end.get("val/bpb") or math.nan):
        raise UserError(f"the run {tag} has no validation bpb of its last step, {num_steps} (it is at {step}): "
                        "start the sweep again, it goes on there")
    tokens = num_steps * args.total_batch_size
    return {"tag": tag, "flops_budget": args.target_flops if args.target_flops > 0 else "", "depth": config.n_layer,
            "model_dim": config.n_embd, **{f"params_{name.removesuffix('_matrices')}": sizes[name] for name in PARAMS},
            "num_params": sizes["total"], "num_scaling_params": scaling, "num_iterations": num_steps,
            "tokens_trained": tokens, "param_data_ratio": round(tokens / scaling, 4), "val_bpb": end["val/bpb"],
            "core_score": end.get("core_metric", ""), "train_time_sec": end.get("total_training_time", "")}


def write_table(tags, path):
    """Measure the runs and write `path` (CSV); returns (rows, why others are left out)."""
    rows, missing = [], []
    for tag in tags:
        try:
            rows.append(measure(tag))
        except (UserError, OSError, ValueError) as error: # the last: a file that is broken
            missing.append(str(error))
    rows.sort(key=lambda row: (row["flops_budget"] or 0, row["depth"]))
    if rows: # else a table that is there stays as it is
        with atomic_write(path) as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return rows, missing

# -----------------------------------------------------------------------------
# From the table to the laws

def read_table(path, count="scaling"):
    """
    Rows of a sweep's table as dicts of floats, with `params` counted in this way (see COUNTED) and `ratio`, tokens to
    params.

    Rows without a positive val_bpb are left out. UserError when columns or rows are missing.
    """
    needed = ["flops_budget", "depth", "tokens_trained", "val_bpb", *COUNTED[count]]
    if not os.path.exists(path):
        raise UserError(f"there is no {path}: run `bash runs/scaling_laws.sh` first, or name another table")
    rows = []
    with open(path, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if absent := [name for name in needed if line.get(name) is None]:
                raise UserError(f"{path} has no column {', '.join(absent)}: write it anew with dev.scaling_laws")
            try:
                row = {name: float(line[name]) for name in needed}
            except ValueError:
                continue # an unfinished run, or one without a budget
            if 0 < row["val_bpb"] < math.inf:
                params = sum(row[name] for name in COUNTED[count])
                rows.append(row | {"params": params, "ratio": row["tokens_trained"] / params})
    if not rows:
        raise UserError(f"{path} has no row with a budget and a positive val_bpb: let the sweep finish a run first")
    return sorted(rows, key=lambda row: (row["flops_budget"], row["params"]))


def optimum(rows):
    """
    The best model of one budget: {flops, params, tokens, ratio, bpb, fitted}.

    It is the minimum of a parabola of bpb in log10(params), with tokens interpolated between the runs. Where there is
    none between the smallest and the largest run, or fewer than three sizes, it is the best run, and `fitted` is False.
    """
    x, bpb = np.log10([row["params"] for row in rows]), np.array([row["val_bpb"] for row in rows])
    best = rows[int(bpb.argmin())]
    found = {"flops": best["flops_budget"], "params": best["params"], "tokens": best["tokens_trained"],
             "ratio": best["ratio"], "bpb": best["val_bpb"], "fitted": False}
    if len(set(x)) < 3:
        return found
    middle = x.mean() # a parabola far from zero is badly conditioned
    a, b, c = np.polyfit(x - middle, bpb, 2)
    lowest = middle - b / (2 * a) if a > 0 else math.inf
    if not x.min() <= lowest <= x.max():
        return found
    params, tokens = 10**lowest, float(np.interp(lowest, x, [row["tokens_trained"] for row in rows]))
    return found | {"params": params, "tokens": tokens, "ratio": tokens / params, "bpb": c - b**2 / (4 * a),
                    "fitted": True}


def optima(rows):
    """The optimum of each budget, by rising budget."""
    budgets = sorted({row["flops_budget"] for row in rows})
    return [optimum([row for row in rows if row["flops_budget"] == budget]) for budget in budgets]


def power_law(x, y):
    """(exponent, factor) of y = factor * x^exponent by least squares of the logarithms; UserError below two x."""
    if len(set(x)) < 2:
        raise UserError(f"a power law needs at least two budgets, got {len(set(x))}: let the sweep go on")
    exponent, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return float(exponent), math.exp(intercept)


def summarize(points):
    """Exponents of params and tokens in FLOPs, and the ratio: at the middle budget by the laws, mean and spread."""
    flops = [point["flops"] for point in points]
    a, of_params = power_law(flops, [point["params"] for point in points])
    b, of_tokens = power_law(flops, [point["tokens"] for point in points])
    middle, ratios = math.sqrt(min(flops) * max(flops)), [point["ratio"] for point in points]
    return {"params exponent": a, "tokens exponent": b, "difference": b - a, "middle budget": middle,
            "ratio there": of_tokens / of_params * middle ** (b - a), "mean ratio": float(np.mean(ratios)),
            "std of ratio": float(np.std(ratios)), "fitted budgets": sum(point["fitted"] for point in points)}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="dev.scaling_laws", description=__doc__.strip().split("\n")[0])
    parser.add_argument("tags", nargs="+", metavar="TAG", help="base runs (--model-tag)")
    parser.add_argument("--out", required=True, help="the table to write (CSV)")
    args = parser.parse_args(argv)
    rows, missing = write_table(args.tags, args.out)
    for row in rows:
        shown = ("tag", "num_iterations", "val_bpb", "core_score", "train_time_sec")
        print("  ".join(f"{key} {row[key]}" for key in shown))
    print(f"{len(rows)} of {len(args.tags)} runs are in {args.out}")
    if missing:
        print("\n".join(["left out:", *missing]), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
