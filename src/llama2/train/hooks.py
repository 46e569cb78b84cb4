"""Methods that a subclass of Trainer may override: transformers' methods with transformers' signatures.

The trainer's own loop goes past these methods, since it computes the loss without whole logits. It calls them if one
is overridden, or if a collator, a loss function or metrics are given.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from llama2.errors import InputError
from llama2.pretrained import PreTrainedModel
from llama2.protocols import CausalLM
from llama2.train.arguments import TrainingArguments
from llama2.train.callbacks import Callbacks, TrainerCallback, TrainerControl, TrainerState
from llama2.train.data import IGNORED
from llama2.train.distributed import Ranks
from llama2.train.evaluation import EvalLoopOutput, measure
from llama2.train.objectives import Classification, NextToken
from llama2.train.schedules import get_scheduler

RowSets = Iterable[Any] | Mapping[str, Iterable[Any]]  # one set of rows, or several by name

Inputs = dict[str, Any]
TRAINS = ("compute_loss", "training_step", "get_train_dataloader", "_get_train_sampler", "_prepare_inputs",
          "_prepare_input", "compute_loss_context_manager", "autocast_smart_context_manager")  # fmt: skip
MEASURES = ("compute_loss", "prediction_step", "evaluation_loop", "get_eval_dataloader", "_get_eval_sampler",
            "_prepare_inputs", "_prepare_input", "compute_loss_context_manager",
            "autocast_smart_context_manager")  # fmt: skip
UPDATES = ("create_optimizer", "create_scheduler", "create_optimizer_and_scheduler", "get_decay_parameter_names",
           "get_optimizer_cls_and_kwargs")  # fmt: skip

_LOOP = "override training_step or compute_loss, or give a callback"
_FILES = "override save_model, or give save="
_ROWS = "give rows with input_ids, or a data_collator"
# Methods of transformers' and TRL's trainers that nothing here calls -> what to override instead.
REFUSED = {
    **dict.fromkeys(
        ("_inner_training_loop", "_run_epoch", "_maybe_log_save_evaluate", "_evaluate", "_finalize_training",
         "_init_training_state", "_prepare_for_training", "_clip_grad_norm", "_get_grad_norm", "_get_learning_rate",
         "_determine_best_metric", "_track_num_input_tokens", "get_batch_samples", "_get_num_items_in_batch",
         "set_initial_training_values", "get_total_train_batch_size", "_activate_neftune", "_deactivate_neftune",
         "_wrap_model", "create_accelerator_and_postprocess", "_build_accelerator_args", "floating_point_ops",
         "store_flos", "num_tokens", "_move_model_to_device", "_validate_args", "prediction_loop",
         "_nested_gather", "_gather_and_numpify", "ipex_optimize_model", "torch_jit_model_eval",
         "propagate_args_to_deepspeed", "_fsdp_qlora_plugin_updates", "_update_auto_batch_size"), _LOOP),
    **dict.fromkeys(
        ("_save", "_save_checkpoint", "_save_optimizer_and_scheduler", "_save_rng_state", "_save_scaler", "_save_tpu",
         "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state", "_load_scaler",
         "_load_best_model", "_load_callback_state", "_rotate_checkpoints", "_sorted_checkpoints", "_get_output_dir",
         "_push_from_checkpoint", "_finish_current_push", "_issue_warnings_after_load",
         "init_hf_repo", "_tune_save_checkpoint"), _FILES),
    **dict.fromkeys(
        ("_get_dataloader", "_remove_unused_columns", "_set_signature_columns_if_needed", "_prepare_dataset",
         "_get_collator_with_removed_columns", "tokenize_row", "_prepare_non_packed_dataloader",
         "_prepare_packed_dataloader", "build_tokenized_answer"), _ROWS),
    **dict.fromkeys(
        ("_compute_loss", "get_batch_loss_metrics", "concatenated_forward", "concatenated_inputs", "dpo_loss",
         "get_batch_logps", "compute_reference_log_probs", "compute_ref_log_probs", "_precompute_ref_logps",
         "null_ref_context"), "override compute_loss"),
    **dict.fromkeys(("hyperparameter_search", "_hp_search_setup", "_report_to_hp_search"),
                    "make a trainer for each trial"),
}  # fmt: skip


def overridden(trainer: object, names: Iterable[str], base: type) -> bool:
    """Whether one of these methods is not the trainer's own: of a subclass, or set on the object."""
    return any(getattr(type(trainer), n) is not getattr(base, n) or n in vars(trainer) for n in names)


