"""The chat page in a real browser (Debian's chromium), against a server that follows the contract and plays scripts."""
import hashlib
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from tests.chat_page_server import CUT, DONE, END, ChatPageServer, Refuse, as_event

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CALL = {"tool": {"expression": "12*3"}, "gpu": 0}
RESULT = {"tool": {"expression": "12*3", "result": "36"}, "gpu": 0}


def test_the_vendored_library_is_the_published_one_with_its_licence():
    data = (ROOT / "nanochat/vendor/markdown-it.min.js").read_bytes()
    assert hashlib.sha256(data).hexdigest() == "38c70a1e7ca91ab40e2d9e6e60129851a717ed1c7d4acbbdd41bf9503791cf68"
    assert "Permission is hereby granted" in (ROOT / "nanochat/vendor/markdown-it.LICENSE").read_text("utf-8")


def test_the_page_is_short_self_contained_and_has_nothing_that_the_policy_forbids():
    text = (ROOT / "nanochat/ui.html").read_text("utf-8")
    lines = text.splitlines()
    assert len(lines) <= 600 and max(map(len, lines)) <= 120
    assert set(re.findall(r'(?:src|href)="([^"#$]+)"', text)) == {"/logo.svg", "/vendor/markdown-it.min.js"}
    assert not re.search(r"https?://\w", text), "no other origin"
    assert not re.search(r"<[^>]*\son\w+=|\beval\(|new Function|javascript:", text)
    assert text.count('nonce="{{nonce}}"') == 1


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright import sync_api
    except ImportError:
        sync_api = None
    if sync_api is None or CHROMIUM is None:
        assert "NANOCHAT_REQUIRE_BROWSER" not in os.environ, "playwright or chromium is missing"
        pytest.skip("needs playwright and chromium")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def module_server():
    with ChatPageServer() as server:
        yield server


@pytest.fixture
def server(module_server):
    module_server.reset()
    return module_server


@pytest.fixture
def open_page(browser, server):
    """Opens the page in a context of its own. At the end: no request to another origin, no script error, no dialog."""
    contexts, troubles = [], []

    def watch(page):
        page.on("pageerror", lambda error: troubles.append(f"script error: {error}"))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda line: troubles.append(line.text) if "Content Security Policy" in line.text else None)

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 760}, **options})
        contexts.append(context)
        context.set_default_timeout(30_000)
        context.on("page", watch)
        context.on("request", lambda request: None if request.url.startswith((server.url + "/", "data:"))
                   else troubles.append(f"request to {request.url}"))
        page = context.new_page()
        page.goto(server.url)
        page.get_by_text("d4-test").wait_for(state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles


@pytest.fixture
def page(open_page):
    return open_page()


def say(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def ask(page, text):
    """Send a message and wait for the end of its answer; returns the answer's element."""
    say(page, text)
    finished(page)
    return page.locator(".assistant").last


def finished(page):
    page.locator("body:not([data-running])").wait_for()


def stored(page):
    return page.evaluate("Object.entries(localStorage).filter(([key]) => key.startsWith('nanochat.1.'))"
                         ".map(([key, value]) => JSON.parse(value))")


def expect_text(locator, text):
    locator.filter(has_text=text).wait_for()


def until(condition, message):
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.05)


# --- a conversation ---

def test_type_and_stream(page, server):
    assert page.title() == "NanoChat"
    assert page.evaluate("document.activeElement.id") == "input"
    assert page.get_by_label("Send").is_disabled()
    go_on = threading.Event()
    server.play("**Hel", go_on, "lo** wör", "ld 🙂", DONE)
    say(page, "Hi <b>there</b>\n")
    expect_text(page.locator(".bubble"), "Hi <b>there</b>")
    expect_text(page.locator(".assistant"), "Hel")
    assert page.get_by_label("Stop").is_visible() and not page.get_by_label("Send").is_visible()
    go_on.set()
    finished(page)
    assert page.locator(".assistant .markdown").inner_html() == "<p><strong>Hello</strong> wörld 🙂</p>\n"
    assert "43.2 tokens/s · first token after 0.21 s" in page.locator(".assistant footer").inner_text()
    assert page.get_by_label("Send").is_visible() and page.get_by_label("Message", exact=True).input_value() == ""
    body = server.requests[0].body
    assert body["messages"] == [{"role": "user", "content": "Hi <b>there</b>"}]
    assert 0 <= body.pop("seed") < 2 ** 31
    del body["messages"]
    assert body == {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0, "max_tokens": 300}
    ask(page, "again")
    assert [message["role"] for message in server.requests[1].body["messages"]] == ["user", "assistant", "user"]
    assert server.requests[1].body["messages"][1]["content"] == "**Hello** wörld 🙂"


def test_shift_enter_breaks_the_line_and_the_input_grows_up_to_a_limit(page):
    field = page.get_by_label("Message", exact=True)
    assert field.bounding_box()["height"] == 54
    field.press_sequentially("one")
    field.press("Shift+Enter")
    field.press_sequentially("two")
    assert field.input_value() == "one\ntwo"
    field.fill("line\n" * 50)
    assert field.bounding_box()["height"] == 200


def test_enter_that_ends_an_input_method_does_not_send(page, server):
    field = page.get_by_label("Message", exact=True)
    field.fill("にほん")
    field.dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True})
    assert server.requests == [] and field.input_value() == "にほん"
    field.press("Enter")
    expect_text(page.locator(".bubble"), "にほん")


