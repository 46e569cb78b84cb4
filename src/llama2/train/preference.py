"""The losses of preference pairs by name, and the bounds of their settings. No torch here."""

from typing import Literal, get_args

from llama2.errors import InputError

Preference = Literal["sigmoid", "ipo", "hinge", "robust"]
_SMOOTHED = ("sigmoid", "robust")  # the losses that have label smoothing


def check_preference(loss_type: str, beta: float, label_smoothing: float) -> None:
    """Raises InputError for an unknown loss, a setting outside its bounds, or smoothing of a loss that has none."""
    if loss_type not in get_args(Preference):
        raise InputError(f"loss_type is {loss_type!r}; it must be one of {', '.join(get_args(Preference))}")
    if not beta > 0:
        raise InputError(f"beta is {beta!r}; it must be above 0 (0.1 is usual)")
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"label_smoothing is {label_smoothing!r}; it must lie in [0, 0.5)")
    if label_smoothing and loss_type not in _SMOOTHED:
        raise InputError(
            f"label_smoothing is {label_smoothing!r}, which {loss_type} does not have; use {' or '.join(_SMOOTHED)}, "
            "or leave it at 0"
        )
