"""Learning rates over a run: pure functions of the step, and the same as torch's schedulers under transformers' names.

A schedule gives the share of the peak rate at step 0, 1, ... of `total`; all but "constant" rise linearly over `warmup`
steps first. Settings are those of lr_scheduler_kwargs.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from llama2.errors import InputError

PLATEAU = "reduce_lr_on_plateau"  # follows a measured value, not the step
_RISES = ("linear", "cosine", "1-sqrt")


def _rise(step: int, warmup: int) -> float:
    return step / max(1, warmup)


def _done(step: int, total: int, warmup: int) -> float:
    """The share of the steps after the warm-up that are over."""
    return (step - warmup) / max(1, total - warmup)


def _constant(step: int, total: int, warmup: int, peak: float) -> float:
    return 1.0


def _constant_with_warmup(step: int, total: int, warmup: int, peak: float) -> float:
    return _rise(step, warmup) if step < warmup else 1.0


def _linear(step: int, total: int, warmup: int, peak: float) -> float:
    return _rise(step, warmup) if step < warmup else max(0.0, 1 - _done(step, total, warmup))


def _wave(done: float, cycles: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * done))


def _cosine(step: int, total: int, warmup: int, peak: float, *, num_cycles: float = 0.5) -> float:
    return _rise(step, warmup) if step < warmup else max(0.0, _wave(_done(step, total, warmup), num_cycles))


def _cosine_with_restarts(step: int, total: int, warmup: int, peak: float, *, num_cycles: int = 1) -> float:
    if step < warmup:
        return _rise(step, warmup)
    done = _done(step, total, warmup)
    return 0.0 if done >= 1 else max(0.0, _wave(num_cycles * done % 1.0, 0.5))


def _floor(peak: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        raise InputError(
            f"min_lr is {min_lr!r} and min_lr_rate {min_lr_rate!r}; give one of them, a rate or a share of the peak, "
            "in lr_scheduler_kwargs"
        )
    return min_lr / peak if min_lr is not None else float(min_lr_rate or 0.0)


def _cosine_with_min_lr(
    step: int,
    total: int,
    warmup: int,
    peak: float,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> float:
    floor = _floor(peak, min_lr, min_lr_rate)
    if step < warmup:
        return _rise(step, warmup)
    return max(0.0, _wave(_done(step, total, warmup), num_cycles) * (1 - floor) + floor)


def _cosine_warmup_with_min_lr(
    step: int,
    total: int,
    warmup: int,
    peak: float,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> float:
    """As _cosine_with_min_lr, one step ahead: the first step has a rate, the last one the floor."""
    floor = _floor(peak, min_lr, min_lr_rate)
    if step < warmup:
        if warmup_lr_rate is None:
            return (step + 1.0) / max(1.0, warmup)
        return warmup_lr_rate + (1.0 - warmup_lr_rate) * step / max(1, warmup - 1)
    return max(0.0, _wave((step - warmup + 1.0) / max(1.0, total - warmup), num_cycles) * (1 - floor) + floor)


def _polynomial(step: int, total: int, warmup: int, peak: float, *, lr_end: float = 1e-7, power: float = 1.0) -> float:
    if not peak > lr_end:
        raise InputError(f"lr_end is {lr_end!r}; it must lie below the learning rate, {peak!r}")
    if step < warmup:
        return _rise(step, warmup)
    if step > total:
        return lr_end / peak
    return ((peak - lr_end) * (1 - _done(step, total, warmup)) ** power + lr_end) / peak


def _inverse_sqrt(step: int, total: int, warmup: int, peak: float, *, timescale: int | None = None) -> float:
    if step < warmup:
        return _rise(step, warmup)
    scale = timescale or warmup or 10_000
    return 1.0 / math.sqrt((step + scale - warmup) / scale)


def _shape(kind: str, done: float, cycles: float) -> float:
    """How far a decay has come down from 1."""
    if kind == "linear":
        return 1.0 - done
    return _wave(done, cycles) if kind == "cosine" else 1.0 - math.sqrt(done)


def _warmup_stable_decay(
    step: int,
    total: int,
    warmup: int,
    peak: float,
    *,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    for name, kind in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if kind not in _RISES:
            raise InputError(f"{name} is {kind!r}; it must be one of {', '.join(_RISES)}")
    stable = total - warmup - num_decay_steps if num_stable_steps is None else num_stable_steps
    if step < warmup:
        rise = _shape(warmup_type, 1 - _rise(step, warmup), 0.5)  # a decay seen from its end
        return max(0.0, rise * (1.0 - min_lr_ratio) + min_lr_ratio)
    if step < warmup + stable:
        return 1.0
    if step < warmup + stable + num_decay_steps:
        shape = _shape(decay_type, (step - warmup - stable) / max(1, num_decay_steps), num_cycles)
        return max(0.0, shape * (1.0 - min_lr_ratio) + min_lr_ratio)
    return min_lr_ratio


SHAPES: dict[str, Callable[..., float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "cosine_warmup_with_min_lr": _cosine_warmup_with_min_lr,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
}


def check(schedule: str, settings: Mapping[str, Any], peak: float) -> None:
    """Raises InputError for settings (lr_scheduler_kwargs) that the schedule does not have or cannot work with."""
    if schedule == PLATEAU:
        known = set(inspect.signature(ReduceLROnPlateau.__init__).parameters) - {"self", "optimizer"}
        needed: set[str] = set()
    else:
        given = [p for p in inspect.signature(SHAPES[schedule]).parameters.values() if p.kind is p.KEYWORD_ONLY]
        known, needed = {p.name for p in given}, {p.name for p in given if p.default is p.empty}
    for name in settings:
        if name not in known:
            raise InputError(
                f"lr_scheduler_kwargs has {name!r}, which {schedule!r} does not take; it takes "
                f"{', '.join(sorted(known)) or 'none'}"
            )
    if lost := sorted(needed - set(settings)):
        raise InputError(f"{schedule!r} needs {lost[0]}; give it in lr_scheduler_kwargs={{{lost[0]!r}: ...}}")
    if schedule != PLATEAU:
        SHAPES[schedule](1, 2, 1, peak, **settings)


def learning_rate(
    step: int, total: int, peak: float, schedule: str, warmup: int, settings: Mapping[str, Any] | None = None
) -> float:
    """The rate of step 0, 1, ... of `total`. "constant" has no warm-up, as in transformers."""
    return peak * SHAPES[schedule](step, total, warmup, peak, **(settings or {}))


# -- for torch's optimisers ---------------------------------------------------------------------------------------


def _schedule(
    name: str, optimizer: Optimizer, warmup: int, total: int, last_epoch: int = -1, **settings: object
) -> LambdaLR:
    peak = optimizer.defaults["lr"]
    settings = {key: value for key, value in settings.items() if value is not None}
    check(name, settings, peak)
    shape = partial(SHAPES[name], total=total, warmup=warmup, peak=peak, **settings)
    return LambdaLR(optimizer, shape, last_epoch)


def get_scheduler(
    name: str,
    optimizer: Optimizer,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    scheduler_specific_kwargs: Mapping[str, Any] | None = None,
) -> LambdaLR | ReduceLROnPlateau:
    """A scheduler of the optimiser by its name, as lr_scheduler_type has them.

    Raises InputError for an unknown name, or where the schedule needs a number of steps that is not given.
    """
    name = str(getattr(name, "value", name))
    settings = dict(scheduler_specific_kwargs or {})
    if name == PLATEAU:
        check(name, settings, 0.0)
        return ReduceLROnPlateau(optimizer, **settings)
    if name not in SHAPES:
        raise InputError(f"the schedule is {name!r}; it must be one of {', '.join((*SHAPES, PLATEAU))}")
    if num_warmup_steps is None and name != "constant":
        raise InputError(f"{name!r} needs num_warmup_steps; give it (0 for none)")
    free = name in ("constant", "constant_with_warmup", "inverse_sqrt") or "num_stable_steps" in settings
    if num_training_steps is None and not free:
        raise InputError(f"{name!r} needs num_training_steps; give it")
    return _schedule(name, optimizer, num_warmup_steps or 0, num_training_steps or 0, **settings)


def get_constant_schedule(optimizer: Optimizer, last_epoch: int = -1) -> LambdaLR:
    """The optimiser's rate, always."""
    return _schedule("constant", optimizer, 0, 0, last_epoch)


