// Included once per instruction set, inside an anonymous namespace: forward and backward of all but matrix products.
// Values are float32 or bfloat16 in memory and float32 in registers.

struct Wide {
  using V = float;
  INLINE F load(const V* p) { return fload(p); }
  INLINE void store(V* p, F v) { fstore(p, v); }
  INLINE float one(V v) { return v; }
  INLINE V put(float v) { return v; }
};
struct Half {
  using V = uint16_t;
  INLINE F load(const V* p) { return load_bf16(p); }
  INLINE void store(V* p, F v) { store_bf16(p, v); }
  INLINE float one(V v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
  }
  INLINE V put(float v) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (V)((bits >> 16) | 0x40);
    return (V)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

INLINE F rounded(Wide, F v) { return v; }
INLINE F rounded(Half, F v) {  // to bfloat16 and back, as a tensor in between would be
  uint16_t t[16];
  store_bf16(t, v);
  return load_bf16(t);
}

template <class T>
float inverse_rms(const typename T::V* x, int64_t width, float eps) {
  F s = fzero();
  for (int64_t i = 0; i < width; i += 16) {
    F v = T::load(x + i);
    s = fma(v, v, s);
  }
  return 1.0f / __builtin_sqrtf(hsum(s) / (float)width + eps);
}

template <class T>
void norm_rows(const Norm& n, int64_t row0, int64_t row1, void* out) {
  using V = typename T::V;
  const V* w = (const V*)n.weight;
  for (int64_t row = row0; row < row1; ++row) {
    const V* x = (const V*)n.x + row * n.width;
    F r = fset(inverse_rms<T>(x, n.width, n.eps));
    V* y = (V*)out + row * n.width;
    for (int64_t i = 0; i < n.width; i += 16)
      T::store(y + i, mul(rounded(T{}, mul(T::load(x + i), r)), T::load(w + i)));
  }
}

template <class T>
void norm_grad_rows(const Norm& n, const NormGrad& g, int64_t row0, int64_t row1) {
  using V = typename T::V;
  const V* w = (const V*)n.weight;
  for (int64_t row = row0; row < row1; ++row) {
    int64_t at = row * n.width;
    const V *x = (const V*)n.x + at, *gy = (const V*)g.grad + at;
    const V* residual = g.residual ? (const V*)g.residual + at : nullptr;
    float r = inverse_rms<T>(x, n.width, n.eps);
    F dot = fzero();
    for (int64_t i = 0; i < n.width; i += 16) dot = fma(mul(T::load(gy + i), T::load(w + i)), T::load(x + i), dot);
    F scale = fset(r), pull = fset(hsum(dot) * r * r * r / (float)n.width);
    for (int64_t i = 0; i < n.width; i += 16) {
      F xi = T::load(x + i), gi = T::load(gy + i);
      F to = sub(mul(mul(gi, T::load(w + i)), scale), mul(xi, pull));
      if (residual) to = add(to, T::load(residual + i));
      if (g.to_weight) fstore(g.to_weight + i, fma(gi, mul(xi, scale), fload(g.to_weight + i)));
      T::store((V*)g.to_x + at + i, to);
    }
  }
}

template <class T>
void swiglu_values(const void* gate, const void* up, int64_t begin, int64_t end, void* out) {
  using V = typename T::V;
  for (int64_t i = begin; i < end; i += 16)
    T::store((V*)out + i, mul(rounded(T{}, silu(T::load((const V*)gate + i))), T::load((const V*)up + i)));
}

template <class T>
void swiglu_grad_values(const void* gate, const void* up, const void* grad, int64_t begin, int64_t end, void* to_gate,
                        void* to_up, void* product) {
  using V = typename T::V;
  F one = fset(1.0f);
  for (int64_t i = begin; i < end; i += 16) {
    F a = T::load((const V*)gate + i), u = T::load((const V*)up + i), g = T::load((const V*)grad + i);
    F s = divide(one, add(one, exp_(sub(fzero(), a)))), act = mul(a, s);
    F slope = mul(s, add(one, mul(a, sub(one, s))));
    T::store((V*)to_gate + i, mul(mul(g, u), slope));
    T::store((V*)to_up + i, mul(g, act));
    T::store((V*)product + i, mul(rounded(T{}, act), u));
  }
}

INLINE uint32_t mixed(uint32_t h) {  // lowbias32 of C. Wellons, "Prospecting for Hash Functions"
  h ^= h >> 16;
  h *= 0x7feb352dU;
  h ^= h >> 15;
  h *= 0x846ca68bU;
  return h ^ h >> 16;
}

// 16 numbers of 32 random bits for places `at` to at + 15 of a stream.
INLINE void random_bits(uint64_t seed, uint64_t at, uint32_t* to) {
  uint32_t high = (uint32_t)(seed >> 32) ^ (uint32_t)(at >> 32);
  for (uint32_t j = 0; j < 16; ++j) to[j] = mixed(mixed((uint32_t)at + j + (uint32_t)seed) + high);
}

template <class T>
void drop_values(const void* x, const Dropout& d, const void* added, int64_t begin, int64_t end, void* out) {
  using V = typename T::V;
  const V *from = (const V*)x, *more = (const V*)added;
  V* to = (V*)out;
  float scale = d.scale();
  for (int64_t i = begin; i < end; i += 32) {
    uint32_t bits[16];
    float keep[32];
    random_bits(d.seed, (uint64_t)i / 2, bits);
    for (int j = 0; j < 16; ++j) {
      keep[j] = (bits[j] & 0xffff) < d.share ? 0.0f : scale;
      keep[16 + j] = (bits[j] >> 16) < d.share ? 0.0f : scale;
    }
    if (i + 32 <= end) {
      for (int j = 0; j < 32; j += 16) {
        F v = mul(T::load(from + i + j), fload(keep + j));
        T::store(to + i + j, more ? add(v, T::load(more + i + j)) : v);
      }
    } else {
      for (int64_t j = 0; i + j < end; ++j)
        to[i + j] = T::put(T::one(from[i + j]) * keep[j] + (more ? T::one(more[i + j]) : 0.0f));
    }
  }
}

// -- attention ---------------------------------------------------------------------------------------------------

constexpr int ROWS = TEXT_ROWS;

INLINE int64_t sixteens(int64_t n) { return (n + 15) / 16 * 16; }

struct Left {  // element (m, k) of a matrix at p[m * rows + k * cols]
  const float* p;
  int64_t rows, cols;
};

template <int M, int N>
INLINE void product_block(const Left& a, int64_t depth, const float* b, int64_t ldb, float* c, int64_t ldc, bool more) {
  F acc[M][N];
  UNROLLED(8, m, M)
    UNROLLED(8, n, N) acc[m][n] = more ? fload(c + m * ldc + 16 * n) : fzero();
  for (int64_t k = 0; k < depth; ++k) {
    F v[N];
    UNROLLED(8, n, N) v[n] = fload(b + k * ldb + 16 * n);
    UNROLLED(8, m, M) {
      F x = fset(a.p[m * a.rows + k * a.cols]);
      UNROLLED(8, n, N) acc[m][n] = fma(x, v[n], acc[m][n]);
    }
  }
  UNROLLED(8, m, M)
    UNROLLED(8, n, N) fstore(c + m * ldc + 16 * n, acc[m][n]);
}

#ifdef __AVX512F__
constexpr int PANEL = 4;  // registers of a panel of columns: 6 x 4 sums and 4 of b fit in 32
#else
constexpr int PANEL = 2;
#endif

template <int N>
void product_panel(Left a, int64_t rows, int64_t depth, const float* b, int64_t ldb, float* c, int64_t ldc, bool more) {
  for (; rows >= 6; rows -= 6, a.p += 6 * a.rows, c += 6 * ldc) product_block<6, N>(a, depth, b, ldb, c, ldc, more);
  for (; rows >= 2; rows -= 2, a.p += 2 * a.rows, c += 2 * ldc) product_block<2, N>(a, depth, b, ldb, c, ldc, more);
  if (rows) product_block<1, N>(a, depth, b, ldb, c, ldc, more);
}

// c (rows, columns) = a (rows, depth) b (depth, columns), or added to it; columns: a multiple of 16.
void small_product(Left a, int64_t rows, int64_t depth, const float* b, int64_t ldb, int64_t columns, float* c,
                   int64_t ldc, bool more = false) {
  int64_t n = 0;
  for (; n + 16 * PANEL <= columns; n += 16 * PANEL) product_panel<PANEL>(a, rows, depth, b + n, ldb, c + n, ldc, more);
  for (; n < columns; n += 16) product_panel<1>(a, rows, depth, b + n, ldb, c + n, ldc, more);
}

template <class T>
struct Heads {  // one head of tokens [first, last) in [token][heads][width]
  typename T::V* at;
  int64_t stride, width;
  Heads(const void* p, int64_t first, int64_t head, int64_t heads, int64_t w)
      : at((typename T::V*)p + (first * heads + head) * w),
        stride(heads * w),
        width(w) {}

