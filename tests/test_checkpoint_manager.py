"""Steps on disk: round trips, published generations, damage, full disks, and what is chosen when nothing is named."""
import argparse
import errno
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
from dataclasses import asdict

import pytest
import torch
import torch.multiprocessing as mp

from nanochat import checkpoint_manager as cm
from nanochat.common import Compute, UserError, write_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer

ONE_RANK = Compute(False, 0, 0, 1, torch.device("cpu"))
CONFIG = GPTConfig(sequence_len=16, vocab_size=270, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL")
IDS = torch.arange(24).view(2, 12) * 7 % 270


@pytest.fixture(scope="module")
def tokenizer():
    """265 + 5 tokens: V = 270, which is padded to 320 rows."""
    return RustBPETokenizer.train_from_iterator(["the cat sat on the mat, the hat and the bat"] * 20, CONFIG.vocab_size)


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tokenizer.save(str(tmp_path / "tokenizer"))
    return tmp_path


def make_model(seed=0, **legacy):
    """A small model with every weight non-zero, so that each of them matters to the logits."""
    torch.manual_seed(seed)
    model = GPT(CONFIG, **legacy)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def save(folder, step=1, model=None, config=None, optimizer=None, tokenizer=None, **meta):
    model = model or make_model()
    config = asdict(CONFIG) if config is None else config
    meta = {"model_config": config, **meta}
    cm.save_checkpoint(str(folder), step, model.state_dict(), optimizer, meta, tokenizer=tokenizer)
    return model


def names(folder):
    return sorted(os.listdir(folder))


# ---- round trips ----

def test_what_is_saved_is_loaded_bit_for_bit(base):
    folder = base / "run"
    state = {"state": {0: {"exp_avg": torch.randn(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    model = save(folder, 1234567, optimizer=state, val_bpb=float("inf"))
    assert names(folder) == ["meta_1234567.json", "model_1234567.pt", "optim_1234567_rank0.pt"]
    weights, optimizer, meta = cm.load_checkpoint(str(folder), 1234567, "cpu", load_optimizer=True)
    assert list(weights) == list(model.state_dict())
    assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
    assert torch.equal(optimizer["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert meta["val_bpb"] is None, "infinity is not JSON"
    assert meta["world_size"] == 1 and GPTConfig(**meta["model_config"]) == CONFIG
    assert sorted(meta["files"]) == ["model_1234567.pt", "optim_1234567_rank0.pt"]
    assert cm.load_checkpoint(str(folder), 1234567, "cpu")[1] is None


def test_a_loaded_model_computes_the_same_logits(base, tokenizer):
    model = save(base / "run", tokenizer=tokenizer)
    loaded, its_tokenizer, _ = cm.build_model(str(base / "run"), 1, "cpu", "eval")
    assert torch.equal(loaded(IDS), model(IDS))
    assert not loaded.training and loaded.get_device() == torch.device("cpu")
    assert its_tokenizer.fingerprint() == tokenizer.fingerprint()
    assert cm.build_model(str(base / "run"), 1, torch.device("cpu"), "train")[0].training


def test_no_weight_is_drawn_at_random_while_loading(base, monkeypatch):
    save(base / "run")
    before = torch.get_rng_state()
    monkeypatch.setattr(GPT, "init_weights", lambda self: pytest.fail("only the rotary tables are to be made"))
    cm.build_model(str(base / "run"), 1, "cpu", "eval")
    assert torch.equal(before, torch.get_rng_state())


def test_meta_can_be_changed_later(base):
    save(base / "run", 1, val_bpb=None)
    cm.update_meta(str(base / "run"), 1, val_bpb=1.25)
    assert cm.load_checkpoint(str(base / "run"), 1, "cpu")[2]["val_bpb"] == 1.25
    assert "files" in json.loads((base / "run" / "meta_000001.json").read_text("utf-8"))


def test_meta_with_infinity_is_read(base):
    save(base / "run")
    path = base / "run" / "meta_000001.json"
    path.write_text(path.read_text("utf-8").replace('"step": 1', '"step": 1, "min_val_bpb": Infinity'), "utf-8")
    assert cm.load_checkpoint(str(base / "run"), 1, "cpu")[2]["min_val_bpb"] == float("inf")


@pytest.mark.parametrize("phase, matrices", [("eval", torch.bfloat16), ("train", torch.float32)])
def test_dtype_policy(base, phase, matrices):
    reference = save(base / "run")
    model, _, _ = cm.build_model(str(base / "run"), 1, "cpu", phase, dtype=torch.bfloat16)
    assert model.compute_dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.ndim == 2} == {matrices}
    assert model.x0_lambdas.dtype == torch.float32
    reference.compute_dtype = torch.bfloat16
    assert torch.equal(model(IDS), reference(IDS)), "casting once equals casting on every use"


def test_bf16_files_become_fp32_on_cpu(base):
    model = save(base / "run", model=make_model().to(torch.bfloat16))
    loaded, _, _ = cm.build_model(str(base / "run"), 1, "cpu", "eval")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())


# ---- generations of published files ----

def save_published(folder, state, config, step=650):
    """As the project's older versions wrote: weights in place, a meta with little more than the config."""
    folder.mkdir(parents=True)
    torch.save(state, folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"model_config": config}), "utf-8")


def config_without_windows():
    return {key: value for key, value in asdict(CONFIG).items() if key != "window_pattern"}


def neutral(state, model):
    """The state of a generation-C model whose additions have no effect: what generation A and B files mean."""
    tables = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()
              if re.search("value_embeds|ve_gate", key)}
    return {"resid_lambdas": torch.ones(3), "x0_lambdas": torch.zeros(3)} | tables | state


@pytest.mark.parametrize("rows", ["V", "Vp"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("generation", ["A", "B", "C"])
def test_published_generations_load(base, caplog, generation, prefix, rows):
    padding = {"pad_vocab_size_to": 1 if rows == "V" else 64}
    source = make_model(value_embeds=generation == "C", lambdas=generation != "A", **padding)
    state = source.state_dict()
    assert state["lm_head.weight"].size(0) == (270 if rows == "V" else 320)
    config = config_without_windows() if generation == "A" else asdict(CONFIG)
    save_published(base / "base_checkpoints" / "d20", {prefix + key: tensor for key, tensor in state.items()}, config)
    with caplog.at_level(logging.WARNING):
        model, _, meta = cm.load_model("base", "cpu", "eval")
    assert ("no window_pattern" in caplog.text) == (generation == "A")
    assert (meta["model_tag"], meta["step"], meta["source"]) == ("d20", 650, "base")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in source.parameters())

    windows = {"window_pattern": "L" if generation == "A" else "SL"}
    reference = GPT(GPTConfig(**asdict(CONFIG) | windows), **padding)
    reference.load_state_dict(neutral(state, reference))
    reference.init_rotary()
    ids = torch.arange(40).view(2, 20) % 270 # longer than sequence_len: windows matter
    assert torch.equal(model(ids), reference(ids))


def test_one_missing_scalar_is_filled_in(base):
    state = make_model(value_embeds=False).state_dict()
    del state["x0_lambdas"]
    save_published(base / "run", state, asdict(CONFIG))
    model, _, _ = cm.build_model(str(base / "run"), 650, "cpu", "eval")
    assert torch.equal(model.x0_lambdas, torch.zeros(3)) and model.x0_lambdas.dtype == torch.float32


@pytest.mark.parametrize("extra", [
    {"bigram_embed.embed.weight": torch.zeros(8, 32), "bigram_lambdas": torch.zeros(3)},
    {"smear_gate.weight": torch.zeros(1, 12)},
    {"backout_lambda": torch.zeros(1)},
    {"transformer.h.0.attn.ve_gate.weight": torch.zeros(1, 12)},
])
def test_later_generations_are_refused(base, extra):
    save_published(base / "run", make_model().state_dict() | extra, asdict(CONFIG))
    with pytest.raises(ValueError, match="later generation .*before 27 January 2026"):
        cm.build_model(str(base / "run"), 650, "cpu", "eval")


def test_other_misfits_are_refused_in_one_line(base):
    state = make_model().state_dict()
    del state["lm_head.weight"]
    save_published(base / "run", state, asdict(CONFIG))
    with pytest.raises(ValueError, match="do not fit their config.*lm_head.weight") as caught:
        cm.build_model(str(base / "run"), 650, "cpu", "eval")
    assert "\n" not in str(caught.value)


def test_unknown_config_entries_are_dropped_with_a_warning(base, caplog):
    save(base / "run", config=asdict(CONFIG) | {"dropout": 0.1})
    with caplog.at_level(logging.WARNING):
        cm.build_model(str(base / "run"), 1, "cpu", "eval")
    assert "ignoring unknown entries of the saved config: dropout" in caplog.text


def test_a_file_that_would_run_code_is_refused(base):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(base / "pwned"),)
    save_published(base / "run", {"transformer.wte.weight": Evil()}, asdict(CONFIG))
    with pytest.raises(cm.DamagedCheckpoint, match="no file of plain tensors"):
        cm.build_model(str(base / "run"), 650, "cpu", "eval")
    assert not (base / "pwned").exists()


# ---- what counts as complete ----

def test_steps_are_compared_as_numbers_and_strays_ignored(base):
    folder = base / "run"
    for step in (200, 999999, 1000000):
        save(folder, step)
    for stray in ("model_000300_backup.pt", "model_000400.pt", "meta_000500.json.tmp", "meta_000600.json",
                  "meta_7.json"):
        (folder / stray).write_text("{}", "utf-8")
    assert cm.complete_steps(str(folder)) == [200, 999999, 1000000]
    assert cm.find_last_step(str(folder)) == 1000000


def test_a_meta_cut_short_makes_no_step(base):
    save(base / "run", 1)
    save(base / "run", 2)
    path = base / "run" / "meta_000002.json"
    path.write_text(path.read_text("utf-8")[:50], "utf-8")
    assert cm.complete_steps(str(base / "run")) == [1]


def test_missing_things_say_what_is_there(base):
    with pytest.raises(FileNotFoundError, match="no complete checkpoint in .*nowhere"):
        cm.find_last_step(str(base / "nowhere"))
    with pytest.raises(FileNotFoundError, match="run `python -m scripts.mid_train` first"):
        cm.load_model("mid", "cpu", "eval")
    save(base / "run", 3)
    with pytest.raises(FileNotFoundError, match="no complete step 4 .*complete steps there: 3"):
        cm.load_checkpoint(str(base / "run"), 4, "cpu")
    with pytest.raises(FileNotFoundError, match="no optimizer state"):
        cm.load_checkpoint(str(base / "run"), 3, "cpu", load_optimizer=True)
    with pytest.raises(ValueError, match="one of base, mid, sft, rl, got 'pretrain'"):
        cm.load_model("pretrain", "cpu", "eval")
    with pytest.raises(ValueError, match="phase must be train or eval"):
        cm.build_model(str(base / "run"), 3, "cpu", "test")


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_byte, cut, os.unlink])
def test_a_damaged_newest_step_is_passed_over_unless_it_was_named(base, capsys, damage):
    folder = base / "base_checkpoints" / "d3"
    first = save(folder, 1)
    save(folder, 2, model=make_model(seed=1))
    damage(folder / "model_000002.pt")
    model, _, meta = cm.load_model("base", "cpu", "eval")
    assert meta["step"] == 1 and torch.equal(model(IDS), first(IDS))
    assert "step 1" in capsys.readouterr().out
    with pytest.raises(cm.DamagedCheckpoint, match="step 2 .* is damaged .*model_000002.pt"):
        cm.load_model("base", "cpu", "eval", step=2)
    damage(folder / "model_000001.pt")
    with pytest.raises((cm.DamagedCheckpoint, FileNotFoundError), match="damaged|no complete checkpoint"):
        cm.load_model("base", "cpu", "eval", model_tag="d3")