def check_overrides(cls: type, own: Iterable[type]) -> None:
    """Raises InputError for a subclass that overrides a method which nothing would call."""
    for part in cls.__mro__:
        if part in own or not issubclass(part, Hooks):
            continue
        for name, instead in REFUSED.items():
            if name in vars(part):
                raise InputError(f"{part.__name__} overrides {name}, which is never called here; {instead}")


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes an argument of this name."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


class Accelerator:
    """The few members of accelerate's Accelerator that overridden methods use."""

    def __init__(self, trainer: "Hooks") -> None:
        self._trainer = trainer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self._trainer.network.parameters()).device

    num_processes = property(lambda self: self._trainer.ranks.world)
    process_index = property(lambda self: self._trainer.ranks.rank)
    is_main_process = property(lambda self: self._trainer.ranks.first)
    is_local_main_process = property(lambda self: self._trainer.ranks.local == 0)

    def backward(self, loss: Tensor, **_: object) -> None:
        """The gradients of a loss, scaled where float16 needs it."""
        (loss * self._trainer.scale).backward()

    def unwrap_model(self, model: nn.Module, **_: object) -> nn.Module:
        """The model itself."""
        return model

    def wait_for_everyone(self) -> None:
        """Until all ranks are here."""
        self._trainer.ranks.wait()

    def print(self, *values: object) -> None:
        """Prints on rank 0."""
        if self.is_main_process:
            print(*values)


