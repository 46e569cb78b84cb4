"""Which tensors of a file belong to packed linears, and how those are packed. No torch here."""

from collections.abc import Container, Iterable
from pathlib import Path

from llama2.config import LlamaConfig
from llama2.errors import CheckpointError, InputError
from llama2.quantization.formats import settings_in
from llama2.quantization_config import QuantizationConfig

_BODY = ("embed_tokens.", "layers.", "norm.")


def with_prefix(name: str) -> str:
    """The name with the base model's prefix: a LlamaModel's own files leave it out, question answering has another."""
    name = "model." + name.removeprefix("transformer.") if name.startswith("transformer.") else name
    return "model." + name if name.startswith(_BODY) else name


def settings_of(config: LlamaConfig, where: Path | str) -> QuantizationConfig | None:
    """The quantisation that a configuration names, or None. Raises CheckpointError for one that is not supported."""
    try:
        return settings_in(vars(config))
    except InputError as error:
        raise CheckpointError(f"{where}: quantization_config: {error}") from error


def packed_parts(names: Iterable[str], modules: Container[str]) -> dict[str, dict[str, str]]:
    """{path of a linear: {part: tensor name}} for the linears that a file holds packed.

    names: tensors by the model's names. A linear is packed where it has more parts than weight and bias, or no weight.
    """
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        path = name
        while path and path not in modules:
            path = path.rpartition(".")[0]
        if path and (part := name[len(path) + 1 :]) != "bias":
            parts.setdefault(path, {})[part] = name
    return {path: found for path, found in parts.items() if set(found) != {"weight"}}