def test_a_published_file_cut_short_is_noticed(base):
    folder = base / "run"
    save_published(folder, make_model().state_dict(), asdict(CONFIG))
    cut(folder / "model_000650.pt")
    with pytest.raises(cm.DamagedCheckpoint):
        cm.last_sound_step(str(folder))


def test_a_new_run_does_not_mix_with_an_old_one(base):
    folder = str(base / "run")
    assert cm.step_to_resume(folder, resume=True, overwrite=False) is None, "nothing there: start afresh"
    save(folder, 1)
    save(folder, 2)
    with pytest.raises(UserError, match="holds checkpoints up to step 2: pass --resume to go on, --overwrite"):
        cm.step_to_resume(folder, resume=False, overwrite=False)
    assert cm.step_to_resume(folder, resume=False, overwrite=True) is None
    assert cm.step_to_resume(folder, resume=True, overwrite=False) == 2
    assert cm.step_to_resume(folder, False, False, from_step=2) == cm.step_to_resume(folder, True, False, 2) == 2
    with pytest.raises(UserError, match="step 2: pass --overwrite as well to delete those after step 1, or --resume"):
        cm.step_to_resume(folder, resume=False, overwrite=False, from_step=1)
    assert cm.step_to_resume(folder, resume=False, overwrite=True, from_step=1) == 1
    flip_a_byte(base / "run" / "model_000002.pt")
    assert cm.step_to_resume(folder, resume=True, overwrite=False) == 1


