"""Header of an adapter, read before its tensors: a GGUF file's keys, or peft's settings. No torch here."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2.checkpoint.directory import found
from llama2.checkpoint.gguf import GgufFile
from llama2.errors import CheckpointError

ALPHA, _INVOCATION = "adapter.lora.alpha", "adapter.alora.invocation_tokens"
_PEFT = "adapter_config.json"


def adapter_file(place: Path) -> Path | None:
    """The GGUF file that a path means as an adapter: itself, or the only one of a folder without peft's files."""
    if place.is_file():
        with found(place) as file:
            return place if file.read(4) == b"GGUF" else None
    files = [] if (place / _PEFT).exists() else sorted(place.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def described_base(metadata: Mapping[str, Any]) -> str | None:
    """The hub id, else the name, of the model that an adapter's file says it is for; None where it says none."""
    said = (metadata.get(f"general.base_model.0.{key}") for key in ("repo_url", "name"))
    return next((value for value in said if isinstance(value, str) and value), None)


def facts(path: Path) -> dict[str, str] | None:
    """Describes the header of a GGUF adapter, for people; None for anything else. Raises as `lora_alpha`."""
    with found(path) as start:
        if start.read(4) != b"GGUF":
            return None
    file = GgufFile(path)
    if file.metadata.get("general.type") != "adapter":
        return None
    alpha, ranks = lora_alpha(file), sorted({i.shape[0] for i in file.tensors.values() if i.name.endswith("lora_a")})
    parts = sorted({name.removesuffix(".lora_b").removesuffix(".weight").rpartition(".")[2] for name in file.tensors
                    if name.endswith(".lora_b")})  # fmt: skip
    return {
        "base": described_base(file.metadata) or "not said",
        "rank": ", ".join(map(str, ranks[:8])),
        "alpha": f"{alpha:g}" if alpha else "the rank (a factor of 1)",
        "tensors": f"{len(file.tensors)}, of {', '.join(parts)}",
    }


def lora_alpha(file: GgufFile) -> float:
    """adapter.lora.alpha, 0 where it is not said. Raises CheckpointError for another kind of file or adapter."""
    keys, path = file.metadata, file.path
    if keys.get("general.type") != "adapter":
        raise CheckpointError(
            f"{path} is a GGUF file of a {keys.get('general.type', 'model')}, not an adapter (general.type); give the "
            "model with -m, and a LoRA adapter here"
        )
    kind, architecture = keys.get("adapter.type"), keys.get("general.architecture")
    if kind != "lora" or architecture != "llama":
        raise CheckpointError(
            f"{path} is an adapter of the type {kind!r} for {architecture!r}; 'lora' for 'llama' is supported"
        )
    if keys.get(_INVOCATION):
        raise CheckpointError(
            f"{path}: {_INVOCATION} is set: it acts from an invocation sequence on only (aLoRA), which is not "
            "supported; run it with llama.cpp"
        )
    alpha = keys.get(ALPHA, 0.0)
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CheckpointError(f"{path}: {ALPHA} is {alpha!r}; a number is needed. Convert the adapter again")
    return float(alpha)
