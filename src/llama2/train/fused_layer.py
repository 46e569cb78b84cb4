"""A decoder layer of training on a CPU as one function, its backward pass written out.

Torch's own graph of a layer keeps about twice as much for the backward pass, makes some forty passes over memory that
are not products, and computes attention densely over packed rows. Here a layer is sums of products (products.py), all
else is one kernel each (csrc/kernels/training.inl), and attention covers each document's own triangle. Norms, the gated
product and the rotation are computed again in the backward pass; x, q, k, v, gate, up and the attention's output are
kept.

N tokens of all rows, D width, r rank of an adapter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llama2.attention import Mask
from llama2.compiled import kernels, pool
from llama2.layers import LlamaDecoderLayer, LlamaRMSNorm
from llama2.lora import LoraLinear
from llama2.model import LlamaModel
from llama2.plain_network import difference, layer_difference, warn_once
from llama2.pretrained import PreTrainedModel
from llama2.quantization.linear import PackedLinear
from llama2.train.matmul import Factor, PackedFactor, Scratch, Sum, sum_of_products, sums_of_products

DTYPES = (torch.float32, torch.bfloat16)
Grads = dict[Tensor, Tensor]  # by parameter


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within it the decoders of `model` run every layer that allows it as one function; others as always."""
    decoders = [module for module in model.modules() if isinstance(module, LlamaModel)] if kernels() else []
    for decoder in decoders:
        decoder.run_layer = TrainingLayers(decoder)
    try:
        yield
    finally:
        for decoder in decoders:
            decoder.run_layer = None


def fuses(model: PreTrainedModel) -> bool:
    """Whether the first layer of a model's decoder would run as one function now."""
    decoder = model.model
    if not isinstance(decoder, LlamaModel) or decoder.run_layer is None or difference(model, training=True):
        return False
    return plan_of(decoder.layers[0], decoder.norm.weight) is not None


