// Statistics of G_s = B_s^T A_s for every sample s on sm_90a: what outer_product.cu computes, with the copy engine
// (TMA) and products by warpgroups (wgmma).
//
// Legend as there. A warpgroup is 128 threads. The first two multiply and reduce, each half of the tile's rows; of the
// third, one thread starts copies and one warp clears the rows of other samples. They meet at barriers only, stage by
// stage of a ring in shared memory: see Stage. docs/kernels.md has the whole.
#include "outer_product.cuh"
#include "primitives_sm90.cuh"

struct OuterProductSm90 {
  TensorMap map_b, map_a;  // N x P and N x D; a box is kBoxCols columns of kDepth tokens, swizzled by 128 bytes
  const i64* offsets;      // S + 1
  Partial* partials;       // S x tiles x kMultiplyingWarps
  float* total;            // P x D: gets sum_s weights[s] G_s added
  i64 ld_total;
  const float* weights;    // S
  int num_b_cols, num_a_cols, num_samples, samples_per_unit, tiles_m, tiles_n;
};
static_assert(sizeof(OuterProductSm90) == 320, "the driver reads as much of what the host gives it");

constexpr int kDepth = GD_DEPTH, kTileM = 128, kBoxCols = 64, kStep = 16;  // a product takes kStep tokens
constexpr int kMultiplyingWarps = 8, kThreads = 384, kCopyingWarp = 8, kClearingWarp = 9;
constexpr u32 kTokenBytes = kBoxCols * 2, kBox = kDepth * kTokenBytes;
// What a swizzle repeats after, and so what boxes must lie on multiples of.
constexpr u32 kSwizzlePeriod = 1024;
constexpr int kRegistersToMultiply = 232, kRegistersToCopy = 40;
static_assert(256 * kRegistersToMultiply + 128 * kRegistersToCopy <= 65536, "what a multiprocessor has");
static_assert(kDepth % kStep == 0 && kDepth <= 4 * kStep, "a ragged end is written out for 1 to 4 steps");
static_assert(kTokenBytes == 128 && kBox % kSwizzlePeriod == 0, "8 tokens of 128 bytes are a swizzle's period");

// With a batch gradient a lane has two sets of accumulators, so its tile is narrower.
template <bool kTotal>
struct Config {
  static constexpr int kTileN = kTotal ? GD_TOTAL_TILE_N : GD_TILE_N, kStages = kTotal ? GD_TOTAL_STAGES : GD_STAGES;
  static constexpr int kBoxesM = kTileM / kBoxCols, kBoxesN = kTileN / kBoxCols, kBoxes = kBoxesM + kBoxesN;
  static constexpr u32 kStageBytes = kBoxes * kBox;
  static constexpr int kAccumulators = kTileN / 2;
  static_assert(kTileN % kBoxCols == 0, "whole boxes");
};

// A place in the ring: the boxes of B, then those of A, each token by token; and three barriers.
//   full     the copies have arrived
//   cleared  and rows of other samples are zeros
//   empty    all multiplying warps and the clearing one are done with it
// A stage goes round: copied, cleared, multiplied, copied. `parity` is that of the round.
template <bool kTotal>
struct Stage {
  u32 first_stage;
  int index;
  u32 parity;

  GD_DEVICE u32 box(int i) const { return first_stage + index * Config<kTotal>::kStageBytes + i * kBox; }
  GD_DEVICE u32 full() const { return barrier(0); }
  GD_DEVICE u32 cleared() const { return barrier(1); }
  GD_DEVICE u32 empty() const { return barrier(2); }
  GD_DEVICE u32 barrier(int which) const {
    return first_stage + Config<kTotal>::kStages * Config<kTotal>::kStageBytes + (index * 3 + which) * 8;
  }
  GD_DEVICE void advance() {
    if (++index < Config<kTotal>::kStages) return;
    index = 0;
    parity ^= 1;
  }
};

template <bool kTotal>
GD_DEVICE void make_barriers(Stage<kTotal> stage) {
  for (int i = 0; i < Config<kTotal>::kStages; i++, stage.advance()) {
    make_barrier(stage.full(), 1);
    make_barrier(stage.cleared(), 1);
    make_barrier(stage.empty(), kMultiplyingWarps + 1);
  }
  publish_barriers();
}

