"""
Pretraining text on disk: parquet shards with one string column `text`, under <base>/base_data.

    python -m nanochat.dataset -n 8                  8 training shards of FineWeb-Edu, and its validation shard
    python -m nanochat.dataset --dataset climbmix -n 8          the same of ClimbMix
    python -m nanochat.dataset --prepare -n 8        also what the later stages fetch, so that they need no network
    python -m nanochat.dataset --from DIR_OR_FILES   own parquet, jsonl, csv or txt files, in any language

The validation shard is pinned: the one that <base>/manifest.json names, else shard_01822 (the last one of
FineWeb-Edu) when present, else the last file. Every other file is training data, so the validation score does not
depend on how many shards are there. Knows nothing about tokens.
"""
import argparse
import collections
import contextlib
import csv
import functools
import io
import json
import math
import os
import pathlib
import random
import re
import shutil
import tempfile
import threading
import time
import warnings

from nanochat.common import (WORD_LIST_URL, UserError, atomic_write, claim_base_dir, download_file_with_lock,
                             file_sha256, get_base_dir, load_hub_dataset, read_manifest, run_main)

# The data sets that can be downloaded: repository on the hub, last index; the last shard is kept for validation
DATASETS = {"fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", 1822),
            "climbmix": ("karpathy/climbmix-400b-shuffle", 6542)}
NAME = "fineweb-edu" # the default
MAX_SHARD = DATASETS[NAME][1]
CROPPED = 0.35 # share of the tokens of web text that packing cuts off documents
HUB_PATH = f"/datasets/{DATASETS[NAME][0]}/resolve/main/"
BASE_URL = "https://huggingface.co" + HUB_PATH

# What the chat stages read from the hub: name, subset, splits
HUB_DATASETS = (
    ("HuggingFaceTB/smol-smoltalk", None, ("train", "test")),
    ("cais/mmlu", "all", ("validation", "test")),
    ("cais/mmlu", "auxiliary_train", ("train",)),
    ("allenai/ai2_arc", "ARC-Easy", ("train", "validation", "test")),
    ("allenai/ai2_arc", "ARC-Challenge", ("train", "validation", "test")),
    ("openai/gsm8k", "main", ("train", "test")),
    ("openai/openai_humaneval", None, ("test",)),
)

# What they read as plain files; one's own in its place is left alone
CHAT_FILES = {
    "words_alpha.txt": WORD_LIST_URL,
    "identity_conversations.jsonl": "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl",
}

# -----------------------------------------------------------------------------
# Reading shards

def index_to_filename(index):
    return f"shard_{index:05d}.parquet"


def list_parquet_files(data_dir=None):
    """Full paths of the .parquet files in `data_dir` (default <base>/base_data), sorted by name."""
    data_dir = data_dir or os.path.join(get_base_dir(), "base_data")
    names = sorted(os.listdir(data_dir)) if os.path.isdir(data_dir) else []
    return [os.path.join(data_dir, name) for name in names if name.endswith(".parquet")]


