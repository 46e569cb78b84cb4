// From the blocks of a GGUF file to kernel tiles, losslessly.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace llama2 {

struct FileType {
  int id;  // the number GGUF gives it
  const char* name;
  int columns, bytes;  // of one block
  Format format;       // what it becomes
};
// Scale and minimum of group g, six bits each, in the twelve bytes that Q4_K and Q5_K keep them in.
inline void six_bit(const uint8_t* s, int g, uint8_t* scale, uint8_t* minimum) {
  *scale = static_cast<uint8_t>(g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6 << 4));
  *minimum = static_cast<uint8_t>(g < 4 ? s[g + 4] & 63 : (s[g + 4] >> 4) | (s[g] >> 6 << 4));
}

// Codes and scales of one block of a codebook type.
struct Coded {
  uint8_t code[256];
  float scale[16];  // of every 16 columns
};
struct CodedType {
  int id, columns, bytes;
  const float* table;  // 16 numbers
  void (*decode)(const uint8_t* block, Coded& out);
};
const CodedType* coded_type(int id);    // null for a type of another kind
const Codebook* type_codebook(int id);  // its table as the kernels want it, null for a type of another kind

const FileType* file_type(int id);   // null for a type without a packing
std::vector<FileType> file_types();  // every type with one

const char* format_name(Format f);  // as kernels.h writes it

// Tile `tile` of a matrix of rows x cols; file row of row r is row_map[r], or r where row_map is null.
void pack_tile(const FileType& type, const uint8_t* raw, int64_t rows, int64_t cols, const int32_t* row_map,
               int64_t tile, uint8_t* out);

// Bytes of a row of `cols` weights of a GGUF type that unpack_rows knows, 0 for another type or a row of no whole
// blocks.
int64_t unpacked_row_bytes(int id, int64_t cols);
// Rows [begin, end) of the unpacked matrix, float32 or bfloat16 (rounded once).
void unpack_rows(int id, const uint8_t* raw, int64_t cols, bool bf16, int64_t begin, int64_t end, void* out);

// Weights given as codes, scales and zeros rather than as blocks of a file; every array is rows x its own columns.
struct CodeSource {
  Format format = Format::C4;
  int64_t rows = 0, cols = 0;
  int64_t group = 0;               // columns of one scale
  const uint8_t* codes = nullptr;  // rows x cols, a byte each; signed for R8
  bool pairs = false;              // C4, C4B: two codes a byte, the first in the high nibble
  const void* scales = nullptr;    // C4, C4B: float32 per `group` weights; T4, T4H, A4, A8: float32, G4, G8: float16
                                   // rows x groups; R8: float32 rows
  const float* minima = nullptr;   // A4, A8: rows x groups
  const uint8_t* zeros = nullptr;  // G4, G8: rows x groups
  const int32_t* order = nullptr;  // column j of the tile is column order[j] of the codes
};
// The forms of 16 values that the kernels want. The 8-bit step is the one whose rounding errs least (all values alike):
// the largest value takes 64 to 127 steps. NF4: 112 and 0.33 % of the root mean square, 0.42 % with 127.
Codebook codebook_of(const float* values);

void pack_codes_tile(const CodeSource& from, int64_t tile, uint8_t* out);

}  // namespace llama2
