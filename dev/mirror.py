"""
Local copies of the published benchmarks -> this base directory, so that no stage needs the hub.

    python -m dev.mirror --from DIR [--base-dir DIR]

Takes what DIR has of the files in SPLITS and COPIES (a row with the fields of the hub a line) and of eval_bundle/.
Writes hub/<owner>/<dataset>/<subset>/<split>/*.parquet in the schema of the hub, the rest as it is; but nothing before
all has been read and found good, and nothing in the place of other content. Like what `nanochat.dataset --prepare`
fetches, it may lie beside any real text for pretraining and is in no manifest; beside a synthetic one it is refused.
"""
import argparse
import json
import os
from pathlib import Path

from nanochat.common import UserError, dataset_label, get_base_dir, run_main
from nanochat.core_eval import _read_bundle
from tasks.common import check_messages, extract_answer, split_tool_calls
from tasks.customjson import CustomJSON

from .tinyworld.generate import Folder

GSM8K = {"question": str, "answer": str}
ARC = {"id": str, "question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str}
MMLU = {"question": str, "subject": str, "choices": [str], "answer": int}
HUMANEVAL = {"task_id": str, "prompt": str, "canonical_solution": str, "test": str, "entry_point": str}
CHAT = {"messages": [{"content": str, "role": str}], "source": str}
SPLITS = ( # files; data set and subset of the hub; splits; schema
    ("gsm8k/{}.jsonl", "openai/gsm8k", "main", ("train", "test"), GSM8K),
    ("arc/ARC-Easy/{}.jsonl", "allenai/ai2_arc", "ARC-Easy", ("train", "validation", "test"), ARC),
    ("arc/ARC-Challenge/{}.jsonl", "allenai/ai2_arc", "ARC-Challenge", ("train", "validation", "test"), ARC),
    ("mmlu/{}.jsonl", "cais/mmlu", "all", ("dev", "validation", "test"), MMLU),
    ("mmlu/auxiliary_{}.jsonl", "cais/mmlu", "auxiliary_train", ("train",), MMLU),
    ("humaneval/HumanEval.jsonl", "openai/openai_humaneval", "default", ("test",), HUMANEVAL),
    ("chat/{}.jsonl", "HuggingFaceTB/smol-smoltalk", "default", ("train", "test"), CHAT))
RULES = ( # schema, what its task asks of a row beyond, is it so?
    (GSM8K, "answer must end in '#### <number>'",
     lambda row: extract_answer(split_tool_calls(row["answer"])[-1]["text"]) is not None),
    (ARC, "every choice must have a label, and answerKey must be one",
     lambda row: row["answerKey"] in row["choices"]["label"] and len(set(map(len, row["choices"].values()))) == 1),
    (MMLU, "there must be 4 choices and an answer from 0 to 3",
     lambda row: len(row["choices"]) == 4 and row["answer"] in range(4)))
COPIES = ("chat/identity_conversations.jsonl", "words/words_alpha.txt")


class Gathered(Folder):
    """What will be written, in memory: {relative path: bytes}."""
    def write(self, name, content):
        """Raises UserError when other content is in its place, or another parquet file beside it."""
        path = self.root / name
        for there in path.parent.glob("*.parquet") if name.startswith("hub/") else [path]:
            if there.exists() and (there != path or there.read_bytes() != content):
                raise UserError(f"{there} is not what {name} would be: move it away, or choose another --base-dir")
        self.files[name] = content


def fit(value, schema, name="the row"):
    """The value with the fields of the schema alone, in its order; ValueError where a type differs."""
    kind = type(schema) if isinstance(schema, dict | list) else schema
    if type(value) is not kind:
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r:.60}")
    if kind is dict:
        return {key: fit(value.get(key), part, key) for key, part in schema.items()}
    if kind is str:
        value.encode() # half a surrogate pair, which JSON may hold, is an error here
    return [fit(item, schema[0], f"every item of {name}") for item in value] if kind is list else value


def parse_row(line, schema):
    """A row from a line of JSON; ValueError for what the task that will read it would refuse."""
    row = fit(json.loads(line), schema)
    for ruled, rule, is_kept in RULES:
        if schema is ruled and not is_kept(row):
            raise ValueError(f"{rule}, got {row!r:.200}")
    return row


def read_lines(path, parse):
    """parse(line) of every line (bytes) that is not blank. ValueError names file and line, or a file without any."""
    values = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                values += [parse(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}; repair it, or leave the file out") from error
    if not values:
        raise ValueError(f"{path} holds no rows: leave it out")
    return values


def is_conversation(row):
    """Would SmolTalk take it?"""
    try:
        check_messages(row["messages"], "")
    except ValueError:
        return False
    return True


def gather_split(path, dataset, subset, split, schema, gathered):
    """Read one split, and say how many rows it has."""
    found = read_lines(path, lambda line: parse_row(line, schema))
    rows, note = found, ""
    if schema is CHAT:
        rows = list(filter(is_conversation, found))
        note = f", NOT SmolTalk but a stand-in of other sources ({len(found) - len(rows):,} malformed left out)"
    print(f"{dataset} {subset} {split}: {len(rows):,} rows{note}")
    gathered.hub(dataset, subset, split, [{"train": row} for row in rows] if subset == "auxiliary_train" else rows)


def gather(source, gathered):
    """Read all that the folder `source` has into `gathered`; say what is there and what is absent."""
    wanted = [(pattern.format(split), dataset, subset, split, schema)
              for pattern, dataset, subset, splits, schema in SPLITS for split in splits]
    for name in [*(name for name, *_ in wanted), *COPIES, "eval_bundle"]:
        if not (source / name).exists():
            print(f"absent: {name}")
    for name, *target in wanted:
        if (source / name).exists():
            gather_split(source / name, *target, gathered)
    for path in [source / name for name in COPIES if (source / name).exists()]:
        rows = CustomJSON(path) if path.suffix == ".jsonl" else read_lines(path, bytes.decode)
        print(f"{path.name}: {len(rows):,} lines")
        gathered.write(path.name, path.read_bytes())
    if (source / "eval_bundle").exists():
        items = {path: read_lines(path, json.loads) for path in sorted(source.glob("eval_bundle/eval_data/**/*.jsonl"))}
        num_tasks = sum(1 for _ in _read_bundle(source / "eval_bundle")) # UserError when it is not whole
        print(f"eval_bundle: {num_tasks} tasks in {len(items)} files")
        for path in [*items, *(source / "eval_bundle" / name for name in ("core.yaml", "eval_meta_data.csv"))]:
            gathered.write(path.relative_to(source).as_posix(), path.read_bytes())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="folder with the benchmarks' files")
    parser.add_argument("--base-dir", default="", help="folder to fill (empty = NANOCHAT_BASE_DIR or its default)")
    args = parser.parse_args(argv)
    if args.base_dir:
        os.environ["NANOCHAT_BASE_DIR"] = args.base_dir
    folder, gathered = Folder(get_base_dir()), Gathered(get_base_dir())
    if dataset_label():
        raise UserError(f"{folder.root} holds the synthetic data set {dataset_label()}, and data sets never mix: "
                        "choose another --base-dir")
    gather(Path(args.source), gathered)
    if not gathered.files:
        raise UserError(f"{args.source} has none of these files: give --from a folder that does")
    for name, content in gathered.files.items():
        folder.write(name, content)
    print(f"{len(gathered.files)} files in {folder.root}; what is absent is fetched from the hub when a stage needs it")


if __name__ == "__main__":
    run_main(main)
