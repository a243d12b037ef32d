"""
Stages in float64, one after the other in one process: for torchrun, whose ranks are to agree to rounding.

    torchrun ... tests/float64_stages.py '[["base", "--num-iterations=20", ...], ["sft", ...]]'

The scripts run as they are, but for the dtypes of weights, activations and rotary tables, and the rewards of chat_rl.
The string {rows} in a flag becomes the number of rows of each rank of a global batch of 12.
"""
import json
import os
import sys

import torch

from nanochat import chat_training, checkpoint_manager, common, gpt
from scripts import base_loss, base_train, chat_eval, chat_rl, chat_sft, mid_train
from tasks.registry import EVALS, REWARDED
from tests.chat_world import Chat

STAGES = {"base": base_train, "mid": mid_train, "sft": chat_sft, "rl": chat_rl, "base_loss": base_loss,
          "chat_eval": chat_eval}


class Vowels(Chat):
    """Rewards an answer that has an "e" in it, which an untrained model gives now and then."""
    eval_type = "generative"

    def evaluate(self, conversation, completion):
        return "e" in completion


class Float64GPT(gpt.GPT):
    """Exact rotary tables, and float64 weights as soon as they have been drawn."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rotary_dtype = torch.float64

    def init_weights(self):
        super().init_weights()
        self.double()


def compute_in_float64():
    base_train.GPT = checkpoint_manager.GPT = Float64GPT
    for module in (base_train, base_loss, chat_eval, chat_training):
        module.get_compute_dtype = lambda device, override="": torch.float64
    checkpoint_manager._weight_dtype = lambda *args: torch.float64 # of loaded weights


if __name__ == "__main__":
    compute_in_float64()
    REWARDED["GSM8K"], EVALS["GSM8K"] = Vowels, EVALS["GSM8K"]._replace(make=Vowels)
    rows = str(12 // int(os.environ.get("WORLD_SIZE", 1)))
    for stage, *flags in json.loads(sys.argv[1]):
        STAGES[stage].compute_cleanup = lambda: None # torchrun's store knows a process group of each process once only
        STAGES[stage].main([flag.replace("{rows}", rows) for flag in flags])
    common.compute_cleanup() # else gloo's threads may end the process with an abort
