"""Any checkpoint -> any format, in memory that does not grow with the model: open(source), then one tensor at a time.

Weights go to hidden files beside their target. The next tensor is fetched while one is written, hashed and on its way
to the disk, and the kernel is told what it need not keep (`pages`). A journal, synced after every gigabyte, names the
tensors that are on the disk; an interrupted conversion goes on from there when it is started again. When all is written
the files are renamed, last of all the one without which no reader takes the folder for a checkpoint. SHA256SUMS (which
`sha256sum -c` reads too) holds their hashes.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.checkpoint import Checkpoint, split_parts
from llama2.checkpoint.covered import covered
from llama2.checkpoint.gguf_mixture import FILE_TYPES, file_type
from llama2.checkpoint.gguf_write import GgufTarget
from llama2.checkpoint.gqa_pooling import PooledCheckpoint
from llama2.checkpoint.hf_write import HfTarget
from llama2.checkpoint.imatrix import read_imatrix
from llama2.checkpoint.merge import MergedCheckpoint, open_merged, with_adapter
from llama2.checkpoint.meta_write import MetaTarget
from llama2.checkpoint.page_cache import fetch, release
from llama2.checkpoint.quantized import unpacked
from llama2.checkpoint.save import parse_size
from llama2.checkpoint.source import Located, locate_all, open_source
from llama2.checkpoint.tokenizer_files import gguf_keys, write_folder, write_model
from llama2.checkpoint.torch_tensors import DTYPES
from llama2.checkpoint.writer import Appender, Target
from llama2.errors import CheckpointError, InputError
from llama2.files import is_leftover, locked, rename, sync_tree, write_text

FORMATS = ("hf", "meta", "gguf")
SYNC_BYTES = 1 << 30  # written between two entries of the journal
SUMS = "SHA256SUMS"
_RESERVE = 64 << 20  # free space that is left for small files and the file system
_FLOATS = {
    "float32": ("F32", torch.float32),
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
}
_DENSE = tuple(name for name, _ in _FLOATS.values())

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ConversionSettings:
    """How to convert. dtype: "keep", a float dtype, or for gguf a block type such as "q4_0". shards: of meta.
    shard_size: of hf, bytes or "5GB". kv_heads: pool key and value heads to this number. chat: add Llama 2's chat
    template; None does so for Meta folders whose name ends in "-chat". adapter: folder of a LoRA adapter to merge.
    split_size: of gguf, bytes or "2GB" above which another part begins. imatrix: for gguf, the file of an
    importance matrix. requantize: for gguf, whether block types may take the place of other quantised types.
    calibrated: for gguf, whether tensors get the types that llama.cpp gives them with an importance matrix; None: if
    there is one."""

    to: str = "hf"
    dtype: str = "keep"
    shard_size: int | str = "5GB"
    shards: int = 1
    kv_heads: int | None = None
    chat: bool | None = None
    adapter: str | None = None
    imatrix: str | None = None
    calibrated: bool | None = None
    split_size: int | str | None = None
    requantize: bool = False


@dataclass(frozen=True)
class ConversionResult:
    """Result of a conversion: the target, its format, bytes of weights, and bytes taken over from an interrupted run.

    requantized: where quantised weights were quantised again, "kinds" (how many matrices of which type as which),
    "error" (root mean square of the change, in shares of the weights') and "worst" (a matrix and its error).
    """

    path: Path
    format: str
    bytes: int
    resumed_bytes: int
    requantized: Mapping[str, Any] | None = None


def convert(
    source: str | Path | Located | Checkpoint,
    target: str | Path,
    options: ConversionSettings,
    progress: Progress | None = None,
) -> ConversionResult:
    """Converts `source` (path, hub id or open checkpoint) to the new folder, or GGUF file, `target`.

    The folder or hub id of an adapter means its model with the adapter merged.
    progress(bytes done, bytes in all, tensor) is called before each tensor. An interrupted conversion with the same
    arguments is continued. Raises InputError for arguments that cannot be, CheckpointError for a source that is
    damaged, a target that exists, or a full disk. The source is never written to.
    """
    opened = covered(unpacked(source)) if isinstance(source, Checkpoint) else open_merged(source)
    path = Path(target)
    _check_target(opened, path, options)
    if options.adapter is not None:
        opened = with_adapter(opened, locate_all(options.adapter).path)
    if options.kv_heads is not None:
        opened = PooledCheckpoint(opened, options.kv_heads)
    target_files = make_target(opened, path.name, options)
    if isinstance(target_files, GgufTarget) and target_files.requantized and not options.requantize:
        _refuse_again(opened, target_files.requantized, options.dtype)
    return write(target_files, opened, path, options, progress)


def _refuse_again(source: Checkpoint, again: Mapping[str, str], wanted: str) -> None:
    kinds = ", ".join(sorted(set(again.values())))
    raise InputError(
        f"{len(again)} matrices of {source.path} are quantised already ({kinds}), and {wanted} would round them a "
        "second time, with the errors of both: convert the unquantised model, leave --dtype out to keep the types, or "
        "give --requantize (requantize=True), which measures what that loses"
    )


def write(
    target: Target, source: Checkpoint, path: Path, options: ConversionSettings, progress: Progress | None = None
) -> ConversionResult:
    """Writes `source` by `target` to `path`, or goes on with it; the options say how, and are part of its identity."""
    try:
        with locked(path):
            return _Run(target, source, path, options).go(progress)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise CheckpointError(
                f"the file system of {path}, or a limit (ulimit -f), allows no file of the size that is needed; "
                "convert to a new path, into smaller files (--shard-size for hf, --shards for meta) or on another disk"
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(
            f"the disk of {path} is full; free some space and give the same command again, which goes on from the last "
            "complete part"
        ) from error


# -- what is to be written ---------------------------------------------------------------------------------------


def make_target(source: Checkpoint, file: str, options: ConversionSettings) -> Target:
    """The writer for these options. Raises InputError where the source cannot be stored so."""
    names = list(source.tensors)
    if options.to != "hf" and "lm_head.weight" not in names and not source.config.tie_word_embeddings:
        raise InputError(
            f"{source.path} has no lm_head.weight, which a file of {options.to} needs; convert to hf instead"
        )
    if options.to == "gguf":
        type_name = gguf_type(options.dtype)
        keys = gguf_keys(source.tokenizer_source, source.config.vocab_size, wants_chat(source, options))
        importance = None if options.imatrix is None else read_imatrix(options.imatrix).importance()
        split = None if options.split_size is None else parse_size(options.split_size)
        return GgufTarget(source, names, type_name, file, keys, importance, options.calibrated, split)
    dtypes = {name: dtype_of(source, name, options.dtype) for name in names}
    if options.to == "meta":
        return MetaTarget(source, dtypes, options.shards)
    return HfTarget(source, dtypes, parse_size(options.shard_size))


def wants_chat(source: Checkpoint, options: ConversionSettings) -> bool:
    """Whether Llama 2's chat template is to be added."""
    if options.chat is not None:
        return options.chat
    return source.format == "meta" and source.path.resolve().name.lower().endswith("-chat")


def dtype_of(source: Checkpoint, name: str, requested: str) -> torch.dtype:
    """Returns the stored dtype of a tensor of a folder. Norms of a GGUF file are float32 by rule, so "keep" there means
    what the matrices are; bfloat16 where those are quantised."""
    if requested == "keep":
        if source.format.endswith("gguf"):
            return _FLOATS[source.auto_dtype][1]
        return DTYPES[source.kept_type(name)]
    if requested not in _FLOATS:
        raise InputError(f"dtype {requested!r} is not one of keep, {', '.join(_FLOATS)}; block types need --to gguf")
    return _FLOATS[requested][1]


def gguf_type(requested: str) -> str | None:
    """The GGUF file type for a dtype argument; None for "keep"."""
    if requested == "keep":
        return None
    type_name = file_type(_FLOATS[requested][0] if requested in _FLOATS else requested)
    if type_name is None or (type_name in _DENSE and requested not in _FLOATS):
        choices = ", ".join(("keep", *_FLOATS, *(name.lower() for name in FILE_TYPES if name not in _DENSE)))
        raise InputError(f"dtype {requested!r} cannot be written to GGUF; it is one of {choices}")
    return type_name


def _check_target(source: Checkpoint, path: Path, options: ConversionSettings) -> None:
    if options.to not in FORMATS:
        raise InputError(f"the format {options.to!r} is not one of {', '.join(FORMATS)}")
    if options.to != "meta" and options.shards != 1:
        raise InputError(f"shards={options.shards} is for Meta's format; for hf give shard_size")
    if options.to != "hf" and options.shard_size != "5GB":
        raise InputError(f"shard_size is for hf, not for {options.to}")
    if options.requantize and (options.to != "gguf" or options.dtype in ("keep", *_FLOATS)):
        raise InputError(f"requantize is for gguf and its block types, not for {options.to} {options.dtype}")
    if options.imatrix is not None and (options.to != "gguf" or options.dtype in ("keep", *_FLOATS)):
        raise InputError(f"an importance matrix is for gguf and its block types, not for {options.to} {options.dtype}")
    if options.shards < 1:
        raise InputError(f"shards is {options.shards}; at least 1 is needed")
    if options.to == "gguf" and (path.suffix != ".gguf" or path.is_dir()):
        raise InputError(f"{path} is to be a GGUF file; give a path that ends in .gguf")
    if options.to != "gguf" and path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a new folder")
    home = source.path if source.path.is_dir() else source.path.parent
    if path.resolve() == source.path.resolve() or (options.to != "gguf" and path.resolve() == home.resolve()):
        raise InputError(f"{path} is the source; give another place, the source is never written to")


# -- writing it --------------------------------------------------------------------------------------------------


def ended(path: Path, form: str) -> bool:
    """Whether a conversion to this path was made, to its last rename and without a rest."""
    last_file = path if form == "gguf" else path / "config.json"
    return last_file.exists() and not _journal(path, form).exists()


def _journal(path: Path, form: str) -> Path:
    return path.with_name(f".{path.name}.convert.json") if form == "gguf" else path / ".convert.json"


class _Run:
    """One conversion: places, journal and the loop over the tensors."""

    def __init__(self, target: Target, source: Checkpoint, path: Path, options: ConversionSettings) -> None:
        self.target, self.source, self.options = target, source, options
        self.path = path
        self.folder = path.parent if target.format == "gguf" else path
        self.stem = f".{path.name}." if target.format == "gguf" else "."
        self.journal = _journal(path, target.format)
        self.small = self.folder / f"{self.stem}convert.files"
        self.identity = fingerprint(source, options)

    def part(self, file: str) -> Path:
        """The hidden file that becomes `file`."""
        return self.folder / f".{file}.partial"

    def go(self, progress: Progress | None) -> ConversionResult:
        """Writes, or continues, and renames."""
        state = self._resume()
        resumed = sum(state.get("sizes", ()))
        if "renames" not in state:
            self._check_space(resumed)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stage_tokenizer()
            state = self._write(state, progress)
        for name in state["renames"]:
            hidden = self.small / name
            hidden = hidden if hidden.exists() else self.part(name)
            if hidden.exists():
                rename(hidden, self.folder / name)
        shutil.rmtree(self.small, ignore_errors=True)
        self.journal.unlink()
        first_file = self.folder / self.target.files[0] if self.target.format == "gguf" else self.path
        return ConversionResult(first_file, self.target.format, state["bytes"], resumed, state.get("requantized"))

    def _resume(self) -> dict[str, Any]:
        """The journal of an interrupted run of the same conversion, or {}; raises where the target is taken."""
        if not self.journal.exists():
            if any((self.folder / file).is_file() for file in (self.path.name, *self.target.files)) or (
                self.path.is_dir() and any(self._strangers())
            ):
                raise CheckpointError(f"{self.path} exists and is not empty; give a new path, nothing is overwritten")
            return {}
        try:
            state: dict[str, Any] = json.loads(self.journal.read_text())
        except ValueError as error:
            raise CheckpointError(f"{self.journal} is malformed ({error}); delete it to start anew") from error
        if state.get("identity") != self.identity:
            raise CheckpointError(
                f"{self.path} holds an interrupted conversion of another source or with other options; give those "
                f"again to continue it, or delete {self.journal} and the .partial files beside it"
            )
        return state

    def _strangers(self) -> list[Path]:
        ours = {self.part(file) for file in self.target.files} | {self.small, self.path / ".lock"}
        return [file for file in self.path.iterdir() if file not in ours and not is_leftover(file)]

    def _check_space(self, have: int) -> None:
        target_folder = self.folder.absolute()
        while not target_folder.exists():
            target_folder = target_folder.parent
        free, needed = shutil.disk_usage(target_folder).free, self.target.size - have + _RESERVE
        if free < needed:
            raise CheckpointError(
                f"{self.path} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
                "free some space or give a path on another disk"
            )

    def _stage_tokenizer(self) -> None:
        """Comes before the weights: a tokenizer that cannot be converted is told at once, not after an hour."""
        shutil.rmtree(self.small, ignore_errors=True)
        self.small.mkdir()
        tokenizer = self.source.tokenizer_source
        if self.options.to == "hf":
            write_folder(tokenizer, self.small, wants_chat(self.source, self.options))
        elif self.options.to == "meta":
            write_model(tokenizer, self.small)

    def _write(self, state: Mapping[str, Any], progress: Progress | None) -> dict[str, Any]:
        target, done = self.target, state.get("done", 0)
        sizes: Sequence[int] = state.get("sizes", [0] * len(target.files))
        with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
            out = []
            for file, size in zip(target.files, sizes, strict=True):
                hidden = self.part(file)
                if size and (not hidden.exists() or hidden.stat().st_size < size):
                    raise CheckpointError(f"{hidden} is shorter than {self.journal} says; delete both to start anew")
                out.append(Appender(hidden, size, pool))
                stack.callback(out[-1].close)
            if done:
                target.restore(state["target"])
            else:
                self._record(out, 0)
                target.begin(out)
            ahead = _Ahead(self.source, target.steps, stack.enter_context(ThreadPoolExecutor(1)))
            synced = sum(piece.size for piece in out)
            for i, name in enumerate(target.steps[done:], done):
                written = sum(piece.size for piece in out)
                if progress is not None:
                    progress(written, target.size, name)
                if i > done and written - synced >= SYNC_BYTES:
                    self._record(out, i)
                    synced = written
                ahead.fetch(i)
                target.write(name, self.source, out)
            target.end(out)
            for piece in out:
                piece.sync()
            if progress is not None:
                progress(target.size, target.size, "")
            return self._finish(out)

    def _record(self, out: Sequence[Appender], done: int) -> None:
        """Notes in the journal that the first `done` tensors are on the disk."""
        for file in out:
            file.sync()
        state = {
            "identity": self.identity,
            "done": done,
            "sizes": [file.size for file in out] if done else [0] * len(out),
            "target": self.target.state,
        }
        write_text(self.journal, json.dumps(state))

    def _finish(self, out: Sequence[Appender]) -> dict[str, Any]:
        """The other small files, all hashes, and the journal entry after which only renaming is left."""
        last = self.target.describe(self.small)
        small = sorted(file.name for file in self.small.iterdir())
        sums = {name: file.hexdigest() for name, file in zip(self.target.files, out, strict=True)}
        sums |= {name: sha256(self.small / name) for name in small}
        first = self.target.files[0]
        manifest = SUMS if last is not None else f"{first}.sha256"
        write_text(self.small / manifest, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
        sync_tree(self.small)
        final = last or first
        order = [name for name in (*self.target.files, *small, manifest) if name != final] + [final]
        state = {
            "identity": self.identity,
            "renames": order,
            "sizes": [file.size for file in out],
            "bytes": sum(file.size for file in out),
            "requantized": self.target.loss if isinstance(self.target, GgufTarget) else None,
        }
        write_text(self.journal, json.dumps(state))
        return state


class _Ahead:
    """Keeps the next tensor of a mapped source on its way into memory, and lets go of those that are done."""

    def __init__(self, source: Checkpoint, names: Sequence[str], pool: Executor) -> None:
        self._source, self._names, self._pool = source, names, pool
        self._coming: Future[None] | None = None

    def fetch(self, now: int) -> None:
        """To be called when tensor `now` is about to be read. The one before it may still wait for its hash."""
        for tensor in self._mapped(now - 2):
            release(tensor)
        if self._coming is not None:
            self._coming.result()
        self._coming = self._pool.submit(self._fetch, self._mapped(now + 1))

    @staticmethod
    def _fetch(tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            fetch(tensor)

    def _mapped(self, i: int) -> list[Tensor]:
        names = self._names[i : i + 1] if i >= 0 else []
        return [tensor for name in names if name in self._source.tensors for tensor in self._source.mapped(name)]


def fingerprint(source: Checkpoint, options: ConversionSettings) -> str:
    """Identifies a conversion that may be resumed: the source's files and the options."""
    homes = [source.path]
    while isinstance(source, PooledCheckpoint | MergedCheckpoint):
        homes += [source.adapter.path] if isinstance(source, MergedCheckpoint) else []
        source = source.source
    told = repr(([(str(home.resolve()), _stats(home)) for home in homes], options))
    return hashlib.sha256(told.encode()).hexdigest()


def _stats(home: Path) -> list[tuple[str, int, int]]:
    # Hidden files are not the source's: a GGUF file may be made in the folder it is made from.
    visible = [] if home.is_file() else [file for file in home.iterdir() if not file.name.startswith(".")]
    parts = [part for part in split_parts(home) if part.is_file()]
    files = parts if home.is_file() else sorted(file for file in visible if file.is_file())
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def add_sums(manifest: Path, files: Sequence[Path]) -> None:
    """Lists files in a manifest, in place of older entries of theirs."""
    names = {file.name for file in files}
    lines = [line for line in manifest.read_text().splitlines() if line.split("  ", 1)[1] not in names]
    lines += [f"{sha256(file)}  {file.name}" for file in files]
    ordered = sorted(lines, key=lambda line: line.split("  ", 1)[1])
    write_text(manifest, "".join(f"{line}\n" for line in ordered))


# -- checking it -------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """The hash of a file as text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: str | Path, progress: Progress | None = None) -> list[str]:
    """Hashes again what the manifest of a folder, or of a GGUF file, lists; returns the names.

    Then opens it and checks that its tensors are those of its configuration, as loading does. Raises CheckpointError
    naming every file that is missing or differs, and where there is no manifest; MismatchError where the tensors do
    not fit.
    """
    path = Path(path)
    manifest = path / SUMS if path.is_dir() else path.with_name(f"{path.name}.sha256")
    folder = manifest.parent
    if not manifest.exists():
        raise CheckpointError(f"{manifest} does not exist; only checkpoints that `llama2 convert` wrote have one")
    lines = [line.split("  ", 1) for line in manifest.read_text(encoding="utf-8").splitlines()]
    if any(len(line) != 2 or Path(line[1]).name != line[1] for line in lines):
        raise CheckpointError(f"{manifest} is malformed; each line is a hash, two spaces and a file name")
    present = {name: (folder / name).stat().st_size for _, name in lines if (folder / name).exists()}
    faults, done = [f"{name} is missing" for _, name in lines if name not in present], 0
    for expected, name in lines:
        if name not in present:
            continue
        if progress is not None:
            progress(done, sum(present.values()), name)
        if sha256(folder / name) != expected:
            faults.append(f"{name} differs")
        done += present[name]
    if faults:
        raise CheckpointError(f"{path} does not verify: {'; '.join(faults)}. Convert or fetch it again")
    covered(unpacked(open_source(path, {})))
    return [name for _, name in lines]
