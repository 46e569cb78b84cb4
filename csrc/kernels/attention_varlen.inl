// Included by training.inl where the processor multiplies bfloat16: attention of training over bfloat16 tensors, its
// five products by the tiles of gemm_bf16.inl. Rotated queries and keys, weights and their gradients are rounded to
// bfloat16 before a product, as flash attention does on a GPU; softmax and all sums are float32.

constexpr int ASKED = TEXT_ASKED;  // queries of one pass, even

struct Packed {  // B in panels of 64 columns
  uint32_t* at;
  int64_t columns, pairs;

  static int64_t size(int64_t columns, int64_t pairs) { return sixteens(columns) * pairs; }
  const uint32_t* panel(int64_t c) const { return at + c * pairs; }

  // token t is a column: from[t * stride + i], i < 2 * pairs
  void along(const uint16_t* from, int64_t stride) const {
    for (int64_t c = 0; c < columns; c += 64) {
      int64_t here = columns - c < 64 ? columns - c : 64, wide = sixteens(here);
      pairs_along(from + c * stride, stride, here, 2 * pairs, wide, at + c * pairs, wide);
    }
  }
  // token t is a row: from[t * stride + column], t < depth
  void across(const uint16_t* from, int64_t stride, int64_t depth) const {
    for (int64_t c = 0; c < columns; c += 64) {
      int64_t here = columns - c < 64 ? columns - c : 64, wide = sixteens(here);
      pairs_across(from + c, stride, here, depth, wide, at + c * pairs, wide);
    }
  }
};

// a (rows, 2 * pairs) times the first `columns` columns of b, each panel to its own tile
template <class To>
INLINE void times(const uint16_t* a, int64_t stride, int64_t rows, int64_t pairs, const Packed& b, int64_t columns,
                  const To& to) {
  for (int64_t c = 0; c < columns; c += 64) {
    int64_t here = b.columns - c < 64 ? b.columns - c : 64;
    Piece piece{a, stride, b.panel(c), pairs};
    panel_tiles((here + 15) / 16, &piece, 1, rows, to(c, here));
  }
}

INLINE Tile to_floats(float* out, int64_t ld, int64_t columns, float scale) {
  return {nullptr, 0, nullptr, false, false, false, out, ld, Real::F32, scale, sixteens(columns)};
}

// Rows of one head, rotated, in bfloat16; `wide` floats of `row` for the purpose.
INLINE void rotate(const Heads<Half>& from, int64_t begin, int64_t end, const float* cos, const float* sin, float* row,
                   int64_t wide, uint16_t* to) {
  for (int64_t t = begin; t < end; ++t, to += wide) {
    from.read(t, cos + t * from.width, sin + t * from.width, row);
    for (int64_t i = 0; i < wide; i += 16) store_bf16(to + i, fload(row + i));
  }
}

void texts_forward_bf16(const Texts& x, const TextsOut& to, int64_t first, int64_t last, int64_t kv_head,
                        float* scratch) {
  int64_t n = last - first, e = x.width, ep = sixteens(e), wide = sixteens(n), group = x.heads / x.kv_heads;
  Bump memory(scratch);
  float* row = memory.take<float>(ep);
  __builtin_memset(row, 0, (size_t)ep * 4);
  uint16_t *k = memory.take<uint16_t>(n * ep), *q = memory.take<uint16_t>(ASKED * ep),
           *p = memory.take<uint16_t>(ASKED * wide);
  float* s = memory.take<float>(ASKED * wide);
  Packed keys{memory.take<uint32_t>(Packed::size(n, e / 2)), n, e / 2},
      values{memory.take<uint32_t>(Packed::size(e, (n + 1) / 2)), e, (n + 1) / 2};
  const float *cos = x.cos + first * e, *sin = x.sin + first * e;
  rotate(Heads<Half>(x.k, first, kv_head, x.kv_heads, e), 0, n, cos, sin, row, ep, k);
  keys.along(k, ep);
  values.across(Heads<Half>(x.v, first, kv_head, x.kv_heads, e).at, x.kv_heads * e, n);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    Heads<Half> queries(x.q, first, h, x.heads, e), outs(to.out, first, h, x.heads, e);
    for (int64_t t0 = 0; t0 < n; t0 += ASKED) {
      int64_t rows = n - t0 < ASKED ? n - t0 : ASKED, most = t0 + rows, seen = sixteens(most);
      rotate(queries, t0, most, cos, sin, row, ep, q);
      times(q, ep, rows, e / 2, keys, most,
            [&](int64_t c, int64_t here) { return to_floats(s + c, wide, here, x.scale); });
      for (int64_t r = 0; r < rows; ++r) {
        float* y = s + r * wide;
        for (int64_t i = t0 + r + 1; i < seen; ++i) y[i] = -1e30f;
        F top = fset(-1e30f), sum = fzero();
        for (int64_t i = 0; i < seen; i += 16) top = fmax_(top, fload(y + i));
        float largest = hmax(top);
        for (int64_t i = 0; i < seen; i += 16) {
          F w = exp_(sub(fload(y + i), fset(largest)));
          sum = add(sum, w);
          fstore(y + i, w);
        }
        float total = hsum(sum);
        F inverse = fset(1.0f / total);
        for (int64_t i = 0; i < seen; i += 16) store_bf16(p + r * wide + i, mul(fload(y + i), inverse));
        to.lse[h * to.tokens + first + t0 + r] = largest + __builtin_logf(total);
      }
      times(p, wide, rows, (most + 1) / 2, values, e, [&](int64_t c, int64_t here) {
        return Tile{nullptr,     0,          nullptr, false, false, false, outs.at + t0 * outs.stride + c,
                    outs.stride, Real::BF16, 1,       here};
      });
    }
  }
}

