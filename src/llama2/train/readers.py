"""Files, folders and data sets of the hub as lists of rows. No torch here."""

import csv
import difflib
import io
import itertools
import json
import random
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llama2.errors import InputError, MissingDependencyError
from llama2.text_file import check_regular, read_utf8
from llama2.train import tables

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]
_CSV_LIMIT = threading.Lock()


def read(source: str | Path, split: str = "train", config: str | None = None, data_dir: str | None = None) -> Rows:
    """The rows of a file, a folder or a data set of the hub.

    source: a .jsonl, .json, .csv, .tsv, .parquet or .txt file (a text a paragraph), a folder that `save_to_disk` of
    `datasets` wrote or that holds such files, or the id of a data set (owner/name). split: which part of a data set, of
    a folder, or of a .json file with several lists. config, data_dir: of a data set of the hub.

    Raises InputError for a source without rows, naming the line that is wrong; MissingDependencyError where `datasets`
    or, for .parquet files, `pyarrow` is needed and not installed.
    """
    path = Path(source)
    if not path.exists():
        return _from_hub(str(source), split, config, data_dir)
    if config is not None or data_dir is not None:
        raise InputError(f"{path} is a file or folder here; a configuration and data_dir are for data sets of the hub")
    if path.is_dir():
        return _folder(path, split)
    check_regular(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} is no {_listed(READERS)} file; convert it to one of these")
    if reader is _json:
        rows = _json(path, split)
    else:
        _check_no_split(path, split)
        rows = reader(path)
    if not rows:
        raise InputError(f"{path} holds no rows; there is nothing to train on")
    return rows


def _check_no_split(path: Path, split: str) -> None:
    if split != "train":
        raise InputError(f"{path} has no splits, and the split is {split!r}; leave it out, or give another path")


def _listed(names: Iterable[str]) -> str:
    *some, last = names
    return f"{', '.join(some)} or {last}"


# -- files -------------------------------------------------------------------------------------------------------


def _jsonl(path: Path) -> Rows:
    lines = read_utf8(path, "utf-8-sig").split("\n")  # a text may hold other line ends, such as U+2028
    return [_object(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); correct or remove it") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} is a JSON {type(row).__name__}; each row must be an object")
    return row


def _json(path: Path, split: str = "train") -> Rows:
    try:
        content = json.loads(read_utf8(path, "utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); is it JSON lines? Then call it .jsonl") from error
    if isinstance(content, dict):
        content = _one_list(path, content, split)
    else:
        _check_no_split(path, split)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise InputError(f"{path} is no list of objects; each row must be an object")
    return content


def _one_list(path: Path, content: Mapping[str, Any], split: str) -> Rows | None:
    """The rows of {"data": [...]}, or those of the split in {"train": [...], "test": [...]}."""
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    found = {name: value for name, value in lists.items() if value and all(isinstance(row, dict) for row in value)}
    if split in lists:
        return lists[split]
    if len(found) > 1 or (found and split != "train"):
        raise InputError(
            f"{path} holds the lists {', '.join(found)} and none called {split}; name one of them as the split"
        )
    return next(iter((found or lists).values()), None)


def _csv(path: Path, delimiter: str = ",") -> Rows:
    text = io.StringIO(read_utf8(path, "utf-8-sig"), newline="")
    reader, rows = csv.DictReader(text, delimiter=delimiter), []
    with _CSV_LIMIT:  # the longest field is a setting of the whole process, by default 131,072 characters
        before = csv.field_size_limit(sys.maxsize)
        try:
            for row in reader:
                if None in row or None in row.values():
                    fields = len(reader.fieldnames or ())
                    raise InputError(
                        f"{path}, line {reader.line_num} has more or fewer than the {fields} fields of its first line; "
                        'a text with commas needs quotes: "..."'
                    )
                rows.append(row)
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num} is malformed ({error}); correct it") from error
        finally:
            csv.field_size_limit(before)
    return rows


