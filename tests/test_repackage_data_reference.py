"""Repackaging of text as published shards: the format, a random order, nothing lost, flat memory, and its own speed."""
import collections
import json
import os
import random
import subprocess
import sys

import pytest

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq # noqa: E402

from dev import repackage_data_reference as repackage # noqa: E402
from nanochat.common import UserError # noqa: E402


def write(folder, texts, parts=2):
    folder.mkdir()
    for part in range(parts):
        pq.write_table(pa.table({"text": texts[part::parts]}), folder / f"{part}.parquet")


def read(folder):
    return [pq.ParquetFile(folder / name) for name in sorted(os.listdir(folder))]


def run(*flags):
    repackage.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return [f"{i} " + "word " * rng.randrange(1, 60) for i in range(10_000)]


@pytest.mark.parametrize("source", ["files", "hub"])
def test_shards_are_as_published_and_nothing_is_lost(tmp_path, texts, capsys, source):
    write(tmp_path / "in", texts + [""])
    flags = ("--from", tmp_path / "in") if source == "files" else (
        "--hub", tmp_path / "in", "--subset", "", "--hub-chars", 2e6)
    run("--out", tmp_path / "out", *flags, "--shard-chars", 300_000, "--bucket-chars", 200_000)
    files = read(tmp_path / "out")
    found = [text for file in files for text in file.read()["text"].to_pylist()]
    assert collections.Counter(found) == collections.Counter(texts)
    assert len(files) > 3
    for file in files[:-1]:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        assert set(sizes) == {1024} and sum(map(len, file.read()["text"].to_pylist())) >= 300_000
        last = file.read_row_group(file.num_row_groups - 1)["text"].to_pylist()
        assert sum(map(len, file.read()["text"].to_pylist())) - sum(map(len, last)) < 300_000, "closed too late"
    column = files[0].metadata.row_group(0).column(0)
    assert (column.compression, column.is_stats_set, column.has_dictionary_page) == ("ZSTD", False, False)
    assert files[0].schema_arrow.names == ["text"]
    told = json.loads(capsys.readouterr().out)
    assert (told["documents"], told["shards"]) == (10_000, len(files))


def test_the_order_is_random_over_the_whole_input_and_the_same_for_a_seed(tmp_path, texts):
    write(tmp_path / "in", texts, parts=1)
    orders = []
    for name, seed in (("a", 42), ("b", 42), ("c", 43)):
        run("--out", tmp_path / name, "--from", tmp_path / "in", "--bucket-chars", 100_000, "--seed", seed)
        found = [text for file in read(tmp_path / name) for text in file.read()["text"].to_pylist()]
        orders.append([int(text.split()[0]) for text in found])
    assert orders[0] == orders[1] != orders[2]
    places = orders[0]
    n = len(places)
    mean_place = (n - 1) / 2 # rank correlation with the input: a standard deviation of 1 / sqrt(n)
    covariance = sum((i - mean_place) * (place - mean_place) for i, place in enumerate(places))
    assert abs(covariance / (n * (n * n - 1) / 12)) < 5 / n**0.5
    neighbours = sum(abs(a - b) == 1 for a, b in zip(places, places[1:]))
    assert neighbours < 15 # 2 are expected


def test_mistakes_leave_everything_as_it_was(tmp_path, texts, capsys):
    write(tmp_path / "in", texts[:5], parts=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(UserError, match="must be an empty folder"):
        run("--out", tmp_path / "out", "--from", tmp_path / "in")
    assert os.listdir(tmp_path / "out") == ["precious"]
    (tmp_path / "in" / "z.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="z.parquet cannot be read near its document 0"):
        run("--out", tmp_path / "new", "--from", tmp_path / "in")
    assert os.listdir(tmp_path / "new") == []
    with pytest.raises(SystemExit) as error:
        run("--out", tmp_path / "new", "--shard-chars", 0)
    assert error.value.code == 2
    write(tmp_path / "nothing", ["", ""], parts=1)
    with pytest.raises(ValueError, match="found no document"):
        run("--out", tmp_path / "new", "--from", tmp_path / "nothing")


@pytest.mark.slow
def test_memory_stays_flat_and_a_core_does_20_mb_a_second(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 9))) for _ in range(5000)]
    pages = [" ".join(rng.choices(words, k=500)) for _ in range(300)]
    (tmp_path / "in").mkdir()
    peaks = []
    for part in range(4): # 20 MB each; first one, then all
        texts = [f"{part} {i} " + rng.choice(pages) + " " + rng.choice(pages) for i in range(3400)]
        pq.write_table(pa.table({"text": texts}), tmp_path / "in" / f"{part}.parquet")
        if part in (0, 3):
            code = ("import resource, sys; from dev.repackage_data_reference import main; main(sys.argv[1:]); "
                    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
            done = subprocess.run([sys.executable, "-c", code, "--out", tmp_path / f"out{part}", "--from",
                                   tmp_path / "in", "--bucket-chars", "5000000", "--shard-chars", "15000000"],
                                  capture_output=True, text=True, check=True)
            told, peak = done.stdout.splitlines()
            peaks.append(int(peak) / (1 << 20 if sys.platform == "darwin" else 1 << 10)) # MB
    assert json.loads(told)["MB_per_s_and_core"] >= 20, told
    assert peaks[1] - peaks[0] < 60, peaks
