// The kernel contract: what every instruction-set build provides, in plain data types.
//
// Packed weights are cut into tiles of 16 rows; a tile is a run of blocks of 64 columns, read in ascending order.
// Lane r of a vector accumulates row r, so no kernel needs a horizontal sum.
//   4-bit block: header, then per group of 32 columns four lines of 64 bytes. Byte 4r+c of line j holds row r,
//                column 4j+c in the low nibble and column 16+4j+c in the high nibble.
//   8-bit block: header, then per group eight lines; byte 4r+c of line j is row r, column 4j+c, stored as value+128.
#pragma once
#include <cstddef>
#include <cstdint>

namespace llama2 {

constexpr int TILE = 16;       // rows of a packed tile
constexpr int BLOCK_K = 64;    // columns of a packed block
constexpr int GROUP = 32;      // columns that share one activation scale
constexpr int MAX_MR = 8;      // tokens of one activation block
constexpr int PAGE = 16;       // cached positions of one KV page

enum class Format : int32_t {
  F32 = 0,   // row-major, in place
  F16 = 1,   // row-major, in place
  BF16 = 2,  // row-major, in place
  W4 = 3,    // scale f16, w = s * (q - 8)
  W4M = 4,   // scale f16, minimum f16, w = s * q + m
  W4K = 5,   // super-scales f16 d and dmin, u8 scale and minimum per group, w = d*sc*q - dmin*m
  W8 = 6,    // scale f16, w = s * q
  W8M = 7,   // scale f16, minimum f16
  W8K = 8,   // as W4K, 8-bit values
  W6K = 9,   // super-scale f16 d, s8 scale per 16 columns
};

inline bool row_major(Format f) { return f == Format::F32 || f == Format::F16 || f == Format::BF16; }

inline int64_t block_bytes(Format f) {  // bytes of one 16 x 64 block; 0 for row-major formats
  switch (f) {
    case Format::W4: return 64 + 512;
    case Format::W4M: return 128 + 512;
    case Format::W4K: return 128 + 512;
    case Format::W8: return 64 + 1024;
    case Format::W8M: return 128 + 1024;
    case Format::W8K: return 128 + 1024;
    case Format::W6K: return 128 + 1024;
    default: return 0;
  }
}

struct Matrix {
  const uint8_t* data = nullptr;
  int64_t rows = 0, cols = 0;
  int64_t stride = 0;  // bytes from one row (row-major) or one tile (packed) to the next
  Format format = Format::F32;
  const float* bias = nullptr;
  int64_t tiles() const { return (rows + TILE - 1) / TILE; }
};

inline int64_t padded(int64_t k) { return (k + BLOCK_K - 1) / BLOCK_K * BLOCK_K; }

// Activations of M tokens, each in the forms that the matrices at hand need; K is padded with zeros to 64.
// int8 form: blocks of 8 tokens, the last of 1, 2, 4 or 8 (MR): q [K/4][MR][4], scale/negsum/sum [K/32][MR].
struct Acts {
  int64_t m = 0, k = 0;         // k: the true width; rows are padded(k) apart
  float* f32 = nullptr;         // [m][padded k]
  uint16_t* bf16 = nullptr;     // [m][padded k]
  int8_t* q = nullptr;
  float* scale = nullptr;
  int32_t* negsum = nullptr;    // -128 times the sum of the 32 quantised values
  int32_t* negsum16 = nullptr;  // the same for halves of a group: [K/16][MR]
  float* sum = nullptr;         // scale * sum of the quantised values
};

enum Form : int { FORM_F32 = 1, FORM_BF16 = 2, FORM_INT8 = 4 };

inline int block_mr(int64_t m, int64_t block) {  // tokens that activation block `block` is laid out for
  int64_t left = m - block * MAX_MR;
  return left >= 5 ? 8 : left >= 3 ? 4 : left >= 2 ? 2 : 1;
}

inline int64_t padded_tokens(int64_t m) {  // rows of the int8 form, whose last block is 1, 2, 4 or 8 tokens wide
  return m == 0 ? 0 : (m - 1) / MAX_MR * MAX_MR + block_mr(m, (m - 1) / MAX_MR);
}

enum class Epilogue : int32_t { STORE, ADD, SWIGLU };

// out[m][row] (+)= w . x, or silu(w . x) * (w1 . x), for tiles [tile0, tile1).
struct Job {
  const Matrix* w = nullptr;
  const Matrix* w1 = nullptr;
  float* out = nullptr;
  int64_t ldo = 0;
  Epilogue epilogue = Epilogue::STORE;
};

enum class KvType : int32_t { F32 = 0, BF16 = 1, I8 = 2 };

inline int64_t kv_scales(int64_t width) { return ((width + GROUP - 1) / GROUP * PAGE * 2 + 63) / 64 * 64; }  // bytes

// One layer of the cache. kv.inl says how 16 positions of one kv head lie in a page; a run of pages holds, for each
// layer and head, all its keys and then all its values: [run][layer][kv head][keys | values][page]. A text is read in
// long stretches, and memory is committed by the run although it consists of huge pages.
struct KvLayer {
  uint8_t* data = nullptr;
  int64_t pages = 0, heads = 0, width = 0;
  int64_t stride = 0;  // bytes from a run to the next
  int shift = 0;       // a run has 1 << shift pages
  KvType type = KvType::F32;
  int64_t wide() const { return (width + 15) / 16 * 16; }
  int64_t key_bytes() const {  // of one head of a page
    if (type == KvType::I8) return kv_scales(width) + (width + 3) / 4 * 64;
    return width * PAGE * (type == KvType::F32 ? 4 : 2);
  }
  int64_t value_bytes() const {
    return type == KvType::I8 ? kv_scales(width) + wide() * PAGE : wide() * PAGE * (type == KvType::F32 ? 4 : 2);
  }
  int64_t head_bytes() const { return (key_bytes() + value_bytes()) << shift; }  // of a run
  uint8_t* key_page(int64_t head, int64_t page) const {
    return data + (page >> shift) * stride + head * head_bytes() + (page & ((1 << shift) - 1)) * key_bytes();
  }
  uint8_t* value_page(int64_t head, int64_t page) const {
    return data + (page >> shift) * stride + head * head_bytes() + (key_bytes() << shift) +
           (page & ((1 << shift) - 1)) * value_bytes();
  }
};

struct AttentionTask {
  const float* q = nullptr;  // query of the first token and first head of the group
  float* out = nullptr;
  int64_t ldq = 0, ldo = 0;  // floats between tokens
  int tokens = 0, group = 0;
  int64_t first = 0;         // cache slot of the first token; token i sees slots 0 .. first+i
  const int32_t* table = nullptr;
  int64_t kv_head = 0;
  float scale = 1;
};

struct Kernels {
  const char* name;
  // tokens [m0, m1) of x, m0 and m1 multiples of 8 or the end: the wanted forms of the activations
  void (*prepare)(const float* x, int64_t ldx, int64_t m0, int64_t m1, int forms, const Acts& to);
  void (*rmsnorm)(const float* x, const float* weight, float eps, int64_t k, float* out);
  void (*matmul)(const Job& job, const Acts& x, int64_t tile0, int64_t tile1, bool exact);
  void (*dequantize_row)(const Matrix& w, int64_t row, float* out);
  void (*rope)(float* x, const float* cos, const float* sin, int64_t heads, int64_t width);
  void (*kv_store)(const KvLayer& kv, const float* k, const float* v, int64_t head, int32_t page, int slot);
  void (*attention)(const KvLayer& kv, const AttentionTask& task, float* scratch);
  double (*peak)(int kind, int64_t iterations);  // operations of a register-only loop: 0 int8 dot, 1 bf16 dot, 2 fma
  int64_t (*read)(const uint8_t* data, int64_t bytes);  // touch every line, as fast as a load can
};

constexpr int ATT_ROWS = 8;    // query rows handled together
constexpr int ATT_KEYS = 64;   // keys of one online-softmax step
// bytes of the int8 forms of one query row, and of its weights in one step
inline int64_t int8_query(int64_t width) { return (width + GROUP - 1) / GROUP * (12 + 2 * GROUP); }
inline int64_t int8_weights(int64_t width) { return (width + GROUP - 1) / GROUP * (4 + 2 * ATT_KEYS); }
inline int64_t attention_scratch(int64_t width) {  // floats: queries, outputs, scores, and the int8 forms
  return ATT_ROWS * (2 * (width + 16) + ATT_KEYS + (int8_query(width) + int8_weights(width)) / 4) + 64;
}

const Kernels* kernels_scalar();
const Kernels* kernels_avx2();
const Kernels* kernels_avxvnni();
const Kernels* kernels_avx512();
const Kernels* kernels_neon();

const Kernels* best_kernels();
const Kernels* find_kernels(const char* name);  // null when the build or the machine lacks it
int list_kernels(const char** names, int capacity);

}  // namespace llama2
