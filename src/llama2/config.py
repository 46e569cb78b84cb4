"""The architecture of one Llama model: sizes, RoPE settings, token ids. Standard library only.

Field names and defaults are those of `transformers.LlamaConfig`. Both generations of its JSON are read (top-level
`rope_theta` with `rope_scaling`, and nested `rope_parameters`; `torch_dtype` and `dtype`), and both are written, so
transformers 4.46 and 5.x load our files. What cannot work is refused here, before any memory is spent.
"""

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from llama2.config_fields import MOST, SCHEMA
from llama2.config_files import ConfigFiles
from llama2.errors import ConfigError
from llama2.plain import plain
from llama2.presets import COMMON, PRESETS
from llama2.rope_settings import agreed_rope, normalise_rope, scaling_of, validate_rope
from llama2.schema import check, check_names
from llama2.text_file import shown

HIDDEN_ACTS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "tanh", "sigmoid")
DTYPES = ("float16", "bfloat16", "float32", "float64")
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2")
_ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta")
# Fields of every Hugging Face configuration, which a file names only where they differ.
_BASE: dict[str, Any] = {
    "return_dict": True,
    "torchscript": False,
    "output_hidden_states": False,
    "output_attentions": False,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "architectures": None,
    "problem_type": None,
    "pad_token_id": None,
    "_name_or_path": "",
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
}


