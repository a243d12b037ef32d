"""The estimate of GPT-3's CORE against the published figures of nanochat's notebook."""
import numpy as np
import pytest

from dev import gpt3_core


@pytest.fixture(scope="module")
def models():
    return gpt3_core.read_models()


def test_the_published_regressions(models):
    names, parameters, centered, core = models
    assert len(names) == 12 and centered.shape == (12, 6) and names[-1] == "GPT-3 175B" and parameters[-1] == 175e9
    x = centered[:4]
    mean = x.mean(1, keepdims=True)
    weights, intercept = fit = gpt3_core.fit_ridge(mean, core, 0)
    assert (weights[0], intercept) == pytest.approx((0.6639, 0.0168), abs=1e-4)
    assert gpt3_core.r_squared(mean, core, fit) == pytest.approx(0.9960, abs=1e-4)
    weights, intercept = gpt3_core.fit_ridge(x, core, 0.01)
    assert weights == pytest.approx([0.1155, 0.1000, 0.1226, 0.0959, 0.1023, 0.0513], abs=6e-4)
    assert intercept == pytest.approx(0.0269, abs=2e-4)
    def explained(x, alpha):
        return gpt3_core.r_squared(x, core, gpt3_core.fit_ridge(x, core, alpha))
    by_penalty = [explained(x, alpha) for alpha in (0, 0.001, 0.01, 0.1, 1)]
    assert by_penalty == pytest.approx([1.0, 0.9971, 0.9916, 0.8448, 0.2523], abs=2e-4)
    single = [explained(x[:, [i]], 0) for i in range(6)]
    assert single == pytest.approx([0.9927, 0.9841, 0.9933, 0.9961, 0.9800, 0.9599], abs=5e-4)


def test_the_published_estimates(models):
    values = {name: row[4:] for name, row in gpt3_core.estimate(models[2], models[3]).items()}
    assert values["simple"] == pytest.approx([.1480, .2174, .2691, .2965, .3351, .3689, .3935, .4379], abs=2e-4)
    assert values["ridge"] == pytest.approx([.1488, .2144, .2627, .2862, .3234, .3534, .3768, .4164], abs=3e-4)
    assert values["estimate"] == pytest.approx([.1484, .2159, .2659, .2914, .3292, .3611, .3852, .4272], abs=2e-4)


def test_exact_results_of_a_bundle_replace_the_rounded_ones(tmp_path, models):
    rows = [f"{task:<30},{0.5 + chance / 2:.6f},{0.5}" for task, chance in gpt3_core.TASKS.values()]
    text = "\n".join(["Task,Accuracy,Centered", *rows, "CORE,,0.256525"])
    (tmp_path / "openai-community-gpt2-xl.csv").write_text(text)
    _, _, centered, core = gpt3_core.read_models(tmp_path)
    assert core[3] == 0.256525 and np.allclose(centered[3], 0.5) and np.array_equal(centered[:3], models[2][:3])
