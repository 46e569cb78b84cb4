// ARMv8.2 NEON with the int8 dot product: 16 rows are four registers.
#define QUADS for (int i = 0; i < 4; ++i)

// clang-format off: a table, one operation a line
struct F { float32x4_t v[4]; };
struct I { int32x4_t v[4]; };
struct B { uint8x16_t v[4]; };
using D4 = I;
using D8 = I;

INLINE F fload(const float* p) { F r; QUADS r.v[i] = vld1q_f32(p + 4 * i); return r; }
INLINE void fstore(float* p, F x) { QUADS vst1q_f32(p + 4 * i, x.v[i]); }
INLINE F fset(float x) { F r; QUADS r.v[i] = vdupq_n_f32(x); return r; }
INLINE F fzero() { return fset(0); }
INLINE F fma(F a, F b, F c) { F r; QUADS r.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]); return r; }
INLINE F mul(F a, F b) { F r; QUADS r.v[i] = vmulq_f32(a.v[i], b.v[i]); return r; }
INLINE F add(F a, F b) { F r; QUADS r.v[i] = vaddq_f32(a.v[i], b.v[i]); return r; }
INLINE F sub(F a, F b) { F r; QUADS r.v[i] = vsubq_f32(a.v[i], b.v[i]); return r; }
INLINE F divide(F a, F b) { F r; QUADS r.v[i] = vdivq_f32(a.v[i], b.v[i]); return r; }
INLINE F fmax_(F a, F b) { F r; QUADS r.v[i] = vmaxq_f32(a.v[i], b.v[i]); return r; }
INLINE F fabs_(F a) { F r; QUADS r.v[i] = vabsq_f32(a.v[i]); return r; }
INLINE F round_(F a) { F r; QUADS r.v[i] = vrndnq_f32(a.v[i]); return r; }
INLINE F pow2(F m, F n) {  // n >= -126
  F r;
  QUADS {
    int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127));
    r.v[i] = vmulq_f32(m.v[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  }
  return r;
}
INLINE float hsum(F a) { return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3]))); }
INLINE float hmax(F a) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3]))); }
INLINE F cvt(I a) { F r; QUADS r.v[i] = vcvtq_f32_s32(a.v[i]); return r; }
INLINE F load_f16(const void* p) {
  F r; QUADS r.v[i] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t*)p + 8 * i))); return r;
}
INLINE F load_bf16(const void* p) {
  F r;
  QUADS r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8((const uint8_t*)p + 8 * i)), 16));
  return r;
}
INLINE void store_bf16(uint16_t* p, F x) {
  QUADS {
    uint32x4_t u = vreinterpretq_u32_f32(x.v[i]);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    uint32x4_t r = vshrq_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    uint32x4_t ordered = vceqq_f32(x.v[i], x.v[i]);
    vst1_u16(p + 4 * i, vmovn_u32(vbslq_u32(ordered, r, vdupq_n_u32(0x7fc0))));
  }
}
INLINE F widen(int16x8_t lo, int16x8_t hi) {
  return cvt(I{{vmovl_s16(vget_low_s16(lo)), vmovl_s16(vget_high_s16(lo)), vmovl_s16(vget_low_s16(hi)),
                vmovl_s16(vget_high_s16(hi))}});
}
INLINE F load_u8(const uint8_t* p) {
  uint8x16_t v = vld1q_u8(p);
  return widen(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(v))), vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(v))));
}
INLINE F load_s8(const uint8_t* p) {
  int8x16_t v = vreinterpretq_s8_u8(vld1q_u8(p));
  return widen(vmovl_s8(vget_low_s8(v)), vmovl_s8(vget_high_s8(v)));
}
INLINE void store_s8(int8_t* p, F x) {
  int16x4_t h[4];
  QUADS h[i] = vmovn_s32(vcvtnq_s32_f32(x.v[i]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(vcombine_s16(h[0], h[1])), vmovn_s16(vcombine_s16(h[2], h[3]))));
}

