"""
Pretrain a base model on the shards of the base directory.

    python -m scripts.base_train --depth=12
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20
    python -m scripts.base_train --depth=4 --max-seq-len=512 --device-batch-size=1 --eval-tokens=512 \
        --core-metric-every=-1 --total-batch-size=512 --num-iterations=20          (a try on a laptop)

Reads:  base_data/, tokenizer/.  Writes: base_checkpoints/<tag>/ (with metrics.jsonl) and the report's section.
"""
import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True") # must precede torch

import argparse
import itertools
import math
import sys
import time
from dataclasses import asdict
from functools import partial

import torch

from nanochat.checkpoint_manager import (Saver, checkpoint_dir, delete_steps, hold, lineage, load_checkpoint,
                                         read_meta, step_to_resume, warn_of_changes)
from nanochat.common import (DTYPES, UserError, compute_cleanup, compute_init, dataset_label, get_compute_dtype,
                             init_wandb, print0, print_banner, run_main)
from nanochat.core_eval import evaluate_model
from nanochat.dataloader import first_rows, merge_lane_states, prefetched, pretraining_loader, usable_lanes
from nanochat.engine import Engine
from nanochat.flash_attention import describe_backend
from nanochat.forecast import COMPILER_MIB, WASTE, forecast_of_run
from nanochat.gpt import GPT, config_of_depth, memory_forecast
from nanochat.loss_eval import evaluate_bpb
from nanochat.preflight import check_collectives, check_data, check_disk, check_saving, check_steps, run_checks
from nanochat.report import get_report, is_reported
from nanochat.tokenizer import get_tokenizer, token_bytes_of
from nanochat.training import (LossMeter, MetricsLog, Stop, Throughput, accumulate, add_checkpoint_flags,
                               batch_for_horizon, check_loss, check_weights, collector_by_hand, compile_model,
                               fitting_rows, grad_accum_steps, horizon_tokens, is_due, lr_multiplier, muon_momentum,
                               nearest_multiple, number_problems, peak_flops, peak_memory_mib, rate_scale,
                               refuse_changes, sample_prompts, set_schedule, training_horizon, try_evaluation)

# Flags that change the mathematics of a run: a resumed run must have the saved values, of the first always.
SHAPE = ("depth", "aspect_ratio", "head_dim")
FIXED_ON_RESUME = ("max_seq_len", "window_pattern", "num_iterations", "target_flops", "target_param_data_ratio",
                   "total_batch_size", "embedding_lr", "unembedding_lr", "weight_decay", "matrix_lr", "scalar_lr",
                   "adam_beta1", "adam_beta2", "warmup_ratio", "warmdown_ratio", "final_lr_frac", "seed")


