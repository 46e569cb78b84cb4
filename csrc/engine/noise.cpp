// Exponential numbers of torch's CPU generator, at a few places of a long row: its state (Matsumoto and Nishimura's
// MT19937, 624 words) is moved on past all of them, and only what is asked for becomes a number. torch draws one as
// -log1p(-u), u of 53 bits of two words.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "engine/fast_sampling.h"

namespace llama2 {
namespace {

constexpr int N = 624, M = 397;
constexpr uint32_t UPPER = 0x80000000u, LOWER = 0x7fffffffu, MATRIX = 0x9908b0dfu;

// torch's Generator.get_state(): seed, words left and whether seeded, next word, words, then what normal numbers keep.
constexpr size_t LEFT = 8, NEXT = 16, WORDS = 24, STATE = WORDS + 8 * N;

uint32_t mixed(uint32_t u, uint32_t v) { return ((u & UPPER) | (v & LOWER)) >> 1 ^ ((0u - (v & 1)) & MATRIX); }

void turn(uint32_t* s) {
  for (int i = 0; i < N - M; ++i) s[i] = s[i + M] ^ mixed(s[i], s[i + 1]);
  for (int i = N - M; i < N - 1; ++i) s[i] = s[i + M - N] ^ mixed(s[i], s[i + 1]);
  s[N - 1] = s[M - 1] ^ mixed(s[N - 1], s[0]);
}

uint32_t tempered(uint32_t y) {
  y ^= y >> 11;
  y ^= y << 7 & 0x9d2c5680u;
  y ^= y << 15 & 0xefc60000u;
  return y ^ y >> 18;
}

}  // namespace

int64_t generator_bytes() { return STATE; }

bool exponentials(uint8_t* state, int64_t total, const int64_t* places, int64_t count, float* out) {
  int32_t left;
  uint64_t next, word;
  uint32_t s[N];
  std::memcpy(&left, state + LEFT, 4);
  std::memcpy(&next, state + NEXT, 8);
  if (left < 1 || left > N || (left > 1 && next != static_cast<uint64_t>(N + 1 - left))) return false;
  for (int i = 0; i < N; ++i) {
    std::memcpy(&word, state + WORDS + 8 * i, 8);
    s[i] = static_cast<uint32_t>(word);
  }
  // A word is taken by counting `left` down; where that reaches 0 the state turns first. `at` counts words taken.
  int64_t at = 0, want = 0;
  uint32_t high = 0;
  bool half = false;
  while (at < 2 * total) {
    if (left == 1) {
      turn(s);
      left = N + 1;
      next = 0;
    }
    int64_t here = left - 1 < 2 * total - at ? left - 1 : 2 * total - at;  // words before the next turn
    for (; want < count && 2 * places[want] + (half ? 1 : 0) < at + here; ++want) {
      int64_t first = 2 * places[want] - at;
      if (!half) {
        high = tempered(s[next + first]);
        if (first + 1 >= here) {
          half = true;
          break;
        }
      }
      uint64_t bits = static_cast<uint64_t>(high) << 32 | tempered(s[next + first + 1]);
      half = false;
      double u = static_cast<double>(bits & ((uint64_t{1} << 53) - 1)) * (1.0 / 9007199254740992.0);
      out[want] = static_cast<float>(-std::log1p(-u));
    }
    at += here;
    next += static_cast<uint64_t>(here);
    left -= static_cast<int32_t>(here);
  }
  std::memcpy(state + LEFT, &left, 4);
  std::memcpy(state + NEXT, &next, 8);
  for (int i = 0; i < N; ++i) {
    word = s[i];
    std::memcpy(state + WORDS + 8 * i, &word, 8);
  }
  return want == count;
}

void permuted(uint64_t seed, int64_t size, int64_t count, int64_t* out) {
  std::mt19937 words(static_cast<uint32_t>(seed));
  std::vector<int64_t> all(size);
  std::iota(all.begin(), all.end(), 0);
  // The last one has nothing left to be swapped with, and takes no word.
  for (int64_t i = 0; i < std::min(count, size - 1); ++i) std::swap(all[i], all[i + words() % (size - i)]);
  std::copy(all.begin(), all.begin() + count, out);
}

}  // namespace llama2
