"""Parquet files and folders of save_to_disk: their rows, and what a stranger could put into one."""

import json
import shutil
from pathlib import Path
from typing import Any

import peak
import pytest

from llama2.errors import CheckpointError, InputError
from llama2.train import parquet_pages, readers, tables

pyarrow = pytest.importorskip("pyarrow", reason="parquet needs the extra `train`")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS: list[dict[str, Any]] = [
    {"text": f"row {i}", "n": i, "tags": ["a"] * i, "chat": [{"role": "user", "content": "é"}], "gone": None}
    for i in range(5)
]


def written(path: Path, table: Any, **options: Any) -> Path:
    parquet.write_table(table, path, **options)
    return path


def arrow_folder(folder: Path, table: Any, **info: Any) -> Path:
    """What save_to_disk writes."""
    folder.mkdir(parents=True)
    with pyarrow.ipc.new_stream(str(folder / "data-0.arrow"), table.schema) as out:
        out.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_rows_of_both(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    assert readers.read(written(tmp_path / "a.parquet", table, row_group_size=2)) == ROWS
    assert readers.read(arrow_folder(tmp_path / "a", table)) == ROWS
    words = table.set_column(0, "text", table["text"].dictionary_encode())  # a categorical of pandas
    assert readers.read(written(tmp_path / "b.parquet", words)) == ROWS


def test_names_of_classes_and_json(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"label": 1, "call": '{"a": 1}'}, {"label": -1, "call": None}])
    kinds = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}, "call": {"_type": "Json"}}
    folder = arrow_folder(tmp_path / "a", table, features=kinds)
    assert readers.read(folder) == [{"label": "yes", "call": {"a": 1}}, {"label": -1, "call": None}]
    kinds["label"]["names"] = ["no"]
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"a row is not of the kind that dataset_info.json gives it \(list index"):
        readers.read(arrow_folder(folder, table, features=kinds))


def test_splits(tmp_path: Path) -> None:
    for name in ("train", "test"):
        arrow_folder(tmp_path / name, pyarrow.Table.from_pylist([{"text": name}]))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert readers.read(tmp_path, "test") == [{"text": "test"}]
    with pytest.raises(InputError, match="has the splits train, test, not 'dev'"):
        readers.read(tmp_path, "dev")
    with pytest.raises(InputError, match="has no splits, and the split is 'dev'"):
        readers.read(tmp_path / "train", "dev")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["../x"]}')
    with pytest.raises(CheckpointError, match=r"points to '../x'; it must be the name of a file beside it"):
        readers.read(tmp_path, "../x")


@pytest.mark.parametrize("name", ["/etc/passwd", "../data-0.arrow", 5, None])
def test_data_files_stay_in_their_folder(tmp_path: Path, name: Any) -> None:
    folder = arrow_folder(tmp_path / "a", pyarrow.table({"text": ["a"]}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(CheckpointError, match=r"points to|_data_files is \["):
        readers.read(folder)


REPEATED = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10_000), pyarrow.array(["x" * 10_000]))


@pytest.mark.parametrize(
    "column",
    [REPEATED, pyarrow.nulls(10**7), pyarrow.array([["x" * 1000] * 1000] * 20)],
    ids=["one text, many times", "nothing, many times", "lists of one text"],
)
def test_a_small_file_of_many_values(tmp_path: Path, column: Any) -> None:
    """Refused before it is read: 100 MB of text, ten million rows, of files of some kilobytes."""
    path = written(tmp_path / "a.parquet", pyarrow.table({"text": column}), compression="zstd")
    assert path.stat().st_size < 40_000
    with pytest.raises(InputError, match=r"would become more than [\d,]+ values and bytes of text, 100 for each"):
        readers.read(path)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("packing", ["zstd", "snappy", "none"])
def test_pages_say_their_size(tmp_path: Path, version: str, packing: str) -> None:
    """As the footer adds it up: of several pages, with and without dictionaries and statistics."""
    rows = [{"text": f"row {i} " * 9, "n": i if i % 3 else None, "tags": ["a"] * (i % 4)} for i in range(3000)]
    table = pyarrow.Table.from_pylist(rows)
    path = written(tmp_path / "a.parquet", table, compression=packing, data_page_version=version, data_page_size=1024,
                   row_group_size=1000, write_page_checksum=True)  # fmt: skip
    found = parquet.ParquetFile(path).metadata
    with path.open("rb") as file:
        for i in range(3):
            for j in range(3):
                column = found.row_group(i).column(j)
                said = column.total_uncompressed_size
                assert said * 0.5 < parquet_pages.unpacked(file, column) <= said  # which counts the headers too
    assert readers.read(path) == rows


