// What training computes besides matrix products, in plain data types: forward and backward, each one pass over its data.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

#include "pool.h"

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
  float* to_weight = nullptr;      // [width], added to; null: not wanted
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

constexpr int TEXT_ROWS = 48;  // queries of one pass
inline int64_t texts_scratch(int64_t length, int64_t width) {  // floats that either direction needs for one text
  int64_t n = (length + 15) / 16 * 16, e = (width + 15) / 16 * 16;
  return 5 * n * e + TEXT_ROWS * (3 * e + 2 * n) + 64;
}

struct TrainKernels {
  void (*norm)(Real t, const Norm& n, int64_t row0, int64_t row1, void* out);
  void (*norm_grad)(Real t, const Norm& n, const NormGrad& g, int64_t row0, int64_t row1);
  void (*swiglu)(Real t, const void* gate, const void* up, int64_t begin, int64_t end, void* out);  // multiples of 16
  // grad of silu(gate) * up: to_gate and to_up, which may be grad itself, and the product again
  void (*swiglu_grad)(Real t, const void* gate, const void* up, const void* grad, int64_t begin, int64_t end, void* to_gate, void* to_up, void* product);
  void (*texts)(Real t, const Texts& x, const TextsOut& to, int64_t first, int64_t last, int64_t kv_head, float* scratch);
  void (*texts_grad)(Real t, const Texts& x, const TextsGrad& g, int64_t first, int64_t last, int64_t kv_head, float* scratch);
  // log p(target) of one row of logits; with `factor`, the logits become factor * (1 at the target - p)
  float (*log_prob)(Real t, void* logits, int64_t vocabulary, int64_t target, const float* factor, float* scratch);
  // values [begin, end), multiples of the block, of two codes a byte, the first in the high nibble
  void (*unpack4)(Real t, const uint8_t* codes, const float* scales, const float* table, int64_t block, int64_t begin, int64_t end, void* out);
};

// work(thread, threads) on torch's own OpenMP team where the process has one, for two teams would take the processors
// from each other by spinning; else on `pool`.
void run_team(Pool& pool, const std::function<void(int, int)>& work);

}  // namespace llama2
