"""
The packer against a plain scan, what packing drops, and the loader's speed.

    python -m dev.bench_loader                              on the base directory's training shards and tokenizer
    python -m dev.bench_loader --seq-lens 512 2048 --rows 2000

Each row length is packed with the same 1,000 waiting documents by BestFitBuffer and by a scan of all of them for every
placement, in turns. "dropped" is the share of the tokens taken from documents that is cut off and lost; queued again
(--remainders requeue) nothing is. The last line is JSON; its `ratio` is the smallest speed-up of a placement.
"""
import argparse
import itertools
import json
import random
import statistics
import time

from nanochat.common import run_main
from nanochat.dataloader import BestFitBuffer, pretraining_loader
from nanochat.dataset import parquets_iter_batched
from nanochat.tokenizer import get_tokenizer

WAITING = 1000


class Scan:
    """BestFitBuffer's two questions, answered by looking at every document."""

    def __init__(self):
        self.lengths = []

    def add(self, length, item):
        self.lengths.append(length)

    def take(self, room):
        best = max((i for i, length in enumerate(self.lengths) if length <= room), default=None,
                   key=lambda i: (self.lengths[i], -i))
        return None if best is None else self.lengths.pop(best)

    def take_shortest(self):
        return self.lengths.pop(min(range(len(self.lengths)), key=self.lengths.__getitem__))


def pack(buffer, lengths, capacity, num_rows):
    """(seconds a placement, share of tokens dropped) of packing `num_rows` rows."""
    endless, placements, taken, dropped, seconds = itertools.cycle(lengths), 0, 0, 0, 0.0
    for length in itertools.islice(endless, WAITING):
        buffer.add(length, length)
    for _ in range(num_rows):
        filled = 0
        while filled < capacity:
            start = time.perf_counter()
            length = buffer.take(capacity - filled) or buffer.take_shortest()
            refill = next(endless)
            buffer.add(refill, refill)
            seconds += time.perf_counter() - start
            placements, taken = placements + 1, taken + length
            dropped += max(0, length - (capacity - filled))
            filled += length
    return seconds / placements, dropped / taken


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rows", type=int, default=1000, help="to pack, of each length")
    parser.add_argument("--documents", type=int, default=20_000, help="of the training shards, whose lengths are taken")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args(argv)
    tokenizer = get_tokenizer()
    texts = list(itertools.islice(itertools.chain.from_iterable(parquets_iter_batched("train")), args.documents))
    lengths = [len(ids) + 1 for ids in tokenizer.encode(texts, num_threads=2)]
    random.Random(0).shuffle(lengths)
    print(f"{len(lengths):,} documents, {statistics.mean(lengths):.0f} tokens on average, {max(lengths):,} at most")
    ratios, shares = {}, {}
    for T in args.seq_lens:
        turns = [(pack(BestFitBuffer(), lengths, T + 1, args.rows),
                  pack(Scan(), lengths, T + 1, max(1, args.rows // 20))) for _ in range(args.turns)]
        ours, scan = (statistics.median(turn[i][0] for turn in turns) for i in (0, 1))
        ratios[T], shares[T] = scan / ours, turns[0][0][1]
        loader = pretraining_loader(tokenizer, 16, T, "train", tokenizer_threads=2, device="cpu")
        next(loader)
        start = time.perf_counter()
        batches = sum(1 for _ in itertools.islice(loader, 20))
        speed = batches * 16 * T / (time.perf_counter() - start)
        print(f"T {T:5}: a placement {1e6 * ours:6.1f} us, by a scan {1e6 * scan:7.1f} us, {ratios[T]:5.1f} times; "
              f"dropped {100 * shares[T]:.1f} % of the tokens; loader {speed:,.0f} tokens/s")
    print(json.dumps({"ratio": round(min(ratios.values()), 2), "speedup": ratios, "dropped": shares}))


if __name__ == "__main__":
    run_main(main)
