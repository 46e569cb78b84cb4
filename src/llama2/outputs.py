"""What forward returns: dataclasses that read as attributes, as a mapping and as a tuple without the absent fields."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass
class ModelOutput:
    """Base of every output: `out.logits`, `out["logits"]`, `out[0]`, `out.keys()`; None fields are absent."""

    def _present(self) -> dict[str, Any]:
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are present, in order."""
        return tuple(self._present().values())

    def keys(self) -> list[str]:
        """Names of the fields that are present, in order."""
        return list(self._present())

    def values(self) -> list[Any]:
        """Values of the fields that are present, in order."""
        return list(self._present().values())

    def items(self) -> list[tuple[str, Any]]:
        """(name, value) of the fields that are present, in order."""
        return list(self._present().items())

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or `default` where it is absent."""
        return self._present().get(name, default)

    def __getitem__(self, key: str | int | slice) -> Any:
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __contains__(self, key: object) -> bool:
        return key in self._present()

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """LlamaModel: last_hidden_state (B, T, D); hidden_states: layers + 1 of it; attentions: layers x (B, H, T, S)."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """LlamaForCausalLM: loss (), logits (B, T kept, V), then as BaseModelOutputWithPast."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutputWithPast(ModelOutput):
    """LlamaForSequenceClassification: loss (), logits (B, num_labels), then as BaseModelOutputWithPast."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TokenClassifierOutput(ModelOutput):
    """LlamaForTokenClassification: loss (), logits (B, T, num_labels), hidden_states and attentions as above."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """LlamaForQuestionAnswering: loss (), start_logits and end_logits (B, T), hidden_states and attentions."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
