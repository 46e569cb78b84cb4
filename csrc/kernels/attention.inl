// Included once per instruction set, inside an anonymous namespace: attention over paged keys and values.
// Rows are (token, query head of the group): all heads that share a kv head read its pages once.

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

// Pages in the order they are read: the keys of one step, its values, the keys and values of the next.
struct Reading {
  static constexpr int STEP = ATT_KEYS / PAGE;
  const uint8_t* page[4 * STEP];
  int keys = 0;  // of the step at hand

  Reading(const KvLayer& kv, const AttentionTask& t, int64_t k0, int64_t end) {
    keys = (int)(end - k0 < ATT_KEYS ? end - k0 : ATT_KEYS);
    int64_t first = k0 / PAGE, last = (end - 1) / PAGE;
    for (int j = 0; j < 4 * STEP; ++j) {
      int64_t index = first + j % STEP + j / (2 * STEP) * STEP;
      int32_t number = t.table[index < last ? index : last];
      page[j] = j / STEP % 2 ? kv.value_page(t.kv_head, number) : kv.key_page(t.kv_head, number);
    }
  }
};

template <class T, int R>
void attend_rows(const KvLayer& kv, const AttentionTask& t, int row0, int rows, float* scratch) {
  constexpr int TOGETHER = R == 1 ? 2 : 1;  // pages whose scores are summed at once
  int64_t width = kv.width, wide = kv.wide();
  float *q = scratch, *o = q + R * wide, *s = o + R * wide;
  float top[R], total[R];
  int64_t limit[R], keys = 0;
  for (int r = 0; r < R; ++r) {
    int row = row0 + (r < rows ? r : rows - 1), token = row / t.group, head = row % t.group;
    for (int64_t d = 0; d < wide; ++d)
      q[r * wide + d] = d < width ? t.q[token * t.ldq + head * width + d] * t.scale : 0.0f;
    for (int64_t d = 0; d < wide; ++d) o[r * wide + d] = 0;
    top[r] = -1e30f;
    total[r] = 0;
    limit[r] = t.first + token + 1;
    if (limit[r] > keys) keys = limit[r];
  }
  uint8_t *bytes = (uint8_t*)(s + R * ATT_KEYS), *rest = bytes + R * int8_query(width);
  auto query = T::template prepare<R>(q, wide, width, bytes);
  for (int64_t k0 = 0; k0 < keys; k0 += ATT_KEYS) {
    Reading read(kv, t, k0, keys);
    int j = 0, pages = (read.keys + PAGE - 1) / PAGE;
    for (; j + TOGETHER <= pages; j += TOGETHER)
      T::template scores<R, TOGETHER>(read.page + j, read.page + j + T::AHEAD, width, query, s + PAGE * j);
    for (; j < pages; ++j)
      T::template scores<R, 1>(read.page + j, read.page + j + T::AHEAD, width, query, s + PAGE * j);
    for (int r = 0; r < R; ++r) {
      int64_t left = limit[r] - k0;
      softmax_step(s + r * ATT_KEYS,
                   left < 0          ? 0
                   : left < ATT_KEYS ? (int)left
                                     : ATT_KEYS,
                   top + r, total + r, o + r * wide, wide);
    }
    T::template weigh<R>(read.page + Reading::STEP, read.page + Reading::STEP + T::AHEAD, read.keys, wide, s, o, rest);
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
    else if (n == 3) attend_rows<T, 3>(kv, t, r, n, scratch);
    else if (n == 4) attend_rows<T, 4>(kv, t, r, n, scratch);
    else attend_rows<T, 8>(kv, t, r, n, scratch);
  }
}

void attention(const KvLayer& kv, const AttentionTask& task, float* scratch) {
  if (kv.type == KvType::F32) attend<KvF32>(kv, task, scratch);
  else if (kv.type == KvType::BF16) attend<KvBF16>(kv, task, scratch);
  else attend<KvI8>(kv, task, scratch);
}
