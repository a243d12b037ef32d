"""chat_web as a program: what it says when it cannot start, and that it ends well."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch

from nanochat.common import UserError
from scripts import chat_web
from tests.chat_world import save_tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
ASK = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 8}


@pytest.fixture()
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_API_KEY", raising=False)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(tmp_path / "base" / "tokenizer"))
    return lambda: save_tiny_model(tokenizer, "sft", "d2")


def test_a_port_in_use_is_told_before_a_model_is_loaded(base):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1, port {port} .*: choose another --port"):
            chat_web.main(["--port", str(port), "--device-type", "cpu"])
    with pytest.raises(UserError, match="cannot listen at nowhere.invalid"):
        chat_web.main(["--host", "nowhere.invalid", "--device-type", "cpu"])


def test_without_a_checkpoint_it_says_so(base):
    with pytest.raises(FileNotFoundError, match="no complete checkpoint in .*sft"):
        chat_web.main(["--port", "0", "--device-type", "cpu"])


def test_replicas_need_gpus(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert chat_web.devices_of(cpu, 0) == chat_web.devices_of(cpu, 1) == [cpu]
    with pytest.raises(UserError, match="--num-gpus 2 needs CUDA devices, this is cpu"):
        chat_web.devices_of(cpu, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device.index for device in chat_web.devices_of(cuda, 0)] == [0, 1]
    assert [device.index for device in chat_web.devices_of(cuda, 1)] == [0]
    with pytest.raises(UserError, match="--num-gpus 3 is more than the 2 GPU"):
        chat_web.devices_of(cuda, 3)


@pytest.mark.parametrize("host, has_key, words", [
    ("127.0.0.1", False, "ssh -L 80:localhost:80"), ("::1", True, "ssh -L"),
    ("0.0.0.0", False, "Warning: everybody"), ("0.0.0.0", True, "")])
def test_who_can_reach_it_is_said(capsys, host, has_key, words):
    chat_web.announce(host, 80, has_key)
    out = capsys.readouterr().out
    assert words in out and ("Warning" in out) == words.startswith("Warning")


@pytest.mark.slow
def test_from_any_folder_until_a_signal(base, tmp_path):
    base()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NANOCHAT_API_KEY": "k"}
    flags = ["--port", "0", "--device-type", "cpu", "--dtype", "float32", "--drain", "60"]
    process = subprocess.Popen([sys.executable, "-m", "scripts.chat_web", *flags], cwd=tmp_path, env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (found := re.search(r"Chat at (http://localhost:\d+)/", process.stdout.readline())):
            assert process.poll() is None, process.stderr.read()
        with httpx.Client(base_url=found[1].replace("localhost", "127.0.0.1"), timeout=60, verify=False) as client:
            health = client.get("/health").json()
            assert health["model"] == "d2-sft" and health["context"] == 64 and health["needs_key"]
            assert client.post("/chat/completions", json=ASK).status_code == 401
            client.headers["Authorization"] = "Bearer k"
            events = client.post("/chat/completions", json=ASK).text.split("\n\n")
            assert json.loads(events[-2][6:])["done"]
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=15)
        assert process.returncode == 0 and time.monotonic() - start < 10, log
        assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d - [0-9a-f]{24} 200 prompt 7 ", log) and "the cat" not in log
    finally:
        process.kill()
        process.communicate()


STUCK = """
import time
from nanochat import engine
forward = engine.Engine.logits_at
def slow(self, *args):
    time.sleep(1.5)
    return forward(self, *args)
engine.Engine.logits_at = slow
from scripts import chat_web
chat_web.main({flags})
"""


@pytest.mark.slow
@pytest.mark.parametrize("signals, drain", [([signal.SIGTERM], "0.2"), ([signal.SIGINT] * 2, "60")])
def test_an_open_stream_is_ended_with_an_event(base, tmp_path, signals, drain):
    """When its time is over, or at the second signal."""
    base()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--port", str(port), "--device-type", "cpu", "--dtype", "float32", "--drain", drain]
    process = subprocess.Popen([sys.executable, "-c", STUCK.format(flags=flags)], cwd=tmp_path, stdout=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True)
    try:
        while "Chat at" not in process.stdout.readline():
            assert process.poll() is None
        with httpx.stream("POST", f"http://127.0.0.1:{port}/chat/completions", json=ASK, timeout=60) as response:
            for number in signals:
                process.send_signal(number)
                time.sleep(0.2)
            *_, last = (line for line in response.iter_lines() if line)
        assert json.loads(last[6:])["error"]["code"] == "shutting_down"
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_crowd_of_clients_leaves_nothing_behind():
    """64 clients for half a minute, a third of whom leave in the middle; dev/bench_serve.py has the longer form."""
    command = [sys.executable, "-m", "dev.bench_serve", "--load", "30", "--depth", "2", "--vocab-size", "512"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["right"] > 100 and result["wrong"] == result["rows left"] == result["waiting left"] == 0
    assert result["left or refused"] > 20 and result["threads more"] < 20 and result["MiB more"] < 300
