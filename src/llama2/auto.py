"""The Auto classes: the right class for a path, a GGUF file or a hub id. There is one architecture, so they are short.

Nothing here imports torch, or a tokenizer's packages, before a model or a tokenizer is asked for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from llama2 import checkpoint
from llama2.checkpoint.gguf import GgufFile, read_metadata
from llama2.checkpoint.source import fetch_files, is_field, override, split_hub_options
from llama2.config import LlamaConfig
from llama2.doors import door
from llama2.errors import InputError
from llama2.text_file import read_object

_load_tokenizer = door("tokenizer", "load", "A tokenizer from files.")
_gguf_tokenizer = door("tokenizer", "from_gguf", "A tokenizer from GGUF metadata.")
_load_model = door("checkpoint.load", "from_pretrained_named", "A model from files.")
_params_config = door("checkpoint.meta", "config_of_params", "A configuration from params.json without weights.")
_new_model = door("checkpoint.load", "from_config_named", "A model with fresh weights.")


def load_config(
    path: str | Path,
    *,
    cls: type[LlamaConfig] = LlamaConfig,
    gguf_file: str | None = None,
    return_unused_kwargs: bool = False,
    **overrides: Any,
) -> Any:
    """The configuration of a folder, a GGUF file or a hub id; keywords override fields.

    With return_unused_kwargs a pair: the configuration, and the keywords that are no field of it. Raises
    CheckpointError where there is none or where it is not of a Llama model.
    """
    config = _stored_config(path, split_hub_options(overrides), gguf_file)
    unused = {}
    if return_unused_kwargs:
        unused = {key: overrides.pop(key) for key in list(overrides) if not is_field(config, key)}
    config = override(config, overrides)
    if not isinstance(config, cls):
        config = cls.from_dict(config.to_dict())
    return (config, unused) if return_unused_kwargs else config


def _stored_config(path: str | Path, hub: Mapping[str, Any], gguf_file: str | None) -> LlamaConfig:
    local = fetch_files(path, hub, "config", gguf_file)
    if gguf := checkpoint.find_gguf(local):
        return GgufFile(gguf).config
    if base := _adapted_base(local, "config.json"):
        return _stored_config(base, {}, None)
    if (local / "params.json").exists() and not (local / "config.json").exists():
        if any(local.glob("consolidated.*.pth")):
            return checkpoint.open(local).config  # what params.json leaves to the tensors is taken from them
        found: LlamaConfig = _params_config(local)
        return found
    config: LlamaConfig = LlamaConfig.from_dict(
        checkpoint.read_config(local / "config.json" if local.is_dir() else local)
    )
    return config


def load_fields(path: str | Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The content of a configuration as it is stored; takes the hub settings and gguf_file out of `kwargs`."""
    hub, gguf_file = split_hub_options(kwargs), kwargs.pop("gguf_file", None)
    local = fetch_files(path, hub, "config", gguf_file)
    file = local / "config.json" if local.is_dir() else local
    if file.suffix == ".json" and file.exists():
        return read_object(file, "config.json")
    return _stored_config(path, hub, gguf_file).to_dict()


def _adapted_base(local: Path, own: str) -> str | None:
    """The model of an adapter's folder that has no files of this pattern itself; None for any other folder."""
    if not (local / "adapter_config.json").is_file() or any(local.glob(own)):
        return None
    base = read_object(local / "adapter_config.json", "adapter_config.json").get("base_model_name_or_path")
    return str(base) if base else None


class AutoConfig:
    """AutoConfig.from_pretrained(path or hub id) -> LlamaConfig."""

    def __init__(self) -> None:
        raise InputError("AutoConfig is not constructed; call AutoConfig.from_pretrained(path)")

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """See `load_config`."""
        return load_config(pretrained_model_name_or_path, **kwargs)

    @staticmethod
    def for_model(model_type: str, **kwargs: Any) -> LlamaConfig:
        """A fresh configuration; the only model_type is "llama"."""
        config: LlamaConfig = LlamaConfig.from_dict({"model_type": model_type, **kwargs})
        return config


class AutoTokenizer:
    """AutoTokenizer.from_pretrained(path or hub id) -> the tokenizer that the files describe."""

    def __init__(self) -> None:
        raise InputError("AutoTokenizer is not constructed; call AutoTokenizer.from_pretrained(path)")

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path, *, gguf_file: str | None = None, **kwargs: Any
    ) -> Any:
        """A tokenizer from a folder, a tokenizer file, a GGUF file or a hub id; other keywords are the tokenizer's."""
        path = fetch_files(pretrained_model_name_or_path, split_hub_options(kwargs), "tokenizer", gguf_file)
        if gguf := checkpoint.find_gguf(path):
            return _gguf_tokenizer(read_metadata(gguf), **kwargs)
        if base := _adapted_base(path, "tokenizer*"):
            return AutoTokenizer.from_pretrained(base, **kwargs)
        return _load_tokenizer(path, **kwargs)


class _AutoModel:
    """The two ways to a model; the subclass names the class."""

    _class_name: ClassVar[str]

    def __init__(self) -> None:
        name = type(self).__name__
        raise InputError(f"{name} is not constructed; call {name}.from_pretrained(path) or {name}.from_config(config)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any) -> Any:
        """A model in eval mode; for the arguments see `llama2.checkpoint.load.from_pretrained`."""
        return _load_model(cls._class_name, pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_config(cls, config: LlamaConfig, **kwargs: Any) -> Any:
        """A model with fresh weights; dtype=None means the configuration's, else torch's."""
        return _new_model(cls._class_name, config, **kwargs)


class AutoModel(_AutoModel):
    """The model without a head."""

    _class_name = "LlamaModel"


class AutoModelForCausalLM(_AutoModel):
    """The model with a language-model head."""

    _class_name = "LlamaForCausalLM"


class AutoModelForSequenceClassification(_AutoModel):
    """The model with a classifier on the last token."""

    _class_name = "LlamaForSequenceClassification"


class AutoModelForTokenClassification(_AutoModel):
    """The model with a classifier on every token."""

    _class_name = "LlamaForTokenClassification"


class AutoModelForQuestionAnswering(_AutoModel):
    """The model with two scores a token: that an answer begins, and that it ends there."""

    _class_name = "LlamaForQuestionAnswering"
