// Causal attention of packed documents in bfloat16, forward and backward (FlashAttention-2, Dao 2023,
// arXiv:2307.08691, algorithms 1 and 2), on AVX512-BF16 dot products. Scores are never kept.
//
// Legend: T tokens of the row, H query heads, K key-value heads, D head size; a document occupies rows
// cu[i] to cu[i + 1]. Query, output: [T, H, D]; key, value: [T, K, D]; lse, delta: [H, T] float32.
// A token q sees the tokens k of its document with 0 <= q - k < window.
//
// Operands of products (products.h):
//   rows of a matrix      already hold pairs along the columns              -> left operand, sum over D
//   transposed(X) [D/2,L] pairs along D, neighbours along the rows of X     -> right operand, sum over D
//   interleaved(X) [L/2,D] pairs along the rows of X, neighbours along D    -> right operand, sum over L

#include <algorithm>
#include <vector>

#include "products.h"

using namespace lorikeet;

namespace {

constexpr long kTile = 64;  // queries and keys of a tile

long padded(long length) { return (length + kTile - 1) / kTile * kTile; }

// X [L, D] with rows `stride` apart -> [D / 2, padded(L)] pairs; pads are zero.
void transposed(const bf16* x, long L, long D, long stride, Pair* out) {
  const long width = padded(L);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i rows = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)(stride / 2)));
  for (long i = 0; i < width; i += 16) {
    const __mmask16 m = i < L ? lanes(L - i) : 0;
    for (long p = 0; p < D / 2; ++p) {
      const void* from = (const Pair*)(x + i * stride) + p;
      const __m512i v = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), m, rows, from, 4);
      _mm512_storeu_si512(out + p * width + i, v);
    }
  }
}

// Two rows of floats -> a row of pairs (first, second).
inline __m512i pairs_of(Vec first, Vec second) {
  const __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
  const __m512i b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
  return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}

// Which of the sixteen keys from `k` on does query `q` see?
inline __mmask16 seen(long q, long k, long window) {
  const long last = q - k, first = last - window + 1;  // lanes first..last
  if (last < 0 || first > 15) return 0;
  const uint32_t upto = last >= 15 ? 0xffff : (1u << (last + 1)) - 1;
  return (__mmask16)(first <= 0 ? upto : upto & ~((1u << first) - 1));
}

// Which of the sixteen queries from `q` on see key `k`?
inline __mmask16 seeing(long q, long k, long window, long length) {
  const long first = k - q, end = std::min(k + window, length) - q;  // lanes first..end - 1
  if (end <= 0 || first > 15) return 0;
  const uint32_t upto = end >= 16 ? 0xffff : (1u << end) - 1;
  return (__mmask16)(first <= 0 ? upto : upto & ~((1u << first) - 1));
}

struct Shape {
  long T, H, K, D, documents, window;
  float scale;
  const int32_t* cu;
};

