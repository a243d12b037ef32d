"""
Ids in, ids out: decoding with a KV cache, many requests together, and the calculator tool.

    submit -> waiting -> [ a place in the cache -> prompt read in pieces -> one id a step -> done ]

A `Batch` is a set of requests that decode together and a cache with a place for each. Every `step` is the same few
lines: requests that wait get free places, some prompt tokens are read, all others advance by one token, each takes what
was drawn for it. Requests join and leave at any step (continuous batching: Yu et al. 2022, Orca,
https://www.usenix.org/conference/osdi22/presentation/yu). Each stands at a position of its own and draws from a
generator of its own, so what it says does not depend on its neighbours. A prompt that begins like one whose keys are
still in the cache starts from those. Four requests and three places, where C has a long prompt:

    step    one token more for    prompt tokens read         waiting for a place
    1       -                     A and B: all
    2       A, B                  C: the first 256           D
    3       A, B                  C: the next 256            D        B has ended, its place is free
    4       A                     D: all, being short                 whoever has read all gets a token at once
    5       A, D                  C: the next 256
    6       A, D                  C: the rest

The engine is handed model and tokenizer: it calls the model with ids and a cache, knows no text, and uses the tokenizer
for the special ids and for the tool. It opens no autocast: a model has one dtype.

    python -m nanochat.engine       compares it with GPT.generate on the newest base model
"""
import copy
import itertools
import logging
import random
import time
from collections import Counter, deque

import torch

from nanochat.common import UserError
from nanochat.execution import use_calculator

logger = logging.getLogger(__name__)

TOOL_ERROR = "error"  # what the model reads when the calculator has no result
PREFILL_TOKENS = 4096 # so many prompt positions a step at most, where nobody waits for the next token
MIN_SHARED = 16       # tokens that prompts must have in common before keys are copied, or waited for
PATIENCE = 64         # a prompt that waits goes before one that came a step later and is at most so much shorter
CAPTURE_AFTER = 8     # steps with a number of rows before it gets a CUDA graph: a guess, as nothing was timed on a GPU
NOT_FINITE = ("the logits are not finite: take another checkpoint if the weights are damaged, or --dtype float32 if "
              "the dtype is too coarse")


class KVCache:
    """
    Keys and values of B rows, each at its own position.

    k_cache, v_cache   (L, B, S, Hkv, D), zeros; None until a dtype is known
    positions          list of B ints on the host: how many positions of each row are filled
    cache_seqlens      the same as an int32 tensor (B,) on the device
    """

    def __init__(self, batch_size, num_heads, seq_len, head_dim, num_layers, device, dtype=None):
        """num_heads = key/value heads, seq_len = capacity S; dtype None: chosen with the first keys (`ensure`)."""
        self.batch_size, self.max_seq_len = batch_size, seq_len
        self.n_layers, self.n_heads, self.head_dim = num_layers, num_heads, head_dim
        self.device = torch.device(device)
        self.k_cache = self.v_cache = None
        self.whole, self.first_row = None, 0 # of a view (`rows`): the cache that it shows
        self.is_captured = False # True: in a CUDA graph, which finds the rows' positions in cache_seqlens alone
        self.reset()
        if dtype is not None:
            self._allocate(dtype)

    def ensure(self, dtype):
        """Allocate for keys of this dtype unless there is a cache already; the model calls it at every forward."""
        if self.k_cache is None and self.whole is None: # torch's attention of one query is 2 to 6 times faster on a CPU
            self._allocate(torch.promote_types(dtype, torch.float32) if self.device.type == "cpu" else dtype) # in fp32
        elif self.k_cache is None:
            self.whole.ensure(dtype)
            rows = slice(self.first_row, self.first_row + self.batch_size)
            self.k_cache, self.v_cache = self.whole.k_cache[:, rows], self.whole.v_cache[:, rows]

    def _allocate(self, dtype):
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
        if not self.is_captured: # there the host sets the lengths before each replay
            self.set_lengths([position + n for position in self.positions])

    def span(self, n):
        """
        Where the n next tokens go: (start, end). start: an int where all rows stand together, else cache_seqlens, int32
        (B,); end: an int, beyond which nothing is written in any row.
        """
        if self.is_captured:
            return self.cache_seqlens, self.max_seq_len
        together = len(set(self.positions)) == 1
        return self.positions[0] if together else self.cache_seqlens, max(self.positions) + n

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
            if self.k_cache is None:
                self._allocate(other.k_cache.dtype)
            self.k_cache[:, :, :length] = other.k_cache[:, :, :length].repeat_interleave(copies, dim=1)
            self.v_cache[:, :, :length] = other.v_cache[:, :, :length].repeat_interleave(copies, dim=1)

    def rows(self, start, stop, lengths):
        """A cache that shows rows start .. stop, at these lengths. What is written to it is written here."""
        view = copy.copy(self)
        view.batch_size, view.whole, view.first_row = stop - start, self, start
        view.k_cache = view.v_cache = None
        view.set_lengths(lengths)
        if self.k_cache is not None:
            view.ensure(self.k_cache.dtype)
        return view

    def copy_row(self, source, target, length):
        """Row `target` gets the first `length` positions of row `source`."""
        if self.k_cache is not None:
            for cache in (self.k_cache, self.v_cache):
                cache[:, target, :length] = cache[:, source, :length]

    def clear_row(self, row):
        """Zeros all along the row: what is not finite would come through a mask, as 0 times NaN is NaN."""
        for cache in (self.k_cache, self.v_cache):
            if cache is not None:
                cache[:, row] = 0

    def swap_rows(self, a, b, length):
        """Rows a and b change places, their first `length` positions at least."""
        if self.k_cache is not None:
            for cache in (self.k_cache, self.v_cache):
                cache[:, [a, b], :length] = cache[:, [b, a], :length]

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


