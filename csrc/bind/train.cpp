// What training asks of the compiled module.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "engine/memory.h"
#include "engine/pack.h"
#include "engine/pool.h"
#include "kernels/kernels.h"
#include "train/team.h"

namespace nb = nanobind;
using namespace llama2;

namespace {

using Tensor = nb::ndarray<nb::c_contig, nb::device::cpu>;  // float32 or bfloat16
using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool ok, const char* message) {
  if (!ok) throw nb::value_error(message);
}

template <class Array>
Real real_of(const Array& x) {
  if (x.dtype() == nb::dtype<float>()) return Real::F32;
  nb::dlpack::dtype d = x.dtype();
  require(d.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && d.bits == 16 && d.lanes == 1,
          "tensors must be bfloat16 or float32");
  return Real::BF16;
}

int64_t size_of(const Tensor& x) { return static_cast<int64_t>(x.size()); }

void same(const Tensor& a, const Tensor& b) {
  require(a.dtype() == b.dtype() && a.size() == b.size(), "tensors of one dtype and size");
}

const TrainKernels& kernels() { return *best_kernels()->train; }

// [0, n) in one piece a thread, each beginning at a multiple of `step`
template <class Work>
void pieces(Pool& pool, int64_t n, int64_t step, const Work& work) {
  nb::gil_scoped_release free;
  run_team(pool, [&](int thread, int threads) {
    int64_t blocks = (n + step - 1) / step, a = blocks * thread / threads * step,
            b = std::min(n, blocks * (thread + 1) / threads * step);
    if (a < b) work(a, b, thread);
  });
}

Norm norm_of(const Tensor& x, const Tensor& weight, float eps) {
  Norm n{x.data(), weight.data(), size_of(weight), eps};
  require(x.dtype() == weight.dtype() && n.width > 0 && n.width % 16 == 0 && size_of(x) % n.width == 0,
          "rows of a width that is a multiple of 16, in the weight's dtype");
  return n;
}

void norm(Pool& pool, Tensor x, Tensor weight, float eps, Tensor out) {
  Norm n = norm_of(x, weight, eps);
  same(x, out);
  Real t = real_of(x);
  pieces(pool, size_of(x) / n.width, 1, [&](int64_t a, int64_t b, int) { kernels().norm(t, n, a, b, out.data()); });
}

void norm_grad(Pool& pool, Tensor x, Tensor weight, float eps, Tensor grad, std::optional<Tensor> residual, Tensor to_x,
               std::optional<Floats> to_weight) {
  Norm n = norm_of(x, weight, eps);
  same(x, grad);
  same(x, to_x);
  if (residual) same(x, *residual);
  if (to_weight)
    require(static_cast<int64_t>(to_weight->size()) == n.width, "the weight's gradient has the weight's size");
  Real t = real_of(x);
  NormGrad g{grad.data(), residual ? residual->data() : nullptr, to_x.data(), nullptr};
  std::vector<std::vector<float>> sums(to_weight ? 1024 : 0);
  pieces(pool, size_of(x) / n.width, 1, [&](int64_t a, int64_t b, int thread) {
    NormGrad mine = g;
    if (to_weight) {
      sums[thread % 1024].assign(n.width, 0.0f);
      mine.to_weight = sums[thread % 1024].data();
    }
    kernels().norm_grad(t, n, mine, a, b);
  });
  if (!to_weight) return;
  for (const auto& sum : sums)
    for (size_t i = 0; i < sum.size(); ++i) to_weight->data()[i] += sum[i];
}

void swiglu(Pool& pool, Tensor gate, Tensor up, Tensor out) {
  same(gate, up);
  same(gate, out);
  require(size_of(gate) % 16 == 0, "a multiple of 16 values");
  Real t = real_of(gate);
  pieces(pool, size_of(gate), 16,
         [&](int64_t a, int64_t b, int) { kernels().swiglu(t, gate.data(), up.data(), a, b, out.data()); });
}

void swiglu_grad(Pool& pool, Tensor gate, Tensor up, Tensor grad, Tensor to_gate, Tensor to_up, Tensor product) {
  for (const Tensor* x : {&up, &grad, &to_gate, &to_up, &product}) same(gate, *x);
  require(size_of(gate) % 16 == 0, "a multiple of 16 values");
  Real t = real_of(gate);
  pieces(pool, size_of(gate), 16, [&](int64_t a, int64_t b, int) {
    kernels().swiglu_grad(t, gate.data(), up.data(), grad.data(), a, b, to_gate.data(), to_up.data(), product.data());
  });
}

