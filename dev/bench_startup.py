"""
The time from the start of a process to the end of its first training step, against the plain reference.

    python -m dev.bench_startup                     depth 6, V 32,768, 32 rows of 512 tokens: about 4 minutes
    python -m dev.bench_startup --depth 4 --vocab-size 8192 --batch-size 16 --device-batch-size 16

Each of the two runs in a process of its own with a compiler cache of its own, which is empty; in turns, --turns times.
The last line is JSON: `ratio` is our time over the reference's. Only on an idle machine does it say anything.
"""
from dev.bench_memory import compare
from nanochat.common import run_main

if __name__ == "__main__":
    run_main(lambda: compare("first_step", 1, 2, __doc__))
