// Sixteen floats at a time, from and to memory that holds float32 or bfloat16.
//
// Compiled for x86-64-v4 with AVX512-BF16; the Python side loads it on such processors only.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lorikeet {

using Vec = __m512;
constexpr long kLanes = 16;

struct bf16 {
  uint16_t bits;
};

// Lanes of a vector that starts `left` elements before the end of its row.
inline __mmask16 lanes(long left) { return left >= kLanes ? 0xffff : (1u << left) - 1; }

inline Vec load(const float* p, __mmask16 m = 0xffff) { return _mm512_maskz_loadu_ps(m, p); }

inline Vec load(const bf16* p, __mmask16 m = 0xffff) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void store(float* p, Vec v, __mmask16 m = 0xffff) { _mm512_mask_storeu_ps(p, m, v); }

inline void store(bf16* p, Vec v, __mmask16 m = 0xffff) {  // rounds to nearest even, keeps NaN
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v);
  if (m == 0xffff)  // masked stores of 16 bits are slow
    _mm256_storeu_si256((__m256i*)p, rounded);
  else
    _mm256_mask_storeu_epi16(p, m, rounded);
}

inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }

// e^x to about 2 ulp: 2^n · p(r), x = (n + r) ln 2 with |r| <= 1/2; -inf gives 0, NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec t = _mm512_mul_ps(_mm512_max_ps(splat(-126.f * 0.6931472f), x), splat(1.44269504f));
  const Vec n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  Vec r = _mm512_fnmadd_ps(n, splat(0.693359375f), _mm512_max_ps(splat(-87.3365f), x));
  r = _mm512_fnmadd_ps(n, splat(-2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, splat(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, splat(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, splat(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, splat(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, splat(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, splat(1.f)));
  const Vec y = _mm512_scalef_ps(p, n);
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, splat(-87.3f), _CMP_NLT_UQ), y);
}

}  // namespace lorikeet
