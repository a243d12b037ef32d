"""What needs a CUDA device: `python -m pytest -m gpu`. Each path against the plain one, on small shapes."""
import pytest
import torch

import nanochat.flash_attention as fa
from nanochat.common import Compute
from nanochat.dataloader import _to_device
from nanochat.engine import Decoder, Engine, KVCache
from nanochat.flash_attention import flash_attn
from nanochat.gpt import GPT, GPTConfig, memory_forecast
from nanochat.training import accumulate, compile_model, fitting_rows

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")] # torch's compiler warns about torch's own ways
COMPUTE = Compute(False, 0, 0, 1, torch.device("cuda"))


@pytest.fixture
def override():
    yield lambda name: setattr(fa, "_override_impl", name)
    fa._override_impl = None


def make_model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(GPTConfig(512, 1000, 4, 2, 2, 128, "SSL"))
    model.to_empty(device="cuda")
    model.init_weights()
    model.compute_dtype = dtype
    return model


def qkv(num_kv_heads=4):
    torch.manual_seed(0)
    return [torch.randn(2, 300, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (4, num_kv_heads, num_kv_heads)]


def assert_same_with_gradients(one, other, inputs):
    torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
    weights = torch.randn_like(one)
    for grad, wanted in zip(*(torch.autograd.grad(y, inputs, weights) for y in (one, other))):
        torch.testing.assert_close(grad, wanted, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("window", [(-1, 0), (32, 0), (200, 0)])
def test_fa3_equals_sdpa(override, window):
    if not fa.HAS_FA3:
        pytest.skip("FlashAttention-3 needs a Hopper GPU and its kernel")
    inputs = qkv(2)
    override("fa3")
    fast = flash_attn.flash_attn_func(*inputs, causal=True, window_size=window)
    override("sdpa")
    assert_same_with_gradients(fast, flash_attn.flash_attn_func(*inputs, causal=True, window_size=window), inputs)


@pytest.mark.parametrize("left", [32, 200])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_flex_attention_equals_sdpa(override, left, packed, num_kv_heads):
    assert fa._load_flex() is not None, "it must run on every CUDA device that torch can compile for"
    inputs, starts = qkv(num_kv_heads), torch.tensor([[0] * 130 + [130] * 170, [0] * 300], device="cuda")
    results = []
    for name in ("flex", "sdpa"):
        override(name)
        mask = fa.document_mask(starts if packed else starts * 0, (left, 0), torch.bfloat16)
        results.append(flash_attn.masked_attn_func(*inputs, mask))
    assert_same_with_gradients(*results, inputs)


@pytest.mark.parametrize("compile_mode", ["off", "on"])
@pytest.mark.parametrize("impl", [None, "sdpa", "flex"])
@pytest.mark.parametrize("bos_id", [None, 1])
def test_a_few_steps_lower_the_loss(override, compile_mode, impl, bos_id):
    override(impl)
    fa._load_flex()
    model = make_model()
    optimizer = model.setup_optimizer()
    ids = torch.randint(1000, (4, 513), device="cuda")
    ids[:, 0] = ids[:, 200] = 1
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    compile_model(model, compile_mode, *x.shape, bos_id)
    losses = []
    for _ in range(8):
        losses.append(accumulate(model, [(x, y)], y.numel(), COMPUTE, bos_id))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert losses[0] == pytest.approx(6.908, abs=0.05) and losses[-1] < losses[0] - 0.5 # ln 1000


def test_decoding_equals_the_full_forward():
    model = make_model(torch.float32).float()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)

    class Tokenizer:
        def encode_special(self, name):
            return 999

        def get_bos_token_id(self):
            return 998
    prompt = list(range(1, 300)) # longer than the window
    slow = list(model.generate(prompt, 8, temperature=0))
    rows, _ = Engine(model, Tokenizer()).generate_batch(prompt, num_samples=2, max_tokens=8, temperature=0)
    assert [row[len(prompt):] for row in rows] == [slow, slow]


def test_captured_decoding_equals_the_full_forward(override):
    override("sdpa")
    model = make_model(torch.float32).float()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    decoder = Decoder(model, KVCache(3, 2, 400, 64, 4, "cuda"))
    torch.manual_seed(1)
    rows = [torch.randint(1000, (length,)).tolist() for length in (300, 40, 1)]
    with torch.inference_mode():
        for i, ids in enumerate(rows):
            model(torch.tensor([ids], device="cuda"), kv_cache=decoder.cache.rows(i, i + 1, [0]))
        for step in range(20):
            lengths = [len(ids) for ids in rows]
            for ids in rows:
                ids.append((7 * step + len(ids)) % 1000)
            logits = decoder([ids[-1] for ids in rows], lengths)
            for i, ids in enumerate(rows):
                expected = model(torch.tensor([ids], device="cuda"))[0, -1]
                torch.testing.assert_close(logits[i], expected, atol=1e-3, rtol=1e-3)
    assert list(decoder.graphs) == [3]


def test_batches_arrive_whole_though_the_host_does_not_wait():
    batches = [_to_device(torch.full((64, 2048), i).numpy(), torch.full((64, 2048), -i).numpy(), torch.device("cuda"))
               for i in range(20)] # pinned memory that was used again too early would show in an early batch
    assert all((x == i).all() and (y == -i).all() for i, (x, y) in enumerate(batches))


def test_the_memory_forecast_and_an_automatic_micro_batch():
    torch.cuda.empty_cache()
    model = make_model()
    ids = torch.zeros(16, 512, dtype=torch.long, device="cuda")

    def probe(rows):
        model(ids[:rows], ids[:rows], loss_reduction="sum").backward()
    assert fitting_rows(model, 16, COMPUTE, probe) == 16
    torch.cuda.reset_peak_memory_stats()
    probe(16)
    parts = memory_forecast(model.config, 16, "cuda")
    forecast = parts["peak"] - parts["optimizer state"]
    assert torch.cuda.max_memory_allocated() == pytest.approx(forecast, rel=0.5), "eager; compiled it takes less"
