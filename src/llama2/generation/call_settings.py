"""The settings of one call of generate() or of one request of the engine, from all that says some. No torch here."""

import difflib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from llama2.errors import InputError
from llama2.generation.config import CACHE_ALIASES, DEFAULTS, GenerationConfig, as_list
from llama2.keywords import drop
from llama2.plain import plain
from llama2.protocols import CausalLM

CALL_ARGUMENTS = (
    "attention_mask",
    "position_ids",
    "inputs_embeds",
    "past_key_values",
    "input_ids",
    "tokenizer",
    "assistant_tokenizer",
    "seed",
    "generator",
    "runner",
    "precision",
)


FILTERS = ("temperature", "top_p", "top_k", "min_p")


def choosing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the way of choosing that they imply: temperature 0 takes the likeliest token every time, any of
    FILTERS asks for a random choice. Raises InputError where do_sample=True contradicts temperature 0."""
    changed = dict(settings)
    if changed.get("temperature") == 0:
        del changed["temperature"]
        if changed.setdefault("do_sample", False):
            raise InputError("temperature 0 takes the likeliest token, so do_sample=True contradicts it; drop one")
    elif any(changed.get(name) is not None for name in FILTERS):
        changed.setdefault("do_sample", True)
    return changed


def settings(model: CausalLM, own_config: GenerationConfig | None, kwargs: dict[str, Any]) -> GenerationConfig:
    """Takes the settings out of `kwargs`: they win over `own_config`, that over the model's own,
    those over the defaults.

    Raises InputError for a keyword that is neither a setting nor an argument, naming the nearest.
    """
    own = GenerationConfig.of(getattr(model, "generation_config", None) or GenerationConfig())
    own_config = None if own_config is None else GenerationConfig.of(own_config)
    asked = {name: plain(kwargs.pop(name)) for name in list(kwargs) if name in DEFAULTS}
    drop("generate", kwargs, stacklevel=5)
    known = {*CALL_ARGUMENTS, *arguments_of(model)}
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, [*DEFAULTS, *CALL_ARGUMENTS], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; see GenerationConfig for the settings there are"
            raise InputError(f"generate() got {name!r}, which is no setting and no argument it knows{hint}")
    config = (own_config or GenerationConfig()).over(own)
    explicit = {**(vars(own_config) if own_config is not None else {}), **asked}
    vars(config).update(asked)
    if explicit.get("max_length") is not None and explicit.get("max_new_tokens") is None:
        config.update(max_new_tokens=None)  # the caller's length wins over the one stored with the model
    config.validate()
    _settle(config, explicit)
    config.warn_of_unused(explicit, stacklevel=4)
    return config


def _settle(config: GenerationConfig, explicit: dict[str, Any]) -> None:
    """Says which of two settings counts, and replaces values that have another name here."""
    for winner, loser in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if explicit.get(winner) is not None and explicit.get(loser) is not None:
            warnings.warn(f"{winner} and {loser} are both given; {winner} counts", stacklevel=5)
    if negative := [i for i in as_list(config.eos_token_id) if i < 0]:
        warnings.warn(
            f"eos_token_id holds {negative}, which no token has: no row ends there, only at the length", stacklevel=5
        )
    kind = config.cache_implementation
    if kind in CACHE_ALIASES:
        if "offloaded" in kind:
            warnings.warn(
                f"cache_implementation={kind!r}: nothing is offloaded; the cache stays where the model is", stacklevel=5
            )
        config.update(cache_implementation=CACHE_ALIASES[kind])


def arguments_of(model: Any) -> set[str]:
    """The arguments that forward or prepare_inputs_for_generation of a class of another library takes beside ours."""
    names: set[str] = set()
    own: set[str] = set()
    for function in (getattr(type(model), "forward", None), getattr(model, "prepare_inputs_for_generation", None)):
        if function is not None and not function.__module__.startswith("llama2."):
            names |= _names(function)
    if names:
        for base in (cls for cls in type(model).__mro__ if cls.__module__.startswith("llama2.")):
            for name in ("forward", "prepare_inputs_for_generation"):
                own |= _names(vars(base)[name]) if name in vars(base) else set()
    return names - own


def _names(function: Callable[..., Any]) -> set[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds and name != "self"}