  bool vectors() const { return width % 32 == 0; }  // halves of whole registers

  void read(int64_t token, const float* cos, const float* sin, float* to) const {  // rotated, unless cos is null
    const typename T::V* p = at + token * stride;
    int64_t half = width / 2;
    if (vectors())
      for (int64_t i = 0; i < half; i += 16) {
        F a = T::load(p + i), b = T::load(p + half + i);
        fstore(to + i, cos ? sub(mul(a, fload(cos + i)), mul(b, fload(sin + i))) : a);
        fstore(to + half + i, cos ? fma(b, fload(cos + half + i), mul(a, fload(sin + half + i))) : b);
      }
    else
      for (int64_t i = 0; i < half; ++i) {
        float a = T::one(p[i]), b = T::one(p[half + i]);
        to[i] = cos ? a * cos[i] - b * sin[i] : a;
        to[half + i] = cos ? b * cos[half + i] + a * sin[half + i] : b;
      }
  }
  void write(int64_t token, const float* cos, const float* sin, const float* from) const {  // the transposed rotation
    typename T::V* p = at + token * stride;
    int64_t half = width / 2;
    if (vectors())
      for (int64_t i = 0; i < half; i += 16) {
        F a = fload(from + i), b = fload(from + half + i);
        T::store(p + i, cos ? fma(a, fload(cos + i), mul(b, fload(sin + half + i))) : a);
        T::store(p + half + i, cos ? sub(mul(b, fload(cos + half + i)), mul(a, fload(sin + i))) : b);
      }
    else
      for (int64_t i = 0; i < half; ++i) {
        float a = from[i], b = from[half + i];
        p[i] = T::put(cos ? a * cos[i] + b * sin[half + i] : a);
        p[half + i] = T::put(cos ? b * cos[half + i] - a * sin[i] : b);
      }
  }
};

INLINE void transpose(const float* from, int64_t rows, int64_t columns, int64_t ld, float* to, int64_t ldt) {
  for (int64_t c = 0; c < columns; c += 16)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = c; i < c + 16 && i < columns; ++i) to[i * ldt + r] = from[r * ld + i];
}

