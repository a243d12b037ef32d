"""
The ground under everything: where this process runs, where files live, and how they are written.

    device, dtype and ranks       Compute, compute_init, get_compute_dtype
    the base directory            get_base_dir, manifests, hub mirrors, downloads
    durable files                 atomic_write, write_json, file_sha256
    user errors                   UserError, run_main

Imports nothing else of nanochat. Importing it makes no folder, touches no network and configures no logging.
"""
import contextlib
import datetime
import errno
import hashlib
import json
import logging
import math
import os
import re
import sys
import threading
from typing import NamedTuple

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

# -----------------------------------------------------------------------------
# Errors a person can act on

class UserError(RuntimeError):
    """A mistake of the user or a limit of the machine, told in one sentence with its cure."""


CURES = { # of errors of the system
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "use a folder that you may write to"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY), "move away what is in its place")}


def _sentence_of(error):
    """What the user is told: of an error of the system the path and the cure, else the error's own words."""
    if getattr(error, "errno", None) not in CURES:
        return str(error) or type(error).__name__
    path = error.filename2 or error.filename or "the disk" # of a rename the new name: the old one is temporary
    return f"{path}: {error.strerror}; {CURES[error.errno]}"


LOST_RANK = ("a process of this run has died or no longer answers, so the others stop; its own message, if it left "
             "one, stands above: start again with --resume, which goes on from the last checkpoint")


def _is_of_lost_rank(error):
    """Has a collective failed for want of a rank? gloo has no exception of its own."""
    return isinstance(error, dist.DistError) or is_ddp_initialized() and "gloo" in str(error)


def _is_news(sentence):
    """Is this the first rank to say it? torchrun keeps a store for the ranks, which outlives them."""
    if not is_ddp_initialized():
        return True
    try:
        return dist.distributed_c10d._get_default_store().add(f"told: {sentence}", 1) == 1
    except RuntimeError: # the node that keeps the store has gone
        return True


_writes = False # does the program that runs write below the base directory? `run_main` is told


