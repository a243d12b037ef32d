"""
Supervised finetuning: teach a base or midtrained model to answer as the assistant.

    python -m scripts.chat_sft --source base
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --source mid --model-tag d20

Whole conversations are packed into rows, and only what the assistant says is trained on. A step's loss is the mean over
its supervised tokens, whatever the micro-batch size and the number of ranks: long answers weigh more than short ones.

Reads:  a checkpoint, hub/ (or the hub), identity_conversations.jsonl, words_alpha.txt.
Writes: chatsft_checkpoints/<tag of the source>/ (with metrics.jsonl) and the report's section.
"""
import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True") # must precede torch

import argparse
import contextlib
import itertools
import sys
import time
from dataclasses import asdict

import torch
import torch.nn.functional as F

from nanochat.checkpoint_manager import (check_parent, checkpoint_dir, delete_steps, find_newest_model, lineage,
                                         load_checkpoint, load_model, save_checkpoint, step_to_resume, update_meta,
                                         warn_of_changes)
from nanochat.common import (DTYPES, UserError, compute_cleanup, compute_init, dataset_label, get_base_dir,
                             get_compute_dtype, init_wandb, print0, run_main)
from nanochat.dataloader import conversation_steps
from nanochat.gpt import Block
from nanochat.report import get_report
from nanochat.task_eval import evaluate_categorical
from nanochat.training import (MetricsLog, Stop, accumulate, check_loss, check_weights, compile_model, is_due,
                               lr_multiplier, number_problems, refuse_changes, set_schedule, try_evaluation)
from tasks.arc import ARC
from tasks.common import TaskMixture
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.tinyworld import TinyWorld

SOURCES = ("base", "mid")
# Flags that change the mathematics of a run: a resumed run must have the saved values.
FIXED_ON_RESUME = ("source", "model_step", "num_epochs", "num_iterations", "max_seq_len", "target_examples_per_step",
                   "embedding_lr", "unembedding_lr", "matrix_lr", "weight_decay", "init_lr_frac", "seed")


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("--run", default="dummy", help="wandb run name; dummy = no wandb")
    add("--device-type", default="", choices=["", "cuda", "cpu", "mps"], help="empty = the first that is available")
    add("--dtype", default="", choices=["", *DTYPES], help="of activations; empty = bfloat16 where the hardware has it")
    add("--compile", default="auto", choices=["auto", "on", "off"], help="auto = on, running eagerly where it fails")
    add("--seed", type=int, default=42, help="seed of the order of the conversations")
    # model
    add("--source", default="mid", choices=SOURCES, help="stage of the checkpoint to start from")
    add("--model-tag", default=None, help="folder to load from and to save under; default: the newest of --source")
    add("--model-step", type=int, default=None, help="step to load; default: the last")
    # horizon and batches
    add("--num-epochs", type=int, default=1, help="passes over the conversations")
    add("--num-iterations", type=int, default=-1, help="optimizer steps; -1 = from --num-epochs")
    add("--max-seq-len", type=int, default=-1, help="tokens per row; -1 = the model's context length")
    add("--device-batch-size", type=int, default=4, help="rows per device and forward pass; does not change the result")
    add("--target-examples-per-step", type=int, default=32, help="conversations per optimizer step, all ranks together")
    add("--allow-missing-identity", action="store_true", help="go on when there is no identity_conversations.jsonl")
    # optimization
    add("--embedding-lr", type=float, default=0.2, help="AdamW, token and value embeddings")
    add("--unembedding-lr", type=float, default=0.004, help="AdamW, head")
    add("--matrix-lr", type=float, default=0.02, help="Muon, block matrices")
    add("--weight-decay", type=float, default=0.0, help="cautious decay of the block matrices (Muon); others have none")
    add("--init-lr-frac", type=float, default=0.02, help="factor on all initial learning rates, which then fall to 0")
    # evaluation
    add("--eval-every", type=int, default=100, help="steps between validation losses; -1 = never")
    add("--eval-steps", type=int, default=100, help="steps' worth of conversations per validation loss")
    add("--eval-metrics-every", type=int, default=200, help="steps between accuracies on validation splits; -1 = never")
    add("--eval-metrics-max-problems", type=int, default=1024, help="problems per accuracy")
    # checkpoints
    add("--save-every", type=int, default=-1, help="steps between checkpoints; -1 = only at the end")
    add("--resume", action="store_true", help="go on from the newest complete checkpoint, or start when there is none")
    add("--overwrite", action="store_true", help="delete an earlier run's checkpoints under this tag and start over")
    return parser


