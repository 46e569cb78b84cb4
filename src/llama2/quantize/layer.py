"""One decoder layer in stages, so that each group of linears can be replaced before the next one sees its inputs.

The linears of a group share an input: [q, k, v], [o], [gate, up], [down]. A stage reads the stored activations a batch
of sequences at a time, computes the input of one group and stores what the next stage needs, so that the whole layer is
computed once, whether its groups are replaced one after the other or together.

    stage 0   x                    -> input of q, k, v
    stage 1   x                    -> input of o, stored as `inner`
    stage 2   x, inner             -> y = x + attention, stored; input of gate, up
    stage 3   y                    -> input of down, stored as `inner`
    stage 4   y, inner             -> y + mlp, stored: the next layer's x

The first token of a text takes half of the attention of most heads and has a state unlike any other, hundreds of times
as large in places. A Hessian that counts it as one of 512 lets its keys and values err by more than their size, which
moves every other token; where a layer makes that state or takes it away, it alone is most of the Hessian. So tokens are
weighted: for q, k, v by the attention that they receive, and nowhere is one counted for more than the median's energy.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.attention import ATTENTION, make_mask
from llama2.checkpoint import Checkpoint
from llama2.checkpoint.page_cache import release
from llama2.config import LlamaConfig
from llama2.layers import ACTIVATIONS, LlamaRMSNorm
from llama2.quantization.gptq_solver import Hessian
from llama2.quantize.states import States
from llama2.rope import LlamaRotaryEmbedding, rotate

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_BATCH_BYTES = 64 << 20  # of float32 in the widest activation of a batch
_QUERIES = 128  # whose attention is in memory at once


class _Linear(NamedTuple):
    weight: Tensor
    bias: Tensor | None


class Stages:
    """The stages of layer `index` over all sequences. `dtype`: what products are computed in."""

    def __init__(
        self, source: Checkpoint, index: int, dtype: torch.dtype, sequences: tuple[int, int], weighted: bool = True
    ) -> None:
        """sequences: (number, T). weighted: whether the Hessians weigh tokens, see above; else all count alike."""
        self.source, self.config, self.index, self.dtype = source, source.config, index, dtype
        self.count, self.length = sequences
        self.weighted = weighted
        self.batch = batch_of(source.config, self.length)
        self._linears: dict[str, _Linear] = {}
        self._norms = [
            norm(source, f"model.layers.{index}.{name}") for name in ("input_layernorm", "post_attention_layernorm")
        ]
        places = torch.arange(self.length)[None]
        cos, sin = LlamaRotaryEmbedding(self.config)(torch.empty(0, dtype=dtype), places)
        self._rotation = (cos[:, None], sin[:, None])
        self._act = ACTIVATIONS[self.config.hidden_act]

    def path(self, name: str) -> str:
        """The module path of a linear."""
        return f"model.layers.{self.index}.{name}"

    def load(self, name: str) -> Tensor:
        """The weight of a linear as the checkpoint has it, float32; stages use it from here on."""
        path, tensors = self.path(name), self.source.tensors
        weight = self.source.read(f"{path}.weight", torch.float32)
        for view in self.source.mapped(f"{path}.weight"):
            release(view)
        bias = self.source.read(f"{path}.bias", self.dtype) if f"{path}.bias" in tensors else None
        self._linears[name] = _Linear(weight.to(self.dtype), bias)
        return weight

    def replace(self, name: str, weight: Tensor) -> None:
        """Stages use this weight from here on."""
        self._linears[name] = _Linear(weight.to(self.dtype), self._linears[name].bias)

    def drop(self, group: int) -> None:
        """Forgets the weights of a group."""
        for name in GROUPS[group]:
            self._linears.pop(name, None)

    def width(self, group: int) -> int:
        """Columns of the group's input."""
        config = self.config
        return (
            config.hidden_size,
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            config.intermediate_size,
        )[group]

    def run(
        self,
        stage: int,
        x: States,
        y: States,
        folder: Path,
        hessian: Hessian | None,
        on_batch: Callable[[], None],
    ) -> None:
        """Runs one stage over all sequences; `hessian` takes in the input of the stage's group.

        With it and weights, stage 0 needs q_proj and k_proj to be loaded.
        """
        width = self.width(1 if stage < 3 else 3)
        shape = (self.count, self.length, width)
        with States(folder / "inner", shape, self.dtype, new=stage in (0, 1, 3)) as inner:
            for start in range(0, self.count, self.batch):
                found = self._batch(stage, start, min(start + self.batch, self.count), x, y, inner)
                if hessian is not None:
                    assert found is not None
                    hessian.add(found * self._roots(stage, found) if self.weighted else found)
                on_batch()

    def _batch(self, stage: int, start: int, stop: int, x: States, y: States, inner: States) -> Tensor | None:
        """One stage over some sequences; gives the input of its group."""
        first, second = self._norms
        if stage == 0:
            return first(x.read(start, stop))
        if stage == 1:
            found = self._attend(first(x.read(start, stop)).to(self.dtype))
            inner.write(start, found)
            return found
        if stage == 2:
            values = x.read(start, stop) + self._product("self_attn.o_proj", inner.read(start, stop)).float()
            y.write(start, values)
            return second(values)
        if stage == 3:
            found = self._gated(second(y.read(start, stop)).to(self.dtype))
            inner.write(start, found)
            return found
        y.write(start, y.read(start, stop) + self._product("mlp.down_proj", inner.read(start, stop)).float())
        return None

    def _roots(self, stage: int, x_BTD: Tensor) -> Tensor:
        """The roots (B, T, 1) of the weights that tokens have in H."""
        energy_BT = x_BTD.float().square().sum(-1)
        weights_BT = (energy_BT.median() / energy_BT).clamp_(max=1)  # NaN of an input that is all 0, which adds nothing
        if stage == 0:
            weights_BT *= self._importance(x_BTD.to(self.dtype))
        return weights_BT.nan_to_num_(1).sqrt_()[..., None]

    def _importance(self, x_BTD: Tensor) -> Tensor:
        """Of tokens (B, T), 1 in the mean: one half alike, as queries; one half by the attention that they receive."""
        q_BHTE, k_BHSE = self._queries_and_keys(x_BTD)
        k_BHSE = k_BHSE.repeat_interleave(q_BHTE.shape[1] // k_BHSE.shape[1], 1)
        received_BS = torch.zeros(x_BTD.shape[:2])
        for start in range(0, self.length, _QUERIES):
            stop = min(start + _QUERIES, self.length)
            scores = (q_BHTE[:, :, start:stop] @ k_BHSE[:, :, :stop].mT).float().mul_(self.config.head_dim**-0.5)
            later = torch.ones(stop - start, stop, dtype=torch.bool).triu_(start + 1)
            received_BS[:, :stop] += scores.masked_fill_(later, -torch.inf).softmax(-1).mean(1).sum(1)
        return received_BS.add_(1).div_(2)

    def _queries_and_keys(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        heads = (-1, self.config.head_dim)
        q, k = (self._product(name, x_BTD).unflatten(-1, heads).transpose(1, 2) for name in GROUPS[0][:2])
        q, k = rotate((q, k), *self._rotation)
        return q, k

    def _product(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._linears[name]
        return F.linear(x, weight, bias)

    def _attend(self, x_BTD: Tensor) -> Tensor:
        q_BHTE, k_BKTE = self._queries_and_keys(x_BTD)
        v_BKTE = self._product(GROUPS[0][2], x_BTD).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        mask = make_mask(None, self.length, 0, self.length, x_BTD.device)
        out_BHTE, _ = ATTENTION["sdpa"](q_BHTE, k_BKTE, v_BKTE, mask, self.config.head_dim**-0.5)
        return out_BHTE.transpose(1, 2).flatten(2)

    def _gated(self, x_BTD: Tensor) -> Tensor:
        gate, up = (self._product(name, x_BTD) for name in GROUPS[2])
        return self._act(gate).mul_(up)


def norm(source: Checkpoint, path: str) -> LlamaRMSNorm:
    """A norm of the checkpoint, float32."""
    with torch.device("meta"):
        made = LlamaRMSNorm(source.config.hidden_size, source.config.rms_norm_eps)
    made.weight = nn.Parameter(source.read(f"{path}.weight", torch.float32), requires_grad=False)
    return made


def batch_of(config: LlamaConfig, length: int) -> int:
    """Sequences that are computed together."""
    widest = max(config.intermediate_size, config.hidden_size)
    return max(1, _BATCH_BYTES // (4 * widest * length))