class Hooks:
    """The methods, as transformers has them."""

    model: CausalLM
    network: Any
    args: Any
    objective: Any
    ranks: Ranks
    state: TrainerState
    control: TrainerControl
    callbacks: Callbacks
    optimizer: Any
    lr_scheduler: Any
    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None
    processing_class: Any
    data_collator: Any
    compute_loss_func: Callable[..., Any] | None
    compute_metrics: Callable[..., Any] | None
    preprocess_logits_for_metrics: Callable[..., Any] | None
    label_names: list[str]
    loss_is_scaled_for_ga: bool | None = None  # whether compute_loss divides by all items of a step itself
    scale: float
    rows: Sequence[Any]
    current_gradient_accumulation_steps: int = 1

    # -- training ------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module | CausalLM, inputs: Inputs, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Loss and gradients of one batch of a step; returns the loss without its graph."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        given: dict[str, Any] = {}
        if takes := accepts(self.compute_loss, "num_items_in_batch"):
            given["num_items_in_batch"] = num_items_in_batch
        with self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, inputs, **given)  # type: ignore[assignment]
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (takes and num_items_in_batch is not None) or self.compute_loss_func is not None
        if not scaled:
            loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        every = self.args.torch_empty_cache_steps
        if every and self.state.global_step % every == 0 and loss.is_cuda:
            torch.cuda.empty_cache()
        return loss.detach()

    def compute_loss(
        self,
        model: nn.Module | CausalLM,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch: with num_items_in_batch its share of the step's mean, else the batch's own mean.

        The outputs are the model's, or for objectives that are no model's own loss, None.
        """
        world = self.ranks.world if num_items_in_batch is not None else 1
        if not isinstance(self.objective, NextToken | Classification | None):
            found = self.objective.loss(model, inputs)
            loss = found.total / (found.units if num_items_in_batch is None else num_items_in_batch) * world
            return (loss, None) if return_outputs else loss
        smoothing, labels = self.args.label_smoothing_factor, inputs.get("labels")
        apart = labels is not None and (smoothing > 0 or self.compute_loss_func is not None)
        outputs = model(**{k: v for k, v in inputs.items() if not (apart and k == "labels")})
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch) * world
        elif apart and labels is not None:
            loss = self._smoothed(outputs, labels, num_items_in_batch) * world
        else:
            loss = _loss_of(outputs, inputs)
            if num_items_in_batch is not None:
                loss = loss * (self._items(inputs) / num_items_in_batch) * world
        return (loss, outputs) if return_outputs else loss

    def _smoothed(self, outputs: Any, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """The cross entropy with label_smoothing_factor spread over all classes."""
        logits = outputs["logits"] if _keyed(outputs) else outputs[0]
        if self._causal:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        share, there = self.args.label_smoothing_factor, labels != IGNORED
        logs = F.log_softmax(logits[there].float(), -1)
        count = there.sum() if items is None else items
        right = logs.gather(-1, labels[there][:, None]).sum()
        return -((1 - share) * right + share * logs.sum() / logs.shape[-1]) / count

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context of compute_loss."""
        return self.autocast_smart_context_manager()

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[None]:
        """Returns the context of the forward pass: a null context, since bf16 and fp16 cast the weights."""
        return contextlib.nullcontext()

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> Inputs:
        """A batch on the model's device."""
        return {name: self._prepare_input(value) for name, value in inputs.items()}

    def _prepare_input(self, data: object) -> object:
        """A value of a batch on the model's device."""
        if isinstance(data, Tensor):
            return data.to(self.accelerator.device)
        if isinstance(data, Mapping):
            return {name: self._prepare_input(value) for name, value in data.items()}
        if isinstance(data, tuple | list):
            return type(data)(self._prepare_input(value) for value in data)
        return data

    @property
    def accelerator(self) -> Accelerator:
        """The members of accelerate's object that overridden methods use."""
        return Accelerator(self)

    @property
    def _causal(self) -> bool:
        """Whether token t + 1 is predicted from t, so that the first label is no target."""
        return not hasattr(self.network, "score") and hasattr(self.network, "lm_head")

    def _items(self, inputs: Mapping[str, Any]) -> int:
        """Targets of a batch: what its mean loss is the mean of."""
        labels = inputs["labels"]
        if labels.dim() > 1 and self._causal:
            return int((labels[..., 1:] != IGNORED).sum())
        return len(labels) if hasattr(self.network, "score") else int((labels != IGNORED).sum())

    def _all_items(self, batches: Sequence[Mapping[str, Any]]) -> int | None:
        """Targets of a step on all ranks; None where batches have no labels."""
        if self.objective is not None and not isinstance(self.objective, NextToken | Classification):
            units = sum(map(len, self._units))
            return int(self.ranks.sums([float(units)])[0])
        if not all(isinstance(batch.get("labels"), Tensor) for batch in batches):
            return None
        return int(self.ranks.sums([float(sum(map(self._items, batches)))])[0])

    _units: Sequence[Sequence[Any]] = ()

    # -- batches -------------------------------------------------------------------------------------------------

    def _inputs(self, items: Sequence[Any]) -> Inputs:
        """Items as the model's arguments: input_ids, attention_mask, labels."""
        if self.objective is None:
            return dict(self.data_collator(list(items)))
        batch = self.objective.collate(items)
        if not isinstance(self.objective, NextToken | Classification):
            return dict(batch)
        lengths, ids = batch["lengths"], batch["input_ids"]
        packed = batch["attention_mask"] is not None
        plain = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        found = {"input_ids": ids, "attention_mask": batch["attention_mask"] if packed else plain}
        if packed:
            found["position_ids"] = batch["position_ids"]
        return {**found, "labels": batch.get("wanted", batch["labels"])}

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of per_device_train_batch_size rows, in the order of the epoch."""
        sampler = self._get_train_sampler()
        order: dict[str, Any] = {"shuffle": False} if sampler is None else {"sampler": sampler}
        return DataLoader(
            list(self.rows),  # type: ignore[arg-type]
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self._inputs,
            drop_last=self.args.dataloader_drop_last,
            **order,
        )

    def _get_train_sampler(self, train_dataset: RowSets | None = None) -> Iterable[int]:
        """The order of the rows, one for each epoch."""
        return _Order(self)

    def get_eval_dataloader(self, eval_dataset: RowSets | None = None) -> DataLoader[Any]:
        """Batches of per_device_eval_batch_size rows of a set, the trainer's own where none is given."""
        rows, collate = self._eval_items(eval_dataset)
        sampler = self._get_eval_sampler(rows)
        order: dict[str, Any] = {} if sampler is None else {"sampler": sampler}
        size = self.args.per_device_eval_batch_size
        return DataLoader(list(rows), batch_size=size, collate_fn=collate, **order)  # type: ignore[arg-type]

    def get_test_dataloader(self, test_dataset: RowSets) -> DataLoader[Any]:
        """Batches of per_device_eval_batch_size rows of a set, which need no labels."""
        return Hooks.get_eval_dataloader(self, test_dataset)

    def _get_eval_sampler(self, eval_dataset: RowSets) -> Iterable[int] | None:
        """The order of rows that are measured; None is their own."""
        return None

    def _eval_items(self, dataset: RowSets | None) -> tuple[Sequence[Any], Callable[[Sequence[Any]], Inputs]]:
        raise NotImplementedError

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Rows of a data loader."""
        return len(dataloader.dataset)  # type: ignore[arg-type]

    # -- measuring -----------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Iterable[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """All batches through prediction_step, and what compute_metrics says of them."""
        alone = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        self.model.eval()

        def step(inputs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
            return self.prediction_step(self.model, dict(inputs), alone, ignore_keys)

        def heard() -> None:
            self._call("on_prediction_step")

        return measure(dataloader, step, self.args, self.compute_metrics, self.preprocess_logits_for_metrics,
                       metric_key_prefix, heard)  # fmt: skip

    def prediction_step(
        self,
        model: nn.Module | CausalLM,
        inputs: Inputs,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, logits and labels of a batch, each None where there is none or where the loss alone is wanted."""
        inputs = self._prepare_inputs(inputs)
        there = bool(self.label_names) and all(inputs.get(name) is not None for name in self.label_names)
        labels = tuple(inputs[name] for name in self.label_names) if there else None
        loss = None
        with torch.no_grad(), self.compute_loss_context_manager():
            if there or (self.objective is not None and not isinstance(self.objective, NextToken | Classification)):
                loss, outputs = self.compute_loss(model, dict(inputs), return_outputs=True)
                loss = loss.detach().mean()
            else:
                outputs = model(**inputs)
        if prediction_loss_only or outputs is None:
            return loss, None, None
        return loss, _single(_logits_of(outputs, ignore_keys, loss is not None)), _single(labels)

    # -- weights -------------------------------------------------------------------------------------------------

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Makes self.optimizer and self.lr_scheduler where they are not there."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps, self.optimizer)

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        """Makes self.optimizer, where it is not there: AdamW of torch, matrices decay."""
        if self.optimizer is None:
            network = self.network if model is None else model
            matrices = set(self.get_decay_parameter_names(network))
            named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for n, p in named if n in matrices], "weight_decay": self.args.weight_decay},
                {"params": [p for n, p in named if n not in matrices], "weight_decay": 0.0},
            ]
            if self.optimizer_cls_and_kwargs is not None:
                kind, given = self.optimizer_cls_and_kwargs
            else:
                kind, given = self.get_optimizer_cls_and_kwargs(self.args, network)
            self.optimizer = kind([g for g in groups if g["params"]], **given)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Makes self.lr_scheduler, where it is not there, as lr_scheduler_type says."""
        if self.lr_scheduler is None:
            args = self.args
            self.lr_scheduler = get_scheduler(
                args.lr_scheduler_type,
                self.optimizer if optimizer is None else optimizer,
                args.get_warmup_steps(num_training_steps),
                num_training_steps,
                args.lr_scheduler_kwargs,
            )
        return self.lr_scheduler

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: object = None) -> tuple[Any, dict[str, Any]]:
        """The class of the optimiser and what it is made with."""
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.AdamW, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters that decay: matrices."""
        return [name for name, p in model.named_parameters() if p.dim() > 1]

    # -- callbacks -----------------------------------------------------------------------------------------------

    def _call(self, event: str, **given: object) -> None:
        """Calls an event of all callbacks."""
        if self.callbacks.all:
            known = {"model": self.model, "processing_class": self.processing_class, "optimizer": self.optimizer,
                     "lr_scheduler": self.lr_scheduler, "tokenizer": self.processing_class,
                     "train_dataloader": None, "eval_dataloader": None}  # fmt: skip
            self.control = self.callbacks.call(event, self.args, self.state, self.control, **{**known, **given})

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Adds a callback, an object or its class."""
        self.callbacks.add(callback)

    def pop_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        """Takes a callback out, an object or the first of its class, and returns it; None where there is none."""
        found = self.callbacks.find(callback)
        if found is not None:
            self.callbacks.all.remove(found)
        return found

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Takes a callback out."""
        self.pop_callback(callback)

    def is_world_process_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.ranks.first

    def is_local_process_zero(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.ranks.local == 0


class _Order:
    """A sampler: the rows of an epoch, a new epoch at each pass."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._epoch = trainer, trainer.first_epoch

    def __iter__(self) -> Iterator[int]:
        order = self._trainer.order(self._epoch)
        self._epoch += 1
        ranks = self._trainer.ranks
        return iter(order[ranks.rank :: ranks.world])

    def __len__(self) -> int:
        return math.ceil(len(self._trainer.rows) / self._trainer.ranks.world)


def _loss_of(outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
    if _keyed(outputs) and outputs.get("loss") is None:
        raise InputError(
            f"the model gave no loss from {', '.join(inputs)}, only {', '.join(outputs.keys())}; give rows with "
            "labels, or override compute_loss"
        )
    loss: Tensor = outputs["loss"] if _keyed(outputs) else outputs[0]
    return loss


def _keyed(outputs: object) -> bool:
    """Whether outputs have names, as a model's own have."""
    return hasattr(outputs, "items") and hasattr(outputs, "get")


def _logits_of(outputs: Any, ignore_keys: list[str] | None, with_loss: bool) -> tuple[Any, ...]:
    """Returns a model's outputs besides its loss and its cache."""
    if _keyed(outputs):
        left = {"loss", *(("past_key_values", "cache") if ignore_keys is None else ignore_keys)}
        return tuple(value for name, value in outputs.items() if name not in left and value is not None)
    return tuple(outputs[1:] if with_loss else outputs)


def _single(values: object) -> Any:
    return values[0] if isinstance(values, tuple) and len(values) == 1 else values
