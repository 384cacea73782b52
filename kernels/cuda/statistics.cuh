// What is kept of a part of a sample's gradient, and how parts are joined.
// Every order is fixed by the sample's own shape, so that its bits depend on nothing else.
#pragma once

#include "primitives.cuh"

// Statistics of some of a sample's elements; 32 bytes.
struct Partial {
  double sum, sumsq;
  float high, low;
  i64 nonfinite;
};

GD_DEVICE Partial no_elements() { return Partial{0.0, 0.0, -infinity(), infinity(), 0}; }

// Squares are taken in float64: those of 1e-25 and 1e25 do not exist in float32.
GD_DEVICE void include(Partial& p, float x) {
  const double wide = x;
  p.sum += wide;
  p.sumsq += wide * wide;
  p.high = larger(p.high, x);
  p.low = smaller(p.low, x);
  p.nonfinite += is_finite(x) ? 0 : 1;
}

GD_DEVICE void join(Partial& p, const Partial& other) {
  p.sum += other.sum;
  p.sumsq += other.sumsq;
  p.high = larger(p.high, other.high);
  p.low = smaller(p.low, other.low);
  p.nonfinite += other.nonfinite;
}

struct Sums {
  double sum, sumsq;
};

GD_DEVICE void join(Sums& p, const Sums& other) {
  p.sum += other.sum;
  p.sumsq += other.sumsq;
}

// Joins the values of all threads by a fixed tree; `scratch` has kThreads entries, the result is thread 0's.
template <int kThreads, class Value>
GD_DEVICE Value join_threads(const Value& mine, Value* scratch) {
  const int thread = threadIdx.x;
  scratch[thread] = mine;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) join(scratch[thread], scratch[thread + half]);
    __syncthreads();
  }
  return scratch[0];
}
