"""
Text to token ids and back, and the one rendering of a conversation.

    str  ->  pieces of SPLIT_PATTERN  ->  UTF-8 bytes  ->  byte-pair merges  ->  ids       (decode goes back)
    {"messages": [...]}  ->  render_conversation  ->  ids, mask

Byte-pair encoding of text: Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909); on bytes: Radford et al. 2019
(GPT-2). rustbpe trains, tiktoken encodes. Special tokens are put in by the rendering and by `prepend` / `append` only:
text that spells one stays text. Knows nothing about models.
"""
import base64
import codecs
import contextlib
import functools
import hashlib
import itertools
import json
import os
import pickle
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch

from nanochat.common import get_base_dir, read_json, write_json

SPECIAL_TOKENS = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                  "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
# GPT-4's pattern, but digits in groups of at most 2, not 3: at depth 12 and V = 32K, val bpb was 0.965 against 0.972
SPLIT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS) # every byte is a token
FILE_FORMAT = "nanochat tokenizer 1" # marks our tokenizer.json: Hugging Face has another file of that name
MAX_BLANK_RUN = 500_000 # characters; the regex engines of tiktoken and rustbpe panic at about a million
PROBE = "A small  test:\n\n\tdon't 12,345 \u00e9\u00df \u4f60\u597d \U0001f600 \uff21\ufb01" # NFC leaves it as it is
PARTS = { # part type of an assistant message: (opening token, closing token, is it trained on?)
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}

