"""scripts/plan.py and nanochat/forecast.py, against published figures that the fits do not contain, and real steps."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dev.scaling import GPUS as GPUS_OF_A_NODE
from nanochat import forecast
from nanochat.gpt import config_of_depth
from scripts import base_train, plan

ROOT = Path(__file__).resolve().parent.parent


def run(capsys, *flags):
    """The plan of these flags, as the JSON says it."""
    plan.main([*flags, "--json"])
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        plan.main(list(flags))
    text = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2
    return text[text.index("error: "):]


def test_the_hundred_dollar_tier(capsys):
    """Figures of spec 6.1 for today's d20 at ratio 20: 8.70B tokens, 3.004e9 and 2.61e19 FLOPs, 257 shards."""
    found = run(capsys, "--depth=20", "--ratio=20", "--total-batch-size=524288")
    assert found["parameters"]["total"] == 896_535_720 and found["flops_per_token"] == pytest.approx(3.004e9, rel=1e-3)
    assert found["tokens"] == pytest.approx(8.70e9, rel=1e-3) and found["flops"] == pytest.approx(2.61e19, rel=2e-3)
    assert found["steps"] == 16_600 and found["accumulation"] * found["device_batch_size"] == 32
    assert found["shards"] in (257, 258) and 37 < found["disk_gb"] < 60
    assert 2 < found["hours"] < 4.2 and found["dollars"] == pytest.approx(24 * found["hours"])


def test_the_thousand_dollar_tier_fits_with_eight_rows(capsys):
    """16 rows ran out of memory, 8 took 78 of 80 GB and 50 % of the peak, before the value tables (spec 6.2)."""
    found = run(capsys, "--depth=32", "--ratio=20", "--vocab-size=65536", "--total-batch-size=524288")
    assert found["device_batch_size"] == 8 and found["parameters"]["total"] == 4_026_540_096
    assert found["steps"] == 66_560 and found["hours"] < 41.6
    assert "needs" in refusal(capsys, "--depth=32", "--vocab-size=65536", "--device-batch-size=16")


def test_published_run_times_from_all_the_others():
    assert forecast.hours_error() < 0.12
    runs = forecast.leave_one_out()["hours"]
    assert len(runs) >= 9 and max(abs(guess / hours - 1) for _, hours, guess in runs) < 0.12


def test_quality_from_all_the_others():
    """Ten times the noise of identical runs at most: 2.3e-4 of bpb (20 seeds); 0.0052 of CORE, twice."""
    assert forecast.spread("bpb") < 2.3e-3 and forecast.spread("core") < 0.0104
    assert forecast.forecast_bpb(1e9, 10e9) < forecast.forecast_bpb(1e9, 5e9) < forecast.forecast_bpb(0.5e9, 5e9)


def test_the_optimum_lies_where_the_scaling_laws_found_it():
    """Ratios of 10.3 to 11.2 tokens per parameter were best at 1e18 to 1e19 FLOPs (log of 27 January 2026)."""
    flops = 3e18
    best = min((forecast.forecast_bpb(n, flops / (6 * n)), flops / (6 * n * n)) for n in
               (10 ** (8 + i / 200) for i in range(160)))
    assert 5 < best[1] < 20


def test_a_budget_buys_the_deepest_that_it_pays(capsys):
    found = run(capsys, "--dollars=100")
    deeper = run(capsys, f"--depth={found['depth'] + 1}")
    assert found["dollars"] <= 100 < deeper["dollars"]
    assert run(capsys, "--hours=4.1667", "--price=3")["depth"] == found["depth"] # the same, 8 GPUs at 3 dollars
    cheap = run(capsys, "--dollars=100", "--price=1.5")
    assert cheap["depth"] > found["depth"]


def test_core_of_gpt2_needs_the_depth_of_the_records(capsys):
    """The leaderboard reached GPT-2's 0.2565 with d24 and d26 on FineWeb-Edu."""
    found = run(capsys, "--core=0.2565")
    assert 22 <= found["depth"] <= 26 and found["core"] >= 0.2565


@pytest.mark.parametrize("flags, sentence", [
    ("--dollars 0.01", "the cheapest has depth 2"), ("--hours 0.001", "the cheapest has depth 2"),
    ("--core 0.9", "out of reach: the most that can be forecast here is 0."),
    ("--gpu tpu9", "--gpu must be one of b200, h200, h100"), ("--gpu tpu9", "--peak-flops and --bandwidth"),
    ("--depth 20 --hours 3", "give one of --depth, --dollars, --hours and --core, got 2"),
    ("--depth 0", "--depth must be a positive number, got 0"), ("--price nan", "--price must be a positive number"),
    ("--depth 64 --gpu 4090 --count 1", "needs"), ("--depth 2 --ratio 0.001", "--ratio 0.001 is less than one step"),
    ("--depth 4 --head-dim 63", "head dimension"), ("--dollars 100 --head-dim 63", "head dimension"),
    ("--window-pattern X", "window_pattern"), ("--vocab-size 1", "--vocab-size must be at least 265, got 1")])
def test_bad_budgets_and_names_get_a_sentence(flags, sentence, capsys):
    assert sentence in refusal(capsys, *flags.split())


