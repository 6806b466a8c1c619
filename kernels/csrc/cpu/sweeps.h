// The work on one tile: V elements, all T steps, in the first-level cache.
//
// K is the order where it is known at compile time (taps then stay in registers, loops over them are unrolled), or 0.
// With a mask K is 0. Taps are given as [order][V], summed in the order i = 0 … k−1, which decides equality at the
// threshold; a tap that reaches before t = 0 is left out.
#pragma once

#include <utility>

#include "slabs.h"

namespace mfpsn {

// One tensor's tile: step t at at[t·stride]; in a slab, or in place
template <typename acc>
struct Tile {
  acc* at;
  int64_t stride;
  acc* operator()(int64_t t) const { return at + t * stride; }
};

template <typename acc>
struct Target {
  Tile<acc> tile;
  bool past_caches;
  void write(int64_t t, vec<acc> v) const { past_caches ? put_past_caches(tile(t), v) : put(tile(t), v); }
};

// Without it the compiler keeps the bodies of the sweeps out of line, and taps and sums out of registers
#define MFPSN_INLINED __attribute__((always_inline))

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

// body(t, first) for each step, the taps first … k−1 being those that reach no further back than t = 0. `first` is a
// constant from where on all do (0), and everywhere where the order is one: at T = k = 8 most steps lie on that ramp, and
// loops over a variable number of taps took twice as long
template <int K, typename Body, int... reversed>
MFPSN_INLINED inline int64_t ramp_up(const Walk& walk, const Body& body, std::integer_sequence<int, reversed...>) {
  int64_t t = 0;
  const auto steps = [&](auto first) MFPSN_INLINED {
    for (const int64_t end = std::min(walk.steps, t + walk.dilation); t < end; ++t) body(t, first);
  };
  (steps(std::integral_constant<int64_t, K - 1 - reversed>{}), ...);
  return t;
}

template <int K, typename Body>
MFPSN_INLINED inline void each_step(const Walk& walk, const Body& body) {
  int64_t t = 0;
  if constexpr (K > 0) {
    t = ramp_up<K>(walk, body, std::make_integer_sequence<int, K - 1>{});
  } else {
    const int64_t ramp = std::min(walk.steps, (walk.order - 1) * walk.dilation);
    for (int64_t first = walk.order - 1; t < ramp; --first)
      for (const int64_t end = std::min(ramp, t + walk.dilation); t < end; ++t) body(t, first);
  }
  for (; t < walk.steps; ++t) body(t, std::integral_constant<int64_t, 0>{});
}

// One step of H (10)
template <int K, typename acc, typename First>
MFPSN_INLINED inline vec<acc> filtered(const Walk& walk, const Tile<const acc>& x, const Taps<K, acc>& w, int64_t t, First first) {
  const int64_t order = K ? K : walk.order, d = walk.dilation;
  const int64_t start = first;
  vec<acc> h = w[start] * get(x(t - (order - 1 - start) * d));
#pragma GCC unroll 8
  for (int64_t i = start + 1; i < order; ++i) h = h + w[i] * get(x(t - (order - 1 - i) * d));
  return h;
}

// sums[i] += d · x[t − lag_i]
template <int K, typename acc, typename First, typename Sums>
MFPSN_INLINED inline void correlated(const Walk& walk, const Tile<const acc>& x, vec<acc> d, int64_t t, First first, Sums& sums) {
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
MFPSN_INLINED inline vec<acc> surrogate(int64_t kind, acc alpha, vec<acc> u) {
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
// variance of the M values that a lane sums, and cancellation costs the variance at most M roundings for any mean:
// one sweep, no H in memory.
template <int K, typename acc>
inline void statistics_tile(const Walk& walk, Tile<const acc> x, const acc* taps, acc* rows, bool fresh) {
  constexpr int64_t V = lanes<acc>;
  const Taps<K, acc> w(taps, walk.order);
  if (fresh) {
    int64_t t = walk.steps - 1;  // the last one, since the first ones may lack taps
    while (t > 0 && walk.masked(t)) --t;
    const int64_t order = K ? K : walk.order;
    put(rows, filtered<K, acc>(walk, x, w, t, std::max<int64_t>(0, order - 1 - t / walk.dilation)));
  }
  const vec<acc> pivot = get(rows);
  vec<acc> sum = get(rows + V), square = get(rows + 2 * V);
  each_step<K>(walk, [&](int64_t t, auto first) MFPSN_INLINED {
    if (K == 0 && walk.masked(t)) return;
    const vec<acc> h = filtered<K, acc>(walk, x, w, t, first) - pivot;
    sum = sum + h;
    square = square + h * h;
  });
  put(rows + V, sum);
  put(rows + 2 * V, square);
}

template <int K, typename acc>
inline void fire_tile(const Walk& walk, Tile<const acc> x, const acc* taps, const acc* bias, Target<acc> out) {
  const Taps<K, acc> w(taps, walk.order);
  const vec<acc> threshold = -get(bias), one = all(acc(1));
  each_step<K>(walk, [&](int64_t t, auto first) MFPSN_INLINED {
    if (K == 0 && walk.masked(t)) return out.write(t, vec<acc>{});
    // H + b ≥ 0 and H ≥ −b are the same in IEEE arithmetic
    out.write(t, filtered<K, acc>(walk, x, w, t, first) >= threshold ? one : vec<acc>{});
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
  each_step<K>(walk, [&](int64_t t, auto first) MFPSN_INLINED {
    if (K == 0 && walk.masked(t)) return;
    const vec<acc> du = surrogate<acc>(kind, alpha, filtered<K, acc>(walk, x, w, t, first) + b) * get(grad(t));
    total = total + du;
    correlated<K, acc>(walk, x, du, t, first, sums);
  });
  sums.finish();
  put(last, total);
}

// du[t] = grad · Θ'(U) where there is a gradient; dh[t] = offset + slope · H and in rows Σ dh[t] · X[t − lag_i] where there
// is an offset. Both in one sweep: rows of X that are a power of two apart share a few cache sets, and a second sweep over
// 16 of them would find none in the cache.
template <int K, bool membrane, bool through, typename acc>
inline void gradients_tile(const Walk& walk, Tile<const acc> x, Tile<const acc> grad, const acc* taps, const acc* bias,
                           int64_t kind, acc alpha, const acc* weight, const acc* offset, const acc* slope, acc* du, acc* dh,
                           acc* rows) {
  constexpr int64_t V = lanes<acc>;
  const Taps<K, acc> q(membrane ? taps : weight, walk.order), w(through ? weight : taps, walk.order);
  const vec<acc> b = membrane ? get(bias) : vec<acc>{}, a = through ? get(offset) : vec<acc>{},
                 s = through ? get(slope) : vec<acc>{};
  Sums<K, acc> sums(rows, walk.order);
  each_step<K>(walk, [&](int64_t t, auto first) MFPSN_INLINED {
    if (K == 0 && walk.masked(t)) {
      if constexpr (membrane) put(du + t * V, vec<acc>{});
      if constexpr (through) put(dh + t * V, vec<acc>{});
      return;
    }
    if constexpr (membrane)
      put(du + t * V, surrogate<acc>(kind, alpha, filtered<K, acc>(walk, x, q, t, first) + b) * get(grad(t)));
    if constexpr (through) {
      const vec<acc> d = a + s * filtered<K, acc>(walk, x, w, t, first);
      put(dh + t * V, d);
      correlated<K, acc>(walk, x, d, t, first, sums);
    }
  });
  if constexpr (through) sums.finish();
}

// dx[s] = Σ_i taps_i · du[s + lag_i] (+ Σ_i weight_i · dh[s + lag_i] where there is a dh)
template <int K, bool both, typename acc>
inline void transposed_tile(const Walk& walk, const acc* du, const acc* taps, const acc* dh, const acc* weight,
                            Target<acc> dx) {
  constexpr int64_t V = lanes<acc>;
  const Taps<K, acc> q(taps, walk.order), w(both ? weight : taps, walk.order);
  const int64_t order = K ? K : walk.order, d = walk.dilation;
  const auto step = [&](int64_t s, auto first) MFPSN_INLINED {
    const int64_t start = first;
    vec<acc> sum{};
#pragma GCC unroll 8
    for (int64_t i = start; i < order; ++i) {
      const int64_t at = (s + (order - 1 - i) * d) * V;
      sum = sum + q[i] * get(du + at);
      if constexpr (both) sum = sum + w[i] * get(dh + at);
    }
    dx.write(s, sum);
  };
  // the last steps reach no further than t = T − 1: the ramp, backwards
  int64_t s = walk.steps;
  each_step<K>(walk, [&](int64_t, auto first) MFPSN_INLINED { step(--s, first); });
}

}  // namespace mfpsn
