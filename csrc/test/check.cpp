// The kernel tests without Python, for sanitizers and emulators: every instruction set against the scalar one,
// odd shapes in buffers of exactly the right size, and a whole model stepped by several threads.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <string_view>
#include <thread>
#include <vector>

#include "kernels/kernels.h"
#include "engine/pack.h"
#include "engine/pool.h"
#include "engine/fast_sampling.h"
#include "engine/step.h"
#include "train/team.h"

using namespace llama2;

namespace {

std::mt19937 rng(11);
int failures = 0;
long long checked = 0;

float normal() { return std::normal_distribution<float>(0, 1)(rng); }

void expect(bool ok, const char* what, const char* isa, int64_t a, int64_t b, double error) {
  ++checked;
  if (ok) return;
  ++failures;
  std::printf("FAILED %s %s %lld %lld: %g\n", what, isa, (long long)a, (long long)b, error);
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double d = 0, n = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    d += (a[i] - b[i]) * double(a[i] - b[i]);
    n += b[i] * double(b[i]);
  }
  return std::sqrt(d / (n + 1e-30));
}

std::vector<uint8_t> random_blocks(const FileType& t, int64_t rows, int64_t cols) {
  std::vector<uint8_t> raw(rows * (cols / t.columns) * t.bytes);
  for (auto& b : raw) b = static_cast<uint8_t>(rng());
  for (size_t at = 0; at < raw.size(); at += t.bytes) {
    auto half = [&](int offset) {  // a float16 of about 0.01
      raw[at + offset] = static_cast<uint8_t>(rng());
      raw[at + offset + 1] = 0x21;
    };
    half(t.id == 14 ? 208 : 0);
    if (t.id == 3 || t.id == 7 || t.id == 12 || t.id == 13) half(2);
  }
  return raw;
}

struct Packed {
  Matrix m;
  std::vector<uint8_t> memory;
};

Packed pack(const FileType& t, int64_t rows, int64_t cols) {
  Packed p;
  std::vector<uint8_t> raw = random_blocks(t, rows, cols);
  p.m.rows = rows;
  p.m.cols = cols;
  p.m.format = t.format;
  p.m.stride = tile_bytes(t.format, cols);
  p.memory.resize(p.m.tiles() * p.m.stride);
  p.m.data = p.memory.data();
  for (int64_t i = 0; i < p.m.tiles(); ++i) pack_tile(t, raw.data(), rows, cols, nullptr, i, p.memory.data() + i * p.m.stride);
  return p;
}

std::vector<float> product(const Kernels* k, const Matrix& w, const std::vector<float>& x, int64_t m, bool exact) {
  std::vector<uint8_t> memory(acts_bytes(m, w.cols));
  std::vector<float> out(m * w.rows);
  Acts a = lay_out(memory.data(), m, w.cols);
  a.order = w.order;
  k->prepare(x.data(), w.cols, 0, m, form_of(w.format, exact), a);
  Job job{&w, nullptr, out.data(), w.rows, Epilogue::STORE};
  k->matmul(job, a, 0, w.tiles(), exact);
  return out;
}

void check_products(const Kernels* k) {
  for (int id : {2, 3, 6, 7, 8, 12, 13, 14}) {
    const FileType& t = *file_type(id);
    for (int64_t rows : {5, 16, 50})
      for (int64_t cols : {int64_t{t.columns}, int64_t{t.columns} * 3}) {
        Packed w = pack(t, rows, cols);
        for (int64_t m : {1, 2, 4, 7, 17}) {
          std::vector<float> x(m * cols);
          for (auto& v : x) v = normal();
          for (bool exact : {false, true}) {
            double d = distance(product(k, w.m, x, m, exact), product(kernels_scalar(), w.m, x, m, exact));
            expect(d < 1e-6, exact ? "exact product" : "product", k->name, id, m, d);
          }
        }
      }
  }
}

struct Given {  // random codes with their scales, in buffers of exactly the right size
  CodeSource source;
  std::vector<uint8_t> codes, zeros;
  std::vector<uint16_t> halves;
  std::vector<float> floats;
  Codebook forms;
  std::vector<int32_t> order;

  Given(Format f, int64_t rows, int64_t cols, int64_t group, bool shuffled) {
    bool codebook = f == Format::C4 || f == Format::C4B, groups = f == Format::G4 || f == Format::G8;
    int64_t count = groups ? rows * up(cols, group) : codebook ? up(rows * cols, group) : rows;
    codes.resize(codebook ? rows * cols / 2 : rows * cols);
    for (auto& c : codes) c = static_cast<uint8_t>(f == Format::G4 ? rng() & 15 : rng());
    zeros.resize(groups ? count : 0);
    for (auto& z : zeros) z = static_cast<uint8_t>(f == Format::G4 ? rng() % 17 : rng());
    halves.resize(groups ? count : 0);
    for (auto& h : halves) h = static_cast<uint16_t>(0x2100 | (rng() & 255));
    floats.resize(groups ? 0 : count);
    for (auto& v : floats) v = 0.01f + 0.01f * static_cast<float>(rng() % 100);
    float table[16];
    for (auto& v : table) v = normal();
    forms = codebook_of(table);
    order.resize(shuffled ? cols : 0);
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    std::shuffle(order.begin(), order.end(), rng);
    source.format = f;
    source.rows = rows;
    source.cols = cols;
    source.group = group;
    source.codes = codes.data();
    source.pairs = codebook;
    source.scales = groups ? static_cast<const void*>(halves.data()) : floats.data();
    source.zeros = zeros.data();
    source.order = shuffled ? order.data() : nullptr;
  }

