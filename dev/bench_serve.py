"""
What the HTTP server costs over the bare engine, what it saves, and whether it bears a crowd.

    python -m dev.bench_serve                   depth 6, vocabulary 4,096; about 2 minutes
    python -m dev.bench_serve --load 180        instead: 64 clients for 180 s, a third of whom leave in the middle

A random model is served by a process of its own (no answer ends by itself), and clients speak to it as anybody would.
Printed: tokens/s of 16 streams over HTTP against the bare engine at batch 16, in alternating turns; the first token of
a short request among 15 streams, in decoding steps; how much sooner the second turn of a conversation of 1,000 tokens
begins when its keys are reused. The last line is JSON; `ratio` is HTTP against the bare engine. --load says what was
left of rows, threads and memory, how many answers were wrong, and how long /health took.
"""
import argparse
import asyncio
import gc
import http.client
import json
import multiprocessing
import os
import random
import socket
import statistics
import sys
import time
from pathlib import Path

import psutil
import torch

from nanochat.chat import build_prompt, to_turns
from nanochat.common import DTYPES, UserError, compute_init, get_compute_dtype
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.serving import Settings, create_app, serve
from nanochat.tokenizer import RustBPETokenizer

STREAMS, TOKENS, CLIENTS, CONTEXT = 16, 128, 64, 2048


def make_engine(args):
    """A random model over a tokenizer of this repository's sources; special tokens are never the likeliest."""
    torch.manual_seed(0)
    sources = (path.read_text("utf-8") for path in sorted(Path(__file__).parent.parent.glob("*/*.py")))
    tokenizer = RustBPETokenizer.train_from_iterator(sources, args.vocab_size)
    model = GPT(GPTConfig(sequence_len=CONTEXT, vocab_size=args.vocab_size, n_layer=args.depth, n_head=args.depth,
                          n_kv_head=args.depth, n_embd=64 * args.depth, window_pattern="L"))
    model.init_weights()
    with torch.no_grad():
        for block in model.transformer.h: # fresh ones are zero: then every token would be followed by the same one
            block.mlp.c_proj.weight.normal_(std=0.02)
        model.lm_head.weight.normal_(std=0.5)
        model.lm_head.weight[[tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()]] = 0
    dtype = get_compute_dtype(torch.device("cpu"), args.dtype)
    model = model.to(dtype).eval()
    model.compute_dtype = dtype
    model.pack_weights()
    return Engine(model, tokenizer)


def run_server(args, sock):
    """The process that serves."""
    compute_init("cpu")
    app = create_app([make_engine(args)], Settings("bench", max_batch=STREAMS, max_queue=CLIENTS))
    gc.collect()
    gc.freeze() # as scripts.chat_web
    serve(app, sock)


