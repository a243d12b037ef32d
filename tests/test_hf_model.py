"""Models of other people in our evaluations, and ours under `transformers`: both ways against the real library."""
import csv
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanochat import hf_model
from nanochat.checkpoint_manager import build_model, checkpoint_dir, load_checkpoint, load_model, save_checkpoint
from nanochat.common import UserError, read_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.tokenizer import (SPECIAL_TOKENS, HuggingFaceTokenizer, RustBPETokenizer, from_hugging_face,
                                to_hugging_face, token_bytes_of, unwritten_bytes)
from scripts import base_eval, base_loss
from tests.test_eval_scripts import TEXT, section, write_world

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

CORPUS = [TEXT, "It's 2024: 12 x 34 = 408!\n\n\tdef f(x):\n        return  x ** 2\r\n",
          "Größe, déjà vu, 你好 世界, привет 😀"] * 9
CPU = ["--device-type", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True, scope="module")
def _own_caches(tmp_path_factory):
    """The code of an export is copied to a folder below the user's home, were it not for this; and no network."""
    from transformers import dynamic_module_utils
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield

# -----------------------------------------------------------------------------
# In

def gpt2_like():
    from tokenizers import ByteLevelBPETokenizer
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(CORPUS, 400, show_progress=False, special_tokens=["<|endoftext|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="<|endoftext|>")
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=40, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), tokenizer


def llama_like(metaspace=False):
    """As Llama 2: a blank is put in front, blanks are U+2581, and what is not in the vocabulary becomes bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=80, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m) for m in model["merges"]],
                                     unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    else:
        blanks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(blanks)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                               decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                                     unk_token="<unk>")
    config = transformers.LlamaConfig(vocab_size=len(tokens) + 5, # with rows of padding
                                      hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    return transformers.LlamaForCausalLM(config), tokenizer


FOREIGN = {"gpt2": gpt2_like, "llama": llama_like, "metaspace": lambda: llama_like(metaspace=True)}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """{name: folder} of tiny random models with locally trained tokenizers, written by `transformers`."""
    folders = {}
    for name, make in FOREIGN.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        for part in make():
            part.save_pretrained(folders[name])
    return folders


def load(folder):
    return hf_model.load_hf_model(str(folder), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", FOREIGN)
def test_ids_and_bytes_of_foreign_tokenizers(foreign, name):
    """The ids of `transformers`, and the bytes of a text to the last one."""
    _, tokenizer = load(foreign[name])
    reference = transformers.AutoTokenizer.from_pretrained(foreign[name])
    token_bytes, (bos, blanks) = token_bytes_of(tokenizer), unwritten_bytes(tokenizer)
    assert bos == reference.bos_token_id and blanks == (0 if name == "gpt2" else 1)
    for text in [*CORPUS[:3], "x", "tabs\t\tand   blanks  \n\n", "\u0e01\u0e33 🧪🧪", "<0x41>"]:
        ids = tokenizer.encode(text)
        assert ids == reference(text, add_special_tokens=False).input_ids
        assert token_bytes[ids].sum().item() - blanks == len(text.encode())
    assert token_bytes[list(tokenizer.special_ids.values())].sum() == 0


@pytest.mark.parametrize("name", FOREIGN)
def test_bits_per_byte_of_a_foreign_model(foreign, name):
    """Two documents in a row: the nats that `transformers` gives for their tokens, over the bytes of their texts."""
    model, tokenizer = load(foreign[name])
    texts, bos = ["the cat 你", "größe 12"], tokenizer.get_bos_token_id()
    row = torch.tensor([tokenizer.encode(texts[0], prepend=bos) + tokenizer.encode(texts[1], prepend=bos)])
    bpb = evaluate_bpb(model, [(row[:, :-1], row[:, 1:])], 1, token_bytes_of(tokenizer), unwritten_bytes(tokenizer))
    reference = transformers.AutoModelForCausalLM.from_pretrained(foreign[name])
    with torch.no_grad():
        labels = row.masked_fill(row == bos, -100)
        nats = reference(row, labels=labels).loss * (labels[:, 1:] != -100).sum()
    assert bpb == pytest.approx(nats.item() / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-5)


def test_context_limits(foreign):
    gpt2, llama = load(foreign["gpt2"])[0], load(foreign["llama"])[0]
    assert (gpt2.max_seq_len, gpt2.config.sequence_len) == (40, 40)
    assert (llama.max_seq_len, llama.config.sequence_len) == (2048, 1024)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    base = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        write_world(base)
        yield base


def test_base_loss_of_a_foreign_model(foreign, world, capsys):
    for name in ("gpt2", "llama"):
        base_loss.main([*CPU, "--hf-path", str(foreign[name]), "--device-batch-size", "2", "--split-tokens", "2100"])
        facts, out = section(world, "base-model-loss"), capsys.readouterr().out
        assert facts["model"] == str(foreign[name]) and 1 < facts["val bpb"] < 8 and "sample 0" not in facts
        assert f"the first {2048 if name == 'llama' else 2080:,} tokens" in out # rows of 1024 and of 40


def test_base_eval_of_a_foreign_model_cuts_prompts_to_its_context(foreign, world, capsys):
    """GPT-2 has 40 positions and would fail on more."""
    data = world / "eval_bundle" / "eval_data" / "pets.jsonl"
    items = [json.loads(line) | {"query": TEXT + "the cat"} for line in data.read_text().splitlines()]
    data.write_text("\n".join(map(json.dumps, items)))
    base_eval.main([*CPU, "--hf-path", str(foreign["gpt2"]), "--max-per-task", "4"])
    out = capsys.readouterr().out
    assert "4 of 4 items a prompt exceeds the model's context of 40 tokens, its beginning is cut off" in out
    with open(world / "base_eval" / f"{str(foreign['gpt2']).replace('/', '-')}.csv", newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["Task", "pets", "CORE"]
    assert section(world, "base-model-evaluation")["Model"] == str(foreign["gpt2"])


def test_a_foreign_model_that_cannot_be_had(foreign, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot load .*empty .*: --hf-path must name a causal language model"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match="cannot load nobody/nothing"):
        load("nobody/nothing")

    def spoilt(name, change):
        folder = shutil.copytree(foreign["llama"], tmp_path / name)
        change(folder)
        return folder

    def without_bos(folder):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "bos_token"}))

    def with_more_tokens(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"extra{i}" for i in range(6)])
        tokenizer.save_pretrained(folder)

    def without_a_weight(folder):
        from safetensors.torch import load_file, save_file
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.0.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def cut_short(folder):
        os.truncate(folder / "model.safetensors", 1000)

    for change, words in ((without_bos, "has no token that documents begin with"), (cut_short, "cannot load"),
                          (with_more_tokens, "has [0-9]+ tokens and the model only [0-9]+"),
                          (without_a_weight, "is no whole causal language model: it lacks model.layers.0.mlp.up_proj")):
        with pytest.raises(UserError, match=words) as error:
            load(spoilt(change.__name__, change))
        assert "\n" not in str(error.value)


def test_code_of_a_foreign_model_never_runs(foreign, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    folder = shutil.copytree(foreign["llama"], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Trap()}))
    with pytest.raises(UserError, match="cannot load"):
        load(folder)
    folder = shutil.copytree(foreign["llama"], tmp_path / "code")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {
        "model_type": "other", "auto_map": {name: f"code.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    with pytest.raises(UserError, match="cannot load .*code"):
        load(folder)
    assert not (tmp_path / "sprung").exists()


def test_tokenizers_that_change_a_text_have_no_bits_per_byte():
    from tokenizers import normalizers
    _, loaded = llama_like()
    changes = [normalizers.Lowercase(), normalizers.Replace(" ", "\u2581")]
    loaded.backend_tokenizer.normalizer = normalizers.Sequence(changes)
    with pytest.raises(ValueError, match="changes or drops characters"):
        unwritten_bytes(HuggingFaceTokenizer(loaded.backend_tokenizer, "<s>"))


@pytest.mark.parametrize("script", [base_loss, base_eval])
def test_hf_path_excludes_our_own_models(script, capsys):
    with pytest.raises(SystemExit) as error:
        script.main(["--hf-path", "gpt2", "--model-tag", "d4"])
    assert error.value.code == 2 and "--hf-path names a model of its own" in capsys.readouterr().err

# -----------------------------------------------------------------------------
# The tokenizer and the chat template of an export

@pytest.fixture(scope="module")
def tokenizer():
    files = [path.read_text("utf-8") for path in sorted(Path(hf_model.__file__).parent.glob("*.py"))]
    return RustBPETokenizer.train_from_iterator([*CORPUS, *files], 1500)


def odd_strings(num, seed=0):
    """Random strings over pieces that are hard to split alike: any code point, digits, blanks, special tokens."""
    rng = random.Random(seed)
    marks = ["'s", "'LL", "'\u017f", "'Re", "\r\n", "\n", "\t", " ", "\u00a0", "\u3000", "\u0085", "\u200b", "\ufeff",
             "\x00", "\x1c", "e\u0301", "\u0345", "12", "٣٤", "Ⅻ", "½", "²", "👩‍👩‍👧", "🇨🇭", "don't", "naïve", "ß", "İ",
             "ﬁ", "<|", "|>", "\ufdd0", "\ufffe"]

    def piece():
        kind = rng.randrange(6)
        if kind == 0:
            codes = [rng.choice([(0, 0x300), (0, 0xD800), (0xE000, 0x110000)]) for _ in range(rng.randrange(1, 8))]
            return "".join(chr(rng.randrange(*code)) for code in codes)
        if kind == 1:
            return rng.choice([" ", "\n", "\t", "\r\n", "  \n"]) * rng.randrange(1, 20)
        if kind == 2:
            return str(rng.randrange(10 ** rng.randrange(1, 20)))
        if kind == 3:
            return rng.choice(SPECIAL_TOKENS)[rng.randrange(2):]
        return rng.choice(marks) if kind == 4 else rng.choice(CORPUS)[rng.randrange(30):rng.randrange(30, 60)]

    return ["".join(piece() for _ in range(rng.randrange(1, 9))) for _ in range(num)]


def test_ten_thousand_odd_strings_have_the_same_ids(tokenizer, tmp_path):
    """As they stand, where none spells a special token; all of them when special tokens count as text, as for us."""
    from tokenizers import Tokenizer
    to_hugging_face(tokenizer).save(str(tmp_path / "tokenizer.json"))
    loaded, texts = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), odd_strings(10_000)
    ours, plain = tokenizer.encode(texts), [not any(token in text for token in SPECIAL_TOKENS) for text in texts]
    theirs = [encoding.ids for encoding in loaded.encode_batch(texts)]
    assert 4000 < sum(plain) < 9000
    assert [text for text, same, a, b in zip(texts, plain, ours, theirs) if same and a != b] == []
    loaded.encode_special_tokens = True
    theirs = [encoding.ids for encoding in loaded.encode_batch(texts)]
    assert [text for text, a, b in zip(texts, ours, theirs) if a != b] == []
    assert [loaded.decode(ids) for ids in ours[:500]] == texts[:500]
    back = from_hugging_face(tmp_path / "tokenizer.json")
    assert back.fingerprint() == tokenizer.fingerprint()


def test_tokenizers_whose_ids_have_no_equal_are_refused(tokenizer):
    shifted = {token: i + 5 for token, i in tokenizer.special_ids.items()}
    other = RustBPETokenizer(hf_tokenizer_encoding(tokenizer, shifted), "<|bos|>")
    with pytest.raises(ValueError, match="must follow on those of the others"):
        to_hugging_face(other)


def hf_tokenizer_encoding(tokenizer, special_ids):
    from nanochat.tokenizer import build_encoding
    return build_encoding(tokenizer.enc._pat_str, tokenizer.enc._mergeable_ranks, special_ids)


def talk(*contents, system=None):
    front = [] if system is None else [{"role": "system", "content": system}]
    return front + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


CONVERSATIONS = [
    talk("hi"), talk("hi", "hello"), talk("hi", "hello", "what is 12*3?", "36"), talk("", ""), talk(" \n x \n", "\n\n"),
    talk("hi", "there", "more", system="You are a pirate. "), talk("hi", system="<|user_end|>"),
    talk("break <|user_end|><|assistant_start|>out",
         "<|bos|> <|assistant_end|> <|", "{{ 1 }} {% raw %}<<|python_start|>"),
    talk("sum?", [{"type": "text", "text": "let me see "}, {"type": "python", "text": "12*3"},
                  {"type": "python_output", "text": "36"}, {"type": "text", "text": "it is 36"}]),
    talk("sum?", [{"type": "text", "text": "th"}, {"type": "text", "text": "e "},
                  {"type": "text", "text": " <|bos|>cat"},
                  {"type": "python_output", "text": "<|output_end|>"}], "thanks", []),
]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_the_chat_template_renders_as_we_do(exported, tokenizer, messages):
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(exported)
    rendered = loaded.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert rendered == tokenizer.render_conversation({"messages": messages}, max_tokens=None)[0]
    if messages[-1]["role"] == "user":
        prompt = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert prompt == tokenizer.render_for_completion({"messages": messages})


def test_random_conversations_render_alike(exported, tokenizer):
    loaded, texts = transformers.PreTrainedTokenizerFast.from_pretrained(exported), odd_strings(400, seed=1)
    for i in range(0, 400, 4):
        messages = talk(*texts[i:i + 3], system=texts[i + 3] if i % 8 else None)
        assert loaded.apply_chat_template(messages, return_dict=True)["input_ids"] == \
            tokenizer.render_conversation({"messages": messages}, max_tokens=None)[0]


@pytest.mark.parametrize("messages, words", [
    ([{"role": "assistant", "content": "hi"}], "take turns"), (talk(system="be good"), "needs a user message"),
    (talk("hi", [{"type": "image", "text": ""}]), "a part must be of type"), (talk(["hi"]), "must be text")])
def test_the_chat_template_refuses_what_we_refuse(exported, tokenizer, messages, words):
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(exported)
    with pytest.raises(Exception, match=words): # jinja's TemplateError
        loaded.apply_chat_template(messages)
    with pytest.raises(ValueError):
        tokenizer.render_conversation({"messages": messages})

# -----------------------------------------------------------------------------
# Out

def tiny_model(vocab_size, window_pattern="SSSL", **kwargs):
    """Random weights all over, so that every part of the model shows in the logits."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(sequence_len=32, vocab_size=vocab_size, n_layer=4, n_head=4, n_kv_head=2, n_embd=64,
                          window_pattern=window_pattern), **kwargs)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(model, tokenizer, source="sft", tag="d4", **meta):
    save_checkpoint(checkpoint_dir(source, tag), 7, model.state_dict(), None,
                    {"step": 7, "model_config": asdict(model.config), **meta}, tokenizer=tokenizer)


