"""Description of a model file, from its headers alone: no weight is read, and torch is imported for .bin only."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama2 import checkpoint
from llama2.auto import load_config
from llama2.checkpoint.directory import found, read_directory
from llama2.checkpoint.foreign import described
from llama2.checkpoint.gguf import GgufFile
from llama2.checkpoint.source import fetch_files, local_path, revision_of
from llama2.cli.describe_weights import Packing
from llama2.config import PRESETS, LlamaConfig
from llama2.coverage import is_table
from llama2.errors import CheckpointError, ConfigError, InputError
from llama2.quantization.formats import BLOCKS, settings_in
from llama2.text_file import opened

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
WEIGHTS = ("F64", "F32", "F16", "BF16")
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_SPLITS = {"llama": "SentencePiece BPE", "gpt2": "byte-level BPE"}


@dataclass
class Share:
    """The tensors of one type: how many, their weights and their bytes in the file."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0

    def add(self, parameters: int, size: int) -> None:
        self.tensors, self.parameters, self.bytes = self.tensors + 1, self.parameters + parameters, self.bytes + size


@dataclass
class Headers:
    """A model as its files describe it; `types` is empty where only the configuration is known."""

    name: str
    format: str
    config: LlamaConfig
    file_bytes: int = 0
    types: dict[str, Share] = field(default_factory=dict)
    duplicate_head: int = 0  # weights of a stored head that the configuration ties to the embedding
    tokenizer: str | None = None
    chat_template: bool = False
    licence: str | None = None
    quantisation: str | None = None  # the method that a configuration names, with its settings
    runs: bool = True
    countable: bool = True  # whether the weights behind the tensors are known

    @property
    def parameters(self) -> int:
        """Weights of the model: those of the file where it was read and they can be counted, else by the sizes."""
        if not self.countable:
            return self.config.num_parameters
        counted = sum(share.parameters for share in self.types.values()) - self.duplicate_head
        return counted if self.types else self.config.num_parameters


def read(model: str, revision: str | None = None) -> Headers:
    """The headers of a path, the configuration of a hub id, or a preset ("7b"). Raises CheckpointError, ConfigError."""
    if not Path(model).exists():
        try:
            return Headers(model, "preset (no file)", LlamaConfig.preset(model))
        except ConfigError:
            pass
    try:
        path = local_path(model)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; `info` also knows the presets {', '.join(PRESETS)}") from error
    hub = revision_of(model, revision)
    if path is None:
        place = fetch_files(model, hub, "config")
        if place.is_file():
            return _gguf(place)
        headers = Headers(model, "hub repository (configuration only; no weights were fetched)", load_config(place))
        _quantised(headers, place)
        return _sized(headers, place)
    gguf = checkpoint.find_gguf(path)
    return _gguf(gguf) if gguf is not None else _folder(path)


def _quantised(headers: Headers, folder: Path) -> None:
    """Notes the quantisation that the folder's configuration names."""
    fields = _fields(folder)
    headers.quantisation = described(fields)
    if headers.quantisation is not None:
        headers.runs = headers.countable = _is_read(fields)


def _is_read(fields: dict[str, Any]) -> bool:
    """Whether the quantisation of this configuration is one that is read."""
    try:
        return settings_in(fields) is not None
    except InputError:
        return False


def _sized(headers: Headers, folder: Path) -> Headers:
    """The headers, where the configuration says every size; the defaults of a class are no facts of this model.

    Raises CheckpointError where it does not.
    """
    fields = _fields(folder)
    if fields and (lost := [key for key in _SIZES if fields.get(key) is None]):
        raise CheckpointError(
            f"config.json of {headers.name} does not say {', '.join(lost)}, and no weights are there to tell; its size "
            "is not known"
        )
    return headers


def _fields(folder: Path) -> dict[str, Any]:
    """The content of config.json; {} where there is none."""
    if not (folder / "config.json").exists():
        return {}
    return checkpoint.read_config(folder / "config.json")


def _gguf(path: Path) -> Headers:
    file = GgufFile(path)
    file.check_extents()
    keys = file.metadata
    parts = f" in {len(file.files)} parts" if len(file.files) > 1 else ""
    headers = Headers(file.path.name, f"GGUF version {file.version}{parts}", file.config, file.nbytes)
    for info in file.tensors.values():
        if is_table(info.name):
            continue
        if info.type_id not in BLOCKS:
            raise CheckpointError(
                f"{path}: tensor {info.name!r} is of ggml type {info.type_id}, which is not supported; supported are "
                f"{', '.join(row.id for row in BLOCKS.values())}. Quantise the model to one of them"
            )
        block, count = BLOCKS[info.type_id], math.prod(info.shape)
        size = count // block.weights * block.bytes
        headers.types.setdefault(block.id, Share()).add(count, size)
    split = str(keys.get("tokenizer.ggml.model"))
    if tokens := keys.get("tokenizer.ggml.tokens"):
        headers.tokenizer = f"{_SPLITS.get(split, split)}, {len(tokens):,} tokens"
    headers.chat_template = "tokenizer.chat_template" in keys
    headers.licence = keys.get("general.license")
    return headers


