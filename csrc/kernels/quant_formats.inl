// Included by matmul.inl: formats whose tile is one stream of units, each a header and then spans of lines in the order
// they are used. A unit is the columns that share a header; what differs between formats is how a span becomes quads
// (16 rows x 4 columns, one dot instruction) and what the header says.

struct Quads {
  B a, b;
};

struct Codes {  // the codebook of C4 and C4B in registers
  Table exact;
  Pairs pairs;
  Bytes bytes;
  float step;  // of the 8-bit form
};

Codes codes_of(const Codebook* codebook) {
  static const Codebook none = {};
  const Codebook& c = codebook ? *codebook : none;
  return {table_of(c.value), pairs_of(c.value), bytes_of(c.byte), c.step};
}

struct Nibbles {  // low nibbles are quad j, high ones quad 4 + j
  static constexpr int SPAN = 32, STEPS = 4, PLANE = 0, LINES = 256;
  static constexpr bool PAIRS = false, LARGE = false, ZERO = false;
  INLINE constexpr int first(int j) { return j; }
  INLINE constexpr int second(int j) { return 4 + j; }
};
struct Whole {  // two lines of bytes a step
  static constexpr int SPAN = 32, STEPS = 4, PLANE = 0, LINES = 512;
  static constexpr bool PAIRS = false, LARGE = false, ZERO = false;
  static constexpr int BITS = 8, SHIFT = 0;
  INLINE constexpr int first(int j) { return 2 * j; }
  INLINE constexpr int second(int j) { return 2 * j + 1; }
  INLINE Quads quads(const uint8_t* p, B, int j, const Codes&) { return {bload(p + 128 * j), bload(p + 128 * j + 64)}; }
};
struct Five : Nibbles {
  static constexpr int PLANE = 64, LINES = 64 + 256, BITS = 6;
  INLINE Quads quads(const uint8_t* p, B plane, int j, const Codes&) {
    B v = bload(p + 64 * j);
    return {with_bits(low4(v), plane, 4 - j, 16), with_bits(high4(v), plane, -j, 16)};
  }
};

