"""from_pretrained: build on meta, take each tensor from the memory map, demand exact coverage."""

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llama2.checkpoint import Checkpoint, Stored
from llama2.checkpoint.arguments import DTYPES, resolve_device, resolve_dtype
from llama2.checkpoint.config_repair import stored_generation
from llama2.checkpoint.covered import not_weights
from llama2.checkpoint.fresh import draw, not_of_the_network
from llama2.checkpoint.gguf_layers import PackingPlan, keep_blocks
from llama2.checkpoint.hf import HfCheckpoint
from llama2.checkpoint.packed_names import settings_of
from llama2.checkpoint.packing_note import read_packing
from llama2.checkpoint.page_cache import release
from llama2.checkpoint.parallel_read import in_single_threads
from llama2.checkpoint.peft import load_adapter
from llama2.checkpoint.peft_files import HEADS, AdaptedBase, adapted_base
from llama2.checkpoint.quantized import asked_for, dequantize_as, linears, packed_layers, place
from llama2.checkpoint.source import Located, locate, open_source, override, split_hub_options
from llama2.checkpoint.weights import GivenWeights, Renamed, Rest, Weights
from llama2.classifiers import (
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)
from llama2.config import LlamaConfig
from llama2.coverage import Coverage, cover, listed
from llama2.errors import CheckpointError, InputError, MismatchError
from llama2.generation.config import GenerationConfig
from llama2.keywords import drop, refuse_unknown
from llama2.lazy import door
from llama2.mapping import reading_whole
from llama2.model import LlamaForCausalLM, LlamaModel
from llama2.pretrained import PreTrainedModel
from llama2.quantization.formats import layer_class
from llama2.quantization_config import GPTQConfig, QuantizationConfig

Model = TypeVar("Model", bound=PreTrainedModel)

CLASSES: dict[str, type[PreTrainedModel]] = {
    kind.__name__: kind
    for kind in (
        LlamaModel,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        LlamaForTokenClassification,
        LlamaForQuestionAnswering,
    )
}
_PREFIXES = ("model.", "transformer.")  # of the model without its head, in the classes that have one


@contextmanager
def head_follows() -> Iterator[None]:
    """A scope without the warning that a classifier's head is new: it is trained, or an adapter brings it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(score|qa_outputs).* newly initialised")
        yield


_quantized = door("quantize.on_load", "quantized", "Quantises a checkpoint with calibration.")


def _calibrated(given: Any) -> GPTQConfig | None:
    """The settings of a quantisation that needs texts to calibrate on; None for any other."""
    if given is None:
        return None
    config = asked_for(given, False, False)
    return config if isinstance(config, GPTQConfig) and config.dataset is not None else None


def _named(made: Any, name: str) -> None:
    model = made[0] if isinstance(made, tuple) else made
    model.name_or_path = model.config.name_or_path = name


def _mapped_or_read(load: Callable[..., Any]) -> Callable[..., Any]:
    """`load` with disable_mmap=, which reads files into memory in place of mapping them."""

    @functools.wraps(load)
    def loaded(*args: Any, disable_mmap: bool = False, **kwargs: Any) -> Any:
        with reading_whole(bool(disable_mmap)):
            return load(*args, **kwargs)

    return loaded


def _on_adapters(load: Callable[..., Any]) -> Callable[..., Any]:
    """`load` that takes the folder, or the hub id, of an adapter too: the model that it is for, with the adapter
    attached; and a quantization_config with texts to calibrate on."""

    @functools.wraps(load)
    def loaded(cls: type[Any], pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any) -> Any:
        if pretrained_model_name_or_path is None:
            return load(cls, None, *args, **kwargs)
        drop("hub", kwargs, stacklevel=5)
        hub = split_hub_options(dict(kwargs))
        chosen = {key: kwargs[key] for key in ("use_safetensors", "gguf_file") if key in kwargs}
        located = locate(pretrained_model_name_or_path, hub, **chosen)
        if (given := _calibrated(kwargs.get("quantization_config"))) is not None:
            with tempfile.TemporaryDirectory() as folder:  # mapped files stay readable when their names are gone
                quantised_folder = Path(folder) / "gptq"
                _quantized(located.path, given, quantised_folder)
                model = loaded(cls, quantised_folder, *args, **{**kwargs, "quantization_config": None})
            _named(model, str(located))
            return model
        adapter_base = adapted_base(located.path)
        if adapter_base is None:
            return load(cls, located, *args, **kwargs)
        for key in ("subfolder",) if Path(located.name).expanduser().exists() else ("subfolder", "revision"):
            kwargs.pop(key, None)
        return _with_adapter(functools.partial(loaded, cls, adapter_base.base, *args), located, adapter_base, kwargs)

    return loaded


def _with_adapter(load_base: Callable[..., Any], place: Located, found: AdaptedBase, kwargs: dict[str, Any]) -> Any:
    """The base model with the adapter on it; packed as the adapter's folder remembers, if nothing else is asked for."""
    kwargs.setdefault("revision", found.revision)
    wants_info = kwargs.pop("output_loading_info", False)
    noted = None
    if not any(kwargs.get(key) for key in ("quantization_config", "load_in_4bit", "load_in_8bit")):
        kwargs["quantization_config"] = noted = read_packing(place.path)
    with head_follows():
        model, info = load_base(**{**found.labels, **kwargs}, output_loading_info=True)
    lost = [name for name in info["missing_keys"] if name.partition(".")[0] in HEADS and name not in found.heads]
    if lost:
        raise MismatchError(
            f"{place} is an adapter without {lost[0]}, and its model {found.base} has none either: its "
            "answers would be random. Give the adapter that was trained with a head (`llama2 finetune "
            "classify` makes one)"
        )
    load_adapter(model, place.path)
    model.__dict__["_packed_for_adapter"] = noted is not None
    info["missing_keys"] = [name for name in info["missing_keys"] if name not in found.heads]
    return (model, info) if wants_info else model


