"""
What CORE would GPT-3 have? Regressions from six tasks that its paper reports (Brown et al. 2020,
https://arxiv.org/abs/2005.14165, table H.1) and that CORE evaluates alike, calibrated on the four GPT-2 models.

gpt3_core.csv holds accuracies in percent; those of GPT-2 give way to the exact ones of an eval_bundle with them. The
estimates rest on 4 points and 6 of 22 tasks, and GPT-3 lies outside the calibrated range.
dev/estimate_gpt3_core.ipynb walks through it.
"""
import csv
import os

import numpy as np

TASKS = { # column of the table: task in a CSV of CORE results, accuracy of chance
    "HellaSwag 0-shot": ("hellaswag_zeroshot", 0.25), "LAMBADA": ("lambada_openai", 0.0),
    "HellaSwag": ("hellaswag", 0.25), "PIQA": ("piqa", 0.5), "ARC Easy": ("arc_easy", 0.25),
    "ARC Challenge": ("arc_challenge", 0.25)}
BUNDLE_FILES = {"GPT-2": "openai-community-gpt2.csv", "GPT-2 Medium": "openai-community-gpt2-medium.csv",
                "GPT-2 Large": "openai-community-gpt2-large.csv", "GPT-2 XL": "openai-community-gpt2-xl.csv"}


def read_models(bundle_dir=""):
    """(names, parameters (N,), centered accuracies (N, 6), CORE (4,) of GPT-2, which comes first)."""
    with open(os.path.join(os.path.dirname(__file__), "gpt3_core.csv"), encoding="utf-8") as file:
        models = list(csv.DictReader(file))
    accuracy = np.array([[float(model[task]) / 100 for task in TASKS] for model in models])
    core = np.array([float(model["CORE"]) for model in models if model["CORE"]])
    for i, name in enumerate(BUNDLE_FILES.values()):
        path = os.path.join(bundle_dir, name)
        if bundle_dir and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                cells = [[cell.strip() for cell in row] for row in csv.reader(file)]
            rows = {row[0]: row for row in cells if row}
            accuracy[i], core[i] = [float(rows[task][1]) for task, _ in TASKS.values()], float(rows["CORE"][2])
    chance = np.array([chance for _, chance in TASKS.values()])
    parameters = np.array([float(model["parameters"]) for model in models])
    return [model["model"] for model in models], parameters, (accuracy - chance) / (1 - chance), core


def fit_ridge(x, y, alpha):
    """(weights, intercept) of y = x w + c, penalty alpha |w|^2, none on c. x: (N, K). Without alpha the shortest w."""
    mean_x, mean_y = x.mean(0), y.mean()
    gram = (x - mean_x).T @ (x - mean_x) + alpha * np.eye(x.shape[1])
    weights = np.linalg.pinv(gram, hermitian=True) @ (x - mean_x).T @ (y - mean_y)
    return weights, mean_y - mean_x @ weights


def r_squared(x, y, fit):
    """Share of the variance of y that the fit (weights, intercept) explains."""
    return 1 - ((y - x @ fit[0] - fit[1]) ** 2).sum() / ((y - y.mean()) ** 2).sum()


def estimate(centered, core, alpha=0.01):
    """{"simple", "ridge", "estimate": CORE (N,)}: from the mean of the tasks, from each task, and the mean of both."""
    known = len(core)
    mean = centered.mean(1, keepdims=True)
    simple, ridge = fit_ridge(mean[:known], core, 0), fit_ridge(centered[:known], core, alpha)
    values = {"simple": mean @ simple[0] + simple[1], "ridge": centered @ ridge[0] + ridge[1]}
    return values | {"estimate": (values["simple"] + values["ridge"]) / 2}