def export(out, source="sft", *flags):
    hf_model.main(["export", "--source", source, "--out", str(out), *flags])
    return str(out)


@pytest.fixture(scope="module")
def stages(tmp_path_factory, tokenizer):
    """A base directory with a checkpoint in the stage sft: all features on, V no multiple of 64."""
    base = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        model = tiny_model(tokenizer.get_vocab_size())
        model.value_embeds.to(torch.bfloat16) # as on CUDA: dtypes differ within a file
        save(model, tokenizer, val_bpb=0.5, lineage={"tokenizer": tokenizer.fingerprint(), "seed": 3})
        yield base


@pytest.fixture(scope="module")
def exported(stages, tmp_path_factory):
    return export(tmp_path_factory.mktemp("exported") / "out")


@pytest.fixture(scope="module")
def ours(stages):
    return load_model("sft", "cpu", "eval", dtype=torch.float32)[0]


@pytest.fixture(scope="module")
def theirs(exported):
    return transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()


def random_ids(*shape, seed=0, high=1400):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def test_the_modeling_file_is_a_small_wrapper_around_our_own_file(exported):
    wrapper = Path(exported, "modeling_nanochat.py").read_text()
    assert len(wrapper.splitlines()) <= 120 and "softmax" not in wrapper and "Linear" not in wrapper
    source = Path(hf_model.__file__).with_name("gpt.py").read_text()
    assert Path(exported, "gpt.py").read_text() == source.replace("from nanochat.", "from .")