// One head of one document, up to 64 queries: softmax over the keys tile by tile, rescaled as the
// maximum grows.
void forward_tile(const Shape& s, const bf16* query, const Pair* keys, const Pair* values, long width,
                  long first, long rows, bf16* output, float* lse) {
  alignas(64) float scores[kTile * kTile];
  alignas(64) bf16 weights[kTile * kTile];
  std::vector<float> sums(kTile * s.D, 0.f);
  float top[kTile], mass[kTile];
  std::fill(top, top + kTile, -__builtin_inff());
  std::fill(mass, mass + kTile, 0.f);
  const long begin = std::max(0L, first - s.window + 1) / kTile * kTile;
  for (long k = begin; k < first + rows; k += kTile) {
    const bool own = k == first;  // the queries' own keys, half of which they see
    product(rows, kTile, s.D / 2, (const Pair*)query, s.H * s.D / 2, 1, keys + k, width, scores, kTile,
            false, own ? Part::columns_up_to_row : Part::all);
    for (long i = 0; i < rows; ++i) {
      float* row = scores + i * kTile;
      Vec high = splat(-__builtin_inff());
      for (long j = 0; j < kTile; j += 16) {
        const __mmask16 m = seen(first + i, k + j, s.window);
        const Vec v = _mm512_mul_ps(load(row + j), splat(s.scale));
        store(row + j, _mm512_mask_mov_ps(splat(-__builtin_inff()), m, v));
        high = _mm512_mask_max_ps(high, m, v, high);
      }
      const float peak = std::max(top[i], _mm512_reduce_max_ps(high));
      const bool any = peak > -__builtin_inff();
      const Vec shift = splat(any ? peak : 0.f);
      Vec total = splat(0.f);
      for (long j = 0; j < kTile; j += 16) {
        const Vec e = exp(_mm512_sub_ps(load(row + j), shift));
        total = _mm512_add_ps(total, e);
        store(weights + i * kTile + j, e);
      }
      const float fade = top[i] == peak ? 1.f : __builtin_expf(top[i] - (any ? peak : 0.f));
      if (fade != 1.f && k > begin)
        for (long d = 0; d < s.D; d += 16)
          store(&sums[i * s.D + d], _mm512_mul_ps(load(&sums[i * s.D + d]), splat(fade)));
      mass[i] = mass[i] * fade + sum(total);
      top[i] = peak;
    }
    product(rows, s.D, kTile / 2, (const Pair*)weights, kTile / 2, 1, values + k / 2 * s.D, s.D,
            sums.data(), s.D, true, own ? Part::pairs_up_to_row : Part::all);
  }
  for (long i = 0; i < rows; ++i) {
    for (long d = 0; d < s.D; d += 16)
      store(output + i * s.H * s.D + d,
            _mm512_mul_ps(load(&sums[i * s.D + d]), splat(1.f / mass[i])));
    lse[i] = top[i] + __builtin_logf(mass[i]);
  }
}

struct Tile {
  long document, head, first;
};

std::vector<Tile> query_tiles(const Shape& s) {
  std::vector<Tile> tiles;
  for (long n = 0; n < s.documents; ++n)
    for (long h = 0; h < s.H; ++h)
      for (long q = 0; q < s.cu[n + 1] - s.cu[n]; q += kTile) tiles.push_back({n, h, q});
  // Late queries see the most keys: begin with them, so that no thread is left with one at the end.
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const Tile& a, const Tile& b) { return a.first > b.first; });
  return tiles;
}

// Where a document's packed keys begin, in pairs, when every document is padded to whole tiles.
std::vector<long> packed_starts(const Shape& s) {
  std::vector<long> starts(1, 0);
  for (long n = 0; n < s.documents; ++n)
    starts.push_back(starts.back() + padded(s.cu[n + 1] - s.cu[n]) * s.D / 2);
  return starts;
}

void forward(const Shape& s, const bf16* q, const bf16* k, const bf16* v, bf16* output, float* lse) {
  const std::vector<long> starts = packed_starts(s);
  const long size = starts.back();
  std::vector<Pair> keys(size * s.K), values(size * s.K);
#pragma omp parallel for schedule(dynamic)
  for (long i = 0; i < s.documents * s.K; ++i) {
    const long n = i / s.K, head = i % s.K, L = s.cu[n + 1] - s.cu[n];
    const long from = (s.cu[n] * s.K + head) * s.D;
    transposed(k + from, L, s.D, s.K * s.D, &keys[head * size + starts[n]]);
    interleaved(v + from, L, padded(L), s.D, s.K * s.D, &values[head * size + starts[n]]);
  }
  const std::vector<Tile> tiles = query_tiles(s);
#pragma omp parallel for schedule(dynamic)
  for (long i = 0; i < (long)tiles.size(); ++i) {
    const Tile& tile = tiles[i];
    const long start = s.cu[tile.document], L = s.cu[tile.document + 1] - start;
    const long packed = tile.head / (s.H / s.K) * size + starts[tile.document];
    const long at = ((start + tile.first) * s.H + tile.head) * s.D;
    forward_tile(s, q + at, &keys[packed], &values[packed], padded(L), tile.first,
                 std::min(kTile, L - tile.first), output + at, lse + tile.head * s.T + start + tile.first);
  }
}

