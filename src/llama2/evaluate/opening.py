"""A model for an evaluation, with its adapter, from a path."""

from typing import Any

from llama2.auto import AutoModelForCausalLM
from llama2.checkpoint import find_gguf
from llama2.checkpoint.merge import merge_into
from llama2.checkpoint.peft import load_adapter
from llama2.checkpoint.peft_adapter import read_adapter
from llama2.checkpoint.quantized import packed_layers
from llama2.checkpoint.source import locate, locate_all
from llama2.runners.native import NativeModel, why_not


def open_model(
    path: str,
    dtype: str = "auto",
    device: str | None = None,
    runner: str = "auto",
    adapter: str | None = None,
    revision: str | None = None,
) -> Any:
    """The model of a folder, a file or a hub id.

    adapter: a LoRA adapter, beside the weights on the native engine, and beside packed ones in torch, else merged.
    """
    place = locate_all(path, revision).path
    settings: dict[str, Any] = {"dtype": dtype, "device_map": device or "auto"}
    if runner == "torch":
        settings["dequantize"] = True
    folder = None if adapter is None else locate(adapter, {}).path
    model: Any = AutoModelForCausalLM.from_pretrained(str(find_gguf(place) or place), **settings)
    if folder is None:
        return model
    if runner != "torch" and not why_not(model):
        native = model if isinstance(model, NativeModel) else NativeModel.from_module(model)
        native.load_adapter(folder)
        return native
    if packed_layers(model):
        load_adapter(model, folder)
    else:
        merge_into(model, read_adapter(folder, model.config))
    return model
