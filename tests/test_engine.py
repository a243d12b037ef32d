"""
The engine against fakes of ten lines, and against the plain GPT.generate.

HistoryModel is the sharp one: its next-token logits are a function of every id of the row so far, and it knows them
only from what it wrote into the KV cache. Any mistake in positions, padding, copying or dropping rows changes the text.
"""
import math
import random
from types import SimpleNamespace

import pytest
import torch

import nanochat.engine
from nanochat.common import UserError
from nanochat.engine import Batch, Decoder, Engine, KVCache, Request, derive_seed, sample_next_token
from nanochat.gpt import GPT, GPTConfig

V = 262 # 256 bytes and six special tokens


class ByteTokenizer:
    """One id per byte, then the six special tokens that the engine asks for."""
    SPECIAL = ["<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>", "<|assistant_end|>",
               "<|bos|>"]

    def encode_special(self, text):
        return 256 + self.SPECIAL.index(text)

    def get_bos_token_id(self):
        return 261

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END, END, BOS = range(256, 262)


class UniformModel:
    """All logits zero; counts its forwards and remembers how many rows each had."""
    def __init__(self, device="cpu", sequence_len=128):
        self.config = SimpleNamespace(n_head=4, n_kv_head=4, n_embd=64, n_layer=2, sequence_len=sequence_len)
        self.device, self.rows, self.sizes = device, [], []

    def get_device(self):
        return self.device

    def forward(self, ids, kv_cache=None):
        self.rows.append(ids.size(0))
        self.sizes.append(ids.numel())
        logits = self.logits(ids, kv_cache)
        kv_cache.advance(ids.size(1))
        return logits

    def logits(self, ids, kv_cache):
        return torch.zeros(*ids.shape, V)


class ScriptedModel(UniformModel):
    """Wants script[p] at position p, whatever came before."""
    def __init__(self, script, **kwargs):
        super().__init__(**kwargs)
        self.script = script

    def logits(self, ids, kv_cache):
        wanted = torch.tensor([[self.script[p + t + 1] for t in range(ids.size(1))] for p in kv_cache.positions])
        return 50 * torch.nn.functional.one_hot(wanted, V).float()


class HistoryModel(UniformModel):
    """Logits are a fixed wild function of the row's whole history, which it reads back from the cache."""
    MODULUS = 9973

    def logits(self, ids, kv_cache):
        kv_cache.ensure(torch.float32)
        keys, _ = kv_cache.get_layer_cache(1)
        seeds = torch.zeros(ids.shape, dtype=torch.float64)
        for row, start in enumerate(kv_cache.positions):
            for t, token in enumerate(ids[row].tolist()):
                keys[row, start + t] = token
                history = keys[row, :start + t + 1, 3, 5].tolist()
                seeds[row, t] = sum((p + 1) * (token + 7) for p, token in enumerate(history)) % self.MODULUS
        return 4 * torch.sin(seeds[:, :, None] * (torch.arange(V) + 1.3)).float()


def make_engine(model):
    return Engine(model, ByteTokenizer())


def scripted(prompt, completion):
    return make_engine(ScriptedModel(list(prompt) + list(completion) + [END] * 200)), list(prompt)


PROMPT = [BOS, 72, 105]

# ---- KV cache ----

def test_cache_basics():
    cache = KVCache(batch_size=2, num_heads=3, seq_len=64, head_dim=5, num_layers=6, device="cpu", dtype=torch.float32)
    assert cache.get_pos() == 0
    assert cache.k_cache.shape == cache.v_cache.shape == (6, 2, 64, 3, 5)
    assert not cache.k_cache.any() and not cache.v_cache.any()
    cache.advance(10)
    assert cache.get_pos() == 10
    cache.advance(5)
    assert cache.get_pos() == 15 and cache.positions == [15, 15]
    assert cache.cache_seqlens.dtype == torch.int32 and cache.cache_seqlens.tolist() == [15, 15]
    cache.reset()
    assert cache.get_pos() == 0 and cache.cache_seqlens.tolist() == [0, 0]
    assert [layer.shape for layer in cache.get_layer_cache(0)] == [(2, 64, 3, 5)] * 2


def test_cache_prefill():
    source = KVCache(1, 4, 32, 8, 2, torch.device("cpu"), torch.bfloat16)
    source.k_cache[0, 0, :16], source.v_cache[0, 0, :16] = 1, 2
    source.advance(16)
    target = KVCache(3, 4, 64, 8, 2, "cpu")
    target.prefill(source)
    assert target.get_pos() == 16 and target.k_cache.dtype == torch.bfloat16
    for row in range(3):
        assert (target.k_cache[0, row, :16] == 1).all() and (target.v_cache[0, row, :16] == 2).all()
    assert not target.k_cache[:, :, 16:].any()