@_mapped_or_read
@_on_adapters
def from_pretrained(
    cls: type[Model],
    pretrained_model_name_or_path: str | Path | Located | None,
    *model_args: Any,
    config: LlamaConfig | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | Mapping[str, str] | None = None,
    output_loading_info: bool = False,
    ignore_mismatched_sizes: bool = False,
    use_safetensors: bool | None = None,
    weights_only: bool = True,
    variant: str | None = None,
    gguf_file: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    generation_config: Any = None,
    key_mapping: Mapping[str, str] | None = None,
    quantization_config: Any = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    dequantize: bool | None = None,
    **kwargs: Any,
) -> Model | tuple[Model, dict[str, list[Any]]]:
    """A model in eval mode from a folder, a .safetensors, .bin or GGUF file, a hub id, or the folder of an adapter.

    dtype (or torch_dtype): "auto" and None mean the dtype the weights are stored in (config.json's where it names
    one); a torch.dtype or its name converts. A LlamaForCausalLM of a GGUF file with quantised blocks keeps them on a
    CPU and computes in float32; a dtype, dequantize=True, a GPU and the other classes unpack them (to bfloat16 where no
    dtype is given), dequantize=False never does, and dtype is then what is computed in. device_map: one
    device ("cpu", "cuda", 0, {"": "cuda:0"}), or "auto" for the GPU where there is one. Hub settings (revision,
    cache_dir, token, local_files_only, force_download, subfolder) have no meaning for a local path. Any other keyword
    must be a field of the configuration and overrides it. A checkpoint of packed linears (GPTQ, bitsandbytes) stays
    packed; another is quantised as it loads, one matrix at a time, where quantization_config (a BitsAndBytesConfig,
    or its dict) or load_in_4bit or load_in_8bit says so. key_mapping renames tensors, see
    `weights.Renamed`; generation_config stands in place of the checkpoint's. disable_mmap=True reads the weights
    into memory, for files that may be cut while they are mapped. With output_loading_info a dict of
    missing_keys, unexpected_keys, mismatched_keys and error_msgs comes back too.

    A missing head, and what a subclass adds, are drawn anew with a warning, and so are tensors of another shape with
    ignore_mismatched_sizes. Every other parameter must be filled and every tensor used: MismatchError lists both.
    """
    hub = split_hub_options(kwargs)
    drop("from_pretrained", kwargs, stacklevel=6)
    device = resolve_device(device_map)
    source: Checkpoint | None = None
    if pretrained_model_name_or_path is not None:
        source = open_source(
            pretrained_model_name_or_path,
            hub,
            use_safetensors=use_safetensors,
            variant=variant,
            weights_only=weights_only,
            gguf_file=gguf_file,
        )
    elif state_dict is None or config is None:
        raise InputError("without a path, from_pretrained needs both config= and state_dict=")
    settings = _configure(config, source, attn_implementation, kwargs)
    weights: Weights = source if state_dict is None and source is not None else GivenWeights(state_dict or {})
    if key_mapping:
        weights = Renamed(weights, key_mapping)
    if config is not None and state_dict is None:
        _take_quantization(settings, source)
    packing = PackingPlan(
        resolve_dtype(dtype, torch_dtype),
        settings_of(settings, str(pretrained_model_name_or_path or settings.name_or_path)),
        asked_for(quantization_config, load_in_4bit, load_in_8bit),
        source if weights is source else None,
        dequantize,
    )
    packing.decide(cls is LlamaForCausalLM, device)
    asked_dtype = settings.dtype_name if config is not None else None
    chosen = packing.asked or DTYPES[asked_dtype or packing.auto_dtype(weights)]
    settings.dtype = chosen
    if pretrained_model_name_or_path is not None:
        settings.name_or_path = str(pretrained_model_name_or_path)

    with torch.device("meta"), _NoDraws():
        model = cls(settings, *model_args)
    report = _filled(model, weights, packing, ignore_mismatched_sizes, chosen, device)
    model.generation_config = _generation_config(generation_config, source, settings)
    if device_map is not None:
        model.hf_device_map = {"": str(device) if device.index is None else device.index}
    model.eval()
    return (model, info(report)) if output_loading_info else model


