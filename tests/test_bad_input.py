"""What goes wrong at the command line: one line with the cure, the right exit code, complete files as they were."""
import functools
import hashlib
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.checkpoint_manager import complete_steps
from nanochat.common import run_main

TRAIN = ("--device-type cpu --compile off --depth 1 --aspect-ratio 32 --head-dim 16 --max-seq-len 64 "
         "--device-batch-size 4 --total-batch-size 256 --eval-every -1 --core-metric-every -1 --sample-every -1 "
         "--num-iterations 3 --save-every 1")
SFT = "--device-type cpu --compile off --source base --num-iterations 1 --eval-every -1 --eval-metrics-every -1"
COMMANDS = { # name: program and its flags
    "dataset": "nanochat.dataset -n 1",
    "report": "nanochat.report generate",
    "generate": "dev.tinyworld.generate --facts 60 --documents 200 --conversations 100 --questions 20",
    "tok_train": "scripts.tok_train --vocab-size 300",
    "tok_eval": "scripts.tok_eval",
    "base_train": f"scripts.base_train {TRAIN} --model-tag new",
    "resume": f"scripts.base_train {TRAIN} --resume",
    "overwrite": f"scripts.base_train {TRAIN} --overwrite",
    "base_loss": "scripts.base_loss --device-type cpu --device-batch-size 4 --split-tokens 256",
    "base_eval": "scripts.base_eval --device-type cpu --max-per-task 2",
    "chat_sft": f"scripts.chat_sft {SFT} --overwrite",
    "chat_eval": "scripts.chat_eval -i sft --device-type cpu -x 2",
    "chat_cli": "scripts.chat_cli --device-type cpu -p hello -m 4",
}
CHECKPOINT = Path("base_checkpoints", "d1")


def main_of(command):
    """The `main` of a command of COMMANDS, or of one written out, ready to be called without arguments."""
    program, *flags = COMMANDS.get(command, command).split()
    return functools.partial(importlib.import_module(program).main, flags)


