"""
The HTTP server over the engine: one thread per device decodes, one event loop talks to everybody.

    POST -> Gate (key, size of the body) -> schema -> prompt -> Answer -> Worker (a Batch in a thread of its own)
         -> after every step one call on the event loop -> the Answer's queue -> events of the response

`Service.respond` holds an answer from its submission to its last event; however that ends, its rows leave the batch
before the next step. The event loop never waits for a model, and the engine's thread never waits for a client.
Errors have one form, OpenAI's: {"error": {"message", "type", "param", "code"}}. What was said is logged only on demand.
"""
import asyncio
import contextlib
import json
import logging
import queue
import random
import re
import secrets
import signal
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated

import torch

from nanochat.chat import AnswerStream, build_prompt, to_turns
from nanochat.common import UserError
from nanochat.engine import NOT_FINITE, Batch, Request, derive_seed

logger = logging.getLogger(__name__)

MAX_BODY = 1 << 20     # bytes
MAX_MESSAGES = 500
MAX_CHARS = 8_000      # of a user's message to the page's endpoint
MAX_TOTAL_CHARS = 32_000 # of all messages to it
MAX_CHOICES = 8
MAX_TOKENS = 4096      # that a request to the page's endpoint may ask for
MAX_TOP_K = 200
MAX_PARTS = 50_000     # of a message; an answer that comes back has one for every token, or almost
MAX_UNSENT = 1024      # events of an answer that wait for its client to read
STALL_SECONDS = 20     # that a client may take nothing of its answer, or send nothing of its request
PING_SECONDS = 15      # of silence, then a comment tells proxies and the client that the stream lives
TICK_SECONDS = 0.1     # how often time limits and silence are looked at
EXAMPLES = ["What is the capital of France?", "What is the opposite of hot?", "How do you spell the word apple?",
            "What is 12 * 7?"]
# Parameters of OpenAI that would change the answer if we had them, and the values that ask for nothing.
UNSUPPORTED = {"presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},),
               "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
               "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
               "web_search_options": ()}
NO_RETRY = {"x-should-retry": "false"} # tells OpenAI's client: it would end like this again
to_json = json.JSONEncoder(ensure_ascii=False).encode # made once: it is called for every token
LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)} # some clients would split a line there
CSP = ("default-src 'none'; script-src 'self' 'nonce-{}'; style-src 'unsafe-inline'; img-src 'self' data:; "
       "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


@dataclass
class Settings:
    """What a server is started with; the sampling values are the page's endpoint's defaults."""
    model: str
    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512
    api_key: str = ""
    cors_origins: list[str] = field(default_factory=list)
    max_queue: int = 64
    max_batch: int = 16
    request_timeout: float = 600
    log_conversations: bool = False


class ApiError(Exception):
    """A refusal or a failure as a client sees it: status, and the body in OpenAI's form."""

    def __init__(self, status, message, code=None, param=None, headers=None):
        super().__init__(message)
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ClientGone(Exception):
    """The client left: nobody reads what would be sent."""


async def in_time(awaitable, error):
    """What the client makes us wait for. Raises `error` when that takes too long."""
    try:
        async with asyncio.timeout(STALL_SECONDS):
            return await awaitable
    except TimeoutError:
        raise error from None


def sse(item):
    """One server-sent event of a dict or of the word [DONE]; a comment for None."""
    if item is None:
        return ": ping\n\n"
    text = item if isinstance(item, str) else to_json(item)
    return f"data: {text.translate(LINE_ENDS)}\n\n"

# -----------------------------------------------------------------------------
# The engine's side

class Choice:
    """One answer in the making: the engine's request, and the text of its tokens. Lives in the engine's thread."""

    def __init__(self, answer, index, tokenizer, prompt, stop, **sampling):
        self.answer, self.index, self.tokenizer = answer, index, tokenizer
        self.stream = AnswerStream(tokenizer, stop)
        self.request = Request(prompt, on_token=self.on_token, **sampling)
        self.request.on_end = self.on_end
        self.outbox = None        # where parts go: the list of the worker that makes it
        self.finish_reason = self.first_at = self.ended_at = None
        self.num_visible = 0      # characters of text given so far
        self.entries = deque()    # log-probabilities that wait for their text: (characters before it, entry)

    def on_token(self, token, mask, logprob):
        self.first_at = self.first_at or time.monotonic()
        if logprob is not None and self.stream.tool is None and token not in self.stream.special_ids:
            self.entries.append((self.stream.num_chars, self._entry(token, *logprob)))
        for part in self.stream.push(token, mask):
            self._give(part)
        return self.stream.stopped

    def on_end(self, request):
        stopped = self.stream.stopped
        for part in self.stream.flush():
            self._give(part)
        self.finish_reason = "stop" if stopped else request.finish_reason
        self.ended_at = time.monotonic()
        self._give({"type": "end"})

    def _give(self, part):
        ready = []
        if part["type"] == "text":
            self.num_visible += len(part["text"])
            while self.entries and self.entries[0][0] < self.num_visible: # those of a stop string never are
                ready.append(self.entries.popleft()[1])
        self.outbox.append((self, part, ready))

    def _entry(self, token, logprob, top):
        """OpenAI's form of a token's log-probability, and those of the likeliest tokens in its place."""
        def one(token, logprob):
            raw = self.tokenizer.decode_single_token_bytes(token)
            return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}
        return {**one(token, logprob), "top_logprobs": [one(*item) for item in top]}