def test_a_calculator_call_is_a_card_and_goes_back_as_parts(page, server):
    go_on = threading.Event()
    server.play("That is ", CALL, go_on, RESULT, "**36**.", DONE)
    say(page, "12*3?")
    expect_text(page.locator(".call"), "12*3 = …")
    go_on.set()
    finished(page)
    assert page.locator(".call").inner_text().strip() == "12*3 = 36"
    assert page.locator(".markdown strong").inner_text() == "36"
    ask(page, "sure?")
    assert server.requests[1].body["messages"][1]["content"] == [
        {"type": "text", "text": "That is "}, {"type": "python", "text": "12*3"},
        {"type": "python_output", "text": "36"}, {"type": "text", "text": "**36**."}]


def test_markdown_has_tables_code_and_lists(page, server):
    server.play("| a | b |\n|--|--:|\n| 1 | 2 |\n\n```python\nprint('<hi>')\n```\n\n- one\n- two\n\n",
                "[x](https://example.org)", DONE)
    answer = ask(page, "all of it")
    assert answer.locator("table td").all_inner_texts() == ["1", "2"]
    assert answer.locator("pre").inner_text() == "print('<hi>')\n"
    assert answer.locator("li").count() == 2
    link = answer.locator("a")
    assert (link.get_attribute("rel"), link.get_attribute("target")) == ("noopener noreferrer", "_blank")


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_what_has_come(page, server, how):
    server.play("first part", *[step for n in range(600) for step in (0.05, f" {n}")], DONE)
    say(page, "count")
    expect_text(page.locator(".assistant"), "first part 0")
    if how == "button":
        page.get_by_label("Stop").click()
    else:
        page.keyboard.press("Escape")
    finished(page)
    text = page.locator(".assistant .markdown").inner_text()
    assert "stopped" in page.locator(".assistant footer").inner_text()
    page.wait_for_timeout(300)
    assert page.locator(".assistant .markdown").inner_text() == text, "late pieces are ignored"
    until(lambda: server.requests[0].left, "the server must see that the client has left")
    assert stored(page)[0]["entries"][1]["parts"][0]["text"].strip() == text
    ask(page, "go on")
    assert server.requests[1].body["messages"][1]["content"].strip() == text


def test_stop_before_the_first_word_stores_no_empty_answer(page, server):
    server.play(threading.Event(), "late", DONE)
    say(page, "hello")
    page.locator(".waiting i").first.wait_for()
    until(lambda: server.requests, "a request stopped on its way would leave its script to the next one")
    page.get_by_label("Stop").click()
    expect_text(page.locator(".problem"), "Stopped before it began.")
    assert [entry["role"] for entry in stored(page)[0]["entries"]] == ["user"]
    ask(page, "other words")
    assert [message["content"] for message in server.requests[1].body["messages"]] == ["hello\n\nother words"]


