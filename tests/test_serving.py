"""The HTTP server, by real clients over real sockets: what it says, whom it refuses, and that nothing stays behind."""
import concurrent.futures
import contextlib
import json
import math
import random
import re
import socket
import time
from collections import Counter

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nanochat.serving
from nanochat.chat import build_prompt, to_turns
from tests.chat_world import tiny_model
from tests.serving_world import CALL, FOREVER, HELLO, TOKENIZER, ChainModel, path_of, running, wait_for

HTTP = httpx.Client(timeout=30, verify=False) # one for all: making one reads all certificates


@pytest.fixture(autouse=True, scope="module")
def _close():
    yield
    HTTP.close()


def ask(text="the cat", **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def events_of(text):
    """The data of a whole stream."""
    blocks = text.split("\n\n")
    assert blocks.pop() == "" and all(block.startswith((":", "data: ")) for block in blocks)
    return [json.loads(block[6:]) for block in blocks if not block.startswith(":") and block != "data: [DONE]"]


def post(server, path="/chat/completions", headers=None, **body):
    return HTTP.post(server.url + path, json=body or ask(), headers=headers)


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.fixture(scope="module")
def hello():
    with running(ChainModel(HELLO)) as server:
        yield server


@pytest.fixture(scope="module")
def calling():
    with running(ChainModel(CALL)) as server:
        yield server


@pytest.fixture(scope="module")
def real():
    """A tiny GPT with random weights, whose answers depend on everything."""
    with running(tiny_model(TOKENIZER), max_batch=4) as server:
        yield server


@pytest.fixture()
def endless():
    with running(ChainModel(FOREVER, seconds=0.02, sequence_len=2000), max_batch=2, max_queue=1) as server:
        yield server


def client_of(server, **kwargs):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", http_client=HTTP, **{"max_retries": 0} | kwargs)


MESSAGES = ask()["messages"]

# ---- the page's endpoint ----

def test_events_of_an_answer(hello):
    response = post(hello)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"] and "🙂" in response.text # not escaped
    *tokens, done = events_of(response.text)
    assert "".join(event["token"] for event in tokens) == "hé🙂!" and {event["gpu"] for event in tokens} == {0}
    assert done["done"] is True and done["finish_reason"] == "stop"
    num = len(build_prompt(TOKENIZER, to_turns(MESSAGES)[1], 99).ids)
    assert done["usage"] | {"cached_tokens": 0} == \
        {"prompt_tokens": num, "completion_tokens": 8, "cached_tokens": 0, "dropped_turns": 0}
    assert done["timings"]["first_token_ms"] >= done["timings"]["queue_ms"] >= 0


def test_a_call_of_the_calculator_is_told_in_two_events(calling):
    events = events_of(post(calling).text)
    assert [event.get("token") or event.get("tool") for event in events[:-1]] == \
        ["x", {"expression": "6*7"}, {"expression": "6*7", "result": "42"}, "y", "z"]


def test_an_answer_that_comes_back_as_parts_is_found_in_the_cache(calling):
    first = events_of(post(calling, **ask("and the dog")).text)[-1]["usage"]
    parts = [{"type": "text", "text": "x"}, {"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"},
             {"type": "text", "text": "yz"}]
    messages = [*ask("and the dog")["messages"], {"role": "assistant", "content": parts}, *MESSAGES]
    second = events_of(post(calling, messages=messages).text)[-1]["usage"]
    assert second["cached_tokens"] >= first["prompt_tokens"] + first["completion_tokens"] - 3 # yz may be one token


def test_the_oldest_turns_are_dropped_and_it_is_told(hello):
    turn = [{"role": "user", "content": "q" * 30}, {"role": "assistant", "content": "a" * 30}]
    done = events_of(post(hello, messages=[*turn * 3, *MESSAGES]).text)[-1]
    assert done["usage"]["dropped_turns"] == 2 and done["usage"]["prompt_tokens"] < 128


@pytest.mark.parametrize("body, words, param", [
    (ask("q" * 200), "has 204 tokens, but the context of the model holds 128", "messages"),
    (ask("q" * 8001), "1 to 8000 characters, got 8001", "messages"),
    (ask(""), "1 to 8000 characters, got 0", "messages"),
    ({"messages": []}, "at least 1 item", "messages"),
    ({"messages": MESSAGES * 501}, "at most 500 items", "messages"),
    ({"messages": MESSAGES * 2}, "must take turns", "messages"),
    ({"messages": [*MESSAGES, {"role": "assistant", "content": "a" * 32_000}, *MESSAGES]}, "32000", "messages"),
    ({"messages": [{"role": "system", "content": "a"}, *MESSAGES]}, "role user or assistant", "messages"),
    ({"messages": [{"content": "a"}]}, "messages.0.role: Field required", "messages.0.role"),
    (ask(temperature=2.1), "less than or equal to 2", "temperature"),
    (ask(temperature="hot"), "valid number", "temperature"),
    (ask(top_k=201), "less than or equal to 200", "top_k"),
    (ask(max_tokens=4097), "less than or equal to 4096", "max_tokens"),
    (ask(max_tokens=True), "valid integer", "max_tokens"),
    (ask(stop=["a"] * 5), "at most 4 items", "stop"),
    (ask(stop=""), "at least 1 character", "stop"),
    (ask(stop=["a", ""]), "at least 1 character", "stop.1"),
    ([1], "must be a JSON object", None),
])
def test_bad_requests_are_told_what_is_wrong(hello, body, words, param):
    error = error_of(HTTP.post(f"{hello.url}/chat/completions", json=body), 400)
    assert words in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"


def test_null_is_absence_and_zero_is_off(hello):
    nulls = dict.fromkeys(["temperature", "min_p", "max_tokens", "seed", "stop"])
    body = ask(top_k=0, top_p=0, nonsense={"a": [1]}, **nulls)
    assert events_of(post(hello, **body).text)[-1]["done"]


# ---- OpenAI's client ----

def test_openai_whole_answer(hello):
    client = client_of(hello)
    answer = client.chat.completions.create(model="d2-sft", messages=MESSAGES)
    assert [model.id for model in client.models.list()] == ["d2-sft"] == [client.models.retrieve("d2-sft").id]
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer._request_id
    assert answer.choices[0].message.content == "hé🙂!" and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].logprobs is None
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens == 8
    assert usage.prompt_tokens_details.cached_tokens >= 0