class Worker(threading.Thread):
    """
    One device: the thread that owns its batch (of the first one the main thread is, where `serve` lends it). Choices
    come in by a queue; parts go out once per step.
    """

    def __init__(self, engine, gpu, max_rows, loop, on_failure):
        super().__init__(name=f"engine {gpu}", daemon=True)
        self.gpu, self.max_rows, self.loop, self.on_failure = gpu, max_rows, loop, on_failure
        self.device = torch.device(engine.model.get_device())
        self.batch = Batch(engine, max_rows)
        self.inbox, self.ended = queue.SimpleQueue(), threading.Event()
        self.outbox = []
        self.load = 0 # choices handed over that have not ended; read and written on the event loop only

    def run(self):
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            num_open = 0
            while self._take_in(is_idle=not num_open):
                num_open = self.batch.step()
                if self.outbox:
                    self.loop.call_soon_threadsafe(self._deliver, self.outbox[:])
                    self.outbox.clear() # the same list: choices hold it
        except Exception as error:
            logger.exception("the engine failed")
            self.loop.call_soon_threadsafe(self.on_failure, error)
        finally:
            self.ended.set()

    def _take_in(self, is_idle):
        """Let what has come join the batch; sleep until something comes when idle. False when told to end."""
        with contextlib.suppress(queue.Empty):
            while (choice := self.inbox.get(block=is_idle)) is not None:
                choice.outbox, is_idle = self.outbox, False
                self.batch.submit(choice.request)
            return False
        return True

    def _deliver(self, events):
        """On the event loop: every part to the answer that waits for it."""
        now = time.monotonic()
        for event in events:
            choice, is_end = event[0], event[1]["type"] == "end"
            self.load -= is_end
            choice.answer.heard_at = now
            if is_end and choice.finish_reason == "broken":
                choice.answer.end(ApiError(500, NOT_FINITE, headers=NO_RETRY))
            else:
                choice.answer.put(event)

# -----------------------------------------------------------------------------
# The event loop's side

