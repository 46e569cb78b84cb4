"""How to continue a prompt: every field of `transformers.GenerationConfig`. Standard library only.

An object holds only what was set; anything else reads as its default. That is why a field given to `generate()` wins
over `model.generation_config`, which wins over the defaults, and why a saved file lists only what someone chose.
Saving is never refused; `validate()`, which `generate()` runs, refuses what cannot work.
"""

import copy
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, Unpack, overload

from llama2.call_options import HUB_DEFAULTS, GenerationFileOptions, GenerationSettings, showing
from llama2.config_files import SettingsFile
from llama2.errors import InputError
from llama2.lazy import door
from llama2.plain import plain
from llama2.schema import FLAG, NUMBER, Schema, check, check_names, either, maybe, real, several, text, whole
from llama2.text_file import read_object

# Defaults of transformers 4.46 and 5.x (the values that take effect there).
DEFAULTS: dict[str, Any] = {
    # length
    "max_length": 20,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": None,
    "early_stopping": False,
    "max_time": None,
    "stop_strings": None,
    # strategy
    "do_sample": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "use_cache": True,
    "cache_implementation": None,
    "cache_config": None,
    "prefill_chunk_size": None,
    # logits
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "top_h": None,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "renormalize_logits": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "token_healing": False,
    "guidance_scale": None,
    "watermarking_config": None,
    # outputs
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": None,
    "return_dict_in_generate": False,
    # ids
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    # assisted decoding
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "prompt_lookup_num_tokens": None,
    "max_matching_ngram_size": None,
}
SCHEDULES = ("constant", "heuristic", "heuristic_transient")
CACHES = (None, "dynamic", "static", "quantized")
# Other names of transformers. A Llama model attends to everything before, so that its hybrid and sliding caches are
# static ones.
CACHE_ALIASES = {
    "dynamic_full": "dynamic",
    "offloaded": "dynamic",
    "offloaded_static": "static",
    "sliding_window": "static",
    "hybrid": "static",
    "hybrid_chunked": "static",
    "offloaded_hybrid": "static",
    "offloaded_hybrid_chunked": "static",
}
_NOT_IMPLEMENTED = {  # field -> remedy
    "num_beam_groups": "use num_beams with do_sample=True for varied beams",
    "diversity_penalty": "use num_beams with do_sample=True for varied beams",
    "penalty_alpha": "use do_sample=True with top_k and repetition_penalty",
    "dola_layers": "leave it out",
    "force_words_ids": "use prefix_allowed_tokens_fn",
    "constraints": "use prefix_allowed_tokens_fn",
    "token_healing": "end the prompt before the last whole word",
    "watermarking_config": "pass a logits_processor that marks the text",
    "cache_config": "leave it out",
}
_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_RECORDS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# Arguments of generate() that are objects or belong to one call.
CALL_ONLY = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)
_BEAMS_ONLY = ("early_stopping", "length_penalty")
_MAY_BE_NONE = {name for name, value in DEFAULTS.items() if value is None} | {
    *_SAMPLING_ONLY,
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "assistant_confidence_threshold",
}
_FILE = "generation_config.json"
PathLike = str | os.PathLike[str]
_NOT_SAVED = ("transformers_version", "_from_model_config", "generation_kwargs")

_IDS = maybe(either(whole(-(2**31)), several(whole(-(2**31)), 10_000)))
_SCALAR = maybe(either(FLAG, NUMBER))
_OBJECTS = ("cache_config", "constraints", "force_words_ids", "sequence_bias", "watermarking_config", "dola_layers")
_SCHEMA: Schema = {  # what a generation_config.json may hold; whether it can work is `problems`' affair
    **{name: _SCALAR for name in DEFAULTS if name not in _OBJECTS},
    **{name: _IDS for name in DEFAULTS if name.endswith("_token_id")},
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), maybe(several(whole(-1), 1_000_000))),
    "early_stopping": either(FLAG, text(16), maybe(whole())),
    "stop_strings": maybe(either(text(), several(text(), 10_000))),
    "bad_words_ids": maybe(several(several(whole(), 10_000), 100_000)),
    "exponential_decay_length_penalty": maybe(several(real(), 2)),
    **dict.fromkeys(("cache_implementation", "num_assistant_tokens_schedule"), maybe(text(100))),
}  # fmt: skip


def check_fields(fields: Mapping[str, Any], where: Path) -> None:
    """Raises InputError for a field of a generation_config.json of another type than it has, or that hides a method."""
    check(fields, _SCHEMA, where, InputError)
    check_names(GenerationConfig, fields, str(where), InputError)


