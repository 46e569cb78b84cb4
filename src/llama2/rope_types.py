"""The RoPE types, one row each: their settings, their frequencies, what scales cos and sin. Standard library only.

    inverse_frequencies(config, xp=numpy, dtype=numpy.float32)    the native engine
    inverse_frequencies(config, xp=torch, dtype=...)              torch, in the dtype of the computation

The arithmetic is written once, in operations that numpy and torch share, so both worlds turn by the same angles.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from llama2.errors import ConfigError
from llama2.schema import FLAG, Schema, real

Settings = Mapping[str, Any]


class RopeConfig(Protocol):
    """The fields of a LlamaConfig on which frequencies depend."""

    rope_parameters: dict[str, Any]
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        """Width of a head."""


@dataclass(frozen=True)
class RopeType:
    """A row. `required` and `optional` name its settings beside rope_type and rope_theta.

    scale(inv, config, length, xp): the frequencies from those of plain RoPE; xp is numpy or torch. base(config,
    length): the base for a text of `length` positions. constant_below(config): the length up to which frequencies do
    not depend on the text's; None where they never do. unbounded: positions beyond the configured context work as well.
    check(settings) raises ConfigError for settings that contradict each other. magnitude(settings): what multiplies cos
    and sin. values: what values its own settings may have.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    scale: Callable[[Any, RopeConfig, int | None, Any], Any] | None = None
    base: Callable[[RopeConfig, int | None], float] | None = None
    constant_below: Callable[[RopeConfig], int] | None = None
    unbounded: bool = False
    check: Callable[[Settings], None] | None = None
    magnitude: Callable[[Settings], float] | None = None
    values: Schema = field(default_factory=dict)


def type_of(config: RopeConfig) -> RopeType:
    """The row of a configuration."""
    return ROPE_TYPES[config.rope_parameters["rope_type"]]


def context_limit(config: Any) -> int | None:
    """Positions that a prompt and its answer share at most; None where RoPE stretches without a bound.

    config: of this library or of another one, whose RoPE types may be unknown here.
    """
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    row = ROPE_TYPES.get(settings.get("rope_type", "default"))
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is None or (row is not None and row.unbounded) else int(limit)


def inverse_frequencies(config: RopeConfig, length: int | None = None, *, xp: Any, dtype: Any) -> Any:
    """Inverse frequencies (head_dim / 2,) in radians per position, as an array of `xp`, which is numpy or torch.

    length: positions of the text, for the types with `constant_below`.
    """
    row = type_of(config)
    base = float(config.rope_parameters["rope_theta"]) if row.base is None else row.base(config, length)
    inv = 1.0 / base ** (xp.arange(0, config.head_dim, 2, dtype=dtype) / config.head_dim)
    return inv if row.scale is None else row.scale(inv, config, length, xp)


def attention_scaling(settings: Settings) -> float:
    """Returns the factor on cos and sin; 1 for most types."""
    magnitude = ROPE_TYPES[settings["rope_type"]].magnitude
    return 1.0 if magnitude is None else magnitude(settings)


def _linear(inv: Any, config: RopeConfig, length: int | None, xp: Any) -> Any:
    return inv / config.rope_parameters["factor"]


def _dynamic_base(config: RopeConfig, length: int | None) -> float:
    """NTK-aware scaling: past the trained context the base grows with the text."""
    trained = config.max_position_embeddings  # an original_max_position_embeddings beside it is not looked at, as in HF
    factor, width = config.rope_parameters["factor"], config.head_dim
    grown = (factor * max(length or trained, trained) / trained - (factor - 1)) ** (width / (width - 2))
    return float(config.rope_parameters["rope_theta"] * grown)


def _yarn(inv: Any, config: RopeConfig, length: int | None, xp: Any) -> Any:
    """Peng et al. 2023, arXiv 2309.00071: high frequencies stay, low ones are interpolated, a linear ramp between."""
    settings, width = config.rope_parameters, config.head_dim
    context = settings.get("original_max_position_embeddings", config.max_position_embeddings)

    def turning_dim(turns: float) -> float:
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(settings["rope_theta"]))

    low, high = turning_dim(settings.get("beta_fast", 32)), turning_dim(settings.get("beta_slow", 1))
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    ramp = xp.clip((xp.arange(width // 2, dtype=inv.dtype) - low) / (high - low), 0, 1)
    return inv / settings["factor"] * ramp + inv * (1 - ramp)


def _yarn_magnitude(settings: Settings) -> float:
    """YaRN's temperature (arXiv 2309.00071, eq. 22)."""
    if "attention_factor" in settings:
        return float(settings["attention_factor"])
    factor = settings["factor"]

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale, over = settings.get("mscale"), settings.get("mscale_all_dim")
    return temperature(scale) / temperature(over) if scale and over else temperature(1.0)


def _llama3(inv: Any, config: RopeConfig, length: int | None, xp: Any) -> Any:
    """Llama 3.1: wavelengths beyond the trained context are stretched, short ones kept, a smooth band between."""
    settings = config.rope_parameters
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    context, factor = settings["original_max_position_embeddings"], settings["factor"]
    wavelength = 2 * math.pi / inv
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv / factor + smooth * inv
    scaled = xp.where(wavelength > context / low, inv / factor, inv)
    return xp.where((wavelength <= context / low) & (wavelength >= context / high), blended, scaled)


def _check_llama3(settings: Settings) -> None:
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    if high <= low:
        raise ConfigError(f"rope high_freq_factor is {high}; it must exceed low_freq_factor, {low}")


ROPE_TYPES: dict[str, RopeType] = {
    "default": RopeType(),
    # 5.x leaves original_max_position_embeddings in, where it changes nothing.
    "linear": RopeType(("factor",), ("original_max_position_embeddings",), _linear),
    "dynamic": RopeType(
        ("factor",),
        ("original_max_position_embeddings",),
        base=_dynamic_base,
        constant_below=lambda config: config.max_position_embeddings,
        unbounded=True,
    ),
    "yarn": RopeType(
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
        _yarn,
        magnitude=_yarn_magnitude,
        values={
            **dict.fromkeys(
                ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), real(-1e6, 1e6)
            ),
            "truncate": FLAG,
        },
    ),
    "llama3": RopeType(
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
        _llama3,
        check=_check_llama3,
    ),
}
