"""
Time to quality: how long base_train takes to be as good as the plain reference is after 20 minutes.

    python -m nanochat.dataset --from corpus/*.parquet && python -m scripts.tok_train --vocab-size=8192
    python -m dev.bench_quality                   depth 4, T 512: some 45 minutes on 2 cores
    python -m dev.bench_quality --minutes 2 --pilot-minutes 0.5 --batches 16

Needs a base directory with shards and a tokenizer. Both train on the same shards and are judged on the same validation
tokens. The reference (dev/baseline.py, its rates falling to 0 over the last 40 % of its steps) first shows in short
runs which of the --batches suits it. Then it trains for --minutes, and in turns with it, so that all have the same
machine, train our --runs: each a share of that time, and flags of base_train where its defaults are not to be. Time is
that of steps alone. The last line is JSON: `ratio` is the time of the shortest of our runs that came as far over the
reference's; null if none did.
"""
import argparse
import json
import math
import statistics
import time

import torch
import torch.nn.functional as F

from dev import baseline
from dev.bench_train import CPU, seconds
from nanochat.common import get_compute_dtype, run_main
from nanochat.dataloader import first_rows, pretraining_loader
from nanochat.gpt import count_params
from nanochat.loss_eval import evaluate_bpb
from nanochat.tokenizer import get_tokenizer, token_bytes_of
from nanochat.training import accumulate, compile_model, grad_accum_steps, lr_multiplier
from scripts import base_train

ROWS = 16 # of a batch of validation


