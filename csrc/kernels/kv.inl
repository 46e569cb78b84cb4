// Included once per instruction set, inside an anonymous namespace: keys and values as they lie in a page.
//
// A family of formats with one interface, everything about one (kv head, page):
// float32: keys [width][16], values [16][wide]. bfloat16: words of two channels [width/2][16] and of two positions
// [8][wide], which one shift and one mask turn into floats. int8: first bfloat16 scales [groups of 32 channels][16],
// then keys [width/4][16][4] stored +128 and values [4][wide][4]: every line is one dot instruction with 4 broadcast
// bytes. Queries and weights then have 15 bits in two bytes, so that the rounding of keys and values is the whole
// error.
//
// ahead: where the page lies that is read some 8 kB later; its lines are fetched one for each line worked on.

INLINE void fetch(const uint8_t* p, int64_t at) { prefetch_far(p + at); }

struct KvF32 {
  static constexpr int AHEAD = 1;  // pages

  static void store(const float* k, const float* v, int64_t d, int64_t width, int64_t wide, uint8_t* key,
                    uint8_t* value, int slot) {
    for (int64_t i = 0; i < GROUP && d + i < width; ++i) ((float*)key)[(d + i) * PAGE + slot] = k[i];
    for (int64_t i = 0; i < GROUP && d + i < wide; ++i) ((float*)value)[slot * wide + d + i] = v[i];
  }

  template <int R>
  struct Query {
    const float* q;
    int64_t ld;
  };
  template <int R>
  INLINE Query<R> prepare(const float* q, int64_t wide, int64_t, uint8_t*) {
    return {q, wide};
  }

  template <int R, int P>
  INLINE void scores(const uint8_t* const* keys, const uint8_t* const* ahead, int64_t width, const Query<R>& query,
                     float* s) {
    UNROLLED(2, p, P) page_scores<R>(keys[p], ahead[p], width, query, s + p * PAGE);
  }

  template <int R>
  INLINE void page_scores(const uint8_t* key, const uint8_t* ahead, int64_t width, const Query<R>& query, float* s) {
    F acc[2][R];
    UNROLLED(8, r, R) acc[0][r] = acc[1][r] = fzero();
    for (int64_t d = 0; d < width; d += 2)
      UNROLLED(2, u, 2) {
        fetch(ahead, (d + u) * 64);
        F k = fload((const float*)key + (d + u) * PAGE);
        UNROLLED(8, r, R) acc[u][r] = fma(k, fset(query.q[r * query.ld + d + u]), acc[u][r]);
      }
    UNROLLED(8, r, R) fstore(s + r * ATT_KEYS, add(acc[0][r], acc[1][r]));
  }

  template <int R, int NV>
  INLINE void part(const uint8_t* const* pages, const uint8_t* const* ahead, int keys, int64_t wide, int64_t d,
                   const float* p, float* o) {
    F acc[R][NV];
    UNROLLED(8, r, R)
      UNROLLED(8, v, NV) acc[r][v] = fload(o + r * wide + d + 16 * v);
    for (int key = 0; key < keys; ++key) {
      int64_t at = ((key % PAGE) * wide + d) * 4;
      F x[NV];
      UNROLLED(8, v, NV) {
        fetch(ahead[key / PAGE], at + 64 * v);
        x[v] = fload((const float*)(pages[key / PAGE] + at) + 16 * v);
      }
      UNROLLED(8, r, R) {
        F w = fset(p[r * ATT_KEYS + key]);
        UNROLLED(8, v, NV) acc[r][v] = fma(x[v], w, acc[r][v]);
      }
    }
    UNROLLED(8, r, R)
      UNROLLED(8, v, NV) fstore(o + r * wide + d + 16 * v, acc[r][v]);
  }

