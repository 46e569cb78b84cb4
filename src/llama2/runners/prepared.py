"""Generation through `model.prepare_inputs_for_generation`, where a class or another library replaces it.

peft's prompt and prefix tuning work that way: the method puts virtual tokens before the prompt, or keys and values into
the cache. B rows, T new tokens, S context columns, V vocabulary.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llama2.cache import DynamicCache, StaticCache
from llama2.errors import InputError


class PreparedRunner:
    """A PaddedRunner: the torch module, with the arguments that its own `prepare_inputs_for_generation` gives.

    `ids` (B, L) are all tokens so far, set before each step where they are known. extra: arguments of the caller that
    only the model knows.
    """

    def __init__(
        self, model: Any, attentions: bool = False, hidden_states: bool = False, extra: Mapping[str, Any] | None = None
    ) -> None:
        self.model = model
        self.ids: Tensor | None = None
        self.attentions: tuple[Tensor, ...] | None = None  # of the last step
        self.hidden_states: tuple[Tensor, ...] | None = None
        self._ahead = 0  # positions that the method put before the context
        self._extra = dict(extra or {})
        self._wanted = {"output_attentions": attentions or None, "output_hidden_states": hidden_states or None}

    def new_cache(self, kind: str | None, rows: int, length: int) -> Any:
        """As PaddedRunner.new_cache; no static ones, because their room would not count what is put before."""
        if kind not in (None, "dynamic"):
            raise InputError(
                f"cache_implementation={kind!r} does not go with a model whose prepare_inputs_for_generation was "
                "replaced; leave it out"
            )
        self._ahead = 0
        return DynamicCache()

    def step(self, tokens: Tensor, positions: Tensor, mask_BS: Tensor | None, cache: Any, keep: int = 1) -> Tensor:
        """As PaddedRunner.step."""
        embeds = tokens if tokens.is_floating_point() else None
        rows, new = tokens.shape[:2]
        start = 0 if cache is None else cache.get_seq_length() - self._ahead
        end = start + new
        ids = self.ids if self.ids is not None else tokens
        mask = torch.ones((rows, end), dtype=torch.long, device=tokens.device) if mask_BS is None else mask_BS.long()
        inputs = _called(
            self.model.prepare_inputs_for_generation,
            ids if embeds is None else ids.new_zeros((rows, 0)),
            past_key_values=cache if start + self._ahead else None,  # peft tells the first step by there being none
            attention_mask=mask,
            inputs_embeds=embeds,
            cache_position=torch.arange(start, end, device=tokens.device),
            position_ids=positions.expand(rows, -1),
            use_cache=cache is not None,
            **self._extra,
        )
        inputs |= {name: True for name, requested in self._wanted.items() if requested}
        output = self.model(**inputs, return_dict=True)
        if cache is not None:
            self._keep(cache, output.past_key_values, end)
        self.attentions, self.hidden_states = output.attentions, output.hidden_states
        logits: Tensor = output.logits[:, -keep:]
        return logits

    def _keep(self, cache: DynamicCache | StaticCache, grown: Any, end: int) -> None:
        """Takes over what the model filled in place of `cache`."""
        if grown is not None and grown is not cache:
            cache.crop(0)
            for index, (keys, values, *_) in enumerate(grown):
                cache.update(keys, values, index)
        self._ahead = cache.get_seq_length() - end


def _called(function: Callable[..., dict[str, Any]], ids: Tensor, **arguments: Any) -> dict[str, Any]:
    """function(ids, ...) with those of the arguments that it names, or all where it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        names = {p.name for p in parameters}
        arguments = {name: value for name, value in arguments.items() if name in names}
    return dict(function(ids, **arguments))
