"""Sizes of ggml's block types, for everyone who reads a GGUF file; how blocks decode stands in `ggml`. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockSize:
    """One ggml type: the number GGUF gives it, and `weights` values in `bytes` bytes."""

    id: int
    name: str
    weights: int
    bytes: int


SIZES: dict[int, BlockSize] = {
    size.id: size
    for size in (
        BlockSize(0, "F32", 1, 4),
        BlockSize(1, "F16", 1, 2),
        BlockSize(30, "BF16", 1, 2),
        BlockSize(8, "Q8_0", 32, 34),
        BlockSize(2, "Q4_0", 32, 18),
        BlockSize(3, "Q4_1", 32, 20),
        BlockSize(6, "Q5_0", 32, 22),
        BlockSize(7, "Q5_1", 32, 24),
        BlockSize(10, "Q2_K", 256, 84),
        BlockSize(11, "Q3_K", 256, 110),
        BlockSize(12, "Q4_K", 256, 144),
        BlockSize(13, "Q5_K", 256, 176),
        BlockSize(14, "Q6_K", 256, 210),
    )
}
NAMED: dict[str, BlockSize] = {size.name: size for size in SIZES.values()}