// What one head of one document needs in the backward pass beside its rows.
struct Operands {
  std::vector<Pair> query_t, query_i, grad_t, grad_i, key_i;
  std::vector<float> dq, delta;
};

void prepare(const Shape& s, Operands& o, long L, const bf16* q, const bf16* k, const bf16* output,
             const bf16* grad) {
  const long width = padded(L), size = width * s.D / 2, wide = s.H * s.D, narrow = s.K * s.D;
  for (std::vector<Pair>* v : {&o.query_t, &o.query_i, &o.grad_t, &o.grad_i, &o.key_i}) v->resize(size);
  transposed(q, L, s.D, wide, o.query_t.data());
  interleaved(q, L, width, s.D, wide, o.query_i.data());
  transposed(grad, L, s.D, wide, o.grad_t.data());
  interleaved(grad, L, width, s.D, wide, o.grad_i.data());
  interleaved(k, L, width, s.D, narrow, o.key_i.data());
  o.dq.assign(width * s.D, 0.f);
  o.delta.assign(width, 0.f);
  for (long i = 0; i < L; ++i) {  // delta = rowsum(output ∘ gradient)
    Vec dot = splat(0.f);
    for (long d = 0; d < s.D; d += 16)
      dot = _mm512_fmadd_ps(load(output + i * wide + d), load(grad + i * wide + d), dot);
    o.delta[i] = sum(dot);
  }
}

// The tile of keys `k` and queries `q`, transposed (a row is a key). scores and slopes hold S and dP on
// entry; on exit weights and scaled hold P and dS as rows, paired holds dS with pairs along the keys.
void softmax_backward(const Shape& s, long L, long q, long k, long keys, const float* lse,
                      const float* delta, const float* scores, const float* slopes, bf16* weights,
                      bf16* scaled, Pair* paired) {
  for (long i = 0; i < kTile; i += 2)
    for (long j = 0; j < kTile; j += 16) {
      const __mmask16 real = q + j < L ? lanes(L - q - j) : 0;
      const Vec norm = load(lse + q + j, real), offset = load(delta + q + j);
      Vec ds[2];
      for (long e = 0; e < 2; ++e) {
        const long at = (i + e) * kTile + j;
        const __mmask16 m = i + e < keys ? seeing(q + j, k + i + e, s.window, L) : 0;
        const Vec logit = _mm512_fmsub_ps(load(scores + at), splat(s.scale), norm);
        const Vec p = _mm512_maskz_mov_ps(m, exp(logit));
        const Vec d = _mm512_mul_ps(p, _mm512_sub_ps(load(slopes + at), offset));
        ds[e] = _mm512_maskz_mul_ps(m, d, splat(s.scale));
        store(weights + at, p);
        store(scaled + at, ds[e]);
      }
      _mm512_storeu_si512(paired + i / 2 * kTile + j, pairs_of(ds[0], ds[1]));
    }
}

// dq [L, D] into bfloat16 rows; dk and dv stay float32 [T, D] per query head.
void backward_head(const Shape& s, long L, const bf16* q, const bf16* k, const bf16* v,
                   const bf16* output, const bf16* grad, const float* lse, bf16* dq, float* dk,
                   float* dv) {
  static thread_local Operands o;
  prepare(s, o, L, q, k, output, grad);
  alignas(64) float scores[kTile * kTile], slopes[kTile * kTile];
  alignas(64) bf16 weights[kTile * kTile], scaled[kTile * kTile];
  alignas(64) Pair paired[kTile / 2 * kTile];
  const long width = padded(L), narrow = s.K * s.D / 2;
  for (long first = 0; first < L; first += kTile) {
    const long keys = std::min(kTile, L - first);
    const Pair *key = (const Pair*)k + first * narrow, *value = (const Pair*)v + first * narrow;
    const long last = std::min(L, first + keys - 1 + s.window);
    for (long i = first; i < last; i += kTile) {
      const long queries = std::min(kTile, L - i);
      const bool own = i == first;
      const Part columns = own ? Part::columns_from_row : Part::all;
      const Part pairs = own ? Part::pairs_from_row : Part::all;
      product(keys, kTile, s.D / 2, key, narrow, 1, &o.query_t[i], width, scores, kTile, false, columns);
      product(keys, kTile, s.D / 2, value, narrow, 1, &o.grad_t[i], width, slopes, kTile, false, columns);
      softmax_backward(s, L, i, first, keys, lse, o.delta.data(), scores, slopes, weights, scaled,
                       paired);
      product(keys, s.D, kTile / 2, (const Pair*)weights, kTile / 2, 1, &o.grad_i[i / 2 * s.D], s.D,
              dv + first * s.D, s.D, !own, pairs);
      product(keys, s.D, kTile / 2, (const Pair*)scaled, kTile / 2, 1, &o.query_i[i / 2 * s.D], s.D,
              dk + first * s.D, s.D, !own, pairs);
      product(queries, s.D, kTile / 2, paired, 1, kTile, &o.key_i[first / 2 * s.D], s.D,
              &o.dq[i * s.D], s.D, true, own ? Part::pairs_up_to_row : Part::all);
    }
  }
  for (long i = 0; i < L; ++i)
    for (long d = 0; d < s.D; d += 16) store(dq + i * s.H * s.D + d, load(&o.dq[i * s.D + d]));
}

