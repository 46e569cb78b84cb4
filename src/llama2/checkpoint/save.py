"""save_pretrained: config.json, generation_config.json and safetensors (or .bin) shards, tensor by tensor.

Nothing is written in place: an interrupted save leaves the previous checkpoint whole (`files.saving`), even the one
that the model is mapped from.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from llama2 import lora
from llama2.checkpoint import QUANTIZE_CONFIGS
from llama2.checkpoint.torch_tensors import CODES
from llama2.errors import InputError
from llama2.files import Save, replacing, saving, write_bytes, write_text
from llama2.keywords import drop, refuse_unknown
from llama2.lazy import door
from llama2.pretrained import PreTrainedModel

_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B|)B?\s*", re.IGNORECASE)

_save_adapter = door("checkpoint.peft", "save_adapter", "Writes an adapter.")
_upload = door("checkpoint.hub", "upload", "Uploads a folder to the hub.")


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    *,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = True,
    variant: str | None = None,
    token: str | bool | None = None,
    repo_id: str | None = None,
    commit_message: str = "Upload model",
    private: bool | None = None,
    **kwargs: Any,
) -> None:
    """Writes the model as transformers 4.46 and 5.x read it; of a model with an adapter the adapter alone, as there.

    state_dict: weights to save instead of the model's own. max_shard_size: bytes, or "500MB" (10^6), "5GiB" (2^30);
    a larger tensor gets a file of its own. Tied tensors are written once. safe_serialization=False writes .bin files.
    All files get their names together, or none does. Shards of an earlier save are removed. Only the main process
    writes. Raises InputError for a bad argument.
    """
    drop("save_pretrained", kwargs, stacklevel=4)
    refuse_unknown("save_pretrained", kwargs)
    if not is_main_process:
        return
    folder = Path(save_directory)
    if lora.names(model):
        _save_adapter(model, folder)
        if push_to_hub:
            _upload(folder, repo_id or folder.name, token=token, private=private, commit_message=commit_message)
        return
    tensors = without_aliases(model.state_dict() if state_dict is None else state_dict)
    shards = plan_shards(tensors, parse_size(max_shard_size))
    stem, suffix = ("model", "safetensors") if safe_serialization else ("pytorch_model", "bin")
    names = shard_names(stem, suffix, variant, len(shards))

    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    write = write_safetensors if safe_serialization else _write_bin
    with saving(folder) as save:
        model.config.save_pretrained(save.stage)
        save_quantize_config(save, getattr(model.config, "quantization_config", None))
        if model.get_output_embeddings() is not None:
            model.generation_config.save_pretrained(save.stage)
        for name, shard in zip(names, shards, strict=True):
            with replacing(save.stage / name) as file:
                write(file, {key: tensors[key] for key in shard})
        if len(shards) > 1:
            index = f"{stem}.{suffix}.index{'' if variant is None else '.' + variant}.json"
            write_bytes(save.stage / index, index_text(tensors, dict(zip(names, shards, strict=True))))
        save.remove(_stale(save.there(), variant, safe_serialization))
    if push_to_hub:
        _upload(folder, repo_id or folder.name, token=token, private=private, commit_message=commit_message)


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str = "Upload model",
    private: bool | None = None,
    token: str | bool | None = None,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = True,
    variant: str | None = None,
) -> str:
    """Saves to a temporary folder and uploads it; returns the address of the commit."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(
            model, folder, max_shard_size=max_shard_size, safe_serialization=safe_serialization, variant=variant
        )
        address: str = _upload(Path(folder), repo_id, token=token, private=private, commit_message=commit_message)
    return address


# -- which tensor goes where -------------------------------------------------------------------------------------


def parse_size(size: int | str) -> int:
    """Bytes of 5000000, "500MB" (10^6) or "5GiB" (2^30). Raises InputError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    count = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if count < 1:
        raise InputError(f"max_shard_size is {size!r}; give bytes as an integer, or a text such as '500MB' or '5GiB'")
    return count


def without_aliases(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with each shared tensor under its first name only (a tied head is the embedding)."""
    kept: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in state_dict.items():
        if tensor.is_meta:
            raise InputError(f"{name} has no data (it is on the meta device); load or initialise the model first")
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() == 0 or place not in seen:
            seen.add(place)
            kept[name] = tensor
    return kept


def plan_shards(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names by file, in order: a file is closed before it would pass `limit` bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def shard_names(stem: str, suffix: str, variant: str | None, count: int) -> list[str]:
    """model.safetensors, or model-00001-of-00003.safetensors, ...; a variant goes before the suffix or the number."""
    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise InputError(f"variant is {variant!r}; it becomes part of a file name: letters, digits, - and _ only")
    if count == 1:
        return [f"{stem}{'' if variant is None else '.' + variant}.{suffix}"]
    infix = "" if variant is None else f".{variant}"
    return [f"{stem}{infix}-{i:05d}-of-{count:05d}.{suffix}" for i in range(1, count + 1)]


def index_text(tensors: Mapping[str, Tensor], shards: Mapping[str, list[str]]) -> bytes:
    """The content of model.safetensors.index.json; shards: the tensors of each file."""
    content = {
        "metadata": {
            "total_parameters": sum(t.numel() for t in tensors.values()),
            "total_size": sum(t.nbytes for t in tensors.values()),
        },
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


# -- files -------------------------------------------------------------------------------------------------------


def safetensors_header(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """Returns the header for these tensors (meta ones will do), and the order of their data.

    With metadata {"format": "pt"}, which transformers 4.46 demands. Raises InputError for a dtype without a code.
    """
    # Wide types first, as the safetensors package orders them: every tensor is then aligned to its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in CODES:
            raise InputError(f"{name} is {tensor.dtype}, which safetensors cannot hold; convert it, or use .bin files")
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, names


def write_safetensors(file: IO[bytes], tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, one tensor in memory at a time."""
    header, names = safetensors_header(tensors)
    file.write(header)
    for name in names:
        data = tensors[name].detach().cpu().contiguous()
        file.write(data.reshape(-1).view(torch.uint8).numpy().data)


def _write_bin(file: IO[bytes], tensors: Mapping[str, Tensor]) -> None:
    # torch.save writes whole storages: a view of a larger one is copied first.
    plain = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    torch.save({n: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for n, t in plain.items()}, file)


def save_quantize_config(save: Save, content: Mapping[str, Any] | None) -> None:
    """Writes quantize_config.json, in which AutoGPTQ and GPTQModel look first, from config.json's quantization_config.

    One of an earlier save is removed where the model is of another method or not quantised: it would be believed.
    """
    save.remove(QUANTIZE_CONFIGS)
    if content is not None and content.get("quant_method") == "gptq":
        write_text(save.stage / QUANTIZE_CONFIGS[0], json.dumps(content, indent=2) + "\n")


def _stale(names: Iterable[str], variant: str | None, safetensors: bool) -> list[str]:
    """Returns files of an earlier save of the same variant, which loaders would read too, or prefer."""
    infix = "" if variant is None else re.escape("." + variant)
    families = [("model", "safetensors")] if safetensors else [("model", "safetensors"), ("pytorch_model", "bin")]
    stale = re.compile(
        "|".join(
            rf"{stem}{infix}(-\d{{5}}-of-\d{{5}})?\.{suffix}|{stem}\.{suffix}\.index{infix}\.json"
            for stem, suffix in families
        )
    )
    return [name for name in names if stale.fullmatch(name)]