// A unit of work is one tile of `samples_per_unit` samples. Blocks of threads stay, and take every gridDim.x-th: the
// ring does not drain between units either. Neighbouring units are tiles of one sample, which share its rows.
struct Unit {
  int tile, m, n;     // index of the tile, first column of B and of A
  int sample, stop;
};

GD_DEVICE int num_units(const OuterProductSm90& q) {
  const int groups = (q.num_samples + q.samples_per_unit - 1) / q.samples_per_unit;
  return q.tiles_m * q.tiles_n * groups;
}

template <bool kTotal>
GD_DEVICE Unit find_unit(const OuterProductSm90& q, int unit) {
  const int tiles = q.tiles_m * q.tiles_n, first = unit / tiles * q.samples_per_unit;
  const TileIndex index = find_tile(unit % tiles, q.tiles_m, q.tiles_n);
  return Unit{unit % tiles, index.m * kTileM, index.n * Config<kTotal>::kTileN, first,
              min(first + q.samples_per_unit, q.num_samples)};
}

// Calls visit(unit, token, rows) for every kDepth tokens of every sample of this block's units, a sample's first ones
// first; `rows` of the sample are left from `token` on. All roles see the same sequence.
template <bool kTotal, class Visit>
GD_DEVICE void visit_slices(const OuterProductSm90& q, Visit visit) {
  for (int i = blockIdx.x; i < num_units(q); i += gridDim.x) {
    const Unit unit = find_unit<kTotal>(q, i);
    for (int sample = unit.sample; sample < unit.stop; sample++) {
      const int end = static_cast<int>(q.offsets[sample + 1]);
      for (int token = static_cast<int>(q.offsets[sample]); token < end; token += kDepth)
        visit(unit, token, end - token);
    }
  }
}

// The one thread that starts copies.
template <bool kTotal>
GD_DEVICE void copy_slices(const OuterProductSm90& q, Stage<kTotal> stage) {
  prefetch_map(&q.map_b);
  prefetch_map(&q.map_a);
  visit_slices<kTotal>(q, [&](const Unit& unit, int token, int) {
    wait_for_phase(stage.empty(), stage.parity ^ 1);
    // Boxes outside the matrix arrive, too, as zeros.
    arrive_and_expect(stage.full(), Config<kTotal>::kStageBytes);
#pragma unroll
    for (int i = 0; i < Config<kTotal>::kBoxesM; i++)
      copy_box_async(stage.box(i), &q.map_b, stage.full(), unit.m + i * kBoxCols, token);
#pragma unroll
    for (int i = 0; i < Config<kTotal>::kBoxesN; i++)
      copy_box_async(stage.box(Config<kTotal>::kBoxesM + i), &q.map_a, stage.full(), unit.n + i * kBoxCols, token);
    stage.advance();
  });
}

// A sample's last slice holds the next sample's first rows, too. Only as many steps are multiplied as have rows of the
// sample; what is left of the last step are rows of another sample, which have to be zeros on both sides: a NaN times
// zero is NaN.
GD_DEVICE bool ends_within_a_step(int rows) { return rows < kDepth && rows % kStep != 0; }

// The one warp that clears those rows, ahead of the products. It goes through all slices, and the copies wait for it,
// too, so that it is never a round behind.
template <bool kTotal>
GD_DEVICE void clear_rows(const OuterProductSm90& q, Stage<kTotal> stage, int lane) {
  visit_slices<kTotal>(q, [&](const Unit&, int, int rows) {
    wait_for_phase(stage.full(), stage.parity);
    if (ends_within_a_step(rows)) {
      // Swizzling permutes chunks within a row, so that whole rows are the same bytes with and without it.
      const u32 chunks = (kStep - rows % kStep) * kTokenBytes / 16;
#pragma unroll 1
      for (int box = 0; box < Config<kTotal>::kBoxes; box++)
        for (u32 chunk = lane; chunk < chunks; chunk += 32)
          store_zeros_16(stage.box(box) + rows * kTokenBytes + chunk * 16);
      // Each thread its own stores; only then may others read them, or copies overwrite them.
      publish_stores();
      synchronize_warp();
    }
    if (lane == 0) {
      arrive(stage.cleared());
      arrive(stage.empty());
    }
    stage.advance();
  });
}

