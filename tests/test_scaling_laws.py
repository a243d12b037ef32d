"""The table of a sweep from the records of its runs, and the laws in it, against published figures and exact curves."""
import csv
import json

import numpy as np
import pytest

from dev import scaling_laws
from nanochat.common import UserError

BUDGETS = [1e18, 2.15e18, 4.64e18, 1e19]
PUBLISHED = { # nanochat's log of 2026-01-27: optimal parameters (millions) and tokens (billions), their exponents
    "scaling": ([110.7, 167.8, 250.7, 381.8], 0.54), "all": ([416.3, 560.2, 741.5, 988.6], 0.37),
    "matrices": ([80.3, 131.5, 221.0, 401.2], 0.70), "tokens": ([1.242, 1.785, 2.642, 3.807], 0.49)}


@pytest.mark.parametrize("values, exponent", PUBLISHED.values(), ids=PUBLISHED)
def test_the_published_exponents(values, exponent):
    assert scaling_laws.power_law(BUDGETS, values)[0] == pytest.approx(exponent, abs=0.005)


def test_the_published_ratio():
    points = [{"flops": c, "params": n * 1e6, "tokens": d * 1e9, "ratio": ratio, "fitted": True} for c, n, d, ratio
              in zip(BUDGETS, PUBLISHED["scaling"][0], PUBLISHED["tokens"][0], [11.2, 10.7, 10.8, 10.3])]
    summary = scaling_laws.summarize(points)
    assert summary["mean ratio"] == pytest.approx(10.75) and summary["std of ratio"] < 0.5
    assert summary["ratio there"] == pytest.approx(10.6, abs=0.1)
    assert summary["difference"] == pytest.approx(-0.05, abs=0.01) and summary["fitted budgets"] == 4


def runs(budget, best, sizes, curvature=0.05):
    """Runs whose bpb is an exact parabola in log10(params) with its minimum, 0.9, at `best`; 12 tokens a parameter."""
    return [{"flops_budget": budget, "params": n, "tokens_trained": 12 * n, "ratio": 12.0,
             "val_bpb": 0.9 + curvature * np.log10(n / best) ** 2} for n in sizes]


def test_an_exact_parabola_is_found_and_anything_else_is_the_best_run():
    sizes = [1e8, 1.3e8, 2e8, 3e8]
    found = scaling_laws.optimum(runs(1e18, 1.5e8, sizes))
    assert found["fitted"] and found["params"] == pytest.approx(1.5e8) and found["bpb"] == pytest.approx(0.9)
    tokens = 12 * np.interp(np.log10(1.5e8), np.log10(sizes), sizes) # a straight line in log10 between two runs
    assert found["tokens"] == pytest.approx(tokens) and found["ratio"] == pytest.approx(tokens / 1.5e8)
    for rows in (runs(1e18, 1.5e8, sizes[:2]), runs(1e18, 1e9, sizes), runs(1e18, 1.5e8, sizes, curvature=-0.05)):
        best = min(rows, key=lambda row: row["val_bpb"])
        found = scaling_laws.optimum(rows)
        assert not found["fitted"] and (found["params"], found["bpb"]) == (best["params"], best["val_bpb"])


def make_run(base, tag, steps=10, step=10, last=None):
    """What base_train leaves of a d12 with 20 tokens a step: meta, metrics, and a file in the place of the weights."""
    folder = base / "base_checkpoints" / tag
    folder.mkdir(parents=True)
    config = {"sequence_len": 2048, "vocab_size": 32768, "n_layer": 12, "n_head": 6, "n_kv_head": 6, "n_embd": 768}
    flags = {"num_iterations": steps, "target_flops": 1e18, "target_param_data_ratio": -1, "total_batch_size": 20}
    meta = {"step": step, "model_config": config, "user_config": flags}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    (folder / f"model_{step:06d}.pt").touch()
    lines = [{"step": 0, "val/bpb": 3.0}, {"step": step, "total_training_time": 5.0, "core_metric": 0.0,
                                          "val/bpb": 0.9} | (last or {})]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')


def test_a_row_is_what_the_run_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    make_run(tmp_path, "a")
    row = scaling_laws.measure("a") # the counts are those of the specification's table
    assert (row["params_wte"], row["params_value_embeds"], row["params_lm_head"]) == (25165824, 150994944, 25165824)
    assert (row["params_transformer"], row["params_total"]) == (84935808, 286262424)
    assert row["num_scaling_params"] == 110101632 and row["train_time_sec"] == 5.0
    assert (row["val_bpb"], row["core_score"], row["tokens_trained"]) == (0.9, 0.0, 200)
    assert (row["depth"], row["model_dim"], row["flops_budget"], row["num_iterations"]) == (12, 768, 1e18, 10)


def test_unfinished_runs_are_left_out_with_the_reason_and_the_rest_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    make_run(tmp_path, "done")
    make_run(tmp_path, "halfway", steps=11)
    make_run(tmp_path, "diverged", last={"val/bpb": None})
    make_run(tmp_path, "broken")
    (tmp_path / "base_checkpoints" / "broken" / "meta_000010.json").write_text('{"step": 10')
    table = tmp_path / "results" / "results.csv"
    with pytest.raises(SystemExit):
        scaling_laws.main(["done", "halfway", "diverged", "broken", "absent", "--out", str(table)])
    told = capsys.readouterr().err
    assert "halfway has no validation bpb of its last step, 11 (it is at 10)" in told and "run diverged has no" in told
    assert "no complete checkpoint in" in told and "absent" in told and "broken" in told
    with open(table) as file:
        assert [row["tag"] for row in csv.DictReader(file)] == ["done"]
    before = table.read_bytes()
    with pytest.raises(SystemExit):
        scaling_laws.main(["absent", "--out", str(table)])
    assert table.read_bytes() == before
    assert [row["ratio"] for row in scaling_laws.read_table(table)] == [pytest.approx(200 / 110101632)]


def test_tables_that_will_not_do_are_refused(tmp_path):
    table = tmp_path / "results.csv"
    with pytest.raises(UserError, match="run `bash runs/scaling_laws.sh` first"):
        scaling_laws.read_table(table)
    table.write_text("depth,val_bpb\n3,0.9\n")
    with pytest.raises(UserError, match="no column flops_budget, tokens_trained, params_transformer, params_lm_head"):
        scaling_laws.read_table(table)
    table.write_text("flops_budget,depth,tokens_trained,val_bpb,params_total\n1e18,3,9,,5\n1e18,3,9,nan,5\n")
    with pytest.raises(UserError, match="no row with a budget and a positive val_bpb"):
        scaling_laws.read_table(table, "all")
    with pytest.raises(UserError, match="at least two budgets, got 1"):
        scaling_laws.power_law([1e18, 1e18], [1, 2])
