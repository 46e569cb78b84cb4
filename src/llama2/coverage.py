"""One check for every reader and writer: each parameter has its tensor, each tensor its parameter, shapes agree.

    report = cover(parameters, stored, same={"lm_head.weight": "model.embed_tokens.weight"})
    report.refuse("model.gguf")                      # MismatchError that lists what is missing, not used or misshapen

What a file may hold besides, because it says nothing that the configuration does not say, is known by name
(`is_table`), or by its value: biases of 0 where the model has none.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from llama2.errors import MismatchError

SHOWN = 12  # problems that a message lists
# Rotary tables and causal masks that older files hold for every layer, and scales of a quantised cache.
_TABLE = re.compile(
    r"(?:.*\.)?(?:rotary_emb\.(?:original_)?inv_freq|rotary_emb\.(?:cos|sin)_cached|rope\.freqs|rope_freqs(?:\.weight)?"
    r"|attn_rot_embd(?:\.weight)?|(?:self_attn|attention|attn)\.(?:mask|masked_bias|bias|[kv]_scale))"
)


class Shaped(Protocol):
    """Shape of a stored tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass
class Coverage:
    """Which tensor of the file fills which parameter, and what is left on either side. Names are the model's."""

    found: dict[str, str] = field(default_factory=dict)  # parameter -> name in the file
    missing: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unexpected: dict[str, tuple[int, ...]] = field(default_factory=dict)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)  # file's, model's
    ignored: list[str] = field(default_factory=list)  # harmless extras

    def problems(self, excused: Iterable[str] = (), any_shape: bool = False) -> list[str]:
        """Returns a message for each reason not to use the file. excused: parameters and tensors that may be left
        over."""
        allowed = set(excused)
        texts = [f"missing: {name} {shape}" for name, shape in self.missing.items() if name not in allowed]
        texts += [f"not used: {name} {shape}" for name, shape in self.unexpected.items() if name not in allowed]
        if not any_shape:
            texts += [f"shape: {name} is {there} in the file, {here} here" for name, there, here in self.mismatched]
        return texts

    def refuse(self, subject: str, excused: Iterable[str] = ()) -> None:
        """Raises MismatchError where anything is missing, not used or of another shape."""
        if problems := self.problems(excused):
            raise MismatchError(
                f"the tensors of {subject} do not fit its configuration: {listed(problems)}.{self.hint()}"
            )

    def hint(self) -> str:
        """Returns remedies for the commonest causes, as further sentences."""
        hints = []
        if "lm_head.weight" in self.missing:
            hints.append("a tied model needs tie_word_embeddings=True")
        if any(name.endswith(".bias") for name in self.unexpected):
            hints.append("biases that are not 0 need attention_bias=True or mlp_bias=True")
        return " Check that config.json belongs to these weights" + "".join(f"; {hint}" for hint in hints)


def listed(problems: list[str]) -> str:
    """The first problems in one text, and how many more there are."""
    more = len(problems) - SHOWN
    return "; ".join(problems[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def is_table(name: str) -> bool:
    """Whether a tensor of this name only repeats what the configuration says, in any format's spelling."""
    return _TABLE.fullmatch(name) is not None


def cover(
    parameters: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Shaped],
    names: Mapping[str, str] | None = None,
    same: Mapping[str, str] | None = None,
    is_zero: Callable[[str], bool] | None = None,
) -> Coverage:
    """Pairs parameters (name -> shape) and the tensors of a file.

    names: the model's names of the file's tensors -> the file's own (None: they are the same). same: parameters that
    are another one under a second name, as a tied head is; one tensor fills both. is_zero: whether a tensor of the
    file is 0 throughout; asked for biases that the model does not have.
    """
    report = Coverage()
    names = {name: name for name in stored} if names is None else names
    for name in [*(n for n in parameters if n in names), *(n for n in names if n not in parameters)]:
        shape = tuple(stored[names[name]].shape)
        if name in parameters and shape == tuple(parameters[name]):
            report.found[name] = names[name]
        elif name in parameters:
            report.mismatched.append((name, shape, tuple(parameters[name])))
        elif is_table(name) or _zero_bias(name, names[name], parameters, is_zero):
            report.ignored.append(name)
        else:
            report.unexpected[name] = shape
    first = {name: (same or {}).get(name, name) for name in parameters}
    there = {first[name] for name in (*report.found, *(entry[0] for entry in report.mismatched))}
    for name, shape in parameters.items():
        if first[name] not in there and first[name] == name:
            report.missing[name] = tuple(shape)
    return report


def _zero_bias(
    name: str, file_name: str, parameters: Mapping[str, tuple[int, ...]], is_zero: Callable[[str], bool] | None
) -> bool:
    """Whether it is a bias of 0 of a linear that has none here: AutoGPTQ and others write such."""
    owner, _, part = name.rpartition(".")
    return part == "bias" and is_zero is not None and f"{owner}.weight" in parameters and is_zero(file_name)
