// Whole models stepped by several threads: packed, of codes, of rows, with adapters.
#include <cmath>
#include <deque>
#include <utility>
#include <vector>

#include "engine/step.h"
#include "test/support.h"

namespace check {
namespace {

constexpr int64_t VOCABULARY = 131;

struct Tiny {  // a model of packed matrices with grouped heads
  Model m;
  std::deque<Packed> packed;
  std::vector<float> ones = std::vector<float>(64, 1.0f);

  explicit Tiny(int type) {
    m.hidden = 64;
    m.heads = 4;
    m.kv_heads = 2;
    m.width = 24;
    m.ffn = 96;
    m.vocab = VOCABULARY;
    const FileType& t = *file_type(type);
    auto make = [&](int64_t rows, int64_t cols) { return packed.emplace_back(pack(t, rows, cols)).m; };
    m.embed = m.head = make(VOCABULARY, 64);
    m.norm = ones.data();
    for (int i = 0; i < 2; ++i) {
      Layer l;
      l.norm1 = l.norm2 = ones.data();
      l.q = make(96, 64);
      l.k = make(48, 64);
      l.v = make(48, 64);
      l.o = make(64, 96);
      l.gate = make(96, 64);
      l.up = make(96, 64);
      l.down = make(64, 96);
      m.layers.push_back(l);
    }
  }
};

struct Coded {  // a model of codes or of rows, with biases, and with orders of columns where groups allow them
  Tiny tiny{2};
  std::deque<Given> given;
  std::deque<Dense> dense;
  std::vector<float> biases = std::vector<float>(128, 0.1f);