def size_or_auto(text):
    return text if text == "auto" else int(text)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("--preflight", nargs="?", const="all", choices=["all", "machine"],
        help="do not train but check, in two minutes, that it will work, and change nothing; "
        "machine = without tokenizer and data, before they are there")
    add("--run", default="dummy", help="wandb run name; dummy = no wandb")
    add("--device-type", default="", choices=["", "cuda", "cpu", "mps"], help="empty = the first that is available")
    add("--dtype", default="", choices=["", *DTYPES], help="activation dtype; empty = bfloat16 if the hardware has it")
    add("--compile", default="auto", choices=["auto", "on", "off"], help="torch.compile; auto = on, eager if it fails")
    add("--seed", type=int, default=42, help="seed of the initialisation")
    # model
    add("--depth", type=int, default=20, help="number of layers: the one dial from which the rest follows")
    add("--aspect-ratio", type=int, default=64, help="width = depth x this, rounded up to a multiple of --head-dim")
    add("--head-dim", type=int, default=128, help="width of an attention head")
    add("--max-seq-len", type=int, default=2048, help="context length in tokens")
    add("--window-pattern", default="SSSL", help="attention window per layer, tiled: L = full, S = half; the last is L")
    # horizon, first positive one of the three
    add("--num-iterations", type=int, default=-1, help="optimizer steps; -1 = from --target-flops")
    add("--target-flops", type=float, default=-1.0, help="training FLOPs; -1 = from --target-param-data-ratio")
    add("--target-param-data-ratio", type=float, default=10.5,
        help="tokens per scaling parameter (block matrices + head, not the embeddings)")
    # optimization
    add("--device-batch-size", type=size_or_auto, default=32,
        help="rows per device and forward pass; auto = as many as fit into the memory")
    add("--recompute", action="store_true",
        help="make the activations of blocks again in the backward pass: a third more work, a fraction of the memory")
    add("--total-batch-size", type=size_or_auto, default="auto",
        help="tokens per optimizer step, all ranks together; auto = by the length of the run")
    add("--lanes", type=int, default=-1, help="data streams: they, not the ranks, decide the order; -1 = one per rank")
    add("--remainders", default="drop", choices=["drop", "requeue"],
        help="what is cut off a document at the end of a row: dropped, or used as a document of its own")
    add("--embedding-lr", type=float, default=0.3, help="AdamW, token and value embeddings")
    add("--unembedding-lr", type=float, default=0.004, help="AdamW, head")
    add("--weight-decay", type=float, default=0.2, help="cautious decay of the block matrices (Muon) at depth 12")
    add("--matrix-lr", type=float, default=0.02, help="Muon, block matrices")
    add("--scalar-lr", type=float, default=0.5, help="AdamW, residual and x0 scalars")
    add("--adam-beta1", type=float, default=0.8, help="AdamW, tables and head")
    add("--adam-beta2", type=float, default=0.95, help="AdamW, tables and head")
    add("--warmup-ratio", type=float, default=0.0, help="share of the steps in which the learning rate rises")
    add("--warmdown-ratio", type=float, default=0.4, help="share of the steps in which the learning rate falls")
    add("--final-lr-frac", type=float, default=0.0, help="learning rate at the end, as a fraction of the initial one")
    # evaluation
    add("--eval-every", type=int, default=250, help="steps between validation bpb; -1 = never")
    add("--eval-tokens", type=int, default=20 * 524288, help="tokens per validation bpb")
    add("--core-metric-every", type=int, default=2000, help="steps between CORE estimates; -1 = never")
    add("--core-metric-max-per-task", type=int, default=500, help="examples per CORE task; -1 = all")
    add("--sample-every", type=int, default=2000, help="steps between samples; -1 = never")
    # checkpoints
    add("--model-tag", default=None, help="checkpoint folder; default d<depth>")
    add_checkpoint_flags(parser)
    add("--resume-from-step", type=int, default=-1, help="go on from the checkpoint of this step; -1 = do not")
    add("--overwrite", action="store_true",
        help="delete what stands under this tag and start over; with --resume-from-step: only the steps after that one")
    return parser


def check_args(args):
    """All that is wrong with the flags, as sentences."""
    positive = ("depth", "aspect_ratio", "head_dim", "max_seq_len", "total_batch_size", "device_batch_size",
                "eval_tokens")
    problems = [f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
                for name in positive if getattr(args, name) != "auto" and getattr(args, name) < 1]
    if not problems:
        problems += config_problems(args)
    problems += number_problems(args)
    if max(args.num_iterations, args.target_flops, args.target_param_data_ratio) <= 0:
        problems.append("one of --num-iterations, --target-flops, --target-param-data-ratio must be positive")
    if args.lanes != -1 and args.lanes < 1:
        problems.append(f"--lanes must be at least 1, or -1, got {args.lanes}")
    return problems


