import errno
import hashlib
import logging
import math
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp

from nanochat import common
from nanochat.common import ColoredFormatter, Compute, UserError, atomic_write, claim_base_dir, compute_init
from tests.hub_server import HubServer

SINGLE = Compute(False, 0, 0, 1, torch.device("cpu"))


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def names(folder):
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock")) # locks stay


@pytest.mark.parametrize("error, code, words", [
    (ValueError("bad"), 1, "error: bad\n"), (UserError("bad"), 1, "error: bad\n"), (OSError("bad"), 1, "error: bad\n"),
    (OSError(errno.ENOSPC, "full", "a.tmp", None, "a"), 1, "error: a: full; make room there\n"),
    (OSError(errno.EROFS, "read-only", "a"), 1, "error: a: read-only; use a folder that you may write to\n"),
    (ValueError(), 1, "error: ValueError\n"), (KeyboardInterrupt(), 130, "")])
def test_run_main_tells_the_user_in_one_line(error, code, words, monkeypatch, capsys):
    def main():
        raise error
    monkeypatch.delenv("NANOCHAT_DEBUG", raising=False)
    with pytest.raises(SystemExit) as leaving:
        common.run_main(main)
    assert leaving.value.code == code and capsys.readouterr().err == words
    monkeypatch.setenv("NANOCHAT_DEBUG", "1")
    with pytest.raises(type(error) if code == 1 else SystemExit):
        common.run_main(main)


def test_base_dir_is_read_anew_and_made(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, folder in ((str(tmp_path / "a" / "b"), tmp_path / "a" / "b"), ("", tmp_path / ".cache" / "nanochat")):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", value)
        assert common.get_base_dir() == str(folder) and folder.is_dir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", os.path.join(__file__, "base"))
    with pytest.raises(UserError, match="cannot use the base directory .*: set NANOCHAT_BASE_DIR to a folder"):
        common.get_base_dir()


def test_a_base_dir_that_cannot_be_written_is_refused_at_once_but_to_readers(base, monkeypatch, capsys):
    monkeypatch.setattr(common, "_writes", False) # back to this after the test
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    common.run_main(common.get_base_dir, writes=False)
    with pytest.raises(SystemExit):
        common.run_main(common.get_base_dir)
    assert f"cannot use the base directory {base} (it is not writable)" in capsys.readouterr().err


def test_files_are_whole_or_absent_and_json_is_standard(tmp_path):
    path, meet = tmp_path / "new" / "x.txt", threading.Barrier(2, timeout=60)
    def write(letter):
        with atomic_write(path) as file:
            meet.wait()
            file.write(letter * 100_000)
            meet.wait()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, "ab"))
    old = path.read_bytes()
    assert old in (b"a" * 100_000, b"b" * 100_000) and common.file_sha256(path) == hashlib.sha256(old).hexdigest()
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "wb") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == old and names(path.parent) == ["x.txt"]
    common.write_json(path, {"n": [math.nan, (-math.inf, 1.5)], "s": "\u00e9", "b": True})
    assert path.read_text("utf-8").startswith('{\n  "n": [\n    null,') and "\u00e9" in path.read_text("utf-8")
    assert common.read_json(path) == {"n": [None, [None, 1.5]], "s": "\u00e9", "b": True}
    path.write_text("{")
    with pytest.raises(ValueError, match="x.txt is not valid JSON .*: delete it or restore it"):
        common.read_json(path)


def test_a_base_dir_holds_one_data_set(base):
    assert common.read_manifest() is None and common.dataset_label() == ""
    claim_base_dir("own", False, "shard_3.parquet", {"a": {"size": 1, "sha256": "00"}})
    manifest = claim_base_dir("own", False, files={"b": {"size": 2, "sha256": "01"}})
    assert manifest["validation_shard"] == "shard_3.parquet" and sorted(manifest["files"]) == ["a", "b"]
    for name in ("tinyworld", "own"):
        with pytest.raises(UserError, match=f"data set own, not {name} .synthetic.*set NANOCHAT_BASE_DIR to another"):
            claim_base_dir(name, True)
    assert common.read_manifest() == manifest and common.dataset_label() == ""