def test_cache_prefill_repeats_ragged_rows():
    source = KVCache(2, 1, 4, 2, 1, "cpu", torch.float32)
    source.k_cache[0, 0], source.k_cache[0, 1] = 1, 2
    source.set_lengths([2, 4])
    target = KVCache(4, 1, 8, 2, 1, "cpu")
    target.prefill(source)
    assert target.positions == target.cache_seqlens.tolist() == [2, 2, 4, 4]
    assert target.k_cache[0, :, 0, 0, 0].tolist() == [1, 1, 2, 2]


def test_cache_prefill_from_a_cache_that_was_never_written():
    source, target = KVCache(1, 1, 4, 2, 1, "cpu"), KVCache(2, 1, 4, 2, 1, "cpu")
    source.advance(3)
    target.prefill(source)
    assert target.positions == [3, 3] and target.k_cache is None


@pytest.mark.parametrize("heads, seq_len, advance, message", [
    (2, 8, 0, "same layers, heads"), (1, 8, 1, "empty cache"), (1, 2, 0, "holds 2 positions per row, 3 are needed")])
def test_cache_prefill_refuses(heads, seq_len, advance, message):
    source, target = KVCache(1, 1, 4, 2, 1, "cpu"), KVCache(2, heads, seq_len, 2, 1, "cpu")
    source.advance(3)
    target.advance(advance)
    with pytest.raises(ValueError, match=message):
        target.prefill(source)


def test_a_full_cache_names_its_capacity_and_keeps_its_position():
    cache = KVCache(1, 1, 16, 2, 1, "cpu")
    cache.advance(16)
    with pytest.raises(ValueError, match="holds 16 positions per row, 17 are needed"):
        cache.advance(1)
    assert cache.get_pos() == 16


def test_rows_at_different_positions():
    cache = KVCache(2, 1, 16, 2, 1, "cpu")
    cache.advance(8)
    cache.set_lengths([3, 8])
    cache.advance(1)
    assert cache.positions == cache.cache_seqlens.tolist() == [4, 9]
    with pytest.raises(ValueError, match=r"different positions \[4, 9\]"):
        cache.get_pos()


def test_rows_of_a_cache_are_views_at_lengths_of_their_own():
    cache = KVCache(4, 1, 8, 2, 2, "cpu")
    view = cache.rows(1, 3, [2, 5])
    view.ensure(torch.float32) # what the model does in its first forward
    keys, values = view.get_layer_cache(1)
    keys[:, 0], values[:, 0] = 1, 2
    view.advance(1)
    assert view.positions == view.cache_seqlens.tolist() == [3, 6] and cache.positions == [0] * 4
    for stored, value in [(cache.k_cache, 1), (cache.v_cache, 2)]:
        assert stored[1, :, 0, 0, 0].tolist() == [0, value, value, 0]
    assert keys.is_contiguous() and cache.rows(1, 3, [0, 0]).k_cache.data_ptr() == view.k_cache.data_ptr()
    with pytest.raises(ValueError, match="holds 8 positions per row, 9 are needed"):
        cache.rows(0, 1, [9])


def test_rows_of_a_cache_are_swapped_and_copied():
    cache = KVCache(3, 1, 8, 2, 2, "cpu", torch.float32)
    for row in range(3):
        cache.k_cache[:, row], cache.v_cache[:, row] = row, 10 + row
    cache.swap_rows(0, 2, 5)
    cache.copy_row(0, 1, 3)
    for layer in range(2):
        keys, values = cache.get_layer_cache(layer)
        assert keys[:, :, 0, 0].tolist() == [[2] * 5 + [0] * 3, [2] * 3 + [1] * 5, [0] * 5 + [2] * 3]
        assert (values == keys + 10).all()

# ---- sampling ----

def rngs(n, first_seed=0):
    return [torch.Generator().manual_seed(first_seed + i) for i in range(n)]