  Packed pack() const {
    Packed p;
    Format f = source.format;
    p.m.rows = source.rows;
    p.m.cols = source.cols;
    p.m.format = f;
    p.m.stride = tile_bytes(f, source.cols, source.group);
    p.m.codebook = &forms;
    p.m.order = source.order;
    if (f == Format::G4 || f == Format::G8) p.m.group = source.group;
    p.memory.resize(p.m.tiles() * p.m.stride);
    p.m.data = p.memory.data();
    for (int64_t i = 0; i < p.m.tiles(); ++i) pack_codes_tile(source, i, p.memory.data() + i * p.m.stride);
    return p;
  }
};

void check_codes(const Kernels* k) {
  struct Shape { int64_t cols, group; bool shuffled; };
  for (Format f : {Format::C4, Format::C4B, Format::G4, Format::G8, Format::R8}) {
    bool codebook = f == Format::C4 || f == Format::C4B;
    Shape codebooks[] = {{64, 64, false}, {192, 128, false}, {320, 64, false}};
    Shape others[] = {{64, 32, false}, {200, 64, true}, {7, 32, false}, {384, 128, true}};
    for (int64_t rows : {5, 16, 50})
      for (int i = 0; i < (codebook ? 3 : 4); ++i) {
        Shape s = codebook ? codebooks[i] : others[i];
        Given given(f, rows, s.cols, s.group, s.shuffled && f != Format::R8);
        Packed w = given.pack();
        std::vector<float> mine(s.cols), plain(s.cols);
        for (int64_t r : {int64_t{0}, rows - 1}) {
          k->dequantize_row(w.m, r, mine.data());
          kernels_scalar()->dequantize_row(w.m, r, plain.data());
          expect(mine == plain, "row", k->name, static_cast<int>(f), s.cols, 0);
        }
        for (int64_t m : {1, 2, 4, 7, 17}) {
          std::vector<float> x(m * s.cols);
          for (auto& v : x) v = normal();
          for (bool exact : {false, true}) {
            double d = distance(product(k, w.m, x, m, exact), product(kernels_scalar(), w.m, x, m, exact));
            expect(d < 2e-6, exact ? "exact codes" : "codes", k->name, static_cast<int>(f), m, d);
          }
        }
      }
  }
}

void check_rows(const Kernels* k) {
  for (Format f : {Format::F32, Format::F16, Format::BF16})
    for (int64_t rows : {3, 16, 37})
      for (int64_t cols : {1, 31, 64, 97}) {
        int size = f == Format::F32 ? 4 : 2;
        std::vector<uint8_t> memory(rows * cols * size);
        for (int64_t i = 0; i < rows * cols; ++i) {
          float v = normal();
          uint32_t bits;
          std::memcpy(&bits, &v, 4);
          uint16_t half = f == Format::BF16 ? static_cast<uint16_t>(bits >> 16) : static_cast<uint16_t>(0x3000 | (bits & 0x8fff));
          if (f == Format::F32) std::memcpy(&memory[i * 4], &v, 4);
          else std::memcpy(&memory[i * 2], &half, 2);
        }
        Matrix w;
        w.data = memory.data();
        w.rows = rows;
        w.cols = cols;
        w.stride = cols * size;
        w.format = f;
        for (int64_t m : {1, 3, 9}) {
          std::vector<float> x(m * cols);
          for (auto& v : x) v = normal();
          for (bool exact : {false, true}) {
            double d = distance(product(k, w, x, m, exact), product(kernels_scalar(), w, x, m, exact));
            expect(d < 2e-6, "rows", k->name, static_cast<int>(f), cols, d);
          }
        }
      }
}

struct Tiny {  // a model of packed and float matrices with grouped heads
  Model m;
  std::vector<Packed> packed;
  std::vector<float> ones = std::vector<float>(64, 1.0f);

  explicit Tiny(int type) {
    m.hidden = 64; m.heads = 4; m.kv_heads = 2; m.width = 24; m.ffn = 96; m.vocab = 131;
    packed.reserve(16);
    const FileType& t = *file_type(type);
    auto make = [&](int64_t rows, int64_t cols) { packed.push_back(pack(t, rows, cols)); return packed.back().m; };
    m.embed = m.head = make(131, 64);
    m.norm = ones.data();
    for (int i = 0; i < 2; ++i) {
      Layer l;
      l.norm1 = l.norm2 = ones.data();
      l.q = make(96, 64); l.k = make(48, 64); l.v = make(48, 64); l.o = make(64, 96);
      l.gate = make(96, 64); l.up = make(96, 64); l.down = make(64, 96);
      m.layers.push_back(l);
    }
  }
};

struct Low {  // a random A or B in a buffer of exactly its size
  Matrix m;
  std::vector<uint8_t> memory;
  Low(int64_t rows, int64_t cols, Format f) {
    int64_t size = f == Format::F32 ? 4 : 2;
    memory.resize(rows * cols * size);
    for (int64_t i = 0; i < rows * cols; ++i) {
      float v = 0.2f * normal();
      uint32_t bits;
      std::memcpy(&bits, &v, 4);
      uint16_t half = static_cast<uint16_t>(f == Format::BF16 ? bits >> 16 : 0x2000 | (bits & 0x8fff));
      std::memcpy(&memory[i * size], f == Format::F32 ? static_cast<void*>(&v) : &half, size);
    }
    m.data = memory.data();
    m.rows = rows;
    m.cols = cols;
    m.stride = cols * size;
    m.format = f;
  }
};