def split_files(split):
    """
    Paths of the shards of a split: "val" is the pinned validation shard, "train" every other file.

    Raises FileNotFoundError when there are not two shards, or when the pinned one is missing.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, got {split!r}")
    paths = {os.path.basename(path): path for path in list_parquet_files()}
    folder, manifest = os.path.join(get_base_dir(), "base_data"), read_manifest() or {"name": NAME}
    if len(paths) < 2:
        raise FileNotFoundError(f"need at least two shards (one for validation) in {folder}, found {len(paths)}: "
                                "run `python -m nanochat.dataset -n 8`, or with --from and your own files")
    listed = {} if manifest["name"] in DATASETS else manifest["files"] # a download lists its shards only when it ends
    strays = [name for name in paths if f"base_data/{name}" not in listed]
    if strays and any(name.startswith("base_data/") for name in listed):
        raise ValueError(f"{strays[0]} in {folder} is no shard of the data set {manifest['name']}, and data sets never "
                         "mix: move it away")
    named = manifest.get("validation_shard")
    if named and named not in paths:
        raise FileNotFoundError(f"the validation shard {named} of {folder} is missing: download or build it again")
    pinned = named or index_to_filename(MAX_SHARD)
    if pinned not in paths:
        pinned = max(paths)
        warnings.warn(f"no manifest says which shard is for validation: taking the last one, {pinned}", stacklevel=2)
    return [paths.pop(pinned)] if split == "val" else [path for name, path in paths.items() if name != pinned]


@contextlib.contextmanager
def open_shard(path):
    """A pyarrow ParquetFile with a column `text` of strings; anything else raises ValueError with the cure."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        with pq.ParquetFile(path) as file:
            types = {field.name: str(field.type) for field in file.schema_arrow}
            if not re.match(r"(dictionary<values=)?(large_)?(string|binary)|null$", types.get("text", "")):
                raise ValueError(f"{path} has no column 'text' of strings but "
                                 f"{', '.join(f'{name} ({kind})' for name, kind in types.items())}: turn it into "
                                 "shards with `python -m nanochat.dataset --from FILE --text-column NAME`")
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a complete parquet file ({str(error).splitlines()[0]}): "
                         "delete it, then download or build it again") from error


@functools.lru_cache(maxsize=8192)
def num_row_groups(path):
    """Number of row groups of a shard; read once in the life of the process."""
    with open_shard(path) as file:
        return file.num_row_groups


def read_row_group(path, rg_idx):
    """The documents (list of str) of one row group of a shard."""
    with open_shard(path) as file:
        return _to_strings(file.read_row_group(rg_idx, columns=["text"]).column(0))


def _to_strings(column):
    """A text column as list of str: invalid UTF-8 becomes U+FFFD, null an empty string."""
    import pyarrow as pa
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else value or "" for value in values]


def parquets_iter_batched(split, start=0, step=1):
    """One pass over a split: the documents (list of str) of row groups start, start + step, ... of every file."""
    for path in split_files(split):
        for rg_idx in range(start, num_row_groups(path), step):
            yield read_row_group(path, rg_idx)

# -----------------------------------------------------------------------------
# Downloading shards