def test_a_new_conversation_stops_the_answer_and_late_pieces_do_not_follow(page, server):
    server.play("old", *[step for n in range(600) for step in (0.05, " old")], DONE)
    say(page, "first")
    expect_text(page.locator(".assistant"), "old")
    page.keyboard.press("Control+Shift+O")
    assert page.locator(".entry").count() == 0
    answer = ask(page, "second")
    page.wait_for_timeout(300)
    assert answer.locator(".markdown").inner_text() == "You said: second"
    assert server.requests[1].body["messages"] == [{"role": "user", "content": "second"}]
    page.locator("aside").get_by_text("first").click()
    assert "old" in page.locator(".assistant .markdown").inner_text()


def test_regenerate_replaces_the_answer_and_can_be_undone(page, server):
    server.play("answer one", DONE)
    ask(page, "question")
    ask(page, "later")
    server.play("answer two", DONE)
    page.locator(".assistant").first.get_by_label("Regenerate answer").click()
    finished(page)
    assert page.locator(".markdown").all_inner_texts() == ["answer two"]
    assert server.requests[2].body["messages"] == [{"role": "user", "content": "question"}]
    page.get_by_text("Undo").click()
    assert page.locator(".markdown").all_inner_texts() == ["answer one", "You said: later"]


def test_edit_takes_back_the_right_messages_and_cancel_restores_them(page, server):
    for text in ("one", "/temperature", "two", "three"):
        ask(page, text)
    page.locator(".user").nth(1).get_by_label("Edit message").click()
    field = page.get_by_label("Message", exact=True)
    assert field.input_value() == "two"
    assert page.locator(".bubble").all_inner_texts() == ["one"] and page.locator(".note").count() == 1
    assert len(stored(page)[0]["entries"]) == 6, "the store keeps all until the new text is sent"
    page.keyboard.press("Escape")
    assert page.locator(".bubble").all_inner_texts() == ["one", "two", "three"] and field.input_value() == ""
    page.locator(".user").nth(1).get_by_label("Edit message").click()
    ask(page, "two, better")
    assert page.locator(".bubble").all_inner_texts() == ["one", "two, better"]
    sent = server.requests[-1].body["messages"]
    assert [message["content"] for message in sent] == ["one", "You said: one", "two, better"]


def test_a_cancelled_edit_restores_its_own_messages_whatever_was_deleted_meanwhile(page, server):
    ask(page, "other")
    page.get_by_label("New conversation").click()
    ask(page, "mine")
    page.get_by_label("Edit message").click()
    page.get_by_label("Rename other").locator("..").hover()
    page.get_by_label("Delete other").click()
    page.get_by_label("Message", exact=True).press("Escape")
    assert page.locator(".bubble").all_inner_texts() == ["mine"]
    assert page.locator(".title").all_inner_texts() == ["mine"]
    page.reload()
    assert page.locator(".markdown").all_inner_texts() == ["You said: mine"]


def test_copy_message_answer_and_code(open_page, server):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    server.play("See **this**:\n\n```sh\nls -l\n```\n", CALL, RESULT, DONE)
    answer = ask(page, "How?")
    for button, expected in ((page.get_by_label("Copy message"), "How?"), (answer.locator(".bar button"), "ls -l\n"),
                             (answer.get_by_label("Copy answer"), "See **this**:\n\n```sh\nls -l\n```\n12*3 = 36")):
        button.click()
        page.wait_for_function("text => navigator.clipboard.readText().then(found => found === text)", arg=expected)


def test_examples_of_the_server_start_a_conversation(page, server):
    page.get_by_text("What is the capital of France?").click()
    expect_text(page.locator(".markdown"), "You said: What is the capital of France?")


# --- what is kept ---