def test_exactly_the_later_steps_are_deleted(base):
    cm.delete_steps(str(base / "none"))
    for step in (1, 2, 1234567):
        save(base / "run", step, optimizer={"of": torch.tensor(0)})
    (base / "run" / "optim_000003_rank12.pt").write_bytes(b"of a killed save")
    (base / "run" / "metrics.jsonl").touch()
    cm.delete_steps(str(base / "run"), after=1)
    assert names(base / "run") == ["meta_000001.json", "metrics.jsonl", "model_000001.pt", "optim_000001_rank0.pt"]
    cm.delete_steps(str(base / "run"))
    assert names(base / "run") == ["metrics.jsonl"]


# ---- failures while saving ----

def disk_full_after(limit, monkeypatch):
    """torch.save writes `limit` bytes and then meets a full disk."""
    def failing_save(data, file):
        file.write(b"x" * limit)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(torch, "save", failing_save)


@pytest.mark.parametrize("step", [1, 2])
def test_a_full_disk_leaves_the_older_steps_and_no_garbage(base, monkeypatch, step):
    """Also when the step that fails is there already."""
    folder = base / "run"
    model = save(folder, 1)
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    disk_full_after(1000, monkeypatch)
    with pytest.raises(UserError, match=rf"could not save step {step} .*No space left.*make room"):
        save(folder, step, model=make_model(seed=1))
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    monkeypatch.undo()
    assert torch.equal(cm.load_checkpoint(str(folder), 1, "cpu")[0]["lm_head.weight"], model.lm_head.weight)