class _TextEncoder:
    """What both tokenizers share. A subclass has `special_ids`, {text: id}, and `_encode_texts(texts, num_threads)`."""

    def encode_special(self, text):
        """Id of the special token with this text. Raises KeyError when there is none."""
        if text not in self.special_ids:
            raise KeyError(f"no special token {text!r} in this tokenizer, which has {sorted(self.special_ids)}")
        return self.special_ids[text]

    def encode(self, text, prepend=None, append=None, num_threads=8):
        """
        Encode a str to a list of ids, or a list of str to a list of such lists, in order, with `num_threads` threads.

        prepend, append: id or text of a special token that every sequence begins / ends with.
        A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD. Raises ValueError for another type of input.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list) or not all(isinstance(item, str) for item in texts):
            raise ValueError(f"encode takes a str or a list of str, got {text!r:.80}")
        first, last = ([] if end is None else [self.encode_special(end) if isinstance(end, str) else end]
                       for end in (prepend, append))
        rows = [first + ids + last for ids in self._encode_texts(texts, num_threads)]
        return rows[0] if isinstance(text, str) else rows

    __call__ = encode

class RustBPETokenizer(_TextEncoder):
    """The default tokenizer: ids 0..255 are the bytes, then come the merges by rank, then the special tokens."""

    def __init__(self, enc, bos_token):
        """enc: a tiktoken.Encoding; bos_token: text of the token that sequences begin with."""
        self.enc = enc
        self.special_ids = dict(enc._special_tokens)
        self.bos_token_id = self.encode_special(bos_token)

    @classmethod
    def train_from_iterator(cls, text_iterator, vocab_size):
        """Learn `vocab_size` tokens, special ones included, from str's; fewer when the text has no more merges."""
        import rustbpe
        if vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(f"a vocabulary needs at least {MIN_VOCAB_SIZE} tokens (256 bytes and "
                             f"{len(SPECIAL_TOKENS)} special tokens), got {vocab_size}")
        trainer = rustbpe.Tokenizer()
        pieces = (piece for text in text_iterator for piece in _cut_long_blanks(text))
        trainer.train_from_iterator(pieces, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        special_ids = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        return cls(build_encoding(trainer.get_pattern(), ranks, special_ids), "<|bos|>")

    @classmethod
    def from_directory(cls, tokenizer_dir):
        """Load what `save` wrote or, without it, a legacy tokenizer.pkl. Raises FileNotFoundError or ValueError."""
        for name, read in (("tokenizer.json", _read_portable), ("tokenizer.pkl", _read_legacy_pickle)):
            path = os.path.join(tokenizer_dir, name)
            if os.path.exists(path):
                try:
                    enc = read(path)
                    return cls(enc, "<|bos|>" if "<|bos|>" in enc._special_tokens else "<|endoftext|>")
                except Exception as error: # a foreign file can fail in any way
                    raise ValueError(f"{path} must hold a nanochat tokenizer, but cannot be read as one ({error}): "
                                     "get the file again, or run `python -m scripts.tok_train`") from error
        raise FileNotFoundError(f"no tokenizer in {tokenizer_dir}: run `python -m scripts.tok_train` first")

    @classmethod
    def from_pretrained(cls, tiktoken_name):
        """One of tiktoken's own, e.g. "gpt2" or "cl100k_base"; tiktoken downloads it on first use."""
        import tiktoken
        return cls(tiktoken.get_encoding(tiktoken_name), "<|endoftext|>")

    def save(self, tokenizer_dir):
        """Write <tokenizer_dir>/tokenizer.json: pattern, special tokens, and each token's bytes in base64 by rank."""
        write_json(os.path.join(tokenizer_dir, "tokenizer.json"), {"format": FILE_FORMAT, **self._content()})

    def fingerprint(self):
        """Hex SHA-256 of all that decides the ids: equal for equal tokenizers, however they were stored."""
        return hashlib.sha256(json.dumps(self._content()).encode()).hexdigest()

    def _content(self):
        """Pattern, special tokens and merge ranks as plain JSON, in the order of ids."""
        special_ids, ranks = (sorted(ids.items(), key=lambda item: item[1])
                              for ids in (self.special_ids, self.enc._mergeable_ranks))
        return {"pattern": self.enc._pat_str, "special_tokens": dict(special_ids),
                "mergeable_ranks": {base64.b64encode(token).decode(): rank for token, rank in ranks}}

    def get_bos_token_id(self):
        return self.bos_token_id

    def get_vocab_size(self):
        """Largest id + 1, special tokens included."""
        return self.enc.n_vocab

    def get_special_tokens(self):
        return set(self.special_ids)

    def _encode_texts(self, texts, num_threads):
        def encode_one(text):
            return list(itertools.chain.from_iterable(map(self.enc.encode_ordinary, _cut_long_blanks(text))))
        if len(texts) == 1:
            return [encode_one(texts[0])]
        with ThreadPoolExecutor(num_threads) as pool: # tiktoken releases the GIL
            return list(pool.map(encode_one, texts))

    def decode(self, ids):
        """Text of ids: U+FFFD for invalid UTF-8, special tokens as their text. Raises KeyError for an unknown id."""
        return self.enc.decode(ids)

    def id_to_token(self, token_id):
        return self.enc.decode([token_id])

    def decode_single_token_bytes(self, token_id):
        return self.enc.decode_single_token_bytes(token_id)

    def render_conversation(self, conversation, max_tokens=2048):
        """
        Render a conversation for training: (ids, mask), lists of equal length; mask 1 = the model learns to say it.

        conversation  {"messages": [{"role", "content"}, ...]}: user and assistant in turn, user first; a system message
                      in front joins the first user message. Content is a str; the assistant's may be a list of
                      {"type": "text" | "python" | "python_output", "text": str}. Never changed.
        max_tokens    the cut, wherever it falls; None = no cut, which is how to learn whether one is needed
        Raises ValueError naming the malformed message.
        """
        ids, mask = [self.bos_token_id], [0]
        for turn in _checked_turns(conversation):
            turn_ids, turn_mask = self.render_turn(*turn)
            ids += turn_ids
            mask += turn_mask
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation, max_tokens=2048):
        """
        Render what the assistant answers to: ids that end with assistant_start. A final assistant message is left out.

        When that exceeds max_tokens, the oldest pairs of question and answer go, and at last the front of the last
        question's text; warnings.warn says so once. Raises ValueError naming the malformed message.
        """
        if max_tokens < 4:
            raise ValueError(f"a prompt needs max_tokens >= 4 for its special tokens, got {max_tokens}")
        turns = _checked_turns(conversation)
        turns = turns[:-1] if turns[-1][0] == "assistant" else turns
        rendered = [self.render_turn(*turn)[0] for turn in turns]
        room = max_tokens - 2 # for bos and assistant_start
        if sum(map(len, rendered)) > room:
            _warn_that_prompt_was_cut()
        while len(rendered) > 1 and sum(map(len, rendered)) > room:
            del rendered[:2] # first and last turn are the user's, before and after
        start = max(1, len(rendered[0]) - (room - 1)) # 1: user_start stays
        rendered[0] = rendered[0][:1] + rendered[0][start:]
        return [self.bos_token_id, *itertools.chain(*rendered), self.encode_special("<|assistant_start|>")]

    def render_turn(self, role, parts):
        """(ids, mask) of one turn from its role and its parts, a list of (part type, text)."""
        trained_role = int(role == "assistant")
        ids, mask = [self.encode_special(f"<|{role}_start|>")], [0]
        for part_type, text in parts:
            opening, closing, trained = PARTS[part_type]
            part_ids = self.encode(text, prepend=opening, append=closing)
            ids += part_ids
            mask += [trained_role * trained] * len(part_ids)
        return ids + [self.encode_special(f"<|{role}_end|>")], mask + [trained_role]

    def visualize_tokenization(self, ids, mask, with_token_id=False):
        """Tokens joined by "|", green where mask is 1, else red; with_token_id adds the ids in grey (ANSI colours)."""
        return "|".join(f"\033[{92 if trained else 91}m{self.decode([token_id])}\033[0m"
                        + (f"\033[90m({token_id})\033[0m" if with_token_id else "")
                        for token_id, trained in zip(ids, mask, strict=True))

