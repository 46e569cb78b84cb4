"""Starting point of a run: a model, or an adapter that is trained further, with its base model."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama2 import checkpoint
from llama2.architecture import parameter_shapes
from llama2.auto import AutoTokenizer, load_config
from llama2.checkpoint.arguments import resolve_device
from llama2.checkpoint.packing_note import read_packing
from llama2.checkpoint.peft_files import PICKLE, WEIGHTS, is_adapter, read_config, read_fields
from llama2.checkpoint.source import fetch_files, local_path, locate_all, revision_of
from llama2.config import LlamaConfig
from llama2.errors import InputError, Llama2Error
from llama2.lora_config import LoraConfig
from llama2.protocols import TokenizerLike
from llama2.quantization_config import BitsAndBytesConfig, QuantizationConfig
from llama2.train.precision import beneath_adapter
from llama2.train.recipe import Recipe

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class Origin:
    """MODEL of a recipe. adapter: its folder, where MODEL is one; base: the model itself, or the adapter's; hub: the
    revision of the base, as from_pretrained takes it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.adapter = adapter_of(recipe.model, recipe.revision)
        self.base, self.lora = recipe.model, recipe.lora
        self.hub: dict[str, Any] = {**revision_of(recipe.model, recipe.revision)}
        if self.adapter is not None:
            self.base = self._of_adapter(self.adapter)
            self.lora = read_config(self.adapter)
            stored = None if local_path(self.base) is not None else self.lora.revision
            self.hub = {**revision_of(self.base, stored)}
        self.config: LlamaConfig = load_config(self.base, **self.hub)
        self.packing = self._packing()
        self._check()

    def _of_adapter(self, folder: Path) -> str:
        if not any((folder / name).exists() for name in (WEIGHTS, PICKLE)):
            raise InputError(
                f"{folder} is an adapter; put it into its model first, or give one with its weights ({WEIGHTS})"
            )
        if self.recipe.lora is not None:
            raise InputError(
                f"{folder} is an adapter, which is trained on as it is; leave the settings of a new one out (--lora-r "
                "and the like), or put it into its model first (`llama2 merge-adapter`)"
            )
        base = read_fields(folder).get("base_model_name_or_path")
        if not base:
            raise InputError(f"{folder} does not say which model it is for (base_model_name_or_path); add that to it")
        return str(base)

    def _packing(self) -> QuantizationConfig | None:
        """How the weights beneath the adapter are packed as they are loaded: as asked for, or as the adapter says."""
        recipe = self.recipe
        if recipe.load_in_8bit:
            return BitsAndBytesConfig(load_in_8bit=True)
        if recipe.load_in_4bit:
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype="bfloat16",
            )
        return None if self.adapter is None else read_packing(self.adapter)

    def _check(self) -> None:
        recipe, trains_adapter = self.recipe, self.lora is not None
        if (recipe.load_in_4bit or recipe.load_in_8bit) and not trains_adapter:
            raise InputError("packed weights cannot be trained themselves; train an adapter on them (lora_r=16)")
        if recipe.merge and not trains_adapter:
            raise InputError("merge is for an adapter, and all weights are trained; leave it out")
        if recipe.of_task.fresh and trains_adapter:
            raise InputError("fresh weights are for pretraining all weights; leave fresh, or the adapter, out")
        method = (getattr(self.config, "quantization_config", None) or {}).get("quant_method")
        if method and not trains_adapter:
            raise InputError(
                f"{self.base} is packed ({method}), and packed weights cannot be trained themselves; train an adapter "
                "on them (--lora-r 16), or unpack the model first (`llama2 convert`)"
            )
        if self.adapter is None and self.lora is not None:
            _check_targets(self.lora, self.config)

    def packing_in(self, dtype: str) -> QuantizationConfig | None:
        """How the weights are packed as they are loaded, and computed in `dtype`."""
        found = self.packing
        if isinstance(found, BitsAndBytesConfig) and found.load_in_4bit and dtype != "auto":
            return replace(found, bnb_4bit_compute_dtype=dtype)
        return found

    # -- what is loaded of it ------------------------------------------------------------------------------------

    def tokenizer(self) -> TokenizerLike:
        """The adapter's own, where its folder has one, else the model's."""
        path, own = Path(self.base), self.adapter
        if own is not None and any((own / name).exists() for name in _TOKENIZERS):
            return AutoTokenizer.from_pretrained(own)
        single = path.is_file() and path.suffix in (".safetensors", ".bin")
        return AutoTokenizer.from_pretrained(path.parent if single else self.base, **self.hub)

    def dtype(self, device: torch.device, bf16: bool) -> tuple[str, str]:
        """Returns the dtype to load weights in, and a sentence on it where that is not what they are stored in, or
        ""."""
        if self.recipe.dtype != "auto":
            return self.recipe.dtype, ""
        if self.lora is None:
            return "float32", ""  # bf16 trains a cast of it and updates float32 copies
        return ("bfloat16", "") if bf16 else beneath_adapter(self._stored(), device.type)

    def _stored(self) -> str:
        if (name := self.config.dtype_name) is not None:
            return name
        try:
            return checkpoint.open(self.base).auto_dtype
        except Llama2Error:  # a hub id: its weights are not here yet
            return "float32"


def adapter_of(model: str, revision: str | None) -> Path | None:
    """The folder of MODEL where it is an adapter, fetched where it is the hub id of one; None for anything else."""
    hub = revision_of(model, revision)
    if local_path(model) is not None:
        return Path(model) if is_adapter(Path(model)) else None
    if not is_adapter(fetch_files(model, hub, "config")):  # a repository without its weights
        return None
    folder = locate_all(model, revision).path
    return folder if is_adapter(folder) else None


def _check_targets(config: LoraConfig, model: LlamaConfig) -> None:
    linears = [name.removesuffix(".weight") for name, size in parameter_shapes(model).items() if len(size) == 2]
    if not any(config.targets(path) for path in linears):
        raise InputError(f"target_modules {config.target_modules!r} name none of {', '.join(linears[1:])[:200]}")


def check_place(folder: Path) -> None:
    """Raises InputError for a folder that cannot be written, before anything is loaded or trained for it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); give another folder") from error


def check_device(device: str, fp16: bool) -> torch.device:
    """The device to train on. Raises InputError where there is none, or where float16 cannot be trained on it."""
    found = resolve_device(device)
    if fp16 and found.type != "cuda":
        raise InputError(f"fp16 needs a CUDA device, and the model would be on {found}: use bf16 there")
    return found
