// This file and train.cpp beside it alone know Python. Every size and index is checked here, before memory is touched.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <mutex>
#include <optional>

#include "kernels/kernels.h"
#include "engine/pack.h"
#include "engine/pool.h"
#include "engine/fast_sampling.h"
#include "engine/step.h"

namespace nb = nanobind;
using namespace llama2;

void bind_train(nb::module_& m);

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints2 = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutLongs = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out3 = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using In3 = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using In2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool ok, const std::string& message) {
  if (!ok) throw nb::value_error(message.c_str());
}

std::string str(int64_t n) { return std::to_string(n); }

struct PyMatrix {
  Matrix m;
  std::shared_ptr<uint8_t> memory;  // packed weights
  std::vector<std::shared_ptr<uint8_t>> shared;  // tables and orders, which other matrices may share
  nb::object owner;                 // what the data belong to, when not to us
  std::vector<nb::object> biases;   // every one that was set: a model may have been made with an earlier one
};

const Kernels* isa(const std::string& name) {
  const Kernels* k = name == "auto" ? best_kernels() : find_kernels(name.c_str());
  require(k != nullptr, "instruction set '" + name + "' is not in this build or not on this machine");
  return k;
}

// Packed matrices one behind the other in the order they are asked for, in pieces of huge pages.
class Arena {
 public:
  uint8_t* take(int64_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (at_ + bytes > size_) {
      size_ = std::max<int64_t>(bytes, int64_t{256} << 20);
      memory_ = allocate(size_);
      at_ = 0;
    }
    at_ += bytes;
    return memory_.get() + at_ - bytes;
  }
  std::shared_ptr<uint8_t> memory() const { return memory_; }

  // A copy of `bytes` of data; data seen before gets the copy made then, so that equal tables are one table.
  const uint8_t* shared(const void* data, int64_t bytes) {
    for (const auto& [at, size] : shared_)
      if (size == bytes && std::memcmp(at, data, bytes) == 0) return at;
    uint8_t* copy = static_cast<uint8_t*>(std::memcpy(take(bytes), data, bytes));
    keep_.push_back(memory_);
    shared_.push_back({copy, bytes});
    return copy;
  }
  const std::vector<std::shared_ptr<uint8_t>>& kept() const { return keep_; }

 private:
  std::vector<std::pair<const uint8_t*, int64_t>> shared_;
  std::vector<std::shared_ptr<uint8_t>> keep_;  // what shared_ lies in
  std::shared_ptr<uint8_t> memory_;
  int64_t at_ = 0, size_ = 0;
};

// The caller's thread is not the only one that may write into an array: what is checked is a copy, and the copy is used.
std::vector<int32_t> copied(const int32_t* data, size_t size) { return std::vector<int32_t>(data, data + size); }
std::vector<int32_t> copied(const Ints& array) { return copied(array.data(), array.size()); }

// A matrix of GGUF blocks, checked: what `pack` and `pack_tiles` read.
struct Blocks {
  Blocks(Bytes raw, int type_id, int64_t rows_, int64_t cols_, const std::optional<Ints>& row_map) : rows(rows_), cols(cols_) {
    type = &packable(type_id, rows, cols);
    int64_t want = rows * (cols / type->columns) * type->bytes;
    require(static_cast<int64_t>(raw.size()) == want, std::string(type->name) + " " + str(rows) + " x " + str(cols) + " takes " + str(want) + " bytes, got " + str(raw.size()));
    from = raw.data();
    if (!row_map) return;
    require(static_cast<int64_t>(row_map->size()) == rows, "row_map has " + str(row_map->size()) + " entries for " + str(rows) + " rows");
    map_ = copied(*row_map);
    map = map_.data();
    for (int64_t i = 0; i < rows; ++i) require(map[i] >= 0 && map[i] < rows, "row_map[" + str(i) + "] = " + str(map[i]) + " is outside 0.." + str(rows - 1));
  }

  static const FileType& packable(int type_id, int64_t rows, int64_t cols) {
    const FileType* type = file_type(type_id);
    require(type != nullptr, "GGUF type " + str(type_id) + " has no packing");
    require(rows > 0 && cols > 0 && rows < (int64_t{1} << 31) && cols < (int64_t{1} << 31), "a matrix of " + str(rows) + " x " + str(cols));
    require(cols % type->columns == 0, std::string(type->name) + " needs rows of a multiple of " + str(type->columns) + " columns, got " + str(cols));
    return *type;
  }

  static PyMatrix shape(int type_id, int64_t rows, int64_t cols) {  // the packed matrix, its data not yet there
    const FileType& type = packable(type_id, rows, cols);
    PyMatrix out;
    out.m.rows = rows;
    out.m.cols = cols;
    out.m.format = type.format;
    out.m.stride = tile_bytes(type.format, cols);
    return out;
  }

