// Views of tensors, and copies of slabs of them into the cache and back.
//
// A tensor is (T, N, J), J = C·P elements in the order in which X lies in memory, for any layout and strides:
// element (t, n, j) lies at t·st + n·sn + offset[j], and belongs to channel (j / inner) mod C.
//
// A slab is what a block of B elements of one n holds over all T, as [B / V][T][V] with V lanes of a register: the steps
// of a tile of V elements lie next to each other, so that sweeps over T stay in the first-level cache. Rows of a
// time-first tensor are a large power of two apart as a rule, and read in place they would compete for a few cache sets.
// For the same reason tiles are an odd number of registers apart.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace mfpsn {

struct View {
  int64_t st, sn;         // strides of t and n
  const int64_t* offset;  // (J), or null where offset[j] = j·sj
  int64_t sj;
};

struct Problem {
  int64_t steps, batch, elements, channels, inner, order, dilation, surrogate;  // surrogate: 0 arctan, 1 rational, 2 sigmoid
  double alpha;
  const void* scale;    // (C) of the sums' type, or null
  const void* shift;    // (C) of the sums' type, or null
  const uint8_t* mask;  // (T, N), or null
};

// Rows that are copied side by side: one at a time waits for memory, since the prefetchers run only so far ahead in each
// (at T = 16 and 32, with nothing in cache, a training step took 0.63 of the time at 8 rows, 0.66 at 4, 0.73 at 2)
constexpr int64_t kStreams = 8;

template <typename acc>
inline int64_t tile_size(const Problem& p) {
  return (p.steps | 1) * lanes<acc>;
}

inline bool valid(const Problem& p, int64_t t, int64_t n) { return p.mask == nullptr || p.mask[t * p.batch + n]; }

// V values as the sums' type, and back
template <typename acc, typename scalar>
inline vec<acc> widened(const scalar* from) {
  if constexpr (std::is_same_v<scalar, acc>) return get(from);
  acc wide[lanes<acc>];
  for (int64_t b = 0; b < lanes<acc>; ++b) wide[b] = static_cast<acc>(from[b]);
  return get(wide);
}

template <typename acc, typename scalar>
inline void narrowed(scalar* to, vec<acc> v) {
  if constexpr (std::is_same_v<scalar, acc>) return put(to, v);
  scalar narrow[lanes<acc>];
  for (int64_t b = 0; b < lanes<acc>; ++b) narrow[b] = static_cast<scalar>(v[b]);
  __builtin_memcpy(to, narrow, sizeof narrow);
}

// 4 rows of 4 steps each, transposed in registers
template <typename scalar, typename acc>
inline void transpose4(const scalar* from, int64_t from_stride, acc* to, int64_t to_stride) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
  if constexpr (std::is_same_v<scalar, float> && std::is_same_v<acc, float>) {
    typedef float quad __attribute__((vector_size(16)));
    quad r[4];
    for (int i = 0; i < 4; ++i) __builtin_memcpy(&r[i], from + i * from_stride, 16);
    const quad a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    const quad c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    const quad out[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                         __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) __builtin_memcpy(to + i * to_stride, &out[i], 16);
    return;
  }
#endif
#endif
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) to[j * to_stride + i] = static_cast<acc>(from[i * from_stride + j]);
}

