"""
Supervised finetuning: teach a base or midtrained model to answer as the assistant.

    python -m scripts.chat_sft --source base
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --source mid --model-tag d20

Whole conversations are packed into rows, where each is computed as if it stood alone, and only what the assistant says
is trained on. A step's loss is the mean over its supervised tokens, whatever the micro-batch size and the number of
ranks: long answers weigh more than short ones.

Reads:  a checkpoint, hub/ (or the hub), identity_conversations.jsonl, words_alpha.txt.
Writes: chatsft_checkpoints/<tag of the source>/ (with metrics.jsonl) and the report's section.
"""
import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True") # must precede torch

import argparse
import itertools
import time

import torch

from nanochat.chat_training import Run, add_conversation_flags, add_flags, flag_problems, packing_report
from nanochat.common import UserError, compute_cleanup, compute_init, dataset_label, get_base_dir, print0, run_main
from nanochat.task_eval import evaluate_categorical
from nanochat.training import Stop, is_due, lr_multiplier, try_evaluation
from tasks.arc import ARC
from tasks.common import TaskMixture
from tasks.customjson import CustomJSON
from tasks.gsm8k import NUM_VALIDATION, GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.tinyworld import TinyWorld

SOURCES = ("base", "mid")


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add_flags(parser, SOURCES, "mid", init_lr_frac=0.02)
    add_conversation_flags(parser, max_seq_len=-1, device_batch_size=4)
    add = parser.add_argument
    # horizon and batches
    add("--num-epochs", type=int, default=1, help="passes over the conversations")
    add("--target-examples-per-step", type=int, default=32, help="conversations per optimizer step, all ranks together")
    # evaluation
    add("--eval-every", type=int, default=100, help="steps between validation losses; -1 = never")
    add("--eval-steps", type=int, default=100, help="steps' worth of conversations per validation loss")
    add("--eval-metrics-every", type=int, default=200, help="steps between accuracies on validation splits; -1 = never")
    add("--eval-metrics-max-problems", type=int, default=1024, help="problems per accuracy")
    return parser


def check_args(args):
    positive = ("num_epochs", "device_batch_size", "target_examples_per_step", "eval_steps",
                "eval_metrics_max_problems")
    return flag_problems(args, positive, ("num_iterations", "max_seq_len"))


def build_mixture(args):
    """The training conversations: general ones, multiple choice, arithmetic with tools, identity, spelling."""
    identity = os.path.join(get_base_dir(), "identity_conversations.jsonl")
    mixture = TaskMixture([
        ARC("ARC-Easy", "train"),
        ARC("ARC-Challenge", "train"),
        GSM8K("main", "train", start=NUM_VALIDATION),
        SmolTalk("train", stop=10_000),
        CustomJSON(identity, allow_missing=args.allow_missing_identity),
        SimpleSpelling(size=300, split="train"),
        SpellingBee(size=300, split="train"),
        *([TinyWorld(split="train")] if dataset_label() else []),
    ])
    mixture.print_sizes()
    return mixture


def build_metric_tasks(args):
    """{metric: task} of the accuracies that are watched: validation splits only, test splits are for the end."""
    tasks = {}
    for name, make, subset in [("mmlu_acc", MMLU, "all"), ("arc_easy_acc", ARC, "ARC-Easy")]:
        try:
            if args.eval_metrics_every > 0:
                tasks[name] = make(subset, "validation", stop=args.eval_metrics_max_problems)
        except UserError as error: # not in this base directory
            print0(f"{name} is left out: {error}")
    return tasks


def count_steps(args, num_conversations):
    """Optimizer steps of the whole run. Raises ValueError when there are too few conversations for one."""
    num_steps = num_conversations // args.target_examples_per_step * args.num_epochs
    if args.num_iterations < 1 and num_steps < 1:
        raise ValueError(f"--target-examples-per-step must be at most {num_conversations}, the number of "
                         f"conversations, got {args.target_examples_per_step}")
    return args.num_iterations if args.num_iterations > 0 else num_steps


