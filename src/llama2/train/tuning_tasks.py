"""TRL's trainers whose rows and loss are a task's: KTOTrainer, ORPOTrainer and CPOTrainer (SimPO by its loss_type).

Each makes the task of `llama2 finetune` from its configuration; the loop, the rows and the loss are the task's.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llama2.errors import InputError
from llama2.lora_config import LoraConfig
from llama2.protocols import CausalLM, TokenizerLike
from llama2.train.arguments import TrainingArguments
from llama2.train.configs import CPOConfig, KTOConfig, ORPOConfig
from llama2.train.data import DataReport
from llama2.train.encoding import Encoder
from llama2.train.objectives import Objective
from llama2.train.tasks import TASKS, Task
from llama2.train.tuning import Tuner, frozen_reference
from llama2.train.tuning_rows import RowEncoder

_UNUSED = ("data_collator", "compute_metrics", "preprocess_logits_for_metrics")
_LOGGED = ", whose loss needs no whole logits; rewards are logged"


class TaskEncoder(RowEncoder):
    """Rows as a task reads them; the first set that is encoded, the one that is trained on, makes the objective."""

    task: Task
    reference: CausalLM | None = None

    def made(self, rows: list[Any], name: str) -> tuple[list[Any], DataReport]:
        """As RowEncoder.made."""
        length = self.args.max_length or self.model.config.max_position_embeddings
        items, report = self.task.items(rows, self.tokenizer, length, None)
        if self.objective is None and items:
            self.objective = self.task.objective(items)
            if self.reference is not None:
                self.objective.reference = self.reference
        return items, report


class _TaskTuner(Tuner):
    """Base class of the trainers. _reference: another model than the one that is trained, as it is."""

    ENCODER = TaskEncoder
    _reference: CausalLM | None = None

    def _make(
        self,
        model: CausalLM | str | Path,
        args: TrainingArguments | None,
        sets: tuple[Any, Any],
        tokenizer: TokenizerLike | None,
        quantization: object,
        peft_config: LoraConfig | None,
        old: dict[str, Any],
        **rest: object,
    ) -> None:
        unused = {
            name: rest.pop(name) for name in ("data_collator", "compute_metrics", "preprocess_logits_for_metrics")
        }
        self._refuse(_LOGGED, **unused)
        config, model = self._set_up(model, args, old, quantization, peft_config)
        self._construct(model, config, sets, tokenizer, peft_config, **rest)

    def _encoder(self, objective: Objective | None) -> Encoder:
        made = TaskEncoder(self.network, self.processing_class, self.data_collator, self.args, None)
        made.task, made.reference = self._task(), self._reference
        made.task.check()
        return made

    def _task(self) -> Task:
        raise NotImplementedError


class KTOTrainer(_TaskTuner):
    """Learns from answers with a label: see `KTOConfig`. ref_model: what the model is held to, by default what it is
    now."""

    CONFIG, SUFFIX = KTOConfig, "KTO"
    args: KTOConfig

    def __init__(
        self,
        model: CausalLM | str | Path,
        ref_model: CausalLM | str | Path | None = None,
        args: KTOConfig | TrainingArguments | None = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | None = None,
        processing_class: TokenizerLike | None = None,
        data_collator: Callable[..., Any] | None = None,
        model_init: Callable[..., Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        peft_config: LoraConfig | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        *,
        quantization_config: object = None,
        tokenizer: TokenizerLike | None = None,
        **old: object,
    ) -> None:
        self._refuse("; load the model before", model_init=model_init)
        self._reference = frozen_reference(ref_model, model)
        self._make(
            model, args, (train_dataset, eval_dataset), processing_class or tokenizer, quantization_config, peft_config,
            old, callbacks=callbacks, optimizers=optimizers, data_collator=data_collator,
            compute_metrics=compute_metrics, preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )  # fmt: skip

    def _task(self) -> Task:
        args = self.args
        weights = {"desirable_weight": args.desirable_weight, "undesirable_weight": args.undesirable_weight}
        return TASKS["kto"](beta=args.beta, **weights)  # type: ignore[call-arg]


class _PairTuner(_TaskTuner):
    """ORPOTrainer and CPOTrainer: no reference."""

    def __init__(
        self,
        model: CausalLM | str | Path,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | None = None,
        processing_class: TokenizerLike | None = None,
        model_init: Callable[..., Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        peft_config: LoraConfig | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        *,
        quantization_config: object = None,
        tokenizer: TokenizerLike | None = None,
        **old: object,
    ) -> None:
        self._refuse("; load the model before", model_init=model_init)
        self._make(
            model, args, (train_dataset, eval_dataset), processing_class or tokenizer, quantization_config, peft_config,
            old, callbacks=callbacks, optimizers=optimizers, data_collator=data_collator,
            compute_metrics=compute_metrics, preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )  # fmt: skip


class ORPOTrainer(_PairTuner):
    """Instruction tuning and preferences in one: see `ORPOConfig`."""

    CONFIG, SUFFIX = ORPOConfig, "ORPO"
    args: ORPOConfig

    def _task(self) -> Task:
        args = self.args
        return TASKS["orpo"](beta=args.beta)  # type: ignore[call-arg]


class CPOTrainer(_PairTuner):
    """Preferences without a reference: see `CPOConfig`; SimPO with loss_type="simpo"."""

    CONFIG, SUFFIX = CPOConfig, "CPO"
    args: CPOConfig

    def _task(self) -> Task:
        args = self.args
        if args.loss_type == "simpo":
            if args.cpo_alpha:
                raise InputError(f"cpo_alpha is {args.cpo_alpha} with loss_type 'simpo'; set it to 0, as SimPO has it")
            return TASKS["simpo"](beta=args.beta, gamma=args.simpo_gamma)  # type: ignore[call-arg]
        return TASKS["cpo"](beta=args.beta, alpha=args.cpo_alpha)  # type: ignore[call-arg]