  // Tiles [first, last) to `to`. A thread packs its share, so that it lies where the thread runs, then helps the others:
  // fresh memory does not come to all threads at one speed.
  void pack(Pool& pool, int64_t first, int64_t last, int64_t stride, uint8_t* to) const {
    nb::gil_scoped_release free;
    constexpr int64_t PIECE = 4;
    int64_t threads = pool.size(), count = last - first;
    std::vector<std::atomic<int64_t>> next(threads);
    for (int64_t i = 0; i < threads; ++i) next[i] = first + count * i / threads;
    pool.run([&](int tid) {
      for (int64_t k = 0; k < threads; ++k) {
        int64_t share = (tid + k) % threads, end = first + count * (share + 1) / threads;
        for (int64_t t; (t = next[share].fetch_add(PIECE)) < end;)
          for (int64_t stop = std::min(t + PIECE, end); t < stop; ++t) pack_tile(*type, from, rows, cols, map, t, to + (t - first) * stride);
      }
    });
  }

  const FileType* type;
  int64_t rows, cols;
  const uint8_t* from;
  const int32_t* map = nullptr;

 private:
  std::vector<int32_t> map_;
};

PyMatrix pack(Arena& arena, Pool& pool, Bytes raw, int type_id, int64_t rows, int64_t cols, std::optional<Ints> row_map) {
  Blocks blocks(raw, type_id, rows, cols, row_map);
  PyMatrix out = Blocks::shape(type_id, rows, cols);
  uint8_t* to = arena.take(out.m.tiles() * out.m.stride);
  out.m.data = to;
  out.memory = arena.memory();
  blocks.pack(pool, 0, out.m.tiles(), out.m.stride, to);
  return out;
}

// Tiles from `first` on, as many as `out` has room for: packing to a file, a piece at a time.
void pack_tiles(Pool& pool, Bytes raw, int type_id, int64_t rows, int64_t cols, std::optional<Ints> row_map, int64_t first, OutBytes out) {
  Blocks blocks(raw, type_id, rows, cols, row_map);
  Matrix m = Blocks::shape(type_id, rows, cols).m;
  int64_t bytes = static_cast<int64_t>(out.size()), count = bytes / m.stride;
  require(bytes % m.stride == 0, "room for tiles of " + str(m.stride) + " bytes is a multiple of that, got " + str(bytes));
  require(first >= 0 && count <= m.tiles() - first, "tiles " + str(first) + " to " + str(first + count) + " of a matrix of " + str(m.tiles()));
  std::memset(out.data(), 0, bytes);  // lanes and columns beyond the matrix
  blocks.pack(pool, first, first + count, m.stride, out.data());
}

// A matrix packed before, used where it lies: the map of a packed file.
PyMatrix packed_view(Bytes data, int type_id, int64_t rows, int64_t cols) {
  PyMatrix out = Blocks::shape(type_id, rows, cols);
  int64_t want = out.m.tiles() * out.m.stride;
  require(static_cast<int64_t>(data.size()) == want, "a packed matrix of " + str(rows) + " x " + str(cols) + " takes " + str(want) + " bytes, got " + str(data.size()));
  require(reinterpret_cast<uintptr_t>(data.data()) % 64 == 0, "a packed matrix starts at a multiple of 64 bytes");
  out.m.data = data.data();
  out.owner = nb::cast(data);
  return out;
}

std::string shape_of(int64_t rows, int64_t cols) { return str(rows) + " x " + str(cols); }

PyMatrix pack_codes(Arena& arena, Pool& pool, CodeSource from, const Codebook* codebook) {
  PyMatrix out;
  out.m.rows = from.rows; out.m.cols = from.cols; out.m.format = from.format;
  out.m.stride = tile_bytes(from.format, from.cols, from.group);
  if (from.format == Format::G4 || from.format == Format::G8) out.m.group = from.group;
  if (codebook) out.m.codebook = reinterpret_cast<const Codebook*>(arena.shared(codebook, sizeof *codebook));
  if (from.order) out.m.order = reinterpret_cast<const int32_t*>(arena.shared(from.order, from.cols * 4));
  if (codebook || from.order) out.shared = arena.kept();
  uint8_t* to = arena.take(out.m.tiles() * out.m.stride);
  out.m.data = to;
  out.memory = arena.memory();
  nb::gil_scoped_release free;
  pool.run([&](int tid) {
    int64_t tiles = out.m.tiles(), begin = tiles * tid / pool.size(), end = tiles * (tid + 1) / pool.size();
    for (int64_t t = begin; t < end; ++t) pack_codes_tile(from, t, to + t * out.m.stride);
  });
  return out;
}

CodeSource source(Format f, int64_t rows, int64_t cols, int64_t group) {
  constexpr int64_t LIMIT = int64_t{1} << 31;
  require(rows > 0 && cols > 0 && rows < LIMIT && cols < LIMIT, "a matrix of " + shape_of(rows, cols));
  require(group > 0 && group % GROUP == 0 && group < LIMIT, "a group of " + str(group) + " columns; a multiple of 32 is needed");
  return {f, rows, cols, group};
}

