"""Scaled dot-product attention with grouped heads: three implementations behind one signature, one dict.

    eager              matrix products and a softmax; returns the weights; the oracle
    sdpa               torch's fused kernels
    flash_attention_2  the flash_attn package where it is installed, else torch's own flash kernel (CUDA only)

Shapes: B batch, T new tokens, S cached positions, H query heads, K key-value heads, E head width.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2.documents import within
from llama2.errors import InputError, MissingDependencyError
from llama2.rope import promoted

Attend = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass
class Mask:
    """Which cached positions each new token sees.

    allowed: (B | 1, 1, T, S) or broadcastable, bool (True = sees) or additive float; None where `causal` says it all.
    causal: the new tokens are the last T of the S positions and see themselves and what is before them.
    padding: (B, S) bool, True = a real token; None where every position is real. Read by flash_attention_2.
    documents: (B | 1, T), the document of each token of packed rows, see `documents`; None where each row is one.
    """

    allowed: Tensor | None
    causal: bool
    padding: Tensor | None = None
    documents: Tensor | None = None


def make_mask(
    attention_mask: Tensor | None,
    new_tokens: int,
    cached: int,
    positions: int,
    device: torch.device,
    cache_position: Tensor | None = None,
    implementation: str = "sdpa",
    documents: Tensor | None = None,
) -> Mask:
    """The mask of one forward pass, shared by all layers.

    attention_mask: None, 2D (B, cached + new_tokens) with 1 = keep, or 4D (B | 1, 1, T, S) taken as it is (bool, or
    additive float). `positions` is S; `cache_position` (T,) is given for a static cache, whose tail is empty.
    documents (B | 1, T) keep packed rows apart. Raises InputError for any other shape or dtype, for documents beside
    a 4D mask, and for documents behind cached tokens.
    """
    if documents is not None:
        return _packed_mask(attention_mask, documents, new_tokens, positions, implementation)
    if attention_mask is not None and attention_mask.dim() == 4:
        return _given_mask(attention_mask, new_tokens, positions, implementation)
    padding = _padding(attention_mask, cached + new_tokens, positions)
    if cache_position is None and padding is None:
        if new_tokens == 1 or cached == 0 or implementation == "flash_attention_2":
            return Mask(None, causal=new_tokens > 1)
        return Mask(_causal(new_tokens, cached, positions, device), causal=True)
    if cache_position is None and implementation == "flash_attention_2":
        return Mask(None, causal=new_tokens > 1, padding=padding)
    if cache_position is not None:
        allowed = torch.arange(positions, device=device) <= cache_position[:, None]
        allowed = allowed[None, None]
    else:
        allowed = _causal(new_tokens, cached, positions, device)
    if padding is not None:
        allowed = allowed & padding.to(device)[:, None, None, :]
    return Mask(allowed, causal=new_tokens > 1, padding=padding)


def _packed_mask(
    attention_mask: Tensor | None, documents: Tensor, new_tokens: int, positions: int, implementation: str
) -> Mask:
    if attention_mask is not None and attention_mask.dim() == 4:
        raise InputError("a 4D attention_mask says who sees whom; leave out cu_seq_lens_q and seq_idx, or the mask")
    if positions != new_tokens:
        raise InputError(
            f"packed rows begin with an empty cache that grows; this one has {positions} places for {new_tokens} new "
            "tokens; run each document by itself to go on"
        )
    padding = _padding(attention_mask, new_tokens, positions)
    if implementation == "flash_attention_2":
        return Mask(None, causal=True, padding=padding, documents=documents)
    allowed = within(documents)
    if padding is not None:
        allowed = allowed & padding.to(documents.device)[:, None, None, :]
    return Mask(allowed, causal=True, padding=padding, documents=documents)


def _given_mask(mask: Tensor, new_tokens: int, positions: int, implementation: str) -> Mask:
    if implementation == "flash_attention_2":
        raise InputError("flash_attention_2 takes no 4D attention_mask; use attn_implementation='sdpa' or 'eager'")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(
            f"a 4D attention_mask of {mask.dtype} is ambiguous; give bool (True = sees) or additive float (0 = sees)"
        )
    if mask.shape[2] != new_tokens or mask.shape[3] < positions:
        raise InputError(
            f"the 4D attention_mask is {tuple(mask.shape)}; its last two sizes must be {new_tokens} new tokens and at "
            f"least {positions} positions"
        )
    return Mask(mask[..., :positions], causal=False)


def _padding(mask: Tensor | None, length: int, positions: int) -> Tensor | None:
    """A 2D mask as bool (B, S), or None where it masks nothing."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise InputError(f"attention_mask has {mask.dim()} dimensions; give 2 (batch, positions) or 4")
    if mask.shape[1] != length and mask.shape[1] != positions:
        raise InputError(
            f"attention_mask covers {mask.shape[1]} positions but cache and new tokens together are {length}; "
            "it must cover both"
        )
    keep = mask != 0
    if not traced(keep) and bool(keep.all()):
        return None
    return torch.nn.functional.pad(keep, (0, positions - keep.shape[1])) if keep.shape[1] < positions else keep


