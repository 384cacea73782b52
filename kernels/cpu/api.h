// The C interface of the CPU kernels, called through ctypes (grads_dist/stats/native.py).
#pragma once

#include <stdint.h>

#define GD_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

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
  double* sumsq;           // S
  float* total;            // P x D or null: gets sum_s weights[s] G_s added
  int64_t ld_total;
  const float* weights;    // S or null for ones
  int32_t type;            // of a and b
  int32_t num_threads;
} gd_outer_product;

// Names of the variants that this build holds and this machine runs, best first, separated by spaces.
GD_EXPORT const char* gd_cpu_variants(void);

GD_EXPORT int gd_cpu_outer_product_stats(const char* variant, const gd_outer_product* q);

#ifdef __cplusplus
}
#endif
