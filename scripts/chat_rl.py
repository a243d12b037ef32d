"""
Reinforcement learning on problems whose answers can be checked.

    python -m scripts.chat_rl
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --model-tag d20

The policy gradient of REINFORCE (Williams 1992) with the mean reward of a question's samples as the baseline, as in
GRPO (Shao et al. 2024, https://arxiv.org/abs/2402.03300), less its division by the standard deviation, its clipping and
its KL term, and normalised by tokens as in DAPO (Yu et al. 2025, https://arxiv.org/abs/2503.14476):

    questions -> samples (all decoded together) -> rewards -> advantages -> gradient -> one update, then new samples

For one of E questions with samples b, rewards r_b and V sampled tokens in all of them together the loss is
    - sum over b and t of (r_b - mean r) log p(token_bt)  /  (V E)
where p is the distribution that was sampled from, temperature and top-k included. What the tool wrote is not trained.

Reads:  a finetuned or midtrained checkpoint, the data of --task.
Writes: chatrl_checkpoints/<tag of the source>/ (with metrics.jsonl) and the report's section.
"""
import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True") # must precede torch

import argparse
import functools
import math
import random
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanochat.chat_training import Run, add_flags, flag_problems
from nanochat.common import compute_cleanup, compute_init, dataset_label, print0, run_main
from nanochat.engine import Engine, derive_seed
from nanochat.gpt import softcap
from nanochat.training import Stop, check_loss, is_due, lr_multiplier, try_evaluation
from tasks.registry import REWARDED

SOURCES = ("mid", "sft")
FIXED = ("task", "num_epochs", "examples_per_step", "num_samples", "max_new_tokens", "temperature", "top_k",
         "eval_examples") # the questions of the evaluation are not trained on


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add_flags(parser, SOURCES, "sft", init_lr_frac=0.05)
    add = parser.add_argument
    add("--task", default="GSM8K", choices=REWARDED, help="what the questions are from")
    # horizon and batches
    add("--num-epochs", type=int, default=1, help="passes over the questions")
    add("--examples-per-step", type=int, default=16, help="questions per optimizer step, all ranks together")
    add("--num-samples", type=int, default=16, help="answers per question")
    add("--device-batch-size", type=int, default=8,
        help="answers per device and backward pass, 4 x as many are decoded together; does not change the result")
    # sampling
    add("--max-new-tokens", type=int, default=256, help="per answer, tool output included")
    add("--temperature", type=float, default=1.0, help="of the policy, in training and evaluation")
    add("--top-k", type=int, default=50, help="the policy chooses among the k likeliest tokens; 0 = all")
    # evaluation
    add("--eval-every", type=int, default=60, help="steps between evaluations of pass@k; -1 = never")
    add("--eval-examples", type=int, default=400, help="questions kept out of training for it")
    add("--eval-samples", type=int, default=8, help="answers per question: k goes from 1 to this")
    parser.set_defaults(save_every=60)
    return parser


def check_args(args):
    positive = ("num_epochs", "examples_per_step", "num_samples", "device_batch_size", "max_new_tokens",
                "eval_examples", "eval_samples")
    problems = flag_problems(args, positive, ("num_iterations",))
    if args.num_samples == 1:
        problems.append("--num-samples must be at least 2, got 1: the baseline is the mean of a question's answers")
    if not args.temperature > 0:
        problems.append(f"--temperature must be above 0, got {args.temperature}: a greedy policy explores nothing")
    return problems


class Group(NamedTuple):
    """The samples of one question: ids of the prompt, (ids, masks) with the terminal token of each, its reward."""
    prompt: list
    samples: list
    rewards: list

    @property
    def is_even(self):
        """Are all rewards the same, so that there is nothing to learn?"""
        return min(self.rewards) == max(self.rewards)


def roll_out(run, task, indices, num_samples, seed):
    """[Group of each question]. What an answer draws depends on `seed`, its question and its number alone."""
    engine, args = Engine(run.model, run.tokenizer), run.args
    conversations = [task[i] for i in indices]
    prompts = [run.tokenizer.render_for_completion(conversation, sys.maxsize) for conversation in conversations]
    answers = engine.generate_many(prompts, num_samples, args.max_new_tokens, args.temperature, args.top_k,
                                   [derive_seed(seed, i) for i in indices], 4 * args.device_batch_size, keep_end=True)

    def reward(conversation, ids):
        ended = ids and ids[-1] in engine.terminal
        return task.reward(conversation, run.tokenizer.decode(ids[:-1] if ended else ids))

    return [Group(prompt, samples, [reward(conversation, ids) for ids, _ in samples])
            for conversation, prompt, samples in zip(conversations, prompts, answers, strict=True)]


