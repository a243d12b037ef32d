"""
The Transformer: configuration, forward pass, initialisation, parameter groups and costs.

    ids (B, T) -> embedding -> L x [mix with x0, attention, MLP] -> norm -> head -> softcap -> logits (B, T, V) or loss

A GPT-2 like decoder with rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864), QK norm (Henry et al.
2020, https://arxiv.org/abs/2010.04245), parameter-free RMSNorm (Zhang & Sennrich 2019,
https://arxiv.org/abs/1910.07467), squared ReLU (So et al. 2021, https://arxiv.org/abs/2109.08668), grouped-query
attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245), sliding windows, logit softcap (Gemma 2,
https://arxiv.org/abs/2408.00118), value embeddings (Zhou et al. 2024, https://arxiv.org/abs/2410.17897) and per-layer
scalars as in modded-nanogpt.

Letters, here and everywhere: B rows, T positions, C = n_embd, H query heads, Hkv key/value heads, D = C / H head
dimension, V vocabulary, Vp padded vocabulary, L layers.
"""
import functools
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.common import print0
from nanochat.flash_attention import document_mask, flash_attn, products_attention, use_products, window_mask
from nanochat.optim import MuonAdamW

NORM_EPS = 1.1920929e-07 # fp32 machine epsilon, whatever the dtype of the activations
SOFTCAP = 15.0
GATE_CHANNELS = 32 # the value-embedding gate reads this many channels of the block's input
ROTARY_BASE = 10_000


