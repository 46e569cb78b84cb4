"""Known differences, bridged so that one does not hide the next. PEER_STRICT=1 leaves all of them in.

`bridge(label)` notes that the running test met a difference: such a test counts as bridged, not as plain. `Assumed`
attributes are private ones that upstream's tests read off the class; reading them is noted, and does not count. What
`always` replaces does not count either: the words of messages and the names of private classes are no behaviour.
"""

import copy
import functools
import inspect
import os
import unittest
from collections.abc import Callable
from typing import Any

from peer_count import RAN
from peer_environment import V5, llama2, transformers
from peer_replace import OURS

ASSUMED = {
    "_supports_sdpa": True,
    "_supports_flash_attn_2": False,
    "_supports_flash_attn": False,
    "_supports_cache_class": True,
    "_supports_static_cache": True,
    "_supports_quantized_cache": False,
    "_is_stateful": False,
    "_keep_in_fp32_modules": None,
    "_keep_in_fp32_modules_strict": None,
    "_keys_to_ignore_on_load_missing": None,
    "_keys_to_ignore_on_load_unexpected": None,
    "_keys_to_ignore_on_save": None,
    "_tied_weights_keys": None,
    "_no_split_modules": ["LlamaDecoderLayer"],
    "_supports_flex_attn": False,
    "_supports_attention_backend": False,
    "_can_compile_fullgraph": True,
    "_is_composite": False,
    "input_modalities": ("text",),
    "_dynamic_tied_weights_keys": None,
    "_input_embed_layer": "embed_tokens",
    "_can_record_outputs": None,
    "supports_gradient_checkpointing": True,
}
ASSUMED_OF_CONFIG = {
    "pruned_heads": {},
    "is_composition": False,
    "attribute_map": {},
    "sub_configs": {},
    "has_no_defaults_at_init": False,
    "_auto_class": None,
    "base_config_key": "",
}
# Arguments of forward and of other machinery, given to generate().
IGNORED_BY_GENERATE = [
    "num_logits_to_keep",
    "logits_to_keep",
    "low_memory",
    "return_legacy_cache",
    "output_router_logits",
    "trust_remote_code",
    "custom_generate",
    "head_mask",
    "compile_config",
    "disable_compile",
]


def bridge(label: str) -> None:
    """The running test met this difference."""
    RAN[f"bridged:{label}"] += 1


def assume(label: str) -> None:
    """The running test asked for something that is no behaviour."""
    RAN[f"assumed:{label}"] += 1


