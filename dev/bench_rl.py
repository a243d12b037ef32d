"""
Does reinforcement learning beat as much more finetuning? On tinyworld's held-out arithmetic, at equal wall time.

    python -m dev.bench_rl --base-dir ~/.cache/nanochat/tinyworld --seeds 42 43 44 --steps 30

From the newest finetuned checkpoint of the base directory, for each seed: chat_rl for --steps steps; then chat_sft
with the same checkpoint as its source for as many steps as take the same time; then both, and the checkpoint itself,
answer the held-out problems (of TinyWorld and of the GSM8K stand-in) --samples times each at temperature 1. Everything
is written to a folder of its own. The last line is JSON: pass@1 before, and after each of the two, by seed.
"""
import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from nanochat.checkpoint_manager import checkpoint_dir, find_last_step, find_newest_model, load_model
from nanochat.common import get_compute_dtype, read_json, run_main
from nanochat.engine import Engine
from scripts import chat_rl, chat_sft
from tasks.gsm8k import GSM8K
from tasks.tinyworld import TinyWorld

SHARED = ("manifest.json", "hub", "identity_conversations.jsonl", "words_alpha.txt", "tokenizer")


def fork(base, folder, source):
    """Fill a folder with links to the data of `base`, and its finetuned checkpoints as those of the stage `source`."""
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    trained = Path(checkpoint_dir("sft"))
    folder.mkdir()
    for name in SHARED:
        os.symlink(base / name, folder / name)
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    os.symlink(trained, checkpoint_dir(source))


def pass_at_1(source, num_samples):
    """Share of right answers over all held-out arithmetic problems and samples, in the current base directory."""
    cpu = torch.device("cpu")
    model, tokenizer, _ = load_model(source, cpu, "eval", dtype=get_compute_dtype(cpu))
    right = total = 0
    for task in (TinyWorld(), GSM8K("main", "test")):
        problems = [problem for problem in task if problem.get("domain", "arithmetic") == "arithmetic"]
        prompts = [tokenizer.render_for_completion(problem) for problem in problems]
        answers = Engine(model, tokenizer).generate_many(prompts, num_samples, 96, 1.0, 50, seed=1, batch_size=64)
        right += sum(task.evaluate(problem, tokenizer.decode(ids))
                     for problem, samples in zip(problems, answers, strict=True) for ids, _ in samples)
        total += num_samples * len(problems)
    return right / total


def seconds_of(stage):
    """Wall time of the updates of the last run of a stage, and their number."""
    folder = checkpoint_dir(stage, find_newest_model(checkpoint_dir(stage)))
    meta = read_json(os.path.join(folder, f"meta_{find_last_step(folder):06d}.json"))
    return meta["loop_state"]["total_time"], meta["step"]


def build_parser():
    parser = argparse.ArgumentParser(prog="dev.bench_rl", description=__doc__.strip().split("\n")[0])
    parser.add_argument("--base-dir", required=True, help="base directory with a finetuned model on tinyworld")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="one pair of runs for each")
    parser.add_argument("--steps", type=int, default=30, help="steps of reinforcement learning")
    parser.add_argument("--samples", type=int, default=4, help="answers per held-out problem")
    parser.add_argument("--rl-flags", help="more flags of scripts.chat_rl, in one string; default: those of runcpu.sh",
                        default="--examples-per-step=32 --num-samples=8 --device-batch-size=32 --init-lr-frac=0.1")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    base, results = Path(args.base_dir).resolve(), []
    with tempfile.TemporaryDirectory() as scratch:
        fork(base, Path(scratch, "before"), "sft")
        before = pass_at_1("sft", args.samples)
        seconds, num_steps = seconds_of("sft")
        step_seconds = seconds / num_steps
        for seed in args.seeds:
            fork(base, Path(scratch, f"rl{seed}"), "sft")
            chat_rl.main(["--task=TinyWorld-Arithmetic", f"--seed={seed}", f"--num-iterations={args.steps}",
                          "--eval-every=-1", "--save-every=-1", "--max-new-tokens=64", *args.rl_flags.split()])
            after_rl, (seconds, _) = pass_at_1("rl", args.samples), seconds_of("rl")
            fork(base, Path(scratch, f"sft{seed}"), "mid")
            chat_sft.main(["--source=mid", f"--seed={seed}", f"--num-iterations={round(seconds / step_seconds)}",
                           "--device-batch-size=16", "--target-examples-per-step=64", "--init-lr-frac=0.08",
                           "--eval-every=-1", "--eval-metrics-every=-1"])
            results.append({"seed": seed, "seconds": {"rl": seconds, "sft": seconds_of("sft")[0]}, "before": before,
                            "rl": after_rl, "sft": pass_at_1("sft", args.samples)})
            print(results[-1], flush=True)
            shutil.rmtree(Path(scratch, f"rl{seed}"))
    gain = sum(result["rl"] - result["sft"] for result in results) / len(results)
    print(json.dumps({"gain": gain, "results": results}))


if __name__ == "__main__":
    run_main(main)
