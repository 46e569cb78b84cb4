// Numbers of 16 bits, one at a time: exact from float16 and bfloat16, to bfloat16 rounded to the nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>

static inline float float_of_bits(uint32_t x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}

static inline uint32_t bits_of_float(float f) {
  uint32_t x;
  std::memcpy(&x, &f, 4);
  return x;
}

static inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023;
  if (!e) return float_of_bits(sign | bits_of_float((float)m * 5.9604644775390625e-8f));  // 2^-24
  return float_of_bits(sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13);
}

static inline float bf16_to_float(uint16_t h) { return float_of_bits((uint32_t)h << 16); }

static inline uint16_t float_to_bf16(float f) {
  uint32_t x = bits_of_float(f);
  return (uint16_t)((x & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (x + 0x7fff + ((x >> 16) & 1)) >> 16);
}
