"""Models whose next word is known, and servers around them: shared by the tests of the HTTP side."""
import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import torch

from nanochat.engine import Engine
from nanochat.serving import Settings, create_app, serve
from nanochat.tokenizer import RustBPETokenizer

TEXT = "the cat sat on the mat, the größe of 12*3 is 36 and the dog ate the hat; "
TOKENIZER = RustBPETokenizer.train_from_iterator([TEXT * 20], 300)


def special(name):
    return TOKENIZER.encode_special(f"<|{name}|>")


class ChainModel:
    """
    The next id is a function of the last one: `path` is what follows assistant_start; each step takes `seconds`. After
    a ~ there is only NaN.
    """
    def __init__(self, path, seconds=0.0, sequence_len=128):
        self.config = SimpleNamespace(n_head=1, n_kv_head=1, n_embd=4, n_layer=1, sequence_len=sequence_len)
        self.seconds, self.num_forwards, self.failure = seconds, 0, None
        chain = [special("assistant_start"), *path]
        self.after = dict(zip(chain, chain[1:]))

    def get_device(self):
        return "cpu"

    def forward(self, ids, kv_cache=None):
        if self.failure:
            raise self.failure
        time.sleep(self.seconds)
        self.num_forwards += 1
        kv_cache.advance(ids.size(1))
        wanted = torch.tensor([[self.after.get(token, token) for token in row] for row in ids.tolist()])
        logits = 90 * torch.nn.functional.one_hot(wanted, TOKENIZER.get_vocab_size()).float()
        return logits.masked_fill((ids == ord("~"))[:, :, None], torch.nan)


def path_of(*parts):
    """Ids of specials in angle brackets and of text letter by letter."""
    return [i for part in parts for i in ([special(part[1:-1])] if part[0] == "<" else list(part.encode()))]


# No id occurs twice in a path: a chain knows only the last one.
HELLO = path_of("hé🙂!", "<assistant_end>")
FOREVER = path_of("abcdefg") # then g, g, g ...
CALL = path_of("x", "<python_start>", "6*7", "<python_end>", "<output_end>", "yz", "<assistant_end>") # gets a 42


def app_of(model, engines=1, **settings):
    settings = Settings(**{"model": "d2-sft", "temperature": 0.0, "top_k": 0, "max_tokens": 20} | settings)
    return create_app([Engine(model, TOKENIZER) for _ in range(engines)], settings)


@contextlib.contextmanager
def running(model, drain=0, **settings):
    """A real server on a free port of this machine, in a thread; yields its address, with the app as attribute."""
    app = app_of(model, **settings)
    sock = socket.create_server(("127.0.0.1", 0))
    errors = []

    def run():
        try:
            serve(app, sock, drain)
        except Exception as error: # for the test to look at
            errors.append(error)
    thread = threading.Thread(target=run)
    thread.start()
    service = app.state.service
    wait_for(lambda: service.status == "ok")
    port = sock.getsockname()[1]
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, service=service, errors=errors, thread=thread,
                              model=model)
    finally:
        if thread.is_alive() and service.status == "ok":
            service.drain(0)
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