def get_constant_schedule_with_warmup(optimizer: Optimizer, num_warmup_steps: int, last_epoch: int = -1) -> LambdaLR:
    """Up linearly from 0, then constant."""
    return _schedule("constant_with_warmup", optimizer, num_warmup_steps, 0, last_epoch)


def get_linear_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """Up linearly from 0, then down linearly to 0 at num_training_steps."""
    return _schedule("linear", optimizer, num_warmup_steps, num_training_steps, last_epoch)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 0.5, last_epoch: int = -1
) -> LambdaLR:
    """Up linearly from 0, then along num_cycles waves of a cosine; half a wave ends at 0."""
    return _schedule("cosine", optimizer, num_warmup_steps, num_training_steps, last_epoch, num_cycles=num_cycles)


def get_cosine_with_hard_restarts_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: int = 1, last_epoch: int = -1
) -> LambdaLR:
    """Up linearly from 0, then num_cycles times down along half a wave."""
    name = "cosine_with_restarts"
    return _schedule(name, optimizer, num_warmup_steps, num_training_steps, last_epoch, num_cycles=num_cycles)


def get_polynomial_decay_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    lr_end: float = 1e-7,
    power: float = 1.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """Up linearly from 0, then down to lr_end as a power of the share that is left."""
    settings = {"lr_end": lr_end, "power": power}
    return _schedule("polynomial", optimizer, num_warmup_steps, num_training_steps, last_epoch, **settings)


