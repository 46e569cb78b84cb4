// Included by isa_avx512.cpp alone: sums of products of bfloat16 matrices, added in float32 and rounded once.
// The dot instruction wants pairs of the depth side by side in a lane. B is packed so, by panels of 64 columns that
// stay in the second cache while rows of A pass by; A is read where it lies unless its depth runs across memory, or is
// odd. 6 x 64 sums fill 24 registers, for each pair of the depth 24 products, 4 loads and 6 broadcasts: 0.93 to 0.98 of
// peak.

constexpr int64_t DEPTH = PRODUCT_DEPTH;

INLINE __m512i pairs32(const uint16_t* p) { return _mm512_loadu_si512(p); }
INLINE __m512i pairs32(const float* p) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + 16), _mm512_loadu_ps(p));
}
INLINE __m512i widened(__mmask16 have, const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(have, p));
}
INLINE __m512i widened(__mmask16 have, const float* p) {
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(have, p)));
}
INLINE uint32_t narrow(uint16_t v) { return v; }
INLINE uint32_t narrow(float v) { return Half::put(v); }

struct Unpacked {  // 32 values behind each other: those at even places, and those at odd ones
  __m512 even, odd;
};
INLINE Unpacked unpacked(const CodedMatrix& c, int64_t at, __m512 table) {
  __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(c.codes + at / 2)));
  __m512 scale = _mm512_set1_ps(c.scales[at / c.block]);
  return {_mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table), scale),
          _mm512_mul_ps(_mm512_permutexvar_ps(bytes, table), scale)};
}
INLINE __m512i paired(__m512 low, __m512 high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low)),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high)), 16));
}

struct FourBits {  // places in a matrix of codes, for what takes a pointer to values
  const CodedMatrix* codes;
  __m512 table;
  int64_t at;
  FourBits operator+(int64_t n) const { return {codes, table, at + n}; }
};
INLINE __m512i pairs32(const FourBits& p) {
  Unpacked u = unpacked(*p.codes, p.at, p.table);
  return paired(u.even, u.odd);
}

// 16 rows of 16 pairs, `stride` values apart, to columns: to[pair * ld + row]
template <class P>
INLINE void transpose16(P from, int64_t stride, uint32_t* to, int64_t ld) {
  __m512i a[16], b[16];
  UNROLLED(16, i, 16) a[i] = pairs32(from + i * stride);
  UNROLLED(8, pair, 8) {
    const int i = 2 * pair;
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  UNROLLED(4, four, 4) {
    const int i = 4 * four;
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  UNROLLED(4, i, 4) {  // a[4 g + i]: rows 4 g .. 4 g + 3 of columns i, i + 4, i + 8, i + 12
    __m512i lo = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), hi = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    __m512i lo2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88),
            hi2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    _mm512_storeu_si512(to + i * ld, _mm512_shuffle_i32x4(lo, lo2, 0x88));
    _mm512_storeu_si512(to + (i + 8) * ld, _mm512_shuffle_i32x4(lo, lo2, 0xdd));
    _mm512_storeu_si512(to + (i + 4) * ld, _mm512_shuffle_i32x4(hi, hi2, 0x88));
    _mm512_storeu_si512(to + (i + 12) * ld, _mm512_shuffle_i32x4(hi, hi2, 0xdd));
  }
}

// Vectors of `depth` values, `stride` apart, each along memory: to[pair * ld + vector], zeros up to `wide` vectors and
// behind an odd depth.
template <class V>
void pairs_along(const V* from, int64_t stride, int64_t count, int64_t depth, int64_t wide, uint32_t* to, int64_t ld) {
  for (int64_t n = 0; n < wide; n += 16) {
    int64_t k = 0, have = count - n < 16 ? count - n : 16;
    if (have == 16)
      for (; k + 32 <= depth; k += 32) transpose16(from + n * stride + k, stride, to + k / 2 * ld + n, ld);
    for (; k < depth; k += 2)
      for (int64_t i = 0; i < 16; ++i) {
        const V* p = from + (n + i) * stride + k;
        to[k / 2 * ld + n + i] = i < have ? narrow(p[0]) | (k + 1 < depth ? narrow(p[1]) << 16 : 0) : 0;
      }
  }
}

