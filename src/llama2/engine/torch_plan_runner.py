"""Runs plans with a torch module over pages kept as tensors, and tells which runner a torch module has."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from llama2 import cpu
from llama2.cache import DynamicCache
from llama2.engine.plan_runners import PAGE, NativePlanRunner, PlanRunner
from llama2.engine.scheduler import Chunk
from llama2.errors import InputError
from llama2.generation.arrays import to_numpy
from llama2.model import LlamaForCausalLM
from llama2.protocols import CausalLM
from llama2.runners.native import NativeModel, kept_in, native_weights, why_not


class TorchPlanRunner:
    """A LlamaForCausalLM on any device. Each chunk of a prompt runs alone; what decodes runs as one padded batch."""

    def __init__(self, model: CausalLM, pages: int) -> None:
        config = model.config
        self.model, self.pages = model, pages
        shape = (config.num_hidden_layers, 2, pages, PAGE, config.num_key_value_heads, config.head_dim)
        self._cached = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.bytes_per_page = self._cached[:, :, 0].nbytes
        self.limit_openmp: AbstractContextManager[None] = nullcontext()

    @torch.inference_mode()
    def step(self, chunks: Sequence[Chunk], adapters: Sequence[str | None]) -> list[np.ndarray]:
        """As PlanRunner.step. Raises InputError for adapters, which the native engine alone adds while it runs."""
        if any(name is not None for name in adapters):
            raise InputError(f"torch runs this model without adapters, but {adapters!r} are asked for; merge them")
        together = [chunk for chunk in chunks if len(chunk.tokens) == 1]
        found = {id(c): rows for c, rows in zip(together, self._batch(together), strict=True)} if together else {}
        for chunk in chunks:
            if len(chunk.tokens) > 1:
                (found[id(chunk)],) = self._batch([chunk])
        return [to_numpy(found[id(chunk)]) for chunk in chunks if chunk.wanted]

    def close(self) -> None:
        """Nothing to do."""

    def _batch(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Logits (wanted, V) of chunks of one length, padded on the left to the longest past."""
        device, new = self.model.device, len(chunks[0].tokens)
        longest = max(chunk.start for chunk in chunks)
        cache, mask = DynamicCache(), torch.ones((len(chunks), longest + new), dtype=torch.bool, device=device)
        if longest:
            past = torch.stack([self._past(chunk, longest) for chunk in chunks], dim=2)  # layers, 2, B, S, K, E
            for layer, (keys, values) in enumerate(past.transpose(3, 4)):
                cache.update(keys, values, layer)
            for row, chunk in zip(mask, chunks, strict=True):
                row[: longest - chunk.start] = False
        tokens = torch.tensor([chunk.tokens for chunk in chunks], device=device)
        positions = torch.tensor([list(range(c.start, c.start + new)) for c in chunks], device=device)
        keep = max(1, *(chunk.wanted for chunk in chunks))
        output = self.model(
            input_ids=tokens,
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        fresh = torch.stack(
            [torch.stack((layer.keys, layer.values))[..., longest:, :] for layer in cache.layers]
        ).transpose(3, 4)  # layers, 2, B, T, K, E
        for row, chunk in enumerate(chunks):
            self._keep(chunk, fresh[:, :, row])
        if not any(chunk.wanted for chunk in chunks):
            return [output.logits[0, :0]] * len(chunks)
        rows = output.logits.cpu()  # at once: tokens are picked from a few candidates of each row, on the CPU
        return [logits[keep - chunk.wanted :] for logits, chunk in zip(rows, chunks, strict=True)]

    def _past(self, chunk: Chunk, length: int) -> Tensor:
        """Keys and values (layers, 2, length, K, E) before a chunk, zeros first."""
        held = self._cached[:, :, chunk.sequence.pages].flatten(2, 3)[:, :, : chunk.start]
        return torch.nn.functional.pad(held, (0, 0, 0, 0, length - chunk.start, 0))

    def _keep(self, chunk: Chunk, fresh: Tensor) -> None:
        places = torch.arange(chunk.start, chunk.start + fresh.shape[2], device=fresh.device)
        pages = torch.tensor(chunk.sequence.pages, device=fresh.device)[places // PAGE]
        self._cached[:, :, pages, places % PAGE] = fresh


def runner_of(model: CausalLM, pages: int, runner: str, dtype: cpu.KvDtype | None, precision: str) -> PlanRunner:
    """As `plan_runners.make_plan_runner`, of a torch module: the native engine runs it in place where it can."""
    weights = None if runner == "torch" else native_weights(model)
    if weights is not None:
        return NativePlanRunner(weights, pages, dtype or kept_in(model), precision)
    if runner == "native" or isinstance(model, NativeModel):
        raise InputError(f"the native engine cannot run this model: {why_not(model)}; use runner='torch'")
    return TorchPlanRunner(model, pages)


def pooled_states(model: LlamaForCausalLM, rows: Sequence[Sequence[int]], pooling: str) -> list[np.ndarray]:
    """The "mean" or the "last" (D,) of the final hidden states of each text, float32.

    Texts of one length are one batch: none is padded, so that no vector depends on its neighbours' lengths.
    """
    of_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        of_length.setdefault(len(row), []).append(index)
    pooled: dict[int, np.ndarray] = {}
    for indices in of_length.values():
        states_BTD = final_states(model, [rows[index] for index in indices])
        pooled_BD = states_BTD.mean(1) if pooling == "mean" else states_BTD[:, -1]
        pooled.update(zip(indices, pooled_BD))
    return [pooled[index] for index in range(len(rows))]


@torch.inference_mode()
def final_states(model: LlamaForCausalLM, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """The final hidden states (B, T, D) of texts of one length, float32."""
    ids_BT = torch.tensor([list(row) for row in rows], device=model.device)
    states_BTD: np.ndarray = model.model(ids_BT).last_hidden_state.float().cpu().numpy()
    return states_BTD