struct Coded {  // a model of codes or of rows, with biases, and with orders of columns where groups allow them
  Tiny tiny{2};
  std::deque<Given> given;
  std::deque<Low> rows;
  std::vector<float> biases = std::vector<float>(128, 0.1f);

  explicit Coded(Format f) {
    auto make = [&](int64_t r, int64_t cols, bool shuffled) {
      if (row_major(f)) return rows.emplace_back(r, cols, f).m;
      Given& g = given.emplace_back(f, r, cols, f == Format::G4 ? 32 : 64, shuffled && f == Format::G4);
      for (float& scale : g.floats) scale = f == Format::R8 ? 0.001f : 0.05f;
      tiny.packed.push_back(g.pack());
      return tiny.packed.back().m;
    };
    Model& m = tiny.m;
    tiny.packed.reserve(64);
    m.width = 32;
    m.ffn = 128;
    m.orders = 3;
    m.embed = m.head = make(131, 64, false);
    for (Layer& l : m.layers) {
      l.q = make(128, 64, true); l.k = make(64, 64, true); l.v = make(64, 64, false); l.o = make(64, 128, true);
      l.gate = make(128, 64, true); l.up = make(128, 64, true); l.down = make(64, 128, true);
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
      made.set(layer, p, Low(rank, made.in(p), f).m, Low(made.out(p), rank, f).m, 0.5f);
    }
  return made;
}

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
      ids[i] = (i * 37 + n0) % 131;
      positions[i] = i < n0 ? past[0] + i : past[1] + i - n0;
    }
    std::vector<float> logits(2 * 131);
    Batch b;
    b.tokens = n0 + n1; b.sequences = 2; b.rows = 2; b.table_width = 4;
    b.ids = ids.data(); b.positions = positions.data(); b.starts = starts.data(); b.past = past.data();
    b.tables = tables.data(); b.out_rows = rows.data(); b.inv_freq = inv.data(); b.logits = logits.data();
    if (!adapters.empty()) b.adapters = adapters.data();
    if (!runner.step(tiny.m, cache, b, [] { return false; })) expect(false, "stopped", k->name, 0, 0, 0);
    out.insert(out.end(), logits.begin(), logits.end());
    past[0] += n0;
    past[1] += n1;
  }
  return out;
}

void check_model(const Kernels* k) {
  for (int type : {2, 3, 8}) {
    Tiny tiny(type);
    for (KvType kv : {KvType::F32, KvType::BF16, KvType::I8}) {
      std::vector<float> want = run_model(kernels_scalar(), tiny, 1, kv, true);
      std::vector<float> one = run_model(k, tiny, 1, kv, true);
      double d = distance(one, want);
      expect(d < (kv == KvType::F32 ? 3e-6 : kv == KvType::BF16 ? 3e-3 : 2e-2), "model", k->name, type, 0, d);
      for (int threads : {2, 3}) expect(run_model(k, tiny, threads, kv, true) == one, "threads", k->name, type, threads, 0);
      expect(run_model(k, tiny, 2, kv, false) == run_model(k, tiny, 1, kv, false), "fast threads", k->name, type, 2, 0);
    }
  }
}

void check_adapters(const Kernels* k) {
  Tiny tiny(2);
  for (Format f : {Format::F32, Format::F16, Format::BF16}) {
    Adapter five = random_adapter(tiny.m, 5, f), sixteen = random_adapter(tiny.m, 16, f);
    std::vector<float> base = run_model(k, tiny, 2, KvType::F32, true);
    std::vector<float> want = run_model(kernels_scalar(), tiny, 1, KvType::F32, true, {&five, &sixteen});
    std::vector<float> one = run_model(k, tiny, 1, KvType::F32, true, {&five, &sixteen});
    double d = distance(one, want), change = distance(one, base);
    expect(d < 3e-6, "adapters", k->name, static_cast<int>(f), 0, d);
    expect(change > 0.1, "adapters change nothing", k->name, static_cast<int>(f), 0, change);
    expect(run_model(k, tiny, 3, KvType::F32, true, {&five, &sixteen}) == one, "adapter threads", k->name, static_cast<int>(f), 3, 0);
    std::vector<float> mixed = run_model(k, tiny, 2, KvType::F32, false, {&five, nullptr});
    std::vector<float> none = run_model(k, tiny, 2, KvType::F32, false, {nullptr, nullptr});
    std::vector<float> both = run_model(k, tiny, 2, KvType::F32, false, {&five, &five});
    for (size_t i = 0; i < mixed.size(); ++i)
      if (mixed[i] != (i / 131 % 2 ? none : both)[i]) return expect(false, "adapter rows", k->name, static_cast<int>(f), i, 0);
  }
}

void check_models_of_codes(const Kernels* k) {
  for (Format f : {Format::C4, Format::C4B, Format::G4, Format::R8, Format::F16, Format::BF16}) {
    Coded model(f);
    std::vector<float> want = run_model(kernels_scalar(), model.tiny, 1, KvType::F32, true);
    std::vector<float> one = run_model(k, model.tiny, 1, KvType::F32, true);
    double d = distance(one, want);
    expect(d < 1e-5, "model of codes", k->name, static_cast<int>(f), 0, d);
    expect(run_model(k, model.tiny, 3, KvType::F32, true) == one, "threads", k->name, static_cast<int>(f), 3, 0);
    expect(run_model(k, model.tiny, 2, KvType::F32, false) == run_model(k, model.tiny, 1, KvType::F32, false), "fast threads", k->name, static_cast<int>(f), 2, 0);
  }
}

