"""
Bits per byte: the loss of a language model in a unit that does not depend on its tokenizer.

    (inputs, targets) batches  ->  sum of nats / (ln 2 * sum of bytes)

A target counts with the number of raw bytes of its token; special tokens have 0 and count neither above nor below.
"""
import itertools
import math

import torch
import torch.distributed as dist

from nanochat.common import is_ddp_initialized


@torch.no_grad() # not inference mode: what the model caches here must still serve training
def evaluate_bpb(model, batches, steps, token_bytes, unwritten=(-1, 0), **forward_args):
    """
    Evaluate `steps` batches; with several ranks each brings its own, and the totals are summed.

    model        model(x, y, loss_reduction="none", **forward_args): B*T losses in nats, any shape; get_device()
    batches      iterable of (x, y, ...), each (B, T); y = -1 is ignored
    token_bytes  (V,) integers: raw bytes of each token, 0 = not counted
    unwritten    (id, n): n bytes of the token after this id are not in the text (SentencePiece puts a blank in front)
    Returns bits per byte, infinity when no target has bytes. Raises ValueError for steps < 1, for too few batches, and
    for a table that does not fit the vocabulary.
    """
    if steps < 1:
        raise ValueError(f"bits per byte need at least 1 batch, got {steps}: evaluate more tokens or smaller batches")
    device = torch.device(model.get_device())
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", token_bytes.numel())
    if token_bytes.ndim != 1 or token_bytes.numel() != vocab_size:
        raise ValueError(f"token_bytes must hold one number for each of the model's {vocab_size} tokens, got shape "
                         f"{tuple(token_bytes.shape)}: is it another tokenizer's?")
    token_bytes = token_bytes.to(device)
    # fp64, because thousands of batches are summed; on the CPU where the device has none
    totals = torch.zeros(2, dtype=torch.float64, device="cpu" if device.type == "mps" else device) # nats, bytes
    num_batches = 0
    for x, y, *_ in itertools.islice(batches, steps):
        num_batches += 1
        losses, targets = model(x, y, loss_reduction="none", **forward_args).reshape(-1), y.reshape(-1)
        if targets.max() >= len(token_bytes):
            raise ValueError(f"target {targets.max()} is not among the {len(token_bytes)} tokens of token_bytes: "
                             "is it another tokenizer's?")
        num_bytes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
        nats = torch.where(num_bytes > 0, losses, 0) # selected, not multiplied: 0 * inf would be NaN
        num_bytes = num_bytes - torch.where((x.reshape(-1) == unwritten[0]) & (num_bytes > 0), unwritten[1], 0)
        totals += torch.stack([nats.to(totals.device).double().sum(), num_bytes.to(totals.device).double().sum()])
    if num_batches < steps:
        raise ValueError(f"{steps} batches were to be evaluated, but there are only {num_batches}")
    if is_ddp_initialized():
        dist.all_reduce(totals)
    nats, num_bytes = totals.tolist()
    return nats / (math.log(2) * num_bytes) if num_bytes > 0 else math.inf