def test_a_full_disk_at_the_meta_file(base, monkeypatch):
    save(base / "run", 1)
    before = names(base / "run")
    def failing_write(path, value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(cm, "write_json", failing_write)
    with pytest.raises(UserError, match="No space left"):
        save(base / "run", 2)
    assert names(base / "run") == before


@pytest.mark.parametrize("written", range(4))
def test_a_kill_while_saving_leaves_no_half_step(base, monkeypatch, written):
    """The process vanishes after `written` of the renames; the next save clears what it left."""
    folder, replace, done = base / "run", os.replace, []
    save(folder, 1)

    class Killed(BaseException):
        pass

    def counting_replace(source, target):
        if len(done) == written:
            raise Killed
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", counting_replace)
    with pytest.raises(Killed):
        save(folder, 2, optimizer={"state": {}})
    monkeypatch.undo()
    assert cm.complete_steps(str(folder)) == [1]
    save(folder, 3)
    assert not [name for name in names(folder) if name.endswith("tmp") and not name.startswith(".")]
    assert cm.complete_steps(str(folder)) == [1, 3]


# ---- ranks ----

def test_every_rank_writes_its_own_optimizer_state_only(base):
    cm.save_checkpoint(str(base / "run"), 5, {}, {"of": torch.tensor(3)}, {}, rank=3)
    assert names(base / "run") == ["optim_000005_rank3.pt"]


def test_shards_load_only_at_the_number_of_ranks_that_wrote_them(base):
    folder = str(base / "run")
    save(folder, 5, optimizer={"of": torch.tensor(0)})
    assert cm.load_checkpoint(folder, 5, "cpu", load_optimizer=True, rank=3)[1]["of"] == 0, "one file has it whole"
    cm.save_checkpoint(folder, 5, {}, {"of": torch.tensor(1)}, {}, rank=1)
    with pytest.raises(UserError, match="in 2 shards: resume with that many processes, got 1"):
        cm.load_checkpoint(folder, 5, "cpu", load_optimizer=True)


def _save_as_rank(rank, world_size, folder, port, fail):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    if fail and rank == 0:
        torch.save = lambda data, file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    saver = cm.Saver(folder, Compute(True, rank, rank, world_size, torch.device("cpu")))
    model = torch.nn.Linear(2, 2)
    saver.save(1, model, None, {"model_config": {}}, None)
    try:
        saver.finish()
        assert not fail and cm.load_checkpoint(folder, cm.last_sound_step(folder), "cpu")[2]["world_size"] == world_size
    except UserError as error:
        assert fail and "No space left" in str(error)
    torch.distributed.destroy_process_group()


def free_port():
    import socket
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("fail", [False, True])
def test_two_ranks_learn_together_whether_a_step_was_saved(base, fail):
    folder = str(base / "run")
    mp.spawn(_save_as_rank, (2, folder, free_port(), fail), nprocs=2)
    assert names(folder) == ([] if fail else ["meta_000001.json", "model_000001.pt"])


# ---- in the background ----

def save_in_background(saver, step, model=None):
    model = model or make_model(step)
    saver.save(step, model, None, {"model_config": asdict(CONFIG)}, None)
    return model


def test_a_step_is_saved_as_it_was_while_training_goes_on_and_told_when_it_is_durable(base, monkeypatch, capsys):
    folder, saver, go_on = str(base / "run"), cm.Saver(str(base / "run"), ONE_RANK), threading.Event()
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: go_on.wait(60) and replace(*names))
    model = save_in_background(saver, 1)
    before = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert saver.saved_step is None and cm.complete_steps(folder) == [] and "Saved" not in capsys.readouterr().out
    go_on.set()
    saver.finish()
    assert saver.saved_step == 1 and "Saved step 1" in capsys.readouterr().out
    assert torch.equal(cm.load_checkpoint(folder, 1, "cpu")[0]["lm_head.weight"], before)


