// LoRA adapters: low-rank additions to the linears of a model, chosen per sequence in a step.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "engine/memory.h"
#include "kernels/kernels.h"

namespace llama2 {

struct Model;

enum Part : int { Q, K, V, O, GATE, UP, DOWN, PARTS };

class Adapter {
 public:
  explicit Adapter(const Model& model);  // for models of these shapes; no addition yet
  int64_t layers() const { return static_cast<int64_t>(all_.size()) / PARTS; }
  int64_t in(Part part) const { return in_[part]; }
  int64_t out(Part part) const { return out_[part]; }
  bool fits(const Model& model) const;
  // Copies A (rank x in) and B (out x rank), row-major of any float format, which they keep.
  void set(int64_t layer, Part part, const Matrix& a, const Matrix& b, float scale);
  const LowRank* all() const { return all_.data(); }  // [layer][part]; rank 0 where nothing is added
  int64_t rank() const { return rank_; }              // the largest
  int64_t bytes() const { return bytes_; }

  struct Count : std::atomic<int> {  // of a copy it begins anew
    Count() : std::atomic<int>(0) {}
    Count(const Count&) : std::atomic<int>(0) {}
  };
  mutable Count steps;  // that run with it

 private:
  int64_t in_[PARTS], out_[PARTS], rank_ = 0, bytes_ = 0;
  std::vector<LowRank> all_;
  Arena arena_{int64_t{8} << 20};                 // one matrix behind the other in the order a step reads them
  std::vector<std::shared_ptr<uint8_t>> memory_;  // every piece of it
};

}  // namespace llama2
