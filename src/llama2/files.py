"""Every write of the library goes through here: whole or not at all, through no link, on the disk before it counts.

    with replacing(path) as file:      one file, which takes its place when it is whole
    with saving(folder) as save:       the files of a folder together, all of them or none, other files untouched
    with locked(path):                 one process at a time writes an output
    grown(path, size)                  a file that goes on after an interruption
    appending(path)                    a log

Temporary names are random, beside their target, made new (O_EXCL) and never through a symbolic link (O_NOFOLLOW). Their
writer holds a lock on each, so that the next writer knows what a killed one left, and removes it.
"""

import errno
import fcntl
import io
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from llama2.errors import CheckpointError, InputError
from llama2.text_file import LISTING_BYTES, read_object

JOURNAL = ".save.json"  # of a save that is decided, and whose files may not all have their names yet
_TEMPORARY = re.compile(r"\..*-[0-9a-f]{16}\.tmp")
_STAGE = re.compile(r"\.[0-9a-f]{16}\.save")
_NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LAST = re.compile(r"(.*/)?(config|params|adapter_config|.*\.index(\..*)?)\.json")  # what readers begin with


class _Raw(io.FileIO):
    """A file whose every call to the system is made in this module."""

    def write(self, data: Any) -> int:
        return os.write(self.fileno(), data)

    def truncate(self, size: int | None = None) -> int:
        length = self.tell() if size is None else size
        os.ftruncate(self.fileno(), length)
        return length


# -- one file ----------------------------------------------------------------------------------------------------


@contextmanager
def replacing(target: str | Path, buffering: int = 1 << 20) -> Iterator[IO[bytes]]:
    """A new file that is synced and takes the place of `target` when the block ends without an error.

    It can be read and sought in. Its folder must exist."""
    target = Path(target)
    _sweep(target.parent, re.compile(rf"\.{re.escape(_short(target.name))}-[0-9a-f]{{16}}\.tmp"))
    temporary, descriptor = _temporary(target)
    try:
        with io.BufferedRandom(_Raw(descriptor, "r+b"), buffering) as file:
            yield file
            file.flush()
            os.fsync(descriptor)
            os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(target.parent)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all, and makes its folder. Raises InputError where that is a file."""
    path = Path(path)
    if path.parent.exists() and not path.parent.is_dir():
        raise InputError(f"{str(path.parent)!r} is a file; give the path of a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def copy(source: str | Path, target: str | Path) -> None:
    """The content of a file, written as `replacing` does."""
    with open(source, "rb") as read, replacing(target) as file:
        shutil.copyfileobj(read, file, 1 << 20)


def grown(path: Path, size: int) -> IO[bytes]:
    """A file to be written on from byte `size`: a new one for 0, else that of an interrupted run, cut there."""
    if size == 0:
        with suppress(FileNotFoundError):
            os.unlink(path)
    flags = os.O_RDWR | (_NEW if size == 0 else os.O_NOFOLLOW | os.O_CLOEXEC)
    file = io.BufferedRandom(_Raw(os.open(path, flags, 0o666), "r+b"))
    try:
        file.truncate(size)
    except BaseException:
        file.close()
        raise
    return file


def appending(path: Path) -> IO[bytes]:
    """A file that only grows. Raises OSError (ELOOP) for a symbolic link."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return io.BufferedWriter(_Raw(os.open(path, flags, 0o666), "wb"))


def sync(file: IO[Any]) -> None:
    """Returns when what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: str | Path) -> None:
    """Makes new names last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Gives a file or folder another name, durably."""
    os.rename(old, new)
    sync_folder(new.parent)


def sync_tree(folder: Path) -> None:
    """All files and folders of a folder, and itself: other libraries may have written in it."""
    for directory, _, names in os.walk(folder):
        for name in names:
            sync_folder(Path(directory) / name)  # a descriptor of either kind syncs
        sync_folder(directory)


def is_leftover(path: Path) -> bool:
    """Whether this is a temporary file of `replacing`, which the next one of its target removes."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _short(name: str) -> str:
    return name[:200]  # a name has 255 bytes at most