@torch.no_grad()
def test_logits_of_an_export(ours, theirs):
    ids = random_ids(3, 50) # longer than the windows, and than the context
    expected, labels = ours(ids), ids.masked_fill(ids % 3 == 0, -100)
    out = theirs(ids, labels=labels)
    assert (out.logits - expected).abs().max() < 1e-4 and expected.std() > 0.5
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert out.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    summed = theirs(ids, labels=labels, num_items_in_batch=10, return_dict=False)[0] # as a Trainer calls it
    assert summed.item() == pytest.approx(loss.item() * (labels[:, 1:] != -100).sum().item() / 10, rel=1e-5)
    assert torch.equal(theirs(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    assert torch.equal(theirs(ids, logits_to_keep=torch.tensor([4, 9])).logits, out.logits[:, [4, 9]])


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_on_either_side_changes_nothing(ours, theirs, use_cache):
    lengths, T = [30, 1, 17], 30
    rows = [random_ids(1, length, seed=length) for length in lengths]
    for left in (True, False):
        ids, mask = torch.zeros(3, T, dtype=torch.long), torch.zeros(3, T, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(T - row.size(1), T) if left else slice(0, row.size(1))
            ids[i, place], mask[i, place] = row[0], 1
        logits = theirs(ids, attention_mask=mask, use_cache=use_cache).logits
        for i, row in enumerate(rows):
            assert (logits[i][mask[i] == 1] - ours(row)[0]).abs().max() < 1e-4


@torch.no_grad()
def test_a_cache_may_be_filled_in_pieces(ours, theirs):
    """Pieces of 9, 1 and 14 tokens after padding of 0 and 5, against the whole without padding."""
    ids, mask = random_ids(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, :5] = 0
    cache, parts = None, []
    for start, end in ((0, 9), (9, 10), (10, 24)):
        out = theirs(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    logits = torch.cat(parts, dim=1)
    assert (logits[0] - ours(ids[:1])[0]).abs().max() < 1e-4
    assert (logits[1, 5:] - ours(ids[1:, 5:])[0]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="attention_mask must have the shape"):
        theirs(ids[:, :1], attention_mask=mask[:, :1], past_key_values=cache)


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generation_in_a_padded_batch(ours, theirs, exported, tokenizer, settings):
    """Greedy tokens of each prompt are those of our plain loop alone, beyond windows and context."""
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(exported)
    texts = ["the cat sat on the mat, and the dog", "x", "12*3 is 36"]
    batch = loaded(["<|bos|>" + text for text in texts], return_tensors="pt", padding=True)
    assert batch.input_ids[1, 0] == loaded.pad_token_id and batch.attention_mask[1, 0] == 0
    out = theirs.generate(**batch, max_new_tokens=40, do_sample=False, eos_token_id=None, **settings)
    for text, row in zip(texts, out.tolist()):
        expected = list(ours.generate(tokenizer.encode(text, prepend="<|bos|>"), 40, temperature=0))
        assert row[-40:] == expected


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}], ids=str)
def test_generation_after_padding_on_the_right(ours, theirs, settings):
    """What `transformers` warns of: here an answer goes on behind its own prompt all the same."""
    rows, T = [random_ids(1, length, seed=length) for length in (12, 3)], 12
    ids, mask = torch.zeros(2, T, dtype=torch.long), torch.zeros(2, T, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, :row.size(1)], mask[i, :row.size(1)] = row[0], 1
    out = theirs.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None, **settings)
    for i, row in enumerate(rows):
        assert out[i, T:].tolist() == list(ours.generate(row[0].tolist(), 20, temperature=0))