template <class T>
void texts_forward(const Texts& x, const TextsOut& to, int64_t first, int64_t last, int64_t kv_head, float* scratch) {
  int64_t n = last - first, wide = sixteens(n), e = x.width, ep = sixteens(e), group = x.heads / x.kv_heads;
  Bump memory(scratch);
  float *v = memory.take<float>(wide * ep), *k = memory.take<float>(wide * ep), *kt = memory.take<float>(ep * wide);
  float *q = memory.take<float>(ROWS * ep), *s = memory.take<float>(ROWS * wide), *o = memory.take<float>(ROWS * ep);
  __builtin_memset(v, 0, (size_t)(q - v) * 4);
  __builtin_memset(q, 0, ROWS * ep * 4);
  Heads<T> keys(x.k, first, kv_head, x.kv_heads, e), values(x.v, first, kv_head, x.kv_heads, e);
  const float *cos = x.cos + first * e, *sin = x.sin + first * e;
  for (int64_t t = 0; t < n; ++t) {
    keys.read(t, cos + t * e, sin + t * e, k + t * ep);
    values.read(t, nullptr, nullptr, v + t * ep);
  }
  transpose(k, n, e, ep, kt, wide);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    Heads<T> queries(x.q, first, h, x.heads, e), outs(to.out, first, h, x.heads, e);
    for (int64_t t0 = 0; t0 < n; t0 += ROWS) {
      int64_t rows = n - t0 < ROWS ? n - t0 : ROWS, seen = sixteens(t0 + rows);
      for (int64_t r = 0; r < rows; ++r) queries.read(t0 + r, cos + (t0 + r) * e, sin + (t0 + r) * e, q + r * ep);
      small_product({q, ep, 1}, rows, e, kt, wide, seen, s, wide);
      for (int64_t r = 0; r < rows; ++r) {
        float* p = s + r * wide;
        for (int64_t i = t0 + r + 1; i < seen; ++i) p[i] = -1e30f;
        F most = fset(-1e30f), sum = fzero();
        for (int64_t i = 0; i < seen; i += 16) most = fmax_(most, fload(p + i));
        float top = hmax(most);
        for (int64_t i = 0; i < seen; i += 16) {
          F w = exp_(mul(sub(fload(p + i), fset(top)), fset(x.scale)));
          sum = add(sum, w);
          fstore(p + i, w);
        }
        float total = hsum(sum);
        F inverse = fset(1.0f / total);
        for (int64_t i = 0; i < seen; i += 16) fstore(p + i, mul(fload(p + i), inverse));
        for (int64_t i = t0 + r + 1; i < seen; ++i) p[i] = 0;
        to.lse[h * to.tokens + first + t0 + r] = top * x.scale + __builtin_logf(total);
      }
      small_product({s, wide, 1}, rows, t0 + rows, v, ep, ep, o, ep);
      for (int64_t r = 0; r < rows; ++r) outs.write(t0 + r, nullptr, nullptr, o + r * ep);
    }
  }
}

