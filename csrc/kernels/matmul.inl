// Included once per instruction set, inside an anonymous namespace: every matrix product.
// The result of one tile and one block of tokens is a small array c[token][16 rows]; the epilogue takes it from there.

struct Block {  // the activations of one block of at most 8 tokens
  int count;
  const int8_t* q;
  const float *scale, *sum;
  const int32_t *negsum, *negsum16;
  const float* f32;
  const uint16_t* bf16;
  int64_t ld;
};

INLINE F scaled(const uint8_t* super, const uint8_t* sub_) { return mul(load_f16(super), load_u8(sub_)); }

struct W4 {
  static constexpr int64_t BYTES = 576, HEAD = 64;
  static constexpr int BITS = 4, SPAN = 32;
  static constexpr bool MINIMUM = false;
  INLINE F scale(const uint8_t* p, int h) { return load_f16(p + 32 * h); }
  INLINE F minimum(const uint8_t* p, int h) { return mul(load_f16(p + 32 * h), fset(-8)); }
};
struct W4M {
  static constexpr int64_t BYTES = 640, HEAD = 128;
  static constexpr int BITS = 4, SPAN = 32;
  static constexpr bool MINIMUM = true;
  INLINE F scale(const uint8_t* p, int h) { return load_f16(p + 32 * h); }
  INLINE F minimum(const uint8_t* p, int h) { return load_f16(p + 64 + 32 * h); }
};
struct W4K {
  static constexpr int64_t BYTES = 640, HEAD = 128;
  static constexpr int BITS = 4, SPAN = 32;
  static constexpr bool MINIMUM = true;
  INLINE F scale(const uint8_t* p, int h) { return scaled(p, p + 64 + 32 * h); }
  INLINE F minimum(const uint8_t* p, int h) { return sub(fzero(), scaled(p + 32, p + 80 + 32 * h)); }
};
struct W8 {
  static constexpr int64_t BYTES = 1088, HEAD = 64;
  static constexpr int BITS = 8, SPAN = 32;
  static constexpr bool MINIMUM = false;
  INLINE F scale(const uint8_t* p, int h) { return load_f16(p + 32 * h); }
  INLINE F minimum(const uint8_t*, int) { return fzero(); }
};

// A span is computed in parts whose integer sums fit into registers (SUMS of 16 rows, by instruction set): all NR tiles
// against all MR tokens where they do, else one tile against PART tokens after the other. Integer sums are exact: the
// parts change no bit.
// What parts have in common is read and unpacked again by each: kept, it would push the sums out of their registers.
INLINE void read_again() { __asm__ volatile("" ::: "memory"); }
template <int PART, int NR>  // nor are the lines of later steps read before their time
constexpr bool CROWDED = SUMS < MAX_MR && PART * NR >= SUMS - 1;
constexpr int part_of(int mr) { return mr <= SUMS ? mr : mr % SUMS == 0 ? SUMS : SUMS - 1; }