alignas(64) constexpr uint16_t INTERLEAVE[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

// The same of vectors that lie across memory: value k of vector n is from[k * stride + n].
template <class V>
void pairs_across(const V* from, int64_t stride, int64_t count, int64_t depth, int64_t wide, uint32_t* to, int64_t ld) {
  __m512i first = _mm512_loadu_si512(INTERLEAVE), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int64_t k = 0; k < depth; k += 2) {
    const V *p = from + k * stride, *q = p + stride;
    int64_t n = 0;
    if (sizeof(V) == 2 && k + 1 < depth)
      for (; n + 32 <= count; n += 32) {
        __m512i low = _mm512_loadu_si512(p + n), high = _mm512_loadu_si512(q + n);
        _mm512_storeu_si512(to + k / 2 * ld + n, _mm512_permutex2var_epi16(low, first, high));
        _mm512_storeu_si512(to + k / 2 * ld + n + 16, _mm512_permutex2var_epi16(low, second, high));
      }
    for (; n < wide; n += 16) {
      __mmask16 have = count - n >= 16 ? 0xffff : count > n ? (1u << (count - n)) - 1 : 0;
      __m512i low = widened(have, p + n), high = k + 1 < depth ? widened(have, q + n) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + k / 2 * ld + n, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

// The same of codes: depth, stride and what lies side by side are multiples of 32.
void pairs_along(FourBits from, int64_t stride, int64_t count, int64_t depth, int64_t wide, uint32_t* to, int64_t ld) {
  for (int64_t n = 0; n < wide; n += 16) {
    int64_t have = count - n < 16 ? count - n : 16;
    for (int64_t k = 0; k < depth; k += 32) {
      if (have == 16) {
        transpose16(from + n * stride + k, stride, to + k / 2 * ld + n, ld);
        continue;
      }
      alignas(64) uint32_t rows[16][16] = {};
      for (int64_t i = 0; i < have; ++i) _mm512_store_si512(rows[i], pairs32(from + (n + i) * stride + k));
      transpose16((const uint16_t*)rows, 32, to + k / 2 * ld + n, ld);
    }
  }
}

void pairs_across(FourBits from, int64_t stride, int64_t count, int64_t depth, int64_t, uint32_t* to, int64_t ld) {
  __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
          second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t k = 0; k < depth; k += 2)
    for (int64_t n = 0; n < count; n += 32) {
      Unpacked p = unpacked(*from.codes, from.at + k * stride + n, from.table),
               q = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      if (k + 1 < depth) q = unpacked(*from.codes, from.at + (k + 1) * stride + n, from.table);
      __m512i even = paired(p.even, q.even), odd = paired(p.odd, q.odd);
      _mm512_storeu_si512(to + k / 2 * ld + n, _mm512_permutex2var_epi32(even, first, odd));
      _mm512_storeu_si512(to + k / 2 * ld + n + 16, _mm512_permutex2var_epi32(even, second, odd));
    }
}

struct Piece {        // of one term's depth
  const uint16_t* a;  // row 0
  int64_t stride;
  const uint32_t* b;  // packed
  int64_t pairs;
};

struct Tile {             // what a sum begins with and where it goes
  const uint16_t* added;  // or null
  int64_t added_ld;
  float* kept;  // sums between blocks of the depth, [row][64]
  bool resume, grows, keep;
  void* out;
  int64_t out_ld;
  Real type;
  float scale;
  int64_t columns;
};

template <int M, int N>  // M rows of N registers
INLINE void tile(const Piece* pieces, int count, int64_t row, const Tile& t) {
  __m512 acc[M][N];
  __mmask16 mask[N];
  UNROLLED(4, n, N) mask[n] = t.columns - 16 * n >= 16 ? 0xffff : (1u << (t.columns - 16 * n)) - 1;
#define EACH(m, n)   \
  UNROLLED(12, m, M) \
    UNROLLED(4, n, N)
  if (t.resume) {
    EACH(m, n) acc[m][n] = _mm512_loadu_ps(t.kept + (row + m) * PRODUCT_COLUMNS + 16 * n);
  } else if (t.grows) {
    EACH(m, n) acc[m][n] = _mm512_maskz_loadu_ps(mask[n], (float*)t.out + (row + m) * t.out_ld + 16 * n);
  } else if (t.added) {
    EACH(m, n)
      acc[m][n] =
          _mm512_castsi512_ps(_mm512_slli_epi32(widened(mask[n], t.added + (row + m) * t.added_ld + 16 * n), 16));
  } else {
    EACH(m, n) acc[m][n] = _mm512_setzero_ps();
  }
  for (int i = 0; i < count; ++i) {
    const Piece& p = pieces[i];
    const uint16_t* a = p.a + row * p.stride;
    const uint32_t* b = p.b;
    for (int64_t k = 0; k < p.pairs; ++k, a += 2, b += 16 * N) {
      __m512i v[N];
      UNROLLED(4, n, N) v[n] = _mm512_loadu_si512(b + 16 * n);
      UNROLLED(12, m, M) {
        int32_t both;
        __builtin_memcpy(&both, a + m * p.stride, 4);
        __m512i x = _mm512_set1_epi32(both);
        asm("" : "+v"(x));  // one broadcast for N products
        UNROLLED(4, n, N) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], (__m512bh)v[n], (__m512bh)x);
      }
    }
  }
  if (t.keep) {
    EACH(m, n) _mm512_storeu_ps(t.kept + (row + m) * PRODUCT_COLUMNS + 16 * n, acc[m][n]);
    return;
  }
  __m512 scale = _mm512_set1_ps(t.scale);
  if (t.scale != 1)
    EACH(m, n) acc[m][n] = _mm512_mul_ps(acc[m][n], scale);
  if (t.type == Real::F32) {
    EACH(m, n) _mm512_mask_storeu_ps((float*)t.out + (row + m) * t.out_ld + 16 * n, mask[n], acc[m][n]);
  } else {
    EACH(m, n)
      _mm256_mask_storeu_epi16((uint16_t*)t.out + (row + m) * t.out_ld + 16 * n, mask[n],
                               (__m256i)_mm512_cvtneps_pbh(acc[m][n]));
  }
#undef EACH
}

