"""
A step on disk: save, find, load; and what each stage knows of its ancestors.

    <base>/<stage folder>/<tag>/   model_000200.pt  optim_000200_rank0.pt  meta_000200.json  tokenizer/

A step is complete or absent: its files are written under temporary names, flushed and renamed, the meta file last,
which lists the others with size and SHA-256. Published files without such a list count when model and meta exist. By
their keys they are of generation A (until early January 2026: no lambdas, no value embeddings, no window_pattern in the
meta), B (from 11 January: resid_lambdas, x0_lambdas) or C (from 17 January: value_embeds and ve_gate; what we write).
"""
import contextlib
import logging
import os
import pickle
import platform
import re
import threading
import zipfile
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from nanochat.common import (UserError, file_sha256, get_base_dir, is_ddp_initialized, print0, read_json, read_manifest,
                             write_json)
from nanochat.gpt import GATE_CHANNELS, GPT, Block, GPTConfig
from nanochat.report import git
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

logger = logging.getLogger(__name__)

STAGE_DIRS = {"base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints",
              "rl": "chatrl_checkpoints"}
STAGE_SCRIPTS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}
FILE_NAMES = {"model": "model_{:06d}.pt", "meta": "meta_{:06d}.json", "optim": "optim_{:06d}_rank{}.pt"}


class DamagedCheckpoint(ValueError):
    """A file of a step is missing, cut short or altered."""


def checkpoint_dir(source, tag=""):
    """Folder of one run: ("base", "d12") gives <base>/base_checkpoints/d12. Without a tag, of all runs of the stage."""
    if source not in STAGE_DIRS:
        raise ValueError(f"the source of a checkpoint must be one of {', '.join(STAGE_DIRS)}, got {source!r}")
    if tag and (tag in (".", "..") or os.path.basename(tag) != tag): # it may be overwritten: never a folder elsewhere
        raise UserError(f"--model-tag must be a plain name such as d12, without a path, got {tag!r}")
    return os.path.join(get_base_dir(), *filter(None, (STAGE_DIRS[source], tag)))


def _path(folder, kind, *numbers):
    return os.path.join(folder, FILE_NAMES[kind].format(*numbers))

# -----------------------------------------------------------------------------
# Saving

def save_checkpoint(checkpoint_dir, step, model_data, optimizer_data, meta_data, rank=0, tokenizer=None):
    """
    Write one step; until all of it is safely on disk the older steps stand as they were. Waits for no other rank.

    model_data      state dict, written by rank 0
    optimizer_data  this rank's optimizer state dict, or None. Ours is whole on rank 0; where other ranks have shards of
                    their own to save, rank 0 comes last, because its meta completes the step
    meta_data       JSON-like dict with at least "model_config"; "step", "world_size" and "files" are added
    tokenizer       stored beside the weights, so that the run carries it; None leaves it out
    Raises UserError when it cannot be written (a full disk).
    """
    os.makedirs(checkpoint_dir, exist_ok=True)
    tensors = {_path(checkpoint_dir, "model", step): model_data} if rank == 0 else {}
    if optimizer_data is not None:
        tensors[_path(checkpoint_dir, "optim", step, rank)] = optimizer_data
    meta_path = _path(checkpoint_dir, "meta", step)
    world_size = dist.get_world_size() if is_ddp_initialized() else 1
    try:
        _sweep(checkpoint_dir, rank)
        files = {os.path.basename(path): _write_temporary(path, data) for path, data in tensors.items()}
        if rank == 0:
            if tokenizer is not None:
                tokenizer.save(os.path.join(checkpoint_dir, "tokenizer"))
            write_json(meta_path + ".tmp", {"step": step, **meta_data, "world_size": world_size, "files": files})
    except (OSError, RuntimeError) as failure: # torch turns some failed writes into RuntimeError
        with contextlib.suppress(OSError):
            _sweep(checkpoint_dir, rank)
        raise UserError(f"could not save step {step} in {checkpoint_dir} ({failure}): the steps saved before are "
                        "complete, so make room there and go on with --resume") from failure
    for path in [*tensors, *([meta_path] if rank == 0 else [])]:
        os.replace(path + ".tmp", path)


