// The work on one tile: V elements, all T steps, in the first-level cache.
//
// K is the order where it is known at compile time (taps then stay in registers, loops over them are unrolled), or 0.
// With a mask K is 0. Taps are given as [order][V], summed in the order i = 0 … k−1, which decides equality at the
// threshold; a tap that reaches before t = 0 is left out.
#pragma once

#include "cpu_slabs.h"

namespace mfpsn {

// One tensor's tile: step t at at[t·stride]; in a slab, or in place
template <typename acc>
struct Tile {
  acc* at;
  int64_t stride;
  acc* operator()(int64_t t) const { return at + t * stride; }
};

struct Walk {
  int64_t steps, order, dilation;
  const uint8_t* mask;  // of this n, stride mask_stride, or null
  int64_t mask_stride;
  bool masked(int64_t t) const { return mask != nullptr && mask[t * mask_stride] == 0; }
};

template <int K, typename acc>
struct Taps {
  vec<acc> w[K];
  Taps(const acc* from, int64_t) {
    for (int i = 0; i < K; ++i) w[i] = get(from + i * lanes<acc>);
  }
  vec<acc> operator[](int64_t i) const { return w[i]; }
};

template <typename acc>
struct Taps<0, acc> {
  const acc* from;
  Taps(const acc* from, int64_t) : from(from) {}
  vec<acc> operator[](int64_t i) const { return get(from + i * lanes<acc>); }
};

// body(t, first) for each step, the taps first … k−1 being those that reach no further back than t = 0; `first` is a
// constant 0 from where on all do
template <int K, typename Body>
inline void each_step(const Walk& walk, const Body& body) {
  const int64_t order = K ? K : walk.order, d = walk.dilation;
  const int64_t ramp = std::min(walk.steps, (order - 1) * d);
  int64_t t = 0;
  for (int64_t first = order - 1; t < ramp; --first)
    for (const int64_t end = std::min(ramp, t + d); t < end; ++t) body(t, first);
  for (; t < walk.steps; ++t) body(t, std::integral_constant<int64_t, 0>{});
}

// One step of H (10)
template <int K, typename acc, typename First>
inline vec<acc> filtered(const Walk& walk, const Tile<const acc>& x, const Taps<K, acc>& w, int64_t t, First first) {
  const int64_t order = K ? K : walk.order, d = walk.dilation;
  const int64_t start = first;
  vec<acc> h = w[start] * get(x(t - (order - 1 - start) * d));
#pragma GCC unroll 8
  for (int64_t i = start + 1; i < order; ++i) h = h + w[i] * get(x(t - (order - 1 - i) * d));
  return h;
}

// sums[i] += d · x[t − lag_i]
template <int K, typename acc, typename First, typename Sums>
inline void correlated(const Walk& walk, const Tile<const acc>& x, vec<acc> d, int64_t t, First first, Sums& sums) {
  const int64_t order = K ? K : walk.order;
  const int64_t start = first;
#pragma GCC unroll 8
  for (int64_t i = start; i < order; ++i) sums.add(i, d * get(x(t - (order - 1 - i) * walk.dilation)));
}

// Sums over T in registers, or in memory where there are too many
template <int K, typename acc>
struct Sums {
  vec<acc> value[K];
  acc* home;
  Sums(acc* home, int64_t) : home(home) {
    for (int i = 0; i < K; ++i) value[i] = get(home + i * lanes<acc>);
  }
  void add(int64_t i, vec<acc> v) { value[i] = value[i] + v; }
  void finish() {
    for (int i = 0; i < K; ++i) put(home + i * lanes<acc>, value[i]);
  }
};

template <typename acc>
struct Sums<0, acc> {
  acc* home;
  Sums(acc* home, int64_t) : home(home) {}
  void add(int64_t i, vec<acc> v) { put(home + i * lanes<acc>, get(home + i * lanes<acc>) + v); }
  void finish() {}
};

// Θ'(u)
template <typename acc>
inline vec<acc> surrogate(int64_t kind, acc alpha, vec<acc> u) {
  if (kind == 0) {
    const vec<acc> z = u * static_cast<acc>(M_PI / 2 * alpha);
    return (alpha / 2) / (z * z + acc(1));
  }
  if (kind == 1) return acc(1) / (u * u * alpha + acc(1));
  const vec<acc> z = u * alpha, e = exp_of_negative<acc>(z < acc(0) ? z : -z);  // even in z
  const vec<acc> one = e + acc(1);
  return alpha * e / (one * one);
}

// rows: pivot, Σ(H − pivot), Σ(H − pivot)². The pivot is a value of H itself, so (μ − pivot)² is at most M times the
// variance of the M values that a lane sums, and the variance loses no more than M roundings to cancellation, whatever
// the mean: one sweep, no H in memory.
template <int K, typename acc>
inline void statistics_tile(const Walk& walk, Tile<const acc> x, const acc* taps, acc* rows, bool fresh) {
  constexpr int64_t V = lanes<acc>;
  const Taps<K, acc> w(taps, walk.order);
  if (fresh) {
    int64_t t = walk.steps - 1;  // the last one: the first ones may miss taps
    while (t > 0 && walk.masked(t)) --t;
    const int64_t order = K ? K : walk.order;
    put(rows, filtered<K, acc>(walk, x, w, t, std::max<int64_t>(0, order - 1 - t / walk.dilation)));
  }
  const vec<acc> pivot = get(rows);
  vec<acc> sum = get(rows + V), square = get(rows + 2 * V);
  each_step<K>(walk, [&](int64_t t, auto first) {
    if (K == 0 && walk.masked(t)) return;
    const vec<acc> h = filtered<K, acc>(walk, x, w, t, first) - pivot;
    sum = sum + h;
    square = square + h * h;
  });
  put(rows + V, sum);
  put(rows + 2 * V, square);
}

template <int K, typename acc>
inline void fire_tile(const Walk& walk, Tile<const acc> x, const acc* taps, const acc* bias, Tile<acc> out) {
  const Taps<K, acc> w(taps, walk.order);
  const vec<acc> threshold = -get(bias), one = all(acc(1));
  each_step<K>(walk, [&](int64_t t, auto first) {
    if (K == 0 && walk.masked(t)) return put(out(t), vec<acc>{});
    // H + b ≥ 0 and H ≥ −b are the same in IEEE arithmetic
    put(out(t), filtered<K, acc>(walk, x, w, t, first) >= threshold ? one : vec<acc>{});
  });
}

// rows: Σ dU[t] · X[t − lag_i] for each tap, and Σ dU[t], with dU = grad · Θ'(U)
template <int K, typename acc>
inline void reductions_tile(const Walk& walk, Tile<const acc> x, Tile<const acc> grad, const acc* taps, const acc* bias,
                            int64_t kind, acc alpha, acc* rows) {
  constexpr int64_t V = lanes<acc>;
  const Taps<K, acc> w(taps, walk.order);
  const vec<acc> b = get(bias);
  acc* last = rows + walk.order * V;
  Sums<K, acc> sums(rows, walk.order);
  vec<acc> total = get(last);
  each_step<K>(walk, [&](int64_t t, auto first) {
    if (K == 0 && walk.masked(t)) return;
    const vec<acc> du = surrogate<acc>(kind, alpha, filtered<K, acc>(walk, x, w, t, first) + b) * get(grad(t));
    total = total + du;
    correlated<K, acc>(walk, x, du, t, first, sums);
  });
  sums.finish();
  put(last, total);
}

// du[t] = grad · Θ'(U)
template <int K, typename acc>
inline void membrane_tile(const Walk& walk, Tile<const acc> x, Tile<const acc> grad, const acc* taps, const acc* bias,
                          int64_t kind, acc alpha, acc* du) {
  constexpr int64_t V = lanes<acc>;
  const Taps<K, acc> w(taps, walk.order);
  const vec<acc> b = get(bias);
  each_step<K>(walk, [&](int64_t t, auto first) {
    if (K == 0 && walk.masked(t)) return put(du + t * V, vec<acc>{});
    put(du + t * V, surrogate<acc>(kind, alpha, filtered<K, acc>(walk, x, w, t, first) + b) * get(grad(t)));
  });
}

// dh[t] = offset + slope · H; rows: Σ dh[t] · X[t − lag_i]
template <int K, typename acc>
inline void through_tile(const Walk& walk, Tile<const acc> x, const acc* weight, const acc* offset, const acc* slope,
                         acc* dh, acc* rows) {
  constexpr int64_t V = lanes<acc>;
  const Taps<K, acc> w(weight, walk.order);
  const vec<acc> a = get(offset), s = get(slope);
  Sums<K, acc> sums(rows, walk.order);
  each_step<K>(walk, [&](int64_t t, auto first) {
    if (K == 0 && walk.masked(t)) return put(dh + t * V, vec<acc>{});
    const vec<acc> d = a + s * filtered<K, acc>(walk, x, w, t, first);
    put(dh + t * V, d);
    correlated<K, acc>(walk, x, d, t, first, sums);
  });
  sums.finish();
}

// dx[s] = Σ_i taps_i · du[s + lag_i] (+ Σ_i weight_i · dh[s + lag_i] where there is a dh)
template <int K, bool both, typename acc>
inline void transposed_tile(const Walk& walk, const acc* du, const acc* taps, const acc* dh, const acc* weight,
                            Tile<acc> dx) {
  constexpr int64_t V = lanes<acc>;
  const Taps<K, acc> q(taps, walk.order), w(both ? weight : taps, walk.order);
  const int64_t order = K ? K : walk.order, d = walk.dilation;
  const auto step = [&](int64_t s, auto first) {
    const int64_t start = first;
    vec<acc> sum{};
#pragma GCC unroll 8
    for (int64_t i = start; i < order; ++i) {
      const int64_t at = (s + (order - 1 - i) * d) * V;
      sum = sum + q[i] * get(du + at);
      if constexpr (both) sum = sum + w[i] * get(dh + at);
    }
    put(dx(s), sum);
  };
  const int64_t whole = std::max<int64_t>(0, walk.steps - (order - 1) * d);
  int64_t s = 0;
  for (; s < whole; ++s) step(s, std::integral_constant<int64_t, 0>{});
  for (; s < walk.steps; ++s) step(s, std::max<int64_t>(0, order - 1 - (walk.steps - 1 - s) / d));
}

}  // namespace mfpsn