@pytest.mark.parametrize("top_k", [None, 0, -1, 3, 5, 1000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature, top_k):
    logits, n = torch.tensor([1.0, -0.5, 2.0, 0.3, -float("inf")]), 40_000
    ids = sample_next_token(logits.expand(n, 5), torch.Generator().manual_seed(0), temperature, top_k)
    assert ids.shape == (n, 1) and ids.dtype == torch.int64
    if top_k == 3:
        logits = torch.where(logits >= 0.3, logits, -float("inf"))
    expected = torch.softmax(logits / temperature, -1)
    observed = torch.bincount(ids.flatten(), minlength=5) / n
    assert (observed - expected).abs().max() < 4 * math.sqrt(0.25 / n) # four standard errors at most
    assert not observed[expected == 0].any()


@pytest.mark.parametrize("kept, settings", [
    ([2, 0], {"top_p": 0.7}), ([2], {"top_p": 0.5}), ([2], {"top_p": 0.0}), ([2, 0, 3], {"top_p": 0.91}),
    ([2, 0, 3, 1], {"top_p": 1.0}), ([2, 0, 3, 1], {"min_p": 0.0}), ([2, 0], {"min_p": 0.3}), ([2], {"min_p": 1.0}),
    ([2], {"min_p": 7.0}), ([2, 0], {"top_k": 2, "top_p": 0.95}), ([2], {"top_k": 2, "top_p": 0.6}),
    ([2, 0], {"top_k": -1, "top_p": 0.7}),
    ([2, 0], {"top_p": 0.95, "min_p": 0.3}), ([2, 0, 3], {"top_k": 3, "min_p": 0.01})])
def test_nucleus_and_min_p_keep_what_their_papers_say(kept, settings):
    probs = torch.tensor([0.23, 0.05, 0.62, 0.10, 0.0])
    n = 20_000
    ids = sample_next_token(probs.log().expand(n, 5), torch.Generator().manual_seed(0), **settings)
    expected = torch.zeros(5).index_copy(0, torch.tensor(kept), probs[kept] / probs[kept].sum())
    assert (torch.bincount(ids.flatten(), minlength=5) / n - expected).abs().max() < 4 * math.sqrt(0.25 / n)
    assert not set(ids.flatten().tolist()) - set(kept)


def test_each_row_draws_from_its_own_generator():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    together = sample_next_token(logits, rngs(4))
    alone = [sample_next_token(logits[i:i + 1], rngs(1, first_seed=i)) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_greedy_and_its_limits():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(2), dtype=torch.bfloat16)
    greedy = logits.argmax(-1, keepdim=True)
    assert torch.equal(sample_next_token(logits, None, temperature=0), greedy)
    assert torch.equal(sample_next_token(logits, rngs(6), top_k=1), greedy)
    assert torch.equal(sample_next_token(logits, rngs(6), temperature=1e-40), greedy)
    with pytest.raises(ValueError, match="temperature must be at least 0, got -0.1"):
        sample_next_token(logits, rngs(6), temperature=-0.1)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_told(temperature, bad):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(UserError, match="the logits are not finite: take another checkpoint"):
        sample_next_token(logits, rngs(2), temperature)


class PoisonedModel(HistoryModel):
    """A row whose newest id is 200 gets NaN keys and logits; so does whatever looks at NaN keys, masked or not."""
    def logits(self, ids, kv_cache):
        logits = super().logits(ids, kv_cache)
        for layer in (kv_cache.k_cache, kv_cache.v_cache):
            for row, start in enumerate(kv_cache.positions):
                layer[1, row, start:start + ids.size(1), 0, 0] = torch.where(ids[row] == 200, math.nan, 0.0)
        return logits + kv_cache.k_cache[1, :, :, 0, 0].sum(-1)[:, None, None]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_row_whose_logits_are_not_finite_ends_alone(temperature):
    """It breaks while its prompt is read or while it decodes; the others say what they say without it."""
    prompts = [[BOS, *range(30)], [BOS, *range(18), 200, 7], [BOS, *range(20), 7]]
    ended, expected = [], [alone(HistoryModel(), Request(prompt, 12, temperature)) for prompt in prompts]
    batch = Batch(make_engine(PoisonedModel()), 3)
    requests = [Request(prompt, 12, temperature, on_end=ended.append) for prompt in prompts]
    for request in requests:
        batch.submit(request)
        batch.step()
        batch.step()
    requests[0].tokens[-1] = 200 # what it reads in the next step
    batch.step()
    assert ended == [requests[1], requests[0]] and not requests[1].tokens
    later = [Request([*prompts[0], 9], 12, temperature), Request(prompts[2], 12, temperature)] # in the places of both
    for request in later:
        batch.submit(request)
    while batch.step():
        pass
    assert [request.finish_reason == "broken" for request in [*requests, *later]] == [True, True, False, False, False]
    assert (requests[2].tokens, later[1].tokens) == (expected[2][0], expected[2][0])
    assert later[0].tokens == alone(HistoryModel(), Request([*prompts[0], 9], 12, temperature))[0]
    assert not batch.cache.k_cache.isnan().any() and not batch.cache.v_cache.isnan().any()


@pytest.mark.parametrize("call", ["generate", "generate_batch", "generate_many"])
def test_whoever_generates_is_told_that_logits_are_not_finite(call):
    prompt = [BOS, 200]
    with pytest.raises(UserError, match="the logits are not finite: take another checkpoint"):
        list(getattr(make_engine(PoisonedModel()), call)([[BOS, 5], prompt] if "many" in call else prompt))


def test_derived_seeds_differ_and_are_stable():
    assert len({derive_seed(seed, i) for seed in range(30) for i in range(30)}) == 900
    assert derive_seed(42, 0) == 3714959984187524227 # a published run must be repeatable elsewhere

# ---- generate: what the seed's tests asked, for devices given as text and as objects ----

DEVICES = pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=["str", "device"])


@DEVICES
def test_first_tokens_of_samples_differ(device):
    (column, masks), = make_engine(UniformModel(device)).generate(PROMPT, num_samples=16, max_tokens=1)
    assert len(set(column)) > 1 and masks == [1] * 16


