"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), half-split form only.

Frequencies are never module state: `model.half()` cannot round them. They are computed per device and compute dtype,
in promote(x.dtype, float32), so that a float64 model is truly float64 and a float16 one still has float32 angles.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from llama2.config import LlamaConfig
from llama2.errors import InputError


def promoted(dtype: torch.dtype) -> torch.dtype:
    """The dtype norms, softmax and rotations are computed in: at least float32."""
    return dtype if dtype is torch.float64 else torch.float32


def rope_frequencies(config: LlamaConfig, seq_len: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse frequencies (head_dim / 2,) in radians per position, on the CPU.

    `seq_len` matters for the dynamic type only: past the trained context it raises the base (NTK-aware scaling).
    """
    settings, width = config.rope_parameters, config.head_dim
    kind, base = settings["rope_type"], settings["rope_theta"]
    if kind == "dynamic":
        base = _dynamic_base(settings, config, seq_len)
    inv = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.int64).to(dtype) / width))
    if kind == "linear":
        return inv / settings["factor"]
    if kind == "yarn":
        return _yarn(inv, settings, config)
    if kind == "llama3":
        return _llama3(inv, settings)
    return inv


def attention_scaling(settings: dict[str, Any]) -> float:
    """What multiplies cos and sin: 1, or YaRN's temperature (Peng et al. 2023, arXiv 2309.00071, eq. 22)."""
    if settings["rope_type"] != "yarn":
        return 1.0
    if "attention_factor" in settings:
        return float(settings["attention_factor"])
    factor = settings["factor"]

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1.0)


def _dynamic_base(settings: dict[str, Any], config: LlamaConfig, seq_len: int | None) -> float:
    trained = config.max_position_embeddings  # an original_max_position_embeddings beside it is not looked at, as in HF
    length = max(seq_len or trained, trained)
    width, factor = config.head_dim, settings["factor"]
    stretched: float = settings["rope_theta"] * (factor * length / trained - (factor - 1)) ** (width / (width - 2))
    return stretched


def _yarn(inv: Tensor, settings: dict[str, Any], config: LlamaConfig) -> Tensor:
    """YaRN: high frequencies stay, low ones are interpolated, a linear ramp between."""
    base, width = settings["rope_theta"], config.head_dim
    context = settings.get("original_max_position_embeddings", config.max_position_embeddings)

    def turning_dim(turns: float) -> float:
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = turning_dim(settings.get("beta_fast", 32)), turning_dim(settings.get("beta_slow", 1))
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(width // 2, dtype=inv.dtype) - low) / (high - low)).clamp(0, 1)
    return inv / settings["factor"] * ramp + inv * (1 - ramp)


def _llama3(inv: Tensor, settings: dict[str, Any]) -> Tensor:
    """Llama 3.1: wavelengths beyond the trained context are stretched, short ones kept, a smooth band between."""
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    context, factor = settings["original_max_position_embeddings"], settings["factor"]
    wavelength = 2 * math.pi / inv
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv / factor + smooth * inv
    scaled = torch.where(wavelength > context / low, inv / factor, inv)
    return torch.where((wavelength <= context / low) & (wavelength >= context / high), blended, scaled)


class LlamaRotaryEmbedding(nn.Module):
    """Positions (B, T) -> cos, sin (B, T, head_dim) in promote(x.dtype, float32).

    The dynamic type uses the longest position of the call, so the same call gives the same result whatever came
    before; keys cached under a shorter length keep their rotation (as in transformers).
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self._tables: dict[tuple[Any, ...], Tensor] = {}
        self._given: Tensor | None = None  # frequencies that were assigned

    @property
    def inv_freq(self) -> Tensor:
        """Inverse frequencies in float32 for the trained context, on the CPU; what is assigned is used instead."""
        return rope_frequencies(self.config) if self._given is None else self._given

    @inv_freq.setter
    def inv_freq(self, value: Tensor) -> None:
        if value.shape != (self.config.head_dim // 2,):
            raise InputError(
                f"inv_freq has shape {tuple(value.shape)}; it must be ({self.config.head_dim // 2},), half of head_dim"
            )
        self._given = value

    @property
    def attention_scaling(self) -> float:
        """What multiplies cos and sin."""
        return attention_scaling(self.config.rope_parameters)

    def _frequencies(self, device: torch.device, dtype: torch.dtype, seq_len: int | None) -> Tensor:
        if self._given is not None:
            return self._given.to(device, dtype)
        if torch.compiler.is_compiling():
            return rope_frequencies(self.config, seq_len, dtype).to(device)
        settings = self.config.rope_parameters
        key = (device, dtype, seq_len, self.config.max_position_embeddings, *settings.items())
        if key not in self._tables:
            if len(self._tables) > 8:
                self._tables.clear()
            with torch.inference_mode(False):  # a table made in inference mode could not be used for training
                table = rope_frequencies(self.config, seq_len, dtype).to(device)
            if type(table) is not Tensor:  # of a tracing mode
                return table
            self._tables[key] = table
        return self._tables[key]

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for each position; `x` gives device and dtype only."""
        dtype = promoted(x.dtype)
        seq_len = None
        if self.config.rope_parameters["rope_type"] == "dynamic":
            seq_len = int(position_ids.max()) + 1
            seq_len = None if seq_len <= self.config.max_position_embeddings else seq_len
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
    return torch.split(out, [part.shape[1] for part in heads], dim=1)
