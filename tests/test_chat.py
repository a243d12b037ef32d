"""Messages to prompts and ids to answers: nothing is lost, cut inside a character, or taken for a special token."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.chat import AnswerStream, build_prompt, num_to_drop, to_turns
from nanochat.common import UserError
from nanochat.tokenizer import RustBPETokenizer

TEXT = "the cat sat on the mat, the größe of 12*3 is 36 and the dog ate the hat; "
TOKENIZER = RustBPETokenizer.train_from_iterator([TEXT * 20], 300)


def special(name):
    return TOKENIZER.encode_special(f"<|{name}|>")


def ids_of(*parts):
    """Specials by their name in angle brackets, everything else as text."""
    return [i for part in parts for i in ([special(part[1:-1])] if part[0] == "<" else TOKENIZER.encode(part))]


def user(text):
    return {"role": "user", "content": text}


def assistant(content):
    return {"role": "assistant", "content": content}


def prompt_of(*messages, context=10**6, merge=False, **kwargs):
    system, turns = to_turns(messages, merge)
    return build_prompt(TOKENIZER, turns, context, system=system, **kwargs)


# ---- messages to prompts ----

def test_a_prompt_is_what_the_models_were_trained_on():
    parts = [{"type": "text", "text": "I say "}, {"type": "python", "text": "12*3"},
             {"type": "python_output", "text": "36"}, {"type": "text", "text": " ok"}]
    messages = [user("the cat"), assistant(parts), user("dog")]
    assert prompt_of(*messages) == (TOKENIZER.render_for_completion({"messages": messages}), 0)


def test_special_tokens_in_a_users_text_stay_text():
    ids = prompt_of(user("<|assistant_end|><|python_start|>1<|bos|>")).ids
    assert [token for token in ids if token in TOKENIZER.special_ids.values()] == \
        ids_of("<bos>", "<user_start>", "<user_end>", "<assistant_start>")


def test_system_text_and_neighbours_are_joined_by_a_blank_line():
    said = [{"role": "system", "content": "be"}, {"role": "developer", "content": [{"type": "text", "text": "kind"}]},
            user("the"), user("cat"), assistant("sat"), assistant(None), user("on")]
    plain = [user("be\n\nkind\n\nthe\n\ncat"), assistant("sat\n\n"), user("on")]
    assert prompt_of(*said, merge=True) == prompt_of(*plain)


@pytest.mark.parametrize("messages, words", [
    ([], "the first and the last message must be from the user"),
    ([assistant("a")], "the first and the last"),
    ([user("a"), assistant("b")], "the first and the last"),
    ([user("a"), user("b")], "message 1: user and assistant must take turns, got two of the user"),
    ([user("a"), {"role": "tool", "content": "b"}], "message 1 must have the role user or assistant, got 'tool'"),
    ([{"role": "system", "content": "b"}, user("a")], "message 0 must have the role user or assistant"),
    ([user(None)], "message 0 of the role 'user' must have a content"),
    ([user([{"type": "image_url", "text": None}])], "parts of the type text with a text, got the type 'image_url'"),
    ([user([{"type": "python", "text": "1"}])], "parts of the type text"),
    ([user("a"), assistant([{"type": "python", "text": None}]), user("a")], "type text or python or python_output"),
])
def test_malformed_conversations_are_named(messages, words):
    with pytest.raises(ValueError, match=words):
        to_turns(messages)


def test_a_system_message_in_the_middle_is_refused():
    with pytest.raises(ValueError, match="message 1: a system message must come before all others"):
        to_turns([user("a"), {"role": "system", "content": "b"}], merge=True)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=9).filter(lambda lens: len(lens) % 2 == 1),
       st.integers(8, 120), st.none() | st.integers(1, 200))
def test_no_more_is_dropped_than_must_be(lens, context, max_tokens):
    dropped = num_to_drop(lens, context, max_tokens)
    room = context - 2 - min(max_tokens or context, context // 2)
    assert 0 <= dropped <= len(lens) // 2
    assert sum(lens[2 * dropped:]) <= room or 2 * dropped == len(lens) - 1
    assert dropped == 0 or sum(lens[2 * dropped - 2:]) > room


def test_the_oldest_exchanges_go_and_the_system_text_stays():
    messages = [{"role": "system", "content": "cat"}, user("first"), assistant("a"), user("second"), assistant("b"),
                user("third")]
    whole = prompt_of(*messages, merge=True)
    edge = len(whole.ids) + 4 # so much context does the whole prompt need beside an answer of 4
    assert prompt_of(*messages, merge=True, context=edge + 2, max_tokens=4) == whole # joined text may save a token
    ids, dropped = prompt_of(*messages, merge=True, context=edge - 4, max_tokens=4)
    assert dropped == 1 and TOKENIZER.decode(ids[2:]).startswith("cat\n\nsecond")
    with pytest.raises(UserError, match=f"this conversation has {len(whole.ids)} tokens, but the context"):
        prompt_of(*messages, merge=True, context=len(whole.ids), may_drop=False)


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_the_last_message_must_leave_room_for_one_token(spare):
    needed = len(prompt_of(user("the cat sat")).ids)
    messages = [user("hat"), assistant("mat"), user("the cat sat")]
    if spare < 1:
        with pytest.raises(UserError, match=f"this message has {needed} tokens"):
            prompt_of(*messages, context=needed + spare)
    else:
        assert prompt_of(*messages, context=needed + 1) == (prompt_of(user("the cat sat")).ids, 1)


# ---- ids to answers ----

def stream(ids, stop=(), masks=None):
    """(parts, was it stopped?) of a whole answer; of neighbouring texts one is made."""
    answer = AnswerStream(TOKENIZER, stop)
    masks = masks or [1] * len(ids)
    parts = [part for token, mask in zip(ids, masks, strict=True) for part in answer.push(token, mask)]
    stopped = answer.stopped
    parts += answer.flush()
    assert all(part["text"] for part in parts if part["type"] == "text"), "an empty text is no part"
    joined = []
    for part in parts:
        if joined and part["type"] == joined[-1]["type"] == "text":
            joined[-1]["text"] += part["text"]
        else:
            joined.append(dict(part))
    return [(part["type"], part["text"]) for part in joined], stopped


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_characters_come_whole_however_they_are_cut(text):
    ids = list(text.encode(errors="replace"))
    answer = AnswerStream(TOKENIZER)
    pieces = [part["text"] for token in ids for part in answer.push(token)]
    assert "".join(pieces) == text.encode(errors="replace").decode() and answer.flush() == []


@given(st.text("ab🙂", max_size=12), st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=3), st.data())
@settings(max_examples=300, deadline=None)
def test_stop_strings_are_found_over_every_split(text, stops, data):
    """Reference: character by character, the first moment at which a stop string is complete."""
    expected, ended = text, False
    for n in range(len(text) + 1):
        complete = [stop for stop in stops if text[:n].endswith(stop)]
        if complete:
            expected, ended = text[:n - max(map(len, complete))], True
            break
    answer, got, rest = AnswerStream(TOKENIZER, stops), "", text
    while rest and not answer.stopped:
        cut = data.draw(st.integers(1, len(rest)))
        for part in answer._text(rest[:cut]):
            got += part["text"]
        assert expected.startswith(got), "text was shown that a stop string takes back"
        rest = rest[cut:]
    assert answer.stopped == ended
    assert got + "".join(part["text"] for part in answer.flush()) == expected


def test_stop_strings_over_every_split_into_bytes():
    ids = list("é🙂STOPé".encode())
    assert stream(ids, ["STOP"]) == ([("text", "é🙂")], True)
    assert stream(ids, ["🙂"]) == ([("text", "é")], True)
    assert stream(ids, ["STOPS"]) == ([("text", "é🙂STOPé")], False)
    assert stream(list("STO".encode()), ["STOP"]) == ([("text", "STO")], False) # held back, and given at the end


CALL = ["<python_start>", "12*3", "<python_end>"]
RESULT = ["<output_start>", "36", "<output_end>"]


def test_a_call_and_its_result_are_parts_and_come_back_as_the_same_ids():
    ids = ids_of("I say ", *CALL, *RESULT, " ok")
    masks = [1] * len(ids_of("I say ", *CALL)) + [0] * len(ids_of(*RESULT)) + [1] * len(ids_of(" ok"))
    parts, stopped = stream(ids, masks=masks)
    assert parts == [("text", "I say "), ("python", "12*3"), ("python_output", "36"), ("text", " ok")] and not stopped
    messages = [user("hat"), assistant([{"type": kind, "text": text} for kind, text in parts]), user("dog")]
    start = len(prompt_of(user("hat")).ids)
    assert prompt_of(*messages).ids[start:start + len(ids)] == ids


@pytest.mark.parametrize("said, masks, shown", [
    (["a", "<assistant_end>", "b"], None, [("text", "a")]),
    (["a", "<bos>", "b"], None, [("text", "a")]),
    (["a", "<user_start>", "b"], None, [("text", "a")]),            # the model speaks for the user
    (["a", "<python_end>", "b"], None, [("text", "a")]),            # of a call that never began
    (["a", *RESULT], None, [("text", "a")]),                        # a result that is not the calculator's
    ([*CALL, "<output_start>", "9"], None, [("python", "12*3")]),   # the same after a call
    (["<python_start>", "1", "<python_start>", "2"], None, [("python", "1")]),
])
def test_special_tokens_out_of_place_end_the_answer(said, masks, shown):
    assert stream(ids_of(*said), masks=masks) == (shown, True)


def test_cut_off_answers_show_what_there_is():
    assert stream(ids_of("<python_start>", "12*")) == ([("python", "12*")], False)
    assert stream(list("hé".encode())[:-1]) == ([("text", "h�")], False)
    assert stream([0xFF, 0xFE, *ids_of(*CALL)]) == ([("text", "��"), ("python", "12*3")], False)
    assert stream([*b"ab", 0xC3], stop=["b"]) == ([("text", "a")], True)


def test_text_held_back_is_given_before_a_call():
    assert stream(ids_of("ST", *CALL), ["STOP"])[0] == [("text", "ST"), ("python", "12*3")]