// ZERO: the matrix has zeros, subtracted before the scale. MINIMUM: the header adds minimum() times the sum of the
// activations. SHIFT: the values are 2^(7-SHIFT) too large, -1: are not. FLAT: the scale waits for the end of the
// tile. LARGE: with two chains, the second may be 16 times too large till its end. UNIT: spans of a unit, 0 where the
// matrix says (its group, or a row).
struct C4 : Nibbles {
  static constexpr int HEAD = 64, UNIT = 2, BITS = 8, SHIFT = 0;
  static constexpr bool MINIMUM = false, FLAT = false;
  INLINE Quads quads(const uint8_t* p, B, int j, const Codes& t) {
    B v = bload(p + 64 * j);
    return {lookup_low(v, t.bytes), lookup_high(v, t.bytes)};
  }
  INLINE F scale(const uint8_t* head, int, const Codes& t) { return mul(fload((const float*)head), fset(t.step)); }
  INLINE F minimum(const uint8_t*, int) { return fzero(); }
};
struct G4 : Nibbles {
  static constexpr int HEAD = 64, UNIT = 0, BITS = 4, SHIFT = -1;
  static constexpr bool MINIMUM = true, FLAT = false, LARGE = HIGH_IN_PLACE, ZERO = true;
  INLINE Quads quads(const uint8_t* p, B, int j, const Codes&) {
    B v = bload(p + 64 * j);
    return {low4(v), high4(v)};
  }
  INLINE F scale(const uint8_t* head, int, const Codes&) { return load_f16(head); }
  INLINE F minimum(const uint8_t* head, int) { return mul(load_f16(head), sub(fzero(), load_u8(head + 32))); }
};
struct G8 : Whole {
  static constexpr int HEAD = 64, UNIT = 0;
  static constexpr bool MINIMUM = true, FLAT = false, ZERO = true;
  INLINE F scale(const uint8_t* head, int, const Codes&) { return load_f16(head); }
  INLINE F minimum(const uint8_t* head, int) { return mul(load_f16(head), sub(fset(128), load_u8(head + 32))); }
};
struct R8 : Whole {
  static constexpr int HEAD = 64, UNIT = 0;
  static constexpr bool MINIMUM = false, FLAT = true;
  INLINE F scale(const uint8_t* head, int, const Codes&) { return fload((const float*)head); }
  INLINE F minimum(const uint8_t*, int) { return fzero(); }
};
struct P5 : Five {
  static constexpr int HEAD = 64, UNIT = 2, SHIFT = 3;
  static constexpr bool MINIMUM = false, FLAT = false;
  INLINE F scale(const uint8_t* head, int s, const Codes&) { return load_f16(head + 32 * s); }
  INLINE F minimum(const uint8_t*, int) { return fzero(); }
};
struct P5M : Five {
  static constexpr int HEAD = 128, UNIT = 2, SHIFT = -1;
  static constexpr bool MINIMUM = true, FLAT = false;
  INLINE F scale(const uint8_t* head, int s, const Codes&) { return load_f16(head + 32 * s); }
  INLINE F minimum(const uint8_t* head, int s) { return load_f16(head + 64 + 32 * s); }
};
struct P5K : Five {
  static constexpr int HEAD = 320, UNIT = 8, SHIFT = -1;
  static constexpr bool MINIMUM = true, FLAT = false;
  INLINE F scale(const uint8_t* head, int s, const Codes&) { return scaled(head, head + 64 + 32 * s); }
  INLINE F minimum(const uint8_t* head, int s) { return sub(fzero(), scaled(head + 32, head + 80 + 32 * s)); }
};
struct P6K {
  static constexpr int SPAN = 16, STEPS = 2, PLANE = 64, LINES = 64 + 128, BITS = 6;
  static constexpr int HEAD = 320, UNIT = 16, SHIFT = 2;
  static constexpr bool MINIMUM = false, FLAT = false, PAIRS = false, LARGE = false, ZERO = false;
  INLINE constexpr int first(int j) { return j; }
  INLINE constexpr int second(int j) { return 2 + j; }
  INLINE Quads quads(const uint8_t* p, B plane, int j, const Codes&) {
    B v = bload(p + 64 * j);
    return {with_bits(low4(v), plane, 4 - 2 * j, 48), with_bits(high4(v), plane, -2 * j, 48)};
  }
  INLINE F scale(const uint8_t* head, int s, const Codes&) { return mul(load_f16(head), load_s8(head + 64 + 16 * s)); }
  INLINE F minimum(const uint8_t*, int) { return fzero(); }
};

struct T4 : C4 {
  static constexpr int HEAD = 128;
  INLINE F scale(const uint8_t* head, int s, const Codes& t) {
    return mul(fload((const float*)(head + 64 * s)), fset(t.step));
  }
};
struct T4H {
  static constexpr int SPAN = 16, STEPS = 2, PLANE = 0, LINES = 128, HEAD = 256, UNIT = 4, BITS = 8, SHIFT = 0;
  static constexpr bool MINIMUM = false, FLAT = false, PAIRS = false, LARGE = false, ZERO = false;
  INLINE constexpr int first(int j) { return j; }
  INLINE constexpr int second(int j) { return 2 + j; }
  INLINE Quads quads(const uint8_t* p, B plane, int j, const Codes& t) { return C4::quads(p, plane, j, t); }
  INLINE F scale(const uint8_t* head, int s, const Codes& t) { return T4::scale(head, s, t); }
  INLINE F minimum(const uint8_t*, int) { return fzero(); }
};
struct A4 : G4 {
  static constexpr int HEAD = 128;
  static constexpr bool ZERO = false;
  INLINE F scale(const uint8_t* head, int, const Codes&) { return fload((const float*)head); }
  INLINE F minimum(const uint8_t* head, int) { return fload((const float*)(head + 64)); }
};
struct A8 : Whole {
  static constexpr int HEAD = 128, UNIT = 0;
  static constexpr bool MINIMUM = true, FLAT = false;
  INLINE F scale(const uint8_t* head, int, const Codes&) { return fload((const float*)head); }
  // What is stored is the value + 128, which the integer sum takes off again: SHIFT is 0.
  INLINE F minimum(const uint8_t* head, int) {
    return add(fload((const float*)(head + 64)), mul(fset(128), fload((const float*)head)));
  }
};