class Client:
    """Asks the server, and keeps what its events said."""

    def __init__(self, port):
        import httpx
        self.port, self.http = port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600)

    async def health_seconds(self):
        started = time.perf_counter()
        (await self.http.get("/health")).raise_for_status()
        return time.perf_counter() - started

    async def ask(self, messages, max_tokens, leave_after=None):
        """
        Stream one greedy answer. Returns {"text", "times" of its events, "sent", "usage"}; None for one that was
        refused because the queue is full, or left after so many events.
        """
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        body = json.dumps({"messages": messages, "temperature": 0, "max_tokens": max_tokens}).encode()
        text, times, sent = "", [], time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port) # a client library takes as long to read
        writer.write(b"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" # as to generate
                     b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        try:
            status = int((await reader.readline()).split()[1])
            if status != 200:
                if status == 429:
                    return None
                raise UserError(f"the server answered {status}: {await reader.read()}")
            async for line in reader: # chunk sizes and headers are passed over
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise UserError(f"the server failed: {event['error']}")
                if "token" in event:
                    text += event["token"]
                    times.append(time.perf_counter())
                if event.get("done"):
                    return {"text": text, "times": times, "sent": sent, "usage": event["usage"]}
                if leave_after is not None and len(times) >= leave_after:
                    return None
            raise UserError("a stream ended without its done event")
        finally:
            writer.close()


def bare_tokens_per_second(engine):
    prompt = build_prompt(engine.tokenizer, to_turns([{"role": "user", "content": "question 0"}])[1], CONTEXT).ids
    times = [time.perf_counter() for _ in engine.generate(prompt, STREAMS, TOKENS, temperature=0)]
    return STREAMS * (len(times) - 1) / (times[-1] - times[0])


async def http_tokens_per_second(client):
    """Of all streams together, between the last one's first token and the first one's end."""
    answers = await asyncio.gather(*(client.ask(f"question {i}", TOKENS) for i in range(STREAMS)))
    start, end = max(a["times"][0] for a in answers), min(a["times"][-1] for a in answers)
    shares = [a["usage"]["completion_tokens"] / len(a["times"]) for a in answers] # an event may hold several tokens
    return sum(share * sum(start < t <= end for t in a["times"]) for a, share in zip(answers, shares)) / (end - start)


async def first_token_in_steps(client):
    """Of a short request that comes while all rows but one decode: in steps, as long as those of the others."""
    others = [asyncio.create_task(client.ask(f"question {i}", TOKENS)) for i in range(STREAMS - 1)]
    await asyncio.sleep(0.8)
    short = await client.ask("hi", 1)
    steps = [b - a for other in await asyncio.gather(*others) for a, b in zip(other["times"], other["times"][1:])]
    return (short["times"][0] - short["sent"]) / statistics.median(steps)


async def second_turn_speedup(client, seed):
    """How many times sooner the first token comes when the 1,000 tokens before it were answered here."""
    draw = random.Random(seed)
    def conversation():
        return [{"role": "user", "content": " ".join(str(draw.randrange(10**6)) for _ in range(250))}]

    async def seconds(messages):
        answer = await client.ask(messages, 1)
        return answer["times"][0] - answer["sent"], answer["usage"]
    known, unknown = conversation(), conversation()
    await client.ask(known, 16)
    turn = [{"role": "assistant", "content": "good"}, {"role": "user", "content": "and then?"}]
    reused, usage = await seconds([*known, *turn])
    fresh, _ = await seconds([*unknown, *turn])
    return fresh / reused, usage


async def measure(args, client, engine):
    bare, http, steps, speedups = [], [], [], []
    await http_tokens_per_second(client) # warms up both sides
    bare_tokens_per_second(engine)
    for turn in range(args.turns):
        bare.append(bare_tokens_per_second(engine))
        http.append(await http_tokens_per_second(client))
        steps.append(await first_token_in_steps(client))
        speedup, usage = await second_turn_speedup(client, turn)
        speedups.append(speedup)
    medians = {name: statistics.median(values) for name, values in
               [("bare", bare), ("http", http), ("steps", steps), ("speedup", speedups)]}
    print(f"load {os.getloadavg()[0]:.1f}, {STREAMS} streams of {TOKENS} tokens, medians of {args.turns} turns")
    print(f"  bare engine                       {medians['bare']:8.0f} tokens/s")
    print(f"  over HTTP                         {medians['http']:8.0f} tokens/s")
    print(f"  first token of a short request    {medians['steps']:8.1f} steps")
    print(f"  second turn with reused keys      {medians['speedup']:8.1f} times sooner ({usage['cached_tokens']} of "
          f"{usage['prompt_tokens']} tokens)")
    print(json.dumps({"ratio": round(medians["http"] / medians["bare"], 3), "steps": round(medians["steps"], 2),
                      "second_turn": round(medians["speedup"], 2), "tokens_per_second": round(medians["http"], 1)}))


def watch_health(port, pipe, done):
    """In a process of its own, for a loop that serves 64 clients would be late itself: how long each /health took."""
    connection, healths = http.client.HTTPConnection("127.0.0.1", port), []
    while not done.wait(0.1):
        started = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        healths.append(time.perf_counter() - started)
        if len(healths) == 1:
            pipe.send(None)
    pipe.send(healths)


async def crowd(args, client, engine, process):
    """64 clients at once, many of whom leave; every complete answer is compared with the engine's own."""
    questions = [f"question {i} of a crowd" for i in range(12)]
    prompts = [build_prompt(engine.tokenizer, to_turns([{"role": "user", "content": q}])[1], CONTEXT).ids
               for q in questions]
    expected = [engine.tokenizer.decode(samples[0][0])
                for samples in engine.generate_many(prompts, max_tokens=48, temperature=0)]
    counts, draw = {"right": 0, "wrong": 0, "left or refused": 0}, random.Random(1)
    spawn = multiprocessing.get_context("spawn")
    (seconds, far_end), done = spawn.Pipe(), spawn.Event()
    spawn.Process(target=watch_health, args=(client.port, far_end, done), daemon=True).start()
    seconds.recv() # it watches from now on
    await client.ask(questions[0], 4)
    threads, memory = process.num_threads(), process.memory_info().rss
    deadline = time.monotonic() + args.load

    async def one():
        while time.monotonic() < deadline:
            i = draw.randrange(len(questions))
            leave_after = draw.randrange(30) if draw.random() < 1 / 3 else None
            answer = await client.ask(questions[i], 48, leave_after)
            if answer is None:
                counts["left or refused"] += 1
                await asyncio.sleep(0.05)
            else:
                counts["right" if answer["text"] == expected[i] else "wrong"] += 1

    await asyncio.gather(*(one() for _ in range(CLIENTS)))
    done.set()
    healths = sorted(seconds.recv())
    await asyncio.sleep(1)
    stats = (await client.http.get("/stats")).json()
    result = {**counts, "rows left": stats["running"], "waiting left": stats["waiting"],
              "threads more": process.num_threads() - threads,
              "MiB more": round((process.memory_info().rss - memory) / 2**20, 1),
              "health ms, median": round(1e3 * statistics.median(healths), 1),
              "health ms, 99 %": round(1e3 * healths[int(0.99 * (len(healths) - 1))], 1),
              "health ms, longest": round(1e3 * healths[-1], 1)}
    for name, value in result.items():
        print(f"  {name:20} {value}")
    print(json.dumps({"ratio": counts["right"] / max(1, counts["right"] + counts["wrong"]), **result}))
    if counts["wrong"] or stats["running"] or stats["waiting"]:
        raise UserError("answers were wrong, or rows were left behind")


async def run_clients(args, port, engine, process):
    client = Client(port)
    for _ in range(600):
        try:
            await client.health_seconds()
            break
        except Exception: # whatever a server that is not there yet does
            await asyncio.sleep(0.1)
    await (crowd(args, client, engine, process) if args.load else measure(args, client, engine))
    await client.http.aclose()


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--depth", type=int, default=6, help="layers; the width is 64 times as much")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=5, help="repetitions of every measurement")
    parser.add_argument("--load", type=int, default=0, help="seconds of a crowd of clients; 0 = measure speed instead")
    parser.add_argument("--dtype", default=None, choices=list(DTYPES),
                        help="default: bf16 where hardware has it, fp32 for --load, whose answers are compared")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("float32" if args.load else "")
    sock = socket.create_server(("127.0.0.1", 0))
    server = multiprocessing.get_context("spawn").Process(target=run_server, args=(args, sock), daemon=True)
    server.start()
    compute_init("cpu")
    asyncio.run(run_clients(args, sock.getsockname()[1], make_engine(args), psutil.Process(server.pid)))
    server.terminate()
    server.join(30)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