def _temporary(target: Path) -> tuple[Path, int]:
    """A new file beside `target`, held against sweeping."""
    while True:
        temporary = target.with_name(f".{_short(target.name)}-{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | _NEW, 0o666)
        _hold(descriptor)
        if os.fstat(descriptor).st_nlink:  # nobody swept it between the two
            return temporary, descriptor
        os.close(descriptor)


def _hold(descriptor: int) -> bool:
    """Takes the lock of an open file for as long as it is open. False where another process has it, or where the file
    system has no locks: nothing is swept there."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(folder: Path, pattern: re.Pattern[str]) -> None:
    """Removes temporary files and folders that nobody holds any more."""
    for name in os.listdir(folder):
        if not pattern.fullmatch(name):
            continue
        with suppress(OSError):
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if _hold(descriptor):
                    _discard(folder / name)
            finally:
                os.close(descriptor)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)


# -- the files of a folder together ------------------------------------------------------------------------------


class Save:
    """A save that is being made: files are written into `stage`, under the names that they get in `folder`."""

    def __init__(self, folder: Path, stage: Path, removed: set[str], prefix: str = "") -> None:
        self.folder, self.stage, self._removed, self._prefix = folder, stage, removed, prefix

    def remove(self, names: Iterable[str]) -> None:
        """Files of an earlier save that this one ends; what it writes itself is never removed."""
        self._removed.update(self._prefix + name for name in names)

    def there(self) -> list[str]:
        """Names of what the folder holds before the save."""
        return sorted(os.listdir(self.folder)) if self.folder.is_dir() else []


_OPEN: dict[Path, Save] = {}  # by stage: a save into the stage of another is part of it


@contextmanager
def saving(folder: str | Path) -> Iterator[Save]:
    """The files of a folder, all or none: what is written into `stage` gets its place when the block ends without an
    error. A new folder appears by one rename; into one that exists a journal says what is to be renamed and removed,
    and a load from the folder (`settle`), or saves into it, completes what an interruption left. Within such a
    block a save into its stage, or a folder below it, is part of it. Raises InputError where the folder is a file.
    """
    folder = Path(folder).expanduser().resolve()
    outer = next((_OPEN[ancestor] for ancestor in (folder, *folder.parents) if ancestor in _OPEN), None)
    if outer is not None:
        inside = folder.relative_to(outer.stage)
        folder.mkdir(parents=True, exist_ok=True)
        prefix = "" if folder == outer.stage else f"{inside.as_posix()}/"
        yield Save(outer.folder / inside, folder, outer._removed, outer._prefix + prefix)
        return
    if folder.exists() and not folder.is_dir():
        raise InputError(f"save_directory {str(folder)!r} is a file; give the path of a folder")
    new_folders = _make_folders(folder if folder.is_dir() else folder.parent)
    home = folder if folder.is_dir() else folder.parent
    _sweep(home, _stages(folder, home))
    stage, descriptor = _stage(home, "" if home == folder else folder.name)
    save = _OPEN[stage] = Save(folder, stage, set())
    try:
        yield save
        sync_tree(stage)
        _publish(save)
    except BaseException as error:
        if not _decided(save):
            shutil.rmtree(save.stage, ignore_errors=True)
            _remove_folders(new_folders)
            raise
        settle(folder)
        if not isinstance(error, OSError):
            raise
    finally:
        del _OPEN[stage]
        os.close(descriptor)


def settle(folder: str | Path) -> None:
    """Completes a save into `folder` that was interrupted after it was decided. To be called before it is read.

    Raises CheckpointError where that cannot be done."""
    folder = Path(folder)
    if not os.path.lexists(folder / JOURNAL):
        return
    try:
        with _lock_of_saves(folder):
            _complete(folder)
    except OSError as error:
        raise CheckpointError(
            f"a save into {folder} was interrupted between its files and cannot be completed ({error}); open it once "
            "with the right to write there"
        ) from error


def _stages(folder: Path, home: Path) -> re.Pattern[str]:
    return _STAGE if home == folder else re.compile(rf"\.{re.escape(_short(folder.name))}{_STAGE.pattern}")


def _stage(home: Path, name: str) -> tuple[Path, int]:
    """A new folder in `home`, held against sweeping."""
    while True:
        stage = home / f"{f'.{_short(name)}' if name else ''}.{secrets.token_hex(8)}.save"
        os.mkdir(stage)
        try:
            descriptor = os.open(stage, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if isinstance(error, FileNotFoundError):  # swept before it was held
                continue
            shutil.rmtree(stage, ignore_errors=True)
            raise
        _hold(descriptor)
        if stage.exists():
            return stage, descriptor
        os.close(descriptor)


def _publish(save: Save) -> None:
    if save.stage.parent != save.folder:
        try:
            os.rename(save.stage, save.folder)
            sync_folder(save.folder.parent)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        moved = save.folder / f".{secrets.token_hex(8)}.save"  # another save made the folder meanwhile
        os.rename(save.stage, moved)
        save.stage = moved
    files = [path.relative_to(save.stage).as_posix() for path in save.stage.rglob("*") if not path.is_dir()]
    for name in files:
        if (save.folder / name).is_dir():
            raise InputError(f"{save.folder / name} is a folder, where a file is to be saved; give another folder")
    order = sorted(files, key=lambda name: (bool(_LAST.fullmatch(name)), name))
    content = {"stage": save.stage.name, "files": order, "remove": sorted(save._removed - set(files))}
    with _lock_of_saves(save.folder):
        _complete(save.folder)
        with replacing(save.folder / JOURNAL) as file:
            file.write(json.dumps(content).encode())
        _complete(save.folder)


def _decided(save: Save) -> bool:
    """Whether the journal of the folder is this save's."""
    try:
        return bool(json.loads((save.folder / JOURNAL).read_bytes())["stage"] == save.stage.name)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _complete(folder: Path) -> None:
    """Renames and removes what the journal says. Every part may have been done before."""
    journal = folder / JOURNAL
    if not os.path.lexists(journal):
        return
    stage, files, removed = _read_journal(folder)
    for name in files:
        if os.path.lexists(stage / name):
            if "/" in name:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / name, folder / name)
    for name in removed:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(folder / name)
    for directory in {(folder / name).parent for name in files}:
        sync_folder(directory)
    sync_folder(folder)
    os.unlink(journal)
    shutil.rmtree(stage, ignore_errors=True)
    sync_folder(folder)