@pytest.mark.parametrize("with_usage", [False, True])
def test_openai_stream(hello, with_usage):
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    chunks = create(hello, stream=True, **options)
    usage = chunks.pop() if with_usage else None
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hé🙂!"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks) and (usage is None or usage.usage.completion_tokens == 8)
    raw = post(hello, "/v1/chat/completions", **ask(stream=True, **options)).text
    assert raw.endswith("data: [DONE]\n\n") and not re.search("^(id|retry|event):", raw, re.MULTILINE)
    assert ('"usage": null' in raw) == with_usage


def test_the_clients_own_accumulation_of_a_stream(hello):
    with client_of(hello).chat.completions.stream(model="d2-sft", messages=MESSAGES) as stream:
        assert stream.get_final_completion().choices[0].message.content == "hé🙂!"


def test_calls_of_the_calculator_are_parts_beside_the_text(calling):
    parts = [{"type": "text", "text": "x"}, {"type": "python", "text": "6*7"},
             {"type": "python_output", "text": "42"}, {"type": "text", "text": "y"}, {"type": "text", "text": "z"}]
    message = create(calling).choices[0].message
    assert message.content == "xyz" and message.parts == parts and message.tool_calls is None
    deltas = [chunk.choices[0].delta for chunk in create(calling, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == "xyz"
    assert [delta.part for delta in deltas if hasattr(delta, "part")] == parts[1:3]
    history = [*MESSAGES, message.model_dump(), *MESSAGES]
    assert create(calling, messages=history).usage.prompt_tokens_details.cached_tokens > 10


def create(server, **fields):
    fields = {"model": "d2-sft", "messages": MESSAGES, "max_tokens": 12} | fields
    answer = client_of(server).chat.completions.create(**fields)
    return list(answer) if fields.get("stream") else answer


def test_seeds_and_several_choices(real):
    def texts(**fields):
        return [choice.message.content for choice in create(real, n=3, **fields).choices]
    assert texts(seed=1) == texts(seed=1) != texts(seed=2)
    assert len(set(texts(seed=1))) == 3 and create(real, seed=1).choices[0].message.content == texts(seed=1)[0]
    assert len(set(texts(temperature=0))) == 1
    assert texts(seed=1, extra_body={"top_k": 1}) == texts(temperature=0)
    chunks = create(real, n=3, seed=1, stream=True)
    assert ["".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == i) for i in range(3)] == \
        texts(seed=1)


def test_stop_strings_and_lengths(hello):
    assert create(hello, stop="!").choices[0].message.content == "hé🙂"
    answer = create(hello, stop=["x", "é🙂"])
    assert answer.choices[0].message.content == "h" and answer.choices[0].finish_reason == "stop"
    assert create(hello, max_tokens=1).choices[0].finish_reason == "length"
    assert create(hello, max_tokens=1, max_completion_tokens=2).usage.completion_tokens == 2
    assert create(hello, max_tokens=3).choices[0].message.content == "hé"
    assert create(hello, max_tokens=2).choices[0].message.content == "h�" # it was cut inside a character


def test_logprobs(real):
    answer = create(real, logprobs=True, top_logprobs=3, temperature=0, max_tokens=6)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    assert bytes(byte for entry in entries for byte in entry.bytes).decode(errors="replace") == \
        answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 3 and entry.logprob == entry.top_logprobs[0].logprob < 0 for entry in entries)
    chunks = create(real, logprobs=True, top_logprobs=3, temperature=0, max_tokens=6, stream=True)
    streamed = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in entries]
    assert create(real, logprobs=True, temperature=0).choices[0].logprobs.content[0].top_logprobs == []


