// Which instruction sets this build holds and this machine runs, best first. LLAMA2_ISA names the best one that the
// whole process may use, for tests and for comparisons.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

namespace llama2 {

// Each the last line of an object (isa.cpp). Weak: null where the build leaves the object out.
#define LLAMA2_ROW __attribute__((weak)) const Kernels*
LLAMA2_ROW kernels_avx2();
LLAMA2_ROW kernels_avxvnni();
LLAMA2_ROW kernels_avx512();
LLAMA2_ROW kernels_avx512vnni();
LLAMA2_ROW kernels_avx512bf16();
LLAMA2_ROW kernels_neon();
#undef LLAMA2_ROW

namespace {

// An instruction set: its kernels, null where the build leaves them out, and whether this processor has each feature
// that they use.
struct Row {
  const Kernels* (*kernels)();
  bool here;
};

int runnable(const Kernels** to) {
#if defined(__x86_64__)
#define HAS(feature) static_cast<bool>(__builtin_cpu_supports(feature))
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 11
#define HAS_AVXVNNI false  // the compiler knows neither the name nor the instructions
#else
#define HAS_AVXVNNI HAS("avxvnni")
#endif
  __builtin_cpu_init();
  bool avx2 = HAS("avx2") && HAS("fma") && HAS("f16c");
  bool avx512 = avx2 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512vl") && HAS("avx512dq");
  bool vnni = avx512 && HAS("avx512vnni");
  const Row rows[] = {
      {kernels_avx512bf16, vnni && HAS("avx512vbmi") && HAS("avx512bf16")},  // Zen 4, Sapphire Rapids
      {kernels_avx512vnni, vnni},                                            // Cascade Lake, Ice Lake
      {kernels_avxvnni, avx2 && HAS_AVXVNNI},                                // Alder Lake; avx512 has no dot product
      {kernels_avx512, avx512},                                              // Skylake-X
      {kernels_avx2, avx2},
      {kernels_scalar, true},
  };
#undef HAS
#elif defined(__aarch64__)
  const Row rows[] = {
      {kernels_neon, (getauxval(AT_HWCAP) & (1 << 20)) != 0},  // HWCAP_ASIMDDP
      {kernels_scalar, true},
  };
#else
  const Row rows[] = {{kernels_scalar, true}};
#endif
  int n = 0;
  for (const Row& row : rows)
    if (row.kernels && row.here) to[n++] = row.kernels();
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
  if (asked && *asked && std::strcmp(asked, "auto") != 0) {
    std::string names;
    for (int i = 0; i < n; ++i) names += std::string(", ") + all[i]->name;
    while (first < n && std::strcmp(all[first]->name, asked) != 0) ++first;
    if (first == n)
      found.problem = std::string("LLAMA2_ISA is '") + asked + "'; this machine and build have auto" + names;
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