def config_problems(args):
    try:
        build_config(args, vocab_size=1)
        if args.total_batch_size != "auto":
            grad_accum_steps(args.total_batch_size, least_rows(args), args.max_seq_len,
                             int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:
        return [str(error)]
    return []


def least_rows(args):
    """Of a micro-batch, as far as it is known."""
    return 1 if args.device_batch_size == "auto" else args.device_batch_size


def build_config(args, vocab_size):
    """The GPTConfig that follows from --depth and the other flags of shape."""
    return config_of_depth(args.depth, vocab_size, args.max_seq_len, args.aspect_ratio, args.head_dim,
                           args.window_pattern)


def build_model(config, compute, dtype):
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=compute.device)
    model.init_weights()
    model.compute_dtype = dtype
    return model


def print_plan(args, model, compute, num_steps):
    """What will be trained, on what, for how long; returns the same as a dict for the report."""
    config, sizes, flops = model.config, model.num_scaling_params(), model.estimate_flops()
    scaling = sizes["transformer_matrices"] + sizes["lm_head"]
    base_dim = args.depth * args.aspect_ratio
    print0(describe_backend(compute.device, model.compute_dtype))
    print0(f"Compute dtype: {str(model.compute_dtype).split('.')[1]}, master weights fp32, "
           f"{torch.get_num_threads()} threads")
    print0(f"Vocabulary size: {config.vocab_size:,}")
    print0(f"num_layers: {config.n_layer}")
    print0(f"model_dim: {config.n_embd} (base: {base_dim}, nudge: {config.n_embd - base_dim:+d})")
    print0(f"num_heads: {config.n_head}, head_dim: {args.head_dim}, num_kv_heads: {config.n_kv_head}")
    micro = args.device_batch_size * args.max_seq_len
    print0(f"Tokens per micro-batch: {micro:,} per rank, {micro * compute.ddp_world_size:,} in all; "
           f"accumulation steps: {args.total_batch_size // (micro * compute.ddp_world_size)}")
    if args.recompute:
        print0("Activations are made again in the backward pass (--recompute)")
    for name, size in sizes.items():
        print0(f"{name:24s}: {size:,}")
    plan = {"Number of parameters": sizes["total"], "Number of FLOPs per token": flops,
            "Calculated number of iterations": num_steps,
            "Number of training tokens": num_steps * args.total_batch_size,
            "Tokens : Scaling params ratio": num_steps * args.total_batch_size / scaling,
            "DDP world size": compute.ddp_world_size,
            "Forecast of peak memory per rank, MiB": peak_forecast(args, model, compute)}
    for name, value in plan.items():
        print0(f"{name}: {value:,.2f}" if isinstance(value, float) else f"{name}: {value:,}")
    print0(f"Total training FLOPs: {flops * plan['Number of training tokens']:.3e}")
    return plan


def peak_forecast(args, model, compute):
    """MiB that a rank will need at most, before its first step; on a CPU with all that the process holds besides."""
    parts = memory_forecast(model.config, args.device_batch_size, compute.device.type, model.compute_dtype.itemsize,
                            compute.ddp_world_size, args.recompute)
    if compute.device.type != "cpu":
        return parts["peak"] / 2**20
    import psutil
    process = (psutil.Process().memory_info().rss - parts["weights"]) / 2**20 + COMPILER_MIB * (args.compile != "off")
    return process + (1 + WASTE["cpu"]) * parts["peak"] / 2**20


def make_model(args, compute, vocab_size):
    """(the model, its number of optimizer steps); settles an automatic --total-batch-size and --device-batch-size."""
    model = build_model(build_config(args, vocab_size), compute, get_compute_dtype(compute.device, args.dtype))
    model.recompute = args.recompute
    sizes = model.num_scaling_params()
    horizon = args, model.estimate_flops(), sizes["transformer_matrices"] + sizes["lm_head"]
    if args.total_batch_size == "auto":
        args.total_batch_size = nearest_multiple(batch_for_horizon(horizon_tokens(*horizon)),
                                                 least_rows(args) * args.max_seq_len * compute.ddp_world_size)
        print0(f"Total batch size: {args.total_batch_size:,} tokens (auto: by the length of the run)")
    if args.device_batch_size == "auto":
        args.device_batch_size = fitting_rows(model, grad_accum_steps(
            args.total_batch_size, 1, args.max_seq_len, compute.ddp_world_size), compute, partial(probe, model))
    return model, training_horizon(*horizon)