class HuggingFaceTokenizer(_TextEncoder):
    """A `tokenizers.Tokenizer` in the same clothes, to evaluate other people's models. Renders no conversations."""

    def __init__(self, tokenizer, bos_token=None):
        """bos_token: text of the token that sequences begin with; None: <|bos|>, else <|endoftext|>."""
        self.tokenizer, self.bos_token = tokenizer, bos_token
        self.tokenizer.encode_special_tokens = True # as the plain text they are
        self.added = tokenizer.get_added_tokens_decoder() # id -> AddedToken
        self.special_ids = {token.content: token_id for token_id, token in self.added.items() if token.special}
        decoder = json.dumps(json.loads(tokenizer.to_str())["decoder"]) # how tokens spell bytes
        self.is_byte_level = '"ByteLevel"' in decoder
        self.is_sentencepiece = '"Metaspace"' in decoder or '"ByteFallback"' in decoder

    @classmethod
    def from_pretrained(cls, hf_path):
        """From the hub, e.g. "gpt2", or from a local folder."""
        from tokenizers import Tokenizer
        return cls.from_directory(hf_path) if os.path.isdir(hf_path) else cls(Tokenizer.from_pretrained(hf_path))

    @classmethod
    def from_directory(cls, tokenizer_dir):
        """Load <tokenizer_dir>/tokenizer.json of the Hugging Face format. Raises ValueError."""
        from tokenizers import Tokenizer
        path = os.path.join(tokenizer_dir, "tokenizer.json")
        try:
            return cls(Tokenizer.from_file(path))
        except Exception as error: # the library raises nothing narrower
            raise ValueError(f"{path} must hold a Hugging Face tokenizer, but cannot be read as one ({error}): "
                             "if it is nanochat's own, use RustBPETokenizer") from error

    @classmethod
    def train_from_iterator(cls, text_iterator, vocab_size):
        """Learn a vocabulary with the `tokenizers` library; here the special tokens have the ids 0..8."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=None, fuse_unk=False))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(pattern=Regex(SPLIT_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(text_iterator, trainers.BpeTrainer(
            vocab_size=vocab_size, show_progress=True, min_frequency=0,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL_TOKENS))
        return cls(tokenizer)

    def save(self, tokenizer_dir):
        """Write <tokenizer_dir>/tokenizer.json in the Hugging Face format."""
        write_json(os.path.join(tokenizer_dir, "tokenizer.json"), json.loads(self.tokenizer.to_str()))

    def get_bos_token_id(self):
        usual = "<|bos|>" if "<|bos|>" in self.special_ids else "<|endoftext|>"
        return self.encode_special(self.bos_token or usual)

    def get_vocab_size(self):
        """Largest id + 1: other people's vocabularies may have holes."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def get_special_tokens(self):
        return list(self.special_ids)

    def _encode_texts(self, texts, num_threads): # the library brings its own threads, and refuses surrogates
        texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def id_to_token(self, token_id):
        return self.tokenizer.id_to_token(token_id)

    def decode_single_token_bytes(self, token_id):
        """
        Raw bytes of a token as it stands within a text: of a byte-level vocabulary (as GPT-2's), or of SentencePiece's
        (as Llama's), where U+2581 is a blank and <0xE2> a byte. KeyError: unknown id; ValueError: another kind.
        """
        token, alphabet = self.id_to_token(token_id), byte_level_alphabet()
        if token is None:
            raise KeyError(token_id)
        if token_id in self.added or (self.is_byte_level and not set(token) <= alphabet.keys()):
            return token.encode("utf-8")
        if self.is_byte_level:
            return bytes(alphabet[char] for char in token)
        if not self.is_sentencepiece:
            raise ValueError("bytes per token are known for byte-level (as GPT-2's) and SentencePiece vocabularies (as "
                             f"Llama's) only, not for one with the token {token!r}")
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode("utf-8")