// One span of 32 columns of NR tiles against the tokens m0 to m0 + PART of MR, added to acc.
template <class W, int MR, int NR, int PART>
INLINE void span4(const uint8_t* const* p, int h, const int8_t* a, const Block& x, int64_t g, int m0, F (*acc)[MR]) {
  // Few tokens: low and high nibbles in two chains, so that one does not wait for the other's latency, and the high
  // ones stay 16 times too large until their sum is shifted (where bytes are unsigned), which saves a shift a line.
  constexpr int CHAINS = PART * NR <= 4 && 2 * PART * NR <= SUMS ? 2 : 1, AHEAD = MR == 1 ? PREFETCH : PREFETCH_MANY;
  constexpr bool LARGE = HIGH_IN_PLACE && CHAINS == 2;
  D4 d[CHAINS][NR][PART];
  I start[PART];
  UNROLLED(8, m, PART) {
    start[m] = W::MINIMUM ? izero() : iload1(x.negsum + g * MR + m0 + m);  // -128 sums: 8 of them 16 times too large
    if (!LARGE && !W::MINIMUM) start[m] = sixteenth(start[m]);
  }
  UNROLLED(8, n, NR)
    UNROLLED(8, m, PART) {
      d[0][n][m] = d4_begin(CHAINS == 1 ? start[m] : izero());
      if (CHAINS == 2) d[CHAINS - 1][n][m] = d4_begin(start[m]);
    }
  UNROLLED(4, j, 4) {
    if (CROWDED<PART, NR>) read_again();
    B lo[NR], hi[NR];
    UNROLLED(8, n, NR) {
      const uint8_t* line = p[n] + W::HEAD + 256 * h + 64 * j;
      B v = bload(line);
      if (AHEAD && m0 == 0) prefetch(line + AHEAD);
      lo[n] = low4(v);
      hi[n] = LARGE ? high4_large(v) : high4(v);
    }
    UNROLLED(8, m, PART)
      UNROLLED(8, n, NR) d[0][n][m] = d4_dot(d[0][n][m], lo[n], a + (j * MR + m0 + m) * 4);
    UNROLLED(8, m, PART)
      UNROLLED(8, n, NR) d[CHAINS - 1][n][m] = d4_dot(d[CHAINS - 1][n][m], hi[n], a + ((4 + j) * MR + m0 + m) * 4);
  }
  UNROLLED(8, n, NR) {
    F s = W::scale(p[n], h), lowest = W::MINIMUM ? W::minimum(p[n], h) : fzero();
    UNROLLED(8, m, PART) {
      I whole = d4_end(d[CHAINS - 1][n][m], start[m]);
      if (LARGE) whole = sixteenth(whole);
      if (CHAINS == 2) whole = iadd(whole, d4_end(d[0][n][m], izero()));
      F t = mul(cvt(whole), s), &sum = acc[n][m0 + m];
      sum = fma(t, fset(x.scale[g * MR + m0 + m]), sum);
      if (W::MINIMUM) sum = fma(lowest, fset(x.sum[g * MR + m0 + m]), sum);
    }
  }
}

template <class W, int MR, int NR, int PART>
INLINE void span8(const uint8_t* const* p, int h, const int8_t* a, const Block& x, int64_t g, int m0, F (*acc)[MR]) {
  constexpr int LINES = W::SPAN / 4;
  const int32_t* negsum = W::SPAN == 32 ? x.negsum : x.negsum16;
  constexpr int CHAINS = PART * NR <= 4 && 2 * PART * NR <= SUMS && LINES >= 8 ? 2 : 1;
  constexpr int AHEAD = MR == 1 ? PREFETCH : PREFETCH_MANY;
  D8 d[CHAINS][NR][PART];
  UNROLLED(8, n, NR)
    UNROLLED(8, m, PART) {
      d[0][n][m] = d8_begin(iload1(negsum + g * MR + m0 + m));
      if (CHAINS == 2) d[CHAINS - 1][n][m] = d8_begin(izero());
    }
  UNROLLED(8, j, LINES) {
    if (CROWDED<PART, NR>) read_again();
    B w[NR];
    UNROLLED(8, n, NR) {
      const uint8_t* line = p[n] + W::HEAD + 64 * LINES * h + 64 * j;
      w[n] = bload(line);
      if (AHEAD && m0 == 0) prefetch(line + AHEAD);
    }
    UNROLLED(8, m, PART)
      UNROLLED(8, n, NR) d[j % CHAINS][n][m] = d8_dot(d[j % CHAINS][n][m], w[n], a + (j * MR + m0 + m) * 4);
  }
  int64_t g32 = g * W::SPAN / 32;
  UNROLLED(8, n, NR) {
    F s = W::scale(p[n], h), lowest = W::MINIMUM ? W::minimum(p[n], h) : fzero();
    UNROLLED(8, m, PART) {
      I whole = d8_end(d[0][n][m]);
      if (CHAINS == 2) whole = iadd(whole, d8_end(d[CHAINS - 1][n][m]));
      F t = mul(cvt(whole), s), &sum = acc[n][m0 + m];
      sum = fma(t, fset(x.scale[g32 * MR + m0 + m]), sum);
      if (W::MINIMUM) sum = fma(lowest, fset(x.sum[g32 * MR + m0 + m]), sum);
    }
  }
}

