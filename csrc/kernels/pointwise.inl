// Included once per instruction set, inside an anonymous namespace: norm, rotation, activations in every form.

INLINE F exp_(F x) {  // relative error about 1e-7; below -87 the result is 1.6e-38 rather than 0
  x = fmax_(fset(-87.0f), sub(fzero(), fmax_(sub(fzero(), x), fset(-88.0f))));
  F n = round_(mul(x, fset(1.44269504088896341f)));
  F r = fma(n, fset(-0.693359375f), x);
  r = fma(n, fset(2.12194440e-4f), r);
  F p = fset(1.9875691500e-4f);
  p = fma(p, r, fset(1.3981999507e-3f));
  p = fma(p, r, fset(8.3334519073e-3f));
  p = fma(p, r, fset(4.1665795894e-2f));
  p = fma(p, r, fset(1.6666665459e-1f));
  p = fma(p, r, fset(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, fset(1.0f)));
  return pow2(p, n);
}

INLINE F silu(F x) { return divide(x, add(fset(1.0f), exp_(sub(fzero(), x)))); }

void rmsnorm(const float* x, const float* weight, float eps, int64_t k, float* out) {
  F s[4] = {fzero(), fzero(), fzero(), fzero()};
  int64_t i = 0;
  for (; i + 64 <= k; i += 64)
    for (int u = 0; u < 4; ++u) {
      F v = fload(x + i + 16 * u);
      s[u] = fma(v, v, s[u]);
    }
  for (; i + 16 <= k; i += 16) {
    F v = fload(x + i);
    s[0] = fma(v, v, s[0]);
  }
  float total = hsum(add(add(s[0], s[1]), add(s[2], s[3])));
  for (; i < k; ++i) total += x[i] * x[i];
  float r = 1.0f / __builtin_sqrtf(total / (float)k + eps);
  for (i = 0; i + 16 <= k; i += 16) fstore(out + i, mul(mul(fload(x + i), fset(r)), fload(weight + i)));
  for (; i < k; ++i) out[i] = x[i] * r * weight[i];
}

void rope(float* x, const float* cos, const float* sin, int64_t heads, int64_t width) {
  int64_t half = width / 2;
  for (int64_t h = 0; h < heads; ++h, x += width) {
    int64_t i = 0;
    for (; i + 16 <= half; i += 16) {
      F a = fload(x + i), b = fload(x + half + i), c = fload(cos + i), s = fload(sin + i);
      fstore(x + i, sub(mul(a, c), mul(b, s)));
      fstore(x + half + i, add(mul(b, c), mul(a, s)));
    }
    for (; i < half; ++i) {
      float a = x[i], b = x[half + i];
      x[i] = a * cos[i] - b * sin[i];
      x[half + i] = b * cos[i] + a * sin[i];
    }
  }
}

struct QuantRow {  // where the group `g` of one row of an int8 or int24 block goes
  int8_t* q;       // the dwords of 4 values land 4 * mr bytes apart
  float *scale, *sum;
  int32_t *negsum, *negsum16;
  int mr;
};

INLINE QuantRow quant_row(const Acts& to, int64_t base, int lane, int mr) {
  int64_t kp = padded(to.k), at = base * (kp / GROUP) + lane;
  return {to.q + base * kp + lane * 4,
          to.scale + at,
          to.sum + at,
          to.negsum + at,
          to.negsum16 + 2 * base * (kp / GROUP) + lane,
          mr};
}

INLINE void put_group(const QuantRow& r, int64_t g, F a, F b, float scale) {  // a, b: 32 rounded values
  int8_t t[GROUP];
  store_s8(t, a);
  store_s8(t + 16, b);
  for (int j = 0; j < 8; ++j) __builtin_memcpy(r.q + (g * 8 + j) * r.mr * 4, t + 4 * j, 4);
  int32_t sa = (int32_t)hsum(a), sb = (int32_t)hsum(b);
  r.scale[g * r.mr] = scale;
  r.sum[g * r.mr] = scale * (float)(sa + sb);
  r.negsum[g * r.mr] = -128 * (sa + sb);
  r.negsum16[2 * g * r.mr] = -128 * sa;
  r.negsum16[(2 * g + 1) * r.mr] = -128 * sb;
}

