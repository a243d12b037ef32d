"""
Score a chat model on one Task: by sampling answers, or by the logits of the answer letters.

    conversations -> prompts (rendered for completion) -> answers, many prompts at a time -> task.evaluate -> Score

Problem i belongs to rank i mod W; every rank gets the totals. Task, tokenizer, model and engine are handed in.
"""
import math
import sys
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanochat.common import is_ddp_initialized, print0

SECONDS_BETWEEN_LINES = 30 # of progress in a log; a terminal sees every step


class Score(NamedTuple):
    """
    How many problems were solved, each by any of its samples; pass_at_1 = share of all samples that were right.

    groups = {domain or subject: (passed, total)} where the conversations name one; too_long = prompts that exceed the
    context the model was trained on. They are run whole.
    """
    passed: int
    total: int
    groups: dict
    pass_at_1: float
    too_long: int = 0

    @property
    def accuracy(self):
        return self.passed / self.total


def wilson_interval(passed, total, z=1.96):
    """
    (low, high): 95 % interval (for z = 1.96) of a success rate; sound for small counts and near 0 and 1.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.
    """
    rate, shrink = passed / total, 1 + z * z / total
    center = (rate + z * z / (2 * total)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total)) / shrink
    return max(0.0, center - half), min(1.0, center + half)


def evaluate_generative(task, tokenizer, engine, num_samples=1, max_new_tokens=512, temperature=0.0, top_k=50,
                        max_problems=None, batch_size=32, seed=42, label=None):
    """
    Sample answers; a problem is solved when any of its num_samples answers is right (pass@n). Returns a Score.

    max_new_tokens  per answer, tool output included
    max_problems    only the first so many, None = all
    batch_size      answers decoded together; changes the speed, not the score
    seed            problem i draws from seed + i, whatever rank or batch it is in
    label           name for progress on the console, None = silent
    """
    def judge(indices, conversations, prompts):
        answers = engine.generate_many(prompts, num_samples=num_samples, max_tokens=max_new_tokens,
                                       temperature=temperature, top_k=top_k, seed=[seed + i for i in indices],
                                       batch_size=batch_size)
        return [sum(bool(task.evaluate(conversation, tokenizer.decode(ids))) for ids, _ in samples) / num_samples
                for conversation, samples in zip(conversations, answers, strict=True)]

    return _score(task, tokenizer, engine.model, judge, 4 * batch_size, max_problems, label)


def evaluate_categorical(task, tokenizer, model, max_problems=None, batch_size=8, label=None):
    """
    Compare the logits of each problem's answer letters at the end of its prompt; nothing is sampled. Returns a Score.

    Easier than generation by design: the model cannot answer anything else. batch_size = prompts per forward, padded to
    the longest (prompts of like length go together). Raises ValueError for a letter that is not one token.
    """
    letter_ids = {}

    def letter_id(letter):
        if letter not in letter_ids:
            ids = tokenizer.encode(letter)
            if len(ids) != 1:
                raise ValueError(f"the answer letter {letter!r} must be one token, got {len(ids)} from this tokenizer")
            letter_ids[letter] = ids[0]
        return letter_ids[letter]

    def choose(conversation, logits):
        letters = conversation["letters"]
        return letters[logits[[letter_id(letter) for letter in letters]].argmax().item()]

    def judge(indices, conversations, prompts):
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        is_right = [False] * len(prompts)
        for start in range(0, len(prompts), batch_size):
            batch = by_length[start:start + batch_size]
            last_logits = _last_logits(model, [prompts[i] for i in batch], tokenizer.get_bos_token_id())
            for i, logits in zip(batch, last_logits, strict=True):
                is_right[i] = bool(task.evaluate(conversations[i], choose(conversations[i], logits)))
        return is_right

    return _score(task, tokenizer, model, judge, 32 * batch_size, max_problems, label)


@torch.no_grad() # not inference mode: what the model caches here must still serve training
def _last_logits(model, prompts, pad_id):
    """Logits after each prompt's last token, (B, V). Padding stands on the right, where no prompt token sees it."""
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [pad_id] * (longest - len(prompt)) for prompt in prompts], device=model.get_device())
    last = torch.tensor([row * longest + len(prompt) - 1 for row, prompt in enumerate(prompts)], device=ids.device)
    return model.logits_at(ids, last) if hasattr(model, "logits_at") else model(ids).flatten(0, 1)[last]


def _score(task, tokenizer, model, judge, window, max_problems, label):
    """Judge this rank's problems, `window` at a time, by judge(indices, conversations, prompts); sum over ranks."""
    if max_problems is not None and max_problems < 1:
        raise ValueError(f"max_problems must be at least 1, got {max_problems}")
    num_problems = len(task) if max_problems is None else min(max_problems, len(task))
    if num_problems == 0:
        raise ValueError(f"{type(task).__name__} has no problems to evaluate")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_ddp_initialized() else (0, 1)
    mine = range(rank, num_problems, world_size)
    context_len = getattr(getattr(model, "config", None), "sequence_len", math.inf)
    verdicts = torch.zeros(num_problems, 2, device=model.get_device()) # share of right samples, is the prompt too long
    progress = _Progress(label if rank == 0 else None, len(mine))
    for start in range(0, len(mine), window):
        indices = mine[start:start + window]
        conversations = [task[i] for i in indices]
        prompts = [tokenizer.render_for_completion(conversation, sys.maxsize) for conversation in conversations]
        results = judge(indices, conversations, prompts)
        pairs = [(result, len(prompt) > context_len) for result, prompt in zip(results, prompts, strict=True)]
        verdicts[list(indices)] = torch.tensor(pairs, dtype=torch.float32, device=verdicts.device)
        progress.add(sum(result > 0 for result in results), len(results))
    if is_ddp_initialized():
        dist.all_reduce(verdicts)
    too_long = round(verdicts[:, 1].sum().item())
    if too_long:
        print0(f"{label or type(task).__name__}: {too_long} of {num_problems} prompts exceed the model's context of "
               f"{context_len} tokens, they are run whole")
    return _tally(task, verdicts[:, 0].tolist(), too_long)


def _tally(task, verdicts, too_long):
    groups, solved = {}, [verdict > 0 for verdict in verdicts]
    for i, is_right in enumerate(solved):
        conversation = task[i]
        name = conversation.get("domain", conversation.get("subject"))
        if name is not None:
            passed, total = groups.get(name, (0, 0))
            groups[name] = (passed + is_right, total + 1)
    return Score(sum(solved), len(solved), dict(sorted(groups.items())), sum(verdicts) / len(verdicts), too_long)


class _Progress:
    """The running score: one line that is overwritten on a terminal, a line now and then in a log."""

    def __init__(self, label, total):
        self.label, self.total, self.done, self.passed = label, total, 0, 0
        self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def add(self, passed, total):
        self.passed, self.done = self.passed + passed, self.done + total
        if self.label is None:
            return
        text = f"{self.label}: {self.done}/{self.total} problems, {100 * self.passed / self.done:.1f}% right so far"
        if sys.stdout.isatty():
            print(f"\r{text}", end="\n" if self.done == self.total else "", flush=True)
        elif time.monotonic() >= self.next_line:
            print(text, flush=True)
            self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES
