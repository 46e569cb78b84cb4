"""The one training loop. Objectives differ in how they make a batch and a loss of it, and in nothing else.

The order of rows is a function of seed, epoch and index, and the random numbers of a step are one of seed and step.
So a run that was killed and resumed ends with the same bits as one that was not, and several ranks, which share the
rows of each step, do what one does. All ranks go through the same calls; rank 0 alone writes and reports.
"""

import json
import math
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama2 import lora
from llama2.checkpoint.peft import save_adapter
from llama2.checkpoint.save import replacing
from llama2.errors import InputError
from llama2.lora_config import LoraConfig
from llama2.train import checkpoints, states
from llama2.train.arguments import TrainingArguments
from llama2.train.distributed import COMMAND, Root, gathered, join, local, shard
from llama2.train.heap import kept
from llama2.train.layer import fused
from llama2.train.objectives import Loss, Objective, keep_reference
from llama2.train.optim import AdamW, clip, learning_rate
from llama2.train.rows import objective_for
from llama2.train.tensorboard import Tensorboard

LOG = "log.jsonl"
LOSS_SCALE = 2.0**6  # that fp16 begins with, of a sum over a step's targets; halved where gradients overflow
PASS_TOKENS = 1024
EVAL_ROWS = 10_000  # of a stream, which may be endless


@dataclass
class TrainerState:
    """How far a run has come; `history` is what was logged."""

    step: int = 0
    tokens: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    best_metric: float | None = None

    # The names of transformers.

    @property
    def global_step(self) -> int:
        """The step."""
        return self.step

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """What was logged."""
        return self.history

    @property
    def training_loss(self) -> float:
        """The mean of the logged losses."""
        found = [entry["loss"] for entry in self.history if "loss" in entry]
        return sum(found) / max(len(found), 1)


_INSTEAD = {
    "data_collator": "the objective makes the batches: leave it out, or write an Objective of your own",
    "compute_metrics": "an Objective's loss() gives what is logged and measured",
    "callbacks": "report= is called with every step and measurement",
    "optimizers": "optim and lr_scheduler_type of the arguments choose them",
    "ref_model": "the reference is the model as it is now; another goes into Preferences(reference=model)",
    "formatting_func": "give rows in a shape that llama2.train.data knows",
}


