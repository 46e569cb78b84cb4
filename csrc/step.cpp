#include "step.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "pack.h"

namespace llama2 {
namespace {

constexpr int64_t DYNAMIC = 16;    // from this many tokens on, threads take work piece by piece
constexpr int64_t ATT_TOKENS = 16; // query tokens of one piece of prefill attention

struct Range { int64_t begin, end; };

Range share(int64_t n, int part, int parts, int64_t step = 1) {
  int64_t units = (n + step - 1) / step;
  return {std::min(n, units * part / parts * step), std::min(n, units * (part + 1) / parts * step)};
}

int64_t acts_bytes(int64_t m, int64_t k) {
  int64_t kp = padded(k), mp = (m + MAX_MR - 1) / MAX_MR * MAX_MR;
  return mp * kp * (4 + 2 + 1) + mp * kp / GROUP * 20 + 8 * 64;
}

class Carver {  // hands out 64-byte aligned pieces of one allocation
 public:
  explicit Carver(uint8_t* p) : at_(reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64)) {}
  template <class T>
  T* take(int64_t n) {
    T* r = reinterpret_cast<T*>(at_);
    at_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return r;
  }
  Acts acts(int64_t m, int64_t k) {
    int64_t kp = padded(k), mp = (m + MAX_MR - 1) / MAX_MR * MAX_MR, groups = mp * kp / GROUP;
    Acts a;
    a.m = m;
    a.k = k;
    a.f32 = take<float>(mp * kp);
    a.bf16 = take<uint16_t>(mp * kp);
    a.q = take<int8_t>(mp * kp);
    a.scale = take<float>(groups);
    a.sum = take<float>(groups);
    a.negsum = take<int32_t>(groups);
    a.negsum16 = take<int32_t>(2 * groups);
    return a;
  }

 private:
  uint8_t* at_;
};

}  // namespace

KvCache::KvCache(KvType type, int64_t layers, int64_t heads, int64_t width, int64_t pages) : layers_(layers) {
  shape_.type = type;
  shape_.heads = heads;
  shape_.width = width;
  shape_.pages = pages;
  while (shape_.shift < 4 && (int64_t{1} << shape_.shift) < pages) ++shape_.shift;
  int64_t bytes = layers * heads * shape_.head_bytes();
  shape_.stride = pages >> shape_.shift ? (layers * heads | 1) * shape_.head_bytes() : bytes;  // odd: other cache sets
  memory_ = allocate(this->bytes());
}

KvLayer KvCache::layer(int64_t index) const {
  KvLayer l = shape_;
  l.data = memory_.get() + index * l.heads * l.head_bytes();
  return l;
}

void KvCache::copy_page(int64_t from, int64_t to) {
  if (from == to) return;
  for (int64_t i = 0; i < layers_; ++i) {
    KvLayer l = layer(i);
    for (int64_t h = 0; h < l.heads; ++h) {
      std::memcpy(l.key_page(h, to), l.key_page(h, from), l.key_bytes());
      std::memcpy(l.value_page(h, to), l.value_page(h, from), l.value_bytes());
    }
  }
}

