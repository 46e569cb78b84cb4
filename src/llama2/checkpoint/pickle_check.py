"""A look at a file that torch.save wrote, before anybody opens it. No torch here.

A pickle is a program. What it lets through is bounded: how large the directory may be and what it may name, and that
nothing in the archive is compressed (a deflated megabyte is a gigabyte).
"""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

from llama2.errors import CheckpointError
from llama2.text_file import shown

MAX_DIRECTORY = 8_000_000  # bytes of the pickle beside the weights: about 200 for each tensor
MAX_ENTRIES = 100_000  # tensors of one file


def begins(head: bytes, path: Path | str) -> bool:
    """Whether a file that begins so is an archive, not a bare pickle. Raises CheckpointError where it is neither."""
    if head[:2] != b"PK" and head[:1] != b"\x80":
        raise CheckpointError(
            f"{path} starts with {head!r}, which no PyTorch file does; fetch it again (a Git LFS pointer or an "
            "HTML error page is a common cause)"
        )
    return head[:2] == b"PK"


def too_large(total: int, count: int, size: int) -> bool:
    """Whether so many tensors of `total` bytes are more than a file of `size` bytes means honestly."""
    return total > 4 * max(size, 4096) or count >= MAX_ENTRIES


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
                raise CheckpointError(refusal(where, ","))
            if opcode.name in ("GLOBAL", "INST"):
                module, _, name = str(argument).partition(" ")
                if not (name in _NAMES.get(module, ()) or (module == "torch" and _STORAGE.fullmatch(name))):
                    raise CheckpointError(refusal(where, f", {module}.{name},"))
    except CheckpointError:
        raise
    except Exception as error:  # pickletools has no error of its own
        raise CheckpointError(f"{where} is truncated or malformed ({shown(str(error))}); fetch it again") from error
    return end


def refusal(where: Path | str, name: str = "") -> str:
    return (
        f"{where} is a pickle that is not a plain state dict: opening it would run code that it names{name} so it was "
        "not opened. Fetch the weights from a source you trust; from Python, weights_only=False runs it"
    )


# torch's number formats: (u)int1 to 64 and floats, as `torch.NAME`.
_DTYPES = {
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (*range(1, 9), 16, 32, 64)),
    *("bool", "float16", "float32", "float64", "bfloat16", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2", "qint8", "qint32", "quint8", "quint2x4", "quint4x2"),
}
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