def run_main(main, writes=True):
    """
    Run a script's `main()`; print what the user can act on as one line and exit with 1.

    writes  False for a program that only reads, which may then use a base directory of somebody else
    Usage errors exit with 2 (argparse), Ctrl-C with 130. Set NANOCHAT_DEBUG=1 to see the traceback.
    Of several ranks with the same to say one says it; a rank that has lost another says what to do about it.
    """
    global _writes
    _writes = writes
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        is_ours = not isinstance(error, RuntimeError) or isinstance(error, UserError)
        if os.environ.get("NANOCHAT_DEBUG") or not (is_ours or _is_of_lost_rank(error)):
            raise
        sentence = _sentence_of(error) if is_ours else LOST_RANK
        if _is_news(sentence):
            detail = "" if is_ours else f" ({re.sub(r'^.[^]]*. ', '', str(error).splitlines()[0])[:120]})"
            print(f"error: {sentence}{detail}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)

# -----------------------------------------------------------------------------
# Files: complete or absent

def get_base_dir():
    """Root of all artefacts: NANOCHAT_BASE_DIR, else ~/.cache/nanochat. Made when absent; read anew on every call."""
    base_dir = os.environ.get("NANOCHAT_BASE_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "nanochat")
    try:
        os.makedirs(base_dir, exist_ok=True)
        if _writes and not os.access(base_dir, os.W_OK): # told before the work, not after it
            raise PermissionError(errno.EACCES, "it is not writable")
    except OSError as error:
        raise UserError(f"cannot use the base directory {base_dir} ({error.strerror}): "
                        "set NANOCHAT_BASE_DIR to a folder you can write to") from error
    return base_dir


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """
    Open a temporary file beside `path`; on a clean exit flush it to disk and rename it over `path`.

    On any error the temporary file is removed and `path` stays as it was. Text is UTF-8.
    """
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.{threading.get_ident()}.tmp") # one name per writer
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary):
            error.filename = os.fspath(path) # the name that the user knows
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def finite(value):
    """The same JSON-like value with every NaN or infinity replaced by None, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def write_json(path, value):
    """Write `value` as indented UTF-8 JSON, atomically. Non-finite floats become null."""
    with atomic_write(path) as file:
        json.dump(finite(value), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path, **types):
    """Read a JSON object from a file; ValueError with the path for a broken one, or without keys of these `types`."""
    with open(path, encoding="utf-8") as file:
        try:
            value = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON ({error}): delete it or restore it") from error
    if not isinstance(value, dict) or not all(isinstance(value.get(key, ...), types[key]) for key in types):
        raise ValueError(f"{path} must be a JSON object with proper {', '.join(types)}: delete it or restore it")
    return value


def file_sha256(path):
    """Hex SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

# -----------------------------------------------------------------------------
# Which data set lives in the base directory

def read_manifest():
    """The manifest of this base directory's data set (see `claim_base_dir`), or None when there is none."""
    path = os.path.join(get_base_dir(), "manifest.json")
    types = {"name": str, "synthetic": bool, "validation_shard": str | None, "files": dict}
    return read_json(path, **types) if os.path.exists(path) else None


def claim_base_dir(name, synthetic, validation_shard=None, files=None):
    """
    Write or update <base>/manifest.json: this base directory holds the data set `name` and no other.

    name              data set, e.g. "fineweb-edu" or "tinyworld"
    synthetic         True for generated stand-ins, whose scores are marked as such everywhere
    validation_shard  file name of the pinned validation shard; None keeps what the manifest says
    files             {relative path: {"size": bytes, "sha256": hex}} to add
    Returns the manifest. Raises UserError when the folder belongs to another data set.
    """
    import filelock
    path = os.path.join(get_base_dir(), "manifest.json")
    with filelock.FileLock(path + ".lock"): # of two first claims at once, one must see the other
        manifest = read_manifest() or {"name": name, "synthetic": synthetic, "validation_shard": None, "files": {}}
        if (manifest["name"], manifest["synthetic"]) != (name, synthetic):
            raise UserError(f"{get_base_dir()} holds the data set {manifest['name']}, not {name} "
                            f"({'synthetic' if synthetic else 'real'}): data sets never mix, so set NANOCHAT_BASE_DIR "
                            "to another folder")
        manifest["validation_shard"] = validation_shard or manifest["validation_shard"]
        manifest["files"].update(files or {})
        write_json(path, manifest)
        with contextlib.suppress(OSError): # from now on the manifest itself tells whoever comes or waits
            os.unlink(path + ".lock")
    return manifest


def dataset_label():
    """Name of the data set when it is synthetic, to mark every score on stand-ins; else an empty string."""
    manifest = read_manifest()
    return manifest["name"] if manifest and manifest["synthetic"] else ""


def _refuse_to_mix(what):
    """Real benchmark files must not land beside generated stand-ins."""
    if dataset_label():
        raise UserError(f"{get_base_dir()} holds the synthetic data set {dataset_label()}, so {what} is not fetched "
                        "into it: set NANOCHAT_BASE_DIR to another folder")

# -----------------------------------------------------------------------------
# Things fetched from elsewhere

# A commit of the repository, not its moving branch: the same words for everybody.
WORD_LIST_URL = ("https://raw.githubusercontent.com/dwyl/english-words/20f5cc9b3f0ccc8ce45d814c532b7c2031bba31c/"
                 "words_alpha.txt")


def download_file_with_lock(url, filename, postprocess_fn=None):
    """
    Fetch `url` to <base>/<filename> once, whatever the number of ranks; returns the path.

    The bytes go to a temporary file, are checked against Content-Length and given to `postprocess_fn(path)`;
    only when that has succeeded does the file get its final name, so a failure is tried again next time.
    Raises UserError when the file cannot be had.
    """
    import filelock
    path = os.path.join(get_base_dir(), filename)
    if os.path.exists(path):
        return path
    _refuse_to_mix(filename)
    with filelock.FileLock(path + ".lock"):
        if os.path.exists(path): # another rank was faster
            return path
        print(f"Downloading {url}")
        partial = f"{path}.{os.getpid()}.part"
        try:
            _stream_to_file(url, partial)
            if postprocess_fn is not None:
                postprocess_fn(partial)
            os.replace(partial, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
    return path


def _stream_to_file(url, path, timeout=30):
    """Stream a URL's body to `path`; raise UserError unless all announced bytes arrived."""
    import requests
    try:
        with requests.get(url, stream=True, timeout=timeout) as response, open(path, "wb") as file:
            response.raise_for_status()
            for chunk in response.iter_content(1 << 20):
                file.write(chunk)
            encoded = "Content-Encoding" in response.headers # then the length counts compressed bytes
            expected = None if encoded else response.headers.get("Content-Length")
    except requests.RequestException as error:
        raise UserError(f"could not download {url} ({type(error).__name__}): check the network, or put the file in "
                        f"{os.path.dirname(path)} yourself") from error
    if expected is not None and os.path.getsize(path) != int(expected):
        raise UserError(f"{url} sent {os.path.getsize(path)} of {expected} bytes: run the command again")


def hub_mirror_dir(name, subset, split):
    """Folder of the local mirror of one split of a hub data set, e.g. <base>/hub/openai/gsm8k/main/train."""
    return os.path.join(get_base_dir(), "hub", *name.split("/"), subset or "default", split)


def load_hub_dataset(name, subset=None, split="train"):
    """
    Load one split of a hub data set: from the local mirror when it is there, else through `datasets`.

    Returns a datasets.Dataset. `datasets.load_dataset` honours HF_ENDPOINT, HF_HOME and offline mode.
    Raises UserError when the data cannot be had, or when fetching would mix real data into a synthetic base directory.
    """
    import datasets
    folder = hub_mirror_dir(name, subset, split)
    files = sorted(file for file in os.listdir(folder) if file.endswith(".parquet")) if os.path.isdir(folder) else []
    if files:
        import pyarrow as pa
        import pyarrow.parquet as pq
        try:
            return datasets.Dataset(pa.concat_tables([pq.read_table(os.path.join(folder, file)) for file in files]))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{folder} holds a parquet file that cannot be read ({str(error).splitlines()[0]}): "
                             "delete the folder, then fetch or generate the data again") from error
    _refuse_to_mix(f"{name} ({subset or 'default'}, {split})")
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error: # the library raises many kinds when the hub is away; the cure is the same for all
        raise UserError(f"cannot load the data set {name} ({subset or 'default'}, {split}): {type(error).__name__}; "
                        f"check the network, or put its parquet files in {folder}") from error

# -----------------------------------------------------------------------------
# Console

class ColoredFormatter(logging.Formatter):
    """Log lines with a bold coloured level and highlighted quantities; plain text when `colored` is False."""
    COLORS = {"DEBUG": 36, "INFO": 32, "WARNING": 33, "ERROR": 31, "CRITICAL": 35}

    def __init__(self, fmt=None, colored=True):
        super().__init__(fmt or "%(asctime)s - %(name)s - %(levelname)s - %(message)s")
        self.colored = colored

    def format(self, record):
        if not self.colored:
            return super().format(record)
        record = logging.makeLogRecord(record.__dict__) # a copy: other handlers must not see the escape codes
        if record.levelname == "INFO":
            message = re.sub(r"(\d+(?:\.\d+)?\s*(?:GB|MB|%|docs))", "\033[1m\\1\033[0m", record.getMessage())
            record.msg, record.args = re.sub(r"(Shard \d+)", "\033[1m\033[32m\\1\033[0m", message), ()
        color = self.COLORS.get(record.levelname, 0)
        record.levelname = f"\033[1m\033[{color}m{record.levelname}\033[0m"
        return super().format(record)


def setup_default_logging():
    """Send INFO and above to stderr. For entry points only: the library itself just gets loggers."""
    handler = logging.StreamHandler()
    handler.setFormatter(ColoredFormatter(colored=handler.stream.isatty()))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def print0(s="", **kwargs):
    """Print on rank 0 only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(s, **kwargs)


def print_banner():
    """Print the product's name in large letters, on rank 0."""
    print0(r"""
                             _           _
  _ __   __ _ _ __   ___  __| |__   __ _| |_
 | '_ \ / _` | '_ \ / _ \/ _| '_ \ / _` |  _|
 | | | | (_| | | | | (_) |(_| | | | (_| | |_
 |_| |_|\__,_|_| |_|\___/\__|_| |_|\__,_|\__|
""")


class DummyWandb:
    """Stands in for a wandb run when logging is off."""
    def log(self, *args, **kwargs):
        pass

    def finish(self):
        pass


def init_wandb(run, compute, project, config):
    """A wandb run of this name on rank 0; a DummyWandb for the name "dummy" and on other ranks. wandb is optional."""
    if run == "dummy" or not compute.is_master:
        return DummyWandb()
    try:
        import wandb
    except ImportError as error:
        raise UserError("--run needs the package wandb: pip install wandb, or leave --run at dummy") from error
    try:
        return wandb.init(project=project, name=run, config=config)
    except wandb.Error as error:
        raise UserError(f"wandb cannot log this run ({str(error).splitlines()[0]}): run `wandb login`, set "
                        "WANDB_MODE=offline, or leave --run at dummy") from error

# -----------------------------------------------------------------------------
# Where this process runs

class Compute(NamedTuple):
    """Where this process runs. Unpacks like the five values that compute_init has always returned."""
    ddp: bool              # launched by torchrun?
    ddp_rank: int          # 0 .. world_size-1
    ddp_local_rank: int    # index on this node
    ddp_world_size: int
    device: torch.device

    @property
    def is_master(self):
        """Rank 0 prints, saves and reports."""
        return self.ddp_rank == 0

    def synchronize(self):
        """Wait for the device, so that a clock read next is honest."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def all_reduce(self, *values, op="sum"):
        """Sum (or "max") Python numbers over all ranks; returns a list of floats. One rank: the values themselves."""
        if not self.ddp:
            return [float(value) for value in values]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(total, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        return total.tolist()

    def all_gather(self, value):
        """The picklable `value` of every rank, in rank order."""
        if not self.ddp:
            return [value]
        values = [None] * self.ddp_world_size
        dist.all_gather_object(values, value)
        return values


def is_ddp_requested():
    """True under torchrun, which sets these three variables."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def is_ddp_initialized():
    """True once a process group exists."""
    return dist.is_available() and dist.is_initialized()


def get_dist_info():
    """(ddp, rank, local_rank, world_size) from torchrun's environment, or (False, 0, 0, 1)."""
    if not is_ddp_requested():
        return False, 0, 0, 1
    return True, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])


