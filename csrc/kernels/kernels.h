// The kernel contract: what every instruction-set build provides, in plain data types.
//
// Packed weights are cut into tiles of 16 rows; a tile is a run of blocks of 64 columns, read in ascending order.
// Lane r of a vector accumulates row r, so no kernel needs a horizontal sum.
// The formats from C4 on (quant_formats.inl) are units of a header and spans of lines; a span is 32 columns, or 16 of
// P6K and T4H.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/bump.h"

namespace llama2 {

constexpr int TILE = 16;     // rows of a packed tile
constexpr int BLOCK_K = 64;  // columns of a packed block
constexpr int GROUP = 32;    // columns that share one activation scale
constexpr int MAX_MR = 8;    // tokens of one activation block
constexpr int PAGE = 16;     // cached positions of one KV page

enum class Format : int32_t {
  F32 = 0,   // row-major, in place
  F16 = 1,   // row-major, in place
  BF16 = 2,  // row-major, in place
  W4 = 3,    // scale f16, w = s * (q - 8)
  W4M = 4,   // scale f16, minimum f16, w = s * q + m
  W4K = 5,   // super-scales f16 d and dmin, u8 scale and minimum per group, w = d*sc*q - dmin*m
  W8 = 6,    // scale f16, w = s * q
  C4 = 10,   // 4-bit codes into a table of 16 floats, scale f32 per 64; fast: the table in 8 bits
  C4B = 11,  // the same; fast: table and activations in bfloat16
  G4 = 12,   // scale f16 and zero u8 per `group` columns, w = s * (q - z)
  G8 = 13,   // the same with 8-bit values
  R8 = 14,   // signed bytes, scale f32 per row
  P5 = 15,   // 5 bits: nibbles and a plane of fifth bits; scale f16 per 32, w = s * (q - 16)
  P5M = 16,  // scale f16, minimum f16
  P5K = 17,  // as W4K, 5 bits, in blocks of 256 columns
  P6K = 18,  // nibbles and planes of two bits; super-scale f16 d, s8 scale per 16, in blocks of 256 columns
  T4 = 19,   // 4-bit codes into a table of 16 floats, scale f32 per 32
  T4H = 20,  // the same, scale f32 per 16
  A4 = 21,   // scale f32 and minimum f32 per `group` columns, w = s * q + m
  A8 = 22,   // the same with 8-bit values
};

inline bool row_major(Format f) { return f == Format::F32 || f == Format::F16 || f == Format::BF16; }

inline int64_t block_bytes(Format f) {  // bytes of 16 rows x 64 columns; 0 for row-major formats and G4, G8, A4, A8, R8
  switch (f) {
    case Format::W4: return 64 + 512;
    case Format::W4M: return 128 + 512;
    case Format::W4K: return 128 + 512;
    case Format::W8: return 64 + 1024;
    case Format::C4:
    case Format::C4B: return 64 + 512;
    case Format::T4: return 128 + 512;
    case Format::T4H: return 256 + 512;
    case Format::P5: return 64 + 640;
    case Format::P5M: return 128 + 640;
    case Format::P5K: return 80 + 640;  // a quarter of 16 x 256
    case Format::P6K: return 80 + 768;
    default: return 0;
  }
}

inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step; }  // step > 0

inline int64_t tile_bytes(Format f, int64_t cols, int64_t group = 0) {  // bytes of 16 rows; 0 for row-major formats
  int64_t spans = up(cols, GROUP);
  if (f == Format::R8) return 64 + spans * 512;
  if (f == Format::G4 || f == Format::G8) return up(cols, group) * 64 + spans * (f == Format::G4 ? 256 : 512);
  if (f == Format::A4 || f == Format::A8) return up(cols, group) * 128 + spans * (f == Format::A4 ? 256 : 512);
  return up(cols, BLOCK_K) * block_bytes(f);
}

struct Codebook {  // of C4, C4B, T4 and T4H, made once a matrix (codebook_of in pack.h)
  float value[16];
  uint8_t byte[16];  // 128 + value / step, rounded: the 8-bit form
  float step;
  float unused[11];  // whole lines
};

