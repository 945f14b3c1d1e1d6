// Products with the factors of adapters: few rows, so many that a library's call costs as much as its
// arithmetic. Masters are read as they are (float32, any strides) and rounded to bfloat16 on the way;
// dropout happens where its input is read anyway.
//
// Legend: T tokens, n columns of the wide operand, R rows of all factors F_1, F_2, ... [r_i, n] laid
// one on the other. Wide operands are bfloat16 and contiguous.

#include <omp.h>

#include <algorithm>
#include <vector>

#include "mask.h"
#include "products.h"

using namespace lorikeet;

namespace {

struct Factor {
  const float* at;
  long rows, row_step, column_step;

  // Sixteen columns of a row, from a column on; beyond the mask zeros.
  Vec columns(long row, long column, __mmask16 m) const {
    const float* p = at + row * row_step + column * column_step;
    if (column_step == 1) return load(p, m);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i step = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)column_step));
    return _mm512_mask_i32gather_ps(splat(0.f), m, step, p, 4);
  }
};

struct Factors {
  const Factor* list;
  long count;
  float scale;

  long rows() const {
    long sum = 0;
    for (long i = 0; i < count; ++i) sum += list[i].rows;
    return sum;
  }

  // Row r of all of them, scaled; r may lie beyond the last, which gives zeros.
  Vec columns(long r, long column, __mmask16 m) const {
    for (long i = 0; i < count; r -= list[i++].rows)
      if (r < list[i].rows) return _mm512_mul_ps(list[i].columns(r, column, m), splat(scale));
    return splat(0.f);
  }
};

inline long up_to(long x, long multiple) { return (x + multiple - 1) / multiple * multiple; }

// The sums of four vectors, side by side.
inline __m128 sums(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  const Vec v = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                              _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

constexpr long kTokens = 6, kRows = 4;  // of a tile of dot products: 24 sums in registers

// out [kTokens, kRows] = x · f over n columns, a multiple of 32
inline void dots(const bf16* const* x, const bf16* f, long n, __m128* out) {
  Vec total[kTokens][kRows];
  for (auto& row : total)
    for (Vec& v : row) v = splat(0.f);
  for (long i = 0; i < n; i += 32) {
    __m512bh right[kRows];
    for (long r = 0; r < kRows; ++r) right[r] = (__m512bh)_mm512_loadu_si512(f + r * n + i);
    for (long t = 0; t < kTokens; ++t) {
      const __m512bh left = (__m512bh)_mm512_loadu_si512(x[t] + i);
      for (long r = 0; r < kRows; ++r) total[t][r] = _mm512_dpbf16_ps(total[t][r], left, right[r]);
    }
  }
  for (long t = 0; t < kTokens; ++t) out[t] = sums(total[t][0], total[t][1], total[t][2], total[t][3]);
}

// A row of x under the mask, its end filled with zeros to `width`.
inline void copy_row(const bf16* x, long first, long n, long width, const Mask& mask, bf16* out) {
  for (long i = 0; i < width; i += kLanes) {
    const __mmask16 m = i < n ? lanes(n - i) : 0;
    store(out + i, mask.on(first + i, load(x + i, m)));
  }
}

// y [T, R] with rows `stride` apart = (x ∘ mask) Fᵀ for x [T, n]
void narrow(long T, long n, const bf16* x, Mask mask, Factors f, bf16* y, long stride) {
  const long R = f.rows(), width = up_to(n, 32), tall = up_to(R, kRows);
  std::vector<bf16> packed(tall * width);
  const bool in_place = width == n && mask.threshold == 0;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (long r = 0; r < tall; ++r)
      for (long i = 0; i < width; i += kLanes)
        store(&packed[r * width + i], f.columns(r, i, i < n ? lanes(n - i) : 0));
    std::vector<bf16> copy(in_place ? 0 : kTokens * width);
#pragma omp for schedule(static)
    for (long t = 0; t < T; t += kTokens) {
      const long count = std::min(kTokens, T - t);
      const bf16* rows[kTokens];
      for (long i = 0; i < kTokens; ++i) {  // missing rows repeat the last and are not written
        const long own = t + std::min(i, count - 1);
        rows[i] = in_place ? x + own * n : &copy[i * width];
        for (long c = 0; c < n; c += 32) _mm_prefetch(x + (own + kTokens) * n + c, _MM_HINT_T0);
        if (!in_place) copy_row(x + own * n, own * n, n, width, mask, &copy[i * width]);
      }
      for (long r = 0; r < R; r += kRows) {
        __m128 out[kTokens];
        dots(rows, &packed[r * width], width, out);
        for (long i = 0; i < count; ++i) {
          const __m128i rounded = (__m128i)_mm_cvtneps_pbh(out[i]);
          __builtin_memcpy(y + (t + i) * stride + r, &rounded, 2 * std::min(kRows, R - r));
        }
      }
    }
  }
}