def files_below(base):
    """{relative path: hash}; nothing when it is no folder."""
    return {path.relative_to(base): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in base.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base directory with data, a tokenizer, and two of three steps in the stages base and sft. Tests take copies."""
    base = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        for command in ("generate", "tok_train", f"scripts.base_train {TRAIN}"):
            main_of(command)()
    for path in (base / CHECKPOINT).glob("*_000003*"): # as if it had been stopped after two steps
        path.unlink()
    shutil.copytree(base / "base_checkpoints", base / "chatsft_checkpoints")
    return base


@pytest.fixture
def base(world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path / "base")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9") # nothing answers there
    monkeypatch.chdir(tmp_path) # where the report is copied to
    return tmp_path / "base"


def error_of(command, base, capsys):
    """The one line that a command ends with; it must exit with 1 and leave every file that was there alone."""
    before = files_below(base)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(main_of(command))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and line.startswith("error: "), line
    after = files_below(base)
    assert {path: after.get(path) for path in before} == before
    return line.removeprefix("error: ")

# -----------------------------------------------------------------------------
# What can be wrong below a base directory

def shards(base):
    return sorted((base / "base_data").iterdir())


def write_texts(path, texts):
    pq.write_table(pa.table({"text": texts}), path)


def cut(path, keep=-100):
    path.write_bytes(path.read_bytes()[:keep])


def no_shards(base):
    shutil.rmtree(base / "base_data")


def one_shard(base):
    for path in shards(base)[:-1]:
        path.unlink()


def no_text_column(base):
    pq.write_table(pa.table({"words": ["a"]}), shards(base)[0])


def numbers_as_text(base):
    write_texts(shards(base)[0], [1, 2])


def stray_shard(base):
    write_texts(base / "base_data" / "extra.parquet", ["of other data"])


def cut_shard(base):
    cut(shards(base)[0])


def empty_file_as_shard(base):
    shards(base)[0].write_bytes(b"")


def folder_as_shard(base):
    shards(base)[0].unlink()
    (base / "base_data" / "shard_00000.parquet").mkdir()


def cut_manifest(base):
    cut(base / "manifest.json")


def foreign_manifest(base):
    (base / "manifest.json").write_text('{"hello": 1}')


def hub_rows_without_columns(base):
    for path in base.glob("hub/allenai/ai2_arc/ARC-Easy/test/*.parquet"):
        write_texts(path, ["a"])


def cut_hub_rows(base):
    for path in base.glob("hub/allenai/ai2_arc/ARC-Easy/test/*.parquet"):
        cut(path)


def latin_words(base):
    (base / "words_alpha.txt").write_bytes(b"caf\xe9")


def list_as_header(base):
    (base / "report" / "header.json").write_text("[]")


def list_as_section(base):
    (base / "report" / "tokenizer-training.json").write_text("[]")


def folder_as_report(base):
    (base / "report" / "report.md").mkdir()


def folder_as_tokenizer(base):
    shutil.rmtree(base / "tokenizer")
    (base / "tokenizer" / "tokenizer.json").mkdir(parents=True)


def cut_tokenizer(base):
    cut(base / "tokenizer" / "tokenizer.json")


def no_checkpoints(base):
    for stage in ("base", "chatsft"):
        shutil.rmtree(base / f"{stage}_checkpoints")


def half_a_checkpoint(base):
    """Every step that there is has lost the end of its weights."""
    for path in base.glob("*_checkpoints/d1/model_*.pt"):
        cut(path)


def altered_checkpoint(base):
    """Sizes are right, a byte is not."""
    for path in base.glob("*_checkpoints/d1/model_*.pt"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def another_tokenizer(base):
    """The base directory got another one, and the runs do not carry theirs."""
    main_of("scripts.tok_train --vocab-size 290")()
    for path in base.glob("*_checkpoints/d1/tokenizer"):
        shutil.rmtree(path)


def own_data(base):
    path = base / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "own-data", "synthetic": False}))


def no_manifest(base):
    (base / "manifest.json").unlink()


def bad_identity(base):
    with open(base / "identity_conversations.jsonl", "a") as file:
        file.write('[{"role": "us')


READERS = "tok_train tok_eval base_train base_loss"
TRAINERS = "tok_train base_train base_loss"
CHAT = "chat_sft chat_eval chat_cli"
DAMAGES = [ # what is wrong, who meets it, what they say
    (no_shards, TRAINERS, "need at least two shards (one for validation)", "run `python -m nanochat.dataset -n 8`"),
    (one_shard, TRAINERS, "found 1:", "run `python -m nanochat.dataset -n 8`"),
    (no_text_column, READERS, "shard_00000.parquet has no column 'text' of strings but words", "--text-column NAME"),
    (numbers_as_text, "tok_train", "shard_00000.parquet has no column 'text' of strings but text (int64)", "--from"),
    (stray_shard, "base_train", "extra.parquet in ", "is no shard of the data set tinyworld"),
    (cut_shard, f"{READERS} overwrite", "shard_00000.parquet is not a complete parquet file", "delete it"),
    (empty_file_as_shard, TRAINERS, "shard_00000.parquet is not a complete parquet file", "delete it"),
    (folder_as_shard, TRAINERS, "shard_00000.parquet is not a complete parquet file", "delete it"),
    (cut_manifest, "dataset generate base_train chat_eval", "manifest.json is not valid JSON", "delete it or restore"),
    (foreign_manifest, "dataset tok_train report", "manifest.json must be a JSON object with proper name", "delete"),
    (hub_rows_without_columns, "chat_eval", "lacks the columns question, ", "put its own parquet files in "),
    (cut_hub_rows, "chat_eval", "holds a parquet file that cannot be read (", "delete the folder"),
    (latin_words, "chat_eval", "words_alpha.txt holds 'caf\ufffd', which is not UTF-8", "delete it"),
    (list_as_header, "report", "header.json must be a JSON object with proper run_id, started", "delete it"),
    (list_as_section, "report", "tokenizer-training.json must be a JSON object with proper timestamp", "delete it"),
    (folder_as_report, "report", "report.md: Is a directory", "move away what is in its place"),
    (folder_as_tokenizer, "tok_train", "tokenizer.json: Is a directory", "move away what is in its place"),
    (cut_tokenizer, "tok_eval base_train", "tokenizer.json must hold a nanochat tokenizer", "tok_train"),
    (no_checkpoints, f"base_loss base_eval {CHAT}", "no complete", "run `python -m scripts."),
    (half_a_checkpoint, f"base_loss base_eval {CHAT}", "no complete", "`python -m scripts."),
    (altered_checkpoint, "resume base_loss base_eval chat_eval chat_cli", "is damaged", "train again"),
    (another_tokenizer, "resume base_loss base_eval chat_eval chat_cli", "tokenizer", "restore it, or choose"),
    (own_data, "dataset generate", "holds the data set own-data, not", "set NANOCHAT_BASE_DIR to another folder"),
    (no_manifest, "dataset", "holds shards of unknown data", "set NANOCHAT_BASE_DIR to another folder"),
    (no_manifest, "generate", "holds other data", "choose another --base-dir"),
    (bad_identity, "chat_sft", "identity_conversations.jsonl, line ", ": not valid JSON"),
]


@pytest.mark.parametrize("damage, command, words, cure", [
    pytest.param(damage, command, words, cure, id=f"{damage.__name__}-{command}")
    for damage, commands, words, cure in DAMAGES for command in commands.split()])
def test_damage_is_told_in_one_line_and_nothing_else_is_harmed(damage, command, words, cure, base, capsys):
    damage(base)
    line = error_of(command, base, capsys)
    assert words in line and cure in line


@pytest.mark.parametrize("command", [*COMMANDS, "nanochat.dataset --from ."])
def test_a_file_in_place_of_the_base_directory(command, tmp_path, monkeypatch, capsys):
    """Root may write anywhere, so this is what an unwritable folder looks like to everybody."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "own.txt").write_text("one\n\ntwo\n\nthree")
    monkeypatch.chdir(tmp_path)
    for place in ("file", "file/below"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / place))
        line = error_of(command, tmp_path, capsys)
        assert line.startswith(f"cannot use the base directory {tmp_path / place} (")
        assert line.endswith("set NANOCHAT_BASE_DIR to a folder you can write to")

