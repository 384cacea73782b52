// Gradients that are sums of rows, with their statistics: an embedding's rows, a norm's gain, a bias. These kernels
// are bound by memory; what matters is that every row is read once and summed in a fixed order.
#include "statistics.cuh"

constexpr int kRunThreads = 128;
constexpr int kSumLanes = 8, kSumCols = 128, kSumThreads = kSumLanes * kSumCols / 4;

// A run is the rows of one token id within one sample, next to each other in `order`.
struct RowRuns {
  const void* b;
  i64 ldb;
  const i64* order;        // row of b at each place; null: its own
  const i64* starts;       // first place of each run, and the end of the last
  const i64* run_offsets;  // S + 1, the runs of each sample; runs past the last are nobody's
  Partial* partials;       // one a run
  float* out;              // runs x D, or null
  i64 ld_out;
  int num_samples, num_cols, aligned, out_aligned;
};

// One block a run, four columns a thread; rows are added in their order.
template <class Input>
GD_DEVICE void row_run_stats(const RowRuns& q) {
  GD_SHARED(Partial, scratch, kRunThreads);
  const i64 run = blockIdx.x;
  // How many runs there are is known only here: the host asks for as many blocks as there can be.
  if (run >= q.run_offsets[q.num_samples]) return;
  const i64 first = q.starts[run], end = q.starts[run + 1];
  Partial mine = no_elements();
  for (int col = threadIdx.x * 4; col < q.num_cols; col += kRunThreads * 4) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (i64 place = first; place < end; place++) {
      float x[4];
      const i64 row = q.order ? q.order[place] : place;
      load_four(x, static_cast<const Input*>(q.b) + row * q.ldb + col, q.num_cols - col, q.aligned);
#pragma unroll
      for (int i = 0; i < 4; i++) sum[i] += x[i];
    }
    const int count = q.num_cols - col;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < count) include(mine, sum[i]);
    if (q.out) store_four(q.out + run * q.ld_out + col, sum, count, q.out_aligned);
  }
  const Partial all = join_threads<kRunThreads>(mine, scratch);
  if (threadIdx.x == 0) q.partials[run] = all;
}

// g_s = sum over the sample's rows of b, or of b times the normalised input (x - mean) * rstd, which is rounded to
// the type of x as models do before they multiply by the gain.
struct VectorSums {
  const void* b;
  const void* x;  // null for a bias
  i64 ldb, ldx;
  const float* rstd;  // N; null: x is multiplied as it is
  const float* mean;  // N; null for a norm that takes no mean off
  const i64* offsets;
  Partial* partials;  // S x blocks
  int num_cols, blocks_per_sample, aligned;
};

template <class Input>
GD_DEVICE void load_row(float (&y)[4], const VectorSums& q, i64 row, int col) {
  const int count = q.num_cols - col;
  load_four(y, static_cast<const Input*>(q.b) + row * q.ldb + col, count, q.aligned);
  if (q.x == nullptr) return;
  float x[4];
  load_four(x, static_cast<const Input*>(q.x) + row * q.ldx + col, count, q.aligned);
  const float mean = q.mean ? q.mean[row] : 0.0f, rstd = q.rstd ? q.rstd[row] : 1.0f;
#pragma unroll
  for (int i = 0; i < 4; i++) y[i] *= rounded<Input>((x[i] - mean) * rstd);
}

// One block has kSumCols columns of one sample. Lane k of a column adds up rows k, k + kSumLanes, ..., then the
// lanes are added in their order.
template <class Input>
GD_DEVICE void vector_stats(const VectorSums& q) {
  GD_SHARED(float, lanes, kSumLanes * kSumCols);
  GD_SHARED(Partial, scratch, kSumThreads);
  const i64 sample = blockIdx.x / q.blocks_per_sample;
  const int first_col = static_cast<int>(blockIdx.x % q.blocks_per_sample) * kSumCols;
  const int lane = threadIdx.x / (kSumCols / 4), four = threadIdx.x % (kSumCols / 4) * 4;
  const i64 end = q.offsets[sample + 1];
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (first_col + four < q.num_cols) {
#pragma unroll 4
    for (i64 row = q.offsets[sample] + lane; row < end; row += kSumLanes) {
      float y[4];
      load_row<Input>(y, q, row, first_col + four);
#pragma unroll
      for (int i = 0; i < 4; i++) sum[i] += y[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) lanes[lane * kSumCols + four + i] = sum[i];
  __syncthreads();
  Partial mine = no_elements();
  if (threadIdx.x < kSumCols && first_col + static_cast<int>(threadIdx.x) < q.num_cols) {
    float g = 0.0f;
    for (int k = 0; k < kSumLanes; k++) g += lanes[k * kSumCols + threadIdx.x];
    include(mine, g);
  }
  const Partial all = join_threads<kSumThreads>(mine, scratch);
  if (threadIdx.x == 0) q.partials[blockIdx.x] = all;
}

struct RowSums {
  const void* x;
  i64 ld;
  double *sum, *sumsq;  // N
  int num_cols, aligned;
};

// One block a row: what a norm divides by, and a factor of the sum of an outer product.
template <class Input>
GD_DEVICE void row_sums(const RowSums& q) {
  GD_SHARED(Sums, scratch, kRunThreads);
  const i64 row = blockIdx.x;
  Sums mine{0.0, 0.0};
  for (int col = threadIdx.x * 4; col < q.num_cols; col += kRunThreads * 4) {
    float x[4];
    load_four(x, static_cast<const Input*>(q.x) + row * q.ld + col, q.num_cols - col, q.aligned);
#pragma unroll
    for (int i = 0; i < 4; i++) join(mine, Sums{x[i], static_cast<double>(x[i]) * x[i]});
  }
  const Sums all = join_threads<kRunThreads>(mine, scratch);
  if (threadIdx.x != 0) return;
  q.sum[row] = all.sum;
  q.sumsq[row] = all.sumsq;
}

GD_KERNEL(row_sums_fp32, RowSums, kRunThreads, 8, row_sums<float>)
GD_KERNEL(row_sums_bf16, RowSums, kRunThreads, 8, row_sums<Bf16>)
GD_KERNEL(row_sums_fp16, RowSums, kRunThreads, 8, row_sums<Fp16>)
GD_KERNEL(row_run_stats_fp32, RowRuns, kRunThreads, 8, row_run_stats<float>)
GD_KERNEL(row_run_stats_bf16, RowRuns, kRunThreads, 8, row_run_stats<Bf16>)
GD_KERNEL(row_run_stats_fp16, RowRuns, kRunThreads, 8, row_run_stats<Fp16>)
GD_KERNEL(vector_stats_fp32, VectorSums, kSumThreads, 4, vector_stats<float>)
GD_KERNEL(vector_stats_bf16, VectorSums, kSumThreads, 4, vector_stats<Bf16>)
GD_KERNEL(vector_stats_fp16, VectorSums, kSumThreads, 4, vector_stats<Fp16>)
