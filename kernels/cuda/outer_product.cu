// Statistics of G_s = B_s^T A_s for every sample s, by mma.sync (sm_80 and later). A tile of G_s lives in registers,
// is reduced there, and is never stored; on request the tiles are also added up over the samples, weighted.
//
// Legend: S samples; B is N x P and A is N x D, the tokens of all samples packed along N. A tile is kTileM columns
// of B by kTileN columns of A; tokens are taken kDepth at a time (a slice). The sizes come from the host as macros
// (grads_dist/stats/cuda_tile.py).
#include "outer_product.cuh"

constexpr int kTileM = GD_TILE_M, kTileN = GD_TILE_N, kDepth = GD_DEPTH, kStages = GD_STAGES;
constexpr int kWarpsM = GD_WARPS_M, kWarpsN = GD_WARPS_N, kWarps = kWarpsM * kWarpsN, kThreads = kWarps * 32;
constexpr int kWarpM = kTileM / kWarpsM, kWarpN = kTileN / kWarpsN;  // a warp's part of the tile
constexpr int kStepsM = kWarpM / 16, kStepsN = kWarpN / 8;           // in products of 16 x 8
constexpr u32 kPanelM = kDepth * kTileM * 2, kStage = kPanelM + kDepth * kTileN * 2;  // bytes
static_assert(kTileM % 64 == 0 && kTileN % 64 == 0, "the swizzle permutes chunks of 8 columns in groups of 8");
static_assert(kDepth % 16 == 0 && kStepsN % 2 == 0, "one ldmatrix gives two products' right sides, 16 tokens deep");

struct OuterProduct {
  const u16 *b, *a;
  i64 ldb, lda;          // elements from one row to the next; rows can be read in chunks of 16 bytes
  const i64* offsets;    // S + 1
  Partial* partials;     // S x tiles x kWarps
  float* total;          // P x D: gets sum_s weights[s] G_s added
  i64 ld_total;
  const float* weights;  // S
  int num_b_cols, num_a_cols, num_samples, samples_per_block, tiles_m, tiles_n;
};

typedef float Accumulators[kStepsM][kStepsN][4];

// A walk over the slices of the samples [sample, stop). A slice never crosses a sample's end, and the walk goes from
// one sample into the next, so that copies for the next sample are under way while one is being finished.
struct Walk {
  int sample, stop, token, end;
};

GD_DEVICE void skip_empty_samples(Walk& walk, const i64* offsets) {
  for (; walk.sample < walk.stop; walk.sample++) {
    walk.token = static_cast<int>(offsets[walk.sample]);
    walk.end = static_cast<int>(offsets[walk.sample + 1]);
    if (walk.token < walk.end) return;
  }
}

GD_DEVICE Walk begin_walk(const OuterProduct& q) {
  const int first = blockIdx.y * q.samples_per_block;
  Walk walk{first, min(first + q.samples_per_block, q.num_samples), 0, 0};
  skip_empty_samples(walk, q.offsets);
  return walk;
}

// Where this block's tile is and which part of it this warp and lane have.
struct Place {
  int tile, m, n;  // index of the tile, first column of B and of A
  int lane, warp, warp_m, warp_n;
  bool whole;      // no column of the tile is outside the matrix

  GD_DEVICE int row(int i, int e) const { return m + warp_m * kWarpM + i * 16 + lane / 4 + (e / 2) * 8; }
  GD_DEVICE int col(int j, int e) const { return n + warp_n * kWarpN + j * 8 + lane % 4 * 2 + e % 2; }
};

GD_DEVICE Place find_place(const OuterProduct& q) {
  Place at;
  at.tile = blockIdx.x;
  at.lane = threadIdx.x % 32;
  at.warp = threadIdx.x / 32;
  at.warp_m = at.warp / kWarpsN;
  at.warp_n = at.warp % kWarpsN;
  const TileIndex index = find_tile(at.tile, q.tiles_m, q.tiles_n);
  at.m = index.m * kTileM;
  at.n = index.n * kTileN;
  at.whole = at.m + kTileM <= q.num_b_cols && at.n + kTileN <= q.num_a_cols;
  return at;
}

// Byte of chunk `chunk` (8 columns, 16 bytes) of token `token` in a panel of kCols columns. ldmatrix reads one chunk
// of eight consecutive tokens at a time: unswizzled they would all lie in the same four banks.
template <int kCols>
GD_DEVICE u32 swizzled(int token, int chunk) {
  return (token * kCols + (chunk ^ (token & 7)) * 8) * 2;
}

