"""
Fill a base directory with tinyworld, the embedded data set: a small, closed, true and learnable world.

    python -m dev.tinyworld.generate --base-dir DIR --facts 1000

Writes, in the formats of the real data, base_data/ (the last shard is for validation), eval_bundle/, hub/, identity
conversations, a word list and the manifest. The same flags give the same bytes; a second run changes nothing.
"""
import argparse
import hashlib
import io
import os
from itertools import islice
from pathlib import Path

from nanochat.common import UserError, atomic_write, claim_base_dir, get_base_dir, read_manifest, run_main, write_json

from . import exercises, heldout, prose, stories
from .conversations import Talker, as_json, talk_documents
from .facts import World, load_data

DOCUMENTS = { # kind: share of the pretraining documents, and the endless stream of them
    "facts": (0.34, lambda world, rng: prose.fact_documents(world, rng, stories.DATA["names"])),
    "choices": (0.03, prose.choice_documents),
    "lists": (0.02, lambda world, rng: prose.list_documents(rng)),
    "stories": (0.23, lambda world, rng: stories.story_documents(rng)),
    "equations": (0.02, lambda world, rng: exercises.equation_documents(rng)),
    "small sums": (0.02, lambda world, rng: exercises.small_documents(rng)),
    "expressions": (0.05, lambda world, rng: exercises.expression_documents(rng, world.seed)),
    "spelling": (0.08, lambda world, rng: exercises.spelling_documents(world.seed, rng)),
    "pairs": (0.14, lambda world, rng: exercises.pair_documents(rng)),
    "turned pairs": (0.02, lambda world, rng: exercises.pair_documents(rng, turned=True)),
    "repeats": (0.03, lambda world, rng: exercises.repeat_documents(world.seed, rng)),
    "talk": (0.05, lambda world, rng: talk_documents(Talker(world, world.open, "train", rng)))}
FIRST = {"pairs": 0.85, "stories": 0.4} # the lessons in looking back: the share of each that comes before all else
CONVERSATION_WEIGHTS = { # share of the rows of the SmolTalk stand-in
    "fact": 0.43, "follow_up": 0.13, "story": 0.18, "list": 0.02, "small_talk": 0.05,
    "memory": 0.04, "unknown": 0.15}
HELDOUT_WEIGHTS = {"fact": 0.6, "story": 0.2, "list": 0.05, "unknown": 0.15} # the same for its test rows
ROWS = { # of the other stand-ins
    "arc": {"train": 800, "validation": 100, "test": 200}, "mmlu": {"test": 200, "validation": 100, "dev": 50},
    "mmlu auxiliary": 1500, "gsm8k": {"train": 2000, "test": 200}, "smoltalk test": 300, "tinyworld train": 1500,
    "tinyworld practice": 1500, "identity": 500, "core": 80} # core: items per task
PER_FACT = {"documents": 25, "conversations": 7} # defaults of the flags
LEAST = {"facts": 40, "documents": 100, "conversations": 100, "questions": 20}
SHARDS = 4 # for training; one more is for validation
ROW_GROUP, ROW_GROUPS = 64, 8 # most rows, fewest groups of a file: several lanes (ranks) find some


def build_parser():
    parser = argparse.ArgumentParser(prog="dev.tinyworld.generate", description=__doc__.split("\n")[1])
    parser.add_argument("--base-dir", default="", help="folder to fill (empty = NANOCHAT_BASE_DIR or its default)")
    parser.add_argument("--facts", type=int, default=1000, help="facts, best known first (all when there are fewer)")
    parser.add_argument("--documents", type=int, default=-1,
                        help=f"documents for pretraining (-1 = {PER_FACT['documents']} per fact)")
    parser.add_argument("--conversations", type=int, default=-1,
                        help=f"training rows of the SmolTalk stand-in (-1 = {PER_FACT['conversations']} per fact)")
    parser.add_argument("--questions", type=int, default=400, help="held-out questions of the tinyworld task")
    parser.add_argument("--seed", type=int, default=0, help="seed of every choice")
    return parser


def check_args(args):
    """All problems of the flags, as sentences."""
    return [f"--{name} must be at least {least}, got {getattr(args, name)}" for name, least in LEAST.items()
            if getattr(args, name) < least and not (name in PER_FACT and getattr(args, name) == -1)]


