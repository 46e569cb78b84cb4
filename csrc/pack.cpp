#include "pack.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

namespace llama2 {
namespace {

constexpr FileType TYPES[] = {
    {2, "Q4_0", 32, 18, Format::W4},    {3, "Q4_1", 32, 20, Format::W4M},   {6, "Q5_0", 32, 22, Format::W8},
    {7, "Q5_1", 32, 24, Format::W8M},   {8, "Q8_0", 32, 34, Format::W8},    {12, "Q4_K", 256, 144, Format::W4K},
    {13, "Q5_K", 256, 176, Format::W8K}, {14, "Q6_K", 256, 210, Format::W6K},
};

uint32_t get32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

void put32(uint8_t* p, uint32_t v) { std::memcpy(p, &v, 4); }

// `line`: the first line of a group; lane r; values of the group as they are stored
void put_bytes(uint8_t* line, int lane, const uint8_t* values, int count) {
  for (int j = 0; j < count / 4; ++j) std::memcpy(line + 64 * j + 4 * lane, values + 4 * j, 4);
}

void group32(const FileType& type, const uint8_t* src, uint8_t* block, int h, int lane) {
  bool four = type.format == Format::W4 || type.format == Format::W4M;
  bool minimum = type.format == Format::W4M || type.format == Format::W8M;
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
  if (type.id == 8) {
    for (int j = 0; j < 8; ++j) put32(line + 64 * j + 4 * lane, get32(src + 4 * j) ^ 0x80808080u);
    return;
  }
  uint32_t high = get32(src);
  uint8_t values[32], base = minimum ? 128 : 112;  // Q5_0 stores q, w = d * (q - 16)
  for (int k = 0; k < 32; ++k) {
    uint8_t nibble = k < 16 ? src[4 + k] & 15 : src[4 + k - 16] >> 4;
    values[k] = static_cast<uint8_t>(base + (nibble | ((high >> k & 1) << 4)));
  }
  put_bytes(line, lane, values, 32);
}

void six_bit(const uint8_t* s, int g, uint8_t* scale, uint8_t* minimum) {  // the packed scales of Q4_K and Q5_K
  if (g < 4) {
    *scale = s[g] & 63;
    *minimum = s[g + 4] & 63;
  } else {
    *scale = static_cast<uint8_t>((s[g + 4] & 15) | (s[g - 4] >> 6 << 4));
    *minimum = static_cast<uint8_t>((s[g + 4] >> 4) | (s[g] >> 6 << 4));
  }
}

void block_k45(const FileType& type, const uint8_t* src, uint8_t* block, int quarter, int lane) {
  bool five = type.id == 13;
  std::memcpy(block + 2 * lane, src, 2);
  std::memcpy(block + 32 + 2 * lane, src + 2, 2);
  const uint8_t *high = src + 16, *low = src + (five ? 48 : 16) + 32 * quarter;
  for (int h = 0; h < 2; ++h) {
    int g = 2 * quarter + h;
    six_bit(src + 4, g, block + 64 + 32 * h + lane, block + 80 + 32 * h + lane);
    if (five) {
      uint8_t values[32];
      for (int k = 0; k < 32; ++k)
        values[k] = static_cast<uint8_t>(128 + ((h ? low[k] >> 4 : low[k] & 15) | ((high[k] >> g & 1) << 4)));
      put_bytes(block + 128 + 512 * h, lane, values, 32);
      continue;
    }
    for (int j = 0; j < 4; ++j) {
      uint32_t a = get32(low + 4 * j) >> 4 * h & 0x0f0f0f0fu, b = get32(low + 16 + 4 * j) >> 4 * h & 0x0f0f0f0fu;
      put32(block + 128 + 256 * h + 64 * j + 4 * lane, a | b << 4);
    }
  }
}

void block_k6(const uint8_t* src, uint8_t* block, int quarter, int lane) {
  std::memcpy(block + 2 * lane, src + 208, 2);
  for (int s = 0; s < 4; ++s) {
    uint8_t values[16];
    block[32 + 16 * s + lane] = src[192 + 4 * quarter + s];
    for (int i = 0; i < 16; ++i) {
      int k = 64 * quarter + 16 * s + i, half = k / 128, part = k % 128 / 32, at = k % 32;
      uint8_t low = src[64 * half + at + 32 * (part & 1)];
      uint8_t q = static_cast<uint8_t>((part < 2 ? low & 15 : low >> 4) | ((src[128 + 32 * half + at] >> 2 * part & 3) << 4));
      values[i] = static_cast<uint8_t>(q + 96);
    }
    put_bytes(block + 128 + 256 * s, lane, values, 16);
  }
}

}  // namespace

const FileType* file_type(int id) {
  for (const FileType& t : TYPES)
    if (t.id == id) return &t;
  return nullptr;
}

std::shared_ptr<uint8_t> allocate(int64_t bytes, bool huge) {
  constexpr size_t PAGE_2M = size_t{2} << 20;
  size_t size = (static_cast<size_t>(bytes) + PAGE_2M - 1) / PAGE_2M * PAGE_2M, total = size + PAGE_2M;
  void* p = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  uint8_t* aligned = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(p) + PAGE_2M - 1) / PAGE_2M * PAGE_2M);
  if (huge) madvise(aligned, size, MADV_HUGEPAGE);
  return std::shared_ptr<uint8_t>(aligned, [p, total](uint8_t*) { munmap(p, total); });
}

void pack_tile(const FileType& type, const uint8_t* raw, int64_t rows, int64_t cols, const int32_t* row_map, int64_t tile,
               uint8_t* out) {
  int64_t row_bytes = cols / type.columns * type.bytes, size = block_bytes(type.format), blocks = padded(cols) / BLOCK_K;
  for (int lane = 0; lane < TILE && tile * TILE + lane < rows; ++lane) {
    int64_t row = tile * TILE + lane;
    const uint8_t* src = raw + (row_map ? row_map[row] : row) * row_bytes;
    for (int64_t b = 0; b < blocks; ++b) {
      uint8_t* block = out + b * size;
      if (type.columns == 256) {
        const uint8_t* super = src + b / 4 * type.bytes;
        if (type.id == 14) block_k6(super, block, static_cast<int>(b % 4), lane);
        else block_k45(type, super, block, static_cast<int>(b % 4), lane);
        continue;
      }
      for (int h = 0; h < 2 && (2 * b + h) * GROUP < cols; ++h)
        group32(type, src + (2 * b + h) * type.bytes, block, h, lane);
    }
  }
}

}  // namespace llama2
