"""
The engine against fakes of ten lines, and against the plain GPT.generate.

HistoryModel is the sharp one: its next-token logits are a function of every id of the row so far, and it knows them
only from what it wrote into the KV cache. Any mistake in positions, padding, copying or dropping rows changes the text.
"""
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import nanochat.engine
from nanochat.common import UserError
from nanochat.engine import Engine, KVCache, derive_seed, sample_next_token
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
        self.device, self.rows = device, []

    def get_device(self):
        return self.device

    def forward(self, ids, kv_cache=None):
        self.rows.append(ids.size(0))
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
    def logits(self, ids, kv_cache):
        kv_cache.ensure(torch.float32)
        keys, _ = kv_cache.get_layer_cache(1)
        seeds = torch.zeros(ids.shape, dtype=torch.float64)
        for row, start in enumerate(kv_cache.positions):
            for t, token in enumerate(ids[row].tolist()):
                keys[row, start + t] = token
                history = keys[row, :start + t + 1, 3, 5].tolist()
                seeds[row, t] = sum((p + 1) * (token + 7) for p, token in enumerate(history)) % 9973
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


@pytest.mark.parametrize("dropped", [[], [0], [4], [1, 3], [0, 1, 2], [2, 3, 4], [0, 1, 2, 3, 4]])
def test_dropped_rows_leave_the_others_contiguous(dropped):
    cache = KVCache(5, 1, 8, 2, 2, "cpu", torch.float32)
    for row in range(5):
        cache.k_cache[:, row], cache.v_cache[:, row] = row, 10 + row
    cache.set_lengths([1, 2, 3, 4, 5])
    kept = cache.drop_rows(dropped)
    assert sorted(kept) == [row for row in range(5) if row not in dropped] and cache.batch_size == len(kept)
    assert cache.positions == cache.cache_seqlens.tolist() == [row + 1 for row in kept]
    for layer in range(2):
        keys, values = cache.get_layer_cache(layer)
        assert keys.is_contiguous() and keys[:, 3, 0, 0].tolist() == kept
        assert values[:, 3, 0, 0].tolist() == [row + 10 for row in kept]

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


def test_long_prompts_are_read_in_pieces_with_the_same_result(monkeypatch):
    whole = make_engine(HistoryModel()).generate_many(PROMPTS, max_tokens=6, temperature=0)
    monkeypatch.setattr(nanochat.engine, "PREFILL_TOKENS", 30)
    model = HistoryModel()
    assert make_engine(model).generate_many(PROMPTS, max_tokens=6, temperature=0) == whole
    assert Counter(model.rows)[8] >= 41 // (30 // 8)


def test_no_prompts_give_no_completions():
    assert make_engine(UniformModel()).generate_many([]) == []

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
def test_ragged_batch_of_the_real_model_equals_each_prompt_alone(pattern, n_kv_head):
    engine = make_engine(random_gpt(pattern, n_kv_head))
    together = engine.generate_many(PROMPTS, num_samples=2, max_tokens=30, temperature=0.7, seed=list(range(8)))
    for i, prompt in enumerate(PROMPTS):
        alone, _ = engine.generate_batch(prompt, num_samples=2, max_tokens=30, temperature=0.7, seed=i)
        assert [prompt + ids for ids, _ in together[i]] == alone
