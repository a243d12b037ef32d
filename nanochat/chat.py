"""
Between text and the engine: what was said becomes a prompt, and what the engine samples becomes an answer.

    messages  ->  to_turns  ->  turns  ->  build_prompt  ->  ids            (the oldest exchanges go when it gets long)
    ids of an answer, one at a time  ->  AnswerStream  ->  parts: text, python, python_output

A part is {"type", "text"} as the tokenizer renders conversations from, so an answer that comes back as parts gets the
ids that were sampled, and the engine finds them in its cache. Text never becomes a special token, and no special token
becomes text.
"""
from typing import NamedTuple

from nanochat.common import UserError
from nanochat.tokenizer import PARTS, IncrementalDecoder


class Prompt(NamedTuple):
    ids: list[int]
    num_dropped: int  # exchanges (a question and its answer) that were left out in front


def to_turns(messages, merge=False):
    """
    Check messages and return (system text, turns): user and assistant in turn, the user first and last.

    messages  dicts with "role" and "content": a str, a list of parts, or None; of an assistant also "parts", which wins
    merge     join neighbours of one role with a blank line, and take system or developer messages in front; otherwise
              both are errors
    A turn is (role, [(part type, text), ...]). Raises ValueError naming the message.
    """
    system, turns = [], []
    for i, message in enumerate(messages):
        role, parts = message["role"], _parts_of(i, message)
        if merge and role in ("system", "developer"):
            if turns:
                raise ValueError(f"message {i}: a {role} message must come before all others")
            system += [text for _, text in parts]
        elif role not in ("user", "assistant"):
            raise ValueError(f"message {i} must have the role user or assistant{', or system in front' * merge}, "
                             f"got {role!r:.40}")
        elif turns and turns[-1][0] == role:
            if not merge:
                raise ValueError(f"message {i}: user and assistant must take turns, got two of the {role} in a row")
            turns[-1][1].extend([("text", "\n\n"), *parts])
        else:
            turns.append((role, parts))
    if not turns or turns[0][0] != "user" or turns[-1][0] != "user":
        raise ValueError("the first and the last message must be from the user")
    return "\n\n".join(system), [(role, _joined(parts)) for role, parts in turns]


def _parts_of(i, message):
    """[(part type, text), ...] of message i. Raises ValueError."""
    role, content = message["role"], message.get("content")
    if role == "assistant" and message.get("parts"):
        content = message["parts"]
    if content is None and role != "assistant":
        raise ValueError(f"message {i} of the role {role!r:.40} must have a content")
    if not isinstance(content, list):
        return [("text", content or "")]
    known = list(PARTS) if role == "assistant" else ["text"]
    for part in content:
        if part["type"] not in known or part.get("text") is None:
            raise ValueError(f"message {i} of the role {role!r:.40} must have parts of the type {' or '.join(known)} "
                             f"with a text, got the type {part['type']!r:.40}")
    return [(part["type"], part["text"]) for part in content]


def _joined(parts):
    """The same parts with neighbouring texts made one, as they would be encoded."""
    joined = []
    for part_type, text in parts:
        if joined and part_type == joined[-1][0] == "text":
            text = joined.pop()[1] + text
        joined.append((part_type, text))
    return joined


