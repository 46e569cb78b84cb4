// The kernel tests without Python, for sanitizers and emulators: every instruction set against the scalar one,
// odd shapes in buffers of exactly the right size, and a whole model stepped by several threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "pool.h"
#include "shortlist.h"
#include "step.h"
#include "train.h"

using namespace llama2;

namespace {

std::mt19937 rng(11);
int failures = 0;

float normal() { return std::normal_distribution<float>(0, 1)(rng); }

void expect(bool ok, const char* what, const char* isa, int64_t a, int64_t b, double error) {
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
  KvCache cache(type, 2, 2, 24, 12);
  std::vector<int32_t> tables = {0, 1, 2, 3, 9, 8, 7, 6};
  std::vector<float> inv(12), out;
  for (int i = 0; i < 12; ++i) inv[i] = std::pow(10000.0f, -i / 12.0f);
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

}  // namespace

void check_shortlist() {  // the 12 best, whatever the size of the last block
  std::vector<float> scores(1000);
  for (float& x : scores) x = std::normal_distribution<float>(0, 3)(rng);
  std::vector<int32_t> ids;
  std::vector<double> p;
  for (int64_t size : {int64_t{1000}, int64_t{999}, int64_t{961}}) {
    bool sure = shortlist(scores.data(), size, {0.7f, 12, 1.0, 1}, ids, p);
    std::vector<float> order(scores.begin(), scores.begin() + size);
    std::sort(order.begin(), order.end(), std::greater<float>());
    double wrong = !sure || ids.size() != 12, sum = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
      wrong += !(scores[ids[i]] >= order[11]) || (i && ids[i] <= ids[i - 1]);
      sum += p[i];
    }
    expect(wrong == 0 && std::fabs(sum - 1) < 1e-12, "shortlist", "", size, wrong, sum);
  }
  scores[500] = NAN;
  expect(!shortlist(scores.data(), 1000, {0.7f, 12, 0.9, 1}, ids, p) && ids.empty(), "shortlist of NaN", "", 0, 0, 0);
}

std::vector<float> values(int64_t n) {
  std::vector<float> v(n);
  for (float& x : v) x = normal();
  return v;
}

// Forward and backward of training against the scalar build, float32 in buffers of exactly the right size.
void check_training(const Kernels* k) {
  const TrainKernels &ours = *k->train, &exact = *find_kernels("scalar")->train;
  for (int64_t width : {24, 32, 64})  // heads that end inside a register, and whole ones
    for (int64_t length : {1, 17, 70}) {
      int64_t heads = 4, kv = 2, n = length + 3;
      auto q = values(n * heads * width), key = values(n * kv * width), v = values(n * kv * width), grad = values(n * heads * width);
      auto cos = values(n * width), sin = values(n * width);
      Texts texts{q.data(), key.data(), v.data(), cos.data(), sin.data(), heads, kv, width, 0.2f};
      std::vector<float> found[2][5];
      for (int i = 0; i < 2; ++i) {
        const TrainKernels& t = i ? exact : ours;
        std::vector<float> scratch(texts_scratch(length, width)), lse(heads * n);
        auto& f = found[i];
        for (int j = 0; j < 4; ++j) f[j].resize(j < 2 ? q.size() : key.size());
        for (int64_t h = 0; h < kv; ++h) t.texts(Real::F32, texts, {f[0].data(), lse.data(), n}, 2, 2 + length, h, scratch.data());
        TextsGrad g{f[0].data(), grad.data(), lse.data(), n, f[1].data(), f[2].data(), f[3].data()};
        for (int64_t h = 0; h < kv; ++h) t.texts_grad(Real::F32, texts, g, 2, 2 + length, h, scratch.data());
        f[4] = lse;
      }
      for (int j = 0; j < 5; ++j) {
        if (length == 1 && (j == 1 || j == 2)) continue;  // of one token: 0 but for rounding
        double d = distance(found[0][j], found[1][j]);
        expect(d < 1e-5, "texts", k->name, width, 10 * length + j, d);
      }
    }
  int64_t width = 48, rows = 5, n = rows * width;
  auto x = values(n), w = values(width), g = values(n), r = values(n), up = values(n);
  std::vector<float> found[2][7];
  for (int i = 0; i < 2; ++i) {
    const TrainKernels& t = i ? exact : ours;
    for (auto& f : found[i]) f.resize(n);
    Norm norm{x.data(), w.data(), width, 1e-5f};
    t.norm(Real::F32, norm, 0, rows, found[i][0].data());
    t.norm_grad(Real::F32, norm, {g.data(), r.data(), found[i][1].data(), found[i][2].data()}, 0, rows);
    t.swiglu(Real::F32, x.data(), up.data(), 0, n, found[i][3].data());
    t.swiglu_grad(Real::F32, x.data(), up.data(), g.data(), 0, n, found[i][4].data(), found[i][5].data(), found[i][6].data());
  }
  for (int j = 0; j < 7; ++j) expect(distance(found[0][j], found[1][j]) < 1e-5, "norm, gated product", k->name, j, 0, distance(found[0][j], found[1][j]));
  for (int64_t vocabulary : {5, 16, 101}) {
    std::vector<float> a = values(vocabulary), b = a, scratch(vocabulary + 16);
    float factor = -1.5f, p = ours.log_prob(Real::F32, a.data(), vocabulary, 3, &factor, scratch.data());
    double d = std::fabs(p - exact.log_prob(Real::F32, b.data(), vocabulary, 3, &factor, scratch.data())) + distance(a, b);
    expect(d < 1e-5, "log_prob", k->name, vocabulary, 0, d);
  }
  for (int64_t size : {1, 63, 64, 200}) {
    std::vector<uint8_t> codes((size + 1) / 2);
    for (auto& c : codes) c = static_cast<uint8_t>(rng());
    auto scales = values((size + 63) / 64), table = values(16);
    std::vector<float> a(size), b(size);
    ours.unpack4(Real::F32, codes.data(), scales.data(), table.data(), 64, 0, size, a.data());
    exact.unpack4(Real::F32, codes.data(), scales.data(), table.data(), 64, 0, size, b.data());
    expect(a == b, "unpack4", k->name, size, 0, distance(a, b));
  }
}

int main() {
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
  for (int i = 0; i < n; ++i) check_training(find_kernels(names[i]));
  check_stop();
  check_shortlist();
  Pool pool(2, {});
  expect(ping_pong(pool, 100) > 0, "ping-pong", "", 0, 0, 0);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
