// What cuTensorMapEncodeTiled puts into the 128 bytes of a tensor map, for the emulator's copy engine; and what it
// refuses, as far as the kernels' maps are concerned.
#pragma once

#include <stdint.h>
#include <string.h>

struct EmulatedTensorMap {
  const char* base;
  uint64_t cols, rows, row_bytes;
  uint32_t box_cols, box_rows;
};

// Arguments and result as in the CUDA driver's manual; 1 is CUDA_ERROR_INVALID_VALUE.
inline int encode_tensor_map(void* map, int type, uint32_t rank, void* base, const uint64_t* sizes,
                             const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                             int interleave, int swizzle, int l2_promotion, int fill) {
  enum { kFloat16 = 6, kBfloat16 = 9, kSwizzle128 = 3, kPromote256 = 3 };
  const bool known = (type == kFloat16 || type == kBfloat16) && rank == 2 && interleave == 0 &&
                     swizzle == kSwizzle128 && l2_promotion <= kPromote256 && fill == 0 &&
                     element_strides[0] == 1 && element_strides[1] == 1;
  const bool aligned = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
                       strides[0] % 16 == 0;
  const bool sized = sizes[0] > 0 && sizes[0] <= 1ull << 32 && sizes[1] > 0 && sizes[1] <= 1ull << 32 &&
                     strides[0] >= 2 * sizes[0] && strides[0] < 1ull << 40 && box[0] * 2 <= 128 && box[1] <= 256;
  if (!known || !aligned || !sized) return 1;
  const EmulatedTensorMap encoded = {static_cast<const char*>(base), sizes[0], sizes[1], strides[0], box[0], box[1]};
  memset(map, 0, 128);
  memcpy(map, &encoded, sizeof encoded);
  return 0;
}
