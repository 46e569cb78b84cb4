// Matrices: packed from GGUF blocks or codes, in place, and their products for the kernel tests and benchmarks.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <utility>

#include "bind/bind.h"
#include "engine/pack.h"
#include "engine/pool.h"

namespace {

// Packed matrices one behind the other in the order they are asked for, in pieces of huge pages.
class PyArena : public Arena {
 public:
  PyArena() : Arena(int64_t{256} << 20) {}

  // A copy of `bytes` of data; data seen before gets the copy made then, so that equal tables are one table.
  const uint8_t* shared(const void* data, int64_t bytes) {
    for (const auto& [at, size] : shared_)
      if (size == bytes && std::memcmp(at, data, bytes) == 0) return at;
    uint8_t* copy = static_cast<uint8_t*>(std::memcpy(take(bytes), data, bytes));
    keep_.push_back(memory());
    shared_.push_back({copy, bytes});
    return copy;
  }
  const std::vector<std::shared_ptr<uint8_t>>& kept() const { return keep_; }

 private:
  std::vector<std::pair<const uint8_t*, int64_t>> shared_;
  std::vector<std::shared_ptr<uint8_t>> keep_;  // what shared_ lies in
};

// A matrix of GGUF blocks, checked: what `pack` and `pack_tiles` read.
struct Blocks {
  Blocks(Bytes raw, int type_id, int64_t rows_, int64_t cols_, const std::optional<Ints>& row_map)
      : rows(rows_),
        cols(cols_) {
    type = &packable(type_id, rows, cols);
    int64_t want = rows * (cols / type->columns) * type->bytes;
    require(static_cast<int64_t>(raw.size()) == want, std::string(type->name) + " " + str(rows) + " x " + str(cols) +
                                                          " takes " + str(want) + " bytes, got " + str(raw.size()));
    from = raw.data();
    if (!row_map) return;
    require(static_cast<int64_t>(row_map->size()) == rows,
            "row_map has " + str(row_map->size()) + " entries for " + str(rows) + " rows");
    map_ = copied(*row_map);
    map = map_.data();
    for (int64_t i = 0; i < rows; ++i)
      require(map[i] >= 0 && map[i] < rows,
              "row_map[" + str(i) + "] = " + str(map[i]) + " is outside 0.." + str(rows - 1));
  }

  static const FileType& packable(int type_id, int64_t rows, int64_t cols) {
    const FileType* type = file_type(type_id);
    require(type != nullptr, "GGUF type " + str(type_id) + " has no packing");
    require(rows > 0 && cols > 0 && rows < (int64_t{1} << 31) && cols < (int64_t{1} << 31),
            "a matrix of " + str(rows) + " x " + str(cols));
    require(cols % type->columns == 0, std::string(type->name) + " needs rows of a multiple of " + str(type->columns) +
                                           " columns, got " + str(cols));
    return *type;
  }

  static PyMatrix shape(int type_id, int64_t rows, int64_t cols) {  // the packed matrix, its data not yet there
    const FileType& type = packable(type_id, rows, cols);
    PyMatrix out;
    out.m.rows = rows;
    out.m.cols = cols;
    out.m.format = type.format;
    out.m.stride = tile_bytes(type.format, cols);
    out.m.codebook = type_codebook(type_id);
    return out;
  }

