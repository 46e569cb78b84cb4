"""Rules for the fields of TrainingArguments: bounds of the numbers, old names, and what has no effect. No torch.

One row a field. A field of transformers that is in none of these tables is used as transformers uses it.
"""

import json
import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

from llama2.errors import InputError


class Number(NamedTuple):
    """The bounds of a number. open: low itself is out. share: below 1 it is a share of the steps, from 1 on a whole
    number of them. also: values beside the range."""

    low: float
    high: float = math.inf
    whole: bool = False
    open: bool = False
    share: bool = False
    also: tuple[float, ...] = ()

    def read(self, name: str, value: object) -> int | float:
        """The number. Raises InputError, with the bound, for what is none or lies beyond it."""
        found = _number(value)
        if found is None:
            raise InputError(f"{name} is {value!r}; it must be {self.text()}")
        if found in self.also:
            return int(found)
        beyond = not self.low <= found <= self.high or (self.open and found == self.low)
        fraction = math.isfinite(found) and not float(found).is_integer()
        if beyond or (fraction and (self.whole or (self.share and found > 1))):
            raise InputError(f"{name} is {value!r}; it must be {self.text()}")
        if not math.isfinite(found) and self.high != math.inf:
            raise InputError(f"{name} is {value!r}; it must be {self.text()}")
        return int(found) if self.whole or (self.share and found >= 1) else found

    def text(self) -> str:
        """The bounds in words."""
        if self.low == -math.inf:
            return "a number"
        bound = f"{'above' if self.open else 'at least'} {self.low:g}"
        if self.high != math.inf:
            bound += f" and at most {self.high:g}"
        kind = "a whole number, " if self.whole else "a number, "
        also = "".join(f", or {value:g}" for value in self.also)
        share = " (a share of the steps below 1, a whole number of steps from 1 on)" if self.share else ""
        return f"{kind}{bound}{also}{share}"


def _number(value: object) -> int | float | None:
    """A number, or a text of one as YAML leaves it ("2e-5"); None for anything else."""
    if hasattr(value, "item") and not isinstance(value, numbers.Number):  # a tensor or an array of one element
        value = value.item()
    if isinstance(value, str):
        try:
            value = float(value.replace("_", ""))
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    return None if math.isnan(value) else float(value)


_COUNT, _AT_LEAST_0 = Number(1, whole=True), Number(0)
_EVERY = Number(0, share=True)  # 0: never

NUMBERS: dict[str, Number] = {
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "per_gpu_train_batch_size": _COUNT,
    "per_gpu_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "num_train_epochs": Number(0, open=True),
    "max_steps": Number(1, whole=True, also=(-1,)),
    "learning_rate": Number(0, 1e6, open=True),
    "warmup_steps": Number(0, share=True),
    "warmup_ratio": Number(0, 1),
    "weight_decay": _AT_LEAST_0,
    "adam_beta1": Number(0, 1),
    "adam_beta2": Number(0, 1),
    "adam_epsilon": _AT_LEAST_0,
    "max_grad_norm": Number(-math.inf),  # 0 or less: gradients are never scaled
    "label_smoothing_factor": Number(0, 1),
    "neftune_noise_alpha": _AT_LEAST_0,
    "torch_empty_cache_steps": _COUNT,
    "logging_steps": _EVERY,
    "eval_steps": _EVERY,
    "save_steps": _EVERY,
    "eval_delay": _AT_LEAST_0,
    "save_total_limit": Number(0, whole=True),  # 0: all are kept
    "seed": Number(0, 2**63 - 1, whole=True),
    "data_seed": Number(0, 2**63 - 1, whole=True),
    "dataloader_num_workers": Number(0, whole=True),
    "dataloader_prefetch_factor": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    "ddp_timeout": _COUNT,
    "local_rank": Number(-1, whole=True),
    "past_index": Number(-1, whole=True),
    "fsdp_min_num_params": Number(0, whole=True),
    "tpu_num_cores": _COUNT,
    # Of SFTConfig, DPOConfig and RewardConfig.
    "max_length": _COUNT,
    "max_seq_length": _COUNT,
    "max_prompt_length": _COUNT,
    "max_completion_length": _COUNT,
    "num_of_sequences": _COUNT,
    "chars_per_token": Number(0, open=True),
    "dataset_num_proc": _COUNT,
    "dataset_batch_size": _COUNT,
    "router_aux_loss_coef": _AT_LEAST_0,
    "label_pad_token_id": Number(-(2**31), whole=True),
    "padding_value": Number(-(2**31), whole=True),
    "beta": _AT_LEAST_0,
    "label_smoothing": Number(0, 0.5),
    "precompute_ref_batch_size": _COUNT,
    "ld_alpha": Number(0, 1),
    "f_alpha_divergence_coef": Number(0, open=True),
    "discopop_tau": Number(0, open=True),
    "ref_model_mixup_alpha": Number(0, 1),
    "ref_model_sync_steps": _COUNT,
    "rpo_alpha": _AT_LEAST_0,
    "center_rewards_coefficient": _AT_LEAST_0,
    "desirable_weight": _AT_LEAST_0,
    "undesirable_weight": _AT_LEAST_0,
    "cpo_alpha": _AT_LEAST_0,
    "simpo_gamma": _AT_LEAST_0,
    "alpha": _AT_LEAST_0,
}

