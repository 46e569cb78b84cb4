// The machine's own limits, for the benchmarks.
#include <nanobind/stl/string.h>

#include <chrono>
#include <functional>

#include "bind/bind.h"
#include "engine/pool.h"

namespace {

double timed(Pool& pool, const std::function<double(int)>& work) {  // units per second over all threads
  std::vector<double> done(pool.size());
  auto start = std::chrono::steady_clock::now();
  pool.run([&](int tid) { done[tid] = work(tid); });
  std::chrono::duration<double> d = std::chrono::steady_clock::now() - start;
  double total = 0;
  for (double x : done) total += x;
  return total / d.count();
}

double read_bandwidth(Pool& pool, const std::string& isa_name, Bytes data) {
  const Kernels* k = isa(isa_name);
  int64_t n = static_cast<int64_t>(data.size());
  const uint8_t* p = data.data();
  nb::gil_scoped_release free;
  return timed(pool, [&](int tid) {
    int64_t begin = n * tid / pool.size() / 64 * 64, end = n * (tid + 1) / pool.size() / 64 * 64;
    return static_cast<double>(k->read(p + begin, end - begin));
  });
}

double read_matrix(Pool& pool, const std::string& isa_name, const PyMatrix& w) {
  const Kernels* k = isa(isa_name);
  int64_t n = row_major(w.m.format) ? w.m.rows * w.m.stride : w.m.tiles() * w.m.stride;
  nb::gil_scoped_release free;
  return timed(pool, [&](int tid) {
    int64_t begin = n * tid / pool.size() / 64 * 64, end = n * (tid + 1) / pool.size() / 64 * 64;
    return static_cast<double>(k->read(w.m.data + begin, end - begin));
  });
}

double peak(Pool& pool, const std::string& isa_name, int kind, int64_t iterations) {
  require(kind >= 0 && kind < 3 && iterations > 0, "kind is 0, 1 or 2");
  const Kernels* k = isa(isa_name);
  nb::gil_scoped_release free;
  return timed(pool, [&](int) { return k->peak(kind, iterations); });
}

}  // namespace

void bind_probes(nb::module_& m) {
  m.def("read_bandwidth", &read_bandwidth);
  m.def("read_matrix", &read_matrix);
  m.def("peak", &peak);
  m.def("ping_pong", [](Pool& pool, int rounds) {
    nb::gil_scoped_release free;
    return ping_pong(pool, rounds);
  });
}