template <class W, int MR, int NR, int PART>
INLINE void packed_span(const uint8_t* const* p, int h, const int8_t* a, const Block& x, int64_t g, int m0,
                        F (*acc)[MR]) {
  if (W::BITS == 4) span4<W, MR, NR, PART>(p, h, a, x, g, m0, acc);
  else span8<W, MR, NR, PART>(p, h, a, x, g, m0, acc);
}

template <class W, int MR, int NR>
__attribute__((noinline)) void packed_tile(const uint8_t* const* w, int64_t blocks, const Block& x, float* c) {
  F acc[NR][MR];
  const uint8_t* p[NR];
  constexpr int SPANS = BLOCK_K / W::SPAN, AHEAD = MR == 1 ? PREFETCH : PREFETCH_MANY;
  UNROLLED(8, n, NR) {
    p[n] = w[n];
    UNROLLED(8, m, MR) acc[n][m] = fzero();
  }
  const int8_t* a = x.q;
  for (int64_t b = 0; b < blocks; ++b) {
    UNROLLED(8, n, NR)
      if (AHEAD)
        for (int i = 0; i < W::HEAD; i += 64) prefetch(p[n] + AHEAD + i);
    for (int h = 0; h < SPANS; ++h, a += W::SPAN * MR) {
      if constexpr (MR * NR <= SUMS) {
        packed_span<W, MR, NR, MR>(p, h, a, x, b * SPANS + h, 0, acc);
      } else {
        constexpr int PART = part_of(MR);
        UNROLLED(2, n, NR)
          UNROLLED(4, i, MR / PART) {
            read_again();
            packed_span<W, MR, 1, PART>(p + n, h, a, x, b * SPANS + h, i * PART, acc + n);
          }
      }
    }
    UNROLLED(8, n, NR) p[n] += W::BYTES;
  }
  UNROLLED(8, n, NR)
    UNROLLED(8, m, MR) fstore(c + (n * MAX_MR + m) * TILE, acc[n][m]);
}

struct LoadF32 {
  static constexpr int BYTES = 4;
  INLINE F load(const uint8_t* p) { return fload((const float*)p); }
};
struct LoadF16 {
  static constexpr int BYTES = 2;
  INLINE F load(const uint8_t* p) { return load_f16(p); }
};
struct LoadBF16 {
  static constexpr int BYTES = 2;
  INLINE F load(const uint8_t* p) { return load_bf16(p); }
};

template <class T>
INLINE F load_tail(const uint8_t* p, int64_t count) {  // the last `count` < 16 values, zeros after
  uint8_t t[16 * T::BYTES] = {};
  __builtin_memcpy(t, p, count * T::BYTES);
  return T::load(t);
}

