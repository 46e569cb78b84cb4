// The tokens that temperature, top-k and top-p leave, and torch's random numbers for them.
#include <nanobind/stl/vector.h>

#include "bind/bind.h"
#include "engine/fast_sampling.h"

namespace {

// For each row (ids, probabilities), or None where shortlist() has no answer.
nb::list shortlists(In2 scores, float temperature, int64_t top_k, double top_p, int64_t keep) {
  require(temperature > 0 && top_k > 0 && top_p >= 0 && top_p <= 1 && keep > 0,
          "temperature, top_k and keep are positive, top_p is in [0, 1]");
  nb::list rows;
  std::vector<int32_t> ids;
  std::vector<double> p;
  for (size_t row = 0; row < scores.shape(0); ++row) {
    int64_t vocabulary = static_cast<int64_t>(scores.shape(1));
    bool sure = vocabulary > 0 &&
                shortlist(scores.data() + row * vocabulary, vocabulary, {temperature, top_k, top_p, keep}, ids, p);
    if (sure) rows.append(nb::make_tuple(ids, p));
    else rows.append(nb::none());
  }
  return rows;
}

std::vector<float> noise(OutBytes state, int64_t total, Longs places) {
  require(static_cast<int64_t>(state.size()) >= generator_bytes(), "the state of torch's CPU generator");
  const std::vector<int64_t> own(places.data(), places.data() + places.size());
  int64_t before = -1;
  for (int64_t place : own) {
    require(place > before && place < total, "places ascend, from 0 to less than total");
    before = place;
  }
  std::vector<float> found(own.size());
  require(exponentials(state.data(), total, own.data(), static_cast<int64_t>(own.size()), found.data()),
          "the state of torch's CPU generator");
  return found;
}

void permutation(uint64_t seed, int64_t size, OutLongs out) {
  require(size < int64_t{1} << 32 && static_cast<int64_t>(out.size()) <= size, "an array of no more than size");
  permuted(seed, size, static_cast<int64_t>(out.size()), out.data());
}

}  // namespace

void bind_sampling(nb::module_& m) {
  m.def("shortlists", &shortlists);
  m.def("shortlist_margin", &shortlist_margin);
  m.def("permutation", &permutation, nb::arg("seed"), nb::arg("size"), nb::arg("out"));
  m.def("exponentials", &noise, nb::arg("state"), nb::arg("total"), nb::arg("places"));
}
