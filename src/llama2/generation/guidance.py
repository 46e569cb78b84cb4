"""Processors that call what needs torch: the model itself, or a function of the caller's that expects tensors."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.generation.processors import LogitsProcessor, repeated


class PrefixConstrainedLogitsProcessor(LogitsProcessor):
    """Allows only the ids that `prefix_allowed_tokens_fn(batch_id, ids (S,))` returns."""

    def __init__(self, prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]], num_beams: int) -> None:
        self._prefix_allowed_tokens_fn, self._num_beams = prefix_allowed_tokens_fn, num_beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = torch.full_like(scores, -math.inf)
        for row, ids in enumerate(input_ids):
            allowed = list(self._prefix_allowed_tokens_fn(row // self._num_beams, ids))
            if not allowed:
                raise InputError(
                    f"prefix_allowed_tokens_fn allowed no token after {ids.tolist()[-8:]} (row {row}); it must return "
                    "at least one id, such as the end id"
                )
            out[row, allowed] = scores[row, allowed]
        return out


class Forward(Protocol):
    """The part of a causal language model that guidance calls."""

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any: ...


class UnbatchedClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """Moves away from an unconditional run of the same model (Sanchez et al. 2023, arXiv 2306.17806).

    log p = scale * (log p(cond) - log p(uncond)) + log p(uncond). The unconditional prompt (rows, P) defaults to the
    last token of the prompt. Holds a cache: one object serves one generate() call, without beams.
    """

    def __init__(
        self,
        guidance_scale: float,
        model: Forward,
        unconditional_ids: Tensor | None = None,
        unconditional_attention_mask: Tensor | None = None,
        use_cache: bool = True,
    ) -> None:
        self.guidance_scale, self.model, self.use_cache = guidance_scale, model, use_cache
        self.ids, self.mask = unconditional_ids, unconditional_attention_mask
        self._cache: Any = None
        self._started = False

    def get_unconditional_logits(self, input_ids: Tensor) -> Tensor:
        """Logits (rows, T, V) of the unconditional run behind the last of these ids."""
        if not self._started:
            ids = input_ids[:, -1:] if self.ids is None else repeated(self.ids, len(input_ids))
            mask = torch.ones_like(ids) if self.mask is None else repeated(self.mask, len(input_ids))
            self._started, new = True, ids
        else:
            assert self.ids is not None and self.mask is not None
            new = input_ids[:, -1:]
            ids, mask = torch.cat((self.ids, new), 1), torch.cat((self.mask, torch.ones_like(new)), 1)
            if not self.use_cache:
                new = ids
        self.ids, self.mask = ids, mask
        # Positions are given where padding moves them; the model knows the others.
        moved = {} if bool(mask.all()) else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]}
        output = self.model(
            new,
            attention_mask=mask,
            past_key_values=self._cache if self.use_cache else None,
            use_cache=self.use_cache,
            **moved,
        )
        self._cache = output.past_key_values
        logits: Tensor = output.logits
        return logits

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.guidance_scale == 1:
            return scores.log_softmax(-1)
        conditional = scores.log_softmax(-1)
        other = self.get_unconditional_logits(input_ids)[:, -1].to(scores.dtype).log_softmax(-1)
        return self.guidance_scale * (conditional - other) + other
