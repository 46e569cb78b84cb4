"""`llama2 pack`: keeps a GGUF file's weights beside it as the native engine reads them."""

import errno
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llama2.cli.args import option
from llama2.cli.progress import Meter
from llama2.errors import CheckpointError, InputError
from llama2.files import locked

if TYPE_CHECKING:
    from llama2.checkpoint.gguf import GgufFile


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Keep a GGUF file's weights as the native engine reads them, in FILE.packed beside it.

    Later starts find that file by themselves and begin at once, and processes that run it share its memory. It is as
    large as the weights, is ignored with a warning when the GGUF file changes, and may be deleted at any time."""

    paths: tuple[str, ...] = option((), "the .gguf file", metavar="FILE", positional=True)
    check: bool = option(False, "read the packed file that is there, compare its checksums, and write nothing")
    quiet: bool = option(False, "no progress bar")


def run(options: PackOptions) -> int:
    """Runs the command."""
    if len(options.paths) != 1:
        raise InputError(f"pack takes one .gguf file, but {len(options.paths)} paths were given")
    from llama2 import cpu
    from llama2.checkpoint.gguf import GgufFile
    from llama2.cpu.packed_file import packed_path

    source = GgufFile(Path(options.paths[0]))
    path = packed_path(source)
    if options.check:
        with Meter("checking", options.quiet) as meter:
            cpu.PackedFile(path, source).verify(meter)
        print(f"{path}: fits {source.path} and every checksum matches")
        return 0
    began = time.perf_counter()
    try:
        with locked(path):
            if _fits(path, source):
                return 0
            with Meter("packing", options.quiet) as meter:
                cpu.write_packed(source, meter)
    except OSError as error:  # a folder that cannot be written has no lock, and needs none where the file fits
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and _fits(path, source):
            return 0
        raise
    size, took = path.stat().st_size, time.perf_counter() - began
    print(f"{path}: {size / 1e9:.2f} GB in {took:.1f} s; delete it at any time")
    return 0


def _fits(path: Path, source: "GgufFile") -> bool:
    """Whether the packed file is there and fits; says so."""
    from llama2 import cpu

    try:
        cpu.PackedFile(path, source)
    except (CheckpointError, FileNotFoundError):  # what is missing or does not fit is written anew
        return False
    print(f"{path} is there already and fits {source.path}")
    return True
