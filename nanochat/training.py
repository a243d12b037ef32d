"""
Plain functions of a training loop: schedules, accumulation, meters, the metrics file. The loop stays in each script.

A function is here because a second script needs the same lines. It takes values and returns values.
"""
import contextlib
import datetime
import functools
import gc
import json
import math
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from nanochat.common import (UserError, atomic_write, dist_timeout, finite, get_peak_flops, is_ddp_initialized,
                             is_ddp_requested, print0)
from nanochat.flash_attention import SOFTMAX_KERNELS
from nanochat.gpt import LOSS_KERNELS, Block, memory_forecast, token_losses

# What a base model is asked to continue, to see at a glance what it has learned.
SAMPLE_PROMPTS = [
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow is",
    "The opposite of hot is",
    "The planets of the solar system are",
    "My favourite colour is",
    "If 5*x + 3 = 13, then x is",
]


def sample_prompts(engine, tokenizer, max_tokens=16):
    """Greedy continuations of SAMPLE_PROMPTS as text, prompt included."""
    prompts = [tokenizer.encode(prompt, prepend=tokenizer.get_bos_token_id()) for prompt in SAMPLE_PROMPTS]
    rows = engine.generate_many(prompts, max_tokens=max_tokens, temperature=0)
    return [prompt + tokenizer.decode(samples[0][0]) for prompt, samples in zip(SAMPLE_PROMPTS, rows)]

# -----------------------------------------------------------------------------
# How long, how much, how fast

def is_due(every, step, last_step):
    """Is an event with this cadence due after `step` steps? 0 or less = never; else every so often and at the end."""
    return every > 0 and (last_step or (step > 0 and step % every == 0))


def nearest_multiple(size, unit):
    """The multiple of `unit`, once at least, that is nearest to `size`."""
    return max(1, round(size / unit)) * unit


def grad_accum_steps(total_batch_size, device_batch_size, seq_len, world_size):
    """Micro-batches per optimizer step. Sizes in tokens, except device_batch_size in rows. Raises ValueError."""
    tokens = device_batch_size * seq_len * world_size # in one micro-batch, all ranks together
    if total_batch_size % tokens != 0:
        raise ValueError(
            f"--total-batch-size must be a multiple of {tokens:,} tokens "
            f"(--device-batch-size {device_batch_size} x --max-seq-len {seq_len} x {world_size} ranks), "
            f"got {total_batch_size:,}; nearest: {nearest_multiple(total_batch_size, tokens):,}")
    return total_batch_size // tokens


MOST_TOKENS = {"cuda": 1 << 16} # of a micro-batch: from here on more rows save no time (elsewhere 2^14)


def available_memory(compute):
    """Bytes that this rank can still allocate: of its GPU, else its share of the machine's."""
    if compute.device.type == "cuda":
        reserved = torch.cuda.memory_reserved(compute.device) - torch.cuda.memory_allocated(compute.device)
        return torch.cuda.mem_get_info(compute.device)[0] + reserved
    import psutil
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fitting_rows(model, rows_per_step, compute, probe):
    """
    The most rows of a micro-batch that the memory of every rank allows, a divisor of `rows_per_step`; prints why.

    model          on its device, before the first step: its weights are there, nothing else is
    rows_per_step  rows of one rank in an optimizer step
    probe          is called with a number of rows, for a forward and backward of theirs
    A size is tried when `memory_forecast` says that it takes at most 0.9 of what is free, and taken when the probe
    does not run out of memory. Raises UserError when not even one row fits.
    """
    most, free = MOST_TOKENS.get(compute.device.type, 1 << 14) // model.config.sequence_len, available_memory(compute)
    for rows in [n for n in range(max(1, min(most, rows_per_step)), 0, -1) if rows_per_step % n == 0]:
        parts = memory_forecast(model.config, rows, compute.device.type, model.compute_dtype.itemsize,
                                compute.ddp_world_size, model.recompute)
        need = parts["peak"] - parts["weights"]
        lacks = need > 0.9 * free or _runs_out(model, probe, rows, free - parts["optimizer state"])
        if not compute.all_reduce(int(lacks), op="max")[0]:
            print0(f"Device batch size: {rows} rows (auto: forecast {need / 2**20:,.0f} MiB beside the weights, "
                   f"free are {free / 2**20:,.0f} MiB)")
            return rows
    raise UserError(f"one row of {model.config.sequence_len} tokens needs {need / 2**20:,.0f} MiB beside the weights, "
                    f"but {free / 2**20:,.0f} MiB are free: pass --recompute, or lower --max-seq-len or --depth")


