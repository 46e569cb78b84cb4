"""Keywords that transformers accepts and that have nothing to do here: one table, by the place where they are given.

A keyword of this table is accepted everywhere in its place. Where its value asks for something that does not happen,
one warning says so and why; None and False ask for nothing. A keyword that is neither known nor here is refused.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from llama2.errors import InputError

_ENGINE = "how the step is compiled is decided by the runner; give runner='torch' or runner='plain'"
_PACKED = "generate() takes one prompt a row; pad prompts on the left"
_LOADING = "weights are mapped from the file and assigned, whatever the settings"
_ONE_DEVICE = "the model is on one device"
_KERNELS = "kernels are this library's own"
_ENCODER = "a Llama model has no encoder"
_EXPERTS = "a Llama model has no experts"
_INTERNAL = ""  # says who calls inside transformers: nothing to warn about

NO_EFFECT: dict[str, dict[str, str]] = {
    "hub": {
        "trust_remote_code": _INTERNAL,  # remote code never runs, and is not needed
        "resume_download": _INTERNAL,  # downloads always resume
        "proxies": "proxies are those of the environment (HTTPS_PROXY)",
        "mirror": "the address of the hub is that of the environment (HF_ENDPOINT)",
        "config_name": "the name of the file is config_file_name",
        "code_revision": "remote code never runs",
        "user_agent": _INTERNAL,
        "_from_auto": _INTERNAL,
        "_from_pipeline": _INTERNAL,
        "_from_model_config": _INTERNAL,
        "_commit_hash": _INTERNAL,
        "_configuration_file": _INTERNAL,
        "_raise_exceptions_for_gated_repo": _INTERNAL,
        "_raise_exceptions_for_missing_entries": _INTERNAL,
        "_raise_exceptions_for_connection_errors": _INTERNAL,
    },
    "from_pretrained": {
        "low_cpu_mem_usage": _INTERNAL,  # always so
        "_fast_init": _INTERNAL,
        "offload_folder": f"{_LOADING}: nothing is offloaded",
        "offload_state_dict": f"{_LOADING}: nothing is offloaded",
        "offload_buffers": f"{_LOADING}: nothing is offloaded",
        "tp_plan": f"{_ONE_DEVICE}; `llama2 serve` and `llama2 finetune` run on several with torchrun",
        "tp_size": _ONE_DEVICE,
        "device_mesh": _ONE_DEVICE,
        "distributed_config": _ONE_DEVICE,
        "use_kernels": _KERNELS,
        "kernel_config": _KERNELS,
        "allow_all_kernels": _KERNELS,
        "experts_implementation": _EXPERTS,
        "adapter_kwargs": "the adapter's own configuration decides",
    },
    "forward": {
        "max_length_q": _INTERNAL,  # follows from cu_seq_lens_q
        "max_length_k": _INTERNAL,
        "head_mask": "heads are not pruned",
        "cross_attn_head_mask": _ENCODER,
        "encoder_hidden_states": _ENCODER,
        "encoder_attention_mask": _ENCODER,
        "token_type_ids": "a Llama model has no embedding of token types",
        "output_router_logits": _EXPERTS,
        "is_causal": "a 4D attention_mask says who sees whom",
        "sliding_window": "a Llama model attends to everything before",
    },
    "generate": {
        "cu_seq_lens_q": _PACKED,
        "cu_seq_lens_k": _PACKED,
        "seq_idx": _PACKED,
        "low_memory": "beams are kept in one batch",
        "logits_to_keep": "generate() needs the last position only",
        "num_logits_to_keep": "generate() needs the last position only",
        "return_legacy_cache": "the cache that comes back is a Cache; to_legacy_cache() makes tuples of it",
        "compile_config": _ENGINE,
        "disable_compile": _ENGINE,
        "custom_generate": "remote code never runs",
        "trust_remote_code": _INTERNAL,
        "use_model_defaults": _INTERNAL,  # they are always used
        "is_assistant": _INTERNAL,
        "cache_position": "positions follow from attention_mask and the cache; give position_ids",
        "labels": "generate() computes no loss",
        "return_dict": "return_dict_in_generate says what comes back",
        "decoder_start_token_id": _ENCODER,
        "decoder_input_ids": _ENCODER,
        "encoder_outputs": _ENCODER,
    },
    "save_pretrained": {
        "save_function": "files are written by this library, each beside its target and then renamed",
        "save_peft_format": "an adapter is always written as PEFT does",
        "save_original_format": _INTERNAL,
        "use_auth_token": "it is called token",
        "create_pr": "commits go to the main branch",
        "revision": "commits go to the main branch",
        "commit_description": "commit_message is all of it",
        "tags": "tags are those of the model card",
        "language": "that stands in the model card",
        "license": "that stands in the model card",
        "tag": "tags are those of the model card",
        "max_retries": _INTERNAL,
        "config_name": "the name of the file is config_file_name",
    },
}
# Values that ask for what cannot be done: (place, keyword) -> what to do instead. None and False ask for nothing.
REFUSED: dict[str, dict[str, str]] = {
    "from_pretrained": {
        "from_tf": "TensorFlow's weights are not read; convert the checkpoint to safetensors",
        "from_flax": "Flax's weights are not read; convert the checkpoint to safetensors",
        "max_memory": "it spreads a model over devices and one device is supported; leave it out",
    },
}
# What transformers' forward takes, generate() takes as well.
NO_EFFECT["generate"] = NO_EFFECT["forward"] | NO_EFFECT["generate"]


# Keywords that mean something only beside another one: push_to_hub=True.
_UPLOAD = frozenset({"repo_id", "token", "private", "commit_message"})


def refuse_unknown(where: str, kwargs: Mapping[str, Any]) -> None:
    """Raises InputError for keywords that are left over."""
    if unknown := sorted(set(kwargs) - (_UPLOAD if where == "save_pretrained" else set())):
        raise InputError(f"{where}() got {', '.join(map(repr, unknown))}, which it does not know; leave it out")


def _asks(value: Any) -> bool:
    return value is not None and value is not False


def drop(where: str, kwargs: dict[str, Any], stacklevel: int = 3) -> None:
    """Takes the keywords without an effect in this place out of `kwargs`; warns where a value asks for something.

    Raises InputError for a value that asks for what cannot be done.
    """
    known, refused = NO_EFFECT[where], REFUSED.get(where, {})
    for name in [name for name in kwargs if name in refused]:
        value = kwargs.pop(name)
        if _asks(value):
            raise InputError(f"{name}={value!r}: {refused[name]}")
    for name in [name for name in kwargs if name in known]:
        value = kwargs.pop(name)
        if _asks(value) and known[name]:
            warnings.warn(f"{name} has no effect here: {known[name]}", stacklevel=stacklevel)


def without_effect(where: str, kwargs: dict[str, Any], stacklevel: int = 4) -> None:
    """As `drop`; every keyword must be one without an effect. Raises InputError for another."""
    drop(where, kwargs, stacklevel)
    refuse_unknown(where, kwargs)
