"""Every back end against attention written out with loops."""
import math
from types import SimpleNamespace

import pytest
import torch

import nanochat.flash_attention as fa
from nanochat.flash_attention import SOFTMAX_KERNELS, flash_attn, products_attention, use_products


@pytest.fixture
def override():
    """Set the forced back end; restored whatever happens."""
    yield lambda name: setattr(fa, "_override_impl", name)
    fa._override_impl = None


def reference(q, k, v, offsets, causal, left, right):
    """Loops over rows, heads and queries; offsets: absolute position of the first query of each row."""
    B, Tq, H, D = q.shape
    y = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for i in range(Tq):
                p, g = offsets[b] + i, h // (H // k.size(2))
                keys = [j for j in range(k.size(1)) if (not causal or j <= p) and (left < 0 or j >= p - left)
                        and (causal or right < 0 or j <= p + right)]
                weights = torch.softmax(torch.stack([q[b, i, h] @ k[b, j, g] for j in keys]) / math.sqrt(D), dim=0)
                y[b, i, h] = sum(w * v[b, j, g] for w, j in zip(weights, keys))
    return y


def qkv(B=2, Tq=7, Tk=7, H=4, K=2, D=8):
    torch.manual_seed(0)
    return (torch.randn(B, Tq, H, D, dtype=torch.float64), torch.randn(B, Tk, K, D, dtype=torch.float64),
            torch.randn(B, Tk, K, D, dtype=torch.float64))


@pytest.mark.parametrize("causal, window", [(True, (-1, -1)), (True, (-1, 0)), (True, (0, 0)), (True, (3, 0)),
                                            (True, (6, 0)), (True, (50, 0)), (False, (-1, -1)), (False, (2, 1)),
                                            (False, (-1, 2))])
@pytest.mark.parametrize("Tq, Tk", [(7, 7), (3, 7), (1, 7)])
def test_without_cache(causal, window, Tq, Tk):
    q, k, v = qkv(Tq=Tq, Tk=Tk)
    y = flash_attn.flash_attn_func(q, k, v, causal=causal, window_size=window)
    torch.testing.assert_close(y, reference(q, k, v, [Tk - Tq] * 2, causal, *window))


@pytest.mark.parametrize("left", [-1, 0, 2, 50])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_packed_documents_equal_each_alone(left, num_kv_heads):
    q, k, v = qkv(K=num_kv_heads)
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3], [0, 1, 1, 1, 1, 5, 6]])
    y = flash_attn.masked_attn_func(q, k, v, fa.document_mask(starts, (left, 0), q.dtype))
    for b, row in enumerate(starts):
        for start in row.unique():
            part = slice(int(start), int(start) + int((row == start).sum()))
            alone = reference(*(x[b:b + 1, part] for x in (q, k, v)), [0], True, left, 0)
            torch.testing.assert_close(y[b:b + 1, part], alone)


@pytest.mark.parametrize("left", [-1, 0, 2, 4, 100])
@pytest.mark.parametrize("T_new", [1, 3])
@pytest.mark.parametrize("start", [5, 0, "rows"])
def test_with_cache_equals_loops_at_every_position(left, T_new, start):
    q, k, v = qkv(Tq=T_new, Tk=T_new)
    _, k_cache, v_cache = qkv(Tk=12)
    starts = [5, 2] if start == "rows" else [start, start]
    expected = []
    for b, s in enumerate(starts):
        keys, values = (torch.cat([c[b:b + 1, :s], new[b:b + 1]], dim=1) for c, new in ((k_cache, k), (v_cache, v)))
        expected.append(reference(q[b:b + 1], keys, values, [s], True, left, 0))
    lengths = torch.tensor(starts, dtype=torch.int32) if start == "rows" else start
    y = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths, causal=True,
                                           window_size=(left, 0))
    torch.testing.assert_close(y, torch.cat(expected))
    for b, s in enumerate(starts): # written in place, where they belong
        assert torch.equal(k_cache[b, s:s + T_new], k[b]) and torch.equal(v_cache[b, s:s + T_new], v[b])