def num_to_drop(turn_lens, context, max_tokens=None):
    """
    How many of the oldest exchanges must go so that an answer has room: max_tokens, but no more than half the context.

    turn_lens  tokens of question, answer, ..., question; the last one always stays
    """
    room = context - 2 - min(max_tokens or context, context // 2) # 2: bos and assistant_start
    dropped = 0
    while 2 * dropped < len(turn_lens) - 1 and sum(turn_lens[2 * dropped:]) > room:
        dropped += 1
    return dropped


def build_prompt(tokenizer, turns, context, max_tokens=None, system="", may_drop=True):
    """
    The ids that the assistant answers to, and how many exchanges were dropped.

    turns     as from `to_turns`; system is put before the first question that is kept
    may_drop  False: never leave anything out
    Raises UserError when what must stay fills the context.
    """
    rendered = [tokenizer.render_turn(*turn)[0] for turn in turns]
    prefix = f"{system}\n\n" if system else ""
    lens = [len(ids) for ids in rendered]
    lens[-1] += len(tokenizer.encode(prefix))
    dropped = num_to_drop(lens, context, max_tokens) if may_drop else 0
    kept = rendered[2 * dropped:]
    if prefix:
        kept[0] = tokenizer.render_turn("user", _joined([("text", prefix), *turns[2 * dropped][1]]))[0]
    return Prompt(frame(tokenizer, kept, context), dropped)


def frame(tokenizer, turns_ids, context):
    """bos, the ids of all turns, and the opening of the answer. Raises UserError when no token more would fit."""
    ids = [tokenizer.get_bos_token_id(), *(token for turn in turns_ids for token in turn),
           tokenizer.encode_special("<|assistant_start|>")]
    if len(ids) >= context:
        what = "this message" if len(turns_ids) == 1 else "this conversation"
        raise UserError(f"{what} has {len(ids)} tokens, but the context of the model holds {context}, and the answer "
                        "needs room too: shorten it")
    return ids


class AnswerStream:
    """
    Ids of an answer, one at a time, to its parts: texts of whole characters, calls of the calculator, their results.

    A call is one part when it is complete, and so is its result. The answer ends (`stopped`) at a stop string, which is
    never part of the text, and at any special token that has no business there, the terminal ones included.
    """

    def __init__(self, tokenizer, stop=()):
        special = tokenizer.encode_special
        self.tokenizer, self.stop = tokenizer, list(stop)
        self.decoder = IncrementalDecoder(tokenizer)
        self.special_ids = self.decoder.special_ids
        # opening token: (part type, closing token, mask: is it sampled or forced?)
        self.tools = {special(opening): (part_type, special(closing), trained)
                      for part_type, (opening, closing, trained) in PARTS.items() if opening}
        self.tool, self.tool_ids = None, [] # the part of another type than text that is open, in the end cut off
        self.held = ""                      # text that may be the beginning of a stop string
        self.num_chars = 0                  # characters of text so far, those held included
        self.stopped = False

    def push(self, token, mask=1):
        """The parts that this token completes, perhaps none; mask 1 = sampled, 0 = forced by the tool."""
        if self.stopped:
            return []
        if token not in self.special_ids:
            if self.tool is None:
                return self._text(self.decoder.push(token))
            self.tool_ids.append(token)
            return []
        if self.tool is not None and token == self.tool[1]:
            parts, self.tool, self.tool_ids = [self._tool_part()], None, []
            return parts
        if self.tool is None and token in self.tools and self.tools[token][2] == mask:
            before = self._text(self.decoder.flush(), final=True)
            self.tool = None if self.stopped else self.tools[token]
            return before
        return self.flush()

    def flush(self):
        """What is left when the answer ends: text that was held back, a call that was cut off."""
        if self.stopped:
            return []
        parts = self._text(self.decoder.flush(), final=True)
        if self.tool is not None and self.tool[0] == "python":
            parts.append(self._tool_part())
        self.stopped = True
        return parts

    def _tool_part(self):
        return {"type": self.tool[0], "text": self.tokenizer.decode(self.tool_ids)}

    def _text(self, piece, final=False):
        """The text that is now known to be visible, as a list of one part or none."""
        self.num_chars += len(piece)
        text, self.held = self.held + piece, ""
        found = [(start + len(stop), start) for stop in self.stop if (start := text.find(stop)) >= 0]
        if found: # the one that was complete first: how the text was cut into tokens must not matter
            text, self.stopped = text[:min(found)[1]], True
        elif not final:
            longest = min(len(text), max(map(len, self.stop), default=1) - 1)
            num_held = next((n for n in range(longest, 0, -1)
                             if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)
            text, self.held = text[:len(text) - num_held], text[len(text) - num_held:]
        return [{"type": "text", "text": text}] if text else []