def preflight(args):
    """Take a few real steps of everything, see nanochat/preflight.py; returns the exit code."""
    compute = compute_init(args.device_type, args.seed)
    try:
        tokenizer, problem = get_tokenizer(), None
    except (OSError, ValueError, UserError) as error:
        tokenizer, problem = None, error
    model, num_steps = make_model(args, compute, tokenizer.get_vocab_size() if tokenizer else 32768)
    print_plan(args, model, compute, num_steps)
    accum_steps = grad_accum_steps(args.total_batch_size, args.device_batch_size, args.max_seq_len,
                                   compute.ddp_world_size)
    compiled = compile_model(model, args.compile, args.device_batch_size)
    optimizer = build_optimizer(model, args, num_steps)
    num_saved = args.keep_last if args.keep_last > 0 else 1 + num_steps // args.save_every * (args.save_every > 0)

    def data():
        if problem:
            raise problem
        return check_data(tokenizer, num_steps * args.total_batch_size, args.remainders == "requeue")

    checks = [("data", data)] * (args.preflight == "all") + [
        ("collectives", lambda: check_collectives(compute)),
        ("disk", lambda: check_disk(model.config, num_saved)),
        ("back end", lambda: f"{describe_backend(compute.device, model.compute_dtype)}; {compiled}"),
        ("steps", lambda: check_steps(model, optimizer, args.device_batch_size, accum_steps, num_steps, compute)),
        ("saving", lambda: check_saving(model, optimizer, compute))]
    failed = run_checks(checks, compute)
    compute_cleanup()
    return failed


def probe(model, rows):
    """A forward and backward of the real shapes, to see whether the memory is enough."""
    ids = torch.zeros((rows, model.config.sequence_len), dtype=torch.long, device=model.get_device())
    model(ids, ids, loss_reduction="sum").backward()


def scaled_weight_decay(args):
    """Decay tuned at depth 12, carried to other depths as 1/depth^2 (an exponent of 1.97 was fitted)."""
    return args.weight_decay * (12 / args.depth) ** 2


def build_optimizer(model, args, num_steps):
    scale = rate_scale(args.total_batch_size, num_steps * args.total_batch_size)
    print0(f"Learning rates scaled by {scale:.6f} for the batch and the length of the run, weight decay to "
           f"{scaled_weight_decay(args):.6f}")
    return model.setup_optimizer(
        unembedding_lr=args.unembedding_lr * scale, embedding_lr=args.embedding_lr * scale,
        matrix_lr=args.matrix_lr * scale, weight_decay=scaled_weight_decay(args),
        adam_betas=(args.adam_beta1, args.adam_beta2), scalar_lr=args.scalar_lr * scale)


def follow_schedule(optimizer, step, num_steps, args):
    """Set rates, momentum and decay for a step; returns the factor on the rates."""
    multiplier = lr_multiplier(step, num_steps, args.warmup_ratio, args.warmdown_ratio, args.final_lr_frac)
    weight_decay = scaled_weight_decay(args) * (1 - step / num_steps)
    set_schedule(optimizer, multiplier, muon_momentum(step, num_steps), weight_decay)
    return multiplier


