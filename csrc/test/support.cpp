#include "test/support.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "train/team.h"

namespace check {
namespace {

int failed = 0;
long long checked = 0;

}  // namespace

std::mt19937 rng(11);  // NOLINT(bugprone-throwing-static-initialization): it throws nothing

float normal() { return std::normal_distribution<float>(0, 1)(rng); }

std::vector<float> values(int64_t n) {
  std::vector<float> v(n);
  for (float& x : v) x = normal();
  return v;
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

void expect(bool ok, const char* what, const char* isa, int64_t a, int64_t b, double error) {
  ++checked;
  if (ok) return;
  ++failed;
  std::printf("FAILED %s %s %lld %lld: %g\n", what, isa, static_cast<long long>(a), static_cast<long long>(b), error);
}

long long expectations() { return checked; }

int failures() { return failed; }

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

Packed pack(const FileType& t, int64_t rows, int64_t cols) {
  Packed p;
  std::vector<uint8_t> raw = random_blocks(t, rows, cols);
  p.m.rows = rows;
  p.m.cols = cols;
  p.m.format = t.format;
  p.m.stride = tile_bytes(t.format, cols);
  p.memory.resize(p.m.tiles() * p.m.stride);
  p.m.data = p.memory.data();
  for (int64_t i = 0; i < p.m.tiles(); ++i)
    pack_tile(t, raw.data(), rows, cols, nullptr, i, p.memory.data() + i * p.m.stride);
  return p;
}

Given::Given(Format f, int64_t rows, int64_t cols, int64_t group, bool shuffled) {
  bool codebook = f == Format::C4 || f == Format::C4B, groups = f == Format::G4 || f == Format::G8;
  bool table_of = f == Format::T4 || f == Format::T4H, affine = f == Format::A4 || f == Format::A8;
  bool four = f == Format::G4 || f == Format::A4 || table_of;
  int64_t count = groups || table_of || affine ? rows * up(cols, group) : codebook ? up(rows * cols, group) : rows;
  codes.resize(codebook ? rows * cols / 2 : rows * cols);
  for (auto& c : codes) c = static_cast<uint8_t>(four ? rng() & 15 : rng());
  zeros.resize(groups ? count : 0);
  for (auto& z : zeros) z = static_cast<uint8_t>(f == Format::G4 ? rng() % 17 : rng());
  halves.resize(groups ? count : 0);
  for (auto& h : halves) h = static_cast<uint16_t>(0x2100 | (rng() & 255));
  floats.resize(groups ? 0 : count);
  for (auto& v : floats) v = 0.01f + 0.01f * static_cast<float>(rng() % 100);
  minima.resize(affine ? count : 0);
  for (auto& v : minima) v = -0.1f * static_cast<float>(rng() % 100);
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
  source.minima = affine ? minima.data() : nullptr;
  source.order = shuffled ? order.data() : nullptr;
}

Packed Given::pack() const {
  Packed p;
  Format f = source.format;
  p.m.rows = source.rows;
  p.m.cols = source.cols;
  p.m.format = f;
  p.m.stride = tile_bytes(f, source.cols, source.group);
  p.m.codebook = &forms;
  p.m.order = source.order;
  if (f == Format::G4 || f == Format::G8 || source.minima) p.m.group = source.group;
  p.memory.resize(p.m.tiles() * p.m.stride);
  p.m.data = p.memory.data();
  for (int64_t i = 0; i < p.m.tiles(); ++i) pack_codes_tile(source, i, p.memory.data() + i * p.m.stride);
  return p;
}

Dense::Dense(int64_t rows, int64_t cols, Format f, float size) {
  int64_t bytes = f == Format::F32 ? 4 : 2;
  memory.resize(rows * cols * bytes);
  uint32_t exponent = size < 1 ? 0x2000 : 0x3000;  // of a float16
  for (int64_t i = 0; i < rows * cols; ++i) {
    float v = size * normal();
    uint32_t bits = bits_of(v);
    uint16_t half = static_cast<uint16_t>(f == Format::BF16 ? bits >> 16 : exponent | (bits & 0x8fff));
    std::memcpy(&memory[i * bytes], f == Format::F32 ? static_cast<void*>(&v) : &half, bytes);
  }
  m.data = memory.data();
  m.rows = rows;
  m.cols = cols;
  m.stride = cols * bytes;
  m.format = f;
}

Reals::Reals(Real t, int64_t n, bool zeros) : type(t), wide(t == Real::F32 ? n : 0), half(t == Real::F32 ? 0 : n) {
  if (zeros) return;
  for (float& v : wide) v = normal();
  for (uint16_t& v : half) v = static_cast<uint16_t>(bits_of(normal()) >> 16);
}

std::vector<float> Reals::floats() const {
  std::vector<float> v(wide);
  for (uint16_t h : half) v.push_back(from_bits(uint32_t{h} << 16));
  return v;
}

double bound(Real t) { return t == Real::F32 ? 1e-5 : 4e-3; }  // bfloat16: two roundings that fall apart

void shared(Pool& pool, int64_t n, int64_t step, const std::function<void(int64_t, int64_t, int)>& work) {
  run_team(pool, [&](int thread, int threads) {
    int64_t blocks = (n + step - 1) / step, a = blocks * thread / threads * step,
            b = std::min(n, blocks * (thread + 1) / threads * step);
    if (a < b) work(a, b, thread);
  });
}

}  // namespace check