def test_logprobs_end_where_the_text_ends(hello):
    choice = create(hello, logprobs=True, stop="🙂").choices[0]
    assert "".join(bytes(entry.bytes).decode(errors="ignore") for entry in choice.logprobs.content) == "h"
    assert len(choice.logprobs.content) == 3 # the two bytes of é stand alone
    assert all(math.exp(entry.logprob) > 0.9 for entry in choice.logprobs.content)


def test_messages_that_only_openai_knows(real):
    text = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": text},
                {"role": "user", "content": "sat"}, {"role": "assistant", "content": None},
                {"role": "user", "content": "?"}]
    plain = [{"role": "user", "content": "be\n\nthe cat\n\nsat"}, {"role": "assistant", "content": ""},
             {"role": "user", "content": "?"}]
    one, two = (create(real, messages=m, temperature=0) for m in (messages, plain))
    assert one.usage.prompt_tokens == two.usage.prompt_tokens
    assert one.choices[0].message.content == two.choices[0].message.content


@pytest.mark.parametrize("fields, status, param, code", [
    ({"model": "gpt-4"}, 404, "model", "model_not_found"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "unsupported_parameter"),
    ({"frequency_penalty": -1}, 400, "frequency_penalty", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "unsupported_parameter"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "unsupported_parameter"),
    ({"n": 9}, 400, "n", None), ({"n": 0}, 400, "n", None), ({"temperature": -1}, 400, "temperature", None),
    ({"top_logprobs": 2}, 400, "top_logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", None),
    ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]}, 400, "messages", None),
    ({"messages": ask("q" * 200)["messages"]}, 400, "messages", "context_length_exceeded"),
    ({"messages": [*ask("q" * 70)["messages"], {"role": "assistant", "content": "a" * 70}, *MESSAGES]},
     400, "messages", "context_length_exceeded"), # nothing is left out behind the back of a program
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
     400, "messages", None),
])
def test_errors_of_the_openai_client(hello, fields, status, param, code):
    with pytest.raises(openai.APIStatusError) as caught:
        create(hello, **fields)
    assert (caught.value.status_code, caught.value.param, caught.value.code) == (status, param, code)
    assert type(caught.value) is {400: openai.BadRequestError, 404: openai.NotFoundError}[status]


