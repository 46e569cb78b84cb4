// GGUF blocks to numbers, for torch: ggml's own arithmetic, multiplication and addition rounded each for itself (this
// file is compiled without contraction), so that every bit is that of quantization/ggml.py.
#include <cstring>

#include "engine/pack.h"
#include "kernels/halves.h"

namespace llama2 {
namespace {

float half(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return half_to_float(h);
}

void q8_0(const uint8_t* b, float* x) {
  float d = half(b);
  for (int j = 0; j < 32; ++j) x[j] = static_cast<float>(static_cast<int8_t>(b[2 + j])) * d;
}

void q4_0(const uint8_t* b, float* x) {
  float d = half(b);
  for (int j = 0; j < 16; ++j) x[j] = static_cast<float>((b[2 + j] & 15) - 8) * d;
  for (int j = 0; j < 16; ++j) x[16 + j] = static_cast<float>((b[2 + j] >> 4) - 8) * d;
}

void q4_1(const uint8_t* b, float* x) {
  float d = half(b), m = half(b + 2);
  for (int j = 0; j < 16; ++j) x[j] = static_cast<float>(b[4 + j] & 15) * d + m;
  for (int j = 0; j < 16; ++j) x[16 + j] = static_cast<float>(b[4 + j] >> 4) * d + m;
}

void fifth(const uint8_t* high, const uint8_t* low, int* q) {
  uint32_t bits;
  std::memcpy(&bits, high, 4);
  for (int j = 0; j < 16; ++j) {
    q[j] = (low[j] & 15) | static_cast<int>(bits >> j & 1) << 4;
    q[16 + j] = low[j] >> 4 | static_cast<int>(bits >> (16 + j) & 1) << 4;
  }
}

void q5_0(const uint8_t* b, float* x) {
  float d = half(b);
  int q[32];
  fifth(b + 2, b + 6, q);
  for (int j = 0; j < 32; ++j) x[j] = static_cast<float>(q[j] - 16) * d;
}

void q5_1(const uint8_t* b, float* x) {
  float d = half(b), m = half(b + 2);
  int q[32];
  fifth(b + 4, b + 8, q);
  for (int j = 0; j < 32; ++j) x[j] = static_cast<float>(q[j]) * d + m;
}

void q2_k(const uint8_t* b, float* x) {
  float d = half(b + 80), dm = half(b + 82);
  for (int g = 0; g < 16; ++g) {
    float scale = d * static_cast<float>(b[g] & 15), minimum = dm * static_cast<float>(b[g] >> 4);
    const uint8_t* q = b + 16 + 32 * (g / 8) + 16 * (g % 2);
    int shift = g / 2 % 4 * 2;
    for (int j = 0; j < 16; ++j) x[16 * g + j] = static_cast<float>(q[j] >> shift & 3) * scale - minimum;
  }
}

void q3_k(const uint8_t* b, float* x) {
  float d = half(b + 108);
  for (int g = 0; g < 16; ++g) {
    int low = g < 8 ? b[96 + g] & 15 : b[88 + g] >> 4, top = b[104 + g % 4] >> g / 4 * 2 & 3;
    float scale = d * static_cast<float>((low | top << 4) - 32);
    const uint8_t *q = b + 32 + 32 * (g / 8) + 16 * (g % 2), *mask = b + 16 * (g % 2);
    int shift = g / 2 % 4 * 2, bit = g / 2;
    for (int j = 0; j < 16; ++j)
      x[16 * g + j] = static_cast<float>((q[j] >> shift & 3) - 4 + 4 * (mask[j] >> bit & 1)) * scale;
  }
}

void q4_k(const uint8_t* b, float* x) {
  float d = half(b), dm = half(b + 2);
  for (int g = 0; g < 8; ++g) {
    uint8_t s, m;
    int shift = g % 2 * 4;
    six_bit(b + 4, g, &s, &m);
    float scale = d * static_cast<float>(s), minimum = dm * static_cast<float>(m);
    const uint8_t* q = b + 16 + 32 * (g / 2);
    for (int j = 0; j < 32; ++j) x[32 * g + j] = static_cast<float>(q[j] >> shift & 15) * scale - minimum;
  }
}

void q5_k(const uint8_t* b, float* x) {
  float d = half(b), dm = half(b + 2);
  for (int g = 0; g < 8; ++g) {
    uint8_t s, m;
    int shift = g % 2 * 4;
    six_bit(b + 4, g, &s, &m);
    float scale = d * static_cast<float>(s), minimum = dm * static_cast<float>(m);
    const uint8_t *q = b + 48 + 32 * (g / 2), *high = b + 16;
    for (int j = 0; j < 32; ++j)
      x[32 * g + j] = static_cast<float>((q[j] >> shift & 15) | (high[j] >> g & 1) << 4) * scale - minimum;
  }
}

void q6_k(const uint8_t* b, float* x) {
  float d = half(b + 208);
  for (int g = 0; g < 16; ++g) {
    float scale = d * static_cast<float>(static_cast<int8_t>(b[192 + g]));
    int part = g / 2 % 4, at = 16 * (g % 2);
    const uint8_t *low = b + 64 * (g / 8) + 32 * (part % 2) + at, *high = b + 128 + 32 * (g / 8) + at;
    int shift = part / 2 * 4, two = part * 2;
    for (int j = 0; j < 16; ++j)
      x[16 * g + j] = static_cast<float>(((low[j] >> shift & 15) | (high[j] >> two & 3) << 4) - 32) * scale;
  }
}

struct Decoder {
  int id, weights, bytes;
  void (*decode)(const uint8_t* block, float* x);
};

constexpr Decoder DECODERS[] = {
    {2, 32, 18, q4_0},   {3, 32, 20, q4_1},    {6, 32, 22, q5_0},    {7, 32, 24, q5_1},    {8, 32, 34, q8_0},
    {10, 256, 84, q2_k}, {11, 256, 110, q3_k}, {12, 256, 144, q4_k}, {13, 256, 176, q5_k}, {14, 256, 210, q6_k},
};

const Decoder* decoder(int id) {
  for (const Decoder& d : DECODERS)
    if (d.id == id) return &d;
  return nullptr;
}

void unpack_coded(const CodedType& type, const uint8_t* raw, int64_t cols, bool bf16, int64_t begin, int64_t end,
                  void* out) {
  int64_t blocks = cols / type.columns;
  Coded coded;
  for (int64_t b = begin * blocks; b < end * blocks; ++b) {
    type.decode(raw + b * type.bytes, coded);
    for (int j = 0; j < type.columns; ++j) {
      float x = type.table[coded.code[j]] * coded.scale[j / 16];
      if (bf16) static_cast<uint16_t*>(out)[b * type.columns + j] = float_to_bf16(x);
      else static_cast<float*>(out)[b * type.columns + j] = x;
    }
  }
}

}  // namespace

int64_t unpacked_row_bytes(int id, int64_t cols) {
  if (const CodedType* t = coded_type(id)) return cols > 0 && cols % t->columns == 0 ? cols / t->columns * t->bytes : 0;
  const Decoder* d = decoder(id);
  return d && cols > 0 && cols % d->weights == 0 ? cols / d->weights * d->bytes : 0;
}

void unpack_rows(int id, const uint8_t* raw, int64_t cols, bool bf16, int64_t begin, int64_t end, void* out) {
  if (const CodedType* t = coded_type(id)) return unpack_coded(*t, raw, cols, bf16, begin, end, out);
  const Decoder& d = *decoder(id);
  int64_t blocks = cols / d.weights, row_bytes = blocks * d.bytes;
  float buffer[256];
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* from = raw + r * row_bytes;
    for (int64_t b = 0; b < blocks; ++b) {
      int64_t at = r * cols + b * d.weights;
      if (!bf16) {
        d.decode(from + b * d.bytes, static_cast<float*>(out) + at);
        continue;
      }
      d.decode(from + b * d.bytes, buffer);
      for (int j = 0; j < d.weights; ++j) static_cast<uint16_t*>(out)[at + j] = float_to_bf16(buffer[j]);
    }
  }
}

}  // namespace llama2
