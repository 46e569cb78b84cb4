// AVX2 with FMA and F16C (and, compiled with -mavxvnni, the 256-bit dot product): 16 rows are two registers.
// clang-format off: a table, one operation a line
struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct B { __m256i a, b; };
using D8 = I;
using D4 = I;  // without VNNI: sums of pairs in 16 bits, at most 8 dots of 15*127*2 = 30480

INLINE F fload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void fstore(float* p, F v) { _mm256_storeu_ps(p, v.a); _mm256_storeu_ps(p + 8, v.b); }
INLINE F fset(float v) { __m256 x = _mm256_set1_ps(v); return {x, x}; }
INLINE F fzero() { return fset(0); }
INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
INLINE F add(F a, F b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
INLINE F divide(F a, F b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
INLINE F fmax_(F a, F b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
INLINE F fabs_(F v) {
  __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(v.a, m), _mm256_and_ps(v.b, m)};
}
INLINE F round_(F v) { return {_mm256_round_ps(v.a, 0), _mm256_round_ps(v.b, 0)}; }
INLINE __m256 pow2_half(__m256 m, __m256 n) {
  __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(m, _mm256_castsi256_ps(e));
}
INLINE F pow2(F m, F n) { return {pow2_half(m.a, n.a), pow2_half(m.b, n.b)}; }  // n >= -126
INLINE float hsum(F v) {
  __m256 s = _mm256_add_ps(v.a, v.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
INLINE float hmax(F v) {
  __m256 s = _mm256_max_ps(v.a, v.b);
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
INLINE F cvt(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
INLINE F load_f16(const void* p) {
  const __m128i* q = (const __m128i*)p;
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
INLINE F load_bf16(const void* p) {
  const __m128i* q = (const __m128i*)p;
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16))};
}
INLINE __m256i bf16_half(__m256 v) {  // round to nearest even, in the low 16 bits of each lane
  __m256i x = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
}
INLINE void store_bf16(uint16_t* p, F v) {
  __m256i r = _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_half(v.a), bf16_half(v.b)), 0xd8);
  _mm256_storeu_si256((__m256i*)p, r);
}
INLINE F load_u8(const uint8_t* p) {
  return cvt(I{_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
               _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))});
}
INLINE F load_s8(const uint8_t* p) {
  return cvt(I{_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
               _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))});
}
INLINE void store_s8(int8_t* p, F v) {
  __m256i w = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));
  w = _mm256_permute4x64_epi64(w, 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}

