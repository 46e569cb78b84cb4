// AVX-512 with F, BW, VL and DQ, and whichever of VNNI, VBMI and BF16 it is compiled for: one register holds 16 rows.
// Without VNNI bytes are multiplied in pairs into 16 bits, without BF16 two shifts make a register of bfloat16 float32.
// clang-format off: a table, one operation a line
using F = __m512;
using I = __m512i;
using B = __m512i;
using D4 = __m512i;
using D8 = __m512i;

INLINE F fload(const float* p) { return _mm512_loadu_ps(p); }
INLINE void fstore(float* p, F v) { _mm512_storeu_ps(p, v); }
INLINE F fset(float v) { return _mm512_set1_ps(v); }
INLINE F fzero() { return _mm512_setzero_ps(); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F divide(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F fmax_(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F fabs_(F a) { return _mm512_abs_ps(a); }
INLINE F round_(F a) { return _mm512_roundscale_ps(a, 0); }
INLINE F pow2(F mant, F n) { return _mm512_scalef_ps(mant, n); }
INLINE float hsum(F a) {
  __m256 s = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
INLINE float hmax(F a) {
  __m256 s = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
INLINE F cvt(I a) { return _mm512_cvtepi32_ps(a); }
INLINE F load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE F load_bf16(const void* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
#ifdef __AVX512BF16__
INLINE void store_bf16(uint16_t* p, F v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
#else
INLINE void store_bf16(uint16_t* p, F v) {  // rounds to the nearest even
  __m512i x = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
#endif
INLINE F load_u8(const uint8_t* p) { return cvt(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))); }
INLINE F load_s8(const uint8_t* p) { return cvt(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
INLINE void store_s8(int8_t* p, F v) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

INLINE B bload(const uint8_t* p) {
  B v = _mm512_loadu_si512(p);
  asm("" : "+v"(v));  // else GCC loads the line again for its high nibbles: 61 instead of 72 GB/s from L2
  return v;
}
INLINE B low4(B v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
INLINE B high4(B v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
INLINE B high4_large(B v) { return _mm512_andnot_si512(_mm512_set1_epi8(15), v); }
INLINE I iload1(const int32_t* p) { return _mm512_set1_epi32(*p); }
INLINE I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
INLINE I izero() { return _mm512_setzero_si512(); }
// 16 rows x 4 columns against 4 activations; d4: values 0..15, d8: values stored +128
INLINE I sixteenth(I v) { return _mm512_srai_epi32(v, 4); }
INLINE __m512i quad(const int8_t* a) { return iload1((const int32_t*)a); }
#ifdef __AVX512VNNI__
constexpr bool HIGH_IN_PLACE = true;
INLINE D4 d4_begin(I start) { return start; }
INLINE D4 d4_dot(D4 d, B w, const int8_t* a) { return _mm512_dpbusd_epi32(d, w, quad(a)); }
INLINE I d4_end(D4 d, I) { return d; }
INLINE D8 d8_begin(I start) { return start; }
INLINE D8 d8_dot(D8 d, B w, const int8_t* a) { return _mm512_dpbusd_epi32(d, w, quad(a)); }
INLINE I d8_end(D8 d) { return d; }
INLINE I weight_dot(I d, B w, const int8_t* a) { return _mm512_dpbusd_epi32(d, quad(a), w); }
#else
constexpr bool HIGH_IN_PLACE = false;
// A sum that stays in its register: the compiler may not turn a chain of additions into a tree, whose products it would
// have to keep in memory.
INLINE __m512i pinned(__m512i d) { __asm__("" : "+v"(d)); return d; }
INLINE __m512i pairs_to_32(__m512i d, __m512i pairs) {
  return pinned(_mm512_add_epi32(d, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1))));
}
// Sums of pairs in 16 bits, at most 8 dots of 15 * 127 * 2 = 30480.
INLINE D4 d4_begin(I) { return izero(); }
INLINE D4 d4_dot(D4 d, B w, const int8_t* a) {
  return pinned(_mm512_add_epi16(d, _mm512_maddubs_epi16(w, quad(a))));
}
INLINE I d4_end(D4 d, I start) { return pairs_to_32(start, d); }
INLINE D8 d8_begin(I) { return izero(); }
INLINE D8 d8_dot(D8 d, B stored, const int8_t* a) {  // |w| times sign(w) x: no 16-bit saturation
  __m512i w = _mm512_xor_si512(stored, _mm512_set1_epi8((char)0x80)), x = quad(a);
  x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
  return pairs_to_32(d, _mm512_maddubs_epi16(_mm512_abs_epi8(w), x));
}
INLINE I d8_end(D8 d) { return d; }
INLINE I weight_dot(I d, B w, const int8_t* a) { return pairs_to_32(d, _mm512_maddubs_epi16(quad(a), w)); }
#endif
struct F2 { F a, b; };
INLINE F2 load_pairs(const uint8_t* p) {
  __m512i v = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)))};
}
INLINE F byte_(B v, int shift) {
  return cvt(_mm512_and_si512(_mm512_srli_epi32(v, shift), _mm512_set1_epi32(255)));
}
// sum over 32 bf16 products, spread over the lanes in any way
using H = __m512i;
INLINE H hload(const uint16_t* p) { return _mm512_loadu_si512(p); }
#ifdef __AVX512BF16__
INLINE F dot_bf16(F acc, H w, H x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
#else
INLINE F even_bf16(H v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
INLINE F odd_bf16(H v) { return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000))); }
INLINE F dot_bf16(F acc, H w, H x) { return fma(odd_bf16(w), odd_bf16(x), fma(even_bf16(w), even_bf16(x), acc)); }
#endif
INLINE F digits(B v, int shift, F table) {  // a permutation reads four bits of its index: no mask, no conversion
  return _mm512_permutexvar_ps(_mm512_srli_epi32(v, shift), table);
}
// For quant_formats.inl. d6: values 0..63
using D6 = __m512i;
using Table = __m512;    // 16 floats, one chosen by each lane
using Bytes = __m512i;   // 16 bytes, one chosen by each byte
using Pairs = __m512i;   // 16 bfloat16 twice, as the permutation reads five bits
INLINE D6 d6_begin(I start) { return start; }
#ifdef __AVX512VNNI__
INLINE D6 d6_dot(D6 d, B w, const int8_t* a) { return d4_dot(d, w, a); }
#else
INLINE D6 d6_dot(D6 d, B w, const int8_t* a) {  // two products of 63 * 127 fit in 16 bits, four do not
  return pairs_to_32(d, _mm512_maddubs_epi16(w, quad(a)));
}
#endif
INLINE I d6_end(D6 d) { return d; }
INLINE B with_bits(B low, B plane, int shift, int mask) {  // low | plane * 2^shift & mask, in bytes
  B s = shift >= 0 ? _mm512_slli_epi16(plane, shift) : _mm512_srli_epi16(plane, -shift);
  return _mm512_ternarylogic_epi64(low, s, _mm512_set1_epi8((char)mask), 0xf8);
}
INLINE Table table_of(const float* codes) { return fload(codes); }
INLINE F lookup(B v, int shift, Table t) { return digits(v, shift, t); }
INLINE Bytes bytes_of(const uint8_t* codes) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)codes)); }
#ifdef __AVX512VBMI__
// A permutation of 64 bytes reads six bits of its index and finds the 16 four times: no mask for the other nibble's
// bits.
INLINE B lookup_low(B v, Bytes t) { return _mm512_permutexvar_epi8(v, t); }
INLINE B lookup_high(B v, Bytes t) { return _mm512_permutexvar_epi8(_mm512_srli_epi16(v, 4), t); }
#else
INLINE B lookup_low(B v, Bytes t) { return _mm512_shuffle_epi8(t, low4(v)); }
INLINE B lookup_high(B v, Bytes t) { return _mm512_shuffle_epi8(t, high4(v)); }
#endif
INLINE Pairs pairs_of(const float* codes) {
  uint16_t twice[32];
  store_bf16(twice, fload(codes));
  store_bf16(twice + 16, fload(codes));
  return _mm512_loadu_si512(twice);
}
// nibbles i of the two halves of each dword, looked up, times x[0] and x[1]
INLINE F dot_pairs(F acc, B v, int i, Pairs t, const uint16_t* x) {
  int32_t both;
  __builtin_memcpy(&both, x, 4);
  __m512i w = _mm512_permutexvar_epi16(_mm512_srli_epi32(v, 4 * i), t);
  return dot_bf16(acc, w, _mm512_set1_epi32(both));
}
INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
INLINE void prefetch_far(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }  // not into the first cache
// One token: the hardware's own prefetch alone keeps up with the memory (1.01 of a read; 0.96 with 8 kB).
constexpr int PREFETCH = 0;
constexpr int PREFETCH_MANY = 4096;  // several: loads are too far apart for it
constexpr int SUMS = 16;  // sums of 16 rows that products keep in registers: half of 32
