#include "engine/governor.h"

#include <algorithm>

namespace llama2 {
namespace {

constexpr int TRIAL = 3;                        // steps
constexpr double FASTER = 0.9;                  // what a trial has to take of the usual time
constexpr double RECENT = 0.2;                  // weight of the last step
constexpr double SLEEPY = 0.2;                  // share of a step asleep from which on fewer threads may be faster
constexpr double PAID = 50;                     // pause, in times of what a lost trial lost
constexpr double SHORTEST = 0.05, LONGEST = 5;  // pause before a trial, seconds

}  // namespace

int Governor::team(int most, double now) {
  for (lowest_ = 0; most >> (lowest_ + 1); ++lowest_) {}
  level_ = std::min(level_, lowest_);
  if (!on_trial() && usual_ > 0 && now >= due_) {
    bool down = level_ < lowest_ && slept_ >= SLEEPY * usual_, up = level_ > 0;
    if (down && (!up || down_next_)) trial_ = level_ + 1;
    else if (up) trial_ = level_ - 1;
    if (down && up) down_next_ = !down_next_;
    steps_ = 0;
    spent_ = 0;
  }
  trial_ = std::min(trial_, lowest_);
  return std::max(1, most >> trial_);
}

void Governor::done(double now, double seconds, double slept) {
  if (on_trial()) {
    ++steps_;
    spent_ += seconds;
    if (steps_ == TRIAL || spent_ > (steps_ + 1) * usual_) settle(now);
    return;
  }
  usual_ = usual_ > 0 ? usual_ + RECENT * (seconds - usual_) : seconds;
  slept_ += RECENT * (slept - slept_);
}

void Governor::settle(double now) {
  double mean = spent_ / steps_;
  if (steps_ == TRIAL && mean < FASTER * usual_) {
    level_ = trial_;
    usual_ = mean;
    slept_ = 0;
    pause_ = SHORTEST;
  } else {
    double lost = std::max(0.0, spent_ - steps_ * usual_);
    pause_ = std::min(LONGEST, std::max({SHORTEST, 2 * pause_, PAID * lost}));
    trial_ = level_;
  }
  due_ = now + pause_;
}

}  // namespace llama2