def to_hugging_face(tokenizer):
    """
    The `tokenizers.Tokenizer` with the ids of a RustBPETokenizer. It finds special tokens in a text, unless its
    encode_special_tokens is set; the marks of hf_export/chat_template.jinja hide them and keep parts apart.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    ranks, char_of = tokenizer.enc._mergeable_ranks, {byte: char for char, byte in byte_level_alphabet().items()}
    spelled = {token: "".join(char_of[byte] for byte in token) for token in ranks}
    merges = [_last_merge(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    hugging = Tokenizer(models.BPE({spelled[token]: rank for token, rank in ranks.items()},
                                   [(spelled[left], spelled[right]) for left, right in filter(None, merges)],
                                   ignore_merges=True)) # tiktoken too looks a whole piece up first
    hugging.normalizer = normalizers.Replace("<\ufdd0|", "<|")
    hugging.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\ufdd1\ufdd0", "removed"),
        pre_tokenizers.Split(Regex(tokenizer.enc._pat_str), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    hugging.decoder = decoders.ByteLevel()
    texts = sorted(tokenizer.special_ids, key=tokenizer.special_ids.get)
    hugging.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    if any(hugging.token_to_id(text) != token_id for text, token_id in tokenizer.special_ids.items()):
        raise ValueError("the ids of special tokens must follow on those of the others: this tokenizer has no equal in "
                         "the Hugging Face format")
    return hugging

def _last_merge(token, ranks):
    """The two tokens that this one (bytes) is merged from; None where merges by rank do not lead to it."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        if rank >= ranks[token]:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts

def from_hugging_face(path):
    """The RustBPETokenizer of a file that `to_hugging_face(...)` saved. Raises ValueError for another."""
    content, byte_of = read_json(path, model=dict, added_tokens=list, pre_tokenizer=dict), byte_level_alphabet()
    try:
        pattern = content["pre_tokenizer"]["pretokenizers"][1]["pattern"]["Regex"]
        ranks = {bytes(byte_of[char] for char in token): rank for token, rank in content["model"]["vocab"].items()}
        special_ids = {token["content"]: token["id"] for token in content["added_tokens"]}
        return RustBPETokenizer(build_encoding(pattern, ranks, special_ids), "<|bos|>")
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no tokenizer of nanochat's export ({type(error).__name__}: {error})") from error