@DEVICES
@pytest.mark.parametrize("seed", [1, 42, 123, 999])
def test_the_same_seed_repeats_itself(device, seed):
    runs = [make_engine(UniformModel(device)).generate_batch(PROMPT, max_tokens=10, seed=seed) for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]


@DEVICES
def test_greedy_does_not_depend_on_the_seed(device):
    engine = make_engine(UniformModel(device))
    runs = [engine.generate_batch(PROMPT, max_tokens=5, temperature=0, seed=seed) for seed in (1, 42)]
    assert runs[0] == runs[1] == ([PROMPT + [0] * 5], [[0] * 3 + [1] * 5])


@DEVICES
@pytest.mark.parametrize("n", [1, 4, 16, 64])
def test_max_tokens_and_num_samples(device, n):
    columns = list(make_engine(UniformModel(device)).generate(PROMPT, max_tokens=n, temperature=0))
    assert len(columns) == n
    results, masks = make_engine(UniformModel(device)).generate_batch(PROMPT, num_samples=n, max_tokens=3)
    assert len(results) == len(masks) == n
    assert all(len(r) == len(m) <= 6 and r[:3] == PROMPT for r, m in zip(results, masks, strict=True))


@DEVICES
def test_seeds_vary_the_output(device):
    engine = make_engine(UniformModel(device))
    assert len({tuple(engine.generate_batch(PROMPT, max_tokens=5, seed=s)[0][0]) for s in range(10)}) > 1


def test_a_row_does_not_depend_on_the_number_of_rows():
    engine = make_engine(UniformModel())
    wide = engine.generate_batch(PROMPT, num_samples=9, max_tokens=20, top_k=50)[0]
    for n in (1, 2, 5):
        assert engine.generate_batch(PROMPT, num_samples=n, max_tokens=20, top_k=50)[0] == wide[:n]

# ---- when it stops ----

def test_no_forward_after_the_last_token():
    model = UniformModel()
    list(make_engine(model).generate(PROMPT, max_tokens=1))
    assert len(model.rows) == 1
    list(make_engine(model).generate(PROMPT, max_tokens=0))
    assert len(model.rows) == 1
    list(make_engine(model).generate(PROMPT, max_tokens=5, temperature=0))
    assert len(model.rows) == 1 + 5


@pytest.mark.parametrize("length", [1, 15, 16])
def test_without_max_tokens_it_stops_when_the_cache_is_full(length):
    model = UniformModel(sequence_len=16)
    columns = list(make_engine(model).generate([BOS] * length, temperature=0))
    assert len(columns) == len(model.rows) == 16 - length + 1


@pytest.mark.parametrize("call", ["generate", "generate_batch", "generate_many"])
def test_impossible_prompts(call):
    def run(prompt, **kwargs):
        engine = make_engine(UniformModel(sequence_len=16))
        return getattr(engine, call)([prompt] if "many" in call else prompt, **kwargs)

    with pytest.raises(ValueError, match="at least one token"):
        run([])
    with pytest.raises(ValueError, match="17 tokens exceeds the context of 16"):
        run([BOS] * 17)
    list(run([BOS] * 17, max_tokens=2)) # with a limit of its own it may leave the context


@pytest.mark.parametrize("terminal", [END, BOS])
def test_terminal_tokens_are_streamed_but_not_kept(terminal):
    engine, prompt = scripted(PROMPT, [10, 11, terminal])
    assert list(engine.generate(prompt, max_tokens=9, temperature=0)) == [([10], [1]), ([11], [1]), ([terminal], [1])]
    assert engine.generate_batch(prompt, max_tokens=9, temperature=0) == ([prompt + [10, 11]], [[0, 0, 0, 1, 1]])


def test_completed_rows_fall_silent_and_leave_the_batch():
    model = UniformModel()
    model.logits = lambda ids, cache: ( # no tool calls
        torch.zeros(*ids.shape, V).index_fill(-1, torch.tensor([END]), 3.0)
        .index_fill(-1, torch.tensor([PYTHON_START]), -50.0))
    columns = list(make_engine(model).generate(PROMPT, num_samples=40, max_tokens=60, seed=3))
    tokens, masks = (torch.tensor([column[part] for column in columns]) for part in (0, 1)) # (steps, rows)
    for row in range(40):
        ends = [step for step in range(len(columns)) if tokens[step, row] in (END, BOS)]
        if ends:
            assert masks[:ends[0] + 1, row].all() and not masks[ends[0] + 1:, row].any()
            assert (tokens[ends[0] + 1:, row] == END).all()
    assert model.rows[0] == 1 and model.rows[1:] == masks.sum(1)[1:].tolist()


def test_inference_mode_is_left_at_every_yield():
    for _ in make_engine(UniformModel()).generate(PROMPT, max_tokens=3):
        assert not torch.is_inference_mode_enabled()

# ---- the tool ----

def call(expression):
    return [PYTHON_START, *expression.encode(), PYTHON_END]