# Names of old -> today's.
ALIASES = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
}

_ONE_PROCESS = "ranks sum their gradients in one way"
_LOADER = "rows are encoded once, when the trainer is made, and no process loads them"
_LEVEL = "set the level of Python's own logging and warnings"
_APEX = "there is one way to compute in 16 bits"
_TPU = "there is no TPU here"
_FSDP = "fsdp wraps the decoder's layers"

# Field -> why another value than the default changes nothing here, and the values that hold in any case.
NO_EFFECT: dict[str, tuple[str, tuple[Any, ...]]] = {
    "log_level": (_LEVEL, ()),
    "log_level_replica": (_LEVEL, ()),
    "log_on_each_node": ("rank 0 alone reports", (False,)),
    "logging_nan_inf_filter": ("a loss of NaN or inf ends the run", ()),
    "disable_tqdm": ("there is no progress bar; callbacks and report= hear of every step", (True,)),
    "eval_accumulation_steps": ("predictions go to the processor's memory after each batch", ()),
    "eval_use_gather_object": ("predictions are gathered as arrays", ()),
    "save_on_each_node": ("output_dir is a folder that all machines see", ()),
    "enable_jit_checkpoint": ("SIGTERM saves in any case", (True,)),
    "hub_always_push": ("each upload is waited for", ()),
    "ignore_data_skip": ("going on finds its place in the rows at once", ()),
    "full_determinism": ("runs repeat bit for bit on a CPU; on CUDA call torch.use_deterministic_algorithms", ()),
    "torch_compile": ("layers run as written-out functions", ()),
    "torch_compile_backend": ("layers run as written-out functions", ()),
    "torch_compile_mode": ("layers run as written-out functions", ()),
    "torchdynamo": ("layers run as written-out functions", ()),
    "use_liger_kernel": ("the loss is computed in chunks in any case", ()),
    "liger_kernel_config": ("the loss is computed in chunks in any case", ()),
    "use_cache": ("training keeps no cache", ()),
    "auto_find_batch_size": ("choose per_device_train_batch_size", ()),
    "accelerator_config": ("accelerate is not used", ({},)),
    "dataloader_num_workers": (_LOADER, ()),
    "dataloader_pin_memory": (_LOADER, ()),
    "dataloader_persistent_workers": (_LOADER, ()),
    "dataloader_prefetch_factor": (_LOADER, ()),
    "dataloader_multiprocessing_context": (_LOADER, ()),
    "dataloader_in_order": (_LOADER, ()),
    "length_column_name": ("lengths are counted", ()),
    "average_tokens_across_devices": ("the loss is always that of all ranks' targets", ()),
    "ddp_find_unused_parameters": (_ONE_PROCESS, (False,)),
    "ddp_bucket_cap_mb": (_ONE_PROCESS, ()),
    "ddp_broadcast_buffers": (_ONE_PROCESS, (False,)),
    "ddp_static_graph": (_ONE_PROCESS, (False,)),
    "ddp_backend": ("GPUs use NCCL, CPUs gloo", ("nccl", "gloo")),
    "ddp_timeout": ("ranks wait for an hour", ()),
    "fsdp_config": (_FSDP, ({},)),
    "fsdp_min_num_params": (_FSDP, ()),
    "fsdp_transformer_layer_cls_to_wrap": (_FSDP, ("LlamaDecoderLayer",)),
    "debug": ("look at the report of the rows, and at log.jsonl", ([],)),
    "skip_memory_metrics": ("memory is not measured", ()),
    "use_mps_device": ("the model stays on its device", ()),
    "jit_mode_eval": ("layers run as they are", ()),
    "use_ipex": ("the library has kernels of its own", ()),
    "fp16_opt_level": (_APEX, ()),
    "half_precision_backend": (_APEX, ()),
    "fp16_backend": (_APEX, ()),
    "tpu_num_cores": (_TPU, ()),
    "tpu_metrics_debug": (_TPU, ()),
    "mp_parameters": ("SageMaker's model parallelism is not used", ()),
    "use_legacy_prediction_loop": ("there is one", ()),
    "ray_scope": ("there is no search over settings", ()),
    "dispatch_batches": ("each rank takes its share of the rows", (False,)),
    "overwrite_output_dir": ("scripts alone read it in transformers too; a folder's checkpoints are never mixed", ()),
}