def get_inverse_sqrt_schedule(
    optimizer: Optimizer, num_warmup_steps: int, timescale: int | None = None, last_epoch: int = -1
) -> LambdaLR:
    """Up linearly from 0, then down as 1 / sqrt of the step; timescale is num_warmup_steps where it is not given."""
    return _schedule("inverse_sqrt", optimizer, num_warmup_steps, 0, last_epoch, timescale=timescale)


def get_cosine_with_min_lr_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> LambdaLR:
    """As get_cosine_schedule_with_warmup, down to min_lr, or to the share min_lr_rate of the optimiser's rate."""
    settings = {"num_cycles": num_cycles, "min_lr": min_lr, "min_lr_rate": min_lr_rate}
    return _schedule("cosine_with_min_lr", optimizer, num_warmup_steps, num_training_steps, last_epoch, **settings)


def get_wsd_schedule(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_decay_steps: int,
    num_training_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> LambdaLR:
    """Up from min_lr_ratio, constant for num_stable_steps (or what is left), and down to min_lr_ratio again."""
    if num_training_steps is None and num_stable_steps is None:
        raise InputError("num_training_steps and num_stable_steps are both None; give one of them")
    settings = {"num_decay_steps": num_decay_steps, "num_stable_steps": num_stable_steps, "warmup_type": warmup_type,
                "decay_type": decay_type, "min_lr_ratio": min_lr_ratio, "num_cycles": num_cycles}  # fmt: skip
    total = num_training_steps or 0
    return _schedule("warmup_stable_decay", optimizer, num_warmup_steps, total, last_epoch, **settings)


def get_reduce_on_plateau_schedule(optimizer: Optimizer, **kwargs: Any) -> ReduceLROnPlateau:
    """The optimiser's rate, lowered where a measured value has stopped to improve: torch's ReduceLROnPlateau."""
    check(PLATEAU, kwargs, 0.0)
    return ReduceLROnPlateau(optimizer, **kwargs)
