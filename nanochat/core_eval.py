"""
The CORE metric of DCLM (Li et al. 2024, https://arxiv.org/abs/2406.11794): 22 in-context tasks, without any generation.

    item + few-shot examples -> prompts -> ids with a scored span [s, e) -> losses of the span -> right or wrong
    accuracies -> centred on the random baseline -> CORE = their mean

Three kinds of task. multiple_choice: one prompt per choice, the likeliest choice wins. schema: one prompt per context,
the context wins under which the common continuation is likeliest. language_modeling: the continuation must be what
greedy decoding would say. Model and tokenizer are handed in.
"""
import csv
import itertools
import json
import math
import os
import random
import tempfile
import time
import zipfile
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat.common import (UserError, dataset_label, download_file_with_lock, get_base_dir, is_ddp_initialized,
                             print0)

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip" # about 162 MB
ITEMS_AT_ONCE = 256        # items whose prompts are held in memory and sorted by length together
TOKENS_PER_FORWARD = 4096  # bounds the memory of logits and KV cache
MIN_SHARED_TOKENS = 32     # a shorter common prefix is not worth a forward of its own

# -----------------------------------------------------------------------------
# Prompts: plain concatenation, nothing escaped, text of the data never interpreted

def _field(item, name):
    if name not in item:
        raise ValueError(f"the field {name!r} is missing, there are only {', '.join(map(repr, sorted(item)))}")
    return item[name]


def _option(item, name):
    """The right one of an item's choices or contexts."""
    options, gold = _field(item, name), _field(item, "gold")
    if gold not in range(len(options)):
        raise ValueError(f"gold must be an index into {len(options)} {name}, got {gold!r}")
    return options[gold]


def render_prompts_mc(item, continuation_delimiter, fewshot_examples=None):
    """One prompt per choice."""
    shots = "".join(_field(shot, "query") + continuation_delimiter + _option(shot, "choices") + "\n\n"
                    for shot in fewshot_examples or [])
    _option(item, "choices") # the item itself must be sound too
    return [shots + _field(item, "query") + continuation_delimiter + choice for choice in item["choices"]]


def render_prompts_schema(item, continuation_delimiter, fewshot_examples=None):
    """One prompt per context option."""
    shots = "".join(_option(shot, "context_options") + continuation_delimiter + _field(shot, "continuation") + "\n\n"
                    for shot in fewshot_examples or [])
    _option(item, "context_options")
    ending = continuation_delimiter + _field(item, "continuation")
    return [shots + context + ending for context in item["context_options"]]


def render_prompts_lm(item, continuation_delimiter, fewshot_examples=None):
    """Two prompts: without and with the continuation."""
    shots = "".join(_field(shot, "context").strip() + continuation_delimiter + _field(shot, "continuation") + "\n\n"
                    for shot in fewshot_examples or [])
    without = shots + _field(item, "context").strip() + continuation_delimiter
    # Stripped as a whole: a blank at its end would be a token of its own, and then no prefix of the other prompt.
    return [without.strip(), without + _field(item, "continuation")]

# -----------------------------------------------------------------------------
# Tokens and the spans that are scored: (token lists to run, starts, ends) for the prompts of one item

def find_common_length(token_sequences, direction):
    """Number of tokens that all sequences share at their "left" or "right" end; at most the shortest length."""
    step = {"left": 1, "right": -1}[direction]
    common = 0
    for tokens in zip(*(sequence[::step] for sequence in token_sequences), strict=False):
        if len(set(tokens)) > 1:
            break
        common += 1
    return common


def _clamp_start(start, length):
    """At least one token is scored, and the very first one, which nothing predicts, never is."""
    return max(1, min(start, length - 1))


def _spans_mc(tokens):
    """The choices begin after the common prefix of all prompts."""
    # One choice may be the beginning of all others (or equal to them): its last token is scored then.
    start = _clamp_start(find_common_length(tokens, "left"), min(map(len, tokens)))
    return tokens, [start] * len(tokens), [len(sequence) for sequence in tokens]


def _spans_schema(tokens):
    """The continuation is the common suffix of all prompts."""
    suffix = find_common_length(tokens, "right")
    return tokens, [_clamp_start(len(s) - suffix, len(s)) for s in tokens], [len(s) for s in tokens]


def _spans_lm(tokens):
    """Only the prompt with the continuation is run. It starts where the other one ends."""
    # A tokenizer may merge across the border; then the first token that differs belongs to the continuation.
    return tokens[1:], [_clamp_start(find_common_length(tokens, "left"), len(tokens[1]))], [len(tokens[1])]


def _encode(tokenizer, prompts):
    return tokenizer(prompts, prepend=tokenizer.get_bos_token_id())


def batch_sequences_mc(tokenizer, prompts):
    return _spans_mc(_encode(tokenizer, prompts))


