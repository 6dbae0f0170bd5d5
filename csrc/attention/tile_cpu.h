// One tile of 64 keys against a set of query vectors, in float32 (params.h has the formulas). Its inner loops are written over arrays of 16 floats that
// the compiler keeps in vector registers, whatever their width: every output element is one chain of fma, so the width changes no bit.
#pragma once
#include <algorithm>
#include <cmath>

#include "attention/params.h"
#include "base/fp8.h"
#include "base/math.h"
#include "base/parallel.h"

namespace specrt {

struct Span {
  int begin, end;
  bool empty() const { return end <= begin; }
};

struct TileScratch {
  float* keys;    // [D, 64], transposed
  float* values;  // [64, D]
  float* scores;  // [query vectors, 64]
  float* factors; // [query vectors]
};

struct State {
  float m, l;
  float* o;
};

struct Lanes {
  float x[16];
};

SPECRT_HD void load_lanes(Lanes& to, const float* from) {
  for (int i = 0; i < 16; ++i) to.x[i] = from[i];
}
SPECRT_HD void store_lanes(const Lanes& from, float* to) {
  for (int i = 0; i < 16; ++i) to[i] = from.x[i];
}
SPECRT_HD void fma_lanes(Lanes& sum, float a, const float* b) {
  for (int i = 0; i < 16; ++i) sum.x[i] = fma_rn(a, b[i], sum.x[i]);
}

// c[r][0 .. 16 N) = chain over k in [k0, k1) of fma(a[r][k], b[k][..], c[r][..]), for M rows held in registers.
template <int M, int N>
SPECRT_CLONES void multiply_block(const float* __restrict a, int lda, const float* __restrict b, int ldb, float* __restrict c, int ldc, int k0, int k1) {
  Lanes sum[M][N];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) load_lanes(sum[r][n], c + r * ldc + n * 16);
  for (int k = k0; k < k1; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) fma_lanes(sum[r][n], a[r * lda + k], b + k * ldb + n * 16);
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store_lanes(sum[r][n], c + r * ldc + n * 16);
}

// The same for any number of columns that is a multiple of 16.
template <int M> void multiply_rows(int columns, const float* a, int lda, const float* b, int ldb, float* c, int ldc, int k0, int k1) {
  for (; columns >= 64; columns -= 64, b += 64, c += 64) multiply_block<M, 4>(a, lda, b, ldb, c, ldc, k0, k1);
  if (columns >= 32) {
    multiply_block<M, 2>(a, lda, b, ldb, c, ldc, k0, k1);
    columns -= 32, b += 32, c += 32;
  }
  if (columns) multiply_block<M, 1>(a, lda, b, ldb, c, ldc, k0, k1);
}

inline void multiply(int rows, int columns, const float* a, int lda, const float* b, int ldb, float* c, int ldc, int k0, int k1) {
  switch (rows) {
    case 1: return multiply_rows<1>(columns, a, lda, b, ldb, c, ldc, k0, k1);
    case 2: return multiply_rows<2>(columns, a, lda, b, ldb, c, ldc, k0, k1);
    case 3: return multiply_rows<3>(columns, a, lda, b, ldb, c, ldc, k0, k1);
    default: return multiply_rows<4>(columns, a, lda, b, ldb, c, ldc, k0, k1);
  }
}

// Scales the scores of one query vector in place, -inf where it sees nothing; returns their maximum and m's.
SPECRT_CLONES static float scale_scores(float* __restrict s, Span seen, float scale, float m) {
  Lanes top;
  for (int i = 0; i < kTile; ++i) s[i] = s[i] * scale;
  for (int i = 0; i < seen.begin; ++i) s[i] = -INFINITY;
  for (int i = seen.end; i < kTile; ++i) s[i] = -INFINITY;
  for (int i = 0; i < 16; ++i) top.x[i] = m;
  for (int j = 0; j < kTile; j += 16)
    for (int i = 0; i < 16; ++i) top.x[i] = s[j + i] > top.x[i] ? s[j + i] : top.x[i];
  for (int i = 0; i < 8; ++i) top.x[i] = top.x[i + 8] > top.x[i] ? top.x[i + 8] : top.x[i];
  for (int i = 0; i < 4; ++i) top.x[i] = top.x[i + 4] > top.x[i] ? top.x[i + 4] : top.x[i];
  for (int i = 0; i < 2; ++i) top.x[i] = top.x[i + 2] > top.x[i] ? top.x[i + 2] : top.x[i];
  return top.x[1] > top.x[0] ? top.x[1] : top.x[0];
}