void require_nibbles(const uint8_t* codes, int64_t n) {
  const uint8_t* bad = std::find_if(codes, codes + n, [](uint8_t c) { return c > 15; });
  require(bad == codes + n, bad == codes + n ? "" : "code " + str(*bad) + " at " + str(bad - codes) + " is not below 16");
}

PyMatrix pack_codebook(Arena& arena, Pool& pool, Bytes codes, Floats scales, Floats table, int64_t rows, int64_t cols,
                       int64_t block, bool bfloat16) {
  CodeSource s = source(bfloat16 ? Format::C4B : Format::C4, rows, cols, block);
  require(cols % 64 == 0 && block % 64 == 0, "codes need rows and blocks of a multiple of 64 columns, got " + str(cols) + " and " + str(block));
  int64_t n = rows * cols, given = static_cast<int64_t>(codes.size());
  require(given == n || given == n / 2, "codes of " + shape_of(rows, cols) + " take " + str(n) + " bytes, or " + str(n / 2) + " two in a byte, got " + str(given));
  require(static_cast<int64_t>(scales.size()) == up(n, block), "one scale for every " + str(block) + " weights: " + str(up(n, block)) + ", got " + str(scales.size()));
  require(table.size() == 16, "a codebook has 16 values, got " + str(table.size()));
  s.pairs = given != n;
  s.codes = codes.data();
  s.scales = scales.data();
  if (!s.pairs) require_nibbles(s.codes, n);
  const Codebook codebook = codebook_of(table.data());
  return pack_codes(arena, pool, s, &codebook);
}

using Halves = nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

PyMatrix pack_groups(Arena& arena, Pool& pool, Bytes codes, Halves scales, Bytes zeros, int64_t rows, int64_t cols,
                     int64_t group, int bits, std::optional<Ints> order) {
  require(bits == 4 || bits == 8, "groups are packed of 4 or 8 bits, not " + str(bits));
  CodeSource s = source(bits == 4 ? Format::G4 : Format::G8, rows, cols, group);
  int64_t n = rows * cols, groups = rows * up(cols, group);
  require(static_cast<int64_t>(codes.size()) == n, "codes of " + shape_of(rows, cols) + " take " + str(n) + " bytes, got " + str(codes.size()));
  require(static_cast<int64_t>(scales.size()) == groups && static_cast<int64_t>(zeros.size()) == groups, "groups of " + str(group) + " take " + str(groups) + " scales and zeros, got " + str(scales.size()) + " and " + str(zeros.size()));
  s.codes = codes.data();
  s.scales = scales.data();
  s.zeros = zeros.data();
  if (bits == 4) require_nibbles(s.codes, n);
  std::vector<int32_t> columns;
  if (order) {
    require(static_cast<int64_t>(order->size()) == cols, "order has " + str(order->size()) + " entries for " + str(cols) + " columns");
    columns = copied(*order);
    s.order = columns.data();
    std::vector<bool> seen(cols);
    for (int64_t i = 0; i < cols; ++i) {
      if (s.order[i] < 0 || s.order[i] >= cols || seen[s.order[i]])
        require(false, "order[" + str(i) + "] = " + str(s.order[i]) + ": order is a permutation of 0.." + str(cols - 1));
      seen[s.order[i]] = true;
    }
  }
  return pack_codes(arena, pool, s, nullptr);
}

using Signed = nb::ndarray<const int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

PyMatrix pack_rows(Arena& arena, Pool& pool, Signed values, Floats scales, int64_t rows, int64_t cols) {
  CodeSource s = source(Format::R8, rows, cols, GROUP);
  require(static_cast<int64_t>(values.size()) == rows * cols, "int8 values of " + shape_of(rows, cols) + " take " + str(rows * cols) + " bytes, got " + str(values.size()));
  require(static_cast<int64_t>(scales.size()) == rows, str(rows) + " rows have as many scales, got " + str(scales.size()));
  s.codes = reinterpret_cast<const uint8_t*>(values.data());
  s.scales = scales.data();
  return pack_codes(arena, pool, s, nullptr);
}

PyMatrix view(nb::ndarray<nb::ndim<2>, nb::device::cpu, nb::ro> a, bool bfloat16) {
  PyMatrix out;
  bool f32 = a.dtype() == nb::dtype<float>(), half = a.dtype().bits == 16;
  require(f32 || half, "a matrix in place is float32, float16, or bfloat16 seen as 16-bit integers");
  require(!(bfloat16 && f32), "bfloat16 is asked for, float32 is given");
  out.m.format = f32 ? Format::F32 : bfloat16 ? Format::BF16 : Format::F16;
  if (!f32 && !bfloat16) require(a.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float), "float16 is expected");
  out.m.rows = static_cast<int64_t>(a.shape(0));
  out.m.cols = static_cast<int64_t>(a.shape(1));
  require(out.m.rows > 0 && out.m.cols > 0, "an empty matrix");
  require(a.stride(1) == 1 && a.stride(0) >= out.m.cols, "a matrix in place has contiguous rows");
  out.m.stride = a.stride(0) * (f32 ? 4 : 2);
  out.m.data = static_cast<const uint8_t*>(a.data());
  out.owner = nb::cast(a);
  return out;
}