  template <int R>
  INLINE void weigh(const uint8_t* const* pages, const uint8_t* const* ahead, int keys, int64_t wide, const float* p,
                    float* o, uint8_t*) {
    constexpr int NV = R == 8 ? 2 : R >= 3 ? 4 : 8;
    int64_t d = 0;
    for (; d + 16 * NV <= wide; d += 16 * NV) part<R, NV>(pages, ahead, keys, wide, d, p, o);
    for (; d < wide; d += 16) part<R, 1>(pages, ahead, keys, wide, d, p, o);
  }
};

struct KvBF16 {
  static constexpr int AHEAD = 2;

  static void store(const float* k, const float* v, int64_t d, int64_t width, int64_t wide, uint8_t* key,
                    uint8_t* value, int slot) {
    uint16_t* row = (uint16_t*)value + ((slot / 2) * wide + d) * 2 + slot % 2;
    uint16_t hk[GROUP], hv[GROUP];
    for (int i = 0; i < GROUP; i += 16) {
      store_bf16(hk + i, fload(k + i));
      store_bf16(hv + i, fload(v + i));
    }
    for (int64_t i = 0; i < GROUP && d + i < width; i += 2) __builtin_memcpy(key + (d + i) * 32 + slot * 4, hk + i, 4);
    for (int64_t i = 0; i < GROUP && d + i < wide; ++i) row[2 * i] = hv[i];
  }

  template <int R>
  using Query = KvF32::Query<R>;
  template <int R>
  INLINE Query<R> prepare(const float* q, int64_t wide, int64_t, uint8_t*) {
    return {q, wide};
  }

  // Independent sums, a multiplication takes four cycles, are those of several pages and never parts of one score: a
  // score is summed in one order whichever rows are computed beside it.
  template <int R, int P>
  INLINE void scores(const uint8_t* const* keys, const uint8_t* const* ahead, int64_t width, const Query<R>& query,
                     float* s) {
    F even[P][R], odd[P][R];
    const uint8_t *key[P], *next[P];
    UNROLLED(2, p, P) {
      key[p] = keys[p];
      next[p] = ahead[p];
    }
    UNROLLED(2, p, P)
      UNROLLED(8, r, R) even[p][r] = odd[p][r] = fzero();
    for (int64_t d = 0; d < width; d += 2)
      UNROLLED(2, p, P) {
        fetch(next[p], d * 32);
        F2 k = load_pairs(key[p] + d * 32);
        UNROLLED(8, r, R) {
          even[p][r] = fma(k.a, fset(query.q[r * query.ld + d]), even[p][r]);
          odd[p][r] = fma(k.b, fset(query.q[r * query.ld + d + 1]), odd[p][r]);
        }
      }
    UNROLLED(2, p, P)
      UNROLLED(8, r, R) fstore(s + p * PAGE + r * ATT_KEYS, add(even[p][r], odd[p][r]));
  }

  template <int R, int NV>
  INLINE void part(const uint8_t* const* pages, const uint8_t* const* ahead, int keys, int64_t wide, int64_t d,
                   const float* p, float* o) {
    F acc[R][NV];
    UNROLLED(8, r, R)
      UNROLLED(8, v, NV) acc[r][v] = fload(o + r * wide + d + 16 * v);
    int key = 0;
    for (; key + 2 <= keys; key += 2) {
      int64_t at = ((key % PAGE / 2) * wide + d) * 4;
      F2 x[NV];
      UNROLLED(8, v, NV) {
        fetch(ahead[key / PAGE], at + 64 * v);
        x[v] = load_pairs(pages[key / PAGE] + at + 64 * v);
      }
      UNROLLED(8, r, R) {
        F w0 = fset(p[r * ATT_KEYS + key]), w1 = fset(p[r * ATT_KEYS + key + 1]);
        UNROLLED(8, v, NV) acc[r][v] = fma(x[v].b, w1, fma(x[v].a, w0, acc[r][v]));
      }
    }
    if (key < keys)  // the other half of the word is not written yet: it may hold anything
      UNROLLED(8, v, NV) {
        F x = load_pairs(pages[key / PAGE] + ((key % PAGE / 2) * wide + d) * 4 + 64 * v).a;
        UNROLLED(8, r, R) acc[r][v] = fma(x, fset(p[r * ATT_KEYS + key]), acc[r][v]);
      }
    UNROLLED(8, r, R)
      UNROLLED(8, v, NV) fstore(o + r * wide + d + 16 * v, acc[r][v]);
  }

