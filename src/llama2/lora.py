"""LoRA over any linear of a model: attach, train, switch, merge, detach (Hu et al., arXiv 2106.09685).

    add_adapter(model, LoraConfig(r=16, target_modules="all-linear"))    freezes the model, A random, B zero
    with disabled(model): ...                                           the model without its adapters
    merge(model)                                                        into the weights permanently, adapters gone

The base layer may be plain or packed (QLoRA); its weight takes no gradient and is not kept for the backward pass.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.errors import InputError
from llama2.linear import has_global_hooks, runs_as_written
from llama2.lora_config import LoraConfig
from llama2.quantization.linear import PackedLinear


class LoraLinear(nn.Module):
    """base(x) + scale * B A dropout(x), summed over the active adapters.

    lora_A[name] (r, in), lora_B[name] (out, r), with DoRA lora_magnitude_vector[name] (out,): float32 over a 16-bit
    base. Products run in x's dtype.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active: tuple[str, ...] = ()

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        own_bias: Tensor | None = self.base_layer.bias
        return own_bias

    def weight_of_base(self, dtype: torch.dtype) -> Tensor:
        """The base layer's weight (out, in), unpacked where it is packed."""
        base = self.base_layer
        return base.weight_in(dtype) if isinstance(base, PackedLinear) else base.weight.detach().to(dtype)

    def add(self, name: str, config: LoraConfig, path: str) -> None:
        """Makes an adapter of this layer, which lies at `path`, and activates it alone."""
        base_tensors = (*self.base_layer.parameters(), *self.base_layer.buffers())
        weight = base_tensors[0] if base_tensors else self.base_layer.weight  # a tied packed head has the embedding's
        rank, device = config.rank(path), weight.device
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        a = torch.empty((rank, self.in_features), dtype=dtype, device=device)
        b = torch.zeros((self.out_features, rank), dtype=dtype, device=device)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if not config.init_lora_weights:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        self.lora_A[name], self.lora_B[name] = nn.Parameter(a), nn.Parameter(b)
        if config.use_dora:
            self.lora_magnitude_vector[name] = nn.Parameter(self.weight_of_base(dtype).norm(dim=1))
        self.scaling[name], self.dropout[name] = config.scaling(path), config.lora_dropout
        self.active = (name,)

    def remove(self, name: str) -> None:
        """Forgets an adapter."""
        for by_name in (self.lora_A, self.lora_B, self.lora_magnitude_vector, self.scaling, self.dropout):
            if name in by_name:
                del by_name[name]
        self.active = tuple(n for n in self.active if n != name)

    def delta(self, name: str) -> Tensor:
        """scale * B A (out, in) in float32 or wider."""
        a, b = self.lora_A[name].detach(), self.lora_B[name].detach()
        wide = torch.promote_types(a.dtype, torch.float32)
        return (b.to(wide) @ a.to(wide)) * self.scaling[name]

    def merged_weight(self) -> Tensor:
        """The weight with the active adapters in it (out, in), float32 or wider."""
        weight = self.weight_of_base(torch.float64 if self._dtype() == torch.float64 else torch.float32)
        for name in self.active:
            changed = weight + self.delta(name)
            if name in self.lora_magnitude_vector:
                changed *= (self.lora_magnitude_vector[name].detach() / changed.norm(dim=1))[:, None]
            weight = changed
        return weight

    def _dtype(self) -> torch.dtype:
        return next(iter(self.lora_A.values())).dtype

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        names = self.active
        alone = len(names) == 1 and names[0] not in self.lora_magnitude_vector
        if alone and runs_as_written(self.base_layer) and not has_global_hooks():
            (name,) = names
            dropout = self.dropout[name] if self.training else 0.0
            out: Tensor = _Adapted.apply(x, self, self.lora_A[name], self.lora_B[name], self.scaling[name], dropout)
            return out if self.bias is None else out + self.bias.to(out.dtype)
        if not names or not self.lora_A:
            base: Tensor = self.base_layer(x)
            return base
        return self._composed(x)

    def _composed(self, x: Tensor) -> Tensor:
        """Several adapters, DoRA, or a base layer with hooks: the sum step by step, differentiated by torch."""
        total = out = self._of_base(x)
        for name in self.active:
            a, b = self.lora_A[name], self.lora_B[name]
            wide = F.dropout(x.to(a.dtype), self.dropout[name], self.training)
            low = F.linear(F.linear(wide, a), b) * self.scaling[name]
            if name in self.lora_magnitude_vector:
                # The norm is a constant of the backward pass (DoRA, section 4.3).
                norm = (self.weight_of_base(a.dtype) + self.delta(name)).norm(dim=1)
                scale = self.lora_magnitude_vector[name] / norm
                dropped = F.linear(wide, self.weight_of_base(a.dtype)) if self._drops(name) else out.to(a.dtype)
                total = total + ((scale - 1) * dropped + scale * low).to(total.dtype)
            else:
                total = total + low.to(total.dtype)
        return total if self.bias is None else total + self.bias.to(total.dtype)

    def _of_base(self, x: Tensor) -> Tensor:
        """The base layer's output without its bias."""
        base = self.base_layer
        if runs_as_written(base) and not has_global_hooks():
            out: Tensor = base.product(x) if isinstance(base, PackedLinear) else F.linear(x, base.weight)
            return out
        out = base(x)
        return out if self.bias is None else out - self.bias.to(out.dtype)

    def _drops(self, name: str) -> bool:
        return self.training and self.dropout[name] > 0

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}: r={len(a)}" for name, a in self.lora_A.items())
        return f"{ranks}; active {', '.join(self.active) or 'none'}"


