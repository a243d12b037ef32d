"""Identity conversations from a real HTTP server that imitates an OpenAI-compatible endpoint, with faults on demand."""
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dev import gen_synthetic_data as gen
from nanochat.common import UserError
from tasks.customjson import CustomJSON

GOOD = {"messages": [{"role": "user", "content": "Wer bist du?\u2028"},
                     {"role": "assistant", "content": "Ich bin nanochat."}]}
BAD = { # replies that a model really gives, and that would not do
    "prose": "I cannot do that.", "list": "[1, 2]", "empty": "", "null": None,
    "no answer": json.dumps({"messages": GOOD["messages"][:1]}),
    "ends with the user": json.dumps({"messages": GOOD["messages"] + GOOD["messages"][:1]}),
    "roles": json.dumps({"messages": [{"role": "assistant", "content": "x"}] * 2}),
    "blank": json.dumps({"messages": [GOOD["messages"][0], {"role": "assistant", "content": " "}]}),
    "half a character": json.dumps({"messages": [GOOD["messages"][0], {"role": "assistant", "content": "\ud83d"}]}),
    "numbers": json.dumps({"messages": [GOOD["messages"][0], {"role": "assistant", "content": 5}]})}


class Endpoint(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append((self.path, self.headers.get("Authorization"), body))
            fault = server.faults.pop(0) if server.faults else None
        if fault == "drop":
            self.close_connection = True
            return
        if isinstance(fault, int):
            data = b'{"error": {"message": "no such thing"}}'
        else:
            content = "Here it is:\n```json\n" + json.dumps(GOOD) + "\n```" if fault is None else BAD[fault]
            data = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
        if fault == "garbled":
            data = data[:20]
        self.send_response(fault if isinstance(fault, int) else 200)
        self.send_header("Content-Length", str(len(data)))
        if fault == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)


BAD["garbled"] = "" # the JSON of the reply itself is cut


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.daemon_threads = True
    server.lock, server.seen, server.faults = threading.Lock(), [], []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-test")
    yield server
    server.shutdown()
    server.server_close()


def run(server, *flags):
    gen.main([f"--url=http://127.0.0.1:{server.server_address[1]}/v1", "--backoff=0.001", "--timeout=10", *flags])


def test_what_is_sent_and_what_is_written(endpoint, tmp_path):
    (tmp_path / "persona.md").write_text("It is {braced} Zibble, a model of 3 layers.")
    run(endpoint, "-n", "6", f"--persona={tmp_path / 'persona.md'}", "--model=m")
    task = CustomJSON(tmp_path / "identity_conversations.jsonl")
    assert len(task) == 6 and task[5]["messages"] == GOOD["messages"]
    assert not (tmp_path / "identity_conversations.jsonl.partial").exists()
    paths, keys, bodies = zip(*endpoint.seen)
    assert set(paths) == {"/v1/chat/completions"} and set(keys) == {"Bearer sk-test"}
    assert {body["model"] for body in bodies} == {"m"} and bodies[0]["stream"] is False
    schema = bodies[0]["response_format"]["json_schema"]
    assert schema["strict"] is True and schema["schema"]["additionalProperties"] is False
    prompts = {body["messages"][0]["content"] for body in bodies}
    assert len(prompts) == 6, "every conversation draws others from the lists"
    assert all("{braced} Zibble" in prompt for prompt in prompts)


def test_draws_are_without_repetition_and_the_same_again(endpoint, tmp_path):
    args = gen.build_parser().parse_args([])
    lists = {"openers": list("abcdef"), "mood": ["sad", "glad"]}
    prompts = [gen.build_prompt(index, args, lists) for index in range(20)]
    assert prompts == [gen.build_prompt(index, args, lists) for index in range(20)] and len(set(prompts)) > 15
    for prompt in prompts:
        drawn = json.loads(prompt.split("not the same: ")[1].split("\n")[0])
        assert len(set(drawn)) == 5
    assert 0 < sum("mood: sad" in prompt for prompt in prompts) < 20


@pytest.mark.parametrize("fault", [429, 500, 503, "drop", *BAD])
def test_what_may_pass_is_tried_again(endpoint, tmp_path, fault):
    endpoint.faults = [fault] * 4
    run(endpoint, "-n", "1")
    assert len(endpoint.seen) == 5 and len(CustomJSON(tmp_path / "identity_conversations.jsonl")) == 1


@pytest.mark.parametrize("fault, cure", [
    (401, "put a valid key into OPENROUTER_API_KEY"), (404, "check --url and --model"),
    (400, "try --response-format json_object or text"), (402, "see the server's message")])
def test_what_will_not_pass_ends_it_at_once(endpoint, fault, cure):
    endpoint.faults = [fault] * 100
    with pytest.raises(UserError, match=f"HTTP {fault} .*no such thing.*{cure}") as error:
        run(endpoint, "-n", "50", "--workers=2")
    assert len(endpoint.seen) < 10 and "sk-test" not in str(error.value)


def test_an_interrupted_run_goes_on_and_loses_nothing(endpoint, tmp_path):
    out, partial = tmp_path / "identity_conversations.jsonl", tmp_path / "identity_conversations.jsonl.partial"
    endpoint.faults = [None, None, "prose", "prose", 500, 500]
    with pytest.raises(UserError, match="2 of 4 conversations are missing .*HTTP 500.*goes on with the 2 in "):
        run(endpoint, "-n", "4", "--attempts=2", "--workers=1")
    assert not out.exists() and len(partial.read_text("utf-8").split("\n{")) == 3
    with open(partial, "a") as file:
        file.write('{"settings": "') # a crash in the middle of a line
    run(endpoint, "-n", "4", "--workers=1")
    assert len(endpoint.seen) == 6 + 2 and len(CustomJSON(out)) == 4
    with pytest.raises(SystemExit) as error:
        run(endpoint, "-n", "4")
    assert error.value.code == 2 and len(CustomJSON(out)) == 4


def test_conversations_of_another_persona_are_not_mixed_in(endpoint, tmp_path):
    endpoint.faults = [None, 500]
    with pytest.raises(UserError):
        run(endpoint, "-n", "2", "--attempts=1", "--workers=1")
    (tmp_path / "other.md").write_text("another one")
    run(endpoint, "-n", "2", f"--persona={tmp_path / 'other.md'}")
    assert len(endpoint.seen) == 4


def test_an_endpoint_that_is_not_there_and_mistakes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="1 of 1 conversations are missing .*ConnectionError"):
        gen.main(["--url=http://127.0.0.1:9", "-n1", "--attempts=2", "--backoff=0.001"])
    (tmp_path / "lists.json").write_text('{"openers": []}')
    for flags, told in ((["-n0", "--persona=nowhere"], "--num must be at least 1, got 0; there is no nowhere"),
                        ([f"--diversity={tmp_path / 'lists.json'}"], 'that are not empty, one of them "openers"')):
        with pytest.raises(SystemExit) as error:
            gen.main(flags)
        assert error.value.code == 2 and told in capsys.readouterr().err


def test_the_lists_are_as_the_specification_wants_them():
    lists = json.loads((gen.DEV / "diversity.json").read_text("utf-8"))
    openers = set(lists["openers"])
    assert len(openers) == 200 and sum(not opener.isascii() for opener in openers) >= 40
