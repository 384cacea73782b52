// What the kernels of one instruction set share: vectors, conversions, memory.
//
// Vectors are GCC's and Clang's own vector types, so that the code for wider registers also runs, slower, on
// machines without them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "api.h"

// Everything here is private to its translation unit, and uses no library template: the linker would be free to
// take one instruction set's copy of a shared function for all of them.
namespace {

#ifndef GD_LANES
#error "GD_LANES: floats in a register"
#endif

constexpr int kLanes = GD_LANES;
constexpr int kVectors = 2;                  // vectors in a row of the tile
constexpr int kCols = kVectors * kLanes;     // NR
constexpr int kRows = GD_ROWS;               // MR

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float Half __attribute__((vector_size(kLanes * 2)));
typedef double DHalf __attribute__((vector_size(kLanes * 4)));

// As many numbers as a `Vec`, in float64: two registers. One vector of twice a register's size would be taken apart.
struct DVec {
  DHalf half[2];

  double operator[](int l) const { return half[l / (kLanes / 2)][l % (kLanes / 2)]; }
  DVec operator+(const DVec& other) const { return {{half[0] + other.half[0], half[1] + other.half[1]}}; }
  DVec operator*(const DVec& other) const { return {{half[0] * other.half[0], half[1] * other.half[1]}}; }
  void operator+=(const DVec& other) { *this = *this + other; }
};

// The compilers' own conversion would go through smaller registers.
inline DHalf widen(Half x) {
#if defined(__AVX512F__) && GD_LANES == 16
  return (DHalf)_mm512_maskz_cvtps_pd(0xff, (__m256)x);  // the plain one warns in GCC 12
#elif defined(__AVX2__) && GD_LANES == 8
  return (DHalf)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, DHalf);
#endif
}
inline DVec widen(Vec x) {
  Half half[2];
  std::memcpy(half, &x, sizeof(x));
  return {{widen(half[0]), widen(half[1])}};
}

// Statistics in the making, lane by lane; float64 across tiles.
struct Partial {
  Vec low, high;
  DVec sumsq;
};

struct Numbers {
  float low, high;
  double sumsq;
};

inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline Partial empty_partial() {
  Partial partial;
  partial.low = Vec{} + std::numeric_limits<float>::infinity();
  partial.high = Vec{} - std::numeric_limits<float>::infinity();
  partial.sumsq = DVec{};
  return partial;
}

// The lanes are folded in their order, so that a sample's bits never depend on anything but itself.
inline Numbers fold(const Partial& partial) {
  Numbers n{partial.low[0], partial.high[0], partial.sumsq[0]};
  for (int l = 1; l < kLanes; l++) {
    n.low = partial.low[l] < n.low ? partial.low[l] : n.low;
    n.high = partial.high[l] > n.high ? partial.high[l] : n.high;
    n.sumsq += partial.sumsq[l];
  }
  return n;
}

inline float as_float(float x) { return x; }
inline float as_float(uint16_t bf16) {
  uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline Vec load(const float* x) {
  Vec v;
  std::memcpy(&v, x, sizeof(Vec));
  return v;
}
inline Vec load(const uint16_t* bf16) {
  typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
#if defined(__AVX512F__) && GD_LANES == 16
  return (Vec)((Bits)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)bf16)) << 16);
#elif defined(__AVX2__) && GD_LANES == 8
  return (Vec)((Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)bf16)) << 16);
#else
  Bits v;
  for (int l = 0; l < kLanes; l++) v[l] = bf16[l];
  return (Vec)(v << 16);
#endif
}
inline void store(float* at, Vec v) { std::memcpy(at, &v, sizeof(Vec)); }

// Cache-line aligned memory; `at` is null when there is none left.
template <typename T>
struct Buffer {
  explicit Buffer(int64_t count)
      : at(static_cast<T*>(std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64))) {}
  ~Buffer() { std::free(at); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* const at;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