struct Matrix {
  const uint8_t* data = nullptr;
  int64_t rows = 0, cols = 0;
  int64_t stride = 0;  // bytes from one row (row-major) or one tile (packed) to the next
  Format format = Format::F32;
  const float* bias = nullptr;
  int64_t group = 0;                   // G4, G8, A4, A8: columns that share a scale
  const Codebook* codebook = nullptr;  // C4, C4B, T4, T4H
  const int32_t* order = nullptr;      // column j of the tiles is column order[j] of the activations; null: the same
  int64_t tiles() const { return (rows + TILE - 1) / TILE; }
};

inline int64_t padded(int64_t k) { return (k + BLOCK_K - 1) / BLOCK_K * BLOCK_K; }

// Activations of M tokens, each in the forms that the matrices at hand need; K is padded with zeros to 64.
// int8 form: blocks of 8 tokens, the last of 1, 2, 4 or 8 (MR): q [K/4][MR][4], scale/negsum/sum [K/32][MR].
// int24 form: the same arrays, with three rows for every token, x = sum of scale * q over them, blocks of 2 tokens
// (the last of 1 or 2). Integer dots are exact, so three of them give a product to the last bits of float32.
struct Acts {
  int64_t m = 0, k = 0;      // k: the true width; rows are padded(k) apart
  float* f32 = nullptr;      // [m][padded k]
  uint16_t* bf16 = nullptr;  // [m][padded k]
  int8_t* q = nullptr;
  float* scale = nullptr;
  int32_t* negsum = nullptr;       // -128 times the sum of the 32 quantised values
  int32_t* negsum16 = nullptr;     // the same for halves of a group: [K/16][MR]
  float* sum = nullptr;            // scale * sum of the quantised values
  const int32_t* order = nullptr;  // the matrix's: every form holds the columns in this order
};

enum Form : int { FORM_F32 = 1, FORM_BF16 = 2, FORM_INT8 = 4, FORM_INT24 = 8 };

inline bool in_integers(Format f) { return f == Format::W4 || f == Format::W4M || f == Format::W4K || f == Format::W8; }

inline int form_of(Format f, bool exact) {  // what a matrix of this format reads
  if (f == Format::F32 || f == Format::F16) return FORM_F32;
  if (exact) return in_integers(f) ? FORM_INT24 : FORM_F32;
  return f == Format::BF16 || f == Format::C4B ? FORM_BF16 : FORM_INT8;
}

constexpr int LIMBS = 3;  // rows of a token in the int24 form
inline int block_tokens(int form) { return form == FORM_INT24 ? 2 : MAX_MR; }

inline int block_mr(int64_t m, int64_t block, int form) {  // rows that activation block `block` is laid out for
  int64_t left = m - block * block_tokens(form);
  if (form == FORM_INT24) return left >= 2 ? 2 * LIMBS : LIMBS;
  return left >= 5 ? 8 : left >= 3 ? 4 : left >= 2 ? 2 : 1;
}

inline int64_t padded_tokens(int64_t m) {  // rows of the int8 form, whose last block is 1, 2, 4 or 8 tokens wide
  return m == 0 ? 0 : (m - 1) / MAX_MR * MAX_MR + block_mr(m, (m - 1) / MAX_MR, FORM_INT8);
}

// Bytes that `lay_out` takes for m tokens of k columns in every form, and the arrays in them.
inline int64_t acts_bytes(int64_t m, int64_t k) {
  int64_t kp = padded(k), mp = (m + MAX_MR - 1) / MAX_MR * MAX_MR;
  return mp * kp * (4 + 2 + LIMBS) + LIMBS * mp * kp / GROUP * 20 + 8 * 64;
}

inline Acts lay_out(Bump& from, int64_t m, int64_t k) {
  int64_t kp = padded(k), mp = (m + MAX_MR - 1) / MAX_MR * MAX_MR, groups = LIMBS * mp * kp / GROUP;
  Acts a;
  a.m = m;
  a.k = k;
  a.f32 = from.take<float>(mp * kp);
  a.bf16 = from.take<uint16_t>(mp * kp);
  a.q = from.take<int8_t>(mp * kp * LIMBS);
  a.scale = from.take<float>(groups);
  a.sum = from.take<float>(groups);
  a.negsum = from.take<int32_t>(groups);
  a.negsum16 = from.take<int32_t>(2 * groups);
  return a;
}

