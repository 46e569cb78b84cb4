// What training computes besides matrix products, in plain data types: forward and backward, each one pass over its
// data.
#pragma once
#include <cstddef>
#include <cstdint>

namespace llama2 {

enum class Real : int32_t { F32 = 0, BF16 = 1 };
inline int64_t real_bytes(Real t) { return t == Real::F32 ? 4 : 2; }

struct Norm {  // rows of `width`, a multiple of 16
  const void *x = nullptr, *weight = nullptr;
  int64_t width = 0;
  float eps = 0;
};

struct NormGrad {
  const void* grad = nullptr;      // of the output
  const void* residual = nullptr;  // added to the gradient of x, or null
  void* to_x = nullptr;
  float* to_weight = nullptr;  // [width], added to; null: not wanted
};

// Which values a step leaves out: a function of seed and place alone, so that the backward pass finds them again.
struct Dropout {
  uint64_t seed = 0;
  uint32_t share = 0;  // of 65536
  float scale() const { return 65536.0f / static_cast<float>(65536 - share); }
};

// Queries, keys and values as the projections leave them, [token][head][width]; rotated while they are read. A text is
// a run of tokens that see each other causally and nothing else.
struct Texts {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  const float *cos = nullptr, *sin = nullptr;  // [token][width]
  int64_t heads = 0, kv_heads = 0, width = 0;
  float scale = 1;
};

struct TextsOut {
  void* out = nullptr;   // [token][head][width]
  float* lse = nullptr;  // [head][token]: log of the sum of the exponentials
  int64_t tokens = 0;    // of a row of lse
};

struct TextsGrad {
  const void *out = nullptr, *grad = nullptr;
  const float* lse = nullptr;
  int64_t tokens = 0;
  void *to_q = nullptr, *to_k = nullptr, *to_v = nullptr;
};

constexpr int TEXT_ROWS = 48, TEXT_ASKED = 64;                 // queries of one pass, in float32 and in bfloat16
inline int64_t texts_scratch(int64_t length, int64_t width) {  // floats that either direction needs for one text
  int64_t n = (length + 63) / 64 * 64, e = (width + 63) / 64 * 64;
  return 5 * n * e + TEXT_ASKED * (4 * e + 4 * n) + 1024;
}

// A matrix of two codes a byte, the first in the high nibble: value i is table[code] * scales[i / block].
struct CodedMatrix {
  const uint8_t* codes = nullptr;
  const float *scales = nullptr, *table = nullptr;
  int64_t block = 0;  // a multiple of 32, as is a row
};

// Sums of products of bfloat16 matrices: out = scale * (A1 B1 + A2 B2 + ... + added), rounded once.
struct Term {  // (rows, depth) x (depth, columns); element (i, j) of a is a[i * a_rows + j * a_columns], one of them 1
  const uint16_t* a = nullptr;
  const void* b = nullptr;             // bfloat16, or float32 that is rounded to it
  const CodedMatrix* codes = nullptr;  // or these, rounded
  int64_t a_rows = 0, a_columns = 0, b_rows = 0, b_columns = 0, depth = 0;
  Real b_type = Real::BF16;
};

constexpr int MAX_TERMS = 8, PRODUCT_COLUMNS = 64;
constexpr int64_t PRODUCT_DEPTH = 4224;  // of a packed panel of 64 columns: 540 kB

struct Products {
  const Term* terms = nullptr;
  int count = 0;
  int64_t rows = 0, columns = 0;
  const uint16_t* added = nullptr;  // or null
  int64_t added_ld = 0;
  void* out = nullptr;
  int64_t out_ld = 0;
  Real type = Real::BF16;
  float scale = 1;
  bool grows = false;   // out, which is float32, is added to
  bool turned = false;  // out is (columns, rows); nothing is added before
};

inline int64_t products_scratch(int64_t rows,
                                int64_t columns) {  // bytes for so many rows and columns at once, aligned to 64
  return PRODUCT_DEPTH / 2 * PRODUCT_COLUMNS * 4 +
         (rows + 15) / 16 * 16 * ((columns + PRODUCT_COLUMNS - 1) / PRODUCT_COLUMNS * PRODUCT_COLUMNS) * 4;
}

struct ProductKernels {  // null where the processor has no bfloat16
  void (*pack_rows)(const Term& t, int64_t row0, int64_t row1, uint16_t* to, int64_t ld);
  void (*products)(const Products& p, int64_t row0, int64_t row1, int64_t column0, int64_t column1, void* scratch);
};

struct TrainKernels {
  void (*norm)(Real t, const Norm& n, int64_t row0, int64_t row1, void* out);
  void (*norm_grad)(Real t, const Norm& n, const NormGrad& g, int64_t row0, int64_t row1);
  void (*swiglu)(Real t, const void* gate, const void* up, int64_t begin, int64_t end, void* out);  // multiples of 16
  // grad of silu(gate) * up: to_gate and to_up, which may be grad itself, and the product again
  void (*swiglu_grad)(Real t, const void* gate, const void* up, const void* grad, int64_t begin, int64_t end,
                      void* to_gate, void* to_up, void* product);
  void (*texts)(Real t, const Texts& x, const TextsOut& to, int64_t first, int64_t last, int64_t kv_head,
                float* scratch);
  void (*texts_grad)(Real t, const Texts& x, const TextsGrad& g, int64_t first, int64_t last, int64_t kv_head,
                     float* scratch);
  // x without what is dropped, the rest scaled, + added (or null); values [begin, end), begin a multiple of 32
  void (*drop)(Real t, const void* x, const Dropout& d, const void* added, int64_t begin, int64_t end, void* out);
  // log p(target) of one row of logits; with `factor`, the logits become factor * (1 at the target - p)
  float (*log_prob)(Real t, void* logits, int64_t vocabulary, int64_t target, const float* factor, float* scratch);
  // values [begin, end), multiples of the block, of two codes a byte, the first in the high nibble
  void (*unpack4)(Real t, const uint8_t* codes, const float* scales, const float* table, int64_t block, int64_t begin,
                  int64_t end, void* out);
  ProductKernels product;
};

}  // namespace llama2
