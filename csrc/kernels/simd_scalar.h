// Plain C++: the oracle of every other instruction set, and what runs where none fits.
#define LANES for (int i = 0; i < 16; ++i)

// clang-format off: a table, one operation a line
struct F { float v[16]; };
struct I { int32_t v[16]; };
struct B { uint8_t v[64]; };
using D4 = I;
using D8 = I;

INLINE uint16_t get16(const void* p, int i) { uint16_t h; std::memcpy(&h, (const char*)p + 2 * i, 2); return h; }

INLINE F fload(const float* p) { F r; LANES r.v[i] = p[i]; return r; }
INLINE void fstore(float* p, F x) { LANES p[i] = x.v[i]; }
INLINE F fset(float x) { F r; LANES r.v[i] = x; return r; }
INLINE F fzero() { return fset(0); }
INLINE F fma(F a, F b, F c) { F r; LANES r.v[i] = a.v[i] * b.v[i] + c.v[i]; return r; }
INLINE F mul(F a, F b) { F r; LANES r.v[i] = a.v[i] * b.v[i]; return r; }
INLINE F add(F a, F b) { F r; LANES r.v[i] = a.v[i] + b.v[i]; return r; }
INLINE F sub(F a, F b) { F r; LANES r.v[i] = a.v[i] - b.v[i]; return r; }
INLINE F divide(F a, F b) { F r; LANES r.v[i] = a.v[i] / b.v[i]; return r; }
INLINE F fmax_(F a, F b) { F r; LANES r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return r; }
INLINE F fabs_(F a) { F r; LANES r.v[i] = std::fabs(a.v[i]); return r; }
INLINE F round_(F a) { F r; LANES r.v[i] = std::nearbyintf(a.v[i]); return r; }
INLINE F pow2(F m, F n) { F r; LANES r.v[i] = std::ldexp(m.v[i], (int)n.v[i]); return r; }
INLINE float hsum(F a) { float s = 0; LANES s += a.v[i]; return s; }
INLINE float hmax(F a) { float s = a.v[0]; LANES s = a.v[i] > s ? a.v[i] : s; return s; }
INLINE F cvt(I a) { F r; LANES r.v[i] = (float)a.v[i]; return r; }
INLINE F load_f16(const void* p) { F r; LANES r.v[i] = half_to_float(get16(p, i)); return r; }
INLINE F load_bf16(const void* p) { F r; LANES r.v[i] = bf16_to_float(get16(p, i)); return r; }
INLINE void store_bf16(uint16_t* p, F x) { LANES p[i] = float_to_bf16(x.v[i]); }
INLINE F load_u8(const uint8_t* p) { F r; LANES r.v[i] = p[i]; return r; }
INLINE F load_s8(const uint8_t* p) { F r; LANES r.v[i] = (int8_t)p[i]; return r; }
INLINE void store_s8(int8_t* p, F x) { LANES p[i] = (int8_t)std::nearbyintf(x.v[i]); }

