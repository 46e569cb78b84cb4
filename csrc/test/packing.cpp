#include <vector>

#include "test/support.h"

namespace check {

// Blocks to numbers, in pieces of rows: what the tiles of the same blocks stand for, and that rounded to bfloat16.
void check_unpack() {
  rng.seed(13);
  const Kernels* k = kernels_scalar();
  for (int id : {2, 3, 6, 7, 8, 12, 13, 14}) {
    const FileType& t = *file_type(id);
    for (int64_t cols : {int64_t{t.columns}, int64_t{t.columns} * 3}) {
      constexpr int64_t rows = 19;
      std::vector<uint8_t> raw = random_blocks(t, rows, cols), memory(2 * tile_bytes(t.format, cols));
      Matrix m;
      m.rows = rows;
      m.cols = cols;
      m.format = t.format;
      m.stride = tile_bytes(t.format, cols);
      m.data = memory.data();
      for (int64_t i = 0; i < 2; ++i) pack_tile(t, raw.data(), rows, cols, nullptr, i, memory.data() + i * m.stride);
      std::vector<float> want(rows * cols), found(rows * cols), wide(rows * cols);
      for (int64_t r = 0; r < rows; ++r) k->dequantize_row(m, r, want.data() + r * cols);
      std::vector<uint16_t> narrow(rows * cols);
      for (int64_t first : {0, 7}) {
        unpack_rows(id, raw.data(), cols, false, first, first ? rows : 7, found.data());
        unpack_rows(id, raw.data(), cols, true, first, first ? rows : 7, narrow.data());
      }
      for (size_t i = 0; i < narrow.size(); ++i) { wide[i] = from_bits(static_cast<uint32_t>(narrow[i]) << 16); }
      expect(distance(found, want) < 1e-6, "unpack_rows", "", id, cols, distance(found, want));
      expect(distance(wide, found) < 3e-3, "unpack_rows to bfloat16", "", id, cols, distance(wide, found));
    }
  }
  for (int id : {10, 11}) {  // types without tiles: that they stay within their buffers
    std::vector<uint8_t> raw(3 * unpacked_row_bytes(id, 512));
    for (auto& b : raw) b = static_cast<uint8_t>(rng());
    std::vector<float> out(3 * 512);
    unpack_rows(id, raw.data(), 512, false, 0, 3, out.data());
  }
  expect(!unpacked_row_bytes(99, 256) && !unpacked_row_bytes(12, 255), "unpacked_row_bytes", "", 0, 0, 0);
}

}  // namespace check