template <class T>
void texts_backward(const Texts& x, const TextsGrad& g, int64_t first, int64_t last, int64_t kv_head, float* scratch) {
  int64_t n = last - first, wide = sixteens(n), e = x.width, ep = sixteens(e), group = x.heads / x.kv_heads;
  Bump memory(scratch);
  float *k = memory.take<float>(wide * ep), *kt = memory.take<float>(ep * wide), *vt = memory.take<float>(ep * wide);
  float *dk = memory.take<float>(wide * ep), *dv = memory.take<float>(wide * ep);
  float *q = memory.take<float>(ROWS * ep), *d = memory.take<float>(ROWS * ep), *dq = memory.take<float>(ROWS * ep);
  float *s = memory.take<float>(ROWS * wide), *ds = memory.take<float>(ROWS * wide);
  __builtin_memset(k, 0, (size_t)(s - k) * 4);
  Heads<T> keys(x.k, first, kv_head, x.kv_heads, e), values(x.v, first, kv_head, x.kv_heads, e);
  const float *cos = x.cos + first * e, *sin = x.sin + first * e;
  for (int64_t t = 0; t < n; ++t) values.read(t, nullptr, nullptr, k + t * ep);
  transpose(k, n, e, ep, vt, wide);
  for (int64_t t = 0; t < n; ++t) keys.read(t, cos + t * e, sin + t * e, k + t * ep);
  transpose(k, n, e, ep, kt, wide);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    Heads<T> queries(x.q, first, h, x.heads, e), outs(g.out, first, h, x.heads, e);
    Heads<T> grads(g.grad, first, h, x.heads, e), to(g.to_q, first, h, x.heads, e);
    for (int64_t t0 = 0; t0 < n; t0 += ROWS) {
      int64_t rows = n - t0 < ROWS ? n - t0 : ROWS, seen = sixteens(t0 + rows);
      float delta[ROWS];
      for (int64_t r = 0; r < rows; ++r) {
        outs.read(t0 + r, nullptr, nullptr, dq);
        grads.read(t0 + r, nullptr, nullptr, d + r * ep);
        queries.read(t0 + r, cos + (t0 + r) * e, sin + (t0 + r) * e, q + r * ep);
        F sum = fzero();  // both are 0 from e on: dq was cleared, and products leave columns of zeros there
        for (int64_t i = 0; i < ep; i += 16) sum = fma(fload(dq + i), fload(d + r * ep + i), sum);
        delta[r] = hsum(sum);
      }
      small_product({q, ep, 1}, rows, e, kt, wide, seen, s, wide);
      small_product({d, ep, 1}, rows, e, vt, wide, seen, ds, wide);
      for (int64_t r = 0; r < rows; ++r) {
        float *p = s + r * wide, *dp = ds + r * wide;
        F lse = fset(g.lse[h * g.tokens + first + t0 + r]), scale = fset(x.scale), shift = fset(delta[r]);
        for (int64_t i = 0; i < seen; i += 16) {
          F w = exp_(sub(mul(fload(p + i), scale), lse));
          fstore(p + i, w);
          fstore(dp + i, mul(mul(w, sub(fload(dp + i), shift)), scale));
        }
        for (int64_t i = t0 + r + 1; i < seen; ++i) p[i] = dp[i] = 0;
      }
      small_product({ds, wide, 1}, rows, t0 + rows, k, ep, ep, dq, ep);
      small_product({ds, 1, wide}, t0 + rows, rows, q, ep, ep, dk, ep, true);
      small_product({s, 1, wide}, t0 + rows, rows, d, ep, ep, dv, ep, true);
      for (int64_t r = 0; r < rows; ++r) to.write(t0 + r, cos + (t0 + r) * e, sin + (t0 + r) * e, dq + r * ep);
    }
  }
  Heads<T> to_k(g.to_k, first, kv_head, x.kv_heads, e), to_v(g.to_v, first, kv_head, x.kv_heads, e);
  for (int64_t t = 0; t < n; ++t) {
    to_k.write(t, cos + t * e, sin + t * e, dk + t * ep);
    to_v.write(t, nullptr, nullptr, dv + t * ep);
  }
}

