// Memory from the system, and pieces of it for what stays as long as a model.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>

#include "kernels/bump.h"

namespace llama2 {

// Memory that is never copied: 2 MB aligned, zeroed, taken from the system as it is touched, freed with the last user.
// huge: in pages of 2 MB where allowed, for what is going to be used whole.
std::shared_ptr<uint8_t> allocate(int64_t bytes, bool huge = true);

// Asks for pages of 2 MB where `bytes` behind p hold whole ones: for what is about to be written in one go.
void ask_for_huge_pages(void* p, int64_t bytes);

// Zeroed pieces in the order they are asked for, which is the order a step reads them in.
class Arena {
 public:
  explicit Arena(int64_t least) : least_(least) {}  // bytes that it asks the system for at once
  uint8_t* take(int64_t bytes) {
    if (!memory_ || bump_.at() + Bump::rounded(bytes) > memory_.get() + size_) {
      int64_t size = std::max(Bump::rounded(bytes), least_);
      memory_ = allocate(size);
      size_ = size;
      bump_ = Bump(memory_.get());
    }
    return bump_.take<uint8_t>(bytes);
  }
  const std::shared_ptr<uint8_t>& memory() const { return memory_; }  // that holds the last piece

 private:
  int64_t least_, size_ = 0;
  Bump bump_;
  std::shared_ptr<uint8_t> memory_;
};

}  // namespace llama2
