// Models, adapters, and the step.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <mutex>
#include <optional>

#include "bind/bind.h"
#include "engine/pool.h"
#include "engine/step.h"

namespace {

struct PyModel {
  Model m;
  std::atomic<int> steps{0};  // that run
  std::vector<nb::object> keep;
};

const float* floats(PyModel& model, nb::object array, int64_t size, const char* what) {
  auto a = as<Floats>(array, what);
  require(static_cast<int64_t>(a.size()) == size,
          std::string(what) + " has " + str(a.size()) + " values, " + str(size) + " expected");
  model.keep.push_back(array);
  return a.data();
}

Matrix matrix(PyModel& model, nb::object object, int64_t rows, int64_t cols, const char* what) {
  const auto& p = as<const PyMatrix&>(object, what);
  require(p.m.rows == rows && p.m.cols == cols, std::string(what) + " is " + str(p.m.rows) + " x " + str(p.m.cols) +
                                                    ", " + str(rows) + " x " + str(cols) + " expected");
  model.keep.push_back(object);
  return p.m;
}

PyModel* make_model(int64_t hidden, int64_t heads, int64_t kv_heads, int64_t width, int64_t ffn, int64_t vocab,
                    float eps, nb::object embed, nb::object head, nb::object norm) {
  require(hidden > 0 && heads > 0 && kv_heads > 0 && width > 0 && ffn > 0 && vocab > 0,
          "every dimension of a model is positive");
  require(heads % kv_heads == 0, str(kv_heads) + " kv heads do not divide " + str(heads) + " heads");
  require(width % 2 == 0, "the head width " + str(width) + " is odd");
  auto p = std::make_unique<PyModel>();
  Model& m = p->m;
  m.hidden = hidden;
  m.heads = heads;
  m.kv_heads = kv_heads;
  m.width = width;
  m.ffn = ffn;
  m.vocab = vocab;
  m.eps = eps;
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

void set_low_rank(Adapter& adapter, int64_t layer, const std::string& name, const PyMatrix& a, const PyMatrix& b,
                  float scale) {
  const char* names[PARTS] = {"q", "k", "v", "o", "gate", "up", "down"};
  int part = 0;
  while (part < PARTS && name != names[part]) ++part;
  require(part < PARTS, "'" + name + "' is not one of q, k, v, o, gate, up, down");
  require(layer >= 0 && layer < adapter.layers(),
          "layer " + str(layer) + " is outside the model's " + str(adapter.layers()));
  require(row_major(a.m.format) && row_major(b.m.format), "A and B are float matrices");
  int64_t in = adapter.in(static_cast<Part>(part)), out = adapter.out(static_cast<Part>(part));
  require(a.m.cols == in && b.m.rows == out && a.m.rows == b.m.cols,
          "A is " + str(a.m.rows) + " x " + str(a.m.cols) + " and B " + str(b.m.rows) + " x " + str(b.m.cols) +
              ", rank x " + str(in) + " and " + str(out) + " x rank expected");
  require(adapter.steps == 0, "the adapter runs in another thread; set it before");
  require(std::isfinite(scale), "the scale is not a finite number");
  require(adapter.all()[layer * PARTS + part].rank == 0, "it is given twice");
  adapter.set(layer, static_cast<Part>(part), a.m, b.m, scale);
}

void check_batch(const Model& m, const KvCache& c, const Batch& b) {
  require(c.layers() == static_cast<int64_t>(m.layers.size()) && c.shape().heads == m.kv_heads &&
              c.shape().width == m.width,
          "the cache was made for another model");
  require(b.tokens > 0 && b.sequences > 0, "a step needs at least one token");
  require(b.starts[0] == 0 && b.starts[b.sequences] == b.tokens, "starts runs from 0 to the number of tokens");
  for (int64_t t = 0; t < b.tokens; ++t) {
    require(b.ids[t] >= 0 && b.ids[t] < m.vocab,
            "token id " + str(b.ids[t]) + " is outside the vocabulary of " + str(m.vocab));
    require(b.positions[t] >= 0, "position " + str(b.positions[t]) + " is negative");
  }
  for (int64_t s = 0; s < b.sequences; ++s) {
    int64_t n = b.starts[s + 1] - b.starts[s];
    require(n > 0, "sequence " + str(s) + " has no token");
    require(b.past[s] >= 0, "sequence " + str(s) + " has a negative past");
    int64_t pages = (b.past[s] + n + PAGE - 1) / PAGE;
    require(pages <= b.table_width,
            "sequence " + str(s) + " needs " + str(pages) + " pages, its table has " + str(b.table_width));
    for (int64_t i = 0; i < pages; ++i) {
      int32_t page = b.tables[s * b.table_width + i];
      require(page >= 0 && page < c.pages(),
              "page " + str(page) + " is outside the cache of " + str(c.pages()) + " pages");
    }
  }
  require(b.rows <= b.tokens, "more logits rows than tokens");
  for (int64_t i = 0; i < b.rows; ++i)
    require(b.out_rows[i] >= 0 && b.out_rows[i] < b.tokens,
            "logits row " + str(b.out_rows[i]) + " is outside the step's " + str(b.tokens) + " tokens");
}

// While one of these lives neither the model nor an adapter of the step can be changed.
class Running {
 public:
  Running(PyModel& model, const std::vector<const Adapter*>& adapters) : model_(model), adapters_(adapters) {
    count(1);
  }
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
  PyRunner(Pool& pool, const std::string& isa_name, bool exact)
      : kernels_(isa(isa_name)),
        runner_(kernels_, &pool, exact) {}

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
    require(static_cast<int64_t>(logits.shape(0)) == b.rows &&
                (b.rows == 0 || static_cast<int64_t>(logits.shape(1)) == model.m.vocab),
            "logits is rows x vocabulary");
    const std::vector<int32_t> own_ids = copied(ids), own_positions = copied(positions), own_starts = copied(starts);
    const std::vector<int32_t> own_past = copied(past), own_tables = copied(tables.data(), tables.size()),
                               own_rows = copied(rows);
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
        chosen.push_back(a.is_none() ? nullptr : &as<const Adapter&>(a, "an adapter"));
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

}  // namespace

void bind_step(nb::module_& m) {
  nb::class_<PyModel>(m, "Model").def("add_layer", &add_layer).def_prop_ro("layers", [](const PyModel& p) {
    return p.m.layers.size();
  });
  nb::class_<Adapter>(m, "Adapter").def_prop_ro("nbytes", &Adapter::bytes).def("set", &set_low_rank);
  nb::class_<PyRunner>(m, "Runner")
      .def(nb::init<Pool&, const std::string&, bool>(), nb::arg("pool"), nb::arg("isa"), nb::arg("exact"),
           nb::keep_alive<1, 2>())
      .def_prop_ro("isa", &PyRunner::name)
      .def("step", &PyRunner::step);
  m.def("make_adapter", &make_adapter, nb::rv_policy::take_ownership);
  m.def("make_model", &make_model, nb::rv_policy::take_ownership);
}