// R rows against M tokens in float32; the activations are zero past K, the weights are never read past it.
template <class T, int R, int M>
INLINE void rows_f32(const uint8_t* w, int64_t stride, int64_t k, const float* x, int64_t ld, float* c) {
  constexpr int U = R * M >= 8 ? 1 : 4;  // independent sums, so that one row does not wait for its own additions
  F acc[U][R][M];
  UNROLLED(8, u, U)
    UNROLLED(8, r, R)
      UNROLLED(8, m, M) acc[u][r][m] = fzero();
  int64_t i = 0;
  for (; i + 16 * U <= k; i += 16 * U)
    UNROLLED(8, u, U) {
      F v[R];
      UNROLLED(8, r, R) {
        const uint8_t* at = w + r * stride + (i + 16 * u) * T::BYTES;
        v[r] = T::load(at);
        if (PREFETCH && (T::BYTES == 4 || u % 2 == 0)) prefetch(at + PREFETCH);
      }
      UNROLLED(8, m, M) {
        F a = fload(x + m * ld + i + 16 * u);
        UNROLLED(8, r, R) acc[u][r][m] = fma(v[r], a, acc[u][r][m]);
      }
    }
  for (; i < k; i += 16)
    UNROLLED(8, r, R) {
      const uint8_t* at = w + r * stride + i * T::BYTES;
      F v = k - i >= 16 ? T::load(at) : load_tail<T>(at, k - i);
      UNROLLED(8, m, M) acc[0][r][m] = fma(v, fload(x + m * ld + i), acc[0][r][m]);
    }
  UNROLLED(8, r, R)
    UNROLLED(8, m, M) {
      F s = acc[0][r][m];
      for (int u = 1; u < U; ++u) s = add(s, acc[u][r][m]);
      c[m * TILE + r] = hsum(s);
    }
}

template <int R, int M>
INLINE void rows_bf16(const uint8_t* w, int64_t stride, int64_t k, const uint16_t* x, int64_t ld, float* c) {
  constexpr int U = R * M >= 8 ? 1 : 4;
  F acc[U][R][M];
  UNROLLED(8, u, U)
    UNROLLED(8, r, R)
      UNROLLED(8, m, M) acc[u][r][m] = fzero();
  int64_t i = 0;
  for (; i + 32 * U <= k; i += 32 * U)
    UNROLLED(8, u, U) {
      H a[M];
      UNROLLED(8, m, M) a[m] = hload(x + m * ld + i + 32 * u);
      UNROLLED(8, r, R) {
        const uint16_t* at = (const uint16_t*)(w + r * stride) + i + 32 * u;
        H v = hload(at);
        if (PREFETCH) prefetch((const uint8_t*)at + PREFETCH);
        UNROLLED(8, m, M) acc[u][r][m] = dot_bf16(acc[u][r][m], v, a[m]);
      }
    }
  for (; i < k; i += 32)
    UNROLLED(8, r, R) {
      uint16_t t[32] = {};
      __builtin_memcpy(t, w + r * stride + i * 2, (k - i < 32 ? k - i : 32) * 2);
      UNROLLED(8, m, M) acc[0][r][m] = dot_bf16(acc[0][r][m], hload(t), hload(x + m * ld + i));
    }
  UNROLLED(8, r, R)
    UNROLLED(8, m, M) {
      F s = acc[0][r][m];
      for (int u = 1; u < U; ++u) s = add(s, acc[u][r][m]);
      c[m * TILE + r] = hsum(s);
    }
}

template <class T, bool FAST, int R, int M>
INLINE void rows_any(const Matrix& w, int64_t row, const Block& x, int m, float* c) {
  const uint8_t* p = w.data + row * w.stride;
  if constexpr (FAST) rows_bf16<R, M>(p, w.stride, w.cols, x.bf16 + m * x.ld, x.ld, c + m * TILE);
  else rows_f32<T, R, M>(p, w.stride, w.cols, x.f32 + m * x.ld, x.ld, c + m * TILE);
}

// The tile of 16 rows (fewer at the end) against the block's tokens, 4 x 4 at a time.
template <class T, bool FAST>
__attribute__((noinline)) void rows_tile(const Matrix& w, int64_t tile, const Block& x, float* c) {
  int64_t row0 = tile * TILE;
  int rows = (int)(w.rows - row0 < TILE ? w.rows - row0 : TILE);
  int m = 0;
  for (; m + 4 <= x.count; m += 4) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) rows_any<T, FAST, 4, 4>(w, row0 + r, x, m, c + r);
    for (; r < rows; ++r) rows_any<T, FAST, 1, 4>(w, row0 + r, x, m, c + r);
  }
  for (; m + 2 <= x.count; m += 2) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) rows_any<T, FAST, 4, 2>(w, row0 + r, x, m, c + r);
    for (; r < rows; ++r) rows_any<T, FAST, 1, 2>(w, row0 + r, x, m, c + r);
  }
  for (; m < x.count; ++m)
    for (int r = 0; r < rows; ++r) rows_any<T, FAST, 1, 1>(w, row0 + r, x, m, c + r);
}