// Rows of the factors in pairs, [pairs, width]: pair p, column i holds F[2p, i] and F[2p + 1, i].
void pair_rows(const Factors& f, long pairs, long n, long width, Pair* out) {
#pragma omp for schedule(static)
  for (long p = 0; p < pairs; ++p)
    for (long i = 0; i < width; i += kLanes) {
      const __mmask16 m = i < n ? lanes(n - i) : 0;
      const __m256i even = (__m256i)_mm512_cvtneps_pbh(f.columns(2 * p, i, m));
      const __m256i odd = (__m256i)_mm512_cvtneps_pbh(f.columns(2 * p + 1, i, m));
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
      _mm512_storeu_si512(out + p * width + i, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
    }
}

// y [MR rows, 16 NV columns] += (left F) ∘ mask
template <int MR, int NV>
inline void widen_tile(const Pair* left, long pairs, const Pair* f, long width, long n, long column,
                       long first, const Mask& mask, bf16* y) {
  Vec total[MR][NV];
  for (auto& row : total)
    for (Vec& v : row) v = splat(0.f);
  for (long p = 0; p < pairs; ++p) {
    __m512bh right[NV];
    for (int v = 0; v < NV; ++v) right[v] = (__m512bh)_mm512_loadu_si512(f + p * width + column + 16 * v);
    for (int m = 0; m < MR; ++m) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)left[m * pairs + p]);
      for (int v = 0; v < NV; ++v) total[m][v] = _mm512_dpbf16_ps(total[m][v], pair, right[v]);
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) {
      const long i = column + 16 * v;
      if (i >= n) continue;
      const __mmask16 own = lanes(n - i);
      bf16* at = y + m * n + i;
      store(at, _mm512_add_ps(load(at, own), mask.on(first + m * n + i, total[m][v])), own);
    }
}

template <int MR>
inline void widen_rows(const Pair* left, long pairs, const Pair* f, long width, long n, long first,
                       const Mask& mask, bf16* y) {
  long i = 0;
  for (; i + 64 <= width; i += 64) widen_tile<MR, 4>(left, pairs, f, width, n, i, first, mask, y);
  for (; i < width; i += 16) widen_tile<MR, 1>(left, pairs, f, width, n, i, first, mask, y);
}

// y [T, n] += (x F) ∘ mask for x [T, R] with rows `stride` apart
void widen(long T, long n, const bf16* x, long stride, Factors f, Mask mask, bf16* y) {
  constexpr long kBlock = 4;
  const long R = f.rows(), pairs = (R + 1) / 2, width = up_to(n, 16);
  std::vector<Pair> packed(pairs * width);
#pragma omp parallel
  {
    pair_rows(f, pairs, n, width, packed.data());
    std::vector<Pair> left(kBlock * pairs);  // an odd last column meets a row of zeros
#pragma omp for schedule(static)
    for (long t = 0; t < T; t += kBlock) {
      const long count = std::min(kBlock, T - t);
      for (long i = 0; i < count; ++i) __builtin_memcpy(&left[i * pairs], x + (t + i) * stride, 2 * R);
      bf16* rows = y + t * n;
      if (count == kBlock)
        widen_rows<kBlock>(left.data(), pairs, packed.data(), width, n, t * n, mask, rows);
      else
        for (long i = 0; i < count; ++i)
          widen_rows<1>(&left[i * pairs], pairs, packed.data(), width, n, (t + i) * n, mask, rows + i * n);
    }
  }
}

