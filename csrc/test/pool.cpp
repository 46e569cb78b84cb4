// The threads: that spin, yield or sleep between runs, of several callers, on one processor, in a forked child; and the
// team that training runs on, which is the pool or torch's own OpenMP threads.
#include <dlfcn.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#include "engine/governor.h"
#include "test/support.h"
#include "train/team.h"

namespace check {

#ifdef __SANITIZE_THREAD__
bool forks = false;  // ThreadSanitizer allows no threads in a child, and sees no synchronisation inside libgomp
#else
bool forks = true;
#endif

namespace {

void check_team(bool open_mp) {  // every thread of the team once, as often as it is asked
  Pool pool(3, {});
  for (int round = 0; round < 50; ++round) {
    std::vector<int> seen(64);
    int count = 0;
    run_team(pool, [&](int thread, int threads) {
      ++seen[thread];
      if (thread == 0) count = threads;
    });
    for (int i = 0; i < 64; ++i)
      if (seen[i] != (i < count)) return expect(false, "team", open_mp ? "OpenMP" : "pool", i, seen[i], count);
    expect(count == (open_mp ? 2 : 3), "size of the team", open_mp ? "OpenMP" : "pool", count, 0, 0);
  }
}

int in_child(const std::function<bool()>& work) {  // 0: it came back true
  std::fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    bool fine = work();
    std::fflush(stdout);
    _exit(fine ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

bool turns(Pool& pool, int rounds) {  // threads write to one plain variable in turns; barriers alone keep them apart
  int64_t written = 0, idle = 0, want = 0;
  std::vector<int64_t> each(pool.size() * 16);
  for (int round = 0; round < rounds; ++round) {
    pool.run([&](int id) {
      for (int i = 0; i < pool.size(); ++i) {
        if (i == id) ++written;
        pool.barrier([&] { each[id * 16] |= 1; });
      }
    });
    want += pool.size();
    if (written != want) return false;
    if (round % 16 == 5) std::this_thread::sleep_for(std::chrono::microseconds(300));  // they spin still, or yield
    if (round % 16 == 15) std::this_thread::sleep_for(std::chrono::milliseconds(4));   // they sleep
  }
  for (int64_t i : each) idle += i;
  return idle <= pool.size();
}

void check_part_of_team() {  // teams of all sizes in turns: the others are not waited for
  Pool pool(4, {});
  for (int round = 0; round < 400; ++round) {
    int team = round * 7 % 5;  // 0: all
    int want = team ? team : 4;
    std::vector<int64_t> seen(4 * 16);
    pool.run(
        [&](int id) {
          for (int i = 0; i < 3; ++i) {
            ++seen[id * 16];
            pool.barrier();
          }
        },
        team);
    for (int i = 0; i < 4; ++i)
      if (seen[i * 16] != (i < want ? 3 : 0)) return expect(false, "part of a team", "", round, i, seen[i * 16]);
    if (round % 64 == 63) std::this_thread::sleep_for(std::chrono::milliseconds(4));  // they sleep
  }
}

// Steps on a clock of their own: `many` and `one` are the seconds of a step of all threads and of one, `slept` is the
// share of the former in which one sleeps.
struct Clock {
  Governor governor;
  double now = 1;
  int64_t steps = 0, by_one = 0;
  void run(double seconds, double many, double one, double slept) {
    steps = by_one = 0;
    for (double end = now + seconds; now < end; ++steps) {
      int team = governor.team(2, now);
      double took = team == 2 ? many : one;
      by_one += team == 1;
      now += took;
      governor.done(now, took, team == 2 ? slept * took : 0);
    }
  }
};

void check_governor() {
  Clock c;
  c.run(10, 0.003, 0.005, 0.05);  // alone
  expect(c.by_one == 0, "trials on a quiet machine", "", c.by_one, 0, 0);
  c.run(20, 0.24, 0.013, 0.7);  // beside a busy process
  int64_t slow = c.steps - c.by_one;
  expect(slow <= 20 && c.by_one > 1000, "steps of all threads beside a busy process", "", slow, c.by_one, 0);
  c.run(6, 0.003, 0.006, 0.01);  // it has ended
  c.run(10, 0.003, 0.006, 0.01);
  expect(c.by_one == 0, "steps of one thread when it has ended", "", c.by_one, c.steps, 0);
  c.run(60, 0.1, 0.2, 0.3);  // threads that are late without being slow: trials cost little
  expect(c.by_one * 0.1 < 60 * 0.03, "trials that lose", "", c.by_one, c.steps, 0);
  expect(Governor().team(1, 1) == 1 && Governor().team(6, 1) == 6, "threads to begin with", "", 0, 0, 0);
}

// A thread that comes late to a barrier finds the others asleep; one that is there in time, awake.
void check_late(int threads) {
  Pool pool(threads, {});
  auto rounds = [&](int count, std::chrono::milliseconds late) {
    uint64_t before = pool.sleeps();
    pool.run([&](int id) {
      for (int i = 0; i < count; ++i) {
        if (id == i % threads) std::this_thread::sleep_for(late);
        pool.barrier();
      }
    });
    return static_cast<int64_t>(pool.sleeps() - before);
  };
  int64_t slept = rounds(6, std::chrono::milliseconds(20));
  // Each of 6 times all but the late one sleep; on a busy machine some of them may be late themselves.
  expect(slept >= 3 * (threads - 1), "sleeps beside a late thread", "", threads, slept, 0);
}

}  // namespace

void check_pool() {
  check_governor();
  check_part_of_team();
  for (int threads : {2, 3}) check_late(threads);
  for (int threads : {1, 2, 3, 5}) {
    Pool pool(threads, {});
    expect(turns(pool, 64), "turns", "", threads, 0, 0);
    for (int i = 0; i < 5; ++i) Pool(threads, {});  // ends while its threads begin
  }
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof allowed, &allowed);
  int cpu = 0;
  while (!CPU_ISSET(cpu, &allowed)) ++cpu;
  Pool pinned(2, {cpu, cpu});
  expect(turns(pinned, 16), "turns on one processor", "", 0, 0, 0);
  cpu_set_t after;
  sched_getaffinity(0, sizeof after, &after);
  expect(CPU_EQUAL(&allowed, &after), "the caller is left pinned", "", 0, 0, 0);
  Pool pool(2, {});
  int64_t calls = 0;  // by several callers, one after the other
  auto call = [&] {
    for (int i = 0; i < 50; ++i)
      pool.run([&](int id) {
        if (id == 0) ++calls;
      });
  };
  std::vector<std::thread> callers;
  callers.reserve(3);
  for (int i = 0; i < 3; ++i) callers.emplace_back(call);
  for (auto& c : callers) c.join();
  expect(calls == 150, "calls of several threads", "", calls, 0, 0);
  expect(ping_pong(pool, 100) > 0, "ping-pong", "", 0, 0, 0);
  if (forks) expect(in_child([&] { return turns(pool, 20); }) == 0, "a forked child", "", 0, 0, 0);
}

void check_teams(const Isas& isas) {
  if (forks) {  // torch's team in a child, because this process must have none to try the pool
    int status = in_child([&] {
      setenv("OMP_NUM_THREADS", "2", 1);
      if (!dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL))
        return std::printf("no libgomp: its team was not checked\n") > 0;
      check_team(true);
      Pool pool(3, {});
      check_training({isas.front()}, pool);
      check_gemm({isas.front()}, pool);
      std::printf("OpenMP's team checked\n");
      return failures() == 0;
    });
    expect(status == 0, "OpenMP's team", "", status, 0, 0);
  }
  check_team(false);
  Pool pool(3, {});
  check_training(isas, pool);
  check_gemm(isas, pool);
}

}  // namespace check