  // Tiles [first, last) to `to`. A thread packs its share, so that it lies where the thread runs, then helps the
  // others: fresh memory does not come to all threads at one speed.
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
          for (int64_t stop = std::min(t + PIECE, end); t < stop; ++t)
            pack_tile(*type, from, rows, cols, map, t, to + (t - first) * stride);
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

PyMatrix pack(PyArena& arena, Pool& pool, Bytes raw, int type_id, int64_t rows, int64_t cols,
              std::optional<Ints> row_map) {
  Blocks blocks(raw, type_id, rows, cols, row_map);
  PyMatrix out = Blocks::shape(type_id, rows, cols);
  uint8_t* to = arena.take(out.m.tiles() * out.m.stride);
  out.m.data = to;
  out.memory = arena.memory();
  blocks.pack(pool, 0, out.m.tiles(), out.m.stride, to);
  return out;
}

// Tiles from `first` on, as many as `out` has room for: packing to a file, a piece at a time.
void pack_tiles(Pool& pool, Bytes raw, int type_id, int64_t rows, int64_t cols, std::optional<Ints> row_map,
                int64_t first, OutBytes out) {
  Blocks blocks(raw, type_id, rows, cols, row_map);
  Matrix m = Blocks::shape(type_id, rows, cols).m;
  int64_t bytes = static_cast<int64_t>(out.size()), count = bytes / m.stride;
  require(bytes % m.stride == 0,
          "room for tiles of " + str(m.stride) + " bytes is a multiple of that, got " + str(bytes));
  require(first >= 0 && count <= m.tiles() - first,
          "tiles " + str(first) + " to " + str(first + count) + " of a matrix of " + str(m.tiles()));
  std::memset(out.data(), 0, bytes);  // lanes and columns beyond the matrix
  blocks.pack(pool, first, first + count, m.stride, out.data());
}

// A matrix packed before, used where it lies: the map of a packed file.
PyMatrix packed_view(Bytes data, int type_id, int64_t rows, int64_t cols) {
  PyMatrix out = Blocks::shape(type_id, rows, cols);
  int64_t want = out.m.tiles() * out.m.stride;
  require(static_cast<int64_t>(data.size()) == want, "a packed matrix of " + str(rows) + " x " + str(cols) + " takes " +
                                                         str(want) + " bytes, got " + str(data.size()));
  require(reinterpret_cast<uintptr_t>(data.data()) % 64 == 0, "a packed matrix starts at a multiple of 64 bytes");
  out.m.data = data.data();
  out.owner = nb::cast(data);
  return out;
}

std::string shape_of(int64_t rows, int64_t cols) { return str(rows) + " x " + str(cols); }

PyMatrix pack_codes(PyArena& arena, Pool& pool, CodeSource from, const Codebook* codebook) {
  PyMatrix out;
  out.m.rows = from.rows;
  out.m.cols = from.cols;
  out.m.format = from.format;
  out.m.stride = tile_bytes(from.format, from.cols, from.group);
  if (from.format == Format::G4 || from.format == Format::G8 || from.minima) out.m.group = from.group;
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
  require(group > 0 && group % GROUP == 0 && group < LIMIT,
          "a group of " + str(group) + " columns; a multiple of 32 is needed");
  return {f, rows, cols, group};
}

void require_nibbles(const uint8_t* codes, int64_t n) {
  const uint8_t* bad = std::find_if(codes, codes + n, [](uint8_t c) { return c > 15; });
  require(bad == codes + n,
          bad == codes + n ? "" : "code " + str(*bad) + " at " + str(bad - codes) + " is not below 16");
}

PyMatrix pack_codebook(PyArena& arena, Pool& pool, Bytes codes, Floats scales, Floats table, int64_t rows, int64_t cols,
                       int64_t block, bool bfloat16) {
  CodeSource s = source(bfloat16 ? Format::C4B : Format::C4, rows, cols, block);
  require(cols % 64 == 0 && block % 64 == 0,
          "codes need rows and blocks of a multiple of 64 columns, got " + str(cols) + " and " + str(block));
  int64_t n = rows * cols, given = static_cast<int64_t>(codes.size());
  require(given == n || given == n / 2, "codes of " + shape_of(rows, cols) + " take " + str(n) + " bytes, or " +
                                            str(n / 2) + " two in a byte, got " + str(given));
  require(static_cast<int64_t>(scales.size()) == up(n, block),
          "one scale for every " + str(block) + " weights: " + str(up(n, block)) + ", got " + str(scales.size()));
  require(table.size() == 16, "a codebook has 16 values, got " + str(table.size()));
  s.pairs = given != n;
  s.codes = codes.data();
  s.scales = scales.data();
  if (!s.pairs) require_nibbles(s.codes, n);
  const Codebook codebook = codebook_of(table.data());
  return pack_codes(arena, pool, s, &codebook);
}

std::vector<int32_t> column_order(const Ints& order, int64_t cols) {
  require(static_cast<int64_t>(order.size()) == cols,
          "order has " + str(order.size()) + " entries for " + str(cols) + " columns");
  std::vector<int32_t> columns = copied(order);
  std::vector<bool> seen(cols);
  for (int64_t i = 0; i < cols; ++i) {
    if (columns[i] < 0 || columns[i] >= cols || seen[columns[i]])
      require(false, "order[" + str(i) + "] = " + str(columns[i]) + ": order is a permutation of 0.." + str(cols - 1));
    seen[columns[i]] = true;
  }
  return columns;
}

PyMatrix pack_groups(PyArena& arena, Pool& pool, Bytes codes, Halves scales, Bytes zeros, int64_t rows, int64_t cols,
                     int64_t group, int bits, std::optional<Ints> order) {
  require(bits == 4 || bits == 8, "groups are packed of 4 or 8 bits, not " + str(bits));
  CodeSource s = source(bits == 4 ? Format::G4 : Format::G8, rows, cols, group);
  int64_t n = rows * cols, groups = rows * up(cols, group);
  require(static_cast<int64_t>(codes.size()) == n,
          "codes of " + shape_of(rows, cols) + " take " + str(n) + " bytes, got " + str(codes.size()));
  require(static_cast<int64_t>(scales.size()) == groups && static_cast<int64_t>(zeros.size()) == groups,
          "groups of " + str(group) + " take " + str(groups) + " scales and zeros, got " + str(scales.size()) +
              " and " + str(zeros.size()));
  s.codes = codes.data();
  s.scales = scales.data();
  s.zeros = zeros.data();
  if (bits == 4) require_nibbles(s.codes, n);
  std::vector<int32_t> columns = order ? column_order(*order, cols) : std::vector<int32_t>();
  if (order) s.order = columns.data();
  return pack_codes(arena, pool, s, nullptr);
}

// 4-bit codes into a table of 16 numbers with a scale for every 16 or 32 columns of a row.
PyMatrix pack_table(PyArena& arena, Pool& pool, Bytes codes, Floats scales, Floats table, int64_t rows, int64_t cols,
                    int64_t group) {
  require(group == 16 || group == 32, "tables take a scale for every 16 or 32 columns, not " + str(group));
  CodeSource s = source(group == 32 ? Format::T4 : Format::T4H, rows, cols, GROUP);
  require(cols % group == 0, "rows of " + str(cols) + " columns are no multiple of " + str(group));
  s.group = group;
  require(static_cast<int64_t>(codes.size()) == rows * cols,
          "codes of " + shape_of(rows, cols) + " take " + str(rows * cols) + " bytes, got " + str(codes.size()));
  require(static_cast<int64_t>(scales.size()) == rows * cols / group,
          "groups of " + str(group) + " take " + str(rows * cols / group) + " scales, got " + str(scales.size()));
  require(table.size() == 16, "a table has 16 values, got " + str(table.size()));
  require_nibbles(codes.data(), rows * cols);
  s.codes = codes.data();
  s.scales = scales.data();
  const Codebook codebook = codebook_of(table.data());
  return pack_codes(arena, pool, s, &codebook);
}

// w = scale * code + minimum, both float32 for every row and group of columns.
PyMatrix pack_affine(PyArena& arena, Pool& pool, Bytes codes, Floats scales, Floats minima, int64_t rows, int64_t cols,
                     int64_t group, int bits, std::optional<Ints> order) {
  require(bits == 4 || bits == 8, "groups are packed of 4 or 8 bits, not " + str(bits));
  CodeSource s = source(bits == 4 ? Format::A4 : Format::A8, rows, cols, group);
  int64_t n = rows * cols, groups = rows * up(cols, group);
  require(static_cast<int64_t>(codes.size()) == n,
          "codes of " + shape_of(rows, cols) + " take " + str(n) + " bytes, got " + str(codes.size()));
  require(static_cast<int64_t>(scales.size()) == groups && static_cast<int64_t>(minima.size()) == groups,
          "groups of " + str(group) + " take " + str(groups) + " scales and minima, got " + str(scales.size()) +
              " and " + str(minima.size()));
  if (bits == 4) require_nibbles(codes.data(), n);
  s.codes = codes.data();
  s.scales = scales.data();
  s.minima = minima.data();
  std::vector<int32_t> columns = order ? column_order(*order, cols) : std::vector<int32_t>();
  if (order) s.order = columns.data();
  return pack_codes(arena, pool, s, nullptr);
}

PyMatrix pack_rows(PyArena& arena, Pool& pool, Signed values, Floats scales, int64_t rows, int64_t cols) {
  CodeSource s = source(Format::R8, rows, cols, GROUP);
  require(static_cast<int64_t>(values.size()) == rows * cols,
          "int8 values of " + shape_of(rows, cols) + " take " + str(rows * cols) + " bytes, got " + str(values.size()));
  require(static_cast<int64_t>(scales.size()) == rows,
          str(rows) + " rows have as many scales, got " + str(scales.size()));
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
  if (!f32 && !bfloat16)
    require(a.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float), "float16 is expected");
  out.m.rows = static_cast<int64_t>(a.shape(0));
  out.m.cols = static_cast<int64_t>(a.shape(1));
  require(out.m.rows > 0 && out.m.cols > 0, "an empty matrix");
  require(a.stride(1) == 1 && a.stride(0) >= out.m.cols, "a matrix in place has contiguous rows");
  out.m.stride = a.stride(0) * (f32 ? 4 : 2);
  out.m.data = static_cast<const uint8_t*>(a.data());
  out.owner = nb::cast(a);
  return out;
}

class Forms {  // the activations of a product, with their memory
 public:
  Forms(int64_t m, int64_t cols) {
    memory_ = allocate(acts_bytes(m, cols), false);
    Bump bump(memory_.get());
    acts = lay_out(bump, m, cols);
  }
  Acts acts;

