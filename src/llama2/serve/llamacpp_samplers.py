"""llama.cpp's samplers in a request, whichever API it comes by: which of them a body asks for.

A body that asks for none of them is sampled in Hugging Face's order, the temperature first.
"""

from dataclasses import replace
from typing import Any

from llama2.errors import InputError
from llama2.generation.samplers import SamplerSettings, ordered
from llama2.serve.errors import Refusal
from llama2.serve.request import Sampling

_OWN = (
    "min_keep", "top_n_sigma", "xtc_probability", "xtc_threshold", "dynatemp_range", "dynatemp_exponent",
    "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "mirostat", "mirostat_tau",
    "mirostat_eta",
)  # fmt: skip


def chained(chosen: Sampling, body: Any) -> Sampling:
    """How tokens are chosen, by llama.cpp's samplers where a body asks for one. Raises Refusal.

    chosen: by what every API has. body: a `Common`.
    """
    given = {name: value for name in _OWN if (value := getattr(body, name)) is not None}
    penalties = (chosen.repetition_penalty, chosen.frequency_penalty, chosen.presence_penalty) != (1, 0, 0)
    window = penalties and (body.samplers is not None or (body.repeat_last_n is not None and body.repeat_last_n >= 0))
    active = [given.get(name, 0) for name in ("xtc_probability", "dynatemp_range", "dry_multiplier", "mirostat")]
    active += [given.get("top_n_sigma", -1) > 0, given.get("min_keep", 0) > 1]
    if not (window or any(active) or body.samplers is not None):
        return chosen
    if body.dry_sequence_breakers is not None:
        given["dry_sequence_breakers"] = tuple(body.dry_sequence_breakers)
    if body.samplers is not None:
        given["order"], unknown = ordered(body.samplers)
        if unknown and not given["order"]:
            raise Refusal("validation", f"samplers is {str(body.samplers)[:80]!r}, which names none", "samplers")
    if window:
        given |= {
            "repeat_penalty": chosen.repetition_penalty,
            "frequency_penalty": chosen.frequency_penalty,
            "presence_penalty": chosen.presence_penalty,
            "penalty_last_n": SamplerSettings.penalty_last_n if body.repeat_last_n is None else body.repeat_last_n,
        }
        chosen = replace(chosen, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0)
    try:
        settings = SamplerSettings(
            temperature=chosen.temperature,
            top_k=chosen.top_k,
            top_p=chosen.top_p,
            min_p=chosen.min_p,
            typical_p=chosen.typical_p,
            **given,
        )
    except InputError as error:
        raise Refusal("validation", str(error)) from None
    return replace(chosen, chain=settings)
