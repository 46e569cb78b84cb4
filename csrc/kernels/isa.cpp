// All kernels, compiled once for each instruction set: LLAMA2_ISA_NAME is its name, LLAMA2_SIMD the header that holds
// its intrinsics. What it needs of a processor stands in rows.h, its compiler flags in CMakeLists.txt.
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/halves.h"
#include "kernels/inline.h"
#include "kernels/kernels.h"
#include "kernels/training.h"

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define TEXT2(a) #a
#define TEXT(a) TEXT2(a)

namespace llama2 {
namespace {
// clang-format off: each is written over those before it
#include LLAMA2_SIMD
#include "kernels/pointwise.inl"
#include "kernels/matmul.inl"
#include "kernels/kv.inl"
#include "kernels/attention.inl"
#include "kernels/probes.inl"
#include "kernels/training.inl"
// clang-format on
}  // namespace

const Kernels* JOIN(kernels_, LLAMA2_ISA_NAME)() {
  static const Kernels table = {TEXT(LLAMA2_ISA_NAME),
                                prepare,
                                rmsnorm,
                                matmul,
                                dequantize_row,
                                rope,
                                kv_store,
                                attention,
                                peak,
                                read_bytes,
                                shrink,
                                &TRAIN};
  return &table;
}
}  // namespace llama2