// What a thread copies of every slice: one chunk of the tokens token, token + kStride, ... Worked out once, because
// what is computed between two products takes their turn.
template <int kCols>
struct PanelCopy {
  static constexpr int kChunks = kCols / 8, kStride = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kDepth % kStride == 0, "every thread copies as much");
  static_assert(kStride % 8 == 0, "all chunks of a thread are swizzled alike");
  const char* from;  // the chunk of the thread's token, were the slice the batch's first
  int ld;            // bytes from one token to the next
  int token;         // the thread's first token in a slice
  u32 to;            // its byte in the panel
};

template <int kCols>
GD_DEVICE PanelCopy<kCols> plan_copy(const u16* matrix, i64 ld, int first_col, int num_cols) {
  constexpr int kChunks = PanelCopy<kCols>::kChunks;
  const int token = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks, col = first_col + chunk * 8;
  // A chunk outside the matrix counts as a token past every end. One that is partly inside is copied whole: what
  // the padding of the rows holds stays in columns that are masked later.
  constexpr int kNever = 1 << 30;
  return PanelCopy<kCols>{reinterpret_cast<const char*>(matrix + token * ld + col), static_cast<int>(ld * 2),
                          col < num_cols ? token : kNever, swizzled<kCols>(token, chunk)};
}

// Starts the copy of kCols columns of one slice. What is not of the sample becomes zeros, so that ragged lengths
// need no other product loop.
template <int kCols>
GD_DEVICE void copy_panel(u32 panel, const PanelCopy<kCols>& plan, const Walk& slice) {
#pragma unroll
  for (int token = 0; token < kDepth; token += PanelCopy<kCols>::kStride)
    copy_async_16(panel + plan.to + token * kCols * 2, plan.from + static_cast<i64>(slice.token + token) * plan.ld,
                  plan.token + token < slice.end - slice.token);
}

// Starts the copies of the walk's next slice. One group is committed even past the end, so that counting groups
// always tells which slice has arrived.
GD_DEVICE void copy_slice(u32 stage, const PanelCopy<kTileM>& b, const PanelCopy<kTileN>& a, Walk& walk,
                          const i64* offsets) {
  if (walk.sample < walk.stop) {
    copy_panel(stage, b, walk);
    copy_panel(stage + kPanelM, a, walk);
    walk.token += kDepth;
    if (walk.token >= walk.end) {
      walk.sample++;
      skip_empty_samples(walk, offsets);
    }
  }
  commit_copies();
}

// The bytes of a stage at which this lane's first fragments begin. Step i's are i * 2 chunks further on, which are
// bits that are zero in the first one's chunk, so that swizzled or not they are toggled: 32 * i. Those of 16 tokens
// further on are a constant further on, because the swizzle repeats every 8.
struct Fragments {
  u32 left, right;
};

GD_DEVICE Fragments plan_fragments(const Place& at) {
  static_assert((kWarpM & (kWarpM - 1)) == 0 && (kWarpN & (kWarpN - 1)) == 0, "powers of two");
  static_assert(kWarpM <= 64 && kWarpN <= 64, "32 * i stays within the 128 bytes that stages are multiples of");
  // Both panels lie token by token and the product sums over tokens, so both sides are loaded transposed.
  const int b_token = at.lane % 8 + at.lane / 16 * 8, a_token = at.lane % 16;
  return Fragments{swizzled<kTileM>(b_token, at.warp_m * kWarpM / 8 + at.lane / 8 % 2),
                   kPanelM + swizzled<kTileN>(a_token, at.warp_n * kWarpN / 8 + at.lane / 16)};
}