namespace {

class Step {  // one step as every thread sees it
 public:
  Step(const Kernels* k, Pool* pool, bool exact, const Model& m, const KvCache& cache, const Batch& b, uint8_t* memory)
      : k_(k), pool_(pool), exact_(exact), m_(m), cache_(cache), b_(b), M_(b.tokens), counters_(m.layers.size() * 5 + 1) {
    Carver c(memory);
    int64_t D = m.hidden, A = m.heads * m.width, KV = m.kv_heads * m.width;
    x_ = c.take<float>(M_ * D);
    normed_ = c.take<float>(std::max(M_, b.rows) * D);
    q_ = c.take<float>(M_ * A);
    kn_ = c.take<float>(M_ * KV);
    vn_ = c.take<float>(M_ * KV);
    attn_ = c.take<float>(M_ * A);
    ffn_ = c.take<float>(M_ * m.ffn);
    cos_ = c.take<float>(M_ * m.width / 2);
    sin_ = c.take<float>(M_ * m.width / 2);
    int copies = alone() ? pool->size() : 1;
    for (int i = 0; i < copies; ++i) {
      narrow_.push_back(c.acts(std::max(M_, b.rows), D));
      middle_.push_back(c.acts(M_, A));
      wide_.push_back(c.acts(M_, m.ffn));
      private_norm_.push_back(alone() ? c.take<float>(D) : normed_);
    }
    for (int i = 0; i < pool->size(); ++i) att_scratch_.push_back(c.take<float>(attention_scratch(m.width + 16)));
    for (auto& n : counters_) n.store(0, std::memory_order_relaxed);
    single_ = true;
    for (int64_t s = 0; s < b.sequences; ++s) single_ = single_ && b.starts[s + 1] - b.starts[s] == 1;
  }

  static int64_t bytes(const Model& m, const Batch& b, int threads) {
    int64_t M = std::max(b.tokens, b.rows), A = m.heads * m.width, KV = m.kv_heads * m.width;
    int64_t floats = M * (2 * m.hidden + 2 * A + 2 * KV + m.ffn + m.width) + threads * attention_scratch(m.width + 16);
    int64_t acts = acts_bytes(M, m.hidden) + acts_bytes(M, A) + acts_bytes(M, m.ffn) + 4 * m.hidden + 64;
    return floats * 4 + (b.tokens == 1 && b.rows <= 1 ? threads : 1) * acts + 64 * (32 + threads);
  }

  bool run(int tid, const std::function<bool()>& stop) {
    embed(tid);
    pool_->barrier();
    for (size_t i = 0; i < m_.layers.size(); ++i) {
      layer(tid, i);
      if (tid == 0 && stop()) stopped_.store(true, std::memory_order_relaxed);
      pool_->barrier();
      if (stopped_.load(std::memory_order_relaxed)) return false;
    }
    if (b_.rows) logits(tid);
    return true;
  }

 private:
  bool alone() const { return M_ == 1 && b_.rows <= 1; }  // so little work that each thread repeats the small parts

  int form(const Matrix& w) const {
    if (w.format == Format::BF16) return exact_ ? FORM_F32 : FORM_BF16;
    return row_major(w.format) || exact_ ? FORM_F32 : FORM_INT8;
  }

  void embed(int tid) {
    Range r = share(M_, tid, pool_->size());
    int64_t half = m_.width / 2;
    for (int64_t t = r.begin; t < r.end; ++t) {
      k_->dequantize_row(m_.embed, b_.ids[t], x_ + t * m_.hidden);
      for (int64_t i = 0; i < half; ++i) {
        float angle = static_cast<float>(b_.positions[t]) * b_.inv_freq[i];
        cos_[t * half + i] = std::cos(angle) * b_.rope_scale;
        sin_[t * half + i] = std::sin(angle) * b_.rope_scale;
      }
    }
  }

  // x (tokens apart by ldx) to the forms wanted; ends with a barrier unless every thread has its own copy
  const Acts& prepare(int tid, std::vector<Acts>& to, const float* x, int64_t ldx, int64_t m, int forms) {
    if (alone()) {
      to[tid].m = m;
      k_->prepare(x, ldx, 0, m, forms, to[tid]);
      return to[tid];
    }
    Acts a = to[0];
    a.m = m;
    Range r = share(m, tid, pool_->size(), MAX_MR);
    if (r.begin < r.end) k_->prepare(x, ldx, r.begin, r.end, forms, a);
    pool_->barrier();
    return to[0];
  }

  const Acts& norm(int tid, const float* weight, int forms) {
    float* out = private_norm_[alone() ? tid : 0];
    Range r = alone() ? Range{0, M_} : share(M_, tid, pool_->size(), MAX_MR);
    for (int64_t t = r.begin; t < r.end; ++t) k_->rmsnorm(x_ + t * m_.hidden, weight, m_.eps, m_.hidden, out + t * m_.hidden);
    return prepare(tid, narrow_, out, m_.hidden, M_, forms);
  }

