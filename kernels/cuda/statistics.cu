// The second stage: joins the partials of each sample to its statistics.
#include "statistics.cuh"

struct SecondStage {
  const Partial* partials;
  const i64* ranges;   // S + 1, the partials of each sample; null: every sample has `slots` of them
  const i64* offsets;  // S + 1, the sample's rows, or null; a sample without rows has a zero gradient
  i64 slots;
  const double *left, *right;  // a number a row, or null: the sum is that of their products, not of the partials
  double *sum, *sumsq, *low, *high;  // S each
  i64* nonfinite;                    // S
};

constexpr int kSecondStageThreads = 256;

// One block a sample. A sample whose range is empty gets the neutral element: it has no elements at all.
GD_DEVICE void join_partials_of_sample(const SecondStage& q) {
  GD_SHARED(Partial, scratch, kSecondStageThreads);
  const i64 sample = blockIdx.x;
  const bool has_rows = q.offsets == nullptr || q.offsets[sample] < q.offsets[sample + 1];
  const i64 begin = q.ranges ? q.ranges[sample] : sample * q.slots;
  const i64 end = q.ranges ? q.ranges[sample + 1] : begin + q.slots;
  Partial mine = no_elements();
  // Nothing was written for a sample without rows.
  if (has_rows)
    for (i64 i = begin + threadIdx.x; i < end; i += kSecondStageThreads) join(mine, q.partials[i]);
  if (q.left)
#pragma unroll 1
    for (i64 row = q.offsets[sample] + threadIdx.x; row < q.offsets[sample + 1]; row += kSecondStageThreads)
      mine.sum += q.left[row] * q.right[row];
  const Partial all = join_threads<kSecondStageThreads>(mine, scratch);
  if (threadIdx.x != 0) return;
  q.sum[sample] = all.sum;
  q.sumsq[sample] = all.sumsq;
  q.high[sample] = has_rows ? all.high : 0.0;
  q.low[sample] = has_rows ? all.low : 0.0;
  q.nonfinite[sample] = all.nonfinite;
}

GD_KERNEL(join_partials, SecondStage, kSecondStageThreads, 1, join_partials_of_sample)
