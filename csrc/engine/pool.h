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
  uint64_t sleeps() const { return sleeps_.load(std::memory_order_relaxed); }     // in barriers, so far
  double slept() const { return 1e-9 * slept_.load(std::memory_order_relaxed); }  // seconds of these, of all threads
  // work(thread) on the first `team` threads, or on all; returns when all of them have finished
  void run(const std::function<void(int)>& work, int team = 0);
  void barrier() {
    barrier([] {});
  }  // inside work only, by every thread
  template <class Idle>
  void barrier(Idle&& idle);  // idle() is called again and again while the others are awaited

 private:
  void start();
  void worker(int id);
  void sleep_until_after(uint32_t phase);
  void wake_waiting();
  void call(int id);

  int size_;
  std::vector<int> cpus_;
  std::vector<std::thread> threads_;
  std::mutex one_at_a_time_;
  const std::function<void(int)>* work_ = nullptr;
  int owner_ = 0, team_ = 1;
  struct alignas(64) Call {  // to one worker
    std::atomic<uint32_t> count{0};
    std::atomic<bool> asleep{false};
  };
  std::vector<Call> calls_;
  alignas(64) std::atomic<bool> quit_{false};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<uint32_t> waiting_{0};            // that sleep in a barrier
  std::atomic<uint64_t> sleeps_{0}, slept_{0};  // and nanoseconds
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
  int team = team_;  // before this thread has arrived: then the next run may change it
  if (team == 1) return;
  uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
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