struct Dot4 {
  using D = D4;
  INLINE D begin(I start) { return d4_begin(start); }
  INLINE D dot(D d, B w, const int8_t* a) { return d4_dot(d, w, a); }
  INLINE I end(D d, I start) { return d4_end(d, start); }
};
struct Dot6 {
  using D = D6;
  INLINE D begin(I start) { return d6_begin(start); }
  INLINE D dot(D d, B w, const int8_t* a) { return d6_dot(d, w, a); }
  INLINE I end(D d, I) { return d6_end(d); }
};
struct Dot8 {
  using D = D8;
  INLINE D begin(I start) { return d8_begin(start); }
  INLINE D dot(D d, B w, const int8_t* a) { return d8_dot(d, w, a); }
  INLINE I end(D d, I) { return d8_end(d); }
};
template <int BITS>
struct DotOf {
  using T = Dot8;
};
template <>
struct DotOf<4> {
  using T = Dot4;
};
template <>
struct DotOf<6> {
  using T = Dot6;
};

// Span g of the row, the s-th of its unit, of NR tiles against the tokens m0 to m0 + PART of MR, added to acc.
template <class W, int MR, int NR, int PART>
INLINE void stream_span(const uint8_t* const* p, const uint8_t* const* head, int s, int64_t g, const Block& x,
                        const Codes& codes, int m0, F (*acc)[MR]) {
  using Dot = typename DotOf<W::BITS>::T;
  constexpr int CHAINS = PART * NR <= 4 && 2 * PART * NR <= SUMS ? 2 : 1;
  constexpr bool LARGE = W::LARGE && CHAINS == 2;
  const int32_t* negsum = W::SPAN == 32 ? x.negsum : x.negsum16;
  const int8_t* a = x.q + g * W::SPAN * MR;
  typename Dot::D d[CHAINS][NR][PART];
  I start[PART];
  UNROLLED(8, m, PART) {
    if (W::SHIFT >= 0) {
      int32_t first = negsum[g * MR + m0 + m] >> (W::SHIFT < 0 ? 0 : W::SHIFT);
      start[m] = iload1(&first);
    } else {
      start[m] = izero();
    }
  }
  B plane[NR] = {};
  UNROLLED(8, n, NR) {
    if (W::PLANE) {
      plane[n] = bload(p[n]);
      if (PREFETCH && m0 == 0) prefetch(p[n] + PREFETCH);
    }
    UNROLLED(8, m, PART) {
      d[0][n][m] = Dot::begin(start[m]);
      if (CHAINS == 2) d[CHAINS - 1][n][m] = Dot::begin(izero());
    }
  }
  UNROLLED(4, j, W::STEPS) {
    if (CROWDED<PART, NR>) read_again();
    Quads q[NR];
    UNROLLED(8, n, NR) {
      constexpr int STEP = (W::LINES - W::PLANE) / W::STEPS;
      if (LARGE) {
        B v = bload(p[n] + 64 * j);
        q[n] = {low4(v), high4_large(v)};
      } else {
        q[n] = W::quads(p[n] + W::PLANE, plane[n], j, codes);
      }
      if (PREFETCH && m0 == 0)
        for (int i = 0; i < STEP; i += 64) prefetch(p[n] + W::PLANE + STEP * j + i + PREFETCH);
    }
    UNROLLED(8, m, PART)
      UNROLLED(8, n, NR) d[0][n][m] = Dot::dot(d[0][n][m], q[n].a, a + (W::first(j) * MR + m0 + m) * 4);
    UNROLLED(8, m, PART)
      UNROLLED(8, n, NR)
        d[CHAINS - 1][n][m] = Dot::dot(d[CHAINS - 1][n][m], q[n].b, a + (W::second(j) * MR + m0 + m) * 4);
  }
  int64_t g32 = g * W::SPAN / 32;
  UNROLLED(8, n, NR) {
    F scale = W::FLAT ? fzero() : W::scale(head[n], s, codes), lowest = W::MINIMUM ? W::minimum(head[n], s) : fzero();
    UNROLLED(8, m, PART) {
      I whole = Dot::end(d[0][n][m], start[m]);
      if (CHAINS == 2) {
        I second = Dot::end(d[CHAINS - 1][n][m], izero());
        whole = iadd(whole, LARGE ? sixteenth(second) : second);
      }
      F t = cvt(whole);
      if (!W::FLAT) t = mul(t, scale);
      F& sum = acc[n][m0 + m];
      sum = fma(t, fset(x.scale[g32 * MR + m0 + m]), sum);
      if (W::MINIMUM) sum = fma(lowest, fset(x.sum[g32 * MR + m0 + m]), sum);
    }
  }
}

