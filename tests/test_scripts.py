"""The desk: every program answers --help and refuses bad flags in one sentence; the run files know what is done."""
import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(f"scripts.{path.stem}" for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__")
PROGRAMS = [*SCRIPTS, "nanochat.dataset", "nanochat.report", "dev.tinyworld.generate"]
REQUIRED = {"scripts.chat_eval": ["-i", "sft"]} # flags without which a program is not even asked about others
BAD = [
    ("scripts.base_train", "--depth 0", "--depth must be at least 1, got 0"),
    ("scripts.base_train", "--window-pattern SX", "window_pattern"),
    ("scripts.base_train", "--device-batch-size 3 --total-batch-size 8192", "--total-batch-size"),
    ("scripts.base_train", "--num-iterations -1 --target-param-data-ratio -1", "--num-iterations"),
    ("scripts.base_train", "--depth 4 --head-dim 63", "head dimension"),
    ("scripts.base_train", "--depth 0 --max-seq-len 0", "--max-seq-len"), # all problems at once
    ("scripts.base_train", "--matrix-lr nan", "--matrix-lr must be a finite number, got nan"),
    ("scripts.base_train", f"--seed {2**63}", "--seed must be at least 0 and below 2^63"),
    ("scripts.base_loss", "--split-tokens 0", "--split-tokens must be at least 1, got 0"),
    ("scripts.base_eval", "--max-per-task 0", "--max-per-task"),
    ("scripts.tok_train", "--vocab-size 264", "--vocab-size must be at least 265"),
    ("scripts.tok_train", "--max-chars 0", "--max-chars"),
    ("scripts.chat_sft", "--device-batch-size 0", "--device-batch-size must be at least 1, got 0"),
    ("scripts.chat_sft", "--resume --overwrite", "exclude each other"),
    ("scripts.chat_sft", "--save-every -5", "--save-every must be a number of steps, or -1 for never, got -5"),
    ("scripts.mid_train", "--eval-every -2", "--eval-every must be a number of steps, or -1 for never, got -2"),
    ("scripts.chat_rl", "--num-samples 0", "--num-samples must be at least 1, got 0"),
    ("scripts.chat_sft", "--init-lr-frac inf", "--init-lr-frac must be a finite number, got inf"),
    ("scripts.chat_eval", "-a NoSuchTask", "NoSuchTask"),
    ("scripts.chat_eval", "--temperature -1", "--temperature must be at least 0"),
    ("scripts.chat_cli", "--max-tokens 0", "--max-tokens must be at least 1, got 0"),
    ("scripts.chat_web", "--temperature 2.5", "--temperature must be between 0 and 2, got 2.5"),
    ("scripts.chat_web", "-k 201 -m 0 -t nan", "--max-tokens must be between 1 and 4096, got 0"),
    ("scripts.chat_web", "--max-batch 0 --max-queue -1", "--max-queue must be at least 0, got -1"),
    ("scripts.chat_web", "--port 65536", "--port must be between 0 and 65535, got 65536"),
    ("scripts.chat_web", "--cors-origin *", "--cors-origin must name an origin"),
    ("scripts.plan", "--gpu abacus", "--gpu must be one of"),
    ("scripts.plan", "--depth 2 --core 0.2", "give one of --depth, --dollars, --hours and --core"),
    ("nanochat.dataset", "-n 2 -w 0", "--num-workers must be at least 1, got 0"),
    ("dev.tinyworld.generate", "--facts 1", "--facts must be at least"),
]


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    """A base directory that does not exist: no usage error comes late enough to make it."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    yield tmp_path / "base"
    assert not (tmp_path / "base").exists()


def start(*command, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run([sys.executable, "-m", *command], cwd=cwd, env=environment, capture_output=True, text=True,
                          timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_in_a_process_of_its_own(program, tmp_path):
    done = start(program, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ") and done.stderr == ""


def usage_error(program, arguments, capsys):
    """What a program says to bad flags; it must exit with 2 before it does anything."""
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(program).main([*REQUIRED.get(program, []), *arguments])
    text = capsys.readouterr().err
    assert stop.value.code == 2, text
    assert text.startswith("usage: ") and "error: " in text and "Traceback" not in text
    return text


def parser_of(program):
    """The argument parser of a program: what its main parses with."""
    caught = []

    class Caught(Exception):
        pass

    def catch(self, *args, **kwargs):
        caught.append(self)
        raise Caught

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        with pytest.raises(Caught):
            importlib.import_module(program).main([])
    return caught[0]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_has_help_and_refuses_nonsense(program, capsys):
    parser = parser_of(program)
    assert parser.description, "what the program is for, in one sentence"
    usage_error(program, ["--no-such-flag"], capsys)
    for action in parser._actions:
        assert action.help, f"{action.option_strings} has no help"
        flags = [flag for flag in action.option_strings if flag.startswith("--")]
        if action.option_strings:
            assert all(re.fullmatch(r"--[a-z0-9-]+", flag) for flag in flags), "flags are spelled with dashes"
        if action.type in (int, float) or action.choices:
            assert "invalid" in usage_error(program, [*action.option_strings[-1:], "nonsense"], capsys)


@pytest.mark.parametrize("program", SCRIPTS)
def test_a_script_has_the_common_shape(program):
    script = importlib.import_module(program)
    args = script.build_parser().parse_args(REQUIRED.get(program, []))
    if vars(args):
        assert script.check_args(args) == [], "the defaults are valid"
    ending = r'if __name__ == "__main__":\n    run_main\(main(, writes=False)?\)\n$'
    assert re.search(ending, (ROOT / f"{program.replace('.', '/')}.py").read_text("utf-8"))


@pytest.mark.parametrize("program, arguments, sentence", BAD, ids=[" ".join(bad[:2]) for bad in BAD])
def test_bad_values_get_a_sentence(program, arguments, sentence, capsys):
    text = " ".join(usage_error(program, arguments.split(), capsys).split())
    assert sentence in text[text.index("error: "):]


@pytest.mark.slow
def test_a_usage_error_and_a_users_error_in_a_process_of_their_own(tmp_path, base):
    done = start("scripts.tok_train", "--vocab-size", "7", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    done = start("scripts.base_eval", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no complete checkpoint in ")
    shutil.rmtree(base, ignore_errors=True)


# ---- run files ----

RUN_FILES = sorted(path.name for path in (ROOT / "runs").glob("*.sh"))
bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@bash
@pytest.mark.parametrize("name", RUN_FILES)
def test_run_files_parse(name):
    subprocess.run(["bash", "-n", ROOT / "runs" / name], check=True)


@pytest.mark.parametrize("name", RUN_FILES)
def test_flags_in_run_files_exist(name):
    """Every `python -m program flags` of the run files is understood by that program's parser."""
    text = (ROOT / "runs" / name).read_text("utf-8").replace("\\\n", " ")
    for program, flags in re.findall(r"-m ((?:scripts|nanochat|dev)\.[\w.]+)([^\n;|&]*)", text):
        known = {flag for action in parser_of(program)._actions for flag in action.option_strings}
        used = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", flags.split(" #")[0]))
        assert used <= known, f"{program} has no {used - known}"


def run_stages(base, *lines):
    """Run `lines` of a run file with the `stage` of setup.sh; returns (exit code, standard output)."""
    setup = (ROOT / "runs" / "setup.sh").read_text("utf-8")
    stage = re.search(r"^STAGE_CHAIN=.*?^}$", setup, re.MULTILINE | re.DOTALL)[0]
    script = "\n".join(["set -euo pipefail", f"export NANOCHAT_BASE_DIR={shlex.quote(str(base))}", stage, *lines])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    return done.returncode, done.stdout


@bash
def test_a_stage_runs_once(tmp_path):
    home, lines = tmp_path / "a base", ["stage one echo 'hello  $1'", "stage two echo second"]
    assert "hello  $1" in run_stages(home, *lines)[1].splitlines()
    code, output = run_stages(home, *lines)
    assert (code, output) == (0, "=== one: complete already\n=== two: complete already\n")


@bash
def test_a_changed_stage_runs_again_with_all_after_it(tmp_path):
    home = tmp_path / "home"
    run_stages(home, "stage one echo first", "stage two echo second")
    output = run_stages(home, "stage one echo changed", "stage two echo second")[1].splitlines()
    assert "changed" in output and "second" in output


@bash
def test_a_failed_stage_ends_the_run_and_is_tried_again(tmp_path):
    home = tmp_path / "home"
    code, output = run_stages(home, "stage one true", "stage two false", "stage three echo unreached")
    assert code == 1 and "unreached" not in output
    code, output = run_stages(home, "stage one true", "stage two true", "stage three echo reached")
    assert code == 0 and "reached" in output.splitlines() and "=== one: complete already" in output
