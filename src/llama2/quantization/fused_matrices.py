"""The Triton kernels of `fused` for up to 16 rows of x: codes become numbers that matrices multiply, 16 rows at a time.

Scales are the business of sums, once a block, so a weight costs its code's instructions and no more: 2.75 for NF4 in
16 bits, 1.5 for GPTQ. Shapes, ranges and planes as in `fused_kernels`.
"""

import triton
import triton.language as tl

from llama2.quantization.fused_kernels import block_absmax, group_zeros, looked_up, lookup_planes

# -- two codes a byte --------------------------------------------------------------------------------------------


@triton.jit
def _rounded(code: tl.tensor, table: tl.tensor, planes: tl.tensor, ASM: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """As looked_up, in DTYPE, which is that of the planes where ASM is given."""
    if ASM == "":
        high, low = looked_up(code, table, planes, ASM)
        high, low = high.to(DTYPE), low.to(DTYPE)
    else:
        a, b = planes
        high, low = tl.inline_asm_elementwise(
            asm=ASM,
            constraints="=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            args=[code, a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=4,
        )
        high, low = high.to(DTYPE, bitcast=True), low.to(DTYPE, bitcast=True)
    return high, low


@triton.jit(do_not_specialize=["share", "count"])
def blocks_rows(
    x: tl.tensor,
    codes: tl.tensor,
    table: tl.tensor,
    absmax: tl.tensor,
    values: tl.tensor,
    nested: tl.tensor,
    offset: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    row_bytes: tl.tensor,
    spans: tl.tensor,
    share: tl.tensor,
    count: tl.tensor,
    SPAN: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    ASM: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """`count` rows of x, up to 16, a span at a time: matrices multiply the table's values, sums take the scale.

    DOT: the type that matrices multiply in.
    """
    m = tl.arange(0, 16)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, spans)
    k = tl.arange(0, SPAN)
    here = n < rows
    planes = lookup_planes(table, n)
    at = n[:, None] * row_bytes + tl.arange(0, SPAN // 2)[None, :]
    block = n * spans
    scale = block_absmax(absmax, values, nested, offset, (block + first) // PER_BLOCK, here, NESTED)
    sums = tl.zeros((16, BLOCK_N), tl.float32)
    for span in range(first, last):
        code = tl.load(codes + at + span * (SPAN // 2), mask=here[:, None], other=0)
        there = (m < count)[:, None]
        value = tl.load(x + m[:, None] * (2 * row_bytes) + span * SPAN + k[None, :], mask=there, other=0.0)
        # The next scale is asked for before this one is used: it would be waited for behind the product.
        following = (block + span + 1) // PER_BLOCK
        next_scale = block_absmax(absmax, values, nested, offset, following, here & (span + 1 < last), NESTED)
        high, low = _rounded(code, table, planes, ASM, DTYPE)
        w = tl.reshape(tl.join(high, low), (BLOCK_N, SPAN))
        sums += tl.dot(value.to(DOT), tl.trans(w).to(DOT), input_precision="ieee") * scale[None, :]
        scale = next_scale
    to = (tl.program_id(1) * count + m[:, None]) * rows + n[None, :]
    tl.store(out + to, sums.to(out.dtype.element_ty), mask=(m[:, None] < count) & here[None, :])


# -- GPTQ, four bits ---------------------------------------------------------------------------------------------


@triton.jit
def _code(word: tl.tensor, j: tl.constexpr, zero: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The j-th code of each word less its zero."""
    return (((word >> (4 * j)) & 15) - zero).to(tl.float32).to(DTYPE)


@triton.jit
def _less_zeros(
    word: tl.tensor, zero: tl.tensor, UNIT: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """The eight codes of words (SPAN, N) less their zeros, exact in DTYPE, as (8 SPAN, N).

    ASM: instructions that do it, over numbers of which an integer of four bits is the end of the mantissa: UNIT + code.
    """
    if ASM == "":
        a = tl.join(_code(word, 0, zero, DTYPE), _code(word, 1, zero, DTYPE))
        b = tl.join(_code(word, 2, zero, DTYPE), _code(word, 3, zero, DTYPE))
        c = tl.join(_code(word, 4, zero, DTYPE), _code(word, 5, zero, DTYPE))
        d = tl.join(_code(word, 6, zero, DTYPE), _code(word, 7, zero, DTYPE))
    else:
        c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
            asm=ASM,
            constraints="=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
            args=[word, (zero + UNIT).to(tl.float32).to(DTYPE)],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
        a, b, c, d = tl.join(c0, c1), tl.join(c2, c3), tl.join(c4, c5), tl.join(c6, c7)
    low, high = tl.join(a, b), tl.join(c, d)
    both = tl.permute(tl.join(low, high), (0, 4, 3, 2, 1))
    w = tl.reshape(both, (8 * word.shape[0], word.shape[1]))
    if ASM != "":
        w = w.to(DTYPE, bitcast=True)
    return w


@triton.jit(do_not_specialize=["share", "count"])
def groups_rows(
    x: tl.tensor,
    qweight: tl.tensor,
    qzeros: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    share: tl.tensor,
    count: tl.tensor,
    ADD: tl.constexpr,
    V1: tl.constexpr,
    SPAN: tl.constexpr,
    PER_GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    ASM: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """`count` rows of x, up to 16; a span, SPAN rows of words, lies in one group, in file order.

    Matrices multiply codes less their zeros, sums take the scale. DOT: the type that matrices multiply in.
    """
    m = tl.arange(0, 16)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, (columns + 8 * SPAN - 1) // (8 * SPAN))
    line = tl.arange(0, SPAN)
    k = tl.arange(0, 8 * SPAN)
    here = n < rows
    sums = tl.zeros((16, BLOCK_N), tl.float32)
    group = first // PER_GROUP
    zero = group_zeros(qzeros, group, n, rows, here, 4, ADD, V1)
    scale = tl.load(scales + group * rows + n, mask=here, other=0.0).to(tl.float32)
    for span in range(first, last):
        at = span * SPAN + line
        word = tl.load(
            qweight + at[:, None] * rows + n[None, :], mask=(at < columns // 8)[:, None] & here[None, :], other=0
        )
        column = span * (8 * SPAN) + k
        there = (m < count)[:, None] & (column < columns)[None, :]
        value = tl.load(x + m[:, None] * columns + column[None, :], mask=there, other=0.0)
        # As in blocks_rows, for zeros as well.
        group = (span + 1) // PER_GROUP
        more = here & (span + 1 < last)
        next_zero = group_zeros(qzeros, group, n, rows, more, 4, ADD, V1)
        next_scale = tl.load(scales + group * rows + n, mask=more, other=0.0).to(tl.float32)
        w = _less_zeros(word, zero[None, :] + tl.zeros((SPAN, 1), tl.int32), UNIT, ASM, DTYPE)
        sums += tl.dot(value.to(DOT), w.to(DOT), input_precision="ieee") * scale[None, :]
        zero, scale = next_zero, next_scale
    to = (tl.program_id(1) * count + m[:, None]) * rows + n[None, :]
    tl.store(out + to, sums.to(out.dtype.element_ty), mask=(m[:, None] < count) & here[None, :])


# -- int8 rows ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["share", "count"])
def bytes_rows(
    x: tl.tensor,
    weight: tl.tensor,
    peaks: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    share: tl.tensor,
    count: tl.tensor,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """`count` rows of x, up to 16. DOT: the type that matrices multiply in, which holds a code exactly."""
    m = tl.arange(0, 16)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * share * BLOCK_K
    sums = tl.zeros((16, BLOCK_N), tl.float32)
    for start in range(first, tl.minimum(first + share * BLOCK_K, columns), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (n[:, None] < rows) & (k[None, :] < columns)
        code = tl.load(weight + n[:, None] * columns + k[None, :], mask=mask, other=0)
        there = (m[:, None] < count) & (k[None, :] < columns)
        value = tl.load(x + m[:, None] * columns + k[None, :], mask=there, other=0.0)
        sums = tl.dot(value.to(DOT), tl.trans(code.to(DOT)), sums, input_precision="ieee")
    sums *= (tl.load(peaks + n, mask=n < rows, other=0.0) * 0.007874015748031496)[None, :]
    at = (tl.program_id(1) * count + m[:, None]) * rows + n[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(m[:, None] < count) & (n[None, :] < rows))
