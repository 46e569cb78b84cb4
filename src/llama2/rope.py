"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), half-split form only.

Frequencies are never module state: `model.half()` cannot round them. They are computed per device and compute dtype,
in promote(x.dtype, float32), so that a float64 model is truly float64 and a float16 one still has float32 angles.
"""

from typing import Any

import torch
from torch import Tensor, nn

from llama2.config import LlamaConfig
from llama2.errors import InputError
from llama2.rope_types import attention_scaling, inverse_frequencies, type_of


def promoted(dtype: torch.dtype) -> torch.dtype:
    """The dtype norms, softmax and rotations are computed in: at least float32."""
    return dtype if dtype is torch.float64 else torch.float32


class LlamaRotaryEmbedding(nn.Module):
    """Positions (B, T) -> cos, sin (B, T, head_dim) in promote(x.dtype, float32).

    A type whose frequencies follow the length uses the longest position of the call, so the same call gives the same
    result whatever came before; keys cached under a shorter length keep their rotation (as in transformers).
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self._tables: dict[tuple[Any, ...], Tensor] = {}
        self._given: Tensor | None = None  # frequencies that were assigned

    @property
    def inv_freq(self) -> Tensor:
        """Inverse frequencies in float32 for the trained context, on the CPU; what is assigned is used instead."""
        return self._computed(torch.float32, None) if self._given is None else self._given

    @inv_freq.setter
    def inv_freq(self, value: Tensor) -> None:
        if value.shape != (self.config.head_dim // 2,):
            raise InputError(
                f"inv_freq has shape {tuple(value.shape)}; it must be ({self.config.head_dim // 2},), half of head_dim"
            )
        self._given = value

    @property
    def attention_scaling(self) -> float:
        """The factor on cos and sin."""
        return attention_scaling(self.config.rope_parameters)

    def _computed(self, dtype: torch.dtype, seq_len: int | None) -> Tensor:
        frequencies: Tensor = inverse_frequencies(self.config, seq_len, xp=torch, dtype=dtype)
        return frequencies

    def _frequencies(self, device: torch.device, dtype: torch.dtype, seq_len: int | None) -> Tensor:
        if self._given is not None:
            return self._given.to(device, dtype)
        if torch.compiler.is_compiling():
            return self._computed(dtype, seq_len).to(device)
        key = (device, dtype, seq_len, self.config.max_position_embeddings, repr(self.config.rope_parameters))
        if key not in self._tables:
            if len(self._tables) > 8:
                self._tables.clear()
            with torch.inference_mode(False):  # a table made in inference mode could not be used for training
                table = self._computed(dtype, seq_len).to(device)
            if type(table) is not Tensor:  # of a tracing mode
                return table
            self._tables[key] = table
        return self._tables[key]

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for each position; `x` gives device and dtype only."""
        dtype = promoted(x.dtype)
        seq_len = None
        if (constant_below := type_of(self.config).constant_below) is not None:
            seq_len = int(position_ids.max()) + 1
            seq_len = None if seq_len <= constant_below(self.config) else seq_len
        # autocast would take the angles down to bfloat16, three digits for a position of 4,000.
        with torch.autocast(x.device.type, enabled=False):
            angles = position_ids[..., None].to(dtype) * self._frequencies(x.device, dtype, seq_len)
            angles = torch.cat((angles, angles), dim=-1)
            scale = self.attention_scaling
            cos, sin = angles.cos(), angles.sin()
            return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def rotate(heads: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Rotates q, k, ... (B, heads, T, E) by cos, sin (B, 1, T, E) in their dtype; returns the inputs' dtype.

    Element i of the first half pairs with element i of the second half. The tensors turn as one: for a single token
    the number of operations is the cost, not their size.
    """
    x = torch.cat(heads, dim=1)
    half = x.shape[-1] // 2
    wide = x.to(cos.dtype)
    turned = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
    out = (wide * cos + turned * sin).to(x.dtype)
    return torch.split(out, [head.shape[1] for head in heads], dim=1)