  template <int R>
  INLINE void weigh(const uint8_t* const* pages, const uint8_t* const* ahead, int keys, int64_t wide, const float* p,
                    float* o, uint8_t*) {
    constexpr int NV = R == 8 ? 2 : R >= 3 ? 4 : 8;
    int64_t d = 0;
    for (; d + 16 * NV <= wide; d += 16 * NV) part<R, NV>(pages, ahead, keys, wide, d, p, o);
    for (; d < wide; d += 16) part<R, 1>(pages, ahead, keys, wide, d, p, o);
  }
};

// x in -127*128 .. 127*128, a whole number, as 128 * high + low
INLINE void two_digits(F x, F shift, int8_t* high, int8_t* low) {
  F h = round_(mul(sub(x, shift), fset(1.0f / 128)));
  store_s8(high, h);
  store_s8(low, fma(h, fset(-128.0f), x));
}
constexpr float FINE = 127 * 128, TINY = 1e-30f;  // below TINY all is 0: its inverse has no float

struct KvI8 {
  static constexpr int AHEAD = 4;

  // The scale is rounded to bfloat16, upwards, before the values are divided by it: no value clips.
  INLINE float scale_of(F a, F b, uint8_t* to) {
    uint32_t bits;
    float s = hmax(fmax_(fabs_(a), fabs_(b))) * (1.0f / 127);
    __builtin_memcpy(&bits, &s, 4);
    bits = (bits + 0xffff) >> 16;
    uint16_t half = (uint16_t)bits;
    __builtin_memcpy(to, &half, 2);
    bits <<= 16;
    __builtin_memcpy(&s, &bits, 4);
    return s > TINY ? 1.0f / s : 0.0f;
  }

  INLINE void eight_bits(const float* x, uint8_t* scale, int8_t* q) {
    F a = fload(x), b = fload(x + 16), inverse = fset(scale_of(a, b, scale));
    store_s8(q, mul(a, inverse));
    store_s8(q + 16, mul(b, inverse));
  }

  static void store(const float* k, const float* v, int64_t d, int64_t width, int64_t wide, uint8_t* key,
                    uint8_t* value, int slot) {
    int64_t header = kv_scales(width);
    int8_t qk[GROUP], qv[GROUP];
    eight_bits(k, key + d + slot * 2, qk);
    eight_bits(v, value + d + slot * 2, qv);
    for (int i = 0; i < GROUP; ++i) qk[i] = (int8_t)(qk[i] ^ 0x80);
    for (int64_t i = 0; i < GROUP && d + i < width; i += 4)
      __builtin_memcpy(key + header + (d + i) * 16 + slot * 4, qk + i, 4);
    uint8_t* row = value + header + ((slot / 4) * wide + d) * 4 + slot % 4;
    for (int64_t i = 0; i < GROUP && d + i < wide; ++i) row[4 * i] = (uint8_t)qv[i];
  }

  template <int R>
  struct Query {
    const int8_t* q;     // [group][high, low][8][R][4]
    const float* scale;  // [group][R]
    const int32_t* neg;  // [group][high, low][R]: -128 times the sum, for keys stored +128
  };

