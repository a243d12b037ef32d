"""The notebooks of dev run from top to bottom on their inputs: in order, as a kernel would run them."""
import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

DEV = Path(__file__).parent.parent / "dev"


def execute(name):
    """Run the code cells one after the other; returns the names that they leave."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    notebook = json.loads((DEV / name).read_text("utf-8"))
    assert notebook["nbformat"] == 4 and all(cell.get("outputs", []) == [] for cell in notebook["cells"])
    left = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), left)
    pyplot.close("all")
    return left


def test_estimate_gpt3_core(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    left = execute("estimate_gpt3_core.ipynb")
    published = [0.1484, 0.2159, 0.2659, 0.2914, 0.3292, 0.3611, 0.3852, 0.4272]
    assert list(left["gpt3_core"].values()) == pytest.approx(published, abs=2e-4)
    shown = capsys.readouterr().out
    assert "simple: CORE = 0.6639 mean + 0.0168, R2 0.99" in shown
    growth = [float(percent) for percent in re.findall(r" over GPT-2.*: \+(.*)%", shown)]
    assert growth == pytest.approx([30.3, 16.8, 23.9, 13.6], abs=0.15) # from accuracies of three digits
    assert (tmp_path / "estimate_gpt3_core.png").stat().st_size > 10_000


def write_sweep(path, budgets):
    """A sweep in which the optimal parameters are 3 C^0.5 of `scaling` count, and a run has C / (6 N) tokens."""
    rows = []
    for flops in budgets:
        best = 3e-1 * flops**0.5
        for depth, factor in enumerate((0.5, 0.8, 1.2, 2.0), start=8):
            params = best * factor
            rows.append({"flops_budget": flops, "depth": depth, "params_transformer": 0.75 * params,
                         "params_lm_head": 0.25 * params, "params_total": 3 * params,
                         "tokens_trained": flops / (6 * params), "val_bpb": 0.8 + 0.1 * np.log10(factor) ** 2})
    path.parent.mkdir(parents=True)
    with open(path, "w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        file.write(",".join(["1e18"] + [""] * (len(rows[0]) - 1)) + "\n") # a run that did not finish


@pytest.mark.parametrize("budgets", [(1e18, 3e18, 1e19), (1e18,)], ids=["three budgets", "one"])
def test_scaling_analysis(tmp_path, monkeypatch, capsys, budgets):
    table = tmp_path / "scaling_laws_results_x" / "results.csv"
    write_sweep(table, budgets)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    left = execute("scaling_analysis.ipynb")
    assert [point["params"] for point in left["points"]] == pytest.approx([0.3 * flops**0.5 for flops in budgets])
    assert all(point["fitted"] for point in left["points"])
    if len(budgets) > 1:
        assert left["summary"]["params exponent"] == pytest.approx(0.5)
        assert left["summary"]["tokens exponent"] == pytest.approx(0.5)
        assert "counted as all: C^0.50" in capsys.readouterr().out
    for name in ("isoflop.png", "depth_and_ratio.png"):
        assert (table.parent / name).stat().st_size > 10_000