class LlamaConfig(ConfigFiles):
    """Sizes and settings of a Llama model, with the fields and defaults of `transformers.LlamaConfig`.

    Any further keyword becomes an attribute and is saved. `attn_implementation` is kept aside and never saved.
    Raises ConfigError for a value that cannot work, naming the bound and the remedy.
    """

    model_type: ClassVar[str] = "llama"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # What other libraries ask every configuration: no field has another name, none is a configuration of its own.
    attribute_map: ClassVar[dict[str, str]] = {}
    sub_configs: ClassVar[dict[str, Any]] = {}
    base_config_key: ClassVar[str] = ""
    is_composition: ClassVar[bool] = False
    has_no_defaults_at_init: ClassVar[bool] = False
    pruned_heads: ClassVar[dict[int, list[int]]] = {}
    _auto_class: ClassVar[str | None] = None

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
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pretraining_tp = pretraining_tp
        self.tie_word_embeddings = tie_word_embeddings
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.mlp_bias = mlp_bias
        self._default_head_dim = head_dim is None
        self.head_dim = _default_head_dim(hidden_size, num_attention_heads) if head_dim is None else head_dim
        spellings = {"rope_parameters": rope_parameters, "rope_scaling": rope_scaling, "rope_theta": rope_theta}
        self.rope_parameters: dict[str, Any] = agreed_rope({k: v for k, v in spellings.items() if v is not None})
        self._set_common(kwargs)
        self.validate()

    @property
    def _attn_implementation(self) -> str | None:
        """How attention is computed; None until a model or its user says."""
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | Mapping[str, str] | None) -> None:
        """A name, or one for each part of a model as transformers 5 takes it: "" is the model as a whole."""
        if isinstance(value, Mapping):
            if parts := [part for part in value if part]:
                warnings.warn(
                    f"attn_implementation is for {', '.join(map(repr, parts))} too, and a Llama model has no such "
                    "part; only the entry '' has an effect",
                    stacklevel=3,
                )
            before: str | None = getattr(self, "_attn_implementation_internal", None)
            self._attn_implementation_internal = value.get("", before)
        else:
            self._attn_implementation_internal = value

    def _set_common(self, extra: dict[str, Any]) -> None:
        """The fields every Hugging Face configuration has, then whatever else was given."""
        self._attn_implementation = extra.pop("attn_implementation", None)
        for written_only_by_others in ("model_type", "transformers_version"):
            extra.pop(written_only_by_others, None)
        torch_dtype = extra.pop("torch_dtype", None)
        dtype = extra.pop("dtype", None)
        self.dtype = torch_dtype if dtype is None else dtype
        self.architectures: list[str] | None = extra.pop("architectures", None)
        self.name_or_path: str = extra.pop("name_or_path", extra.pop("_name_or_path", ""))
        self.return_dict: bool = extra.pop("return_dict", True)
        self.torchscript: bool = extra.pop("torchscript", False)
        self.output_hidden_states: bool = extra.pop("output_hidden_states", False)
        self.output_attentions: bool = extra.pop("output_attentions", False)
        self.problem_type: str | None = extra.pop("problem_type", None)
        self.is_encoder_decoder: bool = extra.pop("is_encoder_decoder", False)
        self.chunk_size_feed_forward: int = extra.pop("chunk_size_feed_forward", 0)
        self._set_labels(extra.pop("num_labels", None), extra.pop("id2label", None), extra.pop("label2id", None))
        own = {
            key: value for key, value in extra.items() if not key.startswith("_")
        }  # the rest is other libraries' state
        check_names(type(self), own, "a configuration", ConfigError)
        for key, value in own.items():
            setattr(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        value = plain(value)
        if name == "pad_token_id" and value == -1:
            # "None" in early conversions; nn.Embedding would take it for the last row and freeze that token.
            value = None
        if name == "rope_parameters" and hasattr(self, "rope_parameters"):
            value = normalise_rope(value, self.rope_theta)
        super().__setattr__(name, value)

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
        return scaling_of(self.rope_parameters)

    @rope_scaling.setter
    def rope_scaling(self, value: Mapping[str, Any] | None) -> None:
        self.rope_parameters = normalise_rope(value, self.rope_theta)

    @property
    def dtype(self) -> Any:
        """The torch.dtype the weights are stored in, or None when not known. A name or a torch.dtype sets it."""
        if self.dtype_name is None:
            return None
        import torch

        return getattr(torch, self.dtype_name)

    @dtype.setter
    def dtype(self, value: Any) -> None:
        name = None if value is None else str(value).removeprefix("torch.")
        if name == "auto":
            name = None
        if name is not None and name not in DTYPES:
            raise ConfigError(f"dtype is {shown(value)}; it must be one of {', '.join(DTYPES)}")
        self._dtype_name = name

    @property
    def dtype_name(self) -> str | None:
        """`dtype` as the file has it, "bfloat16"; needs no torch."""
        return self._dtype_name

    @property
    def torch_dtype(self) -> Any:
        """`dtype` under its name in 4.x."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        self.dtype = value

    @property
    def _name_or_path(self) -> str:
        return self.name_or_path

    @_name_or_path.setter
    def _name_or_path(self, value: Any) -> None:
        self.name_or_path = str(value)

    @property
    def use_return_dict(self) -> bool:
        """Whether forward returns an output object by itself: not for torch.jit.trace, which knows tuples only."""
        return self.return_dict and not self.torchscript

    def keep_head_dim(self) -> None:
        """head_dim is from now on what it is, also where it is not hidden_size / num_attention_heads."""
        self._default_head_dim = False

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Self:
        """The configuration of the model that reads and writes text: this one."""
        return self

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
        for name in MOST:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {shown(value)}; it must be an integer of at least 1")
            if value > MOST[name]:
                raise ConfigError(f"{name} is {value}; it must be an integer of at least 1 and at most {MOST[name]}")
        self._validate_heads()
        self._validate_ranges()
        validate_rope(self.rope_parameters)

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
        if not 0 < self.rms_norm_eps <= 1:
            raise ConfigError(f"rms_norm_eps is {self.rms_norm_eps!r}; it must lie in (0, 1] (Llama 2 has 1e-5)")
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

    # -- dictionaries and files ----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Every field in both spellings, ready for JSON, sorted by name."""
        fields = copy.deepcopy({key: value for key, value in vars(self).items() if not key.startswith("_")})
        fields["_name_or_path"] = fields.pop("name_or_path")
        fields["id2label"] = {str(key): value for key, value in self.id2label.items()}
        fields |= {
            "model_type": self.model_type,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
        }
        if self.dtype_name is not None:
            fields |= {"dtype": self.dtype_name, "torch_dtype": self.dtype_name}
        if (as_dict := getattr(fields.get("quantization_config"), "to_dict", None)) is not None:
            fields["quantization_config"] = as_dict()
        return dict(sorted(fields.items()))

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the content of config.json: every field of a Llama model, and of the general ones those that were
        changed."""
        return {key: value for key, value in self.to_dict().items() if key not in _BASE or value != _BASE[key]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of config.json, or of every field."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2) + "\n"

    def __iter__(self) -> Iterator[str]:
        """The names of the fields: `"num_hidden_layers" in config` asks for one."""
        return iter(self.to_dict())

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """A configuration from the content of a config.json; keywords override its entries.

        With return_unused_kwargs a pair: the configuration, and the keywords that are no field of it. Raises
        ConfigError where `model_type` names another architecture.
        """
        unused = {}
        if return_unused_kwargs:
            unused = {key: value for key, value in overrides.items() if not hasattr(cls(), key)}
        fields = {**config_dict, **{key: value for key, value in overrides.items() if key not in unused}}
        check_fields(fields)
        kind = fields.get("model_type", "llama")
        if kind != "llama":
            raise ConfigError(
                f"model_type is {kind!r}, but this library runs model_type 'llama' only; "
                "load that checkpoint with a library for its architecture"
            )
        rope = _overridden_rope(config_dict, {key: overrides[key] for key in _ROPE_FIELDS if key in overrides})
        fields = {key: value for key, value in fields.items() if key not in _ROPE_FIELDS}
        if "dtype" in overrides or "torch_dtype" in overrides:
            fields = {k: v for k, v in fields.items() if k not in ("dtype", "torch_dtype") or k in overrides}
        if _same_default_head_dim(fields):
            fields["head_dim"] = None
        config = cls(**fields, rope_parameters=rope)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def of(cls, config: Any) -> Self:
        """The configuration itself, or one of transformers as ours. Raises ConfigError for anything else."""
        if isinstance(config, cls):
            return config
        if getattr(config, "model_type", None) is None or not hasattr(config, "to_dict"):
            raise ConfigError(f"a LlamaConfig is needed but got {type(config).__name__}; give LlamaConfig(...)")
        made: Self = cls.from_dict(config.to_dict())
        made._attn_implementation = getattr(config, "_attn_implementation", None)
        return made

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """A published size: "7b", "13b", "34b", "70b" (each also as "7b-chat", the same sizes), or a small one."""
        key = name.lower().removeprefix("llama-2-").removesuffix("-hf").removesuffix("-chat")
        if key not in PRESETS:
            raise ConfigError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**COMMON, **PRESETS[key], **overrides})

    def update(self, values: Mapping[str, Any]) -> None:
        """Sets several fields and validates them together."""
        for key, value in values.items():
            setattr(self, key, value)
        self.validate()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LlamaConfig) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"LlamaConfig {self.to_json_string()}"


def _overridden_rope(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE settings of a configuration's fields with keywords on top, normalised."""
    if given.get("rope_parameters"):
        return agreed_rope(given)
    settings = agreed_rope({key: stored[key] for key in _ROPE_FIELDS if key in stored})
    if "rope_scaling" in given:
        settings = normalise_rope(given["rope_scaling"], settings["rope_theta"])
    if given.get("rope_theta") is not None:
        settings = {**settings, "rope_theta": given["rope_theta"]}
    return settings


def _default_head_dim(hidden_size: Any, heads: Any) -> int:
    """hidden_size // heads, or 2 where the sizes are not usable yet: validate() then says which one is wrong."""
    usable = isinstance(hidden_size, int) and isinstance(heads, int) and heads > 0
    return hidden_size // heads if usable else 2


def _same_default_head_dim(fields: Mapping[str, Any]) -> bool:
    """Whether a stored head_dim only repeats hidden_size // heads (transformers writes it always)."""
    head_dim, hidden, heads = (plain(fields.get(key)) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    known = all(isinstance(size, int) and size for size in (head_dim, hidden, heads))
    return known and head_dim * heads == hidden


def check_fields(fields: Mapping[str, Any], where: str | Path = "") -> None:
    """Raises ConfigError for a field of a config.json of another type than it has, or that would hide a method."""
    check({key: plain(value) for key, value in fields.items()}, SCHEMA, where, ConfigError)
    try:
        check_names(LlamaConfig, (key for key in fields if not key.startswith("_")), "config.json", ConfigError)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if str(where) else str(error)) from None