@torch.no_grad()
def validation_loss(run, task):
    """Mean loss in nats per supervised token over the conversations of --eval-steps steps, at most one pass."""
    steps = run.conversation_steps(task, conversations_per_step=run.args.target_examples_per_step, one_pass=True)
    total = num_targets = 0
    for rows, _ in itertools.islice(steps, run.args.eval_steps):
        total += sum(float(run.model(x, y, loss_reduction="sum", bos_id=run.bos_id))
                     for x, y in run.micro_batches(rows))
        num_targets += int((rows[1] != -1).sum())
    total, num_targets = run.compute.all_reduce(total, num_targets)
    return total / max(1, num_targets)


def evaluate(run, val_task, metric_tasks, step, last_step):
    """Whatever is due after `step` steps: validation loss, accuracies. A failure is told, gives None, ends nothing."""
    metrics = {}
    if is_due(run.args.eval_every, step, last_step) or (run.args.eval_every > 0 and step == 0):
        metrics["val_loss"] = try_evaluation("Validation", lambda: validation_loss(run, val_task))
    if is_due(run.args.eval_metrics_every, step, last_step):
        for name, task in metric_tasks.items():
            metrics[name] = try_evaluation(name, lambda task=task: evaluate_categorical(
                task, run.tokenizer, run.model, batch_size=2 * run.args.device_batch_size).accuracy)
    return metrics


def train(run, train_task, val_task, metric_tasks, num_steps):
    """The whole of training on one page: exactly num_steps updates. Returns the metrics of the last evaluation."""
    with run.hold(), Stop() as stop:
        batches = run.begin(run.conversation_steps(train_task, run.data_state,
                                                   conversations_per_step=run.args.target_examples_per_step))
        for step in range(run.start_step or 0, num_steps + 1): # one more than the updates, to save and evaluate the end
            metrics = run.between_steps(step, step == num_steps, stop,
                                        lambda *due: evaluate(run, val_task, metric_tasks, *due))
            if step == num_steps:
                return metrics

            start = time.time()
            rows, run.data_state = next(batches)
            multiplier = lr_multiplier(step, num_steps, warmdown_ratio=1.0) # 1 - step / num_steps
            loss, num_tokens = run.learn(rows, step, multiplier)
            seconds = time.time() - start

            run.loop.update(train_loss=loss, total_time=run.loop["total_time"] + seconds)
            print0(f"step {step:05d}/{num_steps:05d} | training loss: {loss:.6f} | lrm: {multiplier:.4f} | "
                   f"num_tokens: {num_tokens:,} | dt: {1000 * seconds:.2f}ms", flush=True)
            run.log.log(step, **{"train/loss": loss, "train/lrm": multiplier, "train/num_tokens": num_tokens,
                                 "train/dt": seconds})
            run.wandb.log({"step": step, "train_loss": loss, "lrm": multiplier, "num_tokens": num_tokens})


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    compute = compute_init(args.device_type, args.seed)
    run = Run(args, compute, "sft", SOURCES, ("num_epochs", "target_examples_per_step", "identity_hash"),
              ("val_loss", "mmlu_acc", "arc_easy_acc"), train_loss=None)
    tasks = build_mixture(args), SmolTalk("test"), build_metric_tasks(args)
    num_steps = count_steps(args, len(tasks[0]))
    if run.finished:
        print0(f"Nothing to do: {run.folder} is complete at step {num_steps}")
    else:
        print0(f"{num_steps:,} steps of {args.target_examples_per_step} conversations, {run.seq_len} tokens a row")
        run.compile()
        metrics = train(run, *tasks, num_steps)
        run.report({"Training rows": len(tasks[0]), "Number of iterations": num_steps, "Training loss":
                    run.loop["train_loss"], "Validation loss": metrics.get("val_loss", "not evaluated"),
                    **packing_report(run.data_state["counters"])})
    run.wandb.finish()
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
