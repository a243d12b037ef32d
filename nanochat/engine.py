"""
Ids in, ids out: decoding with a KV cache, many rows together, and the calculator tool.

    prompts -> prefill (all at once) -> sample -> tool state machine -> one column of ids -> decode -> sample ...

Every row stands at a position of its own, so prompts of different lengths decode together; every row draws from a
generator of its own, so what it says does not depend on its neighbours. A complete row leaves the batch at once. The
engine is handed model and tokenizer: it calls the model only as `forward(ids, kv_cache=cache)`, knows no text, and uses
the tokenizer for the special ids and for the tool. It opens no autocast: a model has one dtype.

    python -m nanochat.engine       compares it with GPT.generate on the newest base model
"""
import random
import time
from collections import deque

import torch

from nanochat.common import UserError
from nanochat.execution import use_calculator

TOOL_ERROR = "error"  # what the model reads when the calculator has no result
PREFILL_TOKENS = 4096 # at most so many positions of a prompt batch in one forward: their logits are held in memory


class KVCache:
    """
    Keys and values of B rows, each at its own position.

    k_cache, v_cache   (L, B, S, Hkv, D), zeros; None until a dtype is known
    positions          list of B ints on the host: how many positions of each row are filled
    cache_seqlens      the same as an int32 tensor (B,) on the device
    """

    def __init__(self, batch_size, num_heads, seq_len, head_dim, num_layers, device, dtype=None):
        """num_heads = key/value heads, seq_len = capacity S; dtype None: that of the first keys written (`ensure`)."""
        self.batch_size, self.max_seq_len = batch_size, seq_len
        self.n_layers, self.n_heads, self.head_dim = num_layers, num_heads, head_dim
        self.device = torch.device(device)
        self.k_cache = self.v_cache = None
        self.reset()
        if dtype is not None:
            self.ensure(dtype)

    def ensure(self, dtype):
        """Allocate in this dtype unless there is a cache already; the model calls it at every forward."""
        if self.k_cache is None:
            shape = (self.n_layers, self.batch_size, self.max_seq_len, self.n_heads, self.head_dim)
            self.k_cache = torch.zeros(shape, dtype=dtype, device=self.device) # two tensors, no views of one: those
            self.v_cache = torch.zeros(shape, dtype=dtype, device=self.device) # could not be written with gradients on

    def set_lengths(self, lengths):
        """Say how many positions of each row count; after a padded prefill these are the true prompt lengths."""
        if max(lengths, default=0) > self.max_seq_len:
            raise ValueError(f"the KV cache holds {self.max_seq_len} positions per row, {max(lengths)} are needed: "
                             "shorten the prompt or ask for fewer tokens")
        self.positions = list(lengths)
        self.cache_seqlens = torch.tensor(self.positions, dtype=torch.int32, device=self.device)

    def reset(self):
        """Back to length 0; the contents stay and are overwritten."""
        self.set_lengths([0] * self.batch_size)

    def advance(self, n):
        """n more positions of every row are filled; ValueError when the cache does not hold them."""
        self.set_lengths([position + n for position in self.positions])

    def get_pos(self):
        """The position that all rows share; ValueError when they differ."""
        if len(set(self.positions)) != 1:
            raise ValueError(f"the rows stand at different positions {self.positions}: use .positions")
        return self.positions[0]

    def get_layer_cache(self, layer_idx):
        """Views of one layer: keys and values, each (B, S, Hkv, D)."""
        return self.k_cache[layer_idx], self.v_cache[layer_idx]

    def prefill(self, other):
        """Copy what `other` holds into this empty cache; each of its rows fills B / other.B rows in turn."""
        ours, theirs = ((c.n_layers, c.n_heads, c.head_dim) for c in (self, other))
        if any(self.positions) or ours != theirs or self.batch_size % other.batch_size:
            raise ValueError("prefill needs an empty cache of the same layers, heads and head dimension, and a "
                             f"multiple of the rows: got {ours} x {self.batch_size} rows at {self.positions} from "
                             f"{theirs} x {other.batch_size} rows")
        copies, length = self.batch_size // other.batch_size, max(other.positions)
        self.set_lengths([position for position in other.positions for _ in range(copies)])
        if other.k_cache is not None: # a cache that was never written has nothing to copy
            self.ensure(other.k_cache.dtype)
            self.k_cache[:, :, :length] = other.k_cache[:, :, :length].repeat_interleave(copies, dim=1)
            self.v_cache[:, :, :length] = other.v_cache[:, :, :length].repeat_interleave(copies, dim=1)

    def drop_rows(self, rows):
        """
        Remove some rows. The last ones move into the holes, so the rest stays one slice and little is copied.

        Returns a list: place i now holds what was row kept[i].
        """
        kept = list(range(self.batch_size))
        for row in sorted(rows, reverse=True):
            kept[row] = kept[-1]
            kept.pop()
        if self.k_cache is not None:
            for cache in (self.k_cache, self.v_cache):
                for place, row in enumerate(kept):
                    if place != row:
                        cache[:, place] = cache[:, row]
            self.k_cache, self.v_cache = self.k_cache[:, :len(kept)], self.v_cache[:, :len(kept)]
        self.batch_size = len(kept)
        self.set_lengths([self.positions[row] for row in kept])
        return kept

