"""The steps of a run: which rows, their loss and gradients, the update, and what is due after it.

Steps go by the objective, which needs no whole logits, or by transformers' methods where one of them is overridden.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from llama2.errors import CheckpointError, InputError
from llama2.model import LlamaForCausalLM
from llama2.pretrained import PreTrainedModel
from llama2.quantization.gguf import GgufLinear
from llama2.train.callbacks import plan_epoch, plan_step
from llama2.train.encoding import CLASSIFIERS, Encoder
from llama2.train.hooks import MEASURES, TRAINS, Hooks, accepts, overridden
from llama2.train.objectives import Classification, Loss, NextToken, Objective
from llama2.train.optim import clip, trained
from llama2.train.saving import Saving, grouped, order_of
from llama2.train.schedules import learning_rate

PASS_TOKENS = 1024


class Found(NamedTuple):
    """Measures of a step's gradients: the mean loss, means of what is logged besides, and tokens."""

    loss: float
    logs: dict[str, float]
    tokens: int


class Loop(Hooks, Saving):
    """The part of a trainer that takes steps."""

    encoder: Encoder
    eval_rows: Any
    is_in_train = False
    _agreed = False
    _in_epoch = False
    _plateau: ReduceLROnPlateau | None = None
    _report: Callable[[dict[str, Any]], None] | None = None
    _loader: DataLoader[Any] | None = None
    _coming: Iterator[Any] | None = None
    _order: tuple[int, list[int]] | None = None
    _losses_of_call: list[float]

    # -- how long and in which order -----------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows of one step, of all ranks together."""
        args = self.args
        return int(args.per_device_train_batch_size * self.ranks.world * args.gradient_accumulation_steps)

    @property
    def _batches(self) -> int:
        """Batches of an epoch on each rank."""
        if self._loader is not None:
            return len(self._loader)
        parts = len(self.rows) / (self.args.per_device_train_batch_size * self.ranks.world)
        return max(math.floor(parts) if self.args.dataloader_drop_last else math.ceil(parts), 1)

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch. The last one's batch may be smaller."""
        return max(math.ceil(self._batches / self.args.gradient_accumulation_steps), 1)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        return math.ceil(self.epoch_steps * self.args.num_train_epochs)

    @property
    def first_epoch(self) -> int:
        """The epoch that the run is in."""
        return self.place // self.epoch_steps

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch."""
        args, count = self.args, len(self.rows)
        if args.train_sampling_strategy == "sequential":
            return list(range(count))
        found = list(order_of(args.seed if args.data_seed is None else args.data_seed, epoch, count))
        if args.train_sampling_strategy == "group_by_length":
            found = grouped(found, self.encoder.lengths(self.rows), self.batch)
        return found

    def _rows_of(self, step: int) -> list[Any]:
        epoch, place = divmod(step, self.epoch_steps)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self.order(epoch))
        order = self._order[1]
        if self.args.dataloader_drop_last:
            order = order[: self._batches * self.args.per_device_train_batch_size * self.ranks.world]
        return [self.rows[i] for i in order[place * self.batch : (place + 1) * self.batch]]

    @property
    def _ends(self) -> bool:
        """Whether the run was asked to stop, which ranks receive at different moments: they agree once a step."""
        return self._agreed if self.ranks.world > 1 else self._stop

    @property
    def _complete(self) -> bool:
        """Whether all steps are done, or all epochs where a callback has ended one early."""
        state = self.state
        return state.global_step >= state.max_steps or self.place >= self.epoch_steps * state.num_train_epochs

    @property
    def _goes_on(self) -> bool:
        return not (self._ends or self.control.should_training_stop or self._complete)

    @cached_property
    def _size(self) -> int:
        """Weights that multiply, for the operations of a token."""
        count = getattr(self.network, "num_parameters", None)
        return int(count(exclude_embeddings=True)) if count else sum(p.numel() for p in self.network.parameters())

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        """Returns the trainable parameters, by name."""
        return trained(self.network)

    # -- which way -----------------------------------------------------------------------------------------------

    def _by_hand(self, names: Iterable[str]) -> bool:
        """Whether batches must go through the model's own forward pass and transformers' methods."""
        asked = self.args.label_smoothing_factor > 0 or self.compute_loss_func is not None or self.encoder.raw
        own = isinstance(self.objective, NextToken | Classification)
        return asked or (own and not _plain(self.network)) or overridden(self, names, Loop)

    @property
    def _trains_by_hand(self) -> bool:
        return bool(self.args.neftune_noise_alpha) or self._by_hand(TRAINS)

    @property
    def _measures_by_hand(self) -> bool:
        return self.compute_metrics is not None or self._by_hand(MEASURES)

    # -- one step ------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        args, state, begin = self.args, self.state, time.perf_counter()
        own = f"/{self.ranks.rank}" if self.ranks.rank else ""  # what one rank drops another need not
        torch.manual_seed(random.Random(f"{args.seed}/step/{state.global_step}{own}").getrandbits(63))
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        if not self._in_epoch:
            self._in_epoch, self.control.should_epoch_stop = True, False
            self._call("on_epoch_begin")
        self._call("on_step_begin")
        found = self._by_methods() if self._trains_by_hand else self._by_objective()
        if not math.isfinite(found.loss):
            raise InputError(
                f"the loss is {found.loss} at step {state.global_step + 1}; float16 overflows where bfloat16 does not, "
                "a lower learning rate or max_grad_norm helps where it grew; the last checkpoint is kept"
            )
        entry = {"loss": found.loss, **self._update(), **found.logs}
        state.global_step += 1
        self.place += 1
        state.num_input_tokens_seen += found.tokens
        state.total_flos += 6.0 * found.tokens * self._size
        batches = ((self.place - 1) % self.epoch_steps + 1) * args.gradient_accumulation_steps
        state.epoch = (self.place - 1) // self.epoch_steps + min(batches, self._batches) / self._batches
        self._after(entry, found.tokens, time.perf_counter() - begin)

    def _update(self) -> dict[str, float]:
        """The optimiser's part of a step, from gradients that are the whole step's mean."""
        args, step = self.args, self.state.global_step
        sums = None if self._root is None else self.ranks.sums
        norm = clip(self.updates.parameters.values(), args.max_grad_norm * self.scale, sums) / self.scale
        rate = self._rate(step)
        self._call("on_pre_optimizer_step")
        if args.fp16 and not math.isfinite(norm):  # the scaled gradients overflowed: leave the step out
            self.scale /= 2
            self.network.zero_grad(set_to_none=True)
        else:
            self.updates.step(rate, 1 / self.scale)
            self.scale *= 2 if args.fp16 and step % 2000 == 1999 else 1
        self._call("on_optimizer_step")
        if self._outside and self.lr_scheduler is not None and not isinstance(self.lr_scheduler, ReduceLROnPlateau):
            self.lr_scheduler.step()
        return {"grad_norm": norm, "learning_rate": rate}

    def _rate(self, step: int) -> float:
        if self._outside:
            return float(self.optimizer.param_groups[0]["lr"])
        if self._plateau is not None:
            return float(self._plateau.optimizer.param_groups[0]["lr"])
        args, total = self.args, self.steps
        warmup = args.get_warmup_steps(total)
        return learning_rate(step, total, args.learning_rate, args.lr_scheduler_type, warmup, args.lr_scheduler_kwargs)

    # -- by the objective ----------------------------------------------------------------------------------------

    def _by_objective(self) -> Found:
        """Gradients of the objective's loss over the rows of a step."""
        rows = self._rows_of(self.place)
        total, units, logs = self._losses(rows, self._at_once, learn=True)
        if self._root is None:
            self.ranks.add_gradients(self.updates.parameters.values())
        self._divide(max(units, 1))
        means = {name: value / max(units, 1) for name, value in logs.items()}
        return Found(total / max(units, 1), means, sum(map(self.objective.tokens, rows)))

    def _losses(self, rows: Sequence[Any], size: int, learn: bool) -> tuple[float, int, dict[str, float]]:
        """Sums over rows, of which each rank takes its share, `size` at once: losses, units, what is logged."""
        if (before := getattr(self.objective, "before", None)) is not None:
            self.objective.take(self._mean(before, rows, size))
        mine, total, units, logs = self.ranks.share(rows), 0.0, 0, dict[str, float]()
        device, most = self.args.per_device_train_batch_size, math.ceil(len(rows) / self.ranks.world)
        for start in range(0, most, size):
            loss = self._loss(mine[start : start + size], rows, self.objective)
            if learn:
                (loss.total * self.scale).backward()
                for _ in range(start // device, min(start + size, most - 1) // device):
                    self._call("on_substep_end")
            total, units = total + loss.total.item(), units + loss.units
            for name, value in loss.logs.items():
                logs[name] = logs.get(name, 0.0) + value
        total, count, stop, *values = self.ranks.sums([total, units, self._stop, *logs.values()])
        self._agreed = self._agreed or stop > 0
        return total, int(count), dict(zip(logs, values, strict=True))

    @torch.no_grad()
    def _mean(self, objective: Objective, rows: Sequence[Any], size: int) -> float:
        """The mean of an objective's loss over rows of all ranks."""
        mine, most = self.ranks.share(rows), math.ceil(len(rows) / self.ranks.world)
        found = [self._loss(mine[start : start + size], rows, objective) for start in range(0, most, size)]
        total, units = self.ranks.sums([sum(one.total.item() for one in found), sum(one.units for one in found)])
        return total / max(units, 1)

    def _loss(self, rows: Sequence[Any], others: Sequence[Any], objective: Objective) -> Loss:
        """The loss of some rows. A rank that has none left runs another's for nothing, since ranks run in step."""
        batch = self._prepare_inputs(objective.collate(rows or others[:1]))
        root = self._root
        loss = objective.loss(self.network, batch) if root is None else Loss(*root(objective, batch))
        return loss if rows else Loss(loss.total * 0.0, 0, dict.fromkeys(loss.logs, 0.0))

    @property
    def _at_once(self) -> int:
        """Rows of one pass: those of a device, but on a CPU no more than PASS_TOKENS where gradients add up in float32.

        Losses are sums and are divided once, so that the gradient is that of the whole batch; more at once would be no
        faster on a CPU and takes memory by the token.
        """
        size = int(self.args.per_device_train_batch_size)
        trained = self.updates.parameters.values()
        if any(p.device.type != "cpu" or p.itemsize < 4 for p in trained):
            return size
        longest = max(map(self.objective.tokens, self.rows[:256]))
        return min(size, max(1, PASS_TOKENS // longest))

    def _divide(self, units: int) -> None:
        """Gradients of the sum become those of the mean over all targets of the step."""
        for parameter in self.updates.parameters.values():
            if parameter.grad is not None:
                parameter.grad.div_(units)

    # -- by transformers' methods --------------------------------------------------------------------------------

    def _by_methods(self) -> Found:
        """Gradients of training_step over the batches of a step."""
        batches = self._next_batches()
        items = self._all_items(batches)
        if idle := not batches:  # of the last step of an epoch: ranks run in step
            batches = [self._inputs(self._rows_of(self.place)[:1])]
        self.current_gradient_accumulation_steps = len(batches)
        given = (items,) if accepts(self.training_step, "num_items_in_batch") else ()
        total, tokens = 0.0, 0
        for number, inputs in enumerate(batches):
            ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
            counted = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else ids
            if isinstance(counted, torch.Tensor):
                tokens += int(mask.sum()) if counted is mask else counted.numel()
            total += float(self.training_step(self.model, inputs, *given))
            if number + 1 < len(batches):
                self._call("on_substep_end")
        if idle:
            total, tokens = 0.0, 0
            for parameter in self.updates.parameters.values():
                parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter.grad)
        total, tokens, stop = self.ranks.sums([total / self.ranks.world, tokens, self._stop])  # type: ignore[assignment]
        self._agreed = self._agreed or stop > 0
        self.ranks.add_gradients(self.updates.parameters.values())
        if self.ranks.world > 1:
            self._divide(self.ranks.world)
        return Found(total, {}, int(tokens))

    def _next_batches(self) -> list[dict[str, Any]]:
        """This rank's batches of the step that comes."""
        args = self.args
        if self._loader is None:
            mine, size = self.ranks.share(self._rows_of(self.place)), args.per_device_train_batch_size
            self._units = [mine[i : i + size] for i in range(0, len(mine), size)]
            return [self._inputs(items) for items in self._units]
        place = self.place % self.epoch_steps
        if self._coming is None or place == 0:
            self._coming = islice(iter(self._loader), place * args.gradient_accumulation_steps, None)
        found = list(islice(self._coming, args.gradient_accumulation_steps))
        if not found:
            raise InputError("the data loader ended before its length; give one whose len() is the number of batches")
        return [dict(batch) for batch in found]

    # -- after a step --------------------------------------------------------------------------------------------

    def _after(self, entry: dict[str, float], tokens: int, seconds: float) -> None:
        """Logs, measures and saves what is due, as arguments and callbacks say."""
        args, state, control = self.args, self.state, self.control
        self._losses_of_call.append(entry["loss"])
        self._add(entry, tokens, seconds)
        if self._report is not None and self.ranks.first:
            speed = tokens / max(seconds, 1e-9)
            self._report({"step": state.global_step, "steps": self.steps, "tokens_per_second": speed, **entry})
        plan_step(args, state, control, last=self._complete)
        control.should_log = control.should_log or self._ends
        self._call("on_step_end")
        self._tell()
        if self.control.should_epoch_stop:
            self.place = -(-self.place // self.epoch_steps) * self.epoch_steps
        if self.place % self.epoch_steps == 0 or not self._goes_on:
            self._in_epoch = False
            if not self._ends:
                plan_epoch(args, state, self.control)
            self._call("on_epoch_end")
            self._tell()
        if self.control.should_save:  # after what the epoch's end measures, so that the checkpoint holds it
            self.save()

    def _add(self, entry: Mapping[str, float], tokens: int, seconds: float) -> None:
        """Adds a step to the sums of the interval that is logged next."""
        held = self.state.interval
        for name, value in {"steps": 1, "tokens": tokens, "seconds": seconds}.items():
            held[name] = held.get(name, 0) + value
        for name, value in entry.items():
            last = name in ("grad_norm", "learning_rate")
            held[f"mean/{name}"] = value if last else held.get(f"mean/{name}", 0.0) + value

    def _log_interval(self) -> None:
        """Logs the means of the steps since the last entry; the gradient's norm and the rate are the last step's."""
        held, logs = self.state.interval, dict[str, float]()
        for name, value in held.items():
            if name.startswith("mean/"):
                name = name.removeprefix("mean/")
                logs[name] = value if name in ("grad_norm", "learning_rate") else value / held["steps"]
        logs["tokens_per_second"] = held["tokens"] / max(held["seconds"], 1e-9)
        self.state.interval = {}
        self.log(logs)

    def _tell(self) -> None:
        """Logs and measures as the control says, and clears that."""
        control = self.control
        if control.should_log and self.state.interval:
            self._log_interval()
        control.should_log = False
        if control.should_evaluate and self.eval_rows:
            better = self._evaluated()
            if self.args.save_strategy == "best":
                self.control.should_save = better
        self.control.should_evaluate = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs an entry: to the state, log.jsonl, the trackers and the callbacks."""
        raise NotImplementedError

    def _evaluated(self, counts: bool = True) -> bool:
        raise NotImplementedError

    # -- rates that follow what is measured ----------------------------------------------------------------------

    def _plateau_state(self) -> dict[str, Any] | None:
        return None if self._plateau is None else {**self._plateau.state_dict(), "rate": self._rate(0)}

    def _load_plateau(self, content: dict[str, Any] | None) -> None:
        if self._plateau is not None and content is not None:
            content, known = dict(content), {*self._plateau.state_dict(), "rate"}
            if content.keys() != known or type(content["rate"]) is not float:
                raise CheckpointError(f"the plateau of trainer_state.json is not {sorted(known)}; it is damaged")
            self._plateau.optimizer.param_groups[0]["lr"] = content.pop("rate")
            self._plateau.load_state_dict(content)


class Rates:
    """The scheduler that callbacks see in a run whose rates are a function of the step."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def get_last_lr(self) -> list[float]:
        """The rate of the step that comes."""
        return [self._loop._rate(self._loop.state.global_step)]

    def state_dict(self) -> dict[str, Any]:
        """The step, from which the rate follows."""
        return {"last_epoch": self._loop.state.global_step}


def _plain(model: PreTrainedModel) -> bool:
    """Whether a model's forward pass and head are the library's own, which objectives may go past."""
    own = (LlamaForCausalLM.forward, *(kind.forward for kind in CLASSIFIERS))
    head = getattr(model, "lm_head", None)
    if type(model).forward not in own or (head is not None and type(head) not in (torch.nn.Linear, GgufLinear)):
        return False
    return not any(_changed(module) for module in (model, head) if module is not None)


def _changed(module: torch.nn.Module) -> bool:
    """Whether hooks, or a forward of its own, make a module compute something else."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
