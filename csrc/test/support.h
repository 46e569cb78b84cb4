// What the checks share: random numbers, one count of expectations, and matrices in buffers of exactly the right size.
#pragma once
#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include "engine/pack.h"
#include "engine/pool.h"
#include "kernels/kernels.h"
#include "kernels/training.h"

namespace check {
using namespace llama2;

using Isas = std::vector<const Kernels*>;  // those under test; the scalar kernels are what they are compared with

extern std::mt19937 rng;  // a family of checks seeds it, so that it draws the same whatever ran before
extern bool forks;        // whether a child of this process may have threads

float normal();
std::vector<float> values(int64_t n);  // normal ones
float from_bits(uint32_t bits);
uint32_t bits_of(float value);

// Counts; prints what fails, with the instruction set and two numbers that say where.
void expect(bool ok, const char* what, const char* isa, int64_t a, int64_t b, double error);
long long expectations();
int failures();

double distance(const std::vector<float>& a, const std::vector<float>& b);  // relative, of the whole

std::vector<uint8_t> random_blocks(const FileType& t, int64_t rows, int64_t cols);

struct Packed {
  Matrix m;
  std::vector<uint8_t> memory;
};
Packed pack(const FileType& t, int64_t rows, int64_t cols);

struct Given {  // random codes with their scales
  CodeSource source;
  std::vector<uint8_t> codes, zeros;
  std::vector<uint16_t> halves;
  std::vector<float> floats, minima;
  Codebook forms;
  std::vector<int32_t> order;

  Given(Format f, int64_t rows, int64_t cols, int64_t group, bool shuffled);
  Packed pack() const;
};

struct Dense {  // a row-major matrix of normal values times `size`
  Matrix m;
  std::vector<uint8_t> memory;
  Dense(int64_t rows, int64_t cols, Format f, float size);
};

struct Reals {  // float32 or bfloat16 values of training
  Real type;
  std::vector<float> wide;
  std::vector<uint16_t> half;

  Reals(Real t, int64_t n, bool zeros = false);
  void* data() { return type == Real::F32 ? static_cast<void*>(wide.data()) : half.data(); }
  std::vector<float> floats() const;
};
double bound(Real t);  // of the distance of two results

// work(begin, end, thread) for pieces of [0, n), by each thread of a team one
void shared(Pool& pool, int64_t n, int64_t step, const std::function<void(int64_t, int64_t, int)>& work);

// The families, a file each.
void check_matmul(const Isas& isas);
void check_models(const Isas& isas);
void check_training(const Isas& isas, Pool& pool);
void check_gemm(const Isas& isas, Pool& pool);
void check_sampling();
void check_unpack();
void check_pool();
void check_teams(const Isas& isas);  // training and gemm on each kind of team: the pool, and torch's in a child

}  // namespace check