def test_a_tensor_of_equal_positions_equals_the_int():
    q, k, v = qkv(Tq=2, Tk=2)
    _, k_cache, v_cache = qkv(Tk=9)
    runs = [flash_attn.flash_attn_with_kvcache(q, k_cache.clone(), v_cache.clone(), k=k, v=v, cache_seqlens=lengths,
                                               causal=True, window_size=(3, 0))
            for lengths in (4, torch.tensor([4, 4]))]
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("window", [(-1, -1), (3, -1), (-1, 2)])
def test_rows_of_their_own_length_without_causality(window):
    q, k, v = qkv(Tq=2, Tk=2)
    _, k_cache, v_cache = qkv(Tk=9)
    runs = [flash_attn.flash_attn_with_kvcache(q, k_cache.clone(), v_cache.clone(), k=k, v=v, cache_seqlens=lengths,
                                               window_size=window) for lengths in (4, torch.tensor([4, 4]))]
    torch.testing.assert_close(*runs)


def test_gradients_equal_those_of_the_loops():
    q, k, v = (x.requires_grad_() for x in qkv())
    weights = torch.randn(2, 7, 4, 8, dtype=torch.float64)
    out = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(3, 0))
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    expected = torch.autograd.grad((reference(q, k, v, [0, 0], True, 3, 0) * weights).sum(), (q, k, v))
    for grad, wanted in zip(grads, expected):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("T", [65, 128, 200, 257])
@pytest.mark.parametrize("left", [0, 1, 17, 63, 64, 100, 127, 128, 198, 199, 255])
@pytest.mark.parametrize("num_kv_heads", [4, 1])
@pytest.mark.parametrize("products", [False, True], ids=["sdpa", "products"])
def test_blocks_equal_one_mask_over_all(T, left, num_kv_heads, products):
    """Values and gradients, against torch's attention under the T x T mask of the window."""
    q, k, v = (x.requires_grad_() for x in qkv(Tq=T, Tk=T, K=num_kv_heads))
    y = products_attention(q, k, v, left, None, SOFTMAX_KERNELS) if products else \
        flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    masked = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=(distance >= 0) & (distance <= left), enable_gqa=True)
    torch.testing.assert_close(y, masked.transpose(1, 2), atol=1e-12, rtol=0)
    weights = torch.randn_like(y)
    for grad, wanted in zip(*(torch.autograd.grad((out * weights).sum(), (q, k, v))
                              for out in (y, masked.transpose(1, 2)))):
        torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("left", [-1, 30, 200])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_products_of_packed_documents_equal_sdpa(left, num_kv_heads):
    q, k, v = (x.requires_grad_() for x in qkv(Tq=150, Tk=150, K=num_kv_heads))
    starts = (torch.arange(150) // 40 * 40).expand(2, 150)
    mask, weights = fa.document_mask(starts, (left, 0), torch.float64), torch.randn(2, 150, 4, 8).double()
    found = [(y, *torch.autograd.grad((y * weights).sum(), (q, k, v)))
             for y in (flash_attn.masked_attn_func(q, k, v, mask),
                       products_attention(q, k, v, left, mask, SOFTMAX_KERNELS))]
    for by_sdpa, by_products in zip(*found):
        torch.testing.assert_close(by_products, by_sdpa, atol=1e-12, rtol=0)


def test_products_in_bf16_are_as_exact_as_sdpa():
    """The error of values and gradients against float64, with scores of a size that training sees."""
    exact = [x.requires_grad_() for x in qkv(Tq=512, Tk=512, H=2, K=2, D=64)]
    coarse = [x.detach().bfloat16().requires_grad_() for x in exact]
    for x, rounded in zip(exact, coarse):
        x.data.copy_(rounded)
    weights, errors = torch.randn(2, 512, 2, 64), []
    def run(attend, inputs):
        y = attend(*inputs)
        return y, *torch.autograd.grad((y * weights.to(y.dtype)).sum(), inputs)
    def products(q, k, v):
        return products_attention(q, k, v, 256, None, SOFTMAX_KERNELS)
    def sdpa(q, k, v):
        return flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(256, 0))
    wanted = run(sdpa, exact)
    for attend in (sdpa, products):
        errors.append([((x - w).norm() / w.norm()).item() for x, w in zip(run(attend, coarse), wanted)])
    assert all(ours < 1.5 * theirs + 1e-3 for theirs, ours in zip(*errors)), errors