def test_of_two_first_claims_at_once_one_wins(base, monkeypatch):
    write = common.write_json
    monkeypatch.setattr(common, "write_json", lambda *args: time.sleep(0.2) or write(*args)) # time for the other
    def claim(name):
        try:
            return claim_base_dir(name, True)["name"]
        except UserError as error:
            return str(error)
    with ThreadPoolExecutor(2) as pool:
        won, lost = sorted(pool.map(claim, "ab"), key=len)
    assert won == common.read_manifest()["name"] and f"holds the data set {won}, not " in lost
    claim_base_dir(won, True)
    assert os.listdir(base) == ["manifest.json"]


@pytest.mark.parametrize("fault, words", [("404", "check the network"), ("500", "check the network"),
                                          ("truncate", "could not download|sent 5 of 11 bytes"),
                                          ("length", "sent 11 of 12 bytes: run"), ("process", "broken archive")])
def test_a_failed_download_leaves_nothing_and_is_tried_again(base, fault, words, monkeypatch):
    sizes = []
    def process(path):
        sizes.append(os.path.getsize(path))
        if fault == "process" and len(sizes) == 1:
            raise UserError("broken archive")
    def download(_):
        return common.download_file_with_lock(f"{hub.url}/x.txt", "x.txt", process)
    with HubServer({"/x.txt": b"hello world"}) as hub, ThreadPoolExecutor(3) as pool:
        hub.fail("/x.txt", fault)
        with monkeypatch.context() as patch, pytest.raises(UserError, match=words):
            if fault == "length":
                patch.setattr("requests.Response.__enter__", lambda r: r.headers.update({"Content-Length": "12"}) or r)
            download(1)
        assert names(base) == [] and list(pool.map(download, range(3))) == [str(base / "x.txt")] * 3 # fetched once
        assert len(hub.requests) == 2 and sizes[-1] == 11 and names(base) == ["x.txt"]


def test_hub_data_sets_come_from_the_mirror_and_never_mix(base):
    from pyarrow import parquet, table
    folder = base / "hub" / "owner" / "data" / "default" / "test"
    for part, rows in (("b.parquet", [3]), ("a.parquet", [1, 2]), ("c.parquet.tmp", [4])):
        with atomic_write(folder / part, "wb") as file:
            parquet.write_table(table({"x": rows}), file)
    claim_base_dir("tinyworld", True)
    assert common.load_hub_dataset("owner/data", split="test")["x"][:] == [1, 2, 3]
    assert common.dataset_label() == "tinyworld" # marks scores on stand-ins
    with pytest.raises(UserError, match=r"tinyworld, so owner/data \(default, train\) is not fetched into it"):
        common.load_hub_dataset("owner/data")
    with pytest.raises(UserError, match="tinyworld, so x.txt is not fetched into it: set NANOCHAT_BASE_DIR"):
        common.download_file_with_lock("http://127.0.0.1:1/x.txt", "x.txt")
    (base / "x.txt").write_text("own") # is kept
    assert common.download_file_with_lock("http://127.0.0.1:1/x.txt", "x.txt") == str(base / "x.txt")


@pytest.mark.parametrize("level, color", [*zip("DEBUG INFO WARNING ERROR CRITICAL".split(), (36, 32, 33, 31, 35))])
def test_the_formatter_colours_a_copy(level, color):
    record = logging.makeLogRecord({"name": "n", "levelname": level, "msg": "Shard %d: 1.5 GB", "args": (7,)})
    message = "\033[1m\033[32mShard 7\033[0m: \033[1m1.5 GB\033[0m" if level == "INFO" else "Shard 7: 1.5 GB"
    colored = ColoredFormatter("%(levelname)s|%(message)s").format(record)
    assert colored == f"\033[1m\033[{color}m{level}\033[0m|{message}"
    assert ColoredFormatter(colored=False).format(record).endswith(f" - n - {level} - Shard 7: 1.5 GB")