// Rows from t to t + 2 pairs of x ∘ mask, columns [first, first + width), as pairs along the rows; rows
// from T on and columns from n on are zero. Rows of x lie `stride` apart; width is a multiple of 16.
template <long ahead>
inline void masked_pairs(const bf16* x, long T, long n, long stride, long t, long pairs, long first,
                         long width, const Mask& mask, Pair* out) {
  const auto row = [&](long own, long i) {
    const __mmask16 m = own < T && i < n ? lanes(n - i) : 0;
    const bf16* at = x + (m ? own * stride + i : 0);
    _mm_prefetch(at + ahead * stride, _MM_HINT_T1);
    if (mask.threshold == 0) return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, at));
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(mask.on(own * n + i, load(at, m))));
  };
  for (long p = 0; p < pairs; ++p)
    for (long i = 0; i < width; i += kLanes) {
      const __m512i even = row(t + 2 * p, first + i), odd = row(t + 2 * p + 1, first + i);
      _mm512_storeu_si512(out + p * width + i, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

constexpr long kBlock = 64;  // tokens that are interleaved at a time

// out = scale xᵀ (wide ∘ mask) for x [T, R] with rows `stride` apart and wide [T, n]; element (r, i) at
// out[r * row_step + i * column_step]. A thread takes some columns of all tokens, and walks along the
// rows, as the processor expects it; an element's sum does not depend on the number of threads.
void outer(long T, long R, const bf16* x, long stride, long n, const bf16* wide, Mask mask, float scale,
           float* out, long row_step, long column_step) {
  const long tall = up_to(R, 16), share = up_to((n + omp_get_max_threads() - 1) / omp_get_max_threads(), 64);
  std::vector<Pair> left(up_to(T, kBlock) / 2 * tall);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (long t = 0; t < T; t += kBlock)
      masked_pairs<0>(x, T, R, stride, t, kBlock / 2, 0, tall, Mask{}, &left[t / 2 * tall]);
#pragma omp for schedule(static)
    for (long column = 0; column < n; column += share) {
      const long own = std::min(share, n - column), width = up_to(own, 16);
      std::vector<Pair> right(kBlock / 2 * width);
      std::vector<float> sums(R * width);
      for (long t = 0; t < T; t += kBlock) {
        const long pairs = (std::min(kBlock, T - t) + 1) / 2;
        masked_pairs<kBlock>(wide, T, n, n, t, pairs, column, width, mask, right.data());
        for (long i = 0; i < width; i += 64)
          product(R, std::min(64L, width - i), pairs, &left[t / 2 * tall], 1, tall, &right[i], width,
                  &sums[i], width, true);
      }
      for (long r = 0; r < R; ++r)
        for (long i = 0; i < own; ++i)
          out[r * row_step + (column + i) * column_step] = scale * sums[r * width + i];
    }
  }
}

}  // namespace

extern "C" {

void lk_narrow(long T, long n, const void* x, long key, long threshold, float kept, long count,
               const Factor* list, float scale, void* y, long stride) {
  const Mask mask{(uint32_t)key, (uint32_t)threshold, kept};
  narrow(T, n, (const bf16*)x, mask, Factors{list, count, scale}, (bf16*)y, stride);
}

void lk_widen(long T, long n, const void* x, long stride, long count, const Factor* list, float scale,
              long key, long threshold, float kept, void* y) {
  const Mask mask{(uint32_t)key, (uint32_t)threshold, kept};
  widen(T, n, (const bf16*)x, stride, Factors{list, count, scale}, mask, (bf16*)y);
}

void lk_outer(long T, long R, const void* x, long stride, long n, const void* wide, long key,
              long threshold, float kept, float scale, float* out, long row_step, long column_step) {
  const Mask mask{(uint32_t)key, (uint32_t)threshold, kept};
  outer(T, R, (const bf16*)x, stride, n, (const bf16*)wide, mask, scale, out, row_step, column_step);
}

}  // extern "C"
