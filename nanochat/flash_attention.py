"""
Causal attention behind one contract: all back ends, with or without KV cache, windowed or not, give the same numbers.

    flash_attn.flash_attn_func(q, k, v, causal, window_size)
    flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens, causal, window_size)
    flash_attn.masked_attn_func(q, k, v, mask)     a mask of document_mask or window_mask: FA3 takes none

Layouts are those of FlashAttention-3 (Shah et al. 2024, https://arxiv.org/abs/2407.08608): (B, T, heads, D). A window
(left, right) lets a query at position p see keys p-left .. p+right; -1 = unlimited. FA3 runs on Hopper GPUs in bf16 or
fp16; on other CUDA devices FlexAttention (Dong et al. 2024, https://arxiv.org/abs/2412.05496) takes the windows of
training, and on all of them packed documents; everywhere else torch's scaled_dot_product_attention does, windows in
blocks. The choice is made per call, from device and dtype. Compiled training on a CPU has `products_attention` besides.
"""
import functools
import logging
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

_override_impl = None # tests force a back end: "fa3", "sdpa" or None = automatic

FA3_KERNEL = "varunneal/flash-attention-3" # hub repository of the prebuilt kernel; the wheel is for sm90 only
FA3_REVISION = "main" # the kernels package wants one to be named


_kernels = {} # "fa3", "flex": what was found, or None


def _load_fa3():
    """The FA3 module, or None with the reason logged once. Fetches from the hub, so only when first needed."""
    if "fa3" not in _kernels:
        _kernels["fa3"] = _find_fa3()
    return _kernels["fa3"]


def _find_fa3():
    if not torch.cuda.is_available():
        return None
    if torch.cuda.get_device_capability()[0] != 9: # built for Hopper: neither Ampere nor Blackwell can run it
        return None
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        from kernels import get_kernel
        return get_kernel(FA3_KERNEL, revision=FA3_REVISION, trust_remote_code=[FA3_KERNEL]).flash_attn_interface
    except Exception as error: # any failure of a download, a loader or a driver has the same cure: the fallback
        logger.warning(f"FlashAttention-3 is not used, SDPA is: {type(error).__name__}: {error}")
        return None


def _load_flex():
    """FlexAttention, compiled (it has no other fast form) and tried once, or None with the reason logged once."""
    if "flex" not in _kernels:
        _kernels["flex"] = _find_flex()
    return _kernels["flex"]


def _find_flex():
    if not torch.cuda.is_available():
        return None
    try:
        from torch.nn.attention.flex_attention import flex_attention
        flex, q = torch.compile(flex_attention, dynamic=False), torch.ones(1, 1, 256, 64, device="cuda").bfloat16()
        q.requires_grad_()
        flex(q, q, q, block_mask=_block_mask(256, 64, q.device)).sum().backward()
        return flex
    except Exception as error: # no Triton, no compiler, a device it does not know: the fallback computes the same
        logger.warning(f"FlexAttention is not used, SDPA is: {type(error).__name__}: {error}")
        return None


def _use_flex(device, dtype):
    """Does FlexAttention run masks on this device?"""
    if _override_impl == "flex":
        return True
    return _override_impl is None and device.type == "cuda" and dtype != torch.float64 and _load_flex() is not None


def __getattr__(name):
    if name == "HAS_FA3": # evaluated when asked for: importing this module must not touch the network
        return _load_fa3() is not None
    raise AttributeError(name)


def _use_fa3(q=None):
    """Does FA3 run this call? Without `q`: would it, for bf16 tensors on the GPU?"""
    if _override_impl in ("sdpa", "flex"):
        return False
    if _override_impl == "fa3":
        if _load_fa3() is None:
            raise RuntimeError("FlashAttention-3 was asked for, but it needs a Hopper GPU and its kernel: see the log")
        return True
    if q is not None and (q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16) or q.size(-1) % 8):
        return False
    return _load_fa3() is not None


def describe_backend(device, dtype):
    """One sentence for the start of a run: which back end attention uses here, and why."""
    device, why = torch.device(device), "FlashAttention-3 needs a Hopper GPU, its kernel, and bf16"
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _use_fa3():
        return "Attention: FlashAttention-3 (a Hopper GPU, its kernel, and bf16)"
    if _use_flex(device, dtype):
        return f"Attention: scaled_dot_product_attention, and for windows FlexAttention ({why})"
    products = ", plain products in compiled training on up to 1,024 keys" * (device.type == "cpu")
    return f"Attention: scaled_dot_product_attention, windows in blocks{products} ({why})"

