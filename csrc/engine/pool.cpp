#include "engine/pool.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>

namespace llama2 {
namespace {

// Pauses before sleeping, 0.5 to 1 ms, for a loop that samples in Python comes back within that. Whoever else wants the
// core gets it after the first 100 to 200 us.
constexpr int SPINS = 20000, SELFISH = 4000;

void futex_wait(std::atomic<uint32_t>* at, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(at), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>* at) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(at), FUTEX_WAKE_PRIVATE, 1 << 20, nullptr, nullptr, 0);
}

class Pinned {  // the calling thread on one core, for a scope
 public:
  explicit Pinned(int cpu) : active_(cpu >= 0 && sched_getaffinity(0, sizeof old_, &old_) == 0) {
    if (!active_) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
  }
  ~Pinned() {
    if (active_) sched_setaffinity(0, sizeof old_, &old_);
  }

 private:
  cpu_set_t old_;
  bool active_;
};

}  // namespace

Pool::Pool(int threads, std::vector<int> cpus)
    : size_(threads < 1 ? 1 : threads),
      cpus_(std::move(cpus)),
      calls_(size_) {
  if (cpus_.size() < static_cast<size_t>(size_)) cpus_.clear();
  start();
}

void Pool::start() {
  owner_ = getpid();
  for (int i = 1; i < size_; ++i) {
    calls_[i].count.store(0);
    calls_[i].asleep.store(false);
    threads_.emplace_back([this, i] { worker(i); });
  }
}

Pool::~Pool() {
  if (getpid() != owner_) {  // a forked child has no workers to join
    for (auto& t : threads_) t.detach();
    return;
  }
  quit_.store(true);
  for (int i = 1; i < size_; ++i) call(i);
  for (auto& t : threads_) t.join();
}

void Pool::call(int id) {
  calls_[id].count.fetch_add(1, std::memory_order_seq_cst);
  if (calls_[id].asleep.load(std::memory_order_seq_cst)) futex_wake(&calls_[id].count);
}

void Pool::worker(int id) {
  if (!cpus_.empty()) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpus_[id], &one);
    sched_setaffinity(0, sizeof one, &one);
  }
  Call& mine = calls_[id];
  for (uint32_t seen = 0;; ++seen) {
    for (int spin = 0; mine.count.load(std::memory_order_acquire) == seen && spin < SPINS; ++spin) {
      relax();
      if (spin > SELFISH && spin % 64 == 0) sched_yield();
    }
    while (mine.count.load(std::memory_order_seq_cst) == seen) {
      mine.asleep.store(true, std::memory_order_seq_cst);
      if (mine.count.load(std::memory_order_seq_cst) == seen) futex_wait(&mine.count, seen);
      mine.asleep.store(false, std::memory_order_seq_cst);
    }
    if (quit_.load()) return;
    (*work_)(id);
    barrier();
  }
}

void Pool::sleep_until_after(uint32_t phase) {
  waiting_.fetch_add(1, std::memory_order_seq_cst);
  if (phase_.load(std::memory_order_seq_cst) == phase) {
    sleeps_.fetch_add(1, std::memory_order_relaxed);
    auto start = std::chrono::steady_clock::now();
    futex_wait(&phase_, phase);
    auto slept = std::chrono::steady_clock::now() - start;
    slept_.fetch_add(std::chrono::duration_cast<std::chrono::nanoseconds>(slept).count(), std::memory_order_relaxed);
  }
  waiting_.fetch_sub(1, std::memory_order_seq_cst);
}

void Pool::wake_waiting() { futex_wake(&phase_); }

void Pool::run(const std::function<void(int)>& work, int team) {
  std::lock_guard<std::mutex> lock(one_at_a_time_);
  if (getpid() != owner_) {  // after fork: the workers stayed in the parent
    for (auto& t : threads_) t.detach();
    threads_.clear();
    arrived_.store(0);
    waiting_.store(0);
    start();
  }
  team_ = team < 1 || team > size_ ? size_ : team;
  Pinned pin(team_ > 1 && !cpus_.empty() ? cpus_[0] : -1);
  work_ = &work;
  for (int i = 1; i < team_; ++i) call(i);
  work(0);
  barrier();
}

double ping_pong(Pool& pool, int rounds) {
  alignas(64) std::atomic<int> ball{0};
  double seconds = 0;
  pool.run([&](int id) {
    if (id > 1 || pool.size() < 2) return;
    auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < rounds; ++i) {
      int mine = 2 * i + id;
      for (long spin = 0; ball.load(std::memory_order_acquire) != mine; ++spin)
        if (spin > 1000000) { sched_yield(); }
      ball.store(mine + 1, std::memory_order_release);
      if (i == rounds / 10) start = std::chrono::steady_clock::now();
    }
    if (id == 0) {
      std::chrono::duration<double> d = std::chrono::steady_clock::now() - start;
      int untimed = rounds / 10 + 1;
      seconds = d.count() / (rounds - untimed);
    }
  });
  return seconds;
}

}  // namespace llama2