def autodetect_device_type():
    """cuda, else mps, else cpu: the first that is available."""
    if torch.cuda.is_available():
        device_type = "cuda"
    elif torch.backends.mps.is_available():
        device_type = "mps"
    else:
        device_type = "cpu"
    print0(f"Device: {device_type} (autodetected)")
    return device_type


def compute_init(device_type="cuda", seed=42):
    """
    Seed torch, choose the device and join the process group; returns a Compute.

    device_type  "cuda", "cpu" or "mps"; empty = autodetect
    Raises ValueError for an unknown device type, UserError when that hardware is absent or cannot run several ranks.
    """
    device_type = device_type or autodetect_device_type()
    if device_type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"device type must be cuda, mps or cpu, got {device_type!r}")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available[device_type]:
        raise UserError(f"this machine has no {device_type} device that torch can use: pass --device-type cpu")
    torch.manual_seed(seed) # seeds every device, alike on all ranks
    if device_type == "cuda":
        _allow_tf32()
    ddp, rank, local_rank, world_size = get_dist_info()
    device = torch.device(device_type, local_rank) if ddp and device_type == "cuda" else torch.device(device_type)
    if ddp:
        _join_process_group(device, world_size)
    if rank == 0:
        logger.info(f"Distributed world size: {world_size}")
    return Compute(ddp, rank, local_rank, world_size, device)