def test_reload_keeps_history_and_the_list_renames_and_deletes(page, server):
    server.play("kept **bold**", DONE)
    ask(page, "remember me")
    page.reload()
    assert page.locator(".bubble").inner_text() == "remember me"
    assert page.locator(".markdown strong").inner_text() == "bold"
    assert "43.2 tokens/s" in page.locator(".assistant footer").inner_text()
    page.get_by_label("New conversation").click()
    ask(page, "another")
    assert page.locator(".title").all_inner_texts() == ["another", "remember me"]
    page.get_by_label("Rename remember me").locator("..").hover()
    page.get_by_label("Rename remember me").click()
    page.keyboard.type("Old <i>times</i>")
    page.keyboard.press("Enter")
    expect_text(page.locator(".title"), "Old <i>times</i>")
    page.reload()
    assert page.locator(".title").all_inner_texts() == ["another", "Old <i>times</i>"]
    page.get_by_label("Delete another").click()
    assert page.locator(".title").all_inner_texts() == ["Old <i>times</i>"] and page.locator(".entry").count() == 0
    page.get_by_text("Undo").click()
    assert page.locator(".title").all_inner_texts() == ["another", "Old <i>times</i>"]
    page.get_by_label("Delete another").locator("..").hover()
    page.get_by_label("Delete another").click()
    page.reload()
    assert page.locator(".title").all_inner_texts() == ["Old <i>times</i>"]


def test_an_answer_that_a_reload_cuts_off_is_kept_as_interrupted(page, server):
    server.play("half an", threading.Event(), " answer", DONE)
    say(page, "long one")
    expect_text(page.locator(".markdown"), "half an")
    page.reload()
    assert page.locator(".markdown").inner_text() == "half an"
    expect_text(page.locator(".problem"), "Interrupted")
    page.get_by_text("Retry").click()
    expect_text(page.locator(".markdown"), "You said: long one")


def test_a_full_store_is_told_and_foreign_entries_are_left_alone(page, server):
    page.evaluate("""() => {
        localStorage.setItem("nanochat.2.later", '{"id": "later", "entries": []}');
        localStorage.setItem("nanochat.1.broken", '{"version');
        let text = "x".repeat(1 << 20);
        for (let n = 0; text; n++) {
            try { localStorage.setItem("fill" + n, text); } catch { text = text.slice(text.length / 2 + 1); }
        }
    }""")
    page.reload()
    ask(page, "no room " + "x" * 3000)
    expect_text(page.locator("#toast"), "not being saved")
    assert page.locator(".markdown").count() == 1
    assert page.evaluate("localStorage.getItem('nanochat.1.broken')") == '{"version'


# --- settings and commands ---

