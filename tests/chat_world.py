"""A tiny chat model, conversations, and a base directory that holds all that the chat stages ask for."""
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
from nanochat.common import Compute, hub_mirror_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer
from tasks.common import Task

CPU = Compute(False, 0, 0, 1, torch.device("cpu"))


def tiny_tokenizer():
    return RustBPETokenizer.train_from_iterator(["the cat sat on the mat and the dog ate the hat " * 20], 280)


class Chat(Task):
    """Conversations of different lengths; the answer repeats a word as often as the question says."""

    def num_examples(self):
        return 24

    def get_example(self, index):
        question = f"say {'the cat '[:3 + index % 5]} {index % 4 + 1} times"
        return {"messages": [{"role": "user", "content": question},
                             {"role": "assistant", "content": "the " * (index % 4 + 1)}]}


def tiny_model(tokenizer, dtype=torch.float32):
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=64, vocab_size=tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2,
                          n_embd=32, window_pattern="SL"))
    model.init_weights()
    for p in model.parameters(): # zero matrices would hide mistakes in whatever feeds them
        p.data += 0.02 * torch.randn_like(p)
    if dtype == torch.float64:
        model.rotary_dtype = torch.float64
        model.double().init_rotary()
    return model


def save_tiny_model(tokenizer, source="base", tag="own", step=7, change=0.0):
    model = tiny_model(tokenizer)
    model.lm_head.weight.data[0, 0] += change
    save_checkpoint(checkpoint_dir(source, tag), step, model.state_dict(), None,
                    {"step": step, "model_config": vars(model.config)}, tokenizer=tokenizer)


def fill_base_dir(base_dir, tokenizer):
    """A base checkpoint, and all data that the mixtures ask for."""
    chat = list(Chat())
    arc = {"question": "hot?", "choices": {"text": ["the cat", "the mat"], "label": ["A", "B"]}, "answerKey": "B"}
    mmlu = {"question": "cat?", "subject": "law", "choices": ["the", "cat", "sat", "on"], "answer": 1}
    gsm8k = {"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"}
    for name, subset, split, rows in [
        ("allenai/ai2_arc", "ARC-Easy", "train", [arc] * 4), ("allenai/ai2_arc", "ARC-Challenge", "train", [arc] * 4),
        ("allenai/ai2_arc", "ARC-Easy", "validation", [arc] * 4), ("cais/mmlu", "all", "validation", [mmlu] * 4),
        ("cais/mmlu", "auxiliary_train", "train", [{"train": mmlu}] * 6),
        ("openai/gsm8k", "main", "train", [gsm8k] * 4),
        ("HuggingFaceTB/smol-smoltalk", None, "train", chat), ("HuggingFaceTB/smol-smoltalk", None, "test", chat[:9]),
    ]:
        os.makedirs(hub_mirror_dir(name, subset, split))
        pq.write_table(pa.Table.from_pylist(rows), os.path.join(hub_mirror_dir(name, subset, split), "0.parquet"))
    (base_dir / "identity_conversations.jsonl").write_text(json.dumps(chat[0]["messages"]) + "\n")
    (base_dir / "words_alpha.txt").write_text("\n".join(a + b + c for a in "bcdfgh" for b in "aeiou" for c in "lmnrst"))
    save_tiny_model(tokenizer)


def metrics_of(folder):
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]
