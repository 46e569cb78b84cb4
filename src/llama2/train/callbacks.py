"""Callbacks, which follow a run and may steer it: callbacks with transformers' events, the state and the control they
are given.

The trainer sets the switches of TrainerControl as the arguments say, then asks the callbacks, and acts on what is set.
"""

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from llama2.errors import CheckpointError, InputError
from llama2.files import write_text
from llama2.schema import ANY, FLAG, NUMBER, Schema, check, either, maybe, real, several, table, text, whole
from llama2.text_file import LISTING_BYTES, read_object

if TYPE_CHECKING:
    from llama2.train.arguments import TrainingArguments


@dataclass
class TrainerState:
    """How far a run has come; log_history is what was logged."""

    global_step: int = 0
    num_input_tokens_seen: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_global_step: int | None = None
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    epoch: float = 0.0
    max_steps: int = 0
    num_train_epochs: int = 0
    logging_steps: float = 500
    eval_steps: float | None = None
    save_steps: float = 500
    train_batch_size: int | None = None
    total_flos: float = 0.0
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)
    interval: dict[str, float] = field(default_factory=dict)  # sums since the last entry of the log

    # The names that the rest of the library uses.

    @property
    def step(self) -> int:
        """The steps that are done."""
        return self.global_step

    @step.setter
    def step(self, value: int) -> None:
        self.global_step = value

    @property
    def tokens(self) -> int:
        """The tokens of the rows that were trained on."""
        return self.num_input_tokens_seen

    @tokens.setter
    def tokens(self, value: int) -> None:
        self.num_input_tokens_seen = value

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged records."""
        return self.log_history

    @property
    def best_step(self) -> int | None:
        """The step with the best measured value."""
        return self.best_global_step

    @best_step.setter
    def best_step(self, value: int | None) -> None:
        self.best_global_step = value

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Self:
        """The state that a checkpoint holds; names of older checkpoints are read too."""
        old = {"step": "global_step", "tokens": "num_input_tokens_seen", "history": "log_history",
               "best_step": "best_global_step"}  # fmt: skip
        known = {f.name for f in fields(cls)}
        renamed = {old.get(name, name): value for name, value in content.items()}
        return cls(**{name: value for name, value in renamed.items() if name in known})

    def save_to_json(self, json_path: str | Path) -> None:
        """Writes the state as JSON."""
        write_text(json_path, json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")

    @classmethod
    def load_from_json(cls, json_path: str | Path) -> Self:
        """The state of a trainer_state.json."""
        return cls.of(read_stored(Path(json_path)))

    def compute_steps(self, args: "TrainingArguments", max_steps: int) -> None:
        """Sets how often to log, to measure and to save; a number below 1 is a share of max_steps."""
        self.max_steps = max_steps
        for name in ("logging_steps", "eval_steps", "save_steps"):
            every = getattr(args, name)
            setattr(self, name, math.ceil(max_steps * every) if every is not None and every < 1 else every)


_COUNT, _EVERY = whole(0, 2**62), real(0, 1e15)
# What trainer_state.json holds, of this state and of the run besides.
_STORED: Schema = {
    **dict.fromkeys(("global_step", "num_input_tokens_seen", "max_steps", "num_train_epochs", "place"), _COUNT),
    **dict.fromkeys(("step", "tokens"), _COUNT),
    **dict.fromkeys(("best_global_step", "best_step", "train_batch_size"), maybe(_COUNT)),
    **dict.fromkeys(("logging_steps", "save_steps", "total_flos", "epoch"), _EVERY),
    "eval_steps": maybe(_EVERY),
    "best_metric": maybe(NUMBER),
    **dict.fromkeys(("best_model_checkpoint", "trial_name"), maybe(text())),
    **dict.fromkeys(("log_history", "history"), several(table(ANY, 100_000), 10_000_000)),
    **dict.fromkeys(("is_local_process_zero", "is_world_process_zero", "is_hyper_param_search"), FLAG),
    "trial_params": maybe(table(ANY, 10_000)),
    "interval": table(NUMBER, 10_000),
    "stateful_callbacks": table(either(table(ANY, 100), several(table(ANY, 100), 1000)), 1000),
    "run": table(ANY, 100),
    "ranks": whole(1, 65536),
    "scale": real(0, 1e30),
    "plateau": maybe(table(ANY, 100)),
}


def read_stored(path: Path) -> dict[str, Any]:
    """The content of a trainer_state.json. Raises CheckpointError where it is malformed."""
    content = read_object(path, path.name, most=LISTING_BYTES)
    check(content, _STORED, path)
    return content


@dataclass
class TrainerControl:
    """Switches that callbacks set: what to do after this step, and whether to go on.

    should_log, should_evaluate and should_save are off again with each step, should_epoch_stop with each epoch.
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {"args": asdict(self), "attributes": {}}


