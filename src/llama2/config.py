"""The architecture of one Llama model: sizes, RoPE settings, token ids. Standard library only.

Field names and defaults are those of `transformers.LlamaConfig`. Both generations of its JSON are read (top-level
`rope_theta` with `rope_scaling`, and nested `rope_parameters`; `torch_dtype` and `dtype`), and both are written, so
transformers 4.46 and 5.x load our files. What cannot work is refused here, before any memory is spent.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from llama2.doors import door
from llama2.errors import CheckpointError, ConfigError

HIDDEN_ACTS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "tanh", "sigmoid")
DTYPES = ("float16", "bfloat16", "float32", "float64")
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2")

# Sizes: Touvron et al. 2023 (arXiv 2307.09288), appendix A.2, with the feed-forward width that Meta's
# multiple_of / ffn_dim_multiplier give. 34B was trained but not released as Llama 2; Code Llama 34B has its shape.
PRESETS: dict[str, dict[str, Any]] = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "34b": {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 48,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}

_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # type -> (required, optional) settings
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}


def normalise_rope(settings: Mapping[str, Any] | None, theta: float) -> dict[str, Any]:
    """RoPE settings of any spelling as one dict {"rope_type", "rope_theta", ...}; the argument is not changed.

    Accepts None, {"type": ...} (transformers 4.31), {"rope_type": ...} (4.43) and 5.x `rope_parameters`.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(f"rope_scaling is {settings!r}; give a dict such as {{'rope_type': 'linear', 'factor': 2.0}}")
    given = {key: value for key, value in (settings or {}).items() if value is not None}
    kind = given.pop("type", None)
    kind = given.pop("rope_type", kind)
    theta = given.pop("rope_theta", theta)
    if kind is None:
        if given:
            raise ConfigError(f"rope settings {dict(given)} name no rope_type; add one of {', '.join(_ROPE_KEYS)}")
        kind = "default"
    return {"rope_type": kind, "rope_theta": theta, **given}