@dataclass
class GPTConfig:
    """Shape of a model. Saved with every checkpoint, so a field's meaning never changes."""
    sequence_len: int = 2048    # training context in tokens
    vocab_size: int = 32768     # true vocabulary V, before padding
    n_layer: int = 12
    n_head: int = 6             # query heads
    n_kv_head: int = 6          # key/value heads, a divisor of n_head
    n_embd: int = 768
    window_pattern: str = "SSSL" # tiled over layers: L = full context, S = half of it; the last layer is always L

    def __post_init__(self):
        problems = [text for wrong, text in self._checks() if wrong]
        if problems:
            raise ValueError("; ".join(problems))

    def _checks(self):
        sizes = (self.sequence_len, self.vocab_size, self.n_layer, self.n_head, self.n_kv_head, self.n_embd)
        yield min(sizes) < 1, f"all sizes of a GPTConfig must be at least 1, got {sizes}"
        if min(sizes) < 1:
            return
        yield self.n_embd % self.n_head != 0, f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})"
        yield (self.n_head % self.n_kv_head != 0,
               f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
        yield self.n_embd // self.n_head % 2 != 0, f"the head dimension must be even, got {self.n_embd / self.n_head:g}"
        yield self.n_embd < GATE_CHANNELS, f"n_embd must be at least {GATE_CHANNELS}, got {self.n_embd}"
        yield (not self.window_pattern or set(self.window_pattern.upper()) - {"S", "L"},
               f"window_pattern must be made of the letters S and L, got {self.window_pattern!r}")


def config_of_depth(depth, vocab_size=32768, sequence_len=2048, aspect_ratio=64, head_dim=128, window_pattern="SSSL"):
    """The GPTConfig that follows from a depth: width rounded up to whole heads, no grouped-query attention."""
    num_heads = -(-depth * aspect_ratio // head_dim)
    return GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, n_layer=depth, n_head=num_heads,
                     n_kv_head=num_heads, n_embd=num_heads * head_dim, window_pattern=window_pattern)


def norm(x):
    """RMS-normalise the last dimension, without learnable parameters. Keeps shape and dtype."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS).to(x.dtype)


def has_ve(layer_idx, n_layer):
    """Does this layer have a value embedding? Every second one does, the last included."""
    return layer_idx % 2 == (n_layer - 1) % 2


def apply_rotary_emb(x, cos, sin):
    """
    Rotate each channel pair (i, i + D/2) of x by minus its position's angle.

    x         (B, T, H, D)               queries or keys
    cos, sin  (1 or B, T, 1, D/2)        rows for the T positions of x
    Returns   (B, T, H, D); lengths are unchanged and q.k depends only on the distance
    """
    a, b = x.chunk(2, dim=-1) # (B, T, H, D/2) each
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def window_sizes(config):
    """(left, right) of each layer. Left of an L layer is sequence_len, so it slides too on longer inputs."""
    T, pattern = config.sequence_len, config.window_pattern.upper()
    lefts = [T if pattern[i % len(pattern)] == "L" else T // 2 for i in range(config.n_layer)]
    lefts[-1] = T
    return [(left, 0) for left in lefts]


class Linear(nn.Linear):
    """A linear layer without bias whose master weight is cast to the dtype of its input."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)
        self.packed = None # see GPT.pack_weights

    def forward(self, x):
        if self.packed is not None and not torch.is_grad_enabled():
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return F.linear(x, self.weight.to(x.dtype))


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer_idx, value_embed):
        super().__init__()
        self.layer_idx = layer_idx
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        kv_dim = self.n_kv_head * self.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_dim)
        self.c_v = Linear(config.n_embd, kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = Linear(GATE_CHANNELS, self.n_kv_head) if value_embed else None

    def project(self, u, ve, cos_sin):
        """
        What attention works on.

        u         (B, T, C)            the normalised input of the block
        ve        (B, T, Hkv * D)      value embeddings of the tokens, or None
        cos_sin   two tables (1 or B, T, 1, D/2), already at the positions of u
        Returns   queries (B, T, H, D), keys and values (B, T, Hkv, D)
        """
        B, T, C = u.size()
        q = self.c_q(u).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(u).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(u).view(B, T, self.n_kv_head, self.head_dim)
        if ve is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(u[..., :GATE_CHANNELS])) # (B, T, Hkv), in (0, 2)
            v = v + gate.unsqueeze(-1) * ve.view(B, T, self.n_kv_head, self.head_dim).to(v.dtype)
        return norm(apply_rotary_emb(q, *cos_sin)).to(v.dtype), norm(apply_rotary_emb(k, *cos_sin)).to(v.dtype), v

    def attend(self, q, k, v, window, kv_cache, mask, softmax):
        """
        What the queries find in the keys and values, or in the cache, where those go first.

        window    (left, right) in positions
        mask      of flash_attention.document_mask or window_mask, with the window in it; or None
        softmax   flash_attention.SOFTMAX_KERNELS, compiled, or None: without them plain products would be slow
        Returns   (B, T, H, D)
        """
        if kv_cache is not None:
            k_cache, v_cache = kv_cache.get_layer_cache(self.layer_idx) # (B, T_max, Hkv, D)
            start, end = kv_cache.span(q.size(1))
            return flash_attn.flash_attn_with_kvcache(q, k_cache[:, :end], v_cache[:, :end], k=k, v=v,
                                                      cache_seqlens=start, causal=True, window_size=window)
        if softmax is not None and use_products(q, window[0]):
            return products_attention(q, k, v, window[0], mask, softmax)
        if mask is not None:
            return flash_attn.masked_attn_func(q, k, v, mask)
        return flash_attn.flash_attn_func(q, k, v, causal=True, window_size=window)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """
    Attention and MLP, each added to what comes in.

    What lies before and after the attention itself can be compiled, once for all layers of a kind. Attention is not:
    its back ends are fast as they are, and windows and blocks make its shapes many.
    """

    def __init__(self, config, layer_idx, value_embed):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer_idx, value_embed)
        self.mlp = MLP(config)

    def before(self, x, ve, cos_sin):
        """Queries, keys and values of x (B, T, C), see CausalSelfAttention.project."""
        return self.attn.project(norm(x), ve, cos_sin)

    def after(self, x, y):
        """What the block makes of its input x (B, T, C) and of what attention gave, y (B, T, H, D)."""
        x = x + self.attn.c_proj(y.flatten(2))
        return x + self.mlp(norm(x))

    def forward(self, x, ve, cos_sin, window, kv_cache=None, mask=None, compiled=None):
        """
        (B, T, C) -> (B, T, C); compiled: forms of `before`, `after` and SOFTMAX_KERNELS, or None; for the rest see
        CausalSelfAttention.
        """
        before, after, softmax = compiled or (Block.before, Block.after, None)
        q, k, v = before(self, x, ve, cos_sin)
        return after(self, x, self.attn.attend(q, k, v, window, kv_cache, mask, softmax))

