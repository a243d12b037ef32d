"""tok_train and tok_eval from shards to files and report, on small real shards in a temporary base directory."""
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import torch

from nanochat.common import UserError, claim_base_dir
from nanochat.dataset import NAME as DEFAULT_DATA
from nanochat.tokenizer import SPLIT_PATTERN, RustBPETokenizer, get_token_bytes, get_tokenizer, token_bytes_of
from scripts import tok_eval, tok_train

DOCUMENTS = [f"Document {i}: the wall by the harbour is {i * 7} metres long, it's the {i}th \u4f60!" for i in range(60)]
TEXTS = Path(tok_eval.__file__).parent / "tok_eval_texts"


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def write_shards(base_dir, train=DOCUMENTS, val=("a validation text",), name=DEFAULT_DATA):
    (base_dir / "base_data").mkdir()
    for i, documents in enumerate((train, val)):
        table = pa.table({"text": pa.array(documents, pa.string())})
        pq.write_table(table, base_dir / "base_data" / f"shard_0000{i}.parquet", row_group_size=8)
    claim_base_dir(name, synthetic=name != DEFAULT_DATA, validation_shard="shard_00001.parquet")


@pytest.fixture
def shards(base_dir):
    write_shards(base_dir)
    return base_dir


def logged(base_dir, slug):
    return (base_dir / "report" / f"{slug}.md").read_text(encoding="utf-8")

# -----------------------------------------------------------------------------
# tok_train

def test_training_writes_tokenizer_bytes_and_report(shards, capsys):
    tok_train.main(["--vocab-size", "300", "--doc-cap", "50"])
    tokenizer = get_tokenizer()
    expected = RustBPETokenizer.train_from_iterator((text[:50] for text in DOCUMENTS), 300)
    assert tokenizer.fingerprint() == expected.fingerprint() and tokenizer.get_vocab_size() == 300
    assert torch.equal(get_token_bytes(), token_bytes_of(tokenizer))
    assert sorted(os.listdir(shards / "tokenizer")) == ["token_bytes.pt", "tokenizer.json"]
    out = capsys.readouterr().out
    assert "max_chars: 2,000,000,000\ndoc_cap: 50\nvocab_size: 300\n" in out and "Trained on 3,000 characters" in out
    lengths = [len(tokenizer.decode_single_token_bytes(i)) for i in range(291)]
    report = logged(shards, "tokenizer-training")
    assert "- num_special_tokens: 9\n" in report and "- token_bytes_min: 1\n" in report
    assert f"- token_bytes_max: {max(lengths)}\n" in report
    assert f"- token_bytes_mean: {sum(lengths) / 291:.4f}\n" in report


def test_corpus_gives_exactly_max_chars_and_caps_each_document():
    batches = [["aaaa", "bb"], [], ["", "cccccc"], ["never"]]
    corpus = tok_train.Corpus(batches, max_chars=8, doc_cap=3)
    assert list(corpus) == ["aaa", "bb", "", "ccc"] and corpus.num_chars == 8
    corpus = tok_train.Corpus(batches, max_chars=7, doc_cap=3)
    assert list(corpus) == ["aaa", "bb", "", "cc"] and corpus.num_chars == 7
    corpus = tok_train.Corpus(batches, max_chars=100, doc_cap=4)
    assert list(corpus) == ["aaaa", "bb", "", "cccc", "neve"] and corpus.num_chars == 14


def test_a_corpus_too_small_says_how_many_tokens_it_gave(shards, capsys):
    tok_train.main(["--vocab-size", "32768"])
    size = get_tokenizer().get_vocab_size()
    assert 265 < size < 2000
    assert f"The text gave only {size:,} of the 32,768 tokens asked for" in capsys.readouterr().out
    assert len(get_token_bytes()) == size


@pytest.mark.parametrize("flags, words", [
    (["--vocab-size", "264"], "--vocab-size must be at least 265 (256 bytes and 9 special tokens) and below 2**31, "),
    (["--vocab-size", "99999999999999999999"], "and below 2**31, got 99999999999999999999"),
    (["--max-chars", "0", "--doc-cap", "-1"],
     "--max-chars must be at least 1, got 0; --doc-cap must be at least 1, got -1"),
])
def test_wrong_flags_are_usage_errors(base_dir, capsys, flags, words):
    with pytest.raises(SystemExit) as caught:
        tok_train.main(flags)
    assert caught.value.code == 2 and words in capsys.readouterr().err
    assert os.listdir(base_dir) == []


