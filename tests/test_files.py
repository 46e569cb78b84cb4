"""Writes: whole or not at all, through no link, one process at a time."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import Faulty, content, failing

from llama2 import files
from llama2.errors import CheckpointError, InputError
from llama2.files import JOURNAL, appending, grown, locked, replacing, saving, settle, write_text

PACKAGE = Path(files.__file__).parent


def test_no_other_module_opens_files_to_write() -> None:
    """Reading modes and temporary folders aside: what is written is written by llama2.files."""
    import re

    writes = re.compile(
        r"""open\([^)\n]*["'](?:[wax]b?\+?|r\+b?|w\+b)["']|(?<!files)\.write_(?:text|bytes)\(|shutil\.copy|os\.(?:replace|rename|fsync)\("""
        r"""|mkstemp|NamedTemporaryFile|save_file\(|torch\.save\([^\n]*(?:/|path)"""
    )
    allowed = {"quantize/measure.py": "/proc/self/clear_refs", "serve/prover.py": "os.devnull"}
    found = {
        f"{path.relative_to(PACKAGE)}:{number}"
        for path in PACKAGE.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if path.name != "files.py" or path.parent != PACKAGE
        if writes.search(line) and allowed.get(path.relative_to(PACKAGE).as_posix(), "\0") not in line
    }
    assert not found


def test_a_link_at_a_name_is_replaced_and_never_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("precious")
    for name in ("new", "log", "part", ".new.lock"):
        (tmp_path / name).symlink_to(other)
    write_text(tmp_path / "new", "mine")
    with grown(tmp_path / "part", 0) as file:
        file.write(b"mine")
    (tmp_path / "link").symlink_to(other)
    for write in (lambda: appending(tmp_path / "log"), lambda: grown(tmp_path / "link", 3)):
        with pytest.raises(OSError) as told:
            write()
        assert told.value.errno == errno.ELOOP
    with pytest.raises(OSError), locked(tmp_path / "new"):
        pass
    assert other.read_text() == "precious" and not (tmp_path / "new").is_symlink()


def test_what_a_killed_writer_left_goes_with_the_next_one_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / f".a-{'0' * 16}.tmp").write_text("left")
    (tmp_path / f".{'0' * 16}.save").mkdir()
    with replacing(tmp_path / "a") as one:
        one.write(b"first")
        write_text(tmp_path / "a", "second")
        assert len(list(tmp_path.glob(".a-*.tmp"))) == 1
        with saving(tmp_path) as save, saving(tmp_path) as other:
            write_text(save.stage / "b", "b")
            write_text(other.stage / "c", "c")
    assert content(tmp_path) == {"a": b"first", "b": b"b", "c": b"c"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


# -- folders -----------------------------------------------------------------------------------------------------

OLD = {"config.json": b"old", "model-1.safetensors": b"old 1", "model-2.safetensors": b"old 2", "notes": b"foreign"}
NEW = {"config.json": b"new", "model.safetensors": b"new", "templates/a": b"new a", "notes": b"foreign"}


def _save(folder: Path) -> None:
    with saving(folder) as save:
        for name in ("model.safetensors", "config.json"):
            write_text(save.stage / name, "new")
        with saving(save.stage / "templates") as below:
            write_text(below.stage / "a", "new a")
            below.remove(["b"])
        save.remove([name for name in save.there() if name.startswith("model-")])


def _old(folder: Path) -> None:
    folder.mkdir()
    for name, data in OLD.items():
        (folder / name).write_bytes(data)
    (folder / "templates").mkdir()
    (folder / "templates" / "b").write_bytes(b"old b")


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("there", [True, False])
def test_a_save_that_fails_at_any_call_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, lasting: bool
) -> None:
    states = set()
    old = {**OLD, "templates/b": b"old b"} if there else {}
    new = NEW if there else {name: data for name, data in NEW.items() if name != "notes"}
    for at in range(1, 1000):
        folder = tmp_path / str(at) / "model"
        folder.parent.mkdir()
        if there:
            _old(folder)
        with failing(monkeypatch, Faulty(at, lasting)) as system, contextlib.suppress(OSError, CheckpointError):
            _save(folder)
        settle(folder)
        found = content(folder) if folder.exists() else {}
        blocked = lasting or system.calls[at - 1 : at] == ["unlink"]
        if blocked:  # what could not be removed is hidden, and goes with the next save
            found = {name: data for name, data in found.items() if not name.startswith(".")}
        assert found in (old, new), (at, system.calls[-1])
        states.add(found == new)
        if not blocked:
            assert there or found == new or not folder.exists()
            assert not list(folder.parent.rglob(".*")), at
        _save(folder)
        assert content(folder) == new and not list(folder.parent.rglob(".*")), at
        if len(system.calls) < at:
            break
    assert states == {True, False} and at > 20