def _runs_out(model, probe, rows, room):
    """Does a forward and backward of so many rows run out of memory, or on a GPU take more than `room` bytes?"""
    on_gpu = model.get_device().type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        probe(rows)
        return on_gpu and torch.cuda.max_memory_allocated() - before > room
    except torch.OutOfMemoryError:
        return True
    finally:
        model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.empty_cache()


# What the default learning rates were tuned at: depth 12, 10.5 tokens per parameter
REFERENCE_BATCH, REFERENCE_TOKENS = 2**19, 1.156e9


def horizon_tokens(args, flops_per_token, scaling_params):
    """
    Tokens of a run: --num-iterations, else --target-flops, else --target-param-data-ratio, the first positive one.

    The ratio is tokens per scaling parameter (block matrices, head).
    """
    if args.num_iterations > 0 and args.total_batch_size == "auto": # times the batch that follows from the result
        return (args.num_iterations * REFERENCE_BATCH / REFERENCE_TOKENS**0.383) ** (1 / (1 - 0.383))
    if args.num_iterations > 0:
        return args.num_iterations * args.total_batch_size
    if args.target_flops > 0:
        return args.target_flops / flops_per_token
    return int(args.target_param_data_ratio * scaling_params)


def training_horizon(args, flops_per_token, scaling_params):
    """Number of optimizer steps, see `horizon_tokens`. Raises ValueError."""
    tokens = horizon_tokens(args, flops_per_token, scaling_params)
    by_flops = args.num_iterations <= 0 < args.target_flops
    num_steps = round(tokens / args.total_batch_size) if by_flops else tokens // args.total_batch_size
    if num_steps < 1:
        raise ValueError(f"{'--target-flops' if by_flops else '--target-param-data-ratio'} is too small for even one "
                         f"step of --total-batch-size {args.total_batch_size:,} tokens")
    return num_steps


def batch_for_horizon(num_tokens):
    """
    Tokens of an optimizer step for a run of num_tokens, a power of two.

    The best batch grows with the tokens of the run, D^0.383 (Bergsma et al. 2025, https://arxiv.org/abs/2505.13738). At
    most 2^20, as whether more is any good is not known, and small enough for 500 steps or more (dev/LOG.md).
    """
    batch = min(2**20, REFERENCE_BATCH * (num_tokens / REFERENCE_TOKENS) ** 0.383)
    return 2 ** min(round(math.log2(batch)), max(0, math.floor(math.log2(num_tokens / 500))))


def rate_scale(total_batch_size, num_tokens):
    """
    Factor on all learning rates for the batch and the length of a run, both in tokens.

    The square root of the batch; shorter runs than the reference bear more, D^-0.32 (Bjorck et al. 2024,
    https://arxiv.org/abs/2409.19913). Longer ones are left at what was tuned and reported.
    """
    return (total_batch_size / REFERENCE_BATCH) ** 0.5 * max(1, REFERENCE_TOKENS / num_tokens) ** 0.32