 private:
  std::shared_ptr<uint8_t> memory_;
};

// out = x @ w.T on the pool for each of the matrices in turn, the last one's stays: what the kernel tests and
// benchmarks call.
void matmul(Pool& pool, const std::string& isa_name, const std::vector<const PyMatrix*>& ws, In2 x, Out2 out,
            bool exact) {
  const Kernels* k = isa(isa_name);
  int64_t m = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1)),
          rows = static_cast<int64_t>(out.shape(1));
  for (const PyMatrix* w : ws)
    require(w->m.cols == cols && static_cast<int64_t>(out.shape(0)) == m && w->m.rows == rows,
            "x is m x cols, out m x rows");
  require(m > 0, "no rows");
  Forms forms(m, cols);
  nb::gil_scoped_release free;
  for (const PyMatrix* w : ws) {
    forms.acts.order = w->m.order;
    k->prepare(x.data(), cols, 0, m, form_of(w->m.format, exact), forms.acts);
    Job job{&w->m, nullptr, out.data(), rows, Epilogue::STORE};
    pool.run([&](int tid) {
      int64_t tiles = w->m.tiles(), pairs = (tiles + 1) / 2;
      k->matmul(job, forms.acts, std::min(tiles, pairs * tid / pool.size() * 2),
                std::min(tiles, pairs * (tid + 1) / pool.size() * 2), exact);
    });
  }
}

