"""TRL's trainers under its names: SFTTrainer, DPOTrainer and RewardTrainer over the one Trainer.

They load a model that is given as a path, set up the tokenizer, and encode rows as TRL does; losses are objectives'.
Keywords of TRL 0.x that have moved to the configuration are read as if they stood there.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from llama2 import lora
from llama2.auto import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from llama2.checkpoint.load import head_follows
from llama2.checkpoint.quantized import packed_layers
from llama2.errors import InputError
from llama2.lora_config import LoraConfig
from llama2.protocols import CausalLM, TokenizerLike
from llama2.quantization.gguf import GgufLinear
from llama2.text_file import read_utf8
from llama2.train.answers import Preferences
from llama2.train.arguments import TrainingArguments
from llama2.train.configs import DPOConfig, RewardConfig, SFTConfig, TuningArguments
from llama2.train.encoding import Encoder
from llama2.train.objectives import NextToken, Objective
from llama2.train.precision import best_of_processor
from llama2.train.reward import Rewards
from llama2.train.trainer import Trainer
from llama2.train.tuning_rows import PairEncoder, RewardEncoder, TextEncoder, dft_loss

_RENAMED = {"max_target_length": "max_completion_length"}


class Tuner(Trainer):
    """Base class of the trainers."""

    CONFIG: ClassVar[type[TuningArguments]]
    SUFFIX: ClassVar[str]
    AUTO: ClassVar[Any] = AutoModelForCausalLM
    ENCODER: ClassVar[type[Encoder]]

    def _set_up(
        self,
        model: Any,
        args: TrainingArguments | None,
        old: Mapping[str, Any],
        quantization: object,
        peft_config: LoraConfig | None,
    ) -> tuple[Any, CausalLM]:
        """The configuration with what is given in the old place, and the model, loaded where it is a path."""
        config = self._config(args, model, old)
        if isinstance(model, str | Path):
            return config, self._loaded(model, config, quantization, peft_config)
        if quantization is not None or config.model_init_kwargs:
            warnings.warn("the model is loaded already: quantization_config and model_init_kwargs have no effect",
                          stacklevel=4)  # fmt: skip
        if peft_config is not None and (hasattr(model, "get_base_model") or lora.names(model)):
            if _same(getattr(model, "peft_config", None), peft_config):  # scripts give both
                return config, model
            raise InputError(
                "the model has an adapter already, and there is a peft_config for another; merge it first "
                "(merge_and_unload), or leave peft_config out"
            )
        return config, model

    def _config(
        self, args: TrainingArguments | None, model: CausalLM | str | Path, old: Mapping[str, Any]
    ) -> TuningArguments:
        kind, name = self.CONFIG, model if isinstance(model, str | Path) else getattr(model, "name_or_path", None)
        known = {f.name for f in dataclasses.fields(kind)}
        moved = {_RENAMED.get(key, key): value for key, value in old.items() if value is not None}
        for key in moved:
            if key not in known:
                raise InputError(f"{type(self).__name__} has no {key!r}; leave it out")
        if args is None:
            return kind(**{"output_dir": f"{Path(str(name or 'model')).name}-{self.SUFFIX}", **moved})
        if isinstance(args, kind) and not moved:
            return args
        with warnings.catch_warnings():  # said when they were made
            warnings.filterwarnings("ignore", message=".*have no effect here")
            given = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init}
            return kind(**{**{k: v for k, v in given.items() if k in known}, **moved})

    def _loaded(
        self, model: str | Path, config: TuningArguments, quantization: object, peft_config: object
    ) -> CausalLM:
        given = dict(config.model_init_kwargs or {})
        if quantization is not None:
            given["quantization_config"] = quantization
        chosen = bool({"dtype", "torch_dtype"} & set(given))
        if not chosen:
            given["dtype"] = "float32" if peft_config is None else "auto"
        if peft_config is not None:
            given.setdefault("dequantize", False)  # a GGUF file's blocks stay beneath an adapter
        torch.manual_seed(config.seed)  # for a new head
        with head_follows():
            found = self.AUTO.from_pretrained(model, **given)
        if not chosen and any(isinstance(layer, GgufLinear) for layer in packed_layers(found).values()):
            found.to(best_of_processor())
        return found

    def _tokenizer(self, given: Any, model: CausalLM, config: object) -> TokenizerLike:
        """The tokenizer that is given, or the model's own, with a pad token and the configuration's tokens."""
        network = _inner(model)
        if given is None:
            if not getattr(network, "name_or_path", None):
                raise InputError("the model does not know where it is from; pass processing_class=tokenizer")
            given = AutoTokenizer.from_pretrained(network.name_or_path)
        for name in ("eos_token", "pad_token"):
            if (token := getattr(config, name, None)) is not None:
                if given.convert_tokens_to_ids(token) in (None, given.unk_token_id) and token != given.unk_token:
                    raise InputError(f"{name} is {token!r}, which the tokenizer does not have; add it first")
                setattr(given, name, token)
        if given.pad_token_id is None:
            given.pad_token = given.eos_token
        network.config.pad_token_id = given.pad_token_id
        if (path := getattr(config, "chat_template_path", None)) is not None:
            if not Path(path).is_file():
                raise InputError(f"chat_template_path is {path!r}, which is no file; give that of a template (.jinja)")
            given.chat_template = read_utf8(Path(path))
        return given

    def _construct(self, model: Any, config: TuningArguments, data: tuple[Any, Any], tokenizer: TokenizerLike | None,
               peft_config: LoraConfig | None,
               data_collator: Any = None, **rest: Any) -> None:  # fmt: skip
        """The Trainer over a model that is set up. data: the sets that are trained on and measured."""
        tokenizer = self._tokenizer(tokenizer, model, config)
        peft_config = None if lora.names(_inner(model)) else peft_config
        super().__init__(model, config, data_collator, *data, tokenizer, peft_config=peft_config, **rest)

    def _refuse(self, why: str, **given: object) -> None:
        """Raises InputError for arguments that this trainer has no use for."""
        for name, value in given.items():
            if value is not None:
                raise InputError(
                    f"{name} is not supported by {type(self).__name__}{why}: leave it out, or override compute_loss"
                )

    def _encoder(self, objective: Objective | None) -> Encoder:
        return self.ENCODER(self.network, self.processing_class, self.data_collator, self.args, objective)


def _inner(model: CausalLM) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _same(there: object, peft_config: LoraConfig) -> bool:
    """Whether a model's one adapter is the one that is asked for."""
    held = list(there.values()) if isinstance(there, dict) else []
    return len(held) == 1 and dataclasses.replace(held[0], base_model_name_or_path=None) == dataclasses.replace(
        peft_config, base_model_name_or_path=None
    )