void check_stop() {
  Tiny tiny(2);
  Pool pool(2, {});
  Runner runner(kernels_scalar(), &pool, false);
  KvCache cache(KvType::F32, 2, 2, 24, 1);
  int32_t id = 1, position = 0, starts[2] = {0, 1}, past = 0, table = 0;
  float inv[12] = {}, logits[131];
  Batch b;
  b.tokens = b.sequences = b.rows = b.table_width = 1;
  b.ids = &id; b.positions = &position; b.starts = starts; b.past = &past; b.tables = &table; b.out_rows = &position;
  b.inv_freq = inv; b.logits = logits;
  expect(!runner.step(tiny.m, cache, b, [] { return true; }), "stop", "", 0, 0, 0);
}

std::vector<float> values(int64_t n) {
  std::vector<float> v(n);
  for (float& x : v) x = normal();
  return v;
}

// -- the short list --------------------------------------------------------------------------------------------

// What the definition leaves: temperature, the top_k best, then the least likely go while their sum is at most 1 - top_p.
std::vector<int32_t> wanted_list(const std::vector<float>& scores, const Shortlist& how, std::vector<double>& p) {
  std::vector<int32_t> ids(scores.size());
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  std::sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  ids.resize(how.top_k);
  double top = scores[ids[0]];
  auto weight = [&](int32_t id) { return std::exp((scores[id] - top) / how.temperature); };
  auto sum = [&] { double all = 0; for (int32_t id : ids) all += weight(id); return all; };
  double all = sum(), gone = 0;
  while (static_cast<int64_t>(ids.size()) > how.keep && (gone += weight(ids.back()) / all) <= 1 - how.top_p) ids.pop_back();
  all = sum();
  std::sort(ids.begin(), ids.end());
  p.clear();
  for (int32_t id : ids) p.push_back(weight(id) / all);
  return ids;
}

// Blocks to numbers, in pieces of rows: what the tiles of the same blocks stand for, and that rounded to bfloat16.
void check_unpack() {
  const Kernels* k = kernels_scalar();
  for (int id : {2, 3, 6, 7, 8, 12, 13, 14}) {
    const FileType& t = *file_type(id);
    for (int64_t cols : {int64_t{t.columns}, int64_t{t.columns} * 3}) {
      constexpr int64_t rows = 19;
      std::vector<uint8_t> raw = random_blocks(t, rows, cols), memory(2 * tile_bytes(t.format, cols));
      Matrix m;
      m.rows = rows, m.cols = cols, m.format = t.format, m.stride = tile_bytes(t.format, cols), m.data = memory.data();
      for (int64_t i = 0; i < 2; ++i) pack_tile(t, raw.data(), rows, cols, nullptr, i, memory.data() + i * m.stride);
      std::vector<float> want(rows * cols), found(rows * cols), wide(rows * cols);
      for (int64_t r = 0; r < rows; ++r) k->dequantize_row(m, r, want.data() + r * cols);
      std::vector<uint16_t> narrow(rows * cols);
      for (int64_t first : {0, 7}) {
        unpack_rows(id, raw.data(), cols, false, first, first ? rows : 7, found.data());
        unpack_rows(id, raw.data(), cols, true, first, first ? rows : 7, narrow.data());
      }
      for (size_t i = 0; i < narrow.size(); ++i) {
        uint32_t bits = static_cast<uint32_t>(narrow[i]) << 16;
        std::memcpy(&wide[i], &bits, 4);
      }
      expect(distance(found, want) < 1e-6, "unpack_rows", "", id, cols, distance(found, want));
      expect(distance(wide, found) < 3e-3, "unpack_rows to bfloat16", "", id, cols, distance(wide, found));
    }
  }
  for (int id : {10, 11}) {  // types without tiles: that they stay within their buffers
    std::vector<uint8_t> raw(3 * unpacked_row_bytes(id, 512));
    for (auto& b : raw) b = static_cast<uint8_t>(rng());
    std::vector<float> out(3 * 512);
    unpack_rows(id, raw.data(), 512, false, 0, 3, out.data());
  }
  expect(!unpacked_row_bytes(99, 256) && !unpacked_row_bytes(12, 255), "unpacked_row_bytes", "", 0, 0, 0);
}

// Numbers of a generator at some places: the standard library has the same Mersenne twister.
void check_exponentials() {
  std::mt19937 drawn(5);
  std::vector<uint8_t> state(generator_bytes());
  auto put = [&](size_t at, uint64_t value, size_t size) { std::memcpy(state.data() + at, &value, size); };
  put(8, 1, 4);  // the next word begins a turn
  uint32_t word = 5;
  for (uint32_t i = 0; i < 624; ++i, word = 1812433253u * (word ^ word >> 30) + i) put(24 + 8 * i, word, 8);
  for (int64_t total : {1, 2, 311, 312, 313, 1, 5000, 7}) {
    std::vector<float> want, found;
    std::vector<int64_t> places;
    for (int64_t i = 0; i < total; ++i) {
      uint64_t high = drawn(), low = drawn();
      double u = static_cast<double>((high << 32 | low) & ((uint64_t{1} << 53) - 1)) / 9007199254740992.0;
      if (i % 5 && i + 1 < total) continue;
      places.push_back(i);
      want.push_back(static_cast<float>(-std::log1p(-u)));
    }
    found.resize(places.size());
    bool ok = exponentials(state.data(), total, places.data(), static_cast<int64_t>(places.size()), found.data());
    expect(ok && found == want, "exponentials", "", total, 0, 0);
  }
  std::vector<uint8_t> none(generator_bytes(), 255);
  int64_t place = 0;
  float value;
  expect(!exponentials(none.data(), 1, &place, 1, &value), "exponentials of no state", "", 0, 0, 0);
}

