"""Rows of Arrow's files: parquet, and the folders that `save_to_disk` of `datasets` writes.

They may come from a stranger. So the columns are validated in full before a value is read (an offset beyond its buffer
ends the process otherwise), counted before they become Python objects (a run of a billion equal rows is a few bytes of
parquet), and read by pyarrow alone: `datasets` would follow the paths and addresses that its settings name.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llama2.errors import CheckpointError, InputError, MissingDependencyError
from llama2.schema import Kind, check, several, table, text
from llama2.text_file import inside, linked_inside, opened, read_object, shown
from llama2.train.parquet_pages import unpacked

if TYPE_CHECKING:
    import pyarrow

Rows = list[dict[str, Any]]
SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # what datasets.save_to_disk writes
LEAST, A_BYTE = 4_000_000, 100  # values and bytes of text that a file may hold: so many, and so many a byte of it

_NAME = text(255)
_FILES = Kind(
    'a list of {"filename": NAME}',
    lambda value: (
        isinstance(value, list) and all(isinstance(v, dict) and _NAME.holds(v.get("filename")) for v in value)
    ),
)
_STATE = {"_data_files": _FILES}
_SPLITS = {"splits": several(_NAME, 10_000)}
_INFO = {"features": table(Kind("a column's kind", lambda value: isinstance(value, dict | list)), 100_000)}


def parquet(path: Path) -> Rows:
    """The rows of a parquet file."""
    pyarrow = _pyarrow("parquet files need")
    with _faults(path, "parquet file"), opened(path) as file:
        bound = _bound(path)
        reader = pyarrow.parquet.ParquetFile(file)
        groups = [reader.metadata.row_group(i) for i in range(reader.metadata.num_row_groups)]
        sizes = [sum(unpacked(file, group.column(i)) for i in range(group.num_columns)) for group in groups]
        if sum(sizes) > bound or reader.metadata.num_rows > bound:
            raise _too_much(path, bound)
        largest = max(sizes, default=1)
        step = min(max(bound // max(largest, 1), 1), 1024)  # a row may repeat all that its group has
        return list(_rows(path, reader.iter_batches(step, use_threads=False), bound))


def saved(folder: Path, split: str) -> Rows:
    """The rows of a split of a folder that `save_to_disk` wrote; numbers of classes become their names."""
    pyarrow = _pyarrow(f"{folder} is a data set that save_to_disk wrote, which needs")
    if (folder / SAVED[0]).is_file():
        splits = read_object(linked_inside(folder / SAVED[0], folder), SAVED[0])
        check({"splits": None, **splits}, _SPLITS, folder / SAVED[0])
        if split not in splits["splits"]:
            raise InputError(f"{folder} has the splits {', '.join(splits['splits'])}, not {split!r}; name one of them")
        folder = inside(folder, split, folder / SAVED[0])
    elif split != "train":
        raise InputError(f"{folder} has no splits, and the split is {split!r}; leave it out, or give another path")
    state = read_object(linked_inside(folder / "state.json", folder), "state.json")
    info = read_object(linked_inside(folder / "dataset_info.json", folder), "dataset_info.json")
    check({"_data_files": None, **state}, _STATE, folder / "state.json")
    features = info.get("features") or {}
    check({"features": features}, _INFO, folder / "dataset_info.json")
    rows: Rows = []
    for entry in state["_data_files"]:
        path = inside(folder, entry["filename"], folder / "state.json")
        with _faults(path, "file of a data set"), opened(path) as file:
            if any(map(_compressed, pyarrow.ipc.MessageReader.open_stream(file))):
                raise InputError(f"{path} is compressed, which save_to_disk never does; save the data set again")
            file.seek(0)
            rows += _rows(path, pyarrow.ipc.open_stream(file), _bound(path))
    names = {column: _decoder(kind) for column, kind in features.items()}
    changes = {column: change for column, change in names.items() if change is not None}
    try:
        return [{**row, **{name: change(row[name]) for name, change in changes.items() if name in row}} for row in rows]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(f"{folder}: a row is not of the kind that dataset_info.json gives it ({error})") from error


def _decoder(kind: object) -> Callable[[Any], Any] | None:
    """Returns the decoder of stored values of this kind: names of classes, JSON kept as text; None for others."""
    if not isinstance(kind, dict):
        return None
    if kind.get("_type") == "ClassLabel" and isinstance(kind.get("names"), list):
        return lambda value: kind["names"][value] if isinstance(value, int) and value >= 0 else value
    if kind.get("_type") == "Json":
        return lambda value: json.loads(value) if isinstance(value, str) else value
    return None


# -- pyarrow -----------------------------------------------------------------------------------------------------


def _pyarrow(why: str) -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"{why} the package pyarrow: pip install 'llama2[train]', or use .jsonl"
        ) from error
    return pyarrow


@contextmanager
def _faults(path: Path, what: str) -> Iterator[None]:
    """pyarrow has no root for its errors: most are ValueErrors, others OSErrors, or KeyErrors."""
    import pyarrow

    try:
        yield
    except (InputError, CheckpointError):
        raise
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError, MemoryError) as error:
        raise InputError(f"{path} is no {what} ({shown(str(error))}); write it again") from error


def _bound(path: Path) -> int:
    return LEAST + A_BYTE * path.stat().st_size


def _too_much(path: Path, bound: int) -> InputError:
    return InputError(
        f"{path} would become more than {bound:,} values and bytes of text, {A_BYTE} for each of its bytes; give the "
        "rows as .jsonl where that is meant"
    )


def _compressed(message: "pyarrow.Message") -> bool:
    """Whether a message of Arrow's has compressed buffers, which say their own size: ten kilobytes become gigabytes.

    Its metadata is a flatbuffer, Message(version, header type, header, ...) of RecordBatch(length, nodes, buffers,
    compression) or of DictionaryBatch(id, RecordBatch); pyarrow tells of neither."""
    data = message.metadata.to_pybytes()
    if message.type not in ("record batch", "dictionary"):
        return False
    root = _field(data, _number(data, 0), 2)
    batch = _field(data, _number(data, root) + root, 1) if root and message.type == "dictionary" else root
    return not batch or bool(_field(data, _number(data, batch) + batch, 3))


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table is; 0 where it is left out."""
    names = table - _number(data, table, signed=True)
    if 4 + 2 * number >= _number(data, names, 2):
        return 0
    offset = _number(data, names + 4 + 2 * number, 2)
    return table + offset if offset else 0


