// Statistics of G_s = B_s^T A_s for every sample s, tile by tile: a tile of G_s lives in registers, is reduced
// there, and is never stored. On request the tiles are also added up over the samples, weighted.
//
// Compiled once for each instruction set (variant.cpp).
//
// Legend: N packed rows (tokens), P columns of B, D columns of A, S samples; MR x NR is the register tile.
#pragma once

#include "panels.h"
#ifdef GD_BF16_TILES
#include "tiles.h"
#endif

namespace {

// Tokens whose products are summed in registers before they are added to the rest.
constexpr int64_t kBlockTokens = 256;
// Tokens that one thread packs at a time; a multiple of a row's.
constexpr int64_t kPackTokens = 32;
// Bytes of panels of B that one thread goes through for each panel of A, and at most how many.
constexpr int64_t kGroupBytes = (kLanes == 16 ? 512 : 128) << 10;
constexpr int64_t kGroupPanels = 16;
// Panels of A that share what was fetched of one block of a long sample.
constexpr int64_t kLongPanels = 8;

// Tokens of one chunk of samples: their panels of A stay in the first two cache levels. For AMX it pays to keep them in
// the first, but where the batch's weight gradient is wanted, to read and write that less often, once a chunk.
inline int64_t chunk_tokens(const gd_outer_product& q) {
#ifdef GD_BF16_TILES
  return q.total ? 1024 : 256;
#else
  return 512;
#endif
}

// Panels of B that a thread goes through at a time: as many as the cache holds, and at least two such groups for each
// thread, so that all end together.
inline int64_t group_panels(int64_t num_panels, int64_t panel_bytes, int64_t num_threads) {
  const int64_t most = greater(1, lesser(kGroupPanels, kGroupBytes / panel_bytes));
  const int64_t rounds = greater(2, ceil_div(num_panels, num_threads * most));
  return greater(1, ceil_div(num_panels, num_threads * rounds));
}

struct Tile {
  Vec x[kRows][kVectors];
};

// tile = sum over tokens of b_t a_t^T, from `rows` rows of both panels. `before` is done before the tile is written.
template <typename T, typename Before, typename Element = typename Panels<T>::Element>
inline __attribute__((always_inline)) void multiply(int64_t rows, const Element* __restrict a,
                                                    const Element* __restrict b, Tile& tile, Before before) {
#ifdef GD_BF16_TILES
  multiply_tiles(rows, a, b);
  before();
  store_tiles(tile.x);
#else
  before();
  Vec acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) acc[i][v] = Vec{};
  for (int64_t r = 0; r < rows; r++, a += kCols, b += kRows) {
    if (kLanes == 16) {  // a row is two cache lines, and there are instructions to spare
      __builtin_prefetch(b + 16 * kRows);
      for (int c = 0; c < kCols; c += 16) __builtin_prefetch(a + 8 * kCols + c);
    }
    typename Panels<T>::ElementVec av[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) av[v] = load_row(a + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) acc[i][v] = add_products(acc[i][v], av[v], b[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) tile.x[i][v] = acc[i][v];
#endif
}

inline void add(Tile& sum, const Tile& tile) {
  for (int i = 0; i < kRows; i++)
    for (int v = 0; v < kVectors; v++) sum.x[i][v] += tile.x[i][v];
}

// Statistics of a tile into `partial`; weighted it goes into `sum` when `kSum`.
template <bool kSum>
inline __attribute__((always_inline)) void reduce_whole(const Tile& tile, Partial& partial, float weight, Tile& sum) {
  const Partial none = empty_partial();
  // Four chains each: the additions would wait for one another.
  Vec low[4], high[4], squares[4];
  for (int c = 0; c < 4; c++) {
    low[c] = none.low;
    high[c] = none.high;
    squares[c] = Vec{};
  }
#pragma GCC unroll 1
  for (int i = 0; i < kRows; i += 2)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
      const Vec x = tile.x[i + c / 2][c % 2];
      low[c] = smaller(low[c], x);
      high[c] = larger(high[c], x);
      squares[c] += x * x;
      if (kSum) sum.x[i + c / 2][c % 2] += x * weight;
    }
  partial.low = smaller(partial.low, smaller(smaller(low[0], low[1]), smaller(low[2], low[3])));
  partial.high = larger(partial.high, larger(larger(high[0], high[1]), larger(high[2], high[3])));
  // float32 within the tile, float64 across tiles.
  partial.sumsq += widen((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

// A tile at the matrix' edge: what lies beyond it is no element.
inline void reduce_edge(const Tile& tile, int rows, int cols, Partial& partial, float weight, Tile& sum) {
  Vec squares = Vec{};
  for (int i = 0; i < rows; i++)
    for (int c = 0; c < cols; c++) {
      const int l = c % kLanes;
      const float x = tile.x[i][c / kLanes][l];
      partial.low[l] = x < partial.low[l] ? x : partial.low[l];
      partial.high[l] = x > partial.high[l] ? x : partial.high[l];
      squares[l] += x * x;
      sum.x[i][c / kLanes][l] += x * weight;
    }
  partial.sumsq += widen(squares);
}

inline void add_to_matrix(const Tile& sum, int rows, int cols, float* total, int64_t ld) {
  for (int i = 0; i < rows; i++) {
    float* row = total + i * ld;
    for (int c = 0; c < cols; c++) row[c] += sum.x[i][c / kLanes][c % kLanes];
  }
}

inline void add_to_matrix_whole(const Tile& sum, float* total, int64_t ld) {
  for (int i = 0; i < kRows; i++)
    for (int v = 0; v < kVectors; v++) {
      float* at = total + i * ld + v * kLanes;
      store(at, load(at) + sum.x[i][v]);
    }
}

// Sum of one row in float64: that of an LM head's gradient is zero but for rounding.
template <typename T>
inline double row_sum(const T* row, int64_t count) {
  DVec lanes[2] = {};
  int64_t c = 0;
  for (; c + 2 * kLanes <= count; c += 2 * kLanes)
    for (int k = 0; k < 2; k++) lanes[k] += widen(load(row + c + k * kLanes));
  double sum = 0;
  for (; c < count; c++) sum += as_float(row[c]);
  const DVec all = lanes[0] + lanes[1];
  for (int l = 0; l < kLanes; l++) sum += all[l];
  return sum;
}

// Where the rows of each sample's panels begin; S + 1.
template <typename T>
inline void count_rows(const gd_outer_product& q, int64_t* rows) {
  rows[0] = 0;
  for (int64_t s = 0; s < q.num_samples; s++) rows[s + 1] = rows[s] + num_rows<T>(q.offsets[s + 1] - q.offsets[s]);
}

// End of the chunk that begins with sample `first`: small enough for the caches, or one long sample.
template <typename T>
inline int64_t chunk_end(const gd_outer_product& q, const int64_t* rows, int64_t first) {
  int64_t last = first + 1;
  while (last < q.num_samples && (rows[last + 1] - rows[first]) * Panels<T>::kTokens <= chunk_tokens(q)) last++;
  return last;
}

// The samples [first, last) of one chunk, packed.
template <typename T>
struct Chunk {
  typedef typename Panels<T>::Element Element;
  static constexpr int64_t kDepth = Panels<T>::kDepth;

  int64_t first, last, begin, end;  // samples, tokens
  const int64_t* starts;            // of each sample's rows, from sample 0
  Element *a, *b;                   // panel after panel

  int64_t rows() const { return starts[last] - starts[first]; }
  int64_t row(int64_t s) const { return starts[s] - starts[first]; }
  Element* a_rows(int64_t panel, int64_t row) const { return a + (panel * rows() + row) * kCols * kDepth; }
  Element* b_rows(int64_t panel, int64_t row) const { return b + (panel * rows() + row) * kRows * kDepth; }
};

// A thread's share of the packing, and of the tokens' part of the sum: the sum over all elements of G_s is
// sum_t (sum_j b_tj) (sum_k a_tk).
template <typename T>
inline void pack_share(const gd_outer_product& q, const Chunk<T>& c, double* products) {
  const T *a = static_cast<const T*>(q.a), *b = static_cast<const T*>(q.b);
  int64_t turn = 0;
  for (int64_t s = c.first; s < c.last; s++)
    for (int64_t t = q.offsets[s]; t < q.offsets[s + 1]; t += kPackTokens) {
      if (turn++ % omp_get_num_threads() != omp_get_thread_num()) continue;
      const int64_t count = lesser(q.offsets[s + 1] - t, kPackTokens);
      const int64_t row = c.row(s) + (t - q.offsets[s]) / Panels<T>::kTokens;
      // First what goes along the rows, which the processor fetches ahead; the panels then find them in the cache.
      for (int64_t u = t; u < t + count; u++)
        products[u - c.begin] = row_sum(b + u * q.ldb, q.num_b_cols) * row_sum(a + u * q.lda, q.num_a_cols);
      pack_panels<kRight>(a + t * q.lda, q.lda, count, q.num_a_cols, c.rows(), c.a_rows(0, row));
      pack_panels<kLeft>(b + t * q.ldb, q.ldb, count, q.num_b_cols, c.rows(), c.b_rows(0, row));
    }
}

// Panels of B from `i_begin`, panels of A from `j_begin`.
struct Group {
  int64_t i_begin, i_end, j_begin, j_end;
};

// One pair of panels: what its tile is reduced into.
struct Place {
  int rows, cols;  // of the tile, inside the matrix
  float* total;    // the tile of the batch's weight gradient, or null
  int64_t ld_total;

  bool whole() const { return rows == kRows && cols == kCols; }
};

inline Place place(const gd_outer_product& q, int64_t i, int64_t j) {
  return {static_cast<int>(lesser(q.num_b_cols - i * kRows, kRows)),
          static_cast<int>(lesser(q.num_a_cols - j * kCols, kCols)),
          q.total ? q.total + i * kRows * q.ld_total + j * kCols : nullptr, q.ld_total};
}

// Its rows lie far apart: fetched now, they are there when the products are.
inline __attribute__((always_inline)) void fetch_total(const Place& p) {
  if (!p.total) return;
  for (int r = 0; r < p.rows; r++)
    for (int c = 0; c < p.cols; c += 16) __builtin_prefetch(p.total + r * p.ld_total + c, 1);
}

inline void reduce(const Place& p, const Tile& tile, Partial& partial, float weight, Tile& sum) {
  if (!p.whole())
    reduce_edge(tile, p.rows, p.cols, partial, weight, sum);
  else if (p.total)
    reduce_whole<true>(tile, partial, weight, sum);
  else
    reduce_whole<false>(tile, partial, weight, sum);
}

inline void add_to_total(const Place& p, const Tile& sum) {
  if (!p.total) return;
  if (p.whole())
    add_to_matrix_whole(sum, p.total, p.ld_total);
  else
    add_to_matrix(sum, p.rows, p.cols, p.total, p.ld_total);
}

// The tile of one sample that is not longer than a chunk, in blocks of tokens: a float32 sum of thousands of terms
// loses digits.
template <typename T, typename Before>
inline __attribute__((always_inline)) void multiply_blocks(const Chunk<T>& c, int64_t i, int64_t j, int64_t s,
                                                           Tile& tile, Before before) {
  constexpr int64_t kBlockRows = kBlockTokens / Panels<T>::kTokens;
  const int64_t begin = c.row(s), end = c.row(s + 1);
  multiply<T>(lesser(end - begin, kBlockRows), c.a_rows(j, begin), c.b_rows(i, begin), tile, before);
  for (int64_t r = begin + kBlockRows; r < end; r += kBlockRows) {
    Tile block;
    multiply<T>(lesser(end - r, kBlockRows), c.a_rows(j, r), c.b_rows(i, r), block, [] {});
    add(tile, block);
  }
}

// A tile that waits for its reduction, which comes after the next tile's products have begun: AMX works on them
// meanwhile.
struct Work {
  Tile tile;
  Place place;
  bool first, last;  // of those that go into one tile of the batch's weight gradient
  Partial* partial;  // null before the first
  float weight;
};

inline void finish(const Work& w, Tile& sum) {
  if (!w.partial) return;
  if (w.first && w.place.total) sum = Tile{};
  reduce(w.place, w.tile, *w.partial, w.weight, sum);
  if (w.last) add_to_total(w.place, sum);
}

// All tiles of a group of panels: statistics into `partials`, the weighted sum into the matrix.
template <typename T>
inline void run_group(const gd_outer_product& q, const Chunk<T>& c, const Group& g, Partial* partials) {
  int64_t first = c.first, last = c.last;
  while (first < last && c.row(first) == c.row(first + 1)) first++;
  while (first < last && c.row(last - 1) == c.row(last)) last--;
  Work w;
  w.partial = nullptr;
  Tile sum{};
  for (int64_t j = g.j_begin; j < g.j_end; j++)
    for (int64_t i = g.i_begin; i < g.i_end; i++) {
      const Place p = place(q, i, j);
      fetch_total(p);
      for (int64_t s = first; s < last; s++) {
        if (c.row(s) == c.row(s + 1)) continue;
        multiply_blocks(c, i, j, s, w.tile, [&] { finish(w, sum); });
        w.place = p;
        w.first = s == first;
        w.last = s == last - 1;
        w.partial = &partials[(i - g.i_begin) * (c.last - c.first) + s - c.first];
        w.weight = q.weights ? q.weights[s] : 1.0f;
      }
    }
  finish(w, sum);
}

// Fetches one of `parts` of some memory into the second-level cache. Inlined, because GCC takes a function that only
// fetches for one without effect, and drops the call.
inline __attribute__((always_inline)) void fetch_part(const void* at, int64_t bytes, int64_t part, int64_t parts) {
  const char* from = static_cast<const char*>(at);
  for (int64_t b = bytes * part / parts / 64 * 64; b < bytes * (part + 1) / parts; b += 64)
    __builtin_prefetch(from + b, 0, 2);
}

// While a tile of block `r` is multiplied: a part of the next panel of A, and of the same panel of B in the next block.
// Other instruction sets are too slow to wait for memory here, and gain nothing.
template <typename T>
inline __attribute__((always_inline)) void fetch_ahead(const Chunk<T>& c, const Group& g, int64_t i, int64_t j,
                                                       int64_t r) {
#ifdef GD_BF16_TILES
  constexpr int64_t kBlockRows = kBlockTokens / Panels<T>::kTokens;
  constexpr int64_t kBytes = kBlockRows * Panels<T>::kDepth * sizeof(typename Panels<T>::Element);  // a column
  const bool ends = r + kBlockRows >= c.rows(), turns = j + 1 == g.j_end;
  if (!turns || !ends)
    fetch_part(turns ? c.a_rows(g.j_begin, r + kBlockRows) : c.a_rows(j + 1, r), kBytes * kCols, i - g.i_begin,
               g.i_end - g.i_begin);
  if (!ends) fetch_part(c.b_rows(i, r + kBlockRows), kBytes * kRows, j - g.j_begin, g.j_end - g.j_begin);
#endif
}

// The same for one long sample, block by block: the blocks of so many panels stay in the second-level cache, and so do
// the sums of their tiles.
template <typename T>
inline void run_long_group(const gd_outer_product& q, const Chunk<T>& c, const Group& g, Partial* partials,
                           Tile* sums) {
  constexpr int64_t kBlockRows = kBlockTokens / Panels<T>::kTokens;
  for (int64_t r = 0; r < c.rows(); r += kBlockRows) {
    const int64_t rows = lesser(c.rows() - r, kBlockRows);
    Tile* sum = sums;
    for (int64_t j = g.j_begin; j < g.j_end; j++)
      for (int64_t i = g.i_begin; i < g.i_end; i++, sum++) {
        fetch_ahead(c, g, i, j, r);
        Tile tile;
        multiply<T>(rows, c.a_rows(j, r), c.b_rows(i, r), r ? tile : *sum, [] {});
        if (r) add(*sum, tile);
      }
  }
  const Tile* sum = sums;
  for (int64_t j = g.j_begin; j < g.j_end; j++)
    for (int64_t i = g.i_begin; i < g.i_end; i++, sum++) {
      const Place p = place(q, i, j);
      Tile weighted{};
      reduce(p, *sum, partials[i - g.i_begin], q.weights ? q.weights[c.first] : 1.0f, weighted);
      add_to_total(p, weighted);
    }
}

// The row panels' numbers of one sample, in order.
inline void finish_sample(const gd_outer_product& q, int64_t sample, const Numbers* numbers, int64_t stride,
                          int64_t num_panels) {
  Numbers n = numbers[0];
  for (int64_t i = 1; i < num_panels; i++) {
    const Numbers& m = numbers[i * stride];
    n.low = m.low < n.low ? m.low : n.low;
    n.high = m.high > n.high ? m.high : n.high;
    n.sumsq += m.sumsq;
  }
  const bool empty = q.offsets[sample + 1] == q.offsets[sample];
  q.low[sample] = empty ? 0.0f : n.low;
  q.high[sample] = empty ? 0.0f : n.high;
  q.sumsq[sample] = empty ? 0.0 : n.sumsq;
}

template <typename T>
inline void sum_sample(const gd_outer_product& q, int64_t sample, int64_t begin, const double* products) {
  double sum = 0;
  for (int64_t t = q.offsets[sample]; t < q.offsets[sample + 1]; t++) sum += products[t - begin];
  q.sum[sample] = sum;
  // Elements whose sum is not zero cannot all be: VDPBF16PS and TDPBF16PS took denormal numbers for zeros. The caller
  // then forms the gradient itself.
  const bool vanished = sum != 0 && q.low[sample] == 0 && q.high[sample] == 0;
  if (vanished && Panels<T>::kTokens > 1) q.sumsq[sample] = std::numeric_limits<double>::quiet_NaN();
}

template <typename T>
int outer_product_stats(const gd_outer_product& q) {
  const int64_t num_a = ceil_div(q.num_a_cols, kCols), num_b = ceil_div(q.num_b_cols, kRows);
  Buffer<int64_t> starts(q.num_samples + 1);
  if (!starts.at) return GD_NO_MEMORY;
  count_rows<T>(q, starts.at);
  int64_t most_tokens = 0, most_rows = 0, most_samples = 0;
  for (int64_t first = 0, last; first < q.num_samples; first = last) {
    last = chunk_end<T>(q, starts.at, first);
    most_tokens = greater(most_tokens, q.offsets[last] - q.offsets[first]);
    most_rows = greater(most_rows, starts.at[last] - starts.at[first]);
    most_samples = greater(most_samples, last - first);
  }
  const int64_t chunk_rows = lesser(most_rows, chunk_tokens(q) / Panels<T>::kTokens);
  const int64_t panel_bytes = kRows * Panels<T>::kDepth * 4 * greater(1, chunk_rows);
  const int64_t group = group_panels(num_b, panel_bytes, q.num_threads);
  Buffer<typename Panels<T>::Element> packed_a(num_a * kCols * Panels<T>::kDepth * most_rows);
  Buffer<typename Panels<T>::Element> packed_b(num_b * kRows * Panels<T>::kDepth * most_rows);
  Buffer<double> products(most_tokens);
  Buffer<Numbers> numbers(num_b * most_samples);
  Buffer<Partial> partials(group * most_samples * q.num_threads);
  Buffer<Tile> sums(most_tokens > chunk_tokens(q) ? group * kLongPanels * q.num_threads : 0);
  if (!packed_a.at || !packed_b.at || !products.at || !numbers.at || !partials.at || !sums.at) return GD_NO_MEMORY;

  for (int64_t first = 0, last; first < q.num_samples; first = last) {
    last = chunk_end<T>(q, starts.at, first);
    const int64_t count = last - first;
    const Chunk<T> chunk{first, last, q.offsets[first], q.offsets[last], starts.at, packed_a.at, packed_b.at};
    const bool is_long = chunk.end - chunk.begin > chunk_tokens(q);
#pragma omp parallel num_threads(q.num_threads)
    {
      const Tiles tiles;
      Partial* own = partials.at + omp_get_thread_num() * group * most_samples;
      pack_share(q, chunk, products.at);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
      for (int64_t g = 0; g < ceil_div(num_b, group); g++) {
        const int64_t i_begin = g * group, i_end = lesser(i_begin + group, num_b);
        for (int64_t n = 0; n < (i_end - i_begin) * count; n++) own[n] = empty_partial();
        Tile* own_sums = sums.at + omp_get_thread_num() * group * kLongPanels;
        if (is_long)
          for (int64_t j = 0; j < num_a; j += kLongPanels)
            run_long_group(q, chunk, {i_begin, i_end, j, lesser(j + kLongPanels, num_a)}, own, own_sums);
        else
          run_group(q, chunk, {i_begin, i_end, 0, num_a}, own);
        for (int64_t n = 0; n < (i_end - i_begin) * count; n++) numbers.at[i_begin * count + n] = fold(own[n]);
      }
    }
    for (int64_t s = 0; s < count; s++) {
      finish_sample(q, first + s, numbers.at + s, count, num_b);
      sum_sample<T>(q, first + s, chunk.begin, products.at);
    }
  }
  return GD_OK;
}

}  // namespace
