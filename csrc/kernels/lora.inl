// Included by matmul.inl: what a low-rank adapter adds to a linear, W x + scale * B (A x), in float32.
// Every sum is formed in one order whatever is computed beside it, so a token's result does not depend on its
// neighbours.

// Four rows of A against M tokens; neither is read past its width.
template <class T, int M>
INLINE void shrink_rows(const LowRank& l, int64_t row, const float* const* x, float* const* t) {
  const uint8_t* p[4];
  F acc[4][M];
  UNROLLED(4, r, 4) {
    p[r] = l.a + (row + r) * l.in * T::BYTES;
    UNROLLED(4, m, M) acc[r][m] = fzero();
  }
  int64_t i = 0;
  for (; i + 16 <= l.in; i += 16) {
    F v[4];
    UNROLLED(4, r, 4) v[r] = T::load(p[r] + i * T::BYTES);
    UNROLLED(4, m, M) {
      F a = fload(x[m] + i);
      UNROLLED(4, r, 4) acc[r][m] = fma(v[r], a, acc[r][m]);
    }
  }
  if (i < l.in)
    UNROLLED(4, m, M) {
      F a = load_tail<LoadF32>((const uint8_t*)(x[m] + i), l.in - i);
      UNROLLED(4, r, 4) acc[r][m] = fma(load_tail<T>(p[r] + i * T::BYTES, l.in - i), a, acc[r][m]);
    }
  UNROLLED(4, r, 4)
    UNROLLED(4, m, M) t[m][row + r] = l.scale * hsum(acc[r][m]);
}

template <class T>
void shrink_tokens(const LowRank& l, const float* x, int64_t ldx, const int32_t* tokens, int64_t count, int64_t row,
                   float* t, int64_t ldt) {
  for (int64_t k = 0; k < count; k += 4) {
    int m = (int)(count - k < 4 ? count - k : 4);
    const float* from[4];
    float* to[4];
    for (int i = 0; i < m; ++i) {
      from[i] = x + tokens[k + i] * ldx;
      to[i] = t + tokens[k + i] * ldt;
    }
    if (m == 4) shrink_rows<T, 4>(l, row, from, to);
    else
      for (int i = 0; i < m; ++i) shrink_rows<T, 1>(l, row, from + i, to + i);
  }
}

// Rows row .. row+3 of scale * A x for `count` tokens, to t[token][row].
void shrink(const LowRank& l, const float* x, int64_t ldx, const int32_t* tokens, int64_t count, int64_t row, float* t,
            int64_t ldt) {
  if (l.a_format == Format::F32) shrink_tokens<LoadF32>(l, x, ldx, tokens, count, row, t, ldt);
  else if (l.a_format == Format::F16) shrink_tokens<LoadF16>(l, x, ldx, tokens, count, row, t, ldt);
  else shrink_tokens<LoadBF16>(l, x, ldx, tokens, count, row, t, ldt);
}

// One tile of B against M tokens, added to c. Two sums, so that one token does not wait for its own additions.
template <class T, int M>
INLINE void expand_tile(const uint8_t* p, int64_t rank, const float* const* t, float* const* c) {
  F acc[2][M];
  UNROLLED(2, h, 2)
    UNROLLED(4, m, M) acc[h][m] = fzero();
  int64_t j = 0;
  for (; j + 2 <= rank; j += 2)
    UNROLLED(2, h, 2) {
      F v = T::load(p + (j + h) * TILE * T::BYTES);
      UNROLLED(4, m, M) acc[h][m] = fma(v, fset(t[m][j + h]), acc[h][m]);
    }
  if (j < rank) {
    F v = T::load(p + j * TILE * T::BYTES);
    UNROLLED(4, m, M) acc[0][m] = fma(v, fset(t[m][j]), acc[0][m]);
  }
  UNROLLED(4, m, M) fstore(c[m], add(fload(c[m]), add(acc[0][m], acc[1][m])));
}

template <class T>
void expand_tokens(const uint8_t* p, int64_t rank, const float* const* t, float* const* c, int count) {
  int m = 0;
  for (; m + 4 <= count; m += 4) expand_tile<T, 4>(p, rank, t + m, c + m);
  for (; m + 2 <= count; m += 2) expand_tile<T, 2>(p, rank, t + m, c + m);
  if (m < count) expand_tile<T, 1>(p, rank, t + m, c + m);
}

INLINE const uint8_t* expansion(const LowRank& l, int64_t tile) {
  return l.b + tile * l.rank * TILE * (l.b_format == Format::F32 ? 4 : 2);
}

// The tile of a linear's output for tokens m0 .. m0+count, as the product left it: c[token][16 rows].
__attribute__((noinline)) void expand(const Addend& d, int64_t tile, int64_t m0, int count, float* c) {
  unsigned left = (1u << count) - 1;
  for (int m = 0; m < count; ++m) {
    const LowRank* adapter = d.adapters[m0 + m];
    if (!(left >> m & 1) || !adapter || !adapter[d.index].rank) continue;
    const float* t[MAX_MR];
    float* out[MAX_MR];
    int n = 0;
    for (int i = m; i < count; ++i) {
      if (d.adapters[m0 + i] != adapter) continue;
      left &= ~(1u << i);
      t[n] = d.shrunk + (m0 + i) * d.ld;
      out[n++] = c + i * TILE;
    }
    const LowRank& l = adapter[d.index];
    const uint8_t* p = expansion(l, tile);
    if (l.b_format == Format::F32) expand_tokens<LoadF32>(p, l.rank, t, out, n);
    else if (l.b_format == Format::F16) expand_tokens<LoadF16>(p, l.rank, t, out, n);
    else expand_tokens<LoadBF16>(p, l.rank, t, out, n);
  }
}

// Asks for what expand is going to read before the product that it waits for: a tile of B is too short for the
// processor to see it coming.
INLINE void fetch_expansion(const Addend& d, int64_t tile, int64_t m0, int count) {
  const LowRank* last = nullptr;
  for (int m = 0; m < count; ++m) {
    const LowRank* adapter = d.adapters[m0 + m];
    if (!adapter || adapter == last) continue;
    last = adapter;
    const LowRank& l = adapter[d.index];
    const uint8_t *p = expansion(l, tile), *end = expansion(l, tile + 1);
    for (; p < end; p += 64) __builtin_prefetch(p);
  }
}
