// Included once per instruction set, inside an anonymous namespace: attention over paged keys and values.
// Rows are (token, query head of the group): all heads that share a kv head read its pages once.

struct KvF32 {
  static constexpr int BYTES = 4;
  INLINE F load(const uint8_t* p) { return fload((const float*)p); }
};
struct KvBF16 {
  static constexpr int BYTES = 2;
  INLINE F load(const uint8_t* p) { return load_bf16(p); }
};

template <class T, int R>
INLINE void scores(const uint8_t* key, int64_t width, const float* q, int64_t ldq, float* s) {
  constexpr int U = R == 1 ? 4 : R == 2 ? 2 : 1;
  F acc[U][R];
  UNROLL(8) for (int u = 0; u < U; ++u)
    UNROLL(8) for (int r = 0; r < R; ++r) acc[u][r] = fzero();
  int64_t d = 0;
  for (; d + U <= width; d += U)
    UNROLL(8) for (int u = 0; u < U; ++u) {
      F k = T::load(key + (d + u) * PAGE * T::BYTES);
      UNROLL(8) for (int r = 0; r < R; ++r) acc[u][r] = fma(k, fset(q[r * ldq + d + u]), acc[u][r]);
    }
  for (; d < width; ++d) {
    F k = T::load(key + d * PAGE * T::BYTES);
    UNROLL(8) for (int r = 0; r < R; ++r) acc[0][r] = fma(k, fset(q[r * ldq + d]), acc[0][r]);
  }
  UNROLL(8) for (int r = 0; r < R; ++r) {
    for (int u = 1; u < U; ++u) acc[0][r] = add(acc[0][r], acc[u][r]);
    fstore(s + r * ATT_KEYS, acc[0][r]);
  }
}

template <class T, int R, int NV>
INLINE void weigh(const uint8_t* const* pages, int keys, int64_t wide, int64_t d, const float* p, float* o, int64_t ldo) {
  F acc[R][NV];
  UNROLL(8) for (int r = 0; r < R; ++r)
    UNROLL(8) for (int v = 0; v < NV; ++v) acc[r][v] = fload(o + r * ldo + d + 16 * v);
  for (int key = 0; key < keys; ++key) {
    const uint8_t* row = pages[key / PAGE] + ((key % PAGE) * wide + d) * T::BYTES;
    F x[NV];
    UNROLL(8) for (int v = 0; v < NV; ++v) x[v] = T::load(row + 16 * v * T::BYTES);
    UNROLL(8) for (int r = 0; r < R; ++r) {
      F w = fset(p[r * ATT_KEYS + key]);
      UNROLL(8) for (int v = 0; v < NV; ++v) acc[r][v] = fma(x[v], w, acc[r][v]);
    }
  }
  UNROLL(8) for (int r = 0; r < R; ++r)
    UNROLL(8) for (int v = 0; v < NV; ++v) fstore(o + r * ldo + d + 16 * v, acc[r][v]);
}

// exp(s - running maximum) over one row of 64 scores; visible: how many of them the row may see.
INLINE void softmax_step(float* s, int visible, float* top, float* total, float* o, int64_t wide) {
  for (int i = visible; i < ATT_KEYS; ++i) s[i] = -1e30f;
  F v[4];
  for (int u = 0; u < 4; ++u) v[u] = fload(s + 16 * u);
  float peak = hmax(fmax_(fmax_(v[0], v[1]), fmax_(v[2], v[3])));
  if (peak > *top) {
    float old = *top > -1e29f ? __builtin_expf(*top - peak) : 0.0f;
    for (int64_t d = 0; d < wide; d += 16) fstore(o + d, mul(fload(o + d), fset(old)));
    *total *= old;
    *top = peak;
  }
  for (int u = 0; u < 4; ++u) fstore(s + 16 * u, exp_(sub(v[u], fset(*top))));
  for (int i = visible; i < ATT_KEYS; ++i) s[i] = 0;
  *total += hsum(add(add(fload(s), fload(s + 16)), add(fload(s + 32), fload(s + 48))));
}

