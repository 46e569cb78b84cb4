"""Schema of the fields of a config.json: types, and bounds far above any Llama model. Standard library only."""

from collections.abc import Mapping
from typing import Any

from llama2.schema import ANY, FLAG, NUMBER, Kind, Schema, either, maybe, real, several, table, text, whole

MOST = {  # far above any Llama model: what is beyond would run for ever
    "vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "max_position_embeddings": 2**31 - 1,
    "pretraining_tp": 2**16,
}  # fmt: skip
MAX_LABELS = 100_000
_ID = whole(-(2**31), 2**31 - 1)
SCHEMA: Schema = {
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "attention_dropout"), real()),
    "rope_theta": maybe(NUMBER),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), maybe(table(ANY, 64))),
    **dict.fromkeys(("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias", "return_dict", "torchscript",
                     "output_hidden_states", "output_attentions", "is_encoder_decoder"), maybe(FLAG)),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), maybe(_ID)),
    "eos_token_id": maybe(either(_ID, several(_ID, 1000))),
    "head_dim": maybe(whole(1, 2**16)),
    "chunk_size_feed_forward": maybe(whole()),
    "architectures": maybe(several(text(), 100)),
    **dict.fromkeys(("hidden_act", "model_type"), text(100)),
    **dict.fromkeys(("problem_type", "name_or_path", "_name_or_path", "transformers_version", "attn_implementation"),
                    maybe(text())),
    "num_labels": maybe(whole(0, MAX_LABELS)),
    "id2label": maybe(Kind(f"at most {MAX_LABELS} texts by number", lambda value: _labels(value))),
    "label2id": maybe(table(whole(), MAX_LABELS)),
    "quantization_config": Kind("an object, its quant_method a name", lambda value: _quantization(value)),
}  # fmt: skip


def _labels(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_LABELS
        and all(
            (type(key) is int or (isinstance(key, str) and key.isdecimal() and len(key) < 10))
            and isinstance(label, str)
            for key, label in value.items()
        )
    )


def _quantization(value: Any) -> bool:
    if isinstance(value, Mapping):
        return isinstance(value.get("quant_method", ""), str | None)
    return not isinstance(value, bool | int | float | str | list)  # an object of one of the classes