struct PyModel {
  Model m;
  std::atomic<int> steps{0};  // that run
  std::vector<nb::object> keep;
};

const float* floats(PyModel& model, nb::object array, int64_t size, const char* what) {
  Floats a = nb::cast<Floats>(array);
  require(static_cast<int64_t>(a.size()) == size, std::string(what) + " has " + str(a.size()) + " values, " + str(size) + " expected");
  model.keep.push_back(array);
  return a.data();
}

Matrix matrix(PyModel& model, nb::object object, int64_t rows, int64_t cols, const char* what) {
  const PyMatrix& p = nb::cast<const PyMatrix&>(object);
  require(p.m.rows == rows && p.m.cols == cols, std::string(what) + " is " + str(p.m.rows) + " x " + str(p.m.cols) + ", " + str(rows) + " x " + str(cols) + " expected");
  model.keep.push_back(object);
  return p.m;
}

PyModel* make_model(int64_t hidden, int64_t heads, int64_t kv_heads, int64_t width, int64_t ffn, int64_t vocab, float eps,
                    nb::object embed, nb::object head, nb::object norm) {
  require(hidden > 0 && heads > 0 && kv_heads > 0 && width > 0 && ffn > 0 && vocab > 0, "every dimension of a model is positive");
  require(heads % kv_heads == 0, str(kv_heads) + " kv heads do not divide " + str(heads) + " heads");
  require(width % 2 == 0, "the head width " + str(width) + " is odd");
  auto p = std::make_unique<PyModel>();
  Model& m = p->m;
  m.hidden = hidden; m.heads = heads; m.kv_heads = kv_heads; m.width = width; m.ffn = ffn; m.vocab = vocab; m.eps = eps;
  m.embed = matrix(*p, embed, vocab, hidden, "the embedding");
  m.head = matrix(*p, head, vocab, hidden, "the head");
  m.norm = floats(*p, norm, hidden, "the final norm");
  return p.release();
}

void add_layer(PyModel& p, nb::object norm1, nb::object q, nb::object k, nb::object v, nb::object o, nb::object norm2,
               nb::object gate, nb::object up, nb::object down) {
  require(p.steps == 0, "the model runs in another thread; add layers before");
  Model& m = p.m;
  int64_t A = m.heads * m.width, KV = m.kv_heads * m.width;
  Layer l;
  l.norm1 = floats(p, norm1, m.hidden, "the attention norm");
  l.norm2 = floats(p, norm2, m.hidden, "the feed-forward norm");
  l.q = matrix(p, q, A, m.hidden, "q");
  l.k = matrix(p, k, KV, m.hidden, "k");
  l.v = matrix(p, v, KV, m.hidden, "v");
  l.o = matrix(p, o, m.hidden, A, "o");
  l.gate = matrix(p, gate, m.ffn, m.hidden, "gate");
  l.up = matrix(p, up, m.ffn, m.hidden, "up");
  l.down = matrix(p, down, m.hidden, m.ffn, "down");
  int of_attention = 1 + (l.k.order != l.q.order) + (l.v.order != l.q.order && l.v.order != l.k.order);
  m.orders = std::max({m.orders, of_attention, 1 + (l.up.order != l.gate.order)});
  m.layers.push_back(l);
}

Adapter* make_adapter(const PyModel& model) {
  require(!model.m.layers.empty(), "an adapter is for a model that has layers");
  return new Adapter(model.m);
}

void set_low_rank(Adapter& adapter, int64_t layer, const std::string& name, const PyMatrix& a, const PyMatrix& b, float scale) {
  const char* names[PARTS] = {"q", "k", "v", "o", "gate", "up", "down"};
  int part = 0;
  while (part < PARTS && name != names[part]) ++part;
  require(part < PARTS, "'" + name + "' is not one of q, k, v, o, gate, up, down");
  require(layer >= 0 && layer < adapter.layers(), "layer " + str(layer) + " is outside the model's " + str(adapter.layers()));
  require(row_major(a.m.format) && row_major(b.m.format), "A and B are float matrices");
  int64_t in = adapter.in(static_cast<Part>(part)), out = adapter.out(static_cast<Part>(part));
  require(a.m.cols == in && b.m.rows == out && a.m.rows == b.m.cols,
          "A is " + str(a.m.rows) + " x " + str(a.m.cols) + " and B " + str(b.m.rows) + " x " + str(b.m.cols) + ", rank x " + str(in) + " and " + str(out) + " x rank expected");
  require(adapter.steps == 0, "the adapter runs in another thread; set it before");
  require(std::isfinite(scale), "the scale is not a finite number");
  require(adapter.all()[layer * PARTS + part].rank == 0, "it is given twice");
  adapter.set(layer, static_cast<Part>(part), a.m, b.m, scale);
}

