"""Shards on disk: reading, the pinned validation shard, the downloader against a faulty server, own files."""
import contextlib
import gzip
import json
import os
import random
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.common import UserError, claim_base_dir, file_sha256, read_manifest
from nanochat.dataset import (HUB_PATH, build_shards, download_single_file, index_to_filename, list_parquet_files, main,
                              num_row_groups, parquets_iter_batched, read_row_group, split_files, write_shard)
from tasks.spellingbee import words_of_split
from tests.hub_server import HubServer


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "base"


def make_shards(base_dir, *names, documents=("one", "two")):
    (base_dir / "base_data").mkdir(parents=True, exist_ok=True)
    for name in names:
        write_shard(base_dir / "base_data" / name, [f"{name} {text}" for text in documents])


def names(paths):
    return [os.path.basename(path) for path in paths]

# -----------------------------------------------------------------------------
# Reading

def test_names_and_urls_are_those_of_the_hub(monkeypatch):
    assert index_to_filename(7) == "shard_00007.parquet"
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert dataset.shard_url(7) == dataset.BASE_URL + "shard_00007.parquet"
    assert dataset.BASE_URL == "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main/"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror/")
    assert dataset.shard_url(7) == "http://mirror" + HUB_PATH + "shard_00007.parquet"


def test_the_base_directory_is_read_at_every_call_and_not_made(tmp_path, monkeypatch, base_dir):
    assert list_parquet_files() == [] and not (base_dir / "base_data").exists()
    make_shards(tmp_path / "other", "b.parquet", "a.parquet")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    (tmp_path / "other" / "base_data" / "note.txt").write_text("x")
    assert names(list_parquet_files()) == ["a.parquet", "b.parquet"]
    assert list_parquet_files(str(tmp_path)) == []


def test_row_groups_in_stripes(base_dir):
    make_shards(base_dir, "shard_00000.parquet", "shard_01822.parquet", documents=[str(i) for i in range(128)])
    path, = split_files("train")
    assert num_row_groups(path) == 64 and read_row_group(path, 1) == [f"shard_00000.parquet {i}" for i in (2, 3)]
    stripe = list(parquets_iter_batched("train", start=1, step=10))
    assert [rows[0] for rows in stripe] == [f"shard_00000.parquet {2 * rg}" for rg in range(1, 64, 10)]


def test_big_shards_have_the_row_groups_of_the_hub(tmp_path):
    write_shard(tmp_path / "x.parquet", ["a"] * 1024 * 70)
    metadata = pq.ParquetFile(tmp_path / "x.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [1024] * 70
    column = metadata.row_group(0).column(0)
    assert (column.path_in_schema, column.compression, column.statistics) == ("text", "ZSTD", None)
    assert "DICTIONARY" not in str(column.encodings)


def test_nulls_and_invalid_utf8_do_not_stop_reading(tmp_path):
    texts = pa.array([b"\xff\xfeok", None, "grün".encode()], pa.binary())
    bad = pa.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2], texts.buffers()[0])
    pq.write_table(pa.table({"text": bad}), tmp_path / "x.parquet")
    assert read_row_group(str(tmp_path / "x.parquet"), 0) == ["\ufffd\ufffdok", "", "grün"]

# -----------------------------------------------------------------------------
# The validation shard

def test_validation_is_the_pinned_shard_however_many_there_are(base_dir):
    make_shards(base_dir, "shard_00000.parquet", "shard_01822.parquet")
    assert names(split_files("val")) == ["shard_01822.parquet"]
    make_shards(base_dir, "shard_00001.parquet", "shard_09999.parquet")
    assert names(split_files("val")) == ["shard_01822.parquet"]
    assert names(split_files("train")) == ["shard_00000.parquet", "shard_00001.parquet", "shard_09999.parquet"]
    claim_base_dir("own", False, validation_shard="shard_00001.parquet") # the manifest wins
    assert names(split_files("val")) == ["shard_00001.parquet"]
    assert names(split_files("train")) == ["shard_00000.parquet", "shard_01822.parquet", "shard_09999.parquet"]


def test_without_manifest_the_last_file_is_taken_with_a_warning(base_dir):
    make_shards(base_dir, "a.parquet", "b.parquet")
    with pytest.warns(UserWarning, match="taking the last one, b.parquet"):
        assert names(split_files("val")) == ["b.parquet"]


