"""Which runner the plans of a torch module have, and the hidden states of its texts."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llama2 import cpu
from llama2.engine.plan_runners import PlanRunner, native_plan_runner
from llama2.errors import InputError
from llama2.model import LlamaForCausalLM
from llama2.protocols import CausalLM
from llama2.runners.native import NativeModel, kept_in, native_weights, why_not
from llama2.runners.torch_pages import TorchPageRunner, new_pages


def torch_plan_runner(model: CausalLM, pages: int) -> PlanRunner[Tensor]:
    """Runs plans with the module itself, on its device."""
    cache = new_pages(model, pages)
    return PlanRunner(TorchPageRunner(model), cache, pages, cache.nbytes)


def runner_of(
    model: CausalLM, pages: int, runner: str, dtype: cpu.KvDtype | None, precision: str
) -> PlanRunner[Tensor] | PlanRunner[cpu.PagedCache]:
    """As `plan_runners.make_plan_runner`, of a torch module: the native engine runs it in place where it can."""
    weights = None if runner == "torch" else native_weights(model)
    if weights is not None:
        return native_plan_runner(weights, pages, dtype or kept_in(model), precision)
    if runner == "native" or isinstance(model, NativeModel):
        raise InputError(f"the native engine cannot run this model: {why_not(model)}; use runner='torch'")
    return torch_plan_runner(model, pages)


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