KvCache* make_cache(const std::string& dtype, int64_t layers, int64_t heads, int64_t width, int64_t pages) {
  require(dtype == "float32" || dtype == "bfloat16" || dtype == "int8", "a cache is float32, bfloat16 or int8, not " + dtype);
  require(layers > 0 && heads > 0 && width > 0 && pages > 0 && pages < (int64_t{1} << 31), "every dimension of a cache is positive");
  constexpr int64_t MOST = int64_t{1} << 48;
  require(width <= MOST / 256 / heads / layers / pages, "a cache of that size has no address");
  return new KvCache(dtype == "float32" ? KvType::F32 : dtype == "bfloat16" ? KvType::BF16 : KvType::I8, layers, heads, width, pages);
}

// Refuses a layer, a table of pages, or keys and values (heads, positions, width) that do not fit the cache.
template <class Array>
void check_positions(const KvCache& c, int64_t layer, const std::vector<int32_t>& table, int64_t past, const Array& keys, const Array& values) {
  require(layer >= 0 && layer < c.layers(), "layer " + str(layer) + " is outside the cache's " + str(c.layers()));
  for (const Array* a : {&keys, &values})
    require(static_cast<int64_t>(a->shape(0)) == c.shape().heads && static_cast<int64_t>(a->shape(2)) == c.shape().width && a->shape(1) == keys.shape(1),
            "keys and values are " + str(c.shape().heads) + " heads x positions x " + str(c.shape().width));
  int64_t end = past + static_cast<int64_t>(keys.shape(1));
  require(past >= 0 && (end + PAGE - 1) / PAGE <= static_cast<int64_t>(table.size()), "the table is too short");
  for (int64_t i = 0; i < static_cast<int64_t>(table.size()); ++i)
    require(table.data()[i] >= 0 && table.data()[i] < c.pages(), "page " + str(table.data()[i]) + " is outside the cache of " + str(c.pages()) + " pages");
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
  require(a.type == b.type && a.heads == b.heads && a.width == b.width && c.layers() == other.layers(), "a cache of another shape");
  require(from >= 0 && to >= 0 && from < other.pages() && to < c.pages(), "a page outside the cache");
  c.copy_page_from(other, from, to);
}

void check_batch(const Model& m, const KvCache& c, const Batch& b) {
  require(c.layers() == static_cast<int64_t>(m.layers.size()) && c.shape().heads == m.kv_heads && c.shape().width == m.width,
          "the cache was made for another model");
  require(b.tokens > 0 && b.sequences > 0, "a step needs at least one token");
  require(b.starts[0] == 0 && b.starts[b.sequences] == b.tokens, "starts runs from 0 to the number of tokens");
  for (int64_t t = 0; t < b.tokens; ++t) {
    require(b.ids[t] >= 0 && b.ids[t] < m.vocab, "token id " + str(b.ids[t]) + " is outside the vocabulary of " + str(m.vocab));
    require(b.positions[t] >= 0, "position " + str(b.positions[t]) + " is negative");
  }
  for (int64_t s = 0; s < b.sequences; ++s) {
    int64_t n = b.starts[s + 1] - b.starts[s];
    require(n > 0, "sequence " + str(s) + " has no token");
    require(b.past[s] >= 0, "sequence " + str(s) + " has a negative past");
    int64_t pages = (b.past[s] + n + PAGE - 1) / PAGE;
    require(pages <= b.table_width, "sequence " + str(s) + " needs " + str(pages) + " pages, its table has " + str(b.table_width));
    for (int64_t i = 0; i < pages; ++i) {
      int32_t page = b.tables[s * b.table_width + i];
      require(page >= 0 && page < c.pages(), "page " + str(page) + " is outside the cache of " + str(c.pages()) + " pages");
    }
  }
  require(b.rows <= b.tokens, "more logits rows than tokens");
  for (int64_t i = 0; i < b.rows; ++i)
    require(b.out_rows[i] >= 0 && b.out_rows[i] < b.tokens, "logits row " + str(b.out_rows[i]) + " is outside the step's " + str(b.tokens) + " tokens");
}

// While one of these lives neither the model nor an adapter of the step can be changed.
class Running {
 public:
  Running(PyModel& model, const std::vector<const Adapter*>& adapters) : model_(model), adapters_(adapters) { count(1); }
  ~Running() { count(-1); }
  Running(const Running&) = delete;

 private:
  void count(int by) const {
    model_.steps += by;
    for (const Adapter* adapter : adapters_)
      if (adapter) adapter->steps += by;
  }
  PyModel& model_;
  const std::vector<const Adapter*>& adapters_;
};

