// bfloat16 on AMX's tiles: 16 x 16 sums that the processor keeps, and one instruction that adds 32 tokens to them.
//
// The register tile is 2 x 2 of these; with two of each panel that makes all eight. Built without AMX (the variant
// `wideamx`, for tests) the instructions are plain C, and everything around them is the same.
#pragma once

#include "panels.h"

namespace {

#ifdef __AMX_BF16__

struct TileConfig {  // as the instruction reads it
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
alignas(64) const TileConfig kTileConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// While this lives, the thread has tiles.
struct Tiles {
  Tiles() { _tile_loadconfig(&kTileConfig); }
  ~Tiles() { _tile_release(); }
};

#define tile_zero _tile_zero
#define tile_load _tile_loadd
#define tile_store _tile_stored
#define tile_add_products _tile_dpbf16ps

#else

thread_local Bits tiles[8][16];

inline void tile_zero(int t) { std::memset(tiles[t], 0, sizeof(tiles[t])); }
inline void tile_load(int t, const void* from, int64_t stride) {
  for (int r = 0; r < 16; r++) std::memcpy(&tiles[t][r], static_cast<const char*>(from) + r * stride, sizeof(Bits));
}
inline void tile_store(int t, void* to, int64_t stride) {
  for (int r = 0; r < 16; r++) std::memcpy(static_cast<char*>(to) + r * stride, &tiles[t][r], sizeof(Bits));
}

// TDPBF16PS as Intel describes it: the first tokens of all pairs are summed by themselves, and the second; each product
// is added with one rounding to nearest even, then the two sums, then that to what was there. Denormal factors count
// as zeros, and denormal results become zeros.
__attribute__((noinline)) void tile_add_products(int to, int b, int a) {
  for (int i = 0; i < 16; i++) {
    Vec first{}, second{};
    for (int p = 0; p < 16; p++) {
      const Bits pair = Bits{} + tiles[b][i][p];
      first += without_denormals(tiles[a][p] << 16) * without_denormals(pair << 16);
      first = without_denormals((Bits)first);
      second += without_denormals(tiles[a][p] & 0xffff0000) * without_denormals(pair & 0xffff0000);
      second = without_denormals((Bits)second);
    }
    const Vec sum = (Vec)tiles[to][i] + without_denormals((Bits)(first + second));
    tiles[to][i] = (Bits)without_denormals((Bits)sum);
  }
}

#endif

// Tiles 0 to 3 = sum over tokens of b_t a_t^T, from `rows` rows of both panels.
inline void multiply_tiles(int64_t rows, const uint32_t* a, const uint32_t* b) {
  tile_zero(0);
  tile_zero(1);
  tile_zero(2);
  tile_zero(3);
  for (int64_t r = 0; r < rows; r++, a += 16 * kCols, b += 16 * kRows) {
    tile_load(4, b, 64);
    tile_load(5, b + 16 * 16, 64);
    tile_load(6, a, kCols * 4);
    tile_load(7, a + 16, kCols * 4);
    tile_add_products(0, 4, 6);
    tile_add_products(1, 4, 7);
    tile_add_products(2, 5, 6);
    tile_add_products(3, 5, 7);
  }
}

inline void store_tiles(Vec (&to)[kRows][kVectors]) {
  static_assert(kRows == 32 && kVectors == 2 && kLanes == 16, "2 x 2 tiles of 16 x 16");
  tile_store(0, &to[0][0], kCols * 4);
  tile_store(1, &to[0][1], kCols * 4);
  tile_store(2, &to[16][0], kCols * 4);
  tile_store(3, &to[16][1], kCols * 4);
}

}  // namespace
