// The table of instruction sets: their names, best first, and whether this processor has each feature that they use.
#pragma once

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace llama2 {

constexpr int MAX_ROWS = 8;

struct Row {
  const char* name;
  bool here;
};

inline int list_rows(Row* to) {  // how many there are for this architecture
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
      {"avx512bf16", vnni && HAS("avx512vbmi") && HAS("avx512bf16")},  // Zen 4, Sapphire Rapids
      {"avx512vnni", vnni},                                            // Cascade Lake, Ice Lake
      {"avxvnni", avx2 && HAS_AVXVNNI},                                // Alder Lake; avx512 has no dot product
      {"avx512", avx512},                                              // Skylake-X
      {"avx2", avx2},
      {"scalar", true},
  };
#undef HAS
#undef HAS_AVXVNNI
#elif defined(__aarch64__) && defined(__linux__)
  const Row rows[] = {
      {"neon", (getauxval(AT_HWCAP) & (1 << 20)) != 0},  // HWCAP_ASIMDDP
      {"scalar", true},
  };
#elif defined(__aarch64__)
  const Row rows[] = {{"neon", true}, {"scalar", true}};  // Apple's processors and Windows on Arm have the dot product
#else
  const Row rows[] = {{"scalar", true}};
#endif
  int n = 0;
  for (const Row& row : rows) to[n++] = row;
  return n;
}

int list_left_out(const char** names);  // at most MAX_ROWS: what this processor runs and the build leaves out

}  // namespace llama2