@torch.no_grad()
def test_compiled_it_gives_the_same_with_a_cache_and_without(theirs):
    ids, compiled = random_ids(2, 12), torch.compile(theirs, backend="eager")
    for use_cache in (True, False):
        assert (compiled(ids, use_cache=use_cache).logits - theirs(ids).logits).abs().max() < 1e-4


@torch.no_grad()
def test_beams_find_what_an_exhaustive_search_finds(ours, theirs):
    """Among all pairs of tokens that begin with one of the 20 likeliest: what 20 beams look through in two steps."""
    ids = random_ids(1, 6)
    first = ours(ids)[0, -1].log_softmax(-1)
    best, tokens = max((value + pair.max().item(), [token, pair.argmax().item()])
                       for value, token in zip(*(part.tolist() for part in first.topk(20)))
                       for pair in [ours(torch.cat([ids, torch.tensor([[token]])], 1))[0, -1].log_softmax(-1)])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), num_beams=20, max_new_tokens=2, do_sample=False,
                          eos_token_id=None)
    assert out[0, -2:].tolist() == tokens and math.isfinite(best)


def test_an_export_can_be_trained_and_saved(theirs, exported, tmp_path):
    model, ids = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True), random_ids(2, 16)
    model.train()
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.past_key_values is None and all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=True).save_pretrained(tmp_path)
    shutil.copy(Path(exported, "nanochat_meta.json"), tmp_path)
    hf_model.main(["import", str(tmp_path), "--source", "rl", "--model-tag", "trained"])
    back, saved = (load_checkpoint(checkpoint_dir(*name), 7, "cpu")[0] for name in (("rl", "trained"), ("sft", "d4")))
    assert all(torch.equal(back[key][:1500].float(), tensor[:1500].float()) for key, tensor in saved.items())
    half = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, dtype=torch.bfloat16)
    assert half.gpt.resid_lambdas.dtype == torch.float32 and half.gpt.lm_head.weight.dtype == torch.bfloat16
    logits = half.eval()(ids).logits
    assert logits.dtype == torch.float32 and (logits - theirs(ids).logits).abs().max() < 0.5


