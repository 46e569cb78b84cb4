// Which instruction sets this build holds and this machine runs, best first. LLAMA2_ISA names the best one that the
// whole process may use, for tests and for comparisons.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"
#include "kernels/rows.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace llama2 {

// Each the last line of an object (isa.cpp); CMake writes BUILT(name) for every object of this build.
#define BUILT(name) const Kernels* kernels_##name();
#include "rows.inc"
#undef BUILT

namespace {

const Kernels* built(const char* row) {  // null: the build leaves it out
#define BUILT(name) \
  if (!std::strcmp(row, #name)) return kernels_##name();
#include "rows.inc"
#undef BUILT
  return nullptr;
}

struct Usable {
  const Kernels* all[MAX_ROWS];
  int count = 0;
  std::string problem;
};

Usable find_usable() {
  Row rows[MAX_ROWS];
  int count = list_rows(rows);
  const char* asked = std::getenv("LLAMA2_ISA");
  bool from_here = !asked || !*asked || !std::strcmp(asked, "auto");
  Usable found;
  std::string names, elsewhere, unknown;
  for (int i = 0; i < count; ++i) {
    const Kernels* kernels = built(rows[i].name);
    if (asked && !std::strcmp(rows[i].name, asked)) {
      if (!kernels) unknown = ", and this build leaves that one out";
      else if (!rows[i].here) unknown = ", and this processor does not run that one";
      else from_here = true;
    }
    if (kernels && !rows[i].here) elsewhere += std::string(" ") + rows[i].name;
    if (!kernels || !rows[i].here) continue;
    names += std::string(", ") + rows[i].name;
    if (from_here) found.all[found.count++] = kernels;
  }
  if (names.empty())
    found.problem = "the native engine was built for another processor (" +
                    (elsewhere.empty() ? "" : elsewhere.substr(1)) +
                    "); build llama2 again on this machine, or with all instruction sets";
  else if (found.count == 0)
    found.problem = std::string("LLAMA2_ISA is '") + asked + "'; this machine and build have auto" + names + unknown;
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

int list_left_out(const char** names) {
  Row rows[MAX_ROWS];
  int count = list_rows(rows), n = 0;
  for (int i = 0; i < count; ++i)
    if (rows[i].here && !built(rows[i].name)) names[n++] = rows[i].name;
  return n;
}

}  // namespace llama2
