// Statistics of G_s = B_s^T A_s for every sample s, tile by tile: a tile of G_s lives in registers, is reduced
// there, and is never stored. On request the tiles are also added up over the samples, weighted.
//
// Compiled once for each instruction set (variant.cpp).
//
// Legend: N packed rows (tokens), P columns of B, D columns of A, S samples; MR x NR is the register tile.
#pragma once

#include "panels.h"

namespace {

// Tokens of one chunk of samples: their panels of A stay in the first two cache levels.
constexpr int64_t kChunkTokens = 512;
// Tokens whose products are summed in registers before they are added to the rest.
constexpr int64_t kBlockTokens = 256;
// Bytes of panels of B that one thread goes through for each panel of A.
constexpr int64_t kGroupBytes = 128 << 10;

struct Tile {
  Vec x[kRows][kVectors];
};

// acc = sum over tokens of b_t a_t^T, from `rows` rows of both panels.
template <typename T, typename Element = typename Panels<T>::Element>
inline __attribute__((always_inline)) void multiply(int64_t rows, const Element* __restrict a,
                                                    const Element* __restrict b, Vec (&acc)[kRows][kVectors]) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) acc[i][v] = Vec{};
  for (int64_t r = 0; r < rows; r++, a += kCols, b += kRows) {
    typename Panels<T>::ElementVec av[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) av[v] = load_row(a + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) acc[i][v] = add_products(acc[i][v], av[v], b[i]);
  }
}

// The same in blocks of tokens: a float32 sum of thousands of terms loses digits.
template <typename T, typename Element = typename Panels<T>::Element>
inline __attribute__((always_inline)) void multiply_blocks(int64_t tokens, const Element* a, const Element* b,
                                                           Vec (&acc)[kRows][kVectors]) {
  constexpr int64_t kBlockRows = kBlockTokens / Panels<T>::kTokens;
  const int64_t rows = num_rows<T>(tokens);
  multiply<T>(lesser(rows, kBlockRows), a, b, acc);
  if (rows <= kBlockRows) return;
  Tile sum;
  std::memcpy(&sum, acc, sizeof(Tile));
  for (int64_t r = kBlockRows; r < rows; r += kBlockRows) {
    multiply<T>(lesser(rows - r, kBlockRows), a + r * kCols, b + r * kRows, acc);
    for (int i = 0; i < kRows; i++)
      for (int v = 0; v < kVectors; v++) sum.x[i][v] += acc[i][v];
  }
  std::memcpy(acc, &sum, sizeof(Tile));
}

// One tile of one sample: its statistics into `partial`, and weighted into `sum` when `kSum`.
template <bool kSum, typename T, typename Element = typename Panels<T>::Element>
inline void whole_tile(int64_t tokens, const Element* __restrict a, const Element* __restrict b, Partial& partial,
                       float weight, Tile& sum) {
  Vec acc[kRows][kVectors];
  multiply_blocks<T>(tokens, a, b, acc);
  // Four chains each: the additions would wait for one another.
  Vec low[4], high[4], squares[4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    low[c] = high[c] = acc[c / 2][c % 2];
    squares[c] = low[c] * low[c];
  }
#pragma GCC unroll 16
  for (int i = 2; i < kRows; i++)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) {
      const Vec x = acc[i][v];
      const int c = i % 2 * 2 + v;
      low[c] = smaller(low[c], x);
      high[c] = larger(high[c], x);
      squares[c] += x * x;
    }
  partial.low = smaller(partial.low, smaller(smaller(low[0], low[1]), smaller(low[2], low[3])));
  partial.high = larger(partial.high, larger(larger(high[0], high[1]), larger(high[2], high[3])));
  // float32 within the tile, float64 across tiles.
  partial.sumsq += __builtin_convertvector((squares[0] + squares[1]) + (squares[2] + squares[3]), DVec);
  if (!kSum) return;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) sum.x[i][v] += acc[i][v] * weight;
}

// A tile at the matrix' edge: what lies beyond it is no element.
template <typename T, typename Element = typename Panels<T>::Element>
inline void edge_tile(int64_t tokens, const Element* a, const Element* b, int rows, int cols, Partial& partial,
                      float weight, Tile& sum) {
  Tile tile;
  multiply_blocks<T>(tokens, a, b, tile.x);
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
  partial.sumsq += __builtin_convertvector(squares, DVec);
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
    for (int k = 0; k < 2; k++) lanes[k] += __builtin_convertvector(load(row + c + k * kLanes), DVec);
  double sum = 0;
  for (; c < count; c++) sum += as_float(row[c]);
  const DVec all = lanes[0] + lanes[1];
  for (int l = 0; l < kLanes; l++) sum += all[l];
  return sum;
}

// End of the chunk that begins with sample `first`: small enough for the caches, or one long sample.
inline int64_t chunk_end(const gd_outer_product& q, int64_t first) {
  int64_t last = first + 1;
  while (last < q.num_samples && q.offsets[last + 1] - q.offsets[first] <= kChunkTokens) last++;
  return last;
}

// The samples [first, last) of one chunk, packed.
template <typename T>
struct Chunk {
  int64_t first, last, begin, rows;          // rows of a panel
  const typename Panels<T>::Element *a, *b;  // panel after panel
};

