// Row-wise kernels: one pass over memory where a chain of tensor operations makes five or ten.
//
// Legend: T rows (tokens), n columns. `type` is 0 for float32 and 1 for bfloat16; sums run in float32.
// Every result depends on its own row alone, so it is the same for any number of threads.

#include "simd.h"

using namespace lorikeet;

namespace {

constexpr long kSmall = 1 << 14;  // elements below which waking a second thread costs more

template <class E>
void rms_norm(long T, long n, const E* x, const E* w, float eps, E* y, float* rstd) {
#pragma omp parallel for schedule(static) if (T * n > kSmall)
  for (long t = 0; t < T; ++t) {
    const E* row = x + t * n;
    Vec squares = splat(0.f);
    for (long i = 0; i < n; i += kLanes) {
      const Vec v = load(row + i, lanes(n - i));
      squares = _mm512_fmadd_ps(v, v, squares);
    }
    rstd[t] = 1.f / __builtin_sqrtf(sum(squares) / n + eps);
    const Vec r = splat(rstd[t]);
    for (long i = 0; i < n; i += kLanes) {
      const __mmask16 m = lanes(n - i);
      const Vec v = _mm512_mul_ps(load(row + i, m), r);
      store(y + t * n + i, _mm512_mul_ps(v, load(w + i, m)), m);
    }
  }
}

// dx = rstd (w dy - x̂ mean(w dy x̂)), x̂ = rstd x; `plus` (may be null) is added to it.
template <class E>
void rms_norm_backward(long T, long n, const E* dy, const E* x, const E* w, const float* rstd,
                       const E* plus, E* dx) {
#pragma omp parallel for schedule(static) if (T * n > kSmall)
  for (long t = 0; t < T; ++t) {
    Vec dot = splat(0.f);
    for (long i = 0; i < n; i += kLanes) {
      const __mmask16 m = lanes(n - i);
      const Vec g = _mm512_mul_ps(load(dy + t * n + i, m), load(w + i, m));
      dot = _mm512_fmadd_ps(g, load(x + t * n + i, m), dot);
    }
    const Vec r = splat(rstd[t]);
    const Vec c = splat(-rstd[t] * rstd[t] * rstd[t] * sum(dot) / n);
    for (long i = 0; i < n; i += kLanes) {
      const __mmask16 m = lanes(n - i);
      const Vec g = _mm512_mul_ps(load(dy + t * n + i, m), load(w + i, m));
      Vec d = _mm512_fmadd_ps(load(x + t * n + i, m), c, _mm512_mul_ps(g, r));
      if (plus) d = _mm512_add_ps(d, load(plus + t * n + i, m));
      store(dx + t * n + i, d, m);
    }
  }
}

inline Vec sigmoid(Vec x) {
  return _mm512_div_ps(splat(1.f), _mm512_add_ps(splat(1.f), exp(_mm512_sub_ps(splat(0.f), x))));
}

// act = silu(gate) up
template <class E>
void swiglu(long n, const E* gate, const E* up, E* act) {
#pragma omp parallel for schedule(static) if (n > kSmall)
  for (long i = 0; i < n; i += kLanes) {
    const __mmask16 m = lanes(n - i);
    const Vec g = load(gate + i, m);
    store(act + i, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), load(up + i, m)), m);
  }
}

// The gradients of gate and up, and `act` again, which the forward pass did not keep.
template <class E>
void swiglu_backward(long n, const E* dact, const E* gate, const E* up, E* dgate, E* dup, E* act) {
#pragma omp parallel for schedule(static) if (n > kSmall)
  for (long i = 0; i < n; i += kLanes) {
    const __mmask16 m = lanes(n - i);
    const Vec g = load(gate + i, m), u = load(up + i, m), d = load(dact + i, m);
    const Vec s = sigmoid(g), silu = _mm512_mul_ps(g, s);
    // silu' = s (1 + g (1 - s)) = s + silu (1 - s)
    const Vec slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(splat(1.f), s), s);
    store(act + i, _mm512_mul_ps(silu, u), m);
    store(dup + i, _mm512_mul_ps(d, silu), m);
    store(dgate + i, _mm512_mul_ps(_mm512_mul_ps(d, u), slope), m);
  }
}

// Rotary embedding of H heads of width D: y = x cos + sign · rotate_half(x) sin; D / 2 and in place
// is fine because both halves are read before they are written. cos and sin are [T, D] float32.
template <class E>
void rotate(long T, long H, long D, const E* x, const float* cos, const float* sin, float sign, E* y) {
  const long half = D / 2;
#pragma omp parallel for schedule(static) if (T * H * D > kSmall)
  for (long t = 0; t < T; ++t)
    for (long h = 0; h < H; ++h) {
      const E* a = x + (t * H + h) * D;
      E* b = y + (t * H + h) * D;
      for (long i = 0; i < half; i += kLanes) {
        const __mmask16 m = lanes(half - i);
        const Vec first = load(a + i, m), second = load(a + half + i, m);
        const float *c = cos + t * D + i, *s = sin + t * D + i;
        const Vec s1 = _mm512_mul_ps(splat(sign), load(s, m));
        const Vec s2 = _mm512_mul_ps(splat(sign), load(s + half, m));
        store(b + i, _mm512_fnmadd_ps(second, s1, _mm512_mul_ps(first, load(c, m))), m);
        store(b + half + i, _mm512_fmadd_ps(first, s2, _mm512_mul_ps(second, load(c + half, m))), m);
      }
    }
}

