"""RoPE settings in every spelling, and their bounds. Standard library only.

Three spellings are in use: `rope_theta` beside `rope_scaling` with "type" (transformers 4.31) or "rope_type" (4.43),
and one `rope_parameters` with the base inside (5.x). Files that are written hold the old and the new one.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from llama2.errors import ConfigError
from llama2.plain import plain
from llama2.rope_types import ROPE_TYPES
from llama2.schema import Schema, check, real, text
from llama2.text_file import shown

DEFAULT_THETA = 10000.0
_POSITIVE = real(1e-30, 1e30)
_SCHEMA: Schema = {
    **dict.fromkeys(("type", "rope_type"), text(64)),
    **{name: kind for row in ROPE_TYPES.values() for name, kind in row.values.items()},
}


def normalise_rope(settings: Mapping[str, Any] | None, theta: float) -> dict[str, Any]:
    """RoPE settings of any spelling as one dict {"rope_type", "rope_theta", ...}; the argument is not changed.

    Accepts None, {"type": ...} (transformers 4.31), {"rope_type": ...} (4.43) and 5.x `rope_parameters`.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(f"rope_scaling is {settings!r}; give a dict such as {{'rope_type': 'linear', 'factor': 2.0}}")
    given = {key: plain(value) for key, value in (settings or {}).items() if value is not None}
    check(given, _SCHEMA, "the rope settings", ConfigError)
    kind = given.pop("type", None)
    kind = given.pop("rope_type", kind)
    theta = given.pop("rope_theta", plain(theta))
    if kind is None:
        if given:
            raise ConfigError(f"rope settings {dict(given)} name no rope_type; add one of {', '.join(ROPE_TYPES)}")
        kind = "default"
    return {"rope_type": kind, "rope_theta": theta, **given}


def scaling_of(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Normalised settings without the base; None for plain RoPE."""
    if settings["rope_type"] == "default":
        return None
    return {key: value for key, value in settings.items() if key != "rope_theta"}


def agreed_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Normalised settings of a configuration's fields, which may hold both spellings.

    Where the old spelling differs from what `rope_parameters` implies, it was edited, and counts, with a warning. A
    `rope_scaling` of None counts where the key is there. Raises ConfigError where both `rope_theta` and
    `rope_scaling` differ: the file is then not one configuration with an edit.
    """
    parameters, theta = fields.get("rope_parameters"), fields.get("rope_theta")
    base = DEFAULT_THETA if theta is None else theta
    if not parameters:
        return normalise_rope(fields.get("rope_scaling"), base)
    implied = normalise_rope(parameters, base)
    edited = {}
    if theta is not None and theta != implied["rope_theta"]:
        edited["rope_theta"] = {**implied, "rope_theta": theta}
    if "rope_scaling" in fields:
        scaled = normalise_rope(fields["rope_scaling"], implied["rope_theta"])
        if scaling_of(scaled) != scaling_of(implied):
            edited["rope_scaling"] = scaled
    if len(edited) == 2:
        raise ConfigError(
            f"rope_theta is {theta!r} and rope_scaling is {fields['rope_scaling']!r}, and both differ from "
            f"rope_parameters, {dict(parameters)!r}; delete rope_parameters, or the other two"
        )
    for name, settings in edited.items():
        warnings.warn(
            f"{name} is {fields[name]!r} but rope_parameters is {dict(parameters)!r}; {name} counts, as the one that "
            "was edited. Delete the one that you don't mean",
            stacklevel=4,
        )
        return settings
    return implied


def validate_rope(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for settings that cannot work, naming the bound and the remedy."""
    kind, theta = settings["rope_type"], settings["rope_theta"]
    if kind not in ROPE_TYPES:
        raise ConfigError(f"rope_type is {kind!r}; it must be one of {', '.join(ROPE_TYPES)}")
    if not _POSITIVE.holds(theta):
        raise ConfigError(f"rope_theta is {shown(theta)}; it must be a positive number (Llama 2 has 10000.0)")
    row = ROPE_TYPES[kind]
    missing = [key for key in row.required if key not in settings]
    if missing:
        raise ConfigError(f"rope_type {kind!r} needs {', '.join(missing)}; got {dict(settings)}")
    if settings.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(
            f"partial_rotary_factor is {settings['partial_rotary_factor']!r}; a Llama model rotates whole heads (1.0)"
        )
    unknown = set(settings) - {"rope_type", "rope_theta", "partial_rotary_factor", *row.required, *row.optional}
    if unknown and kind != "default":
        raise ConfigError(f"rope_type {kind!r} does not use {', '.join(sorted(unknown))}; remove or rename them")
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        value = settings.get(key, 1)
        if not _POSITIVE.holds(value):
            raise ConfigError(f"rope setting {key} is {shown(value)}; it must be a positive number")
    if settings.get("factor", 1) < 1:
        raise ConfigError(f"rope factor is {settings['factor']}; it must be at least 1 (it stretches the context)")
    if row.check is not None:
        row.check(settings)