def test_a_failed_save_costs_neither_the_run_nor_the_older_steps(base, monkeypatch, capsys):
    saver = cm.Saver(str(base / "run"), ONE_RANK)
    save_in_background(saver, 1)
    saver.finish()
    with monkeypatch.context() as full:
        disk_full_after(1000, full)
        save_in_background(saver, 2)
        saver._wait()
    saver.update_meta(2, val_bpb=1.0) # of a step that is not there: nothing
    assert "Warning: could not save step 2" in capsys.readouterr().out and saver.saved_step == 1
    with pytest.raises(UserError, match="could not save step 2 .*No space left"):
        saver.finish()
    save_in_background(saver, 3)
    saver.update_meta(3, val_bpb=1.5)
    saver.finish()
    assert cm.complete_steps(str(base / "run")) == [1, 3]
    assert cm.load_checkpoint(str(base / "run"), 3, "cpu")[2]["val_bpb"] == 1.5


def test_only_the_last_steps_are_kept_once_the_new_one_is_durable(base, monkeypatch):
    saver, seen = cm.Saver(str(base / "run"), ONE_RANK, keep_last=2), []
    for step in (1, 2, 3, 4):
        save_in_background(saver, step)
        saver.finish()
        seen.append(cm.complete_steps(str(base / "run")))
    assert seen == [[1], [1, 2], [2, 3], [3, 4]] and len(names(base / "run")) == 4
    disk_full_after(10, monkeypatch)
    save_in_background(saver, 5)
    saver._wait()
    assert cm.complete_steps(str(base / "run")) == [3, 4], "a step that failed takes no place"