def test_no_shards_and_no_text_say_what_to_do(base_dir):
    with pytest.raises(FileNotFoundError, match="python -m nanochat.dataset"):
        tok_train.main([])
    write_shards(base_dir, train=["", ""])
    with pytest.raises(UserError, match="the training shards hold no text"):
        tok_train.main([])
    assert not (base_dir / "tokenizer").exists()


def test_a_tokenizer_that_loses_text_is_not_saved(shards, monkeypatch):
    tok_train.main(["--vocab-size", "300"])
    before = {path.name: path.read_bytes() for path in (shards / "tokenizer").iterdir()}
    monkeypatch.setattr(RustBPETokenizer, "decode", lambda self, ids: "something else")
    with pytest.raises(UserError, match="does not give back the check text"):
        tok_train.main(["--vocab-size", "280"])
    assert {path.name: path.read_bytes() for path in (shards / "tokenizer").iterdir()} == before


def test_a_full_disk_leaves_the_old_tokenizer(shards, monkeypatch):
    tok_train.main(["--vocab-size", "300"])
    before = {path.name: path.read_bytes() for path in (shards / "tokenizer").iterdir()}
    def no_space(*args):
        raise OSError(28, "No space left on device")
    for target in ("torch.save", "nanochat.tokenizer.write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(target, no_space)
            with pytest.raises(OSError, match="No space left"):
                tok_train.main(["--vocab-size", "280"])
        assert {path.name: path.read_bytes() for path in (shards / "tokenizer").iterdir()} == before


def test_the_check_text_has_what_tokenizers_stumble_over():
    parts = ("I'm", "1234", "\u4f60\u597d", "\U0001f30d", "<|bos|>", "\r\n\n")
    assert all(part in tok_train.CHECK_TEXT for part in parts)

# -----------------------------------------------------------------------------
# tok_eval

def toy_encoding(eot="<|endoftext|>"):
    """Bytes only: every text has as many tokens as bytes."""
    return tiktoken.Encoding("toy", pat_str=SPLIT_PATTERN, mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={eot: 256})


@pytest.fixture
def trained(shards):
    tok_train.main(["--vocab-size", "300"])
    return shards


@pytest.fixture
def offline(monkeypatch):
    def get_encoding(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)


def test_comparison_with_both_baselines(trained, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: asked.append(name) or toy_encoding())
    tok_eval.main([])
    assert asked == ["gpt2", "cl100k_base"]
    out = capsys.readouterr().out
    assert "GPT-2: 257\nGPT-4: 257\nOurs: 300\n" in out and "\033" not in out, "no colours: this is not a terminal"
    assert out.count("=" * 95 + "\n") == 2
    rows = {line.split()[0]: line.split() for line in out.splitlines() if "%" in line and "Text" not in line}
    assert list(rows) == ["news", "korean", "code", "math", "science", "fwe-train", "fwe-val"]
    first_group = "\n".join(DOCUMENTS[:8])
    tokens = len(get_tokenizer().encode(first_group))
    size = len(first_group.encode())
    assert rows["fwe-train"] == ["fwe-train", f"{size:,}", f"{size:,}", "1.00", str(tokens), f"{size / tokens:.2f}",
                                 f"{100 * (size - tokens) / size:+.1f}%", "Ours"]
    assert max(map(len, out.splitlines())) == 95
    report = logged(trained, "tokenizer-evaluation")
    for name in ("GPT-2", "GPT-4"):
        assert f"### Comparison with {name}\n\n| Text Type | Bytes | {name} Tokens | {name} Ratio |" in report
    assert f"| fwe-train | {size:,} | {size:,} | 1.00 | {tokens} | {size / tokens:.2f} | " in report
    assert "- vocab_size: 300\n" in report and f"- ratio_fwe-train: {size / tokens:.4f}\n" in report


def test_without_a_network_ours_is_still_reported(trained, offline, capsys):
    tok_eval.main([])
    out = capsys.readouterr().out
    for name in ("gpt2", "cl100k_base"):
        assert out.count(f"{name} is left out: tiktoken cannot get its vocabulary (ConnectionError)\n") == 1
    assert "Ours: 300" in out and "fwe-val" in out and "GPT-" not in out
    assert "ratio_korean" in logged(trained, "tokenizer-evaluation")


def test_a_network_that_hangs_is_given_up(monkeypatch, capsys):
    released = threading.Event()
    def get_encoding(name):
        released.wait(30)
        raise ConnectionError("too late")
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    assert tok_eval.load_baseline("gpt2", timeout=0.1) is None
    released.set()
    assert "gpt2 is left out: tiktoken cannot get its vocabulary (no answer within 0.1 s)" in capsys.readouterr().out


def test_one_shard_or_an_empty_one_leaves_its_rows_out(trained, offline, capsys):
    (trained / "base_data" / "shard_00000.parquet").unlink()
    assert list(tok_eval.load_texts()) == tok_eval.TEXT_NAMES
    assert "fwe-train is left out: need at least two shards" in capsys.readouterr().out
    (trained / "base_data" / "shard_00001.parquet").unlink()
    (trained / "base_data").rmdir()
    write_shards(trained, val=[""])
    assert list(tok_eval.load_texts()) == [*tok_eval.TEXT_NAMES, "fwe-train"]
    assert "fwe-val is left out: its first row group holds no text" in capsys.readouterr().out


def test_rows_of_other_data_carry_its_name(base_dir):
    write_shards(base_dir, name="tinyworld")
    assert list(tok_eval.load_texts())[-2:] == ["tinyworld-train", "tinyworld-val"]


def test_without_a_tokenizer_it_says_so(base_dir):
    with pytest.raises(FileNotFoundError, match="run `python -m scripts.tok_train` first"):
        tok_eval.main([])


def test_a_tokenizer_that_changes_a_text_is_named(trained, monkeypatch):
    tokenizer = get_tokenizer()
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "x")
    with pytest.raises(ValueError, match="the tokenizer Ours must give back every text, but changes news"):
        tok_eval.measure("Ours", tokenizer, {"news": "some"})