class TrainingLayers:
    """Implementation of LlamaModel.run_layer during training."""

    equivalent = True  # to calling the layer, see plain_network.difference

    def __init__(self, decoder: LlamaModel) -> None:
        self._decoder = ref(decoder)
        self._seen: tuple[Mask, Tensor] | None = None
        self._places: _Places | None = None
        self._scratch = Scratch()

    def __call__(
        self,
        layer: nn.Module,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Mask,
        implementation: str,
        cache: object = None,
        cache_position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As LlamaDecoderLayer.forward."""
        if implementation == "sdpa" and cache is None and (plan := plan_of(layer, x_BTD)) is not None:
            plan.places = self._places_of(x_BTD, rotation, mask)
            for product in plan.products():
                product.scratch = self._scratch
            if plan.places is not None:
                trained = [p for p in plan.parameters() if p.requires_grad]
                out: Tensor = _Layer.apply(x_BTD, plan, *trained)
                return out, None
        decoder = self._decoder()
        if decoder is not None and (reason := layer_difference(layer, decoder.config, training=True)):
            warn_once(decoder, reason, "torch runs this layer, not the fused training kernels", stacklevel=3)
        found: tuple[Tensor, Tensor | None] = layer(x_BTD, rotation, mask, implementation, cache, cache_position)
        return found

    def _places_of(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], mask: Mask) -> "_Places | None":
        if self._seen is None or self._seen[0] is not mask or self._seen[1] is not rotation[0]:
            batch, tokens = x_BTD.shape[:2]
            texts = texts_of(mask, batch, tokens)
            self._seen, self._places = (mask, rotation[0]), None
            if texts is not None:
                tables = [t.expand(batch, 1, tokens, -1).reshape(batch * tokens, -1) for t in rotation]
                cos, sin = (texts.spread(table).contiguous() for table in tables)
                self._places = _Places(cos, sin, texts)
        return self._places


@dataclass
class PackedTexts:
    """Texts among N tokens, one behind the other: where each ends (in S tokens, which are the N where index is None).

    Where texts begin alike, their tokens stand once among the N: index (S,) is the place of each token of all texts,
    shared the beginnings that are taken from another text (place, tokens, where they stand among the S)."""

    ends: Tensor
    index: Tensor | None = None
    own: Tensor | None = None  # (N,): where each token of its own stands among the S
    shared: tuple[tuple[int, int, int], ...] = ()

    def spread(self, x: Tensor) -> Tensor:
        """(N, ...) as the tokens of all texts (S, ...)."""
        return x if self.index is None else x[self.index]

    def kept(self, x: Tensor) -> Tensor:
        """Values (N, ...) of each token itself, of those of all texts (S, ...)."""
        return x if self.own is None else x[self.own]

    def only_own(self, x: Tensor) -> Tensor:
        """(N, ...) as (S, ...), with 0 for what is taken from another text."""
        if self.index is None:
            return x
        spread = x[self.index]
        for _, tokens, begin in self.shared:
            spread[begin : begin + tokens] = 0
        return spread

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all that a token was taken for: (S, ...) to (N, ...), in float32 and rounded once."""
        if self.own is None:
            return x
        total = x[self.own].to(torch.float32)
        for source, tokens, begin in self.shared:
            total[source : source + tokens] += x[begin : begin + tokens]
        return total.to(x.dtype)


@dataclass
class _Places:
    """Rotations (S, E) float32 of the tokens of all texts, and the texts."""

    cos: Tensor
    sin: Tensor
    texts: PackedTexts


def texts_of(mask: Mask, batch: int, tokens: int) -> PackedTexts | None:
    """The texts among batch * tokens tokens, or None where tokens see anything but the text so far: an unbroken row of
    tokens up to themselves, which a beginning of an earlier text may precede."""
    if mask.allowed is None:
        return PackedTexts(torch.arange(1, batch + 1) * tokens) if mask.causal or tokens == 1 else None
    allowed = mask.allowed
    if allowed.dtype != torch.bool or allowed.shape[1:] != (1, tokens, tokens) or allowed.is_cuda:
        return None
    seen = allowed[:, 0].to(torch.uint8)
    place = torch.arange(tokens)
    first, last = seen.argmax(-1), tokens - 1 - seen.flip(-1).argmax(-1)
    whole = (last == place) & (seen.sum(-1) == place - first + 1) & allowed[:, 0].diagonal(dim1=1, dim2=2)
    begins = first == place
    joined = begins[:, 1:] | (first[:, 1:] == first[:, :-1])
    if not bool(whole.all()) or not bool(joined.all()):
        return _sharing(allowed[0, 0]) if len(allowed) == batch == 1 else None
    begins = begins.expand(batch, tokens).reshape(-1)
    return PackedTexts(torch.cat((begins.nonzero().squeeze(1)[1:], torch.tensor([batch * tokens]))))


def _sharing(allowed_NN: Tensor) -> PackedTexts | None:
    """Texts of one row some of which begin with the first tokens of an earlier one; None where that is not all."""
    count = len(allowed_NN)
    positions = torch.arange(count)
    blocked = ~allowed_NN & (positions <= positions[:, None])
    begin = torch.where(blocked.any(1), count - blocked.flip(1).to(torch.uint8).argmax(1), 0)  # of the unbroken row
    fits = torch.equal(allowed_NN.diagonal(), torch.ones(count, dtype=torch.bool)) and not bool(
        allowed_NN.triu(1).any()
    )
    starts = [i for i, b in enumerate(begin.tolist()) if i == b]
    ends = [*starts[1:], count]
    if not fits or starts[:1] != [0]:
        return None
    taken = allowed_NN.sum(1) - (positions - begin + 1)
    index, own, ended, shared = list[Tensor](), list[Tensor](), list[int](), list[tuple[int, int, int]]()
    alone, offset = dict[int, int](), 0
    for start, end in zip(starts, ends, strict=True):
        tokens = int(taken[start])
        source = int(allowed_NN[start].to(torch.uint8).argmax())
        if bool((begin[start:end] != start).any()) or bool((taken[start:end] != tokens).any()):
            return None
        if not tokens:
            alone[start] = end
        elif source + tokens > alone.get(source, 0) or not bool(allowed_NN[start:end, source : source + tokens].all()):
            return None
        else:
            shared.append((source, tokens, offset))
        index += [torch.arange(source, source + tokens), torch.arange(start, end)]
        own.append(torch.arange(offset + tokens, offset + tokens + end - start))
        offset += tokens + end - start
        ended.append(offset)
    return PackedTexts(torch.tensor(ended), torch.cat(index), torch.cat(own), tuple(shared))


# -- what a layer consists of ------------------------------------------------------------------------------------


@dataclass
class _Product:
    """One linear: its weight, plain or packed, and at most one adapter, which does not see `dropout` of its input."""

    base: nn.Linear
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scale: float = 1.0
    dropout: float = 0.0
    seed: int = 0  # of what is dropped
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def weight(self) -> Factor:
        """(out, in)."""
        base = self.base
        return PackedFactor(base, self.scratch) if isinstance(base, PackedLinear) else base.weight.detach()

    def dropped(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Applies the adapter's dropout to x, or adds its gradient into `added`."""
        if not self.dropout:
            return x
        out = torch.empty_like(x) if added is None else added
        kernels().drop(pool(), x, self.seed, self.dropout, added, out)
        return out

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        own = [self.base.weight] if type(self.base) is nn.Linear else []
        return [*own, *(p for p in (self.a, self.b) if p is not None)]  # type: ignore[list-item]


@dataclass
class _Plan:
    """A layer: products by the input they share, norms, shapes."""

    qkv: list[_Product]
    out: list[_Product]
    wide: list[_Product]
    down: list[_Product]
    norms: tuple[Any, Any]
    heads: int
    kv_heads: int
    scale: float
    places: _Places | None = None

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in a fixed order."""
        own = [parameter for product in self.products() for parameter in product.parameters()]
        return own + [norm.weight for norm in self.norms]

    def products(self) -> list[_Product]:
        """All linears, in one order."""
        return [*self.qkv, *self.out, *self.wide, *self.down]

    def draw(self) -> None:
        """Chooses what adapters do not see, with torch's random numbers, which recomputing sets back."""
        if drops := [product for product in self.products() if product.dropout]:
            for product, seed in zip(drops, torch.randint(1 << 62, (len(drops),)).tolist(), strict=True):
                product.seed = seed


def plan_of(layer: object, x_BTD: Tensor) -> _Plan | None:
    """The plan of a layer, or None where its parts are of another kind than the kernels know."""
    if type(layer) is not LlamaDecoderLayer or x_BTD.device.type != "cpu" or x_BTD.dtype not in DTYPES:
        return None
    if layer_difference(layer, getattr(layer.self_attn, "config", None), training=True):
        return None
    attention, mlp, norms = layer.self_attn, layer.mlp, (layer.input_layernorm, layer.post_attention_layernorm)
    config = attention.config
    odd = config.hidden_size % 16 or config.intermediate_size % 16 or config.head_dim % 2
    if odd or config.pretraining_tp > 1 or config.hidden_act not in ("silu", "swish"):
        return None
    if (layer.training and config.attention_dropout) or torch.is_autocast_enabled("cpu"):
        return None
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    linears = [getattr(attention, name) for name in names] + [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    found = [_product_of(linear, x_BTD.dtype) for linear in linears]
    parts = [product for product in found if product is not None]
    if len(parts) < len(found) or any(norm.weight.dtype != x_BTD.dtype for norm in norms):
        return None
    heads = (config.num_attention_heads, config.num_key_value_heads)
    return _Plan(parts[:3], parts[3:4], parts[4:6], parts[6:], norms, *heads, attention.scaling)


def _product_of(linear: nn.Linear, dtype: torch.dtype) -> _Product | None:
    base, adapter = (linear.base_layer, linear) if isinstance(linear, LoraLinear) else (linear, None)
    if base.bias is not None or not (type(base) is nn.Linear or isinstance(base, PackedLinear)):
        return None
    if type(base) is nn.Linear and base.weight.dtype != dtype:
        return None
    if adapter is None or not adapter.active or not adapter.lora_A:
        return _Product(base)
    name = adapter.active[0]
    odd = len(adapter.active) > 1 or name in adapter.lora_magnitude_vector
    if odd or adapter.lora_A[name].dtype not in DTYPES:
        return None
    dropout = adapter.dropout[name] if adapter.training else 0.0
    return _Product(base, adapter.lora_A[name], adapter.lora_B[name], adapter.scaling[name], dropout)


# -- products that share an input --------------------------------------------------------------------------------


def _low(products: list[_Product], x: Tensor) -> list[Tensor | None]:
    """scale x A^T (N, r) of each, of what it sees of x."""
    return _each(
        products, [None if p.a is None else Sum([(p.dropped(x), p.a.detach().T)], scale=p.scale) for p in products]
    )


def _each(products: list[_Product], sums: list[Sum | None]) -> list[Tensor | None]:
    """The results of the sums that are there, all computed at once."""
    asked = [one for one in sums if one is not None]
    found = iter(sums_of_products(*asked) if asked else ())
    return [None if one is None else next(found) for one in sums]


def _forward(
    products: list[_Product], x: Tensor, added: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """x W^T + scale x A^T B^T (+ added) of each, and what _low gives."""
    low, sums = _low(products, x), list[Sum]()
    for product, part in zip(products, low, strict=True):
        terms = [(x, product.weight.T)]
        if part is not None and product.b is not None:
            terms.append((part, product.b.detach().T))
        sums.append(Sum(terms, added))
    return sums_of_products(*sums), low


def _backward(
    products: list[_Product], x: Tensor, low: list[Tensor | None], grads: list[Tensor], found: Grads
) -> Tensor:
    """The gradient of x; those of the trained weights go to `found`."""
    to_low = _to_low(products, grads)
    _weights(products, x, low, grads, to_low, found)
    return _inputs(products, grads, to_low)


def _to_low(products: list[_Product], grads: list[Tensor]) -> list[Tensor | None]:
    """scale grad B (N, r) of each: the gradient of x A^T."""
    pairs = zip(products, grads, strict=True)
    return _each(products, [None if p.b is None else Sum([(g, p.b.detach())], scale=p.scale) for p, g in pairs])


def _inputs(products: list[_Product], grads: list[Tensor], to_low: list[Tensor | None]) -> Tensor:
    """The gradient of x (N, in)."""
    terms = [(grad, product.weight) for product, grad in zip(products, grads, strict=True)]
    pairs = zip(products, to_low, strict=True)
    adapted = [(p, (low, p.a.detach())) for p, low in pairs if p.a is not None and low is not None]
    to_x = sum_of_products(*terms, *(term for product, term in adapted if not product.dropout))
    for product, term in adapted:
        if product.dropout:
            product.dropped(sum_of_products(term), to_x)
    return to_x


def _weights(
    products: list[_Product],
    x: Tensor,
    low: list[Tensor | None],
    grads: list[Tensor],
    to_low: list[Tensor | None],
    found: Grads,
) -> None:
    """The gradients of what is trained, to `found`."""
    weights, sums = list[Tensor](), list[Sum]()
    for product, part, to_part, grad in zip(products, low, to_low, grads, strict=True):
        if type(product.base) is nn.Linear and product.base.weight.requires_grad:
            weights.append(product.base.weight)
            fewer = grad.shape[1] <= x.shape[1]
            sums.append(Sum([(grad.T, x)]) if fewer else Sum([(x.T, grad)], transposed=True))
        if product.a is not None and product.b is not None and part is not None and to_part is not None:
            weights += [product.a, product.b]
            sums.append(Sum([(to_part.T, product.dropped(x))], dtype=product.a.dtype))
            sums.append(Sum([(part.T, grad)], dtype=product.b.dtype, transposed=True))
    if sums:
        found |= dict(zip(weights, sums_of_products(*sums), strict=True))


# -- the layer ---------------------------------------------------------------------------------------------------


def _norm(x: Tensor, norm: LlamaRMSNorm) -> Tensor:
    out = torch.empty_like(x)
    kernels().norm(pool(), x, norm.weight.detach(), norm.variance_epsilon, out)
    return out


def _norm_grad(x: Tensor, norm: LlamaRMSNorm, grad: Tensor, residual: Tensor, found: Grads) -> Tensor:
    """The gradient of x, `residual` added."""
    weight, to_x = norm.weight, torch.empty_like(x)
    to_weight = torch.zeros(len(weight)) if weight.requires_grad else None
    kernels().norm_grad(pool(), x, weight.detach(), norm.variance_epsilon, grad, residual, to_x, to_weight)
    if to_weight is not None:
        found[weight] = to_weight.to(weight.dtype)
    return to_x


class _Layer(torch.autograd.Function):
    """x (B, T, D) -> (B, T, D); after the plan the trained parameters, for torch to know of them."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, plan: _Plan, *trained: Tensor) -> Tensor:
        x = x_BTD.detach().reshape(-1, x_BTD.shape[-1]).contiguous()
        places = plan.places
        assert places is not None
        plan.draw()
        (q, k, v), low = _forward(plan.qkv, _norm(x, plan.norms[0]))
        texts = places.texts
        every = [texts.spread(t) for t in (q, k, v)]
        of_every, lse = torch.empty_like(every[0]), torch.empty((plan.heads, len(places.cos)))
        kernels().texts(
            pool(), *_heads(plan, *every), places.cos, places.sin, texts.ends, plan.scale, *_heads(plan, of_every), lse
        )
        o = texts.kept(of_every)
        del every, of_every
        (middle,), out_low = _forward(plan.out, o, x)
        (gate, up), wide_low = _forward(plan.wide, _norm(middle, plan.norms[1]))
        both = torch.empty_like(gate)
        kernels().swiglu(pool(), gate, up, both)
        (y,), down_low = _forward(plan.down, both, middle)
        ctx.plan, ctx.trained = plan, trained
        ctx.save_for_backward(x, q, k, v, o, lse, middle, gate, up, *low, *out_low, *wide_low, *down_low)
        return y.view(x_BTD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, found, places = ctx.plan, Grads(), ctx.plan.places
        x, q, k, v, o, lse, middle, gate, up, *lows = ctx.saved_tensors
        low, out_low, wide_low, down_low = lows[:3], lows[3:4], lows[4:6], lows[6:]
        grad = grads[0].reshape(x.shape).contiguous()
        both = torch.empty_like(gate)
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(gate)
        to_low = _to_low(plan.down, [grad])
        to_both = _inputs(plan.down, [grad], to_low)
        kernels().swiglu_grad(pool(), gate, up, to_both, to_gate, to_up, both)  # and silu(gate) * up once more
        _weights(plan.down, both, down_low, [grad], to_low, found)
        del both, to_both
        to_norm = _backward(plan.wide, _norm(middle, plan.norms[1]), wide_low, [to_gate, to_up], found)
        del to_gate, to_up
        grad = _norm_grad(middle, plan.norms[1], to_norm, grad, found)
        to_o = _backward(plan.out, o, out_low, [grad], found)
        texts = places.texts
        every = [texts.spread(t) for t in (q, k, v, o)]
        to_every = [torch.empty_like(t) for t in every[:3]]
        kernels().texts_grad(
            pool(), *_heads(plan, *every[:3]), places.cos, places.sin, texts.ends, plan.scale, *_heads(plan, every[3]),
            lse, *_heads(plan, texts.only_own(to_o), *to_every),
        )  # fmt: skip
        to_qkv = [texts.kept(to_every[0]), texts.summed(to_every[1]), texts.summed(to_every[2])]
        del every, to_every
        normed = _norm(x, plan.norms[0])
        to_low = _to_low(plan.qkv, to_qkv)
        _weights(plan.qkv, normed, low, to_qkv, to_low, found)
        if not ctx.needs_input_grad[0] and not plan.norms[0].weight.requires_grad:  # the first layer over frozen tokens
            return None, None, *(found.get(p) for p in ctx.trained)
        to_norm = _inputs(plan.qkv, to_qkv, to_low)
        to_x = _norm_grad(x, plan.norms[0], to_norm, grad, found)
        return to_x.view(grads[0].shape), None, *(found.get(p) for p in ctx.trained)


def _heads(plan: _Plan, *tensors: Tensor) -> list[Tensor]:
    """(N, heads * E) as (N, heads, E)."""
    width = plan.places.cos.shape[1]  # type: ignore[union-attr]
    return [t.view(len(t), -1, width) for t in tensors]
