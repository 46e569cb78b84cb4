// Threads that run one function together: they spin briefly while work or the others are near, and sleep in the kernel
// when they are not.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace llama2 {

class Pool {
 public:
  // cpus: one per thread to pin to, or empty. The caller of run() is thread 0 and is pinned only while it runs.
  Pool(int threads, std::vector<int> cpus);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }
  uint64_t sleeps() const { return sleeps_.load(std::memory_order_relaxed); }  // in barriers, so far
  void run(const std::function<void(int)>& work);  // work(thread) on every thread; returns when all have finished
  void barrier() {
    barrier([] {});
  }  // inside work only, by every thread
  template <class Idle>
  void barrier(Idle&& idle);  // idle() is called again and again while the others are awaited

 private:
  void start();
  void worker(int id, uint32_t seen);
  void sleep_until_after(uint32_t phase);
  void wake_waiting();

  int size_;
  std::vector<int> cpus_;
  std::vector<std::thread> threads_;
  std::mutex one_at_a_time_;
  const std::function<void(int)>* work_ = nullptr;
  int owner_ = 0;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<uint32_t> sleepers_{0};
  alignas(64) std::atomic<bool> quit_{false};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<uint32_t> waiting_{0};  // that sleep in a barrier
  std::atomic<uint64_t> sleeps_{0};
};

// Turns inside a barrier before a thread sleeps: 100 to 200 us, a few times what a wake-up costs. Who comes later than
// that has lost its core to another process, and gets it back sooner from a sleeper than from one that spins.
constexpr int PATIENCE = 4000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

template <class Idle>
void Pool::barrier(Idle&& idle) {
  if (size_ == 1) return;
  uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_seq_cst);
    if (waiting_.load(std::memory_order_seq_cst)) wake_waiting();
    return;
  }
  for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; ++spin) {
    idle();
    if (spin < PATIENCE) relax();
    else sleep_until_after(phase);
  }
}

double ping_pong(Pool& pool, int rounds);  // seconds of one round trip of a cache line between threads 0 and 1

}  // namespace llama2