struct Plan {  // how far a tile goes: spans in all and of one unit
  int64_t spans, unit;
  const Codebook* codebook;
};

INLINE void touch(const uint8_t* head, int bytes) {  // a header is read span by span: all of it asked for first keeps
  for (int i = 0; i < bytes; i += 64) prefetch(head + i + PREFETCH);  // the lines in ascending order
}

template <class W, int MR, int NR>
__attribute__((noinline)) void stream_tile(const uint8_t* const* w, const Plan& plan, const Block& x, float* c) {
  F acc[NR][MR];
  const uint8_t *p[NR], *head[NR];
  const Codes codes = codes_of(plan.codebook);
  UNROLLED(8, n, NR) {
    p[n] = w[n];
    UNROLLED(8, m, MR) acc[n][m] = fzero();
  }
  for (int64_t g = 0; g < plan.spans;) {
    int unit = (int)(plan.spans - g < plan.unit ? plan.spans - g : plan.unit);
    UNROLLED(8, n, NR) {
      head[n] = p[n];
      p[n] += W::HEAD;
      touch(head[n], W::HEAD);
    }
    for (int s = 0; s < unit; ++s, ++g) {
      if constexpr (MR * NR <= SUMS) {
        stream_span<W, MR, NR, MR>(p, head, s, g, x, codes, 0, acc);
      } else {
        constexpr int PART = part_of(MR);
        UNROLLED(2, n, NR)
          UNROLLED(4, i, MR / PART) {
            read_again();
            stream_span<W, MR, 1, PART>(p + n, head + n, s, g, x, codes, i * PART, acc + n);
          }
      }
      UNROLLED(8, n, NR) p[n] += W::LINES;
    }
  }
  UNROLLED(8, n, NR)
    UNROLLED(8, m, MR)
      fstore(c + (n * MAX_MR + m) * TILE, W::FLAT ? mul(acc[n][m], W::scale(w[n], 0, codes)) : acc[n][m]);
}

// C4B: 16-bit halves of a row's dword are columns 2i and 2i+1, which one bfloat16 dot instruction takes together.
template <int MR>
__attribute__((noinline)) void pairs_tile(const uint8_t* w, const Plan& plan, const Block& x, float* c) {
  const Codes codes = codes_of(plan.codebook);
  F acc[MR];
  UNROLLED(8, m, MR) acc[m] = fzero();
  const uint16_t* a = x.bf16;
  for (int64_t g = 0; g < plan.spans; g += 2, w += 64 + 512) {
    constexpr int CHAINS = 4;  // for any MR, so that a token's sum does not depend on its neighbours
    F part[CHAINS][MR];
    UNROLLED(8, i, CHAINS)
      UNROLLED(8, m, MR) part[i][m] = fzero();
    touch(w, 64);
    for (int j = 0; j < 8; ++j, a += 8) {
      const uint8_t* line = w + 64 + 64 * j;
      B v = bload(line);
      if (PREFETCH) prefetch(line + PREFETCH);
      UNROLLED(4, i, 4)
        UNROLLED(8, m, MR)
          part[i % CHAINS][m] = dot_pairs(part[i % CHAINS][m], v, i, codes.pairs, a + m * x.ld + 2 * i);
    }
    F s = fload((const float*)w);
    UNROLLED(8, m, MR) {
      F sum = part[0][m];
      UNROLLED(8, i, CHAINS - 1) sum = add(sum, part[i + 1][m]);
      acc[m] = fma(sum, s, acc[m]);
    }
  }
  UNROLLED(8, m, MR) fstore(c + m * TILE, acc[m]);
}