def test_one_process(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    common.print_banner()
    monkeypatch.setenv("RANK", "0")
    common.print0("only rank 0", end="!")
    assert capsys.readouterr().out == "only rank 0!"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb, or leave --run at dummy"):
        common.init_wandb("x", SINGLE, "project", {})
    class Error(Exception):
        pass
    def init(**kwargs):
        raise Error("No API key configured.")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Error=Error, init=init))
    with pytest.raises(UserError, match="cannot log this run .No API key configured.*set WANDB_MODE=offline, or leave"):
        common.init_wandb("x", SINGLE, "project", {})
    assert common.init_wandb("x", SINGLE._replace(ddp_rank=1), "project", {}).log({"x": 1}, step=2) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert compute_init("") == SINGLE and SINGLE.is_master and common.get_dist_info() == (False, 0, 0, 1)
    assert SINGLE.all_reduce(1, 2.5, op="max") == [1.0, 2.5] and SINGLE.all_gather({"a": 1}) == [{"a": 1}]
    with pytest.raises(ValueError, match="must be cuda, mps or cpu, got 'tpu'"):
        compute_init("tpu")
    with pytest.raises(UserError, match="no cuda device that torch can use: pass --device-type cpu"):
        compute_init("cuda")
    with pytest.raises(UserError, match="mps runs on one process only: start without torchrun"):
        common._join_process_group(torch.device("mps"), world_size=2)


def rank_of_two(rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    compute = compute_init("cpu")
    assert compute == Compute(True, rank, rank, 2, torch.device("cpu"))
    assert compute.all_reduce(rank + 1, 0.5) == [3.0, 1.0] and compute.all_reduce(rank, op="max") == [1.0]
    assert compute.all_gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert common.is_ddp_initialized() and not common.compute_cleanup() and not common.is_ddp_initialized()


@pytest.mark.slow
def test_two_gloo_ranks():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    mp.spawn(rank_of_two, (port,), nprocs=2)


def test_compute_dtype_and_tf32(monkeypatch):
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, answer=capability: answer)
        assert common.get_compute_dtype("cuda") == dtype
    for features, dtype in (((), torch.float32), (("amx_tile",), torch.bfloat16), (("avx512_bf16",), torch.bfloat16)):
        monkeypatch.setattr(common, "_cpu_has", features.__contains__)
        assert common.get_compute_dtype("cpu") == dtype
    assert common.get_compute_dtype("cpu", "float32") == common.get_compute_dtype("mps") == torch.float32
    for has, after in (({"fp32_precision": "ieee"}, {"fp32_precision": "tf32"}), ({}, {"allow_tf32": True})):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(**has))
        common._allow_tf32()
        assert vars(torch.backends.cuda.matmul) == after # one of the two switches, never both


@pytest.mark.parametrize("name, tera", [entry.strip().rsplit(" ", 1) for entry in """
    GB200 2500, B200 2250, B100 1800, H200 NVL 836, H200 989, H100 NVL 835, H100 PCIe 756, H100 80GB HBM3 989,
    H800 NVL 989, H800 756, A100-SXM4-80GB 312, A800 312, A40 149.7, A30 165, L40S 362, L40-S 362, L4 121, L40 inf,
    RTX A4000 inf, RTX A3000 inf, abacus inf, GeForce RTX 5090 209.5, RTX 4090 165.2, RTX 3090 71, MI355X 2500,
    MI355 2500, AMD Instinct MI325X 1307.4, MI325 1307.4, MI300X 1307.4, MI300A 980.6, MI250X 383, MI250 362.1,
    Intel(R) Data Center GPU Max 1550 681.574""".split(",")])
def test_peak_flops(name, tera, monkeypatch, caplog):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(max_compute_units=1024))
    assert common.get_peak_flops(f"NVIDIA {name}") == pytest.approx(float(tera) * 1e12, rel=1e-6)
    assert ("MFU will read 0 %" in caplog.text) == (tera == "inf")
