#include "engine/pack.h"

#include <cstring>
#include <iterator>

namespace llama2 {
namespace {

constexpr FileType TYPES[] = {
    {2, "Q4_0", 32, 18, Format::W4},      {3, "Q4_1", 32, 20, Format::W4M},     {6, "Q5_0", 32, 22, Format::P5},
    {7, "Q5_1", 32, 24, Format::P5M},     {8, "Q8_0", 32, 34, Format::W8},      {12, "Q4_K", 256, 144, Format::W4K},
    {13, "Q5_K", 256, 176, Format::P5K},  {14, "Q6_K", 256, 210, Format::P6K},  {20, "IQ4_NL", 32, 18, Format::T4},
    {23, "IQ4_XS", 256, 136, Format::T4}, {16, "IQ2_XXS", 256, 66, Format::T4}, {17, "IQ2_XS", 256, 74, Format::T4H},
    {22, "IQ2_S", 256, 82, Format::T4H},  {18, "IQ3_XXS", 256, 98, Format::T4}, {21, "IQ3_S", 256, 110, Format::T4},
    {19, "IQ1_S", 256, 50, Format::T4},   {29, "IQ1_M", 256, 56, Format::T4H},  {34, "TQ1_0", 256, 54, Format::T4},
    {35, "TQ2_0", 256, 66, Format::T4},   {39, "MXFP4", 32, 17, Format::T4},    {40, "NVFP4", 64, 36, Format::T4H},
};

uint32_t get32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

void put32(uint8_t* p, uint32_t v) { std::memcpy(p, &v, 4); }

void group32(const FileType& type, const uint8_t* src, uint8_t* block, int h, int lane) {
  bool four = type.format == Format::W4 || type.format == Format::W4M;
  bool minimum = type.format == Format::W4M;
  uint8_t* line = block + (minimum ? 128 : 64) + (four ? 256 : 512) * h;
  std::memcpy(block + 32 * h + 2 * lane, src, 2);
  src += 2;
  if (minimum) {
    std::memcpy(block + 64 + 32 * h + 2 * lane, src, 2);
    src += 2;
  }
  if (four) {
    for (int j = 0; j < 4; ++j) put32(line + 64 * j + 4 * lane, get32(src + 4 * j));
    return;
  }
  for (int j = 0; j < 8; ++j) put32(line + 64 * j + 4 * lane, get32(src + 4 * j) ^ 0x80808080u);
}

using Words = uint32_t __attribute__((vector_size(16)));
#if defined(__clang__)
#define MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, Words{i, j, k, l})
#endif

Words words(const uint8_t* p) {
  Words v;
  std::memcpy(&v, p, 16);
  return v;
}

// 16 bytes of each of 16 rows to four lines, a word of each row in each: what put32 does word by word.
void transpose(const uint8_t* const* rows, int64_t at, uint32_t flip, uint8_t* lines) {
  for (int lane = 0; lane < TILE; lane += 4) {
    Words a = words(rows[lane] + at), b = words(rows[lane + 1] + at), c = words(rows[lane + 2] + at),
          d = words(rows[lane + 3] + at);
    Words ab = MIX(a, b, 0, 4, 1, 5), cd = MIX(c, d, 0, 4, 1, 5), ab2 = MIX(a, b, 2, 6, 3, 7),
          cd2 = MIX(c, d, 2, 6, 3, 7);
    Words out[4] = {MIX(ab, cd, 0, 1, 4, 5), MIX(ab, cd, 2, 3, 6, 7), MIX(ab2, cd2, 0, 1, 4, 5),
                    MIX(ab2, cd2, 2, 3, 6, 7)};
    for (int j = 0; j < 4; ++j) {
      out[j] ^= Words{flip, flip, flip, flip};
      std::memcpy(lines + 64 * j + 4 * lane, &out[j], 16);
    }
  }
}

// A whole tile of Q4_0, Q4_1 or Q8_0: group32 of all its rows at once.
void whole_tile(const FileType& type, const uint8_t* const* rows, int64_t cols, uint8_t* out) {
  bool eight = type.id == 8, minimum = type.format == Format::W4M;
  int64_t size = block_bytes(type.format), header = minimum ? 128 : 64, group = eight ? 512 : 256,
          codes = minimum ? 4 : 2;
  for (int64_t g = 0; g < cols / GROUP; ++g) {
    uint8_t *block = out + g / 2 * size, *scales = block + 32 * (g % 2), *lines = block + header + group * (g % 2);
    int64_t at = g * type.bytes;
    for (int lane = 0; lane < TILE; ++lane) {
      std::memcpy(scales + 2 * lane, rows[lane] + at, 2);
      if (minimum) std::memcpy(scales + 64 + 2 * lane, rows[lane] + at + 2, 2);
    }
    transpose(rows, at + codes, eight ? 0x80808080u : 0, lines);
    if (eight) transpose(rows, at + codes + 16, 0x80808080u, lines + 256);
  }
}

void block_k4(const uint8_t* src, uint8_t* block, int quarter, int lane) {
  std::memcpy(block + 2 * lane, src, 2);
  std::memcpy(block + 32 + 2 * lane, src + 2, 2);
  const uint8_t* low = src + 16 + 32 * quarter;
  for (int h = 0; h < 2; ++h) {
    six_bit(src + 4, 2 * quarter + h, block + 64 + 32 * h + lane, block + 80 + 32 * h + lane);
    for (int j = 0; j < 4; ++j) {
      uint32_t a = get32(low + 4 * j) >> 4 * h & 0x0f0f0f0fu, b = get32(low + 16 + 4 * j) >> 4 * h & 0x0f0f0f0fu;
      put32(block + 128 + 256 * h + 64 * j + 4 * lane, a | b << 4);
    }
  }
}

// Fifth bits of a span: byte 4r+c of the plane holds that of column 4b+c in bit b.
void put_five(uint8_t* span, int lane, const uint8_t* nibbles, uint32_t high) {
  for (int j = 0; j < 4; ++j) put32(span + 64 + 64 * j + 4 * lane, get32(nibbles + 4 * j));
  for (int k = 0; k < 32; ++k) span[4 * lane + k % 4] |= static_cast<uint8_t>((high >> k & 1) << k / 4);
}

void plane32(const FileType& type, const uint8_t* src, uint8_t* block, int h, int lane) {  // Q5_0, Q5_1
  bool minimum = type.format == Format::P5M;
  std::memcpy(block + 32 * h + 2 * lane, src, 2);
  if (minimum) std::memcpy(block + 64 + 32 * h + 2 * lane, src + 2, 2);
  src += minimum ? 4 : 2;
  put_five(block + (minimum ? 128 : 64) + 320 * h, lane, src + 4, get32(src));
}

void plane_k5(const uint8_t* src, uint8_t* block, int lane) {
  std::memcpy(block + 2 * lane, src, 2);
  std::memcpy(block + 32 + 2 * lane, src + 2, 2);
  for (int g = 0; g < 8; ++g) {
    six_bit(src + 4, g, block + 64 + 32 * g + lane, block + 80 + 32 * g + lane);
    const uint8_t *high = src + 16, *low = src + 48 + 32 * (g / 2);
    uint8_t nibbles[16];
    uint32_t fifth = 0;
    for (int k = 0; k < 16; ++k)
      nibbles[k] = static_cast<uint8_t>((low[k] >> 4 * (g & 1) & 15) | (low[16 + k] >> 4 * (g & 1) & 15) << 4);
    for (int k = 0; k < 32; ++k) fifth |= static_cast<uint32_t>(high[k] >> g & 1) << k;
    put_five(block + 320 + 320 * g, lane, nibbles, fifth);
  }
}

void plane_k6(const uint8_t* src, uint8_t* block, int lane) {
  std::memcpy(block + 2 * lane, src + 208, 2);
  for (int k = 0; k < 256; ++k) {
    int half = k / 128, part = k % 128 / 32, at = k % 32, s = k / 16, i = k % 16;
    if (i == 0) block[64 + 16 * s + lane] = src[192 + s];
    uint8_t byte = src[64 * half + at + 32 * (part & 1)], low = part < 2 ? byte & 15 : byte >> 4;
    uint8_t high = src[128 + 32 * half + at] >> 2 * part & 3, *span = block + 320 + 192 * s;
    span[4 * lane + i % 4] |= static_cast<uint8_t>(high << 2 * (i / 4));
    span[64 + 64 * (i / 4 % 2) + 4 * lane + i % 4] |= static_cast<uint8_t>(i < 8 ? low : low << 4);
  }
}

// Columns from `col` of one row of codes.
void coded(Format f, const Coded& from, int columns, int64_t col, uint8_t* out, int lane) {
  bool halves = f == Format::T4H;
  for (int k = 0; k < columns; k += 16) {
    int64_t at = col + k, s = at % BLOCK_K;
    uint8_t *block = out + at / BLOCK_K * block_bytes(f),
            *lines = block + (halves ? 256 + 128 * (s / 16) : 128 + 256 * (s / 32));
    if (halves || k % 32 == 0) std::memcpy(block + 64 * (halves ? s / 16 : s / 32) + 4 * lane, from.scale + k / 16, 4);
    for (int i = 0; i < 16; ++i) {
      uint8_t code = from.code[k + i];
      if (halves) lines[64 * (i % 8 / 4) + 4 * lane + i % 4] |= static_cast<uint8_t>(i < 8 ? code : code << 4);
      else lines[64 * (i / 4) + 4 * lane + i % 4] |= static_cast<uint8_t>(s % 32 == 0 ? code : code << 4);
    }
  }
}

}  // namespace

const FileType* file_type(int id) {
  for (const FileType& t : TYPES)
    if (t.id == id) return &t;
  return nullptr;
}

std::vector<FileType> file_types() { return {std::begin(TYPES), std::end(TYPES)}; }

const char* format_name(Format f) {
  switch (f) {
    case Format::F32: return "F32";
    case Format::F16: return "F16";
    case Format::BF16: return "BF16";
    case Format::W4: return "W4";
    case Format::W4M: return "W4M";
    case Format::W4K: return "W4K";
    case Format::W8: return "W8";
    case Format::C4: return "C4";
    case Format::C4B: return "C4B";
    case Format::G4: return "G4";
    case Format::G8: return "G8";
    case Format::R8: return "R8";
    case Format::P5: return "P5";
    case Format::P5M: return "P5M";
    case Format::P5K: return "P5K";
    case Format::P6K: return "P6K";
    case Format::T4: return "T4";
    case Format::T4H: return "T4H";
    case Format::A4: return "A4";
    case Format::A8: return "A8";
  }
  return "?";
}

void pack_tile(const FileType& type, const uint8_t* raw, int64_t rows, int64_t cols, const int32_t* row_map,
               int64_t tile, uint8_t* out) {
  int64_t row_bytes = cols / type.columns * type.bytes, size = block_bytes(type.format),
          blocks = padded(cols) / BLOCK_K;
  if ((type.id == 2 || type.id == 3 || type.id == 8) && tile * TILE + TILE <= rows) {
    const uint8_t* sources[TILE];
    for (int lane = 0; lane < TILE; ++lane) {
      int64_t row = tile * TILE + lane;
      sources[lane] = raw + (row_map ? row_map[row] : row) * row_bytes;
    }
    return whole_tile(type, sources, cols, out);
  }
  for (int lane = 0; lane < TILE && tile * TILE + lane < rows; ++lane) {
    int64_t row = tile * TILE + lane;
    const uint8_t* src = raw + (row_map ? row_map[row] : row) * row_bytes;
    if (const CodedType* codes = coded_type(type.id)) {
      Coded block;
      for (int64_t b = 0; b < cols / type.columns; ++b) {
        codes->decode(src + b * type.bytes, block);
        coded(type.format, block, type.columns, b * type.columns, out, lane);
      }
      continue;
    }
    if (type.format == Format::P5K || type.format == Format::P6K) {
      for (int64_t b = 0; b < cols / 256; ++b)
        if (type.format == Format::P5K) plane_k5(src + b * type.bytes, out + b * 4 * size, lane);
        else plane_k6(src + b * type.bytes, out + b * 4 * size, lane);
      continue;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      uint8_t* block = out + b * size;
      if (type.format == Format::W4K) {
        block_k4(src + b / 4 * type.bytes, block, static_cast<int>(b % 4), lane);
        continue;
      }
      for (int h = 0; h < 2 && (2 * b + h) * GROUP < cols; ++h)
        if (type.format == Format::P5 || type.format == Format::P5M)
          plane32(type, src + (2 * b + h) * type.bytes, block, h, lane);
        else group32(type, src + (2 * b + h) * type.bytes, block, h, lane);
    }
  }
}

}  // namespace llama2
