"""Numbers of numpy and torch as Python's own, which JSON and isinstance know. Standard library only."""

from typing import Any


def plain(value: Any) -> Any:
    """A scalar of numpy or torch, 0-dimensional arrays too, as a Python number; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
