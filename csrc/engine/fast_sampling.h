// The tokens that temperature, top-k and top-p leave of one row of scores, and their probabilities.
#pragma once
#include <cstdint>
#include <vector>

namespace llama2 {

struct Shortlist {
  float temperature;
  int64_t top_k;
  double top_p;  // 1: all that top_k leaves
  int64_t keep;  // tokens that top_p never drops
};

constexpr int64_t SHORTLIST_MOST = 256;  // tokens; where ties leave more, there is no answer

// Ids in ascending order with their probabilities. False, and nothing in them, where another order of rounding could
// leave other tokens, and for scores with NaN, +inf or fewer than top_k above -inf.
bool shortlist(const float* scores, int64_t vocabulary, const Shortlist& how, std::vector<int32_t>& ids,
               std::vector<double>& p);

// How far probabilities and their sums over n tokens in float32 may be from those of shortlist().
inline double shortlist_margin(int64_t n) { return static_cast<double>(n + 8) / (1 << 22); }

// Moves the state of torch's CPU generator (Generator.get_state(), generator_bytes() or more) on past `total`
// exponential numbers and writes those at `places`, ascending and below total. False, and nothing changed, for a state
// that is none.
int64_t generator_bytes();
bool exponentials(uint8_t* state, int64_t total, const int64_t* places, int64_t count, float* out);

// The first `count` of torch's random permutation of 0 to size - 1 (torch.randperm) with a generator of this seed.
void permuted(uint64_t seed, int64_t size, int64_t count, int64_t* out);

}  // namespace llama2
