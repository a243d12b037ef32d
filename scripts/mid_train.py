"""
Midtraining: a base model learns the form of conversations, to use a tool, to choose among options, and to spell.

    python -m scripts.mid_train
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train -- --model-tag d20

Like pretraining on conversations: every token is learned, the user's too. Whole conversations are packed into rows,
--total-batch-size / --max-seq-len of them a step, where each is computed as if it stood alone.

Reads:  a base checkpoint, hub/ (or the hub), identity_conversations.jsonl, words_alpha.txt.
Writes: mid_checkpoints/<tag of the source>/ (with metrics.jsonl) and the report's section.
"""
import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True") # must precede torch

import argparse
import itertools
import time

import torch

from nanochat.chat_training import Run, add_conversation_flags, add_flags, flag_problems, packing_report
from nanochat.common import compute_cleanup, compute_init, dataset_label, get_base_dir, print0, run_main
from nanochat.dataloader import prefetched
from nanochat.loss_eval import evaluate_bpb
from nanochat.tokenizer import token_bytes_of
from nanochat.training import (LossMeter, Stop, Throughput, grad_accum_steps, muon_momentum, peak_flops,
                               try_evaluation)
from tasks.common import TaskMixture
from tasks.customjson import CustomJSON
from tasks.gsm8k import NUM_VALIDATION, GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.tinyworld import TinyWorld

SOURCES = ("base",)
SMOLTALK_ROWS = 460_000 # of the real thing, for which the sizes of the spelling tasks are meant


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add_flags(parser, SOURCES, "base", init_lr_frac=1.0)
    add_conversation_flags(parser, max_seq_len=2048, device_batch_size=32)
    add = parser.add_argument
    add("--total-batch-size", type=int, default=524288, help="tokens per optimizer step, all ranks together")
    add("--eval-every", type=int, default=150, help="steps between validations; 0 or less = only at the end")
    add("--eval-tokens", type=int, default=10_485_760, help="tokens per validation, at most one pass")
    add("--dry-run", action="store_true", help="write no checkpoint and no report")
    return parser


def check_args(args):
    positive = ("device_batch_size", "total_batch_size", "eval_tokens")
    return flag_problems(args, positive, ("num_iterations", "max_seq_len"))


def build_mixture(args):
    """The training conversations. Data sets smaller than the real ones get spelling in the same proportion."""
    identity = os.path.join(get_base_dir(), "identity_conversations.jsonl")
    smoltalk = SmolTalk("train")
    scale = min(1, len(smoltalk) / SMOLTALK_ROWS)
    counted = 20_000 if dataset_label() else 80_000 # long beside the short conversations of a small world
    mixture = TaskMixture([
        smoltalk,
        MMLU("auxiliary_train", "train"),
        GSM8K("main", "train", start=NUM_VALIDATION),
        *[CustomJSON(identity, allow_missing=args.allow_missing_identity)] * 2, # two passes
        SimpleSpelling(size=max(1, round(200_000 * scale)), split="train"),
        SpellingBee(size=max(1, round(counted * scale)), split="train"),
        *([TinyWorld(split="train")] if dataset_label() else []),
    ])
    mixture.print_sizes()
    return mixture


def build_validation():
    return TaskMixture([SmolTalk("test"), MMLU("all", "validation"), GSM8K("main", "train", stop=NUM_VALIDATION)])


def validation_bpb(run, task):
    """Bits per byte over --eval-tokens tokens of conversations, at most one pass; on any ranks the same."""
    batches = []
    for rows, state in run.conversation_steps(task, conversations_per_step=256, learn_all=True, one_pass=True):
        batches += run.micro_batches(rows)
        if state["counters"]["tokens"] >= run.args.eval_tokens:
            break
    if not batches: # this rank has no row, but must take part in the sum
        batches = [tuple(torch.full((1, run.seq_len), value, device=run.compute.device) for value in (0, -1))]
    return evaluate_bpb(run.model, batches, len(batches), token_bytes_of(run.tokenizer), bos_id=run.bos_id)