def batch_sequences_schema(tokenizer, prompts):
    return _spans_schema(_encode(tokenizer, prompts))


def batch_sequences_lm(tokenizer, prompts):
    return _spans_lm(_encode(tokenizer, prompts))


def stack_sequences(tokens, pad_token_id):
    """Lists or tuples of ids -> int64 tensor (B, longest), padded on the right."""
    longest = max(map(len, tokens))
    return torch.tensor([[*sequence, *[pad_token_id] * (longest - len(sequence))] for sequence in tokens])


TASK_TYPES = {"multiple_choice": (render_prompts_mc, _spans_mc), "schema": (render_prompts_schema, _spans_schema),
              "language_modeling": (render_prompts_lm, _spans_lm)}


class Sequence(NamedTuple):
    """One prompt to run: the tokens at start .. end-1 are scored."""
    tokens: tuple
    start: int
    end: int
    is_merged: bool       # language_modeling: a token lies across the border of context and continuation
    is_long: bool = False # longer than the context of the model


def _fewshot_indices(idx, num_items, num_fewshot):
    """Which items are shown before item idx: drawn without replacement from all others, always the same."""
    if num_fewshot > num_items - 1:
        raise ValueError(f"{num_fewshot} few-shot examples are asked for, there are only {num_items - 1} other items")
    drawn = random.Random(1234 + idx).sample(range(num_items - 1), max(0, num_fewshot))
    return [i + (i >= idx) for i in drawn] # as if drawn from the list of all indices but idx


def _context(model):
    """(tokens of the longest prompt that suits the model or None, are longer ones cut?)"""
    if getattr(model, "max_seq_len", None) is not None: # Hugging Face models end there
        return model.max_seq_len, True
    return getattr(getattr(model, "config", None), "sequence_len", None), False # ours were trained on so many


def _fit(sequence, context_len, is_cut):
    """Note whether it is too long. If it is cut, the last tokens stay, and all scored ones must be among them."""
    removed = max(0, len(sequence.tokens) - (context_len or math.inf))
    sequence = sequence._replace(is_long=removed > 0)
    if not (removed and is_cut):
        return sequence
    if sequence.start < removed:
        raise ValueError(f"{sequence.end - sequence.start} scored tokens do not fit into {context_len} positions")
    return sequence._replace(tokens=sequence.tokens[removed:], start=max(1, sequence.start - removed),
                             end=sequence.end - removed)


def _prepare(idx, model, tokenizer, data, task_meta):
    """The sequences of one item, in the order of its options. ValueError names task and item."""
    if task_meta["task_type"] not in TASK_TYPES:
        raise ValueError(f"task_type must be one of {', '.join(TASK_TYPES)}, got {task_meta['task_type']!r}")
    render, find_spans = TASK_TYPES[task_meta["task_type"]]
    shots = []
    try:
        shots = _fewshot_indices(idx, len(data), task_meta["num_fewshot"])
        prompts = render(data[idx], task_meta["continuation_delimiter"], [data[i] for i in shots])
        encoded = _encode(tokenizer, prompts)
        sequences = [Sequence(tuple(tokens), start, end, render is render_prompts_lm and start < len(encoded[0]))
                     for tokens, start, end in zip(*find_spans(encoded), strict=True)]
        return [_fit(sequence, *_context(model)) for sequence in sequences]
    except (TypeError, ValueError) as error:
        where = f"item {idx}" + (f" with examples {', '.join(map(str, shots))}" if shots else "")
        raise ValueError(f"CORE task {task_meta.get('label', task_meta['task_type'])}, {where}: {error}") from error

# -----------------------------------------------------------------------------
# Running the model

@torch.no_grad()
def forward_model(model, input_ids):
    """
    ids (B, T) -> losses and predictions, both (B, T): at p the cross entropy in nats of token p+1, NaN in the last
    column, and the likeliest token p+1.
    """
    logits = model(input_ids) # (B, T, V)
    losses = torch.full(input_ids.shape, math.nan, device=input_ids.device)
    for row in range(len(input_ids)): # row by row: a second copy of all logits would not pay
        losses[row, :-1] = F.cross_entropy(logits[row, :-1].float(), input_ids[row, 1:], reduction="none")
    return losses, logits.argmax(dim=-1)


class Group(NamedTuple):
    """Sequences of one item that run together; their common prefix runs once."""
    size: int   # number of sequences; groups of one size make a batch
    cost: int   # tokens to run
    shared: int # tokens of the prefix, 0 = none
    sequences: tuple


