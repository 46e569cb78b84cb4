// The cache of keys and values, and attention over it for the kernel tests and benchmarks.
#include <nanobind/stl/string.h>

#include <cmath>

#include "bind/bind.h"
#include "engine/pool.h"
#include "engine/step.h"

namespace {

KvCache* make_cache(const std::string& dtype, int64_t layers, int64_t heads, int64_t width, int64_t pages) {
  require(dtype == "float32" || dtype == "bfloat16" || dtype == "int8",
          "a cache is float32, bfloat16 or int8, not " + dtype);
  require(layers > 0 && heads > 0 && width > 0 && pages > 0 && pages < (int64_t{1} << 31),
          "every dimension of a cache is positive");
  constexpr int64_t MOST = int64_t{1} << 48;
  require(width <= MOST / 256 / heads / layers / pages, "a cache of that size has no address");
  return new KvCache(dtype == "float32"    ? KvType::F32
                     : dtype == "bfloat16" ? KvType::BF16
                                           : KvType::I8,
                     layers, heads, width, pages);
}

// Refuses a layer, a table of pages, or keys and values (heads, positions, width) that do not fit the cache.
template <class Array>
void check_positions(const KvCache& c, int64_t layer, const std::vector<int32_t>& table, int64_t past,
                     const Array& keys, const Array& values) {
  require(layer >= 0 && layer < c.layers(), "layer " + str(layer) + " is outside the cache's " + str(c.layers()));
  for (const Array* a : {&keys, &values})
    require(static_cast<int64_t>(a->shape(0)) == c.shape().heads &&
                static_cast<int64_t>(a->shape(2)) == c.shape().width && a->shape(1) == keys.shape(1),
            "keys and values are " + str(c.shape().heads) + " heads x positions x " + str(c.shape().width));
  int64_t end = past + static_cast<int64_t>(keys.shape(1));
  require(past >= 0 && (end + PAGE - 1) / PAGE <= static_cast<int64_t>(table.size()), "the table is too short");
  for (int64_t i = 0; i < static_cast<int64_t>(table.size()); ++i)
    require(table.data()[i] >= 0 && table.data()[i] < c.pages(),
            "page " + str(table.data()[i]) + " is outside the cache of " + str(c.pages()) + " pages");
}

void read_cache(const KvCache& c, int64_t layer, Ints table, Out3 keys, Out3 values) {
  std::vector<int32_t> pages = copied(table);
  check_positions(c, layer, pages, 0, keys, values);
  nb::gil_scoped_release free;
  c.read(layer, pages.data(), static_cast<int64_t>(keys.shape(1)), keys.data(), values.data());
}

void write_cache(KvCache& c, int64_t layer, Ints table, int64_t past, In3 keys, In3 values) {
  std::vector<int32_t> pages = copied(table);
  check_positions(c, layer, pages, past, keys, values);
  nb::gil_scoped_release free;
  c.write(layer, pages.data(), past, static_cast<int64_t>(keys.shape(1)), keys.data(), values.data());
}

void copy_page_from(KvCache& c, const KvCache& other, int64_t from, int64_t to) {
  const KvLayer &a = c.shape(), &b = other.shape();
  require(a.type == b.type && a.heads == b.heads && a.width == b.width && c.layers() == other.layers(),
          "a cache of another shape");
  require(from >= 0 && to >= 0 && from < other.pages() && to < c.pages(), "a page outside the cache");
  c.copy_page_from(other, from, to);
}

// Stores keys and values (tokens x kv heads * width, already rotated) in one layer from slot `past` of a sequence on,
// and attends the queries (heads * width each) of the last out.shape(0) of them: what the kernel tests and benchmarks
// call.
void attend(Pool& pool, const std::string& isa_name, KvCache& cache, int64_t layer, Ints table, int64_t past, In2 q,
            In2 k, In2 v, Out2 out) {
  const Kernels* kernels = isa(isa_name);
  require(layer >= 0 && layer < cache.layers(),
          "layer " + str(layer) + " is outside the cache's " + str(cache.layers()));
  KvLayer kv = cache.layer(layer);
  int64_t tokens = static_cast<int64_t>(k.shape(0)), asked = static_cast<int64_t>(q.shape(0)), width = kv.width;
  int64_t across = static_cast<int64_t>(q.shape(1)), group = across / (kv.heads * width), end = past + tokens;
  require(static_cast<int64_t>(k.shape(1)) == kv.heads * width && v.shape(0) == k.shape(0) && v.shape(1) == k.shape(1),
          "k and v are tokens x kv heads * width");
  require(group > 0 && across == group * kv.heads * width, "q has a multiple of the kv heads");
  require(out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1), "out is shaped as q");
  require(past >= 0 && asked <= end && (end + PAGE - 1) / PAGE <= static_cast<int64_t>(table.size()),
          "the table is too short");
  const std::vector<int32_t> own = copied(table);
  const int32_t* pages = own.data();
  for (int64_t i = 0; i < static_cast<int64_t>(own.size()); ++i)
    require(pages[i] >= 0 && pages[i] < cache.pages(),
            "page " + str(pages[i]) + " is outside the cache of " + str(cache.pages()) + " pages");
  int64_t scratch = attention_scratch(width);
  std::vector<float> memory(pool.size() * scratch);
  nb::gil_scoped_release free;
  pool.run([&](int tid) {
    for (int64_t h = kv.heads * tid / pool.size(); h < kv.heads * (tid + 1) / pool.size(); ++h) {
      for (int64_t t = 0; t < tokens; ++t) {
        int64_t slot = past + t, at = (t * kv.heads + h) * width;
        kernels->kv_store(kv, k.data() + at, v.data() + at, h, pages[slot / PAGE], static_cast<int>(slot % PAGE));
      }
      AttentionTask a;
      a.q = q.data() + h * group * width;
      a.out = out.data() + h * group * width;
      a.ldq = a.ldo = across;
      a.tokens = static_cast<int>(asked);
      a.group = static_cast<int>(group);
      a.first = end - asked;
      a.table = pages;
      a.kv_head = h;
      a.scale = 1.0f / std::sqrt(static_cast<float>(width));
      kernels->attention(kv, a, memory.data() + tid * scratch);
    }
  });
}

}  // namespace

void bind_cache(nb::module_& m) {
  nb::class_<KvCache>(m, "KvCache")
      .def_prop_ro("pages", &KvCache::pages)
      .def_prop_ro("nbytes", &KvCache::bytes)
      .def("copy_page",
           [](KvCache& c, int64_t from, int64_t to) {
             require(from >= 0 && to >= 0 && from < c.pages() && to < c.pages(), "a page outside the cache");
             c.copy_page(from, to);
           })
      .def("copy_page_from", &copy_page_from)
      .def("read", &read_cache)
      .def("write", &write_cache);
  m.def("make_cache", &make_cache, nb::rv_policy::take_ownership);
  m.def("attend", &attend);
}