INLINE B bload(const uint8_t* p) { B r; std::memcpy(r.v, p, 64); return r; }
INLINE B low4(B b) { for (int i = 0; i < 64; ++i) b.v[i] &= 15; return b; }
INLINE B high4(B b) { for (int i = 0; i < 64; ++i) b.v[i] >>= 4; return b; }
INLINE B high4_large(B b) { for (int i = 0; i < 64; ++i) b.v[i] &= 240; return b; }
INLINE I iload1(const int32_t* p) { I r; LANES r.v[i] = *p; return r; }
INLINE I iadd(I a, I b) { LANES a.v[i] += b.v[i]; return a; }
INLINE I izero() { I r; LANES r.v[i] = 0; return r; }
INLINE I sixteenth(I a) { LANES a.v[i] >>= 4; return a; }
constexpr bool HIGH_IN_PLACE = true;
INLINE D4 d4_begin(I start) { return start; }
INLINE D4 d4_dot(D4 d, B w, const int8_t* a) {
  LANES for (int c = 0; c < 4; ++c) d.v[i] += (int32_t)w.v[4 * i + c] * a[c];
  return d;
}
INLINE I d4_end(D4 d, I) { return d; }
INLINE D8 d8_begin(I) { return izero(); }
INLINE D8 d8_dot(D8 d, B w, const int8_t* a) {
  LANES for (int c = 0; c < 4; ++c) d.v[i] += ((int32_t)w.v[4 * i + c] - 128) * a[c];
  return d;
}
INLINE I d8_end(D8 d) { return d; }
// signed lines against 4 bytes of 0..127
INLINE I weight_dot(I d, B w, const int8_t* a) {
  LANES for (int c = 0; c < 4; ++c) d.v[i] += (int32_t)(int8_t)w.v[4 * i + c] * a[c];
  return d;
}
struct F2 { F a, b; };
INLINE F2 load_pairs(const uint8_t* p) {  // 16 words of two bfloat16: the first ones, the second ones
  F2 r;
  LANES { r.a.v[i] = bf16_to_float(get16(p, 2 * i)); r.b.v[i] = bf16_to_float(get16(p, 2 * i + 1)); }
  return r;
}
INLINE F nibble(B b, int shift) { F r; LANES r.v[i] = (float)(b.v[4 * i + shift / 8] >> (shift % 8) & 15); return r; }
// NOLINTNEXTLINE(bugprone-integer-division)
INLINE F byte_(B b, int shift) { F r; LANES r.v[i] = (float)b.v[4 * i + shift / 8]; return r; }
struct H { F a, b; };
INLINE H hload(const uint16_t* p) { return {load_bf16(p), load_bf16(p + 16)}; }
INLINE F dot_bf16(F acc, H w, H x) { return fma(w.b, x.b, fma(w.a, x.a, acc)); }
// For quant_formats.inl. d6: values 0..63
using D6 = I;
using Table = F;                      // 16 floats, one chosen by each lane
struct Bytes { uint8_t v[16]; };      // 16 bytes, one chosen by each byte
using Pairs = F;                      // 16 floats of bfloat16 precision
INLINE D6 d6_begin(I start) { return start; }
INLINE D6 d6_dot(D6 d, B w, const int8_t* a) { return d4_dot(d, w, a); }
INLINE I d6_end(D6 d) { return d; }
INLINE B with_bits(B low, B plane, int shift, int mask) {  // low | plane * 2^shift & mask, in bytes
  for (int i = 0; i < 64; ++i) low.v[i] |= (shift >= 0 ? plane.v[i] << shift : plane.v[i] >> -shift) & mask;
  return low;
}
INLINE Table table_of(const float* codes) { return fload(codes); }
INLINE F lookup(B b, int shift, const Table& t) {
  F r;
  LANES r.v[i] = t.v[b.v[4 * i + shift / 8] >> (shift % 8) & 15];
  return r;
}
INLINE Bytes bytes_of(const uint8_t* codes) { Bytes r; std::memcpy(r.v, codes, 16); return r; }
INLINE B lookup8(B nibbles, const Bytes& t) {
  for (int i = 0; i < 64; ++i) nibbles.v[i] = t.v[nibbles.v[i]];
  return nibbles;
}
INLINE B lookup_low(B v, const Bytes& t) { return lookup8(low4(v), t); }
INLINE B lookup_high(B v, const Bytes& t) { return lookup8(high4(v), t); }
INLINE Pairs pairs_of(const float* codes) { Pairs r; LANES r.v[i] = bf16_to_float(float_to_bf16(codes[i])); return r; }
// nibbles i of the two halves of each dword, looked up, times x[0] and x[1]
INLINE F dot_pairs(F acc, B v, int i, const Pairs& t, const uint16_t* x) {
  acc = fma(lookup(v, 4 * i, t), fset(bf16_to_float(x[0])), acc);
  return fma(lookup(v, 16 + 4 * i, t), fset(bf16_to_float(x[1])), acc);
}
INLINE void prefetch(const void*) {}
INLINE void prefetch_far(const void*) {}
constexpr int PREFETCH = 0;
constexpr int PREFETCH_MANY = 0;
constexpr int SUMS = 16;  // no registers to keep sums in: everything at once