def evaluate_val_bpb(model, tokenizer, args, compute, lanes):
    batches = pretraining_loader(tokenizer, args.device_batch_size, args.max_seq_len, "val", device=compute.device,
                                 num_lanes=lanes)
    num_rows = max(1, args.eval_tokens // args.max_seq_len) # the same ones for any number of ranks
    batches = first_rows(batches, num_rows, compute.ddp_rank, compute.ddp_world_size)
    steps = math.ceil(num_rows / (args.device_batch_size * compute.ddp_world_size))
    with torch.no_grad():
        return evaluate_bpb(model, batches, steps, token_bytes_of(tokenizer))


def evaluate(run, step, last_step):
    """Whatever is due after `step` steps: bpb, CORE, samples. Failures are told and never end the run."""
    args, model, tokenizer, compute = run.args, run.model, run.tokenizer, run.compute
    metrics = {}
    if is_due(args.eval_every, step, last_step) or (args.eval_every > 0 and step == 0):
        bpb = try_evaluation("Validation", lambda: evaluate_val_bpb(model, tokenizer, args, compute, run.lanes))
        if bpb is not None:
            print0(f"Step {step:05d} | Validation bpb: {bpb:.6f}")
            metrics["val/bpb"] = bpb
            run.min_val_bpb = min(bpb, run.min_val_bpb if run.min_val_bpb is not None else bpb)
    if is_due(args.core_metric_every, step, last_step):
        core = try_evaluation("CORE", lambda: evaluate_model(model, tokenizer, compute.device,
                                                             args.core_metric_max_per_task))
        if core is not None:
            mark = f" ({dataset_label()})" if dataset_label() else ""
            print0(f"Step {step:05d} | CORE metric{mark}: {core['core_metric']:.4f}")
            metrics.update({"core_metric": core["core_metric"], "centered_results": core["centered_results"]})
    if is_due(args.sample_every, step, last_step):
        for text in try_evaluation("Sampling", lambda: sample_prompts(Engine(model, tokenizer), tokenizer)
                                   if compute.is_master else []) or []:
            print0(text)
    if metrics:
        record(run, step, metrics)
    return metrics


def record(run, step, metrics):
    """To metrics.jsonl and to wandb."""
    metrics = {**totals(run, step), **metrics}
    run.log.log(step, **metrics)
    run.wandb.log({"step": step, **metrics})


def totals(run, step):
    return {"total_training_flops": run.speed.flops_per_step * step, "total_training_time": run.speed.total_time}


def save(run, step):
    """Begin to write the step. Every rank takes part: the data state is gathered from all."""
    args, compute = run.args, run.compute
    check_weights(run.model, step)
    data_state = merge_lane_states(compute.all_gather(run.data_state)) if run.data_state else None
    run.saver.save(step, run.model, run.optimizer, {
        "step": step,
        "val_bpb": None, # rewritten once it is known
        "model_config": asdict(run.model.config),
        "user_config": vars(args),
        "device_batch_size": args.device_batch_size,
        "max_seq_len": args.max_seq_len,
        "dataloader_state_dict": data_state,
        "loop_state": {"min_val_bpb": run.min_val_bpb, "loss_meter": run.meter.state(),
                       "total_training_time": run.speed.total_time},
        "lineage": lineage(run.tokenizer, args, compute, run.model),
    }, run.tokenizer)


def print_step(run, step, num_steps, loss, multiplier, seconds):
    speed = run.speed
    eta = speed.eta(num_steps - step - 1)
    fields = [f"step {step:05d}/{num_steps:05d} ({100 * step / num_steps:.2f}%)", f"loss: {loss:.6f}",
              f"lrm: {multiplier:.2f}", f"dt: {1000 * seconds:.2f}ms", f"tok/sec: {speed.tok_per_sec:,}",
              f"mfu: {speed.mfu:.2f}", f"epoch: {run.data_state['epoch']}", f"total time: {speed.total_time / 60:.2f}m"]
    print0(" | ".join(fields + ([f"eta: {eta / 60:.1f}m"] if eta is not None else [])), flush=True)


def train(run, batches, num_steps, accum_steps):
    """The whole of training on one page. Returns the metrics of the last evaluation."""
    args, model, optimizer, compute = run.args, run.model, run.optimizer, run.compute
    steps = prefetched(iter(lambda: list(itertools.islice(batches, accum_steps)), [])) # the micro-batches of each step
    steps = itertools.chain([next(steps)], steps) # read now: bad data must be told before anything is deleted
    with hold(run.folder, compute), Stop() as stop, collector_by_hand() as collect:
        if args.overwrite and compute.is_master: # only now that all else is known to be right
            delete_steps(run.folder, after=run.start_step)
        run.log = MetricsLog(run.folder, run.start_step or 0, enabled=compute.is_master)
        for step in range(run.start_step or 0, num_steps + 1): # one more than the steps: the end is saved, evaluated
            last_step = step == num_steps
            stopped = stop.requested(compute)

            if (last_step or stopped or is_due(args.save_every, step, last_step)) and step != run.start_step:
                save(run, step) # first: an evaluation that fails must not cost the step
            if last_step or stopped:
                run.saver.finish()
            if stopped:
                sys.exit(stop.exit_code())
            metrics = evaluate(run, step, last_step)
            if "val/bpb" in metrics:
                run.saver.update_meta(step, val_bpb=metrics["val/bpb"])
            if last_step:
                return metrics

            compute.synchronize()
            start = time.time()
            micro_batches = next(steps)
            loss = accumulate(model, ((x, y) for x, y, _ in micro_batches), args.total_batch_size, compute)
            check_loss(loss, step)
            multiplier = follow_schedule(optimizer, step, num_steps, args)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            compute.synchronize()
            seconds = time.time() - start

            is_first = step == (run.start_step or 0)
            if is_first or step % 500 == 0:
                collect(is_first)
            run.data_state = micro_batches[-1][2]
            run.speed.update(seconds)
            smooth = run.meter.update(loss)
            print_step(run, step, num_steps, smooth, multiplier, seconds)
            run.log.log(step, **{"train/loss": loss, "train/lrm": multiplier, "train/dt": seconds,
                                 "train/tok_per_sec": run.speed.tok_per_sec})
            if step % 100 == 0:
                run.wandb.log({"step": step, **totals(run, step), "train/loss": smooth, "train/lrm": multiplier,
                               "train/dt": seconds, "train/tok_per_sec": run.speed.tok_per_sec,
                               "train/mfu": run.speed.mfu, "train/epoch": run.data_state["epoch"]})


class Run:
    """What a run carries from step to step; everything in it is saved, or made again from what is saved."""

    def __init__(self, args, compute, tokenizer, model, optimizer, folder, meta, lanes):
        loop = (meta or {}).get("loop_state", {})
        self.args, self.compute, self.tokenizer = args, compute, tokenizer
        self.model, self.optimizer, self.folder, self.lanes = model, optimizer, folder, lanes
        self.start_step = meta["step"] if meta else None
        self.saver = Saver(folder, compute, self.start_step, args.keep_last)
        self.data_state = meta["dataloader_state_dict"] if meta else None
        self.min_val_bpb = loop.get("min_val_bpb")
        self.meter = LossMeter(**loop.get("loss_meter", {}))
        self.speed = Throughput(args.total_batch_size, model.estimate_flops(), peak_flops(compute),
                                loop.get("total_training_time", 0.0))
        self.wandb = init_wandb(args.run, compute, "nanochat", vars(args))


def load_for_resume(folder, step, args, model, optimizer, tokenizer, compute):
    """Put a saved step into model and optimizer; returns its meta. Refuses another tokenizer or other mathematics."""
    weights, optimizer_state, meta = load_checkpoint(folder, step, compute.device, load_optimizer=True,
                                                     rank=compute.ddp_rank)
    refuse_changes(meta["user_config"], vars(args), SHAPE)
    refuse_changes(meta["user_config"], vars(args), FIXED_ON_RESUME, args.allow_change)
    trained_with = meta.get("lineage", {}).get("tokenizer", tokenizer.fingerprint())
    if trained_with != tokenizer.fingerprint():
        raise ValueError(f"step {step} in {folder} was trained with the tokenizer {trained_with[:12]}, but the base "
                         f"directory has {tokenizer.fingerprint()[:12]}: restore it, or choose another --model-tag")
    model.load_state_dict(weights)
    optimizer.load_state_dict(optimizer_state)
    print0(f"Resuming from step {step} of {folder}")
    return meta


def report(run, plan, metrics):
    """The end of the run, on the console and in the report."""
    print0(f"Peak memory usage: {peak_memory_mib(run.compute):.2f} MiB")
    print0(f"Total training time: {run.speed.total_time / 60:.2f} m")
    if run.min_val_bpb is not None:
        print0(f"Minimum validation bpb: {run.min_val_bpb:.6f}")
    cap = run.args.core_metric_max_per_task
    kind = [dataset_label(), f"at most {cap} examples per task" if cap > 0 else "all examples"]
    outcome = {
        "Minimum validation bpb": run.min_val_bpb,
        "Final validation bpb": metrics.get("val/bpb"),
        f"CORE metric estimate ({', '.join(filter(None, kind))})": metrics.get("core_metric"),
        "MFU %": run.speed.mfu,
        "Total training flops": run.speed.flops_per_step * plan["Calculated number of iterations"],
        "Total training time": f"{run.speed.total_time / 60:.2f}m",
        "Peak memory usage": f"{peak_memory_mib(run.compute):.2f}MiB",
    }
    get_report().log("Base model training", [vars(run.args), plan, outcome, forecast(run, plan)])


def forecast(run, plan):
    """What could be said of this run beforehand, to be set beside what came out."""
    name = torch.cuda.get_device_name() if run.compute.device.type == "cuda" else None
    return forecast_of_run(run.model.config, plan["Number of training tokens"], name, run.compute.ddp_world_size)


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    print_banner()
    if args.preflight:
        sys.exit(preflight(args))
    folder = checkpoint_dir("base", args.model_tag or f"d{args.depth}")
    resume_step = step_to_resume(folder, args.resume, args.overwrite, args.resume_from_step)
    tokenizer = get_tokenizer()
    compute = compute_init(args.device_type, args.seed)
    if label := dataset_label():
        print0(f"Data set: {label} (synthetic: its scores are not those of the published benchmarks)")

    if resume_step is not None and args.total_batch_size == "auto": # whatever it would be for the ranks of today
        args.total_batch_size = read_meta(folder, resume_step)["user_config"]["total_batch_size"]
    model, num_steps = make_model(args, compute, tokenizer.get_vocab_size())
    plan = print_plan(args, model, compute, num_steps)
    optimizer = build_optimizer(model, args, num_steps)
    meta = None
    if resume_step is not None:
        meta = load_for_resume(folder, resume_step, args, model, optimizer, tokenizer, compute)
    state = meta["dataloader_state_dict"] if meta else None
    lanes = args.lanes if args.lanes > 0 else compute.ddp_world_size
    lanes = (state or {}).get("num_lanes") or usable_lanes("train", lanes)
    batches = pretraining_loader(tokenizer, args.device_batch_size, args.max_seq_len, "train", device=compute.device,
                                 resume_state_dict=state, num_lanes=lanes, requeue=args.remainders == "requeue")
    if resume_step is not None and resume_step > num_steps:
        raise ValueError(f"{folder} is at step {resume_step} already, beyond the {num_steps} steps of this run: give "
                         "a longer horizon, or another --model-tag")
    if resume_step == num_steps and meta["val_bpb"] is not None and is_reported("Base model training", compute):
        print0(f"Nothing to do: {folder} is complete at step {num_steps}")
        return
    accum_steps = grad_accum_steps(args.total_batch_size, args.device_batch_size, args.max_seq_len,
                                   compute.ddp_world_size)
    print0(compile_model(model, args.compile, args.device_batch_size))
    warn_of_changes((meta or {}).get("lineage", {}), lineage(tokenizer, args, compute, model))
    run = Run(args, compute, tokenizer, model, optimizer, folder, meta, lanes)
    metrics = train(run, batches, num_steps, accum_steps)
    report(run, plan, metrics)
    run.wandb.finish()
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
