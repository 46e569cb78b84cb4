// The kernels, the engine and the threads without Python, for sanitizers and emulators. Every instruction set is
// compared with the scalar one on odd shapes in buffers of exactly the right size.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>

#include "test/support.h"

using namespace check;

namespace {

int usage() {
  std::printf("check_native [--no-forks] [--isa NAME]... [--family NAME]...\n");
  return 2;
}

struct Family {
  const char* name;
  void (*run)(const Isas&);
};

constexpr Family FAMILIES[] = {
    {"matmul", [](const Isas& isas) { check_matmul(isas); }},  {"models", [](const Isas& isas) { check_models(isas); }},
    {"training", [](const Isas& isas) { check_teams(isas); }}, {"sampling", [](const Isas&) { check_sampling(); }},
    {"packing", [](const Isas&) { check_unpack(); }},          {"pool", [](const Isas&) { check_pool(); }},
};

}  // namespace

// --no-forks: qemu 7.2's user emulation aborts when a forked child starts a thread.
int main(int count, char** words) {
  Isas isas;
  std::string families = ",";
  for (int i = 1; i < count; ++i) {
    bool more = i + 1 < count;
    if (!std::strcmp(words[i], "--no-forks")) {
      forks = false;
    } else if (!std::strcmp(words[i], "--isa") && more) {
      const Kernels* k = find_kernels(words[++i]);
      if (!k) return std::printf("this machine or build has no instruction set '%s'\n", words[i]), 2;
      isas.push_back(k);
    } else if (!std::strcmp(words[i], "--family") && more) {
      families += std::string(words[++i]) + ",";
    } else {
      return usage();
    }
  }
  size_t known = 1;
  auto wanted = [&](const Family& f) { return families.find(std::string(",") + f.name + ",") != std::string::npos; };
  for (const Family& f : FAMILIES) known += wanted(f) ? std::strlen(f.name) + 1 : 0;
  if (known != families.size()) return usage();
  const char* names[8];
  for (int i = 0, n = isas.empty() ? list_kernels(names, 8) : 0; i < n; ++i) isas.push_back(find_kernels(names[i]));
  for (const Family& f : FAMILIES) {
    if (families.size() > 1 && !wanted(f)) continue;
    auto start = std::chrono::steady_clock::now();
    f.run(isas);
    std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    std::printf("%s: %.1f s\n", f.name, spent.count());
    std::fflush(stdout);
  }
  for (const Kernels* k : isas) std::printf("%s ", k->name);
  std::printf("checked: %lld expectations, %d failures\n", expectations(), failures());
  return failures() != 0;
}
