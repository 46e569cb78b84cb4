#include "engine/memory.h"

#include <sys/mman.h>

#include <new>

namespace llama2 {

std::shared_ptr<uint8_t> allocate(int64_t bytes, bool huge) {
  constexpr size_t PAGE_2M = size_t{2} << 20;
  size_t size = (static_cast<size_t>(bytes) + PAGE_2M - 1) / PAGE_2M * PAGE_2M, total = size + PAGE_2M;
  void* p = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  uint8_t* aligned = static_cast<uint8_t*>(p) + (PAGE_2M - reinterpret_cast<uintptr_t>(p) % PAGE_2M) % PAGE_2M;
  if (huge) madvise(aligned, size, MADV_HUGEPAGE);
  return std::shared_ptr<uint8_t>(aligned, [p, total](uint8_t*) { munmap(p, total); });
}

void ask_for_huge_pages(void* p, int64_t bytes) {
  constexpr int64_t PAGE_2M = int64_t{2} << 20;
  int64_t skip = (PAGE_2M - static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % PAGE_2M)) % PAGE_2M;
  int64_t whole = (bytes - skip) / PAGE_2M * PAGE_2M;
  if (whole > 0) madvise(static_cast<uint8_t*>(p) + skip, static_cast<size_t>(whole), MADV_HUGEPAGE);
}

}  // namespace llama2
