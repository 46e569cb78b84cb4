// How many threads the steps of one size get.
//
// A step of few tokens has some five barriers a layer. Where another process has one of the cores, every barrier may
// last until that core comes back, milliseconds later, and fewer threads are faster. Which number is fastest is
// measured: a trial runs a few steps with half or twice the threads. Less is tried only where threads sleep in barriers
// for a share of the step, so a quiet machine has no trials; a trial that loses is paid for by a pause of many times
// what it lost.
#pragma once
#include <cstdint>

namespace llama2 {

class Governor {
 public:
  // threads of the step that begins `now` (seconds of any steady clock), of `most`, the same for every step
  int team(int most, double now);
  // the step that `team` was asked for took `seconds`, `slept` of which a thread slept in barriers, of several threads
  // the sum
  void done(double now, double seconds, double slept);

 private:
  bool on_trial() const { return trial_ != level_; }
  void settle(double now);

  int level_ = 0, trial_ = 0;     // halvings of the threads: as is usual now, and of the step that runs
  bool down_next_ = true;         // where both directions are open
  int steps_ = 0;                 // of the trial so far
  double spent_ = 0;              // seconds of these
  int64_t counted_ = 0;           // steps of the usual level in the next two, up to a bound
  double usual_ = 0, slept_ = 0;  // of a step of the usual level: seconds in all and asleep, recent ones counting more
  double due_ = 0, pause_ = 0;    // when the next trial may begin, and how long it was waited for
};

}  // namespace llama2