class _Adapted(torch.autograd.Function):
    """x W^T + scale (dropout(x) A^T) B^T. Keeps x, what was dropped, and the product with A^T; W is read, or unpacked,
    again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: LoraLinear, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        seen, kept = torch.native_dropout(flat, dropout, True) if dropout else (flat, None)
        low = seen @ a.to(x.dtype).T
        base = layer.base_layer
        out = base.multiply(flat) if isinstance(base, PackedLinear) else flat @ layer.weight_of_base(x.dtype).T
        out.addmm_(low, b.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(x, a, b, low, kept)
        ctx.layer, ctx.scale, ctx.grown = layer, scale, 1 / (1 - dropout)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None, None]:
        x, a, b, low, kept = ctx.saved_tensors
        grad, flat = grads[0].reshape(-1, grads[0].shape[-1]), x.reshape(-1, x.shape[-1])
        to_low = (grad @ b.to(grad.dtype)) * ctx.scale
        to_b = (grad.T @ low).to(b.dtype) * ctx.scale
        to_a = (to_low.T @ (flat if kept is None else (flat * kept).mul_(ctx.grown))).to(a.dtype)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = grad @ ctx.layer.weight_of_base(grad.dtype)
            if kept is None:
                to_x.addmm_(to_low, a.to(grad.dtype))
            else:
                to_x += (to_low @ a.to(grad.dtype)).mul_(kept).mul_(ctx.grown)
            to_x = to_x.view(x.shape)
        return to_x, None, to_a, to_b, None, None


# -- models ------------------------------------------------------------------------------------------------------


def layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every adapted layer of a model by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def add_adapter(model: nn.Module, config: LoraConfig, name: str = "default") -> None:
    """Freezes `model` and gives every linear that `config` targets an adapter called `name`, which becomes active.

    A is random (Kaiming), B zero, so nothing changes until it is trained or loaded. Raises InputError where the name
    is taken or no linear is targeted.
    """
    if not name or "." in name:
        raise InputError(f"an adapter cannot be called {name!r}; give a name without dots, such as 'default'")
    if name in names(model):
        raise InputError(f"there is an adapter {name!r} already; remove_adapter(model, {name!r}) or take another name")
    adapted = layers(model)
    linear = {
        path: module
        for path, module in model.named_modules()
        if _is_linear(module) and not path.endswith(".base_layer")
    }
    chosen = [path for path in {**linear, **adapted} if config.targets(path)]
    if not chosen:
        raise InputError(f"target_modules {config.target_modules!r} name none of {', '.join(linear)[:200]}")
    model.requires_grad_(False)
    for path in chosen:
        if path not in adapted:
            adapted[path] = LoraLinear(linear[path]).train(linear[path].training)
            model.set_submodule(path, adapted[path])
        adapted[path].add(name, config, path)
    set_adapter(model, name)
    _train_beside(model, config, chosen)


def _train_beside(model: nn.Module, config: LoraConfig, adapted: list[str]) -> None:
    """Trains the parameters that go into the adapter whole: modules_to_save, a task's head, and biases."""
    saved = config.saved_modules
    modules = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in saved or path in saved]
    named = {path.rpartition(".")[2] for path in modules} | set(modules)
    if lost := [name for name in config.modules_to_save if name not in named]:
        raise InputError(f"modules_to_save names {lost[0]!r}, which this model does not have; leave it out")
    chosen = [f"{path}.{leaf}" for path in modules for leaf, _ in model.get_submodule(path).named_parameters()]
    if config.bias != "none":
        among = adapted if config.bias == "lora_only" else [""]
        chosen += [name for name, _ in model.named_parameters()
                   if name.endswith(".bias") and any(name.startswith(path) for path in among)]  # fmt: skip
    kept = model.__dict__.setdefault("_adapter_parameters", {}) if chosen else {}
    for name in dict.fromkeys(chosen):
        model.get_parameter(name).requires_grad_(True)
        kept[name] = name


