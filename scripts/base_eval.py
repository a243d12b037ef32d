"""
CORE metric of a base model: 22 in-context tasks, 0 = guessing, 1 = perfect.

    python -m scripts.base_eval --model-tag d20
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval -- --max-per-task 500
    python -m scripts.base_eval --hf-path openai-community/gpt2

Reads:  base_checkpoints/ or a Hugging Face model, eval_bundle/ (fetched on first use).
Writes: base_eval/base_model_<tag>_<step>.csv (or named as the Hugging Face model) and the report's
"Base model evaluation" section.
"""
import argparse
import csv
import os

from nanochat.checkpoint_manager import load_model
from nanochat.common import (DTYPES, atomic_write, compute_cleanup, compute_init, dataset_label, get_base_dir,
                             get_compute_dtype, print0, run_main)
from nanochat.core_eval import evaluate_model
from nanochat.hf_model import check_choice_of_model, load_hf_model
from nanochat.report import get_report


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("--hf-path", default=None, help="instead of ours a model of the hub, e.g. openai-community/gpt2, or a folder")
    add("--max-per-task", type=int, default=-1, help="examples scored per task; -1 = all")
    add("--model-tag", default=None, help="checkpoint folder, e.g. d20; default: the newest")
    add("--model-step", "--step", type=int, default=None, help="step of the checkpoint; default: the last")
    add("--device-type", default="", choices=["", "cuda", "cpu", "mps"], help="empty = the first that is available")
    add("--dtype", default="", choices=["", *DTYPES], help="of activations; empty = bfloat16 where hardware has it")
    return parser


def check_args(args):
    """All that is wrong with the flags, as sentences."""
    problems = check_choice_of_model(args)
    if args.max_per_task == 0 or args.max_per_task < -1:
        problems.append(f"--max-per-task must be at least 1, or -1 for all, got {args.max_per_task}")
    return problems


def result_rows(out):
    """(task, accuracy, centered) as text, six decimals; the last row is CORE."""
    centered = out["centered_results"]
    rows = [(label, f"{accuracy:.6f}", f"{centered[label]:.6f}") for label, accuracy in out["results"].items()]
    return rows + [("CORE", "", f"{out['core_metric']:.6f}")]


def write_csv(rows, slug):
    """Write <base>/base_eval/<slug>.csv; returns its path."""
    path = os.path.join(get_base_dir(), "base_eval", f"{slug}.csv")
    with atomic_write(path) as file:
        csv.writer(file, lineterminator="\n").writerows([("Task", "Accuracy", "Centered"), *rows])
    return path


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    compute = compute_init(args.device_type)
    dtype = get_compute_dtype(compute.device, args.dtype)
    if args.hf_path is not None:
        model, tokenizer = load_hf_model(args.hf_path, compute.device, dtype)
        name, slug = args.hf_path, args.hf_path.replace("/", "-")
    else:
        model, tokenizer, meta = load_model("base", compute.device, "eval", args.model_tag, args.model_step, dtype)
        name = f"base_model {meta['model_tag']} (step {meta['step']})"
        slug = f"base_model_{meta['model_tag']}_{meta['step']:06d}"
    out = evaluate_model(model, tokenizer, compute.device, args.max_per_task)
    rows = result_rows(out)
    if compute.is_master:
        path = write_csv(rows, slug)
        mark = f" on {dataset_label()}, not the published tasks" if dataset_label() else ""
        print0(f"CORE{mark}, written to {path}:")
        for task, accuracy, centered in rows:
            print0(f"{task:<35s} {accuracy:>10s} {centered:>10s}")
    get_report().log("Base model evaluation", [
        {"Model": name, "Examples per task": args.max_per_task if args.max_per_task > 0 else "all",
         "CORE metric": out["core_metric"]}, out["centered_results"]])
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