INLINE B bload(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
INLINE B low4(B v) {
  __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(v.a, m), _mm256_and_si256(v.b, m)};
}
INLINE B high4(B v) { return low4({_mm256_srli_epi16(v.a, 4), _mm256_srli_epi16(v.b, 4)}); }
INLINE B high4_large(B v) {
  __m256i m = _mm256_set1_epi8(15);
  return {_mm256_andnot_si256(m, v.a), _mm256_andnot_si256(m, v.b)};
}
INLINE I iload1(const int32_t* p) { __m256i x = _mm256_set1_epi32(*p); return {x, x}; }
INLINE I iadd(I a, I b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
INLINE I izero() { __m256i x = _mm256_setzero_si256(); return {x, x}; }
INLINE I sixteenth(I v) { return {_mm256_srai_epi32(v.a, 4), _mm256_srai_epi32(v.b, 4)}; }
// A sum that stays in its register: the compiler may not turn a chain of additions into a tree, whose products it would
// have to keep in memory.
INLINE __m256i pinned(__m256i d) { __asm__("" : "+x"(d)); return d; }
INLINE __m256i quad(const int8_t* a) { return _mm256_set1_epi32(*(const int32_t*)a); }

#ifdef __AVXVNNI__
constexpr bool HIGH_IN_PLACE = true;
INLINE __m256i vnni(__m256i d, __m256i u, __m256i s) { return _mm256_dpbusd_avx_epi32(d, u, s); }
INLINE D4 d4_begin(I start) { return start; }
INLINE D4 d4_dot(D4 d, B w, const int8_t* a) { __m256i x = quad(a); return {vnni(d.a, w.a, x), vnni(d.b, w.b, x)}; }
INLINE I d4_end(D4 d, I) { return d; }
INLINE D8 d8_begin(I start) { return start; }
INLINE D8 d8_dot(D8 d, B w, const int8_t* a) { return d4_dot(d, w, a); }
INLINE I d8_end(D8 d) { return d; }
INLINE I weight_dot(I d, B w, const int8_t* a) { __m256i x = quad(a); return {vnni(d.a, x, w.a), vnni(d.b, x, w.b)}; }
#else
constexpr bool HIGH_IN_PLACE = false;
INLINE D4 d4_begin(I) { return izero(); }
INLINE D4 d4_dot(D4 d, B w, const int8_t* a) {
  __m256i x = quad(a);
  return {pinned(_mm256_add_epi16(d.a, _mm256_maddubs_epi16(w.a, x))),
          pinned(_mm256_add_epi16(d.b, _mm256_maddubs_epi16(w.b, x)))};
}
INLINE I d4_end(D4 d, I start) {
  __m256i one = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(start.a, _mm256_madd_epi16(d.a, one)),
          _mm256_add_epi32(start.b, _mm256_madd_epi16(d.b, one))};
}
INLINE D8 d8_begin(I) { return izero(); }
INLINE __m256i d8_half(__m256i d, __m256i stored, __m256i x) {  // |w| times sign(w) x: no 16-bit saturation
  __m256i w = _mm256_xor_si256(stored, _mm256_set1_epi8((char)0x80));
  __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return pinned(_mm256_add_epi32(d, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
}
INLINE D8 d8_dot(D8 d, B w, const int8_t* a) {
  __m256i x = quad(a);
  return {d8_half(d.a, w.a, x), d8_half(d.b, w.b, x)};
}
INLINE I d8_end(D8 d) { return d; }
INLINE __m256i weight_half(__m256i d, __m256i w, __m256i x) {
  return pinned(_mm256_add_epi32(d, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1))));
}
INLINE I weight_dot(I d, B w, const int8_t* a) {
  __m256i x = quad(a);
  return {weight_half(d.a, w.a, x), weight_half(d.b, w.b, x)};
}
#endif
struct F2 { F a, b; };
INLINE F2 load_pairs(const uint8_t* p) {
  __m256i lo = _mm256_loadu_si256((const __m256i*)p), hi = _mm256_loadu_si256((const __m256i*)(p + 32));
  __m256i mask = _mm256_set1_epi32((int)0xffff0000);
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(lo, mask)), _mm256_castsi256_ps(_mm256_and_si256(hi, mask))}};
}
INLINE I bits(B v, int shift, int mask) {
  __m256i m = _mm256_set1_epi32(mask);
  return {_mm256_and_si256(_mm256_srli_epi32(v.a, shift), m), _mm256_and_si256(_mm256_srli_epi32(v.b, shift), m)};
}
INLINE F nibble(B v, int shift) { return cvt(bits(v, shift, 15)); }
INLINE F byte_(B v, int shift) { return cvt(bits(v, shift, 255)); }
struct H { F a, b; };
INLINE H hload(const uint16_t* p) { return {load_bf16(p), load_bf16(p + 16)}; }
INLINE F dot_bf16(F acc, H w, H x) { return fma(w.b, x.b, fma(w.a, x.a, acc)); }
// For quant_formats.inl. d6: values 0..63
using D6 = I;
struct Table { __m256 low, high; };  // 16 floats, one chosen by each lane
using Bytes = __m256i;               // 16 bytes, one chosen by each byte
using Pairs = Table;                 // 16 floats of bfloat16 precision
INLINE D6 d6_begin(I start) { return start; }
#ifdef __AVXVNNI__
INLINE D6 d6_dot(D6 d, B w, const int8_t* a) { return d4_dot(d, w, a); }
#else
INLINE __m256i d6_half(__m256i d, __m256i w, __m256i x) {  // two products of 63 * 127 fit in 16 bits, four do not
  return pinned(_mm256_add_epi32(d, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1))));
}
INLINE D6 d6_dot(D6 d, B w, const int8_t* a) {
  __m256i x = quad(a);
  return {d6_half(d.a, w.a, x), d6_half(d.b, w.b, x)};
}
#endif
INLINE I d6_end(D6 d) { return d; }
INLINE __m256i with_bits_half(__m256i low, __m256i plane, int shift, __m256i mask) {
  __m256i s = shift >= 0 ? _mm256_slli_epi16(plane, shift) : _mm256_srli_epi16(plane, -shift);
  return _mm256_or_si256(low, _mm256_and_si256(s, mask));
}
INLINE B with_bits(B low, B plane, int shift, int mask) {  // low | plane * 2^shift & mask, in bytes
  __m256i m = _mm256_set1_epi8((char)mask);
  return {with_bits_half(low.a, plane.a, shift, m), with_bits_half(low.b, plane.b, shift, m)};
}
INLINE Table table_of(const float* codes) { return {_mm256_loadu_ps(codes), _mm256_loadu_ps(codes + 8)}; }
INLINE __m256 lookup_half(__m256i v, int shift, Table t) {  // the permutation reads bits 0 to 2, the blend bit 31
  __m256i index = _mm256_srli_epi32(v, shift);
  __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(v, 28 - shift));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), upper);
}
INLINE F lookup(B v, int shift, Table t) { return {lookup_half(v.a, shift, t), lookup_half(v.b, shift, t)}; }
INLINE Bytes bytes_of(const uint8_t* codes) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)codes));
}
INLINE B lookup8(B nibbles, Bytes t) { return {_mm256_shuffle_epi8(t, nibbles.a), _mm256_shuffle_epi8(t, nibbles.b)}; }
INLINE B lookup_low(B v, Bytes t) { return lookup8(low4(v), t); }
INLINE B lookup_high(B v, Bytes t) { return lookup8(high4(v), t); }
INLINE Pairs pairs_of(const float* codes) {
  uint16_t rounded[16];
  store_bf16(rounded, fload(codes));
  F f = load_bf16(rounded);
  return {f.a, f.b};
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
INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
INLINE void prefetch_far(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }  // not into the first cache
constexpr int PREFETCH = 8192;
constexpr int PREFETCH_MANY = 8192;
constexpr int SUMS = 4;  // sums of 16 rows, two registers each, that products keep in registers: half of 16
