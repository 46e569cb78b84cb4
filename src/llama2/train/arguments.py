"""How to train: TrainingArguments, checked when they are made. No torch here."""

import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from llama2.errors import InputError

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit")
FSDP = ("", "full_shard")
SINKS = ("none", "tensorboard")
Strategy = Literal["no", "steps", "epoch"]


@dataclass(kw_only=True)
class TrainingArguments:
    """How to train, with the names and defaults of transformers.TrainingArguments where it has them.

    bf16 computes in bfloat16, fp16 in float16 with a scaled loss (CUDA alone), both with float32 copies of the weights.
    eval_strategy, save_strategy and logging_strategy are "no", "steps" (every eval_steps, ...) or "epoch"; without an
    eval_strategy rows are measured where eval_steps is given. A run always saves when it is stopped, and at its end
    unless save_strategy is "no". report_to: "none", "tensorboard" or a list of them; log.jsonl is always written.
    fsdp, of several processes: "" keeps the weights whole on each, "full_shard" a part of each weight on each, which
    moves to the GPU unless use_cpu is set.
    """

    def __new__(cls, *args: Any, **given: Any) -> Self:
        known = cls.__dataclass_fields__
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else "; leave it out"
                raise InputError(f"TrainingArguments has no {name!r}{hint}")
        return super().__new__(cls)

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
    eval_strategy: Strategy | None = None
    save_strategy: Strategy = "steps"
    logging_strategy: Strategy = "steps"
    eval_steps: int | None = None
    eval_on_start: bool = False
    save_steps: int = 500
    save_total_limit: int | None = None
    seed: int = 42
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    optim: str = "adamw_torch_fused"
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "loss"
    greater_is_better: bool | None = None
    report_to: str | list[str] = "none"
    logging_dir: str | None = None
    resume_from_checkpoint: bool | str | None = None
    fsdp: str | bool | list[str] = ""
    use_cpu: bool = False

    def __post_init__(self) -> None:
        positive = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                    "logging_steps", "save_steps")  # fmt: skip
        for name in positive:
            if not getattr(self, name) >= 1:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be at least 1")
        for name in ("learning_rate", "num_train_epochs"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a positive number")
        if self.lr_scheduler_type not in SCHEDULES:
            raise InputError(
                f"lr_scheduler_type is {self.lr_scheduler_type!r}; it must be one of {', '.join(SCHEDULES)}"
            )
        if self.bf16 and self.fp16:
            raise InputError("bf16 and fp16 are both set; set one of them")
        if self.optim not in OPTIMIZERS:
            raise InputError(f"optim is {self.optim!r}; it must be one of {', '.join(OPTIMIZERS)}")
        self._check_fsdp()
        self._check_strategies()
        self.sinks()

    def _check_fsdp(self) -> None:
        words = {True: "full_shard", False: ""}[self.fsdp] if isinstance(self.fsdp, bool) else self.fsdp
        words = words if isinstance(words, str) else " ".join(words)
        if words.replace("auto_wrap", "").strip() not in FSDP:
            raise InputError(f"fsdp is {self.fsdp!r}; it must be 'full_shard', or '' for weights that are whole")
        self.fsdp = words.replace("auto_wrap", "").strip()  # decoder layers are what is wrapped in any case
        if self.fsdp and self.optim == "adamw_8bit":
            raise InputError("adamw_8bit has moments in blocks that cannot be sharded; use optim='adamw_torch'")

    def _check_strategies(self) -> None:
        if self.eval_strategy is None:
            self.eval_strategy = "no" if self.eval_steps is None else "steps"
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, name) not in get_args(Strategy):
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(Strategy))}"
                )
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = self.logging_steps
        if self.load_best_model_at_end:
            same = self.eval_strategy == self.save_strategy != "no"
            if not same or (self.eval_strategy == "steps" and self.save_steps % (self.eval_steps or 1)):
                raise InputError(
                    "load_best_model_at_end needs every saved step to be measured: eval_strategy is "
                    f"{self.eval_strategy!r} (every {self.eval_steps} steps), save_strategy "
                    f"{self.save_strategy!r} (every {self.save_steps}); make them the same, and save_steps a multiple "
                    "of eval_steps"
                )

    def sinks(self) -> list[str]:
        """What report_to names. Raises InputError for one that is not known."""
        given = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or ())
        for name in given:
            if name not in SINKS:
                raise InputError(
                    f"report_to is {name!r}; it must be one of {', '.join(SINKS)} (log.jsonl is always written)"
                )
        return [name for name in given if name != "none"]

    @property
    def better(self) -> str:
        """The measured value that says which step is the best."""
        name = self.metric_for_best_model
        return name if name.startswith("eval_") else f"eval_{name}"

    @property
    def rising(self) -> bool:
        """Whether more of it is better."""
        return not self.better.endswith(("loss", "error")) if self.greater_is_better is None else self.greater_is_better
