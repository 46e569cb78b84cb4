#include <dlfcn.h>

#include "train/team.h"

namespace llama2 {
namespace {

struct OpenMp {
  using Get = int (*)();
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  Get most = nullptr, number = nullptr, count = nullptr;
  bool there() const { return parallel && most && number && count; }
};

template <class T>
void find(T& to, const char* name) {
  to = reinterpret_cast<T>(dlsym(RTLD_DEFAULT, name));
}

const OpenMp& open_mp() {  // GNU's, whose team torch for Linux runs on
  static const OpenMp found = [] {
    OpenMp o;
    find(o.parallel, "GOMP_parallel");
    find(o.most, "omp_get_max_threads");
    find(o.number, "omp_get_thread_num");
    find(o.count, "omp_get_num_threads");
    return o;
  }();
  return found;
}

}  // namespace

void run_team(Pool& pool, const std::function<void(int, int)>& work) {
  const OpenMp& o = open_mp();
  if (!o.there()) return pool.run([&](int thread) { work(thread, pool.size()); });
  int threads = o.most();
  if (threads < 2) return work(0, 1);
  o.parallel(
      [](void* data) {
        (*static_cast<const std::function<void(int, int)>*>(data))(open_mp().number(), open_mp().count());
      },
      const_cast<void*>(static_cast<const void*>(&work)), static_cast<unsigned>(threads), 0);
}

}  // namespace llama2
