"""The Auto classes: the right class for a path, a GGUF file or a hub id. There is one architecture, so they are short.

Nothing here imports torch, or a tokenizer's packages, before a model or a tokenizer is asked for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, Unpack, overload

from llama2 import checkpoint
from llama2.call_options import HUB_DEFAULTS, ConfigOptions, TokenizerOptions, showing
from llama2.checkpoint.gguf import GgufFile, read_metadata
from llama2.checkpoint.source import fetch_files, is_field, override, split_hub_options
from llama2.config import LlamaConfig
from llama2.errors import CheckpointError, InputError
from llama2.lazy import door
from llama2.model_methods import LOAD_DEFAULTS, LoadingInfo, LoadOptions, ModelMethods
from llama2.schema import check, maybe, text
from llama2.text_file import read_object, shown

if TYPE_CHECKING:  # the classes that the Auto classes below name
    import torch

    from llama2.classifiers import (  # noqa: F401
        LlamaForQuestionAnswering,
        LlamaForSequenceClassification,
        LlamaForTokenClassification,
    )
    from llama2.model import LlamaForCausalLM, LlamaModel  # noqa: F401
    from llama2.tokenizer import PreTrainedTokenizer

Model = TypeVar("Model")

_load_tokenizer = door("tokenizer", "load", "A tokenizer from files.")
_gguf_tokenizer = door("tokenizer", "from_gguf", "A tokenizer from GGUF metadata.")
_load_model = door("checkpoint.load", "from_pretrained_named", "A model from files.")
_params_config = door("checkpoint.meta", "config_of_params", "A configuration from params.json without weights.")
_new_model = door("checkpoint.load", "from_config_named", "A model with fresh weights.")


class AutoTokenizerOptions(TokenizerOptions, total=False):
    """Keyword arguments of AutoTokenizer.from_pretrained."""

    use_fast: bool


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
    if not checkpoint.find_gguf(local):
        local = _base_files(local, "config.json", "config") or local
    if gguf := checkpoint.find_gguf(local):
        return GgufFile(gguf).config
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


def _base_files(local: Path, own: str, kind: str) -> Path | None:
    """The folder of an adapter's model, where the adapter's has no such files itself; None for any other folder.

    Raises CheckpointError where that is an adapter's folder again, which could be this one."""
    base = _adapted_base(local, own)
    if base is None:
        return None
    found = fetch_files(base, {}, kind)
    if _adapted_base(found, own) is not None:
        raise CheckpointError(
            f"{local / 'adapter_config.json'} names {shown(base)} as its model, which is the folder of an adapter too; "
            "give the model itself"
        )
    return found


def _adapted_base(local: Path, own: str) -> str | None:
    """The model of an adapter's folder that has no files of this pattern itself; None for any other folder."""
    file = local / "adapter_config.json"
    if not file.is_file() or any(local.glob(own)):
        return None
    base = read_object(file, "adapter_config.json").get("base_model_name_or_path")
    check({"base_model_name_or_path": base}, {"base_model_name_or_path": maybe(text())}, file)
    return base or None


