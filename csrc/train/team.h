// The threads that training's work runs on, and the sums of products that they share.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>

#include "engine/pool.h"
#include "kernels/bump.h"
#include "kernels/training.h"

namespace llama2 {

struct Scratch {  // memory of a thread that stays, aligned, not cleared
  std::unique_ptr<uint8_t[]> bytes;
  int64_t size = 0;
  void* take(int64_t n) {
    if (size < n + Bump::LINE) bytes.reset(new uint8_t[size = n + Bump::LINE]);
    return Bump(bytes.get()).take<uint8_t>(n);
  }
};

// work(thread, threads) on torch's own OpenMP team where the process has one, for two teams would take the processors
// from each other by spinning; else on `pool`.
void run_team(Pool& pool, const std::function<void(int, int)>& work);

// All sums at once, by a team.
void run_products(Pool& pool, const ProductKernels& kernel, Products* sums, int count);

}  // namespace llama2
