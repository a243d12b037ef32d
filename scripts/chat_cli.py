"""
Chat with a model in the terminal.

    python -m scripts.chat_cli
    python -m scripts.chat_cli -i rl -t 1.0
    python -m scripts.chat_cli -p "Why is the sky blue?"        (one answer, then exit)

Reads the checkpoints of the stage; writes nothing. Text on standard input is taken line by line, as if typed.
"""
import argparse
import contextlib
import random
import signal
import sys
import threading

from nanochat.chat import AnswerStream, frame, num_to_drop
from nanochat.checkpoint_manager import STAGE_DIRS, load_model
from nanochat.common import DTYPES, UserError, compute_init, get_compute_dtype, run_main
from nanochat.engine import NOT_FINITE, Batch, Engine, Request

HEADING = """
Type a message. "clear" starts a new conversation, "quit" or "exit" leaves, Ctrl-C stops an answer.
"""


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("-i", "--source", default="sft", choices=list(STAGE_DIRS), help="stage of the checkpoint")
    add("-g", "--model-tag", default=None, help="checkpoint folder, e.g. d20; default: the newest")
    add("-s", "--step", "--model-step", type=int, default=None, help="step of the checkpoint; default: the last")
    add("-p", "--prompt", default="", help="answer this one message and exit; empty = interactive")
    add("-t", "--temperature", type=float, default=0.6, help="0 = always the likeliest token")
    add("-k", "--top-k", type=int, default=50, help="sample among the k likeliest tokens; 0 = all")
    add("-m", "--max-tokens", type=int, default=256, help="tokens per answer at most")
    add("--seed", type=int, default=None, help="repeat a conversation exactly; default: another one every time")
    add("-d", "--dtype", default="", choices=["", *DTYPES], help="of activations; empty = bf16 where hardware has it")
    add("--device-type", default="", choices=["", "cuda", "cpu", "mps"], help="empty = the first that is available")
    return parser


def check_args(args):
    """All that is wrong with the flags, as sentences."""
    problems = [f"--max-tokens must be at least 1, got {args.max_tokens}"] if args.max_tokens < 1 else []
    if not args.temperature >= 0: # nan is not either
        problems.append(f"--temperature must be at least 0, got {args.temperature}")
    return problems


class Printer:
    """Parts of an answer on the terminal as they come. A tool call reads [12*3 = 36], one without a result [12*]."""

    def __init__(self):
        self.is_call_open = False

    def show(self, parts):
        for part in parts:
            kind, text = part["type"], part["text"]
            closing = "]" if self.is_call_open and kind != "python_output" else ""
            text = {"python": f"[{text}", "python_output": f" = {text}]"}.get(kind, text)
            self.is_call_open = kind == "python"
            print(closing + text, end="", flush=True)

    def close(self):
        print("]" if self.is_call_open else "")


@contextlib.contextmanager
def interrupt_calls(action):
    """Ctrl-C calls `action` instead of breaking off whatever runs. Only the main thread hears it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, stack: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Chat:
    """One conversation, kept as the ids that the model has read and said: they are found in its cache again."""

    def __init__(self, engine, args):
        self.tokenizer, self.args = engine.tokenizer, args
        self.context = engine.model.config.sequence_len
        self.end = engine.assistant_end
        self.batch = Batch(engine, max_rows=1)
        self.seed = random.randrange(2**31) if args.seed is None else args.seed
        self.turns, self.num_answers = [], 0 # turns: ids of question, answer, question, answer, ...

    def clear(self):
        self.turns = []

    def prompt(self, question):
        """The ids to complete; the oldest turns go if there is no room. Raises UserError for a long question."""
        turns = [*self.turns, question]
        dropped = num_to_drop(list(map(len, turns)), self.context, self.args.max_tokens)
        ids = frame(self.tokenizer, turns[2 * dropped:], self.context)
        if dropped:
            print(f"(forgetting the oldest {dropped} turn(s): the context of {self.context} tokens is full)")
        del self.turns[:2 * dropped]
        return ids

    def answer(self, text):
        """Stream the answer to the terminal and remember the turn. Ctrl-C ends the answer, not the program."""
        printer, stream = Printer(), AnswerStream(self.tokenizer)
        said = [self.tokenizer.encode_special("<|assistant_start|>")]

        def on_token(token, mask, logprob):
            printer.show(stream.push(token, mask))
            said.extend([] if stream.stopped else [token])
            return stream.stopped
        args = self.args
        question = self.tokenizer.render_turn("user", [("text", text)])[0]
        request = Request(self.prompt(question), args.max_tokens, args.temperature, args.top_k,
                          seed=self.seed + self.num_answers, on_token=on_token)
        print("Assistant: ", end="", flush=True)
        with interrupt_calls(request.cancel):
            self.batch.submit(request)
            while self.batch.step():
                pass
        printer.show(stream.flush())
        printer.close()
        if request.finish_reason == "broken": # such a turn is not remembered
            raise UserError(NOT_FINITE)
        # However it ended (of itself, by bos, cut off), the turn is closed in the form the model was trained on.
        closing = [stream.tool[1]] if stream.tool else []
        self.turns += [question, [*said, *closing, self.end]]
        self.num_answers += 1


def talk(chat):
    """The interactive loop; ends with quit, exit, end of file or Ctrl-C."""
    print(HEADING)
    while True:
        try:
            text = input("User: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            break
        if not sys.stdin.isatty():
            print(text) # a scripted conversation reads like a typed one
        if text.lower() in ("quit", "exit"):
            break
        if text.lower() == "clear":
            chat.clear()
            print("(a new conversation)")
        elif text:
            try:
                chat.answer(text)
            except UserError as error:
                print(f"({error})")
    print("Goodbye!")


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if problems := check_args(args):
        parser.error("; ".join(problems))
    compute = compute_init(args.device_type)
    dtype = get_compute_dtype(compute.device, args.dtype)
    model, tokenizer, _ = load_model(args.source, compute.device, "eval", args.model_tag, args.step, dtype)
    chat = Chat(Engine(model, tokenizer), args)
    if args.prompt:
        chat.answer(args.prompt)
    else:
        talk(chat)


if __name__ == "__main__":
    run_main(main, writes=False)
