#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "train.h"

namespace llama2 {
namespace {
#include "simd_scalar.h"
#include "pointwise.inl"
#include "matmul.inl"
#include "kv.inl"
#include "attention.inl"
#include "probes.inl"
#include "train.inl"
}  // namespace

const Kernels* kernels_scalar() {
  static const Kernels table = {"scalar", prepare, rmsnorm, matmul, dequantize_row, rope, kv_store, attention, peak, read_bytes, shrink, &TRAIN};
  return &table;
}
}  // namespace llama2