def policy_losses(x, weight, targets, temperature, top_k):
    """
    As gpt.token_losses, of the distribution that `sample_next_token` draws from: -log p of the targets, (N,).

    What was sampled counts as one of the k likeliest even where rounding makes it another in this forward pass.
    """
    logits = softcap(F.linear(x, weight.to(x.dtype)))
    if top_k > 0:
        kth = logits.detach().topk(min(top_k, logits.size(-1))).values[:, -1:]
        unlikely = (logits < kth).scatter(1, targets.clamp_min(0).unsqueeze(1), False)
        logits = logits.masked_fill(unlikely, -torch.inf)
    return F.cross_entropy(logits / temperature, targets, ignore_index=-1, reduction="none")


def weighted_sequences(groups):
    """[(ids, targets, weight)] of all samples that teach something; the loss is the sum of weight x -log p."""
    sequences = []
    for group in groups:
        if group.is_even:
            continue
        mean = sum(group.rewards) / len(group.rewards)
        num_tokens = sum(sum(masks) for _, masks in group.samples) # V
        for (ids, masks), reward in zip(group.samples, group.rewards, strict=True):
            ids, masks = group.prompt + ids, [0] * len(group.prompt) + masks
            targets = [token if mask else -1 for token, mask in zip(ids, masks, strict=True)]
            sequences.append((ids[:-1], targets[1:], (reward - mean) / (num_tokens * len(groups))))
    return sequences


def add_gradient(run, groups):
    """Add the gradient of the loss of this rank's groups; returns (loss, sum of -log p, number of tokens)."""
    sequences = sorted(weighted_sequences(groups), key=lambda sequence: len(sequence[0])) # little padding
    totals = torch.zeros(3, device=run.compute.device)
    for start in range(0, len(sequences), run.args.device_batch_size):
        batch = sequences[start:start + run.args.device_batch_size]
        longest = len(batch[-1][0])
        inputs, targets = (torch.tensor([one[part] + [fill] * (longest - len(one[part])) for one in batch],
                                        device=run.compute.device) for part, fill in ((0, 0), (1, -1)))
        losses = run.model(inputs, targets, loss_reduction="none").view(targets.shape)
        weights = torch.tensor([[weight] for _, _, weight in batch], dtype=losses.dtype, device=losses.device)
        loss = (losses * weights).sum()
        loss.backward()
        totals += torch.stack([loss.detach(), losses.detach().sum(), (targets != -1).sum()])
    return totals.tolist()


def statistics_of(run, groups, loss, surprise, num_tokens):
    """
    What a step is judged by, over all ranks; `surprise` is -log p summed over the num_tokens trained on.

    So "entropy" is that of the questions that teach something, and nan where there are none.
    """
    samples = [(reward, ids, masks) for group in groups
               for reward, (ids, masks) in zip(group.rewards, group.samples, strict=True)]
    ends = Engine(run.model, run.tokenizer).terminal
    sums = run.compute.all_reduce(
        len(groups), len(samples), sum(reward for reward, _, _ in samples),
        sum(group.rewards[0] > 0 for group in groups), sum(max(group.rewards) > 0 for group in groups),
        sum(group.is_even for group in groups), sum(len(ids) for _, ids, _ in samples),
        sum(not ids or ids[-1] not in ends for _, ids, _ in samples),
        sum(len(group.prompt) > run.model.config.sequence_len for group in groups), loss, surprise, num_tokens)
    questions, answers, reward, first, solved, even, length, cut, too_long, loss, surprise, num_tokens = sums
    return {"reward": reward / answers, "pass@1": first / questions, f"pass@{run.args.num_samples}": solved / questions,
            "no_variance": even / questions, "entropy": surprise / num_tokens if num_tokens else math.nan,
            "length": length / answers, "truncated": cut / answers, "long_prompts": too_long / questions,
            "loss": loss / run.compute.ddp_world_size}


def pass_at_k(run, task):
    """{"pass@k": share of the questions with a right one among the first k answers} for k = 1 .. --eval-samples."""
    rank, world_size, num_samples = run.compute.ddp_rank, run.compute.ddp_world_size, run.args.eval_samples
    with torch.no_grad():
        groups = roll_out(run, task, range(rank, len(task), world_size), num_samples, f"evaluation/{run.args.seed}")
    solved = run.compute.all_reduce(*(sum(max(group.rewards[:k]) > 0 for group in groups)
                                      for k in range(1, num_samples + 1)))
    return {f"pass@{k}": count / len(task) for k, count in enumerate(solved, 1)}