class Answer:
    """What one HTTP request asks for, n choices, and what has come of them that its client was not yet sent."""

    def __init__(self, prompt):
        self.prompt, self.choices = prompt, []
        self.id, self.status, self.gpu = "", 200, 0
        self.unsent, self.error = [], None # events: (choice, part, log-probability entries); what ends it all
        self.has_news = asyncio.Event()
        self.arrived_at = self.heard_at = time.monotonic()

    def put(self, event):
        self.unsent.append(event)
        self.has_news.set()
        if len(self.unsent) > MAX_UNSENT: # the client does not read: it is not worth a row
            self.end(ClientGone())

    def end(self, error=None):
        """Stop here; the client is told why."""
        for choice in self.choices:
            choice.request.cancel()
        self.error = self.error or error
        self.has_news.set()

    async def batches(self):
        """Lists of the events that have come, until all choices have ended. Raises the error that ends it early."""
        num_open = len(self.choices)
        while num_open:
            await self.has_news.wait()
            self.has_news.clear()
            batch, self.unsent = self.unsent, []
            num_open -= sum(part["type"] == "end" for _, part, _ in batch)
            yield batch
            if self.error is not None:
                raise self.error

    def usage(self):
        return {"prompt_tokens": len(self.prompt.ids),
                "completion_tokens": sum(len(choice.request.tokens) for choice in self.choices),
                "cached_tokens": max((choice.request.cached_tokens for choice in self.choices), default=0)}

    def timings(self):
        """Milliseconds from arrival to the first row and to the first token; tokens per second from then on."""
        started = min((choice.request.started_at for choice in self.choices if choice.request.started_at), default=None)
        first = min((choice.first_at for choice in self.choices if choice.first_at), default=None)
        seconds = max((choice.ended_at or 0 for choice in self.choices), default=0) - (first or 0)
        later = self.usage()["completion_tokens"] - sum(choice.first_at is not None for choice in self.choices)
        return {"queue_ms": round(1000 * ((started or time.monotonic()) - self.arrived_at), 1),
                "first_token_ms": first and round(1000 * (first - self.arrived_at), 1),
                "tokens_per_second": round(later / seconds, 1) if first and later > 0 and seconds > 0 else None}


class ChatForm:
    """The events of POST /chat/completions."""

    def __init__(self, answer):
        self.answer, self.expression = answer, ""

    def opening(self):
        return []

    closing = opening

    def event(self, choice, part, entries):
        kind, text = part["type"], part.get("text")
        if kind == "end":
            return {"done": True, "finish_reason": choice.finish_reason, "timings": self.answer.timings(),
                    "usage": {**self.answer.usage(), "dropped_turns": self.answer.prompt.num_dropped}}
        if kind == "text":
            said = {"token": text}
        elif kind == "python":
            self.expression, said = text, {"tool": {"expression": text}}
        else:
            said = {"tool": {"expression": self.expression, "result": text}}
        return {**said, "gpu": self.answer.gpu}