// What wgmma takes for an operand in shared memory: 16 tokens of one or more boxes, swizzled by 128 bytes. Boxes are
// kBox apart (leading dimension), groups of 8 tokens kSwizzlePeriod (stride).
GD_DEVICE u64 operand(u32 address) {
  constexpr u64 kSwizzle128 = 1ull << 62;
  return kSwizzle128 | static_cast<u64>(kSwizzlePeriod / 16) << 32 | static_cast<u64>(kBox / 16) << 16 |
         (address & 0x3ffff) / 16;
}

// Starts acc += the first kSteps steps of the stage; without `add` what acc held is forgotten.
template <class Input, bool kTotal, int kSteps>
GD_DEVICE void multiply_steps(float (&acc)[Config<kTotal>::kAccumulators], const Stage<kTotal>& stage, int warpgroup,
                              bool add) {
  const u64 left = operand(stage.box(warpgroup)), right = operand(stage.box(Config<kTotal>::kBoxesM));
  pin(acc);
  begin_products();
  // Descriptors count in 16 bytes.
#pragma unroll
  for (u64 k = 0; k < kSteps; k++)
    Product<Input, Config<kTotal>::kTileN>::start(acc, left + k * kStep * kTokenBytes / 16,
                                                  right + k * kStep * kTokenBytes / 16, add || k > 0);
  commit_products();
  pin(acc);
}

// acc = G_s of the sample with rows [begin, end), this warpgroup's 64 rows of the tile.
template <class Input, bool kTotal>
GD_DEVICE void multiply_sample(float (&acc)[Config<kTotal>::kAccumulators], Stage<kTotal>& stage, int warpgroup,
                               int lane, int begin, int end) {
  u32 previous = 0;  // the barrier to tell when the slice before has been multiplied
  int token = begin;
  for (; token + kDepth <= end; token += kDepth) {
    wait_for_phase(stage.full(), stage.parity);
    multiply_steps<Input, kTotal, kDepth / kStep>(acc, stage, warpgroup, token > begin);
    // This slice's products are under way; those of the one before have read their stage.
    wait_for_products<1>();
    if (token > begin && lane == 0) arrive(previous);
    previous = stage.empty();
    stage.advance();
  }
  const int rows = end - token;
  if (rows > 0) {
    wait_for_phase(stage.full(), stage.parity);
    if (ends_within_a_step(rows)) wait_for_phase(stage.cleared(), stage.parity);
    // One straight piece of code for each number of steps: around products in branches the compiler waits for each.
    const bool add = token > begin;
    if (rows > 3 * kStep)
      multiply_steps<Input, kTotal, 4>(acc, stage, warpgroup, add);
    else if (rows > 2 * kStep)
      multiply_steps<Input, kTotal, 3>(acc, stage, warpgroup, add);
    else if (rows > kStep)
      multiply_steps<Input, kTotal, 2>(acc, stage, warpgroup, add);
    else
      multiply_steps<Input, kTotal, 1>(acc, stage, warpgroup, add);
  }
  wait_for_products<0>();
  pin(acc);
  if (token > begin && lane == 0) arrive(previous);
  if (rows <= 0) return;
  if (lane == 0) arrive(stage.empty());
  stage.advance();
}

// Calls visit(element, i) for the accumulators of this lane that belong to the matrix. A warp has 16 rows of the tile:
// accumulator i is row l / 4 + 8 * (i / 2 % 2) of them, column 8 * (i / 4) + 2 * (l % 4) + i % 2.
struct Place {
  int row, col;  // of accumulator 0

  GD_DEVICE int row_of(int i) const { return row + i / 2 % 2 * 8; }
  GD_DEVICE int col_of(int i) const { return col + i / 4 * 8 + i % 2; }
};

template <bool kMasked, int kCount, class Visit>
GD_DEVICE void visit_elements(const OuterProductSm90& q, const Place& at, float (&acc)[kCount], Visit visit) {
#pragma unroll
  for (int i = 0; i < kCount; i++)
    if (!kMasked || (at.row_of(i) < q.num_b_cols && at.col_of(i) < q.num_a_cols)) visit(acc[i], i);
}