def test_a_footer_that_lies_about_its_pages(tmp_path: Path) -> None:
    """Ten kilobytes, of which the footer says that they become 1,000 bytes, and the page 30 MB."""
    path = written(tmp_path / "a.parquet", pyarrow.table({"text": ["x" * 30_000_000]}), compression="zstd",
                   use_dictionary=False, write_statistics=False)  # fmt: skip
    size, data = parquet.ParquetFile(path).metadata.row_group(0).total_byte_size, path.read_bytes()
    foot = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    said, lie = (bytes([n << 1 & 127 | 128, n >> 6 & 127 | 128, n >> 13 & 127 | 128, n >> 20]) for n in (size, 1000))
    assert data[foot:].count(said) == 2
    path.write_bytes(data[:foot] + data[foot:].replace(said, lie))
    assert parquet.ParquetFile(path).metadata.row_group(0).total_byte_size == 1000
    before = peak.begin()
    with pytest.raises(InputError, match=r"would become more than [\d,]+ values and bytes of text"):
        readers.read(path)
    assert peak.peak() - before < 10_000_000


def test_arrow_that_says_more_than_it_has(tmp_path: Path) -> None:
    """An offset beyond its buffer: read as it is, it ends the process with SIGSEGV."""
    text = pyarrow.array(["aaaa", "bbbb"])
    offsets = pyarrow.array([0, 2**30, 8], pyarrow.int32()).buffers()[1]
    wrong = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, text.buffers()[2]])
    with pytest.raises(InputError, match="is no file of a data set .*1073741824"):
        readers.read(arrow_folder(tmp_path / "a", pyarrow.table({"text": wrong})))
    runs = pyarrow.RunEndEncodedArray.from_arrays(pyarrow.array([10**9], pyarrow.int32()), pyarrow.array(["x"]))
    with pytest.raises(InputError, match="column 'text' is of type 'run_end_encoded"):
        readers.read(arrow_folder(tmp_path / "b", pyarrow.table({"text": runs})))


@pytest.mark.parametrize("kind", ["text", "dictionary"])
@pytest.mark.parametrize("how", ["zstd", "lz4"])
def test_compressed_arrow(tmp_path: Path, kind: str, how: str) -> None:
    """Ten kilobytes of it take gigabytes before a row is there to be counted."""
    text = pyarrow.array(["x" * 1_000_000])
    table = pyarrow.table({"text": text if kind == "text" else text.dictionary_encode()})
    folder = arrow_folder(tmp_path / "a", table)
    assert readers.read(folder) == [{"text": "x" * 1_000_000}]
    options = pyarrow.ipc.IpcWriteOptions(compression=how)
    with pyarrow.ipc.new_stream(str(folder / "data-0.arrow"), table.schema, options=options) as out:
        out.write_table(table)
    assert (folder / "data-0.arrow").stat().st_size < 20_000
    with pytest.raises(InputError, match="data-0.arrow is compressed, which save_to_disk never does"):
        readers.read(folder)


def test_settings_of_other_types(tmp_path: Path) -> None:
    folder = arrow_folder(tmp_path / "a", pyarrow.table({"text": ["a"]}))
    for name, content, said in (
        ("state.json", "{}", "_data_files is None; it must be a list"),
        ("state.json", "[" * 5000, "is not valid JSON"),
        ("dataset_info.json", '{"features": [1]}', r"features is \[1\]; it must be an object"),
        ("dataset_info.json", '{"features": {"text": {"_type": "Json"}}}', "not of the kind that dataset_info"),
    ):
        before = (folder / name).read_text()
        (folder / name).write_text(content)
        with pytest.raises((InputError, CheckpointError), match=said):
            readers.read(folder)
        (folder / name).write_text(before)
    with pytest.raises(InputError, match=r"is no parquet file \("):
        (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
        tables.parquet(tmp_path / "x.parquet")
