"""The table of formats: one row a format, and the same rows in csrc."""

import re
from pathlib import Path

import numpy as np
import pytest

from llama2 import compiled, cpu
from llama2.checkpoint.gguf_mixture import FILE_TYPES
from llama2.errors import InputError
from llama2.quantization.formats import (
    BFLOAT16,
    BLOCKS,
    BY_ID,
    FOREIGN_BLOCKS,
    FORMATS,
    IN_PLACE,
    PACKED_BLOCKS,
    layer_classes,
    parse,
)
from llama2.quantization.ggml import TYPES
from llama2.quantization.ggml_encode import ENCODERS
from llama2.quantization.linear import PackedLinear
from llama2.quantization_config import QuantizationConfig

gguf = pytest.importorskip("gguf")
needs_engine = pytest.mark.skipif(not cpu.available(), reason="the native engine is not built")


def test_rows_are_named_once() -> None:
    assert len(BY_ID) == len(FORMATS)
    numbers = [row.ggml for row in FORMATS if row.ggml is not None]
    assert len(set(numbers)) == len(numbers) and not set(numbers) & set(FOREIGN_BLOCKS)


def test_sizes_are_those_of_the_gguf_package() -> None:
    for number, row in BLOCKS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == row.id and gguf.GGML_QUANT_SIZES[kind] == (row.weights, row.bytes), row.id


def test_every_row_has_its_layer_and_settings() -> None:
    for row in FORMATS:
        assert issubclass(row.layer_class, PackedLinear) and row.layer_class in layer_classes(), row.id
        assert issubclass(row.settings, QuantizationConfig) and row.engine, row.id
        assert (row.ggml is None) == bool(row.methods), row.id
    assert set(TYPES) == {row.id for row in BLOCKS.values()}


def test_a_type_is_written_where_it_has_an_encoder() -> None:
    """And every file type says the block that most of its matrices have."""
    assert {row.id for row in FORMATS if row.written} == {*ENCODERS, *(row.id for row in FORMATS if row.weights == 1)}
    assert all(BY_ID[kind.block].written for kind in FILE_TYPES.values())
    numbers = [row.file_type for row in BLOCKS.values() if row.file_type is not None and not row.written]
    numbers += [kind.id for kind in FILE_TYPES.values()]
    assert len(set(numbers)) == len(numbers) and set(numbers) <= {kind.value for kind in gguf.LlamaFileType}


@needs_engine
def test_the_table_of_csrc_is_this_one() -> None:
    """Types with a layout are packed there, and no others; those that are not packed as they are can be unpacked."""
    for number in range(256):
        row = BLOCKS.get(number)
        packed = row is not None and row.engine not in (IN_PLACE, BFLOAT16)
        try:
            size = compiled.native().tile_bytes(number, 16, 512)
        except ValueError:
            assert not packed, number
            continue
        assert packed and row is not None and size >= 16 * 512 * row.bytes // row.weights, number
        assert PACKED_BLOCKS[row.id] == number
    for number, row in BLOCKS.items():
        if row.engine == IN_PLACE:
            continue
        raw, out = np.zeros(512 // row.weights * row.bytes, np.uint8), np.ones((1, 512), np.float32)
        compiled.native().unpack_blocks(compiled.make_pool(1), raw, number, out)
        assert not out.any(), row.id


@needs_engine
def test_each_packed_block_has_the_layout_that_its_row_names() -> None:
    """Number, name, block and layout: csrc/engine/pack.cpp beside the rows here."""
    rows = {(row.ggml, row.id, row.weights, row.bytes, row.engine) for row in BLOCKS.values()}
    there = set(compiled.native().block_types())
    assert there <= rows
    assert {row[1] for row in there} == set(PACKED_BLOCKS)


def test_the_readme_of_csrc_names_every_layout() -> None:
    csrc = Path(__file__).parents[2] / "csrc"
    listed = re.findall(r"^  ([A-Z]\w+) = \d+,", (csrc / "kernels" / "kernels.h").read_text(), re.MULTILINE)
    table = re.findall(r"^\| ([A-Z][\w, ]*) \|", (csrc / "README.md").read_text(), re.MULTILINE)
    assert len(listed) >= 16 and sorted(", ".join(table).split(", ")) == sorted(listed)
    engine = {name for row in FORMATS for name in row.engine.split(", ") if name.isupper()}
    assert engine <= set(listed)


def test_an_unknown_method_is_told_with_those_that_are_read() -> None:
    with pytest.raises(InputError, match=r"the quantisation method is 'novel'; .*gptq"):
        parse({"quant_method": "novel"})
