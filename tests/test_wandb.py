"""Logging to wandb with the real package, without its service: a training run offline, and what it left on disk."""
import json
import os
import subprocess
import sys

import pytest
from test_base_train import TINY, world # noqa: F401 (a fixture)


def read_records(data):
    """The records (bytes) of a .wandb file: 7 bytes, then LevelDB's log format, in blocks of 32 KiB."""
    place, record = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7: # too little for another head
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4:place + 6], "little"), data[place + 6]
        record += data[place + 7:place + 7 + size]
        place += 7 + size
        if kind in (1, 4): # whole, or the last part of one
            yield record
            record = b""


def read_run(path):
    """(run record, logged lines as dicts) of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record
    run, lines = None, []
    for data in read_records(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "run":
            run = record.run
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            lines.append({key: json.loads(value) for key, value in items.items()})
    return run, lines


@pytest.mark.slow
def test_an_offline_run_holds_what_the_training_logged(world, tmp_path): # noqa: F811
    pytest.importorskip("wandb")
    environment = {**os.environ, "NANOCHAT_BASE_DIR": world, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path),
                   "WANDB_SILENT": "true"}
    run = subprocess.run([sys.executable, "-m", "scripts.base_train", *TINY, "--run=my run", "--model-tag=offline",
                          "--num-iterations=2"], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    file, = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    head, history = read_run(file)
    config = {item.key: json.loads(item.value_json) for item in head.config.update}
    assert (head.display_name, head.project) == ("my run", "nanochat")
    assert config["depth"] == 2 and config["num_iterations"] == 2
    with open(os.path.join(world, "base_checkpoints", "offline", "metrics.jsonl")) as file:
        recorded = [json.loads(line) for line in file]
    for key in ("train/loss", "val/bpb"): # wandb gets the smoothed loss, which at the first step is the loss
        logged = {line["step"]: line[key] for line in history if key in line}
        written = {line["step"]: line[key] for line in recorded if key in line and line["step"] in logged}
        assert logged == pytest.approx(written) and logged
