// Per-channel work: partial sums to totals, the fold of the normalization into the taps, the quantizer, and the chain
// rule back through both. A warp computes a channel. Totals are summed in float64, in an order that depends only on
// the number of partials.
#pragma once

#include "types.cuh"

namespace mfpsn {

// Q(w) = sign(w)·2^round(log2|w|), on exponent and mantissa as kernels/quantizer.py has it
template <typename sum>
struct Turn;  // no value equals √½, so the comparison with the next one above it is exact
template <>
struct Turn<float> {
  static constexpr float value = 0.70710682868957519531f, largest = FLT_MAX;
};
template <>
struct Turn<double> {
  static constexpr double value = 0.70710678118654757, largest = DBL_MAX;
};

template <typename sum>
__device__ inline sum power_of_two(sum w, int least, int most) {
  if (w == 0) return w;
  if (!(fabs(w) <= Turn<sum>::largest)) return w - w;  // NaN for NaN and infinity
  int exponent;
  const sum mantissa = frexp(fabs(w), &exponent);  // in [½, 1)
  int power = mantissa >= Turn<sum>::value ? exponent : exponent - 1;
  power = power < least ? least : power > most ? most : power;
  return copysign(ldexp(sum(1), power), w);
}

// std = √(σ²+ε), gain = γ/std, W_f = gain·W, W_q = Q(W_f), b_f = β − gain·μ: each rounded once, as in kernels/bn_fold.py
template <typename sum>
struct Folded {
  sum std, gain;
  __device__ Folded(const Arguments& a, sum gamma, sum var)
      : std(root(plus(var, static_cast<sum>(a.eps)))), gain(over(gamma, std)) {}
  __device__ sum fused(sum w) const { return times(w, gain); }
  __device__ sum tap(const Arguments& a, sum w) const {
    const sum f = fused(w);
    if (a.quantizer == 0) return f;
    return power_of_two(f, static_cast<int>(a.min_exponent), static_cast<int>(a.max_exponent));
  }
};

template <typename sum>
__device__ inline sum entry(const void* v, int64_t i) {
  return static_cast<const sum*>(v)[i];
}

// To be called by all lanes of a warp
template <typename sum>
__device__ inline void fold_channel(const Arguments& a, int64_t c, sum mean, sum var) {
  const int lane = threadIdx.x % kWarp;
  const Folded<sum> folded(a, entry<sum>(a.gamma, c), var);
  for (int64_t i = lane; i < a.order; i += kWarp)
    static_cast<sum*>(a.taps)[c * a.order + i] = folded.tap(a, entry<sum>(a.weight, c * a.order + i));
  if (lane == 0) static_cast<sum*>(a.bias)[c] = minus(entry<sum>(a.beta, c), times(folded.gain, mean));
}

template <typename Body>
__device__ inline void for_channels(const Arguments& a, Body body) {
  constexpr int warps = kBlock / kWarp;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarp; c < a.channels;
       c += static_cast<int64_t>(gridDim.x) * warps)
    body(c);
}