// Values without rounding: value(e) of step j is column(j, e) of the span. offset: what minimum() is before its scale.
template <class W>
struct Exact {  // formats that are whole quads: bytes less their centre
  INLINE Table table(const Codes& c) { return c.exact; }
  INLINE F value(const Quads& q, int e, Table) {
    constexpr float centre = W::SHIFT < 0 ? 0.0f : (float)(128 >> (W::SHIFT < 0 ? 0 : W::SHIFT));
    return sub(byte_(e < 4 ? q.a : q.b, 8 * (e % 4)), fset(centre));
  }
  INLINE Quads load(const uint8_t* p, B plane, int j, const Codes& c) { return W::quads(p, plane, j, c); }
  INLINE constexpr int column(int j, int e) { return 4 * (e < 4 ? W::first(j) : W::second(j)) + e % 4; }
  INLINE F scale(const uint8_t* head, int s, const Codes& c) { return W::scale(head, s, c); }
  INLINE F minimum(const uint8_t* head, int s) { return W::minimum(head, s); }
  INLINE F offset(const uint8_t*) { return fzero(); }
};
template <>
struct Exact<G8> : Exact<Whole> {
  INLINE F scale(const uint8_t* head, int s, const Codes& c) { return G8::scale(head, s, c); }
  INLINE F minimum(const uint8_t* head, int s) { return G8::minimum(head, s); }
  INLINE F offset(const uint8_t* head) { return sub(fset(128), load_u8(head + 32)); }
};
template <>
struct Exact<G4> {  // less 8, the usual zero, so that large sums do not have to cancel
  INLINE Table table(const Codes&) {
    alignas(64) float t[16];
    for (int i = 0; i < 16; ++i) t[i] = (float)(i - 8);
    return table_of(t);
  }
  INLINE Quads load(const uint8_t* p, B, int j, const Codes&) {
    B v = bload(p + 64 * j);
    return {v, v};
  }
  INLINE F value(const Quads& q, int e, Table t) { return lookup(q.a, 4 * e, t); }
  INLINE constexpr int column(int j, int e) { return 4 * j + e / 2 + 16 * (e & 1); }
  INLINE F scale(const uint8_t* head, int, const Codes&) { return load_f16(head); }
  INLINE F minimum(const uint8_t* head, int) { return mul(load_f16(head), offset(head)); }
  INLINE F offset(const uint8_t* head) { return sub(fset(8), load_u8(head + 32)); }
};
template <>
struct Exact<C4> {
  INLINE Table table(const Codes& c) { return c.exact; }
  INLINE Quads load(const uint8_t* p, B, int j, const Codes&) {
    B v = bload(p + 64 * j);
    return {v, v};
  }
  INLINE F value(const Quads& q, int e, Table t) { return lookup(q.a, 4 * e, t); }
  INLINE constexpr int column(int j, int e) { return 4 * j + e / 2 + 16 * (e & 1); }
  INLINE F scale(const uint8_t* head, int, const Codes&) { return fload((const float*)head); }
  INLINE F minimum(const uint8_t*, int) { return fzero(); }
  INLINE F offset(const uint8_t*) { return fzero(); }
};
template <>
struct Exact<T4> : Exact<C4> {
  INLINE F scale(const uint8_t* head, int s, const Codes&) { return fload((const float*)(head + 64 * s)); }
};
template <>
struct Exact<T4H> : Exact<T4> {
  INLINE constexpr int column(int j, int e) { return 4 * j + e / 2 + 8 * (e & 1); }
};
template <>
struct Exact<A4> : Exact<G4> {
  INLINE Table table(const Codes&) {
    alignas(64) float t[16];
    for (int i = 0; i < 16; ++i) t[i] = (float)i;
    return table_of(t);
  }
  INLINE F scale(const uint8_t* head, int, const Codes&) { return fload((const float*)head); }
  INLINE F minimum(const uint8_t* head, int) { return fload((const float*)(head + 64)); }
};
template <>
struct Exact<A8> : Exact<Whole> {
  INLINE F value(const Quads& q, int e, Table) { return byte_(e < 4 ? q.a : q.b, 8 * (e % 4)); }
  INLINE F scale(const uint8_t* head, int, const Codes&) { return fload((const float*)head); }
  INLINE F minimum(const uint8_t* head, int) { return fload((const float*)(head + 64)); }
};
struct C4B : C4 {
  static constexpr bool PAIRS = true;
};
template <>
struct Exact<C4B> : Exact<C4> {
  INLINE constexpr int column(int j, int e) { return 8 * j + 2 * (e % 4) + e / 4; }
};