def test_parameters_that_change_nothing_are_taken(hello):
    create(hello, presence_penalty=0, frequency_penalty=0.0, response_format={"type": "text"}, tools=[], user="me",
           tool_choice="none", metadata={}, store=False, service_tier="auto", logit_bias={},
           extra_body={"nonsense": [[1]], "seed": None})


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/models/gpt-4", "/nothing", "/vendor/none.js",
                                  "/vendor/..%2fgpt.py"])
def test_what_is_not_there(hello, path):
    error_of(HTTP.get(hello.url + path), 404)
    assert error_of(HTTP.get(f"{hello.url}/chat/completions"), 405)


# ---- bodies ----

NESTED = b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe\x00", NESTED, b'{"messages": "a"}', b"null", b"[" * 100_000,
                                  b'{"messages": [{"role": "\\ud800", "content": null}]}',
                                  b'{"seed": ' + b"9" * 5000 + b"}",
                                  b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
                                  b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
                                  b'{"messages": [{"role": "user", "content": "\xe9"}]}'])
def test_broken_bodies(hello, path, body):
    error_of(HTTP.post(hello.url + path, content=body, headers={"Content-Type": "application/json"}), 400)


@pytest.mark.parametrize("content", ["[" + "1," * 400_000 + "1]", "[" + "{}," * 300_000 + "1]"], ids=["1", "{}"])
def test_a_body_full_of_mistakes_is_refused_at_the_first(hello, content):
    """It was read to the end before, which stopped the server for ten seconds."""
    body = f'{{"messages": [{{"role": "user", "content": {content}}}], "stream": true}}'
    start = time.process_time() # of this process: of the server too
    error_of(HTTP.post(f"{hello.url}/v1/chat/completions", content=body), 400)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_that_are_too_large(hello, chunked):
    body = json.dumps(ask("a" * (1 << 20))).encode()
    content = (body[i:i + 65536] for i in range(0, len(body), 65536)) if chunked else body
    error = error_of(HTTP.post(f"{hello.url}/chat/completions", content=content), 413)
    assert "1048576 bytes" in error["message"]


# ---- leaving, waiting, ending ----

def is_idle(server):
    return lambda: HTTP.get(f"{server.url}/stats").json()["running"] == 0


def start_stream(server, path="/chat/completions", receive_buffer=None, **fields):
    """A raw connection on which a request was sent: what a client that leaves has."""
    body = json.dumps(ask(max_tokens=1500) | fields).encode()
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                 f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return sock


def stats(server):
    return HTTP.get(f"{server.url}/stats").json()


@pytest.mark.parametrize("path, fields", [("/chat/completions", {}), ("/v1/chat/completions", {"stream": True}),
                                          ("/v1/chat/completions", {}), ("/v1/chat/completions", {"n": 2})])
def test_who_leaves_frees_his_rows_at_once(endless, path, fields):
    sock = start_stream(endless, path, **fields)
    wait_for(lambda: endless.model.num_forwards > 4)
    sock.close()
    wait_for(lambda: stats(endless)["running"] == 0)
    seen = endless.model.num_forwards
    time.sleep(0.2) # ten steps
    assert endless.model.num_forwards == seen < 100
    assert not endless.service.answers


def test_who_leaves_while_he_waits_is_never_run(endless):
    running_ones = [start_stream(endless) for _ in range(2)]
    wait_for(lambda: stats(endless)["running"] == 2)
    queued = start_stream(endless)
    wait_for(lambda: stats(endless)["waiting"] == 1)
    queued.close()
    wait_for(lambda: stats(endless)["waiting"] == 0)
    assert stats(endless)["running"] == 2
    for sock in running_ones:
        sock.close()
    wait_for(lambda: stats(endless)["running"] == 0)


def test_who_leaves_before_anything_was_sent(endless):
    for _ in range(5):
        start_stream(endless).close()
    wait_for(lambda: post(endless, **ask(max_tokens=3)).status_code == 200) # not 429, which a lost place would give
    wait_for(lambda: not endless.service.answers and endless.service.num_running() == 0)