// Elements j0 … j0 + width of n; the lanes of the last tile beyond them are set to zero
template <typename scalar, typename acc>
void load(const Problem& p, const View& v, const scalar* x, int64_t n, int64_t j0, int64_t width, acc* slab) {
  constexpr int64_t V = lanes<acc>;
  const int64_t T = p.steps, tiles = (width + V - 1) / V, size = tile_size<acc>(p);
  const scalar* base = x + n * v.sn;
  if (width % V != 0) std::fill_n(slab + (tiles - 1) * size, T * V, acc(0));
  if (v.offset == nullptr && v.sj == 1) {
    for (int64_t t0 = 0; t0 < T; t0 += kStreams)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t count = std::min(V, width - tile * V);
        for (int64_t t = t0; t < std::min(T, t0 + kStreams); ++t) {
          const scalar* row = base + t * v.st + j0 + tile * V;
          acc* to = slab + tile * size + t * V;
          if (count == V)
            put(to, widened<acc>(row));
          else
            for (int64_t b = 0; b < count; ++b) to[b] = static_cast<acc>(row[b]);
        }
      }
    return;
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    acc* to = slab + tile * size;
    const int64_t first = j0 + tile * V, count = std::min(V, width - tile * V);
    if (v.offset != nullptr) {
      for (int64_t t = 0; t < T; ++t)
        for (int64_t b = 0; b < count; ++b) to[t * V + b] = static_cast<acc>(base[t * v.st + v.offset[first + b]]);
      continue;
    }
    const scalar* from = base + first * v.sj;
    int64_t b = 0;
    if (v.st == 1) {  // time-last: rows of T
      for (; b + 4 <= count; b += 4) {
        int64_t t = 0;
        for (; t + 4 <= T; t += 4) transpose4(from + b * v.sj + t, v.sj, to + t * V + b, V);
        for (; t < T; ++t)
          for (int64_t i = b; i < b + 4; ++i) to[t * V + i] = static_cast<acc>(from[i * v.sj + t]);
      }
    }
    for (; b < count; ++b)
      for (int64_t t = 0; t < T; ++t) to[t * V + b] = static_cast<acc>(from[b * v.sj + t * v.st]);
  }
}

template <typename scalar, typename acc>
void store(const Problem& p, const View& v, scalar* x, int64_t n, int64_t j0, int64_t width, const acc* slab) {
  constexpr int64_t V = lanes<acc>;
  const int64_t T = p.steps, tiles = (width + V - 1) / V, size = tile_size<acc>(p);
  scalar* base = x + n * v.sn;
  if (v.offset == nullptr && v.sj == 1) {
    for (int64_t t0 = 0; t0 < T; t0 += kStreams)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t count = std::min(V, width - tile * V);
        for (int64_t t = t0; t < std::min(T, t0 + kStreams); ++t) {
          const acc* from = slab + tile * size + t * V;
          scalar* row = base + t * v.st + j0 + tile * V;
          if (count == V)
            narrowed<acc>(row, get(from));
          else
            for (int64_t b = 0; b < count; ++b) row[b] = static_cast<scalar>(from[b]);
        }
      }
    return;
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const acc* from = slab + tile * size;
    const int64_t first = j0 + tile * V, count = std::min(V, width - tile * V);
    if (v.offset != nullptr) {
      for (int64_t t = 0; t < T; ++t)
        for (int64_t b = 0; b < count; ++b) base[t * v.st + v.offset[first + b]] = static_cast<scalar>(from[t * V + b]);
      continue;
    }
    scalar* to = base + first * v.sj;
    int64_t b = 0;
    if (v.st == 1) {
      for (; b + 4 <= count; b += 4) {
        int64_t t = 0;
        for (; t + 4 <= T; t += 4) transpose4(from + t * V + b, V, to + b * v.sj + t, v.sj);
        for (; t < T; ++t)
          for (int64_t i = b; i < b + 4; ++i) to[i * v.sj + t] = static_cast<scalar>(from[t * V + i]);
      }
    }
    for (; b < count; ++b)
      for (int64_t t = 0; t < T; ++t) to[b * v.sj + t * v.st] = static_cast<scalar>(from[t * V + b]);
  }
}

// X' = mask · (scale · X + shift); scale and shift are given lane by lane, [tiles][V]
template <typename acc>
void lift(const Problem& p, int64_t n, int64_t tiles, const acc* scale, const acc* shift, acc* slab) {
  constexpr int64_t V = lanes<acc>;
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t t = 0; t < p.steps; ++t) {
      acc* row = slab + tile * tile_size<acc>(p) + t * V;
      vec<acc> x = get(row);
      if (!valid(p, t, n)) {
        x = vec<acc>{};
      } else {
        // two roundings, as everywhere: the tensor library multiplies, then adds
        if (p.scale != nullptr) x = x * get(scale + tile * V);
        asm volatile("" : "+m"(x));
        if (p.shift != nullptr) x = x + get(shift + tile * V);
      }
      put(row, x);
    }
}

}  // namespace mfpsn