EVENTS = ("on_init_end", "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_step_begin",
          "on_pre_optimizer_step", "on_optimizer_step", "on_substep_end", "on_step_end", "on_evaluate", "on_predict",
          "on_save", "on_log", "on_prediction_step", "on_push_begin")  # fmt: skip


class TrainerCallback:
    """Base class of callbacks. Every event gets args, state and control by place, and by name model,
    processing_class, optimizer, lr_scheduler, train_dataloader, eval_dataloader; on_log also logs, on_evaluate and
    on_predict metrics. An event may return the control that it was given, or another; None leaves it as it is.
    """

    def on_init_end(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """The trainer is made."""

    def on_train_begin(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """Before the first step."""

    def on_train_end(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """After the last step."""

    def on_epoch_begin(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """Before the first step of an epoch."""

    def on_epoch_end(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """After the last step of an epoch."""

    def on_step_begin(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """Before a step."""

    def on_pre_optimizer_step(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """Gradients are there and scaled, weights are not changed yet."""

    def on_optimizer_step(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """Weights are changed."""

    def on_substep_end(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """After each batch of a step but the last."""

    def on_step_end(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """After a step, before anything is logged, measured or saved."""

    def on_evaluate(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """Rows were measured."""

    def on_predict(
        self,
        args: "TrainingArguments",
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: object,
    ) -> TrainerControl | None:
        """`predict` is done."""

    def on_save(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """A checkpoint is written."""

    def on_log(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """An entry was logged."""

    def on_prediction_step(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """A batch was measured."""

    def on_push_begin(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl | None:
        """Before an upload to the hub."""


class EarlyStoppingCallback(TrainerCallback):
    """Ends the run after early_stopping_patience measurements in which metric_for_best_model was not better than the
    best so far by more than early_stopping_threshold."""

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0) -> None:
        if not isinstance(early_stopping_patience, int) or early_stopping_patience < 1:
            raise InputError(
                f"early_stopping_patience is {early_stopping_patience!r}; it must be a whole number, at least 1"
            )
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold or 0.0
        self.early_stopping_patience_counter = 0

    def on_train_begin(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Raises InputError where nothing is measured or no value says what is better."""
        if args.metric_for_best_model is None:
            raise InputError("EarlyStoppingCallback needs metric_for_best_model, such as 'loss'")
        if args.eval_strategy == "no":
            raise InputError("EarlyStoppingCallback needs rows to be measured; set eval_strategy to 'steps' or 'epoch'")
        if not args.load_best_model_at_end:
            warnings.warn(
                "EarlyStoppingCallback without load_best_model_at_end=True: the weights at the end are the last ones, "
                "not the best",
                stacklevel=2,
            )

    def on_evaluate(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts a measurement that is not better."""
        value = kwargs["metrics"].get(args.better)
        if value is None:
            warnings.warn(f"early stopping looks at {args.better}, which was not measured: it is off", stacklevel=2)
            return
        best = state.best_metric
        better = best is None or ((value > best) if args.greater_is_better else (value < best))
        if better and (best is None or abs(value - best) > self.early_stopping_threshold):
            self.early_stopping_patience_counter = 0
        else:
            self.early_stopping_patience_counter += 1
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {
            "args": {
                "early_stopping_patience": self.early_stopping_patience,
                "early_stopping_threshold": self.early_stopping_threshold,
            },
            "attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter},
        }


class PrinterCallback(TrainerCallback):
    """Prints what is logged."""

    def on_log(self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Prints the entry, on rank 0."""
        if state.is_local_process_zero:
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in kwargs["logs"].items()}
            print({k: v for k, v in shown.items() if k != "total_flos"})


class Callbacks:
    """The callbacks of a run, called in order."""

    def __init__(self, given: Iterable[Any]) -> None:
        self.all: list[TrainerCallback] = []
        for callback in given:
            self.add(callback)

    def add(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Adds a callback, or one made of a class. Raises InputError for anything without the events."""
        made = callback() if isinstance(callback, type) else callback
        if lost := [event for event in EVENTS if not callable(getattr(made, event, None))]:
            raise InputError(f"{made!r} is no callback: it has no {lost[0]}; derive it from TrainerCallback")
        if type(made) in map(type, self.all):
            warnings.warn(f"there is a {type(made).__name__} already; both are called", stacklevel=3)
        self.all.append(made)

    def find(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        """A callback that is this one, or of this class."""
        match = (lambda one: isinstance(one, callback)) if isinstance(callback, type) else callback.__eq__
        return next((one for one in self.all if match(one) is True), None)

    def call(
        self, event: str, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **given: object
    ) -> TrainerControl:
        """Calls an event of all, and returns the control that the last of them left."""
        for callback in self.all:
            found = getattr(callback, event)(args, state, control, **given)
            control = control if found is None else found
        return control

    def states(self) -> dict[str, Any]:
        """Returns the states of callbacks that have a state(), by class; a list where there are several."""
        found: dict[str, list[Any]] = {}
        for callback in self.all:
            if callable(getattr(callback, "state", None)):
                found.setdefault(type(callback).__name__, []).append(callback.state())  # type: ignore[attr-defined]
        return {name: kept[0] if len(kept) == 1 else kept for name, kept in found.items()}

    def restore(self, states: Mapping[str, Any]) -> None:
        """Gives callbacks back what a checkpoint kept of them."""
        for name, kept in states.items():
            mine = [callback for callback in self.all if type(callback).__name__ == name]
            for callback, state in zip(mine, kept if isinstance(kept, list) else [kept], strict=False):
                check(state, {"args": table(ANY, 1000), "attributes": table(ANY, 1000)}, f"the state of {name}")
                for key, value in {**state.get("args", {}), **state.get("attributes", {})}.items():
                    if hasattr(type(callback), key) and callable(getattr(type(callback), key)):
                        raise CheckpointError(f"the state of {name} has {key!r}, which is a method; it is damaged")
                    setattr(callback, key, value)


def due(every: float | None, step: int) -> bool:
    """Whether something is due that is done every so many steps."""
    return bool(every) and step % int(every or 1) == 0


def plan_step(args: "TrainingArguments", state: TrainerState, control: TrainerControl, last: bool) -> None:
    """Sets what the arguments say is due after a step. last: the run ends with it."""
    step, delayed = state.global_step, args.eval_delay > state.global_step
    if args.logging_strategy == "steps" and due(state.logging_steps, step):
        control.should_log = True
    if last or (step == 1 and args.logging_first_step):
        control.should_log = True
    if args.eval_strategy == "steps" and not delayed and (last or due(state.eval_steps, step)):
        control.should_evaluate = True
    if args.save_strategy == "steps" and (last or due(state.save_steps, step)):
        control.should_save = True


def plan_epoch(args: "TrainingArguments", state: TrainerState, control: TrainerControl) -> None:
    """Sets what the arguments say is due after an epoch, or at the end of the run."""
    control.should_log = control.should_log or args.logging_strategy == "epoch"
    if args.eval_strategy == "epoch" and args.eval_delay <= state.epoch:
        control.should_evaluate = True
    control.should_save = control.should_save or args.save_strategy == "epoch"
