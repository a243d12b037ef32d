"""
Hugging Face in and out: other people's models for our evaluations, and our models for `transformers`.

    load_hf_model(path)     a causal language model in the clothes of our own, and its tokenizer
    export_model(...)       a checkpoint as safetensors, config, tokenizer.json and chat template
    import_model(...)       an export as the checkpoint that it was made from

    python -m nanochat.hf_model export --source sft --out DIR
    python -m nanochat.hf_model import DIR --source sft --model-tag d6

An export brings our own gpt.py, behind hf_export/modeling_nanochat.py (trust_remote_code=True); a model without value
embeddings, scalars and windows is the NanoChat class of `transformers` and needs no code. What comes from elsewhere is
read as tensors and JSON: no code of it ever runs.
"""
import argparse
import importlib
import inspect
import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from nanochat import common, flash_attention, gpt, optim
from nanochat.common import UserError, print0, read_json, run_main, write_json
from nanochat.tokenizer import HuggingFaceTokenizer, from_hugging_face, to_hugging_face

ASSETS = os.path.join(os.path.dirname(__file__), "hf_export")
SEQUENCE_LEN = 1024 # tokens per row for the loss of a foreign model that can take so many
NATIVE_NAMES = { # of weights: ours, and those of the NanoChat class of transformers
    "transformer.wte": "model.embed_tokens", "transformer.h": "model.layers", "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
TABLE = re.compile(r"(wte|lm_head|value_embeds\.\d+)\.weight") # a row for each token, and rows of padding: not exported


def _library(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"this needs the package {name.split('.')[0]}: pip install it, or run runs/setup.sh") from error

# -----------------------------------------------------------------------------
# In: a foreign model

class HuggingFaceModel:
    """
    A causal language model of `transformers` that is called as GPT is, without a KV cache.

    max_seq_len          most tokens that it takes, None = no limit; core_eval cuts prompts to it
    config.vocab_size    the tokenizer's; the model may have more rows than that, as padding
    config.sequence_len  tokens per row for the loss
    """

    def __init__(self, model, vocab_size):
        self.model, config = model, model.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_seq_len") # by the age of the model
        self.max_seq_len = next(filter(None, (getattr(config, name, None) for name in names)), None)
        self.config = SimpleNamespace(vocab_size=vocab_size,
                                      sequence_len=min(SEQUENCE_LEN, self.max_seq_len or SEQUENCE_LEN))

    def get_device(self):
        return self.model.device

    def __call__(self, idx, targets=None, loss_reduction="mean"):
        """(B, T) ids -> fp32 logits (B, T, rows); with targets, -1 = ignored, the loss in nats, (B*T,) for "none"."""
        logits = self.model(input_ids=idx, use_cache=False).logits.float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction)


def check_choice_of_model(args):
    """What is wrong with the flags by which a script is told its model, as sentences."""
    both = args.hf_path is not None and (args.model_tag, args.model_step) != (None, None)
    return ["--hf-path names a model of its own: leave out --model-tag and --model-step, or it"] if both else []


def load_hf_model(hf_path, device, dtype):
    """
    A causal language model of the hub or of a local folder; returns (HuggingFaceModel, HuggingFaceTokenizer).

    Raises UserError when it cannot be had, is not whole, or has a tokenizer without a token to begin with.
    """
    transformers = _library("transformers")
    transformers.utils.logging.set_verbosity_error() # what matters is raised here
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(hf_path, trust_remote_code=False)
        model, flaws = transformers.AutoModelForCausalLM.from_pretrained(
            hf_path, trust_remote_code=False, dtype=dtype, output_loading_info=True)
    except Exception as error: # the library raises many kinds; what can be done is the same
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot load {hf_path} ({type(error).__name__}: {reason}): --hf-path must name a causal "
                        "language model without own code, in a folder or on the hub (import our exports)") from error
    if lacking := [str(key) for kind in ("missing_keys", "mismatched_keys") for key in flaws[kind]]:
        raise UserError(f"{hf_path} is no whole causal language model: it lacks {min(lacking)}")
    backend = getattr(loaded, "backend_tokenizer", None)
    tokenizer = backend and HuggingFaceTokenizer(backend, loaded.bos_token)
    if not {loaded.bos_token, "<|bos|>", "<|endoftext|>"} & set(tokenizer.special_ids if tokenizer else ()):
        raise UserError(f"the tokenizer of {hf_path} has no token that documents begin with: take another model, or "
                        "name its bos_token in tokenizer_config.json")
    vocab_size, rows = tokenizer.get_vocab_size(), model.get_input_embeddings().num_embeddings
    if vocab_size > rows:
        raise UserError(f"the tokenizer of {hf_path} has {vocab_size:,} tokens and the model only {rows:,}: "
                        "they do not belong together")
    return HuggingFaceModel(model.eval().to(device), vocab_size), tokenizer

