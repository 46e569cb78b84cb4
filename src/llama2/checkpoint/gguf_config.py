"""The configuration of a Llama model from the keys of a GGUF file: each key is used, known to say nothing, or refused.

What a key means is what llama.cpp makes of it (llama_model::load_hparams and llama_context): scaling without a type is
linear, and yarn's attention factors multiply its own 0.1 ln(factor) + 1.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llama2.config import LlamaConfig
from llama2.errors import CheckpointError

if TYPE_CHECKING:
    from llama2.checkpoint.gguf import TensorInfo

_SCALING = "llama.rope.scaling."
_YARN = {  # key -> rope setting
    f"{_SCALING}yarn_beta_fast": "beta_fast",
    f"{_SCALING}yarn_beta_slow": "beta_slow",
}
_YARN_ATTENTION = tuple(_SCALING + key for key in ("attn_factor", "yarn_attn_factor", "yarn_log_multiplier"))
_USED = {
    "llama.context_length",
    "llama.embedding_length",
    "llama.block_count",
    "llama.feed_forward_length",
    "llama.vocab_size",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.value_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.rope.scale_linear",
    *(_SCALING + key for key in ("type", "factor", "original_context_length", "yarn_ext_factor")),
    *_YARN,
    *_YARN_ATTENTION,
}
# Keys that change nothing here: what a run may choose, and what only other architectures read.
_HARMLESS = {
    f"{_SCALING}finetuned",
    "llama.tensor_data_layout",
    "llama.attention.layer_norm_epsilon",
    "llama.attention.group_norm_epsilon",
    "llama.decoder_start_token_id",
}
# Keys that would change the network, and the values with which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.expert_shared_count": (0,),
    "llama.attention.sliding_window": (0,),
    "llama.attention.causal": (True,),
    "llama.attention.clamp_kqv": (0.0,),
    "llama.attention.max_alibi_bias": (0.0,),
    "llama.attention.scale": (0.0,),
    "llama.attn_logit_softcapping": (0.0,),
    "llama.final_logit_softcapping": (0.0,),
    "llama.logit_scale": (0.0, 1.0),
    "llama.residual_scale": (0.0, 1.0),
    "llama.embedding_scale": (0.0, 1.0),
    "llama.use_parallel_residual": (False,),
    "llama.pooling_type": (0,),
    "llama.rope.freq_base_swa": (),
    "llama.rope.dimension_sections": (),
}


class Header(Protocol):
    """The part of a file that is read; `gguf.GgufFile` is one."""

    @property
    def path(self) -> Path: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def tensors(self) -> "dict[str, TensorInfo]": ...
    def floats(self, name: str) -> tuple[float, ...]: ...


def config_from(file: Header) -> LlamaConfig:
    """LlamaConfig from the keys of a GGUF file.

    Raises CheckpointError for another architecture, a missing key, or one that this library does not know.
    """
    keys = _Keys(file.metadata, file.path)
    keys.refuse_foreign()
    keys.refuse_unknown()
    heads = keys.integer("llama.attention.head_count")
    width = keys.integer("llama.embedding_length")
    head_dim = keys.integer("llama.attention.key_length", width // max(heads, 1))
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{file.path}: {key} is {file.metadata[key]} but heads are {head_dim} wide; "
                "models that rotate or value only a part of each head are not supported"
            )
    context = keys.integer("llama.context_length")
    vocab_size = _vocab_size(file, keys)
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=keys.integer("llama.feed_forward_length"),
        num_hidden_layers=keys.integer("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=keys.integer("llama.attention.head_count_kv", heads),
        max_position_embeddings=context,
        rms_norm_eps=keys.number("llama.attention.layer_norm_rms_epsilon"),
        head_dim=None if head_dim * heads == width else head_dim,
        rope_theta=keys.number("llama.rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file, keys, head_dim, context),
        bos_token_id=keys.token_id("bos", vocab_size),
        eos_token_id=keys.token_id("eos", vocab_size),
        pad_token_id=keys.token_id("padding", vocab_size),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias=any(name.endswith(("attn_q.bias", "attn_output.bias")) for name in file.tensors),
        mlp_bias=any(name.endswith(("ffn_up.bias", "ffn_down.bias")) for name in file.tensors),
        architectures=["LlamaForCausalLM"],
    )


class _Keys:
    """Metadata with the type of each value checked."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self.metadata, self.path = metadata, path

    def refuse_foreign(self) -> None:
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            kind = self.metadata.get("general.type", "model")
            told = " (an adapter or another companion of a model)" if kind not in ("model", None) else ""
            raise CheckpointError(
                f"{self.path}: general.architecture is {architecture!r}{told}, but this library runs 'llama' only; "
                "load that file with a library for its architecture"
            )
        if self.metadata.get("general.type", "model") != "model":
            remedy = (
                "give the model's file with -m and this one with --adapter, or put it into the weights with `llama2 "
                "merge-adapter`"
                if self.metadata.get("adapter.type") == "lora"
                else "give the model's file"
            )
            raise CheckpointError(
                f"{self.path}: general.type is {self.metadata['general.type']!r}, not 'model'; {remedy}"
            )

    def refuse_unknown(self) -> None:
        """Raises for a key that changes the network; warns of one that may."""
        unknown = []
        for key, value in self.metadata.items():
            if not key.startswith("llama.") or key in _USED or key in _HARMLESS:
                continue
            if key in _NEUTRAL:
                if value not in _NEUTRAL[key]:
                    raise CheckpointError(
                        f"{self.path}: {key} is {value!r}; mixtures of experts, sliding windows and other changes of "
                        "the network are not Llama models. Load the file with a library for its architecture"
                    )
            elif key.startswith("llama.rope."):
                raise CheckpointError(
                    f"{self.path}: {key} is {value!r}, a RoPE setting that is not known here; without it the answers "
                    "would be wrong. Load the Hugging Face checkpoint of this model instead"
                )
            else:
                unknown.append(key)
        if unknown:
            warnings.warn(f"{self.path}: {', '.join(unknown)} are not known and have no effect", stacklevel=2)

    def _get(self, key: str, default: Any, kinds: tuple[type, ...]) -> Any:
        value = self.metadata.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # a value for each layer, all the same
        if value is None:
            raise CheckpointError(f"{self.path}: the key {key} is missing; the file does not describe a Llama model")
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {key} is {value!r}; one {kinds[-1].__name__} is needed")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._get(key, default, (int,)))

    def number(self, key: str, default: float | None = None) -> float:
        # The file holds float32; seven digits give back what its maker wrote (1e-05, not 9.999999747378752e-06).
        return float(f"{self._get(key, default, (int, float)):.7g}")

    def token_id(self, role: str, vocab_size: int) -> int | None:
        """tokenizer.ggml.ROLE_token_id; None where there is none, or with a warning where it has no embedding."""
        key = f"tokenizer.ggml.{role}_token_id"
        found = None if key not in self.metadata else self.integer(key)
        if found is not None and not 0 <= found < vocab_size:
            warnings.warn(
                f"{self.path}: {key} is {found}, outside the {vocab_size} tokens; taken as none", stacklevel=2
            )
            return None
        return found