def test_bad_data_gets_one_sentence_with_the_cure(base_dir):
    with pytest.raises(FileNotFoundError, match=r"at least two shards.*found 0: run `python -m nanochat.dataset -n 8`"):
        split_files("train")
    make_shards(base_dir, "shard_00000.parquet")
    with pytest.raises(FileNotFoundError, match="found 1"):
        split_files("train")
    make_shards(base_dir, "shard_00001.parquet")
    claim_base_dir("own", False, validation_shard="shard_00007.parquet")
    with pytest.raises(FileNotFoundError, match="validation shard shard_00007.parquet .* is missing: download"):
        split_files("val")
    with pytest.raises(ValueError, match="split must be train or val, got 'test'"):
        split_files("test")


@pytest.mark.parametrize("name, kept", [("own", 0), ("fineweb-edu", 2)])
def test_a_shard_that_the_manifest_does_not_list_is_refused_but_while_downloading(base_dir, name, kept):
    make_shards(base_dir, "shard_00000.parquet", "shard_00001.parquet", "shard_00007.parquet")
    files = {f"base_data/shard_0000{i}.parquet": {"size": 0, "sha256": ""} for i in (0, 1)}
    claim_base_dir(name, False, "shard_00001.parquet", files)
    refused = pytest.raises(ValueError, match="shard_00007.parquet in .* is no shard of the data set own, .*: move it")
    with contextlib.nullcontext() if kept else refused:
        assert len(split_files("train")) == kept


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all", "half"])
def test_broken_files_are_named(tmp_path, content):
    path = tmp_path / "x.parquet"
    write_shard(path, ["words " * 50] * 100)
    path.write_bytes(path.read_bytes()[:-100] if content == "half" else content)
    with pytest.raises(ValueError, match=r"x.parquet is not a complete parquet file \(.*\): delete it, then download"):
        read_row_group(str(path), 0)


def test_a_shard_without_text_lists_its_columns(tmp_path):
    pq.write_table(pa.table({"title": ["a"], "body": ["b"]}), tmp_path / "x.parquet")
    words = r"no column 'text' of strings but title \(string\), body \(string\): .*--from FILE --text-column NAME"
    with pytest.raises(ValueError, match=words):
        num_row_groups(str(tmp_path / "x.parquet"))


def test_strings_of_every_kind_are_text(tmp_path):
    plain = pa.array(["a", None])
    for i, column in enumerate([plain, plain.cast(pa.large_string()), plain.cast(pa.binary()),
                                plain.dictionary_encode(), pa.nulls(2)]):
        pq.write_table(pa.table({"text": column}), tmp_path / f"{i}.parquet")
        assert read_row_group(str(tmp_path / f"{i}.parquet"), 0) == ["a" if i < 4 else "", ""]

# -----------------------------------------------------------------------------
# Downloading

@pytest.fixture(scope="module")
def shard_bytes(tmp_path_factory):
    """Two parquet files of about 400 kB, which differ everywhere."""
    def make(seed):
        rng = random.Random(seed)
        documents = ["".join(rng.choices("abcdefghij ", k=8000)) for _ in range(100)]
        write_shard(folder / "x", documents)
        return (folder / "x").read_bytes()
    folder = tmp_path_factory.mktemp("shards")
    return make(1), make(2)


PATH = HUB_PATH + "shard_00003.parquet"


@pytest.fixture(params=[True, False], ids=["hashes", "no hashes"])
def hub(request, shard_bytes, monkeypatch):
    with HubServer({PATH: shard_bytes[0]}, hashes=request.param) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def download(timeout=5, **kwargs):
    """download_single_file without the waits; returns (success, waits in seconds)."""
    waits = []
    return download_single_file(3, timeout=timeout, sleep=waits.append, **kwargs), waits


def stored(base_dir):
    path = base_dir / "base_data" / "shard_00003.parquet"
    return path.read_bytes() if path.exists() else None


def test_a_download_is_byte_equal_and_not_repeated(hub, base_dir, shard_bytes):
    counts = []
    assert download(on_bytes=counts.append) == (True, []) and sum(counts) == len(shard_bytes[0])
    assert stored(base_dir) == shard_bytes[0] and len(hub.requests) == 1
    assert download() == (True, []) and len(hub.requests) == 1
    assert names(list_parquet_files()) == ["shard_00003.parquet"]


def test_backoff_doubles_and_ends_after_five_tries(hub, base_dir, capsys):
    hub.fail(PATH, *["500"] * 9)
    assert download() == (False, [2, 4, 8, 16])
    assert stored(base_dir) is None and "shard_00003.parquet failed: 500" in capsys.readouterr().out