# Fields whose meaning would change the result -> what to do instead.
REFUSED = {
    "deepspeed": "use fsdp='full_shard', which shards weights, gradients and moments",
    "parallelism_config": "use fsdp='full_shard'",
    "optim_target_modules": "GaLore and its kin are not here; use optim='adamw_8bit', or an adapter",
    "optim_args": "give adam_beta1, adam_beta2 and adam_epsilon, or an optimiser of your own: optimizers=(opt, None)",
    "adafactor": "use optim='adamw_8bit', or an optimiser of your own: optimizers=(opt, None)",
    "past_index": "Llama has no such output",
    "split_batches": "divide per_device_train_batch_size by the number of processes instead",
}

# Names of transformers' optimisers that are this one here.
OPTIMIZERS = {
    "adamw_torch": "adamw_torch",
    "adamw_torch_fused": "adamw_torch_fused",
    "adamw_hf": "adamw_torch",
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
}
DICTS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "fsdp_config",
         "accelerator_config", "liger_kernel_config", "model_init_kwargs", "dataset_kwargs")  # fmt: skip


def read_flag(name: str, value: object) -> bool:
    """True or False, or a text of it. Raises InputError for anything else: "False" would count as true."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if isinstance(value, bool) or (isinstance(value, numbers.Integral) and value in (0, 1)):
        return bool(value)
    raise InputError(f"{name} is {value!r}; it must be True or False")


def read_mapping(name: str, value: object) -> dict[str, Any]:
    """A dict, or the JSON of one. Raises InputError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"{name} is {value!r}, which is no JSON ({error}); give a dict") from error
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is {value!r}; it must be a dict")
    return dict(value)


def without_effect(
    values: Mapping[str, Any], defaults: Mapping[str, Any], own: Mapping[str, tuple[str, tuple[Any, ...]]]
) -> list[str]:
    """The fields whose values change nothing here, each with the reason; own: rows beside NO_EFFECT.

    Raises InputError for those of REFUSED."""
    for name, instead in REFUSED.items():
        if name in values and values[name] not in (defaults[name], None, "", False):
            raise InputError(f"{name} is {values[name]!r}, which is not supported; {instead}")
    found = []
    for name, (reason, kept) in {**NO_EFFECT, **own}.items():
        if name in values and values[name] != defaults[name] and values[name] is not None and values[name] not in kept:
            found.append(f"{name}={values[name]!r} ({reason})")
    return found