class PyRunner {
 public:
  PyRunner(Pool& pool, const std::string& isa_name, bool exact) : kernels_(isa(isa_name)), runner_(kernels_, &pool, exact) {}

  void step(PyModel& model, KvCache& cache, Ints ids, Ints positions, Ints starts, Ints past, Ints2 tables, Ints rows,
            Floats inv_freq, float rope_scale, Out2 logits, std::optional<std::vector<nb::object>> adapters) {
    Batch b;
    b.tokens = static_cast<int64_t>(ids.size());
    b.sequences = static_cast<int64_t>(past.size());
    b.rows = static_cast<int64_t>(rows.size());
    b.table_width = static_cast<int64_t>(tables.shape(1));
    require(static_cast<int64_t>(positions.size()) == b.tokens, "one position for every token");
    require(static_cast<int64_t>(starts.size()) == b.sequences + 1, "starts has one entry more than past");
    require(static_cast<int64_t>(tables.shape(0)) == b.sequences, "one page table for every sequence");
    require(static_cast<int64_t>(inv_freq.size()) == model.m.width / 2, "inv_freq has half a head's width");
    require(static_cast<int64_t>(logits.shape(0)) == b.rows && (b.rows == 0 || static_cast<int64_t>(logits.shape(1)) == model.m.vocab), "logits is rows x vocabulary");
    const std::vector<int32_t> own_ids = copied(ids), own_positions = copied(positions), own_starts = copied(starts);
    const std::vector<int32_t> own_past = copied(past), own_tables = copied(tables.data(), tables.size()), own_rows = copied(rows);
    const std::vector<float> own_freq(inv_freq.data(), inv_freq.data() + inv_freq.size());
    b.ids = own_ids.data();
    b.positions = own_positions.data();
    b.starts = own_starts.data();
    b.past = own_past.data();
    b.tables = own_tables.data();
    b.out_rows = own_rows.data();
    b.inv_freq = own_freq.data();
    b.rope_scale = rope_scale;
    b.logits = logits.data();
    check_batch(model.m, cache, b);
    std::vector<const Adapter*> chosen;  // alive as long as `adapters` holds them
    if (adapters) {
      require(static_cast<int64_t>(adapters->size()) == b.sequences, "one adapter, or None, for every sequence");
      for (const nb::object& a : *adapters) {
        chosen.push_back(a.is_none() ? nullptr : &nb::cast<const Adapter&>(a));
        require(!chosen.back() || chosen.back()->fits(model.m), "the adapter was made for another model");
      }
      b.adapters = chosen.data();
    }
    bool pending = false;
    const Running running(model, chosen);
    {
      nb::gil_scoped_release free;
      std::lock_guard<std::mutex> one(busy_);
      auto last = std::chrono::steady_clock::now();
      runner_.step(model.m, cache, b, [&] {
        auto now = std::chrono::steady_clock::now();
        if (now - last < std::chrono::milliseconds(20)) return false;
        last = now;
        nb::gil_scoped_acquire hold;
        pending = PyErr_CheckSignals() != 0;
        return pending;
      });
    }
    if (pending) throw nb::python_error();
  }

  std::string name() const { return kernels_->name; }

 private:
  const Kernels* kernels_;
  Runner runner_;
  std::mutex busy_;
};

class Forms {  // the activations of a product, with their memory
 public:
  Forms(int64_t m, int64_t cols) {
    memory_ = allocate(acts_bytes(m, cols), false);
    acts = lay_out(memory_.get(), m, cols);
  }
  Acts acts;

 private:
  std::shared_ptr<uint8_t> memory_;
};

// out = x @ w.T on the pool for each of the matrices in turn, the last one's stays: what the kernel tests and
// benchmarks call.
void matmul(Pool& pool, const std::string& isa_name, const std::vector<const PyMatrix*>& ws, In2 x, Out2 out, bool exact) {
  const Kernels* k = isa(isa_name);
  int64_t m = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1)), rows = static_cast<int64_t>(out.shape(1));
  for (const PyMatrix* w : ws)
    require(w->m.cols == cols && static_cast<int64_t>(out.shape(0)) == m && w->m.rows == rows, "x is m x cols, out m x rows");
  require(m > 0, "no rows");
  Forms forms(m, cols);
  nb::gil_scoped_release free;
  for (const PyMatrix* w : ws) {
    forms.acts.order = w->m.order;
    k->prepare(x.data(), cols, 0, m, form_of(w->m.format, exact), forms.acts);
    Job job{&w->m, nullptr, out.data(), rows, Epilogue::STORE};
    pool.run([&](int tid) {
      int64_t tiles = w->m.tiles(), pairs = (tiles + 1) / 2;
      k->matmul(job, forms.acts, std::min(tiles, pairs * tid / pool.size() * 2), std::min(tiles, pairs * (tid + 1) / pool.size() * 2), exact);
    });
  }
}