def _read_journal(folder: Path) -> tuple[Path, list[str], list[str]]:
    """Stage, files, names to remove: all of them inside the folder, through no link."""
    journal = folder / JOURNAL
    try:
        content = read_object(journal, JOURNAL, most=LISTING_BYTES)
        stage, files, removed = content["stage"], content["files"], content["remove"]
        whole = bool(_STAGE.fullmatch(stage)) and not (folder / stage).is_symlink()
        whole = whole and all(_inside(folder, name) for name in [*files, *removed])
        whole = whole and all(_inside(folder / stage, name) for name in files)
    except (CheckpointError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{journal} is no journal of a save into this folder; delete it, and save again")
    return folder / stage, files, removed


def _inside(folder: Path, name: Any) -> bool:
    parts = Path(name).parts if isinstance(name, str) else ()
    links = any((folder / Path(*parts[:i])).is_symlink() for i in range(1, len(parts)))
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts and "\0" not in name and not links


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder with those above it; those that were made, the last one first."""
    missing = [ancestor for ancestor in (folder, *folder.parents) if not ancestor.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_folders(made: Iterable[Path]) -> None:
    for place in made:
        with suppress(OSError):
            place.rmdir()


# -- one process at a time ---------------------------------------------------------------------------------------

_HELD: dict[Path, int] = {}  # lock files of this process, and the thread that took each


@contextmanager
def locked(output: str | Path) -> Iterator[None]:
    """This process alone writes `output`, a file or folder that need not exist, until the block ends or the process.

    The lock is a file .NAME.lock beside it, or .lock in a folder whose own folder cannot be written; it names process,
    machine and time. A thread that has the lock may take it again. Raises InputError where another process has it.
    """
    output = Path(output).expanduser().resolve()
    lock_path = _lock_file(output)
    if _HELD.get(lock_path) == threading.get_ident():
        yield
        return
    new_folders = _make_folders(lock_path.parent)
    descriptor = _take(lock_path, wait=False)
    if descriptor is None:
        raise InputError(
            f"{output} is being written by {_holder(lock_path)}; wait until that has ended, or give another path"
        )
    _HELD[lock_path] = threading.get_ident()
    try:
        about = {"pid": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(about).encode())
        yield
    finally:
        del _HELD[lock_path]
        _leave(lock_path, descriptor)
        _remove_folders(new_folders)


@contextmanager
def _lock_of_saves(folder: Path) -> Iterator[None]:
    """Waits for its turn: what is done under it takes milliseconds."""
    lock_path = folder / ".save.lock"
    descriptor = _take(lock_path, wait=True)
    assert descriptor is not None
    try:
        yield
    finally:
        _leave(lock_path, descriptor)


def _lock_file(output: Path) -> Path:
    inside = output.is_dir() and (output.is_mount() or not os.access(output.parent, os.W_OK))
    return output / ".lock" if inside else output.with_name(f".{_short(output.name)}.lock")


def _take(place: Path, wait: bool) -> int | None:
    """The open lock file, locked; None where another has it."""
    while True:
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
            warnings.warn(
                f"the file system of {place.parent} has no locks; let one process at a time write there", stacklevel=4
            )
        with suppress(FileNotFoundError):  # who had it before has removed it
            if os.path.samestat(os.fstat(descriptor), os.lstat(place)):
                return descriptor
        os.close(descriptor)


def _leave(place: Path, descriptor: int) -> None:
    with suppress(OSError):
        os.unlink(place)
    os.close(descriptor)


def _holder(place: Path) -> str:
    try:
        about = json.loads(place.read_bytes()[:1000])
        return f"process {int(about['pid'])} on {str(about['machine'])!r}, since {str(about['since'])!r}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
