#include "engine/governor.h"

#include <algorithm>

namespace llama2 {
namespace {

constexpr int TRIAL = 12;            // steps
constexpr double FASTER = 0.9;       // what a trial has to take of the usual time
constexpr double RECENT = 1 / 64.0;  // weight of the last step: a trial must not be compared with one slow step
constexpr double SLEEPY = 0.5;       // share of a step asleep from which on fewer threads may be faster
constexpr double PAID = 50;          // pause, in times of what a lost trial lost
constexpr double SHORTEST = 0.05, LONGEST = 5;  // pause before a trial, seconds

}  // namespace

int Governor::team(int most, double now) {
  if (!on_trial() && counted_ >= 2 * TRIAL && now >= due_) {
    bool down = most >> (level_ + 1) && slept_ >= SLEEPY * usual_, up = level_ > 0;
    if (down && (!up || down_next_)) trial_ = level_ + 1;
    else if (up) trial_ = level_ - 1;
    if (down && up) down_next_ = !down_next_;
    steps_ = 0;
    spent_ = 0;
  }
  return most >> trial_;
}

void Governor::done(double now, double seconds, double slept) {
  if (on_trial()) {
    ++steps_;
    spent_ += seconds;
    if (steps_ == TRIAL || spent_ > (steps_ + 1) * usual_) settle(now);
    return;
  }
  double weight = std::max(RECENT, 1.0 / ++counted_);
  usual_ += weight * (seconds - usual_);
  slept_ += weight * (slept - slept_);
}

void Governor::settle(double now) {
  double mean = spent_ / steps_;
  if (steps_ == TRIAL && mean < FASTER * usual_) {
    level_ = trial_;
    usual_ = mean;
    slept_ = 0;
    counted_ = TRIAL;
    pause_ = SHORTEST;
  } else {
    double lost = std::max(0.0, spent_ - steps_ * usual_);
    pause_ = std::min(LONGEST, std::max({SHORTEST, 2 * pause_, PAID * lost}));
    trial_ = level_;
  }
  due_ = now + pause_;
}

}  // namespace llama2
