// Which instruction sets this build holds and this machine runs, best first.
#include <cstring>

#include "kernels.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

namespace llama2 {
namespace {

int usable(const Kernels** to) {
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                __builtin_cpu_supports("avx512bf16");
  if (avx512) to[n++] = kernels_avx512();
#if LLAMA2_AVXVNNI
  if (avx2 && __builtin_cpu_supports("avxvnni")) to[n++] = kernels_avxvnni();
#endif
  if (avx2) to[n++] = kernels_avx2();
#elif defined(__aarch64__)
  if (getauxval(AT_HWCAP) & (1 << 20)) to[n++] = kernels_neon();  // HWCAP_ASIMDDP
#endif
  to[n++] = kernels_scalar();
  return n;
}

}  // namespace

bool has_amx() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);  // AMX-BF16
#else
  return false;
#endif
}

const Kernels* best_kernels() {
  const Kernels* all[8];
  usable(all);
  return all[0];
}

const Kernels* find_kernels(const char* name) {
  const Kernels* all[8];
  int n = usable(all);
  for (int i = 0; i < n; ++i)
    if (!std::strcmp(all[i]->name, name)) return all[i];
  return nullptr;
}

int list_kernels(const char** names, int capacity) {
  const Kernels* all[8];
  int n = usable(all);
  for (int i = 0; i < n && i < capacity; ++i) names[i] = all[i]->name;
  return n;
}

}  // namespace llama2