class IncrementalDecoder:
    """Text of a stream of ids in linear time, cut between whole characters only. Special tokens give no text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.special_ids = set(tokenizer.special_ids.values())
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id):
        """The text that this id completes, perhaps empty."""
        is_special = token_id in self.special_ids
        return "" if is_special else self.utf8.decode(self.tokenizer.decode_single_token_bytes(token_id))

    def flush(self):
        """What is left at the end: nothing, or U+FFFD for a character that was never completed."""
        return self.utf8.decode(b"", final=True)

def get_tokenizer():
    """The tokenizer of the base directory. Raises FileNotFoundError when there is none."""
    return RustBPETokenizer.from_directory(os.path.join(get_base_dir(), "tokenizer"))

def get_token_bytes(device="cpu"):
    """Bytes per token as tok_train stored them: int32 (V,), special ones 0. Raises FileNotFoundError or ValueError."""
    path = os.path.join(get_base_dir(), "tokenizer", "token_bytes.pt")
    if not os.path.exists(path):
        raise FileNotFoundError(f"no {path}: run `python -m scripts.tok_train` first")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error: # a damaged file can fail in any way
        raise ValueError(f"{path} is damaged: run `python -m scripts.tok_train` again") from error

def token_bytes_of(tokenizer):
    """Number of raw bytes of every token: int32 (V,), 0 for special tokens and ids without a token."""
    token_bytes = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int32)
    for token_id in set(range(len(token_bytes))) - set(tokenizer.special_ids.values()):
        with contextlib.suppress(KeyError):
            token_bytes[token_id] = len(tokenizer.decode_single_token_bytes(token_id))
    return token_bytes

def unwritten_bytes(tokenizer):
    """
    (bos id, n): the n bytes that this tokenizer puts in front of a document, which `evaluate_bpb` must not count.

    Raises ValueError where bits per byte would mean nothing: where tokens do not spell the text that was encoded.
    """
    special_ids = set(tokenizer.special_ids.values())
    spelled = b"".join(tokenizer.decode_single_token_bytes(i) for i in tokenizer.encode(PROBE) if i not in special_ids)
    blanks = len(spelled) - len(PROBE.encode())
    if blanks not in (0, 1) or spelled != b" " * blanks + PROBE.encode():
        raise ValueError("bits per byte cannot be had with this tokenizer: it changes or drops characters of a text")
    return tokenizer.get_bos_token_id(), blanks

def _read_portable(path):
    """The tiktoken.Encoding of a tokenizer.json that RustBPETokenizer.save wrote."""
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    if data.get("format") != FILE_FORMAT:
        raise ValueError("another format; if it is Hugging Face's, use HuggingFaceTokenizer")
    ranks = {base64.b64decode(token, validate=True): rank for token, rank in data["mergeable_ranks"].items()}
    return build_encoding(data["pattern"], ranks, data["special_tokens"])

class _EncodingState:
    """Takes the place of tiktoken.core.Encoding while a pickle is read: keeps the state, runs nothing."""
    def __setstate__(self, state):
        self.state = state

class _LegacyUnpickler(pickle.Unpickler):
    """Admits plain containers and the one class of a legacy tokenizer.pkl."""
    def find_class(self, module, name):
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _EncodingState

def _read_legacy_pickle(path):
    """The tiktoken.Encoding of a legacy tokenizer.pkl; no code of the file runs."""
    with open(path, "rb") as file:
        state = _LegacyUnpickler(file).load().state
    if isinstance(state, str): # an encoding of tiktoken's registry is pickled as its name
        import tiktoken
        return tiktoken.get_encoding(state)
    return build_encoding(state["pat_str"], state["mergeable_ranks"], state["special_tokens"])

def build_encoding(pattern, ranks, special_ids):
    """A tiktoken.Encoding of str, {bytes: int}, {str: int}. Raises ValueError where tiktoken would panic later."""
    import tiktoken
    ids = [*ranks.values(), *special_ids.values()]
    if len(set(ids)) < len(ids) or not {bytes([byte]) for byte in range(256)} <= ranks.keys():
        raise ValueError("every id must belong to one token, and every single byte must be a token")
    return tiktoken.Encoding(name="rustbpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_ids)

def _cut_long_blanks(text):
    """The text in pieces, cut only inside runs of blanks that would exhaust the stack of the regex engine."""
    if len(text) <= MAX_BLANK_RUN:
        return [text]
    cuts = [cut for run in re.finditer(r"\s+", text)
            for cut in range(run.start() + MAX_BLANK_RUN, run.end(), MAX_BLANK_RUN)]
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]

@functools.cache
def byte_level_alphabet():
    """{character: byte} of GPT-2's vocabulary files: visible Latin-1 stands for itself, the rest for U+0100 onward."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}

def _checked_turns(conversation):
    """[(role, [(part type, text), ...]), ...]: user and assistant in turn, the system message merged, or ValueError."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f'a conversation must have "messages", a list of at least one, got {conversation!r:.80}')
    turns = [_checked_message(i, message) for i, message in enumerate(messages)]
    has_system = turns[0][0] == "system"
    if has_system and len(turns) == 1:
        raise ValueError("message 0 is from the system and must be followed by a user message, but is the only one")
    for i, (role, _) in enumerate(turns[has_system:]):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise ValueError(f"message {i + has_system} must be from the {expected} (user and assistant take turns), "
                             f"got the role {role!r}")
    if has_system:
        (_, [(_, system)]), (_, [(_, question)]) = turns[:2]
        turns[:2] = [("user", [("text", f"{system}\n\n{question}")])]
    return turns

def _checked_message(i, message):
    """(role, [(part type, text), ...]) of message i, counted from 0 as the caller sees it. Raises ValueError."""
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f'message {i} must be a dict with "role" and "content", got {message!r:.80}')
    role, content = message["role"], message["content"]
    if isinstance(content, str):
        return role, [("text", content)]
    if role != "assistant" or not isinstance(content, list):
        raise ValueError(f"message {i} ({role}) must have a str as content, or a list of parts if it is from the "
                         f"assistant, got {type(content).__name__}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in list(PARTS) or not isinstance(part.get("text"), str):
            raise ValueError(f"message {i} must have parts with a type of {', '.join(PARTS)} and a str as text, "
                             f"got {part!r:.80}")
    return role, [(part["type"], part["text"]) for part in content]

@functools.cache # hence once per process
def _warn_that_prompt_was_cut():
    warnings.warn("a conversation is longer than its prompt may be: its oldest turns are left out", stacklevel=3)
