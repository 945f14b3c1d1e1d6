// Row-wise kernels: one pass over memory where a chain of tensor operations makes five or ten.
//
// Legend: T rows (tokens), n columns. `type` is 0 for float32 and 1 for bfloat16; sums run in float32.
// Every result depends on its own row alone, so it is the same for any number of threads.

#include "mask.h"

using namespace lorikeet;

namespace {

constexpr long kSmall = 1 << 14;  // elements below which waking a second thread costs more

// y = w x / sqrt(mean(x²) + eps) of x, or of total = x + delta, which is then written too.
template <class E>
void rms_norm(long T, long n, const E* x, const E* delta, const E* w, float eps, E* total, E* y,
              float* rstd) {
#pragma omp parallel for schedule(static) if (T * n > kSmall)
  for (long t = 0; t < T; ++t) {
    Vec squares = splat(0.f);
    for (long i = 0; i < n; i += kLanes) {
      const __mmask16 m = lanes(n - i);
      Vec v = load(x + t * n + i, m);
      if (delta) {
        store(total + t * n + i, _mm512_add_ps(v, load(delta + t * n + i, m)), m);
        v = load(total + t * n + i, m);  // as rounded
      }
      squares = _mm512_fmadd_ps(v, v, squares);
    }
    const E* row = (delta ? total : x) + t * n;
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

// The gradients of gate and up from dact, and act again, which the forward pass did not keep. dact may
// be act's memory.
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

// Rotary embedding of H heads of width D: y = x cos + sign · rotate_half(x) sin. cos and sin are
// [T, D] float32.
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

// y = (add ? y : 0) + x ∘ mask
template <class E>
void dropout(long n, const E* x, Mask mask, bool add, E* y) {
#pragma omp parallel for schedule(static) if (n > kSmall)
  for (long i = 0; i < n; i += kLanes) {
    const __mmask16 m = lanes(n - i);
    Vec v = mask.on(i, load(x + i, m));
    if (add) v = _mm512_add_ps(v, load(y + i, m));
    store(y + i, v, m);
  }
}

// nll[t] = log sum exp(logits[t]) - logits[t][target]; with `gradient` the row becomes
// softmax - onehot(target).
template <class E>
void cross_entropy(long T, long n, E* logits, const int64_t* targets, float* nll, bool gradient) {
#pragma omp parallel for schedule(static) if (T * n > kSmall)
  for (long t = 0; t < T; ++t) {
    E* row = logits + t * n;
    if (targets[t] < 0) {  // a row that does not count
      nll[t] = 0.f;
      for (long i = 0; gradient && i < n; i += kLanes) store(row + i, splat(0.f), lanes(n - i));
      continue;
    }
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
    const float log_mass = __builtin_logf(sum(total));  // beside top: their sum would be rounded
    nll[t] = (top - _mm512_cvtss_f32(load(row + targets[t], 1))) + log_mass;
    if (!gradient) continue;
    const Vec norm = splat(log_mass);
    const float at_target = __builtin_expf(-nll[t]) - 1.f;
    for (long i = 0; i < n; i += kLanes) {
      const __mmask16 m = lanes(n - i);
      store(row + i, exp(_mm512_sub_ps(_mm512_sub_ps(load(row + i, m), splat(top)), norm)), m);
    }
    store(row + targets[t], splat(at_target), 1);
  }
}

}  // namespace

// E is the type of the tensors: 0 float32, 1 bfloat16.
#define FOR_TYPE(...)                        \
  if (type == 0) {                           \
    using E = float;                         \
    __VA_ARGS__;                             \
  } else {                                   \
    using E = bf16;                          \
    __VA_ARGS__;                             \
  }

extern "C" {

void lk_rms_norm(long type, long T, long n, const void* x, const void* delta, const void* w, float eps,
                 void* total, void* y, float* rstd) {
  FOR_TYPE(rms_norm<E>(T, n, (const E*)x, (const E*)delta, (const E*)w, eps, (E*)total, (E*)y, rstd))
}

void lk_rms_norm_backward(long type, long T, long n, const void* dy, const void* x, const void* w,
                          const float* rstd, const void* plus, void* dx) {
  FOR_TYPE(rms_norm_backward<E>(T, n, (const E*)dy, (const E*)x, (const E*)w, rstd, (const E*)plus,
                                (E*)dx))
}

void lk_swiglu(long type, long n, const void* gate, const void* up, void* act) {
  FOR_TYPE(swiglu<E>(n, (const E*)gate, (const E*)up, (E*)act))
}

void lk_swiglu_backward(long type, long n, const void* dact, const void* gate, const void* up,
                        void* dgate, void* dup, void* act) {
  FOR_TYPE(swiglu_backward<E>(n, (const E*)dact, (const E*)gate, (const E*)up, (E*)dgate, (E*)dup,
                              (E*)act))
}

void lk_rotate(long type, long T, long H, long D, const void* x, const float* cos, const float* sin,
               float sign, void* y) {
  FOR_TYPE(rotate<E>(T, H, D, (const E*)x, cos, sin, sign, (E*)y))
}

void lk_dropout(long type, long n, const void* x, long key, long threshold, float scale, long add,
                void* y) {
  const Mask mask{(uint32_t)key, (uint32_t)threshold, scale};
  FOR_TYPE(dropout<E>(n, (const E*)x, mask, add != 0, (E*)y))
}

void lk_cross_entropy(long type, long T, long n, void* logits, const int64_t* targets, float* nll,
                      long gradient) {
  FOR_TYPE(cross_entropy<E>(T, n, (E*)logits, targets, nll, gradient != 0))
}

}  // extern "C"