def test_products_are_for_short_rows_in_training_on_a_cpu():
    q = torch.randn(1, 128, 2, 32)
    assert use_products(q, -1) and use_products(q, 64)
    assert not use_products(torch.randn(1, 1100, 1, 8), -1) and use_products(torch.randn(1, 1100, 1, 8), 512)
    assert not use_products(q.to("meta"), -1)
    with torch.no_grad():
        assert not use_products(q, -1)


@pytest.mark.slow # compiles
@pytest.mark.filterwarnings("ignore") # torch's compiler warns about torch's own ways
def test_compiled_kernels_serve_blocks_of_all_sizes():
    kernels = tuple(torch.compile(kernel, dynamic=True) for kernel in SOFTMAX_KERNELS)
    torch._dynamo.utils.counters.clear()
    for T, left in ((300, -1), (300, 100), (300, 7), (128, -1)):
        q, k, v = (x.requires_grad_() for x in qkv(Tq=T, Tk=T, H=2))
        weights = torch.randn_like(q)
        outputs = [products_attention(q, k, v, left, None, kind) for kind in (SOFTMAX_KERNELS, kernels)]
        plain, compiled = ((y, *torch.autograd.grad((y * weights).sum(), (q, k, v))) for y in outputs)
        for one, other in zip(compiled, plain):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one forward, one backward"


@pytest.mark.parametrize("T, left", [(1024, 64), (2048, 256), (2048, 1024)])
def test_the_scores_of_a_windowed_layer_shrink_with_the_window(monkeypatch, T, left):
    """Pairs of a query and a key that torch is given, half of the pairs where it leaves out the future by itself."""
    real, pairs = torch.nn.functional.scaled_dot_product_attention, []
    def counting(q, k, v, is_causal=False, **kwargs):
        pairs.append(q.size(2) * k.size(2) / (2 if is_causal else 1))
        return real(q, k, v, is_causal=is_causal, **kwargs)
    monkeypatch.setattr(fa.F, "scaled_dot_product_attention", counting)
    q, k, v = (torch.zeros(1, T, 1, 8) for _ in range(3))
    flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
    least = T * left - left * left / 2
    assert least <= sum(pairs) < min(2.1 * least, T * T / 2)


@pytest.mark.parametrize("lengths", [8, torch.tensor([2, 8])])
def test_a_full_cache_is_an_error(lengths):
    q, k, v = qkv(Tq=2, Tk=2)
    _, k_cache, v_cache = qkv(Tk=9)
    with pytest.raises(RuntimeError, match="9 positions is too short for 2 more"):
        flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths, causal=True)


# ---- the choice of the back end, with a fake kernel where there is no GPU ----

def test_override(override):
    override("sdpa")
    assert fa._use_fa3() is False
    override(None)
    assert fa._use_fa3() is fa.HAS_FA3
    override("fa3")
    if fa.HAS_FA3:
        assert fa._use_fa3() is True
    else:
        with pytest.raises(RuntimeError, match="Hopper"):
            fa._use_fa3()


class FakeKernel:
    """Records how it is called; computes through the fallback."""
    def __init__(self):
        self.calls = []

    def flash_attn_func(self, q, k, v, causal, window_size):
        self.calls.append(("func", window_size))
        return fa._sdpa(q, k, v, 0, causal, window_size)

    def flash_attn_with_kvcache(self, q, k_cache, v_cache, k, v, cache_seqlens, causal, window_size):
        assert cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == (q.size(0),)
        self.calls.append(("kvcache", window_size))
        return q


def test_the_kernel_is_called_as_fa3_wants_it(monkeypatch, override):
    kernel = FakeKernel()
    monkeypatch.setattr(fa, "_load_fa3", lambda: kernel)
    override("fa3")
    q, k, v = qkv()
    flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(3, 0))
    flash_attn.flash_attn_with_kvcache(q[:, :1], k, v, k=k[:, :1], v=v[:, :1], cache_seqlens=4, causal=True,
                                       window_size=(2, 0))
    assert kernel.calls == [("func", (3, 0)), ("kvcache", (2, 0))]