def _is_linear(module: nn.Module) -> bool:
    """A linear with a weight of its own, plain or packed by this library; other libraries' have tensors of a class of
    their own."""
    if isinstance(module, PackedLinear):
        return True
    return isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter


def names(model: nn.Module) -> list[str]:
    """The adapters of a model."""
    return list(dict.fromkeys(name for layer in layers(model).values() for name in layer.lora_A))


def current(model: nn.Module) -> str:
    """The adapter that is meant where none is named: the one that is active, or the only one.

    Raises InputError where there is none, or where several could be meant."""
    active = list(dict.fromkeys(name for layer in layers(model).values() for name in layer.active))
    active_names = active or names(model)
    if len(active_names) != 1:
        raise InputError(
            f"the model has {len(active_names)} adapters ({', '.join(active_names) or 'none'}); name one of them"
        )
    return active_names[0]


def set_adapter(model: nn.Module, *active: str) -> None:
    """Makes these adapters, and no others, active and trainable. Raises InputError for one that is not there."""
    known_names = names(model)
    if lost := [name for name in active if name not in known_names]:
        raise InputError(f"there is no adapter {lost[0]!r}; there are {', '.join(known_names) or 'none'}")
    for layer in layers(model).values():
        layer.active = tuple(name for name in active if name in layer.lora_A)
        for parameters in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in active)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Forgets an adapter; a layer without any becomes its base layer again."""
    if name not in names(model):
        raise InputError(f"there is no adapter {name!r}; there are {', '.join(names(model)) or 'none'}")
    for path, layer in layers(model).items():
        layer.remove(name)
        if not layer.lora_A:
            model.set_submodule(path, layer.base_layer)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, for instance as the reference of DPO."""
    adapted = layers(model).values()
    before = [layer.active for layer in adapted]
    for layer in adapted:
        layer.active = ()
    try:
        yield
    finally:
        for layer, active in zip(adapted, before, strict=True):
            layer.active = active


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Puts the active adapters into the weights, summed in float32 and rounded once, and forgets all adapters.

    Raises InputError over packed weights, which have no room for the sum: dequantize() the model first.
    """
    adapted = layers(model)
    if packed := [path for path, layer in adapted.items() if isinstance(layer.base_layer, PackedLinear)]:
        raise InputError(f"{packed[0]} is packed, so nothing can be merged into it; call model.dequantize() first")
    for path, layer in adapted.items():
        weight = layer.base_layer.weight
        weight.copy_(layer.merged_weight().to(weight.dtype))
        model.set_submodule(path, layer.base_layer)