void matmul_one(Pool& pool, const std::string& isa_name, const PyMatrix& w, In2 x, Out2 out, bool exact,
                int64_t repeat) {
  require(repeat > 0, "repeat is above 0");
  matmul(pool, isa_name, std::vector<const PyMatrix*>(repeat, &w), x, out, exact);
}

void dequantize(const std::string& isa_name, const PyMatrix& w, Out2 out) {
  const Kernels* k = isa(isa_name);
  require(static_cast<int64_t>(out.shape(0)) == w.m.rows && static_cast<int64_t>(out.shape(1)) == w.m.cols,
          "out is rows x cols");
  nb::gil_scoped_release free;
  for (int64_t r = 0; r < w.m.rows; ++r) k->dequantize_row(w.m, r, out.data() + r * w.m.cols);
}

}  // namespace

void bind_weights(nb::module_& m) {
  nb::class_<PyArena>(m, "Arena").def(nb::init<>());
  nb::class_<PyMatrix>(m, "Matrix")
      .def_prop_ro("rows", [](const PyMatrix& p) { return p.m.rows; })
      .def_prop_ro("cols", [](const PyMatrix& p) { return p.m.cols; })
      .def_prop_ro("format", [](const PyMatrix& p) { return static_cast<int>(p.m.format); })
      .def_prop_ro("layout", [](const PyMatrix& p) { return format_name(p.m.format); })
      .def_prop_ro("nbytes",
                   [](const PyMatrix& p) {
                     return row_major(p.m.format) ? p.m.rows * p.m.cols * (p.m.format == Format::F32 ? 4 : 2)
                                                  : p.m.tiles() * p.m.stride;
                   })
      .def("set_bias", [](PyMatrix& p, nb::object bias) {
        auto a = as<Floats>(bias, "a bias");
        require(static_cast<int64_t>(a.size()) == p.m.rows,
                "a bias of " + str(a.size()) + " values for " + str(p.m.rows) + " rows");
        p.biases.push_back(bias);
        p.m.bias = a.data();
      });
  m.def("pack", &pack, nb::arg("arena"), nb::arg("pool"), nb::arg("raw"), nb::arg("type"), nb::arg("rows"),
        nb::arg("cols"), nb::arg("row_map") = nb::none());
  m.def("pack_codebook", &pack_codebook, nb::arg("arena"), nb::arg("pool"), nb::arg("codes"), nb::arg("scales"),
        nb::arg("table"), nb::arg("rows"), nb::arg("cols"), nb::arg("block"), nb::arg("bfloat16"));
  m.def("pack_groups", &pack_groups, nb::arg("arena"), nb::arg("pool"), nb::arg("codes"), nb::arg("scales"),
        nb::arg("zeros"), nb::arg("rows"), nb::arg("cols"), nb::arg("group"), nb::arg("bits"),
        nb::arg("order") = nb::none());
  m.def("pack_table", &pack_table, nb::arg("arena"), nb::arg("pool"), nb::arg("codes"), nb::arg("scales"),
        nb::arg("table"), nb::arg("rows"), nb::arg("cols"), nb::arg("group"));
  m.def("pack_affine", &pack_affine, nb::arg("arena"), nb::arg("pool"), nb::arg("codes"), nb::arg("scales"),
        nb::arg("minima"), nb::arg("rows"), nb::arg("cols"), nb::arg("group"), nb::arg("bits"),
        nb::arg("order") = nb::none());
  m.def("pack_rows", &pack_rows, nb::arg("arena"), nb::arg("pool"), nb::arg("values"), nb::arg("scales"),
        nb::arg("rows"), nb::arg("cols"));
  m.def("pack_tiles", &pack_tiles, nb::arg("pool"), nb::arg("raw"), nb::arg("type"), nb::arg("rows"), nb::arg("cols"),
        nb::arg("row_map").none(), nb::arg("first"), nb::arg("out"));
  m.def("packed_view", &packed_view, nb::arg("data"), nb::arg("type"), nb::arg("rows"), nb::arg("cols"));
  m.def("block_types", [] {  // (number of GGUF, name, weights and bytes of a block, layout) of every packed one
    nb::list types;
    for (const FileType& t : file_types())
      types.append(nb::make_tuple(t.id, t.name, t.columns, t.bytes, format_name(t.format)));
    return types;
  });
  m.def("tile_bytes",
        [](int type_id, int64_t rows, int64_t cols) { return Blocks::shape(type_id, rows, cols).m.stride; });
  m.def("view", &view, nb::arg("array"), nb::arg("bfloat16"));
  m.def("matmul_each", &matmul);
  m.def("matmul", &matmul_one, nb::arg("pool"), nb::arg("isa"), nb::arg("w"), nb::arg("x"), nb::arg("out"),
        nb::arg("exact"), nb::arg("repeat") = 1);
  m.def("dequantize", &dequantize);
}
