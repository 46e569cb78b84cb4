"""The folder beside the target that an interrupted job goes on from.

    job.json              what is asked for, of which source and text; layers done; the rows of the report
    windows.safetensors   the calibration windows and the held-out tokens
    layer-00007.safetensors   the tensors of the result for layer 7
    states-8              the activations that go into layer 8
    result/               the finished folder, or the GGUF file, before it is renamed to the target

Every entry of the journal is written when what it speaks of is on the disk.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llama2.checkpoint.save import write_safetensors
from llama2.errors import CheckpointError
from llama2.files import rename, replacing, write_text

_JOB = "job.json"
_NAMES = {
    "source": "the source has changed, or is another one",
    "text": "the calibration text is another one",
    "held_out": "the text to measure on is another one",
    "version": "it was begun by another version of llama2",
}


class Journal:
    """The work folder of a job for `target`, and what its job.json says."""

    def __init__(self, target: Path, identity: Mapping[str, Any]) -> None:
        """Takes up an interrupted job of the same identity. Raises CheckpointError where there is one of another."""
        self.folder = _work(target)
        self._file = self.folder / _JOB
        self.state: dict[str, Any] = {"identity": dict(identity), "layers": 0, "linears": []}
        self.resumed = self._file.exists()
        if self.resumed:
            self._take_up(target)

    def _take_up(self, target: Path) -> None:
        try:
            found = json.loads(self._file.read_text())
            there = found["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._file} is malformed ({error!r}); delete {self.folder} to start anew"
            ) from error
        wanted = json.loads(json.dumps(self.state["identity"]))
        if there != wanted:
            raise CheckpointError(
                f"{target} has an interrupted job that this command does not continue: {_difference(there, wanted)}. "
                f"Give the same command to go on, or delete {self.folder} to start anew"
            )
        self.state = found

    def begin(self) -> None:
        """Makes the folder, empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def record(self, **changes: Any) -> None:
        """Notes changes of the state, durably."""
        self.state |= changes
        write_text(self._file, json.dumps(self.state))

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes a safetensors file of the folder."""
        with replacing(self.folder / name) as file:
            write_safetensors(file, tensors)

    def finish(self, target: Path) -> None:
        """Moves everything of result/ to the target, last of all what makes it one, and deletes the folder."""
        self.record(finished=True)
        result = self.folder / "result"
        if result.exists() and (result / target.name).exists():  # a GGUF file and what is beside it
            for file in sorted(result.iterdir(), key=lambda file: file.name == target.name):
                rename(file, target.parent / file.name)
        elif result.exists():
            rename(result, target)
        shutil.rmtree(self.folder)


def sweep(target: Path) -> None:
    """Removes the work folder of a job whose result has become the target, and that ended before it did this itself."""
    folder = _work(target)
    if not target.exists() or not folder.is_dir():
        return
    try:
        over = json.loads((folder / _JOB).read_text()).get("finished") is True
    except FileNotFoundError:
        over = True
    except (ValueError, AttributeError):
        over = False
    if over:
        shutil.rmtree(folder)


def _work(target: Path) -> Path:
    return target.parent / f".{target.name}.quantize"


def layer_file(index: int) -> str:
    """The file of one layer."""
    return f"layer-{index:05d}.safetensors"


def _difference(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    for key, meaning in _NAMES.items():
        if there.get(key) != wanted[key]:
            return meaning
    old, new = there.get("options", {}), wanted["options"]
    changed = [f"{key} was {old.get(key)!r} and is {value!r}" for key, value in new.items() if old.get(key) != value]
    return "; ".join(changed) or "its settings differ"