  void piece(const Job* jobs, int count, const Acts& x, int64_t begin, int64_t end) {
    for (int j = 0; j < count && begin < end; ++j) {
      int64_t tiles = jobs[j].w->tiles();
      if (begin < tiles) k_->matmul(jobs[j], x, begin, std::min(end, tiles), exact_);
      begin = std::max<int64_t>(0, begin - tiles);
      end -= tiles;
    }
  }

  void matmul(int tid, const Job* jobs, int count, const Acts& x, std::atomic<int64_t>& next) {
    int64_t tiles = 0;
    for (int j = 0; j < count; ++j) tiles += jobs[j].w->tiles();
    if (x.m < DYNAMIC || pool_->size() == 1) {
      Range r = share(tiles, tid, pool_->size(), 2);
      return piece(jobs, count, x, r.begin, r.end);
    }
    int64_t chunk = std::max<int64_t>(2, tiles / (pool_->size() * 16) / 2 * 2);
    for (int64_t t; (t = next.fetch_add(chunk, std::memory_order_relaxed)) < tiles;)
      piece(jobs, count, x, t, std::min(tiles, t + chunk));
  }

  void rope_and_store(const KvLayer& kv, int64_t s, int64_t t, int64_t head) {
    int64_t W = m_.width, group = m_.heads / m_.kv_heads, slot = b_.past[s] + t - b_.starts[s];
    const float *cos = cos_ + t * W / 2, *sin = sin_ + t * W / 2;
    float* k = kn_ + (t * m_.kv_heads + head) * W;
    k_->rope(q_ + (t * m_.heads + head * group) * W, cos, sin, group, W);
    k_->rope(k, cos, sin, 1, W);
    int32_t page = b_.tables[s * b_.table_width + slot / PAGE];
    k_->kv_store(kv, k, vn_ + (t * m_.kv_heads + head) * W, head, page, static_cast<int>(slot % PAGE));
  }

  void attend(int tid, const KvLayer& kv, int64_t s, int64_t t0, int64_t t1, int64_t head) {
    int64_t group = m_.heads / m_.kv_heads, at = (t0 * m_.heads + head * group) * m_.width;
    AttentionTask a;
    a.q = q_ + at;
    a.out = attn_ + at;
    a.ldq = a.ldo = m_.heads * m_.width;
    a.tokens = static_cast<int>(t1 - t0);
    a.group = static_cast<int>(group);
    a.first = b_.past[s] + t0 - b_.starts[s];
    a.table = b_.tables + s * b_.table_width;
    a.kv_head = head;
    a.scale = 1.0f / std::sqrt(static_cast<float>(m_.width));
    k_->attention(kv, a, att_scratch_[tid]);
  }

  void attention(int tid, size_t index) {
    KvLayer kv = cache_.layer(static_cast<int64_t>(index));
    int64_t heads = m_.kv_heads;
    if (single_) {  // decode: whoever holds a head rotates, stores and attends it, with no barrier between
      Range r = share(b_.sequences * heads, tid, pool_->size());
      for (int64_t i = r.begin; i < r.end; ++i) {
        rope_and_store(kv, i / heads, b_.starts[i / heads], i % heads);
        attend(tid, kv, i / heads, b_.starts[i / heads], b_.starts[i / heads] + 1, i % heads);
      }
      return;
    }
    for (int64_t s = 0; s < b_.sequences; ++s)
      for (int64_t t = b_.starts[s]; t < b_.starts[s + 1]; ++t)
        if ((s + (b_.past[s] + t - b_.starts[s]) / PAGE) % pool_->size() == tid)  // a page is one thread's
          for (int64_t h = 0; h < heads; ++h) rope_and_store(kv, s, t, h);
    pool_->barrier();
    std::atomic<int64_t>& next = counters_[index * 5 + 4];
    int64_t mine = next.fetch_add(1, std::memory_order_relaxed), item = 0;
    for (int64_t s = 0; s < b_.sequences; ++s)
      for (int64_t t = b_.starts[s]; t < b_.starts[s + 1]; t += ATT_TOKENS)
        for (int64_t h = 0; h < heads; ++h, ++item)
          if (item == mine) {
            attend(tid, kv, s, t, std::min<int64_t>(b_.starts[s + 1], t + ATT_TOKENS), h);
            mine = next.fetch_add(1, std::memory_order_relaxed);
          }
  }

