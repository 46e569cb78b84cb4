// The one allocator of the kernels and the engine: pieces of a memory, one behind the other, nothing ever given back.
#pragma once
#include <cstdint>

namespace llama2 {

class Bump {
 public:
  static constexpr int64_t LINE = 64;  // bytes: every piece begins at a multiple of it
  static constexpr int64_t rounded(int64_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

  Bump() = default;
  // Begins at the first line behind `memory`, which therefore has LINE bytes to spare unless it is aligned.
  explicit Bump(void* memory)
      : at_(static_cast<uint8_t*>(memory) + (LINE - reinterpret_cast<uintptr_t>(memory) % LINE) % LINE) {}

  template <class T>
  T* take(int64_t count) {  // not cleared
    T* piece = reinterpret_cast<T*>(at_);
    at_ += rounded(count * static_cast<int64_t>(sizeof(T)));
    return piece;
  }
  const uint8_t* at() const { return at_; }

 private:
  uint8_t* at_ = nullptr;
};

}  // namespace llama2
