"""A module of torch behind `steps.MeasuredModel`."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from llama2 import cpu
from llama2.evaluate.steps import Ids, MeasuredModel
from llama2.runners.native import NativeRunner
from llama2.runners.padded import PaddedRunner, make_runner


class TorchMeasured:
    """See `steps.MeasuredModel`."""

    def __init__(self, model: Any, runner: PaddedRunner) -> None:
        self.model, self.runner = model, runner
        self.weights: cpu.CpuWeights | None = runner.weights if isinstance(runner, NativeRunner) else None

    @property
    def engine(self) -> str:
        """As MeasuredModel.engine."""
        return f"CPU {self.runner.isa}" if isinstance(self.runner, NativeRunner) else f"torch {self.model.device.type}"

    @property
    def cache_dtype(self) -> str:
        """As MeasuredModel.cache_dtype."""
        if isinstance(self.runner, NativeRunner):
            return self.runner.cache_dtype
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def weights_dtype(self) -> str:
        """As MeasuredModel.weights_dtype."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def threads(self) -> int:
        """As MeasuredModel.threads."""
        return torch.get_num_threads() if self.weights is None else int(self.weights.pool.size)

    def new_cache(self, rows: int, length: int) -> Any:
        """As MeasuredModel.new_cache."""
        return self.runner.new_cache(None, rows, length)

    def step(self, ids: Ids, positions: Ids, cache: Any, keep: int = 1) -> Any:
        """As MeasuredModel.step."""
        device = self.model.device
        tokens, places = torch.from_numpy(ids).to(device), torch.from_numpy(positions).to(device)
        return self.runner.step(tokens, places, None, cache, keep=keep)

    def wait(self) -> None:
        """As MeasuredModel.wait."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def scope(self) -> AbstractContextManager[Any]:
        """As MeasuredModel.scope."""
        return torch.inference_mode()


def torch_steps(
    model: Any, runner: str | PaddedRunner, cache_dtype: cpu.KvDtype | None, precision: str
) -> MeasuredModel:
    """As `steps.make_steps`, of a module of torch."""
    return TorchMeasured(model, make_runner(runner, model, cache_dtype=cache_dtype, precision=precision))