def output(text):
    return [OUTPUT_START, *text.encode(), OUTPUT_END]


@pytest.mark.parametrize("said, forced", [
    (call("12*3"), output("36")),
    (call("10/4"), output("2.5")),
    (call("'strawberry'.count('r')"), output("3")),
    (call("1/0"), output("error")),                           # no result, and the model is told
    (call(""), []),
    ([65, PYTHON_END], []),                                   # no call is open
    ([PYTHON_START, 57, *call("1+1")], output("2")),          # a second start begins anew
    ([*call("1+1"), *output("2"), PYTHON_END], []),           # the end of a call that was answered already
    (call("9" * 101), output("error")),                       # a result too long to be fed back
])
def test_tool_calls(said, forced):
    is_answered_within = PYTHON_END in said[:-1]
    script = said + [255] * len(forced) + [66, END]           # the model wants 255 where the tool speaks
    engine, prompt = scripted(PROMPT, script)
    (result,), (mask,) = engine.generate_batch(prompt, max_tokens=180, temperature=0)
    assert result == prompt + said + forced + [66]
    if not is_answered_within:
        assert mask == [0] * len(prompt) + [1] * len(said) + [0] * len(forced) + [1]


def test_forced_tokens_count_towards_max_tokens():
    engine, prompt = scripted(PROMPT, call("7*7"))
    columns = list(engine.generate(prompt, max_tokens=7, temperature=0))
    assert [column[0] for column, _ in columns] == call("7*7") + [OUTPUT_START, ord("4")]
    assert [mask[0] for _, mask in columns] == [1] * 5 + [0, 0]


def test_tool_state_is_per_row():
    """Two prompts of different lengths: at the same step one row is inside a call and the other is not."""
    model = UniformModel()
    scripts = {1: [0] + call("2+2") + [50] * 20, 3: [0] * 3 + [60, 61] + call("5*5") + [50] * 20}
    def logits(ids, cache): # the row is known by its first id, which is its prompt length
        cache.ensure(torch.float32)
        keys, _ = cache.get_layer_cache(0)
        rows = []
        for row, position in enumerate(cache.positions):
            keys[row, position:position + ids.size(1)] = ids[row, :, None, None]
            script = scripts[int(keys[row, 0, 0, 0])]
            rows.append([script[position + t + 1] for t in range(ids.size(1))])
        return 50 * torch.nn.functional.one_hot(torch.tensor(rows), V).float()
    model.logits = logits
    (a,), (b,) = make_engine(model).generate_many([[1], [3, 3, 3]], max_tokens=10, temperature=0)
    assert a[0] == call("2+2") + output("4") + [50] * 2 and a[1] == [1] * 5 + [0] * 3 + [1] * 2
    assert b[0] == [60, 61] + call("5*5") + output("25")[:3] and b[1] == [1] * 7 + [0] * 3

# ---- many prompts ----

PROMPTS = [[BOS] + [(7 * i + j) % 256 for j in range(n)] for i, n in enumerate([5, 0, 17, 3, 3, 9, 1, 40])]


@pytest.mark.parametrize("temperature, top_k", [(0, None), (1.0, None), (1.3, 20)])
@pytest.mark.parametrize("num_samples, batch_size", [(1, 1), (1, 3), (1, 100), (3, 1), (3, 7), (3, 100)])
def test_a_batch_says_what_each_prompt_says_alone(temperature, top_k, num_samples, batch_size):
    engine = make_engine(HistoryModel())
    settings = {"num_samples": num_samples, "max_tokens": 12, "temperature": temperature, "top_k": top_k}
    together = engine.generate_many(PROMPTS, seed=list(range(100, 108)), batch_size=batch_size, **settings)
    for i, prompt in enumerate(PROMPTS):
        results, masks = engine.generate_batch(prompt, seed=100 + i, **settings)
        assert [prompt + ids for ids, _ in together[i]] == results
        assert [[0] * len(prompt) + mask for _, mask in together[i]] == masks


def test_equal_prompts_of_a_batch_draw_differently():
    samples = make_engine(UniformModel()).generate_many([PROMPT] * 6, max_tokens=5)
    assert len({tuple(ids) for (ids, _), in samples}) == 6


def test_rows_without_max_tokens_stop_at_their_own_capacity():
    samples = make_engine(HistoryModel(sequence_len=48)).generate_many(PROMPTS, temperature=0)
    lengths = [(len(prompt), len(ids)) for prompt, ((ids, _),) in zip(PROMPTS, samples, strict=True)]
    assert max(prompt_len + num_tokens for prompt_len, num_tokens in lengths) == 49 # the last one needs no room