def _groups(sequences, model):
    """All sequences of an item together where their common prefix pays, else each by itself; equal ones once."""
    unique = tuple(sorted(set(sequences)))
    # The token before the first scored one predicts it, so it is not part of the prefix.
    shared = min(find_common_length([s.tokens for s in unique], "left"), min(s.start for s in unique) - 1)
    if len(unique) == 1 or shared < MIN_SHARED_TOKENS or not hasattr(model, "logits_at"):
        return [Group(1, len(sequence.tokens), 0, (sequence,)) for sequence in unique]
    longest = max(len(sequence.tokens) for sequence in unique)
    return [Group(len(unique), shared + len(unique) * (longest - shared), shared, unique)]


def _fill_cache(groups, tail_len, model, pad_token_id):
    """Run each group's prefix once: a KV cache with a row for every sequence and room for tail_len more tokens."""
    from nanochat.engine import KVCache # of the same floor, and only models that have logits_at fill one
    config, device = model.config, model.get_device()
    prefixes = stack_sequences([group.sequences[0].tokens[:group.shared] for group in groups], pad_token_id).to(device)
    cache, copies = (KVCache(num_rows, config.n_kv_head, prefixes.size(1) + more, config.n_embd // config.n_head,
                             config.n_layer, device)
                     for num_rows, more in ((len(groups), 0), (len(groups) * groups[0].size, tail_len)))
    model.logits_at(prefixes, torch.empty(0, dtype=torch.long, device=device), cache)
    cache.set_lengths([group.shared for group in groups]) # what lies beyond is padding
    copies.prefill(cache)
    return copies


@torch.no_grad()
def _run_groups(groups, model, pad_token_id, device):
    """Scores of groups with equally many sequences, as `_run_items` returns them."""
    rows = [(group.shared, sequence) for group in groups for sequence in group.sequences]
    ids = stack_sequences([sequence.tokens[shared:] for shared, sequence in rows], pad_token_id).to(device)
    before = torch.tensor([row * ids.size(1) + p - shared for row, (shared, sequence) in enumerate(rows)
                           for p in range(sequence.start - 1, sequence.end - 1)], device=device)
    targets = ids.flatten()[before + 1]
    if hasattr(model, "logits_at"):
        cache = _fill_cache(groups, ids.size(1), model, pad_token_id) if groups[0].shared else None
        logits = model.logits_at(ids, before, cache)
        losses, predictions = F.cross_entropy(logits, targets, reduction="none"), logits.argmax(dim=-1)
    else:
        losses, predictions = (values.flatten()[before] for values in forward_model(model, ids))
    span_lens = [sequence.end - sequence.start for _, sequence in rows]
    spans = zip(rows, losses.split(span_lens), (predictions == targets).split(span_lens), strict=True)
    return {sequence: (loss.mean().item(), is_greedy.all().item()) for (_, sequence), loss, is_greedy in spans}