// out = x, of which the share is dropped and the rest scaled, + added; both may be out
void drop(Pool& pool, Tensor x, uint64_t seed, double share, std::optional<Tensor> added, Tensor out) {
  same(x, out);
  if (added) same(x, *added);
  require(share >= 0 && share < 1, "the share that is dropped lies in [0, 1)");
  Dropout d{seed, std::min<uint32_t>(65535, static_cast<uint32_t>(std::lround(share * 65536)))};
  Real t = real_of(x);
  pieces(pool, size_of(x), 32, [&](int64_t a, int64_t b, int) {
    kernels().drop(t, x.data(), d, added ? added->data() : nullptr, a, b, out.data());
  });
}

struct Shapes {  // of attention: [tokens][heads][width]
  Texts texts;
  int64_t tokens = 0;
  std::vector<int64_t> ends;
};

Shapes shapes_of(const Tensor& q, const Tensor& k, const Tensor& v, const Floats& cos, const Floats& sin,
                 const Longs& ends, float scale) {
  require(q.ndim() == 3 && k.ndim() == 3 && q.shape(0) == k.shape(0) && q.shape(2) == k.shape(2),
          "q, k and v are [token][head][width]");
  same(k, v);
  require(q.dtype() == k.dtype(), "q and k of one dtype");
  Shapes s;
  s.tokens = static_cast<int64_t>(q.shape(0));
  s.texts = {q.data(),
             k.data(),
             v.data(),
             cos.data(),
             sin.data(),
             static_cast<int64_t>(q.shape(1)),
             static_cast<int64_t>(k.shape(1)),
             static_cast<int64_t>(q.shape(2)),
             scale};
  require(s.texts.kv_heads > 0 && s.texts.heads % s.texts.kv_heads == 0 && s.texts.width % 2 == 0,
          "whole groups of heads of an even width");
  require(static_cast<int64_t>(cos.size()) == s.tokens * s.texts.width && cos.size() == sin.size(),
          "cos and sin are [token][width]");
  int64_t before = 0;
  for (size_t i = 0; i < ends.size(); ++i) {
    const int64_t end = ends.data()[i];  // read once: another thread may write there
    require(end > before, "texts end one after the other");
    s.ends.push_back(before = end);
  }
  require(before == s.tokens, "the last text ends with the last token");
  return s;
}

// work(first, last, kv head, scratch) for every text and head, the longest first, whoever is free
template <class Work>
void each_text(Pool& pool, const Shapes& s, const Work& work) {
  struct Job {
    int64_t first, last, head;
  };
  std::vector<Job> jobs;
  int64_t longest = 0;
  for (size_t i = 0; i < s.ends.size(); ++i) {
    int64_t first = i ? s.ends[i - 1] : 0;
    longest = std::max(longest, s.ends[i] - first);
    for (int64_t h = 0; h < s.texts.kv_heads; ++h) jobs.push_back({first, s.ends[i], h});
  }
  std::stable_sort(jobs.begin(), jobs.end(),
                   [](const Job& a, const Job& b) { return a.last - a.first > b.last - b.first; });
  std::atomic<size_t> next{0};
  nb::gil_scoped_release free;
  run_team(pool, [&](int, int) {
    static thread_local Scratch scratch;
    float* memory = static_cast<float*>(scratch.take(4 * texts_scratch(longest, s.texts.width)));
    for (size_t i; (i = next.fetch_add(1)) < jobs.size();) work(jobs[i].first, jobs[i].last, jobs[i].head, memory);
  });
}

void texts(Pool& pool, Tensor q, Tensor k, Tensor v, Floats cos, Floats sin, Longs ends, float scale, Tensor out,
           Floats lse) {
  Shapes s = shapes_of(q, k, v, cos, sin, ends, scale);
  same(q, out);
  require(static_cast<int64_t>(lse.size()) == s.tokens * s.texts.heads, "lse is [head][token]");
  Real t = real_of(q);
  TextsOut to{out.data(), lse.data(), s.tokens};
  each_text(pool, s, [&](int64_t a, int64_t b, int64_t head, float* scratch) {
    kernels().texts(t, s.texts, to, a, b, head, scratch);
  });
}

