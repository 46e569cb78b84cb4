"""The one training loop. Objectives differ in how they make a batch and a loss of it, and in nothing else.

The order of rows is a function of seed, epoch and index, and the random numbers of a step are one of seed and step.
So a run that was killed and resumed ends with the same bits as one that was not, and several ranks, which share the
rows of each step, do what one does. All ranks go through the same calls; rank 0 alone writes and reports.

Losses are computed without whole logits; what needs the model's own forward pass goes through `hooks`."""

import inspect
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from llama2 import lora
from llama2.errors import InputError
from llama2.files import appending
from llama2.lora_config import LoraConfig
from llama2.pretrained import PreTrainedModel
from llama2.protocols import TokenizerLike
from llama2.train import checkpoints, hooks
from llama2.train.answers import keep_reference
from llama2.train.arguments import TrainingArguments
from llama2.train.callbacks import Callbacks, TrainerControl, TrainerState
from llama2.train.distributed import COMMAND, Root, join, shard
from llama2.train.encoding import TRAINED, Encoder
from llama2.train.evaluation import EvalLoopOutput, PredictionOutput, check_metrics, speed
from llama2.train.fused_layer import fused
from llama2.train.hooks import Hooks
from llama2.train.loop import Loop, Rates
from llama2.train.malloc import kept
from llama2.train.neftune import neftune
from llama2.train.objectives import Classification, NextToken, Objective
from llama2.train.optim import AdamW
from llama2.train.precision import check_float16, suit_processor
from llama2.train.results import Results
from llama2.train.saving import LOG, Saving
from llama2.train.schedules import PLATEAU, check
from llama2.train.trackers import TRACKERS

__all__ = ["Trainer", "TrainerState", "TrainingArguments"]

LOSS_SCALE = 2.0**6  # that fp16 begins with, of a sum over a step's targets; halved where gradients overflow