def _allow_tf32():
    """Let fp32 matmuls on CUDA use TF32. torch 2.9 renamed the switch, and the two must not be mixed."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.backends.cuda.matmul.allow_tf32 = True


def dist_timeout():
    """
    How long a rank waits for the others before it gives up: NANOCHAT_DIST_TIMEOUT in seconds, else 30 minutes.

    So long because rank 0 may be saving or sampling meanwhile. Raises UserError unless it is a positive number.
    """
    text = os.environ.get("NANOCHAT_DIST_TIMEOUT") or "1800"
    if not re.fullmatch(r"\d{1,8}", text) or int(text) == 0:
        raise UserError(f"NANOCHAT_DIST_TIMEOUT must be a whole number of seconds, at least 1, got {text!r}")
    return datetime.timedelta(seconds=int(text))


def _join_process_group(device, world_size):
    if device.type == "mps" and world_size > 1:
        raise UserError("mps runs on one process only: start without torchrun, or pass --device-type cpu")
    if is_ddp_initialized():
        return
    timeout = dist_timeout()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group(backend="nccl", device_id=device, timeout=timeout)
    else:
        dist.init_process_group(backend="gloo", timeout=timeout)
    dist.barrier()


def compute_cleanup():
    """Leave the process group, if there is one."""
    if is_ddp_initialized():
        dist.destroy_process_group()


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def get_compute_dtype(device, override=""):
    """
    The one dtype of activations: bf16 where the hardware multiplies in it (CUDA from sm80, CPUs with AVX512-BF16 or
    AMX), else fp32. `override` is a name from DTYPES and wins. Master weights, losses and optimizer stay fp32.
    """
    if override:
        return DTYPES[override]
    device = torch.device(device)
    if device.type == "cuda": # by capability: torch's own bf16 query also says yes to emulation
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device.type == "cpu" and (_cpu_has("avx512_bf16") or _cpu_has("amx_tile")):
        return torch.bfloat16
    return torch.float32


def _cpu_has(feature):
    query = getattr(torch.cpu, f"_is_{feature}_supported", None) # absent in some builds of torch
    return query is not None and query()

# -----------------------------------------------------------------------------
# Peak speed of the hardware

# Dense bf16 FLOP/s by what the device name contains, lower case; all words of a row must occur, the first row wins.
# "|" separates alternatives. Sources: the makers' data sheets.
PEAK_BF16_FLOPS = [
    ("gb200|grace blackwell", "", 2.5e15), ("b200", "", 2.25e15), ("b100", "", 1.8e15),
    ("h200", "nvl|pcie", 836e12), ("h200", "", 989e12),
    ("h100", "nvl", 835e12), ("h100", "pcie", 756e12), ("h100", "", 989e12),
    ("h800", "nvl", 989e12), ("h800", "", 756e12),
    ("a100|a800", "", 312e12), ("a40", "", 149.7e12), ("a30", "", 165e12),
    ("l40s|l40-s|l40 s", "", 362e12), ("l4", "", 121e12),
    ("mi355x|mi355", "", 2.5e15), ("mi325x|mi325|mi300x", "", 1.3074e15), ("mi300a", "", 980.6e12),
    ("mi250x", "", 383e12), ("mi250", "", 362.1e12),
    ("5090", "", 209.5e12), ("4090", "", 165.2e12), ("3090", "", 71e12),
]


def get_peak_flops(device_name):
    """Peak dense bf16 FLOP/s of a device by its name; infinity (so that MFU reads 0) with a warning when unknown."""
    name = device_name.lower()
    if "data center gpu max 1550" in name and hasattr(torch, "xpu"):
        return 512 * torch.xpu.get_device_properties("xpu").max_compute_units * 1300 * 10**6
    for model, variant, flops in PEAK_BF16_FLOPS:
        if _contains_word(name, model) and (not variant or any(word in name for word in variant.split("|"))):
            return flops
    logger.warning(f"Peak FLOP/s of {device_name} are unknown: MFU will read 0 %")
    return float("inf")


def _contains_word(name, alternatives):
    """Is one of the words there, not preceded by a letter or digit and not followed by a digit? (An L40 is no L4.)"""
    return re.search(rf"(?<![a-z0-9])(?:{alternatives})(?![0-9])", name) is not None
