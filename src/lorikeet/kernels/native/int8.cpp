// Rows to int8 and int32 products back: what stands before and after an int8 matrix product.
//
// Legend: T rows, n columns. `type` is 0 for float32 and 1 for bfloat16.

#include "simd.h"

using namespace lorikeet;

namespace {

// q[t] = round(x[t] ∘ columns · 127 / largest), scale[t] = largest / 127 with the row's largest magnitude.
// A row with a NaN or an infinity gets a NaN for its scale, so that the product says so.
template <class E>
void quantize(long T, long n, const E* x, const float* columns, int8_t* q, float* scale) {
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
      const __m128i bytes = _mm512_cvtsepi32_epi8(whole);
      if (m == 0xffff)
        _mm_storeu_si128((__m128i*)(q + t * n + i), bytes);
      else
        _mm_mask_storeu_epi8(q + t * n + i, m, bytes);
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

}  // namespace

extern "C" {

void lk_quantize(long type, long T, long n, const void* x, const float* columns, int8_t* q,
                 float* scale) {
  if (type == 0)
    quantize(T, n, (const float*)x, columns, q, scale);
  else
    quantize(T, n, (const bf16*)x, columns, q, scale);
}

void lk_dequantize(long type, long T, long n, const int32_t* sums, const float* rows,
                   const float* columns, long add, void* y) {
  if (type == 0)
    dequantize(T, n, sums, rows, columns, add, (float*)y);
  else
    dequantize(T, n, sums, rows, columns, add, (bf16*)y);
}

}  // extern "C"