def test_a_save_that_was_killed_after_it_was_decided_is_completed_by_whoever_loads(tmp_path: Path) -> None:
    _old(tmp_path / "model")
    child = os.fork()
    if child == 0:
        renames: list[str] = []

        def rename(old: str, new: str) -> None:
            renames.append(str(new))
            if len(renames) == 6:  # of three files, the journal, and then the second of the stage
                os._exit(9)
            os.rename(old, new)

        files.os = type(
            "System", (), {"__getattr__": lambda _, name: rename if name == "replace" else getattr(os, name)}
        )()
        _save(tmp_path / "model")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "model" / JOURNAL).exists() and content(tmp_path / "model")["config.json"] == b"old"
    settle(tmp_path / "model")
    assert content(tmp_path / "model") == NEW


@pytest.mark.parametrize(
    "entry",
    [
        {"files": ["../outside"]},
        {"files": ["/etc/passwd"]},
        {"remove": ["../outside"]},
        {"remove": ["link/victim"]},
        {"stage": "../x"},
        {"stage": 7},
        {"files": [3]},
        {"files": [""]},
        {"files": ["out/victim"]},
        {"files": ["\0"]},
        {"remove": ["\0"]},
        "no object",
    ],
    ids=str,
)
def test_a_planted_journal_reaches_nothing_outside(tmp_path: Path, entry: object) -> None:
    folder, victim = tmp_path / "model", tmp_path / "elsewhere" / "victim"
    victim.parent.mkdir()
    victim.write_text("precious")
    (tmp_path / "outside").write_text("precious")
    stage = folder / f".{'a' * 16}.save"
    stage.mkdir(parents=True)
    (folder / "link").symlink_to(victim.parent)
    (stage / "out").symlink_to(victim.parent)
    whole = {"stage": stage.name, "files": [], "remove": []}
    (folder / JOURNAL).write_text(json.dumps({**whole, **entry} if isinstance(entry, dict) else entry))
    with pytest.raises(CheckpointError, match=r"is no journal of a save into this folder; delete it"):
        settle(folder)
    assert victim.read_text() == "precious" and (tmp_path / "outside").read_text() == "precious"


def test_a_file_where_a_folder_is_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file; give the path of a folder"), saving(tmp_path / "file"):
        pass
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match="is a folder, where a file is to be saved"):
        _save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "file"]


# -- one at a time -----------------------------------------------------------------------------------------------


def test_another_process_is_refused_by_name_and_a_killed_one_bars_nobody(tmp_path: Path) -> None:
    code = "import sys; from llama2.files import locked\nwith locked(sys.argv[1]): print(flush=True); sys.stdin.read()"
    out = tmp_path / "new" / "out"
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"\n"
        told = rf"out is being written by process {other.pid} on .*, since .*; wait"
        with pytest.raises(InputError, match=told), locked(tmp_path / "new" / ".." / "new" / "out"):
            pass
        other.kill()
    with locked(out), locked(out):
        assert (out.parent / ".out.lock").exists()
    assert not list(out.parent.iterdir())


def test_the_lock_of_a_folder_whose_own_cannot_be_written_is_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with locked(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_told_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="has no locks; let one process at a time write there"), locked(tmp_path / "a"):
        write_text(tmp_path / "a", "a")
    assert content(tmp_path) == {"a": b"a"}
