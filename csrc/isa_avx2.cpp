#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "train.h"

namespace llama2 {
namespace {
#include "simd_avx2.h"
#include "pointwise.inl"
#include "matmul.inl"
#include "kv.inl"
#include "attention.inl"
#include "probes.inl"
#include "train.inl"
}  // namespace

const Kernels* kernels_avx2() {
  static const Kernels table = {"avx2", prepare, rmsnorm, matmul, dequantize_row, rope, kv_store, attention, peak, read_bytes, shrink, &TRAIN};
  return &table;
}
}  // namespace llama2