def test_comparison_arithmetic_and_colours(capsys):
    """8 bytes in 4 against 3 tokens: ratio 2.00 against 2.67, a quarter fewer tokens."""
    def result(tokens):
        return {"bytes": 8, "tokens": tokens, "ratio": 8 / tokens}
    rows = tok_eval.compare("GPT-2", {"a": result(4), "b": result(4), "c": result(4)},
                            {"a": result(3), "b": result(4), "c": result(5)})
    assert rows == [["a", "8", "4", "2.00", "3", "2.67", "+25.0%", "Ours"],
                    ["b", "8", "4", "2.00", "4", "2.00", "+0.0%", "Tie"],
                    ["c", "8", "4", "2.00", "5", "1.60", "-25.0%", "GPT-2"]]
    tok_eval.print_comparison("GPT-2", rows, colored=True)
    ours, tie, theirs = capsys.readouterr().out.splitlines()[-3:]
    assert ours.index("\033[91m") < ours.index("\033[92m") and theirs.index("\033[92m") < theirs.index("\033[91m")
    assert "\033" not in tie


def test_the_texts_are_of_the_kinds_that_the_table_names():
    texts = {path.stem: path.read_text(encoding="utf-8") for path in TEXTS.iterdir()}
    assert sorted(texts) == sorted(tok_eval.TEXT_NAMES)
    assert "\u201c" in texts["news"] and "\\begin{theorem}" in texts["math"] and "\u2082" in texts["science"]
    assert sum("\uac00" <= char <= "\ud7a3" for char in texts["korean"]) > 250


def test_the_code_text_learns_merges():
    scope = {}
    exec((TEXTS / "code.txt").read_text(encoding="utf-8"), scope)
    assert scope["PairMerger"](num_merges=5).train({"hi": 3, "hip": 2}).merges == {(104, 105): 256, (256, 112): 257}


@pytest.mark.slow
def test_as_commands_with_a_base_directory_of_their_own(shards):
    def run(*command):
        environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(shards / "cache"), "HTTPS_PROXY": "http://127.0.0.1:9"}
        return subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
    done = run("scripts.tok_train", "--vocab-size", "300")
    assert done.returncode == 0, done.stderr
    assert json.loads((shards / "tokenizer" / "tokenizer.json").read_text())["special_tokens"]["<|bos|>"] == 291
    done = run("scripts.tok_eval")
    assert done.returncode == 0 and "gpt2 is left out" in done.stdout, done.stderr
    (shards / "tokenizer" / "tokenizer.json").write_text("{")
    done = run("scripts.tok_eval")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert run("scripts.tok_train", "--vocab-size", "3").returncode == 2
