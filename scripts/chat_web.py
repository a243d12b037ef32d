"""
Serve a model over HTTP: a chat page, its stream of events, and an API that OpenAI's clients speak.

    python -m scripts.chat_web                                   then open the address that it prints
    python -m scripts.chat_web -i rl -p 8080 --api-key SECRET --host 0.0.0.0
    python -m scripts.chat_web --num-gpus 0                      (a replica on every GPU)

Reads the checkpoints of the stage; writes nothing. The first Ctrl-C lets running answers end, the second ends them.
"""
import argparse
import atexit
import gc
import logging.handlers
import os
import queue
import socket

import torch

from nanochat.checkpoint_manager import STAGE_DIRS, load_model
from nanochat.common import DTYPES, UserError, compute_init, get_compute_dtype, run_main
from nanochat.engine import Engine, describe_decoding
from nanochat.flash_attention import describe_backend
from nanochat.serving import MAX_TOKENS, MAX_TOP_K, Settings, create_app, serve

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("-n", "--num-gpus", type=int, default=1, help="replicas of the model, one per GPU; 0 = all GPUs")
    add("-i", "--source", default="sft", choices=list(STAGE_DIRS), help="stage of the checkpoint")
    add("-g", "--model-tag", default=None, help="checkpoint folder, e.g. d20; default: the newest")
    add("-s", "--step", type=int, default=None, help="step of the checkpoint; default: the last")
    add("-t", "--temperature", type=float, default=0.8, help="where a request of the page has none; 0 to 2")
    add("-k", "--top-k", type=int, default=50, help=f"where a request of the page has none; 0 = all, to {MAX_TOP_K}")
    add("-m", "--max-tokens", type=int, default=512, help=f"where a request of the page has none; 1 to {MAX_TOKENS}")
    add("-d", "--dtype", default="", choices=["", *DTYPES], help="of activations; empty = bf16 where hardware has it")
    add("--device-type", default="", choices=["", "cuda", "cpu", "mps"], help="empty = the first that is available")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 = reachable from other machines")
    add("-p", "--port", type=int, default=8000, help="0 = any that is free")
    add("--api-key", default=None, help="ask every client for this key; default: NANOCHAT_API_KEY, if set")
    add("--cors-origin", action="append", default=[], help="web origin whose pages may call the API; may be repeated")
    add("--max-batch", type=int, default=16, help="answers that are made at the same time, per replica")
    add("--max-queue", type=int, default=64, help="answers that may wait for that; more are refused with 429")
    add("--request-timeout", type=float, default=600, help="seconds that an answer may take, waiting included")
    add("--drain", type=float, default=10, help="seconds that running answers have when the server is told to end")
    add("--log-conversations", action="store_true", help="write what is said to the log")
    return parser


def check_args(args):
    """All that is wrong with the flags, as sentences."""
    problems = []
    for name, low, high in [("num_gpus", 0, None), ("temperature", 0, 2), ("top_k", 0, MAX_TOP_K), ("port", 0, 65535),
                            ("max_tokens", 1, MAX_TOKENS), ("max_batch", 1, None), ("max_queue", 0, None),
                            ("request_timeout", 0.1, None), ("drain", 0, None)]:
        value = getattr(args, name)
        if not low <= value <= (float("inf") if high is None else high): # nan is not either
            problems.append(f"--{name.replace('_', '-')} must be " + (f"at least {low}" if high is None else
                            f"between {low} and {high}") + f", got {value}")
    if "*" in args.cors_origin:
        problems.append("--cors-origin must name an origin such as https://example.org, not *")
    return problems


def listen(host, port):
    """A listening socket. Raises UserError when the address cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"cannot listen at {host}, port {port} ({error.strerror or error}): "
                        "choose another --port or --host") from error


def devices_of(device, num_gpus):
    """The devices of the replicas. Raises UserError for more than there are."""
    if device.type != "cuda":
        if num_gpus > 1:
            raise UserError(f"--num-gpus {num_gpus} needs CUDA devices, this is {device.type}: leave it at 1")
        return [device]
    count = torch.cuda.device_count()
    if num_gpus > count:
        raise UserError(f"--num-gpus {num_gpus} is more than the {count} GPU(s) of this machine")
    return [torch.device("cuda", i) for i in range(num_gpus or count)]


def announce(host, port, has_key):
    """Where to go, and who else can."""
    print(f"Chat at http://{'localhost' if host in LOCAL_HOSTS else host}:{port}/  (API: /v1; Ctrl-C ends)", flush=True)
    if host in LOCAL_HOSTS:
        print(f"From another machine: ssh -L {port}:localhost:{port} {socket.gethostname()}", flush=True)
    elif not has_key:
        print("Warning: everybody who reaches this machine can use the model: set --api-key", flush=True)


def set_up_log():
    """The server's own log, and nobody else's, to stderr: by a thread, for a terminal that is held stops who writes."""
    handler, records = logging.StreamHandler(), queue.SimpleQueue()
    handler.setFormatter(logging.Formatter("%(asctime)s - %(message)s", "%Y-%m-%d %H:%M:%S"))
    listener = logging.handlers.QueueListener(records, handler)
    listener.start()
    atexit.register(listener.stop) # which writes what is left
    logger = logging.getLogger("nanochat.serving")
    logger.addHandler(logging.handlers.QueueHandler(records))
    logger.setLevel(logging.INFO)


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    compute = compute_init(args.device_type)
    devices = devices_of(compute.device, args.num_gpus)
    dtype = get_compute_dtype(compute.device, args.dtype)
    with listen(args.host, args.port) as sock: # before the model is loaded: a port in use is told at once
        loaded = [load_model(args.source, device, "eval", args.model_tag, args.step, dtype) for device in devices]
        print(describe_backend(devices[0], dtype), describe_decoding(devices[0]), sep="\n", flush=True)
        key = os.environ.get("NANOCHAT_API_KEY", "") if args.api_key is None else args.api_key
        settings = Settings(f"{loaded[0][2]['model_tag']}-{args.source}", args.temperature, args.top_k, args.max_tokens,
                            key, args.cors_origin, args.max_queue, args.max_batch, args.request_timeout,
                            args.log_conversations)
        app = create_app([Engine(model, tokenizer) for model, tokenizer, _ in loaded], settings)
        gc.collect()
        gc.freeze() # what was loaded stays: a later collection that walked through it would stop everybody for 0.2 s
        set_up_log()
        announce(args.host, sock.getsockname()[1], bool(key))
        serve(app, sock, args.drain)


if __name__ == "__main__":
    run_main(main, writes=False)
