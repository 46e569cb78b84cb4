"""Predictions and measures of them: batches through the model, results as arrays. Shapes and names are transformers'.

B rows of a batch, N rows in all.
"""

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.train.data import IGNORED

if TYPE_CHECKING:
    from llama2.train.arguments import TrainingArguments

Arrays = Any  # an array, or a tuple or list of arrays


class EvalPrediction:
    """Argument of compute_metrics: predictions and label_ids (N, ...), and inputs or losses where they are asked for.

    May be unpacked: `logits, labels = prediction`.
    """

    def __init__(self, predictions: Arrays, label_ids: Arrays, inputs: Arrays = None, losses: Arrays = None) -> None:
        self.predictions, self.label_ids, self.inputs, self.losses = predictions, label_ids, inputs, losses
        self.elements = (predictions, label_ids, *(x for x in (inputs, losses) if x is not None))

    def __iter__(self) -> Iterator[Arrays]:
        return iter(self.elements)

    def __getitem__(self, index: int) -> Arrays:
        if not 0 <= index < len(self.elements):
            raise IndexError(f"index {index}; there are {len(self.elements)} elements")
        return self.elements[index]


class EvalLoopOutput(NamedTuple):
    """Result of evaluation_loop."""

    predictions: Arrays
    label_ids: Arrays
    metrics: dict[str, float] | None
    num_samples: int | None


class PredictionOutput(NamedTuple):
    """Result of predict: predictions and label_ids (N, ...), rows of several lengths padded with -100."""

    predictions: Arrays
    label_ids: Arrays
    metrics: dict[str, float] | None


def speed(prefix: str, begin: float, rows: int, steps: int) -> dict[str, float]:
    """Seconds since `begin` (of time.perf_counter), and rows and steps per second."""
    seconds = max(time.perf_counter() - begin, 1e-9)
    return {
        f"{prefix}_runtime": round(seconds, 4),
        f"{prefix}_samples_per_second": round(rows / seconds, 3),
        f"{prefix}_steps_per_second": round(steps / seconds, 3),
    }


def detached(value: object) -> object:
    """Tensors on the CPU, without a graph; tuples and lists of them alike, None left out of tuples."""
    if isinstance(value, Tensor):
        found = value.detach().cpu()
        return found.float() if found.dtype in (torch.bfloat16, torch.float16) else found
    if isinstance(value, Mapping):
        return {name: detached(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return tuple(detached(one) for one in value if one is not None)
    return value


class Gathered:
    """Results of batches, one behind the other. concat: as one array, rows padded to the longest with -100; else a list
    with one for each batch."""

    def __init__(self, concat: bool = True) -> None:
        self._concat, self._parts = concat, list[Any]()

    def add(self, value: object) -> None:
        """One batch's tensor, or tuple of tensors."""
        if value is not None:
            self._parts.append(detached(value))

    def arrays(self) -> Arrays:
        """All of them, or None where there is none."""
        if not self._parts:
            return None
        if not self._concat:
            return [_array(part) for part in self._parts]
        return _joined(self._parts)


def _array(part: Any) -> Arrays:
    return tuple(map(_array, part)) if isinstance(part, tuple) else part.numpy()


def _joined(parts: Sequence[Any]) -> Arrays:
    if isinstance(parts[0], tuple):
        return tuple(_joined([part[i] for part in parts]) for i in range(len(parts[0])))
    if isinstance(parts[0], Mapping):
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}
    arrays = [np.atleast_1d(part.numpy()) for part in parts]
    if arrays[0].ndim > 1 and len({a.shape[1] for a in arrays}) > 1:
        longest = max(a.shape[1] for a in arrays)
        arrays = [_widened(a, longest) for a in arrays]
    return np.concatenate(arrays)


def _widened(array: np.ndarray, length: int) -> np.ndarray:
    pad = [(0, 0), (0, length - array.shape[1]), *[(0, 0)] * (array.ndim - 2)]
    return np.pad(array, pad, constant_values=IGNORED)


def plain(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Metrics as numbers of Python, their names behind the prefix."""
    found = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
    return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in found.items()}


def measure(
    batches: Iterable[Mapping[str, Any]],
    step: Callable[[Mapping[str, Any]], tuple[Any, Any, Any]],
    args: "TrainingArguments",
    compute_metrics: Callable[..., Mapping[str, Any]] | None,
    preprocess: Callable[[Any, Any], Any] | None,
    prefix: str,
    heard: Callable[[], None],
    main_input: str = "input_ids",
) -> EvalLoopOutput:
    """Runs all batches through `step` (loss, logits and labels of one) and measures what comes of them.

    The loss is the mean over rows of their batches' losses, as in transformers. heard: called after each batch.
    """
    kept = {name: Gathered(args.eval_do_concat_batches) for name in ("losses", "logits", "labels", "inputs")}
    metrics: dict[str, Any] = {}
    rows, weights = 0, list[tuple[float, int]]()
    coming = iter(batches)
    inputs = next(coming, None)
    while inputs is not None:
        after = next(coming, None)
        size = _rows_of(inputs)
        ids = inputs.get(main_input) if "inputs" in args.include_for_metrics else None
        loss, logits, labels = step(inputs)
        rows += size
        if loss is not None:
            weights.append((float(loss), size))
            kept["losses"].add(torch.full((size,), float(loss)))
        if logits is not None and preprocess is not None:
            logits = preprocess(logits, labels)
        if args.batch_eval_metrics and compute_metrics is not None and logits is not None and labels is not None:
            given = {"losses": loss if "loss" in args.include_for_metrics else None, "inputs": ids}
            metrics = dict(compute_metrics(EvalPrediction(logits, labels, **given), compute_result=after is None) or {})
        else:
            for name, value in (("logits", logits), ("labels", labels), ("inputs", ids)):
                kept[name].add(value)
        heard()
        inputs = after
    if not rows:
        raise InputError("there are no rows to measure on; give a set with usable rows")
    predictions, label_ids = kept["logits"].arrays(), kept["labels"].arrays()
    if compute_metrics is not None and predictions is not None and label_ids is not None:
        losses = kept["losses"].arrays() if "loss" in args.include_for_metrics else None
        metrics = dict(compute_metrics(EvalPrediction(predictions, label_ids, kept["inputs"].arrays(), losses)) or {})
    if weights:
        metrics[f"{prefix}_loss"] = sum(loss * size for loss, size in weights) / sum(size for _, size in weights)
    return EvalLoopOutput(predictions, label_ids, plain(metrics, prefix), rows)


def _rows_of(inputs: Mapping[str, Any]) -> int:
    return next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 1)


def check_metrics(args: "TrainingArguments", compute_metrics: Callable[..., Any] | None) -> None:
    """Raises InputError where batches are measured one by one by a function that cannot tell the last."""
    if compute_metrics is None or not args.batch_eval_metrics:
        return
    if "compute_result" not in inspect.signature(compute_metrics).parameters:
        raise InputError("batch_eval_metrics needs compute_metrics(prediction, compute_result); add that argument")
