"""
How the published shards of pretraining text are made: any amount of text -> shards in random order, for the hub.

    python -m dev.repackage_data_reference --out DIR                               FineWeb-Edu sample-100BT, streamed
    python -m dev.repackage_data_reference --out DIR --from FOLDER [--seed 42]     parquet, jsonl, csv or txt files
    hf upload-large-folder OWNER/NAME DIR --repo-type=dataset                      then (needs HF_TOKEN)

Shards are as published: column text, row groups of 1,024 documents, zstd level 3, and a shard is full with 250,000,000
characters and a multiple of 1,024 documents. No document is dropped: the last shard holds what is left. The order is
random over the whole input, but memory holds one bucket of it: documents are dealt into buckets on disk, which are
shuffled one by one. DIR needs room for the buckets too, about the size of the text. To train on text of your own,
`python -m nanochat.dataset --from` does all that it takes.
"""
import argparse
import collections
import json
import math
import os
import random
import tempfile
import time

from nanochat.common import UserError, atomic_write, run_main
from nanochat.dataset import _deal, _documents, _input_files, index_to_filename

GROUP = 1024 # documents of a row group
HUB = ("HuggingFaceFW/fineweb-edu", "sample-100BT")


def hub_documents(name, subset, counts):
    """Non-empty documents (str) of the training split of a hub data set, as they come over the line."""
    from datasets import load_dataset
    for row in load_dataset(name, subset, split="train", streaming=True):
        if row["text"]:
            counts.update(documents=1, characters=len(row["text"]))
            yield row["text"]


def shuffled(buckets, rng):
    """The documents of the buckets in random order; a bucket is deleted once it is in memory."""
    for path in buckets:
        with open(path, encoding="utf-8") as file:
            texts = [json.loads(line) for line in file]
        os.unlink(path)
        rng.shuffle(texts)
        yield from texts


def write_shards(texts, folder, shard_chars):
    """Write documents as shards, of which memory holds a row group; returns the number of documents in each."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    schema, sizes = pa.schema([("text", pa.string())]), []
    texts = iter(texts)
    group = [text for _, text in zip(range(GROUP), texts)]
    while group:
        sizes.append(0)
        chars = 0
        with (atomic_write(os.path.join(folder, index_to_filename(len(sizes) - 1)), "wb") as file,
              pq.ParquetWriter(file, schema, compression="zstd", compression_level=3, use_dictionary=False,
                               write_statistics=False) as writer):
            while group and chars < shard_chars:
                writer.write_table(pa.table({"text": group}, schema), row_group_size=GROUP)
                sizes[-1] += len(group)
                chars += sum(map(len, group))
                group = [text for _, text in zip(range(GROUP), texts)]
    return sizes


def repackage(args):
    """Returns counts: documents, characters, empty, replaced, shards."""
    from tqdm import tqdm
    os.makedirs(args.out, exist_ok=True)
    if os.listdir(args.out):
        raise UserError(f"--out {args.out} must be an empty folder, so that no shards of two runs mix: choose another")
    counts, rng = collections.Counter(), random.Random(args.seed)
    if args.sources:
        paths = _input_files(args.sources)
        texts = _documents(paths, "", "blank-line", counts)
        chars = sum(os.path.getsize(path) * (4 if path.endswith((".parquet", ".gz", ".zst")) else 1) for path in paths)
    else:
        texts, chars = hub_documents(args.hub, args.subset, counts), args.hub_chars
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".buckets.") as folder:
        number = 1 + math.ceil(chars / args.bucket_chars)
        buckets = _deal(tqdm(texts, unit=" documents", disable=None), folder, number, rng)
        sizes = write_shards(shuffled(buckets, rng), args.out, args.shard_chars)
    assert sum(sizes) == counts["documents"], "a document was lost"
    if not sizes:
        raise ValueError("found no document: name files with text")
    return counts + collections.Counter(shards=len(sizes))


def build_parser():
    parser = argparse.ArgumentParser(prog="dev.repackage_data_reference", description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("--out", required=True, help="empty folder for the shards")
    add("--from", nargs="+", default=[], dest="sources", metavar="PATH", help="files or folders; without: the hub")
    add("--hub", default=HUB[0], help="without --from: data set of the hub, or a folder that `datasets` can load")
    add("--subset", default=HUB[1], help="configuration of that data set; empty = its default")
    add("--hub-chars", type=float, default=5e11, help="characters expected from the hub: decides the number of buckets")
    add("--seed", type=int, default=42, help="seed of the shuffle")
    add("--shard-chars", type=int, default=250_000_000, help="characters with which a shard is full")
    add("--bucket-chars", type=int, default=250_000_000, help="characters of a bucket: what memory must hold")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.shard_chars, args.bucket_chars, args.hub_chars) < 1:
        parser.error("--shard-chars, --bucket-chars and --hub-chars must be at least 1")
    args.subset = args.subset or None
    start, cpu = time.time(), time.process_time()
    counts = repackage(args)
    megabytes = counts["characters"] / 1e6 # at least: a character has one byte or more
    print(json.dumps({**counts, "MB_per_s": round(megabytes / (time.time() - start), 1),
                      "MB_per_s_and_core": round(megabytes / (time.process_time() - cpu), 1)}))


if __name__ == "__main__":
    run_main(main)