# -----------------------------------------------------------------------------
# Our models, out and in again

def _is_native(model):
    """Is it, in mathematics, the NanoChat class of `transformers`? Scalars that change nothing do not count."""
    neutral = model.resid_lambdas is None or bool((model.resid_lambdas == 1).all() and (model.x0_lambdas == 0).all())
    is_full = all(left == model.config.sequence_len for left, _ in model.window_sizes)
    return neutral and is_full and not model.value_embeds


def _exported_name(key, native):
    for ours, theirs in NATIVE_NAMES.items() if native else ():
        key = key.replace(ours, theirs)
    return key if native else f"gpt.{key}"


def _config_json(model, native):
    c = model.config
    if native:
        return {"model_type": "nanochat", "architectures": ["NanoChatForCausalLM"], "vocab_size": c.vocab_size,
                "hidden_size": c.n_embd, "intermediate_size": 4 * c.n_embd, "num_hidden_layers": c.n_layer,
                "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head, "rms_norm_eps": gpt.NORM_EPS,
                "max_position_embeddings": c.sequence_len, "final_logit_softcapping": gpt.SOFTCAP,
                "rope_parameters": {"rope_type": "default", "rope_theta": float(gpt.ROTARY_BASE)}}
    return {"model_type": "nanochat_gpt", "architectures": ["NanochatForCausalLM"], **asdict(c),
            "auto_map": {"AutoConfig": "modeling_nanochat.NanochatConfig",
                         "AutoModelForCausalLM": "modeling_nanochat.NanochatForCausalLM"},
            "value_embeds": len(model.value_embeds) > 0, "lambdas": model.resid_lambdas is not None}


def _sources():
    """{file name: text} of the code in an export: of common.py just the one function that the others use."""
    with open(os.path.join(ASSETS, "modeling_nanochat.py"), encoding="utf-8") as file:
        texts = {"nanochat.modeling_nanochat": file.read(),
                 "nanochat.common": "import os\n\n\n" + inspect.getsource(common.print0)}
    texts |= {module.__name__: inspect.getsource(module) for module in (gpt, flash_attention, optim)}
    return {f"{name.removeprefix('nanochat.')}.py": re.sub(r"^from nanochat\.", "from .", text, flags=re.MULTILINE)
            for name, text in texts.items()}


