// Rows to int8 and int32 products back: what stands before and after an int8 matrix product.
//
// Legend: T rows, n columns. `type` is 0 for float32 and 1 for bfloat16.

#include <algorithm>

#include "simd.h"

using namespace lorikeet;

namespace {

// q[t] = round(x[t] ∘ columns · 127 / largest) + offset, scale[t] = largest / 127 with the row's largest
// magnitude. Rows of q lie `stride` apart. A row with a NaN or an infinity gets a NaN for its scale, so
// that the product says so. offset is 0, or 128 for bytes without a sign.
template <class E>
void quantize(long T, long n, long stride, const E* x, const float* columns, long offset, int8_t* q,
              float* scale) {
  const __m128i shift = _mm_set1_epi8((char)offset);
#pragma omp parallel for schedule(static)
  for (long t = 0; t < T; ++t) {
    const E* row = x + t * n;
    __m512i largest = _mm512_setzero_si512();  // magnitudes compare as integers, NaN above all
    for (long i = 0; i < n; i += kLanes) {
      const __mmask16 m = lanes(n - i);
      Vec v = load(row + i, m);
      if (columns) v = _mm512_mul_ps(v, load(columns + i, m));
      largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(v)));
    }
    const uint32_t bits = _mm512_reduce_max_epu32(largest);
    float top;
    __builtin_memcpy(&top, &bits, sizeof top);
    scale[t] = bits < 0x7f800000 ? top / 127.f : __builtin_nanf("");
    const Vec inverse = splat(top > 0.f ? 127.f / top : 0.f);
    for (long i = 0; i < n; i += kLanes) {
      const __mmask16 m = lanes(n - i);
      Vec v = load(row + i, m);
      if (columns) v = _mm512_mul_ps(v, load(columns + i, m));
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));  // to nearest even
      const __m128i bytes = _mm_xor_si128(_mm512_cvtsepi32_epi8(whole), shift);
      if (m == 0xffff)
        _mm_storeu_si128((__m128i*)(q + t * stride + i), bytes);
      else
        _mm_mask_storeu_epi8(q + t * stride + i, m, bytes);
    }
  }
}

// y (+)= sums · rows[t] · columns[i]
template <class E>
void dequantize(long T, long n, const int32_t* sums, const float* rows, const float* columns, long add,
                E* y) {
#pragma omp parallel for schedule(static)
  for (long t = 0; t < T; ++t) {
    const Vec r = splat(rows[t]);
    for (long i = 0; i < n; i += kLanes) {
      const __mmask16 m = lanes(n - i);
      Vec v = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(m, sums + t * n + i));
      v = _mm512_mul_ps(v, r);
      if (columns) v = _mm512_mul_ps(v, load(columns + i, m));
      if (add) v = _mm512_add_ps(v, load(y + t * n + i, m));
      store(y + t * n + i, v, m);
    }
  }
}

// ---- products on vpdpbusd, which multiplies four unsigned bytes with four signed ones and adds all
// four to an int32. Rows are the unsigned side, 128 higher than they are; what that adds to a sum is
// known beforehand, and sums begin at minus that.
//
// A panel holds 64 columns of the right operand, four summed elements of a column side by side:
// [panels, quads, 64, 4], with zeros beyond either edge.

constexpr long kPanel = 64, kTokens = 6;  // a tile is kTokens x kPanel: 24 sums in registers
constexpr long kBlock = 32 * kTokens;     // tokens whose rows stay in the second cache

inline long groups(long n, long size) { return (n + size - 1) / size; }

// Panels of W, with element (k, i) at w[k * k_step + i * i_step], K summed and n columns.
void pack(long K, long n, const int8_t* w, long k_step, long i_step, int8_t* panels, int32_t* start) {
  const long quads = groups(K, 4);
#pragma omp parallel for schedule(static)
  for (long p = 0; p < groups(n, kPanel); ++p)
    for (long c = 0; c < kPanel; ++c) {
      const long i = p * kPanel + c;
      int32_t sum = 0;
      for (long k = 0; k < 4 * quads; ++k) {
        const int8_t value = k < K && i < n ? w[k * k_step + i * i_step] : 0;
        panels[((p * quads + k / 4) * kPanel + c) * 4 + k % 4] = value;
        sum += value;
      }
      start[i] = -128 * sum;
    }
}