def test_who_leaves_while_a_long_prompt_is_read():
    with running(ChainModel(FOREVER, seconds=0.05, sequence_len=3000)) as server:
        sock = start_stream(server, **ask(("q" * 999 + " ") * 2)) # eight pieces
        wait_for(lambda: server.model.num_forwards == 2)
        sock.close()
        wait_for(lambda: stats(server)["running"] == 0)
        assert server.model.num_forwards < 8


def test_a_full_queue_is_told_and_retried(endless):
    socks = [start_stream(endless) for _ in range(3)]
    wait_for(lambda: stats(endless)["waiting"] == 1)
    response = post(endless)
    assert error_of(response, 429)["code"] == "queue_full" and response.headers["retry-after"] == "1"
    with pytest.raises(openai.RateLimitError):
        create(endless)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        patient = client_of(endless, max_retries=3).chat.completions
        answer = pool.submit(patient.create, model="d2-sft", messages=MESSAGES, max_tokens=2)
        time.sleep(0.2)
        for sock in socks:
            sock.close()
        assert answer.result().usage.completion_tokens == 2


def test_an_answer_has_its_time(monkeypatch):
    monkeypatch.setattr(nanochat.serving, "PING_SECONDS", 0.2)
    with running(ChainModel(FOREVER, seconds=0.02, sequence_len=5000), max_batch=1, request_timeout=1) as server:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            first = pool.submit(post, server, **ask(max_tokens=4000))
            wait_for(lambda: server.service.num_running() == 1)
            second = pool.submit(post, server, **ask(max_tokens=4000)) # does not get a row in time
            time.sleep(0.3)
            whole = post(server, "/v1/chat/completions", **ask(max_tokens=4000))
            assert error_of(whole, 504)["code"] == "timeout" and whole.headers["x-should-retry"] == "false"
            for response in (first.result(), second.result()):
                assert events_of(response.text)[-1]["error"]["message"] == "the answer took more than 1 seconds"
            assert second.result().text.startswith(": ping\n\n")
        wait_for(lambda: server.service.num_running() == 0)


def test_a_request_goes_where_its_beginning_was_read_unless_that_replica_is_much_busier():
    with running(ChainModel(FOREVER, seconds=0.02, sequence_len=2000), engines=3, max_batch=8) as server:
        workers, question = server.service.workers, "What was it that the big cat ate?"

        def gpu_and_cached(text):
            *_, last_token, done = events_of(post(server, **ask(text, max_tokens=3)).text)
            return last_token["gpu"], done["usage"]["cached_tokens"]

        def streams_to(gpu, texts):
            """Open streams, all of which must land on one replica."""
            before = workers[gpu].load
            socks = [start_stream(server, **ask(text)) for text in texts]
            wait_for(lambda: workers[gpu].load == before + len(texts))
            return socks
        other = streams_to(0, ["something else"]) # the first of those that are equally free
        home, cached = gpu_and_cached(question)
        assert (home, cached) == (1, 0)
        for i in range(3): # though 2 is as free
            gpu, cached = gpu_and_cached(f"{question} {i}")
            assert gpu == home and cached > 16
        more = streams_to(home, [f"{question} {i}" for i in "ab"]) # 2 of 8 rows more than the freest: not much
        assert gpu_and_cached(f"{question} c")[0] == home
        more += streams_to(home, [f"{question} d"])
        assert gpu_and_cached(f"{question} e") == (2, 0) # which has it from now on
        assert gpu_and_cached(f"{question} f")[1] > 16
        assert [worker.load for worker in workers] == [1, 3, 0]
        for sock in other + more:
            sock.close()
        wait_for(lambda: not server.service.answers)


def test_a_full_replica_gets_nothing_while_another_is_free():
    with running(ChainModel(FOREVER, seconds=0.02, sequence_len=2000), engines=2, max_batch=1) as server:
        socks = [start_stream(server, **ask("what is it that the cat ate?")) for _ in range(2)]
        wait_for(lambda: [worker.load for worker in server.service.workers] == [1, 1])
        for sock in socks:
            sock.close()
        wait_for(lambda: not server.service.answers)