def test_settings_start_with_the_servers_and_are_sent(page, server):
    page.get_by_label("Settings", exact=True).first.click()
    fields = page.locator("dialog[open]")
    assert fields.get_by_label("Temperature").input_value() == "0.7"
    values = {"Temperature": "0", "Top-p": "0.5", "Top-k": "7", "Min-p": "0.1", "Longest": "20", "Seed": "3"}
    for label, value in values.items():
        fields.get_by_label(label).fill(value)
    fields.get_by_label("Top-k").fill("7000")
    assert fields.get_by_label("Top-k").get_attribute("aria-invalid") == "true"
    page.keyboard.press("Escape")
    ask(page, "hi")
    body = server.requests[0].body
    del body["messages"]
    assert body == {"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "max_tokens": 20, "seed": 3}
    page.get_by_label("Settings", exact=True).first.click()
    page.get_by_text("Server's defaults").click()
    assert fields.get_by_label("Temperature").input_value() == "0.7" and fields.get_by_label("Seed").input_value() == ""


def test_slash_commands(page, server):
    for command, line in (("/temperature", "Temperature: 0.7"), ("/TEMPERATURE 1.5", "Temperature: 1.5"),
                          ("/temperature 0.5abc", "must be a number from 0 to 2"), ("/temperature 2.1", "must be"),
                          ("/topk", "Top-k: 40"), ("/topk 12x", "must be a number from 1 to 200"),
                          ("/topk 0", "must be"), ("/topk 12", "Top-k: 12"), ("/help", "/clear"),
                          ("/nonsense", "Unknown command /nonsense")):
        say(page, command)
        expect_text(page.locator(".note").last, line)
    assert server.requests == [] and page.locator(".user").count() == 0
    ask(page, "//etc/hosts")
    assert page.locator(".bubble").inner_text() == "/etc/hosts"
    body = server.requests[0].body
    assert (body["temperature"], body["top_k"], body["messages"][0]["content"]) == (1.5, 12, "/etc/hosts")
    say(page, "/clear")
    assert page.locator(".entry").count() == 0


# --- slow and broken networks ---

@pytest.mark.parametrize("steps, problem", [
    (("partial", 0.2, CUT), "connection ended early"), (("partial", END), "connection ended early"),
    (("partial", {"error": {"message": "out of <b>memory</b>"}}), "Error: out of <b>memory</b>"),
    (("partial", b"data: {not json\n\n", DONE), "something unreadable")])
def test_a_broken_stream_is_marked_and_can_be_retried(page, server, steps, problem):
    server.play(*steps)
    answer = ask(page, "hello")
    expect_text(answer.locator(".problem"), problem)
    assert answer.locator(".markdown").inner_text() == "partial"
    answer.get_by_text("Retry").click()
    expect_text(page.locator(".markdown"), "You said: hello")
    assert page.locator(".problem:visible").count() == 0
    assert server.requests[1].body["messages"] == [{"role": "user", "content": "hello"}]


def test_an_empty_answer_is_not_stored(page, server):
    server.play(DONE)
    expect_text(ask(page, "say nothing").locator(".problem"), "An empty answer.")
    assert len(stored(page)[0]["entries"]) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(page, server, status):
    server.play(Refuse(status, "The queue is full.", retry_after=1))
    say(page, "hello")
    expect_text(page.locator(".waiting"), "The queue is full. Trying again in 1 s.")
    expect_text(page.locator(".markdown"), "You said: hello")
    assert len(server.requests) == 2


def test_a_refusal_shows_the_servers_reason(page, server):
    server.play(Refuse(400, "The prompt is <i>too long</i>."))
    expect_text(ask(page, "hello").locator(".problem"), "Error: The prompt is <i>too long</i>.")
    page.get_by_text("Retry").click()
    expect_text(page.locator(".markdown"), "You said: hello")


def test_while_the_server_is_away_history_is_readable_and_retry_waits(page, server):
    ask(page, "before")
    page.context.set_offline(True)
    answer = ask(page, "during")
    expect_text(answer.locator(".problem"), "Error: the server cannot be reached.")
    page.locator("#banner").wait_for()
    page.get_by_label("New conversation").click()
    page.locator(".title").first.click()
    assert page.locator(".bubble").all_inner_texts() == ["before", "during"]
    page.context.set_offline(False)
    page.get_by_text("Try now").click()
    page.locator("#banner").wait_for(state="hidden")
    page.locator(".problem:visible").get_by_text("Retry").click()
    expect_text(page.locator(".markdown"), "You said: during")


def test_a_server_that_loads_is_waited_for(open_page, server):
    page = open_page()
    server.health.update(ready=False, status="loading")
    page.reload()
    expect_text(page.locator("#banner"), "The server is not ready (loading).")
    server.health.update(ready=True, status="ok")
    page.locator("#banner").wait_for(state="hidden")


def test_a_key_is_asked_for_once(open_page, server):
    server.key, server.health["needs_key"] = "secret", True
    page = open_page()
    page.locator("dialog[open] input").fill("wrong")
    page.keyboard.press("Enter")
    say(page, "hello")
    page.locator("dialog[open] input").fill("secret")
    page.keyboard.press("Enter")
    expect_text(page.locator(".markdown"), "You said: hello")
    page.reload()
    ask(page, "again")
    assert page.locator("dialog[open]").count() == 0
    assert server.requests[-1].headers["Authorization"] == "Bearer secret"
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


EVENTS = [{"token": "wört 🙂"}, CALL, RESULT, DONE]
STREAM = b": ping\n\n" + b"".join(as_event(event) for event in EVENTS).replace(b"\n", b"\r\n", 4)
READ = """async ([bytes, cuts]) => {
    const whole = Uint8Array.from(bytes);
    const read = async pieces => {
        const start = control => { pieces.forEach(piece => control.enqueue(piece)); control.close(); };
        const stream = new ReadableStream({start});
        const events = [];
        for await (const event of readEvents(stream)) events.push(event);
        return JSON.stringify(events);
    };
    const found = [];
    for (const cut of cuts) found.push(await read([whole.slice(0, cut), whole.slice(cut)]));
    found.push(await read([...whole].map(byte => Uint8Array.of(byte))));
    return found;
}"""


def test_events_are_whole_wherever_the_network_cuts(page, server):
    found = page.evaluate(READ, [list(STREAM), list(range(len(STREAM) + 1))])
    assert len(found) > len(STREAM) and len(set(found)) == 1
    assert json.loads(found[0]) == EVENTS
    server.play(*[bytes([byte]) for byte in STREAM])
    answer = ask(page, "byte by byte")
    assert answer.locator(".markdown").inner_text() == "wört 🙂" and answer.locator(".call").count() == 1


def test_a_stream_that_ends_at_any_byte_gives_whole_events_and_no_error(page):
    prefixes = page.evaluate("""async bytes => {
        const counts = [];
        for (let end = 0; end <= bytes.length; end++) {
            const [events, part] = [[], new Blob([Uint8Array.from(bytes.slice(0, end))])];
            for await (const event of readEvents(part.stream())) events.push(event);
            if (events.some(event => event === null)) throw new Error(`half an event at ${end}`);
            counts.push(events.length);
        }
        return counts;
    }""", list(STREAM))
    assert prefixes == sorted(prefixes) and prefixes[-1] == 4


# --- hostile output ---

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>", "<iframe src='javascript:alert(1)'></iframe>",
    "<iframe srcdoc='<script>alert(1)</script>'>", "<style>*{display:none}</style>",
    "<a href='javascript:alert(1)'>x</a>", "[a](javascript:alert(1))", "[a](JaVaScRiPt:alert(1))",
    "[a](&#106;avascript:alert(1))", "[a](java\tscript:alert(1))", "[a](vbscript:x)",
    "[a](data:text/html,<script>alert(1)</script>)", "<javascript:alert(1)>", "![x](https://evil.example/leak.png)",
    "![x](javascript:alert(1))", "![x](data:image/svg+xml,<svg onload=alert(1)>)", "[a]: javascript:alert(1)\n\n[a]",
    "```\"><script>alert(1)</script>\nx\n```", "```<img/src=x/onerror=alert(1)>\nx\n```",
    "[x](https://a.example/\"onmouseover=alert(1))", "[x](https://a.example 'y\" onclick=alert(1) \"')",
    "[a](/health)", "[a](//evil.example)", "`<img src=x onerror=alert(1)>`", "<details open ontoggle=alert(1)>",
    "<form action=https://evil.example><button>x</button></form>", "<base href=https://evil.example/>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<math><mtext><style><img src=x onerror=alert(1)></style></mtext></math>",
    "| <img src=x onerror=alert(1)> |\n|--|\n| <script>alert(1)</script> |",
    "\u202egnp.exe <scr\0ipt>alert(1)</scr\0ipt>",
]