def test_a_second_run_is_kept_out_for_as_long_as_the_first_lives(base):
    """The first is another process, which is killed: its lock goes with it."""
    folder = str(base / "run")
    code = ("from tests.test_checkpoint_manager import ONE_RANK, cm\n"
            f"with cm.hold({folder!r}, ONE_RANK):\n    print('held', flush=True)\n    input()")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another run is at work in .*run: wait for its end, or choose another"), \
                cm.hold(folder, ONE_RANK):
            pass
        first.kill()
    with cm.hold(folder, ONE_RANK):
        pass


# ---- which model when none is named ----

def make_tags(stage, *tags):
    """One checkpoint a tag, each written a minute after the one before."""
    for minute, tag in enumerate(tags):
        save(stage / tag)
        os.utime(stage / tag / "model_000001.pt", (60 * minute, 60 * minute))


def test_the_largest_model_has_a_checkpoint_and_an_exact_name(base):
    (base / "d99").mkdir()
    make_tags(base, "d12", "d4", "d20_ablation", "notes")
    assert cm.find_largest_model(str(base)) == "d12"


@pytest.mark.parametrize("tags, expected", [(["d8_b", "d8_a", "x"], "d8_b"), (["b", "a"], "a"), (["d04", "d4"], "d4")])
def test_other_guesses_and_ties(base, tags, expected):
    make_tags(base / "stage", *tags)
    assert cm.find_largest_model(str(base / "stage")) == expected


def test_a_stage_takes_the_newest_checkpoint_and_says_so(base, capsys):
    make_tags(base / "base_checkpoints", "d12", "d4", "d8")
    meta = cm.load_model("base", "cpu", "eval")[2]
    assert meta["model_tag"] == "d8"
    assert "d8, step 1 (the newest; choose with --model-tag)" in capsys.readouterr().out
    assert cm.load_model("base", "cpu", "eval", model_tag="d4")[2]["model_tag"] == "d4"


# ---- tokenizer and lineage ----

def other_tokenizer(vocab_size=CONFIG.vocab_size):
    return RustBPETokenizer.train_from_iterator(["zebra quilts fizz buzz zebra quilts fizz"] * 20, vocab_size)


def test_a_run_carries_its_tokenizer(base, tokenizer):
    save(base / "base_checkpoints" / "d3", tokenizer=tokenizer)
    other_tokenizer().save(str(base / "tokenizer")) # trained anew since
    _, loaded, _ = cm.load_model("base", "cpu", "eval")
    assert loaded.fingerprint() == tokenizer.fingerprint()


def test_another_tokenizer_is_refused_with_the_candidates(base, tokenizer):
    for tag in ("d3", "d5"):
        save(base / "base_checkpoints" / tag, lineage={"tokenizer": tokenizer.fingerprint()})
    other_tokenizer().save(str(base / "tokenizer"))
    needed = tokenizer.fingerprint()[:12]
    with pytest.raises(ValueError, match=rf"needs the tokenizer {needed} .*choose by --model-tag from d3, d5"):
        cm.load_model("base", "cpu", "eval")
    other_tokenizer(268).save(str(base / "tokenizer"))
    with pytest.raises(ValueError, match="needs a tokenizer of 270 tokens, got one of 268"):
        cm.load_model("base", "cpu", "eval")