  void layer(int tid, size_t index) {
    const Layer& l = m_.layers[index];
    int64_t D = m_.hidden, A = m_.heads * m_.width, KV = m_.kv_heads * m_.width;
    std::atomic<int64_t>* next = &counters_[index * 5];

    const Acts& in = norm(tid, l.norm1, form(l.q) | form(l.k) | form(l.v));
    Job qkv[3] = {{&l.q, nullptr, q_, A, Epilogue::STORE}, {&l.k, nullptr, kn_, KV, Epilogue::STORE},
                  {&l.v, nullptr, vn_, KV, Epilogue::STORE}};
    matmul(tid, qkv, 3, in, next[0]);
    pool_->barrier();
    attention(tid, index);
    pool_->barrier();
    const Acts& seen = prepare(tid, middle_, attn_, A, M_, form(l.o));
    Job o{&l.o, nullptr, x_, D, Epilogue::ADD};
    matmul(tid, &o, 1, seen, next[1]);
    pool_->barrier();

    const Acts& mid = norm(tid, l.norm2, form(l.gate) | form(l.up));
    Job gated{&l.gate, &l.up, ffn_, m_.ffn, Epilogue::SWIGLU};
    matmul(tid, &gated, 1, mid, next[2]);
    pool_->barrier();
    const Acts& wide = prepare(tid, wide_, ffn_, m_.ffn, M_, form(l.down));
    Job down{&l.down, nullptr, x_, D, Epilogue::ADD};
    matmul(tid, &down, 1, wide, next[3]);
  }

  void logits(int tid) {
    int64_t D = m_.hidden;
    float* out = private_norm_[alone() ? tid : 0];
    Range r = alone() ? Range{0, b_.rows} : share(b_.rows, tid, pool_->size(), MAX_MR);
    for (int64_t i = r.begin; i < r.end; ++i)
      k_->rmsnorm(x_ + b_.out_rows[i] * D, m_.norm, m_.eps, D, out + i * D);
    Acts a = prepare(tid, narrow_, out, D, b_.rows, form(m_.head));
    a.m = b_.rows;
    Job head{&m_.head, nullptr, b_.logits, m_.vocab, Epilogue::STORE};
    matmul(tid, &head, 1, a, counters_[m_.layers.size() * 5]);
  }

  const Kernels* k_;
  Pool* pool_;
  bool exact_;
  const Model& m_;
  const KvCache& cache_;
  const Batch& b_;
  int64_t M_;
  bool single_ = false;
  float *x_, *normed_, *q_, *kn_, *vn_, *attn_, *ffn_, *cos_, *sin_;
  std::vector<Acts> narrow_, middle_, wide_;
  std::vector<float*> private_norm_, att_scratch_;
  std::vector<std::atomic<int64_t>> counters_;
  std::atomic<bool> stopped_{false};
};

}  // namespace

bool Runner::step(const Model& model, const KvCache& cache, const Batch& batch, const std::function<bool()>& stop) {
  int64_t need = Step::bytes(model, batch, pool_->size());
  if (scratch_bytes_ < need) {
    scratch_ = allocate(need);
    scratch_bytes_ = need;
  }
  Step step(kernels_, pool_, exact_, model, cache, batch, scratch_.get());
  std::atomic<bool> complete{true};
  pool_->run([&](int tid) {
    if (!step.run(tid, stop)) complete.store(false, std::memory_order_relaxed);
  });
  return complete.load();
}

}  // namespace llama2
