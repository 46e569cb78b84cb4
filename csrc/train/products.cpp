// Who computes which part of several sums of products.
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "train/team.h"

namespace llama2 {
namespace {

// Columns [0, whole) in jobs of `columns` and all of `rows`; those behind in jobs of `columns` and `few` rows, so that
// the threads end together. A job packs its columns of B: with fewer rows that is more of the work.
struct Plan {
  int64_t rows, few, columns, whole;
};

int64_t twelve(int64_t rows) { return (rows + 11) / 12 * 12; }  // tiles have 6 or 12 rows

Plan plan_of(const Products& p, int threads) {
  int64_t depth = 0, panels = (p.columns + PRODUCT_COLUMNS - 1) / PRODUCT_COLUMNS, group = 1;
  for (int i = 0; i < p.count; ++i) depth += (p.terms[i].depth + 1) / 2 * 2;
  int64_t rows = std::min<int64_t>(p.rows, 1024), few = std::max<int64_t>(96, (rows + 2 * threads - 1) / (2 * threads)),
          whole = 0;
  if (depth <= PRODUCT_DEPTH || panels >= 8 * threads) {
    // Sums over a depth of several panels take columns together, so that A comes from memory once a block of the depth.
    if (depth > PRODUCT_DEPTH) group = std::min<int64_t>(panels / (4 * threads), 12);
    int64_t groups = panels / group;  // whole ones
    whole = (groups - 1) / threads * threads;
  } else {  // few columns, deep: each thread takes rows, and all columns of B with them
    group = std::min<int64_t>(panels, 12);
    few = std::min<int64_t>(512, std::max<int64_t>(96, (p.rows + threads - 1) / threads));
  }
  return {twelve(rows), twelve(few), group * PRODUCT_COLUMNS, whole * group * PRODUCT_COLUMNS};
}

}  // namespace

void run_products(Pool& pool, const ProductKernels& kernel, Products* sums, int count) {
  std::vector<std::vector<Term>> terms(count);
  std::vector<std::unique_ptr<uint16_t[]>> packed;
  for (int s = 0; s < count; ++s) {
    Products& p = sums[s];
    terms[s].assign(p.terms, p.terms + p.count);
    p.terms = terms[s].data();
    for (Term& term : terms[s]) {
      if (term.a_columns == 1 && term.depth % 2 == 0) continue;
      int64_t ld = (term.depth + 31) / 32 * 32, blocks = (p.rows + 15) / 16;
      packed.emplace_back(new uint16_t[p.rows * ld]);  // not cleared
      uint16_t* to = packed.back().get();
      run_team(pool, [&](int thread, int threads) {
        int64_t a = blocks * thread / threads * 16, b = std::min(p.rows, blocks * (thread + 1) / threads * 16);
        if (a < b) kernel.pack_rows(term, a, b, to, ld);
      });
      term.a = to;
      term.a_rows = ld;
      term.a_columns = 1;
    }
  }
  std::atomic<int64_t> next{0};
  run_team(pool, [&](int, int threads) {
    static thread_local Scratch scratch;
    int64_t i = next.fetch_add(1), before = 0;
    for (bool last : {false, true})  // the large jobs of all sums, then the small ones
      for (int s = 0; s < count; ++s) {
        const Products& p = sums[s];
        Plan plan = plan_of(p, threads);
        int64_t rows = last ? plan.few : plan.rows, begin = last ? plan.whole : 0, end = last ? p.columns : plan.whole;
        int64_t down = (p.rows + rows - 1) / rows, jobs = (end - begin + plan.columns - 1) / plan.columns * down;
        for (; i - before < jobs; i = next.fetch_add(1)) {
          int64_t row = (i - before) % down * rows, column = begin + (i - before) / down * plan.columns;
          void* memory = scratch.take(products_scratch(rows, plan.columns));
          kernel.products(p, row, std::min(p.rows, row + rows), column, std::min(end, column + plan.columns), memory);
        }
        before += jobs;
      }
  });
}

}  // namespace llama2
