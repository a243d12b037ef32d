"""
Speed of evaluation against one example, or one prompt, at a time: examples per second on random weights.

    python -m dev.bench_eval --bundle DIR       20 examples of each CORE task, depth 4, V = 32,768

The plain side of CORE is what its definition says: the prompts of one example in one padded batch, logits at every
position. That of sampling decodes with the same engine, one prompt after the other. Both sides run in turn on the same
weights and must agree in every prediction and every greedy token. The last line is JSON; `ratio` is that of CORE.
"""
import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from nanochat import core_eval
from nanochat.common import UserError, run_main
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer

TRAINING_CHARS = 1_000_000 # of each file of the bundle, for the tokenizer
ROWS = 32 # prompts that are sampled from together
QUESTIONS = ["What is the capital of France?", "Spell the word lantern.", "What is 17 * 23?", "Name three colours.",
             "If 5*x + 3 = 13, what is x?", "Tell me a story about a fox and a lighthouse."]


def build_parser():
    parser = argparse.ArgumentParser(description="Measure evaluation, in examples per second.")
    add = parser.add_argument
    add("--bundle", required=True, help="folder of the CORE data: core.yaml, eval_meta_data.csv, eval_data/")
    add("--tokenizer", default="", help="folder of a tokenizer; empty = train one on the bundle's text")
    add("--vocab-size", type=int, default=32768, help="tokens of the tokenizer to train")
    add("--depth", type=int, default=4, help="layers; 64 channels per layer, heads of 128")
    add("--seq-len", type=int, default=2048, help="context of the model")
    add("--examples", type=int, default=20, help="examples of each task")
    add("--prompts", type=int, default=64, help=f"prompts to sample from, {ROWS} at a time")
    add("--new-tokens", type=int, default=64, help="tokens to sample for each of them")
    return parser


def load_tokenizer(args):
    if args.tokenizer:
        return RustBPETokenizer.from_directory(args.tokenizer)
    lines = (line for path in sorted(Path(args.bundle, "eval_data").rglob("*.jsonl"))
             for line in path.read_text("utf-8")[:TRAINING_CHARS].splitlines()[:-1]) # the last one may be cut
    texts = (value for line in lines for value in json.loads(line).values() if isinstance(value, str))
    return RustBPETokenizer.train_from_iterator(texts, args.vocab_size)


@torch.no_grad()
def build_model(args, vocab_size):
    """A model with random weights whose predictions depend on every token."""
    torch.manual_seed(0)
    heads = max(1, args.depth // 2)
    model = GPT(GPTConfig(args.seq_len, vocab_size, args.depth, heads, heads, heads * 128))
    model.init_weights()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def timed(function, *args, **kwargs):
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - start

# -----------------------------------------------------------------------------
# CORE

@torch.no_grad()
def score_one_by_one(items, model, tokenizer, device):
    """{sequence: (mean loss, is it what greedy decoding says)}, like core_eval._run_items, the other side."""
    scores = {}
    for sequences in items:
        ids = core_eval.stack_sequences([s.tokens for s in sequences], tokenizer.get_bos_token_id()).to(device)
        logits = model(ids) # (B, T, V)
        losses = F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, dims=1).flatten(), reduction="none").view(ids.shape)
        predictions = logits.argmax(dim=-1)
        for row, s in enumerate(sequences):
            span, before = slice(s.start, s.end), slice(s.start - 1, s.end - 1)
            scores[s] = losses[row, before].mean().item(), torch.equal(predictions[row, before], ids[row, span])
    return scores


def prediction(scores, task_type):
    return scores[0][1] if task_type == "language_modeling" else min(range(len(scores)), key=lambda i: scores[i][0])


def bench_core(args, model, tokenizer):
    """({task type: tensor of examples, seconds plain, seconds ours}, different predictions, largest loss difference)"""
    totals, different, largest, sides = {}, 0, 0.0, [score_one_by_one, core_eval._run_items]
    for task_idx, (meta, data, _) in enumerate(core_eval._read_bundle(args.bundle)):
        num_items, kind = min(args.examples, len(data)), meta["task_type"]

        def run(score_items, num_items=num_items, meta=meta, data=data):
            items = [core_eval._prepare(i, model, tokenizer, data, meta) for i in range(num_items)]
            scores = score_items(items, model, tokenizer, model.get_device())
            return [[scores[sequence] for sequence in item] for item in items]
        runs = {side: timed(run, side) for side in (sides if task_idx % 2 else sides[::-1])} # who is first changes
        (plain, plain_seconds), (ours, our_seconds) = (runs[side] for side in sides)
        different += sum(prediction(a, kind) != prediction(b, kind) for a, b in zip(plain, ours, strict=True))
        largest = max(largest, (torch.tensor(sum(plain, [])) - torch.tensor(sum(ours, [])))[:, 0].abs().max().item())
        totals[kind] = totals.get(kind, 0) + torch.tensor([num_items, plain_seconds, our_seconds])
        print(f"{meta['label']:<34s} {plain_seconds:8.2f} s {our_seconds:8.2f} s {plain_seconds / our_seconds:7.2f}")
    return totals, different, largest

# -----------------------------------------------------------------------------

def bench_sampling(args, model, tokenizer):
    """(tensor of prompts, seconds one by one, seconds together; prompts whose greedy tokens differ)"""
    engine = Engine(model, tokenizer)
    prompts = [tokenizer.render_for_completion({"messages": [{"role": "user", "content": f"{i}. " + question}]})
               for i, question in zip(range(args.prompts), QUESTIONS * args.prompts, strict=False)]
    total, different = torch.zeros(3), 0
    for start in range(0, len(prompts), ROWS):
        part = prompts[start:start + ROWS]
        (plain, plain_seconds), (ours, our_seconds) = (
            timed(engine.generate_many, part, max_tokens=args.new_tokens, temperature=0, batch_size=batch_size)
            for batch_size in (1, ROWS))
        different += sum(a != b for a, b in zip(plain, ours, strict=True))
        total += torch.tensor([len(part), plain_seconds, our_seconds])
    return total, different


def main(argv=None):
    args = build_parser().parse_args(argv)
    tokenizer = load_tokenizer(args)
    model = build_model(args, tokenizer.get_vocab_size())
    totals, different, largest = bench_core(args, model, tokenizer)
    totals["CORE"] = sum(totals.values())
    totals["sampling"], different_samples = bench_sampling(args, model, tokenizer)
    ratios = {}
    print(f"\n{'':<20s} {'examples':>8s} {'one by one/s':>13s} {'together/s':>13s} {'ratio':>7s}")
    for name, row in totals.items():
        count, plain, ours = row.tolist()
        ratios[name] = round(plain / ours, 2)
        print(f"{name:<20s} {count:8.0f} {count / plain:13.3f} {count / ours:13.3f} {plain / ours:7.2f}")
    print(json.dumps({"ratio": ratios.pop("CORE"), "ratios": ratios, "different_predictions": different,
                      "largest_loss_difference": largest, "different_samples": different_samples,
                      "examples": args.examples, "depth": args.depth, "vocab_size": tokenizer.get_vocab_size(),
                      "threads": torch.get_num_threads(), "torch": torch.__version__}))
    if different or different_samples:
        raise UserError("the two sides do not say the same")


if __name__ == "__main__":
    run_main(main)
