"""The Triton kernels of `fused`: packed weights to floats, and products of one row of x with packed weights.

W is (N, K), x (M, K), sums are float32. A program of a product takes rows n of W and a range of K, `share` tiles of it;
where there are several ranges, each has its own plane of `out`. Codes are read 16 bytes a thread; the table of 16
values is one line of the first cache. Several rows of x: `fused_matrices`.
"""

import triton
import triton.language as tl

# -- parts -------------------------------------------------------------------------------------------------------


@triton.jit
def _halves(pairs: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Two neighbouring numbers of x out of one integer of twice their width."""
    if DTYPE == tl.float32:  # noqa: SIM300
        low = pairs.to(tl.int32).to(DTYPE, bitcast=True)
        high = (pairs >> 32).to(tl.int32).to(DTYPE, bitcast=True)
    else:
        low = pairs.to(tl.int16).to(DTYPE, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return low, high


@triton.jit
def lookup_planes(table: tl.tensor, n: tl.tensor) -> tl.tensor:
    """The table's eight words of low bytes and of high bytes, which stand after its 16 float32; one per row n of W.

    Loaded from an address that seems to depend on n: equal in all threads they would go to uniform registers, from
    which prmt cannot read, and be copied before each.
    """
    words = (table + 16).to(tl.pointer_type(tl.int32)) + tl.minimum(n, 0)[:, None]
    low = (tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3))
    return low, (tl.load(words + 4), tl.load(words + 5), tl.load(words + 6), tl.load(words + 7))


@triton.jit
def looked_up(code: tl.tensor, table: tl.tensor, planes: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
    """The table's values of the high and of the low four bits of bytes. ASM: instructions that do it, "" for loads."""
    if ASM == "":
        wide = code.to(tl.int32)
        high = tl.load(table + (wide >> 4))
        low = tl.load(table + (wide & 15))
    else:
        a, b = planes
        high, low = tl.inline_asm_elementwise(
            asm=ASM,
            constraints="=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            args=[code, a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    return high, low


@triton.jit
def block_absmax(
    absmax: tl.tensor,
    values: tl.tensor,
    nested: tl.tensor,
    offset: tl.tensor,
    blocks: tl.tensor,
    mask: tl.tensor,
    NESTED: tl.constexpr,
) -> tl.tensor:
    """Scales of the blocks `blocks`; with double quantisation values[code] * nested + offset."""
    found = tl.load(absmax + blocks, mask=mask, other=0)
    if NESTED > 0:
        value = tl.load(values + found.to(tl.int32))
        found = value * tl.load(nested + blocks // NESTED, mask=mask, other=0.0) + offset
    return found


@triton.jit
def _field(
    words: tl.tensor,
    at: tl.tensor,
    step: tl.tensor,
    shift: tl.tensor,
    mask: tl.tensor,
    BITS: tl.constexpr,
    ADD: tl.constexpr,
) -> tl.tensor:
    """The field that begins at bit `shift` of word `at`; of 3 bits it may end in the word `step` further on."""
    value = (tl.load(words + at, mask=mask, other=0).to(tl.uint32, bitcast=True) + ADD) >> shift.to(tl.uint32)
    if BITS == 3:
        high = tl.load(words + at + step, mask=mask & (shift > 29), other=0).to(tl.uint32, bitcast=True)
        value = value | ((high << 1) << (31 - shift).to(tl.uint32))
    return (value & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def group_zeros(
    qzeros: tl.tensor,
    group: tl.tensor,
    n: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    BITS: tl.constexpr,
    ADD: tl.constexpr,
    V1: tl.constexpr,
) -> tl.tensor:
    """The zeros of outputs n in `group`, shaped alike. ADD: what v1 leaves out of every field of a word."""
    bit = (n % 32) * BITS
    at = group * (columns // 32 * BITS) + n // 32 * BITS + bit // 32
    zero = _field(qzeros, at, 1, bit % 32, mask, BITS, ADD)
    if V1 and BITS == 3:
        zero = (zero + 1) & 7
    return zero


# -- to floats ---------------------------------------------------------------------------------------------------


@triton.jit
def unpack_blocks(
    codes: tl.tensor,
    table: tl.tensor,
    absmax: tl.tensor,
    values: tl.tensor,
    nested: tl.tensor,
    offset: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    length: tl.tensor,
    SPAN: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    SPANS: tl.constexpr,
) -> None:
    """Two codes a byte, `length` bytes, to `count` values. A block has PER_BLOCK spans of SPAN values."""
    span = tl.program_id(0).to(tl.int64) * SPANS + tl.arange(0, SPANS)
    byte = span[:, None] * (SPAN // 2) + tl.arange(0, SPAN // 2)[None, :]
    code = tl.load(codes + byte, mask=byte < length, other=0).to(tl.int32)
    scale = block_absmax(absmax, values, nested, offset, span // PER_BLOCK, span * SPAN < count, NESTED)
    even = tl.load(table + (code >> 4)) * scale[:, None]
    odd = tl.load(table + (code & 15)) * scale[:, None]
    at = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    tl.store(out + at, tl.interleave(even, odd).to(out.dtype.element_ty), mask=at < count)


@triton.jit
def unpack_groups(
    qweight: tl.tensor,
    qzeros: tl.tensor,
    scales: tl.tensor,
    g_idx: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    BITS: tl.constexpr,
    ADD: tl.constexpr,
    V1: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """GPTQ's integers (rows N, columns K), in any order of their groups, to values (N, K)."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (k[:, None] < columns) & (n[None, :] < rows)
    bit = (k % 32) * BITS
    word = k // 32 * BITS + bit // 32
    shift = (bit % 32)[:, None] + tl.zeros((BLOCK_K, BLOCK_N), tl.int32)
    code = _field(qweight, word[:, None] * rows + n[None, :], rows, shift, mask, BITS, 0)
    group = tl.load(g_idx + k, mask=k < columns, other=0)
    places = n[None, :] + tl.zeros((BLOCK_K, BLOCK_N), tl.int32)
    zero = group_zeros(qzeros, group[:, None], places, rows, mask, BITS, ADD, V1)
    scale = tl.load(scales + group[:, None] * rows + n[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.trans((code - zero).to(tl.float32) * scale).to(out.dtype.element_ty)
    at = n[:, None].to(tl.int64) * columns + k[None, :]
    tl.store(out + at, value, mask=(n[:, None] < rows) & (k[None, :] < columns))


@triton.jit
def unpack_rows(weight: tl.tensor, peaks: tl.tensor, out: tl.tensor, columns: tl.tensor, BLOCK: tl.constexpr) -> None:
    """int8 rows times their scale / 127."""
    n = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(weight + n * columns + k, mask=k < columns, other=0)
    value = code.to(tl.float32) * tl.load(peaks + n) * 0.007874015748031496
    tl.store(out + n * columns + k, value.to(out.dtype.element_ty), mask=k < columns)


@triton.jit(do_not_specialize=["split"])
def add_parts(
    parts: tl.tensor, out: tl.tensor, count: tl.tensor, split: tl.tensor, PARTS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Sum of the planes (split, count), PARTS at most, always in the same order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    mask = (part[:, None] < split) & (at[None, :] < count)
    total = tl.sum(tl.load(parts + part[:, None] * count + at[None, :], mask=mask, other=0.0), 0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


# -- two codes a byte --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["share"])
def blocks_row(
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
    SPAN: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    ASM: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPANS: tl.constexpr,
) -> None:
    """One row of x, as pairs. A row of W has `spans` whole spans."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * share * SPANS
    width: tl.constexpr = SPANS * SPAN // 2
    planes = lookup_planes(table, n)
    sums = tl.zeros((BLOCK_N, SPANS), tl.float32)
    for start in range(first, tl.minimum(first + share * SPANS, spans), SPANS):
        byte = start * (SPAN // 2) + tl.arange(0, width)
        held = byte < row_bytes
        at = n[:, None] * row_bytes + byte[None, :]
        code = tl.load(codes + at, mask=(n[:, None] < rows) & held[None, :], other=0)
        high, low = looked_up(code, table, planes, ASM)
        even, odd = _halves(tl.load(x + byte, mask=held, other=0), DTYPE)
        product = high * even.to(tl.float32)[None, :] + low * odd.to(tl.float32)[None, :]
        span = start + tl.arange(0, SPANS)
        there = (n[:, None] < rows) & (span[None, :] < spans)
        block = (n[:, None] * spans + span[None, :]) // PER_BLOCK
        scale = block_absmax(absmax, values, nested, offset, block, there, NESTED)
        sums += tl.sum(tl.reshape(product, (BLOCK_N, SPANS, SPAN // 2)), 2) * scale
    total = tl.sum(sums, 1).to(out.dtype.element_ty)
    tl.store(out + tl.program_id(1) * rows + n, total, mask=n < rows)


# -- GPTQ, four bits ---------------------------------------------------------------------------------------------


@triton.jit
def _steps(
    qzeros: tl.tensor,
    scales: tl.tensor,
    group: tl.tensor,
    n: tl.tensor,
    rows: tl.tensor,
    mask: tl.tensor,
    ADD: tl.constexpr,
    V1: tl.constexpr,
) -> tl.tensor:
    """(zero, scale) of outputs n in `group`, float32."""
    zero = group_zeros(qzeros, group, n, rows, mask, 4, ADD, V1).to(tl.float32)
    return zero, tl.load(scales + group * rows + n, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _less(word: tl.tensor, j: tl.constexpr, zero: tl.tensor, unit: tl.tensor) -> tl.tensor:
    """16^(j mod 5) times the j-th code of each word less its zero, float32.

    unit: the bits of 2^23. Five codes lie in the 23 bits of a mantissa, where and-or makes a float of one: no shift,
    and one instruction where `unit` is in a register, so it is an argument.
    """
    if j >= 5:
        word = word >> 20
    bits = (word & (15 << (4 * (j % 5)))) | unit
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + zero * (1 << (4 * (j % 5))))


@triton.jit(do_not_specialize=["share"])
def groups_row(
    x: tl.tensor,
    qweight: tl.tensor,
    qzeros: tl.tensor,
    scales: tl.tensor,
    g_idx: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    group_size: tl.tensor,
    unit: tl.tensor,
    share: tl.tensor,
    ADD: tl.constexpr,
    V1: tl.constexpr,
    ORDERED: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One row of x. A span is SPAN rows of words, 8 SPAN columns; ORDERED: it lies in one group, in file order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * share
    spans = (columns + 8 * SPAN - 1) // (8 * SPAN)
    sums = tl.zeros((SPAN, BLOCK_N), tl.float32)
    for span in range(first, tl.minimum(first + share, spans)):
        line = span * SPAN + tl.arange(0, SPAN)
        held = line < columns // 8
        mask = held[:, None] & (n < rows)[None, :]
        word = tl.load(qweight + line[:, None] * rows + n[None, :], mask=mask, other=0)
        if ORDERED:
            zero, scale = _steps(qzeros, scales, span * (8 * SPAN) // group_size, n, rows, n < rows, ADD, V1)
            part = tl.zeros((SPAN, BLOCK_N), tl.float32)
            for j in tl.static_range(8):
                value = tl.load(x + line * 8 + j, mask=held, other=0.0).to(tl.float32) * (1.0 / (1 << (4 * (j % 5))))
                part += _less(word, j, zero[None, :], unit) * value[:, None]
            sums += part * scale[None, :]
        else:
            place = n[None, :] + tl.zeros((SPAN, 1), tl.int32)
            for j in tl.static_range(8):
                value = tl.load(x + line * 8 + j, mask=held, other=0.0).to(tl.float32) * (1.0 / (1 << (4 * (j % 5))))
                group = tl.load(g_idx + line * 8 + j, mask=held, other=0)[:, None]
                zero, scale = _steps(qzeros, scales, group, place, rows, mask, ADD, V1)
                sums += _less(word, j, zero, unit) * scale * value[:, None]
    total = tl.sum(sums, 0).to(out.dtype.element_ty)
    tl.store(out + tl.program_id(1) * rows + n, total, mask=n < rows)


# -- int8 rows ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["share"])
def bytes_row(
    x: tl.tensor,
    weight: tl.tensor,
    peaks: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    share: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One row of x; W's scales come last."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * share * BLOCK_K
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(first, tl.minimum(first + share * BLOCK_K, columns), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (n[:, None] < rows) & (k[None, :] < columns)
        code = tl.load(weight + n[:, None] * columns + k[None, :], mask=mask, other=0)
        sums += code.to(tl.float32) * tl.load(x + k, mask=k < columns, other=0.0).to(tl.float32)[None, :]
    scale = tl.load(peaks + n, mask=n < rows, other=0.0) * 0.007874015748031496
    total = (tl.sum(sums, 1) * scale).to(out.dtype.element_ty)
    tl.store(out + tl.program_id(1) * rows + n, total, mask=n < rows)
