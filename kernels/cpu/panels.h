// How packed tokens lie in memory, and what one step through them adds to a tile.
//
// A panel holds some columns of one matrix, row after row. In float32 a row is a token. In a variant built with
// GD_BF16_PAIRS a row of bfloat16 is two tokens side by side in 32 bits, and is multiplied by VDPBF16PS: half the
// memory and half the instructions. In one built with GD_BF16_TILES it is 32 tokens, which tiles.h multiplies. Each
// sample begins with a row of its own, and what its last row lacks is zeros in both panels: no product has factors of
// two samples.
#pragma once

#include "common.h"

namespace {

typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));

enum Side { kLeft, kRight };  // the panels of B, those of A

#if !defined(GD_BF16_TILES) || !defined(__AMX_BF16__)
struct Tiles {  // what a thread holds while it multiplies: nothing, but in tiles.h
  Tiles() {}
};
#endif

template <typename T>
struct Panels {
  typedef float Element;
  typedef Vec ElementVec;
  static constexpr int kTokens = 1;  // of a row
  static constexpr int kDepth = 1;   // elements of a row for each column
};

#if defined(GD_BF16_PAIRS) || defined(GD_BF16_TILES)
template <>
struct Panels<uint16_t> {
  typedef uint32_t Element;
  typedef Bits ElementVec;
#ifdef GD_BF16_TILES
  static constexpr int kDepth = 16;
#else
  static constexpr int kDepth = 1;
#endif
  static constexpr int kTokens = 2 * kDepth;
};
#endif

template <typename T>
inline int64_t num_rows(int64_t tokens) {
  return ceil_div(tokens, Panels<T>::kTokens);
}

// One token, or two side by side, of columns that are all there.
inline void pack_token(const float* token, const float*, int width, float* dst) {
  std::memcpy(dst, token, sizeof(*dst) * width);
}
inline void pack_token(const uint16_t* __restrict token, const uint16_t*, int width, float* __restrict dst) {
  for (int c = 0; c < width; c++) dst[c] = as_float(token[c]);
}
// `next` is null behind an odd last token.
inline void pack_token(const uint16_t* __restrict token, const uint16_t* __restrict next, int width,
                       uint32_t* __restrict dst) {
  if (next) {
    for (int c = 0; c < width; c++) dst[c] = token[c] | static_cast<uint32_t>(next[c]) << 16;
  } else {
    for (int c = 0; c < width; c++) dst[c] = token[c];
  }
}

// `num_tokens` tokens, the first `count` columns of a panel of `width`, padded with zeros: dst[element][width].
template <int width, typename T>
inline void pack_tokens(const T* src, int64_t ld, int64_t num_tokens, int count, typename Panels<T>::Element* dst) {
  constexpr int kStep = Panels<T>::kTokens > 1 ? 2 : 1;
  for (int64_t t = 0; t < num_tokens; t += kStep, dst += width) {
    const T* token = src + t * ld;
    const T* next = t + 1 < num_tokens ? token + ld : nullptr;
    if (count == width) {
      pack_token(token, next, width, dst);
    } else {
      pack_token(token, next, count, dst);
      std::memset(dst + count, 0, sizeof(*dst) * (width - count));
    }
  }
}

#ifdef GD_BF16_TILES

// 32 tokens, or what is left of them: pairs of tokens as rows of A's panel, as columns of B's.
template <Side side, int width>
inline void pack_rows(const uint16_t* src, int64_t ld, int64_t num_tokens, int count, uint32_t* dst) {
  constexpr int kDepth = Panels<uint16_t>::kDepth;
  for (int64_t t = 0; t < num_tokens; t += 2 * kDepth, src += 2 * kDepth * ld, dst += kDepth * width) {
    const int64_t tokens = lesser(num_tokens - t, 2 * kDepth), pairs = ceil_div(tokens, 2);
    alignas(64) uint32_t transposed[kDepth * width];
    uint32_t* rows = side == kLeft ? transposed : dst;
    pack_tokens<width>(src, ld, tokens, count, rows);
    std::memset(rows + pairs * width, 0, sizeof(*dst) * (kDepth - pairs) * width);
    if (side == kRight) continue;
    for (int c = 0; c < width; c++)
      for (int p = 0; p < kDepth; p++) dst[c * kDepth + p] = transposed[p * width + c];
  }
}

#else

template <Side side, int width, typename T>
inline void pack_rows(const T* src, int64_t ld, int64_t num_tokens, int count, typename Panels<T>::Element* dst) {
  pack_tokens<width>(src, ld, num_tokens, count, dst);
}

#endif

// Some rows of all panels of one matrix, panel by panel: what was fetched of a token is used while it is there.
template <Side side, typename T>
inline void pack_panels(const T* src, int64_t ld, int64_t num_tokens, int64_t num_cols, int64_t panel_rows,
                            typename Panels<T>::Element* dst) {
  constexpr int width = side == kLeft ? kRows : kCols;
  for (int64_t col = 0; col < num_cols; col += width, dst += panel_rows * width * Panels<T>::kDepth) {
    const int count = static_cast<int>(lesser(num_cols - col, width));
    pack_rows<side, width>(src + col, ld, num_tokens, count, dst);
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
inline Vec without_denormals(Bits x) {
  return (Vec)((x & 0x7f800000) == 0 ? x & 0x80000000 : x);
}
// VDPBF16PS as Intel describes it: two fused multiply-adds, the upper halves first, each rounded to nearest even;
// denormal factors count as zeros, and denormal results become zeros. For tests: not inlined, because unrolled it
// takes the compiler half a minute.
__attribute__((noinline, unused)) Vec add_products(Vec acc, Bits a, uint32_t b) {
  const Bits b_pair = Bits{} + b;
  acc += without_denormals(a & 0xffff0000) * without_denormals(b_pair & 0xffff0000);
  acc = without_denormals((Bits)acc);
  acc += without_denormals(a << 16) * without_denormals(b_pair << 16);
  return without_denormals((Bits)acc);
}
#endif

}  // namespace