class GenerationConfig(SettingsFile):
    """Settings of `generate()`; keywords are the fields of DEFAULTS, None means not given, unknown ones are kept.

    Raises InputError for values that cannot work and for arguments of generate() that are no settings, and warns of
    fields that have no effect beside the others; what is not given may come from the model's settings, and is judged
    by generate(). What stands in a file is checked where it is used, not before.
    """

    @showing(GenerationSettings, DEFAULTS, more=True)
    def __init__(self, **kwargs: Unpack[GenerationSettings]) -> None:
        if arguments := [name for name in kwargs if name in CALL_ONLY]:
            raise InputError(f"{', '.join(arguments)} is no setting; give it to generate() itself")
        self._fill(kwargs)
        for problem in self._refused() or self._conflicts(settled=False):
            raise InputError(problem)
        self.warn_of_unused(vars(self), stacklevel=3, settled=False)

    @classmethod
    def _unchecked(cls, fields: Mapping[str, Any]) -> Self:
        config = cls.__new__(cls)
        config._fill(fields)
        return config

    def _fill(self, fields: Mapping[str, Any]) -> None:
        known = {name: value for name, value in fields.items() if name not in _NOT_SAVED}
        check_names(type(self), known, "a generation configuration", InputError)
        vars(self).update({name: plain(value) for name, value in known.items() if value is not None})

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, plain(value))

    def __getattr__(self, name: str) -> Any:
        # Reached only where nothing was set.
        try:
            return DEFAULTS[name]
        except KeyError:
            raise AttributeError(f"GenerationConfig has no field {name!r}") from None

    def is_set(self, name: str) -> bool:
        """Whether someone chose this field, to None included where None switches it off."""
        return name in vars(self) and (vars(self)[name] is not None or name in _MAY_BE_NONE)

    def value(self, name: str) -> Any:
        """The field; its default where it was set to a None that has no meaning."""
        value = getattr(self, name)
        return DEFAULTS[name] if value is None and name not in _MAY_BE_NONE else value

    @property
    def eos_token_ids(self) -> list[int]:
        """The end ids as a list; empty where there is none. A negative one, such as -1 for "never", is none."""
        return [i for i in as_list(self.eos_token_id) if i >= 0]

    # -- dictionaries and files ----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Every field with the value in force, plus the unknown keys."""
        return copy.deepcopy(DEFAULTS | vars(self))

    def to_diff_dict(self) -> dict[str, Any]:
        """Only what was set: the content of generation_config.json."""
        return {name: copy.deepcopy(value) for name, value in sorted(vars(self).items()) if value is not None}

    def to_json_string(self, use_diff: bool = True) -> str:
        """JSON text of `to_diff_dict`, or of `to_dict`."""
        fields = self.to_diff_dict() if use_diff else self.to_dict()
        if isinstance(bias := fields.get("sequence_bias"), Mapping):  # JSON has no tuple keys
            fields["sequence_bias"] = [[list(key), value] for key, value in bias.items()]
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **overrides: Any) -> Self:
        """Settings from the content of a generation_config.json; keywords override its entries."""
        return cls._unchecked({**config_dict, **overrides})

    @overload
    @classmethod
    def from_pretrained(
        cls,
        path: PathLike,
        config_file_name: str | None = None,
        return_unused_kwargs: Literal[False] = False,
        **kwargs: Unpack[GenerationFileOptions],
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls, path: PathLike, config_file_name: str | None = None, *, return_unused_kwargs: Literal[True], **kwargs: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    @showing(GenerationFileOptions, HUB_DEFAULTS, more=True)
    def from_pretrained(
        cls,
        path: PathLike,
        config_file_name: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The settings in a generation_config.json.

        Args:
            path: a folder, the JSON file itself, or a hub id.
            config_file_name: the file's name in the folder; generation_config.json where not given.
            return_unused_kwargs: True gives a pair, the settings and the keywords that are no field.
            kwargs: settings of the hub (revision, cache_dir, token, local_files_only, force_download, subfolder), and
                fields, which win over the file's.

        Raises:
            CheckpointError: there is no such file, or it is damaged.
            InputError: a field of another type than it has.
        """
        name = config_file_name or _FILE
        file = _settings_file(path, name, kwargs)
        content = read_object(file, name)
        check_fields(content, file)
        unused = {}
        if return_unused_kwargs:
            unused = {key: kwargs.pop(key) for key in list(kwargs) if key not in DEFAULTS and key not in content}
        config = cls.from_dict(content, **kwargs)
        return (config, unused) if return_unused_kwargs else config

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        config_file_name: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes the fields that were set; push_to_hub uploads the file (repo_id=, token=, private=, commit_message=).

        Values that generate() would refuse are saved with a warning.
        """
        for problem in self.problems():
            warnings.warn(f"saved, but generate() will refuse it: {problem}", stacklevel=2)
        self._write(Path(save_directory) / (config_file_name or _FILE), push_to_hub, kwargs)

    @classmethod
    def of(cls, settings: Any) -> Self:
        """The settings themselves, a dict of them, or a GenerationConfig of transformers as ours.

        In 4.x every field of such an object has a value, so that it wins over the model's own; in 5.x one that is None
        was not set. Raises InputError for anything else.
        """
        if isinstance(settings, cls):
            return settings
        if isinstance(settings, Mapping):
            return cls._unchecked(settings)
        if not hasattr(settings, "to_diff_dict"):
            raise InputError(f"generation_config is a {type(settings).__name__}; give a GenerationConfig")
        fields = settings.to_dict()
        old = str(fields.get("transformers_version", "5")).partition(".")[0] < "5"
        if not old:
            fields = {name: value for name, value in fields.items() if value is not None}
        return cls._unchecked({k: v for k, v in fields.items() if k in DEFAULTS or not k.startswith("_")})

    @classmethod
    def from_model_config(cls, config: Any) -> Self:
        """Token ids and, where an old config.json carries them, generation fields of a model configuration."""
        fields = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if getattr(config, "use_cache", True) is False:
            fields["use_cache"] = False
        model_fields = {*fields, "use_cache", "output_attentions", "output_hidden_states"}
        old = {k: v for k, v in vars(config).items() if k in DEFAULTS and k not in model_fields and v != DEFAULTS[k]}
        return cls._unchecked({**fields, **old})

    def update(self, defaults_only: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Sets the fields among `kwargs` (with defaults_only: those not set yet) and returns the rest.

        Warns of those that have no effect beside the others.
        """
        unused = {}
        for name, value in kwargs.items():
            if name not in DEFAULTS and name not in vars(self):
                unused[name] = value
            elif not defaults_only or not self.is_set(name):
                setattr(self, name, copy.deepcopy(value))
        self.warn_of_unused(kwargs, stacklevel=3, settled=False)
        return unused

    def over(self, base: "GenerationConfig") -> Self:
        """A copy of these settings where `base` fills what was not set."""
        merged = type(self)._unchecked({})
        vars(merged).update(copy.deepcopy({k: v for k, v in vars(base).items() if base.is_set(k)}))
        vars(merged).update(copy.deepcopy({k: v for k, v in vars(self).items() if self.is_set(k)}))
        return merged

    # -- refusal -------------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """Why generate() would refuse these settings: value, bound and remedy, one sentence each."""
        return self._refused() or self._conflicts()

    def _refused(self) -> list[str]:
        """Values that cannot work whatever the others are."""
        problems = [
            f"{name} is {self.value(name)!r}; it must be {bound}"
            for name, (good, bound) in _BOUNDS.items()
            if not good(self.value(name))
        ]
        for name, remedy in _NOT_IMPLEMENTED.items():
            if self.value(name) != DEFAULTS[name]:
                problems.append(f"{name} is {self.value(name)!r}, which this library does not implement; {remedy}")
        return problems

    def _is(self, name: str, value: Any, settled: bool) -> bool:
        """Whether the field has this value; before the settings are settled, whether it was given."""
        return bool(self.value(name) == value and (settled or self.is_set(name)))

    def _conflicts(self, settled: bool = True) -> list[str]:
        beams, returned = self.value("num_beams"), self.value("num_return_sequences")
        if returned > 1 and self._is("num_beams", 1, settled) and self._is("do_sample", False, settled):
            return [
                f"num_return_sequences is {returned} but greedy search has one answer; set do_sample=True or "
                f"num_beams={returned}"
            ]
        if beams > 1 and returned > beams:
            return [f"num_return_sequences is {returned} but num_beams is {beams}; it must be at most num_beams"]
        return []

    def validate(self) -> None:
        """Raises InputError for the first value that cannot work."""
        for problem in self.problems():
            raise InputError(problem)

    def unused(self, fields: Mapping[str, Any], settled: bool = True) -> list[str]:
        """Names in `given` that have no effect with these settings, to be warned about.

        settled: whether fields that were not given have their defaults, as in generate(), or may still come.
        """
        idle: list[str] = []
        if self._is("do_sample", False, settled):
            idle += [n for n in _SAMPLING_ONLY if fields.get(n, DEFAULTS[n]) not in (None, DEFAULTS[n])]
        if self._is("num_beams", 1, settled):
            idle += [n for n in _BEAMS_ONLY if fields.get(n, DEFAULTS[n]) not in (None, DEFAULTS[n])]
        if self._is("return_dict_in_generate", False, settled):
            idle += [n for n in _RECORDS if fields.get(n)]
        return idle

    def warn_of_unused(self, fields: Mapping[str, Any], stacklevel: int, settled: bool = True) -> None:
        """Warns of the names in `given` that have no effect with these settings."""
        if idle := self.unused(fields, settled):
            warnings.warn(
                f"{', '.join(idle)} has no effect: sampling filters need do_sample=True, early_stopping and "
                "length_penalty num_beams above 1, and what is kept of each step return_dict_in_generate=True",
                stacklevel=stacklevel + 1,
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"GenerationConfig {self.to_json_string()}"


_settings_file = door("checkpoint.source", "settings_file", "A file of settings of a path or hub id.")


def as_list(ids: Any) -> list[int]:
    """None, an id, or several ids (tensors too) as a list of int."""
    if ids is None:
        return []
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    return [int(i) for i in ids] if isinstance(ids, list | tuple) else [int(ids)]


def _integer(low: int, optional: bool = False) -> Any:
    return lambda v: (v is None and optional) or (isinstance(v, int) and not isinstance(v, bool) and v >= low)


def _number(good: Any) -> Any:
    def check(value: Any) -> bool:
        numeric = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return value is None or bool(numeric and good(value))

    return check


def _ids(value: Any) -> bool:
    return all(i >= 0 for i in as_list(value))


_POSITIVE = _number(lambda v: v > 0)
_SHARE = _number(lambda v: 0 <= v < 1)
_BOUNDS: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (_integer(1, True), "an integer of at least 1"),
    "max_length": (_integer(1), "an integer of at least 1"),
    "min_length": (_integer(0), "an integer of at least 0"),
    "min_new_tokens": (_integer(0, True), "an integer of at least 0"),
    "max_time": (_POSITIVE, "a positive number of seconds"),
    "num_beams": (_integer(1), "an integer of at least 1"),
    "num_return_sequences": (_integer(1), "an integer of at least 1"),
    "early_stopping": (lambda v: v in (True, False, "never"), "True, False or 'never'"),
    "temperature": (_POSITIVE, "a positive number; for the most likely token every time set do_sample=False"),
    "top_k": (_integer(0, True), "an integer of at least 1, or 0 for no limit"),
    "top_p": (_number(lambda v: 0 <= v <= 1), "in [0, 1]; 1.0 switches it off"),
    "top_h": (_number(lambda v: 0 < v <= 1), "in (0, 1]; None switches it off"),
    "min_p": (_number(lambda v: 0 <= v <= 1), "in [0, 1]; None switches it off"),
    "typical_p": (_number(lambda v: 0 < v <= 1), "in (0, 1]; 1.0 switches it off"),
    "epsilon_cutoff": (_SHARE, "in [0, 1); 0.0 switches it off"),
    "eta_cutoff": (_SHARE, "in [0, 1); 0.0 switches it off"),
    "repetition_penalty": (_POSITIVE, "a positive number; 1.0 switches it off"),
    "encoder_repetition_penalty": (_POSITIVE, "a positive number; 1.0 switches it off"),
    "length_penalty": (_number(lambda v: True), "a finite number"),
    "guidance_scale": (_number(lambda v: True), "a finite number; 1.0 switches it off"),
    "no_repeat_ngram_size": (_integer(0, True), "an integer of at least 1, or 0 for no limit"),
    "encoder_no_repeat_ngram_size": (_integer(0, True), "an integer of at least 1, or 0 for no limit"),
    "prefill_chunk_size": (_integer(1, True), "an integer of at least 1"),
    "cache_implementation": (lambda v: v in CACHES or v in CACHE_ALIASES, "None, 'dynamic', 'static' or 'quantized'"),
    "num_assistant_tokens": (_integer(1), "an integer of at least 1"),
    "num_assistant_tokens_schedule": (lambda v: v in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    "assistant_confidence_threshold": (_number(lambda v: 0 <= v <= 1), "in [0, 1]; 0 switches it off"),
    "prompt_lookup_num_tokens": (_integer(1, True), "an integer of at least 1"),
    "max_matching_ngram_size": (_integer(1, True), "an integer of at least 1"),
    "pad_token_id": (lambda v: v is None or v == -1 or _ids(v), "a token id of at least 0"),
}
