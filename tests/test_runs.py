"""The run file that the README begins with, whole but small, on a copy of the repository."""
import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import time
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


def run(repository, base, name="runcpu.sh", *arguments, **settings):
    return subprocess.run(["bash", f"runs/{name}", *arguments], cwd=repository, capture_output=True, text=True,
                          timeout=800, env={**os.environ, **TINY, "NANOCHAT_BASE_DIR": str(base), **settings})


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


def check_command(line):
    """Parse `python -m MODULE ...` less its -m, words set apart by tabs, as the program would; returns its name."""
    _, module, *arguments = [word for word in line.rstrip("\t").split("\t") if word != "--"]
    program = importlib.import_module(module)
    if module == "nanochat.report":
        assert arguments in (["reset"], ["generate"])
    else:
        args = program.build_parser().parse_args(arguments)
        assert not vars(args) or program.check_args(args) == [], line
    return module.rpartition(".")[2]


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
    modules = [check_command(line) for line in (tmp_path / "commands").read_text().splitlines()]
    for stage in ("tok_train", "base_train", "base_eval", "mid_train", "chat_sft", "chat_rl"):
        assert modules.count(stage) == 1 + (stage == "base_train" and name != "runcpu.sh"), stage # with a preflight
    assert modules.count("chat_eval") == 3 and modules.count("report") == 2


def test_the_commands_of_the_leaderboard_are_valid_and_its_first_row_is_what_runcpu_trains():
    lines = re.findall(r"^python (-m .*)$", (ROOT / "dev" / "LEADERBOARD.md").read_text("utf-8"), re.MULTILINE)
    commands = [line.replace(" ", "\t") for line in lines]
    assert [check_command(line) for line in commands if "\tscripts." in line] == ["tok_train", "base_train"]
    run_file = (ROOT / "runs" / "runcpu.sh").read_text("utf-8").replace('"${BASE_STEPS:-1000}"', "1000")
    differing = {"model-tag", "seed", "depth", "sample-every"}
    for flag, value in re.findall(r"--([\w-]+)=(\S+)", lines[-1]):
        assert flag in differing or f"--{flag}={value}" in run_file, flag


# ---- sweeps ----

def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_sweep_that_failed_goes_on_and_the_table_has_what_is_finished(repository, tmp_path):
    base, settings = tmp_path / "base", {"SIZE": "cpu-3min", "RATIO": "0.5", "DEPTHS": "1", "OMP_NUM_THREADS": "1",
                                         "BASE_FLAGS": "--eval-tokens=1024 --core-metric-every=-1"}
    first = run(repository, base, "miniseries.sh", "s", **settings | {"DEPTHS": "1 one"})
    assert first.returncode != 0 and "s_miniseries_done: failed with exit code 2" in first.stderr
    row, = table(base / "s_miniseries_results" / "results.csv")
    assert row["tag"] == "s_miniseries_d1" and row["depth"] == "1" and row["core_score"] == ""
    assert float(row["val_bpb"]) > 1
    again = run(repository, base, "miniseries.sh", "s", **settings)
    assert again.returncode == 0 and "=== s_miniseries_d1: complete already" in again.stdout
    assert "sweep-data: complete already" in again.stdout and "1 of 1 runs are in" in again.stdout
    two = run(repository, base, "scaling_laws.sh", "s", **settings, SKIP_SETUP="1", BUDGETS="5e9", NPROC_PER_NODE="2")
    assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-2000:]
    row, = table(base / "scaling_laws_results_s" / "results.csv")
    assert float(row["flops_budget"]) == 5e9 and "DDP world size: 2" in two.stdout


