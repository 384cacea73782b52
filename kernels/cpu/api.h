// The C interface of the CPU kernels, called through ctypes (grads_dist/stats/native.py).
#pragma once

#include <stdint.h>

#define GD_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// Changes with every structure below; native.py refuses a library of another number.
#define GD_ABI 1

enum { GD_OK = 0, GD_NO_MEMORY = 1, GD_NO_SUCH_VARIANT = 2 };
enum { GD_FLOAT32 = 0, GD_BFLOAT16 = 1 };

// Statistics of G_s = B_s^T A_s, P x D, for S samples whose tokens are packed along one axis.
typedef struct {
  const void* b;           // N x P, gradient at the layer's output
  const void* a;           // N x D, the layer's input
  int64_t ldb, lda;        // elements from one row to the next
  int64_t num_b_cols;      // P
  int64_t num_a_cols;      // D
  const int64_t* offsets;  // S + 1
  int64_t num_samples;     // S
  float* low;              // S, smallest element; 0 for a sample without tokens
  float* high;             // S, largest element
  double* sum;             // S
  double* sumsq;           // S
  float* total;            // P x D or null: gets sum_s weights[s] G_s added
  int64_t ld_total;
  const float* weights;    // S or null for ones
  int32_t type;            // of a and b
  int32_t num_threads;
} gd_outer_product;

enum { GD_NO_NORM = 0, GD_RMS_NORM = 1, GD_LAYER_NORM = 2 };

// Statistics of sums of rows: g = sum_t b_t, or sum_t b_t * xhat_t with xhat_t the normalised x_t.
//
// A sample has any number of runs; every run is summed by itself, and the sample's statistics are over the
// elements of all its sums. A bias or a norm's gain is one run a sample; an embedding one run a distinct token.
typedef struct {
  const void* b;               // N x D
  const void* x;               // N x D or null; of b's type
  int64_t ldb, ldx;
  int64_t num_cols;            // D
  const int64_t* order;        // the rows in the order of the runs, or null for their own order
  const int64_t* run_offsets;  // U + 1, into `order`
  int64_t num_runs;            // U
  const int64_t* sample_runs;  // S + 1, into the runs
  int64_t num_samples;         // S
  double* sum;                 // S; all statistics of a sample without runs are 0
  double* sumsq;
  float* low;
  float* high;
  float* rows;                 // U x D or null: gets the sums themselves
  float eps;                   // of the norm
  int32_t norm;
  int32_t type;
  int32_t num_threads;
} gd_row_sums;

GD_EXPORT int gd_cpu_abi(void);

// Names of the variants that this build holds and this machine runs, best first, separated by spaces.
GD_EXPORT const char* gd_cpu_variants(void);

GD_EXPORT int gd_cpu_outer_product_stats(const char* variant, const gd_outer_product* q);
GD_EXPORT int gd_cpu_row_sum_stats(const char* variant, const gd_row_sums* q);

#ifdef __cplusplus
}
#endif