@pytest.mark.parametrize("name", forecast.GPUS)
def test_every_known_gpu_has_all_figures(name, capsys):
    found = run(capsys, "--depth=8", "--count=1", f"--gpu={name.upper()}")
    assert 0 < found["training_hours"] < 24 and found["dollars"] > 0 and found["device_batch_size"] >= 8


def test_the_spread_grows_with_the_distance():
    near, far = forecast.quality(0.918e9, 7.6e9), forecast.quality(2.5e9, 26e9)
    assert near["bpb_spread"] < 0.002 < far["bpb_spread"] and near["core_spread"] < far["core_spread"]
    assert forecast.quality(1e6, 1e7) == {"bpb": None, "core": None}


def test_any_gpu_by_its_figures(capsys):
    known = run(capsys, "--depth=20")
    other = run(capsys, "--depth=20", "--gpu=mine", "--peak-flops=989e12", "--bandwidth=450", "--price=3")
    assert other["training_hours"] == pytest.approx(known["training_hours"])
    slow = run(capsys, "--depth=20", "--gpu=mine", "--peak-flops=989e12", "--bandwidth=16", "--price=3")
    assert slow["training_hours"] > known["training_hours"]


def test_more_nodes_are_faster_but_not_cheaper(capsys):
    one, four = run(capsys, "--depth=26"), run(capsys, "--depth=26", "--nodes=4")
    assert one["training_hours"] / 4 < four["training_hours"] < one["training_hours"]
    assert four["dollars"] > one["dollars"] and GPUS_OF_A_NODE == 8
    assert four["total_batch_size"] % (32 * four["device_batch_size"] * 2048) == 0


@pytest.mark.parametrize("flags", [
    ["--depth=20"], ["--depth=12", "--count=3"], ["--depth=6", "--count=1", "--seq-len=512", "--head-dim=64"],
    ["--depth=26", "--nodes=2", "--dtype=bfloat16", "--window-pattern=L", "--vocab-size=50000"]], ids=" ".join)
def test_the_commands_are_understood_and_mean_the_plan(flags, capsys, monkeypatch):
    found = run(capsys, *flags)
    command = next(line for line in found["commands"] if "base_train" in line)
    given = command.split("scripts.base_train")[1].split()
    args = base_train.build_parser().parse_args([flag for flag in given if flag != "--"])
    ranks = found["total_batch_size"] // (found["accumulation"] * found["device_batch_size"] * args.max_seq_len)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert base_train.check_args(args) == []
    config = base_train.build_config(args, int(found["commands"][2].split("=")[1]))
    sizes = plan.count_params(config)
    assert sizes == found["parameters"]
    assert base_train.training_horizon(args, found["flops_per_token"],
                                       sizes["transformer_matrices"] + sizes["lm_head"]) == found["steps"]


def test_text_says_it_all(capsys):
    plan.main(["--depth", "24", "--ratio", "12"])
    text = capsys.readouterr().out
    for words in ("transformer_matrices", "FLOPs per token 4.945e+09", "shards", "optimizer state", "CORE 0.2", "$",
                  "--depth=24"):
        assert words in text
    plan.main(["--check"])
    assert "record 1" in capsys.readouterr().out


def test_rates_are_found_again():
    works = [forecast.work_of(config_of_depth(depth, 4096, 256))[0] for depth in (2, 6)]
    times = [3e-12 * flops + 2e-10 * numbers for flops, numbers in works]
    assert forecast.rates(works, times) == pytest.approx([3e-12, 2e-10])
    assert forecast.rates(works[:1], times[:1]) == [times[0] / works[0][0], 0.0]
    assert min(forecast.rates(works, [1.0, 0.5])) >= 0, "noise gives no negative speed"


def test_calibration_on_this_cpu(monkeypatch):
    """A real one, eager and tiny: a plan of plausible seconds and memory comes out."""
    monkeypatch.setattr(forecast, "compile_model", lambda *args: "off")
    speed = forecast.calibrate(lambda depth: config_of_depth(depth, 512, 64, head_dim=64, window_pattern="L"), 4,
                               torch.float32)
    machine = forecast.Machine("cpu", True, 1, 1, 8 * 2**30, 0, 0, 0.0, 4, speed)
    small, large = (forecast.step_seconds(config_of_depth(depth, 512, 64, head_dim=64), 1024, machine)
                    for depth in (2, 6))
    assert 0 < small < large < 60 and speed["seconds"] < 120


def test_what_the_report_sets_beside_the_outcome():
    """Record 1 on 8 H100: 3.04 hours, bpb 0.74833, CORE 0.2585."""
    config, tokens = config_of_depth(24), 8_757_000_000
    found = forecast.forecast_of_run(config, tokens, "NVIDIA H100 80GB HBM3", 8)
    assert float(found["Forecast of the training time"][:-1]) / 60 == pytest.approx(3.04, rel=0.05)
    assert found["Forecast of validation bpb on FineWeb-Edu"] == pytest.approx(0.74833, abs=0.002)
    assert found["Forecast of CORE"] == pytest.approx(0.2585, abs=0.01)
    assert not forecast.forecast_of_run(config_of_depth(2, 400, 64), 10_000, None, 1), "nothing is believed of those"


def test_it_answers_in_three_seconds():
    """Of the processor, torch's import included: other work on this machine does not count."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "scripts.plan", "--dollars", "100"], cwd=ROOT, check=True,
                   capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