# -----------------------------------------------------------------------------
# Sampling

def derive_seed(seed, index):
    """An independent seed for part `index` (a row, a prompt) of what `seed` governs; stable over machines."""
    return random.Random(f"{seed}/{index}").getrandbits(63)


def _uniforms(rng, num_rows, device):
    """(B, 1) fp32 numbers in (0, 1]: from one generator for all rows, or from one generator per row."""
    if isinstance(rng, torch.Generator):
        draws = torch.rand(num_rows, generator=rng, device=rng.device)
    else:
        draws = torch.stack([torch.rand((), generator=row_rng, device=row_rng.device) for row_rng in rng])
    return 1 - draws.to(device).unsqueeze(1)


def sample_next_token(logits, rng, temperature=1.0, top_k=None):
    """
    Draw one id for each row.

    logits (B, V); rng one torch.Generator, or a list with one per row; temperature >= 0, 0 = argmax (no draw is used);
    top_k keeps the k largest logits of a row, None or <= 0 = no limit. Returns ids (B, 1), int64. Raises ValueError for
    the temperature, UserError for a row of logits that no id can be drawn from.
    """
    if not temperature >= 0: # nan is not either
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not logits.amax(dim=-1).isfinite().all(): # a NaN anywhere makes it NaN
        raise UserError("the logits are not finite: take another checkpoint if the weights are damaged, or "
                        "--dtype float32 if the dtype is too coarse")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    ids = None
    if top_k is not None and top_k > 0:
        logits, ids = torch.topk(logits, min(top_k, logits.size(-1)), dim=-1) # (B, k), descending
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The maximum goes first: a tiny temperature must not overflow.
    probs = torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    # Inverse CDF: the first id whose cumulative probability reaches u times the total. As u > 0, one of probability
    # zero is never taken; as u <= 1, there always is one. Small changes of the logits move few draws.
    cdf = probs.cumsum(dim=-1)
    drawn = torch.searchsorted(cdf, _uniforms(rng, logits.size(0), logits.device) * cdf[:, -1:])
    return drawn if ids is None else ids.gather(1, drawn)

# -----------------------------------------------------------------------------

class Row:
    """One sample of one prompt: what it has said, and the state of its tool call."""

    def __init__(self, prompt_len, limit, seed):
        self.prompt_len = prompt_len
        self.limit = limit       # most tokens it may get, forced ones and the terminal one included
        self.rng = torch.Generator().manual_seed(seed) # on the CPU: the same draws on every device
        self.tokens = []         # the completion without its terminal token
        self.end = []            # its terminal token, when it has come
        self.masks = []          # 1 = sampled, 0 = forced by the tool
        self.forced = deque()    # ids that come next, whatever is sampled
        self.expression = None   # ids of the tool call so far, None outside of one
        self.done = False
        self.output = None       # (token, mask) that it contributes to the current column