@pytest.mark.parametrize("max_unsent, seconds", [(50, 60), (10**6, 1)], ids=["by the queue", "by the time"])
def test_who_does_not_read_loses_his_row(monkeypatch, max_unsent, seconds):
    """He keeps the connection; what is made for him soon fills the buffers of the kernel. A row is freed, then all."""
    monkeypatch.setattr(nanochat.serving, "MAX_UNSENT", max_unsent)
    monkeypatch.setattr(nanochat.serving, "STALL_SECONDS", seconds)
    with running(ChainModel(FOREVER, sequence_len=100_000), max_batch=8) as server:
        fields = {"stream": True, "n": 8, "logprobs": True, "top_logprobs": 20, "max_completion_tokens": 90_000}
        sock = start_stream(server, "/v1/chat/completions", receive_buffer=4096, **ask(**fields))
        wait_for(lambda: server.service.num_running() == 8)
        wait_for(lambda: server.service.num_running() == 0, seconds=60)
        assert server.model.num_forwards < 20_000
        if seconds == 1: # within it, the connection ends too
            wait_for(lambda: not server.service.answers)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(1 << 16):
                    pass
        sock.close()
        wait_for(lambda: not server.service.answers)


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(nanochat.serving, "STALL_SECONDS", 1)
    with running(ChainModel(HELLO)) as server, socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"POST /chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
        assert sock.recv(99).startswith(b"HTTP/1.1 408 ")


def test_an_engine_that_fails_ends_every_answer_and_the_server():
    with running(ChainModel(FOREVER, seconds=0.02, sequence_len=5000), max_batch=1) as server:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            streams = [pool.submit(post, server, **ask(max_tokens=4000)) for _ in range(2)]
            wait_for(lambda: server.service.num_waiting() == 1)
            server.model.failure = RuntimeError("out of memory")
            for stream in streams:
                assert events_of(stream.result().text)[-1]["error"]["type"] == "server_error"
        server.thread.join(10)
        assert "the engine failed (RuntimeError: out of memory)" in str(server.errors[0])


def test_logits_that_are_not_finite_end_their_own_request_alone():
    """The model says a, b, ~ and then has only NaN to say; an answer of two tokens never comes there."""
    with running(ChainModel(path_of("ab~"), seconds=0.02, sequence_len=2000)) as server:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            other = pool.submit(post, server, **ask(max_tokens=2))
            streamed = post(server, **ask(max_tokens=50))
            *tokens, last = events_of(streamed.text)
            assert "".join(event["token"] for event in tokens) == "ab~" and last["error"]["type"] == "server_error"
            assert "logits are not finite" in last["error"]["message"]
            whole = post(server, "/v1/chat/completions", **ask(n=2))
            assert error_of(whole, 500)["message"] == last["error"]["message"]
            assert whole.headers["x-should-retry"] == "false"
            assert events_of(other.result().text)[-1]["done"]
        assert events_of(post(server, **ask(max_tokens=2)).text)[-1]["done"] and not server.errors
        wait_for(lambda: server.service.num_running() == 0)


def test_draining_lets_answers_end_and_takes_no_more():
    with running(ChainModel(FOREVER, seconds=0.02, sequence_len=5000), drain=30) as server:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            stream = pool.submit(post, server, **ask(max_tokens=40))
            wait_for(lambda: server.service.num_running() == 1)
            server.service.drain(30)
            health = HTTP.get(f"{server.url}/health")
            assert health.status_code == 503 and health.json()["status"] == "draining" and not health.json()["ready"]
            assert error_of(post(server), 503)["code"] == "shutting_down"
            assert events_of(stream.result().text)[-1]["done"]
        server.thread.join(10)
        assert not server.thread.is_alive()


def test_draining_has_an_end():
    with running(ChainModel(FOREVER, seconds=0.02, sequence_len=5000)) as server:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            stream = pool.submit(post, server, **ask(max_tokens=4000))
            wait_for(lambda: server.service.num_running() == 1)
            server.service.drain(0.5)
            assert events_of(stream.result().text)[-1]["error"]["code"] == "shutting_down"
        server.thread.join(3)
        assert not server.thread.is_alive()


