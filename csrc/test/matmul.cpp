// Products of every format, rows of its matrices, and the probes: each instruction set beside the scalar one.
#include <vector>

#include "test/support.h"

namespace check {
namespace {

std::vector<float> product(const Kernels* k, const Matrix& w, const std::vector<float>& x, int64_t m, bool exact) {
  std::vector<uint8_t> memory(acts_bytes(m, w.cols));
  std::vector<float> out(m * w.rows);
  Bump bump(memory.data());
  Acts a = lay_out(bump, m, w.cols);
  a.order = w.order;
  k->prepare(x.data(), w.cols, 0, m, form_of(w.format, exact), a);
  Job job{&w, nullptr, out.data(), w.rows, Epilogue::STORE};
  k->matmul(job, a, 0, w.tiles(), exact);
  return out;
}

void compare(const Isas& isas, const Matrix& w, int64_t m, double most, const char* what) {
  std::vector<float> x = values(m * w.cols);
  for (bool exact : {false, true}) {
    std::vector<float> want = product(kernels_scalar(), w, x, m, exact);
    for (const Kernels* k : isas) {
      double d = distance(product(k, w, x, m, exact), want);
      expect(d < most, what, k->name, static_cast<int>(w.format), m * 2 + exact, d);
    }
  }
}

void compare_rows(const Isas& isas, const Matrix& w) {
  std::vector<float> mine(w.cols), plain(w.cols);
  for (int64_t r : {int64_t{0}, w.rows - 1}) {
    kernels_scalar()->dequantize_row(w, r, plain.data());
    for (const Kernels* k : isas) {
      k->dequantize_row(w, r, mine.data());
      expect(mine == plain, "row", k->name, static_cast<int>(w.format), w.cols, 0);
    }
  }
}

void check_blocks(const Isas& isas) {
  for (int id : {2, 3, 6, 7, 8, 12, 13, 14}) {
    const FileType& t = *file_type(id);
    for (int64_t rows : {5, 16, 50})
      for (int64_t cols : {int64_t{t.columns}, int64_t{t.columns} * 3}) {
        Packed w = pack(t, rows, cols);
        for (int64_t m : {1, 2, 4, 7, 17}) compare(isas, w.m, m, 1e-6, "product");
      }
  }
}

void check_codes(const Isas& isas) {
  struct Shape {
    int64_t cols, group;
    bool shuffled;
  };
  const std::vector<Shape> codebooks = {{64, 64, false}, {192, 128, false}, {320, 64, false}};
  const std::vector<Shape> others = {{64, 32, false}, {200, 64, true}, {7, 32, false}, {384, 128, true}};
  const std::vector<Shape> tables = {{64, 32, false}, {224, 32, false}, {32, 32, false}};
  const std::vector<Shape> halves = {{64, 16, false}, {208, 16, false}, {16, 16, false}};
  for (Format f :
       {Format::C4, Format::C4B, Format::G4, Format::G8, Format::R8, Format::T4, Format::T4H, Format::A4, Format::A8})
    for (int64_t rows : {5, 16, 50})
      for (const Shape& s : f == Format::C4 || f == Format::C4B ? codebooks
                            : f == Format::T4                   ? tables
                            : f == Format::T4H                  ? halves
                                                                : others) {
        Given given(f, rows, s.cols, s.group, s.shuffled && f != Format::R8);
        Packed w = given.pack();
        compare_rows(isas, w.m);
        for (int64_t m : {1, 2, 4, 7, 17}) compare(isas, w.m, m, 2e-6, "codes");
      }
}

void check_dense(const Isas& isas) {
  for (Format f : {Format::F32, Format::F16, Format::BF16})
    for (int64_t rows : {3, 16, 37})
      for (int64_t cols : {1, 31, 64, 97}) {
        Dense w(rows, cols, f, 1);
        for (int64_t m : {1, 3, 9}) compare(isas, w.m, m, 2e-6, "rows");
      }
}

void check_probes(const Kernels* k) {
  for (int kind : {0, 1, 2}) expect(k->peak(kind, 10) > 0, "peak", k->name, kind, 0, 0);
  for (int64_t bytes : {0, 256, 1000}) {
    std::vector<uint8_t> memory(bytes);
    expect(k->read(memory.data(), bytes) == bytes, "read", k->name, bytes, 0, 0);
  }
}

}  // namespace

void check_matmul(const Isas& isas) {
  rng.seed(11);
  check_blocks(isas);
  check_codes(isas);
  check_dense(isas);
  for (const Kernels* k : isas) check_probes(k);
}

}  // namespace check