def lr_multiplier(step, num_steps, warmup_ratio=0.0, warmdown_ratio=0.4, final_lr_frac=0.0):
    """Factor on all learning rates at step 0 .. num_steps-1: linear warmup, constant, linear warmdown to the last."""
    warmup, warmdown = round(warmup_ratio * num_steps), round(warmdown_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if step <= num_steps - warmdown:
        return 1.0
    left = (num_steps - step) / warmdown
    return left + (1 - left) * final_lr_frac


def muon_momentum(step, num_steps=math.inf):
    """0.85 rising to 0.95 over the first 300 steps, or the first seventh of a short run (dev/LOG.md)."""
    fraction = min(step / min(300, max(1, num_steps / 7)), 1)
    return (1 - fraction) * 0.85 + fraction * 0.95


def set_schedule(optimizer, lr, momentum=None, weight_decay=None):
    """Set every group's rate to `lr` x its initial rate, and Muon's momentum and weight decay where given."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr
        if group["kind"] == "muon":
            group["momentum"] = group["momentum"] if momentum is None else momentum
            group["weight_decay"] = group["weight_decay"] if weight_decay is None else weight_decay

# -----------------------------------------------------------------------------
# One step

def accumulate(model, micro_batches, num_targets, compute, bos_id=None):
    """
    Forward and backward over the micro-batches of one optimizer step; returns the global mean loss as a float.

    micro_batches  iterable of (inputs, targets), each (B, T); targets -1 are ignored
    num_targets    supervised tokens of the whole step, over all micro-batches and ranks (at least 1)
    bos_id         the id that begins each document of packed rows, see GPT.forward
    The gradient of every rank is scaled so that their mean, which the optimizer takes, is that of the global mean loss:
    the same step for any micro-batch size and any number of ranks.
    """
    total = 0.0
    for inputs, targets in micro_batches:
        loss = model(inputs, targets, loss_reduction="sum", bos_id=bos_id) * (compute.ddp_world_size / num_targets)
        loss.backward()
        total = total + loss.detach()
    (total,) = compute.all_reduce(float(total)) # waits for the device
    return total / compute.ddp_world_size


DIVERGED = "which is not saved: lower the learning rates, or check the data; --resume goes on from the last checkpoint"


@contextlib.contextmanager
def collector_by_hand():
    """
    Stop Python's garbage collector, which walks through all objects at times of its own; yields `collect(first)`.

    To be called between steps: after the first one (`first`) what is there stays, and is never walked through again.
    """
    def collect(first):
        gc.collect()
        if first:
            gc.freeze()

    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        gc.enable()


def check_loss(loss, step):
    """Raise UserError when the loss is not finite: nothing after it would be worth keeping."""
    if not math.isfinite(loss):
        raise UserError(f"the loss became {loss} in step {step}, {DIVERGED}")


def check_weights(model, step):
    """Raise UserError, before a save, when a weight is not finite: gradients can overflow where the loss does not."""
    for name, weight in model.named_parameters(): # the same on all ranks, so they all raise
        if not torch.isfinite(weight).all():
            raise UserError(f"the weights of {name} are not finite after {step} steps, {DIVERGED}")


def compile_model(model, mode, rows, seq_len=None, bos_id=None):
    """
    Compile the blocks and the loss of `model`, and warm them up; says in one line what was done.

    mode                   "on", "off", or "auto": on wherever it works, else eager with the reason
    rows, seq_len, bos_id  the shapes and the kind of rows that come, see GPT.warm_up; gradients are dropped afterwards
    What is compiled of a block serves all layers of its kind, so the first step does not wait for a whole-model graph.
    """
    if mode == "off":
        return "Compile: off (--compile off)"
    start = time.time()
    before, after = (torch.compile(part, dynamic=False) for part in (Block.before, Block.after))
    softmax = tuple(torch.compile(kernel, dynamic=True) for kernel in SOFTMAX_KERNELS) # for blocks of any size
    model.block_fn = functools.partial(Block.forward, compiled=(before, after, softmax))
    model.losses_fn = torch.compile(token_losses, dynamic=False)
    model.loss_kernels = tuple(torch.compile(kernel, dynamic=False) for kernel in LOSS_KERNELS)
    try:
        model.warm_up(rows, seq_len, bos_id)
        return f"Compile: blocks and loss compiled in {time.time() - start:.1f} s"
    except Exception as error: # no C++ compiler, an unsupported device, a missing header: eager computes the same
        model.block_fn, model.losses_fn, model.loss_kernels = Block.forward, token_losses, LOSS_KERNELS
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if mode == "on":
            raise UserError(f"--compile on was asked for, but compiling failed: {reason}") from error
        return f"Compile: off, running eagerly because compiling failed: {reason}"
    finally:
        model.zero_grad(set_to_none=True)

# -----------------------------------------------------------------------------
# What is kept along the way

class LossMeter:
    """Exponential moving average of the loss (beta 0.9), corrected for its start at zero."""

    def __init__(self, value=0.0, count=0, beta=0.9):
        self.value, self.count, self.beta = value, count, beta

    def update(self, loss):
        self.value = self.beta * self.value + (1 - self.beta) * loss
        self.count += 1
        return self.value / (1 - self.beta**self.count)

    def state(self):
        return {"value": self.value, "count": self.count}


class Throughput:
    """Speed and time of a run. The first 10 steps of a process do not count: compilation and caches distort them."""

    def __init__(self, tokens_per_step, flops_per_token, peak_flops, total_time=0.0):
        self.tokens_per_step, self.total_time = tokens_per_step, total_time
        self.flops_per_step, self.peak_flops = tokens_per_step * flops_per_token, peak_flops # peak of all ranks
        self.steps, self.counted_time, self.tok_per_sec, self.mfu = 0, 0.0, 0, 0.0

    def update(self, seconds):
        """Take the duration of one step."""
        self.steps += 1
        self.tok_per_sec = int(self.tokens_per_step / seconds)
        self.mfu = 100 * self.flops_per_step / seconds / self.peak_flops
        if self.steps > 10:
            self.counted_time += seconds
            self.total_time += seconds

    def eta(self, steps_left):
        """Seconds to go, or None while it is too early to say."""
        return steps_left * self.counted_time / (self.steps - 10) if self.steps > 10 else None


def peak_flops(compute):
    """bf16 FLOP/s that all ranks together can reach; infinite, hence an MFU of 0, where that is not known."""
    known = compute.device.type == "cuda"
    return get_peak_flops(torch.cuda.get_device_name()) * compute.ddp_world_size if known else math.inf


def peak_memory_mib(compute):
    """Peak memory of the GPU, else resident memory of this process, in MiB."""
    if compute.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource # not on Windows, so not at the top
    unit = 1 if sys.platform == "darwin" else 1024 # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class MetricsLog:
    """
    metrics.jsonl of a training run: one JSON object per line, each with a "step".

    On a resume the lines from `resume_step` on are dropped: those steps are done again. Silent when not `enabled`. A
    line that cannot be written (a full disk) is told once and lost.
    """

    def __init__(self, folder, resume_step=0, enabled=True):
        self.told = False
        self.path = os.path.join(folder, "metrics.jsonl") if enabled else None
        if not enabled:
            return
        kept = [line for line in self._lines() if line["step"] < resume_step]
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)

    def _lines(self):
        if not os.path.exists(self.path):
            return
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError): # a kill may have cut the last line
                    yield json.loads(line)

    def log(self, step, **metrics):
        if self.path is None:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite({"step": step, **metrics})) + "\n")
        except OSError as error:
            if not self.told:
                print0(f"Warning: {self.path} has gaps from step {step} on: {error}")
            self.told = True


class Stop:
    """
    Notes SIGTERM and Ctrl-C, so that the loop can finish its step, save and leave. A second Ctrl-C leaves now; but not
    under torchrun, which passes on what its processes have often been sent already. SIGTERM may come many times.
    """

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, frame):
        if self.signal is None:
            self.signal = number
            print0(f"{signal.Signals(number).name}: finishing this step, then saving", flush=True)
        elif number == signal.SIGINT and not is_ddp_requested():
            raise KeyboardInterrupt

    def __exit__(self, *error):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, compute):
        """Did any rank get a signal? All ranks give the same answer."""
        return compute.all_reduce(int(self.signal is not None), op="max")[0] > 0

    def exit_code(self):
        """The shell's code for a process ended by this signal, so that a run file stops too."""
        return 128 + (self.signal or signal.SIGTERM)


@functools.cache
def _outcome_group():
    """A group in which the ranks tell how an evaluation ended: it cannot meet the collectives of the evaluation."""
    return dist.new_group(backend="gloo", timeout=min(dist_timeout(), datetime.timedelta(minutes=10)))


def try_evaluation(name, evaluate):
    """
    Run `evaluate()`, on all ranks; a failure on any of them is told at once and gives None on all.

    An evaluation must not cost a training run. Not covered: a rank that fails while others wait for it in a collective,
    out of which nothing can call them. It waits in vain for them to end, then raises UserError, and the run ends.
    """
    group = _outcome_group() if is_ddp_initialized() else None # made beforehand, because all ranks must take part
    result, num_failed = None, torch.zeros(1)
    try:
        result = evaluate()
    except Exception as error: # whatever it was: a missing bundle, a full disk, a bug
        print(f"{name} failed and is left out: {type(error).__name__}: {error}", flush=True)
        num_failed += 1
    if group is not None:
        try:
            dist.all_reduce(num_failed, group=group)
        except RuntimeError as error: # the time is up, or a rank has gone
            raise UserError(f"{name} did not end on all ranks, so that they are out of step: --resume goes on from the "
                            "last checkpoint") from error
    return None if num_failed else result


def number_problems(args):
    """What flags of every training script can be wrong about, as sentences: numbers, seed, cadences, checkpoints."""
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in vars(args).items()]
    problems = [f"{flag} must be a finite number, got {value}"
                for flag, value in flags if isinstance(value, float) and not math.isfinite(value)]
    problems += [f"{flag} must be a number of steps, or -1 for never, got {value}"
                 for flag, value in flags if flag.endswith("-every") and value < -1]
    problems += ["--resume and --overwrite exclude each other"] * (args.resume and args.overwrite)
    problems += [f"--keep-last must be at least 1, or -1 for all, got {args.keep_last}"
                 ] * (args.keep_last < 1 and args.keep_last != -1)
    return problems + [f"--seed must be at least 0 and below 2^63, got {args.seed}"] * (not 0 <= args.seed < 2**63)


def add_checkpoint_flags(parser):
    """Add the flags about saving and resuming that all training scripts have."""
    add = parser.add_argument
    add("--save-every", type=int, default=-1, help="steps between checkpoints; -1 = only at the end")
    add("--keep-last", type=int, default=-1, help="checkpoints to keep, older ones are deleted; -1 = all")
    add("--resume", action="store_true", help="go on from the newest complete checkpoint, or start when there is none")
    add("--allow-change", action="store_true", help="resume although flags that change the mathematics differ")


def refuse_changes(saved, now, keys, allowed=None):
    """
    Compare two dicts of flags; raises ValueError naming each of `keys` whose value differs.

    allowed  the value of --allow-change, with which a difference is only told; None where it would be of no help
    """
    changed = "; ".join(f"--{key.replace('_', '-')} was {saved[key]!r}, is {now[key]!r}"
                        for key in keys if key in saved and saved[key] != now[key])
    if changed and allowed:
        print0(f"Warning: going on with other mathematics (--allow-change): {changed}")
    elif changed:
        raise ValueError(f"cannot resume with other mathematics: {changed}: give the saved values, "
                         + "pass --allow-change to go on with these, " * (allowed is not None)
                         + "or start another run under another --model-tag")
