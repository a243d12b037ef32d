"""
Train the tokenizer on the training split.

    python -m scripts.tok_train --vocab-size 32768

Reads:   the training shards below NANOCHAT_BASE_DIR.
Writes:  tokenizer/tokenizer.json, tokenizer/token_bytes.pt, the report's "Tokenizer training" section.
"""
import argparse
import os
import time

import torch

from nanochat.common import UserError, atomic_write, get_base_dir, run_main
from nanochat.dataset import parquets_iter_batched
from nanochat.report import get_report
from nanochat.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, RustBPETokenizer, token_bytes_of

# What the trained tokenizer must give back unchanged before it is saved
CHECK_TEXT = """Hello world! One line, and here's another: I'm, you'll, they'VE, we're.
Numbers: 7, 42, 1234, 3.14159, 1,000,000; symbols: {[(<>)]} @#$%^&*_+-=|~`'"
\ttabs, trailing blanks  \r\n\n\nChinese: \u4f60\u597d\uff0c\u4e16\u754c; emoji: \U0001f30d\U0001f468\u200d\U0001f680;
text that spells a special token: <|bos|>"""


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--max-chars", type=int, default=2_000_000_000, help="characters in all (default: 2B)")
    parser.add_argument("--doc-cap", type=int, default=10_000, help="characters used of one document (default: 10,000)")
    parser.add_argument("--vocab-size", type=int, default=2**15,
                        help=f"tokens, the {len(SPECIAL_TOKENS)} special ones included (default: 32768)")
    return parser


def check_args(args):
    problems = []
    if args.max_chars < 1:
        problems.append(f"--max-chars must be at least 1, got {args.max_chars}")
    if args.doc_cap < 1:
        problems.append(f"--doc-cap must be at least 1, got {args.doc_cap}")
    if not MIN_VOCAB_SIZE <= args.vocab_size < 2**31: # ids are stored in 32 bits
        problems.append(f"--vocab-size must be at least {MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} special "
                        f"tokens) and below 2**31, got {args.vocab_size}")
    return problems


class Corpus:
    """The documents of an iterator of batches (lists of str), `doc_cap` characters of each and `max_chars` in all."""

    def __init__(self, batches, max_chars, doc_cap):
        self.batches, self.max_chars, self.doc_cap = batches, max_chars, doc_cap
        self.num_chars = 0 # given so far

    def __iter__(self):
        from tqdm import tqdm
        with tqdm(total=self.max_chars, unit="char", unit_scale=True, disable=None) as progress: # None: on a tty only
            for text in (text for batch in self.batches for text in batch):
                text = text[:min(self.doc_cap, self.max_chars - self.num_chars)]
                self.num_chars += len(text)
                progress.update(len(text))
                yield text
                if self.num_chars == self.max_chars:
                    return


def train(args):
    """Returns (tokenizer, seconds, characters read)."""
    corpus = Corpus(parquets_iter_batched("train"), args.max_chars, args.doc_cap)
    start = time.perf_counter()
    tokenizer = RustBPETokenizer.train_from_iterator(corpus, args.vocab_size)
    if corpus.num_chars == 0:
        raise UserError("the training shards hold no text: add documents with `python -m nanochat.dataset`")
    return tokenizer, time.perf_counter() - start, corpus.num_chars


def save(tokenizer, token_bytes, folder):
    """Write both files, complete or not at all."""
    if tokenizer.decode(tokenizer.encode(CHECK_TEXT)) != CHECK_TEXT:
        raise UserError("the trained tokenizer does not give back the check text, so it was not saved: "
                        "train again, and report this if it stays")
    with atomic_write(os.path.join(folder, "token_bytes.pt"), "wb") as file:
        torch.save(token_bytes, file)
        file.flush() # a full disk shows here, before the tokenizer itself is replaced
        tokenizer.save(folder)


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    print(f"max_chars: {args.max_chars:,}\ndoc_cap: {args.doc_cap:,}\nvocab_size: {args.vocab_size:,}")

    tokenizer, train_time, num_chars = train(args)
    vocab_size = tokenizer.get_vocab_size()
    print(f"Trained on {num_chars:,} characters in {train_time:.2f} s")
    if vocab_size < args.vocab_size:
        print(f"The text gave only {vocab_size:,} of the {args.vocab_size:,} tokens asked for: it has no more merges")

    token_bytes = token_bytes_of(tokenizer)
    folder = os.path.join(get_base_dir(), "tokenizer")
    save(tokenizer, token_bytes, folder)
    print(f"Saved the tokenizer to {folder}")

    counts = token_bytes[token_bytes > 0].double()
    get_report().log("Tokenizer training", [vars(args), {
        "train_time": train_time,
        "num_special_tokens": len(SPECIAL_TOKENS),
        "trained_vocab_size": vocab_size,
        "trained_chars": num_chars,
        "token_bytes_min": int(counts.min()),
        "token_bytes_max": int(counts.max()),
        "token_bytes_mean": counts.mean().item(),
        "token_bytes_std": counts.std().item(),
    }])


if __name__ == "__main__":
    run_main(main)
