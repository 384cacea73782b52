// Which variants this build holds, which of them this machine runs, and the calls into them.
#include <cstring>

#include "api.h"

#define GD_DECLARE(name)                                                  \
  extern "C" int gd_outer_product_stats_##name(const gd_outer_product*); \
  extern "C" int gd_row_sum_stats_##name(const gd_row_sums*);
#define GD_DECLARE_PAIRS(name) extern "C" int gd_bf16_pairs_##name(const gd_outer_product*);
#define GD_KERNELS(name) gd_outer_product_stats_##name, gd_row_sum_stats_##name
GD_DECLARE(generic)
#ifdef GD_X86
GD_DECLARE(wide)
GD_DECLARE(avx2)
GD_DECLARE(avx512)
GD_DECLARE_PAIRS(widebf16)
#endif
#ifdef GD_AVX512BF16
GD_DECLARE_PAIRS(avx512bf16)
#endif

namespace {

struct Variant {
  const char* name;
  int (*outer_product_stats)(const gd_outer_product*);
  int (*row_sum_stats)(const gd_row_sums*);
  int (*bf16_pairs)(const gd_outer_product*);  // for bfloat16, or null: outer_product_stats takes that too
  bool (*runs_here)();
};

bool always() { return true; }
#ifdef GD_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
#endif
#ifdef GD_AVX512BF16
// The compilers' flag for it lets them use AVX-512BW too.
bool has_avx512bf16() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw"); }
#endif

// Best first; `wide` and `widebf16` are the code of avx512 and avx512bf16 on AVX2's registers, for tests on machines
// without AVX-512.
const Variant kVariants[] = {
#ifdef GD_AVX512BF16
    {"avx512bf16", GD_KERNELS(avx512), gd_bf16_pairs_avx512bf16, has_avx512bf16},
#endif
#ifdef GD_X86
    {"avx512", GD_KERNELS(avx512), nullptr, has_avx512},
    {"avx2", GD_KERNELS(avx2), nullptr, has_avx2},
#endif
    {"generic", GD_KERNELS(generic), nullptr, always},
#ifdef GD_X86
    {"wide", GD_KERNELS(wide), nullptr, has_avx2},
    {"widebf16", GD_KERNELS(wide), gd_bf16_pairs_widebf16, has_avx2},
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
  if (!variant) return GD_NO_SUCH_VARIANT;
  const bool pairs = q->type == GD_BFLOAT16 && variant->bf16_pairs;
  return pairs ? variant->bf16_pairs(q) : variant->outer_product_stats(q);
}

int gd_cpu_row_sum_stats(const char* name, const gd_row_sums* q) {
  const Variant* variant = find(name);
  return variant ? variant->row_sum_stats(q) : GD_NO_SUCH_VARIANT;
}
}