def test_what_is_not_there_is_not_asked_for_again(hub, base_dir):
    hub.fail(PATH, "404")
    assert download() == (False, []) and stored(base_dir) is None


def test_a_cut_or_stalled_download_continues_where_it_stopped(hub, base_dir, shard_bytes):
    size = len(shard_bytes[0])
    hub.fail(PATH, "truncate", "stall", "500")
    assert download(timeout=1) == (True, [2, 4, 8])
    assert stored(base_dir) == shard_bytes[0]
    assert hub.requests[0][1] is None
    second, third, fourth = (int(asked.removeprefix("bytes=").removesuffix("-")) for _, asked, _ in hub.requests[1:])
    assert 0 < size // 2 - second < 1 << 16 and second < third == fourth < size


def test_the_next_run_continues_too(hub, base_dir, shard_bytes):
    hub.fail(PATH, "truncate")
    assert download(attempts=1) == (False, [])
    assert download() == (True, []) and stored(base_dir) == shard_bytes[0]
    assert hub.requests[-1][2] == 206


def test_a_server_that_ignores_ranges_is_read_from_the_start(hub, base_dir, shard_bytes):
    hub.fail(PATH, "truncate", "no-range")
    assert download() == (True, [2]) and stored(base_dir) == shard_bytes[0]


@pytest.mark.parametrize("later_faults", [[], ["no-if-range"], ["no-range"]])
def test_changed_content_is_never_mixed(hub, base_dir, shard_bytes, later_faults):
    hub.fail(PATH, "truncate")
    assert not download(attempts=1)[0]
    hub.files[PATH] = shard_bytes[1]
    hub.fail(PATH, *later_faults)
    assert download()[0] and stored(base_dir) == shard_bytes[1]


def test_without_a_length_the_footer_decides(hub, base_dir, shard_bytes):
    hub.fail(PATH, "no-length")
    assert download() == (True, []) and stored(base_dir) == shard_bytes[0]


def test_content_that_is_no_shard_is_refused(hub, base_dir, capsys):
    hub.files[PATH] = b"<html>please log in</html>" * 100
    assert not download(attempts=2)[0] and stored(base_dir) is None
    assert "not a complete parquet file" in capsys.readouterr().out


