"""Rows that hold several documents one behind the other: which token belongs to which, and who sees whom.

A packed row is told by any of three things, as in transformers: cu_seq_lens (where the documents begin, and where the
last ends), seq_idx (the number of each token's document), or position_ids that begin again at 0. No document sees
another, under every attention implementation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2.errors import InputError


def within(document_BT: Tensor) -> Tensor:
    """The mask (B, 1, T, T), True = sees, of tokens that see what is before them in their own document."""
    return (document_BT[:, :, None] == document_BT[:, None, :]).tril()[:, None]


def by_positions(position_ids_BT: Tensor, traced: bool) -> Tensor | None:
    """The documents (B, T) of rows whose positions go up by one and begin again at 0; None where no row does so.

    Positions of any other kind (gaps, padding, the same one everywhere) are positions, not documents: such a row is
    one. Where values cannot be looked at (`traced`) the numbers are given for every row.
    """
    begins = position_ids_BT[:, 1:] == 0
    follows = position_ids_BT.diff(dim=1) == 1
    packed = (begins | follows).all(1, keepdim=True) & begins.any(1, keepdim=True) & follows.any(1, keepdim=True)
    if not traced and not bool(packed.any()):
        return None
    return F.pad((begins & packed).cumsum(1), (1, 0))


def by_lengths(kwargs: dict[str, Any], rows: int, tokens: int, device: torch.device) -> Tensor | None:
    """The documents (B | 1, T) that cu_seq_lens_q (documents + 1,) or seq_idx (B | 1, T) name; both leave kwargs.

    Raises InputError where they do not cut one row of T tokens, and where keys are cut otherwise than queries.
    """
    begins, keys, number = (kwargs.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))
    begins = keys if begins is None else begins
    if begins is None:
        return None if number is None else _numbers(number, rows, tokens, device)
    begins = torch.as_tensor(begins, device=device)
    if keys is not None and not torch.equal(torch.as_tensor(keys, device=device), begins):
        raise InputError(
            "cu_seq_lens_k differs from cu_seq_lens_q; documents of a packed row begin with no cached keys"
        )
    told = begins.tolist() if begins.dim() == 1 else None
    if rows != 1 or not told or told[0] != 0 or told[-1] != tokens or sorted(told) != told:
        shown = (
            f"of shape {tuple(begins.shape)}" if told is None else str(told if len(told) < 9 else [*told[:8], "..."])
        )
        raise InputError(
            f"cu_seq_lens_q is {shown} for {rows} rows of {tokens} tokens; for one row it must go up from 0 to {tokens}"
        )
    return torch.searchsorted(begins, torch.arange(tokens, device=device, dtype=begins.dtype), right=True)[None] - 1


def _numbers(number: Any, rows: int, tokens: int, device: torch.device) -> Tensor:
    found = torch.as_tensor(number, device=device)
    if found.dim() != 2 or found.shape[0] not in (1, rows) or found.shape[1] != tokens:
        raise InputError(f"seq_idx has shape {tuple(found.shape)}; it must be ({rows}, {tokens})")
    return found


def positions_within(document_BT: Tensor) -> Tensor:
    """The place (B, T) of each token in its document, which begins where the number changes."""
    places = torch.arange(document_BT.shape[1], device=document_BT.device).expand_as(document_BT)
    begins = F.pad(document_BT.diff(dim=1) != 0, (1, 0))
    return places - places.masked_fill(~begins, 0).cummax(1).values