class CompletionForm:
    """OpenAI's chat.completion and its chunks. Calls of the calculator go beside the content, as `part` and `parts`."""

    def __init__(self, answer, body, model):
        self.answer, self.with_logprobs = answer, body.logprobs
        self.base = {"id": "", "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
        self.with_usage = body.stream_options.get("include_usage", False)

    def opening(self):
        self.base["id"] = f"chatcmpl-{self.answer.id}"
        return [self._chunk(choice, {"role": "assistant", "content": ""}) for choice in self.answer.choices]

    def event(self, choice, part, entries):
        if part["type"] == "end":
            return self._chunk(choice, {})
        return self._chunk(choice, {"content": part["text"]} if part["type"] == "text" else {"part": part}, entries)

    def closing(self):
        return [{**self.base, "choices": [], **self._totals()}, "[DONE]"] if self.with_usage else ["[DONE]"]

    def whole(self, events):
        """The body of an answer that is not streamed, from all of its events."""
        self.opening()
        choices = []
        for choice in self.answer.choices:
            own = [(part, entries) for whose, part, entries in events if whose is choice and part["type"] != "end"]
            parts = [part for part, _ in own]
            message = {"role": "assistant", "refusal": None,
                       "content": "".join(part["text"] for part in parts if part["type"] == "text")}
            if any(part["type"] != "text" for part in parts):
                message["parts"] = parts
            entries = [entry for _, entries in own for entry in entries] if self.with_logprobs else None
            choices.append(self._choice(choice, entries, message=message))
        return {**self.base, "object": "chat.completion", "choices": choices, **self._totals()}

    def _chunk(self, choice, delta, entries=()):
        chunk = {**self.base, "choices": [self._choice(choice, entries or None, delta=delta)]}
        if delta: # only the last one, which is empty, says why it ended
            chunk["choices"][0]["finish_reason"] = None
        return {**chunk, "usage": None} if self.with_usage else chunk

    def _choice(self, choice, entries, **content):
        logprobs = None if entries is None else {"content": entries, "refusal": None}
        return {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _totals(self):
        usage = self.answer.usage()
        cached, total = usage.pop("cached_tokens"), usage["prompt_tokens"] + usage["completion_tokens"]
        return {"usage": {**usage, "total_tokens": total, "prompt_tokens_details": {"cached_tokens": cached}},
                "timings": self.answer.timings()}


class Service:
    """All answers under way, the workers that make them, and whether more are taken."""

    def __init__(self, engines, settings):
        self.engines, self.settings = engines, settings
        self.context = min(engine.model.config.sequence_len for engine in engines)
        self.tokenizer = engines[0].tokenizer
        self.status, self.failure, self.drain_until = "loading", None, None
        self.workers, self.answers = [], set()
        self.main_thread = None # a queue, when the main thread waits there for the first worker, to be it
        self.metrics = Metrics(self)

    # ---- life ----

    def start(self):
        loop = asyncio.get_running_loop()
        self.workers = [Worker(engine, gpu, self.settings.max_batch, loop, self.fail)
                        for gpu, engine in enumerate(self.engines)]
        for worker in self.workers:
            if self.main_thread is not None and worker.gpu == 0:
                self.main_thread.put(worker)
            else:
                worker.start()
        self.clock = loop.create_task(self._watch_clock())
        self.status = "ok"

    async def stop(self):
        self.clock.cancel()
        for worker in self.workers:
            worker.inbox.put(None)
        for worker in self.workers:
            await asyncio.to_thread(worker.ended.wait, 10)

    def drain(self, seconds):
        """Take no more requests; what runs has so many seconds. May be called from a signal handler."""
        self.status, self.drain_until = "draining", time.monotonic() + seconds

    def fail(self, error):
        """An engine's thread has died: nobody waits for it."""
        self.status, self.failure = "failed", error
        self._end_all(ApiError(500, "the engine failed; the server's log says why"))

    def is_over(self):
        """Is it time to leave? Ends what still runs then. To be asked every moment."""
        is_late = self.drain_until is not None and time.monotonic() >= self.drain_until
        if is_late:
            self._end_all(ApiError(503, "the server is shutting down", "shutting_down"))
        return self.failure is not None or is_late or self.drain_until is not None and not self.answers

    def _end_all(self, error):
        for answer in self.answers:
            answer.end(error)

    async def _watch_clock(self):
        limit = self.settings.request_timeout
        late = ApiError(504, f"the answer took more than {limit:g} seconds", "timeout", headers=NO_RETRY)
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            for answer in self.answers:
                if now > answer.arrived_at + limit:
                    answer.end(late)
                elif now > answer.heard_at + PING_SECONDS:
                    answer.heard_at = now
                    answer.put((None, {"type": "ping"}, ()))

    # ---- what is going on ----

    def num_running(self):
        return sum(min(worker.load, worker.max_rows) for worker in self.workers)

    def num_waiting(self):
        return sum(max(worker.load - worker.max_rows, 0) for worker in self.workers)

    def health(self):
        s = self.settings
        return {"status": self.status, "ready": self.status == "ok", "num_gpus": len(self.engines),
                "available_workers": self._num_available(), "model": s.model, "context": self.context,
                "needs_key": bool(s.api_key), "examples": EXAMPLES,
                "defaults": {"temperature": s.temperature, "top_k": s.top_k, "top_p": 1.0, "min_p": 0.0,
                             "max_tokens": s.max_tokens}}

    def stats(self):
        total, available = len(self.workers), self._num_available()
        return {"total_workers": total, "available_workers": available, "busy_workers": total - available,
                "workers": [{"gpu_id": worker.gpu, "device": str(worker.device)}
                            for worker in self.workers],
                "running": self.num_running(), "waiting": self.num_waiting(),
                "max_batch": self.settings.max_batch, "max_queue": self.settings.max_queue}

    def _num_available(self):
        return sum(worker.load < worker.max_rows for worker in self.workers)

    # ---- answers ----

    def check_room(self):
        """Raise ApiError unless one more request may come."""
        if self.status != "ok":
            code = {"draining": "shutting_down"}.get(self.status, self.status)
            raise ApiError(503, f"the server does not serve now: {self.status}", code, headers={"Retry-After": "5"})
        if not self._num_available() and self.num_waiting() >= self.settings.max_queue:
            raise ApiError(429, f"{self.num_waiting()} requests wait already, the queue is full: try again later",
                           "queue_full", headers={"Retry-After": "1"})

    def choose_worker(self, prompt):
        """The replica that holds most of a prompt in its cache, of those that are not much busier than the freest."""
        least = min(worker.load for worker in self.workers)
        busiest = min(least + self.settings.max_batch // 4, self.settings.max_batch - 1)
        near = [worker for worker in self.workers if worker.load <= max(least, busiest)]
        return max(near, key=lambda worker: (worker.batch.num_cached(prompt), -worker.load))

    async def prepare(self, body, merge, max_tokens, n=1, logprobs=None):
        """An Answer with its prompt and its choices, not yet submitted. Raises ApiError."""
        self.check_room()

        def build(): # long texts take their time: not on the event loop
            system, turns = to_turns(body.messages, merge)
            return build_prompt(self.tokenizer, turns, self.context, max_tokens, system, may_drop=not merge)
        try:
            answer = Answer(await asyncio.to_thread(build))
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        except UserError as error:
            raise ApiError(400, str(error), "context_length_exceeded", "messages") from error
        seed = random.randrange(2**31) if body.seed is None else body.seed
        stop = [body.stop] if isinstance(body.stop, str) else body.stop
        answer.choices = [Choice(answer, i, self.tokenizer, answer.prompt.ids, stop, max_tokens=max_tokens,
                                 temperature=body.temperature, top_k=body.top_k, top_p=body.top_p, min_p=body.min_p,
                                 seed=derive_seed(seed, i) if i else seed, logprobs=logprobs) for i in range(n)]
        if self.settings.log_conversations:
            said = (f"[{message['role'].upper()}]: {message.get('content')!r}" for message in body.messages)
            logger.info("\n".join(["=" * 20, *said, "-" * 20]))
        return answer

    async def respond(self, answer, form, is_stream, receive, send):
        """Submit an answer and send what comes. However this ends, its rows are free a step later."""
        self.check_room()
        worker = self.choose_worker(answer.prompt.ids)
        answer.gpu = worker.gpu
        worker.load += len(answer.choices)
        self.answers.add(answer)
        for choice in answer.choices:
            worker.inbox.put(choice)
        watch = asyncio.create_task(self._watch_client(answer, receive))
        try:
            await (self._send_stream if is_stream else self._send_whole)(answer, form, send)
        except ApiError as error:
            answer.status = error.status
            raise
        except (ClientGone, asyncio.CancelledError) as gone:
            answer.status = 499
            if isinstance(gone, asyncio.CancelledError):
                raise
        finally:
            watch.cancel()
            answer.end()
            self.answers.discard(answer)
            self._record(answer)

    async def _watch_client(self, answer, receive):
        while (await receive())["type"] != "http.disconnect":
            pass
        answer.end(ClientGone())

    async def _send_stream(self, answer, form, send):
        async def write(items, more=True):
            body = "".join(map(sse, items)).encode() # sending waits for the client when the buffers are full
            await in_time(send({"type": "http.response.body", "body": body, "more_body": more}), ClientGone())
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                   (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await write(form.opening())
            async for batch in answer.batches():
                await write([form.event(*event) if event[0] else None for event in batch])
            await write(form.closing(), more=False)
        except ApiError as error:
            answer.status = error.status
            await write([error.body], more=False)

    async def _send_whole(self, answer, form, send):
        events = [event async for batch in answer.batches() for event in batch if event[0]]
        body = to_json(form.whole(events)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _record(self, answer):
        usage, timings = answer.usage(), answer.timings()
        reasons = ",".join(choice.finish_reason or "cancelled" for choice in answer.choices)
        logger.info(f"{answer.id} {answer.status} prompt {usage['prompt_tokens']} (cached {usage['cached_tokens']}) "
                    f"completion {usage['completion_tokens']} queue {timings['queue_ms']} ms first token "
                    f"{timings['first_token_ms']} ms {timings['tokens_per_second']} tok/s {reasons}")
        if self.settings.log_conversations:
            for choice in answer.choices:
                said = self.tokenizer.decode(choice.request.tokens)
                logger.info(f"[ASSISTANT] (GPU {answer.gpu}): {said!r}\n" + "=" * 20)
        self.metrics.record(answer, usage, timings)


class Metrics:
    """Counters and histograms for Prometheus, in a registry of this application's own."""

    def __init__(self, service):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        self.registry = CollectorRegistry()

        def make(kind, name, text, labels=()):
            return kind(name, text, labels, "nanochat", registry=self.registry)
        self.requests = make(Counter, "requests_total", "requests by HTTP status", ["status"])
        self.cancelled = make(Counter, "cancelled_total", "answers whose client left")
        self.tokens = {key: make(Counter, f"{name}_tokens_total", f"tokens of {text}") for key, name, text in [
            ("prompt_tokens", "prompt", "prompts"), ("cached_tokens", "cached", "prompts that were in the cache"),
            ("completion_tokens", "generation", "answers")]}
        self.queue = make(Histogram, "queue_seconds", "from arrival to a row of the batch")
        self.first = make(Histogram, "time_to_first_token_seconds", "from arrival to the first token")
        self.token = make(Histogram, "time_per_output_token_seconds", "after the first, mean of an answer")
        make(Gauge, "requests_running", "choices that have a row").set_function(service.num_running)
        make(Gauge, "requests_waiting", "choices that wait for a row").set_function(service.num_waiting)
        make(Gauge, "kv_slots", "rows of all batches").set(len(service.engines) * service.settings.max_batch)

    def record(self, answer, usage, timings):
        for name, counter in self.tokens.items():
            counter.inc(usage[name])
        self.cancelled.inc(answer.status == 499)
        self.queue.observe(timings["queue_ms"] / 1000)
        if timings["first_token_ms"] is not None:
            self.first.observe(timings["first_token_ms"] / 1000)
        if timings["tokens_per_second"]:
            self.token.observe(1 / timings["tokens_per_second"])

# -----------------------------------------------------------------------------
# The application

class Gate:
    """What every request passes first: its id, the key, and the limit on the size of its body."""

    def __init__(self, app, service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["request_id"] = secrets.token_hex(12)

        async def send_with_id(message):
            if message["type"] == "http.response.start":
                self.service.metrics.requests.labels(message["status"]).inc()
                message["headers"] = [*message.get("headers", []), (b"x-request-id", scope["request_id"].encode()),
                                      (b"x-content-type-options", b"nosniff")]
            await send(message)
        try:
            self._check_key(scope)
            receive = await self._read(receive) if scope["method"] == "POST" else receive
        except ClientGone:
            return
        except ApiError as error:
            return await _error_response(error)(scope, receive, send_with_id)
        await self.app(scope, receive, send_with_id)

    def _check_key(self, scope):
        key, path = self.service.settings.api_key, scope["path"]
        if key and (path.startswith("/v1/") or path in ("/chat/completions", "/stats", "/metrics")):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, f"Bearer {key}".encode()):
                raise ApiError(401, "this server asks for its key: send the header Authorization: Bearer KEY",
                               "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, receive):
        """Read the body, then give it again. One that is too long is read for a while, so that the client listens."""
        chunks, size, more = [], 0, True
        while more and size <= 16 * MAX_BODY:
            message = await in_time(receive(), ApiError(408, "the body of the request did not come"))
            if message["type"] == "http.disconnect":
                raise ClientGone
            size += len(message.get("body", b""))
            chunks = [*chunks, message.get("body", b"")] if size <= MAX_BODY else []
            more = message.get("more_body", False)
        if size > MAX_BODY:
            raise ApiError(413, f"the body of a request may have {MAX_BODY} bytes at most")
        messages = deque([{"type": "http.request", "body": b"".join(chunks), "more_body": False}])

        async def again():
            return messages.popleft() if messages else await receive()
        return again


def _error_response(error):
    from fastapi.responses import JSONResponse
    return JSONResponse(error.body, error.status, error.headers)


def _schemas(settings):
    """The bodies of the two endpoints as pydantic classes; explicit null is the same as absence everywhere."""
    from pydantic import BaseModel, ConfigDict, Field, model_validator
    from typing_extensions import NotRequired, TypedDict
    Text = Annotated[str, Field(min_length=1)]

    # Dicts, and nothing read on after an error: a hostile megabyte would stop the event loop for seconds.
    class Part(TypedDict):
        type: str
        text: NotRequired[str | None]
    Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]

    class Message(TypedDict):
        role: str
        content: NotRequired[str | Parts | None]
        parts: NotRequired[Parts | None]

    class Chat(BaseModel):
        model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
        messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
        temperature: float = Field(settings.temperature, ge=0, le=2)
        top_p: float = Field(1.0, ge=0, le=1)
        min_p: float = Field(0.0, ge=0, le=1)
        top_k: int = Field(settings.top_k, ge=0, le=MAX_TOP_K)
        max_tokens: int = Field(settings.max_tokens, ge=1, le=MAX_TOKENS)
        seed: int | None = Field(None, ge=-2**63, le=2**63 - 1)
        stop: Text | Annotated[list[Text], Field(max_length=4)] = []

        @model_validator(mode="before")
        @classmethod
        def without_nulls(cls, body):
            return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body

    class Completion(Chat):
        model: str = settings.model
        temperature: float = Field(1.0, ge=0, le=2)
        top_k: int = Field(0, ge=0)
        max_tokens: int | None = Field(None, ge=1)
        max_completion_tokens: int | None = Field(None, ge=1)
        n: int = Field(1, ge=1, le=MAX_CHOICES)
        logprobs: bool = False
        top_logprobs: int = Field(0, ge=0, le=20)
        stream: bool = False
        stream_options: Annotated[dict[str, bool | None], Field(max_length=9)] = {}

    return Chat, Completion


def _check_chat(body):
    """Limits of the page's endpoint, in characters. Answers may be of any length: they come from us."""
    def length(message):
        content = message.get("content") or ""
        return len(content) if isinstance(content, str) else sum(len(part.get("text") or "") for part in content)
    for i, message in enumerate(body.messages):
        if message["role"] == "user" and not 1 <= length(message) <= MAX_CHARS:
            raise ApiError(400, f"message {i} must have 1 to {MAX_CHARS} characters, got {length(message)}",
                           param="messages")
    if sum(map(length, body.messages)) > MAX_TOTAL_CHARS:
        raise ApiError(400, f"all messages together may have {MAX_TOTAL_CHARS} characters", param="messages")


def _no_model(name, ours):
    return ApiError(404, f"there is no model {name!r:.80} here, only {ours!r}", "model_not_found", "model")


def _check_completion(body, model):
    if body.model != model:
        raise _no_model(body.model, model)
    for name, harmless in UNSUPPORTED.items():
        if (value := body.model_extra.get(name)) is not None and value not in harmless:
            raise ApiError(400, f"the parameter {name} is not supported", "unsupported_parameter", name)
    if "top_logprobs" in body.model_fields_set and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if "stream_options" in body.model_fields_set and not body.stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")


def _add_error_handlers(app):
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    @app.exception_handler(ApiError)
    async def refused(request, error):
        return _error_response(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request, error):
        # Of a union's errors the telling one: that of the alternative whose type was right.
        chosen = max(error.errors(), key=lambda item: not item["type"].endswith("_type"))
        where = ".".join(str(step) for step in chosen["loc"][1:] if re.fullmatch(r"(?!str$)\w+", str(step)))
        if not where or chosen["type"] == "json_invalid":
            return _error_response(ApiError(400, "the body must be a JSON object, sent as application/json"))
        return _error_response(ApiError(400, f"{where}: {chosen['msg']}", param=where))

    @app.exception_handler(HTTPException) # of the framework: no such path, a body that is not UTF-8
    async def elsewhere(request, error):
        return _error_response(ApiError(error.status_code, error.detail, headers=error.headers))

    @app.exception_handler(Exception)
    async def broken(request, error):
        return _error_response(ApiError(500, "the server made a mistake; its log says which"))


def _asset(*path):
    """The bytes of a file of this package. Raises ApiError when there is none."""
    folder = resources.files("nanochat").joinpath(*path[:-1])
    for item in folder.iterdir() if folder.is_dir() else []: # compared, never joined: no name leads out of the folder
        if item.name == path[-1] and item.is_file():
            return item.read_bytes()
    raise ApiError(404, "there is no such file here")


def _add_pages(app):
    from fastapi.responses import Response
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}

    @app.get("/", include_in_schema=False)
    async def page():
        nonce = secrets.token_urlsafe(16)
        return Response(_asset("ui.html").replace(b"{{nonce}}", nonce.encode()), media_type="text/html",
                        headers={"Content-Security-Policy": CSP.format(nonce), "Cache-Control": "no-store"})

    @app.get("/logo.svg", include_in_schema=False)
    @app.get("/vendor/{name}", include_in_schema=False)
    async def file(name: str = ""):
        content = _asset("vendor", name) if name else _asset("logo.svg")
        return Response(content, media_type=kinds.get(name.rpartition(".")[2] or "svg", "text/plain"),
                        headers={"Cache-Control": "max-age=3600"})


def _add_status(app, service):
    from fastapi.responses import JSONResponse, PlainTextResponse
    from prometheus_client import generate_latest
    model = {"id": service.settings.model, "object": "model", "created": int(time.time()), "owned_by": "nanochat"}

    @app.get("/health")
    async def health():
        return JSONResponse(service.health(), 200 if service.status == "ok" else 503)

    @app.get("/stats")
    async def stats():
        return service.stats()

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(generate_latest(service.metrics.registry))

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str):
        if name != model["id"]:
            raise _no_model(name, model["id"])
        return model


def _add_answers(app, service):
    from fastapi.responses import Response
    settings = service.settings
    ChatBody, CompletionBody = _schemas(settings)

    class Reply(Response):
        """Runs an answer from its submission to its end, so that nothing can be lost in between."""
        def __init__(self, answer, form, is_stream):
            super().__init__()
            self.run = answer, form, is_stream

        async def __call__(self, scope, receive, send):
            self.run[0].id = scope["request_id"]
            await service.respond(*self.run, receive, send)

    @app.post("/chat/completions")
    async def chat(body: ChatBody):
        _check_chat(body)
        answer = await service.prepare(body, False, body.max_tokens)
        return Reply(answer, ChatForm(answer), True)

    @app.post("/v1/chat/completions")
    async def completion(body: CompletionBody):
        _check_completion(body, settings.model)
        answer = await service.prepare(body, True, body.max_completion_tokens or body.max_tokens, body.n,
                                       body.top_logprobs if body.logprobs else None)
        return Reply(answer, CompletionForm(answer, body, settings.model), body.stream)


def create_app(engines, settings):
    """The ASGI application over engines, one per device. Its `state.service` knows what goes on."""
    from fastapi import FastAPI
    service = Service(engines, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        service.start()
        yield
        await service.stop()

    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, lifespan=lifespan) # its pages load from elsewhere
    app.state.service = service
    _add_error_handlers(app)
    _add_pages(app)
    _add_status(app, service)
    _add_answers(app, service)
    app.openapi() # kept from now on: while it is made, nobody else is served
    app.add_middleware(Gate, service=service)
    if settings.cors_origins:
        from fastapi.middleware.cors import CORSMiddleware
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"],
                           allow_headers=["*"], expose_headers=["X-Request-Id", "Retry-After"])
    return app


def serve(app, sock, drain=10):
    """
    Serve on a listening socket until a signal comes or an engine fails; raises UserError for the latter.

    After the first signal no request is taken, and those that run have `drain` seconds; a second one ends them.
    """
    import uvicorn
    service = app.state.service
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1) # connections inherit it; else small events wait 40 ms
    if hasattr(socket, "TCP_USER_TIMEOUT"): # Linux breaks a connection off that takes nothing for so many ms
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * STALL_SECONDS)

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame):
            service.drain(0 if service.status == "draining" else drain)

        async def on_tick(self, counter):
            self.should_exit = self.should_exit or service.is_over()
            return await super().on_tick(counter)

    server = Server(uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, lifespan="on",
                                   timeout_graceful_shutdown=5))
    if threading.current_thread() is threading.main_thread():
        _decode_here(server, service, sock)
    else:
        server.run(sockets=[sock])
    if service.failure is not None:
        raise UserError(f"the engine failed ({type(service.failure).__name__}: {service.failure}): see the log above")


def _decode_here(server, service, sock):
    """
    The first engine decodes in the main thread, and the server runs in another: in any other thread a step takes over
    one and a half times as long on a CPU (measured, not understood: dev/LOG.md).
    """
    service.main_thread = queue.SimpleQueue()
    handlers = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    talker = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="server")
    talker.start()
    while talker.is_alive(): # it may fail before it has a worker
        with contextlib.suppress(queue.Empty):
            service.main_thread.get(timeout=TICK_SECONDS).run()
            break
    talker.join()
    for number, handler in handlers.items():
        signal.signal(number, handler)