// Every number once, and the first ones the same however many are asked for.
void check_permutation() {
  for (int64_t size : {1, 2, 5, 1000}) {
    std::vector<int64_t> all(size), some(size / 2);
    permuted(uint64_t{1} << 40 | 9, size, size, all.data());
    permuted(9, size, size / 2, some.data());  // the low 32 bits of a seed count
    expect(std::equal(some.begin(), some.end(), all.begin()), "permutation's beginning", "", size, 0, 0);
    std::sort(all.begin(), all.end());
    for (int64_t i = 0; i < size; ++i) expect(all[i] == i, "permutation", "", size, i, 0);
  }
}

void check_shortlist() {
  std::vector<int32_t> ids;
  std::vector<double> p, want_p;
  int answered = 0, asked = 0;
  for (int64_t size : {1, 7, 63, 64, 65, 961, 999, 1000, 4096})
    for (int64_t top_k : {1, 2, 12, 50})
      for (double top_p : {1.0, 0.9, 0.3})
        for (int64_t keep : {1, 3}) {
          Shortlist how{0.7f, top_k, top_p, keep};
          auto scores = values(size);
          bool sure = shortlist(scores.data(), size, how, ids, p);
          if (top_k > up(size, 64)) {  // fewer blocks than tokens
            expect(!sure && ids.empty() && p.empty(), "shortlist of few blocks", "", size, top_k, 0);
            continue;
          }
          ++asked;
          if (!sure) continue;
          ++answered;
          expect(ids == wanted_list(scores, how, want_p), "shortlist", "", size, top_k, top_p);
          double worst = 1e-6 * (p.size() != want_p.size());
          for (size_t i = 0; i < p.size() && i < want_p.size(); ++i) worst = std::fmax(worst, std::fabs(p[i] - want_p[i]));
          expect(worst < 1e-6, "shortlist's probabilities", "", size, top_k, worst);
        }
  expect(answered * 10 >= asked * 9, "shortlist answers", "", asked, answered, 0);
  auto refused = [&](std::vector<float> scores, Shortlist how, const char* what) {
    expect(!shortlist(scores.data(), static_cast<int64_t>(scores.size()), how, ids, p) && ids.empty() && p.empty(), what, "", 0, 0, 0);
  };
  auto scores = values(1000), other = scores;
  other[500] = NAN;
  refused(other, {0.7f, 12, 0.9, 1}, "shortlist of NaN");
  other[500] = INFINITY;
  refused(other, {0.7f, 12, 0.9, 1}, "shortlist of infinity");
  refused(scores, {2e6f, 12, 1, 1}, "shortlist too hot");
  other.assign(1000, -INFINITY);
  other[3] = 1;
  refused(other, {0.7f, 2, 1, 1}, "shortlist of too little");
  refused(std::vector<float>(1000, 1.0f), {0.7f, 12, 1, 1}, "shortlist of ties");
  refused(std::vector<float>(20 * 64, 1.0f), {0.7f, 12, 1, 1}, "shortlist of more ties");
  std::vector<float> equal(192, 1.0f);
  expect(shortlist(equal.data(), 192, {0.7f, 2, 1, 1}, ids, p) && ids.size() == 192 && std::fabs(p[191] * 192 - 1) < 1e-12, "shortlist of few ties", "", 0, 0, 0);
}

// -- training --------------------------------------------------------------------------------------------------

struct Reals {  // float32 or bfloat16 values in a buffer of exactly their size
  Real type;
  std::vector<float> wide;
  std::vector<uint16_t> half;

  Reals(Real t, int64_t n, bool zeros = false) : type(t), wide(t == Real::F32 ? n : 0), half(t == Real::F32 ? 0 : n) {
    if (zeros) return;
    for (float& v : wide) v = normal();
    for (uint16_t& v : half) {
      float x = normal();
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      v = static_cast<uint16_t>(bits >> 16);
    }
  }
  void* data() { return type == Real::F32 ? static_cast<void*>(wide.data()) : half.data(); }
  std::vector<float> floats() const {
    std::vector<float> v(wide);
    for (uint16_t h : half) {
      uint32_t bits = uint32_t{h} << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      v.push_back(x);
    }
    return v;
  }
};

double bound(Real t) { return t == Real::F32 ? 1e-5 : 4e-3; }  // bfloat16: two roundings that fall apart

void alike(const Reals& a, const Reals& b, const char* what, const char* isa, int64_t i, int64_t j) {
  double d = distance(a.floats(), b.floats());
  expect(d < bound(a.type), what, isa, i, j, d);
}

// work(begin, end, thread) for pieces of [0, n), by each thread of a team one
void shared(Pool& pool, int64_t n, int64_t step, const std::function<void(int64_t, int64_t, int)>& work) {
  run_team(pool, [&](int thread, int threads) {
    int64_t blocks = (n + step - 1) / step, a = blocks * thread / threads * step, b = std::min(n, blocks * (thread + 1) / threads * step);
    if (a < b) work(a, b, thread);
  });
}