class AutoConfig:
    """AutoConfig.from_pretrained(path or hub id) -> LlamaConfig."""

    def __init__(self) -> None:
        raise InputError("AutoConfig is not constructed; call AutoConfig.from_pretrained(path)")

    @overload
    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        *,
        gguf_file: str | None = None,
        return_unused_kwargs: Literal[False] = False,
        **overrides: Unpack[ConfigOptions],
    ) -> LlamaConfig: ...

    @overload
    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        *,
        gguf_file: str | None = None,
        return_unused_kwargs: Literal[True],
        **overrides: Any,
    ) -> tuple[LlamaConfig, dict[str, Any]]: ...

    @staticmethod
    @showing(ConfigOptions, HUB_DEFAULTS, more=True, doc=LlamaConfig.from_pretrained.__doc__)
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        *,
        gguf_file: str | None = None,
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> LlamaConfig | tuple[LlamaConfig, dict[str, Any]]:
        """As LlamaConfig.from_pretrained."""
        loaded: LlamaConfig | tuple[LlamaConfig, dict[str, Any]] = load_config(
            pretrained_model_name_or_path,
            gguf_file=gguf_file,
            return_unused_kwargs=return_unused_kwargs,
            **overrides,
        )
        return loaded

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
    @showing(AutoTokenizerOptions, {**HUB_DEFAULTS, "use_fast": True}, more=True)
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        *,
        gguf_file: str | None = None,
        **kwargs: Unpack[AutoTokenizerOptions],
    ) -> "PreTrainedTokenizer":
        """The tokenizer that the files describe.

        Args:
            pretrained_model_name_or_path: a folder, a tokenizer.model, a tokenizer.json, a GGUF file, a hub id, or the
                folder of an adapter, whose base model's tokenizer is taken where it has none.
            gguf_file: the name of the GGUF file in the folder or repository.
            use_fast: True gives a LlamaTokenizerFast (Rust), False a LlamaTokenizer (sentencepiece), or the class of
                the family that the files name.
            revision, cache_dir, token, local_files_only, force_download, subfolder: settings of the hub.
            kwargs: arguments of the tokenizer, which win over the files; not given, they are as stored.

        Raises:
            CheckpointError: there is no tokenizer, or its files are damaged or do not belong together.
            TokenizerError: an argument that cannot work.
        """
        given: dict[str, Any] = dict(kwargs)
        path = fetch_files(pretrained_model_name_or_path, split_hub_options(given), "tokenizer", gguf_file)
        tokenizer: PreTrainedTokenizer
        if gguf := checkpoint.find_gguf(path):
            tokenizer = _gguf_tokenizer(read_metadata(gguf), **given)
        elif base := _base_files(path, "tokenizer*", "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(base, **given)
        else:
            tokenizer = _load_tokenizer(path, **given)
        return tokenizer


class _AutoModel(Generic[Model]):
    """The two ways to a model; the subclass names the class."""

    _class_name: ClassVar[str]

    def __init__(self) -> None:
        name = type(self).__name__
        raise InputError(f"{name} is not constructed; call {name}.from_pretrained(path) or {name}.from_config(config)")

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        output_loading_info: Literal[False] = False,
        **options: Unpack[LoadOptions],
    ) -> Model: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        output_loading_info: Literal[True],
        **options: Unpack[LoadOptions],
    ) -> tuple[Model, LoadingInfo]: ...

    @classmethod
    @showing(LoadOptions, LOAD_DEFAULTS, more=True, doc=ModelMethods.from_pretrained.__doc__)
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Model | tuple[Model, LoadingInfo]:
        """As LlamaForCausalLM.from_pretrained: a model in eval mode."""
        loaded: Model | tuple[Model, LoadingInfo] = _load_model(
            cls._class_name,
            pretrained_model_name_or_path,
            *model_args,
            output_loading_info=output_loading_info,
            **options,
        )
        return loaded

    @classmethod
    def from_config(
        cls,
        config: LlamaConfig,
        *,
        dtype: "torch.dtype | str | None" = None,
        torch_dtype: "torch.dtype | str | None" = None,
        attn_implementation: str | Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Model:
        """A model with fresh weights.

        Args:
            config: a LlamaConfig.
            dtype, torch_dtype: a torch.dtype or its name; None means the configuration's, else torch's default.
            attn_implementation: "eager", "sdpa" or "flash_attention_2".
            kwargs: those of transformers' method that have no effect here.

        Raises:
            InputError: an unknown keyword, or a dtype that does not exist.
        """
        model: Model = _new_model(
            cls._class_name,
            config,
            dtype=dtype,
            torch_dtype=torch_dtype,
            attn_implementation=attn_implementation,
            **kwargs,
        )
        return model


class AutoModel(_AutoModel["LlamaModel"]):
    """The model without a head."""

    _class_name = "LlamaModel"


class AutoModelForCausalLM(_AutoModel["LlamaForCausalLM"]):
    """The model with a language-model head."""

    _class_name = "LlamaForCausalLM"


class AutoModelForSequenceClassification(_AutoModel["LlamaForSequenceClassification"]):
    """The model with a classifier on the last token."""

    _class_name = "LlamaForSequenceClassification"


class AutoModelForTokenClassification(_AutoModel["LlamaForTokenClassification"]):
    """The model with a classifier on every token."""

    _class_name = "LlamaForTokenClassification"


class AutoModelForQuestionAnswering(_AutoModel["LlamaForQuestionAnswering"]):
    """The model with two scores per token: that an answer begins, and that it ends there."""

    _class_name = "LlamaForQuestionAnswering"