template <class T, int R>
void attend_rows(const KvLayer& kv, const AttentionTask& t, int row0, int rows, float* scratch) {
  int64_t width = kv.width, wide = kv.wide();
  float *q = scratch, *o = q + R * wide, *s = o + R * wide;
  float top[R], total[R];
  int64_t limit[R], keys = 0;
  UNROLL(8) for (int r = 0; r < R; ++r) {
    int row = row0 + (r < rows ? r : rows - 1), token = row / t.group, head = row % t.group;
    for (int64_t d = 0; d < width; ++d) q[r * wide + d] = t.q[token * t.ldq + head * width + d] * t.scale;
    for (int64_t d = 0; d < wide; ++d) o[r * wide + d] = 0;
    top[r] = -1e30f;
    total[r] = 0;
    limit[r] = t.first + token + 1;
    if (limit[r] > keys) keys = limit[r];
  }
  for (int64_t k0 = 0; k0 < keys; k0 += ATT_KEYS) {
    int now = (int)(keys - k0 < ATT_KEYS ? keys - k0 : ATT_KEYS), pages = (now + PAGE - 1) / PAGE;
    const uint8_t* value[ATT_KEYS / PAGE];
    for (int j = 0; j < pages; ++j) {
      int32_t page = t.table[k0 / PAGE + j];
      value[j] = kv.value_page(t.kv_head, page);
      scores<T, R>(kv.key_page(t.kv_head, page), width, q, wide, s + PAGE * j);
    }
    UNROLL(8) for (int r = 0; r < R; ++r) {
      int64_t left = limit[r] - k0;
      softmax_step(s + r * ATT_KEYS, left < 0 ? 0 : left < ATT_KEYS ? (int)left : ATT_KEYS, top + r, total + r,
                   o + r * wide, wide);
    }
    int64_t d = 0;
    constexpr int NV = R == 8 ? 2 : R == 4 ? 4 : 8;
    for (; d + 16 * NV <= wide; d += 16 * NV) weigh<T, R, NV>(value, now, wide, d, s, o, wide);
    for (; d < wide; d += 16) weigh<T, R, 1>(value, now, wide, d, s, o, wide);
  }
  for (int r = 0; r < rows; ++r) {
    int row = row0 + r;
    float* out = t.out + (row / t.group) * t.ldo + (row % t.group) * width;
    float inverse = 1.0f / total[r];
    for (int64_t d = 0; d < width; ++d) out[d] = o[r * wide + d] * inverse;
  }
}

template <class T>
void attend(const KvLayer& kv, const AttentionTask& t, float* scratch) {
  int rows = t.tokens * t.group;
  for (int r = 0; r < rows; r += ATT_ROWS) {
    int n = rows - r < ATT_ROWS ? rows - r : ATT_ROWS;
    if (n == 1) attend_rows<T, 1>(kv, t, r, n, scratch);
    else if (n == 2) attend_rows<T, 2>(kv, t, r, n, scratch);
    else if (n <= 4) attend_rows<T, 4>(kv, t, r, n, scratch);
    else attend_rows<T, 8>(kv, t, r, n, scratch);
  }
}

void attention(const KvLayer& kv, const AttentionTask& task, float* scratch) {
  if (kv.type == KvType::F32) attend<KvF32>(kv, task, scratch);
  else attend<KvBF16>(kv, task, scratch);
}

void kv_store(const KvLayer& kv, const float* k, const float* v, int64_t head, int32_t page, int slot) {
  int64_t width = kv.width, wide = kv.wide();
  uint8_t *kp = kv.key_page(head, page), *vp = kv.value_page(head, page);
  if (kv.type == KvType::F32) {
    for (int64_t d = 0; d < width; ++d) ((float*)kp)[d * PAGE + slot] = k[d];
    float* row = (float*)vp + slot * wide;
    for (int64_t d = 0; d < wide; ++d) row[d] = d < width ? v[d] : 0.0f;
    return;
  }
  for (int64_t d0 = 0; d0 < wide; d0 += 16) {
    float tk[16] = {}, tv[16] = {};
    uint16_t hk[16], hv[16];
    for (int64_t d = d0; d < width && d < d0 + 16; ++d) { tk[d - d0] = k[d]; tv[d - d0] = v[d]; }
    store_bf16(hk, fload(tk));
    store_bf16(hv, fload(tv));
    for (int64_t d = d0; d < width && d < d0 + 16; ++d) ((uint16_t*)kp)[d * PAGE + slot] = hk[d - d0];
    __builtin_memcpy((uint16_t*)vp + slot * wide + d0, hv, 32);
  }
}
