// Which variants this build holds, which of them this machine runs, and the calls into them.
#include <cstring>

#include "api.h"

#define GD_DECLARE(name)                                                  \
  extern "C" int gd_outer_product_stats_##name(const gd_outer_product*); \
  extern "C" int gd_row_sum_stats_##name(const gd_row_sums*);
#define GD_KERNELS(name) gd_outer_product_stats_##name, gd_row_sum_stats_##name
GD_DECLARE(generic)
#ifdef GD_X86
GD_DECLARE(wide)
GD_DECLARE(avx2)
GD_DECLARE(avx512)
#endif

namespace {

struct Variant {
  const char* name;
  int (*outer_product_stats)(const gd_outer_product*);
  int (*row_sum_stats)(const gd_row_sums*);
  bool (*runs_here)();
};

bool always() { return true; }
#ifdef GD_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
#endif

// Best first; `wide` is avx512's code on AVX2's registers, for tests on machines without AVX-512.
const Variant kVariants[] = {
#ifdef GD_X86
    {"avx512", GD_KERNELS(avx512), has_avx512},
    {"avx2", GD_KERNELS(avx2), has_avx2},
#endif
    {"generic", GD_KERNELS(generic), always},
#ifdef GD_X86
    {"wide", GD_KERNELS(wide), has_avx2},
#endif
};

}  // namespace

extern "C" {

int gd_cpu_abi(void) { return GD_ABI; }

const char* gd_cpu_variants(void) {
  static char names[64];
  if (names[0] == 0) {
    char text[64] = "";
    for (const Variant& variant : kVariants) {
      if (!variant.runs_here()) continue;
      if (text[0]) std::strcat(text, " ");
      std::strcat(text, variant.name);
    }
    std::strcpy(names, text);
  }
  return names;
}

static const Variant* find(const char* name) {
  for (const Variant& variant : kVariants)
    if (!std::strcmp(variant.name, name) && variant.runs_here()) return &variant;
  return nullptr;
}

int gd_cpu_outer_product_stats(const char* name, const gd_outer_product* q) {
  const Variant* variant = find(name);
  return variant ? variant->outer_product_stats(q) : GD_NO_SUCH_VARIANT;
}

int gd_cpu_row_sum_stats(const char* name, const gd_row_sums* q) {
  const Variant* variant = find(name);
  return variant ? variant->row_sum_stats(q) : GD_NO_SUCH_VARIANT;
}
}