void check_texts(const Kernels* k, Real t, Pool& pool) {
  const TrainKernels* both[] = {k->train, find_kernels("scalar")->train};
  for (int64_t width : {6, 24, 32, 64})  // heads that end inside a register, and whole ones
    for (int64_t length : {1, 17, 48, 49, 70, 131})
      for (int64_t kv : {1, 4}) {
        int64_t heads = 4, n = length + 3;
        Reals q(t, n * heads * width), key(t, n * kv * width), v(t, n * kv * width), grad(t, n * heads * width);
        auto cos = values(n * width), sin = values(n * width);
        Texts texts{q.data(), key.data(), v.data(), cos.data(), sin.data(), heads, kv, width, 0.2f};
        std::vector<Reals> found[2];
        std::vector<float> lse[2];
        for (int i = 0; i < 2; ++i) {
          auto& f = found[i];
          for (int j = 0; j < 4; ++j) f.emplace_back(t, n * (j < 2 ? heads : kv) * width, true);
          lse[i].resize(heads * n);
          TextsGrad g{f[0].data(), grad.data(), lse[i].data(), n, f[1].data(), f[2].data(), f[3].data()};
          for (bool back : {false, true})
            shared(pool, kv, 1, [&](int64_t a, int64_t b, int) {
              std::vector<float> scratch(texts_scratch(length, width), NAN);  // what is not cleared shows
              for (int64_t h = a; h < b; ++h)
                if (back) both[i]->texts_grad(t, texts, g, 2, 2 + length, h, scratch.data());
                else both[i]->texts(t, texts, {f[0].data(), lse[i].data(), n}, 2, 2 + length, h, scratch.data());
            });
        }
        double d = distance(lse[0], lse[1]);
        double most = t == Real::BF16 && k->train->product.products ? 2e-2 : bound(t);  // factors rounded to bfloat16
        expect(d < most, "texts lse", k->name, width, length, d);
        for (int j = 0; j < 4; ++j)  // of one token the gradients of q and k are 0 but for rounding
          if (length > 1 || j == 0 || j == 3) {
            d = distance(found[0][j].floats(), found[1][j].floats());
            expect(d < most, "texts", k->name, width, 10 * length + j, d);
          }
      }
}

void check_rows_of_training(const Kernels* k, Real t, Pool& pool) {
  const TrainKernels* both[] = {k->train, find_kernels("scalar")->train};
  for (int64_t width : {16, 48}) {
    int64_t rows = 5, n = rows * width;
    Reals x(t, n), w(t, width), g(t, n), r(t, n), up(t, n);
    std::vector<Reals> found[2];
    std::vector<float> sums[2];
    for (int i = 0; i < 2; ++i) {
      const TrainKernels& o = *both[i];
      auto& f = found[i];
      for (int j = 0; j < 8; ++j) f.emplace_back(t, n, true);
      f.push_back(g);  // the gradient itself, overwritten
      Norm norm{x.data(), w.data(), width, 1e-5f};
      std::vector<std::vector<float>> each(64, std::vector<float>(width));
      shared(pool, rows, 1, [&](int64_t a, int64_t b, int thread) {
        o.norm(t, norm, a, b, f[0].data());
        o.norm_grad(t, norm, {g.data(), r.data(), f[1].data(), each[thread].data()}, a, b);
        o.norm_grad(t, norm, {g.data(), nullptr, f[2].data(), nullptr}, a, b);
      });
      sums[i].resize(width);
      for (auto& one : each)
        for (int64_t c = 0; c < width; ++c) sums[i][c] += one[c];
      shared(pool, n, 16, [&](int64_t a, int64_t b, int) {
        o.swiglu(t, x.data(), up.data(), a, b, f[3].data());
        o.swiglu_grad(t, x.data(), up.data(), g.data(), a, b, f[4].data(), f[5].data(), f[6].data());
        o.swiglu_grad(t, x.data(), up.data(), f[8].data(), a, b, f[8].data(), f[7].data(), f[6].data());
      });
      expect(f[8].floats() == f[4].floats() && f[7].floats() == f[5].floats(), "gradients in one buffer", k->name, width, i, 0);
    }
    for (int j = 0; j < 9; ++j) alike(found[0][j], found[1][j], "norm, gated product", k->name, width, j);
    double d = distance(sums[0], sums[1]);
    expect(d < 1e-5, "norm's weight", k->name, width, 0, d);
    std::vector<float> a = x.floats(), u = up.floats(), y(n), scaled(n), weight = w.floats();
    for (int64_t i = 0; i < n; ++i) {
      y[i] = a[i] / (1 + std::exp(-double{a[i]})) * u[i];
      double square = 0;
      for (int64_t c = 0; c < width; ++c) square += double{a[i / width * width + c]} * a[i / width * width + c];
      scaled[i] = static_cast<float>(a[i] / std::sqrt(square / width + 1e-5) * weight[i % width]);
    }
    expect(distance(found[0][3].floats(), y) < bound(t), "gated product in float64", k->name, width, 0, distance(found[0][3].floats(), y));
    expect(distance(found[0][0].floats(), scaled) < bound(t), "norm in float64", k->name, width, 0, distance(found[0][0].floats(), scaled));
  }
}

void check_log_prob(const Kernels* k, Real t) {
  for (int64_t vocabulary : {1, 5, 15, 16, 17, 31, 32, 101})
    for (int64_t target : {int64_t{0}, vocabulary / 2, vocabulary - 1}) {
      Reals logits(t, vocabulary), kept = logits;
      std::vector<float> x = logits.floats(), want(vocabulary), scratch(vocabulary / 16 * 16);
      double sum = 0;
      float factor = -1.5f;
      for (float v : x) sum += std::exp(double{v});
      for (int64_t i = 0; i < vocabulary; ++i) want[i] = static_cast<float>(factor * ((i == target) - std::exp(double{x[i]}) / sum));
      double right = x[target] - std::log(sum);
      double d = std::fabs(right - k->train->log_prob(t, logits.data(), vocabulary, target, nullptr, nullptr));
      expect(d < 1e-5 && logits.floats() == kept.floats(), "log_prob", k->name, vocabulary, target, d);
      d = std::fabs(right - k->train->log_prob(t, logits.data(), vocabulary, target, &factor, scratch.data()));
      expect(d < 1e-5, "log_prob with a gradient", k->name, vocabulary, target, d);
      d = vocabulary > 1 ? distance(logits.floats(), want) : std::fabs(logits.floats()[0]);
      expect(d < bound(t), "log_prob's gradient", k->name, vocabulary, target, d);
    }
}