  explicit Coded(Format f) {
    auto make = [&](int64_t rows, int64_t cols, bool shuffled) {
      if (row_major(f)) return dense.emplace_back(rows, cols, f, 0.2f).m;
      Given& g = given.emplace_back(f, rows, cols,
                                    f == Format::G4 || f == Format::T4 ? 32
                                    : f == Format::T4H                 ? 16
                                                                       : 64,
                                    shuffled && f == Format::G4);
      for (float& scale : g.floats) scale = f == Format::R8 ? 0.001f : 0.05f;
      return tiny.packed.emplace_back(g.pack()).m;
    };
    Model& m = tiny.m;
    m.width = 32;
    m.ffn = 128;
    m.orders = 3;
    m.embed = m.head = make(VOCABULARY, 64, false);
    for (Layer& l : m.layers) {
      l.q = make(128, 64, true);
      l.k = make(64, 64, true);
      l.v = make(64, 64, false);
      l.o = make(64, 128, true);
      l.gate = make(128, 64, true);
      l.up = make(128, 64, true);
      l.down = make(64, 128, true);
      l.q.bias = l.k.bias = l.v.bias = l.o.bias = biases.data();
    }
  }
};

Adapter random_adapter(const Model& m, int64_t rank, Format f) {
  Adapter made(m);
  for (int64_t layer = 0; layer < made.layers(); ++layer)
    for (int part = 0; part < PARTS; ++part) {
      if ((layer + part) % 3 == rank % 3) continue;  // some linears stay without
      Part p = static_cast<Part>(part);
      made.set(layer, p, Dense(rank, made.in(p), f, 0.2f).m, Dense(made.out(p), rank, f, 0.2f).m, 0.5f);
    }
  return made;
}

// Logits of two sequences over four steps: a prompt beside a short one, one token each, a few beside one, one beside a
// few.
std::vector<float> run_model(const Kernels* k, const Tiny& tiny, int threads, KvType type, bool exact,
                             std::vector<const Adapter*> adapters = {}) {
  Pool pool(threads, {});
  Runner runner(k, &pool, exact);
  int64_t width = tiny.m.width;
  KvCache cache(type, 2, 2, width, 12);
  std::vector<int32_t> tables = {0, 1, 2, 3, 9, 8, 7, 6};
  std::vector<float> inv(width / 2), out;
  for (int i = 0; i < width / 2; ++i) inv[i] = std::pow(10000.0f, -i * 2.0f / width);
  std::vector<int32_t> past = {0, 0};
  for (auto [n0, n1] : {std::pair<int, int>{33, 5}, {1, 1}, {3, 1}, {1, 20}}) {
    std::vector<int32_t> ids(n0 + n1), positions(n0 + n1), starts = {0, n0, n0 + n1}, rows = {n0 - 1, n0 + n1 - 1};
    for (int i = 0; i < n0 + n1; ++i) {
      ids[i] = (i * 37 + n0) % VOCABULARY;
      positions[i] = i < n0 ? past[0] + i : past[1] + i - n0;
    }
    std::vector<float> logits(2 * VOCABULARY);
    Batch b;
    b.tokens = n0 + n1;
    b.sequences = 2;
    b.rows = 2;
    b.table_width = 4;
    b.ids = ids.data();
    b.positions = positions.data();
    b.starts = starts.data();
    b.past = past.data();
    b.tables = tables.data();
    b.out_rows = rows.data();
    b.inv_freq = inv.data();
    b.logits = logits.data();
    if (!adapters.empty()) b.adapters = adapters.data();
    if (!runner.step(tiny.m, cache, b, [] { return false; })) expect(false, "stopped", k->name, 0, 0, 0);
    out.insert(out.end(), logits.begin(), logits.end());
    past[0] += n0;
    past[1] += n1;
  }
  return out;
}

void check_packed(const Isas& isas) {
  for (int type : {2, 3, 8}) {
    Tiny tiny(type);
    for (KvType kv : {KvType::F32, KvType::BF16, KvType::I8}) {
      std::vector<float> want = run_model(kernels_scalar(), tiny, 1, kv, true);
      for (const Kernels* k : isas) {
        std::vector<float> one = run_model(k, tiny, 1, kv, true);
        double d = distance(one, want);
        expect(d < (kv == KvType::F32 ? 3e-6 : kv == KvType::BF16 ? 3e-3 : 2e-2), "model", k->name, type, 0, d);
        for (int threads : {2, 3})
          expect(run_model(k, tiny, threads, kv, true) == one, "threads", k->name, type, threads, 0);
        bool same = run_model(k, tiny, 2, kv, false) == run_model(k, tiny, 1, kv, false);
        expect(same, "fast threads", k->name, type, 2, 0);
      }
    }
  }
}

void check_adapters(const Isas& isas) {
  Tiny tiny(2);
  for (Format f : {Format::F32, Format::F16, Format::BF16}) {
    Adapter five = random_adapter(tiny.m, 5, f), sixteen = random_adapter(tiny.m, 16, f);
    int kind = static_cast<int>(f);
    std::vector<float> want = run_model(kernels_scalar(), tiny, 1, KvType::F32, true, {&five, &sixteen});
    for (const Kernels* k : isas) {
      std::vector<float> base = run_model(k, tiny, 2, KvType::F32, true);
      std::vector<float> one = run_model(k, tiny, 1, KvType::F32, true, {&five, &sixteen});
      double d = distance(one, want), change = distance(one, base);
      expect(d < 3e-6, "adapters", k->name, kind, 0, d);
      expect(change > 0.1, "adapters change nothing", k->name, kind, 0, change);
      bool same = run_model(k, tiny, 3, KvType::F32, true, {&five, &sixteen}) == one;
      expect(same, "adapter threads", k->name, kind, 3, 0);
      std::vector<float> mixed = run_model(k, tiny, 2, KvType::F32, false, {&five, nullptr});
      std::vector<float> none = run_model(k, tiny, 2, KvType::F32, false, {nullptr, nullptr});
      std::vector<float> both = run_model(k, tiny, 2, KvType::F32, false, {&five, &five});
      for (size_t i = 0; i < mixed.size(); ++i)
        if (mixed[i] != (i / VOCABULARY % 2 ? none : both)[i])
          return expect(false, "adapter rows", k->name, kind, i, 0);
    }
  }
}

void check_coded(const Isas& isas) {
  for (Format f : {Format::C4, Format::C4B, Format::G4, Format::R8, Format::T4, Format::T4H, Format::A4, Format::A8,
                   Format::F16, Format::BF16}) {
    Coded model(f);
    int kind = static_cast<int>(f);
    std::vector<float> want = run_model(kernels_scalar(), model.tiny, 1, KvType::F32, true);
    for (const Kernels* k : isas) {
      std::vector<float> one = run_model(k, model.tiny, 1, KvType::F32, true);
      double d = distance(one, want);
      expect(d < 1e-5, "model of codes", k->name, kind, 0, d);
      expect(run_model(k, model.tiny, 3, KvType::F32, true) == one, "threads", k->name, kind, 3, 0);
      std::vector<float> fast = run_model(k, model.tiny, 1, KvType::F32, false);
      expect(run_model(k, model.tiny, 2, KvType::F32, false) == fast, "fast threads", k->name, kind, 2, 0);
    }
  }
}

void check_stop() {
  Tiny tiny(2);
  Pool pool(2, {});
  Runner runner(kernels_scalar(), &pool, false);
  KvCache cache(KvType::F32, 2, 2, 24, 1);
  int32_t id = 1, position = 0, starts[2] = {0, 1}, past = 0, table = 0;
  float inv[12] = {}, logits[VOCABULARY];
  Batch b;
  b.tokens = b.sequences = b.rows = b.table_width = 1;
  b.ids = &id;
  b.positions = &position;
  b.starts = starts;
  b.past = &past;
  b.tables = &table;
  b.out_rows = &position;
  b.inv_freq = inv;
  b.logits = logits;
  expect(!runner.step(tiny.m, cache, b, [] { return true; }), "stop", "", 0, 0, 0);
}

}  // namespace

void check_models(const Isas& isas) {
  rng.seed(11);
  check_packed(isas);
  check_adapters(isas);
  check_coded(isas);
  check_stop();
}

}  // namespace check