// Reduces one sample's finished tile to one partial a warp.
template <bool kTotal>
GD_DEVICE void reduce_tile(const OuterProductSm90& q, const Unit& unit, const Place& at,
                           float (&acc)[Config<kTotal>::kAccumulators], int sample, int warp, int lane) {
  const bool whole = unit.m + kTileM <= q.num_b_cols && unit.n + Config<kTotal>::kTileN <= q.num_a_cols;
  auto visit_all = [&](auto take) { visit_elements<false>(q, at, acc, [&](float x, int) { take(x); }); };
  auto visit_inside = [&](auto take) { visit_elements<true>(q, at, acc, [&](float x, int) { take(x); }); };
  const Partial partial = reduce_elements(whole, visit_all, visit_inside, lane);
  const i64 slot = (static_cast<i64>(sample) * q.tiles_m * q.tiles_n + unit.tile) * kMultiplyingWarps + warp;
  if (lane == 0) q.partials[slot] = partial;
}

// What the two multiplying warpgroups do. They wait for stages, never for each other: one may reduce while the other
// multiplies.
template <class Input, bool kTotal>
GD_DEVICE void multiply_and_reduce(const OuterProductSm90& q, Stage<kTotal> stage, int warp, int lane) {
  constexpr int kAccumulators = Config<kTotal>::kAccumulators;
  float acc[kAccumulators], total[kTotal ? kAccumulators : 1];
  for (int i = blockIdx.x; i < num_units(q); i += gridDim.x) {
    const Unit unit = find_unit<kTotal>(q, i);
    const Place at{unit.m + warp * 16 + lane / 4, unit.n + lane % 4 * 2};
    if (kTotal)
#pragma unroll
      for (float& x : total) x = 0.0f;
    for (int sample = unit.sample; sample < unit.stop; sample++) {
      const int begin = static_cast<int>(q.offsets[sample]), end = static_cast<int>(q.offsets[sample + 1]);
      if (begin == end) continue;
      multiply_sample<Input, kTotal>(acc, stage, warp / 4, lane, begin, end);
      reduce_tile<kTotal>(q, unit, at, acc, sample, warp, lane);
      if constexpr (kTotal) {
        const float weight = q.weights[sample];
#pragma unroll
        for (int e = 0; e < kAccumulators; e++) total[e] = fmaf(weight, acc[e], total[e]);
      }
    }
    if constexpr (kTotal)
      visit_elements<true>(q, at, total, [&](float x, int e) {
        q.total[static_cast<i64>(at.row_of(e)) * q.ld_total + at.col_of(e)] += x;
      });
  }
}

template <class Input, bool kTotal>
GD_DEVICE void outer_product_stats_sm90(const OuterProductSm90& q) {
  GD_DYNAMIC_SHARED(char, memory);
  Stage<kTotal> stage{(shared_address(memory) + kSwizzlePeriod - 1) / kSwizzlePeriod * kSwizzlePeriod, 0, 0};
  const int warp = same_in_warp(threadIdx.x / 32), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) make_barriers(stage);
  __syncthreads();
  if (warp < kMultiplyingWarps) {
    take_registers<kRegistersToMultiply>();
    multiply_and_reduce<Input, kTotal>(q, stage, warp, lane);
    return;
  }
  give_registers_back<kRegistersToCopy>();
  if (warp == kCopyingWarp && lane == 0) copy_slices(q, stage);
  if (warp == kClearingWarp) clear_rows(q, stage, lane);
}

GD_KERNEL(sm90_outer_product_stats_bf16, OuterProductSm90, kThreads, 1, outer_product_stats_sm90<Bf16, false>)
GD_KERNEL(sm90_outer_product_stats_fp16, OuterProductSm90, kThreads, 1, outer_product_stats_sm90<Fp16, false>)
GD_KERNEL(sm90_outer_product_stats_total_bf16, OuterProductSm90, kThreads, 1, outer_product_stats_sm90<Bf16, true>)
GD_KERNEL(sm90_outer_product_stats_total_fp16, OuterProductSm90, kThreads, 1, outer_product_stats_sm90<Fp16, true>)
