"""RoPE frequencies without torch, in the float32 steps of `llama2.rope` (the tests hold the two together)."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2.config import LlamaConfig

Floats = NDArray[np.float32]


def inverse_frequencies(config: LlamaConfig, length: int | None = None) -> Floats:
    """float32 (head_dim / 2,) radians per position; `length` matters for the dynamic type past the trained context."""
    settings, width = config.rope_parameters, config.head_dim
    kind, base = settings["rope_type"], float(settings["rope_theta"])
    if kind == "dynamic":
        trained = config.max_position_embeddings
        grown = max(length or trained, trained)
        base *= (settings["factor"] * grown / trained - (settings["factor"] - 1)) ** (width / (width - 2))
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    inv = (np.float32(1) / np.float32(base) ** exponents).astype(np.float32)
    if kind == "linear":
        inv = inv / np.float32(settings["factor"])
    elif kind == "yarn":
        inv = _yarn(inv, settings, config)
    elif kind == "llama3":
        inv = _llama3(inv, settings)
    return np.ascontiguousarray(inv, dtype=np.float32)


def attention_scaling(settings: dict[str, Any]) -> float:
    """What multiplies cos and sin: 1, or YaRN's temperature (arXiv 2309.00071, eq. 22)."""
    if settings["rope_type"] != "yarn":
        return 1.0
    if "attention_factor" in settings:
        return float(settings["attention_factor"])

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(settings["factor"]) + 1.0 if settings["factor"] > 1 else 1.0

    mscale, over = settings.get("mscale"), settings.get("mscale_all_dim")
    return temperature(mscale) / temperature(over) if mscale and over else temperature(1.0)


def _yarn(inv: Floats, settings: dict[str, Any], config: LlamaConfig) -> Floats:
    base, width = settings["rope_theta"], config.head_dim
    context = settings.get("original_max_position_embeddings", config.max_position_embeddings)

    def dimension(turns: float) -> float:
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(settings.get("beta_fast", 32)), dimension(settings.get("beta_slow", 1))
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    blended: Floats = inv / np.float32(settings["factor"]) * ramp + inv * (1 - ramp)
    return blended


def _llama3(inv: Floats, settings: dict[str, Any]) -> Floats:
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    context, factor = settings["original_max_position_embeddings"], np.float32(settings["factor"])
    wavelength = np.float32(2 * math.pi) / inv
    smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * inv / factor + smooth * inv
    scaled = np.where(wavelength > context / low, inv / factor, inv)
    between = (wavelength <= context / low) & (wavelength >= context / high)
    return np.where(between, blended, scaled).astype(np.float32)