// What an adapter adds to one linear: scale * B (A x), x and both products in float32.
struct LowRank {
  const uint8_t* a = nullptr;  // [rank padded to 4 with zeros][in]
  const uint8_t* b = nullptr;  // tiles of 16 outputs, [tile][rank][16]: a register is one column of a tile
  int64_t rank = 0, in = 0;
  Format a_format = Format::F32, b_format = Format::F32;  // F32, F16 or BF16
  float scale = 0;
  int64_t padded_rank() const { return (rank + 3) / 4 * 4; }
};

// The additions to one linear for the tokens of a step, each of its own sequence's adapter.
struct Addend {
  const LowRank* const* adapters = nullptr;  // [token]: all linears of an adapter, or null
  int64_t index = 0;                         // of this linear among them
  const float* shrunk = nullptr;             // scale * A x, ld apart
  int64_t ld = 0;
};

enum class Epilogue : int32_t { STORE, ADD, SWIGLU };

// out[m][row] (+)= w . x, or silu(w . x) * (w1 . x), for tiles [tile0, tile1).
struct Job {
  const Matrix* w = nullptr;
  const Matrix* w1 = nullptr;
  float* out = nullptr;
  int64_t ldo = 0;
  Epilogue epilogue = Epilogue::STORE;
  const Addend* low = nullptr;   // joins w . x before anything else is done to it; null: no adapter
  const Addend* low1 = nullptr;  // joins w1 . x
  const Acts* x1 = nullptr;      // the activations of w1 where its order of columns is another one
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
  // Always inline, as is everything here that isa.cpp might leave a copy of: the linker keeps one copy for the whole
  // program, and that of AVX-512 kernels must not run where there is no AVX-512.
  __attribute__((always_inline)) uint8_t* key_page(int64_t head, int64_t page) const {
    return data + (page >> shift) * stride + head * head_bytes() + (page & ((1 << shift) - 1)) * key_bytes();
  }
  __attribute__((always_inline)) uint8_t* value_page(int64_t head, int64_t page) const {
    return data + (page >> shift) * stride + head * head_bytes() + (key_bytes() << shift) +
           (page & ((1 << shift) - 1)) * value_bytes();
  }
};

struct AttentionTask {
  const float* q = nullptr;  // query of the first token and first head of the group
  float* out = nullptr;
  int64_t ldq = 0, ldo = 0;  // floats between tokens
  int tokens = 0, group = 0;
  int64_t first = 0;  // cache slot of the first token; token i sees slots 0 .. first+i
  const int32_t* table = nullptr;
  int64_t kv_head = 0;
  float scale = 1;
};

struct TrainKernels;  // training.h

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
  // rows row .. row+3 of scale * A x for `count` tokens of x, named by their index, to t[token][row]
  void (*shrink)(const LowRank& l, const float* x, int64_t ldx, const int32_t* tokens, int64_t count, int64_t row,
                 float* t, int64_t ldt);
  const TrainKernels* train;
};

constexpr int ATT_ROWS = 8;   // query rows handled together
constexpr int ATT_KEYS = 64;  // keys of one online-softmax step
// bytes of the int8 forms of one query row, and of its weights in one step
inline int64_t int8_query(int64_t width) { return (width + GROUP - 1) / GROUP * (12 + 2 * GROUP); }
inline int64_t int8_weights(int64_t width) { return (width + GROUP - 1) / GROUP * (4 + 2 * ATT_KEYS); }
inline int64_t attention_scratch(int64_t width) {  // floats: queries, outputs, scores, and the int8 forms
  return ATT_ROWS * (2 * (width + 16) + ATT_KEYS + (int8_query(width) + int8_weights(width)) / 4) + 64;
}

const Kernels* kernels_scalar();
const Kernels* best_kernels();
bool has_amx();  // whether the processor multiplies tiles of bfloat16 (Sapphire Rapids and later)
const Kernels* find_kernels(const char* name);  // null when the build or the machine lacks it
int list_kernels(const char** names, int capacity);

}  // namespace llama2