def test_the_readme_of_an_export_runs_as_it_stands(exported, tokenizer, capsys):
    code = re.search(r"```python\n(.*?)```", Path(exported, "README.md").read_text(), re.DOTALL)[1]
    scope = {"FOLDER": exported}
    exec(code, scope)
    prompt = "<|bos|><|user_start|>Who are you?<|user_end|><|assistant_start|>"
    assert scope["tokenizer"].decode(scope["prompt"]["input_ids"][0]) == prompt and prompt in capsys.readouterr().out
    plain = transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=True, add_bos_token=True)
    assert plain("the cat").input_ids == tokenizer.encode("the cat", prepend="<|bos|>")
    text = "the <|bos|> cat"
    assert scope["tokenizer"](text, split_special_tokens=True).input_ids == tokenizer.encode(text)


def test_an_export_needs_no_nanochat(exported, theirs, tmp_path):
    ids = random_ids(1, 20)
    code = ("import sys, torch, transformers; sys.modules['nanochat'] = None\n"
            "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
            f"torch.save(model(torch.tensor({ids.tolist()})).logits.detach(), 'logits.pt')")
    done = subprocess.run([sys.executable, "-c", code, exported], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), theirs(ids).logits)


@pytest.mark.parametrize("lambdas", [True, False])
def test_a_model_that_is_nanochat_of_transformers_becomes_that(tokenizer, tmp_path, monkeypatch, lambdas):
    """Scalars at rest count as none. Theirs has rotary tables in fp32, ours in bf16 unless told otherwise."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    model = tiny_model(tokenizer.get_vocab_size(), "L", value_embeds=False, lambdas=lambdas)
    if lambdas:
        model.resid_lambdas.data.fill_(1)
        model.x0_lambdas.data.fill_(0)
    save(model, tokenizer, "base")
    out = export(tmp_path / "out", "base")
    assert not list(Path(out).glob("*.py"))
    native = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(native) is transformers.NanoChatForCausalLM
    model.rotary_dtype = torch.float32
    model.init_rotary()
    ids = random_ids(2, 32)
    with torch.no_grad():
        expected = model(ids)
        assert (native(ids).logits - expected).abs().max() < 1e-4 and expected.std() > 0.5
    hf_model.main(["import", out, "--source", "base", "--model-tag", "back"])
    assert_same_weights(model, load_checkpoint(checkpoint_dir("base", "back"), 7, "cpu")[0])
    hf, hf_tokenizer = load(out) # and ours may be evaluated as a foreign model
    assert hf.config.sequence_len == 32 and hf_tokenizer.encode("the cat") == tokenizer.encode("the cat")


def assert_same_weights(model, data):
    assert data.keys() == model.state_dict().keys()
    V = model.config.vocab_size
    for key, tensor in model.state_dict().items():
        rows = slice(V if tensor.size(0) > V else None)
        assert data[key].dtype == tensor.dtype and data[key].shape == tensor.shape, key
        assert torch.equal(data[key][rows], tensor[rows]), key


def test_import_gives_back_the_checkpoint(exported, tokenizer):
    hf_model.main(["import", exported, "--source", "mid", "--model-tag", "back"])
    data, _, meta = load_checkpoint(checkpoint_dir("mid", "back"), 7, "cpu")
    model = tiny_model(tokenizer.get_vocab_size())
    model.value_embeds.to(torch.bfloat16)
    assert_same_weights(model, data)
    assert meta["val_bpb"] == 0.5 and meta["lineage"]["seed"] == 3 and meta["model_config"] == asdict(model.config)
    _, loaded, _ = build_model(checkpoint_dir("mid", "back"), 7, "cpu", "eval")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    with pytest.raises(UserError, match="holds a checkpoint already: name another --model-tag"):
        hf_model.main(["import", exported, "--source", "mid", "--model-tag", "back"])


def test_import_refuses_what_is_no_whole_export(exported, foreign, stages, tmp_path):
    def spoilt(name, file, **changes):
        folder = shutil.copytree(exported, tmp_path / name)
        (folder / file).write_text(json.dumps(read_json(folder / file) | changes))
        return folder

    config = read_json(Path(exported, "nanochat_meta.json"))["model_config"]
    cut = shutil.copytree(exported, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 5000)
    for folder, words in (
            (tmp_path, "FileNotFoundError"), (foreign["gpt2"], "nanochat_meta.json"), (cut, "Safetensor"),
            (spoilt("a", "nanochat_meta.json", model_config=config | {"vocab_size": 999}), "1500 tokens in its token"),
            (spoilt("b", "nanochat_meta.json", model_config=config | {"n_layer": 6}), "KeyError"),
            (spoilt("c", "nanochat_meta.json", model_config=config | {"n_layer": 2}), "Unexpected key"),
            (spoilt("d", "tokenizer.json", pre_tokenizer={}), "is no tokenizer of nanochat")):
        with pytest.raises(UserError, match=f"is no whole export of nanochat .*{words}") as error:
            hf_model.main(["import", str(folder), "--source", "rl", "--model-tag", "x"])
        assert "\n" not in str(error.value)
    assert not os.path.exists(checkpoint_dir("rl", "x"))


def test_export_overwrites_nothing_and_leaves_nothing_half_written(stages, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder: name another --out"):
        export(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(hf_model, "write_json", lambda path, value: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["empty", "full"] and os.listdir(tmp_path / "empty") == []
    export(tmp_path / "empty")
    assert "model.safetensors" in os.listdir(tmp_path / "empty") and "trust_remote_code=True" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        export(tmp_path / "new", "base")
    with pytest.raises(SystemExit, match="2"):
        hf_model.main(["export", "--source", "gpt"])


@pytest.mark.slow
def test_lm_eval_evaluates_an_export(exported, ours, tokenizer, tmp_path):
    """A tiny task of two choices, offline: its answers are the ones to which our model gives more."""
    for package in ("lm_eval", "accelerate"):
        pytest.importorskip(package, reason="lm-eval is not installed: pip install 'lm-eval[hf]'")
    import lm_eval
    items = [{"question": f"the cat sat on mat {i} and", "choices": ["ate", "the big dog"]} for i in range(12)]

    @torch.no_grad()
    def likelihood(question, choice):
        before, whole = (tokenizer.encode(text, prepend="<|bos|>") for text in (question, f"{question} {choice}"))
        losses = ours(torch.tensor([whole[:-1]]), torch.tensor([whole[1:]]), loss_reduction="none")
        return -losses[len(before) - 1:].sum().item()

    scores = [[likelihood(item["question"], choice) for choice in item["choices"]] for item in items]
    for i, item in enumerate(items): # the better choice is right in 8 of 12
        item["gold"] = scores[i].index(max(scores[i])) if i % 3 else scores[i].index(min(scores[i]))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.jsonl\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{gold}}'\n"
        "doc_to_choice: '{{choices}}'\nmetric_list:\n  - metric: acc\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        out = lm_eval.simple_evaluate(
            model="hf", tasks=["tiny"], batch_size=4, device="cpu", log_samples=True,
            model_args={"pretrained": exported, "trust_remote_code": True, "add_bos_token": True, "dtype": "float32"},
            task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path)))
    assert out["results"]["tiny"]["acc,none"] == pytest.approx(8 / 12)
    for sample, expected in zip(out["samples"]["tiny"], scores, strict=True):
        assert [value for (value, _), in sample["resps"]] == pytest.approx(expected, abs=1e-3)
