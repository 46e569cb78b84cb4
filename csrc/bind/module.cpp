// The compiled module, from the parts beside this file.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <new>

#include "bind/bind.h"
#include "engine/pool.h"
#include "kernels/rows.h"

NB_MODULE(_native, m) {
  // One pool lives as long as the process (threads.py): what is alive at exit is no leak.
  nb::set_leak_warnings(false);
  m.doc() = "The native CPU engine of llama2; use it through llama2.cpu.";
  nb::class_<Pool>(m, "Pool")
      .def(
          "__init__",
          [](Pool* pool, int threads, const std::vector<int>& cpus) {
            require(threads > 0 && threads <= CPU_SETSIZE, "a pool has 1 to " + str(CPU_SETSIZE) + " threads");
            for (int cpu : cpus) require(cpu >= 0 && cpu < CPU_SETSIZE, "processor " + str(cpu) + " is not one");
            new (pool) Pool(threads, cpus);
          },
          nb::arg("threads"), nb::arg("cpus"))
      .def_prop_ro("size", &Pool::size);
  m.def("available_isas", [] {
    const char* names[MAX_ROWS];
    int n = list_kernels(names, MAX_ROWS);
    return std::vector<std::string>(names, names + n);
  });
  m.def("left_out_isas", [] {
    const char* names[MAX_ROWS];
    int n = list_left_out(names);
    return std::vector<std::string>(names, names + n);
  });
  bind_weights(m);
  bind_cache(m);
  bind_step(m);
  bind_sampling(m);
  bind_probes(m);
  bind_train(m);
}
