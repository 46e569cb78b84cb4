// What the files of this folder share. They alone know Python, and every size and index is checked in them, before
// memory is touched.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <memory>
#include <string>
#include <typeinfo>
#include <vector>

#include "engine/memory.h"
#include "kernels/kernels.h"

namespace nb = nanobind;
using namespace llama2;

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints2 = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutLongs = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out3 = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using In3 = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using In2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Halves = nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Signed = nb::ndarray<const int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

inline void require(bool ok, const std::string& message) {
  if (!ok) throw nb::value_error(message.c_str());
}

inline std::string str(int64_t n) { return std::to_string(n); }

// An argument that is kept as an object, as what it must be. Throws TypeError where it is something else.
template <class T>
T as(nb::handle object, const std::string& what) {
  try {
    return nb::cast<T>(object);
  } catch (const std::bad_cast&) { throw nb::type_error((what + " is of another type").c_str()); }
}

struct PyMatrix {
  Matrix m;
  std::shared_ptr<uint8_t> memory;               // packed weights
  std::vector<std::shared_ptr<uint8_t>> shared;  // tables and orders, which other matrices may share
  nb::object owner;                              // what the data belong to, when not to us
  std::vector<nb::object> biases;  // every one that was set: a model may have been made with an earlier one
};

// The kernels of an instruction set by name, or the best for "auto".
inline const Kernels* isa(const std::string& name) {
  const Kernels* k = name == "auto" ? best_kernels() : find_kernels(name.c_str());
  require(k != nullptr, "instruction set '" + name + "' is not in this build or not on this machine");
  return k;
}

// The caller's thread is not the only one that may write into an array: what is checked is a copy, and the copy is
// used.
inline std::vector<int32_t> copied(const int32_t* data, size_t size) { return std::vector<int32_t>(data, data + size); }
inline std::vector<int32_t> copied(const Ints& array) { return copied(array.data(), array.size()); }

// The folder's files, each with its part of the module.
void bind_weights(nb::module_& m);
void bind_cache(nb::module_& m);
void bind_step(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_probes(nb::module_& m);
void bind_train(nb::module_& m);
