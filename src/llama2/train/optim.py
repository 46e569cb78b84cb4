"""The optimiser and its schedules. AdamW (Loshchilov & Hutter, arXiv 1711.05101) with float32 state for any weights."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llama2.errors import InputError


def learning_rate(step: int, total: int, peak: float, schedule: str, warmup: int, floor: float = 0.0) -> float:
    """The rate of step 0, 1, ... of `total`: up linearly over `warmup` steps, then as the schedule says.

    floor: what cosine and linear end at, as a share of the peak. "constant" has no warm-up, as in transformers.
    """
    if schedule == "constant":
        return peak
    if step < warmup:
        return peak * step / max(1, warmup)
    if schedule == "constant_with_warmup":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    shape = max(0.0, 1 - done) if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return peak * (floor + (1 - floor) * shape)


class AdamW:
    """AdamW whose moments, and for 16-bit weights a master copy, are float32: no update is lost to rounding.

    torch's fused kernel does the work. State is plain tensors by parameter name, to be saved and loaded exactly.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        masters: bool = False,
    ) -> None:
        """named: the trainable parameters; matrices decay, vectors do not. masters: keep float32 copies of wider
        weights too, which may be cast down afterwards."""
        self.parameters = dict(named)
        if not self.parameters:
            raise InputError("no parameter of the model is trainable; add an adapter or set requires_grad")
        self._masters = {
            name: nn.Parameter(p.detach().float().clone()) if masters or p.itemsize < 4 else p
            for name, p in self.parameters.items()
        }
        decay = [m for m in self._masters.values() if m.dim() > 1]
        rest = [m for m in self._masters.values() if m.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        fused = all(m.device.type in ("cpu", "cuda") for m in self._masters.values())
        self._inner = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=fused)

    @torch.no_grad()
    def step(self, rate: float, factor: float = 1.0) -> None:
        """One update at this learning rate from the parameters' gradients, which are then dropped.

        factor: what gradients are multiplied with, in the precision of the master copies.
        """
        for group in self._inner.param_groups:
            group["lr"] = rate
        for name, parameter in self.parameters.items():
            master = self._masters[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
                parameter.grad = None
            if factor != 1 and master.grad is not None:
                master.grad.mul_(factor)
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)
        for name, parameter in self.parameters.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        found: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            if master is not self.parameters[name]:
                found[f"master.{name}"] = master.detach()
            for key, value in self._inner.state.get(master, {}).items():
                found[f"{key}.{name}"] = value
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes up the state of an earlier run. Raises InputError where it is of another model."""
        used = set()
        for name, master in self._masters.items():
            mine: dict[str, Any] = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (value := state.get(f"{key}.{name}")) is not None:
                    if key != "step" and value.shape != master.shape:
                        sizes = f"{tuple(value.shape)}, not {tuple(master.shape)}"
                        raise InputError(f"the optimiser's {key} of {name} is {sizes}; it is another model's")
                    mine[key] = value.clone().to(master.device)
                    used.add(f"{key}.{name}")
            if mine:
                self._inner.state[master] = mine
            if (value := state.get(f"master.{name}")) is not None:
                with torch.no_grad():
                    master.copy_(value)
                used.add(f"master.{name}")
        if stray := sorted(set(state) - used):
            raise InputError(f"the optimiser's state has {stray[0]!r}, which this run does not train")


def clip(parameters: Iterable[nn.Parameter], most: float) -> float:
    """The norm of all gradients together, which are scaled down to `most` where it is larger (0: never)."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if most and float(norm) > most:
        for grad in grads:
            grad.mul_(most / (norm + 1e-6))
    return float(norm)
