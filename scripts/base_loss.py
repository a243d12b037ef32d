"""
Bits per byte of a base model on the train and val splits, and samples of what it writes.

    python -m scripts.base_loss --model-tag d20
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss -- --model-tag d20
    python -m scripts.base_loss --hf-path openai-community/gpt2

Reads:  base_checkpoints/ or a Hugging Face model (no samples then), base_data/.  Writes: the report's
"Base model loss" section.
The train split is read from its start: the documents that the first updates of every run have seen.
"""
import argparse
import math

from nanochat.checkpoint_manager import load_model
from nanochat.common import (DTYPES, compute_cleanup, compute_init, dataset_label, get_compute_dtype, print0,
                             run_main)
from nanochat.dataloader import first_rows, pretraining_loader
from nanochat.engine import Engine
from nanochat.hf_model import check_choice_of_model, load_hf_model
from nanochat.loss_eval import evaluate_bpb
from nanochat.report import get_report
from nanochat.tokenizer import token_bytes_of, unwritten_bytes
from nanochat.training import sample_prompts


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("--hf-path", default=None, help="instead of ours a model of the hub, e.g. openai-community/gpt2, or a folder")
    add("--device-batch-size", type=int, default=32, help="rows per device and forward pass")
    add("--split-tokens", type=int, default=40 * 524288, help="tokens per split, over all ranks; at least one row")
    add("--model-tag", default=None, help="checkpoint folder, e.g. d20; default: the newest")
    add("--model-step", "--step", type=int, default=None, help="step of the checkpoint; default: the last")
    add("--device-type", default="", choices=["", "cuda", "cpu", "mps"], help="empty = the first that is available")
    add("--dtype", default="", choices=["", *DTYPES], help="of activations; empty = bfloat16 where hardware has it")
    return parser


def check_args(args):
    """All that is wrong with the flags, as sentences."""
    return check_choice_of_model(args) + [
        f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
        for name in ("device_batch_size", "split_tokens") if getattr(args, name) < 1]


def evaluate_split(split, model, tokenizer, args, compute, num_lanes, unwritten):
    """Bits per byte on the first tokens of one split, those of the lanes of the training; see evaluate_bpb."""
    T = model.config.sequence_len
    num_rows = max(1, args.split_tokens // T)
    batches = pretraining_loader(tokenizer, args.device_batch_size, T, split, device=compute.device,
                                 num_lanes=num_lanes)
    batches = first_rows(batches, num_rows, compute.ddp_rank, compute.ddp_world_size)
    steps = math.ceil(num_rows / (args.device_batch_size * compute.ddp_world_size))
    bpb = evaluate_bpb(model, batches, steps, token_bytes_of(tokenizer), unwritten)
    print0(f"{split} bpb: {bpb:.6f} (the first {num_rows * T:,} tokens of the split)")
    return bpb


def draw_samples(model, tokenizer):
    """Texts of the probe prompts (greedy) and of eight documents from nothing (temperature 1)."""
    engine, bos = Engine(model, tokenizer), tokenizer.get_bos_token_id()
    conditioned = sample_prompts(engine, tokenizer)
    documents, _ = engine.generate_batch([bos], num_samples=8, max_tokens=128, temperature=1.0)
    return conditioned, [tokenizer.decode(document[1:]) for document in documents]


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    compute = compute_init(args.device_type)
    dtype = get_compute_dtype(compute.device, args.dtype)
    if args.hf_path is not None:
        model, tokenizer = load_hf_model(args.hf_path, compute.device, dtype)
        name, num_lanes, unwritten = args.hf_path, None, unwritten_bytes(tokenizer)
    else:
        model, tokenizer, meta = load_model("base", compute.device, "eval", args.model_tag, args.model_step, dtype)
        name, unwritten = f"base_model {meta['model_tag']} (step {meta['step']})", (-1, 0)
        num_lanes = (meta.get("dataloader_state_dict") or {}).get("num_lanes") # the same documents on any ranks
    bpb = {f"{split} bpb": evaluate_split(split, model, tokenizer, args, compute, num_lanes, unwritten)
           for split in ("train", "val")}
    samples = {}
    if compute.is_master and args.hf_path is None:
        conditioned, unconditioned = draw_samples(model, tokenizer)
        samples = {f"sample {i}": text for i, text in enumerate(conditioned)}
        samples |= {f"unconditioned sample {i}": text for i, text in enumerate(unconditioned)}
        for text in samples.values():
            print0(f"{'-' * 80}\n{text}")
    get_report().log("Base model loss", [{"model": name, "data": dataset_label() or "real", **bpb}, samples])
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