void texts_grad(Pool& pool, Tensor q, Tensor k, Tensor v, Floats cos, Floats sin, Longs ends, float scale, Tensor out,
                Floats lse, Tensor grad, Tensor to_q, Tensor to_k, Tensor to_v) {
  Shapes s = shapes_of(q, k, v, cos, sin, ends, scale);
  for (const Tensor* x : {&out, &grad, &to_q}) same(q, *x);
  for (const Tensor* x : {&to_k, &to_v}) same(k, *x);
  require(static_cast<int64_t>(lse.size()) == s.tokens * s.texts.heads, "lse is [head][token]");
  Real t = real_of(q);
  TextsGrad g{out.data(), grad.data(), lse.data(), s.tokens, to_q.data(), to_k.data(), to_v.data()};
  each_text(pool, s, [&](int64_t a, int64_t b, int64_t head, float* scratch) {
    kernels().texts_grad(t, s.texts, g, a, b, head, scratch);
  });
}

// found[row] = log p(target); with factors, logits become factor * (1 at the target - p)
void log_probs(Pool& pool, Tensor logits, Longs targets, std::optional<Floats> factors, Floats found) {
  int64_t rows = static_cast<int64_t>(targets.size());
  require(rows > 0 && logits.ndim() == 2 && static_cast<int64_t>(logits.shape(0)) == rows && logits.shape(1) > 0,
          "logits are [row][vocabulary], one target a row");
  int64_t vocabulary = static_cast<int64_t>(logits.shape(1));
  require(static_cast<int64_t>(found.size()) == rows && (!factors || static_cast<int64_t>(factors->size()) == rows),
          "one result and one factor a row");
  const std::vector<int64_t> own(targets.data(), targets.data() + rows);  // another thread may write into the array
  for (int64_t target : own) require(target >= 0 && target < vocabulary, "a target outside the vocabulary");
  Real t = real_of(logits);
  uint8_t* at = static_cast<uint8_t*>(logits.data());
  pieces(pool, rows, 1, [&](int64_t a, int64_t b, int) {
    std::vector<float> scratch(factors ? vocabulary + 16 : 0);
    for (int64_t r = a; r < b; ++r)
      found.data()[r] = kernels().log_prob(t, at + r * vocabulary * real_bytes(t), vocabulary, own[r],
                                           factors ? factors->data() + r : nullptr, scratch.data());
  });
}

void unpack4(Pool& pool, Bytes codes, Floats scales, Floats table, int64_t block, Tensor out) {
  int64_t n = size_of(out);
  require(block > 0 && block % 32 == 0 && table.size() == 16, "blocks of a multiple of 32 values, a table of 16");
  require(static_cast<int64_t>(codes.size()) == (n + 1) / 2 &&
              static_cast<int64_t>(scales.size()) == (n + block - 1) / block,
          "two codes a byte and a scale a block");
  Real t = real_of(out);
  pieces(pool, n, block, [&](int64_t a, int64_t b, int) {
    kernels().unpack4(t, codes.data(), scales.data(), table.data(), block, a, b, out.data());
  });
}

// The blocks of a GGUF file (rows, cols) as numbers.
void unpack_blocks(Pool& pool, Bytes raw, int type, Tensor out) {
  require(out.ndim() == 2, "out is rows x cols");
  int64_t rows = static_cast<int64_t>(out.shape(0)), cols = static_cast<int64_t>(out.shape(1)),
          row_bytes = unpacked_row_bytes(type, cols);
  require(row_bytes > 0, "a GGUF type of blocks, and rows of whole blocks");
  require(static_cast<int64_t>(raw.size()) == rows * row_bytes, "as many bytes as out has blocks");
  bool bf16 = real_of(out) == Real::BF16;
  ask_for_huge_pages(out.data(), size_of(out) * real_bytes(real_of(out)));  // four times as fast as pages of 4 kB
  pieces(pool, rows, 1,
         [&](int64_t a, int64_t b, int) { unpack_rows(type, raw.data(), cols, bf16, a, b, out.data()); });
}

// -- products ----------------------------------------------------------------------------------------------------

using Matrix2 = nb::ndarray<nb::ndim<2>, nb::device::cpu>;  // rows or columns along memory

Real along_memory(const Matrix2& x) {
  require(x.stride(0) == 1 || x.stride(1) == 1, "rows or columns of a matrix must lie along memory");
  return real_of(x);
}

// out, terms, what is added to them or None, scale, whether out is transposed, whether to add to out
// A right factor may be a matrix (rows, columns) in codes, or its transpose: codes, scales, table, block, shape,
// transposed.
using Packed = std::tuple<Bytes, Floats, Floats, int64_t, std::pair<int64_t, int64_t>, bool>;
using Factor = std::variant<Matrix2, Packed>;
using Sum = std::tuple<Matrix2, std::vector<std::pair<Matrix2, Factor>>, std::optional<Matrix2>, float, bool, bool>;

struct Checked {
  Products sum;
  Term terms[MAX_TERMS];
  CodedMatrix codes[MAX_TERMS];
};