def traced(x: Tensor) -> bool:
    """Whether no value of x can be looked at: torch.compile, torch.export and torch.jit.trace record what is done with
    any, and a meta tensor has none."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_meta


def _causal(new_tokens: int, cached: int, positions: int, device: torch.device) -> Tensor:
    rows = torch.arange(cached, cached + new_tokens, device=device)[:, None]
    return (torch.arange(positions, device=device) <= rows)[None, None]


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """q (B, H, T, E), k and v (B, K, S, E) -> output (B, H, T, E) and weights (B, H, T, S).

    The softmax runs in promote(q.dtype, float32). A row that sees nothing gets zeros, not NaN.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)).to(promoted(q.dtype)) * scale
    allowed = mask.allowed
    if allowed is None and mask.causal:
        allowed = _causal(q.shape[2], k.shape[2] - q.shape[2], k.shape[2], q.device)
    if allowed is None:
        weights = scores.softmax(-1)
    elif allowed.dtype == torch.bool:
        # The lowest finite number instead of -inf: a row that sees nothing stays finite and is zeroed after.
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    else:
        weights = (scores + allowed.to(scores.dtype)).softmax(-1)
    weights = F.dropout(weights.to(q.dtype), dropout) if dropout else weights.to(q.dtype)
    return weights @ v, weights


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """As `eager`, through torch's fused kernels; returns no weights."""
    allowed = mask.allowed
    if allowed is not None and allowed.is_floating_point():
        allowed = allowed.to(q.dtype)
    batch, heads, new_tokens, width = q.shape
    groups = heads // k.shape[1]
    if new_tokens == 1 and groups > 1:
        # One new token: the query heads of a group are rows of one product, so each key is read once, not G times.
        if allowed is not None and allowed.shape[1] != 1:
            allowed = allowed.reshape(allowed.shape[0], k.shape[1], groups, -1)
        grouped = q.reshape(batch, k.shape[1], groups, width)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=allowed, dropout_p=dropout, scale=scale)
        return out.reshape(batch, heads, 1, width), None
    if groups > 1 and allowed is not None and q.is_cuda:
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=allowed,
        is_causal=mask.causal and allowed is None,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=bool(groups > 1),  # torch.jit.trace makes tensors of sizes
    )
    return out, None


FlashKernel = Callable[[Tensor, Tensor, Tensor, bool, float, float], Tensor]


def flash_attention_2(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """As `eager`, through a flash kernel in float16 or bfloat16 on CUDA; returns no weights.

    Raises InputError for float32 (outside autocast) and MissingDependencyError without a CUDA device.
    """
    if not q.is_cuda:
        raise MissingDependencyError(
            f"flash_attention_2 runs on CUDA but the model is on {q.device.type!r}; move it with model.to('cuda') or "
            "use attn_implementation='sdpa'"
        )
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise InputError(
            f"flash_attention_2 computes in float16 or bfloat16 but got {q.dtype}; load with dtype=torch.bfloat16, "
            "or train under autocast (bf16=True)"
        )
    return flash_rows(_flash_kernel(), q, k, v, mask, scale, dropout), None


def flash_rows(
    kernel: FlashKernel, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0
) -> Tensor:
    """Runs `kernel` on the whole batch, or on the real tokens of each row, or of each document of packed rows."""
    if mask.padding is None and mask.documents is None:
        return kernel(q, k, v, mask.causal, scale, dropout)
    out = torch.zeros_like(q)
    new_tokens = q.shape[2]
    for row, keep in _texts(mask, len(q)):
        seen = keep.nonzero().squeeze(-1)
        asked = keep[-new_tokens:].nonzero().squeeze(-1)
        if not len(asked):
            continue
        one = slice(row, row + 1)
        rows = kernel(q[one][:, :, asked], k[one][:, :, seen], v[one][:, :, seen], len(asked) > 1, scale, dropout)
        out[one, :, asked] = rows
    return out


def _texts(mask: Mask, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Each text's row and which of its positions (S,) it takes."""
    for row in range(rows):
        real = None if mask.padding is None else mask.padding[row]
        if mask.documents is None:
            assert real is not None
            yield row, real
            continue
        number = mask.documents[row if len(mask.documents) > 1 else 0]
        for document in number.unique():
            taken = number == document
            yield row, taken if real is None else taken & real.to(taken.device)


def _flash_kernel() -> FlashKernel:
    return _flash_attn_package if importlib.util.find_spec("flash_attn") else _torch_flash


def _flash_attn_package(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout: float) -> Tensor:
    import flash_attn

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = flash_attn.flash_attn_func(q, k, v, dropout_p=dropout, softmax_scale=scale, causal=causal)
    return out.transpose(1, 2)


def _torch_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout: float) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    # The last query sees the last key: bottom-right aligned, as in the flash_attn package.
    bias = causal_lower_right(q.shape[2], k.shape[2]) if causal else None
    groups = q.shape[1] // k.shape[1]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale, enable_gqa=groups > 1
        )


ATTENTION: dict[str, Attend] = {"eager": eager, "sdpa": sdpa, "flash_attention_2": flash_attention_2}


def check_available(implementation: str) -> None:
    """Raises where `implementation` is unknown or cannot run on this machine."""
    if implementation not in ATTENTION:
        raise InputError(f"attn_implementation is {implementation!r}; it must be one of {', '.join(ATTENTION)}")
    if implementation == "flash_attention_2" and not torch.cuda.is_available():
        raise MissingDependencyError(
            "flash_attention_2 needs a CUDA GPU and this machine shows none; use attn_implementation='sdpa'"
        )