def check_args(args):
    """All that is wrong with the flags, as sentences."""
    positive = ("num_epochs", "device_batch_size", "target_examples_per_step", "eval_steps",
                "eval_metrics_max_problems")
    problems = [f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
                for name in positive if getattr(args, name) < 1]
    problems += [f"--{name.replace('_', '-')} must be at least 1, or -1, got {getattr(args, name)}"
                 for name in ("num_iterations", "max_seq_len") if getattr(args, name) < 1 and getattr(args, name) != -1]
    problems += number_problems(args)
    return problems + ["--resume and --overwrite exclude each other"] * (args.resume and args.overwrite)


def find_tag(args):
    """The tag to load and to save under. Raises UserError naming the stages that can be finetuned."""
    newest = {}
    for source in SOURCES:
        with contextlib.suppress(FileNotFoundError):
            newest[source] = find_newest_model(checkpoint_dir(source))
    if args.source not in newest:
        others = "".join(f"pass --source {source} (newest: {tag})" for source, tag in newest.items())
        raise UserError(f"no complete {args.source} checkpoint in {checkpoint_dir(args.source)}: "
                        + (others or "nor is there another source, run `python -m scripts.base_train` first"))
    return args.model_tag or newest[args.source]


def build_mixture(args):
    """The training conversations: general ones, multiple choice, arithmetic with tools, identity, spelling."""
    identity = os.path.join(get_base_dir(), "identity_conversations.jsonl")
    mixture = TaskMixture([
        ARC("ARC-Easy", "train"),
        ARC("ARC-Challenge", "train"),
        GSM8K("main", "train"),
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


class Run:
    """What a run carries from step to step; everything in it is saved, or made again from what is saved."""

    def __init__(self, args, compute, tokenizer, model, folder, tasks, parent, meta=None):
        """tasks: (training mixture, validation task, {metric: task}); parent, meta: of the source, of a resumed step"""
        self.args, self.compute, self.tokenizer = args, compute, tokenizer
        self.model, self.optimizer = model, build_optimizer(model, args)
        self.folder, self.parent, (self.train_task, self.val_task, self.metric_tasks) = folder, parent, tasks
        self.seq_len = args.max_seq_len if args.max_seq_len > 0 else model.config.sequence_len
        one_epoch = len(self.train_task) // args.target_examples_per_step
        self.num_steps = args.num_iterations if args.num_iterations > 0 else one_epoch * args.num_epochs
        if self.num_steps < 1:
            raise ValueError(f"--target-examples-per-step must be at most {len(self.train_task)}, the number of "
                             f"conversations, got {args.target_examples_per_step}")
        self.saved_step, self.data_state = (meta["step"], meta["dataloader_state_dict"]) if meta else (None, None)
        evaluated = meta is not None and (meta["val_loss"] is not None or args.eval_every <= 0)
        self.finished = self.saved_step == self.num_steps and evaluated
        loop = meta["loop_state"] if meta else {"train_loss": None, "total_time": 0.0}
        self.train_loss, self.total_time = loop["train_loss"], loop["total_time"]
        self.saved_lineage = meta["lineage"] if meta else {}
        self.wandb = init_wandb(args.run, compute, "nanochat-sft", vars(args))

    def lineage(self):
        return lineage(self.tokenizer, self.args, self.compute, self.model, self.parent)

    def steps(self, task, state=None):
        """Endless (this rank's rows, loader state), one for each optimizer step; see conversation_steps."""
        pad_id = self.tokenizer.encode_special("<|assistant_end|>")
        return conversation_steps(self.tokenizer, task, self.seq_len, self.args.target_examples_per_step, pad_id,
                                  self.args.seed, self.compute.ddp_rank, self.compute.ddp_world_size, state)


def build_optimizer(model, args):
    """A fresh optimizer with all initial learning rates scaled down: the model is to be bent, not broken."""
    optimizer = model.setup_optimizer(unembedding_lr=args.unembedding_lr, embedding_lr=args.embedding_lr,
                                      matrix_lr=args.matrix_lr, weight_decay=args.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] *= args.init_lr_frac
    return optimizer


def micro_batches(run, rows):
    """Yield this rank's rows (inputs, targets), each (R, T), in pieces of device_batch_size rows on the device."""
    inputs, targets = rows
    size = run.args.device_batch_size
    if run.model.block_fn is not Block.forward: # compiled: fill up the last, since another shape would compile anew
        inputs, targets = (F.pad(part, (0, 0, 0, -len(part) % size), value=-1) for part in rows)
        inputs = inputs.clamp_min(0) # an id, any: there is no target
    for start in range(0, len(inputs), size):
        yield tuple(part[start:start + size].to(run.compute.device) for part in (inputs, targets))


@torch.no_grad()
def validation_loss(run):
    """Mean loss in nats per supervised token over the conversations of --eval-steps steps, at most one pass."""
    steps = min(run.args.eval_steps, -(-len(run.val_task) // run.args.target_examples_per_step))
    total = num_targets = 0
    for rows, _ in itertools.islice(run.steps(run.val_task), steps):
        total += sum(float(run.model(x, y, loss_reduction="sum")) for x, y in micro_batches(run, rows))
        num_targets += int((rows[1] != -1).sum())
    total, num_targets = run.compute.all_reduce(total, num_targets)
    return total / max(1, num_targets)


def evaluate(run, step, last_step):
    """Whatever is due after `step` steps: validation loss, accuracies. Failures are told and never end the run."""
    metrics = {}
    if is_due(run.args.eval_every, step, last_step) or (run.args.eval_every > 0 and step == 0):
        metrics["val_loss"] = try_evaluation("Validation", lambda: validation_loss(run))
    if is_due(run.args.eval_metrics_every, step, last_step):
        for name, task in run.metric_tasks.items():
            metrics[name] = try_evaluation(name, lambda task=task: evaluate_categorical(
                task, run.tokenizer, run.model, batch_size=2 * run.args.device_batch_size).accuracy)
    metrics = {name: value for name, value in metrics.items() if value is not None}
    if metrics:
        print0(" | ".join([f"Step {step:05d}", *(f"{name}: {value:.6f}" for name, value in metrics.items())]))
        run.log.log(step, **{name.replace("val_loss", "val/loss"): value for name, value in metrics.items()})
        run.wandb.log({"step": step, **metrics})
    return metrics


def save(run, step):
    """Write the step durably, on all ranks together. The last one needs no optimizer state."""
    check_weights(run.model, step)
    optimizer_state = run.optimizer.state_dict() if run.compute.is_master and step < run.num_steps else None
    save_checkpoint(run.folder, step, run.model.state_dict(), optimizer_state, {
        "step": step,
        "val_loss": None, "mmlu_acc": None, "arc_easy_acc": None, # rewritten once they are known
        "model_config": asdict(run.model.config), # sequence_len stays the model's: its windows depend on it
        "user_config": vars(run.args),
        "max_seq_len": run.seq_len,
        "dataloader_state_dict": run.data_state,
        "loop_state": {"train_loss": run.train_loss, "total_time": run.total_time},
        "lineage": run.lineage(),
    }, rank=run.compute.ddp_rank, tokenizer=run.tokenizer)
    run.saved_step = step
    print0(f"Saved step {step} to {run.folder}")


def train(run):
    """The whole of training on one page: exactly num_steps updates. Returns the metrics of the last evaluation."""
    compute, num_steps = run.compute, run.num_steps
    batches = run.steps(run.train_task, run.data_state)
    batches = itertools.chain([next(batches)], batches) # read now: bad data must be told before anything is deleted
    if run.args.overwrite and compute.is_master: # only now that all else is known to be right
        delete_steps(run.folder)
    run.log = MetricsLog(run.folder, run.saved_step or 0, enabled=compute.is_master)
    with Stop() as stop:
        for step in range(run.saved_step or 0, num_steps + 1): # one more than the updates, to save and evaluate the end
            last_step, stopped = step == num_steps, stop.requested(compute)

            if (last_step or stopped or is_due(run.args.save_every, step, last_step)) and step != run.saved_step:
                save(run, step) # first: an evaluation that fails must not cost the step
            if stopped:
                sys.exit(stop.exit_code())
            metrics = evaluate(run, step, last_step)
            if step == run.saved_step and metrics and compute.is_master:
                update_meta(run.folder, step, **metrics)
            if last_step:
                return metrics

            start = time.time()
            rows, state = next(batches)
            num_tokens = max(1, int(compute.all_reduce(int((rows[1] != -1).sum()))[0])) # supervised ones of all ranks
            loss = accumulate(run.model, micro_batches(run, rows), num_tokens, compute)
            check_loss(loss, step)
            multiplier = lr_multiplier(step, num_steps, warmdown_ratio=1.0) # 1 - step / num_steps
            set_schedule(run.optimizer, multiplier)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            compute.synchronize()
            seconds = time.time() - start

            run.data_state, run.train_loss, run.total_time = state, loss, run.total_time + seconds
            print0(f"step {step:05d}/{num_steps:05d} | training loss: {loss:.6f} | lrm: {multiplier:.4f} | "
                   f"num_tokens: {num_tokens:,} | dt: {1000 * seconds:.2f}ms", flush=True)
            run.log.log(step, **{"train/loss": loss, "train/lrm": multiplier, "train/num_tokens": num_tokens,
                                 "train/dt": seconds})
            run.wandb.log({"step": step, "train_loss": loss, "lrm": multiplier, "num_tokens": num_tokens})


def prepare(args, compute):
    """Load or resume, and build all that the run needs; returns the Run. User errors come before any work is done."""
    tag = find_tag(args)
    folder = checkpoint_dir("sft", tag)
    resume_step = step_to_resume(folder, args.resume, args.overwrite)
    source, step = (args.source, args.model_step) if resume_step is None else ("sft", resume_step)
    dtype = get_compute_dtype(compute.device, args.dtype)
    model, tokenizer, meta = load_model(source, compute.device, "train", tag, step, dtype)
    print0(f"{'Starting' if resume_step is None else 'Resuming'} from {source} {tag}, step {meta['step']}; "
           f"compute dtype {str(dtype).split('.')[1]}, {torch.get_num_threads()} threads")
    if label := dataset_label():
        print0(f"Data set: {label} (synthetic: its scores are not those of the published benchmarks)")
    tasks = build_mixture(args), SmolTalk("test"), build_metric_tasks(args)
    if resume_step is None:
        return Run(args, compute, tokenizer, model, folder, tasks, parent=meta)
    refuse_changes(meta["user_config"], vars(args), FIXED_ON_RESUME)
    check_parent(meta["lineage"]["parent"], args.model_step)
    run = Run(args, compute, tokenizer, model, folder, tasks, meta["lineage"]["parent"], meta)
    if resume_step < run.num_steps:
        run.optimizer.load_state_dict(load_checkpoint(folder, resume_step, compute.device, load_optimizer=True)[1])
    return run


def report(run, metrics):
    """The end of the run, on the console and in the report."""
    counters = run.data_state["counters"]
    outcome = {"Training rows": len(run.train_task), "Number of iterations": run.num_steps,
               "DDP world size": run.compute.ddp_world_size, "Training loss": run.train_loss,
               "Validation loss": metrics.get("val_loss"), "Conversations split": counters["split"],
               "Conversation parts dropped": counters["dropped"],
               "Padding %": 100 * counters["padding"] / (counters["padding"] + counters["tokens"]),
               "Total training time": f"{run.total_time / 60:.2f}m"}
    for name, value in outcome.items():
        print0(f"{name}: {value}")
    get_report().log("Chat SFT", [vars(run.args), outcome])


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    compute = compute_init(args.device_type, args.seed)
    run = prepare(args, compute)
    if run.finished:
        print0(f"Nothing to do: {run.folder} is complete at step {run.num_steps}")
    else:
        print0(f"{run.num_steps:,} steps of {args.target_examples_per_step} conversations, {run.seq_len} tokens a row")
        ids = torch.zeros((args.device_batch_size, run.seq_len), dtype=torch.long, device=compute.device)
        print0(compile_model(run.model, args.compile, lambda: run.model(ids, ids, loss_reduction="sum").backward()))
        warn_of_changes(run.saved_lineage, run.lineage())
        report(run, train(run))
    run.wandb.finish()
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
