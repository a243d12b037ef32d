"""
Accuracy of a chat model on the tasks of tasks/registry.py, and ChatCORE, their mean above chance.

    python -m scripts.chat_eval -i sft
    python -m scripts.chat_eval -i sft -a "ARC-Easy|GSM8K" -x 100
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft

Reads:  the checkpoints of the stage, the tasks' data.
Writes: chat_eval/<source>_<tag>_<step>.json and the report's "Chat evaluation <source>" section.
"""
import argparse
import os

from nanochat.checkpoint_manager import STAGE_DIRS, load_model
from nanochat.common import (DTYPES, UserError, compute_cleanup, compute_init, dataset_label, get_base_dir,
                             get_compute_dtype, print0, run_main, write_json)
from nanochat.engine import Engine
from nanochat.execution import sandbox_gaps
from nanochat.report import get_report
from nanochat.task_eval import evaluate_categorical, evaluate_generative, wilson_interval
from tasks.registry import EVALS, available_evals

CHATCORE_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("-i", "--source", required=True, choices=list(STAGE_DIRS), help="stage of the checkpoint")
    add("-a", "--task-name", default="all", help="names joined by |; all = every one whose data can be had")
    add("-d", "--dtype", default="", choices=["", *DTYPES], help="of activations; empty = bf16 where hardware has it")
    add("-t", "--temperature", type=float, default=0.0, help="of generated answers; 0 = greedy")
    add("-m", "--max-new-tokens", type=int, default=512, help="per generated answer")
    add("-n", "--num-samples", type=int, default=1, help="generated answers per problem; one right answer solves it")
    add("-k", "--top-k", type=int, default=50, help="sample among the k likeliest tokens; 0 = all")
    add("-b", "--batch-size", type=int, default=8, help="prompts per forward; 4 x as many answers are decoded together")
    add("-g", "--model-tag", default=None, help="checkpoint folder, e.g. d20; default: the newest")
    add("-s", "--step", "--model-step", type=int, default=None, help="step of the checkpoint; default: the last")
    add("-x", "--max-problems", type=int, default=None, help="only the first so many of each task; default: all")
    add("--device-type", default="", choices=["", "cuda", "cpu", "mps"], help="empty = the first that is available")
    return parser


def check_args(args):
    """All that is wrong with the flags, as sentences."""
    problems = [f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
                for name in ("max_new_tokens", "num_samples", "batch_size", "max_problems")
                if getattr(args, name) is not None and getattr(args, name) < 1]
    if not args.temperature >= 0: # nan is not either
        problems.append(f"--temperature must be at least 0, got {args.temperature}")
    if args.num_samples > 1 and args.temperature == 0:
        problems.append(f"--num-samples {args.num_samples} needs a --temperature above 0: greedy answers are all alike")
    unknown = [name for name in args.task_name.split("|") if name not in EVALS]
    if args.task_name != "all" and unknown:
        problems.append(f"--task-name must be all or names joined by | of {', '.join(EVALS)}, got {', '.join(unknown)}")
    return problems


def build_tasks(task_name):
    """{name: task}. A task whose data cannot be had is an error when it was named, and is left out of "all"."""
    if task_name != "all":
        return {name: EVALS[name].make() for name in task_name.split("|")}
    tasks = {}
    for name in available_evals():
        try:
            tasks[name] = EVALS[name].make()
        except UserError as error:
            print0(f"Leaving out {name}: {error}")
    if not tasks:
        raise UserError(f"no data of any chat evaluation in {get_base_dir()}: prepare a data set first")
    return tasks


def score_task(name, task, model, tokenizer, engine, batch_size, num_samples, max_new_tokens, temperature, top_k,
               max_problems):
    """The Score of one task, in the way that suits it; progress on the console."""
    if task.eval_type == "categorical":
        return evaluate_categorical(task, tokenizer, model, max_problems, batch_size, label=name)
    return evaluate_generative(task, tokenizer, engine, num_samples=num_samples, max_new_tokens=max_new_tokens,
                               temperature=temperature, top_k=top_k, max_problems=max_problems,
                               batch_size=4 * batch_size, label=name) # decoding one token a row is cheap


def run_chat_eval(task_name, model, tokenizer, engine, batch_size=1, num_samples=1, max_new_tokens=512, temperature=0.0,
                  top_k=50, max_problems=None):
    """Accuracy (pass@1, from 0 to 1) on the evaluation of this name."""
    return score_task(task_name, EVALS[task_name].make(), model, tokenizer, engine, batch_size, num_samples,
                      max_new_tokens, temperature, top_k, max_problems).pass_at_1