INLINE B bload(const uint8_t* p) { B r; QUADS r.v[i] = vld1q_u8(p + 16 * i); return r; }
INLINE B low4(B b) { QUADS b.v[i] = vandq_u8(b.v[i], vdupq_n_u8(15)); return b; }
INLINE B high4(B b) { QUADS b.v[i] = vshrq_n_u8(b.v[i], 4); return b; }
INLINE B high4_large(B b) { return b; }  // 240 is no positive signed byte: not used
INLINE I iload1(const int32_t* p) { I r; QUADS r.v[i] = vdupq_n_s32(*p); return r; }
INLINE I iadd(I a, I b) { QUADS a.v[i] = vaddq_s32(a.v[i], b.v[i]); return a; }
INLINE I izero() { I r; QUADS r.v[i] = vdupq_n_s32(0); return r; }
INLINE I sixteenth(I a) { QUADS a.v[i] = vshrq_n_s32(a.v[i], 4); return a; }
INLINE int8x16_t quad(const int8_t* a) { return vreinterpretq_s8_s32(vdupq_n_s32(*(const int32_t*)a)); }
constexpr bool HIGH_IN_PLACE = false;
INLINE D4 d4_begin(I start) { return start; }
INLINE D4 d4_dot(D4 d, B w, const int8_t* a) {
  int8x16_t x = quad(a);
  QUADS d.v[i] = vdotq_s32(d.v[i], vreinterpretq_s8_u8(w.v[i]), x);
  return d;
}
INLINE I d4_end(D4 d, I) { return d; }
INLINE D8 d8_begin(I) { return izero(); }
INLINE D8 d8_dot(D8 d, B w, const int8_t* a) {
  int8x16_t x = quad(a);
  QUADS d.v[i] = vdotq_s32(d.v[i], vreinterpretq_s8_u8(veorq_u8(w.v[i], vdupq_n_u8(128))), x);
  return d;
}
INLINE I d8_end(D8 d) { return d; }
INLINE I weight_dot(I d, B w, const int8_t* a) { return d4_dot(d, w, a); }
struct F2 { F a, b; };
INLINE F2 load_pairs(const uint8_t* p) {
  F2 r;
  QUADS {
    uint32x4_t v = vreinterpretq_u32_u8(vld1q_u8(p + 16 * i));
    r.a.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(v, 16));
    r.b.v[i] = vreinterpretq_f32_u32(vandq_u32(v, vdupq_n_u32(0xffff0000u)));
  }
  return r;
}
INLINE F bits(B b, int shift, uint32_t mask) {
  F r;
  QUADS {
    uint32x4_t shifted = vshlq_u32(vreinterpretq_u32_u8(b.v[i]), vdupq_n_s32(-shift));
    r.v[i] = vcvtq_f32_u32(vandq_u32(shifted, vdupq_n_u32(mask)));
  }
  return r;
}
INLINE F nibble(B b, int shift) { return bits(b, shift, 15); }
INLINE F byte_(B b, int shift) { return bits(b, shift, 255); }
struct H { F a, b; };
INLINE H hload(const uint16_t* p) { return {load_bf16(p), load_bf16(p + 16)}; }
INLINE F dot_bf16(F acc, H w, H x) { return fma(w.b, x.b, fma(w.a, x.a, acc)); }
// For quant_formats.inl. d6: values 0..63
using D6 = I;
using Table = uint8x16x4_t;  // 16 floats as 64 bytes, one float chosen by each lane
using Bytes = uint8x16_t;    // 16 bytes, one chosen by each byte
using Pairs = Table;         // 16 floats of bfloat16 precision
INLINE D6 d6_begin(I start) { return start; }
INLINE D6 d6_dot(D6 d, B w, const int8_t* a) { return d4_dot(d, w, a); }
INLINE I d6_end(D6 d) { return d; }
INLINE B with_bits(B low, B plane, int shift, int mask) {  // low | plane * 2^shift & mask, in bytes
  QUADS {
    uint8x16_t shifted = vshlq_u8(plane.v[i], vdupq_n_s8((int8_t)shift));
    low.v[i] = vorrq_u8(low.v[i], vandq_u8(shifted, vdupq_n_u8((uint8_t)mask)));
  }
  return low;
}
INLINE Table table_of(const float* codes) {
  Table t;
  QUADS t.val[i] = vreinterpretq_u8_f32(vld1q_f32(codes + 4 * i));
  return t;
}
INLINE F lookup(B v, int shift, Table t) {
  F r;
  QUADS {
    uint32x4_t index = vandq_u32(vshlq_u32(vreinterpretq_u32_u8(v.v[i]), vdupq_n_s32(-shift)), vdupq_n_u32(15));
    uint32x4_t at = vmlaq_u32(vdupq_n_u32(0x03020100u), index, vdupq_n_u32(0x04040404u));
    r.v[i] = vreinterpretq_f32_u8(vqtbl4q_u8(t, vreinterpretq_u8_u32(at)));
  }
  return r;
}
INLINE Bytes bytes_of(const uint8_t* codes) { return vld1q_u8(codes); }
INLINE B lookup8(B nibbles, Bytes t) { QUADS nibbles.v[i] = vqtbl1q_u8(t, nibbles.v[i]); return nibbles; }
INLINE B lookup_low(B v, Bytes t) { return lookup8(low4(v), t); }
INLINE B lookup_high(B v, Bytes t) { return lookup8(high4(v), t); }
INLINE Pairs pairs_of(const float* codes) {
  uint16_t rounded[16];
  float values[16];
  store_bf16(rounded, fload(codes));
  fstore(values, load_bf16(rounded));
  return table_of(values);
}
INLINE float bf16_value(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
// nibbles i of the two halves of each dword, looked up, times x[0] and x[1]
INLINE F dot_pairs(F acc, B v, int i, Pairs t, const uint16_t* x) {
  acc = fma(lookup(v, 4 * i, t), fset(bf16_value(x[0])), acc);
  return fma(lookup(v, 16 + 4 * i, t), fset(bf16_value(x[1])), acc);
}
INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
constexpr int PREFETCH = 2048;
constexpr int PREFETCH_MANY = 2048;
constexpr int SUMS = 4;  // sums of 16 rows, four registers each, that products keep in registers: half of 32