# -----------------------------------------------------------------------------
# What must not stop anybody

@pytest.mark.parametrize("texts", [
    pa.array(["", None, "hello world"] * 40),
    pa.array([b"caf\xe9 \xff\xfe and so on"] * 99, pa.binary()).view(pa.string()),
], ids=["empty documents", "invalid UTF-8"])
def test_odd_documents_are_trained_on(texts, base):
    write_texts(shards(base)[0], texts)
    for command in ("tok_train", "base_train", "base_loss"):
        main_of(command)()
    assert complete_steps(base / "base_checkpoints" / "new") == [1, 2, 3]


def test_a_line_cut_short_in_the_metrics_is_no_obstacle(base):
    with open(base / CHECKPOINT / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/lo')
    main_of("report")()
    main_of("resume")()
    lines = (base / CHECKPOINT / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


def test_own_files_from_windows(tmp_path, monkeypatch, capsys):
    """A byte order mark and CRLF are no part of the text, nor of the first column's name."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,n\r\nhello,1\r\nworld,2\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\r\n{"text": "world"}\r\n')
    main_of(f"nanochat.dataset --from {tmp_path}/a.csv {tmp_path}/b.jsonl")()
    assert "4 documents, 20 characters" in capsys.readouterr().out


def test_identity_conversations_from_windows(base):
    path = base / "identity_conversations.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    main_of("chat_sft")()
    assert complete_steps(base / "chatsft_checkpoints" / "d1") == [1]

# -----------------------------------------------------------------------------
# Saving to a full disk

@pytest.mark.parametrize("command, room", [("resume", 10_000), ("resume", 60_000), ("chat_sft", 60_000)])
def test_a_full_disk_while_saving_leaves_the_earlier_steps(command, room, base, capsys):
    """A limit on the size of files stands in for the disk; it fails in the same call."""
    shutil.rmtree(base / "chatsft_checkpoints")
    (base / CHECKPOINT / "metrics.jsonl").unlink() # grows while training
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        line = error_of(command, base, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not save step" in line and "make room there and go on with --resume" in line
    assert not list(base.rglob("*.tmp")) and complete_steps(base / CHECKPOINT) == [1, 2]

# -----------------------------------------------------------------------------
# No compiler

@pytest.mark.slow
@pytest.mark.parametrize("mode, code", [("auto", 0), ("on", 1)])
def test_without_a_compiler(mode, code, base, tmp_path):
    environment = os.environ | {"CXX": "/nonexistent", "PATH": "/nonexistent",
                                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", *COMMANDS["base_train"].split(), "--compile", mode]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300,
                          cwd=Path(__file__).parent.parent)
    assert done.returncode == code and "Traceback" not in done.stdout + done.stderr
    if mode == "auto":
        assert "Compile: off, running eagerly because compiling failed: " in done.stdout
    else:
        assert "error: --compile on was asked for, but compiling failed: " in done.stderr.splitlines()[-1]
        assert not (base / "base_checkpoints" / "new").exists()
