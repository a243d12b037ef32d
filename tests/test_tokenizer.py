"""
The tokenizer: exact ids on worked examples, laws over arbitrary text and bytes, and agreement with three other encoders
(rustbpe's own, the `tokenizers` library on the same merges, and a naive one written here).
"""
import copy
import itertools
import json
import os
import pickle
import threading

import pytest
import regex
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanochat.tokenizer as tokenizer_module
from nanochat.tokenizer import (MAX_BLANK_RUN, SPECIAL_TOKENS, SPLIT_PATTERN, HuggingFaceTokenizer, IncrementalDecoder,
                                RustBPETokenizer, get_token_bytes, get_tokenizer, token_bytes_of)

CORPUS = ("The harbour wall was 5 metres high in 1987, 12 in 2024; it's the children's walk. They'll say we're so!\n\n"
          "def add(a, b):\n    return a + b  # 100% \u00e9\u00e9\u00e9 \u00fcber\n"
          "\u4f60\u597d \u4f60\u597d \U0001f642\U0001f642\U0001f642 wall walls walking talk talks "
          "talking the the the then there these\t\t\tx\r\n   y   \n") * 3

# Any str that UTF-8 can hold, with the rare characters that split patterns and merges care about made frequent
TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from(" \n\r\t'09ahelt<|>\u00e9\u4f60\U0001f642\u200d"))
quick = settings(max_examples=150, deadline=None)


@pytest.fixture(scope="module")
def trained():
    """A vocabulary of 340 tokens: 256 bytes, 75 merges, 9 special tokens."""
    return RustBPETokenizer.train_from_iterator(iter([CORPUS]), 340)


@pytest.fixture(scope="module")
def tiny():
    """The corpus "hi hi" has two merges: 256 = "hi", 257 = " hi"; special tokens are 258 (bos) .. 266 (output_end)."""
    return RustBPETokenizer.train_from_iterator(iter(["hi hi"]), 600)


@pytest.fixture(scope="module")
def hugging():
    return HuggingFaceTokenizer.train_from_iterator(iter([CORPUS]), 340)

# -----------------------------------------------------------------------------
# Vocabulary and ids

def test_pattern_and_special_tokens_are_those_of_published_models():
    assert SPLIT_PATTERN == (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                             r"|\s*[\r\n]|\s+(?!\S)|\s+")
    assert SPECIAL_TOKENS == [f"<|{name}|>" for name in (
        "bos", "user_start", "user_end", "assistant_start", "assistant_end", "python_start", "python_end",
        "output_start", "output_end")]


def test_a_small_corpus_gives_what_merges_it_has(tiny):
    assert tiny.get_vocab_size() == 267
    assert [tiny.encode_special(token) for token in SPECIAL_TOKENS] == list(range(258, 267))
    assert tiny.get_bos_token_id() == 258
    assert tiny.encode("hi hi") == [256, 257]
    assert tiny.encode("hihi\u00e9") == [256, 256, 0xC3, 0xA9]
    assert [tiny.decode_single_token_bytes(i) for i in (0, 255, 256, 257, 258)] == [
        b"\x00", b"\xff", b"hi", b" hi", b"<|bos|>"]


