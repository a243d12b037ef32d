"""
A nanochat model in the clothes of `transformers`: configuration, cache and generation around the GPT of gpt.py.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

`python -m nanochat.hf_model export` puts this file beside gpt.py and the modules which that needs. GPT wants every row
to begin at position 0, where the batches of `transformers` are padded on either side: padding is put behind the tokens,
and the logits are picked from where they went.
"""
import torch
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from nanochat.common import print0 # noqa: F401 (transformers 4 finds no modules but those that are named here)
from nanochat.flash_attention import flash_attn # noqa: F401
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW # noqa: F401


class NanochatConfig(PretrainedConfig):
    """The fields of GPTConfig, and whether there are value embeddings and scalars of the residual stream."""
    model_type = "nanochat_gpt" # "nanochat" is a class of transformers itself, for the models without either
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                     "num_key_value_heads": "n_kv_head", "max_position_embeddings": "sequence_len"}

    def __init__(self, value_embeds=True, lambdas=True, use_cache=True, **kwargs):
        for name, default in vars(GPTConfig()).items():
            setattr(self, name, kwargs.pop(name, default))
        self.value_embeds, self.lambdas, self.use_cache = value_embeds, lambdas, use_cache
        super().__init__(**{"tie_word_embeddings": False} | kwargs)


class CacheOfGeneration:
    """What GPT asks of a KV cache, kept in a cache of `transformers`; row r holds its token t at position t."""

    def __init__(self, cache, positions, num_new, config):
        """positions (B,): tokens that each row holds already; num_new T: how many more come."""
        self.cache, self.num_new, self.config = cache, num_new, config
        self.positions, self.cache_seqlens = positions.tolist(), positions.to(torch.int32)
        self.max_seq_len = int(cache.get_seq_length()) + num_new

    def ensure(self, dtype):
        self.dtype = dtype

    def span(self, num_new):
        together = len(set(self.positions)) == 1
        return self.positions[0] if together else self.cache_seqlens, max(self.positions) + num_new

    def get_layer_cache(self, layer_idx):
        """Keys and values with room for the new tokens, each (B, S, Hkv, D), to be written into."""
        shape = (len(self.positions), self.config.n_kv_head, self.num_new, self.config.n_embd // self.config.n_head)
        room = torch.zeros(shape, dtype=self.dtype, device=self.cache_seqlens.device)
        keys, values = self.cache.update(room, room.clone(), layer_idx) # the cache's own tensors, no copies
        return keys.transpose(1, 2), values.transpose(1, 2)

    def advance(self, num_new):
        """Nothing to note: the next call brings an attention mask, and that tells the positions."""


class NanochatForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanochatConfig
    main_input_name = "input_ids"
    _no_split_modules = ["GPT"] # one device holds it
    _keep_in_fp32_modules_strict = ["resid_lambdas", "x0_lambdas"]

    def __init__(self, config):
        super().__init__(config)
        shape = GPTConfig(**{name: getattr(config, name) for name in vars(GPTConfig())})
        self.gpt = GPT(shape, pad_vocab_size_to=1, value_embeds=config.value_embeds, lambdas=config.lambdas)
        self.post_init()

    def get_input_embeddings(self):
        return self.gpt.transformer.wte

    def get_output_embeddings(self):
        return self.gpt.lm_head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        return inputs | {"attention_mask": attention_mask} # for a static cache it would have been made 4-dimensional

    @can_return_tuple
    def forward(self, input_ids, attention_mask=None, past_key_values=None, labels=None, use_cache=None,
                logits_to_keep=0, **kwargs):
        """
        input_ids        (B, T)
        attention_mask   (B, past + T), 0 = padding, anywhere; None = no padding
        past_key_values  a cache of transformers that holds `past` positions, or None
        labels           (B, T), -100 = ignored; they are shifted here
        logits_to_keep   only those of the last so many positions, 0 = all; or a tensor of columns
        Returns CausalLMOutputWithPast with fp32 logits (B, T or fewer, V): of padding, those of the
        last token before it.
        """
        B, T = input_ids.shape
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = input_ids.new_ones(B, past + T)
        if attention_mask.shape != (B, past + T):
            raise ValueError(f"attention_mask must have the shape {(B, past + T)}, got {tuple(attention_mask.shape)}")
        positions = attention_mask[:, :past].sum(dim=1) # of each row's first new token
        new = attention_mask[:, past:] != 0
        ids = input_ids.gather(1, (~new).to(torch.uint8).argsort(dim=1, stable=True)) # each row's tokens in front
        wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept = (new.cumsum(dim=1) - 1).clamp(min=0)[:, wanted] # where the tokens went whose logits are wanted
        at = kept + T * torch.arange(B, device=input_ids.device)[:, None]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        cache = None if past_key_values is None else CacheOfGeneration(past_key_values, positions, T, self.config)
        logits_at = self.gpt.logits_at # compiled, it would lose what is written into the cache
        logits_at = logits_at if cache is None else torch.compiler.disable(logits_at)
        logits = logits_at(ids, at.flatten(), cache).view(B, kept.size(1), -1)
        loss = None
        if labels is not None: # a Trainer passes num_items_in_batch, and counts on the sum over that
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