# -----------------------------------------------------------------------------
# The two functions of the contract

def _flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
    """
    Attention of T queries over T keys.

    q         (B, T, H, D)
    k, v      (B, Tk, Hkv, D)   Hkv divides H: query head h reads key head h // (H / Hkv)
    Returns   (B, T, H, D)
    """
    if _use_fa3(q):
        return _load_fa3().flash_attn_func(q, k, v, causal=causal, window_size=window_size)
    return _sdpa(q, k, v, k.size(1) - q.size(1), causal, window_size)


def _flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, causal=False,
                             window_size=(-1, -1)):
    """
    Write k and v into the cache in place, then attend to everything up to the end of the new tokens.

    q                 (B, T, H, D)
    k_cache, v_cache  (B, T_max, Hkv, D)
    k, v              (B, T, Hkv, D), or None: then nothing is written
    cache_seqlens     positions already filled: an int for all rows, or int32 (B,), one per row
    The cache may have another dtype than q, k and v, which is then that of the sums too; not with FA3.
    Returns (B, T, H, D); cache_seqlens itself is not advanced. Raises RuntimeError when the cache is too short.
    """
    new_len = 0 if k is None else k.size(1)
    start = k_cache.size(1) - new_len if cache_seqlens is None else cache_seqlens
    on_host = not torch.is_tensor(start) or start.device.type == "cpu" # reading a device tensor would stall the GPU
    if on_host and new_len and int(torch.as_tensor(start).max()) + new_len > k_cache.size(1):
        raise RuntimeError(f"KV cache of {k_cache.size(1)} positions is too short for {new_len} more tokens")
    if _use_fa3(q):
        lengths = start
        if not torch.is_tensor(start):
            lengths = torch.full((q.size(0),), start, dtype=torch.int32, device=q.device)
        return _load_fa3().flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths,
                                                   causal=causal, window_size=window_size)
    if k is not None:
        _write_cache(k_cache, v_cache, k, v, start)
    if torch.is_tensor(start):
        return _sdpa(q, k_cache, v_cache, start + (new_len - q.size(1)), causal, window_size)
    end = start + new_len
    return _sdpa(q, k_cache[:, :end], v_cache[:, :end], end - q.size(1), causal, window_size)


def _masked_attn_func(q, k, v, mask):
    """
    As `_flash_attn_func` on T = Tk positions, under a causal mask of `document_mask` or `window_mask`.

    That is a tensor (B, 1, T, T) which is added to the scores, or a BlockMask of FlexAttention.
    """
    if not torch.is_tensor(mask):
        return _kernels["flex"](q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask,
                                enable_gqa=q.size(2) != k.size(2)).transpose(1, 2)
    num_copies = q.size(2) // k.size(2) # copied: on CUDA no kernel but the slow one takes both a mask and fewer k heads
    k, v = (part.transpose(1, 2).repeat_interleave(num_copies, dim=1) for part in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)


def document_mask(starts, window_size, dtype):
    """
    The mask under which the documents of packed rows do not see each other.

    starts    (B, T) integers: the index in its row at which the document of a position begins
    Returns   (B, 1, T, T) of `dtype`, that of the queries: 0 where a query may look, causal and windowed, else -inf;
              a BlockMask where FlexAttention runs, which knows blocks of 128 x 128 that need no look
    """
    T, device = starts.size(1), starts.device
    if _use_flex(device, dtype):
        return _block_mask(T, window_size[0], device, starts)
    visible = (starts[:, :, None] == starts[:, None, :]) & _window_mask(T, T, 0, window_size[0], 0, device)
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)[:, None]


def window_mask(T, window_size, device, dtype):
    """The mask with which FlexAttention trains a causal window; None: `flash_attn_func` is at least as good there."""
    if not 0 <= window_size[0] < T - 1 or not _use_flex(device, dtype) or (dtype != torch.float32 and _use_fa3()):
        return None
    return _cached_block_mask(T, window_size[0], device)