@pytest.mark.parametrize("vocab_size, bos", [(32768, 32759), (65536, 65527)])
def test_special_ids_follow_a_full_vocabulary(monkeypatch, vocab_size, bos):
    class FullTrainer:
        """Finds as many merges as it is asked for: pairs of bytes."""
        def train_from_iterator(self, iterator, vocab_size, pattern):
            self.size, self.pattern = vocab_size, pattern

        def get_pattern(self):
            return self.pattern

        def get_mergeable_ranks(self):
            tokens = [bytes([i]) for i in range(256)] + [bytes([i // 256, i % 256]) for i in range(self.size - 256)]
            return [(token, rank) for rank, token in enumerate(tokens)]
    monkeypatch.setattr("rustbpe.Tokenizer", FullTrainer)
    tokenizer = RustBPETokenizer.train_from_iterator(iter([]), vocab_size)
    assert tokenizer.get_vocab_size() == vocab_size
    assert [tokenizer.encode_special(token) for token in SPECIAL_TOKENS] == list(range(bos, bos + 9))


def test_training_depends_on_the_text_alone(trained):
    again = RustBPETokenizer.train_from_iterator(iter([CORPUS]), 340)
    assert again.fingerprint() == trained.fingerprint()
    assert trained.get_vocab_size() == 340


def test_a_vocabulary_must_hold_the_bytes_and_the_special_tokens():
    assert RustBPETokenizer.train_from_iterator(iter(["hi hi"]), 265).get_vocab_size() == 265
    with pytest.raises(ValueError, match="at least 265 tokens .* got 264"):
        RustBPETokenizer.train_from_iterator(iter(["hi hi"]), 264)


def test_numbers_are_split_in_groups_of_two_digits():
    tokenizer = RustBPETokenizer.train_from_iterator(iter(["1234 1234 1234"]), 600)
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("12345")] == ["12", "34", "5"]

# -----------------------------------------------------------------------------
# encode and decode

def naive_encode(text, ranks):
    """Byte-pair encoding as its definition says: in each piece, merge the pair of lowest rank until none is known."""
    ids = []
    for piece in regex.findall(SPLIT_PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode("utf-8")]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
            _, i = min(pairs)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def library_encoder(ranks):
    """The `tokenizers` library on the same merges: the two halves of a token are what is left without its own rank."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    char_of = {byte: char for char, byte in tokenizer_module.byte_level_alphabet().items()}
    def written(token):
        return "".join(char_of[byte] for byte in token)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1])[256:]:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            _, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append((written(parts[0]), written(parts[1])))
    model = Tokenizer(models.BPE(vocab={written(token): rank for token, rank in ranks.items()}, merges=merges))
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return lambda text: model.encode(text).ids


@pytest.fixture(scope="module")
def other_encoders(trained):
    import rustbpe
    rust = rustbpe.Tokenizer()
    rust.train_from_iterator(iter([CORPUS]), 331, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in rust.get_mergeable_ranks()}
    return [rust.encode, library_encoder(ranks), lambda text: naive_encode(text, ranks)]


@quick
@given(text=TEXT)
def test_ids_equal_those_of_three_other_encoders(trained, other_encoders, text):
    ids = trained.encode(text)
    assert all(other(text) == ids for other in other_encoders)


@pytest.mark.parametrize("text", [CORPUS, "", "   ", "\n\n x\r\n", "they'LL've 12345", "<|bos|>", "\u4f60\U0001f642"])
def test_ids_of_typical_text_equal_those_of_three_other_encoders(trained, other_encoders, text):
    assert all(other(text) == trained.encode(text) for other in other_encoders)
    assert trained.decode(trained.encode(text)) == text


@quick
@given(text=TEXT)
def test_text_survives_and_never_becomes_a_special_token(trained, text):
    text = text + "<|bos|><|assistant_end|>" + text
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert max(ids) < trained.get_bos_token_id()
    assert token_bytes_of(trained)[ids].sum().item() == len(text.encode("utf-8"))


@quick
@given(data=st.binary(max_size=60))
def test_any_bytes_decode(trained, data):
    assert trained.decode(list(data)) == data.decode("utf-8", "replace")


def test_surrogates_become_what_utf8_can_hold(trained, hugging):
    for tokenizer in (trained, hugging):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
        assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "\U0001f642", "a surrogate pair is one character"
        assert tokenizer.encode(["x", "a\udfffb"])[1] == tokenizer.encode("a\ufffdb")


def test_prepend_and_append_take_ids_and_texts(tiny):
    assert tiny.encode("hi", prepend="<|bos|>", append=262) == [258, 256, 262]
    assert tiny(["hi", "", " hi"], prepend=0, append="<|user_end|>") == [[0, 256, 260], [0, 260], [0, 257, 260]]
    assert tiny.encode([]) == []
    assert tiny.encode("") == []
    with pytest.raises(KeyError, match="no special token '<|eos|>'"):
        tiny.encode("hi", prepend="<|eos|>")


@pytest.mark.parametrize("wrong", [None, 7, b"hi", ("hi",), ["hi", None], [["hi"]]])
def test_other_input_is_refused(tiny, hugging, wrong):
    for tokenizer in (tiny, hugging):
        with pytest.raises(ValueError, match="encode takes a str or a list of str, got"):
            tokenizer.encode(wrong)


def test_a_list_gives_the_same_at_any_number_of_threads(trained):
    texts = [CORPUS[start:start + 40] for start in range(0, len(CORPUS) - 40, 7)]
    expected = [trained.encode(text) for text in texts]
    results = {}
    def work(name):
        results[name] = trained.encode(texts, num_threads=1 + name % 8)
    threads = [threading.Thread(target=work, args=(name,)) for name in range(12)] # all at once, on one tokenizer
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12 and all(rows == expected for rows in results.values())


@pytest.mark.parametrize("blanks", [" " * 1_200_000, "\t \u00a0" * 500_000])
def test_very_long_blank_runs_are_encoded(tiny, blanks):
    """The regex engine would give up on a run of a million blanks."""
    assert tiny.decode(tiny.encode(f"hi{blanks}hi")) == f"hi{blanks}hi"
    assert tiny.decode(tiny.encode([blanks, "hi"])[0]) == blanks


def test_training_takes_very_long_blank_runs():
    tokenizer = RustBPETokenizer.train_from_iterator(iter([" " * 1_200_000 + "hi hi"]), 280)
    assert tokenizer.get_vocab_size() == 280


def test_long_text_without_long_blank_runs_is_encoded_in_one_piece(trained):
    text = CORPUS * (1 + MAX_BLANK_RUN // len(CORPUS))
    assert len(text) > MAX_BLANK_RUN and trained.encode(text) == trained.enc.encode_ordinary(text)


def test_unknown_ids_and_names_raise_key_error(tiny):
    with pytest.raises(KeyError):
        tiny.decode([267])
    with pytest.raises(KeyError):
        tiny.decode_single_token_bytes(267)
    for text in ("hi", "<|endoftext|>"): # an ordinary token is no special one
        with pytest.raises(KeyError, match="no special token"):
            tiny.encode_special(text)


def test_names_and_texts_of_tokens(tiny):
    assert tiny.get_special_tokens() == set(SPECIAL_TOKENS)
    assert tiny.id_to_token(257) == " hi" and tiny.id_to_token(258) == "<|bos|>" and tiny.id_to_token(200) == "\ufffd"
    assert tiny.decode([258, 256, 259]) == "<|bos|>hi<|user_start|>"


def test_token_bytes_are_raw_bytes(tiny, trained):
    expected = [1] * 256 + [2, 3] + [0] * 9
    assert token_bytes_of(tiny).tolist() == expected and token_bytes_of(tiny).dtype == torch.int32
    by_hand = [len(trained.decode_single_token_bytes(i)) for i in range(331)] + [0] * 9
    assert token_bytes_of(trained).tolist() == by_hand

# -----------------------------------------------------------------------------
# Streaming

@quick
@given(data=st.lists(st.integers(0, 339), max_size=40))
def test_streamed_text_is_the_decoding_of_all_but_special_tokens(trained, data):
    decoder = IncrementalDecoder(trained)
    pieces = [decoder.push(token_id) for token_id in data] + [decoder.flush()]
    assert "".join(pieces) == trained.decode([token_id for token_id in data if token_id < 331])


def test_a_stream_is_cut_between_whole_characters_only(tiny):
    decoder = IncrementalDecoder(tiny)
    ids = tiny.encode("\u00e9") + [261] + list("\U0001f642!".encode())
    assert [decoder.push(token_id) for token_id in ids] == ["", "\u00e9", "", "", "", "", "\U0001f642", "!"]
    assert decoder.flush() == ""
    assert [decoder.push(0xF0), decoder.push(0x9F), decoder.flush()] == ["", "", "\ufffd"]


def test_a_stream_looks_at_each_token_once():
    class Counting:
        special_ids, looked_at = {}, 0

        def decode_single_token_bytes(self, token_id):
            self.looked_at += 1
            return bytes([token_id])
    decoder = IncrementalDecoder(counting := Counting())
    assert "".join(decoder.push(token_id) for token_id in b"linear" * 100) == "linear" * 100
    assert counting.looked_at == 600

# -----------------------------------------------------------------------------
# Files

def test_the_portable_file_gives_the_same_tokenizer(trained, tmp_path):
    trained.save(tmp_path / "tokenizer")
    assert os.listdir(tmp_path / "tokenizer") == ["tokenizer.json"]
    loaded = RustBPETokenizer.from_directory(tmp_path / "tokenizer")
    assert loaded.encode(CORPUS) == trained.encode(CORPUS)
    assert loaded.fingerprint() == trained.fingerprint()
    assert loaded.get_bos_token_id() == trained.get_bos_token_id()
    data = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    assert data["pattern"] == SPLIT_PATTERN and data["special_tokens"]["<|bos|>"] == 331
    assert list(data["mergeable_ranks"].values()) == list(range(331)) and data["mergeable_ranks"]["YQ=="] == ord("a")


def test_the_fingerprint_changes_with_all_that_decides_ids(tiny):
    enc = tiny.enc
    def fingerprint(pattern=enc._pat_str, ranks=enc._mergeable_ranks, special=enc._special_tokens):
        enc2 = tiktoken.Encoding("other name", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        return RustBPETokenizer(enc2, "<|bos|>").fingerprint()
    swapped = {**enc._mergeable_ranks, b"hi": 257, b" hi": 256}
    prints = [fingerprint(), fingerprint(pattern=r"\s|\S+"), fingerprint(ranks=swapped),
              fingerprint(special={**enc._special_tokens, "<|more|>": 267})]
    assert len(set(prints)) == 4 and prints[0] == tiny.fingerprint() and len(prints[0]) == 64


def test_a_legacy_pickle_is_read(tiny, tmp_path):
    for protocol in (4, pickle.HIGHEST_PROTOCOL): # published files have 4
        (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(tiny.enc, protocol))
        loaded = RustBPETokenizer.from_directory(tmp_path)
        assert loaded.fingerprint() == tiny.fingerprint() and loaded.encode("hi hi") == [256, 257]


def test_a_legacy_pickle_of_a_registered_encoding_is_read(monkeypatch, tmp_path):
    import tiktoken.registry
    enc = tiktoken.Encoding("toy", pat_str=SPLIT_PATTERN, mergeable_ranks={bytes([i]): i for i in range(256)},
                            special_tokens={"<|endoftext|>": 256})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "toy", enc)
    assert enc.__getstate__() == "toy"
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(enc))
    loaded = RustBPETokenizer.from_directory(tmp_path)
    assert loaded.enc is enc and loaded.get_bos_token_id() == 256
    assert RustBPETokenizer.from_pretrained("toy").get_bos_token_id() == 256


def test_the_portable_file_wins_over_a_pickle(tiny, trained, tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(trained.enc))
    tiny.save(tmp_path)
    assert RustBPETokenizer.from_directory(tmp_path).fingerprint() == tiny.fingerprint()


class RunsOnLoad:
    def __reduce__(self):
        return os.mkdir, ("broken_into",)


MALICIOUS = {
    "a call": pickle.dumps(RunsOnLoad()),
    "a call, protocol 0": pickle.dumps(RunsOnLoad(), 0),
    "a call inside a container": pickle.dumps({"mergeable_ranks": [RunsOnLoad()]}),
    "a name behind the admitted class": b"\x80\x04\x8c\x0dtiktoken.core\x8c\x11Encoding.__init__\x93.",
    "another name of the admitted module": b"ctiktoken.core\nfunctools\n.",
    "a builtin": b"cbuiltins\neval\n(S'1'\ntR.",
    "a class of ours": b"cnanochat.tokenizer\nRustBPETokenizer\n.",
    "a persistent id": b"Pone\n.",
}


@pytest.mark.parametrize("kind", MALICIOUS)
def test_a_pickle_that_asks_for_anything_else_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(MALICIOUS[kind])
    with pytest.raises(ValueError, match="tokenizer.pkl must hold a nanochat tokenizer"):
        RustBPETokenizer.from_directory(tmp_path)
    assert os.listdir(tmp_path) == ["tokenizer.pkl"]


BYTES = {bytes([i]): i for i in range(256)}


@pytest.mark.parametrize("state", [
    7, [], {}, {"pat_str": "x"}, "no_such_encoding",
    {"pat_str": "x", "mergeable_ranks": {b"a": 0, b"b": 1}, "special_tokens": {"<|bos|>": 256}}, # bytes are missing
    {"pat_str": "x", "mergeable_ranks": {**BYTES, b"aa": 255}, "special_tokens": {"<|bos|>": 256}}, # 255 twice
    {"pat_str": "x", "mergeable_ranks": {**BYTES, b"aa": -1}, "special_tokens": {"<|bos|>": 256}},
    {"pat_str": "(", "mergeable_ranks": BYTES, "special_tokens": {"<|bos|>": 256}},
    {"pat_str": "x", "mergeable_ranks": BYTES, "special_tokens": {"<|pos|>": 256}},
])
def test_a_pickle_of_nonsense_is_refused(state, tmp_path):
    instance, build_and_stop = b"\x80\x03ctiktoken.core\nEncoding\n)\x81", b"b."
    (tmp_path / "tokenizer.pkl").write_bytes(instance + pickle.dumps(state, 3)[2:-1] + build_and_stop)
    with pytest.raises(ValueError, match="run `python -m scripts.tok_train`"):
        RustBPETokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda text: text[:len(text) // 2], lambda text: "[1, 2]", lambda text: "",
    lambda text: text.replace('"aGk="', '"?"'), lambda text: text.replace(": 257", ": 256"),
    lambda text: text.replace(": 0,", ': "0",'), lambda text: text.replace("bos", "pos"),
])
def test_a_damaged_portable_file_is_one_sentence(tiny, tmp_path, damage):
    path = tmp_path / "tokenizer.json"
    tiny.save(tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match="tokenizer.json must hold a nanochat tokenizer, but") as caught:
        RustBPETokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


def test_each_class_names_the_other_when_it_meets_its_file(tiny, hugging, tmp_path):
    hugging.save(tmp_path / "hugging")
    with pytest.raises(ValueError, match="if it is Hugging Face's, use HuggingFaceTokenizer"):
        RustBPETokenizer.from_directory(tmp_path / "hugging")
    tiny.save(tmp_path / "ours")
    for folder in ("ours", "nothing"):
        with pytest.raises(ValueError, match="if it is nanochat's own, use RustBPETokenizer"):
            HuggingFaceTokenizer.from_directory(tmp_path / folder)


def test_the_base_directory_holds_tokenizer_and_token_bytes(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for get in (get_tokenizer, get_token_bytes):
        with pytest.raises(FileNotFoundError, match="run `python -m scripts.tok_train` first"):
            get()
    tiny.save(tmp_path / "tokenizer")
    torch.save(token_bytes_of(tiny), tmp_path / "tokenizer" / "token_bytes.pt")
    assert get_tokenizer().fingerprint() == tiny.fingerprint()
    assert torch.equal(get_token_bytes(torch.device("cpu")), token_bytes_of(tiny))
    for damaged in (b"", b"torch", (tmp_path / "tokenizer" / "token_bytes.pt").read_bytes()[:300]):
        (tmp_path / "tokenizer" / "token_bytes.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="token_bytes.pt is damaged"):
            get_token_bytes()

# -----------------------------------------------------------------------------
# Conversations

def message(role, content):
    return {"role": role, "content": content}


def chat(*contents):
    """A conversation of these contents, user and assistant in turn."""
    return {"messages": [message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]}


TOOL_CALL = [{"type": "text", "text": "a"}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"},
             {"type": "text", "text": "b"}]


def test_golden_rendering(tiny):
    """
    bos user_start S Y S \\n \\n hi user_end assistant_start a python_start 1 + 1 python_end output_start 2 output_end b
    assistant_end. Trained on: the assistant's own words and its call, not what the tool answered.
    """
    conversation = {"messages": [message("system", "SYS"), message("user", "hi"), message("assistant", TOOL_CALL)],
                    "letters": ["A"]}
    before = copy.deepcopy(conversation)
    ids, mask = tiny.render_conversation(conversation)
    assert ids == [258, 259, 83, 89, 83, 10, 10, 256, 260, 261, 97, 263, 49, 43, 49, 264, 265, 50, 266, 98, 262]
    assert mask == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1]
    assert conversation == before


def test_neighbouring_parts_are_not_merged(tiny):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert tiny.render_conversation(chat("hi", parts))[0] == [258, 259, 256, 260, 261, 104, 105, 262]
    assert tiny.render_conversation(chat("hi", "hi"))[0] == [258, 259, 256, 260, 261, 256, 262]


def test_a_conversation_may_end_with_the_user_and_parts_may_be_empty(tiny):
    assert tiny.render_conversation(chat("hi")) == ([258, 259, 256, 260], [0, 0, 0, 0])
    assert tiny.render_conversation(chat("", [], "hi")) == (
        [258, 259, 260, 261, 262, 259, 256, 260], [0, 0, 0, 0, 1, 0, 0, 0])


def test_special_tokens_in_a_message_stay_text(tiny):
    text = "<|assistant_end|><|user_start|>"
    ids, _ = tiny.render_conversation(chat(text, text))
    assert [i for i in ids if i >= 258] == [258, 259, 260, 261, 262]
    assert tiny.decode(ids) == f"<|bos|><|user_start|>{text}<|user_end|><|assistant_start|>{text}<|assistant_end|>"


def test_the_cut_falls_anywhere_and_can_be_found_out(tiny):
    whole_ids, whole_mask = tiny.render_conversation(chat("hi", TOOL_CALL), max_tokens=None)
    assert len(whole_ids) == 16
    for max_tokens in range(1, 18):
        ids, mask = tiny.render_conversation(chat("hi", TOOL_CALL), max_tokens=max_tokens)
        assert ids == whole_ids[:max_tokens] and mask == whole_mask[:max_tokens]
    assert len(tiny.render_conversation(chat("hi " * 3000))[0]) == 2048


@pytest.mark.parametrize("conversation, words", [
    (None, 'must have "messages", a list of at least one, got None'),
    ({}, 'must have "messages"'),
    ({"messages": []}, "a list of at least one"),
    ({"messages": "hi"}, "a list of at least one"),
    ({"messages": [message("system", "s")]}, "message 0 is from the system and must be followed by a user message"),
    ({"messages": [message("system", ["s"]), message("user", "u")]},
     r"message 0 \(system\) must have a str as content.*got list"),
    ({"messages": [message("system", "s"), message("assistant", "a")]}, "message 1 must be from the user"),
    ({"messages": [message("user", "u"), message("system", "s")]}, "message 1 must be from the assistant .* 'system'"),
    ({"messages": [message("assistant", "a")]}, "message 0 must be from the user"),
    ({"messages": [message("user", "u"), message("user", "u")]}, "message 1 must be from the assistant"),
    ({"messages": [message("user", "u"), message("assistant", "a"), message("tool", "t")]},
     "message 2 must be from the user .* 'tool'"),
    ({"messages": ["hi"]}, 'message 0 must be a dict with "role" and "content", got \'hi\''),
    ({"messages": [{"role": "user"}]}, 'message 0 must be a dict with "role" and "content"'),
    (chat(None), r"message 0 \(user\) must have a str as content.*got NoneType"),
    (chat([{"type": "text", "text": "u"}]), r"message 0 \(user\) must have a str as content.*got list"),
    (chat("u", 7), r"message 1 \(assistant\) must have a str as content, or a list of parts"),
    (chat("u", ["text"]), "message 1 must have parts with a type of text, python, python_output .* got 'text'"),
    (chat("u", [{"type": "image"}]), "message 1 must have parts .* got {'type': 'image'}"),
    (chat("u", [{"type": ["text"], "text": "a"}]), "message 1 must have parts"),
    (chat("u", [{"type": "text"}]), "message 1 must have parts .* got {'type': 'text'}"),
    (chat("u", [{"type": "python", "text": None}]), "message 1 must have parts"),
])
def test_a_malformed_conversation_is_named(tiny, conversation, words):
    for render in (tiny.render_conversation, tiny.render_for_completion):
        with pytest.raises(ValueError, match=words):
            render(conversation)


@pytest.fixture
def warnings_anew():
    tokenizer_module._warn_that_prompt_was_cut.cache_clear()
    yield
    tokenizer_module._warn_that_prompt_was_cut.cache_clear()


def test_a_prompt_is_the_conversation_up_to_the_answer(tiny):
    prompt = [258, 259, 256, 260, 261]
    assert tiny.render_for_completion(chat("hi")) == prompt
    assert tiny.render_for_completion(chat("hi", "hi")) == prompt
    assert tiny.render_for_completion(chat("hi", TOOL_CALL)) == prompt
    longer = tiny.render_for_completion(chat("hi", TOOL_CALL, "hi"))
    assert longer == tiny.render_conversation(chat("hi", TOOL_CALL, "hi"))[0] + [261]
    assert longer == tiny.render_for_completion(chat("hi", TOOL_CALL, "hi", "never seen"))
    with pytest.raises(ValueError, match="message 0 must be from the user"):
        tiny.render_for_completion({"messages": [message("assistant", "hi")]})


def test_a_long_prompt_keeps_the_most_recent_turns(tiny, warnings_anew):
    """Each pair of turns "hi" takes 6 tokens, the last question 3; with bos and assistant_start: 5, 11, 17, ..."""
    conversation = chat(*["hi"] * 9)
    whole = tiny.render_for_completion(conversation)
    assert len(whole) == 29
    assert tiny.render_for_completion(conversation, max_tokens=29) == whole
    with pytest.warns(UserWarning, match="its oldest turns are left out"):
        assert tiny.render_for_completion(conversation, max_tokens=28) == whole[:1] + whole[7:]
    for max_tokens in range(5, 28): # no second warning: here warnings are errors
        ids = tiny.render_for_completion(conversation, max_tokens=max_tokens)
        kept = (max_tokens - 5) // 6
        assert ids == whole[:1] + whole[29 - 4 - 6 * kept:]


def test_a_long_question_loses_its_front(tiny, warnings_anew):
    with pytest.warns(UserWarning):
        ids = tiny.render_for_completion(chat("x" * 3000 + "y"), max_tokens=8)
    assert ids == [258, 259, 120, 120, 120, 121, 260, 261]
    ids = tiny.render_for_completion(chat("hi", "hi", "z" * 5000, "an answer"))
    assert len(ids) == 2048 and ids[:3] == [258, 259, 122] and ids[-3:] == [122, 260, 261]
    assert tiny.render_for_completion(chat("hi", "hi", "hi"), max_tokens=4) == [258, 259, 260, 261]
    with pytest.raises(ValueError, match="max_tokens >= 4 .* got 3"):
        tiny.render_for_completion(chat("hi"), max_tokens=3)


def test_visualization_colours_what_is_trained_on(tiny):
    assert tiny.visualize_tokenization([258, 256], [0, 1]) == "\033[91m<|bos|>\033[0m|\033[92mhi\033[0m"
    assert tiny.visualize_tokenization([256], [1], with_token_id=True) == "\033[92mhi\033[0m\033[90m(256)\033[0m"

# -----------------------------------------------------------------------------
# The Hugging Face tokenizer

def test_hugging_face_special_tokens_come_first(hugging):
    assert [hugging.encode_special(token) for token in SPECIAL_TOKENS] == list(range(9))
    assert hugging.get_bos_token_id() == 0 and hugging.get_vocab_size() == 340
    assert hugging.get_special_tokens() == SPECIAL_TOKENS
    assert hugging.id_to_token(0) == "<|bos|>" and hugging.id_to_token(340) is None
    with pytest.raises(KeyError, match="no special token '<|eos|>'"):
        hugging.encode_special("<|eos|>")


def test_hugging_face_learns_the_same_merges(hugging, trained):
    """Ties may be ordered otherwise, but on this text the two vocabularies have the same total length."""
    assert abs(len(hugging.encode(CORPUS)) - len(trained.encode(CORPUS))) <= 3


@quick
@given(text=TEXT)
def test_hugging_face_text_survives_with_its_bytes(hugging, text):
    text += "<|bos|>"
    ids = hugging.encode(text)
    assert hugging.decode(ids) == text and 0 not in ids
    assert b"".join(map(hugging.decode_single_token_bytes, ids)) == text.encode("utf-8")
    assert token_bytes_of(hugging)[ids].sum().item() == len(text.encode("utf-8"))
    assert hugging.encode([text, ""], prepend="<|bos|>", append=1) == [[0, *ids, 1], [0, 1]]


def test_hugging_face_streams_and_saves(hugging, tmp_path):
    hugging.save(tmp_path)
    for loaded in (HuggingFaceTokenizer.from_directory(tmp_path), HuggingFaceTokenizer.from_pretrained(str(tmp_path))):
        assert loaded.encode(CORPUS + "<|bos|>") == hugging.encode(CORPUS + "<|bos|>")
    decoder = IncrementalDecoder(hugging)
    ids = hugging.encode(CORPUS, prepend="<|bos|>")
    assert "".join(map(decoder.push, ids)) + decoder.flush() == CORPUS
    assert token_bytes_of(hugging)[:9].tolist() == [0] * 9


def test_hugging_face_models_without_bos_or_bytes_say_so():
    from tokenizers import AddedToken, Tokenizer, models
    words = Tokenizer(models.WordLevel({"\u2581the": 0, "a": 1}, unk_token="a"))
    with pytest.raises(KeyError, match="no special token '<|endoftext|>'"):
        HuggingFaceTokenizer(words).get_bos_token_id()
    words.add_special_tokens([AddedToken("<|endoftext|>")])
    tokenizer = HuggingFaceTokenizer(words)
    assert tokenizer.get_bos_token_id() == 2
    with pytest.raises(ValueError, match="SentencePiece vocabularies .* not for one with the token '\u2581the'"):
        token_bytes_of(tokenizer)
    with pytest.raises(KeyError):
        tokenizer.decode_single_token_bytes(3)
