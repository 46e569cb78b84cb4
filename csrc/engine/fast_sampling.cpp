#include "engine/fast_sampling.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>

namespace llama2 {
namespace {

constexpr int64_t BLOCK = 64;

// The largest of each block; false where there is NaN or +inf.
bool maxima(const float* x, int64_t n, std::vector<float>& best) {
  int bad = 0;
  for (int64_t at = 0; at < n; at += BLOCK) {
    int64_t end = std::min(n, at + BLOCK);
    float lanes[8];
    std::fill(lanes, lanes + 8, -INFINITY);
    int64_t i = at;
    for (; i + 8 <= end; i += 8)
      for (int j = 0; j < 8; ++j) {
        float v = x[i + j];
        lanes[j] = v > lanes[j] ? v : lanes[j];
        bad |= !(v <= FLT_MAX);
      }
    for (; i < end; ++i) {
      lanes[0] = std::max(lanes[0], x[i]);
      bad |= !(x[i] <= FLT_MAX);
    }
    best.push_back(*std::max_element(lanes, lanes + 8));
  }
  return !bad;
}

}  // namespace

bool shortlist(const float* x, int64_t n, const Shortlist& how, std::vector<int32_t>& ids, std::vector<double>& p) {
  ids.clear();
  p.clear();
  std::vector<float> best;
  best.reserve((n + BLOCK - 1) / BLOCK);
  constexpr float HOTTEST = 1e6f;  // above it quotients may be equal that the bound `least` does not reach
  if (!maxima(x, n, best) || how.temperature > HOTTEST || how.top_k > static_cast<int64_t>(best.size()) ||
      how.top_k > SHORTLIST_MOST)
    return false;
  // top_k blocks have a maximum of at least `least`, so the top_k-th score is no smaller. A little below it, a score
  // may become its equal in the division.
  std::vector<float> order(best);
  std::nth_element(order.begin(), order.begin() + (how.top_k - 1), order.end(), std::greater<float>());
  float least = order[how.top_k - 1];
  if (!(least >= -FLT_MAX)) return false;
  least -= std::fabs(least) * 1e-6f + FLT_MIN;
  std::vector<float> scores;
  for (size_t b = 0; b < best.size(); ++b) {
    if (best[b] < least) continue;
    for (int64_t i = b * BLOCK; i < std::min<int64_t>(n, (b + 1) * BLOCK); ++i)
      if (x[i] >= least) {
        if (ids.size() == 4 * SHORTLIST_MOST) return ids.clear(), false;
        ids.push_back(static_cast<int32_t>(i));
        scores.push_back(x[i] / how.temperature);
      }
  }
  std::vector<float> ranked(scores);
  std::nth_element(ranked.begin(), ranked.begin() + (how.top_k - 1), ranked.end(), std::greater<float>());
  float last = ranked[how.top_k - 1], top = *std::max_element(scores.begin(), scores.end());
  if (!(top <= FLT_MAX) || !(last >= -FLT_MAX)) return ids.clear(), false;
  size_t kept = 0;
  double total = 0;
  for (size_t i = 0; i < ids.size(); ++i)
    if (scores[i] >= last) {
      if (kept == SHORTLIST_MOST) return ids.clear(), p.clear(), false;
      ids[kept] = ids[i];
      p.push_back(std::exp(static_cast<double>(scores[i]) - top));
      scores[kept++] = scores[i];
      total += p.back();
    }
  ids.resize(kept);
  if (how.top_p < 1) {
    std::vector<size_t> rising(kept);
    for (size_t i = 0; i < kept; ++i) rising[i] = i;
    std::stable_sort(rising.begin(), rising.end(), [&](size_t a, size_t b) { return scores[a] < scores[b]; });
    double sum = 0, margin = shortlist_margin(kept);
    for (size_t i = 0; i + how.keep < kept; ++i) {
      sum += p[rising[i]] / total;
      if (std::fabs(sum - (1 - how.top_p)) < margin) return ids.clear(), p.clear(), false;
      if (sum > 1 - how.top_p) break;
      ids[rising[i]] = -1;
    }
  }
  size_t left = 0;
  total = 0;
  for (size_t i = 0; i < kept; ++i)
    if (ids[i] >= 0) {
      ids[left] = ids[i];
      p[left++] = p[i];
      total += p[left - 1];
    }
  ids.resize(left);
  p.resize(left);
  for (double& share : p) share /= total;
  return true;
}

}  // namespace llama2
