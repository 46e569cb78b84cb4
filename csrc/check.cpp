// The kernel tests without Python, for sanitizers and emulators: every instruction set against the scalar one,
// odd shapes in buffers of exactly the right size, and a whole model stepped by several threads.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "pool.h"
#include "step.h"

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
  p.m.stride = padded(cols) / BLOCK_K * block_bytes(t.format);
  p.memory.resize(p.m.tiles() * p.m.stride);
  p.m.data = p.memory.data();
  for (int64_t i = 0; i < p.m.tiles(); ++i) pack_tile(t, raw.data(), rows, cols, nullptr, i, p.memory.data() + i * p.m.stride);
  return p;
}

std::vector<float> product(const Kernels* k, const Matrix& w, const std::vector<float>& x, int64_t m, bool exact) {
  int64_t kp = padded(w.cols), mp = padded_tokens(m), groups = mp * kp / GROUP;
  std::vector<float> f32(m * kp), scale(groups), sum(groups), out(m * w.rows);
  std::vector<uint16_t> bf16(m * kp);
  std::vector<int8_t> q(mp * kp);
  std::vector<int32_t> negsum(groups), negsum16(2 * groups);
  Acts a;
  a.m = m;
  a.k = w.cols;
  a.f32 = f32.data();
  a.bf16 = bf16.data();
  a.q = q.data();
  a.scale = scale.data();
  a.sum = sum.data();
  a.negsum = negsum.data();
  a.negsum16 = negsum16.data();
  k->prepare(x.data(), w.cols, 0, m, FORM_F32 | FORM_BF16 | FORM_INT8, a);
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

std::vector<float> run_model(const Kernels* k, const Tiny& tiny, int threads, KvType type, bool exact) {
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

int main() {
  const char* names[8];
  int n = list_kernels(names, 8);
  for (int i = 0; i < n; ++i) {
    const Kernels* k = find_kernels(names[i]);
    check_products(k);
    check_rows(k);
    check_model(k);
    std::printf("%s checked\n", k->name);
  }
  check_stop();
  Pool pool(2, {});
  expect(ping_pong(pool, 100) > 0, "ping-pong", "", 0, 0, 0);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