@pytest.mark.parametrize("size", ["gpu", "cpu-3min", "cpu-20min"])
@pytest.mark.parametrize("name", ["miniseries.sh", "scaling_laws.sh"])
def test_every_run_of_a_sweep_has_valid_flags_and_a_tag_of_its_own(tmp_path, monkeypatch, name, size):
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "setup.sh").write_text(
        "stage() { shift; \"$@\"; }\n"
        "python() { printf '%s\\n' \"$(printf '%s\\t' \"$@\")\" >> commands\n"
        "  if [[ \"$*\" =~ --model-tag=([^ ]+) ]]; then mkdir -p \"base_checkpoints/${BASH_REMATCH[1]}\"; fi; }\n"
        "torchrun() { shift 2; python \"$@\"; }\n")
    settings = {"NANOCHAT_BASE_DIR": str(tmp_path), "SIZE": size, "WANDB_RUN": "w", "NPROC_PER_NODE": "4"}
    done = subprocess.run(["bash", f"runs/{name}", "label"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "commands").read_text().splitlines()
    monkeypatch.setenv("WORLD_SIZE", "4")
    trained = [line for line in lines if "scripts.base_train" in line]
    assert [check_command(line) for line in trained] == ["base_train"] * len(trained)
    tags = [re.search(r"--model-tag=(\S+)", line)[1] for line in trained]
    assert all(f"--run=w_{tag}\t" in line for tag, line in zip(tags, trained))
    measured = [word for word in lines[-1].split("\t") if "label" in word and "/" not in word]
    assert sorted(measured) == sorted(tags) and len(set(tags)) == len(tags)
    expected = {"miniseries.sh": {"gpu": 11, "cpu-3min": 3, "cpu-20min": 4},
                "scaling_laws.sh": {"gpu": 28, "cpu-3min": 8, "cpu-20min": 15}}
    assert len(tags) == expected[name][size]


def test_an_unknown_size_is_refused(tmp_path):
    done = subprocess.run(["bash", "runs/miniseries.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "SIZE": "huge"})
    assert done.returncode == 2 and "SIZE must be gpu, cpu-3min or cpu-20min, got 'huge'" in done.stderr


# ---- several nodes: run files of which each writes its commands to a file, with the real `stage` ----

STAND_INS = """
log() { printf '%s\\n' "$(printf '%s\\t' "$@")" >> "$NANOCHAT_BASE_DIR/commands$NODE_RANK"; }
python() { # on a busy machine the other node needs a while to come and wait for the tokenizer
    if [[ "$*" == *tok_train* ]]; then sleep 2; else sleep 0.05; fi
    log python "$@"
    [[ "$*" != *"${FAILS:-nothing fails}"* ]]
}
torchrun() { # all nodes meet in it
    log torchrun "$@"
    until [[ "$(grep -c ^torchrun "$NANOCHAT_BASE_DIR/commands$((1 - NODE_RANK))")" -ge \\
        "$(grep -c ^torchrun "$NANOCHAT_BASE_DIR/commands$NODE_RANK")" ]]; do sleep 0.02; done 2>/dev/null
}
"""


def ends(*nodes):
    """Wait for started nodes; returns [(exit code, standard output, standard error)]."""
    texts = [node.communicate(timeout=60) for node in nodes]
    return [(node.returncode, *text) for node, text in zip(nodes, texts)]


@pytest.fixture
def nodes(tmp_path):
    """A function that starts the run file on a node; `base` is shared, unless a node is given its own."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    stage = re.search(r"^STAGE_CHAIN=.*?^}$", (ROOT / "runs" / "setup.sh").read_text(), re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "runs" / "setup.sh").write_text(STAND_INS + stage)
    (tmp_path / "base").mkdir()

    def start(rank, name="speedrun.sh", base=tmp_path / "base", **settings):
        environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "NNODES": "2", "NODE_RANK": str(rank),
                       "MASTER_ADDR": "first", "NODE_POLL": "0.05", "NODE_TIMEOUT": "60", "RL": "1", **settings}
        return subprocess.Popen(["bash", f"runs/{name}"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)
    return start


@pytest.mark.parametrize("name", ["speedrun.sh", "run1000.sh"])
def test_two_nodes_share_the_work(nodes, tmp_path, monkeypatch, name):
    """One process's stages on node 0 alone, the others on both, with the same command but for the rank, in order."""
    second = nodes(1, name)
    time.sleep(0.3)
    results = ends(nodes(0, name), second)
    assert [code for code, _, _ in results] == [0, 0], results
    assert "=== tokenizer: waiting for node 0" in results[1][1]
    monkeypatch.setenv("WORLD_SIZE", "16") # so that sizes are checked against all ranks
    alone, shared = [], []
    for line in (tmp_path / "base" / "commands0").read_text().splitlines():
        if line.startswith("torchrun"):
            _, *flags = line.rstrip("\t").partition("\t-m\t")[0].split("\t")
            assert flags == ["--nnodes=2", "--node-rank=0", "--master-addr=first", "--master-port=29500",
                             "--rdzv-conf=timeout=60", "--nproc-per-node=8"]
            shared.append(line)
            check_command("-m\t" + line.partition("\t-m\t")[2])
        else:
            alone.append(check_command(line.removeprefix("python\t")))
    assert sorted(alone) == ["dataset", "dataset", "report", "report", "tok_eval", "tok_train"]
    assert len(shared) == 10
    of_second = (tmp_path / "base" / "commands1").read_text().splitlines()
    assert of_second == [line.replace("--node-rank=0", "--node-rank=1") for line in shared]


def test_a_second_run_finds_everything_complete_on_both_nodes(nodes, tmp_path):
    for again in range(2):
        both = ends(nodes(0, MASTER_ADDR=f"host{again}"), nodes(1, MASTER_ADDR=f"host{again}"))
        assert [code for code, _, _ in both] == [0, 0]
    assert (tmp_path / "base" / "commands1").read_text().count("scripts.base_train") == 2 # preflight, training
    assert both[1][1].count("complete already") == both[0][1].count("complete already") == 16


def test_shards_on_a_disk_of_each_node_are_downloaded_by_each(nodes, tmp_path):
    (tmp_path / "base" / "base_data").symlink_to(tmp_path)
    assert [code for code, _, _ in ends(nodes(0), nodes(1))] == [0, 0]
    preflight, first = (tmp_path / "base" / "commands1").read_text().splitlines()[:2]
    assert "--preflight=machine" in preflight
    assert first.rstrip("\t").split("\t") == ["python", "-m", "nanochat.dataset", "-n", "280"]


def test_the_others_end_when_node_0_fails_and_when_a_node_does_not_come(nodes, tmp_path):
    both = ends(nodes(0, FAILS="tok_train"), nodes(1))
    assert [code for code, _, _ in both] == [1, 1]
    assert "tokenizer: node 0 failed; to go on from here, run this again on all nodes" in both[1][2]
    apart = ends(*(nodes(rank, base=tmp_path / f"disk{rank}", NODE_TIMEOUT="1") for rank in (0, 1)))
    for rank, (code, _, error) in enumerate(apart):
        assert code == 2 and f"node {1 - rank} has not come to {tmp_path}/disk{rank} in" in error
    for code, _, error in ends(nodes(0, MASTER_ADDR=""), nodes(2)):
        assert code == 2 and "set MASTER_ADDR to the host of node 0" in error


def test_slurm_starts_a_node_each_and_queues_a_stopped_job_again(tmp_path):
    """With stand-ins for Slurm's programs, and a run file that tells its settings and waits to be stopped."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "told.sh").write_text(
        'trap "kill \\$!; exit 143" TERM\n'
        'echo "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT" > "told$NODE_RANK"; sleep 60 & wait\n')
    programs = {
        "srun": 'shift\npids=""\nfor rank in 0 1; do SLURM_PROCID=$rank "$@" & pids="$pids $!"; done\n'
                'echo $pids > pids\ncode=0\nfor pid in $pids; do wait $pid || code=$?; done\nexit $code\n',
        "scontrol": 'if [ "$1" = show ]; then echo alpha; echo beta; else echo "$*" > requeued; fi\n',
        "scancel": 'echo "$*" > cancelled; kill -TERM $(cat pids)\n'}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text("#!/bin/bash\n" + text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = subprocess.Popen(["bash", "runs/slurm.sh", "told.sh"], cwd=tmp_path, env={
        **os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "12345"})
    deadline = time.time() + 30
    while not all((tmp_path / f"told{rank}").exists() for rank in (0, 1)) and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    job.terminate()
    assert job.wait(30) == 143
    assert [(tmp_path / f"told{rank}").read_text() for rank in (0, 1)] == ["2 0 alpha 22345\n", "2 1 alpha 22345\n"]
    assert (tmp_path / "cancelled").read_text() == "--signal=TERM 12345.0\n"
    assert (tmp_path / "requeued").read_text() == "requeue 12345\n"