def evaluate(run, val_task, step, last_step):
    """{"val_bpb": ...} when it is due. A failure is told and gives None."""
    if not (last_step or (run.args.eval_every > 0 and step % run.args.eval_every == 0)):
        return {}
    val_bpb = try_evaluation("Validation", lambda: validation_bpb(run, val_task))
    if val_bpb is not None:
        run.loop["min_val_bpb"] = min(val_bpb, run.loop["min_val_bpb"] or val_bpb)
    return {"val_bpb": val_bpb}


def progress_of(run, step, num_conversations):
    """How much of the training is done after `step` steps, 0 to 1: the same on all ranks."""
    if run.args.num_iterations > 0:
        return step / run.args.num_iterations
    taken = run.data_state["counters"]["conversations"] if run.data_state else 0
    return min(1.0, taken / num_conversations)


def train(run, train_task, val_task):
    """The whole of training on one page. Returns the number of updates: --num-iterations, or one pass."""
    args, meter = run.args, LossMeter(**run.loop["loss_meter"])
    speed = Throughput(args.total_batch_size, run.model.estimate_flops(), peak_flops(run.compute),
                       run.loop["total_time"])
    with run.hold(), Stop() as stop:
        batches = run.begin(prefetched(run.conversation_steps(
            train_task, run.data_state, rows_per_step=args.total_batch_size // run.seq_len, learn_all=True)))
        for step in itertools.count(run.start_step or 0):
            progress = progress_of(run, step, len(train_task))
            run.between_steps(step, progress >= 1, stop, lambda *due: evaluate(run, val_task, *due))
            if progress >= 1:
                return step

            start = time.time()
            rows, run.data_state = next(batches)
            multiplier = min(1.0, (1 - progress) / 0.2) # falls to 0 over the last fifth
            loss, _ = run.learn(rows, step, multiplier, muon_momentum(step))
            seconds = time.time() - start

            speed.update(seconds)
            smooth = meter.update(loss)
            run.loop.update(loss_meter=meter.state(), total_time=speed.total_time)
            print0(f"step {step:05d} ({100 * progress:.2f}%) | loss: {smooth:.6f} | lrm: {multiplier:.2f} | "
                   f"dt: {1000 * seconds:.2f}ms | tok/sec: {speed.tok_per_sec:,} | mfu: {speed.mfu:.2f} | "
                   f"epoch: {run.data_state['epoch']} | total time: {speed.total_time / 60:.2f}m", flush=True)
            run.log.log(step, **{"train/loss": loss, "train/lrm": multiplier, "train/dt": seconds})
            if step % 10 == 0:
                run.wandb.log({"step": step, "train/loss": smooth, "train/lrm": multiplier, "train/dt": seconds,
                               "train/tok_per_sec": speed.tok_per_sec, "train/mfu": speed.mfu})


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    compute = compute_init(args.device_type, args.seed)
    run = Run(args, compute, "mid", SOURCES, ("total_batch_size", "identity_hash"), ("val_bpb",), loss_meter={},
              min_val_bpb=None)
    grad_accum_steps(args.total_batch_size, args.device_batch_size, run.seq_len, compute.ddp_world_size) # or an error
    before = run.parent.get("user_config", {}).get("device_batch_size", args.device_batch_size)
    if args.device_batch_size > before:
        print0(f"Warning: --device-batch-size {args.device_batch_size} is above the {before} of pretraining: it may "
               "need more memory than there is")
    train_task, val_task = build_mixture(args), build_validation()
    if run.finished:
        print0(f"Nothing to do: {run.folder} is complete at step {run.start_step}")
    else:
        run.compile()
        num_steps = train(run, train_task, val_task)
        run.report({"Number of iterations": num_steps,
                    "Minimum validation bpb": run.loop["min_val_bpb"] or "not evaluated",
                    **packing_report(run.data_state["counters"])})
    run.wandb.finish()
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
