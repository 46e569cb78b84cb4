"""A LoRA adapter that stays one: peft's folder as llama.cpp's GGUF file, or the reverse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llama2.architecture import parameter_shapes
from llama2.checkpoint import gguf_adapter
from llama2.checkpoint.adapter_header import adapter_file, described_base
from llama2.checkpoint.gguf import GgufFile
from llama2.checkpoint.peft import write_adapter
from llama2.checkpoint.peft_adapter import Adapter, read_adapter
from llama2.checkpoint.peft_files import read_fields
from llama2.checkpoint.source import hub_id
from llama2.config import LlamaConfig
from llama2.errors import InputError
from llama2.lora_config import LoraConfig


def named_base(source: Path) -> str | None:
    """The model that an adapter, peft's folder or a GGUF file, says it is for; None where it says none."""
    if (file := adapter_file(source)) is not None:
        return described_base(GgufFile(file).metadata)
    return read_fields(source).get("base_model_name_or_path") or None


def check_paths(source: Path, target: Path) -> None:
    """Raises InputError unless the target is new and of the other kind than the source."""
    if adapter_file(source) is None:
        wanted, fits = "a new GGUF file, whose name ends in .gguf", target.suffix == ".gguf"
    else:
        wanted, fits = "a new folder for peft", target.suffix != ".gguf"
    if not fits:
        raise InputError(f"the adapter {source} becomes {wanted}; {target} is none")
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not empty; give a new path, nothing is overwritten")


def convert_adapter(source: Path, target: Path, model: LlamaConfig, base: str | None = None) -> Adapter:
    """Writes the adapter `source` as the other kind: a GGUF file for peft's folder, peft's folder for a GGUF file.

    model: the configuration of the base, against which every tensor is checked; base: its name, which the new file
    says. Floats stay as they are stored. Raises InputError as `check_paths`, CheckpointError for what the
    other kind cannot hold, and as `read_adapter`.
    """
    check_paths(source, target)
    adapter = read_adapter(source, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    if adapter_file(source) is None:
        adapter.check_low_rank("GGUF holds nothing but A and B")
        low_ranks = {path: (low.a, low.b, low.scale) for path, low in adapter.modules.items()}
        gguf_adapter.write_adapter(target, low_ranks, model, {"general.name": target.stem, **_about(base)})
        return adapter
    config = replace(_shortened(adapter.config, model), base_model_name_or_path=base)
    tensors = {}
    for path, low in adapter.modules.items():
        if path == "model.embed_tokens":
            tensors[f"{path}.lora_embedding_A"], tensors[f"{path}.lora_embedding_B"] = low.b.mT, low.a.mT
        else:
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = low.a, low.b
    write_adapter(target, config, {name: tensor.contiguous() for name, tensor in tensors.items()})
    return adapter


def _about(base: str | None) -> dict[str, Any]:
    """Returns the base that llama.cpp's converter names, where it is a repository of the hub."""
    found = None if base is None or Path(base).expanduser().exists() else hub_id(base)
    if found is None:
        return {}
    return {
        "general.base_model.count": 1,
        "general.base_model.0.name": found.repo.rpartition("/")[2],
        "general.base_model.0.repo_url": f"https://huggingface.co/{found.repo}",
    }


def _shortened(config: LoraConfig, model: LlamaConfig) -> LoraConfig:
    """The configuration with q_proj in place of every layer's path, where that means the same modules."""
    linears = [name.removesuffix(".weight") for name, size in parameter_shapes(model).items() if len(size) == 2]
    wanted = {path for path in linears if config.targets(path)}
    short = replace(config, target_modules=tuple(dict.fromkeys(path.rpartition(".")[2] for path in linears
                                                               if path in wanted)))  # fmt: skip
    return short if {path for path in linears if short.targets(path)} == wanted else config
