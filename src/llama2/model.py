"""The Llama 2 network (Touvron et al. 2023, arXiv 2307.09288): its layers in a row, and the language-model head.

One layer is in `layers`, the classifiers' heads are in `classifiers`; the tensor names' legend is in `layers`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from llama2.attention import Mask, make_mask, traced
from llama2.cache import DynamicCache, LayerPlaces, StaticCache
from llama2.config import LlamaConfig
from llama2.documents import by_lengths, by_positions, positions_within
from llama2.errors import InputError
from llama2.keywords import without_effect
from llama2.layers import (
    ACTIVATIONS,
    Cache,
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    split_output,
    with_weights,
)
from llama2.linear import Group, prepack
from llama2.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from llama2.pretrained import PreTrainedModel, readable_index_errors
from llama2.recompute import under_the_same_hooks
from llama2.rope import LlamaRotaryEmbedding, promoted

PastKeyValues = Cache | tuple[tuple[Tensor, Tensor], ...]


class LlamaModel(PreTrainedModel):
    """The decoder without a head: token ids (B, T) -> hidden states (B, T, D)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        config = self.config
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.run_layer: Callable[..., Any] | None = None  # called with a layer and its arguments in the layer's place
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Runs the layers over the new tokens.

        input_ids (B, T), or inputs_embeds (B, T, D). attention_mask: 2D (B, cached + T), 1 = keep; or 4D, see
        `attention.make_mask`. position_ids (B | 1, T) default to the places after the cache. past_key_values: a cache,
        or a tuple of (keys, values) per layer, in which case a tuple comes back. output_attentions computes this call
        with the eager implementation, which alone has the weights. Rows that hold several documents keep them apart
        where cu_seq_lens_q or seq_idx says so, or where position_ids begin again at 0 (without attention_mask and
        past_key_values), see `documents`. Raises InputError for shapes that do not fit. Other keywords are those of
        transformers that have no effect here, see `keywords`.
        """
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if use_cache and self.training and self.gradient_checkpointing:
            use_cache = False  # recomputing a layer would append its keys twice
        x_BTD = self._embed(input_ids, inputs_embeds)
        documents = None
        if kwargs:
            documents = by_lengths(kwargs, x_BTD.shape[0], x_BTD.shape[1], x_BTD.device)
            without_effect("forward", kwargs)
        if documents is not None and position_ids is None:
            position_ids = positions_within(documents)
        elif position_ids is not None and x_BTD.shape[1] > 1 and attention_mask is None and past_key_values is None:
            documents = by_positions(position_ids, traced(x_BTD)) if documents is None else documents
        legacy = isinstance(past_key_values, tuple) or config.torchscript
        cache = (
            DynamicCache.from_legacy_cache(past_key_values) if isinstance(past_key_values, tuple) else past_key_values
        )
        if cache is None and use_cache:
            cache = DynamicCache()
        implementation = "eager" if output_attentions else self.attn_implementation
        mask, position_ids, cache_position = self._places(
            x_BTD, attention_mask, position_ids, cache, cache_position, implementation, documents
        )
        cos, sin = self.rotary_emb(x_BTD, position_ids)
        rotation = (cos[:, None], sin[:, None])

        states: list[Tensor] = []
        attentions: list[Tensor | None] = []
        places = self._layer_places(cache)
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                states.append(x_BTD)
            if places is not None:
                places.place = index
            x_BTD, weights = self._run(layer, x_BTD, rotation, mask, implementation, places or cache, cache_position)
            if output_attentions:
                attentions.append(weights)
        x_BTD = self.norm(x_BTD)
        output = BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            past_key_values=cache.to_legacy_cache() if legacy and isinstance(cache, DynamicCache) else cache,
            hidden_states=(*states, x_BTD) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,  # type: ignore[arg-type]
        )
        return output if as_dict(config, return_dict) else output.to_tuple()

    def prepack(self) -> int:
        """Reorders bfloat16 weights for decoding on a CPU, see `linear.prepack`; returns how many layers have one."""
        groups: list[Group] = []
        layer: Any
        for layer in self.layers:
            attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
            if type(attention) is LlamaAttention:
                groups += [(attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,)]
            if type(mlp) is LlamaMLP:
                groups += [(mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)]
        return prepack(groups)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise InputError(f"input_ids has shape {tuple(input_ids.shape)}; it must be (batch, tokens), tokens >= 1")
        with readable_index_errors(input_ids, self.vocab_size):
            embedded: Tensor = self.embed_tokens(input_ids)
        return embedded

    def _places(
        self,
        x_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        cache_position: Tensor | None,
        implementation: str,
        documents: Tensor | None,
    ) -> tuple[Mask, Tensor, Tensor | None]:
        """The mask, the positions (B | 1, T), and for a static cache where to write."""
        new_tokens, device = x_BTD.shape[1], x_BTD.device
        cached = cache.get_seq_length() if cache is not None else 0
        positions = cached + new_tokens
        if isinstance(cache, StaticCache):
            if implementation == "flash_attention_2":
                raise InputError("flash_attention_2 cannot read a static cache; use attn_implementation='sdpa'")
            positions = cache.max_cache_len
            if cache_position is None:
                if cached + new_tokens > positions:
                    raise InputError(
                        f"{cached} cached and {new_tokens} new tokens exceed the static cache of {positions}; "
                        "give a larger max_cache_len"
                    )
                cache_position = torch.arange(cached, cached + new_tokens, device=device)
        else:
            cache_position = None  # a growing cache appends: its length already says where
        if position_ids is None:
            columns = (
                torch.arange(cached, cached + new_tokens, device=device) if cache_position is None else cache_position
            )
            position_ids = columns[None]
        mask = make_mask(
            attention_mask, new_tokens, cached, positions, device, cache_position, implementation, documents
        )
        return mask, position_ids, cache_position

    def _layer_places(self, cache: Cache | None) -> LayerPlaces | None:
        """Returns cache indices that separate a layer used twice in the model; None where each is used once."""
        if cache is None or torch.compiler.is_compiling() or len(set(self.layers)) == len(self.layers):
            return None
        return LayerPlaces(cache)

    def _run(self, layer: nn.Module, x_BTD: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
        call = layer if self.run_layer is None else partial(self.run_layer, layer)
        if self.gradient_checkpointing and self.training and getattr(layer, "gradient_checkpointing", True):
            kept = save_on_cpu(pin_memory=x_BTD.is_cuda) if self.gradient_checkpointing_offload else nullcontext()
            again = under_the_same_hooks(call, layer)
            with kept:
                out = checkpoint(again, x_BTD, *args, **self.gradient_checkpointing_kwargs)
        else:
            out = call(x_BTD, *args)
        return with_weights(out)


def as_dict(config: LlamaConfig, return_dict: bool | None) -> bool:
    return config.use_return_dict if return_dict is None else return_dict


def causal_lm_loss(
    logits_BTV: Tensor, labels_BT: Tensor, num_items_in_batch: int | Tensor | None = None, shift: bool = True
) -> Tensor:
    """Cross entropy of predicting token t + 1 from t, in at least float32; -100 marks positions without a target.

    The mean over targets, or their sum / num_items_in_batch (targets of the whole accumulated batch). A batch
    without any target has loss 0 and gradient 0, not NaN.
    """
    if shift:
        labels_BT = F.pad(labels_BT[:, 1:], (0, 1), value=-100)
    labels = labels_BT.reshape(-1).to(logits_BTV.device)
    logits = logits_BTV.reshape(len(labels), -1).to(promoted(logits_BTV.dtype))
    total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    if num_items_in_batch is None:
        return total / (labels != -100).sum().clamp(min=1)
    return total / torch.as_tensor(num_items_in_batch, device=total.device)


class LlamaForCausalLM(PreTrainedModel):
    """LlamaModel with a language-model head."""

    _tied_weights_keys: ClassVar[dict[str, str] | None] = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs: ClassVar[bool] = True
    loss_type: ClassVar[str | None] = "ForCausalLM"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        config = self.config
        self.model = LlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head: nn.Linear = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._init_weights(self.lm_head)
        self.tie_weights()

    def prepack(self) -> int:
        """As LlamaModel.prepack, with the head."""
        return self.model.prepack() + prepack([(self.lm_head,)])

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the head."""
        self.lm_head = new_embeddings

    @classmethod
    def can_generate(cls) -> bool:
        """As PreTrainedModel.can_generate."""
        return True

    def get_decoder(self) -> LlamaModel:
        """The model without the head."""
        return self.model

    def set_decoder(self, decoder: LlamaModel) -> None:
        """Replaces the model without the head."""
        self.model = decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_logits_to_keep: int = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As LlamaModel.forward, plus logits (B, T, V) in the model's dtype and, with labels, the loss.

        labels (B, T) of ids, -100 where there is no target (padding is not skipped by itself); see `causal_lm_loss`
        for num_items_in_batch. The keyword shift_labels (B, T) are labels already aligned; it is not in the signature,
        because transformers' Trainer takes every name there with "label" in it for a column that evaluation needs.
        logits_to_keep=k computes the last k positions only (0: all); a tensor names positions. num_logits_to_keep is
        its name in transformers 4.46.
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        hidden = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            cache_position,
            **kwargs,
        )
        x_BTD, keep = hidden.last_hidden_state, _kept(logits_to_keep, num_logits_to_keep)
        logits_BTV = split_output(self.lm_head, x_BTD if keep is None else x_BTD[:, keep], self.config.pretraining_tp)
        loss = None
        if labels is not None or shift_labels is not None:
            target = labels if shift_labels is None else shift_labels
            assert target is not None
            if target.shape != logits_BTV.shape[:2]:
                raise InputError(
                    f"labels have shape {tuple(target.shape)} but logits cover {tuple(logits_BTV.shape[:2])}; "
                    "labels need one entry per input token, and logits_to_keep=0"
                )
            loss = causal_lm_loss(logits_BTV, target, num_items_in_batch, shift=shift_labels is None)
        output = CausalLMOutputWithPast(
            loss, logits_BTV, hidden.past_key_values, hidden.hidden_states, hidden.attentions
        )
        return output if as_dict(self.config, return_dict) else output.to_tuple()


def _kept(logits_to_keep: int | Tensor, num_logits_to_keep: int) -> slice | Tensor | None:
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    count = logits_to_keep or num_logits_to_keep
    if count < 0:
        raise InputError(f"logits_to_keep is {count}; give 0 for all positions or how many of the last to keep")
    return slice(-count, None) if count else None


__all__ = [
    "ACTIVATIONS",
    "Cache",
    "LlamaAttention",
    "LlamaDecoderLayer",
    "LlamaForCausalLM",
    "LlamaMLP",
    "LlamaModel",
    "LlamaRMSNorm",
    "as_dict",
    "causal_lm_loss",
]