template <class W, int NR>
void packed_tiles(const uint8_t* const* w, int64_t blocks, const Block& x, int mr, float* c) {
  switch (mr) {
    case 2: return packed_tile<W, 2, NR>(w, blocks, x, c);
    case 3: return packed_tile<W, 3, NR>(w, blocks, x, c);
    case 4: return packed_tile<W, 4, NR>(w, blocks, x, c);
    case 6: return packed_tile<W, 6, NR>(w, blocks, x, c);
    default: return packed_tile<W, 8, NR>(w, blocks, x, c);
  }
}

template <class W>
void packed(const uint8_t* const* w, int nr, int64_t blocks, const Block& x, int mr, float* c) {
  if (mr == 1 || mr == 3)
    for (int n = 0; n < nr; ++n) {
      float* cn = c + n * MAX_MR * TILE;
      if (mr == 1) packed_tile<W, 1, 1>(w + n, blocks, x, cn);
      else packed_tile<W, 3, 1>(w + n, blocks, x, cn);
    }
  else if (nr == 1) packed_tiles<W, 1>(w, blocks, x, mr, c);
  else packed_tiles<W, 2>(w, blocks, x, mr, c);
}

void add_limbs(int nr, int count, float* c) {  // the three rows of every token into one
  for (int n = 0; n < nr; ++n, c += MAX_MR * TILE)
    for (int m = 0; m < count; ++m) {
      const float* p = c + m * LIMBS * TILE;
      fstore(c + m * TILE, add(fload(p), add(fload(p + TILE), fload(p + 2 * TILE))));
    }
}

#include "kernels/quant_formats.inl"

// Two tiles (of one matrix, or of gate and up) against one block of tokens: c[2][8][16].
void tiles(const Matrix* const* w, const int64_t* tile, int nr, const Block& x, int mr, bool exact, float* c) {
  Format f = w[0]->format;
  if (row_major(f)) {
    for (int n = 0; n < nr; ++n) {
      float* cn = c + n * MAX_MR * TILE;
      if (f == Format::F32) rows_tile<LoadF32, false>(*w[n], tile[n], x, cn);
      else if (f == Format::F16) rows_tile<LoadF16, false>(*w[n], tile[n], x, cn);
      else if (exact) rows_tile<LoadBF16, false>(*w[n], tile[n], x, cn);
      else rows_tile<LoadBF16, true>(*w[n], tile[n], x, cn);
    }
    return;
  }
  const uint8_t* p[2];
  for (int n = 0; n < nr; ++n) p[n] = w[n]->data + tile[n] * w[n]->stride;
  auto visit = [&](auto format) {
    using W = decltype(format);
    stream_tiles<W>(p, nr, plan_of<W>(*w[0]), x, mr, exact, c);
  };
  if (with_stream(f, visit)) return;
  int64_t blocks = padded(w[0]->cols) / BLOCK_K;
  switch (f) {
    case Format::W4: packed<W4>(p, nr, blocks, x, mr, c); break;
    case Format::W4M: packed<W4M>(p, nr, blocks, x, mr, c); break;
    case Format::W4K: packed<W4K>(p, nr, blocks, x, mr, c); break;
    case Format::W8: packed<W8>(p, nr, blocks, x, mr, c); break;
    default: break;
  }
  if (exact) add_limbs(nr, x.count, c);
}

#include "kernels/lora.inl"