def _number(data: bytes, at: int, size: int = 4, signed: bool = False) -> int:
    if not 0 <= at <= len(data) - size:
        raise ValueError(f"its metadata points to byte {at} of {len(data)}")
    return int.from_bytes(data[at : at + size], "little", signed=signed)


def _rows(path: Path, batches: Iterable[Any], bound: int) -> Iterator[dict[str, Any]]:
    """The rows of record batches, each validated and counted before it is made Python's."""
    for batch in batches:
        for field in batch.schema:
            if not all(_known(field.type)):
                raise InputError(
                    f"{path}: column {shown(field.name)} is of type {shown(str(field.type))}, whose values are not "
                    "each stored once; save it as a plain one"
                )
        batch.validate(full=True)
        bound -= sum(map(_weight, batch.columns))
        if bound < 0:
            raise _too_much(path, _bound(path))
        yield from batch.to_pylist()


def _known(kind: "pyarrow.DataType") -> Iterator[bool]:
    """Whether each part of a type is one whose values are all stored, once each."""
    from pyarrow import types

    if isinstance(kind, _extension()):
        yield from _known(kind.storage_type)
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        yield from _known(kind.value_type)
    elif types.is_struct(kind):
        for number in range(kind.num_fields):
            yield from _known(kind.field(number).type)
    elif types.is_map(kind):
        yield from _known(kind.key_type)
        yield from _known(kind.item_type)
    elif types.is_dictionary(kind):
        yield from _known(kind.value_type)
    else:
        yield types.is_primitive(kind) or types.is_null(kind) or types.is_decimal(kind) or _is_bytes(kind)


def _weight(array: "pyarrow.Array") -> int:
    """Values and bytes of text in a column."""
    from pyarrow import types

    kind, count = array.type, len(array)
    if isinstance(kind, _extension()):
        return _weight(array.storage)
    if types.is_dictionary(kind):
        if not _is_bytes(kind.value_type):
            return int(count + (count if types.is_primitive(kind.value_type) else count * _weight(array.dictionary)))
        from pyarrow import compute

        lengths = compute.binary_length(array.dictionary).take(array.indices)
        return int(count + (compute.sum(lengths).as_py() or 0))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return count + _weight(array.flatten())
    if types.is_struct(kind):
        return count + sum(_weight(array.field(i)) for i in range(kind.num_fields))
    if types.is_map(kind):
        return count + _weight(array.keys) + _weight(array.items)
    return int(count + (array.nbytes if _is_bytes(kind) else 0))


def _is_bytes(kind: object) -> bool:
    from pyarrow import types

    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
    )  # fmt: skip


def _extension() -> type[Any]:
    import pyarrow

    kind: type[Any] = pyarrow.BaseExtensionType
    return kind