// The group, zeros past k; its largest size.
INLINE float group_of(const float* row, int64_t k, int64_t g, F* a, F* b) {
  float pad[GROUP];
  const float* x = row + g * GROUP;
  int64_t left = k - g * GROUP;
  if (left < GROUP) {
    for (int i = 0; i < GROUP; ++i) pad[i] = i < left ? x[i] : 0.0f;
    x = pad;
  }
  *a = fload(x);
  *b = fload(x + 16);
  return hmax(fmax_(fabs_(*a), fabs_(*b)));
}

void prepare_int8(const float* row, int64_t k, int64_t token, const Acts& to) {
  int64_t block = token / MAX_MR, base = block * MAX_MR;
  QuantRow r = quant_row(to, base, (int)(token - base), block_mr(to.m, block, FORM_INT8));
  for (int64_t g = 0; g < padded(k) / GROUP; ++g) {
    F a, b;
    float amax = group_of(row, k, g, &a, &b), inverse = amax > 0 ? 127.0f / amax : 0.0f;
    put_group(r, g, round_(mul(a, fset(inverse))), round_(mul(b, fset(inverse))), amax / 127.0f);
  }
}

// x = scale * (q0 + q1 / 254 + q2 / 254^2): with a power of two for scale every step but the last rounding is exact.
void prepare_int24(const float* row, int64_t k, int64_t token, const Acts& to) {
  int64_t base = token / 2 * 2;
  QuantRow rows[LIMBS];
  int mr = block_mr(to.m, token / 2, FORM_INT24);
  for (int l = 0; l < LIMBS; ++l) rows[l] = quant_row(to, base * LIMBS, (int)(token - base) * LIMBS + l, mr);
  for (int64_t g = 0; g < padded(k) / GROUP; ++g) {
    F a, b;
    float amax = group_of(row, k, g, &a, &b) / 127.0f, scale;
    uint32_t bits;
    __builtin_memcpy(&bits, &amax, 4);
    bits = (bits + 0x7fffff) & 0x7f800000;  // up to a power of two
    __builtin_memcpy(&scale, &bits, 4);
    float inverse = amax > 0 ? 1.0f / scale : 0.0f;
    a = mul(a, fset(inverse));
    b = mul(b, fset(inverse));
    for (int l = 0; l < LIMBS; ++l, scale /= 254.0f) {
      F ra = round_(a), rb = round_(b);
      put_group(rows[l], g, ra, rb, scale);
      a = mul(sub(a, ra), fset(254.0f));
      b = mul(sub(b, rb), fset(254.0f));
    }
  }
}

void prepare(const float* x, int64_t ldx, int64_t m0, int64_t m1, int forms, const Acts& to) {
  int64_t k = to.k, kp = padded(k);
  for (int64_t m = m0; m < m1; ++m) {
    const float* row = x + m * ldx;
    if ((forms & FORM_F32) || to.order) {
      float* out = to.f32 + m * kp;
      if (to.order)
        for (int64_t i = 0; i < k; ++i) out[i] = row[to.order[i]];
      else __builtin_memcpy(out, row, k * 4);
      row = out;
      for (int64_t i = k; i < kp; ++i) out[i] = 0;
    }
    if (forms & FORM_BF16) {
      uint16_t* out = to.bf16 + m * kp;
      int64_t i = 0;
      for (; i + 16 <= k; i += 16) store_bf16(out + i, fload(row + i));
      if (i < kp) {
        float tail[BLOCK_K] = {};
        for (int64_t j = i; j < k; ++j) tail[j - i] = row[j];
        for (int64_t j = 0; i < kp; i += 16, j += 16) store_bf16(out + i, fload(tail + j));
      }
    }
    if (forms & FORM_INT8) prepare_int8(row, k, m, to);
    if (forms & FORM_INT24) prepare_int24(row, k, m, to);
  }
  if ((forms & FORM_INT8) && m1 == to.m)  // the unused lanes of the last block
    for (int64_t m = to.m; m < padded_tokens(to.m); ++m) {
      int64_t block = m / MAX_MR, base = block * MAX_MR;
      QuantRow r = quant_row(to, base, (int)(m - base), block_mr(to.m, block, FORM_INT8));
      for (int64_t g = 0; g < kp / GROUP; ++g) put_group(r, g, fzero(), fzero(), 0.0f);
    }
}
