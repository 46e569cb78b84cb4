"""From a path to a model that the native engine holds alone. No torch here, and no reader before it is needed.

files = NativeFiles(path)
files.reason                  what of it only torch computes, or ""
model = files.open()          a `cpu.CpuModel`
"""

from pathlib import Path

from llama2 import checkpoint, cpu
from llama2.availability import is_torch_available
from llama2.checkpoint import Checkpoint
from llama2.checkpoint.gguf import GgufFile
from llama2.config import LlamaConfig
from llama2.errors import InputError, MissingDependencyError, needs_torch
from llama2.lazy import door
from llama2.quantization.formats import BFLOAT16, BLOCKS

_arrays = door("checkpoint.tensor_library", "arrays", "The operations on arrays.")
_is_adapter = door("checkpoint.peft_files", "is_adapter", "Whether a folder holds an adapter and no model.")
_folder_reason = door("checkpoint.native_model", "why_torch", "Why torch has to run a folder's model, or nothing.")
_open_model = door("checkpoint.native_model", "open_model", "A folder's model.")


def open_native(path: str | Path, threads: int | None = None) -> cpu.CpuModel:
    """The model of a GGUF file, of a folder of Hugging Face's or Meta's files, or of one file of weights.

    Raises CheckpointError as loading does, and InputError for what the engine cannot run.
    """
    return NativeFiles(Path(path)).open(threads)


class NativeFiles:
    """The headers of a model, read once.

    file: of a GGUF file. source: of anything else; None where nothing but torch reads it. reason: why the native engine
    alone cannot run it, as the headers say, or "". Raises CheckpointError for what is no model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        gguf = None if self._is_adapter() else checkpoint.find_gguf(path)
        self.file = None if gguf is None else GgufFile(gguf)
        self.source: Checkpoint | None = None
        try:
            self.reason = self._why_torch()
        except MissingDependencyError:
            self.reason = "its file is of a kind that torch alone reads"

    def rule_out(self, reason: str) -> None:
        """Says why the native engine alone cannot run what is done with the model, where the headers do not."""
        self.reason = self.reason or reason

    @property
    def config(self) -> LlamaConfig:
        """The architecture, where the engine may run it."""
        if self.file is not None:
            return self.file.config
        assert self.source is not None
        return self.source.config

    def open(self, threads: int | None = None) -> cpu.CpuModel:
        """The model; raises as `open_native`."""
        if self.reason:
            raise InputError(f"{self.path}: {self.reason}")
        if self.file is not None:
            return cpu.CpuModel.from_source(self.file, threads)
        assert self.source is not None
        model: cpu.CpuModel = _open_model(self.source, threads)
        return model

    def native_or_torch(self, threads: int | None = None) -> cpu.CpuModel | None:
        """The model; None where the engine alone cannot run it and torch is there to.

        Raises MissingDependencyError where torch would be needed and is missing, and CheckpointError.
        """
        try:
            return self.open(threads)
        except (InputError, MissingDependencyError) as error:
            if is_torch_available():
                return None
            if isinstance(error, MissingDependencyError):
                raise
            raise needs_torch(f"{error}, so running it") from error

    def _why_torch(self) -> str:
        if not cpu.available():
            return "the native engine is not built"
        if self.file is not None:
            rows = {BLOCKS.get(info.type_id) for info in self.file.tensors.values() if len(info.shape) > 1}
            odd = sorted(row.id for row in rows if row is not None and row.engine == BFLOAT16)
            return f"it has {', '.join(odd)} blocks, for which the native engine has no kernel" if odd else ""
        if self._is_adapter():
            return "it is an adapter's folder (give its model, and the folder with --adapter)"
        self.source = source = checkpoint.open(self.path, library=_arrays())
        if source.format not in ("hf", "meta"):
            return f"it is a file of the format {source.format}"
        reason: str = _folder_reason(source)
        return reason

    def _is_adapter(self) -> bool:
        return self.path.is_dir() and (self.path / "adapter_config.json").is_file() and bool(_is_adapter(self.path))
