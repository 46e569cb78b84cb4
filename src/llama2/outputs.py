"""Outputs of forward: dataclasses that read as attributes, as a mapping and as a tuple without the absent fields."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor


class ModelOutput(OrderedDict[str, Any]):
    """Base of every output: `out.logits`, `out["logits"]`, `out[0]`, `out.keys()`; None fields are absent.

    A dict, as libraries ask (transformers' Trainer, accelerate), and a pytree, as torch.export and DDP ask. As
    accelerate builds outputs again, one mapping or iterable of (name, value) in place of the first field gives
    all fields.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            _flatten,
            partial(_unflatten, cls),
            flatten_with_keys_fn=_flatten_with_keys,
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        given = self.__dict__[names[0]]
        if given is not None and not isinstance(given, Tensor) and (pairs := _pairs(given, names)) is not None:
            self.__dict__.update({names[0]: None, **pairs})
        self.clear()  # the last field is there already
        for name in names:
            if self.__dict__[name] is not None:
                super().__setitem__(name, self.__dict__[name])

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are present, in order."""
        return tuple(self.values())

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        names = list(self.__dataclass_fields__)  # type: ignore[attr-defined]
        if name not in names or len(self.__dict__) < len(names):  # the dataclass fills its fields in
            return
        if value is None:
            super().pop(name, None)
        elif name in self:
            super().__setitem__(name, value)
        else:
            super().__setitem__(name, value)
            for later in names[names.index(name) + 1 :]:
                if later in self:
                    self.move_to_end(later)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{key!r} cannot be deleted: fields of {type(self).__name__} are set to None")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, name) for name in self.__dataclass_fields__)  # type: ignore[attr-defined]


def _pairs(given: Any, names: list[str]) -> dict[str, Any] | None:
    """Fields given as one mapping or as (name, value) pairs; None where it is neither."""
    if not isinstance(given, Mapping | Iterable) or isinstance(given, str | tuple):
        return None
    items = list(given.items() if isinstance(given, Mapping) else given)
    if not all(isinstance(item, tuple | list) and len(item) == 2 and item[0] in names for item in items):
        return None
    return dict(items)


def _flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output.keys())


def _flatten_with_keys(output: ModelOutput) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(pytree.MappingKey(name), value) for name, value in output.items()], list(output.keys())


def _unflatten(cls: type[ModelOutput], values: Iterable[Any], names: list[str]) -> ModelOutput:
    return cls(**dict(zip(names, values, strict=True)))


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


@dataclass
class GenerateDecoderOnlyOutput(ModelOutput):
    """generate(): sequences (rows, L), prompt included; a step: scores, logits (rows, V), attentions, hidden_states."""

    sequences: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: Any = None


@dataclass
class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """As above, with sequences_scores (rows,) and beam_indices (rows, new tokens), -1 behind the end."""

    sequences: Tensor | None = None
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: Any = None