def _block_mask(T, left, device, starts=None):
    from torch.nn.attention.flex_attention import create_block_mask
    left = T if left < 0 else left

    def in_window(b, h, query, key):
        return (key <= query) & (query - key <= left)

    def in_document(b, h, query, key):
        return in_window(b, h, query, key) & (starts[b, query] == starts[b, key])
    rows, visible = (None, in_window) if starts is None else (starts.size(0), in_document)
    return create_block_mask(visible, rows, None, T, T, device=device)


_cached_block_mask = functools.lru_cache(maxsize=8)(_block_mask) # the same at each step


flash_attn = SimpleNamespace(flash_attn_func=_flash_attn_func, flash_attn_with_kvcache=_flash_attn_with_kvcache,
                             masked_attn_func=_masked_attn_func)

# -----------------------------------------------------------------------------
# The fallback on torch's own attention

def _write_cache(k_cache, v_cache, k, v, start):
    if not torch.is_tensor(start):
        k_cache[:, start:start + k.size(1)] = k # casts
        v_cache[:, start:start + v.size(1)] = v
        return
    rows = torch.arange(k.size(0), device=k.device)[:, None] # (B, 1)
    places = start.long()[:, None] + torch.arange(k.size(1), device=k.device) # (B, T)
    k_cache[rows, places] = k.to(k_cache.dtype)
    v_cache[rows, places] = v.to(v_cache.dtype)


def _sdpa(q, k, v, offset, causal, window_size):
    """
    Attention where query i of a row stands at absolute position offset + i and key j at position j.

    q (B, Tq, H, D); k, v (B, Tk, Hkv, D); offset an int, or a tensor (B,) when rows stand at different positions.
    """
    left, right = window_size
    right = 0 if causal else right # causal: the window's right side is the query itself
    q_len, k_len, rows_differ = q.size(1), k.size(1), torch.is_tensor(offset)
    is_square = not rows_differ and offset == 0 and q_len == k_len and right == 0
    if is_square and left >= 0 and q_len > max(left, _block_size(q_len, left)):
        return _sdpa_in_blocks(q, k, v, left)
    if q_len == 1 and not rows_differ: # one query: its window is a slice, no mask needed
        first = max(0, offset - left) if left >= 0 else 0
        last = min(k_len, offset + right + 1) if right >= 0 else k_len
        k, v, mask, is_causal = k[:, first:last], v[:, first:last], None, False
    elif is_square and not 0 <= left < q_len - 1:
        mask, is_causal = None, True
    elif rows_differ: # beyond a row's last query lies what other rows, or earlier ones, left in the cache
        ends = offset[:, None, None] + q_len
        mask = _window_mask(q_len, k_len, offset[:, None, None], left, right, q.device)
        mask, is_causal = (mask & (torch.arange(k_len, device=q.device) < ends))[:, None], False
    elif left < 0 and right < 0:
        mask, is_causal = None, False
    else:
        mask, is_causal = _window_mask(q_len, k_len, offset, left, right, q.device), False
    y = F.scaled_dot_product_attention(q.to(k.dtype).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                       attn_mask=mask, is_causal=is_causal, enable_gqa=q.size(2) != k.size(2))
    return y.to(q.dtype).transpose(1, 2)


