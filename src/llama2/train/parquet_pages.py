"""How large the pages of a parquet file are once unpacked, as the pages say it.

A reader makes room for what the header of each page says, whatever the file's footer says of all of them. The headers
are Thrift structs in the compact protocol, PageHeader(1: type, 2: uncompressed size, 3: compressed size, ...).
"""

from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow.parquet import ColumnChunkMetaData

HEADER_BYTES = 1 << 16  # of one page's header; statistics in it are cut to some hundred bytes by all writers
_DEPTH = 8  # of structs in it


def unpacked(file: IO[bytes], column: "ColumnChunkMetaData") -> int:
    """Bytes of all pages of a column of a row group (pyarrow's ColumnChunkMetaData) once they are unpacked.

    Raises ValueError for what is no row of pages."""
    start = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
        start = column.dictionary_page_offset
    at, stop, size = start, start + column.total_compressed_size, 0
    while at < stop:
        file.seek(at)
        length, header = _header(file.read(HEADER_BYTES))
        more, stored = header.get(2, -1), header.get(3, -1)
        if more < 0 or stored < 0:
            raise ValueError(f"its page at byte {at} says {more} and {stored} as its sizes")
        size, at = size + more, at + length + stored
    return size


def _header(data: bytes) -> tuple[int, dict[int, int]]:
    """The length of a struct, and its whole numbers by field."""
    try:
        reader = _Compact(data)
        fields = reader.struct(0)
    except IndexError as error:
        raise ValueError("the header of a page goes beyond its end") from error
    return reader.at, fields


class _Compact:
    """Thrift's compact protocol, as much as telling where a struct ends takes."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self, depth: int) -> dict[int, int]:
        if depth > _DEPTH:
            raise ValueError("the header of a page nests too deeply")
        number, found = 0, {}
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._whole()
            value = self._value(head & 15, depth)
            if value is not None:
                found[number] = value
        return found

    def _value(self, kind: int, depth: int) -> int | None:
        if kind in (4, 5, 6):  # i16, i32, i64
            return self._whole()
        if kind == 3:  # a byte
            self._byte()
        elif kind == 7:  # a double
            self._skip(8)
        elif kind == 8:  # bytes
            self._skip(self._varint())
        elif kind in (9, 10):  # a list, a set
            head = self._byte()
            for _ in range(head >> 4 if head >> 4 < 15 else self._varint()):
                self._byte() if head & 15 in (1, 2) else self._value(head & 15, depth)
        elif kind == 12:
            self.struct(depth + 1)
        elif kind not in (1, 2):  # true and false are all of their field
            raise ValueError(f"the header of a page has a field of kind {kind}")
        return None

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self._data):
            raise IndexError

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 70:
                raise ValueError("the header of a page has a number of more than ten bytes")

    def _whole(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
