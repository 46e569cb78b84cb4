"""The interface that companion libraries use: peft, TRL, accelerate, lm-eval, transformers' Trainer and pipelines.

The names are those of `transformers.PreTrainedModel`; each stands here because one of these libraries reads or calls
it. Methods over adapters are doors to `checkpoint.adapters`.
"""

from typing import Any, ClassVar

from torch import Tensor

from llama2.errors import InputError
from llama2.lazy import door


class Companions:
    """Base of `PreTrainedModel` for what other libraries read."""

    # accelerate keeps each of these on one device; FSDP wraps them.
    _no_split_modules: ClassVar[list[str]] = ["LlamaDecoderLayer"]
    # Parameter -> the one that it is tied to where the configuration ties them.
    _tied_weights_keys: ClassVar[dict[str, str] | None] = None
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None
    _keep_in_fp32_modules: ClassVar[list[str] | None] = None
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _hf_peft_config_loaded: bool = False  # adapters inside the model, not peft's wrapper around it
    _auto_class: ClassVar[str | None] = None
    supports_gradient_checkpointing: ClassVar[bool] = True
    # What the classes can do, as transformers' own tests and libraries that build on them ask.
    _is_stateful: ClassVar[bool] = False  # nothing but the cache is carried from step to step
    _is_composite: ClassVar[bool] = False
    _supports_sdpa: ClassVar[bool] = True
    _supports_flash_attn: ClassVar[bool] = True
    _supports_flash_attn_2: ClassVar[bool] = True
    _supports_flex_attn: ClassVar[bool] = False
    _supports_attention_backend: ClassVar[bool] = False
    _supports_cache_class: ClassVar[bool] = True
    _supports_static_cache: ClassVar[bool] = True
    _supports_quantized_cache: ClassVar[bool] = False  # of quanto or HQQ; the native engine has one of its own
    _can_compile_fullgraph: ClassVar[bool] = True
    _keep_in_fp32_modules_strict: ClassVar[list[str] | None] = None
    _keys_to_ignore_on_load_missing: ClassVar[list[str] | None] = None
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str] | None] = None
    is_parallelizable: ClassVar[bool] = False  # over devices, by `parallelize()`
    input_modalities: ClassVar[tuple[str, ...]] = ("text",)
    # Whether forward divides its loss by num_items_in_batch: transformers' Trainer then does not divide it again.
    accepts_loss_kwargs: ClassVar[bool] = False
    # The name of the loss in transformers, whose Trainer counts targets by it: labels[..., 1:] for "ForCausalLM".
    loss_type: ClassVar[str | None] = None
    framework: ClassVar[str] = "pt"
    model_tags: list[str] | None = None
    hf_device_map: dict[str, Any]  # set where a device map was given: accelerate asks whether there is one
    warnings_issued: dict[str, bool]

    add_adapter = door("checkpoint.adapters", "add_adapter", "A fresh adapter: see llama2.checkpoint.adapters.")
    load_adapter = door("checkpoint.adapters", "load_adapter", "An adapter from a folder or hub id.")
    set_adapter = door("checkpoint.adapters", "set_adapter", "Makes these adapters, and no others, active.")
    enable_adapters = door("checkpoint.adapters", "enable_adapters", "Undoes disable_adapters.")
    disable_adapters = door("checkpoint.adapters", "disable_adapters", "Runs the model without its adapters.")
    delete_adapter = door("checkpoint.adapters", "delete_adapter", "Forgets adapters.")
    active_adapters = door("checkpoint.adapters", "active_adapters", "Names of the active adapters.")
    get_adapter_state_dict = door("checkpoint.adapters", "get_adapter_state_dict", "Tensors of one adapter.")
    to_transformers = door(
        "checkpoint.transformers_model", "to_transformers", "transformers' model over the same parameters."
    )

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has a head that makes tokens."""
        return False

    def add_model_tags(self, tags: str | list[str]) -> None:
        """Adds tags, which push_to_hub writes into the model card."""
        new = [tags] if isinstance(tags, str) else list(tags)
        self.model_tags = list(dict.fromkeys([*(self.model_tags or []), *new]))

    def get_compiled_call(self, compile_config: Any = None) -> Any:
        """The call itself: generate() compiles nothing."""
        return self.__call__  # type: ignore[operator]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_position: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        is_first_iteration: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `forward` for the next step of generation, behind what `past_key_values` holds.

        input_ids (B, L) are all tokens so far; only the new ones are in the result: the last next_sequence_length or
        len(cache_position), else those behind the cache, at least one. inputs_embeds (B, P, D) are the prompt and count
        while nothing is cached. attention_mask (B, S). position_ids default to the number of real tokens before each.
        Other keywords are handed on. generate() calls this method only where a class, or another library, replaces it.
        """
        held = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        new = len(cache_position) if next_sequence_length is None and cache_position is not None else None
        new = next_sequence_length if new is None else new
        first = held == 0 if is_first_iteration is None else is_first_iteration
        inputs: dict[str, Any]
        if inputs_embeds is not None and first:
            inputs = {"inputs_embeds": inputs_embeds, "input_ids": None}
            new = inputs_embeds.shape[1]
        else:
            if new is None:
                new = max(input_ids.shape[1] - held, 1)
            if not 1 <= new <= input_ids.shape[1]:
                raise InputError(f"{new} new tokens are asked for, but input_ids has {input_ids.shape[1]}")
            inputs = {"input_ids": input_ids[:, -new:].contiguous()}
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        if position_ids is not None:
            inputs["position_ids"] = position_ids[..., -new:]
        if past_key_values is not None:
            inputs["past_key_values"] = past_key_values
        if cache_position is not None:
            inputs["cache_position"] = cache_position
        if use_cache is not None:
            inputs["use_cache"] = use_cache
        return inputs | {"attention_mask": attention_mask} | kwargs


def prepares_by_itself(model: Any) -> bool:
    """Whether `prepare_inputs_for_generation` of `model` was replaced, in its class or on the object."""
    own = getattr(model, "prepare_inputs_for_generation", None)
    return own is not None and getattr(own, "__func__", own) is not Companions.prepare_inputs_for_generation
