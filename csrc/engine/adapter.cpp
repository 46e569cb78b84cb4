#include "engine/adapter.h"

#include <algorithm>
#include <cstring>

#include "engine/step.h"

namespace llama2 {
namespace {

void shapes(const Model& m, int64_t* in, int64_t* out) {
  int64_t A = m.heads * m.width, KV = m.kv_heads * m.width;
  const int64_t inputs[PARTS] = {m.hidden, m.hidden, m.hidden, A, m.hidden, m.hidden, m.ffn};
  const int64_t outputs[PARTS] = {A, KV, KV, m.hidden, m.ffn, m.ffn, m.hidden};
  std::copy(inputs, inputs + PARTS, in);
  std::copy(outputs, outputs + PARTS, out);
}

int64_t size(Format f) { return f == Format::F32 ? 4 : 2; }

}  // namespace

Adapter::Adapter(const Model& model) : all_(model.layers.size() * PARTS) { shapes(model, in_, out_); }

bool Adapter::fits(const Model& model) const {
  int64_t in[PARTS], out[PARTS];
  shapes(model, in, out);
  return layers() == static_cast<int64_t>(model.layers.size()) && std::equal(in, in + PARTS, in_) &&
         std::equal(out, out + PARTS, out_);
}

void Adapter::set(int64_t layer, Part part, const Matrix& a, const Matrix& b, float scale) {
  LowRank l;
  l.rank = a.rows;
  l.in = a.cols;
  l.a_format = a.format;
  l.b_format = b.format;
  l.scale = scale;
  int64_t row = l.in * size(a.format), cell = size(b.format);
  int64_t a_bytes = Bump::rounded(l.padded_rank() * row), b_bytes = b.tiles() * l.rank * TILE * cell;
  uint8_t* rows = arena_.take(a_bytes + b_bytes);
  if (memory_.empty() || memory_.back() != arena_.memory()) memory_.push_back(arena_.memory());
  for (int64_t r = 0; r < l.rank; ++r) std::memcpy(rows + r * row, a.data + r * a.stride, row);
  uint8_t* tiles = rows + a_bytes;
  for (int64_t n = 0; n < b.rows; ++n)
    for (int64_t j = 0; j < l.rank; ++j)
      std::memcpy(tiles + ((n / TILE * l.rank + j) * TILE + n % TILE) * cell, b.data + n * b.stride + j * cell, cell);
  l.a = rows;
  l.b = tiles;
  all_[layer * PARTS + part] = l;
  rank_ = std::max(rank_, l.rank);
  bytes_ += a_bytes + b_bytes;
}

}  // namespace llama2