// m becomes the new maximum, `factor` (the new maximum before) a = exp2(m - m').
SPECRT_CLONES static void raise_maxima(int vectors, float* __restrict m, float* __restrict factor) {
  for (int v = 0; v < vectors; ++v) {
    const float top = factor[v];
    factor[v] = exp2_rn(m[v] - top);
    m[v] = top;
  }
}

template <typename T> SPECRT_CLONES void probabilities(float* __restrict s, float m) {
  for (int i = 0; i < kTile; ++i) s[i] = to_float(round_to<T>(exp2_rn(s[i] - m)));
}

// O += P V over the positions of `span`.
inline void accumulate_values(int vectors, int dim, const float* p, const TileScratch& tile, float* o, Span span) {
  if (!span.empty()) multiply(vectors, dim, p, kTile, tile.values, dim, o, dim, span.begin, span.end);
}

SPECRT_CLONES static void scale_row(float* __restrict o, float a, int dim) {
  for (int d = 0; d < dim; ++d) o[d] = o[d] * a;
}

// l[v] += p[v][0] + p[v][1] + .., one chain a vector, 8 chains at a time.
inline void sum_rows(int vectors, const float* p, float* l) {
  for (int v = 0; v < vectors; v += 8) {
    const int n = std::min(8, vectors - v);
    const float* rows[8];
    float sum[8];
    for (int i = 0; i < 8; ++i) {
      rows[i] = p + (v + std::min(i, n - 1)) * kTile;
      sum[i] = l[v + std::min(i, n - 1)];
    }
    for (int j = 0; j < kTile; ++j) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) sum[i] = sum[i] + rows[i][j];
    }
    for (int i = 0; i < n; ++i) l[v + i] = sum[i];
  }
}

// Folds one tile into the (m, l, O) of `vectors` query vectors q [vectors, D]; spans say what each sees (relative to the tile).
template <typename T>
void attend_tile(int vectors, int dim, const float* q, const Span* spans, float scale, TileScratch tile, float* m, float* l, float* o) {
  float* s = tile.scores;
  std::fill(s, s + vectors * kTile, 0.0f);
  for (int v = 0; v < vectors; v += 4) multiply(vectors - v, kTile, q + v * dim, dim, tile.keys, kTile, s + v * kTile, kTile, 0, dim);
  float* factor = tile.factors;
  for (int v = 0; v < vectors; ++v) factor[v] = spans[v].empty() ? m[v] : scale_scores(s + v * kTile, spans[v], scale, m[v]);
  raise_maxima(vectors, m, factor);
  for (int v = 0; v < vectors; ++v) {
    if (spans[v].empty()) {
      std::fill_n(s + v * kTile, kTile, 0.0f);  // adds nothing to the row sum
      continue;
    }
    probabilities<T>(s + v * kTile, m[v]);
    l[v] = l[v] * factor[v];
    scale_row(o + v * dim, factor[v], dim);
  }
  sum_rows(vectors, s, l);
  for (int v = 0; v < vectors; v += 4) {  // what 4 vectors see together in one go, the rest of each before and after it: every chain ascends
    const int n = std::min(4, vectors - v);
    Span joint = spans[v];
    for (int i = 1; i < n; ++i) joint = {std::max(joint.begin, spans[v + i].begin), std::min(joint.end, spans[v + i].end)};
    if (joint.empty()) joint = {kTile, kTile};
    for (int i = 0; i < n; ++i) accumulate_values(1, dim, s + (v + i) * kTile, tile, o + (v + i) * dim, {spans[v + i].begin, std::min(joint.begin, spans[v + i].end)});
    accumulate_values(n, dim, s + v * kTile, tile, o + v * dim, joint);
    for (int i = 0; i < n; ++i) accumulate_values(1, dim, s + (v + i) * kTile, tile, o + (v + i) * dim, {joint.end, spans[v + i].end});
  }
}

