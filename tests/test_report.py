"""The record of a run: sections, header, summary table by exact keys, plots, and every defect of the seed's report."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat import report
from nanochat.common import UserError, write_json
from nanochat.report import DummyReport, Report, find_metrics, format_value, get_report, render_section, render_table


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A base directory, and an empty current folder beside it."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def read(path):
    return Path(path).read_text("utf-8")


@pytest.mark.parametrize("value, shown", [
    (0.0, "0.0000"), (0.12345, "0.1235"), (-2.5, "-2.5000"), (0.001, "0.0010"), (1e-5, "1e-05"),
    (-3.21e-7, "-3.21e-07"), (9999, "9999"), (10000, "10,000"), (True, "True"), ("a:b", "a:b"), (None, "None"),
    (math.inf, "inf"), (math.nan, "nan"),
])
def test_values_are_shown_with_their_digits(value, shown):
    assert format_value(value) == shown


def test_a_section_has_title_time_blank_line_and_bullets():
    data = [{"lr": 0.02, "run": "dummy"}, None, "", "as it is: *x*", {"steps": 12345}]
    assert render_section("Chat SFT", "2026-01-29 10:00:00", data).splitlines() == [
        "## Chat SFT", "timestamp: 2026-01-29 10:00:00", "", "- lr: 0.0200", "- run: dummy",
        "as it is: *x*", "- steps: 12,345"]


def test_a_fact_is_printed_once_but_a_changed_one_again():
    text = render_section("X", "now", [{"warmup_ratio": 0.0, "a": 1}, {"warmup_ratio": 0.0, "a": 2}])
    assert text.count("warmup_ratio") == 1
    assert "- a: 1\n- a: 2\n" in text


def test_log_writes_markdown_and_json_and_overwrites(home):
    path = get_report().log("Base model training", [{"first": 1}])
    data = [{"loss": np.float32(0.5), "device": torch.device("cpu"), "bpb": math.inf}]
    path = get_report().log("Base model training", data)
    assert path == str(home / "base" / "report" / "base-model-training.md")
    assert "first" not in read(path)
    facts = json.loads(read(path[:-3] + ".json"))
    assert facts["section"] == "Base model training"
    assert facts["data"] == [{"loss": 0.5, "device": "cpu", "bpb": None}]


def test_metrics_come_from_exact_keys_not_from_text():
    """An argument line that names tasks and a sample that speaks of CORE misled the seed's substring search."""
    data = [{"task_name": "ARC-Easy|MMLU", "temperature": 0.0, "source": "sft"}, "- CORE metric: 9.9 said the sample",
            {"ARC-Easy": 0.5, "GSM8K": 0.25, "Number of problems": 7.5, "GSM8K passed": 12, "ChatCORE metric": 0.125}]
    assert find_metrics({"data": data}) == {"ARC-Easy": 0.5, "GSM8K": 0.25, "ChatCORE": 0.125}


def test_table_has_core_first_chatcore_last_and_fixed_widths():
    mid = {"MMLU": 0.3111, "ARC-Easy": 0.3561, "ChatCORE": 0.073}
    table = render_table({"BASE": {"CORE": 0.2219}, "MID": mid, "SFT": {}, "RL": {}}, "")
    assert table.splitlines() == [
        "| Metric          | BASE     | MID      | SFT      | RL       |",
        "| --------------- | -------- | -------- | -------- | -------- |",
        "| CORE            | 0.2219   | -        | -        | -        |",
        "| ARC-Easy        | -        | 0.3561   | -        | -        |",
        "| MMLU            | -        | 0.3111   | -        | -        |",
        "| ChatCORE        | -        | 0.0730   | -        | -        |",
    ]


def log_whole_run():
    run = get_report()
    run.reset()
    run.log("Tokenizer training", [{"vocab_size": 512}])
    run.log("Base model evaluation", [{"CORE metric": 0.61}, {"centered_results": {"a": 1.0}}])
    scores = {"ARC-Easy": 0.75, "SpellingBee": 0.5, "ChatCORE metric": 0.4}
    run.log("Chat evaluation sft", [{"task_name": None}, scores])
    run.log("Chat evaluation rl", [{"GSM8K": 0.0758, "MMLU": 0.3}])
    run.log("A section of my own", ["hello"])
    return run