class Folder:
    """A base directory that is being filled; `files` says what it holds, in the form of the manifest."""
    def __init__(self, root):
        self.root, self.files = Path(root), {}

    def write(self, name, content):
        """Write bytes under a relative path, unless the file has them already."""
        path = self.root / name
        self.files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if not path.is_file() or path.read_bytes() != content:
            with atomic_write(path, "wb") as file:
                file.write(content)

    def lines(self, name, lines):
        self.write(name, "".join(line + "\n" for line in lines).encode())

    def parquet(self, name, rows):
        """A table of dicts of one shape."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        sink = io.BytesIO()
        size = min(ROW_GROUP, -(-len(rows) // ROW_GROUPS))
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=size, use_dictionary=False,
                       compression="zstd", compression_level=3, write_statistics=False)
        self.write(name, sink.getvalue())

    def hub(self, name, subset, split, rows):
        """One split of a stand-in for a hub data set."""
        self.parquet(f"hub/{name}/{subset}/{split}/{split}-00000-of-00001.parquet", rows)


def documents(world, count):
    """
    About `count` pretraining documents in the proportions of DOCUMENTS, in an order that teaches looking back.

    First come pairs and stories alone, more pairs than stories: a small model learns from them in 100 to 150 steps to
    find in a text what a question asks for, and from the same documents spread evenly not at all. Then they grow
    rarer, not too fast: the new skill is easily forgotten while the facts are learned.
    """
    rng, placed, total = world.rng("order"), [], sum(share for share, _ in DOCUMENTS.values())
    for kind, (share, stream) in DOCUMENTS.items():
        for text in islice(stream(world, world.rng("documents", kind)), round(count * share / total)):
            is_first, place = rng.random() < FIRST.get(kind, 0), rng.random()
            placed.append((not is_first, place**1.5 if kind in FIRST else place, text))
    return [text for _, _, text in sorted(placed)]


def write_documents(folder, world, texts):
    """Write the training shards and the validation shard (a thirtieth of all, shuffled); returns the latter's name."""
    every = min(30, len(texts) // 20)
    held, kept = texts[::every], [text for number, text in enumerate(texts) if number % every]
    size = -(-len(kept) // SHARDS)
    for number, piece in enumerate([*(kept[first:first + size] for first in range(0, len(kept), size)),
                                    world.rng("validation").sample(held, len(held))]):
        folder.parquet(f"base_data/shard_{number:05d}.parquet", [{"text": text} for text in piece])
    return f"shard_{SHARDS:05d}.parquet"


def write_bundle(folder, tasks):
    """Write the evaluation bundle in the layout of CORE's."""
    import yaml
    folder.lines("eval_bundle/core.yaml", [yaml.safe_dump({"icl_tasks": [entry for entry, _, _ in tasks]}).rstrip()])
    folder.lines("eval_bundle/eval_meta_data.csv",
                 ["Eval Task,Random baseline", *(f"{entry['label']},{baseline}" for entry, baseline, _ in tasks)])
    for entry, _, items in tasks:
        folder.lines(f"eval_bundle/eval_data/{entry['dataset_uri']}", map(as_json, items))


def write_hub(folder, world, num_conversations, num_questions, words, hidden_words):
    """Write the stand-ins for data sets of the hub, the tinyworld task's own rows, and the identity conversations."""
    talker = Talker(world, world.open, "train", world.rng("smoltalk"))
    tester = Talker(world, world.facts, "heldout", world.rng("smoltalk test"))
    folder.lines("identity_conversations.jsonl", [as_json(talker.identity()) for _ in range(ROWS["identity"])])
    for split, rows in (("train", talker.make(CONVERSATION_WEIGHTS, num_conversations)),
                        ("test", tester.make(HELDOUT_WEIGHTS, ROWS["smoltalk test"]))):
        folder.hub("HuggingFaceTB/smol-smoltalk", "default", split, rows)
    for split, count in ROWS["arc"].items():
        for subset in ("ARC-Easy", "ARC-Challenge"):
            folder.hub("allenai/ai2_arc", subset, split, heldout.arc_rows(world, subset, split, count))
    for split, count in ROWS["mmlu"].items():
        folder.hub("cais/mmlu", "all", split, heldout.mmlu_rows(world, split, count))
    auxiliary = heldout.mmlu_rows(world, "train", ROWS["mmlu auxiliary"])
    folder.hub("cais/mmlu", "auxiliary_train", "train", [{"train": row} for row in auxiliary]) # wrapped as on the hub
    for split, count in ROWS["gsm8k"].items():
        folder.hub("openai/gsm8k", "main", split, heldout.gsm8k_rows(world, split, count))
    folder.hub("openai/openai_humaneval", "default", "test", load_data("humaneval.json"))
    folder.hub("nanochat/tinyworld", "default", "train", heldout.train_rows(world, ROWS["tinyworld train"], words))
    folder.hub("nanochat/tinyworld", "default", "practice", heldout.practice_rows(world, ROWS["tinyworld practice"]))
    folder.hub("nanochat/tinyworld", "default", "test", heldout.test_rows(world, num_questions, hidden_words))


def generate(args):
    """Write everything; the manifest with the hashes comes last."""
    folder, world = Folder(get_base_dir()), World(args.facts, args.seed)
    if read_manifest() is None and any((folder.root / name).is_dir() for name in ("base_data", "hub", "eval_bundle")):
        raise UserError(f"{folder.root} holds other data, and data sets never mix: choose another --base-dir")
    manifest = claim_base_dir("tinyworld", True)
    sizes = {name: factor * len(world.facts) if getattr(args, name) == -1 else getattr(args, name)
             for name, factor in PER_FACT.items()}
    words, hidden_words = exercises.split_words(args.seed)
    texts = documents(world, sizes["documents"])
    spoken = set(" ".join(texts).lower().replace(".", " ").split())
    hidden_words = [word for word in hidden_words if word not in spoken] # a common word is one token, never spelled out
    shard = write_documents(folder, world, texts)
    write_bundle(folder, heldout.core_tasks(world, ROWS["core"], hidden_words))
    write_hub(folder, world, sizes["conversations"], args.questions, words, hidden_words)
    folder.lines("words_alpha.txt", words)
    for name in set(manifest["files"]) - set(folder.files): # what an earlier world of other sizes left
        (folder.root / name).unlink(missing_ok=True)
    files = dict(sorted(folder.files.items()))
    write_json(folder.root / "manifest.json", {**manifest, "validation_shard": shard, "files": files})
    print(f"tinyworld in {folder.root}: {len(world.facts):,} facts ({len(world.prose_only)} never asked about), "
          f"{len(texts):,} documents, {sum(map(len, texts)):,} characters")


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    problems = check_args(args)
    if problems:
        parser.error("; ".join(problems))
    if args.base_dir:
        os.environ["NANOCHAT_BASE_DIR"] = args.base_dir
    generate(args)


if __name__ == "__main__":
    run_main(main)