// -- the head and packed weights ---------------------------------------------------------------------------------

template <class T>
float log_prob_row(void* logits, int64_t vocabulary, int64_t target, const float* factor, float* e) {
  using V = typename T::V;
  V* x = (V*)logits;
  int64_t i = 0, whole = vocabulary / 16 * 16;
  F most = whole ? T::load(x) : fset(T::one(x[0]));
  for (i = 0; i < whole; i += 16) most = fmax_(most, T::load(x + i));
  float top = hmax(most);
  for (; i < vocabulary; ++i) top = T::one(x[i]) > top ? T::one(x[i]) : top;
  F s[2] = {fzero(), fzero()};
  float rest[16];
  for (i = 0; i < whole; i += 16) {
    F w = exp_(sub(T::load(x + i), fset(top)));
    s[i / 16 % 2] = add(s[i / 16 % 2], w);
    if (factor) fstore(e + i, w);
  }
  float total = hsum(add(s[0], s[1]));
  if (whole < vocabulary) {
    for (int j = 0; j < 16; ++j) rest[j] = whole + j < vocabulary ? T::one(x[whole + j]) - top : 0.0f;
    fstore(rest, exp_(fload(rest)));
    for (i = whole; i < vocabulary; ++i) total += rest[i - whole];
  }
  float found = T::one(x[target]) - top - __builtin_logf(total);
  if (!factor) return found;
  float scale = -*factor / total, hit = *factor + scale * __builtin_expf(T::one(x[target]) - top);
  for (i = 0; i < whole; i += 16) T::store(x + i, mul(fload(e + i), fset(scale)));
  for (; i < vocabulary; ++i) x[i] = T::put(rest[i - whole] * scale);
  x[target] = T::put(hit);
  return found;
}

