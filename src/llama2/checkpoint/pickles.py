"""Files of torch.save, read without running code: by torch's unpickler of tensors, after a look at the file.

A pickle is a program. torch's weights_only unpickler runs none of it but the making of tensors and containers; what it
lets through is bounded before (`pickle_check`) and here after: no tensor is larger than what is stored of it.
"""

import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from llama2.checkpoint.pickle_check import begins, inspect, refusal, too_large
from llama2.errors import CheckpointError
from llama2.mapping import reads_whole
from llama2.text_file import opened


def load(path: Path, *, weights_only: bool = True) -> Any:
    """The content of a file that torch.save wrote, mapped where the format allows.

    weights_only False runs whatever the file says: for files of one's own. Raises CheckpointError for anything that is
    not made of tensors, containers and numbers, or that asks for more than the file holds.
    """
    with opened(path) as file:
        zipped = begins(file.read(16), path)
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
        raise CheckpointError(refusal(where, ",")) from error
    except Exception as error:  # an unpickler raises whatever the content makes its parts raise
        said = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise CheckpointError(f"{where} is truncated or malformed ({said}); fetch it again") from error


# -- after -------------------------------------------------------------------------------------------------------


def checked(content: Any, size: int, where: Path | str) -> Any:
    """The content; raises CheckpointError where its tensors are larger than what the file stores of them."""
    total = 0
    for count, tensor in enumerate(_tensors(content)):
        if tensor.layout != torch.strided or tensor.is_quantized or type(tensor) not in (Tensor, torch.nn.Parameter):
            raise CheckpointError(f"{where} holds a {tensor.layout} tensor; weights are plain ones, save them as such")
        stored, total = tensor.untyped_storage().nbytes(), total + tensor.nbytes
        if tensor.nbytes > stored or too_large(total, count, size):
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
