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
import sys

from nanochat.checkpoint_manager import STAGE_DIRS, load_model
from nanochat.common import DTYPES, UserError, compute_init, get_compute_dtype, run_main
from nanochat.engine import Engine
from nanochat.tokenizer import IncrementalDecoder

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


def legible(ids, tokenizer):
    """
    Yield the text of a stream of ids, piece by piece and only whole characters.

    A tool call reads [12*3 = 36], one without a result [12*]; no other special token is shown.
    """
    special = tokenizer.encode_special
    marks = {special("<|python_start|>"): "[", special("<|output_start|>"): " = ", special("<|output_end|>"): "]"}
    decoder, is_call_over = IncrementalDecoder(tokenizer), False
    for token in ids:
        if is_call_over and token != special("<|output_start|>"):
            yield "]"
        is_call_over = token == special("<|python_end|>")
        yield marks.get(token) or decoder.push(token)
    yield "]" * is_call_over + decoder.flush()


class Chat:
    """One conversation, kept as ids: bos is put before it, and every turn is a whole question and answer."""

    def __init__(self, engine, tokenizer, args):
        self.engine, self.tokenizer, self.args = engine, tokenizer, args
        self.context = engine.model.config.sequence_len
        self.seed = random.randrange(2**31) if args.seed is None else args.seed
        self.turns, self.num_answers = [], 0

    def clear(self):
        self.turns = []

    def prompt(self, text):
        """
        (ids to complete, ids of this turn so far). The oldest turns go when there is no room left for an answer.
        Raises UserError for a message that alone is too long.
        """
        special = self.tokenizer.encode_special
        question = self.tokenizer.encode(text, prepend="<|user_start|>", append="<|user_end|>")
        question.append(special("<|assistant_start|>"))
        room = self.context - 1 - min(self.args.max_tokens, self.context // 2) # 1 for bos
        if len(question) > room:
            raise UserError(f"this message has {len(question)} tokens, at most {room} fit beside an answer: shorten it")
        num_dropped = 0
        while sum(map(len, self.turns)) + len(question) > room:
            del self.turns[0]
            num_dropped += 1
        if num_dropped:
            print(f"(forgetting the oldest {num_dropped} turn(s): the context of {self.context} tokens is full)")
        return [self.tokenizer.get_bos_token_id(), *sum(self.turns, []), *question], question

    def answer(self, text):
        """Stream the answer to the terminal and remember the turn. Ctrl-C ends the answer, not the program."""
        prompt, question = self.prompt(text)
        answer = []
        stream = self.engine.generate(prompt, max_tokens=min(self.args.max_tokens, self.context - len(prompt) + 1),
                                      temperature=self.args.temperature, top_k=self.args.top_k,
                                      seed=self.seed + self.num_answers)
        print("Assistant: ", end="", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            for piece in legible(self._remember(stream, answer), self.tokenizer):
                print(piece, end="", flush=True)
        print()
        # However it ended (of itself, by bos, cut off), the turn is closed in the form the model was trained on.
        self.turns.append(question + answer + [self.tokenizer.encode_special("<|assistant_end|>")])
        self.num_answers += 1

    def _remember(self, stream, answer):
        """The ids of the stream up to its terminal token, also appended to `answer`."""
        for (token,), _ in stream:
            if token in self.engine.terminal:
                return
            answer.append(token)
            yield token


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
    chat = Chat(Engine(model, tokenizer), tokenizer, args)
    if args.prompt:
        chat.answer(args.prompt)
    else:
        talk(chat)


if __name__ == "__main__":
    run_main(main, writes=False)