def export_model(source, out, model_tag=None, step=None):
    """Write a checkpoint to the folder `out`, which must be empty or absent; it is complete or absent afterwards."""
    from nanochat.checkpoint_manager import FILE_NAMES, checkpoint_dir, load_model
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"{out} is not an empty folder: name another --out, nothing is ever overwritten")
    model, tokenizer, meta = load_model(source, "cpu", "train", model_tag, step)
    path = os.path.join(checkpoint_dir(source, meta["model_tag"]), FILE_NAMES["model"].format(meta["step"]))
    saved = torch.load(path, map_location="meta", weights_only=True)
    dtypes = {key.removeprefix("_orig_mod."): tensor.dtype for key, tensor in saved.items()} # as stored, not as loaded
    native, V = _is_native(model), model.config.vocab_size
    tensors = {key: tensor[:V] if TABLE.search(key) else tensor for key, tensor in model.state_dict().items()}
    tensors = {_exported_name(key, native): tensor.to(dtypes.get(key, tensor.dtype))
               for key, tensor in tensors.items() if not (native and "lambdas" in key)}
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    ids = {"bos_token_id": bos, "eos_token_id": [end, bos]}
    dtype = str(dtypes["lm_head.weight"]).removeprefix("torch.")
    files = {
        "config": _config_json(model, native) | ids | {"pad_token_id": None, "dtype": dtype},
        "generation_config": ids | {"pad_token_id": bos},
        "tokenizer": json.loads(to_hugging_face(tokenizer).to_str()),
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "pad_token": "<|bos|>",
            "eos_token": "<|bos|>" if source == "base" else "<|assistant_end|>", "padding_side": "left",
            "model_max_length": model.config.sequence_len, "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"]},
        "nanochat_meta": {key: value for key, value in meta.items() if key not in ("files", "source", "model_tag")}
                         | {"model_config": asdict(model.config), "scalars": model.resid_lambdas is not None}}
    parent = os.path.dirname(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        folder = os.path.join(temporary, "export")
        shutil.copytree(ASSETS, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__")) # template and README
        _library("safetensors.torch").save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            write_json(os.path.join(folder, f"{name}.json"), content)
        for name, text in ({} if native else _sources()).items():
            with common.atomic_write(os.path.join(folder, name)) as file:
                file.write(text)
        if os.path.isdir(out):
            os.rmdir(out)
        os.rename(folder, out)
    print0(f"Exported to {out}" + ("" if native else ", to be loaded with trust_remote_code=True"))


def import_model(folder, source, model_tag):
    """Write an export as a checkpoint: the weights as they were, rows of padding as zeros. Raises UserError."""
    from nanochat.checkpoint_manager import checkpoint_dir, complete_steps, save_checkpoint
    target = checkpoint_dir(source, model_tag)
    if complete_steps(target):
        raise UserError(f"{target} holds a checkpoint already: name another --model-tag, nothing is ever overwritten")
    safetensors = _library("safetensors.torch")
    try:
        meta = read_json(os.path.join(folder, "nanochat_meta.json"), model_config=dict, step=int, scalars=bool)
        native = read_json(os.path.join(folder, "config.json"), model_type=str)["model_type"] == "nanochat"
        tokenizer = from_hugging_face(os.path.join(folder, "tokenizer.json"))
        data = safetensors.load_file(os.path.join(folder, "model.safetensors"))
        config = gpt.GPTConfig(**meta["model_config"])
        if tokenizer.get_vocab_size() != config.vocab_size:
            raise ValueError(f"{tokenizer.get_vocab_size()} tokens in its tokenizer, {config.vocab_size} in its model")
        with torch.device("meta"):
            model = gpt.GPT(config, value_embeds=any("value_" in key for key in data), lambdas=meta.pop("scalars"))
        if native and model.resid_lambdas is not None: # left out where they change nothing
            data |= {"resid_lambdas": torch.ones(config.n_layer), "x0_lambdas": torch.zeros(config.n_layer)}
        weights = {key: data.pop(_exported_name(key, native)) for key in model.state_dict()}
        padding = model.lm_head.weight.size(0) - config.vocab_size
        weights |= {key: F.pad(tensor, (0, 0, 0, padding)) for key, tensor in weights.items() if TABLE.search(key)}
        model.load_state_dict(weights | data, strict=True, assign=True) # do all names and shapes fit?
    except Exception as error: # a foreign file can fail in any way
        reason = " ".join(str(error).split()[:40])
        raise UserError(f"{folder} is no whole export of nanochat ({type(error).__name__}: {reason})") from error
    save_checkpoint(target, meta["step"], weights, None, meta, tokenizer=tokenizer)
    print0(f"Imported to {target}, step {meta['step']}")


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("export", "write a checkpoint for transformers"), ("import", "take such an export back")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--source", required=True, choices=["base", "mid", "sft", "rl"], help="stage of training")
        command.add_argument("--model-tag", required=name == "import", help="checkpoint folder; export: the newest")
    commands.choices["export"].add_argument("--model-step", type=int, help="step of the checkpoint; default: the last")
    commands.choices["export"].add_argument("--out", required=True, help="folder to write, empty or absent")
    commands.choices["import"].add_argument("folder", help="what export wrote")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.command == "import":
        return import_model(args.folder, args.source, args.model_tag)
    export_model(args.source, args.out, args.model_tag, args.model_step)


if __name__ == "__main__":
    run_main(main)
