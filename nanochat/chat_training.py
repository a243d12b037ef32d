"""
What midtraining, finetuning and reinforcement learning share: flags, where to start, one step, saving and evaluating.

    checkpoint of an earlier stage -> Run -> per step: between_steps (save, evaluate), an update -> <stage>'s folder

The loops stay in the scripts. Each of them is resumed exactly: what a Run carries from step to step is saved.
"""
import contextlib
import itertools
import os
import sys
from dataclasses import asdict

import torch
import torch.nn.functional as F

from nanochat.checkpoint_manager import (Saver, check_parent, checkpoint_dir, delete_steps, find_newest_model,
                                         hold, lineage, load_checkpoint, load_model, step_to_resume, warn_of_changes)
from nanochat.common import (DTYPES, UserError, dataset_label, file_sha256, get_base_dir, get_compute_dtype,
                             init_wandb, print0)
from nanochat.dataloader import conversation_steps
from nanochat.flash_attention import describe_backend
from nanochat.gpt import Block
from nanochat.report import get_report, is_reported
from nanochat.training import (MetricsLog, accumulate, add_checkpoint_flags, check_loss, check_weights, compile_model,
                               is_due, number_problems, refuse_changes, set_schedule)

SECTIONS = {"mid": "Midtraining", "sft": "Chat SFT", "rl": "Chat RL"} # of the report

# Flags that change the mathematics of a run: a resumed run must have the saved values. The scripts add their own.
FIXED_ON_RESUME = ("source", "model_step", "num_iterations", "max_seq_len", "embedding_lr", "unembedding_lr",
                   "matrix_lr", "weight_decay", "init_lr_frac", "seed")


def add_flags(parser, sources, source, init_lr_frac):
    """Add the flags that the stages have in common. `source` is the default among `sources`, where it can start."""
    add = parser.add_argument
    add("--run", default="dummy", help="wandb run name; dummy = no wandb")
    add("--device-type", default="", choices=["", "cuda", "cpu", "mps"], help="empty = the first that is available")
    add("--dtype", default="", choices=["", *DTYPES], help="of activations; empty = bfloat16 where the hardware has it")
    add("--seed", type=int, default=42, help="seed of the order of the conversations, and of sampling")
    add("--source", default=source, choices=sources, help="stage of the checkpoint to start from")
    add("--model-tag", default=None, help="folder to load from and to save under; default: the newest of --source")
    add("--model-step", type=int, default=None, help="step to load; default: the last")
    add("--num-iterations", type=int, default=-1, help="optimizer steps; -1 = from the number of epochs")
    add("--embedding-lr", type=float, default=0.2, help="AdamW, token and value embeddings")
    add("--unembedding-lr", type=float, default=0.004, help="AdamW, head")
    add("--matrix-lr", type=float, default=0.02, help="Muon, block matrices")
    add("--weight-decay", type=float, default=0.0, help="cautious decay of the block matrices (Muon); others have none")
    add("--init-lr-frac", type=float, default=init_lr_frac, help="factor on all initial learning rates")
    add_checkpoint_flags(parser)
    add("--overwrite", action="store_true", help="delete an earlier run's checkpoints under this tag and start over")


def add_conversation_flags(parser, max_seq_len, device_batch_size):
    """Add the flags of the stages that learn from packed conversations; the numbers are defaults."""
    add = parser.add_argument
    add("--compile", default="auto", choices=["auto", "on", "off"], help="auto = on, running eagerly where it fails")
    add("--max-seq-len", type=int, default=max_seq_len, help="tokens per row; -1 = the model's context length")
    add("--device-batch-size", type=int, default=device_batch_size,
        help="rows per device and forward pass; does not change the result")
    add("--allow-missing-identity", action="store_true", help="go on when there is no identity_conversations.jsonl")


def flag_problems(args, positive, positive_or_default=()):
    """All that is wrong with the flags, as sentences; the names are of flags that must be >= 1 (or -1)."""
    flags = [(name, name.replace("_", "-"), getattr(args, name)) for name in (*positive, *positive_or_default)]
    problems = [f"--{flag} must be at least 1{', or -1' * (name in positive_or_default)}, got {value}"
                for name, flag, value in flags if value < 1 and not (name in positive_or_default and value == -1)]
    return problems + number_problems(args)


def find_tag(args, sources):
    """The tag to load and to save under. Raises UserError naming the stages that can be started from."""
    newest = {}
    for source in sources:
        with contextlib.suppress(FileNotFoundError):
            newest[source] = find_newest_model(checkpoint_dir(source))
    if args.source not in newest:
        others = "".join(f"pass --source {source} (newest: {tag})" for source, tag in newest.items())
        raise UserError(f"no complete {args.source} checkpoint in {checkpoint_dir(args.source)}: "
                        + (others or "nor is there another source, run `python -m scripts.base_train` first"))
    return args.model_tag or newest[args.source]