class LlamaConfig:
    """Sizes and settings of a Llama model, with the fields and defaults of `transformers.LlamaConfig`.

    Any further keyword becomes an attribute and is saved. `attn_implementation` is kept aside and never saved.
    Raises ConfigError for a value that cannot work, naming the bound and the remedy.
    """

    model_type: ClassVar[str] = "llama"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        pretraining_tp: int = 1,
        tie_word_embeddings: bool = False,
        rope_theta: float | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        mlp_bias: bool = False,
        head_dim: int | None = None,
        rope_parameters: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        # -1 meant "none" in early conversions; nn.Embedding would take it for the last row and freeze that token.
        self.pad_token_id = None if pad_token_id == -1 else pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pretraining_tp = pretraining_tp
        self.tie_word_embeddings = tie_word_embeddings
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.mlp_bias = mlp_bias
        self._default_head_dim = head_dim is None
        self.head_dim = _default_head_dim(hidden_size, num_attention_heads) if head_dim is None else head_dim
        theta = 10000.0 if rope_theta is None else rope_theta
        self.rope_parameters: dict[str, Any] = normalise_rope(rope_parameters or rope_scaling, theta)
        self._set_common(kwargs)
        self.validate()

    def _set_common(self, extra: dict[str, Any]) -> None:
        """The fields every Hugging Face configuration has, then whatever else was given."""
        self._attn_implementation: str | None = extra.pop("attn_implementation", None)
        for written_only_by_others in ("model_type", "transformers_version", "_attn_implementation_autoset"):
            extra.pop(written_only_by_others, None)
        torch_dtype = extra.pop("torch_dtype", None)
        dtype = extra.pop("dtype", None)
        self.dtype = torch_dtype if dtype is None else dtype
        self.architectures: list[str] | None = extra.pop("architectures", None)
        self.name_or_path: str = extra.pop("name_or_path", extra.pop("_name_or_path", ""))
        self.return_dict: bool = extra.pop("return_dict", True)
        self.output_hidden_states: bool = extra.pop("output_hidden_states", False)
        self.output_attentions: bool = extra.pop("output_attentions", False)
        self.problem_type: str | None = extra.pop("problem_type", None)
        self.is_encoder_decoder: bool = extra.pop("is_encoder_decoder", False)
        self.chunk_size_feed_forward: int = extra.pop("chunk_size_feed_forward", 0)
        self._set_labels(extra.pop("num_labels", None), extra.pop("id2label", None), extra.pop("label2id", None))
        for key, value in extra.items():
            setattr(self, key, value)

    def _set_labels(self, count: int | None, id2label: Mapping[Any, str] | None, label2id: Any) -> None:
        if id2label is None:
            self.num_labels = 2 if count is None else count
            return
        self.id2label = {int(key): value for key, value in id2label.items()}
        self.label2id = dict(label2id) if label2id else {value: key for key, value in self.id2label.items()}
        if count is not None and count != len(self.id2label):
            raise ConfigError(f"num_labels is {count} but id2label names {len(self.id2label)} labels; give one of them")

    # -- derived and aliased fields ------------------------------------------------------------------------------

    @property
    def num_labels(self) -> int:
        """How many labels a classifier has; setting it renames them LABEL_0, LABEL_1, ..."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self.id2label = {i: f"LABEL_{i}" for i in range(count)}
        self.label2id = {name: i for i, name in self.id2label.items()}

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        theta: float = self.rope_parameters["rope_theta"]
        return theta

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {**self.rope_parameters, "rope_theta": value}

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """The rope settings without the base; None for plain RoPE (the spelling of transformers 4.x)."""
        if self.rope_parameters["rope_type"] == "default":
            return None
        return {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}

    @rope_scaling.setter
    def rope_scaling(self, value: Mapping[str, Any] | None) -> None:
        self.rope_parameters = normalise_rope(value, self.rope_theta)

    @property
    def dtype(self) -> str | None:
        """The dtype the weights are stored in, as a string: "bfloat16", ... or None when not known."""
        return self._dtype

    @dtype.setter
    def dtype(self, value: Any) -> None:
        name = None if value is None else str(value).removeprefix("torch.")
        if name == "auto":
            name = None
        if name is not None and name not in DTYPES:
            raise ConfigError(f"dtype is {value!r}; it must be one of {', '.join(DTYPES)}")
        self._dtype = name

    @property
    def torch_dtype(self) -> Any:
        """`dtype` as a torch.dtype where torch is loaded, else as a string (the 4.x name of the field)."""
        torch = sys.modules.get("torch")
        return self._dtype if torch is None or self._dtype is None else getattr(torch, self._dtype)

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        self.dtype = value

    @property
    def num_parameters(self) -> int:
        """Parameters of the causal language model with these sizes; a tied head counts once."""
        attention = self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads) * self.hidden_size
        if self.attention_bias:
            attention += self.head_dim * (self.num_attention_heads + 2 * self.num_key_value_heads) + self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        if self.mlp_bias:
            mlp += 2 * self.intermediate_size + self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * (attention + mlp + 2 * self.hidden_size) + self.hidden_size + embeddings

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> int:
        """Bytes of keys and values that one token adds to the cache, all layers together."""
        return int(2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_value)

    # -- refusal -------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raises ConfigError for the first value that cannot work. Run again when a model is built."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "pretraining_tp",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be an integer of at least 1")
        self._validate_heads()
        self._validate_ranges()
        self._validate_rope()

    def _validate_heads(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ConfigError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}; "
                f"choose one of {[n for n in range(1, heads + 1) if heads % n == 0]} key-value heads"
            )
        if self._default_head_dim and self.hidden_size % heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}; "
                "change one of them or give head_dim"
            )
        if not isinstance(self.head_dim, int) or self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim!r}; RoPE rotates pairs, so it must be an even integer >= 2")

    def _validate_ranges(self) -> None:
        if self.hidden_act not in HIDDEN_ACTS:
            raise ConfigError(f"hidden_act is {self.hidden_act!r}; it must be one of {', '.join(HIDDEN_ACTS)}")
        if not 0 < self.rms_norm_eps < 1:
            raise ConfigError(f"rms_norm_eps is {self.rms_norm_eps!r}; it must lie between 0 and 1 (Llama 2 has 1e-5)")
        if not 0 <= self.initializer_range <= 1:
            raise ConfigError(f"initializer_range is {self.initializer_range!r}; it must lie in [0, 1]")
        if not 0 <= self.attention_dropout < 1:
            raise ConfigError(f"attention_dropout is {self.attention_dropout!r}; it must lie in [0, 1)")
        pad = self.pad_token_id
        if pad is not None and not 0 <= pad < self.vocab_size:
            raise ConfigError(
                f"pad_token_id is {pad} but ids run from 0 to {self.vocab_size - 1}; "
                "use model.add_pad_token(tokenizer), which grows the embeddings and sets the id"
            )
        impl = self._attn_implementation
        if impl is not None and impl not in ATTENTION_IMPLEMENTATIONS:
            raise ConfigError(
                f"attn_implementation is {impl!r}; it must be one of {', '.join(ATTENTION_IMPLEMENTATIONS)}"
            )

    def _validate_rope(self) -> None:
        settings = self.rope_parameters
        kind, theta = settings["rope_type"], settings["rope_theta"]
        if kind not in _ROPE_KEYS:
            raise ConfigError(f"rope_type is {kind!r}; it must be one of {', '.join(_ROPE_KEYS)}")
        if not isinstance(theta, int | float) or not math.isfinite(theta) or theta <= 0:
            raise ConfigError(f"rope_theta is {theta!r}; it must be a positive number (Llama 2 has 10000.0)")
        required, optional = _ROPE_KEYS[kind]
        missing = [key for key in required if key not in settings]
        if missing:
            raise ConfigError(f"rope_type {kind!r} needs {', '.join(missing)}; got {settings}")
        unknown = set(settings) - {"rope_type", "rope_theta", *required, *optional}
        if unknown and kind != "default":
            raise ConfigError(f"rope_type {kind!r} does not use {', '.join(sorted(unknown))}; remove or rename them")
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            value = settings.get(key, 1)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise ConfigError(f"rope setting {key} is {value!r}; it must be a positive number")
        if settings.get("factor", 1) < 1:
            raise ConfigError(f"rope factor is {settings['factor']}; it must be at least 1 (it stretches the context)")
        low, high = settings.get("low_freq_factor", 0), settings.get("high_freq_factor", 1)
        if kind == "llama3" and high <= low:
            raise ConfigError(f"rope high_freq_factor is {high}; it must exceed low_freq_factor, {low}")

    # -- dictionaries and files ----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields in both spellings, sorted by name."""
        fields = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        for key in ("pad_token_id", "architectures", "problem_type"):
            if fields[key] is None:
                del fields[key]
        defaults = {
            "return_dict": True,
            "output_hidden_states": False,
            "output_attentions": False,
            "is_encoder_decoder": False,
            "chunk_size_feed_forward": 0,
            "name_or_path": "",
        }
        for key, default in defaults.items():
            if fields[key] == default:
                del fields[key]
        if self.id2label == {0: "LABEL_0", 1: "LABEL_1"}:
            del fields["id2label"], fields["label2id"]
        else:
            fields["id2label"] = {str(key): value for key, value in self.id2label.items()}
        fields |= {
            "model_type": self.model_type,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
        }
        if self.dtype is not None:
            fields |= {"dtype": self.dtype, "torch_dtype": self.dtype}
        if "name_or_path" in fields:
            fields["_name_or_path"] = fields.pop("name_or_path")
        return dict(sorted(fields.items()))

    def to_json_string(self) -> str:
        """The text of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **overrides: Any) -> Self:
        """A configuration from the content of a config.json; keywords override its entries.

        Raises ConfigError where `model_type` names another architecture.
        """
        fields = {**config_dict, **overrides}
        kind = fields.get("model_type", "llama")
        if kind != "llama":
            raise ConfigError(
                f"model_type is {kind!r}, but this library runs model_type 'llama' only; "
                "load that checkpoint with a library for its architecture"
            )
        if fields.get("rope_parameters") and "rope_scaling" not in overrides and "rope_theta" not in overrides:
            fields.pop("rope_scaling", None)
        elif "rope_scaling" in overrides or "rope_theta" in overrides:
            stored = normalise_rope(fields.pop("rope_parameters", None) or config_dict.get("rope_scaling"), 10000.0)
            fields.setdefault("rope_theta", stored["rope_theta"])
            if "rope_scaling" not in overrides:
                stored.pop("rope_theta")
                fields["rope_scaling"] = stored
        if not _same_default_head_dim(fields):
            return cls(**fields)
        return cls(**{**fields, "head_dim": None})

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> Self:
        """Reads one JSON file. Raises CheckpointError where it is missing or not a JSON object."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} does not exist; give a folder that holds config.json") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON ({error}); fetch or save the file again") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; config.json must be an object")
        return cls.from_dict(content)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """The configuration of a folder, a config.json, a GGUF file or a hub id; keywords override fields."""
        local = Path(path)
        if (local / "config.json").exists():
            local = local / "config.json"
        if local.suffix != ".json":
            config: Self = _load_config(path, **kwargs)
            return config
        return cls.from_dict(cls.from_json_file(local).to_dict(), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes `save_directory`/config.json: to a temporary file beside it, synced, then renamed."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".config-", delete=False, encoding="utf-8") as file:
            try:
                file.write(self.to_json_string())
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, folder / "config.json")
            except BaseException:
                os.unlink(file.name)
                raise

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """A published size: "7b", "13b", "34b", "70b" (each also as "7b-chat", the same sizes), or a small one."""
        key = name.lower().removeprefix("llama-2-").removesuffix("-hf").removesuffix("-chat")
        if key not in PRESETS:
            raise ConfigError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
        common = {
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "architectures": ["LlamaForCausalLM"],
        }
        return cls(**{**common, **PRESETS[key], **overrides})

    def update(self, values: Mapping[str, Any]) -> None:
        """Sets several fields and validates them together."""
        for key, value in values.items():
            setattr(self, key, value)
        self.validate()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LlamaConfig) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"LlamaConfig {self.to_json_string()}"


_load_config = door("auto", "load_config", "LlamaConfig of a GGUF file or a hub id.")


def _default_head_dim(hidden_size: Any, heads: Any) -> int:
    """hidden_size // heads, or 2 where the sizes are not usable yet: validate() then says which one is wrong."""
    usable = isinstance(hidden_size, int) and isinstance(heads, int) and heads > 0
    return hidden_size // heads if usable else 2


def _same_default_head_dim(fields: Mapping[str, Any]) -> bool:
    """Whether a stored head_dim only repeats hidden_size // heads (transformers writes it always)."""
    head_dim, hidden, heads = (fields.get(key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    return bool(head_dim and hidden and heads and head_dim * heads == hidden)