void check_unpack4(const Kernels* k, Real t, Pool& pool) {
  for (int64_t block : {32, 64, 4096})
    for (int64_t size : {1, 2, 31, 32, 33, 63, 64, 65, 200, 1000}) {
      std::vector<uint8_t> codes((size + 1) / 2);
      for (auto& c : codes) c = static_cast<uint8_t>(rng());
      auto scales = values(up(size, block)), table = values(16);
      if (scales.size() > 2) scales[0] = 0, scales[1] = 1e-38f, scales[2] = -scales[2];
      Reals a(t, size, true), b(t, size, true);
      shared(pool, size, block, [&](int64_t begin, int64_t end, int) { k->train->unpack4(t, codes.data(), scales.data(), table.data(), block, begin, end, a.data()); });
      find_kernels("scalar")->train->unpack4(t, codes.data(), scales.data(), table.data(), block, 0, size, b.data());
      expect(a.floats() == b.floats(), "unpack4", k->name, size, block, distance(a.floats(), b.floats()));
      std::vector<float> want(size);
      for (int64_t i = 0; i < size; ++i) want[i] = table[i & 1 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * scales[i / block];
      double d = distance(a.floats(), want);
      expect(t == Real::F32 ? a.floats() == want : d < bound(t), "unpack4 by its definition", k->name, size, block, d);
    }
}

void check_drop(const Kernels* k, Real t, Pool& pool) {
  for (int64_t size : {1, 31, 32, 33, 1000})
    for (uint32_t share : {0u, 6554u, 65535u})
      for (bool more : {false, true}) {
        Reals x(t, size), added(t, size), a(t, size, true), b(t, size, true);
        Dropout d{0x123456789abcdefull + share, share};
        shared(pool, size, 32, [&](int64_t begin, int64_t end, int) { k->train->drop(t, x.data(), d, more ? added.data() : nullptr, begin, end, a.data()); });
        find_kernels("scalar")->train->drop(t, x.data(), d, more ? added.data() : nullptr, 0, size, b.data());
        double apart = distance(a.floats(), b.floats());
        expect(apart < bound(t), "drop", k->name, size, share, apart);
        int64_t zeros = 0;
        auto found = a.floats();
        for (int64_t i = 0; i < size; ++i) zeros += found[i] == 0;
        if (size == 1000 && !more) expect(share == 0 ? zeros == 0 : share == 65535u ? zeros > 990 : zeros > 60 && zeros < 150, "share dropped", k->name, share, more, zeros);
      }
}

float to_bf16_and_back(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Sums of products against their definition, in every layout, with depths of several panels.
void check_products(const Kernels* k, Pool& pool) {
  if (!k->train->product.products) return;
  struct Shape { int64_t rows, columns; std::vector<int64_t> depths; };
  for (const Shape& shape : {Shape{1, 1, {1}}, Shape{7, 5, {3}}, Shape{13, 33, {34}}, Shape{19, 100, {65, 6}}, Shape{31, 64, {16, 32, 1}}, Shape{210, 1100, {34}}, Shape{5, 70, {PRODUCT_DEPTH + 7, 9}}, Shape{2, 1600, {PRODUCT_DEPTH + 6}}})
    for (int layout = 0; layout < 16; ++layout) {
      bool a_across = layout & 1, b_across = layout & 2, wide = layout & 4, turned = layout & 8, grows = wide && turned, half = !wide && !turned;
      int64_t M = shape.rows, N = shape.columns;
      std::vector<double> want(M * N);
      std::vector<Reals> memory;
      std::vector<Term> terms;
      for (int64_t depth : shape.depths) {
        Real type = terms.size() == 1 ? Real::F32 : Real::BF16;
        memory.emplace_back(Real::BF16, M * depth);
        memory.emplace_back(type, depth * N);
        Reals &a = memory[memory.size() - 2], &b = memory.back();
        Term t{a.half.data(), b.data(), nullptr, a_across ? 1 : depth, a_across ? M : 1, b_across ? N : 1, b_across ? 1 : depth, depth, type};
        auto av = a.floats(), bv = b.floats();
        for (int64_t m = 0; m < M; ++m)
          for (int64_t n = 0; n < N; ++n)
            for (int64_t i = 0; i < depth; ++i) {
              float y = bv[i * t.b_rows + n * t.b_columns];
              want[m * N + n] += double{av[m * t.a_rows + i * t.a_columns]} * (type == Real::F32 ? to_bf16_and_back(y) : y);
            }
        terms.push_back(t);
      }
      Reals added(Real::BF16, M * N), out(wide ? Real::F32 : Real::BF16, M * N);
      auto before = out.floats(), more = added.floats();
      Products p;
      p.terms = terms.data();
      p.count = static_cast<int>(terms.size());
      p.rows = M;
      p.columns = N;
      if (half) p.added = added.half.data(), p.added_ld = N;
      p.out = out.data();
      p.out_ld = turned ? M : N;
      p.type = out.type;
      p.scale = grows ? 1 : 0.5f;
      p.grows = grows;
      p.turned = turned;
      Reals again = out;
      Products both[2] = {p, p};
      both[1].out = again.data();
      run_products(pool, k->train->product, both, 2);
      expect(again.wide == out.wide && again.half == out.half, "the second of two sums", k->name, M, layout, 0);
      std::vector<float> right(M * N);
      for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < N; ++n) {
          int64_t at = turned ? n * M + m : m * N + n;
          right[at] = static_cast<float>(p.scale * (want[m * N + n] + (half ? more[m * N + n] : 0)) + (grows ? before[at] : 0));
        }
      double d = distance(out.floats(), right);
      expect(d < bound(out.type), "products", k->name, M, layout, d);
    }
}

// A right factor in codes gives what its values give.
void check_coded_products(const Kernels* k) {
  if (!k->train->product.products) return;
  for (auto [out, in] : {std::pair<int64_t, int64_t>{50, 96}, {33, PRODUCT_DEPTH + 32}, {PRODUCT_DEPTH + 5, 32}})
    for (bool turned : {false, true}) {
      int64_t M = 7, n = out * in, depth = turned ? in : out, N = turned ? out : in;
      std::vector<uint8_t> codes(n / 2);
      for (auto& c : codes) c = static_cast<uint8_t>(rng());
      auto scales = values(up(n, 64)), table = values(16);
      Reals weight(Real::BF16, n, true), a(Real::BF16, M * (depth + depth % 2)), found(Real::BF16, M * N, true), want(Real::BF16, M * N, true);
      k->train->unpack4(Real::BF16, codes.data(), scales.data(), table.data(), 64, 0, n, weight.data());
      CodedMatrix coded{codes.data(), scales.data(), table.data(), 64};
      for (bool packed : {false, true}) {
        Term t{a.half.data(), weight.data(), packed ? &coded : nullptr, depth + depth % 2, 1, turned ? 1 : in, turned ? in : 1, depth, Real::BF16};
        if (depth % 2)
          for (int64_t m = 0; m < M; ++m) a.half[m * (depth + 1) + depth] = 0;
        Products p;
        p.terms = &t;
        p.count = 1;
        p.rows = M;
        p.columns = N;
        p.out = packed ? found.data() : want.data();
        p.out_ld = N;
        std::vector<uint8_t> scratch(products_scratch(M, N), 0xff);
        k->train->product.products(p, 0, M, 0, N, scratch.data());
      }
      expect(found.half == want.half, "products of codes", k->name, out, in, distance(found.floats(), want.floats()));
    }
}

// Forward and backward of training, in buffers of exactly the right size, by a team.
void check_training(const Kernels* k) {
  Pool pool(3, {});
  for (Real t : {Real::F32, Real::BF16}) {
    check_texts(k, t, pool);
    check_rows_of_training(k, t, pool);
    check_log_prob(k, t);
    check_unpack4(k, t, pool);
    check_drop(k, t, pool);
  }
  check_products(k, pool);
  check_coded_products(k);
}

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

// -- the pool --------------------------------------------------------------------------------------------------

#ifdef __SANITIZE_THREAD__
bool forks = false;  // ThreadSanitizer allows no threads in a child, and sees no synchronisation inside libgomp
#else
bool forks = true;
#endif

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

void check_pool() {
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
    for (int i = 0; i < 50; ++i) pool.run([&](int id) { if (id == 0) ++calls; });
  };
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back(call);
  for (auto& c : callers) c.join();
  expect(calls == 150, "calls of several threads", "", calls, 0, 0);
  expect(ping_pong(pool, 100) > 0, "ping-pong", "", 0, 0, 0);
  if (forks) expect(in_child([&] { return turns(pool, 20); }) == 0, "a forked child", "", 0, 0, 0);
}

