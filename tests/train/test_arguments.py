"""TrainingArguments: every field of transformers', bounds of every number, and fields that have no effect."""

import dataclasses
import math
import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from llama2 import InputError
from llama2.errors import MissingDependencyError
from llama2.train import fields
from llama2.train.arguments import TrainingArguments
from llama2.train.configs import CONFIGS
from llama2.train.trackers import TRACKERS, sinks_of

# The fields of transformers 5.23 in their order, and those that 4.46.3 has besides.
FIELDS_5 = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm
label_smoothing_factor bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha
torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps logging_first_step
log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm
report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps
eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches
eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model
save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token
hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint
full_determinism seed data_seed use_cpu accelerator_config parallelism_config dataloader_drop_last
dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names
train_sampling_strategy length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics do_train do_eval
do_predict resume_from_checkpoint local_rank
""".split()  # noqa: SIM905
FIELDS_4 = """
overwrite_output_dir evaluation_strategy per_gpu_train_batch_size per_gpu_eval_batch_size warmup_ratio
logging_dir save_safetensors no_cuda use_mps_device jit_mode_eval use_ipex fp16_opt_level
half_precision_backend tpu_num_cores tpu_metrics_debug past_index fsdp_min_num_params
fsdp_transformer_layer_cls_to_wrap adafactor group_by_length use_legacy_prediction_loop
include_inputs_for_metrics fp16_backend push_to_hub_model_id push_to_hub_organization push_to_hub_token
mp_parameters torchdynamo ray_scope dispatch_batches split_batches include_tokens_per_second
""".split()  # noqa: SIM905


def made(*places: Any, **given: Any) -> TrainingArguments:
    return TrainingArguments(*(places or ("out",)), **given)


def test_the_fields_are_those_of_transformers_in_their_order() -> None:
    names = [f.name for f in dataclasses.fields(TrainingArguments)]
    assert names[: len(FIELDS_5)] == FIELDS_5
    assert set(names[len(FIELDS_5) :]) == set(FIELDS_4)
    args = TrainingArguments("out", 4, 2.0)
    assert (args.output_dir, args.per_device_train_batch_size, args.num_train_epochs) == ("out", 4, 2.0)
    assert TrainingArguments().output_dir == "trainer_output" and args.logging_steps == 500


def test_every_number_has_its_bound_in_one_table() -> None:
    for f in dataclasses.fields(TrainingArguments):
        if any(kind in str(f.type) for kind in ("int", "float")):
            assert f.name in fields.NUMBERS, f.name
    every = {f.name for kind in (TrainingArguments, *CONFIGS) for f in dataclasses.fields(kind)}
    assert set(fields.NUMBERS) <= every


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("learning_rate", 0, "a number, above 0"),
        ("learning_rate", "fast", "a number, above 0"),
        ("learning_rate", math.nan, "a number, above 0"),
        ("learning_rate", math.inf, "a number, above 0"),
        ("learning_rate", True, "a number, above 0"),
        ("logging_steps", 2.5, "a share of the steps below 1, a whole number of steps from 1 on"),
        ("logging_steps", -1, "at least 0"),
        ("eval_steps", -1, "at least 0"),
        ("save_steps", 1.5, "a whole number of steps from 1 on"),
        ("warmup_steps", -1, "at least 0"),
        ("warmup_ratio", 5, "at least 0 and at most 1"),
        ("num_train_epochs", -1, "above 0"),
        ("max_steps", 0, "at least 1, or -1"),
        ("max_steps", 2.5, "a whole number"),
        ("per_device_train_batch_size", 0, "at least 1"),
        ("per_device_train_batch_size", 2.5, "a whole number"),
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("weight_decay", -0.1, "at least 0"),
        ("adam_beta1", 1.5, "at most 1"),
        ("adam_epsilon", -1, "at least 0"),
        ("max_grad_norm", math.nan, "a number"),
        ("label_smoothing_factor", 2, "at most 1"),
        ("neftune_noise_alpha", -5, "at least 0"),
        ("save_total_limit", -1, "at least 0"),
        ("seed", 1.5, "a whole number"),
        ("torch_empty_cache_steps", 0, "at least 1"),
    ],
)
def test_numbers_beyond_their_bounds(name: str, value: Any, said: str) -> None:
    with pytest.raises(InputError) as error:
        made(**{name: value})
    assert f"{name} is {value!r}; it must be" in str(error.value) and said in str(error.value)


def test_texts_of_numbers_are_read() -> None:
    args = made(learning_rate="2e-5", per_device_train_batch_size="4", warmup_steps="0.1", bf16="false",
                gradient_checkpointing="True", lr_scheduler_kwargs='{"num_cycles": 2}', max_grad_norm="0.3",
                lr_scheduler_type="cosine", seed=torch.tensor(7))  # fmt: skip
    assert (args.learning_rate, args.per_device_train_batch_size, args.warmup_steps) == (2e-5, 4, 0.1)
    assert args.bf16 is False and args.gradient_checkpointing is True and args.activation_checkpointing is True
    assert args.lr_scheduler_kwargs == {"num_cycles": 2} and args.seed == 7
    with pytest.raises(InputError, match="bf16 is 'no'; it must be True or False"):
        made(bf16="no")
    with pytest.raises(InputError, match="lr_scheduler_kwargs is 'x', which is no JSON"):
        made(lr_scheduler_kwargs="x")


def test_no_step_at_all() -> None:
    """As in transformers: saving every 0 steps is never, measuring every 0 steps is as often as logging."""
    assert made(save_steps=0).save_steps == 0 and made(eval_steps=0).eval_strategy == "no"
    assert made(eval_strategy="steps", eval_steps=0, logging_steps=7).eval_steps == 7
    assert made(logging_steps=0, logging_strategy="no").logging_steps == 0
    with pytest.raises(InputError, match="logging_steps is 0 and logging_strategy is 'steps'"):
        made(logging_steps=0)
    with pytest.raises(InputError, match="eval_steps and logging_steps are 0"):
        made(logging_steps=0, logging_strategy="no", eval_strategy="steps")


def test_shares_of_the_steps() -> None:
    """As transformers 5 counts them: the share of all steps, rounded up."""
    assert [made(warmup_steps=w).get_warmup_steps(7) for w in (0, 0.5, 1, 3)] == [0, 4, 1, 3]
    assert made(warmup_ratio=0.1).get_warmup_steps(15) == 2
    assert made(warmup_ratio=0.5, warmup_steps=2).get_warmup_steps(10) == 2
    args = made(eval_steps=0.2, save_steps=0.4, load_best_model_at_end=True)
    assert args.eval_strategy == "steps" and args.better == "eval_loss" and not args.rising
    with pytest.raises(InputError, match="needs every saved step to be measured"):
        made(eval_steps=0.2, save_steps=0.3, load_best_model_at_end=True)
    with pytest.raises(InputError, match="needs every saved step to be measured"):
        made(eval_steps=0.2, save_steps=10, load_best_model_at_end=True)


def test_fields_without_effect_are_named_once_with_the_reason() -> None:
    with pytest.warns(UserWarning) as found:
        made(dataloader_num_workers=4, torch_compile=True, optim="paged_adamw_32bit")
    assert len(found) == 1
    said = str(found[0].message)
    assert "dataloader_num_workers=4 (rows are encoded once" in said and "torch_compile=True (" in said
    assert "the paging of optim='paged_adamw_32bit'" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(disable_tqdm=True, ddp_find_unused_parameters=False, enable_jit_checkpoint=True, do_train=True)
    for name in fields.NO_EFFECT:
        assert name in {f.name for f in dataclasses.fields(TrainingArguments)}, name


@pytest.mark.parametrize("name", list(fields.REFUSED))
def test_fields_that_would_change_the_result_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is .* which is not supported; "):
        made(**{name: 3 if name == "past_index" else True if name in ("adafactor", "split_batches") else "x"})


def test_names_of_old() -> None:
    args = made(evaluation_strategy="epoch", per_gpu_train_batch_size=3, no_cuda=True, group_by_length=True,
                push_to_hub_organization="we", push_to_hub_token="t")  # fmt: skip
    assert args.eval_strategy == "epoch" and args.per_device_train_batch_size == 3 and args.use_cpu
    assert args.train_sampling_strategy == "group_by_length" and args.hub_model_id == "we/out"
    assert args.hub_token == "t" and args.to_dict()["hub_token"] == "<HUB_TOKEN>"
    assert made(eval_strategy=False).eval_strategy == "no"  # what YAML makes of no
    assert made(eval_strategy=SimpleNamespace(value="epoch")).eval_strategy == "epoch"  # an enumeration's member


@pytest.mark.parametrize(("given", "optim"), [
    ("adamw_torch", "adamw_torch"), ("paged_adamw_32bit", "adamw_torch"), ("adamw_bnb_8bit", "adamw_8bit"),
    ("paged_adamw_8bit", "adamw_8bit"), ("adamw_hf", "adamw_torch"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*paging")
def test_optimisers_by_transformers_names(given: str, optim: str) -> None:
    assert made(optim=given).optim == optim


def test_a_subclass_has_fields_of_its_own() -> None:
    @dataclasses.dataclass
    class Mine(TrainingArguments):
        extra: int = 1

    assert Mine("out", extra=5).extra == 5
    with pytest.raises(InputError, match="Mine has no 'extr'; did you mean extra"):
        Mine("out", extr=5)


# -- trackers ----------------------------------------------------------------------------------------------------


class Recorder(ModuleType):
    """A package of a tracker that remembers what it is told."""

    def __init__(self, name: str, told: list[Any]) -> None:
        super().__init__(name)
        self.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        self.run, self.active_run = None, lambda: None

        def remember(call: str) -> Any:
            return lambda *args, **given: told.append((call, args, given))

        for call in ("init", "log", "finish", "start_run", "log_params", "log_metrics", "end_run"):
            setattr(self, call, remember(call))


@pytest.mark.parametrize("name", list(TRACKERS))
def test_a_tracker_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=f"report_to='{name}' needs the package {name}: pip install"):
        made(report_to=name)
    with pytest.raises(InputError, match="report_to is 'paper'; it must be one of none, all, tensorboard"):
        made(report_to=["paper"])
    assert name not in sinks_of("all") and sinks_of(None) == sinks_of("none") == sinks_of(["none"]) == []


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_what_a_tracker_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setitem(sys.modules, name, Recorder(name, told))
    args = made(report_to=name, run_name="mine")
    sink = TRACKERS[args.sinks()[0]].make(args)
    sink.write({"step": 3, "loss": 0.5, "eval_loss": 0.25, "note": "text"})
    sink.close()
    calls = [call for call, _, _ in told]
    assert "mine" in str(told[0])
    logged = next(args[0] for call, args, _ in told if call in ("log", "log_metrics"))
    assert logged["train/loss"] == 0.5 and logged["eval/loss"] == 0.25 and "train/note" not in logged
    assert calls[-1] in ("finish", "end_run") and "3" in str(told[-2])


def test_what_tensorboard_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []

    class Writer:
        def __init__(self, place: str) -> None:
            self.add_scalar, self.flush, self.close = lambda *entry: written.append(entry), dict, dict

    monkeypatch.setitem(sys.modules, "tensorboard", Recorder("tensorboard", []))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    sink = TRACKERS["tensorboard"].make(made(report_to="tensorboard"))
    sink.write({"step": 1, "loss": 2.0})
    sink.close()
    assert written == [("train/loss", 2.0, 1)]