def _tsv(path: Path) -> Rows:
    return _csv(path, "\t")


def _text(path: Path) -> Rows:
    return [{"text": part.strip()} for part in read_utf8(path, "utf-8-sig").split("\n\n") if part.strip()]


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": tables.parquet, ".txt": _text}


# -- data sets ---------------------------------------------------------------------------------------------------


def _folder(path: Path, split: str) -> Rows:
    """A folder that save_to_disk wrote, or one that holds one file of rows, or a file for each split."""
    if any((path / name).is_file() for name in tables.SAVED):
        return tables.saved(path, split)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
    named = [file for file in files if file.stem.split("-")[0] == split]
    if not named and len(files) == 1 and split == "train":
        named = files
    if not named:
        there = ", ".join(file.name for file in files) or "none"
        raise InputError(
            f"{path} is a folder with {len(files)} files of rows ({there}), and none is {split}.*; give one file"
        )
    return [row for file in named for row in read(file)]


def _datasets(why: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(f"{why} needs the package datasets: pip install 'llama2[train]'") from error
    return datasets


def _from_hub(name: str, split: str, config: str | None, data_dir: str | None) -> Rows:
    if name.count("/") > 1 or name.endswith(tuple(READERS)):
        raise InputError(f"{name} does not exist; give a file of rows, or the id of a data set (owner/name)")
    datasets = _datasets(f"{name} is no file here, and a hub data set")
    where = {} if data_dir is None else {"data_dir": data_dir}
    try:
        found = datasets.load_dataset(name, *([] if config is None else [config]), split=split, **where)
    except ValueError as error:  # a split, or a configuration, that it does not have
        raise InputError(f"{name} cannot be read: {error}") from error
    return _with_names(found)


def _with_names(dataset: "Dataset") -> Rows:
    """Rows of a data set; numbers of classes become their names."""
    named = {column: kind.int2str for column, kind in (dataset.features or {}).items() if hasattr(kind, "int2str")}
    return [
        {**row, **{c: name_of(row[c]) for c, name_of in named.items() if isinstance(row[c], int)}} for row in dataset
    ]


def renamed(rows: Sequence[Row], columns: Mapping[str, str | None]) -> list[Row]:
    """Rows with columns under the names used here: {"text": "review"}; None leaves one. Raises InputError for a column
    that no row has."""
    wanted = {name: column for name, column in columns.items() if column is not None}
    there = sorted({key for row in rows for key in row})
    for column in wanted.values():
        if column not in there:
            close = difflib.get_close_matches(column, there, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"there is no column {column!r}; there are {', '.join(there)}{hint}")
    taken = set(wanted.values())
    return [
        {key: value for key, value in row.items() if key not in taken}
        | {name: row[column] for name, column in wanted.items() if column in row}
        for row in rows
    ]


def held_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows to train on and a random share of them to measure on, each in their order."""
    if not 0 < share < 1:
        raise InputError(f"the share to hold out is {share!r}; it must lie between 0 and 1, such as 0.1")
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise InputError(f"of {len(rows)} rows none is left to train on when {share:.0%} are held out; give more rows")
    out = set(random.Random(f"{seed}/held out").sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in out], [row for i, row in enumerate(rows) if i in out]


def taken(rows: Iterable[Any], most: int | None, what: str) -> list[Any]:
    """All rows of a data set that has a length, and the first `most` of one that streams, which may be endless.

    Raises InputError for a stream where `most` is None: it would be read for ever.
    """
    if hasattr(rows, "__len__") and not hasattr(rows, "__iter__"):
        return [rows[i] for i in range(len(rows))]  # type: ignore[arg-type,index]
    if hasattr(rows, "__len__"):
        return list(rows)
    if most is None:
        raise InputError(f"{what} streams rows and has no length; say how many steps to train (max_steps)")
    return list(itertools.islice(rows, most))
