// The dropout mask: an element is kept, and scaled, where a hash of its number (Wellons' lowbias32)
// and the key is not below the threshold. The backward pass draws it again instead of keeping it.
#pragma once

#include "simd.h"

namespace lorikeet {

struct Mask {
  uint32_t key = 0, threshold = 0;  // a threshold of 0 keeps everything
  float scale = 1.f;

  Vec on(long first, Vec v) const {
    if (threshold == 0) return v;
    const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i number = _mm512_add_epi32(_mm512_set1_epi32((int)first), step);
    __m512i h = _mm512_xor_si512(number, _mm512_set1_epi32((int)key));
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
    h = _mm512_mullo_epi32(h, _mm512_set1_epi32(0x7feb352d));
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 15));
    h = _mm512_mullo_epi32(h, _mm512_set1_epi32((int)0x846ca68b));
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
    const __mmask16 kept = _mm512_cmpge_epu32_mask(h, _mm512_set1_epi32((int)threshold));
    return _mm512_maskz_mul_ps(kept, v, splat(scale));
  }
};

}  // namespace lorikeet