template <class W, int MR>
__attribute__((noinline)) void stream_exact(const uint8_t* w, const Plan& plan, const Block& x, float* c) {
  using E = Exact<W>;
  const Codes codes = codes_of(plan.codebook);
  const Table table = E::table(codes);
  const float* a = x.f32;
  F acc[MR];
  UNROLLED(8, m, MR) acc[m] = fzero();
  for (int64_t g = 0; g < plan.spans;) {
    int unit = (int)(plan.spans - g < plan.unit ? plan.spans - g : plan.unit);
    const uint8_t* head = w;
    touch(head, W::HEAD);
    w += W::HEAD;
    for (int s = 0; s < unit; ++s, ++g, w += W::LINES, a += W::SPAN) {
      constexpr int CHAINS = MR == 1 ? 4 : 2;
      F part[CHAINS][MR];
      UNROLLED(8, i, CHAINS)
        UNROLLED(8, m, MR) part[i][m] = fzero();
      B plane = {};
      if (W::PLANE) plane = bload(w);
      if (PREFETCH)
        for (int i = 0; i < W::LINES; i += 64) prefetch(w + i + PREFETCH);
      UNROLLED(4, j, W::STEPS) {
        Quads q = E::load(w + W::PLANE, plane, j, codes);
        UNROLLED(8, e, 8) {
          F value = E::value(q, e, table);
          UNROLLED(8, m, MR) part[e % CHAINS][m] = fma(value, fset(a[m * x.ld + E::column(j, e)]), part[e % CHAINS][m]);
        }
      }
      F scale = E::scale(head, s, codes);
      UNROLLED(8, m, MR) {
        F sum = part[0][m];
        UNROLLED(8, i, CHAINS - 1) sum = add(sum, part[i + 1][m]);
        acc[m] = fma(sum, scale, acc[m]);
        if (W::MINIMUM) {
          F all = add(fload(a + m * x.ld), fload(a + m * x.ld + 16));
          acc[m] = fma(E::minimum(head, s), fset(hsum(all)), acc[m]);
        }
      }
    }
  }
  UNROLLED(8, m, MR) fstore(c + m * TILE, acc[m]);
}

INLINE Block from_token(const Block& x, int m) {
  Block b = x;
  b.f32 += m * x.ld;
  b.bf16 += m * x.ld;
  return b;
}

