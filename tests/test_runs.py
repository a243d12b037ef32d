"""The run file that the README begins with, whole but small, on a copy of the repository."""
import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = {"FACTS": "60", "VOCAB_SIZE": "600", "DEPTH": "1", "BASE_STEPS": "12",
        "MID_STEPS": "4", "SFT_STEPS": "4", "RL_STEPS": "2", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def repository(tmp_path):
    """A copy without history: a run file writes report.md into the repository, and the user's own must stay."""
    if not (ROOT / ".venv" / ".setup-complete").exists():
        pytest.skip("needs the environment that runs/setup.sh makes")
    copy = tmp_path / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "report.md", "report_*.png"))
    os.symlink(ROOT / ".venv", copy / ".venv")
    return copy


def run(repository, base, **settings):
    return subprocess.run(["bash", "runs/runcpu.sh"], cwd=repository, capture_output=True, text=True, timeout=800,
                          env={**os.environ, **TINY, "NANOCHAT_BASE_DIR": str(base), **settings})


@pytest.mark.slow
def test_from_nothing_to_a_chat_and_again_where_it_was_cut_off(repository, tmp_path):
    base = tmp_path / "base"
    first = run(repository, base, BASE_STEPS="not a number") # fails in the middle, as a mistake or a power cut would
    assert first.returncode != 0 and "base-train: failed with exit code 2" in first.stderr
    assert not (base / "base_checkpoints").exists()

    second = run(repository, base)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-2000:]
    assert "=== tokenizer: complete already" in second.stdout and "=== base-train: done" in second.stdout
    assert second.stdout.count("Assistant: ") == 3
    page = (repository / "report.md").read_text()
    assert "tinyworld" in page and "| CORE" in page and (base / "chat_eval").is_dir()
    lines = (base / "base_checkpoints" / "d1" / "metrics.jsonl").read_text().splitlines()
    assert [line["step"] for line in map(json.loads, lines) if "train/loss" in line] == list(range(12))

    third = run(repository, base)
    assert third.returncode == 0 and "done in" not in third.stdout


@pytest.mark.parametrize("name", ["speedrun.sh", "run1000.sh", "runcpu.sh"])
@pytest.mark.parametrize("data", ["tinyworld", "fineweb-edu"])
def test_every_command_of_a_run_file_has_valid_flags(tmp_path, name, data):
    """Not run but written down, by functions in the place of the programs; then parsed by the programs' own parsers."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "setup.sh").write_text(
        "stage() { shift; \"$@\"; }\ncurl() { :; }\nmv() { :; }\n"
        "python() { printf '%s\\n' \"$(printf '%s\\t' \"$@\")\" >> commands; }\n"
        "torchrun() { shift 2; python \"${@/#--/--}\"; }\n")
    done = subprocess.run(["bash", f"runs/{name}"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "DATA": data, "RL": "1"})
    assert done.returncode == 0, done.stderr
    modules = []
    for line in (tmp_path / "commands").read_text().splitlines():
        _, module, *arguments = [word for word in line.rstrip("\t").split("\t") if word != "--"]
        modules.append(module.rpartition(".")[2])
        program = importlib.import_module(module)
        if module == "nanochat.report":
            assert arguments in (["reset"], ["generate"])
        else:
            args = program.build_parser().parse_args(arguments)
            assert not vars(args) or program.check_args(args) == [], line
    for stage in ("tok_train", "base_train", "base_eval", "mid_train", "chat_sft", "chat_rl"):
        assert modules.count(stage) == 1, stage
    assert modules.count("chat_eval") == 3 and modules.count("report") == 2