@pytest.mark.parametrize("prefill_tokens", [1, 3, 30])
def test_long_prompts_are_read_in_pieces_with_the_same_result(monkeypatch, prefill_tokens):
    whole = make_engine(HistoryModel()).generate_many(PROMPTS, max_tokens=6, temperature=0)
    monkeypatch.setattr(nanochat.engine, "PREFILL_TOKENS", prefill_tokens)
    model = HistoryModel()
    assert make_engine(model).generate_many(PROMPTS, max_tokens=6, temperature=0) == whole
    assert max(model.sizes) <= max(prefill_tokens, len(PROMPTS)) and len(model.sizes) > sum(map(len, PROMPTS)) / 30


def test_no_prompts_give_no_completions():
    assert make_engine(UniformModel()).generate_many([]) == []

# ---- a running batch ----

def alone(model, request, capacity=None):
    """What a request gives in a batch of its own: (tokens, masks, end)."""
    batch = Batch(make_engine(model), 1, capacity)
    copied = Request(request.prompt, request.max_tokens, request.temperature, request.top_k, request.top_p,
                     request.min_p, seed=request.rng.initial_seed())
    batch.submit(copied)
    while batch.step():
        pass
    return copied.tokens, copied.masks, copied.end


def check_places(batch):
    """What must hold between any two steps."""
    places = batch.places
    assert 0 <= batch.num_decoding <= batch.num_busy <= len(places)
    for i, place in enumerate(places):
        assert (place.request is not None) == (i < batch.num_busy)
        if i < batch.num_decoding: # all but the last token have their keys in the cache
            assert place.ids == place.request.prompt + place.request.tokens[:-1]
        elif i < batch.num_busy:
            assert place.ids == place.request.prompt[:len(place.ids)]
    if batch.cache.k_cache is not None: # HistoryModel writes every id as its key
        for i, place in enumerate(places):
            assert batch.cache.k_cache[1, i, :len(place.ids), 3, 5].tolist() == place.ids


SETTINGS = [{"temperature": 0}, {}, {"top_k": 20}, {"top_p": 0.5, "temperature": 1.5}, {"min_p": 0.2},
            {"top_k": 9, "top_p": 0.7}]


@pytest.mark.parametrize("seed", range(8))
def test_requests_that_come_and_go_say_what_they_say_alone(seed):
    """Prompts that begin alike or are turns of one conversation, joining, ending and cancelled at random steps."""
    draw = random.Random(seed)
    model, capacity = HistoryModel(sequence_len=100), draw.choice([None, 80])
    batch = Batch(make_engine(model), draw.randint(1, 5), capacity, prefill_tokens=draw.choice([3, 20, 256]))
    stems, requests, cancelled = [[BOS] + [draw.randrange(256) for _ in range(n)] for n in (2, 20, 30)], [], []
    for _ in range(300):
        if draw.random() < 0.3 and len(requests) < 40:
            earlier = [r.prompt + r.tokens + r.end for r in requests if len(r.prompt) + len(r.tokens) < 60]
            stem = draw.choice(stems + earlier)
            prompt = stem + [draw.randrange(256) for _ in range(draw.choice([0, 1, 7, 15]))]
            requests.append(Request(prompt, draw.choice([None, 1, 5, 20]), seed=len(requests), **draw.choice(SETTINGS)))
            batch.submit(requests[-1])
        running = [request for request in requests if not request.done]
        if running and draw.random() < 0.05:
            cancelled.append(draw.choice(running))
            cancelled[-1].cancel()
        left = batch.step()
        assert left == sum(not request.done for request in requests)
        check_places(batch)
    while batch.step():
        check_places(batch)
    assert any(request.cached_tokens >= 16 for request in requests)
    for request in requests:
        tokens, masks, end = alone(model, request, capacity)
        if request in cancelled:
            assert request.finish_reason == "cancelled" and tokens[:len(request.tokens)] == request.tokens
        else:
            assert (request.tokens, request.masks, request.end) == (tokens, masks, end)
            assert request.finish_reason == ("stop" if end else "length")


def test_a_second_turn_reads_only_what_is_new():
    model = HistoryModel()
    batch = Batch(make_engine(model), 2)
    first = Request([BOS, *range(30)], max_tokens=10, temperature=0)
    batch.submit(first)
    while batch.step():
        pass
    model.sizes.clear()
    second = Request(first.prompt + first.tokens + [7, 8, 9], max_tokens=1, temperature=0)
    batch.submit(second)
    unread = 0 if first.end else 1 # the last token of an answer is read only when another one is wanted
    assert batch.step() == 0 and second.cached_tokens == 31 + len(first.tokens) - unread
    assert model.sizes == [unread + 3]


def test_equal_prompts_are_read_once_and_alike_ones_in_part():
    model = HistoryModel()
    batch = Batch(make_engine(model), 4)
    stem = [BOS, *range(40)]
    requests = [Request(prompt, 3, seed=i) for i, prompt in enumerate([stem, stem, stem + [1, 2], [BOS, 5]])]
    for request in requests:
        batch.submit(request)
    batch.step()
    assert model.sizes == [2 * 41] # the first and the last; [BOS, 5] padded; the others wait for the stem
    assert [len(request.tokens) for request in requests] == [1, 1, 0, 1]
    assert [request.cached_tokens for request in requests[:2]] == [0, 41]
    batch.step()
    assert model.sizes[1:] == [3, 2] and requests[2].cached_tokens == 41