template <int N>
void tiles(const Piece* pieces, int count, int64_t rows, const Tile& t) {
  int64_t row = 0;
  if constexpr (N <= 2)
    for (; row + 12 <= rows; row += 12) tile<12, N>(pieces, count, row, t);
  for (; row + 6 <= rows; row += 6) tile<6, N>(pieces, count, row, t);
  for (; row + 2 <= rows; row += 2) tile<2, N>(pieces, count, row, t);
  if (row < rows) tile<1, N>(pieces, count, row, t);
}

void panel_tiles(int64_t registers, const Piece* pieces, int count, int64_t rows, const Tile& t) {
  switch (registers) {
    case 4: return tiles<4>(pieces, count, rows, t);
    case 3: return tiles<3>(pieces, count, rows, t);
    case 2: return tiles<2>(pieces, count, rows, t);
    default: return tiles<1>(pieces, count, rows, t);
  }
}

// Rows [row0, row1) of a term's A to rows of `ld` values, a multiple of 32, behind their depth zeros.
void pack_rows(const Term& t, int64_t row0, int64_t row1, uint16_t* to, int64_t ld) {
  alignas(64) uint32_t pairs[16 * 16];
  for (int64_t r = row0; r < row1; r += 16) {
    int64_t rows = row1 - r < 16 ? row1 - r : 16;
    if (t.a_columns == 1) {
      for (int64_t i = 0; i < rows; ++i) {
        __builtin_memcpy(to + (r + i) * ld, t.a + (r + i) * t.a_rows, (size_t)t.depth * 2);
        __builtin_memset(to + (r + i) * ld + t.depth, 0, (size_t)(ld - t.depth) * 2);
      }
      continue;
    }
    for (int64_t k = 0; k < ld; k += 32) {
      int64_t depth = t.depth - k < 32 ? t.depth - k : 32;
      if (depth < 32) __builtin_memset(pairs, 0, sizeof pairs);
      pairs_across(t.a + k * t.a_columns + r, t.a_columns, rows, depth, 16, pairs, 16);
      if (rows == 16) transpose16((const uint16_t*)pairs, 32, (uint32_t*)(to + r * ld + k), ld / 2);
      else
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < 16; ++j) __builtin_memcpy(to + (r + i) * ld + k + 2 * j, pairs + 16 * j + i, 4);
    }
  }
}

