// Which instruction sets this build holds and this machine runs, best first. LLAMA2_ISA names the best one that the
// whole process may use, for tests and for comparisons.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

namespace llama2 {
namespace {

int runnable(const Kernels** to) {
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

struct Usable {
  const Kernels* all[8];
  int count = 0;
  std::string problem;
};

Usable find_usable() {
  const Kernels* all[8];
  Usable found;
  int n = runnable(all), first = 0;
  const char* asked = std::getenv("LLAMA2_ISA");
  if (asked && *asked && std::strcmp(asked, "auto")) {
    std::string names;
    for (int i = 0; i < n; ++i) names += std::string(", ") + all[i]->name;
    while (first < n && std::strcmp(all[first]->name, asked)) ++first;
    if (first == n) found.problem = std::string("LLAMA2_ISA is '") + asked + "'; this machine and build have auto" + names;
  }
  for (int i = first; i < n; ++i) found.all[found.count++] = all[i];
  return found;
}

const Usable& usable() {
  static const Usable found = find_usable();
  if (!found.problem.empty()) throw std::invalid_argument(found.problem);
  return found;
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

const Kernels* best_kernels() { return usable().all[0]; }

const Kernels* find_kernels(const char* name) {
  const Usable& found = usable();
  for (int i = 0; i < found.count; ++i)
    if (!std::strcmp(found.all[i]->name, name)) return found.all[i];
  return nullptr;
}

int list_kernels(const char** names, int capacity) {
  const Usable& found = usable();
  for (int i = 0; i < found.count && i < capacity; ++i) names[i] = found.all[i]->name;
  return found.count;
}

}  // namespace llama2
