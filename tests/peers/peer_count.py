"""Whose code ran: counters around our methods, and around transformers' that should have been replaced."""

import collections
import functools
import importlib
import inspect
from typing import Any

from peer_environment import llama2, transformers

RAN: collections.Counter[str] = collections.Counter()
CALLED = ("Processor", "Warper", "Penalty", "Normalization", "Criteria", "Streamer", "ProcessorList", "CriteriaList")


def count(owner: Any, attribute: str, label: str) -> None:
    """Counts the calls of owner.attribute under `label`."""
    found = inspect.getattr_static(owner, attribute)
    wrapped = isinstance(found, classmethod | staticmethod)
    function = found.__func__ if wrapped else found

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        RAN[label] += 1
        return function(*args, **kwargs)

    setattr(owner, attribute, type(found)(counted) if wrapped else counted)


def install(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """`ours`: the classes by the names that they took; `theirs`: the classes that stood there before."""
    count(llama2.LlamaConfig, "__init__", "ours:config")
    count(llama2.PreTrainedModel, "__init__", "ours:model")
    count(llama2.LlamaModel, "forward", "ours:forward")
    count(llama2.GenerationConfig, "__init__", "ours:generation_config")
    for cls in (llama2.LlamaTokenizer, llama2.LlamaTokenizerFast):
        count(cls, "__init__", "ours:tokenizer")
    for method in ("encode", "decode", "__call__", "tokenize", "convert_tokens_to_ids", "apply_chat_template"):
        owner = next((cls for cls in llama2.LlamaTokenizer.__mro__ if method in vars(cls)), None)
        if owner is not None:
            count(owner, method, "ours:tokenizer")
    for name, cls in ours.items():
        if name.endswith(CALLED):
            for method in ("__call__", "put"):
                if method in vars(cls):
                    count(cls, method, f"ours:{name}")
    for cls in (llama2.DynamicCache, llama2.StaticCache):
        count(cls, "__init__", "ours:cache")
    count(llama2.runners.native.NativeRunner, "step", "ours:native engine")
    # The counters are no changes of the network: with them taken for one, torch would run every model.
    llama2.plain_network._FUNCTIONS[:] = llama2.plain_network._as_imported()
    _count_theirs(theirs)


def _count_theirs(theirs: dict[str, Any]) -> None:
    importlib.import_module("transformers.modeling_utils")
    importlib.import_module("transformers.tokenization_utils_base")
    count(transformers.modeling_utils.PreTrainedModel, "__init__", "theirs:model")
    count(transformers.tokenization_utils_base.PreTrainedTokenizerBase, "__init__", "theirs:tokenizer")
    for name, cls in theirs.items():
        called = name.endswith(("Processor", "Warper", "Criteria")) and inspect.isclass(cls) and "__call__" in vars(cls)
        if called and not cls.__module__.startswith("llama2"):
            count(cls, "__call__", f"theirs:{name}")