def _run_items(items, model, tokenizer, device):
    """{sequence: (mean loss of its span, are all its greedy predictions right)}, batched with others of like length."""
    scores, groups = {}, {group for sequences in items for group in _groups(sequences, model)}
    for _, same_size in itertools.groupby(sorted(groups), key=lambda group: group.size):
        waiting = list(same_size)
        while waiting:
            count = max(1, TOKENS_PER_FORWARD // waiting[-1].cost)
            batch, waiting = waiting[-count:], waiting[:-count] # the longest first: memory runs out early or never
            scores.update(_run_groups(batch, model, tokenizer.get_bos_token_id(), device))
    return scores


def _is_right(item, scores, task_type):
    """Judge one item by the scores of its sequences."""
    if task_type == "language_modeling":
        return scores[0][1]
    losses = [math.inf if math.isnan(loss) else loss for loss, _ in scores] # NaN never wins
    return losses.index(min(losses)) == item["gold"] # ties: the first


def _evaluate_items(indices, model, tokenizer, data, device, task_meta):
    """[is it right, is a border merged, is a prompt too long] for each of these items, run together."""
    prepared = [_prepare(idx, model, tokenizer, data, task_meta) for idx in indices]
    scores = _run_items(prepared, model, tokenizer, device)
    return [[_is_right(data[idx], [scores[sequence] for sequence in item], task_meta["task_type"]), item[0].is_merged,
             any(sequence.is_long for sequence in item)] for idx, item in zip(indices, prepared, strict=True)]


def evaluate_example(idx, model, tokenizer, data, device, task_meta):
    """Is item idx answered rightly?"""
    return _evaluate_items([idx], model, tokenizer, data, device, task_meta)[0][0]


def evaluate_task(model, tokenizer, data, device, task_meta, max_examples=None):
    """
    Accuracy on one task, over all ranks.

    data          list of dicts; few-shot examples are drawn from all of it
    task_meta     task_type, num_fewshot, continuation_delimiter, optionally label (for messages)
    max_examples  score the first so many only; None or <= 0 = all
    """
    from tqdm import tqdm
    label = task_meta.get("label", "CORE task")
    num_items = len(data) if max_examples is None or max_examples <= 0 else min(max_examples, len(data))
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_ddp_initialized() else (0, 1)
    verdicts = torch.zeros(num_items, 3, device=device) # right, merged, too long
    mine = range(rank, num_items, world_size)
    with tqdm(total=len(mine), desc=label, leave=False, disable=rank > 0 or None) as bar: # None: on terminals only
        for first in range(0, len(mine), ITEMS_AT_ONCE):
            indices = mine[first:first + ITEMS_AT_ONCE]
            results = torch.tensor(_evaluate_items(indices, model, tokenizer, data, device, task_meta))
            verdicts[list(indices)] = results.to(verdicts)
            bar.update(len(indices))
    if is_ddp_initialized():
        dist.all_reduce(verdicts)
    accuracy, merged, too_long = verdicts.mean(dim=0).tolist()
    if merged:
        print0(f"{label}: in {100 * merged:.1f}% of the items a token spans the border of context and continuation")
    if too_long:
        context_len, is_cut = _context(model)
        print0(f"{label}: in {round(too_long * num_items)} of {num_items} items a prompt exceeds the model's context "
               f"of {context_len} tokens, {'its beginning is cut off' if is_cut else 'it is run whole'}")
    return accuracy

# -----------------------------------------------------------------------------
# The whole metric

def _unpack_bundle(zip_path):
    """Unzip to a temporary folder, then rename: <base>/eval_bundle is complete or absent."""
    import filelock
    target = os.path.join(get_base_dir(), "eval_bundle")
    with filelock.FileLock(target + ".lock"):
        if os.path.isdir(target):
            return
        with tempfile.TemporaryDirectory(dir=get_base_dir()) as folder:
            try:
                with zipfile.ZipFile(zip_path) as archive:
                    archive.extractall(folder)
                os.replace(os.path.join(folder, "eval_bundle"), target)
            except (zipfile.BadZipFile, FileNotFoundError) as error:
                raise UserError(f"{zip_path} is no complete evaluation bundle: delete it and run again") from error


def get_eval_bundle():
    """Folder of the CORE data, <base>/eval_bundle; downloaded when absent, unless the base directory is synthetic."""
    folder = os.path.join(get_base_dir(), "eval_bundle")
    if not os.path.isdir(folder):
        if dataset_label():
            raise UserError(f"{folder} is missing: generate the data set {dataset_label()} again")
        # Unpacking comes before the zip gets its name, and once more in case the folder was lost afterwards.
        _unpack_bundle(download_file_with_lock(BUNDLE_URL, "eval_bundle.zip", postprocess_fn=_unpack_bundle))
    return folder


def _read_bundle(folder):
    """Yield (task_meta, data shuffled, random baseline as a fraction) of every CORE task. UserError when broken."""
    import yaml
    try:
        with open(os.path.join(folder, "core.yaml"), encoding="utf-8") as file:
            tasks = yaml.safe_load(file)["icl_tasks"]
        with open(os.path.join(folder, "eval_meta_data.csv"), encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: 0.01 * float(row["Random baseline"]) for row in csv.DictReader(file)}
        for task in tasks:
            with open(os.path.join(folder, "eval_data", task["dataset_uri"]), encoding="utf-8") as file:
                data = [json.loads(line) for line in file if line.strip()]
            random.Random(1337).shuffle(data)
            meta = {"label": task["label"], "task_type": task["icl_task_type"], "num_fewshot": task["num_fewshot"][0],
                    "continuation_delimiter": task.get("continuation_delimiter", " ")}
            yield meta, data, baselines[task["label"]]
    except (OSError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split()) # yaml's take several lines
        raise UserError(f"the evaluation bundle {folder} is damaged ({reason}): "
                        "delete it, then run again or generate the data set again") from error


def evaluate_model(model, tokenizer, device, max_per_task=-1):
    """
    The CORE metric; max_per_task limits the scored items of each task, <= 0 = all.

    Returns {"results": {label: accuracy}, "centered_results": {label: (acc - b) / (1 - b)}, "core_metric": their mean}.
    """
    results, centered = {}, {}
    mark = f" ({dataset_label()})" if dataset_label() else "" # scores on stand-ins must not pass for real ones
    for meta, data, baseline in _read_bundle(get_eval_bundle()):
        start, label = time.perf_counter(), meta["label"]
        results[label] = evaluate_task(model, tokenizer, data, device, meta, max_examples=max_per_task)
        centered[label] = (results[label] - baseline) / (1 - baseline)
        print0(f"{label}{mark} ({meta['num_fewshot']}-shot, {meta['task_type']}): accuracy {results[label]:.4f} | "
               f"centered {centered[label]:.4f} | {time.perf_counter() - start:.2f} s", flush=True)
    return {"results": results, "centered_results": centered, "core_metric": sum(centered.values()) / len(centered)}