// acc += B_slice^T A_slice.
template <class Input>
GD_DEVICE void multiply_slice(Accumulators& acc, u32 stage, const Fragments& plan) {
  const u32 b = stage + plan.left, a = stage + plan.right;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    u32 left[kStepsM][4], right[kStepsN / 2][4];
#pragma unroll
    for (int i = 0; i < kStepsM; i++) load_matrices_transposed(left[i], (b ^ i * 32) + k * kTileM * 2);
#pragma unroll
    for (int j = 0; j < kStepsN / 2; j++) load_matrices_transposed(right[j], (a ^ j * 32) + k * kTileN * 2);
#pragma unroll
    for (int i = 0; i < kStepsM; i++)
#pragma unroll
      for (int j = 0; j < kStepsN; j++)
        multiply_add<Input>(acc[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
  }
}

// Calls visit(element, i, j, e) for the elements of this lane that belong to the matrix.
template <bool kMasked, class Visit>
GD_DEVICE void visit_elements(const OuterProduct& q, const Place& at, Accumulators& acc, Visit visit) {
#pragma unroll
  for (int i = 0; i < kStepsM; i++)
#pragma unroll
    for (int j = 0; j < kStepsN; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (!kMasked || (at.row(i, e) < q.num_b_cols && at.col(j, e) < q.num_a_cols)) visit(acc[i][j][e], i, j, e);
}

// Reduces one sample's finished tile to one partial a warp.
GD_DEVICE void reduce_tile(const OuterProduct& q, const Place& at, Accumulators& acc, int sample) {
  auto visit_all = [&](auto take) {
    visit_elements<false>(q, at, acc, [&](float x, int, int, int) { take(x); });
  };
  auto visit_inside = [&](auto take) {
    visit_elements<true>(q, at, acc, [&](float x, int, int, int) { take(x); });
  };
  const Partial partial = reduce_elements(at.whole, visit_all, visit_inside, at.lane);
  const i64 slot = (static_cast<i64>(sample) * q.tiles_m * q.tiles_n + at.tile) * kWarps + at.warp;
  if (at.lane == 0) q.partials[slot] = partial;
}

GD_DEVICE void add_to_total(const OuterProduct& q, const Place& at, Accumulators& total) {
  visit_elements<true>(q, at, total, [&](float x, int i, int j, int e) {
    q.total[static_cast<i64>(at.row(i, e)) * q.ld_total + at.col(j, e)] += x;
  });
}

GD_DEVICE void clear(Accumulators& acc) {
#pragma unroll
  for (int i = 0; i < kStepsM; i++)
#pragma unroll
    for (int j = 0; j < kStepsN; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j][e] = 0.0f;
}

GD_DEVICE void add_weighted(Accumulators& total, const Accumulators& acc, float weight) {
#pragma unroll
  for (int i = 0; i < kStepsM; i++)
#pragma unroll
    for (int j = 0; j < kStepsN; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) total[i][j][e] = fmaf(weight, acc[i][j][e], total[i][j][e]);
}

// One block has one tile and goes through `samples_per_block` samples; with kTotal through all of them, so that the
// sum over samples needs no atomics.
template <class Input, bool kTotal>
GD_DEVICE void outer_product_stats(const OuterProduct& q) {
  GD_DYNAMIC_SHARED(u16, memory);
  u32 first_stage = shared_address(memory);
  const Place at = find_place(q);
  const PanelCopy<kTileM> b = plan_copy<kTileM>(q.b, q.ldb, at.m, q.num_b_cols);
  const PanelCopy<kTileN> a = plan_copy<kTileN>(q.a, q.lda, at.n, q.num_a_cols);
  Fragments fragments = plan_fragments(at);
  // Left to itself the compiler works these out anew for every slice.
  keep_in_register(first_stage);
  keep_in_register(fragments.left);
  keep_in_register(fragments.right);
  Walk copying = begin_walk(q), computing = copying;
  Accumulators acc, total;
  clear(acc);
  if (kTotal) clear(total);
#pragma unroll
  for (int i = 0; i < kStages - 1; i++) copy_slice(first_stage + i * kStage, b, a, copying, q.offsets);
  const u32 last_stage = first_stage + (kStages - 1) * kStage;
  u32 stage = first_stage, next_filled = last_stage;
  while (computing.sample < computing.stop) {
    wait_for_copies<kStages - 2>();
    // Everyone's copies of this stage have arrived, and everyone is done with the stage that is filled next.
    __syncthreads();
    copy_slice(next_filled, b, a, copying, q.offsets);
    multiply_slice<Input>(acc, stage, fragments);
    next_filled = stage;
    stage = stage == last_stage ? first_stage : stage + kStage;
    computing.token += kDepth;
    if (computing.token < computing.end) continue;
    reduce_tile(q, at, acc, computing.sample);
    if (kTotal) add_weighted(total, acc, q.weights[computing.sample]);
    clear(acc);
    computing.sample++;
    skip_empty_samples(computing, q.offsets);
  }
  wait_for_copies<0>();
  if (kTotal) add_to_total(q, at, total);
}

// Statistics alone need half the registers, so that two blocks of the usual tile share a multiprocessor: one
// multiplies while the other reduces.
GD_KERNEL(outer_product_stats_bf16, OuterProduct, kThreads, GD_BLOCKS_PER_SM, outer_product_stats<Bf16, false>)
GD_KERNEL(outer_product_stats_fp16, OuterProduct, kThreads, GD_BLOCKS_PER_SM, outer_product_stats<Fp16, false>)
GD_KERNEL(outer_product_stats_total_bf16, OuterProduct, kThreads, 1, outer_product_stats<Bf16, true>)
GD_KERNEL(outer_product_stats_total_fp16, OuterProduct, kThreads, 1, outer_product_stats<Fp16, true>)