// The right factor of a term, and its shape.
std::pair<int64_t, int64_t> right_factor(const Factor& from, Term& to, CodedMatrix& held) {
  if (const Matrix2* b = std::get_if<Matrix2>(&from)) {
    to.b_type = along_memory(*b);
    to.b = b->data();
    to.b_rows = b->stride(0);
    to.b_columns = b->stride(1);
    return {static_cast<int64_t>(b->shape(0)), static_cast<int64_t>(b->shape(1))};
  }
  const auto& [codes, scales, table, block, shape, turned] = std::get<Packed>(from);
  auto [rows, columns] = shape;
  int64_t n = rows * columns;
  require(rows > 0 && columns > 0 && columns % 32 == 0 && block > 0 && block % 32 == 0 && table.size() == 16,
          "rows and blocks of a multiple of 32 codes, a table of 16");
  require(static_cast<int64_t>(codes.size()) == n / 2 && static_cast<int64_t>(scales.size()) == (n + block - 1) / block,
          "two codes a byte and a scale a block");
  held = {codes.data(), scales.data(), table.data(), block};
  to.codes = &held;
  to.b_rows = turned ? 1 : columns;
  to.b_columns = turned ? columns : 1;
  return turned ? std::pair{columns, rows} : std::pair{rows, columns};
}

void check(const Sum& from, Checked& to) {
  const auto& [out, terms, added, scale, turned, grows] = from;
  Products& p = to.sum;
  require(!terms.empty() && terms.size() <= MAX_TERMS, "between 1 and 8 terms");
  p.turned = turned;
  p.rows = static_cast<int64_t>(out.shape(turned));
  p.columns = static_cast<int64_t>(out.shape(!turned));
  require(p.rows > 0 && p.columns > 0 && out.stride(1) == 1, "the result's rows lie along memory");
  p.count = static_cast<int>(terms.size());
  p.terms = to.terms;
  p.out = out.data();
  p.out_ld = out.stride(0);
  p.type = along_memory(out);
  p.scale = scale;
  p.grows = grows;
  require(!grows || (p.type == Real::F32 && scale == 1 && !added), "what is added to is float32, unscaled");
  require(!turned || !added, "nothing is added to a transposed sum");
  if (added) {
    require(along_memory(*added) == Real::BF16 && added->shape(0) == out.shape(0) && added->shape(1) == out.shape(1) &&
                added->stride(1) == 1,
            "what is added is bfloat16 of the result's shape, its rows along memory");
    p.added = static_cast<const uint16_t*>(added->data());
    p.added_ld = added->stride(0);
  }
  for (int i = 0; i < p.count; ++i) {
    const auto& [a, b] = terms[i];
    Term& term = to.terms[i];
    auto [depth, columns] = right_factor(b, term, to.codes[i]);
    require(along_memory(a) == Real::BF16, "left factors must be bfloat16");
    require(a.shape(0) == out.shape(turned) && columns == p.columns && static_cast<int64_t>(a.shape(1)) == depth &&
                depth > 0,
            "a term is (rows, depth) times (depth, columns)");
    term.a = static_cast<const uint16_t*>(a.data());
    term.a_rows = a.stride(0);
    term.a_columns = a.stride(1);
    term.depth = depth;
  }
}

void products(Pool& pool, const std::vector<Sum>& sums) {
  const ProductKernels& kernel = kernels().product;
  require(kernel.products, "this processor has no bfloat16 products");
  std::vector<Checked> all(sums.size());
  std::vector<Products> given;
  for (size_t i = 0; i < sums.size(); ++i) {
    check(sums[i], all[i]);
    given.push_back(all[i].sum);
  }
  nb::gil_scoped_release free;
  run_products(pool, kernel, given.data(), static_cast<int>(given.size()));
}

}  // namespace

void bind_train(nb::module_& m) {
  m.def("norm", &norm);
  m.def("norm_grad", &norm_grad, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
        nb::arg().none());
  m.def("swiglu", &swiglu);
  m.def("swiglu_grad", &swiglu_grad);
  m.def("drop", &drop, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg());
  m.def("texts", &texts);
  m.def("texts_grad", &texts_grad);
  m.def("log_probs", &log_probs, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg());
  m.def("unpack4", &unpack4);
  m.def("unpack_blocks", &unpack_blocks, nb::arg("pool"), nb::arg("raw"), nb::arg("type"), nb::arg("out"));
  // where there is AMX, oneDNN's products run on it, at several times the rate of these
  m.def("has_products", [] { return kernels().product.products != nullptr && !has_amx(); });
  m.def("products", &products);
}
