// One instruction set's kernels; compiled with GD_VARIANT, GD_LANES, GD_ROWS and the flags that go with them. With
// GD_BF16_PAIRS or GD_BF16_TILES it is only the kernel that multiplies bfloat16 in pairs of tokens or on AMX's tiles:
// the rest would be the same.
#include "row_sums.h"
#include "segment_stats.h"

#define GD_JOIN2(a, b) a##b
#define GD_JOIN(a, b) GD_JOIN2(a, b)

#if defined(GD_BF16_PAIRS) || defined(GD_BF16_TILES)

extern "C" int GD_JOIN(gd_bf16_only_, GD_VARIANT)(const gd_outer_product* q) {
  return outer_product_stats<uint16_t>(*q);
}

#else

extern "C" int GD_JOIN(gd_outer_product_stats_, GD_VARIANT)(const gd_outer_product* q) {
  return q->type == GD_BFLOAT16 ? outer_product_stats<uint16_t>(*q) : outer_product_stats<float>(*q);
}

extern "C" int GD_JOIN(gd_row_sum_stats_, GD_VARIANT)(const gd_row_sums* q) {
  return q->type == GD_BFLOAT16 ? row_sum_stats<uint16_t>(*q) : row_sum_stats<float>(*q);
}

#endif
