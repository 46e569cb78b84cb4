// Included by matmul.inl: what a low-rank adapter adds to a linear, W x + scale * B (A x), in float32.
// Every sum is formed in one order whatever is computed beside it, so a token's result does not depend on its neighbours.

// Four rows of A against M tokens; neither is read past its width.
template <class T, int M>
INLINE void shrink_rows(const LowRank& l, int64_t row, const float* x, int64_t ldx, float* t, int64_t ldt) {
  const uint8_t* p[4];
  F acc[4][M];
  UNROLL(4) for (int r = 0; r < 4; ++r) {
    p[r] = l.a + (row + r) * l.in * T::BYTES;
    UNROLL(4) for (int m = 0; m < M; ++m) acc[r][m] = fzero();
  }
  int64_t i = 0;
  for (; i + 16 <= l.in; i += 16) {
    F v[4];
    UNROLL(4) for (int r = 0; r < 4; ++r) v[r] = T::load(p[r] + i * T::BYTES);
    UNROLL(4) for (int m = 0; m < M; ++m) {
      F a = fload(x + m * ldx + i);
      UNROLL(4) for (int r = 0; r < 4; ++r) acc[r][m] = fma(v[r], a, acc[r][m]);
    }
  }
  if (i < l.in)
    UNROLL(4) for (int m = 0; m < M; ++m) {
      F a = load_tail<LoadF32>((const uint8_t*)(x + m * ldx + i), l.in - i);
      UNROLL(4) for (int r = 0; r < 4; ++r) acc[r][m] = fma(load_tail<T>(p[r] + i * T::BYTES, l.in - i), a, acc[r][m]);
    }
  UNROLL(4) for (int r = 0; r < 4; ++r)
    UNROLL(4) for (int m = 0; m < M; ++m) t[m * ldt + row + r] = l.scale * hsum(acc[r][m]);
}

template <class T>
void shrink_tokens(const LowRank& l, const float* x, int64_t ldx, int64_t count, int64_t row, float* t, int64_t ldt) {
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) shrink_rows<T, 4>(l, row, x + m * ldx, ldx, t + m * ldt, ldt);
  for (; m < count; ++m) shrink_rows<T, 1>(l, row, x + m * ldx, ldx, t + m * ldt, ldt);
}

// Rows row .. row+3 of scale * A x for `count` tokens, to t[token][row].
void shrink(const LowRank& l, const float* x, int64_t ldx, int64_t count, int64_t row, float* t, int64_t ldt) {
  if (l.a_format == Format::F32) shrink_tokens<LoadF32>(l, x, ldx, count, row, t, ldt);
  else if (l.a_format == Format::F16) shrink_tokens<LoadF16>(l, x, ldx, count, row, t, ldt);
  else shrink_tokens<LoadBF16>(l, x, ldx, count, row, t, ldt);
}

// One tile of B against M tokens, added to c. Two sums, so that one token does not wait for its own additions.
template <class T, int M>
INLINE void expand_tile(const LowRank& l, int64_t tile, const float* t, int64_t ldt, float* c) {
  const uint8_t* p = l.b + tile * l.rank * TILE * T::BYTES;
  F acc[2][M];
  UNROLL(2) for (int h = 0; h < 2; ++h)
    UNROLL(4) for (int m = 0; m < M; ++m) acc[h][m] = fzero();
  int64_t j = 0;
  for (; j + 2 <= l.rank; j += 2)
    UNROLL(2) for (int h = 0; h < 2; ++h) {
      F v = T::load(p + (j + h) * TILE * T::BYTES);
      UNROLL(4) for (int m = 0; m < M; ++m) acc[h][m] = fma(v, fset(t[m * ldt + j + h]), acc[h][m]);
    }
  if (j < l.rank) {
    F v = T::load(p + j * TILE * T::BYTES);
    UNROLL(4) for (int m = 0; m < M; ++m) acc[0][m] = fma(v, fset(t[m * ldt + j]), acc[0][m]);
  }
  UNROLL(4) for (int m = 0; m < M; ++m) fstore(c + m * TILE, add(fload(c + m * TILE), add(acc[0][m], acc[1][m])));
}

template <class T>
void expand_tokens(const LowRank& l, int64_t tile, const float* t, int64_t ldt, int count, float* c) {
  int m = 0;
  for (; m + 4 <= count; m += 4) expand_tile<T, 4>(l, tile, t + m * ldt, ldt, c + m * TILE);
  for (; m < count; ++m) expand_tile<T, 1>(l, tile, t + m * ldt, ldt, c + m * TILE);
}

// The tile of a linear's output for tokens m0 .. m0+count, as the product left it: c[token][16 rows].
__attribute__((noinline)) void expand(const Addend& d, int64_t tile, int64_t m0, int count, float* c) {
  for (int m = 0, run; m < count; m += run) {
    const LowRank* adapter = d.adapters[m0 + m];
    for (run = 1; m + run < count && d.adapters[m0 + m + run] == adapter;) ++run;
    if (!adapter || !adapter[d.index].rank) continue;
    const LowRank& l = adapter[d.index];
    const float* t = d.shrunk + (m0 + m) * d.ld;
    if (l.b_format == Format::F32) expand_tokens<LoadF32>(l, tile, t, d.ld, run, c + m * TILE);
    else if (l.b_format == Format::F16) expand_tokens<LoadF16>(l, tile, t, d.ld, run, c + m * TILE);
    else expand_tokens<LoadBF16>(l, tile, t, d.ld, run, c + m * TILE);
  }
}