template <class W>
void stream_tiles(const uint8_t* const* w, int nr, const Plan& plan, const Block& x, int mr, bool exact, float* c) {
  if (exact || W::PAIRS) {
    for (int n = 0; n < nr; ++n) {
      float* cn = c + n * MAX_MR * TILE;
      int m = 0;
      if (!exact) {
        for (; m + 4 <= x.count; m += 4) pairs_tile<4>(w[n], plan, from_token(x, m), cn + m * TILE);
        for (; m < x.count; ++m) pairs_tile<1>(w[n], plan, from_token(x, m), cn + m * TILE);
      }
      for (; m + 4 <= x.count; m += 4) stream_exact<W, 4>(w[n], plan, from_token(x, m), cn + m * TILE);
      for (; m < x.count; ++m) stream_exact<W, 1>(w[n], plan, from_token(x, m), cn + m * TILE);
    }
    return;
  }
  if constexpr (!W::PAIRS) {
    if (mr == 1) {
      for (int n = 0; n < nr; ++n) stream_tile<W, 1, 1>(w + n, plan, x, c + n * MAX_MR * TILE);
    } else if (nr == 1) {
      if (mr == 2) stream_tile<W, 2, 1>(w, plan, x, c);
      else if (mr == 4) stream_tile<W, 4, 1>(w, plan, x, c);
      else stream_tile<W, 8, 1>(w, plan, x, c);
    } else {
      if (mr == 2) stream_tile<W, 2, 2>(w, plan, x, c);
      else if (mr == 4) stream_tile<W, 4, 2>(w, plan, x, c);
      else stream_tile<W, 8, 2>(w, plan, x, c);
    }
  }
}

template <class W>
Plan plan_of(const Matrix& w) {
  int64_t spans = W::UNIT ? up(w.cols, W::UNIT * W::SPAN) * W::UNIT : up(w.cols, GROUP);
  return {spans, W::UNIT ? W::UNIT : w.group ? w.group / GROUP : spans, w.codebook};
}

// Tiles of one format, one of the cases below; false where the format is not one of these.
template <class Visit>
bool with_stream(Format f, Visit&& visit) {
  switch (f) {
    case Format::C4: visit(C4{}); return true;
    case Format::C4B: visit(C4B{}); return true;
    case Format::G4: visit(G4{}); return true;
    case Format::G8: visit(G8{}); return true;
    case Format::R8: visit(R8{}); return true;
    case Format::P5: visit(P5{}); return true;
    case Format::P5M: visit(P5M{}); return true;
    case Format::P5K: visit(P5K{}); return true;
    case Format::P6K: visit(P6K{}); return true;
    case Format::T4: visit(T4{}); return true;
    case Format::T4H: visit(T4H{}); return true;
    case Format::A4: visit(A4{}); return true;
    case Format::A8: visit(A8{}); return true;
    default: return false;
  }
}

// The values of one row as a reader of the file would compute them: one lane of the exact kernel's pieces.
template <class W>
void stream_row(const Matrix& w, const uint8_t* p, int lane, float* out) {
  using E = Exact<W>;
  const Plan plan = plan_of<W>(w);
  const Codes codes = codes_of(plan.codebook);
  const Table table = E::table(codes);
  float t[TILE], scale[TILE], lowest[TILE];
  for (int64_t g = 0, k = 0; g < plan.spans;) {
    int unit = (int)(plan.spans - g < plan.unit ? plan.spans - g : plan.unit);
    const uint8_t* head = p;
    p += W::HEAD;
    for (int s = 0; s < unit; ++s, ++g, p += W::LINES, k += W::SPAN) {
      B plane = {};
      if (W::PLANE) plane = bload(p);
      fstore(scale, E::scale(head, s, codes));
      fstore(lowest, W::ZERO ? E::offset(head) : E::minimum(head, s));
      for (int j = 0; j < W::STEPS; ++j) {
        Quads q = E::load(p + W::PLANE, plane, j, codes);
        for (int e = 0; e < 8; ++e) {
          int64_t at = k + E::column(j, e);
          if (at >= w.cols) continue;
          fstore(t, E::value(q, e, table));
          float v =
              W::ZERO ? (t[lane] + lowest[lane]) * scale[lane] : __builtin_fmaf(t[lane], scale[lane], lowest[lane]);
          out[w.order ? w.order[at] : at] = v;
        }
      }
    }
  }
}
