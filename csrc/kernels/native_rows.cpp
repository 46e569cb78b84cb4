// Run by CMake where LLAMA2_ISAS is native: the names of what this processor runs, best first.
#include <cstdio>

#include "kernels/rows.h"

int main() {
  llama2::Row rows[llama2::MAX_ROWS];
  for (int i = 0, n = llama2::list_rows(rows); i < n; ++i)
    if (rows[i].here) std::printf("%s;", rows[i].name);
}