// A hash of the element's number (Wellons' lowbias32): no generator state, so the backward pass draws
// the same mask again instead of keeping it.
inline __m512i draw(__m512i number, __m512i key) {
  __m512i h = _mm512_xor_si512(number, key);
  h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
  h = _mm512_mullo_epi32(h, _mm512_set1_epi32(0x7feb352d));
  h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 15));
  h = _mm512_mullo_epi32(h, _mm512_set1_epi32((int)0x846ca68b));
  return _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
}

// y = (add ? y : 0) + keep(i) x / (1 - p); an element is dropped where its draw is below `threshold`.
template <class E>
void dropout(long n, const E* x, uint32_t key, uint32_t threshold, float scale, int add, E* y) {
  const __m512i k = _mm512_set1_epi32((int)key), limit = _mm512_set1_epi32((int)threshold);
  const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma omp parallel for schedule(static) if (n > kSmall)
  for (long i = 0; i < n; i += kLanes) {
    const __mmask16 m = lanes(n - i);
    const __m512i h = draw(_mm512_add_epi32(_mm512_set1_epi32((int)i), step), k);
    const __mmask16 kept = _mm512_cmpge_epu32_mask(h, limit);
    Vec v = _mm512_maskz_mul_ps(kept, load(x + i, m), splat(scale));
    if (add) v = _mm512_add_ps(v, load(y + i, m));
    store(y + i, v, m);
  }
}

// nll[t] = log sum exp(logits[t]) - logits[t][target]; with `gradient` the row becomes
// softmax - onehot(target).
template <class E>
void cross_entropy(long T, long n, E* logits, const int64_t* targets, float* nll, int gradient) {
#pragma omp parallel for schedule(static) if (T * n > kSmall)
  for (long t = 0; t < T; ++t) {
    E* row = logits + t * n;
    Vec high = splat(-__builtin_inff());
    for (long i = 0; i < n; i += kLanes) {
      const __mmask16 m = lanes(n - i);
      high = _mm512_mask_max_ps(high, m, load(row + i, m), high);
    }
    const float top = _mm512_reduce_max_ps(high);
    Vec total = splat(0.f);
    for (long i = 0; i < n; i += kLanes) {
      const __mmask16 m = lanes(n - i);
      total = _mm512_mask_add_ps(total, m, total, exp(_mm512_sub_ps(load(row + i, m), splat(top))));
    }
    const float mass = sum(total);
    const float log_mass = top + __builtin_logf(mass);
    nll[t] = log_mass - _mm512_cvtss_f32(load(row + targets[t], 1));
    if (!gradient) continue;
    const Vec norm = splat(log_mass);
    const float at_target = __builtin_expf(-nll[t]) - 1.f;
    for (long i = 0; i < n; i += kLanes) {
      const __mmask16 m = lanes(n - i);
      store(row + i, exp(_mm512_sub_ps(load(row + i, m), norm)), m);
    }
    store(row + targets[t], splat(at_target), 1);
  }
}

}  // namespace

#define BOTH(call_float, call_bf16) \
  if (type == 0) {                  \
    call_float;                     \
  } else {                          \
    call_bf16;                      \
  }

extern "C" {

void lk_rms_norm(long type, long T, long n, const void* x, const void* w, float eps, void* y,
                 float* rstd) {
  BOTH(rms_norm(T, n, (const float*)x, (const float*)w, eps, (float*)y, rstd),
       rms_norm(T, n, (const bf16*)x, (const bf16*)w, eps, (bf16*)y, rstd))
}

void lk_rms_norm_backward(long type, long T, long n, const void* dy, const void* x, const void* w,
                          const float* rstd, const void* plus, void* dx) {
  BOTH(rms_norm_backward(T, n, (const float*)dy, (const float*)x, (const float*)w, rstd,
                         (const float*)plus, (float*)dx),
       rms_norm_backward(T, n, (const bf16*)dy, (const bf16*)x, (const bf16*)w, rstd,
                         (const bf16*)plus, (bf16*)dx))
}

void lk_swiglu(long type, long n, const void* gate, const void* up, void* act) {
  BOTH(swiglu(n, (const float*)gate, (const float*)up, (float*)act),
       swiglu(n, (const bf16*)gate, (const bf16*)up, (bf16*)act))
}

void lk_swiglu_backward(long type, long n, const void* dact, const void* gate, const void* up,
                        void* dgate, void* dup, void* act) {
  BOTH(swiglu_backward(n, (const float*)dact, (const float*)gate, (const float*)up, (float*)dgate,
                       (float*)dup, (float*)act),
       swiglu_backward(n, (const bf16*)dact, (const bf16*)gate, (const bf16*)up, (bf16*)dgate,
                       (bf16*)dup, (bf16*)act))
}

void lk_rotate(long type, long T, long H, long D, const void* x, const float* cos, const float* sin,
               float sign, void* y) {
  BOTH(rotate(T, H, D, (const float*)x, cos, sin, sign, (float*)y),
       rotate(T, H, D, (const bf16*)x, cos, sin, sign, (bf16*)y))
}

void lk_dropout(long type, long n, const void* x, long key, long threshold, float scale,
                long add, void* y) {
  BOTH(dropout(n, (const float*)x, (uint32_t)key, (uint32_t)threshold, scale, add, (float*)y),
       dropout(n, (const bf16*)x, (uint32_t)key, (uint32_t)threshold, scale, add, (bf16*)y))
}

void lk_cross_entropy(long type, long T, long n, void* logits, const int64_t* targets, float* nll,
                      long gradient) {
  BOTH(cross_entropy(T, n, (float*)logits, targets, nll, gradient),
       cross_entropy(T, n, (bf16*)logits, targets, nll, gradient))
}

}  // extern "C"