void matmul_one(Pool& pool, const std::string& isa_name, const PyMatrix& w, In2 x, Out2 out, bool exact, int64_t repeat) {
  require(repeat > 0, "repeat is above 0");
  matmul(pool, isa_name, std::vector<const PyMatrix*>(repeat, &w), x, out, exact);
}

// Stores keys and values (tokens x kv heads * width, already rotated) in one layer from slot `past` of a sequence on, and
// attends the queries (heads * width each) of the last out.shape(0) of them: what the kernel tests and benchmarks call.
void attend(Pool& pool, const std::string& isa_name, KvCache& cache, int64_t layer, Ints table, int64_t past, In2 q, In2 k, In2 v,
            Out2 out) {
  const Kernels* kernels = isa(isa_name);
  require(layer >= 0 && layer < cache.layers(), "layer " + str(layer) + " is outside the cache's " + str(cache.layers()));
  KvLayer kv = cache.layer(layer);
  int64_t tokens = static_cast<int64_t>(k.shape(0)), asked = static_cast<int64_t>(q.shape(0)), width = kv.width;
  int64_t across = static_cast<int64_t>(q.shape(1)), group = across / (kv.heads * width), end = past + tokens;
  require(static_cast<int64_t>(k.shape(1)) == kv.heads * width && v.shape(0) == k.shape(0) && v.shape(1) == k.shape(1), "k and v are tokens x kv heads * width");
  require(group > 0 && across == group * kv.heads * width, "q has a multiple of the kv heads");
  require(out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1), "out is shaped as q");
  require(past >= 0 && asked <= end && (end + PAGE - 1) / PAGE <= static_cast<int64_t>(table.size()), "the table is too short");
  const std::vector<int32_t> own = copied(table);
  const int32_t* pages = own.data();
  for (int64_t i = 0; i < static_cast<int64_t>(own.size()); ++i)
    require(pages[i] >= 0 && pages[i] < cache.pages(), "page " + str(pages[i]) + " is outside the cache of " + str(cache.pages()) + " pages");
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

void dequantize(const std::string& isa_name, const PyMatrix& w, Out2 out) {
  const Kernels* k = isa(isa_name);
  require(static_cast<int64_t>(out.shape(0)) == w.m.rows && static_cast<int64_t>(out.shape(1)) == w.m.cols, "out is rows x cols");
  nb::gil_scoped_release free;
  for (int64_t r = 0; r < w.m.rows; ++r) k->dequantize_row(w.m, r, out.data() + r * w.m.cols);
}

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

// For each row (ids, probabilities), or None where shortlist() has no answer.
nb::list shortlists(In2 scores, float temperature, int64_t top_k, double top_p, int64_t keep) {
  require(temperature > 0 && top_k > 0 && top_p >= 0 && top_p <= 1 && keep > 0, "temperature, top_k and keep are positive, top_p is in [0, 1]");
  nb::list rows;
  std::vector<int32_t> ids;
  std::vector<double> p;
  for (size_t row = 0; row < scores.shape(0); ++row) {
    int64_t vocabulary = static_cast<int64_t>(scores.shape(1));
    bool sure = vocabulary > 0 && shortlist(scores.data() + row * vocabulary, vocabulary, {temperature, top_k, top_p, keep}, ids, p);
    if (sure) rows.append(nb::make_tuple(ids, p));
    else rows.append(nb::none());
  }
  return rows;
}

std::vector<float> noise(OutBytes state, int64_t total, Longs places) {
  require(static_cast<int64_t>(state.size()) >= generator_bytes(), "the state of torch's CPU generator");
  const std::vector<int64_t> own(places.data(), places.data() + places.size());
  int64_t before = -1;
  for (int64_t place : own) {
    require(place > before && place < total, "places ascend, from 0 to less than total");
    before = place;
  }
  std::vector<float> found(own.size());
  require(exponentials(state.data(), total, own.data(), static_cast<int64_t>(own.size()), found.data()), "the state of torch's CPU generator");
  return found;
}

void permutation(uint64_t seed, int64_t size, OutLongs out) {
  require(size < int64_t{1} << 32 && static_cast<int64_t>(out.size()) <= size, "an array of no more than size");
  permuted(seed, size, static_cast<int64_t>(out.size()), out.data());
}

}  // namespace

