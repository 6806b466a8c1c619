// W_f = γ/√(σ²+ε)·W, b_f = β − γμ/√(σ²+ε), W_q = Q(W_f), and the chain rule back (paper, appendix C): what kernels/bn_fold.py
// states in tensor operations, in one loop over channels. The same roundings in the same order, so W_q and b_f are equal
// to the bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace mfpsn {

struct Folding {
  double eps;
  int64_t gradient;  // 0 straight-through, 1 round-only, 2 none (no quantizer)
  int64_t min_exponent, max_exponent;
  int64_t training;  // μ and σ² are the batch's, so gradients flow through them
};

// Kept from being contracted with what follows: a fused multiply-add rounds once, the tensor operations twice. And where a
// compiler vectorizes a loop up to an aligned address, it may contract the rest alone: then results depend on addresses.
template <typename acc>
inline acc rounded(acc value) {
  volatile acc kept = value;
  return kept;
}

// Q(w) = sign(w)·2^round(log2|w|) (13), the exponent clamped to the bounds
template <typename acc>
inline acc power_of_two(acc w, const Folding& f) {
  if (w == 0 || w != w) return w;
  // round(log2 m) turns at m = √½, which no float equals: the first float above it
  const acc turn = sizeof(acc) == 4 ? acc(0.70710682868957519531) : acc(0.70710678118654757274);
  if (!std::isfinite(w)) return acc(NAN);
  int exponent;
  if (std::frexp(std::abs(w), &exponent) < turn) --exponent;
  const int64_t clamped = std::min<int64_t>(std::max<int64_t>(exponent, f.min_exponent), f.max_exponent);
  return std::copysign(std::ldexp(acc(1), static_cast<int>(clamped)), w);
}

template <typename acc>
struct Folded {
  std::vector<acc> taps, bias, fused, gain, deviation;

  Folded(int64_t channels, int64_t order, const Folding& f, const acc* weight, const acc* gamma, const acc* beta,
         const acc* mean, const acc* var)
      : taps(channels * order), bias(channels), fused(channels * order), gain(channels), deviation(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      deviation[c] = std::sqrt(rounded(var[c] + static_cast<acc>(f.eps)));
      gain[c] = rounded(gamma[c] / deviation[c]);
      bias[c] = beta[c] - rounded(gain[c] * mean[c]);
      for (int64_t i = c * order; i < (c + 1) * order; ++i) {
        fused[i] = rounded(weight[i] * gain[c]);
        taps[i] = f.gradient == 2 ? fused[i] : power_of_two(fused[i], f);
      }
    }
  }
};

// dW without its share through the statistics, dγ; and, with a count of values per channel (training), offset and slope
template <typename acc>
void fold_backward(int64_t channels, int64_t order, const Folding& f, const Folded<acc>& folded, const acc* dtaps,
                   const acc* dbias, const acc* weight, const acc* gamma, const acc* mean, acc count, acc* dweight,
                   acc* dgamma, acc* offset, acc* slope) {
  for (int64_t c = 0; c < channels; ++c) {
    acc dgain = 0;
    for (int64_t i = c * order; i < (c + 1) * order; ++i) {
      acc dfused = dtaps[i];
      if (f.gradient == 1) dfused *= folded.fused[i] == 0 ? acc(0) : std::abs(folded.taps[i] / folded.fused[i]);
      dgain += rounded(dfused * weight[i]);
      dweight[i] = dfused * folded.gain[c];
    }
    dgain -= rounded(dbias[c] * mean[c]);
    dgamma[c] = dgain / folded.deviation[c];
    if (offset == nullptr) continue;
    const acc deviation = folded.deviation[c];
    slope[c] = dgain * gamma[c] / (-(deviation * deviation * deviation) * count);
    offset[c] = -folded.gain[c] * dbias[c] / count - rounded(slope[c] * mean[c]);
  }
}

}  // namespace mfpsn
