// GGUF's blocks of codebooks (IQ4, IQ3, IQ2, IQ1, TQ, FP4) as codes of 4 bits into a table of 16 numbers and a
// scale for every 16 columns: what quantization/codebook_blocks.py decodes to, block by block.
#include <cstring>

#include "engine/pack.h"
#include "kernels/halves.h"

namespace llama2 {
namespace {

constexpr uint8_t GRIDS[] = {
#include "grids.inc"
};
// Points of each type in GRIDS, in bytes from its start.
constexpr int IQ2_XXS = 0, IQ2_XS = IQ2_XXS + 256 * 8, IQ2_S = IQ2_XS + 512 * 8, IQ3_XXS = IQ2_S + 1024 * 8,
              IQ3_S = IQ3_XXS + 256 * 4, IQ1_S = IQ3_S + 512 * 4;
static_assert(sizeof GRIDS == IQ1_S + 2048 * 8, "grids.bin has another size");

float half(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return half_to_float(h);
}
int short_(const uint8_t* p) { return p[0] | p[1] << 8; }
uint32_t word(const uint8_t* p) {
  return static_cast<uint32_t>(short_(p)) | static_cast<uint32_t>(short_(p + 2)) << 16;
}
int nibble(const uint8_t* p, int i) { return p[i / 2] >> 4 * (i % 2) & 15; }
int with_parity(int seven) { return seven | __builtin_parity(static_cast<unsigned>(seven)) << 7; }

void split(const uint8_t* q, int run, uint8_t* code) {  // low nibbles first
  for (int j = 0; j < run; ++j) code[j] = q[j] & 15, code[run + j] = q[j] >> 4;
}
void eight(const uint8_t* point, int signs, uint8_t* code) {
  for (int j = 0; j < 8; ++j) code[j] = static_cast<uint8_t>(point[j] | (signs >> j & 1) << 3);
}
void both(Coded& c, int run, float scale) { c.scale[2 * run] = c.scale[2 * run + 1] = scale; }

void iq4_nl(const uint8_t* b, Coded& c) {
  split(b + 2, 16, c.code);
  both(c, 0, half(b));
}
void iq4_xs(const uint8_t* b, Coded& c) {
  for (int k = 0; k < 8; ++k) {
    split(b + 8 + 16 * k, 16, c.code + 32 * k);
    both(c, k, half(b) * static_cast<float>((nibble(b + 4, k) | (short_(b + 2) >> 2 * k & 3) << 4) - 32));
  }
}
void iq2_xxs(const uint8_t* b, Coded& c) {
  for (int k = 0; k < 8; ++k) {
    const uint8_t* q = b + 2 + 8 * k;
    uint32_t aux = word(q + 4);
    for (int l = 0; l < 4; ++l)
      eight(GRIDS + IQ2_XXS + 8 * q[l], with_parity(aux >> 7 * l & 127), c.code + 32 * k + 8 * l);
    both(c, k, half(b) * (0.5f + static_cast<float>(aux >> 28)) * 0.25f);
  }
}
void iq2_xs(const uint8_t* b, Coded& c) {
  for (int e = 0; e < 32; ++e) {
    int q = short_(b + 2 + 2 * e);
    eight(GRIDS + IQ2_XS + 8 * (q & 511), with_parity(q >> 9), c.code + 8 * e);
  }
  for (int j = 0; j < 16; ++j) c.scale[j] = half(b) * (0.5f + static_cast<float>(nibble(b + 66, j))) * 0.25f;
}
void iq2_s(const uint8_t* b, Coded& c) {
  for (int e = 0; e < 32; ++e) {
    int at = b[2 + e] | (b[66 + e / 4] >> 2 * (e % 4) & 3) << 8;
    eight(GRIDS + IQ2_S + 8 * at, b[34 + e], c.code + 8 * e);
  }
  for (int j = 0; j < 16; ++j) c.scale[j] = half(b) * (0.5f + static_cast<float>(nibble(b + 74, j))) * 0.25f;
}
void iq3_xxs(const uint8_t* b, Coded& c) {
  for (int k = 0; k < 8; ++k) {
    uint32_t aux = word(b + 66 + 4 * k);
    for (int l = 0; l < 4; ++l) {
      uint8_t point[8];
      for (int i = 0; i < 2; ++i) std::memcpy(point + 4 * i, GRIDS + IQ3_XXS + 4 * b[2 + 8 * k + 2 * l + i], 4);
      eight(point, with_parity(aux >> 7 * l & 127), c.code + 32 * k + 8 * l);
    }
    both(c, k, half(b) * (0.5f + static_cast<float>(aux >> 28)) * 0.5f);
  }
}
void iq3_s(const uint8_t* b, Coded& c) {
  for (int e = 0; e < 32; ++e) {
    uint8_t point[8];
    for (int i = 0; i < 2; ++i) {
      int f = 2 * e + i, at = b[2 + f] | (b[66 + f / 8] >> f % 8 & 1) << 8;
      std::memcpy(point + 4 * i, GRIDS + IQ3_S + 4 * at, 4);
    }
    eight(point, b[74 + e], c.code + 8 * e);
  }
  for (int k = 0; k < 8; ++k) both(c, k, half(b) * static_cast<float>(1 + 2 * nibble(b + 106, k)));
}
void less(const uint8_t* point, int negative, uint8_t* code) {
  for (int j = 0; j < 8; ++j) code[j] = static_cast<uint8_t>(point[j] | negative << 2);
}
void iq1_s(const uint8_t* b, Coded& c) {
  for (int k = 0; k < 8; ++k) {
    int h = short_(b + 34 + 2 * k);
    for (int l = 0; l < 4; ++l)
      less(GRIDS + IQ1_S + 8 * (b[2 + 4 * k + l] | (h >> 3 * l & 7) << 8), h >> 15, c.code + 32 * k + 8 * l);
    both(c, k, half(b) * static_cast<float>(2 * (h >> 12 & 7) + 1));
  }
}
void iq1_m(const uint8_t* b, Coded& c) {
  int bits = 0;
  for (int i = 0; i < 4; ++i) bits |= short_(b + 48 + 2 * i) >> 12 << 4 * i;
  float d = half_to_float(static_cast<uint16_t>(bits));
  for (int e = 0; e < 32; ++e) {
    int h = nibble(b + 32, e);
    less(GRIDS + IQ1_S + 8 * (b[e] | (h & 7) << 8), h >> 3, c.code + 8 * e);
  }
  for (int j = 0; j < 16; ++j)
    c.scale[j] = d * static_cast<float>(2 * (short_(b + 48 + j / 4 * 2) >> 3 * (j % 4) & 7) + 1);
}
constexpr int POWERS[] = {1, 3, 9, 27, 81};
void tq1_0(const uint8_t* b, Coded& c) {
  auto digit = [](uint8_t byte, int n) { return static_cast<uint8_t>((byte * POWERS[n] & 255) * 3 >> 8); };
  for (int n = 0; n < 5; ++n) {
    for (int j = 0; j < 32; ++j) c.code[32 * n + j] = digit(b[j], n);
    for (int j = 0; j < 16; ++j) c.code[160 + 16 * n + j] = digit(b[32 + j], n);
  }
  for (int n = 0; n < 4; ++n)
    for (int j = 0; j < 4; ++j) c.code[240 + 4 * n + j] = digit(b[48 + j], n);
  for (int k = 0; k < 8; ++k) both(c, k, half(b + 52));
}
void tq2_0(const uint8_t* b, Coded& c) {
  for (int k = 0; k < 256; ++k) c.code[k] = b[k / 128 * 32 + k % 32] >> k % 128 / 32 * 2 & 3;
  for (int k = 0; k < 8; ++k) both(c, k, half(b + 64));
}
void mxfp4(const uint8_t* b, Coded& c) {
  uint32_t bits = b[0] < 2 ? 0x00200000u << b[0] : static_cast<uint32_t>(b[0] - 1) << 23;  // half: the table is doubled
  float scale;
  std::memcpy(&scale, &bits, 4);
  split(b + 1, 16, c.code);
  both(c, 0, scale);
}
void nvfp4(const uint8_t* b, Coded& c) {
  for (int j = 0; j < 4; ++j) {
    int e = b[j] >> 3 & 15, m = b[j] & 7;
    float value = e == 0 ? static_cast<float>(m) / 512
                         : (1 + static_cast<float>(m) / 8) *
                               (e < 7 ? 1.0f / static_cast<float>(1 << (7 - e)) : static_cast<float>(1 << (e - 7)));
    c.scale[j] = b[j] == 0 || b[j] == 0x7F ? 0 : value * 0.5f;
    split(b + 4 + 8 * j, 8, c.code + 16 * j);
  }
}

constexpr float IQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr float IQ3X[16] = {4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62};
constexpr float IQ3[16] = {1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15};
constexpr float IQ2[16] = {8, 25, 43, 0, 0, 0, 0, 0, -8, -25, -43};
constexpr float IQ1[16] = {-0.875f, 0.125f, 1.125f, 0, -1.125f, -0.125f, 0.875f};
constexpr float TERNARY[16] = {-1, 0, 1, 2};
constexpr float E2M1_TWICE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

constexpr CodedType CODED[] = {
    {20, 32, 18, IQ4, iq4_nl},       {23, 256, 136, IQ4, iq4_xs},   {16, 256, 66, IQ2, iq2_xxs},
    {17, 256, 74, IQ2, iq2_xs},      {22, 256, 82, IQ2, iq2_s},     {18, 256, 98, IQ3X, iq3_xxs},
    {21, 256, 110, IQ3, iq3_s},      {19, 256, 50, IQ1, iq1_s},     {29, 256, 56, IQ1, iq1_m},
    {34, 256, 54, TERNARY, tq1_0},   {35, 256, 66, TERNARY, tq2_0}, {39, 32, 17, E2M1_TWICE, mxfp4},
    {40, 64, 36, E2M1_TWICE, nvfp4},
};

}  // namespace

const CodedType* coded_type(int id) {
  for (const CodedType& t : CODED)
    if (t.id == id) return &t;
  return nullptr;
}

const Codebook* type_codebook(int id) {
  static const auto made = [] {
    std::array<Codebook, sizeof CODED / sizeof *CODED> books = {};
    for (size_t i = 0; i < books.size(); ++i) {
      for (size_t j = 0; j < i; ++j)
        if (CODED[j].table == CODED[i].table) books[i] = books[j];
      if (books[i].step == 0) books[i] = codebook_of(CODED[i].table);
    }
    return books;
  }();
  for (size_t i = 0; i < made.size(); ++i)
    if (CODED[i].id == id) {
      size_t first = 0;  // types of one table share it, so that their matrices can be multiplied together
      while (CODED[first].table != CODED[i].table) ++first;
      return &made[first];
    }
  return nullptr;
}

}  // namespace llama2
