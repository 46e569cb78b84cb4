// From codes, scales and zeros (NF4, GPTQ, int8 per row) to kernel tiles, losslessly.
#include <cmath>
#include <cstring>

#include "engine/pack.h"

namespace llama2 {
namespace {

uint8_t code(const CodeSource& s, int64_t row, int64_t col) {
  int64_t at = row * s.cols + (s.order ? s.order[col] : col);
  if (!s.pairs) return s.codes[at];
  return at & 1 ? s.codes[at / 2] & 15 : s.codes[at / 2] >> 4;
}

// Column k of a span of 32 into the nibble lines of lane `lane`.
void put_nibble(Format f, uint8_t* line, int lane, int k, uint8_t value) {
  if (f == Format::T4H) {  // two spans of 16
    line[128 * (k / 16) + 64 * (k % 8 / 4) + 4 * lane + k % 4] |= static_cast<uint8_t>(k % 16 < 8 ? value : value << 4);
  } else if (f == Format::C4B) {  // line k/8; bits 16c+4i of the dword for column 2i+c
    int bit = 16 * (k & 1) + 4 * (k % 8 / 2);
    line[64 * (k / 8) + 4 * lane + bit / 8] |= static_cast<uint8_t>(value << bit % 8);
  } else {
    line[64 * (k % 16 / 4) + 4 * lane + k % 4] |= static_cast<uint8_t>(k < 16 ? value : value << 4);
  }
}

void head_codebook(const CodeSource& s, int64_t row, int64_t col, uint8_t* head, int lane) {
  const float* scales = static_cast<const float*>(s.scales);
  std::memcpy(head + 4 * lane, scales + (row * s.cols + col) / s.group, 4);
}

void head_table(const CodeSource& s, int64_t row, int64_t col, uint8_t* head, int lane) {  // T4: 2 scales, T4H: 4
  const float* scales = static_cast<const float*>(s.scales) + row * up(s.cols, s.group);
  for (int64_t g = 0; g < BLOCK_K / s.group && col + g * s.group < s.cols; ++g)
    std::memcpy(head + 64 * g + 4 * lane, scales + col / s.group + g, 4);
}

void head_affine(const CodeSource& s, int64_t row, int64_t col, uint8_t* head, int lane) {
  int64_t at = row * up(s.cols, s.group) + col / s.group;
  std::memcpy(head + 4 * lane, static_cast<const float*>(s.scales) + at, 4);
  std::memcpy(head + 64 + 4 * lane, s.minima + at, 4);
}

void head_group(const CodeSource& s, int64_t row, int64_t col, uint8_t* head, int lane) {
  int64_t at = row * up(s.cols, s.group) + col / s.group;
  std::memcpy(head + 2 * lane, static_cast<const uint16_t*>(s.scales) + at, 2);
  head[32 + lane] = s.zeros[at];
}

void head_row(const CodeSource& s, int64_t row, int64_t, uint8_t* head, int lane) {
  std::memcpy(head + 4 * lane, static_cast<const float*>(s.scales) + row, 4);
}

}  // namespace

Codebook codebook_of(const float* values) {
  Codebook c = {};
  std::memcpy(c.value, values, sizeof c.value);
  float top = 0;
  for (float v : c.value) top = std::fmax(top, std::fabs(v));
  if (!(top > 0)) top = 1;
  double least = INFINITY;
  for (int steps = 64; steps <= 127; ++steps) {
    float step = top / static_cast<float>(steps);
    double error = 0;
    for (float v : c.value) error += std::pow(std::rint(v / step) * step - v, 2.0);
    if (error < least) least = error, c.step = step;
  }
  for (int i = 0; i < 16; ++i) c.byte[i] = static_cast<uint8_t>(128 + static_cast<int>(std::rint(values[i] / c.step)));
  return c;
}

void pack_codes_tile(const CodeSource& s, int64_t tile, uint8_t* out) {
  bool codebook = s.format == Format::C4 || s.format == Format::C4B,
       table = s.format == Format::T4 || s.format == Format::T4H;
  bool affine = s.format == Format::A4 || s.format == Format::A8;
  bool four = codebook || table || s.format == Format::G4 || s.format == Format::A4;
  auto head = codebook                 ? head_codebook
              : table                  ? head_table
              : affine                 ? head_affine
              : s.format == Format::R8 ? head_row
                                       : head_group;
  int64_t unit = codebook || table        ? BLOCK_K
                 : s.format == Format::R8 ? up(s.cols, GROUP) * GROUP
                                          : s.group,
          size = four ? 256 : 512;
  int64_t header = s.format == Format::T4H ? 256 : table || affine ? 128 : 64;
  uint8_t flip = s.format == Format::R8 ? 128 : 0;  // signed bytes become value + 128
  for (int lane = 0; lane < TILE && tile * TILE + lane < s.rows; ++lane) {
    int64_t row = tile * TILE + lane;
    uint8_t* to = out;
    for (int64_t k = 0; k < s.cols; k += GROUP, to += size) {
      if (k % unit == 0) {
        head(s, row, k, to, lane);
        to += header;
      }
      for (int i = 0; i < GROUP && k + i < s.cols; ++i) {
        uint8_t value = code(s, row, k + i);
        if (four) put_nibble(s.format, to, lane, i, value);
        else to[64 * (i / 4) + 4 * lane + i % 4] = value ^ flip;
      }
    }
  }
}

}  // namespace llama2
