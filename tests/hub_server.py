"""
A local HTTP server that imitates the file side of the hub, with faults on demand.

    with HubServer({"/datasets/a/b/resolve/main/x.bin": data}) as hub:
        hub.fail("/datasets/a/b/resolve/main/x.bin", "truncate", "500")   # the next two requests, in this order
        monkeypatch.setenv("HF_ENDPOINT", hub.url)

A path redirects to /cdn/..., as on the hub, and announces X-Linked-Etag (SHA-256) and X-Linked-Size; the /cdn/ response
has ETag and Content-Length, and answers Range and If-Range. Faults: "truncate" or "truncate:N" (the connection ends
after half, or N, of the bytes), "stall" (half, then silence), "500", "404", "no-range" (sends all, whatever is asked),
"no-if-range" (sends the range though the content is another one), "no-length" (without Content-Length).
"""
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer:
    """Serves `files` ({path: bytes}), which may be changed while it runs. `hashes=False`: announces no SHA-256."""

    def __init__(self, files, hashes=True):
        self.files, self.hashes = dict(files), hashes
        self.faults = {}    # path -> faults of the next requests
        self.requests = []  # (path, Range header or None, status) of every request for content
        self.released = threading.Event() # ends stalled responses
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def fail(self, path, *faults):
        self.faults.setdefault(path, []).extend(faults)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = self.path.removeprefix("/cdn")
        data = self.hub.files.get(path)
        if data is None:
            self._send(404, b"no such file")
        elif not self.path.startswith("/cdn"):
            headers = {"Location": "/cdn" + path}
            if self.hub.hashes:
                headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
            self._send(302, b"", headers)
        else:
            faults = self.hub.faults.get(path)
            self._send_content(path, data, faults.pop(0) if faults else "")

    def _send_content(self, path, data, fault):
        etag = f'"{hashlib.md5(data).hexdigest()}"' # as a CDN may: not the SHA-256
        asked, start, status = self.headers.get("Range"), 0, 200
        same = self.headers.get("If-Range", etag) == etag or fault == "no-if-range"
        if asked and same and fault != "no-range":
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
        if status == 206 and start >= len(data):
            status = 416
        if fault.isdigit():
            status = int(fault)
        self.hub.requests.append((path, asked, status))
        if status >= 400:
            return self._send(status, b"sorry")
        headers = {"ETag": etag}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(status, data[start:], headers, fault)

    def _send(self, status, body, headers=None, fault=""):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if fault == "no-length":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        name, _, count = fault.partition(":")
        cut = name in ("truncate", "stall")
        self.wfile.write(body[:int(count or len(body) // 2)] if cut else body)
        if name == "stall":
            self.wfile.flush()
            self.hub.released.wait(30)
        self.close_connection = cut or fault == "no-length"