def test_health_does_not_wait_for_the_engine():
    """A tenth of a step, and not a second, is the measure: this machine may have more to do."""
    step = 1.0
    with running(ChainModel(FOREVER, step, sequence_len=5000), max_batch=16) as server:
        socks = [start_stream(server) for _ in range(20)]
        wait_for(lambda: (stats(server)["running"], stats(server)["waiting"]) == (16, 4))
        times = []
        for _ in range(30):
            start = time.monotonic()
            assert HTTP.get(f"{server.url}/health").json()["available_workers"] == 0
            times.append(time.monotonic() - start)
        for sock in socks:
            sock.close()
        wait_for(lambda: not server.service.answers)
    assert sorted(times)[15] < step / 10, times


def test_a_model_that_says_only_invalid_bytes():
    with running(ChainModel([0xFF, 0xFE, 0xC3])) as server:
        *tokens, done = events_of(post(server, **ask(max_tokens=5)).text)
        assert "".join(event["token"] for event in tokens) == "\ufffd" * 5 and done["finish_reason"] == "length"


# ---- doors ----

def test_the_key_is_asked_for(caplog):
    with running(ChainModel(HELLO), api_key="s3cret ä") as server:
        for path in ("/v1/models", "/stats", "/metrics", "/v1/nothing"):
            response = HTTP.get(server.url + path)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        error_of(post(server), 401)
        error_of(post(server, headers={"Authorization": "Bearer wrong"}), 401)
        right = {"Authorization": "Bearer s3cret ä".encode()}
        assert post(server, headers=right).status_code == 200
        assert HTTP.get(f"{server.url}/stats", headers=right).status_code == 200
        assert HTTP.get(f"{server.url}/health").json()["needs_key"] is True


def test_other_origins_are_not_invited(hello):
    origin = {"Origin": "https://evil.example"}
    assert not [name for name in HTTP.get(f"{hello.url}/health", headers=origin).headers if "access-control" in name]
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with running(ChainModel(HELLO), cors_origins=["https://good.example"], api_key="a") as server:
        good = {**preflight, "Origin": "https://good.example"}
        answer = HTTP.options(f"{server.url}/v1/chat/completions", headers=good)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://good.example"
        assert "access-control-allow-credentials" not in answer.headers
        bad = HTTP.options(f"{server.url}/v1/chat/completions", headers=preflight)
        assert bad.status_code == 400 and "access-control-allow-origin" not in bad.headers
        assert "access-control-allow-origin" in HTTP.get(f"{server.url}/stats", headers=good).headers # of an error too