class Assumed:
    """An attribute that upstream's tests read off the class; its reading is noted."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def __get__(self, obj: Any, owner: Any = None) -> Any:
        RAN[f"assumed:{self.name}"] += 1
        return self.value.__get__(obj, owner) if callable(self.value) and obj is not None else self.value


class Bridged(Assumed):
    """One whose reading counts as a difference."""

    def __get__(self, obj: Any, owner: Any = None) -> Any:
        bridge(self.name)
        return self.value

    def __set__(self, obj: Any, value: Any) -> None:
        if self.name.endswith("deprecation_warnings"):  # "warn me again"
            obj._warned.clear()


class FastByOverflow(type):
    """4.46 asks by the class what overflow looks like: from both of ours it is further rows, as from its fast one."""

    def __instancecheck__(cls, tokenizer: object) -> bool:
        bridge("overflow of the slow class as further rows")
        return True


def _where_absent(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        setattr(owner, name, value)


def _without(function: Callable[..., Any], names: tuple[str, ...] | list[str], label: str) -> Callable[..., Any]:
    """`function`, not given the keywords `names`, each of which is a difference where it is given and refused."""
    taken = inspect.signature(function).parameters
    refused = [name for name in names if name not in taken]

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        for name in refused:
            if name in kwargs:
                bridge(label.format(name))
                del kwargs[name]
        return function(*args, **kwargs)

    return wrapped


def _attributes() -> None:
    base, config, causal = llama2.PreTrainedModel, llama2.LlamaConfig, llama2.LlamaForCausalLM

    def from_config(cls: Any, config: Any, attn_implementation: str | None = None, dtype: Any = None, **_: Any) -> Any:
        RAN["assumed:_from_config"] += 1
        config = copy.deepcopy(config)
        config._attn_implementation = attn_implementation or config._attn_implementation
        return cls.from_config(config, dtype)

    def can_set_attention(_: Any) -> bool:
        RAN["assumed:_can_set_attn_implementation"] += 1
        return True

    def can_generate(cls: Any) -> bool:
        bridge("model.can_generate")
        return issubclass(cls, causal)

    def prepare(_: Any, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        bridge("model.prepare_inputs_for_generation")
        return {"input_ids": input_ids, **kwargs}

    def text_config(self: Any, *_: Any, **__: Any) -> Any:
        bridge("config.get_text_config")
        return self

    _where_absent(base, "_can_set_attn_implementation", classmethod(can_set_attention))
    _where_absent(base, "_from_config", classmethod(from_config))
    _where_absent(base, "can_generate", classmethod(can_generate))
    _where_absent(causal, "prepare_inputs_for_generation", prepare)
    _where_absent(causal, "_tied_weights_keys", Assumed("_tied_weights_keys", ["lm_head.weight"]))
    _where_absent(config, "get_text_config", text_config)
    for name, value in ASSUMED.items():
        _where_absent(base, name, Assumed(name, value))
    for name, value in ASSUMED_OF_CONFIG.items():
        _where_absent(config, name, Assumed(f"config.{name}", value))


def _chat_template() -> None:
    """5.x returns a BatchEncoding by default; this library returns ids, as 4.46."""
    owner = next(cls for cls in llama2.LlamaTokenizer.__mro__ if "apply_chat_template" in vars(cls))
    real = owner.apply_chat_template

    @functools.wraps(real)
    def apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "return_dict" not in kwargs and kwargs.get("tokenize", True):
            bridge("apply_chat_template(return_dict=True) by default")
            kwargs["return_dict"] = True
        return real(self, *args, **kwargs)

    if V5:
        owner.apply_chat_template = apply


def _keywords() -> None:
    """Keywords that transformers takes and does nothing with."""
    for name, cls in OURS.items():
        called = name.endswith(("Processor", "Warper", "Penalty", "Criteria")) and "__init__" in vars(cls)
        if called and "device" not in inspect.signature(cls.__init__).parameters:
            cls.__init__ = _without(vars(cls)["__init__"], ("device",), f"{name}({{}}=)")
    generation = llama2.GenerationConfig
    for name in ("save_pretrained", "from_pretrained"):
        found = inspect.getattr_static(generation, name)
        plain = found.__func__ if isinstance(found, classmethod) else found
        if "config_name" not in inspect.signature(plain).parameters:
            changed = _without(plain, ("config_name",), f"GenerationConfig.{name}({{}}=)")
            setattr(generation, name, classmethod(changed) if isinstance(found, classmethod) else changed)


def _generate() -> None:
    """What generate() refuses and transformers takes."""
    real = llama2.generation.request.settings
    base = llama2.PreTrainedModel

    def settings(model: Any, given: Any, kwargs: dict[str, Any]) -> Any:
        before = dict(kwargs)  # what is used is taken out
        try:
            return real(model, given, kwargs)
        except (TypeError, llama2.Llama2Error):
            kwargs.update(before)
        for source in (kwargs, vars(given) if given is not None else {}, vars(model.generation_config)):
            if source.get("eos_token_id") == -1:
                bridge("eos_token_id=-1")
                source["eos_token_id"] = None
            if source.get("cache_implementation") == "dynamic_full":
                bridge("cache_implementation='dynamic_full'")
                source["cache_implementation"] = None
        for name in IGNORED_BY_GENERATE:
            if name in kwargs:
                bridge(f"generate({name}=)")
                del kwargs[name]
        return real(model, given, kwargs)

    llama2.generation.request.settings = llama2.generation.loop.settings = settings
    make = base.__init__

    @functools.wraps(make)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        for name, value, instead in (("rms_norm_eps", 1.0, 0.99), ("pad_token_id", -1, None)):
            if getattr(config, name, None) == value and not _accepted(config):
                bridge(f"config.{name} = {value}")
                setattr(config, name, instead)
        make(self, config, *args, **kwargs)

    base.__init__ = init


def _names_of_classes() -> None:
    """Upstream knows a model with SDPA by the names of its modules' classes."""
    base = llama2.PreTrainedModel
    make = base.__init__

    @functools.wraps(make)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        make(self, config, *args, **kwargs)
        if "eager_matches_sdpa" in os.environ.get("PYTEST_CURRENT_TEST", "") and self.attn_implementation == "sdpa":
            assume("names of attention classes")
            self.__class__ = type("WithSdpaAttention", (type(self),), {"__module__": type(self).__module__})

    base.__init__ = init