def _vocab_size(file: Header, keys: _Keys) -> int:
    if "token_embd.weight" in file.tensors:
        return file.tensors["token_embd.weight"].shape[0]
    return keys.integer("llama.vocab_size", len(file.metadata.get("tokenizer.ggml.tokens", ())) or None)


def _rope_scaling(file: Header, keys: _Keys, head_dim: int, context: int) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, keys, head_dim)
    factor = keys.number(f"{_SCALING}factor", 0.0) or keys.number("llama.rope.scale_linear", 0.0)
    kind = file.metadata.get(f"{_SCALING}type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(f"{file.path}: rope scaling {kind!r} is not supported; none, linear and yarn are")
    if kind == "none" or factor in (0.0, 1.0):  # 0 means not given
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if keys.number(f"{_SCALING}yarn_ext_factor", 1.0) not in (1.0, -1.0):  # -1: the reader's own, which is 1
        raise CheckpointError(
            f"{file.path}: yarn_ext_factor is {file.metadata[f'{_SCALING}yarn_ext_factor']}; only 1 is supported"
        )
    original = keys.integer(f"{_SCALING}original_context_length", context)
    settings = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    settings |= {ours: keys.number(theirs) for theirs, ours in _YARN.items() if theirs in file.metadata}
    scale = yarn_attention(factor)
    if multiplier := keys.number(_YARN_ATTENTION[2], 0.0):
        scale /= yarn_attention(factor, multiplier)
    scale *= keys.number(_YARN_ATTENTION[0], 1.0) * keys.number(_YARN_ATTENTION[1], 1.0)
    if abs(scale - yarn_attention(factor)) > 1e-6 * scale:
        settings["attention_factor"] = float(f"{scale:.7g}")
    return settings


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """By how much yarn makes queries and keys larger where nothing else is said (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3_scaling(file: Header, keys: _Keys, head_dim: int) -> dict[str, Any]:
    """The settings behind a table of frequency divisors. llama.cpp writes the table of Llama 3.1 and 3.2 only, whose
    settings differ in the factor alone; a table that they do not explain is refused rather than guessed at."""
    divisors = file.floats("rope_freqs.weight")
    low, high = 1.0, 4.0
    original = keys.integer(f"{_SCALING}original_context_length", 8192)
    factor, theta = max(divisors, default=1.0), keys.number("llama.rope.freq_base", 10000.0)
    expected = []
    for i in range(head_dim // 2):
        turns = original * theta ** (-2 * i / head_dim) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if len(expected) != len(divisors) or any(abs(a - b) > 1e-4 * b for a, b in zip(divisors, expected, strict=True)):
        raise CheckpointError(
            f"{file.path}: rope_freqs.weight is not the table of Llama 3.1 (low 1, high 4, context {original}) "
            "for any factor; load the Hugging Face checkpoint of this model instead"
        )
    return {
        "rope_type": "llama3",
        "factor": float(f"{factor:.6g}"),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