def test_health_stats_and_metrics(hello):
    health = HTTP.get(f"{hello.url}/health").json()
    assert health["status"] == "ok" and health["ready"] and health["model"] == "d2-sft" and health["context"] == 128
    assert health["num_gpus"] == health["available_workers"] == 1 and not health["needs_key"] and health["examples"]
    assert health["defaults"] == {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 20}
    assert stats(hello) == {"total_workers": 1, "available_workers": 1, "busy_workers": 0, "running": 0, "waiting": 0,
                            "workers": [{"gpu_id": 0, "device": "cpu"}], "max_batch": 16, "max_queue": 64}
    before, _ = (HTTP.get(f"{hello.url}/metrics").text, post(hello))
    after = HTTP.get(f"{hello.url}/metrics").text

    def value(text, name):
        return float(re.search(rf"^nanochat_{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])
    for name, more in [("generation_tokens_total", 8), ("time_to_first_token_seconds_count", 1),
                       ('requests_total{status="200"}', 2), ("requests_running", 0)]:
        assert value(after, name) == value(before, name) + more


def test_the_page_and_its_files_come_from_the_package(hello, tmp_path, monkeypatch):
    monkeypatch.setattr(nanochat.serving.resources, "files", lambda package: tmp_path)
    error_of(HTTP.get(hello.url), 404)
    error_of(HTTP.get(f"{hello.url}/vendor/a.js"), 404)
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor" / "a.js").write_text("1")
    (tmp_path / "ui.html").write_text('<script nonce="{{nonce}}"></script>')
    (tmp_path / "logo.svg").write_text("<svg/>")
    pages = [HTTP.get(hello.url) for _ in range(2)]
    nonces = [re.fullmatch(r'<script nonce="(\S+)"></script>', page.text)[1] for page in pages]
    assert len(set(nonces)) == 2
    assert f"script-src 'self' 'nonce-{nonces[0]}';" in pages[0].headers["content-security-policy"]
    assert pages[0].headers["x-content-type-options"] == "nosniff" and "text/html" in pages[0].headers["content-type"]
    assert HTTP.get(f"{hello.url}/logo.svg").headers["content-type"] == "image/svg+xml"
    assert HTTP.get(f"{hello.url}/vendor/a.js").headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize("is_logged", [False, True])
def test_what_was_said_is_logged_only_on_demand(caplog, is_logged):
    with caplog.at_level("INFO", "nanochat.serving"), running(ChainModel(HELLO), log_conversations=is_logged) as server:
        request_id = post(server, **ask("my secret")).headers["x-request-id"]
    assert re.search(rf"{request_id} 200 prompt \d+ \(cached 0\) completion 8 queue .* tok/s stop", caplog.text)
    assert ("my secret" in caplog.text) == ("hé🙂!" in caplog.text) == is_logged


# ---- requests nobody thought of ----

WORDS = {"role": ["user"] * 9 + ["assistant", "system", "tool"], "model": ["d2-sft"],
         "type": ["text", "text", "python", "python_output", "image_url"]}
JUNK = [None, True, -1, 2**70, 1.5, 1e300, "", "a", "\ud800", "<|bos|>", [], [[]], {}, {"": {}}, ["a", 1],
        {"type": "text"}]


def value_of(rng, schema, document, name=""):
    """A value that a JSON schema of an OpenAPI document describes, and now and then another one."""
    if rng.random() < 0.01:
        return rng.choice(JUNK)
    if name == "content" and rng.random() < 0.7: # or hardly a request would be sound
        return "the cat"
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        return value_of(rng, rng.choice(schema["anyOf"]), document, name)
    low, high = max(schema.get("minimum", 0), -9), min(schema.get("maximum", 99), 300)
    if schema["type"] == "object":
        chosen = {key: value for key, value in schema.get("properties", {}).items()
                  if rng.random() < (0.99 if key in schema.get("required", ()) else 0.9 if key == "content" else 0.2)}
        extra = {rng.choice(["nonsense", "tools", "presence_penalty"]): rng.choice(JUNK)} if rng.random() < 0.1 else {}
        return {key: value_of(rng, value, document, key) for key, value in chosen.items()} | extra
    if schema["type"] == "array":
        return [value_of(rng, schema["items"], document) for _ in range(rng.choice([1, 1, 1, 2, 3, 5]))]
    if schema["type"] == "string":
        text = "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD800)])) for _ in range(rng.randrange(9)))
        return rng.choice(WORDS.get(name, [text]))
    return {"integer": rng.randint(int(low), int(high)), "number": rng.uniform(low, high),
            "boolean": rng.random() < 0.5, "null": None}[schema["type"]]


@pytest.mark.parametrize("num", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_whatever_is_sent_there_is_an_answer_or_an_error(hello, num):
    document = HTTP.get(f"{hello.url}/openapi.json").json()
    schemas = {path: document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
               for path in ("/chat/completions", "/v1/chat/completions")}
    seen = Counter()

    @given(st.integers(0, 2**64))
    @settings(max_examples=num, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def check(seed):
        rng = random.Random(seed)
        path = rng.choice(sorted(schemas))
        body = json.dumps(value_of(rng, schemas[path], document)).encode()
        body = body[:rng.randrange(len(body) + 1)] if rng.random() < 0.03 else body
        response = HTTP.post(hello.url + path, content=body, headers={"Content-Type": "application/json"})
        seen[response.status_code] += 1
        if response.status_code == 200:
            assert '"error"' not in response.text
        else:
            assert 400 <= response.status_code < 500
            error_of(response, response.status_code)
    check()
    assert seen[200] > num / 50 and seen[400] > num / 50, seen
    assert sum(seen.values()) >= num
