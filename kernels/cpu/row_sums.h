// Statistics of sums of rows: embeddings, biases, and the gains of norms.
//
// Compiled once for each instruction set (variant.cpp). Each run is summed by one thread in the order of its rows;
// the runs of a sample are then folded in their order.
//
// Legend: N rows, D columns, U runs, S samples.
#pragma once

#include "common.h"

namespace {

struct RunNumbers {
  double sum, sumsq;
  float low, high;
};

struct Moments {
  float mean, scale;
};

// What normalises a row: xhat = (x - mean) * scale.
template <typename T>
inline Moments moments(const T* x, int64_t count, int32_t norm, float eps) {
  double sum = 0, squares = 0;
  if (norm == GD_LAYER_NORM) {
    for (int64_t c = 0; c < count; c++) sum += as_float(x[c]);
  }
  const float mean = static_cast<float>(sum / count);
  DVec lanes{};
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    const Vec v = load(x + c) - mean;
    lanes += widen(v * v);
  }
  for (; c < count; c++) squares += (as_float(x[c]) - mean) * (as_float(x[c]) - mean);
  for (int l = 0; l < kLanes; l++) squares += lanes[l];
  return {mean, static_cast<float>(1.0 / std::sqrt(squares / count + eps))};
}

// xhat in the type of x, as the models have it.
inline float rounded(float x, const float*) { return x; }
inline float rounded(float x, const uint16_t*) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) <= 0x7f800000) bits += 0x7fff + ((bits >> 16) & 1);
  bits &= 0xffff0000;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <typename T>
inline void add_row(const gd_row_sums& q, int64_t row, float* acc) {
  const T* b = static_cast<const T*>(q.b) + row * q.ldb;
  if (q.norm == GD_NO_NORM) {
    for (int64_t c = 0; c < q.num_cols; c++) acc[c] += as_float(b[c]);
    return;
  }
  const T* x = static_cast<const T*>(q.x) + row * q.ldx;
  const Moments m = moments(x, q.num_cols, q.norm, q.eps);
  for (int64_t c = 0; c < q.num_cols; c++)
    acc[c] += as_float(b[c]) * rounded((as_float(x[c]) - m.mean) * m.scale, x);
}

inline RunNumbers reduce_run(const float* acc, int64_t count) {
  Partial partial = empty_partial();
  DVec sums{};
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    const Vec v = load(acc + c);
    const DVec wide = widen(v);
    partial.low = smaller(partial.low, v);
    partial.high = larger(partial.high, v);
    partial.sumsq += wide * wide;
    sums += wide;
  }
  const Numbers n = fold(partial);
  RunNumbers run{0, n.sumsq, n.low, n.high};
  for (int l = 0; l < kLanes; l++) run.sum += sums[l];
  for (; c < count; c++) {
    const float x = acc[c];
    run.low = x < run.low ? x : run.low;
    run.high = x > run.high ? x : run.high;
    run.sumsq += static_cast<double>(x) * x;
    run.sum += x;
  }
  return run;
}

template <typename T>
int row_sum_stats(const gd_row_sums& q) {
  Buffer<float> sums(q.num_cols * q.num_threads);
  Buffer<RunNumbers> numbers(q.num_runs);
  if (!sums.at || !numbers.at) return GD_NO_MEMORY;
#pragma omp parallel num_threads(q.num_threads)
  {
    float* own = sums.at + omp_get_thread_num() * q.num_cols;
#pragma omp for schedule(dynamic, 8)
    for (int64_t u = 0; u < q.num_runs; u++) {
      float* acc = q.rows ? q.rows + u * q.num_cols : own;
      std::memset(acc, 0, sizeof(float) * q.num_cols);
      for (int64_t k = q.run_offsets[u]; k < q.run_offsets[u + 1]; k++)
        add_row<T>(q, q.order ? q.order[k] : k, acc);
      numbers.at[u] = reduce_run(acc, q.num_cols);
    }
  }
  for (int64_t s = 0; s < q.num_samples; s++) {
    const int64_t first = q.sample_runs[s], last = q.sample_runs[s + 1];
    RunNumbers n = first < last ? numbers.at[first] : RunNumbers{0, 0, 0, 0};
    for (int64_t u = first + 1; u < last; u++) {
      const RunNumbers& m = numbers.at[u];
      n.low = m.low < n.low ? m.low : n.low;
      n.high = m.high > n.high ? m.high : n.high;
      n.sumsq += m.sumsq;
      n.sum += m.sum;
    }
    q.sum[s] = n.sum;
    q.sumsq[s] = n.sumsq;
    q.low[s] = n.low;
    q.high[s] = n.high;
  }
  return GD_OK;
}

}  // namespace
