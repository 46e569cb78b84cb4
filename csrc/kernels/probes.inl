// Included once per instruction set, inside an anonymous namespace: the machine's own limits, for the benchmarks.

double peak(int kind, int64_t iterations) {
  constexpr int N = sizeof(F) > 64 ? 4 : 16;
  alignas(64) uint8_t line[64];
  alignas(64) int8_t quad[64];
  for (int i = 0; i < 64; ++i) {
    line[i] = (uint8_t)(i & 15);
    quad[i] = (int8_t)(i % 3);
  }
  B w = bload(line);
  float sink = 0;
  if (kind == 0) {
    D4 d[N];
    for (int n = 0; n < N; ++n) d[n] = d4_begin(izero());
    for (int64_t i = 0; i < iterations; ++i)
      UNROLLED(16, n, N) d[n] = d4_dot(d[n], w, quad);
    for (int n = 0; n < N; ++n) sink += hsum(cvt(d4_end(d[n], izero())));
  } else {
    F a[N], one = fset(0.5f);
    for (int n = 0; n < N; ++n) a[n] = fset((float)n);
    alignas(64) uint16_t h[32] = {};
    if (kind == 1) {
      for (int64_t i = 0; i < iterations; ++i)
        UNROLLED(16, n, N) a[n] = dot_bf16(a[n], hload(h), hload(h));
    } else {
      for (int64_t i = 0; i < iterations; ++i)
        UNROLLED(16, n, N) a[n] = fma(a[n], one, one);
    }
    for (int n = 0; n < N; ++n) sink += hsum(a[n]);
  }
  volatile float keep = sink;
  (void)keep;
  double per = kind == 0 ? 128 : kind == 1 ? 64 : 32;
  return per * N * (double)iterations;
}

int64_t read_bytes(const uint8_t* data, int64_t bytes) {
  F s[4] = {fzero(), fzero(), fzero(), fzero()};
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int u = 0; u < 4; ++u) {
      if (PREFETCH) prefetch(data + i + 64 * u + PREFETCH);
      s[u] = add(s[u], fload((const float*)(data + i + 64 * u)));
    }
  volatile float keep = hsum(add(add(s[0], s[1]), add(s[2], s[3])));
  (void)keep;
  return bytes;
}