def test_a_legacy_pickle_in_the_base_directory_serves(base, tokenizer):
    os.unlink(base / "tokenizer" / "tokenizer.json")
    with open(base / "tokenizer" / "tokenizer.pkl", "wb") as file:
        pickle.dump(tokenizer.enc, file)
    save(base / "run")
    assert cm.build_model(str(base / "run"), 1, "cpu", "eval")[1].fingerprint() == tokenizer.fingerprint()


def test_lineage_names_the_ancestors(base, tokenizer, capsys):
    data = {"name": "tinyworld", "synthetic": True, "validation_shard": "shard_00003.parquet"}
    write_json(base / "manifest.json", {**data, "files": {}})
    compute = Compute(False, 0, 0, 1, torch.device("cpu"))
    model = make_model()
    base_lineage = cm.lineage(tokenizer, argparse.Namespace(depth=3, seed=7), compute, model)
    assert (base_lineage["dtype"], base_lineage["compile"]) == (str(model.compute_dtype).split(".")[-1], "off")
    model.compute_dtype, model.block_fn = torch.bfloat16, lambda *args: None # stands for a compiled block
    now = cm.lineage(tokenizer, argparse.Namespace(), compute._replace(ddp_world_size=2), model)
    assert (now["dtype"], now["compile"]) == ("bfloat16", "on")
    capsys.readouterr()
    cm.warn_of_changes({}, now)
    cm.warn_of_changes(now, now)
    cm.warn_of_changes({**base_lineage, "dtype": "float32"}, now)
    assert capsys.readouterr().out == (
        "Warning: dtype was float32, is bfloat16; compile was off, is on; world_size was 1, is 2: "
        "the steps from here need not equal an uninterrupted run's bit for bit\n")
    assert base_lineage["parent"] is None and base_lineage["data"] == data
    assert base_lineage["seed"] == 7 and base_lineage["flags"] == {"depth": 3, "seed": 7}
    assert base_lineage["versions"]["torch"] == torch.__version__ and base_lineage["threads"] == torch.get_num_threads()
    save(base / "base_checkpoints" / "d3", 9, lineage=base_lineage)
    parent = cm.load_model("base", "cpu", "train")[2]
    child = cm.lineage(tokenizer, argparse.Namespace(), compute, model, parent)
    files = child["parent"].pop("files")
    assert list(files) == ["model_000009.pt"] and files["model_000009.pt"]["sha256"]
    assert child["parent"] == {"source": "base", "model_tag": "d3", "step": 9, "lineage": base_lineage}
    json.dumps(child)


def test_a_parent_that_was_trained_since_is_noticed(base, tokenizer):
    folder, compute = base / "base_checkpoints" / "d3", Compute(False, 0, 0, 1, torch.device("cpu"))
    save(folder, 9)
    parent = cm.lineage(tokenizer, argparse.Namespace(), compute, make_model(),
                        cm.load_model("base", "cpu", "train")[2])["parent"]
    assert cm.lineage(tokenizer, argparse.Namespace(), compute, make_model(), parent)["parent"] == parent
    cm.check_parent(parent)
    save(folder, 10)
    cm.check_parent(parent, step=9)
    with pytest.raises(UserError, match=r"started from step 9 in .*d3, which was .*now step 10\): pass --overwrite"):
        cm.check_parent(parent)
    cm.delete_steps(str(folder), after=9)
    save(folder, 9, model=make_model(seed=1))
    for step in (None, 9):
        with pytest.raises(UserError, match=r"now step 9\): pass --overwrite, not --resume"):
            cm.check_parent(parent, step)
    del parent["files"] # of an older run
    cm.check_parent(parent)


@pytest.mark.parametrize("tag", ["../base_checkpoints/d12", "/elsewhere", "..", "a/b"])
def test_a_tag_never_leads_out_of_the_folder_of_its_stage(tag):
    with pytest.raises(UserError, match="--model-tag must be a plain name"):
        cm.checkpoint_dir("sft", tag)