def _block_size(q_len, left):
    """Queries in a block: few see few keys in vain, at most left + this; many make few and large products."""
    return max(64, left // 4, q_len // 16)


def _sdpa_in_blocks(q, k, v, left):
    """
    Causal attention of T queries over T keys in a window: time and memory are those of T x left scores, not of T x T.

    The first `left` queries see all that is before them; then blocks of queries go over slices of the keys (views).
    """
    T, size = q.size(1), _block_size(q.size(1), left)
    starts = [0, *range(max(left, size), T, size)]
    return torch.cat([_sdpa(q[:, start:end], k[:, max(0, start - left):end], v[:, max(0, start - left):end],
                            min(start, left), True, (left, 0)) for start, end in zip(starts, [*starts[1:], T])], dim=1)


def _window_mask(q_len, k_len, offset, left, right, device):
    """True where a query may look: (Tq, Tk), or (B, Tq, Tk) for an offset of shape (B, 1, 1)."""
    query = offset + torch.arange(q_len, device=device)[:, None]
    key = torch.arange(k_len, device=device)
    mask = torch.ones((q_len, k_len), dtype=torch.bool, device=device)
    if left >= 0:
        mask = mask & (key >= query - left)
    if right >= 0:
        mask = mask & (key <= query + right)
    return mask

# -----------------------------------------------------------------------------
# Training on short rows on a CPU

def use_products(q, left):
    """
    With compiled SOFTMAX_KERNELS, plain products take half the time of torch's SDPA on a CPU, most of it saved in the
    backward pass (dev/LOG.md). They keep the probabilities, so up to 1,024 keys a query.
    """
    is_short = min(q.size(1), left + _block_size(q.size(1), left) if left >= 0 else q.size(1)) <= 1024
    return q.device.type == "cpu" and torch.is_grad_enabled() and is_short


def products_attention(q, k, v, left, mask, kernels):
    """
    Causal attention of T queries over T keys in a window; q (B, T, H, D), k and v (B, T, Hkv, D) -> (B, T, H, D).

    mask     (B, 1, T, T), added to the scores, causal and with the window in it; or None
    kernels  SOFTMAX_KERNELS, compiled or not
    """
    copies, heads = q.size(2) // k.size(2), (q.size(0), q.size(2))
    k, v = (part.repeat_interleave(copies, dim=2) if copies > 1 else part for part in (k, v))
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v)) # (B H, T, D): slices of it are no copies
    return ProductsAttention.apply(q, k, v, left, mask, kernels).unflatten(0, heads).transpose(1, 2)


def masked_softmax(scores, scale, left, mask):
    """
    Probabilities of scores (N, Tq, Tk), in their dtype, by sums in at least fp32; scaled first.

    mask  (B, 1, Tq, Tk), added; None: the last query stands at the last key, and each sees `left` keys before its own
    """
    scores, dtype = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale, scores.dtype
    if mask is None:
        q_len, k_len = scores.shape[1:] # no offset as an argument: a compiler would make another kernel for its value 0
        visible = _window_mask(q_len, k_len, k_len - q_len, left, 0, scores.device)
        scores = scores.masked_fill(~visible, -torch.inf)
    else:
        scores = (scores.unflatten(0, (mask.size(0), -1)) + mask).flatten(0, 1)
    return scores.softmax(-1).to(dtype)


def softmax_gradient(probs, grad, scale):
    """Gradient of the scores from that of the probabilities, both (N, Tq, Tk)."""
    wide = torch.promote_types(probs.dtype, torch.float32)
    p, g = probs.to(wide), grad.to(wide)
    return (p * (g - (p * g).sum(-1, keepdim=True)) * scale).to(probs.dtype)


SOFTMAX_KERNELS = masked_softmax, softmax_gradient # what lies between the products of ProductsAttention


class ProductsAttention(torch.autograd.Function):
    """
    softmax(q k^T) v in blocks of queries: what lies above the diagonal, or out of the window, is mostly left out.

    q, k, v (N, T, D) -> (N, T, D). Made by hand because the few kernels between the products then serve blocks of all
    sizes, where a compiler makes those of each block anew; kept are the probabilities, once.
    """

    @staticmethod
    def forward(ctx, q, k, v, left, mask, kernels):
        softmax, ctx.softmax_gradient = kernels
        T, ctx.scale, y, kept = q.size(1), q.size(-1)**-0.5, torch.empty_like(v), []
        left = T if left < 0 else min(left, T)
        size = max(64, left // 4)
        # From the last on: a compiler that saw the square first one first would make another kernel for the others.
        ctx.blocks = [(slice(start, min(start + size, T)), slice(max(0, start - left), min(start + size, T)))
                      for start in reversed(range(0, T, size))]
        for rows, keys in ctx.blocks:
            part = None if mask is None else mask[:, :, rows, keys]
            kept.append(softmax(q[:, rows] @ k[:, keys].mT, ctx.scale, left, part))
            y[:, rows] = kept[-1] @ v[:, keys]
        ctx.save_for_backward(q, k, v, *kept)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        q, k, v, *kept = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for probs, (rows, keys) in zip(kept, ctx.blocks):
            of_scores = ctx.softmax_gradient(probs, grad_y[:, rows] @ v[:, keys].mT, ctx.scale)
            grad_q[:, rows] = of_scores @ k[:, keys]
            grad_k[:, keys].baddbmm_(of_scores.mT, q[:, rows])
            grad_v[:, keys].baddbmm_(probs.mT, grad_y[:, rows])
        return grad_q, grad_k, grad_v, None, None, None