struct Tile {
  __m512i sums[kTokens][4];
};

inline void multiply_tile(const uint8_t* const* x, long quads, const int8_t* panel, const int32_t* start,
                          Tile& out) {
  __m512i sums[kTokens][4];
  for (auto& row : sums)
    for (int v = 0; v < 4; ++v) row[v] = _mm512_loadu_si512(start + 16 * v);
  for (long q = 0; q < quads; ++q) {
    __m512i right[4];
    for (int v = 0; v < 4; ++v) right[v] = _mm512_loadu_si512(panel + (q * kPanel + 16 * v) * 4);
    for (long t = 0; t < kTokens; ++t) {
      int32_t quad;
      __builtin_memcpy(&quad, x[t] + 4 * q, 4);
      const __m512i left = _mm512_set1_epi32(quad);
      for (int v = 0; v < 4; ++v) sums[t][v] = _mm512_dpbusd_epi32(sums[t][v], left, right[v]);
    }
  }
  for (long t = 0; t < kTokens; ++t)
    for (int v = 0; v < 4; ++v) out.sums[t][v] = sums[t][v];
}

// y [T, n] (+)= (x - 128) W · rows[t] · columns[i], for x [T, 4 quads]
template <class E>
void multiply(long T, long quads, long n, const uint8_t* x, const int8_t* panels, const int32_t* start,
              const float* rows, const float* columns, bool add, E* y) {
  const long panel_count = groups(n, kPanel);
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (long block = 0; block < groups(T, kBlock); ++block)
    for (long p = 0; p < panel_count; ++p) {
      const long end = std::min(T, (block + 1) * kBlock);
      for (long t = block * kBlock; t < end; t += kTokens) {
        const uint8_t* own[kTokens];  // missing rows repeat the last and are not written
        for (long m = 0; m < kTokens; ++m) own[m] = x + std::min(t + m, end - 1) * 4 * quads;
        Tile tile;
        multiply_tile(own, quads, panels + p * quads * kPanel * 4, start + p * kPanel, tile);
        for (long m = 0; m < std::min(kTokens, end - t); ++m)
          for (int v = 0; v < 4; ++v) {
            const long i = p * kPanel + 16 * v;
            if (i >= n) break;
            const __mmask16 mask = lanes(n - i);
            Vec sum = _mm512_mul_ps(_mm512_cvtepi32_ps(tile.sums[m][v]), splat(rows[t + m]));
            if (columns) sum = _mm512_mul_ps(sum, load(columns + i, mask));
            E* at = y + (t + m) * n + i;
            if (add) sum = _mm512_add_ps(sum, load(at, mask));
            store(at, sum, mask);
          }
      }
    }
}

}  // namespace

extern "C" {

void lk_int8_pack(long K, long n, const int8_t* w, long k_step, long i_step, int8_t* panels,
                  int32_t* start) {
  pack(K, n, w, k_step, i_step, panels, start);
}

void lk_int8_multiply(long type, long T, long quads, long n, const uint8_t* x, const int8_t* panels,
                      const int32_t* start, const float* rows, const float* columns, long add, void* y) {
  if (type == 0)
    multiply(T, quads, n, x, panels, start, rows, columns, add, (float*)y);
  else
    multiply(T, quads, n, x, panels, start, rows, columns, add, (bf16*)y);
}

void lk_quantize(long type, long T, long n, long stride, const void* x, const float* columns, long offset,
                 int8_t* q, float* scale) {
  if (type == 0)
    quantize(T, n, stride, (const float*)x, columns, offset, q, scale);
  else
    quantize(T, n, stride, (const bf16*)x, columns, offset, q, scale);
}

void lk_dequantize(long type, long T, long n, const int32_t* sums, const float* rows,
                   const float* columns, long add, void* y) {
  if (type == 0)
    dequantize(T, n, sums, rows, columns, add, (float*)y);
  else
    dequantize(T, n, sums, rows, columns, add, (bf16*)y);
}

}  // extern "C"
