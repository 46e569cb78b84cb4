"""Writes src/llama2/quantization/grids.bin from the tables of the gguf package: the points that ggml's IQ types index.

The points are chosen, not computed, so they can only be taken over; grids.NOTICE.txt holds the licence that asks to go
with them. A byte is the index of a magnitude (`quantization/codebook_blocks.py` has the magnitudes), rows one after
the other, tables in the order of GRIDS.
"""

import hashlib
from pathlib import Path

import gguf.quants
import numpy as np

TARGET = Path(__file__).resolve().parent.parent / "src" / "llama2" / "quantization" / "grids.bin"
GRIDS = {
    "IQ2_XXS": "05826b5d3e472a3a",
    "IQ2_XS": "06e47aaca60b4dc1",
    "IQ2_S": "e1aa1473412b0552",
    "IQ3_XXS": "46e35f5a997efdee",
    "IQ3_S": "bd1af4945a1717c6",
    "IQ1_S": "07540ffc1aeaf6ad",
}


def indices(name: str, digest: str) -> bytes:
    """The table of one type as indices of its magnitudes; the digest is that of its values as int8."""
    kind = getattr(gguf.quants, name)
    kind.init_grid()
    values = kind.grid.reshape(-1).astype(np.int8)
    assert hashlib.sha256(values.tobytes()).hexdigest().startswith(digest), name
    magnitudes = sorted(set(values.tolist()))
    return bytes(magnitudes.index(value) for value in values.tolist())


if __name__ == "__main__":
    TARGET.write_bytes(b"".join(indices(name, digest) for name, digest in GRIDS.items()))
