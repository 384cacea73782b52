// The LM head's softmax gradient, and what bounds the rows of its weight gradient.
//
// Legend: M label positions packed by sample, V vocabulary, S samples.
#include "statistics.cuh"

constexpr int kRowThreads = 512;
constexpr int kBoundThreads = 128;

struct SoftmaxGradient {
  const void* logits;  // M x V
  void* gradient;      // M x V; may be the logits themselves where the type is the same
  i64 ld_logits, ld_gradient;
  const i64* targets;    // M
  float *logsumexp, *loss;  // M
  double *sum, *sumsq;      // M, over the row of the gradient
  int num_cols, aligned;
};

// sum of exp(x - high) over the elements seen so far.
struct Exponentials {
  float high, sum;
};

// The smaller high is carried over to the larger; a NaN stays. Both at -inf: nothing was seen yet.
GD_DEVICE void join(Exponentials& p, const Exponentials& other) {
  const float high = larger(p.high, other.high);
  if (high == -infinity()) return;
  p.sum = p.sum * expf(p.high - high) + other.sum * expf(other.high - high);
  p.high = high;
}

template <class Input>
GD_DEVICE Exponentials sum_exponentials(const Input* row, const SoftmaxGradient& q) {
  Exponentials mine{-infinity(), 0.0f};
  for (int col = threadIdx.x * 4; col < q.num_cols; col += kRowThreads * 4) {
    float x[4];
    const int count = q.num_cols - col;
    load_four(x, row + col, count, q.aligned);
    // Four at a time: the running sum is rescaled once for all of them.
    Exponentials four{x[0], 0.0f};
#pragma unroll
    for (int i = 1; i < 4; i++) four.high = i < count ? larger(four.high, x[i]) : four.high;
    if (four.high == -infinity()) continue;
#pragma unroll
    for (int i = 0; i < 4; i++) four.sum += i < count ? expf(x[i] - four.high) : 0.0f;
    join(mine, four);
  }
  return mine;
}

// One block a row: largest and sum of exponentials, then softmax minus the one-hot target.
template <class Input, class Output>
GD_DEVICE void softmax_gradient(const SoftmaxGradient& q) {
  GD_SHARED(Exponentials, exponentials, kRowThreads);
  GD_SHARED(Sums, sums, kRowThreads);
  const i64 m = blockIdx.x, target = q.targets[m];
  const Input* row = static_cast<const Input*>(q.logits) + m * q.ld_logits;
  Output* out = static_cast<Output*>(q.gradient) + m * q.ld_gradient;
  // Read before anything is overwritten. No row is read out of bounds for a bad target; its loss is not a number.
  const bool exists = target >= 0 && target < q.num_cols;
  const float target_logit = exists ? to_float(row[target]) : not_a_number();
  const Exponentials all = join_threads<kRowThreads>(sum_exponentials(row, q), exponentials);
  const float scale = 1.0f / all.sum;
  Sums mine{0.0, 0.0};
  for (int col = threadIdx.x * 4; col < q.num_cols; col += kRowThreads * 4) {
    float d[4];
    const int count = q.num_cols - col;
    load_four(d, row + col, count, q.aligned);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      d[i] = expf(d[i] - all.high) * scale - (col + i == target ? 1.0f : 0.0f);
      if (i >= count) continue;
      mine.sum += d[i];
      mine.sumsq += static_cast<double>(d[i]) * d[i];
    }
    store_four(out + col, d, count, q.aligned);
  }
  const Sums total = join_threads<kRowThreads>(mine, sums);
  if (threadIdx.x != 0) return;
  q.logsumexp[m] = all.high + logf(all.sum);
  q.loss[m] = logf(all.sum) - (target_logit - all.high);
  q.sum[m] = total.sum;
  q.sumsq[m] = total.sumsq;
}

// For every sample s and vocabulary row v, upper bounds of sqrt(sum_t d_tv^2) and of sum_t |d_tv| w_t.
struct ColumnBounds {
  const void* gradient;  // M x V
  i64 ld;
  const float* row_weights;  // M
  const i64* offsets;        // S + 1
  float *norms, *weighted;   // S x V
  int num_cols, blocks_per_sample, aligned;
};

// One block has 4 * kBoundThreads columns of one sample; rows are added in their order.
template <class Input>
GD_DEVICE void column_bounds(const ColumnBounds& q) {
  const i64 sample = blockIdx.x / q.blocks_per_sample;
  const int block = static_cast<int>(blockIdx.x % q.blocks_per_sample);
  const int col = (block * kBoundThreads + threadIdx.x) * 4;
  if (col >= q.num_cols) return;
  const i64 begin = q.offsets[sample], end = q.offsets[sample + 1];
  float squares[4] = {0.0f, 0.0f, 0.0f, 0.0f}, weighted[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (i64 m = begin; m < end; m++) {
    float d[4];
    load_four(d, static_cast<const Input*>(q.gradient) + m * q.ld + col, q.num_cols - col, q.aligned);
    const float weight = q.row_weights[m];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      squares[i] = fmaf(d[i], d[i], squares[i]);
      weighted[i] = fmaf(fabsf(d[i]), weight, weighted[i]);
    }
  }
  // Bounds must hold for the exact sums: upwards by the worst rounding of so many terms, and by what underflow
  // can take from each (the smallest normal number).
  const float terms = static_cast<float>(end - begin);
  const float upwards = 1.0f + (terms + 4.0f) * 1.1920929e-7f, lost = terms * 1.1754944e-38f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    squares[i] = sqrtf(squares[i] + lost) * upwards;
    weighted[i] = (weighted[i] + lost) * upwards;
  }
  const i64 at = sample * q.num_cols + col;
  store_four(q.norms + at, squares, q.num_cols - col, q.num_cols % 4 == 0);
  store_four(q.weighted + at, weighted, q.num_cols - col, q.num_cols % 4 == 0);
}

GD_KERNEL(softmax_gradient_fp32, SoftmaxGradient, kRowThreads, 2, softmax_gradient<float, float>)
GD_KERNEL(softmax_gradient_bf16, SoftmaxGradient, kRowThreads, 2, softmax_gradient<Bf16, Bf16>)
GD_KERNEL(softmax_gradient_bf16_fp32, SoftmaxGradient, kRowThreads, 2, softmax_gradient<Bf16, float>)
GD_KERNEL(column_bounds_fp32, ColumnBounds, kBoundThreads, 8, column_bounds<float>)
GD_KERNEL(column_bounds_bf16, ColumnBounds, kBoundThreads, 8, column_bounds<Bf16>)