template <class P>
void pack_columns(P b, const Term& x, int64_t k, int64_t depth, int64_t column, int64_t columns, uint32_t* to) {
  int64_t wide = (columns + 15) / 16 * 16;
  if (x.b_rows == 1) pairs_along(b + column * x.b_columns + k, x.b_columns, columns, depth, wide, to, wide);
  else pairs_across(b + k * x.b_rows + column, x.b_rows, columns, depth, wide, to, wide);
}

// Sums [row][64] of a panel to out^T, where they may be added.
void turn(const float* sums, const Products& p, int64_t row0, int64_t rows, int64_t column, int64_t columns) {
  alignas(64) float square[16 * 16];
  __m512 scale = _mm512_set1_ps(p.scale);
  for (int64_t c = 0; c < columns; c += 16)
    for (int64_t r = 0; r < rows; r += 16) {
      transpose16((const uint16_t*)(sums + r * PRODUCT_COLUMNS + c), 2 * PRODUCT_COLUMNS, (uint32_t*)square, 16);
      __mmask16 mask = rows - r >= 16 ? 0xffff : (1u << (rows - r)) - 1;
      for (int64_t i = 0; i < 16 && c + i < columns; ++i) {
        __m512 v = _mm512_mul_ps(_mm512_load_ps(square + 16 * i), scale);
        int64_t at = (column + c + i) * p.out_ld + row0 + r;
        if (p.type == Real::F32) {
          float* to = (float*)p.out + at;
          _mm512_mask_storeu_ps(to, mask, p.grows ? _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, to)) : v);
        } else {
          _mm256_mask_storeu_epi16((uint16_t*)p.out + at, mask, (__m256i)_mm512_cvtneps_pbh(v));
        }
      }
    }
}

// Rows [row0, row1) of columns [column0, column1), of which the first begins a panel.
void products(const Products& p, int64_t row0, int64_t row1, int64_t column0, int64_t column1, void* scratch) {
  uint32_t* panel = (uint32_t*)scratch;
  float* kept = (float*)(panel + DEPTH / 2 * PRODUCT_COLUMNS);
  int64_t bytes = p.type == Real::F32 ? 4 : 2, rows = row1 - row0;
  int term = 0;
  int64_t at = 0;
  for (bool resume = false; term < p.count; resume = true) {
    struct {
      int term;
      int64_t at, depth;
    } parts[MAX_TERMS];
    int count = 0;
    for (int64_t used = 0; term < p.count && used < DEPTH;) {
      int64_t left = p.terms[term].depth - at, room = (DEPTH - used) / 32 * 32, depth = left < room ? left : room;
      if (depth == 0) break;
      parts[count++] = {term, at, depth};
      used += (depth + 1) / 2 * 2;
      at += depth;
      if (depth == left) {
        ++term;
        at = 0;
      }
    }
    float* sums = kept;
    for (int64_t column = column0; column < column1; column += PRODUCT_COLUMNS, sums += rows * PRODUCT_COLUMNS) {
      int64_t columns = p.columns - column < PRODUCT_COLUMNS ? p.columns - column : PRODUCT_COLUMNS;
      int n = (int)((columns + 15) / 16);
      Piece pieces[MAX_TERMS];
      uint32_t* b = panel;
      for (int i = 0; i < count; ++i) {
        const Term& x = p.terms[parts[i].term];
        int64_t k = parts[i].at, depth = parts[i].depth;
        if (x.codes)
          pack_columns(FourBits{x.codes, _mm512_loadu_ps(x.codes->table), 0}, x, k, depth, column, columns, b);
        else if (x.b_type == Real::F32) pack_columns((const float*)x.b, x, k, depth, column, columns, b);
        else pack_columns((const uint16_t*)x.b, x, k, depth, column, columns, b);
        pieces[i] = {x.a + row0 * x.a_rows + k, x.a_rows, b, (depth + 1) / 2};
        b += (depth + 1) / 2 * 16 * n;
      }
      Tile t{p.added ? p.added + row0 * p.added_ld + column : nullptr,
             p.added_ld,
             sums,
             resume,
             p.grows && !p.turned,
             term < p.count || p.turned,
             (uint8_t*)p.out + (row0 * p.out_ld + column) * bytes,
             p.out_ld,
             p.type,
             p.scale,
             columns};
      panel_tiles(n, pieces, count, rows, t);
      if (p.turned && term == p.count) turn(sums, p, row0, rows, column, columns);
    }
  }
}

constexpr ProductKernels PRODUCTS = {pack_rows, products};