INLINE F with_bias(F v, const Matrix* w, int64_t row) {
  if (!w->bias) return v;
  if (row + TILE <= w->rows) return add(v, fload(w->bias + row));
  float t[TILE] = {};
  for (int64_t i = 0; row + i < w->rows; ++i) t[i] = w->bias[row + i];
  return add(v, fload(t));
}

// Bias and epilogue of one tile. Where gate (c) and up (c1) come together both are here; with c1 null and SWIGLU, c is
// up's and the gate is in out already.
void finish(const Job& job, const Matrix* w, int64_t tile, int64_t m0, int count, const float* c, const float* c1) {
  int64_t row = tile * TILE, rows = w->rows - row < TILE ? w->rows - row : TILE;
  for (int m = 0; m < count; ++m) {
    float *out = job.out + (m0 + m) * job.ldo + row, t[TILE] = {};
    F v = with_bias(fload(c + m * TILE), w, row);
    if (rows < TILE) __builtin_memcpy(t, out, rows * 4);
    F old = job.epilogue == Epilogue::STORE || c1 ? v : fload(rows < TILE ? t : out);
    if (job.epilogue == Epilogue::SWIGLU)
      v = c1 ? mul(silu(v), with_bias(fload(c1 + m * TILE), job.w1, row)) : mul(silu(old), v);
    if (job.epilogue == Epilogue::ADD) v = add(old, v);
    if (rows == TILE) {
      fstore(out, v);
      continue;
    }
    fstore(t, v);
    __builtin_memcpy(out, t, rows * 4);
  }
}

Block block_of(const Acts& x, int64_t m0, int form) {
  int64_t kp = padded(x.k), row = m0 * (form == FORM_INT24 ? LIMBS : 1), group = row * (kp / GROUP);
  Block b;
  b.count = (int)(x.m - m0 < block_tokens(form) ? x.m - m0 : block_tokens(form));
  b.q = x.q + row * kp;
  b.scale = x.scale + group;
  b.sum = x.sum + group;
  b.negsum = x.negsum + group;
  b.negsum16 = x.negsum16 + group * 2;
  b.f32 = x.f32 + m0 * kp;
  b.bf16 = x.bf16 + m0 * kp;
  b.ld = kp;
  return b;
}

// Tiles of one matrix, two at a time in the order of memory, against all tokens.
void product(const Job& job, const Matrix* w, const Acts& x, int64_t tile0, int64_t tile1, bool exact) {
  alignas(64) float c[2 * MAX_MR * TILE] = {};
  const Matrix* two[2] = {w, w};
  int form = form_of(w->format, exact), step = block_tokens(form);
  for (int64_t t = tile0; t < tile1; t += 2) {
    int64_t at[2] = {t, t + 1};
    int nr = tile1 - t < 2 ? 1 : 2;
    for (int64_t m0 = 0; m0 < x.m; m0 += step) {
      Block b = block_of(x, m0, form);
      for (int n = 0; n < nr && job.low; ++n) fetch_expansion(*job.low, t + n, m0, b.count);
      tiles(two, at, nr, b, block_mr(x.m, m0 / step, form), exact, c);
      for (int n = 0; n < nr; ++n) {
        if (job.low) expand(*job.low, t + n, m0, b.count, c + n * MAX_MR * TILE);
        finish(job, w, t + n, m0, b.count, c + n * MAX_MR * TILE, nullptr);
      }
    }
  }
}

bool one_kernel(const Matrix& a, const Matrix& b) {  // whether two tiles of a and b can go through one call
  return a.format == b.format && a.group == b.group && a.codebook == b.codebook && a.order == b.order;
}

