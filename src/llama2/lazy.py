"""The few calls that go up the map.

Imports in this package point downward only, yet `transformers` users expect `LlamaForCausalLM.from_pretrained` and
`model.generate` as methods. Such a method is a door: it names a function in a higher row, imports it at its first
call, and holds no logic. A door also keeps a heavy module out of a start that does not need it.
`tests/test_architecture.py` lists every upward door; there is no other own import inside a function.
"""

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any, TypeVar

from llama2.errors import needs_torch

Function = TypeVar("Function", bound=Callable[..., Any])


@cache
def resolve(module: str, name: str) -> Callable[..., Any]:
    """`llama2.<module>.<name>`, imported at the first call: what a table names without importing it."""
    try:
        function: Callable[..., Any] = getattr(import_module(f"llama2.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise needs_torch("this") from error
    return function


def door(module: str, name: str, doc: str) -> Callable[..., Any]:
    """A function that forwards every argument to `llama2.<module>.<name>`, imported at the first call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return resolve(module, name)(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = doc
    return call


def declares(module: str, name: str) -> Callable[[Function], Function]:
    """A door whose signature and docstring a declaration gives: a function of which nothing else is used."""

    def decorate(declaration: Function) -> Function:
        @wraps(declaration)
        def call(*args: Any, **kwargs: Any) -> Any:
            return resolve(module, name)(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
