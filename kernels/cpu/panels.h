// How packed tokens lie in memory, and what one step through them adds to a tile.
//
// A panel holds some columns of one matrix, row after row. In float32 a row is a token. In a variant built with
// GD_BF16_PAIRS a row of bfloat16 is two tokens side by side in 32 bits, and is multiplied by VDPBF16PS: half the
// memory and half the instructions. Each sample begins with a row of its own, and the last token of an odd number
// is paired with zeros in both panels: no product has factors of two samples.
#pragma once

#include "common.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));

template <typename T>
struct Panels {
  typedef float Element;
  typedef Vec ElementVec;
  static constexpr int kTokens = 1;  // of a row
};

#ifdef GD_BF16_PAIRS
template <>
struct Panels<uint16_t> {
  typedef uint32_t Element;
  typedef Bits ElementVec;
  static constexpr int kTokens = 2;
};
#endif

template <typename T>
inline int64_t num_rows(int64_t tokens) {
  return ceil_div(tokens, Panels<T>::kTokens);
}

// First row of a sample before which there are `samples` others with `tokens` in all. Each of them leaves less than
// a row empty, so that no two meet; it is also how many rows they need.
template <typename T>
inline int64_t first_row(int64_t tokens, int64_t samples) {
  return num_rows<T>(tokens + samples * (Panels<T>::kTokens - 1));
}

// One row of a panel, of columns that are all there.
inline void pack_row(const float* token, const float*, int width, float* dst) {
  for (int c = 0; c < width; c++) dst[c] = token[c];
}
inline void pack_row(const uint16_t* token, const uint16_t*, int width, float* dst) {
  for (int c = 0; c < width; c++) dst[c] = as_float(token[c]);
}
// `next` is null behind an odd last token.
inline void pack_row(const uint16_t* token, const uint16_t* next, int width, uint32_t* dst) {
  if (next) {
    for (int c = 0; c < width; c++) dst[c] = token[c] | static_cast<uint32_t>(next[c]) << 16;
  } else {
    for (int c = 0; c < width; c++) dst[c] = token[c];
  }
}

// The tokens [begin, end) of one sample in one panel of `width` columns, padded with zeros: dst[row][width].
template <typename T>
inline void pack(const T* src, int64_t ld, int64_t begin, int64_t end, int64_t col, int64_t num_cols, int width,
                 typename Panels<T>::Element* dst) {
  const int count = static_cast<int>(lesser(num_cols - col, width));
  for (int64_t t = begin; t < end; t += Panels<T>::kTokens, dst += width) {
    const T* token = src + t * ld + col;
    const T* next = t + 1 < end ? token + ld : nullptr;
    if (count == width) {
      pack_row(token, next, width, dst);
    } else {
      pack_row(token, next, count, dst);
      std::memset(dst + count, 0, sizeof(*dst) * (width - count));
    }
  }
}

// All samples of a chunk in panel `index` of one matrix.
template <typename T>
inline void pack_samples(const gd_outer_product& q, int64_t first, int64_t last, const T* src, int64_t ld,
                         int64_t num_cols, int64_t index, int width, typename Panels<T>::Element* panel) {
  for (int64_t s = first; s < last; s++) {
    const int64_t row = first_row<T>(q.offsets[s] - q.offsets[first], s - first);
    pack(src, ld, q.offsets[s], q.offsets[s + 1], index * width, num_cols, width, panel + row * width);
  }
}

inline Vec load_row(const float* panel) { return *reinterpret_cast<const Vec*>(panel); }
inline Bits load_row(const uint32_t* panel) { return *reinterpret_cast<const Bits*>(panel); }

// acc + the products of one row of A with one column of B.
inline Vec add_products(Vec acc, Vec a, float b) { return acc + a * b; }

#ifdef __AVX512BF16__
inline Vec add_products(Vec acc, Bits a, uint32_t b) {
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)(Bits{} + b));
}
#else
// VDPBF16PS as Intel describes it: two fused multiply-adds, the upper halves first, each rounded to nearest even;
// denormal factors count as zeros, and denormal results become zeros. For tests: not inlined, because unrolled it
// takes the compiler half a minute.
inline Vec without_denormals(Bits x) {
  return (Vec)((x & 0x7f800000) == 0 ? x & 0x80000000 : x);
}
__attribute__((noinline, unused)) Vec add_products(Vec acc, Bits a, uint32_t b) {
  const Bits b_pair = Bits{} + b;
  acc += without_denormals(a & 0xffff0000) * without_denormals(b_pair & 0xffff0000);
  acc = without_denormals((Bits)acc);
  acc += without_denormals(a << 16) * without_denormals(b_pair << 16);
  return without_denormals((Bits)acc);
}
#endif

}  // namespace