  template <int R>
  INLINE Query<R> prepare(const float* q, int64_t wide, int64_t width, uint8_t* scratch) {
    int64_t groups = (width + GROUP - 1) / GROUP;
    float* scale = (float*)scratch;
    int32_t* neg = (int32_t*)(scale + groups * R);
    int8_t* to = (int8_t*)(neg + groups * 2 * R);
    for (int64_t g = 0; g < groups; ++g)
      for (int r = 0; r < R; ++r) {
        const float* x = q + r * wide + g * GROUP;
        F v[2] = {fload(x), g * GROUP + 16 < wide ? fload(x + 16) : fzero()};
        float top = hmax(fmax_(fabs_(v[0]), fabs_(v[1])));
        F inverse = fset(top > TINY ? FINE / top : 0.0f);
        int8_t digits[2][GROUP];
        for (int i = 0; i < 2; ++i)
          two_digits(round_(mul(v[i], inverse)), fzero(), digits[0] + 16 * i, digits[1] + 16 * i);
        for (int part = 0; part < 2; ++part) {
          int32_t sum = 0;
          for (int i = 0; i < GROUP; ++i) sum += digits[part][i];
          neg[(g * 2 + part) * R + r] = -128 * sum;
          for (int j = 0; j < 8; ++j)
            __builtin_memcpy(to + (((g * 2 + part) * 8 + j) * R + r) * 4, digits[part] + 4 * j, 4);
        }
        scale[g * R + r] = top * (1.0f / FINE);
      }
    return {to, scale, neg};
  }

  template <int R, int P>
  INLINE void scores(const uint8_t* const* keys, const uint8_t* const* ahead, int64_t width, const Query<R>& query,
                     float* s) {
    UNROLLED(2, p, P) page_scores<R>(keys[p], ahead[p], width, query, s + p * PAGE);
  }

  template <int R>
  INLINE void page_scores(const uint8_t* key, const uint8_t* ahead, int64_t width, const Query<R>& query, float* s) {
    F acc[R];
    UNROLLED(8, r, R) acc[r] = fzero();
    int64_t lines = (width + 3) / 4, header = kv_scales(width);
    fetch(ahead, 0);
    for (int64_t g = 0; g * 8 < lines; ++g) {
      const uint8_t* at = key + header + g * 512;
      const int8_t* q = query.q + g * 64 * R;
      int count = (int)(lines - g * 8 < 8 ? lines - g * 8 : 8);
      D8 high[R], low[R];
      UNROLLED(8, r, R) {
        high[r] = d8_begin(iload1(query.neg + g * 2 * R + r));
        low[r] = d8_begin(iload1(query.neg + (g * 2 + 1) * R + r));
      }
      for (int j = 0; j < count; ++j) {
        fetch(ahead, header + g * 512 + j * 64);
        B w = bload(at + j * 64);
        UNROLLED(8, r, R) {
          high[r] = d8_dot(high[r], w, q + (j * R + r) * 4);
          low[r] = d8_dot(low[r], w, q + ((8 + j) * R + r) * 4);
        }
      }
      F scale = load_bf16(key + g * 32);
      UNROLLED(8, r, R) {
        F sum = fma(cvt(d8_end(high[r])), fset(128.0f), cvt(d8_end(low[r])));
        acc[r] = fma(sum, mul(scale, fset(query.scale[g * R + r])), acc[r]);
      }
    }
    UNROLLED(8, r, R) fstore(s + r * ATT_KEYS, acc[r]);
  }

  // p times the values' scales of one group, in two digits 0..127: [high, low][64]; returns the scale
  INLINE float weights(const uint8_t* const* pages, int keys, int64_t group, const float* p, int8_t* to) {
    F w[ATT_KEYS / PAGE], top = fzero();
    UNROLLED(4, j, ATT_KEYS / PAGE) {
      int left = keys - j * PAGE;
      w[j] = left <= 0 ? fzero() : mul(fload(p + PAGE * j), load_bf16(pages[j] + group * 32));
      if (0 < left && left < PAGE) {  // scales of positions that are not written yet may be anything
        float t[PAGE];
        fstore(t, w[j]);
        for (int i = left; i < PAGE; ++i) t[i] = 0;
        w[j] = fload(t);
      }
      top = fmax_(top, w[j]);
    }
    float most = hmax(top);
    F inverse = fset(most > TINY ? FINE / most : 0.0f);
    UNROLLED(4, j, ATT_KEYS / PAGE)
      two_digits(round_(mul(w[j], inverse)), fset(63.5f), to + PAGE * j, to + ATT_KEYS + PAGE * j);
    return most * (1.0f / FINE);
  }