template <class T>
void unpack4_values(const uint8_t* codes, const float* scales, const float* table, int64_t block, int64_t begin,
                    int64_t end, void* out) {
  using V = typename T::V;
  float pairs[512];
  for (int c = 0; c < 256; ++c) {
    pairs[2 * c] = table[c >> 4];
    pairs[2 * c + 1] = table[c & 15];
  }
  for (int64_t i = begin; i < end; i += 32) {
    float t[32] = {};
    int64_t left = end - i < 32 ? end - i : 32;
    for (int64_t j = 0; j < left; j += 2) __builtin_memcpy(t + j, pairs + 2 * codes[(i + j) / 2], 8);
    float size = __builtin_fabsf(scales[i / block]);
    F scale = fset(scales[i / block]);
    fstore(t, mul(fload(t), scale));
    fstore(t + 16, mul(fload(t + 16), scale));
    if (left == 32 && (size >= 1e-30f || size == 0)) {
      T::store((V*)out + i, fload(t));
      T::store((V*)out + i + 16, fload(t + 16));
    } else {  // the instruction behind store makes the smallest numbers 0
      for (int64_t j = 0; j < left; ++j) ((V*)out)[i + j] = T::put(t[j]);
    }
  }
}

#ifdef __AVX512BF16__
// clang-format off: the second is written over the first
#include "kernels/gemm_bf16.inl"
#include "kernels/attention_varlen.inl"
// clang-format on
#else
constexpr ProductKernels PRODUCTS = {nullptr, nullptr};
constexpr auto texts_forward_bf16 = texts_forward<Half>;
constexpr auto texts_backward_bf16 = texts_backward<Half>;
#endif

#define EITHER(function, ...) (t == Real::F32 ? function<Wide>(__VA_ARGS__) : function<Half>(__VA_ARGS__))

void train_norm(Real t, const Norm& n, int64_t a, int64_t b, void* out) { EITHER(norm_rows, n, a, b, out); }
void train_norm_grad(Real t, const Norm& n, const NormGrad& g, int64_t a, int64_t b) {
  EITHER(norm_grad_rows, n, g, a, b);
}
void train_swiglu(Real t, const void* gate, const void* up, int64_t a, int64_t b, void* out) {
  EITHER(swiglu_values, gate, up, a, b, out);
}
void train_swiglu_grad(Real t, const void* gate, const void* up, const void* grad, int64_t a, int64_t b, void* to_gate,
                       void* to_up, void* product) {
  EITHER(swiglu_grad_values, gate, up, grad, a, b, to_gate, to_up, product);
}
void train_texts(Real t, const Texts& x, const TextsOut& to, int64_t a, int64_t b, int64_t head, float* s) {
  t == Real::F32 ? texts_forward<Wide>(x, to, a, b, head, s) : texts_forward_bf16(x, to, a, b, head, s);
}
void train_texts_grad(Real t, const Texts& x, const TextsGrad& g, int64_t a, int64_t b, int64_t head, float* s) {
  t == Real::F32 ? texts_backward<Wide>(x, g, a, b, head, s) : texts_backward_bf16(x, g, a, b, head, s);
}
void train_drop(Real t, const void* x, const Dropout& d, const void* added, int64_t a, int64_t b, void* out) {
  EITHER(drop_values, x, d, added, a, b, out);
}
float train_log_prob(Real t, void* logits, int64_t v, int64_t target, const float* factor, float* s) {
  return EITHER(log_prob_row, logits, v, target, factor, s);
}
void train_unpack4(Real t, const uint8_t* codes, const float* scales, const float* table, int64_t block, int64_t a,
                   int64_t b, void* out) {
  EITHER(unpack4_values, codes, scales, table, block, a, b, out);
}

constexpr TrainKernels TRAIN = {train_norm,       train_norm_grad, train_swiglu,   train_swiglu_grad, train_texts,
                                train_texts_grad, train_drop,      train_log_prob, train_unpack4,     PRODUCTS};