def describe(passed, total):
    """ "45.00 % (9/20, 95 % interval 25.82-65.79)" """
    low, high = wilson_interval(passed, total)
    return f"{100 * passed / total:.2f} % ({passed}/{total}, 95 % interval {100 * low:.2f}-{100 * high:.2f})"


def print_score(name, score, num_samples, is_sampled):
    mark = f" ({dataset_label()})" if dataset_label() else ""
    measure = f"pass@{num_samples}" if is_sampled and num_samples > 1 else "accuracy"
    print0(f"{name}{mark} {measure}: {describe(score.passed, score.total)}"
           + (f"; pass@1: {100 * score.pass_at_1:.2f} %" if measure != "accuracy" else ""))
    for group, counts in score.groups.items():
        print0(f"    {group:<32s} {describe(*counts)}")


def chat_core(scores, names=CHATCORE_TASKS):
    """Mean over `names` of (accuracy - chance) / (1 - chance), or None unless all of them were evaluated."""
    if not set(names) <= set(scores):
        return None
    return sum((scores[name].pass_at_1 - EVALS[name].chance) / (1 - EVALS[name].chance) for name in names) / len(names)


def summarize(scores):
    """{metric: value}: the accuracy (pass@1) of every task; ChatCORE only when its six tasks ran."""
    metrics = {name: score.pass_at_1 for name, score in scores.items()}
    core = chat_core(scores)
    if core is None:
        print0(f"No ChatCORE: it needs all of {', '.join(CHATCORE_TASKS)}")
        return metrics
    metrics["ChatCORE metric"] = core
    # Published values, e.g. 0.0730 and 0.0884, are means over five tasks.
    metrics["ChatCORE without SpellingBee"] = chat_core(scores, CHATCORE_TASKS[:-1])
    print0(f"ChatCORE (mean of {', '.join(CHATCORE_TASKS)}): {core:.4f}; "
           f"without SpellingBee: {metrics['ChatCORE without SpellingBee']:.4f}")
    return metrics


def write_results(args, meta, scores, metrics):
    """Everything, with counts and intervals, as JSON; returns the path."""
    def entry(passed, total):
        interval = wilson_interval(passed, total)
        return {"passed": passed, "total": total, "accuracy": passed / total, "interval_95": interval}

    path = os.path.join(get_base_dir(), "chat_eval", f"{args.source}_{meta['model_tag']}_{meta['step']:06d}.json")
    tasks = {}
    for name, score in scores.items():
        groups = {group: entry(*counts) for group, counts in score.groups.items()}
        tasks[name] = entry(score.passed, score.total) | {"groups": groups, "pass_at_1": score.pass_at_1,
                                                          "too_long": score.too_long}
    write_json(path, {"dataset": dataset_label() or "real", "args": vars(args), "model_tag": meta["model_tag"],
                      "step": meta["step"], "tasks": tasks, "metrics": metrics})
    return path


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    compute = compute_init(args.device_type)
    tasks = build_tasks(args.task_name)
    dtype = get_compute_dtype(compute.device, args.dtype)
    model, tokenizer, meta = load_model(args.source, compute.device, "eval", args.model_tag, args.step, dtype)
    for gap in sandbox_gaps() if "HumanEval" in tasks else ():
        print0(f"HumanEval's sandbox is not complete: {gap}")
    engine, scores = Engine(model, tokenizer), {}
    for name, task in tasks.items():
        scores[name] = score_task(name, task, model, tokenizer, engine, args.batch_size, args.num_samples,
                                  args.max_new_tokens, args.temperature, args.top_k, args.max_problems)
        print_score(name, scores[name], args.num_samples, task.eval_type == "generative")
    metrics = summarize(scores)
    if compute.is_master:
        print0(f"Results written to {write_results(args, meta, scores, metrics)}")
    details = {f"{name} solved": describe(score.passed, score.total) for name, score in scores.items()}
    details |= {f"{name} prompts longer than the context": score.too_long
                for name, score in scores.items() if score.too_long}
    groups = {f"{name}: {group}": describe(*counts)
              for name, score in scores.items() for group, counts in score.groups.items()}
    get_report().log(f"Chat evaluation {args.source}", [vars(args), metrics, details, groups])
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
