"""Files <-> named tensors. One contract, `Checkpoint`; one table of the formats that implement it.

Every format shows its tensors under Hugging Face names with half-split q/k rows, whatever the file calls them.
Opening reads headers only and checks every size against the file before any weight is touched. No torch up here:
`llama2.checkpoint.gguf.read_metadata` serves the tokenizer without it.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llama2.checkpoint.config_repair import repaired
from llama2.checkpoint.directory import MAX_TENSORS, found
from llama2.checkpoint.foreign import recognise
from llama2.config import LlamaConfig, check_fields
from llama2.errors import CheckpointError
from llama2.files import settle
from llama2.generation.config import check_fields as check_generation
from llama2.lazy import door
from llama2.quantization_config import completed
from llama2.schema import check, table, text
from llama2.text_file import LISTING_BYTES, SETTINGS_BYTES, inside, linked_inside, read_object, shown

if TYPE_CHECKING:
    import torch

    from llama2.checkpoint.tensor_library import TensorLibrary

__all__ = [
    "Checkpoint",
    "RawTensor",
    "Stored",
    "find_gguf",
    "gguf_models",
    "open",
    "read_config",
    "read_json",
    "split_parts",
]
_FLOATS = ("F64", "F32", "F16", "BF16")


class Stored(NamedTuple):
    """Description of one stored tensor: its shape as the model sees it, and its type ("BF16", "Q4_1", ...)."""

    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class RawTensor:
    """A tensor as the file packs it: uint8 rows (rows, row_bytes) in half-split order, decoded by `quant.ggml`."""

    rows: "torch.Tensor"
    type: str
    shape: tuple[int, ...]


class Checkpoint(ABC):
    """An open checkpoint. Tensors are views of the mapped file wherever nothing needs decoding or reordering."""

    format: str
    path: Path

    @cached_property
    def library(self) -> "TensorLibrary":
        """The operations on its tensors."""
        found: TensorLibrary = _torch()
        return found

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor of the file by Hugging Face name; stale rotary tables are left out."""

    @cached_property
    @abstractmethod
    def config(self) -> LlamaConfig:
        """The architecture. Raises CheckpointError where the file says none, or names another than Llama."""

    @property
    @abstractmethod
    def generation_settings(self) -> dict[str, Any] | None:
        """The content of generation_config.json, or None."""

    @property
    @abstractmethod
    def tokenizer_source(self) -> Path | dict[str, Any]:
        """The source of the tokenizer: the folder, or GGUF metadata."""

    @property
    @abstractmethod
    def auto_dtype(self) -> str:
        """The dtype that dtype="auto" selects: the stored one; "bfloat16" where weights are stored as quantised
        blocks."""

    @property
    def card(self) -> dict[str, Any]:
        """The file's name, author and licence, as GGUF's keys general.*."""
        return {}

    def kept_type(self, name: str) -> str:
        """The type in which a conversion that keeps types stores a tensor."""
        return self.tensors[name].type

    def packed_type(self, name: str) -> str:
        """The quantised type in which the file holds a tensor, "" for floats; also where it is read as floats."""
        kind = self.tensors[name].type
        return "" if kind in _FLOATS else kind

    @abstractmethod
    def read(self, name: str, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """One tensor on the CPU, converted to `dtype` (None: as stored; float32 for quantised blocks)."""

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Rows start to stop of a matrix as `read` gives them, without the rest of it in memory where that can be."""
        return self.read(name)[start:stop]

    def mapped(self, name: str) -> "list[torch.Tensor]":
        """The contiguous views of mapped files in which this tensor lies; none where it is not mapped."""
        return []

    @abstractmethod
    def raw(self, name: str) -> RawTensor:
        """One tensor still packed, for engines with kernels of their own."""


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file of the checkpoint; raises CheckpointError where there is none."""
    remedy = "the folder of a checkpoint must hold it"
    if (path.parent / "training_args.bin").exists() and path.name == "config.json":
        remedy = (
            "transformers' Trainer writes none beside a model that is not of its own class: copy the base model's "
            "into the folder, or save with trainer.model.save_pretrained(folder), or train model.to_transformers()"
        )
    return read_object(path, path.name, most=LISTING_BYTES if "index" in path.name else SETTINGS_BYTES, remedy=remedy)


def read_index(index: Path) -> tuple[dict[str, str], list[Path]]:
    """The weight_map of an index of shards, and the files that it names. Raises CheckpointError where one is missing,
    or would lie elsewhere than beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; fetch or save the checkpoint again")
    check({"weight_map": weight_map}, {"weight_map": table(text(), MAX_TENSORS)}, index)
    files = [inside(index.parent, name, index) for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.exists():
            raise CheckpointError(
                f"{index} names the shard {shown(file.name)}, which is missing; fetch the checkpoint again"
            )
    return weight_map, files


def read_generation(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's generation_config.json; None where there is none."""
    file = folder / "generation_config.json"
    if not file.exists():
        return None
    content = read_json(file)
    check_generation(content, file)
    return content


_PART = re.compile(r"(?P<prefix>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")
# Where AutoGPTQ put the settings of a quantised folder before config.json had them, in the order in which it looks.
QUANTIZE_CONFIGS = ("quantize_config.json", "quant_config.json")
MODELOPT = "hf_quant_config.json"  # of NVIDIA's ModelOpt
# What describes a model in a repository, beside its weights.
CONFIG_FILES = ("config.json", "generation_config.json", "params.json", *QUANTIZE_CONFIGS, MODELOPT,
                "adapter_config.json")  # fmt: skip
TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def read_config(file: Path) -> dict[str, Any]:
    """The content of a config.json, with the quantisation that a file of its own beside it describes, and without what
    cannot be meant (`config_repair`).

    Raises CheckpointError where it is missing, no JSON object, or of another architecture than Llama.
    """
    fields = read_json(linked_inside(file, file.parent))
    check_fields({"architectures": fields.get("architectures")}, file)
    _refuse_foreign(fields, file)
    check_fields(fields, file)
    fields = repaired(fields, file)
    if fields.get("quantization_config") is None:
        if (file.parent / MODELOPT).exists():
            inner = read_json(file.parent / MODELOPT).get("quantization")
            inner = inner if isinstance(inner, dict) else {}
            said = {"quant_method": "modelopt", "format": inner.get("quant_algo"), **inner}
            return {**fields, "quantization_config": said}
        for name in QUANTIZE_CONFIGS:
            if (file.parent / name).exists():
                return {**fields, "quantization_config": completed(read_json(file.parent / name))}
    return fields


def _refuse_foreign(fields: Mapping[str, Any], where: Path) -> None:
    """Raises CheckpointError where the content of a config.json is of another architecture than Llama."""
    kind, classes = fields.get("model_type"), fields.get("architectures") or []
    named = kind if kind is not None else next((c for c in classes if not str(c).startswith("Llama")), "llama")
    if named != "llama":
        raise CheckpointError(
            f"{where} describes a {shown(named)} model (architectures {shown(classes)}), but this library runs "
            "'llama' only; load that checkpoint with a library for its architecture"
        )


_torch = door("checkpoint.torch_tensors", "library", "The operations on torch's tensors.")
_FORMATS: dict[str, Callable[..., Checkpoint]] = {
    "hf": door("checkpoint.hf", "HfCheckpoint", "Folders and files that transformers writes."),
    "meta": door("checkpoint.meta", "MetaCheckpoint", "A folder of Meta's original files."),
    "gguf": door("checkpoint.gguf_weights", "GgufCheckpoint", "A GGUF file."),
    "ggml": door("checkpoint.legacy", "GgmlCheckpoint", "A file of llama.cpp before GGUF."),
    "llama2c": door("checkpoint.legacy", "Llama2cCheckpoint", "A .bin file of llama2.c."),
}


def open(
    path: str | Path,
    *,
    use_safetensors: bool | None = None,
    variant: str | None = None,
    weights_only: bool = True,
    gguf_file: str | None = None,
    library: "TensorLibrary | None" = None,
) -> Checkpoint:
    """Opens a checkpoint folder or file; its content, not its name, decides the format.

    A folder: Meta's (params.json) unless it has a config.json; safetensors before .bin (`use_safetensors` True or False
    admits one of them only), each single or by index, with `variant` in the file name; `gguf_file` names a GGUF file in
    it. library: `tensor_library.ARRAYS` for numpy's arrays in place of torch's tensors, of Hugging Face's and
    Meta's files. Raises CheckpointError for what is missing, truncated, malformed or not a Llama model.
    """
    path = Path(path)
    if gguf_file is not None:
        path = path / gguf_file
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint folder, a .safetensors, .bin or .gguf file")
    settle(path if path.is_dir() else path.parent)
    if path.is_dir():
        path, kind = _sniff_folder(path)
    else:
        kind = _sniff_file(path)
    if kind == "meta":
        return _FORMATS["meta"](path, library)
    if kind != "hf":
        return _FORMATS[kind](path)
    return _FORMATS["hf"](
        path, use_safetensors=use_safetensors, variant=variant, weights_only=weights_only, library=library
    )


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that the path is, or that is the only model of the folder; None where there is none.

    Of a split file in a folder the first part.
    """
    if path.is_dir():
        models = [] if (path / "config.json").exists() else gguf_models(path)
        return models[0] if len(models) == 1 else None
    with found(path) as file:
        return path if file.read(4) == b"GGUF" else None


def gguf_models(folder: Path) -> list[Path]:
    """The GGUF files of a folder by name, of a split one its first part alone."""
    return sorted({split_parts(file)[0] for file in folder.glob("*.gguf")})


def split_parts(path: Path) -> list[Path]:
    """The names of all parts of the split GGUF file to which this name belongs, in order; the path alone for another
    name. The parts need not exist."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['prefix']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def _sniff_folder(folder: Path) -> tuple[Path, str]:
    if (folder / "config.json").exists():
        return folder, "hf"
    if (folder / ".convert.json").exists():
        raise CheckpointError(
            f"{folder} holds a conversion that was interrupted; give the same `llama2 convert` command again, which "
            "goes on from there"
        )
    if gguf := find_gguf(folder):
        return gguf, _sniff_file(gguf)
    if (folder / "params.json").exists() or any(folder.glob("consolidated.*.pth")):
        return folder, "meta"
    if several := gguf_models(folder):
        raise CheckpointError(
            f"{folder} holds {len(several)} GGUF files and no config.json; choose one with gguf_file=, "
            f"such as {several[0].name!r}"
        )
    return folder, "hf"


def _sniff_file(path: Path) -> str:
    with found(path) as file:
        head = file.read(16)
    if head[:4] == b"GGUF":
        return "gguf"
    # safetensors: 8 bytes of header length, then JSON; torch.save: a zip archive, or a bare pickle before 1.6.
    if head[8:9] == b"{" or head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return "hf"
    known = recognise(path)
    if known is not None and known.reader:
        return known.reader
    if known is not None:
        raise CheckpointError(f"{path} is {known.format}, which is not run here; {known.remedy}")
    raise CheckpointError(
        f"{path} starts with {head[:8]!r}, which is neither GGUF, safetensors nor a PyTorch file; "
        "fetch it again (a Git LFS pointer or an HTML error page is a common cause)"
    )