def _write_temporary(path, data):
    """Save tensors to `path`.tmp, down to the disk; returns their size in bytes and SHA-256."""
    with open(path + ".tmp", "wb") as file:
        torch.save(data, file)
        file.flush()
        os.fsync(file.fileno())
    return {"size": os.path.getsize(path + ".tmp"), "sha256": file_sha256(path + ".tmp")}


def _sweep(folder, rank):
    """Remove this rank's temporary files, also those of a run that was killed while saving."""
    own = rf"optim_\d+_rank{rank}\.pt\.tmp" + (r"|(model|meta)_\d+\.(pt|json)\.tmp" if rank == 0 else "")
    for name in os.listdir(folder):
        if re.fullmatch(own, name):
            os.unlink(os.path.join(folder, name))


class Saver:
    """
    Saves the steps of one run while it trains on: a thread of rank 0 writes a copy of the state, one step at a time.

    A step is called saved when it is durable, not before. One that cannot be written (a full disk) is told, and costs
    neither the run nor the steps before it. All ranks have a Saver and call `finish` together.

    saved_step  the newest durable step, here or in the process that this one resumes; None before the first
    keep_last   number of steps that stay on disk, the older ones being deleted; below 1 all stay
    """

    def __init__(self, checkpoint_dir, compute, saved_step=None, keep_last=-1):
        self.folder, self.compute, self.keep_last = checkpoint_dir, compute, keep_last
        self.saved_step, self._thread, self._error = saved_step, None, None

    def save(self, step, model, optimizer, meta_data, tokenizer):
        """Begin to save, on all ranks together. `optimizer` is None for a step from which none goes on."""
        self._wait() # of the state there is one copy at a time
        optimizer_data = optimizer and optimizer.state_dict() # a copy already, whole on rank 0
        if self.compute.is_master:
            model_data = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
            self._thread = threading.Thread(target=self._write, name="checkpoint",
                                            args=(step, model_data, optimizer_data, meta_data, tokenizer))
            self._thread.start()

    def _write(self, step, model_data, optimizer_data, meta_data, tokenizer):
        try:
            save_checkpoint(self.folder, step, model_data, optimizer_data, meta_data, tokenizer=tokenizer)
            self.saved_step, self._error = step, None
            print0(f"Saved step {step} to {self.folder}", flush=True)
            if self.keep_last > 0:
                delete_steps(self.folder, before=complete_steps(self.folder)[-self.keep_last:][0])
        except Exception as error: # told, or raised by finish
            self._error = str(error)
            print0(f"Warning: {error}", flush=True)

    def _wait(self):
        if self._thread is not None:
            self._thread.join()

    def finish(self):
        """Wait until the step begun last is durable. Raises UserError, on all ranks, when it could not be written."""
        self._wait()
        if error := self.compute.all_gather(self._error)[0]:
            raise UserError(error)

    def update_meta(self, step, **changes):
        """Change entries of the meta of a step that this process saved or resumed; does nothing when it has not."""
        self._wait()
        if self.compute.is_master and step == self.saved_step:
            try:
                update_meta(self.folder, step, **changes)
            except OSError as error:
                print0(f"Warning: the meta of step {step} in {self.folder} stays as it was: {error}")