def test_hostile_output_stays_text(page, server):
    for text in HOSTILE:
        server.play(text[:len(text) // 2], text[len(text) // 2:], DONE)
        ask(page, text)
    call = {"tool": {"expression": "<img src=x onerror=alert(1)>", "result": "<script>alert(1)</script>"}}
    server.play(call, {"error": {"message": "<img src=x onerror=alert(1)>"}})
    ask(page, "<img src=x onerror=alert(1)>")
    page.reload()
    assert page.locator(".assistant").count() == len(HOSTILE) + 1
    assert page.locator(".assistant").filter(has_text="alert(1)").count() > 20
    bad = "#log :is(script, img, iframe, style, form, base, meta, link, object, embed, math, details)"
    assert page.locator(bad).count() == 0
    assert page.evaluate("""() => [...document.querySelectorAll("#log *")].flatMap(element => [...element.attributes])
        .filter(({name, value}) => name.startsWith("on") || /^\\s*(javascript|data|vbscript):/i.test(value))
        .map(({value}) => value)""") == []
    assert all(re.match(r"https?:|mailto:", link.get_attribute("href")) for link in page.locator("#log a").all())


def test_a_hostile_health_answer_and_odd_events_do_no_harm(open_page, server):
    evil = "<img src=x onerror=alert(1)>"
    server.health.update(model=f"d4-test {evil}", examples=[evil])
    server.health["defaults"] = {"temperature": "0.5", "__proto__": 1, "top_k": evil}
    page = open_page()
    assert page.locator("main img").count() == 1, "the logo"
    server.play({}, {"token": 5}, {"tool": {}}, {"unknown": 1}, "fine",
                {"done": True, "finish_reason": evil, "timings": {"tokens_per_second": "x", "first_token_ms": None}})
    assert ask(page, "odd").locator(".markdown").inner_text() == "fine"


def test_a_huge_answer_stays_usable(page, server):
    line = "word " * 20 + "\n\n"
    server.play(*[line * 40 for _ in range(60)], "the end", DONE)
    answer = ask(page, "a lot")
    expect_text(answer, "the end")
    assert answer.locator("p").count() == 2401
    assert page.evaluate("page.log.scrollHeight - page.log.scrollTop - page.log.clientHeight") < 40


def test_the_view_follows_only_from_the_bottom(page, server):
    go_on = threading.Event()
    server.play("line\n\n" * 80, go_on, "more\n\n" * 40, 0.2, "end", DONE)
    say(page, "scroll")
    expect_text(page.locator(".assistant"), "line")
    page.locator("#log").hover()
    page.mouse.wheel(0, -900)
    page.wait_for_function("!isAtBottom()")
    go_on.set()
    finished(page)
    assert page.evaluate("page.log.scrollHeight - page.log.scrollTop - page.log.clientHeight") > 500


# --- for everyone ---

def test_the_keyboard_alone_is_enough(page, server):
    page.keyboard.type("by keys")
    page.keyboard.press("Enter")
    finished(page)
    reached = []
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        reached.append(page.evaluate("document.activeElement.ariaLabel"))
        assert page.evaluate("document.activeElement.matches('body, :focus-visible')")
    for label in ("Regenerate answer", "Copy answer", "Edit message", "Settings", "Dark or light", "Conversations"):
        assert label in reached
    page.get_by_label("Edit message").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "input"
    assert page.get_by_label("Message", exact=True).input_value() == "by keys"


def test_every_button_has_a_name_and_the_log_is_a_polite_live_region(page, server):
    ask(page, "hello")
    for button in page.locator("button:visible").all():
        assert button.get_attribute("aria-label") or button.inner_text().strip()
    log = page.get_by_role("log")
    assert log.get_attribute("aria-live") == "polite" and log.get_attribute("aria-busy") == "false"


def test_a_phone_has_no_sideways_scroll_and_enter_breaks_the_line(open_page, server):
    page = open_page(viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True)
    assert not page.locator("aside").is_visible()
    table = "|" + "abcdef|" * 30 + "\n|" + "--|" * 30
    server.play("w" * 500, "\n\n```\n" + "x" * 500 + "\n```\n\n", table, CALL, DONE)
    field = page.get_by_label("Message", exact=True)
    field.fill("https://" + "y" * 300)
    field.press("Enter")
    assert server.requests == [] and field.input_value().endswith("\n")
    page.get_by_label("Send").tap()
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("page.log.scrollWidth <= page.log.clientWidth")
    page.get_by_label("Conversations").first.tap()
    assert page.locator("aside").is_visible()
    page.locator(".title").tap()
    assert not page.locator("aside").is_visible()


@pytest.mark.parametrize("system", ["light", "dark"])
def test_dark_and_light(open_page, system):
    page = open_page(color_scheme=system)
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(24, 24, 27)"
    first, second = (light, dark) if system == "light" else (dark, light)
    assert page.evaluate(background) == first
    page.get_by_label("Dark or light").click()
    assert page.evaluate(background) == second
    page.reload()
    assert page.evaluate(background) == second
