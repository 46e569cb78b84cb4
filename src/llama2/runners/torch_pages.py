"""A torch module behind the runner contract: steps over pages of keys and values that are tensors.

L layers, P pages, K key-value heads, E head width, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llama2.cache import DynamicCache
from llama2.cpu import PAGE, CacheView
from llama2.errors import InputError
from llama2.generation.arrays import to_numpy
from llama2.protocols import CausalLM
from llama2.runners.contract import Ints


def new_pages(model: CausalLM, count: int) -> Tensor:
    """Empty pages (L, 2, P, PAGE, K, E) for a model, in its dtype and on its device."""
    config = model.config
    shape = (config.num_hidden_layers, 2, count, PAGE, config.num_key_value_heads, config.head_dim)
    return torch.zeros(shape, dtype=model.dtype, device=model.device)


class TorchPageRunner:
    """A LlamaForCausalLM on any device. Sequences of one new token run as one padded batch, longer ones alone."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model

    @torch.inference_mode()
    def step(
        self,
        tokens: Ints,
        positions: Ints,
        view: CacheView[Tensor],
        rows: Ints | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """As Runner.step. Raises InputError for adapters, which the native engine alone adds while it runs."""
        if any(name is not None for name in adapters or ()):
            raise InputError(f"torch runs this model without adapters, but {adapters!r} are asked for; merge them")
        logit_rows, counts = view.last if rows is None else rows, np.diff(view.starts)
        single = np.flatnonzero(counts == 1)
        groups = ([single] if len(single) else []) + [np.array([s]) for s in np.flatnonzero(counts > 1)]
        row_sequence = np.searchsorted(view.starts, logit_rows, side="right") - 1  # of each row its sequence
        logits: np.ndarray | None = None
        for sequences in groups:
            own = np.flatnonzero(np.isin(row_sequence, sequences))
            first_rows = view.starts[sequences]
            of_group = np.searchsorted(sequences, row_sequence[own])
            column = logit_rows[own] - first_rows[of_group]  # among the new tokens of its sequence
            new = int(counts[sequences[0]])
            keep = new - int(column.min()) if len(own) else 1
            token_rows = first_rows[:, None] + np.arange(new)
            computed = self._batch(tokens[token_rows], positions[token_rows], view, sequences, keep)
            if len(own):
                # At once: tokens are picked from a few candidates of each row, on the CPU.
                selected = to_numpy(computed[of_group, column - (new - keep)].cpu())
                logits = np.empty((len(logit_rows), selected.shape[1]), selected.dtype) if logits is None else logits
                logits[own] = selected
        return np.empty((0, self.model.config.vocab_size), np.float32) if logits is None else logits

    def _batch(
        self, tokens: Ints, positions: Ints, view: CacheView[Tensor], sequences: np.ndarray, keep: int
    ) -> Tensor:
        """Logits (B, keep, V) of sequences with as many new tokens (B, T), padded on the left to the longest past."""
        device, pasts, tables = self.model.device, view.past[sequences].tolist(), view.tables[sequences].tolist()
        longest = max(pasts)
        cache = DynamicCache()
        mask = torch.ones((len(pasts), longest + tokens.shape[1]), dtype=torch.bool, device=device)
        if longest:
            paddings = [longest - past for past in pasts]
            stored = torch.stack(
                [
                    _past(view.cache, table, past, padding)
                    for table, past, padding in zip(tables, pasts, paddings, strict=True)
                ],
                dim=2,
            )  # L, 2, B, S, K, E
            for layer, (keys, values) in enumerate(stored.transpose(3, 4)):
                cache.update(keys, values, layer)
            for row, padding in zip(mask, paddings, strict=True):
                row[:padding] = False
        output = self.model(
            input_ids=torch.from_numpy(tokens).to(device, torch.long),
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=torch.from_numpy(positions).to(device, torch.long),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        fresh = torch.stack(
            [torch.stack((layer.keys, layer.values))[..., longest:, :] for layer in cache.layers]
        ).transpose(3, 4)  # L, 2, B, T, K, E
        for row, (table, past) in enumerate(zip(tables, pasts, strict=True)):
            _keep(view.cache, table, past, fresh[:, :, row])
        logits: Tensor = output.logits
        return logits


def _past(pages: Tensor, table: list[int], past: int, padding: int) -> Tensor:
    """Keys and values (L, 2, padding + past, K, E) before a sequence's new tokens, zeros first."""
    stored = pages[:, :, table[: -(-past // PAGE)]].flatten(2, 3)[:, :, :past]
    return torch.nn.functional.pad(stored, (0, 0, 0, 0, padding, 0))


def _keep(pages: Tensor, table: list[int], past: int, fresh: Tensor) -> None:
    """Writes keys and values (L, 2, T, K, E) behind the `past` positions of a sequence."""
    positions = torch.arange(past, past + fresh.shape[2], device=fresh.device)
    numbers = torch.tensor(table, device=fresh.device)[positions // PAGE]
    pages[:, :, numbers, positions % PAGE] = fresh
