// Products that sum over the tokens: the gradients of low-rank factors, without rounding to bfloat16.
//
// Legend: T tokens, R columns of the narrow operand, n of the wide one; both are multiples of 16.

#include <algorithm>
#include <vector>

#include "products.h"

using namespace lorikeet;

namespace {

constexpr long kColumns = 64;  // of a task: its sums stay in the nearest cache
constexpr long kRows = 128;    // tokens that are interleaved at a time

// C [R, n] = aᵀ b for a [T, R] with rows `stride` apart and b [T, n]
void outer(long T, long R, long stride, long n, const bf16* a, const bf16* b, float* c) {
  std::fill(c, c + R * n, 0.f);
  const long even = (T + 1) / 2 * 2;
  std::vector<Pair> left(even / 2 * R);
  interleaved(a, T, even, R, stride, left.data());
#pragma omp parallel for schedule(dynamic)
  for (long column = 0; column < n; column += kColumns) {
    const long width = std::min(kColumns, n - column);
    alignas(64) Pair right[kRows / 2 * kColumns];
    for (long t = 0; t < T; t += kRows) {
      const long rows = std::min(kRows, T - t), pairs = (rows + 1) / 2;
      interleaved(b + t * n + column, rows, 2 * pairs, width, n, right);
      product(R, width, pairs, left.data() + t / 2 * R, 1, R, right, width, c + column, n, true);
    }
  }
}

}  // namespace

extern "C" void lk_outer(long T, long R, long stride, long n, const void* a, const void* b, float* c) {
  outer(T, R, stride, n, (const bf16*)a, (const bf16*)b, c);
}