def can_be_drawn_from(logits):
    """For each row of logits (B, V) whether its largest one is finite, (B,) bool; a NaN anywhere is the largest."""
    return logits.amax(dim=-1).isfinite()


def sample_next_token(logits, rng, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """
    Draw one id for each row.

    logits       (B, V)
    rng          one torch.Generator, or a list with one per row
    temperature  >= 0; 0 = argmax, and no draw is used
    top_k        keep the k largest logits of a row; None or <= 0 = no limit
    top_p        keep the likeliest ids that together reach this probability (nucleus sampling, Holtzman et al. 2019,
                 https://arxiv.org/abs/1904.09751), after temperature and top_k; None or >= 1 = no limit
    min_p        keep ids at least this fraction as likely as the likeliest (Nguyen et al. 2024,
                 https://arxiv.org/abs/2407.01082); None or <= 0 = no limit
    Returns ids (B, 1), int64. Raises ValueError for the temperature, UserError for a row of logits that no id can be
    drawn from.
    """
    if not temperature >= 0: # nan is not either
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not can_be_drawn_from(logits).all():
        raise UserError(NOT_FINITE)
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    is_nucleus, ids = top_p is not None and top_p < 1, None
    k = top_k if top_k is not None and top_k > 0 else None
    if is_nucleus or k is not None: # (B, k), descending
        logits, ids = torch.topk(logits, min(k or logits.size(-1), logits.size(-1)), dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The maximum goes first: a tiny temperature must not overflow.
    probs = torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    if is_nucleus: # what stands before an id has not reached top_p yet; the first one always stays
        probs = probs.where((probs.cumsum(dim=-1) - probs < top_p).index_fill(-1, ids.new_zeros(1), True), 0)
    if min_p is not None and min_p > 0:
        probs = probs.where(probs >= min(min_p, 1) * probs.amax(dim=-1, keepdim=True), 0)
    # Inverse CDF: the first id whose cumulative probability reaches u times the total. As u > 0, one of probability
    # zero is never taken; as u <= 1, there always is one. Small changes of the logits move few draws.
    cdf = probs.cumsum(dim=-1)
    drawn = torch.searchsorted(cdf, _uniforms(rng, logits.size(0), logits.device) * cdf[:, -1:])
    return drawn if ids is None else ids.gather(1, drawn)

# -----------------------------------------------------------------------------
# Requests and the batch they decode in

class Request:
    """One completion of one prompt: what is asked for, what has come of it, and the state of its tool call."""

    def __init__(self, prompt, max_tokens=None, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=42,
                 logprobs=None, on_token=None, on_end=None):
        """
        prompt      non-empty list of ids
        max_tokens  most tokens it may get, forced ones and the terminal one included; None: until the cache is full
        temperature, top_k, top_p, min_p    see `sample_next_token`
        seed        of its own generator: the same draws in any batch, on any device
        logprobs    None, or how many of the likeliest ids each token comes with, under the logits before temperature
        on_token    called with (token, mask, logprob) for every token, the terminal one included; True ends the
                    request. logprob: None, or (of the token in nats, [(id, its logprob), ...])
        on_end      called with the request when it has ended
        Both are called by the thread that steps the batch, between two steps of the model.
        """
        self.prompt, self.max_tokens = list(prompt), max_tokens
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.rng = torch.Generator().manual_seed(seed) # on the CPU: the same draws on every device
        self.logprobs, self.on_token, self.on_end = logprobs, on_token, on_end
        self.tokens = []          # the completion without its terminal token
        self.masks = []           # 1 = sampled, 0 = forced by the tool
        self.end = []             # its terminal token, when it has come
        self.finish_reason = None # stop, length, cancelled or broken (logits that are not finite), when it has ended
        self.started_at = None    # when it got its place, by time.monotonic
        self.cached_tokens = 0    # so many of the prompt's tokens were not read but found in the cache
        self.is_cancelled = False
        self.forced = deque()     # ids that come next, whatever is sampled
        self.expression = None    # ids of the tool call so far, None outside of one

    @property
    def done(self):
        return self.finish_reason is not None

    def cancel(self):
        """From any thread: the request ends before the next step, wherever it is."""
        self.is_cancelled = True

    def column(self, i):
        """(token, mask) number i, the terminal token included; None when there is none (yet)."""
        if i < len(self.tokens):
            return self.tokens[i], self.masks[i]
        if i == len(self.tokens) and self.end:
            return self.end[0], 1
        return None

    def finish(self, reason):
        self.finish_reason = reason
        if self.on_end is not None:
            self.on_end(self)


def _refuse_broken(request):
    """Called at the end of a request whose caller has no use for the others either."""
    if request.finish_reason == "broken":
        raise UserError(NOT_FINITE)


class Place:
    """One row of the cache: whose it is, and the ids whose keys it holds."""

    def __init__(self):
        self.request = None # the one that reads or decodes here; None when idle
        self.ids = []       # their keys are in the cache, those of an ended request too
        self.joined = 0     # step at which its request came
        self.left = 0       # step at which the last one went


def num_shared(a, b):
    """How many ids two lists have in common at their beginning."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])


class Decoder:
    """
    One token more of the first rows of a cache; on CUDA as a graph, after a few steps with the same number of rows.

    A small model's token is some fifteen short kernels a layer, and launching them one by one takes longer than they
    do; a graph is launched once. It keeps the addresses of what it reads: its own ids and lengths, and the cache, over
    all of which it attends, as the host's lengths are not its own. If capturing fails, decoding goes on without.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.wants_graphs = cache.device.type == "cuda"
        self.num_steps, self.graphs, self.pool = Counter(), {}, None

    def __call__(self, ids, lengths):
        """ids and lengths of rows 0, 1, ..., lists of ints. Returns logits (rows, V), good until the next call."""
        num_rows = len(ids)
        self.num_steps[num_rows] += 1
        if self.wants_graphs and self.num_steps[num_rows] > CAPTURE_AFTER and num_rows not in self.graphs:
            self._capture(num_rows, lengths)
        if not self.wants_graphs or num_rows not in self.graphs:
            view = self.cache.rows(0, num_rows, lengths)
            return self.model.forward(torch.tensor(ids, device=view.device)[:, None], kv_cache=view)[:, -1]
        replay, inputs, cache_seqlens, logits, _ = self.graphs[num_rows]
        inputs.copy_(torch.tensor(ids)[:, None])
        cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        replay()
        return logits

    def _capture(self, num_rows, lengths):
        view = self.cache.rows(0, num_rows, lengths) # what is written at these positions now is overwritten at once
        view.is_captured = True
        inputs = torch.zeros((num_rows, 1), dtype=torch.int64, device=view.device)
        try:
            replay, logits, self.pool = capture_graph(lambda: self.model.forward(inputs, kv_cache=view)[:, -1],
                                                      view.device, self.pool)
            tables = self.model.cos, self.model.sin # held: the model may make longer ones, this graph reads these
            self.graphs[num_rows] = replay, inputs, view.cache_seqlens, logits, tables
        except RuntimeError as error: # a kernel that waits for the host, or too little memory: the same, but slower
            self.wants_graphs = False
            logger.warning(f"Decoding without CUDA graphs: {type(error).__name__}: {error}")


def describe_decoding(device):
    """One sentence for the start: how decoding runs here, and why."""
    if device.type == "cuda":
        return f"Decoding: a CUDA graph for each number of rows, captured after {CAPTURE_AFTER} steps with it"
    return f"Decoding: kernel by kernel (CUDA graphs need a GPU, this is {device.type})"


def capture_graph(function, device, pool):
    """Capture a function of no arguments on CUDA. Returns (replay, the tensor it returns, the memory pool to share)."""
    with torch.cuda.device(device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream): # once outside of the graph: libraries allocate what they need for good
            function()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"): # other threads may use their GPUs
            result = function()
    return graph.replay, result, graph.pool()


class Batch:
    """
    Requests that decode together. Its rows stand in three neighbouring groups, so that a forward takes a slice:

        0 .. num_decoding          one more id a step
        num_decoding .. num_busy   prompts that are still being read
        num_busy .. max_rows       idle: their keys serve prompts that begin alike, until the place is needed

    Not thread-safe: one thread submits and steps, any thread may cancel a request.
    """

    def __init__(self, engine, max_rows, capacity=None, prefill_tokens=256):
        """
        max_rows        requests that decode at the same time; the others wait
        capacity        positions of each row; None: the context of the model
        prefill_tokens  so many prompt positions a step at most: what a long prompt makes the others wait
        """
        self.engine, self.model, self.prefill_tokens = engine, engine.model, prefill_tokens
        config = self.model.config
        self.capacity = config.sequence_len if capacity is None else capacity
        self.cache = KVCache(max_rows, config.n_kv_head, self.capacity, config.n_embd // config.n_head, config.n_layer,
                             self.model.get_device())
        self.decoder = Decoder(self.model, self.cache)
        self.places = [Place() for _ in range(max_rows)]
        self.num_decoding = self.num_busy = self.num_steps = 0
        self.waiting = deque()

    def submit(self, request):
        """
        Let a request wait for a place. One that asks for more tokens than the capacity leaves gets those: a prompt of P
        tokens leaves S-P+1, since the last needs no forward. Raises ValueError for a prompt that is empty or too long.
        """
        length = len(request.prompt)
        if not length:
            raise ValueError("a prompt must hold at least one token (bos), got an empty list")
        if length > self.capacity:
            raise ValueError(f"a prompt of {length} tokens exceeds the context of {self.capacity}: shorten it, or pass "
                             "max_tokens to go beyond the context")
        room = self.capacity - length + 1
        request.max_tokens = room if request.max_tokens is None else min(request.max_tokens, room)
        if request.max_tokens <= 0:
            request.finish("length")
        else:
            self.waiting.append(request)

    @torch.inference_mode()
    def step(self):
        """One round for all. Returns how many requests still run or wait."""
        self.num_steps += 1
        self._drop_cancelled()
        self._admit() # from here on a request has a place
        logits = [*self._decode(), *self._read()] # in the order of the rows: those that have read theirs join behind
        if logits: # of every row that decodes now, those that just joined included
            logits = torch.cat(logits)
            for i, token in self._sample(logits):
                self._accept(self.places[i].request, token, logits[i])
        for i in reversed(range(self.num_decoding)):
            if self.places[i].request.done:
                self._release(i)
        return self.num_busy + len(self.waiting)

    def _accept(self, request, token, logits):
        """A request gets its next token, tells whoever listens, and may have ended."""
        token, mask = self.engine.accept(request, token)
        logprob = None
        if request.logprobs is not None:
            logprobs = logits.float().log_softmax(dim=-1)
            top = logprobs.topk(request.logprobs)
            logprob = (logprobs[token].item(), list(zip(top.indices.tolist(), top.values.tolist())))
        is_stopped = request.on_token is not None and request.on_token(token, mask, logprob)
        if request.end or is_stopped:
            request.finish("stop")
        elif len(request.tokens) >= request.max_tokens:
            request.finish("length")

    # ---- places ----

    def _swap(self, a, b):
        """Two places change their rows, so that groups stay neighbours."""
        if a != b:
            self.cache.swap_rows(a, b, max(len(self.places[a].ids), len(self.places[b].ids)))
            self.places[a], self.places[b] = self.places[b], self.places[a]

    def _drop_cancelled(self):
        for request in [request for request in self.waiting if request.is_cancelled]:
            self.waiting.remove(request)
            request.finish("cancelled")
        for i in reversed(range(self.num_busy)):
            request = self.places[i].request
            if request.is_cancelled:
                self._release(i)
                request.finish("cancelled")

    def _release(self, i):
        """The request of place i goes; its keys stay, unless they are not finite."""
        place = self.places[i]
        if place.request.finish_reason == "broken":
            place.ids = []
            self.cache.clear_row(i)
        place.request, place.left = None, self.num_steps
        if i < self.num_decoding:
            self.num_decoding -= 1
            self._swap(i, self.num_decoding)
            i = self.num_decoding
        self.num_busy -= 1
        self._swap(i, self.num_busy)

    def num_cached(self, prompt):
        """How many of its tokens a prompt would find in the cache. From another thread than `step`'s: an estimate."""
        most = max(num_shared(prompt[:-1], place.ids) for place in self.places)
        return most if most >= MIN_SHARED else 0

    def _admit(self):
        """Requests that wait get free places, in turn, unless the beginning of their prompt is just being read."""
        if self.num_busy == len(self.places):
            return
        for request in list(self.waiting):
            prompt = request.prompt
            shared = [num_shared(prompt[:-1], place.ids) for place in self.places] # the last token gives the logits
            best = max(range(len(shared)), key=lambda i: (shared[i], i >= self.num_busy)) # an idle one needs no copy
            reading = [place.request.prompt for place in self.places[self.num_decoding:self.num_busy]]
            if any(prompt == other or num_shared(prompt, other) >= shared[best] + MIN_SHARED for other in reading):
                continue
            self._start(request, best, shared[best] if shared[best] >= MIN_SHARED else 0)
            self.waiting.remove(request)
            if self.num_busy == len(self.places):
                return

    def _start(self, request, source, length):
        """Give a request a place, with the first `length` keys of place `source`."""
        is_taken_over = length and source >= self.num_busy
        target = source if is_taken_over else min(range(self.num_busy, len(self.places)),
                                                  key=lambda i: self.places[i].left)
        place = self.places[target]
        if length and not is_taken_over:
            self.cache.copy_row(source, target, length)
        place.request, place.ids, place.joined = request, request.prompt[:length], self.num_steps
        request.started_at, request.cached_tokens = time.monotonic(), length
        self._swap(target, self.num_busy)
        self.num_busy += 1

    # ---- the model ----

    def _decode(self):
        """One position more of every decoding row. Returns a list of logits: one (num_decoding, V), or none."""
        places = self.places[:self.num_decoding]
        if not places:
            return []
        last = [place.request.tokens[-1] for place in places]
        logits = self.decoder(last, [len(place.ids) for place in places])
        for place, token in zip(places, last, strict=True):
            place.ids.append(token)
        return [logits]

    def _read(self):
        """
        Read some prompt tokens. Requests whose prompt is complete join those that decode, and so do waiting ones with
        the very same prompt. Returns a list of logits (1, V), one for each that joined.
        """
        chosen, width = self._choose_prompts()
        if not chosen:
            return []
        for i, place in enumerate(chosen):
            self._swap(self.places.index(place), self.num_decoding + i)
        pieces = [place.request.prompt[len(place.ids):len(place.ids) + width] for place in chosen]
        cache = self.cache.rows(self.num_decoding, self.num_decoding + len(chosen), [len(p.ids) for p in chosen])
        # Padding is seen by no real token (attention is causal), and its keys lie beyond the row's length afterwards.
        ids = torch.tensor([piece + piece[:1] * (width - len(piece)) for piece in pieces], device=cache.device)
        for place, piece in zip(chosen, pieces, strict=True):
            place.ids += piece
        complete = [i for i, place in enumerate(chosen) if len(place.ids) == len(place.request.prompt)]
        at = torch.tensor([i * width + len(pieces[i]) - 1 for i in complete], dtype=torch.int64, device=cache.device)
        joined = []
        for i, logits in zip(complete, self.engine.logits_at(ids, at, cache).split(1)):
            self._join(chosen[i])
            twins = [request for request in self.waiting if request.prompt == chosen[i].request.prompt]
            twins = twins[:len(self.places) - self.num_busy]
            for request in twins:
                self._start(request, self.places.index(chosen[i]), len(request.prompt))
                self._join(self.places[self.num_busy - 1])
                self.waiting.remove(request)
            joined += [logits] * (1 + len(twins))
        return joined

    def _choose_prompts(self):
        """The places whose prompts are read in this step, and how many tokens of each: the short first, but in time."""
        def left(place):
            return len(place.request.prompt) - len(place.ids)

        chosen, width = [], 0
        for place in sorted(self.places[self.num_decoding:self.num_busy], key=lambda p: left(p) + PATIENCE * p.joined):
            wider, more = max(width, left(place)), [*chosen, place]
            is_too_much = len(more) * wider > self.prefill_tokens
            if chosen and (is_too_much or max(len(p.ids) for p in more) + wider > self.capacity): # padding needs room
                break
            chosen, width = more, wider
        return chosen, min(width, self.prefill_tokens)

    def _join(self, place):
        """The prompt of a place is read: from now on it decodes."""
        self._swap(self.places.index(place), self.num_decoding)
        self.num_decoding += 1

    def _sample(self, logits):
        """
        Draw an id for every decoding row from its logits (num_decoding, V). Returns pairs of (row, id), without the
        rows that none can be drawn from: their requests are finished, and nobody else's.
        """
        groups, drawn = {}, []
        for i, can_be_drawn in enumerate(can_be_drawn_from(logits).tolist()):
            request = self.places[i].request
            if can_be_drawn: # equal settings draw together
                settings = (request.temperature, request.top_k, request.top_p, request.min_p)
                groups.setdefault(settings, []).append(i)
            else:
                request.finish("broken")
        for settings, rows in groups.items():
            of_group = logits if len(rows) == len(logits) else logits[rows]
            ids = sample_next_token(of_group, [self.places[i].request.rng for i in rows], *settings)
            drawn += zip(rows, ids.flatten().tolist(), strict=True)
        return drawn

# -----------------------------------------------------------------------------

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
        batch, (requests,) = self._submit([tokens], num_samples, max_tokens, [seed], num_samples,
                                          temperature=temperature, top_k=top_k)
        return self._columns(batch, requests)

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
        batch, samples = self._submit(prompts, num_samples, max_tokens, seeds, batch_size, temperature=temperature,
                                      top_k=top_k)
        while batch.step():
            pass
        return [[(row.tokens + row.end * keep_end, row.masks + [1] * len(row.end) * keep_end) for row in rows]
                for rows in samples]

    def _submit(self, prompts, num_samples, max_tokens, seeds, max_rows, **settings):
        """A batch with num_samples requests for each prompt, and those requests."""
        capacity = None if max_tokens is None else max((len(p) + max(0, max_tokens - 1) for p in prompts), default=1)
        batch = Batch(self, max(1, min(max_rows, num_samples * len(prompts))), capacity, PREFILL_TOKENS)
        samples = [[Request(prompt, max_tokens, seed=derive_seed(seed, row), on_end=_refuse_broken, **settings)
                    for row in range(num_samples)] for prompt, seed in zip(prompts, seeds, strict=True)]
        for rows in sorted(samples, key=lambda rows: -len(rows[0].prompt) if rows else 0): # of like length together
            for request in rows:
                batch.submit(request)
        return batch, samples

    def _columns(self, batch, requests):
        """Step the batch as far as each column of `generate` needs it."""
        for i in itertools.count():
            while any(request.column(i) is None and not request.done for request in requests):
                batch.step()
            columns = [request.column(i) for request in requests]
            if all(column is None for column in columns):
                return
            columns = [column or (self.assistant_end, 0) for column in columns]
            yield [token for token, _ in columns], [mask for _, mask in columns]

    def logits_at(self, ids, at, cache):
        """Run ids (B, T) with a cache. Returns the logits (N, V) at the flat positions `at` (N,)."""
        if hasattr(self.model, "logits_at"): # the head of a small model is most of its work
            return self.model.logits_at(ids, at, kv_cache=cache)
        return self.model.forward(ids, kv_cache=cache).flatten(0, 1)[at]

    def accept(self, request, token):
        """Give a request the token that was drawn for it, or one that its tool forces. Returns (token, mask)."""
        token, mask = (request.forced.popleft(), 0) if request.forced else (token, 1)
        if token in self.terminal:
            request.end = [token]
            return token, mask
        request.tokens.append(token)
        request.masks.append(mask)
        if token == self.python_start:
            request.expression = []
        elif token == self.python_end:
            self._call_tool(request)
        elif request.expression is not None:
            request.expression.append(token)
        return token, mask

    def _call_tool(self, request):
        """End of a tool call, if one is open: what the calculator says comes next, or that it had no result."""
        expression, request.expression = request.expression, None
        if expression:
            result = use_calculator(self.tokenizer.decode(expression))
            said = TOOL_ERROR if result is None else str(result)
            request.forced.extend([self.output_start, *self.tokenizer.encode(said), self.output_end])

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