NB_MODULE(_native, m) {
  // One pool lives as long as the process (threads.py): what is alive at exit is no leak.
  nb::set_leak_warnings(false);
  m.doc() = "The native CPU engine of llama2; use it through llama2.cpu.";
  nb::class_<Pool>(m, "Pool")
      .def(nb::init<int, std::vector<int>>(), nb::arg("threads"), nb::arg("cpus"))
      .def_prop_ro("size", &Pool::size);
  nb::class_<Arena>(m, "Arena").def(nb::init<>());
  nb::class_<PyMatrix>(m, "Matrix")
      .def_prop_ro("rows", [](const PyMatrix& p) { return p.m.rows; })
      .def_prop_ro("cols", [](const PyMatrix& p) { return p.m.cols; })
      .def_prop_ro("format", [](const PyMatrix& p) { return static_cast<int>(p.m.format); })
      .def_prop_ro("nbytes", [](const PyMatrix& p) { return row_major(p.m.format) ? p.m.rows * p.m.cols * (p.m.format == Format::F32 ? 4 : 2) : p.m.tiles() * p.m.stride; })
      .def("set_bias", [](PyMatrix& p, nb::object bias) {
        Floats a = nb::cast<Floats>(bias);
        require(static_cast<int64_t>(a.size()) == p.m.rows, "a bias of " + str(a.size()) + " values for " + str(p.m.rows) + " rows");
        p.biases.push_back(bias);
        p.m.bias = a.data();
      });
  nb::class_<PyModel>(m, "Model")
      .def("add_layer", &add_layer)
      .def_prop_ro("layers", [](const PyModel& p) { return p.m.layers.size(); });
  nb::class_<Adapter>(m, "Adapter")
      .def_prop_ro("nbytes", &Adapter::bytes)
      .def("set", &set_low_rank);
  nb::class_<KvCache>(m, "KvCache")
      .def_prop_ro("pages", &KvCache::pages)
      .def_prop_ro("nbytes", &KvCache::bytes)
      .def("copy_page", [](KvCache& c, int64_t from, int64_t to) {
        require(from >= 0 && to >= 0 && from < c.pages() && to < c.pages(), "a page outside the cache");
        c.copy_page(from, to);
      })
      .def("copy_page_from", &copy_page_from)
      .def("read", &read_cache)
      .def("write", &write_cache);
  nb::class_<PyRunner>(m, "Runner")
      .def(nb::init<Pool&, const std::string&, bool>(), nb::arg("pool"), nb::arg("isa"), nb::arg("exact"), nb::keep_alive<1, 2>())
      .def_prop_ro("isa", &PyRunner::name)
      .def("step", &PyRunner::step);
  m.def("make_adapter", &make_adapter, nb::rv_policy::take_ownership);
  m.def("make_model", &make_model, nb::rv_policy::take_ownership);
  m.def("make_cache", &make_cache, nb::rv_policy::take_ownership);
  m.def("pack", &pack, nb::arg("arena"), nb::arg("pool"), nb::arg("raw"), nb::arg("type"), nb::arg("rows"), nb::arg("cols"), nb::arg("row_map") = nb::none());
  m.def("pack_codebook", &pack_codebook, nb::arg("arena"), nb::arg("pool"), nb::arg("codes"), nb::arg("scales"), nb::arg("table"), nb::arg("rows"), nb::arg("cols"), nb::arg("block"), nb::arg("bfloat16"));
  m.def("pack_groups", &pack_groups, nb::arg("arena"), nb::arg("pool"), nb::arg("codes"), nb::arg("scales"), nb::arg("zeros"), nb::arg("rows"), nb::arg("cols"), nb::arg("group"), nb::arg("bits"), nb::arg("order") = nb::none());
  m.def("pack_rows", &pack_rows, nb::arg("arena"), nb::arg("pool"), nb::arg("values"), nb::arg("scales"), nb::arg("rows"), nb::arg("cols"));
  m.def("pack_tiles", &pack_tiles, nb::arg("pool"), nb::arg("raw"), nb::arg("type"), nb::arg("rows"), nb::arg("cols"), nb::arg("row_map").none(), nb::arg("first"), nb::arg("out"));
  m.def("packed_view", &packed_view, nb::arg("data"), nb::arg("type"), nb::arg("rows"), nb::arg("cols"));
  m.def("tile_bytes", [](int type_id, int64_t rows, int64_t cols) { return Blocks::shape(type_id, rows, cols).m.stride; });
  m.def("view", &view, nb::arg("array"), nb::arg("bfloat16"));
  m.def("matmul_each", &matmul);
  m.def("matmul", &matmul_one, nb::arg("pool"), nb::arg("isa"), nb::arg("w"), nb::arg("x"), nb::arg("out"), nb::arg("exact"), nb::arg("repeat") = 1);
  m.def("shortlists", &shortlists);
  m.def("shortlist_margin", &shortlist_margin);
  m.def("permutation", &permutation, nb::arg("seed"), nb::arg("size"), nb::arg("out"));
  m.def("exponentials", &noise, nb::arg("state"), nb::arg("total"), nb::arg("places"));
  m.def("attend", &attend);
  m.def("dequantize", &dequantize);
  bind_train(m);
  m.def("read_bandwidth", &read_bandwidth);
  m.def("read_matrix", &read_matrix);
  m.def("peak", &peak);
  m.def("ping_pong", [](Pool& pool, int rounds) { nb::gil_scoped_release free; return ping_pong(pool, rounds); });
  m.def("available_isas", [] {
    const char* names[8];
    int n = list_kernels(names, 8);
    return std::vector<std::string>(names, names + n);
  });
}