def test_generate_joins_everything_and_copies_it_here(home, capsys):
    path = log_whole_run().generate()
    text = read(path)
    assert read("report.md") == text
    order = ["# nanochat training report", "Generated: ", "### Git Information", "### Hardware", "### Software",
             "Run started: ", "## Tokenizer training", "## Base model evaluation", "## Chat evaluation sft",
             "## Chat evaluation rl",
             "## A section of my own", "## Summary", "| Metric ", "| CORE ", "| ARC-Easy ", "| GSM8K ",
             "| SpellingBee ", "| ChatCORE ", "Total wall clock time: 0h0m"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "MMLU  " not in text, "of RL the table shows GSM8K only"
    assert "no section midtraining" in capsys.readouterr().out
    assert "Warning" not in text


def test_bloat_and_environment_describe_this_repository(home):
    get_report().reset()
    header = read(home / "base" / "report" / "header.md")
    assert f"- PyTorch: {torch.__version__}" in header
    assert "logical)" in header and "GB\n" in header
    if report.git("ls-files"):
        for name in ("Characters", "Lines", "Files", "Tokens (approx)", "Dependencies (packages in requirements.lock)"):
            assert f"- {name}: " in header


def test_git_answers_nothing_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", str(tmp_path))
    assert report.git("rev-parse", "HEAD") == ""
    header = report.render_header("id", "2026-01-29 10:00:00")
    assert "- Branch: unknown\n- Commit: unknown\n- Message: \n" in header
    assert "### Bloat" not in header


def set_time(base, name, stamp):
    path = base / "report" / f"{name}.json"
    write_json(path, json.loads(path.read_text("utf-8")) | {"timestamp" if name != "header" else "started": stamp})


@pytest.mark.parametrize("sft, rl, expected", [
    ("2026-01-29 13:51:59", "2026-01-30 10:00:00", "3h51m"), # RL does not count
    ("2026-01-29 09:00:00", "2026-01-30 10:00:00", "2h0m"),  # the latest, not the last in the list
    ("yesterday", "2026-01-30 10:00:00", "unknown"),
])
def test_total_time_runs_to_the_latest_section_but_rl(home, sft, rl, expected):
    run = log_whole_run()
    stamps = {"header": "2026-01-29 10:00:00", "tokenizer-training": "2026-01-29 10:01:00",
              "base-model-evaluation": "2026-01-29 12:00:00", "chat-evaluation-sft": sft,
              "chat-evaluation-rl": rl, "a-section-of-my-own": "2026-01-29 10:00:00"}
    for name, stamp in stamps.items():
        set_time(home / "base", name, stamp)
    assert f"Total wall clock time: {expected}\n" in read(run.generate())


def test_negative_time_and_no_header_are_unknown(home):
    run = log_whole_run()
    set_time(home / "base", "header", "2099-01-01 00:00:00")
    assert "time: unknown" in read(run.generate())
    for name in ("header.md", "header.json"):
        os.unlink(home / "base" / "report" / name)
    text = read(run.generate())
    assert "time: unknown" in text and "## Summary\n\n| Metric" in text, "no placeholder for what is not known"


def test_sections_of_an_earlier_run_are_named(home, capsys):
    run = log_whole_run()
    stale = (home / "base" / "report" / "tokenizer-training.json").read_text("utf-8")
    markdown = (home / "base" / "report" / "tokenizer-training.md").read_text("utf-8")
    run.reset()
    (home / "base" / "report" / "tokenizer-training.json").write_text(stale, "utf-8")
    (home / "base" / "report" / "tokenizer-training.md").write_text(markdown, "utf-8")
    run.log("Chat SFT", [{"a": 1}])
    text = read(run.generate())
    assert "Warning: sections of another run: tokenizer-training\n" in text
    assert "another run" in capsys.readouterr().out


def test_scores_on_stand_ins_are_marked(home):
    base = home / "base"
    base.mkdir()
    write_json(base / "manifest.json", {"name": "tinyworld", "synthetic": True, "validation_shard": None, "files": {}})
    text = read(log_whole_run().generate())
    title_block = text[:text.index("## Environment")]
    assert "Data: tinyworld (synthetic)" in title_block
    assert "| CORE (tinyworld) " in text and "| ChatCORE (tinyworld) " in text
    assert "| CORE  " not in text


def test_markdown_without_json_is_read_by_exact_keys(home):
    folder = home / "base" / "report"
    folder.mkdir(parents=True)
    (folder / "base-model-evaluation.md").write_text(
        "## Base model evaluation\ntimestamp: 2026-01-29 10:00:00\n\n"
        "- model: d20 (CORE metric: 0.9)\n- CORE metric: 0.2219\n", "utf-8")
    (folder / "chat-evaluation-sft.md").write_text(
        "## Chat evaluation sft\n\n- task_name: ARC-Easy|MMLU\n- ARC-Easy: 0.3876\nMMLU without a colon\n"
        "- ChatCORE metric: 0.0884\n", "utf-8")
    text = read(get_report().generate())
    assert "| CORE            | 0.2219 " in text
    assert "| ARC-Easy        | -        | -        | 0.3876 " in text
    assert "| ChatCORE        | -        | -        | 0.0884 " in text


def test_reset_removes_what_was_logged_and_no_more(home):
    run = log_whole_run()
    run.generate()
    folder = home / "base" / "report"
    (folder / "notes.txt").write_text("mine", "utf-8")
    run.reset()
    assert sorted(os.listdir(folder)) == ["header.json", "header.md", "notes.txt"]


def test_generate_inside_the_report_folder(home, monkeypatch):
    run = log_whole_run()
    monkeypatch.chdir(home / "base" / "report")
    assert os.path.exists(run.generate())


def test_plots_are_made_from_metrics_files_and_linked(home):
    pytest.importorskip("matplotlib")
    folder = home / "base" / "base_checkpoints" / "d4"
    folder.mkdir(parents=True)
    lines = [{"step": i, "train/loss": 5 / (i + 1), "train/lrm": 1.0} for i in range(5)] + [{"step": 5, "val/bpb": 1.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    text += '5\n{"train/loss": 1.0}\n{"step": 6, "tra' # no records, and one cut short by a crash
    (folder / "metrics.jsonl").write_text(text, "utf-8")
    text = read(log_whole_run().generate())
    for name in ("report_scores.png", "report_curves.png"):
        assert f"![{name}]({name})" in text
        assert Path(name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (home / "base" / "report" / name).exists()


def write_run(folder, losses, depth=None, **end):
    folder.mkdir(parents=True)
    lines = [{"step": i, "train/loss": loss} for i, loss in enumerate(losses)] + [{"step": len(losses), **end}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (1, len(losses)) if depth else ():
        write_json(folder / f"meta_{step:06d}.json", {"model_config": {"n_layer": depth if step > 1 else 99}})


def test_runs_are_compared_in_a_table_and_curves(home, capsys):
    pytest.importorskip("matplotlib")
    base = home / "base"
    write_run(base / "base_checkpoints" / "d4", [3.0, 2.0, 1.5], 4, total_training_time=90.0, **{"val/bpb": 0.9})
    write_run(base / "base_checkpoints" / "un[finished", [3.0, 2.5])
    write_run(base / "chatsft_checkpoints" / "d4", [1.0, 0.5], 4)
    report.main(["compare", "d4", "un[finished"])
    text = read(base / "report" / "report_compare.md")
    assert text.splitlines()[2:6] == [
        "| run | depth | last step | last train/loss | last val/bpb | least val/bpb | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| d4 | 4 | 3 | 1.5000 | 0.9000 | 0.9000 | 1.5000 |",
        "| un[finished | - | 1 | 2.5000 | - | - | - |"]
    assert "![report_compare.png](report_compare.png)" in text and "| d4 | 4 |" in capsys.readouterr().out
    assert (base / "report" / "report_compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    report.main(["compare", "d4", "--stage", "sft"])
    assert "# Runs compared: sft" in read(base / "report" / "report_compare.md")
    assert "Runs compared" not in read(log_whole_run().generate()), "no section of the report"
    with pytest.raises(UserError, match="no metrics.jsonl of a base run d5, d6: it has those of d4, un"):
        report.main(["compare", "d5", "d4", "d6"])
    for flags in (["compare"], ["reset", "d4"], ["compare", "d4", "--stage", "none"]):
        with pytest.raises(SystemExit) as error:
            report.main(flags)
        assert error.value.code == 2


def test_without_matplotlib_there_is_one_line_and_a_report(home, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = read(log_whole_run().generate())
    assert "png" not in text and "| CORE " in text
    assert capsys.readouterr().out.count("no plots, because matplotlib") == 1


def test_other_ranks_have_a_complete_stand_in(home, monkeypatch):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    stub = get_report()
    assert isinstance(stub, DummyReport)
    stub.reset()
    stub.log("X", [{}])
    stub.generate()
    assert not (home / "base" / "report").exists()
    public = {name for name in vars(Report) if not name.startswith("_")}
    assert public == {name for name in vars(DummyReport) if not name.startswith("_")}


def test_the_command_line(home):
    def run(*arguments):
        command = [sys.executable, "-m", "nanochat.report", *arguments]
        environment = os.environ | {"PYTHONPATH": report.ROOT}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert run("reset").returncode == 0
    assert run().returncode == 0 and os.path.exists("report.md")
    assert run("remove").returncode == 2