class Reference:
    """dev/baseline.py with data, a schedule, and its losses for evaluate_bpb. What is `judged` has those."""

    def __init__(self, args, tokenizer, num_rows):
        width = -(-args.depth * 64 // 128) * 128
        torch.manual_seed(42)
        self.model = baseline.Model(tokenizer.get_vocab_size(), args.depth, width // 128, width, args.seq_len, "L")
        self.optimizer, self.compiled = baseline.Optimizer(self.model, width), torch.compile(self.model, dynamic=False)
        self.rates = self.optimizer.adamw, self.optimizer.matrix_lr, 0.2 * (12 / args.depth) ** 2
        self.data = pretraining_loader(tokenizer, num_rows, args.seq_len, "train", device="cpu")
        zeros = torch.zeros((num_rows, args.seq_len), dtype=torch.long)
        self.compiled(zeros, zeros).backward() # compilation is not part of the time
        self.model.zero_grad(set_to_none=True)
        self.judged, self.tokens_per_step = self, num_rows * args.seq_len

    def batch(self):
        return next(self.data)[:2]

    def update(self, batch, step, num_steps):
        lr, (adamw, matrix_lr, weight_decay) = lr_multiplier(step, num_steps), self.rates
        self.optimizer.adamw = [(params, rate * lr, betas) for params, rate, betas in adamw]
        self.optimizer.matrix_lr, self.optimizer.weight_decay = matrix_lr * lr, weight_decay * (1 - step / num_steps)
        self.compiled(*batch).backward()
        self.optimizer.step()

    def get_device(self):
        return torch.device("cpu")

    def __call__(self, x, y, loss_reduction):
        seen = []
        hook = self.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
        self.model(x, y)
        hook.remove()
        logits = 15 * torch.tanh(seen[0][..., :self.model.vocab_size] / 15)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction=loss_reduction)


class Ours:
    """The loop of base_train for a run of so many tokens, with its defaults but for sizes and `flags`."""

    def __init__(self, args, tokenizer, num_tokens, flags=()):
        shape = [f"--depth={args.depth}", f"--max-seq-len={args.seq_len}", "--device-batch-size=auto"]
        self.args = base_train.build_parser().parse_args([*shape, *flags])
        sizes = count_params(base_train.build_config(self.args, tokenizer.get_vocab_size()))
        self.args.target_param_data_ratio = num_tokens / (sizes["transformer_matrices"] + sizes["lm_head"])
        torch.manual_seed(42)
        self.model, self.num_steps = base_train.make_model(self.args, CPU, tokenizer.get_vocab_size())
        self.judged, self.tokens_per_step = self.model, self.args.total_batch_size
        num_rows = self.args.device_batch_size
        self.optimizer = base_train.build_optimizer(self.model, self.args, self.num_steps)
        print(compile_model(self.model, "auto", num_rows))
        self.data = pretraining_loader(tokenizer, num_rows, args.seq_len, "train", device="cpu",
                                       requeue=self.args.remainders == "requeue")

    def batch(self):
        count = grad_accum_steps(self.tokens_per_step, self.args.device_batch_size, self.args.max_seq_len, 1)
        return [next(self.data)[:2] for _ in range(count)]

    def update(self, batch, step, num_steps):
        accumulate(self.model, batch, self.tokens_per_step, CPU)
        base_train.follow_schedule(self.optimizer, step, num_steps, self.args)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

# -----------------------------------------------------------------------------
# Runs side by side

def speeds(trainees, measured):
    """
    Seconds per token of trainees that are not needed afterwards, over `measured` seconds of their steps.

    In turns, so that a machine that slows down for a while does so for all: their ratio decides on the shares.
    """
    spent, batches = [[] for _ in trainees], [trainee.batch() for trainee in trainees]
    while len(spent[0]) < 3 or sum(map(sum, spent)) < measured:
        for times, trainee, batch in zip(spent, trainees, batches):
            times.append(seconds(lambda: trainee.update(batch, 0, 100)))
    return [statistics.median(times) / trainee.tokens_per_step for times, trainee in zip(spent, trainees)]


def train(runs):
    """Take the steps of [(trainee, num_steps)] in turns, so that all end together; returns the seconds of each."""
    spent, done = [0.0] * len(runs), [0] * len(runs)
    while any(count < num_steps for count, (_, num_steps) in zip(done, runs)):
        i = min(range(len(runs)), key=lambda i: done[i] / runs[i][1])
        trainee, num_steps = runs[i]
        batch = trainee.batch()
        spent[i] += seconds(lambda: trainee.update(batch, done[i], num_steps))
        done[i] += 1
    return spent


def validation_bpb(model, tokenizer, args):
    num_rows = args.eval_tokens // args.seq_len
    batches = first_rows(pretraining_loader(tokenizer, ROWS, args.seq_len, "val", device="cpu"), num_rows, 0, 1)
    return evaluate_bpb(model, batches, -(-num_rows // ROWS), token_bytes_of(tokenizer))


def reference_at(num_rows, args, tokenizer, minutes, per_token):
    """(a fresh reference, its number of steps in so many minutes)"""
    return Reference(args, tokenizer, num_rows), round(60 * minutes / (per_token * num_rows * args.seq_len))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("--depth", type=int, default=4)
    add("--seq-len", type=int, default=512)
    add("--minutes", type=float, default=20, help="steps of the reference")
    add("--pilot-minutes", type=float, default=1, help="steps of the reference for each of the batches")
    add("--batches", type=int, nargs="+", default=[16, 32, 64], help="rows of a step of the reference, to choose from")
    add("--runs", nargs="+", default=["0.43"], help="ours, e.g. 0.43 '0.43 --remainders=requeue'")
    add("--eval-tokens", type=int, default=524288)
    args = parser.parse_args(argv)
    tokenizer = get_tokenizer()
    pilots = {}
    for num_rows in args.batches:
        (per_token,) = speeds([Reference(args, tokenizer, num_rows)], args.minutes)
        pilots[num_rows] = math.inf, per_token
        if len(args.batches) > 1:
            pilot = reference_at(num_rows, args, tokenizer, args.pilot_minutes, per_token)
            train([pilot])
            pilots[num_rows] = validation_bpb(pilot[0], tokenizer, args), per_token
            print(f"reference, {num_rows} rows a step, {pilot[1]} steps: bpb {pilots[num_rows][0]:.4f}", flush=True)
    best = min(pilots, key=pilots.get)
    budgets = [60 * args.minutes * float(run.split()[0]) for run in args.runs] # seconds
    guesses = ((2 * budget / pilots[best][1], run.split()[1:]) for budget, run in zip(budgets, args.runs))
    reference_per_token, *per_token = speeds( # of ours at about their lengths, which decide on their batches
        [Reference(args, tokenizer, best), *(Ours(args, tokenizer, *guess) for guess in guesses)], 4 * args.minutes)
    runs = [reference_at(best, args, tokenizer, args.minutes, reference_per_token)]
    for budget, each, run in zip(budgets, per_token, args.runs):
        trainee = Ours(args, tokenizer, budget / each, run.split()[1:])
        runs.append((trainee, trainee.num_steps))
    print(f"training {len(runs)} models, {runs[0][1]:,} steps of the reference", flush=True)
    spent = train(runs)
    bpbs = [validation_bpb(trainee.judged, tokenizer, args) for trainee, _ in runs]
    names = [f"reference, {runs[0][0].tokens_per_step:,} tokens a step"]
    names += [f"ours {run}, {trainee.tokens_per_step:,}" for run, (trainee, _) in zip(args.runs, runs[1:])]
    for name, (_, num_steps), time_spent, bpb in zip(names, runs, spent, bpbs):
        print(f"{name:45} {num_steps:6} steps {time_spent / 60:6.2f} minutes ({time_spent / spent[0]:.3f}) "
              f"bpb {bpb:.4f}")
    as_good = [time_spent / spent[0] for time_spent, bpb in zip(spent[1:], bpbs[1:]) if bpb <= bpbs[0]]
    print(json.dumps({"ratio": round(min(as_good), 3) if as_good else None, "reference_rows": best,
                      "seconds": [round(each, 1) for each in spent], "bpb": [round(each, 5) for each in bpbs],
                      "steps": [num_steps for _, num_steps in runs], "depth": args.depth, "seq_len": args.seq_len}))


if __name__ == "__main__":
    run_main(main)
