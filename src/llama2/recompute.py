"""Layers that are computed again in the backward pass run under the hooks that they ran under at first.

torch.utils.checkpoint calls a layer's function a second time, when a hook that was registered for the time of the
forward pass only (an activated LoRA adapter, steering) is gone: the gradients would be those of another function.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_Held = list[tuple[nn.Module, dict[str, Any]]]


def under_the_same_hooks(call: Callable[..., Any], layer: nn.Module) -> Callable[..., Any]:
    """`call`, whose later runs see the forward hooks of all modules of `layer` as its first run saw them."""
    first: _Held | None = None

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal first
        if first is None:
            first = _hooks(layer)
            return call(*args, **kwargs)
        with _set(first):
            return call(*args, **kwargs)

    return run


def _hooks(layer: nn.Module) -> _Held:
    return [(module, {name: module.__dict__[name].copy() for name in _HOOKS}) for module in layer.modules()]


@contextmanager
def _set(held: _Held) -> Iterator[None]:
    now = [(module, {name: module.__dict__[name] for name in _HOOKS}) for module, _ in held]
    for module, hooks in held:
        module.__dict__.update(hooks)
    try:
        yield
    finally:
        for module, hooks in now:
            module.__dict__.update(hooks)