// [H, T, D] float32 -> [T, K, D] bfloat16: the query heads of a key-value head, summed.
void sum_heads(const Shape& s, const float* from, bf16* to) {
  const long shared = s.H / s.K;
#pragma omp parallel for schedule(static)
  for (long t = 0; t < s.T; ++t)
    for (long head = 0; head < s.K; ++head)
      for (long d = 0; d < s.D; d += 16) {
        Vec total = splat(0.f);
        for (long g = 0; g < shared; ++g)
          total = _mm512_add_ps(total, load(from + ((head * shared + g) * s.T + t) * s.D + d));
        store(to + (t * s.K + head) * s.D + d, total);
      }
}

void backward(const Shape& s, const bf16* q, const bf16* k, const bf16* v, const bf16* output,
              const bf16* grad, const float* lse, bf16* dq, bf16* dk, bf16* dv, float* work) {
  float *dk_heads = work, *dv_heads = work + s.H * s.T * s.D;
  std::vector<long> longest(s.documents);
  for (long n = 0; n < s.documents; ++n) longest[n] = n;
  std::stable_sort(longest.begin(), longest.end(), [&](long a, long b) {
    return s.cu[a + 1] - s.cu[a] > s.cu[b + 1] - s.cu[b];
  });
#pragma omp parallel for schedule(dynamic)
  for (long i = 0; i < s.documents * s.H; ++i) {
    const long n = longest[i / s.H], h = i % s.H, start = s.cu[n];
    const long wide = (start * s.H + h) * s.D, narrow = (start * s.K + h / (s.H / s.K)) * s.D;
    const long own = (h * s.T + start) * s.D;
    backward_head(s, s.cu[n + 1] - start, q + wide, k + narrow, v + narrow, output + wide, grad + wide,
                  lse + h * s.T + start, dq + wide, dk_heads + own, dv_heads + own);
  }
  sum_heads(s, dk_heads, dk);
  sum_heads(s, dv_heads, dv);
}

}  // namespace

extern "C" {

void lk_attention(long T, long H, long K, long D, long documents, const int32_t* cu, long window,
                  float scale, const void* q, const void* k, const void* v, void* output, float* lse) {
  const Shape s{T, H, K, D, documents, window, scale, cu};
  forward(s, (const bf16*)q, (const bf16*)k, (const bf16*)v, (bf16*)output, lse);
}

// `work` holds 2 · H · T · D floats.
void lk_attention_backward(long T, long H, long K, long D, long documents, const int32_t* cu,
                           long window, float scale, const void* q, const void* k, const void* v,
                           const void* output, const void* grad, const float* lse, void* dq, void* dk,
                           void* dv, float* work) {
  const Shape s{T, H, K, D, documents, window, scale, cu};
  backward(s, (const bf16*)q, (const bf16*)k, (const bf16*)v, (const bf16*)output, (const bf16*)grad,
           lse, (bf16*)dq, (bf16*)dk, (bf16*)dv, work);
}

}  // extern "C"