def _folder(path: Path) -> Headers:
    """A folder or file as transformers writes it."""
    folder = path if path.is_dir() else path.parent
    config = load_config(folder)
    files = _safetensors(path)
    headers = Headers(path.resolve().name, f"safetensors, {len(files)} file(s)", config)
    _quantised(headers, folder)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        return _adapter(folder, headers)
    if not files:
        return _opened(path, headers)
    head = 0
    entries: dict[str, Any] = {}
    for file in files:
        headers.file_bytes += file.stat().st_size
        entries |= _safetensors_header(file)
    packing = Packing(config, entries)
    for name, entry in entries.items():
        if not is_table(name):
            start, end = entry["data_offsets"]
            share = packing.share(name)
            kind, count = share or (entry["dtype"], math.prod(entry["shape"]))
            if entry["dtype"] not in WEIGHTS and share is None:
                headers.countable = False  # codes of a method that is not known here
            headers.types.setdefault(kind, Share()).add(count, end - start)
            head += count if name == "lm_head.weight" else 0
    headers.duplicate_head = head if config.tie_word_embeddings else 0
    return _described(headers, folder)


def _safetensors(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index where it has one."""
    if path.is_file():
        return [path] if path.suffix == ".safetensors" else []
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if not index.exists():  # then perhaps as AutoGPTQ names it
        if alone := sorted(path.glob("gptq_model-*bit-*g.safetensors")):
            return alone
        index = next(path.glob("gptq_model-*bit-*g.safetensors.index.json"), index)
    if not index.exists() and (named := sorted(path.glob("output*.safetensors"))):
        return named  # as ExLlamaV2 names them
    if not index.exists():
        return sorted(path.glob("weights.*.safetensors"))  # as MLX did
    return checkpoint.read_index(index)[1]


def _safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """The directory of a file, of dtypes that are not run here too."""
    with found(path) as file:
        entries = read_directory(path, file, readable=False)[1]
    return {e.name: {"dtype": e.dtype, "shape": e.shape, "data_offsets": (e.start, e.end)} for e in entries}


def _opened(path: Path, headers: Headers) -> Headers:
    """A checkpoint without safetensors: only torch can read the directory of a .bin or .pth file."""
    source = checkpoint.open(path)
    for stored in source.tensors.values():
        count = math.prod(stored.shape)
        headers.types.setdefault(stored.type, Share()).add(count, count * _ITEM_BYTES.get(stored.type, 1))
    if headers.config.tie_word_embeddings and (head := source.tensors.get("lm_head.weight")):
        headers.duplicate_head = math.prod(head.shape)
    kind, pattern = ("Meta's .pth", "consolidated.*.pth") if source.format == "meta" else (".bin", "pytorch_model*.bin")
    files = sorted(path.glob(pattern)) if path.is_dir() else [path]
    headers.format, headers.file_bytes = f"{kind}, {len(files)} file(s)", sum(file.stat().st_size for file in files)
    return _described(headers, path if path.is_dir() else path.parent)


def _adapter(folder: Path, headers: Headers) -> Headers:
    """A folder that holds an adapter; the configuration is that of its model, as far as that is here."""
    said = checkpoint.read_json(folder / "adapter_config.json")
    headers.format = (
        f"{said.get('peft_type')} adapter of {said.get('base_model_name_or_path')}, r {said.get('r')}, "
        f"alpha {said.get('lora_alpha')}"
    )
    weights = folder / "adapter_model.safetensors"
    for entry in _safetensors_header(weights).values() if weights.exists() else ():
        start, end = entry["data_offsets"]
        headers.types.setdefault(entry["dtype"], Share()).add(math.prod(entry["shape"]), end - start)
    headers.file_bytes = weights.stat().st_size if weights.exists() else 0
    return _described(headers, folder)


def _described(headers: Headers, folder: Path) -> Headers:
    from llama2.tokenizer.reading import beside

    place = beside(folder)
    present = [name for name in ("tokenizer.model", "tokenizer.json") if (place / name).exists()]
    headers.tokenizer = (" and ".join(present) + (", one folder up" if place != folder else "")) if present else None
    settings = folder / "tokenizer_config.json"
    headers.chat_template = any(folder.glob("chat_template*")) or (
        settings.exists() and bool(checkpoint.read_json(settings).get("chat_template"))
    )
    headers.licence = _licence(folder)
    return headers


def _licence(folder: Path) -> str | None:
    """Returns the licence of the model card, else the first licence file's name."""
    card = folder / "README.md"
    if card.exists():
        with opened(card) as file:
            front = file.read(4000).decode("utf-8", errors="replace")
        if said := re.search(r"^license:\s*(\S.*)$", front, re.MULTILINE):
            return said[1].strip().strip("\"'")
    files = sorted(file.name for file in folder.glob("LICEN[SC]E*"))
    return files[0] if files else None


def main_type(headers: Headers) -> str:
    """The type that holds most of the weights."""
    counts = Counter({kind: share.parameters for kind, share in headers.types.items()})
    return counts.most_common(1)[0][0] if counts else "none"
