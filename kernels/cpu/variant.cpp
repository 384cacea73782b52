// One instruction set's kernels; compiled with GD_VARIANT, GD_LANES, GD_ROWS and the flags that go with them.
#include "row_sums.h"
#include "segment_stats.h"

#define GD_JOIN2(a, b) a##b
#define GD_JOIN(a, b) GD_JOIN2(a, b)

extern "C" int GD_JOIN(gd_outer_product_stats_, GD_VARIANT)(const gd_outer_product* q) {
  return q->type == GD_BFLOAT16 ? outer_product_stats<uint16_t>(*q) : outer_product_stats<float>(*q);
}

extern "C" int GD_JOIN(gd_row_sum_stats_, GD_VARIANT)(const gd_row_sums* q) {
  return q->type == GD_BFLOAT16 ? row_sum_stats<uint16_t>(*q) : row_sum_stats<float>(*q);
}