# -----------------------------------------------------------------------------
# Head and loss in chunks: the full (B, T, V) logits never exist in training

def _sigmoid_of(logits):
    return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)) * (2 / SOFTCAP))


def softcap(logits):
    """
    SOFTCAP tanh(logits / SOFTCAP), in at least fp32 (before: bf16 would be too coarse).

    As tanh y = 2 sigmoid(2y) - 1, which takes a quarter of the time on a CPU.
    """
    if not torch.is_grad_enabled(): # the same numbers, and a third of the memory traffic
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.mul_(2 / SOFTCAP).sigmoid_().mul_(2 * SOFTCAP).sub_(SOFTCAP)
    return 2 * SOFTCAP * _sigmoid_of(logits) - SOFTCAP


def token_losses(x, weight, targets):
    """Cross entropy in nats of each position: x (N, C), weight (V, C), targets (N,) with -1 = ignored (loss 0)."""
    logits = softcap(F.linear(x, weight.to(x.dtype)))
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")


def chunk_rows(vocab_size, device_type):
    """Positions whose logits the loss holds at once: 512 on a CPU, where that is fastest, 512 MB of them on a GPU."""
    return max(1, (1 << 27) // vocab_size) if device_type == "cuda" else 512


def chunks_of(x, vocab_size):
    """Slices of chunk_rows rows of x (N, C)."""
    size = chunk_rows(vocab_size, x.device.type)
    return [slice(start, start + size) for start in range(0, x.size(0), size)]


def exp_sums(logits):
    """Sums of exp(softcap(logits)), (N, V) -> (N, 1); in range without a maximum, as the softcap bounds them."""
    return (2 * SOFTCAP * _sigmoid_of(logits) - SOFTCAP).exp().sum(-1, keepdim=True)


def softmax_gradients_(logits, scale):
    """Put scale * exp(z) * dz/dlogits in place of the logits (N, V), where z = softcap(logits); scale (N, 1)."""
    s = _sigmoid_of(logits)
    logits.copy_((2 * SOFTCAP * s - SOFTCAP).exp() * (s - s * s) * (4 * scale)) # tanh' y = 4 sigmoid'(2y)


def add_(total, part):
    """total += part, of a coarser dtype: compiled, it is not copied for that."""
    total.add_(part)


LOSS_KERNELS = exp_sums, softmax_gradients_, add_ # what lies between the products of SummedLoss, to be compiled


class SummedLoss(torch.autograd.Function):
    """
    Sum of the token losses, with gradients taken chunk by chunk already in the forward pass.

    Possible because the gradient of a sum does not depend on what comes after it but for one factor. Exact: that of the
    full logits, which a chunk passes over twice in place, for the sum of a row and for the gradient. `kernels` are
    LOSS_KERNELS, compiled or not. Rows of `weight` from `vocab_size` on take no part. Gradients of the head are large,
    so none is made twice: backward scales them in place.
    """

    @staticmethod
    def forward(ctx, x, weight, vocab_size, targets, kernels):
        exp_sums, softmax_gradients_, add_ = kernels
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        head = weight[:vocab_size].to(x.dtype) # cast once, not for every chunk
        room = x.new_empty(min(len(x), chunk_rows(vocab_size, x.device.type)), vocab_size)
        for rows in chunks_of(x, vocab_size):
            logits = torch.mm(x[rows], head.T, out=room[:len(x[rows])]) # (n, V)
            counts, at = targets[rows] != -1, (torch.arange(len(logits), device=x.device), targets[rows].clamp(min=0))
            sums, target = exp_sums(logits).squeeze(1), softcap(logits[at]) # (n,)
            total += ((sums.log() - target) * counts).sum()
            softmax_gradients_(logits, (counts / sums)[:, None])
            slope = (1 - (target / SOFTCAP) ** 2) * counts
            logits[at] = (slope * (target.exp() / sums - 1)).to(x.dtype)
            add_(grad_weight[:vocab_size], logits.T @ x[rows])
            torch.mm(logits, head, out=grad_x[rows])
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_x, grad_weight = ctx.saved_tensors
        grad_x.mul_(grad_total.to(grad_x.dtype)) # a second backward would raise RuntimeError
        return grad_x, grad_weight.mul_(grad_total.to(grad_weight.dtype)), None, None, None

# -----------------------------------------------------------------------------

class GPT(nn.Module):
    """
    The model. Build it under `torch.device("meta")`, then `to_empty(device=...)` and `init_weights()` or load a state.

    value_embeds, lambdas = False make the earlier generations of published models: no value embeddings, no scalars.
    `compute_dtype` is the dtype of activations; None means that of the embedding table. Weights keep their own.
    """

    def __init__(self, config, pad_vocab_size_to=64, value_embeds=True, lambdas=True):
        super().__init__()
        self.config = config
        self.compute_dtype = None
        self.rotary_dtype = torch.bfloat16 # how the tables are stored; blanket casts of the model leave it alone
        self.block_fn, self.losses_fn = Block.forward, token_losses # training.compile_model swaps in compiled ones
        self.loss_kernels = LOSS_KERNELS
        self.recompute = False # True: training keeps the inputs of blocks alone, and makes the rest again when needed
        padded = -(-config.vocab_size // pad_vocab_size_to) * pad_vocab_size_to
        if padded != config.vocab_size:
            print0(f"Vocabulary padded from {config.vocab_size:,} to {padded:,} rows, "
                   f"a multiple of {pad_vocab_size_to}")
        L, kv_dim = config.n_layer, config.n_embd // config.n_head * config.n_kv_head
        ve_layers = [i for i in range(L) if value_embeds and has_ve(i, L)]
        if lambdas:
            self.resid_lambdas = nn.Parameter(torch.ones(L))
            self.x0_lambdas = nn.Parameter(torch.zeros(L))
        else:
            self.resid_lambdas = self.x0_lambdas = None
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(padded, config.n_embd),
            "h": nn.ModuleList([Block(config, i, i in ve_layers) for i in range(L)]),
        })
        self.lm_head = Linear(config.n_embd, padded)
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(padded, kv_dim) for i in ve_layers})
        self.window_sizes = window_sizes(config)
        self.register_buffer("cos", torch.empty(1, 0, 1, 0), persistent=False) # made when first needed
        self.register_buffer("sin", torch.empty(1, 0, 1, 0), persistent=False)

    def get_device(self):
        return self.transformer.wte.weight.device

    # ---- initialisation ----

    @torch.no_grad()
    def init_weights(self):
        """Draw all weights from torch's global generator, in a fixed order, and make the rotary tables."""
        bound = 3**0.5 * self.config.n_embd**-0.5 # a uniform of this bound has standard deviation 1/sqrt(C)
        nn.init.normal_(self.transformer.wte.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(block.attn.c_proj.weight) # every block starts as the identity
            nn.init.zeros_(block.mlp.c_proj.weight)
            if block.attn.ve_gate is not None:
                nn.init.zeros_(block.attn.ve_gate.weight) # gates start at exactly 1
        for table in self.value_embeds.values():
            nn.init.uniform_(table.weight, -bound, bound)
        if self.resid_lambdas is not None:
            self.resid_lambdas.fill_(1.0)
            self.x0_lambdas.fill_(0.1)
        self.init_rotary()
        if self.get_device().type == "cuda": # the big tables are read sparsely: half the memory, no master needed
            for table in [self.transformer.wte, *self.value_embeds.values()]:
                table.to(torch.bfloat16)

    @torch.inference_mode(False) # tables that grow while sampling must still serve training afterwards
    def init_rotary(self, length=None):
        """Make the cos and sin tables for `length` positions (default 10 x sequence_len), each (1, S, 1, D/2)."""
        length = length or 10 * self.config.sequence_len
        head_dim = self.config.n_embd // self.config.n_head
        exact = torch.float64 if self.rotary_dtype == torch.float64 else torch.float32
        channel = torch.arange(0, head_dim, 2, dtype=exact, device=self.get_device())
        position = torch.arange(length, dtype=exact, device=channel.device)
        angle = torch.outer(position, ROTARY_BASE ** (-channel / head_dim))
        self.cos = angle.cos().to(self.rotary_dtype)[None, :, None, :]
        self.sin = angle.sin().to(self.rotary_dtype)[None, :, None, :]

    def _apply(self, fn, recurse=True):
        """Moves and casts of the module: the rotary tables follow the device but keep their own dtype."""
        super()._apply(fn, recurse)
        if self.cos.numel() and (self.cos.dtype != self.rotary_dtype or self.cos.is_meta):
            self.init_rotary(self.cos.size(1))
        return self

    # ---- forward ----

    def _rotary_rows(self, T, kv_cache, starts=None):
        """
        cos and sin at the positions of the T new tokens: (1, T, 1, D/2), or (B, T, 1, D/2) for rows that differ, as
        those of a cache or of documents that begin at `starts` (B, T) and count from there.
        """
        start, end = (0, T) if kv_cache is None else kv_cache.span(T)
        if end > self.cos.size(1):
            self.init_rotary(max(10 * self.config.sequence_len, 2 * end))
        if starts is None and not torch.is_tensor(start):
            return self.cos[:, start:end], self.sin[:, start:end]
        first = start.long()[:, None] if starts is None else -starts
        at = first + torch.arange(T, device=self.cos.device) # (B, T)
        return self.cos[0, at], self.sin[0, at]

    def _hidden(self, idx, kv_cache, block_fn, bos_id=None, layers=None):
        """(B, T) ids -> (B, T, C), normalised, before the head; `layers` to run, None: all."""
        dtype = self.compute_dtype or self.transformer.wte.weight.dtype
        if kv_cache is not None:
            kv_cache.ensure(dtype)
            needed = kv_cache.span(idx.size(1))[1]
            if needed > kv_cache.max_seq_len: # on the host, before anything is written
                raise RuntimeError(f"the KV cache holds {kv_cache.max_seq_len} positions per row, {needed} are needed")
        starts, masks = None, {} # masks are shared by the layers
        if bos_id is not None: # (B, T): where in its row the document of a position begins
            assert kv_cache is None, "packed rows are not cached"
            starts = torch.where(idx == bos_id, torch.arange(idx.size(1), device=idx.device), 0).cummax(1).values
            masks = {window: document_mask(starts, window, dtype) for window in set(self.window_sizes)}
        elif kv_cache is None and torch.is_grad_enabled():
            masks = {window: window_mask(idx.size(1), window, idx.device, dtype) for window in set(self.window_sizes)}
        cos_sin = self._rotary_rows(idx.size(1), kv_cache, starts)
        x = x0 = norm(self.transformer.wte(idx).to(dtype))
        for i in range(self.config.n_layer) if layers is None else layers:
            if self.resid_lambdas is not None:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
            window = self.window_sizes[i]
            x = block_fn(self.transformer.h[i], x, ve, cos_sin, window, kv_cache, masks.get(window))
        if kv_cache is not None:
            kv_cache.advance(idx.size(1))
        return norm(x)

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean", bos_id=None):
        """
        idx             (B, T) integer ids
        targets         (B, T) int64, -1 = ignored; or None
        kv_cache        the T new tokens are appended to it (see engine.KVCache)
        loss_reduction  "mean" over the targets that count, "sum", or "none"
        bos_id          rows are packed documents, each beginning with this id, and each is computed as if it stood
                        alone; None: attention and positions run through the row
        Returns fp32 logits (B, T, V) without targets; else the loss in nats: a scalar, or (B*T,) for "none".
        """
        if loss_reduction not in ("mean", "sum", "none"):
            raise ValueError(f"loss_reduction must be mean, sum or none, got {loss_reduction!r}")
        head = self.lm_head.weight[:self.config.vocab_size] # padding rows never take part
        if targets is None:
            return self._logits(self._hidden(idx, kv_cache, Block.forward, bos_id))
        x = self._hidden(idx, kv_cache, self._training_block(), bos_id)
        x, targets = x.reshape(-1, x.size(-1)), targets.reshape(-1)
        if loss_reduction == "none" or not torch.is_grad_enabled():
            losses_fn = self.losses_fn
            if torch.is_grad_enabled(): # the logits of a chunk are made again for the gradient, not kept
                losses_fn = functools.partial(checkpoint, losses_fn, use_reentrant=False)
            loss = torch.cat([losses_fn(x[rows], head, targets[rows]) for rows in chunks_of(x, head.size(0))])
            loss = loss if loss_reduction == "none" else loss.sum()
        else:
            loss = SummedLoss.apply(x, self.lm_head.weight, head.size(0), targets, self.loss_kernels)
        if loss_reduction in ("none", "sum"):
            return loss
        return loss / (targets != -1).sum()

    def _training_block(self):
        """What runs a block in training: compiled or not, keeping what is in it or making that again later."""
        if self.recompute and torch.is_grad_enabled(): # nothing is random, so it comes out the same
            return functools.partial(checkpoint, self.block_fn, use_reentrant=False, preserve_rng_state=False)
        return self.block_fn

    def warm_up(self, rows, seq_len=None, bos_id=None):
        """
        Forward and backward of one layer of each kind and of one chunk of the loss: all that training compiles, in the
        shapes of `rows` rows of seq_len tokens (None: the context), in a fraction of a step. Adds to the gradients.
        """
        ids = torch.zeros((rows, seq_len or self.config.sequence_len), dtype=torch.long, device=self.get_device())
        kinds = {(str(i) in self.value_embeds, window): i for i, window in enumerate(self.window_sizes)}
        x = self._hidden(ids, None, self._training_block(), bos_id, sorted(kinds.values())).flatten(0, 1)
        V, size = self.config.vocab_size, chunk_rows(self.config.vocab_size, x.device.type)
        x = x[:size + len(x) % size] # a whole chunk, and one like the last
        SummedLoss.apply(x, self.lm_head.weight, V, ids.flatten()[:len(x)], self.loss_kernels).backward()

    def logits_at(self, idx, at, kv_cache=None):
        """
        `forward` for a few positions: the head is most of a small model's work.

        at        (N,) int64, indices into the flattened B*T positions; may be empty, to fill a cache only
        Returns   fp32 logits (N, V)
        """
        return self._logits(self._hidden(idx, kv_cache, Block.forward).flatten(0, 1)[at])

    def _logits(self, x):
        """(..., C) -> fp32 (..., V); padding rows of the head never take part."""
        return softcap(self.lm_head(x)[..., :self.config.vocab_size])

    def pack_weights(self):
        """
        Keep a copy of every matrix in the layout that a CPU's bf16 instructions read fastest (oneDNN), for inference
        with weights that stay as they are: the products of one token take about half the time. Does nothing elsewhere.
        """
        weight = self.lm_head.weight
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 == self.compute_dtype \
                and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            for module in self.modules():
                if isinstance(module, Linear):
                    module.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), None)

    @torch.inference_mode()
    def generate(self, tokens, max_tokens, temperature=1.0, top_k=None, seed=42):
        """
        Yield max_tokens sampled ids after `tokens` (list of ids), recomputing everything at each step.

        The slow, plain reference for the engine. temperature 0 = greedy; top_k None or <= 0 = no limit.
        """
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        device = self.get_device()
        rng = torch.Generator(device=device).manual_seed(seed)
        ids = torch.tensor([tokens], dtype=torch.long, device=device)
        for _ in range(max_tokens):
            logits = self.forward(ids)[:, -1] # (1, V)
            if top_k is not None and top_k > 0:
                kth = torch.topk(logits, min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -float("inf"))
            if temperature > 0:
                next_id = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=rng)
            else:
                next_id = logits.argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, next_id], dim=1)
            yield next_id.item()

    # ---- costs and optimizer ----

    def num_scaling_params(self):
        """Number of parameters by group. Scaling laws here count transformer_matrices + lm_head."""
        def count(module):
            return sum(p.numel() for p in module.parameters())
        groups = {
            "wte": count(self.transformer.wte),
            "value_embeds": count(self.value_embeds),
            "lm_head": count(self.lm_head),
            "transformer_matrices": count(self.transformer.h),
            "scalars": 0 if self.resid_lambdas is None else 2 * self.config.n_layer,
        }
        groups["total"] = count(self)
        assert groups["total"] == sum(size for name, size in groups.items() if name != "total")
        return groups

    def estimate_flops(self):
        """FLOPs of training per token, see `flops_per_token`."""
        return flops_per_token(self.config, self.num_scaling_params())

    def setup_optimizer(self, unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02, weight_decay=0.0,
                        adam_betas=(0.8, 0.95), scalar_lr=0.5):
        """
        One MuonAdamW over all parameters: Muon for the block matrices, AdamW for tables, head and scalars.

        Learning rates were tuned at width 768; those of head and tables scale with (C / 768)^-0.5. weight_decay reaches
        the block matrices only. Every group keeps its first rate as "initial_lr" for the schedules.
        """
        scale = (self.config.n_embd / 768) ** -0.5
        print0(f"Learning rates of AdamW scaled by {scale:.6f} for width {self.config.n_embd}")

        def adamw(params, lr, betas=adam_betas):
            return {"kind": "adamw", "params": params, "lr": lr, "betas": betas, "eps": 1e-10, "weight_decay": 0.0}

        groups = [
            adamw([self.lm_head.weight], unembedding_lr * scale),
            adamw([self.transformer.wte.weight], embedding_lr * scale),
            adamw(list(self.value_embeds.parameters()), embedding_lr * scale),
        ]
        if self.resid_lambdas is not None:
            groups.append(adamw([self.resid_lambdas], scalar_lr * 0.01)) # the residual stream is delicate
            groups.append(adamw([self.x0_lambdas], scalar_lr, betas=(0.96, 0.95)))
        matrices = list(self.transformer.h.parameters())
        for shape in sorted({p.shape for p in matrices}):
            groups.append({"kind": "muon", "params": [p for p in matrices if p.shape == shape], "lr": matrix_lr,
                           "momentum": 0.95, "ns_steps": 5, "beta2": 0.95, "weight_decay": weight_decay})
        groups = [group for group in groups if group["params"]] # models without value embeddings have none to train
        for group in groups:
            group["initial_lr"] = group["lr"]
        assert sum(len(group["params"]) for group in groups) == len(list(self.parameters()))
        return MuonAdamW(groups)