class Trainer:
    """Trains `model` on `rows` for `objective`.

    Without an objective it is chosen by the model's class and the rows of train_dataset: see `rows.objective_for`, for
    which processing_class (or tokenizer) encodes texts. peft_config: a new adapter for the model. save: writes the
    model into a checkpoint's folder for others to load, such as `model.save_pretrained`. report: hears of every step.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: Objective | None = None,
        rows: Sequence[Any] = (),
        eval_rows: Sequence[Any] = (),
        save: Callable[[Path], Any] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
        *,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | None = None,
        processing_class: Any = None,
        tokenizer: Any = None,
        peft_config: LoraConfig | None = None,
        **others: Any,
    ) -> None:
        for name in others:
            raise InputError(f"Trainer has no {name!r}; {_INSTEAD.get(name, 'leave it out')}")
        if peft_config is not None:
            lora.add_adapter(model, peft_config)
        self.tokenizer = tokenizer if processing_class is None else processing_class
        if train_dataset is not None:
            most = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * join().world
            chosen, rows, _ = objective_for(model, train_dataset, self.tokenizer, most=most if most > 0 else None)
            objective = objective or chosen
        if eval_dataset is not None:
            eval_rows = objective_for(model, eval_dataset, self.tokenizer, most=EVAL_ROWS)[1]
            if not eval_rows:
                raise InputError("eval_dataset has no rows; leave it out, or give rows to measure on")
        if objective is None:
            raise InputError("there is nothing to train on; pass train_dataset=, or an objective and its rows")
        if not rows:
            raise InputError("there are no rows to train on")
        if args.fp16:
            _check_float16(model)
        if args.eval_strategy != "no" and args.load_best_model_at_end and not eval_rows:
            raise InputError("load_best_model_at_end needs rows to measure on (eval_dataset)")
        self.model, self.args, self.objective = model, args, objective
        self.rows, self.eval_rows, self._save_model, self._report = rows, eval_rows, save, report
        self.folder = Path(args.output_dir)
        self.state = TrainerState()
        self.ranks = join()
        self._narrow = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None
        if args.fsdp:
            keep_reference(objective, model, self.ranks.first, apart=True)
        self._root = self._shard()
        self.optimizer = AdamW(
            ((name, p) for name, p in model.named_parameters() if p.requires_grad),
            (args.adam_beta1, args.adam_beta2),
            args.adam_epsilon,
            args.weight_decay,
            masters=self._narrow is not None and self._root is None,
            kind=args.optim,
        )
        if self._narrow is not None and self._root is None:
            model.to(self._narrow)
        keep_reference(objective, model, self.ranks.first)
        self.scale = LOSS_SCALE if args.fp16 else 1.0
        self._sinks = [Tensorboard(self.folder, args.logging_dir) for _ in args.sinks() if self.ranks.first]
        self._stop = self._agreed = False

    def _shard(self) -> Root | None:
        """Weights that are the same on all ranks, and sharded where that is asked for."""
        self.ranks.match(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        if not self.args.fsdp:
            return None
        if not self.ranks.launched:
            raise InputError(f"fsdp is {self.args.fsdp!r}, and this is one process; start several with `{COMMAND}`")
        device = "cuda" if torch.cuda.is_available() and not self.args.use_cpu else "cpu"
        return shard(self.model, device, self._narrow)

    def gathered(self, every: bool = True) -> AbstractContextManager[None]:
        """Within it rank 0's model is whole, to be written: with all its weights, or with those that are trained.

        All ranks enter, where weights are sharded."""
        return gathered(self._root, self.ranks, every, self._narrow)

    # -- how long and in which order -----------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows of one step, of all ranks together."""
        args = self.args
        return args.per_device_train_batch_size * self.ranks.world * args.gradient_accumulation_steps

    @property
    def steps(self) -> int:
        """Steps of the whole run. The last batch of an epoch may be smaller."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(math.ceil(len(self.rows) / self.batch) * self.args.num_train_epochs)

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch."""
        return list(_order(self.args.seed, epoch, len(self.rows)))

    def _rows_of(self, step: int) -> list[Any]:
        epoch, place = divmod(step, math.ceil(len(self.rows) / self.batch))
        chosen = _order(self.args.seed, epoch, len(self.rows))[place * self.batch : (place + 1) * self.batch]
        return [self.rows[i] for i in chosen]

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainerState:
        """Trains to the end, or to a signal (SIGTERM, Ctrl-C), which saves first. Returns the state.

        With resume_from_checkpoint=True, here or in the arguments, the newest whole checkpoint of output_dir is taken
        up, if there is one; a path names one. A run that torchrun has started again does so unasked. Raises InputError
        where the loss is NaN or inf.
        """
        self._resume(self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint)
        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)  # type: ignore[operator]
        self.model.train()
        with self._signals(), fused(self.model), kept() as returned:
            if self.args.eval_on_start and self.eval_rows and self.state.step == 0:
                self._evaluated()
            first = self.state.step
            while self.state.step < self.steps and not self._ends:
                self._step()
                if self.state.step == first + 1:
                    returned()
        self.model.eval()
        there = self.ranks.told(lambda: checkpoints.found(self.folder))
        if (self.args.save_strategy != "no" or self._ends) and not (
            there and checkpoints.step_of(there[-1]) == self.state.step
        ):
            self.save()
        if self.args.load_best_model_at_end and self.state.best_step is not None and not self._ends:
            self._load_weights(self.folder / f"checkpoint-{self.state.best_step}")
        return self.state

    def _step(self) -> None:
        args, step, begin = self.args, self.state.step, time.perf_counter()
        own = f"/{self.ranks.rank}" if self.ranks.rank else ""  # what one rank drops another need not
        torch.manual_seed(random.Random(f"{args.seed}/step/{step}{own}").getrandbits(63))
        rows = self._rows_of(step)
        total, units, logs = self._losses(rows, self._at_once, learn=True)
        if not math.isfinite(total):
            raise InputError(
                f"the loss is {total} at step {step + 1}; float16 overflows where bfloat16 does not, a lower learning "
                "rate or max_grad_norm helps where it grew; the last checkpoint is kept"
            )
        trained = self.optimizer.parameters.values()
        if self._root is None:
            self.ranks.add_gradients(trained)
        self._divide(max(units, 1))
        sums = None if self._root is None else self.ranks.sums
        norm = clip(trained, args.max_grad_norm * self.scale, sums) / self.scale
        rate = learning_rate(step, self.steps, args.learning_rate, args.lr_scheduler_type, self._warmup())
        if args.fp16 and not math.isfinite(norm):  # the scaled gradients overflowed: leave the step out
            self.scale /= 2
            self.model.zero_grad(set_to_none=True)
        else:
            self.optimizer.step(rate, 1 / self.scale)
            self.scale *= 2 if args.fp16 and step % 2000 == 1999 else 1
        self.state.step += 1
        tokens = sum(map(self.objective.tokens, rows))
        self.state.tokens += tokens
        entry = {"loss": total / max(units, 1), "grad_norm": norm, "learning_rate": rate}
        entry |= {name: value / max(units, 1) for name, value in logs.items()}
        self._after(entry, tokens / (time.perf_counter() - begin))

    def _losses(self, rows: Sequence[Any], size: int, learn: bool) -> tuple[float, int, dict[str, float]]:
        """Sums over rows, of which each rank takes its share, `size` at once: losses, units, what is logged."""
        mine, total, units, logs = self.ranks.share(rows), 0.0, 0, dict[str, float]()
        for start in range(0, math.ceil(len(rows) / self.ranks.world), size):
            loss = self._loss(mine[start : start + size], rows)
            if learn:
                (loss.total * self.scale).backward()
            total, units = total + loss.total.item(), units + loss.units
            for name, value in loss.logs.items():
                logs[name] = logs.get(name, 0.0) + value
        total, count, stop, *values = self.ranks.sums([total, units, self._stop, *logs.values()])
        self._agreed = self._agreed or stop > 0
        return total, int(count), dict(zip(logs, values, strict=True))

    def _loss(self, rows: Sequence[Any], others: Sequence[Any]) -> Loss:
        """The loss of some rows. A rank that has none left runs another's for nothing, since ranks run in step."""
        batch = _to(self.objective.collate(rows or others[:1]), self.model)
        root = self._root
        loss = self.objective.loss(self.model, batch) if root is None else Loss(*root(self.objective, batch))
        return loss if rows else Loss(loss.total * 0.0, 0, dict.fromkeys(loss.logs, 0.0))

    @property
    def _ends(self) -> bool:
        """Whether the run was asked to stop, which ranks hear at different moments: they agree once a step."""
        return self._agreed if self.ranks.world > 1 else self._stop

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
        last = step == self.steps or self._ends
        if self._report is not None and self.ranks.first:
            self._report({"step": step, "steps": self.steps, "tokens_per_second": speed, **entry})
        if self._due(args.logging_strategy, args.logging_steps) or last:
            self._log({"step": step, "epoch": step * self.batch / len(self.rows), **entry, "tokens_per_second": speed})
        measures = self.eval_rows and args.eval_strategy != "no"
        if measures and (self._due(args.eval_strategy, args.eval_steps) or last):
            self._evaluated()
        if self._due(args.save_strategy, args.save_steps) or (last and (args.save_strategy != "no" or self._ends)):
            self.save()

    def _due(self, strategy: str | None, every: int | None) -> bool:
        if strategy == "epoch":
            every = math.ceil(len(self.rows) / self.batch)
        return strategy != "no" and self.state.step % (every or 1) == 0

    def _evaluated(self) -> None:
        found, args, state = self.evaluate(), self.args, self.state
        self._log({"step": state.step, **found})
        if args.load_best_model_at_end:
            if args.better not in found:
                raise InputError(
                    f"metric_for_best_model is {args.metric_for_best_model!r}; measured are {', '.join(found)}"
                )
            value = found[args.better]
            if state.step and (state.best_metric is None or (value > state.best_metric) == args.rising):
                state.best_step, state.best_metric = state.step, value
        if self._report is not None and self.ranks.first:
            self._report({"step": self.state.step, "steps": self.steps, **found})

    def _log(self, entry: dict[str, Any]) -> None:
        self.state.history.append(entry)
        if not self.ranks.first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(entry) + "\n")
        for sink in self._sinks:
            sink.write(entry)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss of the evaluation rows, and the means of what the objective logs."""
        if not self.eval_rows:
            raise InputError("there are no rows to measure on; give eval_dataset")
        training = self.model.training
        self.model.eval()
        total, units, logs = self._losses(self.eval_rows, self.args.per_device_eval_batch_size, learn=False)
        self.model.train(training)
        found = {f"eval_{name}": value / max(units, 1) for name, value in logs.items()}
        return {"eval_loss": total / max(units, 1), **found}

    def save_model(self, output_dir: str | None = None) -> None:
        """Writes the model, or its adapter, and the tokenizer to output_dir, or to that of the arguments."""
        folder, adapted = Path(output_dir or self.args.output_dir), bool(lora.names(self.model))
        with self.gathered(every=not adapted):
            if self.ranks.first and adapted:
                save_adapter(self.model, folder)
            elif self.ranks.first:
                self.model.save_pretrained(folder)  # type: ignore[operator]
            if self.ranks.first and self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
        self.ranks.wait()

    # -- interruption --------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ends the run after the step that is running, with a checkpoint. Asked twice, it ends at once and without."""
        if self._stop:
            raise KeyboardInterrupt
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
        step, ranks = self.state.step, self.ranks
        with ExitStack() as stack:
            made = ranks.told(lambda: stack.enter_context(checkpoints.writing(self.folder, step)))
            states.write(made, self.optimizer, ranks)
            if ranks.first:
                state = {**asdict(self.state), "run": self._identity(), "ranks": ranks.world, "scale": self.scale}
                (made / "trainer_state.json").write_text(json.dumps(state) + "\n")
            if self._save_model is not None:
                with self.gathered(every=not lora.names(self.model)):
                    if ranks.first:
                        self._save_model(made)
            ranks.wait()
        if self.args.save_total_limit and ranks.first:
            best = None if self.state.best_step is None else self.folder / f"checkpoint-{self.state.best_step}"
            checkpoints.prune(self.folder, self.args.save_total_limit, best)
        ranks.wait()
        return self.folder / f"checkpoint-{step}"

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for a run to be the same."""
        return {"rows": len(self.rows), "batch": self.batch, "seed": self.args.seed, "steps": self.steps}

    def _resume(self, wanted: bool | str | None) -> None:
        wanted = wanted or self.ranks.restarts > 0
        place = self.ranks.told(lambda: self._chosen(wanted))
        if place is None:
            return
        if not place.is_dir():
            raise InputError(
                f"rank {self.ranks.rank} does not see {place}; output_dir must be a folder of all machines"
            )
        content = json.loads((place / "trainer_state.json").read_text())
        self._keep_batch(content)
        if content["run"] != self._identity():
            raise InputError(
                f"{place} is of another run ({content['run']}) than this ({self._identity()}); give the same data, "
                "batch size, seed and length, or another output_dir"
            )
        weights, moments = states.read(place, self.optimizer)
        self._set(weights)
        self.scale = content.get("scale", 1.0)
        self.optimizer.load(moments)
        self.state = TrainerState(**{f.name: content[f.name] for f in fields(TrainerState) if f.name in content})
        if self.ranks.first:
            with replacing(self.folder / LOG) as file:  # without the steps that are taken again
                file.write("".join(json.dumps(entry) + "\n" for entry in self.state.history).encode())

    def _chosen(self, wanted: bool | str) -> Path | None:
        """The checkpoint to go on from."""
        checkpoints.sweep(self.folder)
        if not wanted:
            return None
        place = checkpoints.newest(self.folder) if wanted is True else Path(wanted)
        if place is not None and wanted is not True and (wrong := checkpoints.problem(place)):
            raise InputError(f"{place} cannot be resumed from: {wrong}")
        return place

    def _keep_batch(self, content: dict[str, Any]) -> None:
        """On another number of ranks than before, as many batches a step as make the same rows a step."""
        before, wanted, args = content.get("ranks", 1), content["run"]["batch"], self.args
        if before == self.ranks.world or wanted == self.batch:
            return
        times, rest = divmod(wanted, args.per_device_train_batch_size * self.ranks.world)
        if rest:
            raise InputError(
                f"the run took {wanted} rows a step on {before} ranks, which {self.ranks.world} ranks of "
                f"{args.per_device_train_batch_size} rows do not divide; start another number of ranks, or set "
                f"per_device_train_batch_size so that it times {self.ranks.world} divides {wanted}"
            )
        args.gradient_accumulation_steps = times

    def _load_weights(self, place: Path) -> None:
        self._set(states.read(place, self.optimizer, state=False)[0])

    @torch.no_grad()
    def _set(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.optimizer.parameters.items():
            local(parameter).copy_(weights[name])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """The order of an epoch, which every step of it asks for."""
    return tuple(random.Random(f"{seed}/{epoch}").sample(range(count), count))


def _check_float16(model: nn.Module) -> None:
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise InputError(
            f"fp16 needs a CUDA device, and the model is on {device}: use bf16=True there. Llama 2 was trained in "
            "bfloat16; in float16, whose largest number is 65,504, training it is known to end in NaN"
        )
    warnings.warn(
        "Llama 2 was trained in bfloat16; in float16 its activations may overflow and the loss become NaN. Use "
        "bf16=True where the device has it",
        stacklevel=3,
    )


def _to(batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