// All tiles of the row panels [i_begin, i_end): statistics into `partials`, the weighted sum into the matrix.
template <typename T>
inline void run_group(const gd_outer_product& q, const Chunk<T>& c, int64_t i_begin, int64_t i_end,
                      Partial* partials) {
  const int64_t count = c.last - c.first;
  for (int64_t n = 0; n < (i_end - i_begin) * count; n++) partials[n] = empty_partial();
  for (int64_t j = 0; j < ceil_div(q.num_a_cols, kCols); j++) {
    const auto* a = c.a + j * kCols * c.rows;
    const int cols = static_cast<int>(lesser(q.num_a_cols - j * kCols, kCols));
    for (int64_t i = i_begin; i < i_end; i++) {
      const auto* b = c.b + i * kRows * c.rows;
      const int rows = static_cast<int>(lesser(q.num_b_cols - i * kRows, kRows));
      const bool whole = rows == kRows && cols == kCols;
      Tile sum{};
      float* at_total = q.total ? q.total + i * kRows * q.ld_total + j * kCols : nullptr;
      if (q.total) {
        // Its rows lie far apart: fetched now, they are there when the products are.
        for (int r = 0; r < rows; r++) __builtin_prefetch(at_total + r * q.ld_total, 1);
      }
      for (int64_t s = c.first; s < c.last; s++) {
        const int64_t length = q.offsets[s + 1] - q.offsets[s];
        if (length == 0) continue;
        const int64_t at = first_row<T>(q.offsets[s] - c.begin, s - c.first);
        Partial& partial = partials[(i - i_begin) * count + s - c.first];
        const float weight = q.weights ? q.weights[s] : 1.0f;
        const auto *a_s = a + at * kCols, *b_s = b + at * kRows;
        if (!whole)
          edge_tile<T>(length, a_s, b_s, rows, cols, partial, weight, sum);
        else if (q.total)
          whole_tile<true, T>(length, a_s, b_s, partial, weight, sum);
        else
          whole_tile<false, T>(length, a_s, b_s, partial, weight, sum);
      }
      if (!q.total) continue;
      if (whole)
        add_to_matrix_whole(sum, at_total, q.ld_total);
      else
        add_to_matrix(sum, rows, cols, at_total, q.ld_total);
    }
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

// The sum over all elements of G_s is sum_t (sum_j b_tj) (sum_k a_tk).
template <typename T>
inline void sum_sample(const gd_outer_product& q, int64_t sample, int64_t begin, const double* products) {
  double sum = 0;
  for (int64_t t = q.offsets[sample]; t < q.offsets[sample + 1]; t++) sum += products[t - begin];
  q.sum[sample] = sum;
  // Elements whose sum is not zero cannot all be: VDPBF16PS took denormal numbers for zeros. The caller then forms
  // the gradient itself.
  const bool vanished = sum != 0 && q.low[sample] == 0 && q.high[sample] == 0;
  if (vanished && Panels<T>::kTokens > 1) q.sumsq[sample] = std::numeric_limits<double>::quiet_NaN();
}

template <typename T>
int outer_product_stats(const gd_outer_product& q) {
  const int64_t num_a = ceil_div(q.num_a_cols, kCols), num_b = ceil_div(q.num_b_cols, kRows);
  const T* a = static_cast<const T*>(q.a);
  const T* b = static_cast<const T*>(q.b);
  int64_t most_tokens = 0, most_rows = 0, most_samples = 0;
  for (int64_t first = 0, last; first < q.num_samples; first = last) {
    last = chunk_end(q, first);
    most_tokens = greater(most_tokens, q.offsets[last] - q.offsets[first]);
    most_rows = greater(most_rows, first_row<T>(q.offsets[last] - q.offsets[first], last - first));
    most_samples = greater(most_samples, last - first);
  }
  const int64_t group = greater(1, lesser(16, kGroupBytes / (kRows * greater(1, most_rows) * 4)));
  Buffer<typename Panels<T>::Element> packed_a(num_a * kCols * most_rows), packed_b(num_b * kRows * most_rows);
  Buffer<double> products(most_tokens);
  Buffer<Numbers> numbers(num_b * most_samples);
  Buffer<Partial> partials(group * most_samples * q.num_threads);
  if (!packed_a.at || !packed_b.at || !products.at || !numbers.at || !partials.at) return GD_NO_MEMORY;

  for (int64_t first = 0, last; first < q.num_samples; first = last) {
    last = chunk_end(q, first);
    const int64_t begin = q.offsets[first], end = q.offsets[last], count = last - first;
    const int64_t rows = first_row<T>(end - begin, count);
    const Chunk<T> chunk{first, last, begin, rows, packed_a.at, packed_b.at};
#pragma omp parallel num_threads(q.num_threads)
    {
#pragma omp for schedule(static) nowait
      for (int64_t j = 0; j < num_a; j++)
        pack_samples(q, first, last, a, q.lda, q.num_a_cols, j, kCols, packed_a.at + j * kCols * rows);
#pragma omp for schedule(static) nowait
      for (int64_t t = begin; t < end; t++)
        products.at[t - begin] = row_sum(b + t * q.ldb, q.num_b_cols) * row_sum(a + t * q.lda, q.num_a_cols);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < num_b; i++)
        pack_samples(q, first, last, b, q.ldb, q.num_b_cols, i, kRows, packed_b.at + i * kRows * rows);
      Partial* own = partials.at + omp_get_thread_num() * group * most_samples;
#pragma omp for schedule(dynamic, 1)
      for (int64_t g = 0; g < ceil_div(num_b, group); g++) {
        const int64_t i_begin = g * group, i_end = lesser(i_begin + group, num_b);
        run_group(q, chunk, i_begin, i_end, own);
        for (int64_t n = 0; n < (i_end - i_begin) * count; n++) numbers.at[i_begin * count + n] = fold(own[n]);
      }
    }
    for (int64_t s = 0; s < count; s++) {
      finish_sample(q, first + s, numbers.at + s, count, num_b);
      sum_sample<T>(q, first + s, begin, products.at);
    }
  }
  return GD_OK;
}

}  // namespace
