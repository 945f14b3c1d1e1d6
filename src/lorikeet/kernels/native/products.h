// Small matrix products of bfloat16 on vdpbf16ps, which multiplies pairs and adds both to a float32.
//
// A Pair is two bfloat16 that are neighbours along the summed dimension. The left operand is read pair
// by pair (broadcast), the right one sixteen pairs at a time.
#pragma once

#include <algorithm>

#include "simd.h"

namespace lorikeet {

using Pair = uint32_t;

// C [MR, 16 NV] (+)= A B over `pairs` pairs; A's pair (m, p) is at a[m * row + p * step].
template <int MR, int NV>
__attribute__((noinline)) void product_block(const Pair* a, long row, long step, const Pair* b, long ldb, long pairs,
                          float* c, long ldc, bool add) {
  Vec sums[MR][NV];
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) sums[m][v] = add ? load(c + m * ldc + 16 * v) : splat(0.f);
  for (long p = 0; p < pairs; ++p) {
    __m512bh right[NV];
    for (int v = 0; v < NV; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + p * ldb + 16 * v);
    for (int m = 0; m < MR; ++m) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[m * row + p * step]);
      for (int v = 0; v < NV; ++v) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], left, right[v]);
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) store(c + m * ldc + 16 * v, sums[m][v]);
}

template <int MR>
inline void product_row(long N, const Pair* a, long row, long step, const Pair* b, long ldb, long pairs,
                        float* c, long ldc, bool add) {
  long n = 0;
  for (; n + 64 <= N; n += 64) product_block<MR, 4>(a, row, step, b + n, ldb, pairs, c + n, ldc, add);
  for (; n + 32 <= N; n += 32) product_block<MR, 2>(a, row, step, b + n, ldb, pairs, c + n, ldc, add);
  for (; n < N; n += 16) product_block<MR, 1>(a, row, step, b + n, ldb, pairs, c + n, ldc, add);
}

// What of a product counts where a tile of queries meets its own keys, seen from row m of C: half of
// it falls behind the causal mask. What is left out of C is not written.
enum class Part { all, columns_up_to_row, columns_from_row, pairs_up_to_row, pairs_from_row };

// C [M, N] (+)= A B; N is a multiple of 16.
inline void product(long M, long N, long pairs, const Pair* a, long row, long step, const Pair* b,
                    long ldb, float* c, long ldc, bool add, Part part = Part::all) {
  for (long m = 0; m < M;) {
    const long rows = M - m >= 4 ? 4 : 1;
    long from = 0, to = N, first = 0, last = pairs;
    if (part == Part::columns_up_to_row) to = std::min(N, (m + rows + 15) / 16 * 16);
    if (part == Part::columns_from_row) from = m / 16 * 16;
    if (part == Part::pairs_up_to_row) last = std::min(pairs, (m + rows + 1) / 2);
    if (part == Part::pairs_from_row) first = m / 2;
    const Pair *left = a + m * row + first * step, *right = b + first * ldb + from;
    float* out = c + m * ldc + from;
    if (rows == 4)
      product_row<4>(to - from, left, row, step, right, ldb, last - first, out, ldc, add);
    else
      product_row<1>(to - from, left, row, step, right, ldb, last - first, out, ldc, add);
    m += rows;
  }
}

// X [L, D] with rows `stride` apart -> [length / 2, D] pairs along the rows; rows from L on are zero.
// length is even, D a multiple of 16.
inline void interleaved(const bf16* x, long L, long length, long D, long stride, Pair* out) {
  for (long p = 0; p < length / 2; ++p)
    for (long i = 0; i < D; i += 16) {
      const __m256i zero = _mm256_setzero_si256();
      const bf16* from = x + 2 * p * stride + i;
      const __m256i a = 2 * p < L ? _mm256_loadu_si256((const __m256i*)from) : zero;
      const __m256i b = 2 * p + 1 < L ? _mm256_loadu_si256((const __m256i*)(from + stride)) : zero;
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
      _mm512_storeu_si512(out + p * D + i, _mm512_or_si512(_mm512_cvtepu16_epi32(a), high));
    }
}

}  // namespace lorikeet