def test_a_wrong_hash_is_refused(hub, base_dir, shard_bytes, monkeypatch):
    if not hub.hashes:
        pytest.skip("needs the announced hash")
    flipped = bytearray(shard_bytes[0])
    flipped[len(flipped) // 3] ^= 1 # the footer stays whole
    hub.fail(PATH, "truncate")
    assert not download(attempts=1)[0]
    partial = base_dir / "base_data" / ".download" / "shard_00003.parquet"
    partial.write_bytes(bytes(flipped[:partial.stat().st_size]))
    assert download() == (True, [2]) and stored(base_dir) == shard_bytes[0]


def test_a_broken_shard_on_disk_is_replaced(hub, base_dir, shard_bytes):
    (base_dir / "base_data").mkdir(parents=True)
    (base_dir / "base_data" / "shard_00003.parquet").write_bytes(shard_bytes[0][:-9])
    assert download()[0] and stored(base_dir) == shard_bytes[0]


def test_random_cuts_and_changes_never_leave_a_wrong_file(hub, base_dir, shard_bytes):
    rng = random.Random(0)
    for _ in range(200): # downloads
        for path in (base_dir / "base_data").glob("*.parquet"):
            path.unlink()
        for _ in range(rng.randrange(1, 4)):
            cut = f"truncate:{rng.randrange(len(shard_bytes[0]) // 2)}"
            hub.fail(PATH, rng.choice([cut, "500", "no-range", "no-if-range"]))
        hub.files[PATH] = rng.choice(shard_bytes)
        assert download(attempts=rng.randrange(1, 7))[0] == (stored(base_dir) is not None)
        assert stored(base_dir) in (None, hub.files[PATH])


def test_two_downloaders_of_one_shard_do_not_disturb_each_other(hub, base_dir, shard_bytes):
    results = []
    threads = [threading.Thread(target=lambda: results.append(download()[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4 and stored(base_dir) == shard_bytes[0] and len(hub.requests) == 1


def test_the_command_fetches_the_validation_shard_too(hub, base_dir, shard_bytes, capsys):
    hub.files.update({HUB_PATH + index_to_filename(i): shard_bytes[i % 2] for i in (0, 1, 1822)})
    main(["-n", "2", "-w", "2"])
    out = capsys.readouterr().out
    assert "validation shard: shard_01822.parquet" in out and "1/3 shard_01822.parquet complete" in out
    assert names(list_parquet_files()) == ["shard_00000.parquet", "shard_00001.parquet", "shard_01822.parquet"]
    manifest = read_manifest()
    assert (manifest["name"], manifest["synthetic"]) == ("fineweb-edu", False)
    assert manifest["validation_shard"] == "shard_01822.parquet"
    assert manifest["files"]["base_data/shard_00001.parquet"] == {
        "size": len(shard_bytes[1]), "sha256": file_sha256(base_dir / "base_data" / "shard_00001.parquet")}
    assert names(split_files("val")) == ["shard_01822.parquet"]


def test_climbmix_has_a_validation_shard_of_its_own_and_does_not_mix(hub, base_dir, shard_bytes):
    path = "/datasets/karpathy/climbmix-400b-shuffle/resolve/main/"
    hub.files.update({path + index_to_filename(i): shard_bytes[i % 2] for i in (0, 1, 6542)})
    main(["--dataset", "climbmix", "-n", "2"])
    assert names(split_files("val")) == ["shard_06542.parquet"] and len(split_files("train")) == 2
    assert (read_manifest()["name"], read_manifest()["synthetic"]) == ("climbmix", False)
    hub.files[HUB_PATH + "shard_00000.parquet"] = shard_bytes[0]
    with pytest.raises(UserError, match="holds the data set climbmix, not fineweb-edu .*data sets never mix"):
        main(["-n", "1"])


def test_missing_shards_are_listed_and_the_others_kept(hub, base_dir, shard_bytes):
    hub.files.update({HUB_PATH + index_to_filename(i): shard_bytes[0] for i in (0, 1822)})
    with pytest.raises(UserError, match="missing: shard_00001.parquet; run the same command again"):
        main(["-n", "2"])
    assert names(list_parquet_files()) == ["shard_00000.parquet", "shard_01822.parquet"]


def test_real_shards_do_not_go_into_a_synthetic_directory(hub):
    claim_base_dir("tinyworld", True)
    with pytest.raises(UserError, match="holds the data set tinyworld, not fineweb-edu.*set NANOCHAT_BASE_DIR"):
        main(["-n", "1"])
    assert hub.requests == []


def test_shards_of_unknown_data_are_not_claimed(hub, base_dir):
    make_shards(base_dir, "shard_00000.parquet")
    with pytest.raises(UserError, match="holds shards of unknown data, .*: move its base_data away, or set NANO"):
        main(["-n", "1"])
    assert hub.requests == [] and read_manifest() is None


def test_a_download_that_got_nothing_leaves_no_claim(hub, base_dir, shard_bytes):
    hub.files.clear() # 404
    with pytest.raises(UserError, match="missing: shard_01822.parquet, shard_00000.parquet"):
        main(["-n", "1"])
    assert list(base_dir.iterdir()) == []
    claim_base_dir("own", False)


def test_exit_codes(base_dir, tmp_path):
    def run(*args):
        environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
        command = [sys.executable, "-m", "nanochat.dataset", *args]
        return subprocess.run(command, capture_output=True, text=True, env=environment)
    usage = run("-n", "0", "-w", "0")
    assert usage.returncode == 2
    assert "--num-files must be at least 1, or -1 for all, got 0; --num-workers must" in usage.stderr
    wrong = run("--from", str(tmp_path / "absent.txt"))
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1


def test_prepare_reports_what_could_not_be_had(monkeypatch, capsys):
    def load(name, subset, split):
        if name == "cais/mmlu":
            raise UserError("cannot load it")
        loaded.append((name, subset, split))
    loaded, bundles = [], []
    monkeypatch.setattr(dataset, "load_hub_dataset", load)
    monkeypatch.setattr("nanochat.core_eval.get_eval_bundle", lambda: bundles.append(1))
    monkeypatch.setattr(dataset, "CHAT_FILES", {})
    missing = dataset.prepare()
    assert missing == ["cais/mmlu all validation", "cais/mmlu all test", "cais/mmlu auxiliary_train train"]
    assert ("openai/gsm8k", "main", "train") in loaded and len(bundles) == 1


def test_prepare_fetches_the_plain_files_of_the_chat_stages_once(monkeypatch, base_dir):
    monkeypatch.setattr(dataset, "HUB_DATASETS", ())
    monkeypatch.setattr("nanochat.core_eval.get_eval_bundle", lambda: None)
    files = {"/words_alpha.txt": b"cat\r\nowl\r\n", "/identity_conversations.jsonl": b"[]\n"}
    assert list(files) == ["/" + name for name in dataset.CHAT_FILES]
    with HubServer(files) as hub:
        monkeypatch.setattr(dataset, "CHAT_FILES", {name: f"{hub.url}/{name}" for name in dataset.CHAT_FILES})
        hub.fail("/identity_conversations.jsonl", "truncate")
        assert dataset.prepare() == ["identity_conversations.jsonl"]
        assert not (base_dir / "identity_conversations.jsonl").exists()
        assert dataset.prepare() == dataset.prepare() == [] and len(hub.requests) == 3
    assert {f"/{path.name}": path.read_bytes() for path in base_dir.iterdir() if path.suffix != ".lock"} == files
    assert words_of_split("train") + words_of_split("test") == ["cat", "owl"]

# -----------------------------------------------------------------------------
# Own files

ENGLISH = [f"The fox number {i} runs over the hill.\nIt does not look back." for i in range(40)]
CHINESE = [f"第{i}个故事：从前有一座山，山里有一座庙。" for i in range(40)]
GREEK = [f"Η αλεπού {i} τρέχει πάνω από τον λόφο." for i in range(40)]
TEXTS = ENGLISH + CHINESE + GREEK


def write_input(folder, kind):
    """The same 120 documents in one of the formats; returns the path."""
    folder.mkdir(exist_ok=True)
    path = folder / f"input.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), path)
        return path
    if kind.startswith("jsonl"):
        data = "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)) + "\n\n"
    elif kind.startswith("csv"):
        data = "id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS))
    else:
        data = "\n\n\n".join(TEXTS) + "\n"
    data = data.encode()
    if kind.endswith("zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    return path


def all_documents(split):
    return [text for rows in parquets_iter_batched(split) for text in rows]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "txt", "txt.zst"])
def test_own_files_of_each_kind_and_language(tmp_path, capsys, kind):
    path = write_input(tmp_path / "in", kind)
    main(["--from", str(path), "--name", "stories"])
    train, val = all_documents("train"), all_documents("val")
    assert sorted(text.strip() for text in train + val) == sorted(TEXTS)
    assert 1 <= len(val) <= 20 and not set(val) & set(train)
    manifest = read_manifest()
    assert (manifest["name"], manifest["synthetic"]) == ("stories", False)
    assert manifest["validation_shard"] == max(names(list_parquet_files()))
    assert set(manifest["files"]) == {f"base_data/{name}" for name in names(list_parquet_files())}
    assert "120 documents" in capsys.readouterr().out
    assert [text[0] for text in train] != sorted(text[0] for text in train), "languages are mixed"
    assert num_row_groups(split_files("train")[0]) >= 64, "small shards have enough row groups for many lanes"


def test_a_folder_is_searched_and_the_same_seed_gives_the_same_bytes(tmp_path, monkeypatch):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_text("b one\n\nb two")
    (tmp_path / "in" / "deep" / "a.jsonl").write_text('{"content": "a"}\n')
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG")
    hashes = []
    for run, seed in enumerate([1, 1, 2]):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / str(run)))
        counts = build_shards([str(tmp_path / "in")], "own", seed=seed, shard_chars=8)
        assert sorted(text.strip() for text in all_documents("train") + all_documents("val")) == ["a", "b one", "b two"]
        assert counts["documents"] == 3 and counts["characters"] == len("a" + "b one\n" + "b two")
        hashes.append([file_sha256(path) for path in list_parquet_files()])
    assert hashes[0] == hashes[1]


def test_text_files_by_blank_line_or_whole(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_bytes(f"title {i}\r\n\r\nbody {i}\r\n".encode("utf-8-sig"))
    counts = build_shards([str(tmp_path)], "own", separator="file")
    assert counts["documents"] == 3
    assert sorted(all_documents("train") + all_documents("val")) == [f"title {i}\n\nbody {i}\n" for i in range(3)]


def test_a_very_long_line_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_PIECE", 1000)
    (tmp_path / "x.txt").write_text("é" * 2500)
    build_shards([str(tmp_path / "x.txt")], "own")
    assert sorted(map(len, all_documents("train") + all_documents("val"))) == [500, 1000, 1000]


def test_empty_documents_and_invalid_utf8_are_counted(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n{"text": ""}\n{"text": "  \\n"}\n{"text": null}\n'
                                       b'{"text": "caf\xe9"}\n{"text": "half \\ud83d of a pair"}\n'
                                       b'{"text": "pair \\ud83d\\ude00"}\n')
    main(["--from", str(tmp_path / "x.jsonl")])
    assert "4 documents" in (out := capsys.readouterr().out)
    assert "left out 3 empty documents; 2 with invalid UTF-8" in out
    assert sorted(all_documents("train") + all_documents("val")) == [
        "caf\ufffd", "half \ufffd of a pair", "one", "pair \U0001f600"]


def test_columns_are_chosen_by_flag_or_named(tmp_path):
    (tmp_path / "x.csv").write_text("headline,story\nA,one\nB,two\nC\n")
    with pytest.raises(UserError, match="x.csv has no column 'text' but headline, story: say with --text-column"):
        build_shards([str(tmp_path / "x.csv")], "own")
    with pytest.raises(UserError, match="no column 'body' but headline, story"):
        build_shards([str(tmp_path / "x.csv")], "own", text_column="body")
    assert build_shards([str(tmp_path / "x.csv")], "own", text_column="story")["empty"] == 1


@pytest.mark.parametrize("name, content, words", [
    ("x.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text"', r"x.jsonl cannot be read near its document 2 \("),
    ("x.jsonl", b'["a"]\n', "x.jsonl has no column 'text'|x.jsonl cannot be read"),
    ("x.jsonl", b"{}\n", "x.jsonl has no column 'text' but an empty row: say with --text-column"),
    ("x.jsonl", b"[" * 100_000, "x.jsonl cannot be read near its document 0 .maximum recursion depth"),
    ("x.jsonl", b"9" * 5_000, "x.jsonl cannot be read near its document 0 .Exceeds the limit"),
    ("x.jsonl", b'{"text": 7}\n', "x.jsonl cannot be read near its document 1 .it holds a int, not text"),
    ("x.parquet", b"PAR1", "x.parquet cannot be read near its document 0"),
    ("x.txt.gz", gzip.compress(b"hello\n\n" * 999, mtime=0)[:-20], "x.txt.gz cannot be read near its document"),
    ("x.txt", b"only one", "found 1 documents in .*x.txt, but one for training and one for validation"),
    ("x.txt", b"", "found 0 documents"),
    ("x.pdf", b"", "x.pdf must be a file ending in .parquet, .jsonl, .csv, .txt"),
    ("", b"", "must be a file ending in"),
])
def test_bad_input_leaves_nothing_behind(tmp_path, base_dir, name, content, words):
    (tmp_path / "in").mkdir()
    if name:
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises((ValueError, UserError), match=words):
        build_shards([str(tmp_path / "in" / name)], "own")
    assert not base_dir.exists() or list(base_dir.iterdir()) == []


def test_own_data_never_joins_other_data(tmp_path, base_dir):
    (tmp_path / "x.txt").write_text("one\n\ntwo\n\nthree")
    make_shards(base_dir, "shard_00000.parquet")
    with pytest.raises(UserError, match="base_data must be empty: delete it, or set NANOCHAT_BASE_DIR"):
        build_shards([str(tmp_path / "x.txt")], "own")
    claim_base_dir("other", False)
    with pytest.raises(UserError, match="holds the data set other, not own"):
        build_shards([str(tmp_path / "x.txt")], "own")
    for flags in (["--name", "tinyworld"], ["--name", ""], ["-n", "2"]):
        with pytest.raises(SystemExit) as error:
            main(["--from", str(tmp_path / "x.txt"), *flags])
        assert error.value.code == 2


@pytest.mark.slow
def test_memory_stays_flat(tmp_path):
    """200 MB of text of varying documents: a process of its own peaks at most 60 MB higher than for 20 MB."""
    line = "".join(chr(97 + i % 26) for i in range(9_999)) + "\n\n"
    code = ("import resource; from nanochat.dataset import build_shards; import sys; "
            "build_shards([sys.argv[1]], 'own', shard_chars=5_000_000); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    peaks = []
    for num_lines in (2_000, 20_000):
        with open(tmp_path / "x.txt", "w") as file:
            for i in range(num_lines):
                file.write(f"{i} {line}")
        environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / str(num_lines))}
        result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.txt")], capture_output=True, text=True,
                                env=environment)
        peaks.append(int(result.stdout.split()[-1]) / (1 << 20 if sys.platform == "darwin" else 1 << 10)) # MB
    assert peaks[1] - peaks[0] < 60, peaks