@contextlib.contextmanager
def hold(checkpoint_dir, compute):
    """
    Keep other runs out of a folder while this one writes to it, on all ranks together.

    The lock is the operating system's: it ends with the process, however that ends. Raises UserError when it is taken.
    """
    import filelock
    lock, is_taken = filelock.FileLock(os.path.join(checkpoint_dir, ".lock"), blocking=False), False
    if compute.is_master:
        os.makedirs(checkpoint_dir, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout:
            is_taken = True
    if compute.all_gather(is_taken)[0]:
        raise UserError(f"another run is at work in {checkpoint_dir}: wait for its end, or choose another --model-tag")
    try:
        yield
    finally:
        lock.release()


def read_meta(checkpoint_dir, step):
    """The meta of a saved step. Raises FileNotFoundError, which names the steps there are."""
    if not os.path.exists(_path(checkpoint_dir, "meta", step)):
        steps = ", ".join(map(str, complete_steps(checkpoint_dir))) or "none"
        raise FileNotFoundError(f"no complete step {step} in {checkpoint_dir}; complete steps there: {steps}")
    return read_json(_path(checkpoint_dir, "meta", step))


def update_meta(checkpoint_dir, step, **changes):
    """Rewrite the meta of a saved step with some entries changed, atomically. For rank 0 alone."""
    path = _path(checkpoint_dir, "meta", step)
    write_json(path, {**read_json(path), **changes})


def delete_steps(checkpoint_dir, after=None, before=None):
    """Delete the steps beyond `after` and below `before` (None: any), incomplete ones too. For rank 0 alone."""
    for name in sorted(os.listdir(checkpoint_dir)) if os.path.isdir(checkpoint_dir) else []: # a step's meta goes first
        match = re.fullmatch(r"(?:meta|model|optim)_(\d{6,})(?:_rank\d+)?\.(?:json|pt)", name)
        step = int(match[1]) if match else None
        if match and (after is None or step > after) and (before is None or step < before):
            os.unlink(os.path.join(checkpoint_dir, name))


def lineage(tokenizer, args, compute, model, parent=None):
    """
    What made a checkpoint, for meta["lineage"].

    model   as it trains here: its dtype of activations, and whether it is compiled
    parent  the meta that `load_model` returned, or the saved lineage's own parent; None in pretraining
    """
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "tiktoken", "rustbpe", "pyarrow", "datasets"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    manifest = read_manifest()
    return {
        "parent": parent and {key: parent.get(key) for key in ("source", "model_tag", "step", "files", "lineage")},
        "data": manifest and {key: manifest[key] for key in ("name", "synthetic", "validation_shard")},
        "tokenizer": tokenizer.fingerprint(), "git_commit": git("rev-parse", "HEAD") or None, "versions": versions,
        "seed": vars(args).get("seed"), "world_size": compute.ddp_world_size, "threads": torch.get_num_threads(),
        "device": str(compute.device), "dtype": str(model.compute_dtype).removeprefix("torch."),
        "compile": "off" if model.block_fn is Block.forward else "on", "flags": vars(args),
    }


def warn_of_changes(saved, now):
    """Say in a line what differs between the lineage of a step and that of the run which resumes it inexactly."""
    keys = ("device", "dtype", "compile", "threads", "world_size")
    changed = [f"{key} was {saved[key]}, is {now[key]}" for key in keys if key in saved and saved[key] != now[key]]
    if changed:
        print0(f"Warning: {'; '.join(changed)}: the steps from here need not equal an uninterrupted run's bit for bit")


def check_parent(parent, step=None):
    """Raise UserError when a start now, from `step` or the newest, would not be from `parent` (see lineage)."""
    folder = checkpoint_dir(parent["source"], parent["model_tag"])
    now = step if step in complete_steps(folder) else last_sound_step(folder)
    files = read_json(_path(folder, "meta", now)).get("files")
    listed = [(found or {}).get(FILE_NAMES["model"].format(now)) for found in (parent.get("files", files), files)]
    if now != parent["step"] or listed[0] != listed[1]:
        raise UserError(f"this run started from step {parent['step']} in {folder}, which was trained on or anew since "
                        f"(now step {now}): pass --overwrite, not --resume, to start over from that, or restore it")

# -----------------------------------------------------------------------------
# Finding

def _flaw(folder, step, read_all):
    """Name of the first file of a step that is not as its meta lists it, or None. By size; read_all: also by hash."""
    try:
        files = read_json(_path(folder, "meta", step)).get("files")
    except (OSError, ValueError):
        return FILE_NAMES["meta"].format(step)
    if not files: # an older meta implies the model alone; torch.save writes zip files, which end with their index
        model = _path(folder, "model", step)
        whole = os.path.isfile(model) and (not read_all or zipfile.is_zipfile(model))
        return None if whole else os.path.basename(model)
    for name, facts in files.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or os.path.getsize(path) != facts["size"]:
            return name
        if read_all and file_sha256(path) != facts["sha256"]:
            return name
    return None


def complete_steps(checkpoint_dir):
    """The steps of a run that are whole as far as names and sizes tell, ascending. No folder: none."""
    names = os.listdir(checkpoint_dir) if os.path.isdir(checkpoint_dir) else []
    steps = sorted(int(match[1]) for match in (re.fullmatch(r"meta_(\d{6,})\.json", name) for name in names) if match)
    return [step for step in steps if _flaw(checkpoint_dir, step, read_all=False) is None]


def find_last_step(checkpoint_dir):
    """The largest complete step of a run; FileNotFoundError when it has none."""
    steps = complete_steps(checkpoint_dir)
    if not steps:
        raise FileNotFoundError(f"no complete checkpoint in {checkpoint_dir}: train one, or name another --model-tag")
    return steps[-1]


def last_sound_step(checkpoint_dir):
    """As `find_last_step`, but files must have their listed hashes; says which steps it passes over."""
    find_last_step(checkpoint_dir)
    for step in reversed(complete_steps(checkpoint_dir)):
        flaw = _flaw(checkpoint_dir, step, read_all=True)
        if flaw is None:
            return step
        print0(f"Warning: passing over step {step} in {checkpoint_dir}: {flaw} is not what was saved")
    raise DamagedCheckpoint(f"every step in {checkpoint_dir} is damaged: train again, or name another --model-tag")


def step_to_resume(checkpoint_dir, resume, overwrite, from_step=-1):
    """
    The step that a run in this folder goes on from, or None when it starts afresh.

    resume     go on from the newest sound step, if there is one
    from_step  go on from this step; -1 = do not
    overwrite  although there are (later) steps, which `delete_steps` must delete: they would pass for the new run's
    Raises UserError rather than mix a new run with the steps of an earlier one.
    """
    steps = complete_steps(checkpoint_dir)
    if from_step >= 0:
        if steps and steps[-1] > from_step and not overwrite:
            raise UserError(f"{checkpoint_dir} holds checkpoints up to step {steps[-1]}: pass --overwrite as well to "
                            f"delete those after step {from_step}, or --resume to go on from the last")
        return from_step
    if steps and not (resume or overwrite):
        raise UserError(f"{checkpoint_dir} holds checkpoints up to step {steps[-1]}: pass --resume to go on, "
                        "--overwrite to delete them and start over, or another --model-tag")
    return last_sound_step(checkpoint_dir) if steps and resume else None


def _tags(checkpoints_dir):
    """The runs with a complete step, sorted by name; FileNotFoundError when there is none."""
    names = sorted(os.listdir(checkpoints_dir)) if os.path.isdir(checkpoints_dir) else []
    tags = [name for name in names if complete_steps(os.path.join(checkpoints_dir, name))]
    if not tags:
        stages = [stage for stage, folder in STAGE_DIRS.items() if folder == os.path.basename(checkpoints_dir)]
        cure = f"run `python -m scripts.{STAGE_SCRIPTS[stages[0]]}` first" if stages else "train a model first"
        raise FileNotFoundError(f"no complete checkpoint in {checkpoints_dir}: {cure}")
    return tags


def find_largest_model(checkpoints_dir):
    """Guess a tag: the deepest d<number>, else the largest number after a leading d, else the newest; ties by name."""
    tags = _tags(checkpoints_dir)
    for pattern in (r"d(\d+)", r"d(\d+).*"):
        numbered = [(int(match[1]), match[0]) for match in (re.fullmatch(pattern, tag) for tag in tags) if match]
        if numbered:
            return max(numbered)[1]
    return find_newest_model(checkpoints_dir)


def find_newest_model(checkpoints_dir):
    """The tag whose last complete step was written last; ties by name."""
    def written(tag):
        folder = os.path.join(checkpoints_dir, tag)
        return os.path.getmtime(_path(folder, "model", find_last_step(folder))), tag
    return max(_tags(checkpoints_dir), key=written)

# -----------------------------------------------------------------------------
# Loading

def load_checkpoint(checkpoint_dir, step, device, load_optimizer=False, rank=0):
    """
    Read one step; returns (model state dict, optimizer state dict or None, meta), tensors on `device`, dtypes as saved.

    An optimizer state that is stored whole (one file) loads on every rank; one in shards needs the ranks that wrote it.
    Raises FileNotFoundError, UserError for the shards, DamagedCheckpoint when a file is not what was saved.
    """
    meta = read_meta(checkpoint_dir, step)
    if flaw := _flaw(checkpoint_dir, step, read_all=True):
        raise DamagedCheckpoint(f"step {step} in {checkpoint_dir} is damaged ({flaw} is missing or not what was saved):"
                                " take another step, or train again")
    device = torch.device(device)
    model_data = _load_tensors(_path(checkpoint_dir, "model", step), device)
    optimizer_data = _load_tensors(_optimizer_path(checkpoint_dir, step, rank), device) if load_optimizer else None
    return model_data, optimizer_data, meta


def _optimizer_path(folder, step, rank):
    shards = [name for name in os.listdir(folder) if re.fullmatch(rf"optim_{step:06d}_rank\d+\.pt", name)]
    world_size = dist.get_world_size() if is_ddp_initialized() else 1
    if not shards:
        raise FileNotFoundError(f"step {step} in {folder} has no optimizer state: it can be loaded, but not resumed")
    if len(shards) not in (1, world_size):
        raise UserError(f"the optimizer state of step {step} in {folder} is in {len(shards)} shards: resume with that "
                        f"many processes, got {world_size}")
    return _path(folder, "optim", step, rank if len(shards) > 1 else 0)


def _load_tensors(path, device):
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DamagedCheckpoint(f"{path} is no file of plain tensors ({type(error).__name__}): restore it") from error


def build_model(checkpoint_dir, step, device, phase, dtype=None):
    """
    The model, neither compiled nor wrapped, and the tokenizer of one step; returns (model, tokenizer, meta).

    phase   "train" or "eval", the mode of the model
    dtype   of activations. None: that of the saved embedding table, bf16 becoming fp32 on cpu and mps. Given: an eval
            model keeps its matrices in it; a train model has fp32 masters (but bf16 tables for bf16 on CUDA)
    """
    if phase not in ("train", "eval"):
        raise ValueError(f"phase must be train or eval, got {phase!r}")
    device = torch.device(device)
    data, _, meta = load_checkpoint(checkpoint_dir, step, device)
    data = {key.removeprefix("_orig_mod."): tensor for key, tensor in data.items()} # left by torch.compile
    config = _patched_config(meta.get("model_config"), checkpoint_dir)
    model = _empty_model(config, data)
    data = {key: tensor.to(_weight_dtype(key, tensor, device, phase, dtype)) for key, tensor in data.items()}
    try:
        model.load_state_dict(data, strict=True, assign=True)
    except RuntimeError as error: # one line a key
        raise ValueError(f"the weights of step {step} in {checkpoint_dir} do not fit their config: "
                         + " ".join(str(error).split()[:40])) from error
    model.init_rotary() # the tables are not in the file
    model.compute_dtype = dtype
    model.train(phase == "train")
    if phase == "eval":
        model.pack_weights()
    return model, _matching_tokenizer(checkpoint_dir, step, meta, config), meta


def _patched_config(saved, folder):
    """GPTConfig of a meta's model_config; what other writers left out or added is named in a warning."""
    if not isinstance(saved, dict):
        raise DamagedCheckpoint(f"the meta in {folder} has no model_config: restore it, or take another checkpoint")
    if "window_pattern" not in saved: # published files depend on this value
        logger.warning(f"{folder}: no window_pattern in the saved config, taking L (full context)")
    known = {field.name for field in fields(GPTConfig)}
    if unknown := sorted(saved.keys() - known):
        logger.warning(f"{folder}: ignoring unknown entries of the saved config: {', '.join(unknown)}")
    return GPTConfig(**{"window_pattern": "L"} | {key: value for key, value in saved.items() if key in known})


def _empty_model(config, data):
    """A GPT without storage, of the generation of this state dict (which gets the scalars that it lacks)."""
    later = [key for key, tensor in data.items() if re.search("bigram|smear|backout", key)
             or (key.endswith("ve_gate.weight") and tensor.size(1) != GATE_CHANNELS)]
    if later:
        raise ValueError(f"the checkpoint is of a later generation ({later[0]}) with another forward pass: take one "
                         "from before 27 January 2026")
    lambdas = "resid_lambdas" in data or "x0_lambdas" in data
    if lambdas:
        device = next(iter(data.values())).device
        data.setdefault("resid_lambdas", torch.ones(config.n_layer, device=device))
        data.setdefault("x0_lambdas", torch.zeros(config.n_layer, device=device))
    table = data.get("transformer.wte.weight")
    unpadded = table is not None and table.size(0) == config.vocab_size # as before 9 December 2025
    with torch.device("meta"):
        return GPT(config, pad_vocab_size_to=1 if unpadded else 64, lambdas=lambdas,
                   value_embeds=any(key.startswith("value_embeds.") for key in data))


def _weight_dtype(key, tensor, device, phase, dtype):
    """In which dtype a loaded weight is kept; see `build_model`."""
    if dtype is None:
        return torch.float32 if tensor.dtype == torch.bfloat16 and device.type in ("cpu", "mps") else tensor.dtype
    if phase == "eval":
        return dtype if tensor.ndim >= 2 else torch.float32
    is_table = "wte" in key or "value_embeds" in key
    return torch.bfloat16 if is_table and dtype == torch.bfloat16 and device.type == "cuda" else torch.float32


def _matching_tokenizer(folder, step, meta, config):
    """The tokenizer that the run carries, else that of the base directory; ValueError unless it fits the model."""
    carried = os.path.join(folder, "tokenizer")
    tokenizer = RustBPETokenizer.from_directory(carried) if os.path.isdir(carried) else get_tokenizer()
    expected = (meta.get("lineage") or {}).get("tokenizer")
    if tokenizer.get_vocab_size() != config.vocab_size:
        problem = f"a tokenizer of {config.vocab_size:,} tokens, got one of {tokenizer.get_vocab_size():,}"
    elif expected is not None and tokenizer.fingerprint() != expected:
        problem = f"the tokenizer {expected[:12]} that it was trained with, got {tokenizer.fingerprint()[:12]}"
    else:
        return tokenizer
    others = ", ".join(_tags(os.path.dirname(os.path.abspath(folder))))
    raise ValueError(f"step {step} in {folder} needs {problem}: restore it, or choose by --model-tag from {others}")


def load_model_from_dir(checkpoints_dir, device, phase, model_tag=None, step=None, dtype=None):
    """
    As `build_model`. Without a tag: the run written last in this folder. Without a step: its last one, or the newest
    before it that is sound. What was taken is printed and stands in meta["model_tag"] and meta["step"].
    """
    tag = model_tag or find_newest_model(checkpoints_dir)
    folder = os.path.join(checkpoints_dir, tag)
    chosen = last_sound_step(folder) if step is None else step
    print0(f"Loading {folder}, step {chosen}" + ("" if model_tag else " (the newest; choose with --model-tag)"))
    model, tokenizer, meta = build_model(folder, chosen, device, phase, dtype)
    return model, tokenizer, {**meta, "model_tag": tag, "step": chosen}


def load_model(source, device, phase, model_tag=None, step=None, dtype=None):
    """As `load_model_from_dir`, of the stage `source`: base, mid, sft or rl. meta["source"] says which."""
    model, tokenizer, meta = load_model_from_dir(checkpoint_dir(source), device, phase, model_tag, step, dtype)
    return model, tokenizer, {**meta, "source": source}