void check_probes(const Kernels* k) {
  for (int kind : {0, 1, 2}) expect(k->peak(kind, 10) > 0, "peak", k->name, kind, 0, 0);
  for (int64_t bytes : {0, 256, 1000}) {
    std::vector<uint8_t> memory(bytes);
    expect(k->read(memory.data(), bytes) == bytes, "read", k->name, bytes, 0, 0);
  }
}

// torch's team, in a child, because this process must have none to try the pool.
void check_open_mp() {
  if (!forks) return;
  int status = in_child([] {
    setenv("OMP_NUM_THREADS", "2", 1);
    if (!dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL)) return std::printf("no libgomp: its team was not checked\n") > 0;
    check_team(true);
    check_training(best_kernels());
    std::printf("OpenMP's team checked\n");
    return failures == 0;
  });
  expect(status == 0, "OpenMP's team", "", status, 0, 0);
}

}  // namespace

// --no-forks: qemu 7.2's user emulation aborts when a forked child starts a thread.
int main(int count, char** words) {
  if (count > 1 && std::string_view(words[1]) == "--no-forks") forks = false;
  check_open_mp();
  const char* names[8];
  int n = list_kernels(names, 8);
  for (int i = 0; i < n; ++i) {
    const Kernels* k = find_kernels(names[i]);
    check_products(k);
    std::mt19937 drawn = rng;  // the models below stay the ones whose distance the bounds were set for
    check_codes(k);
    rng = drawn;
    check_rows(k);
    check_model(k);
    std::printf("%s checked\n", k->name);
  }
  for (int i = 0; i < n; ++i) check_adapters(find_kernels(names[i]));
  for (int i = 0; i < n; ++i) {
    const Kernels* k = find_kernels(names[i]);
    check_models_of_codes(k);
    check_training(k);
    check_probes(k);
  }
  check_stop();
  check_shortlist();
  check_team(false);
  check_pool();
  check_unpack();
  check_exponentials();
  check_permutation();
  std::printf("%lld expectations, %d failures\n", checked, failures);
  return failures != 0;
}
