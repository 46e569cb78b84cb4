"""The runner contract in plain torch, in any dtype: what the native step is tested against."""

import math
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama2.cpu.adapters import Tensors
from llama2.cpu.cache import PAGE, CacheView, PagedCache
from llama2.rope_types import attention_scaling, inverse_frequencies


class ReferenceRunner:
    """Steps a LlamaForCausalLM's parameters; keys and values live here, by page, in the parameters' dtype."""

    def __init__(self, module: Any, dtype: torch.dtype = torch.float64) -> None:
        self.module, self.dtype, self.config = module, dtype, module.config
        self._adapters: dict[str, Tensors] = {}
        self._of_token: list[Tensors | None] = []
        self._cached: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}  # (layer, page, slot) -> k, v

    def add_adapter(self, name: str, tensors: Tensors) -> None:
        """As CpuWeights.add_adapter."""
        self._adapters[name] = tensors

    def step(
        self,
        tokens: Any,
        positions: Any,
        view: CacheView[PagedCache],
        rows: Any = None,
        adapters: SequenceOf[str | None] | None = None,
    ) -> NDArray[np.float64]:
        """As CpuRunner.step, one token and one sequence at a time where it matters."""
        with torch.no_grad():
            chosen = [None if name is None else self._adapters[name] for name in adapters or [None] * len(view.past)]
            self._of_token = [a for a, n in zip(chosen, np.diff(view.starts), strict=True) for _ in range(n)]
            places = torch.as_tensor(np.asarray(positions))
            x = self.module.model.embed_tokens.weight[torch.as_tensor(np.asarray(tokens)).long()].to(self.dtype)
            cos, sin = self._rotation(places)
            for index, layer in enumerate(self.module.model.layers):
                x = x + self._attention(index, layer, self._norm(x, layer.input_layernorm), cos, sin, view)
                y = self._norm(x, layer.post_attention_layernorm)
                path = f"model.layers.{index}.mlp"
                gate = self._linear(layer.mlp.gate_proj, y, f"{path}.gate_proj")
                up = self._linear(layer.mlp.up_proj, y, f"{path}.up_proj")
                x = x + self._linear(layer.mlp.down_proj, torch.nn.functional.silu(gate) * up, f"{path}.down_proj")
            logit_rows = view.starts[1:] - 1 if rows is None else np.asarray(rows)
            y = self._norm(x[torch.as_tensor(logit_rows).long()], self.module.model.norm)
            logits: NDArray[np.float64] = self._linear(self.module.lm_head, y).double().numpy()
            view.commit()
            return logits

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * norm.weight.to(self.dtype)

    def _linear(self, linear: Any, x: Tensor, path: str = "") -> Tensor:
        bias = None if linear.bias is None else linear.bias.to(self.dtype)
        out = torch.nn.functional.linear(x, linear.weight.to(self.dtype), bias)
        for t, adapter in enumerate(self._of_token if path else []):
            if adapter is not None and path in adapter:
                a, b, scale = adapter[path]
                a, b = (torch.as_tensor(w).to(self.dtype) for w in (a, b))
                out[t] += scale * (b @ (a @ x[t]))
        return out

    def _rotation(self, places: Tensor) -> tuple[Tensor, Tensor]:
        inv = inverse_frequencies(self.config, int(places.max()) + 1, xp=torch, dtype=torch.float32)
        angles = places.float()[:, None] * inv  # float32, as the model's own tables
        scale = attention_scaling(self.config.rope_parameters)
        return angles.cos().to(self.dtype) * scale, angles.sin().to(self.dtype) * scale

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def _attention(
        self, index: int, layer: Any, x: Tensor, cos: Tensor, sin: Tensor, view: CacheView[PagedCache]
    ) -> Tensor:
        c, a, path = self.config, layer.self_attn, f"model.layers.{index}.self_attn"
        q = self._rotate(self._linear(a.q_proj, x, f"{path}.q_proj").view(len(x), c.num_attention_heads, -1), cos, sin)
        k = self._rotate(self._linear(a.k_proj, x, f"{path}.k_proj").view(len(x), c.num_key_value_heads, -1), cos, sin)
        v = self._linear(a.v_proj, x, f"{path}.v_proj").view(len(x), c.num_key_value_heads, -1)
        group, out = c.num_attention_heads // c.num_key_value_heads, []
        for s in range(len(view.past)):
            for t in range(int(view.starts[s]), int(view.starts[s + 1])):
                slot = int(view.past[s]) + t - int(view.starts[s])
                where = [(index, int(view.tables[s, i // PAGE]), i % PAGE) for i in range(slot + 1)]
                self._cached[where[-1]] = (k[t], v[t])
                keys = torch.stack([self._cached[w][0] for w in where]).repeat_interleave(group, dim=1)
                values = torch.stack([self._cached[w][1] for w in where]).repeat_interleave(group, dim=1)
                scores = torch.einsum("he,she->hs", q[t], keys) / math.sqrt(c.head_dim)
                out.append(torch.einsum("hs,she->he", scores.softmax(-1), values).reshape(-1))
        return self._linear(a.o_proj, torch.stack(out), f"{path}.o_proj")
