// Which variants this build holds, which of them this machine runs, and the calls into them.
#include <cstring>

#include "api.h"

#ifdef GD_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define GD_DECLARE(name)                                                  \
  extern "C" int gd_outer_product_stats_##name(const gd_outer_product*); \
  extern "C" int gd_row_sum_stats_##name(const gd_row_sums*);
#define GD_DECLARE_BF16(name) extern "C" int gd_bf16_only_##name(const gd_outer_product*);
#define GD_KERNELS(name) gd_outer_product_stats_##name, gd_row_sum_stats_##name
GD_DECLARE(generic)
#ifdef GD_X86
GD_DECLARE(wide)
GD_DECLARE(avx2)
GD_DECLARE(avx512)
GD_DECLARE_BF16(widebf16)
GD_DECLARE_BF16(wideamx)
#endif
#ifdef GD_AVX512BF16
GD_DECLARE_BF16(avx512bf16)
#endif
#ifdef GD_AMX
GD_DECLARE_BF16(amx)
#endif

namespace {

struct Variant {
  const char* name;
  int (*outer_product_stats)(const gd_outer_product*);
  int (*row_sum_stats)(const gd_row_sums*);
  int (*bf16_only)(const gd_outer_product*);  // for bfloat16, or null: outer_product_stats takes that too
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

#ifdef GD_AMX
// The processor has it, the system saves its tiles, and lets this process use them: Linux wants to be asked.
bool may_use_amx() {
  unsigned eax, ebx, ecx, edx;
  if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx >> 22 & 1) || !(edx >> 24 & 1)) return false;  // AMX-BF16, AMX-TILE
  __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  if ((eax >> 17 & 3) != 3) return false;  // tile configuration, tile data
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
bool has_amx() {
  static const bool may = may_use_amx();
  return may;
}
#endif

// Best first; `wide`, `widebf16` and `wideamx` are the code of avx512, avx512bf16 and amx on AVX2's registers, for
// tests on machines without those.
const Variant kVariants[] = {
#ifdef GD_AMX
    {"amx", GD_KERNELS(avx512), gd_bf16_only_amx, has_amx},
#endif
#ifdef GD_AVX512BF16
    {"avx512bf16", GD_KERNELS(avx512), gd_bf16_only_avx512bf16, has_avx512bf16},
#endif
#ifdef GD_X86
    {"avx512", GD_KERNELS(avx512), nullptr, has_avx512},
    {"avx2", GD_KERNELS(avx2), nullptr, has_avx2},
#endif
    {"generic", GD_KERNELS(generic), nullptr, always},
#ifdef GD_X86
    {"wide", GD_KERNELS(wide), nullptr, has_avx2},
    {"widebf16", GD_KERNELS(wide), gd_bf16_only_widebf16, has_avx2},
    {"wideamx", GD_KERNELS(wide), gd_bf16_only_wideamx, has_avx2},
#endif
};

}  // namespace

extern "C" {

int gd_cpu_abi(void) { return GD_ABI; }

const char* gd_cpu_variants(void) {
  static char names[128];
  if (names[0] == 0) {
    char text[128] = "";
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
  const bool bf16_only = q->type == GD_BFLOAT16 && variant->bf16_only;
  return bf16_only ? variant->bf16_only(q) : variant->outer_product_stats(q);
}

int gd_cpu_row_sum_stats(const char* name, const gd_row_sums* q) {
  const Variant* variant = find(name);
  return variant ? variant->row_sum_stats(q) : GD_NO_SUCH_VARIANT;
}
}