class Engine:
    """Decodes with one model. Holds no state between calls."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        special = tokenizer.encode_special
        self.python_start, self.python_end = special("<|python_start|>"), special("<|python_end|>")
        self.output_start, self.output_end = special("<|output_start|>"), special("<|output_end|>")
        self.assistant_end = special("<|assistant_end|>")
        self.terminal = (self.assistant_end, tokenizer.get_bos_token_id())

    def generate(self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42):
        """
        Stream num_samples continuations of one prompt.

        tokens      non-empty list of ids
        max_tokens  columns at most; None: until a cache of S = config.sequence_len positions is full, which a prompt of
                    P tokens reaches after S-P+1 columns (the last needs no forward)
        seed        governs all rows; row r draws from (seed, r) alone
        Yields (token_column, mask_column), lists of num_samples ints; mask 1 = sampled, 0 = forced by the tool. The
        terminal token of a row is yielded; a row that is complete yields assistant_end with mask 0 from then on.
        Raises ValueError for an empty prompt and, without max_tokens, for one that exceeds the cache.
        """
        return self._decode([tokens], self._rows(tokens, num_samples, max_tokens, seed), temperature, top_k)

    def generate_batch(self, tokens, num_samples=1, seed=42, **kwargs):
        """
        `generate` to the end, same arguments. Returns (results, masks): per row the prompt plus what came up to but
        excluding the terminal token, and a 0 (prompt, forced) or 1 (sampled) for each.
        """
        samples, = self.generate_many([tokens], num_samples, seed=[seed], **kwargs)
        return [tokens + ids for ids, _ in samples], [[0] * len(tokens) + masks for _, masks in samples]

    def generate_many(self, prompts, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42,
                      batch_size=32, keep_end=False):
        """
        Complete many prompts of any lengths, at most batch_size rows at a time.

        prompts  list of non-empty lists of ids
        seed     an int, from which each prompt's seed is derived, or a list with one seed per prompt: then sample r of
                 a prompt is what `generate` gives for it with that seed, whatever else is in the batch
        keep_end the terminal token is the last one of a completion, or its absence tells that it was cut off
        Returns per prompt a list of num_samples pairs (ids, masks) of the completion, without its terminal token unless
        `keep_end`.
        """
        seeds = seed if isinstance(seed, list) else [derive_seed(seed, i) for i in range(len(prompts))]
        samples = [self._rows(prompt, num_samples, max_tokens, s) for prompt, s in zip(prompts, seeds, strict=True)]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i])) # neighbours need little padding
        prompts_at_once = max(1, batch_size // max(1, num_samples))
        for start in range(0, len(prompts), prompts_at_once):
            chosen = by_length[start:start + prompts_at_once]
            for first in range(0, num_samples, batch_size): # one turn unless a prompt alone has more samples than that
                rows = [row for i in chosen for row in samples[i][first:first + batch_size]]
                for _ in self._decode([prompts[i] for i in chosen], rows, temperature, top_k):
                    pass
        return [[(row.tokens + row.end * keep_end, row.masks + [1] * len(row.end) * keep_end) for row in rows]
                for rows in samples]

    def _rows(self, prompt, num_samples, max_tokens, seed):
        """Check one request and make its rows."""
        if not prompt:
            raise ValueError("a prompt must hold at least one token (bos), got an empty list")
        capacity = self.model.config.sequence_len
        if max_tokens is None and len(prompt) > capacity:
            raise ValueError(f"a prompt of {len(prompt)} tokens exceeds the context of {capacity}: shorten it, or pass "
                             "max_tokens to go beyond the context")
        limit = capacity - len(prompt) + 1 if max_tokens is None else max_tokens
        return [Row(len(prompt), limit, derive_seed(seed, row)) for row in range(num_samples)]

    @torch.inference_mode() # on a generator: entered and left around every step, so nothing stays set at a yield
    def _decode(self, prompts, rows, temperature, top_k):
        """Yield a column of ids and one of masks per step for `rows`, which are len(rows) / len(prompts) per prompt."""
        if all(row.limit <= 0 for row in rows):
            return
        logits, prompt_cache = self._prefill(prompts)
        cache = self._make_cache(len(rows), max(row.prompt_len + row.limit - 1 for row in rows))
        cache.prefill(prompt_cache)
        del prompt_cache
        logits = logits.repeat_interleave(len(rows) // len(prompts), dim=0)
        live = rows # those that still decode, in the order of the cache's rows
        while True:
            sampled = sample_next_token(logits, [row.rng for row in live], temperature, top_k)
            for row, token in zip(live, sampled.flatten().tolist(), strict=True):
                row.output = self._accept(row, token)
            yield [row.output[0] for row in rows], [row.output[1] for row in rows]
            for row in live:
                if row.done:
                    row.output = (self.assistant_end, 0)
            live = [live[i] for i in cache.drop_rows([i for i, row in enumerate(live) if row.done])]
            if not live:
                return
            ids = torch.tensor([[row.output[0]] for row in live], device=cache.device)
            logits = self.model.forward(ids, kv_cache=cache)[:, -1]

    def _prefill(self, prompts):
        """Run all prompts, padded on the right. Returns the logits (N, V) after each one's last token, and a cache."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        cache = self._make_cache(len(prompts), longest)
        # Padding is seen by no real token (attention is causal), and its keys lie beyond the row's length afterwards.
        ids = torch.tensor([prompt + prompt[:1] * (longest - len(prompt)) for prompt in prompts], device=cache.device)
        width = max(1, PREFILL_TOKENS // len(prompts))
        last_logits = [None] * len(prompts)
        for start in range(0, longest, width):
            logits = self.model.forward(ids[:, start:start + width], kv_cache=cache) # (N, <= width, V)
            for i, length in enumerate(lengths):
                if start < length <= start + width:
                    last_logits[i] = logits[i, length - 1 - start].clone() # not a view that keeps all the others
        cache.set_lengths(lengths)
        return torch.stack(last_logits), cache

    def _make_cache(self, batch_size, seq_len):
        config = self.model.config
        return KVCache(batch_size, config.n_kv_head, seq_len, config.n_embd // config.n_head, config.n_layer,
                       self.model.get_device())

    def _accept(self, row, sampled):
        """Advance a row's state machine by one token; returns (token, mask)."""
        token, mask = (row.forced.popleft(), 0) if row.forced else (sampled, 1)
        if token in self.terminal:
            row.done, row.end = True, [token]
            return token, mask
        row.tokens.append(token)
        row.masks.append(mask)
        row.done = len(row.tokens) >= row.limit
        if token == self.python_start:
            row.expression = []
        elif token == self.python_end:
            self._call_tool(row)
        elif row.expression is not None:
            row.expression.append(token)
        return token, mask

    def _call_tool(self, row):
        """End of a tool call, if one is open: what the calculator says comes next, or that it had no result."""
        expression, row.expression = row.expression, None
        if expression:
            result = use_calculator(self.tokenizer.decode(expression))
            said = TOOL_ERROR if result is None else str(result)
            row.forced.extend([self.output_start, *self.tokenizer.encode(said), self.output_end])

# -----------------------------------------------------------------------------

def main():
    """Check that 64 greedy tokens of the base model are the same by `GPT.generate` and by the engine; print timings."""
    from nanochat.checkpoint_manager import load_model
    from nanochat.common import compute_init
    compute = compute_init("")
    model, tokenizer, _ = load_model("base", compute.device, phase="eval")
    prompt = tokenizer.encode("The chemical formula of water is", prepend=tokenizer.get_bos_token_id())
    engine = Engine(model, tokenizer)
    plain = model.generate(prompt, 64, temperature=0)
    cached = (column[0] for column, _ in engine.generate(prompt, max_tokens=64, temperature=0))
    outputs = []
    for name, stream in [("GPT.generate", plain), ("Engine", cached)]:
        compute.synchronize()
        start = time.perf_counter()
        ids = list(stream)
        compute.synchronize()
        print(f"{name}: {len(ids)} tokens in {time.perf_counter() - start:.2f} s: {tokenizer.decode(ids)}")
        outputs.append(ids)
    # The engine stops at a terminal token, the plain loop does not.
    if outputs[0][:len(outputs[1])] != outputs[1]:
        raise UserError("the two outputs differ: cached decoding is wrong, or the dtype is too coarse (try float32)")
    print("Match: yes")


if __name__ == "__main__":
    from nanochat.common import run_main
    run_main(main, writes=False)