# -----------------------------------------------------------------------------
# Costs of a model that need not exist

def count_params(config, pad_vocab_size_to=64):
    """What `GPT(config).num_scaling_params()` says, by arithmetic, as making a model takes a while."""
    C, L, kv_dim = config.n_embd, config.n_layer, config.n_embd // config.n_head * config.n_kv_head
    table, num_ve = -(-config.vocab_size // pad_vocab_size_to) * pad_vocab_size_to, -(-L // 2)
    groups = {
        "wte": table * C,
        "value_embeds": table * kv_dim * num_ve,
        "lm_head": table * C,
        "transformer_matrices": L * (10 * C * C + 2 * C * kv_dim) + num_ve * GATE_CHANNELS * config.n_kv_head,
        "scalars": 2 * L,
    }
    return {**groups, "total": sum(groups.values())}


def flops_per_token(config, sizes):
    """
    FLOPs of training per token, forward and backward: 6 per matrix weight plus attention's 12 H D per key seen.

    sizes  parameters by group, as `GPT.num_scaling_params` counts them
    As in PaLM (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B), with windows counted.
    """
    keys = sum(left for left, _ in window_sizes(config))
    return 6 * (sizes["lm_head"] + sizes["transformer_matrices"]) + 12 * config.n_embd * keys


def memory_forecast(config, rows, device_type="cuda", dtype_bytes=2, world_size=1, recompute=False):
    """
    Bytes that one rank needs to train, by component; "peak" is what is alive at once, without the process itself.

    rows         of a micro-batch on this rank
    dtype_bytes  of an activation: 2 for bf16, 4 for fp32
    world_size   ranks that share the optimizer's state
    recompute    are the blocks' activations made again in the backward pass, one block at a time?
    Counted from what a forward pass keeps (tests/test_gpt.py finds the same in a real one), from SummedLoss and from
    muon_update. What an allocator wastes comes on top.
    """
    sizes, C, L, tokens = count_params(config), config.n_embd, config.n_layer, rows * config.sequence_len
    tables, matrices = sizes["wte"] + sizes["value_embeds"], sizes["transformer_matrices"]
    weights = 4 * (sizes["total"] - tables) + (2 if device_type == "cuda" else 4) * tables # see GPT.init_weights
    # A layer keeps 16 C of a token: its input before and after the scalars; its norm, q before and after its own, what
    # attention gives; the same of the MLP: input, norm, and 4 C before and after the square. k twice, v, every second
    # value embedding come on top. Made again later, it keeps but its inputs.
    kv_dim = C // config.n_head * config.n_kv_head
    layer, inputs = (tokens * dtype_bytes * size for size in (16 * C + 3.5 * kv_dim, 2 * C + 0.5 * kv_dim))
    kept = layer + (L - 1) * (inputs if recompute else layer) + tokens * C * (4 + 2 * dtype_bytes)
    short = device_type == "cpu" and config.sequence_len <= 1024
    kept_scores = tokens * config.n_head * 0.625 * config.sequence_len * dtype_bytes * short
    head = config.vocab_size * C * 8 # the gradient of a chunk, their sum in fp32, and in bf16 a copy of the weights
    logits = min(tokens, chunk_rows(config.vocab_size, device_type)) * config.vocab_size
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer state": (2 * (weights - 4 * matrices) + 4 * matrices) // world_size, # AdamW two moments, Muon one
        "activations": int(kept),
        "attention's probabilities": int(kept_scores) * (1 if recompute else L), # see flash_attention.use_products
        "bf16 copies of matrices": 2 * matrices // (L if recompute else 1) if dtype_bytes == 2 else 0,
        "loss, or backward of a block": max(head + logits * dtype_bytes, tokens * dtype_bytes * 10 * C),
        "optimizer step": 28 * 4 * C * C * L // world_size + 4 * matrices * (world_size > 1), # stacks of Muon's groups
    }
    resting, step = sum(parts[name] for name in ("weights", "gradients", "optimizer state")), parts["optimizer step"]
    return parts | {"peak": resting + max(sum(parts.values()) - resting - step, step)}