void matmul(const Job& job, const Acts& x, int64_t tile0, int64_t tile1, bool exact) {
  if (job.epilogue != Epilogue::SWIGLU) return product(job, job.w, x, tile0, tile1, exact);
  int form = form_of(job.w->format, exact), step = block_tokens(form);
  if (x.m <= step || !one_kernel(*job.w, *job.w1)) {
    // One after the other: for few tokens weights come from memory, and turns would break its stream.
    Job gate = job, up = job;
    gate.epilogue = Epilogue::STORE;
    up.low = job.low1;
    product(gate, job.w, x, tile0, tile1, exact);
    return product(up, job.w1, job.x1 ? *job.x1 : x, tile0, tile1, exact);
  }
  alignas(64) float c[2 * MAX_MR * TILE] = {};
  const Matrix* two[2] = {job.w, job.w1};
  for (int64_t t = tile0; t < tile1; ++t) {
    int64_t at[2] = {t, t};
    for (int64_t m0 = 0; m0 < x.m; m0 += step) {
      Block b = block_of(x, m0, form);
      if (job.low) fetch_expansion(*job.low, t, m0, b.count);
      if (job.low1) fetch_expansion(*job.low1, t, m0, b.count);
      tiles(two, at, 2, b, block_mr(x.m, m0 / step, form), exact, c);
      if (job.low) expand(*job.low, t, m0, b.count, c);
      if (job.low1) expand(*job.low1, t, m0, b.count, c + MAX_MR * TILE);
      finish(job, job.w, t, m0, b.count, c, c + MAX_MR * TILE);
    }
  }
}

template <class W>
void packed_row(const uint8_t* p, int lane, int64_t cols, float* out) {
  float t[TILE], s = 0, lowest = 0;
  for (int64_t k = 0; k < cols; ++k) {
    const uint8_t* block = p + k / BLOCK_K * W::BYTES;
    int in = (int)(k % BLOCK_K), h = in / W::SPAN, at = in % W::SPAN;
    if (at == 0) {
      fstore(t, W::scale(block, h));
      s = t[lane];
      fstore(t, W::minimum(block, h));
      lowest = t[lane];
    }
    if (W::BITS == 4) {
      uint8_t v = block[W::HEAD + 256 * h + 64 * (at % 16 / 4) + 4 * lane + at % 4];
      out[k] = __builtin_fmaf((float)(at < 16 ? v & 15 : v >> 4), s, lowest);
    } else {
      uint8_t v = block[W::HEAD + W::SPAN * 16 * h + 64 * (at / 4) + 4 * lane + at % 4];
      out[k] = __builtin_fmaf((float)((int)v - 128), s, lowest);
    }
  }
}

void dequantize_row(const Matrix& w, int64_t row, float* out) {
  const uint8_t* p = w.data + (row_major(w.format) ? row : row / TILE) * w.stride;
  int lane = (int)(row % TILE);
  int64_t k = 0;
  switch (w.format) {
    case Format::F32: __builtin_memcpy(out, p, w.cols * 4); return;
    case Format::F16:
      for (; k + 16 <= w.cols; k += 16) fstore(out + k, load_f16(p + 2 * k));
      if (k < w.cols) {
        float t[16];
        fstore(t, load_tail<LoadF16>(p + 2 * k, w.cols - k));
        __builtin_memcpy(out + k, t, (w.cols - k) * 4);
      }
      return;
    case Format::BF16:
      for (; k + 16 <= w.cols; k += 16) fstore(out + k, load_bf16(p + 2 * k));
      if (k < w.cols) {
        float t[16];
        fstore(t, load_tail<LoadBF16>(p + 2 * k, w.cols - k));
        __builtin_memcpy(out + k, t, (w.cols - k) * 4);
      }
      return;
    case Format::W4: return packed_row<W4>(p, lane, w.cols, out);
    case Format::W4M: return packed_row<W4M>(p, lane, w.cols, out);
    case Format::W4K: return packed_row<W4K>(p, lane, w.cols, out);
    case Format::W8: return packed_row<W8>(p, lane, w.cols, out);
    default: break;
  }
  with_stream(w.format, [&](auto format) { stream_row<decltype(format)>(w, p, lane, out); });
}
