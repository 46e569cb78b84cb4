"""The optimiser. AdamW (Loshchilov & Hutter, arXiv 1711.05101) with float32 state for any weights."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llama2.checkpoint.quantized import packed_layers
from llama2.errors import InputError
from llama2.quantization.nf4 import dynamic_map
from llama2.train.distributed import local

_NORM = "norm.weight"
_WIDE_BYTES = 64 << 20  # of 16-bit gradients made float32 at once


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name. Raises InputError for a packed model of which nothing but norms is."""
    found = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if found and all(name.endswith(_NORM) for name in found) and packed_layers(network):
        raise InputError(
            "the weights of this model are packed and take no gradient, so that only its norms would be trained; add "
            "an adapter (peft_config=LoraConfig(...), model.add_adapter), or load it with dequantize=True"
        )
    return found


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
        kind: str = "adamw_torch",
        given: torch.optim.Optimizer | None = None,
    ) -> None:
        """named: the trainable parameters; matrices decay, vectors do not. masters: keep float32 copies of wider
        weights too, which may be cast down afterwards. kind: "adamw_8bit" keeps the moments in bytes, see `AdamW8`.
        given: an optimiser of some of the parameters, with rates of its own, that does the work instead; where there
        are float32 copies it updates these."""
        self.parameters = dict(named)
        if not self.parameters:
            raise InputError("no parameter of the model is trainable; add an adapter or set requires_grad")
        self.copied = {name for name, p in self.parameters.items() if masters or p.itemsize < 4}
        self._masters = {name: self._master(name, p) for name, p in self.parameters.items()}
        self.outside = given is not None
        if given is not None:
            self.inner: torch.optim.Optimizer = given
            self._take_over(given)
            return
        decay = [m for m in self._masters.values() if m.dim() > 1]
        rest = [m for m in self._masters.values() if m.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        fused = all(m.device.type in ("cpu", "cuda") for m in self._masters.values())
        settings: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": eps}
        groups = [g for g in groups if g["params"]]
        self.inner = (
            AdamW8(groups, **settings) if kind == "adamw_8bit" else torch.optim.AdamW(groups, **settings, fused=fused)
        )

    def _take_over(self, given: torch.optim.Optimizer) -> None:
        """Puts the copies in place of the parameters that an optimiser was made with."""
        masters = {id(p): self._masters[name] for name, p in self.parameters.items()}
        for group in given.param_groups:
            for place, parameter in enumerate(group["params"]):
                master = masters.get(id(parameter), parameter)
                group["params"][place] = master
                if master is not parameter and parameter in given.state:
                    given.state[master] = given.state.pop(parameter)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimiser that does the work, with their rates."""
        return self.inner.param_groups

    def _master(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """Returns the tensor that is updated: a float32 copy, the parameter, or this rank's part of a sharded one."""
        part = local(parameter.detach())
        if name in self.copied:
            return nn.Parameter(part.float().clone())
        return nn.Parameter(part) if isinstance(parameter, DTensor) else parameter

    @torch.no_grad()
    def step(self, rate: float, factor: float = 1.0) -> None:
        """One update at this learning rate from the parameters' gradients, which are then dropped.

        factor: what gradients are multiplied with, in the precision of the master copies.
        """
        for group in self.inner.param_groups if not self.outside else ():
            group["lr"] = rate
        widened = 0
        for name, parameter in self.parameters.items():
            master = self._masters[name]
            if master is not parameter and parameter.grad is not None:
                master.grad = local(parameter.grad).to(master.dtype)
                parameter.grad = None
                if factor != 1:
                    master.grad.mul_(factor)
                widened += master.nbytes if name in self.copied else 0
                if widened > _WIDE_BYTES and not self.outside:
                    self._update()
                    widened = 0
        self._update()
        for name in self.copied:
            local(self.parameters[name]).copy_(self._masters[name])

    def _update(self) -> None:
        """Updates what has a gradient, and drops that."""
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        for parameter in self.parameters.values() if self.outside else ():
            parameter.grad = None  # of those that the optimiser does not have too

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        found: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            if name in self.copied:
                found[f"master.{name}"] = master.detach()
            for key, value in self.inner.state.get(master, {}).items() if not self.outside else ():
                found[f"{key}.{name}"] = value
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes up the state of an earlier run. Raises InputError where it is of another model."""
        used = set()
        bytes_ = isinstance(self.inner, AdamW8)
        for name, master in self._masters.items():
            mine: dict[str, Any] = {}
            there = f"exp_avg_codes.{name}" in state
            if there != (bytes_ and in_bytes(master)) and f"step.{name}" in state:
                have, want = ("8-bit", "float32") if there else ("float32", "8-bit")
                raise InputError(f"the moments of {name} are {have}, this run's {want}; resume with the same optim")
            for key in ("step", *(_BYTES if there else ("exp_avg", "exp_avg_sq"))):
                if (value := state.get(f"{key}.{name}")) is not None:
                    shape = _BYTES[key](master) if there and key != "step" else tuple(master.shape)
                    if key != "step" and tuple(value.shape) != shape:
                        sizes = f"{tuple(value.shape)}, not {shape}"
                        raise InputError(f"the optimiser's {key} of {name} is {sizes}; it is another model's")
                    mine[key] = value.clone().to(master.device)
                    used.add(f"{key}.{name}")
            if mine:
                self.inner.state[master] = mine
            if (value := state.get(f"master.{name}")) is not None:
                with torch.no_grad():
                    master.copy_(value)
                used.add(f"master.{name}")
        if stray := sorted(set(state) - used):
            raise InputError(f"the optimiser's state has {stray[0]!r}, which this run does not train")


# -- moments in bytes --------------------------------------------------------------------------------------------

BLOCK = 256
_SMALLEST = 4096  # values of a tensor whose moments go into bytes, as in bitsandbytes
_PIECE = 1 << 18  # values at once, so that what is between bytes and weights stays small


def in_bytes(weight: Tensor) -> bool:
    """Whether the moments of a weight are kept in bytes: small tensors are not worth it."""
    return weight.numel() >= _SMALLEST


def _blocks(weight: Tensor) -> int:
    return -(-weight.numel() // BLOCK)


_BYTES: dict[str, Callable[[Tensor], tuple[int, ...]]] = {
    "exp_avg_codes": lambda weight: (weight.numel(),),
    "exp_avg_scales": lambda weight: (_blocks(weight),),
    "exp_avg_sq_codes": lambda weight: (weight.numel(),),
    "exp_avg_sq_scales": lambda weight: (_blocks(weight),),
}


@cache
def dynamic_code(signed: bool) -> Tensor:
    """The 256 values of bitsandbytes' dynamic tree (Dettmers et al., arXiv 2110.02861), ascending: in [-1, 1], or with
    one more bit of fraction in [0, 1]."""
    if signed:
        return torch.tensor(dynamic_map())
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2 ** (i + 1) + 1)
        values.append(10.0 ** (i - 6) * (ends[:-1] + ends[1:]) / 2)
    return torch.cat(values).sort().values


@cache
def _bounds(signed: bool) -> Tensor:
    code = dynamic_code(signed)
    return (code[1:] + code[:-1]) / 2


def to_codes(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 values (n,) -> the codes nearest to value / scale, uint8 (n,), and scales, each block's largest size."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = padded.abs().amax(1)
    shares = padded / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares, _bounds(signed).to(values.device), out_int32=True)
    return codes.view(-1)[: len(values)].to(torch.uint8), scales


def from_codes(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Codes (n,) and scales -> float32 values (n,)."""
    values = dynamic_code(signed).to(codes.device).index_select(0, codes.int())
    return values.mul_(scales.repeat_interleave(BLOCK)[: len(values)])


class AdamW8(torch.optim.Optimizer):
    """AdamW over moments in bytes by blocks of 256 values (Dettmers et al., arXiv 2110.02861): 2 bytes per weight, not
    8.

    A moment is unpacked, updated in float32 and packed again, a piece of the weight at a time.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """As torch.optim.AdamW.step, for parameters that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._weight(weight, group)

    def _weight(self, weight: Tensor, group: dict[str, Any]) -> None:
        state, packed = self.state[weight], in_bytes(weight)
        if not state:
            state["step"] = torch.zeros(())
            if packed:
                zeros = {signed: int(dynamic_code(signed).abs().argmin()) for signed in (True, False)}
                for key, shape in _BYTES.items():
                    filled = zeros["sq" not in key] if key.endswith("codes") else 0.0
                    dtype = torch.uint8 if key.endswith("codes") else torch.float32
                    state[key] = torch.full(shape(weight), filled, dtype=dtype, device=weight.device)
            else:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        flat, grad = weight.view(-1), weight.grad.reshape(-1)  # type: ignore[union-attr]
        for at in range(0, len(flat), _PIECE):
            piece = slice(at, min(at + _PIECE, len(flat)))
            held = slice(at // BLOCK, -(-piece.stop // BLOCK))
            if not packed:
                moments = [state[key].view(-1)[piece] for key in ("exp_avg", "exp_avg_sq")]
                _adamw(flat[piece], grad[piece], moments[0], moments[1], int(state["step"]), group)
                continue
            moments = [
                from_codes(state[f"{key}_codes"][piece], state[f"{key}_scales"][held], key == "exp_avg")
                for key in ("exp_avg", "exp_avg_sq")
            ]
            _adamw(flat[piece], grad[piece], moments[0], moments[1], int(state["step"]), group)
            for key, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                codes, scales = to_codes(moment, key == "exp_avg")
                state[f"{key}_codes"][piece], state[f"{key}_scales"][held] = codes, scales


def _adamw(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: int, group: dict[str, Any]) -> None:
    """One update, all in place."""
    (beta1, beta2), rate = group["betas"], group["lr"]
    weight.mul_(1 - rate * group["weight_decay"])
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    size = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    weight.addcdiv_(mean, size, value=-rate / (1 - beta1**step))


def clip(
    parameters: Iterable[nn.Parameter], most: float, sums: Callable[[list[float]], list[float]] | None = None
) -> float:
    """The norm of all gradients together, which are scaled down to `most` where it is larger (0 or less: never).

    sums: adds up over ranks where each has a part of every gradient.
    """
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if sums is not None:
        norm = torch.tensor(math.sqrt(sums([float(norm) ** 2])[0]))
    total = float(norm)
    if most > 0 and total > most:
        for grad in grads:
            grad.mul_(most / (total + 1e-6))  # a number: times a tensor of one each product is four operations
    return total