def test_a_loaded_kernel_is_not_used_for_cpu_or_fp32_tensors(monkeypatch):
    monkeypatch.setattr(fa, "_load_fa3", FakeKernel)
    assert not fa._use_fa3(qkv()[0])
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, size=lambda dim: 64)
    assert fa._use_fa3(on_gpu)
    assert not fa._use_fa3(SimpleNamespace(**{**vars(on_gpu), "dtype": torch.float32}))
    assert not fa._use_fa3(SimpleNamespace(**{**vars(on_gpu), "size": lambda dim: 20}))


@pytest.mark.parametrize("capability, wanted", [((9, 0), True), ((8, 0), False), ((10, 0), False), ((12, 0), False)])
def test_fa3_loads_on_hopper_only(monkeypatch, capability, wanted):
    import sys
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    kernel = SimpleNamespace(flash_attn_interface=FakeKernel())
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=lambda *args, **kwargs: kernel))
    assert (fa._find_fa3() is kernel.flash_attn_interface) is wanted


def test_a_kernel_that_cannot_be_loaded_says_why(monkeypatch, caplog):
    import sys
    def broken(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=broken))
    assert fa._find_fa3() is None
    assert "SDPA is: OSError: no network" in caplog.text


@pytest.fixture
def flex(monkeypatch, override):
    """FlexAttention itself, in the slow form that runs on a CPU; its calls are counted."""
    from torch.nn.attention.flex_attention import flex_attention
    calls = []
    monkeypatch.setitem(fa._kernels, "flex", lambda *args, **kwargs: calls.append(1) or flex_attention(*args, **kwargs))
    override("flex")
    return calls


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("left", [0, 2, 100, 150])
@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_flex_attention_sees_the_same_windows_and_documents(flex, left, num_kv_heads):
    q, k, v = (x.float() for x in qkv(Tq=200, Tk=200, K=num_kv_heads, D=16))
    starts = torch.tensor([[0] * 200, [0] * 130 + [130] * 70])
    masks = [fa.window_mask(200, (left, 0), q.device, q.dtype), fa.document_mask(starts, (left, 0), q.dtype)]
    found = [flash_attn.masked_attn_func(q, k, v, mask) for mask in masks]
    fa._override_impl = "sdpa"
    wanted = [flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(left, 0)),
              flash_attn.masked_attn_func(q, k, v, fa.document_mask(starts, (left, 0), q.dtype))]
    assert len(flex) == 2
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_model_hands_its_windows_to_flex_attention_in_training_alone(flex):
    from nanochat.gpt import GPT, GPTConfig
    model = GPT(GPTConfig(64, 50, 4, 2, 2, 32, "SSL"))
    model.init_weights()
    ids = torch.randint(50, (2, 64))
    for p in model.parameters():
        p.requires_grad_(False) # on a CPU it has no backward
    loss = model(ids, ids)
    assert len(flex) == 2, "the windowed layers, not those that see all"
    with torch.no_grad():
        assert torch.allclose(model(ids, ids), loss, atol=1e-5) and len(flex) == 2


def test_flex_attention_stays_out_where_it_has_no_use(override):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not fa._use_flex(cpu, torch.bfloat16) and fa.window_mask(64, (8, 0), cpu, torch.bfloat16) is None
    fa._kernels.update(flex=flash_attn, fa3=None)
    try:
        assert fa._use_flex(gpu, torch.bfloat16) and not fa._use_flex(gpu, torch.float64)
        assert "for windows FlexAttention" in fa.describe_backend("cuda", torch.bfloat16)
        fa._kernels["fa3"] = flash_attn
        assert "FlashAttention-3 (a Hopper" in fa.describe_backend("cuda", torch.bfloat16)
        assert fa.window_mask(64, (8, 0), gpu, torch.bfloat16) is None, "FA3 has windows of its own"
        override("sdpa")
        assert not fa._use_flex(gpu, torch.bfloat16)
    finally:
        fa._kernels.clear()