  // digits: [group][R][high, low][64], scale: [group][R]; 16 * NV channels from d on
  template <int R, int NV>
  INLINE void part(const uint8_t* const* pages, const uint8_t* const* ahead, int keys, int64_t wide, int64_t d,
                   const int8_t* digits, const float* scale, float* o) {
    constexpr int ROW = 2 * ATT_KEYS;
    I high[R][NV], low[R][NV];
    UNROLLED(8, r, R)
      UNROLLED(8, v, NV) high[r][v] = low[r][v] = izero();
    for (int key = 0; key < keys; key += 4) {
      int64_t line = kv_scales(wide) + ((key % PAGE / 4) * wide + d) * 4;
      UNROLLED(8, v, NV) {
        fetch(ahead[key / PAGE], line + 64 * v);
        B x = bload(pages[key / PAGE] + line + 64 * v);
        UNROLLED(8, r, R) {
          const int8_t* w = digits + ((d + 16 * v) / GROUP * R + r) * ROW + key;
          high[r][v] = weight_dot(high[r][v], x, w);
          low[r][v] = weight_dot(low[r][v], x, w + ATT_KEYS);
        }
      }
    }
    UNROLLED(8, r, R)
      UNROLLED(8, v, NV) {
        float* to = o + r * wide + d + 16 * v;
        F sum = fma(cvt(high[r][v]), fset(128.0f), cvt(low[r][v]));
        fstore(to, fma(sum, fset(scale[(d + 16 * v) / GROUP * R + r]), fload(to)));
      }
  }

  template <int R>
  INLINE void weigh(const uint8_t* const* pages, const uint8_t* const* ahead, int keys, int64_t wide, const float* p,
                    float* o, uint8_t* scratch) {
    constexpr int NV = R == 1 ? 8 : R == 2 ? 4 : R <= 4 ? 2 : 1;
    int64_t groups = (wide + GROUP - 1) / GROUP, d = 0;
    float* scale = (float*)scratch;
    int8_t* digits = (int8_t*)(scale + groups * R);
    for (int64_t g = 0; g < groups; ++g)
      for (int r = 0; r < R; ++r)
        scale[g * R + r] = weights(pages, keys, g, p + r * ATT_KEYS, digits + (g * R + r) * 2 * ATT_KEYS);
    for (; d + 16 * NV <= wide; d += 16 * NV) part<R, NV>(pages, ahead, keys, wide, d, digits, scale, o);
    for (; d < wide; d += 16) part<R, 1>(pages, ahead, keys, wide, d, digits, scale, o);
  }
};

template <class T>
void store_position(const KvLayer& kv, const float* k, const float* v, uint8_t* key, uint8_t* value, int slot) {
  int64_t width = kv.width, wide = kv.wide(), d = 0;
  for (; d + GROUP <= width; d += GROUP) T::store(k + d, v + d, d, width, wide, key, value, slot);
  if (d < width) {
    float tail[2][GROUP] = {};
    __builtin_memcpy(tail[0], k + d, (width - d) * 4);
    __builtin_memcpy(tail[1], v + d, (width - d) * 4);
    T::store(tail[0], tail[1], d, width, wide, key, value, slot);
  }
}

void kv_store(const KvLayer& kv, const float* k, const float* v, int64_t head, int32_t page, int slot) {
  uint8_t *key = kv.key_page(head, page), *value = kv.value_page(head, page);
  if (kv.type == KvType::F32) store_position<KvF32>(kv, k, v, key, value, slot);
  else if (kv.type == KvType::BF16) store_position<KvBF16>(kv, k, v, key, value, slot);
  else store_position<KvI8>(kv, k, v, key, value, slot);
}