// to_float, fit for loops over vectors: all sides of a choice are computed (select), and none is a float32 denormal, which a CPU multiplies slowly.
SPECRT_HD float widened(float x) { return x; }
SPECRT_HD float widened(bf16 x) { return to_float(x); }
SPECRT_HD float widened(e4m3 x) {
  const uint32_t magnitude = x.bits & 0x7fu, sign = static_cast<uint32_t>(x.bits & 0x80u) << 24;
  const float denormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0.001953125f, normal = bits_to_float((magnitude << 20) + (120u << 23));
  const float value = select(magnitude == 0x7fu, bits_to_float(0x7fc00000u), select(magnitude < 8u, denormal, normal));
  return bits_to_float(float_to_bits(value) | sign);
}

template <typename T> SPECRT_CLONES void widen(const T* from, float* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = widened(from[i]);
}

using Vec = float __attribute__((vector_size(64)));
using VecIndex = int32_t __attribute__((vector_size(64)));

// One step of a transpose in registers: exchanges the off-diagonal blocks of size S of the rows a and b = a + S.
template <int S> SPECRT_HD void exchange(Vec& a, Vec& b) {
  VecIndex low, high;
  for (int i = 0; i < 16; ++i) {
    low[i] = i & S ? 16 + i - S : i;
    high[i] = i & S ? 16 + i : i + S;
  }
  const Vec x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
  a = x;
  b = y;
}

template <int S> SPECRT_HD void exchange_all(Vec (&rows)[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (!(i & S)) exchange<S>(rows[i], rows[i + S]);
}

// to[d][j] = from[j][d] for 16 keys and 16 of their elements; `to` has rows of 64.
template <typename T> SPECRT_CLONES void transpose_block(const T* const* from, int d, float* to) {
  alignas(64) float wide[16][16];
  for (int j = 0; j < 16; ++j)
    for (int i = 0; i < 16; ++i) wide[j][i] = widened(from[j][d + i]);
  Vec rows[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) memcpy(&rows[j], wide[j], sizeof(Vec));
  exchange_all<1>(rows);
  exchange_all<2>(rows);
  exchange_all<4>(rows);
  exchange_all<8>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) memcpy(to + i * kTile, &rows[i], sizeof(Vec));
}

// Widens the tile's visible keys (transposed) and values. The columns of other keys repeat a visible one: their scores are computed and dropped.
template <typename T> void load_tile(const T** keys, const T* const* values, Span seen, int dim, TileScratch tile) {
  for (int j = seen.begin; j < seen.end; ++j) widen(values[j], tile.values + j * dim, dim);
  for (int j = 0; j < kTile; ++j)
    if (j < seen.begin || j >= seen.end) keys[j] = keys[seen.begin];
  for (int j = 0; j < kTile; j += 16)
    for (int d = 0; d < dim; d += 16) transpose_block(keys + j, d, tile.keys + d * kTile + j);
}

SPECRT_CLONES static void fold(State& into, float m, float l, const float* o, int dim) {
  const float top = m > into.m ? m : into.m;
  const float a = exp2_rn(into.m - top), b = exp2_rn(m - top);
  into.m = top;
  into.l = fma_rn(l, b, into.l * a);
  for (int d = 0; d < dim; ++d) into.o[d] = fma_rn(o[d], b, into.o[d] * a);
}

}  // namespace specrt