def evaluate(run, task, step, last_step):
    """pass@k when it is due, before the first step too. A failure is told and gives nothing."""
    if not is_due(run.args.eval_every, step, last_step) and not (run.args.eval_every > 0 and step == 0):
        return {}
    metrics = try_evaluation("pass@k", lambda: pass_at_k(run, task)) or {}
    if metrics and step == 0:
        run.loop["first_metrics"] = metrics
    return metrics


def questions_of(args, step, num_questions, rank, world_size):
    """Indices of this rank's questions of a step; every epoch takes them in another order, less the last few."""
    steps_per_epoch = max(1, num_questions // args.examples_per_step)
    epoch, place = divmod(step, steps_per_epoch)
    order = random.Random(f"{args.seed}/{epoch}").sample(range(num_questions), num_questions)
    return order[place * args.examples_per_step:][:args.examples_per_step][rank::world_size]


def train(run, train_task, val_task, num_steps):
    """The whole of training on one page: exactly num_steps steps. Returns the metrics of the last evaluation."""
    args, compute = run.args, run.compute
    run.model.losses_fn = functools.partial(policy_losses, temperature=args.temperature, top_k=args.top_k)
    with run.hold(), Stop() as stop:
        run.begin(iter([train_task[0]]))
        for step in range(run.start_step or 0, num_steps + 1): # one more than the updates, to save and evaluate the end
            metrics = run.between_steps(step, step == num_steps, stop, lambda *due: evaluate(run, val_task, *due))
            if step == num_steps:
                return metrics

            start = time.time()
            indices = questions_of(args, step, len(train_task), compute.ddp_rank, compute.ddp_world_size)
            groups = roll_out(run, train_task, indices, args.num_samples, f"{args.seed}/{step}")
            sampled = time.time()
            statistics = statistics_of(run, groups, *add_gradient(run, groups))
            check_loss(statistics["loss"], step)
            multiplier = lr_multiplier(step, num_steps, warmdown_ratio=1.0)
            if statistics["no_variance"] < 1: # else momentum alone would move the weights
                run.update(multiplier)
            seconds = time.time() - start

            run.loop.update(reward=statistics["reward"], total_time=run.loop["total_time"] + seconds,
                            long_prompts=run.loop["long_prompts"] + statistics["long_prompts"] / num_steps)
            print0(f"step {step:05d}/{num_steps:05d} | " + " | ".join(f"{k}: {v:.4f}" for k, v in statistics.items())
                   + f" | lrm: {multiplier:.2f} | dt: {seconds:.2f}s ({sampled - start:.2f}s sampling)", flush=True)
            run.log.log(step, **{f"train/{name}": value for name, value in statistics.items()},
                        **{"train/lrm": multiplier, "train/dt": seconds})
            run.wandb.log({"step": step, "lrm": multiplier, **{f"train/{k}": v for k, v in statistics.items()}})


def outcome_of(run, num_steps, metrics):
    mark = f" ({dataset_label()})" if dataset_label() else ""
    return {"Task": run.args.task + mark, "Number of iterations": num_steps,
            "Mean reward of the last step": run.loop["reward"],
            "Prompts longer than the context %": 100 * run.loop["long_prompts"],
            **{f"{name} before": value for name, value in run.loop["first_metrics"].items()},
            **{f"{name} after": value for name, value in metrics.items()}}


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    compute = compute_init(args.device_type, args.seed)
    if args.examples_per_step % compute.ddp_world_size:
        raise ValueError(f"--examples-per-step must be a multiple of the {compute.ddp_world_size} ranks, "
                         f"got {args.examples_per_step}")
    run = Run(args, compute, "rl", SOURCES, FIXED, tuple(f"pass@{k}" for k in range(1, args.eval_samples + 1)),
              first_metrics={}, reward=None, long_prompts=0.0)
    make = REWARDED[args.task]
    val_task, train_task = make(stop=args.eval_examples), make(start=args.eval_examples)
    num_steps = len(train_task) // args.examples_per_step * args.num_epochs
    if num_steps < 1:
        raise ValueError(f"{args.task} has {len(train_task)} questions to train on besides the --eval-examples "
                         f"{args.eval_examples}, --examples-per-step asks for {args.examples_per_step}: lower one")
    num_steps = args.num_iterations if args.num_iterations > 0 else num_steps
    if run.finished:
        print0(f"Nothing to do: {run.folder} is complete at step {num_steps}")
    else:
        print0(f"{num_steps:,} steps of {args.examples_per_step} questions x {args.num_samples} answers, "
               f"{len(val_task)} questions for evaluation")
        metrics = train(run, train_task, val_task, num_steps)
        run.report(outcome_of(run, num_steps, metrics))
    run.wandb.finish()
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