def _accepted(config: Any) -> bool:
    try:
        config.validate()
    except llama2.Llama2Error:
        return False
    return True


class _AnyWords(str):
    """The text of a log in which any words are found."""

    def __contains__(self, other: object) -> bool:
        if not super().__contains__(other):
            assume("wording of a log message")
        return True

    def startswith(self, *args: Any) -> bool:
        return True


def _wording() -> None:
    """What transformers logs, llama2 says with warnings and in its own words."""
    capture = transformers.testing_utils.CaptureLogger
    leave_capture = capture.__exit__

    def leave(self: Any, *exc: Any) -> None:
        leave_capture(self, *exc)
        self.out = _AnyWords(self.out)

    capture.__exit__ = leave
    real_logs, real_regex = unittest.TestCase.assertLogs, unittest.TestCase.assertRaisesRegex

    def logs(self: Any, logger: Any = None, level: Any = None) -> Any:
        if not (isinstance(logger, str) and logger.startswith("transformers")):
            return real_logs(self, logger, level)
        assume("name and wording of a log message")
        context: Any = real_logs(self, "llama2", level)
        leave_logs = type(context).__exit__

        class Context(type(context)):  # type: ignore[misc]
            def __exit__(me, *exc: Any) -> Any:
                done = leave_logs(me, *exc)
                for record in getattr(me.watcher, "records", []):
                    record.message = _AnyWords(record.getMessage())
                return done

        context.__class__ = Context
        return context

    class Wording:
        """Any error of the kind; a difference only where its words are not upstream's."""

        def __init__(self, case: Any, expected: Any, pattern: Any) -> None:
            self.case, self.expected, self.pattern = case, expected, pattern

        def __enter__(self) -> Any:
            self.inner = self.case.assertRaises(self.expected)
            return self.inner.__enter__()

        def __exit__(self, *exc: Any) -> Any:
            done = self.inner.__exit__(*exc)
            if done:
                try:
                    with real_regex(self.case, self.expected, self.pattern):
                        raise exc[1]
                except AssertionError:
                    assume("wording of an error")
            return done

    def regex(self: Any, expected: Any, pattern: Any, *args: Any, **kwargs: Any) -> Any:
        context = Wording(self, expected, pattern)
        if not args:
            return context
        with context:
            args[0](*args[1:], **kwargs)
        return None

    unittest.TestCase.assertLogs, unittest.TestCase.assertRaisesRegex = logs, regex  # type: ignore[method-assign]


def _right_padding() -> None:
    """A prompt padded on the right, where generate() refuses it: transformers warns."""
    real = llama2.generation.request._mask

    def mask_of(call: Any, *args: Any) -> Any:
        try:
            return real(call, *args)
        except llama2.Llama2Error:
            mask = call.attention_mask
            if mask is None or mask.dim() != 2 or bool((mask[:, -1] != 0).all()):
                raise
            bridge("generate() with padding on the right")
            call.attention_mask = mask.flip(1)
            return real(call, *args)

    llama2.generation.request._mask = mask_of


def always() -> None:
    """What is no behaviour; after the counters, before any test module is imported."""
    _wording()
    _names_of_classes()


def install() -> None:
    """All differences; after the counters, before any test module is imported."""
    _attributes()
    _chat_template()
    _keywords()
    _generate()
    if hasattr(llama2.generation.request, "_mask"):
        _right_padding()
