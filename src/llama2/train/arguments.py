"""How to train: TrainingArguments, checked when they are made. No torch here."""

import dataclasses
import difflib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

from llama2.errors import InputError
from llama2.train.fields import ALIASES, DICTS, NUMBERS, OPTIMIZERS, read_flag, read_mapping, without_effect
from llama2.train.trackers import sinks_of

if TYPE_CHECKING:
    import torch

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
             "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
             "warmup_stable_decay")  # fmt: skip
FSDP = ("", "full_shard")
SAMPLING = ("random", "sequential", "group_by_length")
HUB = ("end", "every_save", "checkpoint", "all_checkpoints")
Strategy = Literal["no", "steps", "epoch"]
SaveStrategy = Literal["no", "steps", "epoch", "best"]
OptionalFlag = bool | None


class ParallelMode(StrEnum):
    """How many processes train."""

    NOT_PARALLEL = "not_parallel"
    DISTRIBUTED = "distributed"


@dataclass
class TrainingArguments:
    """How to train, with the names, the order and the defaults of transformers.TrainingArguments.

    bf16 computes in bfloat16, fp16 in float16 with a scaled loss (CUDA alone), both with float32 copies of the weights.
    eval_strategy, save_strategy and logging_strategy are "no", "steps" (every eval_steps, ...; below 1 a share of all
    steps) or "epoch"; without an eval_strategy rows are measured where eval_steps is given. A run always saves when it
    is stopped, and at its end unless save_strategy is "no". report_to names trackers besides log.jsonl, which is always
    written. fsdp, of several processes: "" keeps the weights whole on each, "full_shard" a part of each weight on each,
    which moves to the GPU unless use_cpu is set. Texts of numbers are read. Fields that have no effect here are named,
    with the reason, in one warning: see `llama2.train.fields`. Raises InputError for a value beyond its bound.
    """

    def __new__(cls, *args: object, **given: object) -> Self:
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else "; leave it out"
                raise InputError(f"{cls.__name__} has no {name!r}{hint}")
        if len(args) > len(known):
            raise InputError(f"{cls.__name__} has {len(known)} fields, and {len(args)} are given by their place")
        return super().__new__(cls)

    output_dir: str = "trainer_output"
    per_device_train_batch_size: int = 8
    num_train_epochs: float = 3.0
    max_steps: int = -1
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: float = 0
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    optim_target_modules: str | list[str] | None = None
    gradient_accumulation_steps: int = 1
    average_tokens_across_devices: bool = True
    max_grad_norm: float = 1.0
    label_smoothing_factor: float = 0.0
    bf16: bool = False
    fp16: bool = False
    bf16_full_eval: bool = False
    fp16_full_eval: bool = False
    tf32: OptionalFlag = None
    activation_checkpointing: OptionalFlag = None
    activation_checkpointing_kwargs: dict[str, Any] | str | None = None
    gradient_checkpointing: OptionalFlag = None
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = None
    torch_compile: bool = False
    torch_compile_backend: str | None = None
    torch_compile_mode: str | None = None
    use_liger_kernel: bool = False
    liger_kernel_config: dict[str, Any] | None = None
    use_cache: bool = False
    neftune_noise_alpha: float | None = None
    torch_empty_cache_steps: int | None = None
    auto_find_batch_size: bool = False
    logging_strategy: Strategy = "steps"
    logging_steps: float = 500
    logging_first_step: bool = False
    log_on_each_node: bool = True
    logging_nan_inf_filter: bool = True
    include_num_input_tokens_seen: str | bool = "no"
    log_level: str = "passive"
    log_level_replica: str = "warning"
    disable_tqdm: OptionalFlag = None
    report_to: str | list[str] | None = "none"
    run_name: str | None = None
    project: str = "huggingface"
    trackio_space_id: str | None = None
    trackio_bucket_id: str | None = None
    trackio_static_space_id: str | bool | None = None
    eval_strategy: Strategy | None = None
    eval_steps: float | None = None
    eval_delay: float = 0
    per_device_eval_batch_size: int = 8
    prediction_loss_only: bool = False
    eval_on_start: bool = False
    eval_do_concat_batches: bool = True
    eval_use_gather_object: bool = False
    eval_accumulation_steps: int | None = None
    include_for_metrics: list[str] = field(default_factory=list)
    batch_eval_metrics: bool = False
    save_only_model: bool = False
    save_strategy: SaveStrategy = "steps"
    save_steps: float = 500
    save_on_each_node: bool = False
    save_total_limit: int | None = None
    enable_jit_checkpoint: bool = False
    push_to_hub: bool = False
    hub_token: str | None = None
    hub_private_repo: OptionalFlag = None
    hub_model_id: str | None = None
    hub_strategy: str = "every_save"
    hub_always_push: bool = False
    hub_revision: str | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: OptionalFlag = None
    ignore_data_skip: bool = False
    restore_callback_states_from_checkpoint: bool = False
    full_determinism: bool = False
    seed: int = 42
    data_seed: int | None = None
    use_cpu: bool = False
    accelerator_config: dict[str, Any] | str | None = None
    parallelism_config: object = None
    dataloader_drop_last: bool = False
    dataloader_num_workers: int = 0
    dataloader_pin_memory: bool = True
    dataloader_persistent_workers: bool = False
    dataloader_prefetch_factor: int | None = None
    dataloader_multiprocessing_context: str | None = None
    dataloader_in_order: bool = True
    remove_unused_columns: bool = True
    label_names: list[str] | None = None
    train_sampling_strategy: str = "random"
    length_column_name: str = "length"
    ddp_find_unused_parameters: OptionalFlag = None
    ddp_bucket_cap_mb: int | None = None
    ddp_broadcast_buffers: OptionalFlag = None
    ddp_static_graph: OptionalFlag = None
    ddp_backend: str | None = None
    ddp_timeout: int = 1800
    fsdp: str | bool | list[str] | None = ""
    fsdp_config: dict[str, Any] | str | None = None
    deepspeed: dict[str, Any] | str | None = None
    debug: str | list[str] = ""
    skip_memory_metrics: bool = True
    do_train: bool = False
    do_eval: bool = False
    do_predict: bool = False
    resume_from_checkpoint: bool | str | None = None
    local_rank: int = -1
    # Of transformers 4.46 alone.
    overwrite_output_dir: bool = False
    warmup_ratio: float = 0.0
    logging_dir: str | None = None
    save_safetensors: bool = True
    no_cuda: bool = False
    use_mps_device: bool = False
    jit_mode_eval: bool = False
    use_ipex: bool = False
    fp16_opt_level: str = "O1"
    half_precision_backend: str = "auto"
    fp16_backend: str = "auto"
    tpu_num_cores: int | None = None
    tpu_metrics_debug: bool = False
    past_index: int = -1
    fsdp_min_num_params: int = 0
    fsdp_transformer_layer_cls_to_wrap: str | None = None
    adafactor: bool = False
    group_by_length: bool = False
    use_legacy_prediction_loop: bool = False
    include_inputs_for_metrics: bool = False
    evaluation_strategy: Strategy | None = None
    per_gpu_train_batch_size: int | None = None
    per_gpu_eval_batch_size: int | None = None
    push_to_hub_model_id: str | None = None
    push_to_hub_organization: str | None = None
    push_to_hub_token: str | None = None
    mp_parameters: str = ""
    torchdynamo: str | None = None
    ray_scope: str | None = "last"
    dispatch_batches: OptionalFlag = None
    split_batches: OptionalFlag = None
    include_tokens_per_second: OptionalFlag = False
    OWN_NO_EFFECT: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {}  # of a class derived from this one
    SECRETS: ClassVar[tuple[str, ...]] = ("hub_token", "push_to_hub_token")

    def __post_init__(self) -> None:
        self._read()
        self._rename()
        self.output_dir = str(Path(self.output_dir or "trainer_output").expanduser())
        self._warn()
        self._check_optimizer()
        self._check_fsdp()
        self._check_strategies()
        self._check_best()
        self._check_choices()
        self.sinks()

    def _read(self) -> None:
        """Texts of numbers, of True and False, and of dicts become these; enumerations their values."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if (found := getattr(value, "value", None)) is not None and isinstance(found, str):
                value = found
            if f.name in NUMBERS and (value is not None or "None" not in str(f.type)):
                value = NUMBERS[f.name].read(f.name, value)
            elif f.type is bool or (f.type is OptionalFlag and value is not None):
                value = read_flag(f.name, value)
            elif f.name in DICTS and value is not None:
                value = read_mapping(f.name, value)
            setattr(self, f.name, value)

    def _rename(self) -> None:
        """Old names are taken for today's."""
        for old, new in ALIASES.items():
            if getattr(self, old) is not None:
                setattr(self, new, getattr(self, old))
                setattr(self, old, None)
        if self.push_to_hub_organization is not None:
            name = self.hub_model_id or Path(self.output_dir or "trainer_output").name
            self.hub_model_id = f"{self.push_to_hub_organization}/{name.split('/')[-1]}"
        self.use_cpu = self.use_cpu or self.no_cuda
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        if self.include_inputs_for_metrics and "inputs" not in self.include_for_metrics:
            self.include_for_metrics = [*self.include_for_metrics, "inputs"]
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        self.gradient_checkpointing = self.activation_checkpointing
        self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
        seen = self.include_num_input_tokens_seen
        self.include_num_input_tokens_seen = ("all" if seen else "no") if isinstance(seen, bool) else seen

    def _warn(self) -> None:
        """One warning for all fields that have no effect here."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        found = without_effect(vars(self), defaults, self.OWN_NO_EFFECT)
        if self.optim.startswith("paged_"):
            found.append(f"the paging of optim={self.optim!r} (moments stay in the memory of their device)")
        if found:
            message = f"{type(self).__name__}: these have no effect here: {'; '.join(found)}"
            warnings.warn(message, stacklevel=5)

    def _check_optimizer(self) -> None:
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            if getattr(self, name) == 1:
                raise InputError(f"{name} is 1; it must be below 1")
        if self.lr_scheduler_type not in SCHEDULES:
            raise InputError(
                f"lr_scheduler_type is {self.lr_scheduler_type!r}; it must be one of {', '.join(SCHEDULES)}"
            )
        if self.bf16 and self.fp16:
            raise InputError("bf16 and fp16 are both set; set one of them")
        if self.bf16_full_eval and self.fp16_full_eval:
            raise InputError("bf16_full_eval and fp16_full_eval are both set; set one of them")
        if self.optim not in OPTIMIZERS:
            raise InputError(
                f"optim is {self.optim!r}; it must be one of {', '.join(OPTIMIZERS)}, or give an optimiser of your "
                "own: optimizers=(opt, None)"
            )
        self.optim = OPTIMIZERS[self.optim]
        if self.warmup_ratio and self.warmup_steps:
            self.warmup_ratio = 0.0  # as in transformers, steps win

    def _check_fsdp(self) -> None:
        fsdp = self.fsdp or ""
        words = "full_shard" if fsdp is True else fsdp if isinstance(fsdp, str) else " ".join(map(str, fsdp))
        if words.replace("auto_wrap", "").strip() not in FSDP:
            raise InputError(f"fsdp is {self.fsdp!r}; it must be 'full_shard', or '' for weights that are whole")
        self.fsdp = words.replace("auto_wrap", "").strip()  # decoder layers are what is wrapped in any case
        if self.fsdp and self.optim == "adamw_8bit":
            raise InputError("adamw_8bit has moments in blocks that cannot be sharded; use optim='adamw_torch'")

    def _check_strategies(self) -> None:
        if self.eval_strategy is None:
            self.eval_strategy = "steps" if self.eval_steps else "no"
        for name, known in (("eval_strategy", Strategy), ("save_strategy", SaveStrategy),
                            ("logging_strategy", Strategy)):  # fmt: skip
            if getattr(self, name) is False:  # what YAML makes of no
                setattr(self, name, "no")
            if getattr(self, name) not in get_args(known):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(known))}")
        if self.eval_strategy == "steps" and not self.eval_steps:
            self.eval_steps = self.logging_steps
        if self.logging_strategy == "steps" and not self.logging_steps:
            raise InputError("logging_steps is 0 and logging_strategy is 'steps'; give a number of steps, or 'no'")
        if self.eval_strategy == "steps" and not self.eval_steps:
            raise InputError("eval_strategy is 'steps', and eval_steps and logging_steps are 0; give eval_steps")
        self.do_eval = self.do_eval or self.eval_strategy != "no"

    def _check_best(self) -> None:
        if self.load_best_model_at_end or self.lr_scheduler_type == "reduce_lr_on_plateau":
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "error"))
        if self.save_strategy == "best" and (self.metric_for_best_model is None or self.eval_strategy == "no"):
            raise InputError(
                "save_strategy is 'best', which needs metric_for_best_model and an eval_strategy; give both"
            )
        if self.lr_scheduler_type == "reduce_lr_on_plateau" and self.eval_strategy == "no":
            raise InputError("lr_scheduler_type 'reduce_lr_on_plateau' follows what is measured; give an eval_strategy")
        if self.load_best_model_at_end and self.save_strategy != "best":
            same = self.eval_strategy == self.save_strategy != "no"
            if not same or (self.eval_strategy == "steps" and not _multiple(self.save_steps, self.eval_steps or 1)):
                raise InputError(
                    "load_best_model_at_end needs every saved step to be measured: eval_strategy is "
                    f"{self.eval_strategy!r} (every {self.eval_steps} steps), save_strategy "
                    f"{self.save_strategy!r} (every {self.save_steps}); make them the same, and save_steps a multiple "
                    "of eval_steps"
                )

    def _check_choices(self) -> None:
        choices = {"train_sampling_strategy": SAMPLING, "hub_strategy": HUB,
                   "include_num_input_tokens_seen": ("no", "all", "non_padding")}  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        for name in self.include_for_metrics:
            if name not in ("inputs", "loss"):
                raise InputError(f"include_for_metrics has {name!r}; it takes 'inputs' and 'loss'")

    def sinks(self) -> list[str]:
        """The trackers that report_to names. Raises InputError for one that is not known, and MissingDependencyError
        where its package is not installed."""
        return sinks_of(self.report_to)

    # -- what transformers' arguments can be asked ---------------------------------------------------------------

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps in which the rate rises: warmup_steps, below 1 a share of all, or warmup_ratio."""
        steps = self.warmup_steps or self.warmup_ratio
        return int(steps) if self.warmup_steps >= 1 else math.ceil(num_training_steps * steps)

    def to_dict(self) -> dict[str, Any]:
        """The fields, tokens left out."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {k: f"<{k.upper()}>" if k in self.SECRETS and v else v for k, v in found.items()}

    def to_json_string(self) -> str:
        """The fields as JSON."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """The fields as numbers and texts, for trackers."""
        return {k: v if type(v) in (bool, int, float, str) else str(v) for k, v in self.to_dict().items()}

    @property
    def train_batch_size(self) -> int:
        """Rows at once of this process."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Rows at once of this process, where they are measured."""
        return self.per_device_eval_batch_size

    @property
    def ddp_timeout_delta(self) -> timedelta:
        """ddp_timeout as a duration."""
        return timedelta(seconds=self.ddp_timeout)

    @property
    def device(self) -> "torch.device":
        """The torch.device that a model on no GPU yet is trained on."""
        import torch

        return torch.device("cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu")

    @property
    def n_gpu(self) -> int:
        """GPUs of this process."""
        return int(self.device.type == "cuda")

    @property
    def parallel_mode(self) -> "ParallelMode":
        """Whether torchrun has started several processes."""
        return ParallelMode.NOT_PARALLEL if self.world_size == 1 else ParallelMode.DISTRIBUTED

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        import torch.distributed as dist

        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def process_index(self) -> int:
        """This process among them."""
        import torch.distributed as dist

        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    @property
    def should_save(self) -> bool:
        """Whether this process writes."""
        return self.process_index == 0

    should_log = should_save

    def get_process_log_level(self) -> int:
        """A level of Python's logging: log_level, "passive" is WARNING."""
        level = logging.getLevelName(self.log_level.upper())
        return level if isinstance(level, int) else logging.WARNING

    @contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Within it nothing waits: rows are encoded in memory, by each process for itself."""
        yield

    @property
    def better(self) -> str:
        """The measured value that says which step is the best."""
        name = self.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    @property
    def rising(self) -> bool:
        """Whether more of it is better."""
        return bool(self.greater_is_better)

    @classmethod
    def of(cls, values: Mapping[str, Any] | Sequence[Any]) -> Self:
        """Arguments from the fields of another class's, those that this class does not have left out."""
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        return cls(**{k: v for k, v in dict(values).items() if k in known})


def _multiple(saved: float, measured: float) -> bool:
    """Whether a step that is saved is always measured; shares and numbers of steps cannot be compared."""
    if (saved < 1) != (measured < 1):
        return False
    return round(saved * 1_000_000) % round(measured * 1_000_000) == 0
