// Forward and backward of training, in buffers of exactly the right size, by a team: each instruction set beside the
// scalar one, and beside the definition where that is a few lines.
#include <cmath>
#include <vector>

#include "test/support.h"

namespace check {
namespace {

void alike(const Reals& a, const Reals& b, const char* what, const char* isa, int64_t i, int64_t j) {
  double d = distance(a.floats(), b.floats());
  expect(d < bound(a.type), what, isa, i, j, d);
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
      expect(f[8].floats() == f[4].floats() && f[7].floats() == f[5].floats(), "gradients in one buffer", k->name,
             width, i, 0);
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
    expect(distance(found[0][3].floats(), y) < bound(t), "gated product in float64", k->name, width, 0,
           distance(found[0][3].floats(), y));
    expect(distance(found[0][0].floats(), scaled) < bound(t), "norm in float64", k->name, width, 0,
           distance(found[0][0].floats(), scaled));
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
      for (int64_t i = 0; i < vocabulary; ++i)
        want[i] = static_cast<float>(factor * ((i == target) - std::exp(double{x[i]}) / sum));
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
      shared(pool, size, block, [&](int64_t begin, int64_t end, int) {
        k->train->unpack4(t, codes.data(), scales.data(), table.data(), block, begin, end, a.data());
      });
      find_kernels("scalar")->train->unpack4(t, codes.data(), scales.data(), table.data(), block, 0, size, b.data());
      expect(a.floats() == b.floats(), "unpack4", k->name, size, block, distance(a.floats(), b.floats()));
      std::vector<float> want(size);
      for (int64_t i = 0; i < size; ++i)
        want[i] = table[i & 1 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * scales[i / block];
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
        shared(pool, size, 32, [&](int64_t begin, int64_t end, int) {
          k->train->drop(t, x.data(), d, more ? added.data() : nullptr, begin, end, a.data());
        });
        find_kernels("scalar")->train->drop(t, x.data(), d, more ? added.data() : nullptr, 0, size, b.data());
        double apart = distance(a.floats(), b.floats());
        expect(apart < bound(t), "drop", k->name, size, share, apart);
        int64_t zeros = 0;
        auto found = a.floats();
        for (int64_t i = 0; i < size; ++i) zeros += found[i] == 0;
        if (size == 1000 && !more)
          expect(share == 0        ? zeros == 0
                 : share == 65535u ? zeros > 990
                                   : zeros > 60 && zeros < 150,
                 "share dropped", k->name, share, more, zeros);
      }
}

}  // namespace

void check_training(const Isas& isas, Pool& pool) {
  rng.seed(14);
  for (Real t : {Real::F32, Real::BF16})
    for (const Kernels* k : isas) {
      check_texts(k, t, pool);
      check_rows_of_training(k, t, pool);
      check_log_prob(k, t);
      check_unpack4(k, t, pool);
      check_drop(k, t, pool);
    }
}

}  // namespace check