class Run:
    """
    What a run carries from step to step; everything in it is saved, or made again from what is saved.

    stage    "mid", "sft" or "rl": where it saves
    sources  stages that it can start from
    fixed    names of the script's own flags that change the mathematics
    metrics  names of the metrics in the meta of a step, null until they are known; the first says that it was evaluated
    loop     whatever the loop must know after a resume, plain JSON; total_time = seconds of training
    """

    def __init__(self, args, compute, stage, sources, fixed, metrics, **loop):
        self.args, self.compute, self.stage, self.metrics = args, compute, stage, metrics
        tag = find_tag(args, sources)
        self.folder = checkpoint_dir(stage, tag)
        self.dry_run = getattr(args, "dry_run", False) # nothing is read from the folder, nothing is written to it
        resume_step = None if self.dry_run else step_to_resume(self.folder, args.resume, args.overwrite)
        source, step = (args.source, args.model_step) if resume_step is None else (stage, resume_step)
        dtype = get_compute_dtype(compute.device, args.dtype)
        self.model, self.tokenizer, meta = load_model(source, compute.device, "train", tag, step, dtype)
        print0(f"{'Starting' if resume_step is None else 'Resuming'} from {source} {tag}, step {meta['step']}; "
               f"compute dtype {str(dtype).split('.')[1]}, {torch.get_num_threads()} threads")
        self.bos_id = self.tokenizer.get_bos_token_id()
        if label := dataset_label():
            print0(f"Data set: {label} (synthetic: its scores are not those of the published benchmarks)")
        self.seq_len = getattr(args, "max_seq_len", -1)
        self.seq_len = self.seq_len if self.seq_len > 0 else self.model.config.sequence_len
        identity = os.path.join(get_base_dir(), "identity_conversations.jsonl")
        args.identity_hash = file_sha256(identity)[:12] if os.path.exists(identity) else None # a flag in all but name
        self.optimizer = build_optimizer(self.model, args)
        self.saver = Saver(self.folder, compute, resume_step, args.keep_last)
        self.parent, self.start_step, self.data_state = meta, resume_step, None
        self.loop = {"is_last": False, "total_time": 0.0, **loop}
        self.saved_lineage, self.finished = {}, False
        if resume_step is not None:
            self._resume(meta, (*FIXED_ON_RESUME, *fixed))
        self.wandb = init_wandb(args.run, compute, f"nanochat-{stage}", vars(args))

    def _resume(self, meta, fixed):
        allowed = None if meta["loop_state"]["is_last"] else self.args.allow_change # the last has no optimizer state
        refuse_changes(meta["user_config"], vars(self.args), fixed, allowed)
        self.saved_lineage, self.parent = meta["lineage"], meta["lineage"]["parent"]
        check_parent(self.parent, self.args.model_step)
        self.data_state = meta["dataloader_state_dict"]
        self.loop |= meta["loop_state"]
        evaluated = meta[self.metrics[0]] is not None or self.args.eval_every <= 0
        self.finished = self.loop["is_last"] and evaluated and is_reported(SECTIONS[self.stage], self.compute)
        if not self.loop["is_last"]: # which has no optimizer state
            self.optimizer.load_state_dict(
                load_checkpoint(self.folder, self.start_step, self.compute.device, load_optimizer=True)[1])

    def lineage(self):
        return lineage(self.tokenizer, self.args, self.compute, self.model, self.parent)

    def conversation_steps(self, task, state=None, **size):
        """Endless (this rank's rows, loader state), one for each optimizer step; see dataloader.conversation_steps."""
        pad_id = self.tokenizer.encode_special("<|assistant_end|>")
        return conversation_steps(self.tokenizer, task, self.seq_len, pad_id, self.args.seed, self.compute.ddp_rank,
                                  self.compute.ddp_world_size, state, **size)

    def compile(self):
        """Compile the model for packed rows of seq_len tokens, device_batch_size of them."""
        print0(describe_backend(self.compute.device, self.model.compute_dtype))
        print0("Each conversation of a packed row is computed alone, under a mask (not by FlashAttention-3)")
        print0(compile_model(self.model, self.args.compile, self.args.device_batch_size, self.seq_len, self.bos_id))

    def hold(self):
        """A context in which no other run writes to the folder; see checkpoint_manager.hold."""
        return contextlib.nullcontext() if self.dry_run else hold(self.folder, self.compute)

    def begin(self, batches):
        """Delete an earlier run's steps if asked to, and open the metrics log; returns the batches."""
        batches = itertools.chain([next(batches)], batches) # read now: bad data must be told before anything is deleted
        writes = self.compute.is_master and not self.dry_run
        if self.args.overwrite and writes: # only now that all else is known to be right
            delete_steps(self.folder)
        self.log = MetricsLog(self.folder, self.start_step or 0, enabled=writes)
        warn_of_changes(self.saved_lineage, self.lineage())
        return batches

    def between_steps(self, step, last_step, stop, evaluate):
        """
        What comes before every update, and after the last: save when due, leave when told to, evaluate.

        evaluate(step, last_step) -> {metric: value or None}, which also goes to log, meta and wandb. Returns it.
        """
        stopped = stop.requested(self.compute)
        due = last_step or stopped or is_due(self.args.save_every, step, last_step)
        if due and step != self.start_step and not self.dry_run:
            self.save(step, last_step) # first: an evaluation that fails must not cost the step
        if last_step or stopped:
            self.saver.finish()
        if stopped:
            sys.exit(stop.exit_code())
        metrics = {name: value for name, value in evaluate(step, last_step).items() if value is not None}
        if metrics:
            print0(" | ".join([f"Step {step:05d}", *(f"{name}: {value:.6f}" for name, value in metrics.items())]))
            self.log.log(step, **{name.replace("val_", "val/"): value for name, value in metrics.items()})
            self.wandb.log({"step": step, **metrics})
            self.saver.update_meta(step, **metrics)
        return metrics

    def save(self, step, is_last):
        """Begin to write the step, on all ranks together. The last one needs no optimizer state."""
        check_weights(self.model, step)
        self.loop = {**self.loop, "is_last": is_last}
        self.saver.save(step, self.model, None if is_last else self.optimizer, {
            "step": step,
            **dict.fromkeys(self.metrics), # rewritten once they are known
            "model_config": asdict(self.model.config), # sequence_len stays the model's: its windows depend on it
            "user_config": vars(self.args),
            "max_seq_len": self.seq_len,
            "dataloader_state_dict": self.data_state,
            "loop_state": self.loop,
            "lineage": self.lineage(),
        }, self.tokenizer)

    def report(self, outcome):
        """The end of the run, on the console and in the report."""
        outcome = {**outcome, "DDP world size": self.compute.ddp_world_size,
                   "Total training time": f"{self.loop['total_time'] / 60:.2f}m"}
        for name, value in outcome.items():
            print0(f"{name}: {value}")
        if not self.dry_run:
            get_report().log(SECTIONS[self.stage], [vars(self.args), outcome])

    def learn(self, rows, step, lr, momentum=None):
        """One update on this rank's rows (inputs, targets); returns (mean loss in nats, targets), both of all ranks."""
        num_targets = max(1, int(self.compute.all_reduce(int((rows[1] != -1).sum()))[0]))
        loss = accumulate(self.model, self.micro_batches(rows), num_targets, self.compute, self.bos_id)
        check_loss(loss, step)
        self.update(lr, momentum)
        return loss, num_targets

    def update(self, lr, momentum=None):
        """Step the optimizer at `lr` times the initial rates, and drop the gradients."""
        set_schedule(self.optimizer, lr, momentum)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.compute.synchronize()

    def micro_batches(self, rows):
        """Yield this rank's rows (inputs, targets), each (R, T), in pieces of device_batch_size rows on the device."""
        inputs, targets = rows
        size = self.args.device_batch_size
        if self.model.block_fn is not Block.forward: # compiled: fill up the last, another shape would compile anew
            inputs, targets = (F.pad(part, (0, 0, 0, -len(part) % size), value=-1) for part in rows)
            inputs = inputs.clamp_min(0) # an id, any: there is no target
        for start in range(0, len(inputs), size):
            yield tuple(part[start:start + size].to(self.compute.device) for part in (inputs, targets))


def build_optimizer(model, args):
    """A fresh optimizer with all initial learning rates scaled: the model is to be bent, not broken."""
    optimizer = model.setup_optimizer(unembedding_lr=args.unembedding_lr, embedding_lr=args.embedding_lr,
                                      matrix_lr=args.matrix_lr, weight_decay=args.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] *= args.init_lr_frac
    return optimizer


def packing_report(counters):
    """What became of the conversations, for the report; `counters` are those of the loader's state."""
    return {"Conversations split": counters["split"], "Conversation parts dropped": counters["dropped"],
            "Padding %": 100 * counters["padding"] / (counters["padding"] + counters["tokens"])}