__device__ inline double warp_sum(double v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

template <typename sum>
__device__ inline const sum* partials_of(const Arguments& a, int64_t which, int64_t c) {
  return static_cast<const sum*>(a.partial) + (which * a.channels + c) * a.partials;
}

template <typename sum>
__device__ inline double total(const Arguments& a, int64_t which, int64_t c) {
  const sum* values = partials_of<sum>(a, which, c);
  double v = 0;
  for (int64_t m = threadIdx.x % kWarp; m < a.partials; m += kWarp) v += static_cast<double>(values[m]);
  return warp_sum(v);
}

template <typename sum>
__global__ void __launch_bounds__(kBlock) fold_kernel(const Arguments a) {
  for_channels(a, [&](int64_t c) { fold_channel<sum>(a, c, entry<sum>(a.mean, c), entry<sum>(a.var, c)); });
}

// Partials are (count, mean, sum of squared deviations); Chan's update over all at once, without a difference of large sums
template <typename sum>
__global__ void __launch_bounds__(kBlock) finish_statistics_kernel(const Arguments a) {
  for_channels(a, [&](int64_t c) {
    const int lane = threadIdx.x % kWarp;
    const sum *counts = partials_of<sum>(a, 0, c), *means = partials_of<sum>(a, 1, c);
    const sum* squares = partials_of<sum>(a, 2, c);
    double count = 0, weighted = 0;
    for (int64_t m = lane; m < a.partials; m += kWarp) {
      const double n = static_cast<double>(counts[m]);
      count += n;
      weighted += n * static_cast<double>(means[m]);
    }
    count = fmax(warp_sum(count), 1.0);
    const double centre = warp_sum(weighted) / count;
    double square = 0;
    for (int64_t m = lane; m < a.partials; m += kWarp) {
      const double delta = static_cast<double>(means[m]) - centre;
      square += static_cast<double>(squares[m]) + static_cast<double>(counts[m]) * delta * delta;
    }
    const sum mean = static_cast<sum>(centre), var = static_cast<sum>(warp_sum(square) / count);
    if (lane == 0) {
      static_cast<sum*>(a.mean)[c] = mean;
      static_cast<sum*>(a.var)[c] = var;
    }
    if (a.gamma != nullptr) fold_channel<sum>(a, c, mean, var);
  });
}

// Partials are k sums of dU·X' by tap, the sum of dU, and the count of valid steps
template <typename sum>
__global__ void __launch_bounds__(kBlock) finish_reductions_kernel(const Arguments a) {
  for_channels(a, [&](int64_t c) {
    const bool first = threadIdx.x % kWarp == 0;
    const double dbias = total<sum>(a, a.order, c);
    if (!a.chain) {
      for (int64_t i = 0; i < a.order; ++i) {
        const double dtap = total<sum>(a, i, c);
        if (first) static_cast<sum*>(a.dtaps)[c * a.order + i] = static_cast<sum>(dtap);
      }
      if (first) static_cast<sum*>(a.dbias)[c] = static_cast<sum>(dbias);
      return;
    }
    const sum gamma = entry<sum>(a.gamma, c), mean = entry<sum>(a.mean, c);
    const Folded<sum> folded(a, gamma, entry<sum>(a.var, c));
    double dgain = -dbias * mean;
    for (int64_t i = 0; i < a.order; ++i) {
      const sum w = entry<sum>(a.weight, c * a.order + i), fused = folded.fused(w);
      double dfused = total<sum>(a, i, c);
      if (a.quantizer == 2) dfused *= fused == 0 ? 0.0 : fabs(static_cast<double>(folded.tap(a, w)) / fused);
      dgain += dfused * w;
      if (first) static_cast<sum*>(a.dweight)[c * a.order + i] = static_cast<sum>(dfused * folded.gain);
    }
    const double count = fmax(total<sum>(a, a.order + 1, c), 1.0), std = folded.std;
    if (!first) return;
    static_cast<sum*>(a.dgamma)[c] = static_cast<sum>(dgain / std);
    static_cast<sum*>(a.dbeta)[c] = static_cast<sum>(dbias);
    if (!a.training) return;
    // dL/dH = dμ/M + dσ²·2(H − μ)/M = offset + slope·H
    const double slope = -dgain * gamma / (std * std * std * count);
    static_cast<sum*>(a.slope)[c] = static_cast<sum>(slope);
    static_cast<sum*>(a.offset)[c] = static_cast<sum>(-folded.gain * dbias / count - slope * mean);
  });
}

// Partials are k sums of dH·X' by tap (where statistics are those of the batch), dscale and dshift
template <typename sum>
__global__ void __launch_bounds__(kBlock) finish_input_kernel(const Arguments a) {
  for_channels(a, [&](int64_t c) {
    const bool first = threadIdx.x % kWarp == 0;
    if (a.training)
      for (int64_t i = 0; i < a.order; ++i) {
        const double through = total<sum>(a, i, c);
        sum* to = static_cast<sum*>(a.dweight) + c * a.order + i;
        if (first) *to = static_cast<sum>(a.chain ? *to + through : through);
      }
    if (a.dscale != nullptr) {
      const double v = total<sum>(a, a.order, c);
      if (first) static_cast<sum*>(a.dscale)[c] = static_cast<sum>(v);
    }
    if (a.dshift != nullptr) {
      const double v = total<sum>(a, a.order + 1, c);
      if (first) static_cast<sum*>(a.dshift)[c] = static_cast<sum>(v);
    }
  });
}

}  // namespace mfpsn
