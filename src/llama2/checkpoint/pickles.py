"""Files of torch.save, read without running code: by torch's unpickler of tensors, after a look at the file.

A pickle is a program. torch's weights_only unpickler runs none of it but the making of tensors and containers; what it
lets through is bounded here before and after: how large the directory may be and what it may name, that nothing in the
archive is compressed (a deflated megabyte is a gigabyte), and that no tensor is larger than what is stored of it.
"""

import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from llama2.errors import CheckpointError
from llama2.mapping import reads_whole
from llama2.text_file import opened, shown

MAX_DIRECTORY = 8_000_000  # bytes of the pickle beside the weights: about 200 for each tensor
MAX_ENTRIES = 100_000  # tensors of one file


def load(path: Path, *, weights_only: bool = True) -> Any:
    """The content of a file that torch.save wrote, mapped where the format allows.

    weights_only False runs whatever the file says: for files of one's own. Raises CheckpointError for anything that is
    not made of tensors, containers and numbers, or that asks for more than the file holds.
    """
    with opened(path) as file:
        head = file.read(16)
        zipped = head[:2] == b"PK"
        if not zipped and head[:1] != b"\x80":
            raise CheckpointError(
                f"{path} starts with {head!r}, which no PyTorch file does; fetch it again (a Git LFS pointer or an "
                "HTML error page is a common cause)"
            )
        if weights_only:
            inspect(file, path)
        return checked(_loaded(path, path, weights_only, zipped and not reads_whole()), path.stat().st_size, path)


def load_part(file: IO[bytes], size: int, where: str) -> Any:
    """As `load`, of an open file of `size` bytes that is read, not mapped."""
    inspect(file, where)
    file.seek(0)
    return checked(_loaded(file, where, True, False), size, where)


def _loaded(source: Any, where: Path | str, weights_only: bool, mapped: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(source, map_location="cpu", weights_only=weights_only, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(where, ",")) from error
    except Exception as error:  # an unpickler raises whatever the content makes its parts raise
        said = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise CheckpointError(f"{where} is truncated or malformed ({said}); fetch it again") from error


# -- before ------------------------------------------------------------------------------------------------------


def inspect(file: IO[bytes], where: Path | str) -> None:
    """Raises CheckpointError where a file's directory is compressed, too large, or names more than is needed."""
    file.seek(0)
    if file.read(2) == b"PK":
        _check_pickle(_directory(file, where), where)
        return
    file.seek(0)
    head, at = file.read(MAX_DIRECTORY), 0
    for _ in range(4):  # the old format: magic number, version, system, the content
        if at < len(head):
            at += _check_pickle(head[at:], where)


def _directory(file: IO[bytes], where: Path | str) -> bytes:
    """The pickle in an archive."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > entry.compress_size:
                    raise CheckpointError(
                        f"{where}: {entry.filename!r} in it is compressed, which torch.save never does; save it again"
                    )
            found = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
            if len(entries) > MAX_ENTRIES or len(found) != 1 or found[0].file_size > MAX_DIRECTORY:
                raise CheckpointError(
                    f"{where} holds {len(entries)} entries and {len(found)} directories of "
                    f"{sum(entry.file_size for entry in found):,} bytes; at most {MAX_ENTRIES}, and one of "
                    f"{MAX_DIRECTORY:,} bytes, are read"
                )
            return archive.read(found[0])
    except CheckpointError:
        raise
    except zipfile.BadZipFile as error:
        size = file.seek(0, 2)
        raise CheckpointError(
            f"{where} is truncated: its {size} bytes have no end ({error}); fetch it again"
        ) from error
    except Exception as error:  # zipfile raises half a dozen other kinds, NotImplementedError among them
        raise CheckpointError(f"{where} is malformed ({shown(str(error))}); fetch it again") from error


def _check_pickle(data: bytes, where: Path | str) -> int:
    """The length of the pickle that begins here. Raises CheckpointError where it names what no state dict needs:
    torch's own list has some more, among them ones that take as much memory as they are told to."""
    end = 0
    try:
        for opcode, argument, place in pickletools.genops(data):
            end = (place or 0) + 1
            if opcode.name == "STACK_GLOBAL":  # of newer pickles, which torch.save does not write
                raise CheckpointError(_refusal(where, ","))
            if opcode.name in ("GLOBAL", "INST"):
                module, _, name = str(argument).partition(" ")
                if not (name in _NAMES.get(module, ()) or (module == "torch" and _STORAGE.fullmatch(name))):
                    raise CheckpointError(_refusal(where, f", {module}.{name},"))
    except CheckpointError:
        raise
    except Exception as error:  # pickletools has no error of its own
        raise CheckpointError(f"{where} is truncated or malformed ({shown(str(error))}); fetch it again") from error
    return end


def _refusal(where: Path | str, name: str = "") -> str:
    return (
        f"{where} is a pickle that is not a plain state dict: opening it would run code that it names{name} so it was "
        "not opened. Fetch the weights from a source you trust; from Python, weights_only=False runs it"
    )


_DTYPES = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
_STORAGE = re.compile(r"[A-Z][A-Za-z0-9]*Storage")
_NAMES: dict[str, set[str]] = {
    "collections": {"OrderedDict", "defaultdict", "Counter"},
    "torch._utils": {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"},
    "torch": {"Size", "device", *_DTYPES},
    "torch.nn.parameter": {"Parameter"},
    "torch.storage": {"UntypedStorage", "TypedStorage"},
    "torch.serialization": {"_get_layout"},
    "_codecs": {"encode"},
    "builtins": {"set", "dict", "int"},
    "__builtin__": {"set", "dict", "int"},
}


# -- after -------------------------------------------------------------------------------------------------------


def checked(content: Any, size: int, where: Path | str) -> Any:
    """The content; raises CheckpointError where its tensors are larger than what the file stores of them."""
    total = 0
    for count, tensor in enumerate(_tensors(content)):
        if tensor.layout != torch.strided or tensor.is_quantized or type(tensor) not in (Tensor, torch.nn.Parameter):
            raise CheckpointError(f"{where} holds a {tensor.layout} tensor; weights are plain ones, save them as such")
        stored, total = tensor.untyped_storage().nbytes(), total + tensor.nbytes
        if tensor.nbytes > stored or total > 4 * max(size, 4096) or count >= MAX_ENTRIES:
            raise CheckpointError(
                f"{where} holds tensors of {total:,} bytes in all, one of shape {tuple(tensor.shape)} for which "
                f"{stored:,} bytes are stored, and has {size:,}; it is malformed, save it again"
            )
    return content


def _tensors(content: Any) -> Iterator[Tensor]:
    """Every tensor in containers, each container once: they may hold themselves."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, Mapping) else value
