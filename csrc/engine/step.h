// A whole forward step of a Llama model: tokens in, logits out, keys and values appended to a paged cache.
#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "engine/adapter.h"
#include "engine/governor.h"
#include "engine/pool.h"
#include "kernels/kernels.h"

namespace llama2 {

constexpr int64_t GOVERNED = 4;  // below this many tokens the number of threads is measured

struct Layer {
  const float *norm1 = nullptr, *norm2 = nullptr;
  Matrix q, k, v, o, gate, up, down;
};

struct Model {
  int64_t hidden = 0, heads = 0, kv_heads = 0, width = 0, ffn = 0, vocab = 0;
  float eps = 1e-5f;
  Matrix embed, head;
  const float* norm = nullptr;
  std::vector<Layer> layers;
  int orders = 1;  // most orders of columns among matrices that share an input
};

class KvCache {
 public:
  KvCache(KvType type, int64_t layers, int64_t heads, int64_t width, int64_t pages);
  KvLayer layer(int64_t index) const;
  int64_t layers() const { return layers_; }
  int64_t pages() const { return shape_.pages; }
  int64_t bytes() const { return (((shape_.pages - 1) >> shape_.shift) + 1) * shape_.stride; }
  void copy_page(int64_t from, int64_t to);
  void copy_page_from(const KvCache& other, int64_t from, int64_t to);  // of the same shape
  // keys and values [head][position][channel] of the first `count` positions of a sequence whose pages are `table`
  void read(int64_t layer, const int32_t* table, int64_t count, float* keys, float* values) const;
  // the same for positions past .. past + count
  void write(int64_t layer, const int32_t* table, int64_t past, int64_t count, const float* keys, const float* values);
  const KvLayer& shape() const { return shape_; }

 private:
  KvLayer shape_;
  int64_t layers_;
  std::shared_ptr<uint8_t> memory_;
};

// Tokens of sequence s are starts[s] .. starts[s+1]; its first one lands in cache slot past[s]; its pages are
// tables[s * table_width ..]. Everything is checked by the caller (bind/) before it arrives here.
struct Batch {
  int64_t tokens = 0, sequences = 0, rows = 0, table_width = 0;
  const int32_t *ids = nullptr, *positions = nullptr, *starts = nullptr, *past = nullptr, *tables = nullptr,
                *out_rows = nullptr;
  const float* inv_freq = nullptr;
  float rope_scale = 1;
  float* logits = nullptr;
  const Adapter* const* adapters = nullptr;  // [sequence], null entries for none; null where no sequence has one
};

class Runner {
 public:
  Runner(const Kernels* kernels, Pool* pool, bool exact) : kernels_(kernels), pool_(pool), exact_(exact) {}
  // false when `stop` (asked by thread 0 after every layer) said so; the cache then holds a partial step
  bool step(const Model& model, const KvCache& cache, const Batch& batch, const std::function<bool()>& stop);

 private:
  const Kernels* kernels_;
  Pool* pool_;
  bool exact_;
  std::shared_ptr<uint8_t> scratch_;
  int64_t scratch_bytes_ = 0;
  Governor governors_[GOVERNED];  // by the step's tokens
};

}  // namespace llama2