def _filled(
    model: PreTrainedModel,
    weights: Weights,
    packing: PackingPlan,
    ignore_mismatched_sizes: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Coverage:
    """Gives the model its weights, packed as `packing` says; what was found of them."""
    if packing.stored is not None:
        used, filled = place(model, translated(model, weights.tensors), weights, packing.stored)
        weights = Rest(weights, used, filled)
    report = match(model, weights, ignore_mismatched_sizes)
    if packing.file is not None and packing.blocks:
        keep_blocks(model, packing.file, report.found, dtype)
    elif packing.wanted is not None:
        pack(model, weights, report.found, packing.wanted, dtype)
    fill(model, weights, report, dtype, device)
    if packing.unpacks:
        dequantize_as(model, dtype)
    return report


def from_pretrained_named(name: str, *args: Any, **kwargs: Any) -> Any:
    """from_pretrained of the model class with this name; for callers that must not import torch before they load."""
    return from_pretrained(CLASSES[name], *args, **kwargs)


def from_config_named(
    name: str,
    config: LlamaConfig,
    *,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    attn_implementation: str | Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """A model with fresh weights in `dtype`, else in the dtype the configuration names, else in torch's default."""
    drop("hub", kwargs, stacklevel=5)
    refuse_unknown("from_config", kwargs)
    config = LlamaConfig.of(config)
    chosen = resolve_dtype(dtype, torch_dtype) or DTYPES.get(config.dtype_name or "")
    return CLASSES[name].from_config(config, dtype=chosen, attn_implementation=attn_implementation)


class _NoDraws(TorchFunctionMode):
    """Leaves random initialisation out: on meta it has no effect, but torch imports its compiler for it (over 1 s)."""

    _DRAWS = frozenset({"normal_", "uniform_", "kaiming_uniform_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self._DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


# -- settings ----------------------------------------------------------------------------------------------------


def _configure(
    given: LlamaConfig | str | Path | None,
    source: Checkpoint | None,
    attn_implementation: str | Mapping[str, str] | None,
    overrides: dict[str, Any],
) -> LlamaConfig:
    """A configuration of the model's own: the one given, or the checkpoint's, with the keywords on top."""
    if isinstance(given, str | Path):
        config = LlamaConfig.from_pretrained(given)
    elif given is not None:
        config = copy.deepcopy(LlamaConfig.of(given))
    else:
        assert source is not None
        config = copy.deepcopy(source.config)
    if overrides.pop("use_flash_attention_2", None):
        attn_implementation = attn_implementation or "flash_attention_2"
    config = override(config, overrides)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    return config


def _take_quantization(config: LlamaConfig, source: Checkpoint | None) -> None:
    """How a file is packed stands in its own configuration, whatever configuration the caller gave."""
    if not isinstance(source, HfCheckpoint) or not (source.folder / "config.json").exists():
        return
    content = getattr(source.config, "quantization_config", None)
    if content is not None and not hasattr(config, "quantization_config"):
        config.quantization_config = content


def _generation_config(given: Any, source: Checkpoint | None, config: LlamaConfig) -> GenerationConfig:
    if given is not None:
        return copy.deepcopy(GenerationConfig.of(given))
    return GenerationConfig.from_model_config(config) if source is None else stored_generation(source, config)


# -- coverage ----------------------------------------------------------------------------------------------------


def info(report: Coverage) -> dict[str, list[Any]]:
    """The dict that output_loading_info returns."""
    return {
        "missing_keys": list(report.missing),
        "unexpected_keys": list(report.unexpected),
        "mismatched_keys": report.mismatched,
        "error_msgs": [],
    }


def match(model: PreTrainedModel, weights: Weights, ignore_mismatched_sizes: bool = False) -> Coverage:
    """Pairs parameters and tensors, adding or removing the base model's prefix. Raises MismatchError."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    same = {name: first.setdefault(id(parameter), name) for name, parameter in parameters.items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    names = translated(model, weights.tensors)
    report = cover(shapes, weights.tensors, names, same, lambda name: not bool(weights.read(name).any()))
    _judge(model, weights.tensors, report, ignore_mismatched_sizes)
    _check_tied(model, parameters, weights, report)
    return report


def translated(model: PreTrainedModel, stored: Mapping[str, Stored]) -> dict[str, str]:
    """Names as the model says them -> names in the file."""
    prefix = model.base_model_prefix + "."
    theirs = next((p for p in _PREFIXES if any(name.startswith(p) for name in stored)), "")
    if model.base_model is model:
        return {name.removeprefix(theirs): name for name in stored}
    if theirs:
        return {prefix + name.removeprefix(theirs) if name.startswith(theirs) else name: name for name in stored}
    inner = {name for name, _ in model.base_model.named_children()}
    return {(prefix + name if name.partition(".")[0] in inner else name): name for name in stored}


def _judge(
    model: PreTrainedModel, stored: Mapping[str, Stored], report: Coverage, ignore_mismatched_sizes: bool
) -> None:
    """Raises MismatchError for everything that is neither filled, used nor excused; warns of fresh weights."""
    excused = not_of_the_network(model, report.missing)
    # A file that says it is a causal model and has no head is damaged, or tied without saying so.
    if "LlamaForCausalLM" not in (model.config.architectures or ()):
        excused.add("lm_head.weight")
    excused |= {name for name in report.unexpected if name.partition(".")[0] in ("lm_head", *HEADS)}
    problems = report.problems(excused, any_shape=ignore_mismatched_sizes) + not_weights(stored, report)
    if problems:
        raise MismatchError(
            f"the tensors do not fit {type(model).__name__} with this configuration: {listed(problems)}.{report.hint()}"
            + (" or pass ignore_mismatched_sizes=True to draw those anew" if report.mismatched else "")
        )
    if fresh := [*report.missing, *(entry[0] for entry in report.mismatched)]:
        warnings.warn(
            f"{', '.join(fresh)} of {type(model).__name__} cannot be taken from the checkpoint and are newly "
            "initialised; train the model before you rely on it",
            stacklevel=4,
        )


def _check_tied(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], weights: Weights, report: Coverage
) -> None:
    """A tied model whose file holds a head of its own: equal to the embedding, or the configuration is wrong."""
    first: dict[int, str] = {}
    for name in list(report.found):
        other = first.setdefault(id(parameters[name]), name)
        if other == name:
            continue
        if not torch.equal(weights.read(report.found[other]), weights.read(report.found[name])):
            raise MismatchError(
                f"the configuration ties {other} and {name}, but the file holds different tensors for them; "
                "pass tie_word_embeddings=False to load both"
            )
        del report.found[name]


# -- filling -----------------------------------------------------------------------------------------------------


def fill(model: PreTrainedModel, weights: Weights, report: Coverage, dtype: torch.dtype, device: torch.device) -> None:
    """Gives every meta parameter the stored tensor (no copy where dtype and device allow), or fresh values."""
    fresh = [*report.missing, *(entry[0] for entry in report.mismatched)]
    draw(model, fresh, dtype, device)
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    by_name = {name: names for names in shared.values() for name in names}

    def read(name: str) -> Tensor:
        return weights.read(report.found[name], dtype).to(device)

    for name, tensor in zip(report.found, in_single_threads(read, report.found), strict=True):
        new = nn.Parameter(tensor, requires_grad=model.get_parameter(name).requires_grad)
        for alias in by_name[name]:
            module_name, _, leaf = alias.rpartition(".")
            model.get_submodule(module_name)._parameters[leaf] = new
    model.tie_weights()
    for layer in packed_layers(model).values():
        layer.to(device)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(f"{name} of {type(model).__name__} is stored in no checkpoint and has no value")


def pack(
    model: PreTrainedModel, weights: Weights, stored: dict[str, str], config: QuantizationConfig, dtype: torch.dtype
) -> None:
    """Quantises the linears that `config` means as they are read, and takes their weights out of `stored`."""
    chosen = {path: linear for path, linear in linears(model).items() if not config.skips(path)}
    chosen = {path: linear for path, linear in chosen.items() if f"{path}.weight" in stored}
    linear_class = layer_class(config)

    def packed(path: str) -> nn.Module:
        weight = weights.read(stored[f"{path}.weight"], dtype)
        layer = linear_class.quantize(weight, chosen[path].bias, config.at(path))
        release(weight)  # of a mapped file: else all of it stays in memory beside what it became
        return layer

    for path, layer in zip(chosen, in_single_threads(packed, chosen), strict=True):
        model.set_submodule(path, layer)
        del stored[f"{path}.weight"]
    model.config.quantization_config = config.to_dict()
