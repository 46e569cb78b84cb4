#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace llama2 {
namespace {
#include "simd_scalar.h"
#include "pointwise.inl"
#include "matmul.inl"
#include "kv.inl"
#include "attention.inl"
#include "probes.inl"
}  // namespace

const Kernels* kernels_scalar() {
  static const Kernels table = {"scalar", prepare, rmsnorm, matmul, dequantize_row, rope, kv_store, attention, peak, read_bytes, shrink};
  return &table;
}
}  // namespace llama2
