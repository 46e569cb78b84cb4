"""Fields of requests that clients of other servers send: which are another name for one of ours, and which say nothing.

What is in none of these tables is unknown: it is ignored with a warning, or refused, as the operator chose.
"""

from collections.abc import Mapping
from typing import Any

# Another name for a field of ours: where both are given, ours counts.
ALIASES: Mapping[str, str] = {
    "n_predict": "max_tokens",  # llama.cpp
    "num_predict": "max_tokens",  # Ollama
    "max_new_tokens": "max_tokens",  # TGI, transformers
    "max_output_tokens": "max_tokens",
    "repeat_penalty": "repetition_penalty",  # llama.cpp, Ollama
    "typ_p": "typical_p",
    "mirostat_mode": "mirostat",
    "nsigma": "top_n_sigma",
    "stop_sequences": "stop",
    "random_seed": "seed",  # Mistral
    "min_new_tokens": "min_tokens",
    "truncate": "truncate_prompt_tokens",
}
# They change no answer here: how a model is loaded, where a request is counted, what a cache or a page does with it.
WITHOUT_EFFECT = frozenset((
    "num_gpu", "main_gpu", "num_batch", "num_thread", "n_threads", "use_mmap", "use_mlock", "low_vram", "f16_kv",
    "vocab_only", "numa", "embedding_only", "logits_all", "draft_num_predict", "id_slot", "slot_id", "n_cache_reuse",
    "request_id", "guided_decoding_backend", "mm_processor_kwargs", "detokenize", "kv_transfer_params",
    "reasoning_effort", "verbosity", "prediction", "thinking", "reasoning", "reasoning_format", "include_reasoning",
    "separate_reasoning", "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "raw", "session_id", "chat_id", "timings_per_token", "return_progress", "use_cache",
))  # fmt: skip
# Samplers and searches that other servers have: off at these values (None: they only shape one that is off).
OFF: Mapping[str, tuple[Any, ...] | None] = {
    "tfs_z": (1, 0), "tfs": (1, 0), "top_a": (0,),
    "smoothing_factor": (0,), "smoothing_curve": None, "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "adaptive_target": (-1,), "adaptive_decay": None, "length_penalty": (1, 0), "early_stopping": (False,),
    "use_beam_search": (False,), "num_beams": (1,), "penalize_newline": (False,),
    "penalize_nl": (False,), "priority": (0,), "n_indent": (0,), "t_max_predict_ms": (-1, 0),
    "no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1,), "penalty_alpha": (0,), "logits_processors": ((),),
    "spaces_between_special_tokens": (True,), "return_tokens_as_token_ids": (False,), "return_token_ids": (False,),
    "echo": (False,), "think": (False,), "num_return_sequences": (1,), "audio": None, "documents": ((),),
}  # fmt: skip


def renamed(body: dict[str, Any]) -> dict[str, Any]:
    """A body with other servers' names replaced by ours, and what Ollama has in `options` beside the rest."""
    found = dict(body)
    if (options := found.get("options")) is None or isinstance(options, Mapping):
        found.pop("options", None)
        for name, value in (options or {}).items():
            found.setdefault(name, value)
    for name, ours in ALIASES.items():
        if name in found:
            value = found.pop(name)
            if found.get(ours) is None:
                found[ours] = value
    return found


def trouble(name: str, value: Any) -> str | None:
    """Why a field that no body has is not obeyed; None where nothing is lost, "unknown" where nobody knows it."""
    if name in WITHOUT_EFFECT:
        return None
    if name not in OFF:
        return "unknown"
    neutral = OFF[name]
    if value is None or neutral is None or value in neutral or value == [] or value == {}:
        return None
    return f"{name} is {str(value)[:40]}, which this server does not do"
