// What the kernels of outer products have in common: the order of tiles, and how a warp's share of a finished tile
// becomes a Partial.
#pragma once

#include "statistics.cuh"

struct TileIndex {
  int m, n;
};

// Tiles are taken in groups of 8 rows, column by column: those that run at the same time share columns of both
// matrices in the second-level cache.
GD_DEVICE TileIndex find_tile(int tile, int tiles_m, int tiles_n) {
  constexpr int kGroup = 8;
  const int group = tile / (kGroup * tiles_n), inside = tile % (kGroup * tiles_n);
  const int rows = min(tiles_m - group * kGroup, kGroup);
  return TileIndex{group * kGroup + inside % rows, inside / rows};
}

struct WarpNumbers {
  float high, low, sumsq;
};

// Joins the lanes' numbers by butterflies. The smallest is minus the largest of the negated: half the lanes carry
// one, half the other, which saves four shuffles of fifteen.
GD_DEVICE WarpNumbers join_lanes(WarpNumbers mine, int lane) {
  const bool upper = lane & 16;
  float extreme = upper ? -mine.low : mine.high;
  extreme = larger(extreme, shuffle_xor(upper ? mine.high : -mine.low, 16));
  float sumsq = mine.sumsq + shuffle_xor(mine.sumsq, 16);
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2) {
    extreme = larger(extreme, shuffle_xor(extreme, distance));
    sumsq += shuffle_xor(sumsq, distance);
  }
  const float other = shuffle_xor(extreme, 16);
  return WarpNumbers{upper ? other : extreme, -(upper ? extreme : other), sumsq};
}

// The squares again in float64, where float32 lost some of them, and the elements that are not finite. Rare, so the
// common path pays one comparison for it.
template <class Visit>
GD_DEVICE void recount(Visit visit_inside, Partial& partial) {
  double sumsq = 0.0;
  int nonfinite = 0;
  visit_inside([&](float x) {
    sumsq += static_cast<double>(x) * x;
    nonfinite += is_finite(x) ? 0 : 1;
  });
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sumsq += shuffle_xor(sumsq, distance);
    nonfinite += shuffle_xor(nonfinite, distance);
  }
  partial.sumsq = sumsq;
  partial.nonfinite = nonfinite;
}

// Reduces a warp's share of one sample's finished tile; every lane gets the result. visit_all(f) calls f with each
// of this lane's elements, visit_inside(f) with those that belong to the matrix: `whole` says that all do.
template <class VisitAll, class VisitInside>
GD_DEVICE Partial reduce_elements(bool whole, VisitAll visit_all, VisitInside visit_inside, int lane) {
  WarpNumbers mine{-infinity(), infinity(), 0.0f};
  auto take = [&](float x) {
    mine.high = larger(mine.high, x);
    mine.low = smaller(mine.low, x);
    mine.sumsq = fmaf(x, x, mine.sumsq);
  };
  if (whole)
    visit_all(take);
  else
    visit_inside(take);
  const WarpNumbers all = join_lanes(mine, lane);
  Partial partial{0.0, all.sumsq, all.high, all.low, 0};
  // Below 1e-15 squares begin to vanish. All lanes hold the same numbers here, so the warp stays together.
  const float largest = larger(all.high, -all.low);
  if (!is_finite(all.sumsq) || (largest > 0.0f && largest < 1e-15f)) recount(visit_inside, partial);
  return partial;
}
