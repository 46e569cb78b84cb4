#include "engine/step.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "engine/memory.h"

namespace llama2 {
namespace {

constexpr int64_t DYNAMIC = 16;         // from this many tokens on, threads take work piece by piece
constexpr int64_t FETCHED = 128 << 10;  // bytes of the next weights that a waiting thread brings in
constexpr int64_t STEALABLE = 2 << 20;  // bytes a thread from which on the end of a product is shared by demand
constexpr int64_t PIECE = 128 << 10;    // bytes of such a piece: shorter ones end before the hardware has prefetched
constexpr int64_t ATT_TOKENS = 16;      // query tokens of one piece of prefill attention
constexpr int SHARED = 3;               // linears that share an input, at most: q, k and v

struct Range {
  int64_t begin, end;
};

Range share(int64_t n, int part, int parts, int64_t step = 1) {
  int64_t units = (n + step - 1) / step;
  return {std::min(n, units * part / parts * step), std::min(n, units * (part + 1) / parts * step)};
}

class Ahead {  // the lines of a matrix from a tile on, fetched a few at a time, as far as a cache holds them meanwhile
 public:
  Ahead(const Matrix* w, int64_t tile) {
    if (!w || tile >= w->tiles()) return;
    at_ = w->data + tile * w->stride * (row_major(w->format) ? TILE : 1);
    int64_t rows = row_major(w->format) ? w->rows - tile * TILE : w->tiles() - tile;
    end_ = at_ + std::min(rows * w->stride, FETCHED);
  }
  void fetch() {
    for (int i = 0; i < 4 && at_ < end_; ++i, at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const uint8_t *at_ = nullptr, *end_ = nullptr;
};

class Step {  // one step as every thread sees it
 public:
  Step(const Kernels* k, Pool* pool, int threads, bool exact, const Model& m, const KvCache& cache, const Batch& b,
       uint8_t* memory)
      : k_(k),
        pool_(pool),
        threads_(threads),
        exact_(exact),
        m_(m),
        cache_(cache),
        b_(b),
        M_(b.tokens),
        counters_(m.layers.size() * 5 + 1) {
    Bump c(memory);
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
    int copies = alone() ? threads : 1;
    for (int i = 0; i < copies; ++i) {
      narrow_.push_back(lay_out(c, std::max(M_, b.rows), D));
      middle_.push_back(lay_out(c, M_, A));
      wide_.push_back(lay_out(c, M_, m.ffn));
      private_norm_.push_back(alone() ? c.take<float>(D) : normed_);
    }
    for (int i = copies; i < copies * m.orders; ++i) narrow_.push_back(lay_out(c, std::max(M_, b.rows), D));
    for (int i = 0; i < threads; ++i) att_scratch_.push_back(c.take<float>(attention_scratch(m.width + 16)));
    if (b.adapters) plan_adapters(c);
    for (auto& n : counters_) n.store(0, std::memory_order_relaxed);
    single_ = true;
    for (int64_t s = 0; s < b.sequences; ++s) single_ = single_ && b.starts[s + 1] - b.starts[s] == 1;
  }

  static int64_t bytes(const Model& m, const Batch& b, int threads) {
    int64_t M = std::max(b.tokens, b.rows), A = m.heads * m.width, KV = m.kv_heads * m.width;
    int64_t floats = M * (2 * m.hidden + 2 * A + 2 * KV + m.ffn + m.width) + threads * attention_scratch(m.width + 16);
    int64_t acts = m.orders * acts_bytes(M, m.hidden) + acts_bytes(M, A) + acts_bytes(M, m.ffn) + 4 * m.hidden + 64;
    int64_t shrunk = SHARED * b.tokens * largest_rank(b) * 4;
    return floats * 4 + shrunk + (b.tokens == 1 && b.rows <= 1 ? threads : 1) * acts + 64 * (36 + threads);
  }

  bool run(int tid, const std::function<bool()>& stop) {
    embed(tid);
    pool_->barrier();
    for (size_t i = 0; i < m_.layers.size(); ++i) {
      layer(tid, i);
      if (tid == 0 && stop()) stopped_.store(true, std::memory_order_relaxed);
      meet(tid, i + 1 < m_.layers.size() ? qkv(i + 1) : head());
      if (stopped_.load(std::memory_order_relaxed)) return false;
    }
    if (b_.rows) logits(tid);
    return true;
  }

 private:
  bool alone() const { return M_ == 1 && b_.rows <= 1; }  // so little work that each thread repeats the small parts

  int form(const Matrix& w) const { return form_of(w.format, exact_); }

  void embed(int tid) {
    Range r = share(M_, tid, threads_);
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

  struct Inputs {  // the activations of each matrix of a product, those of one order being the same
    Acts of[3];
  };

  // x (tokens apart by ldx) in every order of columns and form that the matrices want; ends with a barrier unless every
  // thread has its own copy
  Inputs prepare(int tid, const std::vector<Acts>& sets, const float* x, int64_t ldx, int64_t m,
                 std::initializer_list<const Matrix*> ws) {
    Inputs in;
    int slots = 0, forms[3] = {}, at = 0;
    Acts to[3];
    for (const Matrix* w : ws) {
      int s = 0;
      while (s < slots && to[s].order != w->order) ++s;
      if (s == slots) {
        to[s] = sets[alone() ? static_cast<size_t>(s * threads_ + tid) : static_cast<size_t>(s)];
        to[s].m = m;
        to[s].order = w->order;
        ++slots;
      }
      forms[s] |= form(*w);
      in.of[at++] = to[s];
    }
    Range r = alone() ? Range{0, m} : share(m, tid, threads_, MAX_MR);
    for (int s = 0; s < slots && r.begin < r.end; ++s) k_->prepare(x, ldx, r.begin, r.end, forms[s], to[s]);
    if (!alone()) pool_->barrier();
    return in;
  }

  Inputs norm(int tid, const float* weight, std::initializer_list<const Matrix*> ws) {
    float* out = private_norm_[alone() ? tid : 0];
    Range r = alone() ? Range{0, M_} : share(M_, tid, threads_, MAX_MR);
    for (int64_t t = r.begin; t < r.end; ++t)
      k_->rmsnorm(x_ + t * m_.hidden, weight, m_.eps, m_.hidden, out + t * m_.hidden);
    return prepare(tid, narrow_, out, m_.hidden, M_, ws);
  }

  static int64_t largest_rank(const Batch& b) {
    int64_t rank = 0;
    for (int64_t s = 0; b.adapters && s < b.sequences; ++s)
      if (b.adapters[s]) rank = std::max(rank, (b.adapters[s]->rank() + 3) / 4 * 4);
    return rank;
  }

  void plan_adapters(Bump& c) {
    std::vector<const LowRank*> used;
    adapter_of_.resize(M_);
    for (int64_t s = 0; s < b_.sequences; ++s) {
      const LowRank* all = b_.adapters[s] ? b_.adapters[s]->all() : nullptr;
      std::fill(&adapter_of_[b_.starts[s]], &adapter_of_[0] + b_.starts[s + 1], all);
      if (all && std::find(used.begin(), used.end(), all) == used.end()) used.push_back(all);
    }
    for (const LowRank* all : used)
      for (int64_t t = 0, n = 0; t < M_; ++t)
        if (adapter_of_[t] == all) {
          if (n++ % DYNAMIC == 0) groups_.push_back({all, {}});
          groups_.back().tokens.push_back(static_cast<int32_t>(t));
        }
    rank_ = largest_rank(b_);
    for (float*& t : shrunk_) t = c.take<float>(M_ * rank_);
    addends_.resize(m_.layers.size() * PARTS);
    const int slot[PARTS] = {0, 1, 2, 0, 0, 1, 0};  // among the linears that share an input
    for (size_t i = 0; i < addends_.size(); ++i)
      for (const LowRank* all : used)
        if (all[i].rank) addends_[i] = {adapter_of_.data(), static_cast<int64_t>(i), shrunk_[slot[i % PARTS]], rank_};
  }

  // what the step's adapters add to a linear, or null
  const Addend* low(size_t layer, Part part) const {
    return addends_.empty() || !addends_[layer * PARTS + part].adapters ? nullptr : &addends_[layer * PARTS + part];
  }

  // scale * A x of the linears first .. last, which share the input x; true if there were any, and a barrier must
  // follow
  bool shrink(int tid, size_t layer, Part first, Part last, const float* x, int64_t ldx) {
    bool any = false;
    for (int part = first; part <= last; ++part) {
      const Addend* d = low(layer, static_cast<Part>(part));
      if (!d) continue;
      any = true;
      int64_t item = part - first;
      for (const Group& g : groups_)
        for (int64_t row = 0; row < g.all[d->index].rank; row += 4)
          if (item++ % threads_ == tid)
            k_->shrink(g.all[d->index], x, ldx, g.tokens.data(), g.tokens.size(), row, shrunk_[part - first], rank_);
    }
    return any;
  }

  // Matrices that share an input, as one range of tiles; `next` hands pieces of it to threads that share it by demand.
  struct Product {
    Job jobs[3];
    int count;
    std::atomic<int64_t>* next;
    int64_t tiles() const {
      int64_t n = 0;
      for (int j = 0; j < count; ++j) n += jobs[j].w->tiles();
      return n;
    }
  };

  Product qkv(size_t i) {
    const Layer& l = m_.layers[i];
    int64_t A = m_.heads * m_.width, KV = m_.kv_heads * m_.width;
    return {{{&l.q, nullptr, q_, A, Epilogue::STORE, low(i, Q)},
             {&l.k, nullptr, kn_, KV, Epilogue::STORE, low(i, K)},
             {&l.v, nullptr, vn_, KV, Epilogue::STORE, low(i, V)}},
            3,
            &counters_[i * 5]};
  }
  Product out(size_t i) {
    return {{{&m_.layers[i].o, nullptr, x_, m_.hidden, Epilogue::ADD, low(i, O)}}, 1, &counters_[i * 5 + 1]};
  }
  Product gated(size_t i) {
    const Layer& l = m_.layers[i];
    return {{{&l.gate, &l.up, ffn_, m_.ffn, Epilogue::SWIGLU, low(i, GATE), low(i, UP)}}, 1, &counters_[i * 5 + 2]};
  }
  Product down(size_t i) {
    return {{{&m_.layers[i].down, nullptr, x_, m_.hidden, Epilogue::ADD, low(i, DOWN)}}, 1, &counters_[i * 5 + 3]};
  }
  Product head() {
    return {{{&m_.head, nullptr, b_.logits, m_.vocab, Epilogue::STORE}}, 1, &counters_[m_.layers.size() * 5]};
  }

  bool by_demand(int64_t tokens) const { return tokens >= DYNAMIC && threads_ > 1; }

  void piece(const Product& p, const Inputs& x, int64_t begin, int64_t end) {
    for (int j = 0; j < p.count && begin < end; ++j) {
      int64_t tiles = p.jobs[j].w->tiles();
      Job job = p.jobs[j];
      if (job.w1) job.x1 = &x.of[1];
      if (begin < tiles) k_->matmul(job, x.of[j], begin, std::min(end, tiles), exact_);
      begin = std::max<int64_t>(0, begin - tiles);
      end -= tiles;
    }
  }

  // Tiles at the end of a product of few tokens that go to whoever comes first: an eighth where the product is large,
  // because threads that share a memory link are never equally fast; none where a piece would cost more than the wait.
  int64_t loose(const Product& p, int64_t tiles) const {
    return threads_ == 1 || tiles * tile_size(p) < STEALABLE * threads_ ? 0 : tiles / 8 / 4 * 4;
  }

  static int64_t tile_size(const Product& p) {
    const Matrix* w = p.jobs[0].w;
    return w->stride * (row_major(w->format) ? TILE : 1);
  }

  void matmul(int tid, const Product& p, const Inputs& x) {
    int64_t tiles = p.tiles(), fixed = 0, chunk = std::max<int64_t>(2, PIECE / tile_size(p) / 2 * 2);
    if (by_demand(x.of[0].m)) {
      chunk = std::max<int64_t>(2, tiles / (threads_ * 16) / 2 * 2);
    } else {
      fixed = tiles - loose(p, tiles);
      Range r = share(fixed, tid, threads_, 2);
      piece(p, x, r.begin, r.end);
      if (fixed == tiles) return;
    }
    for (int64_t t; (t = fixed + p.next->fetch_add(chunk, std::memory_order_relaxed)) < tiles;)
      piece(p, x, t, std::min(tiles, t + chunk));
  }

  // A barrier whose waiting time brings the first weights of this thread's share of `next` into its second-level cache.
  void meet(int tid, const Product& next) {
    if (by_demand(M_)) return pool_->barrier();
    int64_t tile = share(next.tiles() - loose(next, next.tiles()), tid, threads_, 2).begin;
    const Job* job = next.jobs;
    while (tile >= job->w->tiles() && job + 1 < next.jobs + next.count) tile -= (job++)->w->tiles();
    Ahead streams[2] = {Ahead(job->w, tile), Ahead(job->w1, tile)};
    pool_->barrier([&] {
      streams[0].fetch();
      streams[1].fetch();
    });
    for (int i = 0; i < 3; ++i) {
      streams[0].fetch();
      streams[1].fetch();
    }
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
      Range r = share(b_.sequences * heads, tid, threads_);
      for (int64_t i = r.begin; i < r.end; ++i) {
        rope_and_store(kv, i / heads, b_.starts[i / heads], i % heads);
        attend(tid, kv, i / heads, b_.starts[i / heads], b_.starts[i / heads] + 1, i % heads);
      }
      return;
    }
    for (int64_t s = 0; s < b_.sequences; ++s)
      for (int64_t t = b_.starts[s]; t < b_.starts[s + 1]; ++t)
        if ((s + (b_.past[s] + t - b_.starts[s]) / PAGE) % threads_ == tid)  // a page is one thread's
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
    int64_t D = m_.hidden, A = m_.heads * m_.width;
    Inputs in = norm(tid, l.norm1, {&l.q, &l.k, &l.v});
    if (shrink(tid, index, Q, V, private_norm_[alone() ? tid : 0], D)) pool_->barrier();
    matmul(tid, qkv(index), in);
    meet(tid, out(index));
    attention(tid, index);
    meet(tid, out(index));
    bool adapted = shrink(tid, index, O, O, attn_, A);
    in = prepare(tid, middle_, attn_, A, M_, {&l.o});
    if (adapted && alone()) pool_->barrier();  // else prepare has ended with one
    matmul(tid, out(index), in);
    meet(tid, gated(index));

    in = norm(tid, l.norm2, {&l.gate, &l.up});
    if (shrink(tid, index, GATE, UP, private_norm_[alone() ? tid : 0], D)) pool_->barrier();
    matmul(tid, gated(index), in);
    meet(tid, down(index));
    adapted = shrink(tid, index, DOWN, DOWN, ffn_, m_.ffn);
    in = prepare(tid, wide_, ffn_, m_.ffn, M_, {&l.down});
    if (adapted && alone()) pool_->barrier();
    matmul(tid, down(index), in);
  }

  void logits(int tid) {
    int64_t D = m_.hidden;
    float* out = private_norm_[alone() ? tid : 0];
    Range r = alone() ? Range{0, b_.rows} : share(b_.rows, tid, threads_, MAX_MR);
    for (int64_t i = r.begin; i < r.end; ++i) k_->rmsnorm(x_ + b_.out_rows[i] * D, m_.norm, m_.eps, D, out + i * D);
    matmul(tid, head(), prepare(tid, narrow_, out, D, b_.rows, {&m_.head}));
  }

  const Kernels* k_;
  Pool* pool_;
  int threads_;
  bool exact_;
  const Model& m_;
  const KvCache& cache_;
  const Batch& b_;
  int64_t M_;
  bool single_ = false;
  float *x_, *normed_, *q_, *kn_, *vn_, *attn_, *ffn_, *cos_, *sin_;
  std::vector<Acts> narrow_, middle_, wide_;
  std::vector<float*> private_norm_, att_scratch_;
  std::vector<const LowRank*> adapter_of_;  // [token]
  struct Group {                            // tokens that read A together
    const LowRank* all;
    std::vector<int32_t> tokens;
  };
  std::vector<Group> groups_;
  std::vector<Addend> addends_;  // [layer][part], or empty
  float* shrunk_[SHARED] = {};
  int64_t rank_ = 0;
  std::vector<std::atomic<int64_t>> counters_;
  std::atomic<bool> stopped_{false};
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

bool Runner::step(const Model& model, const KvCache& cache, const Batch& batch, const std::function<bool()>& stop) {
  // With more tokens a step is longer beside its barriers, and all threads are worth having.
  Governor* governor = batch.tokens < GOVERNED ? &governors_[batch.tokens] : nullptr;
  double begun = now();
  int threads = governor ? governor->team(pool_->size(), begun) : pool_->size();
  int64_t need = Step::bytes(model, batch, threads);
  if (scratch_bytes_ < need) {
    scratch_ = allocate(need);
    scratch_bytes_ = need;
  }
  double slept = pool_->slept();
  Step step(kernels_, pool_, threads, exact_, model, cache, batch, scratch_.get());
  std::atomic<bool> complete{true};
  pool_->run(
      [&](int tid) {
        if (!step.run(tid, stop)) complete.store(false, std::memory_order_relaxed);
      },
      threads);
  double ended = now();
  if (governor) governor->done(ended, ended - begun, pool_->slept() - slept);
  return complete.load();
}

}  // namespace llama2
