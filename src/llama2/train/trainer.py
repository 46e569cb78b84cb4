"""The one training loop. Objectives differ in how they make a batch and a loss of it, and in nothing else.

The order of rows is a function of seed, epoch and index, and the random numbers of a step are one of seed and step.
So a run that was killed and resumed ends with the same bits as one that was not.
"""

import json
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama2.checkpoint.hf import map_safetensors
from llama2.checkpoint.save import write_safetensors
from llama2.errors import InputError
from llama2.train import checkpoints
from llama2.train.layer import fused
from llama2.train.objectives import Objective
from llama2.train.optim import OPTIMIZERS, SCHEDULES, AdamW, clip, learning_rate

LOG = "log.jsonl"
PASS_TOKENS = 512


@dataclass(kw_only=True)
class TrainingArguments:
    """How to train, with the names and defaults of transformers.TrainingArguments where it has them."""

    output_dir: str
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    num_train_epochs: float = 3.0
    max_steps: int = -1
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int = 500
    save_total_limit: int | None = None
    seed: int = 42
    optim: str = "adamw_torch"
    bf16: bool = False
    gradient_checkpointing: bool = False
    resume_from_checkpoint: bool | str | None = None

    def __post_init__(self) -> None:
        positive = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                    "logging_steps", "save_steps")  # fmt: skip
        for name in positive:
            if not getattr(self, name) >= 1:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be at least 1")
        for name in ("learning_rate", "num_train_epochs"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a positive number")
        if self.optim not in OPTIMIZERS:
            raise InputError(f"optim is {self.optim!r}; it must be one of {', '.join(OPTIMIZERS)}")
        if self.lr_scheduler_type not in SCHEDULES:
            raise InputError(
                f"lr_scheduler_type is {self.lr_scheduler_type!r}; it must be one of {', '.join(SCHEDULES)}"
            )


@dataclass
class TrainerState:
    """How far a run has come; `history` is what was logged."""

    step: int = 0
    tokens: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains `model` on `rows` for `objective`.

    save: writes the model into a checkpoint's folder for others to load, such as `model.save_pretrained`. report: hears
    of every step. bf16 computes in bfloat16 and updates float32 copies of the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: Objective,
        rows: Sequence[Any],
        eval_rows: Sequence[Any] = (),
        save: Callable[[Path], Any] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        if not rows:
            raise InputError("there are no rows to train on")
        self.model, self.args, self.objective = model, args, objective
        self.rows, self.eval_rows, self._save_model, self._report = rows, eval_rows, save, report
        self.folder = Path(args.output_dir)
        self.state = TrainerState()
        self.optimizer = AdamW(
            ((name, p) for name, p in model.named_parameters() if p.requires_grad),
            (args.adam_beta1, args.adam_beta2),
            args.adam_epsilon,
            args.weight_decay,
            masters=args.bf16,
            kind=args.optim,
        )
        if args.bf16:
            model.to(torch.bfloat16)
        self._stop = False

    # -- how long and in which order -----------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows of one step."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    @property
    def steps(self) -> int:
        """Steps of the whole run. The last batch of an epoch may be smaller."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(math.ceil(len(self.rows) / self.batch) * self.args.num_train_epochs)

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch."""
        return random.Random(f"{self.args.seed}/{epoch}").sample(range(len(self.rows)), len(self.rows))

    def _rows_of(self, step: int) -> list[Any]:
        epoch, place = divmod(step, math.ceil(len(self.rows) / self.batch))
        chosen = self.order(epoch)[place * self.batch : (place + 1) * self.batch]
        return [self.rows[i] for i in chosen]

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> TrainerState:
        """Trains to the end, or to a signal (SIGTERM, Ctrl-C), which saves first. Returns the state.

        With resume_from_checkpoint=True the newest whole checkpoint of output_dir is taken up, if there is one; a path
        names one. Raises InputError where the loss is NaN or inf.
        """
        self._resume()
        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()  # type: ignore[operator]
        self.model.train()
        with self._signals(), fused(self.model):
            while self.state.step < self.steps and not self._stop:
                self._step()
        self.model.eval()
        if (
            not checkpoints.found(self.folder)
            or checkpoints.step_of(checkpoints.found(self.folder)[-1]) != self.state.step
        ):
            self.save()
        return self.state

    def _step(self) -> None:
        args, step, begin = self.args, self.state.step, time.perf_counter()
        torch.manual_seed(random.Random(f"{args.seed}/step/{step}").getrandbits(63))
        rows, size = self._rows_of(step), self._at_once
        total, units, logs = 0.0, 0, dict[str, float]()
        for start in range(0, len(rows), size):
            batch = self.objective.collate(rows[start : start + size])
            loss = self.objective.loss(self.model, _to(batch, self.model))
            loss.total.backward()
            total, units = total + loss.total.item(), units + loss.units
            for name, value in loss.logs.items():
                logs[name] = logs.get(name, 0.0) + value
        if not math.isfinite(total):
            raise InputError(
                f"the loss is {total} at step {step + 1}; float16 overflows where bfloat16 does not, a lower learning "
                "rate or max_grad_norm helps where it grew; the last checkpoint is kept"
            )
        self._divide(max(units, 1))
        norm = clip(self.optimizer.parameters.values(), args.max_grad_norm)
        rate = learning_rate(step, self.steps, args.learning_rate, args.lr_scheduler_type, self._warmup())
        self.optimizer.step(rate)
        self.state.step += 1
        tokens = sum(map(self.objective.tokens, rows))
        self.state.tokens += tokens
        entry = {"loss": total / max(units, 1), "grad_norm": norm, "learning_rate": rate}
        entry |= {name: value / max(units, 1) for name, value in logs.items()}
        self._after(entry, tokens / (time.perf_counter() - begin))

    @property
    def _at_once(self) -> int:
        """Rows of one pass: those of a device, but on a CPU no more than PASS_TOKENS where gradients add up in float32.

        Losses are sums and are divided once, so that the gradient is that of the whole batch; more at once would be no
        faster on a CPU and takes memory by the token.
        """
        size = self.args.per_device_train_batch_size
        trained = self.optimizer.parameters.values()
        if any(p.device.type != "cpu" or p.itemsize < 4 for p in trained):
            return size
        longest = max(map(self.objective.tokens, self.rows[:256]))
        return min(size, max(1, PASS_TOKENS // longest))

    def _divide(self, units: int) -> None:
        """Gradients of the sum become those of the mean over all targets of the step."""
        for parameter in self.optimizer.parameters.values():
            if parameter.grad is not None:
                parameter.grad.div_(units)

    def _warmup(self) -> int:
        return self.args.warmup_steps or math.ceil(self.args.warmup_ratio * self.steps)

    def _after(self, entry: dict[str, Any], speed: float) -> None:
        args, step = self.args, self.state.step
        last = step == self.steps or self._stop
        if self._report is not None:
            self._report({"step": step, "steps": self.steps, "tokens_per_second": speed, **entry})
        if step % args.logging_steps == 0 or last:
            self._log({"step": step, "epoch": step * self.batch / len(self.rows), **entry, "tokens_per_second": speed})
        if self.eval_rows and args.eval_steps and (step % args.eval_steps == 0 or last):
            self._log({"step": step, **self.evaluate()})
        if step % args.save_steps == 0 or last:
            self.save()

    def _log(self, entry: dict[str, Any]) -> None:
        self.state.history.append(entry)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(entry) + "\n")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss of the evaluation rows, and the means of what the objective logs."""
        training, size = self.model.training, self.args.per_device_eval_batch_size
        self.model.eval()
        total, units, logs = 0.0, 0, dict[str, float]()
        for start in range(0, len(self.eval_rows), size):
            batch = self.objective.collate(self.eval_rows[start : start + size])
            loss = self.objective.loss(self.model, _to(batch, self.model))
            total, units = total + loss.total.item(), units + loss.units
            for name, value in loss.logs.items():
                logs[name] = logs.get(name, 0.0) + value
        self.model.train(training)
        found = {f"eval_{name}": value / max(units, 1) for name, value in logs.items()}
        return {"eval_loss": total / max(units, 1), **found}

    # -- interruption --------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ends the run after the step that is running, with a checkpoint."""
        self._stop = True

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, lambda *_: self.stop()) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Writes a checkpoint of this step and removes the oldest beyond save_total_limit."""
        with checkpoints.writing(self.folder, self.state.step) as made:
            with (made / "trainable.safetensors").open("wb") as file:
                write_safetensors(file, dict(self.optimizer.parameters))
            with (made / "optimizer.safetensors").open("wb") as file:
                write_safetensors(file, self.optimizer.state())
            (made / "trainer_state.json").write_text(json.dumps({**asdict(self.state), "run": self._identity()}) + "\n")
            if self._save_model is not None:
                self._save_model(made)
        if self.args.save_total_limit:
            checkpoints.prune(self.folder, self.args.save_total_limit)
        return self.folder / f"checkpoint-{self.state.step}"

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for a run to be the same."""
        return {"rows": len(self.rows), "batch": self.batch, "seed": self.args.seed, "steps": self.steps}

    def _resume(self) -> None:
        wanted = self.args.resume_from_checkpoint
        if not wanted:
            return
        place = checkpoints.newest(self.folder) if wanted is True else Path(wanted)
        if place is None:
            return
        if wrong := checkpoints.problem(place):
            raise InputError(f"{place} cannot be resumed from: {wrong}")
        content = json.loads((place / "trainer_state.json").read_text())
        if content["run"] != self._identity():
            raise InputError(
                f"{place} is of another run ({content['run']}) than this ({self._identity()}); give the same data, "
                "batch size, seed and length, or another output_dir"
            )
        weights = map_safetensors(place / "trainable.safetensors")
        with torch.no_grad():
            for name, parameter in self.optimizer.parameters.items():
                parameter.copy_(weights[name])
        self.optimizer.load(map_safetensors(place / "optimizer.safetensors"))
        self.state = TrainerState(content["step"], content["tokens"], content["history"])


def _to(batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
