"""
A local HTTP server that serves the chat page as the real one does and answers by script.

    with ChatPageServer() as server:
        server.play("Hello ", 0.2, "world", DONE)   # the next answer: text, a pause in seconds, text, the last event
        server.play(CALL, RESULT, CUT)              # the one after it: two events, then the connection breaks
        server.play(Refuse(429, "queue full", retry_after=1))

A step is a string (a token event), a dict (any event), bytes (sent as they are), a number (seconds of silence), an
Event (silence until it is set), CUT (the connection breaks), END (it ends in order, but without `done`) or a Refuse (an
error before the stream). Without a script the answer repeats the last message. `requests` holds what came to
/chat/completions: headers, body, and whether the client left.
"""
import json
import secrets
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "nanochat"
CSP = ("default-src 'none'; script-src 'self' 'nonce-{}'; style-src 'unsafe-inline'; img-src 'self' data:; "
       "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
ASSETS = {"/logo.svg": "image/svg+xml", "/vendor/markdown-it.min.js": "text/javascript"}
CUT, END = object(), object()
DONE = {"done": True, "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "completion_tokens": 7, "cached_tokens": 0, "dropped_turns": 0},
        "timings": {"queue_ms": 1.0, "first_token_ms": 210.0, "tokens_per_second": 43.21}}
HEALTH = {"status": "ok", "ready": True, "num_gpus": 1, "available_workers": 1, "model": "d4-test", "context": 256,
          "needs_key": False,
          "defaults": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "max_tokens": 300},
          "examples": ["What is the capital of France?", "How much is 12*3?"]}


@dataclass
class Refuse:
    status: int
    message: str
    retry_after: int | None = None


@dataclass
class Asked:
    headers: dict
    body: dict
    left: bool = field(default=False) # the client closed the connection before the answer was complete


def as_event(value):
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


class ChatPageServer:
    def __init__(self):
        self.scripts, self.requests, self.health, self.key = [], [], dict(HEALTH), None
        handler = type("Handler", (_Handler,), {"owner": self})
        server = type("Server", (ThreadingHTTPServer,), {"daemon_threads": True, "request_queue_size": 128})
        self.server = server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def play(self, *steps):
        self.scripts.append(steps)

    def reset(self):
        self.scripts, self.requests, self.health, self.key = [], [], dict(HEALTH), None

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/":
            nonce = secrets.token_urlsafe(16)
            page = (PACKAGE / "ui.html").read_text("utf-8").replace("{{nonce}}", nonce)
            self._send(200, page.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": CSP.format(nonce)})
        elif self.path in ASSETS:
            self._send(200, (PACKAGE / self.path[1:]).read_bytes(), ASSETS[self.path])
        elif self.path == "/health":
            self._send_json(200 if self.owner.health["ready"] else 503, self.owner.health)
        else:
            self._send_json(404, {"error": {"message": "no such page"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = Asked(dict(self.headers), body)
        self.owner.requests.append(asked)
        if self.owner.key and self.headers.get("Authorization") != f"Bearer {self.owner.key}":
            self._send_json(401, {"error": {"message": "wrong key", "type": "invalid_request_error"}})
            return
        echo = f"You said: {body['messages'][-1]['content']}"
        steps = self.owner.scripts.pop(0) if self.owner.scripts else (echo, DONE)
        if isinstance(steps[0], Refuse):
            headers = {} if steps[0].retry_after is None else {"Retry-After": str(steps[0].retry_after)}
            self._send_json(steps[0].status, {"error": {"message": steps[0].message}}, headers)
            return
        try:
            self._stream(steps)
        except (BrokenPipeError, ConnectionResetError):
            asked.left = True
            self.close_connection = True

    def _stream(self, steps):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for step in steps:
            if step is CUT:
                self.close_connection = True
                return
            if isinstance(step, threading.Event):
                step.wait(30)
            elif isinstance(step, int | float):
                time.sleep(step)
            elif step is not END:
                event = {"token": step, "gpu": 0} if isinstance(step, str) else step
                data = event if isinstance(event, bytes) else as_event(event)
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def _send_json(self, status, value, headers=None):
        self._send(status, json.dumps(value).encode(), "application/json", headers)

    def _send(self, status, data, kind, headers=None):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)