def test_a_short_prompt_does_not_wait_for_a_long_one():
    model = HistoryModel(sequence_len=2000)
    batch = Batch(make_engine(model), 8, prefill_tokens=50)
    running, long, short = Request([BOS], 300), Request([BOS] + [3] * 1500, 5), Request([BOS, 4, 5], 5)
    batch.submit(running)
    batch.step()
    batch.submit(long)
    batch.step()
    batch.submit(short)
    for _ in range(2):
        batch.step()
    assert len(short.tokens) >= 1 and not long.tokens
    assert len(running.tokens) == 4 # and nobody who decodes waits for either
    for _ in range(1500 // 50 + 1):
        batch.step()
    assert long.tokens


def test_a_long_prompt_gets_its_turn_among_short_ones():
    batch = Batch(make_engine(HistoryModel(sequence_len=400)), 3, prefill_tokens=10)
    long = Request([BOS] + [3] * 200, 1)
    batch.submit(long)
    for i in range(60):
        batch.submit(Request([BOS, i, i + 1, i + 2, i + 3, i + 4], 1))
        batch.step()
    assert long.done


@pytest.mark.parametrize("steps, has_tokens", [(0, False), (1, False), (4, True)])
def test_cancelling_frees_the_place_at_the_next_step(steps, has_tokens):
    """While it waits, while its prompt is read, while it decodes."""
    batch, ended = Batch(make_engine(HistoryModel()), 1, prefill_tokens=8), []
    request = Request([BOS] + [9] * 20, 50, on_end=ended.append)
    other = Request([BOS, 1], 1)
    batch.submit(request)
    batch.submit(other)
    for _ in range(steps):
        batch.step()
    assert bool(request.tokens) == has_tokens and not ended
    request.cancel()
    batch.step()
    assert request.finish_reason == "cancelled" and ended == [request] and other.finish_reason == "length"


def test_listeners_hear_every_token_and_may_end_a_request():
    heard, ended = [], []
    def listen(token, mask, logprob):
        heard.append((token, mask, logprob))
        return token == 11

    engine, prompt = scripted(PROMPT, [10, *call("2*3"), *output("6"), 12, END])
    request = Request(prompt, temperature=0, on_token=listen, on_end=ended.append)
    batch = Batch(engine, 2)
    batch.submit(request)
    while batch.step():
        pass
    assert [token for token, *_ in heard] == [10, *call("2*3"), *output("6"), 12, END] and ended == [request]
    assert [mask for _, mask, _ in heard] == [1] * 6 + [0] * 3 + [1] * 2 and request.finish_reason == "stop"
    heard.clear()
    engine, prompt = scripted(PROMPT, [10, 11, 12, END])
    request = Request(prompt, temperature=0, on_token=listen)
    batch = Batch(engine, 2)
    batch.submit(request)
    assert [batch.step() for _ in range(2)] == [1, 0]
    assert request.tokens == [10, 11] and request.finish_reason == "stop" and len(heard) == 2


def test_log_probabilities_are_those_of_the_raw_logits():
    model, heard = HistoryModel(), []
    request = Request(PROMPT, 6, temperature=0.3, top_k=5, logprobs=4, on_token=lambda *said: heard.append(said))
    batch = Batch(make_engine(model), 1)
    batch.submit(request)
    while batch.step():
        pass
    cache = KVCache(1, 4, 16, 16, 2, "cpu", torch.float32)
    expected = model.forward(torch.tensor([PROMPT + request.tokens]), cache)[0, 2:].double().log_softmax(-1)
    for (token, _, (own, top)), row in zip(heard, expected, strict=False):
        assert own == pytest.approx(row[token].item(), abs=1e-5)
        assert [i for i, _ in top] == row.topk(4).indices.tolist()
        assert [value for _, value in top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-5)


def test_a_batch_refuses_what_does_not_fit_and_clamps_the_rest():
    batch = Batch(make_engine(UniformModel(sequence_len=16)), 1)
    for prompt, message in [([], "at least one token"), ([BOS] * 17, "17 tokens exceeds the context of 16")]:
        with pytest.raises(ValueError, match=message):
            batch.submit(Request(prompt))
    request = Request([BOS] * 10, max_tokens=4096, temperature=0)
    batch.submit(request)
    nothing = Request([BOS], max_tokens=0)
    batch.submit(nothing)
    assert nothing.finish_reason == "length"
    while batch.step():
        pass
    assert len(request.tokens) == 7 and request.finish_reason == "length"

# ---- the real model ----

def random_gpt(pattern, n_kv_head, sequence_len=16):
    config = GPTConfig(sequence_len=sequence_len, vocab_size=V, n_layer=4, n_head=4, n_kv_head=n_kv_head, n_embd=64,
                       window_pattern=pattern)
    torch.manual_seed(5)
    model = GPT(config)
    model.init_weights()
    with torch.no_grad(): # fresh models have zero projections; make every part matter
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
        model.lm_head.weight[[END, BOS]] = 0 # logit 0 is seldom the largest: texts get long
    return model.double() # in fp32 a draw may honestly fall on either side of a boundary


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("pattern", ["L", "S", "SSSL"])
def test_greedy_text_equals_that_of_the_plain_loop_beyond_the_context(pattern, n_kv_head):
    model = random_gpt(pattern, n_kv_head)
    engine, prompt = make_engine(model), list(range(40, 49))
    expected = list(model.generate(prompt, 40, temperature=0))
    got = engine.generate_batch(prompt, max_tokens=40, temperature=0)[0][0][len(prompt):]
    assert len(got) > 30 and got == expected[:len(got)]


@pytest.mark.parametrize("pattern, n_kv_head", [("L", 4), ("SSSL", 2)])
def test_a_real_model_in_fp32_says_the_same_alone_in_a_batch_and_from_reused_keys(pattern, n_kv_head):
    model = random_gpt(pattern, n_kv_head, sequence_len=96).float()
    batch, requests = Batch(make_engine(model), 8, prefill_tokens=16), []
    prompts = [prompt for prompt in PROMPTS if len(prompt) < 40]
    for turn in range(3):
        turns = [Request(prompt, 12, temperature=0) for prompt in prompts]
        for request in turns:
            batch.submit(request)
            batch.step()
        while batch.step():
            pass
        prompts = [r.prompt + r.tokens + [turn, turn + 1] for r in turns if len(r.prompt) < 60]
        requests += turns
    assert sum(request.cached_tokens >= 16 for request in requests) >= 5
    for request in requests:
        expected = list(model.generate(request.prompt, 12, temperature=0))
        assert request.tokens == expected[:len(request.tokens)] and len(request.tokens) + len(request.end) > 0


@pytest.mark.parametrize("pattern, n_kv_head", [("L", 4), ("SSSL", 2)])
def test_ragged_batch_of_the_real_model_equals_each_prompt_alone(pattern, n_kv_head):
    engine = make_engine(random_gpt(pattern, n_kv_head))
    together = engine.generate_many(PROMPTS, num_samples=2, max_tokens=30, temperature=0.7, seed=list(range(8)))
    for i, prompt in enumerate(PROMPTS):
        alone, _ = engine.generate_batch(prompt, num_samples=2, max_tokens=30, temperature=0.7, seed=i)
        assert [prompt + ids for ids, _ in together[i]] == alone


# ---- CUDA graphs, with a stand-in for the capture ----

@pytest.fixture
def captures(monkeypatch):
    """Captures as a CPU can: a replay computes again what the function reads now, into the tensor of the first time."""
    captured = []

    def capture(function, device, pool):
        function()
        result = function()
        captured.append(result)
        return lambda: result.copy_(function()), result, "pool"
    monkeypatch.setattr(nanochat.engine, "capture_graph", capture)

    class CapturingDecoder(Decoder):
        def __init__(self, model, cache):
            super().__init__(model, cache)
            self.wants_graphs = True
    monkeypatch.setattr(nanochat.engine, "Decoder", CapturingDecoder)
    return captured


@pytest.mark.parametrize("pattern, n_kv_head", [("L", 4), ("SSSL", 2)])
def test_captured_steps_say_what_plain_ones_say(captures, pattern, n_kv_head):
    model, said = random_gpt(pattern, n_kv_head, sequence_len=96), []
    for wants_graphs in (True, False):
        batch = Batch(make_engine(model), 4, prefill_tokens=16)
        batch.decoder.wants_graphs = wants_graphs
        requests = [Request(prompt[:40], 30, temperature=0.7, seed=i) for i, prompt in enumerate(PROMPTS * 3)]
        for request in requests: # more than places: rows change, join and leave
            batch.submit(request)
        while batch.step():
            pass
        said.append([(request.tokens, request.end) for request in requests])
        assert set(batch.decoder.graphs) == ({len(logits) for logits in captures} if wants_graphs else set())
    assert said[0] == said[1] and len(captures) >= 2


def test_decoding_goes_on_when_capturing_fails(captures, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("operation not permitted when stream is capturing")
    model, prompt = random_gpt("SSSL", 2), [BOS, 5, 6]
    expected = list(model.generate(prompt, 13, temperature=0))
    monkeypatch.setattr(nanochat.engine, "capture_graph", fail)
    rows, _ = make_engine(model).generate_batch(prompt, max_tokens=13, temperature=0)
    assert rows[0][3:] == expected[:len(rows[0]) - 3] and len(rows[0]) > 3 + nanochat.engine.CAPTURE_AFTER
    assert [record.message for record in caplog.records] == [
        "Decoding without CUDA graphs: RuntimeError: operation not permitted when stream is capturing"]
