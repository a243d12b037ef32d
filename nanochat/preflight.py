"""
Checks before a long training on a paid machine: what would fail in hour three fails in minute two, with the cure.

Each check tells in a few words what it found, or raises an error that says what to do. All ranks take part in all of
them; nothing is left behind. Knows nothing about flags: scripts/base_train.py says what will be trained.
"""
import math
import shutil
import tempfile
import time
from dataclasses import asdict

import torch
import torch.distributed as dist

from nanochat.checkpoint_manager import Saver, load_checkpoint
from nanochat.common import UserError, get_base_dir, print0, read_manifest
from nanochat.dataset import CROPPED, DATASETS, open_shard, read_row_group, split_files
from nanochat.gpt import memory_forecast
from nanochat.training import accumulate, available_memory, check_loss


def run_checks(checks, compute):
    """Run the checks, (name, function) each, and print a line for each; returns the exit code: 0, or 1 after FAILED."""
    failed = []
    for name, check in checks:
        try:
            found, error = check(), None
        except Exception as failure: # of whatever kind: it is what the check is for
            found, error = None, f"{type(failure).__name__}: {failure}"
        errors = [f"rank {rank}: {text}" for rank, text in enumerate(compute.all_gather(error)) if text]
        print0(f"FAILED {name}: {errors[0]}" if errors else f"ok     {name}: {found}", flush=True)
        failed += [name] * bool(errors)
    print0(f"Preflight: {', '.join(failed)} FAILED" if failed else "Preflight: all is ready")
    return int(bool(failed))


def check_collectives(compute):
    start, ranks = time.time(), compute.ddp_world_size
    if compute.all_reduce(compute.ddp_rank) != [ranks * (ranks - 1) / 2] \
            or compute.all_gather(compute.ddp_rank) != list(range(ranks)):
        raise UserError("the ranks do not add up: check the network between the machines (NCCL_DEBUG=INFO)")
    return f"{ranks} ranks, {dist.get_backend() if compute.ddp else 'one process'}, {time.time() - start:.2f} s"


def check_data(tokenizer, num_tokens, requeue):
    """Are the shards there, and do they hold `num_tokens`? Estimated from the first documents and the sizes of all."""
    paths = split_files("train")
    read_row_group(split_files("val")[0], 0)
    texts, num_bytes = read_row_group(paths[0], 0)[:64], 0
    for path in paths:
        with open_shard(path) as file:
            groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
            num_bytes += sum(group.total_byte_size for group in groups)
    density = sum(map(len, tokenizer.encode(texts))) / max(1, len("".join(texts).encode("utf-8", "replace")))
    there = num_bytes * density * (1 if requeue else 1 - CROPPED)
    found = f"{len(paths)} training shards, about {there:.2g} tokens for {num_tokens:.2g}"
    name = (read_manifest() or {}).get("name")
    if there < num_tokens and name in DATASETS and len(paths) < DATASETS[name][1]:
        more = math.ceil(len(paths) * num_tokens / there)
        raise UserError(f"{found}: run `python -m nanochat.dataset --dataset {name} -n {more}`")
    return found + f": {num_tokens / there:.1f} passes" * (there < num_tokens)


def check_disk(config, num_saved):
    """Is there room for `num_saved` checkpoints, with the one that is being written?"""
    size = memory_forecast(config, 1, "cpu")
    need, free = (num_saved + 1) * (size["weights"] + size["optimizer state"]), shutil.disk_usage(get_base_dir()).free
    if need > free:
        raise UserError(f"{num_saved} checkpoints need up to {need / 1e9:.1f} GB, {get_base_dir()} has "
                        f"{free / 1e9:.1f} free: make room, pass --keep-last, or set NANOCHAT_BASE_DIR to another disk")
    return f"{free / 1e9:.1f} GB free, {num_saved} checkpoints need up to {need / 1e9:.1f}"


def check_steps(model, optimizer, rows, accum_steps, num_steps, compute):
    """Three steps of one micro-batch of `rows` rows each, of random ids; forecasts the time of the whole run."""
    shape = (rows, model.config.sequence_len)
    ids = torch.randint(model.config.vocab_size, shape, device=compute.device)
    try:
        for step in range(3):
            marks = [time.time()]
            check_loss(accumulate(model, [(ids, ids)], ids.numel() * compute.ddp_world_size, compute), step)
            marks.append(time.time()) # the loss has been read: the device has come this far
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            compute.synchronize()
            marks.append(time.time())
    except torch.OutOfMemoryError as error:
        raise UserError(f"{rows} rows do not fit into the memory ({error}): pass --device-batch-size auto, or "
                        "--recompute") from error
    seconds = accum_steps * (marks[1] - marks[0]) + marks[2] - marks[1]
    tokens = ids.numel() * accum_steps * compute.ddp_world_size / seconds
    return (f"{1000 * seconds:,.0f} ms each, {tokens:,.0f} tokens/s, {num_steps * seconds / 3600:.1f} h for "
            f"{num_steps:,} steps without evaluations; {available_memory(compute) / 2**20:,.0f} MiB are still free")


def check_saving(model, optimizer, compute):
    """Write a step into a folder beside those of the checkpoints, read it on all ranks, and remove it."""
    start = time.time()
    folder = compute.all_gather(tempfile.mkdtemp(".preflight", dir=get_base_dir()) if compute.is_master else "")[0]
    try:
        saver = Saver(folder, compute)
        saver.save(0, model, optimizer, {"model_config": asdict(model.config)}, None)
        saver.finish()
        weights, state, _ = load_checkpoint(folder, 0, compute.device, load_optimizer=True, rank=compute.ddp_rank)
        if not all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()):
            raise UserError(f"what was written to {folder} comes back altered: use another disk")
        optimizer.load_state_dict(state)
    finally:
        compute.all_gather(None) # now nobody reads it any more
        if compute.is_master:
            shutil.rmtree(folder)
    return f"a step written and read in {time.time() - start:.1f} s"