class TrainOutput(NamedTuple):
    """Result of train(): the steps done, the mean loss of the steps of this call, and its figures."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


_INSTEAD = {
    "ref_model": "use DPOTrainer(ref_model=...), or give Preferences(reference=model) as the objective",
    "formatting_func": "use SFTTrainer(formatting_func=...), or give rows in a shape that llama2.train.data knows",
    "max_seq_length": "use SFTTrainer with SFTConfig(max_length=...)",
    "dataset_text_field": "use SFTTrainer with SFTConfig(dataset_text_field=...)",
}


class Trainer(Loop):
    """Trains `model` on the rows of train_dataset.

    What is trained for is chosen by the model's class and the rows: see `rows.objective_for`, for which
    processing_class (or tokenizer) encodes texts. An objective, with its own `rows` and `eval_rows`, says it instead.
    peft_config: a new adapter for the model. save: writes the model into a checkpoint's folder for others to load;
    `save_model` does otherwise. report: called after every step. The rest is as in transformers: see `hooks` for the
    methods that a subclass may override. A model on the CPU moves to the GPU, where there is one and use_cpu is not
    set.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | None = None,
        processing_class: TokenizerLike | None = None,
        model_init: Callable[..., Any] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        *,
        tokenizer: TokenizerLike | None = None,
        peft_config: LoraConfig | None = None,
        objective: Objective | None = None,
        rows: Sequence[Any] = (),
        eval_rows: Sequence[Any] = (),
        save: Callable[[Path], Any] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
        **others: object,
    ) -> None:
        for name in others:
            raise InputError(f"Trainer has no {name!r}; {_INSTEAD.get(name, 'leave it out')}")
        hooks.check_overrides(type(self), (Trainer, Loop, Hooks, Saving, Results))
        self.args = args = TrainingArguments("tmp_trainer") if args is None else args
        if (model is None) == (model_init is None):
            raise InputError("give a model or model_init, one of them")
        check(args.lr_scheduler_type, args.lr_scheduler_kwargs or {}, args.learning_rate)
        check_metrics(args, compute_metrics)
        self.processing_class = tokenizer if processing_class is None else processing_class
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics, self.data_collator = preprocess_logits_for_metrics, data_collator
        self.optimizer_cls_and_kwargs, self.model_init = optimizer_cls_and_kwargs, model_init
        self._given, self._save_model, self._report = tuple(optimizers), save, report
        self.folder, self.ranks = Path(args.output_dir or ""), join()
        self._stop = self._agreed = self.is_in_train = False
        self._peft_config, self._narrow = peft_config, _narrow(args)
        self._take(self.call_model_init() if model is None else model)
        own = ["start_positions", "end_positions"] if hasattr(self.network, "qa_outputs") else ["labels"]
        self.label_names = own if args.label_names is None else list(args.label_names)
        self._encode(objective, rows, eval_rows, train_dataset, eval_dataset)
        self._check()
        self.state, self.control = TrainerState(), TrainerControl()
        self.callbacks = Callbacks(callbacks or ())
        self._check_hub()
        self._prepare()
        self._sinks = [TRACKERS[name].make(args) for name in args.sinks() if self.ranks.first]
        self._call("on_init_end")

    # -- what is trained -----------------------------------------------------------------------------------------

    def call_model_init(self, trial: object = None) -> PreTrainedModel:
        """The model that model_init makes."""
        assert self.model_init is not None
        torch.manual_seed(self.args.seed)
        model = self.model_init() if not inspect.signature(self.model_init).parameters else self.model_init(trial)
        if model is None:
            raise InputError("model_init returned None; it must return a model")
        return model

    def _take(self, model: Any) -> None:
        """Takes up a model, with a new adapter where one is wanted, on the device to train on."""
        if isinstance(model, str | Path):
            raise InputError(f"model is the path {str(model)!r}; load it: AutoModelForCausalLM.from_pretrained(path)")
        self.model = self.model_wrapped = model
        self.network = model.get_base_model() if hasattr(model, "get_base_model") else model
        if self._peft_config is not None:
            lora.add_adapter(self.network, self._peft_config)
        if self.args.fp16:
            check_float16(self.network)
        first = next(self.network.parameters())
        if first.device.type == "cpu" and not self.args.fsdp and not self.args.use_cpu and torch.cuda.is_available():
            self.network.to(f"cuda:{self.ranks.local}")
        suit_processor(self.network)
        if self.args.tf32 is not None:
            if torch.cuda.is_available():
                torch.backends.cuda.matmul.allow_tf32 = self.args.tf32
            elif self.args.tf32:
                warnings.warn("tf32=True has no effect: there is no CUDA device", stacklevel=4)

    def _encode(
        self,
        objective: Objective | None,
        rows: Sequence[Any],
        eval_rows: object,
        train_dataset: Iterable[Any] | None,
        eval_dataset: hooks.RowSets | None,
    ) -> None:
        """Rows as items of the objective, or for a collator of the caller's as they are."""
        self.encoder = self._encoder(objective)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.rows = rows if train_dataset is None else self.encoder.items(train_dataset, TRAINED)
        if eval_dataset is not None:
            eval_rows = self.encoder.sets(eval_dataset)
        self.eval_rows = eval_rows
        self.objective, self.data_collator = self.encoder.objective, self.encoder.collator
        self.train_dataset = self.rows if train_dataset is None else train_dataset

    def _encoder(self, objective: Objective | None) -> Encoder:
        """Returns the encoder of this trainer's rows."""
        return Encoder(self.network, self.processing_class, self.data_collator, self.args, objective)

    def _check(self) -> None:
        args = self.args
        self.ranks.broadcast(self._check_folder)
        if self.objective is not None and not self.rows and not self.eval_rows:
            raise InputError("there are no rows to train on; pass rows=, or train_dataset=")
        if args.eval_strategy != "no" and not self.eval_rows:
            raise InputError(
                f"eval_strategy is {args.eval_strategy!r}, and there are no rows to measure on; pass eval_dataset=, or "
                "leave eval_strategy and eval_steps out"
            )
        own = self.objective is None or isinstance(self.objective, NextToken | Classification)
        if self.compute_metrics is not None and not own:
            raise InputError(
                f"compute_metrics is given, and {type(self.objective).__name__} has no predictions to measure; its own "
                "measures are logged: leave it out"
            )
        if self._given[0] is not None and (self.optimizer_cls_and_kwargs is not None or self.model_init is not None):
            raise InputError(
                "optimizers holds an optimiser of another model than model_init makes, or there is "
                "optimizer_cls_and_kwargs too; give one of them"
            )

    def _prepare(self) -> None:
        """Weights that are the same on all ranks and sharded where that is asked for, and what updates them."""
        args, own = self.args, hooks.UPDATES
        self._outside = self._given != (None, None) or self.optimizer_cls_and_kwargs is not None
        self._outside = self._outside or hooks.overridden(self, own, Loop)
        if args.fsdp:
            keep_reference(self.objective, self.network, self.ranks.first, apart=True)
        self._root = self._shard()
        self.optimizer, self.lr_scheduler = self._given if self._outside else (None, None)
        self._plateau: ReduceLROnPlateau | None = None
        self.scale = LOSS_SCALE if args.fp16 else 1.0
        self.place = 0
        if self._outside:
            if self._root is not None:
                raise InputError("fsdp shards its own optimiser's moments; leave optimizers and create_optimizer out")
            return
        self.updates = self._updates(None)
        self.optimizer, self.lr_scheduler = self.updates, Rates(self)
        if args.lr_scheduler_type == PLATEAU:
            dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
            self._plateau = ReduceLROnPlateau(dummy, **(args.lr_scheduler_kwargs or {}))

    def _updates(self, given: torch.optim.Optimizer | None) -> AdamW:
        args = self.args
        found = AdamW(
            self._trainable().items(),
            (args.adam_beta1, args.adam_beta2),
            args.adam_epsilon,
            args.weight_decay,
            masters=self._narrow is not None and self._root is None,
            kind=args.optim,
            given=given,
        )
        if self._narrow is not None and self._root is None:
            self.network.to(self._narrow)
        keep_reference(self.objective, self.network, self.ranks.first)
        return found

    def _shard(self) -> Root | None:
        self.ranks.match(parameter for parameter in self.network.parameters() if parameter.requires_grad)
        if not self.args.fsdp:
            return None
        if not self.ranks.launched:
            raise InputError(f"fsdp is {self.args.fsdp!r}, and this is one process; start several with `{COMMAND}`")
        if self._trains_by_hand:
            raise InputError("fsdp runs the trainer's own loss alone; leave it out, or the overridden methods")
        device = "cuda" if torch.cuda.is_available() and not self.args.use_cpu else "cpu"
        return shard(self.network, device, self._narrow)

    # -- the run -------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: bool | str | None = None,
        trial: object = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains to the end, or to a signal (SIGTERM, SIGHUP, Ctrl-C), which saves first.

        With resume_from_checkpoint=True, here or in the arguments, the newest whole checkpoint of output_dir is taken
        up, if there is one; a path names one. A run that torchrun has started again does so unasked. Without, a second
        call trains the whole length again, from the weights and moments that are there. Raises InputError where the
        loss is NaN or inf.
        """
        if not self.rows and not hooks.overridden(self, ("get_train_dataloader",), Loop):
            raise InputError("there are no rows to train on; pass train_dataset=")
        with self._alone():
            return self._train(resume_from_checkpoint, ignore_keys_for_eval)

    def _train(self, wanted: bool | str | None, ignored: list[str] | None) -> TrainOutput:
        self._begin(self.args.resume_from_checkpoint if wanted is None else wanted)
        self._ignored_keys = ignored
        if self.args.gradient_checkpointing:
            self.network.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        first, begin = self.state.global_step, time.perf_counter()
        self.model.train()
        self.is_in_train = True
        self._call("on_train_begin")
        noise = neftune(self.network, self.args.neftune_noise_alpha)
        with self._signals(), fused(self.network), noise, kept() as returned:
            if self.args.eval_on_start and self.eval_rows and self.state.global_step == 0:
                self._evaluated(counts=False)
            while self._goes_on:
                self._step()
                if self.state.global_step == first + 1:
                    returned()
        self.is_in_train = False
        self.model.eval()
        return self._finish(first, begin)

    def _begin(self, wanted: bool | str | None) -> None:
        """A new state, the optimiser of the caller's, and what a checkpoint holds."""
        if self.model_init is not None and self.state.global_step:
            self._take(self.call_model_init())
            self._prepare()
        self._stop = self._agreed = self._in_epoch = False
        self.state, self.control, self.place, self._order = TrainerState(), TrainerControl(), 0, None
        self._losses_of_call = []
        own = hooks.overridden(self, ("get_train_dataloader", "_get_train_sampler"), Loop)
        self._loader, self._coming = (self.get_train_dataloader() if own else None), None
        if self._outside:
            self._prepare_outside()
        self._resume(wanted)
        state, total = self.state, self.steps
        state.compute_steps(self.args, total)
        state.num_train_epochs = math.ceil(total / self.epoch_steps)
        state.train_batch_size = self.args.per_device_train_batch_size
        state.is_world_process_zero, state.is_local_process_zero = self.ranks.first, self.ranks.local == 0
        if state.global_step > total:
            warnings.warn(
                f"the checkpoint is at step {state.global_step} of {total}, so nothing is left to train; raise "
                "num_train_epochs or max_steps to train longer",
                stacklevel=3,
            )

    def _prepare_outside(self) -> None:
        """The optimiser and the scheduler of the caller's; a scheduler that was made here is made anew."""
        if self._given[1] is None:
            self.lr_scheduler = None
        self.create_optimizer_and_scheduler(self.steps)
        if self.optimizer is None:
            raise InputError("create_optimizer left self.optimizer at None; it must set it, or call super()")
        if not hasattr(self, "updates") or self.updates.inner is not self.optimizer:
            self.updates = self._updates(self.optimizer)

    def _finish(self, first: int, begin: float) -> TrainOutput:
        """The last checkpoint, the figures of the run, and the best weights where these are wanted."""
        there = self.ranks.broadcast(lambda: checkpoints.found(self.folder))
        saves = self.args.save_strategy not in ("no", "best") or self._ends
        own = [checkpoints.step_of(place) for place in there if checkpoints.run_of(place) == self.run]
        if saves and own[-1:] != [self.state.global_step]:
            self.save()
        done = self.state.global_step - first
        loss = sum(self._losses_of_call) / max(done, 1)
        metrics = speed("train", begin, done * self.batch, done)
        metrics |= {"total_flos": self.state.total_flos, "train_loss": loss}
        self.log(metrics)
        best = self.state.best_global_step
        if self.args.load_best_model_at_end and best is not None:
            self._load_weights(self.folder / f"checkpoint-{best}")
        self._call("on_train_end")
        for sink in self._sinks:
            sink.close()
        self._sinks = []
        return TrainOutput(self.state.global_step, loss, metrics)

    @property
    def tokenizer(self) -> TokenizerLike:
        """processing_class, under its old name."""
        return self.processing_class

    @property
    def interrupted(self) -> bool:
        """Whether the last run was ended by a signal, or by `stop`."""
        return self._ends

    # -- measuring -----------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: hooks.RowSets | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measures eval_dataset, or the trainer's own: the mean loss, what the objective logs or compute_metrics finds.

        Of a dict of sets each is measured, under its name: eval_NAME_loss; a text chooses one of the trainer's sets.
        Raises InputError where there are no usable rows.
        """
        sets = self.eval_rows if eval_dataset is None else eval_dataset
        if isinstance(sets, Mapping):
            found: dict[str, float] = {}
            for name in sets:
                chosen = name if eval_dataset is None else sets[name]
                found |= self.evaluate(chosen, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        begin = time.perf_counter()
        training = self.model.training
        self._cast()
        self.model.eval()
        if self._measures_by_hand:
            loader = self.get_eval_dataloader(eval_dataset)
            alone = True if self.compute_metrics is None else None
            output = self.evaluation_loop(loader, "Evaluation", alone, ignore_keys, metric_key_prefix)
            metrics, rows = dict(output.metrics or {}), output.num_samples or 0
        else:
            metrics, rows = self._measured(eval_dataset, metric_key_prefix)
        self.model.train(training)
        size = self.args.per_device_eval_batch_size * self.ranks.world
        metrics |= speed(metric_key_prefix, begin, rows, math.ceil(rows / size))
        self.log(metrics)
        self._call("on_evaluate", metrics=metrics)
        self.control.should_evaluate = False
        return metrics

    def _measured(self, dataset: object, prefix: str) -> tuple[dict[str, float], int]:
        """The means of the objective's loss and logs over a set."""
        items = self._eval_items(dataset)[0]
        with torch.no_grad():
            total, units, logs = self._losses(items, self.args.per_device_eval_batch_size, learn=False)
        if not units:
            raise InputError("the rows to measure on have no targets; give rows whose labels are not all -100")
        self._call("on_prediction_step")
        found = {f"{prefix}_{name}": value / units for name, value in logs.items()}
        return {f"{prefix}_loss": total / units, **found}, len(items)

    def _cast(self) -> None:
        """bf16_full_eval and fp16_full_eval, of a model that is not training."""
        if not self.is_in_train and (self.args.bf16_full_eval or self.args.fp16_full_eval):
            self.network.to(torch.bfloat16 if self.args.bf16_full_eval else torch.float16)

    def _eval_items(self, dataset: Any) -> tuple[Sequence[Any], Callable[[Sequence[Any]], dict[str, Any]]]:
        if isinstance(dataset, str):
            if not isinstance(self.eval_rows, Mapping) or dataset not in self.eval_rows:
                raise InputError(f"there is no set {dataset!r} among the trainer's eval_dataset")
            return self.eval_rows[dataset], self._inputs
        if dataset is not None:
            found = self.encoder.measured(dataset, self._inputs)
            self.objective = self.objective or self.encoder.objective
            return found
        if not self.eval_rows:
            raise InputError("there are no rows to measure on; pass eval_dataset=")
        return self.eval_rows, self._inputs

    def _evaluated(self, counts: bool = True) -> bool:
        """Measures during a run. Whether it is the best so far; counts: it may be."""
        given: dict[str, Any] = {} if self._ignored_keys is None else {"ignore_keys": self._ignored_keys}
        metrics, args, state = self.evaluate(**given), self.args, self.state
        if self._report is not None and self.ranks.first:
            self._report({"step": state.global_step, "steps": self.steps, **metrics})
        if args.metric_for_best_model is None or not counts:
            return False
        if args.better not in metrics:
            raise InputError(
                f"metric_for_best_model is {args.metric_for_best_model!r}; measured are {', '.join(metrics)}"
            )
        value = metrics[args.better]
        plateau = self._plateau or (self.lr_scheduler if isinstance(self.lr_scheduler, ReduceLROnPlateau) else None)
        if plateau is not None:
            plateau.step(value)
        if state.best_metric is not None and not (
            value > state.best_metric if args.rising else value < state.best_metric
        ):
            return False
        state.best_metric = value
        if args.save_strategy != "no":
            state.best_global_step = state.global_step
        return True

    def predict(
        self, test_dataset: Iterable[Any], ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predictions for a set, its labels and what is measured of them; rows need no labels.

        predictions are the model's logits as an array (N, ...), rows of several lengths padded with -100.
        """
        begin = time.perf_counter()
        self._cast()
        loader = self.get_test_dataloader(test_dataset)
        output: EvalLoopOutput = self.evaluation_loop(loader, "Prediction", None, ignore_keys, metric_key_prefix)
        rows = output.num_samples or 0
        size = self.args.per_device_eval_batch_size
        metrics = dict(output.metrics or {}) | speed(metric_key_prefix, begin, rows, math.ceil(rows / size))
        self._call("on_predict", metrics=metrics)
        return PredictionOutput(output.predictions, output.label_ids, metrics)

    # -- telling -------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs an entry: to the state, log.jsonl, the trackers and the callbacks."""
        state = self.state
        logs["epoch"] = state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = state.num_input_tokens_seen
        entry = {"step": state.global_step, **logs}
        state.log_history.append(entry)
        if self.ranks.first:
            if "train_runtime" not in entry:  # the file holds steps and measurements alone
                self.folder.mkdir(parents=True, exist_ok=True)
                with appending(self.folder / LOG) as file:
                    file.write((json.dumps(entry, default=float) + "\n").encode())
            for sink in self._sinks:
                sink.write(entry)
        self._call("on_log", logs=logs)
        self.control.should_log = False


def _narrow(args: TrainingArguments) -> torch.dtype | None:
    return torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None
