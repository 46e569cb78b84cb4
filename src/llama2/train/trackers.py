"""Trackers of experiments: what is logged goes to TensorBoard, Weights & Biases, MLflow or trackio. No torch at import.

One row a tracker: its package, and a class whose `write` takes an entry and whose `close` ends the run.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from llama2.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from llama2.train.arguments import TrainingArguments


class Sink(Protocol):
    """One tracker of one run."""

    def write(self, entry: dict[str, Any]) -> None:
        """One logged entry, with its step."""

    def close(self) -> None:
        """The run is over."""


def _scalars(entry: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers, under transformers' names: eval/loss, train/loss."""
    found = {}
    for name, value in entry.items():
        if name != "step" and isinstance(value, int | float):
            part, _, rest = name.partition("_")
            found[f"{part}/{rest}" if part in ("eval", "test") and rest else f"train/{name}"] = float(value)
    return found


class Tensorboard:
    """TensorBoard's event files, in output_dir/runs or in logging_dir."""

    def __init__(self, args: "TrainingArguments") -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(args.logging_dir or str(Path(args.output_dir) / "runs"))

    def write(self, entry: dict[str, Any]) -> None:
        """As Sink.write."""
        for name, value in _scalars(entry).items():
            self._writer.add_scalar(name, value, entry["step"])
        self._writer.flush()

    def close(self) -> None:
        """As Sink.close."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, in the project that its environment names."""

    def __init__(self, args: "TrainingArguments") -> None:
        import wandb

        self._own = wandb.run is None
        if self._own:
            wandb.init(name=args.run_name, config=args.to_sanitized_dict())
        self._wandb: ModuleType = wandb

    def write(self, entry: dict[str, Any]) -> None:
        """As Sink.write."""
        self._wandb.log({**_scalars(entry), "train/global_step": entry["step"]})

    def close(self) -> None:
        """As Sink.close; a run that the caller has begun stays open."""
        if self._own:
            self._wandb.finish()


class Mlflow:
    """A run of MLflow."""

    def __init__(self, args: "TrainingArguments") -> None:
        import mlflow

        self._own = mlflow.active_run() is None
        if self._own:
            mlflow.start_run(run_name=args.run_name)
        values = list(args.to_sanitized_dict().items())
        for start in range(0, len(values), 100):  # MLflow takes 100 at once, of at most 500 characters
            mlflow.log_params({k: str(v)[:500] for k, v in values[start : start + 100]})
        self._mlflow: ModuleType = mlflow

    def write(self, entry: dict[str, Any]) -> None:
        """As Sink.write."""
        self._mlflow.log_metrics(_scalars(entry), step=entry["step"])

    def close(self) -> None:
        """As Sink.close; a run that the caller has begun stays open."""
        if self._own:
            self._mlflow.end_run()


class Trackio:
    """A run of trackio, in `project`."""

    def __init__(self, args: "TrainingArguments") -> None:
        import trackio

        given = {"name": args.run_name, "config": args.to_sanitized_dict()}
        if args.trackio_space_id is not None:
            given["space_id"] = args.trackio_space_id
        trackio.init(project=args.project, **given)
        self._trackio: ModuleType = trackio

    def write(self, entry: dict[str, Any]) -> None:
        """As Sink.write."""
        self._trackio.log({**_scalars(entry), "train/global_step": entry["step"]})

    def close(self) -> None:
        """As Sink.close."""
        self._trackio.finish()


class Tracker(NamedTuple):
    """One row: the module that must be there, how to get it, and what makes a sink of the arguments."""

    module: str
    install: str
    make: Callable[[Any], Sink]


TRACKERS = {
    "tensorboard": Tracker("tensorboard", "pip install 'llama2[train]'", Tensorboard),
    "wandb": Tracker("wandb", "pip install wandb", Wandb),
    "mlflow": Tracker("mlflow", "pip install mlflow", Mlflow),
    "trackio": Tracker("trackio", "pip install trackio", Trackio),
}


def sinks_of(report_to: str | Sequence[str] | None) -> list[str]:
    """The trackers that report_to names: "none", "all" that are installed, a name or a list of names.

    Raises InputError for a name that is not known, MissingDependencyError where its package is not installed.
    """
    given = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if given == ["all"]:
        return [name for name, tracker in TRACKERS.items() if _there(tracker.module)]
    for name in given:
        if name not in (*TRACKERS, "none"):
            raise InputError(
                f"report_to is {name!r}; it must be one of {', '.join(('none', 'all', *TRACKERS))} (log.jsonl is "
                "always written)"
            )
    names = [name for name in given if name != "none"]
    for name in names:
        if not _there(TRACKERS[name].module):
            raise MissingDependencyError(
                f"report_to={name!r} needs the package {TRACKERS[name].module}: {TRACKERS[name].install}"
            )
    return names


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module without a spec, or one that was blocked
        return False