def frozen_reference(
    ref_model: CausalLM | str | Path | None, model: CausalLM | str | Path, settings: Mapping[str, Any] | None = None
) -> CausalLM | None:
    """Another model than the one that is trained, loaded with `settings` where it is a path; or None."""
    if ref_model is model and model is not None and not isinstance(model, str | Path):
        raise InputError("ref_model is the model itself; leave it out: the reference is the model as it is now")
    if isinstance(ref_model, str | Path):
        loaded: CausalLM = AutoModelForCausalLM.from_pretrained(ref_model, **(settings or {}))
        ref_model = loaded
    return None if ref_model is None else _inner(ref_model).requires_grad_(False).eval()


class SFTTrainer(Tuner):
    """Tunes a model, or the one of a path, on texts, completions and chats: see `SFTConfig`.

    formatting_func: makes the text of a row, or as in TRL 0.x the texts of a batch of rows.
    """

    CONFIG, SUFFIX, ENCODER = SFTConfig, "SFT", TextEncoder

    def __init__(
        self,
        model: CausalLM | str | Path,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | None = None,
        processing_class: TokenizerLike | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: object = None,
        peft_config: LoraConfig | None = None,
        formatting_func: Callable[..., Any] | None = None,
        *,
        tokenizer: TokenizerLike | None = None,
        **old: object,
    ) -> None:
        self.formatting_func = formatting_func
        config, model = self._set_up(model, args, old, quantization_config, peft_config)
        if config.loss_type == "dft":
            if compute_loss_func is not None:
                raise InputError("loss_type is 'dft', and there is compute_loss_func too; give one of them")
            compute_loss_func = dft_loss
        self._construct(
            model,
            config,
            (train_dataset, eval_dataset),
            processing_class or tokenizer,
            peft_config,
            data_collator,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    def _encoder(self, objective: Objective | None) -> Encoder:
        made = TextEncoder(self.network, self.processing_class, self.data_collator, self.args, NextToken())
        made.formatting_func = self.formatting_func
        return made


class DPOTrainer(Tuner):
    """Learns from preferences: see `DPOConfig`. ref_model: what the model is held to, by default what it is now."""

    CONFIG, SUFFIX, ENCODER = DPOConfig, "DPO", PairEncoder

    def __init__(
        self,
        model: CausalLM | str | Path,
        ref_model: CausalLM | str | Path | None = None,
        args: DPOConfig | TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | None = None,
        processing_class: TokenizerLike | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: object = None,
        peft_config: LoraConfig | None = None,
        *,
        tokenizer: TokenizerLike | None = None,
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        **old: object,
    ) -> None:
        self._refuse(
            ", whose loss needs no whole logits; rewards, accuracies and margins are logged",
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        config, model = self._set_up(model, args, old, quantization_config, peft_config)
        self._reference = frozen_reference(ref_model, model, config.ref_model_init_kwargs)
        self._construct(
            model,
            config,
            (train_dataset, eval_dataset),
            processing_class or tokenizer,
            peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )

    def _encoder(self, objective: Objective | None) -> Encoder:
        args = self.args
        made = Preferences(args.beta, args.loss_type, args.label_smoothing, self._reference, args.reference_free,
                           args.disable_dropout)  # fmt: skip
        return super()._encoder(made)


class RewardTrainer(Tuner):
    """Trains a classifier of one label to rank answers: see `RewardConfig`."""

    CONFIG, SUFFIX, ENCODER = RewardConfig, "Reward", RewardEncoder
    AUTO = AutoModelForSequenceClassification

    def __init__(
        self,
        model: CausalLM | str | Path,
        args: RewardConfig | TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | None = None,
        processing_class: TokenizerLike | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: object = None,
        peft_config: LoraConfig | None = None,
        *,
        tokenizer: TokenizerLike | None = None,
        **old: object,
    ) -> None:
        self._refuse(
            "; accuracy, margin and rewards are logged",
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        config, model = self._set_up(model, args, old, quantization_config, peft_config)
        if model.config.num_labels != 1:
            raise InputError(
                f"the model has {model.config.num_labels} labels, and a reward is one number; load it with num_labels=1"
            )
        self._construct(
            model,
            config,
            (train_dataset, eval_dataset),
            processing_class or tokenizer,
            peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )

    def _loaded(
        self, model: str | Path, config: TuningArguments, quantization: object, peft_config: object
    ) -> CausalLM:
        config.model_init_kwargs = {"num_labels": 1, **(config.model_init_kwargs or {})}
        return super()._loaded(model, config, quantization, peft_config)

    def _take(self, model: CausalLM) -> None:
        super()._take(model)
        if lora.names(self.network):
            self.network.score.requires_grad_(True)
        if self.args.disable_dropout:
            for layer in lora.layers(self.network).values():
                layer.dropout = dict.fromkeys(layer.dropout, 0.0)

    def _encoder(self, objective: Objective | None) -> Encoder:
        return super()._encoder(Rewards(self.args.center_rewards_coefficient))
