// Sums of bfloat16 products, where an instruction set has them.
#include <utility>
#include <vector>

#include "test/support.h"
#include "train/team.h"

namespace check {
namespace {

float to_bf16_and_back(float x) {
  uint32_t bits = bits_of(x);
  return from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000);
}

// Sums of products against their definition, in every layout, with depths of several panels.
void check_products(const Kernels* k, Pool& pool) {
  struct Shape {
    int64_t rows, columns;
    std::vector<int64_t> depths;
  };
  for (const Shape& shape :
       {Shape{1, 1, {1}}, Shape{7, 5, {3}}, Shape{13, 33, {34}}, Shape{19, 100, {65, 6}}, Shape{31, 64, {16, 32, 1}},
        Shape{210, 1100, {34}}, Shape{5, 70, {PRODUCT_DEPTH + 7, 9}}, Shape{2, 1600, {PRODUCT_DEPTH + 6}}})
    for (int layout = 0; layout < 16; ++layout) {
      bool a_across = layout & 1, b_across = layout & 2, wide = layout & 4, turned = layout & 8, grows = wide && turned,
           half = !wide && !turned;
      int64_t M = shape.rows, N = shape.columns;
      std::vector<double> want(M * N);
      std::vector<Reals> memory;
      std::vector<Term> terms;
      for (int64_t depth : shape.depths) {
        Real type = terms.size() == 1 ? Real::F32 : Real::BF16;
        memory.emplace_back(Real::BF16, M * depth);
        memory.emplace_back(type, depth * N);
        Reals &a = memory[memory.size() - 2], &b = memory.back();
        Term t{a.half.data(),        b.data(), nullptr, a_across ? 1 : depth, a_across ? M : 1, b_across ? N : 1,
               b_across ? 1 : depth, depth,    type};
        auto av = a.floats(), bv = b.floats();
        for (int64_t m = 0; m < M; ++m)
          for (int64_t n = 0; n < N; ++n)
            for (int64_t i = 0; i < depth; ++i) {
              float y = bv[i * t.b_rows + n * t.b_columns];
              want[m * N + n] +=
                  double{av[m * t.a_rows + i * t.a_columns]} * (type == Real::F32 ? to_bf16_and_back(y) : y);
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
          right[at] =
              static_cast<float>(p.scale * (want[m * N + n] + (half ? more[m * N + n] : 0)) + (grows ? before[at] : 0));
        }
      double d = distance(out.floats(), right);
      expect(d < bound(out.type), "products", k->name, M, layout, d);
    }
}

// A right factor in codes gives what its values give.
void check_coded_products(const Kernels* k) {
  for (auto [out, in] : {std::pair<int64_t, int64_t>{50, 96}, {33, PRODUCT_DEPTH + 32}, {PRODUCT_DEPTH + 5, 32}})
    for (bool turned : {false, true}) {
      int64_t M = 7, n = out * in, depth = turned ? in : out, N = turned ? out : in;
      std::vector<uint8_t> codes(n / 2);
      for (auto& c : codes) c = static_cast<uint8_t>(rng());
      auto scales = values(up(n, 64)), table = values(16);
      Reals weight(Real::BF16, n, true), a(Real::BF16, M * (depth + depth % 2)), found(Real::BF16, M * N, true),
          want(Real::BF16, M * N, true);
      k->train->unpack4(Real::BF16, codes.data(), scales.data(), table.data(), 64, 0, n, weight.data());
      CodedMatrix coded{codes.data(), scales.data(), table.data(), 64};
      for (bool packed : {false, true}) {
        Term t{a.half.data(),
               weight.data(),
               packed ? &coded : nullptr,
               depth + depth % 2,
               1,
               turned ? 1 : in,
               turned ? in : 1,
               depth,
               Real::BF16};
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

}  // namespace

void check_gemm(const Isas& isas, Pool& pool) {
  rng.seed(15);
  for (const Kernels* k : isas)
    if (k->train->product.products) {
      check_products(k, pool);
      check_coded_products(k);
    }
}

}  // namespace check
