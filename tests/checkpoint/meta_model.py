"""Llama from Meta's tensors, written apart from the library: interleaved RoPE on complex numbers, Meta's names."""

import torch
from torch import Tensor


def forward(weights: dict[str, Tensor], params: dict, ids: Tensor) -> Tensor:
    """Logits (T, V) of one sequence, in float64. `params` is params.json."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, dim = params["n_heads"], params["dim"]
    kv_heads, width = params.get("n_kv_heads", params["n_heads"]), dim // params["n_heads"]
    eps, theta = params["norm_eps"], params.get("rope_theta", 10000.0)
    rates = 1.0 / theta ** (torch.arange(0, width, 2).double() / width)
    turns = torch.polar(torch.ones(len(ids), width // 2).double(), torch.outer(torch.arange(len(ids)).double(), rates))

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w[name]

    def rotate(x: Tensor) -> Tensor:  # (T, heads, width): neighbours are one complex number
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    x = w["tok_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), float("-inf")).double().triu(1)
    for i in range(params["n_layers"]):
        p = f"layers.{i}."
        y = norm(x, p + "attention_norm.weight")
        q = rotate((y @ w[p + "attention.wq.weight"].T).view(len(ids), heads, width))
        k = rotate((y @ w[p + "attention.wk.weight"].T).view(len(ids), kv_heads, width))
        v = (y @ w[p + "attention.wv.weight"].T).view(len(ids), kv_heads, width)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / width**0.5 + mask
        seen = torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(len(ids), dim)
        x = x + seen @ w[p + "attention.wo.weight"].T
        y = norm(x, p + "ffn_norm.weight")
        gate = torch.nn.functional.silu(y @ w[p + "feed_forward.w1.weight"].T)
        x = x + (gate * (y @ w[p + "feed_forward.w3.weight"].T)) @ w[p + "feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ w["output.weight"].T


def random_weights(params: dict, inner: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Seeded tensors under Meta's names, whole."""
    g = torch.Generator().manual_seed(3)
    dim, vocab = params["dim"], params["vocab_size"]
    keys = dim // params["n_heads"] * params.get("n_kv_heads", params["n_heads"])
    shapes = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,), "output.weight": (vocab, dim)}
    for i in range(params["n_layers"]):
        shapes |= {
            f"layers.{i}.attention.wq.weight": (dim, dim),
            f"layers.{i}.attention.wk.weight": (keys, dim),
            f"layers.{i}.attention.wv.weight": (keys, dim),
            f"layers.{i}.attention.wo.weight": (dim, dim),
            f"layers.{i}.feed_forward.w1.weight": (inner, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, inner),
            f"layers.{i}.feed_forward.w3.weight": (inner, dim),
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.ffn_norm.weight": (dim,),
        }
    mean = {name: 1.0 if "norm" in name else 0.0 for name in shapes}
    return {name: (torch.randn(shape, generator=g) * 0.2 + mean[name]).to(dtype) for name, shape in shapes.items()}


_AXES = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1, "tok_embeddings": 1, "output": 0}


def shard(weights: dict[str, Tensor], count: int, embedding_axis: int = 1) -> list[dict[str, Tensor]]:
    """The tensors as `count` model-parallel ranks hold them, with the stale rotary table that old files carry."""
    ranks: list[dict[str, Tensor]] = [{"rope.freqs": torch.ones(4)} for _ in range(count)]
    for name, tensor in weights.items():
        axis = _AXES.get(name.split(".")[-2])
        if name.startswith("tok"):
            axis = embedding_axis
        parts = [tensor] * count if axis is None else tensor.chunk(count, axis)
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part.clone()
    return ranks
