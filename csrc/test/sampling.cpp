// The tokens that temperature, top-k and top-p leave, and the numbers of torch's generator.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "engine/fast_sampling.h"
#include "test/support.h"

namespace check {
namespace {

// What the definition leaves: temperature, the top_k best, then the least likely go while their sum is at most 1 -
// top_p.
std::vector<int32_t> wanted_list(const std::vector<float>& scores, const Shortlist& how, std::vector<double>& p) {
  std::vector<int32_t> ids(scores.size());
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  std::sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  ids.resize(how.top_k);
  double top = scores[ids[0]];
  auto weight = [&](int32_t id) { return std::exp((scores[id] - top) / how.temperature); };
  auto sum = [&] {
    double all = 0;
    for (int32_t id : ids) all += weight(id);
    return all;
  };
  double all = sum(), gone = 0;
  while (static_cast<int64_t>(ids.size()) > how.keep && (gone += weight(ids.back()) / all) <= 1 - how.top_p)
    ids.pop_back();
  all = sum();
  std::sort(ids.begin(), ids.end());
  p.clear();
  for (int32_t id : ids) p.push_back(weight(id) / all);
  return ids;
}

// Every number once, and the first ones the same however many are asked for.
void check_permutation() {
  for (int64_t size : {1, 2, 5, 1000}) {
    std::vector<int64_t> all(size), some(size / 2);
    permuted(uint64_t{1} << 40 | 9, size, size, all.data());
    permuted(9, size, size / 2, some.data());  // the low 32 bits of a seed count
    expect(std::equal(some.begin(), some.end(), all.begin()), "permutation's beginning", "", size, 0, 0);
    std::sort(all.begin(), all.end());
    for (int64_t i = 0; i < size; ++i) expect(all[i] == i, "permutation", "", size, i, 0);
  }
}

void check_shortlist() {
  std::vector<int32_t> ids;
  std::vector<double> p, want_p;
  int answered = 0, asked = 0;
  for (int64_t size : {1, 7, 63, 64, 65, 961, 999, 1000, 4096})
    for (int64_t top_k : {1, 2, 12, 50})
      for (double top_p : {1.0, 0.9, 0.3})
        for (int64_t keep : {1, 3}) {
          Shortlist how{0.7f, top_k, top_p, keep};
          auto scores = values(size);
          bool sure = shortlist(scores.data(), size, how, ids, p);
          if (top_k > up(size, 64)) {  // fewer blocks than tokens
            expect(!sure && ids.empty() && p.empty(), "shortlist of few blocks", "", size, top_k, 0);
            continue;
          }
          ++asked;
          if (!sure) continue;
          ++answered;
          expect(ids == wanted_list(scores, how, want_p), "shortlist", "", size, top_k, top_p);
          double worst = 1e-6 * (p.size() != want_p.size());
          for (size_t i = 0; i < p.size() && i < want_p.size(); ++i)
            worst = std::fmax(worst, std::fabs(p[i] - want_p[i]));
          expect(worst < 1e-6, "shortlist's probabilities", "", size, top_k, worst);
        }
  expect(answered * 10 >= asked * 9, "shortlist answers", "", asked, answered, 0);
  auto refused = [&](std::vector<float> scores, Shortlist how, const char* what) {
    expect(!shortlist(scores.data(), static_cast<int64_t>(scores.size()), how, ids, p) && ids.empty() && p.empty(),
           what, "", 0, 0, 0);
  };
  auto scores = values(1000), other = scores;
  other[500] = NAN;
  refused(other, {0.7f, 12, 0.9, 1}, "shortlist of NaN");
  other[500] = INFINITY;
  refused(other, {0.7f, 12, 0.9, 1}, "shortlist of infinity");
  refused(scores, {2e6f, 12, 1, 1}, "shortlist too hot");
  other.assign(1000, -INFINITY);
  other[3] = 1;
  refused(other, {0.7f, 2, 1, 1}, "shortlist of too little");
  refused(std::vector<float>(1000, 1.0f), {0.7f, 12, 1, 1}, "shortlist of ties");
  refused(std::vector<float>(20 * 64, 1.0f), {0.7f, 12, 1, 1}, "shortlist of more ties");
  std::vector<float> equal(192, 1.0f);
  expect(
      shortlist(equal.data(), 192, {0.7f, 2, 1, 1}, ids, p) && ids.size() == 192 && std::fabs(p[191] * 192 - 1) < 1e-12,
      "shortlist of few ties", "", 0, 0, 0);
}

// Numbers of a generator at some places: the standard library has the same Mersenne twister.
void check_exponentials() {
  std::mt19937 drawn(5);
  std::vector<uint8_t> state(generator_bytes());
  auto put = [&](size_t at, uint64_t value, size_t size) { std::memcpy(state.data() + at, &value, size); };
  put(8, 1, 4);  // the next word begins a turn
  uint32_t word = 5;
  for (uint32_t i = 0; i < 624; ++i, word = 1812433253u * (word ^ word >> 30) + i) put(24 + 8 * i, word, 8);
  for (int64_t total : {1, 2, 311, 312, 313, 1, 5000, 7}) {
    std::vector<float> want, found;
    std::vector<int64_t> places;
    for (int64_t i = 0; i < total; ++i) {
      uint64_t high = drawn(), low = drawn();
      double u = static_cast<double>((high << 32 | low) & ((uint64_t{1} << 53) - 1)) / 9007199254740992.0;
      if (i % 5 && i + 1 < total) continue;
      places.push_back(i);
      want.push_back(static_cast<float>(-std::log1p(-u)));
    }
    found.resize(places.size());
    bool ok = exponentials(state.data(), total, places.data(), static_cast<int64_t>(places.size()), found.data());
    expect(ok && found == want, "exponentials", "", total, 0, 0);
  }
  std::vector<uint8_t> none(generator_bytes(), 255);
  int64_t place = 0;
  float value;
  expect(!exponentials(none.data(), 1, &place, 1, &value), "exponentials of no state", "", 0, 0, 0);
}

}  // namespace

void check_sampling() {
  rng.seed(12);
  check_shortlist();
  check_exponentials();
  check_permutation();
}

}  // namespace check