// sums (tokens, columns of 64) += a^T b, a (rows, tokens)
INLINE void gather(const uint16_t* a, int64_t lda, int64_t rows, int64_t tokens, const Packed& b, uint16_t* turned,
                   float* sums, int64_t length) {
  Term t;
  t.a = a;
  t.a_rows = 1;
  t.a_columns = lda;
  t.depth = rows;
  pack_rows(t, 0, tokens, turned, ASKED);
  times(turned, ASKED, tokens, (rows + 1) / 2, b, b.columns, [&](int64_t c, int64_t here) {
    return Tile{nullptr, 0, sums + c * length, true, false, true, nullptr, 0, Real::F32, 1, sixteens(here)};
  });
}

void texts_backward_bf16(const Texts& x, const TextsGrad& g, int64_t first, int64_t last, int64_t kv_head,
                         float* scratch) {
  int64_t n = last - first, e = x.width, ep = sixteens(e), e64 = (e + 63) / 64 * 64, wide = sixteens(n),
          group = x.heads / x.kv_heads;
  Bump memory(scratch);
  float* row = memory.take<float>(e64);
  float *dk = memory.take<float>(n * e64), *dv = memory.take<float>(n * e64);
  __builtin_memset(row, 0, (size_t)(dv + n * e64 - row) * 4);
  uint16_t *k = memory.take<uint16_t>(n * ep), *q = memory.take<uint16_t>(ASKED * ep),
           *p = memory.take<uint16_t>(ASKED * wide), *ds = memory.take<uint16_t>(ASKED * wide);
  uint16_t* turned = memory.take<uint16_t>(wide * ASKED);
  float *s = memory.take<float>(ASKED * wide), *dp = memory.take<float>(ASKED * wide),
        *dq = memory.take<float>(ASKED * ep);
  Packed keys{memory.take<uint32_t>(Packed::size(n, e / 2)), n, e / 2},
      values{memory.take<uint32_t>(Packed::size(n, e / 2)), n, e / 2};
  Packed keys_down{memory.take<uint32_t>(Packed::size(e, (n + 1) / 2)), e, (n + 1) / 2};
  Packed asked{memory.take<uint32_t>(Packed::size(e, ASKED / 2)), e, ASKED / 2},
      wanted{memory.take<uint32_t>(Packed::size(e, ASKED / 2)), e, ASKED / 2};
  const float *cos = x.cos + first * e, *sin = x.sin + first * e;
  rotate(Heads<Half>(x.k, first, kv_head, x.kv_heads, e), 0, n, cos, sin, row, ep, k);
  keys.along(k, ep);
  keys_down.across(k, ep, n);
  values.along(Heads<Half>(x.v, first, kv_head, x.kv_heads, e).at, x.kv_heads * e);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    Heads<Half> queries(x.q, first, h, x.heads, e), outs(g.out, first, h, x.heads, e);
    Heads<Half> grads(g.grad, first, h, x.heads, e), to(g.to_q, first, h, x.heads, e);
    for (int64_t t0 = 0; t0 < n; t0 += ASKED) {
      int64_t rows = n - t0 < ASKED ? n - t0 : ASKED, most = t0 + rows, seen = sixteens(most);
      const uint16_t* d = grads.at + t0 * grads.stride;
      rotate(queries, t0, most, cos, sin, row, ep, q);
      times(q, ep, rows, e / 2, keys, most,
            [&](int64_t c, int64_t here) { return to_floats(s + c, wide, here, x.scale); });
      times(d, grads.stride, rows, e / 2, values, most,
            [&](int64_t c, int64_t here) { return to_floats(dp + c, wide, here, 1); });
      for (int64_t r = 0; r < rows; ++r) {
        const uint16_t *o = outs.at + (t0 + r) * outs.stride, *to_o = d + r * grads.stride;
        int64_t i = 0;
        F dot = fzero();
        for (; i + 16 <= e; i += 16) dot = fma(Half::load(o + i), Half::load(to_o + i), dot);
        float delta = hsum(dot);
        for (; i < e; ++i) delta += Half::one(o[i]) * Half::one(to_o[i]);
        float* y = s + r * wide;
        for (i = t0 + r + 1; i < seen; ++i) y[i] = -1e30f;
        F lse = fset(g.lse[h * g.tokens + first + t0 + r]), shift = fset(delta), scale = fset(x.scale);
        for (i = 0; i < seen; i += 16) {
          F w = exp_(sub(fload(y + i), lse));
          store_bf16(p + r * wide + i, w);
          store_bf16(ds + r * wide + i, mul(mul(w, sub(fload(dp + r * wide + i), shift)), scale));
        }
      }
      times(ds, wide, rows, (most + 1) / 2, keys_down, e,
            [&](int64_t c, int64_t here) { return to_floats(dq + c, ep, here, 1); });
      asked.across(q, ep, rows);
      wanted.across(d, grads.stride, rows);
      gather(ds, wide, rows, most, asked, turned, dk, n);
      gather(p, wide, rows, most, wanted, turned, dv, n);
      for (int64_t r = 0; r < rows; ++r) to.write(t0 + r, cos + (t0 + r) * e, sin + (t0 + r) * e, dq + r * ep);
    }
  }
  Heads<Half> to_k(g.to_k, first, kv_head, x.kv_heads, e), to_v(g.to_v, first, kv_head, x.kv_heads, e);
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t c = 0; c < e; c += 16) fstore(row + c, fload(dk + c / 64 * n * 64 + t * 64 + c % 64));
    to_k.write(t, cos + t * e, sin + t * e, row);
    for (int64_t c = 0; c < e; c += 16) fstore(row + c, fload(dv + c / 64 * n * 64 + t * 64 + c % 64));
    to_v.write(t, nullptr, nullptr, row);
  }
}