def shard_url(index, name=NAME):
    """Where shard `index` of a data set lies on the hub, or on the mirror that HF_ENDPOINT names."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    return f"{endpoint}/datasets/{DATASETS[name][0]}/resolve/main/{index_to_filename(index)}"


def download_single_file(index, on_bytes=lambda count: None, attempts=5, timeout=30, sleep=time.sleep, dataset=NAME):
    """
    Have shard `index` complete on disk; True on success. Safe to call from several processes at once.

    The bytes gather in base_data/.download; a file gets its final name only after size, hash and parquet footer
    have been checked. A failed try waits 2, 4, 8, ... seconds and continues where it stopped, also the next time.
    on_bytes   called with the number of bytes of each piece that arrives
    timeout    seconds without a byte after which a try fails
    """
    import filelock
    name = index_to_filename(index)
    path = os.path.join(get_base_dir(), "base_data", name)
    partial = os.path.join(get_base_dir(), "base_data", ".download", name)
    os.makedirs(os.path.dirname(partial), exist_ok=True)
    with filelock.FileLock(partial + ".lock"):
        for attempt in range(1, attempts + 1):
            if _is_shard(path):
                return True
            try:
                _fetch(shard_url(index, dataset), partial, on_bytes, timeout)
                os.replace(partial, path)
            except (OSError, ValueError) as error: # the errors of requests are OSErrors
                status = getattr(getattr(error, "response", None), "status_code", 500)
                if attempt == attempts or (400 <= status < 500 and status not in (408, 416, 429)):
                    print(f"{name} failed: {error}")
                    return False
                sleep(2 ** attempt)
        return True


def _is_shard(path):
    try:
        with open_shard(path):
            return True
    except ValueError:
        return False


def _fetch(url, partial, on_bytes, timeout):
    """
    Bring the content of `url` to the file `partial`, continuing what an earlier try left there.

    It is continued only when the server answers with the same strong ETag that the first bytes came with
    (If-Range, RFC 9110 section 13.1.5), so the file never mixes two contents. Raises OSError or ValueError.
    """
    import requests
    note = partial + ".etag" # the ETag of the content that `partial` is the beginning of
    have, etag, headers = 0, "", {"Accept-Encoding": "identity"} # sizes and ranges shall count the bytes of the file
    if os.path.exists(note) and os.path.exists(partial):
        with open(note, encoding="utf-8") as file:
            have, etag = os.path.getsize(partial), file.read()
        headers.update({"Range": f"bytes={have}-", "If-Range": etag})
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        new_etag, content_range = response.headers.get("ETag", ""), response.headers.get("Content-Range", "")
        continued = response.status_code == 206 and new_etag == etag and content_range.startswith(f"bytes {have}-")
        if response.status_code in (200, 206, 416) and not continued:
            pathlib.Path(note).unlink(missing_ok=True) # the bytes that are here count no longer
            if response.status_code != 200:
                raise OSError("the content has changed on the server")
        response.raise_for_status()
        with open(partial, "ab" if continued else "wb") as file:
            if not continued and new_etag.startswith('"'): # a weak ETag promises nothing about bytes
                with atomic_write(note) as note_file:
                    note_file.write(new_etag)
            for chunk in response.iter_content(1 << 16): # a connection that ends costs the last piece
                file.write(chunk)
                on_bytes(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    try:
        _verify(partial, response)
    finally: # complete or wrong: in neither case are there bytes to continue
        pathlib.Path(note).unlink(missing_ok=True)


def _verify(path, response):
    """Check a download: the SHA-256 where the server told it (the hub does before it redirects), and the footer."""
    hops = (*response.history, response)
    announced = [hop.headers.get(key, "").strip('"') for key in ("X-Linked-Etag", "ETag") for hop in hops]
    sha256 = next((tag for tag in announced if re.fullmatch("[0-9a-f]{64}", tag)), None)
    if sha256 and file_sha256(path) != sha256:
        raise ValueError(f"{path} does not have the SHA-256 {sha256} that the server announced")
    with open_shard(path):
        pass


def download_shards(indices, num_workers, dataset=NAME):
    """Download shards in parallel and record them in the manifest. Returns the names of those that are missing."""
    from concurrent.futures import ThreadPoolExecutor
    from tqdm import tqdm
    if read_manifest() is None and list_parquet_files():
        raise UserError(f"{get_base_dir()} holds shards of unknown data, and data sets never mix: move its base_data "
                        "away, or set NANOCHAT_BASE_DIR to another folder")
    claim = functools.partial(claim_base_dir, dataset, False, index_to_filename(DATASETS[dataset][1]))
    files, missing, stop = claim()["files"], [], threading.Event()

    def on_bytes(count):
        if stop.is_set():
            raise KeyboardInterrupt # ends a worker thread at its next piece
        progress.update(count)

    with (contextlib.ExitStack() as stack, tqdm(unit="B", unit_scale=True, disable=None) as progress,
          ThreadPoolExecutor(num_workers) as pool):
        stack.callback(_drop_claim_on_nothing) # also after Ctrl-C; by then the workers have ended
        try:
            results = pool.map(functools.partial(download_single_file, on_bytes=on_bytes, dataset=dataset), indices)
            for done, (index, complete) in enumerate(zip(indices, results), 1):
                name = index_to_filename(index)
                tqdm.write(f"{done}/{len(indices)} {name} {'complete' if complete else 'MISSING'}")
                if not complete:
                    missing.append(name)
                elif f"base_data/{name}" not in files:
                    files[f"base_data/{name}"] = _size_and_hash(os.path.join(get_base_dir(), "base_data", name))
        except KeyboardInterrupt:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    if files:
        claim(files=files)
    return missing


def _drop_claim_on_nothing():
    """Without any shard, or the beginning of one, the claim would only keep other data out."""
    folder = pathlib.Path(get_base_dir(), "base_data")
    if not any(folder.rglob("*.parquet")):
        shutil.rmtree(folder / ".download", ignore_errors=True) # holds locks
        with contextlib.suppress(OSError): # absent, or it holds files of the user
            folder.rmdir()
        (folder.parent / "manifest.json").unlink(missing_ok=True)


def _size_and_hash(path):
    return {"size": os.path.getsize(path), "sha256": file_sha256(path)}


def prepare():
    """Fetch now what later stages would fetch; returns the names of what could not be had."""
    from nanochat.core_eval import get_eval_bundle
    jobs = [("eval_bundle", get_eval_bundle, ())]
    jobs += [(name, download_file_with_lock, (url, name)) for name, url in CHAT_FILES.items()]
    jobs += [(f"{name} {subset or 'default'} {split}", load_hub_dataset, (name, subset, split))
             for name, subset, splits in HUB_DATASETS for split in splits]
    missing = []
    for label, fetch, args in jobs:
        try:
            fetch(*args)
        except UserError as error:
            print(f"{label} failed: {error}")
            missing.append(label)
    return missing

# -----------------------------------------------------------------------------
# Making shards from own files

TEXT_COLUMNS = ("text", "content", "document", "body", "article") # tried in this order without --text-column
MAX_PIECE = 1_000_000 # characters; a longer document of a txt file is cut, so that memory stays flat


def _choose_column(columns, wanted, path):
    for name in [wanted] if wanted else TEXT_COLUMNS:
        if name in columns:
            return name
    raise UserError(f"{path} has no column {wanted or 'text'!r} but {', '.join(map(str, columns)) or 'an empty row'}: "
                    "say with --text-column which one holds the documents")


def _open_text(path):
    """Text of a file, unpacked by its ending (.gz, .zst); invalid UTF-8 becomes U+FFFD, a BOM is dropped."""
    import pyarrow as pa
    return io.TextIOWrapper(pa.input_stream(path), encoding="utf-8-sig", errors="replace")


def _parquet_texts(path, wanted, separator):
    import pyarrow.parquet as pq
    with pq.ParquetFile(path) as file:
        column = _choose_column(file.schema_arrow.names, wanted, path)
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            yield from _to_strings(batch.column(0))


def _record_texts(path, wanted, separator):
    csv.field_size_limit(1 << 30)
    with _open_text(path) as file:
        for record in csv.DictReader(file) if _kind(path) == ".csv" else map(json.loads, filter(str.strip, file)):
            yield record[_choose_column(record, wanted, path)]


def _txt_texts(path, wanted, separator):
    piece, size = [], 0
    with _open_text(path) as file:
        for line in iter(lambda: file.readline(MAX_PIECE), ""):
            ends = separator == "blank-line" and not line.strip()
            if piece and (ends or size + len(line) > MAX_PIECE):
                yield "".join(piece)
                piece, size = [], 0
            piece += [] if ends else [line]
            size += len(line)
    yield from ["".join(piece)] if piece else []


READERS = {".parquet": _parquet_texts, ".jsonl": _record_texts, ".csv": _record_texts, ".txt": _txt_texts}


def _kind(path):
    return os.path.splitext(re.sub(r"\.(gz|zst)$", "", path.lower()))[1]


def _input_files(sources):
    """The files named, and those of known kinds in the folders named, in a fixed order."""
    paths = []
    for source in sources:
        inside = [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names]
        known = sorted(path for path in inside or [source] if _kind(path) in READERS and os.path.isfile(path))
        if not known:
            raise ValueError(f"{source} must be a file ending in {', '.join(READERS)} (and then .gz or .zst, or not), "
                             "or a folder with such files")
        paths += known
    return paths


def _documents(paths, text_column, separator, counts):
    """Non-empty documents (str) of all files. Counts the empty ones left out, and those with invalid UTF-8."""
    import pyarrow as pa
    for path in paths:
        number = 0
        try:
            for number, text in enumerate(READERS[_kind(path)](path, text_column, separator), 1):
                if not isinstance(text, str | None):
                    raise TypeError(f"it holds a {type(text).__name__}, not text")
                text = (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace") # JSON may hold halves
                if text.strip():
                    counts.update(documents=1, characters=len(text), replaced="\ufffd" in text)
                    yield text
                else:
                    counts["empty"] += 1
        except (pa.ArrowException, OSError, csv.Error, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read near its document {number} ({error}): "
                             "repair it or leave it out") from error


def _deal(documents, folder, num_buckets, rng):
    """
    Append each document as a line of JSON to a random one of `num_buckets` files; returns the paths of those used.

    The last bucket is for validation: it gets the first document and then at most one in 20.
    """
    paths = [os.path.join(folder, str(i)) for i in range(num_buckets)]
    lines, sizes = [[] for _ in paths], [0] * num_buckets

    def flush(bucket):
        with open(paths[bucket], "a", encoding="utf-8") as file: # not kept open: there may be thousands
            file.writelines(lines[bucket])
        lines[bucket], sizes[bucket] = [], 0

    for i, text in enumerate(documents):
        for_validation = i == 0 or rng.random() * max(20, num_buckets) < 1
        bucket = num_buckets - 1 if for_validation else rng.randrange(num_buckets - 1)
        lines[bucket].append(json.dumps(text) + "\n")
        sizes[bucket] += len(text)
        if sizes[bucket] > 1 << 16:
            flush(bucket)
    for bucket in range(num_buckets):
        flush(bucket)
    return [path for path in paths if os.path.getsize(path)]


def write_shard(path, documents):
    """Write a list of str as a shard, in 64 row groups or more where it can, so that many lanes find work."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    with atomic_write(path, "wb") as file:
        pq.write_table(pa.table({"text": pa.array(documents, pa.string())}), file, compression="zstd",
                       compression_level=3, use_dictionary=False, write_statistics=False,
                       row_group_size=max(1, min(1024, len(documents) // 64)))


def build_shards(sources, name, text_column="", separator="blank-line", seed=1234, shard_chars=50_000_000):
    """
    Turn own files into shards of the data set `name` in a base directory that holds no shards yet.

    Documents are dealt into random buckets on disk, then each bucket is shuffled and becomes a shard: a random order
    over the whole input, and never more than one shard in memory. The last shard is the pinned validation shard.
    Returns counts: documents, characters, empty, replaced, shards.
    """
    from tqdm import tqdm
    if read_manifest():
        claim_base_dir(name, synthetic=False) # refuses the directory of another data set
    target = os.path.join(get_base_dir(), "base_data")
    if os.path.isdir(target) and os.listdir(target):
        raise UserError(f"{target} must be empty: delete it, or set NANOCHAT_BASE_DIR to another folder")
    paths = _input_files(sources)
    num_chars = sum(os.path.getsize(path) * (4 if path.endswith((".parquet", ".gz", ".zst")) else 1) for path in paths)
    counts, rng, files = collections.Counter(), random.Random(seed), {}
    kinds = collections.Counter(map(_kind, paths))
    print("reading " + ", ".join(f"{count} {kind} files" for kind, count in kinds.items()))
    with tempfile.TemporaryDirectory(dir=get_base_dir(), prefix="base_data.") as folder:
        bucket_dir, shard_dir = os.path.join(folder, "buckets"), os.path.join(folder, "shards")
        os.mkdir(bucket_dir)
        documents = tqdm(_documents(paths, text_column, separator, counts), unit=" documents", disable=None)
        buckets = _deal(documents, bucket_dir, 1 + math.ceil(num_chars / shard_chars), rng)
        if len(buckets) < 2:
            raise ValueError(f"found {counts['documents']} documents in {', '.join(sources)}, but one for training and "
                             "one for validation are needed: give more text, or split it by --documents blank-line")
        for i, bucket in enumerate(buckets):
            with open(bucket, encoding="utf-8") as file:
                documents = [json.loads(line) for line in file]
            rng.shuffle(documents)
            path = os.path.join(shard_dir, index_to_filename(i))
            write_shard(path, documents)
            files[f"base_data/{index_to_filename(i)}"] = _size_and_hash(path)
            print(f"{i + 1}/{len(buckets)} {index_to_filename(i)}: {len(documents):,} documents")
        os.replace(shard_dir, target)
    claim_base_dir(name, synthetic=False, validation_shard=index_to_filename(len(buckets) - 1), files=files)
    return counts + collections.Counter(shards=len(buckets))

# -----------------------------------------------------------------------------
# Command line

def build_parser():
    parser = argparse.ArgumentParser(description="Put pretraining data on disk, under NANOCHAT_BASE_DIR")
    parser.add_argument("--dataset", default=NAME, choices=list(DATASETS), help="which data set to download")
    parser.add_argument("-n", "--num-files", type=int, default=-1, help="training shards of it to have, about 100 MB "
                        "each, beside the validation shard; -1 = all")
    parser.add_argument("-w", "--num-workers", type=int, default=4, help="parallel downloads")
    parser.add_argument("--prepare", action="store_true", help="also fetch evaluation and chat data")
    parser.add_argument("--from", nargs="+", default=[], dest="sources", metavar="PATH",
                        help="build shards from these files or folders (parquet, jsonl, csv, txt; .gz, .zst) instead")
    parser.add_argument("--name", default="own-data", help="with --from: name of the data set")
    parser.add_argument("--text-column", default="", help="with --from: column or key that holds the text; empty = the "
                        f"first there is of {', '.join(TEXT_COLUMNS)}")
    parser.add_argument("--documents", choices=["blank-line", "file"], default="blank-line",
                        help="with --from: a document of a txt file ends at a blank line, or with the file")
    parser.add_argument("--seed", type=int, default=1234, help="with --from: seed of the shuffle")
    return parser


def check_args(args):
    problems = []
    if args.num_files != -1 and args.num_files < 1:
        problems.append(f"--num-files must be at least 1, or -1 for all, got {args.num_files}")
    if args.num_workers < 1:
        problems.append(f"--num-workers must be at least 1, got {args.num_workers}")
    if args.sources and (args.prepare or args.num_files != -1 or args.dataset != NAME):
        problems.append("--from is for your own files, --dataset, --prepare and --num-files for hub data: leave one "
                        "side out")
    if args.name.strip() in ("", "tinyworld", *DATASETS):
        problems.append(f"--name {args.name!r} is empty or taken: choose another name for your own data")
    return problems


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    if args.sources:
        counts = build_shards(args.sources, args.name, args.text_column, args.documents, args.seed)
        print(f"{counts['documents']:,} documents, {counts['characters']:,} characters in {counts['shards']} shards; "
              f"left out {counts['empty']:,} empty documents; {counts['replaced']:,} with invalid UTF-8, now U+FFFD")
        missing = []
    else:
        last = DATASETS[args.dataset][1]
        wanted = range(last if args.num_files == -1 else min(args.num_files, last))
        missing = download_shards([last, *wanted], args.num_workers, args.dataset)
        missing += prepare() if args.prepare else []
    if missing:
        raise UserError(f"missing: {', '.join(missing)}; run the same command again, it continues where it stopped")
    print(f"validation shard: {read_manifest()['validation_shard']} in {get_base_dir()}")


if __name__ == "__main__":
    run_main(main)
